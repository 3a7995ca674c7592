/* Pointers that lead nowhere. */
#define _GNU_SOURCE
#include "client.h"

static char *mapped; /* one page that can be read and written, and none behind it */
static char *read_only;

static void set_up(void)
{
	char *place = pages(4);

	CHECK(!munmap(place + PAGE, PAGE));
	mapped = place;
	read_only = place + 2 * PAGE;
	CHECK(!mprotect(read_only, PAGE, PROT_READ));
	CHECK(!munmap(place + 3 * PAGE, PAGE));
}

/* Whatever the request, its struct is in none of these places, or not the whole of it. */
static void is_refused(int fd, unsigned long request)
{
	const uintptr_t places[] = {
		0, (uintptr_t)mapped + PAGE, (uintptr_t)mapped + PAGE - 1, OF_THE_KERNEL,
		OF_THE_KERNEL - 1, NON_CANONICAL, NON_CANONICAL - 1, UINTPTR_MAX,
	};

	for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
		if (ioctl(fd, request, places[i]) != -1 || errno != EFAULT) {
			fprintf(stderr, "request %#lx at %#lx: %m\n", request, places[i]);
			exit(1);
		}
	}
}

#define REFUSED(fd, ...)                                                                       \
	do {                                                                                   \
		const unsigned long requests[] = { __VA_ARGS__ };                              \
		for (size_t i = 0; i < sizeof(requests) / sizeof(requests[0]); i++)            \
			is_refused(fd, requests[i]);                                           \
	} while (0)

/* What the kernel writes can't be written there. */
#define NOT_WRITTEN(fd, ...)                                                                   \
	do {                                                                                   \
		const unsigned long requests[] = { __VA_ARGS__ };                              \
		for (size_t i = 0; i < sizeof(requests) / sizeof(requests[0]); i++)            \
			FAILS(ioctl(fd, requests[i], read_only), EFAULT);                      \
	} while (0)

static void structs(char **arguments)
{
	int kvm = open_kvm(), vm = ioctl(kvm, KVM_CREATE_VM, 0), vcpu;

	set_up();
	REFUSED(kvm, KVM_GET_MSR_INDEX_LIST, KVM_GET_MSR_FEATURE_INDEX_LIST,
		KVM_GET_SUPPORTED_CPUID, KVM_GET_EMULATED_CPUID, KVM_GET_MSRS,
		KVM_GET_DEVICE_ATTR, KVM_HAS_DEVICE_ATTR, KVM_X86_GET_MCE_CAP_SUPPORTED);
	CHECK(!ioctl(vm, KVM_CREATE_IRQCHIP, 0));
	REFUSED(vm, KVM_SET_USER_MEMORY_REGION, KVM_SET_USER_MEMORY_REGION2,
		KVM_SET_IDENTITY_MAP_ADDR, KVM_IRQ_LINE, KVM_IRQ_LINE_STATUS,
		KVM_SET_GSI_ROUTING, KVM_CREATE_PIT2, KVM_SET_CLOCK, KVM_GET_CLOCK,
		KVM_ENABLE_CAP, KVM_SIGNAL_MSI, KVM_MEMORY_ENCRYPT_REG_REGION,
		KVM_MEMORY_ENCRYPT_UNREG_REGION, KVM_X86_SET_MSR_FILTER,
		KVM_SET_MEMORY_ATTRIBUTES, KVM_CREATE_GUEST_MEMFD, KVM_IRQFD, KVM_IOEVENTFD,
		KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG, KVM_REGISTER_COALESCED_MMIO,
		KVM_UNREGISTER_COALESCED_MMIO);
	NOT_WRITTEN(vm, KVM_GET_CLOCK);
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	CHECK(vcpu >= 0);
	REFUSED(vcpu, KVM_GET_REGS, KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS, KVM_TRANSLATE,
		KVM_INTERRUPT, KVM_GET_MSRS, KVM_SET_MSRS, KVM_GET_FPU, KVM_SET_FPU,
		KVM_GET_LAPIC, KVM_SET_LAPIC, KVM_SET_CPUID2, KVM_GET_CPUID2, KVM_GET_MP_STATE,
		KVM_SET_MP_STATE, KVM_SET_GUEST_DEBUG, KVM_GET_VCPU_EVENTS,
		KVM_SET_VCPU_EVENTS, KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, KVM_GET_XSAVE,
		KVM_SET_XSAVE, KVM_GET_XCRS, KVM_SET_XCRS, KVM_GET_SREGS2, KVM_SET_SREGS2,
		KVM_PRE_FAULT_MEMORY, KVM_SET_DEVICE_ATTR, KVM_GET_DEVICE_ATTR,
		KVM_HAS_DEVICE_ATTR, KVM_TPR_ACCESS_REPORTING, KVM_SET_VAPIC_ADDR,
		KVM_X86_SETUP_MCE, KVM_GET_XSAVE2);
	NOT_WRITTEN(vcpu, KVM_GET_REGS, KVM_GET_SREGS, KVM_TRANSLATE, KVM_GET_FPU, KVM_GET_LAPIC,
		    KVM_GET_MP_STATE, KVM_GET_VCPU_EVENTS, KVM_GET_DEBUGREGS, KVM_GET_XSAVE,
		    KVM_GET_XCRS, KVM_GET_SREGS2, KVM_GET_XSAVE2, KVM_TPR_ACCESS_REPORTING);
}

/* The head of a list is there, the list isn't. */
static void lists(char **arguments)
{
	struct machine machine = new_machine("\xf4", 1);
	struct kvm_msrs *msrs;
	struct kvm_cpuid2 *cpuid;
	struct kvm_msr_list *list;
	struct kvm_signal_mask *mask;

	set_up();
	msrs = (struct kvm_msrs *)(mapped + PAGE - sizeof(*msrs) - sizeof(struct kvm_msr_entry));
	msrs->nmsrs = 2;
	FAILS(ioctl(machine.vcpu, KVM_GET_MSRS, msrs), EFAULT);
	FAILS(ioctl(machine.vcpu, KVM_SET_MSRS, msrs), EFAULT);
	FAILS(ioctl(machine.kvm, KVM_GET_MSRS, msrs), EFAULT);
	cpuid = (struct kvm_cpuid2 *)(mapped + PAGE - sizeof(*cpuid));
	cpuid->nent = 1;
	FAILS(ioctl(machine.vcpu, KVM_SET_CPUID2, cpuid), EFAULT);
	cpuid->nent = 200;
	FAILS(ioctl(machine.kvm, KVM_GET_SUPPORTED_CPUID, cpuid), EFAULT);
	FAILS(ioctl(machine.kvm, KVM_GET_EMULATED_CPUID, cpuid), EFAULT);
	list = (struct kvm_msr_list *)(mapped + PAGE - sizeof(*list) - 4);
	list->nmsrs = 100000;
	FAILS(ioctl(machine.kvm, KVM_GET_MSR_INDEX_LIST, list), EFAULT);
	mask = (struct kvm_signal_mask *)(mapped + PAGE - sizeof(*mask));
	mask->len = 8;
	FAILS(ioctl(machine.vcpu, KVM_SET_SIGNAL_MASK, mask), EFAULT);
	/* Nothing of that did harm. */
	CHECK(!ioctl(machine.vcpu, KVM_RUN, 0) && machine.run->exit_reason == KVM_EXIT_HLT);
}

