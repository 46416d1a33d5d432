"""The noun table: forms, false friends, and the script that fills it from lists of raw names."""

import json
import re

import pytest

from dataset.questions.generate import countable, plural, with_article
from dataset.sunrgbd import build_nouns
from dataset.sunrgbd.build_nouns import (
    FIELDS,
    NOUN_TABLE,
    main,
    parse_args,
    read_frequencies,
    read_names,
    table_text,
    weighed_coverage,
    with_found,
)
from dataset.sunrgbd.nouns import asked_nouns, canonical_noun, letters, names_group, nouns, spellings
from utils import UserError

IRREGULAR = {
    "mouse": "mice", "person": "people", "shelf": "shelves", "knife": "knives",
    "pair of headphones": "pairs of headphones", "pair of scissors": "pairs of scissors",
}  # fmt: skip
MASS_NOUNS = ("chalk", "clothing", "food", "fruit", "paper", "soap", "tape", "toilet paper", "toothpaste")
SEMANTIC_CLASSES = """
    wall floor cabinet bed chair sofa table door window bookshelf picture counter blinds desk shelves curtain dresser
    pillow
    mirror floor_mat ceiling books fridge tv towel shower_curtain box whiteboard person night_stand toilet sink lamp
    bathtub bag
    clothes paper
"""  # the 37 of SUN RGB-D
DETECTION_CLASSES = """
    bathtub bed bookshelf box chair counter desk door dresser garbage_bin lamp monitor night_stand pillow sink sofa
    table tv toilet
"""


def regular_plural(noun: str) -> str:
    if re.search("(s|x|z|ch|sh)$", noun):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if re.search("[^aeiou]y$", noun) else f"{noun}s"


def test_every_noun_has_its_plural():
    for noun in nouns():
        assert noun == " ".join(re.findall("[a-z]+", noun))
        assert canonical_noun(plural(noun)) == noun and not names_group(noun)
        assert countable(noun) == (noun not in MASS_NOUNS)
        if noun in MASS_NOUNS:
            assert plural(noun) == with_article(noun) == noun
            continue
        assert plural(noun) == IRREGULAR.get(noun, regular_plural(noun))
        assert not noun.endswith("s") or noun in ("mattress", "thermos", "drinking glass", *IRREGULAR)
        assert names_group(plural(noun)) or noun == "shelf"  # annotators call one unit "shelves"
        assert with_article(noun).split()[0] == ("an" if noun[0] in "aeiou" else "a")
    assert not [
        noun for noun in nouns() if re.match("hour|honest|uni|use|ute|eu|one", noun)
    ]  # "a" and "an" go by the letter


def test_table_is_unambiguous():
    owners = {}
    for noun, entry in nouns().items():
        assert set(entry) <= set(FIELDS) and list(entry) == [field for field in FIELDS if field in entry]
        assert set(entry.get("similar", ())) <= nouns().keys() - {noun}
        for name in (noun, *entry["aliases"], *entry["found"]):
            assert owners.setdefault(letters(name), noun) == noun, name
            assert canonical_noun(name) == noun and not names_group(name)
        for name in entry.get("unclear", ()):
            assert canonical_noun(name) == noun and names_group(name), name
        assert not {canonical_noun(name) for name in entry.get("not", ())} - {None}
    for spelling, (noun, _) in spellings(nouns()).items():  # no plural of one noun is a name of another
        assert owners.get(spelling, noun) == noun, spelling
    assert 280 <= len(asked_nouns()) <= 290
    assert set(nouns()) - set(asked_nouns()) == {"wall", "floor", "ceiling", "carpet", "baseboard"}
    assert not {"thing", "object", "item", "stuff", "unknown"} & spellings(nouns()).keys()


def test_the_classes_of_the_data_set_have_a_noun():
    for name in (SEMANTIC_CLASSES + DETECTION_CLASSES).split():
        assert canonical_noun(name), name


