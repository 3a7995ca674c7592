/* What an SNP guest says to its host without a GHCB page: the GHCB MSR protocol. */
#include "runtime.h"

#define ANSWER 0xfffUL

/* The answer has the number of its request plus one (but for GHCB_INFO, which has one less). */
u64 ghcb_msr(u64 request)
{
	u64 wanted = (request & ANSWER) == GHCB_INFO ? GHCB_INFO_ANSWER : (request & ANSWER) + 1;
	u64 answer;

	wrmsr(MSR_GHCB, request);
	asm volatile("rep; vmmcall" : : : "memory");
	answer = rdmsr(MSR_GHCB);
	if ((answer & ANSWER) != wanted && (request & ANSWER) != GHCB_TERMINATE)
		fail(FAIL_ANSWER);
	return answer;
}

/* Ask the host to make a page private or shared. */
void state_change(const void *page, u64 state)
{
	if (ghcb_msr(GHCB_STATE_CHANGE | (u64)page | state << 52) >> 32)
		fail(FAIL_STATE_CHANGE);
}

/* PVALIDATE of 4 KiB: its result, and whether the page was in that state already. */
u32 pvalidate(const void *page, u32 validate, u8 *unchanged)
{
	u32 error;

	asm volatile(".byte 0xf2, 0x0f, 0x01, 0xff"
		     : "=a"(error), "=@ccc"(*unchanged)
		     : "a"(page), "c"(0), "d"(validate)
		     : "memory");
	return error;
}

/* A page that is validated twice could be a page that the host exchanged: that is a failure. */
static void must_pvalidate(const void *page, u32 validate)
{
	u8 unchanged;

	if (pvalidate(page, validate, &unchanged) || unchanged)
		fail(FAIL_PVALIDATE);
}

/* Give a private page away, for both sides to use; what it holds is lost. */
void page_share(void *page)
{
	must_pvalidate(page, 0);
	state_change(page, STATE_SHARED);
	set_private((u64)page, SHARED);
}

/*
 * Take a page that is shared, or that was not launched. Its contents are undefined until they are
 * written.
 */
void page_accept(void *page)
{
	state_change(page, STATE_PRIVATE);
	set_private((u64)page, PRIVATE);
	must_pvalidate(page, 1);
}
