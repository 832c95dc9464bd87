"""`qwen2vl train` with a trainer that trains nothing, and a signal where the test wants it.

Usage: chain_worker WHERE OVERRIDES...    WHERE: data | fits STAGE | scores STAGE | set N of STAGE
Where it is "monitor starts" or "monitor ends", that hangs, as wandb can.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
from pathlib import Path

from qwen2vl_train import cli, stages
from qwen2vl_train.evaluation.runner import Report
from qwen2vl_train.training.window import Progress


def main() -> int:
    where = sys.argv[1]

    def begin(work: str) -> None:
        print(work, flush=True)
        if work == where:
            os.kill(os.getpid(), signal.SIGTERM)
            atexit.register(os.kill, os.getpid(), signal.SIGTERM)  # torchrun's, when another rank has ended

    class NoTrainer:
        def __init__(self, run, name, init, config, *others) -> None:
            self._name, self._export, self._config = name, Path(run.run_dir) / name / "export", config

        def fit(self, stop, watchdog) -> tuple[Progress, bool]:
            begin(f"fits {self._name}")
            self._export.mkdir(parents=True, exist_ok=True)
            (self._export / "config.json").write_text(json.dumps(self._config.to_hf()))
            return Progress(step=1), True

    def evaluate(model, heldout, data, config, world, scored, at) -> Report:
        begin(f"scores {model.parent.name}")
        for count in range(1, len(heldout) + 1):
            begin(f"set {count} of {model.parent.name}")
            scored(count)
        return Report({}, {}, [])

    class HangingMonitor(stages.Monitor):
        def __init__(self, *settings, **more) -> None:
            if where == "monitor starts":
                time.sleep(1000)
            super().__init__(*settings, **more)

        def close(self, failed=False) -> None:
            if where == "monitor ends":
                time.sleep(1000)
            super().close(failed)

    prepare = stages.prepare_data

    def prepare_data(*arguments) -> None:
        begin("data")
        prepare(*arguments)

    stages.Trainer, stages.evaluate, stages.prepare_data = NoTrainer, evaluate, prepare_data
    stages.Monitor = HangingMonitor
    return cli.main(["train", *sys.argv[2:]])


if __name__ == "__main__":
    sys.exit(main())
