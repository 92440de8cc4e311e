/*
 * Draws one walk from the seed, by the rules of README.md.  The comparing
 * program draws the same (tools/walks/src/draw.rs); a checksum in each record
 * tells where the two part.
 */
#include "walks.h"

static u64 mix(u64 z)
{
	z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
	z = (z ^ z >> 27) * 0x94D049BB133111EBull;
	return z ^ z >> 31;
}

static u64 state;

static u64 next(void)
{
	return mix(state += 0x9E3779B97F4A7C15ull);
}
static u32 below(u32 n)
{
	return (next() >> 32) * n >> 32;
}
static u32 one_in(u32 n)
{
	return below(n) == 0;
}

/* ---- places ------------------------------------------------------------------- */
static const u32 gigabytes[5] = { 0, 1, 2, 4, 5 };
static const u32 in_gigabyte[4] = { 16, 17, 300, 301 };

u64 region_base(u32 region)
{
	return (u64)gigabytes[region >> 2] << 30 | (u64)in_gigabyte[region & 3] << 21;
}
u64 data_page(u32 k)
{
	return 256 + 31 * k;
}
u32 data_word(u32 region, u32 k, u32 offset)
{
	return offset << 8 | region << 3 | k;
}
/* Table pages have numbers of their own for each level. */
static u32 table_page(u32 slot)
{
	return 2 + 20 * slot + below(20);
}

static u64 table_in(u32 regions, u32 slot)
{
	u64 base = region_base(below(regions));
	return base + ((u64)table_page(slot) << 12);
}

/* ---- entries -------------------------------------------------------------------- */
struct format {
	const struct run *run;
	u32 kind;               /* 2, 3, 4: 32-bit, PAE, long */
	u32 pse, nxe;
	u32 calm;               /* makes what is unusual rarer */
};

static u64 wild(const struct format *f, u32 level, u32 leaf, u64 v)
{
	static const u8 pdpte_reserved[6] = { 1, 2, 5, 6, 7, 8 };
	u32 phys = f->run->phys_bits, bit, wide;
	switch (below(4)) {
	case 0:
		return f->kind >= 3 && phys < 52 ? v ^ 1ull << (phys + below(52 - phys)) : v;
	case 1:
		return f->kind >= 3 ? v ^ NX : v;
	case 2:
		if (f->kind == 3 && level == 3)
			return v | 1ull << pdpte_reserved[below(6)];
		if (leaf && level > 1) {
			if (f->kind > 2)
				return v | 1ull << (13 + below(level == 2 ? 8 : 17));
			/* not into the address of a 4 MiB page */
			bit = below(9);
			wide = f->run->has & HAS_PSE36 ? (phys < 40 ? phys : 40) - 32 : 0;
			return bit >= wide ? v | 1ull << (13 + bit) : v;
		}
		return !leaf && f->kind >= 3 ? v | PS : v;
	default:
		if (f->kind == 3)
			return v | 1ull << (52 + below(11));
		return f->kind == 4 ? v | 1ull << 8 : v;
	}
}

static u64 entry(const struct format *f, u32 level, u32 leaf, u64 address)
{
	u64 v = address, bits;
	if (leaf && level == 2 && f->kind == 2)
		v = (address & 0xFFC00000) | (address >> 32) << 13;
	if (!one_in(16 * f->calm))
		v |= P;
	if (f->kind == 3 && level == 3) {
		bits = below(4) << 3;
		bits |= below(8) << 9;
		v |= bits;
	} else {
		if (!one_in(8 * f->calm))
			v |= W;
		if (!one_in(8 * f->calm))
			v |= U;
		v |= below(16) << 3;            /* PWT, PCD, A, D */
		v |= below(8) << 9;
		if (f->kind >= 3 && f->nxe && one_in(8 * f->calm))
			v |= NX;
		if (f->kind == 4)
			v |= (u64)below(1 << 11) << 52;
		if (leaf) {
			v |= below(2) << 8;
			bits = below(2);
			v |= level == 1 ? bits << 7 : PS | bits << 12;
		} else if (f->kind == 2 && !f->pse) {
			v |= below(2) << 7;
		}
	}
	return one_in(16 * f->calm) ? wild(f, level, leaf, v) : v;
}

