/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * CPUID leaf 0x8000001F: what sev.c reads of it, and what KVM tells user space.
 *
 * KVM_GET_SUPPORTED_CPUID is kvm.ko's, which stays stock and asks the real CPU.
 * A return probe puts in what that one doesn't know: the C-bit and the numbers
 * of ASIDs.  The feature bits are KVM's own, they follow from SEV's set-up.
 */
#ifndef FAKE_CPUID_H
#define FAKE_CPUID_H

#include <linux/kprobes.h>
#include <linux/kvm.h>
#include <linux/uaccess.h>

/*
 * Bit 39 is the highest one that an emulated CPU of 40 physical bits has; the
 * page walk refuses any bit above.
 */
#define FAKE_C_BIT		39

#define FAKE_SEV_LEAF		0x8000001f
#define FAKE_MAX_ASID		509
#define FAKE_MAX_SNP_ASID	99

static void fake_cpuid(unsigned int leaf, unsigned int *eax, unsigned int *ebx,
		       unsigned int *ecx, unsigned int *edx)
{
	if (leaf != FAKE_SEV_LEAF) {
		cpuid(leaf, eax, ebx, ecx, edx);
		return;
	}
	/* SEV, SEV-ES and SEV-SNP; one address bit less. */
	*eax = BIT(1) | BIT(3) | BIT(4);
	*ebx = FAKE_C_BIT | 1 << 6;
	*ecx = FAKE_MAX_ASID;
	*edx = FAKE_MAX_SNP_ASID + 1;
}

/* Arguments of one call of kvm_dev_ioctl_get_cpuid(). */
struct fake_cpuid_call {
	struct kvm_cpuid2 *cpuid;
	struct kvm_cpuid_entry2 __user *entries;
};

static int fake_cpuid_called(struct kretprobe_instance *instance, struct pt_regs *regs)
{
	struct fake_cpuid_call *call = (void *)instance->data;

	call->cpuid = (void *)regs->di;
	call->entries = (void __user *)regs->si;
	return 0;
}

/* The table was written a moment ago, so its pages are there. */
static int fake_cpuid_returns(struct kretprobe_instance *instance, struct pt_regs *regs)
{
	struct fake_cpuid_call *call = (void *)instance->data;
	struct kvm_cpuid_entry2 entry;
	u32 i;

	if (regs_return_value(regs))
		return 0;

	for (i = 0; i < call->cpuid->nent; i++) {
		if (copy_from_user_nofault(&entry, &call->entries[i], sizeof(entry)))
			return 0;
		if (entry.function != FAKE_SEV_LEAF)
			continue;
		/* KVM hides the lost address bit. */
		entry.ebx = FAKE_C_BIT;
		entry.ecx = FAKE_MAX_ASID;
		entry.edx = FAKE_MAX_SNP_ASID + 1;
		if (copy_to_user_nofault(&call->entries[i], &entry, sizeof(entry)))
			pr_warn("fake CPU: can't show the C-bit in CPUID\n");
	}
	return 0;
}

static struct kretprobe fake_cpuid_probe = {
	.kp.symbol_name = "kvm_dev_ioctl_get_cpuid",
	.entry_handler = fake_cpuid_called,
	.handler = fake_cpuid_returns,
	.data_size = sizeof(struct fake_cpuid_call),
	.maxactive = 32,
};

static int fake_cpuid_init(void)
{
	int ret = register_kretprobe(&fake_cpuid_probe);

	if (ret)
		pr_err("fake CPU: no probe for KVM_GET_SUPPORTED_CPUID: %d\n", ret);
	return ret;
}

static void fake_cpuid_exit(void)
{
	unregister_kretprobe(&fake_cpuid_probe);
	/* A probe that was registered once keeps its address. */
	fake_cpuid_probe.kp.addr = NULL;
}

#endif /* FAKE_CPUID_H */
