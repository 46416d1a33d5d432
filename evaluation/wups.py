"""WUPS, the measure of DAQUAR: how close the words of an answer are to the right ones in WordNet's tree of nouns.

For the right answers A and the predicted ones T to one question, and then averaged over the questions,

    WUPS(A, T) = min( prod_{a in A} max_{t in T} mu(a, t),  prod_{t in T} max_{a in A} mu(t, a) )

mu is 1 for equal words. For others it is their Wu-Palmer similarity: twice the depth of the nearest common ancestor,
divided by the sum of both depths, of the noun senses that are closest. Below a threshold it is scaled by 0.1. At
threshold 0.9 only near synonyms count; at 0.0 nothing is scaled, and words as far apart as stove and fire extinguisher
(0.82) earn most of a point. With mu = equality WUPS is DAQUAR's accuracy, which is `metrics.exact_match`. A word that
WordNet lacks matches only itself.

Source: Malinowski and Fritz, NIPS 2014, https://arxiv.org/abs/1410.0210, performance measure; Wu and Palmer, ACL 1994.
Differs from the authors' script in two ways. Answers are normalised like all others here ("two" is 2, "coffee table" is
coffee_table). A and T are sets, as in the paper, where the script counts a repeated word twice; 13 of the 12,468
answers repeat one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from dataset.questions.answers import answer_items, group_by, order_types
from evaluation.metrics import accuracy, recordings
from utils import ProgressLine

Row = Mapping[str, Any]
WordSimilarity = Callable[[str, str], float]  # two words, their parts joined by "_" -> 0 (unrelated or unknown) to 1

THRESHOLDS = {"wups_0.9": 0.9, "wups_0.0": 0.0}
BELOW_THRESHOLD = 0.1
INSTALL = "pip install nltk && python -m nltk.downloader wordnet"


def wordnet_similarity(notes: dict[str, str]) -> WordSimilarity | None:
    """Wu-Palmer similarity of two nouns in WordNet; None where nltk or its data is missing: `notes` then says why."""
    try:
        from nltk.corpus import wordnet

        wordnet.ensure_loaded()
        senses = wordnet.synsets("chair", pos=wordnet.NOUN)
    except ImportError as error:
        notes["wups"] = f"not computed: {error}; {INSTALL}"
        return None
    except (LookupError, OSError) as error:
        reason = " ".join(str(error).strip("* \n").split())
        notes["wups"] = f"not computed: nltk finds no usable WordNet (about 11 MB); {INSTALL} (nltk: {reason:.300})"
        return None
    if not senses or None in senses:
        notes["wups"] = f"not computed: nltk's WordNet is damaged; {INSTALL}"
        return None

    @cache
    def nouns(word: str) -> Sequence[Any]:
        return wordnet.synsets(word, pos=wordnet.NOUN)

    @cache
    def similarity(a: str, b: str) -> float:
        return max((x.wup_similarity(y) or 0.0 for x in nouns(a) for y in nouns(b)), default=0.0)

    return similarity


def wups(prediction: str, answer: str, *, threshold: float, similarity: WordSimilarity) -> float:
    """WUPS of one prediction in [0, 1]; commas separate several things in a text. An empty prediction scores 0."""
    right, predicted = ({item.replace(" ", "_") for item in answer_items(text)} for text in (answer, prediction))
    if not right or not predicted:
        return 0.0

    def closeness(a: str, b: str) -> float:
        if a == b:
            return 1.0
        value = similarity(a, b)
        return value if value >= threshold else BELOW_THRESHOLD * value

    covered = math.prod(max(closeness(a, t) for t in predicted) for a in right)
    supported = math.prod(max(closeness(t, a) for a in right) for t in predicted)
    return min(covered, supported)


def wups_scores(
    rows: Sequence[Row], similarity: WordSimilarity, *, blind: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Any]:
    """WUPS of prediction rows at both thresholds, with 95 % intervals that resample recordings.

    Args:
        rows: prediction rows with Question_Type, Answers, Model_Answer and Image_Path.
        similarity: of two words, for instance `wordnet_similarity`.
        blind: as in `metrics.evaluate_rows`.

    Returns:
        `overall` and, under `per_type`, each question type: `{"wups_0.9": {"value", "low", "high"}, "wups_0.0":
        {...}}`; under `blind` the same of each baseline.
    """
    line = ProgressLine("WUPS, answers", total=len(rows) * (1 + len(blind or {})))
    done = 0

    def scored(answers: Sequence[str]) -> list[Row]:
        nonlocal done
        found = []
        for row, answer in zip(rows, answers, strict=True):
            texts = {"prediction": answer, "answer": row["Answers"]}
            found.append(
                {**row, **{k: wups(**texts, threshold=t, similarity=similarity) for k, t in THRESHOLDS.items()}}
            )
            done += 1
            line.update(done)
        return found

    result = _cells(scored([row["Model_Answer"] for row in rows]))
    if blind:
        result["blind"] = {name: _cells(scored(answers)) for name, answers in blind.items()}
    return result


def _cells(rows: Sequence[Row]) -> dict[str, Any]:
    by_type = group_by(rows, "Question_Type")
    return {"overall": _cell(rows), "per_type": {kind: _cell(by_type[kind]) for kind in order_types(by_type)}}


def _cell(rows: Sequence[Row]) -> dict[str, Any]:
    clusters = recordings(rows)
    return {name: accuracy([row[name] for row in rows], clusters) for name in THRESHOLDS}
