/*
 * Writes to and reads from a device that is not there, by every size and many forms of MOV; the
 * host must answer.
 */
#include "runtime/runtime.h"

#define DEVICE 0xd0000000UL

#define LOAD(instruction, old)                                                             \
	({                                                                             \
		register u64 base asm("r12") = DEVICE;                                 \
		u64 value = old;                                                       \
                                                                                       \
		asm volatile(instruction : "+r"(value) : "r"(base) : "memory");        \
		value;                                                                 \
	})

static void forms(void)
{
	register u64 index asm("r13") = 5;
	u64 base = DEVICE;

	asm volatile("movq $-2, 0x28(%0)" : : "r"(base) : "memory");
	asm volatile("movw $0x1234, (%0, %1, 8)" : : "r"(base + 8), "r"(index) : "memory");
	asm volatile("movl $0x12345678, 0x10000(%0, %1, 4)" : : "r"(base), "r"(index) : "memory");
	if (LOAD("movzwl 0x40(%1), %k0", -1UL) != 0x9190 ||
	    LOAD("movswq (%1), %0", 0) != 0xffffffffffff9190 ||
	    LOAD("movslq 0x44(%1), %0", 0) != 0xffffffffa3a2a1a0 ||
	    LOAD("movsbw 0x48(%1), %w0", 0x1111111111111111) != 0x111111111111ffb0)
		fail(FAIL_MEMORY);
}

void guest_main(void)
{
	map_2m(DEVICE, SHARED);
	mmio_write8(DEVICE, 0x11);
	mmio_write16(DEVICE + 2, 0x2322);
	mmio_write32(DEVICE + 4, 0x37363534);
	mmio_write64(DEVICE + 8, 0x4f4e4d4c4b4a4948);
	if (mmio_read8(DEVICE + 0x10) != 0x51 || mmio_read16(DEVICE + 0x12) != 0x6362 ||
	    mmio_read32(DEVICE + 0x14) != 0x77767574 ||
	    mmio_read64(DEVICE + 0x18) != 0x8f8e8d8c8b8a8988)
		fail(FAIL_MEMORY);
	forms();
}
