/*
 * Says hello, and as an SNP guest where it runs; there it also takes a page that nobody launched.
 *
 * plain VM:  "hello from a kvmlaunch guest"; "exit-port" with 0, exit code 0.
 * SNP guest: that, and "SEV-SNP guest, C-bit N, GHCB protocol 2"; the same end.
 */
#include "runtime/runtime.h"

/* Above the guest and below what is mapped with large pages; nobody launched it. */
#define SPARE_PAGE ((volatile u64 *)0x1f0000)
#define PATTERN 0x6b766d6c61756e63UL

void guest_main(void)
{
	print("hello from a kvmlaunch guest\n");
	if (!is_snp())
		return;

	page_accept((void *)SPARE_PAGE);
	SPARE_PAGE[0] = PATTERN;
	SPARE_PAGE[511] = ~PATTERN;
	if (SPARE_PAGE[0] != PATTERN || SPARE_PAGE[511] != ~PATTERN)
		fail(FAIL_MEMORY);

	print("SEV-SNP guest, C-bit ");
	print_number(c_bit);
	print(", GHCB protocol ");
	print_number(GHCB_PROTOCOL);
	print("\n");
}
