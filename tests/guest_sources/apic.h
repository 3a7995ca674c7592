/* Local APIC and interrupts in 64-bit mode. Sources: AMD APM volume 2, chapter 16 and 8.9. */
#include "runtime/runtime.h"

#define APIC_ID 0x20
#define APIC_TPR 0x80
#define APIC_PPR 0xa0
#define APIC_EOI 0xb0
#define APIC_SPIV 0xf0
#define APIC_ISR 0x100
#define APIC_IRR 0x200
#define APIC_ICR 0x300
#define APIC_ICR2 0x310
#define APIC_LVTT 0x320
#define APIC_TMICT 0x380
#define APIC_TMCCT 0x390
#define APIC_TDCR 0x3e0
#define APIC_SELF 0x3f0
#define MASKED 0x10000
#define PERIODIC 0x20000
#define DIVIDE_BY_1 0xb
#define MSR_APIC_BASE 0x1b
#define X2APIC 0xc00
#define ASSERT 0x4000
#define TO_SELF 0x40000
#define TO_OTHERS 0xc0000
#define NMI 0x400
#define INIT 0x500
#define STARTUP 0x600

struct frame;

static u64 apic_idt[256][2];
static volatile u32 seen[256];
static volatile u32 order[16], ordered;

static inline u64 apic_read(u32 offset)
{
	return rdmsr(0x800 + offset / 16);
}

static inline void apic_write(u32 offset, u64 value)
{
	wrmsr(0x800 + offset / 16, value);
}

static inline void load_idt(void)
{
	struct {
		u16 limit;
		u64 base;
	} __attribute__((packed)) pointer = { sizeof(apic_idt) - 1, (u64)apic_idt };

	asm volatile("lidt %0" : : "m"(pointer));
}

static inline void set_handler(u32 vector, void (*handler)(struct frame *))
{
	u64 at = (u64)handler;

	apic_idt[vector][0] = (at & 0xffff) | 0x18UL << 16 | 0x8eUL << 40 | (at >> 16 & 0xffff) << 48;
	apic_idt[vector][1] = at >> 32;
}

/* The runtime's exceptions, with room for interrupts. */
static inline void interrupts_init(void)
{
	struct {
		u16 limit;
		u64 base;
	} __attribute__((packed)) pointer;
	u32 n;

	asm volatile("sidt %0" : "=m"(pointer));
	for (n = 0; n < 32; n++) {
		apic_idt[n][0] = ((volatile u64 *)pointer.base)[2 * n];
		apic_idt[n][1] = ((volatile u64 *)pointer.base)[2 * n + 1];
	}
	load_idt();
}

static inline void x2apic_init(void)
{
	wrmsr(MSR_APIC_BASE, rdmsr(MSR_APIC_BASE) | X2APIC);
	apic_write(APIC_SPIV, 0x1ff);
	apic_write(APIC_TDCR, DIVIDE_BY_1);
}

/* A handler that notes its vector; with end_of_interrupt it is done with it. */
#define HANDLER(vector, end_of_interrupt)                                             \
	static __attribute__((interrupt)) void handler_##vector(struct frame *frame)  \
	{                                                                             \
		(void)frame;                                                          \
		seen[vector]++;                                                       \
		if (ordered < 16)                                                     \
			order[ordered++] = vector;                                    \
		if (end_of_interrupt)                                                 \
			apic_write(APIC_EOI, 0);                                      \
	}

static inline void halt(void)
{
	asm volatile("sti; hlt; cli" : : : "memory");
}

/* Time for interrupts that are pending, or aren't. */
static inline void listen(void)
{
	asm volatile("sti; nop; nop; cli" : : : "memory");
}

static inline u64 rdtsc(void)
{
	u32 low, high;

	asm volatile("rdtsc" : "=a"(low), "=d"(high));
	return low | (u64)high << 32;
}
