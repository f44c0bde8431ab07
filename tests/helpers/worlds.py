"""Worlds W and T: tasks so small that their best policy is known.

A few tokens, a few prompts, and few new tokens, so that all responses are enumerated. For a reward
r and a weight beta of the divergence from the reference, the best policy is
pi*(y|x) = ref(y|x) exp(r(x, y) / beta) / Z(x), and its objective is J* = beta log Z(x). In World W,
the preference rows hold every pair of responses as often as the Bradley-Terry model of the rewards
says, exactly: rewards are multiples of log 3. So a script that learns from plain rows has a known
optimum, too. World T is a tree, whose responses have different lengths and seldom stop at first.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dataloader import content_hash, pad_rows
from helpers import world_rewards
from inference import logprobs
from minigpt2.checkpoint import save_checkpoint
from model import GPT, GPTConfig

COPIES = 20  # of each pair of responses


def words(ids: list[int]) -> str:
    """Ids as text: [0, 3] is "0 3"."""
    return " ".join(map(str, ids))


def encode_words(instruction: str, input: str, output: str,
                 template: str) -> tuple[list[int], list[int]]:
    """`encode_example` of such texts; `input` and template are ignored."""
    return list(map(int, instruction.split())), list(map(int, output.split()))


@dataclass(frozen=True)
class Standing:
    """Where a policy stands, averaged over prompts."""

    objective: float  # expected reward - beta * kl
    kl: float  # to the reference, in nats
    fraction: float  # of the way from the reference's objective to the optimum's
    total_variation: float  # to the best policy


@dataclass(frozen=True)
class World:
    """Token id `stop` is the last one. R responses to each of P prompts, in order of length; those
    with max_new_tokens ordinary tokens, the last ones, do not stop."""

    stop: int
    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    beta: float
    unstopped: float  # the reward of a response that does not stop
    reward: Callable[[dict, str], float]  # of the others
    sharpness: float  # of the reference: the scale of its token embedding

    @functools.cached_property
    def responses(self) -> list[list[int]]:
        ids, longest = range(self.stop), self.max_new_tokens
        stopped = [[*tokens, self.stop] for n in range(longest)
                   for tokens in itertools.product(ids, repeat=n)]
        return stopped + [list(tokens) for tokens in itertools.product(ids, repeat=longest)]

    @functools.cached_property
    def rewards(self) -> torch.Tensor:
        """(P, R) float64."""
        return torch.tensor([[
            self.reward({"instruction": words(prompt)}, words(response[:-1]))
            if response[-1] == self.stop else self.unstopped for response in self.responses]
            for prompt in self.prompts], dtype=torch.float64)

    @property
    def rows(self) -> list[list[int]]:
        """Every response after every prompt."""
        return [[*prompt, *response] for prompt in self.prompts for response in self.responses]

    def make_reference(self) -> GPT:
        torch.manual_seed(1)
        model = GPT(GPTConfig(block_size=8, vocab_size=self.stop + 1, n_layer=2, n_head=2,
                              n_embd=32)).eval()
        model.transformer.wte.weight.data *= self.sharpness  # a reference with opinions
        return model

    def save_reference(self, folder: Path) -> Path:
        return save_checkpoint(folder, 1, self.make_reference())

    def response_logprobs(self, model: GPT) -> torch.Tensor:
        """The log-probability of every response to every prompt: (P, R) float64."""
        with torch.no_grad():
            scores = logprobs(model, *pad_rows(self.rows)).double()
        starts = [len(prompt) - 1 for prompt in self.prompts for _ in self.responses]
        return torch.stack([row[start:].sum() for row, start in zip(scores, starts, strict=True)]
                           ).view(len(self.prompts), -1)

    def best_logprobs(self, reference: GPT) -> torch.Tensor:
        """The log-probabilities (P, R) of the best policy."""
        return (self.response_logprobs(reference) + self.rewards / self.beta).log_softmax(1)

    def objective(self, policy: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
        """(J, KL) of log-probabilities (P, R)."""
        kl = (policy.exp() * (policy - reference)).sum(1)  # (P,)
        return (((policy.exp() * self.rewards).sum(1) - self.beta * kl).mean().item(),
                kl.mean().item())

    def standing(self, model: GPT) -> Standing:
        reference = self.make_reference()
        policy, ref, best = (self.response_logprobs(model), self.response_logprobs(reference),
                             self.best_logprobs(reference))
        J, kl = self.objective(policy, ref)
        start, optimum = self.objective(ref, ref)[0], self.objective(best, ref)[0]
        distance = (policy.exp() - best.exp()).abs().sum(1).mean().item() / 2
        return Standing(J, kl, (J - start) / (optimum - start), distance)

    # -------------------------------------------------------------- plain rows for the scripts

    def preference_rows(self, hard: bool = False) -> list[dict[str, str]]:
        """All pairs of responses to each prompt, COPIES times, of which the share
        sigmoid(r_a - r_b) prefers a to b; with `hard` labels, all rows prefer the better one.
        3,120 rows of World W."""
        rows = []
        for prompt, rewards in zip(self.prompts, self.rewards.tolist(), strict=True):
            for a, b in itertools.combinations(range(len(self.responses)), 2):
                difference = rewards[a] - rewards[b]
                share = COPIES / (1 + math.exp(-difference))
                wins = round(share)
                assert abs(wins - share) < 1e-9, "rewards are multiples of log 3"
                if hard and difference:
                    wins = COPIES * (difference > 0)
                first, second = words(self.responses[a]), words(self.responses[b])
                rows += [{"prompt": words(prompt), "chosen": first, "rejected": second}] * wins
                rows += [{"prompt": words(prompt), "chosen": second, "rejected": first}] * (
                    COPIES - wins)
        return rows

    def held_out_row(self) -> dict[str, str]:
        """A row with another prompt for a script to hold out at --val-fraction 0, which holds out
        the lowest hash. Its `input`, which `encode_words` ignores, is chosen so that this is its
        own."""
        number = next(n for n in itertools.count() if content_hash("1", str(n)) < 1e-4)
        return {"instruction": "1", "input": str(number), "chosen": words([0, self.stop]),
                "rejected": words([self.stop])}

    def write_rows(self, path: Path, hard: bool = False) -> Path:
        rows = [*self.preference_rows(hard), self.held_out_row()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def write_prompts(self, path: Path) -> Path:
        rows = [{"prompt": words(prompt)} for prompt in self.prompts] + [self.held_out_row()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def use_small_vocabulary(self, monkeypatch) -> None:
        """Makes the scripts read rows of `words`, stop at `stop`, and accept a model with few
        ids."""
        monkeypatch.setattr("minigpt2.preferences.encode_example", encode_words)
        monkeypatch.setattr("dataloader.format_prompt", lambda instruction, *others: instruction)
        monkeypatch.setattr("dataloader.encode", lambda text: list(map(int, text.split())))
        for module in ("minigpt2.rewards", "rlhf"):
            monkeypatch.setattr(f"{module}.decode", words)
        monkeypatch.setattr("inference.EOT_TOKEN", self.stop)
        monkeypatch.setattr("inference.N_VOCAB", self.stop + 1)


# 13 responses; in the order of the table: -log 3 is the reward of the last nine
W = World(stop=3, prompts=((0, 1), (2,)), max_new_tokens=2, beta=0.5, unstopped=-math.log(3),
          reward=world_rewards.w, sharpness=3)
# 781 responses, of which 156 stop
T = World(stop=5, prompts=((0, 1), (2,), (3, 3, 0), (4, 2)), max_new_tokens=4, beta=0.2,
          unstopped=-1.0, reward=world_rewards.t, sharpness=6)
