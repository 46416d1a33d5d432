"""The miniature world's tree: read back by the same code that reads the real data set."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat

from dataset.miniature import world
from dataset.miniature.renderer import NOUNS, render_room
from dataset.questions.balance import select_questions
from dataset.questions.blind import blind_predictions
from dataset.questions.generate import frame_candidates
from dataset.questions.rows import QUESTION_TYPES, Question, csv_cells
from dataset.sunrgbd.annotations import frame_instances
from dataset.sunrgbd.depth import read_depth
from dataset.sunrgbd.frames import SENSORS, Frame, find_frames, official_split
from dataset.sunrgbd.nouns import canonical_noun
from utils import UserError

SIZES = {"train": 40, "val": 12, "test": 16}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    world.write_world(root, **SIZES, seed=3, workers=1)
    return root


@pytest.fixture(scope="module")
def frames(root) -> list[Frame]:
    frames, unusable = find_frames(root)
    assert unusable == []
    return frames


def rooms() -> dict[str, world._Room]:
    return {room.path: room for room in world._plan(SIZES, 3)}


def files(root: Path) -> dict[str, bytes]:
    found = (path for path in root.rglob("*") if path.is_file() and path.suffix != ".mat")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def test_every_frame_is_found_and_in_one_split(root, frames):
    split = official_split(root, frames)
    assert Counter(split.values()) == SIZES and len(split) == len(frames)
    assert split == {path: room.split for path, room in rooms().items()}


def test_a_recording_stays_in_one_split(root, frames):
    splits, sizes = defaultdict(set), Counter()
    split = official_split(root, frames)
    for frame in frames:
        splits[frame.group].add(split[frame.path])
        sizes[frame.group] += 1
    assert all(len(found) == 1 for found in splits.values())
    assert set(sizes.values()) == {1, 2, 3}


def test_every_split_has_every_sensor_in_like_shares():
    plan = world._plan({"train": 500, "val": 100, "test": 100}, 0)
    for split in ("train", "val", "test"):
        collections = Counter("/".join(room.path.split("/")[1:3]) for room in plan if room.split == split)
        for name, share in world.COLLECTIONS.items():
            assert collections[name] / collections.total() == pytest.approx(share, abs=0.02)
    assert {room.sensor for room in plan} == set(SENSORS)
    assert len({room.path for room in plan}) == len({room.seed for room in plan}) == 700


def test_other_seeds_share_no_room():
    seeds = [{room.seed for room in world._plan(SIZES, seed)} for seed in (0, 1)]
    assert not seeds[0] & seeds[1]


def test_camera_and_scene_are_the_renderers(frames):
    for frame in frames[::9]:
        view = render_room(rooms()[frame.path].seed)
        assert frame.intrinsics == pytest.approx(view.intrinsics, abs=1e-6)
        assert frame.tilt == pytest.approx(view.tilt, abs=1e-6)
        assert frame.scene == view.scene


def test_image_is_the_rendered_one(frames):
    for frame in frames[::9]:
        view = render_room(rooms()[frame.path].seed)
        image = np.asarray(Image.open(frame.root / frame.image_path))
        assert image.shape == view.rgb.shape
        assert np.abs(image.astype(float) - view.rgb).mean() < 8


def test_decoded_depth_is_the_rendered_one_with_noise_and_holes(frames):
    for frame in frames:
        truth = render_room(rooms()[frame.path].seed).depth_m
        depth_m = read_depth(frame.root / frame.depth_path)
        measured = depth_m > 0
        assert 0.05 < 1 - measured.mean() < 0.7
        error = np.abs(depth_m - truth)[measured]
        assert np.median(error) < 0.03 and np.quantile(error, 0.9) < 0.12
        filled = read_depth(frame.root / frame.depth_bfx_path)
        assert (filled > 0).all() and len(np.unique(filled)) <= 256
        assert np.median(np.abs(filled - truth)) < 0.06


def test_annotations_give_the_rendered_objects_back(frames):
    compared = 0
    for frame in frames:
        expected = render_room(rooms()[frame.path].seed).instances()
        found = frame_instances(frame)
        assert Counter(i.noun for i in found) == Counter(i.noun for i in expected)
        for one in expected:
            same = max(found, key=lambda other: np.count_nonzero(other.mask & one.mask))
            compared += 1
            assert same.noun == one.noun
            assert (same.mask & one.mask).sum() / (same.mask | one.mask).sum() > 0.8
            assert same.center_m == pytest.approx(one.center_m, abs=0.05)
            assert same.size_m == pytest.approx(one.size_m, abs=0.01)
    assert compared > 4 * len(frames) * 0.9


def test_an_object_in_pieces_is_one_instance(frames):
    seen = 0
    for frame in frames:
        layer = json.loads((frame.root / frame.path / "annotation2Dfinal" / "index.json").read_text())
        pieces = Counter(
            polygon["object"]
            for polygon in layer["frames"][0]["polygon"]
            if layer["objects"][polygon["object"]]["name"] not in ("wall", "floor")
        )
        if max(pieces.values()) > 1 and len(set(frame_nouns := [i.noun for i in frame_instances(frame)])) == len(
            frame_nouns
        ):
            seen += 1
            assert len(frame_nouns) == len(pieces)
    assert seen


def test_questions_cannot_be_answered_without_the_picture():
    """700 rooms; the blind baselines are fitted on one half and scored on the other, both ways."""
    candidates = [(unwritten_frame(seed), room_questions(seed)) for seed in range(700)]
    selected = [select_questions(candidates[half::2], seed=half, per_frame=8) for half in (0, 1)]
    scores = blind_scores([[csv_cells(row) for row in rows] for rows in selected])
    assert set(scores) == set(QUESTION_TYPES)
    for kind in scores.keys() - {"Color Identification"}:  # that chairs are often brown is knowledge of the world
        n, majority, text = scores[kind]
        assert text <= (0.55 if kind == "Yes/No" else majority + 0.05), kind
        assert np.sqrt(majority * (1 - majority) / n) < 0.025, kind  # the standard error: half of what is allowed
    leaky = blind_scores([[as_row(q) for _, asked in candidates[half::2] for q in asked] for half in (0, 1)])
    assert leaky["Yes/No"][2] > 0.6 and leaky["Direction"][2] > leaky["Direction"][1] + 0.1  # the selection's work


def unwritten_frame(seed: int) -> SimpleNamespace:
    path = f"SUNRGBD/kv1/NYUdata/NYU{seed:04d}"
    return SimpleNamespace(
        path=path, sensor="kv1", scene="", image_path=f"{path}/image/a", depth_path=f"{path}/depth/a"
    )


def room_questions(seed: int) -> list[Question]:
    view = render_room(seed, size=96)
    return frame_candidates(view.instances(), rgb=view.rgb, rng=np.random.default_rng(seed), vocabulary=NOUNS)


def as_row(question: Question) -> dict[str, str]:
    return {"Question_Type": question.type, "Questions": question.text, "Answers": question.answer}


def blind_scores(halves: list[list[dict]]) -> dict[str, tuple[int, float, float]]:
    """Per type: the number of questions, and what the majority answer and the better text baseline have right."""
    right = defaultdict(lambda: defaultdict(list))
    for train, test in (halves, halves[::-1]):
        for name, answers in blind_predictions(train, test).items():
            for row, answer in zip(test, answers, strict=True):
                right[row["Question_Type"]][name].append(answer == row["Answers"])
    scores = {}
    for kind, hits in right.items():
        majority, *texts = (np.mean(hits[name]) for name in ("majority_per_type", "question_text", "text_classifier"))
        scores[kind] = len(hits["question_text"]), majority, max(texts)
    return scores


def test_an_outline_covers_its_mask_and_skips_slivers():
    mask = np.zeros((40, 50), bool)
    mask[0:20, 0:10] = mask[30:40, 40:50] = mask[25, 5:8] = True
    first, second = world._outlines(mask)
    assert (min(first["x"]), max(first["x"]), min(first["y"]), max(first["y"])) == (0, 9, 0, 19)
    assert (min(second["x"]), max(second["x"]), min(second["y"]), max(second["y"])) == (40, 49, 30, 39)


def test_quirks_of_the_real_tree_are_there_and_harmless(root, frames):
    assert all(canonical_noun(name) == noun for noun in NOUNS for name in world.SYNONYMS[noun])
    stems = {(Path(f.image_path).stem == Path(f.depth_path).stem): f.path for f in frames}
    assert set(stems) == {True, False}
    assert max(len(f.path.split("/")) for f in frames) == 2 + min(len(f.path.split("/")) for f in frames)
    layers = [json.loads((f.root / f.path / "annotation3Dfinal" / "index.json").read_text()) for f in frames]
    assert any(None in layer["objects"] for layer in layers)
    names = [entry["name"] for layer in layers for entry in layer["objects"] if entry]
    assert any(":truncated" in name for name in names) and any(":occluded" in name for name in names)


def test_bytes_do_not_depend_on_the_workers(tmp_path):
    sizes = {"train": 14, "val": 3, "test": 3}
    for workers in (1, 2):
        world.write_world(tmp_path / str(workers), **sizes, seed=1, workers=workers)
    one, two = files(tmp_path / "1"), files(tmp_path / "2")
    assert one == two and len(one) == 20 * 9
    mats = [loadmat(tmp_path / w / "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat", squeeze_me=True) for w in ("1", "2")]
    assert all(np.array_equal(mats[0][key], mats[1][key]) for key in ("alltrain", "alltest"))


def test_an_interrupted_build_is_finished(root, tmp_path):
    sizes = {"train": 3, "val": 1, "test": 1}
    world.write_world(tmp_path, **sizes, seed=3, workers=1)
    complete = files(tmp_path)
    frames, _ = find_frames(tmp_path)
    lost, kept = frames[0], frames[1]
    leftover = (tmp_path / lost.path).with_name(f".{Path(lost.path).name}.part")
    (tmp_path / lost.path).rename(leftover)
    (leftover / "scene.txt").unlink()
    before = os.stat(tmp_path / kept.image_path).st_mtime_ns
    world.write_world(tmp_path, **sizes, seed=3, workers=1)
    assert files(tmp_path) == complete
    assert os.stat(tmp_path / kept.image_path).st_mtime_ns == before


def test_ensure_world_builds_once_and_replaces_what_is_stale(tmp_path):
    root, sizes = tmp_path / "world", {"train": 6, "val": 2, "test": 2}
    assert world.ensure_world(root, **sizes, workers=1) == root
    marker = os.stat(root / world.MARKER).st_mtime_ns
    assert {path.name for path in (root / "SUNRGBD" / "csv_data").glob("*_dataset.csv")} == {
        f"{split}_dataset.csv" for split in SIZES
    }
    world.ensure_world(root, **sizes, workers=1)
    assert os.stat(root / world.MARKER).st_mtime_ns == marker
    # An interrupted build: nothing is at the final place, the unfinished one is continued and not rendered again.
    part = root.with_name("world.part")
    root.rename(part)
    (part / world.MARKER).rename(part / world.UNFINISHED)
    frame = find_frames(part)[0][0]
    rendered = os.stat(part / frame.image_path).st_mtime_ns
    world.ensure_world(root, **sizes, workers=1)
    assert os.stat(root / frame.image_path).st_mtime_ns == rendered and not part.exists()
    world.ensure_world(root, **sizes, seed=1, workers=1)
    assert os.stat(root / frame.image_path).st_mtime_ns != rendered


def test_new_question_code_asks_again_about_the_same_rooms(tmp_path):
    root, sizes = tmp_path / "world", {"train": 6, "val": 2, "test": 2}
    world.ensure_world(root, **sizes, workers=1)
    settings = json.loads((root / world.MARKER).read_text())
    (root / world.MARKER).write_text(json.dumps(settings | {"questions": "older"}))
    image = root / find_frames(root)[0][0].image_path
    rendered, csv = os.stat(image).st_mtime_ns, root / "SUNRGBD" / "csv_data" / "train_dataset.csv"
    csv.unlink()
    world.ensure_world(root, **sizes, workers=1)
    assert csv.is_file() and os.stat(image).st_mtime_ns == rendered
    assert json.loads((root / world.MARKER).read_text()) == settings


def test_other_code_makes_another_world(tmp_path, monkeypatch):
    """Code that draws, reads or decodes: rooms are rendered again. Code that asks: it asks about the same rooms."""
    shutil.copytree(
        world.ROOT / "dataset", tmp_path / "dataset", ignore=shutil.ignore_patterns("world*", "*.safetensors")
    )
    monkeypatch.setattr(world, "ROOT", tmp_path)
    root, sizes = tmp_path / "world", {"train": 2, "val": 1, "test": 1}
    world.ensure_world(root, **sizes, workers=1)
    image = root / find_frames(root)[0][0].image_path
    asked = root / "SUNRGBD" / "csv_data" / "questions.json"
    for name, rendered, asked_again in (
        ("README.md", False, False),
        ("datamodule.py", False, False),
        ("questions/generate.py", False, True),
        ("sunrgbd/depth.py", True, True),
        ("sunrgbd/frames.py", True, True),
        ("miniature/split_off_from_the_renderer.py", True, True),
    ):
        before = [os.stat(path).st_mtime_ns for path in (image, asked)]
        with open(tmp_path / "dataset" / name, "a") as source:
            source.write("\n")
        world.ensure_world(root, **sizes, workers=1)
        after = [os.stat(path).st_mtime_ns for path in (image, asked)]
        assert [a != b for a, b in zip(after, before, strict=True)] == [rendered, asked_again], name


def test_command_line_says_where_it_wrote(tmp_path):
    script = Path(world.__file__)
    sizes = ["--train", "2", "--val", "1", "--test", "1", "--workers", "1"]
    command = [sys.executable, str(script), "--root", "here", *sizes]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(tmp_path / "here") in done.stdout
    assert len(find_frames(tmp_path / "here")[0]) == 4
    failed = subprocess.run([*command, "--val", "0"], cwd=tmp_path, capture_output=True, text=True)
    message = failed.stderr.strip().splitlines()[-1]
    assert failed.returncode == 2 and message.endswith("error: argument --val: 0: give at least 1")


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a miniature world"):
        world.ensure_world(tmp_path / "world", train=1, val=1, test=1, workers=1)
    assert (tmp_path / "world" / "thesis.tex").exists()
    shutil.rmtree(tmp_path / "world")


@pytest.mark.parametrize("split", SIZES)
def test_an_empty_split_is_an_error(tmp_path, split):
    with pytest.raises(UserError, match=split):
        world.write_world(tmp_path, **(SIZES | {split: 0}), seed=0, workers=1)
