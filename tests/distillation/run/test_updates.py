"""One objective, however it is cut; and epochs that differ. All through the command lines, as Lightning calls them."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from dataset.questions.rows import read_questions, unanswered_file
from distillation.run.checkpoints import read_checkpoint
from distillation.run.folders import find_checkpoint
from tests.helpers.ranks import Command, on_ranks
from tests.helpers.updates import (
    SCRIPTS,
    argv_of,
    cut,
    distance,
    drop,
    gradients,
    images_of,
    run,
    script_of,
    seen_by,
)

CUTS = ((8, 4), (2, 16), (1, 32))
CASES = [(name, fraction) for name in SCRIPTS for fraction in ("1", "0.05") if (name, fraction) != ("phase1", "0.05")]


@pytest.fixture
def places(places_of_forty):
    return places_of_forty


@pytest.mark.parametrize(("name", "fraction"), CASES)
def test_an_update_does_not_depend_on_its_micro_batches(name, fraction, places, tiny_folder, tiny_teacher):
    """32 images at once, by 8, by 2 and one by one, then the last 7: the same gradient, also with few labels."""
    few = () if name == "phase1" else ("--label_fraction", fraction)
    for batch_size, accumulate in ((32, 1), *CUTS):
        more = cut(batch_size, accumulate, f"b{batch_size}")
        run(name, argv_of(name, tiny_folder, tiny_teacher, *few, *more))
    whole = gradients(places, name, "b32")
    assert whole.norm() > 1e-3
    for batch_size, _ in CUTS:
        assert distance(gradients(places, name, f"b{batch_size}"), whole) < 1e-5


def test_the_logged_terms_are_those_of_the_whole_update(places, tiny_folder, tiny_teacher):
    """The tenth update's terms, cut in three ways and on two ranks."""
    logs = places / SCRIPTS["phase3"][0] / "tensorboard_logs"
    argv = drop(argv_of("phase3", tiny_folder, tiny_teacher, "--label_fraction", "0.3"), "--max_epochs")
    for batch_size, accumulate in ((16, 1), (4, 4), (1, 16)):
        run("phase3", [*argv, "--max_epochs", "4", *cut(batch_size, accumulate, f"b{batch_size}")])
    of_ranks = [*argv, "--max_epochs", "4", *cut(4, 2, "ranks")]
    on_ranks(places, [Command(script_of("phase3"), of_ranks)])
    first, *others = (logged(logs / name / "metrics.csv") for name in ("b16", "b4", "b1", "ranks"))
    terms = {"loss", "ce", "kl", "patch", "contrastive", "contrastive_accuracy", "corrected", "teacher_ce"}
    assert {f"train/{term}" for term in terms} < first.keys() and first["train/loss"] > 1
    for other in others:
        assert other == pytest.approx(first, rel=1e-4)


def logged(path):
    with open(path, encoding="utf-8", newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["train/loss"]]
    assert len(rows) == 12  # so short a run logs every update
    row = rows[9]
    return {name: float(value) for name, value in row.items() if name.startswith("train/")}


# epochs


@pytest.mark.parametrize("workers", ["0", "1"])
def test_epochs_differ_in_order_augmentation_and_questions(workers, places, tiny_folder, tiny_teacher):
    argv = drop(drop(argv_of("baseline_depth", tiny_folder, tiny_teacher), "--max_epochs"), "--num_workers")
    argv += ["--num_workers", workers, "--max_epochs", "3", "--augmentation", "--questions_per_image", "1"]
    epochs = seen_by("baseline_depth", [*argv, *cut(8, 2, "t")])
    assert len(epochs) == 3
    orders = [[path for path, _, _ in epoch] for epoch in epochs.values()]
    assert len({tuple(order) for order in orders}) == 3 and len({frozenset(order) for order in orders}) == 1
    pictures, questions = {}, {}
    for epoch in epochs.values():
        for path, ids, digest in epoch:
            pictures.setdefault(path, set()).add(digest)
            questions.setdefault(path, []).append(ids)
    assert all(len(digests) == 3 for digests in pictures.values())
    several = [asked for asked in questions.values() if len(set(asked)) > 1]
    assert len(several) > len(questions) / 2  # the others have one question


def test_teacher_questions_take_turns(places, forty_rooms, tiny_folder, tiny_teacher):
    """Every further question about an image is read before one is read again, gold ones come in every epoch."""
    further = {row.id: row.image_path for row in read_questions(unanswered_file(forty_rooms), labelled=False)}
    argv = drop(argv_of("logit", tiny_folder, tiny_teacher), "--max_epochs")
    epochs = seen_by("logit", [*argv, "--max_epochs", "3", *cut(8, 2, "t")])
    asked = {}
    for epoch in epochs.values():
        for path, ids, _ in epoch:
            assert sum(id in further for id in ids) == 2 and len(ids) > 2
            asked.setdefault(path, []).extend(id for id in ids if id in further)
    there = Counter(further.values())
    assert all(len(set(ids)) == min(6, there[path]) for path, ids in asked.items()) and len(asked) > 35


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_run_that_max_steps_ended_goes_on_where_it_was(accumulate, places, tiny_folder, tiny_teacher):
    """Inside an epoch: every image is read as often as in a run that went through, none twice, in the same order."""
    argv = drop(argv_of("baseline_depth", tiny_folder, tiny_teacher), "--max_epochs") + ["--max_epochs", "2"]
    whole = images_of(seen_by("baseline_depth", [*argv, *cut(4, accumulate, "whole")]))
    parts = []
    for more in (("--max_steps", "1"), ()):
        parts += images_of(seen_by("baseline_depth", [*argv, *cut(4, accumulate, "cut"), "--resume", "auto", *more]))
    assert parts == whole and len(whole) == 2 * 39
    states = [read_checkpoint(places / "baseline_depth/checkpoints" / name / "last.ckpt") for name in ("whole", "cut")]
    assert states[0]["global_step"] == states[1]["global_step"] and states[0]["epoch"] == states[1]["epoch"]


def test_a_better_end_takes_the_place_of_the_best(places, tiny_folder, tiny_teacher):
    """--max_steps ends inside the third epoch: one best checkpoint is left, which its name and the record agree on."""
    argv = drop(drop(argv_of("baseline_depth", tiny_folder, tiny_teacher), "--max_epochs"), "--lr")
    run("baseline_depth", [*argv, "--lr", "1e-3", "--max_epochs", "3", "--max_steps", "25", *cut(4, 1, "t")])
    (best,) = (places / "baseline_depth/checkpoints/t").glob("best-*.ckpt")
    record = json.loads((places / "baseline_depth/tensorboard_logs/t/run.json").read_text(encoding="utf-8"))
    assert Path(record["best"]) == best == find_checkpoint("t", places) and best.name.startswith("best-epoch02")
    assert read_checkpoint(best)["global_step"] == 25
