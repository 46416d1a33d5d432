"""Frame index: layout variants, the official split, unusable frames with their reasons."""

import random
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from dataset.sunrgbd.frames import (
    OFFICIAL_LIST,
    find_frames,
    frame_group,
    frame_rooms,
    listed_split,
    official_split,
    read_frame,
    read_official_list,
    validation_tenth,
    write_official_list,
)
from utils import UserError

SPLIT = "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat"


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
    """Frames of the miniature that happen to be called like real ones do not get the real ones' split."""
    (own_world / SPLIT).unlink()
    frames = find_frames(own_world)[0]
    listed = [frame for frame in frames if frame.path.removeprefix("SUNRGBD/") in read_official_list()]
    assert listed
    with pytest.raises(UserError, match=f"names only {len(listed)} of the 40 frames.*SUNRGBDtoolbox.zip"):
        official_split(own_world, frames)


def test_a_tree_without_the_toolbox_has_the_official_split(own_world):
    """Frames beside the data set's own are left out, as with the toolbox's file."""
    (own_world / SPLIT).unlink()
    known = dict(random.Random(0).sample(sorted(read_official_list().items()), 30))
    frames = [read_frame(own_world, frame.path) for frame in find_frames(own_world)[0][:36]]
    for frame, name in zip(frames, [*known, *(f"kv1/own/{i}" for i in range(6))], strict=True):
        object.__setattr__(frame, "path", f"SUNRGBD/{name}")
    toolbox = official_split(own_world, frames, official_val=True)
    assert toolbox == {f"SUNRGBD/{name}": split for name, split in known.items()}
    split = official_split(own_world, frames)
    assert {path for path in split if split[path] == "test"} == {path for path in toolbox if toolbox[path] == "test"}
    val = validation_tenth([name for name, half in read_official_list().items() if half != "test"])
    assert split.keys() == toolbox.keys()
    assert {path for path in split if split[path] == "val"} == {path for path in split if path[8:] in val}


def tenth() -> dict[str, str]:
    """`name -> train | val` of the official training half."""
    training = [name for name, split in read_official_list().items() if split != "test"]
    val = validation_tenth(training)
    return {name: "val" if name in val else "train" for name in training}


def test_the_validation_tenth_of_the_official_training_half():
    """No recording and no place on both sides; a tenth of every sensor; realsense has but five days."""
    split = tenth()
    assert Counter(split.values()) == {"train": 4735, "val": 550}
    for of in (frame_group, lambda path: "/".join(path.split("/")[1:4]) if "sun3d" in path else path):
        sides = {side: {of(f"SUNRGBD/{name}") for name in split if split[name] == side} for side in ("train", "val")}
        assert not sides["train"] & sides["val"]
    shares = {
        part: sum(split[name] == "val" for name in names) / len(names)
        for part in ("kv1/NYUdata", "kv1/b3dodata", "kv2", "kv2/kinect2data", "xtion", "xtion/sun3ddata", "realsense")
        if (names := [name for name in split if name.startswith(f"{part}/")])
    }
    assert shares.pop("realsense") == pytest.approx(93 / 587)
    assert all(0.09 < share < 0.115 for share in shares.values()), shares


def test_what_was_recorded_together_stays_together():
    """Three sensors side by side on one day; NYUv2 scenes, which no gap in the numbers divides; neighbours of B3DO."""
    split = tenth()
    aligned = ("kv2/align_kv2/", "xtion/xtion_align_data/", "realsense/shr/")
    assert len({split[name] for name in split if name.startswith(aligned)}) == 1
    numbers = {int(name[-4:]): name for name in split if name.startswith("kv1/NYUdata/")}
    for number, name in numbers.items():
        assert split[name] == split[numbers.get(number + 1, name)]
    b3do = sorted(name for name in split if name.startswith("kv1/b3dodata/"))
    changes = sum(split[one] != split[other] for one, other in zip(b3do, b3do[1:], strict=False))
    assert changes <= 4  # single frames at random would be 50
    rooms = frame_rooms(split)
    assert len({rooms[name] for name in split if split[name] == "val"}) == 40


