"""XGBLoRA over seeds alone, with the evaluation at each merge: the same as ``xgblora boost``."""

import sys

from xgblora.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["boost", *sys.argv[1:]]))
