"""The teacher of a distillation: which one it is, whether it fits its student, and what it said about a batch."""

import argparse
import atexit
import gc
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaOnevisionConfig

from dataset.datamodule import SUNRGBDDataModule
from dataset.inputs.model_folder import model_folder, stored_weights
from dataset.inputs.pictures import ImageSettings, picture_key
from dataset.inputs.processor import ImageTextProcessor, load_processor
from dataset.inputs.prompts import pack_questions
from dataset.questions.answers import exact_match
from dataset.questions.blind import majority_per_type, question_text
from dataset.questions.rows import QuestionRow, csv_cells, group_by_image, subset_of_images, unanswered_file
from dataset.sunrgbd.frames import frame_group
from distillation.models import load_model, restore_student
from distillation.run.checkpoints import (
    ADDED_FLAGS,
    check_same_run,
    check_start,
    read_checkpoint,
    starting_checkpoint,
)
from distillation.run.folders import Run, chosen_checkpoint, experiment_folder
from distillation.run.machine import frozen_dtype, probe, resolve_precision
from distillation.teacher_cache import (
    MAX_ANSWER_TOKENS,
    Group,
    LiveTeacher,
    StoredOutputs,
    asked_answers,
    stored_outputs,
)
from utils import (
    ROOT,
    UserError,
    is_first_process,
    outputs_root,
    printable,
    read_json,
    sha256,
    source_digest,
    write_json,
)

WEIGHTS = ("*.safetensors", "*.json")
FORMAT = 2  # of what is stored; another number makes all old files unused
FITS = 0.85  # share of a GPU's memory that a teacher's weights may take: its activations need the rest
REMEMBERED = 64  # images whose outputs stay in memory: all answers of a batch are read one by one


