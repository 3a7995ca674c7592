"""Help: every command and every option of the design that exists says what it does."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator

import pytest

from kvmlaunch.cli.parser import make_parser
from kvmlaunch.version import __version__
from tests.cli.command import Cli, spawn

# Design, section 6.
IMAGE_OPTIONS = [
    *("--ovmf", "--igvm", "--kernel", "--initrd", "--append"),
    *("--vcpus", "--vcpu-type", "--vcpu-sig", "--vcpu-family", "--vcpu-model", "--vcpu-stepping"),
    *("--vmm-type", "--guest-features"),
    *("--image-type", "--load-addr", "--entry", "--memory"),
]
VMSA_OPTIONS = ["--vmsa-mode", "--vmsa", "--vmsa-gpa", "--set-vmsa", "--force"]
LAUNCH_OPTIONS = ["--policy", "--host-data", "--id-block", "--id-auth", *VMSA_OPTIONS]
OPTIONS = {
    "measure": [*IMAGE_OPTIONS, *LAUNCH_OPTIONS, "--output-format", "--log"],
    "inspect": [*IMAGE_OPTIONS, *LAUNCH_OPTIONS, "--json"],
    "run": [
        *(*IMAGE_OPTIONS, *LAUNCH_OPTIONS, "--log"),
        *("--vm-type", "--platform", "--sim", "--timeout", "--ioctls"),
        *("--proposal-cap", "--allow-digest-change"),
        *("--id-key", "--author-key", "--vcek-disabled"),
    ],
    "selftest": [
        *("--list", "--filter", "--json", "--platform", "--sim", "--proposal-cap", "--risky"),
    ],
    "verify": [*IMAGE_OPTIONS, "--policy", "--log", "--platform", "--sim", "--id-key", "--json"],
    "bisect": [*IMAGE_OPTIONS, "--policy", "--log", "--platform", "--sim", "--id-key", "--json"],
    "sim": ["--sim", "--fault", "--log", "--ioctls"],
}
EXIT_CODES = {"0", "1", "2", "4", "124", "130"}


def actions(command: str) -> Iterator[argparse.Action]:
    """Every option and argument of a command."""
    for action in make_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices[command]._actions


@pytest.mark.parametrize(
    ("command", "option"),
    [(name, option) for name, options in OPTIONS.items() for option in options],
)
def test_option_of_the_design_has_a_help_line(cli: Cli, command: str, option: str) -> None:
    lines = cli(command, "--help").out.splitlines()
    assert any(re.match(rf"  {option}\b", line) for line in lines)


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_says_what_it_does(command: str) -> None:
    silent = [action.dest for action in actions(command) if not action.help]
    assert silent == []


def test_help_lists_every_command(cli: Cli) -> None:
    out = cli("--help").out
    assert [name for name in OPTIONS if re.search(rf"^    {name} ", out, re.MULTILINE)] == [
        *OPTIONS
    ]


def test_help_lists_every_exit_code(cli: Cli) -> None:
    epilog = cli("--help").out.split("exit codes:")[1]
    assert set(re.findall(r"^  (\d+)", epilog, re.MULTILINE)) == EXIT_CODES


@pytest.mark.parametrize("command", ["", *OPTIONS])
def test_help_ends_well_on_stdout(cli: Cli, command: str) -> None:
    done = cli(*filter(None, [command]), "--help")
    assert (done.code, done.err) == (0, "")


def test_version_is_the_packages(cli: Cli) -> None:
    assert cli("--version").out == f"kvmlaunch {__version__}\n"


def test_no_command_is_a_usage_error(cli: Cli) -> None:
    done = cli()
    assert (done.code, done.out) == (2, "")


def test_unknown_command_is_a_usage_error(cli: Cli) -> None:
    done = cli("lunch")
    assert (done.code, done.out) == (2, "")


def test_help_in_a_poor_encoding_is_printed() -> None:
    done = spawn("run", "--help", env={**os.environ, "PYTHONIOENCODING": "ascii:strict"})
    assert done.code == 0


ID_BLOCK = {
    "keygen": ["--encrypt", "--passphrase-file", "--force"],
    "create": [
        *(*IMAGE_OPTIONS, "--policy", "--digest", "--log", "--id-key", "--id-key-passphrase"),
        *("--author-key", "--author-key-passphrase", "--family-id", "--image-id", "--guest-svn"),
        *("--out-dir", "--output-format"),
    ],
    "show": ["--json"],
    "verify": [
        *(*IMAGE_OPTIONS, "--policy", "--digest", "--id-block", "--id-auth", "--platform", "--sim"),
        *("--id-key-digest", "--author-key-digest", "--json"),
    ],
}


@pytest.mark.parametrize("action", ID_BLOCK)
def test_every_option_of_id_block_says_what_it_does(cli: Cli, action: str) -> None:
    done = cli("id-block", action, "--help")
    assert (done.code, done.err) == (0, "")
    for option in ID_BLOCK[action]:
        assert re.search(rf"^  {option}\b", done.out, re.MULTILINE), option
    (parsers,) = (a for a in actions("id-block") if isinstance(a, argparse._SubParsersAction))
    silent = [a.dest for a in parsers.choices[action]._actions if not a.help]
    assert silent == []


def test_id_block_without_an_action_is_2(cli: Cli) -> None:
    done = cli("id-block")
    assert (done.code, done.out) == (2, "")
