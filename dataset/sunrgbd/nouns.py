"""The noun table: what annotators wrote -> the noun to ask about."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

NOUN_TABLE = Path(__file__).with_name("nouns.json")
MIN_HINT = 3  # letters of a noun at the beginning or end of an unknown name
ACCESSORIES = tuple(  # last words of names of what belongs to a thing and is no second one: a door's handle, a table's cloth
    "handle handles knob knobs frame frames jamb way hinge lock bell stop stopper sill ledge rod rail ring holder hanger brush pad "
    "mat paper cloth sheet sheets cover lid label sticker reflection shadow".split()
)
GROUPS = tuple(
    f"{word} of" for word in "stack pile row group bunch set pair".split()
)  # before a plural: "pile of books"


@cache
def nouns() -> dict[str, dict[str, Any]]:
    """The table `nouns.json`: canonical noun -> what is known about it; see `dataset.sunrgbd.build_nouns`.

    `plural`, the noun itself where it cannot be counted (soap); `aliases` and `found`, other names of one such thing;
    `unclear`, names of what may hold any number of them; `not`, what only looks like a name; `similar`, nouns that annotators
    may have used instead; `asked`, false for parts of the room.
    """
    return json.loads(NOUN_TABLE.read_text(encoding="utf-8"))


@cache
def asked_nouns() -> tuple[str, ...]:
    """The nouns that questions may be about: all but walls, floors and ceilings."""
    return tuple(noun for noun, entry in nouns().items() if entry.get("asked", True))


def canonical_noun(raw: str) -> str | None:
    """The noun of the table that an annotator's name stands for, None when it stands for none.

    Case, spaces, underscores, digits, stray punctuation and suffixes such as ':occluded' do not matter: 'Night_Stand2',
    'nightstand' and 'bedside table:truncated' are all 'night stand'. A plural ('chairs') gives the noun too.
    """
    found = _spellings().get(letters(raw))
    return found[0] if found else None


def names_group(raw: str) -> bool:
    """Whether the name is a plural or unclear, so that one outline covers an unknown number of objects."""
    found = _spellings().get(letters(raw))
    return bool(found and found[1])


def hinted_nouns(raw: str) -> set[str]:
    """The asked nouns that begin or end a name which the table does not know: a 'tablecloth' may lie on a table.

    What bears such a name is none of them, or nobody knows how many ('chairback', 'fiveredchairs').
    """
    key = letters(raw)
    parts = {key[:i] for i in range(MIN_HINT, len(key))} | {key[i:] for i in range(1, len(key) - MIN_HINT + 1)}
    return {_spellings()[part][0] for part in parts & _spellings().keys()} & set(asked_nouns())


def letters(raw: str) -> str:
    """What names are compared by. Layers disagree on spaces ('cardboardbox', 'night_stand'), so it is their letters alone."""
    return re.sub("[^a-z]", "", str(raw).lower().split(":")[0])


@cache
def _spellings() -> dict[str, tuple[str, bool]]:
    return spellings(nouns())


def spellings(table: dict[str, dict[str, Any]]) -> dict[str, tuple[str, bool]]:
    """Letters of a spelling -> (noun, is a plural or unclear). A plural that the table lists as an alias is one object."""
    singular, plural = {}, {}
    for noun, entry in table.items():
        several = [entry["plural"]]
        for name in (noun, *entry["aliases"], *entry.get("found", ())):
            singular[letters(name)] = (noun, False)
            several += [f"{name}s", f"{name}es", *([f"{name[:-1]}ies"] if name.endswith("y") else [])]
        in_groups = [f"{group} {form}" for form in several for group in GROUPS]
        for name in (*several, *in_groups, *entry.get("unclear", ())):
            plural[letters(name)] = (noun, True)
    return plural | singular
