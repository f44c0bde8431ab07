"""HellaSwag, LAMBADA and multiple choice: log-probabilities of continuations, and accuracies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from minigpt2.config import UserError
from minigpt2.distributed import Launch, autocast, share_rows
from minigpt2.loss import LOSS_ROWS_CPU, LOSS_ROWS_GPU, on_cpu
from minigpt2.tokenizer import EOT_TOKEN, N_VOCAB, encode
from model import GPT

Pair = tuple[list[int], list[int]]  # ids of the context, ids of the continuation


@dataclass(frozen=True)
class Question:
    pairs: list[Pair]  # one per choice
    label: int  # the index of the right choice
    characters: list[int]  # length of each choice as text, without the leading space


def make_question(contexts: list[str], choices: list[str], label: int) -> Question:
    """One context per choice. Whitespace between them, a space unless the context ends with some,
    belongs to the continuation. An empty context is <|endoftext|>."""
    pairs = []
    for context, choice in zip(contexts, choices, strict=True):
        end = len(context.rstrip())
        pairs.append((encode(context[:end]), encode((context[end:] or " ") + choice)) if end else
                     ([EOT_TOKEN], encode(choice)))
    return Question(pairs, label, list(map(len, choices)))


def multiple_choice(row: dict) -> Question:
    """A row of `context`, or one per choice, `choices` and `label`, an index; or of HellaSwag as it
    stands, with `ctx` and `endings`, as in build-nanogpt's hellaswag.py. Raises ValueError."""
    context, choices = row.get("context", row.get("ctx")), row.get("choices", row.get("endings"))
    label, choices = row.get("label"), choices if isinstance(choices, list) else []
    contexts = context if isinstance(context, list) else [context] * len(choices)
    are_texts = all(isinstance(text, str) for text in (*contexts, *choices))
    if not are_texts or not all(map(str.strip, choices)) or not 2 <= len(choices) == len(contexts):
        raise ValueError("expected at least two `choices`, texts that are not empty, and a "
                         "`context`, or one for each choice")
    if not str(label).isdecimal() or int(label) >= len(choices):
        raise ValueError(f"label is {label!r:.40}, expected 0 to {len(choices) - 1}")
    return make_question(contexts, choices, int(label))


def make_questions(path: Path, rows: list[tuple[str, object]], render: Callable[[dict], Question],
                   block_size: int) -> list[Question]:
    """The questions of (place, row) pairs of a file. Raises UserError naming the first bad row."""
    questions = []
    for place, row in rows:
        try:
            questions.append(render(row if isinstance(row, dict) else {}))
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        if (longest := max(len(ids) for _, ids in questions[-1].pairs)) > block_size:
            raise UserError(f"{place}: a choice has {longest} tokens, over {block_size}: omit it")
    if not questions:
        raise UserError(f"{path} has no rows")
    return questions


def score(model: GPT, pairs: list[Pair], launch: Launch, dtype: torch.dtype, *,
          batch_tokens: int = 8192, **options) -> torch.Tensor | None:
    """For each pair: the log-probability of the continuation (nats), whether all of its tokens are
    the most likely ones, and whether the last is: (N, 3) float64. Long contexts lose their left."""
    limit = model.config.block_size + 1  # the last token is only a target
    rows = [((context + choice)[-limit:], len(choice)) for context, choice in pairs]
    scores = share_rows(rows, lambda part: score_batch(model, part, launch.device, dtype).tolist(),
                        launch, size_of=lambda r: len(r[0]), batch_tokens=batch_tokens, **options)
    return scores and torch.tensor(scores, dtype=torch.float64)


