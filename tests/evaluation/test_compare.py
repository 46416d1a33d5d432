"""The comparison of systems: same questions or an error, right numbers in the table, pictures that show the frames."""

import csv
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.questions.rows import QUESTION_TYPES
from dataset.sunrgbd.depth import encode_sunrgbd
from evaluation import compare, comparison, figures
from evaluation.intervals import paired_difference, permutation_test
from evaluation.metrics import evaluate_rows
from tests.helpers.hostile import EVIL_NAME, STEERING
from utils import ROOT, UserError

N_IMAGES = 10
ANSWERS = {
    "Object Identification": ("chair", "desk"),
    "Color Identification": ("white", "brown"),
    "Count": ("two", "three"),
    "Direction": ("left", "right"),
    "Proximity": ("the night stand", "bed"),
    "Yes/No": ("yes", "no"),
}


def question_rows() -> list[dict]:
    rows = []
    for image in range(N_IMAGES):
        for kind in QUESTION_TYPES:
            rows.append(
                {
                    "Question_Id": str(len(rows) + 1),
                    "Questions": f"What about {kind} in this room, which has $5 and _some_ other things in it?",
                    "Question_Type": kind,
                    "Answers": ANSWERS[kind][image % 2],
                    "Image_Path": f"SUNRGBD/frame{image}/image/rgb.png",
                    "Depth_Path": f"SUNRGBD/frame{image}/depth/depth.png",
                }
            )
    return rows


