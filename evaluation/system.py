"""The system that an evaluation scores: its weights, its image settings, its answers."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from dataset.datamodule import image_placeholders
from dataset.inputs.degradations import Degradation
from dataset.inputs.pictures import ImageSettings, load_images
from dataset.inputs.processor import ImageTextProcessor, load_processor
from dataset.inputs.prompts import collate_prompts, pack_questions
from dataset.loading import follow_the_script
from dataset.questions.rows import QuestionRow, frame_path, group_by_image
from dataset.sunrgbd.frames import read_frame
from distillation.decoding import answer_probabilities, end_of_answer, greedy_answers, spoken
from distillation.export import read_description
from distillation.models import MINIATURE_STUDENT, STUDENT_NAME, load_model, restore_student
from distillation.run.checkpoints import read_checkpoint
from distillation.run.folders import EXPERIMENTS, chosen_checkpoint, experiment_folder
from distillation.run.machine import frozen_dtype, resolve_precision
from evaluation.answer_log import Answer, AnswerLog
from utils import ROOT, UserError, outputs_root, progress, sha256


def load_system(
    args: argparse.Namespace, path: Path | None, checkpoint: dict[str, Any] | None
) -> tuple[dict[str, Any], ImageSettings, torch.nn.Module, ImageTextProcessor]:
    """Load a system: what metrics.json says about it, its image settings, the model and its processor.

    Args:
        args: flags of the evaluation script.
        path: checkpoint to load; None = a stock model.
        checkpoint: content of `path`.

    Raises:
        UserError: nothing to load, a flag contradicts the checkpoint, or weights are not finite.
    """
    if path is None:
        system, images = stock_system(args)
        model = load_model(system["model_id"], dtype=frozen_dtype(args.precision))
    else:
        system, images = trained_system(args, path, checkpoint["hyper_parameters"])
        model = restore_student(checkpoint, origin=str(path), dtype=frozen_dtype(args.precision))
    refuse_broken_weights(model, origin=path or system["model_id"])
    system |= {"name": args.name or system["name"], **dataclasses.asdict(images)}
    return system, images, model, load_processor(system["model_id"])


def planned_system(args: argparse.Namespace) -> tuple[str, ImageSettings, torch.dtype | None, int]:
    """Of the system that the flags mean: its model, what it sees, the precision of a GPU, bits of the language model.

    Raises:
        UserError: there is no such checkpoint, or a flag contradicts it.
    """
    path = checkpoint_of_flags(args)
    recorded = read_checkpoint(path)["hyper_parameters"] if path else {}
    args.miniature |= knows_miniature_only(args, recorded)
    system, images = trained_system(args, path, recorded) if path else stock_system(args)
    half = None if args.precision == "32-true" else torch.bfloat16
    return system["model_id"], images, half, recorded.get("base_bits", 16)


def knows_miniature_only(args: argparse.Namespace, recorded: Mapping[str, Any]) -> bool:
    """Whether a system was trained on the built-in world; `recorded`: hyper-parameters of its checkpoint, or {}."""
    exported = read_description(args.model_id) if args.model_id else None
    return bool((recorded or exported or {}).get("miniature"))


def stock_system(args: argparse.Namespace) -> tuple[dict[str, Any], ImageSettings]:
    """A stock model, or one that was exported: its description and image settings.

    Raises:
        UserError: a flag would have no effect, or contradicts the export.
    """
    model_id = args.model_id or (MINIATURE_STUDENT if args.miniature else STUDENT_NAME)
    if (exported := read_description(model_id)) is not None:
        return exported_system(args, model_id, exported)
    for flag in ("depth_encoding", "depth_source"):
        if getattr(args, flag) and args.pixel_data_type != "depth":
            raise UserError(f"--{flag} {getattr(args, flag)}: goes with --pixel_data_type depth")
    images = ImageSettings(
        modality=args.pixel_data_type or "rgb",
        depth_encoding=args.depth_encoding or "metric_log3",
        depth_source=args.depth_source or "raw",
        image_tokens=args.image_tokens or ("one_tile" if args.miniature else "anyres"),
    )
    return {"model_id": model_id, "checkpoint": None, "name": f"{Path(model_id).name} {images.modality}"}, images


def exported_system(
    args: argparse.Namespace, model_id: str, exported: dict[str, Any]
) -> tuple[dict[str, Any], ImageSettings]:
    """An export of ours: its description and image settings. Raises UserError when a flag contradicts them."""
    recorded = exported["sees"] | {"student_name": model_id, "miniature": exported["miniature"]}
    images = recorded_images(args, recorded, Path(model_id))
    return {"model_id": model_id, "checkpoint": None, "name": f"{Path(model_id).name} {images.modality}"}, images


def trained_system(
    args: argparse.Namespace, path: Path, recorded: dict[str, Any]
) -> tuple[dict[str, Any], ImageSettings]:
    """A checkpoint of ours: its description and image settings.

    Args:
        args: flags of the evaluation script.
        path: the checkpoint.
        recorded: its hyper-parameters.

    Raises:
        UserError: a flag contradicts them.
    """
    images = recorded_images(args, recorded, path)
    experiment = Path(recorded["script"]).parent.relative_to("distillation").as_posix()
    meant = EXPERIMENTS[args.kd_model_type].format(phase=args.phase_no or 3) if args.kd_model_type else experiment
    if meant != experiment:
        raise UserError(f"--kd_model_type {args.kd_model_type} contradicts {path}, which is of {experiment}")
    blinded = " blind" if images.modality != recorded["modality"] else ""
    system = {"model_id": recorded["student_name"], "checkpoint": str(path), "sha256": sha256(path)}
    return system | {"name": f"{experiment}{blinded}"}, images


def refuse_broken_weights(model: torch.nn.Module, *, origin: Path | str) -> None:
    """Raise UserError when weights are not finite: such a model cannot answer anything."""
    broken = [name for name, weights in model.named_parameters() if not torch.isfinite(weights).all()]
    if broken:
        raise UserError(
            f"{origin}: {len(broken)} of its {sum(1 for _ in model.parameters())} weight tensors hold NaN or infinity "
            f"(first {broken[0]}), so it cannot answer anything; training diverged, evaluate an earlier checkpoint"
        )


def checkpoint_of_flags(args: argparse.Namespace) -> Path | None:
    """The checkpoint that the flags mean; None = the stock model.

    Raises:
        UserError: there is none, or a bare name fits several.
    """
    if args.ckpt_path is None and not args.load_checkpoint:
        return None
    everything = outputs_root(ROOT / "distillation")
    folder = experiment_folder(args.kd_model_type, args.phase_no) if args.kd_model_type else everything
    name = "best" if args.ckpt_path is None else args.ckpt_path
    return chosen_checkpoint(name, folder, miniature=args.miniature)


def recorded_images(args: argparse.Namespace, recorded: dict[str, Any], path: Path) -> ImageSettings:
    """The image settings of a checkpoint. Raises UserError when a flag contradicts them (blind never does)."""
    flags = {
        "pixel_data_type": "modality",
        "depth_encoding": "depth_encoding",
        "depth_source": "depth_source",
        "image_tokens": "image_tokens",
        "model_id": "student_name",
        "miniature": "miniature",
    }
    for flag, name in flags.items():
        given, known = getattr(args, flag), recorded[name]
        if given is not None and given != known and given != "blind":
            raise UserError(f"--{flag} {given} contradicts {path}, which was trained with {name} {known}; leave it out")
    images = ImageSettings(**{field.name: recorded[field.name] for field in dataclasses.fields(ImageSettings)})
    return dataclasses.replace(images, modality="blind") if args.pixel_data_type == "blind" else images


class ImageBatches(Dataset):
    """Batches of images, each with all of its questions behind one image prefix (see dataset.inputs.prompts)."""

    def __init__(
        self,
        root: Path,
        rows: list[QuestionRow],
        images: ImageSettings,
        processor: ImageTextProcessor,
        batch_size: int,
        degradation: Degradation | None = None,
    ) -> None:
        self.root, self.images, self.processor, self.degradation = root, images, processor, degradation
        groups = group_by_image(rows)
        self.batches = [groups[i : i + batch_size] for i in range(0, len(groups), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        groups = self.batches[index]
        frames = [read_frame(self.root, frame_path(group[0])) for group in groups]
        pictures = [load_images(frame, [self.images], degradation=self.degradation)[0] for frame in frames]
        blind = self.images.modality == "blind"
        prompts = [
            pack_questions(
                self.processor,
                [row.question for row in group],
                None,
                n_image_tokens=image_placeholders(
                    self.processor, None if picture is None else picture.shape[:2], self.images
                ),
            )
            for group, picture in zip(groups, pictures, strict=True)
        ]
        return {
            "rows": groups,
            "text": collate_prompts(prompts, pad_token_id=self.processor.tokenizer.pad_token_id),
            "images": {} if blind else self.processor.pixels(pictures, image_tokens=self.images.image_tokens),
        }


def answer_questions(
    model: torch.nn.Module,
    processor: ImageTextProcessor,
    root: Path,
    rows: list[QuestionRow],
    images: ImageSettings,
    args: argparse.Namespace,
    log: AnswerLog,
    degradation: Degradation | None = None,
) -> dict[str, Answer]:
    """Greedy answers by question id. An image goes through tower and language model once, for all of its questions.

    Those in the log are not asked again; the others are added batch by batch, of several processes each its share of
    the batches. A batch that a kill cut off is the same when it is asked again.
    """
    words = spoken(processor)
    batches = ImageBatches(root, rows, images, processor, args.batch_size, degradation)
    waiting = [i for i, groups in enumerate(batches.batches) if any(r.id not in log.answers for g in groups for r in g)]
    waiting = waiting[log.ranks.rank :: log.ranks.world_size]
    loader = DataLoader(
        batches, batch_size=None, sampler=waiting, num_workers=args.num_workers, worker_init_fn=follow_the_script
    )
    mixed = resolve_precision(args.precision) == "bf16-mixed"
    shown = progress(loader, total=len(waiting), label="answering, batch") if log.ranks.is_first else loader
    for batch in shown:
        text, pictures = ({k: v.to(model.device) for k, v in batch[part].items()} for part in ("text", "images"))
        with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
            found = greedy_answers(
                model,
                text,
                pictures,
                eos_token_id=end_of_answer(processor),
                max_new_tokens=args.max_new_tokens,
                **words,
            )
            probabilities = answer_probabilities(model, found, **words)
        log.add(_by_question(batch["rows"], found.tokens, probabilities, processor.tokenizer))
    return log.answers


def _by_question(
    rows: Sequence[Sequence[QuestionRow]],
    tokens: Sequence[Sequence[list[int]]],
    probabilities: Sequence[Sequence[float]],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Answer]:
    """Decoded answers by question id; all arguments are by image and question."""
    answers = {}
    for group, ids, shares in zip(rows, tokens, probabilities, strict=True):
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        for row, text, share in zip(group, texts, shares, strict=True):
            answers[row.id] = Answer(" ".join(text.split()), share)
    return answers
