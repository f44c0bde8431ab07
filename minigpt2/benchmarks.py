"""Multiple-choice questions scored by log-likelihood, such as HellaSwag.

Every row becomes a `Question`: one (context, continuation) pair of token ids per choice. A
continuation carries its leading space and is encoded separately from its context.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from minigpt2.config import UserError
from minigpt2.distributed import Launch, autocast
from minigpt2.files import read_rows
from minigpt2.loss import LOSS_ROWS_CPU, LOSS_ROWS_GPU
from minigpt2.progress import progress_bar
from minigpt2.tokenizer import EOT_TOKEN, N_VOCAB, encode
from model import GPT

Pair = tuple[list[int], list[int]]  # ids of the context, ids of the continuation


@dataclass(frozen=True)
class Question:
    pairs: list[Pair]  # one per choice
    label: int  # the index of the right choice
    characters: list[int]  # length of each choice as text, without the leading space


# ------------------------------------------------------------------------------- rendering
def make_question(contexts: list[str], choices: list[str], label: int) -> Question:
    """A question with one context per choice. Whitespace between them, a single space unless the
    context ends with some, belongs to the continuation. An empty context is <|endoftext|>; the
    choice then starts a text."""
    pairs = []
    for context, choice in zip(contexts, choices, strict=True):
        end = len(context.rstrip())
        pairs.append((encode(context[:end]), encode((context[end:] or " ") + choice)) if end else
                     ([EOT_TOKEN], encode(choice)))
    return Question(pairs, label, list(map(len, choices)))


def multiple_choice(row: dict) -> Question:
    """A row of `context` (or a list of contexts, one per choice), `choices` and `label`."""
    context, choices, label = (row.get(key) for key in ("context", "choices", "label"))
    contexts = context if isinstance(context, list) else [context] * len(choices or ())
    if not isinstance(choices, list) or len(choices) < 2 or len(contexts) != len(choices):
        raise ValueError("expected a list of at least two `choices`, and a `context`, or one each")
    if not all(isinstance(text, str) for text in (*contexts, *choices)):
        raise ValueError("`context` and `choices` must be text")
    if "" in [choice.strip() for choice in choices]:
        raise ValueError("a choice is empty")
    return make_question(contexts, choices, label_of(label, choices))


def label_of(label: object, choices: list) -> int:
    """A label as an index. The official HellaSwag files hold it as text."""
    index = int(label) if isinstance(label, str) and label.isdecimal() else label
    if not isinstance(index, int) or not 0 <= index < len(choices):
        raise ValueError(f"label is {label!r:.40}, expected 0 to {len(choices) - 1}")
    return index


def hellaswag(row: dict) -> Question:
    """A row of HellaSwag as it stands, as in build-nanogpt's hellaswag.py."""
    return multiple_choice({"context": row.get("ctx"), "choices": row.get("endings"),
                            "label": row.get("label")})


def read_questions(path: Path, render: Callable[[dict], Question], limit: int | None,
                   block_size: int) -> list[Question]:
    """The questions of a file (JSON, JSON Lines or parquet), cut to the context from the left.
    Raises UserError naming the first bad row."""
    questions = []
    for number, row in enumerate(read_rows(path)[:limit], 1):
        try:
            question = render(row)
        except ValueError as error:
            raise UserError(f"{path} row {number}: {error}") from None
        if (longest := max(len(continuation) for _, continuation in question.pairs)) > block_size:
            raise UserError(f"{path} row {number}: a choice has {longest} tokens, the context "
                            f"{block_size}: leave the row out")
        questions.append(question)
    if not questions:
        raise UserError(f"{path} has no rows")
    return questions


