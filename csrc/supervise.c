/* SPDX-License-Identifier: Apache-2.0 */
/* Calls that come from the listener, and their answers. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/seccomp.h>
#include <string.h>

#include "kvmlaunch.h"

enum { PAGE = 4096 };

/* The string at addr up to its end, or nothing if that doesn't come in time. */
static void read_path(struct kl_call *call, uint64_t addr)
{
	uint64_t done = 0;

	while (done < sizeof(call->path)) {
		uint64_t size = PAGE - (addr + done) % PAGE;

		if (size > sizeof(call->path) - done)
			size = sizeof(call->path) - done;
		if (kl_peek_at((int)call->tid, addr + done, call->path + done, size).ret < 0)
			break;
		if (memchr(call->path + done, 0, size))
			return;
		done += size;
	}
	call->path[0] = 0;
}

static int ends_with(const char *path, const char *name)
{
	size_t length = strlen(path), wanted = strlen(name);

	return length >= wanted && !strcmp(path + length - wanted, name);
}

static int starts_with(const char *path, const char *name)
{
	return !strncmp(path, name, strlen(name));
}

/* As what is in /proc/PID/fd. */
static int ends_with_number(const char *path)
{
	const char *name = strrchr(path, '/');

	name = name ? name + 1 : path;
	return *name && !name[strspn(name, "0123456789")];
}

static int is_of_interest(const struct kl_trap *trap, struct kl_call *call)
{
	int fd = (int)call->args[0];

	switch (call->nr) {
	case SYS_open:
	case SYS_access:
		read_path(call, call->args[0]);
		break;
	case SYS_openat:
	case SYS_openat2:
	case SYS_faccessat:
	case SYS_faccessat2:
		read_path(call, call->args[1]);
		break;
	case SYS_mmap:
		fd = (int)call->args[4];
		/* fall through */
	default:
		call->inode = (uint64_t)kl_memfd_inode(trap->device, (int)call->tid, fd).ret;
		return call->inode != 0 && call->inode != UINT64_MAX;
	}
	return ends_with(call->path, "kvm") || ends_with(call->path, "sev") ||
	       ends_with_number(call->path) || starts_with(call->path, "/sys/module/kvm");
}

struct kl_result kl_next_call(const struct kl_trap *trap, struct kl_call *call)
{
	for (;;) {
		struct seccomp_notif notif = { 0 };
		int waiting = 0;

		if (ioctl(trap->listener, SECCOMP_IOCTL_NOTIF_RECV, &notif))
			return result(-1);
		memset(call, 0, sizeof(*call));
		call->id = notif.id;
		call->tid = notif.pid;
		call->nr = notif.data.nr;
		memcpy(call->args, notif.data.args, sizeof(call->args));
		if (!is_of_interest(trap, call)) {
			kl_pass_on(trap->listener, call->id);
			continue;
		}
		call->released = ioctl(trap->watch, FIONREAD, &waiting) || waiting;
		return result(0);
	}
}

static struct kl_result send_response(int listener, struct seccomp_notif_resp response)
{
	return result(ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &response));
}

struct kl_result kl_answer(int listener, uint64_t id, int64_t value, int err)
{
	struct seccomp_notif_resp response = { .id = id, .val = err ? 0 : value, .error = -err };

	return send_response(listener, response);
}

struct kl_result kl_pass_on(int listener, uint64_t id)
{
	struct seccomp_notif_resp response = { .id = id,
					       .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE };

	return send_response(listener, response);
}

struct kl_result kl_give_fd(int listener, uint64_t id, int fd, int cloexec)
{
	struct seccomp_notif_addfd addfd = { .id = id, .srcfd = (uint32_t)fd,
					     .newfd_flags = cloexec ? O_CLOEXEC : 0 };

	return result(ioctl(listener, SECCOMP_IOCTL_NOTIF_ADDFD, &addfd));
}

int kl_still_waits(int listener, uint64_t id)
{
	return !ioctl(listener, SECCOMP_IOCTL_NOTIF_ID_VALID, &id);
}
