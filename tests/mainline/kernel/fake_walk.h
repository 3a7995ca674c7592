/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Guest memory as the fake CPU reads and writes it: through the guest's page
 * tables and KVM's nested ones, both walked in software.
 */
#ifndef FAKE_WALK_H
#define FAKE_WALK_H

#include "fake_cpu.h"

#define FAKE_C_MASK		BIT_ULL(FAKE_C_BIT)
#define FAKE_PTE_ADDRESS	GENMASK_ULL(51, 12)
#define FAKE_PTE_RESERVED	GENMASK_ULL(51, FAKE_C_BIT + 1)
#define FAKE_PTE_LARGE		BIT_ULL(7)
#define FAKE_PAE_CR3		GENMASK_ULL(31, 5)

enum fake_walk {
	FAKE_MAPPED,
	/* KVM doesn't map the page: it has to see an NPF. */
	FAKE_NPF,
	/* KVM knows that there is no memory. */
	FAKE_MMIO,
	/* The guest doesn't map it. */
	FAKE_NOT_PRESENT,
};

/* Where a walk ended; `spte` is KVM's entry for it. */
struct fake_spot {
	void *va;
	u64 gpa;
	u64 pfn;
	u64 spte;
	bool private;
	bool write;
	bool present;
};

/* Modes without a C-bit in their page tables have private memory only. */
static bool fake_has_c_bit(const struct sev_es_save_area *vmsa)
{
	if (vmsa->efer & EFER_LMA)
		return true;
	return (vmsa->cr0 & X86_CR0_PG) && (vmsa->cr4 & X86_CR4_PAE);
}

/* KVM looks at these bits for what was used. */
static u64 fake_set_used(u64 *spte, u64 old, bool write)
{
	u64 used = old | PT_ACCESSED_MASK;

	if (write)
		used |= PT_DIRTY_MASK;
	if (used != old)
		cmpxchg64(spte, old, used);
	return used;
}

/* KVM's nested page tables, which have four levels here. */
static enum fake_walk fake_walk_nested(u64 root, struct fake_spot *spot)
{
	u64 table = root;
	int shift;

	spot->present = false;
	for (shift = 39; shift >= PAGE_SHIFT; shift -= 9) {
		u64 *entries = __va(table & FAKE_PTE_ADDRESS);
		u64 *entry = &entries[(spot->gpa >> shift) & 511];
		u64 offset = spot->gpa & (BIT_ULL(shift) - 1);

		table = READ_ONCE(*entry);
		if (!(table & PT_PRESENT_MASK))
			return FAKE_NPF;
		if (table & FAKE_PTE_RESERVED)
			return FAKE_MMIO;
		if (spot->write && !(table & PT_WRITABLE_MASK)) {
			spot->present = true;
			return FAKE_NPF;
		}
		if (shift > PAGE_SHIFT && !((table & FAKE_PTE_LARGE) && shift < 39))
			continue;

		spot->spte = fake_set_used(entry, table, spot->write);
		table = (table & FAKE_PTE_ADDRESS & ~(BIT_ULL(shift) - 1)) + offset;
		break;
	}
	spot->present = true;
	spot->va = __va(table);
	spot->pfn = PHYS_PFN(table);
	return FAKE_MAPPED;
}

/* A paging structure of the guest: always private, and only read. */
static enum fake_walk fake_read_entry(u64 root, u64 gpa, int size, u64 *entry,
				      struct fake_spot *spot)
{
	enum fake_walk ret;
	bool write = spot->write;

	spot->gpa = gpa & ~FAKE_C_MASK;
	spot->private = true;
	spot->write = false;
	ret = fake_walk_nested(root, spot);
	spot->write = write;
	if (ret)
		return ret;
	*entry = size == 8 ? *(u64 *)spot->va : *(u32 *)spot->va;
	return FAKE_MAPPED;
}

/* The guest's page tables: linear address to guest physical address. */
static enum fake_walk fake_walk_guest(u64 root, const struct sev_es_save_area *vmsa,
				      u64 linear, struct fake_spot *spot)
{
	int shift, bits = 9, size = 8;
	u64 table = vmsa->cr3 & FAKE_PTE_ADDRESS;

	if (!(vmsa->efer & EFER_LMA))
		linear = lower_32_bits(linear);
	if (!(vmsa->cr0 & X86_CR0_PG)) {
		spot->gpa = linear;
		spot->private = true;
		return FAKE_MAPPED;
	}

	if (vmsa->efer & EFER_LMA) {
		shift = vmsa->cr4 & X86_CR4_LA57 ? 48 : 39;
	} else if (vmsa->cr4 & X86_CR4_PAE) {
		shift = 30;
		table = vmsa->cr3 & FAKE_PAE_CR3;
	} else {
		shift = 22;
		bits = 10;
		size = 4;
	}

	for (;; shift -= bits) {
		u64 index = (linear >> shift) & (BIT_ULL(bits) - 1);
		enum fake_walk ret;
		u64 entry;

		ret = fake_read_entry(root, table + index * size, size, &entry, spot);
		if (ret)
			return ret;
		if (!(entry & PT_PRESENT_MASK))
			return FAKE_NOT_PRESENT;
		table = entry & FAKE_PTE_ADDRESS;
		if (shift > PAGE_SHIFT && !((entry & FAKE_PTE_LARGE) && shift < 39))
			continue;

		spot->private = !fake_has_c_bit(vmsa) || (entry & FAKE_C_MASK);
		table &= ~FAKE_C_MASK & ~(BIT_ULL(shift) - 1);
		spot->gpa = table | (linear & (BIT_ULL(shift) - 1));
		return FAKE_MAPPED;
	}
}

static enum fake_walk fake_walk(struct vcpu_svm *svm,
				const struct sev_es_save_area *vmsa,
				u64 linear, bool write, struct fake_spot *spot)
{
	u64 root = svm->vmcb->control.nested_cr3;
	enum fake_walk ret;

	spot->write = write;
	ret = fake_walk_guest(root, vmsa, linear, spot);
	return ret ?: fake_walk_nested(root, spot);
}

/* Copy to or from linear addresses: all of it or, where a walk fails, nothing. */
static enum fake_walk fake_copy(struct vcpu_svm *svm,
				const struct sev_es_save_area *vmsa, u64 linear,
				void *buf, unsigned int size, bool write,
				struct fake_spot *spot)
{
	unsigned int done, part;
	int pass;

	for (pass = 0; pass < 2; pass++) {
		for (done = 0; done < size; done += part) {
			enum fake_walk ret;

			part = PAGE_SIZE - offset_in_page(linear + done);
			part = min(part, size - done);
			ret = fake_walk(svm, vmsa, linear + done, write, spot);
			if (ret)
				return ret;
			if (!pass)
				continue;
			if (write)
				memcpy(spot->va, buf + done, part);
			else
				memcpy(buf + done, spot->va, part);
		}
	}
	return FAKE_MAPPED;
}

static enum fake_walk fake_read(struct vcpu_svm *svm,
				const struct sev_es_save_area *vmsa, u64 linear,
				void *buf, unsigned int size, struct fake_spot *spot)
{
	return fake_copy(svm, vmsa, linear, buf, size, false, spot);
}

static enum fake_walk fake_write(struct vcpu_svm *svm,
				 const struct sev_es_save_area *vmsa, u64 linear,
				 void *buf, unsigned int size, struct fake_spot *spot)
{
	return fake_copy(svm, vmsa, linear, buf, size, true, spot);
}

#endif /* FAKE_WALK_H */
