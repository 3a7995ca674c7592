/*
 * What a guest of this folder may use, in a plain VM and as an SEV-SNP guest.
 *
 * A guest is one C file with guest_main(); start.S enters it in 64-bit mode, on one vCPU. The
 * other vCPUs wait until cpus_start(). A guest that returns has ended well; fail() and a failed
 * check_equal() end it badly.
 *
 * Sources: AMD 56421 (GHCB), AMD APM volumes 2 and 3 (#VC, PVALIDATE, RMPADJUST, SEV_STATUS).
 */
#ifndef RUNTIME_H
#define RUNTIME_H

#define CONSOLE_PORT 0x3f8
#define EXIT_PORT 0xf4

/*
 * Why a guest ended badly. An SNP guest ends by the termination request of the GHCB MSR protocol,
 * with this reason set and one of these codes; a plain guest writes the code to the exit port.
 */
#define FAIL_SET 15
#define FAIL_NOT_SNP 1       /* not an SNP guest */
#define FAIL_PROTOCOL 2      /* the hypervisor doesn't speak version 2 of the GHCB protocol */
#define FAIL_C_BIT 3         /* a C-bit position that no page table entry has */
#define FAIL_FEATURES 4      /* the hypervisor has no SNP support */
#define FAIL_STATE_CHANGE 5  /* page state change refused */
#define FAIL_PVALIDATE 6     /* PVALIDATE failed, or changed nothing */
#define FAIL_REGISTER 7      /* GHCB registration refused */
#define FAIL_ANSWER 8        /* the answer lacks a field, or is one to another request */
#define FAIL_VC 10           /* #VC of an instruction that the runtime doesn't know */
#define FAIL_MEMORY 11       /* memory doesn't hold what was written, or isn't where it should be */
#define FAIL_CHECK 12        /* a check failed: the console says which, and where */
#define FAIL_UNVALIDATED 13  /* a private page was used that isn't validated */
#define FAIL_MESSAGE 14      /* the secure processor didn't answer a guest message */
#define FAIL_VMPLS 15        /* the hypervisor runs no other VMPL than 0 */
#define FAIL_CPUS 16         /* more vCPUs than the guest has room for */
#define FAIL_REFUSED 0x20    /* plus one of REFUSED_: a request through the GHCB page was refused */
#define FAIL_EXCEPTION 0x80  /* plus the vector: an exception that nobody expected */

/* Page table entries: present, writable; and a large page. */
#define PTE_TABLE 0x3
#define PTE_LARGE 0x80

/* Everything below this is mapped with 4 KiB pages, for page state changes. */
#define SMALL_PAGES_END 0x200000

/* What belongs to one vCPU: a GHCB page with a stack behind it, aligned to its size. */
#define CPU_SIZE 0x4000
/* Room of cpus.c. */
#define CPUS_MOST 8

#define CODE32 0x08
#define DATA 0x10
#define CODE64 0x18

#define MSR_EFER 0xc0000080
#define MSR_GHCB 0xc0010130
#define MSR_SEV_STATUS 0xc0010131
#define SEV_STATUS_SNP 0x4

/* GHCB MSR protocol: what is asked and answered, bits 11:0. */
#define GHCB_INFO_ANSWER 0x001
#define GHCB_INFO 0x002
#define GHCB_CPUID 0x004
#define GHCB_CPUID_ANSWER 0x005
#define GHCB_HOLD 0x006
#define GHCB_REGISTER 0x012
#define GHCB_STATE_CHANGE 0x014
#define GHCB_FEATURES 0x080
#define GHCB_TERMINATE 0x100
#define GHCB_PROTOCOL 2
#define FEATURE_SNP 0x1
#define FEATURE_APIC_ID_LIST 0x10
#define FEATURE_MULTI_VMPL 0x20

/* #VC error codes, and exit codes of the GHCB page. */
#define EXIT_CPUID 0x72
#define EXIT_IOIO 0x7b
#define EXIT_MSR 0x7c
#define EXIT_WBINVD 0x89
#define EXIT_NPF 0x400
#define EXIT_NOT_VALIDATED 0x404
#define EXIT_MMIO_READ 0x80000001
#define EXIT_MMIO_WRITE 0x80000002
#define EXIT_STATE_CHANGE 0x80000010
#define EXIT_GUEST_REQUEST 0x80000011
#define EXIT_AP_CREATION 0x80000013
#define EXIT_APIC_ID_LIST 0x80000017
#define EXIT_RUN_VMPL 0x80000018

/* What a host says instead of 0 in GHCB_INFO1; GHCB_INFO2 is the vector, or why it refuses. */
#define RAISED_EXCEPTION 1
#define REFUSED 2
#define REFUSED_PAGE 1     /* GHCB page not registered */
#define REFUSED_USAGE 2    /* invalid usage */
#define REFUSED_SCRATCH 3  /* invalid scratch area */
#define REFUSED_MISSING 4  /* missing input */
#define REFUSED_INPUT 5    /* invalid input */
#define REFUSED_EVENT 6    /* invalid event */

#ifndef __ASSEMBLER__

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

#define PAGE_SIZE 4096UL
#define PAGE_ALIGNED __attribute__((aligned(4096)))

/* From start.S: position of the C-bit, 0 in a plain VM; and the GPA of the PVH start info. */
extern const u32 c_bit;
extern const u32 start_info;

static inline int is_snp(void)
{
	return c_bit != 0;
}

void guest_main(void);

/* console.c */
void print(const char *text);
void print_number(u64 value);
void print_hex(u64 value);
_Noreturn void fail(u32 code);
void need_snp(void);
void check(const char *file, u32 line, const char *what, u64 value, u64 expected);

/* Ends the guest badly, and tells the host where and with which values, if they differ. */
#define check_equal(value, expected) \
	check(__FILE__, __LINE__, #value, (u64)(value), (u64)(expected))

/* paging.c */
enum { SHARED, PRIVATE };
void map_2m(u64 gpa, int private);
void set_private(u64 gpa, int private);
int is_private(u64 gpa);

/* msr.c: all of it by the GHCB MSR protocol */
#define STATE_PRIVATE 1UL
#define STATE_SHARED 2UL
u64 ghcb_msr(u64 request);
void state_change(const void *page, u64 state);
u32 pvalidate(const void *page, u32 validate, u8 *unchanged);
void page_share(void *page);
void page_accept(void *page);

/* ghcb.c */
void snp_init(void);
void ghcb_init(void);
u8 *ghcb_page(void);
void ghcb_begin(void);
void ghcb_set(u32 field, u64 value);
u64 ghcb_get(u32 field);
u64 ghcb_buffer(void);
u32 ghcb_try(u64 code, u64 info1, u64 info2);
void ghcb_exit(u64 code, u64 info1, u64 info2);

/* psc.c */
#define PSC_MOST 253
void psc_begin(void);
void psc_add(u64 gpa, u64 state);
u64 psc_commit(void);

/* cpus.c */
u32 cpu_count(void);
u32 cpu_number(void);
void cpus_start(void (*entry)(u32 number));
void lock(volatile u32 *lock);
void unlock(volatile u32 *lock);

/* vmsa.c */
#define RMP_READ 0x100
#define RMP_WRITE 0x200
#define RMP_EXECUTE 0xc00
#define RMP_VMSA 0x10000
#define RMP_FAIL_PERMISSION 2
u32 rmpadjust(const void *page, u64 attributes);
void vmsa_fill(u8 *vmsa, u32 vmpl, void (*entry)(void), u8 *area);
u32 vmsa_run(const u8 *vmsa, u32 vmpl, u32 apic_id);

/* aes_gcm.c */
struct gcm {
	u8 round_keys[15][16];
	u8 hash_key[16];
};
void gcm_init(struct gcm *gcm, const u8 key[32]);
void gcm_crypt(const struct gcm *gcm, const u8 iv[12], u8 *data, u32 size);
void gcm_tag(const struct gcm *gcm, const u8 iv[12], const u8 *header, u32 header_size,
	     const u8 *data, u32 size, u8 tag[16]);

#define GHCB_RAX 0x1f8
#define GHCB_RCX 0x308
#define GHCB_RDX 0x310
#define GHCB_RBX 0x318
#define GHCB_EXIT_CODE 0x390
#define GHCB_INFO1 0x398
#define GHCB_INFO2 0x3a0
#define GHCB_SCRATCH 0x3a8
#define GHCB_XCR0 0x3e8
#define GHCB_VALID 0x3f0
#define GHCB_BUFFER 0x800
#define GHCB_VERSION 0xffa
#define GHCB_USAGE 0xffc

/* vc.c */
void exceptions_init(void);
void exceptions_load(void);

static inline void out8(u16 port, u8 value)
{
	asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline void out32(u16 port, u32 value)
{
	asm volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

/* Loads and stores that stay one MOV each. */
#define MMIO_ACCESS(bits)                                                              \
	static inline u##bits mmio_read##bits(u64 gpa)                                 \
	{                                                                              \
		u##bits value;                                                         \
                                                                                       \
		asm volatile("mov (%1), %0" : "=r"(value) : "r"(gpa) : "memory");      \
		return value;                                                          \
	}                                                                              \
	static inline void mmio_write##bits(u64 gpa, u##bits value)                    \
	{                                                                              \
		asm volatile("mov %0, (%1)" : : "r"(value), "r"(gpa) : "memory");      \
	}

MMIO_ACCESS(8)
MMIO_ACCESS(16)
MMIO_ACCESS(32)
MMIO_ACCESS(64)

static inline u8 in8(u16 port)
{
	u8 value;

	asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static inline u64 rdmsr(u32 index)
{
	u32 low, high;

	asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index));
	return low | (u64)high << 32;
}

static inline void wrmsr(u32 index, u64 value)
{
	asm volatile("wrmsr" : : "c"(index), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}

static inline void cpuid(u32 function, u32 index, u32 out[4])
{
	asm volatile("cpuid"
		     : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3])
		     : "a"(function), "c"(index));
}

/*
 * Notes for kvmlaunch's ELF loader (kvmlaunch/images/launchnote.py). LAUNCH_PAGE() defines a page
 * of this type, which the host launches with it where it would launch a page of zeroes; AP_CREATION
 * says that an SNP guest starts its other vCPUs itself, VMPLS that it runs other VMPLs than 0.
 */
#define PAGE_SECRETS 5
#define PAGE_CPUID 6

#define LAUNCH_NOTE(type, size, descriptor)                                            \
	asm(".pushsection .note.kvmlaunch, \"a\", @note\n"                              \
	    ".balign 4\n"                                                              \
	    ".long 10, " #size ", " #type "\n"                                         \
	    ".asciz \"kvmlaunch\"\n"                                                   \
	    ".balign 4\n" descriptor "\n"                                             \
	    ".popsection")
#define LAUNCH_PAGE_(name, type)                                                       \
	u8 name[PAGE_SIZE] PAGE_ALIGNED;                                               \
	LAUNCH_NOTE(1, 12, ".quad " #name "\n.long " #type)
#define LAUNCH_PAGE(name, type) LAUNCH_PAGE_(name, type)
#define LAUNCH_AP_CREATION LAUNCH_NOTE(2, 0, "")
#define LAUNCH_VMPLS LAUNCH_NOTE(3, 0, "")

#endif
#endif
