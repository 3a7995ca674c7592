/* SPDX-License-Identifier: Apache-2.0 */
/*
 * SHA-384 in one instruction set; hashing.c includes this once for each. Set before:
 *   NAME(x)    the name of x here
 *   TARGET     function attribute that turns the instructions on
 *   WORD       uint64_t, or a vector of them: several pages side by side
 *   LANES      how many
 *   GATHER(pages, at)  the big-endian word at byte `at` of each page
 *   WITH_CHAIN where the launch digest is wanted as well
 * They are unset at the end.
 */

static inline __attribute__((always_inline)) TARGET void
NAME(add_block)(WORD state[8], WORD w[16], const uint64_t *wk)
{
	WORD a = state[0], b = state[1], c = state[2], d = state[3];
	WORD e = state[4], f = state[5], g = state[6], h = state[7];
	WORD t, ab, bc = b ^ c;

/* Maj(a, b, c) is b ^ ((a ^ b) & (b ^ c)), and a ^ b is the next round's b ^ c. */
#define ROUND(a, b, c, d, e, f, g, h, input)                                          \
	do {                                                                          \
		t = h + (input) + (g ^ (e & (f ^ g)));                                \
		t += ROTR(e, 14) ^ ROTR(e, 18) ^ ROTR(e, 41);                         \
		ab = a ^ b;                                                           \
		d += t;                                                               \
		h = t + (b ^ (ab & bc)) + (ROTR(a, 28) ^ ROTR(a, 34) ^ ROTR(a, 39));  \
		bc = ab;                                                              \
	} while (0)
#define EIGHT_ROUNDS(at, input)                                 \
	do {                                                    \
		ROUND(a, b, c, d, e, f, g, h, input((at) + 0)); \
		ROUND(h, a, b, c, d, e, f, g, input((at) + 1)); \
		ROUND(g, h, a, b, c, d, e, f, input((at) + 2)); \
		ROUND(f, g, h, a, b, c, d, e, input((at) + 3)); \
		ROUND(e, f, g, h, a, b, c, d, input((at) + 4)); \
		ROUND(d, e, f, g, h, a, b, c, input((at) + 5)); \
		ROUND(c, d, e, f, g, h, a, b, input((at) + 6)); \
		ROUND(b, c, d, e, f, g, h, a, input((at) + 7)); \
	} while (0)
#define W(i) w[(i) & 15]
#define GIVEN(i) (W(i) + sha512_k[i])
#define NEXT(i)                                                                   \
	((W(i) += SMALL_SIGMA1(W((i) + 14)) + W((i) + 9) + SMALL_SIGMA0(W((i) + 1))), \
	 W(i) + sha512_k[i])
#define SCHEDULED(i) wk[i]

	if (wk) {
		for (int i = 0; i < 80; i += 8)
			EIGHT_ROUNDS(i, SCHEDULED);
	} else {
		EIGHT_ROUNDS(0, GIVEN);
		EIGHT_ROUNDS(8, GIVEN);
		for (int i = 16; i < 80; i += 16) {
			EIGHT_ROUNDS(i, NEXT);
			EIGHT_ROUNDS(i + 8, NEXT);
		}
	}
	state[0] += a; state[1] += b; state[2] += c; state[3] += d;
	state[4] += e; state[5] += f; state[6] += g; state[7] += h;
#undef ROUND
#undef EIGHT_ROUNDS
#undef W
#undef GIVEN
#undef NEXT
#undef SCHEDULED
}

/* SHA-384 of LANES pages; `padding` is the schedule behind PAGE_BYTES. */
static TARGET void NAME(hash_pages)(const uint8_t *const pages[], uint8_t *const out[],
				    const uint64_t padding[80])
{
	WORD state[8], w[16];

	for (int i = 0; i < 8; i++)
		state[i] = (WORD){ 0 } + sha384_start[i];
	for (size_t at = 0; at < PAGE_BYTES; at += BLOCK_BYTES) {
		for (int i = 0; i < 16; i++)
			w[i] = GATHER(pages, at + 8 * i);
		NAME(add_block)(state, w, NULL);
	}
	NAME(add_block)(state, w, padding);
	for (int i = 0; i < DIGEST_WORDS; i++)
		for (int lane = 0; lane < LANES; lane++)
			store_be64(out[lane] + 8 * i, ((const uint64_t *)&state[i])[lane]);
}

#ifdef WITH_CHAIN
/* Adds pages to a launch digest: SHA-384 over PAGE_INFO, two blocks each. */
static TARGET void NAME(chain)(uint64_t digest[DIGEST_WORDS], uint64_t info, uint64_t gpa,
			       const uint8_t *contents, size_t npages, size_t step,
			       uint8_t *records)
{
	uint64_t padding[80], state[8], w[16];

	/* The bit behind PAGE_INFO is in the first block already, the second has its size. */
	schedule_padding(padding, 0, PAGE_INFO_BYTES);
	for (; npages; npages--, contents += step, gpa += PAGE_BYTES) {
		for (int i = 0; i < DIGEST_WORDS; i++) {
			w[i] = digest[i];
			w[DIGEST_WORDS + i] = load_be64(contents + 8 * i);
		}
		w[12] = info;
		w[13] = __builtin_bswap64(gpa);
		w[14] = UINT64_C(1) << 63;
		w[15] = 0;
		memcpy(state, sha384_start, sizeof(state));
		NAME(add_block)(state, w, NULL);
		NAME(add_block)(state, w, padding);
		memcpy(digest, state, DIGEST_BYTES);
		if (records) {
			store_digest(records + DIGEST_BYTES, digest);
			records += RECORD_BYTES;
		}
	}
}
#endif

#undef NAME
#undef TARGET
#undef WORD
#undef LANES
#undef GATHER
#undef WITH_CHAIN
