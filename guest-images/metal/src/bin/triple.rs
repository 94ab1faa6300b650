//! Triple faults before anything else: there is no handler for the first exception, nor for the
//! exceptions that follow from it.

#![no_std]
#![no_main]

use core::arch::global_asm;
use core::panic::PanicInfo;

global_asm!(
    r#"
    .section .note.Xen, "a", @note
        .balign 4
        .long 4, 4, 18              # XEN_ELFNOTE_PHYS32_ENTRY
        .asciz "Xen"
        .long _start

    .section .boot, "awx", @progbits
    .code32
    .globl _start
    _start:
        lidt [no_handlers]
        ud2
    no_handlers:
        .word 0
        .long 0
    .code64
    "#
);

#[panic_handler]
fn panic(_: &PanicInfo) -> ! {
    loop {}
}
