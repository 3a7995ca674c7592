/*
 * Misdeed: an exception without a table of handlers, which ends in a triple fault.
 *
 * both: "shutdown", KVM_EXIT_SHUTDOWN, exit code 1.
 */
#include "runtime/runtime.h"

void guest_main(void)
{
	static const struct {
		u16 limit;
		u64 base;
	} __attribute__((packed)) none;

	print("no handlers\n");
	asm volatile("lidt %0; ud2" : : "m"(none));
}
