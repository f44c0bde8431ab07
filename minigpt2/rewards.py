"""Rewards: functions, and a model like transformers' `GPT2ForSequenceClassification`."""

import math
import re
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import SubprocessError

import torch
import torch.nn as nn

from minigpt2.advantages import response_targets
from minigpt2.checkpoint import load_model, model_from_parameters, weights_sha256
from minigpt2.config import UserError, first_line
from minigpt2.distributed import Launch, autocast, share_rows, to_device
from minigpt2.files import sha256_of
from minigpt2.preferences import padded_length
from minigpt2.sampling import Response
from minigpt2.tokenizer import decode
from model import GPT, GPTConfig


class RewardModel(GPT):
    """GPT-2 with a linear head without bias in place of the language model's."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.score = nn.Linear(config.n_embd, 1, bias=False)

    @classmethod
    def from_language_model(cls, model: GPT, seed: int) -> "RewardModel":
        """Shares a language model's tensors; the head is N(0, 1/(C + 1)) (Ziegler et al. 2019)."""
        C, parameters = model.config.n_embd, dict(model.named_parameters())
        head = torch.randn(1, C, generator=torch.Generator().manual_seed(seed)) / math.sqrt(C + 1)
        parameters["score.weight"] = nn.Parameter(head.to(model.transformer.wte.weight.device))
        return model_from_parameters(model.config, parameters, cls)

    def forward(self, ids: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """ids and masks (B, T) int64, right-padded -> scores (B,) float32."""
        return self.token_scores(ids).gather(1, masks.sum(1, keepdim=True) - 1)[:, 0]

    def token_scores(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (B, T) int64 -> scores after every token (B, T) float32: bfloat16 makes ties."""
        return (self.hidden_states(ids).float() * self.score.weight[0]).sum(-1)  # (B, T)

    @torch.no_grad()
    def rescale(self, mean: float, deviation: float) -> None:
        """Makes every score s into (s - mean) / deviation. The head w has no bias, so the mean goes
        into the bias b of ln_f, which adds w.b to each score and has no other use."""
        weight = self.score.weight  # (1, C)
        self.transformer.ln_f.bias -= mean * weight[0] / weight.square().sum()
        weight /= deviation


def pad_batch(rows: Sequence[Sequence[int]], block_size: int,
              device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows -> ids and masks (B, T) int64 on the device, right-padded to one of few lengths."""
    T = min(padded_length(max(map(len, rows))), block_size)
    ids = torch.tensor([[*row, *[0] * (T - len(row))] for row in rows])  # (B, T)
    masks = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows])  # (B, T)
    return to_device(ids, device), to_device(masks, device)


def response_batch(rows: Sequence[tuple[list[int], list[int]]], block_size: int,
                   device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompt, response) ids -> inputs and targets (B, T); without rows, one without targets."""
    ids, masks = pad_batch([prompt + reply for prompt, reply in rows] or [[0]], block_size, device)
    starts = torch.tensor([len(prompt) for prompt, _ in rows] or [1])  # (B,)
    return ids, response_targets(ids, to_device(starts, device), masks.sum(1))


def score_rows(model: RewardModel, rows: Sequence[Sequence[int]], places: Sequence[str],
               launch: Launch, dtype: torch.dtype, batch_size: int,
               should_stop: Callable[[], bool] = bool) -> torch.Tensor | None:
    """The scores (R,) float64 of R rows, see `share_rows`. Raises UserError if not finite."""
    def work(batch: list[Sequence[int]]) -> list[float]:
        ids, masks = pad_batch(batch, model.config.block_size, launch.device)
        with autocast(launch.device, dtype):
            return model(ids, masks).tolist()

    scores = share_rows(rows, work, launch, size_of=len, batch_size=batch_size,
                        should_stop=should_stop)
    if scores is None:
        return None
    for place, score in zip(places, scores, strict=True):
        if not math.isfinite(score):
            raise UserError(f"the score of {place} is {score}: lower --max-lr, start from "
                            "another checkpoint, or leave that row out")
    return torch.tensor(scores, dtype=torch.float64)


REWARDS = ("expected the folder of a reward model, FILE.py:FUNCTION, or function:NAME with stops, "
           "at_most_words=N, contains[=TEXT] or equals[=TEXT]")
USER_ERRORS = (  # which a user's function may raise
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError,
    RuntimeError, StopIteration, SubprocessError, SyntaxError, TypeError, ValueError, re.error)


class Reward:
    """What `--reward` names (docs/alignment.md): a reward model, or a function of a row and a text.
    A response without <|endoftext|> gets `unstopped_score`, by default -1 or 0 (function)."""

    def __init__(self, spec: str, flag: str, device: torch.device,
                 unstopped_score: float | None = None):
        self.spec, self.sha256, self.model = spec, spec, None
        file, _, name = (spec + ":" * spec.endswith(".py")).rpartition(":")
        try:
            if spec.startswith("function:"):
                name, _, argument = spec.removeprefix("function:").partition("=")
                self.function = built_in(name, argument)
            elif file.endswith(".py"):
                self.function = runpy.run_path(file).get(name)
                if not callable(self.function):
                    raise ValueError(f"it has no function {name!r}")
                self.sha256 = f"{sha256_of(Path(file))}:{name}"
            else:
                self.model = load_model(spec, device, RewardModel).requires_grad_(False)
                self.sha256 = weights_sha256(self.model)
        except USER_ERRORS as error:
            raise UserError(f"{flag} {spec}: {type(error).__name__}: {first_line(error):.200}; "
                            f"{REWARDS}") from None
        default = 0.0 if self.model is None else -1.0
        self.unstopped_score = default if unstopped_score is None else unstopped_score

    def check_rows(self, rows: Sequence) -> None:
        """Raises UserError if a row lacks the output that the function compares responses with."""
        needs_output = self.spec.removesuffix("=") in ("function:contains", "function:equals")
        places = [row.place for row in rows if needs_output and not row.output]
        if places:
            raise UserError(f"{self.spec} compares with a row's output: {len(places):,} rows have "
                            f"none, the first is {places[0]}: leave them out, or give =TEXT")

    def __call__(self, responses: Sequence[Response], rows: Sequence, launch: Launch,
                 dtype: torch.dtype, batch_size: int = 32,
                 should_stop: Callable[[], bool] = bool) -> torch.Tensor | None:
        """The scores (R,) float64 of R responses; for None see `share_rows`. Raises UserError."""
        stopped = [i for i, response in enumerate(responses) if response.stopped]
        places = [f"{decode(responses[i].tokens)!r:.100}, a response to {rows[i].place},"
                  for i in stopped]
        if self.model is None:
            found = share_rows(list(zip(stopped, places, strict=True)), lambda batch: [
                self.evaluate(rows[i], decode(responses[i].tokens[:-1]), place)
                for i, place in batch], launch, should_stop=should_stop)
        else:
            ids = [responses[i].prompt + responses[i].tokens for i in stopped]
            found = score_rows(self.model, ids, places, launch, dtype, batch_size, should_stop)
        if found is None:
            return None
        scores = torch.full((len(responses),), self.unstopped_score, dtype=torch.float64)
        scores[stopped] = torch.as_tensor(found, dtype=torch.float64)
        return scores

    def evaluate(self, row, text: str, place: str) -> float:
        """The value of the function. Raises UserError if it raises, or returns no number."""
        try:
            value = self.function(dict(vars(row)), text)
            if abs(value) <= torch.finfo(torch.float32).max:
                return float(value)
        except USER_ERRORS as error:
            value = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"the reward function {self.spec} gives {value!s:.120} for {place} "
                        "expected a finite number")


def built_in(name: str, argument: str) -> Callable[[dict, str], float]:
    """The function `name` of a row and a response that ended. Raises one of USER_ERRORS."""
    if name == ("stops" if argument else "at_most_words"):
        raise ValueError(f"{name} {'takes no' if argument else 'needs an'} argument")
    longest = int(argument) if name == "at_most_words" else 0
    return {"stops": lambda row, text: True,
            "at_most_words": lambda row, text: len(text.split()) <= longest,
            "contains": lambda row, text: (argument or row["output"]).casefold() in text.casefold(),
            "equals": lambda row, text: (argument or row["output"]).split() == text.split()}[name]
