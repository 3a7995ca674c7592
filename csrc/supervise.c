/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/kcmp.h>
#include <linux/seccomp.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <fcntl.h>
#include <unistd.h>

#include "kvmlaunch.h"

/* Linux 6.6, include/uapi/linux/seccomp.h. */
#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, __u64)
#define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP (1UL << 0)
#endif

enum { PAGE = 4096 };

#ifdef __x86_64__

/* Offsets into struct seccomp_data: the low words of arguments on a little-endian machine. */
#define ARG(n) (offsetof(struct seccomp_data, args) + 8 * (n))
#define LOAD(offset) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (offset))
#define ALLOW BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#define TRAP BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF)
#define TRAP_IF(value) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), 0, 1), TRAP
#define ALLOW_IF(value) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), 0, 1), ALLOW
#define SKIP_UNLESS(value, count) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), 0, (count))

static const struct sock_filter filter[] = {
	LOAD(offsetof(struct seccomp_data, arch)),
	SKIP_UNLESS(AUDIT_ARCH_X86_64, 1),
	BPF_STMT(BPF_JMP | BPF_JA, 1),
	ALLOW,
	LOAD(offsetof(struct seccomp_data, nr)),
	TRAP_IF(SYS_openat),
	TRAP_IF(SYS_open),
	TRAP_IF(SYS_openat2),
	TRAP_IF(SYS_access),
	TRAP_IF(SYS_faccessat),
	TRAP_IF(SYS_faccessat2),
	TRAP_IF(SYS_fallocate),
	SKIP_UNLESS(SYS_mmap, 4),
	LOAD(ARG(4)),
	ALLOW_IF(0xffffffff),
	TRAP,
	SKIP_UNLESS(SYS_ioctl, 7),
	LOAD(ARG(1)),
	BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0xff00),
	TRAP_IF(0xae00), /* KVMIO */
	TRAP_IF(0x5300), /* SEV_IOC_TYPE */
	ALLOW,
	/* The simulated CPU can't make CPUID fault; this one may, for us. */
	SKIP_UNLESS(SYS_arch_prctl, 7),
	LOAD(ARG(0)),
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, KL_ARCH_SET_CPUID, 1, 0),
	ALLOW,
	LOAD(ARG(2)),
	ALLOW_IF(KL_OUR_CALL),
	BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENODEV),
	ALLOW,
};

static int install_filter(void)
{
	struct sock_fprog program = { sizeof(filter) / sizeof(filter[0]),
				      (struct sock_filter *)filter };
	unsigned int flags = SECCOMP_FILTER_FLAG_NEW_LISTENER |
			     SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
	int fd = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);

	/* Without CAP_SYS_ADMIN it takes the promise to gain no rights by execve. */
	if (fd < 0 && errno == EACCES && !prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		fd = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
	return fd;
}

#else

static int install_filter(void)
{
	errno = ENOSYS;
	return -1;
}

#endif

/* What the child tells: the listener goes along with stage 0. */
struct message {
	int32_t stage;
	int32_t err;
};

union control {
	char room[CMSG_SPACE(sizeof(int))];
	struct cmsghdr align;
};

static void tell(int to, int stage, int fd)
{
	struct message message = { stage, errno };
	struct iovec part = { &message, sizeof(message) };
	union control control = { 0 };
	struct msghdr header = { .msg_iov = &part, .msg_iovlen = 1 };

	if (fd >= 0) {
		header.msg_control = control.room;
		header.msg_controllen = sizeof(control.room);
		CMSG_FIRSTHDR(&header)->cmsg_level = SOL_SOCKET;
		CMSG_FIRSTHDR(&header)->cmsg_type = SCM_RIGHTS;
		CMSG_FIRSTHDR(&header)->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(CMSG_FIRSTHDR(&header)), &fd, sizeof(int));
	}
	if (sendmsg(to, &header, MSG_NOSIGNAL) < 0)
		_exit(127);
}

/* False at the end: the program was started. */
static int hear(int from, struct message *message, int *fd)
{
	struct iovec part = { message, sizeof(*message) };
	union control control = { 0 };
	struct msghdr header = { .msg_iov = &part, .msg_iovlen = 1,
				 .msg_control = control.room,
				 .msg_controllen = sizeof(control.room) };
	ssize_t got;

	do {
		got = recvmsg(from, &header, MSG_CMSG_CLOEXEC);
	} while (got < 0 && errno == EINTR);
	if (got != sizeof(*message))
		return 0;
	if (CMSG_FIRSTHDR(&header))
		memcpy(fd, CMSG_DATA(CMSG_FIRSTHDR(&header)), sizeof(int));
	return 1;
}

/* Signals as a program expects them: Python ignores some. */
static void default_signals(void)
{
	static const int changed[] = { SIGPIPE, SIGXFSZ, SIGINT, SIGQUIT };
	sigset_t none;

	for (unsigned int i = 0; i < sizeof(changed) / sizeof(changed[0]); i++)
		signal(changed[i], SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

static void run_child(int to, const char *file, char *const argv[], char *const envp[])
{
	int listener;
	char go;

	default_signals();
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	listener = install_filter();
	if (listener < 0) {
		tell(to, KL_SPAWN_FILTER, -1);
		_exit(127);
	}
	tell(to, 0, listener);
	close(listener);
	/* Not before the parent is ready, and traces us if it wants to. */
	if (read(to, &go, 1) != 1)
		_exit(127);
	execve(file, argv, envp);
	tell(to, KL_SPAWN_EXEC, -1);
	_exit(127);
}

/* The child's side of the start has been heard: let it go on. */
static void let_go(int to, struct kl_spawned *spawned, int traced)
{
	struct kl_result done = { 0, 0 };

	if (traced)
		done = kl_trace(spawned->pid);
	if (done.ret >= 0)
		done = result(write(to, "", 1));
	if (done.ret < 0) {
		spawned->stage = KL_SPAWN_TRACE;
		spawned->err = done.err;
	}
}

struct kl_spawned kl_spawn(const char *file, char *const argv[], char *const envp[], int traced)
{
	struct kl_spawned spawned = { -1, -1, 0, 0 };
	struct message message = { 0 };
	int ends[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends)) {
		spawned.stage = KL_SPAWN_FORK;
		spawned.err = errno;
		return spawned;
	}
	/* Processes that the program leaves behind stay ours to look into, and to wait for. */
	prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
	spawned.pid = fork();
	if (!spawned.pid)
		run_child(ends[1], file, argv, envp);
	if (spawned.pid < 0) {
		spawned.stage = KL_SPAWN_FORK;
		spawned.err = errno;
	}
	close(ends[1]);
	while (!spawned.stage && hear(ends[0], &message, &spawned.listener)) {
		spawned.stage = message.stage;
		spawned.err = message.err;
		if (!spawned.stage)
			let_go(ends[0], &spawned, traced);
	}
	close(ends[0]);
	if (!spawned.stage && spawned.listener < 0) {
		/* It was killed before it could tell. */
		spawned.stage = KL_SPAWN_FORK;
		spawned.err = ECHILD;
	}
	if (!spawned.stage) {
		/* Refused before Linux 6.6: it is only faster. */
		ioctl(spawned.listener, SECCOMP_IOCTL_NOTIF_SET_FLAGS,
		      SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP);
		return spawned;
	}
	if (spawned.listener >= 0)
		close(spawned.listener);
	while (spawned.pid > 0 && waitpid(spawned.pid, NULL, 0) < 0 && errno == EINTR)
		;
	return spawned;
}

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
