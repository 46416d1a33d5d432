"""Instances -> balanced question/answer rows, and the CSV files that hold them.

The same generator serves SUN RGB-D and the miniature world, in two steps. `frame_candidates` asks everything about a frame that
has one clear answer. `select_questions` keeps a selection that cannot be answered without looking: no answer is common among
the questions of equal wording, of equal template and noun, or of equal type (see `_keys`).
"""

import csv
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from matplotlib.colors import rgb_to_hsv

from dataset.annotations import Instance, asked_nouns, mask_box, nouns
from dataset.sunrgbd import Frame
from utils import UserError, atomic_path

GENERATOR_VERSION = 1
QUESTION_TYPES = (
    "Object Identification", "Color Identification", "Count", "Direction", "Proximity", "Yes/No",
)  # fmt: skip

CAPTION_TYPE = "Caption"  # of descriptions, which have files of their own and are not counted as right or wrong

# What makes an answer clear. Lengths in metres between centres, in the gravity frame.
MIN_AREA_SHARE = 0.005  # of the image; smaller objects are neither asked about nor counted
LARGEST_RATIO = 1.3  # largest visible area against the next noun's
CLOSEST_GAP_M, CLOSEST_RATIO = 0.3, 1.1  # depth of the closest (farthest) object against the next noun's
DIRECTION_MIN_M, DIRECTION_RATIO = 0.25, 1.6  # the dominant axis, and how far it exceeds the other two
PROXIMITY_GAP_M, PROXIMITY_RATIO = 0.25, 1.35  # distance of the farther object against the nearer one's
COLOR_MIN_SHARE = 0.6  # of the object's pixels
MAX_COUNT = 6
MARGINS = {
    "min_area_share": MIN_AREA_SHARE, "largest_ratio": LARGEST_RATIO, "closest_gap_m": CLOSEST_GAP_M,
    "closest_ratio": CLOSEST_RATIO, "direction_min_m": DIRECTION_MIN_M, "direction_ratio": DIRECTION_RATIO,
    "proximity_gap_m": PROXIMITY_GAP_M, "proximity_ratio": PROXIMITY_RATIO, "color_min_share": COLOR_MIN_SHARE,
    "max_count": MAX_COUNT,
}  # fmt: skip

# Balance: the largest share that one answer may have among questions that look alike, in a world of few nouns.
ANSWER_SHARE = {
    "Object Identification": 0.2, "Color Identification": 0.3, "Count": 0.35, "Direction": 0.26, "Proximity": 0.17, "Yes/No": 0.5,
}  # fmt: skip
ANSWER_EXCESS = 1.6  # how far an answer may exceed an equal share of its type's answers (see `_answer_share`)
RARE_WORDING = 10  # candidates that a wording has on average; with fewer, its own cap holds little
TYPE_EXCESS = 1.5  # how far a type may exceed an equal share of the questions
TWINS_FROM = 4  # frames that keep so many questions keep "A relative to B" and "B relative to A" together
MAX_CANDIDATES = 12  # per kind of question and frame: crowded frames would have hundreds

