"""Make the tiny LLaVA-OneVision pair from nothing: tokenizer, processor, teacher and student, pretrained on RGB rooms.

    python distillation/miniature/pretrain.py          writes dataset/miniature/{teacher,student}/ and pretrain.log

The pair stands for the real LLaVA-OneVision 7B and 0.5B: both have seen many labelled RGB rooms, of other statistics
(`PRETRAIN_STYLE`: other sizes, furniture, colors, cameras, other seeds) than the miniature data set's, and no depth
image. As the real ones start from one SigLIP tower, these two start from one vision tower, trained on grounding alone.

What makes a tiny vision-language model learn within minutes was found by trial:
- a grounding stage before any question: each image token predicts, through the tied output layer, class and color
  of the object under it, and a throw-away head regresses where that object is; the same term stays on while answering;
- position embeddings that start as a two-dimensional sine-cosine table: with the default random table, the position
  of a token is lost among patch embeddings ten times its size, and "left" and "right" cannot be told;
- text weights that start at a standard deviation of 0.06 instead of 0.02;
- question mixtures that begin with the hard spatial types and end with all of them.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils import ProgressLine, atomic_path, duration, git_commit, progress, run_script  # first: loads .env

# isort: split
import argparse
import copy
import math
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    get_cosine_schedule_with_warmup,
)

from dataset.inputs.processor import FloatImageProcessor, ImageTextProcessor, save_processor
from dataset.inputs.prompts import collate_prompts, pack_questions
from dataset.miniature.renderer import COLORS, NOUNS, PRETRAIN_STYLE, View, render_room
from dataset.questions.captions import CAPTION_QUESTION
from dataset.questions.generate import frame_candidates
from dataset.questions.rows import CAPTION_TYPE
from distillation.forward import answer_logits, exact_matches, use_packed_attention
from distillation.losses import answer_cross_entropy

IMAGE_SIZE, PATCH = 128, 16
GRID = IMAGE_SIZE // PATCH
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")


@dataclass(frozen=True)
class Size:
    """Widths and depths of one of the two models."""

    vision_width: int
    vision_layers: int
    text_width: int
    text_layers: int
    heads: int


SIZES = {"teacher": Size(128, 4, 128, 3, 4), "student": Size(128, 4, 96, 3, 4)}  # the same tower, as in the real pair


@dataclass(frozen=True)
class Stage:
    """A stretch of training with a learning rate that rises and falls; weights of question types, Caption included."""

    name: str
    steps: dict[str, int]  # model -> steps
    lr: float
    questions: int = 0  # per image and step; 0 = grounding only
    mixture: dict[str, float] | None = None


BY_COLOR = ("Direction", "Proximity", "Yes/No")
EVEN = dict.fromkeys(
    ("Object Identification", "Color Identification", "Count", "Direction", "Proximity", "Yes/No"), 1.0
)
SPATIAL = {
    "Direction": 4.0,
    "Direction by color": 8.0,
    "Proximity": 1.0,
    "Proximity by color": 1.0,
    "Yes/No by color": 1.0,
}
LAST_SHARES = {"Count": 2.0, "Direction": 2.0, "Proximity": 2.5, "Proximity by color": 0.5}
STAGES = (
    Stage("grounding", {"teacher": 1200, "student": 300}, 2e-3),
    Stage("spatial", {"teacher": 600, "student": 500}, 1e-3, 8, EVEN | SPATIAL | {"Caption": 1.0}),
    Stage("counting", {"teacher": 500, "student": 350}, 1e-3, 8, EVEN | SPATIAL | {"Count": 4.0, "Caption": 1.0}),
    Stage("all", {"teacher": 1500, "student": 1100}, 1e-3, 8, EVEN | LAST_SHARES),
)  # fmt: skip
BATCH = 32
GROUNDING_WEIGHT = 0.3


@dataclass(frozen=True, eq=False)
class Room:
    """A rendered room, reduced to what training reads."""

    rgb: np.ndarray  # (H, W, 3) uint8
    questions: list[tuple[str, str, str]]  # type, question, answer
    nouns: np.ndarray  # (tokens,) int, index into NOUNS of the object under each image token, -1 = none
    colors: np.ndarray  # (tokens,) int, index into COLORS
    places: np.ndarray  # (tokens, 5) float32: that object's x, z in metres; u, v and area as shares of the image


def make_room(seed: int) -> Room:
    """Render room `seed` and ask every question that it can answer."""
    view = render_room(seed, style=PRETRAIN_STYLE, size=IMAGE_SIZE)
    rng = np.random.default_rng((seed, 7))
    instances = view.instances()
    asked = frame_candidates(instances, rgb=view.rgb, rng=rng, vocabulary=NOUNS)
    questions = [(q.type, q.text, q.answer) for q in asked] + [(CAPTION_TYPE, CAPTION_QUESTION, caption(view))]
    # "The red chair" is unique where "the chair" is not: several times as many spatial questions about the same rooms.
    named = [replace(i, noun=f"{o.color} {o.noun}") for i, o in zip(instances, view.objects, strict=True)]
    asked = frame_candidates(named, rgb=None, rng=rng, vocabulary=())
    questions += [(f"{q.type} by color", q.text, q.answer) for q in asked if q.type in BY_COLOR]
    return Room(view.rgb, questions, *token_targets(view))


def caption(view: View) -> str:
    """The objects from left to right: "red chair, blue table"."""
    columns = [np.nonzero(view.object_ids == i)[1].mean() for i in range(len(view.objects))]
    return ", ".join(f"{view.objects[i].color} {view.objects[i].noun}" for i in np.argsort(columns))


def token_targets(view: View) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noun, color and place of the object that covers most of each patch, when it covers at least a sixth of it."""
    count = len(view.objects)
    patches = view.object_ids.reshape(GRID, PATCH, GRID, PATCH).swapaxes(1, 2).reshape(GRID * GRID, -1)
    cover = np.stack([(patches == i).mean(axis=1) for i in range(count)], axis=1)
    owner = np.where(cover.max(axis=1) >= 1 / 6, cover.argmax(axis=1), -1)
    nouns = np.array([NOUNS.index(o.noun) for o in view.objects] + [-1])
    colors = np.array([list(COLORS).index(o.color) for o in view.objects] + [-1])
    places = np.zeros((count + 1, 5), np.float32)
    for i, thing in enumerate(view.objects):
        rows, columns = np.nonzero(view.object_ids == i)
        share = np.array([columns.mean(), rows.mean()]) / IMAGE_SIZE
        places[i] = (*thing.center_m[[0, 2]], *share, len(rows) / IMAGE_SIZE**2)
    return nouns[owner], colors[owner], places[owner]


def render_rooms(first_seed: int, count: int) -> list[Room]:
    """Rooms `first_seed` .. `first_seed + count - 1`, rendered by all cores."""
    with ProcessPoolExecutor() as pool:
        rooms = pool.map(make_room, range(first_seed, first_seed + count), chunksize=64)
        return list(progress(rooms, total=count, label="rendering rooms"))


def build_processor(texts: list[str]) -> ImageTextProcessor:
    """A byte-level BPE tokenizer trained on `texts`, the special tokens and chat template of LLaVA-OneVision, 128 px.

    The template's own words count as often as any text, so that they are one token each: they stand around every
    question.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=507, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator([*texts, *["user\n", "assistant\n"] * len(texts)], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<image>", "<video>"],
        padding_side="left",
    )
    image_processor = FloatImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_grid_pinpoints=[[IMAGE_SIZE * i, IMAGE_SIZE * j] for i in (1, 2) for j in (1, 2)],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return ImageTextProcessor(
        image_processor=image_processor,
        tokenizer=fast,
        num_image_tokens=GRID * GRID,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(size: Size, processor: ImageTextProcessor) -> LlavaOnevisionForConditionalGeneration:
    """The stock class with small configurations, positions and text weights started as the module says."""
    tokenizer = processor.tokenizer
    vision = SiglipVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=4 * size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.heads,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size.text_width,
        intermediate_size=2 * size.text_width,
        num_hidden_layers=size.text_layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        max_position_embeddings=4096,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
        tie_word_embeddings=True,
    )
    model = use_packed_attention(LlavaOnevisionForConditionalGeneration(config))
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    table = model.model.vision_tower.embeddings.position_embedding.weight
    table.data.copy_(sine_cosine_table(GRID, size.vision_width))
    return model


def sine_cosine_table(grid: int, width: int, *, amplitude: float = 0.5) -> Tensor:
    """(grid * grid, width) position table: a quarter of the channels each for sin and cos of row and of column."""
    frequencies = torch.logspace(0, math.log10(math.pi * grid / 2), width // 4)
    steps = torch.linspace(-1, 1, grid)[:, None] * frequencies  # (grid, width / 4)
    one_axis = torch.cat([steps.sin(), steps.cos()], dim=1)
    rows = one_axis[:, None].expand(grid, grid, -1)
    columns = one_axis[None].expand(grid, grid, -1)
    return amplitude * torch.cat([rows, columns], dim=-1).reshape(grid * grid, width)


class Batches:
    """Draws rooms and questions and turns them into model inputs."""

    def __init__(self, rooms: list[Room], processor: ImageTextProcessor) -> None:
        self.rooms, self.processor = rooms, processor
        self.frequency = Counter((kind, answer) for room in rooms for kind, _, answer in room.questions)

    def draw(self, stage: Stage, rng: np.random.Generator) -> list[tuple[Room, list[tuple[str, str, str]]]]:
        """BATCH random rooms, each with questions in the stage's mixture."""
        chosen = [self.rooms[i] for i in rng.integers(len(self.rooms), size=BATCH)]
        return [(room, self.questions(room, stage, rng)) for room in chosen]

    def questions(self, room: Room, stage: Stage, rng: np.random.Generator) -> list[tuple[str, str, str]]:
        """Some of the room's questions. A type's weight is shared by its questions, rare answers get more of it.

        Otherwise a type with many questions would drown the others, and "one" every other count.
        """
        if not stage.questions:
            return []
        kinds = Counter(kind for kind, _, _ in room.questions)
        rarity = np.array([self.frequency[kind, answer] ** -0.5 for kind, _, answer in room.questions])
        share = {k: rarity[[q[0] == k for q in room.questions]].sum() for k in kinds}
        weights = np.array(
            [stage.mixture.get(q[0], 0) * r / share[q[0]] for q, r in zip(room.questions, rarity, strict=True)]
        )
        count = min(stage.questions, np.count_nonzero(weights))
        chosen = rng.choice(len(weights), count, replace=False, p=weights / weights.sum())
        return [room.questions[i] for i in chosen]

    def images(self, rooms: list[Room]) -> dict[str, Tensor]:
        """Pixels as `ImageTextProcessor.pixels` gives them for pictures that need no resizing."""
        pixels = torch.from_numpy(np.stack([room.rgb for room in rooms])).permute(0, 3, 1, 2).float() / 127.5 - 1
        sizes = torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]] * len(rooms))
        return {
            "pixel_values": pixels[:, None],
            "image_sizes": sizes,
            "batch_num_images": torch.tensor([max(len(rooms), 2)]),
        }

    def text(self, questions: list[list[tuple[str, str, str]]]) -> dict[str, Tensor]:
        """Packed prompts, one row per room."""
        prompts = [
            pack_questions(self.processor, [q[1] for q in row], [q[2] for q in row], n_image_tokens=GRID * GRID + 1)
            for row in questions
        ]
        return collate_prompts(prompts, pad_token_id=self.processor.tokenizer.pad_token_id)


class Grounding(nn.Module):
    """What each image token should know; the place head is thrown away after pretraining."""

    def __init__(self, model: LlavaOnevisionForConditionalGeneration, processor: ImageTextProcessor) -> None:
        super().__init__()
        self.places = nn.Linear(model.config.text_config.hidden_size, 5)

        def word_ids(words):
            ids = [processor.tokenizer(word, add_special_tokens=False).input_ids for word in words]
            return torch.tensor([word[0] for word in ids])

        self.nouns, self.colors = word_ids(NOUNS), word_ids(COLORS)

    def forward(self, model: LlavaOnevisionForConditionalGeneration, tokens: Tensor, rooms: list[Room]) -> Tensor:
        """Loss of projected image tokens (B, N, D): class and color words by the output layer, place by regression."""
        nouns, colors, places = (
            torch.from_numpy(np.stack([getattr(room, name) for room in rooms]))
            for name in ("nouns", "colors", "places")
        )
        seen = nouns >= 0
        hidden = tokens[seen]
        words = hidden @ model.lm_head.weight.T
        loss = cross_entropy(words, self.nouns[nouns[seen]]) + cross_entropy(words, self.colors[colors[seen]])
        return loss + 2 * smooth_l1_loss(self.places(hidden), places[seen])


def train_stage(
    model: LlavaOnevisionForConditionalGeneration,
    grounding: Grounding,
    batches: Batches,
    stage: Stage,
    *,
    steps: int,
    seed: int,
) -> None:
    """AdamW with warm-up and cosine over one stage."""
    rng = np.random.default_rng(seed)
    parameters = [*model.parameters(), *grounding.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, 40, steps)
    line = ProgressLine(f"  {stage.name}", total=steps, every_s=30)
    vocab_size = len(batches.processor.tokenizer)
    for step in range(1, steps + 1):
        drawn = batches.draw(stage, rng)
        rooms = [room for room, _ in drawn]
        images = batches.images(rooms)
        features = model.get_image_features(**images, return_dict=True)
        tokens = torch.stack(list(features.pooler_output))[:, : GRID * GRID]
        loss = grounding(model, tokens, rooms)
        if stage.questions:
            text = batches.text([questions for _, questions in drawn])
            logits, targets = answer_logits(model, text, {"image_features": features}, vocab_size=vocab_size)
            loss = answer_cross_entropy(logits=logits, targets=targets) + GROUNDING_WEIGHT * loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        line.update(step, lambda loss=loss: f", loss {loss.item():.3f}")


