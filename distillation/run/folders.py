"""Where runs write, and how users name them and their checkpoints."""

import argparse
import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from dataset.inputs.pictures import ImageSettings
from distillation.run.machine import is_first_process, probe
from utils import ROOT, UserError, data_root, git_commit, outputs_root, printable, read_json

RUN_NAME_VARIABLE = "RUN_NAME_OF_FIRST_PROCESS"
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

    @property
    def checkpoints(self) -> Path:
        """`<experiment>/checkpoints/<run>`."""
        return self.experiment / "checkpoints" / self.name

    @property
    def logs(self) -> Path:
        """`<experiment>/tensorboard_logs/<run>`."""
        return self.experiment / "tensorboard_logs" / self.name


def start_run(args: argparse.Namespace, script: str, student: ImageSettings) -> Run:
    """Choose the folders of a new run, or find the one to continue. Nothing is written yet.

    Raises:
        UserError: there is no data, the run folder is in use, or there is nothing to resume.
    """
    data_root(args.miniature)  # before minutes are spent on loading a model
    probe(args)
    pl.seed_everything(args.seed, verbose=False)  # before adapters are initialised
    path = Path(script).resolve()
    experiment = outputs_root(path.parent)
    record = plain(vars(args)) | dataclasses.asdict(student)
    record |= {"script": path.relative_to(ROOT).as_posix(), "git_commit": git_commit()}
    if args.resume and (last := _resume_checkpoint(args, experiment)):
        return Run(experiment, last.parent.name, record, resume_from=last)
    # Lightning starts this script once more for each further device; those processes join the run of the first.
    further = not is_first_process()
    joined = os.environ.get(RUN_NAME_VARIABLE) if further else None
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not joined
    if launched and not args.run_name:
        raise UserError("--run_name: give one; processes that a launcher starts side by side cannot agree on a name")
    name = args.run_name or joined or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    os.environ[RUN_NAME_VARIABLE] = name
    run = Run(experiment, f"miniature_{name}" if args.miniature else name, record)
    if run.checkpoints.exists() and not args.dry_run and not further:
        raise UserError(f"--run_name {name}: {run.checkpoints} is there already; give another name, or --resume auto")
    return run


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as str, int, float, bool or None: anything else would make a checkpoint unloadable with weights_only."""
    return {k: v if isinstance(v, (str, int, float, bool, type(None))) else str(v) for k, v in values.items()}


def _resume_checkpoint(args: argparse.Namespace, experiment: Path) -> Path | None:
    if args.resume != "auto":
        if not Path(args.resume).is_file():
            raise UserError(f"--resume {args.resume}: no such file")
        return Path(args.resume).resolve()
    runs = _runs(experiment, miniature=args.miniature)
    if args.run_name:
        runs = [run for run in runs if run.name.removeprefix("miniature_") == args.run_name]
    found = [run / "last.ckpt" for run in runs if (run / "last.ckpt").is_file()]
    print(
        "--resume auto: "
        + (printable(f"continuing {found[-1]}") if found else "no checkpoint to continue, starting a new run")
    )
    return found[-1] if found else None


def _runs(experiment: Path, *, miniature: bool) -> list[Path]:
    """Checkpoint folders of an experiment, oldest first; miniature and real runs are never mixed."""
    folders = [p for p in (experiment / "checkpoints").glob("*") if p.name.startswith("miniature_") == miniature]
    return _oldest_first(folders)


def _oldest_first(folders: Iterable[Path]) -> list[Path]:
    return sorted((p for p in folders if p.is_dir()), key=lambda p: p.stat().st_mtime)


def experiment_folder(name: str, phase: int | None = None) -> Path:
    """Where the experiment `--kd_model_type name` (and `--phase_no phase`) writes."""
    return outputs_root(ROOT / "distillation" / EXPERIMENTS[name].format(phase=phase or 3))


def find_checkpoint(name: str, folder: Path) -> Path:
    """The checkpoint that a user's flag means: a path, a run's folder or bare name (its best one), or a bare file name.

    Args:
        name: what was given.
        folder: bare names are looked up in the checkpoints folders below.

    Raises:
        UserError: nothing fits, or several do.
    """
    path = Path(name)
    if path.name == name and not path.is_file():
        found = sorted(folder.rglob(f"checkpoints/{name}")) + sorted(folder.rglob(f"checkpoints/*/{name}"))
        found = found or [path] * path.is_dir()
        if not found:
            runs = _oldest_first(folder.rglob("checkpoints/*"))[-NAMED_RUNS:]
            newest = ", ".join(dict.fromkeys(run.name for run in reversed(runs))) or "none"
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


def _score_and_age(checkpoint: Path) -> tuple[float, float]:
    """Sorts by the score in the name; of equal ones the newest comes last."""
    return float(checkpoint.stem.rsplit("score", 1)[1]), checkpoint.stat().st_mtime


def best_checkpoint(experiment: Path, *, miniature: bool) -> Path:
    """The checkpoint with the highest validation score among all runs of an experiment.

    Raises:
        UserError: there is none; names the command that makes one.
    """
    found = [p for run in _runs(experiment, miniature=miniature) for p in run.glob("best-*.ckpt")]
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
    return best_checkpoint(experiment, miniature=miniature) if name == "best" else find_checkpoint(name, experiment)


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