_LARGEST = "What is the largest object in the image?"
_CLOSEST = "What is the closest object to the camera?"
_FARTHEST = "What is the farthest object from the camera?"
_COLOR = "What color is the {0}?"
_COUNT = "How many {plural} are there?"
_WHERE = "Where is the {0} relative to the {1}?"
_NEAREST = "What is closest to the {0}?"
_EXISTS = "Is there {a}?"
_CLOSER = "Is the {0} closer to the {1} than the {2} is?"
_RELATION = {
    "left": "Is the {0} to the left of the {1}?",
    "right": "Is the {0} to the right of the {1}?",
    "above": "Is the {0} above the {1}?",
    "below": "Is the {0} below the {1}?",
    "in front": "Is the {0} in front of the {1}?",
    "behind": "Is the {0} behind the {1}?",
}
_OPPOSITE = {"left": "right", "above": "below", "in front": "behind"}
_OPPOSITE |= {there: here for here, there in _OPPOSITE.items()}
_AXES = (("left", "right"), ("above", "below"), ("in front", "behind"))  # negative, positive side of x, y, z
NUMBERS = ("one", "two", "three", "four", "five", "six")


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one frame with its answer: one or two words, lower case, no article."""

    text: str
    answer: str
    type: str  # one of QUESTION_TYPES
    template: str  # the text before its nouns were filled in
    nouns: tuple[str, ...] = ()  # in the order of the text
    depth_answerable: bool = True  # False when only the colour image shows it
    pair: str = ""  # equal for a question and its twin with the roles swapped
    target_box: tuple[int, int, int, int] | None = (
        None  # x0, y0, x1, y1 in pixels of the object in question, x1, y1 exclusive
    )


@dataclass(frozen=True, slots=True)
class QuestionRow:
    """One line of a question file."""

    id: str
    question: str
    answer: str
    image_path: str  # relative to the data root, as depth_path
    depth_path: str
    type: str
    depth_answerable: bool = True
    sensor: str = ""
    scene: str = ""
    pair_id: str = ""  # empty unless the twin is in the file too
    target_box: tuple[int, int, int, int] | None = None


# Question file column -> field of QuestionRow; the first six are required and come in this order.
COLUMNS = {
    "Question_Id": "id", "Questions": "question", "Answers": "answer", "Image_Path": "image_path", "Depth_Path": "depth_path",
    "Question_Type": "type", "depth_answerable": "depth_answerable", "sensor": "sensor", "scene": "scene",
    "pair_id": "pair_id", "target_box": "target_box",
}  # fmt: skip
REQUIRED_COLUMNS = tuple(COLUMNS)[:6]
# The control tokens of LLaVA-OneVision's tokenizer. As part of a question they would be read as such: another image, another turn.
CONTROL_TOKENS = ("<image>", "<video>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")


def frame_candidates(
    instances: Sequence[Instance],
    *,
    rgb: np.ndarray | None,
    rng: np.random.Generator,
    unsure: Collection[str] = (),
    vocabulary: Collection[str] | None = None,
) -> list[Question]:
    """All questions about a frame that have one clear answer, not yet balanced.

    "The chair" needs a frame with exactly one chair. Nothing is asked about a noun that is `unsure`, or that has an instance
    too small to be seen. Data sets do not annotate everything, so "no" means: no annotator named it, or anything like it.

    Args:
        instances: the objects of the frame.
        rgb: (H, W, 3) uint8, aligned with the masks; None leaves out colours.
        rng: picks MAX_CANDIDATES questions of a kind where there are more.
        unsure: nouns of which the frame may hold more than `instances` shows.
        vocabulary: nouns to ask about when they are absent; None = the whole noun table.

    Returns:
        Questions with distinct texts.
    """
    shown = [thing for thing in instances if thing.mask.mean() >= MIN_AREA_SHARE]
    vague = set(unsure) | {thing.noun for thing in instances if thing.mask.mean() < MIN_AREA_SHARE}
    counts = Counter(thing.noun for thing in shown if not thing.contested)
    unique = [thing for thing in shown if counts[thing.noun] == 1 and thing.noun not in vague]
    placed = [thing for thing in unique if np.isfinite(thing.center_m).all()]
    # Where nothing is outlined nobody looked, or all of it has unknown names: that is no reason to call a thing absent.
    absent = _absent(counts.keys() | vague, asked_nouns() if vocabulary is None else vocabulary) if counts else []
    kinds = [
        _identification(shown),
        [(question,) for thing in unique if rgb is not None and (question := _color(thing, rgb))],
        [
            (_ask("Count", _COUNT, noun, answer=NUMBERS[n - 1]),)
            for noun, n in counts.items()
            if noun not in vague and n <= MAX_COUNT and countable(noun)
        ],
        _directions(placed),
        _nearest(placed, shown),
        [(_ask("Yes/No", _EXISTS, noun, answer="yes", target=_only(shown, noun)),) for noun in counts],
        [(_ask("Yes/No", _EXISTS, noun, answer="no"),) for noun in absent],
        _relations(placed),
        _comparisons(placed),
    ]
    return [question for groups in kinds for question in _some(groups, rng)]


def _some(groups: list[tuple[Question, ...]], rng: np.random.Generator) -> list[Question]:
    """At most MAX_CANDIDATES questions, twins together."""
    chosen: list[Question] = []
    for index in rng.permutation(len(groups)):
        if len(chosen) + len(groups[index]) <= MAX_CANDIDATES:
            chosen += groups[index]
    return chosen


def _ask(
    kind: str,
    template: str,
    *names: str,
    answer: str,
    target: Instance | None = None,
    pair: str = "",
    depth: bool = True,
) -> Question:
    words = {}
    if names:
        words = {"a": with_article(names[0]), "plural": plural(names[0])}
    box = mask_box(target.mask) if target is not None else None
    return Question(template.format(*names, **words), answer, kind, template, names, depth, pair, box)


def plural(noun: str) -> str:
    """The plural in the noun table, or the regular one."""
    return nouns().get(noun, {}).get("plural", f"{noun}s")


def countable(noun: str) -> bool:
    """Whether there can be two of it. Of a mass noun, such as soap, the table says so with an equal plural."""
    return plural(noun) != noun


def with_article(noun: str) -> str:
    """The noun with "a" or "an" in front, a mass noun alone."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" if countable(noun) else noun


