//! The boot vCPU's first state, and the descriptor and page tables that it names.
//!
//! Application processors need nothing of this: the kernel starts them by INIT and SIPI.

use kvm_bindings::{kvm_dtable, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::{Entry, Error, Protocol};
use crate::layout;

/// `__BOOT_CS` and `__BOOT_DS` of Linux; PVH asks for no certain selectors.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// Descriptors as in Intel's SDM, volume 3, 3.4.5: flat, ring 0, accessed.
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
const CODE_64: u64 = 0x00af_9b00_0000_ffff;
const FLAT_DATA: u64 = 0x00cf_9300_0000_ffff;
/// A busy TSS at address 0 with a limit of 0x67, which no one uses but VM entry wants.
const BUSY_TSS: u64 = 0x0000_8b00_0000_0067;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of `rflags` that is always set.
const RFLAGS_FIXED: u64 = 2;

const PAGE: u64 = 4096;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

fn gdt(protocol: Protocol) -> [u64; 6] {
    let code = match protocol {
        Protocol::Pvh => CODE_32,
        Protocol::Linux64 => CODE_64,
    };
    // The last is the upper half of the TSS descriptor, which has 16 bytes in long mode.
    [0, 0, code, FLAT_DATA, BUSY_TSS, 0]
}

/// Writes the GDT and, for long mode, page tables that map the first 4 GiB onto themselves.
pub(super) fn write_tables(memory: &GuestMemoryMmap, protocol: Protocol) -> Result<(), Error> {
    let words = |address: u64, words: &mut dyn Iterator<Item = u64>| {
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        memory.write_slice(&bytes, GuestAddress(address))
    };
    let failed = |what| move |source: GuestMemoryError| Error::Write { what, source };

    words(layout::GDT, &mut gdt(protocol).into_iter()).map_err(failed("GDT"))?;
    if protocol == Protocol::Linux64 {
        let pdpt = layout::PAGE_TABLES + PAGE;
        let directories = pdpt + PAGE;
        words(
            layout::PAGE_TABLES,
            &mut [pdpt | PRESENT_WRITABLE].into_iter(),
        )
        .and_then(|()| {
            words(
                pdpt,
                &mut (0..4).map(|i| (directories + i * PAGE) | PRESENT_WRITABLE),
            )
        })
        .and_then(|()| {
            words(
                directories,
                &mut (0..2048).map(|i| (i << 21) | LARGE | PRESENT_WRITABLE),
            )
        })
        .map_err(failed("page tables"))?;
    }
    Ok(())
}

impl Entry {
    /// The general registers to enter the kernel with.
    pub fn regs(&self) -> kvm_regs {
        let regs = kvm_regs {
            rip: self.rip,
            rflags: RFLAGS_FIXED,
            ..Default::default()
        };
        match self.protocol {
            Protocol::Pvh => kvm_regs {
                rbx: layout::PVH_START_INFO,
                ..regs
            },
            Protocol::Linux64 => kvm_regs {
                rsi: layout::ZERO_PAGE,
                ..regs
            },
        }
    }

    /// The special registers to enter the kernel with: `reset` is what the new vCPU has, whose
    /// APIC base is kept.
    pub fn sregs(&self, reset: kvm_sregs) -> kvm_sregs {
        let gdt = gdt(self.protocol);
        let segment = |selector: u16| {
            let descriptor = gdt.get(usize::from(selector / 8)).copied().unwrap_or(0);
            segment(selector, descriptor)
        };
        let data = segment(DATA);
        let sregs = kvm_sregs {
            cs: segment(CODE),
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: segment(TASK),
            gdt: kvm_dtable {
                base: layout::GDT,
                limit: size_of_val(&gdt) as u16 - 1,
                ..Default::default()
            },
            idt: kvm_dtable::default(),
            cr0: CR0_PE | CR0_ET,
            cr4: 0,
            efer: 0,
            ..reset
        };
        match self.protocol {
            Protocol::Pvh => sregs,
            Protocol::Linux64 => kvm_sregs {
                cr0: CR0_PE | CR0_ET | CR0_PG,
                cr3: layout::PAGE_TABLES,
                cr4: CR4_PAE,
                efer: EFER_LME | EFER_LMA,
                ..sregs
            },
        }
    }

    /// The x87 and SSE state after FNINIT and reset.
    pub fn fpu(&self) -> kvm_fpu {
        kvm_fpu {
            fcw: 0x37f,
            mxcsr: 0x1f80,
            ..Default::default()
        }
    }
}

/// What the processor would cache of a flat segment's descriptor.
fn segment(selector: u16, descriptor: u64) -> kvm_segment {
    let bits = |shift: u32, count: u32| ((descriptor >> shift) & ((1 << count) - 1)) as u32;
    let g = bits(55, 1);
    let limit = bits(0, 16) | (bits(48, 4) << 16);
    kvm_segment {
        base: u64::from(bits(16, 24) | (bits(56, 8) << 24)),
        limit: if g == 1 { (limit << 12) | 0xfff } else { limit },
        selector,
        type_: bits(40, 4) as u8,
        s: bits(44, 1) as u8,
        dpl: bits(45, 2) as u8,
        present: bits(47, 1) as u8,
        avl: bits(52, 1) as u8,
        l: bits(53, 1) as u8,
        db: bits(54, 1) as u8,
        g: g as u8,
        ..Default::default()
    }
}
