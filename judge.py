"""Compares policies on held-out prompts: rewards, win rates, KL, and how their responses end.

    python judge.py out/finetune out/rlhf out/dpo --data rows.json --proxy out/reward \\
                    --gold out/gold --best-of 16
    python judge.py out/finetune out/rlhf --data rows.json --proxy function:at_most_words=20
    python judge.py out/pretrain out/finetune --temperature 0     # greedy answers, no reward
    torchrun --standalone --nproc-per-node=8 judge.py out/finetune out/rlhf --proxy out/reward

The first checkpoint is the reference: win rates and KL of the others are relative to it, and
best-of-n is estimated from its responses. No number depends on the number of ranks. OUT_DIR gets
judge.json, samples.jsonl and judge.png. docs/evaluation.md describes the figures.
"""

import copy
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataloader import Prompt, load_prompts, normalize, split_rows
from inference import check_vocabulary, sample_responses
from minigpt2.advantages import accuracy, best_of_n, binary_kl
from minigpt2.benchmarks import means, score, table
from minigpt2.checkpoint import find_checkpoint, load_model, read_config
from minigpt2.config import UserError, flag, parse_config, run_main
from minigpt2.distributed import Dtype, Launch, pick_dtype
from minigpt2.faults import launched
from minigpt2.files import atomic_write, check_folder
from minigpt2.kernels import prepare_to_sample
from minigpt2.rewards import Reward
from minigpt2.sampling import Response
from minigpt2.tokenizer import decode, encode_example
from model import GPT

ROOT = Path(__file__).resolve().parent
SHORT_WORDS, SHOWN_PROMPTS = 5, 20  # words of a reference to match; prompts in samples.jsonl
BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True)
class JudgeConfig:
    policies: tuple[str, ...] = flag((), "checkpoints, the first one the reference",
                                     positional=True)
    data: str = flag(str(ROOT / "finetune_data" / "alpaca.json"), "rows with the prompts",
                     is_path=True)
    out_dir: str = flag(str(ROOT / "out" / "judge"), "where results are written", is_path=True)
    proxy: str | None = flag(None, "the optimized reward: folder of a reward model, "
                             "function:NAME[=ARGUMENT] or FILE.py:FUNCTION")
    gold: str | None = flag(None, "the reward that decides, likewise (default: --proxy)")
    best_of: int = flag(0, "also best-of-n up to this n, from that many responses", minimum=0)
    samples: int = flag(1, "responses of each policy to a prompt", minimum=1)
    rows: int = flag(200, "respond to the first held-out prompts", minimum=1)
    max_response: int = flag(128, "maximum number of tokens of a response", minimum=1)
    temperature: float = flag(1.0, "sampling temperature; 0: greedy", minimum=0)
    val_fraction: float = flag(0.05, "fraction of prompts held out, as in finetune.py", minimum=0,
                               below=1)
    seed: int = flag(0, "seed of the responses, the same for all policies", minimum=0)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Dtype = flag("auto", "of sampling and reward models; losses and KL are in float32")


