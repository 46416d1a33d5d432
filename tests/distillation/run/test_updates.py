"""One objective, however it is cut; and epochs that differ. All through the command lines, as Lightning calls them."""

import csv
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dataset.questions.rows import read_questions, unanswered_file
from distillation.run.checkpoints import read_checkpoint
from distillation.run.folders import find_checkpoint
from utils import ROOT, UserError, load_script

TROUBLE = "knowledge_distillation7b_double_trouble"
FROM_STOCK, QUESTIONS = ("--from_stock",), ("--teacher_questions", "2")
SCRIPTS = {  # folder, file, further flags
    "baseline_depth": ("baseline_depth", "train.py", ()),
    "baseline_rgb05b": ("baseline_rgb05b", "train.py", ()),
    "baseline_rgb7b": ("baseline_rgb7b", "train2.py", ("--lora_rank", "0", "--vision_lr", "0")),
    "phase1": (f"{TROUBLE}/phase1", "train_online_kd.py", ()),
    "phase2": (f"{TROUBLE}/phase2", "train_online_kd.py", (*FROM_STOCK, *QUESTIONS)),
    "phase3": (f"{TROUBLE}/phase3", "train_online_kd.py", (*FROM_STOCK, *QUESTIONS)),
    "feature": ("knowledge_distillation7b_feature_based", "train_online_kd.py", ("--map_lr", "0", *QUESTIONS)),
    "logit": ("knowledge_distillation7b_logit_based", "train_online_kd.py", QUESTIONS),
}
CUTS = ((8, 4), (2, 16), (1, 32))
CASES = [(name, fraction) for name in SCRIPTS for fraction in ("1", "0.05") if (name, fraction) != ("phase1", "0.05")]


@pytest.fixture(scope="module")
def forty_rooms(tmp_path_factory):
    """39 training images have questions: an epoch is an update of 32 images and a short one of 7."""
    from dataset.miniature.world import ensure_world

    return ensure_world(tmp_path_factory.mktemp("data") / "world", train=40, val=2, test=2, workers=1)


@pytest.fixture
def places(forty_rooms, tmp_path, monkeypatch):
    monkeypatch.setenv("ROOT_DATA_DIR", str(forty_rooms))
    monkeypatch.setenv("MAIN_ROOT_DATA_DIR", str(tmp_path / "out"))
    return tmp_path / "out"


def argv_of(name, tiny_folder, tiny_teacher, *more):
    """Rates of 0: the weights stay, and Adam's first moment is a weighted sum of the updates' gradients."""
    folder, _, own = SCRIPTS[name]
    leaves_out = {"phase1": ["--lr"], "phase2": ["--vision_lr"]}.get(name, [])
    argv = ["--student_name", str(tiny_folder), "--image_tokens", "one_tile", "--num_workers", "0", "--max_epochs", "1"]
    argv += ["--gradient_clip", "0", "--precision", "32-true", "--accelerator", "cpu"]
    argv += [text for rate in ("--lr", "--vision_lr") if rate not in leaves_out for text in (rate, "0")]
    argv += [] if folder.startswith("baseline") else ["--teacher_name", str(tiny_teacher)]
    return [*argv, *own, *more]


def drop(argv, flag):
    at = argv.index(flag)
    return argv[:at] + argv[at + 2 :]


def cut(batch_size, accumulate, run_name):
    return ("--batch_size", str(batch_size), "--accumulate_grad_batches", str(accumulate), "--run_name", run_name)


def run(name, argv):
    folder, file, _ = SCRIPTS[name]
    script = load_script(f"distillation/{folder}/{file}")
    script.main(script.parse_args(argv))


def gradients(places, name, run_name):
    """0.09 times the first update's gradient plus 0.1 times the second one's, all parameters in one vector."""
    checkpoint = read_checkpoint(places / SCRIPTS[name][0] / "checkpoints" / run_name / "last.ckpt")
    assert checkpoint["global_step"] == 2
    state = checkpoint["optimizer_states"][0]["state"]
    return torch.cat([state[i]["exp_avg"].flatten().double() for i in sorted(state)])


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


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


