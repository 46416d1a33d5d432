"""One description per frame: the room, its objects and their numbers, their order from left to right, the nearest one.

Captions are there for caption metrics. They state only what is as clear as an answer has to be, by the margins of
`dataset.questions.generate`.
"""

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from dataset.questions.generate import MIN_AREA_SHARE, NUMBERS, clearly_closest, countable, plural, with_article
from dataset.questions.rows import CAPTION_TYPE, Question
from dataset.sunrgbd.annotations import Instance

CAPTION_QUESTION = "Describe the room."
MAX_NOUNS = 6  # nouns in a caption, those of the largest objects
ORDER_GAP = 0.08  # smallest distance, in image widths, between the middles of two neighbours in "from left to right"


def frame_caption(instances: Sequence[Instance], *, scene: str, unsure: Collection[str] = ()) -> Question | None:
    """A caption as the answer to `CAPTION_QUESTION`; None for a frame that shows no object.

    "An office with two shelves, a chair and a box. From left to right: the chair, the box. The box is closest to the
    camera."

    Args:
        instances: the objects of the frame.
        scene: `Frame.scene`.
        unsure: nouns of which the frame may hold more than `instances` shows; they are mentioned without a number.
    """
    shown = [thing for thing in instances if thing.mask.mean() >= MIN_AREA_SHARE]
    small = {thing.noun for thing in instances if thing.mask.mean() < MIN_AREA_SHARE}
    areas: Counter = Counter()
    for thing in shown:
        if not thing.contested:
            areas[thing.noun] += thing.mask.sum()
    if not areas:
        return None
    named = [noun for noun, _ in areas.most_common(MAX_NOUNS)]
    counts = Counter(thing.noun for thing in shown)
    vague = set(unsure) | small
    sentences = [f"{_room(scene)} with {_listed([_counted(noun, counts[noun], vague) for noun in named])}."]
    single = [thing for thing in shown if counts[thing.noun] == 1 and thing.noun not in vague and thing.noun in named]
    order = _left_to_right(single)
    if len(order) > 1:
        sentences.append(f"From left to right: {', '.join(f'the {noun}' for noun in order)}.")
    nearest = clearly_closest(shown)
    if nearest is not None and any(thing is nearest for thing in single):
        sentences.append(f"The {nearest.noun} is closest to the camera.")
    return Question(CAPTION_QUESTION, " ".join(sentences), CAPTION_TYPE, CAPTION_QUESTION)


def _room(scene: str) -> str:
    """The label of scene.txt as a noun with its article; "A room" for `idk` or an empty label."""
    words = scene.replace("_", " ").strip().lower()
    return with_article(words if words not in ("", "idk") else "room").capitalize()


def _counted(noun: str, n: int, vague: Collection[str]) -> str:
    if noun in vague or n > len(NUMBERS) or not countable(noun):
        return f"some {plural(noun)}"
    return with_article(noun) if n == 1 else f"{NUMBERS[n - 1]} {plural(noun)}"


def _listed(parts: Sequence[str]) -> str:
    """Parts joined by commas, the last one by "and"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _left_to_right(things: Sequence[Instance]) -> list[str]:
    """Nouns in the order of the middles of their masks; of two that are too close to order, only the larger one."""
    middles: list[tuple[float, str]] = []
    for thing in sorted(things, key=lambda thing: -int(thing.mask.sum())):
        middle = float(np.nonzero(thing.mask)[1].mean()) / thing.mask.shape[1]
        if all(abs(middle - other) >= ORDER_GAP for other, _ in middles):
            middles.append((middle, thing.noun))
    return [noun for _, noun in sorted(middles)]
