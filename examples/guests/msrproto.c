/*
 * An SNP guest that talks to its host by the GHCB MSR protocol only: no GHCB page, no #VC handler
 * that needs one. What it can't print it checks. One page goes to the host and comes back.
 *
 * SNP guest: no text; halts (HLT needs no #VC): "halted", exit code 0.
 * plain VM:  "this guest needs SEV-SNP"; "exit-port" with 1, exit code 1.
 */
#include "runtime/runtime.h"

#define GHCB_PREFERRED 0x010
#define VENDOR_EBX 1

static volatile u64 page[PAGE_SIZE / 8] PAGE_ALIGNED;

/* In place of the runtime's, which registers a GHCB page. */
void snp_init(void)
{
}

void guest_main(void)
{
	u64 answer;

	need_snp();

	answer = ghcb_msr(GHCB_INFO);
	if ((answer >> 24 & 0xff) != c_bit || answer >> 48 < GHCB_PROTOCOL)
		fail(FAIL_PROTOCOL);
	if (!(ghcb_msr(GHCB_FEATURES) >> 12 & FEATURE_SNP))
		fail(FAIL_FEATURES);
	/* Leaf 0: half of the vendor's name, "Auth" or "Genu". */
	answer = ghcb_msr(GHCB_CPUID | VENDOR_EBX << 30) >> 32;
	if (answer != 0x68747541 && answer != 0x756e6547)
		fail(FAIL_ANSWER);
	/* A page that the host would like to have as the GHCB: any, or none. */
	answer = ghcb_msr(GHCB_PREFERRED) >> 12;
	if (!answer)
		fail(FAIL_ANSWER);

	page[0] = 1;
	page_share((void *)page);
	page[0] = 2;
	if (page[0] != 2)
		fail(FAIL_MEMORY);
	page_accept((void *)page);
	page[511] = 3;
	if (page[511] != 3)
		fail(FAIL_MEMORY);

	for (;;)
		asm volatile("cli; hlt");
}
