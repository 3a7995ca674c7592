# Prints a line on the console (port 0x3f8) and ends well through the exit port (0xf4).
# The launcher enters here in 64-bit mode with an identity map and no stack.
        .globl  _start
        .text
_start: lea     message(%rip), %rsi
        mov     $0x3f8, %dx
next:   lodsb
        test    %al, %al
        jz      done
        out     %al, %dx
        jmp     next
done:   xor     %eax, %eax
        out     %eax, $0xf4
stop:   hlt
        jmp     stop
message:
        .asciz  "hello from a kvmlaunch guest\n"
