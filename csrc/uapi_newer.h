/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Mainline additions after 6.12. Known from pull requests and a 7.x tree, not
 * from headers that `tox -e abi` compares; a job with newer headers compares
 * the names it finds there.
 */

#define KVM_CAP_GUEST_MEMFD_FLAGS 244
#define GUEST_MEMFD_FLAG_MMAP (1ULL << 0)
#define GUEST_MEMFD_FLAG_INIT_SHARED (1ULL << 1)
#define KVM_X86_SNP_POLICY_BITS 1
#define KVM_X86_SEV_SNP_REQ_CERTS 2
#define KVM_SEV_SNP_ENABLE_REQ_CERTS 103
#define KVM_EXIT_SNP_REQ_CERTS 43

struct kvm_exit_snp_req_certs {
	uint64_t gpa;
	uint64_t npages;
	uint64_t ret;
};
