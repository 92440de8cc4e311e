# The five memory routines that the compiler calls. Chunks of 16 bytes and overlapping ends: where an emulator
# counts instructions, each iteration of a REP string instruction counts as one. System V calling convention.

.text
.globl memcpy
.globl memmove
# rdi destination, rsi source, rdx bytes; returns the destination
memmove:
	movq %rdi, %rax
	subq %rsi, %rax
	cmpq %rdx, %rax
	jb 5f                                 # the destination begins inside the source: from the end down
memcpy:
	movq %rdi, %rax
	cmpq $16, %rdx
	jb 3f
	movups -16(%rsi,%rdx), %xmm1          # the last 16 bytes, read before anything is overwritten
	leaq -16(%rdi,%rdx), %r8
1:	movups (%rsi), %xmm0
	movups %xmm0, (%rdi)
	addq $16, %rsi
	addq $16, %rdi
	cmpq %r8, %rdi
	jb 1b
	movups %xmm1, (%r8)
	ret
3:	cmpl $8, %edx
	jb 4f
	movq (%rsi), %rcx
	movq -8(%rsi,%rdx), %r8
	movq %rcx, (%rdi)
	movq %r8, -8(%rdi,%rdx)
	ret
4:	cmpl $4, %edx
	jb 41f
	movl (%rsi), %ecx
	movl -4(%rsi,%rdx), %r8d
	movl %ecx, (%rdi)
	movl %r8d, -4(%rdi,%rdx)
	ret
41:	testl %edx, %edx
	jz 42f
	movl %edx, %r10d
	shrl $1, %r10d
	movzbl (%rsi), %ecx                   # of one to three bytes: the first, the middle one, the last
	movzbl (%rsi,%r10), %r9d
	movzbl -1(%rsi,%rdx), %r8d
	movb %cl, (%rdi)
	movb %r9b, (%rdi,%r10)
	movb %r8b, -1(%rdi,%rdx)
42:	ret
5:	movq %rdi, %rax
	cmpq $16, %rdx
	jb 3b                                 # short copies read everything before they write
	movups (%rsi), %xmm1                  # the first 16 bytes, for the end
6:	movups -16(%rsi,%rdx), %xmm0
	movups %xmm0, -16(%rdi,%rdx)
	subq $16, %rdx
	cmpq $16, %rdx
	ja 6b
	movups %xmm1, (%rdi)
	ret

.globl memset
# rdi destination, esi byte, rdx bytes; returns the destination
memset:
	movq %rdi, %rax
	movzbl %sil, %esi
	movabsq $0x0101010101010101, %rcx
	imulq %rsi, %rcx
	cmpq $16, %rdx
	jb 3f
	movq %rcx, %xmm0
	punpcklqdq %xmm0, %xmm0
	leaq -16(%rdi,%rdx), %r8
	leaq -64(%rdi,%rdx), %r9
	cmpq $64, %rdx
	jb 2f
1:	movups %xmm0, (%rdi)
	movups %xmm0, 16(%rdi)
	movups %xmm0, 32(%rdi)
	movups %xmm0, 48(%rdi)
	addq $64, %rdi
	cmpq %r9, %rdi
	jbe 1b
2:	cmpq %r8, %rdi
	jae 21f
	movups %xmm0, (%rdi)
	addq $16, %rdi
	jmp 2b
21:	movups %xmm0, (%r8)
	ret
3:	cmpl $8, %edx
	jb 4f
	movq %rcx, (%rdi)
	movq %rcx, -8(%rdi,%rdx)
	ret
4:	cmpl $4, %edx
	jb 5f
	movl %ecx, (%rdi)
	movl %ecx, -4(%rdi,%rdx)
	ret
5:	testl %edx, %edx
	jz 6f
	movb %cl, (%rdi)
	movb %cl, -1(%rdi,%rdx)
	shrl $1, %edx
	movb %cl, (%rdi,%rdx)
6:	ret

.globl memcmp
.globl bcmp
# rdi, rsi, rdx bytes; returns a negative, zero or positive value as the first bytes that differ compare
bcmp:
memcmp:
	xorl %ecx, %ecx
1:	leaq 8(%rcx), %r8
	cmpq %rdx, %r8
	ja 3f
	movq (%rdi,%rcx), %rax
	cmpq (%rsi,%rcx), %rax
	jne 3f                                # the bytes decide
	movq %r8, %rcx
	jmp 1b
3:	cmpq %rdx, %rcx
	jae 4f
	movzbl (%rdi,%rcx), %eax
	movzbl (%rsi,%rcx), %r9d
	incq %rcx
	subl %r9d, %eax
	jz 3b
	ret
4:	xorl %eax, %eax
	ret
