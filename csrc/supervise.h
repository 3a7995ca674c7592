/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The C side of the supervisor: a program whose calls on /dev/kvm and /dev/sev
 * stop at a seccomp listener, and the memory of such a program.
 *
 * The build turns this file into the cffi declarations as well.
 */

/* What went wrong in kl_spawn(). */
#define KL_SPAWN_FORK 1
#define KL_SPAWN_FILTER 2
#define KL_SPAWN_EXEC 3
#define KL_SPAWN_TRACE 4

/* pid is the new process and listener the descriptor, or stage says what failed with err. */
struct kl_spawned {
	int32_t pid;
	int32_t listener;
	int32_t stage;
	int32_t err;
};

struct kl_spawned kl_spawn(const char *file, char *const argv[], char *const envp[], int traced);

/*
 * arch_prctl() lets CPUID fault (Linux, arch/x86/include/uapi/asm/prctl.h). Programs can't, but
 * for a call of ours, marked by a third argument, which the kernel doesn't have.
 */
#define KL_ARCH_SET_CPUID 0x1012
#define KL_OUR_CALL 0x6b6c6375

/* What this machine's CPUID instruction gives: EAX, EBX, ECX, EDX. */
void kl_native_cpuid(uint32_t function, uint32_t index, uint32_t *registers);

/* Whether the instruction can be made to fault (CPUID faulting). */
int kl_can_trap_cpuid(void);

/* Trace a process that is about to exec, and all that come from it. */
struct kl_result kl_trace(int pid);

/* Bits of a leaf that a program shall see instead of the machine's. */
struct kl_cpuid {
	uint32_t function;
	uint32_t index;
	int32_t is_indexed;
	uint32_t mask[4];
	uint32_t value[4];
};

/*
 * Wait for the end of a child or traced thread: ret is its id. CPUID instructions of traced
 * ones are answered meanwhile. Or for a signal of the mask (bit N-1 is signal N), which the
 * caller blocks, as it does SIGCHLD: ret is 0 then.
 */
struct kl_result kl_wait(const struct kl_cpuid *table, uint32_t count, uint64_t mask, int *status,
			 int *signal);

#define KL_NR_ioctl SYS_ioctl
#define KL_NR_mmap SYS_mmap
#define KL_NR_fallocate SYS_fallocate
#define KL_NR_open SYS_open
#define KL_NR_openat SYS_openat
#define KL_NR_openat2 SYS_openat2
#define KL_NR_access SYS_access
#define KL_NR_faccessat SYS_faccessat
#define KL_NR_faccessat2 SYS_faccessat2

/* One call that the supervisor has to answer. */
struct kl_call {
	uint64_t id;
	uint32_t tid;
	int32_t nr;
	uint64_t args[6];
	uint64_t inode; /* of the memfd that the call is about, 0 for another file */
	int32_t released; /* whether events wait at the watch */
	char path[256]; /* what it opens or asks access to, else empty */
};

/* listener; watch: inotify; device: that of memfds. */
struct kl_trap {
	int32_t listener;
	int32_t watch;
	uint64_t device;
};

/*
 * Wait for a call that needs an answer; others go on to the kernel. EINTR is returned, and
 * ENOENT once no process is left.
 */
struct kl_result kl_next_call(const struct kl_trap *trap, struct kl_call *call);

/* Answer with a value, or with errno err; ENOENT where the caller is gone. */
struct kl_result kl_answer(int listener, uint64_t id, int64_t value, int err);

/* Let the kernel do it. */
struct kl_result kl_pass_on(int listener, uint64_t id);

/* Give the caller a duplicate of fd; ret is its number there. */
struct kl_result kl_give_fd(int listener, uint64_t id, int fd, int cloexec);

/* Whether the caller still waits for its answer. */
int kl_still_waits(int listener, uint64_t id);

/* Inode of the memfd behind a descriptor of another process, 0 for another file. */
struct kl_result kl_memfd_inode(uint64_t device, int tid, int fd);

/* A duplicate of another process's descriptor. */
struct kl_result kl_take_fd(int process, int fd);

/* Whether both are threads on one address space: 1, 0, or -1 where one is gone. */
int kl_same_memory(int tid, int other);

#define KL_IN_OPEN IN_OPEN
#define KL_IN_CLOSE IN_CLOSE

/* What happened to the file of a watch. */
struct kl_event {
	int32_t watch;
	uint32_t mask;
};

/* inotify: a new instance, and watches of files by path. */
struct kl_result kl_watch_new(void);
struct kl_result kl_watch_add(int inotify, const char *path, uint32_t mask);
struct kl_result kl_watch_remove(int inotify, int watch);

/* How many events were read, 0 where none waits. */
int kl_watch_read(int inotify, struct kl_event *events, int room);

/* Nobody can change the size of a memfd any more. */
struct kl_result kl_fix_size(int memfd);

/* Copy from or to an address of another process. */
struct kl_result kl_peek_at(int tid, uint64_t addr, void *to, uint64_t length);
struct kl_result kl_poke_at(int tid, uint64_t addr, const void *from, uint64_t length);

/* A page of another process and its copy here; base is what both were when last compared. */
struct kl_copy {
	uint64_t there;
	uint64_t here;
	uint64_t base;
	int32_t lost; /* it can't be read there any more */
};

/* How many pages were changed there, and how many can't be read or written any more. */
struct kl_merged {
	int64_t changed;
	int64_t lost;
};

/* Bring changes of either side to the other. Nothing may write to the copies meanwhile. */
struct kl_merged kl_merge(int tid, struct kl_copy *copies, uint64_t count);
