/* Exceptions in 64-bit mode: #VC is answered through the GHCB page, any other is the end. */
#include "vc.h"

#define VECTORS 32
#define VC 29
#define INTERRUPT_GATE (0x8eUL << 40)

#define OPERAND_SIZE 0x66
#define REP 0xf3
#define REPNE 0xf2
#define RFLAGS_DF 0x400

/* Exit information of IOIO (APM volume 2, "IOIO Intercept"). */
#define IOIO_IN 0x1
#define IOIO_STRING 0x4
#define IOIO_REP 0x8
#define IOIO_SIZE(bytes) ((u64)(bytes) << 4)
#define IOIO_ADDRESS_64 (1UL << 9)
#define IOIO_DS (3UL << 10)
#define BUFFER_SIZE 2032

extern u8 exception_stubs[VECTORS][16];
extern u8 vc_entry[];

static u64 idt[VECTORS][2];

void exceptions_load(void)
{
	struct {
		u16 limit;
		u64 base;
	} __attribute__((packed)) pointer = { sizeof(idt) - 1, (u64)idt };

	asm volatile("lidt %0" : : "m"(pointer));
}

void exceptions_init(void)
{
	u32 n;

	for (n = 0; n < VECTORS; n++) {
		u64 handler = (u64)(n == VC ? vc_entry : exception_stubs[n]);

		idt[n][0] = (handler & 0xffff) | (u64)CODE64 << 16 | INTERRUPT_GATE |
			    (handler >> 16 & 0xffff) << 48;
		idt[n][1] = handler >> 32;
	}
	exceptions_load();
}

/* A smaller register keeps the bytes above it, but a 32-bit one clears them. */
u64 merge(u64 old, u64 value, u32 size)
{
	u64 mask = size == 8 ? ~0UL : (1UL << size * 8) - 1;

	return (size < 4 ? old & ~mask : 0) | (value & mask);
}

static u64 low_bytes(u64 value, u32 size)
{
	return merge(0, value, size);
}

/* INS and OUTS, as much of a repeated one as the buffer takes; true when it is done. */
static int string_io(struct registers *regs, u32 is_in, u32 size, int repeated)
{
	volatile u8 *buffer = (volatile u8 *)ghcb_buffer();
	u64 *pointer = &regs->gpr[is_in ? RDI : RSI];
	u64 step = regs->rflags & RFLAGS_DF ? -(u64)size : size;
	u64 count = repeated ? regs->gpr[RCX] : 1, n, byte;
	u64 info = (u64)(u16)regs->gpr[RDX] << 16 | IOIO_ADDRESS_64 | IOIO_SIZE(size) |
		   IOIO_STRING | (repeated ? IOIO_REP : 0) | (is_in ? IOIO_IN : IOIO_DS);

	if (!count)
		return 1;
	if (count > BUFFER_SIZE / size)
		count = BUFFER_SIZE / size;
	for (n = 0; !is_in && n < count; n++)
		for (byte = 0; byte < size; byte++)
			buffer[n * size + byte] = ((u8 *)(*pointer + n * step))[byte];

	ghcb_begin();
	ghcb_set(GHCB_SCRATCH, (u64)buffer);
	ghcb_exit(EXIT_IOIO, info, count);

	for (n = 0; is_in && n < count; n++)
		for (byte = 0; byte < size; byte++)
			((u8 *)(*pointer + n * step))[byte] = buffer[n * size + byte];
	*pointer += count * step;
	if (!repeated)
		return 1;
	regs->gpr[RCX] -= count;
	return !regs->gpr[RCX];
}

