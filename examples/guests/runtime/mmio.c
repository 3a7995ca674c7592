/* Loads and stores of device registers: what MOV, MOVZX and MOVSX with an address wanted. */
#include "vc.h"

#define OPERAND_SIZE 0x66
#define REX_W 0x8
#define REX_R 0x4
#define REX_X 0x2
#define REX_B 0x1

struct instruction {
	const u8 *at; /* behind what was read */
	u8 rex;
	u8 reg;
	u64 address;
	u32 size;      /* of the access */
	u32 reg_size;
	int load, sign, immediate;
};

static u64 read_register(const struct registers *regs, u32 number)
{
	return number == RSP ? regs->rsp : regs->gpr[number];
}

static u64 take(struct instruction *insn, u32 size)
{
	u64 value = 0;
	u32 n;

	for (n = 0; n < size; n++)
		value |= (u64)*insn->at++ << n * 8;
	return value;
}

static u64 take_signed(struct instruction *insn, u32 size)
{
	u32 shift = 64 - size * 8;

	return (u64)((long)(take(insn, size) << shift) >> shift);
}

/* ModRM, SIB and displacement: the register and the address. */
static void take_operands(struct instruction *insn, const struct registers *regs)
{
	u8 modrm = *insn->at++, mod = modrm >> 6, rm = modrm & 7, sib, index, base;
	u64 address = 0;

	insn->reg = (modrm >> 3 & 7) | (insn->rex & REX_R ? 8 : 0);
	if (mod == 3)
		fail(FAIL_VC);
	if (rm == 4) {
		sib = *insn->at++;
		index = (sib >> 3 & 7) | (insn->rex & REX_X ? 8 : 0);
		base = (sib & 7) | (insn->rex & REX_B ? 8 : 0);
		if (index != RSP)
			address = regs->gpr[index] << (sib >> 6);
		if ((sib & 7) == 5 && mod == 0)
			address += take_signed(insn, 4);
		else
			address += read_register(regs, base);
	} else if (rm == 5 && mod == 0) {
		fail(FAIL_VC); /* relative to rip: nothing of the guest is that near to a device */
	} else {
		address = read_register(regs, rm | (insn->rex & REX_B ? 8 : 0));
	}
	if (mod)
		address += take_signed(insn, mod == 1 ? 1 : 4);
	insn->address = address;
}

static struct instruction decode(const struct registers *regs, const u8 *code)
{
	struct instruction insn = { .at = code };
	u32 operand = 4;
	u8 opcode;

	if (*insn.at == OPERAND_SIZE) {
		operand = 2;
		insn.at++;
	}
	if ((*insn.at & 0xf0) == 0x40)
		insn.rex = *insn.at++;
	if (insn.rex & REX_W)
		operand = 8;
	opcode = *insn.at++;
	insn.size = insn.reg_size = opcode & 1 ? operand : 1;
	switch (opcode) {
	case 0x88: /* MOV memory, register */
	case 0x89:
		break;
	case 0x8a: /* MOV register, memory */
	case 0x8b:
		insn.load = 1;
		break;
	case 0x63: /* MOVSXD register, memory */
		insn.load = insn.sign = 1;
		insn.size = 4;
		insn.reg_size = operand;
		break;
	case 0xc6: /* MOV memory, number */
	case 0xc7:
		insn.immediate = 1;
		break;
	case 0x0f:
		opcode = *insn.at++;
		if ((opcode & 0xf6) != 0xb6)
			fail(FAIL_VC);
		insn.load = 1;
		insn.sign = opcode & 0x08; /* MOVSX, else MOVZX */
		insn.size = opcode & 1 ? 2 : 1;
		insn.reg_size = operand;
		break;
	default:
		fail(FAIL_VC);
	}
	take_operands(&insn, regs);
	/* %ah, %ch, %dh and %bh */
	if (insn.reg_size == 1 && !insn.immediate && !insn.rex && insn.reg >= 4)
		fail(FAIL_VC);
	return insn;
}

/* Do the access at rip by the GHCB's MMIO exits; returns the instruction's length. */
u32 mmio(struct registers *regs, const u8 *code)
{
	volatile u8 *buffer = (volatile u8 *)ghcb_buffer();
	struct instruction insn = decode(regs, code);
	u64 value = 0;
	u32 n, shift = 64 - insn.size * 8;

	/* Else the host could pass off memory as a device. */
	if (is_private(insn.address))
		fail(FAIL_VC);

	ghcb_begin();
	ghcb_set(GHCB_SCRATCH, (u64)buffer);
	if (insn.load) {
		ghcb_exit(EXIT_MMIO_READ, insn.address, insn.size);
		for (n = 0; n < insn.size; n++)
			value |= (u64)buffer[n] << n * 8;
		if (insn.sign)
			value = (u64)((long)(value << shift) >> shift);
		regs->gpr[insn.reg] = merge(regs->gpr[insn.reg], value, insn.reg_size);
		return insn.at - code;
	}
	if (insn.immediate)
		value = take_signed(&insn, insn.size == 8 ? 4 : insn.size);
	else
		value = read_register(regs, insn.reg);
	for (n = 0; n < insn.size; n++)
		buffer[n] = value >> n * 8;
	ghcb_exit(EXIT_MMIO_WRITE, insn.address, insn.size);
	return insn.at - code;
}
