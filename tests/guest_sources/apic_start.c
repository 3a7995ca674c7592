/*
 * A plain VM's three other vCPUs: INIT and SIPI by the ICR of the xAPIC page, from real mode to 64
 * bits, then interrupts between all of them.
 */
#include "apic.h"

#define APIC_PAGE 0xfee00000
#define TRAMPOLINE 0x8000UL
#define PING 0x45
#define PONG 0x46
#define OTHERS 3UL

asm("	.pushsection .rodata\n"
    "	.globl trampoline, trampoline_end, trampoline_cr3, trampoline_stack\n"
    "	.code16\n"
    "trampoline:\n"
    "	cli\n"
    "	mov %cs, %ax\n"
    "	mov %ax, %ds\n"
    "	lgdtl trampoline_pointer - trampoline\n"
    "	mov $1, %eax\n"
    "	mov %eax, %cr0\n"
    "	ljmpl $8, $0x8000 + 1f - trampoline\n"
    "	.code32\n"
    "1:	mov $16, %eax\n"
    "	mov %eax, %ds\n"
    "	mov %eax, %ss\n"
    "	mov $0x20, %eax\n"
    "	mov %eax, %cr4\n"
    "	mov 0x8000 + trampoline_cr3 - trampoline, %eax\n"
    "	mov %eax, %cr3\n"
    "	mov $0xc0000080, %ecx\n"
    "	mov $0x100, %eax\n"
    "	xor %edx, %edx\n"
    "	wrmsr\n"
    "	mov $0x80000001, %eax\n"
    "	mov %eax, %cr0\n"
    "	ljmpl $24, $0x8000 + 2f - trampoline\n"
    "	.code64\n"
    "2:	mov 0x8000 + trampoline_stack - trampoline, %rsp\n"
    "	mov $other_cpu, %eax\n"
    "	call *%rax\n"
    "	.balign 8\n"
    "trampoline_gdt:\n"
    "	.quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00af9b000000ffff\n"
    "trampoline_pointer:\n"
    "	.word 31\n"
    "	.long 0x8000 + trampoline_gdt - trampoline\n"
    "	.balign 8\n"
    "trampoline_cr3: .quad 0\n"
    "trampoline_stack: .quad 0\n"
    "trampoline_end:\n"
    "	.popsection\n");

extern u8 trampoline[], trampoline_end[], trampoline_cr3[], trampoline_stack[];

static u8 stacks[OTHERS + 1][4096] __attribute__((aligned(16)));
static volatile u32 here, pinged, ponged;

static u32 xapic_read(u32 offset)
{
	return mmio_read32(APIC_PAGE + offset);
}

static void xapic_write(u32 offset, u32 value)
{
	mmio_write32(APIC_PAGE + offset, value);
}

static void send(u32 to, u32 what)
{
	xapic_write(APIC_ICR2, to << 24);
	xapic_write(APIC_ICR, what);
}

static __attribute__((interrupt)) void ping(struct frame *frame)
{
	(void)frame;
	__atomic_add_fetch(&pinged, 1, __ATOMIC_SEQ_CST);
	xapic_write(APIC_EOI, 0);
	send(0, ASSERT | PONG);
}

static __attribute__((interrupt)) void pong(struct frame *frame)
{
	(void)frame;
	ponged++;
	xapic_write(APIC_EOI, 0);
}

void __attribute__((used)) other_cpu(void)
{
	load_idt();
	xapic_write(APIC_SPIV, 0x1ff);
	here = xapic_read(APIC_ID) >> 24;
	for (;;)
		halt();
}

static void put(u8 *what, u64 value)
{
	*(volatile u64 *)(TRAMPOLINE + (u64)(what - trampoline)) = value;
}

void guest_main(void)
{
	u64 cr3, n;

	check_equal(is_snp(), 0);
	map_2m(APIC_PAGE & ~0x1fffffUL, SHARED);
	interrupts_init();
	set_handler(PING, ping);
	set_handler(PONG, pong);
	xapic_write(APIC_SPIV, 0x1ff);
	check_equal(xapic_read(APIC_ID), 0);

	for (n = 0; n < (u64)(trampoline_end - trampoline); n++)
		((volatile u8 *)TRAMPOLINE)[n] = trampoline[n];
	asm volatile("mov %%cr3, %0" : "=r"(cr3));
	put(trampoline_cr3, cr3);
	for (n = 1; n <= OTHERS; n++) {
		put(trampoline_stack, (u64)stacks[n]);
		send(n, ASSERT | INIT);
		send(n, ASSERT | STARTUP | TRAMPOLINE >> 12);
		while (here != n)
			asm volatile("pause");
		print_number(n);
		print(" is here\n");
	}

	send(0, TO_OTHERS | ASSERT | PING);
	while (pinged < OTHERS || !ponged)
		halt();
	check_equal(pinged, OTHERS);
	check_equal(ponged >= 1 && ponged <= OTHERS, 1);
	print("all were called\n");

	/* The last one is reset, and starts anew. */
	here = 0;
	put(trampoline_stack, (u64)stacks[OTHERS]);
	send(OTHERS, ASSERT | INIT);
	check_equal(here, 0);
	send(OTHERS, ASSERT | STARTUP | TRAMPOLINE >> 12);
	while (here != OTHERS)
		asm volatile("pause");
	print("and again\n");
}
