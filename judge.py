"""Compares policies on held-out prompts: rewards, win rates, KL, and how their responses end.

    python judge.py out/finetune out/rlhf out/dpo --proxy out/reward --gold out/gold --best-of 16
    python judge.py out/pretrain out/finetune --temperature 0     # greedy answers, no reward
    torchrun --standalone --nproc-per-node=8 judge.py out/finetune out/rlhf --proxy out/reward

The first checkpoint is the reference of win rates, KL and best-of-n. No number depends on the
number of ranks. OUT_DIR gets judge.json, samples.jsonl and judge.png (docs/evaluation.md).
"""

if __name__ == "__main__":
    from minigpt2.config import share_cores
    share_cores()  # before PyTorch is imported

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataloader import NO_ANSWER, Prompt, load_prompts, normalize
from image.plot_report import binary_kl, draw_policies
from inference import load_gpt2, sample_responses
from minigpt2.advantages import accuracy
from minigpt2.benchmarks import means, score, table
from minigpt2.checkpoint import find_checkpoint, read_config, shared_template, weights_sha256
from minigpt2.config import ROOT, UserError, flag, parse_config, run_main
from minigpt2.distributed import Dtype, Launch, pick_dtype
from minigpt2.faults import launched
from minigpt2.files import atomic_write, check_folder, sha256_of, write_json
from minigpt2.kernels import prepare_to_sample
from minigpt2.metrics import run_metadata
from minigpt2.rewards import Reward
from minigpt2.sampling import Response
from minigpt2.tokenizer import EOT_TOKEN, decode, encode
from model import GPT

SHORT_WORDS, SHOWN_PROMPTS, BOOTSTRAP_DRAWS = 5, 20, 2000


@dataclass(frozen=True)
class JudgeConfig:
    policies: tuple[str, ...] = flag((), "reference, then policies", positional=True, is_path=True)
    data: str = flag(str(ROOT / "finetune_data" / "alpaca.json"), "rows of prompts", is_path=True)
    columns: str = flag("", "your rows' keys: instruction=NAME,output=NAME", may_be_empty=True)
    out_dir: str = flag(str(ROOT / "out" / "judge"), "folder of the results", is_path=True)
    proxy: str | None = flag(None, "optimized: folder, FILE.py:NAME, function:N[=X]", is_path=True)
    gold: str | None = flag(None, "reward that decides who wins (default: --proxy)", is_path=True)
    best_of: int = flag(0, "also best-of-n up to this n, from that many responses", minimum=0)
    samples: int = flag(1, "responses of each policy to a prompt", minimum=1)
    rows: int = flag(200, "held-out prompts, at most", minimum=1)
    max_tokens: int = flag(128, "longest response, in tokens", minimum=1, old="max_response")
    temperature: float = flag(1.0, "sampling temperature; 0: greedy", minimum=0)
    val_fraction: float = flag(0.05, "held out, as in finetune.py; 1: all", minimum=0, below=1.001)
    seed: int = flag(0, "seed of the responses, the same for all policies", minimum=0)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Dtype = flag("auto", "dtype of samples and rewards; losses and KL: float32")


