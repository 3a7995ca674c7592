/* Ports where nothing is: a write is lost, a read gives ones and leaves the rest of %rax. */
#include "runtime/runtime.h"

#define RAX 0x1122334455667788UL

#define IN(instruction, port)                                                          \
	({                                                                             \
		u64 rax = RAX;                                                         \
                                                                                       \
		asm volatile(instruction : "+a"(rax) : "d"(port));                     \
		rax;                                                                   \
	})

void guest_main(void)
{
	out8(0x80, 0x55);
	out32(0x80, 0x55555555);
	if (IN("in %%dx, %%al", 0x70) != 0x11223344556677ff ||
	    IN("in %%dx, %%ax", 0x170) != 0x112233445566ffff ||
	    IN("in %%dx, %%eax", 0xcf8) != 0x00000000ffffffff ||
	    IN("in $0x71, %%al", 0) != 0x11223344556677ff ||
	    IN("in $0x72, %%ax", 0) != 0x112233445566ffff)
		fail(FAIL_MEMORY);
}
