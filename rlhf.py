"""Policy optimization of a fine-tuned checkpoint against a reward: PPO (`--advantage gae`) or
group-relative advantages (`--advantage group`), both with the KL to the checkpoint in the reward.

    python rlhf.py --checkpoint out/finetune --reward out/reward --prompts finetune_data/alpaca.json
    python rlhf.py --reward function:at_most_words=20 --advantage group     # no reward model needed
    torchrun --standalone --nproc-per-node=8 rlhf.py --reward my_rewards.py:score

Every step samples responses to some prompts, scores them, and trains on them for --epochs:
stages 1 to 6 below; docs/alignment.md has their formulas and sources. Like every training script,
it saves, stops on signals, and continues with --resume.
"""

if __name__ == "__main__":
    from minigpt2.config import share_cores
    share_cores()  # before PyTorch is imported

import copy
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np
import torch
import torch.nn as nn

from dataloader import Prompt, load_prompts, permutation
from inference import load_gpt2, sample_responses
from minigpt2 import advantages as A
from minigpt2.checkpoint import shared_template, weights_sha256
from minigpt2.config import ROOT, UserError, flag, flag_name
from minigpt2.distributed import Launch, autocast, share_rows, to_device
from minigpt2.faults import StopRequest
from minigpt2.files import sha256_of
from minigpt2.kernels import prepare_to_sample
from minigpt2.loss import IGNORE_INDEX
from minigpt2.metrics import RunLog
from minigpt2.optimizer import set_lr
from minigpt2.preferences import rank_share
from minigpt2.rewards import Reward, RewardModel, response_batch
from minigpt2.run import Run, TuningConfig, run_training
from minigpt2.sampling import Response
from minigpt2.tokenizer import decode
from model import GPT

SAMPLES, SHOWN = "rollouts.jsonl", 8  # held-out prompts and responses, after every validation


@dataclass(frozen=True)
class RLHFConfig(TuningConfig):
    checkpoint: str = flag(str(ROOT / "out" / "finetune"), "fine-tuned model to start from, and "
                           "reference: folder, OUT_DIR of a run, or hub name", is_path=True)
    reward: str = flag(str(ROOT / "out" / "reward"), "reward model, FILE.py:FUNCTION, or function:"
                       "stops, at_most_words=N, contains[=TEXT] or equals[=TEXT]", is_path=True)
    prompts: str = flag(str(ROOT / "finetune_data" / "alpaca.json"), "rows whose prompts are used, "
                        "as for finetune.py, or preference pairs", is_path=True)
    out_dir: str = flag(str(ROOT / "out" / "rlhf"), "checkpoints and logs", is_path=True)
    advantage: Literal["gae", "group"] = flag("gae", "gae: PPO with a value model; group: rewards "
                                                     "relative to other responses to the prompt")
    scale_advantages: bool = flag(False, "divide by the deviation of the group (GRPO)")
    max_steps: int = flag(200, "training steps, each with new responses", minimum=1, old="steps")
    batch_size: int = flag(128, "responses per step, over all ranks", minimum=1)
    group_size: int = flag(8, "responses per prompt", minimum=1)
    epochs: int = flag(2, "passes over the responses of a step", minimum=1)
    minibatches: int = flag(2, "optimizer steps per pass", minimum=1)
    max_tokens: int = flag(64, "longest response, in tokens", minimum=1, old="max_response")
    unstopped_score: float | None = flag(None, "score of a response without an end (default: -1, "
                                         "or 0 of a function)", minimum=-1e9, below=1e9)
    kl_coef: float = flag(0.05, "weight of the KL to the reference", minimum=0)
    kl_target: float = flag(0.0, "adapt the weight to this KL in nats; 0: fixed", minimum=0)
    clip_low: float = flag(0.2, "lower bound of the ratio: 1 - this", minimum=0, below=1)
    clip_high: float = flag(0.2, "upper bound of the ratio: 1 + this", minimum=0)
    value_clip: float = flag(0.2, "largest change of a value that counts; 0: any", minimum=0)
    gae_lambda: float = flag(0.95, "decay of GAE's sum over later tokens", minimum=0, below=1.001)
    value_lr: float = flag(1e-5, "the value model's learning rate, with that schedule", minimum=0)
    eval_rows: int = flag(64, "held-out prompts of a validation", minimum=1)
    eval_interval: int = flag(20, "steps between validations", minimum=1)
    save_interval: int = flag(40, "steps between checkpoints", minimum=1)


# A resumed run may change neither the rewards, nor what a step samples, nor its parts
FIXED_ON_RESUME = ("advantage", "scale_advantages", "max_steps", "batch_size", "group_size", "seed",
                   "epochs", "minibatches", "max_tokens", "unstopped_score", "kl_coef", "kl_target",
                   "columns", "val_fraction", "data_sha256", "reference_sha256", "reward_sha256")


def check_config(config: RLHFConfig) -> None:
    """Raises UserError for settings that do not go together."""
    G, R, in_groups = config.group_size, config.batch_size, config.advantage == "group"
    if not (in_groups or config.max_lr) and config.value_lr:
        raise UserError("--max-lr is 0, whose schedule --value-lr has: raise it, or --value-lr 0")
    if config.kl_target and not config.kl_coef:
        raise UserError("--kl-target adapts --kl-coef, which is 0: give a positive --kl-coef")
    if (G == 1 if in_groups else config.scale_advantages):
        raise UserError(f"--scale-advantages {config.scale_advantages} and --group-size {G} do not "
                        "fit --advantage: group needs groups of at least 2, gae cannot be scaled")
    if R % G or config.minibatches > R or R < 2:
        raise UserError(f"--batch-size {R}: expected at least 2, a multiple of --group-size {G}, "
                        f"and at least --minibatches {config.minibatches}")


class PolicyAndValue(nn.Module):
    """Both models as one module: DDP reduces only the gradients of its own `forward`. They share
    nothing, because a value head trained from scratch would destroy the policy's trunk."""

    def __init__(self, policy: GPT, value: RewardModel | None):
        super().__init__()
        self.policy, self.value = policy, value
        self.block_size = min(m.config.block_size for m in (policy, value) if m is not None)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """inputs, targets (B, T) -> (N, 2) float32, of the N targets in order: log-probabilities,
        and the values of the tokens before them (0 without a value model)."""
        _, losses = self.policy(inputs, targets, reduction="none", return_logits=False)
        values = (torch.zeros_like(losses) if self.value is None else
                  self.value.token_scores(inputs))  # (B, T)
        return torch.stack([-losses, values], -1)[targets != IGNORE_INDEX]


def load_value_model(config: RLHFConfig, reward: Reward, reference: GPT,
                     run: Run) -> RewardModel | None:
    """The value model: at first the reward model's weights, or the policy's, with a head of 0."""
    if config.advantage == "group":
        return None
    value = (RewardModel.from_language_model(copy.deepcopy(reference), 0)
             if reward.model is None else copy.deepcopy(reward.model)).requires_grad_(True)
    nn.init.zeros_(value.score.weight)
    if run.is_resumed:
        value.load_state_dict(run.saved["value"], strict=False)  # lists the tied head once
    return value


@dataclass
class Rollouts:
    """R responses of up to T tokens and what is known of them, on the CPU of every rank."""

    responses: list[Response]
    scores: torch.Tensor  # (R,)
    mask: torch.Tensor  # (R, T) bool
    logprobs: torch.Tensor  # (R, T), 0 outside the mask, as the next two
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    seconds: dict[str, float]

    @property
    def kl(self) -> torch.Tensor:
        """The KL to the reference (R,), in nats: log policy - log reference of the response."""
        return (self.logprobs - self.ref_logprobs).sum(1)

    def figures(self, kl_coef: float) -> dict[str, float]:
        ratios, n = self.ref_logprobs - self.logprobs, self.mask.sum().item()
        return {"score": self.scores.mean().item(), "kl": self.kl.mean().item(),
                "score_std": self.scores.std(correction=0).item(),
                "reward": (self.scores - kl_coef * self.kl).mean().item(),
                "kl_k3": (ratios.exp() - 1 - ratios).sum(1).mean().item(),  # Schulman 2020
                "entropy": -self.logprobs.sum().item() / n,
                "stopped": sum(r.stopped for r in self.responses) / len(self.responses),
                "response_tokens": n / len(self.responses)}


def roll_out(module: PolicyAndValue, reference: GPT, reward: Reward, prompts: list[Prompt],
             stream: tuple[int, ...], config: RLHFConfig, run: Run) -> Rollouts | None:
    """Stages 2 and 3: one response to each of R prompts, sampled from the policy, its score, and
    the log-probabilities and values of its tokens. Row i draws from a random stream of its own,
    (*stream, i), so that ranks and batches change nothing. None after a signal."""
    launch, started, run.pace.doing = run.launch, perf_counter(), "sampling"
    seeds = [int(np.random.SeedSequence([*stream, row]).generate_state(1, np.uint64)[0])
             for row in range(len(prompts))]
    sampler = prepare_to_sample(copy.deepcopy(module.policy), run.dtype)  # faster than the policy
    responses = sample_responses(sampler, [prompt.ids for prompt in prompts], seeds,
                                 config.max_tokens, launch, should_stop=run.stop.requested)
    sampled = perf_counter()
    if responses is None:
        return None
    run.pace.doing = "scoring"
    scores = reward(responses, prompts, launch, run.dtype, 2 * config.micro_batch_size,
                    run.stop.requested)

    def work(batch: list[Response]) -> list[torch.Tensor]:
        inputs, targets = response_batch([(one.prompt, one.tokens) for one in batch],
                                         module.block_size, launch.device)  # (B, T)
        with autocast(launch.device, run.dtype):
            new = module(inputs, targets)  # (N, 2)
            _, losses = reference(inputs, targets, reduction="none", return_logits=False)
        found = torch.cat([new, -losses[targets != IGNORE_INDEX][:, None]], 1).cpu()  # (N, 3)
        return [one.clone() for one in found.split([len(row.tokens) for row in batch])]

    found = share_rows(responses, work, launch, size_of=lambda one: len(one.prompt + one.tokens),
                       batch_size=config.micro_batch_size, should_stop=run.stop.requested)
    if scores is None or found is None:
        return None
    rows = nn.utils.rnn.pad_sequence(found, batch_first=True)
    ends = torch.tensor([len(response.tokens) for response in responses])  # (R,)
    mask = A.response_mask(torch.zeros_like(ends), ends, rows.size(1))  # (R, T)
    logprobs, values, ref_logprobs = rows.unbind(2)
    return Rollouts(responses, scores.float(), mask, logprobs, ref_logprobs, values, {
        "rollout_seconds": sampled - started, "score_seconds": perf_counter() - sampled})


def advantages_and_returns(rollouts: Rollouts, config: RLHFConfig, kl_coef: float,
                           ) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Stage 4: advantages (R, T), the value model's targets (R, T), and figures."""
    mask, log_ratios = rollouts.mask, rollouts.logprobs - rollouts.ref_logprobs
    if config.advantage == "group":
        rewards = rollouts.scores - kl_coef * rollouts.kl  # (R,)
        advantages = A.group_advantages(rewards, config.group_size, config.scale_advantages)
        groups = rollouts.scores.view(-1, config.group_size)
        dead = (groups == groups[:, :1]).all(1).float().mean().item()  # nothing to compare
        return advantages[:, None] * mask, torch.zeros_like(log_ratios), {"dead_groups": dead}
    rewards = A.token_rewards(rollouts.scores, log_ratios, mask, kl_coef)  # (R, T)
    advantages = A.gae(rewards, rollouts.values, mask, config.gae_lambda)
    returns = advantages + rollouts.values
    explained = 1 - (advantages[mask].var() / returns[mask].var().clamp(min=1e-8)).item()
    return A.whiten(advantages, mask), returns, {"explained_variance": explained}


def step_prompts(prompts: list[Prompt], config: RLHFConfig, step: int) -> list[Prompt]:
    """Stage 1: the prompts of a step, each group_size times, from seeded epochs."""
    P, n = config.batch_size // config.group_size, len(prompts)
    chosen = [permutation(n, config.seed, k // n)[k % n] for k in range(step * P, (step + 1) * P)]
    return [prompts[i] for i in chosen for _ in range(config.group_size)]


def optimize(model: nn.Module, rollouts: Rollouts, advantages: torch.Tensor, returns: torch.Tensor,
             config: RLHFConfig, run: Run, lr: float, figures: dict[str, float]) -> None:
    """Stage 5: --epochs passes over the rollouts, one optimizer step per minibatch, whose
    losses are means over its response tokens on all ranks. Logs the step (stage 6)."""
    launch, device, started = run.launch, run.launch.device, perf_counter()
    rows = [(response.prompt, response.tokens) for response in rollouts.responses]
    lengths, R = [len(prompt) + len(tokens) for prompt, tokens in rows], len(rows)
    minibatches = [part.tolist() for epoch in range(config.epochs) for part in np.array_split(
        permutation(R, config.seed, run.step, epoch), config.minibatches)]
    loss = torch.tensor(-figures["reward"], device=device)  # what is maximized, for the log
    run.pace.doing = ""
    for number, minibatch in enumerate(minibatches, 1):
        minibatch.sort(key=lengths.__getitem__)
        num_tokens = rollouts.mask[minibatch].sum().item()
        parts = rank_share(minibatch, config.micro_batch_size, launch.rank, launch.world_size)
        sums = torch.zeros(3, device=device)
        for mine in run.micro_steps(parts):
            inputs, targets = response_batch([rows[i] for i in mine], run.trained.block_size,
                                             device)  # (B, T)
            old, advantage, old_values, target = (  # (N,) each, of N response tokens
                to_device(x[mine][rollouts.mask[mine]], device)
                for x in (rollouts.logprobs, advantages, rollouts.values, returns))
            with autocast(device, run.dtype):
                new, values = model(inputs, targets).unbind(1)  # (N,) each
            losses = [*A.policy_loss(new, old, advantage, config.clip_low, config.clip_high),
                      A.value_loss(values, old_values, target, config.value_clip)]
            losses = torch.stack(losses).sum(1) / num_tokens  # (3,)
            run.scaler.scale((losses[0] + losses[2]) * launch.world_size).backward()
            sums += losses.detach()
        if run.stopping:  # a signal, before the first optimizer step
            return
        named = dict(zip(("policy_loss", "clip_fraction", "value_loss"), sums, strict=True))
        if number < len(minibatches):
            run.update(loss, named.values())
    run.finish_step(loss, lr=lr, tokens=config.epochs * sum(lengths), sums=named,
                    sequence_length=sum(lengths) // R, update_seconds=perf_counter() - started,
                    **figures)


def write_samples(rollouts: Rollouts, run: Run) -> None:
    """Appends the first validation responses to OUT_DIR/rollouts.jsonl."""
    log = RunLog(run.out_dir / SAMPLES, fresh=run.step == 0)
    for i, response in enumerate(rollouts.responses[:SHOWN]):
        log.write(run.step, "sample", prompt=decode(response.prompt),
                  response=decode(response.tokens), score=rollouts.scores[i].item(),
                  kl=rollouts.kl[i].item(), finish_reason=response.finish_reason)
    log.close()


def train(config: RLHFConfig, launch: Launch, stop: StopRequest | None = None) -> GPT:
    """Trains for the given steps, or until a signal; returns the final policy."""
    check_config(config)

    # 1. Prompts, reference, reward, policy and value model
    reference = load_gpt2(config.checkpoint, launch.device).requires_grad_(False)
    reward = Reward(config.reward, "--reward", launch.device, config.unstopped_score)
    block_size = min(model.config.block_size for model in (reference, reward.model) if model)
    template = shared_template(config.checkpoint, *[config.reward] * bool(reward.model))
    train_prompts, val_prompts, summary = load_prompts(config.prompts, "--prompts", block_size,
        config.max_tokens, config.val_fraction, template, config.columns)
    reward.check_rows(train_prompts + val_prompts)
    run = Run(config, launch, stop, label="policy optimization", graph="rlhf_reward.png",
              data={"sha256": sha256_of(Path(config.prompts))}, fixed=FIXED_ON_RESUME,
              loss_name="KL-penalized reward, negative", prompt_template=template,
              reference_sha256=weights_sha256(reference), reward_sha256=reward.sha256)
    prepare_to_sample(copy.deepcopy(reference), run.dtype)  # refuses a dtype before it writes
    policy = (load_gpt2(run.checkpoint, launch.device) if run.is_resumed else
              copy.deepcopy(reference).requires_grad_(True))
    value = load_value_model(config, reward, reference, run)
    optimizer = config.make_optimizer(policy, run.shard_optimizer)
    if value is not None:
        optimizer.add_param_group({"params": list(value.parameters()), "weight_decay": 0.0,
                                   "lr_scale": config.value_lr / (config.max_lr or 1)})
    module = PolicyAndValue(policy, value).train()
    model = run.prepare(policy, optimizer, config.max_steps, trained=module, value=value,
                        micro_batch_sizes=[config.micro_batch_size], sequence_length=block_size)
    kl_coef = config.kl_coef if run.state.kl_coef is None else run.state.kl_coef
    launch.print0(f"{summary}\n{run.summary}; {config.max_steps:,} steps of "
                  f"{config.batch_size} responses, {config.group_size} per prompt")
    for name in ("value_lr", "value_clip", "gae_lambda"):
        if value is None and getattr(config, name) != getattr(RLHFConfig, name):
            launch.print0(f"{flag_name(name)} is ignored: --advantage group has no value model")

    with run:
        while True:
            if run.eval_due():
                rollouts = roll_out(module, reference, reward, val_prompts[: config.eval_rows],
                                    (1, config.seed), config, run)
                figures = rollouts and rollouts.figures(config.kl_coef)
                if run.log_validation(figures and -figures["reward"], **(figures or {})) and (
                        launch.is_master):
                    write_samples(rollouts, run)
            if run.save_or_finish():
                break

            lr = config.lr_at(run.step, config.max_steps)
            set_lr(optimizer, lr)
            prompts = step_prompts(train_prompts, config, run.step)
            rollouts = roll_out(module, reference, reward, prompts, (0, config.seed, run.step),
                                config, run)
            if rollouts is None:
                run.stopping = True
                continue
            advantages, returns, more = advantages_and_returns(rollouts, config, kl_coef)
            figures = rollouts.figures(kl_coef) | more | rollouts.seconds | {"kl_coef": kl_coef}
            optimize(model, rollouts, advantages, returns, config, run, lr, figures)
            if config.kl_target and not run.stopping:
                kl_coef = run.state.kl_coef = A.next_kl_coef(kl_coef, figures["kl"],
                                                             config.kl_target, config.batch_size)
    return policy.eval()


if __name__ == "__main__":
    run_training(RLHFConfig, train, __doc__)
