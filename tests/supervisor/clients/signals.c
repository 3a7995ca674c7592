/* Signals, and other ways to end a call that takes long. */
#define _GNU_SOURCE
#include <sys/time.h>

#include "client.h"

static const char spin[] = "\xeb\xfe"; /* jmp $ */
static struct machine machine;

/* KVM_RUN in a thread of its own; what came of it is its errno. */
static void *run(void *unused)
{
	errno = 0;
	CHECK(ioctl(machine.vcpu, KVM_RUN, 0) == -1);
	return (void *)(intptr_t)errno;
}

static int result_of(pthread_t thread)
{
	void *result;

	CHECK(!pthread_join(thread, &result));
	return (int)(intptr_t)result;
}

/* EINTR, whatever the handler wants restarted. */
static void interrupted(char **arguments)
{
	static const int flags[] = { 0, SA_RESTART };

	machine = new_machine(spin, 2);
	for (int i = 0; i < 2; i++) {
		pthread_t thread;

		handle(SIGUSR1, flags[i]);
		thread = start_running(&machine, run);
		CHECK(!pthread_kill(thread, SIGUSR1));
		CHECK(result_of(thread) == EINTR && heard == i + 1);
		CHECK(machine.run->exit_reason == KVM_EXIT_INTR);
	}
}

/* One that is sent to the process finds the thread as well. */
static void timer(char **arguments)
{
	const struct itimerval soon = { .it_value = { 0, 20000 } };

	machine = new_machine(spin, 2);
	handle(SIGALRM, SA_RESTART);
	CHECK(!setitimer(ITIMER_REAL, &soon, NULL));
	FAILS(ioctl(machine.vcpu, KVM_RUN, 0), EINTR);
	CHECK(heard == 1);
}

/* A signal that nobody minds, or that is blocked, ends nothing. */
static void ignored(char **arguments)
{
	sigset_t set;
	pthread_t thread;

	machine = new_machine(spin, 2);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	CHECK(!pthread_sigmask(SIG_BLOCK, &set, NULL));
	handle(SIGUSR1, 0);
	handle(SIGUSR2, 0);
	thread = start_running(&machine, run);
	CHECK(!pthread_kill(thread, SIGCHLD) && !pthread_kill(thread, SIGUSR2));
	CHECK(!pthread_kill(thread, SIGUSR1));
	CHECK(result_of(thread) == EINTR && heard == 1); /* none but the last was heard */
}

static void immediate(char **arguments)
{
	pthread_t thread;

	machine = new_machine(spin, 2);
	machine.run->immediate_exit = 1;
	FAILS(ioctl(machine.vcpu, KVM_RUN, 0), EINTR);
	machine.run->immediate_exit = 0;
	handle(SIGUSR1, 0);
	thread = start_running(&machine, run);
	CHECK(!pthread_kill(thread, SIGUSR1) && result_of(thread) == EINTR);
}

/* KVM_SET_SIGNAL_MASK: a signal that is blocked but in KVM_RUN waits for that, unhandled. */
static void masked(char **arguments)
{
	struct {
		struct kvm_signal_mask header;
		uint8_t mask[8];
	} in_run = { { .len = 8 }, { 0 } };
	sigset_t set;

	machine = new_machine(spin, 2);
	handle(SIGUSR1, 0);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	CHECK(!pthread_sigmask(SIG_BLOCK, &set, NULL));
	CHECK(!ioctl(machine.vcpu, KVM_SET_SIGNAL_MASK, &in_run));
	CHECK(!raise(SIGUSR1));
	FAILS(ioctl(machine.vcpu, KVM_RUN, 0), EINTR);
	CHECK(!heard && !sigpending(&set) && sigismember(&set, SIGUSR1));
	FAILS(ioctl(machine.vcpu, KVM_RUN, 0), EINTR);
	in_run.header.len = 4;
	FAILS(ioctl(machine.vcpu, KVM_SET_SIGNAL_MASK, &in_run), EINVAL);
}

static int open_descriptors(void)
{
	int count = 0;

	for (int fd = 0; fd < 1000; fd++)
		count += fcntl(fd, F_GETFD) >= 0;
	return count;
}

/* Calls are done once, however many signals come. */
static void once(char **arguments)
{
	const struct itimerval often = { { 0, 150 }, { 0, 150 } }, never = { 0 };
	int kvm = open_kvm(), vm = ioctl(kvm, KVM_CREATE_VM, 0), before = open_descriptors();

	handle(SIGALRM, SA_RESTART);
	CHECK(!setitimer(ITIMER_REAL, &often, NULL));
	for (int id = 0; id < 200; id++)
		CHECK(ioctl(vm, KVM_CREATE_VCPU, id) >= 0); /* a second time were EEXIST */
	CHECK(!setitimer(ITIMER_REAL, &never, NULL));
	CHECK(heard > 1 && open_descriptors() == before + 200);
}

/* A child whose thread runs a guest stops, goes on, and gets EINTR for it. */
static void stopped(char **arguments)
{
	int child = fork(), status;

	if (!child) {
		pthread_t thread;

		machine = new_machine(spin, 2);
		thread = start_running(&machine, run);
		/* Another thread than the one that runs takes the signal. */
		CHECK(!raise(SIGSTOP));
		_exit(result_of(thread) == EINTR ? 4 : 1);
	}
	CHECK(waitpid(child, &status, WUNTRACED) == child && WIFSTOPPED(status));
	CHECK(!kill(child, SIGCONT));
	ends_with(child, 4);
}

static void *tell(void *to)
{
	wait_until_it_runs(machine.run);
	CHECK(write(*(int *)to, "", 1) == 1);
	return NULL;
}

