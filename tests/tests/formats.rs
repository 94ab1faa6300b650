//! What the qcow2 format can do, under a guest.

use std::fs;

use cowshed_tests::cowshed::Cowshed;
use cowshed_tests::image::qemu_img_ok;
use cowshed_tests::skip::kvm_is_here;
use tempfile::TempDir;

/// What QEMU encrypted, and what it made a snapshot of, is what the guest reads.
#[test]
fn encrypted_disks_and_snapshots() {
    if !kvm_is_here() {
        return;
    }
    let work = TempDir::new().unwrap();
    let at = |name: &str| work.path().join(name).display().to_string();
    let write = |text: &str| {
        let bytes = [text.repeat(100).into_bytes(), vec![0; 65536]].concat();
        fs::write(at("plain"), bytes).unwrap();
    };
    fs::write(at("password"), "mooh").unwrap();
    write("encrypted\n");
    let (plain, locked, later) = (at("plain"), at("locked"), at("later"));
    let secret = format!("secret,id=key,file={}", at("password"));
    let convert = ["convert", "-f", "raw", "-O", "qcow2"];
    let options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10";
    let encrypt = ["--object", &secret, "-o", options, &plain, &locked];
    qemu_img_ok(convert.iter().chain(&encrypt));
    write("before\n");
    qemu_img_ok(convert.iter().chain(&[plain.as_str(), &later]));
    qemu_img_ok(["snapshot", "-c", "kept", &later]);
    write("after\n");
    let over = ["convert", "-n", "-f", "raw", "-O", "qcow2", &plain, &later];
    qemu_img_ok(over);

    let run = Cowshed::run()
        .option("--disk", format!("{locked},secret-file={}", at("password")))
        .option("--disk", format!("{later},snapshot=kept"))
        .option("--disk", &later)
        .script("for d in b c d; do head -n 1 /dev/vd$d; done; echo new >/dev/vdc");
    let output = run.output().expect_status(0);
    assert_eq!(output.stdout(), "encrypted\nbefore\nafter\n");

    // Without the password it is not opened at all.
    let run = Cowshed::run().option("--disk", format!("{locked},readonly"));
    let said = run.script("true").output().expect_status(125).stderr();
    assert!(said.contains("locked") && said.contains("secret"), "{said}");
}
