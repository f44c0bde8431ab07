"""Speed of `rlhf.py --advantage group` against TRL's GRPOTrainer, on a CPU in float32.

    python tests/referees/bench_grpo.py --log bench_grpo.jsonl
    python tests/referees/bench_grpo.py --checkpoint out/finetune --data pairs.jsonl

Both sample --group-size responses to the same prompts in the same order, score them with the same
function, compute the KL to the reference, and take one optimizer step per batch. Random weights
practically never end a response early; the tokens are counted nevertheless, and seconds per token
are what is compared.
"""

import pathlib
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from against_trl import (
    MODEL,
    ROWS,
    AgainstTRLConfig,
    Trial,
    our_trial,
    run_in_turn,
    trl_trial,
    write_folder,
)

import rlhf
from bench.harness import run_bench
from dataloader import load_prompts
from minigpt2.checkpoint import load_model
from minigpt2.config import UserError, flag
from minigpt2.distributed import start
from minigpt2.rewards import built_in
from minigpt2.tokenizer import EOT_TOKEN, format_prompt

WORDS = "20"  # the reward: the response ends and has at most so many words


@dataclass(frozen=True)
class BenchGRPOConfig(AgainstTRLConfig):
    prompts: int = flag(4, "prompts per step", minimum=1)
    group_size: int = flag(8, "responses per prompt", minimum=2)
    max_tokens: int = flag(64, "tokens of a response", minimum=1)
    steps: int = flag(2, "steps of a run", minimum=1)
    micro_batch_size: int = flag(16, "responses per micro-step", minimum=1)
    kl_coef: float = flag(0.05, "weight of the KL", minimum=0)

    @property
    def batch_size(self) -> int:
        return self.prompts * self.group_size


def make_trial(system: str, config: BenchGRPOConfig, folder: pathlib.Path) -> Trial:
    """In a worker process: the call that trains for --steps steps."""
    torch.set_num_threads(config.threads)
    settings = rlhf.RLHFConfig(
        checkpoint=str(folder / MODEL), prompts=str(folder / ROWS), advantage="group",
        reward=f"function:at_most_words={WORDS}", max_steps=config.steps,
        batch_size=config.batch_size, group_size=config.group_size, epochs=1, minibatches=1,
        micro_batch_size=config.micro_batch_size, max_tokens=config.max_tokens, max_lr=1e-6,
        kl_coef=config.kl_coef, warmup_fraction=0.0, val_fraction=0.0, eval_rows=1, device="cpu")
    return (ours if system == "ours" else trls)(config, settings, folder)


def ours(config: BenchGRPOConfig, settings: rlhf.RLHFConfig, folder: pathlib.Path) -> Trial:
    launch = start("cpu")

    def trial() -> dict[str, float]:
        figures, log = our_trial(lambda out: rlhf.train(replace(settings, out_dir=out), launch),
                                 folder)
        split = {key: statistics.mean(step[key] for step in log)
                 for key in ("rollout_seconds", "score_seconds", "update_seconds")}
        return counted(figures, config, [step["response_tokens"] for step in log]) | split
    return trial


def trls(config: BenchGRPOConfig, settings: rlhf.RLHFConfig, folder: pathlib.Path) -> Trial:
    import trl
    is_short = built_in("at_most_words", WORDS)

    def score(completions: list[str], completion_ids: list[list[int]], **_) -> list[float]:
        return [float(ids[-1] == EOT_TOKEN and is_short({}, text))
                for text, ids in zip(completions, completion_ids, strict=True)]

    rows = [{"prompt": text} for text in trained_prompts(config, settings)]

    def trial() -> dict[str, float]:
        figures, log = trl_trial(
            trl.GRPOTrainer, trl.GRPOConfig, folder, rows, max_steps=config.steps,
            micro_batch_size=config.micro_batch_size, num_iterations=1, temperature=1.0,
            gradient_accumulation_steps=config.batch_size // config.micro_batch_size,
            num_generations=config.group_size, max_completion_length=config.max_tokens,
            beta=config.kl_coef, scale_rewards="none", shuffle_dataset=False,
            trainer_options={"reward_funcs": score})
        return counted(figures, config, [step["completions/mean_length"] for step in log])
    return trial


def counted(figures: dict[str, float], config: BenchGRPOConfig,
            lengths: list[float]) -> dict[str, float]:
    """Adds what a run of steps with these mean lengths of responses, in tokens, has generated."""
    tokens = round(sum(lengths) * config.batch_size)
    return figures | {"seconds_per_update": figures["seconds"] / config.steps, "tokens": tokens}


def trained_prompts(config: BenchGRPOConfig, settings: rlhf.RLHFConfig) -> list[str]:
    """The texts of the prompts of all steps, in rlhf.py's order, each once."""
    block_size = load_model(settings.checkpoint).config.block_size
    trained, *_ = load_prompts(settings.prompts, "--prompts", block_size, settings.max_tokens, 0.0)
    return [format_prompt(prompt.instruction, prompt.input) for step in range(config.steps)
            for prompt in rlhf.step_prompts(trained, settings, step)[:: config.group_size]]


def bench_grpo(config: BenchGRPOConfig) -> None:
    if config.batch_size % config.micro_batch_size:
        raise UserError(f"--micro-batch-size {config.micro_batch_size} does not divide the "
                        f"{config.batch_size} responses of a step, which TRL needs: lower it")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model = write_folder(config, folder, config.prompts * config.steps + 1)
        run_in_turn(config, "grpo", folder, model, make_trial, "tokens")


if __name__ == "__main__":
    run_bench(bench_grpo, BenchGRPOConfig, __doc__)
