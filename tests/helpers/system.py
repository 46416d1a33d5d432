"""Systems other than this one: what macOS lacks can be hidden, and tests of what it cannot do are left out there."""

import os

import pytest

from utils import ROOT

# A script that prints the cores it may use and its command line.
SAY_CORES = f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from utils import available_cores
print(available_cores(), sys.argv[1:])
"""

needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system cannot restrict a process to some cores"
)


def hide_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS: `os` knows nothing of the cores that a process may use."""
    for name in ("sched_getaffinity", "sched_setaffinity"):
        monkeypatch.delattr(os, name, raising=False)
