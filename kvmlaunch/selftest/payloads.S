/*
 * Source of the bytes in payloads.py, which says what each payload does and where its memory is;
 * tests/selftest/test_payloads.py compares the two.
 *
 * Sources: AMD 56421 (GHCB), AMD APM volume 3 (PVALIDATE, RMPADJUST).
 */

/* As in payloads.py. */
#define REASON_SET 14
#define AP_VMSA_GPA 0x106000
#define GHCB_GPA 0x107000
#define LIST_GPA 0x108000
#define PRIVATE_ALIAS -0x100000		/* from a GPA to where it is mapped private as well */
#define BAD_PVALIDATE 0xe1
#define BAD_STATE_CHANGE 0xe2
#define BAD_REGISTER 0xe3
#define BAD_RMPADJUST 0xe4
#define BAD_AP_CREATION 0xe5
#define NO_APIC_ID_LIST 0xe6
#define BAD_APIC_ID_LIST 0xe7

#define MSR_GHCB 0xc0010130
#define MSR_EFER 0xc0000080
#define EFER_SVME_BIT 12

#define MSR_REGISTER 0x012
#define MSR_STATE_CHANGE 0x014
#define MSR_FEATURES 0x080
#define MSR_TERMINATE 0x100
#define ANSWER(request) ((request) + 1)
#define TO_SHARED_HIGH (2 << 20)	/* operation in bits 55:52 */
#define FEATURE_APIC_ID_LIST_BIT (12 + 4)

#define EVENT_AP_CREATION 0x80000013
#define EVENT_APIC_ID_LIST 0x80000017
#define AP_CREATE 1
#define AP_APIC_ID 1

#define GHCB_RAX (GHCB_GPA + 0x1f8)
#define GHCB_EXIT_CODE (GHCB_GPA + 0x390)
#define GHCB_INFO1 (GHCB_GPA + 0x398)
#define GHCB_INFO2 (GHCB_GPA + 0x3a0)
#define GHCB_VALID (GHCB_GPA + 0x3f0)	/* a bit for every 8 bytes: 63 is RAX, 114 to 116 the rest */
#define GHCB_VERSION_AND_USAGE (GHCB_GPA + 0xff8)
#define VMSA_SEV_FEATURES 0x3b0

	.macro	vmgexit
	rep; vmmcall
	.endm

	.text
	.code32
	.globl	report_bl
report_bl:
	movzbl	%bl, %eax
	shl	$16, %eax
	or	$MSR_TERMINATE | REASON_SET << 12, %eax
	xor	%edx, %edx
	mov	$MSR_GHCB, %ecx
1:	wrmsr
	vmgexit
	jmp	1b

	.code64
	.globl	report_vmsa_state
report_vmsa_state:			/* nothing may change before it is on the stack */
	push	%rsp
	pushfq
	push	%rax
	push	%rbx
	push	%rcx
	push	%rdx
	push	%rsi
	push	%rdi
	push	%rbp
	push	%r8
	push	%r9
	push	%r10
	push	%r11
	push	%r12
	push	%r13
	push	%r14
	push	%r15
	mov	%cr0, %rax
	push	%rax
	mov	%cr2, %rax
	push	%rax
	mov	%cr3, %rax
	push	%rax
	mov	%cr4, %rax
	push	%rax
	mov	%es, %eax
	push	%rax
	mov	%cs, %eax
	push	%rax
	mov	%ss, %eax
	push	%rax
	mov	%ds, %eax
	push	%rax
	mov	%fs, %eax
	push	%rax
	mov	%gs, %eax
	push	%rax
	sldt	%eax
	push	%rax
	str	%eax
	push	%rax
	push	$0			/* 6 bytes of base and limit, then 4 of base */
	push	$0
	sgdt	(%rsp)
	push	$0
	push	$0
	sidt	(%rsp)
	push	$0
	fnstcw	(%rsp)
	lea	msrs(%rip), %rsi
2:	mov	(%rsi), %ecx
	rdmsr
	cmp	$MSR_EFER, %ecx
	jne	3f
	btr	$EFER_SVME_BIT, %eax	/* the hypervisor's */
3:	shl	$32, %rdx
	or	%rdx, %rax
	push	%rax
	add	$4, %rsi
	lea	msrs_end(%rip), %rax
	cmp	%rax, %rsi
	jb	2b
	xor	%eax, %eax
	mov	$(state_words + 9), %ecx
4:	rol	$7, %rax
	pop	%rdx
	add	%rdx, %rax
	loop	4b
	mov	%rax, %rdx		/* both halves into one */
	shr	$32, %rdx
	xor	%eax, %edx
	mov	%edx, %eax

/* Ends with the code al; edx goes with it, in bits 63:32. */
report:	movzbl	%al, %eax
	shl	$16, %eax
	or	$MSR_TERMINATE | REASON_SET << 12, %eax
	mov	$MSR_GHCB, %ecx
5:	wrmsr
	vmgexit
	jmp	5b

	.globl	start_ap
start_ap:
	mov	$GHCB_GPA, %edi
	call	share
	call	register
	mov	$BAD_RMPADJUST, %bl
	mov	$AP_VMSA_GPA, %eax
	xor	%ecx, %ecx		/* 4 KiB */
	mov	$0x10001, %edx		/* a VMSA; bits 7:0 must name a lower VMPL */
	.byte	0xf3, 0x0f, 0x01, 0xfe	/* rmpadjust */
	mov	%eax, %edx
	test	%eax, %eax
	jnz	bad
	mov	$BAD_AP_CREATION, %bl
	mov	AP_VMSA_GPA + VMSA_SEV_FEATURES, %rax
	mov	$EVENT_AP_CREATION, %esi
	movabs	$AP_APIC_ID << 32 | AP_CREATE, %rdi
	mov	$AP_VMSA_GPA, %r8d
	call	event
6:	hlt				/* until the other vCPU ends it */
	jmp	6b

	.globl	apic_ids
apic_ids:
	mov	$GHCB_GPA, %edi
	call	share
	mov	$LIST_GPA, %edi
	call	share
	call	register
	mov	$NO_APIC_ID_LIST, %bl
	mov	$MSR_FEATURES, %eax
	xor	%edx, %edx
	call	ask
	mov	%eax, %edx
	shr	$12, %edx
	bt	$FEATURE_APIC_ID_LIST_BIT, %eax
	jnc	bad
	mov	$BAD_APIC_ID_LIST, %bl
	mov	$1, %eax		/* page */
	mov	$EVENT_APIC_ID_LIST, %esi
	mov	$LIST_GPA, %edi
	xor	%r8d, %r8d
	call	event
	mov	LIST_GPA, %ecx
	xor	%edx, %edx
	jrcxz	8f
7:	mov	LIST_GPA(, %rcx, 4), %eax
	bts	%eax, %edx
	loop	7b
8:	mov	LIST_GPA, %eax
	jmp	report

/* Give the page at rdi away, and clear what both sides see there from now on. */
share:	mov	$BAD_PVALIDATE, %bl
	lea	PRIVATE_ALIAS(%rdi), %rax
	xor	%ecx, %ecx		/* 4 KiB */
	xor	%edx, %edx		/* not valid any more */
	.byte	0xf2, 0x0f, 0x01, 0xff	/* pvalidate */
	mov	%eax, %edx
	jc	bad			/* it was not valid before */
	test	%eax, %eax
	jnz	bad
	mov	$BAD_STATE_CHANGE, %bl
	lea	MSR_STATE_CHANGE(%rdi), %eax
	mov	$TO_SHARED_HIGH, %edx
	call	ask
	and	$0xfff, %eax
	cmp	$ANSWER(MSR_STATE_CHANGE), %eax
	jne	bad
	test	%edx, %edx
	jnz	bad
	xor	%eax, %eax
	mov	$512, %ecx
	rep	stosq
	ret

register:
	mov	$BAD_REGISTER, %bl
	mov	$GHCB_GPA | MSR_REGISTER, %eax
	xor	%edx, %edx
	call	ask
	cmp	$GHCB_GPA | ANSWER(MSR_REGISTER), %eax
	jne	bad
	test	%edx, %edx
	jnz	bad
	ret

/* The GHCB MSR protocol: edx:eax is the request and becomes the answer. */
ask:	mov	$MSR_GHCB, %ecx
	wrmsr
	vmgexit
	rdmsr
	ret

/* An event with rsi as code, rdi and r8 as infos, and RAX; edx is why it was refused. */
event:	mov	%rax, GHCB_RAX
	mov	%rsi, GHCB_EXIT_CODE
	mov	%rdi, GHCB_INFO1
	mov	%r8, GHCB_INFO2
	movabs	$1 << 63, %rax
	mov	%rax, GHCB_VALID
	movabs	$7 << 50, %rax
	mov	%rax, GHCB_VALID + 8
	movq	$2 << 16, GHCB_VERSION_AND_USAGE
	mov	$GHCB_GPA, %eax
	xor	%edx, %edx
	mov	$MSR_GHCB, %ecx
	wrmsr
	vmgexit
	mov	GHCB_INFO2, %edx
	cmpl	$0, GHCB_INFO1
	jne	bad
	ret

bad:	mov	%bl, %al
	jmp	report

	.balign	4
msrs:	.long	MSR_EFER
	.long	0x174			/* SYSENTER_CS */
	.long	0xc0000081		/* STAR */
	.long	0xc0000082		/* LSTAR */
	.long	0xc0000083		/* CSTAR */
	.long	0xc0000084		/* SFMASK */
	.long	0xc0000100		/* FS base */
	.long	0xc0000101		/* GS base */
	.long	0xc0000102		/* kernel GS base */
msrs_end:

/* Pushed before the MSRs. */
	.set	state_words, 34
	.section .note.GNU-stack, "", @progbits
