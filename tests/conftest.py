"""Fixtures for every test file; functions that several of them share are in helpers/."""

from pathlib import Path

import pytest
import torch
from helpers.common import TINY, make_corpus

from model import GPT


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def tiny_model() -> GPT:
    torch.manual_seed(0)
    return GPT(TINY).eval()


@pytest.fixture
def corpus(tmp_path) -> Path:
    """700 validation and 3 x about 1000 training tokens: 3 x 62 windows of 16, few enough distinct
    ids to be learnt a little in ten updates."""
    return make_corpus(tmp_path / "data", [700, 1003, 1000, 1001], high=50)
