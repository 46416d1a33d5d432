"""Fill the noun table with the spellings that annotators used, and print what the table covers.

SUN RGB-D's names are free text: "woodenchair", "chiar", "chair2". A person writes the table's nouns with their plurals,
`aliases`, `unclear` and `similar` names. From lists of raw names this script adds the spellings that follow from these,
as `found`: a known name behind words of color, material, size or place, a known name before "of" something, or a known
name with one typo. A spelling that would fit two nouns is added to neither. A person then reads the diff of the table
and puts what is wrong into the noun's `not`: "chain" is no chair.

Reads   dataset/sunrgbd/nouns.json and lists of raw names: .json (an array of names, or an object with names as keys),
        .csv (the column Name_6585, as in tables of the toolbox's label names), or a text file with a name per line;
        with --frequencies a .csv of names (class) and the number of frames that have them (scene_frequency)
Writes  dataset/sunrgbd/nouns.json

    python dataset/sunrgbd/build_nouns.py names.json names.csv
    python dataset/sunrgbd/build_nouns.py --check names.json names.csv  # write nothing, fail if the table would change
    python dataset/sunrgbd/build_nouns.py --frequencies frames.csv      # print which share of the used names has a noun

The table of this repository was made from the 14,424 names of Yannick947/data_generator_sunrgbd
(raw_to_cleaned_names.json) and the 6,113 names of the toolbox's segmentation labels, in this order.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils import UserError, atomic_path, run_script

# isort: split
import argparse
import csv
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from dataset.sunrgbd.annotations import Coverage
from dataset.sunrgbd.nouns import NOUN_TABLE, letters, nouns, spellings

Table = dict[str, dict[str, Any]]
FIELDS = ("plural", "aliases", "found", "not", "unclear", "similar", "asked")
# Words of color, material, size, place and use that annotators put in front of a noun.
QUALIFIERS = tuple(
    "black white blue red green yellow brown grey gray orange pink purple dark silver gold wood wooden metal plastic "
    "glass leather steel iron small big large little tiny long tall low short round circular square left right front "
    "back rear middle center centre corner upper lower top bottom another other second first third single double old "
    "new empty open closed office kitchen school student classroom library bathroom bedroom decorative framed rolling "
    "wheeled portable digital electric folded hanging mounted rectangular rounded rectangle ceramic stainless beige "
    "tan maroon rolled cement concrete partial hallway store lab side".split()
)
TYPO_LETTERS = 5  # letters that a name must have to be recognised with a typo; shorter ones resemble too many words
HEADS_SHOWN = 40  # last words, or names, that are printed


def read_names(path: Path) -> list[str]:
    """The raw names of a list, in its order.

    Raises:
        UserError: the list cannot be read or holds no name.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            names = [name for name in json.loads(text) if isinstance(name, str)]
        elif path.suffix == ".csv":
            names = [row["Name_6585"] for row in csv.DictReader(text.splitlines())]
        else:
            names = text.splitlines()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: no list of names ({type(error).__name__}: {error})") from error
    if not names:
        raise UserError(f"{path}: holds no names")
    return names


def with_found(table: Table, names: Iterable[str]) -> Table:
    """The table with `found` computed from raw names; what `found` held before has no influence."""
    bare = {noun: {key: value for key, value in entry.items() if key != "found"} for noun, entry in table.items()}
    known = spellings(bare)
    singular = {spelling: noun for spelling, (noun, group) in known.items() if not group}
    typos = _typos(singular)
    found: dict[str, set[str]] = {noun: set() for noun in bare}
    for key in {letters(name) for name in names} - known.keys():
        noun = _behind_qualifiers(key, singular) or _full_of(key, singular) or _with_one_typo(key, typos)
        if noun and key not in bare[noun].get("not", ()):
            found[noun].add(key)
    filled = {noun: {**entry, "found": sorted(found[noun])} for noun, entry in bare.items()}
    return {noun: {key: entry[key] for key in FIELDS if key in entry} for noun, entry in filled.items()}


def _behind_qualifiers(key: str, singular: dict[str, str]) -> str | None:
    """The noun of `smallwoodentable`."""
    for qualifier in QUALIFIERS:
        if key.startswith(qualifier):
            rest = key.removeprefix(qualifier)
            noun = singular.get(rest) or _behind_qualifiers(rest, singular)
            if noun:
                return noun
    return None


def _full_of(key: str, singular: dict[str, str]) -> str | None:
    """The noun of `bottleofketchup`: the part before "of"."""
    return next(
        (singular[key[:i]] for i in range(len(key) - 3, 2, -1) if key[:i] in singular and key[i : i + 2] == "of"), None
    )


def _typos(singular: dict[str, str]) -> dict[str, set[str]]:
    """Name without one letter -> the nouns whose names it may come from."""
    typos: dict[str, set[str]] = {}
    for spelling, noun in singular.items():
        if len(spelling) >= TYPO_LETTERS:
            for rest in _less_one(spelling):
                typos.setdefault(rest, set()).add(noun)
    return typos


