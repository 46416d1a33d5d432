"""SUNRGBDDataModule: question files and pictures -> batches.

A batch (tensors; B images, T tokens, S the vision tower's image size):

    text            input_ids, position_ids, labels (B, T) int64, attention_mask (B, 1, Q, T) bool: see dataset.inputs.prompts
    student_images  pixel_values (B, tiles, 3, S, S) float32, image_sizes (B, 2), batch_num_images; {} for a blind student;
                    features (B, tiles, P, D) instead of pixel_values where a frozen tower has seen them (`use_features`)
    teacher         with a teacher, what it said about these images (`TeacherOutputs`):
        hidden      (n, H) its last hidden states, row by row for the n answer tokens of the batch
        gold        (n,) bool, whether the token is of a gold answer; the others are the teacher's own
        patches     (B, P, Dv) its vision features of the overview tiles
        valid_share (B, P) float32 in [0, 1], how much of each patch has depth: 0 in holes and padding
        bank_rows   (B,) int64, the images' rows in the bank of InfoNCE; -1 for validation images, which have none
    question_ids    B lists of ids, in the order of the blocks; image_paths: B paths
    counts          items of the batch, what the sums of its loss terms are over:
        gold_tokens     tokens of gold answers, the end of the turn included
        answer_tokens   tokens of all answers, the teacher's own included
        images          B
        patches         with a teacher, the sum of `valid_share`
    update, spare   in training instead of counts: those of the whole optimizer update, see `dataset.inputs.sampler.UpdateLoader`

`--batch_size` counts images; an image brings up to `questions_per_image` questions of the training file, those with a gold
answer first, and, with a teacher, up to `teacher_questions` further ones without a gold answer. Where there are more than that,
they take turns from epoch to epoch.
"""

import signal
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataset.inputs.pictures import ImageSettings, Picture, PictureCache, load_images, make_picture
from dataset.inputs.processor import ImageTextProcessor
from dataset.inputs.prompts import IGNORE, collate_prompts, pack_questions
from dataset.inputs.sampler import ImageOrder, MicroBatchSampler, UpdateLoader
from dataset.questions.rows import (
    QuestionRow,
    frame_path,
    group_by_image,
    questions_file,
    read_questions,
    subset_of_images,
    unanswered_file,
    withhold_labels,
)
from dataset.sunrgbd.frames import Frame, read_frame
from utils import UserError


class TeacherOutputs(Protocol):
    """What the data module needs of a teacher; `distillation.teacher.TeacherCache` is one."""

    rows: dict[str, int]  # image path -> row in the bank

    def answer(self, row: QuestionRow, *, gold: bool) -> tuple[list[int], Tensor]:
        """Tokens of the gold or the teacher's own answer, and the (len(tokens), H) hidden states that predict them."""

    def patches(self, image_path: str) -> Tensor:
        """(P, Dv) vision features of the overview tile."""


class SUNRGBDDataset(Dataset):
    """One item is an image with its questions. Items are asked for as (epoch, index), which keys all randomness."""

    def __init__(
        self,
        root: Path,
        rows: list[QuestionRow],
        *,
        processor: ImageTextProcessor,
        student: ImageSettings,
        questions_per_image: int | None = None,
        further: list[QuestionRow] | None = None,
        further_per_image: int = 0,
        augmentation: bool = False,
        cache: PictureCache | None = None,
        seed: int = 0,
    ) -> None:
        self.root, self.processor, self.cache = root, processor, cache
        self.images: list[list[QuestionRow]] = group_by_image(rows)
        self.further = {group[0].image_path: group for group in group_by_image(further or [])}
        self.further_per_image = further_per_image
        self.student = student
        self.questions_per_image = questions_per_image
        self.augmentation = augmentation
        self.seed = seed
        self.features: PictureCache | None = None  # set by `SUNRGBDDataModule.use_features`
        self._frames: dict[int, Frame] = {}  # camera and file names, read once

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        rows = self.images[index]
        rng = np.random.default_rng((self.seed, epoch, index)) if self.augmentation else None
        picture = self._picture(self.frame(index), rng)
        order = np.random.default_rng((self.seed, index))  # the same in every epoch
        further = self.further.get(rows[0].image_path, [])
        labelled = _turn([row for row in rows if row.answer], self.questions_per_image, epoch, order)
        # Those with a gold answer come first: they are few where labels are withheld.
        room = None if self.questions_per_image is None else self.questions_per_image - len(labelled)
        unlabelled = _turn([row for row in rows if not row.answer], room, epoch, order)
        return {
            "rows": labelled + unlabelled + _turn(further, self.further_per_image, epoch, order),
            "picture": picture,
        }

    def frame(self, index: int) -> Frame:
        """The frame of an image."""
        if index not in self._frames:
            self._frames[index] = read_frame(self.root, frame_path(self.images[index][0]))
        return self._frames[index]

    def _picture(self, frame: Frame, augment_rng: np.random.Generator | None) -> Picture | None:
        """None for a blind student."""

        def make() -> Picture:
            (image,) = load_images(frame, [self.student], augment_rng=augment_rng)
            return make_picture(image, self.processor, self.student.image_tokens)

        if self.student.modality == "blind":
            return None
        if self.features:
            return _found(self.features.find(frame), frame)
        return self.cache.get(frame, make) if self.cache else make()


