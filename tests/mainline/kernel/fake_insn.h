/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Instructions that only a CPU with SEV-SNP has: VMGEXIT, which arrives as
 * VMMCALL with a prefix, PVALIDATE and RMPADJUST, which arrive as #UD, and the
 * two MSRs (AMD APM volumes 2 and 3).
 */
#ifndef FAKE_INSN_H
#define FAKE_INSN_H

#include "fake_event.h"

#define FAKE_INSN_SIZE		4

/* Results in EAX. */
#define FAKE_FAIL_INPUT		1
#define FAKE_FAIL_PERMISSION	2
#define FAKE_FAIL_SIZEMISMATCH	6

#define FAKE_RESULT_FLAGS	(X86_EFLAGS_CF | X86_EFLAGS_PF | X86_EFLAGS_AF | \
				 X86_EFLAGS_ZF | X86_EFLAGS_SF | X86_EFLAGS_OF)

#define FAKE_VMPLS		4

static const u8 fake_vmgexit[] = { 0xf3, 0x0f, 0x01, 0xd9 };
static const u8 fake_vmgexit_f2[] = { 0xf2, 0x0f, 0x01, 0xd9 };
static const u8 fake_pvalidate[] = { 0xf2, 0x0f, 0x01, 0xff };
static const u8 fake_rmpadjust[] = { 0xf3, 0x0f, 0x01, 0xfe };

static bool fake_is(const u8 *insn, const u8 *opcode)
{
	return !memcmp(insn, opcode, FAKE_INSN_SIZE);
}

static enum fake_walk fake_fetch(struct vcpu_svm *svm,
				 const struct sev_es_save_area *vmsa, u8 *insn,
				 struct fake_spot *spot)
{
	u64 base = fake_in_64bit_mode(vmsa) ? 0 : vmsa->cs.base;

	return fake_read(svm, vmsa, base + vmsa->rip, insn, FAKE_INSN_SIZE, spot);
}

static bool fake_finish(struct sev_es_save_area *vmsa, u32 result, bool carry)
{
	vmsa->rflags &= ~FAKE_RESULT_FLAGS;
	if (carry)
		vmsa->rflags |= X86_EFLAGS_CF;
	if (!result)
		vmsa->rflags |= X86_EFLAGS_ZF;
	if (!(hweight8(result) & 1))
		vmsa->rflags |= X86_EFLAGS_PF;
	vmsa->rax = result;
	vmsa->rip += FAKE_INSN_SIZE;
	return false;
}

/*
 * The RMP entry behind the address in RAX.  Where there is none that the
 * instruction may touch, *leave says whether to go to KVM.
 */
static struct fake_rmp_entry *fake_insn_entry(struct vcpu_svm *svm,
					      struct sev_es_save_area *vmsa,
					      struct fake_spot *spot, bool *leave)
{
	bool large = lower_32_bits(vmsa->rcx) == RMP_PG_SIZE_2M;
	u32 asid = sev_get_asid(svm->vcpu.kvm);
	struct fake_rmp_entry *entry;
	enum fake_walk ret;

	ret = fake_walk(svm, vmsa, vmsa->rax, false, spot);
	/* Whatever the C-bit says, these are about private pages. */
	spot->private = true;
	if (ret == FAKE_NPF) {
		*leave = fake_exit_npf(svm, spot, 0);
		return NULL;
	}
	if (ret) {
		vmsa->cr2 = vmsa->rax;
		*leave = fake_inject(svm, PF_VECTOR, true, 0);
		return NULL;
	}

	spot->present = true;
	entry = fake_rmp_entry_of(spot->pfn);
	if (!entry || !entry->assigned || entry->immutable || entry->asid != asid ||
	    entry->gpa != (spot->gpa & PAGE_MASK)) {
		*leave = fake_exit_npf(svm, spot, PFERR_GUEST_RMP_MASK);
		return NULL;
	}
	if (!large && entry->level == PG_LEVEL_2M) {
		*leave = fake_exit_npf(svm, spot,
				       PFERR_GUEST_RMP_MASK | PFERR_GUEST_SIZEM_MASK);
		return NULL;
	}
	return entry;
}

/* What both instructions refuse: a bad size, or 2 MiB out of line. */
static bool fake_insn_bad_input(const struct sev_es_save_area *vmsa)
{
	u32 size = vmsa->rcx;

	if (size > RMP_PG_SIZE_2M)
		return true;
	return size == RMP_PG_SIZE_2M && !IS_ALIGNED(vmsa->rax, PMD_SIZE);
}

