//! `cowshed` on ordinary KVM: Debian's unmodified cloud kernel boots in a nested host.

use cowshed_guest_images::Kernel;
use cowshed_tests::nested::{Host, Step, is_available};
use cowshed_tests::{base, cowshed, guest};
use tempfile::TempDir;

#[test]
fn boots_debians_kernel_with_statuses_a_panic_and_many_cpus_and_leaves_the_base() {
    if !is_available() {
        return;
    }
    let work = TempDir::new().unwrap();
    let kernel = guest::kernel(Kernel::DebianCloud);
    let run = "cowshed run --kernel /inner/vmlinuz --initrd /inner/initrd";
    // There are no sources in there and no cargo: what the guest's PID 1 is, the program knows.
    let step = |name, arguments: &str| Step::new(name, &format!("{run} {arguments}"));
    let results = Host::new()
        .program(cowshed::binary(), "/bin/cowshed")
        .file(&kernel.bzimage, "/inner/vmlinuz")
        .file(kernel.initrd.expect("its modules"), "/inner/initrd")
        .file(base::make(work.path()), "/inner/base.qcow2")
        .run(&[
            Step::new("before", "sha256sum /inner/base.qcow2"),
            step(
                "status",
                "/inner/base.qcow2 -- sh -c 'yes | head -c 2000000 >/data; sync; uname -v; echo err >&2; exit 3'",
            ),
            step("smp-2", "--cpus 2 /inner/base.qcow2 -- nproc"),
            step(
                "smp-8",
                "--cpus 8 /inner/base.qcow2 -- sh -c \
                 'nproc; for mask in 1 2 4 8 10 20 40 80; do taskset $mask echo $mask; done'",
            ),
            step("panic", "/inner/base.qcow2 -- sh -c 'echo c >/proc/sysrq-trigger'"),
            Step::new("after", "sha256sum /inner/base.qcow2"),
        ]);
    let [before, status, smp_2, smp_8, panic, after] = &results[..] else {
        panic!("one result for each step: {results:#?}")
    };

    assert_eq!(status.status, 3, "{status:#?}");
    assert!(status.stdout.contains("Debian"), "{status:#?}");
    assert_eq!(status.stderr, "err\n");
    // Each CPU runs a program of its own.
    let each = "1\n2\n4\n8\n10\n20\n40\n80\n";
    for (smp, said) in [(smp_2, "2\n".to_owned()), (smp_8, format!("8\n{each}"))] {
        assert_eq!((smp.status, &smp.stdout), (0, &said), "{smp:#?}");
    }
    assert_eq!(panic.status, 123, "{panic:#?}");
    assert!(panic.stderr.contains("sysrq triggered crash"), "{panic:#?}");
    assert_eq!(before.stdout, after.stdout, "the base was written");
}
