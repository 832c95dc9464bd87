"""`qwen2vl train` that writes down which samples each step took, and may ask itself to stop.

    stream_worker.py KEYS STOP_AFTER OVERRIDES...

Appends to KEYS.rankN a line of JSON for each step handed to the trainer. After STOP_AFTER steps (0: never) rank 0 sends
itself SIGTERM, as a scheduler would.
"""

import json
import os
import signal
import sys
from pathlib import Path

from data_pipelines.streaming import StreamLoader
from qwen2vl_train import cli
from qwen2vl_train.training import trainer


def main() -> int:
    kept, stop_after = Path(sys.argv[1]), int(sys.argv[2])
    rank = int(os.environ.get("RANK", "0"))

    class WrittenDown(StreamLoader):
        def __iter__(self):
            for number, step in enumerate(super().__iter__(), 1):
                with open(f"{kept}.rank{rank}", "a") as file:
                    file.write(json.dumps([key for batch in step for key in batch.keys]) + "\n")
                if rank == 0 and number == stop_after:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield step

    trainer.StreamLoader = WrittenDown
    return cli.main(["train", *sys.argv[3:]])


if __name__ == "__main__":
    sys.exit(main())
