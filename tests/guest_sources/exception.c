/* Executes what is no instruction. */
#include "runtime/runtime.h"

void guest_main(void)
{
	asm volatile("ud2");
}
