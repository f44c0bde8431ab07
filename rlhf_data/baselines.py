"""Rules that tell the chosen response without a model: the bar for a reward model. `reward.py`
reports how often each is right on held-out pairs; the bag of words is fitted to the others."""

import math
import re

import torch

from minigpt2.advantages import accuracy, preference_loss
from minigpt2.preferences import ARTIFACT, Pair
from minigpt2.tokenizer import decode

WORD = re.compile(r"\w+|[^\w\s]")
Z_95 = 1.959964  # of a 95 % interval


def rule_margins(pairs: list[Pair], training_pairs: list[Pair]) -> dict[str, torch.Tensor]:
    """The margins (n,) float64 that each rule gives to n pairs, chosen minus rejected."""
    texts, training_texts = ([(decode(pair.chosen[:-1]), decode(pair.rejected[:-1]))
                              for pair in part] for part in (pairs, training_pairs))
    longer = torch.tensor([len(chosen) - len(rejected) for chosen, rejected in texts]).double()
    marked = torch.tensor([bool(ARTIFACT.search(chosen)) - bool(ARTIFACT.search(rejected))
                           for chosen, rejected in texts]).double()
    return {"longer": longer, "shorter": -longer, "no artifact": -marked,
            "bag of words": bag_of_words_margins(texts, training_texts)}


def bag_of_words_margins(pairs: list[tuple[str, str]], training_pairs: list[tuple[str, str]],
                         ) -> torch.Tensor:
    """The margins (n,) of n pairs of texts by a logistic regression on the difference of word
    counts, fitted to the training pairs with an L2 penalty of half the squared norm."""
    columns, entries = {}, []  # word -> column; (row, column, 1 in chosen or -1 in rejected)
    for row, texts in enumerate([*pairs, *training_pairs]):
        entries += [(row, columns.setdefault(word, len(columns)), sign) for text, sign in zip(
            texts, (1, -1), strict=True) for word in WORD.findall(text.lower())]
    places, signs = torch.tensor(entries).t().split([2, 1])
    x = torch.sparse_coo_tensor(places, signs[0].double(), (row + 1, len(columns)),
                                check_invariants=False).coalesce()  # adds up the counts
    weights = torch.zeros(len(columns), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        margins = torch.mv(x, weights)[len(pairs) :]
        loss = preference_loss(margins).sum() + weights.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.mv(x, weights.detach())[: len(pairs)]


def accuracy_interval(margins: torch.Tensor) -> dict:
    """The share of margins (n,) above 0, a tie half, with the 95 % interval of Wilson (1927)."""
    p, z2 = accuracy(margins).mean().item(), Z_95**2 / len(margins)
    half = math.sqrt(z2 * (p * (1 - p) + z2 / 4))
    low, high = ((p + z2 / 2 + sign * half) / (1 + z2) for sign in (-1, 1))
    ties = int((margins == 0).sum())
    return {"n": len(margins), "ties": ties, "accuracy": p, "low": low, "high": high}


def print_accuracies(rows: dict[str, dict]) -> None:
    print(f"{'held-out pairs':26} accuracy  95 % interval      n")
    for name, row in rows.items():
        print(f"{name:26} {row['accuracy']:8.4f}  {row['low']:.3f} to {row['high']:.3f} "
              f"{row['n']:6,}" + (f" ({row['ties']:,} ties)" if row["ties"] else ""))
