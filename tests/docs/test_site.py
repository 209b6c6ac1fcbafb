"""The site builds, with every warning an error: broken links and anchors, pages that are in no menu."""

import os
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

from tests.markdown_files import REPOSITORY


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without the object that makes anchors."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def pages_of(entry) -> list[str]:
    """The files of a part of the menu."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in pages_of(part)]


def test_the_menu_has_every_page_once():
    settings = yaml.load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)
    docs = REPOSITORY / "docs"
    assert sorted(pages_of(settings["nav"])) == sorted(
        file.relative_to(docs).as_posix() for file in docs.rglob("*.md")
    )


def test_a_flag_is_not_broken_at_its_hyphens():
    hooks = runpy.run_path(str(REPOSITORY / ".ci" / "site_hooks.py"))
    page = SimpleNamespace(file=SimpleNamespace(src_uri="search.md"))
    html = "<p>as-is</p><code>ijepa stats --data my-photos</code><pre><code><span>--output</span></code></pre>"
    flag = '<span style="white-space: nowrap">--data</span>'
    expected = html.replace("--data", flag)
    assert hooks["on_page_content"](html, page, None, None) == expected


def test_long_names_in_tables_are_broken_between_their_parts():
    hooks = runpy.run_path(str(REPOSITORY / ".ci" / "site_hooks.py"))
    page = SimpleNamespace(file=SimpleNamespace(src_uri="features.md"))
    html = "<code>a_b.c</code><table><td><code>facebook/ijepa_vith14</code> a/b <code>0.5</code></td></table>"
    expected = html.replace("facebook/ijepa_vith14", "facebook/<wbr>ijepa_<wbr>vith14")
    assert hooks["on_page_content"](html, page, None, None) == expected


def test_types_of_the_api_pages_hold_no_markup():
    hooks = runpy.run_path(str(REPOSITORY / ".ci" / "site_hooks.py"))
    page = SimpleNamespace(file=SimpleNamespace(src_uri="api/models.md"))
    html = "(<code>int, *optional*</code>) (<code>`str`</code>) (<code>Any</code>, default:\n  <code>{}</code>\n)"
    assert hooks["on_page_content"](html, page, None, None) == (
        "(<code>int, optional</code>) (<code>str</code>) (<code>Any</code>)"
    )


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "IJepaForPretraining" in (tmp_path / "site/api/models/index.html").read_text(encoding="utf-8")
    pages = [page.read_text(encoding="utf-8") for page in (tmp_path / "site").rglob("*.html")]
    assert not any('data-md-component="source"' in page for page in pages)  # the theme would ask GitHub
    assert not any("doctest:" in page for page in pages)  # directives for a program, not for readers
    on_github = "https://github.com/ijepa-transformers/ijepa-transformers/blob/main/examples/semantic_segmentation.py"
    assert on_github in (tmp_path / "site/dense/index.html").read_text(encoding="utf-8")
