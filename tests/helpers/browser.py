"""Headless Chromium, for tests that look at pages as a reader does."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def needed() -> None:
    """Skip where there is no browser or no driver for it (requirements-optional.txt)."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed: see requirements-optional.txt")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")


@contextmanager
def opened(path: Path, *, width: int = 1280, height: int = 900, script: bool = True) -> Iterator:
    """A page in a browser window of this width, after it has said nothing and asked for nothing.

    Yields:
        The page; it has `said`, what the console got, and `asked`, addresses outside the file.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # which root cannot have
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        try:
            size = {"width": width, "height": height}
            page = browser.new_context(viewport=size, java_script_enabled=script).new_page()
            page.said, page.asked = [], []
            page.on("console", lambda message: page.said.append(message.text))
            page.on("pageerror", lambda error: page.said.append(str(error)))
            page.on("dialog", lambda dialog: (page.said.append("dialog"), dialog.dismiss()))
            page.on("request", lambda request: page.asked.append(request.url))
            page.goto(path.resolve().as_uri())
            page.asked[:] = [
                url for url in page.asked if url != path.resolve().as_uri() and not url.startswith("data:")
            ]
            yield page
        finally:
            browser.close()


# Every text with too little contrast to what is behind it: WCAG 2.2 AA wants 4.5 to 1, 3 to 1 for large text.
LOW_CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce(
      (under, [r, g, b, a = 1]) => [r, g, b].map((v, i) => v * a + under[i] * (1 - a)), [255, 255, 255]);
  };
  const luminance = (rgb) => rgb.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest("script, style, option")) continue;
    seen += 1;
    const style = getComputedStyle(element);
    const ink = element.closest("svg") ? style.fill : style.color;
    const [light, dark] = [luminance(parse(ink).slice(0, 3)), luminance(behind(element))].sort((a, b) => b - a);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const ratio = (light + 0.05) / (dark + 0.05);
    if (ratio < (large ? 3 : 4.5)) found.push(`${node.data.trim()}: ${ratio.toFixed(2)}`);
  }
  return {found, seen};
}"""
