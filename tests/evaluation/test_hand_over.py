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
    assert "**Not scored.**" in text and "val/exact\\_match" not in text and "| n |" not in text


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
    rungs = [{"kind": "clean", "severity": 0}, {"kind": "holes", "severity": 0.3}]
    model = str(student / "unscored")
    record = {
        "questions": {"n_questions": 59},
        "systems": [{"model": model, "summary": {"By depth": {"clean": cell, "mean": cell}}, "rungs": rungs}],
    }
    (folder / "robustness.json").write_text(json.dumps(record))
    flags = ("--model_id", model, "--export", export, "--robustness", str(folder))
    _, metrics = evaluate(student / "r", *flags)
    assert metrics["robustness"]["kinds"] == ["holes"]
    assert "25.0 [12.5, 50.0] in the mean of\n1 degradations (holes)" in card(student / "scored")[1]
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
    assert f"uploaded to {server.url}/me/student" in done.stdout
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


@pytest.mark.parametrize("status", [403, 503])
def test_a_hub_that_refuses(student, status):
    """One line; what was scored and exported stays, and the line says how to try again."""
    export = student / "scored"
    with hub(refuse=status) as server:
        done = upload(student, server, "--ckpt_path", "t", "--export", str(export))
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert str(status) in line and f"again with: evaluate_onevision.py --model_id {export} --export {export}" in line
    assert (export / "README.md").is_file() and (student / "results" / "metrics.json").is_file()
    assert TOKEN not in done.stdout + done.stderr


def test_no_hub_at_all(student):
    with hub() as server:
        pass
    done = upload(student, server, "--ckpt_path", "t", "--export", str(student / "scored"))
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and "again with:" in line and "Traceback" not in done.stderr
