"""Select questions that cannot be answered without the image.

No answer may be too common among questions of the same wording, of the same template and noun, or of the same type (see
`_keys`).
"""

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np

from dataset.questions.rows import QUESTION_TYPES, Question, QuestionRow, question_rows
from dataset.sunrgbd.frames import Frame

# The largest share that one answer may have in a set of similar questions; less with many nouns (see `_answer_share`).
ANSWER_SHARE = {
    "Object Identification": 0.2, "Color Identification": 0.3, "Count": 0.35,
    "Direction": 0.26, "Proximity": 0.17, "Yes/No": 0.5,
}  # fmt: skip
ANSWER_EXCESS = 1.6  # an answer may have this many times an equal share of its type's answers (see `_answer_share`)
RARE_WORDING = 10  # with fewer candidates per wording on average, capping each wording has little effect (see `_cap`)
TYPE_EXCESS = 1.5  # a type may have this many times an equal share of the questions
TWINS_FROM = 4  # a frame that keeps this many questions keeps "A relative to B" and "B relative to A" together


def select_questions(
    candidates: Sequence[tuple[Frame, Sequence[Question]]], *, seed: int, per_frame: int | None
) -> list[QuestionRow]:
    """Choose balanced questions of one split.

    Frames take turns. Each adds the question that is needed most: of the rarest type so far, then of the rarest
    template, then with the answer that its wording has least often. A question whose answer is already too common among
    similar ones (see `_keys`) waits until others with other answers were added, and is left out if that never happens.
    In the end every wording of a Yes/No question has as many yes as no.

    Args:
        candidates: the split's frames, each with its questions from `frame_candidates`.
        seed: decides ties; the result depends on nothing else.
        per_frame: most questions of one frame; None = as many as the balance allows.

    Returns:
        Rows in the order of the frames.
    """
    rng = np.random.default_rng(seed)
    waiting = [[questions[i] for i in rng.permutation(len(questions))] for _, questions in candidates]
    _even_out_yes_no(waiting, rng)  # questions without a counterpart would be dropped in the end anyway
    kept: list[list[Question]] = [[] for _ in candidates]
    tally = _Tally(list(itertools.chain.from_iterable(waiting)))
    twins = per_frame is None or per_frame >= TWINS_FROM
    changed = True
    while changed:
        changed = False
        for index in rng.permutation(len(candidates)):
            sensor = candidates[index][0].sensor
            room = len(waiting[index]) if per_frame is None else per_frame - len(kept[index])
            for question in tally.next_questions(waiting[index], sensor, room=room, twins=twins):
                tally.add(question, sensor)
                kept[index].append(question)
                waiting[index].remove(question)
                changed = True
    _even_out_yes_no(kept, rng)
    return [
        row for (frame, _), questions in zip(candidates, kept, strict=True) for row in question_rows(frame, questions)
    ]


def select_unlabelled(
    candidates: Sequence[tuple[Frame, Sequence[Question]]], *, gold: Collection[str], seed: int, per_frame: int
) -> list[QuestionRow]:
    """Further questions about frames, without their labels, for a teacher to answer.

    The selection does not depend on the labels, so it cannot balance answers; within a frame, types take turns.

    Args:
        candidates: frames, each with its questions from `frame_candidates`.
        gold: ids of the labelled questions, which are left out.
        seed: decides which are kept.
        per_frame: most questions of one frame.

    Returns:
        Rows with an empty answer, in the order of the frames.
    """
    rng = np.random.default_rng((seed, 3))
    chosen = []
    for frame, questions in candidates:
        by_type: dict[str, list[QuestionRow]] = {}
        for i in rng.permutation(len(questions)):
            (row,) = question_rows(frame, [questions[i]])
            if row.id not in gold:
                by_type.setdefault(row.type, []).append(replace(row, answer="", target_box=None))
        turns = itertools.zip_longest(*(by_type[kind] for kind in QUESTION_TYPES if kind in by_type))
        chosen += [row for row in itertools.chain.from_iterable(turns) if row is not None][:per_frame]
    return chosen


def _keys(question: Question, sensor: str) -> Iterator[tuple]:
    """The sets of similar questions that a question belongs to, from its type down to its wording.

    In none of them may an answer be too common. Most wordings of a large data set occur once or twice, too rarely to be
    balanced; the larger sets, such as all questions where the lamp is, limit what these give away. Colors are balanced
    as a whole only: that chairs are often brown is knowledge of the world.
    """
    yield (question.type,)
    yield question.type, sensor
    if question.type != "Color Identification":
        yield question.type, question.template
        for position, noun in enumerate(question.nouns):
            yield question.template, position, noun
        yield (question.text,)


