/* The identity map: start.S mapped what is below SMALL_PAGES_END, all else is mapped on demand. */
#include "runtime.h"

extern u64 page_directories[4 * 512];
extern u64 small_pages[512];

static u64 c_bit_mask(void)
{
	return is_snp() ? 1UL << c_bit : 0;
}

static u64 *entry(u64 gpa)
{
	if (gpa < SMALL_PAGES_END)
		return &small_pages[gpa / PAGE_SIZE];
	if (gpa >> 32)
		fail(FAIL_MEMORY);
	return &page_directories[gpa >> 21];
}

/* Map the 2 MiB around a GPA in the low 4 GiB; shared, for MMIO, or private. */
void map_2m(u64 gpa, int private)
{
	if (gpa < SMALL_PAGES_END)
		fail(FAIL_MEMORY);
	*entry(gpa) = (gpa >> 21 << 21) | PTE_LARGE | PTE_TABLE | (private ? c_bit_mask() : 0);
	asm volatile("invlpg (%0)" : : "r"(gpa) : "memory");
}

/* Set or clear the C-bit of what maps a GPA: a 4 KiB page below SMALL_PAGES_END, else 2 MiB. */
void set_private(u64 gpa, int private)
{
	u64 *pte = entry(gpa);

	*pte = (*pte & ~c_bit_mask()) | (private ? c_bit_mask() : 0);
	asm volatile("invlpg (%0)" : : "r"(gpa) : "memory");
}

int is_private(u64 gpa)
{
	return (*entry(gpa) & c_bit_mask()) != 0;
}
