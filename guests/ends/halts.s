# Halts fifty times until the interval timer wakes it, every ten milliseconds. Ends with 0 if each HLT lasted until an
# interrupt came, with 1 if one ended without.
.include "multiboot.inc"
start:
	cli
	movl $stack, %esp
	lgdt segments_pointer
	ljmp $0x08, $1f
1:	movl $0x10, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	lidt gates_pointer
	movl $writes, %esi
	movl $(writes_end - writes) / 3, %ecx
2:	movw (%esi), %dx
	movb 2(%esi), %al
	outb %al, %dx
	addl $3, %esi
	loop 2b

	xorl %ebx, %ebx                       # interrupts so far
	movl $50, %ecx
3:	movl %ebx, %edi
	sti
	testb $1, %cl
	jz 4f
	hlt                                   # in the shadow of nothing
	jmp 5f
4:	cli
	sti
	hlt                                   # in the shadow of STI
5:	cli
	cmpl %edi, %ebx
	je 6f
	loop 3b
	xorl %eax, %eax
	jmp 7f
6:	movl $1, %eax
7:	outl %eax, $0xF4
8:	hlt
	jmp 8b

tick:
	incl %ebx
	pushl %eax
	movb $0x20, %al                       # end of interrupt
	outb %al, $0x20
	popl %eax
	iretl

.macro write port, byte
	.word \port
	.byte \byte
.endm
writes:
	write 0x20, 0x11                      # the interrupt controllers: vectors from 0x20 and 0x28, line 0 alone
	write 0xA0, 0x11
	write 0x21, 0x20
	write 0xA1, 0x28
	write 0x21, 0x04
	write 0xA1, 0x02
	write 0x21, 0x01
	write 0xA1, 0x01
	write 0x21, 0xFE
	write 0xA1, 0xFF
	write 0x43, 0x34                      # the interval timer: counter 0, mode 2, 11932 of 1193182 in a second
	write 0x40, 0x9C
	write 0x40, 0x2E
writes_end:

.balign 8
segments:
	.quad 0, 0x00CF9A000000FFFF, 0x00CF92000000FFFF
segments_pointer:
	.word . - segments - 1
	.long segments
.balign 8
gates:
	.skip 0x20 * 8
	.word tick - header, 0x08, 0x8E00, 0x0010
gates_pointer:
	.word . - gates - 1
	.long gates
	.balign 16
	.skip 256
stack:
image_end:
