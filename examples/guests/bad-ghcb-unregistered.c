/*
 * Misdeed: uses a shared page as the GHCB that it has not registered. KVM won't run such a vCPU.
 *
 * SNP guest: "failed", KVM_RUN gives EINVAL, exit code 1.
 * plain VM:  "this guest needs SEV-SNP"; "exit-port" with 1, exit code 1.
 */
#include "runtime/runtime.h"

static volatile u64 page[PAGE_SIZE / 8] PAGE_ALIGNED;

void guest_main(void)
{
	need_snp();
	page_share((void *)page);
	wrmsr(MSR_GHCB, (u64)page);
	asm volatile("rep; vmmcall" : : : "memory");
	print("nobody noticed\n");
	fail(FAIL_MEMORY);
}
