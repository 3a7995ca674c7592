/*
 * Random calls with random arguments, by two threads, while a third one scribbles over what is
 * shared with the kernel: fuzz all SEED COUNT. Prints how many calls were answered.
 */
#define _GNU_SOURCE
#include <linux/falloc.h>
#include <sys/eventfd.h>

#include "client.h"

enum { FDS = 24, RUNS = 8, ARENA = 64 * 4096, CALLERS = 2 };

static const unsigned int requests[] = {
	KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_GET_MSR_INDEX_LIST, KVM_CHECK_EXTENSION,
	KVM_GET_VCPU_MMAP_SIZE, KVM_GET_SUPPORTED_CPUID, KVM_GET_EMULATED_CPUID,
	KVM_GET_MSR_FEATURE_INDEX_LIST, KVM_CREATE_VCPU, KVM_SET_USER_MEMORY_REGION,
	KVM_SET_TSS_ADDR, KVM_SET_IDENTITY_MAP_ADDR, KVM_SET_USER_MEMORY_REGION2,
	KVM_CREATE_IRQCHIP, KVM_IRQ_LINE, KVM_IRQ_LINE_STATUS, KVM_SET_GSI_ROUTING, KVM_IRQFD,
	KVM_CREATE_PIT2, KVM_SET_BOOT_CPU_ID, KVM_IOEVENTFD, KVM_SET_CLOCK, KVM_GET_CLOCK,
	KVM_SET_TSC_KHZ, KVM_GET_TSC_KHZ, KVM_ENABLE_CAP, KVM_SIGNAL_MSI, KVM_MEMORY_ENCRYPT_OP,
	KVM_MEMORY_ENCRYPT_REG_REGION, KVM_MEMORY_ENCRYPT_UNREG_REGION, KVM_X86_SET_MSR_FILTER,
	KVM_GET_STATS_FD, KVM_SET_MEMORY_ATTRIBUTES, KVM_CREATE_GUEST_MEMFD, KVM_SET_DEVICE_ATTR,
	KVM_GET_DEVICE_ATTR, KVM_HAS_DEVICE_ATTR, KVM_RUN, KVM_GET_REGS, KVM_SET_REGS,
	KVM_GET_SREGS, KVM_SET_SREGS, KVM_TRANSLATE, KVM_INTERRUPT, KVM_GET_MSRS, KVM_SET_MSRS,
	KVM_GET_FPU, KVM_SET_FPU, KVM_GET_LAPIC, KVM_SET_LAPIC,
	KVM_SET_CPUID2, KVM_GET_CPUID2, KVM_GET_MP_STATE, KVM_SET_MP_STATE, KVM_NMI,
	KVM_SET_GUEST_DEBUG, KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, KVM_GET_DEBUGREGS,
	KVM_SET_DEBUGREGS, KVM_GET_XSAVE, KVM_SET_XSAVE, KVM_GET_XCRS, KVM_SET_XCRS,
	KVM_GET_SREGS2, KVM_SET_SREGS2, KVM_GET_XSAVE2, KVM_PRE_FAULT_MEMORY,
	KVM_SET_VAPIC_ADDR, KVM_TPR_ACCESS_REPORTING, KVM_X86_GET_MCE_CAP_SUPPORTED,
	KVM_X86_SETUP_MCE, KVM_X86_SET_MCE, KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG,
	KVM_REGISTER_COALESCED_MMIO, KVM_UNREGISTER_COALESCED_MMIO, KVM_SET_NR_MMU_PAGES,
	KVM_SMI, SEV_ISSUE_CMD,
};

/* Numbers that mean something somewhere. */
static const uint64_t telling[] = {
	0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 22, 32, 100, 101, 102, 104, 105, 0x10, 0x30000, 0x1000,
	0x2000, 0x7fff, 0x8000, 0xffff, 0x10000, 0x20000, 0x80000011, 0x7fffffff, 0x80000000,
	0xffffffff, 0x100000000, 0x7ffffffff000, 0x7fffffffffff, 0x800000000000,
	0x7fffffffffffffff, 0x8000000000000000, 0xfffffffffffff000, 0xffffffffffffffff,
};

static volatile int fds[FDS];
static struct kvm_run *volatile runs[RUNS];
static uint8_t *arena;
static pthread_mutex_t scribbling = PTHREAD_MUTEX_INITIALIZER;
static volatile int over;
static _Atomic int done;
static pthread_t threads[CALLERS];
static __thread uint64_t state;

static uint64_t any(void)
{
	/* xorshift64*, S. Vigna, "An experimental exploration of Marsaglia's xorshift" */
	state ^= state >> 12;
	state ^= state << 25;
	state ^= state >> 27;
	return state * 2685821657736338717UL;
}

