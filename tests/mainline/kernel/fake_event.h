/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Exits that the fake makes up, and #VC, which goes through the guest's IDT by
 * hand: QEMU's event injection knows no error code for vector 29.
 *
 * Functions here say whether the vCPU leaves to KVM (true) or goes on.
 */
#ifndef FAKE_EVENT_H
#define FAKE_EVENT_H

#include "fake_walk.h"

#define FAKE_VC_VECTOR		29

#define FAKE_GATE_PRESENT	BIT_ULL(47)
#define FAKE_GATE_INTERRUPT	0xe
#define FAKE_GATE_TRAP		0xf

#define FAKE_TSS32_ESP0		4
#define FAKE_TSS64_RSP0		4
#define FAKE_TSS64_IST1		36

#define FAKE_MAX_FRAME		6

/* What the CPU takes from an IDT gate. */
struct fake_gate {
	u64 offset;
	u16 selector;
	u8 type;
	u8 ist;
};

/* The state of a delivery until it can't fail any more. */
struct fake_delivery {
	struct fake_gate gate;
	struct vmcb_seg cs;
	struct vmcb_seg ss;
	u8 cpl;
	u64 sp;
};

static bool fake_exit(struct vcpu_svm *svm, u32 code, u64 info_1, u64 info_2)
{
	struct vmcb_control_area *control = &svm->vmcb->control;

	control->exit_code = code;
	control->exit_code_hi = 0;
	control->exit_info_1 = info_1;
	control->exit_info_2 = info_2;
	return true;
}

static bool fake_exit_npf(struct vcpu_svm *svm, const struct fake_spot *spot, u64 flags)
{
	flags |= PFERR_USER_MASK | PFERR_GUEST_FINAL_MASK;
	if (spot->private)
		flags |= PFERR_GUEST_ENC_MASK;
	if (spot->write)
		flags |= PFERR_WRITE_MASK;
	if (spot->present)
		flags |= PFERR_PRESENT_MASK;
	return fake_exit(svm, SVM_EXIT_NPF, flags, spot->gpa);
}

/* A fault while an exception is delivered ends in a triple fault here. */
static bool fake_exit_failed(struct vcpu_svm *svm, enum fake_walk ret,
			     const struct fake_spot *spot)
{
	if (ret == FAKE_NPF)
		return fake_exit_npf(svm, spot, 0);
	return fake_exit(svm, SVM_EXIT_SHUTDOWN, 0, 0);
}

/* An exception that QEMU can deliver, at the next VMRUN. */
static bool fake_inject(struct vcpu_svm *svm, u8 vector, bool has_error, u32 error)
{
	struct vmcb_control_area *control = &svm->vmcb->control;

	control->event_inj = vector | SVM_EVTINJ_TYPE_EXEPT | SVM_EVTINJ_VALID;
	if (has_error)
		control->event_inj |= SVM_EVTINJ_VALID_ERR;
	control->event_inj_err = error;
	return false;
}

static bool fake_in_64bit_mode(const struct sev_es_save_area *vmsa)
{
	return (vmsa->efer & EFER_LMA) && (vmsa->cs.attrib & SVM_SELECTOR_L_MASK);
}

static enum fake_walk fake_read_gate(struct vcpu_svm *svm,
				     struct sev_es_save_area *vmsa,
				     struct fake_gate *gate, struct fake_spot *spot)
{
	bool wide = vmsa->efer & EFER_LMA;
	unsigned int size = wide ? 16 : 8;
	u64 raw[2] = {};
	enum fake_walk ret;

	if (!(vmsa->cr0 & X86_CR0_PE) ||
	    vmsa->idtr.limit < (FAKE_VC_VECTOR + 1) * size - 1)
		return FAKE_NOT_PRESENT;
	ret = fake_read(svm, vmsa, vmsa->idtr.base + FAKE_VC_VECTOR * size, raw, size, spot);
	if (ret)
		return ret;

	gate->offset = (raw[0] & 0xffff) | (raw[0] >> 48) << 16 | raw[1] << 32;
	gate->selector = raw[0] >> 16;
	gate->type = (raw[0] >> 40) & 0xf;
	gate->ist = wide ? (raw[0] >> 32) & 7 : 0;
	if (!(raw[0] & FAKE_GATE_PRESENT))
		return FAKE_NOT_PRESENT;
	if (gate->type != FAKE_GATE_INTERRUPT && gate->type != FAKE_GATE_TRAP)
		return FAKE_NOT_PRESENT;
	return FAKE_MAPPED;
}

/* Load a segment from the GDT; selectors of an LDT aren't known here. */
static enum fake_walk fake_read_segment(struct vcpu_svm *svm,
					struct sev_es_save_area *vmsa, u16 selector,
					struct vmcb_seg *seg, struct fake_spot *spot)
{
	enum fake_walk ret;
	u64 raw;

	if (selector < 4 || (selector & 4) || (selector | 7) > vmsa->gdtr.limit)
		return FAKE_NOT_PRESENT;
	ret = fake_read(svm, vmsa, vmsa->gdtr.base + (selector & ~7), &raw, sizeof(raw), spot);
	if (ret)
		return ret;

	seg->selector = selector;
	/* The accessed bit is set here, not in the table. */
	seg->attrib = ((raw >> 40) & 0xff) | ((raw >> 52) & 0xf) << 8 | 1;
	seg->limit = (raw & 0xffff) | ((raw >> 32) & 0xf0000);
	if (seg->attrib & SVM_SELECTOR_G_MASK)
		seg->limit = seg->limit << 12 | 0xfff;
	seg->base = ((raw >> 16) & 0xffffff) | (raw >> 56) << 24;
	return seg->attrib & SVM_SELECTOR_P_MASK ? FAKE_MAPPED : FAKE_NOT_PRESENT;
}

