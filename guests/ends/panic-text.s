# A healthy guest that prints what a dying Linux prints: the text must not count, its end must.
.include "multiboot.inc"
start:
	movl $text, %esi
1:	movl $0x3FD, %edx                     # the first serial port's line status
2:	inb %dx, %al
	testb $0x20, %al                      # room for a byte
	jz 2b
	movl $0x3F8, %edx
	lodsb
	testb %al, %al
	jz 3f
	outb %al, %dx
	jmp 1b
3:	xorl %eax, %eax
	outl %eax, $0xF4
4:	hlt
	jmp 4b
text:
	.ascii "Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\r\n"
	.asciz "Rebooting in 1 seconds..\r\n"
image_end:
