"""Read a page: its text, and a picture of the page in headless Chromium, if that is installed."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import cv2
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


def screenshot(page, folder, *options):
    """Return a picture of a file in a fresh profile of the browser. Fail if the browser logs a complaint."""
    picture = folder / f"{page.stem}{len(options)}.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [
        "--no-first-run",
        f"--user-data-dir={folder / 'profile'}",
        "--hide-scrollbars",
        "--enable-logging=stderr",
    ]
    command += ["--window-size=1200,1600", f"--screenshot={picture}", *options, page.as_uri()]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert "CONSOLE" not in process.stderr, process.stderr
    image = cv2.imread(str(picture))
    assert image.std() > 5, "the page is blank"
    return image


class PageReader(HTMLParser):
    """The text and the number of images of a page. The page must be well-formed and must load nothing.

    Attributes
    ----------
    text : str
        The text that is shown, and the tips of the charts, with single spaces.
    num_images : int
    """

    VOID = {"meta", "link", "img"}

    def __init__(self, path):
        super().__init__()
        self.open_tags, self.num_images, self.words = [], 0, []
        source = path.read_text(encoding="utf-8")
        assert source.startswith("<!DOCTYPE html>") and not re.search(
            r"(?:src|href)=\"(?!data:|#)|url\((?!#)|@import", source
        )
        self.feed(source)
        self.close()
        assert not self.open_tags
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        assert tag != "script" and not any(name.startswith("on") for name, _ in attributes)
        self.num_images += tag == "img"
        if tag not in self.VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open_tags:
            self.words.append(data)
