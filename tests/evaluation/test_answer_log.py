"""Evaluations that are killed, repeated, or find another one's answers, as the command that a user calls."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from dataset.questions.rows import questions_file, read_questions
from distillation.run.claim import newest_owner
from evaluation import answer_log
from evaluation.onevisionv3.sunrgbd import evaluate_onevision
from tests.helpers.faulty import faulty, in_loading
from tests.helpers.processes import Started
from utils import ROOT, UserError, process_start

SCRIPT = "evaluation/onevisionv3/sunrgbd/evaluate_onevision.py"


def argv(tiny_folder, output, *more: str) -> list[str]:
    stock = ("--model_id", str(tiny_folder), "--pixel_data_type", "depth", "--image_tokens", "one_tile")
    return [*stock, "--max_new_tokens", "6", "--output", str(output), *more]


def evaluate(*flags) -> None:
    evaluate_onevision.main(evaluate_onevision.parse_args(argv(*flags)))


@pytest.fixture
def finished(places, tiny_folder, tmp_path):
    evaluate(tiny_folder, tmp_path / "done")
    return tmp_path / "done"


def ids(folder) -> list[str]:
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    return [json.loads(line)["id"] for line in lines]


def test_a_killed_evaluation_goes_on_where_it_was(finished, tiny_folder, tmp_path, capsys):
    """kill -9 behind the first answers and a line cut off: the same bytes in the end, and no question twice."""
    folder = tmp_path / "killed"
    with Started(SCRIPT, argv(tiny_folder, folder), tmp_path / "process") as started:
        answers = folder / "answers.jsonl"
        started.wait_until(lambda: answers.is_file() and answers.read_bytes().count(b"\n") > 2)
    kept = answers.read_text().splitlines()[:9]
    answers.write_text("\n".join(kept) + '\n{"id": "half')
    evaluate(tiny_folder, folder)
    assert f"8 of {len(ids(finished))} questions are answered; going on" in capsys.readouterr().out
    assert answers.read_text().splitlines()[:9] == kept and ids(folder) == ids(finished)
    assert (folder / "predictions.csv").read_bytes() == (finished / "predictions.csv").read_bytes()


def test_a_finished_evaluation_is_scored_again(finished, tiny_folder, monkeypatch):
    """Without asking the model once."""
    before = {path: path.read_bytes() for path in finished.iterdir() if path.name != "metrics.json"}
    monkeypatch.setattr("evaluation.system.greedy_answers", lambda *args, **options: 1 / 0)
    evaluate(tiny_folder, finished, "--name", "another name")
    assert before == {path: path.read_bytes() for path in before}
    assert json.loads((finished / "metrics.json").read_text())["system"]["name"] == "another name"


@pytest.mark.parametrize(
    ("more", "differs"),
    [
        (("--max_new_tokens", "5"), "max_new_tokens was '6' and is '5' now"),
        (("--gts_type", "val"), "split was 'test' and is 'val' now"),
        (("--pixel_data_type", "rgb"), "modality was 'depth' and is 'rgb' now"),
        (("--captions", "--max_new_tokens", "6"), "questions was "),
    ],
)
def test_answers_of_another_evaluation_are_refused(finished, tiny_folder, more, differs):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    with pytest.raises(UserError, match=f"answers.jsonl: holds answers of another evaluation, {differs}"):
        evaluate(tiny_folder, finished, *more)
    assert before == {path: path.read_bytes() for path in finished.iterdir()}


def test_other_weights_and_other_code_are_refused(finished, tiny_teacher, tiny_folder, monkeypatch):
    with pytest.raises(UserError, match="weights was"):
        evaluate(tiny_teacher, finished)
    monkeypatch.setattr(answer_log, "source_digest", lambda *args, **options: "other")
    with pytest.raises(UserError, match="code and libraries was"):
        evaluate(tiny_folder, finished)


def test_results_without_answers_and_foreign_files_are_refused(finished, tiny_folder):
    for content, complaint in (("hello\n" * 3, "is not a file of answers"), (None, "predictions.csv: is of an evalu")):
        if content:
            (finished / "answers.jsonl").write_text(content)
        else:
            (finished / "answers.jsonl").unlink()
        with pytest.raises(UserError, match=complaint):
            evaluate(tiny_folder, finished)


def test_two_evaluations_do_not_write_one_folder(tiny_folder, places, tmp_path):
    folder = tmp_path / "output"
    with Started(SCRIPT, argv(tiny_folder, folder), tmp_path / "first") as first:
        first.wait_until(lambda: any(folder.glob("owner-1.json")))
        with pytest.raises(UserError, match=f"in use by process {first.process.pid} on .*another --output"):
            evaluate(tiny_folder, folder)
        assert first.ends() == 0, first.stderr
    evaluate(tiny_folder, folder)


def test_an_output_that_cannot_be_written_is_said_first(places, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(evaluate_onevision, "load_system", lambda *args: 1 / 0)
    with pytest.raises(UserError, match="--output: cannot write into .*file/results, Not a directory"):
        evaluate("nobody/nothing", tmp_path / "file" / "results")


def words(folder) -> bytes:
    return (folder / "predictions.csv").read_bytes()


def scores(folder) -> dict:
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {name: value for name, value in metrics.items() if name not in ("seconds", "peak_memory_gib", "date")}


TORCHRUN = (Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node", "2", str(ROOT / SCRIPT))
ONE_CORE_EACH = {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("start", [(SCRIPT, "--devices", "2"), TORCHRUN], ids=["devices", "torchrun"])
def test_processes_share_the_images_and_change_no_answer(finished, tiny_folder, tmp_path, start):
    """They go on where others were killed that had written two files, the second one with half a line at its end.

    Two more were cut off before their first answer.
    """
    folder = tmp_path / "shared"
    folder.mkdir()
    header, *lines = (finished / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "answers.jsonl").write_bytes(b"".join([header, *lines[:9]]))
    (folder / "answers.1.jsonl").write_bytes(b"".join([header, *lines[20:25], lines[25][:-3]]))
    (folder / "answers.2.jsonl").write_bytes(b"")
    (folder / "answers.3.jsonl").write_bytes(header[:-9])
    command = [*start[1:], *argv(tiny_folder, folder, "--batch_size", "1")]
    with Started(start[0], command, tmp_path / "process", env=ONE_CORE_EACH) as started:
        assert started.ends() == 0, started.stderr
    assert words(folder) == words(finished) and scores(folder) == scores(finished)
    assert sorted(ids(folder)) == sorted(ids(finished)) and not list(folder.glob("answers.?.jsonl"))
    assert "14 of 59 questions are answered" in started.stdout and started.stdout.count("questions in ") == 1


def test_processes_end_with_the_one_that_started_them(tiny_folder, places, tmp_path):
    """kill -9 while they load their pictures: nothing goes on computing."""
    script = faulty(tmp_path, SCRIPT, in_loading(1, "import time; time.sleep(600)"))
    command = argv(tiny_folder, tmp_path / "answers", "--devices", "2", "--num_workers", "1")
    with Started(script, command, tmp_path / "process", env=ONE_CORE_EACH) as started:
        started.wait_until(lambda: list((tmp_path / "answers").glob("answers.1.jsonl")))
        _, owner = newest_owner(tmp_path / "answers")
        started.process.kill()
        deadline = time.monotonic() + 30
        while process_start(owner.pid) == owner.process_start:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.parametrize("number, group", [(signal.SIGTERM, False), (signal.SIGINT, True)], ids=["kill", "Ctrl-C"])
def test_a_signal_ends_all_processes_with_one_line(number, group, tiny_folder, places, tmp_path):
    """SIGTERM goes to the first process alone, Ctrl-C to all of them at once."""
    script = faulty(tmp_path, SCRIPT, in_loading(1, "import time; time.sleep(600)"))
    command = argv(tiny_folder, tmp_path / "answers", "--devices", "2")
    with Started(script, command, tmp_path / "process", env=ONE_CORE_EACH) as started:
        started.wait_until(lambda: list((tmp_path / "answers").glob("answers.1.jsonl")))
        started.send(number, group=group)
        assert started.ends() == 128 + number, started.stderr
        started.leaves_nothing()
    said = [line for line in started.stderr.splitlines() if not line.startswith("answering, batch")]
    assert said == [f"stopped by {number.name}"]


def test_no_more_processes_than_devices(places, tiny_folder, tmp_path):
    with pytest.raises(UserError, match="--devices 4096: there are "):
        evaluate(tiny_folder, tmp_path / "new", "--devices", "4096")


def test_what_processes_find_wrong_is_said_once(finished, world, tiny_folder, tmp_path, monkeypatch):
    """A folder with other answers; flags that contradict the model; a damaged picture."""
    shutil.copytree(finished, tmp_path / "others", ignore=shutil.ignore_patterns("owner-*"))  # this process holds it
    broken = tmp_path / "broken"
    shutil.copytree(world, broken)
    last = read_questions(questions_file(broken, "test"))[-1]
    os.truncate(broken / last.depth_path, 300)
    for root, more, folder, message in (
        (world, ["--devices", "2", "--max_new_tokens", "5"], "others", "holds answers of another evaluation"),
        (
            world,
            ["--devices", "2", "--pixel_data_type", "rgb", "--depth_encoding", "turbo"],
            "none",
            "--depth_encoding turbo: goes with",
        ),
        (broken, ["--devices", "2", "--batch_size", "1"], "broken_answers", Path(last.depth_path).name),
    ):
        monkeypatch.setenv("ROOT_DATA_DIR", str(root))
        command = argv(tiny_folder, tmp_path / folder, *more)
        with Started(SCRIPT, command, tmp_path / "process", env=ONE_CORE_EACH) as started:
            assert started.ends() == 2, started.stderr
        said = [line for line in started.stderr.splitlines() if not line.startswith("answering, batch")]
        assert len(said) == 1 and message in said[0], started.stderr
