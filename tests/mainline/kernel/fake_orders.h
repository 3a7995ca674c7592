/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Failures on order: debugfs fake_psp/orders, one order a line.
 *
 *   COMMAND:fw=STATUS[@N]		the N-th COMMAND gives STATUS, does nothing
 *   SNP_PAGE_RECLAIM:fail[@N]		the N-th reclaim of a guest's page fails
 *   CPUID:correct=LEAF[/SUBLEAF].REG[=VALUE][@N]
 *					the N-th CPUID page is refused with that
 *					register set to VALUE, else bit 0 flipped
 *
 * N counts from 1 and is 1 when left out; "@N+" means from then on.  Counted
 * per name and verb from the last write, which replaces all orders.  The
 * grammar is that of kvmlaunch/sim/faults.py.
 */
#ifndef FAKE_ORDERS_H
#define FAKE_ORDERS_H

#include <linux/ctype.h>
#include <linux/debugfs.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/psp-sev.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#define FAKE_ORDERS_MAX		(64 * 1024)
#define FAKE_ORDER_TEXT		128

enum fake_verb {
	FAKE_FW,
	FAKE_FAIL,
	FAKE_CORRECT,
};

struct fake_order {
	struct list_head node;
	char text[FAKE_ORDER_TEXT];
	char name[32];
	enum fake_verb verb;
	u64 first;
	bool forever;
	/* FAKE_FW */
	u64 status;
	/* FAKE_CORRECT */
	u32 leaf;
	u32 index;
	char reg;
	bool has_value;
	u32 value;
};

struct fake_command {
	const char *name;
	int id;
	bool snp;
	u64 calls;
};

#define FAKE_SNP(x)	{ .name = #x, .id = SEV_CMD_##x, .snp = true }
#define FAKE_SEV(x)	{ .name = #x, .id = SEV_CMD_##x }

/* What the log can name; orders know the ones that are SNP's. */
static struct fake_command fake_commands[] = {
	FAKE_SNP(SNP_ACTIVATE),
	FAKE_SNP(SNP_COMMIT),
	FAKE_SNP(SNP_CONFIG),
	FAKE_SNP(SNP_DECOMMISSION),
	FAKE_SNP(SNP_GCTX_CREATE),
	FAKE_SNP(SNP_LAUNCH_FINISH),
	FAKE_SNP(SNP_LAUNCH_START),
	FAKE_SNP(SNP_LAUNCH_UPDATE),
	FAKE_SNP(SNP_PAGE_RECLAIM),
	FAKE_SNP(SNP_PLATFORM_STATUS),
	FAKE_SNP(SNP_VLEK_LOAD),
	FAKE_SEV(SNP_DF_FLUSH),
	FAKE_SEV(SNP_GUEST_STATUS),
	FAKE_SEV(SNP_GUEST_REQUEST),
	FAKE_SEV(ACTIVATE),
	FAKE_SEV(DEACTIVATE),
	FAKE_SEV(DECOMMISSION),
	FAKE_SEV(DF_FLUSH),
	FAKE_SEV(GUEST_STATUS),
	FAKE_SEV(LAUNCH_START),
	FAKE_SEV(LAUNCH_UPDATE_DATA),
	FAKE_SEV(LAUNCH_UPDATE_VMSA),
	FAKE_SEV(LAUNCH_MEASURE),
	FAKE_SEV(LAUNCH_FINISH),
};

/* Serialises the secure processor: commands, orders, and what was measured. */
static DEFINE_MUTEX(fake_psp_lock);
static LIST_HEAD(fake_orders);
static u64 fake_reclaims;
static u64 fake_cpuid_pages;

static struct fake_command *fake_command_of(int id)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(fake_commands); i++) {
		if (fake_commands[i].id == id)
			return &fake_commands[i];
	}
	return NULL;
}

static struct fake_order *fake_order_for(const char *name, enum fake_verb verb,
					 u64 call)
{
	struct fake_order *order;

	list_for_each_entry(order, &fake_orders, node) {
		if (order->verb != verb || strcmp(order->name, name))
			continue;
		if (call == order->first || (order->forever && call > order->first))
			return order;
	}
	return NULL;
}

/* Count a firmware command; whether a status was ordered for it. */
static bool fake_order_status(int id, u32 *status)
{
	struct fake_command *command = fake_command_of(id);
	struct fake_order *order;

	if (!command)
		return false;

	order = fake_order_for(command->name, FAKE_FW, ++command->calls);
	if (!order)
		return false;

	*status = order->status;
	return true;
}

/* Count a reclaim by KVM; whether it has to fail. */
static bool fake_order_reclaim_fails(void)
{
	return fake_order_for("SNP_PAGE_RECLAIM", FAKE_FAIL, ++fake_reclaims);
}

/* Count a CPUID page; the correction ordered for it, or NULL. */
static struct fake_order *fake_order_correction(void)
{
	return fake_order_for("CPUID", FAKE_CORRECT, ++fake_cpuid_pages);
}

/* Digits of a number, decimal or 0x hex, and nothing else. */
static int fake_parse_number(const char *text, u64 *value)
{
	bool hex = !strncmp(text, "0x", 2);

	if (hex)
		text += 2;
	if (!isxdigit(*text))
		return -EINVAL;
	return kstrtou64(text, hex ? 16 : 10, value);
}

static int fake_parse_u32(const char *text, u32 *value)
{
	u64 wide;

	if (fake_parse_number(text, &wide))
		return -EINVAL;
	*value = wide;
	return 0;
}

