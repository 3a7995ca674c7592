/* SPDX-License-Identifier: Apache-2.0 */
/* How a supervised program is started: with the filter whose listener gets its calls. */
#define _GNU_SOURCE
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kvmlaunch.h"

/* Linux 6.6, include/uapi/linux/seccomp.h. */
#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, __u64)
#define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP (1UL << 0)
#endif

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

/*
 * Signals as a program expects them: Python ignores two for itself, and catches SIGINT, but not
 * where its caller ignores that, as the shell does for what it starts in the background.
 */
static void default_signals(void)
{
	sigset_t none;

	signal(SIGPIPE, SIG_DFL);
	signal(SIGXFSZ, SIG_DFL);
	if (signal(SIGINT, SIG_DFL) == SIG_IGN)
		signal(SIGINT, SIG_IGN);
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
