"""A worse sensor: what is lost, and that nothing else changes; the light model against its own formula."""

import numpy as np
import pytest

from dataset.inputs.degradations import (
    ADC_BITS,
    DEPTH_LADDER,
    FULL_WELL,
    HOLE_SHARES,
    LIGHT_LADDER,
    RANGES_M,
    RESOLUTIONS,
    TRAINED,
    Degradation,
    degrade_depth,
    degrade_rgb,
    draw_degradation,
    read_noise,
    rng_of,
)

LEVEL = np.eye(3)
HOLES = ("holes", "edge_holes", "border_holes", "pixel_holes")
RUNGS = [Degradation(kind, severity) for kind, severities in DEPTH_LADDER.items() for severity in severities]


@pytest.fixture(scope="module")
def depth_m():
    """A box before a slanted wall, every pixel measured but a corner."""
    rows, columns = np.indices((96, 128))
    values = (3 + columns / 50).astype(np.float32)
    values[30:70, 40:80] = 1.8 + rows[30:70, 40:80] / 400
    values[:8, :8] = 0
    return values


def degraded(depth_m, kind, severity, picture="frame"):
    rung = Degradation(kind, severity)
    return degrade_depth(depth_m, LEVEL, rung, rng_of(picture, rung))


@pytest.mark.parametrize("rung", RUNGS, ids=str)
def test_every_rung_keeps_type_size_and_holes_and_is_the_same_in_every_call(depth_m, rung):
    before = depth_m.copy()
    values, tilt = degraded(depth_m, rung.kind, rung.severity)
    assert values.dtype == np.float32 and values.shape == depth_m.shape and np.isfinite(values).all()
    assert (depth_m == before).all() and np.allclose(tilt @ tilt.T, LEVEL)
    if rung.kind not in ("resolution", "edge_jitter"):  # these show a pixel what lies beside it
        assert not values[depth_m == 0].any()
    assert (degraded(depth_m, rung.kind, rung.severity)[0] == values).all()
    assert (values != depth_m).any() or (tilt != LEVEL).any()


@pytest.mark.parametrize("kind", HOLES)
def test_holes_cover_their_share_and_larger_ones_contain_smaller_ones(depth_m, kind):
    full = np.where(depth_m > 0, depth_m, 2.5).astype(np.float32)
    lost = [degraded(full, kind, share)[0] == 0 for share in DEPTH_LADDER[kind]]
    assert [mask.mean() for mask in lost] == pytest.approx(DEPTH_LADDER[kind], abs=0.001)
    assert (lost[1] >= lost[0]).all() and (lost[2] >= lost[1]).all()
    kept = degraded(full, kind, 0.3)[0]
    assert (kept[kept > 0] == full[kept > 0]).all()
    other = degraded(full, kind, 0.3, picture="another")[0] == 0
    assert (other != lost[1]).mean() > 0.05 or kind == "edge_holes"  # these lie where the edges are


def test_where_holes_lie(depth_m):
    full = np.where(depth_m > 0, depth_m, 2.5).astype(np.float32)
    border = degraded(full, "border_holes", 0.3)[0] == 0
    assert border[:, :8].mean() > 0.7 and border[:8].mean() > 0.7 and border[-20:, 50:80].mean() < 0.1
    edges = degraded(full, "edge_holes", 0.15)[0] == 0
    assert edges[28:72, 38:43].mean() > 0.9 and not edges[45:55, 55:65].any() and not edges[:15, 100:].any()


def test_resolution_takes_means_of_what_was_measured(depth_m):
    coarse, _ = degraded(depth_m, "resolution", 8)
    cells = coarse.reshape(8, 12, 8, 16)
    assert (cells == cells[:, :1, :, :1]).all()
    measured = depth_m.reshape(8, 12, 8, 16).swapaxes(1, 2).reshape(8, 8, -1)
    mean = np.array([[cell[cell > 0].mean() for cell in row] for row in measured])
    assert cells[:, 0, :, 0] == pytest.approx(mean, rel=1e-4)  # the corner's hole is less than half of its cell
    gone = depth_m.copy()
    gone[:12, :16] = 0
    assert not degraded(gone, "resolution", 8)[0][:12, :16].any()
    tiny = np.full((4, 5), 2, np.float32)  # fewer pixels than cells
    assert degraded(tiny, "resolution", 8)[0] == pytest.approx(tiny)


def test_values_change_as_their_kinds_say(depth_m):
    measured = depth_m > 0
    cut, _ = degraded(depth_m, "range_cut", 4)
    assert ((cut > 0) == (measured & (depth_m <= 4))).all()
    for bits in DEPTH_LADDER["quantisation"]:
        assert np.abs(degraded(depth_m, "quantisation", bits)[0] - depth_m)[measured].max() <= 4 / 2**bits + 1e-6
    for share in DEPTH_LADDER["scale"]:
        ratio = degraded(depth_m, "scale", share)[0][measured] / depth_m[measured]
        assert np.ptp(ratio) < 1e-6 and abs(ratio[0] - 1) == pytest.approx(share, abs=1e-6)
    for degrees in DEPTH_LADDER["tilt"]:
        values, tilt = degraded(depth_m, "tilt", degrees)
        assert (values == depth_m).all() and np.degrees(np.arccos(tilt[1, 1])) == pytest.approx(degrees)
    noise = [(degraded(depth_m, "noise", s)[0] - depth_m)[measured].std() for s in DEPTH_LADDER["noise"]]
    assert noise[1] / noise[0] == pytest.approx(2, rel=0.1) and noise[2] / noise[1] == pytest.approx(2, rel=0.1)
    jittered, _ = degraded(depth_m, "edge_jitter", 0.016)
    assert set(np.unique(jittered)) <= set(np.unique(depth_m))
    assert np.abs(jittered - depth_m)[80:, 20:].max() < 0.4  # a wall without edges hardly changes
    assert not degraded(depth_m, "no_depth", 1)[0].any()


def test_signs_of_tilt_and_scale_are_drawn(depth_m):
    tilts = {degraded(depth_m, "tilt", 10, str(i))[1][1, 2] > 0 for i in range(20)}
    scales = {degraded(depth_m, "scale", 0.1, str(i))[0].mean() > depth_m.mean() for i in range(20)}
    assert tilts == scales == {True, False}


def test_training_draws_trained_kinds_at_random_strength_around_the_ladder():
    rng = np.random.default_rng(0)
    drawn = [draw_degradation(0.4, rng) for _ in range(4000)]
    some = [degradation for degradation in drawn if degradation]
    assert len(some) / len(drawn) == pytest.approx(0.4, abs=0.03)
    bounds = {"holes": HOLE_SHARES, "resolution": RESOLUTIONS, "range_cut": RANGES_M}
    assert set(bounds) == set(TRAINED)
    for kind, (low, high) in bounds.items():
        severities = [degradation.severity for degradation in some if degradation.kind == kind]
        assert len(severities) / len(some) == pytest.approx(1 / 3, abs=0.05)
        assert low <= min(severities) < max(severities) <= high and len(set(severities)) > 20
        assert low < min(DEPTH_LADDER[kind]) and max(DEPTH_LADDER[kind]) < high
    assert not any(draw_degradation(0, rng) for _ in range(100)) and all(draw_degradation(1, rng) for _ in range(100))


def test_read_noise_is_that_of_the_measured_gains():
    assert read_noise(1) == pytest.approx(3.0) and read_noise(16) == pytest.approx(1.5)
    assert 1.5 < read_noise(4) < 3.0


def linear(rgb):
    srgb = rgb / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("exposure", LIGHT_LADDER["light_gain"][1:5])
def test_light_has_the_mean_and_the_variance_of_the_sensor(exposure):
    """Shot noise, read noise and the converter's steps, in electrons; the picture has 8 bits on top."""
    grey = np.full((200, 200, 3), 120, np.uint8)
    rung = Degradation("light_gain", exposure)
    found = linear(degrade_rgb(grey, rung, np.random.default_rng(0)).astype(float))
    light = linear(np.array(120.0))
    assert found.mean() == pytest.approx(light, rel=0.02)
    gain = min(1 / exposure, 16)
    electrons = light * exposure * FULL_WELL
    step = FULL_WELL / (2**ADC_BITS - 1) / gain
    variance = (electrons + read_noise(gain) ** 2 + step**2 / 12) / (exposure * FULL_WELL) ** 2
    eight_bits = (linear(np.array(121.0)) - linear(np.array(119.0))) ** 2 / 4 / 12
    assert found.var() == pytest.approx(variance + eight_bits, rel=0.08)


def test_less_light_is_darker_without_gain_and_noisier_with_it():
    picture = np.random.default_rng(1).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    dark = [degrade_rgb(picture, Degradation("light", e), np.random.default_rng(0)) for e in LIGHT_LADDER["light"]]
    means = [shown.mean() for shown in dark]
    assert all(a > b for a, b in zip(means, means[1:], strict=False)) and means[-1] < 2
    assert np.abs(dark[0].astype(int) - picture).mean() < 2  # in the right light a little noise
    bright = [
        degrade_rgb(picture, Degradation("light_gain", e), np.random.default_rng(0)) for e in LIGHT_LADDER["light"]
    ]
    errors = [np.abs(shown.astype(int) - picture).mean() for shown in bright]
    assert all(a < b for a, b in zip(errors[1:], errors[2:], strict=False)) and dark[0].dtype == np.uint8
