"""What ``import kvmlaunch`` gives, what each module exports, and that objects print."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import kvmlaunch
from kvmlaunch.abi.page import PageType
from kvmlaunch.images import MemoryRegion
from kvmlaunch.kvm import HostMemory, exits
from kvmlaunch.launch.guest import WitnessReport
from kvmlaunch.launch.measure import Predictor
from kvmlaunch.launch.run import Outcome
from kvmlaunch.platforms import open_platform
from kvmlaunch.uapi import RealPlatform, Recorder, lib
from tests.launch.rig import PAGE, plan, small_plan, step

ROOT = Path(kvmlaunch.__path__[0])
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(kvmlaunch.__path__, "kvmlaunch.")
    if not module.name.endswith((".__main__", "._ext", "._hooks"))
)
MINE = [name for name in MODULES if name.startswith(("kvmlaunch.snp.", "kvmlaunch.launch."))]


# The package


def test_all_when_read_is_sorted() -> None:
    assert kvmlaunch.__all__ == sorted(kvmlaunch.__all__)


def test_all_when_read_has_no_name_twice() -> None:
    assert len(kvmlaunch.__all__) == len(set(kvmlaunch.__all__))


def test_all_when_compared_with_what_type_checkers_see_is_complete() -> None:
    tree = ast.parse(Path(kvmlaunch.__file__).read_text(encoding="utf-8"))
    (checked,) = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    seen = {
        alias.name
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(kvmlaunch.__all__) == seen | {"__version__"}


@pytest.mark.parametrize("name", kvmlaunch.__all__)
def test_name_when_asked_for_is_there(name: str) -> None:
    assert getattr(kvmlaunch, name) is not None


@pytest.mark.parametrize("name", kvmlaunch.__all__)
def test_name_when_asked_for_is_in_dir(name: str) -> None:
    assert name in dir(kvmlaunch)


@pytest.mark.parametrize("name", [n for n in kvmlaunch.__all__ if n != "__version__"])
def test_name_when_asked_for_has_a_docstring(name: str) -> None:
    assert getattr(kvmlaunch, name).__doc__


def test_name_when_unknown_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        kvmlaunch.nonsense  # noqa: B018


def test_star_import_when_done_gives_exactly_all() -> None:
    code = """
before = {*dir(), "before"}
from kvmlaunch import *
print(sorted(set(dir()) - before))
"""
    assert ast.literal_eval(python(code)) == sorted(kvmlaunch.__all__)


# Modules


def exported(module: Any) -> list[str]:
    names: list[str] = module.__all__
    return names


@pytest.mark.parametrize("name", MODULES)
def test_module_when_it_has_an_all_has_every_name_in_it(name: str) -> None:
    module = importlib.import_module(name)
    assert [key for key in getattr(module, "__all__", []) if not hasattr(module, key)] == []


def sort_key(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then the rest, each by the alphabet (as ruff's RUF022)."""
    if name.isupper():
        return 0, name
    return (1 if name[0].isupper() else 2), name


@pytest.mark.parametrize("name", MODULES)
def test_module_when_it_has_an_all_has_it_sorted(name: str) -> None:
    names = getattr(importlib.import_module(name), "__all__", [])
    assert list(names) == sorted(names, key=sort_key)


@pytest.mark.parametrize("name", [*MINE, "kvmlaunch.platforms"])
def test_module_when_it_defines_a_public_name_exports_it(name: str) -> None:
    module = importlib.import_module(name)
    own = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and getattr(value, "__module__", None) == name
    }
    assert own <= set(exported(module))


# Without the extension

BLOCKED = """
import importlib.abc
import sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "kvmlaunch.uapi._ext" or name.startswith("_cffi") or name == "cffi":
            raise ImportError(f"{name} is blocked")
        return None

sys.meta_path.insert(0, Blocker())
"""


