"""Does the cost of an image stay the same when there are ten times as many? The teacher's look and an epoch of training.

For every size a miniature world of its own is rendered, and the third phase, which has every term and a bank row per image,
runs on it through its command line: until the teacher has seen all images, again with everything stored (the cost of starting),
for an epoch that keeps the pictures, and for one that finds them. From their times: seconds per image of the look and of the epoch, and the peak memory.

    python benchmarks/scaling.py [--images 1000 10000]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, git_commit, run_script  # first: loads .env

# isort: split
import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence

from dataset.miniature.world import ensure_world
from distillation.models import MINIATURE_STUDENT, MINIATURE_TEACHER
from distillation.training import MINIATURE_DEFAULTS

EXPERIMENT = "knowledge_distillation7b_double_trouble/phase3"
HELD_OUT = 8  # images of val and of test: all time goes into training images
SETTINGS = {
    "student_name": MINIATURE_STUDENT,
    "teacher_name": MINIATURE_TEACHER,
    "teacher_questions": 8,
    "max_epochs": 1,
}


def measure(n_images: int, folder: Path) -> dict[str, float]:
    """Milliseconds per image of the look and of the epoch, seconds of a start, and GiB at most, for a world of this size."""
    world = ensure_world(folder / "world", train=n_images, val=HELD_OUT, test=HELD_OUT)

    def run(name: str, *more: str) -> tuple[float, dict]:
        flags = [f"--{key}={value}" for key, value in (MINIATURE_DEFAULTS | SETTINGS).items()]
        command = [sys.executable, str(ROOT / "distillation" / EXPERIMENT / "train_online_kd.py"), *flags]
        started = time.monotonic()
        done = subprocess.run(
            [*command, "--from_stock", "--picture_cache", "--run_name", name, *more],
            env=os.environ | {"ROOT_DATA_DIR": str(world), "MAIN_ROOT_DATA_DIR": str(folder)},
        )
        if done.returncode:
            raise UserError(f"the run of {n_images} images failed with exit code {done.returncode}; see above")
        record = folder / EXPERIMENT / "tensorboard_logs" / name / "run.json"
        return time.monotonic() - started, json.loads(record.read_text(encoding="utf-8"))

    first, _ = run("first", "--max_steps", "1")
    start, _ = run("start", "--max_steps", "1")
    run("pictures")
    _, epoch = run("epoch")
    return {
        "look_ms": 1000 * (first - start) / n_images,
        "epoch_ms": 1000 * epoch["seconds"] / n_images,
        "start_s": start,
        "peak_gib": epoch["peak_memory_gib"],
    }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10000], help="one measurement each")
    args = parser.parse_args(argv)
    if min(args.images) < 2:
        parser.error("--images: give at least 2")
    return args


def main(args: argparse.Namespace) -> None:
    """Measure and print."""
    print(f"commit {git_commit()}, {len(os.sched_getaffinity(0))} cores")
    lines = ["| images | the teacher's look, ms/image | an epoch, ms/image | a start, s | peak memory, GiB |"]
    lines.append("| ---: |" + " ---: |" * 4)
    for n_images in args.images:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(n_images, Path(folder))
        lines.append(
            f"| {n_images} | {found['look_ms']:.1f} | {found['epoch_ms']:.1f} | {found['start_s']:.1f} | {found['peak_gib']:.2f} |"
        )
    print("\n".join(lines))


if __name__ == "__main__":
    run_script(main, parse_args)
