# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""`python -m ijepa_transformers` is the console command `ijepa`."""

from .cli import main


if __name__ == "__main__":
    main()