def score_batch(model: GPT, rows: list[tuple[list[int], int]], device: torch.device,
                dtype: torch.dtype) -> torch.Tensor:
    """One batch of (ids, length of the continuation) -> (B, 3) float64, see `score`."""
    inputs = pad_sequence([torch.tensor(row[:-1]) for row, _ in rows], batch_first=True)  # (B, T)
    places = [(i, p - 1, row[p]) for i, (row, length) in enumerate(rows)
              for p in range(len(row) - length, len(row))]  # row, token before, target
    row, position, target = torch.tensor(places).T.to(device)  # (N,) each
    parts = []
    with autocast(device, dtype):
        x = model.hidden_states(inputs.to(device))[row, position]  # (N, C)
    step = LOSS_ROWS_CPU if on_cpu(device) else LOSS_ROWS_GPU
    for hidden, ids in zip(x.split(step), target.split(step), strict=True):
        in_float32 = not hidden.is_cuda or dtype == torch.float32
        logits = model.lm_head(hidden.float()) if in_float32 else torch.mm(  # see loss.py
            hidden.to(dtype), model.lm_head.weight.to(dtype).t(), out_dtype=torch.float32)
        logits = logits[:, :N_VOCAB]
        logprobs = -torch.nn.functional.cross_entropy(logits, ids, reduction="none")
        parts.append(torch.stack([logprobs, (logits.argmax(1) == ids) + 0 * logprobs], dim=1))
    tokens = torch.cat(parts).cpu().double().split([length for _, length in rows])  # (length, 2)
    return torch.stack([torch.stack([part[:, 0].sum(), part[:, 1].min(), part[-1, 1]])
                        for part in tokens])


def question_figures(model: GPT, questions: list[Question], launch: Launch, dtype: torch.dtype,
                     **options) -> dict[str, float] | None:
    """`choice_figures` of the `score`, or `last_word_figures` if each question has one choice."""
    pairs = [pair for question in questions for pair in question.pairs]
    scores = score(model, pairs, launch, dtype, **options)
    if scores is None:
        return None
    return (last_word_figures(scores) if len(pairs) == len(questions) else
            choice_figures(questions, scores))


def choice_figures(questions: list[Question], scores: torch.Tensor) -> dict[str, float]:
    """Accuracies of the choice of highest log-probability, summed, per token and per character."""
    right = {"accuracy_summed": [], "accuracy_per_token": [], "accuracy_per_character": []}
    parts = scores[:, 0].split([len(question.pairs) for question in questions])
    for question, logprobs in zip(questions, parts, strict=True):
        tokens = [len(continuation) for _, continuation in question.pairs]
        for hits, lengths in zip(right.values(), (1, tokens, question.characters), strict=True):
            best = (logprobs / torch.tensor(lengths)).argmax() + 0 * logprobs.sum()  # or NaN
            hits.append(best if best.isnan() else best == question.label)
    return means(right) | {"rows": len(questions)}


def last_word_figures(scores: torch.Tensor) -> dict[str, float]:
    """Accuracies of the last word (lm-evaluation-harness) and its last token, and perplexity."""
    return means({"accuracy_last_word": scores[:, 1], "accuracy_last_token": scores[:, 2]}) | {
        "perplexity_per_word": scores[:, 0].mean().neg().exp().item(), "rows": len(scores)}


def means(values: dict[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each figure over n rows, and if n > 1 its standard error, deviation / sqrt(n)."""
    figures = {}
    for name, row in values.items():
        row = torch.as_tensor(row, dtype=torch.float64)
        figures[name] = row.mean().item()
        if len(row) > 1:
            figures[f"{name}_stderr"] = (row.std() / row.new_tensor(len(row)).sqrt()).item()
    return figures


def table(results: dict[str, dict]) -> str:
    """One row per figure, one column per entry of `results`, with errors and intervals."""
    def cell(figures: dict, name: str) -> str:
        value, error, interval = (figures.get(name + end) for end in ("", "_stderr", "_interval"))
        text = "" if value is None else f"{value:{',' if isinstance(value, int) else '.4f'}}"
        text += "" if error is None else f" +- {error:.4f}"
        return text if interval is None else f"{text}, {interval[0]:.3f} to {interval[1]:.3f}"

    names = dict.fromkeys(name for figures in results.values() for name in figures
                          if not name.endswith(("_stderr", "_interval")))
    rows = [["", *results], *([name, *(cell(figures, name) for figures in results.values())]
                              for name in names)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