@torch.no_grad()
def accuracy(model: LlavaOnevisionForConditionalGeneration, batches: Batches) -> dict[str, float]:
    """Exact match per question type on held-out rooms, up to 12 questions each, and overall."""
    rng = np.random.default_rng(0)
    stage = Stage("test", {}, 0, 12, EVEN)
    hits: dict[str, list[bool]] = {}
    vocab_size = len(batches.processor.tokenizer)
    model.eval()
    for first in range(0, len(batches.rooms), BATCH):
        rooms = batches.rooms[first : first + BATCH]
        asked = [batches.questions(room, stage, rng) for room in rooms]
        text = batches.text(asked)
        logits, _ = answer_logits(model, text, batches.images(rooms), vocab_size=vocab_size)
        for (kind, _, _), right in zip(
            (q for row in asked for q in row), exact_matches(logits, text).tolist(), strict=True
        ):
            hits.setdefault(kind, []).append(right)
    model.train()
    overall = np.mean([right for values in hits.values() for right in values])
    return {"all": float(overall)} | {kind: float(np.mean(values)) for kind, values in sorted(hits.items())}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "dataset" / "miniature", help="folder of teacher/ and student/"
    )
    parser.add_argument("--rooms", type=int, default=16000, help="rooms to train on")
    parser.add_argument("--steps_share", type=float, default=1.0, help="shorten every stage to this share (for tests)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Render, train, save; everything that is printed also goes to pretrain.log."""
    start = time.monotonic()
    flags = ", ".join(f"{name} {value}" for name, value in vars(args).items() if name != "output")
    log = [f"commit {git_commit()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {flags}"]

    def say(text: str) -> None:
        log.append(f"[{duration(time.monotonic() - start)}] {text}")
        print(log[-1], flush=True)

    rooms = render_rooms(0, args.rooms)
    held_out = render_rooms(10_000_000, 500)
    say(f"rendered {len(rooms)} training rooms and {len(held_out)} held-out rooms")
    processor = build_processor([text for room in rooms[:2000] for _, q, a in room.questions for text in (q, a)])
    tower = None
    for name in ("teacher", "student"):
        torch.manual_seed(args.seed)
        model = build_model(SIZES[name], processor).train()
        say(f"{name}: {model.num_parameters():,} parameters")
        if tower:
            model.model.vision_tower.load_state_dict(tower)
        grounding = Grounding(model, processor)
        for number, stage in enumerate(STAGES):
            steps = max(1, round(stage.steps[name] * args.steps_share))
            train_stage(model, grounding, Batches(rooms, processor), stage, steps=steps, seed=args.seed + number)
            tower = tower or copy.deepcopy(model.model.vision_tower.state_dict())
            if not stage.questions:
                say(f"{name} after {stage.name} ({steps} steps)")
                continue
            scores = accuracy(model, Batches(held_out, processor))
            say(f"{name} after {stage.name} ({steps} steps): " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
        model.to(torch.float16).save_pretrained(args.output / name)  # float16, as the real checkpoints are
        save_processor(processor, args.output / name)
        say(f"wrote {name}/")
    with atomic_path(args.output / "pretrain.log") as part:
        part.write_text("\n".join(log) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main, parse_args)