/* ---- a walk ---------------------------------------------------------------------- */
void draw(const struct run *run, u64 index, struct walk *w)
{
	u32 levels = run->mode & 15, host = run->mode >> 4, has = run->has;
	u32 kind = levels < 4 ? levels : 4, top_bits = levels == 3 ? 2 : levels == 2 ? 10 : 9;
	u32 leaf, region, k, level, at_k[6], page[6], i, n, shift, indices[6];
	u64 window = 0, address;
	struct format f;

	state = mix(mix(run->seed ^ run->mode) + index);

	/* registers */
	w->wp = below(2);
	w->smep = below(2) & !!(has & HAS_SMEP);
	w->smap = below(2) & !!(has & HAS_SMAP);
	w->nxe = !one_in(4) & !!(has & HAS_NX);
	w->host_nxe = !one_in(4) & !!(has & HAS_NX);
	w->pke = below(2) & !!(has & HAS_PKU) & (levels >= 4);
	w->pkru = next() >> 32;
	w->pkru &= next() >> 32;
	w->pkru &= ~3u;                 /* key 0 is the payload's own */
	w->pse = !one_in(4) & !!(has & HAS_PSE);

	/* the access */
	w->kind = below(8);
	w->kind = w->kind < 3 ? READ : w->kind < 6 ? WRITE : FETCH;
	if (one_in(8))
		w->kind = IMPLICIT;
	w->user = below(2);
	w->ac = below(2);

	/* the size of the page, and where it all lies */
	n = below(6);
	leaf = n < 3 ? 1 : n < 5 || levels < 4 ? 2 : 3;
	if (levels == 2 && !w->pse)
		leaf = 1;
	u32 nested_leaf = 1, space;
	if (host) {
		n = below(6);
		nested_leaf = n < 3 ? 1 : n < 5 ? 2 : 3;
		if (levels < 4) {
			window = (u64)(1 + below(3)) << 30;
		} else {
			n = run->phys_bits < 48 ? run->phys_bits : 48;
			window = (u64)(1 + below((1u << (n - 39)) - 1)) << 39;
			window |= (u64)below(512) << 30;
		}
		n = nested_leaf == 3 ? in_gigabyte[below(4)] : below(512);
		window |= (u64)n << 21;
	}
	/* two-level tables, and CR3 outside long mode, know only the first 4 GiB */
	space = run->regions;
	if (levels == 2 && (leaf == 1 || !(has & HAS_PSE36)))
		space = 12;
	region = below(space);
	k = below(8);

	/* the linear address */
	w->gva = below(512) << 3;
	for (level = levels; level >= 1; level--) {
		n = level == levels ? 1 + below((1u << top_bits) - 1) : below(levels == 2 ? 1024 : 512);
		if (level == 1 && leaf > 1) {
			n = data_page(k);
			if (levels == 2)
				n |= (host ? window >> 21 & 1 : in_gigabyte[region & 3] & 1) << 9;
		}
		if (level == 2 && leaf > 2)
			n = host ? window >> 21 & 511 : in_gigabyte[region & 3];
		indices[level] = n;
		shift = 12 + (levels == 2 ? 10 : 9) * (level - 1);
		w->gva |= (u64)n << shift;
	}
	if (levels >= 4) {
		shift = levels == 4 ? 16 : 7;
		w->gva = (u64)((long long)(w->gva << shift) >> shift);
	}

	/* where each table of the first stage lies, and the page */
	for (level = levels; level > leaf; level--) {
		/* the table that an entry of this level names; the root comes last */
		at_k[level - 1] = below(levels == 2 ? 12 : run->regions);
		page[level - 1] = table_page(level - 1);
	}
	at_k[levels] = below(levels <= 3 ? 12 : run->regions);
	page[levels] = table_page(levels);

#define PLACE(r, p) ((host ? window : region_base(r)) + ((u64)(p) << 12))
	w->root = PLACE(at_k[levels], page[levels]);
	if (levels == 3)
		w->root |= below(128) << 5;
	if (levels >= 4)
		w->root |= below(4) << 3;       /* PWT, PCD */

	/* the second stage: which host page is behind each page of the window */
	u64 host_at[6] = { 0 }, table = 0;
	w->seconds = 0;
	w->target = PLACE(region, data_page(k)) | (w->gva & 0xFFF);
	for (level = leaf; level <= levels; level++)
		host_at[level] = PLACE(at_k[level], page[level]);
	f.run = run;
	if (host) {
		f.kind = 4;
		f.pse = 0;
		f.nxe = w->host_nxe;
		f.calm = 4;
		n = below(run->regions);
		address = region_base(n);
		if (nested_leaf == 3)
			address &= ~0x3FFFFFFFull;
		table = table_in(run->regions, 5 + host);
		w->nested_root = table;
		for (level = host; level > nested_leaf; level--) {
			i = window >> (12 + 9 * (level - 1)) & 511;
			w->second[w->seconds].at = table + 8 * i;
			table = table_in(run->regions, 5 + level - 1);
			w->second[w->seconds++].value = entry(&f, level, 0, table);
		}
		i = window >> (12 + 9 * (nested_leaf - 1)) & 511;
		if (nested_leaf > 1) {
			w->second[w->seconds].at = table + 8 * i;
			w->second[w->seconds++].value = entry(&f, nested_leaf, 1, address);
			if (nested_leaf == 3)
				address |= window & 0x3FE00000;
			for (level = leaf; level <= levels; level++)
				host_at[level] = address + ((u64)page[level] << 12);
			w->target = address + (data_page(k) << 12) + (w->gva & 0xFFF);
		} else {
			for (level = levels; level >= leaf; level--) {
				host_at[level] = region_base(below(run->regions)) + ((u64)page[level] << 12);
				w->second[w->seconds].at = table + 8 * page[level];
				w->second[w->seconds++].value = entry(&f, 1, 1, host_at[level]);
			}
			n = below(run->regions);
			address = region_base(n) + (data_page(below(8)) << 12);
			w->second[w->seconds].at = table + 8 * data_page(k);
			w->second[w->seconds++].value = entry(&f, 1, 1, address);
			w->target = address + (w->gva & 0xFFF);
		}
	}

	/* the first stage, from the top down */
	f.kind = kind;
	f.pse = w->pse;
	f.nxe = w->nxe;
	f.calm = 1;
	w->firsts = 0;
	w->root_at = host_at[levels] | (levels == 3 ? w->root & 0xFFF : 0);
	for (level = levels; level >= leaf; level--) {
		if (level > leaf) {
			address = PLACE(at_k[level - 1], page[level - 1]);
		} else {
			address = PLACE(region, leaf == 1 ? data_page(k) : 0);
			if (leaf == 2 && levels == 2)
				address &= ~0x3FFFFFull;
			if (leaf == 3)
				address &= ~0x3FFFFFFFull;
		}
		w->first[w->firsts].at = (level == levels ? w->root_at : host_at[level])
			+ (levels == 2 ? 4 : 8) * indices[level];
		w->first[w->firsts++].value = entry(&f, level, level == leaf, address);
	}
	if (levels >= 4 && w->kind <= WRITE && one_in(64))
		w->gva ^= 1ull << 63;
}

u32 checksum(const struct walk *w)
{
	u64 h = 0;
	u32 i;
#define TAKE(v) (h = (h ^ (v)) * 0x9E3779B97F4A7C15ull, h ^= h >> 29)
	TAKE(w->wp | w->smep << 1 | w->smap << 2 | w->nxe << 3 | w->pke << 4 | w->pse << 5 | w->host_nxe << 6
	     | w->kind << 8 | w->user << 10 | w->ac << 11);
	TAKE(w->pkru);
	TAKE(w->gva);
	TAKE(w->root);
	TAKE(w->root_at);
	TAKE(w->target);
	for (i = 0; i < w->firsts; i++) {
		TAKE(w->first[i].at);
		TAKE(w->first[i].value);
	}
	for (i = 0; i < w->seconds; i++) {
		TAKE(w->second[i].at);
		TAKE(w->second[i].value);
	}
	return h >> 48;
}
