"""What the machine allows."""

import resource

import pytest

from distillation.run import machine


@pytest.mark.parametrize(
    ("before", "most", "after"),
    [
        ((1024, 4096), 4096, (4096, 4096)),
        ((1024, 2**20), 2**20, (machine.OPEN_FILES, 2**20)),
        ((2**18, 2**20), 2**20, (2**18, 2**20)),  # never lowered
        ((256, resource.RLIM_INFINITY), 2**20, (machine.OPEN_FILES, resource.RLIM_INFINITY)),
        ((256, resource.RLIM_INFINITY), 10240, (10240, resource.RLIM_INFINITY)),  # macOS
    ],
)
def test_open_files_are_as_many_as_the_system_allows(before, most, after, monkeypatch):
    """`most` is what the system lets the soft limit be, whatever its hard limit says."""
    limits = {resource.RLIMIT_NOFILE: before}

    def setrlimit(which, values):
        if values[0] > most:
            raise ValueError("current limit exceeds maximum limit")
        limits[which] = values

    monkeypatch.setattr(resource, "getrlimit", limits.get)
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    machine.allow_open_files()
    assert limits[resource.RLIMIT_NOFILE] == after
