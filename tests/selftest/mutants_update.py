"""Rules of UPDATE, each broken once."""

from __future__ import annotations

from tests.selftest.mutants import Mutant

MUTANTS = (
    Mutant(
        "UPDATE needs START",
        "launch_update",
        "if not sev.is_snp or sev.context is None:\n        refuse(errno.EINVAL)",
        "if not sev.is_snp or sev.context is None:\n        refuse(errno.ENOTTY)",
        "update.before-init2 update.before-start update.plain-vm",
    ),
    Mutant(
        "UPDATE's len is in pages",
        "launch_update",
        "if update.len % PAGE_SIZE or",
        "if",
        "update.*.len-unaligned",
    ),
    Mutant(
        "UPDATE has no flags",
        "launch_update",
        "or update.flags or",
        "or",
        "update.*.flags",
    ),
    Mutant(
        "UPDATE has no flag 15",
        "launch_update",
        "or update.flags or",
        "or update.flags & 0x7FFF or",
        "update.*.flags",
    ),
    Mutant(
        "UPDATE knows page types",
        "launch_update",
        " or not (is_vmsa or update.type in _TYPES)",
        "",
        "update.type-unknown vmsa.mainline",
    ),
    Mutant(
        "UPDATE refuses VMSA pages in mainline",
        "launch_update",
        "not (is_vmsa or update.type in _TYPES)",
        "not (is_vmsa or update.type in (1, 2, 3, 4, 5, 6))",
        "vmsa.mainline",
    ),
    Mutant(
        "UPDATE takes ZERO pages",
        "launch_update",
        "not (is_vmsa or update.type in _TYPES)",
        "not (is_vmsa or update.type in _TYPES) or update.type == 3",
        "update.zero.[!l]* update.unwritable id-block.taken golden.*",
    ),
    Mutant(
        "UPDATE takes UNMEASURED pages",
        "launch_update",
        "not (is_vmsa or update.type in _TYPES)",
        "not (is_vmsa or update.type in _TYPES) or update.type == 4",
        "update.unmeasured.[!ls]* update.unmeasured.s[!o]* "
        "update.unmeasured.source-unreadable golden.*",
    ),
    Mutant(
        "UPDATE takes SECRETS pages",
        "launch_update",
        "not (is_vmsa or update.type in _TYPES)",
        "not (is_vmsa or update.type in _TYPES) or update.type == 5",
        "update.secrets.[!ls]* update.secrets.s[!o]* update.secrets.source-unreadable golden.*",
    ),
    Mutant(
        "UPDATE takes CPUID pages",
        "launch_update",
        "not (is_vmsa or update.type in _TYPES)",
        "not (is_vmsa or update.type in _TYPES) or update.type == 6",
        "update.cpuid.[!l]*",
    ),
    Mutant(
        "a ZERO page has no source",
        "launch_update",
        "        self._source = update.uaddr if update.type != "
        "lib.KVM_SEV_SNP_PAGE_TYPE_ZERO else None",
        "        self._source = update.uaddr",
        "update.zero.source-ignored update.unwritable",
    ),
    Mutant(
        "UPDATE leaves the uaddr of ZERO pages alone",
        "launch_update",
        "    if has_source:\n        update.uaddr =",
        "    if True:\n        update.uaddr =",
        "update.zero.taken update.zero.source-ignored",
    ),
    Mutant(
        "UPDATE needs a slot",
        "launch_update",
        "if slot is None or not slot.can_be_private:\n        refuse(errno.EINVAL)",
        "if slot is None or not slot.can_be_private:\n        refuse(errno.EFAULT)",
        "update.no-slot update.slot-without-memfd update.beyond-slot",
    ),
    Mutant(
        "UPDATE needs guest_memfd",
        "launch_update",
        "if slot is None or not slot.can_be_private:",
        "if slot is None:",
        "update.slot-without-memfd",
    ),
    Mutant(
        "UPDATE ends with its slot",
        "launch_update",
        "self._npages: int = min(update.len // PAGE_SIZE, slot.end_gfn - update.gfn_start)",
        "self._npages: int = update.len // PAGE_SIZE",
        "update.slots-in-a-row",
    ),
    Mutant(
        "UPDATE tells how far it came",
        "launch_update",
        "    update.gfn_start += done\n",
        "",
        "update.*.taken update.*.partial update.beyond-slot update.slots-in-a-row",
    ),
    Mutant(
        "UPDATE tells what is left",
        "launch_update",
        "    update.len -= done * PAGE_SIZE\n",
        "",
        "update.*.taken update.*.several update.*.partial update.*.sev-fd update.*.shared "
        "update.*.source-unreadable update.*.source-unaligned update.*.twice "
        "update.cpuid.corrected update.cpuid.refused update.zero.source-ignored "
        "update.beyond-slot update.len-zero update.punched update.slots-in-a-row "
        "finish.taken finish.vcpus id-block.[!o]* r1.sync-control r11.sync",
    ),
    Mutant(
        "UPDATE writes its struct back",
        "launch_update",
        "    copy_out(user, command.data, update)",
        "    pass",
        "update.*.taken update.*.several update.*.partial update.*.sev-fd update.*.shared "
        "update.*.source-unreadable update.*.source-unaligned update.*.twice "
        "update.cpuid.corrected update.cpuid.refused update.zero.source-ignored "
        "update.beyond-slot update.len-zero update.punched update.slots-in-a-row "
        "finish.taken finish.vcpus id-block.[!o]* r1.sync-control r11.sync update.unwritable",
    ),
    Mutant(
        "a first page that fails is EIO",
        "launch_update",
        "                self._command.error = failure.status\n                refuse(errno.EIO)",
        "                self._command.error = failure.status\n"
        "                refuse(errno.EFAULT)",
        "update.*.partial update.*.sev-fd update.*.shared update.*.source-unreadable "
        "update.*.twice update.memfd-closed update.assigned-after-finish update.unwritable "
        "update.*.after-finish update.cpuid.corrected update.cpuid.refused",
    ),
    Mutant(
        "UPDATE tells the firmware code",
        "launch_update",
        "                self._command.error = failure.status\n",
        "                self._command.error = 0\n",
        "update.*.after-finish update.cpuid.refused update.cpuid.corrected",
    ),
    Mutant(
        "UPDATE clears the firmware code",
        "launch_update",
        "                self._command.error = failure.status\n",
        "                self._command.error = failure.status or self._command.error\n",
        "update.*.partial update.*.sev-fd update.*.shared update.*.source-unreadable "
        "update.*.twice update.memfd-closed update.assigned-after-finish update.unwritable",
    ),
    Mutant(
        "some pages done are success",
        "launch_update",
        "                if done:\n",
        "                if done and False:\n",
        "update.*.partial",
    ),
    Mutant(
        "UPDATE notices a closed guest_memfd",
        "launch_update",
        "if done == stop or self._slot.gmem is None:\n                    raise _PageFailed",
        "if self._slot.gmem is None:\n                    raise _PageFailed(22)",
        "update.memfd-closed",
    ),
    Mutant(
        "UPDATE needs a private GFN",
        "launch_update",
        "if not self._vm.attributes.is_private(gfn) or host",
        "if host",
        "update.*.shared update.*.partial",
    ),
    Mutant(
        "UPDATE takes a page once",
        "launch_update",
        "            raise _PageFailed\n"
        "        if not self._vm.attributes.is_private(gfn) or host.rmp.lookup(spa).assigned:",
        "            pass\n        if not self._vm.attributes.is_private(gfn):",
        "update.*.twice update.assigned-after-finish update.unwritable",
    ),
    Mutant(
        "UPDATE needs a readable source",
        "launch_update",
        "        except OSError:\n            raise _PageFailed from None\n\n    def _check_vmsa",
        "        except OSError:\n            pass\n\n    def _check_vmsa",
        "update.*.source-unreadable",
    ),
    Mutant(
        "UPDATE takes the source's bytes",
        "launch_update",
        "self._vm.host.memory.page(spa)[:] = self._vm.host.user.read(address, PAGE_SIZE)",
        "self._vm.host.user.read(address, PAGE_SIZE)",
        "update.normal.[!afl]* update.*.twice update.cpuid.refused update.beyond-slot "
        "update.len-zero update.punched update.slots-in-a-row finish.taken finish.vcpus "
        "id-block.[!o]* golden.* r1.sync-control r11.sync",
    ),
    Mutant(
        "UPDATE hides a bad sev_fd",
        "launch_update",
        "        except OSError:\n            return 0\n",
        "        except OSError:\n            return 9\n",
        "update.*.sev-fd",
    ),
    Mutant(
        "UPDATE needs a sev_fd",
        "launch_update",
        "        try:\n"
        "            host.fds.get_kind(self._command.sev_fd, SevDevice, errno.EBADF)\n"
        "        except OSError:\n"
        "            return 0\n",
        "",
        "update.*.sev-fd",
    ),
    Mutant(
        "UPDATE gives a refused page back",
        "launch_update",
        "        reclaimed = self._vm.sev.reclaim(spa)\n",
        "        reclaimed = True\n",
        "update.*.sev-fd update.cpuid.corrected update.cpuid.refused",
    ),
    Mutant(
        "a refused CPUID page comes back corrected",
        "launch_update",
        "                self._vm.host.user.write(self._source + number * PAGE_SIZE, page)",
        "                pass",
        "update.cpuid.corrected",
    ),
    Mutant(
        "firmware looks at CPUID pages",
        "firmware",
        "if page_type == PageType.CPUID and not self._cpuid_accepted(spa):",
        "if False:",
        "update.cpuid.refused",
    ),
    Mutant(
        "firmware takes pages only before FINISH",
        "firmware",
        "        if guest.state != GuestState.LAUNCH:\n"
        "            return FwStatus.INVALID_GUEST_STATE\n"
        "        if not guest.asid",
        "        if not guest.asid",
        "update.*.after-finish",
    ),
    Mutant(
        "a punched page is free again",
        "guest_memfd",
        "            self.populated.discard(index)\n        last",
        "            pass\n        last",
        "update.punched",
    ),
    Mutant(
        "UPDATE's padding doesn't count",
        "launch_update",
        "or update.flags or",
        "or update.flags or update.pad1 or",
        "update.padding",
    ),
    Mutant(
        "UPDATE that can't write its struct back is EFAULT",
        "launch_update",
        "    copy_out(user, command.data, update)",
        "    try:\n        copy_out(user, command.data, update)\n    except OSError:\n        pass",
        "update.unwritable",
    ),
    Mutant(
        "UPDATE advances the source",
        "launch_update",
        "        update.uaddr = update.uaddr + done * PAGE_SIZE &",
        "        update.uaddr = update.uaddr &",
        "update.normal.taken update.unmeasured.taken update.secrets.taken update.cpuid.taken",
    ),
    Mutant(
        "partial progress tells no cause",
        "launch_update",
        "                if done:\n",
        "                if done:\n                    self._command.error = failure.status\n",
        "update.*.partial",
    ),
)
