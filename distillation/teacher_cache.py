"""What the teacher says about every training image, computed once, stored, verified, read back.

The teacher is a constant: its answers and features of an image are the same in every epoch and every run. So it sees each
image with its questions once, ever. Stored per image:

    patches   (P, Dv)  vision features of the picture's overview tile, the tensor that the projector reads
    hidden    (t, H)   last hidden states that predict the answer tokens; through the frozen output layer: exact logits
    tokens    (t,)     those tokens, the end of the turn included
    starts    (a + 1,) where each answer begins in `tokens` and `hidden`

and apart from them, since all images' are wanted at once:

    pooled    (Dv,)    the mean of the patches
    squares   (Dv,)    the mean of their squares

Each gold question has two answers, the gold one (teacher forcing) and the teacher's own greedy one; a question without a
gold answer has the teacher's own. An image's name is the digest of the picture's bytes and of its questions, the folder's name
that of the teacher's weights and settings: whatever changes leads to another file, never to a wrong one. What does not match
its checksum is computed again.
"""

import argparse
import atexit
import gc
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig

from dataset.datamodule import SUNRGBDDataModule, frame_path, group_by_image, image_placeholders, subset_of_images
from dataset.pictures import ImageSettings, load_images, picture_key
from dataset.processor import ImageTextProcessor, load_processor
from dataset.prompts import collate_prompts, pack_questions
from dataset.questions import QuestionRow, csv_cells, unanswered_file
from dataset.store import TensorStore
from dataset.sunrgbd import frame_group, read_frame
from distillation.models import greedy_answers, image_features, load_model, overview_patches, restore_student
from distillation.training import (
    Run,
    best_checkpoint,
    check_disk,
    experiment_folder,
    find_checkpoint,
    frozen_dtype,
    half_dtype,
    probe,
    read_checkpoint,
    resolve_precision,
)
from evaluation.blind import majority_per_type, question_text
from evaluation.metrics import exact_match
from utils import (
    ROOT,
    UserError,
    hf_token,
    locked,
    model_source,
    outputs_root,
    progress,
    sha256,
    source_digest,
    write_json,
)

Group = Sequence[QuestionRow]  # the questions of one image
WEIGHTS = ("*.safetensors", "*.json")
MAX_ANSWER_TOKENS = 12
FORMAT = 2  # of what is stored; another number makes all old files unused
HEAD = "head"  # the output layer's name in the store
REMEMBERED = 64  # images whose outputs stay in memory: all answers of a batch are read one by one


@dataclass(frozen=True)
class StoredOutputs:
    """What the teacher said, on disk; each data loading process reads the files itself."""

    store: TensorStore
    names: tuple[str, ...]  # of the images, in their order

    def image(self, number: int) -> dict[str, Tensor]:
        """The outputs for one image."""
        return self._get(self.names[number])

    def pooled(self, number: int) -> dict[str, Tensor]:
        """`pooled` and `squares` of one image."""
        return self._get(pooled_name(self.names[number]))

    def head(self) -> Tensor:
        """(V, H) the teacher's output layer, cropped to the tokenizer's length."""
        return self._get(HEAD)["head"]

    def _get(self, name: str) -> dict[str, Tensor]:
        tensors = self.store.get(name)
        if tensors is None:
            raise UserError(f"{self.store.folder}: {name} was damaged since the start; start again, it is made anew")
        return tensors


