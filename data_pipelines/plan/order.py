"""In which order a source is read: epoch after epoch, every sample once in each, from (seed, source, epoch) alone.

Enters: the number of shards and each shard's number of samples, asked for only when the shard comes near. Leaves:
blocks, (epoch, shard, rows in shuffled order), without end. Costs O(shards) once an epoch and O(block) a block, however
large the data set is.

Shards are permuted; a window of them is opened together; their blocks of neighbouring samples are permuted across the
window; rows are permuted inside a block. So near samples come from several shards, and reading stays local.

Permutations sort a hash (splitmix64) instead of calling numpy's generators, whose streams may change between releases:
a run must continue exactly after an upgrade.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipelines.errors import UserError

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring samples of one shard: `rows` int64 [n] in the order they are drawn."""

    epoch: int
    shard: int
    rows: IntArray


class SourceOrder:
    """A place in a source's endless sequence of blocks.

    `place` is the state: (epoch, window of shards in the epoch's permutation, block in the window's permutation) of the
    next block; it may be set. `entered` is called with the shards of each window when its first block is asked for.
    """

    def __init__(
        self,
        seed: int,
        source: str,
        num_shards: int,
        shard_size: Callable[[int], int],
        block_size: int,
        window_shards: int = 8,
        entered: Callable[[Sequence[int]], None] = lambda shards: None,
    ) -> None:
        self.place = (0, 0, 0)
        self._seed, self._source = seed, source
        self._num_shards, self._shard_size = num_shards, shard_size
        self._block_size, self._window_shards, self._entered = block_size, window_shards, entered
        self._shards: tuple[int, IntArray] | None = None
        self._blocks: tuple[tuple[int, int], list[tuple[int, int]]] | None = None

    def next_block(self) -> Block:
        """The next block. Empty shards give none.

        Raises:
            UserError: two epochs passed without a sample: the source is empty.
        """
        epoch, window, block = self.place
        last_epoch = epoch + 1
        while epoch <= last_epoch:
            if window * self._window_shards >= self._num_shards:
                epoch, window, block = epoch + 1, 0, 0
                continue
            blocks = self._window_blocks(epoch, window)
            if block < len(blocks):
                self.place = (epoch, window, block + 1)
                shard, start = blocks[block]
                return Block(epoch, shard, self._rows(epoch, shard, start))
            window, block = window + 1, 0
        raise UserError(f"source {self._source!r} has no samples in its {self._num_shards} shards")

    def _window_blocks(self, epoch: int, window: int) -> list[tuple[int, int]]:
        """(shard, first row) of a window's blocks, permuted."""
        if self._shards is None or self._shards[0] != epoch:
            self._shards = (epoch, permutation(self._num_shards, self._key("shards", epoch)))
        if self._blocks is None or self._blocks[0] != (epoch, window):
            first = window * self._window_shards
            shards = self._shards[1][first : first + self._window_shards].tolist()
            self._entered(shards)
            blocks = [(s, start) for s in shards for start in range(0, self._shard_size(s), self._block_size)]
            mixed = permutation(len(blocks), self._key("blocks", epoch, window))
            self._blocks = ((epoch, window), [blocks[i] for i in mixed])
        return self._blocks[1]

    def _rows(self, epoch: int, shard: int, start: int) -> IntArray:
        size = min(self._block_size, self._shard_size(shard) - start)
        return start + permutation(size, self._key("rows", epoch, shard, start))

    def _key(self, what: str, *numbers: int) -> int:
        return hash_key(self._seed, self._source, what, *numbers)


def hash_key(*parts: object) -> int:
    """64 bits that depend on every part."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permutation(size: int, key: int) -> IntArray:
    """A shuffled 0..size-1, int64 [size]: the order of the splitmix64 hashes of key + i; the same on every machine."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + (np.arange(size, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.argsort(z, kind="stable")
