/* Eventfds of a client: what its guest's writes signal, and what wakes its vCPU. */
#define _GNU_SOURCE
#include "client.h"

#include <sys/eventfd.h>

static uint64_t count(int event)
{
	uint64_t value = 0;

	return read(event, &value, sizeof(value)) < 0 ? 0 : value;
}

static void signalled(char **arguments)
{
	static const uint8_t code[] = { 0xba, 0xf8, 0x03, 0xee, 0xf4 }; /* out 0x3f8, al; hlt */
	struct machine machine = new_machine(code, sizeof(code));
	struct kvm_ioeventfd place = { .addr = 0x3f8, .len = 1, .flags = KVM_IOEVENTFD_FLAG_PIO };
	int event = eventfd(0, EFD_NONBLOCK);

	(void)arguments;
	place.fd = -1;
	FAILS(ioctl(machine.vm, KVM_IOEVENTFD, &place), EBADF);
	place.fd = machine.kvm;
	FAILS(ioctl(machine.vm, KVM_IOEVENTFD, &place), EINVAL);
	place.fd = event;
	CHECK(!ioctl(machine.vm, KVM_IOEVENTFD, &place));
	FAILS(ioctl(machine.vm, KVM_IOEVENTFD, &place), EEXIST);
	CHECK(!ioctl(machine.vcpu, KVM_RUN, 0));
	CHECK(machine.run->exit_reason == KVM_EXIT_HLT);
	CHECK(count(event) == 1);
}

static void *signal_later(void *event)
{
	usleep(50000);
	CHECK(!eventfd_write(*(int *)event, 1));
	return NULL;
}

static void woken(char **arguments)
{
	/* sti; hlt; again. The handler: out 0x40, al; iret */
	static const uint8_t code[] = { 0xfb, 0xf4, 0xeb, 0xfc }, handler[] = { 0xe6, 0x40, 0xcf };
	struct kvm_enable_cap split = { .cap = KVM_CAP_SPLIT_IRQCHIP };
	int kvm = open_kvm(), vm = ioctl(kvm, KVM_CREATE_VM, 0), event = eventfd(0, EFD_NONBLOCK);
	struct kvm_userspace_memory_region slot = { .memory_size = RAM_PAGES * PAGE };
	struct kvm_irqfd irqfd = { .fd = (uint32_t)event, .gsi = 5 };
	struct kvm_lapic_state apic;
	struct kvm_sregs sregs;
	struct kvm_regs regs;
	uint8_t *ram = pages(RAM_PAGES);
	struct kvm_run *run;
	pthread_t thread;
	int vcpu;
	struct {
		struct kvm_irq_routing head;
		struct kvm_irq_routing_entry entry;
	} routes = { { .nr = 1 }, { .gsi = 5, .type = KVM_IRQ_ROUTING_MSI } };

	(void)arguments;
	FAILS(ioctl(vm, KVM_IRQFD, &irqfd), EINVAL);
	CHECK(!ioctl(vm, KVM_ENABLE_CAP, &split));
	memcpy(ram + CODE, code, sizeof(code));
	memcpy(ram + 0x2000, handler, sizeof(handler));
	memcpy(ram + 4 * 0x40, "\x00\x20\x00", 4);
	slot.userspace_addr = (uintptr_t)ram;
	CHECK(!ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot));
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	run = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	CHECK(vcpu >= 0 && run != MAP_FAILED);
	CHECK(!ioctl(vcpu, KVM_GET_SREGS, &sregs) && !ioctl(vcpu, KVM_GET_REGS, &regs));
	sregs.cs.base = sregs.cs.selector = 0;
	regs.rip = CODE;
	regs.rsp = 0x8000;
	CHECK(!ioctl(vcpu, KVM_SET_SREGS, &sregs) && !ioctl(vcpu, KVM_SET_REGS, &regs));
	CHECK(!ioctl(vcpu, KVM_GET_LAPIC, &apic));
	memcpy(apic.regs + 0xf0, "\xff\x01", 2); /* software enable */
	CHECK(!ioctl(vcpu, KVM_SET_LAPIC, &apic));
	routes.entry.u.msi.address_lo = 0xfee00000;
	routes.entry.u.msi.data = 0x40;
	CHECK(!ioctl(vm, KVM_SET_GSI_ROUTING, &routes));
	CHECK(!ioctl(vm, KVM_IRQFD, &irqfd));
	FAILS(ioctl(vm, KVM_IRQFD, &irqfd), EBUSY);
	CHECK(!pthread_create(&thread, NULL, signal_later, &event));
	CHECK(!ioctl(vcpu, KVM_RUN, 0));
	CHECK(run->exit_reason == KVM_EXIT_IO && run->io.port == 0x40);
	CHECK(!pthread_join(thread, NULL) && !count(event));
	irqfd.flags = KVM_IRQFD_FLAG_DEASSIGN;
	CHECK(!ioctl(vm, KVM_IRQFD, &irqfd));
	CHECK(!eventfd_write(event, 7));
	usleep(20000);
	CHECK(count(event) == 7);
}

const struct command commands[] = {
	{ "signalled", signalled },
	{ "woken", woken },
	{ NULL, NULL },
};
