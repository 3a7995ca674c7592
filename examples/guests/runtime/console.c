/* Text for people, and a bad end. */
#include "runtime.h"

void print(const char *text)
{
	while (*text)
		out8(CONSOLE_PORT, *text++);
}

void print_number(u64 value)
{
	char digits[21];
	char *first = digits + sizeof(digits) - 1;

	*first = 0;
	do {
		*--first = '0' + value % 10;
		value /= 10;
	} while (value);
	print(first);
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
