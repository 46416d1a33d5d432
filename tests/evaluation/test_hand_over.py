"""What is handed on of a scored student: folder, card, upload."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from distillation.card import model_card
from evaluation.student import Student
from tests.helpers.evaluation import evaluate
from tests.helpers.hub import hub
from tests.helpers.training import train
from utils import ROOT, UserError

SCRIPT = ROOT / "evaluation" / "onevisionv3" / "sunrgbd" / "evaluate_onevision.py"
TOKEN = "hf_canaryCANARYcanary"


@pytest.fixture(scope="module")
def trained(world, tiny_folder, tmp_path_factory):
    """A run named t, and its export by the training script."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOT_DATA_DIR", str(world))
        patch.setenv("MAIN_ROOT_DATA_DIR", str(folder))
        train("baseline_depth", tiny_folder, "--max_epochs", "1", "--export", str(folder / "unscored"))
    return folder


@pytest.fixture
def student(places, trained):
    """The same in a folder that a test may change."""
    shutil.copytree(trained, places)
    return places


def card(folder):
    """The front matter of a card, and its text."""
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_card_of_a_training_script_says_not_scored(student):
    head, text = card(student / "unscored")
    assert head["pipeline_tag"] == "image-text-to-text" and "model-index" not in head and "license" not in head
    assert "**Not scored.**" in text and "val/exact\\_match 0.0000 on the validation split" in text
    assert "| n |" not in text


def test_the_card_of_a_scored_student_has_its_scores(student):
    _, metrics = evaluate(student / "results", "--ckpt_path", "t", "--export", str(student / "scored"))
    head, text = card(student / "scored")
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == round(metrics["overall"]["exact_match"]["value"], 4)
    assert result["dataset"]["split"] == "test" and "Not scored" not in text
    cell = metrics["per_type"]["Yes/No"]
    own, blind = cell["exact_match"], metrics["blind"]["majority_per_type"]["per_type"]["Yes/No"]["exact_match"]
    shown = [f"{100 * c['value']:.1f} [{100 * c['low']:.1f}, {100 * c['high']:.1f}]" for c in (own, blind)]
    assert f"| Yes/No | {cell['n_questions']} | {shown[0]} | {shown[1]} |" in text
    assert metrics["questions"]["sha256"] in text and metrics["questions"]["manifest"] in text
    assert "worse pictures was not measured" in text
    for part in ("## Limits", "## Licences and data", "## Citation", "SUN RGB-D states no licence", "--lr 0.001"):
        assert part in text
    assert str(student) not in text and str(student) not in (student / "scored" / "student.json").read_text()


def test_an_export_is_scored_and_gets_a_card_in_place_or_in_a_copy(student):
    unscored = student / "unscored"
    (unscored / "private_notes.csv").write_text("not mine to give\n")
    before = {path.name: path.read_bytes() for path in unscored.iterdir()}
    flags = ("--model_id", str(unscored))
    evaluate(student / "r1", *flags, "--export", str(student / "copy"))
    assert {p.name: p.read_bytes() for p in unscored.iterdir()} == before
    copied = {path.name: path.read_bytes() for path in (student / "copy").iterdir()}
    assert before.keys() - copied.keys() == {"private_notes.csv"}
    assert {name for name in copied if copied[name] != before[name]} == {"README.md"}
    assert "Not scored" not in card(student / "copy")[1]
    evaluate(student / "r2", *flags, "--export", str(unscored))
    assert "Not scored" not in card(unscored)[1]
    assert Student.load(str(student / "copy")).images.modality == "depth"


def test_the_card_tells_what_worse_pictures_cost(student):
    export, folder = str(student / "scored"), student / "ladder"
    folder.mkdir()
    cell = {"value": 0.25, "low": 0.125, "high": 0.5}
    rungs = [("clean", 0), ("holes", 0.3), ("no_depth", 1)]  # the last of which is not in the mean
    rungs = [{"kind": kind, "severity": s, "accuracy": {"By depth": cell}} for kind, s in rungs]
    model = str(student / "unscored")
    record = {
        "questions": {"n_questions": 59, "n_images": 8},
        "settings": {"split": "test"},
        "blind": {"accuracy": {"By depth": cell}},
    }
    summary = {"By depth": {"clean": cell, "mean": cell}}
    record["systems"] = [{"name": "s", "model": model, "modality": "depth", "summary": summary, "rungs": rungs}]
    (folder / "robustness.json").write_text(json.dumps(record))
    flags = ("--model_id", model, "--export", export, "--robustness", str(folder))
    _, metrics = evaluate(student / "r", *flags)
    assert metrics["robustness"]["kinds"] == ["holes"]
    told = " ".join(card(student / "scored")[1].split())
    assert "(test split, 8 pictures, by depth): 25.0 [12.5, 50.0] on clean ones" in told
    assert "25.0 [12.5, 50.0] in the mean of 1 degradations (holes)." in told
    record["systems"][0]["model"] = "another"
    (folder / "robustness.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="has no results of .*unscored, but of another"):
        evaluate(student / "r", *flags[:2], "--robustness", str(folder))


def test_hostile_names_do_not_become_markup_of_a_card(student):
    _, metrics = evaluate(student / "results", "--ckpt_path", "t")
    description = json.loads((student / "unscored" / "student.json").read_text())
    evil = "x` <script>alert(1)</script> | [a](javascript:b) \x1b[31m"
    description |= {"teacher": evil, "student_name": evil, "checkpoint": evil, "flags": {"lr": evil}}
    metrics["system"] |= {"name": evil, "split": evil}
    text = model_card(description, metrics)
    head = yaml.safe_load(text.split("---\n", 2)[1])
    assert head["model-index"][0]["results"][0]["dataset"]["split"] == evil
    body = text.split("---\n", 2)[2]
    assert "\x1b" not in body and "\\<script\\>" in body
    words = re.sub(r"```.*?```|(?<!\\)`[^`\n]*`", "", body, flags=re.DOTALL)  # what is in no code span
    words = re.sub(r"\\.", "", words)
    assert not set("<>`") & set(words) and "](javascript" not in words


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--push_to_hub", "a/b"), "--push_to_hub uploads what --export writes"),
        (("--export_dtype", "bfloat16"), "--export_dtype is for the --export of a checkpoint"),
        (("--predictions", "x.csv", "--export", "x"), "--export: --predictions asks no system anything"),
    ],
)
def test_flags_that_do_not_go_together(places, capsys, flags, message):
    with pytest.raises(SystemExit):
        evaluate(places / "r", *flags)
    assert message in capsys.readouterr().err


