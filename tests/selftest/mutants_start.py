"""Rules of KVM_MEMORY_ENCRYPT_OP itself, INIT2 and START, each broken once."""

from __future__ import annotations

from tests.selftest.mutants import Mutant

MUTANTS = (
    Mutant(
        "NULL is a probe",
        "sev",
        "    if not arg:\n        return 0\n",
        "    pass\n",
        "command.null",
    ),
    Mutant(
        "SEV commands on an SNP guest are EPERM",
        "sev",
        "if vm.sev.is_snp and command.id < lib.KVM_SEV_SNP_LAUNCH_START:",
        "if False:",
        "command.legacy-after-init2 init2.twice",
    ),
    Mutant(
        "unknown commands are EINVAL",
        "sev",
        "if handler is None:\n        refuse(errno.EINVAL)",
        "if handler is None:\n        refuse(errno.ENOTTY)",
        "command.unknown",
    ),
    Mutant(
        "the command goes back to the caller",
        "sev",
        "        copy_out(user, arg, command)\n    return 0",
        "        pass\n    return 0",
        "command.unwritable start.policy-abi update.*.twice update.*.shared update.*.partial "
        "update.*.sev-fd update.*.source-unreadable update.*.after-finish "
        "update.cpuid.refused update.cpuid.corrected update.unwritable update.memfd-closed "
        "finish.twice id-block.digest id-block.policy id-block.signature id-block.algorithm "
        "id-block.author-key r1.sync-control",
    ),
    Mutant(
        "a struct that can't be read is EFAULT",
        "uaccess",
        "    ffi.buffer(value)[:] = user.read(address, ffi.sizeof(value[0]))\n",
        "    try:\n"
        "        ffi.buffer(value)[:] = user.read(address, ffi.sizeof(value[0]))\n"
        "    except OSError:\n"
        "        refuse(errno.EIO)\n",
        "command.unreadable init2.unreadable start.unreadable update.unreadable finish.unreadable",
    ),
    Mutant(
        "SEV_INIT on an SNP VM is EINVAL",
        "sev",
        "refuse(errno.EINVAL if vm.is_snp_type else errno.ENOTTY)",
        "refuse(errno.ENOTTY)",
        "command.legacy-before-init2",
    ),
    Mutant(
        "commands of SEV guests are ENOTTY",
        "sev",
        'nobody is here."""\n    refuse(errno.ENOTTY)',
        'nobody is here."""\n    refuse(errno.EPERM)',
        "command.legacy-before-init2",
    ),
    Mutant(
        "INIT2 needs a VM for SNP",
        "sev",
        "if not sev.need_init or not vm.is_snp_type:",
        "if sev.active:",
        "init2.plain-vm",
    ),
    Mutant(
        "INIT2 comes before vCPUs",
        "sev",
        "if vm.vcpus or init.flags or",
        "if init.flags or",
        "init2.after-vcpu",
    ),
    Mutant(
        "INIT2 has no flags",
        "sev",
        "or init.flags or init.vmsa",
        "or init.vmsa",
        "init2.flags",
    ),
    Mutant(
        "INIT2 has no flag 31",
        "sev",
        "or init.flags or init.vmsa",
        "or init.flags & 0x7FFFFFFF or init.vmsa",
        "init2.flags",
    ),
    Mutant(
        "INIT2 takes offered features only",
        "sev",
        "or init.vmsa_features & ~profile.vmsa_features",
        "",
        "init2.features-refused",
    ),
    Mutant(
        "INIT2 refuses SNP_ACTIVE",
        "sev",
        "init.vmsa_features & ~profile.vmsa_features",
        "init.vmsa_features & ~profile.vmsa_features & ~1",
        "init2.features-refused",
    ),
    Mutant(
        "INIT2 takes offered features",
        "sev",
        "init.vmsa_features & ~profile.vmsa_features",
        "init.vmsa_features",
        "init2.features-taken golden.*debug-swap",
    ),
    Mutant(
        "INIT2 has GHCB versions up to 2",
        "sev",
        "if init.ghcb_version > _GHCB_VERSION_MAX:",
        "if init.ghcb_version > 3:",
        "init2.ghcb-version",
    ),
    Mutant(
        "INIT2 takes GHCB version 2",
        "sev",
        "if init.ghcb_version > _GHCB_VERSION_MAX:",
        "if init.ghcb_version > 1:",
        "init2.ghcb-version",
    ),
    Mutant(
        "a VMSA has INIT2's features",
        "sev",
        "init.vmsa_features | _SNP_ACTIVE",
        "_SNP_ACTIVE",
        "golden.*debug-swap",
    ),
    Mutant(
        "INIT2 answers GHCB version 1 as some kernel does",
        "sev",
        "if init.ghcb_version == 1 and not profile.init2_ghcb_v1:\n        refuse(errno.EINVAL)",
        "if init.ghcb_version == 1:\n        refuse(errno.EPERM)",
        "init2.ghcb-version-1",
    ),
    Mutant(
        "START needs INIT2",
        "sev",
        "if not sev.is_snp:\n        refuse(errno.ENOTTY)\n    start",
        "if not sev.is_snp:\n        refuse(errno.EINVAL)\n    start",
        "start.before-init2 start.plain-vm",
    ),
    Mutant(
        "START comes once",
        "sev",
        "    if sev.context is not None:\n        refuse(errno.EINVAL)",
        "    if sev.context is not None:\n        refuse(errno.EEXIST)",
        "start.twice start.after-finish",
    ),
    Mutant(
        "START has no flags",
        "sev",
        "if start.flags or not",
        "if not",
        "start.flags",
    ),
    Mutant(
        "START knows the policy's bits",
        "sev",
        "if policy & ~mask or not",
        "if not",
        "start.policy-reserved start.policy-not-offered",
    ),
    Mutant(
        "START takes bits 21 to 25 only as offered",
        "sev",
        "    if policy & ~mask",
        "    mask |= 0x1F << 21\n    if policy & ~mask",
        "start.policy-not-offered",
    ),
    Mutant(
        "START refuses the migration agent",
        "sev",
        "    if policy & ~mask",
        "    mask |= 1 << 18\n    if policy & ~mask",
        "start.policy-reserved",
    ),
    Mutant(
        "START takes DEBUG",
        "sev",
        "    if policy & ~mask",
        "    mask &= ~(1 << 19)\n    if policy & ~mask",
        "start.debug",
    ),
    Mutant(
        "START needs bit 17",
        "sev",
        "or not policy & _POLICY_MBO",
        "",
        "start.policy-must-be-one",
    ),
    Mutant(
        "START refuses a bad sev_fd by ENOTTY",
        "sev",
        "if context is None:\n        refuse(errno.ENOTTY)",
        "if context is None:\n        refuse(errno.EBADF)",
        "start.sev-fd",
    ),
    Mutant(
        "a refused START leaves no context",
        "sev",
        "    except OSError:\n        sev.decommission()\n        raise",
        "    except OSError:\n        raise",
        "start.policy-abi",
    ),
    Mutant(
        "firmware refuses an ABI of the future",
        "launch_policy",
        "        or wanted_abi > (profile.api_major, profile.api_minor)\n",
        "",
        "start.policy-abi",
    ),
    Mutant(
        "START answers a policy without SMT as some kernel does",
        "sev",
        "and not profile.policy_smt_optional:\n        return False",
        "and not profile.policy_smt_optional:\n        refuse(errno.EPERM)",
        "start.policy-smt",
    ),
    Mutant(
        "START answers a policy for one socket as some kernel does",
        "sev",
        "    return not policy & _POLICY_SINGLE_SOCKET or profile.policy_single_socket_allowed",
        "    if policy & _POLICY_SINGLE_SOCKET:\n        refuse(errno.EPERM)\n    return True",
        "start.policy-single-socket",
    ),
)
