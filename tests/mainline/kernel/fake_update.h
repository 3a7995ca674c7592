/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * SNP_LAUNCH_UPDATE: a Pre-Guest page is filled, measured and given to the
 * guest.  4 KiB pages only, as KVM launches them.
 */
#ifndef FAKE_UPDATE_H
#define FAKE_UPDATE_H

#include "fake_psp.h"

#define FAKE_PAGE_NORMAL	1
#define FAKE_PAGE_VMSA		2
#define FAKE_PAGE_ZERO		3
#define FAKE_PAGE_UNMEASURED	4
#define FAKE_PAGE_SECRETS	5
#define FAKE_PAGE_CPUID		6

/* GUEST_TSC_SCALE and GUEST_TSC_OFFSET of a VMSA count as zero. */
#define FAKE_VMSA_TSC		0x2f0
#define FAKE_VMSA_TSC_SIZE	16

#define FAKE_CPUID_MAX		64

struct fake_cpuid_entry {
	u32 eax_in;
	u32 ecx_in;
	u64 xcr0_in;
	u64 xss_in;
	u32 reg[4];
	u64 reserved;
} __packed;

struct fake_cpuid_page {
	u32 count;
	u32 reserved1;
	u64 reserved2;
	struct fake_cpuid_entry entry[FAKE_CPUID_MAX];
} __packed;

/* AMD 56860, secrets page format, version 3. */
struct fake_secrets_page {
	u32 version;
	u32 imi_en;
	u32 fms;
	u32 reserved;
	u8 gosvw[16];
	u8 vmpck[4][32];
	u8 guest_area[96];
	u8 vmsa_tweak[64];
	u8 svsm[32];
	u32 tsc_factor;
} __packed;

static_assert(offsetof(struct fake_secrets_page, tsc_factor) == 0x160);

/*
 * The structure of a CPUID page.  What its entries may claim is left to the
 * real firmware; corrections come on order.
 */
static bool fake_cpuid_page_well_formed(const struct fake_cpuid_page *page)
{
	u32 i;

	if (page->count > FAKE_CPUID_MAX || page->reserved1 || page->reserved2)
		return false;
	for (i = 0; i < page->count; i++) {
		if (page->entry[i].reserved)
			return false;
	}
	return true;
}

static void fake_cpuid_correct(struct fake_cpuid_page *page,
			       const struct fake_order *order)
{
	u32 i, *reg;

	for (i = 0; i < min_t(u32, page->count, FAKE_CPUID_MAX); i++) {
		if (page->entry[i].eax_in != order->leaf ||
		    page->entry[i].ecx_in != order->index)
			continue;
		reg = &page->entry[i].reg[order->reg - 'a'];
		*reg = order->has_value ? order->value : *reg ^ 1;
	}
}

static void fake_secrets(const struct fake_guest *guest, void *page)
{
	struct fake_secrets_page *secrets = page;

	clear_page(page);
	secrets->version = 3;
	secrets->imi_en = guest->imi_en;
	secrets->fms = cpuid_eax(1);
	memcpy(secrets->gosvw, guest->gosvw, sizeof(secrets->gosvw));
	memcpy(secrets->vmpck, guest->vmpck, sizeof(secrets->vmpck));
	secrets->tsc_factor = 200;
}

