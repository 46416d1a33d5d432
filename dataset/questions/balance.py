"""A selection of questions that cannot be answered without looking.

No answer is common among the questions of equal wording, of equal template and noun, or of equal type (see `_keys`).
"""

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np

from dataset.questions.rows import QUESTION_TYPES, Question, QuestionRow, question_rows
from dataset.sunrgbd.frames import Frame

# Balance: the largest share that one answer may have among questions that look alike, in a world of few nouns.
ANSWER_SHARE = {
    "Object Identification": 0.2, "Color Identification": 0.3, "Count": 0.35, "Direction": 0.26, "Proximity": 0.17, "Yes/No": 0.5,
}  # fmt: skip
ANSWER_EXCESS = 1.6  # how far an answer may exceed an equal share of its type's answers (see `_answer_share`)
RARE_WORDING = 10  # candidates that a wording has on average; with fewer, its own cap holds little
TYPE_EXCESS = 1.5  # how far a type may exceed an equal share of the questions
TWINS_FROM = 4  # frames that keep so many questions keep "A relative to B" and "B relative to A" together


def select_questions(
    candidates: Sequence[tuple[Frame, Sequence[Question]]], *, seed: int, per_frame: int | None
) -> list[QuestionRow]:
    """Choose balanced questions of one split.

    Frames take turns, each adding the question that is wanted most: of the rarest type, then of the rarest
    template, with an answer that the same wording lacks so far. A question whose answer is already too common among those
    that look like it (see `_keys`) waits until others made room for it, and stays out if they never do. Yes/No questions end up with as many yes as no for every single wording.

    Args:
        candidates: the split's frames and what `frame_candidates` found in them.
        seed: decides ties; the result depends on nothing else.
        per_frame: questions that a frame keeps at most; None = as many as the balance allows.

    Returns:
        Rows in the order of the frames.
    """
    rng = np.random.default_rng(seed)
    waiting = [[questions[i] for i in rng.permutation(len(questions))] for _, questions in candidates]
    _even_out_yes_no(waiting, rng)  # what has no counterpart anywhere would only be dropped in the end
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


def select_unanswered(
    candidates: Sequence[tuple[Frame, Sequence[Question]]], *, gold: Collection[str], seed: int, per_frame: int
) -> list[QuestionRow]:
    """Further questions about frames, for a teacher to answer: their own answers are withheld and play no part in the choice.

    So they are not balanced, as nothing can be whose answers nobody knows; types take turns within a frame.

    Args:
        candidates: frames and what `frame_candidates` found in them.
        gold: ids of the questions that have a gold answer already.
        seed: decides which are kept.
        per_frame: questions that a frame keeps at most.

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
    """The sets of questions that look alike, in each of which no answer may be common: from the type down to the wording.

    Most wordings of a large data set occur once or twice; what they give away is held by the coarser sets, such as all
    questions where the lamp is. Colours are balanced as a whole only: that chairs are often brown is knowledge of the world.
    """
    yield (question.type,)
    yield question.type, sensor
    if question.type != "Color Identification":
        yield question.type, question.template
        for place, noun in enumerate(question.nouns):
            yield question.template, place, noun
        yield (question.text,)


def _answer_share(kind: str, answers: Counter) -> float:
    """The largest share that one answer may have among questions that look alike: ANSWER_SHARE, or less where answers are many.

    With fifty nouns the commonest answer of a type has a tenth of its questions. ANSWER_SHARE alone would then let a template
    ("the farthest object": picture) or a noun ("closest to the sink": counter) tell twice as much as the type does. So an
    answer is held to ANSWER_EXCESS times the equal share of as many answers as there effectively are. Colours are not.

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
        """Whether every set stays balanced; one question more than the exact share gets a set started."""
        if self.count[question.type, sensor] > TYPE_EXCESS / len(self.share) * self.count[sensor]:
            return False
        return all(
            self.count[key, question.answer] <= self._cap(question, key) * (self.count[key] + 1)
            for key in _keys(question, sensor)
        )

    def _cap(self, question: Question, key: tuple) -> float:
        """The largest share that the question's answer may have in one of its sets.

        Two nouns tell more than one: "picture" and "above the bed" each raise the odds of "above". Wordings that come back
        often are held by a set of their own. Where they do not, each noun's set is held to the geometric mean of the answer's
        share in the type and of the cap, so that both nouns together raise the answer up to the cap and not beyond.
        """
        share, kind = self.share[question.type], (question.type,)
        if not self.rare_wordings or question.type != "Direction" or key[0] != question.template:
            return share
        in_type = (self.count[kind, question.answer] + 1) / (self.count[kind] + 1)
        return min(share, math.sqrt(share * in_type))

    def next_questions(self, waiting: list[Question], sensor: str, *, room: int, twins: bool) -> list[Question]:
        """The rarest question that is admitted, with its twin if wanted; empty when there is none or no room."""
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
        """Sorts first what is most wanted: by type, then by template, then an answer that its wording lacks."""
        share, wording = self.share[question.type], (question.text,)
        return (
            self.count[question.type, sensor],
            self.count[question.type, question.template],
            self.count[wording, question.answer] - share * self.count[wording],
            self.count[(question.type,), question.answer],
        )


def _even_out_yes_no(chosen: list[list[Question]], rng: np.random.Generator) -> None:
    """Drop the surplus of yes or no of each wording, so that P(yes) is one half exactly."""
    places: dict[str, dict[str, list[tuple[int, Question]]]] = {}
    for index, questions in enumerate(chosen):
        for question in questions:
            if question.type == "Yes/No":
                places.setdefault(question.text, {"yes": [], "no": []})[question.answer].append((index, question))
    for answers in places.values():
        even = min(map(len, answers.values()))
        for found in answers.values():
            for surplus in rng.permutation(len(found))[even:]:
                index, question = found[surplus]
                chosen[index].remove(question)
