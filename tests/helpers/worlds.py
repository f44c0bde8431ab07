"""World W: a task so small that its best policy is known.

Four tokens, two prompts, and at most two new tokens: 13 responses, which are enumerated. For a
reward r and a weight beta of the divergence from the reference, the best policy is
pi*(y|x) = ref(y|x) exp(r(x, y) / beta) / Z(x), and its objective is J* = beta log Z(x). The
preference rows hold every pair of responses as often as the Bradley-Terry model of the rewards
says, exactly: rewards are multiples of log 3. So a script that learns from plain rows has a known
optimum, too.
"""

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from dataloader import content_hash, pad_rows
from inference import logprobs
from minigpt2.checkpoint import save_checkpoint
from model import GPT, GPTConfig

SIZES = GPTConfig(block_size=8, vocab_size=4, n_layer=2, n_head=2, n_embd=32)
STOP = 3
PROMPTS = ([0, 1], [2])
RESPONSES = ([STOP], *([a, STOP] for a in range(STOP)),
             *([a, b] for a in range(STOP) for b in range(STOP)))  # the last nine: not stopped
MAX_NEW_TOKENS = 2
BETA = 0.5
COPIES = 20  # of each pair of responses


def reward(prompt: list[int], response: list[int]) -> float:
    """-log 3 for a response that did not stop, log 3 for one that begins with the prompt's last
    token, else 0."""
    if response[-1] != STOP:
        return -math.log(3)
    return math.log(3) * (response[0] == prompt[-1])


REWARDS = torch.tensor([[reward(prompt, response) for response in RESPONSES]
                        for prompt in PROMPTS], dtype=torch.float64)  # (2, 13)


def make_reference() -> GPT:
    torch.manual_seed(1)
    model = GPT(SIZES).eval()
    model.transformer.wte.weight.data *= 3  # a reference with opinions
    return model


def save_reference(folder: Path) -> Path:
    return save_checkpoint(folder, 1, make_reference())


def response_logprobs(model: GPT) -> torch.Tensor:
    """The log-probability of every response to every prompt: (2, 13) float64."""
    rows = [prompt + response for prompt in PROMPTS for response in RESPONSES]
    with torch.no_grad():
        scores = logprobs(model, *pad_rows(rows)).double()
    starts = [len(prompt) - 1 for prompt in PROMPTS for _ in RESPONSES]
    return torch.stack([row[start:].sum() for row, start in zip(scores, starts, strict=True)]
                       ).view(len(PROMPTS), -1)


@dataclass(frozen=True)
class Standing:
    """Where a policy stands, averaged over prompts."""

    objective: float  # expected reward - BETA * kl
    kl: float  # to the reference, in nats
    fraction: float  # of the way from the reference's objective to the optimum's
    total_variation: float  # to the best policy


def best_logprobs(reference: GPT) -> torch.Tensor:
    """The log-probabilities (2, 13) of the best policy."""
    return (response_logprobs(reference) + REWARDS / BETA).log_softmax(1)


def objective(policy: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """(J, KL) of log-probabilities (2, 13)."""
    kl = (policy.exp() * (policy - reference)).sum(1)  # (2,)
    return ((policy.exp() * REWARDS).sum(1) - BETA * kl).mean().item(), kl.mean().item()


def standing(model: GPT) -> Standing:
    reference = make_reference()
    policy, ref, best = (response_logprobs(model), response_logprobs(reference),
                         best_logprobs(reference))
    J, kl = objective(policy, ref)
    start, optimum = objective(ref, ref)[0], objective(best, ref)[0]
    distance = (policy.exp() - best.exp()).abs().sum(1).mean().item() / 2
    return Standing(J, kl, (J - start) / (optimum - start), distance)


# ------------------------------------------------------------------ plain rows for the scripts


def words(ids: list[int]) -> str:
    """Ids as text: [0, 3] is "0 3"."""
    return " ".join(map(str, ids))


def preference_rows(hard: bool = False) -> list[dict[str, str]]:
    """All 78 pairs of responses to each prompt, COPIES times: 3,120 rows, of which the share
    sigmoid(r_a - r_b) prefers a to b; with `hard` labels, all rows prefer the better one."""
    rows = []
    for prompt, rewards in zip(PROMPTS, REWARDS.tolist(), strict=True):
        for a, b in itertools.combinations(range(len(RESPONSES)), 2):
            difference = rewards[a] - rewards[b]
            share = COPIES / (1 + math.exp(-difference))
            wins = round(share)
            assert abs(wins - share) < 1e-9, "rewards are multiples of log 3"
            if hard and difference:
                wins = COPIES * (difference > 0)
            first, second = words(RESPONSES[a]), words(RESPONSES[b])
            rows += [{"prompt": words(prompt), "chosen": first, "rejected": second}] * wins
            rows += [{"prompt": words(prompt), "chosen": second, "rejected": first}] * (
                COPIES - wins)
    return rows


def held_out_row() -> dict[str, str]:
    """A row with a third prompt for a script to hold out at --val-fraction 0, which holds out the
    lowest hash. Its `input`, which `encode_words` ignores, is chosen so that this is its own."""
    number = next(n for n in itertools.count() if content_hash("1", str(n)) < 1e-4)
    return {"instruction": "1", "input": str(number), "chosen": words([0, STOP]),
            "rejected": words([STOP])}


REWARD_CODE = """import math

def score(row, response):
    return math.log(3) * (response.split()[:1] == row["instruction"].split()[-1:])
"""


def write_prompts(folder: Path) -> dict[str, str]:
    """The prompts and the reward as files: the settings of rlhf.py that name them."""
    rows = [{"prompt": words(prompt)} for prompt in PROMPTS] + [held_out_row()]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows),
                                          encoding="utf-8")
    (folder / "score.py").write_text(REWARD_CODE, encoding="utf-8")
    return {"prompts": str(folder / "prompts.jsonl"), "reward": f"{folder / 'score.py'}:score",
            "unstopped_score": -math.log(3), "max_response": MAX_NEW_TOKENS}


def write_rows(path: Path, hard: bool = False) -> Path:
    rows = [*preference_rows(hard), held_out_row()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def use_small_vocabulary(monkeypatch) -> None:
    """Makes the scripts read rows of `words`, stop at STOP, and accept a model with four ids."""
    def encode_words(instruction: str, input: str, output: str) -> tuple[list[int], list[int]]:
        return list(map(int, instruction.split())), list(map(int, output.split()))

    monkeypatch.setattr("minigpt2.preferences.encode_example", encode_words)
    monkeypatch.setattr("dataloader.format_prompt", lambda instruction, input: instruction)
    monkeypatch.setattr("dataloader.encode", lambda text: list(map(int, text.split())))
    for module in ("minigpt2.rewards", "rlhf"):
        monkeypatch.setattr(f"{module}.decode", words)
    monkeypatch.setattr("inference.EOT_TOKEN", STOP)
    monkeypatch.setattr("inference.N_VOCAB", SIZES.vocab_size)
