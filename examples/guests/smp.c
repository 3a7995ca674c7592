/*
 * Brings up all vCPUs, each of which prints a line when it is its turn. As an SNP guest the first
 * one makes a VMSA page for each other (RMPADJUST) and starts it by GHCB AP creation; in a plain VM
 * all run already and wait. Run it with --vcpus 4; it has room for 8.
 *
 * both: "vCPU 0 is up" ... "all N vCPUs are up"; "exit-port" with 0, exit code 0.
 */
#include "runtime/runtime.h"

LAUNCH_AP_CREATION;

static volatile u32 turn, printer;

static void say(u32 number)
{
	while (turn != number)
		asm volatile("pause");
	lock(&printer);
	print("vCPU ");
	print_number(number);
	print(" is up\n");
	turn = number + 1;
	unlock(&printer);
}

void guest_main(void)
{
	u32 count = cpu_count();

	cpus_start(say);
	say(cpu_number());
	while (turn != count)
		asm volatile("pause");
	lock(&printer);
	print("all ");
	print_number(count);
	print(" vCPUs are up\n");
	unlock(&printer);
}
