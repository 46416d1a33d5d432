"""Results folders of systems that answered questions about the small world."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dataset.questions.manifest import asked_questions
from dataset.questions.rows import csv_cells, questions_file, read_questions
from evaluation.metrics import evaluate_rows

SEEN = {"depth_encoding": "metric_log3", "depth_source": "raw", "image_tokens": "one_tile"}


@pytest.fixture
def scored(world, tmp_path) -> Callable[..., Path]:
    """Write the results of a system that answers this share of the test questions right, and more if wanted.

    `change` is applied to every prediction row.
    """
    rows = read_questions(questions_file(world, "test"))

    def write(name: str, share: float, *, modality: str = "depth", change=None, **more) -> Path:
        rng = np.random.default_rng(len(name))
        answers = [row.answer for row in rows]
        cells = []
        for row in rows:
            right = rng.random() < share
            own = csv_cells(row) | {"Model_Answer": row.answer if right else str(rng.choice(answers))}
            own |= {"Probability": f"{rng.random():.4f}"}
            cells.append(change(own) if change else own)
        folder = tmp_path / "results" / str(len(list(tmp_path.glob("results/*"))))
        folder.mkdir(parents=True)
        with open(folder / "predictions.csv", "w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, cells[0])
            writer.writeheader()
            writer.writerows(cells)
        blind = {"majority_per_type": [row["Answers"] if n % 3 == 0 else "no" for n, row in enumerate(cells)]}
        system = {"name": name, "modality": modality, "checkpoint": "run/best.ckpt", "split": "test", **SEEN}
        metrics = evaluate_rows(cells, blind=blind) | {"system": system, "date": "2026-11-27"} | more
        (folder / "metrics.json").write_text(json.dumps(metrics))
        return folder

    write.questions = asked_questions(world, rows)
    return write


@pytest.fixture
def training() -> dict:
    """What metrics.json says about a training."""
    return {
        "script": "distillation/baseline_depth/train.py",
        "git_commit": "abc",
        "teacher": "rgb_teacher",
        "labels": 0.5,
        "flags": {"lr": 0.001, "max_epochs": 3},
        "curves": {
            "train/loss": [[9, 2.5], [19, 1.0], [29, 0.75]],
            "val/exact_match": [[9, 0.25], [19, 0.5], [29, 0.625]],
        },
        "validation": {"val/exact_match": 0.625},
    }


@pytest.fixture
def ladder() -> Callable[..., dict]:
    """The content of a robustness.json of these systems."""

    def cell(value: float) -> dict:
        return {"value": value, "low": value - 0.05, "high": value + 0.05}

    def record(*names: str) -> dict:
        rungs = [("clean", 0, 0.75), ("holes", 0.15, 0.625), ("holes", 0.3, 0.5), ("holes", 0.6, 0.375)]
        own = [{"kind": k, "severity": s, "accuracy": {"By depth": cell(value)}} for k, s, value in rungs]
        summary = {"By depth": {"clean": cell(0.75), "mean": cell(0.5), "kept": cell(0.6667)}}
        return {
            "questions": {"n_questions": 45, "n_images": 8},
            "settings": {"split": "test"},
            "blind": {"accuracy": {"By depth": cell(0.3)}},
            "systems": [
                {"name": name, "model": "run/best.ckpt", "modality": "depth", "rungs": own, "summary": summary}
                for name in names
            ],
        }

    return record
