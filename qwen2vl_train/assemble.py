"""`qwen2vl assemble`: a Qwen2 text model and a CLIP vision tower become the Qwen2-VL folder that stage 1 starts from.

Enters: a Hugging Face folder of Qwen2, an open_clip ViT-H/14 state dict (the paper: DFN's), a folder with Qwen2-VL's
tokenizer. Leaves: an ordinary Qwen2-VL folder with a random merger. Costs the whole model once in host memory.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from data_pipelines.config import MediaConfig
from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.tokenizer import TextTokenizer
from qwen2vl_train.export import save_processing
from qwen2vl_train.model.config import ModelConfig, VisionConfig
from qwen2vl_train.model.from_parts import Account, load_from_parts
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.model.weights import model_tensors, save_hf


def assemble(
    text: Path, vision: Path, tokenizer: Path, out: Path, seed: int, vision_config: VisionConfig, dtype: torch.dtype
) -> Account:
    """Write the assembled model to `out` and say what became of every tensor.

    Raises:
        UserError: `out` is not empty; a tensor that no rule covers; sizes that do not fit; missing special tokens.
        FileNotFoundError: a part is not there.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty: name a new folder")
    config = _config(text, TextTokenizer(tokenizer), vision_config)
    model = Qwen2VL(config)
    account = load_from_parts(model, text, vision, seed)
    save_hf(model_tensors(model), out, config, dtype)
    save_processing(out, TextTokenizer(tokenizer), MediaConfig())
    return account


def _config(text: Path, tokenizer: TextTokenizer, vision: VisionConfig) -> ModelConfig:
    """Qwen2's sizes with the tokenizer's ids; M-RoPE's sections share the rotated pairs 2 : 3 : 3 as published."""
    path = text / "config.json"
    if not path.is_file():
        raise MissingFileError(f"--text {text}: no config.json there; name a Qwen2 folder")
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if values.get("model_type") != "qwen2":
        raise UserError(f"{path}: model_type is {values.get('model_type')!r}; a Qwen2 text model is wanted")
    pairs = values["hidden_size"] // values["num_attention_heads"] // 2
    section = [pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8]
    special = tokenizer.special
    nested = values.pop("rope_parameters", None) or {}  # transformers 5.x keeps the base in there
    return ModelConfig.from_hf(
        values
        | {
            "model_type": "qwen2_vl",
            "rope_theta": values.get("rope_theta", nested.get("rope_theta", 1e6)),
            "rope_scaling": {"type": "mrope", "mrope_section": section},
            "vision_config": {
                "depth": vision.depth,
                "embed_dim": vision.embed_dim,
                "num_heads": vision.num_heads,
                "mlp_ratio": vision.mlp_ratio,
            },
            "bos_token_id": special.endoftext,
            "eos_token_id": special.im_end,
            "vision_start_token_id": special.vision_start,
            "vision_end_token_id": special.vision_end,
            "image_token_id": special.image_pad,
            "video_token_id": special.video_pad,
        }
    )


def add_arguments(commands: Any) -> None:
    """Add the `assemble` command to the sub-parsers of `qwen2vl`; it sets `run`."""
    parser = commands.add_parser(
        "assemble",
        help="make the model that stage 1 starts from: Qwen2 + a CLIP vision tower",
        description=__doc__.partition(":")[2].strip(),
    )
    parser.add_argument("--text", type=Path, required=True, metavar="DIR", help="Qwen2's Hugging Face folder")
    parser.add_argument("--vision", type=Path, required=True, metavar="FILE", help="open_clip weights of a ViT-H/14")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="Qwen2-VL's tokenizer")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--seed", type=int, default=0, help="of the merger's weights (%(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(%(default)s)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    account = assemble(
        options.text, options.vision, options.tokenizer, options.out, options.seed, VisionConfig(),
        getattr(torch, options.dtype),
    )  # fmt: skip
    print(f"{options.out}: {account.summary()}")
    return 0
