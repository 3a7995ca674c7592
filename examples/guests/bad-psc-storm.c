/*
 * Misdeed: makes 253 pages shared and private again, for ever. Needs memory to 6 MiB; give a
 * --timeout.
 *
 * SNP guest: "converting"; "timeout", exit code 124.
 * plain VM:  "this guest needs SEV-SNP"; "exit-port" with 1, exit code 1.
 */
#include "runtime/runtime.h"

#define RUN 0x400000UL

void guest_main(void)
{
	u64 state = STATE_SHARED;
	u32 n;

	need_snp();
	print("converting\n");
	for (;; state ^= STATE_SHARED ^ STATE_PRIVATE) {
		psc_begin();
		for (n = 0; n < PSC_MOST; n++)
			psc_add(RUN + n * PAGE_SIZE, state);
		check_equal(psc_commit(), 0);
	}
}
