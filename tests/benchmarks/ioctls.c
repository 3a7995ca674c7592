/* SPDX-License-Identifier: Apache-2.0 */
/* Prints the seconds that one KVM_CHECK_EXTENSION takes in a loop. Usage: ioctls COUNT */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <time.h>

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	long count = argc == 2 ? atol(argv[1]) : 0;
	double begin;

	if (kvm < 0 || count <= 0)
		return 1;
	begin = now();
	for (long i = 0; i < count; i++)
		if (ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) < 0)
			return 1;
	printf("%.12g\n", (now() - begin) / count);
	return 0;
}