/* N or N+ */
static int fake_parse_calls(char *text, struct fake_order *order)
{
	size_t length = strlen(text);

	if (length && text[length - 1] == '+') {
		order->forever = true;
		text[length - 1] = '\0';
	}
	if (!isdigit(*text) || kstrtou64(text, 10, &order->first))
		return -EINVAL;
	return order->first ? 0 : -EINVAL;
}

/* LEAF[/SUBLEAF].REG[=VALUE] */
static int fake_parse_correction(char *text, struct fake_order *order)
{
	char *leaf = strsep(&text, ".");
	char *reg = strsep(&text, "=");
	char *index = strchr(leaf, '/');

	if (!reg || strlen(reg) != 3 || reg[0] != 'e' || reg[1] < 'a' ||
	    reg[1] > 'd' || reg[2] != 'x')
		return -EINVAL;
	order->reg = reg[1];

	if (index) {
		*index++ = '\0';
		if (fake_parse_u32(index, &order->index))
			return -EINVAL;
	}
	if (fake_parse_u32(leaf, &order->leaf))
		return -EINVAL;

	if (!text)
		return 0;
	order->has_value = true;
	return fake_parse_u32(text, &order->value);
}

/* A verb with its value, which is NULL where there is none. */
static int fake_parse_verb(const char *verb, char *value, struct fake_order *order)
{
	int i;

	if (!strcmp(verb, "fail")) {
		order->verb = FAKE_FAIL;
		return value || strcmp(order->name, "SNP_PAGE_RECLAIM") ? -EINVAL : 0;
	}
	if (!value)
		return -EINVAL;

	if (!strcmp(verb, "correct")) {
		order->verb = FAKE_CORRECT;
		if (strcmp(order->name, "CPUID"))
			return -EINVAL;
		return fake_parse_correction(value, order);
	}
	if (strcmp(verb, "fw"))
		return -EINVAL;

	order->verb = FAKE_FW;
	for (i = 0; i < ARRAY_SIZE(fake_commands); i++) {
		if (fake_commands[i].snp && !strcmp(fake_commands[i].name, order->name))
			return fake_parse_number(value, &order->status);
	}
	return -EINVAL;
}

static struct fake_order *fake_parse_order(const char *text)
{
	char line[FAKE_ORDER_TEXT];
	struct fake_order *order;
	char *rest = line;
	char *name, *what, *verb;

	if (strlen(text) >= sizeof(line))
		return ERR_PTR(-EINVAL);

	order = kzalloc(sizeof(*order), GFP_KERNEL);
	if (!order)
		return ERR_PTR(-ENOMEM);

	strscpy(order->text, text, sizeof(order->text));
	strscpy(line, text, sizeof(line));
	order->first = 1;

	name = strsep(&rest, ":");
	if (!strncmp(name, "KVM_SEV_", 8))
		name += 8;
	what = strsep(&rest, "@");
	if (!what || strscpy(order->name, name, sizeof(order->name)) < 0)
		goto bad;
	if (rest && fake_parse_calls(rest, order))
		goto bad;

	verb = strsep(&what, "=");
	if (fake_parse_verb(verb, what, order))
		goto bad;
	return order;

bad:
	kfree(order);
	return ERR_PTR(-EINVAL);
}

static void fake_orders_free(struct list_head *orders)
{
	struct fake_order *order, *next;

	list_for_each_entry_safe(order, next, orders, node)
		kfree(order);
	INIT_LIST_HEAD(orders);
}

static int fake_parse_orders(char *text, struct list_head *orders)
{
	char *line;

	while ((line = strsep(&text, "\n"))) {
		struct fake_order *order;

		line = strim(line);
		if (!*line)
			continue;
		order = fake_parse_order(line);
		if (IS_ERR(order))
			return PTR_ERR(order);
		list_add_tail(&order->node, orders);
	}
	return 0;
}

static ssize_t fake_orders_write(struct file *file, const char __user *buf,
				 size_t count, loff_t *pos)
{
	LIST_HEAD(orders);
	char *text;
	int i, ret;

	if (count > FAKE_ORDERS_MAX)
		return -E2BIG;
	text = memdup_user_nul(buf, count);
	if (IS_ERR(text))
		return PTR_ERR(text);

	ret = fake_parse_orders(text, &orders);
	kfree(text);
	if (ret) {
		fake_orders_free(&orders);
		return ret;
	}

	mutex_lock(&fake_psp_lock);
	fake_orders_free(&fake_orders);
	list_splice(&orders, &fake_orders);
	for (i = 0; i < ARRAY_SIZE(fake_commands); i++)
		fake_commands[i].calls = 0;
	fake_reclaims = 0;
	fake_cpuid_pages = 0;
	mutex_unlock(&fake_psp_lock);
	return count;
}

static int fake_orders_show(struct seq_file *m, void *unused)
{
	struct fake_order *order;

	mutex_lock(&fake_psp_lock);
	list_for_each_entry(order, &fake_orders, node)
		seq_printf(m, "%s\n", order->text);
	mutex_unlock(&fake_psp_lock);
	return 0;
}

static int fake_orders_open(struct inode *inode, struct file *file)
{
	return single_open(file, fake_orders_show, NULL);
}

static const struct file_operations fake_orders_fops = {
	.owner = THIS_MODULE,
	.open = fake_orders_open,
	.read = seq_read,
	.write = fake_orders_write,
	.llseek = seq_lseek,
	.release = single_release,
};

#endif /* FAKE_ORDERS_H */
