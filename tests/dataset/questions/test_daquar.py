"""DAQUAR: its files, its frames, no leak from training, and the evaluation script on a small one of it."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.io import savemat

from dataset.questions.answers import exact_match, normalise_answer
from dataset.questions.daquar import match_frames, read_daquar
from dataset.sunrgbd.frames import official_split
from evaluation import inputs
from evaluation.comparison import comparison_table, load_results
from evaluation.onevisionv3.sunrgbd import evaluate_onevision
from utils import ROOT, UserError

TRAIN = [
    ("what is on the desk in the image3 ?", "book, scissor, tape_dispenser"),
    ("what is in front of the desk in the image3 ?", "chair"),
    ("how many chairs are there in the image3 ?", "2"),
    ("what color is the chair in the image3 ?", "red"),
]
TEST = [
    ("what is on the left side of the bed in the image1 ?", "night_stand"),
    ("what is on the desk in the image1 ?", "lamp, book"),
    ("how many pictures are in the image2 ?", "3"),
    ("what is the colour of the wall in the image2 ?", "white, blue"),
    ("what is under the table in the image1449 ?", "carpet"),
]


def write_files(root, train=TRAIN, test=TEST) -> None:
    (root / "DAQUAR").mkdir(exist_ok=True)
    for split, pairs in (("train", train), ("test", test)):
        text = "".join(f"{question}\n{answer}\n" for question, answer in pairs)
        (root / "DAQUAR" / f"qa.894.raw.{split}.txt").write_text(text, encoding="utf-8")


def write_split(root, train: list[int], test: list[int]) -> None:
    def cells(numbers):
        paths = [f"/n/fs/sun3d/data/SUNRGBD/kv1//NYUdata/NYU{number:04d}/" for number in numbers]
        return np.array(paths, dtype=object)[None]

    path = root / "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat"
    path.parent.mkdir(parents=True, exist_ok=True)
    splits = {"train": cells(train), "val": np.array([], dtype=object)[None]}
    savemat(path, {"alltrain": cells(train), "alltest": cells(test), "trainvalsplit": splits})


@pytest.fixture
def tree(world, tmp_path):
    """A data root with three of NYUv2's frames, of which the first two are for testing; frame 1449 is not there."""
    source = next((world / "SUNRGBD/kv1/NYUdata").iterdir())
    for number in (1, 2, 3):
        shutil.copytree(source, tmp_path / f"SUNRGBD/kv1/NYUdata/NYU{number:04d}")
    write_files(tmp_path)
    write_split(tmp_path, [3], [1, 2, 1449])
    return tmp_path


def ask(tmp_path, *texts: str):
    write_files(tmp_path, test=[(text, "chair") for text in texts])
    return read_daquar(tmp_path, "test")


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("what is on the desk in the image3 ?", "What is on the desk?"),
        ("what is the largest brown objects in this image3 ?", "What is the largest brown objects?"),
        ("how many chairs are there in image12 ?", "How many chairs are there?"),
        ("how many lights are on in the image22 ?", "How many lights are on?"),
        ("what is the table made of in the image97?", "What is the table made of?"),
        ("how many chairs are in the image1 ?", "How many chairs are in the image?"),
        ("how many cupboards are in image12 ?", "How many cupboards are in the image?"),
        ("what object is in the image403 ?", "What object is in the image?"),
        ("what is on the left side of the image104 ?", "What is on the left side of the image?"),
        ("what is near the bed of the image10 in the image10 ?", "What is near the bed of the image?"),
        ("how many doors on the image9 ?", "How many doors on the image?"),
        ("what is on the curtain in the image8 ?", "What is on the curtain?"),
    ],
)
def test_questions_lose_the_number_of_their_image(tmp_path, raw, clean):
    (asked,) = ask(tmp_path, raw)
    assert asked.question == clean


@pytest.mark.parametrize(
    ("raw", "kind", "depth"),
    [
        ("how many chairs are there in the image3 ?", "Count", True),
        ("how many colors does the curtain have in the image3 ?", "Count", False),
        ("what color is the chair in the image3 ?", "Color Identification", False),
        ("what are the colours of the red cups in the image3 ?", "Color Identification", False),
        ("what is the sink colour in the image3 ?", "Color Identification", False),
        ("what is the green colour object on the bed in the image3 ?", "Object Identification", False),
        ("which item is red in colour in the image3 ?", "Object Identification", False),
        ("what is behind the red chair in the image3 ?", "Object Identification", True),
        ("where is the lamp in the image3 ?", "Object Identification", True),
    ],
)
def test_types(tmp_path, raw, kind, depth):
    (asked,) = ask(tmp_path, raw)
    assert (asked.type, asked.depth_answerable) == (kind, depth)


def test_rows_have_the_frame_of_their_number(tree):
    asked = read_daquar(tree, "test")
    rows, n_missing = match_frames(tree, asked)
    assert n_missing == 1 and [row.id for row in rows] == [f"daquar_test_{i}" for i in (1, 2, 3, 4)]
    for row, question in zip(rows, asked, strict=False):
        assert row.image_path.startswith(f"SUNRGBD/kv1/NYUdata/NYU{question.image:04d}/image/")
        assert row.depth_path.startswith(f"SUNRGBD/kv1/NYUdata/NYU{question.image:04d}/depth/")
        assert (tree / row.image_path).is_file() and (tree / row.depth_path).is_file() and row.sensor == "kv1"
    assert [row.answer for row in rows] == [answer for _, answer in TEST[:4]]


def test_a_leak_is_an_error(tree):
    write_split(tree, [2, 3], [1, 1449])
    with pytest.raises(UserError, match="NYU0002.*train.*1 such frames"):
        match_frames(tree, read_daquar(tree, "test"))


def test_a_damaged_frame_is_an_error(tree):
    (tree / "SUNRGBD/kv1/NYUdata/NYU0002/intrinsics.txt").write_text("1 2 3")
    with pytest.raises(UserError, match="NYU0002/intrinsics.txt"):
        match_frames(tree, read_daquar(tree, "test"))


def test_no_frame_is_an_error(tree):
    shutil.rmtree(tree / "SUNRGBD/kv1/NYUdata")
    with pytest.raises(UserError, match="all 3 NYUv2 frames.*SUNRGBD.zip"):
        match_frames(tree, read_daquar(tree, "test"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("what is it in the image1 ?\nbed\nwhat is on the bed ?\npillow\n", 'txt:3: a question must end with .*imageN'),
        ("what is it in the image1 ?\nbed\nchair\nwhat is on the bed in the image1 ?\n", "txt:3: a question must end"),
        ("what is it in the image0 ?\nbed\n", "txt:1: there is no image0"),
        ("what is it in the image1450 ?\nbed\n", "txt:1: there is no image1450"),
        ("what is it in the image1 ?\nbed\nwhat is that in the image1 ?\n", "txt:3: a question without an answer"),
        ("what is it in the image1 ?\n\nwhat is that in the image1 ?\nbed\n", "txt:1: .*answer.*empty"),
        ("what is it in the image1 ?\nbed, , sofa\n", "txt:1: .*answer.*empty part"),
        ("what is <image> in the image1 ?\nbed\n", "txt:1: contains <image>"),
        ("what is it in the image1 ?\n<|im_end|>\n", "txt:1: contains <|im_end|>".replace("|", r"\|")),
        ("\n\n", "holds no questions"),
    ],
)  # fmt: skip
def test_malformed_lines_are_named(tmp_path, text, complaint):
    write_files(tmp_path)
    (tmp_path / "DAQUAR/qa.894.raw.test.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=complaint):
        read_daquar(tmp_path, "test")


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(
        UserError, match="DAQUAR/qa.894.raw.train.txt: missing.*MPI Informatics.*NIPS 2014|NIPS 2014.*MPI"
    ):
        read_daquar(tmp_path, "train")
    write_files(tmp_path)
    (tmp_path / "DAQUAR/qa.894.raw.train.txt").write_bytes(b"\xff\xfe\x00what")
    with pytest.raises(UserError, match="qa.894.raw.train.txt: cannot be read"):
        read_daquar(tmp_path, "train")


def test_answers_are_compared_as_sets():
    assert exact_match("book, Lamp", "lamp, book") and exact_match("lamp,book,lamp", "lamp, book")
    assert exact_match("night stand", "night_stand") and exact_match("three", "3")
    assert not exact_match("lamp", "lamp, book") and not exact_match("lamp, book, bed", "lamp, book")
    assert not exact_match("lamp book", "lamp, book") and not exact_match(", ,", "lamp")
    assert exact_match("1,000", "1000") and not exact_match("1, 000", "1000")


def run(tree, tiny_folder, output, *more: str):
    """The command line as a user calls it, on a machine without nltk."""
    stub = tree / "stub" / "nltk.py"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text("raise ImportError(\"No module named 'nltk'\")")
    script = ROOT / "evaluation/onevisionv3/sunrgbd/evaluate_onevision.py"
    argv = [
        "--model_id",
        str(tiny_folder),
        "--image_tokens",
        "one_tile",
        "--max_new_tokens",
        "4",
        "--output",
        str(output),
    ]
    return subprocess.run(
        [sys.executable, str(script), "--dataset", "daquar", *argv, *more],
        env=os.environ | {"ROOT_DATA_DIR": str(tree), "PYTHONPATH": str(stub.parent)},
        cwd=tree,
        capture_output=True,
        text=True,
    )


def test_command_line(tree, tiny_folder, tmp_path):
    output = tmp_path / "results"
    done = run(tree, tiny_folder, output, "--pixel_data_type", "depth")
    assert done.returncode == 0, done.stderr
    assert "1 are not in" in done.stderr and "1 of 5 questions are left out" in done.stderr
    assert "not computed" in done.stderr and "nltk.downloader wordnet" in done.stderr
    assert "on daquar test" in done.stdout and "Overall" in done.stdout
    with open(output / "predictions.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["Questions"], row["Answers"]) for row in rows] == [
        ("What is on the left side of the bed?", "night_stand"), ("What is on the desk?", "lamp, book"),
        ("How many pictures are in the image?", "3"), ("What is the colour of the wall?", "white, blue"),
    ]  # fmt: skip
    assert [row["depth_answerable"] for row in rows] == ["1", "1", "1", "0"]
    assert all(int(row["Correct"]) == exact_match(row["Model_Answer"], row["Answers"]) for row in rows)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["system"]["split"] == "daquar test" and metrics["system"]["modality"] == "depth"
    assert list(metrics["per_type"]) == ["Object Identification", "Color Identification", "Count"]
    assert metrics["overall"]["n_questions"] == 4 and metrics["overall"]["n_images"] == 2
    assert metrics["wups"] is None and set(metrics["notes"]) == {"frames", "wups"}
    # Fitted on DAQUAR's own training questions: the only count there is 2, and none of its answers is right here.
    assert set(metrics["blind"]) == {"majority_per_type", "question_text", "text_classifier"}
    counts = metrics["blind"]["majority_per_type"]["per_type"]["Count"]["answers"]
    assert counts["most_common"] == "2" and counts["most_common_share"] == 1
    table = comparison_table([load_results(output)])
    assert table[0].accuracies["Overall"] == metrics["overall"]["exact_match"]


def test_a_leak_stops_the_script_before_anything_is_answered(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("ROOT_DATA_DIR", str(tree))
    write_split(tree, [1, 2, 3], [1449])
    args = ["--dataset", "daquar", "--model_id", "not/loaded", "--output", str(tmp_path / "results")]
    with pytest.raises(UserError, match="NYU0001"):
        evaluate_onevision.main(evaluate_onevision.parse_args(args))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("more", "complaint"), [(["--gts_type", "val"], "--gts_type val: DAQUAR"), (["--miniature"], "--miniature: DAQUAR")]
)
def test_flags_that_do_not_go_with_it(capsys, more, complaint):
    with pytest.raises(SystemExit) as stopped:
        evaluate_onevision.parse_args(["--dataset", "daquar", *more])
    assert stopped.value.code == 2 and complaint in capsys.readouterr().err


def test_a_miniature_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "read_checkpoint", lambda path: {"hyper_parameters": {"miniature": True}})
    (tmp_path / "a.ckpt").touch()
    with pytest.raises(UserError, match="--dataset daquar: .*a.ckpt was trained on the built-in world"):
        evaluate_onevision.main(
            evaluate_onevision.parse_args(["--dataset", "daquar", "--ckpt_path", str(tmp_path / "a.ckpt")])
        )


@pytest.fixture(scope="module")
def real(samples, tmp_path_factory):
    """The real questions of both splits."""
    root = tmp_path_factory.mktemp("daquar")
    (root / "DAQUAR").symlink_to(samples / "daquar")
    return {split: read_daquar(root, split) for split in ("train", "test")}


@pytest.mark.parametrize(
    ("split", "n", "n_images", "several"), [("train", 6795, 794, 0.095), ("test", 5673, 653, 0.105)]
)
def test_real_questions(real, split, n, n_images, several):
    asked = real[split]
    assert len(asked) == len({question.id for question in asked}) == n
    assert len({question.image for question in asked}) == n_images
    assert sum(", " in question.answer for question in asked) / n == pytest.approx(several, abs=0.0005)
    assert not [question for question in asked if re.search(r"image\s?\d", question.question)]
    by_type = {kind: [q for q in asked if q.type == kind] for kind in {q.type for q in asked}}
    colors = {"black", "blue", "brown", "gray", "green", "orange", "pink", "purple", "red", "white", "yellow"}
    named = [set(question.answer.split(", ")) <= colors for question in by_type["Color Identification"]]
    counted = [question.answer.isdigit() for question in by_type["Count"]]
    assert len(named) > 500 and np.mean(named) > 0.99 and len(counted) > 700 and np.mean(counted) > 0.99


def test_normalising_keeps_real_answers_apart(real):
    things = {thing for asked in real.values() for question in asked for thing in question.answer.split(", ")}
    assert len(things) == len({normalise_answer(thing) for thing in things}) == 582


def test_no_test_image_is_in_the_training_half(real, samples):
    """On the real split file: DAQUAR trains on its first half of the frames, and tests on its second."""
    paths = {split: {question.frame_path for question in asked} for split, asked in real.items()}
    frames = [SimpleNamespace(path=path) for path in paths["train"] | paths["test"]]
    official = official_split(samples, frames)
    assert not paths["train"] & paths["test"] and len(official) == 794 + 653
    assert {official[path] for path in paths["test"]} == {"test"}
    assert {official[path] for path in paths["train"]} == {"train", "val"}
