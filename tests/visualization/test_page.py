"""Laws of the page: it needs nothing beside itself, runs nothing, and shows every text as it is."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ijepa_transformers.visualization.page import Picture, Section, build_page, write_pictures


HOSTILE = '<script>alert("x")</script> & \'</style>'


class Reader(HTMLParser):
    """The tags, the attributes and the text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]


def picture(name: str = "one", **texts) -> Picture:
    return Picture(name, Image.new("RGB", (900, 30), "navy"), **{"title": "Title", "seen": "Seen.", **texts})


def page(text: str = "plain", **texts) -> str:
    pictures = [picture(**dict.fromkeys(("title", "seen", "good", "bad"), text))]
    sections = [Section(text, pictures, note=text), Section("Missing", note="Left out, because.")]
    return build_page(text, {text: text}, sections)


def test_a_page_requests_nothing_from_the_network():
    reader = Reader(page())
    assert not re.search(r"https?:|url\(|@import", page())
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object", "embed", "base"}
    assert all(each["src"].startswith("data:image/") for each in reader.all("img"))
    assert all(each["href"].startswith("#") for each in reader.all("a"))
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]
    policy = next(each["content"] for each in reader.all("meta") if "http-equiv" in each)
    assert policy.startswith("default-src 'none'") and "script" not in policy


def test_markup_in_texts_is_shown_as_text():
    reader, harmless = Reader(page(HOSTILE)), Reader(page())
    assert [tag for tag, _ in reader.tags] == [tag for tag, _ in harmless.tags]
    assert [sorted(attributes) for _, attributes in reader.tags] == [sorted(each) for _, each in harmless.tags]
    # title, heading, fact and its name, link, section, its note, picture, three texts below it
    assert reader.text.count(HOSTILE) == 11 == harmless.text.count("plain")
    assert reader.all("img")[0]["alt"] == HOSTILE


def test_every_link_has_its_section_and_every_picture_its_captions():
    reader = Reader(page())
    assert [each["href"][1:] for each in reader.all("a")] == [each["id"] for each in reader.all("section")]
    assert "Left out, because." in reader.text and "Missing" in reader.text
    for words in ("What you see:", "Good would be:", "Bad would be:"):
        assert words in reader.text
    without = Reader(build_page("t", {}, [Section("s", [picture()])])).text
    assert "What you see:" in without and "Good would be:" not in without and "Bad would be:" not in without


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_images_are_inside_in_the_smaller_format(kind):
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    if kind == "jpeg":  # noise, as in a photograph
        pixels = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
    part = Section("s", [Picture("name", Image.fromarray(pixels), "Title", "Seen.")])
    (image,) = Reader(build_page("t", {}, [part])).all("img")
    head, data = image["src"].split(",")
    assert head == f"data:image/{kind};base64"
    inside = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
    assert (image["width"], image["height"]) == ("64", "64") and inside.shape == pixels.shape
    assert np.abs(inside - pixels).mean() < (1 if kind == "png" else 60)


def test_wide_pictures_cannot_widen_the_page():
    style = page().split("<style>")[1].split("</style>")[0]
    assert re.search(r"figure > div \{[^}]*overflow-x: auto", style)
    assert re.search(r"figure img \{[^}]*max-width: 100%", style)
    reader = Reader(page())
    assert any(each.get("name") == "viewport" for each in reader.all("meta"))
    for least_width, expected in ((500, "500px"), (1200, "900px"), (0, "0px")):  # a small picture is not stretched
        text = build_page("t", {}, [Section("s", [picture(least_width=least_width)])])
        assert Reader(text).all("img")[0]["style"] == f"min-width: {expected}"
        assert ("Swipe" in text) == (least_width > 350)


def test_pictures_are_files_of_their_own(tmp_path):
    write_pictures(tmp_path / "pictures", [Section("a", [picture("one"), picture("two")]), Section("b")])
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["one.png", "two.png"]
    assert Image.open(tmp_path / "pictures" / "one.png").size == (900, 30)
