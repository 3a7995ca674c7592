/* SPDX-License-Identifier: GPL-2.0-only */
/* SHA-384 by the kernel's crypto API, and the digest chain of PAGE_INFO. */
#ifndef FAKE_DIGEST_H
#define FAKE_DIGEST_H

#include <crypto/hash.h>
#include <crypto/sha2.h>

/* AMD 56860, PAGE_INFO structure. */
struct fake_page_info {
	u8 digest_cur[SHA384_DIGEST_SIZE];
	u8 contents[SHA384_DIGEST_SIZE];
	u16 length;
	u8 page_type;
	u8 imi_page;
	u8 reserved;
	u8 vmpl1_perms;
	u8 vmpl2_perms;
	u8 vmpl3_perms;
	u64 gpa;
} __packed;

static_assert(sizeof(struct fake_page_info) == 0x70);

static struct crypto_shash *fake_sha384_tfm;

static int fake_digest_init(void)
{
	struct crypto_shash *tfm = crypto_alloc_shash("sha384", 0, 0);

	if (IS_ERR(tfm)) {
		pr_err("fake PSP: no sha384: %ld\n", PTR_ERR(tfm));
		return PTR_ERR(tfm);
	}
	fake_sha384_tfm = tfm;
	return 0;
}

static void fake_digest_exit(void)
{
	crypto_free_shash(fake_sha384_tfm);
	fake_sha384_tfm = NULL;
}

static void fake_sha384(const void *data, unsigned int len, u8 *out)
{
	WARN_ON(crypto_shash_tfm_digest(fake_sha384_tfm, data, len, out));
}

#endif /* FAKE_DIGEST_H */
