"""What several test files share and that is no fixture; fixtures are in the conftest.py files."""

import pytest

pytest.register_assert_rewrite("tests.helpers.training")  # a failing assert shows its values, as in a test file
