"""A small frame on disk, with annotation files as SUN RGB-D has them: outlines, 3D boxes, camera and tilt."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.sunrgbd.depth import encode_sunrgbd
from dataset.sunrgbd.frames import Frame, read_frame

WIDTH, HEIGHT = 160, 120
INTRINSICS = np.array([[150.0, 0, 80], [0, 150.0, 60], [0, 0, 1]])
PITCH = np.radians(12)
TILT = np.array([[1, 0, 0], [0, np.cos(PITCH), np.sin(PITCH)], [0, -np.sin(PITCH), np.cos(PITCH)]])


def rectangle(x0, y0, x1, y1, obj):
    return {"x": [x0, x1, x1, x0], "y": [y0, y0, y1, y1], "object": obj}


def box3d(name, center, size):
    x, y, z = center
    w, h, d = (s / 2 for s in size)
    polygon = {
        "Ymin": y - h,
        "Ymax": y + h,
        "rectangle": 1,
        "X": [x - w, x + w, x + w, x - w],
        "Z": [z - d, z - d, z + d, z + d],
    }
    return {"name": name, "polygon": [polygon]}


def polygons(names, shapes):
    return {"frames": [{"polygon": shapes}], "objects": [{"name": name} for name in names]}


def boxes(entries, shapes=None):
    return {"frames": [{} if shapes is None else {"polygon": shapes}], "objects": entries}


def write_frame(root: Path, depth_m=None, bfx_m=None, **layers) -> Frame:
    """A frame below `root`; depth is 2 m unless given, a layer is its file's text or what it says as JSON."""
    folder = root / "SUNRGBD" / "kv1" / "test" / "frame"
    depth_m = np.full((HEIGHT, WIDTH), 2.0) if depth_m is None else depth_m
    for name, picture in (("depth", depth_m), ("depth_bfx", bfx_m)):
        if picture is not None:
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(encode_sunrgbd(picture)).save(folder / name / "0.png")
    (folder / "image").mkdir(exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "image" / "0.jpg")
    np.savetxt(folder / "intrinsics.txt", INTRINSICS)
    (folder / "extrinsics").mkdir(exist_ok=True)
    np.savetxt(folder / "extrinsics" / "0.txt", np.c_[TILT, np.zeros(3)])
    for layer, content in layers.items():
        (folder / layer).mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / layer / "index.json").write_text(text)
    return read_frame(root, "SUNRGBD/kv1/test/frame")
