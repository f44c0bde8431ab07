"""Building a corpus: formats, resume after kill -9, the hub, and bad input."""

import contextlib
import errno
import functools
import gzip
import json
import os
import random
import shutil
import signal
import string
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers.common import (
    ROOT,
    assert_user_error,
    llmc_bytes,
    main_error,
    run_script,
    script_env,
    user_error,
)
from helpers.hub_server import run_module, serve
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from dataloader import TokenLoader
from minigpt2 import hub
from minigpt2.config import UserError
from minigpt2.files import sha256_of, write_json
from minigpt2.hub import retried
from minigpt2.shards import read_manifest
from minigpt2.tokenizer import EOT_TOKEN, decode, encode
from pretrain_data import (
    corpus,
    documents,
    fineweb_downloader,
    pretokenized_downloader,
    text_to_shards,
)
from pretrain_data.corpus import verify_corpus, write_corpus
from pretrain_data.documents import (
    Part,
    Source,
    file_source,
    local_source,
    memory_source,
    select_files,
)

SCRIPT = ROOT / "pretrain_data" / "fineweb_downloader.py"
TEXT = ROOT / "pretrain_data" / "text_to_shards.py"
FINEWEB, PRETOKENIZED = "pretrain_data.fineweb_downloader", "pretrain_data.pretokenized_downloader"
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
    """A glob for two files with FineWeb's text column; some documents are null or empty."""
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


def write(texts, out: Path, shard_tokens: int = 300, **options) -> dict:
    if isinstance(texts, Source):
        source, description = texts, {"name": "test"}
    elif isinstance(texts[0], Path):
        source = file_source(texts)
        description = {"name": "files", "files": {p.name: sha256_of(p) for p in texts}}
    else:
        source, description = memory_source(texts), {"name": "test"}
    return write_corpus(description, lambda: source, out, name="x", shard_tokens=shard_tokens,
                        **options)


@pytest.fixture
def small_parts(monkeypatch):
    """Small parts, so that a small corpus has many."""
    monkeypatch.setattr(documents, "PART_BYTES", 200)


def test_parquet_to_shards_and_back(parquet, tmp_path):
    out = tmp_path / "shards"
    result = run_script(TEXT, parquet, "--out-dir", out, "--workers", 1)
    manifest = read_manifest(out)
    tokens = all_tokens(out)
    assert documents_of(tokens) == TEXTS
    assert tokens[0] == EOT_TOKEN
    assert manifest["documents"] == 60 and manifest["outcomes"]["empty"] == 2
    assert manifest["tokens"] == len(tokens) == sum(s["tokens"] for s in manifest["shards"])
    assert [s["split"] for s in manifest["shards"]] == ["val", "train"]
    for shard in manifest["shards"]:
        assert shard["split"] in shard["file"]
        assert shard["sha256"] == sha256_of(out / shard["file"])
        np.load(out / shard["file"])  # fails if the header of the last shard has the full length
    printed = result.stdout.splitlines()
    assert printed[0] == "reading 2 files: 2 .parquet; skipped: none"
    assert "MB are free" in printed[1]
    assert printed[2] == "2 documents had no text and were skipped"
    assert printed[3].startswith("12 times <|endoftext|> in the text, tokenized as plain text")
    assert printed[4:] == [f"wrote {out}: 60 documents, {len(tokens):,} tokens in 2 shards, the "
                           f"first {manifest['shards'][0]['tokens']:,} for validation"]
    TokenLoader(out, "train", sequence_length=16, micro_batch_size=1, total_batch_size=16,
                vocab_size=50257).batch(0, 0)

    assert "already complete" in run_script(TEXT, parquet, "--out-dir", out).stdout
    before = file_bytes(out)
    other = run_script(TEXT, parquet, "--out-dir", out, "--text-column", "id", check=False)
    assert_user_error(other, "--out-dir", "its source is", "'column': 'id'")
    assert file_bytes(out) == before


@pytest.mark.slow
def test_shards_do_not_depend_on_the_number_of_workers(parquet, tmp_path):
    for workers in (1, 2, 3):
        run_script(TEXT, parquet, "--out-dir", tmp_path / str(workers), "--workers", workers)
    assert file_bytes(tmp_path / "1") == file_bytes(tmp_path / "2") == file_bytes(tmp_path / "3")


def test_workers_keep_the_order_of_many_parts(tmp_path, small_parts):
    for workers in (1, 2):
        write(TEXTS, tmp_path / str(workers), workers=workers)
    assert file_bytes(tmp_path / "1") == file_bytes(tmp_path / "2")
    assert documents_of(all_tokens(tmp_path / "2")) == TEXTS


@pytest.mark.parametrize("part_bytes", [50, 700, 10**6])
def test_shards_do_not_depend_on_how_files_are_cut(parquet, tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr(documents, "PART_BYTES", part_bytes)
    write(sorted(Path(parquet).parent.iterdir()), tmp_path / "out")
    assert documents_of(all_tokens(tmp_path / "out")) == TEXTS


@pytest.mark.parametrize("part_bytes", [40, 10**6])
def test_every_format_gives_the_same_documents(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr(documents, "PART_BYTES", part_bytes)
    rows = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0)
            for i, text in enumerate([*TEXTS, "", None])]
    lines = "".join(row + ("\n", "\r\n", "\n\n")[i % 3] for i, row in enumerate(rows))
    folders = {name: tmp_path / name for name in ("jsonl", "gz", "parquet", "txt")}
    for folder in folders.values():
        folder.mkdir()
    (folders["jsonl"] / "a.jsonl").write_text(lines, encoding="utf-8", newline="")
    (folders["gz"] / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folders["parquet"] / "a.parquet").write_bytes(parquet_bytes(tmp_path, [*TEXTS, "", None]))
    for i, text in enumerate(TEXTS):
        (folders["txt"] / f"{i:03d}.txt").write_text(text, encoding="utf-8", newline="")
    (folders["txt"] / "empty.txt").write_text("")
    for name, folder in folders.items():
        write(sorted(folder.iterdir()), tmp_path / f"{name}-out")
        assert documents_of(all_tokens(tmp_path / f"{name}-out")) == TEXTS
        manifest = read_manifest(tmp_path / f"{name}-out")
        assert manifest["outcomes"]["empty"] == (1 if name == "txt" else 2)
        assert manifest["documents"] == 60


def test_splitting_a_text_file_does_not_change_the_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PART_BYTES", 100)
    for number, alphabet in enumerate([
            ["word", " ", "  ", "\n", "\n\n", "'s", "1", "é", "日本", "\x1c", "\u2028", "."],
            ["日本", "。", "\n", "\u3000", "語", "\x85", "\xa0", " "],
            ["日本語。", "\r\n", "\r", "\t", "\r\n\r\n"]]):
        text = "".join(random.Random(0).choices(alphabet, k=5000))
        path, out = tmp_path / f"{number}.txt", tmp_path / f"out{number}"
        path.write_text(text, encoding="utf-8", newline="")
        assert len(list(file_source([path]).open_unit(0))) > 50
        write([path], out)
        assert all_tokens(out) == [EOT_TOKEN, *encode(text)]


def test_max_tokens_is_exact_and_can_be_raised(tmp_path, small_parts):
    full = write(TEXTS, tmp_path / "full")
    grown = tmp_path / "grown"
    for limit in (301, 302, 600, 750, 900, full["tokens"] + 5):
        out = tmp_path / str(limit)
        manifest = write(TEXTS, out, max_tokens=limit)
        assert manifest["tokens"] == len(all_tokens(out)) == min(limit, full["tokens"])
        assert all_tokens(out) == all_tokens(tmp_path / "full")[:limit]
        write(TEXTS, grown, max_tokens=limit)  # continues from the previous limit
        assert file_bytes(grown) == file_bytes(out)
    before = file_bytes(grown)
    message = user_error(write, TEXTS, grown, max_tokens=500)
    assert f"already holds {full['tokens']:,} tokens, more than --max-tokens 500" in message
    assert file_bytes(grown) == before


