"""Caption scores: the tokenizer's rules, the published scores, and scores that must not be invented."""

import csv

import pytest

from evaluation import caption_scores as captions
from evaluation.caption_scores import caption_scores, tokenize


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A red Chair.", "a red chair"),
        ("no, there is none!", "no there is none"),
        ("3,500 chairs at 10:30", "3,500 chairs at 10:30"),
        ("It's the dogs' bed", "it 's the dogs bed"),
        ("don't, can't, cannot, gonna", "do n't ca n't can not gon na"),
        ("bed. desk, etc. and a sofa", "bed desk etc. and a sofa"),
        ("a (small) [red] {old} chair", "a -lrb- small -rrb- -lsb- red -rsb- -lcb- old -rcb- chair"),
        ('he said "yes"', "he said yes"),
        ("<unk> and <unk>", "<unk> and <unk>"),
        ("wait... what?! -- no", "wait what ?! no"),
        ("tv/monitor x-ray 50% r&b", "tv/monitor x-ray 50 % r & b"),
        ("", ""),
        (" . ", ""),
    ],
)
def test_tokens_are_those_of_the_treebank_tokenizer(text, tokens):
    assert tokenize(text) == tokens


@pytest.mark.parametrize("space", ["\r", "\n", "\u2028", "\x0b", "\t", "\u00a0"])
def test_any_white_space_is_one_space(space):
    assert tokenize(f"red{space}{space}chair{space}") == "red chair"


PUBLISHED = {  # BLEU-1, BLEU-2, ROUGE-L, CIDEr with the Java tokenizer
    "results_pre-trained_rgb_val_0.5b.csv": (0.30663, 0.02746, 0.37983, 0.93463),
    "results_pre-trained_rgb_val_7b.csv": (0.32231, 0.05279, 0.41390, 1.05784),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_scores_equal_those_with_the_java_tokenizer(samples, name):
    with open(samples / "original_predictions" / name, encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    scores = caption_scores(
        [row["Model_Answer"] for row in rows], [row["Answers"] for row in rows], [row["Question_Id"] for row in rows]
    )
    found = tuple(scores[key] for key in ("bleu_1", "bleu_2", "rouge_l", "cider"))
    assert found == pytest.approx(PUBLISHED[name], abs=1.01e-5)
    assert scores["notes"] == {}


def test_a_line_break_in_one_caption_moves_no_other(capsys):
    references = ["a red chair by the door"] * 3 + ["the white table of the kitchen"] * 3
    clean = caption_scores(references, references, list("abcdef"))
    broken = [*references[:2], "a red\rchair\u2028by the\n\ndoor", *references[3:]]
    assert caption_scores(broken, references, list("abcdef")) == clean
    assert clean["bleu_4"] == pytest.approx(1) and clean["rouge_l"] == pytest.approx(1)
    assert clean["cider"] == pytest.approx(10)
    assert capsys.readouterr().out == ""


def test_an_empty_prediction_scores_nothing():
    scores = caption_scores(["", "desk"], ["chair", "desk"], ["a", "b"])
    assert scores["rouge_l"] == 0.5


def test_cider_of_one_image_is_not_a_number():
    scores = caption_scores(["a chair", "a desk"], ["a chair", "a desk"], ["a", "a"])
    assert scores["cider"] is None and scores["notes"]["cider"].startswith("not computed")
    few = caption_scores(["a chair", "a desk"], ["a chair", "a desk"], ["a", "b"])
    assert few["cider"] > 0 and "only 2 images" in few["notes"]["cider"]
    many = caption_scores(["a chair"] * 100, ["a chair"] * 100, [str(i) for i in range(100)])
    assert "cider" not in many["notes"]


def test_without_java_meteor_is_none_and_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = caption_scores(["desk"], ["desk"], ["a"], meteor=True, spice=True)
    assert scores["meteor"] is None and "no `java`" in scores["notes"]["meteor"]
    assert scores["spice"] is None and scores["notes"]["spice"].startswith("not computed")
    assert "meteor" not in caption_scores(["desk"], ["desk"], ["a"])


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo broken >&2; exit 3", "exit status 3"),
        ("echo 0.5; echo 0.5 >&2", "2 captions in, 1 scores out"),
        ("exec sleep 30", "timed out"),
    ],
)
def test_a_failing_meteor_is_reported_and_never_hangs(monkeypatch, tmp_path, script, reason):
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\n{script}\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(captions, "METEOR_TIMEOUT_S", 0.5)
    scores = caption_scores(["desk", "bed"], ["desk", "bed"], ["a", "b"], meteor=True)
    assert scores["meteor"] is None and reason in scores["notes"]["meteor"]


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="2 predictions, 1 references"):
        caption_scores(["a", "b"], ["a"], ["x"])
    with pytest.raises(ValueError, match="0 predictions"):
        caption_scores([], [], [])
