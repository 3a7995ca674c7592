/* Page state changes of many pages at once, by a list in the GHCB's buffer. */
#include "runtime.h"

/* AMD 56421, "SNP Page State Change": indices of the first and the last entry, then entries. */
struct list {
	u16 current;
	u16 last;
	u32 reserved;
	u64 entries[PSC_MOST];
};

static u32 used;

static volatile struct list *list(void)
{
	return (volatile struct list *)ghcb_buffer();
}

/* No string I/O and no MMIO from here to psc_commit(): they use the buffer, too. */
void psc_begin(void)
{
	used = 0;
}

/* One 4 KiB page; at most PSC_MOST of them. */
void psc_add(u64 gpa, u64 state)
{
	list()->entries[used++] = gpa | state << 52;
}

/* Returns 0, or the host's error in bits 63:32. A host may do the list in parts. */
u64 psc_commit(void)
{
	u64 error;

	list()->current = 0;
	list()->last = used - 1;
	list()->reserved = 0;
	do {
		ghcb_begin();
		ghcb_set(GHCB_SCRATCH, ghcb_buffer());
		ghcb_exit(EXIT_STATE_CHANGE, 0, 0);
		error = ghcb_get(GHCB_INFO2);
	} while (!error && list()->current <= list()->last);
	return error;
}