def judge(config: JudgeConfig, launch: Launch) -> dict[str, dict]:
    """Writes the report and returns its figures by policy, the same on every rank."""
    # 1. Checkpoints, rewards, and the held-out prompts with room for a response in all of them
    folders = {name: find_checkpoint(name) for name in config.policies}
    rewards = {kind: Reward(spec, f"--{kind}", launch.device) for kind, spec in
               (("proxy", config.proxy), ("gold", config.gold)) if spec}
    sizes = [*map(read_config, folders.values()),
             *(reward.model.config for reward in rewards.values() if reward.model)]
    prompts, summary = load_prompts(config.data, "--data", min(s.block_size for s in sizes),
                                    config.max_response)
    keys = [(prompt.instruction, prompt.input, prompt.output) for prompt in prompts]
    _, held_out, split = split_rows(keys, config.val_fraction)
    launch.print0(f"{summary}; {split}")
    held_out = [prompts[i] for i in held_out]
    prompts = held_out[: config.rows]
    P, most = len(prompts), max(config.samples, config.best_of)  # responses of the reference
    seeds = np.random.SeedSequence(config.seed).generate_state(P * most, np.uint64).tolist()

    # 2. The responses of each policy, their rewards and log-probabilities
    dtype, results, scores, reference = pick_dtype(config.dtype, launch.device), {}, {}, None
    shown = [{"prompt": decode(prompt.ids), "reference": prompt.output, "responses": {}}
             for prompt in prompts[:SHOWN_PROMPTS]]
    for name, folder in folders.items():
        policy = load_model(folder, launch.device)
        check_vocabulary(policy, name)
        rows = prompts * (most if reference is None else config.samples)  # all prompts, K times
        reference = policy if reference is None else reference
        responses = sample_responses(
            prepare_to_sample(copy.deepcopy(policy), dtype), [row.ids for row in rows],
            seeds[: len(rows)], config.max_response, launch, temperature=config.temperature,
            label=f"{name}, responses")
        scores[name] = {kind: reward(responses, rows, launch, dtype).view(-1, P)
                        for kind, reward in rewards.items()}  # (K, P) each
        values = scores[name] | response_figures(responses, rows)
        if config.temperature == 1 and policy is not reference:
            pairs = [(response.prompt, response.tokens) for response in responses]
            ours, theirs = (score(model, pairs, launch, torch.float32, label=f"{name}, KL")[:, 0]
                            for model in (policy, reference))
            values["kl"] = ours - theirs
        results[name] = prompt_means(values, P) | response_loss(policy, held_out, launch)
        for i, line in enumerate(shown):
            line["responses"][name] = {
                "text": response_text(responses[i]), "finish_reason": responses[i].finish_reason,
                **{kind: row[0, i].item() for kind, row in scores[name].items()}}

    # 3. Comparisons, the table and the files
    if rewards:
        compare(results, scores, config)
    if launch.is_master:
        write_report(config, results, shown)
    launch.print0(table(results))
    return results


def response_text(response: Response) -> str:
    return decode(response.tokens[: len(response.tokens) - response.stopped])


def response_figures(responses: list[Response], rows: list[Prompt]) -> dict[str, Tensor]:
    """Figures (R,) of R responses to R prompts; exact_match is NaN unless the reference is short.
    """
    texts = list(map(response_text, responses))
    matches = [plain(text) == plain(row.output)
               if 1 <= len(row.output.split()) <= SHORT_WORDS else math.nan
               for text, row in zip(texts, rows, strict=True)]
    figures = {"response_tokens": [len(one.tokens) - one.stopped for one in responses],
               "stopped": [one.stopped for one in responses],
               "repeated_4grams": list(map(repeated_4grams, texts)), "exact_match": matches}
    return {name: torch.tensor(row, dtype=torch.float64) for name, row in figures.items()}


def plain(text: str) -> str:
    """The text without differences in case, whitespace and final punctuation."""
    return normalize(text).rstrip(" .,;:!?")


def repeated_4grams(text: str) -> float:
    """The share of the 4-grams of a text's words that occurred earlier in it; 0 if it has none."""
    words = text.split()
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def prompt_means(values: dict[str, Tensor], P: int) -> dict[str, float]:
    """Means and standard errors over P prompts of K values to each, (K, P) or (K * P,)."""
    rows = {name: value.view(-1, P).mean(0) for name, value in values.items()}
    rows = {name: row[~row.isnan()] for name, row in rows.items()}
    return means({name: row for name, row in rows.items() if len(row)})


def response_loss(model: GPT, prompts: list[Prompt], launch: Launch) -> dict[str, float]:
    """The loss of the reference responses that fit into the context, in nats per token,
    <|endoftext|> included: what learning from rewards costs. Empty without such responses."""
    pairs = [encode_example(prompt.instruction, prompt.input, prompt.output)
             for prompt in prompts if prompt.output.strip()]
    pairs = [pair for pair in pairs if sum(map(len, pair)) - 1 <= model.config.block_size]
    if not pairs:
        return {}
    total = score(model, pairs, launch, torch.float32, label="response loss")[:, 0].sum().item()
    return {"response_loss": -total / sum(len(response) for _, response in pairs)}


