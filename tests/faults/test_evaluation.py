"""Evaluations that are killed at 20 moments, from the first answer to the scores."""

import json
import time

import pytest

from tests.helpers.processes import Started

pytestmark = pytest.mark.faults

SCRIPT = "evaluation/onevisionv3/sunrgbd/evaluate_onevision.py"
KILLS = 20


def argv(tiny_folder, output) -> list[str]:
    stock = ("--model_id", str(tiny_folder), "--pixel_data_type", "depth", "--image_tokens", "one_tile")
    return [*stock, "--max_new_tokens", "24", "--batch_size", "1", "--output", str(output)]


def ids(folder) -> list[str]:
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    return [json.loads(line)["id"] for line in lines]


def test_kills_of_an_evaluation(places, tiny_folder, tmp_path, fault_table):
    """kill -9 once so many answers are on disk, or so long after the last one; then the same command again."""
    with Started(SCRIPT, argv(tiny_folder, tmp_path / "whole"), tmp_path / "process") as whole:
        assert whole.ends() == 0, whole.stderr
    asked, expected = ids(tmp_path / "whole"), (tmp_path / "whole" / "predictions.csv").read_bytes()
    for kill in range(KILLS):
        with fault_table.trial("kill -9 of an evaluation, the same command again"):
            folder = tmp_path / f"kill{kill}"
            answers, lines = folder / "answers.jsonl", round(1 + kill * len(asked) / (KILLS - 5))
            late_s = 0.03 * max(kill - (KILLS - 5), 0)  # the last ones come while it scores and writes
            with Started(SCRIPT, argv(tiny_folder, folder), tmp_path / "process") as started:
                reached = min(lines, len(asked) + 1)

                def stands(answers=answers, reached=reached) -> bool:
                    return answers.is_file() and answers.read_bytes().count(b"\n") >= reached

                started.wait_until(stands)
                time.sleep(late_s)
            kept = answers.read_bytes()
            with Started(SCRIPT, argv(tiny_folder, folder), tmp_path / "process") as again:
                assert again.ends() == 0, again.stderr
                assert "Traceback" not in again.stderr and "questions are answered; " in again.stdout or kill == 0
            whole_lines = kept[: kept.rindex(b"\n") + 1]
            assert answers.read_bytes().startswith(whole_lines) and ids(folder) == asked
            assert (folder / "predictions.csv").read_bytes() == expected
            names = {path.name for path in folder.iterdir() if not path.match("owner-*.json")}
            assert names == {"answers.jsonl", "metrics.json", "predictions.csv"}
