"""The preparation command: from a tree of frames to question files."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from dataset import prepare_sunrgbd
from dataset.miniature.world import write_world
from dataset.prepare_sunrgbd import check_tree, main, parse_args
from dataset.questions import csv_data
from dataset.questions.csv_data import SPLITS, build_csv_data, read_frame_questions
from dataset.questions.rows import CAPTION_TYPE, captions_file, questions_file, read_questions, write_questions
from dataset.sunrgbd.frames import find_frames, frame_group, official_split, read_frame
from utils import ROOT, UserError

SCRIPT = ROOT / "dataset" / "prepare_sunrgbd.py"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_world(root, train=24, val=8, test=8, seed=0, workers=1)
    return root


@pytest.fixture
def tree(world, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(world, tmp_path / "tree")
    return tmp_path / "tree"


def files(root):
    return {path.name: path.read_bytes() for path in sorted((root / "SUNRGBD" / "csv_data").iterdir())}


def test_files_follow_the_split_and_the_summary_counts_them(tree):
    summary = build_csv_data(tree, seed=0, workers=1, train_per_frame=2, eval_per_frame=5)
    split = official_split(tree, find_frames(tree)[0])
    images = {}
    for name in SPLITS:
        rows = read_questions(tree / "SUNRGBD" / "csv_data" / f"{name}_dataset.csv", root=tree)
        images[name] = {row.image_path for row in rows}
        assert {split[path.rsplit("/", 2)[0]] for path in images[name]} == {name}
        assert max(Counter(row.image_path for row in rows).values()) <= (2 if name == "train" else 5)
        counts = summary["questions"][name]
        assert counts["all"] == len(rows) and counts["images"] == len(images[name])
        assert counts["types"] == Counter(row.type for row in rows)
        assert counts["sensors"] == Counter(row.sensor for row in rows)
    assert not images["train"] & images["val"] and not images["train"] & images["test"]
    assert summary["frames"] == {"train": 24, "val": 8, "test": 8} and not summary["unusable_frames"]
    assert summary["noun_table"]["known_share_of_outlines"] == summary["noun_table"]["known_share_of_area"] == 1
    assert set(summary["noun_table"]["outlines"]) == {"known", "structure"}
    assert set(summary["recordings_in_two_splits"].values()) == {0}
    assert summary == json.loads((tree / "SUNRGBD" / "csv_data" / "questions.json").read_text())


def test_the_summary_says_what_the_noun_table_knows(tree, capsys):
    """Two names of a frame are not in the table; the shares leave out walls and floors."""
    frames, _ = find_frames(tree)
    path = tree / frames[0].path / "annotation2Dfinal" / "index.json"
    layer = json.loads(path.read_text())
    layer["objects"][0]["name"], layer["objects"][1]["name"] = "gizmo", "Gizmo2"
    path.write_text(json.dumps(layer))
    main(parse_args(["--root", str(tree), "--workers", "1"]))
    found = json.loads((tree / "SUNRGBD" / "csv_data" / "questions.json").read_text())["noun_table"]
    n = sum(polygon["object"] in (0, 1) for polygon in layer["frames"][0]["polygon"])
    assert found["outlines"]["unknown"] == n == found["most_frequent_unknown_names"]["gizmo"]
    known = found["outlines"]["known"]
    assert found["known_share_of_outlines"] == round(known / (known + n), 4)
    area = found["area_in_pictures"]
    assert found["known_share_of_area"] == pytest.approx(area["known"] / (area["known"] + area["unknown"]), abs=1e-3)
    printed = capsys.readouterr().out
    assert f"nouns: {found['known_share_of_outlines']:.1%} of the outlined objects" in printed
    assert f"most frequent other names: gizmo {n}" in printed


def test_recordings_in_two_splits_are_counted():
    paths = ["xtion/sun3ddata/home/a/1", "xtion/sun3ddata/home/a/2", "xtion/sun3ddata/home/b/3", "kv1/NYUdata/NYU0001"]
    frames = [SimpleNamespace(path=path, group=frame_group(f"SUNRGBD/{path}")) for path in paths]
    split = dict(zip(paths, ("train", "test", "val", "test"), strict=True))
    assert csv_data._shared_recordings(frames, split) == {"train val": 0, "train test": 1, "val test": 0}


def test_the_seed_decides_and_the_number_of_workers_does_not(tree):
    build_csv_data(tree, seed=3, workers=1)
    first = files(tree)
    build_csv_data(tree, seed=3, workers=2)
    assert files(tree) == first
    build_csv_data(tree, seed=4, workers=1)
    assert files(tree)["train_dataset.csv"] != first["train_dataset.csv"]
    splits = {f"{name}_{kind}.csv" for name in SPLITS for kind in ("dataset", "captions")}
    assert set(first) == splits | {"train_unanswered.csv", "questions.json", "manifest.json"}


def test_unlabelled_questions_are_further_ones_about_training_images(tree):
    summary = build_csv_data(tree, seed=3, workers=1, unanswered_per_frame=5)
    folder = tree / "SUNRGBD" / "csv_data"
    gold = read_questions(folder / "train_dataset.csv", root=tree)
    further = read_questions(folder / "train_unanswered.csv", root=tree, labelled=False)
    assert further and not any(row.answer for row in further)
    assert not {row.id for row in further} & {row.id for row in gold}
    assert {row.image_path for row in further} <= {frame.image_path for frame in find_frames(tree)[0]}
    held_out = {row.image_path for name in ("val", "test") for row in read_questions(folder / f"{name}_dataset.csv")}
    assert not {row.image_path for row in further} & held_out
    assert max(Counter(row.image_path for row in further).values()) == 5
    assert summary["questions"]["train_unanswered"]["all"] == len(further)
    with pytest.raises(UserError, match="train_unanswered.csv:2: Answers is empty"):
        read_questions(folder / "train_unanswered.csv")
    with pytest.raises(UserError, match="train_dataset.csv:2: Answers must be empty"):
        read_questions(folder / "train_dataset.csv", labelled=False)


def test_a_frame_does_not_depend_on_the_others(tree):
    """The same questions are asked about a frame when most of the tree is gone."""
    frames, _ = find_frames(tree)
    vocabulary = ["bed", "chair", "table"]
    before = read_frame_questions(frames[5], seed=1, vocabulary=vocabulary)
    for frame in frames[6:]:
        shutil.rmtree(tree / frame.path)
    again = read_frame_questions(read_frame(tree, frames[5].path), seed=1, vocabulary=vocabulary)
    assert before.questions and before == again
    assert before.questions != read_frame_questions(frames[5], seed=2, vocabulary=vocabulary).questions


def test_unusable_frames_are_reported_with_their_reason(tree, capsys):
    frames, _ = find_frames(tree)
    depth, image, annotation, intrinsics = frames[:4]
    (tree / depth.depth_path).write_bytes(b"not a picture")
    (tree / image.image_path).write_bytes((tree / image.image_path).read_bytes()[:200])
    for layer in (tree / annotation.path).glob("annotation*"):
        (layer / "index.json").write_text("}{")
    (tree / intrinsics.path / "intrinsics.txt").write_text("1 2 3")
    summary = build_csv_data(tree, workers=1)
    broken = {frame.path for frame in frames[:4]}
    assert set(summary["unusable_frames"]) == broken and sum(summary["frames"].values()) == 36
    with pytest.raises(UserError, match="4 frames"):
        check_tree(tree, workers=1)
    printed = capsys.readouterr().out
    for frame, reason in zip(
        frames[:4], ("depth image", "image cannot be read", "beyond repair", "3x3 numbers"), strict=True
    ):
        assert any(line.startswith(frame.path) and reason in line for line in printed.splitlines())


def test_pictures_must_be_registered(tree, capsys):
    """Also where nothing is annotated, and a camera has to be one."""
    frame, bare, camera = find_frames(tree)[0][:3]
    for path in (frame.path, bare.path):
        image = tree / read_frame(tree, path).image_path
        with Image.open(image) as picture:
            picture.resize((50, 40)).save(image)
    for layer in (tree / bare.path).glob("annotation*"):
        shutil.rmtree(layer)
    (tree / camera.path / "intrinsics.txt").write_text("nan 0 1 0 1 1 0 0 1")
    with pytest.raises(UserError, match="3 frames cannot be used"):
        main(parse_args(["--root", str(tree), "--check", "--workers", "1"]))
    listed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if line.startswith("SUNRGBD/"))
    assert listed.keys() == {frame.path, bare.path, camera.path}
    assert all(frame.depth_path in listed[frame.path] and "50x40" in listed[path] for path in (frame.path, bare.path))
    assert "intrinsics.txt" in listed[camera.path] and "nan" in listed[camera.path]
    assert build_csv_data(tree, workers=1)["unusable_frames"] == listed


def test_check_of_a_sound_tree_writes_nothing(tree, capsys):
    main(parse_args(["--root", str(tree), "--check", "--workers", "1"]))
    printed = capsys.readouterr().out
    assert "40 frames" in printed and "not there" not in printed and not (tree / "SUNRGBD" / "csv_data").exists()


def test_a_tree_that_was_unpacked_in_part(tree, capsys):
    """What is lost is said by collection; what is there stays usable."""
    gone = [frame.path for frame in find_frames(tree)[0]][:3]
    for path in gone:
        shutil.rmtree(tree / path)
    lost = Counter("/".join(path.split("/")[1:3]) for path in gone)
    assert build_csv_data(tree, workers=1)["missing_frames"] == lost
    check_tree(tree, workers=1)
    assert "3 frames of the official split are not there" in capsys.readouterr().out


def test_frames_outside_the_split_and_a_missing_split(tree):
    frames, _ = find_frames(tree)
    shutil.copytree(tree / frames[0].path, tree / "SUNRGBD" / "kv1" / "elsewhere" / "frame")
    assert build_csv_data(tree, workers=1)["frames_outside_the_official_split"] == 1
    shutil.rmtree(tree / "SUNRGBDtoolbox")
    with pytest.raises(UserError, match="allsplit.mat"):
        build_csv_data(tree, workers=1)


def test_nothing_to_ask_is_an_error(tree):
    for frame in find_frames(tree)[0]:
        for layer in (tree / frame.path).glob("annotation*"):
            shutil.rmtree(layer)
    with pytest.raises(UserError, match="no question"):
        build_csv_data(tree, workers=1)
    assert not (tree / "SUNRGBD" / "csv_data").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--workers", "0"],
        ["--preview", "0"],
        ["--train_per_frame", "0"],
        ["--eval_per_frame", "0"],
        ["--unanswered_per_frame", "-1"],
        ["--seed", "-1"],
        ["--miniature", "--root", "x"],
        ["--miniature", "--sunrgbd_zip", "x.zip"],
        ["--miniature", "--toolbox_zip", "x.zip"],
        ["--chek"],
        ["--official_val", "--preview", "2"],
        ["--official_val", "--blind_check"],
    ],
)
def test_wrong_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as error:
        parse_args(flags)
    assert error.value.code == 2 and flags[0] in capsys.readouterr().err.splitlines()[-1]


def zipped(tree, folder):
    """The two archives of a tree, with its top folders as in the official ones."""
    return [shutil.make_archive(folder / top, "zip", tree, top) for top in ("SUNRGBD", "SUNRGBDtoolbox")]


def test_from_the_archives_to_the_questions(tree, tmp_path):
    """One command with ROOT_DATA_DIR still empty gives the files that the unpacked tree gives."""
    frames, toolbox = zipped(tree, tmp_path)
    root = tmp_path / "data"
    root.mkdir()
    flags = ["--sunrgbd_zip", frames, "--toolbox_zip", toolbox, "--workers", "1"]
    environment = os.environ | {"ROOT_DATA_DIR": str(root)}
    run = [sys.executable, SCRIPT, *flags]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "unpacking SUNRGBD.zip" in done.stderr and "train:" in done.stdout, done.stderr
    build_csv_data(tree, workers=1)
    assert files(root) == files(tree)
    assert sorted(path.name for path in root.iterdir()) == ["SUNRGBD", "SUNRGBDtoolbox"]
    again = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    (message,) = again.stderr.splitlines()
    assert again.returncode == 2 and "SUNRGBD is there already: leave out the flag for SUNRGBD.zip" in message


def test_archives_are_checked_too(tree, tmp_path, capsys):
    frames, _ = find_frames(tree)
    (tree / frames[0].depth_path).write_bytes(b"not a picture")
    images, toolbox = zipped(tree, tmp_path)
    root = tmp_path / "data"
    root.mkdir()
    shutil.copytree(tree / "SUNRGBD", root / "SUNRGBD")
    with pytest.raises(UserError, match="1 frames cannot be used"):  # the toolbox alone, beside an unpacked data set
        main(parse_args(["--root", str(root), "--toolbox_zip", toolbox, "--check", "--workers", "1"]))
    assert f"{frames[0].path}: " in capsys.readouterr().out
    assert (root / "SUNRGBDtoolbox").is_dir() and not (root / "SUNRGBD" / "csv_data").exists()


def test_a_root_without_the_data_set_needs_the_archive(tmp_path, monkeypatch, tree):
    _, toolbox = zipped(tree, tmp_path)
    monkeypatch.setenv("ROOT_DATA_DIR", str(tmp_path / "empty"))
    (tmp_path / "empty").mkdir()
    for flags in ([], ["--toolbox_zip", toolbox]):
        with pytest.raises(UserError, match="has no folder SUNRGBD"):
            main(parse_args(flags))
    assert not any((tmp_path / "empty").iterdir())


def test_the_miniature_keeps_its_own_validation_frames(tree):
    """With and without --official_val: its allsplit.mat is not SUN RGB-D's."""
    flags = ["--root", str(tree), "--workers", "1"]
    main(parse_args(flags))
    before = files(tree)
    main(parse_args([*flags, "--official_val"]))
    after = files(tree)
    changed = {name for name in before if after[name] != before[name]}
    assert after.keys() == before.keys() and changed == {"manifest.json"}  # which says that the flag was given
    split = json.loads(before["questions.json"])["split"]
    assert split["listed_frames"] == {"test": 8, "train": 24, "val": 8} and "toolbox" in split["rule"]


def test_command_from_another_folder(tree, tmp_path):
    flags = ["--root", str(tree), "--workers", "1", "--train_per_frame", "1", "--eval_per_frame", "3"]
    done = subprocess.run([sys.executable, SCRIPT, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train:" in done.stdout and "test:" in done.stdout
    rows = read_questions(tree / "SUNRGBD" / "csv_data" / "train_dataset.csv", root=tree)
    assert set(Counter(row.image_path for row in rows).values()) == {1}
    empty = tmp_path / "empty"
    (empty / "SUNRGBD").mkdir(parents=True)
    failed = subprocess.run([sys.executable, SCRIPT, "--root", empty, "--check"], capture_output=True, text=True)
    assert failed.returncode == 2 and "no SUN RGB-D frame" in failed.stderr and "Traceback" not in failed.stderr


def test_real_tree(samples, tmp_path):
    for name in ("SUNRGBD", "SUNRGBDtoolbox"):
        shutil.copytree(samples / name, tmp_path / name, copy_function=shutil.copyfile)
    report = read_frame_questions(
        read_frame(tmp_path, "SUNRGBD/kv1/b3dodata/img_0063"), seed=0, vocabulary=("bed", "shelf")
    )
    found = {question.text: question.answer for question in report.questions}
    assert found["How many shelves are there?"] == "two" and found["Is there a bed?"] == "no"
    assert found["What is closest to the chair?"] == "shelf"
    assert not any(
        "book" in text or "the shelf" in text or "box" in text for text in found
    )  # groups, not unique, contested
    assert sum(report.drops.values()) == 10
    assert report.coverage.outlines == {"known": 7, "structure": 2} and not report.coverage.unknown_names


def test_every_frame_is_described_apart_from_the_questions(tree):
    build_csv_data(tree, workers=1)
    for name in ("train", "val", "test"):
        captions = read_questions(captions_file(tree, name), root=tree)
        questions = read_questions(questions_file(tree, name), root=tree)
        assert {row.type for row in captions} == {CAPTION_TYPE} and CAPTION_TYPE not in {row.type for row in questions}
        assert {row.image_path for row in questions} <= {row.image_path for row in captions}
        assert len({row.image_path for row in captions}) == len(captions)


def test_preview_and_blind_check_of_files_that_are_there(tree, capsys, monkeypatch):
    build_csv_data(tree, workers=1)
    before = {path: path.read_bytes() for path in (tree / "SUNRGBD/csv_data").iterdir()}
    main(parse_args(["--root", str(tree), "--preview", "2"]))
    page = tree / "SUNRGBD/csv_data/preview.html"
    assert page.read_text(encoding="utf-8").count("<img") == 2
    val = questions_file(tree, "val")
    val.write_bytes(before[val].splitlines(keepends=True)[0])  # few frames may leave a split without questions
    main(parse_args(["--root", str(tree), "--preview", "100"]))
    shown = {row.image_path for name in ("train", "test") for row in read_questions(questions_file(tree, name))}
    assert page.read_text(encoding="utf-8").count("<img") == len(shown)
    val.write_bytes(before[val])
    with pytest.raises(
        UserError, match=r"too few questions to judge; the largest type has \d+ in val, .*200 are needed"
    ):
        main(parse_args(["--root", str(tree), "--blind_check"]))
    printed = capsys.readouterr().out
    assert "no judged type can be answered" not in printed and "not judged, too few questions: Co" in printed
    assert {path: path.read_bytes() for path in before} == before
    monkeypatch.setattr(prepare_sunrgbd, "BLIND_CHECK_LEAST", 1)
    for name in ("train", "val", "test"):  # the wording tells the answer
        rows = [
            replace(r, answer="no" if "shelf" in r.question else "yes", type="Yes/No") for r in leaky_rows(tree, name)
        ]
        write_questions(questions_file(tree, name), rows)
    with pytest.raises(UserError, match="without the image"):
        main(parse_args(["--root", str(tree), "--blind_check"]))
    assert "Yes/No" in capsys.readouterr().out


def leaky_rows(tree, name):
    rows = read_questions(questions_file(tree, name))
    return [
        replace(row, id=f"{row.id}{i}", question=f"Is there a {'shelf' if i % 2 else 'bed'}?")
        for i, row in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def annotated(samples, tmp_path_factory):
    """A data root around the NYUv2 frames, and what reading them gives: once for all settings."""
    root = tmp_path_factory.mktemp("nyuv2")
    (root / "SUNRGBD").mkdir()
    (root / "SUNRGBD" / "kv1").symlink_to(samples / "nyuv2_half" / "SUNRGBD" / "kv1")
    (root / "SUNRGBDtoolbox").symlink_to(samples / "SUNRGBDtoolbox")
    frames, _ = find_frames(root)
    split = official_split(root, frames)
    return root, list(csv_data.read_frames([frame for frame in frames if frame.path in split], seed=0))


@pytest.mark.parametrize("per_frame", [(), ("--train_per_frame", "10", "--eval_per_frame", "10")])
def test_real_annotations_pass_the_blind_check(annotated, per_frame, capsys, monkeypatch):
    root, reports = annotated
    monkeypatch.setattr(csv_data, "read_frames", lambda frames, **_: iter(reports))
    main(
        parse_args(["--root", str(root), "--official_val", *per_frame])
    )  # the tenth has too few questions here to be judged
    main(parse_args(["--root", str(root), "--blind_check"]))
    printed = capsys.readouterr().out
    assert "no judged type can be answered without the image" in printed
    judged = "judged, 200 questions or more: Count, Direction, Object Identification, Proximity, Yes/No"
    assert all(f"{name}: {judged}" in printed.replace("Color Identification, ", "") for name in ("val", "test"))
