"""The page of a comparison, through the command that writes it."""

import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest

from dataset.page import picture_uri
from dataset.questions.manifest import cells_digest
from evaluation import compare
from evaluation.comparison import load_results
from evaluation.gallery import LONGEST_URI, N_QUESTIONS, PICTURE_WIDTH, change_names, sample_gallery
from evaluation.intervals import paired_difference
from evaluation.metrics import recordings
from tests.helpers.hostile import MARKUP, STEERING
from utils import UserError

BASE, OTHER, TEACHER = "labels only", "distilled", "RGB teacher"


class Page(HTMLParser):
    """Tags with the names of their attributes, the text, and what attributes hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.values, self.words, self.raw = Counter(), [], [], text
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags[tag, tuple(sorted(name for name, _ in attributes))] += 1
        self.values += [(tag, name, value or "") for name, value in attributes]

    def handle_data(self, data):
        if self.lasttag not in ("style", "script"):
            self.words.append(data)


def write(folders, output, world, *more: str) -> Page:
    argv = [*map(str, folders), "--output", str(output), "--data_root", str(world), *more]
    compare.main(compare.parse_args(argv))
    return Page((output / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def folders(scored, training):
    return [
        scored(BASE, 0.4, training=training, questions=scored.questions),
        scored(OTHER, 0.9, training=training | {"labels": None}, questions=scored.questions),
        scored(TEACHER, 0.95, modality="rgb", questions=scored.questions),
    ]


def test_the_headline_is_the_paired_difference_by_depth_of_what_sees_the_same(folders, world, tmp_path):
    page = write(folders, tmp_path / "out", world)
    base, other, _ = map(load_results, folders)
    asked = [n for n, row in enumerate(base.rows) if row["depth_answerable"] == "1"]
    ours, theirs = ([result.correct()[n] for n in asked] for result in (other, base))
    value, low, high = (100 * v for v in paired_difference(ours, theirs, recordings([base.rows[n] for n in asked])))
    assert f"{OTHER}: {value:.1f} points more than {BASE}" in page.text
    assert f"{value:+.1f} [{low:+.1f}, {high:+.1f}] points" in page.text
    blind = base.metrics["blind"]["majority_per_type"]["depth_answerable"]["exact_match"]["value"]
    assert f"The best guess without a picture has {100 * blind:.1f}" in page.text.replace("\xa0", " ")


def test_no_difference_is_called_one(scored, world, tmp_path):
    page = write([scored("a", 0.5), scored("b", 0.5)], tmp_path / "out", world)
    assert "No difference can be told between b and a" in page.text
    assert "0.0 [+0.0, +0.0]" in page.text


def test_one_system_alone_has_a_page(scored, world, tmp_path):
    page = write([scored("a", 0.5)], tmp_path / "out", world)
    assert re.search(r"a: \d+\.\d\s% right", page.text) and "mended" not in page.raw.split("<main>")[1]


def test_every_number_of_the_table_is_on_the_page(folders, world, tmp_path):
    page = write(folders, tmp_path / "out", world, "--baseline", BASE)
    for result in map(load_results, folders):
        for kind, cell in (result.metrics["per_type"] | {"x": result.metrics["overall"]}).items():
            own = cell["exact_match"]
            shown = f"{100 * own['value']:.1f} [{100 * own['low']:.1f}, {100 * own['high']:.1f}]"
            assert shown in page.text, kind


def test_systems_are_described_and_curves_drawn(folders, world, tmp_path, ladder):
    record = tmp_path / "ladder"
    record.mkdir()
    (record / "robustness.json").write_text(json.dumps(ladder(OTHER, BASE)))
    page = write(folders, tmp_path / "out", world, "--robustness", str(record))
    for part in ("run/best.ckpt", "--lr 0.001 --max_epochs 3", "rgb_teacher", "50 %", "depth (metric_log3, raw)"):
        assert part in page.text
    labels = [value for _, name, value in page.values if name == "aria-label"]
    assert f"Training loss of {BASE}: 2.5 at update 9, 0.75 at update 29." in labels
    (holes,) = [label for label in labels if label.startswith("Round holes (clean, 15 %, 30 %, 60 %)")]
    assert f"{OTHER}: 75, 62, 50, 38." in holes
    assert "66.7 [61.7, 71.7]" in page.text
    assert load_results(folders[0]).metrics["questions"]["manifest"] in page.text
    # A system has one color everywhere on the page, in whatever order the ladder names them.
    legends = re.findall(r'stroke="(#\w+)" stroke-width="3"[^>]*/></svg>([^<]+)</li>', page.raw)
    assert len(legends) == 5 and len({color for color, name in legends if name == BASE}) == 1


def test_what_was_not_measured_is_said(scored, world, tmp_path):
    page = write([scored("a", 0.5)], tmp_path / "out", world)
    assert "Not measured: evaluation/robustness.py" in page.text and "No results here have training curves" in page.text


def test_the_gallery_is_drawn_evenly_and_always_the_same(folders):
    base, other, _ = map(load_results, folders)
    changes = change_names(base, other)
    chosen = sample_gallery(base.rows, changes, 24)
    assert chosen == sample_gallery(base.rows, changes, 24) and len(set(chosen)) == 24
    assert len({base.rows[p]["Image_Path"] for p in chosen}) == 8  # all pictures there are
    assert {changes[p] for p in chosen} == set(changes)
    assert {base.rows[p]["Question_Type"] for p in chosen} == {row["Question_Type"] for row in base.rows}
    assert len(sample_gallery(base.rows, changes, 10**6)) == len(base.rows)
    for position, change in enumerate(changes):
        before, after = (result.correct()[position] for result in (base, other))
        assert change == {(0, 1): "mended", (1, 0): "broken", (1, 1): "both", (0, 0): "none"}[before, after]


def test_answers_have_their_probability_and_whether_they_are_right(folders, world, tmp_path):
    page = write(folders, tmp_path / "out", world)
    base = load_results(folders[0])
    row = base.rows[sample_gallery(base.rows, ["both"] * len(base.rows), 1)[0]]
    mark = "✓" if row["Model_Answer"] == row["Answers"] else "✗"
    assert f"{mark} {BASE}: {row['Model_Answer']} {float(row['Probability']):.2f}" in page.text


def test_confusion_counts_every_question_once(folders, world, tmp_path):
    page = write(folders, tmp_path / "out", world)
    tables = re.findall(r'<table class="confusion">(.*?)</table>', page.raw, re.DOTALL)
    totals = [sum(map(int, re.findall(r'<td class="n">(\d+)</td></tr>', table))) for table in tables]
    left_out = sum(map(int, re.findall(r"(\d+) questions with rarer answers are left out", page.text)))
    assert sum(totals) + left_out == 3 * len(load_results(folders[0]).rows)


def test_the_page_is_one_file_without_a_request(folders, world, tmp_path):
    page = write(folders, tmp_path / "out", world)
    links = [value for tag, name, value in page.values if name in ("src", "href", "action", "data", "srcset", "poster")]
    links = [link for link in links if not link.startswith("#")]  # to its own sections
    assert len(links) == 16 and all(link.startswith("data:image/webp;base64,") for link in links)
    assert "url(" not in page.raw and "@import" not in page.raw
    policy = next(value for _, name, value in page.values if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-")
    assert not any(name.startswith("on") for _, name, _ in page.values)


def test_hostile_text_is_no_markup(scored, training, world, tmp_path, ladder):
    """A page of hostile questions, answers, names and flags has the very tags of one of harmless ones."""

    def texts(number: int, words):
        def change(row):
            n = int(row["Question_Id"][:8], 16)
            gold, given, question = (words[(n + k) % len(words)] for k in (0, 7, 13))
            return row | {"Questions": f"{n} {question}", "Answers": gold, "Model_Answer": given}

        told = training | {"teacher": words[number], "flags": {"name": words[number + 1]}, "script": words[number + 2]}
        return dict(change=change, training=told)

    pages = []
    for kind, words in (("plain", [f"word {n}" for n in range(len(MARKUP))]), ("hostile", MARKUP)):
        results = [scored(words[n] + f" {n}", 0.5, **texts(n, words)) for n in range(3)]
        record = tmp_path / kind
        record.mkdir()
        (record / "robustness.json").write_text(json.dumps(ladder(*words[20:23])))
        pages.append(write(results, tmp_path / f"out_{kind}", world, "--robustness", str(record)))
    plain, hostile = pages
    assert hostile.tags == plain.tags
    assert sum("ran=1" in word for word in hostile.words) > 20  # they are there, as text
    assert not any(mark in hostile.raw for mark in STEERING)
    assert "{{ 7 * 7 }}" in hostile.text  # no template of a stranger is filled


def test_missing_pictures_leave_a_page_that_says_so(folders, world, tmp_path, capsys):
    page = write(folders, tmp_path / "out", tmp_path / "nowhere")
    assert "8 of 8 pictures are not shown: " in page.text and "nowhere" in page.text
    assert page.tags["img", ("alt", "src")] == 0 and "Right answer:" in page.text
    said = capsys.readouterr()
    assert "no contact_sheet.png, and report.html lacks pictures: " in said.err and len(said.err.splitlines()) == 2
    assert "written:" in said.out and "contact_sheet" not in said.out
    shutil.copytree(world, tmp_path / "some")
    for path in list((tmp_path / "some" / "SUNRGBD").rglob("image/*.jpg"))[::2]:
        path.unlink()
    assert re.search(r"\d of 8 pictures are not shown", write(folders, tmp_path / "out", tmp_path / "some").text)


def test_paths_may_not_leave_the_data_folder(scored, world, tmp_path):
    folder = scored("a", 0.5, change=lambda row: row | {"Image_Path": "../secret.png"})
    with pytest.raises(UserError, match="leaves the data folder"):
        write([folder], tmp_path / "out", world)


def test_results_of_other_questions_are_refused_by_their_digest(scored, world, tmp_path):
    """Also where every cell that the tables are made of is the same."""
    first = scored("a", 0.5, questions=scored.questions)
    elsewhere = scored("b", 0.5, change=lambda row: row | {"scene": "kitchen"})
    metrics = json.loads((elsewhere / "metrics.json").read_text())
    digest = cells_digest(load_results(elsewhere).rows)
    (elsewhere / "metrics.json").write_text(json.dumps(metrics | {"questions": {"sha256": digest}}))
    with pytest.raises(UserError, match=f"^b: answered other questions than a .their SHA-256 is {digest[:12]}, there"):
        write([first, elsewhere], tmp_path, world)
    (elsewhere / "metrics.json").write_text(json.dumps(metrics))  # older results, whose cells alone are compared
    assert write([first, elsewhere], tmp_path / "out", world)


def test_predictions_that_were_changed_are_not_those_of_their_digest(scored, world, tmp_path):
    def change(row):
        return row | {"Questions": row["Questions"].replace("?", " now?")}

    folder = scored("a", 0.5, questions=scored.questions, change=change)
    with pytest.raises(UserError, match=r"predictions.csv: holds other questions than metrics.json names"):
        write([folder], tmp_path, world)


def test_a_page_of_rendered_rooms_says_so(scored, world, tmp_path):
    system = {"name": "a", "split": "test", "miniature": True}
    page = write([scored("a", 0.5, system=system)], tmp_path / "out", world)
    assert "the built-in miniature world of rendered rooms, test split" in page.text
    assert "SUN RGB-D, test split" in write([scored("a", 0.5)], tmp_path / "out", world).text


def test_a_ladder_of_another_model_with_the_same_name_is_refused(scored, world, tmp_path, ladder):
    record = ladder("a")
    record["systems"][0]["model"] = "/somewhere/else/best.ckpt"
    (tmp_path / "robustness.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="a is else/best.ckpt there, and run/best.ckpt in its results"):
        write([scored("a", 0.5)], tmp_path / "out", world, "--robustness", str(tmp_path))


def test_stages_before_are_named(scored, training, world, tmp_path):
    told = training | {"flags": {"load_checkpoint": "/home/me/phase2/best.ckpt"}}
    page = write([scored("a", 0.5, training=told)], tmp_path / "out", world)
    assert "it started from an earlier run, phase2/best.ckpt" in page.text and "/home/me" not in page.raw


def test_one_recording_has_no_interval(scored, world, tmp_path):
    one = [scored(n, s, change=lambda row: row | {"Recording": "r"}) for n, s in (("a", 0.2), ("b", 0.9))]
    page = write(one, tmp_path / "out", world)
    assert "nan" not in page.text and "No difference can be told" in page.text


def test_the_best_of_several_is_said_to_be_chosen(scored, world, tmp_path):
    page = write([scored("a", 0.2), scored("b", 0.9), scored("c", 0.8)], tmp_path / "out", world)
    assert "b: " in page.text and "chosen here as the best of 2" in page.text


def test_results_of_other_code_lack_columns(scored, world, tmp_path):
    """What depth can answer is not known of all: the page is about all questions then."""

    def foreign(row):
        kept = ("Question_Id", "Questions", "Question_Type", "Answers", "Model_Answer", "Image_Path", "Depth_Path")
        return {name: row[name] for name in kept}

    ours, theirs = scored("ours", 0.9), scored("theirs", 0.5, change=foreign, system={"name": "theirs"}, blind=None)
    for order in ([ours, theirs], [theirs, ours]):
        page = write(order, tmp_path / "out", world)
        assert "Of the questions asked, " in page.text and "points" in page.text
        legend = {
            name: color
            for color, name in re.findall(r'stroke="(#\w+)" stroke-width="3"[^>]*/></svg>(\w+)</li>', page.raw)
        }
        bars = re.findall(r'class="name">(\w+)</span>.*?background: (#\w+)"', page.raw)
        assert len(bars) > 7 and all(legend[name] == color for name, color in bars)


def test_pictures_of_any_detail_leave_the_page_below_five_megabytes():
    """Noise, which no picture codec makes smaller, in every one of the most pictures that a page has."""
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    uri = picture_uri(noise, width=PICTURE_WIDTH, most=LONGEST_URI)
    assert 2 * N_QUESTIONS * len(uri) < 4_500_000
    smooth = np.tile(np.linspace(0, 255, 640).astype(np.uint8)[None, :, None], (480, 1, 3))
    assert len(picture_uri(smooth, width=PICTURE_WIDTH, most=LONGEST_URI)) < LONGEST_URI


ODD = [
    {"system": {"name": ["x"]}}, {"system": {"modality": ["depth"]}}, {"system": "x"}, {"date": 3}, {"questions": "x"},
    {"questions": {"sha256": 3}}, {"training": [1]}, {"training": {"curves": [1]}}, {"training": {"labels": "all"}},
    {"training": {"curves": {"train/loss": [[1, float("nan")], [2, 1.0]]}}}, {"training": {"flags": ["x"]}},
    {"training": {"curves": {"train/loss": [[1], [2]]}}}, {"training": {"script": 3}},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_what_no_evaluation_writes_is_named(scored, world, tmp_path, odd):
    with pytest.raises(UserError, match=f"metrics.json: {next(iter(odd))} is not what an evaluation writes"):
        write([scored("a", 0.5, **odd)], tmp_path / "out", world)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("questions.n_questions", "<img src=x>"),
        ("blind.accuracy.By depth", {}),
        ("systems.0.summary.By depth", [1]),
        ("systems.0.summary.By depth.mean.value", "x"),
        ("systems.0.rungs.1.severity", 0.2),
        ("systems.0.rungs.1.kind", "fire"),
        ("systems.0.rungs.1.accuracy.By depth.low", "x"),
        ("systems.0.modality", "sound"),
        ("systems.0.rungs", []),
    ],
)
def test_a_ladder_that_was_changed_is_named(scored, world, tmp_path, ladder, place, value):
    record = json.loads(json.dumps(ladder("a")))
    *parents, last = (int(part) if part.isdecimal() else part for part in place.split("."))
    inner = record
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    (tmp_path / "robustness.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="robustness.json: is not what robustness.py writes"):
        write([scored("a", 0.5)], tmp_path / "out", world, "--robustness", str(tmp_path))


def test_lists_in_another_order_are_no_confusion(scored, world, tmp_path):
    def change(row):
        return row | {"Answers": "chair, table", "Model_Answer": "table, chair", "Question_Type": "Count"}

    page = write([scored("a", 0.5, change=change)], tmp_path / "out", world)
    (line,) = re.findall(r'scope="row">chair table</th>(.*?)</tr>', page.raw)
    assert re.findall(r">(\d*)</td>", line) == ["59", "", "59"]


@pytest.mark.parametrize("content", ["{", "{}", '{"systems": []}', '{"systems": [{"name": 1}]}'])
def test_what_is_no_ladder_is_named(scored, world, tmp_path, content):
    (tmp_path / "robustness.json").write_text(content)
    with pytest.raises(UserError, match="robustness.json: "):
        write([scored("a", 0.5)], tmp_path / "out", world, "--robustness", str(tmp_path))
    with pytest.raises(UserError, match="nowhere/robustness.json"):
        write([scored("a", 0.5)], tmp_path / "out", world, "--robustness", str(tmp_path / "nowhere"))
