"""Transformers' own common tests, run over our classes.

The tests are not in the `transformers` wheel. pip fetches the source distribution of the installed version, and its
`tests` folder is kept in pytest's cache under the name `transformers_tests`, so that it does not hide our `tests`.
`transformers_testers.py` says which of our classes are tested and with which inputs.
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
import transformers
from filelock import FileLock


pytestmark = pytest.mark.slow
pytest.importorskip("parameterized", reason="Transformers' tests need the package parameterized.")

ROOT = Path(__file__).parents[2]
TESTERS = Path(__file__).parent / "transformers_testers.py"

# The common tests import these modules, but the source distribution does not have them.
STAND_INS = {
    "exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "generation/test_utils.py": "class GenerationTesterMixin: ...\n",
}

NO_RANDOM_ENCODER = (
    "Loads a file without any weights. We refuse it, because the encoder would be random:"
    " test_transformers_interop.py checks the error."
)
LOADS_NO_WEIGHTS = {
    "test_can_init_all_missing_weights": NO_RANDOM_ENCODER,
    "test_model_weights_reload_no_missing_tied_weights": NO_RANDOM_ENCODER,
}
WATCHES_TARGET_ENCODER = (
    "Watches the model's first layer. It belongs to the target encoder, which takes no gradient, so it is never"
    " checkpointed: test_gradient_checkpointing_changes_no_gradient in test_modeling.py checks the other layers."
)

# Test class -> each common test that fails, and why this is right. A test listed here must fail.
EXPECTED_FAILURES = {
    "EncoderTest": LOADS_NO_WEIGHTS,
    "BackboneTest": {
        **LOADS_NO_WEIGHTS,
        "test_retain_grad_hidden_states_attentions": (
            "Expects the first output to be a tensor; a backbone's first output is the tuple of its feature maps."
        ),
    },
    "PretrainingTest": {
        **LOADS_NO_WEIGHTS,
        "test_base_model_prefix_loads_base_weights": (
            "Expects one encoder, named by base_model_prefix; this model has two, `ijepa` and `context_encoder`."
        ),
        "test_training_gradient_checkpointing": WATCHES_TARGET_ENCODER,
        "test_training_gradient_checkpointing_use_reentrant_false": WATCHES_TARGET_ENCODER,
        "test_training_gradient_checkpointing_use_reentrant_true": WATCHES_TARGET_ENCODER,
    },
}


def download_source(destination: Path) -> Path:
    """Fetches the source distribution of the installed Transformers with pip; skips the test if pip cannot."""
    package = f"transformers=={transformers.__version__}"
    options = ["--no-deps", "--no-binary", "transformers", "--retries", "1", "--timeout", "30"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(destination), package]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        pytest.skip(f"pip cannot download the source of {package}: {reason}")
    return next(destination.glob("*.tar.gz"))


def unpack_tests(archive: Path, destination: Path) -> None:
    """Unpacks the `tests` folder of the source distribution, and adds the modules that it lacks."""
    with tarfile.open(archive) as source:
        for member in source.getmembers():
            _, _, name = member.name.partition("/tests/")  # transformers-VERSION/tests/NAME
            if name and member.isfile():
                member.name = name
                source.extract(member, destination, filter="data")
    for name, text in STAND_INS.items():
        path = destination / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)


@pytest.fixture
def source_folder(pytestconfig, tmp_path) -> Path:
    """The folder that holds `transformers_tests`; it is made once and kept in pytest's cache."""
    folder = pytestconfig.cache.mkdir(f"transformers-{transformers.__version__}")
    with FileLock(folder / "lock"):
        if not (folder / "transformers_tests").is_dir():
            unpack_tests(download_source(tmp_path / "download"), folder / "unfinished")
            (folder / "unfinished").rename(folder / "transformers_tests")
    return folder


def run_common_tests(test_class: str, source_folder: Path, folder: Path) -> tuple[dict[str, str], str]:
    """Runs one class of `transformers_testers.py`: gives each test's outcome, and what pytest printed."""
    report = folder / "report.xml"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source_folder), str(ROOT)]), "HF_HUB_OFFLINE": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    # An empty settings file and no conftest.py: our own settings of pytest are not meant for these tests.
    (folder / "pytest.ini").write_text("[pytest]\n")
    options = ["-c", "pytest.ini", "--rootdir", ".", "--noconftest", "-p", "no:cacheprovider", "-W", "ignore"]
    command = [sys.executable, "-m", "pytest", *options, "--tb=short", "--show-capture=no", f"--junitxml={report}"]
    result = subprocess.run(
        [*command, f"{TESTERS}::{test_class}"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert report.exists(), result.stdout + result.stderr
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        marks = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcomes[case.get("name", "")] = min(marks, default="passed")
    return outcomes, result.stdout


@pytest.mark.parametrize("test_class", EXPECTED_FAILURES)
def test_common_tests_of_transformers(test_class, source_folder, tmp_path):
    outcomes, output = run_common_tests(test_class, source_folder, tmp_path)
    by_outcome = {outcome: {name for name in outcomes if outcomes[name] == outcome} for outcome in outcomes.values()}
    passed, failed = by_outcome.get("passed", set()), by_outcome.get("failure", set()) | by_outcome.get("error", set())
    expected = set(EXPECTED_FAILURES[test_class])
    print(f"{test_class}: {len(passed)} passed, {len(failed)} failed, {len(outcomes)} in all")
    assert "test_model_outputs_equivalence" in passed, f"The common tests did not run:\n{output}"
    assert not failed - expected, f"{sorted(failed - expected)} failed:\n{output}"
    assert not expected - failed, f"{sorted(expected - failed)} did not fail; take them out of EXPECTED_FAILURES."
