# Halts at once: without an in-kernel APIC the run is over, and over well.
        .globl  _start
        .text
_start: cli
        hlt
        jmp     _start