def python(code: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_blocker_when_in_place_keeps_the_extension_away() -> None:
    code = """
try:
    import kvmlaunch.uapi
except ImportError as error:
    print(error)
"""
    assert python(BLOCKED + code) == "kvmlaunch.uapi._ext is blocked"


def test_import_when_the_extension_is_missing_works() -> None:
    assert python(BLOCKED + "import kvmlaunch; print(kvmlaunch.__version__)")


def test_measure_when_the_extension_is_missing_gives_the_same_digest(tmp_path: Path) -> None:
    image = tmp_path / "image.bin"
    image.write_bytes(bytes(range(256)) * 64)
    code = "import kvmlaunch; print(kvmlaunch.measure(kvmlaunch.load_image(sys.argv[1])))"
    expected = str(kvmlaunch.measure(kvmlaunch.load_image(image)))
    assert python(BLOCKED + code, str(image)) == expected


def test_page_records_when_the_extension_is_missing_work(tmp_path: Path) -> None:
    image = tmp_path / "image.bin"
    image.write_bytes(bytes(4096))
    code = """
import kvmlaunch
records = list(kvmlaunch.page_records(kvmlaunch.load_image(sys.argv[1])))
print(len(records), records[0].gpa, records[0].contents.hex()[:16])
"""
    # SHA-384 of a zero page begins c0e59a3e3ffbd3b5 (snp-firmware-abi 1.4).
    assert python(BLOCKED + code, str(image)) == "2 4096 c0e59a3e3ffbd3b5"


def test_import_when_nothing_is_used_yet_loads_no_extension() -> None:
    code = "import sys, kvmlaunch; print('kvmlaunch.uapi._ext' in sys.modules)"
    assert python(code) == "False"


# repr and str


@contextmanager
def objects() -> Iterator[dict[str, Any]]:
    """One of each public class, in use."""
    platform = kvmlaunch.SimPlatform()
    with kvmlaunch.Guest(small_plan(), platform) as guest:
        new = guest.state
        guest.start()
        started = guest.state
        records = list(guest.update())
        guest.finish()
        memory = HostMemory(platform, PAGE)
        yield {
            "Guest": guest,
            "New": new,
            "Started": started,
            "Finished": guest.state,
            "Kvm": guest.kvm,
            "Vm": guest.vm,
            "Vcpu": guest.vcpus[0],
            "SevDevice": guest.sev,
            "GuestMemfd": guest._backing[0].memfd,
            "HostMemory": memory,
            "LaunchPlan": guest.plan,
            "PageRange": guest.plan.steps[0],
            "Piece": guest.plan.steps[0].pieces[0],
            "MemoryRegion": MemoryRegion(0, PAGE, "ram"),
            "Vmsa": guest.plan.vcpus[0],
            "PageRecord": records[0],
            "Measurement": kvmlaunch.measure(guest.plan),
            "Predictor": Predictor(),
            "Explanation": kvmlaunch.Explanation(None, 7, False, ("the image's bytes",)),
            "Cause": kvmlaunch.Cause("vCPUs", "2", "1", option="--vcpus 2"),
            "PlanOptions": kvmlaunch.PlanOptions(),
            "LegacyLaunch": kvmlaunch.plan_legacy(bytes(PAGE), "sev"),
            "VmmProfile": kvmlaunch.load_vmm("ec2"),
            "SimPlatform": platform,
            "Trace": kvmlaunch.Trace(["exits"], print),
            "Proposal": kvmlaunch.Proposal(),
            "VmsaChoice": kvmlaunch.VmsaChoice(),
            "VmsaMode": kvmlaunch.VmsaMode.SYNC,
            "RealPlatform": RealPlatform(),
            "Recorder": Recorder(platform, print),
            "Choice": open_platform("sim"),
            "WitnessReport": guest.witness(),
            "undecided WitnessReport": WitnessReport(None, 1, None),
            "Outcome": Outcome("halted", True, "the guest halted", 0, exits.HltExit()),
            "Outcome without a vCPU": Outcome("timeout", False, "too late"),
            "empty plan": plan([]),
            "one step": step(0, [None], PageType.ZERO),
            "KvmLaunchError": kvmlaunch.KvmLaunchError("text"),
            "IdBlock": kvmlaunch.IdBlock(bytes(48)),
            "Signer": kvmlaunch.Signer.generate(),
            "Oracle": kvmlaunch.Oracle(platform),
            "signing Oracle": kvmlaunch.Oracle(platform, id_key=kvmlaunch.Signer.generate()),
        }
        memory.close()


NAMES = [
    *["Guest", "New", "Started", "Finished", "Kvm", "Vm", "Vcpu", "SevDevice", "GuestMemfd"],
    *["HostMemory", "LaunchPlan", "PageRange", "Piece", "MemoryRegion", "Vmsa", "PageRecord"],
    *["Measurement", "Predictor", "PlanOptions", "SimPlatform", "RealPlatform", "Recorder"],
    *["Trace", "Proposal", "VmsaChoice", "VmsaMode", "LegacyLaunch", "VmmProfile"],
    *["Choice", "WitnessReport", "undecided WitnessReport", "Outcome", "Outcome without a vCPU"],
    *["empty plan", "one step", "KvmLaunchError", "Explanation", "Cause"],
    *["IdBlock", "Signer", "Oracle", "signing Oracle"],
]


def test_objects_when_listed_are_all_tried() -> None:
    with objects() as found:
        assert sorted(found) == sorted(NAMES)


def test_objects_when_listed_have_every_public_class() -> None:
    classes = {name for name in kvmlaunch.__all__ if isinstance(getattr(kvmlaunch, name), type)}
    assert classes <= set(NAMES)


@pytest.mark.parametrize("way", [repr, str])
@pytest.mark.parametrize("name", NAMES)
def test_object_when_in_use_prints(name: str, way: Callable[[Any], str]) -> None:
    with objects() as found:
        assert way(found[name])


@pytest.mark.parametrize("way", [repr, str])
@pytest.mark.parametrize("name", NAMES)
def test_object_when_its_guest_is_closed_still_prints(name: str, way: Callable[[Any], str]) -> None:
    with objects() as found:
        kept = found[name]
    assert way(kept)


@pytest.mark.parametrize("name", NAMES)
def test_repr_when_shown_is_short(name: str) -> None:
    """No image bytes: a REPL shows it after each line."""
    with objects() as found:
        assert len(repr(found[name])) < 4000


EXITS = [name for name in exits.__all__ if isinstance(getattr(exits, name), type)]


@pytest.mark.parametrize("name", EXITS)
def test_exit_when_made_prints(name: str) -> None:
    kind = getattr(exits, name)
    samples: dict[str, Any] = {
        "DebugExit": (1, 0x1000, 0),
        "FailEntryExit": (0, 0),
        "HypercallExit": (lib.KVM_HC_MAP_GPA_RANGE, (0, 0, 0)),
        "InternalErrorExit": (1, (), b""),
        "IoExit": (0x80, 1, 1, True, b"x"),
        "MemoryFaultExit": (0, 0, False, 14),
        "MmioExit": (0, 4, True, b"1234"),
        "ReqCertsExit": (0x1000, 1),
        "SystemEventExit": (6, (0x100,)),
        "UnknownExit": (999,),
    }
    made = kind(*samples.get(name, ()))
    assert repr(made).startswith(name)
    assert name == "Exit" or str(made)
