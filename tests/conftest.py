"""Fixtures of all test files; shared functions are in helpers/."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.common import CPU_LAUNCH, TINY
from helpers.training import tiny, tiny_corpus

from minigpt2.checkpoint import save_checkpoint
from model import GPT
from trainer import train


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_precision():
    """Undoes what `distributed.start` sets for the process: later runs would differ in the last
    bits from earlier ones."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(autouse=True)
def no_rank_survives():
    """Kills the ranks that a failed test left running: they would slow down all later tests."""
    yield
    if "helpers.ranks" in sys.modules:
        sys.modules["helpers.ranks"].kill_all()


@pytest.fixture
def tiny_model() -> GPT:
    torch.manual_seed(0)
    return GPT(TINY).eval()


@pytest.fixture
def corpus(tmp_path) -> Path:
    return tiny_corpus(tmp_path / "data")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Iterator[Path]:
    """OUT_DIR of a complete `tiny` run on `tiny_corpus`, with checkpoints 5 and 10. Read-only:
    copy it to change it."""
    folder = tmp_path_factory.mktemp("finished")
    train(tiny(tiny_corpus(folder / "data"), folder / "out"), CPU_LAUNCH)
    before = modification_times(folder)
    yield folder / "out"
    assert modification_times(folder) == before, "a test changed the shared run"


def modification_times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def rows_file(request, tmp_path):
    """The ROWS of the test file, as JSON."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(request.module.ROWS), encoding="utf-8")
    return path


@pytest.fixture
def base(request, tmp_path):
    """A checkpoint of the SIZES of the test file, with random weights."""
    torch.manual_seed(0)
    return save_checkpoint(tmp_path / "base", 1, GPT(request.module.SIZES))
