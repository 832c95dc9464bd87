"""`python -m qwen2vl_train` is the `qwen2vl` command, so that launchers can start it as a module."""

import sys

from qwen2vl_train.cli import main

sys.exit(main())
