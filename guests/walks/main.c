/*
 * A payload that walks random page tables on the processor that it runs on,
 * and reports what came of each walk through port 0xE9.  README.md has the
 * options, the rules by which walks are drawn, and the format of the report.
 */
#include "walks.h"

/* ---- report --------------------------------------------------------------------- */
static u8 buffer[8192];
static u32 filled;

static void flush(void)
{
	u8 *p = buffer;
	word n = filled;
	asm volatile("rep outsb" : "+S"(p), "+c"(n) : "d"(0xE9) : "memory");
	filled = 0;
}
static void put(u64 v, u32 bytes)
{
	while (bytes--) {
		buffer[filled++] = v;
		v >>= 8;
	}
}
static void put_text(const char *text, u32 bytes)
{
	while (bytes--)
		buffer[filled++] = *text++;
}

/* ---- options -------------------------------------------------------------------- */
static int starts(const char *at, const char *key)
{
	while (*key)
		if (*at++ != *key++)
			return 0;
	return 1;
}
static u64 option(const char *line, const char *key, u64 otherwise)
{
	u64 v = 0;
	u32 digit;
	for (; *line; line++) {
		if (!starts(line, key))
			continue;
		while (*key++)
			line++;
		/* hexadecimal, without a prefix */
		for (;; line++) {
			if (*line >= '0' && *line <= '9')
				digit = *line - '0';
			else if (*line >= 'a' && *line <= 'f')
				digit = *line - 'a' + 10;
			else
				return v;
			v = v << 4 | digit;
		}
	}
	return otherwise;
}

/* ---- tables, and what became of them ----------------------------------------------- */
static u64 get_entry(u64 physical, u32 narrow)
{
	return narrow ? *(volatile u32 *)at(physical) : *(volatile u64 *)at(physical);
}
static void set_entry(u64 physical, u64 value, u32 narrow)
{
	if (narrow)
		*(volatile u32 *)at(physical) = value;
	else
		*(volatile u64 *)at(physical) = value;
}
static void lay(const struct run *run, const struct walk *w, u32 clear)
{
	u32 narrow = (run->mode & 15) == 2, i;
	for (i = 0; i < w->firsts; i++)
		set_entry(w->first[i].at, clear ? 0 : w->first[i].value, narrow);
	set_entry(w->root_at, clear ? 0 : own_entry(), narrow);
	for (i = 0; i < w->seconds; i++)
		set_entry(w->second[i].at, clear ? 0 : w->second[i].value, 0);
	/* in the nested table of level 4, or of level 3 where a guest's addresses have 32 bits */
	if (w->seconds) {
		i = (run->mode >> 4) - ((run->mode & 15) < 4 ? 3 : 4);
		set_entry(w->second[i].at & ~0xFFFull, clear ? 0 : own_nested_entry(), 0);
	}
}

/* ---- where an access went ------------------------------------------------------------ */
#define NOWHERE 0xFFFFFFFFu
#define MARK 0x6B72616DFEEDC0DEull

/* The word that holds the mark, made good again. */
static u32 find_mark(const struct run *run, const struct walk *w)
{
	u32 offset = w->gva & 0xFF8, region, k, imm = NOWHERE;
	volatile u64 *p = at(w->target);
	if ((u32)*p == (u32)MARK) {
		for (region = 0; region < run->regions; region++)
			for (k = 0; k < 8; k++)
				if ((region_base(region) | data_page(k) << 12) == (w->target & ~0xFFFull))
					imm = data_word(region, k, offset);
	} else {
		for (region = 0; region < run->regions && imm == NOWHERE; region++)
			for (k = 0; k < 8 && imm == NOWHERE; k++) {
				p = at((region_base(region) | data_page(k) << 12) + offset);
				if ((u32)*p == (u32)MARK)
					imm = data_word(region, k, offset);
			}
	}
	if (imm != NOWHERE)
		*p = WORD_OF(imm);
	return imm;
}
static u32 reached(const struct run *run, const struct walk *w, u64 value)
{
	u32 imm;
	u64 read = (run->mode & 15) < 4 ? 0xFFFFFFFF : ~0ull;
	switch (w->kind) {
	case READ:
		imm = value >> 8 & 0xFFFFF;
		return (value & read) == (WORD_OF(imm) & read) ? imm : NOWHERE;
	case WRITE:
		return find_mark(run, w);
	case FETCH:
		return value;
	default:
		/* LSL's limit in bytes: byte 1 of the word in bits 27:20 */
		return (value & 0xF00FFFFF) == 0x200B8FFF ? value >> 20 & 0xFF : NOWHERE;
	}
}

