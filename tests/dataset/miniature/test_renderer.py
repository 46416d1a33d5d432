"""The rendered rooms: exact geometry, color that depth cannot know, well-posed objects."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from dataset.miniature.renderer import COLORS, NOUNS, PRETRAIN_STYLE, WORLD_STYLE, View, render_room


@pytest.fixture(scope="module")
def views() -> list[View]:
    return [render_room(seed) for seed in range(120)]


def gravity_points(view: View) -> np.ndarray:
    """(H, W, 3), written without the module's own projection."""
    height, width = view.depth_m.shape
    pixels = np.stack([*np.meshgrid(np.arange(width), np.arange(height)), np.ones((height, width))], axis=-1)
    camera = pixels @ np.linalg.inv(view.intrinsics).T * view.depth_m[..., None]
    return camera @ view.tilt.T


def test_equal_seeds_give_equal_bytes_and_other_seeds_other_rooms():
    a, b, other = render_room(7), render_room(7), render_room(8)
    assert all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("rgb", "depth_m", "object_ids"))
    assert not np.array_equal(a.depth_m, other.depth_m)
    assert not np.array_equal(a.depth_m, render_room(7, style=PRETRAIN_STYLE).depth_m)


def test_shapes_and_dtypes(views):
    view = views[0]
    assert view.rgb.shape == (128, 128, 3) and view.rgb.dtype == np.uint8
    assert view.depth_m.shape == (128, 128) and view.depth_m.dtype == np.float32
    assert view.object_ids.dtype == np.int16
    assert np.isfinite(view.depth_m).all() and view.depth_m.min() > 0.3 and view.depth_m.max() < 8


def test_a_ray_exactly_parallel_to_a_wall_hits_another(recwarn):
    assert np.isfinite(render_room(575).depth_m).all()
    assert not recwarn.list


def test_colors_leave_no_trace_in_geometry():
    for seed in range(10):
        a, b = render_room(seed, color_seed=1), render_room(seed, color_seed=2)
        assert a.depth_m.tobytes() == b.depth_m.tobytes() and a.object_ids.tobytes() == b.object_ids.tobytes()
        assert [thing.noun for thing in a.objects] == [thing.noun for thing in b.objects]
        assert not np.array_equal(a.rgb, b.rgb)


def test_favorite_color_is_the_only_prior():
    drawn = defaultdict(Counter)
    for seed in range(150):
        for thing in render_room(seed % 15, color_seed=seed).objects:
            drawn[thing.color == WORLD_STYLE.favorite_colors[thing.noun]][thing.color] += 1
    total = sum(sum(counts.values()) for counts in drawn.values())
    assert sum(drawn[True].values()) / total == pytest.approx(0.4, abs=0.06)
    assert set(drawn[False]) == set(COLORS)


def test_pixels_lie_inside_their_objects_box(views):
    for view in views:
        points = gravity_points(view)
        for index, thing in enumerate(view.objects):
            seen = points[view.object_ids == index]
            assert (seen[:, 1] > thing.y_min - 2e-3).all() and (seen[:, 1] < thing.y_max + 2e-3).all()
            origin, sides = thing.corners_xz[0], thing.corners_xz[[1, 3]] - thing.corners_xz[0]
            shares = (seen[:, [0, 2]] - origin) @ sides.T / (sides**2).sum(axis=1)
            assert shares.min() > -5e-3 and shares.max() < 1 + 5e-3, thing.noun


def test_ball_pixels_lie_on_the_sphere(views):
    found = 0
    for view in views:
        points = gravity_points(view)
        for index, thing in enumerate(view.objects):
            if thing.noun == "ball":
                found += 1
                radius = (thing.y_max - thing.y_min) / 2
                distance = np.linalg.norm(points[view.object_ids == index] - thing.center_m, axis=1)
                assert distance == pytest.approx(radius, abs=2e-3)
    assert found > 20


def test_box_surfaces_are_where_they_should_be(views):
    """The highest surface of a table is its flat top, the one of a sofa the edge of its back."""
    for view in views:
        points = gravity_points(view)
        for index, thing in enumerate(view.objects):
            if thing.noun == "table" and thing.y_min > 0.1:
                y = points[view.object_ids == index][:, 1]
                assert (np.abs(y - thing.y_min) < 2e-3).sum() > 10


def test_depth_is_a_ray_casters_not_a_rasterisers(views):
    """Naive oracle: the depth of the slabs of a cabinet's body, ray by ray, is never farther than what was rendered."""
    view, index = next(
        (view, i)
        for view in views
        for i, thing in enumerate(view.objects)
        if thing.noun == "cabinet" and len(view.objects) < 5
    )
    thing = view.objects[index]
    across, back = thing.corners_xz[1] - thing.corners_xz[0], thing.corners_xz[3] - thing.corners_xz[0]
    inverse = np.linalg.inv(view.intrinsics)
    rows, columns = np.nonzero(view.object_ids == index)
    for row, column in list(zip(rows, columns, strict=True))[::7]:
        ray = view.tilt @ inverse @ [column, row, 1]
        near, far = 0.0, np.inf
        for axis, low, high in (
            (np.array([0, 1, 0]), thing.y_min, thing.y_max),
            (np.array([across[0], 0, across[1]]), across @ thing.corners_xz[0], across @ thing.corners_xz[1]),
            (np.array([back[0], 0, back[1]]), back @ thing.corners_xz[0], back @ thing.corners_xz[3]),
        ):
            a, b = sorted((low / (axis @ ray), high / (axis @ ray)))
            near, far = max(near, a), min(far, b)
        # The doors stand 5 cm out of a body that is 5 cm less deep, so the surface is at most that far behind the box.
        assert near <= far + 1e-3
        assert near - 2e-3 <= view.depth_m[row, column] <= near + 0.25


def test_floor_is_level(views):
    for view in views:
        floor = max(thing.y_max for thing in view.objects)
        y = gravity_points(view)[..., 1][view.object_ids < 0]
        assert y.max() < floor + 2e-3
        assert (np.abs(y - floor) < 2e-3).mean() > 0.1


def test_nothing_interpenetrates(views):
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 12), np.linspace(0, 1, 12)), axis=-1).reshape(-1, 2)
    for view in views:
        for a in view.objects:
            points = a.corners_xz[0] + grid @ (a.corners_xz[[1, 3]] - a.corners_xz[0])
            for b in view.objects:
                if a is b or min(a.y_max, b.y_max) - max(a.y_min, b.y_min) < 0.011:
                    continue
                sides = b.corners_xz[[1, 3]] - b.corners_xz[0]
                shares = (points - b.corners_xz[0]) @ sides.T / (sides**2).sum(axis=1)
                assert not ((shares >= 0) & (shares <= 1)).all(axis=1).any(), (a.noun, b.noun)


def test_objects_stand_on_the_floor_or_on_furniture(views):
    stacked = 0
    for view in views:
        floor = max(thing.y_max for thing in view.objects)
        tops = [thing.y_min for thing in view.objects if thing.noun in ("table", "cabinet")]
        for thing in view.objects:
            if thing.y_max != pytest.approx(floor, abs=1e-6):
                assert thing.noun in ("lamp", "ball") and any(thing.y_max == pytest.approx(top) for top in tops)
                stacked += 1
    assert stacked > 20


def test_objects_are_large_enough_to_ask_about(views):
    for view in views:
        assert 3 <= len(view.objects) <= 6
        sizes = [np.count_nonzero(view.object_ids == index) for index in range(len(view.objects))]
        assert min(sizes) >= 0.01 * view.object_ids.size
        assert max(Counter(thing.noun for thing in view.objects).values()) <= 4


def test_every_class_and_every_count_occurs(views):
    counts = Counter((noun, n) for view in views for noun, n in Counter(t.noun for t in view.objects).items())
    assert {noun for noun, _ in counts} == set(NOUNS)
    per_answer = Counter({n: sum(k for (_, m), k in counts.items() if m == n) for n in (1, 2, 3, 4)})
    assert min(per_answer.values()) >= 15


def test_color_names_can_be_read_from_the_pixels(views):
    names, values = list(COLORS), np.array(list(COLORS.values()), float)
    right = total = 0
    for view in views:
        for index, thing in enumerate(view.objects):
            median = np.median(view.rgb[view.object_ids == index], axis=0)
            # Shading scales all channels alike, so directions in RGB are compared.
            cosine = (values @ median) / np.linalg.norm(values, axis=1) / np.linalg.norm(median)
            right += names[int(cosine.argmax())] == thing.color
            total += 1
    assert right / total > 0.99


def test_size_changes_resolution_only_in_the_camera():
    small, large = render_room(3, size=64), render_room(3, size=128)
    assert small.rgb.shape == (64, 64, 3)
    assert large.intrinsics[0, 0] == pytest.approx(2 * small.intrinsics[0, 0])
    assert np.array_equal(small.tilt, large.tilt)


def test_instances_are_what_the_view_shows(views):
    view = views[1]
    for index, instance in enumerate(view.instances()):
        assert instance.noun == view.objects[index].noun
        assert np.array_equal(instance.mask, view.object_ids == index)
        seen = view.depth_m[instance.mask]
        assert seen.min() <= instance.depth_m <= seen.max()
        low, high = view.objects[index].corners_xz.min(axis=0), view.objects[index].corners_xz.max(axis=0)
        assert instance.center_m[[0, 2]] == pytest.approx((low + high) / 2)
        assert instance.size_m[[0, 2]] == pytest.approx(high - low)
