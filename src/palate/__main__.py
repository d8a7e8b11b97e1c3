"""The entry point of `python -m palate`, which is the same as `palate`."""

import sys

from palate.cli import main

sys.exit(main())
