"""The firmware's launch digest against the known answers and against the prediction."""

from __future__ import annotations

import ast
import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.abi import reset
from kvmlaunch.abi.digest import LaunchDigest
from kvmlaunch.sim import measurement
from kvmlaunch.sim.measurement import Measurement
from tests.abi import vectors

ZEROS = bytes(4096)


def extend(chain: Measurement, page_type: int, gpa: int, page: bytes | None) -> bytes:
    return chain.extend(page_type, gpa, ZEROS if page is None else page)


def test_value_of_a_new_measurement_is_zeros() -> None:
    assert Measurement().value == bytes(48)


@pytest.mark.parametrize("name", vectors.SINGLE_PAGE)
def test_extend_one_page_gives_the_vector(name: str) -> None:
    page_type, gpa, page, digest = vectors.SINGLE_PAGE[name]
    chain = Measurement()
    extend(chain, page_type, gpa, page)
    assert chain.value.hex() == digest


def test_extend_vmsa_takes_tsc_fields_as_zero() -> None:
    """V9 is what tools say, who hash the page as given; firmware says something else."""
    chain = Measurement()
    contents = extend(chain, 2, vectors.VMSA_GPA, vectors.COUNTING)
    assert contents.hex() == vectors.V9_FIRMWARE_CONTENTS
    assert chain.value.hex() == vectors.V9_FIRMWARE
    assert chain.value.hex() != vectors.V9_AS_GIVEN


def test_extend_v12_step_by_step_gives_the_vectors() -> None:
    chain = Measurement()
    for page_type, pages, digest in vectors.V12_STEPS.values():
        for gpa, page in pages:
            extend(chain, page_type, gpa, page)
        assert chain.value.hex() == digest


@pytest.mark.parametrize("name", vectors.IMI_AND_VMPL)
def test_extend_with_imi_or_permissions_gives_the_vector(name: str) -> None:
    imi_page, vmpl_perms, digest = vectors.IMI_AND_VMPL[name]
    chain = Measurement()
    chain.extend(1, 0, ZEROS, imi_page=imi_page, vmpl_perms=vmpl_perms)
    assert chain.value.hex() == digest


@pytest.mark.parametrize("name", vectors.RANGES)
def test_extend_a_range_gives_the_vector(name: str) -> None:
    page_type, gpa, pages, digest = vectors.RANGES[name]
    chain = Measurement()
    for at, page in enumerate(pages):
        extend(chain, page_type, gpa + 4096 * at, page)
    assert chain.value.hex() == digest


def test_extend_v20_minimal_guest_gives_the_vectors() -> None:
    chain = Measurement()
    for page_type, gpa, page, digest in vectors.V20_PAGES:
        extend(chain, page_type, gpa, page)
        assert chain.value.hex() == digest
    eip, signature, features, _ = vectors.QEMU_VMSAS["milan_bsp"]
    vmsa = reset.qemu_reset(eip, signature=signature, sev_features=features).encode()
    extend(chain, 2, vectors.VMSA_GPA, vmsa)
    assert chain.value.hex() == vectors.V20_WITH_VMSA


@pytest.mark.parametrize("page", vectors.PAGE_HASHES)
def test_extend_returns_contents_of_a_normal_page(page: bytes) -> None:
    assert Measurement().extend(1, 0, memoryview(page)).hex() == vectors.PAGE_HASHES[page]


@pytest.mark.parametrize("page_type", [3, 4, 5, 6])
def test_extend_unmeasured_types_returns_zeros(page_type: int) -> None:
    assert Measurement().extend(page_type, 0, vectors.ONES) == bytes(48)


perms = st.tuples(*[st.integers(0, 0xFF)] * 3)
steps = st.lists(
    st.tuples(
        st.integers(1, 6),
        st.integers(0, (1 << 52) - 1).map(lambda gfn: gfn << 12),
        st.binary(min_size=1, max_size=64).map(lambda seed: (seed * 4096)[:4096]),
        st.booleans(),
        perms,
    ),
    max_size=12,
)


@given(steps)
def test_extend_any_sequence_agrees_with_the_prediction(
    sequence: list[tuple[int, int, bytes, bool, tuple[int, int, int]]],
) -> None:
    firmware, prediction = Measurement(), LaunchDigest()
    for page_type, gpa, page, imi_page, vmpl_perms in sequence:
        theirs = firmware.extend(page_type, gpa, page, imi_page=imi_page, vmpl_perms=vmpl_perms)
        ours = prediction.update(page_type, gpa, page, imi_page=imi_page, vmpl_perms=vmpl_perms)
        assert theirs == ours
        assert firmware.value == prediction.value


def test_measurement_imports_nothing_of_the_prediction() -> None:
    tree = ast.parse(inspect.getsource(measurement))
    imported = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name for n in imported if isinstance(n, ast.Import) for a in n.names}
    names |= {str(n.module) for n in imported if isinstance(n, ast.ImportFrom)}
    assert names == {"__future__", "hashlib", "collections.abc"}


def test_repr_shows_the_digest() -> None:
    assert repr(Measurement()) == f"<Measurement {'00' * 48}>"
