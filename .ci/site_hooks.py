"""Hooks of MkDocs, for the site of the guides.

Links of a page to files outside docs/ become links to the repository. So the same link works on the site and where the
Markdown file is read in a clone.
"""

import os.path
import re
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(\]\()(\.\./[^)\s#]+)")
_CODE_WITH_BACKTICKS = re.compile(r"<code>[^<]*`[^<]*</code>")


def on_page_markdown(markdown, page, config, files):
    """Called with the Markdown of each page."""

    def replace(match):
        path = os.path.normpath(os.path.join("docs", os.path.dirname(page.file.src_uri), match[2]))
        if path.startswith("docs/"):
            return match[0]
        kind = "tree" if (REPOSITORY / path).is_dir() else "blob"
        return f"{match[1]}{config.repo_url.rstrip('/')}/{kind}/main/{path}"

    return _LINK.sub(replace, markdown)


def on_page_content(html, page, config, files):
    """Called with the HTML of each page. Types of the configuration are written as in Transformers, with backticks."""
    if not page.file.src_uri.startswith("api/"):
        return html
    return _CODE_WITH_BACKTICKS.sub(lambda code: code[0].replace("`", ""), html)
