/* What an SNP guest says to its host: the GHCB MSR protocol, page states, the GHCB page. */
#include "runtime.h"

#define ANSWER 0xfffUL
#define FEATURE_SNP 0x1
#define STATE_PRIVATE 1UL
#define STATE_SHARED 2UL

static u8 ghcb[PAGE_SIZE] PAGE_ALIGNED;

/* The answer has the number of its request plus one (but for GHCB_INFO, which start.S asks). */
u64 ghcb_msr(u64 request)
{
	u64 answer;

	wrmsr(MSR_GHCB, request);
	asm volatile("rep; vmmcall" : : : "memory");
	answer = rdmsr(MSR_GHCB);
	if ((answer & ANSWER) != (request & ANSWER) + 1 && (request & ANSWER) != GHCB_TERMINATE)
		fail(FAIL_ANSWER);
	return answer;
}

static void state_change(u64 gpa, u64 state)
{
	if (ghcb_msr(GHCB_STATE_CHANGE | gpa | state << 52) >> 32)
		fail(FAIL_STATE_CHANGE);
}

/* A page that is validated twice could be a page that the host exchanged: that is a failure. */
static void pvalidate(const void *page, u32 validate)
{
	u32 error;
	u8 unchanged;

	asm volatile(".byte 0xf2, 0x0f, 0x01, 0xff" /* PVALIDATE of 4 KiB */
		     : "=a"(error), "=@ccc"(unchanged)
		     : "a"(page), "c"(0), "d"(validate)
		     : "memory");
	if (error || unchanged)
		fail(FAIL_PVALIDATE);
}

/* Give a private page away, for both sides to use; what it holds is lost. */
void page_share(void *page)
{
	pvalidate(page, 0);
	state_change((u64)page, STATE_SHARED);
	set_private((u64)page, SHARED);
}

/*
 * Take a page that is shared, or that was not launched. Its contents are undefined until they are
 * written.
 */
void page_accept(void *page)
{
	state_change((u64)page, STATE_PRIVATE);
	set_private((u64)page, PRIVATE);
	pvalidate(page, 1);
}

void snp_init(void)
{
	u32 n;

	if (!(ghcb_msr(GHCB_FEATURES) >> 12 & FEATURE_SNP))
		fail(FAIL_FEATURES);
	page_share(ghcb);
	if (ghcb_msr(GHCB_REGISTER | (u64)ghcb) >> 12 != (u64)ghcb / PAGE_SIZE)
		fail(FAIL_REGISTER);
	for (n = 0; n < PAGE_SIZE / 8; n++)
		((volatile u64 *)ghcb)[n] = 0;
}

static volatile u64 *field_of(u32 field)
{
	return (volatile u64 *)(ghcb + field);
}

/* A request through the page: ghcb_begin(), ghcb_set() for what it needs, ghcb_exit(). */
void ghcb_begin(void)
{
	*field_of(GHCB_VALID) = 0;
	*field_of(GHCB_VALID + 8) = 0;
}

void ghcb_set(u32 field, u64 value)
{
	*field_of(field) = value;
	*field_of(GHCB_VALID + field / 512 * 8) |= 1UL << field / 8 % 64;
}

/* A field of the answer, which the host must have marked as valid. */
u64 ghcb_get(u32 field)
{
	if (!(*field_of(GHCB_VALID + field / 512 * 8) >> field / 8 % 64 & 1))
		fail(FAIL_ANSWER);
	return *field_of(field);
}

void *ghcb_buffer(void)
{
	return ghcb + GHCB_BUFFER;
}

void ghcb_exit(u64 code, u64 info1, u64 info2)
{
	ghcb_set(GHCB_EXIT_CODE, code);
	ghcb_set(GHCB_INFO1, info1);
	ghcb_set(GHCB_INFO2, info2);
	*(volatile u16 *)(ghcb + GHCB_VERSION) = GHCB_PROTOCOL;
	wrmsr(MSR_GHCB, (u64)ghcb);
	asm volatile("rep; vmmcall" : : : "memory");
	if ((u32)ghcb_get(GHCB_INFO1))
		fail(FAIL_REFUSED);
}
