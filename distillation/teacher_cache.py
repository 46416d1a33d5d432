"""The teacher's outputs for every training image, computed once, stored, verified, read back.

The teacher is a constant: its answers and features of an image are the same in every epoch and every run. So each image
with its questions goes through it once, ever. Stored per image:

    patches   (P, Dv)  vision features of the picture's overview tile, the tensor that the projector reads
    hidden    (t, H)   last hidden states that predict the answer tokens; through the frozen output layer: exact logits
    tokens    (t,)     those tokens, the end of the turn included
    offsets   (a + 1,) where each answer begins in `tokens` and `hidden`

and apart from them, since all images' are wanted at once:

    pooled    (Dv,)    the mean of the patches
    squares   (Dv,)    the mean of their squares

Each gold question has two answers, the gold one (teacher forcing) and the teacher's own greedy one; a question without
a gold answer has the teacher's own. An image's name is the digest of the picture's bytes and of its questions, the
folder's name that of the teacher's weights and settings: whatever changes leads to another file, never to a wrong one.

A start lists the folder; it opens the files of validation images, to say how often the teacher is right, and no others.
What does not match its checksum where it is read is removed,
and the next start computes it again.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dataset.datamodule import image_placeholders
from dataset.inputs.digests import DIGESTS, PictureDigests
from dataset.inputs.pictures import ImageSettings, load_images
from dataset.inputs.processor import ImageTextProcessor
from dataset.inputs.prompts import collate_prompts, pack_questions
from dataset.inputs.store import TensorStore
from dataset.questions.rows import QuestionRow, frame_path
from dataset.sunrgbd.frames import read_frame
from distillation.decoding import end_of_answer, greedy_answers, spoken
from distillation.forward import image_features, overview_patches
from distillation.run.data import check_disk
from distillation.run.machine import half_dtype
from utils import UserError, locked, progress, write_json

Group = Sequence[QuestionRow]  # the questions of one image
MAX_ANSWER_TOKENS = 12
BROKEN_TEACHER = "use another teacher, or another --precision"
HEAD, BANK = "head", "bank-"  # in the store: the output layer's name, and how names of `pooled` of many images begin


@dataclass(frozen=True)
class StoredOutputs:
    """The teacher's outputs on disk; each data loading process reads the files itself."""

    store: TensorStore
    names: tuple[str, ...]  # of the images, in their order

    def image(self, number: int) -> dict[str, Tensor]:
        """The outputs for one image."""
        return self._get(self.names[number])

    def pooled(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """`pooled` and `squares` of images, (N, Dv) each; stored as a whole, since reading N files takes long."""
        names = [pooled_name(self.names[number]) for number in numbers]
        whole = f"{BANK}{hashlib.sha256(' '.join(names).encode()).hexdigest()[:32]}"
        if (bank := self.store.get(whole)) is None:
            bank = stacked([self._get(name) for name in names])
            self.store.put(whole, bank)
        return bank

    def head(self) -> Tensor:
        """(V, H) the teacher's output layer, cropped to the tokenizer's length."""
        return self._get(HEAD)["head"]

    def _get(self, name: str) -> dict[str, Tensor]:
        tensors = self.store.get(name)
        if tensors is None:
            raise UserError(f"{self.store.folder}: {name} is missing or damaged; start again, it is made anew")
        refuse_not_finite(tensors, self.store.path(name), "remove the file, it is made anew")
        return tensors


@dataclass(frozen=True)
class LiveTeacher:
    """The teacher itself, which computes its outputs whenever they are wanted: slow, to compare with stored ones."""

    model: nn.Module  # in eval mode, on its device
    processor: ImageTextProcessor  # of the teacher; equals the student's
    root: Path  # ROOT_DATA_DIR
    images: ImageSettings  # what the teacher sees
    precision: str  # a Lightning precision, as in training
    groups: Sequence[Group]  # the images, in their order

    def image(self, number: int) -> dict[str, Tensor]:
        """The outputs for one image, made now."""
        (outputs,) = self.compute([self.groups[number]])
        return outputs

    def pooled(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """`pooled` and `squares` of images, (N, Dv) each, made now."""
        return stacked([pool(self.image(number)["patches"]) for number in numbers])

    def head(self) -> Tensor:
        """(V, H) the output layer, cropped to the tokenizer's length."""
        head = self.model.get_output_embeddings().weight[: len(self.processor.tokenizer)]
        refuse_not_finite({"head": head}, "output layer", BROKEN_TEACHER)
        return head.detach().cpu().contiguous().clone()

    def compute(self, groups: Sequence[Group]) -> list[dict[str, Tensor]]:
        """The outputs for a batch of images, see the module."""
        pictures = [load_images(read_frame(self.root, frame_path(rows[0])), [self.images])[0] for rows in groups]
        asked = [asked_answers(rows) for rows in groups]
        prompts = [
            pack_questions(
                self.processor,
                [question for question, _ in blocks],
                [answer for _, answer in blocks],
                n_image_tokens=image_placeholders(self.processor, picture.shape[:2], self.images),
            )
            for blocks, picture in zip(asked, pictures, strict=True)
        ]
        model, tokenizer = self.model, self.processor.tokenizer
        eos_token_id = end_of_answer(self.processor)
        text = {k: v.to(model.device) for k, v in collate_prompts(prompts, pad_token_id=tokenizer.pad_token_id).items()}
        pixels = {
            k: v.to(model.device)
            for k, v in self.processor.pixels(pictures, image_tokens=self.images.image_tokens).items()
        }
        half, outputs = half_dtype(self.precision), []
        with torch.no_grad(), torch.autocast(model.device.type, half, enabled=half is not None):
            features = image_features(model, pixels)
            patches = overview_patches(model, pixels, features)
            answers = greedy_answers(
                model,
                text,
                {"image_features": features},
                eos_token_id=eos_token_id,
                max_new_tokens=MAX_ANSWER_TOKENS,
                **spoken(self.processor),
            )
        for i, rows in enumerate(groups):
            own = _image_outputs(patches[i].cpu(), answers.tokens[i], answers.hidden[i], eos_token_id=eos_token_id)
            refuse_not_finite(own, rows[0].image_path, BROKEN_TEACHER)
            outputs.append(own)
        return outputs


def refuse_not_finite(tensors: Mapping[str, Tensor], where: Path | str, advice: str) -> None:
    """Raises UserError where an output of the teacher is NaN or infinite: the student's loss would be, too."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: the teacher's outputs hold NaN or infinity ({name}); {advice}")


def asked_answers(rows: Group) -> list[tuple[str, str | None]]:
    """What is stored of an image, in order: question and gold answer; question and None for the teacher's own."""
    return [(row.question, answer) for row in rows for answer in ((row.answer, None) if row.answer else (None,))]


def _image_outputs(
    patches: Tensor, tokens: Sequence[list[int]], hidden: Sequence[Tensor], *, eos_token_id: int
) -> dict[str, Tensor]:
    """Patches (P, Dv) and answers of one image as tensors. An answer that did not end is left empty, as no target."""
    whole = [(t, h) if t[-1] == eos_token_id else ([], h[:0]) for t, h in zip(tokens, hidden, strict=True)]
    return {
        "patches": patches.clone(),
        "hidden": torch.cat([states for _, states in whole]).cpu(),
        "tokens": torch.tensor([token for answer, _ in whole for token in answer], dtype=torch.long),
        "offsets": torch.tensor([0] + [len(answer) for answer, _ in whole]).cumsum(0),
    }


def pool(patches: Tensor) -> dict[str, Tensor]:
    """Patches (P, Dv) of an image -> `pooled` and `squares` (Dv,) float32: mean and mean square."""
    return {"pooled": patches.float().mean(0), "squares": patches.float().square().mean(0)}


def stacked(groups: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of the same names, stacked name by name."""
    return {name: torch.stack([group[name] for group in groups]) for name in groups[0]}


def pooled_name(name: str) -> str:
    """Where `pool` of an image is stored."""
    return f"{name}.pooled"


def stored_outputs(
    folder: Path,
    groups: Sequence[Group],
    live: Callable[[], LiveTeacher],
    record: Mapping[str, Any],
    *,
    root: Path,
    batch_size: int,
) -> StoredOutputs:
    """A teacher's stored outputs for these images; it is loaded only where some are missing or damaged.

    Processes that were started side by side each take their share of the images.

    Args:
        folder: of this teacher.
        groups: images with their questions.
        live: loads the teacher.
        record: written beside the outputs, for people.
        root: ROOT_DATA_DIR.
        batch_size: images per pass of the teacher.
    """
    store, digests = TensorStore(folder), PictureDigests(folder.parent / DIGESTS)
    names = [
        image_name(digests.of(root / rows[0].image_path), rows)
        for rows in progress(groups, total=len(groups), label="looking for the teacher's stored outputs, image")
    ]
    digests.save()

    def missing() -> list[int]:
        there = store.names()
        return [i for i, name in enumerate(names) if not there.issuperset((name, pooled_name(name)))]

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with locked(folder, shared=world_size > 1):  # another run with this teacher waits and finds its outputs
        own = [i for i in missing() if i % world_size == rank]  # whatever the others have stored by now
        if own or store.get(HEAD) is None:
            write_json(folder / "teacher.json", record)
            compute_and_store(store, [(names[i], groups[i]) for i in own], live(), batch_size=batch_size)
    if world_size > 1:
        with locked(folder):  # not before all others have done theirs
            pass
        if missing():  # what one of them could not do
            with locked(folder):
                if rest := missing():
                    compute_and_store(store, [(names[i], groups[i]) for i in rest], live(), batch_size=batch_size)
    return StoredOutputs(store, tuple(names))


def image_name(picture: str, rows: Group) -> str:
    """The digest of a picture, by that of its bytes, and of its questions."""
    digest = hashlib.sha256(picture.encode())
    for row in rows:
        digest.update("\n".join((row.question, row.answer, "")).encode())
    return digest.hexdigest()[:32]


def compute_and_store(
    store: TensorStore, missing: Sequence[tuple[str, Group]], teacher: LiveTeacher, *, batch_size: int
) -> None:
    """Compute the teacher's outputs for images. Interrupted, it goes on with the batch that it was at.

    Args:
        store: of this teacher.
        missing: name and questions of each image.
        teacher: the model.
        batch_size: images per pass.

    Raises:
        UserError: the disk has no room for what the first batch promises.
    """
    store.put(HEAD, {"head": teacher.head()})
    batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    for number, batch in enumerate(
        progress(batches, total=len(batches), label="computing the teacher's outputs, batch")
    ):
        outputs_of_batch = teacher.compute([rows for _, rows in batch])
        if number == 0:
            sizes = [sum(tensor.nbytes for tensor in outputs.values()) for outputs in outputs_of_batch]
            check_disk("the teacher's outputs", store.folder, sum(sizes) / len(sizes), len(missing))
        for (name, _), outputs in zip(batch, outputs_of_batch, strict=True):
            store.put(name, outputs)
            store.put(pooled_name(name), pool(outputs["patches"]))
