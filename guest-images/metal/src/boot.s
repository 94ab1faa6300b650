# Ring 0, all of it: from the PVH entry point to ring 3, and the interrupt handlers.
#
# A VMM enters a PVH guest in 32-bit protected mode, paging off, EBX pointing to
# hvm_start_info. Rust runs in ring 3 of long mode, because a KVM without VMX or SVM runs
# ring 3 natively but emulates ring 0, slowly and without SSE. To have as little of ring 0 as
# possible, every table is laid out by the assembler: that needs a fixed address, BASE, which
# link.ld gives to this section.

.set BASE, 0x100000

.set KERNEL_CODE, 0x08
.set USER_DATA, 0x10 | 3
.set USER_CODE, 0x18 | 3
.set TASK, 0x20

.set EXCEPTIONS, 32
.set INTERRUPTS, 16
.set LAPIC_EOI, 0xfee000b0

.section .boot, "awx", @progbits

# One 16-byte stub for each vector, so that the address of each is known: BASE + 16 * vector.
# Exceptions push their vector above the error code (the CPU pushes one for some of them).
boot:
.set vector, 0
.rept EXCEPTIONS
    .balign 16
    .if (0x60227d00 >> vector) & 1 == 0
    push 0
    .endif
    push vector
    jmp exception
    .set vector, vector + 1
.endr
# Interrupts count themselves.
.rept INTERRUPTS
    .balign 16
    lock inc qword ptr [interrupt_counts + 8 * (vector - EXCEPTIONS)]
    jmp end_of_interrupt
    .set vector, vector + 1
.endr

end_of_interrupt:
    push rax
    mov eax, LAPIC_EOI
    mov dword ptr [rax], 0
    pop rax
    iretq

# On the stack: vector, error code, then RIP, CS, RFLAGS, RSP, SS.
#
# STI, CLI and HLT of ring 3 raise #GP: they are carried out here on its behalf, which is the
# only system call there is. Any other exception ends in Rust: `trap(vector, error, rip, cr2)`.
exception:
    cmp dword ptr [rsp], 13
    jne trapped
    test byte ptr [rsp + 24], 3
    jz trapped
    push rax
    mov rax, [rsp + 24]
    mov al, [rax]
    cmp al, 0xfb
    je do_sti
    cmp al, 0xfa
    je do_cli
    cmp al, 0xf4
    je do_hlt
    pop rax
trapped:
    pop rdi
    pop rsi
    pop rdx
    mov rcx, cr2
    mov eax, offset trap
    jmp enter_ring3

do_sti:
    or qword ptr [rsp + 40], 0x200
    jmp resume
do_cli:
    and qword ptr [rsp + 40], -0x201
    jmp resume
do_hlt:
    sti
    hlt
    cli
resume:
    inc qword ptr [rsp + 24]
    pop rax
    add rsp, 16
    iretq

.code32
.globl _start
_start:
    lgdt [gdt_pointer]
    mov eax, 0x620                  # CR4: PAE, and SSE by OSFXSR and OSXMMEXCPT
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080             # EFER: long mode
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, 0x80000033             # CR0: paging, NE, ET, MP (for SSE), PE
    mov cr0, eax
    .byte 0xea                      # far jump
    .long long_mode
    .word KERNEL_CODE

.code64
long_mode:
    lidt [idt_pointer]
    mov eax, TASK
    ltr ax
    xor eax, eax
    mov ds, eax
    mov es, eax
    mov edi, ebx
    mov eax, offset ring3
# Goes to the Rust function RAX in ring 3, interrupts off, on a fresh stack.
enter_ring3:
    mov esp, offset ring0_stack_end
    push USER_DATA
    push offset ring3_stack_end - 8 # as if called
    push 2
    push USER_CODE
    push rax
    iretq

# Identity map of the first 4 GiB by 2 MiB pages, all of it open to ring 3.
.balign 4096
pml4:
    .quad pdpt + 7                  # present, writable, user
    .zero 4096 - 8
pdpt:
    .quad pd + 0x0007
    .quad pd + 0x1007
    .quad pd + 0x2007
    .quad pd + 0x3007
    .zero 4096 - 32
pd:
.set page, 0
.rept 2048
    .quad (page << 21) + 0x87       # ... and a large page
    .set page, page + 1
.endr

# Task state: the ring 0 stack, and an I/O bitmap that lets ring 3 use every port.
.balign 16
tss:
    .long 0
    .quad ring0_stack_end
    .zero 102 - 12
    .word tss_io_bitmap - tss
tss_io_bitmap:
    .zero 65536 / 8
    .byte 0xff                      # the CPU may read one byte past the last port's
tss_end:

.set TSS_BASE, BASE + tss - boot
.balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        # KERNEL_CODE: 64-bit, ring 0
    .quad 0x00cff3000000ffff        # USER_DATA
    .quad 0x00affb000000ffff        # USER_CODE: 64-bit, ring 3
    .word tss_end - tss - 1         # TASK
    .word TSS_BASE & 0xffff
    .byte (TSS_BASE >> 16) & 0xff
    .byte 0x89, 0
    .byte (TSS_BASE >> 24) & 0xff
    .quad 0
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .quad gdt

.balign 16
idt:
.set vector, 0
.rept EXCEPTIONS + INTERRUPTS
    .word (BASE + 16 * vector) & 0xffff
    .word KERNEL_CODE
    .word 0x8e00                    # present, interrupt gate
    .word (BASE + 16 * vector) >> 16
    .quad 0
    .set vector, vector + 1
.endr
idt_pointer:
    .word idt_pointer - idt - 1
    .quad idt

.section .bss
.balign 16
    .zero 4096
ring0_stack_end:
    .zero 65536
ring3_stack_end:
.globl interrupt_counts
interrupt_counts:
    .zero 8 * INTERRUPTS

# What compilers expect of a C library. Ring 3 code.
.section .text
.globl memcpy
memcpy:
    mov rax, rdi
    mov rcx, rdx
    rep movsb
    ret

.globl memmove
memmove:
    mov rax, rdi
    mov rcx, rdx
    mov r8, rdi
    sub r8, rsi
    cmp r8, rdx                     # does the destination begin inside the source?
    jb 1f
    rep movsb
    ret
1:  lea rdi, [rdi + rdx - 1]
    lea rsi, [rsi + rdx - 1]
    std
    rep movsb
    cld
    ret

.globl memset
memset:
    mov r8, rdi
    mov eax, esi
    mov rcx, rdx
    rep stosb
    mov rax, r8
    ret

.globl memcmp
.globl bcmp
memcmp:
bcmp:
    mov rcx, rdx
    xor eax, eax
    cmp eax, eax                    # equal, if there are no bytes
    repe cmpsb
    je 1f
    movzx eax, byte ptr [rdi - 1]
    movzx ecx, byte ptr [rsi - 1]
    sub eax, ecx
1:  ret

.globl strlen
strlen:
    xor eax, eax
    mov rcx, -1
    repne scasb
    mov rax, -2
    sub rax, rcx
    ret
