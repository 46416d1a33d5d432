"""The miniature world: rendered rooms, written as a SUN RGB-D tree that the rest of the code reads like the real one.

    python dataset/miniature/world.py [--root DIR] [--train N] [--val N] [--test N] [--seed N]

Folders, file formats, encodings and annotation layers follow the real data set. So do its irregularities, in
moderation: different stems for image and depth, collections two levels deeper, names with suffixes and synonyms, null
objects, objects that consist of several polygons. Each sensor has its own noise and holes. Every frame shows another
room; the one to three frames of a recording are in one split.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils import (  # first: loads .env
    UserError,
    at_least,
    data_root,
    disk_errors,
    locked,
    progress,
    run_script,
    source_digest,
    write_json,
)

# isort: split
import argparse
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timedelta
from functools import partial
from typing import NamedTuple

import numpy as np
from contourpy import contour_generator
from PIL import Image
from scipy import ndimage
from scipy.io import savemat

from dataset.miniature.renderer import RoomObject, View, render_room
from dataset.sunrgbd.depth import encode_sunrgbd, unproject
from dataset.sunrgbd.sensor_noise import hole_filled, sensor_noise

TRAIN, VAL, TEST = 5000, 400, 600
MARKER, UNFINISHED = "world.json", "unfinished.json"
# Digests of these folders of dataset/ are part of a world's settings, since other code makes other rooms or questions.
# After a change in QUESTION_CODE only the questions are made again; after one in ROOM_CODE the rooms are rendered
# again, too, which takes two minutes of processor time.
ROOM_CODE, QUESTION_CODE = ("miniature", "sunrgbd"), ("questions",)
# Shares as in the real data set, where every collection but realsense/lg and realsense/sa occurs in every split.
COLLECTIONS = {
    "kv1/NYUdata": 0.14,
    "kv1/b3dodata": 0.06,
    "kv2/kinect2data": 0.36,
    "realsense/lg": 0.06,
    "realsense/sa": 0.05,
    "xtion/sun3ddata": 0.33,
}
SYNONYMS = {
    "bed": ("Bed", "bed1"),
    "sofa": ("couch", "Sofa"),
    "chair": ("chair2", "Chair", "woodenchair"),
    "table": ("Table", "table1"),
    "cabinet": ("cupboard", "wardrobe", "cabinet_"),
    "lamp": ("lamp#2", "Lamp"),
    "bin": ("garbage_bin", "trashcan", "dustbin"),
    "ball": ("Ball", "ball2"),
}
SYNONYM_SHARE = 0.12
NULL_SHARE = 0.1  # of the frames, with a null among the 3D objects
MIN_POLYGON_PX = 12  # smaller parts of an object are left out, as annotators do
JPEG_QUALITY = 92
PNG_LEVEL = 1  # noise hardly compresses: the default level takes three times as long for 5 % less


class _Room(NamedTuple):
    path: str  # SUNRGBD/kv1/NYUdata/NYU0001
    split: str
    seed: int  # of the renderer
    number: int  # of the frame within its collection

    @property
    def sensor(self) -> str:
        return self.path.split("/")[1]


def ensure_world(
    root: Path, *, train: int = TRAIN, val: int = VAL, test: int = TEST, seed: int = 0, workers: int | None = None
) -> Path:
    """Build the world with its questions below `root` unless the same one is there already; returns `root`.

    An interrupted build is continued. A world of other sizes, another seed or older code is replaced. When only the
    code of the questions has changed, they are made again for the same rooms. Processes that call this at the same time
    wait for each other.

    Raises:
        UserError: `root` holds something that is not a miniature world, or a size is not positive.
    """
    from dataset.questions.csv_data import build_csv_data  # not at the top: rooms must not depend on QUESTION_CODE

    root = root.resolve()
    codes = {name: source_digest(ROOT / "dataset" / name) for name in (*ROOM_CODE, *QUESTION_CODE)}
    rooms = {"train": train, "val": val, "test": test, "seed": seed, "code": [codes[name] for name in ROOM_CODE]}
    settings = {"rooms": rooms, "questions": [codes[name] for name in QUESTION_CODE]}
    with locked(root.parent):
        found = _settings(root / MARKER)
        if found != settings and found.get("rooms") == rooms:
            build_csv_data(root, seed=seed, workers=workers)
            write_json(root / MARKER, settings)
        elif found != settings:
            if root.exists() and any(root.iterdir()) and not (root / MARKER).is_file():
                raise UserError(f"{root}: not empty and not a miniature world; choose another folder or remove it")
            part = _unfinished(root, settings)
            write_world(part, train=train, val=val, test=test, seed=seed, workers=workers)
            build_csv_data(part, seed=seed, workers=workers)
            (part / UNFINISHED).rename(part / MARKER)
            shutil.rmtree(root, ignore_errors=True)
            part.rename(root)
        else:
            shutil.rmtree(_part(root), ignore_errors=True)  # begun for other settings, and not wanted any more
    return root


def _part(root: Path) -> Path:
    return root.with_name(f"{root.name}.part")


def _unfinished(root: Path, settings: dict) -> Path:
    """The folder beside `root` in which the world is built; emptied unless it was begun with the same settings."""
    part = _part(root)
    if _settings(part / UNFINISHED) != settings:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        write_json(part / UNFINISHED, settings)
    return part


def write_world(root: Path, *, train: int, val: int, test: int, seed: int, workers: int | None = None) -> None:
    """Render and write the frames that are missing below `root`, and the official split file.

    The bytes depend on sizes and seed, not on the number of `workers` (processes; default: one per core). Room i of a
    split does not depend on the sizes.

    Raises:
        UserError: a size is not positive.
    """
    rooms = _plan({"train": train, "val": val, "test": test}, seed)
    written = _parallel(partial(_write_room, root), rooms, workers or os.cpu_count() or 1)
    for _ in progress(written, total=len(rooms), label="miniature world: rooms"):
        pass
    _write_split(root, rooms)


def _settings(path: Path) -> dict:
    """The settings that a world was built with; empty without a readable file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _parallel(function: Callable, items: list, workers: int) -> Iterable:
    if workers == 1:
        yield from map(function, items)
        return
    # Fork where it exists: a spawned worker would import the calling script, and with it torch, just to render rooms.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(method)) as pool:
        yield from pool.map(function, items, chunksize=8)


def _plan(sizes: dict[str, int], seed: int) -> list[_Room]:
    """Every frame's place in the tree and the seed of its room."""
    rooms, numbers, recordings = [], Counter(), Counter()
    for rank, (split, count) in enumerate(sizes.items()):
        if count < 1:
            raise UserError(f"a world with {count} rooms for {split}: every split needs at least one")
        in_split = Counter()
        for i in range(count):
            collection = _collection(i)
            # Recordings of one, two and three frames; the first frame of a split always starts a new one.
            recordings[collection] += in_split[collection] % 6 in (0, 1, 3)
            in_split[collection] += 1
            numbers[collection] += 1
            path = _frame_path(collection, numbers[collection], recordings[collection])
            rooms.append(_Room(path, split, (seed * 10 + rank) * 10_000_000 + i, numbers[collection]))
    return rooms


def _collection(i: int) -> str:
    """Spread the collections evenly over a split: golden-ratio steps through their cumulative shares."""
    edges = np.cumsum(list(COLLECTIONS.values()))
    return list(COLLECTIONS)[np.searchsorted(edges, (i + 1) * 0.6180339887 % 1 * edges[-1], side="right")]


def _frame_path(collection: str, number: int, recording: int) -> str:
    # Recordings of kv2 and realsense differ by the day in their names, in the real tree as here.
    taken = datetime(2014, 1, 1, 9) + timedelta(days=recording, seconds=37 * (number % 600))
    names = {
        "kv1/NYUdata": f"NYU{number:04d}",
        "kv1/b3dodata": f"img_{number:04d}",
        "kv2/kinect2data": f"{number:06d}_{taken:%Y-%m-%d_%H-%M-%S}_260595134347_rgbf{number % 200:06d}-resize",
        "realsense/lg": f"{taken:%Y_%m_%d-%H_%M_%S}-1311000073",
        "realsense/sa": f"{taken:%Y_%m_%d-%H_%M_%S}-1311000041",
        "xtion/sun3ddata": f"home_{recording // 4:03d}/scan{recording % 4 + 1}/{number:07d}-{33369 * number:012d}",
    }
    return f"SUNRGBD/{collection}/{names[collection]}"


def _stems(room: _Room) -> tuple[str, str]:
    """File names of image and depth without ending; they differ in the same two collections as in the real tree."""
    name = room.path.split("/")[-1]
    if "b3dodata" in room.path:
        return name, f"{name}_abs"
    if "sun3ddata" in room.path:
        return name, f"{room.number + 1:07d}-{33369 * room.number + 12938:012d}"
    return name, name


def _write_room(root: Path, room: _Room) -> None:
    """Write one frame folder, whole or not at all; a folder that is there already stays.

    Raises:
        UserError: the disk is full or not writable.
    """
    folder = root / room.path
    if folder.is_dir():
        return
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with disk_errors(folder):
        _write_frame(part, room)
        part.rename(folder)


def _write_frame(part: Path, room: _Room) -> None:
    view = render_room(room.seed)
    rng = np.random.default_rng([room.seed, 2])
    depth_m = sensor_noise(view.depth_m, room.sensor, rng)
    rgb_stem, depth_stem = _stems(room)
    _save(part / "image" / f"{rgb_stem}.jpg", view.rgb, quality=JPEG_QUALITY)
    _save(part / "depth" / f"{depth_stem}.png", encode_sunrgbd(depth_m), compress_level=PNG_LEVEL)
    _save(part / "depth_bfx" / f"{depth_stem}.png", encode_sunrgbd(hole_filled(depth_m)), compress_level=PNG_LEVEL)
    extrinsics = f"2014{room.number % 12 + 1:02d}15210114.txt"
    _write(part / "intrinsics.txt", _matrix(view.intrinsics))
    _write(part / "extrinsics" / extrinsics, _matrix(np.hstack([view.tilt, np.zeros((3, 1))])))
    _write(part / "scene.txt", view.scene)
    for layer, content in _annotations(view, rng).items():
        header = {"date": "Fri, 10 Jul 2015 13:01:37 GMT", "name": f"{room.path}/{layer}/index.json"}
        footer = {"extrinsics": extrinsics, "conflictList": [None], "fileList": [f"{rgb_stem}.jpg"]}
        _write(part / layer / "index.json", json.dumps(header | content | footer))


