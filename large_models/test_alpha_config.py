"""Rank, alpha and scaling of both methods, shown and verified without training: the same as ``xgblora check``."""

import sys

from xgblora.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["check", *sys.argv[1:]]))
