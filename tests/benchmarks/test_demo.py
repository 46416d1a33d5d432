"""The demo's command lines, its processes, and how it ends when a step fails."""

import time

import pytest

from benchmarks.demo import CONTROL, SYSTEMS, Runner, Step, chains
from tests.helpers.system import SAY_CORES, needs_affinity
from utils import ROOT, UserError, available_cores, load_script, use_cores


def test_every_command_is_one_that_its_script_takes(tmp_path):
    first, baselines, phases = chains("run", tmp_path)
    for step in (*first, *baselines, *phases):
        load_script(step.script).parse_args(list(step.flags))
    scored = [step.flags[step.flags.index("--name") + 1] for step in (*baselines, *phases) if "--name" in step.flags]
    assert sorted(scored) == sorted(SYSTEMS) and CONTROL in SYSTEMS


@needs_affinity
def test_steps_are_pinned_and_say_who_they_are(tmp_path, capfd):
    script = tmp_path / "cores.py"
    script.write_text(SAY_CORES, encoding="utf-8")
    before = available_cores()
    core = before[-1]
    try:
        Runner().run([Step("who", str(script), ("--a", "b c"))], [core])
    finally:
        use_cores(before)
    out = capfd.readouterr().out
    assert f"[who] [{core}] ['--a', 'b c']" in out
    assert f'[who] python {script} --a "b c"' in out and "[who] took 0:0" in out


def test_chains_run_side_by_side_and_what_follows_them_too(tmp_path):
    """Each of the two waits for the other: one after the other they would wait for ever. The comparison comes after them."""
    meet = "import pathlib, sys, time\nown, other = map(pathlib.Path, sys.argv[1:]); own.touch()\nwhile not other.exists(): time.sleep(0.05)"
    (tmp_path / "meet.py").write_text(meet, encoding="utf-8")
    (tmp_path / "after.py").write_text(f"open({str(tmp_path / 'compared')!r}, 'w')", encoding="utf-8")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    runner, cores = Runner(), available_cores()
    runner.side_by_side(
        [[Step("a", str(tmp_path / "meet.py"), (a, b))], [Step("b", str(tmp_path / "meet.py"), (b, a))]]
    )
    runner.run([Step("after", str(tmp_path / "after.py"))], cores)
    assert (tmp_path / "compared").exists()


def test_a_failing_step_is_named_and_stops_the_others(tmp_path):
    (tmp_path / "wait.py").write_text("import time; time.sleep(60)", encoding="utf-8")
    (tmp_path / "fail.py").write_text("raise SystemExit(3)", encoding="utf-8")
    (tmp_path / "never.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    runner, started = Runner(), time.monotonic()
    waiting = [Step("waits", str(tmp_path / "wait.py")), Step("never", str(tmp_path / "never.py"))]
    with pytest.raises(UserError, match="breaks failed with exit code 3"):
        runner.side_by_side([[Step("breaks", str(tmp_path / "fail.py"))], waiting])
    assert time.monotonic() - started < 30
    assert all(process.poll() is not None for process in runner.processes)
    assert not (tmp_path / "ran").exists()


def test_the_command_takes_no_unknown_flag():
    with pytest.raises(SystemExit):
        load_script((ROOT / "benchmarks/demo.py").relative_to(ROOT).as_posix()).parse_args(["--epochs", "3"])