def test_what_cannot_be_handed_over_is_said_before_anything_is_scored(student, monkeypatch, tiny_folder):
    monkeypatch.setattr("evaluation.system.greedy_answers", lambda *args, **options: 1 / 0)
    monkeypatch.delenv("hf_token", raising=False)
    new, unscored = str(student / "new"), str(student / "unscored")
    for flags, message in (
        (("--model_id", str(tiny_folder), "--export", new), "is no student of ours"),
        (("--ckpt_path", "t", "--pixel_data_type", "blind", "--export", new), "the card would tell of another system"),
        (("--ckpt_path", "t", "--export", unscored), "is there already"),
        (("--ckpt_path", "t", "--export", new, "--push_to_hub", "a/b/c"), "--push_to_hub a/b/c: "),
        (("--ckpt_path", "t", "--export", new, "--push_to_hub", "a/b"), "hf_token=... in .env"),
        (("--ckpt_path", "t", "--robustness", new), "new/robustness.json"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(student / "r", *flags)


def upload(student, server, *flags, **more):
    """The command in a process of its own, since huggingface_hub reads the address of the hub when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(student / "hf")}
    environment |= {"HF_HUB_DISABLE_XET": "1"}  # its servers are others; the older way of large files is the same API
    environment |= {"hf_token": TOKEN, **more}
    command = [sys.executable, str(SCRIPT), *flags, "--output", str(student / "results"), "--push_to_hub", "me/student"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_an_upload_has_the_files_of_the_export_and_nothing_of_the_data_set(student, world):
    """Through huggingface_hub's own client, against a server on this machine."""
    export = student / "scored"
    with hub() as server:
        done = upload(student, server, "--ckpt_path", "t", "--export", str(export))
    assert done.returncode == 0, done.stderr
    assert "me/student on the hub: private" in done.stdout and "uploaded to me/student" in done.stdout
    assert server.files == {path.name: path.read_bytes() for path in export.iterdir()}
    assert server.created[0]["visibility"] == "private"
    assert {token for _, _, token in server.requests if token} == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr and TOKEN.encode() not in b"".join(server.files.values())
    frames = [path.name for path in (world / "SUNRGBD").rglob("*") if path.is_file()]
    assert not set(frames) & server.files.keys() and not any(n.endswith((".csv", ".png")) for n in server.files)
    rows = (student / "results" / "predictions.csv").read_text().splitlines()[1:]
    questions = {row.split(",")[1] for row in rows} - {"How many chairs are there?"}  # which the card shows how to ask
    uploaded = b"".join(c for n, c in server.files.items() if n != "tokenizer.json").decode("latin-1")
    assert questions and not any(question in uploaded for question in questions)


def test_strangers_in_the_folder_stay_here(student):
    """A picture and annotations that lie in the export: they are no files of an export."""
    unscored = student / "unscored"
    for name in ("frame.png", "depth.jpg", "predictions.csv", "notes.txt", ".env"):
        (unscored / name).write_text("private")
    for name in ("SUNRGBD/config.json", "annotation2Dfinal/index.json", "image/x.safetensors"):
        (unscored / name).parent.mkdir()
        (unscored / name).write_text("private")
    with hub() as server:
        done = upload(student, server, "--model_id", str(unscored), "--export", str(unscored))
    assert done.returncode == 0, done.stderr
    assert len(server.files) == 10 and b"private" not in b"".join(server.files.values())
    assert all("/" not in name for name in server.files)


@pytest.mark.parametrize(("status", "path"), [(403, "/api/"), (503, "/commit/")])
def test_a_hub_that_refuses(student, status, path):
    """One line: before anything is scored, or at the end; then all stays, and the line says how to try again."""
    export = student / "scored"
    with hub(refuse=(status, path)) as server:
        done = upload(student, server, "--ckpt_path", "t", "--export", str(export))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert str(status) in line and TOKEN not in done.stdout + done.stderr
    at_the_end = status == 503
    assert at_the_end == (f"again with: --model_id {export} --export {export} --output {student / 'results'}" in line)
    assert at_the_end == (export / "README.md").is_file() == (student / "results" / "metrics.json").is_file()


def test_no_hub_at_all(student):
    with hub() as server:
        pass
    done = upload(student, server, "--ckpt_path", "t", "--export", str(student / "scored"))
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and f"{server.url} refuses" in line and "Traceback" not in done.stderr
    assert not (student / "scored").exists()


def test_a_token_that_cannot_be_one_is_not_shown(student, monkeypatch):
    monkeypatch.setenv("hf_token", f"{TOKEN}\x07x")
    flags = ("--ckpt_path", "t", "--export", str(student / "new"), "--push_to_hub", "a/b")
    with pytest.raises(UserError, match="hf_token in .*holds spaces or other characters") as refused:
        evaluate(student / "r", *flags)
    assert TOKEN not in str(refused.value)


def test_a_link_in_an_export_is_not_handed_on(student, tmp_path):
    (tmp_path / "secret").write_text("private")
    (student / "unscored" / "vocab.json").symlink_to(tmp_path / "secret")
    evaluate(student / "r", "--model_id", str(student / "unscored"), "--export", str(student / "copy"))
    assert not (student / "copy" / "vocab.json").exists() and (student / "copy" / "README.md").is_file()


def test_exports_of_older_versions_and_moved_checkpoints_are_scored(student, tmp_path):
    said = json.loads((student / "unscored" / "student.json").read_text())
    for name in ("flags", "checkpoint", "validation", "depth_degradation", "git_commit", "teacher"):
        del said[name]
    (student / "unscored" / "student.json").write_text(json.dumps(said))
    _, metrics = evaluate(student / "r", "--model_id", str(student / "unscored"), "--export", str(student / "copy"))
    assert metrics["training"]["labels"] is None and "commit unknown" in card(student / "copy")[1]
    (best,) = (student / "baseline_depth/checkpoints/t").glob("best-*.ckpt")
    shutil.copy(best, tmp_path / "moved.ckpt")
    logs = student / "baseline_depth/tensorboard_logs/t"
    (logs / "metrics.csv").write_bytes(b"step,train/loss\n1,\xff\n")
    (logs / "run.json").write_text("{")
    for path in (tmp_path / "moved.ckpt", best):
        _, metrics = evaluate(
            student / path.stem, "--ckpt_path", str(path), "--export", str(student / f"e_{path.stem}")
        )
        assert metrics["training"]["curves"] == {} and metrics["training"]["labels"] == 1


def test_a_student_that_says_something_odd_is_refused(student):
    path = student / "unscored" / "student.json"
    said = json.loads(path.read_text())
    odd = {"validation": [1], "flags": {"lr": [1]}, "depth_degradation": "x", "checkpoint": None, "git_commit": "x"}
    for name, value in odd.items():
        path.write_text(json.dumps(said | {name: value}))
        with pytest.raises(UserError, match=f"student.json: says {name} "):
            evaluate(student / "r", "--model_id", str(student / "unscored"), "--export", str(student / "copy"))


def test_an_export_may_not_hold_its_own_results(student):
    flags = ("--ckpt_path", "t", "--export", str(student / "r"))
    for output in (student / "r", student / "r" / "results"):
        with pytest.raises(UserError, match="holds the results folder"):
            evaluate(output, *flags)


def test_a_damaged_manifest_is_said_before_anything_is_answered(student, world, tmp_path, monkeypatch):
    shutil.copytree(world, tmp_path / "world")
    monkeypatch.setenv("ROOT_DATA_DIR", str(tmp_path / "world"))
    (tmp_path / "world/SUNRGBD/csv_data/manifest.json").write_text("{")
    monkeypatch.setattr("evaluation.system.greedy_answers", lambda *args, **options: 1 / 0)
    with pytest.raises(UserError, match="manifest.json: not valid JSON"):
        evaluate(student / "r", "--ckpt_path", "t")