def test_the_limit_of_an_unfinished_build_can_be_raised(tmp_path, monkeypatch, small_parts):
    """Killed before the first shard, after two of them, and when all are written but not the
    manifest; continued, killed again, and finished."""
    texts = [*TEXTS[:20], "", "\ud800", *TEXTS[20:40], "", *TEXTS[40:]]
    outcomes = write(texts, tmp_path / "expected")["outcomes"]
    assert (outcomes["empty"], outcomes["repaired"], outcomes["marked"]) == (2, 1, 12)
    for replace in (2, 7, 10, 11):
        out = tmp_path / str(replace)
        stop_at(f"before replace {replace}", monkeypatch, out, texts, max_tokens=1000)
        if replace > 2:
            message = user_error(write, texts, out, max_tokens=400)
            assert "more than --max-tokens 400" in message
        stop_at("after replace 2", monkeypatch, out, texts, max_tokens=1200)
        write(texts, out)
        assert file_bytes(out) == file_bytes(tmp_path / "expected")


def test_a_corpus_of_the_version_before_is_recognized_and_extended(tmp_path, small_parts, capsys):
    """Its manifest does not say how many documents are before a shard: all shards are rewritten."""
    out = tmp_path / "out"
    write(TEXTS, out, max_tokens=750)
    manifest = read_manifest(out)
    del manifest["val_tokens"]
    for shard in manifest["shards"]:
        shard["start"] = shard["start"]["position"]
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    before = file_bytes(out)
    write(TEXTS, out, max_tokens=750)
    assert "already complete" in capsys.readouterr().out and file_bytes(out) == before
    write(TEXTS, out)
    write(TEXTS, tmp_path / "expected")
    manifest, expected = read_manifest(out), read_manifest(tmp_path / "expected")
    assert manifest == expected and all_tokens(out) == all_tokens(tmp_path / "expected")


def test_deleted_shards_are_rebuilt(tmp_path, small_parts, capsys):
    out = tmp_path / "out"
    write(TEXTS, out)
    before = file_bytes(out)
    verify_corpus(out)
    manifest = read_manifest(out)
    del manifest["shards"][0]["sha256"]  # as in one that was made by hand
    shutil.copytree(out, tmp_path / "other")
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest))
    assert "1 of" in user_error(verify_corpus, tmp_path / "other")
    bad = [out / read_manifest(out)["shards"][i]["file"] for i in (2, 7)]
    for path in bad:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    message = user_error(verify_corpus, out)
    assert f"rm -f {bad[0]} {bad[1]}" in message and "2 of" in message
    for path in bad:
        path.unlink()
    assert "2 of" in user_error(verify_corpus, out)
    write(TEXTS, out)
    assert "resuming after 600 tokens" in capsys.readouterr().out  # the two shards before
    assert file_bytes(out) == before


@pytest.mark.parametrize("number", [1, 2, 5, 12])
def test_kill_while_missing_shards_are_written_again(tmp_path, monkeypatch, small_parts, number):
    """Also if another shard is lost in between, and with the outcomes counted once."""
    texts = [*TEXTS[:20], "", "\ud800", *TEXTS[20:40], "", *TEXTS[40:]]
    out = tmp_path / "out"
    write(texts, out)
    before = file_bytes(out)
    (out / "x_train_000003.npy").unlink()
    stop_at(f"before replace {number}", monkeypatch, out, texts)
    (out / "x_train_000001.npy").unlink()
    stop_at("after replace 2", monkeypatch, out, texts)
    write(texts, out)
    assert file_bytes(out) == before


@pytest.mark.parametrize("step", ["encode_to_array", "rewind", "check_disk"])
def test_an_extension_that_cannot_begin_leaves_a_finished_folder_as_it_is(
        tmp_path, monkeypatch, small_parts, step):
    out = tmp_path / "out"
    write(TEXTS, out, max_tokens=750)
    before = file_bytes(out)

    def fail(*arguments):
        raise UserError("cannot begin")

    monkeypatch.setattr(f"pretrain_data.corpus.{step}", fail)
    assert user_error(write, TEXTS, out) == "cannot begin"
    assert file_bytes(out) == before


def test_damaged_and_missing_shards_do_not_stay_in_an_extended_folder(tmp_path, small_parts):
    out = tmp_path / "out"
    write(TEXTS, out, max_tokens=750)
    first, last = (out / read_manifest(out)["shards"][i]["file"] for i in (0, -1))
    content = last.read_bytes()
    last.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # short: is written again
    first.unlink()
    write(TEXTS, out)
    write(TEXTS, tmp_path / "expected")
    assert file_bytes(out) == file_bytes(tmp_path / "expected")


@pytest.mark.parametrize("error", [
    RuntimeError("CAS error"), LocalEntryNotFoundError("no answer"), ConnectionResetError(),
    OSError("size is wrong")])
def test_temporary_errors_are_retried(error, capsys, monkeypatch):
    errors, delays = [error, error], []
    monkeypatch.setattr(hub.time, "sleep", delays.append)

    def request():
        if errors:
            raise errors.pop()
        return "content"

    assert retried(request, "a file", 2) == "content"
    assert capsys.readouterr().out.count("retrying") == 2 and delays == [2.0, 4.0]
    errors[:] = [error] * 9
    assert "a file" in user_error(retried, request, "a file", 1)
    assert len(delays) == 3


def test_the_text_column_is_found_next_to_nested_columns(tmp_path):
    table = pyarrow.table({"meta": [{"a": 1, "b": "x"}] * 60, "text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    write([tmp_path / "a.parquet"], tmp_path / "out")
    assert documents_of(all_tokens(tmp_path / "out")) == TEXTS


@pytest.mark.slow
def test_verify_on_the_command_line(parquet, tmp_path):
    out = tmp_path / "out"
    run_script(TEXT, parquet, "--out-dir", out)
    assert "match their checksums" in run_script(SCRIPT, "--verify", "--out-dir", out).stdout
    shard = out / "text_train_000001.npy"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert_user_error(run_script(SCRIPT, "--verify", "--out-dir", out, check=False), str(shard),
                      "rm -f")
    shard.unlink()
    run_script(TEXT, parquet, "--out-dir", out)
    run_script(SCRIPT, "--verify", "--out-dir", out)


def test_a_corpus_without_a_training_shard_is_refused(tmp_path):
    tokens = write(TEXTS, tmp_path / "full")["tokens"]
    user_error(write, TEXTS, tmp_path / "a", shard_tokens=tokens)
    message = user_error(write, TEXTS, tmp_path / "a", shard_tokens=100_000)
    assert "--shard-tokens" in message and "validation" in message
    write(TEXTS, tmp_path / "a", shard_tokens=100)  # no file of the first attempt interferes
    message = user_error(write, TEXTS, tmp_path / "b", shard_tokens=100, max_tokens=100)
    assert "--max-tokens" in message and "--shard-tokens" in message
    assert not (tmp_path / "b").exists()


# ---------------------------------------------------------------------------- unusual documents


@pytest.mark.slow
def test_pathological_documents_do_not_affect_others(tmp_path):
    texts = ["before", " " * 2_000_000 + "x", "a" * 5_000_000, "\n" * 700_000, "\x00" * 1000, "",
             "lone \ud800 surrogate", "日" * 300_000, "a line " * 200_000, "after"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    manifest = write([tmp_path / "a.jsonl"], tmp_path / "out", shard_tokens=100_000)
    kept = [text.replace("\ud800", "\ufffd") for text in texts if text]
    assert documents_of(all_tokens(tmp_path / "out")) == kept
    assert manifest["outcomes"] == {"empty": 1, "failed": 0, "repaired": 1, "cut": 4, "marked": 0}


def test_a_lone_surrogate_is_repaired_in_a_file_of_ones_own(tmp_path):
    """As in a cut emoji; the size of the text is measured before."""
    (tmp_path / "a.jsonl").write_text('{"text": "cut \\ud83d here"}\n' * 20)
    build_from_files(tmp_path / "a.jsonl", tmp_path / "out", 20)
    assert set(documents_of(all_tokens(tmp_path / "out"))) == {"cut \ufffd here"}


def test_invalid_utf8_is_repaired_and_counted(tmp_path):
    good, bad = "déjà vu, été, là".encode(), b"caf\xe9 \xff\xfe"
    (tmp_path / "a.txt").write_bytes(bad * 20 + good * 20)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "' + bad + b'"}\n{"text": "' + good + b'"}\n')
    column = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, pyarrow.array([bad, good], pyarrow.binary()).buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "c.parquet")
    manifest = write(sorted(tmp_path.iterdir()), tmp_path / "out", shard_tokens=20)
    repaired = "caf\ufffd \ufffd\ufffd"
    assert documents_of(all_tokens(tmp_path / "out")) == [
        repaired * 20 + good.decode() * 20, *[repaired, good.decode()] * 2]
    assert manifest["outcomes"]["repaired"] == 3


def test_a_document_that_cannot_be_encoded_is_counted(tmp_path, monkeypatch):
    def encode_or_fail(text):
        if "7" in text:
            raise ValueError("Regex error while tokenizing")
        return real(text)

    real = corpus.encode_to_array
    monkeypatch.setattr(corpus, "encode_to_array", encode_or_fail)
    manifest = write(TEXTS, tmp_path / "out")
    kept = [text for text in TEXTS if "7" not in text]
    assert documents_of(all_tokens(tmp_path / "out")) == kept
    assert manifest["outcomes"]["failed"] == len(TEXTS) - len(kept) > 0


def test_large_row_groups_are_split_into_parts(tmp_path):
    texts = [f"{i} " + "some words " * 900 for i in range(3000)]  # 30 MB in one row group
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet",
                                use_dictionary=False)
    parts = list(file_source([tmp_path / "a.parquet"]).open_unit(0))
    assert 5 <= len(parts) <= 9
    assert [text for part in parts for text in part.read()] == texts


