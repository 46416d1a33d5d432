"""Answers of other code, scored from a file."""

import csv
import json

import pytest

from evaluation.onevisionv3.sunrgbd import evaluate_onevision
from utils import UserError

ANSWERED = (("Yes/No", "yes", "Yes."), ("Count", "2", "two"), ("Count", "3", "two"))  # type, gold, model
ROWS = [
    {"Question_Id": str(number), "Questions": "What?", "Question_Type": kind, "Answers": gold, "Model_Answer": answer}
    for number, (kind, gold, answer) in enumerate(ANSWERED)
]
PUBLISHED = {  # set-of-lemmas accuracy in %, from the original project's summaries
    "results_kd_modeltypeLdepth_val_double_troublephase3": 45.21,
    "results_pre-trained_rgb_val_0.5b": 33.80,
    "results_pre-trained_rgb_val_7b": 37.89,
    "results_sft_depth_val_0.5b": 32.08,
}


def write(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def score(path, output, *more: str) -> dict:
    argv = ["--predictions", str(path), "--output", str(output), *more]
    evaluate_onevision.main(evaluate_onevision.parse_args(argv))
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture
def without_data(monkeypatch):
    monkeypatch.setenv("ROOT_DATA_DIR", "")


def test_answers_in_a_file_are_scored(without_data, tmp_path, capsys):
    metrics = score(write(tmp_path / "theirs.csv", ROWS), tmp_path / "out")
    assert metrics["overall"]["exact_match"]["value"] == pytest.approx(2 / 3) and metrics["system"]["name"] == "theirs"
    assert metrics["per_type"]["Count"]["exact_match"]["value"] == 0.5 and "blind" not in metrics
    said = capsys.readouterr()
    assert "set-of-lemmas accuracy" in said.out and "no baselines without an image: ROOT_DATA_DIR" in said.err
    score(tmp_path / "theirs.csv", tmp_path / "out")  # the same file again
    other = write(tmp_path / "other.csv", ROWS)
    with pytest.raises(UserError, match="has the results of something else"):
        score(other, tmp_path / "out")


def test_baselines_are_fitted_where_there_are_training_questions(world, monkeypatch, tmp_path):
    monkeypatch.setenv("ROOT_DATA_DIR", str(world))
    metrics = score(write(tmp_path / "theirs.csv", ROWS), tmp_path / "out")
    assert set(metrics["blind"]) == {"majority_per_type", "question_text", "text_classifier"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_accuracies_come_out(samples, without_data, tmp_path, name):
    metrics = score(samples / "original_predictions" / f"{name}.csv", tmp_path / "out")
    assert round(100 * metrics["overall"]["lemma_set_match"]["value"], 2) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda rows: [{k: v for k, v in row.items() if k != "Answers"} for row in rows], "column Answers is missing"),
        (lambda rows: rows + rows[:1], "Question_Id 0 occurs 2 times"),
        (lambda rows: [rows[0] | {"Question_Type": " "}], "row 1 has no Question_Type"),
    ],
)
def test_a_file_that_cannot_be_scored_is_named(without_data, tmp_path, change, complaint):
    path = write(tmp_path / "theirs.csv", change(ROWS))
    with pytest.raises(UserError, match=f"--predictions {path}: {complaint}"):
        score(path, tmp_path / "out")


def test_other_files_are_named(without_data, tmp_path):
    (tmp_path / "empty.csv").write_text("Questions,Question_Type,Answers,Model_Answer\n")
    (tmp_path / "short.csv").write_text("Questions,Question_Type,Answers,Model_Answer\na,b\n")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    for name, complaint in (
        ("empty", "has no rows"), ("short", "row 1 has more"), ("binary", "not a readable"), ("absent", "not a"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"{name}.csv: {complaint}"):
            score(tmp_path / f"{name}.csv", tmp_path / "out")


def test_flags_of_a_system_do_not_go_with_a_file(capsys):
    for flag in (("--ckpt_path", "x"), ("--gts_type", "val"), ("--captions",)):
        with pytest.raises(SystemExit, match="2"):
            evaluate_onevision.parse_args(["--predictions", "x.csv", *flag])
        assert f"{flag[0]}: --predictions asks no system anything" in capsys.readouterr().err
