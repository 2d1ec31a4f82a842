"""``python -m physisforcing`` is ``physis``."""

import sys

from physisforcing.cli import main

sys.exit(main())
