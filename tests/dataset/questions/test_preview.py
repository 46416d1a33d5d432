"""Captions say what is true of a frame, whatever the frame; the preview page shows what the question files say."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from dataset.questions.captions import CAPTION_QUESTION, MAX_NOUNS, frame_caption
from dataset.questions.generate import MIN_AREA_SHARE, plural, with_article
from dataset.questions.preview import write_preview
from dataset.questions.rows import CAPTION_TYPE, questions_file, read_questions
from dataset.sunrgbd.annotations import Instance, frame_objects
from dataset.sunrgbd.frames import find_frames
from tests.helpers.hostile import EVIL_NAME, STEERING
from utils import printable

SIZE = 50


def thing(noun, x, *, width=8, depth=2.0):
    mask = np.zeros((SIZE, SIZE), bool)
    mask[10:30, x : x + width] = True
    return Instance(noun, mask, depth, np.array([0.0, 0.0, depth]), None)


def caption(things, **options):
    question = frame_caption(things, **{"scene": "office", **options})
    assert question is None or (question.text, question.type) == (CAPTION_QUESTION, CAPTION_TYPE)
    return question and question.answer


def test_a_caption_names_room_objects_order_and_the_nearest():
    room = [thing("shelf", 0, depth=4.0), thing("chair", 40, width=6, depth=1.0), thing("lamp", 20, width=4, depth=4.0)]
    assert caption(room) == (
        "An office with a shelf, a chair and a lamp. From left to right: the shelf, the lamp, the chair. "
        "The chair is closest to the camera."
    )
    assert caption(room[::-1]) == caption(room)
    assert caption(room[:1], scene="living_room") == "A living room with a shelf."
    assert caption(room[:1], scene="idk") == caption(room[:1], scene="") == "A room with a shelf."
    assert caption([]) is None


def test_what_cannot_be_counted_has_no_number():
    room = [thing("soap", 0), thing("soap", 20), thing("toilet paper", 36)]
    assert caption(room).startswith("An office with some soap and some toilet paper.")


def test_numbers_only_where_they_are_sure():
    chairs = [thing("chair", 0), thing("chair", 20), thing("table", 36, width=12)]
    assert "two chairs" in caption(chairs) and "the chair" not in caption(chairs)
    assert "some chairs" in caption(chairs, unsure={"chair"})
    tiny = Instance("chair", np.arange(SIZE * SIZE).reshape(SIZE, SIZE) == 0, 2.0, np.zeros(3), None)
    assert "some chairs" in caption([*chairs, tiny]) and tiny.mask.mean() < MIN_AREA_SHARE
    assert "some chairs" in caption([thing("chair", x, width=2) for x in range(0, 40, 5)])  # eight: no word for it


@pytest.mark.parametrize("seed", range(20))
def test_captions_of_random_rooms_are_true(seed):
    """Every claim is read back out of the text and checked against the masks and depths."""
    rng = np.random.default_rng(seed)
    nouns = ["bed", "chair", "table", "lamp", "ottoman", "shelf", "oven", "box"]
    things = [
        thing(str(rng.choice(nouns)), int(rng.integers(0, 40)), width=int(rng.integers(2, 9)), depth=rng.uniform(1, 4))
        for _ in range(rng.integers(1, 9))
    ]
    text = caption(things)
    counts = {noun: sum(t.noun == noun for t in things) for noun in {t.noun for t in things}}
    first = text.split(". ")[0]
    assert all(with_article(n) in first or f" {plural(n)}" in first for n in counts) == (len(counts) <= MAX_NOUNS)
    places = {t.noun: np.nonzero(t.mask)[1].mean() for t in things}
    if order := re.search(r"From left to right: (.*?)\.", text):
        named = [name.removeprefix("the ") for name in order.group(1).split(", ")]
        assert all(counts[noun] == 1 for noun in named)
        assert [places[noun] for noun in named] == sorted(places[noun] for noun in named)
    if nearest := re.search(r"The (\w+) is closest", text):
        assert min(things, key=lambda t: t.depth_m).noun == nearest.group(1)


class _Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.pictures, self.cells, self.open = 0, [], False

    def handle_starttag(self, tag, attrs):
        self.pictures += tag == "img" and dict(attrs)["src"].startswith("data:image/png;base64,")
        self.open = tag == "td"

    def handle_endtag(self, tag):
        self.open = False

    def handle_data(self, data):
        self.cells += [data] * self.open


def test_the_page_shows_frames_questions_and_answers(world, tmp_path):
    rows = read_questions(questions_file(world, "test"), root=world)
    write_preview(tmp_path / "page.html", world, rows, n_frames=3)
    page = _Cells()
    page.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.pictures == 3
    shown = set(zip(page.cells[::3], page.cells[1::3], page.cells[2::3], strict=True))
    assert shown <= {(row.type, row.question, row.answer) for row in rows} and len(shown) > 10
    write_preview(tmp_path / "all.html", world, rows, n_frames=1000)  # more than there are: each of them once
    page = _Cells()
    page.feed((tmp_path / "all.html").read_text(encoding="utf-8"))
    assert page.pictures == len({row.image_path for row in rows})


def test_every_miniature_room_has_a_caption(world):
    frames, _ = find_frames(world)
    texts = [caption(frame_objects(frame)[0], scene=frame.scene) for frame in frames]
    assert all(texts) and len(set(texts)) > 0.9 * len(texts)


def test_a_strangers_questions_are_no_markup(world, tmp_path):
    rows = read_questions(questions_file(world, "test"), root=world)
    write_preview(tmp_path / "page.html", world, [replace(row, question=EVIL_NAME) for row in rows], n_frames=2)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not any(mark in text for mark in STEERING) and "<script>" not in text
    page = _Cells()
    page.feed(text)
    assert printable(EVIL_NAME) in page.cells
