"""The noun table: forms, false friends, and the script that fills it from lists of raw names."""

import json
import re

import pytest

from dataset import build_nouns
from dataset.annotations import asked_nouns, canonical_noun, letters, names_group, nouns, spellings
from dataset.build_nouns import FIELDS, NOUN_TABLE, main, parse_args, read_names, table_text, with_found
from dataset.questions import plural, with_article
from utils import UserError

IRREGULAR = {"mouse": "mice", "person": "people", "shelf": "shelves"}
SEMANTIC_CLASSES = """
    wall floor cabinet bed chair sofa table door window bookshelf picture counter blinds desk shelves curtain dresser pillow
    mirror floor_mat ceiling books fridge tv towel shower_curtain box whiteboard person night_stand toilet sink lamp bathtub bag
"""  # of the 37 of SUN RGB-D; clothes and paper cannot be counted
DETECTION_CLASSES = """
    bathtub bed bookshelf box chair counter desk door dresser garbage_bin lamp monitor night_stand pillow sink sofa table tv toilet
"""


def regular_plural(noun: str) -> str:
    if re.search("(s|x|z|ch|sh)$", noun):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if re.search("[^aeiou]y$", noun) else f"{noun}s"


def test_every_noun_has_its_plural():
    for noun in nouns():
        assert noun == " ".join(re.findall("[a-z]+", noun))
        assert plural(noun) == IRREGULAR.get(noun, regular_plural(noun))
        assert not noun.endswith("s") or noun in ("mattress",)
        assert canonical_noun(plural(noun)) == noun and not names_group(noun)
        assert names_group(plural(noun)) or noun == "shelf"  # annotators call one unit "shelves"
        assert with_article(noun).split()[0] == ("an" if noun[0] in "aeiou" else "a")
    assert not [
        noun for noun in nouns() if re.match("hour|honest|uni|use|eu|one", noun)
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
    assert 95 <= len(asked_nouns()) <= 110
    assert set(nouns()) - set(asked_nouns()) == {"wall", "floor", "ceiling", "carpet"}


def test_the_classes_of_the_data_set_have_a_noun():
    for name in (SEMANTIC_CLASSES + DETECTION_CLASSES).split():
        assert canonical_noun(name), name


@pytest.mark.parametrize(
    "name",
    """
    tablecloth tabletop chairmat doorway doorframe bedsheet bedframe lampshade windowsill windowframe drawerhandle cabinetdoor
    lightswitch toiletpaper papertowel mousepad keyboardtray background sidewalk chain tower stone hammer bracket cloak
    wallet bookmark cupholder sinkpipe
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
        "small_Wooden chair3", "redarmchair", "chiar", "chairr", "chir", "armchar", "chain", "chairs", "blackchairs", "charis",
        "chair", "hair", "fchair", "tabel", "tble", "fable", "dsk", "metal desk", "kitchen", "", "????",
    ]  # fmt: skip
    filled = with_found(table, names)
    assert filled["chair"]["found"] == ["armchar", "chairr", "chiar", "chir", "redarmchair", "smallwoodenchair"]
    assert filled["table"] == {"plural": "tables", "aliases": [], "found": ["tabel", "tble"], "similar": ["desk"]}
    assert filled["desk"]["found"] == ["metaldesk"] and filled["cable"]["found"] == []
    assert with_found(filled, reversed(names)) == filled
    assert with_found({**table, "chair": {**table["chair"], "not": []}}, names)["chair"]["found"].count("chain") == 1


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


def test_the_file_is_as_the_script_writes_it():
    assert NOUN_TABLE.read_text(encoding="utf-8") == table_text(nouns())


def test_the_shipped_table_is_what_the_real_lists_give(samples, capsys):
    lists = [samples / "names" / name for name in ("raw_to_cleaned_names.json", "class_mapping_from_toolbox.csv")]
    main(parse_args(["--check", *map(str, lists)]))
    assert "raw_to_cleaned_names.json: 4," in capsys.readouterr().out  # of 14,424
    assert [len(read_names(path)) for path in lists] == [14_424, 6113]
