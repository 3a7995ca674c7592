/*
 * The guest `attest` as a program of this machine: what it asks of its host goes to standard
 * output, and the answer is read from standard input. For tests of messages and AES-GCM without a
 * guest.
 */
#include <stdio.h>
#include <stdlib.h>

#include "attest.c"

const u32 c_bit = 51;
static u8 ghcb_fields[PAGE_SIZE];

void print(const char *text)
{
	fputs(text, stderr);
}

void print_number(u64 value)
{
	fprintf(stderr, "%lu", value);
}

void print_hex(u64 value)
{
	fprintf(stderr, "0x%lx", value);
}

void fail(u32 code)
{
	exit(code);
}

void need_snp(void)
{
}

void check(const char *file, u32 line, const char *what, u64 value, u64 expected)
{
	if (value != expected) {
		fprintf(stderr, "%s:%u: %s is 0x%lx, expected 0x%lx\n", file, line, what, value,
			expected);
		exit(FAIL_CHECK);
	}
}

void page_share(void *page)
{
	(void)page;
}

void ghcb_begin(void)
{
}

u64 ghcb_get(u32 field)
{
	return *(u64 *)(ghcb_fields + field);
}

/* A page goes out; the firmware status and a page come in. */
void ghcb_exit(u64 code, u64 info1, u64 info2)
{
	if (code != EXIT_GUEST_REQUEST || fwrite((void *)info1, PAGE_SIZE, 1, stdout) != 1 ||
	    fflush(stdout) || fread(ghcb_fields + GHCB_INFO2, 8, 1, stdin) != 1 ||
	    fread((void *)info2, PAGE_SIZE, 1, stdin) != 1)
		exit(2);
}

/* The secrets page comes first. */
int main(void)
{
	if (fread(secrets, PAGE_SIZE, 1, stdin) != 1)
		exit(2);
	guest_main();
	return 0;
}
