"""Shared test helpers: tiny corpora and models, and running scripts from the command line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt2.config import ROOT, UserError, run_main
from minigpt2.distributed import Launch
from minigpt2.files import atomic_write, write_json
from minigpt2.run import RunConfig, run_training
from minigpt2.shards import MANIFEST, read_manifest, shard_header
from model import GPTConfig

TINY = GPTConfig(block_size=32, vocab_size=50257, n_layer=2, n_head=2, n_embd=16)
CPU_LAUNCH = Launch(rank=0, world_size=1, device=torch.device("cpu"))
TINY_FLAGS = ["--n-layer", "2", "--n-head", "2", "--n-embd", "16", "--block-size", "32",
              "--sequence-length", "16", "--device", "cpu"]

# Rows of HellaSwag's form
STORIES = [{"ctx": f"The {a} went to the {b}. There it", "label": str(i % 4), "ind": i,
            "endings": [f"slept{' very' * n} well.", "ate a fish and a loaf of bread.", "sang.",
                        f"met {i} other animals, all of them older."]}
           for i, (a, b, n) in enumerate((a, b, n) for a in ("cat", "old dog") for b in
                                         ("forest", "sea") for n in range(4))]


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Writes tokens (n,) uint16 as one shard."""
    with atomic_write(path) as file:
        file.write(shard_header(len(tokens)) + tokens.tobytes())


def make_corpus(data_dir: Path, shard_sizes: list[int], seed: int = 0, high: int = 50257) -> Path:
    """Writes a corpus of random tokens below `high`. The first shard is for validation."""
    random = np.random.RandomState(seed)
    data_dir.mkdir(parents=True, exist_ok=True)
    shards = []
    for i, size in enumerate(shard_sizes):
        name = f"shard_{i:06d}.npy"
        write_shard(data_dir / name, random.randint(0, high, size).astype(np.uint16))
        shards.append({"file": name, "split": "train" if i else "val", "tokens": size})
    write_json(data_dir / MANIFEST, {"tokens": sum(shard_sizes), "shards": shards})
    return data_dir


def llmc_bytes(tokens: np.ndarray, version: int = 1, announced: int | None = None) -> bytes:
    """A shard in llm.c's format: a header of 256 int32, then uint16."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, version, len(tokens) if announced is None else announced
    return header.tobytes() + tokens.astype(np.uint16).tobytes()


def make_foreign(corpus: Path, folder: Path, form: str) -> Path:
    """Writes the shards of a corpus in the format and naming of llm.c, nanoGPT or build-nanogpt."""
    folder.mkdir()
    for i, shard in enumerate(read_manifest(corpus)["shards"]):
        tokens = np.load(corpus / shard["file"])
        if form == "llm.c":
            path = folder / f"fineweb_{shard['split']}_{i:06d}.bin"
            path.write_bytes(llmc_bytes(tokens))
        elif form == "nanoGPT":
            (folder / f"{shard['split']}_{i}.bin").write_bytes(tokens.tobytes())
        else:
            np.save(folder / f"edufineweb_{shard['split']}_{i:06d}.npy", tokens)
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Writes rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_script(*arguments, env: dict | None = None, stdin: str = "", check: bool = True,
               cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Runs `python arguments...` with one thread. With `check`, a non-zero exit fails the test."""
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, env=script_env() | (env or {}), input=stdin, text=True,
                            capture_output=True, cwd=cwd or ROOT, timeout=300)
    if check and result.returncode != 0:
        pytest.fail(f"{command} exited {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result


def run_torchrun(nproc: int, *arguments, check: bool = True) -> subprocess.CompletedProcess:
    return run_script("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}",
                      *arguments, check=check)


def script_env() -> dict:
    """Standard output is buffered, as it is for users: some CI systems set PYTHONUNBUFFERED."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": ""}


def assert_user_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """Asserts exit status 2 and one error line on stderr that contains `words`, no traceback."""
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in errors[0], (word, errors[0])


def main_of(script):
    """What the __main__ guard of a script runs, as a function."""
    if hasattr(script, "main"):
        return script.main
    config_class = next(value for value in vars(script).values() if isinstance(value, type)
                        and issubclass(value, RunConfig) and value.__module__ == script.__name__)
    return lambda: run_training(config_class, script.train, script.__doc__)


def run_to_end(script) -> None:
    """Runs a training script in this process with sys.argv; asserts exit status 0."""
    with pytest.raises(SystemExit) as stopped:
        main_of(script)()
    assert stopped.value.code == 0


def main_error(main, argv: list, monkeypatch, capsys) -> str:
    """Runs a script's main in this process, asserts exit status 2 and returns the error line."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, argv)])
    status = exit_status(main)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert status == 2 and len(lines) == 1, (status, lines)
    return lines[0]


def exit_status(main) -> int:
    """Runs a script's main in this process, which `run_main` would end if RANK is set."""
    with pytest.raises(SystemExit) as stopped, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "_exit", sys.exit)
        run_main(main)
    return stopped.value.code


def user_error(call, *arguments, **options) -> str:
    """Returns the message of the UserError that a call raises; asserts that it is one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert not re.search(r"\n", str(caught.value)), "one line"
    return str(caught.value)
