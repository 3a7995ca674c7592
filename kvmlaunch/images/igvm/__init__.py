"""IGVM files: parsed, planned, built."""

from kvmlaunch.images.igvm.plan import load

__all__ = ["load"]
