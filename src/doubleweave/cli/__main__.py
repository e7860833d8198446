"""`python -m doubleweave.cli`: the command line where no script `doubleweave` is installed."""

import sys

from doubleweave.cli.main import main

sys.exit(main())
