//! Executes an instruction in ring 0 that KVM's emulator lacks, as a kernel's decompressor does:
//! where ring 0 is emulated, `KVM_RUN` ends with an internal error. A CPU that has BMI2 resets.

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
        shlx eax, ebx, ecx
        mov al, 0xfe
        out 0x64, al
    1:  jmp 1b
    .code64
    "#
);

#[panic_handler]
fn panic(_: &PanicInfo) -> ! {
    loop {}
}