@dataclass(frozen=True)
class LiveTeacher:
    """The teacher itself, asked whenever its outputs are wanted: slow, for comparison with what is stored."""

    model: nn.Module  # in eval mode, on its device
    processor: ImageTextProcessor  # of the teacher; equals the student's
    root: Path  # ROOT_DATA_DIR
    images: ImageSettings  # what the teacher sees
    precision: str  # a Lightning precision, as in training
    groups: Sequence[Group]  # the images, in their order

    def image(self, number: int) -> dict[str, Tensor]:
        """The outputs for one image, made now."""
        (outputs,) = self.look([self.groups[number]])
        return outputs

    def pooled(self, number: int) -> dict[str, Tensor]:
        """`pooled` and `squares` of one image, made now."""
        return pool(self.image(number)["patches"])

    def head(self) -> Tensor:
        """(V, H) the output layer, cropped to the tokenizer's length."""
        head = self.model.get_output_embeddings().weight[: len(self.processor.tokenizer)]
        return head.detach().cpu().contiguous().clone()

    def look(self, groups: Sequence[Group]) -> list[dict[str, Tensor]]:
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
        end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
        text = {k: v.to(model.device) for k, v in collate_prompts(prompts, pad_token_id=tokenizer.pad_token_id).items()}
        pixels = {
            k: v.to(model.device)
            for k, v in self.processor.pixels(pictures, image_tokens=self.images.image_tokens).items()
        }
        half = half_dtype(self.precision)
        with torch.no_grad(), torch.autocast(model.device.type, half, enabled=half is not None):
            features = image_features(model, pixels)
            patches = overview_patches(model, pixels, features)
            answers = greedy_answers(
                model,
                text,
                {"seen": features},
                vocab_size=len(tokenizer),
                end_of_turn=end_of_turn,
                max_new_tokens=MAX_ANSWER_TOKENS,
                forbidden=(self.processor.image_token_id, self.processor.video_token_id),
            )
        return [
            _image_outputs(patches[i].cpu(), answers.tokens[i], answers.hidden[i], end_of_turn=end_of_turn)
            for i in range(len(groups))
        ]


def asked_answers(rows: Group) -> list[tuple[str, str | None]]:
    """What is stored of an image, in this order: question and gold answer, and question and None for the teacher's own."""
    return [(row.question, answer) for row in rows for answer in ((row.answer, None) if row.answer else (None,))]


def _image_outputs(
    patches: Tensor, tokens: Sequence[list[int]], hidden: Sequence[Tensor], *, end_of_turn: int
) -> dict[str, Tensor]:
    """Patches (P, Dv) and answers of one image as tensors. An answer that did not end is left empty: half a one is no target."""
    whole = [(t, h) if t[-1] == end_of_turn else ([], h[:0]) for t, h in zip(tokens, hidden, strict=True)]
    return {
        "patches": patches.clone(),
        "hidden": torch.cat([states for _, states in whole]).cpu(),
        "tokens": torch.tensor([token for answer, _ in whole for token in answer], dtype=torch.long),
        "starts": torch.tensor([0] + [len(answer) for answer, _ in whole]).cumsum(0),
    }


def pool(patches: Tensor) -> dict[str, Tensor]:
    """Patches (P, Dv) of an image -> `pooled` and `squares` (Dv,) float32: mean and mean square."""
    return {"pooled": patches.float().mean(0), "squares": patches.float().square().mean(0)}


def pooled_name(name: str) -> str:
    """Where `pool` of an image is stored."""
    return f"{name}.pooled"


