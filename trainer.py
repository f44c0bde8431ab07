"""Pre-trains a GPT-2 on token shards.

    python trainer.py --data-dir pretrain_data/pydocs --out-dir out/small --n-layer 4 --n-head 4 \\
        --n-embd 128 --block-size 256 --sequence-length 256 --micro-batch-size 8 --max-lr 3e-3 \\
        --total-batch-size 4096 --warmup-steps 20 --max-steps 400 \\
        --eval-interval 100                              # about 9 minutes on two cores
    python trainer.py                                    # one GPU
    torchrun --standalone --nproc-per-node=8 trainer.py  # eight GPUs

The defaults are GPT-2 124M on FineWeb: 2**19 tokens a step, AdamW, one epoch. OUT_DIR gets
checkpoints, metrics.jsonl, samples.jsonl and the loss graph. --resume continues a stopped run.
"""

if __name__ == "__main__":
    from minigpt2.config import share_cores
    share_cores()  # before PyTorch is imported

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from dataloader import TokenLoader, read_rows
from inference import check_sample_prompt, write_sample
from minigpt2.benchmarks import Question, make_questions, multiple_choice, question_figures
from minigpt2.checkpoint import load_model, with_hash
from minigpt2.config import ROOT, UserError, flag
from minigpt2.distributed import Launch, autocast, mean_loss, to_device
from minigpt2.faults import StopRequest
from minigpt2.optimizer import learning_rate, make_optimizer, set_lr
from minigpt2.run import Run, RunConfig, run_training
from minigpt2.shards import read_manifest
from minigpt2.tokenizer import encode
from model import GPT, PRESETS, GPTConfig


@dataclass(frozen=True)
class TrainerConfig(RunConfig):
    data_dir: str = flag(str(ROOT / "pretrain_data" / "fineweb"), "token shards", is_path=True)
    out_dir: str = flag(str(ROOT / "out" / "pretrain"), "checkpoints and logs", is_path=True)
    preset: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = flag("gpt2", "model size")
    n_layer: int | None = flag(None, "layers (default: the preset's)", minimum=1, below=2**16)
    n_head: int | None = flag(None, "heads (default: the preset's)", minimum=1, below=2**16)
    n_embd: int | None = flag(None, "width (default: the preset's)", minimum=1, below=2**20)
    block_size: int | None = flag(None, "context (default: the preset's)", minimum=1, below=2**24)
    dropout: float = flag(0.0, "probability of dropout in training", minimum=0, below=1)
    zero_init: bool = flag(False, "initialize c_proj to 0: every block starts as the identity")
    total_batch_size: int = flag(524_288, "tokens per step, over all ranks", minimum=1)  # 2**19
    micro_batch_size: int | Literal["auto"] = flag(
        32, "sequences per rank and micro-step; auto: the largest that fits", minimum=1)
    sequence_length: int = flag(1024, "tokens per training sequence", minimum=1)
    max_steps: int | None = flag(None, "training steps (default: one epoch)", minimum=1)
    optimizer: Literal["adamw", "muon"] = flag("adamw", "muon: for the matrices of blocks only")
    schedule: Literal["cosine", "linear"] = flag("cosine", "learning-rate decay after the warm-up")
    warmup_steps: int = flag(715, "steps of linear warm-up", minimum=0)
    max_lr: float = flag(6e-4, "learning rate after the warm-up", minimum=0)
    min_lr: float = flag(6e-5, "learning rate after the last step; --max-lr if lower", minimum=0)
    muon_lr: float = flag(6e-3, "Muon's learning rate, on the schedule of AdamW's", minimum=0)
    weight_decay: float = flag(0.1, "weight decay of matrices and embeddings", minimum=0)
    beta1: float = flag(0.9, "AdamW's decay rate of the first moment", minimum=0, below=1)
    beta2: float = flag(0.95, "AdamW's decay rate of the second moment", minimum=0, below=1)
    eps: float = flag(1e-8, "AdamW's epsilon", minimum=1e-20)
    eval_tokens: int = flag(10_485_760, "validation tokens, from the start of the split", minimum=1)
    sample_prompt: str = flag("Hello, I'm a language model,", "prompt to sample", may_be_empty=True)
    sample_tokens: int = flag(32, "tokens per sample; 0: no samples", minimum=0, old="sample_steps")
    hellaswag_interval: int = flag(0, "steps between HellaSwag scores; 0: none", minimum=0)
    hellaswag: str = flag(str(ROOT / "eval_data" / "hellaswag_val.parquet"),
                          "rows of HellaSwag, see evaluate.py --download", is_path=True)


# A resumed run may change neither model, optimizer, the windows of a step, nor what is validated
FIXED_ON_RESUME = ("optimizer", "n_layer", "n_head", "n_embd", "block_size", "total_batch_size",
                   "sequence_length", "seed", "data_sha256", "eval_tokens")


def model_config(config: TrainerConfig) -> GPTConfig:
    """The preset, with the sizes given on the command line. Raises UserError if they do not fit."""
    names = ("n_layer", "n_head", "n_embd", "block_size", "dropout")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    try:
        sizes = replace(PRESETS[config.preset], **given)
    except ValueError as error:
        raise UserError(f"{error}: change --n-embd or --n-head") from None
    if config.sequence_length > sizes.block_size:
        raise UserError(f"--sequence-length {config.sequence_length} is longer than --block-size "
                        f"{sizes.block_size}: lower it or raise --block-size")
    return sizes


def new_model(config: TrainerConfig, sizes: GPTConfig, device: torch.device) -> GPT:
    """Initialized on the CPU: the same weights on every device and rank."""
    torch.manual_seed(config.seed)
    model = GPT(sizes)
    for block in model.transformer.h if config.zero_init else ():
        torch.nn.init.zeros_(block.attn.c_proj.weight)
        torch.nn.init.zeros_(block.mlp.c_proj.weight)
    return model.to(device)


def optimizer_for(model: GPT, config: TrainerConfig, shard: bool) -> torch.optim.Optimizer:
    """Raises UserError for learning rates that the chosen optimizer cannot use."""
    if config.optimizer != "muon" and config.muon_lr != TrainerConfig.muon_lr:
        raise UserError("--muon-lr needs --optimizer muon: add that, or leave --muon-lr out")
    if config.optimizer == "muon" and config.max_lr == 0:
        raise UserError("--max-lr is 0, expected a positive number: with --optimizer muon, the "
                        "schedule scales --muon-lr by lr / --max-lr")
    return make_optimizer(model, lr=config.max_lr, betas=(config.beta1, config.beta2),
                          eps=config.eps, weight_decay=config.weight_decay,
                          kind=config.optimizer, muon_lr=config.muon_lr, shard=shard)


def micro_batch_sizes(config: TrainerConfig, launch: Launch) -> list[int]:
    """The micro-batches to choose from, largest first: the one given, or with "auto" the divisors,
    up to 128, of a rank's share of a step. Raises UserError if they do not divide it evenly."""
    B = 1 if config.micro_batch_size == "auto" else config.micro_batch_size
    T, total = config.sequence_length, config.total_batch_size
    per_micro_step = B * T * launch.world_size  # tokens
    if total % per_micro_step:
        nearest = max(1, round(total / per_micro_step)) * per_micro_step
        raise UserError(f"--total-batch-size {total} does not divide into micro-steps of {B} x {T} "
                        f"x {launch.world_size} ranks = {per_micro_step} tokens: change "
                        f"--micro-batch-size, or use --total-batch-size {nearest}")
    if config.micro_batch_size != "auto":
        return [B]
    share = total // per_micro_step  # windows
    return [size for size in range(min(share, 128), 0, -1) if share % size == 0]


def read_hellaswag(config: TrainerConfig, block_size: int) -> list[Question]:
    """The rows to score; none without --hellaswag-interval. Raises UserError."""
    if config.hellaswag_interval:
        path = Path(config.hellaswag)
        rows = read_rows(path, "python evaluate.py --download")
        return make_questions(path, rows, multiple_choice, block_size)
    if config.hellaswag != TrainerConfig.hellaswag:
        raise UserError("--hellaswag needs --hellaswag-interval: add that, or leave it out")
    return []


