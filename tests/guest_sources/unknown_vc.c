/* An instruction that is a #VC in an SNP guest and that the runtime has no answer to. */
#include "runtime/runtime.h"

void guest_main(void)
{
	asm volatile("rdpmc" : : "c"(0) : "eax", "edx");
}
