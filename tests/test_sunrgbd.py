"""Frame index: layout variants, the official split, unusable frames with their reasons."""

import shutil

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from dataset.sunrgbd import find_frames, frame_group, official_split, read_frame
from utils import UserError

SPLIT = "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat"


@pytest.fixture
def own_world(world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    return tmp_path / "world"


def test_all_sensors_and_deeper_folders_are_found(world):
    frames, unusable = find_frames(world)
    assert len(frames) == 40 and not unusable
    assert {frame.sensor for frame in frames} == {"kv1", "kv2", "realsense", "xtion"}
    assert {frame.path.count("/") for frame in frames} == {3, 5}  # sun3ddata is two levels deeper
    stems = [
        (f.image_path.rsplit("/", 1)[1].split(".")[0], f.depth_path.rsplit("/", 1)[1].split(".")[0]) for f in frames
    ]
    assert any(rgb != depth for rgb, depth in stems)
    for frame in frames:
        np.testing.assert_allclose(frame.tilt @ frame.tilt.T, np.eye(3), atol=1e-5)


def test_split_is_the_toolbox_file_whatever_stands_in_front(own_world):
    frames, _ = find_frames(own_world)
    split = official_split(own_world, frames)
    assert sorted(split.values()).count("train") == 24 and len(split) == 40
    mat = loadmat(own_world / SPLIT, squeeze_me=True)
    moved = [
        str(p).replace("/data1/SUNRGBD/", "//n/fs/sun3d/data/").replace("/kv1/", "/kv1//") + "/"
        for p in mat["alltrain"]
    ]
    savemat(own_world / SPLIT, {"alltrain": np.array(moved, object), "alltest": mat["alltest"]})
    again = official_split(own_world, frames)
    assert {p for p, s in again.items() if s != "test"} == {p for p, s in split.items() if s != "test"}
    # without trainvalsplit the cut is by group: no room on both sides
    groups = {s: {frame_group(p) for p, v in again.items() if v == s} for s in ("train", "val")}
    assert not groups["train"] & groups["val"]


def test_missing_split_says_what_to_do(own_world):
    (own_world / SPLIT).unlink()
    with pytest.raises(UserError, match="allsplit.mat.*SUNRGBDtoolbox.zip"):
        official_split(own_world, find_frames(own_world)[0])


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda f: next((f / "depth").iterdir()).unlink(), "depth: expected one"),
        (lambda f: (f / "image" / "second.jpg").write_bytes(b""), "image: expected one"),
        (lambda f: (f / "intrinsics.txt").write_text("1 2 3"), "intrinsics.txt: expected 3x3"),
        (lambda f: (f / "intrinsics.txt").unlink(), "intrinsics.txt"),
        (lambda f: next((f / "extrinsics").iterdir()).write_text("a b"), "expected 3x4"),
    ],
)
def test_unusable_frames_are_listed_with_their_reason(own_world, damage, complaint):
    frames, _ = find_frames(own_world)
    damage(own_world / frames[3].path)
    usable, unusable = find_frames(own_world)
    assert len(usable) == 39
    ((path, reason),) = unusable
    assert path == frames[3].path and complaint in reason


def test_optional_files(own_world):
    frames, _ = find_frames(own_world)
    folder = own_world / frames[0].path
    shutil.rmtree(folder / "extrinsics")
    (folder / "scene.txt").write_text("office  \n")
    shutil.rmtree(folder / "depth_bfx")
    frame = read_frame(own_world, frames[0].path)
    assert frame.scene == "office" and frame.depth_bfx_path is None and (frame.tilt == np.eye(3)).all()


def test_empty_tree(tmp_path):
    with pytest.raises(UserError, match="no SUN RGB-D frame"):
        find_frames(tmp_path)


def test_real_frames(samples):
    frames, unusable = find_frames(samples)
    assert [f.path for f in frames] == [
        "SUNRGBD/kv1/b3dodata/img_0063",
        "SUNRGBD/kv2/align_kv2/2014-12-18_11-31-54_260595134347",
    ]
    assert not unusable and frames[0].scene == "office"
    assert list(official_split(samples, frames).values()) == ["train", "test"]
    assert frames[0].intrinsics[0, 2] == pytest.approx(277.9258)
    mat = loadmat(samples / SPLIT, squeeze_me=True)
    assert (len(mat["alltrain"]), len(mat["alltest"])) == (5285, 5050)
