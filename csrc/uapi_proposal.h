/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Unmerged proposals for a VMSA supplied by user space (June 2026, v1 and v2).
 * Trees disagree on the capability numbers; these are defaults, the ones used
 * can be configured.
 */

#define KVM_SEV_SNP_PAGE_TYPE_VMSA 2
#define KVM_SEV_SNP_GET_VCPU_STATE 104
#define KVM_SEV_SNP_SET_VCPU_STATE 105
#define KVM_SEV_SNP_VCPU_STATE_VMSA_VALID (1ULL << 0)
#define KVM_SEV_SNP_VCPU_STATE_GHCB_VALID (1ULL << 1)
#define KVM_CAP_SNP_VCPU_STATE 251
/* Guess: the next free number after KVM_CAP_SNP_VCPU_STATE. */
#define KVM_CAP_SNP_DIRECT_VMSA 252

struct kvm_sev_snp_vcpu_state {
	uint64_t valid_fields;
	uint64_t vmsa_gpa;
	uint64_t ghcb_gpa;
	uint64_t pad[5];
};