# ---------------------------------------------------------------------------- kill and resume


@pytest.mark.slow
def test_kill_at_20_random_times_gives_the_same_bytes(tmp_path):
    """kill -9 during start, tokenizing, writing and finishing. Each run resumes at the shard that
    the previous one was writing, with another number of workers; none starts over."""
    texts = [f"{i} " + "some words of a document, " * 40 for i in range(6000)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "import pathlib\nfrom pretrain_data import corpus, documents\n"
            "documents.PART_BYTES = 50_000\n"
            "def main(out, workers):\n"
            "    paths = [pathlib.Path(sys.argv[1])]\n"
            "    source = lambda: documents.file_source(paths)\n"
            "    corpus.write_corpus({}, source, pathlib.Path(out), name='x',\n"
            "                        shard_tokens=20_000, workers=int(workers))\n"
            "if __name__ == '__main__': main(*sys.argv[2:])\n")
    script = tmp_path / "run.py"
    script.write_text(code)
    out, expected = tmp_path / "out", tmp_path / "expected"

    def start(folder: Path, workers: int) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, script, tmp_path / "a.jsonl", folder,
                                 str(workers)], env=script_env(), stderr=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, text=True, start_new_session=True)

    assert start(expected, 1).wait() == 0
    rng, reached = random.Random(0), []
    for kill in range(20):
        process = start(out, 1 + kill % 2)
        previous = reached[-1] if reached else -1
        target = previous + 1 + rng.randrange(60_000)  # tokens, not seconds
        while process.poll() is None and tokens_on_record(out) < target:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.01)
        with contextlib.suppress(ProcessLookupError):  # it has finished
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reached.append(tokens_on_record(out))
        assert reached[-1] >= previous
        if not (out / "manifest.json").exists():
            assert "unfinished" in user_error(read_manifest, out)
    assert reached[-1] > reached[3] > 0
    process = start(out, 2)
    printed = process.communicate()[0]
    assert process.returncode == 0
    assert "resuming after" in printed or "already complete" in printed
    assert file_bytes(out) == file_bytes(expected)


def test_workers_exit_when_their_parent_is_killed(tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "import functools, itertools, pathlib\n"
            "from pretrain_data import corpus, documents\n"
            "def main():\n"
            "    part = documents.Part(functools.partial(list, ['some words ' * 1000] * 50))\n"
            "    source = documents.Source(1, lambda unit: itertools.repeat(part), 10**9)\n"
            "    corpus.write_corpus({}, lambda: source, pathlib.Path(sys.argv[1]), name='x',\n"
            "                        shard_tokens=100_000, workers=2)\n"
            "if __name__ == '__main__': main()\n")
    (tmp_path / "run.py").write_text(code)
    process = subprocess.Popen([sys.executable, tmp_path / "run.py", tmp_path / "out"],
                               env=script_env(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120

    def alive() -> list[str]:
        stats = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group = path.read_text().rpartition(")")[2].split()[:3]
                stats += [path.parent.name] if int(group) == process.pid and state != "Z" else []
        return stats

    try:
        while tokens_on_record(tmp_path / "out") == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(alive()) > 2  # the parent, its workers and the resource tracker
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        while alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert alive() == []
    finally:  # else it would write without end
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_parts_are_read_as_workers_need_them(monkeypatch):
    """The memory of a build does not grow with its corpus."""
    read = []
    results = corpus.ordered_map(abs, (read.append(n) or n for n in range(1000)), 2)
    assert next(results) == 0 and len(read) < 10
    results.close()


def test_at_most_two_downloads_are_kept(tmp_path, monkeypatch):
    """The file that is read, and the one before it, where the incomplete shard may begin."""
    files = [types.SimpleNamespace(path=f"{n}.parquet", size=1000) for n in range(4)]
    seen = []

    def fetch(repo, commit, file, folder):
        folder.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[:15]}), folder / file.path)
        seen.append(len(list(folder.iterdir())))
        return folder / file.path

    monkeypatch.setattr(fineweb_downloader, "list_files", lambda *arguments: files)
    monkeypatch.setattr(fineweb_downloader, "fetch", fetch)
    write_corpus({"name": "hub"}, lambda: fineweb_downloader.hub_source(
        "owner/name", "0" * 40, tmp_path / "scratch"), tmp_path / "out", name="x",
        shard_tokens=300, workers=1)
    assert seen == [1, 2, 2, 2]


def test_what_a_killed_download_left_is_deleted(tmp_path, monkeypatch):
    left = tmp_path / ".cache" / "huggingface" / "download" / "x.incomplete"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    (tmp_path / "a.bin").touch()
    monkeypatch.setattr("huggingface_hub.hf_hub_download",
                        lambda *arguments, **options: str(tmp_path / "a.bin"))
    file = types.SimpleNamespace(path="a.bin", size=0, lfs=None)
    assert hub.fetch("owner/name", "0" * 40, file, tmp_path) == tmp_path / "a.bin"
    assert not left.exists()


