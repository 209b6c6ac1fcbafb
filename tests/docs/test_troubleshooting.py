"""The sentences of docs/troubleshooting.md are sentences of the package."""

import ast
import re

import pytest

from tests.markdown_files import REPOSITORY


ROWS = re.findall(
    r"^\| `([^`]+)` \|", (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), flags=re.MULTILINE
)
OF_OTHERS = ("No space left on device", "pooler_output", "image file is truncated")  # the system, Transformers, PIL


@pytest.fixture(scope="module")
def texts():
    """The parts of all strings of the package, joined: a sentence with values in it is several parts."""
    found = []
    for file in (REPOSITORY / "ijepa_transformers").rglob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        found += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n".join(found)


@pytest.mark.parametrize("sentence", [row for row in ROWS if row not in OF_OTHERS])
def test_a_sentence_is_one_of_the_package(sentence, texts):
    parts = [part.strip() for part in sentence.split("…")]
    assert parts and max(map(len, parts)) >= 12, "too short to be found"
    missing = [part for part in parts if part not in texts]
    assert missing == []


def test_there_are_sentences():
    assert len(ROWS) > 40
