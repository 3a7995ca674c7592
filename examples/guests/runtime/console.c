/* Text for people, and bad ends. */
#include "runtime.h"

/* Set where an SNP guest can print: ghcb.c. */
u32 ghcb_ready;

void print(const char *text)
{
	if (is_snp() && !ghcb_ready)
		return;
	while (*text)
		out8(CONSOLE_PORT, *text++);
}

static void print_digits(u64 value, u32 base)
{
	char digits[21];
	char *first = digits + sizeof(digits) - 1;

	*first = 0;
	do {
		*--first = "0123456789abcdef"[value % base];
		value /= base;
	} while (value);
	print(first);
}

void print_number(u64 value)
{
	print_digits(value, 10);
}

void print_hex(u64 value)
{
	print("0x");
	print_digits(value, 16);
}

_Noreturn void fail(u32 code)
{
	for (;;) {
		if (is_snp())
			ghcb_msr(GHCB_TERMINATE | FAIL_SET << 12 | (u64)code << 16);
		else
			out32(EXIT_PORT, code);
	}
}

/* For guests that show what a plain VM hasn't. */
void need_snp(void)
{
	if (is_snp())
		return;
	print("this guest needs SEV-SNP\n");
	fail(FAIL_NOT_SNP);
}

/* The host takes this line apart: kvmlaunch/launch/checks.py. */
void check(const char *file, u32 line, const char *what, u64 value, u64 expected)
{
	if (value == expected)
		return;
	print("check failed: ");
	print(file);
	print(":");
	print_number(line);
	print(": ");
	print(what);
	print(" is ");
	print_hex(value);
	print(", expected ");
	print_hex(expected);
	print("\n");
	fail(FAIL_CHECK);
}
