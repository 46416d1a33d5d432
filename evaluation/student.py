"""A trained system in the hand: it looks at one picture and answers questions about it.

student = Student.load("path/to/export")
seen = student.look(read_own_depth(Path("depth.png"), "mm"))
print(student.ask(seen, "How many chairs are there?").text)
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dataset.datamodule import image_placeholders
from dataset.inputs.depth_encodings import encode_depth
from dataset.inputs.own_pictures import Camera, own_camera
from dataset.inputs.pictures import ImageSettings
from dataset.inputs.processor import ImageTextProcessor, load_processor
from dataset.inputs.prompts import question_tokens
from dataset.questions.rows import CONTROL_TOKENS
from distillation.decoding import (
    ImagePrefix,
    answer_probabilities,
    answers_behind,
    end_of_answer,
    read_prefix,
    spoken,
    word_logits,
)
from distillation.export import read_description
from distillation.models import load_model, restore_student
from distillation.run.checkpoints import read_checkpoint
from distillation.run.folders import find_checkpoint
from distillation.run.machine import frozen_dtype, resolve_precision
from evaluation.answer_log import Answer
from evaluation.system import refuse_broken_weights
from utils import ROOT, UserError, model_source, outputs_root

LONGEST_QUESTION = 2000  # characters


@dataclass(frozen=True)
class Reply:
    """What a student says to a question: its greedy answer, and what it would say with another first token."""

    answer: Answer
    others: list[Answer]  # the most probable first

    @property
    def text(self) -> str:
        """The answer's words."""
        return self.answer.text


@dataclass(frozen=True)
class Seen:
    """A picture that the student has looked at."""

    image: np.ndarray | None  # (H, W, 3) as `load_images` returns it: uint8 RGB, or float32 with nan holes
    prefix: ImagePrefix