static u8 fake_dpl(const struct vmcb_seg *seg)
{
	return (seg->attrib & SVM_SELECTOR_DPL_MASK) >> SVM_SELECTOR_DPL_SHIFT;
}

/* The stack of a handler: the interrupted one, or one out of the TSS. */
static enum fake_walk fake_find_stack(struct vcpu_svm *svm,
				      struct sev_es_save_area *vmsa,
				      struct fake_delivery *to, struct fake_spot *spot)
{
	u64 base = vmsa->tr.base;
	enum fake_walk ret;
	u32 stack[2];

	to->sp = vmsa->rsp;
	to->ss = vmsa->ss;
	if (vmsa->efer & EFER_LMA) {
		if (to->cpl < vmsa->cpl)
			to->ss = (struct vmcb_seg){
				.selector = to->cpl,
				.attrib = to->cpl << SVM_SELECTOR_DPL_SHIFT,
			};
		if (to->gate.ist)
			return fake_read(svm, vmsa,
					 base + FAKE_TSS64_IST1 + (to->gate.ist - 1) * 8,
					 &to->sp, sizeof(to->sp), spot);
		if (to->cpl < vmsa->cpl)
			return fake_read(svm, vmsa, base + FAKE_TSS64_RSP0 + to->cpl * 8,
					 &to->sp, sizeof(to->sp), spot);
		return FAKE_MAPPED;
	}

	if (to->cpl == vmsa->cpl)
		return FAKE_MAPPED;
	ret = fake_read(svm, vmsa, base + FAKE_TSS32_ESP0 + to->cpl * 8,
			stack, sizeof(stack), spot);
	if (ret)
		return ret;
	to->sp = stack[0];
	return fake_read_segment(svm, vmsa, stack[1], &to->ss, spot);
}

/* Push the frame; the arrays are in the order of addresses. */
static enum fake_walk fake_push_frame(struct vcpu_svm *svm,
				      struct sev_es_save_area *vmsa,
				      struct fake_delivery *to, u32 error,
				      struct fake_spot *spot)
{
	u64 frame[FAKE_MAX_FRAME] = {
		error, vmsa->rip, vmsa->cs.selector, vmsa->rflags,
		vmsa->rsp, vmsa->ss.selector,
	};
	int i, words = FAKE_MAX_FRAME;
	u32 short_frame[FAKE_MAX_FRAME];

	if (vmsa->efer & EFER_LMA) {
		to->sp = ALIGN_DOWN(to->sp, 16) - sizeof(frame);
		return fake_write(svm, vmsa, to->sp, frame, sizeof(frame), spot);
	}

	if (to->cpl == vmsa->cpl)
		words -= 2;
	for (i = 0; i < words; i++)
		short_frame[i] = frame[i];
	to->sp = lower_32_bits(to->sp - words * sizeof(u32));
	return fake_write(svm, vmsa, lower_32_bits(to->ss.base + to->sp), short_frame,
			  words * sizeof(u32), spot);
}

static enum fake_walk fake_prepare_vc(struct vcpu_svm *svm,
				      struct sev_es_save_area *vmsa, u32 error,
				      struct fake_delivery *to, struct fake_spot *spot)
{
	enum fake_walk ret;

	ret = fake_read_gate(svm, vmsa, &to->gate, spot);
	if (ret)
		return ret;
	ret = fake_read_segment(svm, vmsa, to->gate.selector, &to->cs, spot);
	if (ret)
		return ret;
	/* Conforming segments aren't known here. */
	to->cpl = fake_dpl(&to->cs);
	if (to->cpl > vmsa->cpl)
		return FAKE_NOT_PRESENT;
	ret = fake_find_stack(svm, vmsa, to, spot);
	if (ret)
		return ret;
	return fake_push_frame(svm, vmsa, to, error, spot);
}

/*
 * #VC with the exit code as its error code, and the exit's information in the
 * VMSA.  The instruction starts again if the guest's IDT, GDT, TSS or stack
 * has to be faulted in first.
 */
static bool fake_inject_vc(struct vcpu_svm *svm, struct sev_es_save_area *vmsa, u32 error)
{
	struct vmcb_control_area *control = &svm->vmcb->control;
	struct fake_delivery to;
	struct fake_spot spot;
	enum fake_walk ret;

	ret = fake_prepare_vc(svm, vmsa, error, &to, &spot);
	if (ret)
		return fake_exit_failed(svm, ret, &spot);

	vmsa->guest_exit_code = error;
	vmsa->guest_exit_info_1 = control->exit_info_1;
	vmsa->guest_exit_info_2 = control->exit_info_2;

	to.cs.selector = (to.cs.selector & ~3) | to.cpl;
	vmsa->cs = to.cs;
	vmsa->ss = to.ss;
	vmsa->cpl = to.cpl;
	vmsa->rsp = to.sp;
	vmsa->rip = to.gate.offset;
	vmsa->rflags &= ~(X86_EFLAGS_TF | X86_EFLAGS_NT | X86_EFLAGS_RF | X86_EFLAGS_VM);
	if (to.gate.type == FAKE_GATE_INTERRUPT)
		vmsa->rflags &= ~X86_EFLAGS_IF;
	control->int_state &= ~SVM_INTERRUPT_SHADOW_MASK;
	return false;
}

#endif /* FAKE_EVENT_H */
