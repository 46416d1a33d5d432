"""What processes share: folders that one works in at a time, and the cores."""

import os
import subprocess
import sys
import time

import utils
from utils import ROOT, announced, core_shares, locked

HOLD = "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import utils\nwith utils.locked(pathlib.Path(sys.argv[2])): print('in')"


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
    monkeypatch.setattr(utils.os, "sched_getaffinity", lambda pid: {7, 3, 5, 11, 9})
    assert core_shares(1) == [[3, 5, 7, 9, 11]]
    assert core_shares(2) == [[3, 7, 11], [5, 9]]
    assert core_shares(7) == [[3], [5], [7], [9], [11], [3], [5]]


def test_this_machine_gives_everybody_a_core():
    own = os.sched_getaffinity(0)
    assert {core for share in core_shares(len(own)) for core in share} == own


def test_only_a_long_job_is_announced(capsys):
    with announced("fitting", after_s=30):
        pass
    assert capsys.readouterr().err == ""
    with announced("fitting", after_s=0.01):
        time.sleep(0.3)
    assert capsys.readouterr().err == "fitting ...\n"
