#!/bin/sh
# Build the guests beside this script, or those whose sources are named (needs gcc and binutils).
# A .c file is a guest on the runtime (runtime/runtime.h), a .s file is a guest of its own.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
CC=${CC:-gcc}
# Integer instructions only: /dev/kvm may emulate them, and #VC handlers save nothing else.
FLAGS="-std=gnu11 -Os -Wall -Wextra -ffreestanding -fno-pic -fno-pie -fno-stack-protector \
-fno-asynchronous-unwind-tables -fno-tree-loop-distribute-patterns -fcf-protection=none \
-mgeneral-regs-only -mno-red-zone"

[ $# -gt 0 ] || set -- "$here"/*.c "$here"/*.s
for source; do
    case $source in
    *.c)
        # Once, and only if a guest needs it.
        if [ ! -d "$work/runtime" ]; then
            mkdir "$work/runtime"
            for part in "$here"/runtime/*.[cS]; do
                $CC $FLAGS -I"$here" -ffile-prefix-map="$here/"= \
                    -c -o "$work/runtime/$(basename "$part").o" "$part"
            done
            # A guest gets only those parts that it uses.
            ar rcs "$work/runtime.a" "$work"/runtime/*.c.o
        fi
        # The paths of failed checks, and with them the guest, are the same in any folder.
        $CC $FLAGS -I"$here" -ffile-prefix-map="$(dirname "$source")/"= -c -o "$work/guest.o" \
            "$source"
        # -n: no page alignment in the file, so the headers are not part of the guest.
        ld -n -static -T "$here/runtime/guest.ld" -o "${source%.c}.elf" "$work/guest.o" \
            "$work/runtime/start.S.o" "$work/runtime.a"
        ;;
    *.s)
        as --64 -o "$work/guest.o" "$source"
        ld -n -static -m elf_x86_64 -Ttext=0x100000 -o "${source%.s}.elf" "$work/guest.o"
        ;;
    esac
    echo "$(basename "${source%.*}").elf"
done
