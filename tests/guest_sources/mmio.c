/* Writes to and reads from a device that is not there, by every size; the host must answer. */
#include "runtime/runtime.h"

#define DEVICE 0xd0000000UL

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
}
