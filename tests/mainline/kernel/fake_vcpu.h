/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * An SEV-ES or SEV-SNP vCPU on plain SVM: the VMSA is copied to the VMCB and
 * back around VMRUN, and what the CPU would do at an exit is done here.
 *
 * Everything below runs in KVM's innermost part, with GIF clear: nothing may
 * sleep.
 */
#ifndef FAKE_VCPU_H
#define FAKE_VCPU_H

#include "fake_fpu.h"
#include "fake_insn.h"
#include "fake_npt.h"
#include "fake_run.h"

/* What a guest may change and VMRUN doesn't switch. */
struct fake_host {
	u64 xcr0;
	u32 pkru;
	unsigned long dr[4];
};

/* Fields that the VMSA and the VMCB's save area have in common. */
#define fake_copy_save(to, from)				\
do {								\
	(to)->es = (from)->es;					\
	(to)->cs = (from)->cs;					\
	(to)->ss = (from)->ss;					\
	(to)->ds = (from)->ds;					\
	(to)->fs = (from)->fs;					\
	(to)->gs = (from)->gs;					\
	(to)->gdtr = (from)->gdtr;				\
	(to)->ldtr = (from)->ldtr;				\
	(to)->idtr = (from)->idtr;				\
	(to)->tr = (from)->tr;					\
	(to)->cpl = (from)->cpl;				\
	(to)->efer = (from)->efer;				\
	(to)->cr4 = (from)->cr4;				\
	(to)->cr3 = (from)->cr3;				\
	(to)->cr0 = (from)->cr0;				\
	(to)->dr7 = (from)->dr7;				\
	(to)->dr6 = (from)->dr6;				\
	(to)->rflags = (from)->rflags;				\
	(to)->rip = (from)->rip;				\
	(to)->rsp = (from)->rsp;				\
	(to)->rax = (from)->rax;				\
	(to)->star = (from)->star;				\
	(to)->lstar = (from)->lstar;				\
	(to)->cstar = (from)->cstar;				\
	(to)->sfmask = (from)->sfmask;				\
	(to)->kernel_gs_base = (from)->kernel_gs_base;		\
	(to)->sysenter_cs = (from)->sysenter_cs;		\
	(to)->sysenter_esp = (from)->sysenter_esp;		\
	(to)->sysenter_eip = (from)->sysenter_eip;		\
	(to)->cr2 = (from)->cr2;				\
	(to)->g_pat = (from)->g_pat;				\
} while (0)

static void fake_load_vmsa(struct vcpu_svm *svm, const struct sev_es_save_area *vmsa)
{
	unsigned long *regs = svm->vcpu.arch.regs;

	fake_copy_save(&svm->vmcb->save, vmsa);
	regs[VCPU_REGS_RCX] = vmsa->rcx;
	regs[VCPU_REGS_RDX] = vmsa->rdx;
	regs[VCPU_REGS_RBX] = vmsa->rbx;
	regs[VCPU_REGS_RBP] = vmsa->rbp;
	regs[VCPU_REGS_RSI] = vmsa->rsi;
	regs[VCPU_REGS_RDI] = vmsa->rdi;
	regs[VCPU_REGS_R8] = vmsa->r8;
	regs[VCPU_REGS_R9] = vmsa->r9;
	regs[VCPU_REGS_R10] = vmsa->r10;
	regs[VCPU_REGS_R11] = vmsa->r11;
	regs[VCPU_REGS_R12] = vmsa->r12;
	regs[VCPU_REGS_R13] = vmsa->r13;
	regs[VCPU_REGS_R14] = vmsa->r14;
	regs[VCPU_REGS_R15] = vmsa->r15;
}

static void fake_save_vmsa(const struct vcpu_svm *svm, struct sev_es_save_area *vmsa)
{
	const unsigned long *regs = svm->vcpu.arch.regs;

	fake_copy_save(vmsa, &svm->vmcb->save);
	/* A guest that drops SVME would be refused at the next VMRUN. */
	vmsa->efer |= EFER_SVME;
	vmsa->rcx = regs[VCPU_REGS_RCX];
	vmsa->rdx = regs[VCPU_REGS_RDX];
	vmsa->rbx = regs[VCPU_REGS_RBX];
	vmsa->rbp = regs[VCPU_REGS_RBP];
	vmsa->rsi = regs[VCPU_REGS_RSI];
	vmsa->rdi = regs[VCPU_REGS_RDI];
	vmsa->r8 = regs[VCPU_REGS_R8];
	vmsa->r9 = regs[VCPU_REGS_R9];
	vmsa->r10 = regs[VCPU_REGS_R10];
	vmsa->r11 = regs[VCPU_REGS_R11];
	vmsa->r12 = regs[VCPU_REGS_R12];
	vmsa->r13 = regs[VCPU_REGS_R13];
	vmsa->r14 = regs[VCPU_REGS_R14];
	vmsa->r15 = regs[VCPU_REGS_R15];
}