/* The same, where no other thread is left. */
static void stopped_alone(char **arguments)
{
	int ends[2], child, status;
	pthread_t teller;
	char byte;

	CHECK(!pipe(ends));
	child = fork();
	if (!child) {
		machine = new_machine(spin, 2);
		machine.run->exit_reason = NOT_YET;
		CHECK(!pthread_create(&teller, NULL, tell, &ends[1]));
		FAILS(ioctl(machine.vcpu, KVM_RUN, 0), EINTR);
		_exit(4);
	}
	CHECK(read(ends[0], &byte, 1) == 1);
	CHECK(!kill(child, SIGSTOP));
	CHECK(waitpid(child, &status, WUNTRACED) == child && WIFSTOPPED(status));
	CHECK(!kill(child, SIGCONT));
	ends_with(child, 4);
}

/* The first thread runs a guest, and a second one another; a third one takes the signal. */
static void *stop(void *other)
{
	wait_until_it_runs(machine.run);
	wait_until_it_runs(((struct machine *)other)->run);
	CHECK(!raise(SIGSTOP));
	return NULL;
}

static void *run_other(void *other)
{
	FAILS(ioctl(((struct machine *)other)->vcpu, KVM_RUN, 0), EINTR);
	return NULL;
}

static void all_stopped(char **arguments)
{
	int child = fork(), status;

	if (!child) {
		struct machine other = new_machine(spin, 2);
		pthread_t runner, stopper;

		machine = new_machine(spin, 2);
		machine.run->exit_reason = other.run->exit_reason = NOT_YET;
		CHECK(!pthread_create(&runner, NULL, run_other, &other));
		CHECK(!pthread_create(&stopper, NULL, stop, &other));
		FAILS(ioctl(machine.vcpu, KVM_RUN, 0), EINTR);
		CHECK(!pthread_join(runner, NULL) && !pthread_join(stopper, NULL));
		_exit(4);
	}
	CHECK(waitpid(child, &status, WUNTRACED) == child && WIFSTOPPED(status));
	CHECK(!kill(child, SIGCONT));
	ends_with(child, 4);
}

/* The ways to go while a thread runs a guest; a child does, and leaves nothing behind. */
static void *leave(void *how)
{
	wait_until_it_runs(machine.run);
	if (!strcmp(how, "exit"))
		exit(6);
	if (!strcmp(how, "exec"))
		execl("/proc/self/exe", "signals", "six", NULL);
	if (!strcmp(how, "kill"))
		kill(getpid(), SIGKILL);
	if (!strcmp(how, "fault"))
		*(volatile char *)8 = 0;
	return NULL;
}

static void six(char **arguments)
{
	exit(6);
}

static void leaves(char **arguments)
{
	pthread_t thread;

	machine = new_machine(spin, 2);
	machine.run->exit_reason = NOT_YET;
	CHECK(!pthread_create(&thread, NULL, leave, arguments[0]));
	ioctl(machine.vcpu, KVM_RUN, 0);
	CHECK(!"back");
}

/* The same, but it's another thread that runs the guest. */
static void leaves_first(char **arguments)
{
	machine = new_machine(spin, 2);
	start_running(&machine, run);
	if (!strcmp(arguments[0], "exec"))
		execl("/proc/self/exe", "signals", "six", NULL);
	if (!strcmp(arguments[0], "kill"))
		kill(getpid(), SIGKILL);
	if (!strcmp(arguments[0], "fault"))
		*(volatile char *)8 = 0;
	exit(6);
}

/* The next program's memory is its own, also where the guest had some of the last one's. */
static volatile uint32_t shared[PAGE / 4] __attribute__((aligned(PAGE)));

static void *exec_when_it_counts(void *unused)
{
	wait_until_it_runs(machine.run);
	while (!shared[0])
		;
	execl("/proc/self/exe", "signals", "untouched", NULL);
	return NULL;
}

static void leaves_memory(char **arguments)
{
	static const char count[] = "\x66\xff\x06\x00\x00" /* incl 0 */
				    "\xeb\xf9"; /* jmp to it */
	struct kvm_userspace_memory_region region = {
		.slot = 1,
		.guest_phys_addr = RAM_PAGES * PAGE,
		.memory_size = PAGE,
		.userspace_addr = (uintptr_t)shared,
	};
	struct kvm_sregs sregs;
	pthread_t thread;

	machine = new_machine(count, sizeof(count) - 1);
	CHECK(!ioctl(machine.vm, KVM_SET_USER_MEMORY_REGION, &region));
	CHECK(!ioctl(machine.vcpu, KVM_GET_SREGS, &sregs));
	sregs.ds.base = RAM_PAGES * PAGE;
	CHECK(!ioctl(machine.vcpu, KVM_SET_SREGS, &sregs));
	machine.run->exit_reason = NOT_YET;
	CHECK(!pthread_create(&thread, NULL, exec_when_it_counts, NULL));
	ioctl(machine.vcpu, KVM_RUN, 0);
	CHECK(!"back");
}

static void untouched(char **arguments)
{
	const struct timespec moment = { 0, 100000000 };

	nanosleep(&moment, NULL);
	CHECK(!shared[0]);
}

const struct command commands[] = {
	{ "interrupted", interrupted }, { "timer", timer }, { "ignored", ignored },
	{ "immediate", immediate }, { "masked", masked }, { "once", once },
	{ "stopped", stopped }, { "stopped-alone", stopped_alone },
	{ "all-stopped", all_stopped }, { "leaves", leaves },
	{ "leaves-first", leaves_first }, { "six", six }, { "leaves-memory", leaves_memory },
	{ "untouched", untouched }, { NULL, NULL },
};
