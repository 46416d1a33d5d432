"""Hundreds of damaged annotation files, with fixed seeds: no crash, and whatever is left out is counted."""

import json
import random
import shutil
from collections import Counter

import numpy as np
import pytest

from dataset.questions.csv_data import read_frame_questions
from dataset.sunrgbd.annotations import frame_nouns, frame_objects, read_annotation
from dataset.sunrgbd.frames import Frame, read_frame
from tests.helpers.annotations import box3d, boxes, polygons, rectangle
from utils import UserError

JUNK = (
    None, True, False, [], {}, "", "chair", "wall", "chairs", "wal;l", "\ud800", 0, -1, 1, 2, 99, 10**12, 10**400,
    1e308, -1e308,
    float("nan"), float("inf"), -float("inf"), 0.5, [None], [[]], {"0": None}, {"00": 1, "0": 2}, {"9" * 5000: 1},
    {"name": "sofa"},
    ["a", 1, None], {"x": [1, 5, 5], "y": [1, 1, 5], "object": 0},
)  # fmt: skip
TOKENS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "9" * 5000,
    "\\",
    "\\u12",
    '"',
    "\n",
    "\x00",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "null",
)
# Every polygon of the layer that was read is an instance or counted; every 3D object has a partner or is counted.
POLYGON_REASONS = (
    "polygon of no named object", "name not in the noun table", "wall, floor or ceiling", "group of objects",
    "outline without area in the image", "piece joined to its object", "object outlined twice",
)  # fmt: skip
BOX_REASONS = (
    "3D object without a name", "3D box of another noun", "3D box without credible size", "3D box outside the image",
    "3D box drawn twice", "3D box without an outline",
)  # fmt: skip
OTHER_REASONS = {
    "frame without polygons", "file with damaged JSON", "object with another noun in 3D",
    "empty annotation", "unreadable annotation", "empty annotation2D3D", "unreadable annotation2D3D",
    "empty annotation3D", "unreadable annotation3D",
}  # fmt: skip


def damaged_text(text: str, rng: random.Random) -> str:
    """One slip of a disk, a network or an editor."""
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice((1, 2, 8, 50, 400)))
    kind = rng.randrange(6)
    if kind == 0:
        data[start] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[start:]
    elif kind == 2:
        del data[start:end]
    elif kind == 3:
        data[start:start] = data[start:end]
    elif kind == 4:
        data[start:end] = rng.choice(TOKENS).encode()
    else:
        data[start:start] = rng.choice((b"[", b'{"a":')) * rng.choice((3, 500, 20_000))
    return data.decode("utf-8", "surrogateescape") or " "


def places(value, found=()):
    """(container, key) of every value in parsed JSON."""
    found = list(found)
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found.append((value, key))
        found += places(value[key])
    return found


def damage_value(content, rng: random.Random) -> None:
    """One value is of another type or in another place."""
    found = places(content)
    if not found:
        return
    container, key = rng.choice(found)
    other, other_key = rng.choice(found)
    kind = rng.randrange(6)
    if kind <= 1:
        container[key] = json.loads(json.dumps(rng.choice(JUNK)))
    elif kind == 2:
        del container[key]
    elif kind == 3:
        container[key] = json.loads(json.dumps(other[other_key]))
    elif kind == 4 and isinstance(container, list):
        container.insert(rng.randrange(len(container)), json.loads(json.dumps(container[key])))
    elif isinstance(container[key], list):
        container[key] = dict(zip(map(str, range(10_000)), container[key], strict=False))
    else:
        for _ in range(rng.choice((1, 2, 300))):
            container[key] = [container[key]]


def damaged(text: str, rng: random.Random) -> str:
    if rng.random() < 0.5:
        for _ in range(rng.randint(1, 3)):
            text = damaged_text(text, rng)
        return text
    content = json.loads(text)
    for _ in range(rng.randint(1, 4)):
        damage_value(content, rng)
    return json.dumps(content)


def check_frame(frame: Frame, box_layer: str) -> str:
    """Read a frame as the indexer does; returns what became of it."""
    report = read_frame_questions(frame, seed=0, vocabulary=("bed", "chair"))
    assert frame_nouns(frame) is not None
    drops: Counter = Counter()
    try:
        instances, _ = frame_objects(frame, drops)
    except UserError as error:
        assert report.failure == str(error) and "index.json" in report.failure and not report.questions
        assert drops["unreadable annotation"] == 1
        return "unusable"
    assert not report.failure and report.drops == drops
    assert drops.keys() <= {*POLYGON_REASONS, *BOX_REASONS, *OTHER_REASONS}
    for thing in instances:
        assert thing.mask.any() and thing.center_m.shape == (3,)
        assert thing.size_m is None or np.isfinite(np.append(thing.center_m, thing.size_m)).all()
    if drops["frame without polygons"]:
        assert not instances and not report.questions and drops["empty annotation"]
        return "empty"
    folder = frame.root / frame.path
    n_polygons = len(numbered(numbered(read_annotation(folder / "annotation" / "index.json")["frames"])[0]["polygon"]))
    assert n_polygons == len(instances) + sum(drops[reason] for reason in POLYGON_REASONS)
    assert report.coverage.outlines.total() == n_polygons
    if not (drops[f"empty {box_layer}"] or drops[f"unreadable {box_layer}"]):
        n_boxes = len(numbered(read_annotation(folder / box_layer / "index.json")["objects"]))
        placed = sum(thing.size_m is not None for thing in instances)
        assert n_boxes == placed + sum(drops[reason] for reason in BOX_REASONS)
    return "read"


def numbered(value) -> list:
    """The elements of an array, also of one that was written as an object; a single one stands for itself."""
    if isinstance(value, dict):
        indices = {str(number) for number in range(10_000)}
        return list(value.values()) if value.keys() <= indices else [value]
    return value if isinstance(value, list) else []


def damage_and_check(frame: Frame, layers: dict[str, str], n_files: int, seed: int) -> Counter:
    outcomes: Counter = Counter()
    for number in range(n_files):
        rng = random.Random(1000 * seed + number)
        layer = rng.choice(sorted(layers))
        for name, text in layers.items():
            content = damaged(text, rng) if name == layer else text
            path = frame.root / frame.path / name / "index.json"
            path.write_text(content, encoding="utf-8", errors="surrogateescape")
        outcomes[check_frame(frame, next(name for name in layers if name != "annotation"))] += 1
    return outcomes


@pytest.mark.parametrize("box_layer", ["annotation2D3D", "annotation3D"])
def test_250_damaged_files_of_each_box_layer(make_frame, box_layer):  # noqa: F811
    names = ["chair", "table", "wall", "books", "gizmo", "couch", "", "lamp"]
    shapes = [rectangle(10, 30, 25, 80, 0), rectangle(35, 30, 50, 80, 0), rectangle(90, 30, 140, 90, 1)]
    shapes += [rectangle(0, 0, 160, 20, 2)] + [rectangle(20 * i, 90, 20 * i + 18, 115, i) for i in (3, 4, 5, 6)]
    entries = [
        box3d("chair", (-0.9, 0.5, 2.1), (0.5, 1.0, 0.4)),
        None,
        box3d("table", (0.5, 0.4, 2.2), (0.6, 0.6, 0.5)),
    ]
    entries += [box3d("table:occluded", (0.52, 0.4, 2.2), (0.6, 0.6, 0.5)), box3d("sofa", (0, 0.9, 3), (2, 1, 1)), {}]
    links = [rectangle(9, 29, 51, 81, 0), rectangle(88, 29, 141, 91, 2), rectangle(88, 29, 141, 91, 3)]
    layers = {
        "annotation": json.dumps(polygons(names, shapes)),
        box_layer: json.dumps(boxes(entries, links if box_layer == "annotation2D3D" else None)),
    }
    frame = make_frame(**layers)
    assert check_frame(frame, box_layer) == "read"
    outcomes = damage_and_check(frame, layers, 250, seed=len(box_layer))
    assert outcomes["read"] > 150 and outcomes["unusable"] > 10 and outcomes.total() == 250


def test_damaged_files_of_a_real_frame(samples, tmp_path):
    path = "SUNRGBD/kv1/b3dodata/img_0063"
    shutil.copytree(samples / path, tmp_path / path, copy_function=shutil.copyfile)
    for folder in (tmp_path / path).iterdir():
        folder.chmod(0o755)  # samples may be read-only
    frame = read_frame(tmp_path, path)
    layers = {
        name: (samples / path / name / "index.json").read_text(encoding="utf-8")
        for name in ("annotation", "annotation2D3D")
    }
    shutil.rmtree(tmp_path / path / "annotation3D")  # the layer to fall back to would hide what happens
    assert check_frame(frame, "annotation2D3D") == "read"
    outcomes = damage_and_check(frame, layers, 100, seed=7)
    assert outcomes["read"] > 50 and outcomes.total() == 100
