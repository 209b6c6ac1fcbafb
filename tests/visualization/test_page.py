"""Laws of the page: it needs nothing beside itself, runs one script, and shows every text as it is."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_transformers.visualization.cells import Sheet
from ijepa_transformers.visualization.embedding import browser_data, quantized_features
from ijepa_transformers.visualization.page import (
    Bar,
    BarsBody,
    BrowserBody,
    Card,
    Headline,
    Picture,
    PlotBody,
    Point,
    ScatterBody,
    Section,
    SheetBody,
    TableBody,
    TabsBody,
    Thumbnail,
    bars_of,
    build_page,
    write_pictures,
)


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


def image(width: int = 30) -> Image.Image:
    return Image.new("RGB", (width, 20), "navy")


def every_body(text: str) -> list:
    scatter = ScatterBody(
        text, 50.0, [Point(1.0, 2.0, 0, text)], [Thumbnail(1.0, 2.0, 6.0, 6.0, 0, image())], [(0, text)]
    )
    return [
        SheetBody(Sheet([[image(), image()]] * 3, [(text, ""), ("b", "")], [text] * 3, [text, "high"])),
        BarsBody([Bar(text, 50.0, text, True)]),
        TableBody([text], [[text]], 0),
        TabsBody({text: scatter, "other": scatter}),
        BrowserBody([image()], {"rows": 1}),
        PlotBody(image()),
    ]


def page(text: str = "plain") -> str:
    picture = Picture(text, text, every_body(text), text, text, text)
    folded = Picture(text, text, [], is_folded=True)
    sections = [Section(text, [picture, folded], note=text), Section("Missing", note="Left out.", is_folded=True)]
    verdict, card = Headline(text, "good", [text]), Card(text, text, text, [Bar(text, 50.0, text)])
    return build_page(text, verdict, [card], sections, {text: text})


def test_a_page_requests_nothing_from_the_network_and_runs_its_own_script_only():
    reader = Reader(page())
    assert not re.search(r"https?:|url\(|@import", page())
    assert not {tag for tag, _ in reader.tags} & {"link", "iframe", "object", "embed", "base"}
    assert all(each["src"].startswith("data:image/") for each in reader.all("img"))
    assert all(each["href"].startswith("data:image/") for each in reader.all("image"))
    assert not [
        name for _, attributes in reader.tags for name in attributes if name.startswith("on") or name == "style"
    ]
    data, own = re.findall(r"<script([^>]*)>(.*?)</script>", page(), re.DOTALL)
    assert 'type="application/json"' in data[0] and own[0] == ""
    digest = base64.b64encode(hashlib.sha256(own[1].encode()).digest()).decode()
    (policy,) = (each["content"] for each in reader.all("meta") if "http-equiv" in each)
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_markup_in_texts_is_shown_as_text():
    reader, harmless = Reader(page(HOSTILE)), Reader(page())
    assert [tag for tag, _ in reader.tags] == [tag for tag, _ in harmless.tags]
    assert [sorted(attributes) for _, attributes in reader.tags] == [sorted(each) for _, each in harmless.tags]
    assert reader.text.count(HOSTILE) == harmless.text.count("plain") > 25
    assert reader.all("svg")[0]["aria-label"] == HOSTILE and "&lt;script&gt;" in page(HOSTILE)


def test_numbers_for_the_script_cannot_end_its_element():
    body = BrowserBody([image()], {"features": "</script><script>alert(1)</script>"})
    text = build_page("t", Headline("h"), [], [Section("s", [Picture("", "", [body])])], {})
    assert text.count("</script>") == 2 and "<script>alert" not in text
    inside = re.search(r'id="patches">(.*?)</script>', text, re.DOTALL).group(1)
    assert json.loads(inside) == body.data


def test_negative_values_have_no_bar_and_zero_has_no_sign():
    bars = bars_of([("first", 0.256), ("nothing", -0.001), ("opposite", -0.5)])
    assert [(bar.percent, bar.text) for bar in bars] == [(25.6, "0.26"), (0.0, "0.00"), (0.0, "-0.50")]
    assert [bar.is_main for bar in bars] == [True, False, False]


def test_the_verdict_and_the_cards_come_first_and_facts_last():
    text = page()
    places = [
        text.index(mark) for mark in ('class="verdict good"', 'class="cards"', 'id="part-1"', 'id="part-2"', "<dl>")
    ]
    assert places == sorted(places)
    assert '<details class="folded" id="part-2">' in text and '<section id="part-1">' in text
    for words in ("How to read it", "Good would be:", "Bad would be:"):
        assert words in text
    assert "How to read it" not in build_page("t", Headline("h"), [], [Section("s", [Picture("a", "b")])], {})


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_images_are_inside_in_the_smaller_format(kind):
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    if kind == "jpeg":  # noise, as in a photograph
        pixels = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
    section = Section("s", [Picture("Title", "Seen.", [PlotBody(Image.fromarray(pixels))])])
    (found,) = Reader(build_page("t", Headline("h"), [], [section], {})).all("img")
    head, data = found["src"].split(",")
    assert head == f"data:image/{kind};base64"
    inside = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
    assert (found["width"], found["height"]) == ("64", "64") and inside.shape == pixels.shape
    assert np.abs(inside - pixels).mean() < (1 if kind == "png" else 60)


def test_the_page_fits_a_phone_and_knows_light_and_dark():
    style = page().split("<style>")[1].split("</style>")[0]
    assert "overflow-x" not in style and re.search(r"img \{[^}]*width: 100%", style)
    assert re.search(r"@media \(max-width: 34rem\)[^@]*\.wraps \{ grid-template-columns: repeat\(3", style)
    assert "prefers-color-scheme: dark" in style and "{classes}" not in style
    assert any(each.get("name") == "viewport" for each in Reader(page()).all("meta"))


def test_pictures_are_files_of_their_own(tmp_path):
    pictures = [Picture("", "", files={"one": image(900), "two": image()}), Picture("", "")]
    write_pictures(tmp_path / "pictures", [Section("a", pictures), Section("b")])
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["one.png", "two.png"]
    assert Image.open(tmp_path / "pictures" / "one.png").size == (900, 20)


def decoded(text: str, shape: tuple[int, ...]) -> torch.Tensor:
    values = np.frombuffer(base64.b64decode(text), dtype=np.int8).reshape(shape)
    return torch.nn.functional.normalize(torch.tensor(values.astype(np.float64)), dim=-1)


def test_embedded_features_keep_the_similarities():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 16, 96, generator=generator) * 0.9 ** torch.arange(96)  # few directions hold most
    text, size = quantized_features(features)
    assert size == 48  # no more directions than patches
    exact = torch.nn.functional.normalize(features.double(), dim=-1).flatten(0, 1)
    near = decoded(text, (48, size))
    assert (near @ near.T - exact @ exact.T).abs().max() < 0.03
    _, fewer = quantized_features(features, most_directions=20)
    assert fewer == 20
    collapsed, _ = quantized_features(torch.zeros(2, 4, 8))
    assert set(base64.b64decode(collapsed)) == {0}


def test_the_script_gets_the_shown_images_without_what_a_place_always_has():
    features = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(1))
    data = browser_data(features, 2, (2, 2), (1, 3))
    assert (data["rows"], data["columns"], data["image"], data["patch"]) == (2, 2, 1, 3)
    both = {"features": features, "placeless": features - features.mean(dim=0)}
    for name, expected in both.items():
        near = decoded(data[name], (8, data["size"]))
        exact = torch.nn.functional.normalize(expected[:2].double(), dim=-1).flatten(0, 1)
        assert (near @ near.T - exact @ exact.T).abs().max() < 0.03
