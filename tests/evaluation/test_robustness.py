"""The ladder through its command: rungs equal evaluations, same pictures for all, resumed, summed up, refused."""

import csv
import json

import numpy as np
import pytest
import torch

from dataset.inputs import pictures
from dataset.inputs.degradations import DEPTH_LADDER, LIGHT_LADDER, TRAINED, Degradation
from dataset.questions.rows import questions_file, read_questions
from distillation.models import MINIATURE_STUDENT
from evaluation import robustness
from evaluation.intervals import cluster_bootstrap_ci
from evaluation.ladder import CLEAN, Asked, Climb, crossings, exposure_name, mean_difference, summarise
from tests.helpers.evaluation import evaluate
from tests.helpers.training import train
from utils import UserError

FEW = ("--kinds", "holes", "no_depth", "light_gain")


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """MAIN_ROOT_DATA_DIR with a run of the depth baseline, trained on degraded depth, and one of the RGB baseline."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOT_DATA_DIR", str(world))
        patch.setenv("MAIN_ROOT_DATA_DIR", str(out))
        train("baseline_depth", MINIATURE_STUDENT, "--lr", "5e-4", "--max_epochs", "6", "--depth_degradation", "0.5")
        train("baseline_rgb05b", MINIATURE_STUDENT, "--lr", "1e-5", "--export", str(out / "exported"))
    return out


@pytest.fixture
def places(world, trained, monkeypatch):
    monkeypatch.setenv("ROOT_DATA_DIR", str(world))
    monkeypatch.setenv("MAIN_ROOT_DATA_DIR", str(trained))
    return trained


@pytest.fixture
def depth(places):
    return str(places / "baseline_depth/checkpoints/t")


def climb(output, *argv: str) -> dict:
    """-> robustness.json"""
    short = () if str(argv[0]).startswith("--with") else ("--max_new_tokens", "6")
    robustness.main(robustness.parse_args([*map(str, argv), *short, "--output", str(output)]))
    return json.loads((output / "robustness.json").read_text())


def rows_of(output) -> list[dict[str, str]]:
    with open(output / "robustness.csv", encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def test_the_whole_ladder_of_both_kinds_of_system(places, depth, tmp_path, capsys):
    record = climb(tmp_path / "a", depth, places / "exported", "--names", "sees depth", "sees RGB")
    rungs = {system["name"]: [(r["kind"], r["severity"]) for r in system["rungs"]] for system in record["systems"]}
    expected = {"sees depth": DEPTH_LADDER, "sees RGB": LIGHT_LADDER}
    for name, ladder in expected.items():
        assert rungs[name] == [("clean", 0), *((kind, s) for kind, severities in ladder.items() for s in severities)]
    types = set(record["systems"][0]["rungs"][0]["accuracy"])
    assert {"By depth", "Overall", "Count", "Yes/No"} <= types
    assert len(rows_of(tmp_path / "a")) == sum(map(len, rungs.values())) * len(types)
    files = {path.name for path in (tmp_path / "a").iterdir() if not path.name.startswith("owner-")}
    assert files == {
        "robustness.csv",
        "robustness.json",
        "table.md",
        "curves.png",
        "light.png",
        "answers",
    }
    said = capsys.readouterr().out
    assert "Depth gets worse" in said and "The light fades" in said and "sees depth answers more than sees RGB" in said


def test_the_lowest_rung_is_the_evaluation_and_no_depth_is_one_answer_for_all(places, depth, world, tmp_path):
    record = climb(tmp_path / "a", depth, *FEW)
    clean, *_, none = record["systems"][0]["rungs"]
    _, metrics = evaluate(tmp_path / "b", "--ckpt_path", depth)
    assert 0.1 < metrics["overall"]["exact_match"]["value"] < 0.9
    for column, cell in (("Overall", metrics["overall"]), ("By depth", metrics["depth_answerable"])):
        assert clean["accuracy"][column] == pytest.approx(cell["exact_match"])
    lines = (
        (tmp_path / "a" / "answers" / "baseline_depth_t" / "no_depth_1" / "answers.jsonl").read_text().splitlines()[1:]
    )
    answers = {line["id"]: line["answer"] for line in map(json.loads, lines)}
    by_question = {}
    for row in read_questions(questions_file(world, "test"), root=world):
        by_question.setdefault(row.question, set()).add(answers[row.id])
    assert none["kind"] == "no_depth" and max(map(len, by_question.values())) == 1


def test_all_systems_get_the_very_same_pictures(places, depth, tmp_path, monkeypatch):
    seen, encode = [], pictures.encode_view

    def remember(view, settings):
        seen.append(view.depth_m)
        return encode(view, settings)

    monkeypatch.setattr(pictures, "encode_view", remember)
    climb(tmp_path / "a", depth, depth, "--names", "one", "two", "--kinds", "holes", "--batch_size", "3")
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(first) == 4 * 8 and all((a == b).all() for a, b in zip(first, second, strict=True))
    clean, mild = np.array(first[:8]), np.array(first[8:16])
    assert (mild == 0).mean() == pytest.approx((clean == 0).mean() + 0.15 * (clean > 0).mean(), abs=0.05)


def test_an_interrupted_call_goes_on_and_another_system_is_refused(places, depth, tmp_path, monkeypatch):
    whole = climb(tmp_path / "a", depth, *FEW, "--names", "mine")
    answer, asked = robustness.answer_questions, []

    def stops_at_the_third(*args):
        asked.append(args[-1])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answer(*args)

    monkeypatch.setattr(robustness, "answer_questions", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        climb(tmp_path / "b", depth, *FEW, "--names", "mine")
    monkeypatch.setattr(robustness, "answer_questions", answer)
    log = tmp_path / "b/answers/mine/holes_0.15/answers.jsonl"
    kept = log.read_text()
    again = climb(tmp_path / "b", depth, *FEW, "--names", "mine")
    assert again["systems"] == whole["systems"] and log.read_text() == kept
    with pytest.raises(UserError, match="holds answers of another evaluation, weights"):
        climb(tmp_path / "b", places / "exported", "--names", "mine")


def test_systems_of_an_earlier_call_and_differences_from_a_baseline(places, depth, tmp_path):
    climb(tmp_path / "a", depth, *FEW, "--names", "first")
    record = climb(tmp_path / "b", depth, *FEW, "--names", "second", "--with", tmp_path / "a", "--baseline", "first")
    second, first = record["systems"]
    assert [second["name"], first["name"]] == ["second", "first"]
    assert all(rung["accuracy"]["By depth"]["difference"] == [0, 0, 0] for rung in second["rungs"])
    assert second["summary"]["By depth"]["mean"]["difference"] == [0, 0, 0]
    assert not any("difference" in rung["accuracy"]["By depth"] for rung in first["rungs"])
    only = climb(tmp_path / "c", "--with", tmp_path / "b")
    assert [system["name"] for system in only["systems"]] == ["second", "first"]


@pytest.fixture(scope="module")
def asked(world):
    return Asked.of(read_questions(questions_file(world, "test"), root=world), miniature=True)


def random_climb(asked, rungs, seed, name="some", modality="depth") -> Climb:
    rng = np.random.default_rng(seed)
    return Climb(name, "", modality, {rung: rng.random(len(asked.answers)) < 0.5 for rung in rungs})


def test_mean_and_share_kept_are_those_of_the_trained_kinds(asked):
    rungs = [CLEAN, *(Degradation(kind, s) for kind in DEPTH_LADDER for s in DEPTH_LADDER[kind])]
    one, two = (random_climb(asked, rungs, seed) for seed in (0, 1))
    chosen = asked.columns["By depth"]
    nine = [rung for rung in rungs if rung.kind in TRAINED]
    assert len(nine) == 9 == len(one.counted())
    values = np.mean([one.right[rung][chosen] for rung in nine], axis=0)
    found = summarise(one, asked, "By depth")
    assert found["mean"]["value"] == pytest.approx(values.mean())
    assert found["kept"]["value"] == pytest.approx(values.mean() / one.right[CLEAN][chosen].mean())
    assert found["kept"]["low"] < found["kept"]["value"] < found["kept"]["high"]
    difference = values - np.mean([two.right[rung][chosen] for rung in nine], axis=0)
    low, high = cluster_bootstrap_ci(difference.tolist(), asked.recordings("By depth"))
    assert mean_difference(one, two, asked, "By depth") == pytest.approx((difference.mean(), low, high))


def test_where_the_lines_cross(asked):
    n = int(asked.columns["By depth"].sum())

    def right(share):
        answers = np.zeros(len(asked.answers), bool)
        answers[np.flatnonzero(asked.columns["By depth"])[: round(share * n)]] = True
        return answers

    exposures = LIGHT_LADDER["light"][:4]
    light = Climb(
        "a",
        "",
        "rgb",
        {CLEAN: right(0.9)}
        | {Degradation("light", e): right(s) for e, s in zip(exposures, (0.9, 0.8, 0.4, 0.2), strict=True)},
    )
    depth = Climb("b", "", "depth", {CLEAN: right(0.6)})
    between = crossings(light, depth, asked, "By depth")["light"]
    assert np.log2(between) == pytest.approx(-3, abs=0.3)  # half of the way from 1/4 to 1/16
    assert crossings(light, Climb("c", "", "depth", {CLEAN: right(0.1)}), asked, "By depth") == {"light": None}
    assert crossings(light, Climb("d", "", "depth", {CLEAN: right(0.95)}), asked, "By depth") == {"light": 1}


def test_one_picture_has_no_intervals(places, depth, tmp_path):
    record = climb(tmp_path / "a", depth, depth, "--names", "a", "b", *FEW, "--n_images", "1", "--baseline", "a")
    found = record["systems"][0]["summary"]["By depth"]
    assert record["questions"]["n_images"] == 1 and found["mean"]["low"] is None and "kept" not in found
    assert "nan" not in (tmp_path / "a" / "table.md").read_text().lower()


def test_all_that_can_be_refused_is_refused_before_anything_is_scored(places, depth, tmp_path, monkeypatch):
    monkeypatch.setattr(robustness, "climb_ladder", lambda *args: pytest.fail("scored"))
    for argv, complaint in (
        ((depth, depth, *FEW), "two systems are called baseline_depth t"),
        ((depth, depth, "--names", "a b", "a_b", *FEW), "two systems are called a_b"),
        ((depth, "--names", "..", *FEW), "cannot be called '..'"),
        ((depth, *FEW, "--baseline", "nobody"), "--baseline nobody: no such system"),
        ((depth, *FEW, "--with", tmp_path), "has no robustness.json"),
        ((depth, places / "exported", "--kinds", "holes"), "--kinds holes: none of them is about rgb"),
    ):
        with pytest.raises(UserError, match=complaint):
            climb(tmp_path / "out", *argv)


def test_bad_input_is_refused(places, depth, tmp_path, capsys):
    for argv, complaint in (
        ((depth, "--kinds", "fog"), "invalid choice: 'fog'"),
        (("--kinds", "holes"), "give a checkpoint"),
        ((depth, "--names", "a", "b"), "2 names for 1 systems"),
        ((depth, "--n_images", "0"), "--n_images"),
        (("--with", "x", "--kinds", "holes"), "--kinds: nothing is scored here"),
        (("--with", "x", "--output", "x"), "is the --output, too"),
    ):
        with pytest.raises(SystemExit):
            robustness.parse_args(list(argv))
        assert complaint in capsys.readouterr().err
    rgb = places / "exported"
    for argv, complaint in (
        ((depth, "--ladder", "light"), "--ladder light: .* sees depth"),
        ((rgb, "--ladder", "depth"), "--ladder depth: .* sees rgb"),
        ((depth, "--kinds", "light"), "--kinds light: none of them is about depth"),
    ):
        with pytest.raises(UserError, match=complaint):
            climb(tmp_path / "out", *argv)


def test_ladders_that_differ_are_refused(places, depth, tmp_path):
    climb(tmp_path / "a", depth, *FEW, "--names", "a")
    with pytest.raises(UserError, match="a and b are not on the same ladder: only one of them has"):
        climb(tmp_path / "b", depth, "--names", "b", "--kinds", "resolution", "--with", tmp_path / "a")
    with pytest.raises(UserError, match="its ladder differs, images was 8 and is 3 here"):
        climb(tmp_path / "c", depth, *FEW, "--names", "c", "--n_images", "3", "--with", tmp_path / "a")
    path = tmp_path / "a" / "robustness.json"
    path.write_text(path.read_text().replace('"right": "', '"right": "00'))
    with pytest.raises(UserError, match="is not what this command writes"):
        climb(tmp_path / "d", depth, *FEW, "--names", "d", "--with", tmp_path / "a")


def test_a_checkpoint_says_that_it_was_trained_with_degraded_depth(places, depth):
    (path,) = (places / "baseline_depth/checkpoints/t").glob("best*.ckpt")
    recorded = torch.load(path, weights_only=True)["hyper_parameters"]
    assert recorded["depth_degradation"] == 0.5


def test_exposures_are_written_as_people_write_them():
    exposures = (1, 1 / 1.34, 1 / 4, 1 / 350.4, 1 / 1024)
    assert [exposure_name(share) for share in exposures] == ["1", "1/1.34", "1/4", "1/350", "1/1024"]
