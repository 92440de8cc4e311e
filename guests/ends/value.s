# Ends with the value 300, which no exit status can hold.
.include "multiboot.inc"
start:
	movl $300, %eax
	outl %eax, $0xF4
1:	hlt
	jmp 1b
image_end:
