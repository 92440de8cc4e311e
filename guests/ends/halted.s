# Halts with interrupts off, which is for ever.
.include "multiboot.inc"
start:
	cli
1:	hlt
	jmp 1b
image_end:
