"""Does the cost of an image stay the same when there are ten times as many? The teacher's look and an epoch of training.

For every size a miniature world of its own is rendered, and the third phase, which has every term and a bank row per image,
runs on it through its command line: until the teacher has seen all images, again with everything stored (the cost of starting),
and for an epoch that keeps the pictures. Then epochs that find everything are timed, from the smallest world to the largest and
back: a machine's speed drifts, and the mean of both times of a size stands against the middle one.

    python benchmarks/scaling.py [--images 1000 10000]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, available_cores, git_commit, run_script  # first: loads .env

# isort: split
import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from dataset.miniature.world import ensure_world
from distillation.models import MINIATURE_STUDENT, MINIATURE_TEACHER
from distillation.run.flags import MINIATURE_DEFAULTS

EXPERIMENT = "knowledge_distillation7b_double_trouble/phase3"
HELD_OUT = 8  # images of val and of test: all time goes into training images
SETTINGS = {
    "student_name": MINIATURE_STUDENT,
    "teacher_name": MINIATURE_TEACHER,
    "teacher_questions": 8,
    "max_epochs": 1,
}


@dataclass(frozen=True)
class World:
    """A miniature world of `n_images` for training, with the runs on it."""

    n_images: int
    folder: Path

    def train(self, name: str, *more: str) -> tuple[float, dict]:
        """The third phase from the stock student: seconds of the process, and the run's record."""
        flags = [f"--{key}={value}" for key, value in (MINIATURE_DEFAULTS | SETTINGS).items()]
        command = [sys.executable, str(ROOT / "distillation" / EXPERIMENT / "train_online_kd.py"), *flags]
        os.sync()  # what earlier runs wrote is not written to the disk on this one's time
        started = time.monotonic()
        done = subprocess.run(
            [*command, "--from_stock", "--picture_cache", "--run_name", name, *more],
            env=os.environ | {"ROOT_DATA_DIR": str(self.folder / "world"), "MAIN_ROOT_DATA_DIR": str(self.folder)},
        )
        if done.returncode:
            raise UserError(f"the run of {self.n_images} images failed with exit code {done.returncode}; see above")
        record = self.folder / EXPERIMENT / "tensorboard_logs" / name / "run.json"
        return time.monotonic() - started, json.loads(record.read_text(encoding="utf-8"))

    def prepare(self) -> dict[str, float]:
        """Render it, let the teacher look, keep the pictures: milliseconds per image of the look, seconds of a start."""
        ensure_world(self.folder / "world", train=self.n_images, val=HELD_OUT, test=HELD_OUT)
        first, _ = self.train("first", "--max_steps", "1")
        start, _ = self.train("start", "--max_steps", "1")
        self.train("pictures")
        return {"look_ms": 1000 * (first - start) / self.n_images, "start_s": start}


def there_and_back(sizes: Sequence[int]) -> list[int]:
    """1000, 10000 -> 1000, 10000, 1000."""
    rising = sorted(set(sizes))
    return rising + rising[-2::-1]


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
    print(f"commit {git_commit()}, {len(available_cores())} cores")
    lines = ["| images | the teacher's look, ms/image | an epoch, ms/image | a start, s | peak memory, GiB |"]
    lines.append("| ---: |" + " ---: |" * 4)
    with tempfile.TemporaryDirectory() as folder:
        worlds = {n: World(n, Path(folder) / str(n)) for n in sorted(set(args.images))}
        costs = {n: world.prepare() for n, world in worlds.items()}
        epochs: dict[int, list[dict]] = {n: [] for n in worlds}
        for n in there_and_back(args.images):
            epochs[n].append(worlds[n].train(f"epoch{len(epochs[n])}")[1])
    for n, cost in costs.items():
        epoch_ms = 1000 * mean(epoch["seconds"] for epoch in epochs[n]) / n
        peak = max(epoch["peak_memory_gib"] for epoch in epochs[n])
        lines.append(f"| {n} | {cost['look_ms']:.1f} | {epoch_ms:.1f} | {cost['start_s']:.1f} | {peak:.2f} |")
    print("\n".join(lines))


if __name__ == "__main__":
    run_script(main, parse_args)
