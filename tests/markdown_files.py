"""Reads the Markdown files of the repository: links, headings and code blocks."""

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token


REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("docs", "benchmarks", "examples", "ijepa_transformers", "notebooks", "tests", ".github")
_PARSER = MarkdownIt("commonmark").enable("table")


def markdown_files() -> list[Path]:
    """Every Markdown file that belongs to the repository."""
    return [
        *sorted(REPOSITORY.glob("*.md")),
        *(p for name in FOLDERS for p in sorted((REPOSITORY / name).rglob("*.md"))),
    ]


def user_pages() -> list[Path]:
    """README and the pages for users, whose code blocks are tested."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def short_name(path: Path) -> str:
    """The path inside the repository."""
    return path.relative_to(REPOSITORY).as_posix()


@cache
def tokens_of(path: Path) -> list[Token]:
    """The blocks of a Markdown file, without YAML metadata."""
    text = path.read_text(encoding="utf-8")
    return _PARSER.parse(re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL))


def link_targets(path: Path) -> Iterator[str]:
    """The target of every link and every image."""
    for token in tokens_of(path):
        for child in token.children or ():
            if child.type == "link_open":
                yield str(child.attrs["href"])
            elif child.type == "image":
                yield str(child.attrs["src"])


@cache
def anchors(path: Path) -> set[str]:
    """The anchors of the headings, as GitHub and the site make them."""
    found: set[str] = set()
    tokens = tokens_of(path)
    for opening, content in itertools.pairwise(tokens):
        if opening.type != "heading_open":
            continue
        words = "".join(child.content for child in content.children or () if child.type in ("text", "code_inline"))
        slug = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
        number = 0
        while (anchor := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(anchor)
    return found


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        marker: why it cannot run here, from the comment `<!-- not run: ... -->` before it; None if there is none.
    """

    path: Path
    line: int
    language: str
    code: str
    marker: str | None

    def __str__(self) -> str:
        return f"{short_name(self.path)}:{self.line}"


_MARKER = re.compile(r"<!--\s*not run:\s*(.+?)\s*-->", re.DOTALL)


def code_blocks(path: Path) -> list[Block]:
    """All fenced and indented code blocks of a file, in order."""
    blocks, marker = [], None
    for token in tokens_of(path):
        if token.type in ("fence", "code_block"):
            line = token.map[0] + 1 if token.map else 0
            blocks.append(Block(path, line, token.info.strip(), token.content, marker))
        found = _MARKER.search(token.content) if token.type == "html_block" else None
        marker = found[1] if found else None
    return blocks


def shell_lines(block: Block) -> list[list[str]]:
    """The words of each command of a shell block, without comments and redirections."""
    commands = []
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            commands.append(list(itertools.takewhile(lambda word: not word.startswith(">"), words)))
    return commands


def ijepa_arguments(words: list[str]) -> list[str] | None:
    """The arguments of `ijepa` in a command, also of one that a launcher starts; None if it starts something else."""
    if words[0] == "ijepa":
        return words[1:]
    if "ijepa_transformers.cli" in words:
        return words[words.index("ijepa_transformers.cli") + 1 :]
    if "slurm.sh" in words:
        return ["pretrain", *words[words.index("slurm.sh") + 1 :]]
    return None
