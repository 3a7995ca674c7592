/*
 * Misdeed: never ends. Give a --timeout.
 *
 * both: "looping"; "timeout", exit code 124.
 */
#include "runtime/runtime.h"

void guest_main(void)
{
	print("looping\n");
	for (;;)
		asm volatile("");
}
