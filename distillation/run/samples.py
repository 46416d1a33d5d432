"""A few validation frames with what the student answers, for TensorBoard: what a person would look at."""

import io
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image, ImageDraw, ImageFont
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from dataset.datamodule import SUNRGBDDataModule
from dataset.inputs.pictures import load_images
from dataset.page import RIGHT_COLOR, WRONG_COLOR, shown_pixels
from dataset.questions.answers import exact_match
from dataset.questions.rows import QuestionRow
from distillation.decoding import end_of_answer, greedy_answers, spoken
from distillation.run.checkpoints import checkpoint_bytes
from distillation.run.sharding import gathered
from utils import free_space, printable

N_FRAMES, QUESTIONS_PER_FRAME = 4, 2
LONGEST_ANSWER = 8  # tokens; most have one or two
SIDE, LINE_HEIGHT, LETTERS = 256, 16, 36  # of a frame on the sheet: pixels, pixels of a line, letters in it
INK = "black"
JPEG_QUALITY = 70


class AnswerSamples(Callback):
    """Logs a sheet of the same validation frames after every validation: depth, question, right answer, answer.

    A full disk must cost no checkpoint: a sheet is written behind those of its validation, and never into the last room
    for one.
    """

    def __init__(self, data: SUNRGBDDataModule) -> None:
        self.data = data
        self.pictures: list[Image.Image] = []  # read once
        self.waiting: tuple[int, Summary] | None = None  # the update of a sheet, and the sheet

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Ask on the first rank, no more pictures at a time than a validation step does."""
        answers_alone = not isinstance(module, FSDPModule)  # a sharded model needs all ranks for it
        if trainer.logger is None or (answers_alone and not trainer.is_global_zero):
            return
        data = self.data
        indices = sorted(set(np.linspace(0, len(data.val) - 1, N_FRAMES).round().astype(int).tolist()))
        self.pictures = self.pictures or [_picture(data, index) for index in indices]
        rows, answers, at_once = [], [], 2 * data.batch_size
        for start in range(0, len(indices), at_once):
            some, batch = data.asked_batch(indices[start : start + at_once], QUESTIONS_PER_FRAME)
            rows, answers = rows + some, answers + _answers(trainer, module, data, batch)
        if not trainer.is_global_zero:
            return
        columns = [_column(*frame) for frame in zip(self.pictures, rows, answers, strict=True)]
        self.waiting = trainer.global_step, _summary(_beside(columns))

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the sheet of a validation alone, behind its scores: these open a file that was closed with training."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._write(trainer, module)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the sheet of the epoch before."""
        self._write(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the last sheet."""
        self._write(trainer, module)

    def _write(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.waiting and free_space(Path(trainer.logger.log_dir)) >= checkpoint_bytes(module.student):
            step, summary = self.waiting
            trainer.logger.experiment.file_writer.add_summary(summary, step)
        self.waiting = None


@torch.no_grad()
def _answers(
    trainer: pl.Trainer, module: pl.LightningModule, data: SUNRGBDDataModule, batch: dict[str, Any]
) -> list[list[str]]:
    """Greedy answers by frame and question."""
    processor = data.processor
    batch = trainer.strategy.batch_to_device(batch)
    with trainer.precision_plugin.forward_context(), gathered(module):
        found = greedy_answers(
            module.student,
            batch["text"],
            batch["student_images"],
            eos_token_id=end_of_answer(processor),
            max_new_tokens=LONGEST_ANSWER,
            **spoken(processor),
        )
    return _decoded(found.tokens, processor.tokenizer)


def _decoded(tokens: list[list[list[int]]], tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    return [[" ".join(t.split()) for t in tokenizer.batch_decode(g, skip_special_tokens=True)] for g in tokens]


def _picture(data: SUNRGBDDataModule, index: int) -> Image.Image:
    """What the student sees of a frame: RGB, or depth in its three channels, black where nothing was measured."""
    (pixels,) = load_images(data.val.frame(index), [data.student])
    if pixels is None:
        return Image.new("RGB", (SIDE, SIDE // 4), "#DDDDDD")
    picture = Image.fromarray(shown_pixels(pixels))
    return picture.resize((SIDE, round(picture.height * SIDE / picture.width)))


def _column(picture: Image.Image, rows: list[QuestionRow], answers: list[str]) -> Image.Image:
    """A frame with its questions and answers below."""
    lines: list[tuple[str, str]] = []
    for row, answer in zip(rows, answers, strict=True):
        right = exact_match(answer, row.answer)
        lines += [(line, INK) for line in textwrap.wrap(printable(row.question), LETTERS)]
        lines.append((f"  right: {printable(row.answer)}"[:LETTERS], INK))
        lines.append((f"  answer: {printable(answer) or '(empty)'}"[:LETTERS], RIGHT_COLOR if right else WRONG_COLOR))
    column = Image.new("RGB", (SIDE, picture.height + LINE_HEIGHT * (len(lines) + 1)), "white")
    column.paste(picture)
    pen, font = ImageDraw.Draw(column), ImageFont.load_default(size=13)
    for number, (text, color) in enumerate(lines):
        pen.text((4, picture.height + 4 + LINE_HEIGHT * number), text, fill=color, font=font)
    return column


def _beside(columns: list[Image.Image]) -> Image.Image:
    """Columns side by side."""
    sheet = Image.new("RGB", ((SIDE + 8) * len(columns), max(column.height for column in columns)), "white")
    for number, column in enumerate(columns):
        sheet.paste(column, ((SIDE + 8) * number, 0))
    return sheet


def _summary(sheet: Image.Image) -> Summary:
    """A sheet as TensorBoard keeps it; a JPEG, since photographs take much more room as PNG."""
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=JPEG_QUALITY)
    image = Summary.Image(height=sheet.height, width=sheet.width, colorspace=3, encoded_image_string=buffer.getvalue())
    return Summary(value=[Summary.Value(tag="val/answers", image=image)])
