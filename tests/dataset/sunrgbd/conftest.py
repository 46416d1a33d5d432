"""Fixtures for the tests of frames and annotations."""

from functools import partial

import pytest

from tests.helpers.annotations import write_frame


@pytest.fixture
def make_frame(tmp_path):
    """`write_frame` into the test's own folder."""
    return partial(write_frame, tmp_path)
