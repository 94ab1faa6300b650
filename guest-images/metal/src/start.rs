//! Between `boot.s` and a program: arguments, traps, panics.

use core::arch::global_asm;
use core::ffi::{CStr, c_char};
use core::panic::PanicInfo;
use core::slice;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::{memory, power, println};

global_asm!(include_str!("note.s"), include_str!("boot.s"));

/// Named here so that cargo links again when the script changes: nothing else tells it.
const _: &str = include_str!("../link.ld");

/// What the VMM hands to a PVH guest (Xen's `hvm_start_info`, version 1).
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    nr_modules: u32,
    modlist_paddr: u64,
    cmdline_paddr: u64,
    rsdp_paddr: u64,
    memmap_paddr: u64,
    memmap_entries: u32,
    reserved: u32,
}

/// An entry of the memory map (`hvm_memmap_table_entry`).
#[repr(C)]
struct MapEntry {
    addr: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

const RAM: u32 = 1;

const MAGIC: u32 = 0x336e_c578;

/// Names the function that a guest runs: `fn(&'static str) -> !`, given the command line.
#[macro_export]
macro_rules! program {
    ($main:path) => {
        #[unsafe(no_mangle)]
        extern "Rust" fn program(command_line: &'static str) -> ! {
            $main(command_line)
        }
    };
}

unsafe extern "Rust" {
    /// Defined by [`program!`].
    safe fn program(command_line: &'static str) -> !;
}

/// First Rust of a guest; `boot.s` comes here.
#[unsafe(no_mangle)]
extern "C" fn ring3(info: &'static StartInfo) -> ! {
    if info.magic != MAGIC || info.version == 0 {
        panic!(
            "hvm_start_info: magic {:#x}, version {}",
            info.magic, info.version
        );
    }
    let text = match info.cmdline_paddr {
        0 => c"",
        // SAFETY: PVH promises a NUL-terminated string, which nobody writes to.
        addr => unsafe { CStr::from_ptr(addr as *const c_char) },
    };
    init_memory(info);
    program(text.to_str().unwrap_or_default())
}

/// Hands out the RAM past the program.
fn init_memory(info: &StartInfo) {
    unsafe extern "C" {
        /// End of the program, from `link.ld`: only its address means something.
        safe static __image_end: u8;
    }
    let image_end = &raw const __image_end as u64;
    // SAFETY: version 1 has a memory map, of that many entries, which nobody writes to.
    let map = unsafe {
        slice::from_raw_parts(
            info.memmap_paddr as *const MapEntry,
            info.memmap_entries as usize,
        )
    };
    let is_ours =
        |it: &&MapEntry| it.kind == RAM && (it.addr..it.addr + it.size).contains(&image_end);
    match map.iter().find(is_ours) {
        Some(ram) => memory::init(image_end, ram.addr + ram.size),
        None => panic!("the memory map has no RAM at {image_end:#x}"),
    }
}

/// Reports an exception and resets; `boot.s` comes here, in ring 3 on a fresh stack.
#[unsafe(no_mangle)]
extern "C" fn trap(vector: u64, error: u64, rip: u64, cr2: u64) -> ! {
    static AGAIN: AtomicBool = AtomicBool::new(false);
    if !AGAIN.swap(true, Ordering::Relaxed) {
        println!("trap {vector} error {error:#x} rip {rip:#x} cr2 {cr2:#x}");
    }
    power::reset()
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    println!("{info}");
    power::reset()
}
