"""What strangers send, through the scripts' own flags: one line, exit 2, nothing runs, nothing is written elsewhere."""

import csv
import json
import os
import pickle
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from dataset.questions.rows import frame_path, read_questions
from tests.helpers.hostile import (
    ADVICE,
    EVIL_NAME,
    MODEL_FOLDERS,
    STEERING,
    TAMPERED,
    TAMPERED_STATE,
    Payload,
)
from tests.helpers.processes import Started
from tests.helpers.training import BASELINES, STRATEGIES, flags, train
from utils import UserError, _fail, checksummed_path, load_script

pytestmark = pytest.mark.faults
EVALUATION = "evaluation/onevisionv3/sunrgbd/evaluate_onevision.py"
COMPARISON = "evaluation/compare.py"
PREPARATION = "dataset/prepare_sunrgbd.py"
LOGIT = f"distillation/{STRATEGIES['logit']}/train_online_kd.py"


def refused(script: str, argv: list[str], capsys) -> str:
    """The one line with which a script refuses its input, as `run_script` prints it. It must come within a minute."""
    loaded, started = load_script(script), time.monotonic()
    capsys.readouterr()
    with pytest.raises(UserError) as error:
        loaded.main(loaded.parse_args(argv))
    assert time.monotonic() - started < 60
    assert _fail(str(error.value)) == 2
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert not [words for words in ADVICE if words in said.err + said.out]
    assert not [mark for mark in STEERING if mark in said.err + said.out]
    return line


