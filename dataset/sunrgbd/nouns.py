"""The noun table: what annotators wrote -> the noun to ask about."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

NOUN_TABLE = Path(__file__).with_name("nouns.json")
MIN_HINT = 3  # letters that a noun must have to be looked for at the beginning or end of an unknown name
# Last words of names of accessories, which are no second object of the noun: a door's handle, a table's cloth.
ACCESSORIES = tuple(
    "handle handles knob knobs frame frames jamb way hinge lock bell stop stopper sill ledge rod rail ring holder "
    "hanger brush pad mat paper cloth sheet sheets cover lid label sticker reflection shadow".split()
)
# Words before a plural that make it a group: "pile of books".
GROUPS = tuple(f"{word} of" for word in "stack pile row group bunch set pair".split())


@cache
def nouns() -> dict[str, dict[str, Any]]:
    """The table `nouns.json`: canonical noun -> its entry; see `dataset.sunrgbd.build_nouns`.

    plural   the plural; the noun itself where it cannot be counted (soap)
    aliases  other names of one such object; found: spellings of names that the script found
    unclear  names of something that may be any number of such objects
    not      spellings that only resemble a name of the noun
    similar  nouns that annotators may have used instead
    asked    false for parts of the room
    """
    return json.loads(NOUN_TABLE.read_text(encoding="utf-8"))


@cache
def asked_nouns() -> tuple[str, ...]:
    """The nouns that questions may be about: all but walls, floors and ceilings."""
    return tuple(noun for noun, entry in nouns().items() if entry.get("asked", True))


def canonical_noun(raw: str) -> str | None:
    """The noun of the table that an annotator's name stands for; None for an unknown name.

    Case, spaces, underscores, digits, stray punctuation and suffixes such as ':occluded' do not matter: 'Night_Stand2',
    'nightstand' and 'bedside table:truncated' are all 'night stand'. A plural ('chairs') gives the noun too.
    """
    found = _spellings().get(letters(raw))
    return found[0] if found else None


def names_group(raw: str) -> bool:
    """Whether the name is a plural or unclear, so that one outline may be any number of objects."""
    found = _spellings().get(letters(raw))
    return bool(found and found[1])


def hinted_nouns(raw: str) -> set[str]:
    """The asked nouns at the beginning or end of an unknown name: a 'tablecloth' may lie on a table.

    The object itself is either another thing ('chairback') or an unknown number of them ('fiveredchairs').
    """
    key = letters(raw)
    parts = {key[:i] for i in range(MIN_HINT, len(key))} | {key[i:] for i in range(1, len(key) - MIN_HINT + 1)}
    return {_spellings()[part][0] for part in parts & _spellings().keys()} & set(asked_nouns())


def letters(raw: str) -> str:
    """The letters of a name, by which names are compared: layers disagree on spaces ('cardboardbox', 'night_stand')."""
    return re.sub("[^a-z]", "", str(raw).lower().split(":")[0])


@cache
def _spellings() -> dict[str, tuple[str, bool]]:
    return spellings(nouns())


def spellings(table: dict[str, dict[str, Any]]) -> dict[str, tuple[str, bool]]:
    """Letters of a spelling -> (noun, whether it is a plural or unclear).

    A plural that the table lists as an alias stands for one object.
    """
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
