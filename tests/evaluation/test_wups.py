"""WUPS: the published formula on a toy taxonomy, its invariances, WordNet present, damaged and absent."""

import itertools
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from dataset.questions.answers import exact_match
from evaluation.metrics import accuracy
from evaluation.wups import THRESHOLDS, wordnet_similarity, wups, wups_scores

PARENT = {
    "furniture": "thing", "seat": "furniture", "chair": "seat", "armchair": "chair", "sofa": "seat",
    "table": "furniture",
    "coffee_table": "table", "animal": "thing", "cat": "animal", "dog": "animal",
}  # fmt: skip
WORDS = [*PARENT, "gizmo", "2"]  # the last two are not in the taxonomy


def line(word: str) -> list[str]:
    """The word and its ancestors."""
    return [word, *line(PARENT[word])] if word in PARENT else [word]


def toy_similarity(a: str, b: str) -> float:
    if not {a, b} <= PARENT.keys():
        return 0.0
    shared = next(word for word in line(a) if word in line(b))
    return 2 * len(line(shared)) / (len(line(a)) + len(line(b)))


def naive_wups(predicted: list[str], right: list[str], threshold: float) -> float:
    """The formula, word by word and with plain loops."""

    def mu(a, b):
        if a == b:
            return 1.0
        s = toy_similarity(a, b)
        return s * 0.1 if s < threshold else s

    products = []
    for these, those in ((right, predicted), (predicted, right)):
        product = 1.0
        for word in these:
            best = 0.0
            for other in those:
                best = max(best, mu(word, other))
            product *= best
        products.append(product)
    return min(products)


def random_answers(n: int):
    rng = np.random.default_rng(0)
    for _ in range(n):
        yield [list(rng.choice(WORDS, rng.integers(1, 5), replace=False)) for _ in range(2)]


def test_equals_an_independent_implementation():
    values = set()
    for predicted, right in random_answers(500):
        for threshold in (0.0, 0.5, 0.9):
            value = wups(", ".join(predicted), ", ".join(right), threshold=threshold, similarity=toy_similarity)
            assert value == pytest.approx(naive_wups(predicted, right, threshold), rel=1e-12)
            values.add(round(value, 9))
    assert len(values) > 30 and {0.0, 1.0} < values


def test_worked_examples():
    """chair and sofa share the seat: 2 * 3 / (4 + 4)."""
    for threshold, factor in ((0.0, 1), (0.75, 1), (0.9, 0.1)):
        assert wups("sofa", "chair", threshold=threshold, similarity=toy_similarity) == pytest.approx(0.75 * factor)
        both = wups("sofa, dog", "chair, dog", threshold=threshold, similarity=toy_similarity)
        assert both == pytest.approx(0.75 * factor)
    assert wups("chair", "chair, sofa", threshold=0.0, similarity=toy_similarity) == 0.75  # one thing is missing
    assert wups("chair, sofa", "chair", threshold=0.0, similarity=toy_similarity) == 0.75  # one thing too many
    assert wups("gizmo", "gizmo", threshold=0.9, similarity=toy_similarity) == 1  # an unknown word matches itself
    assert wups("gizmo", "chair", threshold=0.0, similarity=toy_similarity) == 0
    assert wups("", "chair", threshold=0.0, similarity=toy_similarity) == 0


def test_order_repetition_and_spelling_do_not_matter():
    def score(prediction, answer):
        return wups(prediction, answer, threshold=0.0, similarity=toy_similarity)

    for predicted, right in random_answers(50):
        value = score(", ".join(predicted), ", ".join(right))
        assert value == pytest.approx(score(", ".join(predicted[::-1] * 2), ",".join(right[::-1])))
        assert value == pytest.approx(score(", ".join(right), ", ".join(predicted)))
    assert score("A Coffee table.", "coffee_table") == score("two", "2") == 1
    assert score("coffee table", "table") == score("coffee_table", "table") > 0


def test_lies_between_accuracy_and_a_lower_threshold():
    for predicted, right in random_answers(200):
        texts = ", ".join(predicted), ", ".join(right)
        low, high = (wups(*texts, threshold=t, similarity=toy_similarity) for t in (0.9, 0.0))
        assert exact_match(*texts) <= low <= high
        assert wups(*texts, threshold=0.9, similarity=lambda a, b: 0.0) == exact_match(*texts)


