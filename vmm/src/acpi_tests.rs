use std::path::Path;
use std::process::Command;

use vm_memory::GuestMemoryMmap;

use super::*;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap()
}

fn bytes<const N: usize>(memory: &GuestMemoryMmap, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    memory
        .read_slice(&mut bytes, GuestAddress(address))
        .unwrap();
    bytes
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// A whole table, its checksum verified.
fn table(memory: &GuestMemoryMmap, address: u64) -> Vec<u8> {
    let len = u32::from_le_bytes(bytes(memory, address + 4));
    let mut table = vec![0; len as usize];
    memory
        .read_slice(&mut table, GuestAddress(address))
        .unwrap();
    assert_eq!(sum(&table), 0, "checksum of {:?}", &table[..4]);
    table
}

/// All tables by signature, found as a kernel finds them.
fn tables(memory: &GuestMemoryMmap, rsdp: u64) -> Vec<(String, Vec<u8>)> {
    let root: [u8; 36] = bytes(memory, rsdp);
    assert_eq!(&root[..8], b"RSD PTR ");
    assert_eq!((sum(&root[..20]), sum(&root), root[15]), (0, 0, 2));
    let xsdt = table(memory, u64::from_le_bytes(bytes(memory, rsdp + 24)));
    let mut found = vec![xsdt];
    for entry in found[0][36..].to_vec().as_chunks().0 {
        found.push(table(memory, u64::from_le_bytes(*entry)));
    }
    let x_dsdt = found[1][140..].first_chunk().unwrap();
    found.push(table(memory, u64::from_le_bytes(*x_dsdt)));
    let name = |table: &[u8]| String::from_utf8(table[..4].to_vec()).unwrap();
    found
        .into_iter()
        .map(|table| (name(&table), table))
        .collect()
}

#[test]
fn a_kernel_finds_every_table_with_good_checksums() {
    for cpus in [1, 2, layout::MAX_CPUS] {
        let memory = memory();
        let rsdp = build(&memory, cpus).unwrap();
        assert_eq!(rsdp, layout::ACPI);
        let tables = tables(&memory, rsdp);
        let names: Vec<_> = tables.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["XSDT", "FACP", "APIC", "MCFG", "DSDT"]);
        assert_eq!(tables[2].1.len(), 44 + usize::from(cpus) * 8 + 12);
        let last = &tables[2].1[44 + usize::from(cpus - 1) * 8..][..8];
        assert_eq!(last, [0, 8, cpus - 1, cpus - 1, 1, 0, 0, 0]);
    }
}

#[test]
fn the_fadt_describes_a_hardware_reduced_machine() {
    let memory = memory();
    let rsdp = build(&memory, 1).unwrap();
    let fadt = &tables(&memory, rsdp)[1].1;
    assert_eq!(fadt.len(), 276);
    let flags = u32::from_le_bytes(*fadt[112..].first_chunk().unwrap());
    assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
    assert_eq!(fadt[109] & 0b10, 0, "an 8042 would be probed");
    assert_eq!(
        &fadt[116..129],
        [1, 8, 0, 1, 0x64, 0, 0, 0, 0, 0, 0, 0, 0xfe]
    );
    assert_eq!(&fadt[244..250], [1, 8, 0, 1, 0x00, 0x06]);
    assert_eq!(&fadt[256..262], [1, 8, 0, 1, 0x01, 0x06]);
}

#[test]
fn tables_that_have_no_memory_are_refused() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0xa0000)]).unwrap();
    assert!(matches!(build(&memory, 1), Err(Error::Write(_))));
}

/// Runs iasl; what it says, and whether it was content.
fn iasl(dir: &Path, args: &[&str]) -> (bool, String) {
    let output = Command::new("iasl")
        .current_dir(dir)
        .args(args)
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

#[test]
fn iasl_disassembles_and_recompiles_every_table() {
    if Command::new("iasl").arg("-v").output().is_err() {
        eprintln!("skipped: iasl is not installed (apt-get install acpica-tools)");
        return;
    }
    let memory = memory();
    let rsdp = build(&memory, 3).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for (name, table) in tables(&memory, rsdp) {
        let (aml, dsl) = (format!("{name}.aml"), format!("{name}.dsl"));
        std::fs::write(dir.path().join(&aml), &table).unwrap();
        let (ok, said) = iasl(dir.path(), &["-d", &aml]);
        assert!(ok && !said.contains("rror"), "{name}: {said}");
        let (ok, said) = iasl(dir.path(), &["-p", "again", &dsl]);
        assert!(ok && said.contains(" 0 Errors"), "{name}: {said}");
        assert!(
            !said.contains("arning") || said.contains(" 0 Warnings"),
            "{name}: {said}"
        );
        let again = std::fs::read(dir.path().join("again.aml")).unwrap();
        // What differs at most is who compiled it, and the checksum over that.
        assert_eq!(
            again[36..],
            table[36..],
            "{name} changes when compiled again"
        );
    }
}
