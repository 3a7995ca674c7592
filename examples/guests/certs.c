/*
 * As `attest`, and asks the host for the certificates of the key that signed the report (an
 * extended guest request): first with room for one page, then with as many as the host says, and
 * without any if those are too many. Prints the certificate table in hex behind the report, between two lines, as
 * `kvmlaunch report verify --certs` reads it.
 *
 * SNP guest: the report, and the table or "the host has no certificates"; "exit-port" with 0,
 *            exit code 0. Where the host has no guest requests: as `attest`.
 * plain VM:  "this guest needs SEV-SNP"; "exit-port" with 1, exit code 1.
 *
 * Source: AMD 56421 (GHCB specification), SNP extended guest request.
 */
static void ask(void);

#define ASK ask
#define guest_main attest
#include "attest.c"
#undef guest_main

#define EXIT_EXTENDED_REQUEST 0x80000012
#define INVALID_LENGTH 1
#define CERTIFICATE_PAGES 4
#define ENTRY_SIZE 24
#define ENTRY_OFFSET 16
#define ENTRY_LENGTH 20

static u8 certificates[CERTIFICATE_PAGES * PAGE_SIZE] PAGE_ALIGNED;

static u64 ask_for(u64 pages)
{
	ghcb_begin();
	ghcb_set(GHCB_RAX, (u64)certificates);
	ghcb_set(GHCB_RBX, pages);
	ghcb_exit(EXIT_EXTENDED_REQUEST, (u64)request_page, (u64)response_page);
	return ghcb_get(GHCB_INFO2) >> 32;
}

/* A host that wants more room hasn't passed the message on yet: it may be sent again. */
static void ask(void)
{
	u64 needed;

	if (ask_for(1) != INVALID_LENGTH)
		return;
	needed = ghcb_get(GHCB_RBX);
	print("the certificates need ");
	print_number(needed);
	print(" pages\n");
	if (needed <= CERTIFICATE_PAGES)
		ask_for(needed);
	else
		ask_alone();
}

/* Bytes of the table with its blobs. The host wrote it, and may have written anything. */
static u32 table_size(void)
{
	u64 size = 0, end;
	u32 at;

	for (at = 0; at + ENTRY_SIZE <= sizeof(certificates); at += ENTRY_SIZE) {
		end = *(u32 *)(certificates + at + ENTRY_OFFSET);
		end += *(u32 *)(certificates + at + ENTRY_LENGTH);
		if (!end)
			break;
		if (end > size)
			size = end;
	}
	return size < sizeof(certificates) ? size : sizeof(certificates);
}

void guest_main(void)
{
	u32 page, size;

	need_snp();
	for (page = 0; page < CERTIFICATE_PAGES; page++)
		page_share(certificates + page * PAGE_SIZE);
	attest();
	size = table_size();
	if (!size) {
		print("the host has no certificates\n");
		return;
	}
	print("-----BEGIN CERTIFICATE TABLE-----\n");
	print_bytes(certificates, (size + LINE - 1) / LINE * LINE);
	print("-----END CERTIFICATE TABLE-----\n");
}
