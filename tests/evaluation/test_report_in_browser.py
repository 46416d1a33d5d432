"""The pages in a real browser: nothing is said or asked for, pictures load, filters work by keyboard, on any width."""

import json

import pytest

from dataset.questions.preview import write_preview
from dataset.questions.rows import questions_file, read_questions
from evaluation import compare
from tests.helpers.browser import LOW_CONTRAST, needed, opened
from tests.helpers.hostile import MARKUP

OTHER = "distilled"
WIDTHS = (1280, 390)


@pytest.fixture(autouse=True)
def browser():
    needed()


@pytest.fixture
def page(scored, training, ladder, world, tmp_path):
    """The page of three systems with all that it can have."""
    (tmp_path / "ladder").mkdir()
    (tmp_path / "ladder" / "robustness.json").write_text(json.dumps(ladder("labels only", OTHER)))
    folders = [
        scored("labels only", 0.4, training=training),
        scored(OTHER, 0.8, training=training),
        scored("RGB teacher", 0.9, modality="rgb"),
    ]
    argv = [*map(str, folders), "--output", str(tmp_path / "out"), "--data_root", str(world)]
    compare.main(compare.parse_args([*argv, "--robustness", str(tmp_path / "ladder")]))
    return tmp_path / "out" / "report.html"


def shown(window) -> list[dict]:
    """The questions that a reader sees."""
    return window.evaluate(
        "[...document.querySelectorAll('.question')].filter(q => q.checkVisibility()).map(q => ({...q.dataset}))"
    )


def broken_pictures(window) -> list[str]:
    window.evaluate("document.querySelectorAll('img').forEach(img => img.loading = 'eager')")
    window.wait_for_function("[...document.images].every(img => img.complete)")
    return window.evaluate("[...document.images].filter(img => !img.naturalWidth).map(img => img.alt)")


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_whole_on_any_width(page, width):
    with opened(page, width=width) as window:
        assert window.evaluate("document.images.length") == 16 and not broken_pictures(window)
        for details in window.locator("summary").all():
            details.click()
        assert window.evaluate("document.documentElement.scrollWidth") <= width
        contrast = window.evaluate(LOW_CONTRAST)
        assert contrast["seen"] > 300 and not contrast["found"]
        window.evaluate("document.querySelector('h1').style.color = '#999'")
        assert len(window.evaluate(LOW_CONTRAST)["found"]) == 1
        assert not window.said and not window.asked


def test_filters_work_by_keyboard(page):
    with opened(page) as window:
        everything = shown(window)
        assert len(everything) == 59 and window.locator("#count").inner_text() == "59 questions"
        window.locator("input[name=change]").first.focus()
        window.keyboard.press("ArrowDown")  # to the next radio button: mended
        mended = [asked for asked in everything if asked["change"] == "mended"]
        assert shown(window) == mended and 0 < len(mended) < 59
        assert window.locator("#count").inner_text() == f"{len(mended)} questions"
        window.keyboard.press("ArrowDown")
        assert shown(window) == [asked for asked in everything if asked["change"] == "broken"]
        window.keyboard.press("Tab")
        window.keyboard.type("Count")  # the list of types
        assert shown(window) == [a for a in everything if (a["change"], a["type"]) == ("broken", "Count")]
        for card in window.locator(".card").all():  # a picture without a question left is gone, too
            assert card.is_visible() == any(q.is_visible() for q in card.locator(".question").all())
        window.locator("input[name=change]").first.check()
        assert shown(window) == [asked for asked in everything if asked["type"] == "Count"]
        assert not window.said and not window.asked


def test_sensors_can_be_told_apart(scored, world, tmp_path):
    def change(row):
        return row | {"sensor": "kv1" if int(row["Question_Id"][:8], 16) % 2 else "xtion"}

    argv = [str(scored("a", 0.5, change=change)), "--output", str(tmp_path / "out"), "--data_root", str(world)]
    compare.main(compare.parse_args(argv))
    with opened(tmp_path / "out" / "report.html") as window:
        assert window.locator("input[name=change]").count() == 0  # one system alone mends nothing
        window.locator("select[name=sensor]").select_option("xtion")
        assert {asked["sensor"] for asked in shown(window)} == {"xtion"}


def test_without_script_everything_is_there(page):
    with opened(page, script=False) as window:
        assert window.locator(".question:visible").count() == 59 and not window.locator(".filters").is_visible()


def test_hostile_text_does_nothing(scored, training, ladder, world, tmp_path):
    def change(row):
        n = int(row["Question_Id"][:8], 16)
        return row | {"Questions": MARKUP[n % len(MARKUP)], "Model_Answer": MARKUP[(n + 9) % len(MARKUP)]}

    (tmp_path / "robustness.json").write_text(json.dumps(ladder(*MARKUP[:2])))
    told = training | {"teacher": MARKUP[5], "flags": {"x": MARKUP[6]}}
    folders = [str(scored(MARKUP[n], 0.5, change=change, training=told)) for n in range(3)]
    argv = [*folders, "--output", str(tmp_path / "out"), "--data_root", str(world), "--robustness", str(tmp_path)]
    compare.main(compare.parse_args(argv))
    with opened(tmp_path / "out" / "report.html") as window:
        for details in window.locator("summary").all():
            details.click()
        window.mouse.move(300, 300)
        window.wait_for_timeout(300)
        assert window.evaluate("typeof ran") == "undefined" and window.evaluate("typeof window.ran") == "undefined"
        assert not window.said and not window.asked and len(shown(window)) == 59


def test_the_preview_of_questions_is_such_a_page(world, tmp_path):
    rows = read_questions(questions_file(world, "test"))
    write_preview(tmp_path / "preview.html", world, rows, n_frames=3)
    for width in WIDTHS:
        with opened(tmp_path / "preview.html", width=width) as window:
            assert window.evaluate("document.images.length") == 3 and not broken_pictures(window)
            assert window.evaluate("document.documentElement.scrollWidth") <= width
            contrast = window.evaluate(LOW_CONTRAST)
            assert contrast["seen"] > 20 and not contrast["found"]
            assert not window.said and not window.asked
