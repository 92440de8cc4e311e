/*
 * Boot, exceptions, and the accesses themselves; assembled for 32-bit modes
 * and for long mode.
 *
 * A walk's access is a round trip (struct trip): go() loads the walk's
 * registers and returns into a stub by IRET, at the wanted privilege.  The
 * stub ends in INT VECTOR_DONE or in an exception: both arrive at `back`,
 * which keeps what happened, loads the payload's own registers, and returns
 * from go().
 */
#include "walks.h"

#ifdef __x86_64__
#define WORD 8
#define TRIP(n) trip + 8 * n
#define ax %rax
#define cx %rcx
#define dx %rdx
#define di %rdi
#define sp %rsp
#else
#define WORD 4
#define TRIP(n) trip + 4 * n
#define ax %eax
#define cx %ecx
#define dx %edx
#define di %edi
#define sp %esp
#endif

/* ---- multiboot 1, with address fields: a loader needs no ELF --------------- */
.section .multiboot, "ax"
.code32
.globl start
start:	jmp	1f
.balign 4
mbh:	.long	0x1BADB002
	.long	0x00010002		/* memory information, address fields */
	.long	-(0x1BADB002 + 0x00010002)
	.long	mbh, image_start, image_end, bss_end, start
1:	cli
	cld
	movl	$stack_top, %esp
	movl	$image_end, %edi
	movl	$bss_end, %ecx
	subl	%edi, %ecx
	shrl	$2, %ecx
	xorl	%eax, %eax
	rep stosl
	movl	%cr0, %eax
	andl	$0x9FFFFFFF, %eax	/* caches on */
	movl	%eax, %cr0
#ifdef __x86_64__
/* Home: the first six GiB one to one, in 2 MiB pages. */
	movl	$home_pd + 3, %eax
	movl	$home_pdpt, %edi
	movl	$6, %ecx
2:	movl	%eax, (%edi)
	addl	$0x1000, %eax
	addl	$8, %edi
	loop	2b
	movl	$0xE3, %eax		/* P W A D PS */
	xorl	%edx, %edx
	movl	$home_pd, %edi
	movl	$6 * 512, %ecx
3:	movl	%eax, (%edi)
	movl	%edx, 4(%edi)
	addl	$0x200000, %eax
	adcl	$0, %edx
	addl	$8, %edi
	loop	3b
	movl	$home_pdpt + 3, home_pml4
	movl	$home_pml4 + 3, home_pml5
	movl	$home_pml4, %eax
	movl	%eax, %cr3
	movl	$CR4_PAE, %esi
/* The word `la57` on the command line asks for five levels, if there are. */
	movl	16(%ebx), %edi
4:	cmpb	$0, (%edi)
	je	5f
	cmpl	$0x3735616C, (%edi)
	leal	1(%edi), %edi
	jne	4b
	pushl	%ebx
	movl	$7, %eax
	xorl	%ecx, %ecx
	cpuid
	popl	%ebx
	testl	$1 << 16, %ecx
	jz	5f
	orl	$CR4_LA57, %esi
	movl	$home_pml5, %eax
	movl	%eax, %cr3
5:	movl	%esi, %cr4
	movl	$MSR_EFER, %ecx
	rdmsr
	orl	$EFER_LME, %eax
	wrmsr
	movl	%cr0, %eax
	orl	$CR0_PG | CR0_PE, %eax
	movl	%eax, %cr0
	lgdt	boot_gdt_ptr
	ljmp	$SEL_CODE0, $6f
.code64
6:	movl	%ebx, %edi
	call	main
#else
	pushl	%ebx
	call	main
#endif
7:	hlt
	jmp	7b
#ifdef __x86_64__
.balign 8
boot_gdt: .quad	0, 0x00AF9B000000FFFF
boot_gdt_ptr: .word 15
	.long	boot_gdt
#endif

/* ---- the accesses, for the supervisor and, on a page of its own, for the user */
.macro STUBS name, a, d
.globl \name
\name:
	mov	(\d), \a
	int	$VECTOR_DONE
\name\()_write:
	mov	\a, (\d)
	int	$VECTOR_DONE
\name\()_fetch:
	movl	$1f, %edx
	jmp	*\d
1:	int	$VECTOR_DONE
\name\()_implicit:			/* reads the LDT's first descriptor */
	xorl	%eax, %eax
	lsl	%ecx, %eax
	int	$VECTOR_DONE
.endm

.text
	STUBS	stubs, ax, di
.section .user, "ax"
	STUBS	user_stubs, ax, di
.section .rodata
.balign 4
.globl stub_offsets
stub_offsets:
	.long	0, stubs_write - stubs, stubs_fetch - stubs, stubs_implicit - stubs
