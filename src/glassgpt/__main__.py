"""`python -m glassgpt`: the same as the command `glassgpt`."""

import sys

from glassgpt.cli.main import main

sys.exit(main())
