//! What a C library would bring: the entry point, memory, the end on a panic.

use core::arch::naked_asm;
use core::mem::MaybeUninit;
use core::panic::PanicInfo;

use talc::{ClaimOnOom, Span, Talc, Talck};

/// Where the kernel enters. It aligns the stack as the ABI wants it at a function's entry.
///
/// # Safety
/// For the kernel only, once.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn _start() -> ! {
    naked_asm!("xor ebp, ebp", "and rsp, -16", "call {begin}", "ud2", begin = sym begin)
}

extern "C" fn begin() -> ! {
    crate::main();
    crate::raw::exit(0)
}

/// Takes no memory until it is touched.
const HEAP_SIZE: usize = 16 << 20;
static mut HEAP: [MaybeUninit<u8>; HEAP_SIZE] = [MaybeUninit::uninit(); HEAP_SIZE];

#[global_allocator]
static ALLOCATOR: Talck<talc::locking::AssumeUnlockable, ClaimOnOom> =
    // SAFETY: nothing else touches HEAP, and this process never has a second thread, so the
    // allocator needs no lock.
    Talc::new(unsafe { ClaimOnOom::new(Span::from_array(&raw mut HEAP)) }).lock();

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    crate::console::say(&alloc::format!("{info}"));
    // The end of PID 1 is a kernel panic, which the VMM sees.
    crate::raw::exit(134)
}