class TeacherCache:
    """What the teacher said about all training and validation images."""

    def __init__(self, source: StoredOutputs | LiveTeacher, groups: Sequence[Group], n_bank: int) -> None:
        """`groups` are the images in the order of the source; the first `n_bank` of them are the training images."""
        self.source = source
        self.number = {rows[0].image_path: i for i, rows in enumerate(groups)}
        self.rows = dict(list(self.number.items())[:n_bank])
        # By their words, since two question files may number their questions alike.
        self.place = {(rows[0].image_path, *asked): i for rows in groups for i, asked in enumerate(asked_answers(rows))}
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
        i = self.place[row.image_path, row.question, row.answer if gold else None]
        start, end = outputs["starts"][i : i + 2].tolist()
        return outputs["tokens"][start:end].tolist(), outputs["hidden"][start:end]

    def patches(self, image_path: str) -> Tensor:
        """(P, Dv) vision features of a picture's overview tile."""
        return self._image(image_path)["patches"]

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (Dv,) of the vision features over all training images, per channel.

        Features are compared after standardising both sides with these: SigLIP has a few channels a hundred times larger than
        the others, which would be all that a distance or a cosine sees.
        """
        pooled, squares = (values.double().mean(0) for values in self._pooled)
        return pooled.float(), (squares - pooled**2).clamp(min=1e-12).sqrt().float()

    def bank(self) -> Tensor:
        """(N, Dv) mean standardised patch of every training image, in the order of `rows`: what InfoNCE chooses from."""
        mean, std = self.statistics()
        return (self._pooled[0] - mean) / std

    @cached_property
    def _pooled(self) -> tuple[Tensor, Tensor]:
        """Means and mean squares, (N, Dv) each, of the training images."""
        found = [self.source.pooled(number) for number in self.rows.values()]
        return torch.stack([one["pooled"] for one in found]), torch.stack([one["squares"] for one in found])

    def recordings(self) -> Tensor:
        """(N,) int64, equal for training images of one recording, which may show the same room."""
        groups = [frame_group(path.rsplit("/", 2)[0]) for path in self.rows]
        numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        return torch.tensor([numbers[group] for group in groups])

    def head(self) -> Tensor:
        """(V, H) the teacher's output layer, cropped to the tokenizer's length."""
        return self.source.head()

    def accuracy(self, rows: Sequence[QuestionRow], decode: Callable[[list[int]], str]) -> dict[str, float]:
        """Share of questions that the teacher answers right (`exact_match` of the decoded tokens), per type and as "all"."""
        hits: dict[str, list[bool]] = {"all": []}
        for row in rows:
            right = exact_match(decode(self.answer(row, gold=False)[0]), row.answer)
            hits["all"].append(right)
            hits.setdefault(row.type, []).append(right)
        return {kind: sum(values) / len(values) for kind, values in hits.items()}


def open_teacher(args: argparse.Namespace, data: SUNRGBDDataModule, run: Run) -> TeacherCache:
    """The outputs of the teacher that the flags name, for all training and validation images; missing ones are computed.

    Says how well the teacher answers the validation questions, and notes it in the run's record. With --dry_run the teacher
    looks at two batches, in a folder that is removed at the end.

    Raises:
        UserError: there is no such teacher, it does not see RGB, or its tokenizer or image patches are not the student's.
    """
    if args.augmentation:
        raise UserError(
            "--augmentation: the teacher has seen the pictures as recorded, crops would not match; leave it out"
        )
    name, path, recorded = _named_teacher(args)
    check_labels(args, path, recorded)
    processor = load_processor(name)
    check_same_language(processor, data.processor, teacher=name, student=args.student_name)
    check_same_vision(name, args.student_name)
    images = ImageSettings("rgb", image_tokens=data.student.image_tokens)
    for setting in ("modality", "image_tokens"):
        wanted = getattr(images, setting)
        if recorded and recorded[setting] != wanted:
            raise UserError(
                f"--teacher_checkpoint {path}: has {setting} {recorded[setting]}, a teacher here needs {wanted}"
            )
    dtype = frozen_dtype(args.precision, args.accelerator)
    weights = model_digest(name, path)
    key = teacher_key(weights, processor, images, dtype)
    groups, n_bank = teacher_groups(data, dry_run=args.dry_run)
    folder = outputs_root(ROOT / "distillation" / "teacher_outputs")
    if args.dry_run:
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    folder /= _short_digest(key)

    def live() -> LiveTeacher:
        model = (
            restore_student(read_checkpoint(path), origin=str(path), dtype=dtype)
            if path
            else load_model(name, dtype=dtype)
        )
        precision = resolve_precision(args.precision, args.accelerator)
        return LiveTeacher(
            model.to(probe(args).strategy.root_device).eval(), processor, data.root, images, precision, groups
        )

    if args.teacher == "online":
        source = live()
    else:
        record = key | {"name": name, "checkpoint": str(path)}
        source = stored_outputs(folder, groups, live, record, root=data.root, batch_size=2 * args.batch_size)
        if torch.cuda.is_available():  # the student needs the room, and its own peak is of interest
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    teacher = TeacherCache(source, groups, n_bank)
    # A run may go on with newer code, as it may at another commit; its teacher is the same, but is asked again.
    same = _short_digest({name: value for name, value in key.items() if name != "code"})
    run.record.update(
        teacher_outputs=same, teacher_checkpoint=str(path) if path else None, teacher_weights=weights[:16]
    )
    if not args.dry_run:
        decode = partial(processor.tokenizer.decode, skip_special_tokens=True)
        scores = teacher.accuracy([row for rows in groups[n_bank:] for row in rows], decode)
        run.record["teacher_val_exact_match"] = round(scores["all"], 4)
        whose = f"{path}, tuned on {100 * recorded['label_fraction']:g} % of the labels" if path else name
        print(f"teacher: {whose}; on val: " + ", ".join(f"{kind} {score:.3f}" for kind, score in scores.items()))
        warn_unless_above_blind(scores["all"], data)
    return teacher


def check_labels(args: argparse.Namespace, path: Path | None, recorded: Mapping[str, Any] | None) -> None:
    """A tuned teacher hands on every label that it has read: where --label_fraction withholds some, it may not have read those.

    Raises:
        UserError: it has, and --any_teacher does not say that it is meant.
    """
    if path is None or args.any_teacher:
        return
    theirs, ours = recorded["label_fraction"], getattr(args, "label_fraction", 1.0)  # phase 1 reads no labels
    same_draw = all(recorded[name] == getattr(args, name) for name in ("seed", "subset_percentage"))
    if theirs > ours or (ours < 1 and not same_draw):
        raise UserError(
            f"--teacher_checkpoint {path}: was tuned on {100 * theirs:g} % of the labels (seed {recorded['seed']}), this student may "
            f"see {100 * ours:g} % (seed {args.seed}), and a teacher hands on what it has read. Tune one with the same --label_fraction "
            "and --seed, let a stock one teach (--teacher_name), or add --any_teacher if it is meant"
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
            f"warning: the teacher is right on {score:.3f} of the validation questions, who does not look on {blind:.3f}: there is "
            "nothing to learn from its answers. Tune it first (distillation/baseline_rgb7b/train2.py), or choose another",
            file=sys.stderr,
        )


def stored_outputs(
    folder: Path,
    groups: Sequence[Group],
    live: Callable[[], LiveTeacher],
    record: Mapping[str, Any],
    *,
    root: Path,
    batch_size: int,
) -> StoredOutputs:
    """What is stored of a teacher about these images; only where something is missing or damaged is the teacher loaded.

    Processes that were started side by side each take their share of the images.

    Args:
        folder: of this teacher.
        groups: images with their questions.
        live: loads the teacher.
        record: written beside the outputs, for people.
        root: ROOT_DATA_DIR.
        batch_size: images per pass of the teacher.
    """
    store = TensorStore(folder)
    names = [image_name(root, rows) for rows in groups]

    def missing() -> list[int]:
        found = progress(enumerate(names), total=len(names), label="checking what the teacher said, image")
        return [i for i, name in found if store.get(name) is None or store.get(pooled_name(name)) is None]

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with locked(folder, shared=world_size > 1):  # another run with this teacher waits and finds what it said
        own = missing()[rank::world_size]
        if own or store.get(HEAD) is None:
            write_json(folder / "teacher.json", record)
            look_and_store(store, [(names[i], groups[i]) for i in own], live(), batch_size=batch_size)
    if world_size > 1:
        with locked(folder):  # not before all others have done theirs; what one of them could not do is done here
            rest = missing()
            if rest:
                look_and_store(store, [(names[i], groups[i]) for i in rest], live(), batch_size=batch_size)
    return StoredOutputs(store, tuple(names))


def image_name(root: Path, rows: Group) -> str:
    """The digest of a picture's bytes and of its questions."""
    digest = hashlib.sha256((root / rows[0].image_path).read_bytes())
    for row in rows:
        digest.update("\n".join((row.question, row.answer, "")).encode())
    return digest.hexdigest()[:32]


