/* What the parts of the #VC handler share. */
#ifndef VC_H
#define VC_H

#include "runtime.h"

/* General registers by the number that instructions give them. */
enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI };

/* As vc_entry pushes them, last first (gpr[RSP] is the handler's); then what the CPU pushed. */
struct registers {
	u64 gpr[16];
	u64 error, rip, cs, rflags, rsp, ss;
};

u64 merge(u64 old, u64 value, u32 size);
u32 mmio(struct registers *regs, const u8 *code);

#endif
