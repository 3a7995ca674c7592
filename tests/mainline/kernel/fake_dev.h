/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The door to the secure processor, in place of the ccp driver's
 * (drivers/crypto/ccp/sev-dev.c): the functions that KVM calls, and /dev/sev.
 */
#ifndef FAKE_DEV_H
#define FAKE_DEV_H

#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/uaccess.h>

#include "fake_legacy.h"
#include "fake_update.h"

#define FAKE_CHIP_ID		"SIMULATED"
#define FAKE_CHIP_ID_SIZE	64

static u32 fake_psp_execute(int id, void *data)
{
	struct sev_data_snp_addr *page = data;

	switch (id) {
	case SEV_CMD_SNP_PLATFORM_STATUS:
		return fake_platform_status(__va(page->address));
	case SEV_CMD_SNP_COMMIT:
		return fake_commit();
	case SEV_CMD_SNP_CONFIG:
		return fake_set_config(data);
	case SEV_CMD_SNP_VLEK_LOAD:
		fake_config.vlek = true;
		return SEV_RET_SUCCESS;
	case SEV_CMD_SNP_DF_FLUSH:
		return fake_df_flush();
	case SEV_CMD_SNP_GCTX_CREATE:
		return fake_gctx_create(page->address);
	case SEV_CMD_SNP_LAUNCH_START:
		return fake_launch_start(data);
	case SEV_CMD_SNP_ACTIVATE:
		return fake_snp_activate(data);
	case SEV_CMD_SNP_LAUNCH_UPDATE:
		return fake_launch_update(data);
	case SEV_CMD_SNP_LAUNCH_FINISH:
		return fake_launch_finish(data);
	case SEV_CMD_SNP_GUEST_STATUS:
		return fake_snp_guest_status(data);
	case SEV_CMD_SNP_DECOMMISSION:
		return fake_decommission(page->address);
	case SEV_CMD_SNP_PAGE_RECLAIM:
		return fake_page_reclaim(page->address);
	}
	return fake_legacy_command(id, data);
}

/* As __sev_do_cmd_locked(). */
static int fake_psp_command(int id, void *data, int *psp_ret)
{
	u32 status;

	lockdep_assert_held(&fake_psp_lock);
	if (!fake_order_status(id, &status))
		status = fake_psp_execute(id, data);
	fake_log_command(id, status);
	if (psp_ret)
		*psp_ret = status;
	return status ? -EIO : 0;
}

/*
 * KVM calls this itself only to reclaim pages of guests, while buffers go back
 * through snp_free_firmware_page(): the reclaims that an order can fail.
 */
static int fake_sev_do_cmd(int id, void *data, int *psp_ret)
{
	int ret;

	mutex_lock(&fake_psp_lock);
	if (id == SEV_CMD_SNP_PAGE_RECLAIM && fake_order_reclaim_fails()) {
		fake_log_command(id, SEV_RET_INVALID_PAGE_STATE);
		if (psp_ret)
			*psp_ret = SEV_RET_INVALID_PAGE_STATE;
		ret = -EIO;
	} else {
		ret = fake_psp_command(id, data, psp_ret);
	}
	mutex_unlock(&fake_psp_lock);
	return ret;
}

static int fake_sev_guest_activate(struct sev_data_activate *data, int *error)
{
	return fake_sev_do_cmd(SEV_CMD_ACTIVATE, data, error);
}

static int fake_sev_guest_deactivate(struct sev_data_deactivate *data, int *error)
{
	return fake_sev_do_cmd(SEV_CMD_DEACTIVATE, data, error);
}

static int fake_sev_guest_decommission(struct sev_data_decommission *data, int *error)
{
	return fake_sev_do_cmd(SEV_CMD_DECOMMISSION, data, error);
}

static int fake_sev_guest_df_flush(int *error)
{
	return fake_sev_do_cmd(SEV_CMD_DF_FLUSH, NULL, error);
}

static int fake_reclaim_firmware_page(u64 pfn)
{
	struct sev_data_snp_page_reclaim data = { .paddr = PFN_PHYS(pfn) };
	int ret;

	ret = fake_psp_command(SEV_CMD_SNP_PAGE_RECLAIM, &data, NULL);
	if (!ret)
		ret = fake_rmp_make_shared(pfn, PG_LEVEL_4K);
	if (ret)
		fake_snp_leak_pages(pfn, 1);
	return ret;
}

