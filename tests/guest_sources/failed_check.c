/* A check that fails; the test knows its line. */
#include "runtime/runtime.h"

void guest_main(void)
{
	check_equal(0x1234 + 1, -1L);
}
