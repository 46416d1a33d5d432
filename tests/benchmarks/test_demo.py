"""The demo's command lines, its processes, and how it ends when a step fails or a signal stops it."""

import os
import signal
import subprocess
import sys
import time

import pytest

import utils
from benchmarks import demo, processes
from benchmarks.demo import CONTROL, SYSTEMS, chains, comparison, ladders
from benchmarks.processes import Task, run_side_by_side
from tests.helpers.system import SAY_CORES, needs_affinity
from utils import ROOT, UserError, available_cores, load_script


def script_task(path, title, code, *flags, log=None):
    """A task whose script, beside `path`, has this code."""
    script = path / f"{title}.py"
    script.write_text(code, encoding="utf-8")
    return Task(title, (str(script), *flags), log)


def test_every_command_is_one_that_its_script_takes(tmp_path):
    tasks = [task for chain in chains("run", tmp_path) for task in chain]
    climbs, together = ladders("run", tmp_path)
    for task in (*tasks, *(task for chain in climbs for task in chain), together, comparison(tmp_path)):
        load_script(task.command[0]).parse_args(list(task.command[1:]))
    scored = [task.command[task.command.index("--name") + 1] for task in tasks if "--name" in task.command]
    assert sorted(scored) == sorted(SYSTEMS) and CONTROL in SYSTEMS


@needs_affinity
def test_steps_are_pinned_and_say_who_they_are(tmp_path, monkeypatch, capfd):
    core, before = available_cores()[-1], available_cores()
    monkeypatch.setattr(processes, "core_shares", lambda n: [[core]])
    task = script_task(tmp_path, "who", SAY_CORES, "--a", "b c")
    run_side_by_side([[task]], 1)
    assert available_cores() == before
    out = capfd.readouterr().out
    assert f"[who] [{core}] ['--a', 'b c']" in out
    assert f'[who] python {task.command[0]} --a "b c"' in out and "[who] took 0:0" in out


def test_chains_run_side_by_side_and_their_tasks_one_after_the_other(tmp_path):
    """Each of the two waits for the other: in turn they would wait for ever. What follows finds what the first made."""
    meet = (
        "import pathlib, sys, time\nown, other = map(pathlib.Path, sys.argv[1:]); own.touch()\n"
        "while not other.exists(): time.sleep(0.05)"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    after = script_task(tmp_path, "after", f"open({a!r}).close(); open({str(tmp_path / 'compared')!r}, 'w')")
    run_side_by_side(
        [[script_task(tmp_path, "first", meet, a, b), after], [script_task(tmp_path, "second", meet, b, a)]], 2
    )
    assert (tmp_path / "compared").exists()


def test_a_failing_step_is_named_and_stops_the_others(tmp_path, monkeypatch, capfd):
    started, start, children = time.monotonic(), processes.start_process, []
    monkeypatch.setattr(processes, "start_process", lambda task: children.append(start(task)) or children[-1])
    never = script_task(tmp_path, "never", f"open({str(tmp_path / 'ran')!r}, 'w')")
    waiting = [script_task(tmp_path, "waits", "import time; time.sleep(60)"), never]
    with pytest.raises(UserError, match="breaks failed with exit code 3"):
        run_side_by_side([[script_task(tmp_path, "breaks", "raise SystemExit(3)")], waiting], 2)
    assert time.monotonic() - started < 30
    assert children and all(child.poll() is not None for child in children)
    assert not (tmp_path / "ran").exists() and "[waits] took" not in capfd.readouterr().out


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_stops_all_processes(tmp_path, number, exit_code):
    """Two processes sleep when their parent gets the signal: both are gone when it ends, and a third never starts."""
    sleep = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.py").write_text(sleep, encoding="utf-8")
    code = (
        "import pathlib, sys; from benchmarks.processes import Task, run_side_by_side\n"
        "paths = [pathlib.Path(sys.argv[1], f'{name}.py') for name in ('one', 'two', 'three')]\n"
        "run_side_by_side([[Task(p.stem, (str(p),), p.with_suffix('.txt'))] for p in paths], 2, finish_running=True)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stderr=subprocess.DEVNULL)
    logs = [tmp_path / "one.txt", tmp_path / "two.txt"]
    deadline = time.monotonic() + 60
    while not all(log.is_file() and log.read_text() for log in logs) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = [int(log.read_text()) for log in logs]
    parent.send_signal(number)
    assert parent.wait(timeout=30) == exit_code
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    assert not (tmp_path / "three.txt").exists()


def test_tasks_run_unpinned_where_the_system_cannot_restrict_cores(tmp_path, monkeypatch):
    """As on macOS: the process may use what this one may."""
    before = available_cores()
    task = script_task(tmp_path, "cores", SAY_CORES, log=tmp_path / "logs" / "cores.txt")
    monkeypatch.delattr(utils.os, "sched_setaffinity")
    monkeypatch.setattr(processes, "core_shares", lambda n: [[max(before)]])
    run_side_by_side([[task]], 1)
    assert task.log.read_text(encoding="utf-8") == f"{before} []\n"


def test_a_second_demo_scores_anew(tmp_path, monkeypatch):
    """Its systems are others than those of the first: their results go, and nothing else does."""
    folder = tmp_path / "distilled"
    folder.mkdir()
    for name in ("answers.jsonl", "predictions.csv", "metrics.json", "mine.txt"):
        (folder / name).write_text("")
    answers = tmp_path / "ladder" / "depth" / "answers"
    answers.mkdir(parents=True)
    monkeypatch.setattr(demo, "run_side_by_side", lambda *args: None)
    demo.main(demo.parse_args(["--output", str(tmp_path)]))
    assert [path.name for path in folder.iterdir()] == ["mine.txt"] and not answers.exists()


def test_the_command_takes_no_unknown_flag():
    with pytest.raises(SystemExit):
        load_script((ROOT / "benchmarks/demo.py").relative_to(ROOT).as_posix()).parse_args(["--epochs", "3"])