static uint64_t below(uint64_t end)
{
	return any() % end;
}

static int any_fd(void)
{
	return below(40) ? fds[below(FDS)] : (int)any();
}

static uint64_t any_number(void)
{
	switch (below(8)) {
	case 0:
		return any();
	case 1:
		return (uintptr_t)arena + below(ARENA);
	case 2:
		return (uintptr_t)arena + below(ARENA / PAGE) * PAGE;
	case 3:
		return (uint64_t)any_fd() & (below(2) ? 0xffffffff : UINT64_MAX);
	case 4:
		return below(64) * PAGE;
	default:
		return telling[below(sizeof(telling) / sizeof(telling[0]))];
	}
}

static uint64_t any_pointer(void)
{
	switch (below(16)) {
	case 0:
		return any();
	case 1:
		return OF_THE_KERNEL + below(PAGE);
	case 2:
		return (uintptr_t)arena + ARENA - below(64);
	case 3:
		return (uintptr_t)runs[below(RUNS)];
	case 4:
		return any_number();
	default:
		return (uintptr_t)arena + below(ARENA - 2 * PAGE);
	}
}

static void scribble(uint8_t *place, unsigned int words)
{
	for (unsigned int i = 0; i < words; i++) {
		uint64_t number = any_number();

		memcpy(place + (below(2) ? 8 * i : 4 * i), &number, below(2) ? 8 : 4);
	}
}

static void keep(long fd)
{
	unsigned int place = below(FDS);

	if (fd < 0)
		return;
	syscall(SYS_close, fds[place]);
	fds[place] = (int)fd;
}

static int of_kind(unsigned int request)
{
	for (int tries = 0; tries < FDS; tries++) {
		char link[32], name[64] = "";
		int fd = fds[below(FDS)];
		const char *kind = "VM";

		snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
		if (readlink(link, name, sizeof(name) - 1) < 0)
			continue;
		if ((request & 0xff00) == 0x5300)
			kind = "/dev/sev";
		else if ((request & 0xff) < 0x40)
			kind = "/dev/kvm";
		else if ((request & 0xff) >= 0x80 && (request & 0xff) < 0xa0)
			kind = "kvm-vcpu";
		if (strstr(name, kind))
			return fd;
	}
	return any_fd();
}

static int new_vcpu(int vm)
{
	int vcpu = ioctl(vm, KVM_CREATE_VCPU, below(4));
	unsigned int place = below(RUNS);
	struct kvm_run *run;

	if (vcpu < 0)
		return vcpu;
	run = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run != MAP_FAILED) {
		pthread_mutex_lock(&scribbling);
		if (runs[place])
			munmap(runs[place], 3 * PAGE);
		runs[place] = run;
		pthread_mutex_unlock(&scribbling);
	}
	keep(vcpu);
	return vcpu;
}

/* Mostly what it is. */
static uint64_t roughly(uint64_t number)
{
	return below(24) ? number : any_number();
}

static void add_slot(int vm, uint32_t slot, uint64_t gpa, uint8_t *memory, int gmem)
{
	struct kvm_userspace_memory_region2 region = {
		.slot = (uint32_t)roughly(slot),
		.flags = (uint32_t)roughly(gmem < 0 ? 0 : KVM_MEM_GUEST_MEMFD),
		.guest_phys_addr = roughly(gpa),
		.memory_size = roughly(16 * PAGE),
		.userspace_addr = roughly((uintptr_t)memory),
		.guest_memfd_offset = roughly(0),
		.guest_memfd = (uint32_t)roughly((uint64_t)gmem),
	};

	ioctl(vm, KVM_SET_USER_MEMORY_REGION2, &region);
}

static void start(int vm, uint64_t rip)
{
	struct kvm_regs regs = { .rip = roughly(rip), .rflags = roughly(2), .rsp = any_number(),
				 .rax = any_number(), .rbx = any_number(), .rcx = any_number() };
	struct kvm_sregs sregs;
	int vcpu = new_vcpu(vm);

	if (vcpu < 0 || ioctl(vcpu, KVM_GET_SREGS, &sregs))
		return;
	sregs.cs.base = roughly(0);
	sregs.cs.selector = (uint16_t)roughly(0);
	sregs.cr0 = roughly(sregs.cr0);
	ioctl(vcpu, KVM_SET_SREGS, &sregs);
	ioctl(vcpu, KVM_SET_REGS, &regs);
}

static void plain_machine(void)
{
	int vm = ioctl(of_kind(KVM_CREATE_VM), KVM_CREATE_VM, 0);
	uint8_t *memory = arena + below(ARENA / PAGE - 20) * PAGE;

	keep(vm);
	if (!below(4))
		ioctl(vm, KVM_CREATE_IRQCHIP, 0);
	add_slot(vm, 0, 0, memory, -1);
	add_slot(vm, 1, below(3) * 8 * PAGE, memory + PAGE, -1);
	start(vm, PAGE + below(PAGE));
	if (!below(2))
		start(vm, PAGE);
}

static void snp_machine(void)
{
	int vm = ioctl(of_kind(KVM_CREATE_VM), KVM_CREATE_VM, KVM_X86_SNP_VM);
	int sev = of_kind(SEV_ISSUE_CMD);
	uint8_t *memory = arena + below(ARENA / PAGE - 20) * PAGE;
	struct kvm_sev_init init = { roughly(0), (uint32_t)roughly(0), (uint16_t)roughly(0), 0,
				     { 0 } };
	struct kvm_create_guest_memfd create = { .size = roughly(16 * PAGE) };
	struct kvm_memory_attributes attributes = { roughly(0), roughly(16 * PAGE), roughly(8), 0 };
	struct kvm_sev_snp_launch_start begin = { .policy = roughly(0x30000) };
	struct kvm_sev_snp_launch_finish finish = { 0 };
	int gmem;

	keep(vm);
	sev_command(vm, KVM_SEV_INIT2, &init, -1);
	gmem = ioctl(vm, KVM_CREATE_GUEST_MEMFD, &create);
	add_slot(vm, 0, 0, memory, gmem);
	keep(gmem);
	ioctl(vm, KVM_SET_MEMORY_ATTRIBUTES, &attributes);
	sev_command(vm, KVM_SEV_SNP_LAUNCH_START, &begin, sev);
	for (uint64_t page = 0; page < 7; page++) {
		struct kvm_sev_snp_launch_update update = {
			.gfn_start = roughly(2 * page), .uaddr = roughly((uintptr_t)memory),
			.len = roughly((1 + below(2)) * PAGE), .type = (uint8_t)roughly(page),
		};

		sev_command(vm, KVM_SEV_SNP_LAUNCH_UPDATE, &update, sev);
	}
	start(vm, PAGE + below(PAGE));
	if (!below(2))
		start(vm, PAGE);
	sev_command(vm, KVM_SEV_SNP_LAUNCH_FINISH, &finish, sev);
}

/* All signals but the one that ends a run are blocked meanwhile, or none. */
static void set_mask(int vcpu)
{
	struct {
		struct kvm_signal_mask header;
		uint64_t mask;
	} __attribute__((packed)) blocked = { { .len = 8 }, any() & ~(1UL << (SIGUSR1 - 1)) };

	ioctl(vcpu, KVM_SET_SIGNAL_MASK, below(2) ? &blocked : NULL);
}

/* Ask for exits and events of all sorts. */
static void configure(int vm)
{
	static const uint32_t caps[] = {
		KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_MAX_VCPU_ID, KVM_CAP_X86_USER_SPACE_MSR,
		KVM_CAP_EXIT_HYPERCALL, KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_X86_APIC_BUS_CYCLES_NS,
		KVM_CAP_SNP_DIRECT_VMSA,
	};
	struct kvm_enable_cap cap = { .cap = (uint32_t)roughly(caps[below(7)]),
				      .args = { below(2) ? 0 : any_number() } };
	struct kvm_ioeventfd event = { any_number(), below(64) * PAGE, (uint32_t)below(9),
				       any_fd(), (uint32_t)below(16), { 0 } };
	struct kvm_irqfd irq = { (uint32_t)any_fd(), (uint32_t)below(24), (uint32_t)below(4),
				 (uint32_t)any_fd(), { 0 } };

	ioctl(vm, KVM_ENABLE_CAP, &cap);
	ioctl(vm, KVM_IOEVENTFD, &event);
	ioctl(vm, KVM_IRQFD, &irq);
	keep(eventfd((unsigned int)any(), EFD_NONBLOCK));
}

/* What makes sense, so that some calls come far. */
static void go_on(void)
{
	switch (below(16)) {
	case 0:
		keep(open("/dev/kvm", O_RDWR));
		break;
	case 1:
		keep(open("/dev/sev", O_RDWR));
		break;
	case 2:
		plain_machine();
		break;
	case 3:
		snp_machine();
		break;
	case 4:
		set_mask(of_kind(KVM_RUN));
		break;
	case 5:
		configure(of_kind(KVM_CREATE_VCPU));
		break;
	default:
		ioctl(of_kind(KVM_RUN), KVM_RUN, 0);
	}
}

