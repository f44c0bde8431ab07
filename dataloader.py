"""Batches of token shards as a pure function of (seed, step, micro-step, rank).

`TokenLoader` cuts every shard into windows of T + 1 tokens (T inputs and, shifted by one, T
targets) that overlap by one token. An epoch visits every window once, the shards in a seeded order
and the windows of each shard in a seeded order. Window k of the run belongs to step k // G, where G
is the number of windows in a global batch: the same for every world size and micro-batch.
"""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from minigpt2.config import UserError
from minigpt2.loss import IGNORE_INDEX
from minigpt2.shards import open_shard, read_manifest


@lru_cache(maxsize=4)
def permutation(n: int, *stream: int) -> np.ndarray:
    """A permutation of range(n), a pure function of the numbers in `stream`.

    `RandomState`, because NumPy guarantees its streams: a run resumed under another version sees
    the same windows.
    """
    # The length comes first: SeedSequence treats (7, 0) and (7, 0, 0) alike
    bits = np.random.MT19937(np.random.SeedSequence([len(stream), *stream]))
    return np.random.RandomState(bits).permutation(n)


@dataclass
class TokenLoader:
    """Batches of one split of a corpus. Raises UserError if a shard does not match the manifest or
    holds ids beyond vocab_size, or if no shard has enough tokens for one window.

    `total_batch_size` is a multiple of micro_batch_size * sequence_length * world_size (checked by
    `distributed.count_micro_steps`).
    """

    data_dir: Path
    split: str  # "train" or "val"
    sequence_length: int
    micro_batch_size: int  # windows per rank and micro-step
    total_batch_size: int  # tokens per step, over all ranks and micro-steps
    vocab_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        assert self.total_batch_size % self.sequence_length == 0, "checked by the trainer"
        entries = [e for e in read_manifest(self.data_dir)["shards"] if e["split"] == self.split]
        self.paths = [self.data_dir / entry["file"] for entry in entries]
        self.shards = [open_shard(path, entry["tokens"])
                       for path, entry in zip(self.paths, entries, strict=True)]
        self.window_counts = np.array(
            [(len(tokens) - 1) // self.sequence_length for tokens in self.shards], dtype=np.int64)
        needed = self.sequence_length if self.split == "train" else 1  # targets in a row
        if max((len(tokens) - 1 for tokens in self.shards), default=0) < needed:
            raise UserError(f"{self.data_dir} has {len(entries)} {self.split} shards, none of them "
                            f"with {needed} + 1 tokens for one window: lower --sequence-length or "
                            "make a larger corpus")

    @property
    def windows_per_epoch(self) -> int:
        return int(self.window_counts.sum())

    @property
    def unused_tokens(self) -> int:
        """The targets of an epoch that no window has: windows end where their shard ends."""
        targets = sum(len(tokens) - 1 for tokens in self.shards)
        return targets - self.windows_per_epoch * self.sequence_length

    @property
    def windows_per_step(self) -> int:
        return self.total_batch_size // self.sequence_length

    def locate(self, window: int) -> tuple[int, int]:
        """(shard, first token) of a window, counted from the start of the run."""
        epoch, position = divmod(window, self.windows_per_epoch)
        order = permutation(len(self.shards), self.seed, epoch)
        ends = np.cumsum(self.window_counts[order])
        place = int(np.searchsorted(ends, position, side="right"))
        shard = int(order[place])
        before = int(ends[place - 1]) if place else 0
        inner = permutation(int(self.window_counts[shard]), self.seed, epoch, shard)
        return shard, int(inner[position - before]) * self.sequence_length

    def read(self, shard: int, start: int, length: int) -> np.ndarray:
        """Tokens start .. start + length of a shard (fewer at its end). Checks the ids."""
        tokens = self.shards[shard][start : start + length]
        if tokens.max() >= self.vocab_size:
            raise UserError(
                f"shard {self.paths[shard]} holds id {tokens.max()} near token {start:,}, but the "
                f"vocabulary has {self.vocab_size} ids: write the corpus again with this tokenizer")
        return tokens

    def batch(self, step: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's inputs and targets, each (micro_batch_size, sequence_length) int64."""
        row = (micro_step * self.world_size + self.rank) * self.micro_batch_size
        first = step * self.windows_per_step + row
        tokens = np.empty((self.micro_batch_size, self.sequence_length + 1), dtype=np.int64)
        for i in range(self.micro_batch_size):
            shard, start = self.locate(first + i)
            tokens[i] = self.read(shard, start, self.sequence_length + 1)
        return split_targets(tokens)

    def stream(self, step: int, micro_steps: int, place: Callable[[torch.Tensor], torch.Tensor],
               ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches from `step` on, `micro_steps` for each step, moved to the device by `place`.
        A thread prepares the next batch while the current one is in use."""
        calls = ((s, micro) for s in itertools.count(step) for micro in range(micro_steps))
        with ThreadPoolExecutor(1) as thread:
            def prepare() -> tuple[torch.Tensor, torch.Tensor]:
                inputs, targets = self.batch(*next(calls))
                return place(inputs), place(targets)

            ahead = thread.submit(prepare)
            while True:
                batch, ahead = ahead.result(), thread.submit(prepare)
                yield batch

    def eval_batches(self, max_tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's share of the first max_tokens targets of the split (or all), in order.

        Every target occurs once. A short last window is padded with 0 in the inputs and with
        IGNORE_INDEX in the targets.
        """
        T, windows, budget = self.sequence_length, [], max_tokens
        for shard, tokens in enumerate(self.shards):
            for start in range(0, len(tokens) - 1, T):
                length = min(T, len(tokens) - 1 - start, budget)
                if length > 0:
                    windows.append((shard, start, length))
                    budget -= length
        mine = windows[self.rank :: self.world_size]
        for first in range(0, len(mine), self.micro_batch_size):
            rows = mine[first : first + self.micro_batch_size]
            tokens = np.full((len(rows), T + 1), IGNORE_INDEX, dtype=np.int64)
            for i, (shard, start, length) in enumerate(rows):
                tokens[i, : length + 1] = self.read(shard, start, length + 1)
            yield split_targets(tokens)


def split_targets(tokens: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T + 1) ids, IGNORE_INDEX as padding -> inputs and targets (B, T) int64."""
    tokens = torch.from_numpy(tokens)
    return tokens[:, :-1].clamp(min=0), tokens[:, 1:].contiguous()
