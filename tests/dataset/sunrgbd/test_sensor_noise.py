"""Depth corruptions: the published laws, holes that stay holes, reproducible randomness."""

import numpy as np
import pytest

from dataset.sunrgbd import sensor_noise as c


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def wall(depth: float, shape: tuple[int, int] = (120, 160)) -> np.ndarray:
    return np.full(shape, depth, np.float32)


def box_before_wall() -> np.ndarray:
    depth_m = wall(3.0)
    depth_m[40:80, 60:100] = 1.5
    depth_m[:5, :5] = 0
    return depth_m


CORRUPTIONS = {
    "axial_noise": lambda d, r: c.axial_noise(d, r),
    "constant_noise": lambda d, r: c.constant_noise(d, r, sigma_m=0.01),
    "disparity_quantise": lambda d, r: c.disparity_quantise(d, r),
    "contour_shadows": lambda d, r: c.contour_shadows(d),
    "edge_holes": lambda d, r: c.edge_holes(d, r),
    "flying_pixels": lambda d, r: c.flying_pixels(d, r),
    "blob_holes": lambda d, r: c.blob_holes(d, r, share=0.2),
    "border_holes": lambda d, r: c.border_holes(d, r),
    "range_cut": lambda d, r: c.range_cut(d, min_m=1.0, max_m=2.0),
    "augment_depth": lambda d, r: c.augment_depth(d, r),
    **{sensor: lambda d, r, s=sensor: c.sensor_noise(d, s, r) for sensor in ("kv1", "kv2", "realsense", "xtion")},
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_contract_of_every_corruption(name):
    before = box_before_wall()
    kept = before.copy()
    after = CORRUPTIONS[name](before, rng())
    assert np.array_equal(before, kept), "the input was changed"
    assert after.dtype == np.float32 and after.shape == before.shape
    assert np.isfinite(after).all() and (after >= 0).all()
    assert (after[before == 0] == 0).all(), "a hole was measured"
    assert not np.array_equal(after, before)
    assert np.array_equal(after, CORRUPTIONS[name](before, rng()))


@pytest.mark.parametrize("z", [0.8, 2.0, 4.0])
def test_axial_noise_follows_the_law(z):
    sigma = 0.0012 + 0.0019 * (z - 0.4) ** 2
    assert c.axial_noise(wall(z), rng()).std() == pytest.approx(sigma, rel=0.05)
    assert c.axial_noise(wall(z), rng(), strength=3).std() == pytest.approx(3 * sigma, rel=0.05)
    assert np.array_equal(c.axial_noise(wall(z), rng(), strength=0), wall(z))


def test_quantised_depths_are_whole_disparity_steps():
    ramp = np.tile(np.linspace(0.6, 6, 160, dtype=np.float32), (120, 1))
    after = c.disparity_quantise(ramp, rng())
    steps = 351.3 / after
    assert np.abs(steps - np.rint(steps)).max() < 1e-3
    assert (np.abs(after - ramp) < 1.6 * ramp**2 / 351.3).all()


def test_shadow_is_left_of_the_object_and_as_wide_as_the_parallax():
    depth_m = wall(4.0, (4, 640))
    depth_m[:, 300:340] = 1.0
    lost = np.flatnonzero(c.contour_shadows(depth_m)[0] == 0)
    parallax = c.FOCAL_PER_WIDTH * 640 * c.BASELINE_M * (1 / 1.0 - 1 / 4.0)
    assert lost.max() == 299
    assert len(lost) == pytest.approx(parallax, abs=1)
    assert (c.contour_shadows(wall(2.0)) > 0).all()


def test_edge_holes_stay_near_edges():
    depth_m = box_before_wall()
    lost = (c.edge_holes(depth_m, rng(), width=0.02, share=1.0) == 0) & (depth_m > 0)
    rows, columns = np.nonzero(lost)
    assert len(rows) and (rows > 35).all() and (rows < 85).all() and (columns > 55).all() and (columns < 105).all()
    assert not lost[48:72, 68:92].any()
    assert (c.edge_holes(wall(2.0), rng(), share=1.0) > 0).all()


def test_flying_pixels_lie_between_fore_and_background():
    depth_m = box_before_wall()
    after = c.flying_pixels(depth_m, rng(), share=1.0)
    changed = after != depth_m
    assert changed.any() and (after[changed] >= 1.5).all() and (after[changed] <= 3.0).all()
    assert ((after[changed] > 1.55) & (after[changed] < 2.95)).any()


def test_blobs_cover_the_share_asked_for_and_are_patches():
    lost = c.blob_holes(wall(2.0), rng(), share=0.2) == 0
    assert lost.mean() == pytest.approx(0.2, abs=0.01)
    assert (lost[1:] == lost[:-1]).mean() > 0.9, "salt and pepper, no patches"
    assert (c.blob_holes(wall(2.0), rng(), share=0.0) > 0).all()


def test_border_holes_spare_the_middle():
    lost = c.border_holes(wall(2.0), rng(), width=0.05) == 0
    assert lost.any() and not lost[30:, 40:120].any()


def test_range_cut():
    depth_m = np.array([[0.0, 0.2, 0.5, 3.9, 4.1]], np.float32)
    assert c.range_cut(depth_m, min_m=0.3, max_m=4.0).tolist() == np.array([[0, 0, 0.5, 3.9, 0]], np.float32).tolist()


def test_hole_rates_of_the_sensors():
    from dataset.miniature.renderer import render_room

    rooms = [render_room(seed).depth_m for seed in range(12)]
    rates = {
        sensor: np.mean([(c.sensor_noise(room, sensor, rng(i)) == 0).mean() for i, room in enumerate(rooms)])
        for sensor in ("kv1", "kv2", "realsense", "xtion")
    }
    assert 0.1 < rates["kv1"] < 0.3 and 0.1 < rates["kv2"] < 0.3 and 0.1 < rates["xtion"] < 0.3
    assert rates["realsense"] > rates["kv1"]
    for sensor in rates:
        weak, strong = (np.mean([(c.sensor_noise(r, sensor, rng(), s) == 0).mean() for r in rooms]) for s in (0.3, 2.0))
        assert weak < rates[sensor] < strong
    light = np.mean([(c.augment_depth(room, rng(i)) == 0).mean() for i, room in enumerate(rooms)])
    assert 0 < light < rates["kv1"]


def test_unknown_sensor_is_an_error():
    with pytest.raises(ValueError, match="kinect"):
        c.sensor_noise(wall(2.0), "kinect", rng())


def test_holes_get_the_nearest_measurement():
    generator = rng(3)
    depth_m = generator.uniform(1, 4, (9, 11)).astype(np.float32)
    depth_m[generator.random(depth_m.shape) < 0.6] = 0
    filled = c.fill_holes(depth_m)
    measured = np.argwhere(depth_m > 0)
    for pixel in np.ndindex(depth_m.shape):
        distances = ((measured - pixel) ** 2).sum(axis=1)
        nearest = measured[distances == distances.min()]
        assert filled[pixel] in depth_m[tuple(nearest.T)]


def test_filling_nothing_and_everything():
    full = wall(2.0)
    assert np.array_equal(c.fill_holes(full), full)
    with pytest.raises(ValueError, match="measurement"):
        c.fill_holes(np.zeros((4, 4), np.float32))


def test_hole_filled_has_256_levels_at_most():
    depth_m = c.sensor_noise(np.tile(np.linspace(1, 5, 160, dtype=np.float32), (120, 1)), "kv2", rng())
    filled = c.hole_filled(depth_m)
    measured = depth_m > 0
    assert (filled > 0).all() and 100 < len(np.unique(filled)) <= 256
    step = (depth_m[measured].max() - depth_m[measured].min()) / 255
    assert np.abs(filled - depth_m)[measured].max() <= step / 2 + 1e-5
    assert np.array_equal(c.hole_filled(wall(2.0)), wall(2.0))
