//! What a C library would bring: the entry point, memory, the end on a panic.

use core::arch::naked_asm;
use core::cell::UnsafeCell;
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

const HEAP_SIZE: usize = 16 << 20;

/// The memory that is given out. It takes none of the machine's until it is touched.
struct Heap(UnsafeCell<MaybeUninit<[u8; HEAP_SIZE]>>);

// SAFETY: only the allocator touches it, and this process never has a second thread.
unsafe impl Sync for Heap {}

static HEAP: Heap = Heap(UnsafeCell::new(MaybeUninit::uninit()));

// SAFETY: nothing else touches the heap, and it lives for ever.
const CLAIM: ClaimOnOom =
    unsafe { ClaimOnOom::new(Span::from_base_size(HEAP.0.get().cast(), HEAP_SIZE)) };

/// Without a lock: this process never has a second thread.
#[global_allocator]
static ALLOCATOR: Talck<talc::locking::AssumeUnlockable, ClaimOnOom> = Talc::new(CLAIM).lock();

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    crate::console::say(&alloc::format!("{info}"));
    // The end of PID 1 is a kernel panic, which the VMM sees.
    crate::raw::exit(134)
}
