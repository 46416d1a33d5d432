"""When two answers are the same, and rows grouped by what they share."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from dataset.questions.rows import QUESTION_TYPES

Row = Mapping[str, Any]
_NUMBER_WORDS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
# Contractions are also recognised without their apostrophe, except where that is another word (its, were, well, id).
_CONTRACTIONS = {
    word.replace("'", ""): word
    for word in (
        "ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't "
        "shouldn't wasn't weren't won't wouldn't could've might've should've would've i'm i've you're you've they're "
        "they've we've he's she's that's there's here's what's where's who's how's let's they'll you'll that'll "
        "it'll o'clock ma'am y'all"
    ).split()
}


def normalise_answer(text: str) -> str:
    """An answer in lower case, without articles and punctuation, with number words as digits and full contractions.

    Points between digits stay, commas between digits are removed, every other mark separates words.

    Source: the answer processing described at https://visualqa.org/evaluation.html. Differs: a mark always becomes a
    space, where the published code joins or separates depending on the spaces around the other marks of the text.
    """
    text = " ".join(text.lower().replace("\u2019", "'").split())
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"\.(?!\d)", "", text)
    text = re.sub(r"[^\w\s'.]|_", " ", text)
    words = (word.strip("'") for word in text.split())
    words = (_NUMBER_WORDS.get(word, _CONTRACTIONS.get(word, word)) for word in words if word not in _ARTICLES)
    return " ".join(word for word in words if word)


def answer_items(text: str) -> frozenset[str]:
    """The normalised items of an answer, which commas separate: one for most answers, none for a blank one.

    A comma between digits belongs to a number.
    """
    items = (normalise_answer(item) for item in re.split(r"(?<!\d),|,(?!\d)", text))
    return frozenset(item for item in items if item)


def exact_match(prediction: str, answer: str) -> bool:
    """Whether both list the same items, in any order (see `answer_items`). An empty prediction is never right."""
    items = answer_items(prediction)
    return bool(items) and items == answer_items(answer)


def group_by(rows: Iterable[Row], column: str) -> dict[str, list[Row]]:
    """Rows by the text in `column`; rows where it is absent or blank are left out."""
    groups = defaultdict(list)
    for row in rows:
        key = str(row.get(column, "")).strip()
        if key:
            groups[key].append(row)
    return dict(groups)


def order_types(types: Iterable[str]) -> list[str]:
    """Question types in their usual order, then unknown ones in alphabetical order."""
    rank = {kind: position for position, kind in enumerate(QUESTION_TYPES)}
    return sorted(types, key=lambda kind: (rank.get(kind, len(rank)), kind))
