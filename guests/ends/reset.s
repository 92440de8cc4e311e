# Asks the machine for a reset at port 0xCF9 (full, hard).
.include "multiboot.inc"
start:
	movl $0xCF9, %edx
	movb $0x06, %al
	outb %al, %dx
1:	hlt
	jmp 1b
image_end:
