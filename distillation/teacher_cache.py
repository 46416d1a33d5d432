"""What the teacher says about every training image, computed once, stored, verified, read back.

The teacher is a constant: its answers and features of an image are the same in every epoch and every run. So it sees each
image once, ever. A shard holds them for a few hundred images:

    patches   (n, P, Dv)  vision features of each picture's overview tile, the tensor that the projector reads
    pooled    (n, Dv)     their mean over the tile
    squares   (n, Dv)     the mean of their squares
    hidden    (t, H)      last hidden states that predict the answer tokens; through the frozen output layer: exact logits
    tokens    (t,)        those tokens, the end of the turn included
    starts    (a + 1,)    where each answer begins in `tokens` and `hidden`

Each gold question has two answers, the gold one (teacher forcing) and the teacher's own greedy one; a question without a
gold answer has the teacher's own. A shard's name is the digest of the pictures' bytes and of the questions that it was made
from, its folder's name that of the teacher's weights and settings: whatever changes leads to another file, never to a wrong
one. A shard that does not match its checksum is computed again.
"""

import argparse
import atexit
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dataset.datamodule import (
    SUNRGBDDataModule,
    frame_path,
    group_by_image,
    image_placeholders,
    subset_of_images,
    unanswered_file,
)
from dataset.pictures import ImageSettings, load_images
from dataset.processor import ImageTextProcessor, load_processor
from dataset.prompts import collate_prompts, pack_questions
from dataset.questions import QuestionRow
from dataset.sunrgbd import frame_group, read_frame
from distillation.models import greedy_answers, image_features, load_model, overview_patches, restore_student
from distillation.training import (
    Run,
    best_checkpoint,
    experiment_folder,
    find_checkpoint,
    frozen_dtype,
    read_checkpoint,
    resolve_precision,
)
from utils import (
    ROOT,
    UserError,
    atomic_path,
    checksummed_path,
    hf_token,
    locked,
    matches_checksum,
    model_source,
    outputs_root,
    progress,
    sha256,
    write_json,
)

Group = Sequence[QuestionRow]  # the questions of one image
WEIGHTS = ("*.safetensors", "*.json")
IMAGES_PER_SHARD = 256
MAX_ANSWER_TOKENS = 12
FORMAT = 1  # of a shard; another number makes all old ones unused
GOLD, OWN = "gold", "own"


