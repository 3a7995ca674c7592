"""Debian's packages of a mainline 6.12 kernel, unpacked and never installed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests import debian
from tests.debian import Unavailable

_SERIES = "6.12"
# Not the cloud and rt flavours, which lack SEV or differ.
_FLAVOUR = f"{_SERIES}.*[0-9]-amd64"


@dataclass(frozen=True)
class KernelPackages:
    """A kernel of the distribution.

    Attribute ``release``: as uname tells it (``6.12.117+deb12-amd64``). A property fetches
    what it needs, and raises Unavailable where that can't be had.
    """

    release: str

    @classmethod
    def newest(cls) -> KernelPackages:
        """The newest kernel of which both image and headers are out. Raises Unavailable."""
        images = {
            name.removeprefix("linux-image-") for name in debian.known(f"linux-image-{_FLAVOUR}")
        }
        headers = debian.known(f"linux-headers-{_FLAVOUR}")
        releases = [name.removeprefix("linux-headers-") for name in headers]
        whole = [release for release in releases if release in images]
        if not whole:
            raise Unavailable(f"apt knows no {_SERIES} kernel with both image and headers")
        return cls(whole[-1])

    @property
    def _version(self) -> str:
        return self.release.removesuffix("-amd64")

    @cached_property
    def _headers_root(self) -> Path:
        # Together, since they refer to one another by relative links.
        return debian.unpacked(
            f"linux-headers-{self.release}",
            f"linux-headers-{self._version}-common",
            f"linux-kbuild-{self._version}",
        )

    @property
    def common_headers(self) -> Path:
        """The kernel's own headers (``include/uapi/linux/kvm.h`` and so on)."""
        return self._headers_root / f"usr/src/linux-headers-{self._version}-common"

    @property
    def build_tree(self) -> Path:
        """Where ``make`` builds modules for this kernel."""
        return self._headers_root / f"usr/src/linux-headers-{self.release}"

    @cached_property
    def image(self) -> Path:
        """The unpacked kernel image: ``boot/vmlinuz-*`` and ``lib/modules``."""
        return debian.unpacked(f"linux-image-{self.release}")

    @cached_property
    def source(self) -> Path:
        """The tarball of the sources that this kernel was built from."""
        package = f"linux-source-{_SERIES}"
        upstream = self.release.split("+")[0]
        for version in debian.versions(package):
            if version.startswith(f"{upstream}-"):
                return debian.unpacked(f"{package}={version}") / f"usr/src/{package}.tar.xz"
        raise Unavailable(f"apt knows no package {package} of version {upstream}")
