"""Furnished rooms, ray cast with numpy: what an RGB-D camera sees, with exact depth, object masks and 3D boxes.

A room is a box with a few pieces of furniture of eight classes that differ in shape only. Colors are drawn from a
random stream of their own after the geometry, so the depth image does not depend on them. Each class has a favorite
color, and this prior is all that a depth-only model can know about color.

Coordinate frames as in `dataset.sunrgbd.frames`: camera x right, y down, z forward; the gravity frame has the same
origin and no pitch. Rays have z = 1 in the camera frame, so that the ray parameter at a hit is the z-depth.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.ndimage import binary_erosion

from dataset.sunrgbd.annotations import Instance

NOUNS = ("bed", "sofa", "chair", "table", "cabinet", "lamp", "bin", "ball")
COLORS = {
    "red": (205, 40, 38),
    "green": (45, 150, 60),
    "blue": (45, 85, 205),
    "yellow": (238, 208, 45),
    "white": (240, 240, 240),
    "brown": (128, 76, 34),
}

# Both at 128 x 128 pixels; scaled for other sizes.
MIN_VISIBLE_PX = 170  # of an object: 1 % of the image, so that questions can be asked about it
MIN_SAME_CLASS_PX = 18  # between the centres of two objects of a class; closer ones merge for a small vision tower
MIN_VISIBLE_SHARE = 0.5  # of the pixels that the object would have alone in the room
MIN_INSIDE_SHARE = 0.7  # of the object's bounding rectangle that lies inside the image
MAX_REPEATS = 4  # objects of one class in a room
GAP_M = 0.04  # smallest distance between two objects, and between a wall and a piece with its back to it
_PARALLEL = 1e-6  # smallest ray component; 0, for a ray parallel to a face, would be a division by zero

_AGAINST_WALL = {"bed": 0.6, "sofa": 0.6, "cabinet": 0.8}  # share of candidates with the back to a wall
_ALIGNED = ("bed", "sofa", "cabinet", "table")  # parallel to the walls
_BACK_AWAY = ("bed", "sofa")  # never seen from behind, where a sofa is only a box
_ON_FURNITURE = ("lamp", "ball")  # may stand on a piece of `_SUPPORTS` that is lower than `_SUPPORT_TOP_M`
_SUPPORTS = ("table", "cabinet")
_SUPPORT_TOP_M = 1.25
_REPEATED = ("chair", "ball", "lamp", "bin", "table", "cabinet")  # may occur twice; a second bed or sofa rarely fits
_PLACING_ORDER = ("bed", "sofa", "cabinet", "table", "chair", "bin", "lamp", "ball")


@dataclass(frozen=True, kw_only=True)
class RoomStyle:
    """Distribution of rooms. Ranges are uniform; weights need not add up to 1."""

    stream: int  # gives two styles different random numbers for equal seeds
    object_counts: dict[int, float]  # number of objects -> weight
    scenes: dict[str, dict[str, float]]  # scene label -> class weights; the first class is always present
    repeats: dict[int, float]  # how often one class is repeated on purpose -> weight; others may repeat by chance
    topped_share: float  # rooms with an additional lamp or ball to stand on furniture, so that things are above others
    stacked_share: float  # lamps and balls that stand on furniture, if there is some
    favorite_colors: dict[str, str]
    favorite_share: float  # P(favorite color); the rest is uniform over the other colors
    wall_colors: tuple[tuple[int, int, int], ...]
    floor_colors: tuple[tuple[int, int, int], ...]
    ambient: tuple[float, float]  # share of the light that reaches every surface
    front_wall_m: tuple[float, float]  # distance from the camera, along the room's axis
    side_wall_m: tuple[float, float]
    back_wall_m: tuple[float, float]
    ceiling_m: tuple[float, float]
    yaw_deg: tuple[float, float]  # of the room about the camera
    camera_height_m: tuple[float, float]
    pitch_deg: tuple[float, float]  # downwards
    fov_deg: tuple[float, float]
    size_scale: tuple[float, float]  # on the furniture's dimensions


WORLD_STYLE = RoomStyle(
    stream=1,
    object_counts={3: 1, 4: 2, 5: 3, 6: 4},
    scenes={
        "bedroom": {"bed": 1, "cabinet": 2, "lamp": 2, "chair": 2, "bin": 1, "ball": 1, "table": 1},
        "living_room": {"sofa": 1, "table": 2, "lamp": 2, "ball": 1.5, "chair": 1.5, "cabinet": 1, "bin": 0.5},
        "office": {"table": 2, "chair": 3, "bin": 2, "cabinet": 1.5, "lamp": 1.5, "ball": 0.5},
        "dining_room": {"table": 1, "chair": 4, "lamp": 1, "cabinet": 1, "ball": 1, "sofa": 0.5},
        "playroom": {"ball": 3, "chair": 1.5, "table": 1, "bin": 1.5, "sofa": 1, "bed": 0.7, "cabinet": 1, "lamp": 0.5},
        "storage_room": {"cabinet": 3, "bin": 2.5, "table": 1, "lamp": 1.5, "ball": 1.5, "chair": 1, "bed": 0.5},
    },
    repeats={1: 2, 2: 1, 3: 2, 4: 5},
    topped_share=0.4,
    stacked_share=0.7,
    favorite_colors={
        "bed": "white", "sofa": "red", "chair": "brown", "table": "brown",
        "cabinet": "white", "lamp": "yellow", "bin": "green", "ball": "blue",
    },
    favorite_share=0.4,
    wall_colors=((206, 200, 186), (190, 190, 188), (214, 206, 192), (176, 178, 182), (200, 194, 176)),
    floor_colors=((150, 142, 132), (128, 126, 124), (164, 152, 136), (140, 140, 144)),
    ambient=(0.62, 0.72),
    front_wall_m=(3.8, 5.6),
    side_wall_m=(1.5, 3.2),
    back_wall_m=(0.3, 1.0),
    ceiling_m=(2.4, 2.9),
    yaw_deg=(-30.0, 30.0),
    camera_height_m=(1.35, 1.9),
    pitch_deg=(13.0, 24.0),
    fov_deg=(58.0, 68.0),
    size_scale=(0.95, 1.15),
)  # fmt: skip

PRETRAIN_STYLE = RoomStyle(
    stream=2,
    object_counts={2: 1, 3: 2, 4: 3, 5: 3, 6: 2, 7: 1},
    scenes={
        "idk": dict.fromkeys(("chair", "bed", "sofa", "table", "cabinet", "lamp", "bin", "ball"), 1.0),
        "furniture_store": {
            "table": 1, "sofa": 1, "chair": 1.5, "bed": 1, "cabinet": 1, "lamp": 1, "bin": 1, "ball": 1,
        },
        "lobby": {
            "sofa": 1.5, "table": 1.5, "lamp": 1.5, "bin": 1.5, "chair": 1.5, "ball": 1, "cabinet": 1, "bed": 0.5,
        },
        "study_space": {"cabinet": 2, "bed": 1, "chair": 2, "lamp": 2, "ball": 1, "bin": 1, "table": 2},
        "recreation_room": {
            "ball": 2, "bin": 1.5, "lamp": 1.5, "bed": 1, "sofa": 1, "cabinet": 1, "chair": 1, "table": 1,
        },
    },
    repeats={1: 2, 2: 1, 3: 2, 4: 5},
    topped_share=0.4,
    stacked_share=0.6,
    favorite_colors={
        "bed": "blue", "sofa": "brown", "chair": "red", "table": "white",
        "cabinet": "green", "lamp": "white", "bin": "yellow", "ball": "red",
    },
    favorite_share=0.25,
    wall_colors=((196, 198, 202), (212, 204, 188), (184, 178, 170), (220, 216, 206), (168, 172, 174), (202, 192, 182)),
    floor_colors=((122, 116, 110), (152, 150, 148), (136, 126, 114), (170, 164, 156), (112, 114, 118)),
    ambient=(0.6, 0.76),
    front_wall_m=(3.4, 6.2),
    side_wall_m=(1.3, 3.8),
    back_wall_m=(0.2, 1.5),
    ceiling_m=(2.3, 3.2),
    yaw_deg=(-45.0, 45.0),
    camera_height_m=(1.3, 2.0),
    pitch_deg=(12.0, 26.0),
    fov_deg=(56.0, 70.0),
    size_scale=(0.9, 1.25),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class RoomObject:
    """A piece of furniture in the gravity frame (metres, camera at the origin, y down)."""

    noun: str
    color: str
    corners_xz: np.ndarray  # (4, 2) x and z of the upright box around it, in order around the footprint
    y_min: float  # top
    y_max: float  # bottom

    @property
    def center_m(self) -> np.ndarray:
        """(3,) centre of the box."""
        x, z = self.corners_xz.mean(axis=0)
        return np.array([x, (self.y_min + self.y_max) / 2, z])

    @property
    def size_m(self) -> np.ndarray:
        """(3,) extents along the axes of the gravity frame."""
        x, z = np.ptp(self.corners_xz, axis=0)
        return np.array([x, self.y_max - self.y_min, z])


@dataclass(frozen=True, eq=False)
class View:
    """What the camera sees of one room."""

    rgb: np.ndarray  # (H, W, 3) uint8
    depth_m: np.ndarray  # (H, W) float32, exact z-depth
    object_ids: np.ndarray  # (H, W) int16, index into `objects`; -1 is the room itself
    objects: list[RoomObject]
    intrinsics: np.ndarray  # (3, 3) pixels; pixel centres are at whole numbers
    tilt: np.ndarray  # (3, 3) p_gravity = tilt @ p_camera
    scene: str

    def instances(self) -> list[Instance]:
        """The objects as instances, without the errors of annotations."""
        return [
            Instance(
                noun=thing.noun,
                mask=(mask := self.object_ids == index),
                depth_m=_median_depth(self.depth_m, mask),
                center_m=thing.center_m,
                size_m=thing.size_m,
            )
            for index, thing in enumerate(self.objects)
        ]


def _median_depth(depth_m: np.ndarray, mask: np.ndarray) -> float:
    eroded = binary_erosion(mask)
    return float(np.median(depth_m[eroded if eroded.any() else mask]))


def render_room(seed: int, *, style: RoomStyle = WORLD_STYLE, size: int = 128, color_seed: int | None = None) -> View:
    """Furnish and photograph room number `seed`.

    Args:
        seed: decides everything; equal arguments give equal bytes.
        style: the distribution to draw from.
        size: width and height in pixels.
        color_seed: draw light and colors with another seed; geometry and depth stay the same.
    """
    geometry = np.random.default_rng([style.stream, seed, 0])
    appearance = np.random.default_rng([style.stream, seed if color_seed is None else color_seed, 1])
    camera = _draw_camera(style, size, geometry)
    room = _draw_room(style, camera, geometry)
    light = _draw_light(style, appearance)
    while True:
        scene, nouns = _draw_nouns(style, geometry)
        canvas = _Canvas(camera, room, light)
        for noun in nouns:
            _place(noun, canvas, style, geometry)
        if len(canvas.placed) >= min(style.object_counts):
            break
    colors = [_draw_color(place.noun, style, appearance) for place in canvas.placed]
    objects = [
        RoomObject(place.noun, color, place.corners_xz, place.base - place.height, place.base)
        for place, color in zip(canvas.placed, colors, strict=True)
    ]
    return View(
        rgb=_paint(canvas, colors, style, appearance),
        depth_m=canvas.depth_m,
        object_ids=canvas.object_ids,
        objects=objects,
        intrinsics=camera.intrinsics,
        tilt=camera.tilt,
        scene=scene,
    )


class _Camera(NamedTuple):
    size: int
    height: float  # metres above the floor
    intrinsics: np.ndarray
    tilt: np.ndarray
    rays: np.ndarray  # (3, H, W) float32, gravity frame, z-depth 1

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gravity-frame points (..., 3) -> pixel u, pixel v, z-depth, each (...)."""
        in_camera = points @ self.tilt  # row vectors: p @ tilt is tilt.T @ p
        depth = in_camera[..., 2]
        scale = self.intrinsics[0, 0] / np.maximum(depth, 1e-3)
        centre = self.intrinsics[0, 2]
        return centre + scale * in_camera[..., 0], centre + scale * in_camera[..., 1], depth


class _Room(NamedTuple):
    """Distances from the camera to the walls in the room's own axes, which are turned by `yaw`."""

    left: float
    right: float
    back: float
    front: float
    ceiling: float  # above the camera
    yaw: float


class _Light(NamedTuple):
    direction: np.ndarray  # (3,) unit vector towards the light, gravity frame
    ambient: float


class _Box(NamedTuple):
    """Local frame of a piece: x right, z to its back, heights above its base."""

    x: float
    z: float
    half_x: float
    half_z: float
    bottom: float
    top: float
    tone: float = 1.0

    @property
    def bounds(self):
        """Middle, half sides, bottom and top of the upright box around it."""
        return self[:6]


class _Frustum(NamedTuple):
    """Upright and round about the piece's own axis; a `hollow` one is open at the top."""

    radius_bottom: float
    radius_top: float
    bottom: float
    top: float
    hollow: bool = False
    tone: float = 1.0

    @property
    def bounds(self):
        radius = max(self.radius_bottom, self.radius_top)
        return 0, 0, radius, radius, self.bottom, self.top


class _Sphere(NamedTuple):
    radius: float
    tone: float = 1.0

    @property
    def bounds(self):
        return 0, 0, self.radius, self.radius, 0, 2 * self.radius


class _Place(NamedTuple):
    """A piece of furniture with its place in the gravity frame."""

    noun: str
    parts: list
    x: float
    z: float
    base: float  # y of its underside
    yaw: float
    height: float
    corners_xz: np.ndarray  # (4, 2)


def _uniform(rng: np.random.Generator, limits: tuple[float, float]) -> float:
    return float(rng.uniform(*limits))


def _draw_camera(style: RoomStyle, size: int, rng: np.random.Generator) -> _Camera:
    focal = size / 2 / np.tan(np.radians(_uniform(rng, style.fov_deg)) / 2)
    pitch = np.radians(_uniform(rng, style.pitch_deg))
    cos, sin = np.cos(pitch), np.sin(pitch)
    tilt = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])
    centre = (size - 1) / 2
    axis = (np.arange(size) - centre) / focal
    rays = np.einsum("ij,jhw->ihw", tilt, [*np.meshgrid(axis, axis), np.ones((size, size))]).astype(np.float32)
    rays[np.abs(rays) < _PARALLEL] = _PARALLEL
    intrinsics = np.array([[focal, 0, centre], [0, focal, centre], [0, 0, 1]])
    return _Camera(size, _uniform(rng, style.camera_height_m), intrinsics, tilt, rays)


def _draw_room(style: RoomStyle, camera: _Camera, rng: np.random.Generator) -> _Room:
    return _Room(
        left=_uniform(rng, style.side_wall_m),
        right=_uniform(rng, style.side_wall_m),
        back=_uniform(rng, style.back_wall_m),
        front=_uniform(rng, style.front_wall_m),
        ceiling=_uniform(rng, style.ceiling_m) - camera.height,
        yaw=np.radians(_uniform(rng, style.yaw_deg)),
    )


def _draw_light(style: RoomStyle, rng: np.random.Generator) -> _Light:
    side = rng.choice([-1, 1]) * rng.uniform(0.25, 0.8)
    direction = np.array([side, -1.0, rng.uniform(-0.9, -0.4)])  # above and behind the camera
    return _Light(direction / np.linalg.norm(direction), _uniform(rng, style.ambient))


def _weighted(weights: dict, rng: np.random.Generator):
    shares = np.array(list(weights.values()), dtype=float)
    return list(weights)[rng.choice(len(shares), p=shares / shares.sum())]


def _draw_nouns(style: RoomStyle, rng: np.random.Generator) -> tuple[str, list[str]]:
    """A scene label and the classes to place, largest first, those that may stand on furniture last."""
    scene = list(style.scenes)[rng.integers(len(style.scenes))]
    weights = style.scenes[scene]
    count = _weighted(style.object_counts, rng)
    nouns = [next(iter(weights))]
    repeated = _weighted({noun: weight for noun, weight in weights.items() if noun in _REPEATED}, rng)
    nouns += [repeated] * (_weighted(style.repeats, rng) - (repeated == nouns[0]))
    while len(nouns) < count:
        noun = _weighted(weights, rng)
        if nouns.count(noun) < (MAX_REPEATS if noun in _REPEATED else 1):
            nouns.append(noun)
    if rng.random() < style.topped_share:
        pair = [str(rng.choice([noun for noun in _ON_FURNITURE if nouns.count(noun) < MAX_REPEATS]))]
        if not set(nouns[: count - 1]).intersection(_SUPPORTS):
            pair.append("table" if rng.random() < 0.7 else "cabinet")
        nouns[max(1, count - len(pair)) : count] = pair
    return scene, sorted(nouns[:count], key=_PLACING_ORDER.index)


def _draw_color(noun: str, style: RoomStyle, rng: np.random.Generator) -> str:
    favorite = style.favorite_colors[noun]
    if rng.random() < style.favorite_share:
        return favorite
    return str(rng.choice([color for color in COLORS if color != favorite]))


def _shape(noun: str, scale: float, rng: np.random.Generator, *, stacked: bool) -> tuple[list, float, float, float]:
    """Parts of one piece in its local frame, and its width, depth and height in metres."""
    return _SHAPES[noun](lambda low, high: scale * rng.uniform(low, high), stacked)


def _bed(draw, stacked):
    x, z, mattress, head = draw(0.6, 0.8), draw(0.95, 1.05), draw(0.42, 0.55), draw(0.9, 1.1)
    parts = [
        _Box(0, 0, x, z, 0.12, mattress),
        _Box(0, z - 0.05, x, 0.05, 0, head, 0.9),
        _Box(0, -z + 0.04, x, 0.04, 0, mattress + 0.12, 0.9),
        _Box(-x / 2, z - 0.35, x * 0.38, 0.2, mattress, mattress + 0.13, 1.08),
        _Box(x / 2, z - 0.35, x * 0.38, 0.2, mattress, mattress + 0.13, 1.08),
    ]
    return parts, 2 * x, 2 * z, head


def _sofa(draw, stacked):
    x, z, seat, back, arm = draw(0.75, 1.0), draw(0.4, 0.48), draw(0.38, 0.44), draw(0.78, 0.92), draw(0.58, 0.66)
    parts = [
        _Box(0, 0, x, z, 0.06, seat),
        _Box(0, z - 0.1, x, 0.1, 0.06, back, 0.94),
        _Box(-x + 0.09, 0, 0.09, z, 0.06, arm, 0.97),
        _Box(x - 0.09, 0, 0.09, z, 0.06, arm, 0.97),
    ]
    return parts, 2 * x, 2 * z, back


def _legs(x, z, half, top):
    return [_Box(i * (x - half), j * (z - half), half, half, 0, top, 0.85) for i in (-1, 1) for j in (-1, 1)]


def _chair(draw, stacked):
    x, z, seat, back = draw(0.22, 0.27), draw(0.22, 0.27), draw(0.42, 0.48), draw(0.88, 1.02)
    parts = [_Box(0, 0, x, z, seat - 0.07, seat), _Box(0, z - 0.03, x, 0.03, seat, back, 0.94)]
    return parts + _legs(x, z, 0.032, seat - 0.07), 2 * x, 2 * z, back


def _table(draw, stacked):
    x, z, top = draw(0.5, 0.75), draw(0.35, 0.45), draw(0.66, 0.76)
    return [_Box(0, 0, x, z, top - 0.07, top), *_legs(x, z, 0.04, top - 0.07)], 2 * x, 2 * z, top


def _cabinet(draw, stacked):
    x, z, top = draw(0.35, 0.55), draw(0.2, 0.27), draw(0.8, 1.7)
    door = (x - 0.06) / 2
    # Two doors stand out from the front, so that depth alone tells a cabinet from a plain block.
    parts = [
        _Box(0, 0.025, x, z - 0.025, 0, top),
        _Box(-x / 2, -z + 0.025, door, 0.025, 0.08, top - 0.06, 0.93),
        _Box(x / 2, -z + 0.025, door, 0.025, 0.08, top - 0.06, 0.93),
    ]
    return parts, 2 * x, 2 * z, top


def _lamp(draw, stacked):
    top, shade = (draw(0.58, 0.72), draw(0.2, 0.25)) if stacked else (draw(1.25, 1.55), draw(0.23, 0.3))
    low = top - (0.29 if stacked else 0.34)
    parts = [
        _Frustum(0.6 * shade, 0.6 * shade, 0, 0.04, tone=0.85),
        _Frustum(0.03, 0.03, 0.04, low, tone=0.85),
        _Frustum(shade, 0.55 * shade, low, top),
    ]
    return parts, 2 * shade, 2 * shade, top


def _bin(draw, stacked):
    radius, top = draw(0.19, 0.24), draw(0.45, 0.6)
    return [_Frustum(0.7 * radius, radius, 0, top, hollow=True)], 2 * radius, 2 * radius, top


def _ball(draw, stacked):
    radius = draw(0.17, 0.22) if stacked else draw(0.19, 0.27)
    return [_Sphere(radius)], 2 * radius, 2 * radius, 2 * radius


_SHAPES = {
    "bed": _bed, "sofa": _sofa, "chair": _chair, "table": _table,
    "cabinet": _cabinet, "lamp": _lamp, "bin": _bin, "ball": _ball,
}  # fmt: skip


class _Canvas:
    """The picture of a room while it is furnished: nearest surfaces so far, and the visible pixels of each piece."""

    def __init__(self, camera: _Camera, room: _Room, light: _Light):
        self.camera, self.room, self.light = camera, room, light
        self.depth_m, self.face, self.shade, self.floor_xz = _cast_room(camera, room, light)
        self.object_ids = np.full(self.depth_m.shape, -1, np.int16)
        self.placed: list[_Place] = []
        self.alone_px: list[int] = []
        self.visible_px: list[int] = []
        self.min_px = MIN_VISIBLE_PX * (camera.size / 128) ** 2

    def add(self, place: _Place) -> bool:
        """Draw the piece unless too much of it or of an earlier piece would be hidden. Returns whether it was drawn."""
        window, depth_m, shade = _cast_place(place, self.camera, self.light)
        alone = int(np.count_nonzero(np.isfinite(depth_m)))
        nearer = depth_m < self.depth_m[window]
        hidden = np.bincount(self.object_ids[window][nearer] + 1, minlength=len(self.placed) + 1)[1:]
        visible = [*(self.visible_px - hidden), np.count_nonzero(nearer)]
        pairs = zip(visible, [*self.alone_px, alone], strict=True)
        if any(seen < max(self.min_px, MIN_VISIBLE_SHARE * all_px) for seen, all_px in pairs):
            return False
        self.depth_m[window][nearer] = depth_m[nearer]
        self.shade[window][nearer] = shade[nearer]
        self.object_ids[window][nearer] = len(self.placed)
        self.visible_px = visible
        self.alone_px.append(alone)
        self.placed.append(place)
        return True


def _place(noun: str, canvas: _Canvas, style: RoomStyle, rng: np.random.Generator, *, count: int = 64) -> None:
    """Try to put one piece into the room.

    Of `count` random places those that fit are kept; the piece is drawn at the first of four where nothing is too
    hidden.
    """
    supports = [place for place in canvas.placed if place.noun in _SUPPORTS and place.height < _SUPPORT_TOP_M]
    stacked = bool(noun in _ON_FURNITURE and supports and rng.random() < style.stacked_share)
    parts, width, depth, height = _shape(noun, _uniform(rng, style.size_scale), rng, stacked=stacked)
    if stacked:
        support = supports[rng.integers(len(supports))]
        x, z, yaw = _places_on(support, width, count, rng)
        base = support.base - support.height
    else:
        x, z, yaw = _places_in_room(noun, depth, canvas, count, rng)
        base = canvas.camera.height
    corners = _corners(x, z, yaw, width, depth)  # (count, 4, 2)
    good = _inside_room(corners, canvas.room) & _well_framed(corners, base, height, canvas.camera, canvas.min_px)
    if noun in _BACK_AWAY:
        good &= np.cos(yaw) > -0.3
    for other in canvas.placed:
        if base - height < other.base - 0.01 and other.base - other.height < base - 0.01:
            good &= ~_overlap(corners, other.corners_xz)
        if other.noun == noun:
            good &= _apart(x, z, base - height / 2, other, canvas.camera)
    for index in np.flatnonzero(good)[:4]:
        place = _Place(noun, parts, float(x[index]), float(z[index]), base, float(yaw[index]), height, corners[index])
        if canvas.add(place):
            return


def _places_on(support: _Place, width: float, count: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    # On a support that is narrower than the piece, it stands in the middle.
    a, b = support.corners_xz[1] - support.corners_xz[0], support.corners_xz[3] - support.corners_xz[0]
    room_a, room_b = (max(0.0, 1 - width / np.linalg.norm(side)) / 2 for side in (a, b))
    steps = rng.uniform(-1, 1, (2, count))
    x, z = support.corners_xz.mean(axis=0)[:, None] + a[:, None] * room_a * steps[0] + b[:, None] * room_b * steps[1]
    return x, z, np.full(count, support.yaw)


def _places_in_room(noun: str, depth: float, canvas: _Canvas, count: int, rng: np.random.Generator):
    room, camera = canvas.room, canvas.camera
    z = rng.uniform(1.5, 5.0, count)
    x = z * rng.uniform(-0.9, 0.9, count) * camera.size / 2 / camera.intrinsics[0, 0]
    if noun not in _ALIGNED:
        return x, z, rng.uniform(-np.pi, np.pi, count)
    cos, sin = np.cos(room.yaw), np.sin(room.yaw)
    room_x, room_z = cos * x - sin * z, sin * x + cos * z
    quarter = rng.integers(0, 4, count)
    distances = np.stack([room.front - room_z, room.right - room_x, np.full(count, np.inf), room.left + room_x])
    against = rng.random(count) < _AGAINST_WALL.get(noun, 0.0)
    quarter = np.where(against, distances.argmin(axis=0), quarter)  # 0 back to the front wall, 1 right, 3 left
    near = depth / 2 + GAP_M
    room_z = np.where(against & (quarter == 0), room.front - near, room_z)
    room_x = np.where(against & (quarter == 1), room.right - near, room_x)
    room_x = np.where(against & (quarter == 3), near - room.left, room_x)
    return cos * room_x + sin * room_z, cos * room_z - sin * room_x, room.yaw + quarter * np.pi / 2


def _corners(x: np.ndarray, z: np.ndarray, yaw: np.ndarray, width: float, depth: float) -> np.ndarray:
    """Footprints (n, 4, 2) of n places of one piece."""
    local = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (width / 2, depth / 2)
    cos, sin = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    return np.stack(
        [x[:, None] + cos * local[:, 0] + sin * local[:, 1], z[:, None] - sin * local[:, 0] + cos * local[:, 1]],
        axis=-1,
    )


def _inside_room(corners: np.ndarray, room: _Room) -> np.ndarray:
    x, z = corners[..., 0], corners[..., 1]
    cos, sin = np.cos(room.yaw), np.sin(room.yaw)
    room_x, room_z = cos * x - sin * z, sin * x + cos * z
    inside = (-room.left < room_x) & (room_x < room.right) & (-room.back < room_z) & (room_z < room.front)
    return inside.all(axis=1)


def _well_framed(corners: np.ndarray, base: float, height: float, camera: _Camera, min_px: float) -> np.ndarray:
    """Most of the box's bounding rectangle is in the image, and it is large enough to be worth drawing. (n,) bool."""
    u, v, depth = camera.project(_box_points(corners, base, height))
    limit = camera.size - 1
    low_u, high_u, low_v, high_v = u.min(axis=1), u.max(axis=1), v.min(axis=1), v.max(axis=1)
    width = np.clip(high_u, 0, limit) - np.clip(low_u, 0, limit)
    tall = np.clip(high_v, 0, limit) - np.clip(low_v, 0, limit)
    area = width * tall
    return (depth.min(axis=1) > 0.4) & (area > MIN_INSIDE_SHARE * (high_u - low_u) * (high_v - low_v)) & (area > min_px)


def _box_points(corners: np.ndarray, base: float | np.ndarray, height: float | np.ndarray) -> np.ndarray:
    """The 8 corners of upright boxes, from footprints (..., 4, 2): (..., 8, 3)."""
    points = np.empty((*corners.shape[:-2], 8, 3))
    points[..., :4, 0] = points[..., 4:, 0] = corners[..., 0]
    points[..., :4, 1], points[..., 4:, 1] = base, base - height
    points[..., :4, 2] = points[..., 4:, 2] = corners[..., 1]
    return points


def _overlap(corners: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Which of the footprints (n, 4, 2) touch footprint (4, 2): separating axis test. (n,) bool."""
    axes = np.concatenate(
        [np.diff(corners[:, :3], axis=1), np.broadcast_to(np.diff(other[:3], axis=0), (len(corners), 2, 2))], 1
    )
    axes = axes / np.linalg.norm(axes, axis=-1, keepdims=True)  # (n, 4, 2)
    ours = np.einsum("nax,ncx->nac", axes, corners)
    theirs = np.einsum("nax,cx->nac", axes, other)
    gap = np.maximum(ours.min(axis=2) - theirs.max(axis=2), theirs.min(axis=2) - ours.max(axis=2))
    return (gap < GAP_M).all(axis=1)


def _apart(x: np.ndarray, z: np.ndarray, y: float, other: _Place, camera: _Camera) -> np.ndarray:
    """Places whose centre is far enough from the other's in the image. (n,) bool."""
    u, v, _ = camera.project(np.stack([x, np.full_like(x, y), z], axis=-1))
    other_u, other_v, _ = camera.project(np.array([other.x, other.base - other.height / 2, other.z]))
    return np.hypot(u - other_u, v - other_v) >= MIN_SAME_CLASS_PX * camera.size / 128


def _cast_room(camera: _Camera, room: _Room, light: _Light):
    """Depth, face (0 side wall, 1 floor or ceiling, 2 front or back wall), shade and (x, z) in the room's axes."""
    rays, towards = _turned_rays(camera.rays, room.yaw), _turned(light.direction, room.yaw)
    high = np.array([room.right, camera.height, room.front], np.float32)[:, None, None]
    low = np.array([-room.left, -room.ceiling, -room.back], np.float32)[:, None, None]
    exits = np.where(rays > 0, high, low) / rays
    face = exits.argmin(axis=0)
    depth_m = exits.min(axis=0)
    facing = -np.take_along_axis(np.sign(rays), face[None], axis=0)[0] * towards.astype(np.float32)[face]
    points = rays * depth_m
    return depth_m, face, _lambert(facing, light.ambient), points[[0, 2]]


def _turned(vectors: np.ndarray, yaw: float) -> np.ndarray:
    """Gravity frame -> frame turned by `yaw`. (3, ...) float32."""
    cos, sin = np.float32(np.cos(yaw)), np.float32(np.sin(yaw))
    turned = np.empty(vectors.shape, np.float32)
    turned[0] = cos * vectors[0] - sin * vectors[2]
    turned[1] = vectors[1]
    turned[2] = sin * vectors[0] + cos * vectors[2]
    return turned


def _turned_rays(rays: np.ndarray, yaw: float) -> np.ndarray:
    rays = _turned(rays, yaw)
    rays[np.abs(rays) < _PARALLEL] = _PARALLEL
    return rays


def _lambert(facing: np.ndarray, ambient: float) -> np.ndarray:
    return (np.float32(ambient) + np.float32(1 - ambient) * np.maximum(facing, 0)).astype(np.float32, copy=False)


def _cast_place(place: _Place, camera: _Camera, light: _Light):
    """Rays into one piece: its window of the image, and z-depth (inf = miss) and shade inside that window."""
    windows = _part_windows(place, camera)
    (top, left), (bottom, right) = windows[:, :2].min(axis=0), windows[:, 2:].max(axis=0)
    depth_m = np.full((bottom - top, right - left), np.inf, np.float32)
    shade = np.zeros_like(depth_m)
    for part, (y0, x0, y1, x1) in zip(place.parts, windows.tolist(), strict=True):
        rays = camera.rays[:, y0:y1, x0:x1]
        if not rays.size:
            continue
        part_depth, part_shade = _CASTS[type(part)](part, place, rays, light)
        inner = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
        nearer = part_depth < depth_m[inner]
        np.copyto(depth_m[inner], part_depth, where=nearer)
        np.copyto(shade[inner], part_shade * np.float32(part.tone), where=nearer)
    return np.s_[top:bottom, left:right], depth_m, shade


def _part_windows(place: _Place, camera: _Camera) -> np.ndarray:
    """Rows and columns of the image that each part can cover. (parts, 4) int: top, left, bottom, right."""
    x, z, half_x, half_z, bottom, top = np.array([part.bounds for part in place.parts]).T[..., None]
    local_x, local_z = x + half_x * [-1, 1, 1, -1], z + half_z * [-1, -1, 1, 1]  # (parts, 4)
    cos, sin = np.cos(place.yaw), np.sin(place.yaw)
    corners = np.stack([place.x + cos * local_x + sin * local_z, place.z - sin * local_x + cos * local_z], axis=-1)
    u, v, _ = camera.project(_box_points(corners, place.base - bottom, top - bottom))
    limits = np.stack([v.min(axis=1), u.min(axis=1), v.max(axis=1) + 2, u.max(axis=1) + 2], axis=1)
    return np.clip(limits, 0, camera.size).astype(int)


def _cast_box(part: _Box, place: _Place, rays: np.ndarray, light: _Light) -> tuple[np.ndarray, np.ndarray]:
    """Slab test in the piece's own axes."""
    local = _turned_rays(rays, place.yaw)
    x, _, z = _turned(np.array([place.x, 0, place.z]), place.yaw)
    centre = np.array([x + part.x, place.base - (part.bottom + part.top) / 2, z + part.z], np.float32)
    half = np.array([part.half_x, (part.top - part.bottom) / 2, part.half_z], np.float32)
    inverse = 1 / local
    middle, reach = centre[:, None, None] * inverse, half[:, None, None] * np.abs(inverse)
    entries = middle - reach
    entry = entries.max(axis=0)
    hit = entry < (middle + reach).min(axis=0)
    facing = -np.sign(centre) * _turned(light.direction, place.yaw)  # the camera sees the face on its own side
    return np.where(hit, entry, np.float32(np.inf)), _lambert(facing, light.ambient)[entries.argmax(axis=0)]


def _cast_frustum(part: _Frustum, place: _Place, rays: np.ndarray, light: _Light) -> tuple[np.ndarray, np.ndarray]:
    """Quadratic for the side, |xz - axis| = offset + slope * y, then the discs at its ends."""
    dx, dy, dz = rays
    low, high = np.float32(place.base - part.bottom), np.float32(place.base - part.top)  # y is down: high < low
    slope = np.float32((part.radius_bottom - part.radius_top) / (part.top - part.bottom))
    offset = np.float32(part.radius_top) - slope * high
    x, z = np.float32(place.x), np.float32(place.z)
    a = dx * dx + dz * dz - (slope * dy) ** 2
    b = x * dx + z * dz + slope * offset * dy
    root = np.sqrt(np.maximum(b * b - a * (x * x + z * z - offset * offset), 0))
    meets = root > 0
    miss = np.float32(np.inf)

    def side(depth):
        y = depth * dy
        return np.where(meets & (y >= high) & (y <= low), depth, miss)

    def disc(y, radius):
        depth = y / dy
        inside = (depth * dx - x) ** 2 + (depth * dz - z) ** 2 <= np.float32(radius) ** 2
        return np.where(inside & (depth > 0), depth, miss)

    outer = side((b - root) / a)
    # A hollow piece shows the far wall from inside instead of a lid; from below it is closed.
    cap = side((b + root) / a) if part.hollow else disc(high, part.radius_top)
    under = disc(low, part.radius_bottom)
    depth = np.minimum(np.minimum(outer, cap), under)
    finite = np.where(np.isfinite(depth), depth, 0)
    nx, nz = finite * dx - x, finite * dz - z
    ny = -slope * (offset + slope * finite * dy)
    to_x, to_y, to_z = light.direction.astype(np.float32)
    facing = (nx * to_x + ny * to_y + nz * to_z) / np.maximum(np.sqrt(nx * nx + ny * ny + nz * nz), 1e-6)
    if part.hollow:
        facing = np.where(outer <= depth, facing, -facing - 0.4)  # inside, and less light gets there
        lid = under
    else:
        lid = np.minimum(cap, under)
    facing = np.where(lid <= depth, np.where(dy > 0, -to_y, to_y), facing)
    return depth, _lambert(facing, light.ambient)


def _cast_sphere(part: _Sphere, place: _Place, rays: np.ndarray, light: _Light) -> tuple[np.ndarray, np.ndarray]:
    centre = np.array([place.x, place.base - part.radius, place.z], np.float32)[:, None, None]
    a = (rays * rays).sum(axis=0)
    b = (rays * centre).sum(axis=0)
    inside = b * b - a * np.float32((centre * centre).sum() - part.radius**2)
    depth = np.where(inside > 0, (b - np.sqrt(np.maximum(inside, 0))) / a, np.float32(np.inf))
    normal = (rays * np.where(inside > 0, depth, 0) - centre) / np.float32(part.radius)
    return depth, _lambert(np.einsum("i,ihw->hw", light.direction.astype(np.float32), normal), light.ambient)


_CASTS = {_Box: _cast_box, _Frustum: _cast_frustum, _Sphere: _cast_sphere}


def _paint(canvas: _Canvas, colors: list[str], style: RoomStyle, rng: np.random.Generator) -> np.ndarray:
    """Base colors times shade, floor boards, weak sensor noise. (H, W, 3) uint8."""
    wall = np.array(style.wall_colors[rng.integers(len(style.wall_colors))], np.float32)
    floor = np.array(style.floor_colors[rng.integers(len(style.floor_colors))], np.float32)
    below = (canvas.face == 1) & (canvas.camera.rays[1] > 0)
    boards = 1 + np.float32(0.03) * np.sign(np.sin(canvas.floor_xz[rng.integers(2)] * (np.pi / rng.uniform(0.15, 0.4))))
    base = np.where(below[..., None], floor * boards[..., None], wall)
    palette = (np.array([COLORS[color] for color in colors]) * rng.uniform(0.92, 1.04, (len(colors), 1))).astype(
        np.float32
    )
    seen = canvas.object_ids >= 0
    base[seen] = palette[canvas.object_ids[seen]]
    exposure = rng.uniform(0.94, 1.08) * rng.uniform(0.98, 1.02, 3)
    noise = 3 * rng.standard_normal((*seen.shape, 3), dtype=np.float32)
    return np.clip(base * canvas.shade[..., None] * exposure.astype(np.float32) + noise, 0, 255).astype(np.uint8)
