/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The CPUID instruction of supervised processes. Where the processor can make it fault, each
 * task is traced for that one fault: a program shall find the CPU of the simulated host.
 */
#define _GNU_SOURCE
#include "kvmlaunch.h"

#ifdef __x86_64__

#include <cpuid.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

/* Linux, arch/x86/include/asm/segment.h and entry/syscalls/syscall_32.tbl. */
enum { USER32_CS = 0x23, NR32_ARCH_PRCTL = 384 };

enum { SYSCALL_INSTRUCTION = 0x050f, INT80_INSTRUCTION = 0x80cd, CPUID_INSTRUCTION = 0xa20f };

enum { LENGTH = 2, SYSCALL_STOP = SIGTRAP | 0x80 };

void kl_native_cpuid(uint32_t function, uint32_t index, uint32_t *registers)
{
	__cpuid_count(function, index, registers[0], registers[1], registers[2], registers[3]);
}

int kl_can_trap_cpuid(void)
{
	int can = !syscall(SYS_arch_prctl, KL_ARCH_SET_CPUID, 0);

	if (can)
		syscall(SYS_arch_prctl, KL_ARCH_SET_CPUID, 1);
	return can;
}

struct kl_result kl_trace(int pid)
{
	unsigned long options = PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_TRACECLONE |
				PTRACE_O_TRACEEXEC | PTRACE_O_TRACESYSGOOD |
				PTRACE_O_EXITKILL;

	return result(ptrace(PTRACE_SEIZE, pid, 0, options));
}

static void answer(const struct kl_cpuid *table, uint32_t count, struct user_regs_struct *regs)
{
	uint32_t function = (uint32_t)regs->rax, index = (uint32_t)regs->rcx;
	uint32_t found[4];

	kl_native_cpuid(function, index, found);
	for (uint32_t i = 0; i < count; i++) {
		const struct kl_cpuid *leaf = &table[i];

		if (leaf->function != function || (leaf->is_indexed && leaf->index != index))
			continue;
		for (int r = 0; r < 4; r++)
			found[r] = (found[r] & ~leaf->mask[r]) | (leaf->value[r] & leaf->mask[r]);
		break;
	}
	regs->rax = found[0];
	regs->rbx = found[1];
	regs->rcx = found[2];
	regs->rdx = found[3];
	regs->rip += LENGTH;
}

/*
 * Whether a SIGSEGV was a CPUID instruction, which has been answered then. One thing isn't
 * undone: where SIGSEGV was blocked or ignored, the kernel has made its action the default.
 */
static int emulate(const struct kl_cpuid *table, uint32_t count, int tid)
{
	struct user_regs_struct regs;
	siginfo_t info;
	uint16_t code;

	if (ptrace(PTRACE_GETSIGINFO, tid, 0, &info) || info.si_code != SI_KERNEL)
		return 0;
	if (ptrace(PTRACE_GETREGS, tid, 0, &regs))
		return 0;
	if (kl_peek_at(tid, regs.rip, &code, sizeof(code)).ret < 0 || code != CPUID_INSTRUCTION)
		return 0;
	answer(table, count, &regs);
	return !ptrace(PTRACE_SETREGS, tid, 0, &regs);
}

/*
 * Let a task go on to where a system call begins or ends. False: it has ended instead, and
 * *status says how. Of signals only SIGSTOP can come first; *stop tells that it did.
 */
static int to_syscall(int tid, int *status, int *stop)
{
	do {
		/* Fails where the task is being killed: its end comes next. */
		ptrace(PTRACE_SYSCALL, tid, 0, 0);
		*status = 0;
		while (waitpid(tid, status, __WALL) < 0 && errno == EINTR)
			;
		if (!WIFSTOPPED(*status))
			return 0;
		if (*status >> 8 == SIGSTOP)
			*stop = SIGSTOP;
	} while (WSTOPSIG(*status) != SYSCALL_STOP);
	return 1;
}

/* Registers of a task that asks the kernel to let CPUID fault, with the instruction at code. */
static struct user_regs_struct asking(const struct user_regs_struct *from, uint64_t code)
{
	struct user_regs_struct regs = *from;

