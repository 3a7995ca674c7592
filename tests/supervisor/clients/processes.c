/* Several processes: those that inherit a VM, get it sent, or are left behind. */
#define _GNU_SOURCE
#include <sched.h>
#include <sys/prctl.h>
#include <sys/socket.h>

#include "client.h"

static const char exit_then_halt[] = "\xe6\x10\xf4"; /* out 0x10, al; hlt */

/* As from the kernel: kvm_vm_ioctl() and kvm_vcpu_ioctl() answer the VM's own memory alone. */
static void is_foreign(const struct machine *machine)
{
	struct kvm_regs regs;

	FAILS(ioctl(machine->vm, KVM_CHECK_EXTENSION, 0), EIO);
	FAILS(ioctl(machine->vm, KVM_CREATE_VCPU, 9), EIO);
	FAILS(ioctl(machine->vcpu, KVM_GET_REGS, &regs), EIO);
	FAILS(ioctl(machine->vcpu, KVM_RUN, 0), EIO);
	CHECK(ioctl(machine->kvm, KVM_GET_API_VERSION, 0) == 12);
}

static void is_at_home(const struct machine *machine)
{
	struct kvm_regs regs;

	CHECK(ioctl(machine->vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == 1);
	CHECK(!ioctl(machine->vcpu, KVM_GET_REGS, &regs));
}

static void forked(char **arguments)
{
	struct machine machine = new_machine(exit_then_halt, 3);
	int child;

	CHECK(!ioctl(machine.vcpu, KVM_RUN, 0) && machine.run->exit_reason == KVM_EXIT_IO);
	child = fork();
	if (!child) {
		is_foreign(&machine);
		machine = new_machine(exit_then_halt, 3);
		is_at_home(&machine);
		CHECK(!ioctl(machine.vcpu, KVM_RUN, 0));
		_exit(7);
	}
	ends_with(child, 7);
	is_at_home(&machine);
	CHECK(!ioctl(machine.vcpu, KVM_RUN, 0) && machine.run->exit_reason == KVM_EXIT_HLT);
}

/* The first thread is gone, and with it what /proc has under the process's number. */
static void *without_first(void *machine)
{
	const struct timespec moment = { 0, 1000000 };
	char path[64], line[256] = "";

	snprintf(path, sizeof(path), "/proc/%d/stat", getpid());
	while (!strstr(line, ") Z ")) {
		FILE *stat = fopen(path, "r");

		CHECK(stat && fgets(line, sizeof(line), stat));
		fclose(stat);
		nanosleep(&moment, NULL);
	}
	if (((struct machine *)machine)->vm)
		is_at_home(machine);
	*(struct machine *)machine = new_machine(exit_then_halt, 3);
	is_at_home(machine);
	exit(9);
}

static void headless(char **arguments)
{
	static struct machine machine;
	pthread_t thread;

	if (arguments[0])
		machine = new_machine(exit_then_halt, 3);
	CHECK(!pthread_create(&thread, NULL, without_first, &machine));
	pthread_exit(NULL);
}

static int in_child(void *machine)
{
	is_at_home(machine);
	return 0;
}

static void same_memory(char **arguments)
{
	struct machine machine = new_machine(exit_then_halt, 3);
	char *stack = pages(16);
	int child = clone(in_child, stack + 16 * PAGE, CLONE_VM | SIGCHLD, &machine);

	CHECK(child > 0);
	ends_with(child, 0);
	child = vfork();
	if (!child) {
		is_at_home(&machine);
		/* It has its memory no longer than up to here. */
		execl("/proc/self/exe", "processes", "inherited", NULL);
		_exit(1);
	}
	CHECK(fcntl(machine.vm, F_GETFD) == FD_CLOEXEC);
	ends_with(child, 0);
	is_at_home(&machine);
}

static const int places[] = { 50, 51, 52 };

static void lay_out(const struct machine *machine)
{
	CHECK(dup2(machine->kvm, places[0]) == places[0]);
	CHECK(dup2(machine->vm, places[1]) == places[1]);
	CHECK(dup2(machine->vcpu, places[2]) == places[2]);
}

/* The program after an exec: descriptors are there, if they were not closed by it. */
static void inherited(char **arguments)
{
	struct machine machine = { .kvm = places[0], .vm = places[1], .vcpu = places[2] };

	if (fcntl(machine.kvm, F_GETFD) >= 0)
		is_foreign(&machine);
}

/* exec in the same process, and of a child that had its parent's memory until then. */
static void executed(char **arguments)
{
	struct machine machine = new_machine(exit_then_halt, 3);
	int child;

	lay_out(&machine);
	child = vfork();
	if (!child) {
		is_at_home(&machine);
		execl("/proc/self/exe", "processes", "inherited", NULL);
		_exit(1);
	}
	ends_with(child, 0);
	is_at_home(&machine);
	CHECK(!ioctl(machine.vcpu, KVM_RUN, 0));
	execl("/nowhere", "nowhere", NULL); /* nothing of it */
	is_at_home(&machine);
	execl("/proc/self/exe", "processes", "inherited", NULL);
	CHECK(!"executed");
}

static int take(int socket)
{
	char room[CMSG_SPACE(sizeof(int))], byte;
	struct iovec part = { &byte, 1 };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = room,
				  .msg_controllen = sizeof(room) };
	int fd;

	CHECK(recvmsg(socket, &message, MSG_CMSG_CLOEXEC) == 1 && CMSG_FIRSTHDR(&message));
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(int));
	return fd;
}

