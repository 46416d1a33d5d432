"""What distilling and scoring one question costs: the usual loops against ours, with the same weights and loss.

Training, several questions per image, tower frozen (as in phase 2). Every variant computes cross-entropy +
KL(teacher || student) on the answer tokens:
    original       the loop of the first public implementation: teacher in every step, all logits, LoCa and both losses
                   over every token
    TRL            the same with the loss of TRL's GKD, which masks before it adds up; its own code where `trl` is
                   installed
    online         ours with the teacher in memory: logits at answer tokens only, and of the last layer only what these
                   need
    online packed  + all questions of an image behind one image prefix, and the images of a step together:
                   --teacher online
    cached         ours with the teacher's hidden states stored, question by question
    packed         cached and packed: what the scripts do
    cached vision  + the features of the frozen tower stored: --vision_cache
Scoring: stock `generate` question by question against all questions of an image at once.

Each measurement runs in a process of its own, on one core unless told otherwise. Variants take turns, and the median of
the rounds counts. The losses of all variants must be equal, and so must the answers of both ways of scoring, or the run
fails. The ceiling is a plain matrix product in the same process. The models are small and their vocabularies large,
which no ratio of a CPU run can hide. What the same savings are worth at true size is therefore counted, in floating
point operations of the true 0.5B and 7B.

Writes  <output>/README.md and <output>/results.json

    make bench
    python benchmarks/cost.py [--rounds 3] [--seconds 2] [--cores 1] [--output benchmarks/cost]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import (  # first: loads .env
    UserError,
    at_least,
    available_cores,
    duration,
    git_commit,
    peak_memory,
    run_script,
    use_cores,
    write_json,
)

# isort: split
import argparse
import gc
import itertools
import multiprocessing
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from benchmarks.flops import QUESTIONS, true_flops
from benchmarks.processes import check_cores
from dataset.inputs.prompts import IGNORE, collate_prompts, pack_blocks
from distillation.decoding import greedy_answers
from distillation.forward import answer_logits, answer_states, tower_features, use_packed_attention
from distillation.losses import answer_cross_entropy, forward_kl
from distillation.models import set_trainable

IMAGES = 2  # per step, the scripts' default
QUESTION_TOKENS, PREFIX_TOKENS = 14, 4
TILE, PATCH, TILES = 112, 14, 5  # pixels, pixels, and tiles of the grid with its overview
IMAGE_SIZE = (162, 224)  # pixels; 2 x 2 tiles, less the tokens of their padding: 268 (a picture of SUN RGB-D: 2,929)
IMAGE_TOKENS = 268
ANSWER_TOKENS = 4  # generated per question when scoring
SCORED_IMAGES = 8  # a batch of ours
LOSS_TOLERANCE = 1e-4  # relative, between variants
LOCA_ALPHA = 0.9
STATM = Path("/proc/self/statm")  # of Linux


class Width(NamedTuple):
    """Hidden widths and vocabulary of a pair of models."""

    vocabulary: int
    vision: int
    student: int
    teacher: int


PAIRS = {"V=32k": Width(32_000, 64, 64, 128), "V=8k": Width(8_000, 64, 256, 768)}
STUDENT_LAYERS, TEACHER_LAYERS = 2, 4


class Example(NamedTuple):
    """One image with its questions."""

    images: dict[str, Tensor]
    prefix: list[int]
    questions: list[tuple[list[int], list[int]]]  # tokens of the question, tokens of the answer
    hidden: Tensor | None = None  # (answer tokens, H) the teacher's hidden states
    features: Tensor | None = None  # (1, tiles, P, D) output of the student's frozen tower


# models and data


def build_model(width: int, layers: int, pair: Width) -> LlavaOnevisionForConditionalGeneration:
    """A LLaVA-OneVision with random weights, the same in every process."""
    torch.manual_seed(width)
    heads = max(width // 64, 2)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=pair.vision,
            intermediate_size=4 * pair.vision,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=TILE,
            patch_size=PATCH,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=pair.vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            initializer_range=0.1,  # far from the flat start of training: answers depend on the input
            tie_word_embeddings=True,
        ),
        image_token_index=pair.vocabulary - 1,
        video_token_index=pair.vocabulary - 2,
        image_grid_pinpoints=[[TILE * rows, TILE * columns] for rows in (1, 2) for columns in (1, 2)],
        tie_word_embeddings=True,
    )
    model = use_packed_attention(LlavaOnevisionForConditionalGeneration(config)).eval()
    set_trainable(model, vision=False, projector=True, language=True)
    return model


def build_student(pair: Width) -> LlavaOnevisionForConditionalGeneration:
    """The student of a pair."""
    return build_model(pair.student, STUDENT_LAYERS, pair)


def build_teacher(pair: Width) -> LlavaOnevisionForConditionalGeneration:
    """The teacher of a pair, frozen."""
    return build_model(pair.teacher, TEACHER_LAYERS, pair).requires_grad_(False)


def random_example(seed: int, vocabulary: int) -> Example:
    """An image with questions that have no answers yet."""
    random = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(100, vocabulary - 100, (n,), generator=random).tolist()

    images = {
        "pixel_values": torch.randn(1, TILES, 3, TILE, TILE, generator=random),
        "image_sizes": torch.tensor([IMAGE_SIZE]),
        "batch_num_images": torch.tensor([1]),
    }
    return Example(
        images,
        [*range(PREFIX_TOKENS), *[vocabulary - 1] * IMAGE_TOKENS],
        [(tokens(QUESTION_TOKENS), []) for _ in range(QUESTIONS)],
    )


def text_of(examples: Sequence[Example], question: int | None = None) -> dict[str, Tensor]:
    """The tokens of a batch of images, each with its questions (or only one of them) behind its prefix."""
    chosen = slice(None) if question is None else slice(question, question + 1)
    return collate_prompts([pack_blocks(e.prefix, e.questions[chosen]) for e in examples], pad_token_id=0)


def images_of(examples: Sequence[Example]) -> dict[str, Tensor]:
    """The pictures of a batch."""
    return {name: torch.cat([example.images[name] for example in examples]) for name in examples[0].images}


def singles(examples: Sequence[Example]) -> Iterator[tuple[Example, dict[str, Tensor]]]:
    """Each question of a batch in a sequence of its own, with the image that it asks about."""
    for example in examples:
        for k in range(QUESTIONS):
            yield example, text_of([example], k)


def count_answer_tokens(examples: Sequence[Example]) -> int:
    """The number of answer tokens of all questions of a batch."""
    return sum(len(answer) for example in examples for _, answer in example.questions)


# what is precomputed


@torch.no_grad()
def prepare(pair: Width, folder: Path, n_images: int) -> dict[str, Any]:
    """Write examples with the teacher's answers and hidden states and the tower's features; return what that costs.

    The teacher's own answers are the gold ones. Where the teacher is right LoCa changes nothing, so the original loop,
    which computes LoCa on every token, has the same loss as the other variants.

    Returns:
        `teacher_s` and `tower_s`, seconds per question.
    """
    teacher, student, examples, seconds, tower_seconds = build_teacher(pair), build_student(pair), [], [], []
    for seed in range(n_images):
        example = random_example(seed, pair.vocabulary)
        options = dict(vocab_size=pair.vocabulary, eos_token_id=-1, max_new_tokens=3)
        (answers,) = greedy_answers(teacher, text_of([example]), example.images, **options).tokens
        questions = [(q, a[: 1 + k % 3]) for k, ((q, _), a) in enumerate(zip(example.questions, answers, strict=True))]
        example = example._replace(questions=questions)
        started = time.perf_counter()
        hidden, _ = answer_states(teacher, text_of([example]), example.images)
        seconds.append(time.perf_counter() - started)
        features = tower_features(student, example.images["pixel_values"][0])[None]
        tower_seconds.append(time.perf_counter() - started - seconds[-1])
        examples.append(tuple(example._replace(hidden=hidden, features=features)))
    head = teacher.get_output_embeddings().weight
    torch.save({"examples": examples, "head": head}, folder / "cache.pt")
    return {"teacher_s": median(seconds) / QUESTIONS, "tower_s": median(tower_seconds) / QUESTIONS}


# the variants: each computes the loss of a batch and its gradient


@dataclass
class Models:
    """The models of a variant."""

    student: nn.Module
    teacher: nn.Module | None  # None where its hidden states are stored
    head: Tensor  # (V, H) the teacher's output layer


Step = Callable[[Models, Sequence[Example]], float]  # adds the gradient for a batch to the student, returns the loss


def original_loss(student: Any, teacher: Any, labels: Tensor) -> Tensor:
    """LoCa, KL and cross-entropy over all tokens, as in the original, then the mask; summed over answer tokens.

    Both models were given the labels, so both have computed the stock cross-entropy of all tokens. Three things are
    mended, so that the result is the loss of the other variants: the causal shift, which rows LoCa calibrates and how,
    and the mask.
    """
    gold = labels[:, 1:].clamp(min=0)[..., None]
    p, q = ((outputs.logits[:, :-1] / 1.0).softmax(-1) for outputs in (teacher, student))  # over the temperature
    q = q.clamp(min=1e-30)
    p_gold, (p_top, top) = p.gather(-1, gold), p.topk(2, dim=-1)
    s = LOCA_ALPHA / (1 - p_gold + p_top[..., :1])
    calibrated = (s * p).scatter(-1, gold, 1 - s * (p.sum(-1, keepdim=True) - p_gold))
    calibrated = torch.where(top[..., :1] == gold, p, calibrated)
    kl = F.kl_div(q.log(), calibrated, reduction="none").sum(-1)
    kept = labels[:, 1:] != IGNORE
    return kl[kept].sum() + student.loss * kept.sum()


def trl_loss(student: Any, teacher: Any, labels: Tensor) -> Tensor:
    """TRL's generalised JSD at beta 0, which is the forward KL, plus a cross-entropy; summed over answer tokens.

    It calls TRL's own function, or computes the published formula where `trl` is not installed.
    """
    student, teacher, labels = student.logits[:, :-1], teacher.logits[:, :-1], labels[:, 1:]
    kept = labels != IGNORE
    ce = F.cross_entropy(student[kept], labels[kept], reduction="sum")
    jsd = _trl_function()
    if jsd is None:
        terms = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True)
        return terms[kept].sum() + ce
    return jsd(student, teacher, labels=labels, beta=0, num_items_in_batch=1) + ce


@cache
def _trl_function() -> Callable[..., Tensor] | None:
    try:
        from trl.experimental.gkd import GKDTrainer
    except ImportError:
        return None
    return GKDTrainer.generalized_jsd_loss


def full_logits(loss: Callable[[Any, Any, Tensor], Tensor], *, give_labels: bool) -> Step:
    """The usual training step: both models compute the logits of every token, question by question."""

    def step(models: Models, examples: Sequence[Example]) -> float:
        total = 0.0
        for example, text in singles(examples):
            inputs = {"input_ids": text["input_ids"], "attention_mask": torch.ones_like(text["input_ids"])}
            inputs |= {"labels": text["labels"]} if give_labels else {}
            with torch.no_grad():
                teacher = models.teacher(**inputs, **example.images)
            student = models.student(**inputs, **example.images)
            part = loss(student, teacher, text["labels"]) / count_answer_tokens(examples)
            part.backward()
            total += part.item()
        return total

    return step


def online(models: Models, examples: Sequence[Example]) -> float:
    """Ours with the teacher in memory, question by question."""
    total = 0.0
    for example, text in singles(examples):
        total += _backward(models, text, example.images, _ask(models, text, example.images), examples)
    return total


def online_packed(models: Models, examples: Sequence[Example]) -> float:
    """Ours with the teacher in memory, all questions of the images at once."""
    text, images = text_of(examples), images_of(examples)
    return _backward(models, text, images, _ask(models, text, images), examples)


def cached(models: Models, examples: Sequence[Example]) -> float:
    """Ours with stored hidden states of the teacher, question by question."""
    total, rows = 0.0, iter(torch.cat([example.hidden for example in examples]))
    for example, text in singles(examples):
        hidden = torch.stack([next(rows) for _ in range(int((text["labels"] != IGNORE).sum()))])
        total += _backward(models, text, example.images, hidden @ models.head.T, examples)
    return total


def packed(models: Models, examples: Sequence[Example]) -> float:
    """Ours with stored hidden states, all questions of the images at once."""
    hidden = torch.cat([example.hidden for example in examples])
    return _backward(models, text_of(examples), images_of(examples), hidden @ models.head.T, examples)


def packed_vision(models: Models, examples: Sequence[Example]) -> float:
    """Ours with stored hidden states and stored features of the frozen tower, all questions of the images at once."""
    hidden = torch.cat([example.hidden for example in examples])
    images = images_of(examples) | {"features": torch.cat([example.features for example in examples])}
    del images["pixel_values"]
    return _backward(models, text_of(examples), images, hidden @ models.head.T, examples)


@torch.no_grad()
def _ask(models: Models, text: dict[str, Tensor], images: dict[str, Tensor]) -> Tensor:
    return answer_logits(models.teacher, text, images, vocab_size=len(models.head))[0]


def _backward(
    models: Models, text: dict[str, Tensor], images: dict[str, Tensor], teacher: Tensor, examples: Sequence[Example]
) -> float:
    """Add these questions' share of the batch's loss, a mean over answer tokens, to the gradient, and return it.

    Args:
        models: the student gets the gradient.
        text: tokens of the questions.
        images: pictures of the questions.
        teacher: (answer tokens of these questions, V) logits.
        examples: the whole batch.
    """
    logits, targets = answer_logits(models.student, text, images, vocab_size=len(models.head))
    loss = answer_cross_entropy(logits=logits, targets=targets)
    loss = loss + forward_kl(student_logits=logits, teacher_logits=teacher)
    loss = loss / count_answer_tokens(examples)
    loss.backward()
    return loss.item()


VARIANTS: dict[str, Step] = {
    "original": full_logits(original_loss, give_labels=True),
    "TRL": full_logits(trl_loss, give_labels=False),
    "online": online,
    "online packed": online_packed,
    "cached": cached,
    "packed": packed,
    "cached vision": packed_vision,
}
WITH_TEACHER = ("original", "TRL", "online", "online packed")


def measure_variant(name: str, pair: Width, folder: Path, seconds: float) -> dict[str, float]:
    """Measure a variant in this process: loss of its first step, questions per second, growth of the peak memory."""
    stored = torch.load(folder / "cache.pt", weights_only=True)
    models = Models(build_student(pair), build_teacher(pair) if name in WITH_TEACHER else None, stored["head"])
    examples = [Example(*example) for example in stored["examples"]]
    batches = itertools.cycle([examples[i : i + IMAGES] for i in range(0, len(examples), IMAGES)])
    gc.collect()
    before = resident_mib()
    loss = VARIANTS[name](models, next(batches))  # also warms up

    def step() -> None:
        models.student.zero_grad()
        VARIANTS[name](models, next(batches))

    steps = _per_second(step, seconds)
    return {"loss": loss, "questions_per_s": steps * IMAGES * QUESTIONS, "growth_mib": peak_memory() / 2**20 - before}


def resident_mib() -> float:
    """Memory of this process now; without /proc (macOS) its peak so far, from which growth is counted then."""
    if not STATM.exists():
        return peak_memory() / 2**20
    pages = int(STATM.read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / 2**20


# scoring


def score_one_by_one(model: nn.Module, examples: Sequence[Example]) -> list[list[int]]:
    """Stock greedy `generate`, a call per question."""
    answers = []
    for example, text in singles(examples):
        ids = model.generate(
            input_ids=text["input_ids"],
            attention_mask=torch.ones_like(text["input_ids"]),
            do_sample=False,
            max_new_tokens=ANSWER_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
            **example.images,
        )
        answers.append(ids[0, text["input_ids"].shape[1] :].tolist())
    return answers


def score_together(model: nn.Module, examples: Sequence[Example]) -> list[list[int]]:
    """Our greedy decoding: the questions of an image share its prefix, images share a batch."""
    options = dict(vocab_size=model.config.text_config.vocab_size, eos_token_id=-1, max_new_tokens=ANSWER_TOKENS)
    found = greedy_answers(model, text_of(examples), images_of(examples), **options)
    return [answer for row in found.tokens for answer in row]


SCORING = {"one by one": score_one_by_one, "together": score_together}


@torch.no_grad()
def measure_scoring(name: str, pair: Width, seconds: float) -> dict[str, Any]:
    """Measure a way of scoring in this process: its answers, and questions per second."""
    model = build_student(pair)
    examples = [random_example(seed, pair.vocabulary) for seed in range(SCORED_IMAGES)]
    answers = SCORING[name](model, examples)  # also warms up
    passes = _per_second(lambda: SCORING[name](model, examples), seconds)
    return {"answers": answers, "questions_per_s": passes * QUESTIONS * len(examples)}


# how near the machine's limit


def measure_ceiling(seconds: float) -> dict[str, float]:
    """GFLOP/s of a training step and of a plain matrix product of its typical shape.

    The models are wide enough for arithmetic, and not overhead, to take most of the time.
    """
    width = Width(8_000, 64, 1024, 1024)
    student = build_model(width.student, STUDENT_LAYERS, width)
    example = random_example(0, width.vocabulary)
    example = example._replace(questions=[(q, [5]) for q, _ in example.questions * 10])
    text, hidden = text_of([example]), torch.randn(len(example.questions), width.teacher)
    models = Models(student, None, student.get_output_embeddings().weight.detach())

    def step() -> None:
        student.zero_grad()
        _backward(models, text, example.images, hidden @ models.head.T, [example])

    with FlopCounterMode(display=False) as counter:
        step()
    n_tokens = text["input_ids"].shape[1]
    a, b = torch.randn(n_tokens, width.student), torch.randn(width.student, 2 * width.student)
    product = 2 * n_tokens * b.numel()
    a @ b
    rates = {"step": [], "product": []}
    for _ in range(3):
        rates["step"].append(counter.get_total_flops() * _per_second(step, seconds / 2))
        rates["product"].append(product * _per_second(lambda: a @ b, seconds / 4))
    return {name: median(values) / 1e9 for name, values in rates.items()}


def _per_second(call: Callable[[], Any], seconds: float) -> float:
    n, started = 0, time.perf_counter()
    while n == 0 or time.perf_counter() - started < seconds:
        call()
        n += 1
    return n / (time.perf_counter() - started)


# the run


def apart(call: Callable[..., Any], *args: Any) -> Any:
    """Make a call in a new process, where all modules are imported already, and return its result."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.cost"])
    with context.Pool(1) as pool:
        return pool.apply(call, args)


