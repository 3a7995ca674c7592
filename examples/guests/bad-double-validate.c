/*
 * Misdeed: validates a page that was launched, and so is valid. PVALIDATE sets the carry flag,
 * since nothing changed; a guest that doesn't look could be given a page twice.
 *
 * SNP guest: "terminated" 15:6, exit code 1.
 * plain VM:  "this guest needs SEV-SNP"; "exit-port" with 1, exit code 1.
 */
#include "runtime/runtime.h"

static u64 page[PAGE_SIZE / 8] PAGE_ALIGNED;

void guest_main(void)
{
	need_snp();
	page_accept(page);
	print("nobody noticed\n");
	fail(FAIL_MEMORY);
}
