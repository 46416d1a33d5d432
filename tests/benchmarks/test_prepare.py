"""The benchmark of the preparation command: its generated tree, whose frames are called as in SUN RGB-D."""

import json
import subprocess
import sys
from collections import Counter

import pytest

from benchmarks import prepare
from benchmarks.prepare import write_tree
from dataset.prepare_sunrgbd import main, parse_args
from dataset.questions.rows import questions_file, read_questions
from dataset.sunrgbd.frames import find_frames, official_split, read_official_list
from utils import ROOT

MEASURE = """
import json, pathlib, sys
from benchmarks import prepare
prepare.PROC = pathlib.Path(sys.argv[2])
print(json.dumps(prepare.measure(pathlib.Path(sys.argv[1]), 1)))
"""


def test_a_tree_without_the_toolbox(tmp_path, capsys):
    write_tree(tmp_path, 60, (64, 48))
    frames = find_frames(tmp_path)[0]
    halves = read_official_list()
    for flags, listed in (
        (["--official_val"], {"test": 5050, "train": 2666, "val": 2619}),
        ([], {"test": 5050, "train": 4735, "val": 550}),
    ):
        main(parse_args(["--root", str(tmp_path), "--workers", "1", *flags]))
        summary = json.loads((tmp_path / "SUNRGBD" / "csv_data" / "questions.json").read_text())
        assert summary["split"]["listed_frames"] == listed and summary["split"]["rule"] in capsys.readouterr().out
        found = official_split(tmp_path, frames, official_val=bool(flags))
        assert summary["frames"] == Counter(found.values()) and len(found) == 60
        assert ({path[8:]: side for path, side in found.items()}.items() <= halves.items()) == bool(flags)
        assert not summary["unusable_frames"] and not summary["frames_outside_the_official_split"]
        rows = read_questions(questions_file(tmp_path, "train"), root=tmp_path)
        assert {found[row.image_path.rsplit("/", 2)[0]] for row in rows} == {"train"}


@pytest.mark.parametrize("proc", [prepare.PROC, "no proc"])
def test_time_and_memory_of_the_command(proc, tmp_path):
    """Two processes, each with the libraries in memory; without /proc (macOS) the larger one.

    Measured from a process of its own: what Linux says of a child begins with what its parent held when it started it.
    """
    write_tree(tmp_path, 6, (64, 48))
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path, proc], cwd=ROOT, capture_output=True, check=True)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    assert seconds > 0 and 2**25 < peak < prepare.LIMIT_BYTES
    assert questions_file(tmp_path, "train").is_file()
