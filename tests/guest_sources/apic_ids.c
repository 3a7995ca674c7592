/*
 * Asks its host for the APIC IDs of all vCPUs, in every way that there is an answer to, where the
 * host has the event; else checks that it has not. Prints "APIC IDs 0 1 2" or "no APIC ID list".
 */
#include "runtime/runtime.h"

static u8 list[PAGE_SIZE] PAGE_ALIGNED;

static u32 ask(u64 gpa, u64 pages)
{
	ghcb_begin();
	ghcb_set(GHCB_RAX, pages);
	return ghcb_try(EXIT_APIC_ID_LIST, gpa, 0);
}

static void check_refused(u32 answer, u64 why)
{
	check_equal(answer, REFUSED);
	check_equal(ghcb_get(GHCB_INFO2), why);
}

void guest_main(void)
{
	const volatile u32 *words = (const volatile u32 *)list;
	u64 gpa = (u64)list;
	u32 n;

	need_snp();
	page_share(list);
	if (!(ghcb_msr(GHCB_FEATURES) >> 12 & FEATURE_APIC_ID_LIST)) {
		check_refused(ask(gpa, 1), REFUSED_EVENT);
		print("no APIC ID list\n");
		return;
	}
	check_equal(ask(gpa, 0), 0);
	check_equal(ghcb_get(GHCB_RAX), 1);
	check_refused(ask(1UL << 52, 1), REFUSED_INPUT);
	ghcb_begin();
	check_refused(ghcb_try(EXIT_APIC_ID_LIST, gpa, 0), REFUSED_MISSING);
	check_equal(words[0], 0);
	check_equal(ask(gpa, 1), 0);
	print("APIC IDs");
	for (n = 1; n <= words[0]; n++) {
		print(" ");
		print_number(words[n]);
	}
	print("\n");
}
