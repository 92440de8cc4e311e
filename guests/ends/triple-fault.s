# Ends in a triple fault: no interrupt table, then an exception.
.include "multiboot.inc"
start:
	lidt no_table
	ud2
no_table:
	.word 0
	.long 0
image_end:
