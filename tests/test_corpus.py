import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, assert_user_error, run_script, script_env, user_error
from hub_server import serve

from corpus import write_corpus
from dataloader import TokenLoader, read_manifest
from files import sha256_of
from tokenizer import EOT_TOKEN, decode

SCRIPT = ROOT / "pretrain_data" / "fineweb_downloader.py"
TEXTS = [f"Document {i}: " + "naïve 日本 text\n\n " * (i % 7 + 1) + "<|endoftext|>" * (i % 5 == 0)
         for i in range(60)]


def parquet_bytes(tmp_path: Path, texts: list, **columns) -> bytes:
    path = tmp_path / "made.parquet"
    table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string()),
                           "id": [str(i) for i in range(len(texts))], **columns})
    pyarrow.parquet.write_table(table, path, row_group_size=16, compression="zstd")
    content = path.read_bytes()
    path.unlink()
    return content


@pytest.fixture
def parquet(tmp_path) -> str:
    """A glob for two files with FineWeb's text column, null and empty documents among them."""
    folder = tmp_path / "parquet"
    folder.mkdir()
    (folder / "b.parquet").write_bytes(parquet_bytes(tmp_path, [*TEXTS[30:], "", None]))
    (folder / "a.parquet").write_bytes(parquet_bytes(tmp_path, TEXTS[:30]))
    return str(folder / "*.parquet")


def all_tokens(data_dir: Path) -> list[int]:
    shards = read_manifest(data_dir)["shards"]
    return [token for s in shards for token in np.load(data_dir / s["file"]).tolist()]


def documents_of(tokens: list[int]) -> list[str]:
    borders = [i for i, token in enumerate(tokens) if token == EOT_TOKEN] + [len(tokens)]
    return [decode(tokens[start + 1 : end])
            for start, end in zip(borders[:-1], borders[1:], strict=True)]


def file_bytes(data_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in data_dir.iterdir() if path.is_file()}


def test_parquet_to_shards_and_back(parquet, tmp_path):
    out = tmp_path / "shards"
    result = run_script(SCRIPT, "--parquet", parquet, "--out-dir", out, "--shard-tokens", 500,
                        "--workers", 1)
    manifest = read_manifest(out)
    tokens = all_tokens(out)
    assert documents_of(tokens) == TEXTS  # in order, every one whole
    assert tokens[0] == EOT_TOKEN
    assert manifest["documents"] == 60 and manifest["skipped_documents"] == 2
    assert manifest["tokens"] == len(tokens) == sum(s["tokens"] for s in manifest["shards"])
    assert [s["tokens"] for s in manifest["shards"][:-1]] == [500] * (len(manifest["shards"]) - 1)
    assert [s["split"] for s in manifest["shards"]] == ["val"] + ["train"] * (len(tokens) // 500)
    for shard in manifest["shards"]:
        assert shard["split"] in shard["file"]
        assert shard["sha256"] == sha256_of(out / shard["file"])
    assert f"{len(tokens):,} tokens" in result.stdout
    TokenLoader(out, "train", sequence_length=16, micro_batch_size=1, total_batch_size=16,
                vocab_size=50257).batch(0, 0)

    again = run_script(SCRIPT, "--parquet", parquet, "--out-dir", out, "--shard-tokens", 500)
    assert "already whole" in again.stdout
    before = file_bytes(out)
    other = run_script(SCRIPT, "--parquet", parquet, "--out-dir", out, "--shard-tokens", 400,
                       check=False)
    assert_user_error(other, "--out-dir", "shard_tokens", "500", "400")
    assert file_bytes(out) == before


def test_shards_do_not_depend_on_the_number_of_workers(parquet, tmp_path, monkeypatch):
    for workers in (1, 2, 3):
        run_script(SCRIPT, "--parquet", parquet, "--out-dir", tmp_path / str(workers),
                   "--shard-tokens", 300, "--workers", workers)
    assert file_bytes(tmp_path / "1") == file_bytes(tmp_path / "2") == file_bytes(tmp_path / "3")


def test_workers_keep_the_order_of_many_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("corpus.BATCH_CHARACTERS", 200)
    for workers in (1, 2):
        write_corpus(iter(TEXTS), tmp_path / str(workers), name="x", source={}, shard_tokens=300,
                     workers=workers)
    assert file_bytes(tmp_path / "1") == file_bytes(tmp_path / "2")
    assert documents_of(all_tokens(tmp_path / "2")) == TEXTS


def test_max_tokens_is_exact(tmp_path):
    for limit in (301, 600, 750):
        out = tmp_path / str(limit)
        manifest = write_corpus(iter(TEXTS), out, name="x", source={}, shard_tokens=300,
                                max_tokens=limit)
        assert manifest["tokens"] == len(all_tokens(out)) == limit
        assert [s["tokens"] for s in manifest["shards"]][:2] == [300, min(300, limit - 300)]


def test_a_corpus_without_training_shard_is_refused(tmp_path):
    message = user_error(write_corpus, TEXTS, tmp_path / "a", name="x", source={},
                         shard_tokens=100_000)
    assert "--shard-tokens" in message and "validation" in message
    message = user_error(write_corpus, TEXTS, tmp_path / "b", name="x", source={},
                         shard_tokens=100, max_tokens=100)
    assert "--max-tokens" in message and "--shard-tokens" in message
    for folder in ("a", "b"):
        assert not (tmp_path / folder / "manifest.json").exists()


def test_killed_half_way_it_leaves_nothing_that_passes_for_whole(tmp_path):
    """kill -9 while shards are being written; a second run ends as an undisturbed one."""
    out, code = tmp_path / "out", (
        "import sys, pathlib, itertools\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from corpus import write_corpus\n"
        f"write_corpus(itertools.cycle(['some text here ' * 9]), pathlib.Path({str(tmp_path)!r})"
        " / 'out', name='x', source={}, shard_tokens=2000)\n")
    process = subprocess.Popen([sys.executable, "-c", code], env=script_env(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(out.glob("x_train_*.npy"))) < 3 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert "unfinished" in user_error(read_manifest, out)
    write_corpus(iter(TEXTS), out, name="x", source={}, shard_tokens=300)
    write_corpus(iter(TEXTS), tmp_path / "calm", name="x", source={}, shard_tokens=300)
    calm = file_bytes(tmp_path / "calm")
    assert {name: data for name, data in file_bytes(out).items() if name[0] != "."} == calm


def test_the_hub_path_end_to_end(tmp_path):
    """The real huggingface_hub client against a local server; the files do not stay."""
    files = {"sample/10BT/000_00000.parquet": parquet_bytes(tmp_path, TEXTS[:30]),
             "sample/10BT/001_00000.parquet": parquet_bytes(tmp_path, TEXTS[30:]),
             "data/other.parquet": parquet_bytes(tmp_path, ["not of this sample"])}
    repos = {"datasets/HuggingFaceFW/fineweb": files,
             "datasets/HuggingFaceFW/fineweb-edu": {
                 "sample/10BT/train-0.parquet": parquet_bytes(tmp_path, TEXTS[:20])}}
    with serve(repos) as environment:
        environment |= {"HF_HOME": str(tmp_path / "hf")}
        run_script(SCRIPT, "--out-dir", tmp_path / "out", "--shard-tokens", 500, "--workers", 2,
                   env=environment)
        run_script(SCRIPT, "--edu", "--out-dir", tmp_path / "edu", "--shard-tokens", 100,
                   "--max-tokens", 250, "--workers", 1, env=environment)
        absent = run_script(SCRIPT, "--out-dir", tmp_path / "no", "--revision", "gone",
                            env=environment | {"HF_ENDPOINT": environment["HF_ENDPOINT"] + "/x"},
                            check=False)
    assert documents_of(all_tokens(tmp_path / "out")) == TEXTS
    for folder in ("out", "edu"):  # --max-tokens stopped in the middle of a file
        assert not list((tmp_path / folder).rglob("*.parquet"))
    manifest = read_manifest(tmp_path / "out")
    assert manifest["source"]["name"] == "HuggingFaceFW/fineweb"
    assert manifest["source"]["revision"].startswith("1234567890")
    assert read_manifest(tmp_path / "edu")["source"]["name"] == "HuggingFaceFW/fineweb-edu"
    assert_user_error(absent, "HuggingFaceFW/fineweb", "--parquet")


# ------------------------------------------------------------------------------- bad input


def test_parquet_that_cannot_be_read(tmp_path):
    def fails(pattern, *words):
        result = run_script(SCRIPT, "--parquet", pattern, "--out-dir", tmp_path / "out",
                            "--shard-tokens", 10, "--workers", 1, check=False)
        assert_user_error(result, *words)
        assert not (tmp_path / "out" / "manifest.json").exists()

    fails(tmp_path / "none-*.parquet", "none-*", "matches no file")
    (tmp_path / "broken.parquet").write_bytes(parquet_bytes(tmp_path, TEXTS)[:-50])
    fails(tmp_path / "broken.parquet", "broken.parquet", "damaged")
    table = pyarrow.table({"content": ["a"]})
    pyarrow.parquet.write_table(table, tmp_path / "other.parquet")
    fails(tmp_path / "other.parquet", "other.parquet", "`text`", "content")


def test_bad_manifest_in_the_output_folder(tmp_path, parquet):
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text(json.dumps({"shards": [], "source": {"name": "other"}}))
    result = run_script(SCRIPT, "--parquet", parquet, "--out-dir", out, check=False)
    assert_user_error(result, "holds another corpus", "source")
