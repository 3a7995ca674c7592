/*
 * Misdeed: gives the host a scratch area outside the GHCB page, which version 2 of the protocol
 * forbids.
 *
 * SNP guest: "terminated" 15:35 (REFUSED_SCRATCH), exit code 1.
 * plain VM:  "this guest needs SEV-SNP"; "exit-port" with 1, exit code 1.
 */
#include "runtime/runtime.h"

#define DEVICE 0xfedc9000UL

void guest_main(void)
{
	need_snp();
	ghcb_begin();
	ghcb_set(GHCB_SCRATCH, (u64)ghcb_page() + PAGE_SIZE);
	ghcb_exit(EXIT_MMIO_READ, DEVICE, 1);
	print("nobody noticed\n");
	fail(FAIL_MEMORY);
}
