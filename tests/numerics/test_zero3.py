"""What must hold inside DeepSpeed ZeRO-3: exact rotary angles, weights by partitions, compiled blocks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen2vl_train.model.config import ModelConfig, TextConfig, VisionConfig
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.model.weights import initialise, model_tensors, save_hf
from tests.model.builders import SPECIAL

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.distributed


def assert_ranks_succeed(ranks: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    finished = subprocess.run(
        [*command, "-m", "tests.numerics.zero3_worker", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]


def test_rotary_angles_are_exact_in_a_bf16_engine():
    assert_ranks_succeed(1, "rotary")


def test_weights_reach_the_partitions_without_a_copy_of_the_model(tmp_path):
    # 60 MB, of which no tensor has more than 8
    config = ModelConfig(
        VisionConfig(4, 256, 4),
        TextConfig(4000, 512, 2048, 4, 8, 2, mrope_section=(8, 12, 12)),
        image_token_id=SPECIAL.image_pad,
        video_token_id=SPECIAL.video_pad,
    )
    model = Qwen2VL(config)
    initialise(model, 0)
    save_hf(model_tensors(model), tmp_path, config, torch.float32, max_shard_bytes=20 << 20)
    assert_ranks_succeed(2, "weights", str(tmp_path))


def test_compiled_blocks_train_as_plain_ones():
    assert_ranks_succeed(2, "compiled")
