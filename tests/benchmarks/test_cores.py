"""The flag of benchmarks that restrict what they measure to some cores, also where the system cannot do that."""

import pytest

from benchmarks import cost, prepare
from tests.helpers.system import hide_affinity
from utils import available_cores


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("benchmark", [cost, prepare])
def test_no_more_cores_than_there_are(benchmark, hidden, monkeypatch, capsys):
    if hidden:
        hide_affinity(monkeypatch)
    n = len(available_cores())
    assert benchmark.parse_args(["--cores", str(n)]).cores == n
    for wrong, message in ((0, "--cores: 0: give at least 1"), (n + 1, f"--cores {n + 1}: this machine has {n}")):
        with pytest.raises(SystemExit):
            benchmark.parse_args(["--cores", str(wrong)])
        assert message in capsys.readouterr().err
