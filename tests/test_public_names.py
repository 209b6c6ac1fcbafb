"""The names that the packages offer, each imported on first use."""

import subprocess
import sys
from importlib import import_module

import pytest


PACKAGES = ["ijepa_transformers", "ijepa_transformers.data", "ijepa_transformers.visualization"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there(package):
    module = import_module(package)
    assert module.__all__ and set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert name.isupper() or getattr(module, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'draw_nothing'"):
        module.draw_nothing  # noqa: B018


def test_importing_the_packages_imports_nothing_heavy():
    code = f"import sys, {', '.join(PACKAGES)}; print({{'torch', 'transformers', 'matplotlib'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# What only extras bring; everything must import without it, and says what is missing where it is used.
OPTIONAL = (
    *("bitsandbytes", "deepspeed", "onnx", "onnxruntime", "onnxscript", "simplejpeg", "tensorboard", "timm"),
    *("torchvision", "tifffile", "imagecodecs", "gradio"),
)
IMPORT_ALL = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({OPTIONAL!r}))  # imported as None: find_spec finds nothing
import ijepa_transformers
for module in pkgutil.walk_packages(ijepa_transformers.__path__, "ijepa_transformers."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


def test_every_module_is_imported_without_the_packages_of_extras():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
