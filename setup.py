"""Package metadata. The scripts (run_*.py), recipes and conversion tools are used from a clone of the repository."""

import re
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "ijepa" / "__init__.py").read_text(), re.MULTILINE).group(1)

# JPEG files decoded faster than by PIL, to the same pixels. On these processors there are wheels for Linux, macOS and
# Windows, Python 3.10 to 3.14; elsewhere it would have to be compiled, and PIL does.
FAST = ['simplejpeg; platform_machine in "x86_64 AMD64 arm64 aarch64"']
# matplotlib draws the curves that every pretraining run leaves beside its model.
TRAIN = ["matplotlib", *FAST]
ONNX = ["onnx", "onnxscript", "onnxruntime"]
# torchvision: RandAugment, mixup and cutmix of fine-tuning; timm: the LARS optimizer of the published linear probe.
VISION = ["torchvision", "timm"]
# DeepSpeed compiles a small operator on first use: it needs a C++ compiler.
DEEPSPEED = ["deepspeed"]
EIGHT_BIT = ["bitsandbytes"]
TEST = [*TRAIN, *ONNX, *VISION, *DEEPSPEED, *EIGHT_BIT, "pytest", "ruff", "tensorboard"]

setup(
    name="ijepa-transformers",
    version=VERSION,
    description="I-JEPA for Transformers: feature extraction, pretraining from one CPU to a cluster, fine-tuning",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=["ijepa"],
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.8",
        "transformers>=5.17",
        "accelerate>=1.15",
        "datasets>=5.0",
        "evaluate>=0.4",
        "safetensors",
        "pillow",
        "scikit-learn",
        "numpy",
        "pyarrow",
        "pyyaml",
        "tqdm",
    ],
    extras_require={
        "train": TRAIN,
        "fast": FAST,
        "onnx": ONNX,
        "vision": VISION,
        "deepspeed": DEEPSPEED,
        "eight_bit": EIGHT_BIT,
        "tracking": ["tensorboard"],
        "test": TEST,
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
