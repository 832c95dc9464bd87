"""`python -m qwen2vl_train` is the `qwen2vl` command, so that launchers can start it as a module."""

import sys

from qwen2vl_train.cli import main

if __name__ == "__main__":  # worker processes that are spawned import this module again
    sys.exit(main())