/* ---- one walk --------------------------------------------------------------------- */
static void walk(const struct run *run, u64 index)
{
	static struct walk w;
	struct result r = { 0, 0, 0, 0, MARK };
	u32 narrow = (run->mode & 15) == 2, marks = 0, flags, i, changed = 0, to = 0;
	u64 now[15];

	draw(run, index, &w);
	lay(run, &w, 0);
	perform(run, &w, &r);
	for (i = 0; i < w.firsts; i++) {
		now[i] = get_entry(w.first[i].at, narrow);
		marks |= (now[i] >> 5 & 3) << 2 * i;
		changed |= ((now[i] ^ w.first[i].value) & ~(A | D)) != 0;
	}
	for (i = 0; i < w.seconds; i++) {
		now[w.firsts + i] = get_entry(w.second[i].at, 0);
		marks |= (now[w.firsts + i] >> 5 & 3) << (10 + 2 * i);
		changed |= ((now[w.firsts + i] ^ w.second[i].value) & ~(A | D)) != 0;
	}
	if (r.vector == VECTOR_DONE)
		to = reached(run, &w, r.value);
	lay(run, &w, 1);

	flags = r.flags;
	if (r.vector == VECTOR_NESTED || (r.vector == 14 && r.address != w.gva))
		flags |= 1;
	if (changed)
		flags |= 2;
	put(checksum(&w), 2);
	put(r.vector, 1);
	put(flags, 1);
	put(r.code, 2);
	put(0, 2);
	put(to, 4);
	put(marks, 4);
	if (flags & 1)
		put(r.address, 8);
	if (changed)
		for (i = 0; i < w.firsts + w.seconds; i++)
			put(now[i], 8);
	if (filled > sizeof buffer - 256)
		flush();
}

void main(u32 *info)
{
	static struct run run;
	const char *line = (const char *)(word)info[4];
	u32 id[4], region, k, i, host;
	u64 index;

	run.mode = option(line, "mode=", 4);
	run.seed = option(line, "seed=", 1);
	run.first = option(line, "first=", 0);
	run.count = option(line, "count=", 1);
	run.regions = option(line, "regions=", 12);
	run.has = machine_features();
	cpuid(0x80000000, 0, id);
	run.phys_bits = run.has & HAS_PSE36 ? 36 : 32;
	if (id[0] >= 0x80000008) {
		cpuid(0x80000008, 0, id);
		run.phys_bits = id[0] & 0xFF;
	}
	host = run.mode >> 4;
	if (((run.mode & 15) == 5 || host == 5) && !(run.has & HAS_LA57))
		run.count = 0;
	if (host && (!(run.has & HAS_SVM) || run.phys_bits < 40))
		run.count = 0;
	if (run.mode == 3 && !(run.has & HAS_PAE))
		run.count = 0;
	if (!host && (run.mode < 4) != (sizeof(word) == 4))
		run.count = 0;
	machine_start(&run);
	for (region = 0; region < run.regions; region++)
		for (k = 0; k < 8; k++) {
			volatile u64 *page = at(region_base(region) | data_page(k) << 12);
			for (i = 0; i < 512; i++)
				page[i] = WORD_OF(data_word(region, k, 8 * i));
		}

	put_text("vmmu walks begin", 16);
	put(run.mode, 4);
	put(run.has, 4);
	put(run.phys_bits, 4);
	put(run.regions, 4);
	put(run.seed, 8);
	put(run.first, 8);
	put(run.count, 8);
	cpuid(0, 0, id);
	put(id[1], 4);
	put(id[3], 4);
	put(id[2], 4);
	put(0, 4);
	for (i = 0; i < 2; i++)
		put(stub(&run, i, 0), 4);
	for (i = 0; i < 4; i++)
		put(stub(&run, 0, i) - stub(&run, 0, 0), 2);
	for (index = 0; index < run.count; index++)
		walk(&run, run.first + index);
	put_text("vmmu walks ended", 16);
	flush();
	/* QEMU's isa-debug-exit; Bochs' way into its debugger, which quits */
	outb(0xF4, 0);
	outb(0x8900, 'D');
}

/* the compiler may ask for it */
void *memset(void *p, int c, unsigned long n)
{
	void *d = p;
	asm volatile("rep stosb" : "+D"(d), "+c"(n) : "a"(c) : "memory");
	return p;
}