static bool fake_xcr0_valid(u64 xcr0)
{
	if (!(xcr0 & XFEATURE_MASK_FP) || (xcr0 & ~kvm_host.xcr0))
		return false;
	return !(xcr0 & XFEATURE_MASK_YMM) || (xcr0 & XFEATURE_MASK_SSE);
}

static void fake_load_state(const struct sev_es_save_area *vmsa, struct fake_host *host)
{
	if (test_cpu_cap(&boot_cpu_data, X86_FEATURE_XSAVE)) {
		fake_load_fpu(vmsa);
		host->xcr0 = xgetbv(XCR_XFEATURE_ENABLED_MASK);
		xsetbv(XCR_XFEATURE_ENABLED_MASK, vmsa->xcr0);
	}
	if (test_cpu_cap(&boot_cpu_data, X86_FEATURE_OSPKE)) {
		host->pkru = rdpkru();
		wrpkru(vmsa->pkru);
	}
	if (vmsa->sev_features & SVM_SEV_FEAT_DEBUG_SWAP) {
		host->dr[0] = native_get_debugreg(0);
		host->dr[1] = native_get_debugreg(1);
		host->dr[2] = native_get_debugreg(2);
		host->dr[3] = native_get_debugreg(3);
		native_set_debugreg(0, vmsa->dr0);
		native_set_debugreg(1, vmsa->dr1);
		native_set_debugreg(2, vmsa->dr2);
		native_set_debugreg(3, vmsa->dr3);
	}
}

static void fake_save_state(struct sev_es_save_area *vmsa, const struct fake_host *host)
{
	if (test_cpu_cap(&boot_cpu_data, X86_FEATURE_XSAVE)) {
		vmsa->xcr0 = xgetbv(XCR_XFEATURE_ENABLED_MASK);
		xsetbv(XCR_XFEATURE_ENABLED_MASK, host->xcr0);
		fake_save_fpu(vmsa);
	}
	if (test_cpu_cap(&boot_cpu_data, X86_FEATURE_OSPKE)) {
		vmsa->pkru = rdpkru();
		wrpkru(host->pkru);
	}
	if (vmsa->sev_features & SVM_SEV_FEAT_DEBUG_SWAP) {
		vmsa->dr0 = native_get_debugreg(0);
		vmsa->dr1 = native_get_debugreg(1);
		vmsa->dr2 = native_get_debugreg(2);
		vmsa->dr3 = native_get_debugreg(3);
		native_set_debugreg(0, host->dr[0]);
		native_set_debugreg(1, host->dr[1]);
		native_set_debugreg(2, host->dr[2]);
		native_set_debugreg(3, host->dr[3]);
	}
}

/* The VMSA page, or NULL if VMRUN would refuse it. */
static struct sev_es_save_area *fake_find_vmsa(struct vcpu_svm *svm)
{
	u64 address = svm->vmcb->control.vmsa_pa;
	struct kvm *kvm = svm->vcpu.kvm;
	struct sev_es_save_area *vmsa;
	struct fake_rmp_entry *entry;

	entry = fake_rmp_entry_of(PHYS_PFN(address));
	if (!entry || !PAGE_ALIGNED(address))
		return NULL;
	if (sev_snp_guest(kvm) &&
	    (!entry->assigned || !entry->vmsa || entry->asid != sev_get_asid(kvm)))
		return NULL;

	vmsa = __va(address);
	if (!(vmsa->efer & EFER_SVME) || !fake_xcr0_valid(vmsa->xcr0))
		return NULL;
	return vmsa;
}

/* One VMRUN, with intercepts for what the CPU doesn't know. */
static void fake_vmrun(struct vcpu_svm *svm, const struct sev_es_save_area *vmsa,
		       bool spec_ctrl_intercepted)
{
	struct vmcb_control_area *control = &svm->vmcb->control;
	u64 nested_cr3 = control->nested_cr3;

	control->nested_cr3 = fake_npt_root(svm, vmsa);
	control->clean = 0;
	/* QEMU doesn't know the flush of one ASID. */
	control->tlb_ctl = TLB_CONTROL_FLUSH_ALL_ASID;
	vmcb_set_intercept(control, INTERCEPT_EXCEPTION_OFFSET + UD_VECTOR);
	/* Reads and writes of MSR_AMD64_SEV_ES_GHCB and MSR_AMD64_SEV. */
	svm->msrpm[svm_msrpm_offset(MSR_AMD64_SEV_ES_GHCB)] |= 0xf;

	__svm_vcpu_run(svm, spec_ctrl_intercepted);

	vmcb_clr_intercept(control, INTERCEPT_EXCEPTION_OFFSET + UD_VECTOR);
	control->nested_cr3 = nested_cr3;
	control->tlb_ctl = TLB_CONTROL_DO_NOTHING;
	control->event_inj = 0;
}

/*
 * The page isn't in the tables that QEMU walks: put it there, or find out who
 * has to hear of it.
 */
