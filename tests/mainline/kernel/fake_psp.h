/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The secure processor's SNP commands.  Each checks in the order of AMD
 * 56860 as far as it is known, and gives the status of the first failure;
 * a failure changes nothing but a CPUID page that is corrected on order.
 *
 * The version that it claims and its limits are those of the simulated host's
 * default firmware (kvmlaunch/sim/firmware_profiles.py, "Milan").
 */
#ifndef FAKE_PSP_H
#define FAKE_PSP_H

#include <linux/bitmap.h>
#include <linux/random.h>

#include "fake_cpuid.h"
#include "fake_idblock.h"
#include "fake_log.h"
#include "fake_rmp.h"

#define FAKE_API_MAJOR		1
#define FAKE_API_MINOR		55
#define FAKE_BUILD		21
#define FAKE_TCB		(3ULL | 8ULL << 48 | 115ULL << 56)

#define FAKE_POLICY_SMT		BIT_ULL(16)
#define FAKE_POLICY_ONE		BIT_ULL(17)
#define FAKE_POLICY_KNOWN	GENMASK_ULL(20, 0)

enum fake_gstate {
	FAKE_GSTATE_INIT,
	FAKE_GSTATE_LAUNCH,
	FAKE_GSTATE_RUNNING,
};

struct fake_guest {
	struct list_head node;
	u64 gctx;
	u32 number;
	enum fake_gstate state;
	u64 policy;
	u32 asid;
	bool imi_en;
	u8 gosvw[16];
	u8 vmpck[4][32];
	u8 digest[SHA384_DIGEST_SIZE];
};

/* What SNP_CONFIG and SNP_VLEK_LOAD left behind. */
struct fake_config {
	u64 reported_tcb;
	u32 mask;
	bool vlek;
};

static LIST_HEAD(fake_guests);
static DECLARE_BITMAP(fake_flush_needed, FAKE_MAX_SNP_ASID + 1);
static struct fake_config fake_config = { .reported_tcb = FAKE_TCB };

static struct fake_guest *fake_guest_of(u64 gctx)
{
	struct fake_guest *guest;

	list_for_each_entry(guest, &fake_guests, node) {
		if (guest->gctx == gctx)
			return guest;
	}
	return NULL;
}

/* The checks that every guest command begins with. */
static u32 fake_guest_get(u64 gctx, struct fake_guest **guest)
{
	if (!PAGE_ALIGNED(gctx))
		return SEV_RET_INVALID_PARAM;
	*guest = fake_guest_of(gctx);
	return *guest ? SEV_RET_SUCCESS : SEV_RET_INVALID_GUEST;
}

static u32 fake_platform_status(struct sev_user_data_snp_status *status)
{
	struct fake_guest *guest;

	memset(status, 0, sizeof(*status));
	status->api_major = FAKE_API_MAJOR;
	status->api_minor = FAKE_API_MINOR;
	status->state = 1;
	status->is_rmp_initialized = 1;
	status->build_id = FAKE_BUILD;
	status->mask_chip_id = fake_config.mask & 1;
	status->mask_chip_key = fake_config.mask >> 1;
	status->vlek_en = fake_config.vlek;
	status->current_tcb_version = FAKE_TCB;
	status->reported_tcb_version = fake_config.reported_tcb;
	list_for_each_entry(guest, &fake_guests, node)
		status->guest_count += guest->state != FAKE_GSTATE_INIT;
	return SEV_RET_SUCCESS;
}

static u32 fake_commit(void)
{
	fake_config.reported_tcb = FAKE_TCB;
	return SEV_RET_SUCCESS;
}

static u32 fake_set_config(const struct sev_user_data_snp_config *config)
{
	int shift;

	if (config->rsvd)
		return SEV_RET_INVALID_PARAM;
	for (shift = 0; shift < 64; shift += 8) {
		/* Bytes 2 to 5 are reserved and skipped. */
		if (shift >= 16 && shift < 48)
			continue;
		if ((u8)(config->reported_tcb >> shift) > (u8)(FAKE_TCB >> shift))
			return SEV_RET_INVALID_PARAM;
	}
	fake_config.reported_tcb = config->reported_tcb ?: FAKE_TCB;
	fake_config.mask = config->mask_chip_id | config->mask_chip_key << 1;
	return SEV_RET_SUCCESS;
}

static u32 fake_gctx_create(u64 gctx)
{
	struct fake_rmp_entry *entry = fake_rmp_entry_of(PHYS_PFN(gctx));
	struct fake_guest *guest;

	if (!PAGE_ALIGNED(gctx))
		return SEV_RET_INVALID_PARAM;
	if (!entry || !entry->assigned || entry->asid || !entry->immutable ||
	    entry->context)
		return SEV_RET_INVALID_PAGE_STATE;

	guest = kzalloc(sizeof(*guest), GFP_KERNEL);
	if (!guest)
		return SEV_RET_RESOURCE_LIMIT;

	clear_page(__va(gctx));
	entry->context = true;
	guest->gctx = gctx;
	guest->number = ++fake_guests_created;
	list_add_tail(&guest->node, &fake_guests);
	fake_log_free_vmsas();
	return SEV_RET_SUCCESS;
}

static bool fake_policy_refused(u64 policy)
{
	u32 abi = FAKE_API_MAJOR << 8 | FAKE_API_MINOR;

	return !(policy & FAKE_POLICY_ONE) || !(policy & FAKE_POLICY_SMT) ||
	       (policy & ~FAKE_POLICY_KNOWN) || (policy & 0xffff) > abi;
}

