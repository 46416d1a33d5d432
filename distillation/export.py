"""A trained student as a Hugging Face folder that carries its eyes: how it sees pictures, where it comes from."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataset.inputs.depth_encodings import ENCODINGS, GRADIENT_SCALE, HEIGHT_RANGE_M
from dataset.inputs.pictures import DEPTH_SOURCES, MODALITIES
from dataset.inputs.processor import IMAGE_TOKENS, ImageTextProcessor, save_processor
from dataset.inputs.prompts import render_question
from dataset.sunrgbd.depth import MAX_DEPTH_M, MIN_DEPTH_M
from distillation.card import model_card, short_path
from distillation.forward import has_lora
from utils import UserError, disk_errors, git_commit, model_source, part_path, read_json, remove_leftovers, write_json

DESCRIPTION = "student.json"  # in the exported folder
FORMAT = 1
SEEN = {  # what "sees" says -> known values
    "modality": MODALITIES,
    "depth_encoding": tuple(ENCODINGS),
    "depth_source": DEPTH_SOURCES,
    "image_tokens": IMAGE_TOKENS,
}
DEPTH_CONSTANTS = {
    "smallest_m": MIN_DEPTH_M,
    "largest_m": MAX_DEPTH_M,
    "height_range_m": HEIGHT_RANGE_M,
    "gradient_scale": GRADIENT_SCALE,
}
# What a record has besides the flags that decide the weights: the machine's, the run's, and what stands elsewhere.
NOT_FLAGS = frozenset(
    "script git_commit run run_name resume export export_dtype save_final_pt dry_run measure num_workers accelerator "
    "devices num_nodes strategy picture_cache vision_cache gradient_checkpointing focal_share tilt_degrees modality "
    "depth_encoding depth_source image_tokens student_name teacher_name teacher_checkpoint miniature "
    "teacher_outputs teacher_weights teacher_val_exact_match".split()
)
# The files of an export. Nothing else is ever uploaded.
PUBLISHED = (
    "README.md", DESCRIPTION, "config.json", "generation_config.json", "model*.safetensors",
    "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
TOLD = {  # for people only; exports of older versions lack some of it
    "student_name": lambda value: isinstance(value, str),
    "teacher": lambda value: isinstance(value, (str, type(None))),
    "checkpoint": lambda value: isinstance(value, str),
    "flags": lambda value: _plain(value, (str, int, float)),
    "git_commit": lambda value: _plain(value, (str, type(None))),
    "validation": lambda value: _plain(value, (int, float)),
    "depth_degradation": lambda value: type(value) in (int, float),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_model(
    model: nn.Module,
    processor: ImageTextProcessor,
    folder: Path,
    description: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    scores: Mapping[str, Any] | None = None,
) -> None:
    """Write a Hugging Face folder that stock transformers loads, with a card; LoRA adapters are merged.

    The model's weights are converted in place; call it when training is over. An interrupted export leaves no folder.

    Args:
        model: the student.
        processor: the student's.
        folder: to write.
        description: of `describe_student`, written beside the weights.
        dtype: of the written weights; in float32 the answers are those of the checkpoint.
        scores: content of metrics.json; None = the card says that the student was not scored.

    Raises:
        UserError: the disk is full or not writable.
    """
    part = part_path(folder)
    remove_leftovers(folder.parent)
    try:
        if has_lora(model):
            model = model.merge_and_unload()
        model.to(dtype)
        with disk_errors(folder, part=part, size=sum(weight.nbytes for weight in model.parameters())):
            part.parent.mkdir(parents=True, exist_ok=True)
            model.config.student_description = DESCRIPTION  # so that an export without its description is noticed
            model.save_pretrained(part)
            save_processor(processor, part)
            for weights in part.glob("*.safetensors"):  # which are written for their owner alone
                weights.chmod((part / "config.json").stat().st_mode)
            description = dict(description) | {"dtype": str(dtype).removeprefix("torch.")}
            write_json(part / DESCRIPTION, description)
            (part / "README.md").write_text(model_card(description, scores), encoding="utf-8")
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def published_files(folder: Path) -> list[Path]:
    """The files of an export that are there, without what somebody else has put beside them."""
    files = [file for pattern in PUBLISHED for file in sorted(folder.glob(pattern))]
    return [file for file in files if file.is_file() and not file.is_symlink()]  # a link may lead to anything


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
        "sees": {name: record[name] for name in SEEN},
        "depth": {
            "unit": "metres",
            **DEPTH_CONSTANTS,
            "no_measurement": "0 in the picture, and a value of 0 in all three channels",
            "code": "dataset/inputs/depth_encodings.py",
        },
        "camera": {
            "focal_share": record.get("focal_share"),
            "tilt_degrees": record.get("tilt_degrees"),
            "from": "focal length over width, and degrees by which the camera looks down: medians of training frames",
        },
        "prompt": {"before_the_image": before, "after_the_image": after} if before else {"text": after},
        "student_name": short_path(record["student_name"]),
        "teacher": (teacher := record.get("teacher_checkpoint") or record.get("teacher_name")) and short_path(teacher),
        "depth_degradation": record.get("depth_degradation", 0.0),
        "trained_by": record["script"],
        "git_commit": {"training": record["git_commit"], "export": git_commit()},
        "flags": training_flags(record),
        "checkpoint": short_path(str(checkpoint)),
        "validation": dict(validation),
        "miniature": record["miniature"],
    }


def training_flags(record: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a run that decide its weights, without those that were not given."""
    given = {name: value for name, value in record.items() if value is not None and value is not False and value != ""}
    flags = {name: value for name, value in given.items() if name not in NOT_FLAGS}
    return {name: short_path(value) if isinstance(value, str) else value for name, value in sorted(flags.items())}


