# Never ends.
.include "multiboot.inc"
start:
	jmp start
image_end:
