/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The commands of SEV and SEV-ES guests, enough for a launch to go through:
 * handles and states, but no measurement, no keys and no encryption.
 */
#ifndef FAKE_LEGACY_H
#define FAKE_LEGACY_H

#include "fake_psp.h"

#define FAKE_LEGACY_MEASURE_SIZE	48

/* SEV API, guest states. */
enum fake_legacy_state {
	FAKE_LEGACY_UNINIT,
	FAKE_LEGACY_LUPDATE,
	FAKE_LEGACY_LSECRET,
	FAKE_LEGACY_RUNNING,
};

struct fake_legacy_guest {
	struct list_head node;
	u32 handle;
	u32 policy;
	u32 asid;
	enum fake_legacy_state state;
};

static LIST_HEAD(fake_legacy_guests);
static u32 fake_legacy_handles;

static struct fake_legacy_guest *fake_legacy_guest_of(u32 handle)
{
	struct fake_legacy_guest *guest;

	list_for_each_entry(guest, &fake_legacy_guests, node) {
		if (guest->handle == handle)
			return guest;
	}
	return NULL;
}

static u32 fake_legacy_start(struct sev_data_launch_start *start)
{
	struct fake_legacy_guest *guest = kzalloc(sizeof(*guest), GFP_KERNEL);

	if (!guest)
		return SEV_RET_RESOURCE_LIMIT;
	guest->handle = ++fake_legacy_handles;
	guest->policy = start->policy;
	guest->state = FAKE_LEGACY_LUPDATE;
	list_add_tail(&guest->node, &fake_legacy_guests);
	start->handle = guest->handle;
	return SEV_RET_SUCCESS;
}

static u32 fake_legacy_measure(struct fake_legacy_guest *guest,
			       struct sev_data_launch_measure *measure)
{
	if (measure->len < FAKE_LEGACY_MEASURE_SIZE) {
		measure->len = FAKE_LEGACY_MEASURE_SIZE;
		return SEV_RET_INVALID_LEN;
	}
	memset(__va(measure->address), 0, FAKE_LEGACY_MEASURE_SIZE);
	measure->len = FAKE_LEGACY_MEASURE_SIZE;
	guest->state = FAKE_LEGACY_LSECRET;
	return SEV_RET_SUCCESS;
}

static u32 fake_legacy_status(const struct fake_legacy_guest *guest,
			      struct sev_data_guest_status *status)
{
	status->policy = guest->policy;
	status->asid = guest->asid;
	status->state = guest->state;
	return SEV_RET_SUCCESS;
}

static void fake_legacy_free(struct fake_legacy_guest *guest)
{
	list_del(&guest->node);
	kfree(guest);
}

/* A command whose buffer begins with the guest's handle. */
static u32 fake_legacy_guest_command(int id, void *data)
{
	struct fake_legacy_guest *guest = fake_legacy_guest_of(*(u32 *)data);

	if (!guest)
		return SEV_RET_INVALID_GUEST;

	switch (id) {
	case SEV_CMD_ACTIVATE:
		guest->asid = ((struct sev_data_activate *)data)->asid;
		return SEV_RET_SUCCESS;
	case SEV_CMD_DEACTIVATE:
		guest->asid = 0;
		return SEV_RET_SUCCESS;
	case SEV_CMD_DECOMMISSION:
		fake_legacy_free(guest);
		return SEV_RET_SUCCESS;
	case SEV_CMD_GUEST_STATUS:
		return fake_legacy_status(guest, data);
	}

	if (guest->state == FAKE_LEGACY_RUNNING)
		return SEV_RET_INVALID_GUEST_STATE;

	switch (id) {
	case SEV_CMD_LAUNCH_UPDATE_DATA:
	case SEV_CMD_LAUNCH_UPDATE_VMSA:
		return SEV_RET_SUCCESS;
	case SEV_CMD_LAUNCH_MEASURE:
		return fake_legacy_measure(guest, data);
	case SEV_CMD_LAUNCH_FINISH:
		guest->state = FAKE_LEGACY_RUNNING;
		return SEV_RET_SUCCESS;
	}
	return SEV_RET_UNSUPPORTED;
}

static u32 fake_legacy_command(int id, void *data)
{
	switch (id) {
	case SEV_CMD_DF_FLUSH:
		return SEV_RET_SUCCESS;
	case SEV_CMD_LAUNCH_START:
		return fake_legacy_start(data);
	case SEV_CMD_ACTIVATE:
	case SEV_CMD_DEACTIVATE:
	case SEV_CMD_DECOMMISSION:
	case SEV_CMD_GUEST_STATUS:
	case SEV_CMD_LAUNCH_UPDATE_DATA:
	case SEV_CMD_LAUNCH_UPDATE_VMSA:
	case SEV_CMD_LAUNCH_MEASURE:
	case SEV_CMD_LAUNCH_FINISH:
		return fake_legacy_guest_command(id, data);
	}
	return SEV_RET_UNSUPPORTED;
}

#endif /* FAKE_LEGACY_H */
