"""Annotations: tolerant reading, nouns, masks, the join of 2D and 3D, depth of instances."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from dataset.questions.captions import frame_caption
from dataset.questions.generate import frame_candidates
from dataset.sunrgbd.annotations import Coverage, frame_instances, frame_nouns, frame_objects, mask_box, read_annotation
from dataset.sunrgbd.frames import read_frame
from dataset.sunrgbd.nouns import canonical_noun, hinted_nouns, names_group
from tests.helpers.annotations import HEIGHT, INTRINSICS, TILT, WIDTH, box3d, boxes, polygons, rectangle
from utils import UserError


@pytest.mark.parametrize(
    ("raw", "noun"),
    [
        ("chair:occluded", "chair"), ("Night_Stand2", "night stand"), ("bedside table:truncated", "night stand"),
        ("lamp#2", "lamp"), ("keyboard\\", "keyboard"), ("TrashCan", "bin"), ("garbage_bin", "bin"),
        ("couch_ ", "sofa"),
        ("chairs", "chair"), ("mice", "mouse"), ("wal;l", "wall"), ("??????", None), ("", None), ("123", None),
        ("computerizedmachinesandcording", None), ("objects", None), ("I think", None), ("chair\\", "chair"),
        ("CHAIR 12", "chair"),
    ],
)  # fmt: skip
def test_canonical_noun(raw, noun):
    assert canonical_noun(raw) == noun


def test_what_hints_at_a_noun_is_not_counted(make_frame):
    """A lampshade is no lamp, yet nobody may say that there is no lamp, or that there is one."""
    assert hinted_nouns("lampshade") == {"lamp"} and hinted_nouns("backgroundchair") == {"chair"}
    assert hinted_nouns("wire") == set()
    names = ["lampshade", "chair", "chairback", "carpet", "tabletop"]
    frame = make_frame(annotation=polygons(names, [rectangle(30 * i, 10, 30 * i + 25, 100, i) for i in range(5)]))
    instances, unsure = frame_objects(frame)
    assert [thing.noun for thing in instances] == ["chair"]
    assert {"lamp", "chair", "table", "rug"} <= unsure
    asked = frame_candidates(
        instances, rgb=None, rng=np.random.default_rng(0), unsure=unsure, vocabulary=("lamp", "rug", "bed")
    )
    assert {(q.text, q.answer) for q in asked} == {("Is there a bed?", "no"), ("Is there a chair?", "yes")}


def test_an_accessory_is_no_second_thing_but_tells_of_the_first(make_frame):
    """A door's handle beside the door leaves one door; alone it only forbids to say that there is none."""
    for names, unsure in (
        (["door", "doorhandle"], False),
        (["doorhandle"], True),
        (["door", "doorhandle", "door panel"], True),
        (["door", "towel rod"], False),
    ):
        layer = polygons(names, [rectangle(30 * i, 10, 30 * i + 25, 100, i) for i in range(len(names))])
        assert ("door" in frame_objects(make_frame(annotation=layer))[1]) == unsure, names


def test_a_frame_in_which_nothing_is_named_says_nothing_about_what_is_absent(make_frame):
    for layers in ({}, {"annotation": polygons(["gizmo", "wall"], [rectangle(10, 10, 50, 50, i) for i in (0, 1)])}):
        instances, unsure = frame_objects(make_frame(**layers))
        assert not instances
        assert not frame_candidates(instances, rgb=None, rng=np.random.default_rng(0), unsure=unsure)


def test_a_plural_is_a_group_unless_it_is_a_name_for_one_thing():
    assert names_group("chairs") and names_group("books") and names_group("coffee cups")
    assert not names_group("chair") and not names_group("shelves") and not names_group("unknownthings")


@pytest.mark.parametrize(
    "text",
    [
        '{"objects": [{"name": "wall\\"}, {"name": "chair"}]}',  # backslash in front of the closing quote
        '{"objects": [{"name": "chair"}], "number": 1.2\n5}',
        '\ufeff{"objects": [{"name": "chair"}]}',
        '{"objects": [{"name": "chair"}], "n": 1, %%% "m": 2}',
        '{"objects": [{"name": "cha\nir"}]}',
    ],
)
def test_broken_json_is_repaired(tmp_path, text):
    path = tmp_path / "index.json"
    path.write_text(text, encoding="utf-8")
    assert read_annotation(path)["objects"][-1]["name"] == "chair"


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "garbage", "[" * 100_000, "\x00\x01"])
def test_hopeless_json_names_the_file(tmp_path, text):
    path = tmp_path / "index.json"
    path.write_text(text)
    with pytest.raises(UserError, match="index.json"):
        read_annotation(path)
    with pytest.raises(UserError, match="nowhere"):
        read_annotation(tmp_path / "nowhere.json")


def test_mask_is_the_polygon_clipped_to_the_image(make_frame):
    shapes = [rectangle(-50, 20, 39, 59, 0), rectangle(-90, 0, -40, 50, 1)]
    drops = Counter()
    instances, unsure = frame_objects(make_frame(annotation=polygons(["chair", "table"], shapes)), drops)
    assert [thing.noun for thing in instances] == ["chair"]
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[20:60, :40] = True
    assert (instances[0].mask ^ expected).sum() <= 100  # a border of the rectangle may be in or out
    assert mask_box(expected) == (0, 20, 40, 60)
    assert drops["outline without area in the image"] == 1 and unsure == {"table"}


def test_final_polygons_win_and_a_broken_layer_falls_back(make_frame):
    early = polygons(["chair"], [rectangle(10, 10, 50, 50, 0)])
    final = polygons(["table"], [rectangle(10, 10, 50, 50, 0)])
    assert frame_instances(make_frame(annotation=early, annotation2Dfinal=final))[0].noun == "table"
    drops = Counter()
    assert frame_instances(make_frame(annotation=early, annotation2Dfinal="[]"), drops)[0].noun == "chair"
    assert drops["unreadable annotation2Dfinal"] == 1
    assert (
        frame_instances(make_frame(annotation=early, annotation2Dfinal={"frames": [], "objects": []}))[0].noun
        == "chair"
    )
    with pytest.raises(UserError, match="index.json"):
        frame_instances(make_frame(annotation="{", annotation2Dfinal="}"))


@pytest.mark.parametrize("frames", [[], [{}], [{"polygon": []}], None, {}])
def test_a_layer_without_polygons_falls_back(make_frame, frames):
    early = polygons(["chair"], [rectangle(10, 10, 50, 50, 0)])
    drops = Counter()
    layers = {"annotation2Dfinal": {"frames": frames, "objects": [{"name": "sofa"}]}}
    assert frame_objects(make_frame(**layers), drops) == ([], frozenset())
    assert drops == {"empty annotation2Dfinal": 1, "frame without polygons": 1}
    drops.clear()
    assert frame_instances(make_frame(**layers, annotation=early), drops)[0].noun == "chair"
    assert drops == {"empty annotation2Dfinal": 1}


def test_backups_beside_the_index_are_not_read(make_frame):
    frame = make_frame(annotation=polygons(["chair"], [rectangle(10, 10, 50, 50, 0)]))
    backup = polygons(["sofa"], [rectangle(10, 10, 50, 50, 0)])
    (frame.root / frame.path / "annotation" / "index.json_20150712014949").write_text(json.dumps(backup))
    assert [thing.noun for thing in frame_instances(frame)] == ["chair"]


def test_repaired_files_are_counted(make_frame):
    sound = json.dumps(polygons(["chair", "wall"], [rectangle(10, 10, 50, 50, 0)]))
    for text, repaired in ((sound, 0), (sound.replace('"wall"', '"wall\\"'), 1)):
        drops = Counter()
        assert [thing.noun for thing in frame_instances(make_frame(annotation=text), drops)] == ["chair"]
        assert drops["file with damaged JSON"] == repaired


