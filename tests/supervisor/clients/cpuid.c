/* Programs that ask the CPU who it is, and what they notice of being watched at it. */
#define _GNU_SOURCE
#include "client.h"

#include <cpuid.h>
#include <setjmp.h>
#include <sys/time.h>

enum { THREADS = 8, TIMES = 300 };

static char *self = "/proc/self/exe";

static uint32_t c_bit(void)
{
	uint32_t a, b, c, d;

	__cpuid(0x8000001f, a, b, c, d);
	return b & 0x3f;
}

static void check_cpu(void)
{
	uint32_t a, vendor[3];

	__cpuid(0, a, vendor[0], vendor[2], vendor[1]);
	CHECK(!memcmp(vendor, "AuthenticAMD", sizeof(vendor)));
	CHECK(c_bit() == 51);
}

static void show(char **arguments)
{
	(void)arguments;
	check_cpu();
}

static void forked(char **arguments)
{
	(void)arguments;
	for (int i = 0; i < 10; i++) {
		int child = i % 2 ? fork() : vfork();

		if (!child) {
			check_cpu();
			_exit(i);
		}
		ends_with(child, i);
	}
	check_cpu();
}

static void *ask_often(void *unused)
{
	for (int i = 0; i < TIMES; i++)
		check_cpu();
	return unused;
}

static void threads(char **arguments)
{
	pthread_t thread[THREADS];

	(void)arguments;
	for (int i = 0; i < THREADS; i++)
		CHECK(!pthread_create(&thread[i], NULL, ask_often, NULL));
	for (int i = 0; i < THREADS; i++)
		CHECK(!pthread_join(thread[i], NULL));
}

static void execute(char *command)
{
	execl(self, "cpuid", command, NULL);
	fail(__FILE__, __LINE__, "execl");
}

static void *execute_show(void *unused)
{
	execute("show");
	return unused;
}

/* The thread that calls execve takes over the number of the first one. */
static void executed_by_thread(char **arguments)
{
	pthread_t thread;

	(void)arguments;
	CHECK(!pthread_create(&thread, NULL, ask_often, NULL));
	CHECK(!pthread_create(&thread, NULL, execute_show, NULL));
	for (;;)
		pause();
}

static void *exit_later(void *unused)
{
	ask_often(NULL);
	exit(9);
	return unused;
}

/* The first thread is gone long before the process. */
static void left_by_first_thread(char **arguments)
{
	pthread_t thread;

	(void)arguments;
	CHECK(!pthread_create(&thread, NULL, exit_later, NULL));
	pthread_exit(NULL);
}

static sigjmp_buf back;
static siginfo_t caught;

static void catch(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	caught = *info;
	siglongjmp(back, 1);
}

#define CAUGHT(does, code, address)                                                            \
	do {                                                                                   \
		if (!sigsetjmp(back, 1)) {                                                     \
			does;                                                                  \
			fail(__FILE__, __LINE__, "no signal");                                 \
		}                                                                              \
		CHECK(caught.si_code == (code) && caught.si_addr == (address));                \
	} while (0)

/* A program's own SIGSEGVs are its own. */
static void handler(char **arguments)
{
	struct sigaction action = { .sa_sigaction = catch, .sa_flags = SA_SIGINFO };

	(void)arguments;
	CHECK(!sigaction(SIGSEGV, &action, NULL));
	for (int i = 0; i < 3; i++) {
		check_cpu();
		CAUGHT(*(volatile char *)64 = 1, SEGV_MAPERR, (void *)64);
		/* A general protection fault, as CPUID's is. */
		CAUGHT(*(volatile char *)NON_CANONICAL = 1, SI_KERNEL, NULL);
		if (!sigsetjmp(back, 1)) {
			CHECK(!raise(SIGSEGV));
			fail(__FILE__, __LINE__, "no signal");
		}
		CHECK(caught.si_code == SI_TKILL && caught.si_pid == getpid());
	}
	check_cpu();
}

static volatile sig_atomic_t counts[NSIG];

static void count(int number)
{
	counts[number]++;
}

static void signals(char **arguments)
{
	struct itimerval often = { { 0, 500 }, { 0, 500 } };

	(void)arguments;
	for (int number = 1; number < 32; number++) {
		if (number != SIGKILL && number != SIGSTOP && number != SIGSEGV)
			CHECK(signal(number, count) != SIG_ERR);
	}
	CHECK(!setitimer(ITIMER_REAL, &often, NULL));
	for (int i = 0; i < 100; i++) {
		check_cpu();
		CHECK(!raise(SIGUSR1) && !raise(SIGTRAP) && !raise(SIGTSTP));
	}
	CHECK(counts[SIGUSR1] == 100 && counts[SIGTRAP] == 100 && counts[SIGTSTP] == 100);
	CHECK(counts[SIGALRM] > 0);
}

static void stop_oneself(int number, int heard)
{
	char byte;

	check_cpu();
	CHECK(!raise(number));
	check_cpu();
	/* Another stop, or the end, would hide from the parent that this one is over. */
	CHECK(read(heard, &byte, 1) == 1);
}

static void stopped(char **arguments)
{
	int status, child, heard[2];

	(void)arguments;
	CHECK(!pipe(heard));
	child = fork();
	if (!child) {
		/* SIGTSTP stops nobody whose process group is orphaned, as ours may be. */
		CHECK(!setpgid(0, 0));
		stop_oneself(SIGSTOP, heard[0]);
		stop_oneself(SIGTSTP, heard[0]);
		exit(7);
	}
	for (int i = 0; i < 2; i++) {
		CHECK(waitpid(child, &status, WUNTRACED) == child && WIFSTOPPED(status));
		CHECK(WSTOPSIG(status) == (i ? SIGTSTP : SIGSTOP));
		usleep(20000);
		CHECK(!waitpid(child, &status, WNOHANG | WUNTRACED));
		CHECK(!kill(child, SIGCONT));
		CHECK(waitpid(child, &status, WCONTINUED) == child && WIFCONTINUED(status));
		CHECK(write(heard[1], "", 1) == 1);
	}
	ends_with(child, 7);
}

/* What is pending or ignored at an execve is so behind it. */
static void pending(char **arguments)
{
	sigset_t set;

	(void)arguments;
	CHECK(signal(SIGHUP, SIG_IGN) != SIG_ERR);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGTERM);
	CHECK(!sigprocmask(SIG_BLOCK, &set, NULL));
	CHECK(!raise(SIGUSR1) && !kill(getpid(), SIGTERM));
	execute("still-pending");
}

static void still_pending(char **arguments)
{
	sigset_t blocked, waiting;

	(void)arguments;
	CHECK(!sigprocmask(SIG_BLOCK, NULL, &blocked) && !sigpending(&waiting));
	for (int number = 1; number < 32; number++) {
		int mine = number == SIGUSR1 || number == SIGTERM;

		CHECK(sigismember(&blocked, number) == mine);
		CHECK(sigismember(&waiting, number) == mine);
	}
	CHECK(signal(SIGHUP, SIG_DFL) == SIG_IGN);
	check_cpu();
}

/* A child that gets a signal so many microseconds after its start, at some moment of an execve. */
static int signalled_in_execve(int number, int microseconds)
{
	int child = fork();

	if (!child)
		execute("show");
	usleep(microseconds);
	CHECK(!kill(child, number));
	return child;
}

static void killed(char **arguments)
{
	(void)arguments;
	for (int i = 0; i < 40; i++) {
		int status, child = signalled_in_execve(SIGKILL, i * 50);

		CHECK(waitpid(child, &status, 0) == child);
		CHECK(status == SIGKILL || status == 0);
	}
}

static void stopped_early(char **arguments)
{
	(void)arguments;
	for (int i = 0; i < 40; i++) {
		int status, child = signalled_in_execve(SIGSTOP, i * 50);

		CHECK(waitpid(child, &status, WUNTRACED) == child);
		if (WIFSTOPPED(status)) {
			CHECK(!kill(child, SIGCONT));
			CHECK(waitpid(child, &status, 0) == child);
		}
		CHECK(status == 0);
	}
}

static void asks_for_faults(char **arguments)
{
	(void)arguments;
	for (int on = 0; on < 2; on++) {
		FAILS(syscall(SYS_arch_prctl, 0x1012, on), ENODEV); /* ARCH_SET_CPUID */
		check_cpu();
	}
}

static void dies(char **arguments)
{
	(void)arguments;
	check_cpu();
	*(volatile char *)64 = 1;
}

static void ends(char **arguments)
{
	check_cpu();
	exit(atoi(arguments[0]));
}

const struct command commands[] = {
	{ "show", show },
	{ "forked", forked },
	{ "threads", threads },
	{ "executed-by-thread", executed_by_thread },
	{ "left-by-first-thread", left_by_first_thread },
	{ "handler", handler },
	{ "signals", signals },
	{ "stopped", stopped },
	{ "pending", pending },
	{ "still-pending", still_pending },
	{ "killed", killed },
	{ "stopped-early", stopped_early },
	{ "asks-for-faults", asks_for_faults },
	{ "dies", dies },
	{ "ends", ends },
	{ NULL, NULL },
};
