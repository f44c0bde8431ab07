"""The reward model: GPT-2 with one score per sequence, read at its last token. Its checkpoint is a
folder of transformers' `GPT2ForSequenceClassification`, which gives the same scores."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from minigpt2.checkpoint import model_from_parameters
from minigpt2.config import UserError
from minigpt2.distributed import Launch, autocast, share_work, to_device
from model import GPT, GPTConfig

PAD_TO = {"cpu": 16, "cuda": 64}  # tokens: few different lengths, for which a device plans


class RewardModel(GPT):
    """GPT-2 with a linear head without bias in place of the language model's."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.score = nn.Linear(config.n_embd, 1, bias=False)

    @classmethod
    def from_language_model(cls, model: GPT, seed: int) -> "RewardModel":
        """A reward model that shares the tensors of a language model. Its head is N(0, 1/(C + 1)),
        so that first scores have a variance of about 1 (Ziegler et al. 2019, OpenAI's code)."""
        C, parameters = model.config.n_embd, dict(model.named_parameters())
        head = torch.randn(1, C, generator=torch.Generator().manual_seed(seed)) / math.sqrt(C + 1)
        parameters["score.weight"] = nn.Parameter(head.to(model.transformer.wte.weight.device))
        return model_from_parameters(model.config, parameters, cls)

    def forward(self, ids: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """ids and masks (B, T) int64, right-padded -> scores (B,) float32, under autocast too:
        bfloat16 would make ties."""
        last = self.hidden_states(ids)[torch.arange(len(ids), device=ids.device), masks.sum(1) - 1]
        return (last.float() * self.score.weight[0]).sum(-1)  # (B, C) -> (B,)

    @torch.no_grad()
    def rescale(self, mean: float, deviation: float) -> None:
        """Makes every score s into (s - mean) / deviation. The head w has no bias, so the mean goes
        into the bias b of ln_f, which adds w.b to each score and has no other use."""
        weight = self.score.weight  # (1, C)
        self.transformer.ln_f.bias -= mean * weight[0] / weight.square().sum()
        weight /= deviation


def pad_batch(rows: Sequence[Sequence[int]], block_size: int,
              device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows -> ids and masks (B, T) int64 on the device, right-padded to a multiple of PAD_TO."""
    T = max(map(len, rows))
    T = min(T + -T % PAD_TO.get(device.type, 16), block_size)
    ids = torch.tensor([[*row, *[0] * (T - len(row))] for row in rows])  # (B, T)
    masks = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows])  # (B, T)
    return to_device(ids, device), to_device(masks, device)


def score_rows(model: RewardModel, rows: Sequence[Sequence[int]], places: Sequence[str],
               launch: Launch, dtype: torch.dtype, batch_size: int,
               should_stop: Callable[[], bool] = bool) -> torch.Tensor | None:
    """The scores (R,) float64 of R rows of ids, on every rank, see `share_work`; the world size
    does not change a bit. Raises UserError with the place of a row whose score is not finite."""
    def work(batch: list[int]) -> dict[int, float]:
        ids, masks = pad_batch([rows[i] for i in batch], model.config.block_size, launch.device)
        with autocast(launch.device, dtype):
            return dict(zip(batch, model(ids, masks).tolist(), strict=True))

    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    scores = share_work(batches, work, launch, should_stop)
    if scores is None:
        return None
    for i, score in sorted(scores.items()):
        if not math.isfinite(score):
            raise UserError(f"the score of {places[i]} is {score}: lower --max-lr, start from "
                            "another checkpoint, or leave that row out")
    return torch.tensor([scores[i] for i in range(len(rows))], dtype=torch.float64)
