/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The CPUID instruction of supervised processes. Where the processor can make it fault, each
 * task is traced for that one fault: a program shall find the CPU of the simulated host.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kvmlaunch.h"

/* Linux, arch/x86/include/uapi/asm/prctl.h. */
enum { ARCH_SET_CPUID = 0x1012 };

enum { SYSCALL_INSTRUCTION = 0x050f, CPUID_INSTRUCTION = 0xa20f, LENGTH = 2 };

static struct kl_result result(int64_t ret)
{
	struct kl_result r = { ret, ret == -1 ? errno : 0 };

	return r;
}

void kl_native_cpuid(uint32_t function, uint32_t index, uint32_t *registers)
{
	__cpuid_count(function, index, registers[0], registers[1], registers[2], registers[3]);
}

int kl_can_trap_cpuid(void)
{
	int can = !syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);

	if (can)
		syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
	return can;
}

struct kl_result kl_trace(int pid)
{
	unsigned long options = PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_TRACECLONE |
				PTRACE_O_TRACEEXEC | PTRACE_O_EXITKILL;

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

/* Whether the fault was a CPUID instruction, which has been answered then. */
static int emulate(const struct kl_cpuid *table, uint32_t count, int tid)
{
	struct user_regs_struct regs;
	uint16_t code;

	if (ptrace(PTRACE_GETREGS, tid, 0, &regs))
		return 0;
	if (kl_peek_at(tid, regs.rip, &code, sizeof(code)).ret < 0 || code != CPUID_INSTRUCTION)
		return 0;
	answer(table, count, &regs);
	return !ptrace(PTRACE_SETREGS, tid, 0, &regs);
}

/* One step: the signal that came instead of its end is left in *signal. False: it is gone. */
static int step(int tid, struct user_regs_struct *regs, int *signal)
{
	int status;

	if (ptrace(PTRACE_SINGLESTEP, tid, 0, 0) || waitpid(tid, &status, __WALL) != tid)
		return 0;
	if (WIFSTOPPED(status) && WSTOPSIG(status) != SIGTRAP)
		*signal = WSTOPSIG(status);
	return WIFSTOPPED(status) && !ptrace(PTRACE_GETREGS, tid, 0, regs);
}

/*
 * Let a task that stands behind its execve ask that CPUID faults. Returns the signal that it
 * gets then.
 */
static int make_cpuid_fault(int tid)
{
	struct user_regs_struct before, regs;
	int signal = 0;
	long code;

	/* The end of the execve is a step of its own. */
	if (!step(tid, &before, &signal))
		return signal;
	code = ptrace(PTRACE_PEEKTEXT, tid, before.rip, 0);
	ptrace(PTRACE_POKETEXT, tid, before.rip, (code & ~0xffffL) | SYSCALL_INSTRUCTION);
	do {
		regs = before;
		regs.rax = SYS_arch_prctl;
		regs.rdi = ARCH_SET_CPUID;
		regs.rsi = 0;
		ptrace(PTRACE_SETREGS, tid, 0, &regs);
	} while (step(tid, &regs, &signal) && regs.rip == before.rip);
	ptrace(PTRACE_POKETEXT, tid, before.rip, code);
	ptrace(PTRACE_SETREGS, tid, 0, &before);
	return signal;
}

static int is_stop_signal(int signal)
{
	return signal == SIGSTOP || signal == SIGTSTP || signal == SIGTTIN || signal == SIGTTOU;
}

static void go_on(const struct kl_cpuid *table, uint32_t count, int tid, int status)
{
	int signal = WSTOPSIG(status), event = status >> 16;

	if (event == PTRACE_EVENT_STOP && is_stop_signal(signal)) {
		ptrace(PTRACE_LISTEN, tid, 0, 0);
		return;
	}
	if (event == PTRACE_EVENT_EXEC)
		signal = make_cpuid_fault(tid);
	else if (event || (signal == SIGSEGV && emulate(table, count, tid)))
		signal = 0;
	ptrace(PTRACE_CONT, tid, 0, signal);
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

		if (tid > 0 && WIFSTOPPED(*status)) {
			go_on(table, count, tid, *status);
			continue;
		}
		if (tid)
			return result(tid);
		*signal = sigwaitinfo(&set, NULL);
		if (*signal != SIGCHLD)
			return result(*signal < 0 ? -1 : 0);
	}
}
