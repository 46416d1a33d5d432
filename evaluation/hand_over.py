"""A scored student for others: the folder with its card, and the upload to a hub."""

import argparse
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils import validate_repo_id

from dataset.inputs.processor import load_processor
from distillation.card import model_card, short_path
from distillation.export import (
    DTYPES,
    describe_student,
    export_model,
    published_files,
    read_description,
)
from distillation.models import restore_student
from evaluation.described import check_ladder, counted_rungs
from evaluation.ladder import RECORD
from utils import (
    UserError,
    atomic_path,
    check_writable,
    disk_errors,
    hf_token,
    model_source,
    part_path,
    printable,
    read_json,
    reason,
)


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
    same = path is None and args.export.resolve() == exported_folder(args.model_id).resolve()
    if args.export.exists() and not same:
        raise UserError(f"--export {args.export}: is there already; give another folder, or score it by --model_id")
    if args.robustness and args.pixel_data_type == "blind":
        raise UserError("--robustness: with --pixel_data_type blind another system is scored; leave one of them out")
    if args.push_to_hub:
        open_repository(args.push_to_hub)


def check_apart(export: Path | None, output: Path) -> None:
    """Raise UserError where the export would be the results folder, or one of them inside the other."""
    if export and (export.resolve() in (output.resolve(), *output.resolve().parents)):
        raise UserError(f"--export {export}: holds the results folder {output}; give another folder")


def exported_folder(model_id: str) -> Path:
    """The folder of an export of ours."""
    return Path(model_source(model_id))


def open_repository(name: str) -> None:
    """Make a repository on the hub, a private one, unless it is there; before hours of scoring.

    Raises:
        UserError: the name is none, there is no token, or the hub refuses.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {name}: {reason(error)}") from error
    if hf_token() is None:
        raise UserError("--push_to_hub: needs a token that may write: hf_token=... in .env")
    with hub_errors(name):
        api = HfApi(token=hf_token())
        api.create_repo(name, private=True, exist_ok=True)
        is_private = api.model_info(name).private
    print(printable(f"{name} on the hub: {'private' if is_private else 'public, everybody will see what is uploaded'}"))


@contextmanager
def hub_errors(name: str, advice: str = "") -> Iterator[None]:
    """Turn what the hub's client raises into a UserError, without the token, which some errors quote."""
    try:
        yield
    except Exception as error:  # of the client, or of one of the two network libraries below it
        where = os.environ.get("HF_ENDPOINT", "the hub")
        said = reason(error).replace(hf_token() or "\0", "***")
        raise UserError(f"--push_to_hub {name}: {where} refuses ({said}){advice}") from None


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
    column, exported = check_ladder(record, folder / RECORD), read_description(model) or {}
    names = {short_path(model), exported.get("checkpoint")}  # the ladder may be of the checkpoint that was exported
    system = next((s for s in record["systems"] if short_path(s["model"]) in names), None)
    if system is None:
        found = ", ".join(s["model"] for s in record["systems"])
        raise UserError(f"--robustness {folder}: has no results of {model}, but of {found}")
    rungs, summary = counted_rungs(system), system["summary"][column]
    return {
        "split": record["settings"]["split"],
        "n_images": record["questions"]["n_images"],
        "column": column,
        "rungs": len(rungs),
        "kinds": list(dict.fromkeys(rung["kind"] for rung in rungs)),
        **{name: summary.get(name) for name in ("clean", "mean", "kept")},
    }


def hand_over(
    args: argparse.Namespace, path: Path | None, checkpoint: dict | None, metrics: Mapping[str, Any], output: Path
) -> None:
    """Write the folder of what was scored, with its card, and upload it where --push_to_hub says so.

    Args:
        args: flags of the evaluation script.
        path: the checkpoint that was scored; None = an export of ours.
        checkpoint: its content.
        metrics: content of metrics.json.
        output: the results folder.

    Raises:
        UserError: the disk is full or not writable, or the hub refuses.
    """
    if path is None:
        renew_export(exported_folder(args.model_id), args.export, metrics)
    else:
        record = checkpoint["hyper_parameters"]
        processor = load_processor(record["student_name"])
        model = restore_student(checkpoint, origin=str(path), dtype=torch.float32, bits=16)
        validation = metrics["training"]["validation"]
        description = describe_student(record, processor, checkpoint=path, validation=validation)
        dtype = DTYPES[args.export_dtype or "float32"]
        export_model(model, processor, args.export, description, dtype=dtype, scores=metrics)
    print(printable(f"wrote {args.export}, with a card"))
    if args.push_to_hub:
        push(args.export, args.push_to_hub, output)


def renew_export(source: Path, folder: Path, metrics: Mapping[str, Any]) -> None:
    """Copy an export, its card with these scores; the same folder gets a new card. No half copy stays."""
    card = model_card(read_description(str(source)), metrics)
    if folder.resolve() == source.resolve():
        with atomic_path(folder / "README.md") as part:
            part.write_text(card, encoding="utf-8")
        return
    files, part = published_files(source), part_path(folder)
    try:
        with disk_errors(folder, part=part, size=sum(file.stat().st_size for file in files)):
            part.mkdir(parents=True)
            for file in files:
                shutil.copy(file, part / file.name)
            (part / "README.md").write_text(card, encoding="utf-8")
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def push(folder: Path, name: str, output: Path) -> None:
    """Upload an export, its `published_files` and no other.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    hub_logging.set_verbosity_error()
    files = [CommitOperationAdd(file.name, file) for file in published_files(folder)]
    again = f"; what is written stays, again with: --model_id {folder} --export {folder} --output {output}"
    with hub_errors(name, advice=f"{again} --push_to_hub {name}"):
        HfApi(token=hf_token()).create_commit(name, files, commit_message="Export")
    print(printable(f"uploaded to {name} on the hub"))
