/* Guests of clients: what both see of memory, and several threads at one VM. */
#define _GNU_SOURCE
#include "client.h"

/* inc word [0x3000]; out 0x10, al; jmp back: an exit after each turn */
static const char counter[] = "\xff\x06\x00\x30\xe6\x10\xeb\xf8";
/* mov al, [0x3000]; cmp al, 0; je back; mov [0x3001], al; hlt */
static const char waits_for_byte[] = "\xa0\x00\x30\x3c\x00\x74\xf9\xa2\x01\x30\xf4";
/* inc word [0x3000]; jmp back */
static const char counts[] = "\xff\x06\x00\x30\xeb\xfa";

static struct machine machine;
static _Atomic int over;

static uint16_t *word(void)
{
	return (uint16_t *)(machine.ram + 0x3000);
}

/* What either side wrote last is what the other one finds. */
static void in_turns(char **arguments)
{
	machine = new_machine(counter, 8);
	for (uint16_t turn = 1; turn < 200; turn++) {
		CHECK(!ioctl(machine.vcpu, KVM_RUN, 0));
		CHECK(machine.run->exit_reason == KVM_EXIT_IO && *word() == turn);
		machine.ram[0x3ffe] = (uint8_t)turn; /* the same page, another word */
	}
	*word() = 0x1233;
	CHECK(!ioctl(machine.vcpu, KVM_RUN, 0) && *word() == 0x1234);
	CHECK(machine.ram[0x3ffe] == 199);
	memset(machine.ram + CODE, 0xf4, 8); /* other code, too */
	CHECK(!ioctl(machine.vcpu, KVM_RUN, 0) && machine.run->exit_reason == KVM_EXIT_HLT);
}

/* A struct in a page that the guest has used is read and written like any other. */
static void structs(char **arguments)
{
	struct kvm_regs *regs;

	machine = new_machine(counter, 8);
	regs = (struct kvm_regs *)(machine.ram + 0x3100);
	CHECK(!ioctl(machine.vcpu, KVM_RUN, 0) && *word() == 1);
	CHECK(!ioctl(machine.vcpu, KVM_GET_REGS, regs) && regs->rip == CODE + 6);
	regs->rip = CODE;
	regs->rbx = 0x1122334455667788;
	CHECK(!ioctl(machine.vcpu, KVM_SET_REGS, regs));
	regs->rbx = 0;
	CHECK(!ioctl(machine.vcpu, KVM_RUN, 0) && *word() == 2 && regs->rbx == 0);
	CHECK(!ioctl(machine.vcpu, KVM_GET_REGS, regs) && regs->rbx == 0x1122334455667788);
}

static void *run(void *unused)
{
	CHECK(!ioctl(machine.vcpu, KVM_RUN, 0) && machine.run->exit_reason == KVM_EXIT_HLT);
	return NULL;
}

/* While the guest waits for a byte, the client writes it. */
static void meanwhile(char **arguments)
{
	pthread_t thread;

	machine = new_machine(waits_for_byte, sizeof(waits_for_byte) - 1);
	thread = start_running(&machine, run);
	machine.ram[0x3000] = 0x5a;
	CHECK(!pthread_join(thread, NULL) && machine.ram[0x3001] == 0x5a);
}

/* ... and sees what the guest makes of memory before it exits. */
static void watched(char **arguments)
{
	const struct timespec moment = { 0, 1000000 };
	pthread_t thread;

	/* mov byte [0x3001], 7; then wait for a byte */
	machine = new_machine("\xc6\x06\x01\x30\x07\xa0\x00\x30\x3c\x00\x74\xf9\xf4", 13);
	CHECK(!pthread_create(&thread, NULL, run, NULL));
	while (((volatile uint8_t *)machine.ram)[0x3001] != 7)
		nanosleep(&moment, NULL);
	machine.ram[0x3000] = 1;
	CHECK(!pthread_join(thread, NULL));
}

/* Memory that goes while the guest is at it: KVM_RUN fails, and the client goes on. */
static void *run_out(void *unused)
{
	int result = ioctl(machine.vcpu, KVM_RUN, 0);

	CHECK((result == -1 && errno == EFAULT) || (!result && machine.run->exit_reason != 0));
	return NULL;
}

