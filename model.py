"""GPT-2, exactly as OpenAI released it.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". The reference for every
number is Hugging Face's `GPT2LMHeadModel`, which loads OpenAI's weights (parity is tested).
Pre-norm blocks, learned positions, a final LayerNorm, an output head tied to the token embedding.

Shapes: B batch, T sequence, C n_embd, H n_head, D head_dim = C / H, V vocab_size,
S cache slots, N = B * T rows of the flattened batch.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from minigpt2.loss import IGNORE_INDEX, linear_cross_entropy

INIT_STD = 0.02
EAGER_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class GPTConfig:
    """The five sizes of a GPT-2, by default of the 124M model, and its dropout in training."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50257  # 256 bytes + 50,000 merges + <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    # 0, not the 0.1 of GPT-2: one epoch does not overfit. Not in repr, which weights_sha256 hashes
    dropout: float = field(default=0.0, repr=False)

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 <= value < 1 if name == "dropout" else type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a positive integer (dropout: less "
                                 "than 1)")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


PRESETS = {  # OpenAI's four sizes, under their hub names
    "gpt2": GPTConfig(),  # 124M parameters
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}


def attention(q, k, v, **options) -> torch.Tensor:
    """Scaled dot-product attention, without cuDNN unless compiled. For every new shape, cuDNN
    plans for up to a second; and its masked kernels have given wrong text (pytorch#193893). For a
    single query, a CPU computes the products three times as fast as the fused kernel."""
    if not q.is_cuda and q.size(2) == 1 and "attn_mask" in options:
        scores = (q @ k.mT).mul_(q.size(-1) ** -0.5).add_(options["attn_mask"])  # (B, H, 1, span)
        return scores.softmax(-1) @ v
    if torch.compiler.is_compiling() or not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, **options)
    with sdpa_kernel(EAGER_BACKENDS):
        return F.scaled_dot_product_attention(q, k, v, **options)


def dropout(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """Applies the `dropout` of a module in training mode."""
    return F.dropout(x, module.dropout) if module.training and module.dropout else x


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.n_head, self.head_dim = config.n_head, config.head_dim
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, slots=None, attn_mask=None):
        """x (B, T, C) -> (B, T, C). To decode one token per row: T = 1, with `inference.KVCache`,
        its `slots` (B, 2, H) and its `attn_mask` (B, 1, 1, span) of the tokens' positions."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, self.head_dim)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, H, T, D)
        if cache is not None:
            cache.write(self.layer, qkv[:, :, 1:], slots)
        if attn_mask is None:  # training, or prefill of a prompt
            y = attention(q, k, v, is_causal=True,
                          dropout_p=self.dropout if self.training else 0.0)  # (B, H, T, D)
        else:  # one new token per row attends to the row's cache
            k, v = cache.read(self.layer)  # (B, H, span, D)
            y = attention(q.to(k.dtype), k, v, attn_mask=attn_mask).to(q.dtype)  # (B, H, 1, D)
        return dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)), self)  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")), self)  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, slots=None, attn_mask=None):
        x = x + self.attn(self.ln_1(x), cache, slots, attn_mask)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 with a language-modeling head; parameters are named as in the released weights."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, self.dropout = config, config.dropout
        self.checkpoint_activations = False  # less memory, a third more computation
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd, eps=1e-5)})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """N(0, 0.02), biases 0. The 2 n_layer projections into the residual stream are scaled by
        1/sqrt(2 n_layer), so that its variance does not grow with depth (section 2.3)."""
        for name, parameter in self.named_parameters():  # a tied weight occurs once
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:  # LayerNorm
                parameter.fill_(1.0)
            else:
                depth = 2 * self.config.n_layer if name.endswith("c_proj.weight") else 1
                parameter.normal_(std=INIT_STD / math.sqrt(depth))

    def num_parameters(self) -> int:
        """124,439,808 for the default config; the tied head is counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, sequence_length: int) -> int:
        """The FLOPs per token of forward and backward as in PaLM (Chowdhery et al. 2022, appendix
        B): 6 per parameter outside wpe, plus 12 n_layer C T for attention, not halved for
        causality. GPT-2 124M at T = 1024: 6 x 123,653,376 + 12 x 12 x 768 x 1024 = 855,166,464."""
        num_parameters = self.num_parameters() - self.transformer.wpe.weight.numel()
        return 6 * num_parameters + 12 * self.config.n_layer * self.config.n_embd * sequence_length

    def hidden_states(self, idx: torch.Tensor, cache=None,
                      positions: torch.Tensor | None = None) -> torch.Tensor:
        """The hidden states below the head: idx (B, T) int64 -> (B, T, C). With an
        `inference.KVCache`, idx holds prompts, whose keys and values fill slots 0 .. T - 1; with
        `positions` (B, 1) too, one new token per row. Raises ValueError past block_size."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"sequence of {T} tokens, block_size is {self.config.block_size}")
        position_ids = torch.arange(T, device=idx.device) if positions is None else positions
        x = dropout(self.transformer.wte(idx) + self.transformer.wpe(position_ids), self)
        slots, attn_mask = (None, None) if positions is None else cache.locate(positions)
        recompute = self.checkpoint_activations and torch.is_grad_enabled() and cache is None
        same_masks = self.training and self.dropout > 0  # of dropout, when recomputed
        for block in self.transformer.h:
            x = (checkpoint(block, x, use_reentrant=False, preserve_rng_state=same_masks)
                 if recompute else block(x, cache, slots, attn_mask))
        return self.transformer.ln_f(x)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None, *,
                reduction: str = "mean", return_logits: bool = True):
        """idx (B, T) int64, targets (B, T) int64 -> (logits (B, T, V), loss ()).

        `targets[b, t]` is the token that follows `idx[b, t]`, or IGNORE_INDEX. The loss is the mean
        cross-entropy in nats over valid targets, 0 if there are none; without `targets`, None.
        `reduction="sum"` is for callers that divide by a global count; "none" gives the loss of
        each target, (B, T), 0 where there is none. For training, `return_logits=False` returns
        (None, loss), computed without holding all logits. Raises ValueError past block_size."""
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction is {reduction!r}, expected 'mean', 'sum' or 'none'")
        x = self.hidden_states(idx)  # (B, T, C)
        if targets is None:
            return self.lm_head(x), None
        logits = self.lm_head(x) if return_logits else None  # (B, T, V)
        kind = "none" if reduction == "none" else "sum"
        if return_logits:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                                   ignore_index=IGNORE_INDEX, reduction=kind)
        else:
            head = self.lm_head  # (V, C)
            head = head if head.weight.dtype == torch.int8 else head.weight
            loss = linear_cross_entropy(x.flatten(0, 1), head, targets.flatten(), kind)
        if reduction == "none":
            loss = loss.view(targets.shape)  # (B, T)
        elif reduction == "mean":
            loss = loss / (targets != IGNORE_INDEX).sum().clamp(min=1)
        return logits, loss