@pytest.mark.parametrize(
    "name",
    """
    tabletop chairmat doorway doorframe bedframe lampshade windowsill windowframe drawerhandle cabinetdoor doorhandle
    doorknob
    tableleg chairleg chairback seatofchair drawerknob monitorstand toilethandle keyboardtray background sidewalk
    chain tower
    stone bracket cloak bookmark cupholder sinkpipe border pepper market racket accent drink truck wallplate tissuepaper
    object blackobject device electronicdevice machine furniture thing unknown misc darkarea reflection room hallway
    wood steel
    """.split(),
)
def test_false_friends(name):
    assert canonical_noun(name) is None


def test_what_is_found_follows_from_the_names():
    table = {
        "chair": {"plural": "chairs", "aliases": ["arm chair"], "found": ["nonsense"], "not": ["chain"]},
        "table": {"plural": "tables", "aliases": [], "similar": ["desk"]},
        "cable": {"plural": "cables", "aliases": []},
        "desk": {"plural": "desks", "aliases": []},
    }
    names = [
        "small_Wooden chair3", "redarmchair", "chiar", "chairr", "chir", "armchar", "chain", "chairs", "blackchairs",
        "charis",
        "chair", "hair", "fchair", "tabel", "tble", "fable", "dsk", "metal desk", "kitchen", "", "????",
        "table of oak", "tables of oak",
    ]  # fmt: skip
    filled = with_found(table, names)
    assert filled["chair"]["found"] == ["armchar", "chairr", "chiar", "chir", "redarmchair", "smallwoodenchair"]
    assert filled["table"] == {
        "plural": "tables",
        "aliases": [],
        "found": ["tabel", "tableofoak", "tble"],
        "similar": ["desk"],
    }
    assert filled["desk"]["found"] == ["metaldesk"] and filled["cable"]["found"] == []
    assert with_found(filled, reversed(names)) == filled
    assert with_found({**table, "chair": {**table["chair"], "not": []}}, names)["chair"]["found"].count("chain") == 1


@pytest.mark.parametrize(
    ("name", "noun"),
    [
        ("paper", "paper"), ("head board", "headboard"), ("switch", "light switch"), ("electrical_outlet", "outlet"),
        ("tv remote", "remote"), ("handsoap", "soap"), ("stapeler", "stapler"), ("dishrack", "drying rack"),
        ("towelrod", "towel rack"), ("toiletpaper", "toilet paper"), ("cords", "cable"),
        ("scissors", "pair of scissors"),
        ("tablecloth", "tablecloth"), ("bottleofketchup", "bottle"), ("chopping board", "cutting board"),
    ],
)  # fmt: skip
def test_small_and_loose_things_have_a_noun(name, noun):
    assert canonical_noun(name) == noun


def test_several_things_named_together_are_a_group():
    for name, noun in {"stack of books": "book", "pile of papers": "paper", "row of office chairs": "chair"}.items():
        assert canonical_noun(name) == noun and names_group(name)
    assert not names_group("pair of scissors") and canonical_noun("stack of") is None


def test_a_name_of_two_nouns_is_proposed_for_neither():
    table = {noun: {"plural": f"{noun}s", "aliases": []} for noun in ("stove", "stone")}
    assert all(not entry["found"] for entry in with_found(table, ["store", "stoe"]).values())


@pytest.fixture
def lists(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"woodenchair": "x", "gizmo": "x", "hyper gizmo": "x"}))
    (tmp_path / "b.csv").write_text(",Label_6585,Name_6585\n0,1,chair\n1,2,table_cloth\n")
    (tmp_path / "c.txt").write_text("chiar\nwall\n")
    return [tmp_path / name for name in ("a.json", "b.csv", "c.txt")]


