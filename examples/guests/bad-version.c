/*
 * Misdeed: says that it follows a version of the GHCB protocol that there isn't, and that its GHCB
 * page has a usage that there isn't. KVM refuses the usage, and doesn't look at the version.
 *
 * SNP guest: "terminated" 15:34 (REFUSED_USAGE), exit code 1.
 * plain VM:  "this guest needs SEV-SNP"; "exit-port" with 1, exit code 1.
 */
#include "runtime/runtime.h"

void guest_main(void)
{
	need_snp();
	ghcb_begin();
	*(volatile u16 *)(ghcb_page() + GHCB_VERSION) = 0xffff;
	*(volatile u32 *)(ghcb_page() + GHCB_USAGE) = 0x6b766d6c;
	ghcb_set(GHCB_RAX, 0);
	ghcb_set(GHCB_RCX, 0);
	ghcb_exit(EXIT_CPUID, 0, 0);
	print("nobody noticed\n");
	fail(FAIL_MEMORY);
}
