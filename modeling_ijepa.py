# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The models under the usual file name. The code is in `ijepa_transformers/modeling_ijepa.py`."""

from ijepa_transformers.modeling_ijepa import *  # noqa: F403