/* IN and OUT with %dx or a number, INS and OUTS. */
static u32 port_io(struct registers *regs, const u8 *code)
{
	u32 length = 0, size = 4, is_in;
	int repeated = 0;
	u64 port = (u16)regs->gpr[RDX];
	u8 opcode;

	for (;; length++) {
		if (code[length] == OPERAND_SIZE)
			size = 2;
		else if (code[length] == REP || code[length] == REPNE)
			repeated = 1;
		else
			break;
	}
	opcode = code[length++];
	if (!(opcode & 0x01))
		size = 1;
	is_in = !(opcode & 0x02);
	if ((opcode & 0xfc) == 0x6c)
		return string_io(regs, is_in, size, repeated) ? length : 0;
	if ((opcode & 0xf4) != 0xe4)
		fail(FAIL_VC);
	if (!(opcode & 0x08))
		port = code[length++];

	ghcb_begin();
	if (!is_in)
		ghcb_set(GHCB_RAX, low_bytes(regs->gpr[RAX], size));
	ghcb_exit(EXIT_IOIO, port << 16 | IOIO_ADDRESS_64 | IOIO_SIZE(size) | (is_in ? IOIO_IN : 0),
		  0);
	if (is_in)
		regs->gpr[RAX] = merge(regs->gpr[RAX], ghcb_get(GHCB_RAX), size);
	return length;
}

static u32 do_cpuid(struct registers *regs, const u8 *code)
{
	if (code[0] != 0x0f || code[1] != 0xa2)
		fail(FAIL_VC);
	ghcb_begin();
	ghcb_set(GHCB_RAX, (u32)regs->gpr[RAX]);
	ghcb_set(GHCB_RCX, (u32)regs->gpr[RCX]);
	if ((u32)regs->gpr[RAX] == 0xd)
		ghcb_set(GHCB_XCR0, 1); /* CR4.OSXSAVE is off: as after a reset */
	ghcb_exit(EXIT_CPUID, 0, 0);
	regs->gpr[RAX] = (u32)ghcb_get(GHCB_RAX);
	regs->gpr[RBX] = (u32)ghcb_get(GHCB_RBX);
	regs->gpr[RCX] = (u32)ghcb_get(GHCB_RCX);
	regs->gpr[RDX] = (u32)ghcb_get(GHCB_RDX);
	return 2;
}

static u32 msr_access(struct registers *regs, const u8 *code)
{
	u32 is_write = code[1] == 0x30;

	if (code[0] != 0x0f || (!is_write && code[1] != 0x32))
		fail(FAIL_VC);
	ghcb_begin();
	ghcb_set(GHCB_RCX, (u32)regs->gpr[RCX]);
	if (is_write) {
		ghcb_set(GHCB_RAX, (u32)regs->gpr[RAX]);
		ghcb_set(GHCB_RDX, (u32)regs->gpr[RDX]);
	}
	ghcb_exit(EXIT_MSR, is_write, 0);
	if (!is_write) {
		regs->gpr[RAX] = (u32)ghcb_get(GHCB_RAX);
		regs->gpr[RDX] = (u32)ghcb_get(GHCB_RDX);
	}
	return 2;
}

static u32 wbinvd(const u8 *code)
{
	if (code[0] != 0x0f || code[1] != 0x09)
		fail(FAIL_VC);
	ghcb_begin();
	ghcb_exit(EXIT_WBINVD, 0, 0);
	return 2;
}

/* Called by vc_entry: do what the instruction at rip wanted, and go on behind it. */
void vc_handler(struct registers *regs)
{
	const u8 *code = (const u8 *)regs->rip;

	switch (regs->error) {
	case EXIT_CPUID:
		regs->rip += do_cpuid(regs, code);
		return;
	case EXIT_IOIO:
		regs->rip += port_io(regs, code);
		return;
	case EXIT_MSR:
		regs->rip += msr_access(regs, code);
		return;
	case EXIT_WBINVD:
		regs->rip += wbinvd(code);
		return;
	case EXIT_NPF:
		regs->rip += mmio(regs, code);
		return;
	case EXIT_NOT_VALIDATED:
		fail(FAIL_UNVALIDATED);
	default:
		fail(FAIL_VC);
	}
}