@pytest.mark.parametrize("error, message", [
    (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    (OfflineModeIsEnabled("offline mode is enabled"), "offline mode")])
def test_what_waiting_does_not_mend_is_not_retried(error, message, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def request():
        asked.append(1)
        raise error

    asked = []
    with pytest.raises((PermissionError, UserError), match=message):
        hub.retried(request, "a file")
    assert len(asked) == 1


def tokens_on_record(out: Path) -> int:
    for name in ("manifest.json", "progress.json"):
        if (out / name).exists():
            try:
                return json.loads((out / name).read_text())["tokens"]
            except FileNotFoundError:  # renamed or removed since
                continue
    return 0


def stop_at(moment: str, monkeypatch, out: Path, texts, build=write, **options) -> None:
    """Runs until just before or after the n-th call of a function of `os`, as if killed there:
    nothing more is written."""
    class Killed(BaseException):
        pass

    when, name, number = moment.split()
    calls, real = [0], getattr(os, name)

    def killed(*arguments, **keywords):
        calls[0] += 1
        if calls[0] == int(number) and when == "before":
            raise Killed
        result = real(*arguments, **keywords)
        if calls[0] == int(number):
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(os, name, killed)
        with pytest.raises(Killed):
            build(texts, out, **options)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name, number", [("fsync", n) for n in (2, 5, 9, 16, 36)]
                         + [("replace", n) for n in (1, 2, 3, 4, 5, 9, 18, 19)])
def test_kill_at_every_kind_of_write(tmp_path, monkeypatch, small_parts, when, name, number):
    out = tmp_path / "out"
    stop_at(f"{when} {name} {number}", monkeypatch, out, TEXTS)
    write(TEXTS, out)
    write(TEXTS, tmp_path / "expected")
    assert file_bytes(out) == file_bytes(tmp_path / "expected")


def test_a_leftover_of_a_killed_build_is_overwritten(tmp_path, monkeypatch, small_parts):
    out = tmp_path / "out"
    stop_at("before replace 6", monkeypatch, out, TEXTS)
    number = len(json.loads((out / "progress.json").read_text())["shards"])
    assert number > 1
    (out / f".x_train_{number:06d}.npy.tmp").write_bytes(b"junk" * 500)
    write(TEXTS, out)
    write(TEXTS, tmp_path / "expected")
    assert file_bytes(out) == file_bytes(tmp_path / "expected")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_kill_while_a_finished_folder_is_extended(tmp_path, monkeypatch, small_parts, when, number):
    out = tmp_path / "out"
    write(TEXTS, out, max_tokens=750)
    before = file_bytes(out)
    stop_at(f"{when} replace {number}", monkeypatch, out, TEXTS)
    if (number, when) == (4, "after"):  # the longer shard is on record
        assert "already holds 900 tokens" in user_error(write, TEXTS, out, max_tokens=750)
    else:
        write(TEXTS, out, max_tokens=750)
        assert file_bytes(out) == before
        stop_at(f"{when} replace {number}", monkeypatch, out, TEXTS)
    write(TEXTS, out)
    write(TEXTS, tmp_path / "expected")
    assert file_bytes(out) == file_bytes(tmp_path / "expected")


def test_an_unfinished_build_of_an_older_version_is_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    record = {"source": {"name": "test"}, "tokens": 5, "shards": [], "open_start": None}
    (out / "progress.json").write_text(json.dumps(record))
    assert "older version: use another --out-dir" in user_error(write, TEXTS, out)
    assert "unfinished" in user_error(read_manifest, out)


@pytest.mark.slow
def test_a_killed_worker_is_reported_and_the_next_run_resumes(tmp_path):
    marker = tmp_path / "marker"
    marker.touch()

    def parts(unit):
        yield Part(functools.partial(list, TEXTS[:30]))
        yield Part(functools.partial(die_once, str(marker), TEXTS[30:]))

    source = Source(1, parts, 1000)
    message = user_error(write, source, tmp_path / "out", workers=2)
    assert "killed" in message and "run again" in message
    write(source, tmp_path / "out", workers=2)
    assert documents_of(all_tokens(tmp_path / "out")) == TEXTS


def die_once(marker: str, texts: list[str]) -> list[str]:
    if Path(marker).exists():
        Path(marker).unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return texts


def test_a_folder_is_locked_during_a_build(tmp_path):
    def parts(unit):  # the second build starts in the middle of the first
        yield Part(functools.partial(list, TEXTS[:30]))
        messages.append(user_error(write, TEXTS, tmp_path / "out"))
        yield Part(functools.partial(list, TEXTS[30:]))

    messages = []
    write(Source(1, parts, 1000), tmp_path / "out")
    assert "another process" in messages[0]
    assert documents_of(all_tokens(tmp_path / "out")) == TEXTS


def test_too_little_disk_space_is_reported_first(tmp_path):
    source = memory_source(TEXTS)
    source.text_bytes = 2 * 10**18
    message = user_error(write, source, tmp_path / "out")
    assert "1,000,000,000,000 MB" in message and "--max-tokens" in message
    assert not list((tmp_path / "out").glob("*.json"))


def test_a_full_disk_loses_nothing(tmp_path):
    """A full disk is simulated with `ulimit -f`: no file may grow past 3 KiB."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    arguments = [TEXT, tmp_path / "a.jsonl", "--out-dir", tmp_path / "out", "--workers", 1]
    command = " ".join(map(str, [sys.executable, *arguments]))
    full = subprocess.run(["bash", "-c", f"ulimit -f 3; {command}"], env=script_env(), text=True,
                          capture_output=True)
    assert_user_error(full, "no space left")
    run_script(*arguments)
    assert documents_of(all_tokens(tmp_path / "out")) == TEXTS


# ------------------------------------------------------------------------------------------ hub


def fineweb(tmp_path) -> dict:
    return {"sample/10BT/000_00000.parquet": parquet_bytes(tmp_path, TEXTS[:30]),
            "sample/10BT/001_00000.parquet": parquet_bytes(tmp_path, TEXTS[30:]),
            "data/other.parquet": parquet_bytes(tmp_path, ["not in the sample"])}


@pytest.mark.slow
def test_download_from_the_hub(tmp_path):
    """The real huggingface_hub client against a local server; downloaded files are deleted."""
    repos = {"datasets/HuggingFaceFW/fineweb": fineweb(tmp_path),
             "datasets/HuggingFaceFW/fineweb-edu": {
                 "sample/10BT/train-0.parquet": parquet_bytes(tmp_path, TEXTS[:20])}}
    with serve(repos) as (environment, _):
        environment |= {"HF_HOME": str(tmp_path / "hf")}
        run_script(SCRIPT, "--out-dir", tmp_path / "out", "--shard-tokens", 500, "--workers", 2,
                   env=environment)
        run_script(SCRIPT, "--edu", "--out-dir", tmp_path / "edu", "--shard-tokens", 100,
                   "--max-tokens", 250, "--workers", 1, env=environment)
        absent = run_script(SCRIPT, "--out-dir", tmp_path / "no",
                            env=environment | {"HF_ENDPOINT": environment["HF_ENDPOINT"] + "/x"},
                            check=False)
    assert documents_of(all_tokens(tmp_path / "out")) == TEXTS
    for folder in ("out", "edu"):  # for edu, --max-tokens stopped in the middle of a file
        assert not list((tmp_path / folder).rglob("*.parquet"))
    manifest = read_manifest(tmp_path / "out")
    assert manifest["source"]["name"] == "HuggingFaceFW/fineweb"
    assert len(manifest["source"]["revision"]) == 40
    assert read_manifest(tmp_path / "edu")["source"]["name"] == "HuggingFaceFW/fineweb-edu"
    assert_user_error(absent, "HuggingFaceFW/fineweb")


@pytest.mark.slow
def test_network_faults_do_not_change_the_bytes(tmp_path):
    """Dropped connections, error statuses, truncated bodies and corrupt content are all retried."""
    repos = {"datasets/HuggingFaceFW/fineweb": fineweb(tmp_path)}
    faults = [429, 503, "cut", 500, "drop", "flip", "cut", "flip"]
    outputs = {}
    for name, injected in [("clean", []), ("faulty", faults)]:
        with serve(repos, faults=injected) as (environment, pending):
            environment |= {"HF_HOME": str(tmp_path / name / "hf")}
            outputs[name] = run_module(FINEWEB, "--out-dir", tmp_path / name, "--shard-tokens", 500,
                                       "--workers", 1, env=environment)
            assert not pending
    assert file_bytes(tmp_path / "faulty") == file_bytes(tmp_path / "clean")
    assert "retrying" in outputs["faulty"].stdout
    assert "SHA-256" in outputs["faulty"].stdout


def test_a_failed_download_is_reported_and_the_next_run_resumes(tmp_path):
    repos = {"datasets/HuggingFaceFW/fineweb": fineweb(tmp_path)}
    arguments = [FINEWEB, "--out-dir", tmp_path / "out", "--shard-tokens", 300, "--workers", 1]
    second = "sample/10BT/001_00000.parquet"
    with serve(repos, gone={second}) as (environment, _):
        environment |= {"HF_HOME": str(tmp_path / "hf")}
        assert_user_error(run_module(*arguments, env=environment, check=False), second,
                          "then rerun")
        assert "unfinished" in user_error(read_manifest, tmp_path / "out")
    with serve(repos, gone={"sample/10BT/000_00000.parquet"}) as (environment, _):
        result = run_module(*arguments, env=environment | {"HF_HOME": str(tmp_path / "hf")})
    assert "resuming after" in result.stdout  # in the first file, which is not downloaded again
    assert "reading HuggingFaceFW/fineweb sample/10BT/000" in result.stdout
    assert "reading HuggingFaceFW/fineweb sample/10BT/001" in result.stdout
    assert documents_of(all_tokens(tmp_path / "out")) == TEXTS


@pytest.mark.slow
def test_pretokenized_shards(tmp_path):
    tokens = np.random.RandomState(0).randint(0, 50257, 4000)
    files = {f"fineweb_{'train' if i else 'val'}_{i:06d}.bin": llmc_bytes(part)
             for i, part in enumerate(tokens.reshape(4, 1000))}
    repos = {"datasets/kjj0/fineweb10B-gpt2": files | {"README.md": b"# shards"}}
    out = tmp_path / "out"

    def fetch(*arguments, check=True, **options):
        with serve(repos, **options) as (environment, _):
            return run_module(PRETOKENIZED, "--out-dir", out, *arguments, check=check,
                              env=environment | {"HF_HOME": str(tmp_path / "hf")})

    failed = fetch(gone={"fineweb_train_000002.bin"}, check=False)
    assert_user_error(failed, "fineweb_train_000002.bin")
    assert "unfinished" in user_error(read_manifest, out)
    fetch("--max-tokens", 1500)
    names = [shard["file"] for shard in read_manifest(out)["shards"]]
    assert names == ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]
    assert_user_error(fetch(gone={"fineweb_train_000002.bin"}, check=False), "000002.bin")
    assert read_manifest(out)["tokens"] == 2000  # it stays usable until it is extended
    fetch(faults=["flip", 503])
    assert read_manifest(out)["tokens"] == 4000
    assert all_foreign_tokens(out) == tokens.tolist()
    assert "4 shards match" in run_script(SCRIPT, "--verify", "--out-dir", out).stdout
    (out / "fineweb_train_000001.bin").unlink()
    fetch()
    run_script(SCRIPT, "--verify", "--out-dir", out)
    (tmp_path / "a.txt").write_text("some text")
    result = run_script(TEXT, tmp_path / "a.txt", "--out-dir", out, check=False)
    assert_user_error(result, "another corpus", "kjj0")


def test_a_full_disk_leaves_finished_pretokenized_shards(tmp_path, monkeypatch):
    """And the manifest, with which they stay usable."""
    source = {"name": pretokenized_downloader.REPO, "revision": pretokenized_downloader.COMMIT}
    write_json(tmp_path / "manifest.json", {"source": source, "tokens": 0, "shards": []})
    monkeypatch.setattr(pretokenized_downloader, "list_files", lambda *_: [
        types.SimpleNamespace(path=f"fineweb_{name}_000000.bin", size=10**18)
        for name in ("val", "train")])
    monkeypatch.setattr(pretokenized_downloader, "fetch", None)  # nothing is downloaded
    monkeypatch.setattr("sys.argv", ["pretokenized_downloader.py", "--out-dir", str(tmp_path)])
    assert "MB are free" in user_error(pretokenized_downloader.main)
    assert read_manifest(tmp_path)["source"] == source


def all_foreign_tokens(out: Path) -> list[int]:
    return [token for shard in read_manifest(out)["shards"]
            for token in np.fromfile(out / shard["file"], dtype=np.uint16, offset=1024).tolist()]


# ------------------------------------------------------------------------------- bad input


def test_files_that_cannot_be_read(tmp_path):
    def fails(pattern, *words):
        result = run_script(TEXT, pattern, "--out-dir", tmp_path / "out", "--workers", 1,
                            check=False)
        assert_user_error(result, *words)
        assert not (tmp_path / "out" / "manifest.json").exists()

    fails(tmp_path / "none-*.parquet", "none-*", "matches no file")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    fails(tmp_path / "gone.txt", "gone.txt", "No such file")
    (tmp_path / "broken.parquet").write_bytes(parquet_bytes(tmp_path, TEXTS)[:-50])
    fails(tmp_path / "broken.parquet", "broken.parquet", "damaged")
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "other.parquet")
    fails(tmp_path / "other.parquet", "other.parquet", "column text", "content", "--text-column")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "number.parquet")
    fails(tmp_path / "number.parquet", "number.parquet", "int64")
    (tmp_path / "a.csv").write_text("text\n")
    fails(tmp_path / "a.csv", "a.csv", "no file to read", "1 of another format", ".jsonl")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x y z"}\n' * 9999)[:-20])
    fails(tmp_path / "b.jsonl.gz", "b.jsonl.gz")
    for number, line in enumerate(('{"text": 5}', '{"words": "a"}', "[1]", "not json",
                                   '{"text": "a"', "[" * 99999)):
        (tmp_path / "c.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
        message = user_error(write, [tmp_path / "c.jsonl"], tmp_path / f"c{number}", 2)
        found = "has the keys 'words'" if "words" in line else f"is {line[:60]!r}"
        assert f"c.jsonl line 3 {found}, expected" in message
    (tmp_path / "c.jsonl").write_text('\ufeff{"text": "fine"}\n\n{"text": "repaired"}\n',
                                      encoding="utf-8")
    assert "files: c.jsonl;" in user_error(write, [tmp_path / "c.jsonl"], tmp_path / "c0", 2)
    write([tmp_path / "c.jsonl"], tmp_path / "c", 2)
    assert documents_of(all_tokens(tmp_path / "c")) == ["fine", "repaired"]
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("some words")
    paths = [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.jsonl"]
    (tmp_path / "c.jsonl").write_text("bad\n")
    user_error(write, paths, tmp_path / "d", 2)
    for path in paths:
        path.write_text('{"text": "other words"}')
    assert "another corpus" in user_error(write, paths, tmp_path / "d", 2)


def test_a_corrupt_row_group_is_named(tmp_path, small_parts):
    alphabet = string.ascii_letters + string.digits + " "
    texts = ["".join(random.Random(i).choices(alphabet, k=2500)) for i in range(120)]
    content = bytearray(parquet_bytes(tmp_path, texts))
    path, out = tmp_path / "a.parquet", tmp_path / "out"
    path.write_bytes(content)
    with documents.open_parquet(path, "text") as file:
        page = file.metadata.row_group(3).column(0).data_page_offset
    damaged = content.copy()
    damaged[page : page + 20] = b"\xff" * 20
    path.write_bytes(damaged)
    message = user_error(write, [path], out, 120_000)
    assert "row group 3" in message and "a.parquet" in message


def test_a_folder_of_another_corpus_is_refused(tmp_path, parquet):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("manifest.json", "progress.json"):
        (out / name).write_text(json.dumps({"shards": [], "source": {"name": "other"}}))
        result = run_script(TEXT, parquet, "--out-dir", out, check=False)
        assert_user_error(result, "holds another corpus", "source")
        (out / name).unlink()
    write(TEXTS, tmp_path / "a")
    manifest = read_manifest(tmp_path / "a")
    manifest["tokenizer"]["sha256"]["vocab.json"] = "other"
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    assert "tokenizer" in user_error(write, TEXTS, tmp_path / "a")


# ---------------------------------------------------------------------------- sources that change


def prose(seed: int, words: int = 60_000) -> str:
    return " ".join(random.Random(seed).choices(["some", "words", "of", "a", "document"], k=words))


def build_from_files(pattern, out: Path, shard_tokens: int = 2000, separator=None, **options):
    """What text_to_shards.py does, with small shards."""
    description, source = local_source([str(pattern)], separator=separator)
    return write_corpus(description, lambda: source, out, name="text", shard_tokens=shard_tokens,
                        **options)


def edit_in_place(path: Path) -> None:
    """Changes one byte in the middle, and neither the length nor the time of modification."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    with open(path, "r+b") as file:
        file.write(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_source_edited_under_an_unfinished_build_is_refused(tmp_path, monkeypatch, small_parts):
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text(prose(0))
    stop_at("before replace 9", monkeypatch, out, path, build_from_files)
    edit_in_place(path)
    before = file_bytes(out)
    message = user_error(build_from_files, path, out)
    assert "changed files: a.txt; use another --out-dir" in message
    assert file_bytes(out) == before
    path.write_text(prose(1))  # of another length
    assert "a.txt" in user_error(build_from_files, path, out)


def test_every_change_of_a_finished_source_is_named(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(prose(ord(name)))
    build_from_files(folder, out)
    os.utime(folder / "b.txt", (1, 1))  # touched, not edited
    build_from_files(folder, out)
    edit_in_place(folder / "a.txt")
    assert "corpus: changed files: a.txt;" in user_error(build_from_files, folder, out)
    edit_in_place(folder / "a.txt")  # and back
    (folder / "b.txt").unlink()
    (folder / "d.txt").write_text("new")
    assert "changed files: b.txt, d.txt;" in user_error(build_from_files, folder, out)
    (folder / "a.txt").write_text("")
    (folder / "c.txt").write_text("")
    message = user_error(build_from_files, folder, out)
    assert "changed files: a.txt, b.txt, c.txt, d.txt;" in message


def test_a_file_that_changes_while_it_is_read_stops_the_build(tmp_path, small_parts):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(prose(ord(name)))
    description, source = local_source([str(folder)])

    def edited_in_the_middle():
        parts, real = 0, source.open_unit

        def open_unit(unit):
            nonlocal parts
            for part in real(unit):
                parts += 1
                if parts == 2500:
                    edit_in_place(folder / "b.txt")
                yield part

        source.open_unit = open_unit
        return source

    message = user_error(write_corpus, description, edited_in_the_middle, out, name="files",
                         shard_tokens=2000)
    assert "b.txt changed while it was read" in message
    before = file_bytes(out)  # with shards of the text before the edit
    assert "changed files: b.txt;" in user_error(build_from_files, folder, out)
    assert file_bytes(out) == before and "manifest.json" not in before


def test_a_table_that_changes_before_a_part_is_read_stops_the_build(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=20)
    parts = list(file_source([path]).open_unit(0))  # as they wait for a worker
    assert list(parts[0].read()) == TEXTS[:20]
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[::-1]}), path, row_group_size=20)
    assert "a.parquet changed while it was read" in user_error(lambda: list(parts[1].read()))


def test_the_order_of_files_does_not_depend_on_how_they_are_given(tmp_path, monkeypatch):
    for name in ("here/notes", "zbooks"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.txt").write_text(name)
    monkeypatch.chdir(tmp_path / "here")
    for inputs in (["notes", str(tmp_path / "zbooks")], [str(tmp_path / "zbooks"), "../here/notes"],
                   [str(tmp_path / "here" / "notes"), "../zbooks"]):
        assert [path.read_text() for path in select_files(inputs)[0]] == ["here/notes", "zbooks"]


def test_a_path_with_spaces_is_quoted_in_advice(tmp_path):
    out = tmp_path / "my corpus"
    write(TEXTS, out)
    (out / "x_val_000000.npy").write_bytes(b"")
    assert f"rm -f '{out}/x_val_000000.npy'" in user_error(verify_corpus, out)


def lines(seed: int, count: int) -> str:
    return "".join(json.dumps({"text": f"{seed} {i} some words"}) + "\n" for i in range(count))


def test_a_damaged_line_is_found_before_anything_is_written(tmp_path, small_parts):
    """Then no shard holds text of the damaged file, and the repaired one may be any."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name, seed in [("a", 1), ("b", 2), ("c", 3)]:
        (folder / f"{name}.jsonl").write_text(lines(seed, 300) + "damage\n" * (name == "b"))
    assert "b.jsonl line 301" in user_error(build_from_files, folder, out)
    assert not out.exists()
    (folder / "b.jsonl").write_text(lines(4, 200))
    build_from_files(folder, out)
    assert read_manifest(out)["documents"] == 800
    (folder / "b.jsonl").write_text(lines(5, 200))
    assert "changed files: b.jsonl; use another --out-dir" in user_error(
        build_from_files, folder, out)


def test_a_damaged_file_behind_the_text_that_is_measured(tmp_path, small_parts, monkeypatch):
    """The build stops there; a change of any file then needs another folder."""
    monkeypatch.setattr(documents, "MEASURED_BYTES", 5000)
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name, seed in [("a", 1), ("b", 2), ("c", 3)]:
        (folder / f"{name}.jsonl").write_text(lines(seed, 600) + "damage\n" * (name == "b"))
    assert "b.jsonl line 601" in user_error(build_from_files, folder, out, 500)
    before = file_bytes(out)
    (folder / "b.jsonl").write_text(lines(2, 600))
    assert "changed files: b.jsonl;" in user_error(build_from_files, folder, out, 500)
    assert file_bytes(out) == before and "manifest.json" not in before
    (folder / "c.jsonl").write_text("damage\n" + lines(3, 600))  # a first part is read at once
    assert "c.jsonl line 1 is 'damage'" in user_error(build_from_files, folder, out, 500)


# ---------------------------------------------------------------- how a corpus is cut into shards


@pytest.mark.parametrize("tokens, expected", [
    (0, 1), (1, 1), (9, 2), (750, 187), (4000, 1000), (4200, 1025), (20_000, 1025),
    (11_000_000, 550_000), (300_000_000, 10_485_761), (10**13, 10_485_761)])
def test_the_validation_split_follows_from_the_size(tokens, expected):
    assert text_to_shards.validation_tokens(tokens) == expected


@pytest.mark.parametrize("copies", [1, 20, 1000])
def test_no_size_needs_a_flag(tmp_path, copies, monkeypatch, capsys):
    """A single sentence, a page, a book: a validation split for the loader, all else in one shard,
    read once by the tokenizer."""
    text = "Once upon a time, there was a cat in the old house. " * copies
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "a.txt"), "--out-dir",
                                      str(tmp_path / "out"), "--workers", "1"])
    text_to_shards.main()
    val, train = (shard["tokens"] for shard in read_manifest(tmp_path / "out")["shards"])
    assert val + train == 1 + len(encode(text)) and 0.04 * train < val <= max(3, train / 3)
    loaders = [TokenLoader(tmp_path / "out", split, sequence_length=8, micro_batch_size=1,
                           total_batch_size=8, vocab_size=50257) for split in ("train", "val")]
    loaders[0].batch(0, 0)
    assert sum((targets >= 0).sum() for _, targets in loaders[1].eval_batches(10**9)) == val - 1
    assert f"the first {val:,} for validation" in capsys.readouterr().out


def test_shards_after_the_first_have_their_usual_size(tmp_path, monkeypatch):
    monkeypatch.setattr(text_to_shards, "SHARD_TOKENS", 5000)
    (tmp_path / "a.txt").write_text("some words of a document " * 4000)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "a.txt"), "--out-dir",
                                      str(tmp_path / "out"), "--workers", "1"])
    text_to_shards.main()
    sizes = [shard["tokens"] for shard in read_manifest(tmp_path / "out")["shards"]]
    assert sizes == [1250, 5000, 5000, 5000, 3752]  # 100,000 characters


@pytest.mark.parametrize("suffix, least", [(".jsonl", 0.9), (".parquet", 0.9), (".jsonl.gz", 0.1)])
def test_a_large_corpus_is_measured_in_part(tmp_path, monkeypatch, suffix, least):
    """The rest is estimated from what was read. Other columns, here nine tenths of the bytes, do
    not count: else a split by their size would leave nothing to train on."""
    texts = [json.loads(line)["text"] for line in lines(1, 900).splitlines()]
    rows = [{"id": i, "page": 9 * text.upper(), "text": text} for i, text in enumerate(texts)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for name in "ab":
        path = tmp_path / f"{name}{suffix}"
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=300)
        else:
            path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    size = documents.local_source([str(tmp_path)])[1].text_bytes
    assert size == 2 * sum(map(len, texts))
    monkeypatch.setattr(documents, "PART_BYTES", 2000)
    monkeypatch.setattr(documents, "MEASURED_BYTES", size // 10)
    read = []
    real = documents.open_parts

    def open_parts(path, **options):
        for part in real(path, **options):
            yield documents.Part(lambda part=part: read.append(part) or part.read())

    monkeypatch.setattr(documents, "open_parts", open_parts)
    assert least * size <= documents.local_source([str(tmp_path)])[1].text_bytes <= 1.1 * size
    assert 1 < len(read) < sum(len(list(real(path))) for path in tmp_path.iterdir()) / 2


@pytest.mark.parametrize("moment", ["before replace 1", "after replace 2", "before replace 3",
                                    "after replace 4", "before replace 5"])
def test_text_to_shards_killed_anywhere_ends_with_the_same_bytes(tmp_path, monkeypatch, moment):
    (tmp_path / "a.jsonl").write_text(lines(1, 2000) + '{"text": ""}\n')

    def build(_, out):
        monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "a.jsonl"), "--out-dir", str(out),
                                          "--workers", "1"])
        text_to_shards.main()

    stop_at(moment, monkeypatch, tmp_path / "out", None, build)
    build(None, tmp_path / "out")
    build(None, tmp_path / "expected")
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "expected")


def test_no_input_or_folder_is_one_line(tmp_path, monkeypatch, capsys):
    for argv in ([], [tmp_path], ["--out-dir", tmp_path]):
        message = main_error(text_to_shards.main, argv, monkeypatch, capsys)
        assert "INPUT... --out-dir DIR" in message
    (tmp_path / "a.txt").write_text(" ")
    message = main_error(text_to_shards.main, [tmp_path / "a.txt", tmp_path / "b.txt", "--out-dir",
                                               tmp_path / "out"], monkeypatch, capsys)
    assert "b.txt does not exist" in message
    (tmp_path / "a.txt").write_text("")
    message = main_error(text_to_shards.main, [tmp_path / "a.txt", "--out-dir", tmp_path / "out",
                                               "--workers", "1"], monkeypatch, capsys)
    assert message.endswith("all 0 tokens fit into the first shard, for validation: give more text")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


# ------------------------------------------------------------------------- which files are read


def test_a_folder_and_a_glob_read_the_same_files(tmp_path):
    folder = tmp_path / "in"
    text, row = "some words", '{"text": "a row"}\n'
    contents = {"a.txt": text, "B.TXT": text, "c.JSONL": row, "d.json": row, "sub/e.txt": text,
                "sub/.ipynb_checkpoints/e.txt": text, "._a.txt": text, ".hidden/f.txt": text,
                "notes.md": text, "sub/table.csv": text, "f.txt.bak": text}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder / "g.json.gz").write_bytes(gzip.compress(row.encode()))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "h.txt").write_text(text)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "z.txt").symlink_to(folder / "a.txt")
    os.mkfifo(folder / "pipe.txt")
    names = ["B.TXT", "a.txt", "c.JSONL", "d.json", "g.json.gz", "linked/h.txt", "sub/e.txt"]
    expected = [folder / name for name in names]

    def selected(*inputs):
        paths, skipped = select_files(list(map(str, inputs)))
        return paths, Counter(skipped.values())

    assert selected(folder) == (expected, {"hidden": 3, "of another format": 4,
                                           "a link to another": 2})
    for pattern in ("*", "**"):
        assert selected(folder / pattern)[0] == expected
    assert selected(folder / "**" / "*.[tT]*")[0] == [
        path for path in expected if path.suffix.lower() == ".txt"]
    assert selected(folder / "*.[tT]*")[1] == {"a link to another": 1, "of another format": 2}
    assert selected(folder / ".hidden")[0] == [folder / ".hidden" / "f.txt"]
    assert selected(folder / ".h*" / "*.txt")[0] == [folder / ".hidden" / "f.txt"]
    assert selected(folder / "sub", folder / "d.json", folder / "*.txt", folder / "a.txt")[0] == [
        folder / name for name in ("a.txt", "d.json", "sub/e.txt")]
    brackets = tmp_path / "a[1]"
    brackets.mkdir()
    (brackets / "x.txt").write_text(text)
    assert selected(brackets)[0] == [brackets / "x.txt"]


def test_what_was_read_and_skipped_is_printed(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.TXT", "c.md", ".d.txt"):
        (tmp_path / "in" / name).write_text("some words, " * 20)
    result = run_script(TEXT, "in", f"{tmp_path}/in/b.*", "--out-dir", "out", cwd=tmp_path)
    assert ("reading 2 files: 2 .txt; skipped: 1 a link to another, 1 hidden, 1 of "
            "another format\n") in result.stdout
    assert read_manifest(tmp_path / "out")["source"]["files"].keys() == {"a.txt", "b.TXT"}


def test_a_corpus_inside_the_folder_of_its_files_is_not_read(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(prose(0))
    for _ in range(2):
        build_from_files(tmp_path, tmp_path / "out")
    assert "already complete" in capsys.readouterr().out


def test_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("text")
    real = os.listdir

    def listdir(path):  # root may read everything, so the error is simulated
        if os.path.basename(path) == "sub":
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(PermissionError) as caught:  # run_main prints it in one line
        select_files([str(tmp_path)])
    assert caught.value.filename == str(tmp_path / "sub")


# --------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("part_bytes", [60, 10**6])
def test_a_byte_order_mark_never_becomes_a_token(tmp_path, monkeypatch, encoding, part_bytes):
    monkeypatch.setattr(documents, "PART_BYTES", part_bytes)
    text = "naïve 日本 text, \U0001f600 " * 30
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    row = (json.dumps({"text": text}) + "\n").encode(encoding)
    (tmp_path / "b.jsonl").write_bytes(row * 2)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(row * 2))
    build_from_files(tmp_path / "[abc].*", tmp_path / "out", 100)
    assert documents_of(all_tokens(tmp_path / "out")) == [text] * 5


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", "plain words\n".encode("utf-16-le") * 9, "UTF-16"),
    ("a.txt", "日本語。\n".encode("utf-16-be") * 9, "iconv"),
    ("a.txt", "words\n".encode("utf-16"), "from UTF-16 with `iconv"),  # with a byte-order mark
    ("a.txt", "日本語。".encode("utf-16"), "iconv"),
    ("a.txt", "日本語。".encode("utf-32"), "iconv"),
    ("a.txt", "Il était une fois un café.\n".encode("latin-1") * 9, r"WINDOWS-1252"),
    ("a.txt", ("It was plain. " * 999 + "A caf\xe9. ").encode("latin-1"), r"plain. A caf\xe9. "),
    ("a.txt", "日本語の文章。\n".encode("shift-jis") * 9, "not UTF-8"),
    ("a.txt", bytes(range(256)) * 9, "binary"),
    ("a.txt", gzip.compress(prose(0).encode())[:9000], "a.txt is"),
    ("a.jsonl", '{"text": "a row"}\n'.encode("utf-16") * 9, "UTF-16"),
    ("a.jsonl", '{"text": "un café"}\n'.encode("latin-1") * 9, "not UTF-8"),
    *[(name, b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "lfs")
      for name in ("a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet")]])
def test_what_is_not_utf8_text_is_refused(tmp_path, name, content, words):
    (tmp_path / "0.txt").write_text("good " * 99)
    (tmp_path / name).write_bytes(content)
    message = user_error(build_from_files, tmp_path, tmp_path / "out", 50)
    assert str(tmp_path / name) in message and words in message
    assert not (tmp_path / "out" / "progress.json").exists()  # found before anything is written


def test_another_encoding_behind_the_first_bytes_is_refused(tmp_path, small_parts):
    (tmp_path / "a.txt").write_bytes(prose(0).encode() + " un café".encode("latin-1") * 99)
    assert "not UTF-8" in user_error(build_from_files, tmp_path / "a.txt", tmp_path / "out")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("late", [False, True])
def test_a_rare_invalid_byte_is_repaired_wherever_it_is(tmp_path, monkeypatch, suffix, late):
    """One in so many characters of the file, not of a block, of which the last may be short."""
    monkeypatch.setattr("minigpt2.files.RARE", 400)
    monkeypatch.setattr(documents, "PART_BYTES", 500)
    lines = [b"It was plain.\n" if suffix == ".txt" else b'{"text": "It was plain."}\n'] * 40
    lines.insert(40 if late else 0, lines[0].replace(b"plain", b"caf\xe9"))
    (tmp_path / f"a{suffix}").write_bytes(b"".join(lines))
    manifest = build_from_files(tmp_path / f"a{suffix}", tmp_path / "out", 50)
    assert manifest["outcomes"]["repaired"] == 1


def test_invalid_bytes_late_in_a_large_text_are_still_refused(tmp_path, monkeypatch):
    """What came before counts as one block at most: else a large file could hold any number."""
    monkeypatch.setattr("minigpt2.files.RARE", 400)
    monkeypatch.setattr(documents, "PART_BYTES", 500)
    (tmp_path / "a.txt").write_bytes(b"It was plain.\n" * 800 + b"A caf\xe9.\n" * 9)
    assert "not UTF-8" in user_error(build_from_files, tmp_path / "a.txt", tmp_path / "out", 50)


# -------------------------------------------------------- <|endoftext|> between stories in a file


@pytest.mark.parametrize("part_bytes", [30, 200, 10**6])
def test_stories_in_one_file_are_split_on_request(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr(documents, "PART_BYTES", part_bytes)
    stories = [f"Once upon a time, {i}.\n\nThe end of <it>." + "x" * (i % 9 * 11)
               for i in range(80)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(stories) + "\n<|endoftext|>\n")
    (tmp_path / "b.txt").write_text("<|endoftext|>" + "<|endoftext|>".join(stories))
    (tmp_path / "c.txt").write_text("one story\n")
    (tmp_path / "d.jsonl").write_text('{"text": "no <|endoftext|> here"}\n')
    manifest = build_from_files(tmp_path / "*", tmp_path / "out", 300,
                                separator="<|endoftext|>")
    assert documents_of(all_tokens(tmp_path / "out")) == [
        *stories, *stories, "one story", "no <|endoftext|> here"]
    assert manifest["outcomes"] == Counter(empty=0, failed=0, repaired=0, cut=0, marked=1)
    other = user_error(build_from_files, tmp_path / "*.*", tmp_path / "out", 300)
    assert "'separator': None" in other


def test_a_separator_with_line_ends_is_found_in_windows_files(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"One\r\nstory.\r\n\r\nAnother.\r\n" * 300)
    for number, given in enumerate((r"\n\n", "\n\n", "\r\n\r\n")):
        out = tmp_path / str(number)
        monkeypatch.setattr("sys.argv", ["x", str(tmp_path / "a.txt"), "--out-dir", str(out),
                                         "--separator", given, "--workers", "1"])
        text_to_shards.main()
        assert documents_of(all_tokens(out))[:3] == ["One\nstory.", "Another.\nOne\nstory.",
                                                     "Another.\nOne\nstory."]


def test_an_output_folder_that_holds_an_input_is_refused(tmp_path, monkeypatch, capsys):
    """Advice to delete the output would delete the input."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("words " * 5000)
    for given in (texts, texts / "a.txt", texts / "*.txt"):
        message = main_error(text_to_shards.main, [str(given), "--out-dir", str(texts)],
                             monkeypatch, capsys)
        assert "holds an input: use a folder of its own" in message
    monkeypatch.setattr("sys.argv", ["x", str(texts), "--out-dir", str(texts / "out")])
    text_to_shards.main()
    assert read_manifest(texts / "out")["tokens"] > 5000


@pytest.mark.parametrize("separator", ["\n\n\n", "\n", " -- ", "==", "the end of it"])
@pytest.mark.parametrize("part_bytes", [15, 30, 10**6])
def test_any_separator_is_found_wherever_a_file_is_cut(tmp_path, monkeypatch, separator,
                                                       part_bytes):
    monkeypatch.setattr(documents, "PART_BYTES", part_bytes)
    texts = [f"A story  of {i}, the -" + "x " * (i % 9) + "." + "=" * (i % 2) for i in range(40)]
    path, whole = tmp_path / "a.txt", separator.join(texts) + separator
    path.write_text(whole, newline="")
    texts = [text.strip("\r\n") for text in whole.split(separator) if text]  # "===": "==", "="
    parts = list(file_source([path], separator=separator).open_unit(0))
    found = []
    for part in parts:
        for number, text in enumerate(part.read()):
            if part.continues and number == 0:
                found[-1] += text
            else:
                found.append(text)
    assert found == texts and (len(parts) > 30) == (part_bytes < 10**6)


def test_endoftext_in_the_text_is_reported(tmp_path):
    (tmp_path / "a.txt").write_text("a story\n<|endoftext|>\nanother story<|endoftext|>")
    result = run_script(TEXT, tmp_path / "a.txt", "--out-dir", tmp_path / "out")
    assert ("2 times <|endoftext|> in the text, tokenized as plain text (text_to_shards.py "
            "--separator '<|endoftext|>' splits .txt files there)\n") in result.stdout
    assert "1 documents" in result.stdout
    result = run_script(TEXT, tmp_path / "a.txt", "--out-dir", tmp_path / "split", "--separator",
                        "<|endoftext|>")
    assert "2 documents" in result.stdout and "times" not in result.stdout
    assert documents_of(all_tokens(tmp_path / "split")) == ["a story", "another story"]


def test_line_ends_and_another_column_on_the_command_line(tmp_path):
    (tmp_path / "a.txt").write_text("a story\r\n\r\nwith two lines\r\nanother story\n")
    run_script(TEXT, tmp_path / "a.txt", "--out-dir", tmp_path / "lines", "--separator", "\\n")
    assert documents_of(all_tokens(tmp_path / "lines")) == ["a story", "with two lines",
                                                            "another story"]
    table = pyarrow.table({"story": TEXTS[:5], "text": ["no"] * 5})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"story": text}) + "\n"
                                              for text in TEXTS[5:9]))
    arguments = [TEXT, tmp_path / "a.parquet", tmp_path / "b.jsonl", "--out-dir", tmp_path / "out"]
    result = run_script(*arguments, "--text-column", "story", "--separator", "x")
    assert "--separator is ignored for these files" in result.stdout
    result = run_script(TEXT, tmp_path / "a.txt", "--out-dir", tmp_path / "txt", "--text-column",
                        "story")
    assert "--text-column is ignored for these files" in result.stdout
    assert documents_of(all_tokens(tmp_path / "out")) == TEXTS[:9]
    wrong = run_script(*arguments, "--text-column", "words", check=False)
    assert_user_error(wrong, "column words", "'story': 'string'", "--text-column")


# ---------------------------------------------------------------------------- column types


@pytest.mark.parametrize("kind", [
    pyarrow.large_string(), pyarrow.string_view(),
    pyarrow.dictionary(pyarrow.int32(), pyarrow.string())], ids=str)
def test_every_type_of_text_column_is_read(tmp_path, kind):
    texts = [*TEXTS, None, ""]
    table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string()).cast(kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=20)
    with documents.open_parquet(tmp_path / "a.parquet", "text") as file:
        assert file.schema_arrow.field("text").type == kind
    write([tmp_path / "a.parquet"], tmp_path / "out")
    assert documents_of(all_tokens(tmp_path / "out")) == TEXTS
