"""What processes share: folders that one works in at a time, and the cores."""

import argparse
import errno
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import utils
from dataset.inputs.pictures import OTHER_CODE
from tests.helpers.system import hide_affinity
from utils import (
    ROOT,
    UserError,
    announced,
    at_least,
    atomic_path,
    available_cores,
    check_writable,
    core_shares,
    fraction,
    locked,
    machine,
    peak_memory,
    positive,
    remove_leftovers,
    run_script,
    share,
    source_digest,
    use_cores,
)

HOLD = (
    "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import utils\n"
    "with utils.locked(pathlib.Path(sys.argv[2])): print('in')"
)


def test_one_process_at_a_time_and_who_waits_says_so(tmp_path):
    with locked(tmp_path):
        other = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(ROOT), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert other.stderr.readline() == f"waiting for another process that is at work in {tmp_path}\n"
        assert other.poll() is None
    out, err = other.communicate(timeout=60)
    assert (out, err, other.returncode) == ("in\n", "", 0)


def test_all_may_share_a_folder(tmp_path, capsys):
    with locked(tmp_path, shared=True), locked(tmp_path, shared=True):
        pass
    assert capsys.readouterr().err == ""


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr(utils.os, "sched_getaffinity", lambda pid: {7, 3, 5, 11, 9}, raising=False)
    assert core_shares(1) == [[3, 5, 7, 9, 11]]
    assert core_shares(2) == [[3, 7, 11], [5, 9]]
    assert core_shares(7) == [[3], [5], [7], [9], [11], [3], [5]]


def test_this_machine_gives_everybody_a_core():
    own = available_cores()
    assert sorted(core for share in core_shares(len(own)) for core in share) == own


def test_a_source_digest_covers_code_and_tables_and_nothing_that_was_made(tmp_path):
    """A new, changed, renamed or moved source is another digest; models, worlds and bytecode are the same one."""
    (tmp_path / "inner" / "models").mkdir(parents=True)
    for name in ("a.py", "table.json", "inner/b.py"):
        (tmp_path / name).write_text(name)
    seen = {source_digest(tmp_path)}
    assert (
        source_digest(tmp_path, subfolders=False) not in seen and source_digest(tmp_path, without=["b.py"]) not in seen
    )
    (tmp_path / "inner" / "models" / "config.json").write_text("{}")
    (tmp_path / "inner" / "weights.safetensors").write_text("0")
    (tmp_path / "world" / "SUNRGBD").mkdir(parents=True)
    (tmp_path / "world" / "questions.json").write_text("{}")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_text("0")
    assert source_digest(tmp_path) in seen
    changes = [
        lambda: (tmp_path / "inner" / "split_off.py").write_text(""),
        lambda: (tmp_path / "table.json").write_text("[]"),
        lambda: (tmp_path / "inner" / "b.py").rename(tmp_path / "inner" / "c.py"),
        lambda: (tmp_path / "a.py").rename(tmp_path / "inner" / "a.py"),
    ]
    for number, change in enumerate(changes, 2):
        (tmp_path / "stays.py").write_text("")
        change()
        seen.add(source_digest(tmp_path))
        assert len(seen) == number


def test_the_digest_of_this_repository_reads_no_model_and_no_world(monkeypatch):
    read = []
    monkeypatch.setattr(utils, "sha256", lambda path: read.append(path.relative_to(ROOT).as_posix()) or "0")
    source_digest(ROOT / "dataset")
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "dataset"], capture_output=True, text=True, check=True)
    code = [name for name in tracked.stdout.split() if name.endswith((".py", ".xz", "/nouns.json"))]
    assert set(code) <= set(read) and not [name for name in read if "/student/" in name or "/world/" in name]


