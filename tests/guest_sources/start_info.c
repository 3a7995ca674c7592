/* Prints the memory map of the PVH start info (Xen: start_info.h), in KiB. */
#include "runtime/runtime.h"

#define MAGIC 0x336ec578

struct start_info {
	u32 magic, version, flags, module_count;
	u64 modules, command_line, rsdp, memory_map;
	u32 memory_map_entries, reserved;
};

struct memory_map_entry {
	u64 gpa, size;
	u32 type, reserved;
};

void guest_main(void)
{
	const struct start_info *info = (const void *)(u64)start_info;
	const struct memory_map_entry *entry;
	u32 n;

	if (info->magic != MAGIC || info->version != 1)
		fail(FAIL_MEMORY);
	entry = (const void *)info->memory_map;
	for (n = 0; n < info->memory_map_entries; n++, entry++) {
		print_number(entry->gpa / 1024);
		print(" ");
		print_number(entry->size / 1024);
		print(entry->type == 1 ? " ram\n" : " ?\n");
	}
}
