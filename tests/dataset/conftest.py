"""Fixtures for the tests of the data set."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def own_world(world, tmp_path) -> Path:
    """A copy of the small world that a test may damage."""
    shutil.copytree(world, tmp_path / "world")
    return tmp_path / "world"