	regs.rip = code;
	if (regs.cs == USER32_CS) {
		regs.rax = NR32_ARCH_PRCTL;
		regs.rbx = KL_ARCH_SET_CPUID;
		regs.rcx = 0;
	} else {
		regs.rax = SYS_arch_prctl;
		regs.rdi = KL_ARCH_SET_CPUID;
		regs.rsi = 0;
		regs.rdx = KL_OUR_CALL;
	}
	return regs;
}

/*
 * Let a task that is in its execve ask that CPUID faults: the call is put where the program
 * begins, and taken away again. False: the task has ended, and *status says how.
 */
static int make_cpuid_fault(int tid, int *status, int *stop)
{
	struct user_regs_struct before, regs;
	uint64_t mask, all = ~0ULL, at;
	long code, call;
	int alive;

	if (!to_syscall(tid, status, stop))
		return 0;
	/* Signals wait, or they would find the registers of the call. */
	if (ptrace(PTRACE_GETREGS, tid, 0, &before) ||
	    ptrace(PTRACE_GETSIGMASK, tid, sizeof(mask), &mask))
		return 1;
	at = before.rip & ~7ULL;
	errno = 0;
	code = ptrace(PTRACE_PEEKTEXT, tid, at, 0);
	if (errno)
		return 1;
	call = before.cs == USER32_CS ? INT80_INSTRUCTION : SYSCALL_INSTRUCTION;
	regs = asking(&before, at);
	ptrace(PTRACE_SETSIGMASK, tid, sizeof(all), &all);
	ptrace(PTRACE_POKETEXT, tid, at, (code & ~0xffffL) | call);
	ptrace(PTRACE_SETREGS, tid, 0, &regs);
	alive = to_syscall(tid, status, stop) && to_syscall(tid, status, stop);
	if (alive) {
		ptrace(PTRACE_POKETEXT, tid, at, code);
		ptrace(PTRACE_SETREGS, tid, 0, &before);
		ptrace(PTRACE_SETSIGMASK, tid, sizeof(mask), &mask);
	}
	return alive;
}

static int is_stop_signal(int signal)
{
	return signal == SIGSTOP || signal == SIGTSTP || signal == SIGTTIN || signal == SIGTTOU;
}

/* False: the task has ended, and *status says how. */
static int go_on(const struct kl_cpuid *table, uint32_t count, int tid, int *status)
{
	int signal = WSTOPSIG(*status), event = *status >> 16;

	if (event == PTRACE_EVENT_STOP && is_stop_signal(signal)) {
		ptrace(PTRACE_LISTEN, tid, 0, 0);
		return 1;
	}
	if (event || (signal == SIGSEGV && emulate(table, count, tid)))
		signal = 0;
	if (event == PTRACE_EVENT_EXEC && !make_cpuid_fault(tid, status, &signal))
		return 0;
	ptrace(PTRACE_CONT, tid, 0, signal);
	return 1;
}

struct kl_result kl_wait(const struct kl_cpuid *table, uint32_t count, uint64_t mask, int *status,
			 int *signal)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	for (int number = 1; number <= 64; number++) {
		if (mask >> (number - 1) & 1)
			sigaddset(&set, number);
	}
	for (;;) {
		int tid = waitpid(-1, status, __WALL | WNOHANG);

		if (tid > 0 && WIFSTOPPED(*status) && go_on(table, count, tid, status))
			continue;
		if (tid)
			return result(tid);
		*signal = sigwaitinfo(&set, NULL);
		if (*signal != SIGCHLD)
			return result(*signal < 0 ? -1 : 0);
	}
}

#else /* programs are supervised on x86-64 only */

void kl_native_cpuid(uint32_t function, uint32_t index, uint32_t *registers)
{
}

int kl_can_trap_cpuid(void)
{
	return 0;
}

struct kl_result kl_trace(int pid)
{
	errno = ENOSYS;
	return result(-1);
}

struct kl_result kl_wait(const struct kl_cpuid *table, uint32_t count, uint64_t mask,
			 int *status, int *signal)
{
	errno = ENOSYS;
	return result(-1);
}

#endif