def _found(picture: Picture | None, frame: Frame) -> Picture:
    if picture is None:
        raise UserError(
            f"{frame.path}: its vision features were damaged since the start; start again, they are made anew"
        )
    return picture


def _turn(rows: list[QuestionRow], most: int | None, epoch: int, order: np.random.Generator) -> list[QuestionRow]:
    """At most so many of the rows, others in each epoch, until all have had their turn."""
    if most is None or len(rows) <= most:
        return rows
    turns = order.permutation(len(rows))
    return [rows[i] for i in sorted(turns[(epoch * most + k) % len(rows)] for k in range(most))]


class SUNRGBDDataModule(pl.LightningDataModule):
    """Train and val batches of SUN RGB-D questions; see the module for the batch and `ImageSettings` for the pixels."""

    def __init__(
        self,
        *,
        root: Path,
        processor: ImageTextProcessor,
        student: ImageSettings,
        batch_size: int = 1,
        accumulate_grad_batches: int = 1,
        questions_per_image: int | None = None,
        teacher_questions: int = 0,
        subset_percentage: float = 1.0,
        label_fraction: float = 1.0,
        augmentation: bool = False,
        cache: PictureCache | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root, self.processor, self.student, self.cache = root, processor, student, cache
        self.batch_size, self.accumulate_grad_batches = batch_size, accumulate_grad_batches
        self.questions_per_image = questions_per_image
        self.teacher_questions, self.label_fraction = teacher_questions, label_fraction
        self.subset_percentage, self.augmentation = subset_percentage, augmentation
        self.num_workers, self.seed = num_workers, seed
        self.resume_batch = 0  # set when a run continues in the middle of an epoch
        self.teacher: TeacherOutputs | None = None  # set by `use_teacher`
        self.images_per_epoch: int | None = None
        self.train: SUNRGBDDataset | None = None
        self.val: SUNRGBDDataset | None = None
        self._files: dict[Path, list[QuestionRow]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read and check the question files, once. Raises UserError that names file and row."""
        if self.train is not None:
            return
        rows = subset_of_images(self.rows("train"), self.subset_percentage, seed=self.seed)
        self.images_per_epoch = len(group_by_image(rows))
        answered = [row for row in withhold_labels(rows, self.label_fraction, seed=self.seed) if row.answer]
        self.train = self._train_set(answered)
        # A checkpoint chosen on labels has used them: as few of the validation questions as of the training questions.
        labelled = [row for row in withhold_labels(self.rows("val"), self.label_fraction, seed=self.seed) if row.answer]
        self.val = self._dataset(labelled)

    def use_teacher(self, teacher: TeacherOutputs) -> None:
        """Train on all images that the teacher has seen: what has no gold answer is answered by the teacher."""
        rows = subset_of_images(self.rows("train"), self.subset_percentage, seed=self.seed)
        rows = withhold_labels(rows, self.label_fraction, seed=self.seed)
        self.teacher = teacher
        self.train = self._train_set(
            [row for row in rows if row.image_path in teacher.rows],
            further=self.unanswered_rows() if self.teacher_questions else None,
            further_per_image=self.teacher_questions,
        )

    def use_features(self, features: PictureCache) -> None:
        """Read vision features instead of pixels; the cache must hold those of all training and validation images."""
        self.train.features = self.val.features = features

    def rows(self, split: str) -> list[QuestionRow]:
        """All questions of `train`, `val` or `test`."""
        return list(self._read(questions_file(self.root, split)))

    def unanswered_rows(self) -> list[QuestionRow]:
        """Questions about training images that have no gold answer."""
        return list(self._read(unanswered_file(self.root), answered=False))

    def _read(self, path: Path, **options: bool) -> list[QuestionRow]:
        """A question file, read and checked once: that takes seconds."""
        if path not in self._files:
            self._files[path] = read_questions(path, root=self.root, **options)
        return self._files[path]

    def _train_set(self, rows: list[QuestionRow], **options: Any) -> SUNRGBDDataset:
        options |= {"questions_per_image": self.questions_per_image, "augmentation": self.augmentation}
        return self._dataset(rows, **options)

    def _dataset(self, rows: list[QuestionRow], **options: Any) -> SUNRGBDDataset:
        options |= {"processor": self.processor, "student": self.student, "cache": self.cache, "seed": self.seed}
        return SUNRGBDDataset(self.root, rows, **options)

    def train_dataloader(self) -> UpdateLoader:
        """Shuffled, resumable, with the number of items of each batch's whole optimizer update."""
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        order = ImageOrder(len(self.train), seed=self.seed, shuffle=True, size=self.images_per_epoch)
        sampler = MicroBatchSampler(order, self.batch_size, rank=rank, world_size=world_size)
        sampler.start = self.resume_batch % len(sampler)
        self.resume_batch = 0
        return UpdateLoader(
            self.train,
            micro_batches=self.accumulate_grad_batches,
            sum_over_ranks=self._sum_over_ranks if world_size > 1 else None,
            **self._loader_options(sampler),
        )

    def val_dataloader(self) -> DataLoader:
        """In file order, without augmentation; more images per batch, since nothing is kept for a backward pass."""
        order = ImageOrder(len(self.val), seed=self.seed, shuffle=False)
        return DataLoader(self.val, **self._loader_options(MicroBatchSampler(order, 2 * self.batch_size)))

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        strategy = self.trainer.strategy
        return strategy.reduce(values.to(strategy.root_device), reduce_op="sum")

    def _loader_options(self, sampler: MicroBatchSampler) -> dict[str, Any]:
        return {
            "batch_sampler": sampler,
            "collate_fn": self.collate,
            "worker_init_fn": _leave_signals_to_the_trainer,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # One of its own: otherwise building the iterator draws from the global one and a resumed run drifts.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Items of the data set -> a batch, see the module."""
        pictures = [item["picture"] for item in items]
        rows = [item["rows"] for item in items]
        said = [[self._answer(row) for row in group] for group in rows]
        prompts = [
            pack_questions(
                self.processor,
                [row.question for row in group],
                [tokens for tokens, _ in answers],
                n_image_tokens=image_placeholders(self.processor, picture and picture.size.tolist(), self.student),
            )
            for picture, group, answers in zip(pictures, rows, said, strict=True)
        ]
        batch = {
            "question_ids": [[row.id for row in group] for group in rows],
            "image_paths": [group[0].image_path for group in rows],
            "text": collate_prompts(prompts, pad_token_id=self.processor.tokenizer.pad_token_id),
            "student_images": self._student_images(pictures),
        }
        answer_tokens = int((batch["text"]["labels"] != IGNORE).sum())
        batch["counts"] = {"gold_tokens": answer_tokens, "answer_tokens": answer_tokens, "images": len(items)}
        if self.teacher is not None:
            batch["teacher"] = self._teacher_outputs(pictures, rows, [hidden for group in said for _, hidden in group])
            batch["counts"]["gold_tokens"] = int(batch["teacher"]["gold"].sum())
            batch["counts"]["patches"] = float(batch["teacher"]["valid_share"].sum())
        return batch

    def _student_images(self, pictures: list[Picture | None]) -> dict[str, Tensor]:
        if self.student.modality == "blind":
            return {}
        tiles, sizes = [picture.tiles for picture in pictures], [picture.size for picture in pictures]
        images = self.processor.join(tiles, sizes, image_tokens=self.student.image_tokens)
        if self.train.features:
            images["features"] = images.pop("pixel_values")
        return images

    def _answer(self, row: QuestionRow) -> tuple[str | list[int], Tensor | None]:
        """Gold answer or the teacher's own, and the teacher's hidden states that predict it."""
        if self.teacher is None:
            return row.answer, None
        return self.teacher.answer(row, gold=bool(row.answer))

    def _teacher_outputs(
        self, pictures: list[Picture], rows: list[list[QuestionRow]], hidden: list[Tensor]
    ) -> dict[str, Tensor]:
        gold = [bool(row.answer) for group in rows for row in group]
        paths = [group[0].image_path for group in rows]
        return {
            "hidden": torch.cat(hidden),
            "gold": torch.tensor(gold).repeat_interleave(torch.tensor([len(states) for states in hidden])),
            "patches": torch.stack([self.teacher.patches(path) for path in paths]),
            "valid_share": torch.stack([picture.valid_share for picture in pictures]),
            "bank_rows": torch.tensor([self.teacher.rows.get(path, -1) for path in paths]),
        }


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C and SIGTERM reach the loading processes too; they have to deliver until the trainer has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def image_placeholders(
    processor: ImageTextProcessor, size: tuple[int, int] | list[int] | None, settings: ImageSettings
) -> int:
    """Placeholder tokens in the prompt of a picture of this (height, width); 0 without one, for a blind model."""
    return processor.count_image_tokens(*size, image_tokens=settings.image_tokens) if size else 0
