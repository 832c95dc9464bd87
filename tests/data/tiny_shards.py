"""A tiny data set: seeded pictures and texts in webdataset shards, and a tokenizer trained on its words."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.config import DataConfig, LoaderConfig, MediaConfig, PlanConfig, SourceConfig
from data_pipelines.shards.writer import ShardWriter
from data_pipelines.sources.bpe import train_bpe
from data_pipelines.tokenizer import TextTokenizer

SENTENCE = "a red dog sits on the green hill while two birds fly over water and one small cat sleeps"
WORDS = SENTENCE.split()


@dataclass(frozen=True)
class TinyData:
    """`pictures` (20 samples in 3 shards) and `texts` (15 in 2), with `tokenizer`."""

    folder: Path
    tokenizer: TextTokenizer

    def config(self, max_tokens=192, workers=0, pool=6, block=4, **weights) -> DataConfig:
        weights = weights or {"pictures": 2.0, "texts": 1.0}
        return DataConfig(
            sources={name: SourceConfig((f"{self.folder}/{name}-*.tar",), weight) for name, weight in weights.items()},
            media=MediaConfig(max_pixels=36 * 784),
            plan=PlanConfig(max_tokens, 4 * max_tokens, pool_size=pool, block_size=block),
            loader=LoaderConfig(num_workers=workers),
        )


def make_tiny_shards(folder: Path) -> TinyData:
    """Write the shards and the tokenizer into `folder`."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder, "pictures", max_records=8) as writer:
        for number in range(20):
            data, width, height = _picture(rng)
            record = {"caption": _sentence(rng, 3, 12), "media": {"0.png": {"width": width, "height": height}}}
            writer.write(f"p{number:02d}", record, {"0.png": data})
    with ShardWriter(folder, "texts", max_records=8) as writer:
        for number in range(15):
            writer.write(f"t{number:02d}", {"text": _sentence(rng, 5, 60)}, {})
    train_bpe([_sentence(rng, 5, 20) for _ in range(200)], folder / "tokenizer", vocab_size=400)
    return TinyData(folder, TextTokenizer(folder / "tokenizer"))


def _sentence(rng, low, high) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


def _picture(rng) -> tuple[bytes, int, int]:
    width, height = (int(side) for side in rng.integers(30, 180, 2))
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue(), width, height
