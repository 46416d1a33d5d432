"""A trained student as a Hugging Face folder that carries its eyes: how it sees pictures, where it comes from."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from dataset.inputs.depth_encodings import GRADIENT_SCALE, HEIGHT_RANGE_M
from dataset.inputs.pictures import ImageSettings
from dataset.inputs.processor import ImageTextProcessor, save_processor
from dataset.inputs.prompts import render_question
from dataset.sunrgbd.depth import MAX_DEPTH_M, MIN_DEPTH_M
from utils import UserError, disk_errors, git_commit, model_source, part_path, read_json, remove_leftovers, write_json

DESCRIPTION = "student.json"  # in the exported folder
FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_model(
    model: nn.Module,
    processor: ImageTextProcessor,
    folder: Path,
    description: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a Hugging Face folder that stock transformers loads; LoRA adapters are merged into the weights.

    The model's weights are converted in place; call it when training is over. An interrupted export leaves no folder.

    Args:
        model: the student.
        processor: the student's.
        folder: to write.
        description: of `describe_student`, written beside the weights.
        dtype: of the written weights; in float32 the answers are those of the checkpoint.

    Raises:
        UserError: the disk is full or not writable.
    """
    part = part_path(folder)
    remove_leftovers(folder.parent)
    try:
        if isinstance(model, PeftModel):
            model = model.merge_and_unload()
        model.to(dtype)
        with disk_errors(folder, part=part, size=sum(weight.nbytes for weight in model.parameters())):
            part.parent.mkdir(parents=True, exist_ok=True)
            model.save_pretrained(part)
            save_processor(processor, part)
            write_json(part / DESCRIPTION, dict(description) | {"dtype": str(dtype).removeprefix("torch.")})
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def describe_student(
    record: Mapping[str, Any], processor: ImageTextProcessor, *, checkpoint: Path, validation: Mapping[str, float]
) -> dict[str, Any]:
    """What a student needs to see as it was trained to, and where it comes from, for people and programs.

    Args:
        record: of the run (see `distillation.run.folders.Run`).
        processor: the student's, for the prompt.
        checkpoint: whose weights are exported.
        validation: name and value of its validation score.
    """
    before, after = render_question(processor, "{question}", with_image=record["modality"] != "blind")
    return {
        "format": FORMAT,
        "sees": {name: record[name] for name in ("modality", "depth_encoding", "depth_source", "image_tokens")},
        "depth": {
            "unit": "metres",
            "smallest_m": MIN_DEPTH_M,
            "largest_m": MAX_DEPTH_M,
            "height_range_m": HEIGHT_RANGE_M,
            "gradient_scale": GRADIENT_SCALE,
            "no_measurement": "0 in the picture, and a value of 0 in all three channels",
            "code": "dataset/inputs/depth_encodings.py",
        },
        "camera": {
            "focal_share": record.get("focal_share"),
            "tilt_degrees": record.get("tilt_degrees"),
            "from": "focal length over width, and degrees by which the camera looks down: medians of training frames",
        },
        "prompt": {"before_the_image": before, "after_the_image": after} if before else {"text": after},
        "student_name": record["student_name"],
        "teacher": record.get("teacher_checkpoint") or record.get("teacher_name"),
        "trained_by": record["script"],
        "git_commit": {"training": record["git_commit"], "export": git_commit()},
        "checkpoint": f"{checkpoint.parent.name}/{checkpoint.name}",
        "validation": dict(validation),
        "miniature": record["miniature"],
    }


def read_description(name: str) -> dict[str, Any] | None:
    """What an exported folder says about its student; None for a hub id, or a folder that is not one of our exports.

    Raises:
        UserError: the folder is an export whose description is missing, damaged, or of another version.
    """
    folder = Path(model_source(name))
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    description = read_json(path)
    try:
        sees = description["sees"]
        ImageSettings(**sees)
        complete = description["format"] == FORMAT and all(isinstance(value, str) for value in sees.values())
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}: does not say how the student sees; export it again") from error
    if not complete:
        raise UserError(f"{path}: is of format {description['format']}, this code reads {FORMAT}; export it again")
    return description