static void at_random(void)
{
	unsigned int request = requests[below(sizeof(requests) / sizeof(requests[0]))];
	int fd = below(4) ? of_kind(request) : any_fd();
	uint64_t pointer = below(8) ? any_pointer() : any_number();
	long result;

	if (pointer - (uintptr_t)arena < ARENA - 2 * PAGE)
		scribble((uint8_t *)pointer, 1 + below(12));
	if (!below(16))
		request = ((unsigned int)any() & ~0xff00U) | 0xae00;
	result = syscall(SYS_ioctl, fd, request, pointer);
	if (request == KVM_CREATE_VM || request == KVM_CREATE_VCPU ||
	    request == KVM_CREATE_GUEST_MEMFD)
		keep(result);
}

static void on_the_side(void)
{
	static const int modes[] = { 0, FALLOC_FL_KEEP_SIZE,
				     FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 0x10, -1 };
	static const char *const paths[] = { "/dev/kvm", "/dev/sev", "/dev/../dev/kvm", "kvm",
					     "/proc/self/fd/5" };
	uint64_t how[3] = { any_number(), any_number(), any_number() };
	int fd = any_fd();
	size_t size;
	void *mapped;

	switch (below(9)) {
	case 0:
		syscall(SYS_close, fds[below(FDS)]);
		break;
	case 1:
		keep(dup(fd));
		break;
	case 2:
		syscall(SYS_fallocate, fd, modes[below(5)], any_number(), any_number());
		break;
	case 3:
		size = (1 + below(4)) * PAGE;
		mapped = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, below(3) * PAGE);
		if (mapped != MAP_FAILED)
			munmap(mapped, size);
		break;
	case 4:
		syscall(SYS_ftruncate, fd, any_number());
		break;
	case 5:
		keep(syscall(SYS_openat2, any_fd(), paths[below(5)], how, below(2) ? 24 : any()));
		break;
	case 6:
		keep(syscall(SYS_openat, any_fd(), below(2) ? paths[below(5)] : (char *)any_pointer(),
			     (int)any(), 0));
		break;
	case 7:
		syscall(SYS_faccessat, any_fd(), paths[below(5)], (int)any());
		break;
	default:
		fcntl(fd, below(2) ? F_ADD_SEALS : F_SETFL, (int)any());
	}
}

struct caller {
	uint64_t seed, count;
};

static void *call(void *argument)
{
	const struct caller *caller = argument;

	state = caller->seed;
	for (uint64_t i = 0; i < caller->count; i++) {
		switch (below(8)) {
		case 0:
			on_the_side();
			break;
		case 1:
		case 2:
			go_on();
			break;
		default:
			at_random();
		}
	}
	done++;
	return NULL;
}

/* No vCPU runs for long, and no content of its pages stays what it was. */
static void *disturb(void *seed)
{
	const struct timespec moment = { 0, 1000000 };

	state = (uintptr_t)seed;
	for (unsigned int round = 0; !over; round++) {
		pthread_mutex_lock(&scribbling);
		for (int i = 0; i < RUNS; i++) {
			if (!runs[i])
				continue;
			scribble((uint8_t *)runs[i] + below(2 * PAGE), 8);
			runs[i]->immediate_exit = !(round % 8);
		}
		pthread_mutex_unlock(&scribbling);
		if (round % 4 == 3)
			pthread_kill(threads[below(CALLERS)], SIGUSR1);
		scribble(arena + below(ARENA - PAGE), 16);
		nanosleep(&moment, NULL);
	}
	return NULL;
}

static void all(char **arguments)
{
	uint64_t seed = 2 * strtoull(arguments[0], NULL, 0) + 1;
	uint64_t count = strtoull(arguments[1], NULL, 0);
	const struct timespec moment = { 0, 1000000 };
	struct caller callers[CALLERS];
	pthread_t disturber;

	handle(SIGUSR1, 0);
	arena = pages(ARENA / PAGE);
	for (int i = 0; i < FDS; i++)
		fds[i] = -1;
	for (int i = 0; i < CALLERS; i++) {
		callers[i] = (struct caller){ seed * 131071 + i, count };
		CHECK(!pthread_create(&threads[i], NULL, call, &callers[i]));
	}
	CHECK(!pthread_create(&disturber, NULL, disturb, (void *)(seed * 8191)));
	while (done < CALLERS)
		nanosleep(&moment, NULL);
	over = 1;
	pthread_join(disturber, NULL);
	for (int i = 0; i < CALLERS; i++)
		pthread_join(threads[i], NULL);
	printf("answered %lu\n", CALLERS * count);
}

const struct command commands[] = { { "all", all }, { NULL, NULL } };