def compare(results: dict, scores: dict[str, dict[str, Tensor]], config: JudgeConfig) -> None:
    """Adds to the results: win rates, best-of-n of the reference, and bounds of the KL."""
    (first, baseline), *others = scores.items()
    proxy, judged = baseline[next(iter(baseline))], list(baseline)[-1]  # gold if there is one
    for name, rows in others:
        results[name] |= win_rate(rows[judged], baseline[judged])
    p0 = torch.tensor(results[first][judged], dtype=torch.float64)
    binary = all(((row[judged] == 0) | (row[judged] == 1)).all() for row in scores.values())
    if binary and config.temperature == 1 and 0 < p0 < 1:
        for name in scores:
            p = torch.tensor(results[name][judged], dtype=torch.float64)
            results[name]["kl_lower_bound"] = binary_kl(p, p0).item()
    for n in sorted({config.best_of, *(2**k for k in range(config.best_of.bit_length()))} - {0}):
        results[f"best of {n}"] = means({kind: best_of_n(proxy.T, row.T, n)
                                         for kind, row in baseline.items()})
        results[f"best of {n}"]["kl_upper_bound"] = math.log(n) - (n - 1) / n


def win_rate(scores: Tensor, baseline: Tensor) -> dict:
    """How often a response wins against one of the reference to the same prompt, from rewards
    (K, P) and (K', P), ties half; with the 95 % interval of a bootstrap over prompts."""
    wins = accuracy(scores[:, None] - baseline).mean((0, 1))  # (K, K', P) -> (P,)
    draws = torch.randint(len(wins), (BOOTSTRAP_DRAWS, len(wins)),
                          generator=torch.Generator().manual_seed(0))
    interval = wins[draws].mean(1).quantile(wins.new_tensor([0.025, 0.975]))
    return {"win_rate": wins.mean().item(), "win_rate_interval": interval.tolist()}


def write_report(config: JudgeConfig, results: dict[str, dict], shown: list[dict]) -> None:
    folder = Path(config.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "judge.json", text=True) as file:
        json.dump({"flags": asdict(config), "results": results}, file, indent=1)
    with atomic_write(folder / "samples.jsonl", text=True) as file:
        file.writelines(json.dumps(line) + "\n" for line in shown)
    if (config.proxy or config.gold) and config.temperature == 1:
        draw(results, folder / "judge.png")


def draw(results: dict[str, dict], image: Path) -> None:
    """Plots rewards against sqrt(KL); a success rate against KL, with the frontier of all policies.
    Gold is filled and solid, proxy hollow and dashed."""
    from matplotlib.figure import Figure  # slow to import
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes, first = figure.subplots(), next(iter(results.values()))
    is_success = "kl_lower_bound" in first
    for kind, line, fill in (("proxy", "--", "none"), ("gold", "-", "full")):
        curve = []
        for i, (name, row) in enumerate(results.items()):
            kl = max(0.0, row.get("kl", row.get("kl_upper_bound", 0.0)))  # of the reference: 0
            x = kl if is_success else math.sqrt(kl)
            if kind in row and "kl_upper_bound" in row:
                curve.append((x, row[kind]))
            elif kind in row:
                axes.errorbar(x, row[kind], row.get(f"{kind}_stderr"), fmt="o", fillstyle=fill,
                              color=f"C{i}", zorder=3, label=f"{kind} of {name}")
        if curve:
            axes.plot(*zip(*curve, strict=True), f".{line}", color="gray",
                      label=f"{kind} of best of n")
    if is_success:
        p0 = first.get("gold", first["proxy"])
        p = torch.linspace(p0, 1, 200, dtype=torch.float64)
        axes.plot(binary_kl(p, p.new_tensor(p0)), p, "k", linewidth=0.8, label="least possible KL")
    axes.set(xlabel="KL to the reference, nats" if is_success else "sqrt(KL to the reference)",
             ylabel="success rate" if is_success else "reward")
    for text in axes.legend().texts:
        text.set_parse_math(False)  # $ is only a character
    with atomic_write(image) as file:
        figure.savefig(file, format="png")


def main() -> None:
    config = parse_config(JudgeConfig, description=__doc__)
    if not config.policies:
        raise UserError("no checkpoint given: python judge.py out/finetune out/rlhf")
    if config.best_of and (config.temperature != 1 or not (config.proxy or config.gold)):
        raise UserError(f"--best-of {config.best_of} needs --proxy, the reward to choose by, and "
                        "--temperature 1, at which its KL is known")
    check_folder(Path(config.out_dir), f"--out-dir {config.out_dir}")
    with launched(config.device) as launch:
        if config.temperature != 1 and len(config.policies) > 1:
            launch.print0(f"--temperature {config.temperature}: no KL, which is defined at 1")
        judge(config, launch)


if __name__ == "__main__":
    run_main(main)
