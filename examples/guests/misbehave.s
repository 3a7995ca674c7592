# Two ways to fail. Entered at _start it reads where no memory and no device is;
# entered 0x100 bytes further (--entry 0x100100) it dies of a triple fault.
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
