/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * x87, SSE and AVX registers of a vCPU, which hardware keeps in the VMSA.  The
 * layout there is the one that sev_es_sync_vmsa() writes.
 */
#ifndef FAKE_FPU_H
#define FAKE_FPU_H

#include <linux/percpu.h>
#include <asm/fpu/types.h>
#include <asm/svm.h>

#define FAKE_XFEATURES	(XFEATURE_MASK_FP | XFEATURE_MASK_SSE | XFEATURE_MASK_YMM)

/* XSAVE's standard format as far as AVX. */
struct fake_xregs {
	struct fxregs_state i387;
	struct xstate_header header;
	u8 ymm[256];
} __aligned(64);

static DEFINE_PER_CPU_ALIGNED(struct fake_xregs, fake_xregs);

static void fake_xrstor(const struct fake_xregs *xregs)
{
	asm volatile("xrstor64 %0"
		     : : "m" (*xregs), "a" (FAKE_XFEATURES), "d" (0) : "memory");
}

static void fake_xsave(struct fake_xregs *xregs)
{
	asm volatile("xsave64 %0"
		     : "+m" (*xregs) : "a" (FAKE_XFEATURES), "d" (0) : "memory");
}

/* Registers of 10 bytes: all the mantissas come before the exponents. */
static void fake_load_x87(u8 *st_space, const u8 *x87)
{
	int i;

	for (i = 0; i < 8; i++) {
		memcpy(st_space + i * 16, x87 + i * 8, 8);
		memcpy(st_space + i * 16 + 8, x87 + 64 + i * 2, 2);
	}
}

static void fake_save_x87(u8 *x87, const u8 *st_space)
{
	int i;

	for (i = 0; i < 8; i++) {
		memcpy(x87 + i * 8, st_space + i * 16, 8);
		memcpy(x87 + 64 + i * 2, st_space + i * 16 + 8, 2);
	}
}

/* Both with the host's XCR0. */

static void fake_load_fpu(const struct sev_es_save_area *vmsa)
{
	struct fake_xregs *xregs = this_cpu_ptr(&fake_xregs);

	memset(xregs, 0, sizeof(*xregs));
	xregs->i387.rdp = vmsa->x87_dp;
	xregs->i387.rip = vmsa->x87_rip;
	xregs->i387.cwd = vmsa->x87_fcw;
	xregs->i387.swd = vmsa->x87_fsw;
	xregs->i387.twd = vmsa->x87_ftw;
	xregs->i387.fop = vmsa->x87_fop;
	/* Bits above 15 would be a #GP here. */
	xregs->i387.mxcsr = vmsa->mxcsr & 0xffff;
	fake_load_x87((u8 *)xregs->i387.st_space, vmsa->fpreg_x87);
	memcpy(xregs->i387.xmm_space, vmsa->fpreg_xmm, sizeof(vmsa->fpreg_xmm));
	memcpy(xregs->ymm, vmsa->fpreg_ymm, sizeof(vmsa->fpreg_ymm));
	xregs->header.xfeatures = FAKE_XFEATURES;
	fake_xrstor(xregs);
}

static void fake_save_fpu(struct sev_es_save_area *vmsa)
{
	struct fake_xregs *xregs = this_cpu_ptr(&fake_xregs);

	fake_xsave(xregs);
	vmsa->x87_dp = xregs->i387.rdp;
	vmsa->x87_rip = xregs->i387.rip;
	vmsa->x87_fcw = xregs->i387.cwd;
	vmsa->x87_fsw = xregs->i387.swd;
	vmsa->x87_ftw = xregs->i387.twd;
	vmsa->x87_fop = xregs->i387.fop;
	vmsa->mxcsr = xregs->i387.mxcsr;
	fake_save_x87(vmsa->fpreg_x87, (u8 *)xregs->i387.st_space);
	memcpy(vmsa->fpreg_xmm, xregs->i387.xmm_space, sizeof(vmsa->fpreg_xmm));
	memcpy(vmsa->fpreg_ymm, xregs->ymm, sizeof(vmsa->fpreg_ymm));
}

#endif /* FAKE_FPU_H */
