"""A scored student for others: the folder with its card, and the upload to a hub."""

import argparse
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dataset.inputs.processor import load_processor
from distillation.card import model_card
from distillation.export import (
    DESCRIPTION,
    DTYPES,
    describe_student,
    export_model,
    published_files,
    read_description,
)
from distillation.models import restore_student
from evaluation.ladder import RECORD
from utils import UserError, atomic_path, check_writable, disk_errors, hf_token, printable, read_json, reason


def check_hand_over(args: argparse.Namespace, path: Path | None) -> None:
    """Look at --export, --push_to_hub and --robustness before anything is scored.

    Args:
        args: flags of the evaluation script.
        path: the checkpoint that is scored; None = a model.

    Raises:
        UserError: there would be nothing to hand over, no room for it, or no way to the hub.
    """
    if not args.export:
        return
    check_writable(args.export.parent, "--export")
    exported = read_description(args.model_id) if args.model_id else None
    if path is None and exported is None:
        raise UserError(f"--export: {args.model_id or 'the stock model'} is no student of ours; give --ckpt_path")
    if args.pixel_data_type == "blind" and (exported is None or exported["sees"]["modality"] != "blind"):
        raise UserError("--export: with --pixel_data_type blind the card would tell of another system; leave one out")
    same = path is None and args.export.resolve() == Path(args.model_id).resolve()
    if args.export.exists() and not same:
        raise UserError(f"--export {args.export}: is there already; give another folder, or score it by --model_id")
    if args.push_to_hub:
        check_repository(args.push_to_hub)


def check_repository(name: str) -> None:
    """Raise UserError for a name that no repository can have, and without a token."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {name}: {reason(error)}") from error
    if hf_token() is None:
        raise UserError("--push_to_hub: needs a token that may write: hf_token=... in .env")


def robustness_of(folder: Path | None, model: str) -> dict[str, Any] | None:
    """The summary of a system in a folder of robustness.py; None without a folder.

    Args:
        folder: of --robustness.
        model: checkpoint or export that is scored.

    Raises:
        UserError: the folder has no results, or none of this system.
    """
    if folder is None:
        return None
    record = read_json(folder / RECORD)
    try:
        wanted = Path(model).resolve()
        system = next((s for s in record["systems"] if Path(s["model"]).resolve() == wanted), None)
        if system is None:
            found = ", ".join(str(s["model"]) for s in record["systems"])
            raise UserError(f"--robustness {folder}: has no results of {model}, but of {found}")
        column, summary = next(iter(system["summary"].items()))
        kinds = dict.fromkeys(rung["kind"] for rung in system["rungs"][1:])
        n_rungs = len(system["rungs"]) - 1
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(f"{folder / RECORD}: is not what robustness.py writes; score its systems again") from error
    asked = {"column": column, "n_questions": record["questions"]["n_questions"]}
    return asked | {"rungs": n_rungs, "kinds": list(kinds), **{n: summary.get(n) for n in ("clean", "mean", "kept")}}


def hand_over(args: argparse.Namespace, path: Path | None, checkpoint: dict | None, metrics: Mapping[str, Any]) -> None:
    """Write the folder of what was scored, with its card, and upload it where --push_to_hub says so.

    Args:
        args: flags of the evaluation script.
        path: the checkpoint that was scored; None = an export of ours.
        checkpoint: its content.
        metrics: content of metrics.json.

    Raises:
        UserError: the disk is full or not writable, or the hub refuses.
    """
    if path is None:
        renew_export(Path(args.model_id), args.export, metrics)
    else:
        record = checkpoint["hyper_parameters"]
        processor = load_processor(record["student_name"])
        model = restore_student(checkpoint, origin=str(path), dtype=torch.float32)
        validation = metrics["training"]["validation"]
        description = describe_student(record, processor, checkpoint=path, validation=validation)
        export_model(model, processor, args.export, description, dtype=DTYPES[args.export_dtype], scores=metrics)
    print(printable(f"wrote {args.export}, with a card"))
    if args.push_to_hub:
        push(args.export, args.push_to_hub)


def renew_export(source: Path, folder: Path, metrics: Mapping[str, Any]) -> None:
    """Copy an export, its card with these scores; the same folder gets a new card."""
    if folder.resolve() != source.resolve():
        files = published_files(source)
        with disk_errors(folder, size=sum(file.stat().st_size for file in files)):
            folder.mkdir(parents=True)
            for file in files:
                shutil.copy(file, folder / file.name)
    with atomic_path(folder / "README.md") as part:
        part.write_text(model_card(read_json(folder / DESCRIPTION), metrics), encoding="utf-8")


def push(folder: Path, name: str) -> None:
    """Upload an export, its `published_files` and no other; a new repository is private.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    api = HfApi(token=hf_token())
    files = [CommitOperationAdd(file.name, file) for file in published_files(folder)]
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.create_commit(repository.repo_id, files, commit_message="Export")
    except Exception as error:  # of the client, or of one of the two network libraries below it
        again = f"evaluate_onevision.py --model_id {folder} --export {folder} --push_to_hub {name}"
        where = os.environ.get("HF_ENDPOINT", "the hub")
        raise UserError(f"--push_to_hub {name}: {where} refuses ({reason(error)}); again with: {again}") from error
    print(printable(f"uploaded to {repository}; a new repository is private until you open it on its page"))
