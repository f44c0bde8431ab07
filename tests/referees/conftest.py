"""The checkpoint that all referees read: REFEREE_CHECKPOINT, or a small trained model."""

import os
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from minigpt2.checkpoint import find_checkpoint, save_checkpoint
from minigpt2.loss import IGNORE_INDEX
from minigpt2.optimizer import make_optimizer
from minigpt2.tokenizer import EOT_TOKEN, encode
from model import GPT, GPTConfig

TEXTS = ["Once upon a time an old king lived in a small house by the river, with his seven cats.",
         "A list is an ordered collection of values; append adds one at its end.",
         "Dogs bark.",
         "Trees sang to the apples under them until the wind came over the hills, and then, as "
         "nobody listened any more, they sang to the wind.",
         "Maximiliana, in 1984, at the café: naïve, quick and over the moon."]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """Trained on five texts until it knows them: its greedy tokens lead clearly, and all other
    tokens have probabilities of every size, as in a large model."""
    if given := os.environ.get("REFEREE_CHECKPOINT"):
        return find_checkpoint(given)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, n_layer=2, n_head=2, n_embd=32))
    optimizer = make_optimizer(model, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    rows = [torch.tensor([*encode(text), EOT_TOKEN]) for text in TEXTS]
    tokens = pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX)  # (B, T + 1)
    for _ in range(40):
        model(tokens[:, :-1].clamp(min=0), tokens[:, 1:], return_logits=False)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), 1, model)
