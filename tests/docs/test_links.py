"""Every link of a Markdown file leads somewhere, and so does every page that code and recipes name."""

import re
from urllib.parse import unquote

import pytest

from tests.markdown_files import REPOSITORY, anchors, link_targets, markdown_files, short_name


ON_GITHUB = "https://github.com/ijepa-transformers/ijepa-transformers/"
# A page of the guides or a result in a text: "docs/learning.md" or "benchmarks/results/study_cpu_2026-11-29.md".
NAMED = re.compile(r"(?<![\w./-])(?:docs|benchmarks|examples|tests|notebooks)/[\w./-]+\.(?:md|py|jsonl|ipynb)(?!\w)")
SOURCES = ("*.py", "*.yaml", "*.yml", "*.sh", "*.toml", "*.md")


def fault_of(page, target: str) -> str | None:
    """What is wrong with a link, or None. Links to other sites are not followed."""
    if target.startswith(f"{ON_GITHUB}blob/main/"):
        target, page = target.removeprefix(f"{ON_GITHUB}blob/main/"), REPOSITORY / "README.md"
    if re.match(r"[a-z]+:", target):
        return None if target.startswith(("https://", "mailto:")) else "is no https address"
    file, _, anchor = unquote(target).partition("#")
    there = (page.parent / file).resolve() if file else page
    if not there.exists():
        return "does not exist"
    if REPOSITORY.resolve() not in [there, *there.parents]:
        return "is outside of the repository"
    if anchor and anchor not in anchors(there):
        return f"has no heading {anchor!r}"
    return None


@pytest.mark.parametrize("page", markdown_files(), ids=short_name)
def test_every_link_leads_somewhere(page):
    faults = [f"{target} {fault}" for target in link_targets(page) if (fault := fault_of(page, target))]
    assert faults == []


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("README.md", None),
        ("https://arxiv.org/abs/2301.08243", None),
        ("README.md#licence-that-is-not-there", "has no heading 'licence-that-is-not-there'"),
        ("docs/nothing.md", "does not exist"),
        ("../other.md", "does not exist"),
        (f"{ON_GITHUB}blob/main/docs/nothing.md", "does not exist"),
        ("http://example.org", "is no https address"),
    ],
)
def test_broken_links_are_found(target, fault):
    assert fault_of(REPOSITORY / "README.md", target) == fault


def named_files(root) -> list[tuple[str, str]]:
    """Every file of the repository that a text names. Logs and old results may name what is gone."""
    folders = ("ijepa_transformers", "conversion", "benchmarks", "examples", "tests", "docs", ".github")
    history = ("CHANGELOG.md", "docs/development/", "benchmarks/results/", "tests/docs/", "tests/test_architecture.py")
    found = []
    for pattern in SOURCES:
        for file in [*root.glob(pattern), *(path for name in folders for path in (root / name).rglob(pattern))]:
            name = file.relative_to(root).as_posix()
            if not name.startswith(history):
                found += [(name, other) for other in NAMED.findall(file.read_text(encoding="utf-8"))]
    return found


def test_pages_that_texts_name_exist():
    """Error messages, model cards, recipes and docstrings name pages of the guides."""
    named = named_files(REPOSITORY)
    assert [f"{file} names {other}" for file, other in named if not (REPOSITORY / other).exists()] == []
    assert any(file == "ijepa_transformers/verdict.py" for file, _ in named)
