/*
 * From the PVH entry to guest_main(): 32-bit protected mode without paging, then long mode.
 *
 * Without paging every access of an SNP guest is private, so nothing that is measured depends on
 * the C-bit: its position is asked for here, and the page tables are made with it.
 */
#include "runtime.h"

#define VECTORS 32

/* Tells a loader where to enter, and that it is a 32-bit entry (Xen: XEN_ELFNOTE_PHYS32_ENTRY). */
	.section .note.pvh, "a", @note
	.balign	4
	.long	4, 4, 18
	.asciz	"Xen"
	.long	start

	.bss
	.balign	4096
pml4:	.skip	4096
pdpt:	.skip	4096
	.globl	page_directories, small_pages
page_directories:
	.skip	4 * 4096
small_pages:
	.skip	4096
	.balign	CPU_SIZE
boot_cpu:
	.skip	CPU_SIZE
idt32:	.skip	VECTORS * 8
cpuid_answer:
	.skip	16
	.globl	c_bit, start_info
start_info:
	.skip	4
c_bit:	.skip	4
taken:	.skip	4
/* What the waiting vCPUs go by: 0 not known yet, 1 a plain VM, 2 an SNP guest. */
machine:
	.skip	4
/* From cpus.c, where the guest has it: what plain vCPUs wait for, and their stacks. */
	.weak	cpus_entry, cpus_areas, cpus_run

	.section .rodata
	.balign	8
gdt:	.quad	0
	.quad	0x00cf9b000000ffff	/* CODE32 */
	.quad	0x00cf93000000ffff	/* DATA */
	.quad	0x00af9b000000ffff	/* CODE64 */
gdt_pointer:
	.word	. - gdt - 1
	.long	gdt
idt32_pointer:
	.word	VECTORS * 8 - 1
	.long	idt32

	.text
	.code32
	.globl	start
start:	lock btsl $0, taken		/* all vCPUs start here, one goes on */
	jc	wait
	cld
	mov	$boot_cpu + CPU_SIZE, %esp
	mov	%ebx, start_info
	lgdt	gdt_pointer
	ljmp	$CODE32, $1f
1:	mov	$DATA, %eax
	mov	%eax, %ds
	mov	%eax, %es
	mov	%eax, %ss

	.macro	gate vector, handler
	mov	$\handler, %eax
	mov	%ax, idt32 + \vector * 8
	movw	$CODE32, idt32 + \vector * 8 + 2
	movw	$0x8e00, idt32 + \vector * 8 + 4	/* interrupt gate, present */
	shr	$16, %eax
	mov	%ax, idt32 + \vector * 8 + 6
	.endm
	gate	6, invalid_opcode
	gate	13, general_protection
	gate	29, vc32
	lidt	idt32_pointer

	/* Where are we? Only in a guest with encrypted state is CPUID a #VC. */
	xor	%edi, %edi		/* the C-bit in the upper half of an entry; vc32 sets bit 0 */
	xor	%eax, %eax
	xor	%ecx, %ecx
	cpuid
	test	%edi, %edi
	jnz	ask_host
	movl	$1, machine
	jmp	make_tables

ask_host:
	movl	$2, machine
	mov	$FAIL_NOT_SNP, %ebx
	mov	$MSR_SEV_STATUS, %ecx	/* told by the processor, not by the host */
	rdmsr
	test	$SEV_STATUS_SNP, %al
	jz	terminate
	mov	$GHCB_INFO, %eax
	xor	%edx, %edx
	call	vmgexit			/* highest:lowest version, C-bit position */
	mov	$FAIL_PROTOCOL, %ebx
	mov	%eax, %ecx
	and	$0xfff, %ecx
	cmp	$GHCB_INFO_ANSWER, %ecx
	jne	terminate
	cmp	$GHCB_PROTOCOL, %dx
	ja	terminate
	shr	$16, %edx
	cmp	$GHCB_PROTOCOL, %edx
	jb	terminate
	/* A guest with secrets would have to check what follows (Linux: sev_verify_cbit). */
	mov	$FAIL_C_BIT, %ebx
	shr	$24, %eax
	cmp	$32, %eax
	jb	terminate
	cmp	$51, %eax
	ja	terminate
	mov	%eax, c_bit
	sub	$32, %eax
	xor	%edi, %edi
	bts	%eax, %edi

make_tables:
	movl	$pdpt + PTE_TABLE, pml4
	mov	%edi, pml4 + 4
	movl	$page_directories + PTE_TABLE, pdpt
	mov	%edi, pdpt + 4
	movl	$page_directories + 4096 + PTE_TABLE, pdpt + 8
	mov	%edi, pdpt + 12
	movl	$page_directories + 2 * 4096 + PTE_TABLE, pdpt + 16
	mov	%edi, pdpt + 20
	movl	$page_directories + 3 * 4096 + PTE_TABLE, pdpt + 24
	mov	%edi, pdpt + 28
	movl	$small_pages + PTE_TABLE, page_directories
	mov	%edi, page_directories + 4
	mov	$PTE_TABLE, %eax
	mov	$small_pages, %ebx
2:	mov	%eax, (%ebx)
	mov	%edi, 4(%ebx)
	add	$8, %ebx
	add	$4096, %eax
	cmp	$SMALL_PAGES_END, %eax
	jb	2b
	mov	$boot64, %ebp

/* To 64-bit mode with these tables, and on at ebp. */
long_mode:
	mov	%cr4, %eax
	or	$1 << 5, %eax		/* PAE */
	mov	%eax, %cr4
	mov	$pml4, %eax		/* no C-bit: the walk is private anyway */
	mov	%eax, %cr3
	mov	$MSR_EFER, %ecx
	rdmsr
	or	$1 << 8, %eax		/* LME */
	wrmsr
	mov	%cr0, %eax
	or	$1 << 31, %eax		/* PG */
	mov	%eax, %cr0
	ljmp	$CODE64, $start64

/* Asks the host by the GHCB MSR protocol: edx:eax is the request and becomes the answer. */
vmgexit:
	mov	$MSR_GHCB, %ecx
	wrmsr
	rep; vmmcall
	rdmsr
	ret

/* CPUID by the GHCB MSR protocol, a register at a time; it has no index, as leaf 0 needs none. */
vc32:	cmpl	$EXIT_CPUID, (%esp)
	mov	$FAIL_VC, %ebx
	jne	terminate
	mov	%eax, %esi
	xor	%ebp, %ebp
3:	mov	%ebp, %eax
	shl	$30, %eax
	or	$GHCB_CPUID, %eax
	mov	%esi, %edx
	call	vmgexit
	mov	$FAIL_ANSWER, %ebx
	and	$0xfff, %eax
	cmp	$GHCB_CPUID_ANSWER, %eax
	jne	terminate
	mov	%edx, cpuid_answer(, %ebp, 4)
	inc	%ebp
	cmp	$4, %ebp
	jne	3b
	mov	cpuid_answer, %eax
	mov	cpuid_answer + 4, %ebx
	mov	cpuid_answer + 8, %ecx
	mov	cpuid_answer + 12, %edx
	mov	$1, %edi
	add	$4, %esp		/* the error code */
	addl	$2, (%esp)		/* behind CPUID */
	iret

/* If this is an SNP guest the OUT is a #VC, which ends at terminate. */
invalid_opcode:
	mov	$FAIL_EXCEPTION + 6, %eax
	jmp	4f
general_protection:
	mov	$FAIL_EXCEPTION + 13, %eax
4:	out	%eax, $EXIT_PORT
5:	cli
	hlt
	jmp	5b

/* Ends an SNP guest with the code in ebx. */
terminate:
	mov	%ebx, %eax
	shl	$16, %eax
	or	$GHCB_TERMINATE | FAIL_SET << 12, %eax
	xor	%edx, %edx
	call	vmgexit
	jmp	terminate

/*
 * A vCPU that came too late. An SNP guest holds it in reset; in a plain VM it halts, unless the
 * guest has cpus.c, for which it waits with a stack of its own. No stack until then.
 */
wait:	pause
	cmpl	$1, machine
	jb	wait
	ja	hold
	mov	$cpus_entry, %eax
	test	%eax, %eax
	jz	5b
7:	pause
	cmpl	$0, cpus_entry
	je	7b
	mov	$1, %eax
	cpuid
	shr	$24, %ebx		/* its APIC id, the number of its stack */
	cmp	$CPUS_MOST, %ebx
	jae	5b
	imul	$CPU_SIZE, %ebx, %esp
	add	$cpus_areas + CPU_SIZE, %esp
	lgdt	gdt_pointer
	mov	$cpus_run, %ebp
	jmp	long_mode

hold:	mov	$MSR_GHCB, %ecx
	mov	$GHCB_HOLD, %eax
	xor	%edx, %edx
	wrmsr
	rep; vmmcall
	jmp	hold

	.code64
start64:
	mov	$DATA, %eax
	mov	%eax, %ds
	mov	%eax, %es
	mov	%eax, %ss
	mov	%esp, %esp
	mov	%ebp, %ebp
	jmp	*%rbp

boot64:	call	exceptions_init
	cmpl	$0, c_bit
	je	8f
	call	snp_init
8:	call	guest_main
9:	xor	%eax, %eax		/* it ended well */
	out	%eax, $EXIT_PORT
	jmp	9b

/* One stub per exception that nobody expects, 16 bytes apart. */
	.globl	exception_stubs
	.balign	16
exception_stubs:
	.set	vector, 0
	.rept	VECTORS
	mov	$FAIL_EXCEPTION + vector, %edi
	call	fail
	.balign	16
	.set	vector, vector + 1
	.endr

	.globl	vc_entry
vc_entry:				/* the error code is on the stack; struct registers in vc.c */
	push	%r15
	push	%r14
	push	%r13
	push	%r12
	push	%r11
	push	%r10
	push	%r9
	push	%r8
	push	%rdi
	push	%rsi
	push	%rbp
	push	%rsp
	push	%rbx
	push	%rdx
	push	%rcx
	push	%rax
	mov	%rsp, %rdi
	cld
	call	vc_handler
	pop	%rax
	pop	%rcx
	pop	%rdx
	pop	%rbx
	add	$8, %rsp		/* rsp: IRETQ has it */
	pop	%rbp
	pop	%rsi
	pop	%rdi
	pop	%r8
	pop	%r9
	pop	%r10
	pop	%r11
	pop	%r12
	pop	%r13
	pop	%r14
	pop	%r15
	add	$8, %rsp
	iretq

	.section .note.GNU-stack, "", @progbits
