/* The APIC timer: once, periodically, masked, and what its count says meanwhile. */
#include "apic.h"

#define ONCE 0x40
#define AGAIN 0x51

HANDLER(0x40, 1)
HANDLER(0x51, 1)

void guest_main(void)
{
	u64 before, count;

	interrupts_init();
	set_handler(ONCE, handler_0x40);
	set_handler(AGAIN, handler_0x51);
	x2apic_init();

	apic_write(APIC_LVTT, ONCE);
	before = rdtsc();
	apic_write(APIC_TMICT, 2000000); /* 2 ms */
	check_equal(apic_read(APIC_TMCCT) <= 2000000, 1);
	check_equal(apic_read(APIC_TMICT), 2000000);
	halt();
	/* No TSC is slower than 1 GHz. */
	check_equal(rdtsc() - before >= 2000000, 1);
	check_equal(seen[ONCE], 1);
	check_equal(apic_read(APIC_TMCCT), 0);
	listen();
	check_equal(seen[ONCE], 1);
	print("once\n");

	apic_write(APIC_LVTT, PERIODIC | AGAIN);
	apic_write(APIC_TMICT, 300000);
	while (seen[AGAIN] < 3)
		halt();
	print("again and again\n");

	/* One tick: the host makes it longer, and goes on. */
	apic_write(APIC_TMICT, 1);
	while (seen[AGAIN] < 6)
		halt();
	apic_write(APIC_TMICT, 0);
	check_equal(apic_read(APIC_TMCCT), 0);
	print("not too often\n");

	listen();
	ordered = 0;
	seen[ONCE] = 0;
	apic_write(APIC_LVTT, MASKED | ONCE);
	apic_write(APIC_TMICT, 100000);
	while ((count = apic_read(APIC_TMCCT)))
		check_equal(count <= 100000, 1);
	for (before = rdtsc(); rdtsc() - before < 10000000;)
		listen(); /* the host may be late */
	check_equal(seen[ONCE], 0);
	apic_write(APIC_TMICT, 0); /* or KVM makes up for it now */
	apic_write(APIC_LVTT, ONCE);
	listen();
	check_equal(seen[ONCE], 0);
	print("not while masked\n");

	/* An interrupt ends a busy loop as well. */
	apic_write(APIC_TMICT, 300000);
	asm volatile("sti");
	while (!seen[ONCE])
		;
	asm volatile("cli");
	print("without HLT\n");
}