class Student:
    """A model with all that it needs to see and speak. The answers are those of the evaluation script."""

    def __init__(
        self,
        model: nn.Module,
        processor: ImageTextProcessor,
        images: ImageSettings,
        *,
        name: str,
        precision: str = "auto",
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """`record`: what is known of its training: miniature, focal_share and tilt_degrees of its pictures, script."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.processor, self.images = model.to(device).eval(), processor, images
        self.name, self.record = name, record or {}
        self.mixed = resolve_precision(precision) == "bf16-mixed"

    @classmethod
    def load(
        cls, name: str, *, precision: str = "auto", image_tokens: str | None = None, miniature: bool = False
    ) -> "Student":
        """From an exported folder, a checkpoint (its path, its run's folder or name), or a stock model, which sees RGB.

        Args:
            name: which one.
            precision: auto, 32-true or bf16-mixed.
            image_tokens: of a stock model, which does not say how it was trained; None = anyres, one_tile on the
                built-in world.
            miniature: of two runs with this name the one on the built-in world is meant.

        Raises:
            UserError: nothing loadable there, or `image_tokens` contradicts how the student was trained.
        """
        if is_folder(name):
            return cls._of_folder(name, precision, image_tokens, miniature)
        path = find_checkpoint(name, outputs_root(ROOT / "distillation"), miniature=miniature)
        checkpoint = read_checkpoint(path)
        recorded = checkpoint["hyper_parameters"]
        model = restore_student(checkpoint, origin=str(path), dtype=frozen_dtype(precision))
        refuse_broken_weights(model, origin=path)
        images = recorded_images(recorded)
        check_image_tokens(image_tokens, images, name)
        processor = load_processor(recorded["student_name"])
        return cls(model, processor, images, name=str(path), precision=precision, record=recorded)

    @classmethod
    def _of_folder(cls, name: str, precision: str, image_tokens: str | None, miniature: bool) -> "Student":
        images, record = look_up(name, miniature=miniature)
        if record:
            check_image_tokens(image_tokens, images, name)
        elif image_tokens:
            images = replace(images, image_tokens=image_tokens)
        model = load_model(name, dtype=frozen_dtype(precision))
        refuse_broken_weights(model, origin=name)
        return cls(model, load_processor(name), images, name=name, precision=precision, record=record)

    @torch.no_grad()
    def look(self, picture: np.ndarray | None, camera: Camera | None = None) -> Seen:
        """Read a picture, once for all questions about it.

        Args:
            picture: for a depth student (H, W) float32 metres, 0 = no measurement; for an RGB one (H, W, 3) uint8; None
                for a blind one.
            camera: of a depth picture; None = centred, with the focal length and tilt that were usual in
                training.
        """
        image = picture
        if self.images.modality == "depth":
            camera = camera or self.usual_camera(picture.shape[1], picture.shape[0])
            image = encode_depth(
                picture, encoding=self.images.depth_encoding, intrinsics=camera.intrinsics, tilt=camera.tilt
            )
        pixels = {} if image is None else self.processor.pixels([image], image_tokens=self.images.image_tokens)
        shape = None if image is None else image.shape[:2]
        n_image_tokens = image_placeholders(self.processor, shape, self.images)
        head, _ = question_tokens(self.processor, "question", with_image=image is not None)
        ids = torch.tensor([[*head, *[self.processor.image_token_id] * n_image_tokens]], device=self.model.device)
        with self._autocast():
            pixels = {name: value.to(self.model.device) for name, value in pixels.items()}
            return Seen(image, read_prefix(self.model, ids, pixels))

    def usual_camera(self, width: int, height: int, **given: str | None) -> Camera:
        """A camera of `own_camera` with what was usual in training for what is not given."""
        usual = {name: self.record.get(name) for name in ("focal_share", "tilt_degrees")}
        return own_camera(width, height, **usual, **given)

    @torch.no_grad()
    def ask(self, seen: Seen, question: str, *, n_others: int = 0, max_new_tokens: int = 32) -> Reply:
        """Answer a question about a picture.

        Args:
            seen: of `look`.
            question: in words.
            n_others: how many other answers to return: the most probable answers behind other first tokens. One of
                them may be more probable than the greedy answer.
            max_new_tokens: longest answer.

        Raises:
            UserError: an empty or overlong question, or one with a control token.
        """
        check_question(question)
        _, block = question_tokens(self.processor, question, with_image=seen.image is not None)
        (answer,), first = self._answers(seen, [block], max_new_tokens)
        eos_token_id = end_of_answer(self.processor)
        probabilities, tokens = (found.tolist() for found in first.topk(min(n_others + 1, len(first))))
        starts = {token: p for token, p in zip(tokens[1:], probabilities[1:], strict=True) if token != eos_token_id}
        if not starts:
            return Reply(answer, [])
        rests, _ = self._answers(seen, [[*block, token] for token in starts], max_new_tokens, starts=list(starts))
        others = [Answer(a.text, p * a.probability) for a, p in zip(rests, starts.values(), strict=True)]
        return Reply(answer, sorted(others, key=lambda other: -other.probability))

    def _answers(
        self, seen: Seen, blocks: list[list[int]], max_new_tokens: int, *, starts: list[int] | None = None
    ) -> tuple[list[Answer], torch.Tensor]:
        """Greedy answers behind blocks of tokens, and the probabilities (V,) of the first block's first token.

        `starts`: the last token of each block where that belongs to the answer already.
        """
        words = spoken(self.processor)
        with self._autocast():
            found = answers_behind(
                self.model,
                seen.prefix,
                blocks,
                eos_token_id=end_of_answer(self.processor),
                max_new_tokens=max_new_tokens,
                **words,
            )
            (probabilities,) = answer_probabilities(self.model, found, **words)
            first = word_logits(self.model, found.hidden[0][0][0], **words).float()
        answers = []
        for number, (tokens, probability) in enumerate(zip(found.tokens[0], probabilities, strict=True)):
            whole = [*(starts[number : number + 1] if starts else []), *tokens]
            text = self.processor.tokenizer.decode(whole, skip_special_tokens=True)
            answers.append(Answer(" ".join(text.split()), probability))
        return answers, first.softmax(-1)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.mixed)


def look_up(name: str, *, miniature: bool = False) -> tuple[ImageSettings, Mapping[str, Any]]:
    """What a system sees, and what is known of its training (nothing of a stock model's), without loading it.

    Arguments and errors: see `Student.load`.
    """
    if not is_folder(name):
        path = find_checkpoint(name, outputs_root(ROOT / "distillation"), miniature=miniature)
        recorded = read_checkpoint(path)["hyper_parameters"]
        return recorded_images(recorded), recorded
    if (description := read_description(name)) is None:
        return ImageSettings("rgb", image_tokens="one_tile" if miniature else "anyres"), {}
    more = {"miniature": description["miniature"], "script": description["trained_by"]}
    return ImageSettings(**description["sees"]), description["camera"] | more


def is_folder(name: str) -> bool:
    """Whether a system is an export or a stock model, by folder or hub id, and no checkpoint."""
    return (Path(model_source(name)) / "config.json").is_file() or ("/" in name and not Path(name).exists())


def recorded_images(recorded: Mapping[str, Any]) -> ImageSettings:
    """The image settings that a checkpoint records."""
    return ImageSettings(**{field.name: recorded[field.name] for field in fields(ImageSettings)})


def check_image_tokens(given: str | None, images: ImageSettings, name: str) -> None:
    """Raise UserError where a flag contradicts what a student was trained with."""
    if given not in (None, images.image_tokens):
        raise UserError(f"--image_tokens {given}: {name} was trained with {images.image_tokens}; leave it out")


def check_question(question: str) -> None:
    """Raise UserError for a question that cannot be asked."""
    if any("\ud800" <= letter <= "\udfff" for letter in question):
        raise UserError("the question is not valid UTF-8; type it again")
    if not question.strip():
        raise UserError("the question is empty; ask something")
    if len(question) > LONGEST_QUESTION:
        raise UserError(f"the question has {len(question)} characters; {LONGEST_QUESTION} are the most")
    if found := [token for token in CONTROL_TOKENS if token in question]:
        raise UserError(f"the question contains {', '.join(found)}, which controls the model; leave it out")