def judge(config: JudgeConfig, launch: Launch) -> None:
    # 1. Checkpoints, rewards, and the held-out prompts with room for a response in all of them
    folders = {name: find_checkpoint(name) for name in config.policies}
    rewards = {kind: Reward(spec, f"--{kind}", launch.device) for kind, spec in
               (("proxy", config.proxy), ("gold", config.gold)) if spec}
    models = {reward.spec: reward.model for reward in rewards.values() if reward.model}
    sizes = [*map(read_config, folders.values()), *(model.config for model in models.values())]
    block_size = min(size.block_size for size in sizes)
    template = shared_template(*folders, *models)
    _, held_out, summary = load_prompts(config.data, "--data", block_size, config.max_tokens,
                                        config.val_fraction, template, config.columns)
    for reward in rewards.values():
        reward.check_rows(held_out[: config.rows])
    run = run_metadata(config, world_size=launch.world_size, device=launch.device,
                       data=[sha256_of(Path(config.data)), *(r.sha256 for r in rewards.values())])
    launch.check_same(run | {"template": template}, except_for=("data",))
    launch.print0(summary)
    prompts = held_out[: config.rows]
    shown = [{"prompt": decode(prompt.ids), "reference": prompt.output, "responses": {}}
             for prompt in prompts[:SHOWN_PROMPTS]]

    # 2. K responses of each policy to each of P prompts, with rewards and log-probabilities
    P, most = len(prompts), max(config.samples, config.best_of)  # K of the reference
    seeds = np.random.SeedSequence(config.seed).generate_state(P * most, np.uint64).tolist()
    dtype, values, results, reference = pick_dtype(config.dtype, launch.device), {}, {}, None
    for name, folder in folders.items():
        policy = load_gpt2(folder, launch.device)
        launch.check_same({"weights": weights_sha256(policy), "--dtype": str(dtype)})
        reference, rows = reference or policy, prompts * (config.samples if results else most)
        responses = sample_responses(
            prepare_to_sample(copy.deepcopy(policy), dtype), [row.ids for row in rows],
            seeds[: len(rows)], config.max_tokens, launch, temperature=config.temperature,
            label=f"responses of policy {len(results) + 1}")
        figures = {kind: reward(responses, rows, launch, dtype) for kind, reward in
                   rewards.items()} | response_figures(responses, rows)
        if config.temperature == 1 and policy is not reference:
            pairs = [(response.prompt, response.tokens) for response in responses]
            figures["kl"] = (score(policy, pairs, launch, torch.float32)
                             - score(reference, pairs, launch, torch.float32))[:, 0]  # (K * P,)
        values[name] = {figure: torch.as_tensor(row, dtype=torch.float64).view(-1, P)
                        for figure, row in figures.items()}  # (K, P) each
        results[name] = summarize(values[name], prompts) | response_loss(
            policy, held_out, launch, block_size)
        for i, line in enumerate(shown):
            line["responses"][name] = {"text": decode(responses[i].tokens)} | {
                figure: row[0, i].item() for figure, row in values[name].items()}
    if rewards:
        add_comparisons(results, values, config)

    # 3. The table and the files
    launch.print0(f"{table(results)}\nresults: {config.out_dir}")
    if launch.is_master:
        folder = Path(config.out_dir)
        write_json(folder / "judge.json", {"flags": run, "prompts": P, "results": results})
        with atomic_write(folder / "samples.jsonl", text=True) as file:
            file.writelines(json.dumps(line) + "\n" for line in shown)
        if rewards and config.temperature == 1:
            draw_policies(results, folder / "judge.png")


def response_figures(responses: list[Response], prompts: list[Prompt]) -> dict[str, list]:
    """Figures of R responses to R prompts, in lists (R,)."""
    texts = [decode(one.tokens[: len(one.tokens) - one.stopped]) for one in responses]
    return {"tokens": [len(one.tokens) - one.stopped for one in responses],
            "stopped": [one.stopped for one in responses],
            "repeated_4grams": list(map(repeated_4grams, texts)),
            "exact_match": [plain(text) == plain(prompt.output)
                            for text, prompt in zip(texts, prompts, strict=True)]}


def repeated_4grams(text: str) -> float:
    """The share of the 4-grams of a text's words that occurred earlier in it; 0 if it has none."""
    words = text.split()
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def plain(text: str) -> str:
    """The text without differences in case, whitespace and final punctuation."""
    return normalize(text).rstrip(" .,;:!?")


def summarize(values: dict[str, torch.Tensor], prompts: list[Prompt]) -> dict[str, float]:
    """Means over all responses (K, P) with standard errors over prompts; of exact_match only over
    prompts with a short reference, which a response can be expected to match."""
    rows = {figure: row.mean(0) for figure, row in values.items()}  # (P,) each
    short = [0 < len(prompt.output.split()) <= SHORT_WORDS for prompt in prompts]
    rows["exact_match"] = rows["exact_match"][torch.tensor(short)]
    return means({figure: row for figure, row in rows.items() if len(row)})


