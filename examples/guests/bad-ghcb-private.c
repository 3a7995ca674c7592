/*
 * Misdeed: uses a page as the GHCB that is the guest's own. The host sees another page at that GPA,
 * its shared one, finds no request there, and answers there: the guest never hears of it.
 *
 * SNP guest: "check failed: bad-ghcb-private.c:LINE: answered is 0x0, expected 0x1"; "terminated"
 *            15:12, exit code 1.
 * plain VM:  "this guest needs SEV-SNP"; "exit-port" with 1, exit code 1.
 */
#include "runtime/runtime.h"

static volatile u64 page[PAGE_SIZE / 8] PAGE_ALIGNED;

#define FIELD(offset) page[(offset) / 8]
#define VALID(offset) (1UL << (offset) / 8 % 64)

void guest_main(void)
{
	u64 answered, own = (u64)ghcb_page();

	need_snp();
	check_equal(ghcb_msr(GHCB_REGISTER | (u64)page) >> 12, (u64)page / PAGE_SIZE);
	FIELD(GHCB_EXIT_CODE) = EXIT_CPUID;
	FIELD(GHCB_VALID) = VALID(GHCB_RAX);
	FIELD(GHCB_VALID + 8) = VALID(GHCB_RCX) | VALID(GHCB_EXIT_CODE) | VALID(GHCB_INFO1) |
				VALID(GHCB_INFO2);
	wrmsr(MSR_GHCB, (u64)page);
	asm volatile("rep; vmmcall" : : : "memory");
	answered = FIELD(GHCB_VALID + GHCB_RBX / 512 * 8) / VALID(GHCB_RBX) & 1;

	/* Back to a GHCB that the host can read, to complain. */
	check_equal(ghcb_msr(GHCB_REGISTER | own) >> 12, own / PAGE_SIZE);
	check_equal(answered, 1);
}
