/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "kvmlaunch.h"
#include "uapi_asserts.h"

static struct kl_result result(int64_t ret)
{
	struct kl_result r = { ret, ret == -1 ? errno : 0 };

	return r;
}

struct kl_result kl_open(const char *path, int flags)
{
	return result(open(path, flags));
}

struct kl_result kl_close(int fd)
{
	return result(close(fd));
}

struct kl_result kl_ioctl(int fd, uint64_t request, uint64_t arg)
{
	return result(ioctl(fd, (unsigned long)request, (unsigned long)arg));
}

struct kl_result kl_mmap(int fd, uint64_t length, int prot, int flags, uint64_t offset)
{
	/* MAP_FAILED is -1 as well, so ret and err follow the common rule. */
	return result((int64_t)(intptr_t)mmap(NULL, length, prot, flags, fd, (off_t)offset));
}

struct kl_result kl_munmap(uint64_t addr, uint64_t length)
{
	return result(munmap((void *)(uintptr_t)addr, length));
}

struct kl_result kl_fallocate(int fd, int mode, uint64_t offset, uint64_t length)
{
	return result(fallocate(fd, mode, (off_t)offset, (off_t)length));
}

struct kl_result kl_discard(uint64_t addr, uint64_t length)
{
	return result(madvise((void *)(uintptr_t)addr, length, MADV_DONTNEED));
}

static struct kl_result whole(ssize_t moved, uint64_t length)
{
	if (moved >= 0 && (uint64_t)moved != length) {
		errno = EFAULT;
		moved = -1;
	}
	return result(moved);
}

struct kl_result kl_peek(uint64_t addr, void *to, uint64_t length)
{
	struct iovec local = { to, length };
	struct iovec remote = { (void *)(uintptr_t)addr, length };

	return whole(process_vm_readv(getpid(), &local, 1, &remote, 1, 0), length);
}

struct kl_result kl_poke(uint64_t addr, const void *from, uint64_t length)
{
	struct iovec local = { (void *)(uintptr_t)from, length };
	struct iovec remote = { (void *)(uintptr_t)addr, length };

	return whole(process_vm_writev(getpid(), &local, 1, &remote, 1, 0), length);
}

/*
 * Ready in every thread from its start: memory that is taken at the first use can't be had in
 * a handler, which may have interrupted malloc().
 */
static __thread volatile sig_atomic_t kicked __attribute__((tls_model("initial-exec")));

static void on_kick(int signo)
{
	(void)signo;
	kicked = 1;
}

int kl_take_kick(void)
{
	int taken = kicked;

	kicked = 0;
	return taken;
}

static void install_kick(void)
{
	struct sigaction action = { .sa_handler = on_kick };

	/* Without SA_RESTART, so that a kicked KVM_RUN returns EINTR. */
	sigemptyset(&action.sa_mask);
	sigaction(SIGRTMIN + 5, &action, NULL);
}

int kl_kick_signal(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, install_kick);
	return SIGRTMIN + 5;
}
