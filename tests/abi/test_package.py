"""What must hold for every module of kvmlaunch.abi."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvmlaunch.abi

MODULES = sorted(m.name for m in pkgutil.iter_modules(kvmlaunch.abi.__path__))


@pytest.mark.parametrize("name", MODULES)
def test_all_names_every_public_name(name: str) -> None:
    module = importlib.import_module(f"kvmlaunch.abi.{name}")
    own = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }
    assert own <= set(module.__all__)
    assert all(hasattr(module, key) for key in module.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_imports_are_stdlib_errors_and_siblings(name: str) -> None:
    """Inside a function, where it is paid for by who uses it, also cryptography; or for types."""
    source = Path(kvmlaunch.abi.__path__[0], f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    later = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) or _typing(node)]
    lazy = {n for node in later for n in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {a.name.split(".")[0] for a in node.names} <= sys.stdlib_module_names
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            top = node.module.split(".")[0]
            if top == "cryptography":
                assert node in lazy
                continue
            assert node.module == "kvmlaunch.errors" or top in sys.stdlib_module_names


def _typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def test_package_import_loads_no_module_of_its_own() -> None:
    code = (
        "import sys, kvmlaunch.abi;"
        "print([m for m in sys.modules if m.startswith('kvmlaunch.abi.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
