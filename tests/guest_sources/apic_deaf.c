/* Waits with interrupts off, for a timer that goes on and on: for ever. */
#include "apic.h"

HANDLER(0x40, 1)

void guest_main(void)
{
	interrupts_init();
	set_handler(0x40, handler_0x40);
	x2apic_init();
	apic_write(APIC_LVTT, PERIODIC | 0x40);
	apic_write(APIC_TMICT, 1);
	print("good night\n");
	asm volatile("cli; hlt");
	fail(FAIL_EXCEPTION + 0x40);
}
