/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The nested page tables that QEMU walks: a copy of parts of KVM's, with a
 * private and a shared half, in which a page stands only after its RMP entry
 * was looked at.
 *
 * They are kept as a TLB would keep them: for each CPU, filled by faults, and
 * thrown away where KVM asks for a flush, another vCPU comes, or the RMP
 * changed.
 */
#ifndef FAKE_NPT_H
#define FAKE_NPT_H

#include "fake_event.h"

#define FAKE_NPT_PAGES			64
#define FAKE_NPT_LEVELS			4

/* Error code of #VC for private memory that the guest hasn't validated. */
#define FAKE_PAGE_NOT_VALIDATED		0x404

struct fake_npt {
	const struct vcpu_svm *owner;
	u64 nested_cr3;
	u64 asid_generation;
	u64 rmp_generation;
	u64 has_c_bit;
	/* The first page is the root. */
	unsigned int used;
	u64 *pages[FAKE_NPT_PAGES];
};

enum fake_fill {
	FAKE_FILLED,
	/* KVM doesn't map it, or not for this access. */
	FAKE_NOT_MAPPED,
	FAKE_IS_MMIO,
	FAKE_NOT_VALIDATED,
	/* Private where the host has it shared, or the other way round. */
	FAKE_RMP_FAULT,
};

static DEFINE_PER_CPU(struct fake_npt, fake_npt);

static void fake_npt_exit(void)
{
	int cpu, i;

	for_each_possible_cpu(cpu) {
		struct fake_npt *npt = per_cpu_ptr(&fake_npt, cpu);

		for (i = 0; i < FAKE_NPT_PAGES; i++)
			free_page((unsigned long)npt->pages[i]);
		*npt = (struct fake_npt){};
	}
}

static int fake_npt_init(void)
{
	int cpu, i;

	for_each_possible_cpu(cpu) {
		struct fake_npt *npt = per_cpu_ptr(&fake_npt, cpu);

		for (i = 0; i < FAKE_NPT_PAGES; i++) {
			npt->pages[i] = (u64 *)get_zeroed_page(GFP_KERNEL);
			if (!npt->pages[i])
				goto free;
		}
	}
	return 0;
free:
	fake_npt_exit();
	return -ENOMEM;
}

static void fake_npt_flush(struct fake_npt *npt)
{
	clear_page(npt->pages[0]);
	npt->used = 1;
}

/* The root for the next VMRUN, without what mustn't be used any more. */
static u64 fake_npt_root(const struct vcpu_svm *svm, const struct sev_es_save_area *vmsa)
{
	const struct vmcb_control_area *control = &svm->vmcb->control;
	struct fake_npt *npt = this_cpu_ptr(&fake_npt);
	struct fake_npt now = {
		.owner = svm,
		.nested_cr3 = control->nested_cr3,
		/* How KVM flushes on a CPU that can't flush by ASID. */
		.asid_generation = svm->current_vmcb->asid_generation,
		.rmp_generation = READ_ONCE(fake_rmp_generation),
		.has_c_bit = fake_has_c_bit(vmsa),
	};

	if (control->tlb_ctl != TLB_CONTROL_DO_NOTHING || !npt->used ||
	    memcmp(npt, &now, offsetof(struct fake_npt, used))) {
		memcpy(npt, &now, offsetof(struct fake_npt, used));
		fake_npt_flush(npt);
	}
	return __pa(npt->pages[0]);
}

/* The entry for a 4 KiB page; all tables are dropped where there are too many. */
static u64 *fake_npt_entry(struct fake_npt *npt, u64 gpa)
{
	u64 *table = npt->pages[0];
	int shift;

	if (npt->used + FAKE_NPT_LEVELS > FAKE_NPT_PAGES)
		fake_npt_flush(npt);

	for (shift = 39; shift > PAGE_SHIFT; shift -= 9) {
		u64 *entry = &table[(gpa >> shift) & 511];

		if (!*entry) {
			table = npt->pages[npt->used++];
			clear_page(table);
			*entry = __pa(table) | PT_PRESENT_MASK | PT_WRITABLE_MASK | PT_USER_MASK;
		}
		table = __va(*entry & FAKE_PTE_ADDRESS);
	}
	return &table[(gpa >> PAGE_SHIFT) & 511];
}

/* What hardware would check of the RMP; SEV-ES guests have none. */
static enum fake_fill fake_npt_check(struct vcpu_svm *svm, const struct fake_spot *spot)
{
	const struct fake_rmp_entry *entry = fake_rmp_entry_of(spot->pfn);
	struct kvm *kvm = svm->vcpu.kvm;

	if (!sev_snp_guest(kvm))
		return FAKE_FILLED;
	if (!spot->private)
		return entry && entry->assigned ? FAKE_RMP_FAULT : FAKE_FILLED;
	if (!entry || !entry->assigned || entry->immutable ||
	    entry->asid != sev_get_asid(kvm) || entry->gpa != (spot->gpa & PAGE_MASK))
		return FAKE_RMP_FAULT;
	return entry->validated ? FAKE_FILLED : FAKE_NOT_VALIDATED;
}

/* Put in the page at `gpa`, which has its C-bit; `spot` says what is accessed. */
static enum fake_fill fake_npt_fill(struct vcpu_svm *svm, u64 gpa, struct fake_spot *spot)
{
	enum fake_walk walk = fake_walk_nested(svm->vmcb->control.nested_cr3, spot);
	enum fake_fill ret;
	u64 entry;

	if (walk == FAKE_MMIO)
		return FAKE_IS_MMIO;
	if (walk)
		return FAKE_NOT_MAPPED;
	ret = fake_npt_check(svm, spot);
	if (ret)
		return ret;

	entry = PFN_PHYS(spot->pfn) | PT_PRESENT_MASK | PT_USER_MASK;
	entry |= spot->spte & PT64_NX_MASK;
	/* A clean page faults again when it is written. */
	if ((spot->spte & PT_WRITABLE_MASK) && (spot->spte & PT_DIRTY_MASK))
		entry |= PT_WRITABLE_MASK;
	*fake_npt_entry(this_cpu_ptr(&fake_npt), gpa) = entry;
	return FAKE_FILLED;
}

#endif /* FAKE_NPT_H */
