/* SPDX-License-Identifier: Apache-2.0 */
/* What a supervised process has: its memory, and the files behind its descriptors. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kcmp.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "kvmlaunch.h"

enum { PAGE = 4096 };

struct kl_result kl_watch_new(void)
{
	return result(inotify_init1(IN_NONBLOCK | IN_CLOEXEC));
}

struct kl_result kl_watch_add(int inotify, const char *path, uint32_t mask)
{
	return result(inotify_add_watch(inotify, path, mask));
}

struct kl_result kl_watch_remove(int inotify, int watch)
{
	return result(inotify_rm_watch(inotify, watch));
}

int kl_watch_read(int inotify, struct kl_event *events, int room)
{
	struct inotify_event found[64]; /* of files, so without names */
	int count = 0, most = room < 64 ? room : 64;
	ssize_t got = read(inotify, found, (size_t)most * sizeof(found[0]));

	for (; got > 0 && count < got / (ssize_t)sizeof(found[0]); count++) {
		events[count].watch = found[count].wd;
		events[count].mask = found[count].mask;
	}
	return count;
}

struct kl_result kl_fix_size(int memfd)
{
	return result(fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL));
}

static struct kl_result whole(ssize_t moved, uint64_t length)
{
	if (moved >= 0 && (uint64_t)moved != length) {
		errno = EFAULT;
		moved = -1;
	}
	return result(moved);
}

struct kl_result kl_peek_at(int tid, uint64_t addr, void *to, uint64_t length)
{
	struct iovec local = { to, length };
	struct iovec remote = { (void *)(uintptr_t)addr, length };

	return whole(process_vm_readv(tid, &local, 1, &remote, 1, 0), length);
}

struct kl_result kl_poke_at(int tid, uint64_t addr, const void *from, uint64_t length)
{
	struct iovec local = { (void *)(uintptr_t)from, length };
	struct iovec remote = { (void *)(uintptr_t)addr, length };

	return whole(process_vm_writev(tid, &local, 1, &remote, 1, 0), length);
}

struct kl_result kl_memfd_inode(uint64_t device, int tid, int fd)
{
	char link[64];
	struct stat status;

	snprintf(link, sizeof(link), "/proc/%d/fd/%d", tid, fd);
	if (stat(link, &status))
		return result(-1);
	return result(status.st_dev == device ? (int64_t)status.st_ino : 0);
}

struct kl_result kl_take_fd(int process, int fd)
{
	int pidfd = (int)syscall(SYS_pidfd_open, process, 0);
	struct kl_result taken = result(pidfd);

	if (pidfd >= 0) {
		taken = result(syscall(SYS_pidfd_getfd, pidfd, fd, 0));
		close(pidfd);
	}
	return taken;
}

int kl_same_memory(int tid, int other)
{
	long order = syscall(SYS_kcmp, tid, other, KCMP_VM, 0, 0);

	return order < 0 ? -1 : order == 0;
}

enum { BATCH = 32 };

/* Read pages into the scratch area; how many before the first that can't be read. */
static uint64_t read_pages(int tid, const struct kl_copy *copies, uint64_t count, void *to)
{
	struct iovec local = { to, count * PAGE };
	struct iovec remote[BATCH];
	ssize_t moved;

	for (uint64_t i = 0; i < count; i++) {
		remote[i].iov_base = (void *)(uintptr_t)copies[i].there;
		remote[i].iov_len = PAGE;
	}
	moved = process_vm_readv(tid, &local, 1, remote, count, 0);
	return moved < 0 ? 0 : (uint64_t)moved / PAGE;
}

/* Write each run of words that changed here; a word that changed on both sides by bytes. */
static void push(int tid, struct kl_copy *copy, uint64_t *now)
{
	uint64_t *here = (uint64_t *)(uintptr_t)copy->here;
	const uint64_t *base = (const uint64_t *)(uintptr_t)copy->base;
	struct iovec local[PAGE / 16], remote[PAGE / 16];
	unsigned int parts = 0;

	for (unsigned int at = 0; at < PAGE / 8; at++) {
		unsigned int first = at;

		for (; at < PAGE / 8 && here[at] != base[at]; at++) {
			uint8_t *mine = (uint8_t *)&here[at];
			const uint8_t *before = (const uint8_t *)&base[at];
			const uint8_t *theirs = (const uint8_t *)&now[at];

			for (unsigned int byte = 0; now[at] != base[at] && byte < 8; byte++) {
				if (mine[byte] == before[byte])
					mine[byte] = theirs[byte];
			}
			now[at] = here[at];
		}
		if (at == first)
			continue;
		local[parts].iov_base = &here[first];
		remote[parts].iov_base = (void *)(uintptr_t)(copy->there + 8 * first);
		local[parts].iov_len = remote[parts].iov_len = 8 * (at - first);
		parts++;
	}
	if (process_vm_writev(tid, local, parts, remote, parts, 0) < 0)
		copy->lost = 1;
}

struct kl_merged kl_merge(int tid, struct kl_copy *copies, uint64_t count)
{
	uint64_t scratch[BATCH * PAGE / 8];
	struct kl_merged merged = { 0, 0 };

	for (uint64_t at = 0; at < count;) {
		uint64_t size = count - at < BATCH ? count - at : BATCH;
		uint64_t got = read_pages(tid, copies + at, size, scratch);

		for (uint64_t i = 0; i < got; i++) {
			struct kl_copy *copy = &copies[at + i];
			uint64_t *here = (uint64_t *)(uintptr_t)copy->here;
			uint64_t *base = (uint64_t *)(uintptr_t)copy->base;
			uint64_t *now = scratch + i * (PAGE / 8);
			int changed = memcmp(now, base, PAGE) != 0;

			merged.changed += changed;
			if (memcmp(here, base, PAGE))
				push(tid, copy, now);
			else if (!changed)
				continue;
			memcpy(here, now, PAGE);
			memcpy(base, now, PAGE);
			merged.lost += copy->lost;
		}
		at += got;
		if (got < size) {
			copies[at++].lost = 1;
			merged.lost++;
		}
	}
	return merged;
}
