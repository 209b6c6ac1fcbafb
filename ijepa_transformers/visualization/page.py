# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Builds one self-contained HTML page. Images, style and script are inside; there are no network requests.

Jinja2 escapes every text. The browser runs no script but the one of this package: the page's policy holds its hash.
"""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..files import holds_other_files, refuse_other_files, written_aside
from .arguments import PROGRAM
from .cells import Sheet


# Ten colours that most readers can tell apart on white and on black (Tableau's, with a stronger yellow).
CLASS_COLORS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#17becf", "#c9c400", "#7f7f7f"),
)
_SOFTWARE = "Software"  # the text in a PNG file that names what has made it
REST = "rest"  # the group of images of other classes, or of none


@dataclass
class SheetBody:
    """Rows of pictures, as a grid that fits the screen."""

    sheet: Sheet
    kind: str = "sheet"


@dataclass
class Bar:
    name: str
    percent: float  # of the whole width
    text: str
    is_main: bool = False


def bars_of(values: Sequence[tuple[str, float]]) -> list[Bar]:
    """Bars of shares from 0 to 1, of which the first is the main one. A negative value has no bar."""
    return [
        Bar(name, 100 * max(0.0, value), f"{round(value, 2) + 0.0:.2f}", number == 0)  # -0.001 is written as 0.00
        for number, (name, value) in enumerate(values)
    ]


@dataclass
class BarsBody:
    bars: Sequence[Bar]
    kind: str = "bars"


@dataclass
class TableBody:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    main_row: int | None = None
    kind: str = "table"


@dataclass
class Point:
    """A point of a map that is 100 wide. `group` is the number of a colour, or `REST`."""

    x: float
    y: float
    group: int | str
    name: str = ""


@dataclass
class Thumbnail:
    x: float
    y: float
    width: float
    height: float
    group: int | str
    picture: Image.Image


@dataclass
class ScatterBody:
    label: str
    height: float
    points: Sequence[Point]
    thumbnails: Sequence[Thumbnail]
    names: Sequence[tuple[int | str, str]]  # group -> name, for the legend


@dataclass
class TabsBody:
    """Two maps, of which one is seen at a time."""

    parts: Mapping[str, ScatterBody]
    kind: str = "tabs"


@dataclass
class BrowserBody:
    """Images whose patches can be chosen, and the numbers that the script compares."""

    pictures: Sequence[Image.Image]
    data: Mapping[str, Any]
    kind: str = "browser"


@dataclass
class PlotBody:
    """A plot as one picture. In a dark page its brightness is turned around."""

    image: Image.Image
    kind: str = "plot"


Body = SheetBody | BarsBody | TableBody | TabsBody | BrowserBody | PlotBody


@dataclass
class Picture:
    """What is seen, and how to read it, in plain words."""

    title: str
    seen: str  # what you see, in one or two sentences
    bodies: Sequence[Body] = ()
    more: str = ""  # how it was made
    good: str = ""  # what a good one would look like, which says nothing about this one
    bad: str = ""  # what a bad one would look like
    is_folded: bool = False
    files: Mapping[str, Image.Image] = field(default_factory=dict)  # name without ending -> picture for --pictures_dir


@dataclass
class Section:
    """Pictures under one heading, a note (such as why there are none), or both."""

    title: str
    pictures: Sequence[Picture] = ()
    note: str = ""
    is_folded: bool = False


GOOD, UNSURE, BAD = "good", "unsure", "bad"


@dataclass
class Headline:
    """The verdict at the top: one sentence, its colour, and the sentences behind it."""

    headline: str
    tone: str = UNSURE
    sentences: Sequence[str] = ()


@dataclass
class Card:
    """One figure at the top of the page."""

    title: str
    value: str
    note: str = ""
    bars: Sequence[Bar] = ()
    tone: str = ""  # the colour of the value: one of the above, or none


def build_page(
    title: str, verdict: Headline, cards: Sequence[Card], sections: Sequence[Section], facts: Mapping[str, str]
) -> str:
    """The page as HTML.

    Args:
        facts: name -> value, a folded table at the end.
        sections: in order; each has pictures, or a note, or both.
    """
    script = _own_file("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # With default-src 'none' a browser requests nothing, whatever the page contains.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            title=title,
            verdict=verdict,
            cards=cards,
            sections=sections,
            facts=facts,
            policy=policy,
            style=Markup(_own_file("report.css").replace("{classes}", _class_styles())),
            script=Markup(script),
            address=data_address,
        )
    )


@cache
def _environment() -> Environment:
    loader = PackageLoader("ijepa_transformers.visualization")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _own_file(name: str) -> str:
    return (files("ijepa_transformers.visualization") / "templates" / name).read_text(encoding="utf-8")


def _class_styles() -> str:
    lines = [
        f"circle.class-{number} {{ fill: {color}; }} rect.class-{number} {{ stroke: {color}; }}"
        f" i.class-{number} {{ background: {color}; }}\n"
        for number, color in enumerate(CLASS_COLORS)
    ]
    rest = f"circle.class-{REST} {{ fill: var(--rest); }} rect.class-{REST} {{ stroke: var(--rest); }}"
    return "".join(lines) + f"{rest} i.class-{REST} {{ background: var(--rest); }}\n"


def data_address(image: Image.Image) -> str:
    """The image as a data address. PNG is smaller for drawings, JPEG for photographs; the smaller one is taken."""
    contents = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        file = io.BytesIO()
        image.convert("RGB").save(file, kind, **options)
        contents[kind] = base64.b64encode(file.getvalue()).decode()
    kind = min(contents, key=lambda name: len(contents[name]))
    return f"data:image/{kind};base64,{contents[kind]}"


def refuse_other_pictures(directory: Path) -> None:
    """Raises ValueError if a directory holds files that no earlier page has left there, so that none is replaced.

    Beside pictures of an earlier page other kinds of files may be there.
    """
    pictures = sorted(directory.glob("*.png"))
    other = next((picture.name for picture in pictures if not _is_of_a_page(picture)), None)
    if other is not None:
        raise holds_other_files(directory, other, "pictures_dir")
    refuse_other_files(directory, [picture.name for picture in pictures], "pictures_dir")


def _is_of_a_page(picture: Path) -> bool:
    try:
        with Image.open(picture) as image:
            return image.info.get(_SOFTWARE) == PROGRAM
    except (OSError, ValueError, SyntaxError):
        return False


def write_pictures(directory: Path, sections: Sequence[Section]) -> None:
    """Writes the files of all pictures as PNG. Each says which program has made it."""
    mark = PngInfo()
    mark.add_text(_SOFTWARE, PROGRAM)
    for picture in (picture for section in sections for picture in section.pictures):
        for name, image in picture.files.items():
            with written_aside(directory / f"{name}.png") as unfinished:
                image.save(unfinished, "png", optimize=True, pnginfo=mark)