def test_coverage_counts_outlines_and_their_area_in_the_picture(make_frame):
    names = ["chair", "books", "gizmo", "wall", "gizmo2"]
    shapes = [
        rectangle(0, 0, 39, 29, 0),
        rectangle(40, 0, 79, 29, 1),
        rectangle(80, 0, 119, 59, 2),
        rectangle(0, 60, 159, 119, 3),
    ]
    shapes += [rectangle(400, 400, 500, 500, 4), {"object": 99}]
    coverage = Coverage()
    frame_objects(make_frame(annotation=polygons(names, shapes)), coverage=coverage)
    assert coverage.outlines == {"known": 2, "unknown": 3, "structure": 1}
    assert coverage.area == pytest.approx({"known": 0.125, "unknown": 0.125, "structure": 0.5})
    assert coverage.unknown_names == {"gizmo": 2, "": 1}
    twice = coverage + coverage
    assert twice.outlines.total() == 12 and twice.area["structure"] == pytest.approx(1)


def test_boxes_are_joined_by_noun_and_place(make_frame):
    """Two chairs and a table; the layers number them differently. Positions are y down."""
    shapes = [rectangle(10, 30, 50, 80, 0), rectangle(90, 30, 140, 90, 0), rectangle(55, 60, 85, 100, 1)]
    entries = [
        box3d("table:truncated", (0, 0.6, 2.2), (0.8, 0.7, 0.6)),
        None,
        box3d("chair", (0.7, 0.4, 2.0), (0.5, 0.9, 0.5)),
        box3d("chair:occluded", (-0.9, 0.5, 2.1), (0.5, 1.0, 0.4)),
    ]
    links = [rectangle(54, 58, 86, 101, 0), rectangle(91, 29, 139, 91, 2), rectangle(8, 30, 50, 82, 3)]
    frame = make_frame(annotation=polygons(["chair", "table"], shapes), annotation2D3D=boxes(entries, links))
    instances, unsure = frame_objects(frame)
    assert [thing.noun for thing in instances] == ["chair", "chair", "table"] and not unsure
    np.testing.assert_allclose(
        [thing.center_m for thing in instances], [(-0.9, 0.5, 2.1), (0.7, 0.4, 2.0), (0, 0.6, 2.2)]
    )
    np.testing.assert_allclose(instances[0].size_m, (0.5, 1.0, 0.4))


def test_a_box_without_an_outline_makes_its_noun_unsure(make_frame):
    entries = [box3d("sofa", (0, 0.5, 2), (1, 1, 1)), box3d("lamp", (0, 0.5, 2), (20, 1, 1))]
    links = [rectangle(40, 10, 80, 50, 0), rectangle(10, 10, 50, 50, 1)]
    shapes = [rectangle(10, 10, 50, 50, 0)]
    drops = Counter()
    instances, unsure = frame_objects(
        make_frame(annotation=polygons(["chair"], shapes), annotation2D3D=boxes(entries, links)), drops
    )
    assert instances[0].size_m is None and unsure == {"sofa"} and not instances[0].contested
    assert drops == {"3D box without an outline": 1, "3D box without credible size": 1}


def test_3d_objects_that_are_no_box_of_ours_are_counted(make_frame):
    """Nulls, names that are not asked about, and a box that was drawn twice; one may well reach through the floor."""
    deep = box3d("chair", (-0.9, 1.5, 2.1), (0.5, 3.0, 0.4))
    entries = [
        deep,
        None,
        {},
        box3d("gizmo", (0, 0, 2), (1, 1, 1)),
        box3d("chair:truncated", (-0.88, 1.5, 2.1), (0.5, 3.0, 0.4)),
    ]
    links = [rectangle(10, 30, 50, 80, 0), rectangle(10, 30, 50, 80, 3), rectangle(10, 30, 50, 80, 4)]
    drops = Counter()
    layers = {
        "annotation": polygons(["chair"], [rectangle(10, 30, 50, 80, 0)]),
        "annotation2D3D": boxes(entries, links),
    }
    (chair,), unsure = frame_objects(make_frame(**layers), drops)
    np.testing.assert_allclose(chair.center_m, (-0.9, 1.5, 2.1))
    assert not unsure
    assert drops == {"3D object without a name": 2, "3D box of another noun": 1, "3D box drawn twice": 1}


def test_a_box_without_its_rectangle_is_projected(make_frame):
    layers = {"annotation": polygons(["chair"], [rectangle(60, 40, 100, 90, 0)])}
    entries = [box3d("chair", (0, 0.5, 2.0), (0.6, 0.7, 0.5))]
    drops = Counter()
    (chair,) = frame_instances(make_frame(**layers, annotation2D3D=boxes(entries)), drops)
    assert chair.size_m is not None and not drops


def test_an_object_that_the_layers_call_differently_is_no_answer(make_frame):
    """What is "box" in one layer and "projector" in the other may be either: nothing is asked about it."""
    entries = [box3d("projector", (0, 0.5, 2), (1, 1, 1)), box3d("sofa", (0, 0.5, 2), (1, 1, 1))]
    links = [rectangle(10, 10, 50, 50, 0), rectangle(52, 10, 90, 50, 1)]
    shapes = [rectangle(12, 10, 50, 48, 0), rectangle(52, 10, 90, 50, 1)]
    drops = Counter()
    frame = make_frame(annotation=polygons(["box", "sofa"], shapes), annotation2D3D=boxes(entries, links))
    (box, sofa), unsure = frame_objects(frame, drops)
    assert box.contested and not sofa.contested and unsure == {"box", "projector"}
    assert drops == {"3D box without an outline": 1, "object with another noun in 3D": 1}
    near, far = replace(box, depth_m=1.0), replace(sofa, depth_m=3.0)
    for things in ((near, far), (replace(near, depth_m=3.0), replace(far, depth_m=1.0))):
        questions = frame_candidates(things, rgb=None, rng=np.random.default_rng(0), unsure=unsure)
        assert questions and not any("box" in q.text or "projector" in q.text or q.answer == "box" for q in questions)
        assert "box" not in frame_caption(things, scene="office", unsure=unsure).answer
    assert frame_caption([box], scene="office", unsure=unsure) is None


def test_boxes_without_rectangles_are_projected(make_frame):
    center, size = np.array([0.3, 0.2, 2.5]), np.array([0.6, 0.8, 0.5])
    corners = center + size / 2 * np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)])
    pixels = np.array([INTRINSICS @ (TILT.T @ corner) for corner in corners])
    pixels = pixels[:, :2] / pixels[:, 2:]
    shape = rectangle(*pixels.min(axis=0), *pixels.max(axis=0), 0)
    frame = make_frame(
        annotation=polygons(["cabinet"], [shape]), annotation3D=boxes([None, box3d("cabinet", center, size)])
    )
    (found,) = frame_instances(frame)
    np.testing.assert_allclose(found.center_m, center, atol=1e-9)
    np.testing.assert_allclose(found.size_m, size, atol=1e-9)


def test_polygons_of_one_entry_are_one_object_only_inside_one_box(make_frame):
    shapes = [rectangle(10, 30, 25, 80, 0), rectangle(35, 30, 50, 80, 0), rectangle(100, 30, 140, 80, 0)]
    layers = {"annotation": polygons(["chair"], shapes)}
    assert len(frame_instances(make_frame(**layers))) == 3
    entries = [box3d("chair", (-0.9, 0.5, 2.1), (0.5, 1.0, 0.4))]
    layers["annotation2D3D"] = boxes(entries, [rectangle(9, 29, 51, 81, 0)])
    merged, alone = frame_instances(make_frame(**layers))
    assert merged.mask[50, 20] and merged.mask[50, 40] and not merged.mask[50, 30] and merged.size_m is not None
    assert alone.mask[50, 120] and alone.size_m is None
    layers["annotation"] = polygons(["chair", "chair"], [shapes[0], {**shapes[1], "object": 1}, shapes[2]])
    assert len(frame_instances(make_frame(**layers))) == 3  # two entries are two objects


def test_a_smaller_rectangle_of_another_object_does_not_split_an_entry(make_frame):
    """A chair in two pieces, one of which also lies in the rectangle of the chair in front of it."""
    shapes = [rectangle(10, 30, 25, 80, 0), rectangle(60, 30, 75, 80, 0), rectangle(55, 50, 100, 110, 1)]
    shapes[1]["y"] = [60, 60, 80, 80]
    entries = [box3d("chair", (-0.5, 0.5, 3.0), (1.5, 1.0, 0.5)), box3d("chair", (0.1, 0.6, 2.0), (0.5, 0.9, 0.5))]
    links = [rectangle(9, 29, 76, 81, 0), rectangle(54, 49, 101, 111, 1)]
    layers = {"annotation": polygons(["chair", "chair"], shapes), "annotation2D3D": boxes(entries, links)}
    behind, front = frame_instances(make_frame(**layers))
    assert behind.mask[50, 20] and behind.mask[70, 70] and not behind.mask[70, 40]
    np.testing.assert_allclose([behind.center_m, front.center_m], [(-0.5, 0.5, 3.0), (0.1, 0.6, 2.0)])


def test_an_object_outlined_twice_counts_once(make_frame):
    shapes = [rectangle(10, 10, 60, 60, 0), rectangle(11, 11, 61, 60, 1), rectangle(10, 10, 60, 60, 2)]
    drops = Counter()
    instances = frame_instances(make_frame(annotation=polygons(["chair", "chair", "table"], shapes)), drops)
    assert [thing.noun for thing in instances] == ["chair", "table"] and drops == {"object outlined twice": 1}


def test_groups_unknown_names_and_structure_are_counted(make_frame):
    names = ["chairs", "gizmo", "wall", "lamp", "", "sofa"]
    shapes = [rectangle(10, 10, 60, 60, i) for i in (0, 1, 2, 3, 4, 99)]
    drops = Counter()
    frame = make_frame(annotation=polygons(names, shapes))
    instances, unsure = frame_objects(frame, drops)
    assert [thing.noun for thing in instances] == ["lamp"] and unsure == {"chair", "sofa"}
    assert drops == {
        "group of objects": 1, "wall, floor or ceiling": 1, "name not in the noun table": 2,
        "polygon of no named object": 1,
    }  # fmt: skip
    assert frame_nouns(frame) == {"chair", "lamp", "sofa"}


def test_depth_is_the_median_inside_the_eroded_mask(make_frame):
    depth = np.full((HEIGHT, WIDTH), 4.0)
    depth[31:90, 31:33] = 1.5  # a lamp post whose outline is generous: more than half of it shows the wall behind
    shape = rectangle(30, 30, 33, 90, 0)
    (found,) = frame_instances(make_frame(depth, annotation=polygons(["box"], [shape])))
    assert found.depth_m == pytest.approx(1.5)
    depth[40:60, 31:33] = 0  # holes are not measurements
    (found,) = frame_instances(make_frame(depth, annotation=polygons(["box"], [shape])))
    assert found.depth_m == pytest.approx(1.5)


def test_sparse_depth_falls_back_to_the_filled_one_and_else_is_nan(make_frame):
    depth = np.full((HEIGHT, WIDTH), 3.0)
    depth[25:70, 25:70] = 0
    layers = {"annotation": polygons(["box"], [rectangle(30, 30, 60, 60, 0)])}
    (found,) = frame_instances(make_frame(depth, **layers))
    assert np.isnan(found.depth_m) and np.isnan(found.center_m).all()
    (found,) = frame_instances(make_frame(depth, np.full_like(depth, 2.5), **layers))
    assert found.depth_m == pytest.approx(2.5)


def test_centre_without_a_box_is_unprojected_into_the_gravity_frame(make_frame):
    layers = {"annotation": polygons(["box"], [rectangle(100, 70, 120, 90, 0)])}
    (found,) = frame_instances(make_frame(np.full((HEIGHT, WIDTH), 3.0), **layers))
    camera = np.array([(110 - 80) / 150 * 3, (80 - 60) / 150 * 3, 3.0])
    np.testing.assert_allclose(found.center_m, TILT @ camera, atol=0.02)
    assert found.center_m[1] > camera[1]  # the camera looks down, so what is ahead lies lower than it seems


@pytest.mark.parametrize(
    "layer",
    [
        {
            "objects": {"0": {"name": "chair"}},
            "frames": [{"polygon": {"x": [5, 90, 90], "y": [5, 5, 90], "object": 0}}],
        },
        {
            "objects": {"name": "chair"},
            "frames": [{"polygon": [{"x": [5, 90, 90, None], "y": [5, 5, 90], "object": 0}]}],
        },
        {
            "objects": [{"name": "chair"}],
            "frames": [{"polygon": [{"x": [5, 90, 90, 9e30], "y": [5, 5, 90, 3], "object": 0}]}],
        },
    ],
)
def test_odd_shapes_of_json_are_understood(make_frame, layer):
    (found,) = frame_instances(make_frame(annotation=layer))
    assert found.noun == "chair" and found.mask.sum() == pytest.approx(85 * 85 / 2, rel=0.05)


def test_a_polygon_that_crosses_itself_covers_both_parts(make_frame):
    shape = {"x": [10, 90, 90, 10], "y": [10, 90, 10, 90], "object": 0}
    (found,) = frame_instances(make_frame(annotation=polygons(["chair"], [shape])))
    assert found.mask.sum() == pytest.approx(2 * 80 * 40 / 2, rel=0.06)
    assert found.mask[50, 20] and found.mask[50, 80] and not found.mask[20, 50] and not found.mask[80, 50]


@pytest.mark.parametrize(
    "points", [([5], [5]), ([5, 90], [5, 90]), ([5, 5, 5, 5], [9, 9, 9, 9]), (7, 8), ([], []), (None, "a")]
)
def test_fewer_than_three_points_are_no_outline(make_frame, points):
    shapes = [{"x": points[0], "y": points[1], "object": 0}]
    drops = Counter()
    assert frame_objects(make_frame(annotation=polygons(["chair"], shapes)), drops) == ([], frozenset({"chair"}))
    assert drops == {"outline without area in the image": 1}


def test_no_junk_value_breaks_the_reader(make_frame):
    """Every value of both layers is replaced in turn by every kind of junk: the outcome is instances or a UserError."""
    shapes = [rectangle(10, 30, 50, 80, 0), rectangle(90, 30, 140, 90, 1)]
    layers = {
        "annotation": polygons(["chair", "table"], shapes),
        "annotation2D3D": boxes([box3d("chair", (0, 0.5, 2), (0.5, 1, 0.5)), None], [rectangle(9, 29, 51, 81, 0)]),
    }
    frame = make_frame(**layers)
    tried = 0
    for layer, original in layers.items():
        for path in list(_paths(original)):
            for junk in (None, [], {}, "", -1, 1e300, float("nan"), True, [None], {"0": None}, "chair"):
                broken = json.loads(json.dumps(original))
                _replace(broken, path, junk)
                (frame.root / frame.path / layer / "index.json").write_text(json.dumps(broken))
                try:
                    found = frame_instances(frame)
                except UserError:
                    continue
                assert all(thing.mask.any() and thing.mask.shape == (HEIGHT, WIDTH) for thing in found)
                tried += 1
        make_frame(**{layer: original})
    assert tried > 300


def _paths(value, path=()):
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _paths(item, (*path, key))


def _replace(value, path, junk):
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = junk


def test_real_frame(samples):
    frame = read_frame(samples, "SUNRGBD/kv1/b3dodata/img_0063")
    drops = Counter()
    instances, unsure = frame_objects(frame, drops)
    assert [thing.noun for thing in instances] == ["shelf", "shelf", "chair", "box"]
    # "books" are groups, the box of 2D is the projector of 3D, and a "switch" has no outline.
    assert unsure == {"book", "box", "projector", "light switch"}
    assert [thing.noun for thing in instances if thing.contested] == ["box"]
    assert drops["wall, floor or ceiling"] == 2 and drops["group of objects"] == 3
    for thing in instances:
        assert 1.4 < thing.depth_m < 2.4
        if thing.size_m is not None:
            u, v, w = frame.intrinsics @ (frame.tilt.T @ thing.center_m)
            x0, y0, x1, y1 = mask_box(thing.mask)
            assert x0 < u / w < x1 and y0 < v / w < y1
            assert abs((frame.tilt.T @ thing.center_m)[2] - thing.depth_m) < 0.4
    left, right = sorted(instances[:2], key=lambda thing: thing.center_m[0])
    assert mask_box(left.mask)[2] < mask_box(right.mask)[0]


def test_frame_without_annotation(samples):
    drops = Counter()
    frame = read_frame(samples, "SUNRGBD/kv2/align_kv2/2014-12-18_11-31-54_260595134347")
    assert frame_objects(frame, drops) == ([], frozenset()) and drops == {"frame without polygons": 1}
