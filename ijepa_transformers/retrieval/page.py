# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""One self-contained HTML page of what was found. The pictures are inside; no scripts, no network requests.

Every text is escaped.
"""

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

from ..data.notices import counted
from .doubts import about_similarities
from .finder import PhotoFinder
from .random_pairs import RandomPairs
from .similarity import ALL_EQUAL, LEAST_PHOTOS, NEIGHBOURS, ROUNDING, TOO_FEW


_PICTURE_SIZE = 240  # pixels
_MANY_GROUPS, _MANY_PHOTOS = 100, 24  # on the page
# With default-src 'none' a browser requests nothing, whatever the page contains.
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --back: #fff; --text: #1a1a1a; --weak: #5a5a5a; --line: #d0d0d0; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --back: #16181c; --text: #ececec; --weak: #a8a8a8; --line: #3a3d44; }}
}}
body {{ margin: 0; background: var(--back); color: var(--text); font: 1rem/1.5 system-ui, sans-serif; }}
main {{ max-width: 70rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }}
h1 {{ line-height: 1.2; }}
h2 {{ margin-top: 2.5rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }}
p {{ color: var(--weak); max-width: 45rem; }}
.warning {{ color: var(--text); border-left: 4px solid #c77700; padding-left: 0.75rem; }}
.photos {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem; }}
h3 {{ margin: 1.5rem 0 0.5rem; font-size: 1rem; }}
.photos + h3 {{ padding-top: 1.5rem; border-top: 1px solid var(--line); }}
figure {{ margin: 0; }}
figure img {{ display: block; width: 100%; height: auto; aspect-ratio: 1; object-fit: contain; }}
figure img {{ box-sizing: border-box; border: 1px solid var(--line); }}
figcaption {{ font-size: 0.85rem; line-height: 1.35; }}
figcaption b {{ display: block; font-size: 1rem; }}
code {{ white-space: pre-wrap; word-break: normal; }}
.flag {{ white-space: nowrap; }}
footer {{ margin-top: 2.5rem; border-top: 1px solid var(--line); font-size: 0.85rem; }}
.query {{ max-width: 15rem; margin-bottom: 1.5rem; }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{facts}</p>
{notes}{sections}
<footer><p>Made by <code>{command}</code></p></footer>
</main>
</body>
</html>
"""


def build_page(finder: PhotoFinder, results: dict[str, Any], command: str) -> str:
    """The page as HTML.

    Args:
        finder: has the pictures.
        results: what was found, as `ijepa search --json true` prints it.
        command: what the page was made with.
    """
    num_photos = results["num_photos"]
    sections = [_query_section(finder, part, num_photos) for part in results.get("queries", ())]
    if "duplicates" in results:
        sections.append(_duplicates_section(finder, results["duplicates"], results["threshold"]))
    if "outliers" in results:
        note = f"The number is the mean cosine similarity to the {NEIGHBOURS} nearest photos. The lowest comes first."
        sections.append(_section("Outliers", note, _photos(finder, results["outliers"])))
    facts = (
        f"{counted(num_photos, 'photo')}, compared by the features of {results['model']!r}. Similarities are cosines:"
        " 1 means the same picture."
    )
    facts += f" {TOO_FEW}" if num_photos < LEAST_PHOTOS else ""
    notes = about_similarities(RandomPairs.of(results["random_pairs"]), results["doubt"])
    title = f"Search in {results['data']}"
    page = _PAGE.format(
        title=escape(title),
        facts=escape(facts),
        notes="".join(map(_note, notes)),
        command=_with_whole_flags(escape(command)),
        sections="\n".join(sections),
    )
    return page.encode(errors="replace").decode()  # names may hold bytes that are not UTF-8, which no page can show


def _note(line: str) -> str:
    kind = ' class="warning"' if line.startswith("WARNING") else ""
    return f"<p{kind}>{escape(line)}</p>\n"


def _with_whole_flags(command: str) -> str:
    """A browser breaks lines at hyphens, and must not do so within a flag."""
    return re.sub(r"(?<!\S)--\w+", r'<span class="flag">\g<0></span>', command)


def _section(title: str, note: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n<p>{escape(note)}</p>\n{content}\n</section>"


def all_equal(similar: Sequence[dict[str, Any]], num_photos: int) -> bool:
    """Whether the photos that are listed for a query all equal it, and there are more photos."""
    more = len(similar) < num_photos - 1  # the query itself may be one of them
    return bool(similar) and more and similar[-1]["similarity"] >= 1 - ROUNDING


def _query_section(finder: PhotoFinder, part: dict[str, Any], num_photos: int) -> str:
    query = _figure(finder.query_picture(part["query"], _PICTURE_SIZE), "query", part["query"], "query")
    note = "The most similar photo comes first. The number is the cosine similarity."
    note += f" {ALL_EQUAL}" if all_equal(part["similar"], num_photos) else ""
    return _section(f"Like {part['query']}", note, query + "\n" + _photos(finder, part["similar"]))


def _duplicates_section(finder: PhotoFinder, groups: Sequence[dict[str, Any]], threshold: float) -> str:
    found = counted(len(groups), "group") if groups else "No photos"
    note = f"{found} with a cosine similarity of at least {threshold:.4f}."
    if len(groups) > _MANY_GROUPS:
        note += f" The first {_MANY_GROUPS} are shown."
    shown = []
    for group in groups[:_MANY_GROUPS]:
        pairs = list(zip(group["names"], group["rows"], strict=True))[:_MANY_PHOTOS]
        shown.append(
            f"<h3>{_of_group(group)}</h3>\n" + _photos(finder, [{"name": name, "row": row} for name, row in pairs])
        )
    return _section("Near duplicates", note, "\n".join(shown))


def _of_group(group: dict[str, Any]) -> str:
    """What holds for a group of near duplicates, not for each of its photos."""
    number, similarity = len(group["names"]), f"{group['similarity']:.4f}"
    if number == 2:
        return f"2 photos with similarity {similarity}"
    more = f", of which {_MANY_PHOTOS} are shown" if number > _MANY_PHOTOS else ""
    return f"{number:,} photos{more}; the two most similar have {similarity}"


def _photos(finder: PhotoFinder, rows: Sequence[dict[str, Any]]) -> str:
    """The pictures of rows in a grid, with their similarities if they have any."""
    figures = []
    for row in rows:
        title = f"{row['similarity']:.3f}" if "similarity" in row else ""
        figures.append(_figure(finder.picture(row["row"], _PICTURE_SIZE), title, row["name"]))
    return '<div class="photos">\n' + "\n".join(figures) + "\n</div>"


def _figure(picture: Image.Image, title: str, name: str, kind: str = "") -> str:
    file = io.BytesIO()
    picture.convert("RGB").save(file, "jpeg", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    title = f"<b>{escape(title)}</b>" if title else ""
    name = escape(name)
    broken = name.replace("/", "/<wbr>")  # a line may end here
    return (
        f'<figure class="{kind}"><img src="data:image/jpeg;base64,{data}" alt="{name}">'
        f"<figcaption>{title}{broken}</figcaption></figure>"
    )
