# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The configuration under the usual file name. The code is in `ijepa_transformers/configuration_ijepa.py`."""

from ijepa_transformers.configuration_ijepa import *  # noqa: F403
