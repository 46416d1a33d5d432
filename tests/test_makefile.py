"""Which Python `make` takes, and what it says when there is none: a real make, with stand-ins for Python."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from utils import ROOT

TOOLS = ("cksum", "cut", "touch", "mkdir", "cp", "cat")
# It writes down how it was called; `-m venv` makes an environment whose Python is a copy of it.
STAND_IN = """#!/bin/sh
echo "NAME $*" >> "LOG"
case "$1 $2" in "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;; esac
"""
# As a shim of pyenv for a version that is installed and not chosen.
BROKEN = "#!/bin/sh\necho 'NAME: command not found' >&2; exit 127\n"
# It runs what `-c` gives it, and says that it is 3.9.
OLD = f"""#!/bin/sh
case "$1" in -c) exec {sys.executable} -c 'import sys; sys.version_info = (3, 9, 1); exec(sys.argv[1])' "$2" ;; esac
"""
pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder with what `make lint` needs, and `bin/` for its PATH: no Python in it yet."""
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    return tmp_path


def put(path: Path, script: str = STAND_IN, *, name: str = "") -> None:
    """A stand-in for Python, named as its file unless `name` is given; it writes into the checkout's `log`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = next(folder / "log" for folder in path.parents if (folder / "Makefile").exists())
    path.write_text(script.replace("NAME", name or path.name).replace("LOG", str(log)), encoding="utf-8")
    path.chmod(0o755)


def make(checkout: Path, *more: str, **variables: str) -> subprocess.CompletedProcess:
    env = {"PATH": str(checkout / "bin"), **variables}
    return subprocess.run([shutil.which("make"), "lint", *more], cwd=checkout, env=env, capture_output=True, text=True)


def calls(checkout: Path, text: str) -> list[str]:
    """Who was called with this text in the command line."""
    log = (checkout / "log").read_text(encoding="utf-8")
    return [line.split()[0] for line in log.splitlines() if text in line]


def test_the_newest_that_runs_is_taken_and_a_second_call_installs_nothing(checkout):
    put(checkout / "bin/python3.11")
    put(checkout / "bin/python3.12")
    put(checkout / "bin/python3.13", BROKEN)
    for _ in range(2):
        done = make(checkout)
        assert done.returncode == 0 and "not found" not in done.stderr
    assert calls(checkout, "-m venv .venv") == ["python3.12"]
    assert calls(checkout, "-m pip install") == ["python3.12"] and len(calls(checkout, "-m ruff check")) == 2


@pytest.mark.parametrize(("more", "variables"), [(("PYTHON=mine",), {}), ((), {"PYTHON": "mine"})])
def test_the_one_that_is_named_wins(checkout, more, variables):
    put(checkout / "bin/python3.13")
    put(checkout / "bin/mine")
    assert make(checkout, *more, **variables).returncode == 0
    assert calls(checkout, "-m venv") == calls(checkout, "-m pip install") == ["mine"]


def test_what_is_missing_is_said(checkout):
    done = make(checkout)
    assert done.returncode == 2 and not (checkout / ".venv").exists()
    first, *_ = done.stderr.splitlines()
    assert first.startswith("error: no Python found that runs: looked for python3.13 python3.12 python3.11.")
    assert "make PYTHON=/path/to/python" in first
    done = make(checkout, "PYTHON=absent")
    assert done.returncode == 2 and "absent" in done.stderr


def test_an_environment_of_another_version_is_kept(checkout):
    """Also when it lacks a library that requirements.txt names by now."""
    put(checkout / ".venv/bin/python", name="the one before")
    put(checkout / "bin/python3.13")
    assert make(checkout).returncode == 0
    (checkout / "requirements.txt").write_text("more\n", encoding="utf-8")
    assert make(checkout).returncode == 0
    assert not calls(checkout, "-m venv") and calls(checkout, "-m pip install") == ["the", "the"]


def test_an_environment_that_is_too_old_is_named(checkout):
    put(checkout / ".venv/bin/python", OLD)
    done = make(checkout)
    assert done.returncode == 2 and "-m pip install" not in done.stdout
    assert done.stderr.startswith(
        "error: .venv has Python 3.9, which is too old: 3.11 to 3.13 are needed. Call: make clean"
    )


def test_a_real_environment(checkout):
    (checkout / "requirements.txt").write_text("# nothing\n", encoding="utf-8")
    done = make(checkout, f"PYTHON={sys.executable}")
    assert (checkout / ".venv/bin/python").exists() and list((checkout / ".venv").glob(".installed-*"))
    assert done.returncode == 2 and "No module named ruff" in done.stderr  # nothing was to be installed
