/*
 * The machine in long mode, with four or five levels, and a guest of its own
 * under SVM.
 *
 * Home maps the first 6 GiB one to one (entry.S).  A walk's tables hold the
 * image too, in their first entry; so do a guest's, and the nested tables for
 * the guest-physical addresses of the image.
 */
#include "walks.h"

u64 home_pml5[512] ALIGNED, home_pml4[512] ALIGNED, home_pdpt[512] ALIGNED, home_pd[6 * 512] ALIGNED;
static u32 own_pt32[1024] ALIGNED;
static u64 own_pml4[512] ALIGNED, own_pdpt[512] ALIGNED, own_pd[512] ALIGNED, own_pt[1024] ALIGNED;
static u64 nested_pdpt[512] ALIGNED, nested_pd[512] ALIGNED, nested_pt[1024] ALIGNED;
static u8 stack[16384] ALIGNED __attribute__((used));
asm(".globl stack_top\n.set stack_top, stack + 16384\n");
static u8 trap_stack[4096] ALIGNED;
static u8 save_area[4096] ALIGNED, vmcb[4096] ALIGNED, host_vmcb[4096] ALIGNED;

static u64 gdt[9];
static struct { u64 low, high; } idt[VECTOR_DONE + 1];
static u32 tss[26];
static const struct run *now;
struct trip trip;
extern u8 gates[];
void go(void);
void run_guest(u64 vmcb, u64 host, u64 address, u64 selector);

u32 machine_features(void)
{
	u32 r[4], most, has = HAS_PSE | HAS_PAE;
	cpuid(0, 0, r);
	most = r[0];
	cpuid(1, 0, r);
	has |= r[3] & 1 << 17 ? HAS_PSE36 : 0;
	if (most >= 7) {
		cpuid(7, 0, r);
		has |= r[1] & 1 << 7 ? HAS_SMEP : 0;
		has |= r[1] & 1 << 20 ? HAS_SMAP : 0;
		has |= r[2] & 1 << 3 ? HAS_PKU : 0;
		has |= r[2] & 1 << 16 ? HAS_LA57 : 0;
	}
	cpuid(0x80000001, 0, r);
	has |= r[3] & 1 << 20 ? HAS_NX : 0;
	has |= r[3] & 1 << 26 ? HAS_1G : 0;
	if (r[2] & 1 << 2) {
		cpuid(0x8000000A, 0, r);
		has |= r[3] & 1 ? HAS_SVM : 0;
	}
	return has;
}

void *at(u64 physical)
{
	return (void *)physical;
}

u64 own_entry(void)
{
	switch (now->mode & 15) {
	case 2:
		return (u64)own_pt32 | P | W | U | A;
	case 3:
		return (u64)own_pd | P;
	case 4:
		return (u64)own_pdpt | P | W | U | A;
	default:
		return (u64)own_pml4 | P | W | U | A;
	}
}
u64 own_nested_entry(void)
{
	return (u64)((now->mode & 15) < 4 ? nested_pd : nested_pdpt) | P | W | U | A;
}

u32 stub(const struct run *run, u32 user, u32 kind)
{
	if ((run->mode & 15) < 4)
		return (u64)(user ? user_stubs32 : stubs32) + stub_offsets32[kind];
	return (u64)(user ? user_stubs : stubs) + stub_offsets[kind];
}

static void field32(u32 offset, u32 v)
{
	*(volatile u32 *)(vmcb + offset) = v;
}
static void field64(u32 offset, u64 v)
{
	*(volatile u64 *)(vmcb + offset) = v;
}
static u64 get64(u32 offset)
{
	return *(volatile u64 *)(vmcb + offset);
}
static void segment(u32 offset, u32 selector, u32 attributes, u32 limit, u64 base)
{
	field32(offset, selector | attributes << 16);
	field32(offset + 4, limit);
	field64(offset + 8, base);
}