def _less_one(key: str) -> set[str]:
    """The word itself, and the word without one of its letters. The first letter stays: it is seldom wrong."""
    return {key} | {key[:i] + key[i + 1 :] for i in range(1, len(key))}


def _with_one_typo(key: str, typos: dict[str, set[str]]) -> str | None:
    """The only noun of which the key is a name with one letter missing, added, replaced or moved; else None.

    None for a key that ends in s, too: that is a plural, or a mistake in one.
    """
    if len(key) < TYPO_LETTERS - 1 or key.endswith("s"):
        return None
    near = set().union(*(typos.get(rest, ()) for rest in _less_one(key)))
    return near.pop() if len(near) == 1 else None


def table_text(table: Table) -> str:
    """The file's text: a line per noun."""
    lines = (f"  {json.dumps(noun)}: {json.dumps(entry)}" for noun, entry in table.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_frequencies(path: Path) -> dict[str, int]:
    """Name -> the number of frames that have it.

    Raises:
        UserError: the file cannot be read, lacks a column, or has something else in place of a number; names the row.
    """
    frames: dict[str, int] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle)
            for row in reader:
                frames[row["class"]] = frames.get(row["class"], 0) + int(row["scene_frequency"])
    except KeyError as error:
        raise UserError(f"{path}: has no column {error.args[0]}; give one with class and scene_frequency") from error
    except (TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path}:{reader.line_num}: no name with a number of frames ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not sum(frames.values()):
        raise UserError(f"{path}: holds no names")
    return frames


def weighed_coverage(frames: dict[str, int]) -> Coverage:
    """The coverage of all pairs of frame and name by this repository's table; pairs have no area."""
    coverage = Coverage()
    for name, n in frames.items():
        coverage.add(name, 0.0, times=n)
    return coverage


def print_weighed_coverage(frames: dict[str, int]) -> None:
    """Print which share of the pairs of frame and name has a noun, and the most frequent names without one.

    Parts of the room are counted apart.
    """
    coverage = weighed_coverage(frames)
    known, unknown, structure = (coverage.outlines[kind] for kind in ("known", "unknown", "structure"))
    share = f"{known / (known + unknown):.1%} of {known + unknown:,}" if known + unknown else "none"
    print(
        f"{share} pairs of frame and name have a noun, not counting {structure:,} of walls, floors and other room parts"
    )
    listed = ", ".join(f"{name or '(none)'} {n}" for name, n in coverage.unknown_names.most_common(HEADS_SHOWN))
    print(f"most frequent other names: {listed}")


def print_coverage(table: Table, lists: dict[Path, list[str]]) -> None:
    """Print which share of each list's names the table knows, and the most frequent last words of the others."""
    known = spellings(table)
    print(f"{len(table)} nouns, {sum(not group for _, group in known.values()):,} spellings")
    for path, names in lists.items():
        mapped = sum(letters(name) in known for name in names)
        print(f"{path.name}: {mapped:,} of {len(names):,} names ({mapped / len(names):.1%}) are in the table")
    names = [name for listed in lists.values() for name in listed]
    unknown = {key: None for name in names if (key := letters(name)) not in known}
    words = _words(names)
    heads = Counter(_head(key, words) for key in unknown)
    print(
        "most of the others end in: " + ", ".join(f"{head} {n}" for head, n in heads.most_common(HEADS_SHOWN) if head)
    )


def _words(names: Iterable[str]) -> Collection[str]:
    """The last words of all names."""
    return {words[-1] for name in names if (words := re.findall("[a-z]{3,}", name.lower()))}


def _head(key: str, words: Collection[str]) -> str:
    """The longest of the words that the name ends in, else the name: `papertoweldispenser` is a dispenser."""
    return next((key[i:] for i in range(1, len(key) - 2) if key[i:] in words), key)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("lists", type=Path, nargs="*", metavar="LIST", help="file with raw names, see above for the formats")
    add("--check", action="store_true", help="write nothing, and fail if the lists would change the table")
    add(
        "--frequencies",
        type=Path,
        metavar="FILE",
        help="write nothing; print which share of the names in this table of names and frames has a noun",
    )
    args = parser.parse_args(argv)
    if bool(args.lists or args.check) == bool(args.frequencies):
        parser.error("give lists of names, or --frequencies FILE alone")
    if not (args.lists or args.frequencies):
        parser.error("--check needs the lists of names")
    return args


def main(args: argparse.Namespace) -> None:
    """Refresh the table, or check it, and print what it covers."""
    if args.frequencies:
        print_weighed_coverage(read_frequencies(args.frequencies))
        return
    lists = {path: read_names(path) for path in args.lists}
    table = with_found(nouns(), (name for names in lists.values() for name in names))
    print_coverage(table, lists)
    if args.check and table != nouns():
        changed = sorted(noun for noun in table if table[noun] != nouns()[noun])
        raise UserError(f"{NOUN_TABLE}: the lists give other spellings of {', '.join(changed)}; run without --check")
    if not args.check:
        with atomic_path(NOUN_TABLE) as part:
            part.write_text(table_text(table), encoding="utf-8")


if __name__ == "__main__":
    run_script(main, parse_args)
