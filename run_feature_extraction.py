#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Writes the features of many images to Parquet or safetensors:

    python run_feature_extraction.py --model my_model --data my/photos --output_dir features

`ijepa extract` is the same. docs/features.md explains the files.
"""

import sys

from ijepa_transformers.cli import main


if __name__ == "__main__":
    main(["extract", *sys.argv[1:]])
