/* SPDX-License-Identifier: Apache-2.0 */
/* Lines of a page log; a large image has very many of them. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "pagelog.h"
#include "sha384.h"

static char *put_text(char *at, const char *text, size_t size)
{
	memcpy(at, text, size);
	return at + size;
}

#define PUT(at, text) put_text(at, text, sizeof(text) - 1)

static char *put_number(char *at, uint64_t number, unsigned int base)
{
	char digits[20];
	size_t size = 0;

	do
		digits[sizeof(digits) - ++size] = "0123456789abcdef"[number % base];
	while (number /= base);
	return put_text(at, digits + sizeof(digits) - size, size);
}

static char *put_hex(char *at, const uint8_t *bytes, size_t size)
{
	for (; size; size--, bytes++) {
		*at++ = "0123456789abcdef"[*bytes >> 4];
		*at++ = "0123456789abcdef"[*bytes & 15];
	}
	return at;
}

size_t kl_page_lines(char *out, uint64_t seq, uint64_t gpa, const char *type,
		     const uint8_t *records, size_t npages, const char *origin, int64_t offset,
		     const char *label)
{
	size_t type_size = strlen(type), origin_size = strlen(origin) - 1;
	size_t label_size = strlen(label);
	char *at = out;

	for (; npages; npages--, seq++, gpa += PAGE_BYTES, records += 2 * DIGEST_BYTES) {
		at = PUT(at, "{\"event\":\"page\",\"seq\":");
		at = put_number(at, seq, 10);
		at = PUT(at, ",\"gpa\":\"0x");
		at = put_number(at, gpa, 16);
		at = PUT(at, "\",\"type\":\"");
		at = put_text(at, type, type_size);
		at = PUT(at, "\",\"contents\":\"");
		at = put_hex(at, records, DIGEST_BYTES);
		at = PUT(at, "\",\"digest\":\"");
		at = put_hex(at, records + DIGEST_BYTES, DIGEST_BYTES);
		at = PUT(at, "\",\"origin\":");
		/* Its closing quote stands behind the offset. */
		at = put_text(at, origin, origin_size);
		if (offset >= 0) {
			at = PUT(at, "+0x");
			at = put_number(at, offset, 16);
			offset += PAGE_BYTES;
		}
		at = PUT(at, "\",\"label\":");
		at = put_text(at, label, label_size);
		at = PUT(at, "}\n");
	}
	return at - out;
}
