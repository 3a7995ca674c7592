/* Interrupts to itself: priorities, end of interrupt, task priority, NMI, spurious vector. */
#include "apic.h"

#define MSR_SELF 0x83f

HANDLER(0x40, 0)
HANDLER(0x4f, 1)
HANDLER(0x61, 1)
HANDLER(0x62, 1)
HANDLER(2, 0)

void guest_main(void)
{
	interrupts_init();
	set_handler(0x40, handler_0x40);
	set_handler(0x4f, handler_0x4f);
	set_handler(0x61, handler_0x61);
	set_handler(0x62, handler_0x62);
	set_handler(2, handler_2);
	x2apic_init();

	/* Highest first; the same class waits for the end of interrupt. */
	wrmsr(MSR_SELF, 0x40);
	wrmsr(MSR_SELF, 0x61);
	wrmsr(MSR_SELF, 0x62);
	check_equal(apic_read(APIC_IRR + 0x30), 0x6);
	listen();
	check_equal(ordered, 3);
	check_equal(order[0] == 0x62 && order[1] == 0x61 && order[2] == 0x40, 1);
	check_equal(apic_read(APIC_ISR + 0x20), 1);
	check_equal(apic_read(APIC_PPR), 0x40);
	wrmsr(MSR_SELF, 0x4f);
	listen();
	check_equal(seen[0x4f], 0);
	wrmsr(MSR_SELF, 0x61);
	listen();
	check_equal(seen[0x61], 2);
	apic_write(APIC_EOI, 0);
	check_equal(apic_read(APIC_PPR), 0);
	listen();
	check_equal(seen[0x4f], 1);
	print("priorities\n");

	/* The task priority, by the register and by CR8. */
	apic_write(APIC_TPR, 0x60);
	check_equal(apic_read(APIC_PPR), 0x60);
	wrmsr(MSR_SELF, 0x62);
	listen();
	check_equal(seen[0x62], 1);
	apic_write(APIC_TPR, 0x50);
	listen();
	check_equal(seen[0x62], 2);
	if (!is_snp()) {
		u64 priority;

		asm volatile("mov %%cr8, %0" : "=r"(priority));
		check_equal(priority, 5);
		asm volatile("mov %0, %%cr8" : : "r"(7UL));
		check_equal(apic_read(APIC_TPR), 0x70);
		wrmsr(MSR_SELF, 0x61);
		asm volatile("sti; nop");
		check_equal(seen[0x61], 2);
		asm volatile("mov %0, %%cr8; nop; cli" : : "r"(3UL) : "memory");
		check_equal(seen[0x61], 3);
	}
	apic_write(APIC_TPR, 0);
	print("task priority\n");

	/* An interrupt that was there before HLT keeps it from waiting. */
	wrmsr(MSR_SELF, 0x61);
	seen[0x61] = 0;
	halt();
	check_equal(seen[0x61], 1);

	/* An APIC that is off takes nothing, and masks its timer. */
	apic_write(APIC_LVTT, 0x61);
	apic_write(APIC_SPIV, 0xff);
	check_equal(apic_read(APIC_LVTT), MASKED | 0x61);
	wrmsr(MSR_SELF, 0x61);
	check_equal(apic_read(APIC_IRR + 0x30), 0);
	apic_write(APIC_SPIV, 0x1ff);
	print("off\n");

	apic_write(APIC_ICR, TO_SELF | ASSERT | NMI);
	listen();
	check_equal(seen[2], 1);
	if (is_snp()) {
		ghcb_begin();
		ghcb_exit(0x80000003, 0, 0); /* NMI_COMPLETE */
	}
	apic_write(APIC_ICR, TO_SELF | ASSERT | NMI);
	listen();
	check_equal(seen[2], 2);
	print("NMI\n");
}