def test_each_word_is_compared_the_published_way_round():
    """A similarity need not be symmetric: the word whose partner is searched comes first, in both directions."""
    asked = []
    wups("sofa", "chair", threshold=0.0, similarity=lambda a, b: asked.append((a, b)) or 0.5)
    assert sorted(asked) == [("chair", "sofa"), ("sofa", "chair")]


def test_scores_of_rows_with_blind_baselines():
    kinds, answers = ("Object Identification", "Count"), ("chair", "2")
    rows = [
        {"Question_Type": kinds[i % 2], "Answers": answers[i % 2], "Model_Answer": "sofa", "Image_Path": str(i // 4)}
        for i in range(24)
    ]
    constant = ["chair"] * 24
    scores = wups_scores(rows, toy_similarity, blind={"constant": constant})
    for name, threshold in THRESHOLDS.items():
        values = [wups("sofa", row["Answers"], threshold=threshold, similarity=toy_similarity) for row in rows]
        assert scores["overall"][name] == accuracy(values, [row["Image_Path"] for row in rows])
        assert scores["per_type"]["Count"][name]["value"] == 0
        assert scores["blind"]["constant"]["per_type"]["Object Identification"][name]["value"] == 1
    assert list(scores["per_type"]) == list(kinds)


class Sense:
    """What nltk calls a synset; `wup_similarity` is None where nothing is shared."""

    def __init__(self, place: float):
        self.place = place

    def wup_similarity(self, other):
        return None if self.place * other.place < 0 else 1 - abs(self.place - other.place)


def fake_nltk(monkeypatch, senses: dict, load=lambda: None) -> None:
    wordnet = SimpleNamespace(NOUN="n", ensure_loaded=load, synsets=lambda word, pos: senses.get(word, []))
    corpus = ModuleType("nltk.corpus")
    corpus.wordnet = wordnet
    monkeypatch.setitem(sys.modules, "nltk", ModuleType("nltk"))
    monkeypatch.setitem(sys.modules, "nltk.corpus", corpus)


def test_the_closest_senses_count(monkeypatch):
    fake_nltk(monkeypatch, {"chair": [Sense(0.1), Sense(-0.4)], "bed": [Sense(0.4), Sense(-0.5)], "idea": [Sense(0.9)]})
    notes = {}
    similarity = wordnet_similarity(notes)
    assert similarity("chair", "bed") == pytest.approx(0.9) and similarity("chair", "unheard_of") == 0
    assert similarity("idea", "chair") == pytest.approx(0.2) and not notes


def missing():
    raise LookupError("\n****\n  Resource wordnet not found.\n****\n")


@pytest.mark.parametrize(
    ("senses", "load", "reason"),
    [
        ({"chair": [Sense(0.1)]}, missing, "Resource wordnet not found"),
        ({"chair": [None]}, lambda: None, "damaged"),
        ({}, lambda: None, "damaged"),
    ],
)
def test_without_data_the_note_says_what_to_do(monkeypatch, senses, load, reason):
    fake_nltk(monkeypatch, senses, load)
    notes = {}
    assert wordnet_similarity(notes) is None
    assert reason in notes["wups"] and "python -m nltk.downloader wordnet" in notes["wups"]
    assert "\n" not in notes["wups"] and len(notes["wups"]) < 600


def test_without_nltk_the_note_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    notes = {}
    assert wordnet_similarity(notes) is None
    assert "not computed" in notes["wups"] and "pip install nltk" in notes["wups"]


def test_real_wordnet():
    """Similarities of pairs of nouns in WordNet 3.0, two of them beside the threshold that the authors chose."""
    notes = {}
    similarity = wordnet_similarity(notes)
    if similarity is None:
        pytest.skip(notes["wups"])
    for a, b, expected in [
        ("curtain", "blinds", 0.9412), ("carton", "box", 0.9412), ("stove", "fire_extinguisher", 0.8235),
        ("dog", "cat", 0.8571), ("books", "book", 1.0), ("night_stand", "table", 0.0), ("coffee table", "table", 0.0),
    ]:  # fmt: skip
        assert similarity(a, b) == pytest.approx(expected, abs=1e-4), (a, b)
    for a, b in itertools.combinations(["chair", "bed", "lamp"], 2):
        assert 0 < similarity(a, b) < 1
