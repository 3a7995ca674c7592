"""Kernel profiles against the table of kernel-snp-abi section 10, typed from there."""

from __future__ import annotations

import dataclasses

import pytest

from kvmlaunch.errors import FormatError
from kvmlaunch.sim.profiles import KERNEL_PROFILES, KernelProfile, kernel_profile

# topic -> (6.12.117, 6.18, 7.0)
TABLE = {
    "policy_smt_optional": (False, True, True),
    "policy_single_socket_allowed": (False, True, True),
    "policy_mask": (0x1BFFFF, 0x1BFFFF, 0x3FBFFFF),
    "policy_bits_attr": (False, False, True),
    "update_zero_length": (True, False, False),
    "update_aligned_source": (False, False, True),
    "update_prepared_check": (True, True, False),
    "init2_ghcb_v1": (True, False, False),
    "vmsa_features": (0x20, 0x220, 0x220),
    "finish_locks_vcpus": (False, True, True),
    "finish_refuses_encrypted_vmsa": (True, True, True),
    "vm_tsc_khz_after_vcpu": (True, False, False),
    "guest_memfd_flags": (0, 3, 3),
    "guest_memfd_flags_private": (0, 1, 1),
    "guest_memfd_on_default_vm": (False, True, True),
    "req_certs": (False, False, True),
}


@pytest.mark.parametrize("topic", TABLE)
def test_profile_field_is_that_of_the_table(topic):
    profiles = (kernel_profile(name) for name in ("6.12", "6.18", "7.0"))
    assert tuple(getattr(profile, topic) for profile in profiles) == TABLE[topic]


def test_profile_6_12_is_the_release_that_was_read():
    assert kernel_profile("6.12").release == "6.12.117"


@pytest.mark.parametrize("name", ["", "6.11", "6.12 ", "vmsa"])
def test_unknown_profile_names_the_known_ones(name):
    with pytest.raises(FormatError, match=r"known are 6\.12, 6\.18, 7\.0"):
        kernel_profile(name)


def test_profile_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        kernel_profile("6.12").name = "x"  # type: ignore[misc]


def test_profiles_when_keyed_have_their_own_name():
    assert all(name == profile.name == str(profile) for name, profile in KERNEL_PROFILES.items())


def test_every_profile_field_is_documented():
    doc = KernelProfile.__doc__ or ""
    missing = [f.name for f in dataclasses.fields(KernelProfile) if f"{f.name}:" not in doc]
    assert missing == []