def test_lists_of_each_kind_are_read(lists):
    assert [read_names(path) for path in lists] == [
        ["woodenchair", "gizmo", "hyper gizmo"], ["chair", "table_cloth"], ["chiar", "wall"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", "{"), ("a.json", "5"), ("a.csv", "x,y\n1,2\n"), ("a.txt", ""), ("a.json", "[]")]
)
def test_files_that_hold_no_names(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name):
        read_names(tmp_path / name)
    with pytest.raises(UserError, match="none.txt"):
        read_names(tmp_path / "none.txt")


def test_command_writes_what_check_accepts(lists, tmp_path, monkeypatch, capsys):
    path = tmp_path / "nouns.json"
    table = {noun: {"plural": f"{noun}s", "aliases": [], "found": []} for noun in ("chair", "wall")}
    path.write_text(table_text(table))
    monkeypatch.setattr(build_nouns, "NOUN_TABLE", path)
    monkeypatch.setattr(build_nouns, "nouns", lambda: json.loads(path.read_text()))
    with pytest.raises(UserError, match="nouns.json: the lists give other spellings of chair; run without --check"):
        main(parse_args(["--check", *map(str, lists)]))
    assert json.loads(path.read_text()) == table
    main(parse_args([*map(str, lists)]))
    assert json.loads(path.read_text())["chair"]["found"] == ["chiar", "woodenchair"]
    main(parse_args(["--check", *map(str, lists)]))
    printed = capsys.readouterr().out
    assert "a.json: 1 of 3 names (33.3%) are in the table" in printed and "gizmo 2" in printed


def test_names_weighed_by_their_frames(tmp_path, capsys):
    """A plural counts as its noun, a part and a nameless thing count against, room parts are left out."""
    path = tmp_path / "frames.csv"
    path.write_text(
        "rank,class,scene_frequency\n1,chair,60\n2,wall,50\n3,papers,15\n4,tableleg,20\n5,table_leg,1\n6,thing,4\n"
    )
    before = NOUN_TABLE.read_bytes()
    main(parse_args(["--frequencies", str(path)]))
    assert NOUN_TABLE.read_bytes() == before
    printed = capsys.readouterr().out
    assert "75.0% of 100 pairs of frame and name have a noun, not counting 50 of walls" in printed
    assert "most frequent other names: tableleg 21, thing 4" in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class,n\nchair,1\n", "has no column scene_frequency"),
        ("class,scene_frequency\nchair,1\ndesk,many\n", "frames.csv:3: no name with a number"),
        ("class,scene_frequency\nchair\n", "frames.csv:2: no name with a number"),
        ("class,scene_frequency\n", "holds no names"),
    ],
)
def test_frequencies_that_cannot_be_read(tmp_path, text, message):
    path = tmp_path / "frames.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        main(parse_args(["--frequencies", str(path)]))
    with pytest.raises(UserError, match="none.csv: cannot be read"):
        main(parse_args(["--frequencies", str(tmp_path / "none.csv")]))


def test_lists_and_frequencies_are_two_commands(tmp_path):
    for arguments in ([], ["names.txt", "--frequencies", "frames.csv"], ["--check", "--frequencies", "frames.csv"]):
        with pytest.raises(SystemExit):
            parse_args(arguments)


def test_most_of_what_annotators_named_has_a_noun(samples):
    coverage = weighed_coverage(read_frequencies(samples / "names" / "annotation2Dfinal_class_frequencies.csv"))
    known, unknown = (coverage.outlines[kind] for kind in ("known", "unknown"))
    assert known / (known + unknown) >= 0.85
    assert (
        coverage.outlines["structure"] < 22_000
    )  # walls, floors and the like: no noun is gained by calling a thing a room part


def test_the_file_is_as_the_script_writes_it():
    assert NOUN_TABLE.read_text(encoding="utf-8") == table_text(nouns())


def test_the_shipped_table_is_what_the_real_lists_give(samples, capsys):
    lists = [samples / "names" / name for name in ("raw_to_cleaned_names.json", "class_mapping_from_toolbox.csv")]
    main(parse_args(["--check", *map(str, lists)]))
    assert "raw_to_cleaned_names.json: 8," in capsys.readouterr().out  # of 14,424
    assert [len(read_names(path)) for path in lists] == [14_424, 6113]
