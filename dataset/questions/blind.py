"""Baselines that see no image: they show what the questions alone give away.

They are fitted on training rows and applied to val or test rows.
"""

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from dataset.questions.answers import exact_match, group_by, normalise_answer, order_types
from dataset.questions.rows import CAPTION_TYPE
from utils import UserError

Row = Mapping[str, Any]
MAX_ITERATIONS = 20  # of L-BFGS; on DAQUAR 60 take more than twice as long and answer half a point better


def blind_predictions(train_rows: Sequence[Row], rows: Sequence[Row]) -> dict[str, list[str]]:
    """The answers of every blind baseline to `rows`, by its name, ready for `metrics.evaluate_rows(rows, blind=...)`.

    Args:
        train_rows: question rows with Questions, Answers and Question_Type, to fit the baselines on.
        rows: question rows to answer; their Answers are not read.

    Raises:
        UserError: there are no training rows.
    """
    return {
        "majority_per_type": majority_per_type(train_rows, rows),
        "question_text": question_text(train_rows, rows),
        "text_classifier": text_classifier(train_rows, rows),
    }


def majority_per_type(train_rows: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """The most common training answer of the row's question type, or of all rows for a type without training rows."""
    overall = _most_common(train_rows)
    by_type = {kind: _most_common(group) for kind, group in group_by(train_rows, "Question_Type").items()}
    return [by_type.get(row["Question_Type"], overall) for row in rows]


def question_text(train_rows: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """The most common training answer to exactly the same question, or of its type for a new question."""
    by_question: dict[tuple[str, str], list[Row]] = {}
    for row in train_rows:
        by_question.setdefault(_question_key(row), []).append(row)
    answers = {key: _most_common(group) for key, group in by_question.items()}
    fallback = majority_per_type(train_rows, rows)
    return [answers.get(_question_key(row), majority) for row, majority in zip(rows, fallback, strict=True)]


def text_classifier(train_rows: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """Multinomial logistic regression on the words and word pairs of the question, one model per question type."""
    predictions = majority_per_type(train_rows, rows)
    by_type = group_by(train_rows, "Question_Type")
    for kind in sorted({row["Question_Type"] for row in rows} & by_type.keys()):
        positions = [i for i, row in enumerate(rows) if row["Question_Type"] == kind]
        answers = _fit_and_answer(by_type[kind], [rows[i]["Questions"] for i in positions])
        for i, answer in zip(positions, answers, strict=True):
            predictions[i] = answer
    return predictions


def blind_check(
    train_rows: Sequence[Row],
    rows: Sequence[Row],
    *,
    yes_no_limit: float = 0.55,
    margin: float = 0.05,
    exempt: Collection[str] = ("Color Identification",),
) -> list[str]:
    """Find question types that can be answered without an image, better than the distribution of answers allows.

    Args:
        train_rows: rows to fit the baselines on.
        rows: val or test rows.
        yes_no_limit: highest allowed blind accuracy on Yes/No questions, which should be balanced.
        margin: by how much the blind accuracy on any other type may exceed that of its majority answer.
        exempt: types that are not checked. That chairs are often brown is knowledge of the world, not a leak.

    Returns:
        One sentence for each violation; empty when there is none. Captions are not checked.
    """
    scores = {name: _accuracy_per_type(rows, answers) for name, answers in blind_predictions(train_rows, rows).items()}
    majority = scores["majority_per_type"]
    violations = []
    for kind in order_types(majority.keys() - set(exempt)):
        constant = majority[kind]
        limit = yes_no_limit if kind == "Yes/No" else constant + margin
        found, name = max((accuracies[kind], name) for name, accuracies in scores.items())
        if found > limit:
            violations.append(
                f"{kind}: {name} answers {found:.3f} of the questions correctly without an image; "
                f"the limit is {limit:.3f} (the majority answer alone reaches {constant:.3f})"
            )
    return violations


def _accuracy_per_type(rows: Sequence[Row], answers: Sequence[str]) -> dict[str, float]:
    correct: dict[str, list[bool]] = {}
    for row, answer in zip(rows, answers, strict=True):
        if row["Question_Type"] != CAPTION_TYPE:
            correct.setdefault(row["Question_Type"], []).append(exact_match(answer, row["Answers"]))
    return {kind: sum(right) / len(right) for kind, right in correct.items()}


def _question_key(row: Row) -> tuple[str, str]:
    return row["Question_Type"], " ".join(row["Questions"].lower().split())


def _answer(row: Row) -> str:
    return row["Answers"].strip().lower()


def _most_common(rows: Iterable[Row]) -> str:
    counts = Counter(map(_answer, rows))
    if not counts:
        raise UserError("training questions: there are no rows to fit the blind baselines on; prepare the train split")
    return min(counts, key=lambda answer: (-counts[answer], answer))  # ties by the alphabet, not by the order of rows


def _ngrams(question: str) -> list[str]:
    words = normalise_answer(question).split()
    return words + [f"{first} {second}" for first, second in zip(words, words[1:], strict=False)]


def _fit_and_answer(train_rows: Sequence[Row], questions: Sequence[str]) -> list[str]:
    """Fit on one type's training rows and answer `questions`. Deterministic, since the fit starts from zero weights.

    N-grams have to occur in two questions: DAQUAR has thousands of words that occur once, and they hardly matter. The
    fit is stopped early on purpose, so its warning about that is silenced.
    """
    train_questions = [row["Questions"] for row in train_rows]
    counts = Counter(gram for question in train_questions for gram in set(_ngrams(question)))
    known = sorted(gram for gram, count in counts.items() if count > 1)
    labels = [_answer(row) for row in train_rows]
    if len(set(labels)) == 1 or not known:
        return [_most_common(train_rows)] * len(questions)
    vectorizer = CountVectorizer(analyzer=_ngrams, binary=True, vocabulary=known, dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(max_iter=MAX_ITERATIONS).fit(vectorizer.transform(train_questions), labels)
    return model.predict(vectorizer.transform(questions)).tolist()
