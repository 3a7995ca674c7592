"""Mainline KVM's own SNP code as witness: Debian's 6.12 kernel, emulated, over fakes.

``python -m tests.mainline`` (``tox -e mainline``) does all of it: packages, module, boot, tests.
"""
