/* SPDX-License-Identifier: Apache-2.0 */
/*
 * /dev/sev (Linux 6.12): the commands of SEV_ISSUE_CMD and the firmware status
 * words. All structs are packed. Same rules as uapi_kvm.h.
 *
 * Where the kernel uses bit fields, the whole word is declared here.
 */

#define SEV_IOC_TYPE 'S'
#define SEV_ISSUE_CMD _IOWR(SEV_IOC_TYPE, 0x0, struct sev_issue_cmd)

#define SEV_FACTORY_RESET 0
#define SEV_PLATFORM_STATUS 1
#define SEV_PEK_GEN 2
#define SEV_PEK_CSR 3
#define SEV_PDH_GEN 4
#define SEV_PDH_CERT_EXPORT 5
#define SEV_PEK_CERT_IMPORT 6
#define SEV_GET_ID 7
#define SEV_GET_ID2 8
#define SNP_PLATFORM_STATUS 9
#define SNP_COMMIT 10
#define SNP_SET_CONFIG 11
#define SNP_VLEK_LOAD 12
#define SEV_MAX 13

#define SEV_RET_NO_FW_CALL -1
#define SEV_RET_SUCCESS 0
#define SEV_RET_INVALID_PLATFORM_STATE 0x01
#define SEV_RET_INVALID_GUEST_STATE 0x02
#define SEV_RET_INVALID_CONFIG 0x03
#define SEV_RET_INVALID_LEN 0x04
#define SEV_RET_ALREADY_OWNED 0x05
#define SEV_RET_INVALID_CERTIFICATE 0x06
#define SEV_RET_POLICY_FAILURE 0x07
#define SEV_RET_INACTIVE 0x08
#define SEV_RET_INVALID_ADDRESS 0x09
#define SEV_RET_BAD_SIGNATURE 0x0a
#define SEV_RET_BAD_MEASUREMENT 0x0b
#define SEV_RET_ASID_OWNED 0x0c
#define SEV_RET_INVALID_ASID 0x0d
#define SEV_RET_WBINVD_REQUIRED 0x0e
#define SEV_RET_DFFLUSH_REQUIRED 0x0f
#define SEV_RET_INVALID_GUEST 0x10
#define SEV_RET_INVALID_COMMAND 0x11
#define SEV_RET_ACTIVE 0x12
#define SEV_RET_HWSEV_RET_PLATFORM 0x13
#define SEV_RET_HWSEV_RET_UNSAFE 0x14
#define SEV_RET_UNSUPPORTED 0x15
#define SEV_RET_INVALID_PARAM 0x16
#define SEV_RET_RESOURCE_LIMIT 0x17
#define SEV_RET_SECURE_DATA_INVALID 0x18
#define SEV_RET_INVALID_PAGE_SIZE 0x19
#define SEV_RET_INVALID_PAGE_STATE 0x1a
#define SEV_RET_INVALID_MDATA_ENTRY 0x1b
#define SEV_RET_INVALID_PAGE_OWNER 0x1c
#define SEV_RET_AEAD_OFLOW 0x1d
#define SEV_RET_EXIT_RING_BUFFER 0x1f
#define SEV_RET_RMP_INIT_REQUIRED 0x20
#define SEV_RET_BAD_SVN 0x21
#define SEV_RET_BAD_VERSION 0x22
#define SEV_RET_SHUTDOWN_REQUIRED 0x23
#define SEV_RET_UPDATE_FAILED 0x24
#define SEV_RET_RESTORE_REQUIRED 0x25
#define SEV_RET_RMP_INITIALIZATION_FAILED 0x26
#define SEV_RET_INVALID_KEY 0x27

struct sev_issue_cmd {
	uint32_t cmd;
	uint64_t data;
	uint32_t error;
};

struct sev_user_data_status {
	uint8_t api_major;
	uint8_t api_minor;
	uint8_t state;
	uint32_t flags;
	uint8_t build;
	uint32_t guest_count;
};

struct sev_user_data_snp_status {
	uint8_t api_major;
	uint8_t api_minor;
	uint8_t state;
	uint8_t rmp_word;
	uint32_t build_id;
	uint32_t mask_word;
	uint32_t guest_count;
	uint64_t current_tcb_version;
	uint64_t reported_tcb_version;
};

struct sev_user_data_snp_config {
	uint64_t reported_tcb;
	uint32_t mask_word;
	uint8_t rsvd1[52];
};

struct sev_user_data_snp_vlek_load {
	uint32_t len;
	uint8_t vlek_wrapped_version;
	uint8_t rsvd[3];
	uint64_t vlek_wrapped_address;
};

struct sev_user_data_snp_wrapped_vlek_hashstick {
	uint8_t data[432];
};

struct sev_user_data_get_id {
	uint8_t socket1[64];
	uint8_t socket2[64];
};

struct sev_user_data_get_id2 {
	uint64_t address;
	uint32_t length;
};

struct sev_user_data_pek_csr {
	uint64_t address;
	uint32_t length;
};

struct sev_user_data_pek_cert_import {
	uint64_t pek_cert_address;
	uint32_t pek_cert_len;
	uint64_t oca_cert_address;
	uint32_t oca_cert_len;
};

struct sev_user_data_pdh_cert_export {
	uint64_t pdh_cert_address;
	uint32_t pdh_cert_len;
	uint64_t cert_chain_address;
	uint32_t cert_chain_len;
};