/* A pointer inside the struct. */
static void nested(char **arguments)
{
	int kvm = open_kvm(), sev = open("/dev/sev", O_RDWR), vm = new_snp_vm(kvm);
	int fresh = ioctl(kvm, KVM_CREATE_VM, KVM_X86_SNP_VM);
	struct kvm_device_attr attribute = { .group = KVM_X86_GRP_SEV,
					     .attr = KVM_X86_SEV_VMSA_FEATURES };
	struct sev_issue_cmd issue = { .cmd = SNP_SET_CONFIG };
	uintptr_t places[] = { 0, OF_THE_KERNEL - 1, NON_CANONICAL, UINTPTR_MAX };

	set_up();
	places[0] = (uintptr_t)mapped + PAGE - 1;
	CHECK(fresh >= 0 && sev >= 0);
	for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
		FAILS(ioctl(vm, KVM_MEMORY_ENCRYPT_OP, places[i]), EFAULT);
		FAILS(sev_command(fresh, KVM_SEV_INIT2, (void *)places[i], sev), EFAULT);
		FAILS(sev_command(vm, KVM_SEV_SNP_LAUNCH_START, (void *)places[i], sev), EFAULT);
		issue.data = places[i];
		FAILS(ioctl(sev, SEV_ISSUE_CMD, &issue), EFAULT);
		attribute.addr = places[i];
		FAILS(ioctl(kvm, KVM_GET_DEVICE_ATTR, &attribute), EFAULT);
	}
	is_refused(sev, SEV_ISSUE_CMD);
	FAILS(open((char *)NON_CANONICAL, O_RDWR), EFAULT);
	FAILS(access(mapped + PAGE, R_OK), EFAULT);
	FAILS(syscall(SYS_openat2, -1, "/dev/kvm", mapped + PAGE - 23, 24), EFAULT);
	/* A path that ends at the end of memory is one. */
	memcpy(mapped + PAGE - 9, "/dev/kvm", 9);
	CHECK(open(mapped + PAGE - 9, O_RDWR) >= 0);
	FAILS(open(mapped + PAGE - 8, O_RDWR), ENOENT);
}

/* Numbers in structs that are no descriptors, or other ones. */
static void numbers(char **arguments)
{
	int kvm = open_kvm(), vm = new_snp_vm(kvm), sev = open("/dev/sev", O_RDWR);
	const uint32_t wrong[] = { -1, INT32_MIN, INT32_MAX, 0x12345678, (uint32_t)kvm,
				   (uint32_t)vm, 2 };
	struct kvm_sev_snp_launch_start start = { .policy = 0x30000 };
	struct kvm_userspace_memory_region2 region = { .flags = KVM_MEM_GUEST_MEMFD,
						       .memory_size = PAGE };

	for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
		/* snp_launch_start(): no context comes of it, and that is all it says. */
		FAILS(sev_command(vm, KVM_SEV_SNP_LAUNCH_START, &start, wrong[i]), ENOTTY);
		region.guest_memfd = wrong[i];
		CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION2, &region) == -1);
		CHECK(errno == (i < 4 ? EBADF : EINVAL));
	}
	CHECK(!sev_command(vm, KVM_SEV_SNP_LAUNCH_START, &start, sev));
}

/* The firmware starts, but its caller isn't told: the command can't be written. */
static void untold(char **arguments)
{
	struct kvm_sev_snp_launch_start start = { .policy = 0x30000 };
	struct kvm_sev_snp_launch_finish finish = { 0 };
	int kvm = open_kvm(), vm = new_snp_vm(kvm), sev = open("/dev/sev", O_RDWR);
	struct kvm_sev_cmd *command = pages(1);

	CHECK(sev >= 0);
	*command = (struct kvm_sev_cmd){ KVM_SEV_SNP_LAUNCH_START, .data = (uintptr_t)&start,
					 .sev_fd = sev };
	CHECK(!mprotect(command, PAGE, PROT_READ));
	FAILS(ioctl(vm, KVM_MEMORY_ENCRYPT_OP, command), EFAULT);
	FAILS(sev_command(kvm, KVM_SEV_SNP_LAUNCH_FINISH, &finish, sev), EINVAL);
	CHECK(!sev_command(vm, KVM_SEV_SNP_LAUNCH_FINISH, &finish, sev));
}

const struct command commands[] = {
	{ "structs", structs }, { "lists", lists }, { "nested", nested },
	{ "numbers", numbers }, { "untold", untold }, { NULL, NULL },
};
