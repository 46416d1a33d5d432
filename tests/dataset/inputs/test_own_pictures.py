"""A user's own depth picture: read in the unit that is stated, or refused with the unit that would fit."""

from itertools import product

import numpy as np
import pytest
from PIL import Image

from dataset.inputs.own_pictures import own_camera, read_own_depth, read_own_rgb
from dataset.sunrgbd.depth import encode_sunrgbd, read_depth
from tests.helpers.annotations import PITCH, TILT
from utils import UserError

ROOM_M = np.linspace(0.8, 5.0, 48 * 64, dtype=np.float32).reshape(48, 64)
ROOM_M[10:20, 10:20] = 0  # a hole


def write(path, values):
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)
    return path


WRITTEN = {
    "sunrgbd": encode_sunrgbd(ROOM_M),
    "mm": np.rint(ROOM_M * 1000).astype(np.uint16),
    "m": ROOM_M,
}


@pytest.mark.parametrize(
    ("unit", "ending"), [*product(("sunrgbd", "mm"), ("png", "tiff", "npy")), ("m", "tiff"), ("m", "npy")]
)
def test_depth_in_every_unit_and_format(unit, ending, tmp_path):
    path = write(tmp_path / f"depth.{ending}", WRITTEN[unit])
    depth_m = read_own_depth(path, unit)
    assert depth_m.dtype == np.float32 and (depth_m[10:20, 10:20] == 0).all()
    np.testing.assert_allclose(depth_m, ROOM_M, atol=0.001)
    for other in WRITTEN.keys() - {unit}:
        with pytest.raises(UserError, match=f"depth.{ending}: .*--depth_format {unit}|holds fractions"):
            read_own_depth(path, other)


def test_words_of_sun_rgbd_are_read_as_the_data_set_is(tmp_path):
    path = write(tmp_path / "depth.png", WRITTEN["sunrgbd"])
    np.testing.assert_array_equal(read_own_depth(path, "sunrgbd"), read_depth(path))


def test_what_is_not_measured_is_a_hole(tmp_path):
    values = ROOM_M.copy()
    values[0, :4] = np.nan, np.inf, -1, 0
    depth_m = read_own_depth(write(tmp_path / "depth.npy", values), "m")
    assert (depth_m[0, :4] == 0).all() and np.isfinite(depth_m).all()
    far = np.where(np.arange(64) < 20, np.float32(30), ROOM_M)
    assert read_own_depth(write(tmp_path / "far.npy", far), "m").max() == 8


@pytest.mark.parametrize(
    ("name", "values", "complaint"),
    [
        ("color.png", np.zeros((48, 64, 3), np.uint8), "is a color picture"),
        ("grey.png", np.full((48, 64), 100, np.uint8), "is an 8-bit picture"),
        ("zero.png", np.zeros((48, 64), np.uint16), "no pixel has a measurement"),
        ("nan.npy", np.full((48, 64), np.nan, np.float32), "no pixel has a measurement"),
        ("flat.npy", np.zeros(9, np.float32), r"has shape \(9,\)"),
        ("words.npy", np.array([["a"]]), "type <U1"),
        ("far.npy", np.full((48, 64), 4e7, np.float32), "no unit would fit"),
        ("small.npy", np.full((4, 64), 2, np.float32), "64 x 4 pixels, too few"),
    ],
)
def test_what_is_no_depth_picture_is_refused(name, values, complaint, tmp_path):
    with pytest.raises(UserError, match=f"{name}: .*{complaint}"):
        read_own_depth(write(tmp_path / name, values), "mm")


def test_files_that_hold_no_picture_are_refused(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    for name in ("text.png", "pickle.npy", "cut.npy", "absent.png", "absent.npy"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            read_own_depth(tmp_path / name, "mm")
    with pytest.raises(UserError, match="text.png: cannot be read"):
        read_own_rgb(tmp_path / "text.png")
    with pytest.raises(UserError, match="needs a color picture"):
        read_own_rgb(write(tmp_path / "depth.png", WRITTEN["mm"]))


@pytest.mark.parametrize("ending", ["png", "npy"])
def test_a_picture_of_100_megapixels_is_refused_before_it_is_decoded(ending, tmp_path):
    path = write(tmp_path / f"large.{ending}", np.zeros((10_000, 10_000), np.uint16))
    with pytest.raises(UserError, match="has 10000 x 10000 pixels; 50,000,000 are the most"):
        read_own_depth(path, "mm")


def test_cameras(tmp_path):
    np.savetxt(tmp_path / "k.txt", np.array([[500.0, 0, 320], [0, 501.0, 240], [0, 0, 1]]))
    np.savetxt(tmp_path / "tilt.txt", np.c_[TILT, np.zeros(3)])
    from_files = own_camera(640, 480, intrinsics=str(tmp_path / "k.txt"), tilt=str(tmp_path / "tilt.txt"))
    typed = own_camera(640, 480, intrinsics="500,501,320,240", tilt=str(np.degrees(PITCH)))
    for camera in (from_files, typed):
        np.testing.assert_allclose(camera.intrinsics, [[500, 0, 320], [0, 501, 240], [0, 0, 1]])
        np.testing.assert_allclose(camera.tilt, TILT, atol=1e-6)
        assert not camera.assumed
    usual = own_camera(640, 480, focal_share=0.8, tilt_degrees=10)
    assert usual.intrinsics[0, 0] == usual.intrinsics[1, 1] == 512
    assert usual.tilt[1, 2] == pytest.approx(0.1736, abs=1e-4)
    assert usual.assumed == ("--intrinsics 512,512,320,240", "--tilt 10")


@pytest.mark.parametrize(
    "given",
    [
        {"intrinsics": "500"}, {"intrinsics": "a,b,c,d"}, {"intrinsics": "nan,1,2,3"},
        {"intrinsics": "-500,500,320,240"},
        {"intrinsics": "500,500,900,240"}, {"intrinsics": "/"}, {"tilt": "100"}, {"tilt": "steep"},
        {"tilt": "1 2 3 4 5 6 7 8 9"}, {"tilt": ""},
    ],
)  # fmt: skip
def test_malformed_cameras_are_refused(given):
    with pytest.raises(UserError, match="--(intrinsics|tilt)"):
        own_camera(640, 480, **given)
