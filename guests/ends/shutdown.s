# Switches the machine off: SLP_EN in the ACPI control register of QEMU's PIIX4, sleep type 0.
.include "multiboot.inc"
start:
	movl $0x604, %edx
	movw $0x2000, %ax
	outw %ax, %dx
1:	hlt
	jmp 1b
image_end:
