/* What the clients have in common: checks that end the process, and small machines. */
#ifndef CLIENT_H
#define CLIENT_H

#include "kvmlaunch.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define CODE 0x1000UL
#define RAM_PAGES 16UL

/* Where nothing is ever mapped: the kernel's half, and between the halves. */
#define OF_THE_KERNEL 0xffff888000000000UL
#define NON_CANONICAL 0x0010000000000000UL

#define CHECK(condition)                                                                       \
	do {                                                                                   \
		if (!(condition))                                                              \
			fail(__FILE__, __LINE__, #condition);                                  \
	} while (0)

/* The call fails, and with this error. */
#define FAILS(call, error)                                                                     \
	do {                                                                                   \
		errno = 0;                                                                     \
		CHECK((call) == -1 && errno == (error));                                       \
	} while (0)

_Noreturn void fail(const char *file, int line, const char *condition);

/* What a client can do, up to an entry without a name; main() runs the one that it is told. */
struct command {
	const char *name;
	void (*run)(char **arguments);
};

extern const struct command commands[];

/* A VM without SNP and one vCPU, whose real-mode code at GPA 0x1000 is in ram (slot 0). */
struct machine {
	int kvm, vm, vcpu;
	struct kvm_run *run;
	uint8_t *ram;
};

struct machine new_machine(const void *code, size_t size);

/* One vCPU more, at the same code. */
int add_vcpu(const struct machine *machine, unsigned long id, struct kvm_run **run);

int open_kvm(void);

/* A VM for SNP, after INIT2. */
int new_snp_vm(int kvm);

/* KVM_MEMORY_ENCRYPT_OP */
int sev_command(int vm, uint32_t id, void *data, uint32_t sev_fd);

/* New anonymous memory. */
void *pages(size_t count);

/* Wait until a vCPU runs, since its exit reason was made NOT_YET. */
#define NOT_YET 99
void wait_until_it_runs(struct kvm_run *run);

/* A thread that calls KVM_RUN by way of runs(); the vCPU runs by now. */
pthread_t start_running(const struct machine *machine, void *(*runs)(void *));

/* From now on a signal is counted, and else only interrupts; flags are those of sigaction(). */
extern volatile sig_atomic_t heard;
void handle(int number, int flags);

/* SCM_RIGHTS, with one byte. */
void send_fd(int socket, int fd);

/* Wait for a child, which must end with this code. */
void ends_with(int child, int code);

#endif
