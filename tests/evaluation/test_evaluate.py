"""The evaluation script: every kind of system, batched answers equal single ones, contradictions and damage refused."""

import csv
import re
import shutil
import subprocess
import sys

import pytest
import torch

from dataset.inputs.pictures import ImageSettings, load_images
from dataset.inputs.processor import load_processor
from dataset.inputs.prompts import pack_questions
from dataset.questions.rows import read_questions
from dataset.sunrgbd.frames import read_frame
from distillation.models import STUDENT_NAME, load_model
from distillation.run.checkpoints import read_checkpoint
from evaluation import inputs
from evaluation.answer_log import Answer
from evaluation.metrics import recording
from evaluation.onevisionv3.sunrgbd import evaluate_onevision
from tests.helpers.evaluation import evaluate
from tests.helpers.training import train
from utils import ROOT, UserError


@pytest.fixture(scope="module")
def trained(world, tiny_folder, tmp_path_factory):
    """MAIN_ROOT_DATA_DIR with one run of each baseline in it."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOT_DATA_DIR", str(world))
        patch.setenv("MAIN_ROOT_DATA_DIR", str(out))
        for name in ("baseline_depth", "baseline_rgb7b"):
            train(name, tiny_folder, "--lr", "1e-2")
    return out


@pytest.fixture
def places(world, trained, monkeypatch):
    monkeypatch.setenv("ROOT_DATA_DIR", str(world))
    monkeypatch.setenv("MAIN_ROOT_DATA_DIR", str(trained))
    return trained


def best(places, name: str):
    (path,) = (places / name / "checkpoints" / "t").glob("best*.ckpt")
    return path


@pytest.mark.parametrize("name", ["baseline_depth", "baseline_rgb7b"])
def test_checkpoint_by_path_name_and_experiment(places, world, tmp_path, name):
    path = best(places, name)
    by_path, metrics = evaluate(tmp_path / "a", "--ckpt_path", str(path), "--gts_type", "val")
    questions = read_questions(world / "SUNRGBD/csv_data/val_dataset.csv", root=world)
    assert [row["Question_Id"] for row in by_path] == [row.id for row in questions]
    right = sum(int(row["Correct"]) for row in by_path)
    assert metrics["overall"]["exact_match"]["value"] == pytest.approx(right / len(by_path))
    recorded = float(path.stem.split("score")[1])  # teacher-forced validation accuracy is greedy decoding's
    assert metrics["overall"]["exact_match"]["value"] == pytest.approx(recorded, abs=0.02)
    assert metrics["system"]["modality"] == ("depth" if "depth" in name else "rgb")
    assert set(metrics["blind"]) == {"majority_per_type", "question_text", "text_classifier"}
    by_name, _ = evaluate(
        tmp_path / "b", "--kd_model_type", name, "--student_ckpt_path", path.name, "--gts_type", "val"
    )
    by_experiment, _ = evaluate(tmp_path / "c", "--kd_model_type", name, "--load_checkpoint", "--gts_type", "val")
    assert by_path == by_name == by_experiment


@pytest.mark.parametrize("modality", ["depth", "rgb", "blind"])
def test_batched_answers_equal_single_ones(places, tiny_folder, tmp_path, modality):
    """With random weights, so that answers are long and varied: neither neighbours nor padding may change a token."""
    system = ("--model_id", str(tiny_folder), "--pixel_data_type", modality, "--image_tokens", "one_tile")
    batched, _ = evaluate(tmp_path / "a", *system, "--batch_size", "16")
    single, _ = evaluate(tmp_path / "b", *system, "--batch_size", "1")
    assert [row["Model_Answer"] for row in batched] == [row["Model_Answer"] for row in single]
    assert len({row["Model_Answer"] for row in batched}) > 1


@pytest.mark.parametrize("modality", ["rgb", "depth", "blind"])
@pytest.mark.parametrize("image_tokens", ["one_tile", "two_tile", "anyres"])
def test_answers_are_those_of_stock_generate(places, world, tiny_folder, tmp_path, modality, image_tokens):
    """One question at a time, own prompt and picture, stock greedy `generate`: the same words, in long answers too."""
    system = ("--model_id", str(tiny_folder), "--pixel_data_type", modality, "--image_tokens", image_tokens)
    rows, _ = evaluate(tmp_path / "a", *system, "--batch_size", "5")
    processor, model = load_processor(str(tiny_folder)), load_model(str(tiny_folder)).eval()
    settings = ImageSettings(modality, image_tokens=image_tokens)
    barred = [processor.image_token_id, processor.video_token_id]
    barred += range(len(processor.tokenizer), model.config.text_config.vocab_size)
    for row in rows[::3]:
        frame = read_frame(world, row["Image_Path"].rsplit("/", 2)[0])
        (picture,) = load_images(frame, [settings])
        n = 0 if picture is None else processor.count_image_tokens(*picture.shape[:2], image_tokens=image_tokens)
        ids = torch.tensor([pack_questions(processor, [row["Questions"]], None, n_image_tokens=n).input_ids])
        pixels = {} if picture is None else processor.pixels([picture], image_tokens=image_tokens)
        new = model.generate(
            input_ids=ids,
            do_sample=False,
            max_new_tokens=6,
            suppress_tokens=barred,
            eos_token_id=processor.tokenizer.eos_token_id,
            **pixels,
        )[0, ids.shape[1] :]
        assert row["Model_Answer"] == " ".join(processor.tokenizer.decode(new, skip_special_tokens=True).split())
    assert len({row["Model_Answer"] for row in rows}) > 1


@pytest.mark.parametrize("modality", ["rgb", "depth", "blind"])
@pytest.mark.parametrize("image_tokens", ["one_tile", "anyres"])
def test_stock_model_by_folder(places, tiny_folder, tmp_path, modality, image_tokens):
    rows, metrics = evaluate(
        tmp_path / "a", "--model_id", str(tiny_folder), "--pixel_data_type", modality, "--image_tokens", image_tokens
    )
    assert rows and metrics["system"]["checkpoint"] is None and metrics["system"]["modality"] == modality


def test_blind_withholds_the_picture(places, world, tmp_path, monkeypatch):
    """With every picture damaged, a blind system answers as before, and one that sees stops at the first."""
    blind = ("--ckpt_path", str(best(places, "baseline_depth")), "--pixel_data_type", "blind")
    rows, _ = evaluate(tmp_path / "a", *blind)
    shutil.copytree(world, tmp_path / "world")
    monkeypatch.setenv("ROOT_DATA_DIR", str(tmp_path / "world"))
    for row in rows:
        for column in ("Image_Path", "Depth_Path"):
            (tmp_path / "world" / row[column]).write_bytes(b"not a picture")
    damaged, _ = evaluate(tmp_path / "b", *blind)
    assert damaged == rows
    for name in ("baseline_depth", "baseline_rgb7b"):
        with pytest.raises(UserError, match="image cannot be read"):
            evaluate(tmp_path / "c", "--ckpt_path", str(best(places, name)))


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--ckpt_path", "best"), "--ckpt_path best needs --kd_model_type"),
        (("--ckpt_path", "", "--load_checkpoint", "--kd_model_type", "baseline_depth"), "--ckpt_path is empty"),
    ],
)
def test_a_checkpoint_is_named(tmp_path, capsys, flags, complaint):
    with pytest.raises(SystemExit):
        evaluate(tmp_path / "a", *flags)
    assert complaint in capsys.readouterr().err and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("--pixel_data_type", "rgb"), "--pixel_data_type rgb contradicts"),
        (("--depth_encoding", "grey"), "--depth_encoding grey contradicts"),
        (("--image_tokens", "anyres"), "--image_tokens anyres contradicts"),
        (("--model_id", "somebody/else"), "--model_id somebody/else contradicts"),
        (("--kd_model_type", "baseline_rgb7b"), "--kd_model_type baseline_rgb7b contradicts"),
    ],
)
def test_contradictions_are_errors(places, tmp_path, more, complaint):
    with pytest.raises(UserError, match=complaint):
        evaluate(tmp_path / "a", "--ckpt_path", str(best(places, "baseline_depth")), *more)
    assert not (tmp_path / "a").exists()


def test_rooms_of_the_built_in_world_are_recordings_of_their_own(places, world, tiny_folder, tmp_path, monkeypatch):
    """Its pictures are named like frames of recordings; they share clusters as real ones, but not with --miniature."""
    stock = ("--model_id", str(tiny_folder), "--pixel_data_type", "depth", "--image_tokens", "one_tile")
    rows, metrics = evaluate(tmp_path / "a", *stock)
    assert {row["Recording"] for row in rows} == {recording(row["Image_Path"]) for row in rows}
    monkeypatch.setattr(inputs, "data_root", lambda miniature: world)
    monkeypatch.setattr(inputs, "ensure_world", lambda root: root)
    rows, miniature = evaluate(tmp_path / "b", *stock, "--miniature")
    n_images = miniature["overall"]["n_images"]
    assert len({row["Recording"] for row in rows}) == miniature["overall"]["n_recordings"] == n_images == 8
    assert metrics["overall"]["n_recordings"] < n_images


def test_ambiguous_and_missing_checkpoints(places, tmp_path):
    with pytest.raises(UserError, match="last.ckpt: several have this name"):
        evaluate(tmp_path / "a", "--ckpt_path", "last.ckpt")
    with pytest.raises(UserError, match="absent.ckpt"):
        evaluate(tmp_path / "a", "--ckpt_path", "absent.ckpt")
    with pytest.raises(UserError, match="make one with: python distillation/baseline_rgb05b/train.py"):
        evaluate(tmp_path / "a", "--kd_model_type", "baseline_rgb05b", "--load_checkpoint")


def test_weights_of_another_model_are_refused(places, tmp_path):
    checkpoint = read_checkpoint(best(places, "baseline_depth"))
    checkpoint["state_dict"].pop(next(iter(checkpoint["state_dict"])))
    torch.save(checkpoint, tmp_path / "part.ckpt")
    with pytest.raises(UserError, match="part.ckpt.*1 missing"):
        evaluate(tmp_path / "a", "--ckpt_path", str(tmp_path / "part.ckpt"))


@pytest.mark.parametrize(
    "argv",
    [
        ["--load_checkpoint"],
        ["--kd_model_type", "baseline_depth"],
        ["--phase_no", "1"],
        ["--pixel_data_type", "sonar"],
        ["--gts_type", "train"],
        ["--batch_size", "0"],
        ["--num_workers", "-1"],
        ["--max_new_tokens", "0.5"],
        ["--dry_run", "--captions"],
        ["--dry_run", "--dataset", "daquar"],
    ],
)
def test_bad_flags(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate_onevision.parse_args(argv)
    assert stopped.value.code == 2 and argv[0] in capsys.readouterr().err.splitlines()[-1]


def test_second_path_runs_the_same_command(places, tiny_folder, tmp_path):
    """As a subprocess from another folder; its answers are those of the first path."""
    argv = ["--ckpt_path", str(best(places, "baseline_depth")), "--gts_type", "val", "--max_new_tokens", "6"]
    script = ROOT / "evaluation/onevisionv3/evaluate_onevision.py"
    done = subprocess.run(
        [sys.executable, str(script), *argv, "--output", str(tmp_path / "a")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Overall" in done.stdout and "peak memory" in done.stdout
    evaluate(tmp_path / "b", *argv[:-2])
    name = "predictions.csv"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_hf_token_reaches_no_output(places, tiny_folder, tmp_path, monkeypatch):
    """A canary token must not be found in any file that training and evaluation write."""
    monkeypatch.setenv("hf_token", "hf_CANARY0123456789")
    monkeypatch.setenv("MAIN_ROOT_DATA_DIR", str(tmp_path / "out"))
    train("baseline_rgb05b", tiny_folder, "--max_steps", "1")
    evaluate(tmp_path / "out" / "results", "--kd_model_type", "baseline_rgb05b", "--load_checkpoint")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if b"CANARY" in path.read_bytes()]


def test_answers_are_kept_when_scoring_fails(places, world, tmp_path, monkeypatch):
    """Every answer is on disk then, and no scores of an earlier evaluation stand beside them."""
    argv = ["--ckpt_path", str(best(places, "baseline_depth")), "--max_new_tokens", "6"]
    rows, _ = evaluate(tmp_path / "a", *argv[:2])
    (tmp_path / "a" / "predictions.csv").write_text("older")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate_onevision, "evaluate_rows", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(tmp_path / "a", *argv)
    with open(tmp_path / "a" / "predictions.csv", encoding="utf-8", newline="") as handle:
        assert list(csv.DictReader(handle)) == rows
    assert not (tmp_path / "a" / "metrics.json").exists()


def test_a_damaged_train_file_is_said_before_anything_is_answered(places, world, tmp_path, monkeypatch):
    """As a command: one message that names file and line, and what an earlier evaluation wrote stays."""
    argv = ["--ckpt_path", str(best(places, "baseline_depth")), "--max_new_tokens", "6"]
    evaluate(tmp_path / "a", *argv[:2])
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    shutil.copytree(world, tmp_path / "world")
    (tmp_path / "world/SUNRGBD/csv_data/train_dataset.csv").write_text("Question_Id\n1\n")
    monkeypatch.setenv("ROOT_DATA_DIR", str(tmp_path / "world"))
    script = ROOT / "evaluation/onevisionv3/sunrgbd/evaluate_onevision.py"
    command = [sys.executable, str(script), *argv, "--output", str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if "train_dataset.csv:1: required column" in line]
    assert before == {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}


def test_empty_answers_are_warned_about(places, tmp_path, monkeypatch, capsys):
    empty = Answer("", 1.0)
    monkeypatch.setattr(evaluate_onevision, "answer_questions", lambda m, p, r, rows, *_: {q.id: empty for q in rows})
    evaluate(tmp_path / "a", "--ckpt_path", str(best(places, "baseline_depth")))
    assert "answers of baseline_depth are empty; check" in capsys.readouterr().err


def test_a_plan_takes_world_and_bits_from_the_record(places, tmp_path, capsys):
    """Of a student of the built-in world, which needs no --miniature, on a base in 4 bits: half a byte a weight."""
    checkpoint = read_checkpoint(best(places, "baseline_rgb7b"))
    checkpoint["hyper_parameters"] |= {"student_name": STUDENT_NAME, "miniature": True}
    weights = []
    for bits in (16, 4):
        checkpoint["hyper_parameters"]["base_bits"] = bits
        torch.save(checkpoint, tmp_path / "run.ckpt")
        given = ["--dry_run", "--ckpt_path", str(tmp_path / "run.ckpt"), "--precision", "32-true"]
        evaluate_onevision.main(evaluate_onevision.parse_args(given))
        said = capsys.readouterr().out
        assert f"plan of scoring {STUDENT_NAME}" in said
        weights.append(float(re.search(r"weights (\d+\.\d+)", said).group(1)))
    assert weights[1] < 0.7 * weights[0]


def test_weights_that_are_nan_are_named(places, tmp_path):
    checkpoint = read_checkpoint(best(places, "baseline_depth"))
    checkpoint["state_dict"] = {name: torch.full_like(w, torch.nan) for name, w in checkpoint["state_dict"].items()}
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    with pytest.raises(UserError, match="nan.ckpt: .*weight tensors hold NaN or infinity"):
        evaluate(tmp_path / "a", "--ckpt_path", str(tmp_path / "nan.ckpt"))
