/*
 * Asks the secure processor for an attestation report, and prints it in hex between two lines that
 * `kvmlaunch run --report-out FILE` looks for. The request and its answer are encrypted with a key
 * that only the guest and the secure processor know: VMPCK0 of the secrets page, which is launched
 * for this guest as it asks for it (LAUNCH_PAGE).
 *
 * SNP guest: the report; "exit-port" with 0, exit code 0. Where the host has no guest requests:
 *            "guest request: VMM error 0, firmware status N"; "terminated" 15:14, exit code 1.
 * plain VM:  "this guest needs SEV-SNP"; "exit-port" with 1, exit code 1.
 *
 * Source: AMD 56860 (SNP firmware ABI), guest messages and attestation.
 */
#include "runtime/runtime.h"

#define SECRETS_VMPCK0 0x20
#define SECRETS_SEQNO0 0xa0 /* as Linux uses the part that is the guest's */

#define ALGO_AES_256_GCM 1
#define HEADER_VERSION 1
#define REPORT_REQ 5
#define REPORT_RSP 6
#define MESSAGE_VERSION 1
#define VMPCK0 0

#define REPORT_SIZE 0x4a0
#define REPORT_DATA 0x50
#define REPORT_DATA_SIZE 64
#define REPORT_VMPL 0x30
#define LINE 32

#ifndef ASK /* certs.c asks for more */
#define ASK ask_alone
#endif

struct header {
	u8 tag[32];
	u64 sequence;
	u64 reserved1;
	/* The rest is authenticated together with the payload. */
	u8 algorithm, version;
	u16 size;
	u8 type, message_version;
	u16 payload_size;
	u32 reserved2;
	u8 vmpck, reserved3[35];
};

struct request {
	u8 data[REPORT_DATA_SIZE];
	u32 vmpl, key_select;
	u8 reserved[24];
};

struct response {
	u32 status, size;
	u8 reserved[24];
	u8 report[REPORT_SIZE];
};

struct message {
	struct header header;
	union {
		struct request request;
		struct response response;
	};
};

#define AUTHENTICATED(message) (&(message)->header.algorithm)
#define AUTHENTICATED_SIZE 48

_Static_assert(sizeof(struct header) == 0x60, "AMD 56860");
_Static_assert(sizeof(struct response) == 0x4c0, "AMD 56860");

LAUNCH_PAGE(secrets, PAGE_SECRETS);

static u8 request_page[PAGE_SIZE] PAGE_ALIGNED, response_page[PAGE_SIZE] PAGE_ALIGNED;
static struct message message;
static struct gcm gcm;

static void copy(void *to, const void *from, u32 size)
{
	volatile u8 *target = to;
	const volatile u8 *source = from;

	while (size--)
		*target++ = *source++;
}

/* The nonce of a message: its sequence number, which never comes twice with one key. */
static void make_iv(u8 iv[12], u64 sequence)
{
	u32 n;

	for (n = 0; n < 12; n++)
		iv[n] = n < 8 ? sequence >> n * 8 : 0;
}

static void seal(u64 sequence)
{
	u8 iv[12];

	make_iv(iv, sequence);
	message.header = (struct header){
		.sequence = sequence,
		.algorithm = ALGO_AES_256_GCM,
		.version = HEADER_VERSION,
		.size = sizeof(struct header),
		.type = REPORT_REQ,
		.message_version = MESSAGE_VERSION,
		.payload_size = sizeof(struct request),
		.vmpck = VMPCK0,
	};
	gcm_crypt(&gcm, iv, (u8 *)&message.request, sizeof(struct request));
	gcm_tag(&gcm, iv, AUTHENTICATED(&message), AUTHENTICATED_SIZE, (u8 *)&message.request,
		sizeof(struct request), message.header.tag);
}

/* Nothing of an answer is believed before its tag was found right. */
static void open(u64 sequence)
{
	u8 iv[12], tag[16], wrong = 0;
	u32 n;

	check_equal(message.header.sequence, sequence);
	check_equal(message.header.type, REPORT_RSP);
	check_equal(message.header.payload_size, sizeof(struct response));
	make_iv(iv, sequence);
	gcm_tag(&gcm, iv, AUTHENTICATED(&message), AUTHENTICATED_SIZE, (u8 *)&message.response,
		sizeof(struct response), tag);
	/* No check_equal(): it would tell the host the right tag. */
	for (n = 0; n < sizeof(tag); n++)
		wrong |= message.header.tag[n] ^ tag[n];
	if (wrong) {
		print("the answer is not the secure processor's\n");
		fail(FAIL_MESSAGE);
	}
	gcm_crypt(&gcm, iv, (u8 *)&message.response, sizeof(struct response));
}

static void ask_alone(void)
{
	ghcb_begin();
	ghcb_exit(EXIT_GUEST_REQUEST, (u64)request_page, (u64)response_page);
}

static void send(void)
{
	u64 result;

	copy(request_page, &message, sizeof(message));
	ASK();
	result = ghcb_get(GHCB_INFO2);
	if (result) {
		print("guest request: VMM error ");
		print_number(result >> 32);
		print(", firmware status ");
		print_hex((u32)result);
		print("\n");
		fail(FAIL_MESSAGE);
	}
	copy(&message, response_page, sizeof(message));
}

/* Whole lines. */
static void print_bytes(const u8 *bytes, u32 size)
{
	char line[2 * LINE + 2];
	u32 at, n;

	for (at = 0; at < size; at += LINE) {
		for (n = 0; n < LINE; n++) {
			line[2 * n] = "0123456789abcdef"[bytes[at + n] >> 4];
			line[2 * n + 1] = "0123456789abcdef"[bytes[at + n] & 0xf];
		}
		line[2 * LINE] = '\n';
		line[2 * LINE + 1] = 0;
		print(line);
	}
}

void guest_main(void)
{
	static const char data[REPORT_DATA_SIZE] = "asked for by kvmlaunch's example guest";
	u32 *sequence = (u32 *)(secrets + SECRETS_SEQNO0);
	u32 n;

	need_snp();
	page_share(request_page);
	page_share(response_page);

	gcm_init(&gcm, secrets + SECRETS_VMPCK0);
	copy(message.request.data, data, sizeof(data));
	seal(*sequence + 1);
	send();
	open(*sequence + 2);
	*sequence += 2;

	check_equal(message.response.status, 0);
	check_equal(message.response.size, REPORT_SIZE);
	for (n = 0; n < sizeof(data); n++)
		check_equal(message.response.report[REPORT_DATA + n], (u8)data[n]);
	check_equal(*(u32 *)(message.response.report + REPORT_VMPL), 0);
	print("-----BEGIN ATTESTATION REPORT-----\n");
	print_bytes(message.response.report, REPORT_SIZE);
	print("-----END ATTESTATION REPORT-----\n");
}
