//! Between `boot.s` and a program: arguments, traps, panics.

use core::arch::global_asm;
use core::ffi::{CStr, c_char};
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::{power, println};

global_asm!(include_str!("boot.s"));

/// What the VMM hands to a PVH guest (Xen's `hvm_start_info`, its first fields).
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    nr_modules: u32,
    modlist_paddr: u64,
    cmdline_paddr: u64,
}

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
    if info.magic != MAGIC {
        panic!("no hvm_start_info: its magic is {:#x}", info.magic);
    }
    let text = match info.cmdline_paddr {
        0 => c"",
        // SAFETY: PVH promises a NUL-terminated string, which nobody writes to.
        addr => unsafe { CStr::from_ptr(addr as *const c_char) },
    };
    program(text.to_str().unwrap_or_default())
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
