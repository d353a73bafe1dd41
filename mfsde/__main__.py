"""`python -m mfsde` is the command `mfsde`."""

import sys

from .cli import main

sys.exit(main())
