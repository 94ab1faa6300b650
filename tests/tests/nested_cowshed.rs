//! `cowshed` on ordinary KVM: Debian's unmodified cloud kernel boots in a nested host.

use cowshed_guest_images::Kernel;
use cowshed_tests::nested::{Host, Step, is_available};
use cowshed_tests::{base, cowshed, guest};
use tempfile::TempDir;

#[test]
fn boots_debians_kernel_with_statuses_a_panic_and_two_cpus_and_leaves_the_base() {
    if !is_available() {
        return;
    }
    let work = TempDir::new().unwrap();
    let kernel = guest::kernel(Kernel::DebianCloud);
    let run = "cowshed run --kernel /inner/vmlinuz --initrd /inner/initrd";
    let step = |name, arguments: &str| {
        Step::new(
            name,
            &format!("export XDG_CACHE_HOME=/cache COWSHED_INIT=/inner/init; {run} {arguments}"),
        )
    };
    // Nothing can be built in there.
    let init = guest::builder().init_path().expect("build init");
    let results = Host::new()
        .program(cowshed::binary(), "/bin/cowshed")
        .file(init, "/inner/init")
        .file(&kernel.bzimage, "/inner/vmlinuz")
        .file(kernel.initrd.expect("its modules"), "/inner/initrd")
        .file(base::make(work.path()), "/inner/base.qcow2")
        .run(&[
            Step::new("before", "sha256sum /inner/base.qcow2"),
            step(
                "status",
                "/inner/base.qcow2 -- sh -c 'yes | head -c 2000000 >/data; sync; uname -v; echo err >&2; exit 3'",
            ),
            step("smp", "--cpus 2 /inner/base.qcow2 -- nproc"),
            step("panic", "/inner/base.qcow2 -- sh -c 'echo c >/proc/sysrq-trigger'"),
            Step::new("after", "sha256sum /inner/base.qcow2"),
        ]);
    let [before, status, smp, panic, after] = &results[..] else {
        panic!("one result for each step: {results:#?}")
    };

    assert_eq!(status.status, 3, "{status:#?}");
    assert!(status.stdout.contains("Debian"), "{status:#?}");
    assert_eq!(status.stderr, "err\n");
    assert_eq!((smp.status, smp.stdout.as_str()), (0, "2\n"), "{smp:#?}");
    assert_eq!(panic.status, 123, "{panic:#?}");
    assert!(panic.stderr.contains("sysrq triggered crash"), "{panic:#?}");
    assert_eq!(before.stdout, after.stdout, "the base was written");
}