def take_turns(
    names: Sequence[str], rounds: int, measure: Callable[[str], dict[str, Any]], label: str
) -> dict[str, list]:
    """Take `rounds` measurements per name, in turn, every second round in reverse order."""
    found: dict[str, list] = {name: [] for name in names}
    for number in range(rounds):
        for name in list(names)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(measure(name))
            print(
                f"{label}, round {number + 1}: {name} {found[name][-1]['questions_per_s']:.2f} questions/s", flush=True
            )
    return found


def check_equal_losses(found: dict[str, list], label: str) -> None:
    """Compare the losses of all variants. Raises UserError unless they are equal."""
    losses = {name: runs[0]["loss"] for name, runs in found.items()}
    first = next(iter(losses.values()))
    if not all(abs(loss - first) <= LOSS_TOLERANCE * abs(first) for loss in losses.values()):  # nan is not
        raise UserError(f"{label}: the variants' losses differ, so their times cannot be compared: {losses}")


def training_part(args: argparse.Namespace) -> dict[str, Any]:
    """For both pairs of models, measure all variants and what storing the teacher's outputs costs."""
    results = {}
    for label, pair in PAIRS.items():
        with tempfile.TemporaryDirectory() as folder:
            costs = apart(prepare, pair, Path(folder), 4)
            found = take_turns(
                list(VARIANTS),
                args.rounds,
                lambda name, pair=pair, folder=folder: apart(measure_variant, name, pair, Path(folder), args.seconds),
                label,
            )
        check_equal_losses(found, label)
        results[label] = {"costs": costs, "variants": {name: _medians(runs) for name, runs in found.items()}}
    return results


