"""Models whose greedy token is never a near tie, prompts for them, and rows of their output."""

import torch

from helpers.common import TINY
from inference import generate
from minigpt2.sampling import SamplingParams, sample, seen_tokens, stream_keys
from minigpt2.tokenizer import EOT_TOKEN, N_VOCAB
from model import GPT, GPTConfig

PROMPTS = ["The quick brown fox", "Hello", "It was the best of times, it was the worst of times"]
LONG = GPTConfig(block_size=1024, vocab_size=50257, n_layer=2, n_head=2, n_embd=16)
# 50 times as fast as LONG; for tests without text
SMALL_VOCAB = GPTConfig(block_size=1024, vocab_size=512, n_layer=2, n_head=2, n_embd=16)
SAMPLING_OPTIONS = [{"temperature": 0.0}, {"temperature": 1.0},
                    {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2}]


def sharp_model(config: GPTConfig = TINY, seed: int = 0) -> GPT:
    """A model with weights so large that its most likely token leads by far more than rounding."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(20)
    return model


def run_generate(model, ids, masks, max_steps: int, *, temperature: float = 0.0, **options):
    """`generate`, greedy by default, with the temperature among the options."""
    return generate(model, ids, masks, temperature, max_steps, **options)


@torch.no_grad()
def generate_simply(model, prompt: list[int], max_steps: int, *, seed: int = 0,
                    **params) -> list[int]:
    """`generate` of one row without batch and cache: the whole row goes through the model for each
    token."""
    row, key = list(prompt), stream_keys([tuple(prompt)], [seed])
    for count in range(min(max_steps, model.config.block_size - len(prompt))):
        ids = torch.tensor([row])
        seen = seen_tokens(ids, torch.tensor([len(row)]), model.config.vocab_size)
        row += sample(model(ids)[0][:, -1], SamplingParams(**params), key, torch.tensor(count),
                      seen).tolist()
        if row[-1] == EOT_TOKEN:
            break
    return row


def rows_of(output, masks) -> list[list[int]]:
    """The token ids of each row, without padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(output, masks, strict=True)]


def random_batch(lengths: list[int], seed: int, vocab_size: int = N_VOCAB - 1,
                 ) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of random ids, with random ids in the padding, and three columns of only padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) + 3)
    ids = torch.randint(0, vocab_size, shape, generator=generator)
    masks = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    return ids, masks
