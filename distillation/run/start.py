"""Start a run: find the checkpoint that it goes on from or name a new one, and claim its folder."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from dataset.inputs.pictures import ImageSettings
from distillation.plan import say_plan
from distillation.run.checkpoints import read_checkpoint
from distillation.run.claim import claim, join, refuse_claimed
from distillation.run.folders import Run, finished_run, run_folder, run_folders
from distillation.run.machine import probe
from distillation.run.ranks import join_launcher
from utils import ROOT, UserError, check_writable, data_root, git_commit, is_first_process, outputs_root, printable

RUN_NAME_VARIABLE = "RUN_NAME_OF_FIRST_PROCESS"


def start_run(args: argparse.Namespace, script: str, student: ImageSettings, *, builds_on: str | None = None) -> Run:
    """Choose and claim the folder of a new run, or that of the run to continue.

    Args:
        args: of the common flags.
        script: its path.
        student: what it sees.
        builds_on: experiment whose checkpoint it starts from (a folder below distillation/); None = its own.

    Raises:
        UserError: there is no data, the run's folder is in use, or there is nothing to resume.
        SystemExit: after --dry_run has said what the run would cost, unless it is to --measure it, too.
    """
    join_launcher()
    if args.dry_run:
        say_plan(args, Path(script).resolve())
        if not args.measure:
            raise SystemExit(0)
    data_root(args.miniature)  # before minutes are spent on loading a model
    path = Path(script).resolve()
    experiment = outputs_root(path.parent)
    if not args.dry_run and is_first_process():  # the probes of several processes would get into each other's way
        check_places(args, experiment)
    probe(args)
    pl.seed_everything(args.seed, verbose=False)  # before adapters are initialised
    record = plain(vars(args)) | dataclasses.asdict(student)
    record |= {"script": path.relative_to(ROOT).as_posix(), "git_commit": git_commit()}
    last = checkpoint_to_resume(args, experiment, record["script"])
    given = last.parent.name if last else given_name(args)
    name = given or run_folder(datetime.now().strftime("%Y-%m-%d_%H-%M-%S"), miniature=args.miniature)
    run = Run(experiment, name, record | {"run": name}, resume_from=last, builds_on=builds_on)
    if args.dry_run or (last and finished_run(run, args)):  # nothing will be written there
        return run
    if is_first_process():
        run = take_folder(run, named=given is not None)
        os.environ[RUN_NAME_VARIABLE] = run.name
    else:
        join(run.checkpoints)
    return run


def check_places(args: argparse.Namespace, experiment: Path) -> None:
    """Raise UserError when a folder that the run will write into is not writable."""
    check_writable(experiment, "checkpoints and logs")
    for flag in ("export", "save_final_pt"):
        if path := getattr(args, flag):
            check_writable(path.parent, f"--{flag} {path}")


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as str, int, float, bool or None: anything else would make a checkpoint unloadable with weights_only."""
    return {k: v if isinstance(v, (str, int, float, bool, type(None))) else str(v) for k, v in values.items()}


def given_name(args: argparse.Namespace) -> str | None:
    """The folder name of a new run: that of --run_name or, in a further process, of the first; None = by the time.

    Raises:
        UserError: a launcher has started several processes, and no name is given.
    """
    # Lightning starts this script once more for each further device; those processes join the run of the first.
    own = is_first_process() or "TORCHELASTIC_RUN_ID" in os.environ
    joined = None if own else os.environ.get(RUN_NAME_VARIABLE)
    sizes = (os.environ.get(name) or "1" for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))  # of torchrun, of srun
    launched = max(map(int, sizes)) > 1 and not joined
    if launched and not args.run_name:
        raise UserError("--run_name: give one; processes that a launcher starts side by side cannot agree on a name")
    return joined or (run_folder(args.run_name, miniature=args.miniature) if args.run_name else None)


def take_folder(run: Run, *, named: bool) -> Run:
    """Claim the run's folder for this process. A run that got its name from the time takes the first unused one.

    Raises:
        UserError: another process holds it, or a new run would write over checkpoints.
    """
    if named:
        made = tuple(folder for folder in (run.logs, run.checkpoints) if not folder.exists())
    else:
        run = make_unused_folder(run)
        made = (run.logs, run.checkpoints)
    refuse_claimed(run.checkpoints, flag="--run_name")  # first: who writes there says more than that there is something
    refuse_used_folder(run)
    claim(run.checkpoints, flag="--run_name", made=made)
    refuse_used_folder(run)  # a run that has ended meanwhile
    return run


