/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The C side: system calls that keep ret and errno together, safe access to
 * user memory by address, and the run loop for exits that need no Python.
 *
 * The build turns this file into the cffi declarations as well.
 */

/* Numbers of libc that Python's own modules lack, at least before 3.14. */
#define KL_MAP_GUEST_RAM (MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
#define KL_EHWPOISON EHWPOISON
#define KL_FALLOC_KEEP_SIZE FALLOC_FL_KEEP_SIZE
#define KL_FALLOC_PUNCH_HOLE FALLOC_FL_PUNCH_HOLE
#define KL_FALLOC_COLLAPSE_RANGE FALLOC_FL_COLLAPSE_RANGE
#define KL_FALLOC_ZERO_RANGE FALLOC_FL_ZERO_RANGE
#define KL_FALLOC_INSERT_RANGE FALLOC_FL_INSERT_RANGE
#define KL_FALLOC_UNSHARE_RANGE FALLOC_FL_UNSHARE_RANGE

/* ret is the system call's result; err is errno where ret is -1, else 0. */
struct kl_result {
	int64_t ret;
	int32_t err;
};

struct kl_result kl_open(const char *path, int flags);
struct kl_result kl_close(int fd);
struct kl_result kl_ioctl(int fd, uint64_t request, uint64_t arg);
struct kl_result kl_mmap(int fd, uint64_t length, int prot, int flags, uint64_t offset);
struct kl_result kl_munmap(uint64_t addr, uint64_t length);
struct kl_result kl_fallocate(int fd, int mode, uint64_t offset, uint64_t length);

/* Free the pages of an anonymous private mapping; they read as zero afterwards. */
struct kl_result kl_discard(uint64_t addr, uint64_t length);

/* Copy from or to an address of this process: EFAULT instead of a crash. */
struct kl_result kl_peek(uint64_t addr, void *to, uint64_t length);
struct kl_result kl_poke(uint64_t addr, const void *from, uint64_t length);

/* Install the handler of the kick signal, once; returns the signal's number. */
int kl_kick_signal(void);

/* Whether this thread was kicked since it asked last: for a KVM_RUN that is no system call. */
int kl_take_kick(void);

/* A 16550 without input and without interrupts. */
struct kl_uart {
	uint16_t base;
	uint8_t regs[8];
	uint8_t divisor[2];
	uint32_t used;
	uint8_t text[8192];
};

void kl_uart_out(struct kl_uart *uart, uint16_t port, uint8_t value);
uint8_t kl_uart_in(struct kl_uart *uart, uint16_t port);

/*
 * Does the access of an exit if it is the console's: -1 if it isn't, 1 when text
 * should be shown now (a line is complete or the buffer is nearly full), else 0.
 */
int kl_console(struct kvm_run *run, struct kl_uart *uart);

/*
 * KVM_RUN until an exit needs Python. handled is 1 when the loop only stopped
 * to hand over console text: then the exit itself has been dealt with. EINTR is returned, not hidden.
 */
struct kl_exit {
	int64_t ret;
	int32_t err;
	int32_t handled;
	uint64_t runs;
};

struct kl_exit kl_run(int fd, struct kvm_run *run, struct kl_uart *uart);
