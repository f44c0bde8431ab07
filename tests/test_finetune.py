import itertools
import json
import operator
import signal
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers.common import (
    CPU_LAUNCH,
    ROOT,
    TINY,
    main_error,
    main_of,
    run_script,
    run_to_end,
    run_torchrun,
    user_error,
)
from helpers.ranks import Ranks, save_gradients, wait_until
from helpers.training import assert_same_run, stop_in_micro_steps_and_finish
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import chat
import finetune
from dataloader import (
    content_hash,
    make_examples,
    num_inputs,
    read_turns,
    row_batches,
    split_examples,
    split_rows,
    token_ids,
)
from finetune import FinetuneConfig, collate, micro_batches, train
from inference import tokenize_batch_input
from minigpt2 import run
from minigpt2.checkpoint import (
    list_checkpoints,
    load_model,
    load_training_state,
    read_prompt_template,
    save_checkpoint,
)
from minigpt2.distributed import Launch, mean_loss
from minigpt2.loss import IGNORE_INDEX, ROW_MULTIPLE_CPU
from minigpt2.metrics import read_log
from minigpt2.optimizer import learning_rate, make_optimizer
from minigpt2.preferences import padded_length
from minigpt2.run import Run
from minigpt2.tokenizer import ALPACA, EOT_TEXT, EOT_TOKEN, decode, encode, format_prompt, repair
from model import GPT, GPTConfig

SIZES = GPTConfig(block_size=128, vocab_size=TINY.vocab_size, n_layer=2, n_head=2, n_embd=16)
ROWS = [{"instruction": f"Say the word {word} {n} times.", "input": "loudly" * (n % 2),
         "output": f"{word} " * n} for n in range(1, 6)
        for word in ("yes", "no", "perhaps", "never", "<|endoftext|>", "{braces}")]
TURNS = [[(row["instruction"], row["input"], row["output"])] for row in ROWS]


def encoded(rows: list, block_size: int = 128) -> list:
    return make_examples(rows, block_size)[1]


def tiny(base, rows_file, out, **changes) -> FinetuneConfig:
    options = {"checkpoint": str(base), "data": str(rows_file), "out_dir": str(out),
               "batch_size": 8, "micro_batch_size": 4, "max_lr": 1e-2, "val_fraction": 0.1,
               "eval_interval": 4, "sample_tokens": 0, "epochs": 2, "device": "cpu"} | changes
    return FinetuneConfig(**options)


def losses(out) -> list[float]:
    records = read_log(out / "metrics.jsonl")["train"]
    return [records[step]["loss"] for step in sorted(records)]


# ----------------------------------------------------------------------------- the targets


def test_targets_are_the_response_and_endoftext():
    examples = encoded(TURNS)
    inputs, targets = collate(examples, len(ROWS) + 2, max(map(num_inputs, examples)))
    assert inputs.shape == targets.shape == (len(ROWS) + 2, max(map(num_inputs, examples)))
    assert inputs[-2:].eq(0).all() and targets[-2:].eq(IGNORE_INDEX).all()  # rows of padding
    for i, (row, [(prompt, response)]) in enumerate(zip(ROWS, examples, strict=True)):
        length = len(prompt) + len(response) - 1
        labels = targets[i][targets[i] != IGNORE_INDEX].tolist()
        assert labels[-1] == EOT_TOKEN  # the model learns to stop
        assert decode(labels[:-1]) == row["output"]
        assert decode(inputs[i, : len(prompt)].tolist()) == format_prompt(row["instruction"],
                                                                         row["input"])
        assert inputs[i, :length].tolist() == (prompt + response)[:-1]
        assert inputs[i, length:].eq(0).all() and targets[i, length:].eq(IGNORE_INDEX).all()
        assert targets[i, len(prompt) - 1] == response[0]  # position p predicts token p + 1
        assert targets[i, : len(prompt) - 1].eq(IGNORE_INDEX).all()


def test_pad_ids_inside_a_response_are_targets():
    prompt, response = [5, 6], [0, 0, 7, EOT_TOKEN]  # 0 is "!": a token like any other
    _, targets = collate([[(prompt, response)], [([1] * 9, [2])]], 2, 9)
    assert targets[0].tolist() == [IGNORE_INDEX, 0, 0, 7, EOT_TOKEN] + [IGNORE_INDEX] * 4


HOSTILE = ["{instruction} {0} %s {{}}", "### Response:\nno\n\n### Instruction:\nyes", EOT_TEXT,
           " leading space", "\n\nnewlines\n", "日本語 é \u2028 \U0001f469\u200d\U0001f467",
           "lone \ud800 surrogate", "!!", "7"]


def test_what_is_trained_on_is_what_is_sampled():
    """Whatever texts meet at the border of prompt and response."""
    rows = [[(a, b, c)] for a in HOSTILE for b in ("", *HOSTILE[:6]) for c in HOSTILE]
    examples = encoded(rows, 512)
    prompts = [format_prompt(*turn[:2]) for [turn] in rows]
    ids, masks = tokenize_batch_input(prompts)
    inputs, targets = collate(examples, len(rows), max(map(num_inputs, examples)))
    for i, [(_, _, output)] in enumerate(rows):
        sampled = ids[i, : masks[i].sum()].tolist()
        labels = targets[i][targets[i] != IGNORE_INDEX].tolist()
        assert inputs[i, : len(sampled)].tolist() == sampled
        assert labels[-1] == EOT_TOKEN and EOT_TOKEN not in labels[:-1] + sampled
        assert decode(labels) == repair(output) + EOT_TEXT


def test_row_lengths_are_counted_in_tokens():
    long = [("x", "", "日本 " * 40)]  # few characters, many tokens
    text = [("x", "", "word " * 60)]  # more characters, fewer
    keys, examples, summary = make_examples([long, text, [("x", "", " \n")]], 128)
    assert keys == text and len(examples) == 1 and "1 of 3 rows" in summary
    assert "1 without an answer and 1 over 128 tokens" in summary
    fits = encoded([text], num_inputs(examples[0]))
    assert len(fits) == 1 and token_ids(fits[0])[-1] == EOT_TOKEN  # exactly full, its end included
    assert encoded([text], num_inputs(examples[0]) - 1) == []


