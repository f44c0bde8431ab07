import json
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.common import llmc_bytes, make_corpus, make_foreign, user_error, write_shard

from dataloader import TokenLoader, permutation
from minigpt2.loss import IGNORE_INDEX
from minigpt2.shards import open_shard, read_manifest

T = 16


def loader(data_dir, *, split="train", micro_batch_size=2, rows=8, rank=0, world_size=1, seed=7,
           **options) -> TokenLoader:
    options = {"sequence_length": T, "vocab_size": 50257} | options
    return TokenLoader(data_dir, split, micro_batch_size=micro_batch_size,
                       total_batch_size=rows * options["sequence_length"], seed=seed, rank=rank,
                       world_size=world_size, **options)


def global_batch(data_dir, step, micro_batch_size, world_size, rows=8) -> torch.Tensor:
    """The inputs of one step, collected from every rank's micro-batches."""
    ranks = [loader(data_dir, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size,
                    rows=rows) for rank in range(world_size)]
    return torch.cat([ranks[rank].batch(step, micro_step)[0]
                      for micro_step in range(rows // (micro_batch_size * world_size))
                      for rank in range(world_size)])


def test_targets_are_the_inputs_shifted_by_one(corpus):
    inputs, targets = loader(corpus).batch(0, 0)
    assert inputs.shape == targets.shape == (2, T) and inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    shard, start = loader(corpus).locate(0)
    stored = np.load(corpus / f"shard_{shard + 1:06d}.npy")
    assert inputs[0].tolist() == stored[start : start + T].tolist()
    assert targets[0].tolist() == stored[start + 1 : start + T + 1].tolist()


def test_every_epoch_visits_each_window_once_in_a_new_order(corpus):
    data = loader(corpus)
    windows = data.windows_per_epoch
    assert windows == 3 * 62
    epochs = [[data.locate(epoch * windows + i) for i in range(windows)] for epoch in range(6)]
    every = {(shard, start) for shard in range(3) for start in range(0, 62 * T, T)}
    for order in epochs:
        assert set(order) == every and len(order) == len(every)
    assert epochs[0] != epochs[1] != epochs[2]
    shards_in_order = [list(dict.fromkeys(shard for shard, _ in order)) for order in epochs]
    assert len({tuple(order) for order in shards_in_order}) > 1  # shards are shuffled, too
    starts = [start for _, start in epochs[0][:62]]
    assert starts != sorted(starts)


def test_batch_is_a_pure_function_of_its_arguments(corpus):
    first, second = loader(corpus), loader(corpus)
    for step in (29, 3, 0, 17):  # in any order, across the epoch boundary at step 23
        first.batch(step + 1, 0)
        assert torch.equal(first.batch(step, 1)[0], second.batch(step, 1)[0])
    assert not torch.equal(first.batch(0, 0)[0], loader(corpus, seed=8).batch(0, 0)[0])
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first.batch(5, 0)
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == np.random.get_state()[1].tolist()


@pytest.mark.parametrize("micro_batch_size, world_size", [(8, 1), (1, 1), (2, 2), (1, 8), (2, 4)])
def test_global_batch_does_not_depend_on_its_split(corpus, micro_batch_size, world_size):
    for step in (0, 22, 23, 24):  # an epoch ends inside step 23: 186 windows, 8 per step
        expected = global_batch(corpus, step, 8, 1)
        assert torch.equal(global_batch(corpus, step, micro_batch_size, world_size), expected)


def test_ranks_see_different_windows(corpus):
    rows = torch.cat([loader(corpus, rank=rank, world_size=4).batch(0, 0)[0] for rank in range(4)])
    assert len({tuple(row.tolist()) for row in rows}) == 8


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("sequence_length", [16, 7, 1000])
@pytest.mark.parametrize("max_tokens", [10**9, 699, 100, 1])
def test_validation_counts_every_target_once(corpus, world_size, sequence_length, max_tokens):
    stored = np.load(corpus / "shard_000000.npy").tolist()
    pairs = Counter()
    for rank in range(world_size):
        data = loader(corpus, split="val", rank=rank, world_size=world_size,
                      sequence_length=sequence_length)
        for inputs, targets in data.eval_batches(max_tokens):
            assert inputs.min() >= 0
            keep = targets != IGNORE_INDEX
            pairs.update(zip(inputs[keep].tolist(), targets[keep].tolist(), strict=True))
    count = min(max_tokens, len(stored) - 1)
    assert pairs == Counter(zip(stored[:count], stored[1 : count + 1], strict=True))


def test_the_order_of_a_seed_never_changes():
    """Golden: a resumed run must see the windows it would have seen, whatever NumPy it has."""
    assert permutation(10, 1337, 0).tolist() == GOLDEN_ORDER
    assert sorted(permutation(1000, 1, 2, 3)) == list(range(1000))
    streams = [permutation(50, *stream).tolist() for stream in [(7,), (7, 0), (7, 0, 0), (0, 7)]]
    assert len({tuple(order) for order in streams}) == 4


GOLDEN_ORDER = [8, 4, 9, 0, 7, 3, 1, 2, 5, 6]


@pytest.mark.parametrize("micro_steps", [1, 3])
def test_the_stream_is_the_batches_in_order(corpus, micro_steps):
    data, moved = loader(corpus), []
    stream = data.stream(5, micro_steps, lambda tensor: moved.append(1) or tensor + 0)
    for step in (5, 6, 7):
        for micro_step in range(micro_steps):
            inputs, targets = next(stream)
            expected = data.batch(step, micro_step)
            assert torch.equal(inputs, expected[0]) and torch.equal(targets, expected[1])
    stream.close()
    assert len(moved) in (6 * micro_steps, 6 * micro_steps + 2)  # at most one batch ahead


def test_an_error_in_the_prefetch_thread_is_raised(tmp_path):
    data = make_corpus(tmp_path / "d", [100, 400])
    write_shard(data / "shard_000001.npy", np.full(400, 60_000, dtype=np.uint16))
    assert "60000" in user_error(next, loader(data).stream(0, 1, lambda tensor: tensor))


@pytest.mark.parametrize("form", ["llm.c", "nanoGPT", "build-nanogpt"])
def test_foreign_shards_give_the_same_batches(corpus, tmp_path, form):
    foreign = make_foreign(corpus, tmp_path / "foreign", form)
    assert read_manifest(foreign)["tokens"] == read_manifest(corpus)["tokens"]
    for split in ("train", "val"):
        for step in (0, 9, 24):
            ours, theirs = loader(corpus, split=split), loader(foreign, split=split)
            assert torch.equal(ours.batch(step, 1)[1], theirs.batch(step, 1)[1])
        ours, theirs = (list(data.eval_batches(10**6)) for data in (ours, theirs))
        assert all(torch.equal(a[1], b[1]) for a, b in zip(ours, theirs, strict=True))


def test_the_format_is_detected_from_the_content(tmp_path):
    tokens = np.arange(1000, dtype=np.uint16)
    path = tmp_path / "misleading.npy"
    write_shard(path, tokens)
    as_save = tmp_path / "saved.npy"
    np.save(as_save, tokens)
    assert path.read_bytes() == as_save.read_bytes()
    path.write_bytes(tokens.tobytes())
    assert open_shard(path, 1000).tolist() == tokens.tolist()
    path.write_bytes(llmc_bytes(tokens))
    assert open_shard(path).tolist() == tokens.tolist()
    path.write_bytes(llmc_bytes(tokens, announced=1001))
    assert "1,001" in user_error(open_shard, path)
    path.write_bytes(llmc_bytes(tokens, version=2))
    assert "version 2" in user_error(open_shard, path)
    path.write_bytes(llmc_bytes(tokens[:0]))
    assert "truncated" in user_error(open_shard, path)


def test_shards_are_memory_mapped(corpus):
    shard = loader(corpus).shards[0]
    assert isinstance(shard, np.memmap) and shard.dtype == np.uint16


# ------------------------------------------------------------------------------- bad input


def test_missing_and_empty_folders(tmp_path):
    assert "does not exist" in user_error(loader, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "no foreign shards" in user_error(loader, tmp_path / "empty")
    for path in (tmp_path / "my text.txt", tmp_path / "my texts" / "a.txt"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("some words")
        given = path if path.name == "my text.txt" else path.parent
        assert (f"python pretrain_data/text_to_shards.py '{given}' --out-dir DIR"
                in user_error(loader, given))
    (tmp_path / "empty" / ".x_train_000001.npy.partial").write_bytes(bytes(99))
    message = user_error(loader, tmp_path / "empty")  # a run that was killed before its manifest
    assert "manifest.json" in message and "pretrain_data/" in message
    (tmp_path / "empty" / "progress.json").write_text("{}")
    (tmp_path / "empty" / "val.bin").write_bytes(bytes(100))  # a ready-made shard, so far
    assert "unfinished" in user_error(loader, tmp_path / "empty")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"shards": [{}]}', '{"shards": [3]}'])
def test_an_invalid_manifest(corpus, text):
    (corpus / "manifest.json").write_text(text)
    assert "manifest.json" in user_error(loader, corpus)


def test_a_vocabulary_of_its_own_is_refused(corpus, tmp_path):
    foreign = make_foreign(corpus, tmp_path / "foreign", "nanoGPT")
    (foreign / "meta.pkl").write_bytes(b"is not opened")
    message = user_error(loader, foreign)
    assert "meta.pkl" in message and "text_to_shards.py" in message


@pytest.mark.parametrize("dtype", ["<u4", "<i4", "<i8"])
@pytest.mark.parametrize("high", [50_257, 128_256])
def test_ids_of_more_than_16_bits_are_refused(tmp_path, dtype, high):
    ids = np.random.RandomState(0).randint(0, high, 5000).astype(dtype)
    (tmp_path / "train.bin").write_bytes(ids.tobytes())
    message = user_error(loader, tmp_path)
    assert "train.bin" in message and "uint32" in message


@pytest.mark.parametrize("magic", [20240522, 20240801, 20240326, 20240328])
def test_other_files_of_llmc_are_refused(corpus, tmp_path, magic):
    """Evaluation data such as hellaswag_val.bin, uint32 tokens, models and tokenizers."""
    foreign = make_foreign(corpus, tmp_path / "foreign", "llm.c")
    header = np.array([magic, 1, 7, 900] + [0] * 252, dtype=np.int32).tobytes()
    (foreign / "hellaswag_val.bin").write_bytes(header + bytes(9000))
    message = user_error(loader, foreign)
    assert "hellaswag_val.bin" in message and "llm.c" in message and "move it" in message


def damage(corpus, change) -> str:
    path = corpus / "shard_000002.npy"
    change(path)
    message = user_error(loader, corpus)
    assert "shard_000002.npy" in message and "delete it and rerun the command" in message
    return message


def test_damaged_shards_are_named(corpus):
    whole = (corpus / "shard_000002.npy").read_bytes()
    assert "truncated" in damage(corpus, lambda path: path.write_bytes(whole[:-1]))
    assert "truncated" in damage(corpus, lambda path: path.write_bytes(whole[:100]))
    assert "truncated" in damage(corpus, lambda path: path.write_bytes(b""))
    assert "expected 1,000" in damage(corpus, lambda path: path.write_bytes(b"hello" * 100))
    assert "truncated" in damage(corpus, lambda path: path.write_bytes(b"hello"))
    assert "int64" in damage(corpus, lambda path: np.save(path, np.zeros(1000, dtype=np.int64)))
    assert "(10, 100)" in damage(corpus, lambda path: np.save(path, np.zeros((10, 100), "uint16")))
    assert "999" in damage(corpus, lambda path: np.save(path, np.zeros(999, dtype=np.uint16)))
    assert "No such file" in damage(corpus, lambda path: path.unlink())


def test_a_pickled_shard_is_not_run(corpus, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    damage(corpus, lambda path: np.save(path, np.array([Bomb()], dtype=object), allow_pickle=True))
    assert not (tmp_path / "ran").exists()


def test_ids_out_of_range_are_named(tmp_path):
    data = make_corpus(tmp_path / "d", [100, 400])
    tokens = np.full(400, 5, dtype=np.uint16)
    tokens[100] = 60_000
    write_shard(data / "shard_000001.npy", tokens)

    def whole_epoch():
        for step in range(3):
            for micro_step in range(4):
                loader(data).batch(step, micro_step)

    message = user_error(whole_epoch)
    assert "60000" in message and "shard_000001.npy" in message and "50257" in message


def test_a_split_shorter_than_a_window(tmp_path):
    data = make_corpus(tmp_path / "d", [5, 10, 12])
    message = user_error(loader, data)
    assert "--sequence-length" in message and "train" in message
    assert loader(data, split="val").windows_per_epoch == 0  # short, yet enough to validate on
    manifest = read_manifest(data)
    manifest["shards"] = manifest["shards"][1:]
    (data / "manifest.json").write_text(json.dumps(manifest))
    assert "0 val shards" in user_error(loader, data, split="val")


def test_an_interrupted_shard_write_leaves_no_shard(tmp_path, monkeypatch):
    path = tmp_path / "a.npy"
    write_shard(path, np.arange(10, dtype=np.uint16))

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError) as caught:
        write_shard(path, np.arange(20, dtype=np.uint16))
    assert caught.value.filename == str(path)
    assert open_shard(path, 10).tolist() == list(range(10))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npy"]
