"""Where runs write, and how users name them and their checkpoints."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import ROOT, UserError, outputs_root, read_json

MINIATURE = "miniature_"  # how the names of runs on the built-in world begin
NAMED_RUNS = 5  # in the message about one that is not there
EXPERIMENTS = {  # --kd_model_type -> folder below distillation/
    "baseline_depth": "baseline_depth",
    "baseline_rgb05b": "baseline_rgb05b",
    "baseline_rgb7b": "baseline_rgb7b",
    "double_trouble": "knowledge_distillation7b_double_trouble/phase{phase}",
    "feature_based": "knowledge_distillation7b_feature_based",
    "logit_based": "knowledge_distillation7b_logit_based",
}


@dataclass(frozen=True)
class Run:
    """Where one run of an experiment writes."""

    experiment: Path  # <MAIN_ROOT_DATA_DIR>/<experiment>
    name: str
    record: dict[str, Any]  # plain scalars: what was run, with which settings; goes into every checkpoint
    resume_from: Path | None = None
    builds_on: str | None = None  # experiment whose checkpoint it starts from, a folder below distillation/; None = own

    @property
    def checkpoints(self) -> Path:
        """`<experiment>/checkpoints/<run>`."""
        return self.experiment / "checkpoints" / self.name

    @property
    def logs(self) -> Path:
        """`<experiment>/tensorboard_logs/<run>`."""
        return self.experiment / "tensorboard_logs" / self.name


def run_folder(name: str, *, miniature: bool) -> str:
    """The name of a run's folders: miniature and real runs are never mixed."""
    return f"{MINIATURE}{name}" if miniature else name


def run_folders(experiment: Path, *, miniature: bool) -> list[Path]:
    """Checkpoint folders of an experiment's miniature or real runs, oldest first."""
    folders = [p for p in (experiment / "checkpoints").glob("*") if p.name.startswith(MINIATURE) == miniature]
    return _oldest_first(folders)


def _oldest_first(folders: Iterable[Path]) -> list[Path]:
    return sorted((p for p in folders if p.is_dir()), key=lambda p: p.stat().st_mtime)


def experiment_folder(name: str, phase: int | None = None) -> Path:
    """Where the experiment `--kd_model_type name` (and `--phase_no phase`) writes."""
    return outputs_root(ROOT / "distillation" / EXPERIMENTS[name].format(phase=phase or 3))


def find_checkpoint(name: str, folder: Path, *, miniature: bool = False) -> Path:
    """The checkpoint that a user's flag means: a path, a run's folder or bare name (its best one), or a bare file name.

    Args:
        name: what was given.
        folder: bare names are looked up in the checkpoints folders below.
        miniature: of two runs with this --run_name take the one on the built-in world; otherwise the real one.

    Raises:
        UserError: nothing fits, or several do.
    """
    path = Path(name)
    if path.name == name and not path.is_file():
        found = _named(name, folder, miniature=miniature) or [path] * path.is_dir()
        if not found:
            runs = _oldest_first(folder.rglob("checkpoints/*"))[-NAMED_RUNS:]
            newest = ", ".join(dict.fromkeys(run.name.removeprefix(MINIATURE) for run in reversed(runs))) or "none"
            raise UserError(
                f"{name}: no such file, and no such run or checkpoint below {folder}; newest runs there: {newest}"
            )
        if len(found) > 1:
            raise UserError(f"{name}: several have this name; give the path: {', '.join(map(str, found))}")
        path = found[0]
    if not path.is_dir():
        return path  # read_checkpoint says what is wrong with it
    best = sorted(path.glob("best-*.ckpt"))
    if not best:
        raise UserError(f"{path}: no best-*.ckpt in this folder; give a checkpoint or the folder of a run")
    return max(best, key=_score_and_age)


def _named(name: str, folder: Path, *, miniature: bool) -> list[Path]:
    """Runs of this --run_name, and checkpoint files of this name. The prefix of miniature runs need not be typed."""
    for wanted in sorted((name, run_folder(name, miniature=True)), key=len, reverse=miniature):
        found = sorted(folder.rglob(f"checkpoints/{wanted}")) + sorted(folder.rglob(f"checkpoints/*/{wanted}"))
        if found:
            return found
    return []


def _score_and_age(checkpoint: Path) -> tuple[float, float]:
    """Sorts by the score in the name; of equal ones the newest comes last."""
    return float(checkpoint.stem.rsplit("score", 1)[1]), checkpoint.stat().st_mtime


def best_checkpoint(experiment: Path, *, miniature: bool) -> Path:
    """The checkpoint with the highest validation score among all runs of an experiment.

    Raises:
        UserError: there is none; names the command that makes one.
    """
    found = [p for run in run_folders(experiment, miniature=miniature) for p in run.glob("best-*.ckpt")]
    if not found:
        scripts = sorted(
            (ROOT / "distillation" / experiment.relative_to(outputs_root(ROOT / "distillation"))).glob("*.py")
        )
        command = f"python {scripts[0].relative_to(ROOT)}" if scripts else "a training script"
        raise UserError(
            f"no checkpoint below {experiment / 'checkpoints'}; make one with: {command}{' --miniature' * miniature}"
        )
    return max(found, key=_score_and_age)


def chosen_checkpoint(name: str, experiment: Path, *, miniature: bool) -> Path:
    """The checkpoint that a flag means: `best` of all runs of an experiment, a path, or a run's name.

    Raises:
        UserError: there is none, or several fit.
    """
    if name == "best":
        return best_checkpoint(experiment, miniature=miniature)
    return find_checkpoint(name, experiment, miniature=miniature)


def finished_run(run: Run, args: argparse.Namespace) -> dict[str, Any] | None:
    """What run.json says of a resumed run that is finished already; None where there is something left to do."""
    path = run.logs / "run.json"
    if not run.resume_from or not path.is_file():
        return None
    recorded = read_json(path)
    if "best" not in recorded:
        return None
    numbers = (recorded.get(name) for name in ("optimizer_steps", "max_steps", "max_epochs"))
    if not isinstance(recorded["best"], str) or not all(type(number) is int for number in numbers):
        raise UserError(f"{path}: is not what a finished run writes; it was changed, remove it to go on")
    updates = recorded["optimizer_steps"]
    ended_by_steps = 0 < recorded["max_steps"] <= updates
    enough_epochs = args.max_epochs <= recorded["max_epochs"] and not ended_by_steps
    return recorded if enough_epochs or 0 < args.max_steps <= updates else None
