/*
 * Misdeed: gives the host a scratch area outside the GHCB page, which version 2 of the protocol
 * forbids.
 *
 * SNP guest: "refused: 3"; "terminated" 15:9, exit code 1.
 * plain VM:  "this guest needs SEV-SNP"; "exit-port" with 1, exit code 1.
 */
#include "runtime/runtime.h"

#define DEVICE 0xfedc9000UL

void guest_main(void)
{
	u64 reason;

	need_snp();
	ghcb_begin();
	ghcb_set(GHCB_SCRATCH, (u64)ghcb_page() + PAGE_SIZE);
	check_equal(ghcb_try(EXIT_MMIO_READ, DEVICE, 1), REFUSED);
	reason = ghcb_get(GHCB_INFO2);
	print("refused: ");
	print_number(reason);
	print("\n");
	fail(FAIL_REFUSED);
}