@pytest.mark.parametrize(
    ("module", "folders", "left_out"),
    [("inputs.pictures", {"inputs", "sunrgbd"}, OTHER_CODE), ("miniature.world", {"miniature", "sunrgbd"}, ())],
)
def test_a_key_covers_what_its_module_imports(module, folders, left_out):
    """Whatever it uses, directly or by way of others, is in one of the folders that its key digests."""
    code = (
        f"import sys, dataset.{module}\n"
        "print(*(m.__file__ for name, m in sys.modules.items() if name.startswith('dataset.') and m.__file__))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    own = {Path(name).relative_to(ROOT / "dataset") for name in done.stdout.split()}
    assert Path("sunrgbd/depth.py") in own and {path.parts[0] for path in own} <= folders
    assert not {path.name for path in own} & set(left_out)
    assert set(left_out) <= {path.name for path in (ROOT / "dataset" / "sunrgbd").iterdir()}


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """What a quota does, for everybody and without a small disk: a file ends at a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_tensors(part):
    torch.save({"w": torch.zeros(10_000)}, part)


def save_safetensors(part):
    save_file({"w": torch.zeros(10_000)}, part)


def save_picture(part):
    Image.effect_noise((200, 200), 50).save(part, format="PNG")


@pytest.mark.parametrize(
    "write", [save_tensors, save_safetensors, save_picture, lambda part: part.write_bytes(bytes(40_000))]
)
def test_a_full_disk_is_one_line_whoever_writes(tmp_path, write):
    """And the file of before stays, without litter."""
    path = tmp_path / "file"
    path.write_text("good")
    with files_of_at_most(8000), pytest.raises(UserError) as raised, atomic_path(path, size=40_000) as part:
        write(part)
    said = str(raised.value)
    assert said.startswith(f"{path}: not written, ") and "; 40 kB needed, " in said and "free; make room" in said
    assert path.read_text() == "good" and [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "deeper", tmp_path / "file"):
        with pytest.raises(UserError, match=f"--output: cannot write into {place}, "):
            check_writable(place, "--output")
        with pytest.raises(UserError, match=f"{place}.*: cannot be used, "), atomic_path(place / "a"):
            pass
    check_writable(tmp_path / "new" / "folder", "--output")
    with pytest.raises(UserError, match="name too long"):
        check_writable(tmp_path / ("x" * 300), "--output")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), PermissionError(errno.EACCES, "no", "/some/file")])
def test_no_script_ends_with_a_traceback_of_the_disk(capsys, error):
    def main(args):
        thread = threading.Thread(target=fail)  # as TensorBoard writes
        thread.start()
        thread.join()
        fail()

    def fail():
        raise error

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(threading, "excepthook", threading.__excepthook__)  # what the script sets is undone
        run_script(main, lambda: None)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith(f"error: {error.filename or 'a file'}: ")


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    """Those of this machine, by the next write into the folder; a live process's after a day: its number was reused."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    parts = {name: tmp_path / f".a.{name}.part" for name in (f"{dead.pid}-{machine()}", f"{os.getppid()}-{machine()}")}
    gone, reused = parts.values()
    others = [tmp_path / name for name in (".a.part", f".a.{dead.pid}-elsewhere.part", f"a.{dead.pid}.part")]
    for path in (gone, *others):
        path.write_text("")
    reused.mkdir()  # as an export
    with atomic_path(tmp_path / "a") as part:
        part.write_text("")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a", reused, *others])
    os.utime(reused, (0, 0))
    remove_leftovers.cache_clear()
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a", *others])


def test_only_a_long_job_is_announced(capsys):
    with announced("fitting", after_s=30):
        pass
    assert capsys.readouterr().err == ""
    with announced("fitting", after_s=0.01):
        time.sleep(0.3)
    assert capsys.readouterr().err == "fitting ...\n"


def test_a_system_that_cannot_restrict_cores_uses_them_all(monkeypatch):
    hide_affinity(monkeypatch)
    monkeypatch.setattr(utils.os, "cpu_count", lambda: 4)
    assert core_shares(2) == [[0, 2], [1, 3]]
    use_cores([0])  # nothing to do, and no error


def test_peak_memory_is_in_bytes_whatever_the_system_counts_in(monkeypatch):
    assert 2**24 < peak_memory() < 2**37  # Python with its libraries, and no machine's memory
    monkeypatch.setattr(utils.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3))
    for system, expected in (("linux", 3072), ("darwin", 3)):
        monkeypatch.setattr(utils.sys, "platform", system)
        assert peak_memory() == expected


@pytest.mark.parametrize(
    ("flag", "given", "expected"),
    [("--n", "3", 3), ("--rate", "1e-4", 1e-4), ("--rate", "0", 0.0), ("--warmup", "0.5", 0.5), ("--part", "1", 1.0)],
)
def test_flags_in_their_range_are_taken(flag, given, expected):
    value = getattr(number_flags().parse_args([flag, given]), flag.strip("-"))
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("flag", "given", "message"),
    [
        ("--n", "0", "argument --n: 0: give at least 1"),
        ("--n", "1.5", "argument --n: '1.5' is not a whole number"),
        ("--rate", "-1e-4", "argument --rate: -1e-4: give at least 0"),
        ("--rate", "nan", "argument --rate: nan: give at least 0"),
        ("--rate", "fast", "argument --rate: 'fast' is not a number"),
        ("--warmup", "1", "argument --warmup: 1: give at least 0 and less than 1"),
        ("--temperature", "0", "argument --temperature: 0: give a finite number above 0"),
        ("--temperature", "inf", "argument --temperature: inf: give a finite number above 0"),
        ("--rate", "inf", "argument --rate: inf: give at least 0 and less than inf"),
        ("--alpha", "1", "argument --alpha: 1: give a number above 0 and below 1"),
        ("--part", "0", "argument --part: 0: give a share above 0 and at most 1"),
        ("--part", "nan", "argument --part: nan: give a share above 0 and at most 1"),
        ("--part", "half", "argument --part: 'half' is not a number"),
    ],
)
def test_flags_out_of_their_range_are_named(capsys, flag, given, message):
    with pytest.raises(SystemExit) as error:
        number_flags().parse_args([f"{flag}={given}"])
    assert error.value.code == 2 and message in capsys.readouterr().err


def number_flags():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=at_least(1))
    parser.add_argument("--rate", type=at_least(0.0))
    parser.add_argument("--warmup", type=at_least(0.0, below=1.0))
    parser.add_argument("--part", type=share)
    parser.add_argument("--temperature", type=positive)
    parser.add_argument("--alpha", type=fraction)
    return parser


def test_only_what_steers_a_terminal_is_escaped():
    plain = "Tür 椅子 стул كرسي 👩‍🏫 a|b <c>"
    assert utils.printable(plain) == plain
    assert utils.printable("a\x1b[31m\x9b\u202e\n\udcff") == "a\\x1b[31m\\x9b\\u202e\\n\\udcff"


def test_a_users_error_is_one_short_line_without_escapes():
    code = """from utils import UserError, run_script
def main(args): raise UserError("a\\x1b[2J\\n" + "x" * 10_000)
run_script(main, lambda: None)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: a\\x1b[2J xxx")
    assert done.stderr.count("\n") == 1 and len(done.stderr) < 2100


@pytest.mark.parametrize("error", [ValueError("pass trust_remote_code"), RuntimeError("or without weights_only")])
def test_advice_to_switch_safety_off_is_not_passed_on(error):
    assert utils.reason(error) == type(error).__name__


@pytest.mark.parametrize("text", ["{", "[]", "7", "[" * 100_000, "\xff"])
def test_json_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="a.json: (not valid JSON|holds a JSON)"):
        utils.read_json(tmp_path / "a.json")
