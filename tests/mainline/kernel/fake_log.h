/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the secure processor was asked and what it measured, in debugfs:
 *
 *   fake_psp/measured	GUEST TYPE GPA CONTENTS DIGEST, a line for each page;
 *			writing anything forgets all three
 *   fake_psp/vmsa	the measured VMSA pages of the newest guest, raw
 *   fake_psp/log	COMMAND STATUS, a line for each firmware command
 *
 * GUEST counts GCTX_CREATE from 1, GPA is hex without 0x, CONTENTS is zeros
 * where none is measured, STATUS is hex with 0x.
 */
#ifndef FAKE_LOG_H
#define FAKE_LOG_H

#include <crypto/sha2.h>

#include "fake_orders.h"

struct fake_measured {
	struct list_head node;
	u32 guest;
	u8 type;
	u64 gpa;
	u8 contents[SHA384_DIGEST_SIZE];
	u8 digest[SHA384_DIGEST_SIZE];
};

struct fake_logged {
	struct list_head node;
	const char *name;
	int id;
	u32 status;
};

struct fake_vmsa_page {
	struct list_head node;
	u32 guest;
	u8 page[PAGE_SIZE];
};

static LIST_HEAD(fake_measured);
static LIST_HEAD(fake_logged);
static LIST_HEAD(fake_vmsas);
static u32 fake_guests_created;
static struct dentry *fake_debugfs;

/* All of these run under fake_psp_lock. */

static void fake_log_command(int id, u32 status)
{
	struct fake_logged *line = kzalloc(sizeof(*line), GFP_KERNEL);
	struct fake_command *command = fake_command_of(id);

	if (!line)
		return;
	line->name = command ? command->name : NULL;
	line->id = id;
	line->status = status;
	list_add_tail(&line->node, &fake_logged);
}

static void fake_log_page(u32 guest, u8 type, u64 gpa, const u8 *contents,
			  const u8 *digest)
{
	struct fake_measured *line = kzalloc(sizeof(*line), GFP_KERNEL);

	if (!line)
		return;
	line->guest = guest;
	line->type = type;
	line->gpa = gpa;
	memcpy(line->contents, contents, sizeof(line->contents));
	memcpy(line->digest, digest, sizeof(line->digest));
	list_add_tail(&line->node, &fake_measured);
}

static void fake_log_vmsa(u32 guest, const void *page)
{
	struct fake_vmsa_page *vmsa = kmalloc(sizeof(*vmsa), GFP_KERNEL);

	if (!vmsa)
		return;
	vmsa->guest = guest;
	memcpy(vmsa->page, page, PAGE_SIZE);
	list_add_tail(&vmsa->node, &fake_vmsas);
}

static void fake_log_free_vmsas(void)
{
	struct fake_vmsa_page *vmsa, *next;

	list_for_each_entry_safe(vmsa, next, &fake_vmsas, node)
		kfree(vmsa);
	INIT_LIST_HEAD(&fake_vmsas);
}

static void fake_log_reset(void)
{
	struct fake_measured *page, *next_page;
	struct fake_logged *line, *next_line;

	list_for_each_entry_safe(page, next_page, &fake_measured, node)
		kfree(page);
	INIT_LIST_HEAD(&fake_measured);

	list_for_each_entry_safe(line, next_line, &fake_logged, node)
		kfree(line);
	INIT_LIST_HEAD(&fake_logged);

	fake_log_free_vmsas();
	fake_guests_created = 0;
}

static void *fake_seq_start(struct seq_file *m, loff_t *pos)
{
	mutex_lock(&fake_psp_lock);
	return seq_list_start(m->private, *pos);
}

static void *fake_seq_next(struct seq_file *m, void *item, loff_t *pos)
{
	return seq_list_next(item, m->private, pos);
}

static void fake_seq_stop(struct seq_file *m, void *item)
{
	mutex_unlock(&fake_psp_lock);
}