static u32 fake_update_refused(const struct sev_data_snp_launch_update *update,
			       const struct fake_guest *guest,
			       const struct fake_rmp_entry *entry)
{
	if (!entry || !entry->assigned || !entry->asid || !entry->immutable ||
	    entry->validated)
		return SEV_RET_INVALID_PAGE_STATE;
	if (PG_LEVEL_TO_RMP(entry->level) != update->page_size)
		return SEV_RET_INVALID_PAGE_SIZE;
	/* KVM launches in pages of 4 KiB only, and so does this processor. */
	if (update->page_size != RMP_PG_SIZE_4K)
		return SEV_RET_INVALID_PAGE_SIZE;
	if (update->page_type < FAKE_PAGE_NORMAL || update->page_type > FAKE_PAGE_CPUID)
		return SEV_RET_INVALID_PARAM;
	if (guest->state != FAKE_GSTATE_LAUNCH)
		return SEV_RET_INVALID_GUEST_STATE;
	if (!guest->asid)
		return SEV_RET_INACTIVE;
	if (entry->asid != guest->asid)
		return SEV_RET_INVALID_PAGE_OWNER;
	if (guest->imi_en && !update->imi_page)
		return SEV_RET_INVALID_PARAM;
	if (update->page_type == FAKE_PAGE_CPUID &&
	    !fake_cpuid_page_well_formed(__va(update->address)))
		return SEV_RET_INVALID_PARAM;
	return SEV_RET_SUCCESS;
}

/* CONTENTS of PAGE_INFO; the TSC fields of a VMSA are left out of it. */
static int fake_page_contents(u8 type, const void *page, u8 *contents)
{
	void *copy;

	if (type == FAKE_PAGE_NORMAL)
		fake_sha384(page, PAGE_SIZE, contents);
	if (type != FAKE_PAGE_VMSA)
		return 0;

	copy = kmemdup(page, PAGE_SIZE, GFP_KERNEL);
	if (!copy)
		return -ENOMEM;
	memset(copy + FAKE_VMSA_TSC, 0, FAKE_VMSA_TSC_SIZE);
	fake_sha384(copy, PAGE_SIZE, contents);
	kfree(copy);
	return 0;
}

static u32 fake_measure(struct fake_guest *guest, u64 gpa, const void *page,
			const struct sev_data_snp_launch_update *update)
{
	struct fake_page_info info = {
		.length = sizeof(info),
		.page_type = update->page_type,
		.imi_page = update->imi_page,
		.vmpl1_perms = update->vmpl1_perms,
		.vmpl2_perms = update->vmpl2_perms,
		.vmpl3_perms = update->vmpl3_perms,
		.gpa = gpa,
	};

	memcpy(info.digest_cur, guest->digest, sizeof(info.digest_cur));
	if (fake_page_contents(update->page_type, page, info.contents))
		return SEV_RET_RESOURCE_LIMIT;
	fake_sha384(&info, sizeof(info), guest->digest);

	fake_log_page(guest->number, info.page_type, gpa, info.contents, guest->digest);
	if (info.page_type == FAKE_PAGE_VMSA)
		fake_log_vmsa(guest->number, page);
	return SEV_RET_SUCCESS;
}

static u32 fake_launch_update(const struct sev_data_snp_launch_update *update)
{
	struct fake_rmp_entry *entry = fake_rmp_entry_of(PHYS_PFN(update->address));
	void *page = __va(update->address);
	struct fake_order *correction;
	struct fake_guest *guest;
	u32 status;

	if (update->page_type == FAKE_PAGE_CPUID && entry) {
		correction = fake_order_correction();
		if (correction) {
			fake_cpuid_correct(page, correction);
			return SEV_RET_INVALID_PARAM;
		}
	}

	if (update->rsvd || update->rsvd2 || update->rsvd3 || update->rsvd4 ||
	    !PAGE_ALIGNED(update->address))
		return SEV_RET_INVALID_PARAM;
	status = fake_guest_get(update->gctx_paddr, &guest);
	if (status)
		return status;
	status = fake_update_refused(update, guest, entry);
	if (status)
		return status;

	if (update->page_type == FAKE_PAGE_ZERO)
		clear_page(page);
	if (update->page_type == FAKE_PAGE_SECRETS)
		fake_secrets(guest, page);
	status = fake_measure(guest, entry->gpa, page, update);
	if (status)
		return status;

	spin_lock(&fake_rmp_lock);
	entry->validated = true;
	entry->immutable = false;
	entry->vmsa = update->page_type == FAKE_PAGE_VMSA;
	spin_unlock(&fake_rmp_lock);
	return SEV_RET_SUCCESS;
}

#endif /* FAKE_UPDATE_H */
