# Two ways to fail, in 64-bit mode with the launcher's page tables, without the runtime. Entered at
# _start it reads where no memory and no device is; entered 0x100 bytes further (--entry 0x100100)
# it dies of a triple fault.
#
# plain VM:  "failed", KVM_EXIT_MMIO at 0xd0000000, exit code 1.
# SNP guest: the read is a #VC, for which there is no handler: "shutdown", exit code 1.
        .globl  _start
        .text
_start: mov     $0xd0000000, %eax
        mov     (%rax), %ebx
        jmp     _start

        .org    0x100
triple: lidt    no_idt(%rip)
        ud2
no_idt: .word   0
        .quad   0
