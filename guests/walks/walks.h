/*
 * Random page-table walks: what the parts of this payload share.
 *
 * draw.c   draws a walk from the seed: the same numbers as the comparing
 *          program draws, by the rules in README.md
 * main.c   makes the tables, performs the access, reports
 * own32.c  the machine in 32-bit modes: two- and three-level tables
 * own64.c  the machine in long mode: four and five levels, and guests
 * entry.S  boot, exceptions, and the accesses themselves
 */
#ifndef WALKS_H
#define WALKS_H

/* ---- shared with entry.S -------------------------------------------------- */
#define SEL_CODE0 0x08
#define SEL_DATA0 0x10
#define SEL_CODE3 0x1b
#define SEL_DATA3 0x23
#define SEL_TSS   0x28          /* two slots in long mode */
#define SEL_LDT   0x38          /* likewise */
#define SEL_IN_LDT 0x07         /* the LDT's first descriptor, RPL 3 */
#define VECTOR_DONE 0x40

#define CR0_PE    0x00000001
#define CR0_WP    0x00010000
#define CR0_PG    0x80000000
#define CR4_PSE   0x00000010
#define CR4_PAE   0x00000020
#define CR4_LA57  0x00001000
#define CR4_SMEP  0x00100000
#define CR4_SMAP  0x00200000
#define CR4_PKE   0x00400000
#define EFER_LME  0x00000100
#define EFER_LMA  0x00000400
#define EFER_NXE  0x00000800
#define EFER_SVME 0x00001000
#define RFLAGS_AC 0x00040000
#define MSR_EFER  0xC0000080

/* struct trip, in words of the machine */
#define TRIP_CR0   0
#define TRIP_CR3   1
#define TRIP_CR4   2
#define TRIP_EFER  3
#define TRIP_HOME_CR0  4
#define TRIP_HOME_CR3  5
#define TRIP_HOME_CR4  6
#define TRIP_HOME_EFER 7
#define TRIP_IP    8
#define TRIP_CS    9
#define TRIP_FLAGS 10
#define TRIP_SS    11
#define TRIP_ADDRESS 12
#define TRIP_VALUE 13
#define TRIP_HAS_EFER 14
#define TRIP_PHASE 15
#define TRIP_VECTOR 16
#define TRIP_CODE  17
#define TRIP_CR2   18
#define TRIP_STACK 19

#ifndef __ASSEMBLER__

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned long word;

#define ALIGNED __attribute__((aligned(4096)))

/* ---- bits of entries --------------------------------------------------------- */
#define P   (1ull << 0)
#define W   (1ull << 1)
#define U   (1ull << 2)
#define A   (1ull << 5)
#define D   (1ull << 6)
#define PS  (1ull << 7)
#define NX  (1ull << 63)

/* ---- what the processor offers, and what was asked -------------------------- */
#define HAS_PSE   1u
#define HAS_PSE36 2u
#define HAS_PAE   4u
#define HAS_NX    8u
#define HAS_1G    16u
#define HAS_LA57  32u
#define HAS_SMEP  64u
#define HAS_SMAP  128u
#define HAS_PKU   256u
#define HAS_SVM   512u          /* with nested paging */

struct run {
	u32 mode;               /* levels; those of nested tables in bits 7:4 */
	u32 has;                /* HAS_* */
	u32 phys_bits;
	u32 regions;            /* 12, or 20 where memory lies above 4 GiB */
	u64 seed, first, count;
};

/* ---- one walk ---------------------------------------------------------------- */
enum { READ, WRITE, FETCH, IMPLICIT };

struct entry {
	u64 at;                 /* host-physical */
	u64 value;
};

struct walk {
	u32 wp, smep, smap, nxe, pke, pse, host_nxe;
	u32 pkru;
	u32 kind, user, ac;
	u64 gva;
	u64 root;               /* for CR3 */
	u64 root_at;            /* where it lies in host memory */
	u64 target;             /* where a walk without obstacle ends, host-physical */
	u32 firsts, seconds;
	struct entry first[5];  /* from the top down */
	struct entry second[10]; /* the upper levels, then the leaf or the leaves */
	u64 nested_root;
};

u64 region_base(u32 region);
u64 data_page(u32 k);
u32 data_word(u32 region, u32 k, u32 offset);
void draw(const struct run *run, u64 index, struct walk *w);
u32 checksum(const struct walk *w);

/* ---- the machine ------------------------------------------------------------- */
struct trip {
	word cr0, cr3, cr4, efer;
	word home_cr0, home_cr3, home_cr4, home_efer;
	word ip, cs, flags, ss, address, value, has_efer;
	word phase, vector, code, cr2, stack;
};

/* What came of an access. */
#define AT_LOAD   4u            /* the fault was CR3's or CR0's */
#define VECTOR_NESTED 0x80u     /* not a vector: a nested page fault */
struct result {
	u32 vector;             /* VECTOR_DONE: it succeeded */
	u32 code;
	u32 flags;              /* AT_LOAD */
	u64 address;            /* CR2; with a nested page fault EXITINFO2 */
	u64 value;
};

extern struct trip trip;
/* Where the instructions lie that make an access of this kind. */
u32 stub(const struct run *run, u32 user, u32 kind);
/* entry.S: in the machine's width and, in long mode, for 32-bit guests */
extern u8 stubs[], user_stubs[], stubs32[], user_stubs32[];
extern u32 stub_offsets[4], stub_offsets32[4];

u32 machine_features(void);
void machine_start(struct run *run);
/* Where the host-physical address can be read and written now. */
void *at(u64 physical);
/* What the first entry of a root holds, so that the payload itself stays mapped. */
u64 own_entry(void);
u64 own_nested_entry(void);
void perform(const struct run *run, const struct walk *w, struct result *result);

/* Words of every data page: MOV EAX, imm32; JMP (R|E)DX; NOP. */
#define WORD_OF(imm) (0x90E2FF00000000B8ull | (u64)(imm) << 8)

static inline void cpuid(u32 leaf, u32 sub, u32 r[4])
{
	asm volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(sub));
}
static inline void outb(u32 port, u8 v)
{
	asm volatile("outb %0, %w1" : : "a"(v), "d"(port) : "memory");
}
static inline u64 rdmsr(u32 msr)
{
	u32 a, d;
	asm volatile("rdmsr" : "=a"(a), "=d"(d) : "c"(msr));
	return (u64)d << 32 | a;
}
static inline void wrmsr(u32 msr, u64 v)
{
	asm volatile("wrmsr" : : "c"(msr), "a"((u32)v), "d"((u32)(v >> 32)) : "memory");
}
#define READ_CR(n) ({ word v_; asm volatile("mov %%cr" #n ", %0" : "=r"(v_)); v_; })
#define WRITE_CR(n, v) asm volatile("mov %0, %%cr" #n : : "r"((word)(v)) : "memory")

#endif
#endif
