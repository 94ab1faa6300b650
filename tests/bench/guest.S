/* A PVH guest in ring 0: writes "hello\n" to COM1, then resets the machine, or with -DIDLE halts for
   good. Two of a kind for any VMM: no driver, no interrupt, no memory of its own. */
	.section .note.Xen, "a", @note
	.balign 4
	.long 4, 4, 18			/* XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz "Xen"
	.long _start

	.text
	.code32
	.globl _start
_start:
	movl $message, %esi
	movl $0x3f8, %edx
	movl $6, %ecx
	cld
1:	lodsb
	outb %al, %dx
	loop 1b
#ifdef IDLE
2:	cli
	hlt
	jmp 2b
#else
	movb $0xfe, %al			/* the keyboard controller's reset */
	outb %al, $0x64
2:	jmp 2b
#endif
message:
	.ascii "hello\n"