def run_ranks(name, argv):
    """The same command on two processes that Lightning starts."""
    folder, file, _ = SCRIPTS[name]
    command = [sys.executable, str(ROOT / "distillation" / folder / file), *argv, "--strategy", "ddp", "--devices", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # of the two processes together no more than a small machine has
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_update_does_not_depend_on_the_number_of_ranks(name, places, tiny_folder, tiny_teacher):
    """Half of the images each; of the last 7 one process gets all and the other one none, and no image comes twice."""
    few = () if name == "phase1" else ("--label_fraction", "0.05")
    run(name, argv_of(name, tiny_folder, tiny_teacher, *few, *cut(8, 4, "one")))
    run_ranks(name, argv_of(name, tiny_folder, tiny_teacher, *few, *cut(8, 2, "two")))
    assert distance(gradients(places, name, "two"), gradients(places, name, "one")) < 1e-5


def test_the_logged_terms_are_those_of_the_whole_update(places, tiny_folder, tiny_teacher):
    """The tenth update's terms, cut in three ways and on two ranks."""
    logs = places / SCRIPTS["phase3"][0] / "tensorboard_logs"
    argv = drop(argv_of("phase3", tiny_folder, tiny_teacher, "--label_fraction", "0.3"), "--max_epochs")
    for batch_size, accumulate in ((16, 1), (4, 4), (1, 16)):
        run("phase3", [*argv, "--max_epochs", "4", *cut(batch_size, accumulate, f"b{batch_size}")])
    run_ranks("phase3", [*argv, "--max_epochs", "4", *cut(4, 2, "ranks")])
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


@contextmanager
def recorded_batches(script, seen):
    """What the real `training_step` of a script is given, epoch by epoch: questions and pictures of every image."""
    (module,) = [cls for cls in vars(script).values() if isinstance(cls, type) and hasattr(cls, "training_step")]
    step = module.training_step

    def recording(self, batch, batch_idx):
        epoch = seen.setdefault(self.trainer.current_epoch, [])
        tiles = batch["student_images"]["pixel_values"]
        for path, ids, picture in zip(batch["image_paths"], batch["question_ids"], tiles, strict=True):
            epoch.append((path, tuple(ids), hashlib.sha256(picture.numpy().tobytes()).hexdigest()))
        return step(self, batch, batch_idx)

    module.training_step = recording
    try:
        yield
    finally:
        module.training_step = step


def seen_by(name, argv):
    folder, file, _ = SCRIPTS[name]
    script = load_script(f"distillation/{folder}/{file}")
    seen = {}
    with recorded_batches(script, seen):
        script.main(script.parse_args(argv))
    return seen


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


def images_of(epochs):
    return [path for epoch in epochs.values() for path, _, _ in epoch]


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


def test_other_devices_inside_an_epoch_are_refused(places, tiny_folder, tiny_teacher):
    argv = [*argv_of("baseline_depth", tiny_folder, tiny_teacher), *cut(4, 1, "t")]
    run("baseline_depth", [*argv, "--max_steps", "2"])
    with pytest.raises(UserError, match="interrupted inside an epoch on 1 device.*now there are 2"):
        run("baseline_depth", [*argv, "--resume", "auto", "--strategy", "ddp", "--devices", "2"])


def test_a_better_end_takes_the_place_of_the_best(places, tiny_folder, tiny_teacher):
    """--max_steps ends inside the third epoch: one best checkpoint is left, which its name and the record agree on."""
    argv = drop(drop(argv_of("baseline_depth", tiny_folder, tiny_teacher), "--max_epochs"), "--lr")
    run("baseline_depth", [*argv, "--lr", "1e-3", "--max_epochs", "3", "--max_steps", "25", *cut(4, 1, "t")])
    (best,) = (places / "baseline_depth/checkpoints/t").glob("best-*.ckpt")
    record = json.loads((places / "baseline_depth/tensorboard_logs/t/run.json").read_text(encoding="utf-8"))
    assert Path(record["best"]) == best == find_checkpoint("t", places) and best.name.startswith("best-epoch02")
    assert read_checkpoint(best)["global_step"] == 25