class TeacherCache:
    """What the teacher said about all training and validation images."""

    def __init__(self, source: StoredOutputs | LiveTeacher, groups: Sequence[Group], n_train: int) -> None:
        """`groups` are the images in the order of the source; the first `n_train` of them are the training images."""
        self.source = source
        self.number = {rows[0].image_path: i for i, rows in enumerate(groups)}
        self.rows = dict(list(self.number.items())[:n_train])
        # By their words, since two question files may number their questions alike.
        self.position = {
            (rows[0].image_path, *asked): i for rows in groups for i, asked in enumerate(asked_answers(rows))
        }
        self._remembered: dict[int, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_remembered": {}}

    def _image(self, path: str) -> dict[str, Tensor]:
        number = self.number[path]
        if number not in self._remembered:
            if len(self._remembered) == REMEMBERED:
                del self._remembered[next(iter(self._remembered))]  # the oldest
            self._remembered[number] = self.source.image(number)
        return self._remembered[number]

    def answer(self, row: QuestionRow, *, gold: bool) -> tuple[list[int], Tensor]:
        """Tokens of the gold or the teacher's own answer, and the (len(tokens), H) hidden states that predict them.

        Its own answer is empty when it did not end within MAX_ANSWER_TOKENS.
        """
        outputs = self._image(row.image_path)
        i = self.position[row.image_path, row.question, row.answer if gold else None]
        start, end = outputs["offsets"][i : i + 2].tolist()
        return outputs["tokens"][start:end].tolist(), outputs["hidden"][start:end]

    def patches(self, image_path: str) -> Tensor:
        """(P, Dv) vision features of a picture's overview tile."""
        return self._image(image_path)["patches"]

    def constants(
        self, *, output_layer: bool = False, patches: bool = False, memory_bank: bool = False
    ) -> "TeacherConstants":
        """What a script's losses need of the teacher besides its outputs for a batch.

        Args:
            output_layer: for `logits`.
            patches: for `standardize` and `patches`.
            memory_bank: for `memory_bank`.

        Raises:
            UserError: a memory bank without negatives, see `TeacherConstants`.
        """
        return TeacherConstants(self, output_layer=output_layer, patches=patches, memory_bank=memory_bank)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (Dv,) of the vision features over all training images, per channel.

        Features are compared after standardizing both sides with these: SigLIP has a few channels a hundred times
        larger than the others, which would be all that a distance or a cosine sees.
        """
        pooled, squares = (values.double().mean(0) for values in self._pooled)
        return pooled.float(), (squares - pooled**2).clamp(min=1e-12).sqrt().float()

    def memory_bank(self) -> Tensor:
        """(N, Dv) mean standardized patch of every training image, in the order of `rows`: InfoNCE's candidates."""
        mean, std = self.statistics()
        return (self._pooled[0] - mean) / std

    @cached_property
    def _pooled(self) -> tuple[Tensor, Tensor]:
        """Means and mean squares, (N, Dv) each, of the training images."""
        found = self.source.pooled(list(self.rows.values()))
        return found["pooled"], found["squares"]

    def recordings(self) -> Tensor:
        """(N,) int64, equal for training images of one recording, which may show the same room."""
        groups = [frame_group(path.rsplit("/", 2)[0]) for path in self.rows]
        numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        return torch.tensor([numbers[group] for group in groups])

    def head(self) -> Tensor:
        """(V, H) the teacher's output layer, cropped to the tokenizer's length."""
        return self.source.head()

    def accuracy(self, rows: Sequence[QuestionRow], decode: Callable[[list[int]], str]) -> dict[str, float]:
        """Share of questions answered right (`exact_match` of the decoded tokens), per type and as "all"."""
        hits: dict[str, list[bool]] = {"all": []}
        for row in rows:
            right = exact_match(decode(self.answer(row, gold=False)[0]), row.answer)
            hits["all"].append(right)
            hits.setdefault(row.type, []).append(right)
        return {kind: sum(values) / len(values) for kind, values in hits.items()}


class TeacherConstants(nn.Module):
    """What does not change from batch to batch: output layer, patch statistics, memory bank.

    Part of a script's module, so that it moves to its device; in no checkpoint and without a gradient.
    """

    def __init__(self, cache: TeacherCache, *, output_layer: bool, patches: bool, memory_bank: bool) -> None:
        """See `TeacherCache.constants`.

        Raises:
            UserError: the memory bank has images of one recording only: none could be told apart from another.
        """
        super().__init__()
        if output_layer:
            self.register_buffer("output_layer", cache.head(), persistent=False)  # (V, H)
        if patches:
            mean, std = cache.statistics()  # (Dv,)
            self.register_buffer("patch_mean", mean, persistent=False)
            self.register_buffer("patch_std", std, persistent=False)
        if memory_bank:
            recordings = cache.recordings()
            if len(recordings.unique()) < 2:
                raise UserError(
                    f"InfoNCE needs training images of at least 2 recordings, there are {len(recordings)} images of "
                    "one; use more of them (--subset_percentage)"
                )
            self.register_buffer("bank", cache.memory_bank(), persistent=False)  # (N, Dv), a row per training image
            self.register_buffer("recordings", recordings, persistent=False)  # (N,)

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """(n, V) at the positions that predict answer tokens: the stored hidden states through the output layer."""
        return batch["teacher"]["hidden"].to(self.output_layer.dtype) @ self.output_layer.T

    def standardize(self, patches: Tensor) -> Tensor:
        """Vision features (B, P, Dv) of student or teacher, each channel by the teacher's mean and deviation."""
        return (patches - self.patch_mean) / self.patch_std

    def patches(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, P, Dv) the teacher's standardized vision features of a batch's images."""
        return self.standardize(batch["teacher"]["patches"])

    def memory_bank(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """For `info_nce`: the memory bank (N, Dv), rows of a batch's images (B,), rows that are no negatives (B, N).

        Other images of a recording may show the same room: as negatives they would be false ones.
        """
        rows = batch["teacher"]["memory_bank_rows"]
        same_recording = self.recordings[rows][:, None] == self.recordings  # (B, N)
        excluded = same_recording.scatter(1, rows[:, None], False)
        return {"memory_bank": self.bank, "positives": rows, "excluded": excluded}


@dataclass(frozen=True)
class NamedTeacher:
    """The teacher that the flags name."""

    name: str  # hub id or folder of its model
    checkpoint: Path | None  # None = stock
    recorded: dict[str, Any] | None  # the checkpoint's hyper-parameters
    bits: int = 16  # of its language model, see `load_model`

    def __str__(self) -> str:
        packed = "" if self.bits == 16 else f" in {self.bits} bits"
        if self.checkpoint is None:
            return self.name + packed
        return f"{self.checkpoint}{packed}, tuned on {100 * self.recorded['label_fraction']:g} % of the labels"

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The model, frozen weights in `dtype`, in eval mode."""
        if self.checkpoint is None:
            return load_model(self.name, dtype=dtype, bits=self.bits).eval()
        return restore_student(read_checkpoint(self.checkpoint), origin=str(self.checkpoint), dtype=dtype).eval()


def open_teacher(args: argparse.Namespace, data: SUNRGBDDataModule, run: Run) -> TeacherCache:
    """The outputs of the teacher that the flags name, for all training and validation images.

    Missing ones are computed, and the data module adds all of them to its batches from here on. The first process says
    how well the teacher answers the validation questions, and notes it in the run's record. With --dry_run two batches
    are computed, in a folder that is removed at the end.

    Raises:
        UserError: there is no such teacher, it does not see RGB, or its tokenizer or image patches are not the
            student's.
    """
    if args.augmentation:
        raise UserError(
            "--augmentation: the teacher's outputs are of whole pictures, crops would not match; leave it out"
        )
    start = starting_checkpoint(run, args)
    recorded = read_checkpoint(start)["hyper_parameters"] if start else {}
    named = named_teacher(args, recorded)
    images = ImageSettings("rgb", image_tokens=data.student.image_tokens)
    check_labels(args, named)
    check_images(named, images)
    processor = load_processor(named.name)
    check_same_language(processor, data.processor, teacher=named.name, student=args.student_name)
    check_same_vision(named.name, args.student_name)
    groups, n_train = teacher_groups(data, dry_run=args.dry_run)
    weights = model_digest(named.name, named.checkpoint)
    dtype = frozen_dtype(args.precision, args.accelerator)
    key = teacher_key(weights, processor, images, dtype, named.bits)
    # A run may go on with newer code, as it may at another commit; its teacher is the same, but its outputs are new.
    run.record["teacher_outputs"] = _short_digest({name: value for name, value in key.items() if name != "code"})
    run.record["teacher_checkpoint"] = str(named.checkpoint) if named.checkpoint else None
    run.record["teacher_bits"] = named.bits
    run.record["teacher_weights"] = weights[:16] + (" in 4 bits" if named.bits == 4 else "")
    if run.resume_from:  # before the teacher computes for hours
        check_same_run(recorded, run)
    elif start:
        check_start(start, recorded, run)
    teacher = TeacherCache(teacher_outputs(args, named, processor, images, key, groups, data.root), groups, n_train)
    if is_first_process() and not args.dry_run:
        scores = teacher.accuracy(
            [row for rows in groups[n_train:] for row in rows],
            partial(processor.tokenizer.decode, skip_special_tokens=True),
        )
        run.record["teacher_val_exact_match"] = round(scores["all"], 4)
        said = ", ".join(f"{kind} {score:.3f}" for kind, score in scores.items())
        print(printable(f"teacher: {named}; on val: {said}"))
        compare_widths(scores["all"], len(groups) - n_train, named, key, key | {"dtype": str(dtype)})
        warn_unless_above_blind(scores["all"], data)
    data.use_teacher(teacher)
    return teacher


def compare_widths(
    score: float, n_images: int, named: NamedTeacher, key: Mapping[str, Any], full: Mapping[str, Any]
) -> None:
    """Note a teacher's accuracy on val, and print that of one in 4 bits beside the same one's in 16, where it is known.

    Args:
        score: on the validation questions.
        n_images: of validation.
        named: the teacher.
        key: of its outputs.
        full: the key of its outputs in 16 bits.
    """
    folders = (outputs_folder() / _short_digest(which) for which in (key, full))
    own, other = (folder / "val.json" for folder in folders)
    if own.parent.is_dir():  # not with --teacher online
        write_json(own, {"exact_match": score, "images": n_images})
    if named.bits == 16 or named.checkpoint is not None:  # what was tuned in 4 bits was never anything else
        return
    known = read_json(other) if other.is_file() else {}
    if known.get("images") == n_images:
        print(f"the teacher's language model has 4 bits: {score:.3f} on val; in 16 it has {known['exact_match']:.3f}")
    else:
        print("the teacher's language model has 4 bits; what that costs on val is known after --teacher_bits 16")


def outputs_folder() -> Path:
    """Where the outputs of all teachers are, a folder each."""
    return outputs_root(ROOT / "distillation") / "teacher_outputs"


def teacher_outputs(
    args: argparse.Namespace,
    named: NamedTeacher,
    processor: ImageTextProcessor,
    images: ImageSettings,
    key: Mapping[str, Any],
    groups: Sequence[Group],
    root: Path,
) -> StoredOutputs | LiveTeacher:
    """What the teacher says about these images: from disk, or with --teacher online from the model itself.

    Args:
        args: of a script that distills.
        named: the teacher.
        processor: its processor.
        images: what it sees.
        key: what decides its outputs; their folder is named by it.
        groups: images with their questions.
        root: ROOT_DATA_DIR.
    """

    def live() -> LiveTeacher:
        model = named.load(frozen_dtype(args.precision, args.accelerator)).to(probe(args).strategy.root_device)
        precision = resolve_precision(args.precision, args.accelerator)
        return LiveTeacher(model, processor, root, images, precision, groups)

    if args.teacher == "online":
        return live()
    folder = outputs_folder()
    if args.dry_run:
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    record = {**key, "name": named.name, "checkpoint": str(named.checkpoint)}
    stored = stored_outputs(
        folder / _short_digest(key), groups, live, record, root=root, batch_size=2 * args.batch_size
    )
    if torch.cuda.is_available():  # the student needs the room, and its own peak is of interest
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return stored


def named_teacher(args: argparse.Namespace, before: Mapping[str, Any]) -> NamedTeacher:
    """The teacher that --teacher_name or --teacher_checkpoint means.

    Args:
        args: of a script that distills.
        before: hyper-parameters of the checkpoint that the run starts from; {} without one.

    Raises:
        UserError: there is no such teacher.
    """
    if not args.teacher_checkpoint:
        return NamedTeacher(args.teacher_name, None, None, bits_of_stock(args, before))
    path = chosen_checkpoint(args.teacher_checkpoint, experiment_folder("baseline_rgb7b"), miniature=args.miniature)
    recorded = read_checkpoint(path)["hyper_parameters"]
    if recorded["label_fraction"] is None:
        raise UserError(f"--teacher_checkpoint {path}: was trained without labels, it has no answers to pass on")
    bits = recorded.get("base_bits", 16)
    if args.teacher_bits not in ("auto", str(bits)):
        raise UserError(
            f"--teacher_bits {args.teacher_bits}: {path} was tuned with {bits}; leave it out, or tune one with "
            f"--base_bits {args.teacher_bits}"
        )
    return NamedTeacher(recorded["student_name"], path, recorded, bits)


def bits_of_stock(args: argparse.Namespace, before: Mapping[str, Any]) -> int:
    """Bits of a stock teacher, as --teacher_bits says.

    With `auto` those that it had before, in what this run starts from (`before`, see `named_teacher`); else 4 where its
    weights do not fit the GPU.
    """
    if args.teacher_bits != "auto":
        return int(args.teacher_bits)
    if before.get("teacher_name") == args.teacher_name and not before.get("teacher_checkpoint"):
        return before.get("teacher_bits", ADDED_FLAGS["teacher_bits"])
    device = probe(args).strategy.root_device
    if device.type != "cuda":
        return 16
    taken = stored_weights(model_folder(args.teacher_name)) * frozen_dtype(args.precision, args.accelerator).itemsize
    return 16 if taken < FITS * torch.cuda.get_device_properties(device).total_memory else 4


def check_images(named: NamedTeacher, images: ImageSettings) -> None:
    """Raises UserError unless a tuned teacher was tuned on the images that it is to see here."""
    for setting in ("modality", "image_tokens") if named.recorded else ():
        if named.recorded[setting] != (wanted := getattr(images, setting)):
            raise UserError(
                f"--teacher_checkpoint {named.checkpoint}: has {setting} {named.recorded[setting]}, a teacher here "
                f"needs {wanted}"
            )


def check_labels(args: argparse.Namespace, named: NamedTeacher) -> None:
    """A tuned teacher passes on every label that it was tuned on: --label_fraction may not withhold any of them.

    Raises:
        UserError: it does, and --any_teacher does not say that it is meant.
    """
    if named.recorded is None or args.any_teacher:
        return
    theirs, ours = named.recorded["label_fraction"], args.label_fraction or 1.0  # phase 1 reads no labels
    same_draw = all(named.recorded[name] == getattr(args, name) for name in ("seed", "subset_percentage"))
    if theirs > ours or (ours < 1 and not same_draw):
        raise UserError(
            f"--teacher_checkpoint {named.checkpoint}: was tuned on {100 * theirs:g} % of the labels (seed "
            f"{named.recorded['seed']}), this student may see {100 * ours:g} % (seed {args.seed}), and a teacher "
            "passes on what it was tuned on. Tune one with the same --label_fraction and --seed, use a stock one "
            "(--teacher_name), or add --any_teacher if it is meant"
        )


def warn_unless_above_blind(score: float, data: SUNRGBDDataModule) -> None:
    """Say so where a teacher knows no more about the validation questions than their words give away."""
    train, val = ([csv_cells(row) for row in data.rows(split)] for split in ("train", "val"))
    guesses = [majority_per_type(train, val), question_text(train, val)]
    blind = max(
        sum(exact_match(guess, row["Answers"]) for guess, row in zip(answers, val, strict=True)) / len(val)
        for answers in guesses
    )
    if score <= blind:
        print(
            f"warning: the teacher is right on {score:.3f} of the validation questions, a guess without the image on "
            f"{blind:.3f}: there is nothing to learn from its answers. Tune it first "
            "(distillation/baseline_rgb7b/train2.py), or choose another",
            file=sys.stderr,
        )


def teacher_groups(data: SUNRGBDDataModule, *, dry_run: bool) -> tuple[list[Group], int]:
    """Training images with all their questions, then the validation images; and how many of them are for training."""
    unlabelled = {}
    if unanswered_file(data.root).is_file():
        unlabelled = {rows[0].image_path: rows for rows in group_by_image(data.unlabelled_rows())}
    elif data.teacher_questions:
        raise UserError(
            f"--teacher_questions: no {unanswered_file(data.root)}; make it with: python dataset/prepare_sunrgbd.py"
        )
    gold = group_by_image(subset_of_images(data.rows("train"), data.subset_percentage, seed=data.seed))
    train = [rows + unlabelled.get(rows[0].image_path, []) for rows in gold]
    val = group_by_image(data.rows("val"))
    if dry_run:
        train, val = train[: 2 * data.batch_size], []
    return train + val, len(train)


def check_same_language(
    teacher_processor: ImageTextProcessor, student_processor: ImageTextProcessor, *, teacher: str, student: str
) -> None:
    """Raises UserError unless both models read and write the same tokens and cut pictures into the same patches."""
    theirs, ours = (
        {
            "tokenizer": processor.tokenizer.get_vocab(),
            # Templates of one family differ in what they do with video; what counts is the prompt that comes out.
            "chat template": pack_questions(processor, ["What is this?"], ["a chair"], n_image_tokens=1),
            "number of image tokens": processor.num_image_tokens,
        }
        for processor in (teacher_processor, student_processor)
    )
    for what in theirs:
        if theirs[what] != ours[what]:
            raise UserError(
                f"the {what} of teacher {teacher} is not that of student {student}; choose models of one family"
            )


def check_same_vision(teacher: str, student: str) -> None:
    """Raises UserError unless the vision features of both models have one width: they are compared patch by patch."""
    widths = [
        LlavaOnevisionConfig.from_pretrained(model_folder(name)).vision_config.hidden_size
        for name in (teacher, student)
    ]
    if widths[0] != widths[1]:
        raise UserError(
            f"the vision features of teacher {teacher} have {widths[0]} channels, those of student {student} "
            f"{widths[1]}; choose models of one family"
        )


def model_digest(name: str, checkpoint: Path | None) -> str:
    """Digest of a model's weights and configuration, and of the checkpoint on top of them."""
    folder = model_folder(name)
    digest = hashlib.sha256()
    for path in sorted(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        # The hub's cache links to files that are named by their own digest.
        blob = path.resolve().name if path.is_symlink() else ""
        digest.update(f"{path.name} {blob if len(blob) == 64 else sha256(path)}\n".encode())
    if checkpoint:
        digest.update(sha256(checkpoint).encode())
    return digest.hexdigest()


def teacher_key(
    model_digest: str, processor: ImageTextProcessor, images: ImageSettings, dtype: torch.dtype, bits: int = 16
) -> dict[str, Any]:
    """What decides the teacher's outputs besides pictures and questions."""
    image_processor = processor.image_processor.to_dict()
    pictures = picture_key(processor, images)
    tokenizer = processor.tokenizer.backend_tokenizer.to_str() + str(processor.chat_template)
    return {
        "format": FORMAT,
        "teacher": model_digest,
        "dtype": str(dtype) if bits == 16 else f"{dtype}, {bits} bits",
        "images": asdict(images),
        "image_processor": hashlib.sha256(
            json.dumps(image_processor, sort_keys=True, default=str).encode()
        ).hexdigest(),
        "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest(),
        "max_answer_tokens": MAX_ANSWER_TOKENS,
        "code": {
            "dataset": pictures["sources"],
            "distillation": source_digest(ROOT / "distillation", without=("losses.py",), subfolders=False),
            "libraries": [torch.__version__.split("+")[0], *pictures["libraries"]],  # torch for whatever device
        },
    }


def _short_digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
