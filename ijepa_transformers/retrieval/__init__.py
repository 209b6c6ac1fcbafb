# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Similar photos, near duplicates and outliers of a folder: `ijepa search`."""