def _save(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _matrix(values: np.ndarray) -> str:
    return "".join(" ".join(f"{value:.6f}" for value in row) + "\n" for row in values)


def _annotations(view: View, rng: np.random.Generator) -> dict[str, dict]:
    """`frames` and `objects` of the three annotation layers."""
    masks = [view.object_ids == index for index in range(len(view.objects))]
    outlines = [_outlines(mask) for mask in masks]
    polygons = [{**points, "object": i} for i, parts in enumerate(outlines) for points in parts]
    names = [{"name": _name_2d(thing.noun, rng)} for thing in view.objects]
    for name, mask in _structure(view).items():
        polygons += [{**points, "object": len(names)} for points in _outlines(mask)[:1]]
        names.append({"name": name})
    boxes = [
        {"name": _name_3d(thing.noun, mask, len(parts)), "polygon": [_box(thing)]}
        for thing, mask, parts in zip(view.objects, masks, outlines, strict=True)
    ]
    rectangles = [{**_rectangle(mask), "object": i, "rect": 1} for i, mask in enumerate(masks)]
    with_null = list(boxes)
    if rng.random() < NULL_SHARE:
        with_null.insert(int(rng.integers(len(boxes) + 1)), None)
    return {
        "annotation2Dfinal": {"frames": [{"polygon": polygons}], "objects": names},
        "annotation2D3D": {"frames": [{"polygon": rectangles}], "objects": boxes},
        "annotation3Dfinal": {"frames": [{}], "objects": with_null},
    }


def _outlines(mask: np.ndarray) -> list[dict[str, list[int]]]:
    """Outlines of the connected parts, through their border pixels, largest first: [{"x": [...], "y": [...]}]."""
    labels, _ = ndimage.label(mask)
    parts = [(labels[window] == label, window) for label, window in enumerate(ndimage.find_objects(labels), 1)]
    parts.sort(key=lambda part: -np.count_nonzero(part[0]))
    outlines = []
    for part, (rows, columns) in parts:
        if outlines and np.count_nonzero(part) < MIN_POLYGON_PX:
            break
        lines = contour_generator(z=np.pad(part, 1).astype(float)).lines(0.75)
        outer = max(lines, key=lambda line: np.ptp(line, axis=0).sum())
        # Contours at a level above 0.5 round to pixels inside the part; the padding shifted them by one.
        x, y = (np.rint(outer[:-1]).astype(int) - 1 + [columns.start, rows.start]).T.tolist()
        outlines.append({"x": x, "y": y})
    return outlines


def _structure(view: View) -> dict[str, np.ndarray]:
    """Masks of floor and wall, which annotators outlined as well."""
    y_down = unproject(view.depth_m, view.intrinsics) @ view.tilt[1]
    room = view.object_ids < 0
    floor = room & (y_down > max(thing.y_max for thing in view.objects) - 0.02)
    found = {"floor": floor, "wall": room & ~floor}
    return {name: mask for name, mask in found.items() if mask.sum() >= MIN_POLYGON_PX}


def _name_2d(noun: str, rng: np.random.Generator) -> str:
    return str(rng.choice(SYNONYMS[noun])) if rng.random() < SYNONYM_SHARE else noun


def _name_3d(noun: str, mask: np.ndarray, parts: int) -> str:
    """The name in the 3D layers, where objects that are partly hidden have a suffix and a bin is a `garbage_bin`."""
    name = "garbage_bin" if noun == "bin" else noun
    if mask[[0, -1]].any() or mask[:, [0, -1]].any():
        return f"{name}:truncated"
    return f"{name}:occluded" if parts > 1 else name


def _rectangle(mask: np.ndarray) -> dict[str, list[int]]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, right, top, bottom = (int(v) for v in (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1))
    return {"x": [left, left, right, right], "y": [top, bottom, bottom, top]}


def _box(thing: RoomObject) -> dict:
    x, z = np.round(thing.corners_xz, 4).T.tolist()
    return {"Ymin": round(thing.y_min, 4), "Ymax": round(thing.y_max, 4), "rectangle": 1, "X": x, "Z": z}


def _write_split(root: Path, rooms: list[_Room]) -> None:
    """allsplit.mat: the cell arrays and the struct of the official toolbox, with its absolute paths."""

    def cells(*splits: str) -> np.ndarray:
        found = [f"/data1/{room.path}" for room in rooms if room.split in splits]
        return np.array(found, dtype=object)[None]

    path = root / "SUNRGBDtoolbox" / "traintestSUNRGBD" / "allsplit.mat"
    path.parent.mkdir(parents=True, exist_ok=True)
    trainval = {"train": cells("train"), "val": cells("val")}
    savemat(path, {"alltrain": cells("train", "val"), "alltest": cells("test"), "trainvalsplit": trainval})


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--root", type=Path, help="folder that will contain SUNRGBD/ (default: the one that --miniature uses)")
    add("--train", type=at_least(1), default=TRAIN, help="number of rooms to train on (default: %(default)s)")
    add("--val", type=at_least(1), default=VAL, help="number of rooms to validate on (default: %(default)s)")
    add("--test", type=at_least(1), default=TEST, help="number of rooms to test on (default: %(default)s)")
    add("--seed", type=at_least(0), default=0, help="random seed of all rooms (default: %(default)s)")
    add("--workers", type=at_least(1), help="number of processes that render rooms (default: one per core)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Build the world and say where it is."""
    root = args.root or data_root(miniature=True)
    root = ensure_world(root, train=args.train, val=args.val, test=args.test, seed=args.seed, workers=args.workers)
    print(f"miniature world: {root} (train {args.train}, val {args.val}, test {args.test}, seed {args.seed})")


if __name__ == "__main__":
    run_script(main, parse_args)
