/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hashing of measured pages: what kvmlaunch.hashing calls. hashing.c includes this, and cffi
 * reads it, so that both see the same prototypes. Not one of them touches Python.
 */

/* Most pages that one call takes. */
#define KL_HASH_MAX_PAGES 4096

/* Names of what this processor can do, best first; NULL behind the last. */
const char *kl_hash_backend(int index);

/*
 * CONTENTS of npages pages, 48 bytes each. `threads` counts the caller, and fewer are started
 * where there is no work for them.
 */
void kl_hash_contents(int backend, const uint8_t *data, size_t npages, uint8_t *contents,
		      unsigned int threads);

/*
 * Adds npages pages to the launch digest at `digest`, 48 bytes. `info` is bytes 0x60..0x67 of
 * PAGE_INFO, contents are read every `step` bytes (0: the same for all pages). Where `records`
 * isn't NULL the second half of each page's record, the digest behind it, is stored there.
 */
void kl_hash_chain(int backend, uint8_t *digest, const uint8_t *info, uint64_t gpa,
		   const uint8_t *contents, size_t npages, size_t step, uint8_t *records);

/*
 * Both, side by side: hashes pages at `data` and adds them. `records` gets 96 bytes for
 * each: CONTENTS and the digest behind it.
 */
void kl_hash_pages(int backend, uint8_t *digest, const uint8_t *info, uint64_t gpa,
		   const uint8_t *data, size_t npages, uint8_t *records, unsigned int threads);
