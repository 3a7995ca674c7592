/*
 * The other vCPUs. In a plain VM they wait in start.S with a stack each; as an SNP guest they have
 * not run at all (LAUNCH_AP_CREATION) and get a VMSA of our making.
 */
#include "runtime.h"

void (*volatile cpus_entry)(u32 number);
u8 cpus_areas[CPUS_MOST][CPU_SIZE] __attribute__((aligned(CPU_SIZE)));
static u8 vmsas[CPUS_MOST][PAGE_SIZE] PAGE_ALIGNED;

static u32 leaf1_ebx(void)
{
	u32 out[4];

	cpuid(1, 0, out);
	return out[1];
}

/* CPUID leaf 1: EBX bits 23:16, and 31:24, the APIC id, which here is the number of the vCPU. */
u32 cpu_count(void)
{
	u32 count = leaf1_ebx() >> 16 & 0xff;

	return count ? count : 1;
}

u32 cpu_number(void)
{
	return leaf1_ebx() >> 24;
}

void lock(volatile u32 *lock)
{
	u32 taken;

	do {
		taken = 1;
		asm volatile("pause; xchg %0, %1" : "+r"(taken), "+m"(*lock) : : "memory");
	} while (taken);
}

void unlock(volatile u32 *lock)
{
	asm volatile("" : : : "memory");
	*lock = 0;
}

/* Where the other vCPUs begin 64-bit C. */
void cpus_run(void)
{
	exceptions_load();
	if (is_snp())
		ghcb_init();
	cpus_entry(cpu_number());
	for (;;)
		asm volatile("hlt");
}

/* Let every other vCPU call entry() once, and then halt. */
void cpus_start(void (*entry)(u32 number))
{
	u32 count = cpu_count(), number = cpu_number(), n;

	if (count > CPUS_MOST)
		fail(FAIL_CPUS);
	cpus_entry = entry;
	for (n = 0; is_snp() && n < count; n++) {
		if (n == number)
			continue;
		vmsa_fill(vmsas[n], 0, cpus_run, cpus_areas[n]);
		check_equal(vmsa_run(vmsas[n], 0, n), 0);
	}
}
