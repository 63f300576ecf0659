"""Attacks on the sandbox. This folder is a package here, and lies as plain files inside.

Each is first made bare, where it must succeed, and then inside, where it may not. See `run.py`.
"""

from __future__ import annotations

from . import bombs, devices, files, kernel, mounts, network, processes, programs, shared
from .calls import APART, ATTACKS, DEPENDS

KINDS = (files, shared, mounts, programs, processes, network, devices, kernel, bombs)

__all__ = ["APART", "ATTACKS", "DEPENDS", "KINDS"]