def test_the_validation_tenth_does_not_depend_on_the_order():
    training = [name for name, split in read_official_list().items() if split != "test"]
    shuffled = random.Random(1).sample(training, len(training))
    assert validation_tenth(shuffled) == validation_tenth(set(training)) == validation_tenth(training)


def test_a_toolbox_without_trainvalsplit_has_no_official_validation(own_world):
    mat = loadmat(own_world / SPLIT)
    savemat(own_world / SPLIT, {key: mat[key] for key in ("alltrain", "alltest")})
    with pytest.raises(UserError, match="no trainvalsplit in it.*leave that flag out"):
        official_split(own_world, find_frames(own_world)[0], official_val=True)


def test_a_damaged_split_is_an_error_with_or_without_the_list(own_world):
    frames, _ = find_frames(own_world)
    mat = loadmat(own_world / SPLIT)
    savemat(own_world / SPLIT, {key: mat[key] for key in ("alltrain", "alltest")}, do_compression=True)
    sound = (own_world / SPLIT).read_bytes()
    for seed in range(60):
        rng, data = random.Random(seed), bytearray(sound)
        if seed % 2:
            del data[rng.randrange(len(data)) :]
        else:
            data[rng.randrange(140, len(data))] ^= 1 << rng.randrange(8)  # behind the header, whose text may change
        (own_world / SPLIT).write_bytes(data)
        with pytest.raises(UserError, match="allsplit.mat: the official split cannot be read"):
            official_split(own_world, frames)


def test_the_list_of_the_official_split():
    """The counts of Song et al. and their toolbox: 5285 for training, of which 2666 and 2619; 5050 for testing."""
    listed = read_official_list()
    assert Counter(listed.values()) == {"train": 2666, "val": 2619, "test": 5050}
    assert Counter(name.split("/")[0] for name in listed) == {
        "kv1": 2003,
        "kv2": 3784,
        "realsense": 1159,
        "xtion": 3389,
    }
    assert all("//" not in name and not name.endswith("/") for name in listed)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda f: next((f / "depth").iterdir()).unlink(), "depth: expected one"),
        (lambda f: shutil.rmtree(f / "depth"), "depth: expected one"),
        (lambda f: shutil.rmtree(f / "image"), "image: expected one"),
        (lambda f: (f / "image" / "second.jpg").write_bytes(b""), "image: expected one"),
        (lambda f: (f / "intrinsics.txt").write_text("1 2 3"), "intrinsics.txt: expected 3x3"),
        (lambda f: (f / "intrinsics.txt").unlink(), "intrinsics.txt"),
        (lambda f: next((f / "extrinsics").iterdir()).write_text("a b"), "expected 3x4"),
        (lambda f: next((f / "extrinsics").iterdir()).write_text("inf " * 12), "nan or inf"),
        (lambda f: (f / "intrinsics.txt").write_text("500 0 nan 0 500 200 0 0 1"), "intrinsics.txt.*nan or inf"),
        (
            lambda f: (f / "intrinsics.txt").write_text("500 0 300 0 -500 200 0 0 1"),
            "500 and -500; they must be positive",
        ),
        (lambda f: (f / "intrinsics.txt").write_text("0 0 300 0 500 200 0 0 1"), "0 and 500; they must be positive"),
        (lambda f: half_size(next((f / "depth").iterdir())), "depth is 64x64 pixels and .* 128x128"),
        (lambda f: half_size(next((f / "depth_bfx").iterdir())), "depth_bfx/.*depth is 64x64 pixels"),
    ],
)
def test_unusable_frames_are_listed_with_their_reason(own_world, damage, complaint):
    frames, _ = find_frames(own_world)
    damage(own_world / frames[3].path)
    usable, unusable = find_frames(own_world)
    assert len(usable) == 39
    ((path, reason),) = unusable
    assert path == frames[3].path and re.search(complaint, reason)


def half_size(path) -> None:
    with Image.open(path) as picture:
        small = picture.resize([side // 2 for side in picture.size], Image.Resampling.NEAREST)
    small.save(path)


def test_links_lead_to_every_frame_once(own_world, tmp_path):
    """To a parent, to a sibling, in a circle with another folder, and to frames that lie somewhere else."""
    top = own_world / "SUNRGBD"
    before = [frame.path for frame in find_frames(own_world)[0]]
    (top / "kv1" / "all").symlink_to(top)
    (top / "a_link").symlink_to(top / "kv2")  # comes first by its name
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "back").symlink_to(top / "xtion")
    (top / "outside").symlink_to(tmp_path / "elsewhere")
    assert [frame.path for frame in find_frames(own_world)[0]] == before
    moved = tmp_path / "elsewhere" / "frame"
    shutil.move(own_world / before[0], moved)
    (own_world / before[0]).symlink_to(moved)
    frames, unusable = find_frames(own_world)
    assert [frame.path for frame in frames] == before and not unusable


def test_optional_files(own_world):
    frames, _ = find_frames(own_world)
    folder = own_world / frames[0].path
    shutil.rmtree(folder / "extrinsics")
    (folder / "scene.txt").write_text("office  \n")
    shutil.rmtree(folder / "depth_bfx")
    frame = read_frame(own_world, frames[0].path)
    assert frame.scene == "office" and frame.depth_bfx_path is None and (frame.tilt == np.eye(3)).all()
    (folder / "scene.txt").write_bytes(b"caf\xe9")
    assert read_frame(own_world, frames[0].path).scene.startswith("caf")
    (folder / "scene.txt").unlink()
    assert read_frame(own_world, frames[0].path).scene == "idk"


def test_the_last_extrinsics_count_and_intrinsics_may_be_one_line(own_world):
    frame = find_frames(own_world)[0][0]
    folder = own_world / frame.path
    turned = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]])
    np.savetxt(folder / "extrinsics" / "99990101000000.txt", turned)
    np.savetxt(folder / "extrinsics" / "00010101000000.txt", -turned)
    (folder / "intrinsics.txt").write_text("500 0 300 0 510 200 0 0 1")
    again = read_frame(own_world, frame.path)
    np.testing.assert_array_equal(again.tilt, turned[:, :3])
    np.testing.assert_array_equal(again.intrinsics, [[500, 0, 300], [0, 510, 200], [0, 0, 1]])


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


def test_the_list_is_the_real_file(samples, tmp_path):
    mat = loadmat(samples / SPLIT, squeeze_me=True)
    cells = {name: mat["trainvalsplit"][name].item() for name in ("train", "val")} | {"test": mat["alltest"]}
    names = {split: [str(path).removeprefix("/data1/SUNRGBD/").rstrip("/") for path in cells[split]] for split in cells}
    listed = read_official_list()
    assert listed == {name: split for split in names for name in names[split]} and len(listed) == 10_335
    alltrain = {str(path).removeprefix("/data1/SUNRGBD/").rstrip("/") for path in mat["alltrain"]}
    assert alltrain == {name for name, split in listed.items() if split != "test"}
    write_official_list(samples / SPLIT, tmp_path / "again.xz")
    assert (tmp_path / "again.xz").read_bytes() == OFFICIAL_LIST.read_bytes()


def test_real_frames_without_the_toolbox(samples, tmp_path):
    frames, _ = find_frames(samples)
    assert official_split(tmp_path, frames) == official_split(samples, frames)
    assert listed_split(tmp_path, frames) == listed_split(samples, frames)
    assert listed_split(tmp_path, frames, official_val=True) == listed_split(samples, frames, official_val=True)
