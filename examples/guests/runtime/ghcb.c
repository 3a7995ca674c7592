/* What an SNP guest says to its host through the GHCB page of the vCPU that it runs on. */
#include "runtime.h"

extern u32 ghcb_ready;

/* At the start of what belongs to the vCPU, whose stack is behind it. */
u8 *ghcb_page(void)
{
	u64 stack;

	asm("mov %%rsp, %0" : "=r"(stack));
	return (u8 *)(stack & ~(CPU_SIZE - 1UL));
}

/* Weak: a guest that does without the page brings its own. */
__attribute__((weak)) void snp_init(void)
{
	if (!(ghcb_msr(GHCB_FEATURES) >> 12 & FEATURE_SNP))
		fail(FAIL_FEATURES);
	ghcb_init();
	ghcb_ready = 1;
}

void ghcb_init(void)
{
	u8 *ghcb = ghcb_page();
	u32 n;

	page_share(ghcb);
	if (ghcb_msr(GHCB_REGISTER | (u64)ghcb) >> 12 != (u64)ghcb / PAGE_SIZE)
		fail(FAIL_REGISTER);
	for (n = 0; n < PAGE_SIZE / 8; n++)
		((volatile u64 *)ghcb)[n] = 0;
}

static volatile u64 *field_of(u32 field)
{
	return (volatile u64 *)(ghcb_page() + field);
}

/* A request: ghcb_begin(), ghcb_set() for what it needs, ghcb_exit() or ghcb_try(). */
void ghcb_begin(void)
{
	*field_of(GHCB_VALID) = 0;
	*field_of(GHCB_VALID + 8) = 0;
	*(volatile u16 *)(ghcb_page() + GHCB_VERSION) = GHCB_PROTOCOL;
	*(volatile u32 *)(ghcb_page() + GHCB_USAGE) = 0;
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

/* The shared buffer inside the page, for what doesn't fit into fields. */
u64 ghcb_buffer(void)
{
	return (u64)ghcb_page() + GHCB_BUFFER;
}

/* Returns 0, REFUSED or RAISED_EXCEPTION. */
u32 ghcb_try(u64 code, u64 info1, u64 info2)
{
	ghcb_set(GHCB_EXIT_CODE, code);
	ghcb_set(GHCB_INFO1, info1);
	ghcb_set(GHCB_INFO2, info2);
	wrmsr(MSR_GHCB, (u64)ghcb_page());
	asm volatile("rep; vmmcall" : : : "memory");
	return ghcb_get(GHCB_INFO1);
}

/* A request that the host must not refuse. */
void ghcb_exit(u64 code, u64 info1, u64 info2)
{
	switch (ghcb_try(code, info1, info2)) {
	case 0:
		return;
	case RAISED_EXCEPTION:
		fail(FAIL_EXCEPTION + (ghcb_get(GHCB_INFO2) & 0x1f));
	case REFUSED:
		fail(FAIL_REFUSED + (ghcb_get(GHCB_INFO2) & 0x1f));
	default:
		fail(FAIL_ANSWER);
	}
}