/* A child makes a VM and sends it: it lives on, though nobody can use it any more. */
static void passed(char **arguments)
{
	struct machine machine = { 0 };
	int pair[2], child;

	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair));
	child = fork();
	if (!child) {
		machine = new_machine(exit_then_halt, 3);
		send_fd(pair[1], machine.kvm);
		send_fd(pair[1], machine.vm);
		send_fd(pair[1], machine.vcpu);
		_exit(0);
	}
	machine.kvm = take(pair[0]);
	machine.vm = take(pair[0]);
	machine.vcpu = take(pair[0]);
	is_foreign(&machine);
	ends_with(child, 0);
	is_foreign(&machine);
	machine.run = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, machine.vcpu, 0);
	CHECK(machine.run != MAP_FAILED && machine.run->exit_reason == 0);
}

/* A process that goes on after the program: it ends once its standard input does. */
static void leaves(char **arguments)
{
	char byte;

	if (fork())
		exit(3);
	while (getppid() == 1 || read(0, &byte, 1) > 0)
		;
	CHECK(ioctl(open_kvm(), KVM_GET_API_VERSION, 0) == 12);
	CHECK(write(1, "left\n", 5) == 5);
}

/* SIGTERM reaches it, and it says so. */
static volatile sig_atomic_t told;

static void on_signal(int number)
{
	told = number;
}

static void waits(char **arguments)
{
	struct sigaction action = { .sa_handler = on_signal };
	sigset_t mask, none;

	if (arguments[0] && fork())
		exit(0);
	sigemptyset(&none);
	sigfillset(&mask);
	sigprocmask(SIG_SETMASK, &mask, NULL);
	sigaction(SIGTERM, &action, NULL);
	sigaction(SIGINT, &action, NULL);
	sigaction(SIGUSR1, &action, NULL);
	CHECK(write(1, "ready\n", 6) == 6);
	while (!told)
		sigsuspend(&none);
	printf("%d\n", told);
	exit(5);
}

static void loops(char **arguments)
{
	struct machine machine = new_machine("\xeb\xfe", 2);

	CHECK(write(1, "ready\n", 6) == 6);
	ioctl(machine.vcpu, KVM_RUN, 0);
	CHECK(!"back");
}

const struct command commands[] = {
	{ "forked", forked }, { "headless", headless }, { "same-memory", same_memory }, { "executed", executed },
	{ "inherited", inherited }, { "passed", passed }, { "leaves", leaves },
	{ "waits", waits }, { "loops", loops }, { NULL, NULL },
};
