"""Accuracy of answers: normalised exact match, the original code's lemma-set match, and the content of metrics.json."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dataset.questions.answers import Row, exact_match, group_by, normalise_answer, order_types
from dataset.questions.rows import CAPTION_TYPE, QuestionRow, frame_path
from dataset.sunrgbd.frames import frame_group
from evaluation.intervals import cluster_bootstrap_ci, wilson_interval
from utils import UserError

_LEMMAS = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "feet": "foot", "teeth": "tooth",
    "mice": "mouse", "shelves": "shelf", "bookshelves": "bookshelf", "knives": "knife", "leaves": "leaf",
    "scarves": "scarf", "loaves": "loaf", "halves": "half", "wolves": "wolf", "buses": "bus", "lenses": "lens",
    "gases": "gas", "canvases": "canvas", "tomatoes": "tomato", "potatoes": "potato",
    "am": "be", "is": "be", "are": "be", "was": "be", "were": "be", "been": "be", "being": "be",
    "has": "have", "had": "have", "does": "do", "did": "do",
}  # fmt: skip
_NO_PLURAL = frozenset(
    "as this his its us yes gas lens canvas clothes scissors series always perhaps besides pants".split()
)


def _lemma(word: str) -> str:
    if word in _LEMMAS:
        return _LEMMAS[word]
    if len(word) <= 3 or word in _NO_PLURAL or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "sses", "zzes")):
        return word[:-2]
    return word[:-1]


def lemma_set_match(prediction: str, answer: str) -> bool:
    """Whether both texts have the same *set* of lemmas; word order and repetitions are lost.

    This is the accuracy that the original code reports, there with spaCy's en_core_web_md. Here plural nouns, `be`,
    `have` and `do` are reduced by rule; other verb forms stay as they are. On the four published prediction files that
    the tests read, the accuracies are the published ones, overall and per type.
    """
    return _lemma_set(prediction) == _lemma_set(answer)


def _lemma_set(text: str) -> frozenset[str]:
    return frozenset(_lemma(token) for token in re.findall(r"\w+|[^\w\s]", text.lower()))


MATCHES: dict[str, Callable[[str, str], bool]] = {"exact_match": exact_match, "lemma_set_match": lemma_set_match}


def evaluate_rows(rows: Sequence[Row], *, blind: Mapping[str, Sequence[str]] | None = None) -> dict[str, Any]:
    """Score prediction rows: what metrics.json holds about accuracy.

    A cell is `{"n_questions", "n_images", "n_recordings", "exact_match": {"value", "low", "high"}, "lemma_set_match":
    {...}}`. Its 95 % interval resamples recordings; with fewer than two of them its ends are None. Rows of type Caption
    are left out.

    Args:
        rows: prediction rows with Question_Type, Answers, Model_Answer and Image_Path; `sensor`, `depth_answerable` and
            `pair_id` are used where the rows have them, and so is Recording (see `recordings`).
        blind: name of a baseline that sees no image -> its answer to each of `rows`, in their order.

    Returns:
        `overall`, a cell; `per_type`, cells that also say under `answers` how varied the answers are (a system whose
        most common answer has a share near 1 gives a constant); `per_sensor`, cells; `depth_answerable`, a cell over
        the questions that depth can answer; `pairs`, the share of pairs with both questions answered right; `blind`,
        for each baseline what this function returns. Parts without data are absent.

    Raises:
        UserError: no question to score, or a needed column is missing.
        ValueError: a baseline's answers are not as many as the rows.
    """
    for baseline, answers in (blind or {}).items():
        if len(answers) != len(rows):
            raise ValueError(f"baseline {baseline} has {len(answers)} answers for {len(rows)} rows")
    scored = [row for row in rows if row.get("Question_Type") != CAPTION_TYPE]
    if not scored:
        raise UserError("predictions: no question to score; the file has no rows, or captions only")
    missing = {"Question_Type", "Answers", "Model_Answer", "Image_Path"} - scored[0].keys()
    if missing:
        raise UserError(f"predictions: column {', '.join(sorted(missing))} is missing; evaluate the system again")

    by_type = group_by(scored, "Question_Type")
    result: dict[str, Any] = {
        "overall": _cell(scored),
        "per_type": {
            kind: _cell(by_type[kind]) | {"answers": _variety(by_type[kind])} for kind in order_types(by_type)
        },
    }
    by_sensor = group_by(scored, "sensor")
    if by_sensor:
        result["per_sensor"] = {sensor: _cell(by_sensor[sensor]) for sensor in sorted(by_sensor)}
    answerable = group_by(scored, "depth_answerable").get("1")
    if answerable:
        result["depth_answerable"] = _cell(answerable)
    pairs = [pair for pair in group_by(scored, "pair_id").values() if len(pair) > 1]
    if pairs:
        result["pairs"] = _pair_consistency(pairs)
    if blind:
        result["blind"] = {
            name: evaluate_rows([{**row, "Model_Answer": answer} for row, answer in zip(rows, answers, strict=True)])
            for name, answers in blind.items()
        }
    return result


def recording(image_path: str) -> str:
    """The recording that a picture of the SUN RGB-D tree is from, by its path; a picture anywhere else is its own.

    Pictures of one recording may show one room (`dataset.sunrgbd.frames.frame_group`). Names of NYUv2 and B3DO do not
    tell recordings apart: there every frame counts as one.
    """
    frame, _, _ = image_path.rpartition("/image/")
    return frame_group(frame) if frame else image_path


def question_recording(row: QuestionRow, *, miniature: bool) -> str:
    """The recording of a question's picture. A room of the built-in world is in one picture, whatever that is named."""
    return frame_path(row) if miniature else recording(row.image_path)


def recordings(rows: Iterable[Row]) -> list[str]:
    """The cluster of each prediction row: its cell Recording or, where it has none, what its Image_Path says.

    Pictures of the built-in world are named like frames of recordings, but each shows a room of its own. Their rows
    have the cell.
    """
    return [row.get("Recording") or recording(row["Image_Path"]) for row in rows]


def _cell(rows: Sequence[Row]) -> dict[str, Any]:
    clusters = recordings(rows)
    cell: dict[str, Any] = {
        "n_questions": len(rows),
        "n_images": len({row["Image_Path"] for row in rows}),
        "n_recordings": len(set(clusters)),
    }
    for name, match in MATCHES.items():
        cell[name] = accuracy([match(row["Model_Answer"], row["Answers"]) for row in rows], clusters)
    return cell


def accuracy(correct: Sequence[float], clusters: Sequence[str]) -> dict[str, float | None]:
    """Share of right answers (or mean of scores) with its 95 % interval by cluster: `{"value", "low", "high"}`.

    When all are right, or all wrong, resampling shows no spread; then the interval is Wilson's, over the clusters.
    """
    n_right, n_clusters = sum(correct), len(set(clusters))
    if n_right in (0, len(correct)):
        low, high = wilson_interval(n_clusters if n_right else 0, n_clusters)
    else:
        low, high = cluster_bootstrap_ci(correct, clusters)
    return {
        "value": n_right / len(correct),
        "low": None if math.isnan(low) else low,
        "high": None if math.isnan(high) else high,
    }


def _variety(rows: Sequence[Row]) -> dict[str, Any]:
    counts = Counter(normalise_answer(row["Model_Answer"]) for row in rows)
    answer, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    return {
        "distinct": len(counts),
        "distinct_share": len(counts) / len(rows),
        "most_common": answer,
        "most_common_share": count / len(rows),
    }


def _pair_consistency(pairs: Sequence[Sequence[Row]]) -> dict[str, float]:
    n_right = sum(all(exact_match(row["Model_Answer"], row["Answers"]) for row in pair) for pair in pairs)
    low, high = wilson_interval(n_right, len(pairs))
    return {"n_pairs": len(pairs), "all_right": n_right / len(pairs), "low": low, "high": high}