static void *fake_snp_alloc_firmware_page(gfp_t gfp)
{
	struct page *page = alloc_page(gfp);

	if (!page)
		return NULL;
	if (fake_rmp_make_private(page_to_pfn(page), 0, PG_LEVEL_4K, 0, true)) {
		__free_page(page);
		return NULL;
	}
	return page_address(page);
}

static void fake_snp_free_firmware_page(void *addr)
{
	struct page *page;
	int ret;

	if (!addr)
		return;
	page = virt_to_page(addr);

	mutex_lock(&fake_psp_lock);
	ret = fake_reclaim_firmware_page(page_to_pfn(page));
	mutex_unlock(&fake_psp_lock);
	if (!ret)
		__free_page(page);
}

/* /dev/sev */

static long fake_ioctl_snp_platform_status(struct sev_issue_cmd *cmd)
{
	struct sev_data_snp_addr buf;
	struct page *page;
	long ret;

	if (!cmd->data)
		return -EINVAL;
	page = alloc_page(GFP_KERNEL_ACCOUNT);
	if (!page)
		return -ENOMEM;

	buf.address = page_to_phys(page);
	if (fake_rmp_make_private(page_to_pfn(page), 0, PG_LEVEL_4K, 0, true)) {
		ret = -EFAULT;
		goto free;
	}
	ret = fake_psp_command(SEV_CMD_SNP_PLATFORM_STATUS, &buf, &cmd->error);
	if (fake_reclaim_firmware_page(page_to_pfn(page)))
		return -EFAULT;
	if (!ret && copy_to_user((void __user *)cmd->data, page_address(page),
				 sizeof(struct sev_user_data_snp_status)))
		ret = -EFAULT;
free:
	__free_page(page);
	return ret;
}

/* Legacy SEV counts as initialised together with SNP. */
static long fake_ioctl_platform_status(struct sev_issue_cmd *cmd)
{
	struct sev_user_data_status status = {
		.api_major = FAKE_API_MAJOR,
		.api_minor = FAKE_API_MINOR,
		.state = 1,
		.build = FAKE_BUILD,
	};

	cmd->error = SEV_RET_SUCCESS;
	if (copy_to_user((void __user *)cmd->data, &status, sizeof(status)))
		return -EFAULT;
	return 0;
}

static long fake_ioctl_get_id(struct sev_issue_cmd *cmd)
{
	struct sev_user_data_get_id id = { .socket1 = FAKE_CHIP_ID };

	cmd->error = SEV_RET_SUCCESS;
	if (copy_to_user((void __user *)cmd->data, &id, sizeof(id)))
		return -EFAULT;
	return 0;
}

static long fake_ioctl_get_id2(struct sev_issue_cmd *cmd)
{
	const char id[FAKE_CHIP_ID_SIZE] = FAKE_CHIP_ID;
	struct sev_user_data_get_id2 query;
	u32 room;

	if (copy_from_user(&query, (void __user *)cmd->data, sizeof(query)))
		return -EFAULT;

	room = query.address ? query.length : 0;
	query.length = sizeof(id);
	cmd->error = room < sizeof(id) ? SEV_RET_INVALID_LEN : SEV_RET_SUCCESS;
	if (copy_to_user((void __user *)cmd->data, &query, sizeof(query)))
		return -EFAULT;
	if (cmd->error)
		return -EIO;
	if (copy_to_user((void __user *)query.address, id, sizeof(id)))
		return -EFAULT;
	return 0;
}

static long fake_ioctl_set_config(struct sev_issue_cmd *cmd, bool writable)
{
	struct sev_user_data_snp_config config;

	if (!cmd->data)
		return -EINVAL;
	if (!writable)
		return -EPERM;
	if (copy_from_user(&config, (void __user *)cmd->data, sizeof(config)))
		return -EFAULT;
	return fake_psp_command(SEV_CMD_SNP_CONFIG, &config, &cmd->error);
}

static long fake_ioctl_vlek_load(struct sev_issue_cmd *cmd, bool writable)
{
	struct sev_user_data_snp_wrapped_vlek_hashstick stick;
	struct sev_user_data_snp_vlek_load load;

	if (!cmd->data)
		return -EINVAL;
	if (!writable)
		return -EPERM;
	if (copy_from_user(&load, (void __user *)cmd->data, sizeof(load)))
		return -EFAULT;
	if (load.len != sizeof(load) || load.vlek_wrapped_version)
		return -EINVAL;
	if (copy_from_user(&stick, (void __user *)load.vlek_wrapped_address, sizeof(stick)))
		return -EFAULT;
	return fake_psp_command(SEV_CMD_SNP_VLEK_LOAD, &stick, &cmd->error);
}