def _medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: median(run[key] for run in runs) for key in runs[0]}


def scoring_part(args: argparse.Namespace) -> dict[str, float]:
    """Measure both ways of scoring, in questions per second. Raises UserError when their answers differ."""
    pair = PAIRS["V=8k"]
    found = take_turns(
        list(SCORING),
        args.rounds,
        lambda name: apart(measure_scoring, name, pair, args.seconds),
        "scoring",
    )
    answers = [runs[0]["answers"] for runs in found.values()]
    if answers[0] != answers[1]:
        raise UserError(f"scoring: the answers differ, so the times cannot be compared: {answers}")
    return {name: median(run["questions_per_s"] for run in runs) for name, runs in found.items()}


def report(results: dict[str, Any], seconds: float) -> str:
    """The text of README.md."""
    text = ["# Cost of a question", "", introduction(seconds), ""]
    for label, part in results["training"].items():
        text += [f"## Training, {label}", "", *training_table(part, results["tflop"]), ""]
    one, together = results["scoring"]["one by one"], results["scoring"]["together"]
    step, product = results["ceiling"]["step"], results["ceiling"]["product"]
    text += [
        "## Scoring",
        "",
        f"One by one {one:.1f} questions/s, together {together:.1f}: {together / one:.1f}x, the same answers.",
        "",
        "## Ceiling",
        "",
        f"A training step of a width of 1,024 does {step:.0f} GFLOP/s, a plain matrix product {product:.0f}: "
        f"{100 * step / product:.0f} %.",
        "",
        "## At true size",
        "",
        "The last column of the tables has TFLOP per question, counted for the true 0.5B and 7B on meta tensors: what "
        "a GPU is spared. The ratios of questions per second are of small models with large vocabularies on a CPU, "
        "where the output layer weighs far more than at true size. Neither figure follows from the other.",
    ]
    return "\n".join(text) + "\n"


