# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""`ijepa search --serve true`: a local page, made with gradio, that asks nothing of the internet.

Choose or upload a photo, and see the most similar ones. A click on any photo searches for photos like it.
"""

import functools
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..arguments import require
from ..data.notices import counted
from .arguments import FEW, SearchArguments
from .doubts import about_similarities
from .finder import Match, PhotoFinder
from .similarity import NEIGHBOURS


if TYPE_CHECKING:
    import gradio


_PICTURE_SIZE = 320  # pixels
_CHOICES = 24  # photos to choose from, and photos or groups on a tab
_LOCAL = ("127.0.0.1", "localhost", "::1")
# A browser loads nothing from elsewhere, whatever gradio's page names.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:;"
    " frame-ancestors 'none'"
)
# As many columns as fit, with all rows, instead of gradio's fixed number in a box that scrolls.
_STYLE = """
.gradio-container { width: 100%; max-width: 72rem !important; margin: 0 auto !important; }
.photos .grid-wrap { min-height: 0 !important; max-height: none !important; height: auto !important; }
.photos .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(8.25rem, 1fr)) !important; padding-top: 1.25rem;
}
.photos .caption-label { max-width: 95%; white-space: normal !important; overflow-wrap: anywhere; text-align: left; }
.photos .caption-label { font-size: 0.75rem; line-height: 1.25; }
footer { display: none !important; }
"""
_QUIET: dict[str, Any] = {"api_visibility": "private"}
_TO_THE_TOP = "() => window.scrollTo({top: 0, behavior: 'smooth'})"


def require_gradio() -> None:
    """Raises ValueError if gradio is not installed."""
    require(
        find_spec("gradio") is not None,
        'the page needs gradio, which is not installed: pip install "ijepa-transformers[page]".',
    )


class Page:
    """What the page shows, without gradio: lists of (picture, caption), and the rows of these pictures."""

    def __init__(self, finder: PhotoFinder, k: int | None, threshold: float | None):
        self.finder, self.k = finder, k
        usual = finder.usual_threshold()
        self.threshold = math.floor(1e4 * usual) / 1e4 if threshold is None else threshold
        # The slider begins at twenty times the distance from 1: what is near depends on encoder and photos.
        self.least_threshold = min(self.threshold, max(0.0, math.floor(100 * (1 - 20 * (1 - usual))) / 100))
        self.picture = functools.lru_cache(1024)(functools.partial(finder.picture, size=_PICTURE_SIZE))

    def choose(self, words: str) -> list[int]:
        """The rows of the first photos whose names hold all these words."""
        parts = (words or "").casefold().split()
        names = self.finder.index.names
        found = (row for row in self.finder.rows if all(part in names[row].casefold() for part in parts))
        return [row for row, _ in zip(found, range(_CHOICES), strict=False)]

    def gallery(self, rows: Sequence[int], similarities: Sequence[float] = ()) -> list[tuple[Image.Image, str]]:
        """Pictures with captions: names without folders, because a caption lies on its picture."""
        captions = [printable(os.path.basename(self.finder.index.names[row])) for row in rows]
        if similarities:
            captions = [f"{value:.3f}  {name}" for value, name in zip(similarities, captions, strict=True)]
        return list(zip(map(self.picture, rows), captions, strict=True))

    def like_photo(self, row: int) -> tuple[Image.Image, str, list[Match]]:
        """A photo of the folder, a line about it, and the photos like it."""
        return (
            self.picture(row),
            printable(self.finder.index.names[row]),
            self.finder.like_photo(row, self._count(len(self.finder) - 1)),
        )

    def like_file(self, path: str) -> tuple[Image.Image, str, list[Match]]:
        """As `like_photo`, for an uploaded file.

        Raises:
            ValueError: if it cannot be read.
        """
        matches = self.finder.like_query(self.finder.read_query(path), self._count(len(self.finder)))
        return self.finder.query_picture(path, _PICTURE_SIZE), printable(os.path.basename(path)), matches

    def _count(self, available: int) -> int:
        return min(self.k or FEW, available)

    @property
    def about_similarities(self) -> str:
        """What to compare the similarities with, and why they tell little if that is known, as Markdown."""
        return "\n\n".join(about_similarities(self.finder.random_pairs(), self.finder.doubt))

    def duplicates(self, threshold: float) -> tuple[str, list[tuple[list[int], float]]]:
        """A sentence, and the first groups of near duplicates: rows, and the greatest similarity."""
        groups = self.finder.duplicates(threshold)
        shown = [(group.rows[:_CHOICES], group.similarity) for group in groups[:_CHOICES]]
        more = f" The first {_CHOICES} are shown." if len(groups) > _CHOICES else ""
        more = more if groups else " A lower value finds more."
        return f"{counted(len(groups), 'group')} with a cosine similarity of at least {threshold:.4f}.{more}", shown

    def outliers(self) -> list[Match]:
        """The photos that are least like their nearest neighbours."""
        return self.finder.outliers(min(_CHOICES, len(self.finder)))


def printable(name: str) -> str:
    """The name without what cannot be shown."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)


def _gallery(label: str, **options: Any) -> "gradio.Gallery":
    import gradio as gr

    settings = {"format": "jpeg", "object_fit": "contain", "interactive": False, "allow_preview": False}
    return gr.Gallery(label=label, elem_classes="photos", buttons=[], **settings, **options)


@dataclass
class _Found:
    """Where found photos are shown. `rows` are those of the pictures in `similar`."""

    query: "gradio.Image"
    similar: "gradio.Gallery"
    rows: "gradio.State"
    tabs: "gradio.Tabs"

    @property
    def outputs(self) -> list[Any]:
        return [self.query, self.similar, self.rows, self.tabs]

    def search_on_click(self, page: Page, photos: "gradio.Gallery", rows: "gradio.State") -> None:
        """A click on one of the photos, which have these rows, searches for photos like it."""
        import gradio as gr

        def search(rows: list[int], event: gr.SelectData) -> tuple[Any, ...]:
            return _shown(page, page.like_photo(rows[event.index]))

        photos.select(search, [rows], self.outputs, **_QUIET).then(None, js=_TO_THE_TOP, **_QUIET)

    def search_on_upload(self, page: Page, upload: "gradio.File") -> None:
        import gradio as gr

        def search(path: str | None) -> tuple[Any, ...]:
            if path is None:
                return (gr.skip(),) * len(self.outputs)
            try:
                return _shown(page, page.like_file(path))
            except ValueError as error:
                raise gr.Error(printable(str(error)), print_exception=False) from None

        upload.change(search, upload, self.outputs, **_QUIET)


def _shown(page: Page, found: tuple[Image.Image, str, list[Match]]) -> tuple[Any, ...]:
    """What the outputs of `_Found` become."""
    import gradio as gr

    picture, name, matches = found
    rows = [match.row for match in matches]
    photos = page.gallery(rows, [match.similarity for match in matches])
    return (
        gr.update(value=picture, label=name, visible=True),
        gr.update(value=photos, selected_index=None, visible=True),
        rows,
        gr.update(selected=0),
    )