def read_description(name: str) -> dict[str, Any] | None:
    """What an exported folder says about its student; None for a hub id, or a folder that is not one of our exports.

    Raises:
        UserError: the folder is an export whose description is missing, damaged, or of another version.
    """
    folder = Path(model_source(name))
    path = folder / DESCRIPTION
    if not path.is_file():
        config = folder / "config.json"
        if config.is_file() and DESCRIPTION == read_json(config).get("student_description"):
            raise UserError(f"{path}: is missing, so nobody knows what this student sees; export it again")
        return None
    description = read_json(path)
    if description.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path}: is of format {description['format']}, this code reads {FORMAT}; export it again")
    if problem := _problem(description):
        raise UserError(f"{path}: {problem}; export it again")
    return description


def _problem(description: Mapping[str, Any]) -> str | None:
    """What is wrong with a description; None = nothing."""
    sees, camera = description.get("sees"), description.get("camera")
    if not isinstance(sees, dict) or sees.keys() != SEEN.keys():
        return "does not say how the student sees"
    for name, choices in SEEN.items():
        if sees[name] not in choices:
            return f"says {name} {sees[name]}, and this code knows {', '.join(choices)}"
    constants = description.get("depth")
    for name, value in DEPTH_CONSTANTS.items():
        if not isinstance(constants, dict) or constants.get(name) != value:
            return f"was written for another depth encoding: {name} is {value} here"
    if not isinstance(camera, dict) or not _is_camera(camera.get("focal_share"), camera.get("tilt_degrees")):
        return "does not say what camera the student knows"
    if not isinstance(description.get("miniature"), bool) or not isinstance(description.get("trained_by"), str):
        return "does not say how the student was trained"
    for name, check in TOLD.items():
        if name in description and not check(description[name]):
            return f"says {name} {description[name]!r:.40}, which no export says"
    return None


def _plain(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether it is a map from names to values of these types."""
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, kinds) for k, v in value.items())


def _is_camera(focal_share: Any, tilt_degrees: Any) -> bool:
    """Whether these are a camera's numbers; None = not known."""
    numbers = [1.0 if focal_share is None else focal_share, 0.0 if tilt_degrees is None else tilt_degrees]
    return all(type(number) in (int, float) and math.isfinite(number) for number in numbers) and numbers[0] > 0
