/* CPUID with and without an index, and an MSR read and written; prints the vendor. */
#include "runtime/runtime.h"

#define MSR_APIC_BASE 0x1b
#define APIC_BASE 0xfee00000UL

void guest_main(void)
{
	u32 leaf[4], vendor[4];
	u64 apic_base;

	cpuid(0, 0, leaf);
	vendor[0] = leaf[1];
	vendor[1] = leaf[3];
	vendor[2] = leaf[2];
	vendor[3] = '\n';
	print((const char *)vendor);

	/* The size of the x87 and SSE state and its header, from leaf 0xd (APM volume 3, E.3.8). */
	cpuid(0xd, 0, leaf);
	if (leaf[0] && leaf[1] != 576)
		fail(FAIL_MEMORY);

	apic_base = rdmsr(MSR_APIC_BASE);
	if ((apic_base & ~0xfffUL) != APIC_BASE)
		fail(FAIL_MEMORY);
	wrmsr(MSR_APIC_BASE, apic_base);
	if (rdmsr(MSR_APIC_BASE) != apic_base)
		fail(FAIL_MEMORY);
}
