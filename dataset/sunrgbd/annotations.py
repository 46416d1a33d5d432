"""SUN RGB-D annotations -> instances per frame, tolerant of damaged files.

A frame carries up to five annotation layers that were drawn by hand at different times. Two are used: the polygons
(`annotation2Dfinal`, else `annotation`) say which pixels belong to an object, and the boxes (`annotation2D3D`, else
`annotation3Dfinal`, `annotation3D`) say where it stands in the room. Layers do not share object numbers and the files
are full of mistakes, so a polygon and a box are joined when their nouns are equal and they overlap. Whatever cannot be
read is counted and left out.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import binary_erosion
from scipy.optimize import linear_sum_assignment

from dataset.sunrgbd.depth import read_depth
from dataset.sunrgbd.frames import Frame
from dataset.sunrgbd.nouns import ACCESSORIES, asked_nouns, canonical_noun, hinted_nouns, letters, names_group, nouns
from utils import UserError

POLYGON_LAYERS = ("annotation2Dfinal", "annotation")
BOX_LAYERS = ("annotation2D3D", "annotation3Dfinal", "annotation3D")
BOX_EXTENT_M = (0.05, 5.0)  # the longest extent of a credible box
MIN_BOX_IOU = 0.3  # between a mask's bounding box and the rectangle of the 3D box it is joined with
# A mask is contested when its bounding box overlaps the rectangle of a 3D box more than this, although that box has
# another noun: the two layers then disagree about what the object is. Boxes that were joined with a mask of their noun
# do not count.
CONTESTED_IOU = 0.5
SAME_RECTANGLE_SHARE = 0.7  # a polygon lies in a rectangle when this share of its pixels does
DUPLICATE_IOU = 0.7  # two polygons of one noun that overlap more outline the same object twice
DUPLICATE_BOX_IOU = 0.5  # two 3D boxes of one noun that overlap more are the same object twice
ERODE_PX_AT_560 = 3  # polygon borders mix fore- and background; scaled with the image width, at least 1
# A median depth needs valid pixels inside the eroded mask: this share of the image (200 pixels of 561x427) ...
MIN_DEPTH_SHARE = 0.0008
MIN_DEPTH_VALID = 0.3  # ... and this share of the eroded mask
MAX_CUTS = 16  # characters that may be cut out of a broken JSON file to make it readable


@dataclass(frozen=True, eq=False)
class Instance:
    """One object that is visible in a frame.

    Positions are in the gravity frame of `dataset.sunrgbd.frames`: metres from the camera, x right, y down, z forward.
    """

    noun: str  # canonical, singular, lower case: "night stand"
    mask: np.ndarray  # (H, W) bool, visible pixels
    depth_m: float  # median z-depth inside the eroded mask; nan when too few pixels were measured
    center_m: np.ndarray  # (3,) centre of the 3D box, else of the unprojected mask; nan when unknown
    size_m: np.ndarray | None  # (3,) extents of the 3D box along x, y, z of the gravity frame; None without a box
    contested: bool = False  # the 3D layer has another noun at this place, so this noun must not be an answer


@dataclass
class Coverage:
    """How many of the outlined objects have a name that the noun table knows.

    The keys are "known", "unknown" and "structure": walls, floors, ceilings and their borders. Groups count as known
    although they are no instances; an object without a name is unknown.
    """

    outlines: Counter = field(default_factory=Counter)  # number of outlines
    area: Counter = field(default_factory=Counter)  # their area; a whole picture has 1
    unknown_names: Counter = field(default_factory=Counter)  # letters of an unknown name -> number of outlines

    def add(self, name: str, area: float, *, times: int = 1) -> None:
        """Count one outline of this `area`, or several (`times`) without one; an outline without a name has ""."""
        noun = canonical_noun(name)
        kind = "unknown" if noun is None else "known" if noun in asked_nouns() else "structure"
        self.outlines[kind] += times
        self.area[kind] += area
        if noun is None:
            self.unknown_names[letters(name)] += times

    def __add__(self, other: "Coverage") -> "Coverage":
        return Coverage(
            self.outlines + other.outlines, self.area + other.area, self.unknown_names + other.unknown_names
        )


class _Box(NamedTuple):
    noun: str
    rectangle: np.ndarray  # (4,) x0, y0, x1, y1 in pixels, clipped to the image
    center_m: np.ndarray  # (3,)
    size_m: np.ndarray  # (3,)


class _Outline(NamedTuple):
    entry: int  # index into the layer's `objects`
    noun: str
    mask: np.ndarray  # (H, W) bool


def read_annotation(path: Path, drops: Counter | None = None) -> dict:
    """Read one index.json and repair the damage that some files have: stray backslashes and characters, line breaks.

    Args:
        path: the file.
        drops: a file that had to be repaired is counted here, since part of it may be lost.

    Raises:
        UserError: the file is missing or beyond repair.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: annotation cannot be read ({error})") from error
    plain = re.sub(r"[\\\x00-\x1f]", "", text)
    for version, cuts in ((text, 0), (plain, MAX_CUTS)):
        value, reason = _parse_json(version, cuts)
        if isinstance(value, dict) and value:
            if version is not text and drops is not None:
                drops["file with damaged JSON"] += 1
            return value
    raise UserError(f"{path}: annotation is beyond repair ({reason or 'not a JSON object'})")


def _parse_json(text: str, cuts: int) -> tuple[Any, str]:
    """(value, "") or (None, the error), after cutting out up to `cuts` characters where parsing stopped."""
    reason = ""
    for _ in range(cuts + 1):
        try:
            return json.loads(text), ""
        except json.JSONDecodeError as error:
            reason = str(error)
            text = text[: error.pos] + text[error.pos + 1 :]
        except (ValueError, RecursionError) as error:
            return None, str(error)
    return None, reason


def frame_instances(frame: Frame, drops: Counter | None = None) -> list[Instance]:
    """The annotated objects of a frame that the noun table knows, of any size; see `frame_objects`."""
    return frame_objects(frame, drops)[0]


def frame_objects(
    frame: Frame, drops: Counter | None = None, coverage: Coverage | None = None
) -> tuple[list[Instance], frozenset[str]]:
    """The instances of a frame, and the nouns of which there may be more than the instances show.

    Each polygon is an instance. Polygons of one `objects` entry are usually several objects ('books' on two shelves).
    They are one object, divided by something in front of it, only when they lie in the rectangle of one 3D box. A noun
    is unsure when an outline is a group ('chairs'), is missing or cannot be drawn, when an unknown name hints at it
    ('chairback'), or when a 3D box has no outline of that noun.

    Args:
        frame: its depth file is read, the hole-filled one only where the raw one has too few valid pixels.
        drops: counts what was left out, by reason. Every polygon of the layer is either part of an instance or counted
            here.
        coverage: counts the outlines whose name the noun table knows.

    Returns:
        The instances in the order of the polygons, and the unsure nouns.

    Raises:
        UserError: the depth image cannot be used, or no polygon layer can be read though there is one.
    """
    drops = Counter() if drops is None else drops
    depth_m = read_depth(frame.root / frame.depth_path)
    outlines, unsure = _outlines(frame, depth_m.shape, drops, Coverage() if coverage is None else coverage)
    boxes = _boxes(frame, depth_m.shape, drops)
    outlines = _without_duplicates(_merge_split_objects(outlines, boxes, drops), drops)
    partners = _match(outlines, boxes)
    depths = _Depths(frame, depth_m)
    instances = [_instance(frame, outline, partners.get(i), depths) for i, outline in enumerate(outlines)]
    matched = {id(box) for box in partners.values()}
    single = [box for box in boxes if id(box) not in matched]
    for box in single:
        drops["3D box without an outline"] += 1
        unsure.add(box.noun)
    for i, outline in enumerate(outlines):
        if i not in partners and _is_called_otherwise(outline, single):
            drops["object with another noun in 3D"] += 1
            unsure.add(outline.noun)
            instances[i] = replace(instances[i], contested=True)
    return instances, frozenset(unsure)


def _is_called_otherwise(outline: _Outline, boxes: list[_Box]) -> bool:
    bounds = np.array(mask_box(outline.mask), dtype=np.float64)
    return any(box.noun != outline.noun and _iou(bounds, box.rectangle) > CONTESTED_IOU for box in boxes)


def frame_nouns(frame: Frame) -> set[str]:
    """The nouns that a frame's polygon layer names; empty without a readable layer. Fast: no picture is opened."""
    try:
        layer = _first_layer(frame, POLYGON_LAYERS, Counter())
    except UserError:
        return set()
    return _named(_names(layer[1]).values()) if layer else set()


def _first_layer(frame: Frame, layers: tuple[str, ...], drops: Counter) -> tuple[str, dict] | None:
    """The first usable layer as (layer, annotation); None without one.

    A usable layer names at least one object, and a layer of polygons has at least one polygon.

    Raises:
        UserError: no layer is usable, and one of them cannot be read.
    """
    failure = None
    for layer in layers:
        path = frame.root / frame.path / layer / "index.json"
        if not path.is_file():
            continue
        try:
            annotation = read_annotation(path, drops)
        except UserError as error:
            drops[f"unreadable {layer}"] += 1
            failure = error
            continue
        if _names(annotation) and (layer in BOX_LAYERS or any(_polygons(annotation))):
            return layer, annotation
        drops[f"empty {layer}"] += 1
    if failure:
        raise failure
    return None


def _polygons(annotation: dict) -> Iterator[tuple[int, dict]]:
    """(index into `objects`, polygon) of the annotation's only frame.

    An item that is no polygon comes as an empty one; a polygon without an index comes with -1.
    """
    first = _items(annotation.get("frames")).get(0)
    polygons = first.get("polygon") if isinstance(first, dict) else None
    for item in _items(polygons).values():
        polygon = item if isinstance(item, dict) else {}
        index = polygon.get("object")
        yield index if type(index) is int else -1, polygon


def _items(value: Any) -> dict[int, Any]:
    """Elements of a JSON array by index.

    Some files have an object with numbered keys in place of the array, or its only element without the array.
    """
    if isinstance(value, dict):
        numbered = all(re.fullmatch("0|[1-9][0-9]{0,8}", key) for key in value)
        return {int(key): item for key, item in value.items()} if numbered else {0: value}
    return dict(enumerate(value)) if isinstance(value, list) else {}


def _names(annotation: dict) -> dict[int, str]:
    """Index -> name of the entries in `objects` that have one; nulls and other mistakes are skipped."""
    entries = _items(annotation.get("objects"))
    named = {index: entry["name"] for index, entry in entries.items() if isinstance(entry, dict) and "name" in entry}
    return {index: name for index, name in named.items() if isinstance(name, str)}


def _outlines(
    frame: Frame, shape: tuple[int, int], drops: Counter, coverage: Coverage
) -> tuple[list[_Outline], set[str]]:
    layer = _first_layer(frame, POLYGON_LAYERS, drops)
    if layer is None:
        drops["frame without polygons"] += 1
        return [], set()
    names = _names(layer[1])
    outlines, unsure = [], set()
    for index, polygon in _polygons(layer[1]):
        name = names.get(index, "")
        noun = canonical_noun(name)
        mask = _rasterise(polygon, shape)
        coverage.add(name, 0.0 if mask is None else float(mask.mean()))
        if index not in names:
            drops["polygon of no named object"] += 1
        elif noun is None:
            drops["name not in the noun table"] += 1
        elif noun not in asked_nouns():
            drops["wall, floor or ceiling"] += 1
        elif names_group(name):
            drops["group of objects"] += 1
            unsure.add(noun)
        elif mask is None:
            drops["outline without area in the image"] += 1
            unsure.add(noun)
        else:
            outlines.append(_Outline(index, noun, mask))
    outlined = {outline.noun for outline in outlines}
    return outlines, unsure | (_named(names.values()) - outlined) | _hinted(names.values(), outlined)


def _named(names: Iterable[str]) -> set[str]:
    return {noun for name in names if (noun := canonical_noun(name)) in asked_nouns()}


def _hinted(names: Iterable[str], outlined: set[str]) -> set[str]:
    """Nouns of which the frame may have more under another name: 'chairback', or a rug that was called a carpet.

    The name of an accessory ('doorhandle') hints only at one door, so it says nothing new where a door is outlined.
    """
    hinted: set[str] = set()
    for name in names:
        noun = canonical_noun(name)
        if noun is None:
            hinted |= hinted_nouns(name) - (outlined if letters(name).endswith(ACCESSORIES) else set())
        elif noun not in asked_nouns():
            hinted.update(nouns()[noun].get("similar", ()))
    return hinted


def _rasterise(polygon: dict, shape: tuple[int, int]) -> np.ndarray | None:
    """(H, W) bool of the polygon's part inside the image; None when there is none, or fewer than 3 points."""
    height, width = shape
    x, y = (_numbers(polygon.get(axis)) for axis in "xy")
    length = min(len(x), len(y))
    points = np.stack([x[:length], y[:length]], axis=1)
    # Outlines of objects at the border run outside the picture; points far outside are mistakes and would overflow the
    # rasteriser.
    points = points[np.isfinite(points).all(axis=1) & (np.abs(points) < 10 * max(shape)).all(axis=1)]
    if len(np.unique(points, axis=0)) < 3:
        return None
    canvas = Image.new("1", (width, height))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in points.tolist()], fill=1)
    mask = np.asarray(canvas, dtype=bool)
    return mask if mask.any() else None


def _numbers(value: Any) -> np.ndarray:
    """A JSON number or array of numbers as float64 (n,); what is not a number becomes nan."""
    items = value if isinstance(value, list) else [value]
    return np.array([v if isinstance(v, int | float) and abs(v) < 1e9 else np.nan for v in items], dtype=np.float64)


def _boxes(frame: Frame, shape: tuple[int, int], drops: Counter) -> list[_Box]:
    try:
        layer = _first_layer(frame, BOX_LAYERS, drops)
    except UserError:
        return []  # counted in `drops`; positions then come from the depth image
    if layer is None:
        return []
    name, annotation = layer
    linked = dict(_polygons(annotation)) if name == "annotation2D3D" else {}
    entries, names = _items(annotation["objects"]), _names(annotation)
    if len(names) < len(entries):
        drops["3D object without a name"] += len(entries) - len(names)
    boxes = []
    for index, entry_name in names.items():
        noun = canonical_noun(entry_name)
        if noun not in asked_nouns():
            drops["3D box of another noun"] += 1
            continue
        extent = _extent(_items(entries[index].get("polygon")).get(0))
        if extent is None:
            drops["3D box without credible size"] += 1
            continue
        center_m, size_m, corners_m = extent
        if index in linked:
            rectangle = _bounds(*(_numbers(linked[index].get(axis)) for axis in "xy"), shape)
        else:
            rectangle = _project(corners_m, frame, shape)
        if rectangle is None:
            drops["3D box outside the image"] += 1
        else:
            boxes.append(_Box(noun, rectangle, center_m, size_m))
    return _without_duplicate_boxes(boxes, drops)


def _without_duplicate_boxes(boxes: list[_Box], drops: Counter) -> list[_Box]:
    kept: list[_Box] = []
    for box in boxes:
        if any(other.noun == box.noun and _iou(_span(other), _span(box)) > DUPLICATE_BOX_IOU for other in kept):
            drops["3D box drawn twice"] += 1
        else:
            kept.append(box)
    return kept


def _span(box: _Box) -> np.ndarray:
    return np.concatenate([box.center_m - box.size_m / 2, box.center_m + box.size_m / 2])


def _extent(polygon: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Centre (3,), extents (3,) and corners (8, 3) of a 3D box in metres. The layers store it with y pointing down."""
    if not isinstance(polygon, dict):
        return None
    x, z, top, bottom = (_numbers(polygon.get(key)) for key in ("X", "Z", "Ymin", "Ymax"))
    if len(x) < 3 or len(x) != len(z) or len(top) != 1 or len(bottom) != 1:
        return None
    corners = np.array([(x_i, y, z_i) for x_i, z_i in zip(x, z, strict=True) for y in (top[0], bottom[0])])
    low, high = corners.min(axis=0), corners.max(axis=0)  # annotators also swapped Ymin and Ymax
    size = high - low
    if not (np.isfinite(size).all() and BOX_EXTENT_M[0] <= size.max() <= BOX_EXTENT_M[1]):
        return None
    return (low + high) / 2, size, corners


def _project(corners_m: np.ndarray, frame: Frame, shape: tuple[int, int]) -> np.ndarray | None:
    camera = corners_m @ frame.tilt  # rows of tilt.T @ p
    if (camera[:, 2] < 0.1).any():
        return None  # a box that reaches behind the camera has no meaningful rectangle
    u, v, _ = frame.intrinsics @ (camera / camera[:, 2:]).T
    return _bounds(u, v, shape)


def _bounds(x: np.ndarray, y: np.ndarray, shape: tuple[int, int]) -> np.ndarray | None:
    """(4,) x0, y0, x1, y1 of the points, clipped to the image; None when nothing is left."""
    height, width = shape
    if not (len(x) and len(y) and np.isfinite(x).all() and np.isfinite(y).all()):
        return None
    box = np.array([max(x.min(), 0), max(y.min(), 0), min(x.max(), width), min(y.max(), height)])
    return box if box[0] < box[2] and box[1] < box[3] else None


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Bounding box x0, y0, x1, y1 of a mask with at least one pixel; x1 and y1 are exclusive."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _merge_split_objects(outlines: list[_Outline], boxes: list[_Box], drops: Counter) -> list[_Outline]:
    """Join the polygons of one `objects` entry that lie in the rectangle of one 3D box of their noun.

    A rectangle that contains all polygons of the entry has precedence: a smaller rectangle around one piece may belong
    to another object of the same noun.
    """
    merged: dict[Any, _Outline] = {}
    for order, outline in enumerate(outlines):
        siblings = [other for other in outlines if other.entry == outline.entry]
        home = None
        if len(siblings) > 1:
            home = _home(siblings, boxes)
            home = _home([outline], boxes) if home is None else home
        key = (outline.entry, home) if home is not None else (outline.entry, "alone", order)
        before = merged.get(key)
        if before:
            drops["piece joined to its object"] += 1
        merged[key] = outline._replace(mask=before.mask | outline.mask) if before else outline
    return list(merged.values())


def _home(outlines: list[_Outline], boxes: list[_Box]) -> int | None:
    """Index of the box with the smallest rectangle that contains all outlines and has their noun; None without one."""
    inside = []
    for index, box in enumerate(boxes):
        x0, y0, x1, y1 = box.rectangle
        window = np.s_[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))]
        if box.noun == outlines[0].noun and all(
            outline.mask[window].sum() >= SAME_RECTANGLE_SHARE * outline.mask.sum() for outline in outlines
        ):
            inside.append(((x1 - x0) * (y1 - y0), index))
    return min(inside)[1] if inside else None


def _without_duplicates(outlines: list[_Outline], drops: Counter) -> list[_Outline]:
    kept: list[_Outline] = []
    for outline in outlines:
        rivals = [other.mask for other in kept if other.noun == outline.noun]
        if any((mask & outline.mask).sum() > DUPLICATE_IOU * (mask | outline.mask).sum() for mask in rivals):
            drops["object outlined twice"] += 1
        else:
            kept.append(outline)
    return kept


def _match(outlines: list[_Outline], boxes: list[_Box]) -> dict[int, _Box]:
    """Outline index -> its 3D box: the one-to-one assignment of equal nouns with the greatest total overlap."""
    overlap = np.zeros((len(outlines), len(boxes)))
    for i, outline in enumerate(outlines):
        bounds = np.array(mask_box(outline.mask), dtype=np.float64)
        for j, box in enumerate(boxes):
            if box.noun == outline.noun:
                overlap[i, j] = _iou(bounds, box.rectangle)
    pairs = zip(*linear_sum_assignment(overlap, maximize=True), strict=True)
    return {int(i): boxes[j] for i, j in pairs if overlap[i, j] > MIN_BOX_IOU}


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    """Of two boxes in any number of dimensions, each a low corner followed by a high one."""
    n = len(a) // 2
    shared = np.prod(np.maximum(np.minimum(a[n:], b[n:]) - np.maximum(a[:n], b[:n]), 0))
    union = np.prod(a[n:] - a[:n]) + np.prod(b[n:] - b[:n]) - shared
    return float(shared / union) if union > 0 else 0.0


class _Depths:
    """The raw depth of a frame and the hole-filled one, which is read only when it is needed."""

    def __init__(self, frame: Frame, measured_m: np.ndarray):
        self.frame = frame
        self.measured_m = measured_m

    def median(self, mask: np.ndarray) -> float:
        """Median depth in metres inside the eroded mask; nan when neither image has enough valid pixels there."""
        x0, y0, x1, y1 = mask_box(mask)
        window = np.s_[y0:y1, x0:x1]
        radius = max(1, round(ERODE_PX_AT_560 * mask.shape[1] / 560))
        core = binary_erosion(mask[window], iterations=radius)
        for depth_m in self._sources():
            values = depth_m[window][core]
            values = values[values > 0]
            if len(values) >= max(MIN_DEPTH_VALID * core.sum(), MIN_DEPTH_SHARE * mask.size):
                return float(np.median(values))
        return float("nan")

    def _sources(self) -> Iterator[np.ndarray]:
        yield self.measured_m
        if self.frame.depth_bfx_path:
            filled_m = read_depth(self.frame.root / self.frame.depth_bfx_path)
            if filled_m.shape == self.measured_m.shape:
                yield filled_m


def _instance(frame: Frame, outline: _Outline, box: _Box | None, depths: _Depths) -> Instance:
    depth_m = depths.median(outline.mask)
    if box:
        return Instance(outline.noun, outline.mask, depth_m, box.center_m, box.size_m)
    rows, columns = np.nonzero(outline.mask)
    ray = np.linalg.solve(frame.intrinsics, [np.median(columns), np.median(rows), 1.0])
    return Instance(outline.noun, outline.mask, depth_m, frame.tilt @ ray * depth_m, None)
