"""Rules of FINISH and of the vCPUs around it, each broken once."""

from __future__ import annotations

from tests.selftest.mutants import Mutant

MUTANTS = (
    Mutant(
        "FINISH needs INIT2",
        "launch_finish",
        "    if not sev.is_snp:\n        refuse(errno.ENOTTY)",
        "    if not sev.is_snp:\n        refuse(errno.EINVAL)",
        "finish.before-init2 finish.plain-vm",
    ),
    Mutant(
        "FINISH needs START",
        "launch_finish",
        "    if sev.context is None:\n        refuse(errno.EINVAL)\n    context",
        "    if sev.context is None:\n        refuse(errno.ENOTTY)\n    context",
        "finish.before-start",
    ),
    Mutant(
        "FINISH has no flags",
        "launch_finish",
        "    if finish.flags:\n        refuse(errno.EINVAL)\n",
        "",
        "finish.flags",
    ),
    Mutant(
        "FINISH looks at flags before it begins",
        "launch_finish",
        "    if finish.flags:\n        refuse(errno.EINVAL)\n    _settle_vmsas(vm, command)\n",
        "    _settle_vmsas(vm, command)\n    if finish.flags:\n        refuse(errno.EINVAL)\n",
        "finish.flags",
    ),
    Mutant(
        "FINISH measures VMSAs",
        "launch_finish",
        "        _encrypt_vmsa(vcpu, command)",
        "        vcpu.protected = True",
        "finish.creation-order finish.dr7 finish.guest-debug finish.sev-fd "
        "finish.twice-with-vcpus finish.vcpus golden.* id-block.vcpus r1.sync-control r11.sync",
    ),
    Mutant(
        "FINISH measures VMSAs in the order of creation",
        "launch_finish",
        "    for vcpu in vm.vcpus:\n        _encrypt_vmsa",
        "    for vcpu in sorted(vm.vcpus, key=lambda vcpu: vcpu.id):\n        _encrypt_vmsa",
        "finish.creation-order",
    ),
    Mutant(
        "FINISH measures every vCPU",
        "launch_finish",
        "    for vcpu in vm.vcpus:\n        _encrypt_vmsa",
        "    for vcpu in vm.vcpus[:1]:\n        _encrypt_vmsa",
        "finish.creation-order finish.vcpus golden.*-2* golden.*-4 id-block.vcpus r1.sync-control",
    ),
    Mutant(
        "FINISH measures VMSAs at one GPA",
        "launch_finish",
        "host.rmp.make_private(spa, INITIAL_VMSA_GPA, sev",
        "host.rmp.make_private(spa, INITIAL_VMSA_GPA - 4096 * vcpu.id, sev",
        "finish.creation-order finish.vcpus golden.*-2* golden.*-4 id-block.vcpus r1.sync-control",
    ),
    Mutant(
        "FINISH refuses an encrypted VMSA",
        "launch_finish",
        "if vcpu.protected and host.profile.finish_refuses_encrypted_vmsa:",
        "if False:",
        "finish.twice-with-vcpus",
    ),
    Mutant(
        "FINISH refuses a debugged vCPU",
        "launch_finish",
        "if vcpu.debug.control or vcpu.state.dr7",
        "if vcpu.state.dr7",
        "finish.guest-debug",
    ),
    Mutant(
        "FINISH refuses breakpoints",
        "launch_finish",
        "if vcpu.debug.control or vcpu.state.dr7 & ~_DR7_FIXED:",
        "if vcpu.debug.control:",
        "finish.dr7",
    ),
    Mutant(
        "FINISH refuses a bad sev_fd by EBADF",
        "launch_finish",
        "host.fds.get_kind(command.sev_fd, SevDevice, errno.EBADF)",
        "host.fds.get_kind(command.sev_fd, SevDevice, errno.ENOTTY)",
        "finish.sev-fd",
    ),
    Mutant(
        "a refused FINISH gives the VMSA back",
        "launch_finish",
        "        sev.reclaim(spa)\n        raise",
        "        raise",
        "finish.sev-fd",
    ),
    Mutant(
        "FINISH ends by the sev_fd of START",
        "launch_finish",
        "    sev.issue(\n        sev.fd,",
        "    sev.issue(\n        command.sev_fd,",
        "finish.sev-fd-of-start",
    ),
    Mutant(
        "FINISH protects the vCPUs",
        "launch_finish",
        "        raise\n    vcpu.protected = True",
        "        raise\n    vcpu.protected = False",
        "finish.twice-with-vcpus vcpu.registers-after-finish r11.sync",
    ),
    Mutant(
        "an ID block counts only if enabled",
        "launch_finish",
        "    if finish.id_block_en:",
        "    if finish.id_block_en or finish.id_block_uaddr:",
        "id-block.off",
    ),
    Mutant(
        "an enabled ID block counts",
        "launch_finish",
        "    if finish.id_block_en:",
        "    if False:",
        "id-block.algorithm id-block.author-key id-block.digest id-block.pointers "
        "id-block.policy id-block.signature r1.sync-control",
    ),
    Mutant(
        "a missing blob is EINVAL",
        "launch_finish",
        "    if not address:\n        refuse(errno.EINVAL)",
        "    if not address:\n        refuse(errno.EFAULT)",
        "id-block.pointers",
    ),
    Mutant(
        "an author key counts only if enabled",
        "launch_finish",
        "auth_key_en=bool(finish.id_block_en and finish.auth_key_en)",
        "auth_key_en=bool(finish.id_block_en)",
        "finish.creation-order golden.* id-block.[aptsvd][!u]* id-block.author-key-off "
        "r1.sync-control",
    ),
    Mutant(
        "an enabled author key counts",
        "launch_finish",
        "auth_key_en=bool(finish.id_block_en and finish.auth_key_en)",
        "auth_key_en=False",
        "id-block.author-key",
    ),
    Mutant(
        "without ID block the author key doesn't count",
        "launch_finish",
        "auth_key_en=bool(finish.id_block_en and finish.auth_key_en)",
        "auth_key_en=bool(finish.auth_key_en)",
        "id-block.off",
    ),
    Mutant(
        "firmware compares the digest",
        "id_block_check",
        "    if block.ld != digest:\n        return FwStatus.BAD_MEASUREMENT\n",
        "",
        "id-block.digest r1.sync-control",
    ),
    Mutant(
        "firmware compares all of the digest",
        "id_block_check",
        "block.ld != digest",
        "block.ld[:25] != digest[:25]",
        "id-block.digest",
    ),
    Mutant(
        "firmware compares the policy",
        "id_block_check",
        "    if block.policy != policy:\n        return FwStatus.POLICY_FAILURE\n",
        "",
        "id-block.policy",
    ),
    Mutant(
        "firmware knows key algorithms",
        "id_block_check",
        '    if any(int.from_bytes(a, "little") != ALGO_ECDSA_P384_SHA384 for a in '
        "algorithms):\n"
        "        return FwStatus.INVALID_PARAM\n",
        "",
        "id-block.algorithm",
    ),
    Mutant(
        "firmware verifies the ID block",
        "id_block_check",
        "if not verify(id_auth[ID_KEY], id_auth[_ID_BLOCK_SIG], id_block):",
        "if False:",
        "id-block.signature",
    ),
    Mutant(
        "firmware verifies the ID key",
        "id_block_check",
        "if auth_key_en and not verify(",
        "if auth_key_en and False and not verify(",
        "id-block.author-key",
    ),
    Mutant(
        "firmware ends a launch once",
        "firmware",
        "        if guest.state != GuestState.LAUNCH or guest.imi_en:\n            return",
        "        if guest.imi_en:\n            return",
        "finish.twice",
    ),
    Mutant(
        "registers of a protected vCPU are hidden",
        "vcpu_ioctls",
        "    if vcpu.protected:\n        refuse(errno.EINVAL)",
        "    if False:\n        refuse(errno.EINVAL)",
        "vcpu.registers-after-finish",
    ),
    Mutant(
        "FINISH takes VCEK_DISABLED",
        "launch_finish",
        "    if finish.flags:",
        "    if finish.flags or finish.vcek_disabled:",
        "finish.host-data",
    ),
    Mutant(
        "a vCPU doesn't run before INIT2",
        "vcpu_run",
        "        if vm.sev.need_init:",
        "        if False:",
        "vcpu.run-before-init2",
    ),
    Mutant(
        "a vCPU without a VMSA is KVM_EXIT_FAIL_ENTRY",
        "exits",
        "run.exit_reason = lib.KVM_EXIT_FAIL_ENTRY",
        "run.exit_reason = lib.KVM_EXIT_SHUTDOWN",
        "vcpu.run-before-finish",
    ),
    Mutant(
        "FINISH's padding doesn't count",
        "launch_finish",
        "    if finish.flags:",
        "    if finish.flags or any(finish.pad1):",
        "finish.padding",
    ),
    Mutant(
        "an unreadable blob is EFAULT",
        "launch_finish",
        "    return user.read(address, size)",
        "    try:\n"
        "        return user.read(address, size)\n"
        "    except OSError:\n"
        "        refuse(errno.EINVAL)",
        "id-block.pointers",
    ),
)
