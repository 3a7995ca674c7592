#!/bin/sh
# Assemble and link every guest beside this script (needs binutils only).
set -eu
cd "$(dirname "$0")"
for source in *.s; do
    name=${source%.s}
    as --64 -o "$name.o" "$source"
    # -n: no page alignment in the file, so the headers are not part of the guest.
    ld -n -static -m elf_x86_64 -Ttext=0x100000 -o "$name.elf" "$name.o"
    rm "$name.o"
    echo "$name.elf"
done
