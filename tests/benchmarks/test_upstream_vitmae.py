"""The report on `ViTMAEForPreTraining` shows what its script prints."""

import re
from pathlib import Path

import pytest
import transformers


REPORT = Path(__file__).parents[2] / "docs/development/upstream_vitmae.md"


def test_the_script_of_the_report_prints_what_the_report_shows(capsys):
    text = REPORT.read_text()
    (script,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    if f"transformers {transformers.__version__}\n" not in shown:
        pytest.skip(f"the report is about {shown.splitlines()[0]}, not about {transformers.__version__}")
    exec(compile(script, str(REPORT), "exec"), {})
    assert capsys.readouterr().out == shown
