/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Lines of a page log: what kvmlaunch.hashing calls beside hashing.h, and cffi reads as well.
 */

/* Bytes of a line at most, beside those of its texts. */
#define KL_PAGE_LINE_BYTES 384

/*
 * Writes the page events of npages records (CONTENTS and digest, 96 bytes each) to `out`, as
 * kvmlaunch.log/1 has them, and returns their size. `type` is a page type's name, `origin` and
 * `label` are JSON strings; `offset` is that of the first page in the file `origin`, or below 0.
 */
size_t kl_page_lines(char *out, uint64_t seq, uint64_t gpa, const char *type,
		     const uint8_t *records, size_t npages, const char *origin, int64_t offset,
		     const char *label);
