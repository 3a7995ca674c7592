/* Shares a page with the host, hears an answer in it, and takes it back. */
#include "runtime/runtime.h"

#define DOORBELL 0x10
#define QUESTION 0xa3f7964616572UL
#define ANSWER 0x21736579UL

static volatile u64 page[PAGE_SIZE / 8] PAGE_ALIGNED;

void guest_main(void)
{
	page[0] = 1;
	page_share((void *)page);
	page[0] = QUESTION;
	out32(DOORBELL, (u64)page);
	if (page[0] != ANSWER)
		fail(FAIL_MEMORY);

	page_accept((void *)page);
	page[0] = QUESTION;
	out32(DOORBELL, (u64)page);
	if (page[0] != QUESTION)
		fail(FAIL_MEMORY);
}
