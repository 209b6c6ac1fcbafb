#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Exports an encoder or a classifier to ONNX:

    python conversion/export_onnx.py --model ijepa_vith14 --output encoder.onnx

`ijepa onnx` is the same. docs/features.md tells more.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a clone without installation

from ijepa_transformers.cli import main


if __name__ == "__main__":
    main(["onnx", *sys.argv[1:]])
