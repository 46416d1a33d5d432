"""The study's statistics and the fairness of its arms; the training itself is what the scripts' own tests are about."""

import pytest
import torch
from scipy import stats

from benchmarks import reproduce
from distillation.models import MINIATURE_STUDENT, load_model
from evaluation.metrics import QUESTION_TYPES
from utils import UserError, write_json


def run(arm, seed, by_depth):
    scores = dict.fromkeys(["By depth", "Overall", *QUESTION_TYPES, "Val"], by_depth)
    return {"arm": arm, "fraction": 1.0, "seed": seed, "scores": scores}


def test_every_arm_takes_as_many_epochs():
    for stages in (reproduce.ARMS | reproduce.FULL_LABEL_ARMS).values():
        assert sum(stage.epochs for stage in stages) == reproduce.EPOCHS


def test_gains_are_paired_by_seed():
    """Seeds differ far more than arms do: only the differences within a seed show the gain."""
    runs = [run(reproduce.CONTROL, seed, 0.3 + 0.1 * seed) for seed in range(4)]
    runs += [run("other", seed, 0.4 + 0.1 * seed + 0.01 * (seed % 2)) for seed in range(4)]
    header, rule, control, other = reproduce.table(runs, 1.0)
    assert header.count("|") == rule.count("|") == control.count("|") == other.count("|")
    assert control.startswith("| label-only | 45.0 ± 12.9 |") and control.endswith("|  |  |")
    low, high = stats.ttest_1samp([10, 11, 10, 11], 0).confidence_interval()
    found = f"+10.5 [{low:+.1f}, {high:+.1f}]"
    assert other.endswith(f"| {found} | {found} |")
    assert reproduce.gain_table(runs, "other")[2:] == [f"| 100 % of the labels | {' | '.join([found] * 6)} |"]
    assert reproduce.table(runs, 0.1)[2:] == []


def test_a_start_differs_by_seed_and_comes_back(tmp_path):
    stock = load_model(MINIATURE_STUDENT).state_dict()
    starts = [load_model(str(reproduce.student_start(tmp_path, seed))).state_dict() for seed in (0, 1, 0)]
    for name, weight in stock.items():
        assert torch.equal(starts[0][name], starts[2][name])
        relative = (starts[0][name] - weight).norm() / weight.norm()
        assert relative == pytest.approx(reproduce.START_NOISE, rel=0.35) or weight.numel() < 200 or not weight.any()
    assert not torch.equal(starts[0]["lm_head.weight"], starts[1]["lm_head.weight"])


def test_every_command_line_is_one_that_its_script_takes():
    """Same batches, seed and labels in all stages that read labels; the control has no teacher."""
    for name, stages in (reproduce.ARMS | reproduce.FULL_LABEL_ARMS).items():
        for stage in stages:
            (path,) = (reproduce.ROOT / "distillation" / stage.script).glob("train*.py")
            flags = reproduce.stage_flags(stage, fraction=0.1, seed=3)
            start = [] if "--from_stock" in flags else ["--load_checkpoint", "run"]
            args = reproduce.load_script(str(path.relative_to(reproduce.ROOT))).parse_args(
                ["--miniature", *flags, *start]
            )
            assert (args.batch_size, args.accumulate_grad_batches, args.precision, args.seed) == (8, 1, "auto", 3)
            assert not stage.labels or args.label_fraction == 0.1
            assert hasattr(args, "teacher_checkpoint") == (name != reproduce.CONTROL)
            assert (
                name == reproduce.CONTROL or args.teacher_checkpoint is None
            )  # few labels: a teacher that has read none
            assert (name == reproduce.CONTROL) or "--teacher_checkpoint" in reproduce.stage_flags(
                stage, fraction=1.0, seed=3
            )


def test_finished_arms_are_kept_and_other_flags_are_refused(tmp_path, monkeypatch):
    """A second call trains nothing; records of another study are not mixed in."""
    trained = []

    def train(script, argv, work, *, name):
        folder = work / script / "checkpoints" / name
        if not folder.is_dir():
            trained.append((script, name))
            folder.mkdir(parents=True)
            (folder / "best-epoch00-score0.5.ckpt").touch()
            write_json(reproduce.logs_of(folder) / "run.json", {"best": "", "val/exact_match": 0.5})
        return folder

    def evaluate(checkpoint, output):
        cells = [
            {"exact_match": {"value": value}} for value in ((0.9, 0.3) if output.name == "teacher" else (0.6, 0.6))
        ]
        system, blind = (
            {"overall": cell, "depth_answerable": cell, "per_type": dict.fromkeys(QUESTION_TYPES, cell)}
            for cell in cells
        )
        return system | {"blind": {"majority": blind}}

    monkeypatch.setattr(reproduce, "run_once", train)
    monkeypatch.setattr(reproduce, "evaluate", evaluate)
    monkeypatch.setattr(reproduce, "student_start", lambda work, seed: work)
    monkeypatch.setenv("MAIN_ROOT_DATA_DIR", str(tmp_path))
    args = reproduce.parse_args(["--seeds", "2", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")])
    reproduce.main(args)
    first = len(trained)
    assert first == len(set(trained)) > 20
    written = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "closes 50 % of the gap" in written  # 0.6 between 0.3 and 0.9
    reproduce.main(args)
    assert len(trained) == first and (tmp_path / "out/README.md").read_text(encoding="utf-8") == written
    monkeypatch.setattr(reproduce, "TUNED_TEACHER", ["--teacher_name", "other"])
    with pytest.raises(UserError, match="made with other flags"):
        reproduce.main(args)