@pytest.fixture(scope="module")
def trained(world, tiny_folder, tmp_path_factory) -> Path:
    """MAIN_ROOT_DATA_DIR with one short run of a depth student and of a teacher."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOT_DATA_DIR", str(world))
        patch.setenv("MAIN_ROOT_DATA_DIR", str(out))
        for name in ("baseline_depth", "baseline_rgb7b"):
            train(name, tiny_folder, "--max_epochs", "3", "--max_steps", "3")
    return out


@pytest.fixture
def places(world, trained, monkeypatch) -> Path:
    monkeypatch.setenv("ROOT_DATA_DIR", str(world))
    monkeypatch.setenv("MAIN_ROOT_DATA_DIR", str(trained))
    return trained


def tampered(source: Path, target: Path, change) -> Path:
    """A checkpoint with one change and a checksum that fits."""
    checkpoint = torch.load(source, weights_only=True)
    change(checkpoint)
    with checksummed_path(target) as part:
        torch.save(checkpoint, part)
    return target


def last(out: Path, experiment: str) -> Path:
    return out / experiment / "checkpoints" / "t" / "last.ckpt"


@pytest.mark.parametrize("name", TAMPERED)
def test_tampered_checkpoints(fault_table, places, tiny_folder, tmp_path, capsys, name):
    depth = tampered(last(places, "baseline_depth"), tmp_path / "depth.ckpt", TAMPERED[name])
    teacher = tampered(last(places, "baseline_rgb7b"), tmp_path / "teacher.ckpt", TAMPERED[name])
    new = flags(tiny_folder, "--run_name", "new", "--max_steps", "1")
    entries = {
        "evaluation": (EVALUATION, ["--ckpt_path", str(depth), "--output", str(tmp_path / "results")]),
        "--load_checkpoint": (BASELINES["baseline_depth"], [*new, "--load_checkpoint", str(depth)]),
        "--teacher_checkpoint": (LOGIT, [*new, "--teacher_checkpoint", str(teacher)]),
    }
    for entry, (script, argv) in entries.items():
        with fault_table.trial(f"tampered checkpoint, {entry}"):
            refused(script, argv, capsys)
            assert not (tmp_path / "results").exists()
            assert not list(places.rglob("new/*.ckpt")) and not list(places.rglob("new/run.json"))


@pytest.mark.parametrize("name", TAMPERED | TAMPERED_STATE)
def test_tampered_checkpoints_are_not_resumed(fault_table, places, tiny_folder, tmp_path, capsys, name):
    path = last(places, "baseline_depth")
    good = path.read_bytes()
    argv = flags(tiny_folder, "--max_epochs", "3", "--max_steps", "6", "--resume", str(path))
    try:
        tampered(path, path, (TAMPERED | TAMPERED_STATE)[name])
        with fault_table.trial("tampered checkpoint, --resume"):
            refused(BASELINES["baseline_depth"], argv, capsys)
    finally:
        with checksummed_path(path) as part:
            part.write_bytes(good)


def test_a_strangers_path_is_not_removed(fault_table, places, tiny_folder, tmp_path):
    """Resumed from a checkpoint that names another file as the best so far, a better one does not replace that."""
    shutil.copytree(places, tmp_path / "out")
    mine = tmp_path / "mine.ckpt"
    mine.write_text("precious")

    def change(checkpoint):
        for state in checkpoint["callbacks"].values():
            state |= {"best_model_path": str(mine), "dirpath": str(path.parent)}
            if state.get("best_model_score") is not None:
                state.update(best_model_score=torch.tensor(-1.0), kth_best_model_path=str(mine))
                state["best_k_models"] = {str(mine): torch.tensor(-1.0)}

    path = last(tmp_path / "out", "baseline_depth")
    with pytest.MonkeyPatch.context() as patch, fault_table.trial("a file elsewhere as the best checkpoint"):
        patch.setenv("MAIN_ROOT_DATA_DIR", str(tmp_path / "out"))
        tampered(path, path, change)
        try:
            train("baseline_depth", tiny_folder, "--max_epochs", "3", "--max_steps", "5", "--resume", str(path))
        except UserError:
            pass  # refused altogether is as good
        assert mine.read_text() == "precious"


@pytest.mark.parametrize("name", MODEL_FOLDERS)
def test_model_folders(fault_table, places, tiny_folder, tiny_teacher, tmp_path, capsys, name):
    folders = {}
    for kind, source in (("student", tiny_folder), ("teacher", tiny_teacher)):
        folders[kind] = tmp_path / kind
        shutil.copytree(source, folders[kind])
        MODEL_FOLDERS[name](folders[kind])
    student, teacher = (str(folders[kind]) for kind in ("student", "teacher"))
    new = ("--run_name", "new", "--max_steps", "1")
    entries = {
        "--model_id": (EVALUATION, ["--model_id", student, "--output", str(tmp_path / "results")]),
        "--student_name": (BASELINES["baseline_depth"], flags(folders["student"], *new)),
        "--teacher_name": (LOGIT, flags(tiny_folder, *new, "--teacher_name", teacher)),
    }
    for entry, (script, argv) in entries.items():
        with fault_table.trial(f"model folder, {entry}"):
            refused(script, argv, capsys)
            assert not list(tmp_path.rglob("RAN")) and not (tmp_path / "results").exists()


def zip_of(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


FRAME = "SUNRGBD/kv1/b3dodata/img_0001"
ARCHIVES = {
    "400 characters": {f"{FRAME}/{'x' * 400}.jpg": b"x"},
    "400 characters in a folder": {f"SUNRGBD/{'x' * 400}/a.jpg": b"x"},
    "90 folders": {"SUNRGBD/" + "d/" * 90 + "a.jpg": b"x"},
    "300 MB of zeros": {f"{FRAME}/depth/0.png": bytes(300_000_000)},
    "20 MB of zeros": {f"{FRAME}/depth/0.png": bytes(20_000_000)},
    "escapes in a name": {f"{FRAME}/\x1b[31m.jpg": b"x"},
    "a line end in a name": {f"{FRAME}/a\nb.jpg": b"x"},
    "an override in a name": {f"{FRAME}/\u202egpj.jpg": b"x"},
    "a name that leads out": {"SUNRGBD/../../evil": b"x"},
    "an absolute name": {"/evil": b"x"},
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(fault_table, tmp_path, capsys, name):
    (tmp_path / "data").mkdir()
    zip_of(tmp_path / "a.zip", ARCHIVES[name])
    with fault_table.trial("archive"):
        refused(PREPARATION, ["--root", str(tmp_path / "data"), "--sunrgbd_zip", str(tmp_path / "a.zip")], capsys)
        assert [path.name for path in tmp_path.iterdir()] in (["a.zip", "data"], ["data", "a.zip"])
        assert not any((tmp_path / "data").iterdir())


QUESTIONS = {
    "path absolute": dict(Image_Path="/etc/image/passwd"),
    "path with ..": dict(Image_Path="SUNRGBD/../../x/image/a.jpg"),
    "path of Windows": dict(Image_Path="C:\\x\\image\\a.jpg"),
    "path with a zero byte": dict(Image_Path="SUNRGBD/kv1/image/a\0.jpg"),
    "zero byte in a question": dict(Questions="What is\0 this?"),
    "escapes in a question": dict(Questions="\x1b[2JWhat is this?"),
    "control token in a question": dict(Questions="What is <image> this?"),
    "end of turn in an answer": dict(Answers="red<|im_end|>"),
    "cell of 10 MB": dict(Questions="x" * 10_000_000),
    "box of 5000 digits": dict(target_box="1 2 3 " + "9" * 5000),
    "another answer of depth": dict(depth_answerable="\u202eyes"),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_question_files(fault_table, world, tiny_folder, tmp_path, monkeypatch, capsys, name):
    own = tmp_path / "world"
    shutil.copytree(world, own)
    path = own / "SUNRGBD/csv_data/test_dataset.csv"
    with open(path, encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    rows[3] |= QUESTIONS[name]
    with open(path, "w", encoding="utf-8-sig", newline="") as handle:  # with the byte order mark of a spreadsheet
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setenv("ROOT_DATA_DIR", str(own))
    with fault_table.trial("question file"):
        line = refused(EVALUATION, ["--model_id", str(tiny_folder), "--output", str(tmp_path / "results")], capsys)
        assert "test_dataset.csv" in line and len(line) < 2050


@pytest.mark.parametrize("name", ["millions of columns", "millions of cells", "a pipe", "UTF-16"])
def test_question_files_of_another_form(fault_table, world, tiny_folder, tmp_path, monkeypatch, capsys, name):
    own = tmp_path / "world"
    shutil.copytree(world, own)
    path = own / "SUNRGBD/csv_data/test_dataset.csv"
    text = path.read_text(encoding="utf-8")
    if name == "a pipe":
        path.unlink()
        os.mkfifo(path)
    elif name == "UTF-16":
        path.write_text(text, encoding="utf-16")
    elif name == "millions of columns":
        path.write_text("a," * 3_000_000 + text)
    else:
        path.write_text(text.rstrip("\n") + "," * 3_000_000 + "\n")
    monkeypatch.setenv("ROOT_DATA_DIR", str(own))
    with fault_table.trial("question file"):
        line = refused(EVALUATION, ["--model_id", str(tiny_folder), "--output", str(tmp_path / "results")], capsys)
        assert "test_dataset.csv" in line


RESULTS = {
    "no JSON": "{",
    "deeply nested": "[" * 100_000,
    "a list": "[]",
    "system a text": '{"system": "x"}',
    "name a list": '{"system": {"name": ["x"]}}',
    "blind of another form": '{"system": {"name": "x"}, "blind": {"a": 3}}',
    "blind a list": '{"system": {"name": "x"}, "blind": ["a"]}',
}


@pytest.fixture(scope="module")
def results(world, tiny_folder, tmp_path_factory) -> Path:
    """What an evaluation writes."""
    folder = tmp_path_factory.mktemp("results") / "good"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOT_DATA_DIR", str(world))
        script = load_script(EVALUATION)
        script.main(script.parse_args(["--model_id", str(tiny_folder), "--image_tokens", "one_tile", "--gts_type",
                                       "val", "--max_new_tokens", "3", "--output", str(folder)]))  # fmt: skip
    return folder


@pytest.mark.parametrize("name", RESULTS)
def test_results_of_strangers(fault_table, places, results, tmp_path, capsys, name):
    shutil.copytree(results, tmp_path / "a")
    (tmp_path / "a/metrics.json").write_text(RESULTS[name])
    with fault_table.trial("metrics.json"):
        refused(COMPARISON, [str(tmp_path / "a"), "--output", str(tmp_path / "out")], capsys)


@pytest.mark.parametrize("where", ["name", "question type", "questions and answers"])
def test_names_never_reach_terminal_table_or_page(fault_table, places, results, tmp_path, capsys, where):
    """Every kind of text in a stranger's results, through the comparison: nothing in its table acts."""
    folder = tmp_path / "a"
    shutil.copytree(results, folder)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    with open(folder / "predictions.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    columns = {"question type": ["Question_Type"], "questions and answers": ["Questions", "Answers", "Model_Answer"]}
    for row in rows:
        row |= {column: EVIL_NAME for column in columns.get(where, ())}
    if where == "name":
        metrics["system"]["name"] = EVIL_NAME + " Tür 椅子"
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    with open(folder / "predictions.csv", "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    script = load_script(COMPARISON)
    with fault_table.trial(f"control characters and markup, {where}"):
        script.main(script.parse_args([str(folder), "--output", str(tmp_path / "out")]))
        said = capsys.readouterr()
        written = [(tmp_path / "out" / name).read_text(encoding="utf-8") for name in ("table.txt", "table.md")]
        assert not [mark for mark in STEERING for text in (*written, said.out, said.err) if mark in text]
        assert "<script>" not in written[1].replace(r"\<", "")
        assert where != "name" or all("Tür 椅子" in text for text in written)


@pytest.mark.parametrize("flag", ["evaluation", "--load_checkpoint", "--teacher_checkpoint", "--resume"])
def test_payloads_in_real_processes(fault_table, places, tiny_folder, tmp_path, flag):
    """The variable that makes torch run a pickle's code is set."""
    path = tmp_path / "evil.ckpt"
    path.write_bytes(pickle.dumps({"hyper_parameters": {"script": "x"}, "state_dict": Payload(tmp_path / "RAN")}))
    new = flags(tiny_folder, "--run_name", "new")
    script, argv = {
        "evaluation": (EVALUATION, ["--ckpt_path", str(path), "--output", str(tmp_path / "results")]),
        "--load_checkpoint": (BASELINES["baseline_depth"], [*new, flag, str(path)]),
        "--teacher_checkpoint": (LOGIT, [*new, flag, str(path)]),
        "--resume": (BASELINES["baseline_depth"], [*flags(tiny_folder), flag, str(path)]),
    }[flag]
    env = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    with fault_table.trial(f"pickle payload, {flag}"), Started(script, argv, tmp_path / "process", env=env) as process:
        assert process.ends() == 2
        assert not (tmp_path / "RAN").exists()
        assert process.stderr.count("\n") - process.stderr.count("FutureWarning") <= 2
        assert not [words for words in ADVICE if words in process.stderr]


@pytest.mark.parametrize("kind", ["loop of links", "link to a parent"])
def test_loops_of_links(fault_table, world, tmp_path, capsys, kind):
    own = tmp_path / "world"
    shutil.copytree(world, own)
    script = load_script(PREPARATION)

    def counted() -> str:
        script.main(script.parse_args(["--root", str(own), "--check", "--workers", "1"]))
        return next(line for line in capsys.readouterr().out.splitlines() if " frames (" in line)

    before = counted()
    top = own / "SUNRGBD"
    if kind == "loop of links":
        (top / "a").symlink_to(top / "b")
        (top / "b").symlink_to(top / "a")
    else:
        (next(path for path in sorted(top.iterdir()) if path.name != "csv_data") / "up").symlink_to(top)
    with fault_table.trial("directory loop"):
        assert counted() == before


def test_a_collection_on_another_disk_is_read(fault_table, world, tiny_folder, tmp_path, monkeypatch):
    """A link that a user made in the own tree is followed, by everything that reads questions and pictures."""
    own = tmp_path / "world"
    shutil.copytree(world, own)
    sensor = next(path for path in sorted((own / "SUNRGBD").iterdir()) if path.name != "csv_data")
    shutil.move(sensor, tmp_path / "other_disk")
    sensor.symlink_to(tmp_path / "other_disk")
    monkeypatch.setenv("ROOT_DATA_DIR", str(own))
    script = load_script(EVALUATION)
    argv = ["--model_id", str(tiny_folder), "--image_tokens", "one_tile", "--gts_type", "val", "--max_new_tokens", "2"]
    with fault_table.trial("links of the user are followed"):
        script.main(script.parse_args([*argv, "--output", str(tmp_path / "results")]))
        comparison = load_script(COMPARISON)
        comparison.main(comparison.parse_args([str(tmp_path / "results"), "--output", str(tmp_path / "out")]))
        assert (tmp_path / "out" / "contact_sheet.png").is_file()


def smaller_depth(frame: Path) -> None:
    (path,) = (frame / "depth").iterdir()
    with Image.open(path) as picture:
        picture.crop((0, 0, picture.width - 1, picture.height)).save(path)


def nan_intrinsics(frame: Path) -> None:
    (frame / "intrinsics.txt").write_text("nan 0 1\n0 1 1\n0 0 1\n")


@pytest.mark.parametrize("damage", [smaller_depth, nan_intrinsics])
def test_frames_that_are_not_registered(fault_table, world, tiny_folder, tmp_path, monkeypatch, capsys, damage):
    """Evaluation and preparation name the frame; training is in tests/distillation/run/test_training.py."""
    own = tmp_path / "world"
    shutil.copytree(world, own)
    row = read_questions(own / "SUNRGBD/csv_data/test_dataset.csv", root=own)[0]
    damage(own / frame_path(row))
    monkeypatch.setenv("ROOT_DATA_DIR", str(own))
    with fault_table.trial("depth of another size, NaN intrinsics: evaluation"):
        argv = ["--model_id", str(tiny_folder), "--pixel_data_type", "depth", "--image_tokens", "one_tile"]
        assert frame_path(row) in refused(EVALUATION, [*argv, "--output", str(tmp_path / "results")], capsys)
    with fault_table.trial("depth of another size, NaN intrinsics: --check"):
        assert "1 frames cannot be used" in refused(PREPARATION, ["--root", str(own), "--check"], capsys)


def test_a_name_that_steers_a_terminal(fault_table, places, tiny_folder, tmp_path, capsys):
    script = load_script(EVALUATION)
    argv = ["--model_id", str(tiny_folder), "--image_tokens", "one_tile", "--gts_type", "val", "--max_new_tokens", "2"]
    with fault_table.trial("control characters and markup, --name"):
        script.main(script.parse_args([*argv, "--name", EVIL_NAME, "--output", str(tmp_path / "results")]))
        said = capsys.readouterr()
        assert not [mark for mark in STEERING if mark in said.out + said.err]
