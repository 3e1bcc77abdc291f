"""`python -m glassgpt`: the same as the command `glassgpt`."""

import sys

from .cli import main

sys.exit(main())