def _answer_share(kind: str, answers: Counter) -> float:
    """The largest share that one answer may have in a set of similar questions.

    This is ANSWER_SHARE or, where a type has many different answers, ANSWER_EXCESS / (effective number of answers).
    With fifty nouns the most common answer of a type has a tenth of its questions. ANSWER_SHARE alone would then allow
    twice that share for one template ("the farthest object": picture) or one noun ("closest to the sink": counter).
    Colors have ANSWER_SHARE only.

    Source: the effective number is the inverse Simpson index, Hill 1973, Ecology 54:427, order 2.
    """
    if kind == "Color Identification":
        return ANSWER_SHARE[kind]
    effective = answers.total() ** 2 / sum(count**2 for count in answers.values())
    return min(ANSWER_SHARE[kind], ANSWER_EXCESS / effective)


class _Tally:
    """How many questions and answers of each kind have been chosen, and whether another one keeps the balance.

    Args:
        candidates: all questions to choose from.
    """

    def __init__(self, candidates: Sequence[Question]):
        answers: dict[str, Counter] = {}
        for question in candidates:
            answers.setdefault(question.type, Counter())[question.answer] += 1
        self.share = {kind: _answer_share(kind, counts) for kind, counts in answers.items()}
        wordings = Counter(question.text for question in candidates if question.type == "Direction")
        self.rare_wordings = wordings.total() < RARE_WORDING * len(wordings)
        self.count: Counter = Counter()  # of each set, of each (set, answer), and of each sensor

    def add(self, question: Question, sensor: str, step: int = 1) -> None:
        self.count[sensor] += step
        for key in _keys(question, sensor):
            self.count[key] += step
            self.count[key, question.answer] += step

    def admits(self, question: Question, sensor: str) -> bool:
        """Whether every set stays balanced with this question.

        An answer may exceed its largest share of a set by up to one question, since the first question of a set always
        exceeds it.
        """
        if self.count[question.type, sensor] > TYPE_EXCESS / len(self.share) * self.count[sensor]:
            return False
        return all(
            self.count[key, question.answer] <= self._cap(question, key) * (self.count[key] + 1)
            for key in _keys(question, sensor)
        )

    def _cap(self, question: Question, key: tuple) -> float:
        """The largest share that the question's answer may have in one of its sets.

        A question with two nouns gives away more than each noun: "picture" and "above the bed" both make "above"
        likelier. Where wordings are frequent, the set of each wording limits this. Where they are rare, each noun's set
        is limited to the geometric mean of the answer's share in its type and the cap, so that both nouns together
        raise the answer's share at most to the cap.
        """
        share, kind = self.share[question.type], (question.type,)
        if not self.rare_wordings or question.type != "Direction" or key[0] != question.template:
            return share
        in_type = (self.count[kind, question.answer] + 1) / (self.count[kind] + 1)
        return min(share, math.sqrt(share * in_type))

    def next_questions(self, waiting: list[Question], sensor: str, *, room: int, twins: bool) -> list[Question]:
        """The rarest question that is admitted, with its twin if wanted; empty if none is admitted or without room."""
        admitted = [question for question in waiting if self.admits(question, sensor)] if room > 0 else []
        if not admitted:
            return []
        first = min(admitted, key=lambda question: self._rarity(question, sensor))
        chosen = [first]
        if twins and room > 1 and first.pair:
            self.add(first, sensor)
            chosen += [q for q in waiting if q.pair == first.pair and q is not first and self.admits(q, sensor)]
            self.add(first, sensor, -1)
        return chosen

    def _rarity(self, question: Question, sensor: str) -> tuple[float, ...]:
        """Sort key, lowest for the question that is needed most: by its type, its template, its answer."""
        share, wording = self.share[question.type], (question.text,)
        return (
            self.count[question.type, sensor],
            self.count[question.type, question.template],
            self.count[wording, question.answer] - share * self.count[wording],
            self.count[(question.type,), question.answer],
        )


def _even_out_yes_no(chosen: list[list[Question]], rng: np.random.Generator) -> None:
    """Drop the surplus of yes or no of each wording, so that P(yes) is exactly one half."""
    by_wording: dict[str, dict[str, list[tuple[int, Question]]]] = {}
    for index, questions in enumerate(chosen):
        for question in questions:
            if question.type == "Yes/No":
                by_wording.setdefault(question.text, {"yes": [], "no": []})[question.answer].append((index, question))
    for answers in by_wording.values():
        even = min(map(len, answers.values()))
        for found in answers.values():
            for surplus in rng.permutation(len(found))[even:]:
                index, question = found[surplus]
                chosen[index].remove(question)
