/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The least that runs an example guest on plain KVM as `kvmlaunch run` does: 256 MiB of
 * memory, the ELF64 segments, 32-bit mode without paging (but no PVH start info, which hello
 * doesn't read), console and exit port. Usage: launcher GUEST.elf
 */
#include <elf.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MEMORY = 256 << 20, CONSOLE = 0x3f8, EXIT = 0xf4 };

static int check(int ret, const char *what)
{
	if (ret < 0) {
		perror(what);
		exit(1);
	}
	return ret;
}

/* Returns the entry point. */
static uint64_t load(const char *path, char *memory)
{
	int fd = check(open(path, O_RDONLY), path);
	struct stat status;
	const char *image;
	const Elf64_Ehdr *header;

	check(fstat(fd, &status), "fstat");
	image = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (image == MAP_FAILED)
		check(-1, "mmap");
	header = (const void *)image;
	for (int i = 0; i < header->e_phnum; i++) {
		const Elf64_Phdr *segment = (const void *)(image + header->e_phoff);

		segment += i;
		if (segment->p_type == PT_LOAD)
			memcpy(memory + segment->p_paddr, image + segment->p_offset,
			       segment->p_filesz);
	}
	return header->e_entry;
}

static void enter_protected_mode(int vcpu, uint64_t entry)
{
	struct kvm_regs regs = { .rip = entry, .rflags = 2 };
	struct kvm_segment code = { .limit = -1, .selector = 8, .type = 11, .present = 1,
				    .s = 1, .db = 1, .g = 1 };
	struct kvm_segment data = { .limit = -1, .selector = 16, .type = 3, .present = 1,
				    .s = 1, .db = 1, .g = 1 };
	struct kvm_sregs sregs;

	check(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	sregs.cr0 = 0x11;
	check(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	check(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static void copy_cpuid(int kvm, int vcpu)
{
	struct kvm_cpuid2 *cpuid = calloc(1, sizeof(*cpuid) + 128 * sizeof(cpuid->entries[0]));

	cpuid->nent = 128;
	check(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid), "KVM_GET_SUPPORTED_CPUID");
	check(ioctl(vcpu, KVM_SET_CPUID2, cpuid), "KVM_SET_CPUID2");
	free(cpuid);
}

static int run(int vcpu, const struct kvm_run *state)
{
	for (;;) {
		check(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
		if (state->exit_reason == KVM_EXIT_HLT)
			return 0;
		if (state->exit_reason != KVM_EXIT_IO)
			return 1;
		if (state->io.port == CONSOLE)
			putchar(*((const char *)state + state->io.data_offset));
		else if (state->io.port == EXIT)
			return *((const char *)state + state->io.data_offset) != 0;
	}
}

int main(int argc, char **argv)
{
	struct kvm_userspace_memory_region region = { .memory_size = MEMORY };
	int kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	int vm, vcpu;
	struct kvm_run *state;
	uint64_t entry;
	char *memory;

	if (argc != 2)
		return 2;
	vm = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (memory == MAP_FAILED)
		check(-1, "mmap");
	region.userspace_addr = (uintptr_t)memory;
	check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
	entry = load(argv[1], memory);
	vcpu = check(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	state = mmap(NULL, check(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE"),
		     PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (state == MAP_FAILED)
		check(-1, "mmap");
	copy_cpuid(kvm, vcpu);
	enter_protected_mode(vcpu, entry);
	return run(vcpu, state);
}
