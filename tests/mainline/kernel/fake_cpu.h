/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Included by sev.c behind its own includes: from here on what it calls is
 * fake.  A CPU with SEV-SNP, its RMP, and the driver of its secure processor.
 */
#ifndef FAKE_CPU_H
#define FAKE_CPU_H

#include "fake_cpuid.h"
#include "fake_dev.h"

static __always_inline bool fake_has(int bit)
{
	switch (bit) {
	case X86_FEATURE_SEV:
	case X86_FEATURE_SEV_ES:
	case X86_FEATURE_SEV_SNP:
	case X86_FEATURE_DECODEASSISTS:
	case X86_FEATURE_FLUSHBYASID:
	case X86_FEATURE_LBRV:
	case X86_FEATURE_SME_COHERENT:
	case X86_FEATURE_DEBUG_SWAP:
	case X86_FEATURE_NO_NESTED_DATA_BP:
		return true;
	}
	return test_cpu_cap(&boot_cpu_data, bit);
}

static __always_inline bool fake_cc_platform_has(enum cc_attr attr)
{
	return attr == CC_ATTR_HOST_SEV_SNP || cc_platform_has(attr);
}

/* Features of the CPU. */
#define cpuid			fake_cpuid
#undef boot_cpu_has
#define boot_cpu_has		fake_has
#undef cpu_feature_enabled
#define cpu_feature_enabled	fake_has
#define cc_platform_has		fake_cc_platform_has
/* Module parameters of svm.c that came out as 0 on this CPU. */
#define nrips			1
#define lbrv			1

/* RMP */
#define snp_lookup_rmpentry	fake_snp_lookup_rmpentry
#define rmp_make_private	fake_rmp_make_private
#define rmp_make_shared		fake_rmp_make_shared
#define psmash			fake_psmash
#define snp_leak_pages		fake_snp_leak_pages

/* The secure processor's driver. */
#define sev_platform_init		fake_sev_platform_init
#define sev_platform_shutdown		fake_sev_platform_shutdown
#define sev_do_cmd			fake_sev_do_cmd
#define sev_issue_cmd_external_user	fake_sev_issue_cmd_external_user
#define sev_guest_activate		fake_sev_guest_activate
#define sev_guest_deactivate		fake_sev_guest_deactivate
#define sev_guest_decommission		fake_sev_guest_decommission
#define sev_guest_df_flush		fake_sev_guest_df_flush
#define snp_alloc_firmware_page		fake_snp_alloc_firmware_page
#define snp_free_firmware_page		fake_snp_free_firmware_page

#endif /* FAKE_CPU_H */
