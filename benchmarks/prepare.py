"""How long `dataset/prepare_sunrgbd.py` takes, and how much memory, on a data set of the size of SUN RGB-D.

The data set is generated in a temporary folder: frames with the names of the official split (so no toolbox is needed),
small pictures, and as many outlines and 3D boxes as the real one has on average. Measured are the whole command, from
its start to its end, and the largest sum of the memory of its process and its workers, shared pages counted once; where
there is no /proc (macOS), the memory of the largest of these processes.

    python benchmarks/prepare.py [--frames 10335] [--size 64 48] [--cores 2]
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
    progress,
    run_script,
    use_cores,
)

# isort: split
import argparse
import json
import os
import platform
import subprocess
import tempfile
import time

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.processes import check_cores
from dataset.sunrgbd.depth import encode_sunrgbd
from dataset.sunrgbd.frames import read_official_list
from dataset.sunrgbd.nouns import asked_nouns, nouns

LIMIT_S, LIMIT_BYTES = 600, 2**30
# 146,617 outlines and 58,657 3D boxes on 10,335 frames: Song et al., CVPR 2015, abstract.
OUTLINES, BOX_SHARE = 14.2, 0.4
PROC = Path("/proc")  # of Linux
UNKNOWN_SHARE = 0.2  # share of the names that are not in the noun table
POINTS = 24  # corners of an outline
FAR_M = 7.0  # distance of the wall behind everything
EVERY_S = 0.2  # seconds between two measurements of the memory


def write_tree(root: Path, n_frames: int, size: tuple[int, int]) -> None:
    """Write `root/SUNRGBD` with frames of (width, height) pixels; the seed is fixed."""
    names = sorted(read_official_list())
    chosen = np.random.default_rng(0).permutation(len(names))[:n_frames]
    for number in progress(chosen, total=n_frames, label="generated frames"):
        _write_frame(root / "SUNRGBD" / names[number], np.random.default_rng(number), size)


def _write_frame(folder: Path, rng: np.random.Generator, size: tuple[int, int]) -> None:
    """A room of ellipses at random places: every object has an outline, its depth, its color, and some have a box."""
    width, height = size
    focal = 0.9 * width
    rgb = Image.new("RGB", size, tuple(rng.integers(60, 255, 3).tolist()))
    depth_m = Image.new("F", size, FAR_M)
    polygons, rectangles, names, boxes = [], [], [], []
    distances_m = np.sort(rng.uniform(1.0, FAR_M - 0.5, 1 + rng.poisson(OUTLINES - 1)))
    distances_m = distances_m[::-1]  # near ones are drawn last, over far ones
    for index, z in enumerate(distances_m):
        center_m = np.array([rng.uniform(-0.5, 0.5) * z, rng.uniform(-0.4, 0.4) * z, z])
        radii_m = rng.uniform(0.1, 0.7, 2)
        turn = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
        x = (width / 2 + focal * (center_m[0] + radii_m[0] * np.cos(turn)) / z).round().astype(int).tolist()
        y = (height / 2 + focal * (center_m[1] + radii_m[1] * np.sin(turn)) / z).round().astype(int).tolist()
        outline = list(zip(x, y, strict=True))
        ImageDraw.Draw(rgb).polygon(outline, fill=tuple(rng.integers(0, 255, 3).tolist()))
        ImageDraw.Draw(depth_m).polygon(outline, fill=float(z))
        names.append({"name": _name(rng)})
        polygons.append({"x": x, "y": y, "XYZ": np.tile(center_m, (POINTS, 1)).tolist(), "object": index})
        if rng.random() < BOX_SHARE:
            left, right, top, bottom = min(x), max(x), min(y), max(y)
            corners = {"x": [left, left, right, right], "y": [top, bottom, bottom, top]}
            rectangles.append({**corners, "object": len(boxes), "rect": 1})
            boxes.append(names[-1] | {"polygon": [_box(center_m, radii_m)]})
    stem = folder.name
    for part in ("image", "depth", "extrinsics", "annotation2Dfinal", "annotation2D3D"):
        (folder / part).mkdir(parents=True)
    rgb.save(folder / "image" / f"{stem}.jpg")
    Image.fromarray(encode_sunrgbd(np.asarray(depth_m))).save(folder / "depth" / f"{stem}.png")
    (folder / "intrinsics.txt").write_text(f"{focal} 0 {width / 2}\n0 {focal} {height / 2}\n0 0 1\n")
    (folder / "extrinsics" / "20150101000000.txt").write_text("1 0 0 0\n0 1 0 0\n0 0 1 0\n")
    (folder / "scene.txt").write_text("office")
    layers = {"annotation2Dfinal": (polygons, names), "annotation2D3D": (rectangles, boxes)}
    for layer, (drawn, objects) in layers.items():
        annotation = {"frames": [{"polygon": drawn}], "objects": objects}
        (folder / layer / "index.json").write_text(json.dumps(annotation))


def _name(rng: np.random.Generator) -> str:
    """A noun of the table, common ones more often, or one of its aliases; sometimes a name that is not in the table."""
    if rng.random() < UNKNOWN_SHARE:
        return f"thing{rng.integers(5000)}"
    asked = asked_nouns()
    noun = asked[min(int(rng.exponential(len(asked) / 4)), len(asked) - 1)]
    return str(rng.choice([noun, *nouns()[noun]["aliases"]]))


def _box(center_m: np.ndarray, radii_m: np.ndarray) -> dict:
    x, y, z = center_m.tolist()
    rx, ry = radii_m.tolist()
    return {
        "Ymin": y - ry, "Ymax": y + ry, "X": [x - rx, x + rx, x + rx, x - rx], "Z": [z - rx, z - rx, z + rx, z + rx],
    }  # fmt: skip


def measure(root: Path, workers: int) -> tuple[float, int]:
    """Seconds that the command takes on `root`, and the largest sum of its processes' memory in bytes.

    Without /proc it is the memory of the largest of its processes.
    """
    command = [sys.executable, ROOT / "dataset" / "prepare_sunrgbd.py", "--root", root, "--workers", str(workers)]
    start, peak = time.monotonic(), 0
    with subprocess.Popen(command) as process:
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            peak = max(peak, tree_memory(process.pid))
            time.sleep(EVERY_S)
        process.returncode = os.waitstatus_to_exitcode(ended[1])
    if process.returncode:
        raise UserError(f"the command failed with exit code {process.returncode}; its message stands above")
    return time.monotonic() - start, peak if PROC.is_dir() else peak_memory(ended[2])


def tree_memory(pid: int) -> int:
    """Bytes in memory of a process and all below it; a page that several share counts once (proportional set size)."""
    process = PROC / str(pid)
    try:
        rollup = (process / "smaps_rollup").read_text()
        children = " ".join(path.read_text() for path in process.glob("task/*/children")).split()
    except OSError:
        return 0  # it has just ended
    kilobytes = next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return 1024 * kilobytes + sum(map(tree_memory, map(int, children)))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    n_all = len(read_official_list())
    add = parser.add_argument
    add(
        "--frames",
        type=at_least(1),
        nargs="+",
        default=[n_all],
        help="number of frames; with several numbers one run each (default: %(default)s)",
    )
    add("--size", type=at_least(16), nargs=2, default=(64, 48), help="width and height of the pictures in pixels")
    add("--cores", type=at_least(1), default=2, help="number of cores and of worker processes (default: %(default)s)")
    args = parser.parse_args(argv)
    if max(args.frames) > n_all:
        parser.error(f"--frames {max(args.frames)}: the official split names {n_all}")
    check_cores(parser, args.cores)
    return args


def main(args: argparse.Namespace) -> None:
    """Generate, measure and print; an error when a run exceeds the limits."""
    use_cores(available_cores()[: args.cores])  # the measured processes inherit it
    print(f"commit {git_commit()}, Python {platform.python_version()}, {args.cores} cores of {platform.machine()}")
    for n_frames in args.frames:
        with tempfile.TemporaryDirectory() as folder:
            write_tree(Path(folder), n_frames, tuple(args.size))
            seconds, peak = measure(Path(folder), args.cores)
        size = "x".join(map(str, args.size))
        print(
            f"{n_frames} frames of {size} pixels: {duration(seconds)} minutes, {peak / 2**20:.0f} MiB at most"
            f"{'' if PROC.is_dir() else ' in its largest process'}",
            flush=True,
        )
        if seconds > LIMIT_S or peak > LIMIT_BYTES:
            raise UserError(f"over the limit of {duration(LIMIT_S)} minutes and {LIMIT_BYTES / 2**20:.0f} MiB")


if __name__ == "__main__":
    run_script(main, parse_args)
