/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kvmlaunch.h"
#include "uapi_asserts.h"

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

struct kl_result kl_peek(uint64_t addr, void *to, uint64_t length)
{
	return kl_peek_at(getpid(), addr, to, length);
}

struct kl_result kl_poke(uint64_t addr, const void *from, uint64_t length)
{
	return kl_poke_at(getpid(), addr, from, length);
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
