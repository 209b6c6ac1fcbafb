#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Makes one self-contained page that shows what a model learned:

    python run_visualization.py --model my_model --data my/photos --output report.html

`ijepa visualize` is the same. docs/visualize.md explains the pictures.
"""

import sys

from ijepa_transformers.cli import main


if __name__ == "__main__":
    main(["visualize", *sys.argv[1:]])