static bool fake_do_pvalidate(struct vcpu_svm *svm, struct sev_es_save_area *vmsa)
{
	bool large = lower_32_bits(vmsa->rcx) == RMP_PG_SIZE_2M;
	bool validate = vmsa->rdx & 1;
	struct fake_rmp_entry *entry;
	struct fake_spot spot;
	bool leave, same;
	u64 i;

	if (fake_insn_bad_input(vmsa))
		return fake_finish(vmsa, FAKE_FAIL_INPUT, false);
	entry = fake_insn_entry(svm, vmsa, &spot, &leave);
	if (!entry)
		return leave;
	if (large && entry->level == PG_LEVEL_4K)
		return fake_finish(vmsa, FAKE_FAIL_SIZEMISMATCH, false);

	spin_lock(&fake_rmp_lock);
	same = entry->validated == validate;
	for (i = 0; i < fake_rmp_pages(entry->level); i++)
		entry[i].validated = validate;
	fake_rmp_generation++;
	spin_unlock(&fake_rmp_lock);
	return fake_finish(vmsa, 0, same);
}

/* Permissions aren't kept: all vCPUs run at VMPL0.  The VMSA bit is. */
static bool fake_do_rmpadjust(struct vcpu_svm *svm, struct sev_es_save_area *vmsa)
{
	bool large = lower_32_bits(vmsa->rcx) == RMP_PG_SIZE_2M;
	u8 target = vmsa->rdx;
	struct fake_rmp_entry *entry;
	struct fake_spot spot;
	bool leave;

	if (fake_insn_bad_input(vmsa) || target >= FAKE_VMPLS)
		return fake_finish(vmsa, FAKE_FAIL_INPUT, false);
	if (target <= vmsa->vmpl)
		return fake_finish(vmsa, FAKE_FAIL_PERMISSION, false);
	entry = fake_insn_entry(svm, vmsa, &spot, &leave);
	if (!entry)
		return leave;
	if (large && entry->level == PG_LEVEL_4K)
		return fake_finish(vmsa, FAKE_FAIL_SIZEMISMATCH, false);

	spin_lock(&fake_rmp_lock);
	entry->vmsa = !!(vmsa->rdx & RMPADJUST_VMSA_PAGE_BIT);
	spin_unlock(&fake_rmp_lock);
	return fake_finish(vmsa, 0, false);
}

static bool fake_do_ud(struct vcpu_svm *svm, struct sev_es_save_area *vmsa)
{
	u8 insn[FAKE_INSN_SIZE] = {};
	struct fake_spot spot;
	enum fake_walk ret;

	ret = fake_fetch(svm, vmsa, insn, &spot);
	if (ret == FAKE_NPF)
		return fake_exit_npf(svm, &spot, 0);
	if (ret || !sev_snp_guest(svm->vcpu.kvm))
		return fake_inject(svm, UD_VECTOR, false, 0);

	if (!fake_is(insn, fake_pvalidate) && !fake_is(insn, fake_rmpadjust))
		return fake_inject(svm, UD_VECTOR, false, 0);
	if (vmsa->cpl)
		return fake_inject(svm, GP_VECTOR, true, 0);
	if (fake_is(insn, fake_pvalidate))
		return fake_do_pvalidate(svm, vmsa);
	return fake_do_rmpadjust(svm, vmsa);
}

static bool fake_do_vmmcall(struct vcpu_svm *svm, struct sev_es_save_area *vmsa)
{
	u8 insn[FAKE_INSN_SIZE] = {};
	struct fake_spot spot;
	enum fake_walk ret;

	ret = fake_fetch(svm, vmsa, insn, &spot);
	if (ret == FAKE_NPF)
		return fake_exit_npf(svm, &spot, 0);
	if (!ret && (fake_is(insn, fake_vmgexit) || fake_is(insn, fake_vmgexit_f2))) {
		vmsa->rip += FAKE_INSN_SIZE;
		return fake_exit(svm, SVM_EXIT_VMGEXIT, 0, 0);
	}
	return fake_inject_vc(svm, vmsa, SVM_EXIT_VMMCALL);
}

static bool fake_read_msr(struct sev_es_save_area *vmsa, u64 value)
{
	vmsa->rax = lower_32_bits(value);
	vmsa->rdx = upper_32_bits(value);
	vmsa->rip += 2;
	return false;
}

static bool fake_do_msr(struct vcpu_svm *svm, struct sev_es_save_area *vmsa)
{
	struct vmcb_control_area *control = &svm->vmcb->control;
	bool write = control->exit_info_1 & 1;

	switch (lower_32_bits(vmsa->rcx)) {
	case MSR_AMD64_SEV_ES_GHCB:
		if (!write)
			return fake_read_msr(vmsa, control->ghcb_gpa);
		control->ghcb_gpa = lower_32_bits(vmsa->rax) | vmsa->rdx << 32;
		vmsa->rip += 2;
		return false;
	case MSR_AMD64_SEV:
		if (write)
			return fake_inject(svm, GP_VECTOR, true, 0);
		return fake_read_msr(vmsa, MSR_AMD64_SEV_ENABLED |
				     MSR_AMD64_SEV_ES_ENABLED |
				     vmsa->sev_features << 2);
	}
	return fake_inject_vc(svm, vmsa, SVM_EXIT_MSR);
}

#endif /* FAKE_INSN_H */