static int fake_measured_show(struct seq_file *m, void *item)
{
	struct fake_measured *page = list_entry(item, struct fake_measured, node);

	seq_printf(m, "%u %u %llx %*phN %*phN\n", page->guest, page->type,
		   page->gpa, SHA384_DIGEST_SIZE, page->contents,
		   SHA384_DIGEST_SIZE, page->digest);
	return 0;
}

static int fake_logged_show(struct seq_file *m, void *item)
{
	struct fake_logged *line = list_entry(item, struct fake_logged, node);

	if (line->name)
		seq_puts(m, line->name);
	else
		seq_printf(m, "%#x", line->id);
	seq_printf(m, " 0x%02x\n", line->status);
	return 0;
}

static int fake_vmsa_show(struct seq_file *m, void *item)
{
	struct fake_vmsa_page *vmsa = list_entry(item, struct fake_vmsa_page, node);

	if (vmsa->guest == fake_guests_created)
		seq_write(m, vmsa->page, PAGE_SIZE);
	return 0;
}

static const struct seq_operations fake_measured_seq = {
	.start = fake_seq_start,
	.next = fake_seq_next,
	.stop = fake_seq_stop,
	.show = fake_measured_show,
};

static const struct seq_operations fake_logged_seq = {
	.start = fake_seq_start,
	.next = fake_seq_next,
	.stop = fake_seq_stop,
	.show = fake_logged_show,
};

static const struct seq_operations fake_vmsa_seq = {
	.start = fake_seq_start,
	.next = fake_seq_next,
	.stop = fake_seq_stop,
	.show = fake_vmsa_show,
};

static int fake_seq_open(struct file *file, const struct seq_operations *ops,
			 struct list_head *list)
{
	int ret = seq_open(file, ops);

	if (!ret)
		((struct seq_file *)file->private_data)->private = list;
	return ret;
}

static int fake_measured_open(struct inode *inode, struct file *file)
{
	return fake_seq_open(file, &fake_measured_seq, &fake_measured);
}

static int fake_logged_open(struct inode *inode, struct file *file)
{
	return fake_seq_open(file, &fake_logged_seq, &fake_logged);
}

static int fake_vmsa_open(struct inode *inode, struct file *file)
{
	return fake_seq_open(file, &fake_vmsa_seq, &fake_vmsas);
}

static ssize_t fake_measured_write(struct file *file, const char __user *buf,
				   size_t count, loff_t *pos)
{
	mutex_lock(&fake_psp_lock);
	fake_log_reset();
	mutex_unlock(&fake_psp_lock);
	return count;
}

static const struct file_operations fake_measured_fops = {
	.owner = THIS_MODULE,
	.open = fake_measured_open,
	.read = seq_read,
	.write = fake_measured_write,
	.llseek = seq_lseek,
	.release = seq_release,
};

static const struct file_operations fake_logged_fops = {
	.owner = THIS_MODULE,
	.open = fake_logged_open,
	.read = seq_read,
	.llseek = seq_lseek,
	.release = seq_release,
};

static const struct file_operations fake_vmsa_fops = {
	.owner = THIS_MODULE,
	.open = fake_vmsa_open,
	.read = seq_read,
	.llseek = seq_lseek,
	.release = seq_release,
};

static void fake_debugfs_init(void)
{
	fake_debugfs = debugfs_create_dir("fake_psp", NULL);
	debugfs_create_file("orders", 0600, fake_debugfs, NULL, &fake_orders_fops);
	debugfs_create_file("measured", 0600, fake_debugfs, NULL, &fake_measured_fops);
	debugfs_create_file("vmsa", 0400, fake_debugfs, NULL, &fake_vmsa_fops);
	debugfs_create_file("log", 0400, fake_debugfs, NULL, &fake_logged_fops);
}

static void fake_debugfs_exit(void)
{
	debugfs_remove(fake_debugfs);
	fake_debugfs = NULL;

	mutex_lock(&fake_psp_lock);
	fake_log_reset();
	fake_orders_free(&fake_orders);
	mutex_unlock(&fake_psp_lock);
}

#endif /* FAKE_LOG_H */
