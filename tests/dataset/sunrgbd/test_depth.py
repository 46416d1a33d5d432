"""Depth decoding and encodings: known words to known metres, holes, invariances of the seven encodings."""

import numpy as np
import pytest
from PIL import Image

from dataset.inputs.depth_encodings import ENCODINGS, encode_depth, surface_normals
from dataset.sunrgbd.depth import MAX_DEPTH_M, decode_depth, encode_sunrgbd, read_depth, unproject
from utils import UserError

INTRINSICS = np.array([[100.0, 0, 31.5], [0, 100.0, 23.5], [0, 0, 1]])
UPRIGHT = np.eye(3)


def encode(depth_m, encoding, tilt=UPRIGHT):
    return encode_depth(depth_m, encoding=encoding, intrinsics=INTRINSICS, tilt=tilt)


def shown(value):
    """A channel's value as the network sees it: 0 is left to holes."""
    return 1 / 255 + value * 254 / 255


def wall(distance_m: float) -> np.ndarray:
    return np.full((48, 64), distance_m, np.float32)


def test_rotation_oracles():
    """rot(161) = 8212 mm and rot(1) = 8192 mm, which a plain shift would make 20 mm and 0 mm; both clip at 8 m."""
    words = np.array([[161, 1, 8 * 1000, 0]], np.uint16)
    assert decode_depth(words).tolist() == [[8.0, 8.0, 1.0, 0.0]]


def test_all_words_decode_as_in_the_toolbox():
    """read3dPoints.m: bitor(bitshift(d, -3), bitshift(d, 16 - 3)) in 16 bits, over 1000 in single, at most 8."""
    words = np.arange(65536)
    toolbox = ((words // 8) | (words * 2**13 % 2**16)).astype(np.float32) / np.float32(1000)
    toolbox[toolbox > 8] = 8
    np.testing.assert_array_equal(decode_depth(words.astype(np.uint16).reshape(256, 256)).ravel(), toolbox)


def test_encoding_is_the_inverse_of_decoding():
    millimetres = np.arange(65536)
    words = encode_sunrgbd(millimetres / 1000)
    for mm, word in zip(millimetres[::97].tolist(), words[::97].tolist(), strict=True):
        assert ((word >> 3) | (word << 13)) & 0xFFFF == mm
    assert len(np.unique(words)) == 65536
    np.testing.assert_allclose(decode_depth(words), np.minimum(millimetres / 1000, 8), atol=1e-6)


def test_png_round_trip_and_damage(tmp_path):
    depth_m = np.linspace(0.5, 7.5, 48 * 64, dtype=np.float32).reshape(48, 64).round(3)
    depth_m[:5] = 0
    path = tmp_path / "depth.png"
    Image.fromarray(encode_sunrgbd(depth_m)).save(path)
    np.testing.assert_allclose(read_depth(path), depth_m, atol=1e-6)
    data = path.read_bytes()
    for name, content, complaint in (
        ("cut.png", data[: len(data) // 2], "cannot be read"),
        ("empty.png", b"", "cannot be read"),
        ("text.png", b"not a picture", "cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.*{complaint}"):
            read_depth(tmp_path / name)
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(tmp_path / "grey8.png")
    with pytest.raises(UserError, match="grey8.png.*16-bit"):
        read_depth(tmp_path / "grey8.png")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "zero.png")
    with pytest.raises(UserError, match="zero.png.*all depth pixels are zero"):
        read_depth(tmp_path / "zero.png")
    with pytest.raises(UserError, match="absent.png"):
        read_depth(tmp_path / "absent.png")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_range_holes_and_metric_scale(encoding):
    rng = np.random.default_rng(0)
    depth_m = rng.uniform(0.05, 12, (48, 64)).astype(np.float32)
    holes = rng.random((48, 64)) < 0.3
    depth_m[holes] = 0
    channels = encode(np.minimum(depth_m, MAX_DEPTH_M), encoding)
    assert channels.shape == (48, 64, 3) and channels.dtype == np.float32
    assert (np.isnan(channels) == holes[..., None]).all()
    assert np.nanmin(channels) >= np.float32(1 / 255) and np.nanmax(channels) <= 1
    # No per-image scaling: a wall looks the same whatever else is in the picture (hha measures height above the floor,
    # which is a property of the picture).
    near, far = wall(2.0), wall(2.0)
    far[:, 40:] = 7.0
    compared = encode(near, encoding)[5:40, 5:35], encode(far, encoding)[5:40, 5:35]
    for channel in (0, 2) if encoding == "hha" else (0, 1, 2):
        np.testing.assert_allclose(compared[0][..., channel], compared[1][..., channel], atol=1e-6)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_only_holes_reach_the_network_as_zero(encoding, processor):
    """Not even a wall at either end of the range, nor one that faces the camera, looks like a hole in any channel."""
    depth_m = np.kron(np.array([[0.3, 8.0, 0.3, 0.0], [8.0, 0.3, 2.0, 8.0]], np.float32), np.ones((64, 32), np.float32))
    depth_m[70:90, 10:20] = 0
    channels = encode(depth_m, encoding)
    pixels = processor.pixels([channels], image_tokens="one_tile")["pixel_values"][0, 0].numpy()
    assert ((pixels == -1) == (depth_m == 0)).all()  # -1 is what a 0 becomes
    resized = processor.pixels([channels[::3, ::3]], image_tokens="one_tile")["pixel_values"][0, 0].numpy()
    holes = resized == -1
    assert holes.any() and (holes == holes[0]).all() and resized[~holes].min() > -1 + 2 / 255 - 1e-5


@pytest.mark.parametrize("encoding", ["metric_log3", "grey", "inverse", "turbo"])
def test_different_distances_are_told_apart(encoding):
    views = [encode(wall(d), encoding)[24, 32] for d in (0.5, 1, 2, 4, 7.9)]
    assert all(np.abs(a - b).max() > 0.01 for a, b in zip(views, views[1:], strict=False))


def test_unknown_encoding_names_the_flag():
    with pytest.raises(UserError, match="--depth_encoding rainbow"):
        encode(wall(2), "rainbow")


def test_normals_of_a_tilted_plane():
    """A plane z = 2 + x tan(a): its normal has a known direction, whatever the pixel."""
    slope = np.tan(np.radians(30))
    u = (np.arange(64) - INTRINSICS[0, 2]) / INTRINSICS[0, 0]
    depth_m = np.repeat((2 / (1 - slope * u))[None], 48, axis=0).astype(np.float32)
    normals = surface_normals(unproject(depth_m, INTRINSICS))[4:-4, 4:-4]
    expected = np.array([slope, 0, -1]) / np.hypot(slope, 1)
    np.testing.assert_allclose(normals, np.broadcast_to(expected, normals.shape), atol=2e-3)


def test_height_channel_follows_gravity():
    """A camera pitched down sees a level floor; the height channel is constant on it, the camera-frame y is not."""
    pitch, height = np.radians(20), 1.5
    tilt = np.array([[1, 0, 0], [0, np.cos(pitch), np.sin(pitch)], [0, -np.sin(pitch), np.cos(pitch)]])
    rays = unproject(wall(1.0), INTRINSICS)
    depth_m = (height / (rays @ tilt[1])).astype(np.float32)
    seen = (depth_m > 0.3) & (depth_m < 8)
    channel = encode(np.where(seen, depth_m, 0), "metric_log3", tilt)[..., 2][seen]
    np.testing.assert_allclose(channel, shown(0.5 - height / 4), atol=1e-3)
    upright = encode(np.where(seen, depth_m, 0), "metric_log3")[..., 2][seen]
    assert np.ptp(upright) > 0.1


def test_seed_gradient_is_a_bounded_vector_without_wrap():
    flat = encode(wall(2), "seed")[5:-5, 5:-5]
    np.testing.assert_allclose(flat[..., 1:], shown(0.5), atol=1e-6)
    step = wall(2)
    step[:, 32:] = 4
    across = encode(step, "seed")
    assert across[24, 31, 1] > 0.99 and across[24, 31, 2] == pytest.approx(shown(0.5))
    np.testing.assert_allclose(encode(step[:, ::-1], "seed")[:, ::-1, 1], 2 * shown(0.5) - across[..., 1], atol=1e-6)


def test_real_frames(samples):
    """Figures that were read off the official files."""
    folder = samples / "SUNRGBD/kv1/b3dodata/img_0063"
    raw = read_depth(folder / "depth/img_0063_abs.png")
    assert (raw == 0).mean() == pytest.approx(0.323, abs=5e-4)
    np.testing.assert_allclose(np.percentile(raw[raw > 0], [1, 50, 99]), [1.47, 1.96, 2.39], atol=0.006)
    bfx = read_depth(folder / "depth_bfx/img_0063_abs.png")
    assert (bfx > 0).all() and len(np.unique(bfx)) == 246