/* What of a guest is the same in every walk (APM volume 2, appendix B). */
static void guest_start(void)
{
	wrmsr(0xC0010117, (u64)save_area);
	field32(0x008, 0xFFFFFFFF);     /* every exception exits */
	field32(0x00C, 1u << 31 | 1 << 21); /* shutdown, INT n */
	field32(0x010, 3);              /* VMRUN, VMMCALL */
	field32(0x058, 1);              /* ASID */
	field32(0x05C, 1);              /* flush everything */
	field64(0x090, 1);              /* nested paging */
	segment(0x460, 0, 0, 0, 0);     /* GDTR, IDTR: never used */
	segment(0x480, 0, 0, 0, 0);
	segment(0x490, 0, 0x8B, 0xFFFF, 0);
	field64(0x560, 0x400);
	field64(0x568, 0xFFFF0FF0);
	field64(0x668, 0x0007040600070406ull);
}

void machine_start(struct run *run)
{
	struct { u16 limit; u64 base; } __attribute__((packed)) ptr;
	u64 i, user = (u64)user_stubs >> 12;

	now = run;
	own_pml4[0] = (u64)own_pdpt | P | W | U | A;
	own_pdpt[0] = (u64)own_pd | P | W | U | A;
	nested_pdpt[0] = (u64)nested_pd | P | W | U | A;
	for (i = 0; i < 2; i++) {
		own_pd[i] = (u64)(own_pt + 512 * i) | P | W | U | A;
		nested_pd[i] = (u64)(nested_pt + 512 * i) | P | W | U | A;
	}
	for (i = 0; i < 1024; i++) {
		own_pt[i] = i << 12 | P | W | A | D | (i == user ? U : 0);
		own_pt32[i] = own_pt[i];
		nested_pt[i] = i << 12 | P | W | U | A | D;
	}

	gdt[1] = 0x00AF9B000000FFFF;
	gdt[2] = 0x00CF93000000FFFF;
	gdt[3] = 0x00AFFB000000FFFF;
	gdt[4] = 0x00CFF3000000FFFF;
	gdt[5] = ((u64)tss & 0xFFFFFF) << 16 | 0x0000890000000000 | (sizeof tss - 1);
	*(u64 *)(tss + 1) = (u64)trap_stack + sizeof trap_stack;
	tss[25] = sizeof tss << 16;
	for (i = 0; i <= VECTOR_DONE; i++) {
		u64 gate = (u64)gates + 16 * (i == VECTOR_DONE ? 32 : i & 31);
		idt[i].low = (gate >> 16 & 0xFFFF) << 48 | 0xEE00ull << 32 | SEL_CODE0 << 16 | (gate & 0xFFFF);
	}
	ptr.limit = sizeof gdt - 1;
	ptr.base = (u64)gdt;
	asm volatile("lgdt %0" : : "m"(ptr));
	ptr.limit = sizeof idt - 1;
	ptr.base = (u64)idt;
	asm volatile("lidt %0" : : "m"(ptr));
	asm volatile("movl %0, %%ss\n	movl %0, %%ds\n	movl %0, %%es\n	ltr %w1"
		     : : "r"(SEL_DATA0), "r"(SEL_TSS));

	trip.has_efer = 1;
	trip.home_efer = rdmsr(MSR_EFER) | (run->mode >> 4 && run->count ? EFER_SVME : 0);
	trip.home_cr0 = READ_CR(0) | CR0_WP;
	trip.home_cr3 = READ_CR(3);
	trip.home_cr4 = READ_CR(4) | (run->has & HAS_PKU ? CR4_PKE : 0);
	WRITE_CR(0, trip.home_cr0);
	WRITE_CR(4, trip.home_cr4);
	wrmsr(MSR_EFER, trip.home_efer);
	if (run->mode >> 4 && run->count)
		guest_start();
}