static void unmapped(char **arguments)
{
	pthread_t thread;
	struct machine second;

	machine = new_machine(counts, sizeof(counts) - 1);
	thread = start_running(&machine, run_out);
	CHECK(!munmap(machine.ram, RAM_PAGES * PAGE));
	CHECK(!pthread_join(thread, NULL));
	second = new_machine(counter, 8);
	CHECK(!ioctl(second.vcpu, KVM_RUN, 0) && second.run->exit_reason == KVM_EXIT_IO);
}

/* An event whose stack isn't there waits, and others behind it. */
static void events(char **arguments)
{
	struct kvm_interrupt interrupt = { .irq = 32 };
	struct kvm_regs regs = { .rip = CODE, .rflags = 0x202, .rsp = 0x6000 };
	uint32_t *vectors;

	machine = new_machine("\x90\xf4", 2);
	vectors = (uint32_t *)machine.ram;
	vectors[2] = 0x2000; /* of an NMI */
	vectors[32] = 0x2100;
	machine.ram[0x2000] = machine.ram[0x2100] = 0xf4;
	CHECK(!munmap(machine.ram + 0x5000, PAGE));
	CHECK(!ioctl(machine.vcpu, KVM_SET_REGS, &regs));
	CHECK(!ioctl(machine.vcpu, KVM_INTERRUPT, &interrupt));
	FAILS(ioctl(machine.vcpu, KVM_RUN, 0), EFAULT);
	CHECK(!ioctl(machine.vcpu, KVM_NMI, 0));
	FAILS(ioctl(machine.vcpu, KVM_RUN, 0), EFAULT);
	CHECK(mmap(machine.ram + 0x5000, PAGE, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED);
	CHECK(!ioctl(machine.vcpu, KVM_RUN, 0) && machine.run->exit_reason == KVM_EXIT_HLT);
	CHECK(!ioctl(machine.vcpu, KVM_GET_REGS, &regs) && regs.rip == 0x2101);
	CHECK(!ioctl(machine.vcpu, KVM_RUN, 0) && machine.run->exit_reason == KVM_EXIT_HLT);
	CHECK(!ioctl(machine.vcpu, KVM_GET_REGS, &regs) && regs.rip == 0x2001);
}

/* Memory that is there to be read is not written to. */
static void read_only(char **arguments)
{
	machine = new_machine(counter, 8);
	CHECK(!mprotect(machine.ram + 0x3000, PAGE, PROT_READ));
	CHECK(ioctl(machine.vcpu, KVM_RUN, 0) == -1 || machine.run->exit_reason != 0);
	CHECK(*word() == 0);
}

/* Two vCPUs, each with its own thread and word, one page. */
static const char two_counters[] = "\x66\x40"		  /* inc eax */
				   "\x67\x66\x89\x03"	  /* mov [ebx], eax */
				   "\x66\x3d\xd0\x07\x00\x00" /* cmp eax, 2000 */
				   "\x75\xf2"		  /* jne back */
				   "\xf4";

struct half {
	int vcpu;
	struct kvm_run *run;
};

static void *run_half(void *half)
{
	CHECK(!ioctl(((struct half *)half)->vcpu, KVM_RUN, 0));
	CHECK(((struct half *)half)->run->exit_reason == KVM_EXIT_HLT);
	return NULL;
}

static void two(char **arguments)
{
	struct half halves[2];
	pthread_t threads[2];
	uint32_t *words;

	machine = new_machine(two_counters, sizeof(two_counters) - 1);
	words = (uint32_t *)word();
	halves[0] = (struct half){ machine.vcpu, machine.run };
	halves[1].vcpu = add_vcpu(&machine, 1, &halves[1].run);
	for (int i = 0; i < 2; i++) {
		struct kvm_regs regs = { .rip = CODE, .rflags = 2, .rbx = 0x3000 + 8 * i };

		CHECK(!ioctl(halves[i].vcpu, KVM_SET_REGS, &regs));
	}
	for (int i = 0; i < 2; i++)
		CHECK(!pthread_create(&threads[i], NULL, run_half, &halves[i]));
	for (int i = 0; i < 2; i++)
		CHECK(!pthread_join(threads[i], NULL));
	CHECK(words[0] == 2000 && words[2] == 2000);
}

static _Atomic int came_back;

static void *until_signal(void *unused)
{
	FAILS(ioctl(machine.vcpu, KVM_RUN, 0), EINTR);
	came_back = 1;
	return NULL;
}

static void *ask(void *unused)
{
	struct kvm_regs regs;

	CHECK(!ioctl(machine.vcpu, KVM_GET_REGS, &regs));
	CHECK(came_back || machine.run->exit_reason == KVM_EXIT_INTR);
	over = 1;
	return NULL;
}

/* A vCPU does one thing at a time; its VM, and other vCPUs, go on. */
static void busy(char **arguments)
{
	pthread_t runner, asker;
	struct kvm_run *other_run;
	struct kvm_regs regs;
	int other;

	handle(SIGUSR1, 0);
	machine = new_machine("\xeb\xfe", 2);
	runner = start_running(&machine, until_signal);
	CHECK(!pthread_create(&asker, NULL, ask, NULL));
	CHECK(ioctl(machine.vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == 1);
	other = add_vcpu(&machine, 1, &other_run);
	for (int i = 0; i < 20; i++)
		CHECK(!ioctl(other, KVM_GET_REGS, &regs));
	CHECK(!over && !came_back);
	CHECK(!pthread_kill(runner, SIGUSR1));
	CHECK(!pthread_join(runner, NULL) && !pthread_join(asker, NULL) && over);
}

/* The descriptors go while the guest runs: it runs on, and nobody is hurt. */
static void closed(char **arguments)
{
	pthread_t thread;

	machine = new_machine(waits_for_byte, sizeof(waits_for_byte) - 1);
	thread = start_running(&machine, run);
	CHECK(!close(machine.vcpu) && !close(machine.vm) && !close(machine.kvm));
	CHECK(ioctl(open_kvm(), KVM_GET_API_VERSION, 0) == 12);
	machine.ram[0x3000] = 1;
	CHECK(!pthread_join(thread, NULL));
}

static void *until_told(void *unused)
{
	int result = ioctl(machine.vcpu, KVM_RUN, 0);

	CHECK(result == -1 && (errno == EINTR || errno == EBADF));
	over++;
	return NULL;
}

/* ... with a second call that waits for the vCPU, while nothing else is left of the VM. */
static void closed_waiting(char **arguments)
{
	const struct timespec moment = { 0, 5000000 };
	pthread_t threads[2];
	int size;

	handle(SIGUSR1, 0);
	for (int round = 0; round < 5; round++) {
		machine = new_machine("\xeb\xfe", 2);
		over = 0;
		threads[0] = start_running(&machine, until_told);
		CHECK(!pthread_create(&threads[1], NULL, until_told, NULL));
		nanosleep(&moment, NULL); /* where it is can't be seen: more often than not it waits */
		size = ioctl(machine.kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
		CHECK(!close(machine.vcpu) && !close(machine.vm) && !munmap(machine.run, size));
		CHECK(ioctl(machine.kvm, KVM_GET_API_VERSION, 0) == 12 && !close(machine.kvm));
		while (over < 2) {
			pthread_kill(threads[0], SIGUSR1);
			if (over)
				pthread_kill(threads[1], SIGUSR1);
			nanosleep(&moment, NULL);
		}
		CHECK(!pthread_join(threads[0], NULL) && !pthread_join(threads[1], NULL));
	}
}

/* What is shared with the kernel is written over while it is used. */
static void *scribble(void *unused)
{
	for (uint32_t i = 0; !over; i++) {
		memset((char *)machine.run + 32, (int)i, PAGE - 32);
		memset((char *)machine.run + PAGE, (int)i, PAGE);
	}
	return NULL;
}

static void scribbled(char **arguments)
{
	pthread_t thread;

	/* in al, dx; out dx, al; mov [0x9fff], al where nothing is; jmp back */
	machine = new_machine("\x31\xd2\xec\xee\xbb\x00\xf0\x8e\xdb\xa2\xff\xff\xeb\xf2", 14);
	CHECK(!pthread_create(&thread, NULL, scribble, NULL));
	for (int i = 0; i < 500; i++)
		ioctl(machine.vcpu, KVM_RUN, 0);
	over = 1;
	CHECK(!pthread_join(thread, NULL));
	CHECK(ioctl(machine.vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == 1);
}

const struct command commands[] = {
	{ "in-turns", in_turns }, { "structs", structs }, { "meanwhile", meanwhile },
	{ "watched", watched }, { "unmapped", unmapped },
	{ "events", events }, { "read-only", read_only },
	{ "two", two }, { "busy", busy }, { "closed", closed },
	{ "closed-waiting", closed_waiting }, { "scribbled", scribbled },
	{ NULL, NULL },
};
