/* Validates a page that was launched, and so is valid: the guest must see that nothing changed. */
#include "runtime/runtime.h"

static u64 page[PAGE_SIZE / 8] PAGE_ALIGNED;

void guest_main(void)
{
	page_accept(page);
}
