"""Hooks of MkDocs, for the site of the guides.

Links of a page to files outside docs/ become links to the repository. So the same link works on the site and where the
Markdown file is read in a clone. A flag such as `--output` is not broken at its hyphens on a phone. The site asks no
other host.
"""

import os.path
import re
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(\]\()(\.\./[^)\s#]+)")
_INLINE_CODE = re.compile(r"<code>[^<]*</code>")  # not the highlighted code of a block
_FLAG = re.compile(r"(?<![\w-])--?[a-zA-Z]\w*")
_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
_END_OF_PART = re.compile(r"(?<=\w[/_.])(?=[a-zA-Z])")
_CODE_WITH_MARKUP = re.compile(r"<code>[^<]*[`*][^<]*</code>")
_DEFAULT_OF_KEYWORDS = re.compile(r",\s*default:\s*<code>\{\}</code>\s*")


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
    """Called with the HTML of each page. Types of the configuration are written as in Transformers, with backticks and
    asterisks. `**keywords` have no default."""
    if page.file.src_uri.startswith("api/"):
        html = _CODE_WITH_MARKUP.sub(lambda code: code[0].replace("`", "").replace("*optional*", "optional"), html)
        html = _DEFAULT_OF_KEYWORDS.sub("", html)
    html = _TABLE.sub(lambda table: _INLINE_CODE.sub(lambda code: with_breaks(code[0]), table[0]), html)
    return _INLINE_CODE.sub(lambda code: with_whole_flags(code[0]), html)


def on_post_page(output, page, config):
    """Called with each whole page. The theme would ask GitHub for stars, each time a page is opened."""
    return output.replace(' data-md-component="source"', "")


def on_post_template(output_content, template_name, config):
    """Called with the page of the error 404."""
    return on_post_page(output_content, None, config)


def with_breaks(code):
    """Long names may be broken between their parts, but not those of flags: tables are narrow on a phone."""
    return code if _FLAG.search(code) else _END_OF_PART.sub("<wbr>", code)


def with_whole_flags(html):
    """Lines are broken between flags and not within them: browsers break at a hyphen."""
    return _FLAG.sub(lambda flag: f'<span style="white-space: nowrap">{flag[0]}</span>', html)