def answered(rows: list[dict], accuracy: float, seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    wrong = {kind: dict(zip(pair, pair[::-1], strict=True)) for kind, pair in ANSWERS.items()}
    return [
        row
        | {"Model_Answer": row["Answers"] if rng.random() < accuracy else wrong[row["Question_Type"]][row["Answers"]]}
        for row in rows
    ]


def write_results(folder: Path, rows: list[dict], *, name: str | None = None, blind: dict | None = None) -> Path:
    folder.mkdir(parents=True)
    with open(folder / "predictions.csv", "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    metrics = evaluate_rows(rows, blind=blind) | ({"system": {"name": name}} if name else {})
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A data folder with small frames: a colored room and a slanted depth with a hole."""
    for image in range(N_IMAGES):
        frame = tmp_path / "data" / "SUNRGBD" / f"frame{image}"
        (frame / "image").mkdir(parents=True)
        (frame / "depth").mkdir()
        Image.new("RGB", (64, 48), (20 * image, 120, 200 - 20 * image)).save(frame / "image" / "rgb.png")
        depth_m = np.tile(np.linspace(1, 3 + image / 5, 64), (48, 1))
        depth_m[10:20, 30:50] = 0
        Image.fromarray(encode_sunrgbd(depth_m)).save(frame / "depth" / "depth.png")
    return tmp_path / "data"


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    rows = question_rows()
    blind = {"majority_per_type": [ANSWERS[row["Question_Type"]][0] for row in rows]}
    return [
        write_results(tmp_path / "results_a", answered(rows, 0.5, 1), name="label-only student", blind=blind),
        write_results(tmp_path / "results_b", answered(rows, 0.8, 2), name="distilled student", blind=blind),
        write_results(tmp_path / "results_c", answered(rows, 0.9, 3)),
    ]


def load(folders: list[Path]) -> list[comparison.Results]:
    return [comparison.load_results(folder) for folder in folders]


def rewrite(folder: Path, change) -> None:
    path = folder / "predictions.csv"
    with open(path, encoding="utf-8", newline="") as handle:
        rows = change(list(csv.DictReader(handle)))
    with open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def test_names_come_from_the_metrics_and_else_from_the_folder(folders):
    assert [result.name for result in load(folders)] == ["label-only student", "distilled student", "results_c"]


def test_table_agrees_with_metrics_and_statistics(folders):
    results = load(folders)
    table = comparison.comparison_table(results, "distilled student")
    assert [row.name for row in table] == [result.name for result in results] + ["blind: majority_per_type"]
    assert list(table[0].accuracies) == ["Overall", *QUESTION_TYPES]
    for row, folder in zip(table, folders, strict=False):
        stored = json.loads((folder / "metrics.json").read_text())
        assert row.accuracies["Overall"] == stored["overall"]["exact_match"]
        assert row.accuracies["Yes/No"] == stored["per_type"]["Yes/No"]["exact_match"]
    rooms = [row["Image_Path"] for row in results[0].rows]
    assert table[0].difference == paired_difference(results[0].correct(), results[1].correct(), rooms)
    assert table[0].difference[0] < 0 < table[2].difference[0] + 1
    assert table[0].p_value == permutation_test(results[0].correct(), results[1].correct(), rooms)
    assert table[1].difference is None and table[1].p_value is None
    assert table[-1].blind and table[-1].accuracies["Overall"]["value"] == 0.5


def test_pictures_of_one_recording_are_one_cluster(tmp_path):
    """Two SUN3D scans of five frames each: two rooms cannot tell two systems apart, and the report says so."""
    rows = [
        row | {"Image_Path": f"SUNRGBD/xtion/sun3ddata/hotel/scan{n // 30}/{n // 6}/image/rgb.jpg"}
        for n, row in enumerate(question_rows())
    ]
    results = load(
        [write_results(tmp_path / str(share), answered(rows, share, 1), name=str(share)) for share in (0.3, 1)]
    )
    _, better = comparison.comparison_table(results)
    assert better.p_value == 0.5 and better.difference[0] > 0.5
    cell = evaluate_rows(results[0].rows)["overall"]
    assert (cell["n_images"], cell["n_recordings"]) == (10, 2)
    text = comparison.explanation(results)
    assert "10 images of 2 recordings" in text.replace("\n", " ") and "resample recordings" in text.replace("\n", " ")


def test_what_depth_can_answer_has_a_column_of_its_own(tmp_path):
    rows = [
        row | {"depth_answerable": str(int(not row["Question_Type"].startswith("Color")))} for row in question_rows()
    ]
    wrong = [row | {"Model_Answer": row["Answers"] if row["depth_answerable"] == "1" else "?"} for row in rows]
    (row,) = comparison.comparison_table(load([write_results(tmp_path / "a", wrong, name="a")]))
    assert list(row.accuracies)[:2] == ["Overall", "By depth"]
    assert row.accuracies["By depth"]["value"] == 1 > row.accuracies["Overall"]["value"]


def test_row_order_does_not_matter(folders):
    before = comparison.comparison_table(load(folders))
    rewrite(folders[1], lambda rows: rows[::-1])
    assert comparison.comparison_table(load(folders)) == before


def drop_last(rows):
    return rows[:-1]


def change_answer(rows):
    return [rows[0] | {"Answers": "sofa"}, *rows[1:]]


def rename_id(rows):
    return [rows[0] | {"Question_Id": "x1"}, *rows[1:]]


@pytest.mark.parametrize("change", [drop_last, change_answer, rename_id])
def test_different_questions_are_an_error_that_names_the_system(folders, change):
    rewrite(folders[1], change)
    with pytest.raises(UserError, match="distilled student"):
        comparison.comparison_table(load(folders))


def test_repeated_ids_and_missing_columns_name_the_file(folders):
    rewrite(folders[0], lambda rows: [*rows, rows[0]])
    with pytest.raises(UserError, match=r"results_a.*Question_Id 1 occurs 2 times"):
        comparison.load_results(folders[0])
    rewrite(folders[1], lambda rows: [{k: v for k, v in row.items() if k != "Model_Answer"} for row in rows])
    with pytest.raises(UserError, match=r"results_b.*Model_Answer"):
        comparison.load_results(folders[1])


def test_missing_and_damaged_files_are_user_errors(folders):
    (folders[0] / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"metrics\.json"):
        comparison.load_results(folders[0])
    (folders[1] / "predictions.csv").unlink()
    with pytest.raises(UserError, match=r"predictions\.csv: missing"):
        comparison.load_results(folders[1])


def test_cut_and_undecodable_predictions_are_user_errors(folders):
    path = folders[0] / "predictions.csv"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2].rsplit(b",", 2)[0])
    with pytest.raises(UserError, match=r"predictions\.csv: row \d+ has more or fewer cells"):
        comparison.load_results(folders[0])
    path.write_bytes(content + b"\xff\xfe,\n")
    with pytest.raises(UserError, match="not a UTF-8 CSV"):
        comparison.load_results(folders[0])


def test_unknown_baseline_and_equal_names_are_user_errors(folders):
    results = load(folders)
    with pytest.raises(UserError, match="no such system"):
        comparison.comparison_table(results, "nobody")
    with pytest.raises(UserError, match="2 results are named"):
        comparison.comparison_table([results[0], results[0]])


def test_blind_baselines_of_other_training_data_are_refused(tmp_path, folders):
    rows = question_rows()
    other = {"majority_per_type": ["nothing"] * len(rows)}
    odd = write_results(tmp_path / "results_odd", answered(rows, 0.7, 5), name="odd", blind=other)
    with pytest.raises(UserError, match="odd: its blind baselines differ"):
        comparison.comparison_table(load([*folders, odd]))


def test_text_columns_are_aligned_and_markdown_has_equal_cells(folders):
    table = comparison.comparison_table(load(folders))
    header, rule, *lines = comparison.text_table(table).splitlines()
    assert len(lines) == 2 * len(table) and set(rule) == {"-"}
    ends = {header.index(word) + len(word) for word in ("Overall", "Object", "Yes/No")}
    for value_line in lines[::2]:
        for end in ends:
            assert value_line[end - 1].isdigit() and (len(value_line) == end or value_line[end] == " ")
    assert len({line.count("|") for line in comparison.markdown_table(table).splitlines()}) == 1


def test_a_constant_answer_is_pointed_out(folders):
    rewrite(
        folders[1],
        lambda rows: [r | {"Model_Answer": "1" if r["Question_Type"] == "Count" else r["Answers"]} for r in rows],
    )
    assert comparison.collapses(load(folders[1:2])) == ["distilled student answers '1' to 100 % of Count."]


def test_sampled_questions_show_right_and_wrong_of_different_images(folders):
    results = load(folders)
    chosen = figures.sample_questions(results, 8)
    assert chosen == figures.sample_questions(results, 8) and len(chosen) == 8
    assert len({results[0].rows[place]["Image_Path"] for place in chosen}) == 8
    right = np.mean([result.correct() for result in results], axis=0)[chosen] >= 0.5
    assert 0 < right.sum() < 8
    assert len({results[0].rows[place]["Question_Type"] for place in chosen}) == 6
    assert len(figures.sample_questions(results, 99)) == N_IMAGES


def test_report_writes_readable_files(folders, world, tmp_path):
    output = tmp_path / "report"
    text = compare.write_report(load(folders), output, world, baseline="distilled student")
    assert sorted(path.name for path in output.iterdir()) == [
        "accuracy.png",
        "contact_sheet.png",
        "report.html",
        "table.md",
        "table.txt",
    ]
    assert (output / "table.txt").read_text() == text and "points above distilled student" in " ".join(text.split())
    for name in ("accuracy.png", "contact_sheet.png"):
        with Image.open(output / name) as image:
            assert image.width > 1000
            assert len(np.unique(np.asarray(image.convert("L")))) > 20


def test_contact_sheet_shows_the_images(folders, world, tmp_path):
    marker = (255, 0, 255)
    for path in world.rglob("rgb.png"):
        Image.new("RGB", (64, 48), marker).save(path)
    figures.draw_contact_sheet(load(folders)[:1], tmp_path / "sheet.png", world, n_frames=2)
    with Image.open(tmp_path / "sheet.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels == marker).all(axis=-1).mean() > 0.05
    hole = np.array([0xB0] * 3)
    assert (pixels == hole).all(axis=-1).mean() > 0.005


def test_image_paths_may_not_leave_the_data_folder(folders, world, tmp_path):
    (tmp_path / "secret.png").write_bytes((world / "SUNRGBD/frame0/image/rgb.png").read_bytes())
    rewrite(folders[0], lambda rows: [row | {"Image_Path": "../secret.png"} for row in rows])
    with pytest.raises(UserError, match="leaves the data folder"):
        figures.draw_contact_sheet(load(folders[:1]), tmp_path / "sheet.png", world)
    assert not (tmp_path / "sheet.png").exists()


def test_unreadable_image_names_the_file(folders, world, tmp_path):
    for path in world.rglob("rgb.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"rgb\.png: image cannot be read"):
        figures.draw_contact_sheet(load(folders), tmp_path / "sheet.png", world)


def test_command_runs_from_another_folder(folders, world, tmp_path):
    command = [sys.executable, ROOT / "evaluation" / "compare.py", *folders, "--output", "out", "--data_root", world]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "distilled student" in done.stdout and (tmp_path / "out" / "contact_sheet.png").is_file()
    failed = subprocess.run([*command, "--baseline", "nobody"], cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.startswith("error: --baseline nobody")


def test_a_strangers_names_reach_no_table_raw(tmp_path, world):
    """Neither escapes for the terminal nor markup; other scripts pass unharmed, and without a warning of the plot's."""
    rows = [row | {"Question_Type": row["Question_Type"] + "\x1b[2J"} for row in answered(question_rows(), 0.0, seed=1)]
    folder = write_results(tmp_path / "a", rows, name=EVIL_NAME + " Tür 椅子")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare.write_report([comparison.load_results(folder)], tmp_path / "out", world)
    for name in ("table.txt", "table.md"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "Tür 椅子" in text and not any(mark in text for mark in STEERING)
    assert "<script>" not in text and r"\<script\>" in text and r"\x9b2J\|" in text


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"system": "x"}', '{"system": {"name": ["x"]}}'])
def test_metrics_of_another_form_are_named(folders, text):
    (folders[0] / "metrics.json").write_text(text)
    with pytest.raises(UserError, match="metrics.json"):
        comparison.load_results(folders[0])


def test_pictures_on_another_disk_are_shown(folders, world, tmp_path):
    (world / "SUNRGBD/frame0").rename(tmp_path / "other_disk")
    (world / "SUNRGBD/frame0").symlink_to(tmp_path / "other_disk")
    figures.draw_contact_sheet(load(folders[:1]), tmp_path / "sheet.png", world, n_frames=N_IMAGES)
    assert (tmp_path / "sheet.png").is_file()
