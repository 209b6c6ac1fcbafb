"""A hook of MkDocs: links of a page to files outside docs/ become links to the repository.

So the same link works on the site and where the Markdown file is read in a clone.
"""

import os.path
import re
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(\]\()(\.\./[^)\s#]+)")


def on_page_markdown(markdown, page, config, files):
    """Called by MkDocs with the source of each page."""

    def replace(match):
        path = os.path.normpath(os.path.join("docs", os.path.dirname(page.file.src_uri), match[2]))
        if path.startswith("docs/"):
            return match[0]
        kind = "tree" if (REPOSITORY / path).is_dir() else "blob"
        return f"{match[1]}{config.repo_url.rstrip('/')}/{kind}/main/{path}"

    return _LINK.sub(replace, markdown)
