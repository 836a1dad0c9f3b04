"""LoRA and XGBLoRA over seeds, with figures and a summary: the same as ``xgblora compare``."""

import sys

from xgblora.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["compare", *sys.argv[1:]]))
