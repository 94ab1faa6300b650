//! Sizes and kernels: CPUs, memory past the hole below 4 GiB, bzImage and ELF.

use cowshed_guest_images::Kernel;
use cowshed_tests::cowshed::Cowshed;
use cowshed_tests::skip::kvm_is_here;
use cowshed_tests::{base, guest};
use tempfile::TempDir;

#[test]
fn two_cpus_under_a_bzimage() {
    if !kvm_is_here() {
        return;
    }
    let work = TempDir::new().unwrap();
    let base = base::make(work.path());
    // Both CPUs run a program of their own at the same time, and each takes timer interrupts.
    let script = "nproc
        for cpu in 0 1; do taskset $((cpu + 1)) sh -c 'i=0; while [ $i -lt 2000 ]; do i=$((i + 1)); done' & done
        wait
        awk '/LOC:/ { print ($2 > 0), ($3 > 0) }' /proc/interrupts";
    let run = Cowshed::run()
        .option("--kernel", guest::kernel(Kernel::Small).bzimage)
        .option("--cpus", "2")
        .arg(&base)
        .script(script);
    assert_eq!(run.output().expect_status(0).stdout(), "2\n1 1\n");
}

#[test]
fn five_gibibytes_under_an_elf_kernel() {
    if !kvm_is_here() {
        return;
    }
    let work = TempDir::new().unwrap();
    let base = base::make(work.path());
    let run = Cowshed::run()
        .option("--kernel", guest::kernel(Kernel::Small).kernel)
        .option("--memory", "5G")
        .arg(&base)
        .script("awk '/MemTotal/ { print $2 }' /proc/meminfo; grep -c '^ *1[0-9a-f]*-.*RAM' /proc/iomem");
    let output = run.output().expect_status(0).stdout();
    let words: Vec<u64> = output
        .split_whitespace()
        .map(|word| word.parse().unwrap())
        .collect();
    let [total_kib, above_4_gib] = words[..] else {
        panic!("{output}")
    };
    // The kernel keeps a few percent for itself.
    assert!((4_800_000..5 << 20).contains(&total_kib), "{output}");
    assert!(above_4_gib >= 1, "{output}");
}
