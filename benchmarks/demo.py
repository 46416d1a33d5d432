"""The whole road on the built-in world, in minutes on a laptop: what `make demo` runs.

Renders the world and trains the teacher; then, side by side and each on its share of the cores, the baselines and the three
phases of the distillation; scores them all on the test split and compares them. Every command is printed before it runs: each
of them can be given by hand.

Writes  <output>/ with the table, pictures and a folder per system; the runs below distillation/ as always

    make demo
    python benchmarks/demo.py [--output demo]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, core_shares, duration, run_script  # first: loads .env

# isort: split
import argparse
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import datetime

TROUBLE = "distillation/knowledge_distillation7b_double_trouble"
EVALUATE = "evaluation/onevisionv3/sunrgbd/evaluate_onevision.py"
SYSTEMS = {  # name in the tables -> results folder, and whose checkpoint
    "RGB teacher": ("rgb_teacher", ("--kd_model_type", "baseline_rgb7b")),
    "RGB student": ("rgb_student", ("--kd_model_type", "baseline_rgb05b")),
    "depth student, distilled": ("distilled", ("--kd_model_type", "double_trouble", "--phase_no", "3")),
    "depth student, labels only": ("depth_student", ("--kd_model_type", "baseline_depth")),
}
CONTROL = "depth student, labels only"


@dataclass(frozen=True)
class Step:
    """One command of the demo."""

    name: str
    script: str  # from the repository root
    flags: tuple[str, ...] = ()


@dataclass
class Runner:
    """Runs commands; what they print carries their name. When one fails, the others are stopped."""

    processes: list[subprocess.Popen] = field(default_factory=list)
    stopped: bool = False
    screen: threading.Lock = field(default_factory=threading.Lock)

    def say(self, text: str) -> None:
        """One line that no other line runs into."""
        with self.screen:
            print(text, flush=True)

    def run(self, steps: Sequence[Step], cores: Sequence[int]) -> None:
        """One step after the other, on these cores.

        Raises:
            UserError: a command failed.
        """
        os.sched_setaffinity(0, cores)  # of this thread; its processes inherit it
        for step in steps:
            if self.stopped:
                return
            command = ["python", step.script, *step.flags]
            self.say(f"[{step.name}] {subprocess.list2cmdline(command)}")
            started = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, *command[1:]], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            self.processes.append(process)
            for line in process.stdout:
                self.say(f"[{step.name}] {line.rstrip()}")
            if process.wait():
                raise UserError(f"the demo stopped: {step.name} failed with exit code {process.returncode}")
            self.say(f"[{step.name}] took {duration(time.monotonic() - started)}")

    def side_by_side(self, chains: Sequence[Sequence[Step]]) -> None:
        """Chains of steps at the same time, each on its share of the cores."""
        with ThreadPoolExecutor(len(chains)) as pool:
            jobs = [pool.submit(self.run, *chain) for chain in zip(chains, core_shares(len(chains)), strict=True)]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException:  # Ctrl-C too
                self.stop()
                raise

    def stop(self) -> None:
        """Stop what still runs; nothing new starts."""
        self.stopped = True
        for process in self.processes:
            if process.poll() is None:
                process.terminate()


def evaluation(name: str, run: str, output: Path) -> Step:
    """Score a system's run on the test split."""
    folder, whose = SYSTEMS[name]
    flags = ("--miniature", *whose, "--ckpt_path", f"miniature_{run}", "--name", name, "--output", str(output / folder))
    return Step(f"score the {name}", EVALUATE, flags)


def chains(run: str, output: Path) -> tuple[list[Step], list[Step], list[Step]]:
    """What comes first; then the baselines and the phases, which do not need each other."""
    miniature = ("--miniature", "--run_name", run)
    taught = (*miniature, "--max_epochs", "1", "--teacher_checkpoint", f"miniature_{run}")
    further = (*taught, "--teacher_questions", "8", "--load_checkpoint", f"miniature_{run}")
    first = [
        Step("world", "dataset/miniature/world.py"),
        Step("RGB teacher", "distillation/baseline_rgb7b/train2.py", miniature),
    ]
    baselines = [
        Step("labels only", "distillation/baseline_depth/train.py", (*miniature, "--max_epochs", "3")),
        Step(
            "RGB student",
            "distillation/baseline_rgb05b/train.py",
            (*miniature, "--max_epochs", "1", "--subset_percentage", "0.5"),
        ),
        *(evaluation(name, run, output) for name in (CONTROL, "RGB student", "RGB teacher")),
    ]
    phases = [
        Step("phase 1", f"{TROUBLE}/phase1/train_online_kd.py", taught),
        Step("phase 2", f"{TROUBLE}/phase2/train_online_kd.py", further),
        Step("phase 3", f"{TROUBLE}/phase3/train_online_kd.py", further),
        evaluation("depth student, distilled", run, output),
    ]
    return first, baselines, phases


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "demo", help="tables and pictures (demo)")
    args = parser.parse_args(argv)
    args.output = args.output.resolve()
    return args


def main(args: argparse.Namespace) -> None:
    """Everything, in order."""
    started, runner = time.monotonic(), Runner()
    first, baselines, phases = chains(f"demo_{datetime.now():%Y-%m-%d_%H-%M-%S}", args.output)
    everything = sorted(os.sched_getaffinity(0))
    runner.run(first, everything)
    runner.side_by_side([baselines, phases])
    folders = [str(args.output / folder) for folder, _ in SYSTEMS.values()]
    compared = Step(
        "comparison",
        "evaluation/compare.py",
        (*folders, "--baseline", CONTROL, "--miniature", "--output", str(args.output)),
    )
    runner.run([compared], everything)
    print(f"the demo took {duration(time.monotonic() - started)}")


if __name__ == "__main__":
    run_script(main, parse_args)