#ifdef __x86_64__
/* The same for guests without long mode. */
.text
.code32
	STUBS	stubs32, %eax, %edi
.section .user, "ax"
	STUBS	user_stubs32, %eax, %edi
.code64
.section .rodata
.globl stub_offsets32
stub_offsets32:
	.long	0, stubs32_write - stubs32, stubs32_fetch - stubs32, stubs32_implicit - stubs32
#endif

/* ---- there ------------------------------------------------------------------- */
.text
.globl go
go:
#ifdef __x86_64__
	push	%rbx
	push	%rbp
	push	%r12
	push	%r13
	push	%r14
	push	%r15
#else
	push	%ebx
	push	%ebp
	push	%esi
	push	%edi
	mov	%cr0, %eax
	andl	$~CR0_PG, %eax
	mov	%eax, %cr0
#endif
	mov	sp, TRIP(TRIP_STACK)
	mov	TRIP(TRIP_CR4), ax
	mov	ax, %cr4
	cmpl	$0, TRIP(TRIP_HAS_EFER)
	je	1f
	movl	TRIP(TRIP_EFER), %eax
	xorl	%edx, %edx
	movl	$MSR_EFER, %ecx
	wrmsr
1:	movl	$1, TRIP(TRIP_PHASE)
	mov	TRIP(TRIP_CR3), ax
	mov	ax, %cr3
	mov	TRIP(TRIP_CR0), ax
	mov	ax, %cr0
	movl	$2, TRIP(TRIP_PHASE)
#ifndef __x86_64__
	testl	$3, TRIP(TRIP_CS)
	jz	2f
#endif
	push	TRIP(TRIP_SS)
	push	TRIP(TRIP_STACK)
2:	push	TRIP(TRIP_FLAGS)
	push	TRIP(TRIP_CS)
	push	TRIP(TRIP_IP)
	mov	TRIP(TRIP_ADDRESS), di
	mov	TRIP(TRIP_VALUE), ax
	movl	$SEL_IN_LDT, %ecx
#ifdef __x86_64__
	iretq
#else
	iretl
#endif

/* ---- and back ------------------------------------------------------------------ */
back:	mov	ax, TRIP(TRIP_VALUE)
	pop	TRIP(TRIP_VECTOR)
	pop	TRIP(TRIP_CODE)
	mov	%cr2, ax
	mov	ax, TRIP(TRIP_CR2)
#ifndef __x86_64__
	mov	%cr0, %eax
	andl	$~CR0_PG, %eax
	mov	%eax, %cr0
#endif
	mov	TRIP(TRIP_HOME_CR3), ax
	mov	ax, %cr3
	mov	TRIP(TRIP_HOME_CR4), ax
	mov	ax, %cr4
	cmpl	$0, TRIP(TRIP_HAS_EFER)
	je	1f
	movl	TRIP(TRIP_HOME_EFER), %eax
	xorl	%edx, %edx
	movl	$MSR_EFER, %ecx
	wrmsr
1:	mov	TRIP(TRIP_HOME_CR0), ax
	mov	ax, %cr0
	mov	TRIP(TRIP_STACK), sp
	push	$2
	popf
#ifdef __x86_64__
	pop	%r15
	pop	%r14
	pop	%r13
	pop	%r12
	pop	%rbp
	pop	%rbx
#else
	pop	%edi
	pop	%esi
	pop	%ebp
	pop	%ebx
#endif
	ret

/* Gates, 16 bytes each: vectors 0 to 31, then VECTOR_DONE. */
.balign 16
.globl gates
gates:
.set vector, 0
.rept 33
	.balign	16
.if vector != 8 && (vector < 10 || vector > 14) && vector != 17 && vector != 21 && vector != 29 && vector != 30
	push	$0
.endif
.if vector == 32
	push	$VECTOR_DONE
.else
	push	$vector
.endif
	jmp	back
.set vector, vector + 1
.endr

#ifdef __x86_64__
/* run_guest(u64 vmcb, u64 host_vmcb, u64 address, u64 ecx) */
.globl run_guest
run_guest:
	push	%rbx
	push	%rbp
	push	%r12
	push	%r13
	push	%r14
	push	%r15
	push	%rsi
	mov	%rsi, %rax
	vmsave
	mov	%rdi, %rax
	mov	%rdx, %rdi
	vmload
	vmrun
	vmsave
	pop	%rax
	vmload
	stgi
	pop	%r15
	pop	%r14
	pop	%r13
	pop	%r12
	pop	%rbp
	pop	%rbx
	ret
#endif
.section .note.GNU-stack, "", @progbits
