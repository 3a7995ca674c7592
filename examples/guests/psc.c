/*
 * Converts pages both ways and checks what they hold and what PVALIDATE says: a few pages by the
 * GHCB MSR protocol and in one mixed list, and 2 MiB of memory that nobody launched, as 512 entries
 * in lists of up to 253. Then asks for what the host must refuse. Needs memory to 6 MiB.
 *
 * SNP guest: a line for each part; "exit-port" with 0, exit code 0.
 * plain VM:  "this guest needs SEV-SNP"; "exit-port" with 1, exit code 1.
 */
#include "runtime/runtime.h"

#define RUN 0x400000UL
#define RUN_PAGES 512
#define FEW 6
#define NOWHERE 0xc0000000UL /* the hole below 4 GiB: no memory */

/* Errors of a list, in bits 63:32 of GHCB_INFO2; the low half says which of a kind. */
#define BAD_HEADER 0x100000001UL
#define BAD_ENTRY 0x100000002UL
#define LARGE_PAGE (1UL << 56)

static u8 few[FEW][PAGE_SIZE] PAGE_ALIGNED;

static volatile u64 *word(u64 gpa)
{
	return (volatile u64 *)gpa;
}

/* PVALIDATE changes a page once; the second time it must say that nothing changed. */
static void validate(u64 gpa, u32 valid)
{
	u8 unchanged;

	check_equal(pvalidate((void *)gpa, valid, &unchanged), 0);
	check_equal(unchanged, 0);
	check_equal(pvalidate((void *)gpa, valid, &unchanged), 0);
	check_equal(unchanged, 1);
}

static void fill(u64 gpa, u64 seed)
{
	*word(gpa) = gpa ^ seed;
	*word(gpa + PAGE_SIZE - 8) = ~gpa ^ seed;
}

static void compare(u64 gpa, u64 seed)
{
	check_equal(*word(gpa), gpa ^ seed);
	check_equal(*word(gpa + PAGE_SIZE - 8), ~gpa ^ seed);
}

/* One page at a time, by the MSR protocol. */
static void single_pages(void)
{
	u64 gpa = (u64)few[0];

	fill(gpa, 1);
	compare(gpa, 1);
	page_share(few[0]);
	fill(gpa, 2);
	compare(gpa, 2);
	page_accept(few[0]);
	fill(gpa, 3);
	compare(gpa, 3);
	print("single pages: ok\n");
}

/* Every second page is shared at first; one list swaps them all. */
static void mixed_list(void)
{
	u32 n;

	for (n = 1; n < FEW; n += 2)
		page_share(few[n]);
	for (n = 0; n < FEW; n += 2)
		validate((u64)few[n], 0);
	psc_begin();
	for (n = 0; n < FEW; n++)
		psc_add((u64)few[n], n % 2 ? STATE_PRIVATE : STATE_SHARED);
	check_equal(psc_commit(), 0);
	for (n = 0; n < FEW; n++) {
		set_private((u64)few[n], n % 2);
		if (n % 2)
			validate((u64)few[n], 1);
		fill((u64)few[n], 4);
	}
	for (n = 0; n < FEW; n++)
		compare((u64)few[n], 4);
	for (n = 0; n < FEW; n += 2)
		page_accept(few[n]);
	print("mixed list: ok\n");
}

static void convert_run(u64 state)
{
	u32 n;

	for (n = 0; n < RUN_PAGES; n++) {
		if (n % PSC_MOST == 0)
			psc_begin();
		psc_add(RUN + n * PAGE_SIZE, state);
		if (n % PSC_MOST == PSC_MOST - 1 || n == RUN_PAGES - 1)
			check_equal(psc_commit(), 0);
	}
}

static void each_of_run(void (*what)(u64 gpa, u64 value), u64 value)
{
	u32 n;

	for (n = 0; n < RUN_PAGES; n++)
		what(RUN + n * PAGE_SIZE, value);
}

static void validate_each(u64 gpa, u64 valid)
{
	validate(gpa, valid);
}

static void two_megabytes(void)
{
	convert_run(STATE_PRIVATE);
	map_2m(RUN, PRIVATE);
	each_of_run(validate_each, 1);
	each_of_run(fill, 5);
	each_of_run(compare, 5);

	each_of_run(validate_each, 0);
	convert_run(STATE_SHARED);
	map_2m(RUN, SHARED);
	each_of_run(fill, 6);
	each_of_run(compare, 6);

	convert_run(STATE_PRIVATE);
	map_2m(RUN, PRIVATE);
	each_of_run(validate_each, 1);
	each_of_run(fill, 7);
	each_of_run(compare, 7);
	print("2 MiB in 4 KiB pages: ok\n");
}

static void refusals(void)
{
	psc_begin();
	psc_add(NOWHERE, STATE_SHARED);
	check_equal(psc_commit() >> 32 != 0, 1);

	/* 2 MiB that aren't aligned. */
	psc_begin();
	psc_add(RUN + PAGE_SIZE, STATE_SHARED | LARGE_PAGE >> 52);
	check_equal(psc_commit(), BAD_ENTRY);

	/* An entry behind the end of the buffer. */
	*(volatile u32 *)ghcb_buffer() = PSC_MOST << 16;
	ghcb_begin();
	ghcb_set(GHCB_SCRATCH, ghcb_buffer());
	ghcb_exit(EXIT_STATE_CHANGE, 0, 0);
	check_equal(ghcb_get(GHCB_INFO2), BAD_HEADER);
	print("refusals: ok\n");
}

void guest_main(void)
{
	need_snp();
	single_pages();
	mixed_list();
	two_megabytes();
	refusals();
}
