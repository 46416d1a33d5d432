"""The manifest of question files, through the preparation command."""

import hashlib
import json
import shutil

import pytest

from dataset.miniature.world import write_world
from dataset.prepare_sunrgbd import main, parse_args
from dataset.questions.manifest import asked_questions, manifest_path
from dataset.questions.rows import questions_file, read_questions
from dataset.sunrgbd.frames import find_frames
from utils import UserError

SETTINGS = ["--seed", "3", "--train_per_frame", "1", "--eval_per_frame", "4"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_world(root, train=16, val=6, test=6, seed=0, workers=1)
    prepare(root, *SETTINGS)
    return root


def prepare(root, *flags):
    main(parse_args(["--root", str(root), "--workers", "1", *flags]))


@pytest.fixture
def tree(world, tmp_path):
    """A copy on another place of the disk, which a test may damage."""
    shutil.copytree(world, tmp_path / "tree")
    return tmp_path / "tree"


def snapshot(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_manifest_has_the_digest_of_every_question_file(world):
    manifest = json.loads(manifest_path(world).read_text())
    folder = manifest_path(world).parent
    assert manifest["files"].keys() == {path.name for path in folder.glob("*.csv")} and len(manifest["files"]) == 7
    for name, file in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
        assert file["questions"] == content.count(b"\n") - 1
    assert manifest["settings"] == {
        "seed": 3,
        "train_per_frame": 1,
        "eval_per_frame": 4,
        "unanswered_per_frame": 8,
        "official_val": False,
    }
    words = manifest_path(world).read_text()
    assert "SUNRGBD" not in words and "chair" not in words  # no place, no annotation


def test_the_same_tree_gives_the_same_questions_and_nothing_is_written(world, tree, capsys):
    published = str(shutil.copy(manifest_path(world), tree.parent / "published.json"))
    before = snapshot(tree)
    prepare(tree, "--verify", published)
    said = capsys.readouterr().out
    assert "gives the very questions" in said and "in 7 files" in said and "but" not in said
    assert snapshot(tree) == before


def test_files_that_were_made_with_other_settings_are_told_from_a_tree_that_differs(world, tree, capsys):
    published = str(manifest_path(world))
    prepare(tree, "--seed", "4")
    capsys.readouterr()
    prepare(tree, "--verify", published)
    said = capsys.readouterr().out
    assert "gives the very questions" in said
    assert "has no or other train_dataset.csv" in said and "make them with --seed 3 --train_per_frame 1" in said


def test_a_tree_with_one_changed_annotation_is_found(world, tree, capsys):
    test_images = {row.image_path for row in read_questions(questions_file(tree, "test"))}
    frame = next(frame for frame in find_frames(tree)[0] if frame.image_path in test_images)
    for layer in (tree / frame.path).glob("annotation*/index.json"):
        layer.write_text(layer.read_text().replace("chair", "lamp").replace("table", "vase").replace("bed", "sofa"))
    with pytest.raises(UserError, match="does not give the questions"):
        prepare(tree, "--verify", str(manifest_path(world)))
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith("test_dataset.csv: differs; the manifest has ") for line in said)


def test_a_tree_that_lacks_frames_says_so(world, tree, capsys):
    frame = find_frames(tree)[0][0]
    shutil.rmtree(tree / frame.path)
    with pytest.raises(UserError, match="does not give the questions"):
        prepare(tree, "--verify", str(manifest_path(world)))
    assert "1 frames of the official split are not there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(generator_version=99), "generator_version is 99"),
        (lambda m: m.update(format=None), "format is None"),
        (lambda m: m["settings"].pop("seed"), "settings are not"),
        (lambda m: m["settings"].update(seed="x"), "seed is 'x'"),
        (lambda m: m["settings"].update(official_val=1), "official_val is 1"),
        (lambda m: m.update(files={"test_dataset.csv": {"sha256": "no"}}), "no digests"),
        (lambda m: m.update(files=[]), "no digests"),
    ],
)
def test_what_is_no_manifest_is_refused_before_any_frame_is_read(world, tmp_path, capsys, change, message):
    manifest = json.loads(manifest_path(world).read_text())
    change(manifest)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        prepare(world, "--verify", str(path))
    assert "reading annotations" not in capsys.readouterr().err


def test_missing_and_contradicting_flags_are_refused(world, capsys):
    with pytest.raises(UserError, match="nowhere.json"):
        prepare(world, "--verify", "nowhere.json")
    with pytest.raises(SystemExit):
        parse_args(["--verify", "m.json", "--seed", "3"])
    assert "--seed: the manifest of --verify says it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_args(["--verify", "m.json", "--check"])


def test_results_name_the_manifest_of_untouched_files_only(tree):
    rows = read_questions(questions_file(tree, "test"))
    listed = json.loads(manifest_path(tree).read_text())["files"]["test_dataset.csv"]["sha256"]
    asked = asked_questions(tree, rows)
    assert asked["sha256"] == listed and len(asked["manifest"]) == 64
    fewer = asked_questions(tree, rows[1:])
    assert fewer["sha256"] != listed and fewer["manifest"] is None
    manifest_path(tree).unlink()
    assert asked_questions(tree, rows) == {"sha256": listed, "manifest": None}