class TeacherCache:
    """Read access to a complete cache. Tensors are memory-mapped; each data loading process opens the files itself."""

    def __init__(self, folder: Path, shards: Sequence[Path], groups: Sequence[Group], n_bank: int) -> None:
        """`groups` are the images in the order of the shards; the first `n_bank` of them are the training images."""
        self.folder, self.shards = folder, list(shards)
        self.place = {rows[0].image_path: divmod(i, IMAGES_PER_SHARD) for i, rows in enumerate(groups)}
        self.rows = {rows[0].image_path: i for i, rows in enumerate(groups[:n_bank])}
        self._open: dict[int, tuple[dict[str, Tensor], dict[tuple[str, str], int]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def _shard(self, number: int) -> tuple[dict[str, Tensor], dict[tuple[str, str], int]]:
        if number not in self._open:
            path = self.shards[number]
            with safe_open(path, framework="pt") as handle:
                names = json.loads(handle.metadata()["answers"])
            self._open[number] = load_file(path), {tuple(name): i for i, name in enumerate(names)}
        return self._open[number]

    def answer(self, row: QuestionRow, *, gold: bool) -> tuple[list[int], Tensor]:
        """Tokens of the gold or the teacher's own answer, and the (len(tokens), H) hidden states that predict them.

        Its own answer is empty when it did not end within MAX_ANSWER_TOKENS: half an answer is no target.
        """
        tensors, names = self._shard(self.place[row.image_path][0])
        i = names[row.id, GOLD if gold else OWN]
        start, end = tensors["starts"][i : i + 2].tolist()
        return tensors["tokens"][start:end].tolist(), tensors["hidden"][start:end]

    def patches(self, image_path: str) -> Tensor:
        """(P, Dv) vision features of a picture's overview tile."""
        shard, row = self.place[image_path]
        return self._shard(shard)[0]["patches"][row]

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (Dv,) of the vision features over all training images, per channel.

        Features are compared after standardising both sides with these: SigLIP has a few channels a hundred times larger than
        the others, which would be all that a distance or a cosine sees.
        """
        mean, squares = self._pooled("pooled").double().mean(0), self._pooled("squares").double().mean(0)
        return mean.float(), (squares - mean**2).clamp(min=1e-12).sqrt().float()

    def bank(self) -> Tensor:
        """(N, Dv) mean standardised patch of every training image, in the order of `rows`: what InfoNCE chooses from."""
        mean, std = self.statistics()
        return (self._pooled("pooled") - mean) / std

    def _pooled(self, name: str) -> Tensor:
        return torch.stack([self._shard(self.place[path][0])[0][name][self.place[path][1]] for path in self.rows])

    def recordings(self) -> Tensor:
        """(N,) int64, equal for training images of one recording, which may show the same room."""
        groups = [frame_group(path.rsplit("/", 2)[0]) for path in self.rows]
        numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        return torch.tensor([numbers[group] for group in groups])

    def head(self) -> Tensor:
        """(V, H) the teacher's output layer, cropped to the tokenizer's length."""
        return load_file(self.folder / "head.safetensors")["head"]

    def accuracy(self, rows: Sequence[QuestionRow]) -> dict[str, float]:
        """Share of questions that the teacher answers with the gold tokens, per type and as "all"."""
        hits: dict[str, list[bool]] = {"all": []}
        for row in rows:
            right = self.answer(row, gold=False)[0] == self.answer(row, gold=True)[0]
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
    processor = load_processor(name)
    check_same_language(processor, data.processor, teacher=name, student=args.student_name)
    images = ImageSettings("rgb", image_tokens=data.student.image_tokens)
    for setting in ("modality", "image_tokens"):
        wanted = getattr(images, setting)
        if recorded and recorded[setting] != wanted:
            raise UserError(
                f"--teacher_checkpoint {path}: has {setting} {recorded[setting]}, a teacher here needs {wanted}"
            )
    dtype = frozen_dtype(args.precision, args.accelerator)
    key = teacher_key(model_digest(name, path), processor, images, dtype)
    groups, n_bank = teacher_groups(data, dry_run=args.dry_run)
    folder = outputs_root(ROOT / "distillation" / "teacher_outputs")
    if args.dry_run:
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    folder /= hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    with locked(folder):
        shards = shard_paths(folder, data.root, groups)
        missing = {
            shard: groups[i * IMAGES_PER_SHARD : (i + 1) * IMAGES_PER_SHARD]
            for i, shard in enumerate(shards)
            if not is_whole(shard)
        }
        if missing or not (folder / "head.safetensors").is_file():
            device = "cuda" if torch.cuda.is_available() and args.accelerator != "cpu" else "cpu"
            origin = str(path)
            model = (
                restore_student(read_checkpoint(path), origin=origin, dtype=dtype)
                if path
                else load_model(name, dtype=dtype)
            )
            write_json(folder / "teacher.json", key | {"name": name, "checkpoint": origin if path else None})
            build_shards(
                folder,
                missing,
                root=data.root,
                model=model.to(device).eval(),
                processor=processor,
                images=images,
                batch_size=2 * args.batch_size,
                precision=resolve_precision(args.precision, args.accelerator),
            )
    teacher = TeacherCache(folder, shards, groups, n_bank)
    if not args.dry_run:
        scores = teacher.accuracy([row for rows in groups[n_bank:] for row in rows])
        run.record["teacher_val_exact_match"] = round(scores["all"], 4)
        print("teacher on val: " + ", ".join(f"{kind} {score:.3f}" for kind, score in scores.items()))
    return teacher


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
    theirs, ours = teacher_processor, student_processor
    same = {
        "tokenizer": theirs.tokenizer.get_vocab() == ours.tokenizer.get_vocab(),
        "chat template": theirs.chat_template == ours.chat_template,
        "number of image tokens": theirs.num_image_tokens == ours.num_image_tokens,
    }
    for what, equal in same.items():
        if not equal:
            raise UserError(
                f"the {what} of teacher {teacher} is not that of student {student}; choose models of one family"
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
    }


def shard_paths(folder: Path, root: Path, groups: Sequence[Group]) -> list[Path]:
    """Where the shards of these images are or will be: named by the digest of everything that they are made from."""
    paths = []
    for first in range(0, len(groups), IMAGES_PER_SHARD):
        digest = hashlib.sha256()
        for rows in groups[first : first + IMAGES_PER_SHARD]:
            digest.update((root / rows[0].image_path).read_bytes())
            for row in rows:
                digest.update("\n".join((row.id, row.question, row.answer, "")).encode())
        paths.append(folder / f"{digest.hexdigest()[:32]}.safetensors")
    return paths


def is_whole(path: Path) -> bool:
    """Whether a shard is there and matches its checksum."""
    return path.is_file() and matches_checksum(path) is True


def build_shards(
    folder: Path,
    missing: Mapping[Path, Sequence[Group]],
    *,
    root: Path,
    model: nn.Module,
    processor: ImageTextProcessor,
    images: ImageSettings,
    batch_size: int,
    precision: str,
) -> None:
    """Let the teacher look at the images of the missing shards. Interrupted, it goes on with the shard it was at.

    Args:
        folder: of this teacher.
        missing: path of a shard -> its images with their questions.
        root: ROOT_DATA_DIR.
        model: the teacher in eval mode on its device.
        processor: of the teacher; equals the student's.
        images: what the teacher sees.
        batch_size: images per pass.
        precision: `bf16-mixed` or `32-true`, as in training.
    """
    if not (folder / "head.safetensors").is_file():
        head = model.get_output_embeddings().weight[: len(processor.tokenizer)].detach().cpu().contiguous().clone()
        with atomic_path(folder / "head.safetensors") as part:
            save_file({"head": head}, part)
    batches = [
        (path, list(groups[i : i + batch_size]))
        for path, groups in missing.items()
        for i in range(0, len(groups), batch_size)
    ]
    parts: dict[str, list] = {"patches": [], "answers": []}
    for i, (path, groups) in enumerate(progress(batches, total=len(batches), label="the teacher looks, batch")):
        patches, answers = _look(model, processor, root, groups, images, precision)
        parts["patches"].append(patches)
        parts["answers"] += answers
        if i + 1 == len(batches) or batches[i + 1][0] != path:
            _write_shard(path, parts)
            parts = {"patches": [], "answers": []}


def _look(
    model: nn.Module,
    processor: ImageTextProcessor,
    root: Path,
    groups: Sequence[Group],
    images: ImageSettings,
    precision: str,
) -> tuple[Tensor, list[tuple[str, str, list[int], Tensor]]]:
    """Patches of a batch of images, and (question id, kind, tokens, hidden) of all their answers."""
    pictures = [load_images(read_frame(root, frame_path(rows[0])), [images])[0] for rows in groups]
    asked = [
        [(row, kind) for row in rows for kind in ((GOLD, OWN) if row.answer else (OWN,))] for rows in groups
    ]  # fmt: skip
    prompts = [
        pack_questions(
            processor,
            [row.question for row, _ in blocks],
            [row.answer if kind == GOLD else None for row, kind in blocks],
            n_image_tokens=image_placeholders(processor, picture.shape[:2], images),
        )
        for blocks, picture in zip(asked, pictures, strict=True)
    ]
    tokenizer = processor.tokenizer
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = {k: v.to(model.device) for k, v in collate_prompts(prompts, pad_token_id=tokenizer.pad_token_id).items()}
    pixels = {k: v.to(model.device) for k, v in processor.pixels(pictures, image_tokens=images.image_tokens).items()}
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        features = image_features(model, pixels)
        patches = overview_patches(model, pixels, features)
        answers = greedy_answers(
            model,
            text,
            {"mm_encoder_outputs": {"image": features}},
            vocab_size=len(tokenizer),
            end_of_turn=end_of_turn,
            max_new_tokens=MAX_ANSWER_TOKENS,
            forbidden=(processor.image_token_id, processor.video_token_id),
        )
    found = [
        (row.id, kind, tokens, hidden)
        for blocks, row_tokens, row_hidden in zip(asked, answers.tokens, answers.hidden, strict=True)
        for (row, kind), tokens, hidden in zip(blocks, row_tokens, row_hidden, strict=True)
    ]
    whole = [(i, k, t, h) if t[-1] == end_of_turn else (i, k, [], h[:0]) for i, k, t, h in found]
    return patches.cpu(), [(i, kind, tokens, hidden.cpu()) for i, kind, tokens, hidden in whole]


def _write_shard(path: Path, parts: Mapping[str, list]) -> None:
    lengths = torch.tensor([0] + [len(tokens) for _, _, tokens, _ in parts["answers"]])
    patches = torch.cat(parts["patches"])
    tensors = {
        "patches": patches,
        "pooled": patches.float().mean(1),
        "squares": patches.float().square().mean(1),
        "hidden": torch.cat([hidden for _, _, _, hidden in parts["answers"]]),
        "tokens": torch.tensor([token for _, _, tokens, _ in parts["answers"] for token in tokens]),
        "starts": lengths.cumsum(0),
    }
    names = [(question, kind) for question, kind, _, _ in parts["answers"]]
    with checksummed_path(path) as part:
        save_file(tensors, part, metadata={"answers": json.dumps(names)})