@pytest.mark.parametrize("output", ["", " \n", "<nooutput>", "<NoOutput>\nIt needs software.",
                                    "<No output>", "<noinput>"])
def test_rows_without_an_answer_are_left_out(output):
    rows = [[("a", "", output)], [("b", "", f"not {output}")], [("c", "", "d"), ("e", "", output)]]
    keys, _, summary = make_examples(rows, 128)
    assert keys == rows[1] and "left out: 2 without an answer and 0 over" in summary


def test_the_first_row_is_shown_with_its_trained_part(base, rows_file, tmp_path, capsys):
    train(tiny(base, rows_file, tmp_path / "a", epochs=1), CPU_LAUNCH)
    assert "### Response:\n[[yes" in capsys.readouterr().out


def first_batches(rows_file, count: int) -> list[list]:
    """The rows of the first steps of `tiny`."""
    rows, _, _ = split_examples(read_turns(rows_file), 128, 0.1)
    return list(itertools.islice(row_batches(rows, num_inputs, 8, 1337, 0), count))


# ------------------------------------------------------------------------ order and splits


KEYS = [(f"Question {n}", "input" * (n % 2), f"answer {n}") for n in range(2000)]


def held_out_keys(keys: list, val_fraction: float) -> set:
    return {key[:2] for key in split_rows(keys, keys, val_fraction)[1]}


def test_a_row_is_held_out_of_every_file_or_of_none():
    assert content_hash("Name three colors.", "") == 0.06674873834986883
    assert content_hash("  name THREE\ncolors.", " ") == content_hash("Name three colors.", "")
    assert content_hash("a", "b") != content_hash("ab", "") != content_hash("", "ab")
    trained, held_out, summary = split_rows(KEYS, KEYS, 0.05)
    assert sorted(trained + held_out) == sorted(KEYS) and 70 < len(held_out) < 130
    assert summary == (f"{len(trained):,} to train on, {len(held_out):,} held out; 0 repeat "
                       "another's prompt")
    pairs = [(a, b, "other") for a, b, _ in KEYS[::-3]]  # some, in another order
    assert held_out_keys(pairs, 0.05) == held_out_keys(KEYS, 0.05) & {key[:2] for key in pairs}
    assert held_out_keys([key[:2] for key in KEYS], 0.05) == held_out_keys(KEYS, 0.05)
    assert held_out_keys(KEYS, 0.05) < held_out_keys(KEYS, 0.15) < held_out_keys(KEYS, 0.9)


def test_at_least_the_lowest_hash_is_held_out_and_never_all():
    assert held_out_keys(KEYS, 0.0) == {min(KEYS, key=lambda key: content_hash(*key[:2]))[:2]}
    assert "--val-fraction 0.999" in user_error(split_rows, KEYS[:3], KEYS[:3], 0.999)
    assert "--val-fraction 0.0" in user_error(split_rows, KEYS[:1], KEYS[:1], 0.0)
    assert "0 usable rows" in user_error(split_rows, [], [], 0.1)


def test_rows_with_equal_prompts_are_on_the_same_side(base, tmp_path, capsys):
    """Copies, also in other case and white space, with equal and with other answers."""
    copies = [{"instruction": f" {row['instruction']}\n".upper(), "input": row["input"],
               "output": f"{row['output']}{n}"} for row in ROWS for n in ("", "", 3)]
    (tmp_path / "rows.json").write_text(json.dumps(ROWS + copies))
    keys = make_examples(read_turns(tmp_path / "rows.json"), 128)[0]
    parts = split_rows(keys, keys, 0.2)
    prompts = [{" ".join(key[0].lower().split()) for key in part} for part in parts[:2]]
    assert sum(map(len, prompts)) == 30 and min(map(len, prompts)) and not prompts[0] & prompts[1]
    assert "90 repeat another's prompt" in parts[2]
    train(tiny(base, tmp_path / "rows.json", tmp_path / "out", epochs=1, batch_size=60),
          CPU_LAUNCH)
    assert "90 repeat another's prompt" in capsys.readouterr().out


def test_a_prompt_of_a_large_share_of_the_rows_is_split_by_response():
    answers = [("Write a story.", "", f"story {n}") for n in range(1000)]
    for keys in (answers, answers + KEYS[:500], answers + KEYS):
        trained, held_out, summary = split_rows(keys * 2, keys * 2, 0.1)
        assert 0.07 < len(held_out) / len(keys * 2) < 0.13
        assert not set(trained) & set(held_out)
        assert "1 prompts of over a fifth of the rows each: split by response" in summary
    fifths = [(f"Write story {n % 5}.", "", str(n)) for n in range(1000)]  # each exactly a fifth
    assert {len(split_rows(fifths, fifths, fraction)[1]) for fraction in (0.0, 0.05)} == {200}
    assert "split by response" not in split_rows(KEYS[:3], KEYS[:3], 0.0)[2]  # nothing repeats
    assert "none of 9 usable rows" in user_error(split_rows, range(9), answers[:1] * 9, 0.2)


# -------------------------------------------------------------------- steps by row length


def test_every_epoch_visits_each_row_once_in_a_new_order():
    lengths = np.random.RandomState(0).randint(1, 300, 500).tolist()
    rows = list(zip(lengths, range(500), strict=True))
    first = operator.itemgetter(0)
    batches = row_batches(rows, first, 7, 1, 0)
    epochs = [[next(batches) for _ in range(72)] for _ in range(3)]
    for epoch in epochs:
        assert list(map(len, epoch)) == [7] * 71 + [3] and sorted(sum(epoch, [])) == sorted(rows)
        widths = [{padded_length(length) for length, _ in batch} for batch in epoch]
        assert sum(len(one) == 1 for one in widths) >= 72 - 2 * 15 and max(map(len, widths)) <= 3
        assert widths != sorted(widths, key=min)  # steps of all lengths alternate
    assert len({str(sorted(map(sorted, epoch))) for epoch in epochs}) == 3  # other steps, too
    assert len({padded_length(epoch[-1][0][0]) for epoch in epochs}) > 1
    for step in (0, 1, 71, 72, 100, 143, 144):  # a pure function of (seed, step)
        assert next(row_batches(rows, first, 7, 1, step)) == sum(epochs, [])[step]
    assert next(row_batches(rows, first, 7, 2, 0)) != epochs[0][0]
    assert sorted(next(row_batches(rows, first, 500, 1, 3))) == sorted(rows)


