/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * ID block and ID authentication information, as SNP_LAUNCH_FINISH checks
 * them (AMD 56860): digest, policy, key algorithms, then the signatures by
 * the kernel's own ECDSA.
 */
#ifndef FAKE_IDBLOCK_H
#define FAKE_IDBLOCK_H

#include <crypto/akcipher.h>
#include <linux/psp-sev.h>
#include <linux/scatterlist.h>

#include "fake_digest.h"

#define FAKE_ALGO_P384_SHA384	1
#define FAKE_CURVE_P384		2
#define FAKE_P384_BYTES		48
#define FAKE_NUMBER_BYTES	72

struct fake_id_block {
	u8 ld[SHA384_DIGEST_SIZE];
	u8 family_id[16];
	u8 image_id[16];
	u32 version;
	u32 guest_svn;
	u64 policy;
} __packed;

static_assert(sizeof(struct fake_id_block) == 96);

/* Numbers are little-endian and zero-extended. */
struct fake_public_key {
	u32 curve;
	u8 qx[FAKE_NUMBER_BYTES];
	u8 qy[FAKE_NUMBER_BYTES];
	u8 reserved[0x404 - 0x94];
} __packed;

struct fake_signature {
	u8 r[FAKE_NUMBER_BYTES];
	u8 s[FAKE_NUMBER_BYTES];
	u8 reserved[0x200 - 0x90];
} __packed;

struct fake_id_auth {
	u32 id_key_algo;
	u32 auth_key_algo;
	u8 reserved1[56];
	struct fake_signature id_block_sig;
	struct fake_public_key id_key;
	u8 reserved2[60];
	struct fake_signature id_key_sig;
	struct fake_public_key author_key;
	u8 reserved3[892];
} __packed;

static_assert(sizeof(struct fake_id_auth) == 4096);

/* Turn round a number of at most 384 bits; whether it is one. */
static bool fake_big_endian(u8 *out, const u8 *number)
{
	int i;

	for (i = 0; i < FAKE_P384_BYTES; i++)
		out[i] = number[FAKE_P384_BYTES - 1 - i];
	return !memchr_inv(number + FAKE_P384_BYTES, 0,
			   FAKE_NUMBER_BYTES - FAKE_P384_BYTES);
}

/* Append an ASN.1 INTEGER, which is signed: a leading zero for a high bit. */
static u8 *fake_der_integer(u8 *out, const u8 *number)
{
	*out++ = 2;
	*out++ = FAKE_P384_BYTES + 1;
	*out++ = 0;
	memcpy(out, number, FAKE_P384_BYTES);
	return out + FAKE_P384_BYTES;
}

/* r and s as the kernel's ECDSA reads them, with the digest behind. */
static int fake_der_signature(u8 *out, const struct fake_signature *signature)
{
	u8 r[FAKE_P384_BYTES], s[FAKE_P384_BYTES];
	u8 *end = out + 2;

	if (!fake_big_endian(r, signature->r) || !fake_big_endian(s, signature->s))
		return -EINVAL;
	end = fake_der_integer(end, r);
	end = fake_der_integer(end, s);
	out[0] = 0x30;
	out[1] = end - out - 2;
	return end - out;
}

static bool fake_ecdsa_verify(struct crypto_akcipher *tfm, u8 *signed_digest,
			      int signature_size)
{
	struct akcipher_request *request;
	struct scatterlist sg;
	int ret;

	request = akcipher_request_alloc(tfm, GFP_KERNEL);
	if (!request)
		return false;

	sg_init_one(&sg, signed_digest, signature_size + SHA384_DIGEST_SIZE);
	akcipher_request_set_crypt(request, &sg, NULL, signature_size,
				   SHA384_DIGEST_SIZE);
	ret = crypto_akcipher_verify(request);
	akcipher_request_free(request);
	return !ret;
}

static bool fake_signed_by(const struct fake_public_key *key,
			   const struct fake_signature *signature,
			   const void *message, unsigned int size)
{
	u8 point[1 + 2 * FAKE_P384_BYTES] = { 4 };
	struct crypto_akcipher *tfm;
	bool good = false;
	int length;
	u8 *buf;

	if (key->curve != FAKE_CURVE_P384 ||
	    !fake_big_endian(point + 1, key->qx) ||
	    !fake_big_endian(point + 1 + FAKE_P384_BYTES, key->qy))
		return false;

	tfm = crypto_alloc_akcipher("ecdsa-nist-p384", 0, 0);
	if (IS_ERR(tfm)) {
		pr_err("fake PSP: no ecdsa-nist-p384: %ld\n", PTR_ERR(tfm));
		return false;
	}
	buf = kmalloc(128 + SHA384_DIGEST_SIZE, GFP_KERNEL);
	if (!buf)
		goto free;

	length = fake_der_signature(buf, signature);
	if (length < 0 || crypto_akcipher_set_pub_key(tfm, point, sizeof(point)))
		goto free;
	fake_sha384(message, size, buf + length);
	good = fake_ecdsa_verify(tfm, buf, length);
free:
	kfree(buf);
	crypto_free_akcipher(tfm);
	return good;
}

/* The first failure's status, or success. */
static u32 fake_check_id_block(const struct fake_id_block *block,
			       const struct fake_id_auth *auth,
			       const u8 *digest, u64 policy, bool auth_key_en)
{
	if (memcmp(block->ld, digest, sizeof(block->ld)))
		return SEV_RET_BAD_MEASUREMENT;
	if (block->policy != policy)
		return SEV_RET_POLICY_FAILURE;
	if (auth->id_key_algo != FAKE_ALGO_P384_SHA384)
		return SEV_RET_INVALID_PARAM;
	if (auth_key_en && auth->auth_key_algo != FAKE_ALGO_P384_SHA384)
		return SEV_RET_INVALID_PARAM;
	if (!fake_signed_by(&auth->id_key, &auth->id_block_sig, block, sizeof(*block)))
		return SEV_RET_BAD_SIGNATURE;
	if (auth_key_en &&
	    !fake_signed_by(&auth->author_key, &auth->id_key_sig, &auth->id_key,
			    sizeof(auth->id_key)))
		return SEV_RET_BAD_SIGNATURE;
	return SEV_RET_SUCCESS;
}

#endif /* FAKE_IDBLOCK_H */
