# Entry points of the host's 32 exceptions. Each ends the run: the frame (vector, error code, and what the
# processor pushed) goes to `host_exception`. The NMI alone returns; it is delivered where GIF is set, never
# inside Rust code.

.text
.macro exception vector, has_code
exception_\vector:
	.if !\has_code
	pushq $0
	.endif
	pushq $\vector
	jmp exception_common
.endm

exception 0, 0
exception 1, 0
exception_2:
	iretq
exception 3, 0
exception 4, 0
exception 5, 0
exception 6, 0
exception 7, 0
exception 8, 1
exception 9, 0
exception 10, 1
exception 11, 1
exception 12, 1
exception 13, 1
exception 14, 1
exception 15, 0
exception 16, 0
exception 17, 1
exception 18, 0
exception 19, 0
exception 20, 0
exception 21, 1
exception 22, 0
exception 23, 0
exception 24, 0
exception 25, 0
exception 26, 0
exception 27, 0
exception 28, 0
exception 29, 1
exception 30, 1
exception 31, 0

exception_common:
	cld
	movq %rsp, %rdi
	andq $-16, %rsp
	call host_exception
	ud2

.section .rodata
.balign 8
.globl exception_entries
exception_entries:
	.irp vector, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
	.quad exception_\vector
	.endr
