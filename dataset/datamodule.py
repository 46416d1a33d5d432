"""SUNRGBDDataModule: question files and pictures -> batches.

A batch (tensors; B images, T tokens, S the vision tower's image size):

    text            input_ids, position_ids, labels (B, T) int64, attention_mask (B, 1, T, T) bool: see dataset.prompts
    student_images  pixel_values (B, tiles, 3, S, S) float32, image_sizes (B, 2), batch_num_images; {} for a blind student
    teacher_images  the same for the teacher; absent without a teacher
    question_ids    B lists of ids, in the order of the blocks; image_paths: B paths

`--batch_size` counts images; an image brings up to `questions_per_image` questions.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dataset.augmentation import augment
from dataset.depth import encode_depth, read_depth
from dataset.processor import ImageTextProcessor
from dataset.prompts import collate_prompts, pack_questions
from dataset.questions import QuestionRow, read_questions
from dataset.sunrgbd import Frame, read_frame, read_rgb
from utils import UserError

MODALITIES = ("rgb", "depth", "blind")
DEPTH_SOURCES = ("raw", "bfx")


@dataclass(frozen=True)
class ImageSettings:
    """What a model sees of a frame. Stored in every checkpoint, so that evaluation feeds the very same pixels."""

    modality: str  # one of MODALITIES
    depth_encoding: str = "metric_log3"
    depth_source: str = "raw"  # "raw" with holes, or "bfx", the data set's hole-filled 8-bit version
    image_tokens: str = "anyres"


def load_images(
    frame: Frame, wanted: list[ImageSettings], *, augment_rng: np.random.Generator | None = None
) -> list[np.ndarray | None]:
    """The pictures of one frame as the models see them. Training and evaluation both come through here.

    Args:
        frame: where the pictures and the camera are.
        wanted: one entry per model (student, teacher).
        augment_rng: augment with this generator; None = as recorded.

    Returns:
        Per entry: (H, W, 3) uint8 RGB, float32 encoded depth in [0, 1] with nan holes, or None for a blind model.
    """
    modalities = {settings.modality for settings in wanted}
    sources = {settings.depth_source for settings in wanted if settings.modality == "depth"}
    rgb = read_rgb(frame.root / frame.image_path) if "rgb" in modalities else None
    depth_m = read_depth(frame.root / _depth_file(frame, sources.pop())) if sources else None
    if rgb is not None and depth_m is not None and rgb.shape[:2] != depth_m.shape:
        raise UserError(
            f"{frame.path}: RGB is {rgb.shape[:2]} and depth {depth_m.shape} pixels; they must be registered"
        )
    intrinsics, tilt = frame.intrinsics, frame.tilt
    if augment_rng is not None and modalities != {"blind"}:
        rgb, depth_m, intrinsics, tilt = augment(rgb, depth_m, intrinsics=intrinsics, tilt=tilt, rng=augment_rng)

    def view(settings: ImageSettings) -> np.ndarray | None:
        if settings.modality == "depth":
            return encode_depth(depth_m, encoding=settings.depth_encoding, intrinsics=intrinsics, tilt=tilt)
        return rgb if settings.modality == "rgb" else None

    return [view(settings) for settings in wanted]


def _depth_file(frame: Frame, source: str) -> str:
    if source == "raw":
        return frame.depth_path
    if frame.depth_bfx_path is None:
        raise UserError(f"{frame.path}: no depth_bfx picture; use --depth_source raw")
    return frame.depth_bfx_path


class SUNRGBDDataset(Dataset):
    """One item is an image with its questions. Items are asked for as (epoch, index), which keys all randomness."""

    def __init__(
        self,
        root: Path,
        rows: list[QuestionRow],
        *,
        student: ImageSettings,
        teacher: ImageSettings | None = None,
        questions_per_image: int | None = None,
        augmentation: bool = False,
        seed: int = 0,
    ) -> None:
        self.root = root
        self.images: list[list[QuestionRow]] = group_by_image(rows)
        self.views = [student] if teacher is None else [student, teacher]
        self.questions_per_image = questions_per_image
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        rows = self.images[index]
        if self.questions_per_image is not None and len(rows) > self.questions_per_image:
            chosen = rng.choice(len(rows), self.questions_per_image, replace=False)
            rows = [rows[i] for i in sorted(chosen)]
        frame = read_frame(self.root, frame_path(rows[0]))
        images = load_images(frame, self.views, augment_rng=rng.spawn(1)[0] if self.augmentation else None)
        return {"rows": rows, "images": images}


def frame_path(row: QuestionRow) -> str:
    """The frame's folder: two levels above its picture."""
    return row.image_path.rsplit("/", 2)[0]


def group_by_image(rows: list[QuestionRow]) -> list[list[QuestionRow]]:
    """Rows of the same image together, images in order of first appearance."""
    groups: dict[str, list[QuestionRow]] = {}
    for row in rows:
        groups.setdefault(row.image_path, []).append(row)
    return list(groups.values())


