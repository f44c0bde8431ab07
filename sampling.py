"""Batched sampling from a GPT: prefill the prompts, decode one token at a time, generate.

A batch is right-padded: `input_ids` (B, T) int64 with 0 after the end of a prompt, and
`attention_masks` (B, T) int64 with 1 on real tokens. Causal attention makes that exact without a
padding mask: no real token has a pad to its left. Each row then goes on at its own length, over
the slots that its pads held.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from config import UserError
from model import GPT, KVCache
from tokenizer import EOT_TOKEN, N_VOCAB, decode, encode

PAD_TOKEN = 0  # what a padded place holds; only its mask says that it is padding


def tokenize_batch_input(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts -> input_ids and attention_masks, each (B, T) int64, T the longest prompt's tokens.

    Raises UserError for no prompt at all and for an empty one: there is nothing to continue.
    """
    rows = [encode(prompt) for prompt in prompts]
    if not rows:
        raise UserError("no prompt given")
    if [] in rows:
        raise UserError(f"prompt {rows.index([]) + 1} of {len(rows)} is empty")
    input_ids = torch.full((len(rows), max(map(len, rows))), PAD_TOKEN)  # (B, T)
    attention_masks = torch.zeros_like(input_ids)  # (B, T)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row)
        attention_masks[i, : len(row)] = 1
    return input_ids, attention_masks


def check_vocabulary(model: GPT, checkpoint: str) -> None:
    """Raises UserError for a model that lacks ids of GPT-2's encoding. More ids (an added pad, say)
    do no harm: they are never sampled."""
    if model.config.vocab_size < N_VOCAB:
        raise UserError(f"--checkpoint {checkpoint} has {model.config.vocab_size} ids, GPT-2's "
                        f"encoding has {N_VOCAB}: it was trained with another tokenizer")


@torch.no_grad()
def generate(model: GPT, input_ids: torch.Tensor, attention_masks: torch.Tensor,
             temperature: float, max_steps: int, *, seed: int = 0,
             ) -> tuple[torch.Tensor, torch.Tensor]:
    """Continues every row until it has emitted <|endoftext|>, or max_steps tokens, or the context
    is full. Returns (output_ids, output_masks), (B, T') int64 on the model's device, in the same
    right-padded layout: prompt, new tokens with <|endoftext|> if it came, then pads with mask 0.

    Temperature 0 takes the likeliest token. Otherwise a row draws from a random stream of its own,
    seeded by `seed` and its prompt, so that its text is the same whatever else is in the batch (a
    prompt given twice gets two streams). Raises UserError for a prompt without room to grow.
    """
    check_batch(model, input_ids, attention_masks, temperature, max_steps, seed)
    device, block_size = model.lm_head.weight.device, model.config.block_size
    lengths = attention_masks.sum(1).to(device)  # (B,)
    B, T = len(input_ids), int(lengths.max())
    total = min(T + max_steps, block_size)
    output_ids = torch.full((B, total), PAD_TOKEN, device=device)  # (B, total)
    output_ids[:, :T] = (input_ids * attention_masks)[:, :T]
    if max_steps == 0:
        return output_ids, attention_masks[:, :T].to(device)

    max_steps = min(max_steps, total - int(lengths.min()))  # no row has room for more
    uniforms = row_uniforms(input_ids, attention_masks, max_steps, seed).to(device)
    cache = KVCache(model.config, B, total, device, model.lm_head.weight.dtype)
    rows = torch.arange(B, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    logits = prefill(model, output_ids[:, :T], lengths, cache)  # (B, V)
    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite: its training has diverged; use an "
                        "earlier checkpoint")
    for step in range(max_steps):
        token = sample(logits, temperature, uniforms[:, step])  # (B,)
        place = lengths.clamp(max=total - 1)  # where a full row points does not matter
        output_ids[rows, place] = torch.where(finished, output_ids[rows, place], token)
        lengths = lengths + ~finished
        finished = finished | (token == EOT_TOKEN) | (lengths >= block_size)
        if step == max_steps - 1 or finished.all():
            break
        logits = decode_one_token(model, token, lengths - 1, cache)  # (B, V)
    T = int(lengths.max())
    masks = torch.arange(T, device=device) < lengths[:, None]  # (B, T')
    return output_ids[:, :T], masks.long()


