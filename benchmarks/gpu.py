"""What every script takes on this machine's GPU, beside what `--dry_run` plans: time, memory, share of the matrix rate.

Models have the true configurations and random weights, so nothing is downloaded; pictures and questions are made up.
Measured are, for each training script, a micro-batch with its update; the teacher's pass in 16 and in 4 bits; scoring;
and a step in float32 beside one in bfloat16. The loss of a step in float32 is compared with the CPU's. The matrix rate
is that of this card: the best of a few large products in bfloat16.

    python benchmarks/gpu.py [--output benchmarks/gpu]
    python benchmarks/gpu.py --tiny     # small models on whatever device is here, to see that it runs
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import (  # first: loads .env
    UserError,
    check_writable,
    git_commit,
    load_script,
    peak_memory,
    run_script,
    write_json,
)

# isort: split
import argparse
import dataclasses
import gc
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from dataset.inputs.pictures import ImageSettings
from distillation.cost import (
    ASKED,
    Built,
    batch_of_shapes,
    build,
    configuration,
    cost_of,
    processor_of,
    reading_cost,
)
from distillation.decoding import prefill
from distillation.models import MINIATURE_STUDENT, MINIATURE_TEACHER, STUDENT_NAME, TEACHER_NAME, new_model
from distillation.run.machine import half_dtype, quieten

TROUBLE = "distillation/knowledge_distillation7b_double_trouble"
SCRIPTS = {  # name -> path, further flags
    "baseline_depth": ("distillation/baseline_depth/train.py", ()),
    "baseline_rgb05b": ("distillation/baseline_rgb05b/train.py", ()),
    "baseline_rgb7b": ("distillation/baseline_rgb7b/train2.py", ()),
    "phase 1": (f"{TROUBLE}/phase1/train_online_kd.py", ()),
    "phase 2": (f"{TROUBLE}/phase2/train_online_kd.py", ("--from_stock",)),
    "phase 3": (f"{TROUBLE}/phase3/train_online_kd.py", ("--from_stock",)),
    "feature-based": ("distillation/knowledge_distillation7b_feature_based/train_online_kd.py", ()),
    "logit-based": ("distillation/knowledge_distillation7b_logit_based/train_online_kd.py", ()),
}
STEPS = 5  # that are timed, after one that warms up


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str
    tflop: float
    planned_gib: float
    seconds: float | None = None  # of a micro-batch with its update, or of a pass; None = it does not fit the card
    gib: float | None = None  # peak

    def cells(self, rate: float) -> str:
        """As a row of a Markdown table; `rate`: the card's matrix rate in TFLOP/s."""
        if self.seconds is None:
            return f"| {self.what} | out of memory | | | | {self.planned_gib:.2f} | |"
        share = 100 * self.tflop / self.seconds / rate
        differs = 100 * (self.planned_gib / self.gib - 1)
        return (
            f"| {self.what} | {self.seconds:.3f} | {self.tflop / self.seconds:.2f} | {share:.0f} | {self.gib:.2f} | "
            f"{self.planned_gib:.2f} | {differs:+.0f} % |"
        )


def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_model(
    name: str, *, dtype: torch.dtype = torch.float32, bits: int = 16, where: torch.device | None = None
) -> nn.Module:
    """A model with the configuration of `name` and random weights, as `load_model` returns it.

    Args:
        name: hub id or folder.
        dtype: of the weights.
        bits: of its language model.
        where: it is made; None = on `device()`, which is much faster than on the CPU.
    """
    torch.manual_seed(0)
    config, _ = configuration(name)
    with where or device():
        model = new_model(config, dtype)
    if bits == 4:
        pack(model, dtype)
    return model


def pack(model: nn.Module, dtype: torch.dtype) -> None:
    """Put the language model's linear layers into 4 bits, as `four_bits` has `from_pretrained` do it."""
    from bitsandbytes.nn import Linear4bit  # an optional package; `rows_of` asks whether it is there

    for layer in model.model.language_model.layers:
        for parent in list(layer.modules()):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    packed = Linear4bit(
                        linear.in_features,
                        linear.out_features,
                        bias=linear.bias is not None,
                        compute_dtype=dtype,
                        quant_type="nf4",
                    )
                    packed.load_state_dict(linear.state_dict())
                    setattr(parent, name, packed)


def moved(value: Any) -> Any:
    """Tensors of a batch, on the device."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device()), value)


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call, the mean of some after one that warms up."""
    call()
    wait()
    started = time.monotonic()
    for _ in range(STEPS):
        call()
    wait()
    return (time.monotonic() - started) / STEPS


def wait() -> None:
    """Until the device has computed what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def fresh_memory() -> None:
    """Let go of what is no longer used, and count the peak from here on."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def taken_gib() -> float:
    """The peak since `fresh_memory`; without a GPU, this process's so far."""
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()) / 2**30


def matrix_rate() -> float:
    """TFLOP/s of the best of a few large products in bfloat16, on this device."""
    best = 0.0
    for side in (4096, 8192) if torch.cuda.is_available() else (512, 1024):
        a = torch.randn(side, side, dtype=torch.bfloat16, device=device())
        best = max(best, 2 * side**3 / timed(lambda a=a: a @ a) / 1e12)
    return best


def flags_of(name: str, args: argparse.Namespace, *more: str) -> tuple[argparse.Namespace, Path]:
    """A script's flags, and its path."""
    path, own = SCRIPTS[name]
    argv = ["--batch_size", "1", "--accumulate_grad_batches", "1", *own, *more]
    if args.tiny:
        student = MINIATURE_TEACHER if name == "baseline_rgb7b" else MINIATURE_STUDENT
        argv += ["--student_name", student, "--image_tokens", "one_tile"]
        argv += ["--teacher_name", MINIATURE_TEACHER] if "distill" in path.split("/")[1] or TROUBLE in path else []
    return load_script(path).parse_args(argv), ROOT / path


def step_row(name: str, args: argparse.Namespace, *more: str) -> Row:
    """A training step of a script."""
    flags, path = flags_of(name, args, *more)
    cost = cost_of(flags, path)
    half = half_dtype(flags.precision if flags.precision != "auto" else "bf16-mixed")

    def steps() -> float:
        built = on_device(build(flags, path, random_model))

        def step() -> None:
            with torch.autocast(device().type, half, enabled=half is not None):
                loss = built.module.training_step(built.batch, 0)["loss"]
            loss.backward()
            built.optimizer.step()
            built.optimizer.zero_grad()

        return timed(step)

    return measured(Row(" ".join([name, *more]), cost.tflop, cost.memory.total / 2**30), steps)


def measured(row: Row, call: Callable[[], float]) -> Row:
    """The row with the seconds that `call` returns and the memory that it takes, where the card has as much."""
    fresh_memory()
    try:
        return dataclasses.replace(row, seconds=call(), gib=taken_gib())
    except torch.OutOfMemoryError:
        return row


def on_device(built: Built) -> Built:
    """Module and batch on the device; the optimizer holds the same weights."""
    built.module.to(device())
    built.batch = moved(built.batch)
    return built


def pass_row(what: str, name: str, images: ImageSettings, *, bits: int = 16, batch_size: int = 2) -> Row:
    """Pictures and questions through a model, without a backward pass."""
    half = torch.bfloat16
    cost = reading_cost(name, images, half, batch_size=batch_size, questions=ASKED)[bits]

    def passes() -> float:
        model = random_model(name, dtype=half, bits=bits).to(device()).eval()
        flags = argparse.Namespace(batch_size=batch_size, vision_cache=False)
        batch = moved(batch_of_shapes(flags, images, model.config, processor_of(name), None, ASKED))
        with torch.no_grad(), torch.autocast(device().type, half):
            return timed(lambda: prefill(model, batch["text"], batch["student_images"]))

    return measured(Row(what, cost.tflop * batch_size, cost.memory.total / 2**30), passes)


