"""Long fault tests: many trials of each fault, with a table at the end. `make test-faults` runs them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

TABLE = pytest.StashKey[dict[str, list[float]]]()


class FaultTable:
    """Counts the trials of each fault. A trial that fails does not stop the others; the test fails at its end."""

    def __init__(self, table: dict[str, list[float]]) -> None:
        self.table, self.failures = table, []

    @contextmanager
    def trial(self, fault: str) -> Iterator[None]:
        """One injected fault. It is passed when the block ends without an exception."""
        row = self.table.setdefault(fault, [0, 0, 0.0])
        start = time.monotonic()
        row[0] += 1
        try:
            yield
            row[1] += 1
        except Exception as error:
            self.failures.append(f"{fault}, trial {row[0]}: {type(error).__name__}: {error}")
        finally:
            row[2] += time.monotonic() - start


@pytest.fixture
def fault_table(pytestconfig) -> Iterator[FaultTable]:
    """Where a test counts its trials."""
    faults = FaultTable(pytestconfig.stash.setdefault(TABLE, {}))
    yield faults
    assert not faults.failures, "\n\n".join(faults.failures)


def pytest_terminal_summary(terminalreporter, config) -> None:
    table = config.stash.get(TABLE, {})
    if not table:
        return
    terminalreporter.section("faults")
    width = max(map(len, table))
    terminalreporter.line(f"{'fault':<{width}}  tried  passed  seconds")
    for fault, (tried, passed, seconds) in table.items():
        terminalreporter.line(f"{fault:<{width}}  {tried:5.0f}  {passed:6.0f}  {seconds:7.0f}")