def _only(things: Sequence[Instance], noun: str) -> Instance | None:
    found = [thing for thing in things if thing.noun == noun]
    return found[0] if len(found) == 1 else None


def _absent(present: Collection[str], vocabulary: Collection[str]) -> list[str]:
    """Nouns of the vocabulary that a frame does not show, nor anything that an annotator may have called the same."""
    lookalikes = {other for noun in present for other in nouns().get(noun, {}).get("similar", ())}
    return [
        noun
        for noun in vocabulary
        if noun not in present
        and noun not in lookalikes
        and not set(nouns().get(noun, {}).get("similar", ())) & set(present)
    ]


def _identification(shown: Sequence[Instance]) -> list[tuple[Question, ...]]:
    areas = [-float(thing.mask.sum()) for thing in shown]
    firsts = {
        _LARGEST: _clear_first(shown, areas, ratio=LARGEST_RATIO, gap=0.0),
        _CLOSEST: clearly_closest(shown),
        _FARTHEST: clearly_closest(shown, farthest=True),
    }
    return [
        (_ask("Object Identification", template, answer=first.noun, target=first),)
        for template, first in firsts.items()
        if first is not None
    ]


def clearly_closest(shown: Sequence[Instance], *, farthest: bool = False) -> Instance | None:
    """The object nearest to the camera (farthest from it), None unless all depths are known and it stands out."""
    depths = [-thing.depth_m if farthest else thing.depth_m for thing in shown]
    return _clear_first(shown, depths, ratio=CLOSEST_RATIO, gap=CLOSEST_GAP_M) if np.isfinite(depths).all() else None


def _clear_first(things: Sequence[Instance], values: Sequence[float], *, ratio: float, gap: float) -> Instance | None:
    """The thing with the smallest value, if the first of another noun is `ratio` times and `gap` away from it.

    Values of one sign; negative ones rank by the largest size. None without a second noun, or where its own is contested.
    """
    order = sorted(range(len(things)), key=values.__getitem__)
    rivals = [i for i in order if things[i].noun != things[order[0]].noun]
    if not rivals:
        return None
    first, second = values[order[0]], values[rivals[0]]
    small, large = sorted((abs(first), abs(second)))
    clear = large >= ratio * small and second - first >= gap and not things[order[0]].contested
    return things[order[0]] if clear else None


def _color(thing: Instance, rgb: np.ndarray) -> Question | None:
    exposure = max(float(np.quantile(rgb[::4, ::4].max(axis=-1), 0.95)), 1.0)
    name = color_name(rgb[thing.mask], white=exposure)
    return name and _ask("Color Identification", _COLOR, thing.noun, answer=name, target=thing, depth=False)


def color_name(pixels: np.ndarray, *, white: float = 255.0) -> str | None:
    """The colour that at least COLOR_MIN_SHARE of the pixels have, None without one.

    Args:
        pixels: (n, 3) uint8 RGB of one object.
        white: what the brightest part of the picture reaches, 1 to 255.
    """
    sampled = pixels[:: max(1, len(pixels) // 4000)]
    hue, saturation, value = rgb_to_hsv(sampled / 255).T
    degrees = hue * 360
    dark = value < 0.18
    neutral = ~dark & (saturation < 0.2)
    # Shading and exposure only darken, so the lit part tells white from gray, measured against the brightest part of the room.
    shade = "white" if neutral.any() and np.quantile(value[neutral], 0.8) > 0.65 * white / 255 else "gray"
    names = np.select(
        [
            dark,
            neutral,
            (degrees >= 12) & (degrees < 45) & ((value < 0.62) | (saturation < 0.7)),  # wood and leather
            degrees < 12,
            degrees < 42,
            degrees < 68,
            degrees < 165,
            degrees < 262,
            degrees < 295,
            (degrees < 345) | (saturation < 0.5),
        ],
        ["black", shade, "brown", "red", "orange", "yellow", "green", "blue", "purple", "pink"],
        "red",
    )
    name, count = Counter(names.tolist()).most_common(1)[0]
    return name if count >= COLOR_MIN_SHARE * len(names) else None


def direction(a: Instance, b: Instance) -> str | None:
    """Where a is relative to b for the viewer (in front = nearer to the camera); None when no axis dominates."""
    offset = a.center_m - b.center_m
    axis = int(np.abs(offset).argmax())
    first, second = np.sort(np.abs(offset))[:0:-1]
    if first < DIRECTION_MIN_M or first < DIRECTION_RATIO * second:
        return None
    return _AXES[axis][int(offset[axis] > 0)]


def _directions(placed: Sequence[Instance]) -> list[tuple[Question, ...]]:
    pairs = []
    for a, b in itertools.combinations(placed, 2):
        if (where := direction(a, b)) is not None:
            pair = f"where {a.noun}|{b.noun}"
            forth = _ask("Direction", _WHERE, a.noun, b.noun, answer=where, target=a, pair=pair)
            back = _ask("Direction", _WHERE, b.noun, a.noun, answer=_OPPOSITE[where], target=b, pair=pair)
            pairs.append((forth, back))
    return pairs


def _relations(placed: Sequence[Instance]) -> list[tuple[Question, ...]]:
    """Yes/No twins: "Is the A above the B?" and "Is the B above the A?".

    A pair of nouns is always asked about in the same one of the two directions of an axis, above or below, so that a wording
    comes back in other frames with the other answer: without that it could not be balanced.
    """
    pairs = []
    for a, b in itertools.combinations(placed, 2):
        if (where := direction(a, b)) is not None:
            asked = sorted((where, _OPPOSITE[where]))[sum((a.noun + b.noun).encode()) % 2]
            if asked != where:
                a, b, where = b, a, asked
            pair = f"is {where} {a.noun}|{b.noun}"
            yes = _ask("Yes/No", _RELATION[where], a.noun, b.noun, answer="yes", target=a, pair=pair)
            no = _ask("Yes/No", _RELATION[where], b.noun, a.noun, answer="no", target=b, pair=pair)
            pairs.append((yes, no))
    return pairs


def _nearest(placed: Sequence[Instance], shown: Sequence[Instance]) -> list[tuple[Question, ...]]:
    """Ask for the object that is closest to a unique one; every object of the frame is an option."""
    if not all(np.isfinite(thing.center_m).all() for thing in shown):
        return []  # the one of unknown place may be the closest
    questions = []
    for target in placed:
        others = [thing for thing in shown if thing is not target]
        distances = [_distance(target, other) for other in others]
        first = _clear_first(others, distances, ratio=PROXIMITY_RATIO, gap=PROXIMITY_GAP_M) if others else None
        if first is not None and all(_surfaces_agree(target, first, other) for other in others):
            questions.append((_ask("Proximity", _NEAREST, target.noun, answer=first.noun, target=first),))
    return questions


def _comparisons(placed: Sequence[Instance]) -> list[tuple[Question, ...]]:
    """Yes/No twins: "Is the A closer to the X than the B is?" and the same with A and B swapped.

    Asked as "Which is closer, A or B?" half of the answers could be guessed from the text, far more than from any other
    question of its type; as twins the guess is worth what it is worth in all Yes/No questions.
    """
    pairs = []
    for x in placed:
        for a, b in itertools.combinations([thing for thing in placed if thing is not x], 2):
            near = _clear_first((a, b), [_distance(x, a), _distance(x, b)], ratio=PROXIMITY_RATIO, gap=PROXIMITY_GAP_M)
            if near is None:
                continue
            far = b if near is a else a
            if _surfaces_agree(x, near, far):
                pair = f"closer {x.noun} {near.noun}|{far.noun}"
                yes = _ask("Yes/No", _CLOSER, near.noun, x.noun, far.noun, answer="yes", target=x, pair=pair)
                no = _ask("Yes/No", _CLOSER, far.noun, x.noun, near.noun, answer="no", target=x, pair=pair)
                pairs.append((yes, no))
    return pairs


def _distance(a: Instance, b: Instance) -> float:
    return float(np.linalg.norm(a.center_m - b.center_m))


def _surfaces_agree(x: Instance, near: Instance, far: Instance) -> bool:
    """Whether the boxes' surfaces name the same nearer object as their centres do; True where a box is missing.

    A ball may touch one end of a bed whose centre is far away: both readings of "closer" have to give the same answer.
    """
    if x.size_m is None or near.size_m is None or far.size_m is None:
        return True
    return _surface_gap(x, near) <= _surface_gap(x, far)


def _surface_gap(a: Instance, b: Instance) -> float:
    return float(np.linalg.norm(np.maximum(np.abs(a.center_m - b.center_m) - (a.size_m + b.size_m) / 2, 0)))


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


def question_rows(frame: Frame, questions: Sequence[Question]) -> Iterator[QuestionRow]:
    """Questions about a frame as lines of a question file."""
    pairs = Counter(question.pair for question in questions)
    for question in questions:
        yield QuestionRow(
            id=_hash(frame.path, question.text),
            question=question.text,
            answer=question.answer,
            image_path=frame.image_path,
            depth_path=frame.depth_path,
            type=question.type,
            depth_answerable=question.depth_answerable,
            sensor=frame.sensor,
            scene=frame.scene,
            pair_id=_hash(frame.path, question.pair) if question.pair and pairs[question.pair] > 1 else "",
            target_box=question.target_box,
        )


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join((str(GENERATOR_VERSION), *parts)).encode()).hexdigest()[:16]


def questions_file(root: Path, split: str) -> Path:
    """`csv_data/{train,val,test}_dataset.csv` below the data root."""
    return root / "SUNRGBD" / "csv_data" / f"{split}_dataset.csv"


def captions_file(root: Path, split: str) -> Path:
    """`csv_data/{train,val,test}_captions.csv`: a description of each frame, apart from what is trained on and counted."""
    return root / "SUNRGBD" / "csv_data" / f"{split}_captions.csv"


def unanswered_file(root: Path) -> Path:
    """`csv_data/train_unanswered.csv`: questions about training images whose Answers are left empty, for the teacher."""
    return root / "SUNRGBD" / "csv_data" / "train_unanswered.csv"


def write_questions(path: Path, rows: Sequence[QuestionRow]) -> None:
    """Write a question file, atomically."""
    with atomic_path(path) as part, open(part, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow(csv_cells(row).values())


def csv_cells(row: QuestionRow) -> dict[str, str]:
    """A row as the cells of a question file, by column name."""
    return {column: _cell(getattr(row, field)) for column, field in COLUMNS.items()}


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return "" if value is None else " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def read_questions(path: Path, *, root: Path | None = None, answered: bool = True) -> list[QuestionRow]:
    """Read a question file; columns after the required six may be missing.

    Args:
        path: a CSV file as `write_questions` makes it; a byte order mark and CRLF line ends do no harm.
        answered: every row must have an answer; False: none may, as `select_unanswered` makes them.
        root: the data root; given, every picture that the file names must exist below it, where its frame has it.

    Raises:
        UserError: a required column or value is missing, an id occurs twice, a question or an answer contains a control
            token, a picture is missing, belongs to another frame, or its path leaves the data root; names file and line.
    """
    rows, lines = [], {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle)
            missing = [column for column in REQUIRED_COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{path}:1: required column {', '.join(missing)} is missing")
            for cells in reader:
                row = _parse(cells, where=f"{path}:{reader.line_num}", answered=answered)
                if row.id in lines:
                    raise UserError(
                        f"{path}:{reader.line_num}: Question_Id {row.id} is already in line {lines[row.id]}"
                    )
                lines[row.id] = reader.line_num
                rows.append(row)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such question file; run python dataset/prepare_sunrgbd.py first") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: question file cannot be read ({error})") from error
    if not rows:
        raise UserError(f"{path}: the question file has no rows")
    if root is not None:
        _check_pictures(path, rows, lines, root)
    return rows


def _parse(cells: dict[str, str | None], *, where: str, answered: bool) -> QuestionRow:
    values = {field: (cells.get(column) or "").strip() for column, field in COLUMNS.items()}
    for column in REQUIRED_COLUMNS:
        if not values[COLUMNS[column]] and (answered or column != "Answers"):
            raise UserError(f"{where}: {column} is empty")
    if values["answer"] and not answered:
        raise UserError(f"{where}: Answers must be empty in a file of unanswered questions, got {values['answer']!r}")
    for column in ("Questions", "Answers"):
        found = [token for token in CONTROL_TOKENS if token in values[COLUMNS[column]]]
        if found:
            raise UserError(f"{where}: {column} contains {found[0]}, a control token of the model; take it out")
    for column in ("Image_Path", "Depth_Path"):
        if not _stays_inside(values[COLUMNS[column]]):
            raise UserError(
                f"{where}: {column} must be relative to ROOT_DATA_DIR and stay inside, got {cells[column]!r}"
            )
    answerable = values.pop("depth_answerable") or str(int(values["type"] != "Color Identification"))
    box = values.pop("target_box").split()
    if answerable not in ("0", "1"):
        raise UserError(f"{where}: depth_answerable must be 0 or 1, got {answerable!r}")
    if len(box) not in (0, 4) or not all(number.isdecimal() for number in box):
        raise UserError(f"{where}: target_box must be four whole numbers, got {' '.join(box)!r}")
    return QuestionRow(**values, depth_answerable=answerable == "1", target_box=tuple(map(int, box)) or None)


def _stays_inside(path: str) -> bool:
    return not path.startswith("/") and ".." not in path.split("/") and not set(path) & set("\\:")


def _check_pictures(path: Path, rows: Sequence[QuestionRow], lines: dict[str, int], root: Path) -> None:
    seen = set()
    for row in rows:
        if (row.image_path, row.depth_path) in seen:
            continue
        image, depth = PurePosixPath(row.image_path), PurePosixPath(row.depth_path)
        # Pictures are read from these two folders, which hold one file each: a row must not promise another one.
        if image.parent.name != "image" or depth.parent != image.parent.with_name("depth"):
            raise UserError(
                f"{path}:{lines[row.id]}: Image_Path and Depth_Path must lie in image/ and depth/ of one frame, got {image} and "
                f"{depth}; hole-filled depth is chosen with --depth_source bfx"
            )
        seen.add((row.image_path, row.depth_path))
        for picture in (row.image_path, row.depth_path):
            if not (root / picture).is_file():
                raise UserError(f"{path}:{lines[row.id]}: {picture} does not exist below {root}")
