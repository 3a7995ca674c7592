/* Exceptions in 64-bit mode: #VC is answered through the GHCB page, any other is the end. */
#include "runtime.h"

#define VECTORS 32
#define VC 29
#define CODE64 0x18UL
#define INTERRUPT_GATE (0x8eUL << 40)

#define OPERAND_SIZE 0x66
#define REX_W 0x48
#define RDX_INDIRECT 0x02 /* ModRM: (%rdx) and the accumulator */
#define IOIO_IN 0x1
#define IOIO_ADDRESS_64 (1UL << 9)

/* As vc_entry pushes them, last first; then what the processor pushed. */
struct registers {
	u64 r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax;
	u64 error, rip, cs, rflags, rsp, ss;
};

extern u8 exception_stubs[VECTORS][16];
extern u8 vc_entry[];

static u64 idt[VECTORS][2];

void exceptions_init(void)
{
	struct {
		u16 limit;
		u64 base;
	} __attribute__((packed)) pointer = { sizeof(idt) - 1, (u64)idt };
	u32 n;

	for (n = 0; n < VECTORS; n++) {
		u64 handler = (u64)(n == VC ? vc_entry : exception_stubs[n]);

		idt[n][0] = (handler & 0xffff) | CODE64 << 16 | INTERRUPT_GATE |
			    (handler >> 16 & 0xffff) << 48;
		idt[n][1] = handler >> 32;
	}
	asm volatile("lidt %0" : : "m"(pointer));
}

/* A smaller register keeps the bytes above it, but a 32-bit one clears them. */
static u64 merge(u64 old, u64 value, u32 size)
{
	u64 mask = size == 8 ? ~0UL : (1UL << size * 8) - 1;

	return (size < 4 ? old & ~mask : 0) | (value & mask);
}

static u64 low_bytes(u64 value, u32 size)
{
	return merge(0, value, size);
}

/* IN and OUT with %dx or a number. */
static u32 port_io(struct registers *regs, const u8 *code)
{
	u32 length = 1, size = 4, is_in;
	u8 opcode = code[0];
	u64 port = (u16)regs->rdx;

	if (opcode == OPERAND_SIZE) {
		size = 2;
		opcode = code[length++];
	}
	if ((opcode & 0xf4) != 0xe4)
		fail(FAIL_VC);
	if (!(opcode & 0x08))
		port = code[length++];
	if (!(opcode & 0x01))
		size = 1;
	is_in = !(opcode & 0x02);

	ghcb_begin();
	if (!is_in)
		ghcb_set(GHCB_RAX, low_bytes(regs->rax, size));
	ghcb_exit(EXIT_IOIO, port << 16 | IOIO_ADDRESS_64 | size << 4 | (is_in ? IOIO_IN : 0), 0);
	if (is_in)
		regs->rax = merge(regs->rax, ghcb_get(GHCB_RAX), size);
	return length;
}

static u32 do_cpuid(struct registers *regs, const u8 *code)
{
	if (code[0] != 0x0f || code[1] != 0xa2)
		fail(FAIL_VC);
	ghcb_begin();
	ghcb_set(GHCB_RAX, (u32)regs->rax);
	ghcb_set(GHCB_RCX, (u32)regs->rcx);
	if ((u32)regs->rax == 0xd)
		ghcb_set(GHCB_XCR0, 1); /* CR4.OSXSAVE is off: as after a reset */
	ghcb_exit(EXIT_CPUID, 0, 0);
	regs->rax = (u32)ghcb_get(GHCB_RAX);
	regs->rbx = (u32)ghcb_get(GHCB_RBX);
	regs->rcx = (u32)ghcb_get(GHCB_RCX);
	regs->rdx = (u32)ghcb_get(GHCB_RDX);
	return 2;
}

static u32 msr_access(struct registers *regs, const u8 *code)
{
	u32 is_write = code[1] == 0x30;

	if (code[0] != 0x0f || (!is_write && code[1] != 0x32))
		fail(FAIL_VC);
	ghcb_begin();
	ghcb_set(GHCB_RCX, (u32)regs->rcx);
	if (is_write) {
		ghcb_set(GHCB_RAX, (u32)regs->rax);
		ghcb_set(GHCB_RDX, (u32)regs->rdx);
	}
	ghcb_exit(EXIT_MSR, is_write, 0);
	if (!is_write) {
		regs->rax = (u32)ghcb_get(GHCB_RAX);
		regs->rdx = (u32)ghcb_get(GHCB_RDX);
	}
	return 2;
}

/* The forms of mmio_read and mmio_write: MOV between (%rdx) and the accumulator. */
static u32 mmio(struct registers *regs, const u8 *code)
{
	volatile u8 *buffer = ghcb_buffer();
	u32 length = 0, size = 4, n;
	u64 value = 0;
	u8 opcode;

	if (code[0] == OPERAND_SIZE)
		size = 2;
	else if (code[0] == REX_W)
		size = 8;
	if (size != 4)
		length++;
	opcode = code[length];
	if ((opcode & 0xfc) != 0x88 || code[length + 1] != RDX_INDIRECT)
		fail(FAIL_VC);
	if (!(opcode & 0x01))
		size = 1;
	/* Else the host could pass off memory as a device. */
	if (is_private(regs->rdx))
		fail(FAIL_VC);

	ghcb_begin();
	ghcb_set(GHCB_SCRATCH, (u64)buffer);
	if (opcode & 0x02) {
		ghcb_exit(EXIT_MMIO_READ, regs->rdx, size);
		for (n = 0; n < size; n++)
			value |= (u64)buffer[n] << n * 8;
		regs->rax = merge(regs->rax, value, size);
	} else {
		for (n = 0; n < size; n++)
			buffer[n] = regs->rax >> n * 8;
		ghcb_exit(EXIT_MMIO_WRITE, regs->rdx, size);
	}
	return length + 2;
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
	case EXIT_NPF:
		regs->rip += mmio(regs, code);
		return;
	default:
		fail(FAIL_VC);
	}
}