def build_blocks(page: Page) -> "gradio.Blocks":
    """The page as gradio's blocks."""
    import gradio as gr

    with gr.Blocks(title="Photos", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(
            f"# {counted(len(page.finder), 'photo')}\nA click on a photo shows the photos most like it, with their"
            f" similarity. {page.about_similarities}"
        )
        with gr.Tabs(selected=0) as tabs:
            with gr.Tab("Similar", id=0):
                with gr.Row():
                    with gr.Column(scale=1, min_width=260):
                        upload = gr.File(label="Your photo", file_types=["image"], height=130)
                        query = gr.Image(interactive=False, visible=False, height=260, buttons=[])
                    with gr.Column(scale=3, min_width=300):
                        found = _Found(query, _gallery("Most similar", visible=False), gr.State([]), tabs)
                found.search_on_upload(page, upload)
                found.search_on_click(page, found.similar, found.rows)
                _add_choice(page, found, blocks)
            with gr.Tab("Near duplicates", id=1) as tab:
                _add_duplicates(page, found, tab)
            with gr.Tab("Outliers", id=2) as tab:
                _add_outliers(page, found, tab)
    return blocks


def _add_choice(page: Page, found: _Found, blocks: "gradio.Blocks") -> None:
    """Photos of the folder to choose from."""
    import gradio as gr

    def choose(words: str) -> tuple[Any, ...]:
        rows = page.choose(words)
        return gr.update(value=page.gallery(rows), selected_index=None), rows

    words = gr.Textbox(label="Or choose one", placeholder="words in its name")
    photos, rows = _gallery("Photos"), gr.State([])
    words.change(choose, words, [photos, rows], show_progress="hidden", **_QUIET)
    blocks.load(choose, words, [photos, rows], **_QUIET)
    found.search_on_click(page, photos, rows)


def _add_duplicates(page: Page, found: _Found, tab: "gradio.Tab") -> None:
    """Groups of near duplicates, a gallery each."""
    import gradio as gr

    threshold = gr.Slider(page.least_threshold, 1, page.threshold, step=0.0001, label="Least cosine similarity")
    groups = gr.State(None)
    tab.select(page.duplicates, threshold, groups, **_QUIET)
    threshold.release(page.duplicates, threshold, groups, **_QUIET)

    @gr.render(inputs=groups)
    def show(value: tuple[str, list[tuple[list[int], float]]] | None) -> None:
        sentence, shown = value or ("", [])
        gr.Markdown(sentence)
        for rows, similarity in shown:
            photos = _gallery(f"Similarity {similarity:.4f}", value=page.gallery(rows))
            found.search_on_click(page, photos, gr.State(rows))


def _add_outliers(page: Page, found: _Found, tab: "gradio.Tab") -> None:
    """The photos least like the others."""
    import gradio as gr

    def show() -> tuple[Any, ...]:
        matches = page.outliers()
        rows = [match.row for match in matches]
        photos = page.gallery(rows, [match.similarity for match in matches])
        return gr.update(value=photos, selected_index=None), rows

    gr.Markdown(f"The number is the mean cosine similarity to the {NEIGHBOURS} nearest photos.")
    photos, rows = _gallery("Least like the others"), gr.State([])
    tab.select(show, None, [photos, rows], **_QUIET)
    found.search_on_click(page, photos, rows)


def _middleware(host: str) -> list[Any]:
    """Refuses requests for other host names, which a page from elsewhere could make, and sends the policy."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    hosts = [*_LOCAL, host] if host in _LOCAL else ["*"]
    return [Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(_PolicyHeader)]


class _PolicyHeader:
    """An ASGI middleware that adds the Content-Security-Policy to every answer."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def serve(finder: PhotoFinder, arguments: SearchArguments) -> None:
    """Shows the page until Ctrl-C.

    Raises:
        ValueError: if the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="ijepa-search-") as folder:
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder, GRADIO_SHARE="False")
        import gradio as gr

        blocks = build_blocks(Page(finder, arguments.k, arguments.threshold))
        font = ("system-ui", "sans-serif")
        try:
            _, url, _ = blocks.launch(
                server_name=arguments.host,
                server_port=arguments.port,
                theme=gr.themes.Default(font=font, font_mono=("ui-monospace", "monospace")),
                css=_STYLE,
                share=False,
                quiet=True,
                inbrowser=False,
                prevent_thread_lock=True,
                show_error=True,
                enable_monitoring=False,
                ssr_mode=False,
                footer_links=[],
                app_kwargs={"middleware": _middleware(arguments.host)},
            )
        except OSError as error:  # gradio's own, without a number
            raise ValueError(
                f"the page cannot be opened at {arguments.host}, port {arguments.port}: {error}"
            ) from None
        who = "this machine only" if arguments.host in _LOCAL else "everyone who can reach this address"
        print(f"{url} for {who}; Ctrl-C ends it.", flush=True)
        try:
            blocks.block_thread()
        finally:
            blocks.close(verbose=False)
            sys.stdout.flush()
