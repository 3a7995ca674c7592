/* What the clients have in common. */
#define _GNU_SOURCE
#include "client.h"

#include <sys/socket.h>

int main(int argc, char **argv)
{
	for (const struct command *command = commands; argc > 1 && command->name; command++) {
		if (!strcmp(argv[1], command->name)) {
			command->run(argv + 2);
			return 0;
		}
	}
	fprintf(stderr, "%s: which command?\n", argv[0]);
	return 2;
}

void fail(const char *file, int line, const char *condition)
{
	fprintf(stderr, "%s:%d: not %s (%s)\n", file, line, condition, strerror(errno));
	exit(1);
}

int open_kvm(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);

	CHECK(kvm >= 0);
	return kvm;
}

void *pages(size_t count)
{
	void *memory = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(memory != MAP_FAILED);
	return memory;
}

int sev_command(int vm, uint32_t id, void *data, uint32_t sev_fd)
{
	struct kvm_sev_cmd command = { .id = id, .data = (uintptr_t)data, .sev_fd = sev_fd };

	return ioctl(vm, KVM_MEMORY_ENCRYPT_OP, &command);
}

int new_snp_vm(int kvm)
{
	struct kvm_sev_init init = { 0 };
	int vm = ioctl(kvm, KVM_CREATE_VM, KVM_X86_SNP_VM);

	CHECK(vm >= 0);
	CHECK(!sev_command(vm, KVM_SEV_INIT2, &init, -1));
	return vm;
}

int add_vcpu(const struct machine *machine, unsigned long id, struct kvm_run **run)
{
	struct kvm_regs regs = { .rip = CODE, .rflags = 2 };
	struct kvm_sregs sregs;
	int size = ioctl(machine->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	int vcpu = ioctl(machine->vm, KVM_CREATE_VCPU, id);

	CHECK(vcpu >= 0);
	*run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	CHECK(*run != MAP_FAILED);
	CHECK(!ioctl(vcpu, KVM_GET_SREGS, &sregs));
	sregs.cs.base = sregs.cs.selector = 0;
	CHECK(!ioctl(vcpu, KVM_SET_SREGS, &sregs));
	CHECK(!ioctl(vcpu, KVM_SET_REGS, &regs));
	return vcpu;
}

struct machine new_machine(const void *code, size_t size)
{
	struct machine machine = { .kvm = open_kvm(), .ram = pages(RAM_PAGES) };
	struct kvm_userspace_memory_region region = {
		.memory_size = RAM_PAGES * PAGE,
		.userspace_addr = (uintptr_t)machine.ram,
	};

	machine.vm = ioctl(machine.kvm, KVM_CREATE_VM, 0);
	CHECK(machine.vm >= 0);
	CHECK(!ioctl(machine.vm, KVM_SET_USER_MEMORY_REGION, &region));
	memcpy(machine.ram + CODE, code, size);
	machine.vcpu = add_vcpu(&machine, 0, &machine.run);
	return machine;
}

void wait_until_it_runs(struct kvm_run *run)
{
	const struct timespec moment = { 0, 100000 };

	while (*(volatile uint32_t *)&run->exit_reason == NOT_YET)
		nanosleep(&moment, NULL);
}

pthread_t start_running(const struct machine *machine, void *(*runs)(void *))
{
	pthread_t thread;

	machine->run->exit_reason = NOT_YET;
	CHECK(!pthread_create(&thread, NULL, runs, NULL));
	wait_until_it_runs(machine->run);
	return thread;
}

volatile sig_atomic_t heard;

static void hear(int number)
{
	heard++;
}

void handle(int number, int flags)
{
	struct sigaction action = { .sa_handler = hear, .sa_flags = flags };

	CHECK(!sigaction(number, &action, NULL));
}

void send_fd(int socket, int fd)
{
	char room[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec part = { "", 1 };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = room,
				  .msg_controllen = sizeof(room) };

	CMSG_FIRSTHDR(&message)->cmsg_level = SOL_SOCKET;
	CMSG_FIRSTHDR(&message)->cmsg_type = SCM_RIGHTS;
	CMSG_FIRSTHDR(&message)->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), &fd, sizeof(int));
	CHECK(sendmsg(socket, &message, 0) == 1);
}

void ends_with(int child, int code)
{
	int status;

	CHECK(waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == code);
}
