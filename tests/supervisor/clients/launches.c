/* Launches of SNP guests: "two" prints where the pages of each guest are, which take turns. */
#include "client.h"

static void update(int vm, int sev, uint64_t page, uint8_t *from, uint8_t type, int count)
{
	struct kvm_sev_snp_launch_update update = {
		.gfn_start = page, .uaddr = (uintptr_t)from, .len = count * PAGE, .type = type,
	};

	CHECK(!sev_command(vm, KVM_SEV_SNP_LAUNCH_UPDATE, &update, sev) && !update.len);
}

static int new_guest(int kvm, int sev, uint8_t *ram, uint64_t policy)
{
	struct kvm_sev_snp_launch_start start = { .policy = policy };
	struct kvm_create_guest_memfd create = { .size = RAM_PAGES * PAGE };
	struct kvm_memory_attributes attributes = { 0, RAM_PAGES * PAGE,
						    KVM_MEMORY_ATTRIBUTE_PRIVATE, 0 };
	struct kvm_userspace_memory_region2 region = {
		.flags = KVM_MEM_GUEST_MEMFD,
		.memory_size = RAM_PAGES * PAGE,
		.userspace_addr = (uintptr_t)ram,
	};
	int vm = new_snp_vm(kvm), gmem = ioctl(vm, KVM_CREATE_GUEST_MEMFD, &create);

	CHECK(gmem >= 0);
	region.guest_memfd = (uint32_t)gmem;
	CHECK(!ioctl(vm, KVM_SET_USER_MEMORY_REGION2, &region));
	CHECK(!ioctl(vm, KVM_SET_MEMORY_ATTRIBUTES, &attributes));
	CHECK(!sev_command(vm, KVM_SEV_SNP_LAUNCH_START, &start, sev));
	return vm;
}

static void two(char **arguments)
{
	int kvm = open_kvm(), sev = open("/dev/sev", O_RDWR), vms[2];
	struct kvm_sev_snp_launch_finish finish = { 0 };
	uint8_t *ram[2];

	CHECK(sev >= 0);
	for (int i = 0; i < 2; i++) {
		ram[i] = pages(RAM_PAGES);
		vms[i] = new_guest(kvm, sev, ram[i], 0x30000);
	}
	for (int i = 1; i >= 0; i--)
		update(vms[i], sev, 1, ram[i] + PAGE, KVM_SEV_SNP_PAGE_TYPE_NORMAL, 2);
	update(vms[1], sev, 4, NULL, KVM_SEV_SNP_PAGE_TYPE_ZERO, 1);
	CHECK(ioctl(vms[1], KVM_CREATE_VCPU, 0) >= 0);
	for (int i = 0; i < 2; i++)
		CHECK(!sev_command(vms[i], KVM_SEV_SNP_LAUNCH_FINISH, &finish, sev));
	printf("%#lx %#lx\n", (uintptr_t)ram[0], (uintptr_t)ram[1]);
}

const struct command commands[] = { { "two", two }, { NULL, NULL } };
