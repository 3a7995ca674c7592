/*
 * VMPL0 starts a context of lower privilege, VMPL1, on the same vCPU, with a VMSA of its own and
 * rights to the guest's pages but for one, which it may only read. VMPL1 reads it, tries to give
 * itself more rights, which RMPADJUST refuses, and in the end writes to the page: that is a nested
 * fault, which no host can mend.
 *
 * SNP guest: "VMPL1: may read, may not take more", "VMPL0: VMPL1 came back", and the host ends it:
 *            exit code 1 (so on the simulated host, since the note below asks for VMPLs).
 *            Where the host runs no other VMPL than 0, as KVM: "this host runs VMPL0 only";
 *            "terminated" 15:15, exit code 1.
 * plain VM:  "this guest needs SEV-SNP"; "exit-port" with 1, exit code 1.
 */
#include "runtime/runtime.h"

LAUNCH_VMPLS;

#define VALUE 0x766d706c30UL
#define ALL_RIGHTS (RMP_READ | RMP_WRITE | RMP_EXECUTE)

/* guest.ld: what is launched, file bytes and zeroes. */
extern u8 image_start[], data_end[], bss_start[], image_end[];

static volatile u64 read_only[PAGE_SIZE / 8] PAGE_ALIGNED;
static u8 vmsa[PAGE_SIZE] PAGE_ALIGNED;
static u8 area[CPU_SIZE] __attribute__((aligned(CPU_SIZE)));

static void run_vmpl(u32 vmpl)
{
	ghcb_begin();
	ghcb_exit(EXIT_RUN_VMPL, vmpl, 0);
}

/* VMPL1 begins here. It can't PVALIDATE: VMPL0 has shared its GHCB page already. */
static void less_privileged(void)
{
	check_equal(ghcb_msr(GHCB_REGISTER | (u64)area) >> 12, (u64)area / PAGE_SIZE);
	check_equal(read_only[0], VALUE);
	check_equal(rmpadjust((void *)read_only, 1 | ALL_RIGHTS), RMP_FAIL_PERMISSION);
	check_equal(rmpadjust((void *)read_only, 2 | ALL_RIGHTS), RMP_FAIL_PERMISSION);
	print("VMPL1: may read, may not take more\n");
	run_vmpl(0);

	read_only[0] = 0;
	check_equal(read_only[0], VALUE);
}

static void grant(u64 gpa, u64 end)
{
	for (; gpa < end; gpa += PAGE_SIZE) {
		/* VMPL1 must not have its own VMSA, and GHCB pages are shared. */
		if (gpa == (u64)vmsa || !is_private(gpa))
			continue;
		check_equal(rmpadjust((void *)gpa,
				      1 | (gpa == (u64)read_only ? RMP_READ : ALL_RIGHTS)), 0);
	}
}

void guest_main(void)
{
	u32 n;

	need_snp();
	if (!(ghcb_msr(GHCB_FEATURES) >> 12 & FEATURE_MULTI_VMPL)) {
		print("this host runs VMPL0 only\n");
		fail(FAIL_VMPLS);
	}

	read_only[0] = VALUE;
	page_share(area);
	for (n = 0; n < PAGE_SIZE / 8; n++)
		((volatile u64 *)area)[n] = 0;
	vmsa_fill(vmsa, 1, less_privileged, area);
	grant((u64)image_start, (u64)data_end);
	grant((u64)bss_start, (u64)image_end);
	check_equal(vmsa_run(vmsa, 1, cpu_number()), 0);
	run_vmpl(1);
	print("VMPL0: VMPL1 came back\n");
	run_vmpl(1);
	check_equal(read_only[0], VALUE);
}