static void perform_guest(const struct run *run, const struct walk *w, struct result *result)
{
	u32 user = w->user, code, wide = (run->mode & 15) >= 4;
	/* code: present, not conforming, readable; with a limit in pages; 64 or 32 bits */
	u32 code_segment = (user ? 0x8FB : 0x89B) | (wide ? 0x200 : 0x400);
	u64 info;
	segment(0x400, SEL_DATA3, user ? 0xCF3 : 0xC93, 0xFFFFFFFF, 0);
	segment(0x410, user ? SEL_CODE3 : SEL_CODE0, code_segment, 0xFFFFFFFF, 0);
	segment(0x420, user ? SEL_DATA3 : SEL_DATA0, user ? 0xCF3 : 0xC93, 0xFFFFFFFF, 0);
	segment(0x430, SEL_DATA3, user ? 0xCF3 : 0xC93, 0xFFFFFFFF, 0);
	segment(0x470, SEL_LDT, 0x82, 0xFF, w->kind == IMPLICIT ? w->gva : 0);
	*(volatile u8 *)(vmcb + 0x4CB) = user ? 3 : 0;
	field64(0x4D0, EFER_SVME | (wide ? EFER_LME | EFER_LMA : 0) | (w->nxe ? EFER_NXE : 0));
	field64(0x548, trip.cr4);
	field64(0x550, w->root);
	field64(0x558, trip.cr0);
	field64(0x570, 2 | (w->ac ? RFLAGS_AC : 0));
	field64(0x578, stub(run, user, w->kind));
	field64(0x5D8, 0);
	field64(0x5F8, result->value);
	field64(0x640, 0);
	field64(0x0A8, 0);
	field64(0x0B0, w->nested_root);
	field32(0x0C0, 0);              /* nothing is clean */
	wrmsr(MSR_EFER, trip.home_efer | (w->host_nxe ? EFER_NXE : 0));
	run_guest((u64)vmcb, (u64)host_vmcb, w->gva, SEL_IN_LDT);
	wrmsr(MSR_EFER, trip.home_efer);
	code = get64(0x070);
	info = get64(0x078);
	result->value = get64(0x5F8);
	result->address = get64(0x080);
	result->code = 0;
	if (code == 0x75) {
		result->vector = VECTOR_DONE;
	} else if (code >= 0x40 && code < 0x60) {
		result->vector = code - 0x40;
		result->code = code == 0x4E || code == 0x4D ? info : 0;
	} else if (code == 0x400) {
		/* bits 32 and 33 as bits 14 and 15 */
		result->vector = VECTOR_NESTED;
		result->code = (info & 0x3FFF) | (info >> 32 & 3) << 14;
	} else {
		result->vector = 0xFF;
		result->code = code;
	}
}

void perform(const struct run *run, const struct walk *w, struct result *result)
{
	trip.cr0 = CR0_PG | CR0_PE | (w->wp ? CR0_WP : 0) | (trip.home_cr0 & 0x30);
	trip.cr3 = w->root;
	u32 levels = run->mode & 15;
	trip.cr4 = (levels > 2 ? CR4_PAE : 0) | (levels < 4 && w->pse ? CR4_PSE : 0) | (levels == 5 ? CR4_LA57 : 0)
		| (w->smep ? CR4_SMEP : 0) | (w->smap ? CR4_SMAP : 0) | (w->pke ? CR4_PKE : 0);
	trip.efer = trip.home_efer | (w->nxe ? EFER_NXE : 0);
	if (run->has & HAS_PKU)
		asm volatile("wrpkru" : : "a"(w->pkru), "c"(0), "d"(0) : "memory");
	if (run->mode >> 4) {
		perform_guest(run, w, result);
		return;
	}
	trip.ip = stub(run, w->user, w->kind);
	trip.cs = w->user ? SEL_CODE3 : SEL_CODE0;
	trip.ss = w->user ? SEL_DATA3 : SEL_DATA0;
	trip.flags = 2 | (w->ac ? RFLAGS_AC : 0);
	trip.address = w->gva;
	trip.value = result->value;
	if (w->kind == IMPLICIT) {
		gdt[SEL_LDT / 8] = (w->gva & 0xFF000000) << 32 | 0x0000820000000000 | (w->gva & 0xFFFFFF) << 16 | 0xFF;
		gdt[SEL_LDT / 8 + 1] = w->gva >> 32;
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
