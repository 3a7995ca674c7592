/* Descriptors: copies, reopened ones, those that are closed behind everybody's back. */
#define _GNU_SOURCE
#include <linux/falloc.h>
#include <linux/openat2.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "client.h"

enum { MORE_THAN_ASIDS = 150 };

static int new_vm(int kvm)
{
	int vm = ioctl(kvm, KVM_CREATE_VM, 0);

	CHECK(vm >= 0);
	return vm;
}

static int answers(int vm)
{
	return ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == 1;
}

static void copies(char **arguments)
{
	int kvm = open_kvm(), vm = new_vm(kvm);
	int copy = dup(vm), high = fcntl(vm, F_DUPFD, 500), closing = fcntl(vm, F_DUPFD_CLOEXEC, 0);

	CHECK(copy > vm && high >= 500 && closing > copy);
	CHECK(!close(vm) && answers(copy) && answers(high) && answers(closing));
	CHECK(dup2(copy, 77) == 77 && !close(copy) && !close(high) && !close(closing));
	CHECK(answers(77));
	FAILS(ioctl(vm, KVM_CHECK_EXTENSION, 0), EBADF);
	/* Descriptors of the kernel's making are closed by exec, others as they are opened. */
	CHECK(fcntl(new_vm(kvm), F_GETFD) == FD_CLOEXEC);
	CHECK(fcntl(kvm, F_GETFD) == FD_CLOEXEC);
	CHECK(fcntl(open("/dev/kvm", O_RDWR), F_GETFD) == 0);
}

static void behind(char **arguments)
{
	int kvm = open_kvm(), vm = new_vm(kvm), other = new_vm(kvm), null = open("/dev/null", O_RDWR);
	int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);

	CHECK(dup2(null, vcpu) == vcpu);
	FAILS(ioctl(vcpu, KVM_RUN, 0), ENOTTY);
	CHECK(dup2(other, vm) == vm);
	CHECK(ioctl(vm, KVM_CREATE_VCPU, 0) >= 0); /* it is the other one, which had none */
	CHECK(!close_range(3, ~0U, 0));
	FAILS(ioctl(vm, KVM_CHECK_EXTENSION, 0), EBADF);
	FAILS(ioctl(-1, KVM_CREATE_VM, 0), EBADF);
	FAILS(ioctl(0, KVM_CREATE_VM, 0), ENOTTY);
	CHECK(open_kvm() == 3 && new_vm(3) == 4 && answers(4));
}

/* An SNP VM has an ASID, and there are so many: what is closed gives its own back. */
static void released(char **arguments)
{
	int kvm = open_kvm(), pair[2], vm, vcpu;
	void *run;
	char byte;

	for (int i = 0; i < MORE_THAN_ASIDS; i++)
		CHECK(!close(new_snp_vm(kvm)));
	for (int i = 0; i < MORE_THAN_ASIDS / 2; i++) {
		vm = new_snp_vm(kvm);
		vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
		CHECK(vcpu >= 0);
		run = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
		CHECK(run != MAP_FAILED && !close(dup(vcpu)));
		CHECK(!close(vm) && !close(vcpu) && !munmap(run, PAGE));
	}
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	for (int i = 0; i < MORE_THAN_ASIDS / 2; i++) {
		vm = new_snp_vm(kvm);
		send_fd(pair[0], vm);
		CHECK(!close(vm));
		CHECK(read(pair[1], &byte, 1) == 1); /* the descriptor is dropped */
	}
}

/* A descriptor, a mapping, or a message under way keeps a VM. */
static void held(char **arguments)
{
	struct kvm_sev_init init = { 0 };
	int kvm = open_kvm(), made = 0, vm, vcpu;

	while ((vm = ioctl(kvm, KVM_CREATE_VM, KVM_X86_SNP_VM)) >= 0 &&
	       !sev_command(vm, KVM_SEV_INIT2, &init, -1)) {
		CHECK(made++ < MORE_THAN_ASIDS);
		vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
		CHECK(vcpu >= 0);
		CHECK(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, vcpu, 0) != MAP_FAILED);
		CHECK(!close(vm) && !close(vcpu));
	}
	CHECK(vm >= 0 && errno == EBUSY);
	printf("%d\n", made);
}

static void reopened(char **arguments)
{
	int kvm = open_kvm(), vm = new_vm(kvm), again[2];
	char path[64];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", vm);
	FAILS(open(path, O_RDWR), ENXIO);
	FAILS(open(path, O_RDONLY), ENXIO);
	snprintf(path, sizeof(path), "/dev/fd/%d", ioctl(vm, KVM_CREATE_VCPU, 0));
	FAILS(open(path, O_RDWR), ENXIO);
	snprintf(path, sizeof(path), "/proc/%d/fd/%d", getpid(), kvm);
	for (int i = 0; i < 2; i++) {
		again[i] = open(path, O_RDWR);
		CHECK(again[i] >= 0);
	}
	CHECK(!close(again[0]) && !close(kvm));
	CHECK(ioctl(again[1], KVM_GET_API_VERSION, 0) == 12);
	CHECK(answers(vm));
}

static int open2(int directory, const char *path, uint64_t flags, size_t size)
{
	struct open_how how = { .flags = flags };

	return (int)syscall(SYS_openat2, directory, path, &how, size);
}

static int is_simulated(int fd)
{
	char link[32], name[64] = "";

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	CHECK(readlink(link, name, sizeof(name) - 1) > 0);
	return strstr(name, "simulated") != NULL;
}

static void opened(char **arguments)
{
	int directory = open("/dev", O_PATH | O_DIRECTORY), fd;
	const size_t size = sizeof(struct open_how);

	CHECK(ioctl(openat(directory, "kvm", O_RDWR), KVM_GET_API_VERSION, 0) == 12);
	CHECK(ioctl(open2(directory, "kvm", O_RDWR, size), KVM_GET_API_VERSION, 0) == 12);
	CHECK(ioctl(openat(-5, "/dev//./kvm", O_RDWR), KVM_GET_API_VERSION, 0) == 12);
	CHECK(ioctl((int)syscall(SYS_open, "/dev/../dev/kvm", O_RDWR), KVM_GET_API_VERSION, 0) == 12);
	CHECK(open("//dev/sev", O_RDWR) >= 0);
	CHECK(fcntl(open2(directory, "kvm", O_RDWR | O_CLOEXEC, size), F_GETFD) == FD_CLOEXEC);
	CHECK(fcntl(open2(directory, "kvm", O_RDWR, size), F_GETFD) == 0);
	FAILS(open2(directory, "kvm", O_RDWR, size - 1), EINVAL);
	FAILS(openat(-5, "dev/kvm", O_RDWR), EBADF);
	FAILS(open("dev/kvm", O_RDWR), ENOENT);
	FAILS(open("/dev/kvm", O_RDWR | O_DIRECTORY), ENOTDIR);
	FAILS(open("/dev/kvm", O_RDWR | O_CREAT | O_EXCL, 0600), EEXIST);
	FAILS(open("/dev/kvm/", O_RDWR), ENOTDIR);
	CHECK(!chdir("/dev"));
	fd = open("kvm", O_RDONLY);
	CHECK(ioctl(fd, KVM_GET_API_VERSION, 0) == 12);
	CHECK(is_simulated(fd));
	CHECK(!access("kvm", R_OK | W_OK) && !access("/dev/sev", F_OK));
	CHECK(!faccessat(directory, "sev", R_OK | W_OK, 0));
	FAILS(access("/dev/kvm", X_OK), EACCES);
	FAILS(faccessat(directory, "kvm", X_OK, AT_EACCESS), EACCES);
	FAILS(access("/dev/kvm", 8), EINVAL);
	/* What is only a name is the machine's, which may have none. */
	fd = open("/dev/kvm", O_PATH);
	CHECK(fd >= 0 ? !is_simulated(fd) : errno == ENOENT);
	/* Others are left alone. */
	CHECK(open("/dev/null", O_RDWR) >= 0);
	FAILS(open("/nowhere/kvm", O_RDWR), ENOENT);
}

/* What the kernel's modules tell of themselves. */
static void parameters(char **arguments)
{
	static const char snp[] = "/sys/module/kvm_amd/parameters/sev_snp";
	static const char none[] = "/sys/module/kvm_intel/parameters/nested";
	int fd = open(snp, O_RDONLY);
	char text[8];

	CHECK(read(fd, text, sizeof(text)) == 2 && !memcmp(text, "Y\n", 2));
	CHECK(fcntl(fd, F_GETFD) == 0);
	CHECK(fcntl(open(snp, O_RDONLY | O_CLOEXEC), F_GETFD) == FD_CLOEXEC);
	FAILS(write(fd, text, 1), EBADF);
	FAILS(open(snp, O_RDWR), EACCES);
	FAILS(open(snp, O_WRONLY), EACCES);
	CHECK(!access(snp, R_OK));
	FAILS(access(snp, X_OK), EACCES);
	FAILS(open(none, O_RDONLY), ENOENT);
	FAILS(access(none, F_OK), ENOENT);
}

/* No room for one more: nothing is left of what could not be given. */
static void full(char **arguments)
{
	int kvm = open_kvm(), vm = new_vm(kvm), last = dup(vm);
	struct rlimit limit = { last, last };
	struct kvm_create_guest_memfd create = { .size = PAGE };

	CHECK(!close(last) && !getrlimit(RLIMIT_NOFILE, &limit));
	limit.rlim_cur = last;
	CHECK(!setrlimit(RLIMIT_NOFILE, &limit));
	FAILS(ioctl(kvm, KVM_CREATE_VM, 0), EMFILE);
	FAILS(ioctl(vm, KVM_CREATE_VCPU, 0), EMFILE);
	FAILS(open("/dev/kvm", O_RDWR), EMFILE);
	limit.rlim_cur = last + 1;
	CHECK(!setrlimit(RLIMIT_NOFILE, &limit));
	CHECK(ioctl(vm, KVM_CREATE_VCPU, 0) == last);
	FAILS(ioctl(vm, KVM_CREATE_GUEST_MEMFD, &create), EMFILE);
	CHECK(!close(last) && ioctl(kvm, KVM_CREATE_VM, 0) == last);
}

/* The whole system has no more; what there is goes on, and there are more once some are closed. */
static void crowded(char **arguments)
{
	struct machine machine = new_machine("\xf4", 1);
	struct rlimit limit;
	int made = 0, vm, first = 0;

	CHECK(!getrlimit(RLIMIT_NOFILE, &limit));
	limit.rlim_cur = limit.rlim_max;
	CHECK(!setrlimit(RLIMIT_NOFILE, &limit));
	for (; (vm = ioctl(machine.kvm, KVM_CREATE_VM, 0)) >= 0; made++)
		first = first ? first : vm;
	CHECK(errno == ENFILE);
	FAILS(ioctl(first, KVM_CREATE_VCPU, 0), ENFILE);
	CHECK(!ioctl(machine.vcpu, KVM_RUN, 0) && machine.run->exit_reason == KVM_EXIT_HLT);
	CHECK(!close(first + 1) && !close(first + 2));
	CHECK(ioctl(first, KVM_CREATE_VCPU, 0) >= 0);
	printf("%d\n", made);
}

/* What a file of KVM's is not for. */
static void misused(char **arguments)
{
	struct machine machine = new_machine("\xf4", 1);
	int snp = new_snp_vm(machine.kvm);
	struct kvm_create_guest_memfd create = { .size = 4 * PAGE };
	int gmem = ioctl(snp, KVM_CREATE_GUEST_MEMFD, &create);
	const int all[] = { machine.kvm, machine.vm, machine.vcpu, gmem };
	char byte = 0;

	CHECK(gmem >= 0);
	for (int i = 0; i < 4; i++) {
		CHECK(ftruncate(all[i], 0) == -1 && ftruncate(all[i], 1 << 20) == -1);
		if (all[i] != machine.vcpu) {
			FAILS(read(all[i], &byte, 1), EBADF);
			FAILS(write(all[i], &byte, 1), EBADF);
			FAILS((intptr_t)mmap(NULL, PAGE, PROT_READ, MAP_SHARED, all[i], 0), ENODEV);
		}
		CHECK(fcntl(all[i], F_ADD_SEALS, F_SEAL_WRITE) == -1);
		/* Where the descriptor doesn't count. */
		CHECK(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, all[i], 0) !=
		      MAP_FAILED);
	}
	FAILS(fallocate(machine.vcpu, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 0, PAGE), ENODEV);
	CHECK(!fallocate(gmem, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 0, PAGE));
	FAILS(fallocate(gmem, FALLOC_FL_KEEP_SIZE, -1, PAGE), EINVAL);
	FAILS(fallocate(gmem, FALLOC_FL_KEEP_SIZE, 8 * PAGE, PAGE), EINVAL);
	CHECK(!madvise(machine.run, PAGE, MADV_REMOVE) || errno == EINVAL || errno == EACCES);
	CHECK(!ioctl(machine.vcpu, KVM_RUN, 0) && machine.run->exit_reason == KVM_EXIT_HLT);
}

const struct command commands[] = {
	{ "copies", copies }, { "behind", behind }, { "released", released }, { "held", held },
	{ "reopened", reopened }, { "opened", opened }, { "parameters", parameters }, { "full", full },
	{ "crowded", crowded }, { "misused", misused }, { NULL, NULL },
};
