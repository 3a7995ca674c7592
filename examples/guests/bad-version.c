/*
 * Misdeed: says that it follows a version of the GHCB protocol that there isn't, and that its GHCB
 * page has a usage that there isn't. KVM refuses the usage, and doesn't look at the version.
 *
 * SNP guest: "refused: 2"; "terminated" 15:9, exit code 1.
 * plain VM:  "this guest needs SEV-SNP"; "exit-port" with 1, exit code 1.
 */
#include "runtime/runtime.h"

void guest_main(void)
{
	u64 reason;

	need_snp();
	ghcb_begin();
	*(volatile u16 *)(ghcb_page() + GHCB_VERSION) = 0xffff;
	*(volatile u32 *)(ghcb_page() + GHCB_USAGE) = 0x6b766d6c;
	ghcb_set(GHCB_RAX, 0);
	ghcb_set(GHCB_RCX, 0);
	check_equal(ghcb_try(EXIT_CPUID, 0, 0), REFUSED);
	reason = ghcb_get(GHCB_INFO2);
	print("refused: ");
	print_number(reason);
	print("\n");
	fail(FAIL_REFUSED);
}