static u32 fake_launch_start(const struct sev_data_snp_launch_start *start)
{
	struct fake_guest *guest;
	u32 status;

	if (start->rsvd || !PAGE_ALIGNED(start->ma_gctx_paddr))
		return SEV_RET_INVALID_PARAM;
	status = fake_guest_get(start->gctx_paddr, &guest);
	if (status)
		return status;
	if (guest->state != FAKE_GSTATE_INIT)
		return SEV_RET_INVALID_GUEST_STATE;
	/* There are no migration agents here. */
	if (start->ma_en)
		return SEV_RET_INVALID_GUEST;
	if (fake_policy_refused(start->policy))
		return SEV_RET_POLICY_FAILURE;

	guest->policy = start->policy;
	guest->imi_en = start->imi_en;
	memcpy(guest->gosvw, start->gosvw, sizeof(guest->gosvw));
	get_random_bytes(guest->vmpck, sizeof(guest->vmpck));
	guest->state = FAKE_GSTATE_LAUNCH;
	return SEV_RET_SUCCESS;
}

static bool fake_asid_owned(u32 asid, const struct fake_guest *but)
{
	struct fake_guest *guest;

	list_for_each_entry(guest, &fake_guests, node) {
		if (guest != but && guest->asid == asid)
			return true;
	}
	return false;
}

static u32 fake_snp_activate(const struct sev_data_snp_activate *activate)
{
	struct fake_guest *guest;
	u32 status;

	status = fake_guest_get(activate->gctx_paddr, &guest);
	if (status)
		return status;
	if (guest->state == FAKE_GSTATE_INIT)
		return SEV_RET_INVALID_GUEST_STATE;
	if (activate->asid && fake_rmp_asid_in_use(activate->asid))
		return SEV_RET_INVALID_CONFIG;
	if (!activate->asid || activate->asid > FAKE_MAX_SNP_ASID)
		return SEV_RET_INVALID_ASID;
	if (fake_asid_owned(activate->asid, guest))
		return SEV_RET_ASID_OWNED;
	if (guest->asid)
		return SEV_RET_ACTIVE;
	if (test_bit(activate->asid, fake_flush_needed))
		return SEV_RET_DFFLUSH_REQUIRED;

	guest->asid = activate->asid;
	return SEV_RET_SUCCESS;
}

static u32 fake_df_flush(void)
{
	bitmap_zero(fake_flush_needed, FAKE_MAX_SNP_ASID + 1);
	return SEV_RET_SUCCESS;
}

static u32 fake_decommission(u64 gctx)
{
	struct fake_guest *guest;
	u32 status;

	status = fake_guest_get(gctx, &guest);
	if (status)
		return status;

	if (guest->asid)
		set_bit(guest->asid, fake_flush_needed);
	fake_rmp_entry_of(PHYS_PFN(gctx))->context = false;
	list_del(&guest->node);
	kfree_sensitive(guest);
	return SEV_RET_SUCCESS;
}

static u32 fake_launch_finish(const struct sev_data_snp_launch_finish *finish)
{
	struct fake_guest *guest;
	u32 status;

	if (finish->rsvd || (finish->auth_key_en && !finish->id_block_en))
		return SEV_RET_INVALID_PARAM;
	status = fake_guest_get(finish->gctx_paddr, &guest);
	if (status)
		return status;
	if (guest->state != FAKE_GSTATE_LAUNCH || guest->imi_en)
		return SEV_RET_INVALID_GUEST_STATE;
	if (!guest->asid)
		return SEV_RET_INACTIVE;
	if (finish->id_block_en) {
		status = fake_check_id_block(__va(finish->id_block_paddr),
					     __va(finish->id_auth_paddr),
					     guest->digest, guest->policy,
					     finish->auth_key_en);
		if (status)
			return status;
	}
	guest->state = FAKE_GSTATE_RUNNING;
	return SEV_RET_SUCCESS;
}

static u32 fake_snp_guest_status(const struct sev_data_snp_guest_status *data)
{
	struct fake_guest *guest;
	u32 status;
	void *out;

	status = fake_guest_get(data->gctx_paddr, &guest);
	if (status)
		return status;

	/* 00 policy, 08 ASID, 0C state */
	out = __va(data->address);
	memset(out, 0, 0x20);
	*(u64 *)out = guest->policy;
	*(u32 *)(out + 0x08) = guest->asid;
	*(u8 *)(out + 0x0c) = guest->state;
	return SEV_RET_SUCCESS;
}

/* Firmware and Pre-Guest pages become Reclaim pages. */
static u32 fake_page_reclaim(u64 address)
{
	struct fake_rmp_entry *entry = fake_rmp_entry_of(PHYS_PFN(address));
	u32 size = address & 1;

	if (!PAGE_ALIGNED(address & ~1ULL))
		return SEV_RET_INVALID_PARAM;
	if (!entry || !entry->assigned || !entry->immutable || entry->context)
		return SEV_RET_INVALID_PAGE_STATE;
	if (PG_LEVEL_TO_RMP(entry->level) != size)
		return SEV_RET_INVALID_PAGE_SIZE;

	spin_lock(&fake_rmp_lock);
	*entry = (struct fake_rmp_entry){
		.assigned = true,
		.level = entry->level,
	};
	spin_unlock(&fake_rmp_lock);
	return SEV_RET_SUCCESS;
}

#endif /* FAKE_PSP_H */
