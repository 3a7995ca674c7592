/*
 * From the PVH entry to guest_main(): 32-bit protected mode without paging, then long mode.
 *
 * Without paging every access of an SNP guest is private, so nothing that is measured depends on
 * the C-bit: its position is asked for here, and the page tables are made with it.
 */
#include "runtime.h"

#define CODE32 0x08
#define DATA 0x10
#define CODE64 0x18
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
	.skip	8192
stack_top:
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
	mov	$stack_top, %esp
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

/* A vCPU that came too late: halted in a plain VM, held in reset in an SNP guest. No stack. */
wait:	pause
	cmpl	$1, machine
	jb	wait
	je	5b
6:	mov	$MSR_GHCB, %ecx
	mov	$GHCB_HOLD, %eax
	xor	%edx, %edx
	wrmsr
	rep; vmmcall
	jmp	6b

	.code64
start64:
	mov	$DATA, %eax
	mov	%eax, %ds
	mov	%eax, %es
	mov	%eax, %ss
	mov	$stack_top, %esp
	call	exceptions_init
	cmpl	$0, c_bit
	je	7f
	call	snp_init
7:	call	guest_main
8:	xor	%eax, %eax		/* it ended well */
	out	%eax, $EXIT_PORT
	jmp	8b

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
	push	%rax
	push	%rcx
	push	%rdx
	push	%rbx
	push	%rbp
	push	%rsi
	push	%rdi
	push	%r8
	push	%r9
	push	%r10
	push	%r11
	mov	%rsp, %rdi
	cld
	call	vc_handler
	pop	%r11
	pop	%r10
	pop	%r9
	pop	%r8
	pop	%rdi
	pop	%rsi
	pop	%rbp
	pop	%rbx
	pop	%rdx
	pop	%rcx
	pop	%rax
	add	$8, %rsp
	iretq

	.section .note.GNU-stack, "", @progbits
