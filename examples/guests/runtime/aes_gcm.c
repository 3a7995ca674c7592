/*
 * AES-256-GCM (FIPS 197, NIST SP 800-38D), for guest messages. Short and slow, and its tables are
 * calculated; not hardened against who can time it.
 */
#include "runtime.h"

#define ROUNDS 14
#define BLOCK 16

static u8 sbox[256];

static u8 doubled(u8 value)
{
	return value << 1 ^ (value & 0x80 ? 0x1b : 0);
}

static u8 rotated(u8 value, u32 bits)
{
	return value << bits | value >> (8 - bits);
}

/* The inverse in GF(2^8), and an affine map: powers of 3 and of its inverse, side by side. */
static void make_sbox(void)
{
	u8 power = 1, inverse = 1;

	do {
		power ^= doubled(power);
		inverse ^= inverse << 1;
		inverse ^= inverse << 2;
		inverse ^= inverse << 4;
		if (inverse & 0x80)
			inverse ^= 0x09;
		sbox[power] = 0x63 ^ inverse ^ rotated(inverse, 1) ^ rotated(inverse, 2) ^
			      rotated(inverse, 3) ^ rotated(inverse, 4);
	} while (power != 1);
	sbox[0] = 0x63;
}

static void expand_key(struct gcm *gcm, const u8 key[32])
{
	u8 *words = gcm->round_keys[0], constant = 1, word[4], first;
	u32 n, byte;

	for (n = 0; n < 32; n++)
		words[n] = key[n];
	for (n = 8; n < 4 * (ROUNDS + 1); n++) {
		for (byte = 0; byte < 4; byte++)
			word[byte] = words[4 * (n - 1) + byte];
		if (n % 8 == 0) {
			first = word[0];
			word[0] = sbox[word[1]] ^ constant;
			word[1] = sbox[word[2]];
			word[2] = sbox[word[3]];
			word[3] = sbox[first];
			constant = doubled(constant);
		} else if (n % 8 == 4) {
			for (byte = 0; byte < 4; byte++)
				word[byte] = sbox[word[byte]];
		}
		for (byte = 0; byte < 4; byte++)
			words[4 * n + byte] = words[4 * (n - 8) + byte] ^ word[byte];
	}
}

static void add(u8 *block, const u8 *other, u32 size)
{
	u32 n;

	for (n = 0; n < size; n++)
		block[n] ^= other[n];
}

/* SubBytes and ShiftRows; bytes are by columns. */
static void substitute(u8 block[BLOCK])
{
	u8 out[BLOCK];
	u32 n;

	for (n = 0; n < BLOCK; n++)
		out[n] = sbox[block[(n + n % 4 * 4) % BLOCK]];
	for (n = 0; n < BLOCK; n++)
		block[n] = out[n];
}

static void mix_columns(u8 block[BLOCK])
{
	u8 *column, first, all;
	u32 n, row;

	for (n = 0; n < 4; n++) {
		column = block + 4 * n;
		first = column[0];
		all = column[0] ^ column[1] ^ column[2] ^ column[3];
		for (row = 0; row < 4; row++)
			column[row] ^= all ^ doubled(column[row] ^
						     (row < 3 ? column[row + 1] : first));
	}
}

static void encrypt(const struct gcm *gcm, u8 block[BLOCK])
{
	u32 round;

	add(block, gcm->round_keys[0], BLOCK);
	for (round = 1; round <= ROUNDS; round++) {
		substitute(block);
		if (round < ROUNDS)
			mix_columns(block);
		add(block, gcm->round_keys[round], BLOCK);
	}
}

void gcm_init(struct gcm *gcm, const u8 key[32])
{
	u32 n;

	make_sbox();
	expand_key(gcm, key);
	for (n = 0; n < BLOCK; n++)
		gcm->hash_key[n] = 0;
	encrypt(gcm, gcm->hash_key);
}

/* Counter block: the nonce, then a big-endian number. */
static void counter_block(u8 block[BLOCK], const u8 iv[12], u32 counter)
{
	u32 n;

	for (n = 0; n < 12; n++)
		block[n] = iv[n];
	for (n = 0; n < 4; n++)
		block[12 + n] = counter >> (24 - 8 * n);
}

/* Encrypt or decrypt in place. */
void gcm_crypt(const struct gcm *gcm, const u8 iv[12], u8 *data, u32 size)
{
	u8 stream[BLOCK];
	u32 done, part;

	for (done = 0; done < size; done += part) {
		part = size - done < BLOCK ? size - done : BLOCK;
		counter_block(stream, iv, done / BLOCK + 2);
		encrypt(gcm, stream);
		add(data + done, stream, part);
	}
}

/* Multiply by the hash key in GF(2^128), whose bits count from the most significant one. */
static void multiply(u8 hash[BLOCK], const u8 key[BLOCK])
{
	u8 product[BLOCK] = { 0 }, power[BLOCK], carry;
	u32 bit, n;

	for (n = 0; n < BLOCK; n++)
		power[n] = key[n];
	for (bit = 0; bit < 128; bit++) {
		if (hash[bit / 8] & 0x80 >> bit % 8)
			add(product, power, BLOCK);
		carry = power[BLOCK - 1] & 1;
		for (n = BLOCK - 1; n; n--)
			power[n] = power[n] >> 1 | power[n - 1] << 7;
		power[0] = power[0] >> 1 ^ (carry ? 0xe1 : 0);
	}
	for (n = 0; n < BLOCK; n++)
		hash[n] = product[n];
}

static void hash_data(const struct gcm *gcm, u8 hash[BLOCK], const u8 *data, u32 size)
{
	u32 done, part;

	for (done = 0; done < size; done += part) {
		part = size - done < BLOCK ? size - done : BLOCK;
		add(hash, data + done, part);
		multiply(hash, gcm->hash_key);
	}
}

/* The tag of a header and encrypted data. */
void gcm_tag(const struct gcm *gcm, const u8 iv[12], const u8 *header, u32 header_size,
	     const u8 *data, u32 size, u8 tag[16])
{
	u8 sizes[BLOCK] = { 0 };
	u32 n;

	for (n = 0; n < 4; n++) {
		sizes[4 + n] = header_size * 8 >> (24 - 8 * n);
		sizes[12 + n] = size * 8 >> (24 - 8 * n);
	}
	for (n = 0; n < BLOCK; n++)
		tag[n] = 0;
	hash_data(gcm, tag, header, header_size);
	hash_data(gcm, tag, data, size);
	hash_data(gcm, tag, sizes, BLOCK);
	counter_block(sizes, iv, 1);
	encrypt(gcm, sizes);
	add(tag, sizes, BLOCK);
}
