"""A page looked at in a real browser: headless Chromium, where there is one."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)

_LOOK = """
const found = [...document.querySelectorAll('iframe')].map(frame => {
  const page = frame.contentDocument, root = page.documentElement;
  const texts = [...page.querySelectorAll('svg text')].map(text => {
    const drawing = text.ownerSVGElement;
    const scale = drawing.getBoundingClientRect().width / drawing.viewBox.baseVal.width;
    return scale * parseFloat(getComputedStyle(text).fontSize);
  });
  return {title: page.title, width: root.clientWidth, needed: root.scrollWidth,
          drawings: page.querySelectorAll('svg').length, smallest: Math.min(1000, ...texts),
          scripts: page.scripts.length};
});
console.log('looked at');
document.documentElement.textContent = 'FOUND' + JSON.stringify(found) + 'END';
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a page was like in a window of some width."""

    title: str
    width: int
    needed: int
    """Pixels; above `width` the page scrolls sideways."""
    drawings: int
    smallest: float
    """Pixels of the smallest letters in a drawing."""
    scripts: int


def look(
    pages: Sequence[tuple[str, int]], folder: Path, *, timeout_s: float
) -> tuple[list[Seen], list[str]]:
    """Pages (HTML, width of the window), and all that the browser's console said about them."""
    assert CHROMIUM is not None
    frames = [
        f'<iframe width="{width}" height="844" style="border:0" srcdoc="{html.escape(page)}">'
        "</iframe>"
        for page, width in pages
    ]
    harness = folder / "harness.html"
    harness.write_text(
        f"<!doctype html><body>{''.join(frames)}<script>onload = () => {{{_LOOK}}}</script>"
    )
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--enable-logging=stderr", "--hide-scrollbars", "--dump-dom",
            f"--user-data-dir={folder / 'browser'}", harness.as_uri(),
        ],
        capture_output=True, text=True, timeout=timeout_s, check=True,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert any("looked at" in line for line in said), done.stderr[-2000:]
    found = re.search("FOUND(.*)END", done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:]
    seen = [Seen(**one) for one in json.loads(html.unescape(found.group(1)))]
    return seen, [line for line in said if "looked at" not in line]
