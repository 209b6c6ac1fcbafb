# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Builds one self-contained HTML page of pictures. The images are inside; there are no scripts, no network requests.

Every text is escaped. The page suits phones and desktops: a picture wider than the screen scrolls inside its own box.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image


@dataclass
class Picture:
    """A picture and how to read it, in plain words."""

    name: str  # of its file, without ending
    image: Image.Image
    title: str
    seen: str  # what you see
    good: str = ""  # what a good one would look like, which says nothing about this one
    bad: str = ""  # what a bad one would look like
    least_width: int = 0  # CSS pixels that its letters need; a narrower screen scrolls


@dataclass
class Section:
    """Pictures under one heading, a note (such as why there are none), or both."""

    title: str
    pictures: Sequence[Picture] = ()
    note: str = ""


# With default-src 'none' a browser requests nothing, whatever the page contains.
PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<dl>
{facts}
</dl>
<nav>{links}</nav>
{sections}
</main>
</body>
</html>
"""
STYLE = """\
body { margin: 0; background: #fff; color: #1a1a1a; font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { line-height: 1.2; }
h2 { margin-top: 3rem; padding-top: 1rem; border-top: 2px solid #1a1a1a; }
dl { display: grid; grid-template-columns: minmax(5rem, max-content) 1fr; gap: 0.25rem 1rem; }
dt { font-weight: bold; }
dd { margin: 0; }
nav { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; }
nav a { color: #0b4f8a; padding: 0.35rem 0; }
figure { margin: 1.5rem 0 2.5rem; }
figure > div { overflow-x: auto; width: fit-content; max-width: 100%; border: 1px solid #ccc; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption p { margin: 0.5rem 0 0; max-width: 45rem; }
.hint { display: none; }
@media (max-width: 34rem) {
  dl { display: block; }
  dd { margin-bottom: 0.75rem; }
  .hint { display: block; color: #555; font-size: 0.9rem; }
}
"""
PHONE_WIDTH = 350  # CSS pixels for a picture on a common phone


def build_page(title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """The page as HTML.

    Args:
        facts: name -> value, a table at the top.
        sections: in order; each has pictures, or a note, or both.
    """
    links = [f'<a href="#part-{number}">{escape(part.title)}</a>' for number, part in enumerate(sections, start=1)]
    return PAGE.format(
        title=escape(title),
        style=STYLE,
        facts="\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()),
        links="\n".join(links),
        sections="\n".join(_section(number, part) for number, part in enumerate(sections, start=1)),
    )


def _section(number: int, section: Section) -> str:
    note = f"<p>{escape(section.note)}</p>\n" if section.note else ""
    pictures = "\n".join(map(_figure, section.pictures))
    return f'<section id="part-{number}">\n<h2>{escape(section.title)}</h2>\n{note}{pictures}\n</section>'


def _figure(picture: Picture) -> str:
    parts = {"What you see": picture.seen, "Good would be": picture.good, "Bad would be": picture.bad}
    captions = [f"<p><b>{name}:</b> {escape(text)}</p>" for name, text in parts.items() if text]
    width, height = picture.image.size
    is_wide = picture.least_width > PHONE_WIDTH
    hint = '<p class="hint">Swipe the picture sideways to see all of it.</p>\n' if is_wide else ""
    return (
        f"<figure>\n<h3>{escape(picture.title)}</h3>\n"
        # With tabindex the keyboard can reach the box and scroll it.
        f'<div tabindex="0"><img src="{_data_address(picture.image)}" width="{width}" height="{height}"'
        f' style="min-width: {min(width, picture.least_width)}px" alt="{escape(picture.title)}"></div>\n'
        f"<figcaption>\n{hint}{''.join(captions)}\n</figcaption>\n</figure>"
    )


def _data_address(image: Image.Image) -> str:
    """The image as a data address. PNG is smaller for drawings, JPEG for photographs; the smaller one is taken."""
    files = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 90})):
        file = io.BytesIO()
        image.convert("RGB").save(file, kind, **options)
        files[kind] = base64.b64encode(file.getvalue()).decode()
    kind = min(files, key=lambda name: len(files[name]))
    return f"data:image/{kind};base64,{files[kind]}"


def write_pictures(directory: str | Path, sections: Sequence[Section]) -> None:
    """Writes every picture as a PNG file with the picture's name."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for picture in (picture for section in sections for picture in section.pictures):
        picture.image.save(directory / f"{picture.name}.png", optimize=True)