def test_rows_are_padded_to_few_lengths():
    widths = [padded_length(n) for n in range(1, 1025)]
    assert widths == sorted(widths) and len(set(widths)) == 26 and widths[-1] == 1024
    assert all(n <= width < n + 16 for n, width in zip(range(1, 193), widths, strict=False))
    assert all(width <= n * 7 / 6 for n, width in enumerate(widths, 1) if n > 90)
    assert {width % 16 for width in widths} == {0} == {width % 128 for width in widths[768:]}


@pytest.mark.parametrize("num_rows, batch_size, steps, text", [
    (4, 64, 3, "3 steps of 3 rows"), (2, 64, 3, "3 steps of 1 rows"),
    (11, 9, 3, "3 steps of 9 rows"), (12, 9, 6, "6 steps of 9 rows")])
def test_an_epoch_is_at_least_one_step(base, tmp_path, capsys, num_rows, batch_size, steps, text):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:num_rows]))
    out = tmp_path / "out"
    train(tiny(base, tmp_path / "rows.json", out, batch_size=batch_size, epochs=3), CPU_LAUNCH)
    log = read_log(out / "metrics.jsonl")
    assert sorted(log["train"]) == list(range(steps)) and text in capsys.readouterr().out
    assert {step for step in log["val"] if step} >= {steps // 3, 2 * steps // 3, steps}


def alpaca_like(n: int) -> list:
    """Examples with the lengths of Alpaca's rows: most are short, some fill the context."""
    random = np.random.RandomState(0)
    prompts = np.clip(random.lognormal(3.9, 0.4, n), 35, 500).astype(int)
    responses = np.clip(random.lognormal(3.6, 1.1, n), 2, 1025 - prompts).astype(int)
    return [[([i] * p, [2] * r)] for i, (p, r) in enumerate(zip(prompts, responses, strict=True))]


@pytest.mark.parametrize("micro_batch_size, world_size", [(16, 1), (64, 1), (8, 8)])
def test_an_epoch_has_little_padding_and_few_shapes(micro_batch_size, world_size):
    """On every rank; ranks have equally many micro-steps and nearly equally much to compute."""
    rows = alpaca_like(10_000)
    lengths = list(map(num_inputs, rows))
    assert 90 < np.median(lengths) < 115 and max(lengths) == 1024
    epoch = list(itertools.islice(row_batches(rows, num_inputs, 64, 0, 0), 157))
    shapes, valid = [], np.zeros(world_size)
    for rank in range(world_size):
        launch, shapes_of_rank = Launch(rank, world_size, torch.device("cpu")), []
        for batch in epoch:
            for inputs, targets in micro_batches(batch, micro_batch_size, 1024, launch):
                shapes_of_rank.append(inputs.shape)
                valid[rank] += (targets != IGNORE_INDEX).sum()
        shapes.append(shapes_of_rank)
    assert {len(one) for one in shapes} == {len(shapes[0])}
    assert valid.sum() == sum(len(response) for [(_, response)] in rows)
    computed = [sum(B * T for B, T in one) for one in shapes]
    assert max(computed) < 1.02 * np.mean(computed)
    padding = 1 - sum(lengths) / sum(computed)
    assert padding < 0.1 and 12 < len(set(sum(shapes, []))) <= 26


def test_ranks_have_equally_many_micro_batches_of_few_shapes():
    rows = alpaca_like(11)
    launches = [Launch(rank, 3, torch.device("cpu")) for rank in range(3)]
    batches = [micro_batches(rows, 2, 1024, launch) for launch in launches]
    counts = [[(targets != IGNORE_INDEX).any(1).sum().item() for _, targets in one]
              for one in batches]
    assert counts == [[2, 2], [2, 2], [2, 1]]
    assert [inputs.shape for inputs, _ in micro_batches(rows[:4], 2, 1024, launches[2])] == [
        (2, 16)]  # rows of padding alone


@pytest.mark.parametrize("wanted, num_rows, world_size, sizes", [
    (16, 64, 1, [16]), (16, 64, 8, [8]), (16, 64, 3, [11]), (40, 64, 1, [32]), (16, 5, 2, [3]),
    (1, 64, 1, [1]), ("auto", 64, 3, [22, 11, 5, 2, 1]), ("auto", 1, 2, [1])])
def test_micro_batches_are_even_parts_of_a_ranks_share(tmp_path, wanted, num_rows, world_size,
                                                       sizes, monkeypatch):
    config = FinetuneConfig(out_dir=str(tmp_path / "out"), micro_batch_size=wanted, device="cpu",
                            batch_size=64)
    tuning = Run(config, CPU_LAUNCH, None, label="", graph="x.png", data={}, fixed=())
    tuning.launch = Launch(0, world_size, torch.device("cpu"))
    given = []
    monkeypatch.setattr(tuning, "prepare", lambda *arguments, micro_batch_sizes, **options: (
        given.extend(micro_batch_sizes)))
    tuning.summary, tuning.micro_batch_size = "", 0
    tuning.prepare_epochs(GPT(SIZES), num_rows, 16)
    assert given[: len(sizes)] == sizes and (wanted != "auto" or given == sizes)


@pytest.mark.parametrize("num_rows, batch_size, epochs", [
    (1, 1, 50), (20, 8, 17), (190, 8, 3), (400, 16, 2), (1900, 64, 2), (49_402, 64, 2)])
def test_few_rows_make_small_steps_and_at_least_50(tmp_path, num_rows, batch_size, epochs,
                                                   monkeypatch):
    config = FinetuneConfig(out_dir=str(tmp_path / "out"), device="cpu")
    tuning = Run(config, CPU_LAUNCH, None, label="", graph="x.png", data={}, fixed=())
    given = []
    monkeypatch.setattr(tuning, "prepare", lambda model, optimizer, max_steps, **options: (
        given.append(max_steps)))
    tuning.summary, tuning.micro_batch_size = "", 0
    tuning.prepare_epochs(GPT(SIZES), num_rows, 16)
    assert tuning.batch_size == batch_size and given == [epochs * -(-num_rows // batch_size)]


def test_the_learning_rate_follows_from_the_width(base, rows_file, tmp_path):
    """That of a fully trained GPT-2 is customary; smaller models need more."""
    config = FinetuneConfig()
    assert config.lr_at(2, 64, 768) == pytest.approx(5e-5)
    assert FinetuneConfig(max_lr=1e-5, min_lr=1e-4).lr_at(40, 64) == 1e-5  # never above --max-lr
    assert config.lr_at(2, 64, 1600) < 2.5e-5
    assert config.lr_at(2, 64, 128) == pytest.approx(7.35e-4, rel=1e-3)
    assert FinetuneConfig(max_lr=1e-3).lr_at(2, 64, 128) == 1e-3
    assert FinetuneConfig(max_lr=0.0).lr_at(2, 64, 128) == 0
    train(tiny(base, rows_file, tmp_path / "out", max_lr=None), CPU_LAUNCH)
    records = read_log(tmp_path / "out" / "metrics.jsonl")["train"]
    assert records[0]["lr"] == pytest.approx(5e-5 * 48**1.5)  # a width of 16, no warm-up


def test_a_question_is_answered_at_every_validation(base, rows_file, tmp_path, capsys):
    """In the template; by default, the shortest one that is held out."""
    shortest = decode(split_examples(read_turns(rows_file), 128, 0.1)[1][0][0][0])
    for question, prompt in ((None, shortest), ("Say hi.", format_prompt("Say hi."))):
        out = tmp_path / str(question)
        train(tiny(base, rows_file, out, sample_prompt=question, sample_tokens=3), CPU_LAUNCH)
        samples = [json.loads(line) for line in (out / "samples.jsonl").open(encoding="utf-8")]
        assert [sample["step"] for sample in samples] == [0, 4, 8]
        assert all(sample["text"].startswith(prompt) for sample in samples)
        assert all(len(encode(sample["text"])) >= len(encode(prompt)) for sample in samples)
        assert samples[2]["text"].replace("\n", "\n  ") in capsys.readouterr().out
    long = tiny(base, rows_file, tmp_path / "long", sample_prompt="word " * 128, sample_tokens=3)
    assert "--sample-prompt has" in user_error(train, long, CPU_LAUNCH)
    assert not (tmp_path / "long").exists()  # before anything is written
    train(tiny(base, rows_file, tmp_path / "none"), CPU_LAUNCH)
    assert not (tmp_path / "none" / "samples.jsonl").exists()


class ProductShapes(TorchDispatchMode):
    """Collects the shapes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.shapes.add(tuple(tuple(x.shape) for x in args))
        return func(*args, **(kwargs or {}))


def test_a_cpu_computes_products_of_few_shapes(base, rows_file, tmp_path):
    """oneDNN keeps memory for every new shape, so a run with many of them would grow."""
    with ProductShapes() as products:
        train(tiny(base, rows_file, tmp_path / "out", batch_size=4, epochs=3), CPU_LAUNCH)
    rows = {shape[0][0] for shape in products.shapes if 16 in shape[0] and 50304 in shape[1]}
    assert rows and all(n % ROW_MULTIPLE_CPU == 0 for n in rows)  # of the logits
    assert len(products.shapes) < 80  # of 21 steps and 8 validations; 193 without padding


@pytest.mark.parametrize("multiple", [1, 64])
def test_padding_does_not_change_the_losses(base, rows_file, tmp_path, multiple, monkeypatch):
    train(tiny(base, rows_file, tmp_path / "a"), CPU_LAUNCH)
    monkeypatch.setattr(finetune, "padded_length", lambda length: length + -length % multiple)
    train(tiny(base, rows_file, tmp_path / "b"), CPU_LAUNCH)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8, 64])
def test_losses_do_not_depend_on_the_micro_batch(base, rows_file, tmp_path, micro_batch_size):
    """Micro-batches of very unequal numbers of response tokens: no mean of means."""
    train(tiny(base, rows_file, tmp_path / "a"), CPU_LAUNCH)
    train(tiny(base, rows_file, tmp_path / "b", micro_batch_size=micro_batch_size), CPU_LAUNCH)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(base, rows_file, tmp_path):
    arguments = ["--checkpoint", base, "--data", rows_file, "--batch-size", 8, "--max-lr", 0.01,
                 "--val-fraction", 0.1, "--device", "cpu", "--micro-batch-size", 2]
    script = ROOT / "finetune.py"
    run_script(script, *arguments, "--out-dir", tmp_path / "one")
    run_torchrun(2, script, *arguments, "--out-dir", tmp_path / "two")
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)
    val = [read_log(tmp_path / name / "metrics.jsonl")["val"] for name in ("one", "two")]
    assert val[0][8]["loss"] == pytest.approx(val[1][8]["loss"], abs=1e-5)


@pytest.fixture
def sixteen(base, tmp_path) -> tuple[list[str], list]:
    """Flags of a run of one step of 16 rows of 1 to 80 response tokens, and its gradients, computed
    row by row."""
    rows = [{"instruction": f"Count to {n}.", "output": "one " * n}
            for n in (1, 1, 2, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 60, 70, 75, 80)]
    path, model = tmp_path / "rows.json", load_model(base)
    path.write_text(json.dumps(rows))
    keys, examples, _ = make_examples(read_turns(path), 128)
    batch = split_rows(examples, keys, 0.0)[0]
    loss = sum(model(*collate([row], 1, num_inputs(row)), reduction="sum")[1] for row in batch)
    (loss / sum(len(response) for [(_, response)] in batch)).backward()
    optimizer = make_optimizer(model, lr=1.0, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.0,
                               shard=False)  # for its order of the parameters
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    assert len(batch) == 16 and max(gradient.abs().max() for gradient in gradients) > 0.05
    return ["--checkpoint", str(base), "--data", str(path), "--batch-size", "16", "--val-fraction",
            "0", "--epochs", "1", "--grad-clip", "0", "--device", "cpu"], gradients


def assert_saved_gradients(path, expected: list) -> None:
    for ours, reference in zip(torch.load(path), expected, strict=True):
        assert (ours - reference).abs().max() < 1e-6


@pytest.mark.slow
def test_any_micro_batch_of_16_rows_gives_the_same_gradient(sixteen, tmp_path, monkeypatch):
    argv, expected = sixteen
    for size in (1, 2, 4, 8, 16):
        monkeypatch.setattr(sys, "argv", ["finetune.py", *argv, "--micro-batch-size", str(size),
                                          "--out-dir", str(tmp_path / str(size))])
        with monkeypatch.context() as patch:
            patch.setattr(run, "step_if_finite", run.step_if_finite)  # restored at the end
            save_gradients(tmp_path)
            run_to_end(finetune)
        assert_saved_gradients(tmp_path / "gradients_0.pt", expected)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 8])
def test_any_split_of_16_rows_over_two_ranks_gives_the_same_gradient(sixteen, tmp_path,
                                                                     micro_batch_size):
    argv, expected = sixteen
    argv += ["--micro-batch-size", str(micro_batch_size), "--out-dir", str(tmp_path / "out")]
    ranks = Ranks(2, "finetune", argv, tmp_path / "ranks", save_gradients=tmp_path)
    assert ranks.wait() == [0, 0], ranks.output()
    for rank in range(2):
        assert_saved_gradients(tmp_path / f"gradients_{rank}.pt", expected)


def test_the_first_loss_equals_one_computed_row_by_row(base, rows_file, tmp_path):
    """From log-probabilities, one unpadded row at a time."""
    train(tiny(base, rows_file, tmp_path / "out", micro_batch_size=3), CPU_LAUNCH)
    model = load_model(base)
    total = count = 0
    for [(prompt, response)] in first_batches(rows_file, 1)[0]:
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + response]))[0][0].log_softmax(-1)
        for i, token in enumerate(response):
            total -= logprobs[len(prompt) + i - 1, token].item()
            count += 1
    assert losses(tmp_path / "out")[0] == pytest.approx(total / count, abs=1e-4)


def test_a_batch_without_targets_has_zero_gradients():
    torch.manual_seed(0)
    model = GPT(SIZES)
    inputs, targets = collate([], 2, 16)
    assert inputs.shape == (2, 16)
    _, loss = model(inputs, targets, reduction="sum", return_logits=False)
    loss.backward()
    assert loss.item() == 0 and all(p.grad.eq(0).all() for p in model.parameters())


def test_what_a_run_writes(base, rows_file, tmp_path):
    out = tmp_path / "out"
    train(tiny(base, rows_file, out), CPU_LAUNCH)
    log = read_log(out / "metrics.jsonl")
    assert sorted(log["train"]) == list(range(8))  # 27 rows, 4 steps an epoch
    assert sorted(log["val"]) == [0, 4, 8]
    assert log["val"][8]["loss"] < log["val"][0]["loss"]
    assert (out / "latest").readlink().name == "step_000008" and (out / "step_000004").is_dir()
    assert read_prompt_template(out) == ALPACA and read_prompt_template(base) is None
    assert (out / "finetune_loss.png").read_bytes().startswith(b"\x89PNG")
    keys, examples, _ = make_examples(TURNS, 128)
    val_rows = split_rows(examples, keys, 0.1)[1]
    loss = mean_loss(load_model(out), micro_batches(val_rows, 2, 128, CPU_LAUNCH), CPU_LAUNCH,
                     torch.float32)
    assert loss == pytest.approx(log["val"][8]["loss"], abs=1e-6)
    assert "already holds a run" in user_error(train, tiny(base, rows_file, out), CPU_LAUNCH)
    inside = tiny(base, rows_file, base)
    assert "is itself a checkpoint" in user_error(train, inside, CPU_LAUNCH)
    assert [r["lr"] for _, r in sorted(log["train"].items())] == pytest.approx(
        [learning_rate(step, warmup_steps=0, max_steps=8, max_lr=inside.max_lr,
                       min_lr=inside.min_lr) for step in range(8)])


@pytest.mark.slow
def test_compiling_does_not_change_the_losses(base, rows_file, tmp_path, monkeypatch):
    """Every shape compiles once; validation stays eager."""
    counter, real = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self, **options: real(self, backend=counter, **options))
    rows_file.write_text(json.dumps(ROWS[:6] + ROWS[-6:]))
    train(tiny(base, rows_file, tmp_path / "eager"), CPU_LAUNCH)
    assert counter.frame_count == 0
    train(tiny(base, rows_file, tmp_path / "compiled", compile=True), CPU_LAUNCH)
    shapes = {inputs.shape for batch in first_batches(rows_file, 4)
              for inputs, _ in micro_batches(batch, 4, 128, CPU_LAUNCH)}
    assert counter.frame_count == len(shapes) >= 2
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), abs=1e-5)
    log = read_log(tmp_path / "compiled" / "metrics.jsonl")
    assert sorted(log["train"]) == [0, 1, 2, 3] and "mfu" in log["train"][2]
    assert log["end"][4]["seconds"] > log["end"][4]["overhead_s"] > 0


def test_resume_with_only_a_log_starts_from_scratch(base, rows_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 99, "kind": "train", "loss": 1}\n')
    assert "--resume" in user_error(train, tiny(base, rows_file, tmp_path / "out"), CPU_LAUNCH)
    train(tiny(base, rows_file, tmp_path / "out", resume=True), CPU_LAUNCH)
    assert sorted(read_log(tmp_path / "out" / "metrics.jsonl")["train"]) == list(range(8))


def test_a_micro_batch_larger_than_the_batch_is_lowered_to_it(base, rows_file, tmp_path, capsys):
    train(tiny(base, rows_file, tmp_path / "a", micro_batch_size=64), CPU_LAUNCH)
    assert "8 rows, 8 per rank and micro-step" in capsys.readouterr().out
    train(tiny(base, rows_file, tmp_path / "b", micro_batch_size=8), CPU_LAUNCH)
    traces = [[r["loss"] for r in read_log(tmp_path / name / "metrics.jsonl")["train"].values()]
              for name in "ab"]
    assert traces[0] == traces[1]


def test_gradients_are_clipped(base, rows_file, tmp_path, monkeypatch):
    seen, real = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda parameters, limit: seen.append(limit) or real(parameters, limit))
    train(tiny(base, rows_file, tmp_path / "out", grad_clip=0.25), CPU_LAUNCH)
    assert seen == [0.25] * 8


def test_a_model_with_another_vocabulary_is_refused(rows_file, tmp_path, monkeypatch, capsys):
    sizes = GPTConfig(block_size=64, vocab_size=100, n_layer=1, n_head=1, n_embd=8)
    other = save_checkpoint(tmp_path / "other", 1, GPT(sizes))
    message = user_error(train, tiny(other, rows_file, tmp_path / "out"), CPU_LAUNCH)
    assert "100 ids" in message and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_it_learns_to_answer_and_to_stop(tmp_path):
    """A tiny model, trained on five rows until it repeats them."""
    from inference import decode_generation, generate, tokenize_batch_input
    rows = [{"instruction": f"What color is {thing}?", "input": "", "output": f"It is {color}."}
            for thing, color in [("snow", "white"), ("grass", "green"), ("the sky", "blue"),
                                  ("blood", "red"), ("coal", "black")]]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    torch.manual_seed(0)
    base = save_checkpoint(tmp_path / "base", 1, GPT(GPTConfig(block_size=64, n_layer=2, n_head=2,
                                                               n_embd=32)))
    model = train(tiny(base, tmp_path / "rows.json", tmp_path / "out", epochs=250, batch_size=4,
                       max_lr=1e-2, eval_interval=1000), CPU_LAUNCH)
    input_ids, masks = tokenize_batch_input([format_prompt(r["instruction"]) for r in rows])
    output, output_masks = generate(model, input_ids, masks, 0.0, 12)
    answers = decode_generation(output, output_masks, prompt_masks=masks)
    assert all(output[i, output_masks[i].sum() - 1] == EOT_TOKEN for i in range(5))
    assert sum(a == r["output"] for a, r in zip(answers, rows, strict=True)) >= 4  # 1 held out


# ------------------------------------------------------------------------------- bad input


def test_json_lines_and_rows_without_input_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n\n{"instruction": "c", "input": "", '
                    '"output": "d", "extra": 1}\n')
    assert read_turns(path) == [[("a", "", "b")], [("c", "", "d")]]


def test_parquet_json_lines_and_json_give_the_same_rows(tmp_path):
    rows = [{"instruction": f"question {i} é", "input": "" if i % 2 else f"context\u2028 {i}",
             "output": f"answer {i}"} for i in range(5)]
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n"
                                              for row in rows), encoding="utf-8")
    with_null = [row | {"input": row["input"] or None} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(with_null), tmp_path / "c.bin")
    expected = [[(row["instruction"], row["input"], row["output"])] for row in rows]
    assert all(read_turns(tmp_path / name) == expected for name in ("a.json", "b.jsonl", "c.bin"))
    (tmp_path / "c.bin").write_bytes((tmp_path / "c.bin").read_bytes()[:-20])
    assert "parquet" in user_error(read_turns, tmp_path / "c.bin")
    path = tmp_path / "many.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(
        [rows[0] | {"output": f"{n} {n * n}"} for n in range(999)]), path)
    content = bytearray(path.read_bytes())
    for place in range(4, len(content) // 2, 7):  # pages, not the footer
        content[place] ^= 0xFF
    path.write_bytes(content)
    assert "is not a whole parquet file" in user_error(read_turns, path)


def message(role: str, content: object) -> dict:
    return {"role": role, "content": content}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_messages_and_prompt_completion_are_read(tmp_path, suffix):
    """Rows as other tools write them; in parquet, absent columns are null."""
    rows = [{"prompt": "a", "completion": "b"}, {"instruction": "c", "output": "d"},
            {"id": 7, "messages": [message("user", "e"), message("assistant", "f")]},
            {"messages": [message("system", "g"), message("user", "h"), message("assistant", "i"),
                          message("user", "j"), message("assistant", "k")]}]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        columns = dict.fromkeys(key for row in rows for key in row)
        pyarrow.parquet.write_table(pyarrow.table(
            {key: [row.get(key) for row in rows] for key in columns}), path)
    assert read_turns(path) == [[("a", "", "b")], [("c", "", "d")], [("e", "", "f")],
                                [("g\n\nh", "", "i"), ("j", "", "k")]]


def test_a_conversation_is_trained_on_as_chat_shows_it():
    """Each message in the template; all responses, each with its <|endoftext|>, are targets."""
    turns = [("What is 1 + 1?", "", "It is 2."), ("And 2 + 2?", "", "It is 4.")]
    example, = encoded([turns], 512)
    conversation = chat.Conversation(ALPACA, block_size=512, max_tokens=8)
    for question, _, answer in turns:
        seen = conversation.turns_with(question)
        conversation.add_response(seen, encode(answer))
    assert token_ids(example) == sum(conversation.turns, [])
    inputs, targets = collate([example], 1, num_inputs(example))
    labels = targets[targets != IGNORE_INDEX].tolist()
    assert labels == [*encode("It is 2."), EOT_TOKEN, *encode("It is 4."), EOT_TOKEN]
    assert inputs[0].tolist() == token_ids(example)[:-1]
    assert "1 without an answer" in make_examples([[*turns, ("And?", "", " ")]], 512)[2]
    assert "1 over 64 tokens" in make_examples([turns], 64)[2]


@pytest.mark.parametrize("text, words", [
    ('[{"instruction": "a"}]', ["row 1", "output"]),
    ('[{"instruction": "a", "output": "b"}, {"instruction": 3, "output": "b"}]',
     ["row 2", "instruction", "3"]),
    ('[{"instruction": "a", "input": 5, "output": "b"}]', ["row 1", "input", "5"]),
    ('[{"instruction": " ", "output": "b"}]', ["row 1", "empty instruction"]),
    ('["a"]', ["row 1", "'a'"]),
    ('[{"instruction": "a", "output": "b"}', ["rows.json is not JSON", "line 1 column 37"]),
    ('[\n{"instruction": "a"},\n{"output": b}]', ["rows.json is not JSON", "line 3 column 12"]),
    ('{"instruction": "a", "output": "b"}\n\nnot json', ["line 3 is not JSON", "column 1"]),
    ('{"instruction": "a", "output": "b"}\n' * 23 + '{"instruction": "a"\n', ["line 24 is not"]),
    ('{"instruction": "a", "output": "b"}\n\n{"instruction": "a"}', ["line 3 has", "output"]),
    ('{"instruction": "a", "output": ' + "[" * 100_000, ["line 1 is not JSON", "recursion"]),
    ('{"instruction": "a", "output": ' + "1" * 5_000 + "}", ["line 1 is not JSON", "digits"]),
    ('{"conversations": [{"from": "human", "value": "a"}], "id": 1}',
     ["line 1 has the keys 'conversations, id'", "messages"]),
    ('[{"instruction": "a", "output": null}]', ["the keys 'instruction' (output is null)"]),
    ('[{"text": "### Human: a"}]', ["row 1 has the keys 'text'", "prompt, input, completion"]),
    ('[{"instruction": "a", "response": "b"}]', ["row 1 has the keys 'instruction, response'"]),
    ('[{"prompt": [1], "completion": "b"}]', ["row 1: prompt is [1], expected text"]),
    ('[{"prompt": "", "completion": "b"}]', ["row 1 has an empty prompt"]),
    ('[{"messages": []}]', ["row 1: messages have the roles []", "user and assistant in turn"]),
    ('[{"messages": "a"}]', ["row 1: messages have the roles []"]),
    ('[{"messages": ["a", "b"]}]', ["row 1: messages have the roles [None, None]"]),
    ('[{"messages": [{"role": "user", "content": "a"}]}]', ["roles ['user'], expected"]),
    ('[{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}]',
     ["roles ['user', 'tool'], expected"]),
    ('[{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}]',
     ["row 1: content is None, expected text"]),
    ('[{"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "b"}]}]',
     ["row 1 has an empty user message"]),
    ('[{"messages": [{"role": "system", "content": "c"}, {"role": "user", "content": ""}, '
     '{"role": "assistant", "content": "b"}]}]', ["row 1 has an empty user message"]),
    ("[]", ["0 of 0 rows", "at least 2"]),
    ('[{"instruction": "a", "output": ""}]', ["0 of 1 rows", "1 without an answer"]),
])
def test_malformed_rows(base, tmp_path, text, words, monkeypatch, capsys):
    path = tmp_path / "rows.json"
    path.write_text(text)
    argv = ["--checkpoint", base, "--data", path, "--device", "cpu", "--out-dir", tmp_path / "out"]
    message = main_error(main_of(finetune), argv, monkeypatch, capsys)
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_columns_name_the_texts_of_a_row(tmp_path, suffix):
    """Other columns are not read, also if they have our names."""
    rows = [{"question": "a", "answer": "b", "context": None, "output": 3, "messages": "no"},
            {"question": "c", "answer": "d", "context": "e", "output": 4, "messages": "no"}]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read_turns(path, "instruction=question,output=answer") == [[("a", "", "b")],
                                                                      [("c", "", "d")]]
    assert read_turns(path, "output=answer,instruction=question,input=context") == [
        [("a", "", "b")], [("c", "e", "d")]]
    path = tmp_path / "turns.json"
    path.write_text(json.dumps([{"chat": [message("user", "a"), message("assistant", "b")]}]))
    assert read_turns(path, "messages=chat") == [[("a", "", "b")]]


def test_keys_that_are_not_found_name_those_that_are_and_the_flag(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n{"question": "c", "reply": "d"}\n["e"]\n')
    message = user_error(read_turns, path)
    assert "rows.jsonl line 1 has the keys 'question, answer', expected instruction" in message
    assert message.endswith("; or --columns instruction=NAME,output=NAME")
    message = user_error(read_turns, path, "instruction=question,output=answer")
    assert message == "rows.jsonl line 2 has no answer (--columns), only the keys 'question, reply'"
    assert "no text (--columns)" in user_error(
        read_turns, path, "instruction=question,output=answer,input=text")
    path.write_text('"e"\n')
    assert "line 1 is 'e'" in user_error(read_turns, path, "messages=chat")
    path.write_text('{"chat": null}')
    assert "expected instruction" in user_error(read_turns, path, "messages=chat")
    path.write_text('{"question": "a", "answer": "b"}')
    assert "has the keys 'instruction', expected instruction, input, output" in user_error(
        read_turns, path, "instruction=question")


@pytest.mark.parametrize("columns", [
    "question,answer", "instruction=question,output=", "messages", "=a",
    "question=instruction,answer=output", "instruction=a,output=b,text=c",
    "instruction=a,output=b,c", "instruction=a,output=b,output=c", "instruction=a,output=a"])
def test_columns_typed_wrong_are_one_line(tmp_path, columns):
    (tmp_path / "rows.json").write_text("[]")
    message = user_error(read_turns, tmp_path / "rows.json", columns)
    assert message.startswith(f"--columns {columns}: expected instruction=NAME,output=NAME")


def test_text_that_is_not_utf8_is_refused(tmp_path):
    for data in ('[{"instruction": "é"}]'.encode("latin-1"), "[]".encode("utf-16"), b"\x1f\x8b"):
        (tmp_path / "rows.json").write_bytes(data)
        assert "is not UTF-8" in user_error(read_turns, tmp_path / "rows.json")


def test_missing_files(base, tmp_path, rows_file, monkeypatch, capsys):
    arguments = ["--out-dir", tmp_path / "out", "--device", "cpu"]
    message = main_error(main_of(finetune), ["--checkpoint", base, "--data", tmp_path / "no.json",
                                             *arguments], monkeypatch, capsys)
    assert "no.json" in message and "alpaca_downloader" in message
    message = main_error(main_of(finetune), ["--checkpoint", tmp_path / "no", "--data", rows_file,
                                             *arguments], monkeypatch, capsys)
    assert str(tmp_path / "no") in message


# ---------------------------------------------------------------------------------- resume


def rows_of(out) -> list[tuple]:
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"])
            for r in read_log(out / "metrics.jsonl")["train"].values()]


def assert_same_tuning(a, b) -> None:
    for p, q in zip(load_model(a).parameters(), load_model(b).parameters(), strict=True):
        assert torch.equal(p, q)
    states = [load_training_state(list_checkpoints(out)[-1]) for out in (a, b)]
    assert states[0]["progress"] == states[1]["progress"]
    for ours, theirs in zip(states[0]["optimizer"]["state"].values(),
                            states[1]["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert rows_of(a) == rows_of(b)
    assert read_log(a / "metrics.jsonl")["val"] == read_log(b / "metrics.jsonl")["val"]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_killed_4_times_ends_bit_equal_to_an_uninterrupted_one(base, rows_file, tmp_path,
                                                                     world_size):
    """Killed at four of its checkpoints. The order of the rows continues, too."""
    argv = ["--checkpoint", str(base), "--data", str(rows_file), "--batch-size", "4",
            "--micro-batch-size", "2", "--max-lr", "0.01", "--val-fraction", "0.1", "--device",
            "cpu", "--epochs", "3", "--save-interval", "1", "--eval-interval", "3", "--resume"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    ranks = Ranks(world_size, "finetune", [*argv, "--out-dir", str(whole)], tmp_path / "a")
    assert ranks.wait() == [0] * world_size, ranks.output()
    steps = max(read_log(whole / "metrics.jsonl")["val"])
    for kill in range(1, 5):
        ranks = Ranks(world_size, "finetune", [*argv, "--out-dir", str(out)], tmp_path / f"b{kill}")
        wait_until(lambda: (out / "latest").exists()
                   and int((out / "latest").readlink().name[5:]) >= kill * steps // 6, ranks)  # noqa: B023
        ranks.kill()
        assert ranks.wait() == [-9] * world_size
    ranks = Ranks(world_size, "finetune", [*argv, "--out-dir", str(out)], tmp_path / "c")
    assert ranks.wait() == [0] * world_size, ranks.output()
    assert_same_tuning(out, whole)
    assert max(read_log(out / "metrics.jsonl")["run"]) > 0, "it never resumed"
    assert read_prompt_template(out) == ALPACA


def test_a_signal_ends_a_run_after_a_micro_step(base, rows_file, tmp_path):
    """It is resumed exactly, from the last complete step; a step has two micro-steps."""
    assert_same_run(*stop_in_micro_steps_and_finish(
        train, tiny(base, rows_file, tmp_path / "out"), 2))


@pytest.mark.slow
def test_a_signal_saves_and_another_number_of_ranks_resumes(base, rows_file, tmp_path):
    changes = {"batch_size": 4, "epochs": 6, "save_interval": 1000, "eval_interval": 1000}
    train(tiny(base, rows_file, tmp_path / "whole", **changes), CPU_LAUNCH)
    out = tmp_path / "out"
    argv = ["--checkpoint", str(base), "--data", str(rows_file), "--batch-size", "4",
            "--micro-batch-size", "1", "--max-lr", "0.01", "--val-fraction", "0.1", "--device",
            "cpu", "--epochs", "6", "--save-interval", "1000", "--eval-interval", "1000",
            "--out-dir", str(out), "--resume"]
    ranks = Ranks(2, "finetune", argv, tmp_path / "two")
    log = out / "metrics.jsonl"
    wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") > 3, ranks)
    ranks.kill(1, number=signal.SIGTERM)
    assert ranks.wait() == [0, 0] and "--resume" in ranks.output()
    assert len(rows_of(out)) < len(rows_of(tmp_path / "whole"))
    train(tiny(base, rows_file, out, resume=True, **changes), CPU_LAUNCH)
    assert losses(out) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_resume_refuses_settings_that_change_the_rows_and_prints_others(base, rows_file, tmp_path,
                                                                        capsys):
    out = tmp_path / "out"
    train(tiny(base, rows_file, out), CPU_LAUNCH)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(ROWS[:-1]), encoding="utf-8")
    for changes, word in (({"batch_size": 4}, "--batch-size 8, not 4"), ({"seed": 1}, "--seed"),
                          ({"val_fraction": 0.2}, "--val-fraction"),
                          ({"columns": "instruction=instruction,output=output"}, "--columns"),
                          ({"data": str(other)}, "trained with other data")):
        again = tiny(base, rows_file, out, resume=True, **changes)
        assert word in user_error(train, again, CPU_LAUNCH)
    for epochs in (1, 3):  # they decide the learning rate of every step
        again = tiny(base, rows_file, out, resume=True, epochs=epochs)
        assert "--epochs 2" in user_error(train, again, CPU_LAUNCH)
    capsys.readouterr()
    train(tiny(tmp_path / "gone", rows_file, out, resume=True, max_lr=1e-3), CPU_LAUNCH)
    printed = capsys.readouterr().out
    assert "max_lr was 0.01, is now 0.001" in printed
    assert f"--checkpoint {tmp_path / 'gone'} is ignored" in printed


@pytest.mark.slow
def test_auto_finds_a_micro_batch_for_the_longest_rows(base, rows_file, tmp_path, monkeypatch):
    train(tiny(base, rows_file, tmp_path / "whole"), CPU_LAUNCH)
    real, seen = GPT.forward, []

    def limited(self, idx, targets=None, **options):
        if idx.size(0) > 2 and self.training:
            raise torch.OutOfMemoryError("out of memory")
        seen.append(tuple(idx.shape))
        return real(self, idx, targets, **options)

    monkeypatch.setattr(GPT, "forward", limited)
    monkeypatch.setattr("minigpt2.faults.on_cpu", lambda device: False)  # by trial, as on a GPU
    train(tiny(base, rows_file, tmp_path / "auto", micro_batch_size="auto"), CPU_LAUNCH)
    assert seen[0] == (2, padded_length(max(map(num_inputs, encoded(TURNS)))))
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
