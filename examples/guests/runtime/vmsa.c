/* VMSA pages that the guest makes itself, for GHCB AP creation. */
#include "runtime.h"

/* AMD APM volume 2, table B-4. */
#define VMSA_CS 0x10
#define VMSA_GDTR 0x60
#define VMSA_LDTR 0x70
#define VMSA_IDTR 0x80
#define VMSA_TR 0x90
#define VMSA_VMPL 0xca
#define VMSA_EFER 0xd0
#define VMSA_CR4 0x148
#define VMSA_CR3 0x150
#define VMSA_CR0 0x158
#define VMSA_DR7 0x160
#define VMSA_DR6 0x168
#define VMSA_RFLAGS 0x170
#define VMSA_RIP 0x178
#define VMSA_RSP 0x1d8
#define VMSA_PAT 0x268
#define VMSA_SEV_FEATURES 0x3b0
#define VMSA_XCR0 0x3e8
#define VMSA_MXCSR 0x408
#define VMSA_X87_FCW 0x410

#define EFER_SVME 0x1000UL

/* Attributes as in a VMCB: type, S and P in bits 7:0, then AVL, L, D/B, G. */
#define CODE64_SEGMENT 0xa9b
#define DATA_SEGMENT 0xc93
#define LDT_SEGMENT 0x82
#define TASK_SEGMENT 0x8b

#define CREATE 1

struct segment {
	u16 selector;
	u16 attributes;
	u32 limit;
	u64 base;
};

static void put(u8 *vmsa, u32 offset, u64 value)
{
	*(u64 *)(vmsa + offset) = value;
}

static void put_segment(u8 *vmsa, u32 offset, u16 selector, u16 attributes, u32 limit)
{
	*(struct segment *)(vmsa + offset) = (struct segment){ selector, attributes, limit, 0 };
}

static void put_table(u8 *vmsa, u32 offset, const void *pointer)
{
	const struct {
		u16 limit;
		u64 base;
	} __attribute__((packed)) *table = pointer;

	*(struct segment *)(vmsa + offset) = (struct segment){ 0, 0, table->limit, table->base };
}

#define READ_CR(number)                                        \
	({                                                     \
		u64 value;                                     \
                                                               \
		asm("mov %%cr" #number ", %0" : "=r"(value));  \
		value;                                         \
	})

/* A vCPU that enters `entry` as the present one does 64-bit code, with the stack of `area`. */
void vmsa_fill(u8 *vmsa, u32 vmpl, void (*entry)(void), u8 *area)
{
	u8 gdt[10], idt[10];
	u32 n, segment;

	asm("sgdt %0" : "=m"(gdt));
	asm("sidt %0" : "=m"(idt));
	for (n = 0; n < PAGE_SIZE; n += 8)
		put(vmsa, n, 0);
	for (segment = 0; segment < 6; segment++)
		put_segment(vmsa, segment * 0x10, DATA, DATA_SEGMENT, 0xffffffff);
	put_segment(vmsa, VMSA_CS, CODE64, CODE64_SEGMENT, 0xffffffff);
	put_segment(vmsa, VMSA_LDTR, 0, LDT_SEGMENT, 0xffff);
	put_segment(vmsa, VMSA_TR, 0, TASK_SEGMENT, 0xffff);
	put_table(vmsa, VMSA_GDTR, gdt);
	put_table(vmsa, VMSA_IDTR, idt);
	vmsa[VMSA_VMPL] = vmpl;
	put(vmsa, VMSA_EFER, rdmsr(MSR_EFER) | EFER_SVME);
	put(vmsa, VMSA_CR4, READ_CR(4));
	put(vmsa, VMSA_CR3, READ_CR(3));
	put(vmsa, VMSA_CR0, READ_CR(0));
	put(vmsa, VMSA_DR7, 0x400);
	put(vmsa, VMSA_DR6, 0xffff0ff0);
	put(vmsa, VMSA_RFLAGS, 2);
	put(vmsa, VMSA_RIP, (u64)entry);
	put(vmsa, VMSA_RSP, (u64)area + CPU_SIZE);
	put(vmsa, VMSA_PAT, 0x0007040600070406);
	put(vmsa, VMSA_SEV_FEATURES, rdmsr(MSR_SEV_STATUS) >> 2);
	put(vmsa, VMSA_XCR0, 1);
	*(u32 *)(vmsa + VMSA_MXCSR) = 0x1f80;
	*(u16 *)(vmsa + VMSA_X87_FCW) = 0x37f;
}

/* RMPADJUST of 4 KiB: bits 7:0 of the attributes are the VMPL whose rights they are. */
u32 rmpadjust(const void *page, u64 attributes)
{
	u32 error;

	asm volatile(".byte 0xf3, 0x0f, 0x01, 0xfe"
		     : "=a"(error)
		     : "a"(page), "c"(0), "d"(attributes)
		     : "memory", "cc");
	return error;
}

/* Make the page a VMSA, which only VMPL0 can, and let the vCPU run from it: 0, or a refusal. */
u32 vmsa_run(const u8 *vmsa, u32 vmpl, u32 apic_id)
{
	check_equal(rmpadjust(vmsa, RMP_VMSA | 1), 0);
	ghcb_begin();
	ghcb_set(GHCB_RAX, *(const u64 *)(vmsa + VMSA_SEV_FEATURES));
	return ghcb_try(EXIT_AP_CREATION, (u64)apic_id << 32 | vmpl << 16 | CREATE, (u64)vmsa);
}
