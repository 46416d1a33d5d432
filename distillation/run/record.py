"""What a checkpoint records, looked at where it is read: it may be a stranger's, or may have been changed by hand."""

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from dataset.inputs.depth_encodings import ENCODINGS
from dataset.inputs.pictures import DEPTH_SOURCES, MODALITIES
from dataset.inputs.processor import IMAGE_TOKENS
from utils import UNPRINTABLE, UserError

Check = Callable[[Any], bool]
LONGEST_TEXT = 4096  # characters; as long as a path can be
WIDEST = 2**14  # of a language model, which limits the rank of its adapters; the 7B teacher has 3584


def _one_of(choices: Collection[str]) -> tuple[str, Check]:
    return f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices


def _optional(kind: tuple[str, Check]) -> tuple[str, Check]:
    return f"{kind[0]} or None", lambda value: value is None or kind[1](value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST_TEXT and not UNPRINTABLE.search(value)


def _is_script(value: Any) -> bool:
    """Whether it is the path of a training script: a folder of its own below distillation/."""
    parts = PurePosixPath(value).parts if _is_text(value) else ()
    return len(parts) > 2 and parts[0] == "distillation" and ".." not in parts and value.endswith(".py")


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1


TEXT = ("a text of one line", _is_text)
SHARE = ("a share above 0 and at most 1", _is_share)
WHOLE = ("a whole number of at least 0", lambda value: type(value) is int and value >= 0)
COUNT = ("a whole number of at least 1", lambda value: type(value) is int and value >= 1)
PLAIN = ("a text, a number, True, False or None", lambda value: isinstance(value, (str, int, float, type(None))))
# What evaluation, a new run or a student needs of a record; all of it is as old as the first checkpoints.
NEEDED: dict[str, tuple[str, Check]] = {
    "script": ("the path of a training script below distillation/", _is_script),
    "student_name": TEXT,
    "miniature": ("True or False", lambda value: isinstance(value, bool)),
    "modality": _one_of(MODALITIES),
    "depth_encoding": _one_of(ENCODINGS),
    "depth_source": _one_of(DEPTH_SOURCES),
    "image_tokens": _one_of(IMAGE_TOKENS),
    "seed": WHOLE,
    "subset_percentage": SHARE,
    "label_fraction": _optional(SHARE),  # None in phase 1, which reads no labels
    "load_checkpoint": _optional(TEXT),
}
# What the records of some scripts have, or those since a flag was added.
OTHERS: dict[str, tuple[str, Check]] = {
    "lora_rank": _optional((f"a whole number up to {WIDEST}", lambda value: WHOLE[1](value) and value <= WIDEST)),
    "lora_alpha": _optional(WHOLE),
    "base_bits": ("16 or 4", lambda value: value in (16, 4)),
    "optimizer_bits": ("32 or 8", lambda value: value in (32, 8)),
    "teacher_bits": ("16 or 4", lambda value: value in (16, 4)),
    "batch_size": COUNT,
    "accumulate_grad_batches": COUNT,
    "teacher_name": _optional(TEXT),
    "teacher_checkpoint": _optional(TEXT),
    "teacher_weights": _optional(TEXT),
}


def check_record(recorded: Mapping[str, Any], path: Path) -> None:
    """Look at the hyper-parameters of a checkpoint.

    Raises:
        UserError: one that is needed is missing, or one has a value that no training script writes; names it.
    """
    checks = NEEDED | OTHERS
    for name in NEEDED.keys() - recorded.keys():
        raise UserError(f"{path}: its record lacks {name}; it was changed, or is not of this project")
    for name, value in recorded.items():
        wanted, check = checks.get(name, PLAIN)
        if not isinstance(name, str) or not check(value):
            raise UserError(f"{path}: records {name!s:.40} {value!r:.80} and not {wanted}; it was changed")
    if recorded.get("lora_rank") and not recorded.get("lora_alpha"):
        raise UserError(f"{path}: records lora_rank {recorded['lora_rank']} without lora_alpha; it was changed")


def check_weights(state: Any, path: Path) -> None:
    """Look at the weights of a checkpoint without reading their values.

    Raises:
        UserError: there are none of a student, or something else is among them; names it.
    """
    if not isinstance(state, dict) or not any(isinstance(name, str) and name.startswith("student.") for name in state):
        raise UserError(f"{path}: holds no weights of a student (student.*)")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or not _is_weight(value):
            kind = f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{path}: {name!s:.80} is {kind}, not a weight; it was changed")


def _is_weight(value: Tensor) -> bool:
    return value.is_floating_point() and value.layout is torch.strided and value.device.type == "cpu"


def check_resumable(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Look at what a run that goes on needs besides weights and record, see also `RestoredState`.

    Raises:
        UserError: a part is missing or of another type; names it.
    """
    parts = {"loops": dict, "callbacks": dict, "optimizer_states": list, "lr_schedulers": list, "position": dict}
    for name, kind in (parts | {"epoch": int, "global_step": int}).items():
        if not isinstance(checkpoint.get(name), kind):
            raise UserError(f"--resume {path}: has no {name} that could be continued; start from it: --load_checkpoint")
    position = checkpoint["position"]
    for name, least in (("batch", 0), ("steps", 1), ("world_size", 1)):
        if type(position.get(name)) is not int or position[name] < least:
            raise UserError(f"--resume {path}: records the position {name} {position.get(name)!r:.80}; it was changed")


def difference(found: Any, own: Any, where: str) -> str | None:
    """Where a stored state is not of the kind that a run itself has: its path, or None.

    Numbers may be others, as long as they are of the same type, finite and not negative where the run's own are not;
    entries may be missing, as older versions have less.
    """
    if isinstance(own, dict):
        if not isinstance(found, dict) or not found.keys() <= own.keys():
            return where
        return next(filter(None, (difference(found[key], own[key], f"{where}.{key}") for key in found)), None)
    if isinstance(own, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(found) != len(own):
            return where
        pairs = enumerate(zip(found, own, strict=True))
        return next(filter(None, (difference(a, b, f"{where}.{i}") for i, (a, b) in pairs)), None)
    if type(own) in (int, float):
        kinds = (int,) if type(own) is int else (int, float)
        same = type(found) in kinds and math.isfinite(found) and (found >= 0 or own < 0)
    else:
        same = found is None or type(found) is type(own) or (own is None and isinstance(found, bool))
    return None if same else where
