# From the multiboot loader to Rust: 32-bit protected mode in, long mode with an identity map of the first 4
# GiB out.
#
# On entry EAX holds the loader's magic number and EBX the address of its information; both reach `image_main`
# as they are. Where the processor has LA57 and the command line does not hold the word `levels=4`, paging
# gets five levels: that must be settled before long mode, and decides the format of the nested tables too.

.section .multiboot, "ax"
.code32
.balign 4
multiboot_header:
	.long 0x1BADB002
	.long 0x00010003                      # modules on page boundaries, memory information, address fields
	.long -(0x1BADB002 + 0x00010003)
	.long multiboot_header, image_start, data_end, image_end, start32

.text
.code32
.globl start32
start32:
	cli
	cld
	movl $boot_stack_top, %esp
	movl %eax, %ebp                       # magic, kept in EBP; information, kept in EBX

	pushl %ebx
	movl $0x80000000, %eax
	cpuid
	cmpl $0x80000001, %eax
	jb no_long_mode
	movl $0x80000001, %eax
	cpuid
	btl $29, %edx
	jnc no_long_mode
	btl $20, %edx                         # no-execute, which the final tables use
	jnc no_long_mode
	xorl %eax, %eax
	cpuid
	xorl %ecx, %ecx
	cmpl $7, %eax
	jb 1f
	movl $7, %eax
	xorl %ecx, %ecx
	cpuid
1:	movl %ecx, %edi                       # bit 16: LA57
	popl %ebx
	btl $16, %edi
	jnc 2f
	call wants_four_levels
	jnc 2f
	xorl %edi, %edi
2:
	# 2048 pages of 2 MiB, present and writable, behind four directories.
	movl $boot_directories, %edx
	movl $0x83, %eax
	xorl %ecx, %ecx
3:	movl %eax, (%edx,%ecx,8)
	movl $0, 4(%edx,%ecx,8)
	addl $0x200000, %eax
	incl %ecx
	cmpl $2048, %ecx
	jb 3b
	movl $boot_directories + 0x0003, boot_level3
	movl $boot_directories + 0x1003, boot_level3 + 8
	movl $boot_directories + 0x2003, boot_level3 + 16
	movl $boot_directories + 0x3003, boot_level3 + 24
	movl $boot_level3 + 3, boot_level4
	movl $boot_level4 + 3, boot_level5

	movl $0x620, %eax                     # PAE, OSFXSR, OSXMMEXCPT
	movl $boot_level4, %edx
	btl $16, %edi
	jnc 4f
	orl $0x1000, %eax                     # LA57
	movl $boot_level5, %edx
4:	movl %eax, %cr4
	movl %edx, %cr3
	movl $0xC0000080, %ecx
	rdmsr
	orl $0x900, %eax                      # long mode, no-execute
	wrmsr
	movl %cr0, %eax
	andl $0x9FFFFFF3, %eax                # caches on; no emulation, no task-switched trap
	orl $0x80010023, %eax                 # paging, write protection, native FPU errors, monitor, protection
	movl %eax, %cr0
	lgdt boot_gdt_pointer
	ljmp $8, $start64

# Carry set where the loader's command line (EBX: information) holds the word `levels=4`. Preserves EBX, EBP,
# EDI.
wants_four_levels:
	btl $2, (%ebx)                        # flags: a command line is given
	jnc 9f
	movl 16(%ebx), %esi
5:	cmpl $0x6576656C, (%esi)              # "leve"
	jne 6f
	cmpl $0x343D736C, 4(%esi)             # "ls=4"
	jne 6f
	cmpb $0x21, 8(%esi)                   # ends here: a space, or the final NUL
	jb 8f
6:	cmpb $0, (%esi)                       # on to the next word
	je 9f
	cmpb $0x20, (%esi)
	leal 1(%esi), %esi
	jne 6b
	jmp 5b
8:	stc
	ret
9:	clc
	ret

no_long_mode:
	movl $no_long_mode_text, %esi
	movl $0x2F8, %edx
7:	lodsb
	testb %al, %al
	jz 8f
	outb %al, %dx
	jmp 7b
8:	movl $1, %eax
	outl %eax, $0xF4
9:	hlt
	jmp 9b

.code64
start64:
	movl $16, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	xorl %eax, %eax
	movl %eax, %fs
	movl %eax, %gs
	movl $boot_stack_top, %esp
	movl %ebp, %edi
	movl %ebx, %esi
	xorl %ebp, %ebp
	call image_main
	ud2

.section .rodata
no_long_mode_text:
	.asciz "\r\n@record {\"end\":\"error\",\"text\":\"the processor has no long mode with no-execute\"}\r\n"
.balign 8
boot_gdt:
	.quad 0
	.quad 0x00AF9B000000FFFF              # 0x08: 64-bit code
	.quad 0x00CF93000000FFFF              # 0x10: data
boot_gdt_pointer:
	.word . - boot_gdt - 1
	.long boot_gdt

.section .bss
.balign 4096
boot_level5:
	.skip 4096
boot_level4:
	.skip 4096
boot_level3:
	.skip 4096
boot_directories:
	.skip 4 * 4096
.globl boot_stack_guard
boot_stack_guard:
	.skip 4096
	.skip 64 * 1024
boot_stack_top:
