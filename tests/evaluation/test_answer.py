"""A student in the hand: one picture, any questions, the answers of the evaluation script."""

import os
import pty
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dataset.inputs.own_pictures import read_own_depth
from dataset.questions.rows import frame_path, questions_file, read_questions
from dataset.sunrgbd.frames import read_frame
from evaluation import answer
from evaluation.student import Student
from tests.helpers.evaluation import evaluate
from tests.helpers.training import train
from utils import ROOT, UserError

CAMERA = ("--intrinsics", "80,80,64,64", "--tilt", "12")


@pytest.fixture(scope="module")
def exported(world, tiny_folder, tmp_path_factory):
    """A folder with `out` (MAIN_ROOT_DATA_DIR, one run of the depth baseline, one of the RGB one) and their exports."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOT_DATA_DIR", str(world))
        patch.setenv("MAIN_ROOT_DATA_DIR", str(folder / "out"))
        for name in ("baseline_depth", "baseline_rgb05b"):
            train(name, tiny_folder, "--lr", "1e-2", "--export", str(folder / name))
    return folder


@pytest.fixture
def places(world, exported, monkeypatch):
    monkeypatch.setenv("ROOT_DATA_DIR", str(world))
    monkeypatch.setenv("MAIN_ROOT_DATA_DIR", str(exported / "out"))
    return exported


@pytest.fixture
def depth(tmp_path):
    """A depth picture in millimetres."""
    values = np.random.default_rng(0).integers(800, 5000, (128, 128)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "depth.png")
    return tmp_path / "depth.png"


def ask(capsys, *argv):
    answer.main(answer.parse_args(list(map(str, argv))))
    return capsys.readouterr()


def answers_of(student: Student, world) -> dict[str, str]:
    """To all test questions, each picture looked at once."""
    found, seen = {}, {}
    for row in read_questions(questions_file(world, "test"), root=world):
        if row.image_path not in seen:
            frame = read_frame(world, frame_path(row))
            camera = student.usual_camera(
                128,
                128,
                intrinsics=str(world / frame.path / "intrinsics.txt"),
                tilt=str(next((world / frame.path / "extrinsics").glob("*.txt"))),
            )
            seen[row.image_path] = student.look(read_own_depth(world / row.depth_path, "sunrgbd"), camera)
        found[row.id] = student.ask(seen[row.image_path], row.question, max_new_tokens=6).text
    return found


def test_checkpoint_export_and_student_give_the_same_answers(places, world, tmp_path):
    """All of them to all test questions, in float32: the evaluation of both, and the few lines of Python."""
    (best,) = (places / "out/baseline_depth/checkpoints/t").glob("best*.ckpt")
    checkpoint, _ = evaluate(tmp_path / "a", "--ckpt_path", str(best))
    export, metrics = evaluate(tmp_path / "b", "--model_id", str(places / "baseline_depth"))
    expected = {row["Question_Id"]: row["Model_Answer"] for row in checkpoint}
    assert len(set(expected.values())) > 1
    assert {row["Question_Id"]: row["Model_Answer"] for row in export} == expected
    assert metrics["system"]["modality"] == "depth" and metrics["system"]["image_tokens"] == "one_tile"
    assert answers_of(Student.load(str(places / "baseline_depth")), world) == expected
    assert answers_of(Student.load(str(best)), world) == expected


def test_questions_do_not_disturb_each_other(places, depth):
    """Neither those before nor the next best answers change what is kept of the picture."""
    student = Student.load(str(places / "baseline_depth"))
    picture = read_own_depth(depth, "mm")
    questions = ["How many chairs are there?", "Is there a bed?", "What is left of the table?"]
    alone = [student.ask(student.look(picture), question, n_others=2) for question in questions]
    seen = student.look(picture)
    together = [student.ask(seen, question, n_others=2) for question in questions + questions]
    for reply, expected in zip(together, alone + alone, strict=True):
        assert reply.text == expected.text
        assert reply.answer.probability == pytest.approx(expected.answer.probability, rel=1e-5)
    for reply in alone:
        probabilities = [other.probability for other in reply.others]
        assert probabilities == sorted(probabilities, reverse=True) and 0 < reply.answer.probability <= 1
        assert reply.text not in [other.text for other in reply.others]


def test_the_command(places, depth, capsys, tmp_path):
    model = ("--model", places / "baseline_depth", "--depth", depth, "--depth_format", "mm")
    asked = ("--question", "How many chairs are there?", "--question", "Is there a bed?")
    said = ask(capsys, *model, *asked, "--show", tmp_path / "seen.png")
    lines = said.out.splitlines()
    assert lines[0] == "How many chairs are there?" and lines[2].startswith("  next best: ")
    assert lines[3] == "Is there a bed?" and said.err.count("answered in") == 2
    assert "assumed: --intrinsics" in said.err and "--tilt" in said.err
    assert Image.open(tmp_path / "seen.png").size == (128, 128)
    stated = ask(capsys, *model, *asked, *CAMERA)
    assert "assumed" not in stated.err


def test_the_lines_of_python_in_the_guide(places, depth):
    """Run as they stand there, with the names of a real export and picture; the answer is the command's."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "evaluation/README.md").read_text(encoding="utf-8"), re.S)[1]
    code = code.replace("my_student", str(places / "baseline_depth")).replace("path/to/depth.png", str(depth))
    assert len([line for line in code.splitlines() if line]) <= 8
    python = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    command = ["--model", str(places / "baseline_depth"), "--depth", str(depth), "--depth_format", "mm"]
    command += ["--question", "How many chairs are there?"]
    asked = subprocess.run([sys.executable, "evaluation/answer.py", *command], cwd=ROOT, capture_output=True, text=True)
    assert python.returncode == asked.returncode == 0, python.stderr + asked.stderr
    assert asked.stdout.splitlines()[1].strip().startswith(python.stdout.strip() or "(nothing)")


def test_the_picture_beside_the_photograph(places, depth, capsys, tmp_path):
    Image.new("RGB", (128, 128), "red").save(tmp_path / "photo.png")
    model = (
        "--model",
        places / "baseline_depth",
        "--depth",
        depth,
        "--depth_format",
        "mm",
        "--question",
        "What is it?",
    )
    ask(capsys, *model, "--rgb", tmp_path / "photo.png", "--show", tmp_path / "seen.png")
    seen = np.asarray(Image.open(tmp_path / "seen.png"))
    assert seen.shape[1] > 2 * 128 and (seen[64, 64] == (255, 0, 0)).all()


def test_a_conversation(places, depth):
    """Through a pipe: a question that cannot be asked does not end it."""
    command = [sys.executable, "evaluation/answer.py", "--model", str(places / "baseline_depth"), "--depth", str(depth)]
    command += ["--depth_format", "mm", "--interactive"]
    questions = "Is there a bed?\nWhat is <image>?\n\nIs there a chair?\n"
    done = subprocess.run(command, cwd=ROOT, input=questions, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Is there a bed?" in done.stdout and "Is there a chair?" in done.stdout
    assert "error: the question contains <image>" in done.stderr


def test_a_conversation_in_a_terminal(places, depth):
    """Each question is answered before the next one is read; an empty line ends it."""
    command = [sys.executable, "evaluation/answer.py", "--model", str(places / "baseline_depth"), "--depth", str(depth)]
    own, other = pty.openpty()
    with subprocess.Popen(
        [*command, "--depth_format", "mm", "--interactive"], cwd=ROOT, stdin=other, stdout=subprocess.PIPE, text=True
    ) as process:
        for question in ("Is there a bed?", "Is there a chair?"):
            os.write(own, f"{question}\n".encode())
            assert [process.stdout.readline().strip() for _ in range(2)][0] == question
            process.stdout.readline()  # next best
        os.write(own, b"\n")
        assert process.wait(timeout=60) == 0
    os.close(own)
    os.close(other)


DEPTH = "--depth {png} --depth_format mm"


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("--model {depth} --question x", "sees depth; give its picture with --depth"),
        (f"--model {{rgb}} --question x {DEPTH}", "sees rgb; give its picture with --rgb"),
        (f"--model {{rgb}} --question x --rgb {{jpg}} {DEPTH}", "sees rgb; leave out --depth"),
        (f"--model {{depth}} --question x --rgb {{jpg}} {DEPTH}", "sees depth; leave out --rgb .*--show"),
        (f"--model {{depth}} --question x --rgb {{jpg}} --show {{out}} {DEPTH}", "64 x 64 pixels, .* 128 x 128"),
        (f"--model {{depth}} --question '' {DEPTH}", "question is empty"),
        (f"--model {{depth}} --question '<|im_end|>' {DEPTH}", "contains <|im_end|>"),
        (f"--model {{depth}} --question 'Is it \udcff?' {DEPTH}", "not valid UTF-8"),
        (f"--model {{depth}} --question {'x' * 3000} {DEPTH}", "3000 characters"),
        ("--model {depth} --question x --depth {png} --depth_format sunrgbd", "--depth_format mm would fit"),
        (f"--model {{depth}} --question x {DEPTH} --intrinsics 5", "--intrinsics 5: expected 4 or 9 numbers"),
        (f"--model {{depth}} --question x {DEPTH} --image_tokens anyres", "was trained with one_tile"),
    ],
)
def test_bad_input_is_named(places, depth, tmp_path, command, complaint):
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.jpg")
    names = {"depth": places / "baseline_depth", "rgb": places / "baseline_rgb05b", "png": depth}
    names |= {"jpg": tmp_path / "photo.jpg", "out": tmp_path / "seen.png"}
    with pytest.raises(UserError, match=complaint):
        answer.main(answer.parse_args(shlex.split(command.format(**names))))
    assert not (tmp_path / "seen.png").exists()


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ((), "nothing to ask"),
        (("--question", "x", "--depth", "a.png"), "needs --depth_format"),
        (("--question", "x", "--rgb", "a.png", "--tilt", "3"), "go with --depth"),
        (("--question", "x", "--rgb", "a.png", "--show", "./a.png"), "is the picture itself"),
        (("--question", "x", "--rgb", "a.png", "--others", "101"), "--others"),
    ],
)
def test_contradicting_flags(argv, complaint, capsys):
    with pytest.raises(SystemExit, match="2"):
        answer.parse_args(["--model", "x", *argv])
    assert complaint in capsys.readouterr().err


def test_an_export_contradicted_by_a_flag(places, tmp_path):
    for flag in (("--pixel_data_type", "rgb"), ("--depth_encoding", "grey"), ("--image_tokens", "anyres")):
        with pytest.raises(UserError, match=f"{flag[0]} {flag[1]} contradicts {places / 'baseline_depth'}"):
            evaluate(tmp_path, "--model_id", str(places / "baseline_depth"), *flag)
    blind, metrics = evaluate(tmp_path, "--model_id", str(places / "baseline_depth"), "--pixel_data_type", "blind")
    assert metrics["system"]["modality"] == "blind" and blind


def test_a_real_frame(samples, places, capsys):
    """A kv2 frame in the unit of the data set; read as millimetres it is refused."""
    path = samples / "kv2_test_frames/000001/depth/000001.png"
    model = ("--model", places / "baseline_depth", "--question", "How many chairs are there?", "--depth", path)
    assert "How many chairs" in ask(capsys, *model, "--depth_format", "sunrgbd").out
    with pytest.raises(UserError, match="--depth_format sunrgbd would fit"):
        ask(capsys, *model, "--depth_format", "mm")
