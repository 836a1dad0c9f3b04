"""One run: one model, one task, one method, one seed: the same as ``xgblora train``."""

import sys

from xgblora.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