def loss_difference(name: str, args: argparse.Namespace) -> float | None:
    """By how much of it a script's loss in float32 differs between the device and the CPU; None = it does not fit."""
    fresh_memory()
    flags, path = flags_of(name, args, "--precision", "32-true")
    built = build(flags, path, partial(random_model, where=torch.device("cpu")))
    with torch.no_grad():
        on_cpu = float(built.module.training_step(built.batch, 0)["loss"])
        try:
            there = on_device(built)
            return abs(float(there.module.training_step(there.batch, 0)["loss"]) / on_cpu - 1)
        except torch.OutOfMemoryError:
            return None


def rows_of(args: argparse.Namespace) -> Iterator[Row]:
    """All that is measured, one after the other."""
    yield from (step_row(name, args) for name in SCRIPTS)
    yield step_row("baseline_depth", args, "--precision", "32-true")
    rgb = ImageSettings("rgb", image_tokens="one_tile" if args.tiny else "anyres")
    teacher = MINIATURE_TEACHER if args.tiny else TEACHER_NAME
    yield pass_row("the teacher's pass", teacher, rgb)
    if importlib.util.find_spec("bitsandbytes"):
        yield step_row("baseline_rgb7b", args, "--base_bits", "4")
        yield pass_row("the teacher's pass in 4 bits", teacher, rgb, bits=4)
    else:
        print("bitsandbytes is not installed: nothing is measured in 4 bits", file=sys.stderr)
    student = MINIATURE_STUDENT if args.tiny else STUDENT_NAME
    yield pass_row("scoring", student, dataclasses.replace(rgb, modality="depth"))


def report(rows: Sequence[Row], rate: float, differences: dict[str, float | None], name: str) -> str:
    """The table, and what it says about losses."""
    losses = (
        f"{script} {'out of memory' if difference is None else f'{difference:.1e}'}"
        for script, difference in differences.items()
    )
    lines = [
        f"# On {name}",
        "",
        f"{date.today()}, commit {git_commit()}, torch {torch.__version__}; {rate:.1f} TFLOP/s in large products in "
        "bfloat16. Batches of one picture, two without a backward pass. Without a GPU the peak is that of the process, "
        "with all that it has loaded.",
        "",
        "| | s | TFLOP/s | % of the matrix rate | peak, GiB | planned, GiB | plan against peak |",
        "| --- |" + " ---: |" * 6,
        *(row.cells(rate) for row in rows),
        "",
        f"Losses in float32, here against the CPU's: {', '.join(losses) or 'not compared yet'}",
    ]
    return "\n".join([*lines, ""])


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the miniature's models, on whatever device is here")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "gpu", help="folder for the table (default: %(default)s)"
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure, write, print."""
    quieten()
    if not args.tiny and not torch.cuda.is_available():
        raise UserError("no CUDA GPU is here; --tiny runs small models on this CPU, to see that it works")
    check_writable(args.output, "--output")
    args.output.mkdir(parents=True, exist_ok=True)
    rate, rows, differences = matrix_rate(), [], {}
    for row in rows_of(args):
        rows.append(row)
        write(args.output, rows, rate, differences)
    for name in SCRIPTS:
        if args.tiny or name != "baseline_rgb7b":  # in float32 that is more than most machines have
            differences[name] = loss_difference(name, args)
            write(args.output, rows, rate, differences)
    print((args.output / "README.md").read_text(encoding="utf-8"))


def write(output: Path, rows: Sequence[Row], rate: float, differences: dict[str, float | None]) -> None:
    """Write table and record of what is measured so far."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    (output / "README.md").write_text(report(rows, rate, differences, name), encoding="utf-8")
    record = {"device": name, "rate_tflops": rate, "rows": [vars(row) for row in rows], "losses": differences}
    write_json(output / "record.json", record)


if __name__ == "__main__":
    run_script(main, parse_args)