def look_and_store(
    store: TensorStore, missing: Sequence[tuple[str, Group]], teacher: LiveTeacher, *, batch_size: int
) -> None:
    """Let the teacher look at images. Interrupted, it goes on with the batch that it was at.

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
    for number, batch in enumerate(progress(batches, total=len(batches), label="the teacher looks, batch")):
        outputs_of_batch = teacher.look([rows for _, rows in batch])
        if number == 0:
            sizes = [sum(tensor.nbytes for tensor in outputs.values()) for outputs in outputs_of_batch]
            check_disk("the teacher's outputs", store.folder, sum(sizes) / len(sizes), len(missing))
        for (name, _), outputs in zip(batch, outputs_of_batch, strict=True):
            store.put(name, outputs)
            store.put(pooled_name(name), pool(outputs["patches"]))


def _named_teacher(args: argparse.Namespace) -> tuple[str, Path | None, dict[str, Any] | None]:
    """Its model, its checkpoint and what that records; None twice for a stock teacher."""
    if not args.teacher_checkpoint:
        return args.teacher_name, None, None
    experiment = experiment_folder("baseline_rgb7b")
    if args.teacher_checkpoint == "best":
        path = best_checkpoint(experiment, miniature=args.miniature)
    else:
        path = find_checkpoint(args.teacher_checkpoint, experiment)
    recorded = read_checkpoint(path)["hyper_parameters"]
    return recorded["student_name"], path, recorded


def same_recording(recordings: Tensor, rows: Tensor) -> Tensor:
    """(N,) recordings of the bank, (B,) rows in it -> (B, N) bool: other rows that may show the same room, false negatives."""
    same = recordings[rows][:, None] == recordings
    return same.scatter(1, rows[:, None], False)


def check_bank(teacher: TeacherCache) -> None:
    """Raises UserError unless every image has another one to be told apart from."""
    if len(teacher.recordings().unique()) < 2:
        raise UserError(
            f"InfoNCE needs training images of at least 2 recordings, there are {len(teacher.rows)} images of one; use more of "
            "them (--subset_percentage)"
        )


def teacher_groups(data: SUNRGBDDataModule, *, dry_run: bool) -> tuple[list[Group], int]:
    """Training images with all their questions, then the validation images; and how many of them are for training."""
    unanswered = {}
    if unanswered_file(data.root).is_file():
        unanswered = {rows[0].image_path: rows for rows in group_by_image(data.unanswered_rows())}
    elif data.teacher_questions:
        raise UserError(
            f"--teacher_questions: no {unanswered_file(data.root)}; make it with: python dataset/prepare_sunrgbd.py"
        )
    gold = group_by_image(subset_of_images(data.rows("train"), data.subset_percentage, seed=data.seed))
    train = [rows + unanswered.get(rows[0].image_path, []) for rows in gold]
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
        AutoConfig.from_pretrained(model_source(name), token=hf_token()).vision_config.hidden_size
        for name in (teacher, student)
    ]
    if widths[0] != widths[1]:
        raise UserError(
            f"the vision features of teacher {teacher} have {widths[0]} channels, those of student {student} {widths[1]}; choose "
            "models of one family"
        )


def model_digest(name: str, checkpoint: Path | None) -> str:
    """Digest of a model's weights and configuration, and of the checkpoint on top of them."""
    source = Path(model_source(name))
    try:
        folder = source if source.is_dir() else Path(snapshot_download(name, allow_patterns=WEIGHTS, token=hf_token()))
    except (OSError, ValueError) as error:
        raise UserError(f"--teacher_name {name}: no such folder, and not to be had from the hub ({error})") from error
    digest = hashlib.sha256()
    for path in sorted(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        # The hub's cache links to files that are named by their own digest.
        blob = path.resolve().name if path.is_symlink() else ""
        digest.update(f"{path.name} {blob if len(blob) == 64 else sha256(path)}\n".encode())
    if checkpoint:
        digest.update(sha256(checkpoint).encode())
    return digest.hexdigest()


def teacher_key(model_digest: str, processor: ImageTextProcessor, images: ImageSettings, dtype: torch.dtype) -> dict:
    """What decides the teacher's outputs besides pictures and questions."""
    image_processor = processor.image_processor.to_dict()
    pictures = picture_key(processor, images)
    tokenizer = processor.tokenizer.backend_tokenizer.to_str() + str(processor.chat_template)
    return {
        "format": FORMAT,
        "teacher": model_digest,
        "dtype": str(dtype),
        "images": asdict(images),
        "image_processor": hashlib.sha256(
            json.dumps(image_processor, sort_keys=True, default=str).encode()
        ).hexdigest(),
        "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest(),
        "max_answer_tokens": MAX_ANSWER_TOKENS,
        "code": {
            "dataset": pictures["sources"],
            "distillation": source_digest(
                ROOT / "distillation", without=("losses.py", "training.py"), subfolders=False
            ),
            "libraries": [torch.__version__.split("+")[0], *pictures["libraries"]],  # torch for whatever device
        },
    }


def _short_digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