def make_unused_folder(run: Run) -> Run:
    """The run under a name of its own: runs that start in the same second get a number at the end of theirs."""
    for number in count(1):
        name = run.name if number == 1 else f"{run.name}-{number}"
        candidate = dataclasses.replace(run, name=name, record=run.record | {"run": name})
        with suppress(FileExistsError):
            candidate.checkpoints.mkdir(parents=True)
            return candidate


def refuse_used_folder(run: Run) -> None:
    """Raise UserError where a new run would write over checkpoints. A start that left none can be repeated."""
    if run.resume_from is None and any(run.checkpoints.glob("*.ckpt")):
        raise UserError(
            f"--run_name {run.record['run_name']}: {run.checkpoints} has checkpoints already; give another name, or "
            "--resume auto"
        )


def checkpoint_to_resume(args: argparse.Namespace, experiment: Path, script: str) -> Path | None:
    """The checkpoint that --resume means: None where it is not given, or `auto` finds none.

    Args:
        args: of the common flags.
        experiment: where this script writes.
        script: its path in the repository.

    Raises:
        UserError: there is no such run or file, none of the run's checkpoints is good, or it is of another run.
    """
    if args.resume is None:
        return None
    if args.resume == "auto":
        run = newest_run(args, experiment)
        last = newest_good(run) if run else None
        if is_first_process():
            found = f"continuing {last}" if last else "no checkpoint to continue, starting a new run"
            print(printable(f"--resume auto: {found}"))
        return last
    path = Path(args.resume)
    if path.name == args.resume and not path.exists():
        path = experiment / "checkpoints" / run_folder(args.resume, miniature=args.miniature)
    if not path.exists():
        raise UserError(f"--resume {args.resume}: no such file, and no such run in {experiment / 'checkpoints'}")
    last = newest_good(path.resolve()) if path.is_dir() else path.resolve()
    check_home(last, experiment, script, args)
    return last


def newest_run(args: argparse.Namespace, experiment: Path) -> Path | None:
    """The newest run that has a checkpoint, of those named --run_name where it is given; None without any."""
    named = args.run_name and run_folder(args.run_name, miniature=args.miniature)
    runs = run_folders(experiment, miniature=args.miniature)
    runs = [run for run in runs if any(run.glob("*.ckpt")) and named in (None, run.name)]
    return runs[-1] if runs else None


def newest_good(run: Path) -> Path:
    """The newest checkpoint in a run's folder that is as it was written: the last one, else the best one.

    Raises:
        UserError: there is none; says what is wrong with each.
    """
    faults = []
    for path in (*run.glob("last.ckpt"), *sorted(run.glob("best-*.ckpt"), reverse=True)):
        try:
            read_checkpoint(path, need_checksum=True)
        except UserError as error:
            faults.append(str(error))
            continue
        for fault in faults if is_first_process() else ():
            print(printable(f"warning: passed over {fault}"), file=sys.stderr)
        return path
    raise UserError(f"--resume: no good checkpoint in {run}: {'; '.join(faults)}; start again under another --run_name")


def check_home(path: Path, experiment: Path, script: str, args: argparse.Namespace) -> None:
    """Refuse a checkpoint that lies outside of the folder of the run that it records: that run would be written over.

    Raises:
        UserError: says where it belongs, and how to start a new run from it.
    """
    recorded = read_checkpoint(path)["hyper_parameters"]
    if recorded["script"] != script:
        raise UserError(f"--resume {path}: is of {recorded['script']}; continue it with that script")
    named = recorded.get("run_name") and run_folder(recorded["run_name"], miniature=recorded["miniature"])
    name = recorded.get("run") or named or path.parent.name  # runs that are older than `run` record what was given
    home = experiment / "checkpoints" / name
    if name != path.parent.name or path.parent != home.resolve():
        raise UserError(
            f"--resume {path}: is of run {name}, which writes into {home}; move it there to continue that run, or "
            f"start a new one from it with --load_checkpoint {path}"
        )
    if args.run_name and run_folder(args.run_name, miniature=args.miniature) != name:
        raise UserError(f"--run_name {args.run_name}: {path} is of run {name}; leave --run_name out")