def check_batch(model: GPT, input_ids, attention_masks, temperature: float, max_steps: int,
                seed: int) -> None:
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}, expected 0 (the likeliest token) or above")
    if max_steps < 0 or seed < 0:
        raise UserError(f"max_steps {max_steps} and seed {seed} must be 0 or above")
    if input_ids.dim() != 2 or input_ids.shape != attention_masks.shape or not len(input_ids):
        raise UserError(f"input_ids {tuple(input_ids.shape)} and attention_masks "
                        f"{tuple(attention_masks.shape)} must both be (B, T) with B at least 1")
    lengths = attention_masks.sum(1)  # (B,)
    right_padded = torch.arange(input_ids.size(1), device=lengths.device) < lengths[:, None]
    if not torch.equal(attention_masks.bool(), right_padded) or lengths.min() < 1:
        raise UserError("every row of attention_masks must be ones, at least one, and then zeros")
    longest, block_size = int(lengths.max()), model.config.block_size
    if longest >= block_size:
        raise UserError(f"prompt {int(lengths.argmax()) + 1} of {len(lengths)} has {longest} "
                        f"tokens; the context is {block_size} and must hold the answer too: "
                        "shorten it")


def prefill(model: GPT, input_ids: torch.Tensor, lengths: torch.Tensor,
            cache: KVCache) -> torch.Tensor:
    """Runs the prompts (B, T) through the model, filling cache slots 0 .. T - 1; returns the
    logits (B, V) of the token after each row's last."""
    B, T = input_ids.shape
    positions = torch.arange(T, device=input_ids.device).expand(B, T)  # (B, T)
    x = model.hidden_states(input_ids, positions, cache)  # (B, T, C)
    last = x[torch.arange(B, device=x.device), lengths - 1]  # (B, C)
    return model.lm_head(last)


def decode_one_token(model: GPT, token: torch.Tensor, position: torch.Tensor,
                     cache: KVCache) -> torch.Tensor:
    """Feeds one token (B,) a row at its position (B,); returns the logits (B, V) of the next."""
    x = model.hidden_states(token[:, None], position[:, None], cache)  # (B, 1, C)
    return model.lm_head(x[:, 0])


def sample(logits: torch.Tensor, temperature: float, uniform: torch.Tensor) -> torch.Tensor:
    """One token a row (B,) from logits (B, V), by inverting the distribution function at `uniform`
    (B,). Ids that the tokenizer does not have (a padded vocabulary) are never drawn."""
    logits = logits[:, :N_VOCAB].float()
    if temperature == 0:
        return logits.argmax(-1)
    # the likeliest logit becomes 0, so that no temperature, however small, overflows
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)  # (B, V)
    cumulative = probs.cumsum(-1)  # (B, V)
    # strictly below the total, so that the token found has a probability above zero
    threshold = uniform[:, None].clamp(max=1 - 2**-20) * cumulative[:, -1:]  # (B, 1)
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


def row_uniforms(input_ids: torch.Tensor, attention_masks: torch.Tensor, max_steps: int,
                 seed: int) -> torch.Tensor:
    """The draws of every row in [0, 1), (B, max_steps) fp32: a function of the seed, the row's
    prompt, and how often that prompt came before in the batch."""
    seen: Counter[bytes] = Counter()
    draws = []
    for ids, mask in zip(input_ids.cpu(), attention_masks.cpu(), strict=True):
        prompt = ids[mask.bool()].numpy().astype(np.int64).tobytes()
        digest = hashlib.sha256(prompt).digest()
        key = [seed, seen[prompt], *np.frombuffer(digest, dtype="<u4").tolist()]
        seen[prompt] += 1
        bits = np.random.MT19937(np.random.SeedSequence(key))
        draws.append(np.random.RandomState(bits).random_sample(max_steps))
    return torch.from_numpy(np.stack(draws)).float()


def decode_generation(output_ids: torch.Tensor, output_masks: torch.Tensor,
                      prompt_masks: torch.Tensor | None = None) -> list[str]:
    """The text of every row of `generate`'s result, without padding and without <|endoftext|>;
    given the prompts' attention_masks, only what was generated."""
    texts = []
    skips = [0] * len(output_ids) if prompt_masks is None else prompt_masks.sum(1).tolist()
    for ids, mask, skip in zip(output_ids, output_masks, skips, strict=True):
        new = ids[mask.bool()][skip:].tolist()
        texts.append(decode(new[:-1] if new and new[-1] == EOT_TOKEN else new))
    return texts
