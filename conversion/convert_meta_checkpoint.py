#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Converts a checkpoint of Meta's released code to a directory of this package:

    python conversion/convert_meta_checkpoint.py --checkpoint IN1K-vit.h.14-300e.pth.tar --output ijepa_vith14

`ijepa convert` is the same. docs/convert.md tells more.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a clone without installation

from ijepa_transformers.cli import main


if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
