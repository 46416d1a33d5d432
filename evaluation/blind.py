"""Baselines that see no image: what the questions give away. Fitted on training rows, applied to val or test rows."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import logsumexp

from dataset.questions import CAPTION_TYPE
from evaluation.metrics import exact_match, group_by, normalise_answer, order_types
from utils import UserError

Row = Mapping[str, Any]

MAX_ITERATIONS = 100


def blind_predictions(train_rows: Sequence[Row], rows: Sequence[Row]) -> dict[str, list[str]]:
    """The answers of every blind baseline to `rows`, by its name, ready for `metrics.evaluate_rows(rows, blind=...)`.

    Args:
        train_rows: question rows with Questions, Answers and Question_Type; only these are fitted on.
        rows: question rows to answer; their Answers are never read.

    Raises:
        UserError: there are no training rows.
    """
    return {
        "majority_per_type": majority_per_type(train_rows, rows),
        "question_text": question_text(train_rows, rows),
        "text_classifier": text_classifier(train_rows, rows),
    }


def majority_per_type(train_rows: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """The most common training answer of the row's question type; of all types where the type is new."""
    overall = _most_common(train_rows)
    by_type = {kind: _most_common(group) for kind, group in group_by(train_rows, "Question_Type").items()}
    return [by_type.get(row["Question_Type"], overall) for row in rows]


def question_text(train_rows: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """The most common training answer to exactly the same question; where it is new, that of its type."""
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
        places = [place for place, row in enumerate(rows) if row["Question_Type"] == kind]
        answers = _fit_and_answer(by_type[kind], [rows[place]["Questions"] for place in places])
        for place, answer in zip(places, answers, strict=True):
            predictions[place] = answer
    return predictions


def blind_check(
    train_rows: Sequence[Row],
    rows: Sequence[Row],
    *,
    yes_no_limit: float = 0.55,
    margin: float = 0.05,
    exempt: Collection[str] = ("Color Identification",),
) -> list[str]:
    """Say where questions can be answered without an image, beyond what the distribution of answers allows.

    Args:
        train_rows: rows to fit the baselines on.
        rows: val or test rows.
        yes_no_limit: highest blind accuracy on Yes/No questions, which should be balanced.
        margin: how far any other type may exceed its majority answer, as a share.
        exempt: types that are not checked. That chairs are often brown is knowledge of the world, not a leak.

    Returns:
        One sentence for each violation; empty when the questions pass. Captions are not checked.
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
    return min(counts, key=lambda answer: (-counts[answer], answer))  # ties go to the alphabet, not to the row order


def _ngrams(question: str) -> list[str]:
    words = normalise_answer(question).split()
    return words + [f"{first} {second}" for first, second in zip(words, words[1:], strict=False)]


def _features(questions: Sequence[str], vocabulary: Mapping[str, int]) -> csr_matrix:
    """Presence of each known n-gram, and a constant in the last column: (N, len(vocabulary) + 1)."""
    columns = [
        sorted({vocabulary[gram] for gram in _ngrams(q) if gram in vocabulary}) + [len(vocabulary)] for q in questions
    ]
    starts = np.cumsum([0, *map(len, columns)])
    indices = np.concatenate(columns)
    return csr_matrix((np.ones(len(indices)), indices, starts), shape=(len(questions), len(vocabulary) + 1))


def penalised_loss(
    flat: np.ndarray, features: csr_matrix, labels: np.ndarray, shape: tuple[int, int]
) -> tuple[float, np.ndarray]:
    """Mean cross-entropy of a linear classifier plus the prior of its weights, and its gradient.

    The weights have a Gaussian prior of unit variance: a word seen once shifts an answer, but does not decide it.
    Those of the constant column, the last one, stay free: they carry how common each answer is.

    Args:
        flat: (F * C,) weights of F features and C classes.
        features: (N, F), sparse.
        labels: (N,) class of each row.
        shape: (F, C).

    Returns:
        Loss in nats, and its gradient, (F * C,).
    """
    n = len(labels)
    weights = flat.reshape(shape)
    logits = features @ weights  # (N, C)
    log_probs = logits - logsumexp(logits, axis=1, keepdims=True)
    residual = np.exp(log_probs)
    residual[np.arange(n), labels] -= 1
    penalised = weights.copy()
    penalised[-1] = 0
    loss = -log_probs[np.arange(n), labels].mean() + (penalised**2).sum() / (2 * n)
    return loss, ((features.T @ residual + penalised) / n).ravel()


def _fit_and_answer(train_rows: Sequence[Row], questions: Sequence[str]) -> list[str]:
    """Fit on one type's training rows by L-BFGS from zero (convex, so deterministic) and answer `questions`."""
    answers = sorted({_answer(row) for row in train_rows})
    if len(answers) == 1:
        return answers * len(questions)
    train_questions = [row["Questions"] for row in train_rows]
    grams = sorted({gram for question in train_questions for gram in _ngrams(question)})
    vocabulary = {gram: column for column, gram in enumerate(grams)}
    features = _features(train_questions, vocabulary)
    classes = {answer: label for label, answer in enumerate(answers)}
    labels = np.array([classes[_answer(row)] for row in train_rows])
    shape = (features.shape[1], len(answers))
    solution = minimize(
        penalised_loss,
        np.zeros(shape).ravel(),
        args=(features, labels, shape),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": MAX_ITERATIONS},
    )
    best = (_features(questions, vocabulary) @ solution.x.reshape(shape)).argmax(axis=1)
    return [answers[label] for label in best]
