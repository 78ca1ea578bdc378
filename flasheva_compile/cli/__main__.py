"""``python -m flasheva_compile.cli``: the command where its script is not installed."""

import sys

from flasheva_compile.cli.command import main

sys.exit(main())