/* Keys and certificates of legacy SEV aren't here. */
static long fake_ioctl_legacy(struct sev_issue_cmd *cmd, bool writable)
{
	if (!writable)
		return -EPERM;
	cmd->error = SEV_RET_UNSUPPORTED;
	return -EIO;
}

static long fake_sev_command(struct sev_issue_cmd *cmd, bool writable)
{
	switch (cmd->cmd) {
	case SEV_PLATFORM_STATUS:
		return fake_ioctl_platform_status(cmd);
	case SEV_GET_ID:
		return fake_ioctl_get_id(cmd);
	case SEV_GET_ID2:
		return fake_ioctl_get_id2(cmd);
	case SNP_PLATFORM_STATUS:
		return fake_ioctl_snp_platform_status(cmd);
	case SNP_COMMIT: {
		struct sev_data_snp_commit buf = { .len = sizeof(buf) };

		return fake_psp_command(SEV_CMD_SNP_COMMIT, &buf, &cmd->error);
	}
	case SNP_SET_CONFIG:
		return fake_ioctl_set_config(cmd, writable);
	case SNP_VLEK_LOAD:
		return fake_ioctl_vlek_load(cmd, writable);
	}
	return fake_ioctl_legacy(cmd, writable);
}

static long fake_sev_ioctl(struct file *file, unsigned int request, unsigned long arg)
{
	void __user *argp = (void __user *)arg;
	struct sev_issue_cmd cmd;
	long ret;

	if (request != SEV_ISSUE_CMD)
		return -EINVAL;
	if (copy_from_user(&cmd, argp, sizeof(cmd)))
		return -EFAULT;
	if (cmd.cmd >= SEV_MAX)
		return -EINVAL;

	mutex_lock(&fake_psp_lock);
	ret = fake_sev_command(&cmd, file->f_mode & FMODE_WRITE);
	mutex_unlock(&fake_psp_lock);

	if (copy_to_user(argp, &cmd, sizeof(cmd)))
		return -EFAULT;
	return ret;
}

static const struct file_operations fake_sev_fops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = fake_sev_ioctl,
};

static struct miscdevice fake_sev_misc = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "sev",
	.fops = &fake_sev_fops,
	.mode = 0600,
};

static int fake_sev_issue_cmd_external_user(struct file *file, unsigned int id,
					    void *data, int *error)
{
	if (!file || file->f_op != &fake_sev_fops)
		return -EBADF;
	return fake_sev_do_cmd(id, data, error);
}

/* Defined in fake_npt.h, which sev.c includes with fake_vcpu.h at its end. */
static int fake_npt_init(void);
static void fake_npt_exit(void);

/* KVM's probe at load is what brings the fakes to life. */
static int fake_sev_platform_init(struct sev_platform_init_args *args)
{
	int ret;

	if (!args->probe)
		return 0;

	ret = fake_digest_init();
	if (ret)
		return ret;
	ret = fake_rmp_init();
	if (ret)
		goto digest;
	ret = fake_npt_init();
	if (ret)
		goto rmp;
	ret = fake_cpuid_init();
	if (ret)
		goto npt;
	ret = misc_register(&fake_sev_misc);
	if (ret)
		goto cpuid;
	fake_debugfs_init();
	return 0;

cpuid:
	fake_cpuid_exit();
npt:
	fake_npt_exit();
rmp:
	fake_rmp_exit();
digest:
	fake_digest_exit();
	return ret;
}

static void fake_sev_platform_shutdown(void)
{
	struct fake_legacy_guest *legacy, *next_legacy;
	struct fake_guest *guest, *next_guest;
	u64 assigned = fake_rmp_assigned();

	misc_deregister(&fake_sev_misc);
	fake_debugfs_exit();
	fake_cpuid_exit();
	fake_npt_exit();

	if (assigned)
		pr_warn("fake RMP: %llu pages are still assigned\n", assigned);
	list_for_each_entry_safe(guest, next_guest, &fake_guests, node)
		kfree_sensitive(guest);
	list_for_each_entry_safe(legacy, next_legacy, &fake_legacy_guests, node)
		fake_legacy_free(legacy);
	fake_rmp_exit();
	fake_digest_exit();
}

#endif /* FAKE_DEV_H */
