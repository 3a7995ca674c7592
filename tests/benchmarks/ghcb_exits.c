/* CPUID again and again: each is a #VC, and a request through the GHCB page that KVM answers. */
#include "runtime/runtime.h"

#define EXITS 2000

void guest_main(void)
{
	u32 leaf[4], n;

	for (n = 0; n < EXITS; n++)
		cpuid(0, 0, leaf);
}
