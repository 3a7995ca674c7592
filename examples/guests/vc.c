/*
 * Code as for any PC: port I/O, also by string instructions, CPUID, MSRs, and a device in memory.
 * In an SNP guest each of these is a #VC, which the runtime's handler answers through the GHCB.
 * The device is kvmlaunch's console, which is a 16550 in memory as well.
 *
 * both: "string", "ports, CPUID, MSRs: ok", "memory", "device in memory: ok"; "exit-port" with 0,
 *       exit code 0.
 */
#include "runtime/runtime.h"

#define UART 0xfedc9000UL
#define UART_LSR 5
#define UART_SCRATCH 7
#define LSR_EMPTY 0x60
#define NOBODY 0x170 /* a port where nothing answers, so that it reads as ones */

#define MSR_APIC_BASE 0x1b
#define APIC_BASE 0xfee00000UL

static void strings(void)
{
	static const char text[] = "string\n";
	const char *from = text;
	u8 bytes[5] = { 0 };
	u16 words[3] = { 1, 2, 3 }, *to_words = words;
	u8 *to = bytes;
	u64 count = sizeof(text) - 1, n;

	asm volatile("cld; rep outsb" : "+S"(from), "+c"(count) : "d"(CONSOLE_PORT) : "memory");
	check_equal(count, 0);
	check_equal(from - text, sizeof(text) - 1);

	count = sizeof(bytes) - 1;
	asm volatile("rep insb" : "+D"(to), "+c"(count) : "d"(CONSOLE_PORT + UART_LSR) : "memory");
	for (n = 0; n < sizeof(bytes); n++)
		check_equal(bytes[n], n < sizeof(bytes) - 1 ? LSR_EMPTY : 0);

	/* Backwards, and without a count. */
	to_words = words + 1;
	asm volatile("std; insw; cld" : "+D"(to_words) : "d"(NOBODY) : "memory");
	check_equal(to_words - words, 0);
	check_equal(words[0], 1);
	check_equal(words[1], 0xffff);
	check_equal(words[2], 3);
}

static void ports(void)
{
	u64 value = 0x1122334455667788;

	asm volatile("inw %%dx, %%ax" : "+a"(value) : "d"(NOBODY));
	check_equal(value, 0x112233445566ffff);
	asm volatile("inl %%dx, %%eax" : "+a"(value) : "d"(NOBODY));
	check_equal(value, 0xffffffff);
	out8(CONSOLE_PORT + UART_SCRATCH, 0x5a);
	check_equal(in8(CONSOLE_PORT + UART_SCRATCH), 0x5a);
}

static void cpuid_and_msrs(void)
{
	u32 leaf[4];
	u64 base;

	/* x87 and SSE state and its header (APM volume 3, E.3.8), or no XSAVE. */
	cpuid(0xd, 0, leaf);
	if (leaf[0])
		check_equal(leaf[1], 576);
	base = rdmsr(MSR_APIC_BASE);
	check_equal(base & ~0xfffUL, APIC_BASE);
	wrmsr(MSR_APIC_BASE, base);
	check_equal(rdmsr(MSR_APIC_BASE), base);
}

/* The forms of MOV that compilers like for device registers. */
static void device(void)
{
	static const char text[] = "memory\n";
	u64 value = 0x1122334455667788, index = UART_SCRATCH;
	u32 n;

	map_2m(UART, SHARED);
	for (n = 0; text[n]; n++)
		mmio_write8(UART, text[n]);
	check_equal(mmio_read8(UART + UART_LSR), LSR_EMPTY);

	asm volatile("movb $0x85, (%0, %1)" : : "r"(UART), "r"(index) : "memory");
	asm volatile("movb 7(%1), %b0" : "+r"(value) : "r"(UART) : "memory");
	check_equal(value, 0x1122334455667785);
	asm volatile("movzbl 7(%1), %k0" : "+r"(value) : "r"(UART) : "memory");
	check_equal(value, 0x85);
	asm volatile("movsbq (%1, %2), %0" : "=r"(value) : "r"(UART), "r"(index) : "memory");
	check_equal(value, 0xffffffffffffff85);
	asm volatile("mov $0x31, %%r13d; movb %%r13b, 7(%0)" : : "r"(UART) : "r13", "memory");
	asm volatile("movzbw 7(%1), %w0" : "+r"(value) : "r"(UART) : "memory");
	check_equal(value, 0xffffffffffff0031);
	check_equal(in8(CONSOLE_PORT + UART_SCRATCH), 0x31);
}

void guest_main(void)
{
	strings();
	ports();
	cpuid_and_msrs();
	print("ports, CPUID, MSRs: ok\n");
	device();
	print("device in memory: ok\n");
}