def train(config: TrainerConfig, launch: Launch, stop: StopRequest | None = None) -> GPT:
    """Pre-trains to the last step, or until a signal; returns the final model."""
    device, T = launch.device, config.sequence_length

    # 1. The data, the number of steps, and the checkpoint to resume from
    sizes = model_config(config)
    candidates = micro_batch_sizes(config, launch)
    questions = read_hellaswag(config, sizes.block_size)
    sample_prompt = encode(config.sample_prompt)
    check_sample_prompt(sample_prompt, config, sizes.block_size)
    run = Run(config, launch, stop, label="pre-training", graph="pretrain_loss.png",
              data=read_manifest(Path(config.data_dir)), fixed=FIXED_ON_RESUME,
              hellaswag_sha256=with_hash(repr(questions))["sha256"], **asdict(sizes))
    train_loader, val_loader = (TokenLoader(
        Path(config.data_dir), split, sequence_length=T, micro_batch_size=1,  # chosen below
        total_batch_size=config.total_batch_size, vocab_size=sizes.vocab_size, seed=config.seed,
        rank=launch.rank, world_size=launch.world_size) for split in ("train", "val"))
    max_steps = config.max_steps or train_loader.windows_per_epoch // train_loader.windows_per_step
    if max_steps == 0:  # windows of an epoch that do not fill a step are left over
        raise UserError(f"one epoch of {config.data_dir} has {train_loader.windows_per_epoch:,} "
                        f"windows of {T} tokens, fewer than one step: lower --total-batch-size or "
                        "give --max-steps")
    if config.warmup_steps > max_steps:
        launch.print0(f"the warm-up of {config.warmup_steps} steps is longer than the run of "
                      f"{max_steps}: --max-lr will not be reached")

    # 2. The model and its optimizer
    raw_model = (load_model(run.checkpoint, device, dropout=config.dropout) if run.is_resumed else
                 new_model(config, sizes, device))
    optimizer = optimizer_for(raw_model, config, run.shard_optimizer)
    model = run.prepare(raw_model, optimizer, max_steps, micro_batch_sizes=candidates,
                        sequence_length=T)
    B = train_loader.micro_batch_size = val_loader.micro_batch_size = run.micro_batch_size
    grad_accum_steps = train_loader.windows_per_step // (B * launch.world_size)
    launch.print0(f"{run.summary}; {max_steps:,} steps of {config.total_batch_size:,} tokens = "
                  f"{grad_accum_steps} micro-steps x {B} x {T} x {launch.world_size} ranks")

    # 3. The loop
    with run:
        batches = train_loader.stream(run.step, grad_accum_steps, lambda x: to_device(x, device))
        while True:
            if run.eval_due():
                val_loss = mean_loss(raw_model, val_loader.eval_batches(config.eval_tokens), launch,
                                     run.dtype, run.stop.requested)
                if run.log_validation(val_loss) and config.sample_tokens and launch.is_master:
                    run.bar.write(write_sample(raw_model, sample_prompt, run))
            if run.is_due("scoring", config.hellaswag_interval):
                run.log_figures("hellaswag", question_figures(
                    raw_model, questions, launch, run.dtype, should_stop=run.stop.requested))
            if run.save_or_finish():
                break

            lr = learning_rate(
                run.step, schedule=config.schedule, warmup_steps=config.warmup_steps,
                max_steps=max_steps, max_lr=config.max_lr, min_lr=min(config.min_lr, config.max_lr))
            set_lr(optimizer, lr)
            loss_sum = torch.zeros((), device=device)
            for _ in run.micro_steps(range(grad_accum_steps)):
                inputs, targets = next(batches)  # (B, T) each
                with autocast(device, run.dtype):
                    _, loss = model(inputs, targets, reduction="sum", return_logits=False)
                # Mean over the global batch; DDP averages over ranks, hence world_size
                loss = loss * (launch.world_size / config.total_batch_size)
                run.scaler.scale(loss).backward()
                loss_sum += loss.detach()
            run.finish_step(loss_sum, lr=lr, tokens=config.total_batch_size, sequence_length=T)
    return raw_model.eval()


if __name__ == "__main__":
    run_training(TrainerConfig, train, __doc__)
