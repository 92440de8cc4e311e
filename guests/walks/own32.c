/*
 * The machine in 32-bit modes.
 *
 * Home is PAE paging, one to one but for the last GiB of linear addresses,
 * which shows the regions above 4 GiB; without PAE it is no paging at all.
 * A walk's tables hold the image too, in their first entry.
 */
#include "walks.h"

static u32 own_pt[1024] ALIGNED;
static u64 own_pd[512] ALIGNED;
static u64 own_pae_pt[1024] ALIGNED;
static u64 home_pd[2048] ALIGNED;
static u64 home_pdpt[4] __attribute__((aligned(32)));
static u8 stack[16384] ALIGNED __attribute__((used));
asm(".globl stack_top\n.set stack_top, stack + 16384\n");
static u8 trap_stack[4096] ALIGNED;

static u64 gdt[9];
static u64 idt[VECTOR_DONE + 1];
static u32 tss[26];
static u32 mode;
struct trip trip;
extern u8 gates[];
void go(void);

u32 machine_features(void)
{
	u32 r[4], most, has = 0;
	cpuid(0, 0, r);
	most = r[0];
	cpuid(1, 0, r);
	has |= r[3] & 1 << 3 ? HAS_PSE : 0;
	has |= r[3] & 1 << 17 ? HAS_PSE36 : 0;
	has |= r[3] & 1 << 6 ? HAS_PAE : 0;
	if (most >= 7) {
		cpuid(7, 0, r);
		has |= r[1] & 1 << 7 ? HAS_SMEP : 0;
		has |= r[1] & 1 << 20 ? HAS_SMAP : 0;
	}
	cpuid(0x80000000, 0, r);
	if (r[0] >= 0x80000001 && r[0] < 0x80010000) {
		cpuid(0x80000001, 0, r);
		has |= r[3] & 1 << 20 ? HAS_NX : 0;
	}
	return has;
}

void *at(u64 physical)
{
	u32 gigabyte = physical >> 30, i;
	if (gigabyte < 4)
		return (void *)(u32)physical;
	for (i = 12; region_base(i) >> 21 != physical >> 21; i++)
		;
	return (void *)(0xC0000000u + ((i - 12) << 21) + (u32)(physical & 0x1FFFFF));
}

u64 own_entry(void)
{
	return mode == 2 ? (u32)own_pt | P | W | U | A : (u32)own_pd | P;
}
u64 own_nested_entry(void)
{
	return 0;
}

u32 stub(const struct run *run, u32 user, u32 kind)
{
	(void)run;
	return (u32)(user ? user_stubs : stubs) + stub_offsets[kind];
}

static u64 segment(u32 base, u32 limit, u32 access, u32 flags)
{
	return (u64)(base >> 24) << 56 | (u64)flags << 52 | (u64)(limit >> 16) << 48 | (u64)access << 40
		| (u64)(base & 0xFFFFFF) << 16 | (limit & 0xFFFF);
}

void machine_start(struct run *run)
{
	struct { u16 limit; u32 base; } __attribute__((packed)) ptr;
	u32 i, user = (u32)user_stubs >> 12;

	mode = run->mode;
	for (i = 0; i < 1024; i++) {
		own_pt[i] = i << 12 | P | W | A | D | (i == user ? U : 0);
		own_pae_pt[i] = own_pt[i];
	}
	own_pd[0] = (u32)own_pae_pt | P | W | U | A;
	own_pd[1] = (u32)(own_pae_pt + 512) | P | W | U | A;
	for (i = 0; i < 2048; i++)
		home_pd[i] = (u64)i << 21 | P | W | A | D | PS;
	for (i = 12; i < run->regions; i++)
		home_pd[1536 + i - 12] = region_base(i) | P | W | A | D | PS;
	for (i = 0; i < 4; i++)
		home_pdpt[i] = (u32)(home_pd + 512 * i) | P;

	gdt[1] = segment(0, 0xFFFFF, 0x9B, 0xC);
	gdt[2] = segment(0, 0xFFFFF, 0x93, 0xC);
	gdt[3] = segment(0, 0xFFFFF, 0xFB, 0xC);
	gdt[4] = segment(0, 0xFFFFF, 0xF3, 0xC);
	gdt[5] = segment((u32)tss, sizeof tss - 1, 0x89, 0);
	tss[1] = (u32)trap_stack + sizeof trap_stack;
	tss[2] = SEL_DATA0;
	tss[25] = sizeof tss << 16;
	for (i = 0; i <= VECTOR_DONE; i++) {
		u32 gate = (u32)gates + 16 * (i == VECTOR_DONE ? 32 : i & 31);
		idt[i] = (u64)(gate >> 16) << 48 | 0xEE00ull << 32 | SEL_CODE0 << 16 | (gate & 0xFFFF);
	}
	ptr.limit = sizeof gdt - 1;
	ptr.base = (u32)gdt;
	asm volatile("lgdt %0" : : "m"(ptr));
	ptr.limit = sizeof idt - 1;
	ptr.base = (u32)idt;
	asm volatile("lidt %0" : : "m"(ptr));
	/* data segments that IRET to user mode leaves alone */
	asm volatile("ljmp %0, $1f\n1:	movl %1, %%ds\n	movl %1, %%es\n	movl %2, %%ss\n	ltr %w3"
		     : : "i"(SEL_CODE0), "r"(SEL_DATA3), "r"(SEL_DATA0), "r"(SEL_TSS));

	trip.has_efer = !!(run->has & HAS_NX);
	trip.home_efer = trip.has_efer ? rdmsr(MSR_EFER) : 0;
	trip.home_cr0 = READ_CR(0) | CR0_WP;
	trip.home_cr4 = 0;
	if (run->has & HAS_PAE) {
		trip.home_cr4 = CR4_PAE;
		trip.home_cr3 = (u32)home_pdpt;
		trip.home_cr0 |= CR0_PG;
		WRITE_CR(4, trip.home_cr4);
		WRITE_CR(3, trip.home_cr3);
	}
	WRITE_CR(0, trip.home_cr0);
}

void perform(const struct run *run, const struct walk *w, struct result *result)
{
	trip.cr0 = CR0_PG | CR0_PE | (w->wp ? CR0_WP : 0) | (trip.home_cr0 & 0x30);
	trip.cr3 = w->root;
	trip.cr4 = (w->pse ? CR4_PSE : 0) | (mode == 3 ? CR4_PAE : 0) | (w->smep ? CR4_SMEP : 0)
		| (w->smap ? CR4_SMAP : 0);
	trip.efer = trip.home_efer | (w->nxe ? EFER_NXE : 0);
	trip.ip = stub(run, w->user, w->kind);
	trip.cs = w->user ? SEL_CODE3 : SEL_CODE0;
	trip.ss = w->user ? SEL_DATA3 : SEL_DATA0;
	trip.flags = 2 | (w->ac ? RFLAGS_AC : 0);
	trip.address = w->gva;
	trip.value = result->value;
	if (w->kind == IMPLICIT) {
		gdt[SEL_LDT / 8] = segment(w->gva, 0xFF, 0x82, 0);
		asm volatile("lldt %w0" : : "r"(SEL_LDT) : "memory");
	}
	go();
	if (w->kind == IMPLICIT)
		asm volatile("lldt %w0" : : "r"(0) : "memory");
	result->vector = trip.vector;
	result->code = trip.code;
	result->flags = trip.phase == 1 ? AT_LOAD : 0;
	result->address = trip.cr2;
	result->value = trip.value;
}
