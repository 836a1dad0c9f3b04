"""``python -m xgblora``: the same as ``xgblora``."""

from xgblora.cli import main

raise SystemExit(main())
