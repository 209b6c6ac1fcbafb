"""The package's metadata is in pyproject.toml. This file adds the README with links that work on PyPI."""

import re
from pathlib import Path

from setuptools import setup


REPOSITORY = "https://github.com/ijepa-transformers/ijepa-transformers"


def readme_for_pypi() -> str:
    """README.md with absolute links: PyPI shows it without the files around it."""
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?://|#)", rf"\1{REPOSITORY}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?://|#)", rf"\1{REPOSITORY}/blob/main/", text)


setup(long_description=readme_for_pypi(), long_description_content_type="text/markdown")