def introduction(seconds: float) -> str:
    """What was measured, and on what."""
    trl = f"TRL's own function, {version('trl')}." if find_spec("trl") else "TRL: the formula, `trl` is not installed."
    return (
        f"`make bench`, {date.today()}, commit {git_commit()}, {len(available_cores())} core(s) of "
        f"{platform.machine()}, {duration(seconds)} in all. Ratios to the original loop; medians. All variants have "
        f"the same weights and the same loss to {LOSS_TOLERANCE:g}. {QUESTIONS} questions per image, {IMAGES} images "
        f"per step, tower frozen, forward and backward. {trl}"
    )


def training_table(part: dict[str, Any], tflop: dict[str, float]) -> list[str]:
    """Markdown rows, and when the stored outputs have paid for themselves."""
    variants, costs = part["variants"], part["costs"]
    base = variants["original"]
    lines = [
        "| Variant | questions/s | ratio | peak memory growth, MiB | of the original's | loss | "
        "TFLOP per question at true size |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, run in variants.items():
        speed, growth = run["questions_per_s"], run["growth_mib"]
        cells = [f"{speed:.2f}", f"{speed / base['questions_per_s']:.1f}", f"{growth:.0f}"]
        cells += [f"{growth / base['growth_mib']:.2f}", f"{run['loss']:.5f}", f"{tflop[name]:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    saved = 1 / variants["online packed"]["questions_per_s"] - 1 / variants["packed"]["questions_per_s"]
    epochs = costs["teacher_s"] / saved
    lines += [
        "",
        f"The teacher's one forward pass costs {1000 * costs['teacher_s']:.1f} ms per question, storing the features "
        f"of the tower {1000 * costs['tower_s']:.1f} ms: against `online packed` this has paid for itself within epoch "
        f"{max(1, -(-epochs // 1)):.0f} ({epochs:.2f} epochs).",
    ]
    return lines


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=at_least(1), default=3, help="number of measurements of every variant (%(default)s)")
    add(
        "--seconds",
        type=at_least(0.0),
        default=2.0,
        help="least seconds per measurement; 0 = a single step (%(default)s)",
    )
    add("--cores", type=at_least(1), default=1, help="number of cores to use; the fewer, the less noise (%(default)s)")
    add("--output", type=Path, default=ROOT / "benchmarks" / "cost", help="folder for the tables (benchmarks/cost)")
    args = parser.parse_args(argv)
    check_cores(parser, args.cores)
    return args


def main(args: argparse.Namespace) -> None:
    """Measure, check, write."""
    use_cores(available_cores()[: args.cores])  # the measured processes inherit it
    started = time.monotonic()
    results = {
        "training": training_part(args),
        "scoring": scoring_part(args),
        "ceiling": apart(measure_ceiling, args.seconds),
        "tflop": apart(true_flops),
    }
    text = report(results, time.monotonic() - started)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "README.md").write_text(text, encoding="utf-8")
    write_json(args.output / "results.json", results | {"commit": git_commit(), "date": str(date.today())})
    print(text)


if __name__ == "__main__":
    run_script(main, parse_args)
