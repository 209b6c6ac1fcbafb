# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""`python -m ijepa_transformers` is the console command `ijepa`."""

import sys


if __name__ == "__main__":
    try:
        from .cli import main
    except KeyboardInterrupt:  # later ones are told by `main`
        print("ijepa: error: interrupted.", file=sys.stderr)
        sys.exit(130)
    main()
