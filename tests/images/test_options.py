"""PlanOptions: what makes no sense is refused with a sentence."""

from __future__ import annotations

from typing import Any

import pytest

from kvmlaunch.errors import FormatError
from kvmlaunch.images import PlanOptions


def test_options_when_nothing_chosen_are_those_of_a_small_snp_guest() -> None:
    options = PlanOptions()
    assert (options.vcpus, options.policy, options.features) == (1, None, 1)
    assert (options.signature, options.confidential, options.cbitpos) == (0x800F12, True, None)
    assert [(r.gpa, r.size) for r in options.ram()] == [(0, 256 << 20)]


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"image_type": "coff"}, "unknown image type 'coff', known are auto, flat, elf, ovmf"),
        ({"vcpus": 0}, "a guest needs at least one vCPU"),
        ({"vcpus": 4097}, "a guest has at most 4096 vCPUs, not 4097"),
        ({"author_key_enabled": True}, "an author key is part of the ID authentication"),
        ({"memory": 0}, "guest memory of 0 bytes is not a positive number of 4 KiB pages"),
        ({"memory": -4096}, "memory of -4096 bytes is not a positive number of 4 KiB pages"),
        ({"memory": 4097}, "guest memory of 4097 bytes is not a positive number of 4 KiB pages"),
        ({"memory": 8 << 30, "cbitpos": 32}, "beyond the C-bit (bit 32)"),
        ({"cbitpos": 31}, "the C-bit is one of the address bits 32 to 63, not 31"),
        ({"cbitpos": 64}, "the C-bit is one of the address bits 32 to 63, not 64"),
        (
            {"sev_features": 0x20, "vmsa_mode": "direct"},
            "SEV features 0x20 lack bit 0 (SNP active), which every SNP guest has",
        ),
        ({"initrd": b""}, "an initrd goes with a kernel, and there is none"),
        ({"append": ""}, "a kernel command line goes with a kernel, and there is none"),
        (
            {"kernel": b"", "svsm": b"", "vars_size": 0},
            "an SVSM is launched without kernel hashes",
        ),
        (
            {"svsm": b"", "vars_size": 0, "firmware_digest": bytes(48)},
            "the firmware's digest can't be given for a launch with an SVSM",
        ),
        ({"svsm": b""}, "an SVSM and the size of the variable store between it and OVMF go"),
        ({"vars_size": 0}, "an SVSM and the size of the variable store between it and OVMF go"),
        (
            {"svsm": b"", "vars_size": 100},
            "a variable store of 100 bytes is not a number of 4 KiB pages",
        ),
        (
            {"compat": "virtee"},
            "unknown tool 'virtee' to be compatible with, known are sev-snp-measure",
        ),
        ({"sev_features": 1 | 1 << 64}, "doesn't fit into 64 bits"),
        ({"policy": -1}, "the policy -0x1 doesn't fit into 64 bits"),
        ({"signature": 1 << 32}, "the CPU signature 0x100000000 doesn't fit into 32 bits"),
        ({"load_addr": -1}, "the load address -0x1 doesn't fit into 64 bits"),
        ({"entry": 1 << 64}, "the entry point 0x10000000000000000 doesn't fit into 64 bits"),
        ({"host_data": b"x"}, "host data is 32 bytes, not 1"),
        ({"id_block": bytes(95), "id_auth": bytes(4096)}, "an ID block is 96 bytes, not 95"),
        ({"id_block": bytes(96), "id_auth": b""}, "ID authentication is 4096 bytes, not 0"),
        ({"id_block": bytes(96)}, "an ID block and its ID authentication are given together"),
    ],
)
def test_options_when_senseless_are_refused(choice: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FormatError) as caught:
        PlanOptions(**choice)
    assert sentence in str(caught.value)


def test_sev_features_when_not_confidential_may_be_zero() -> None:
    assert PlanOptions(sev_features=0, confidential=False).c_bit == 0


def test_ram_when_beyond_3_gib_continues_at_4_gib() -> None:
    ram = PlanOptions(memory=4 << 30).ram()
    assert [(r.gpa, r.size) for r in ram] == [(0, 3 << 30), (4 << 30, 1 << 30)]
