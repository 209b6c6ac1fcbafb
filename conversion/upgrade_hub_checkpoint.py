#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Renames the weights of a directory of the stock port:

    python conversion/upgrade_hub_checkpoint.py --model DIRECTORY --output upgraded

docs/convert.md tells more.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a clone without installation

from ijepa_transformers.conversion.upgrade import main


if __name__ == "__main__":
    main()
