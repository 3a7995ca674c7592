/*
 * Misdeed: uses a page that the host made private and that the guest didn't validate. The processor
 * tells the guest (#VC 0x404), and a guest must not go on: the host may have exchanged the page.
 *
 * SNP guest: "terminated" 15:13, exit code 1.
 * plain VM:  "this guest needs SEV-SNP"; "exit-port" with 1, exit code 1.
 */
#include "runtime/runtime.h"

/* Above the guest and below what is mapped with large pages; nobody launched it. */
#define SPARE_PAGE ((volatile u64 *)0x1f0000)

void guest_main(void)
{
	need_snp();
	state_change((void *)SPARE_PAGE, STATE_PRIVATE);
	SPARE_PAGE[0] = 1;
	print("nobody noticed\n");
	fail(FAIL_MEMORY);
}
