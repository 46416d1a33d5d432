"""How long does a start take until it knows what is stored of the teacher, and what did it take to read all of it?

A folder of outputs is made as the teacher's cache makes it, with small tensors, beside as many small pictures. Timed:
reading and checking everything, as every start did up to 2026-11-26, the first start that only looks for what is there
(it reads the pictures, to digest them), and every later one. Then the means of all images, which InfoNCE compares with,
read out of a file per image, and out of the one file that is written when they are read for the first time.

    python benchmarks/opening.py [--images 100000]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import at_least, git_commit, run_script, sha256  # first: loads .env

# isort: split
import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dataset.inputs.store import TensorStore
from dataset.questions.rows import QuestionRow
from distillation.teacher_cache import HEAD, Group, StoredOutputs, image_name, pooled_name, stored_outputs

WIDTH = 64  # of the tensors; the true ones have 1152 and 3584 channels
QUESTIONS = [("What is this?", "a chair"), ("How many chairs are there?", "two")]


def make(root: Path, store: TensorStore, n_images: int) -> list[Group]:
    """Pictures of a few bytes, the outputs for them, and their questions."""
    groups = []
    for number in range(n_images):
        path = f"{number // 1000:04d}/{number:08d}.jpg"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(f"picture {number}".encode() * 100)
        asked = [QuestionRow(f"{number}-{i}", *QUESTIONS[i], path, path, "Count") for i in range(2)]
        name = image_name(sha256(root / path), asked)
        store.put(name, {"patches": torch.zeros(4, WIDTH), "hidden": torch.zeros(4, WIDTH)})
        store.put(pooled_name(name), {"pooled": torch.zeros(WIDTH), "squares": torch.zeros(WIDTH)})
        groups.append(asked)
    store.put(HEAD, {"head": torch.zeros(8, WIDTH)})
    return groups


def read_everything(root: Path, store: TensorStore, groups: Sequence[Group]) -> None:
    """Every picture and both files of every image, each with its checksum."""
    for rows in groups:
        name = image_name(sha256(root / rows[0].image_path), rows)
        assert store.get(name) and store.get(pooled_name(name))


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, and what it returns."""
    started = time.monotonic()
    returned = call()
    return time.monotonic() - started, returned


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=at_least(1), default=100_000, help="number of images (%(default)s)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        root, store = Path(folder) / "pictures", TensorStore(Path(folder) / "outputs" / "teacher")
        groups = make(root, store, args.images)

        def start() -> StoredOutputs:
            return stored_outputs(store.folder, groups, lambda: None, {}, root=root, batch_size=1)

        before, _ = seconds(lambda: read_everything(root, store, groups))
        first, outputs = seconds(start)
        later, outputs = seconds(start)
        files, _ = seconds(lambda: outputs.pooled(range(args.images)))
        bank, _ = seconds(lambda: outputs.pooled(range(args.images)))
    print(f"commit {git_commit()}, {args.images} images\n")
    print("| | seconds |\n| --- | ---: |")
    print(f"| reading everything, as before | {before:.1f} |")
    print(f"| the first start | {first:.1f} |\n| a later start | {later:.1f} |")
    print(f"| means of all images, a file each | {files:.1f} |\n| from one file | {bank:.2f} |")


if __name__ == "__main__":
    run_script(main, parse_args)
