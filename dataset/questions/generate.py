"""Instances -> all questions about a frame that have one clear answer.

The same generator serves SUN RGB-D and the miniature world; `dataset.questions.balance` selects from its questions.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
from matplotlib.colors import rgb_to_hsv

from dataset.questions.rows import Question
from dataset.sunrgbd.annotations import Instance, mask_box
from dataset.sunrgbd.nouns import asked_nouns, nouns

# Margins that make an answer clear. Lengths are in metres, between centres of objects, in the gravity frame.
MIN_AREA_SHARE = 0.005  # of the image; smaller objects are neither asked about nor counted
LARGEST_RATIO = 1.3  # largest visible area / that of the next noun
CLOSEST_GAP_M, CLOSEST_RATIO = 0.3, 1.1  # depth of the closest (farthest) object, compared with the next noun's
DIRECTION_MIN_M, DIRECTION_RATIO = 0.25, 1.6  # offset along the dominant axis; its ratio to the other two axes
PROXIMITY_GAP_M, PROXIMITY_RATIO = 0.25, 1.35  # distance of the farther object, compared with the nearer one's
COLOR_MIN_SHARE = 0.6  # of the object's pixels
MAX_COUNT = 6
MARGINS = {
    "min_area_share": MIN_AREA_SHARE, "largest_ratio": LARGEST_RATIO, "closest_gap_m": CLOSEST_GAP_M,
    "closest_ratio": CLOSEST_RATIO, "direction_min_m": DIRECTION_MIN_M, "direction_ratio": DIRECTION_RATIO,
    "proximity_gap_m": PROXIMITY_GAP_M, "proximity_ratio": PROXIMITY_RATIO, "color_min_share": COLOR_MIN_SHARE,
    "max_count": MAX_COUNT,
}  # fmt: skip
MAX_CANDIDATES = 12  # per kind of question and frame; crowded frames would have hundreds
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


def frame_candidates(
    instances: Sequence[Instance],
    *,
    rgb: np.ndarray | None,
    rng: np.random.Generator,
    unsure: Collection[str] = (),
    vocabulary: Collection[str] | None = None,
) -> list[Question]:
    """All questions about a frame that have one clear answer, not yet balanced.

    "The chair" needs a frame with exactly one chair. Nothing is asked about a noun that is `unsure`, or that has an
    instance too small to be seen. Not every object is annotated, so the answer "no" means that no annotator named such
    an object or a similar one.

    Args:
        instances: the objects of the frame.
        rgb: (H, W, 3) uint8, aligned with the masks; None leaves out questions about colors.
        rng: picks MAX_CANDIDATES questions of a kind where there are more.
        unsure: nouns of which the frame may have more than `instances` has.
        vocabulary: nouns to ask about when they are absent; None = the whole noun table.

    Returns:
        Questions with distinct texts.
    """
    shown = [thing for thing in instances if thing.mask.mean() >= MIN_AREA_SHARE]
    vague = set(unsure) | {thing.noun for thing in instances if thing.mask.mean() < MIN_AREA_SHARE}
    counts = Counter(thing.noun for thing in shown if not thing.contested)
    unique = [thing for thing in shown if counts[thing.noun] == 1 and thing.noun not in vague]
    placed = [thing for thing in unique if np.isfinite(thing.center_m).all()]
    # Without a known object the frame was not annotated, or all names are unknown. Then nothing can be called absent.
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
    """Whether there can be two of it. In the noun table a mass noun, such as soap, is its own plural."""
    return plural(noun) != noun


def with_article(noun: str) -> str:
    """The noun with "a" or "an" in front; a mass noun without."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" if countable(noun) else noun


def _only(things: Sequence[Instance], noun: str) -> Instance | None:
    found = [thing for thing in things if thing.noun == noun]
    return found[0] if len(found) == 1 else None


def _absent(present: Collection[str], vocabulary: Collection[str]) -> list[str]:
    """Nouns of the vocabulary that a frame does not have, nor a noun that annotators may have used instead."""
    similar = {other for noun in present for other in nouns().get(noun, {}).get("similar", ())}
    return [
        noun
        for noun in vocabulary
        if noun not in present
        and noun not in similar
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
    """The object nearest to the camera (farthest from it); None when a depth is unknown or none is clearly first."""
    depths = [-thing.depth_m if farthest else thing.depth_m for thing in shown]
    return _clear_first(shown, depths, ratio=CLOSEST_RATIO, gap=CLOSEST_GAP_M) if np.isfinite(depths).all() else None


def _clear_first(things: Sequence[Instance], values: Sequence[float], *, ratio: float, gap: float) -> Instance | None:
    """The thing with the smallest value, if the first one of another noun differs by a factor `ratio` and by `gap`.

    All values have the same sign; with negative ones the thing of largest magnitude comes first. None without a second
    noun, or when the first thing's noun is contested.
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
    """The color that at least COLOR_MIN_SHARE of the pixels have; None without one.

    Args:
        pixels: (n, 3) uint8 RGB of one object.
        white: value of the brightest part of the picture, 1 to 255.
    """
    sampled = pixels[:: max(1, len(pixels) // 4000)]
    hue, saturation, value = rgb_to_hsv(sampled / 255).T
    degrees = hue * 360
    dark = value < 0.18
    neutral = ~dark & (saturation < 0.2)
    # Shading only darkens, so white is told from gray by the object's bright part, relative to the picture's brightest.
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
    """Where a is relative to b for the viewer ("in front" = nearer to the camera); None when no axis dominates."""
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

    For each axis a pair of nouns always gets the same one of the two words, say "above" and never "below". The same
    wording then occurs in other frames with the other answer, which balancing needs.
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
    """Ask for the object that is closest to a unique one; the answer may be any object of the frame."""
    if not all(np.isfinite(thing.center_m).all() for thing in shown):
        return []  # an object at an unknown position may be the closest
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

    "Which is closer, A or B?" would name both answers: half of them could be guessed from the text, far more than in
    other questions about proximity. As a Yes/No question it can also be guessed half of the time, like all of that
    type.
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
    """Whether `near` is also the nearer one by the gap between the boxes' surfaces; True where a box is missing.

    A ball may touch one end of a bed whose centre is far away. "Closer" by surfaces and by centres has to give the same
    answer.
    """
    if x.size_m is None or near.size_m is None or far.size_m is None:
        return True
    return _surface_gap(x, near) <= _surface_gap(x, far)


def _surface_gap(a: Instance, b: Instance) -> float:
    return float(np.linalg.norm(np.maximum(np.abs(a.center_m - b.center_m) - (a.size_m + b.size_m) / 2, 0)))
