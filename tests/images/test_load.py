"""load_image and sniff: which loader takes a file, and how failures name it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmlaunch import images
from kvmlaunch.errors import FormatError, ImageError
from kvmlaunch.images import ImageSource, PlanOptions, load_image, sniff
from tests.images.builders import Seg, elf64, ovmf

BZIMAGE = bytes(0x1FE) + b"\x55\xaa" + b"\xeb\x66HdrS" + bytes(512)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"IGVM" + bytes(100), "igvm"),
        (BZIMAGE, "linux"),
        (b"MZ" + BZIMAGE[2:], "linux"),
        (elf64([Seg(0x100000, b"x")]), "elf"),
        (b"\x7fELF" + ovmf()[4:], "elf"),
        (ovmf(), "ovmf"),
        (ovmf()[:-1], "flat"),
        (bytes(0x28) + b"_FVH" + bytes(4052), "ovmf"),  # as OVMF_VARS begins
        (b"\xf4", "flat"),
        (bytes(0x1FE) + b"\x55\xaa", "flat"),
    ],
)
def test_sniff_when_format_is_known_names_it(data: bytes, kind: str) -> None:
    assert sniff(ImageSource.of(data)) == kind


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (BZIMAGE, "Linux kernels (bzImage) can't be launched yet"),
        (b"", "the image is empty"),
    ],
)
def test_load_when_format_has_no_loader_is_refused(data: bytes, sentence: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(data)
    assert str(caught.value) == f"<bytes>: {sentence}"


@pytest.mark.parametrize(
    ("data", "kind"),
    [(elf64([Seg(0x100000, b"x")]), "elf"), (ovmf(), "ovmf"), (b"\xf4", "flat")],
)
def test_load_when_auto_uses_what_the_file_is(data: bytes, kind: str) -> None:
    assert load_image(data).image_type == kind


def test_load_when_type_is_flat_takes_any_file() -> None:
    plan = load_image(elf64([Seg(0x100000, b"x")]), PlanOptions(image_type="flat"))
    assert plan.image_type == "flat"


def test_load_when_type_is_elf_but_file_is_not_is_refused() -> None:
    with pytest.raises(ImageError, match="not an ELF file: it doesn't begin with 7f 45 4c 46"):
        load_image(b"\xf4" * 100, PlanOptions(image_type="elf"))


def test_load_when_type_is_ovmf_but_file_is_not_is_refused() -> None:
    with pytest.raises(ImageError, match="no GUIDed table"):
        load_image(bytes(4096), PlanOptions(image_type="ovmf"))


def test_load_when_plan_breaks_a_rule_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "big.bin"
    path.write_bytes(b"x")
    with pytest.raises(ImageError) as caught:
        load_image(path, PlanOptions(load_addr=1 << 52))
    assert str(caught.value) == (
        f"{path}: image at GPA 0x10000000000000 ends beyond the 52 physical address bits of x86-64"
    )
    assert isinstance(caught.value.__cause__, FormatError)


def test_load_when_file_is_missing_names_it() -> None:
    with pytest.raises(ImageError, match=r"^/nonexistent: can't be read: No such file"):
        load_image("/nonexistent")


def test_load_when_given_a_path_keeps_it_and_shortens_origins(tmp_path: Path) -> None:
    path = tmp_path / "guest.bin"
    path.write_bytes(b"\xf4")
    plan = load_image(path)
    assert plan.image == str(path)
    assert plan.steps[0].origin_of(0) == "guest.bin+0x0"


def test_plan_when_loaded_holds_the_options() -> None:
    options = PlanOptions(
        policy=0xB0000,
        host_data=b"h" * 32,
        id_block=b"i" * 96,
        id_auth=b"a" * 4096,
        sev_features=0x21,
        vcpus=3,
    )
    plan = load_image(b"\xf4", options)
    assert (plan.policy, plan.host_data, plan.sev_features) == (0xB0000, b"h" * 32, 0x21)
    assert (plan.id_block, plan.id_auth) == (b"i" * 96, b"a" * 4096)
    assert [vcpu.sev_features for vcpu in plan.vcpus] == [0x21] * 3


def test_plan_without_bindings_takes_none_later() -> None:
    with pytest.raises(TypeError):
        load_image(b"\xf4").bindings[0] = 0x1000  # type: ignore[index]
    assert not load_image(b"\xf4").bindings


def test_exports_are_sorted_and_exist() -> None:
    assert images.__all__ == sorted(images.__all__, key=lambda name: (name.islower(), name))
    assert all(hasattr(images, name) for name in images.__all__)


def test_open_image_when_a_stream_has_no_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmlaunch.images.source._STREAM_LIMIT", 1 << 20)
    with pytest.raises(ImageError, match="/dev/zero: more than 1 MiB from what isn't a regular"):
        load_image("/dev/zero")