# --------------------------------------------------------------------------------- scoring
@torch.no_grad()
def score(model: GPT, pairs: list[Pair], launch: Launch, dtype: torch.dtype, batch_tokens: int,
          label: str) -> torch.Tensor:
    """For each pair: the log-probability of the continuation (nats), whether every one of its
    tokens is the most likely one, and whether the last one is: (N, 3) float64, equal on all ranks.

    Pairs are sorted by length into batches of about batch_tokens, which do not depend on the number
    of ranks. Contexts are cut on the left. Only the continuations pass through the output head.
    """
    limit = model.config.block_size + 1  # the last token is only a target
    rows = [((context + choice)[-limit:], len(choice)) for context, choice in pairs]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    batches, scores = [], torch.zeros(len(rows), 3, dtype=torch.float64)
    while order:
        size = max(1, batch_tokens // len(rows[order[0]][0]))
        batches.append(order[:size])
        order = order[size:]
    mine = batches[launch.rank :: launch.world_size]
    for batch in progress_bar(len(mine), 0, label, enabled=launch.is_master,
                              over=mine):
        scores[batch] = score_batch(model, [rows[i] for i in batch], launch.device, dtype)
    return launch.sum(scores).cpu()


def score_batch(model: GPT, rows: list[tuple[list[int], int]], device: torch.device,
                dtype: torch.dtype) -> torch.Tensor:
    """One batch of (ids, length of the continuation) -> (B, 3) float64, see `score`."""
    inputs = torch.zeros(len(rows), max(len(row) for row, _ in rows) - 1,
                         dtype=torch.int64)  # (B, T)
    places = []  # (row, position of the token before, target) of every scored token
    for i, (row, length) in enumerate(rows):
        inputs[i, : len(row) - 1] = torch.tensor(row[:-1])
        places += [(i, p - 1, row[p]) for p in range(len(row) - length, len(row))]
    row, position, target = torch.tensor(places).T.to(device)  # (N,) each
    with autocast(device, dtype):
        x = model.hidden_states(inputs.to(device))[row, position]  # (N, C)
        step = LOSS_ROWS_CPU if device.type == "cpu" else LOSS_ROWS_GPU
        logits = (model.lm_head(part)[:, :N_VOCAB].float() for part in x.split(step))
        parts = [(-F.cross_entropy(scores, ids, reduction="none"), scores.argmax(1) == ids)
                 for scores, ids in zip(logits, target.split(step), strict=True)]
    logprob, greedy = (torch.cat(tensors).double() for tensors in zip(*parts, strict=True))  # (N,)
    total = torch.zeros(len(rows), dtype=torch.float64, device=device).index_add_(0, row, logprob)
    wrong = torch.zeros_like(total).index_add_(0, row, 1 - greedy)
    last = torch.tensor([length for _, length in rows]).cumsum(0).to(device) - 1  # (B,)
    return torch.stack([total, (wrong == 0).double(), greedy[last]], dim=1).cpu()


# ----------------------------------------------------------------------------- the figures
def choice_figures(questions: list[Question], scores: torch.Tensor) -> dict[str, float]:
    """Accuracies of the choice with the highest log-probability: summed (lm-evaluation-harness's
    acc), per token (build-nanogpt's acc_norm) and per character (the harness's acc_norm)."""
    right = {"accuracy_summed": 0, "accuracy_per_token": 0, "accuracy_per_character": 0}
    for question, logprobs in zip(questions, split_by_question(questions, scores[:, 0]),
                                  strict=True):
        tokens = torch.tensor([len(continuation) for _, continuation in question.pairs])
        divisors = (torch.ones(()), tokens, torch.tensor(question.characters))
        for name, divisor in zip(right, divisors, strict=True):
            right[name] += int((logprobs / divisor).argmax()) == question.label
    n, figures = len(questions), {}
    for name, count in right.items():
        figures |= {name: count / n, f"{name}_stderr": stderr(count / n, n)}
    return figures | {"rows": n}


def split_by_question(questions: list[Question], values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return values.split([len(question.pairs) for question in questions])


def stderr(p: float, n: int) -> float:
    """The standard error of a fraction p of n rows."""
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan
