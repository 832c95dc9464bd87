"""A trained model as an ordinary Qwen2-VL folder: weights, config, tokenizer, preprocessor, chat template.

Enters: full tensors one at a time (collective under ZeRO-3), the configs, the tokenizer. Leaves: a directory in the
form of the published ones, which transformers 4.45 to 5.x (with no missing and no unexpected key), vLLM and SGLang
load; it appears whole, and an older one stays until it does. `checksums.json` beside the published files names the
weights' size and CRC-32 (reading them once more takes about a second per GB).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor

from data_pipelines.config import MediaConfig
from data_pipelines.errors import UserError
from data_pipelines.samples import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE
from data_pipelines.sources.bpe import write_published_settings
from data_pipelines.tokenizer import TextTokenizer
from data_pipelines.whole import flush_to_disk
from qwen2vl_train.model.config import ModelConfig
from qwen2vl_train.model.cost import parameter_counts
from qwen2vl_train.model.vision import IMAGE_MEAN, IMAGE_STD
from qwen2vl_train.model.weights import save_hf
from qwen2vl_train.training.kept import write_json
from qwen2vl_train.training.manifest import checksum
from qwen2vl_train.training.world import World

CHECKSUMS = "checksums.json"


class ExportError(UserError):
    """An export that could not be written. The message says where, why and what to do."""


def export_model(
    tensors: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    tokenizer: TextTokenizer,
    media: MediaConfig,
    folder: Path,
    dtype: torch.dtype,
    world: World,
) -> None:
    """Write the model to `folder`, replacing an older export. Collective: every rank walks `tensors`, rank 0 writes.

    `dtype` is the weights' on disk (published: bfloat16); `media` gives the pixel limits of preprocessor_config.json.

    Raises:
        ExportError: no room, or a fault of the disk, on rank 0; an older export stays.
    """
    if not world.is_main:
        for _ in tensors:  # each step gathers one tensor over all ranks
            continue
    else:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder.with_name(f".writing-{folder.name}"), ignore_errors=True)
            _check_room(folder.parent, sum(parameter_counts(config).values()) * dtype.itemsize)
            _write(tensors, config, tokenizer, media, folder, dtype)
        except (OSError, SafetensorError) as error:
            raise ExportError(
                f"could not write the export {folder}: {error}; make room (or repair the disk) and start the same "
                "command again"
            ) from error
    world.barrier()  # the folder is there for every rank


def _check_room(parent: Path, needed: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(f"its disk has {free / 1e9:.2f} GB free, the weights take {needed / 1e9:.2f}")


def _write(
    tensors: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    tokenizer: TextTokenizer,
    media: MediaConfig,
    folder: Path,
    dtype: torch.dtype,
) -> None:
    aside, replaced = (folder.with_name(f".{what}-{folder.name}") for what in ("writing", "replaced"))
    shutil.rmtree(replaced, ignore_errors=True)
    aside.mkdir()
    pad = Tokenizer.from_file(_tokenizer_file(tokenizer)).token_to_id("<|vision_pad|>")
    save_hf(tensors, aside, replace(config, vision_token_id=pad), dtype)
    save_processing(aside, tokenizer, media)
    weights = sorted(aside.glob("*.safetensors"))
    write_json(aside / CHECKSUMS, {path.name: (path.stat().st_size, checksum(path)) for path in weights})
    for path in (*aside.iterdir(), aside):
        flush_to_disk(path)
    if folder.exists():
        folder.rename(replaced)
    aside.rename(folder)
    flush_to_disk(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def fingerprint(folder: Path) -> str:
    """Names the weights in `folder` without reading them: by the checksums of our exports.

    Elsewhere by names, sizes and headers of the files, which tell models of other shapes apart, but not other values.
    """
    digest = hashlib.sha256()
    if (folder / CHECKSUMS).is_file():
        digest.update((folder / CHECKSUMS).read_bytes())
        return digest.hexdigest()[:16]
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = file.read(8)
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + length)
            digest.update(file.read(min(int.from_bytes(length, "little"), path.stat().st_size)))
    return digest.hexdigest()[:16]


def save_processing(folder: Path, tokenizer: TextTokenizer, media: MediaConfig) -> None:
    """Tokenizer, chat template, generation settings and the image and video preprocessors' settings, as published.

    The template is the published one, which `encode.chat` trains on, whatever the tokenizer's folder holds.
    """
    # copied, not written anew: counts of text tokens are kept under this file's fingerprint
    shutil.copyfile(_tokenizer_file(tokenizer), folder / "tokenizer.json")
    write_published_settings(Tokenizer.from_file(_tokenizer_file(tokenizer)), folder)
    special = tokenizer.special
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": special.endoftext,
            "eos_token_id": [special.im_end, special.endoftext],
            "pad_token_id": special.endoftext,
            "do_sample": False,
        },
    )
    common: dict[str, Any] = {
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "merge_size": MERGE_SIZE,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,  # bicubic
    }
    write_json(
        folder / "preprocessor_config.json",
        common
        | {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
            "min_pixels": media.min_pixels,
            "max_pixels": media.max_pixels,
            "size": {"shortest_edge": media.min_pixels, "longest_edge": media.max_pixels},
        },
    )
    write_json(
        folder / "video_preprocessor_config.json",
        common
        | {
            "video_processor_type": "Qwen2VLVideoProcessor",
            "processor_class": "Qwen2VLProcessor",
            "min_pixels": media.video_min_pixels,
            "max_pixels": media.video_max_pixels,
            "size": {"shortest_edge": media.video_min_pixels, "longest_edge": media.video_max_pixels},
            "do_sample_frames": True,
            "fps": media.fps,
            "min_frames": media.min_frames,
            "max_frames": media.max_frames,
        },
    )


def _tokenizer_file(tokenizer: TextTokenizer) -> str:
    return str(Path(tokenizer.path) / "tokenizer.json")
