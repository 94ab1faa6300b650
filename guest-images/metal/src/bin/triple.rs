//! Triple faults before anything else: there is no handler for the first exception, nor for the
//! exceptions that follow from it.

#![no_std]
#![no_main]

use core::arch::global_asm;
use core::panic::PanicInfo;

global_asm!(
    include_str!("../note.s"),
    r#"
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
