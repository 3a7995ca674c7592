/*
 * Misdeed: makes a page a VMSA and then writes to it, so that EFER has no SVME, and lets its own
 * vCPU run from it. The page is VMPL0's, which may write; the processor refuses to enter the guest.
 *
 * SNP guest: "failed", KVM_EXIT_FAIL_ENTRY, exit code 1.
 * plain VM:  "this guest needs SEV-SNP"; "exit-port" with 1, exit code 1.
 */
#include "runtime/runtime.h"

#define VMSA_EFER 0xd0

static u8 vmsa[PAGE_SIZE] PAGE_ALIGNED;
static u8 area[CPU_SIZE] __attribute__((aligned(CPU_SIZE)));

static void unreachable(void)
{
	fail(FAIL_MEMORY);
}

void guest_main(void)
{
	need_snp();
	vmsa_fill(vmsa, 0, unreachable, area);
	check_equal(rmpadjust(vmsa, RMP_VMSA | 1), 0);
	*(volatile u64 *)(vmsa + VMSA_EFER) = 0;
	print("running from a broken VMSA\n");
	check_equal(vmsa_run(vmsa, 0, cpu_number()), 0);
	print("nobody noticed\n");
	fail(FAIL_MEMORY);
}