def response_loss(model: GPT, prompts: list[Prompt], launch: Launch, limit: int) -> dict:
    """The loss of the reference responses that fit into a context of `limit` tokens, in nats per
    token, <|endoftext|> included: what learning from rewards costs. Empty if there are none."""
    rows = [p for p in prompts if (text := normalize(p.output)) and not text.startswith(NO_ANSWER)]
    pairs = [(row.ids, [*encode(row.output), EOT_TOKEN]) for row in rows]
    pairs = [pair for pair in pairs if sum(map(len, pair)) - 1 <= limit]
    if not pairs:
        return {}
    total = score(model, pairs, launch, torch.float32, label="response loss")[:, 0].sum().item()
    return {"response_loss": -total / sum(len(response) for _, response in pairs)}


def add_comparisons(results: dict, values: dict[str, dict], config: JudgeConfig) -> None:
    """Adds to the results: win rates, best-of-n of the reference, and bounds of the KL."""
    kinds = [kind for kind in ("proxy", "gold") if getattr(config, kind)]
    judged, (first, *others) = kinds[-1], values  # gold if there is one
    baseline = values[first]
    for name in others:
        results[name] |= win_rate(values[name][judged], baseline[judged])
    success = {name: row[judged].mean() for name, row in values.items()}  # if the reward is 0 or 1
    if config.temperature == 1 and 0 < success[first] < 1 and all(
            ((row[judged] == 0) | (row[judged] == 1)).all() for row in values.values()):
        for name in values:
            results[name]["kl_lower_bound"] = binary_kl(success[name], success[first]).item()
    for n in sorted({config.best_of, *(2**k for k in range(config.best_of.bit_length()))} - {0}):
        results[f"best of {n}"] = means({
            kind: best_of_n(baseline[kinds[0]].T, baseline[kind].T, n) for kind in kinds})
        results[f"best of {n}"]["kl_upper_bound"] = math.log(n) - (n - 1) / n


def best_of_n(proxy: torch.Tensor, gold: torch.Tensor, n: int) -> torch.Tensor:
    """The expected gold reward (R,) of the response with the largest proxy among n, without bias
    from N >= n responses (R, N) (Nakano et al. 2021). Those of equal proxy share their gold."""
    equal = (proxy[:, :, None] == proxy[:, None, :]).to(gold.dtype)  # (R, N, N)
    shared = (equal @ gold[:, :, None]).squeeze(2) / equal.sum(2)  # (R, N)
    N = gold.size(1)
    weights = gold.new_tensor([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)])  # (N,)
    return shared.gather(1, proxy.argsort(1)) @ weights


def win_rate(scores: torch.Tensor, baseline: torch.Tensor) -> dict:
    """How often a response wins against the reference's, by rewards (K, P) and (K', P) of responses
    to the same prompts, ties half; with a 95 % interval, bootstrapped over prompts."""
    wins = accuracy(scores[:, None] - baseline[: len(scores)]).mean((0, 1))  # (P,)
    draws = torch.randint(len(wins), (BOOTSTRAP_DRAWS, len(wins)),
                          generator=torch.Generator().manual_seed(0))
    interval = wins[draws].mean(1).quantile(wins.new_tensor([0.025, 0.975]))
    return {"win_rate": wins.mean().item(), "win_rate_interval": interval.tolist()}


def main() -> None:
    config = parse_config(JudgeConfig, description=__doc__)
    if not config.policies or len({*config.policies}) < len(config.policies):
        raise UserError("no checkpoint given, or one twice: python judge.py out/finetune out/rlhf")
    if config.best_of and (config.temperature != 1 or not (config.proxy or config.gold)):
        raise UserError(f"--best-of {config.best_of} needs --proxy, the reward to choose by, and "
                        "--temperature 1, for which its KL is known")
    check_folder(Path(config.out_dir), f"--out-dir {config.out_dir}")
    with launched(config.device) as launch:
        if config.temperature != 1 and len(config.policies) > 1:
            launch.print0(f"--temperature {config.temperature}: no KL, which is defined at 1")
        judge(config, launch)


if __name__ == "__main__":
    run_main(main)
