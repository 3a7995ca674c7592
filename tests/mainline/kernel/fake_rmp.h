/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A reverse map table in ordinary memory: one entry per page frame.
 *
 * The state of a page follows from the bits of its entry (AMD 56860, page
 * states): Hypervisor: not assigned; Firmware: assigned, ASID 0, immutable;
 * Pre-Guest: assigned to an ASID, immutable; Guest-Invalid and Guest-Valid:
 * assigned to an ASID and not immutable.  Nothing enforces the table: the CPU
 * never looks at it, only the fakes do.
 */
#ifndef FAKE_RMP_H
#define FAKE_RMP_H

#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/spinlock.h>
#include <linux/vmalloc.h>
#include <asm/pgtable_types.h>

struct fake_rmp_entry {
	u64 gpa;
	u32 asid;
	u8 level;
	u8 assigned : 1;
	u8 immutable : 1;
	u8 validated : 1;
	u8 vmsa : 1;
	u8 context : 1;
};

static struct fake_rmp_entry *fake_rmp;
static u64 fake_rmp_size;

/* Counts changes that take a page away from somebody who may have cached it. */
static u64 fake_rmp_generation;

/* Taken with GIF clear by a running vCPU, too: no holder may sleep. */
static DEFINE_SPINLOCK(fake_rmp_lock);

static int fake_rmp_init(void)
{
	int node;

	for_each_online_node(node)
		fake_rmp_size = max_t(u64, fake_rmp_size, node_end_pfn(node));

	fake_rmp = vzalloc(array_size(fake_rmp_size, sizeof(*fake_rmp)));
	return fake_rmp ? 0 : -ENOMEM;
}

static void fake_rmp_exit(void)
{
	vfree(fake_rmp);
	fake_rmp = NULL;
	fake_rmp_size = 0;
}

/* The entry of a page frame; NULL for what isn't memory. */
static struct fake_rmp_entry *fake_rmp_entry_of(u64 pfn)
{
	return pfn < fake_rmp_size ? &fake_rmp[pfn] : NULL;
}

static u64 fake_rmp_pages(int level)
{
	return level == PG_LEVEL_2M ? PTRS_PER_PMD : 1;
}

static bool fake_rmp_asid_in_use(u32 asid)
{
	u64 pfn;

	for (pfn = 0; pfn < fake_rmp_size; pfn++) {
		if (fake_rmp[pfn].assigned && fake_rmp[pfn].asid == asid)
			return true;
	}
	return false;
}

/*
 * RMPUPDATE.  All entries of a 2 MiB page are filled in, each with its own
 * GPA, so that a lookup needs no second step.
 */
static int fake_rmp_update(u64 pfn, const struct fake_rmp_entry *new)
{
	u64 pages = fake_rmp_pages(new->level);
	int ret = -EFAULT;
	u64 i;

	if (!IS_ALIGNED(pfn, pages) || pfn + pages > fake_rmp_size)
		return -EFAULT;

	spin_lock(&fake_rmp_lock);
	for (i = 0; i < pages; i++) {
		struct fake_rmp_entry *old = &fake_rmp[pfn + i];

		/* FAIL_PERMISSION and FAIL_OVERLAP. */
		if (old->immutable)
			goto unlock;
		if (old->assigned && old->level != new->level)
			goto unlock;
	}
	for (i = 0; i < pages; i++) {
		fake_rmp[pfn + i] = *new;
		if (new->asid)
			fake_rmp[pfn + i].gpa = new->gpa + i * PAGE_SIZE;
	}
	fake_rmp_generation++;
	ret = 0;
unlock:
	spin_unlock(&fake_rmp_lock);
	return ret;
}

static int fake_rmp_make_private(u64 pfn, u64 gpa, enum pg_level level,
				 u32 asid, bool immutable)
{
	struct fake_rmp_entry entry = {
		.gpa = gpa,
		.asid = asid,
		.level = level,
		.assigned = true,
		.immutable = immutable,
	};

	return fake_rmp_update(pfn, &entry);
}

static int fake_rmp_make_shared(u64 pfn, enum pg_level level)
{
	struct fake_rmp_entry entry = { .level = level };

	return fake_rmp_update(pfn, &entry);
}

static int fake_snp_lookup_rmpentry(u64 pfn, bool *assigned, int *level)
{
	struct fake_rmp_entry *entry = fake_rmp_entry_of(pfn);

	if (!entry)
		return -EFAULT;

	spin_lock(&fake_rmp_lock);
	*assigned = entry->assigned;
	*level = entry->level == PG_LEVEL_2M ? PG_LEVEL_2M : PG_LEVEL_4K;
	spin_unlock(&fake_rmp_lock);
	return 0;
}

/* Split a 2 MiB page; as the instruction, nothing else is changed. */
static int fake_psmash(u64 pfn)
{
	u64 i;

	if (!IS_ALIGNED(pfn, PTRS_PER_PMD) ||
	    pfn + PTRS_PER_PMD > fake_rmp_size)
		return -EINVAL;

	spin_lock(&fake_rmp_lock);
	for (i = 0; i < PTRS_PER_PMD; i++)
		fake_rmp[pfn + i].level = PG_LEVEL_4K;
	spin_unlock(&fake_rmp_lock);
	return 0;
}

/*
 * The kernel's own keeps leaked pages off the free list because the next user
 * would fault.  Here a reference does that; the entry is cleared, since the
 * page's owner still takes leave of it with rmp_make_shared().
 */
static void fake_snp_leak_pages(u64 pfn, unsigned int npages)
{
	pr_warn("fake RMP: leaking %u pages from PFN %#llx\n", npages, pfn);

	for (; npages; npages--, pfn++) {
		struct fake_rmp_entry *entry = fake_rmp_entry_of(pfn);

		if (!entry)
			continue;

		get_page(pfn_to_page(pfn));
		spin_lock(&fake_rmp_lock);
		*entry = (struct fake_rmp_entry){};
		spin_unlock(&fake_rmp_lock);
	}
}

/* Pages that still belong to somebody, for the farewell in the log. */
static u64 fake_rmp_assigned(void)
{
	u64 pfn, found = 0;

	for (pfn = 0; pfn < fake_rmp_size; pfn++)
		found += fake_rmp[pfn].assigned;
	return found;
}

#endif /* FAKE_RMP_H */
