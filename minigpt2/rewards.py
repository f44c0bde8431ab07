"""The reward model, and what its held-out accuracy is compared with.

A `RewardModel` is GPT-2 with one score per sequence, read at its last token. Its checkpoint is a
folder of transformers' `GPT2ForSequenceClassification`, which gives the same scores.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from minigpt2.advantages import accuracy, preference_loss
from minigpt2.checkpoint import model_from_parameters
from minigpt2.config import UserError
from minigpt2.distributed import Launch, autocast, to_device
from minigpt2.preferences import ARTIFACT
from model import GPT, GPTConfig

PAD_TO = {"cpu": 16, "cuda": 64}  # tokens: few different lengths, for which a device plans
WORD = re.compile(r"\w+|[^\w\s]")
Z_95 = 1.959964  # of a 95 % interval


class RewardModel(GPT):
    """GPT-2 with a linear head without bias in place of the language model's."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.score = nn.Linear(config.n_embd, 1, bias=False)

    @classmethod
    def from_language_model(cls, model: GPT, seed: int) -> "RewardModel":
        """A reward model that shares the tensors of a language model. Its head is N(0, 1/(C + 1)),
        so that first scores have a variance of about 1 (Ziegler et al. 2019, OpenAI's code)."""
        weight = model.transformer.wte.weight
        head = torch.randn(1, weight.size(1), generator=torch.Generator().manual_seed(seed))
        head = (head / math.sqrt(weight.size(1) + 1)).to(weight.device)
        return model_from_parameters(
            model.config, {**dict(model.named_parameters()), "score.weight": nn.Parameter(head)},
            cls)

    def forward(self, ids: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """ids and masks (B, T) int64, right-padded -> scores (B,) float32. Position t sees only
        tokens up to t, so padding and its ids change nothing. In float32 also under autocast:
        bfloat16 would make ties."""
        last = self.hidden_states(ids)[torch.arange(len(ids), device=ids.device), masks.sum(1) - 1]
        return (last.float() * self.score.weight[0]).sum(-1)  # (B, C) -> (B,)

    @torch.no_grad()
    def rescale(self, mean: float, deviation: float) -> None:
        """Makes every score s into (s - mean) / deviation. The head has no bias, so the mean goes
        into the bias b of ln_f, on which nothing else depends: the head w adds w.b to each score.
        Thus the folder needs no setting that other tools would not read."""
        weight = self.score.weight  # (1, C)
        self.transformer.ln_f.bias -= mean * weight[0] / weight.square().sum()
        weight /= deviation


def pad_batch(rows: Sequence[Sequence[int]], block_size: int,
              device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids -> ids and masks (B, T) int64 on the device, right-padded with 0. T is a multiple
    of PAD_TO, at most block_size."""
    T = max(map(len, rows))
    T = min(T + -T % PAD_TO.get(device.type, 16), block_size)
    ids = torch.tensor([[*row, *[0] * (T - len(row))] for row in rows])  # (B, T)
    lengths = torch.tensor(list(map(len, rows)))  # (B,)
    masks = (torch.arange(T) < lengths[:, None]).long()  # (B, T)
    return to_device(ids, device), to_device(masks, device)


@torch.no_grad()
def score_rows(model: RewardModel, rows: Sequence[Sequence[int]], places: Sequence[str],
               launch: Launch, dtype: torch.dtype, batch_size: int,
               should_stop: Callable[[], bool] = bool) -> torch.Tensor | None:
    """The scores (R,) float64 of R rows of ids, on every rank; the ranks share the work, and the
    world size does not change a bit. None, on all ranks, once should_stop() is true on any. Raises
    UserError with the place of a row whose score is not finite."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    found, stopped = {}, should_stop()
    with torch.compiler.set_stance("force_eager"):
        for batch in batches[launch.rank :: launch.world_size]:
            if stopped := stopped or should_stop():
                break
            ids, masks = pad_batch([rows[i] for i in batch], model.config.block_size, launch.device)
            with autocast(launch.device, dtype):
                found |= zip(batch, model(ids, masks).tolist(), strict=True)
    parts = launch.gather((found, stopped))
    if any(stopped for _, stopped in parts):
        return None
    scores = dict(sorted(item for part, _ in parts for item in part.items()))
    for i, score in scores.items():
        if not math.isfinite(score):
            raise UserError(f"the score of {places[i]} is {score}: lower --max-lr, start from "
                            "another checkpoint, or leave that row out")
    return torch.tensor(list(scores.values()), dtype=torch.float64)


# ------------------------------------------------------------------------------ statistics


def accuracy_interval(margins: torch.Tensor) -> dict:
    """How many of n margins (n,), chosen minus rejected, are positive, a tie counted half, with the
    95 % interval of Wilson (1927)."""
    n, ties = len(margins), int((margins == 0).sum())
    if n == 0:
        return {"n": 0}
    p = accuracy(margins).mean().item()
    z2 = Z_95**2 / n
    half = Z_95 / math.sqrt(n) * math.sqrt(p * (1 - p) + z2 / 4)
    low, high = ((p + z2 / 2 + sign * half) / (1 + z2) for sign in (-1, 1))
    return {"n": n, "ties": ties, "accuracy": p, "low": min(low, p), "high": max(high, p)}


def calibration(margins: torch.Tensor, bins: int = 10) -> tuple[float, list[dict]]:
    """(expected calibration error, its bins) of margins (n,). The model's confidence in its choice
    is sigmoid(|margin|), between .5 and 1; bins of equal width compare it with the accuracy (Guo et
    al. 2017)."""
    confidence = margins.abs().sigmoid()
    places = ((2 * confidence - 1) * bins).long().clamp(max=bins - 1)  # 0 to bins - 1
    rows = [accuracy_interval(margins[places == i])
            | {"confidence": confidence[places == i].mean().item()} for i in places.unique()]
    error = sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in rows)
    return error / len(margins), rows


# -------------------------------------------------------------------------- null baselines


def baseline_margins(pairs: Sequence[tuple[str, str]],
                     training_pairs: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """The margins (n,) that simple rules give to n pairs of texts (chosen, rejected)."""
    lengths = torch.tensor([list(map(len, pair)) for pair in pairs])  # (n, 2)
    artifacts = torch.tensor([[len(ARTIFACT.findall(text)) > 0 for text in pair] for pair in pairs])
    longer, marked = (x.double()[:, 0] - x.double()[:, 1] for x in (lengths, artifacts))
    return {"longer": longer, "shorter": -longer, "no artifact": -marked,
            "bag of words": bag_of_words_margins(pairs, training_pairs)}


def bag_of_words_margins(pairs: Sequence[tuple[str, str]],
                         training_pairs: Sequence[tuple[str, str]]) -> torch.Tensor:
    """The margins (n,) of a logistic regression on the difference of word counts, fitted to the
    training pairs with an L2 penalty of half the squared norm."""
    index: dict[str, int] = {}  # word -> column
    x, x_train = (word_differences(part, index) for part in (pairs, training_pairs))
    weights = torch.zeros(len(index), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = preference_loss(torch.mv(x_train, weights)).sum() + weights.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.mv(x, weights.detach()[: x.size(1)])


def word_differences(pairs: Sequence[tuple[str, str]], index: dict[str, int]) -> torch.Tensor:
    """A sparse matrix (pairs, words) float64: how often the chosen text has a word, minus how often
    the rejected one does. New words are added to the index."""
    entries = []  # row, column, count
    for row, (chosen, rejected) in enumerate(pairs):
        counts = Counter(WORD.findall(chosen.lower()))
        counts.subtract(WORD.findall(rejected.lower()))
        entries += [(row, index.setdefault(word, len(index)), n) for word, n in counts.items()]
    places = torch.tensor(entries, dtype=torch.int64).view(-1, 3).t()  # (3, entries)
    return torch.sparse_coo_tensor(places[:2], places[2].double(), (len(pairs), len(index)),
                                   check_invariants=False)
