#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Writes a directory of this package as a checkpoint of Meta's code:

    python conversion/export_meta_checkpoint.py --model ijepa_vith14 --output back.pth.tar

`ijepa export` is the same. docs/convert.md tells more.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a clone without installation

from ijepa_transformers.cli import main


if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