static bool fake_handle_npf(struct vcpu_svm *svm, struct sev_es_save_area *vmsa)
{
	struct vmcb_control_area *control = &svm->vmcb->control;
	u64 info = control->exit_info_1;
	u64 gpa = control->exit_info_2;
	struct fake_spot spot = {
		.gpa = gpa & ~FAKE_C_MASK,
		.private = gpa & FAKE_C_MASK,
		.write = info & PFERR_WRITE_MASK,
	};

	/* Code and page tables are private whatever the C-bit says. */
	if (info & (PFERR_GUEST_PAGE_MASK | PFERR_FETCH_MASK))
		spot.private = true;
	if (!fake_has_c_bit(vmsa))
		spot.private = true;

	info &= ~PFERR_PRESENT_MASK;
	if (spot.private)
		info |= PFERR_GUEST_ENC_MASK;

	switch (fake_npt_fill(svm, gpa & PAGE_MASK, &spot)) {
	case FAKE_FILLED:
		return false;
	case FAKE_IS_MMIO:
		return fake_inject_vc(svm, vmsa, SVM_EXIT_NPF);
	case FAKE_NOT_VALIDATED:
		return fake_inject_vc(svm, vmsa, FAKE_PAGE_NOT_VALIDATED);
	case FAKE_RMP_FAULT:
		info |= PFERR_GUEST_RMP_MASK;
		break;
	case FAKE_NOT_MAPPED:
		break;
	}
	if (spot.present)
		info |= PFERR_PRESENT_MASK;
	return fake_exit(svm, SVM_EXIT_NPF, info, spot.gpa);
}

/*
 * Automatic exits go to KVM, the others to the guest as #VC (AMD APM volume 2,
 * table of exit codes for SEV-ES); whether it is one for KVM.
 */
static bool fake_handle_exit(struct vcpu_svm *svm, struct sev_es_save_area *vmsa)
{
	u32 code = svm->vmcb->control.exit_code;

	switch (code) {
	case SVM_EXIT_EXCP_BASE + MC_VECTOR:
	case SVM_EXIT_INTR:
	case SVM_EXIT_NMI:
	case SVM_EXIT_SMI:
	case SVM_EXIT_INIT:
	case SVM_EXIT_VINTR:
	case SVM_EXIT_SHUTDOWN:
	case (u32)SVM_EXIT_ERR:
		return true;
	/* KVM can't move the instruction pointer: these two exit behind it. */
	case SVM_EXIT_PAUSE:
		vmsa->rip += 2;
		return true;
	case SVM_EXIT_HLT:
		vmsa->rip += 1;
		return true;
	case SVM_EXIT_NPF:
		return fake_handle_npf(svm, vmsa);
	case SVM_EXIT_MSR:
		return fake_do_msr(svm, vmsa);
	case SVM_EXIT_VMMCALL:
		return fake_do_vmmcall(svm, vmsa);
	case SVM_EXIT_EXCP_BASE + UD_VECTOR:
		return fake_do_ud(svm, vmsa);
	/* Nested virtualisation isn't offered. */
	case SVM_EXIT_VMRUN:
	case SVM_EXIT_VMLOAD:
	case SVM_EXIT_VMSAVE:
	case SVM_EXIT_STGI:
	case SVM_EXIT_CLGI:
	case SVM_EXIT_SKINIT:
	case SVM_EXIT_INVLPGA:
	case SVM_EXIT_RSM:
		return fake_inject(svm, UD_VECTOR, false, 0);
	}
	return fake_inject_vc(svm, vmsa, code);
}

/*
 * An interrupt whose delivery was cut short by an exit that KVM doesn't see is
 * injected again; anything else comes again by itself.
 */
static void fake_requeue(struct vmcb_control_area *control)
{
	u32 type = control->exit_int_info & SVM_EXITINTINFO_TYPE_MASK;

	if (!(control->exit_int_info & SVM_EXITINTINFO_VALID) || control->event_inj)
		return;
	if (type == SVM_EXITINTINFO_TYPE_INTR || type == SVM_EXITINTINFO_TYPE_NMI) {
		control->event_inj = control->exit_int_info;
		control->event_inj_err = control->exit_int_info_err;
	}
}

void fake_vcpu_run(struct vcpu_svm *svm, bool spec_ctrl_intercepted,
		   struct sev_es_save_area *hostsa)
{
	struct vmcb_control_area *control = &svm->vmcb->control;
	struct sev_es_save_area *vmsa = fake_find_vmsa(svm);
	struct fake_host host;

	if (!vmsa) {
		fake_exit(svm, SVM_EXIT_ERR, 0, 0);
		control->exit_code_hi = U32_MAX;
		return;
	}

	fake_load_state(vmsa, &host);
	for (;;) {
		fake_load_vmsa(svm, vmsa);
		fake_vmrun(svm, vmsa, spec_ctrl_intercepted);
		fake_save_vmsa(svm, vmsa);
		if (fake_handle_exit(svm, vmsa))
			break;
		fake_requeue(control);
	}
	fake_save_state(vmsa, &host);

	/* KVM can't see RFLAGS.IF otherwise. */
	if (vmsa->rflags & X86_EFLAGS_IF)
		control->int_state |= SVM_GUEST_INTERRUPT_MASK;
	else
		control->int_state &= ~SVM_GUEST_INTERRUPT_MASK;
}

#endif /* FAKE_VCPU_H */