def subset_of_images(rows: list[QuestionRow], share: float, *, seed: int) -> list[QuestionRow]:
    """The rows of a random `share` of the images; a smaller share of the same seed is contained in a larger one.

    Raises:
        UserError: the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise UserError(
            f"--subset_percentage {share}: give a share above 0 and at most 1 (0.1 = a tenth of the images)"
        )
    images = group_by_image(rows)
    order = np.random.default_rng((seed, 1)).permutation(len(images))
    kept = sorted(order[: max(1, round(share * len(images)))])
    return [row for i in kept for row in images[i]]


class ResumableBatchSampler(Sampler):
    """Shuffled batches of (epoch, index) as a pure function of seed, epoch and position.

    With `start` it begins the next epoch at that batch, which is how an interrupted run goes on without reading an image
    twice. Ranks take turns over the batches of one global order; the order is wrapped around so that all ranks take the
    same number of steps.
    """

    def __init__(
        self, n: int, batch_size: int, *, seed: int, shuffle: bool, rank: int = 0, world_size: int = 1
    ) -> None:
        self.n, self.batch_size, self.seed, self.shuffle = n, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = 0

    def __len__(self) -> int:  # constant even when resuming: Lightning ends the epoch by its own count of batches
        return -(-self.n // (self.batch_size * self.world_size))

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = (
            np.random.default_rng((self.seed, 0, self.epoch)).permutation(self.n) if self.shuffle else np.arange(self.n)
        )
        batches = [order[i : i + self.batch_size] for i in range(0, self.n, self.batch_size)]
        first, self.start = self.start, 0
        for step in range(first, len(self)):
            batch = batches[(step * self.world_size + self.rank) % len(batches)]
            yield [(self.epoch, int(index)) for index in batch]


class StatefulLoader(DataLoader):
    """A DataLoader whose position Lightning leaves alone, since ResumableBatchSampler takes care of it."""

    def state_dict(self) -> dict:
        """Nothing to keep: the position is in the checkpoint (see distillation.training)."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore."""


class SUNRGBDDataModule(pl.LightningDataModule):
    """Train and val batches of SUN RGB-D questions; see the module for the batch and `ImageSettings` for the pixels."""

    def __init__(
        self,
        *,
        root: Path,
        processor: ImageTextProcessor,
        student: ImageSettings,
        teacher: ImageSettings | None = None,
        batch_size: int = 1,
        questions_per_image: int | None = None,
        subset_percentage: float = 1.0,
        augmentation: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root, self.processor, self.student, self.teacher = root, processor, student, teacher
        self.batch_size, self.questions_per_image = batch_size, questions_per_image
        self.subset_percentage, self.augmentation = subset_percentage, augmentation
        self.num_workers, self.seed = num_workers, seed
        self.resume_batch = 0  # set when a run continues in the middle of an epoch
        self.train: SUNRGBDDataset | None = None
        self.val: SUNRGBDDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and check the question files, once. Raises UserError that names file and row."""
        if self.train is not None:
            return
        train_rows = subset_of_images(self.rows("train"), self.subset_percentage, seed=self.seed)
        self.train = self._dataset(
            train_rows, questions_per_image=self.questions_per_image, augmentation=self.augmentation
        )
        self.val = self._dataset(self.rows("val"))

    def rows(self, split: str) -> list[QuestionRow]:
        """All questions of `train`, `val` or `test`."""
        return read_questions(questions_file(self.root, split), root=self.root)

    def _dataset(self, rows: list[QuestionRow], **options: Any) -> SUNRGBDDataset:
        return SUNRGBDDataset(self.root, rows, student=self.student, teacher=self.teacher, seed=self.seed, **options)

    def train_dataloader(self) -> DataLoader:
        """Shuffled, resumable."""
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        sampler = ResumableBatchSampler(
            len(self.train), self.batch_size, seed=self.seed, shuffle=True, rank=rank, world_size=world_size
        )
        sampler.start = self.resume_batch % len(sampler)
        self.resume_batch = 0
        return self._loader(self.train, sampler)

    def val_dataloader(self) -> DataLoader:
        """In file order, without augmentation; more images per batch, since nothing is kept for a backward pass."""
        sampler = ResumableBatchSampler(len(self.val), 2 * self.batch_size, seed=self.seed, shuffle=False)
        return self._loader(self.val, sampler)

    def _loader(self, dataset: SUNRGBDDataset, sampler: ResumableBatchSampler) -> DataLoader:
        # A generator of its own: otherwise building the iterator draws from the global one and a resumed run drifts.
        return StatefulLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.collate,
            worker_init_fn=_leave_signals_to_the_trainer,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),
        )

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Items of the data set -> a batch, see the module."""
        names = ["student_images"] if self.teacher is None else ["student_images", "teacher_images"]
        views = [self.student] if self.teacher is None else [self.student, self.teacher]
        batch: dict[str, Any] = {
            "question_ids": [[row.id for row in item["rows"]] for item in items],
            "image_paths": [item["rows"][0].image_path for item in items],
        }
        for v, (name, settings) in enumerate(zip(names, views, strict=True)):
            blind = settings.modality == "blind"
            images = [item["images"][v] for item in items]
            batch[name] = {} if blind else self.processor.pixels(images, image_tokens=settings.image_tokens)
        prompts = [
            pack_questions(
                self.processor,
                [row.question for row in item["rows"]],
                [row.answer for row in item["rows"]],
                n_image_tokens=image_placeholders(self.processor, item["images"][0], self.student),
            )
            for item in items
        ]
        batch["text"] = collate_prompts(prompts, pad_token_id=self.processor.tokenizer.pad_token_id)
        return batch


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C and SIGTERM reach the loading processes too; they have to deliver until the trainer has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def image_placeholders(processor: ImageTextProcessor, image: np.ndarray | None, settings: ImageSettings) -> int:
    """Placeholder tokens of one picture in the prompt; 0 for a blind model."""
    if image is None:
        return 0
    return processor.count_image_tokens(*image.shape[:2], image_tokens=settings.image_tokens)


def questions_file(root: Path, split: str) -> Path:
    """`csv_data/{train,val,test}_dataset.csv` below the data root."""
    return root / "SUNRGBD" / "csv_data" / f"{split}_dataset.csv"
