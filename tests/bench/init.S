/* PID 1 of a Linux guest: says so on the console and restarts the machine. */
	.text
	.globl _start
_start:
	movl $1, %eax			/* write(1, message, 6) */
	movl $1, %edi
	leaq message(%rip), %rsi
	movl $6, %edx
	syscall
	movl $169, %eax			/* reboot(RESTART) */
	movl $0xfee1dead, %edi
	movl $672274793, %esi
	movl $0x01234567, %edx
	syscall
1:	jmp 1b
message:
	.ascii "pid 1\n"
