"""Rank, alpha and scaling of both methods, shown and verified without training: ``xgblora check``.

On a tiny model made on the spot where none is named, so that it runs anywhere in seconds.
"""

import sys

from xgblora.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["check", "--model_name", "tiny", *sys.argv[1:]]))
