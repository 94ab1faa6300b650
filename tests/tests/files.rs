//! Files into the guest and out of it, and where its command starts.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use cowshed_tests::cowshed::Cowshed;
use cowshed_tests::skip::kvm_is_here;
use tempfile::TempDir;

#[test]
fn copies_in_and_out_with_environment_and_folder() {
    if !kvm_is_here() {
        return;
    }
    let work = TempDir::new().unwrap();
    let input = work.path().join("input");
    fs::create_dir_all(input.join("nested")).unwrap();
    let data: Vec<u8> = (0..=u8::MAX).cycle().take(300_000).collect();
    fs::write(input.join("nested/data"), &data).unwrap();
    let tool = input.join("tool");
    fs::write(&tool, "#!/bin/sh\necho \"$GREETING from $PWD\"\n").unwrap();
    fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
    let single = work.path().join("single");
    fs::write(&single, "one file\n").unwrap();
    let output_folder = work.path().join("output");
    let output_file = work.path().join("file");

    let pair = |from: &std::path::Path, to: &str| format!("{}:{to}", from.display());
    let back = |from: &str, to: &std::path::Path| format!("{from}:{}", to.display());
    let run = Cowshed::run()
        .option("--copy-in", pair(&input, "/in"))
        .option("--copy-in", pair(&single, "/single"))
        .option("--copy-out", back("/out", &output_folder))
        .option("--copy-out", back("/single", &output_file))
        .option("--env", "GREETING=hello = there")
        .option("--cwd", "/in")
        .script("./tool; mkdir /out; cp nested/data /out/copy; echo more >>/single; exit 5");
    // What was asked for comes out whatever the status is.
    let output = run.output().expect_status(5);
    assert_eq!(output.stdout(), "hello = there from /in\n");
    assert!(fs::read(output_folder.join("copy")).unwrap() == data);
    assert_eq!(
        fs::read_to_string(&output_file).unwrap(),
        "one file\nmore\n"
    );
}
