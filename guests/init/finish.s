# finish VALUE: writes the decimal VALUE to I/O port 0xF4, which ends the run. Needs root; no library.
.globl _start
_start:
	cmpq $2, (%rsp)                       # one argument
	jne 9f
	movq 16(%rsp), %rsi
	xorl %ebx, %ebx
1:	movzbl (%rsi), %eax
	incq %rsi
	testl %eax, %eax
	jz 2f
	subl $'0', %eax
	cmpl $9, %eax
	ja 9f
	imull $10, %ebx
	addl %eax, %ebx
	jmp 1b
2:	movl $173, %eax                       # ioperm(0xF4, 4, 1)
	movl $0xF4, %edi
	movl $4, %esi
	movl $1, %edx
	syscall
	testq %rax, %rax
	jnz 9f
	movl %ebx, %eax
	outl %eax, $0xF4
9:	movl $60, %eax                        # exit(1): the value is none, or nobody listens on the port
	movl $1, %edi
	syscall
