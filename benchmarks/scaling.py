"""Does the cost of an image stay the same when there are ten times as many?

Measured are precomputing the teacher's outputs and an epoch of training. For every size a miniature world of its own is
rendered. The third phase, which has every loss term and a row of the memory bank per image, runs on it by its command
line: first until the teacher's outputs are stored, again with these found on disk (the cost of a start), and then for
an epoch that stores the pictures. After that, epochs that find everything on disk are timed, from the smallest world to
the largest and back. A machine's speed drifts, and the mean of the two epochs of every size evens that out.

    python benchmarks/scaling.py [--images 1000 10000]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, at_least, available_cores, git_commit, run_script  # first: loads .env

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
HELD_OUT = 8  # images of val and of test: few, since training images are what is measured
SETTINGS = {
    "student_name": MINIATURE_STUDENT,
    "teacher_name": MINIATURE_TEACHER,
    "teacher_questions": 8,
    "max_epochs": 1,
}


@dataclass(frozen=True)
class World:
    """A miniature world with `n_images` for training, and the runs on it."""

    n_images: int
    folder: Path

    def train(self, name: str, *more: str) -> tuple[float, dict]:
        """Train the third phase from the stock student: seconds of the process, and the run's record."""
        flags = [f"--{key}={value}" for key, value in (MINIATURE_DEFAULTS | SETTINGS).items()]
        command = [sys.executable, str(ROOT / "distillation" / EXPERIMENT / "train_online_kd.py"), *flags]
        os.sync()  # so that this run's time does not include writing earlier runs' files to the disk
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
        """Render the world, precompute the teacher's outputs, store the pictures.

        Returns:
            `teacher_ms`, milliseconds per image that the teacher takes; `start_s`, seconds of a start.
        """
        ensure_world(self.folder / "world", train=self.n_images, val=HELD_OUT, test=HELD_OUT)
        first, _ = self.train("first", "--max_steps", "1")
        start, _ = self.train("start", "--max_steps", "1")
        self.train("pictures")
        return {"teacher_ms": 1000 * (first - start) / self.n_images, "start_s": start}


def there_and_back(sizes: Sequence[int]) -> list[int]:
    """1000, 10000 -> 1000, 10000, 1000."""
    rising = sorted(set(sizes))
    return rising + rising[-2::-1]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images",
        type=at_least(2),
        nargs="+",
        default=[1000, 10000],
        help="numbers of training images to compare (default: 1000 10000)",
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure and print."""
    print(f"commit {git_commit()}, {len(available_cores())} cores")
    lines = ["| images | the teacher's outputs, ms/image | an epoch, ms/image | a start, s | peak memory, GiB |"]
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
        lines.append(f"| {n} | {cost['teacher_ms']:.1f} | {epoch_ms:.1f} | {cost['start_s']:.1f} | {peak:.2f} |")
    print("\n".join(lines))


if __name__ == "__main__":
    run_script(main, parse_args)
