#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Judges frozen encoders by their features:

    python run_probing.py --data digits --validation_split test --models outputs/quickstart --output_dir probes

`ijepa probe` is the same. docs/evaluate.md explains every protocol.
"""

import sys

from ijepa_transformers.cli import main


if __name__ == "__main__":
    main(["probe", *sys.argv[1:]])
