import json
import math
import signal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers.common import CPU_LAUNCH, ROOT, TINY, main_error, run_script, run_torchrun, user_error
from helpers.ranks import Ranks, wait_until
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import chat
import finetune
from finetune import (
    PAD_TO_CPU,
    FinetuneConfig,
    collate,
    global_batch,
    make_examples,
    micro_batches,
    num_tokens,
    read_turns,
    split_rows,
    token_ids,
    train,
)
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
from minigpt2.optimizer import cosine_lr
from minigpt2.run import Run
from minigpt2.tokenizer import EOT_TOKEN, decode, encode, format_prompt
from model import GPT, GPTConfig

SIZES = GPTConfig(block_size=128, vocab_size=TINY.vocab_size, n_layer=2, n_head=2, n_embd=16)
ROWS = [{"instruction": f"Say the word {word} {n} times.", "input": "loudly" * (n % 2),
         "output": f"{word} " * n} for n in range(1, 6)
        for word in ("yes", "no", "perhaps", "never", "<|endoftext|>", "{braces}")]
TURNS = [[(row["instruction"], row["input"], row["output"])] for row in ROWS]


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    return path


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    return save_checkpoint(tmp_path / "base", 1, GPT(SIZES))


def tiny(base, rows_file, out, **changes) -> FinetuneConfig:
    options = {"checkpoint": str(base), "data": str(rows_file), "out_dir": str(out),
               "batch_size": 8, "micro_batch_size": 4, "max_lr": 1e-2, "val_fraction": 0.1,
               "eval_interval": 4, "device": "cpu"} | changes
    return FinetuneConfig(**options)


def losses(out) -> list[float]:
    records = read_log(out / "metrics.jsonl")["train"]
    return [records[step]["loss"] for step in sorted(records)]


# ----------------------------------------------------------------------------- the targets


def test_targets_are_the_response_and_endoftext():
    examples, _ = make_examples(TURNS, 128)
    inputs, targets = collate(examples, len(ROWS) + 2, max(map(num_tokens, examples)) - 1)
    assert inputs.shape == targets.shape == (len(ROWS) + 2, max(map(num_tokens, examples)) - 1)
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


def test_row_lengths_are_counted_in_tokens():
    long = [("x", "", "日本 " * 40)]  # few characters, many tokens
    text = [("x", "", "word " * 60)]  # more characters, fewer
    examples, summary = make_examples([long, text, [("x", "", " \n")]], 128)
    assert len(examples) == 1 and "1 of 3 rows" in summary
    assert "1 without an answer and 1 over 128 tokens" in summary
    fits = make_examples([text], num_tokens(examples[0]) - 1)[0]
    assert len(fits) == 1 and token_ids(fits[0])[-1] == EOT_TOKEN  # exactly full, its end included
    assert make_examples([text], num_tokens(examples[0]) - 2)[0] == []


# ------------------------------------------------------------------------ order and splits


def test_the_split_is_random_and_decided_by_the_seed():
    examples, _ = make_examples(TURNS, 128)
    trained, held_out, summary = split_rows(examples, 0.2, seed=3)
    assert len(held_out) == 6 and sorted(trained + held_out) == sorted(examples)
    assert summary == "24 to train on, 6 held out; 0 repeat another's prompt"
    assert split_rows(examples, 0.2, seed=3)[:2] == (trained, held_out)
    assert sorted(split_rows(examples[::-1], 0.2, seed=3)[1]) == sorted(held_out)
    assert held_out != examples[:6] and split_rows(examples, 0.2, seed=4)[1] != held_out
    assert len(split_rows(examples, 0.0, seed=3)[1]) == 1
    assert "--val-fraction" in user_error(split_rows, examples[:1], 0.1, 0)


def test_rows_with_equal_prompts_are_on_the_same_side(base, tmp_path, capsys):
    """Copies, also in other case and white space, with equal and with other answers."""
    copies = [{"instruction": f" {row['instruction']}\n".upper(), "input": row["input"],
               "output": f"{row['output']}{n}"} for row in ROWS for n in ("", "", 3)]
    (tmp_path / "rows.json").write_text(json.dumps(ROWS + copies))
    turns = read_turns(tmp_path / "rows.json")
    trained, held_out, summary = split_rows(make_examples(turns, 128)[0], 0.2, 3)
    prompts = [{" ".join(decode(prompt).lower().split()) for [(prompt, _)] in part}
               for part in (trained, held_out)]
    assert len(trained) == 96 and len(held_out) == 24 and not prompts[0] & prompts[1]
    assert "90 repeat another's prompt" in summary
    train(tiny(base, tmp_path / "rows.json", tmp_path / "out", epochs=1, batch_size=60),
          CPU_LAUNCH)
    assert "108 to train on, 12 held out; 90 repeat" in capsys.readouterr().out


def test_answers_to_one_prompt_are_split_by_the_answer():
    answers = [[("Write a word.", "", word)] for word in "one two three four five six".split()]
    trained, held_out, summary = split_rows(make_examples(answers * 2, 128)[0], 0.2, 3)
    assert len(held_out) == 2 and held_out[0] == held_out[1] and held_out[0] not in trained
    assert "11 repeat another's prompt, too many to split by prompt" in summary
    assert len(split_rows(make_examples(answers * 3, 128)[0], 0.0, 3)[1]) == 3
    trained, held_out, summary = split_rows(make_examples(
        [[(f"Say {n % 9}.", "", str(n))] for n in range(20)], 128)[0], 0.05, 3)  # all repeated
    assert len(held_out) == 2 and held_out[0][0][0] == held_out[1][0][0]
    assert not {str(prompt) for [(prompt, _)] in trained} & {str(held_out[0][0][0])}
    equal = make_examples(answers[:1] * 9, 128)[0]
    assert "all 9 usable rows are equal" in user_error(split_rows, equal, 0.2, 3)


def test_every_epoch_visits_each_row_once_in_a_new_order():
    examples, _ = make_examples(TURNS, 128)
    steps = 3 * math.ceil(len(examples) / 7)
    batches = [global_batch(examples, step, 7, seed=1) for step in range(steps)]
    assert list(map(len, batches)) == [7, 7, 7, 7, 2] * 3
    for epoch in range(3):
        assert sorted(sum(batches[5 * epoch : 5 * epoch + 5], [])) == sorted(examples)
    assert sorted(batches[0]) != sorted(batches[5]) != sorted(batches[10])
    for batch in batches:
        assert list(map(num_tokens, batch)) == sorted(map(num_tokens, batch))


@pytest.mark.parametrize("num_rows, batch_size, steps, text", [
    (4, 64, 3, "3 steps of 3 rows"), (2, 64, 3, "3 steps of 1 rows"),
    (10, 9, 3, "3 steps of 9 rows"), (11, 9, 6, "6 steps of 9 rows, the last of an epoch of 1")])
def test_an_epoch_is_at_least_one_step(base, tmp_path, capsys, num_rows, batch_size, steps, text):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:num_rows]))
    out = tmp_path / "out"
    train(tiny(base, tmp_path / "rows.json", out, batch_size=batch_size, epochs=3), CPU_LAUNCH)
    log = read_log(out / "metrics.jsonl")
    assert sorted(log["train"]) == list(range(steps)) and text in capsys.readouterr().out
    assert {step for step in log["val"] if step} >= {steps // 3, 2 * steps // 3, steps}


def test_an_epoch_has_few_shapes():
    """Lengths as in Alpaca: most rows are short, some fill the context."""
    random = np.random.RandomState(0)
    prompts = random.randint(40, 120, 3000)
    responses = np.clip(random.lognormal(3.8, 1, 3000), 2, 1024 - prompts).astype(int)
    examples = [[([i] * p, [2] * r)]
                for i, (p, r) in enumerate(zip(prompts, responses, strict=True))]
    trained, held_out, _ = split_rows(examples, 0.05, 0)
    on_gpu = Launch(0, 1, torch.device("cuda"))
    shapes = {inputs.shape for rows in (held_out, *(global_batch(trained, step, 64, 0)
                                                    for step in range(45)))
              for inputs, _ in micro_batches(rows, 16, 1024, on_gpu)}
    assert 8 < len(shapes) <= 16 and {B for B, _ in shapes} == {16}
    assert all(T % 64 == 0 for _, T in shapes) and max(T for _, T in shapes) == 1024


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


@pytest.mark.parametrize("pad_to", [1, 64])
def test_padding_does_not_change_the_losses(base, rows_file, tmp_path, pad_to, monkeypatch):
    train(tiny(base, rows_file, tmp_path / "a"), CPU_LAUNCH)
    monkeypatch.setattr(finetune, "PAD_TO_CPU", pad_to)
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


def test_the_first_loss_equals_one_computed_row_by_row(base, rows_file, tmp_path):
    """From log-probabilities, one unpadded row at a time."""
    train(tiny(base, rows_file, tmp_path / "out", micro_batch_size=3), CPU_LAUNCH)
    model = load_model(base)
    examples, _ = make_examples(read_turns(rows_file), 128)
    batch = global_batch(split_rows(examples, 0.1, 1337)[0], 0, 8, 1337)
    total = count = 0
    for [(prompt, response)] in batch:
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
    assert (out / "latest").read_text() == "step_000008\n" and (out / "step_000004").is_dir()
    assert read_prompt_template(out) == "alpaca" and read_prompt_template(base) is None
    assert (out / "finetune_loss.png").read_bytes().startswith(b"\x89PNG")
    val_rows = split_rows(make_examples(TURNS, 128)[0], 0.1, 1337)[1]
    loss = mean_loss(load_model(out), micro_batches(val_rows, 2, 128, CPU_LAUNCH), CPU_LAUNCH,
                     torch.float32)
    assert loss == pytest.approx(log["val"][8]["loss"], abs=1e-6)
    assert "already holds a run" in user_error(train, tiny(base, rows_file, out), CPU_LAUNCH)
    inside = tiny(base, rows_file, base)
    assert "is itself a checkpoint" in user_error(train, inside, CPU_LAUNCH)
    assert [r["lr"] for _, r in sorted(log["train"].items())] == pytest.approx(
        [cosine_lr(step, warmup_steps=0, max_steps=8, max_lr=inside.max_lr, min_lr=inside.min_lr)
         for step in range(8)])


@pytest.mark.slow
def test_compiling_and_the_log_interval_do_not_change_the_losses(base, rows_file, tmp_path,
                                                                 monkeypatch):
    """Rows of many lengths compile with dynamic shapes; validation stays eager."""
    counter, real = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: real(self, backend=counter))
    train(tiny(base, rows_file, tmp_path / "eager"), CPU_LAUNCH)
    assert counter.frame_count == 0
    train(tiny(base, rows_file, tmp_path / "compiled", compile=True, log_interval=2), CPU_LAUNCH)
    assert 1 <= counter.frame_count <= 3
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager")[::2], abs=1e-5)
    log = read_log(tmp_path / "compiled" / "metrics.jsonl")
    assert sorted(log["train"]) == [0, 2, 4, 6] and "mfu" in log["train"][2]
    assert log["end"][8]["seconds"] > log["end"][8]["overhead_s"] > 0


def test_resume_with_only_a_log_starts_from_scratch(base, rows_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 99, "kind": "train", "loss": 1}\n')
    assert "--resume" in user_error(train, tiny(base, rows_file, tmp_path / "out"), CPU_LAUNCH)
    train(tiny(base, rows_file, tmp_path / "out", resume=True), CPU_LAUNCH)
    assert sorted(read_log(tmp_path / "out" / "metrics.jsonl")["train"]) == list(range(8))


def test_a_micro_batch_larger_than_the_batch_is_lowered_to_it(base, rows_file, tmp_path, capsys):
    train(tiny(base, rows_file, tmp_path / "a", micro_batch_size=64), CPU_LAUNCH)
    assert "--micro-batch-size 64" in capsys.readouterr().out
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
    (example,), _ = make_examples([turns], 512)
    conversation = chat.Conversation(use_template=True, block_size=512, max_steps=8)
    for question, _, answer in turns:
        seen = conversation.turns_with(question)
        conversation.add_response(seen, encode(answer))
    assert token_ids(example) == sum(conversation.turns, [])
    inputs, targets = collate([example], 1, num_tokens(example) - 1)
    labels = targets[targets != IGNORE_INDEX].tolist()
    assert labels == [*encode("It is 2."), EOT_TOKEN, *encode("It is 4."), EOT_TOKEN]
    assert inputs[0].tolist() == token_ids(example)[:-1]
    assert "1 without an answer" in make_examples([[*turns, ("And?", "", " ")]], 512)[1]
    assert "1 over 64 tokens" in make_examples([turns], 64)[1]


@pytest.mark.parametrize("text, words", [
    ('[{"instruction": "a"}]', ["row 1", "output"]),
    ('[{"instruction": "a", "output": "b"}, {"instruction": 3, "output": "b"}]',
     ["row 2", "instruction", "3"]),
    ('[{"instruction": "a", "input": 5, "output": "b"}]', ["row 1", "input", "5"]),
    ('[{"instruction": " ", "output": "b"}]', ["row 1", "empty instruction"]),
    ('["a"]', ["row 1", "'a'"]),
    ('[{"instruction": "a", "output": "b"}', ["line 1 column 37 is not JSON"]),
    ('[\n{"instruction": "a"},\n{"output": b}]', ["line 3 column 12 is not JSON"]),
    ('{"instruction": "a", "output": "b"}\n\nnot json', ["line 3 column 1 is not JSON"]),
    ('{"instruction": "a", "output": "b"}\n' * 23 + '{"instruction": "a"\n', ["line 24 column"]),
    ('{"instruction": "a", "output": "b"}\n\n{"instruction": "a"}', ["line 3 has", "output"]),
    ('{"instruction": "a", "output": ' + "[" * 100_000, ["line 1 is not JSON", "recursion"]),
    ('{"instruction": "a", "output": ' + "1" * 5_000 + "}", ["line 1 is not JSON", "digits"]),
    ('{"conversations": [{"from": "human", "value": "a"}], "id": 1}',
     ["line 1 has the keys 'conversations, id'", "messages"]),
    ('[{"text": "### Human: a"}]', ["row 1 has the keys 'text'", "prompt and completion"]),
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
    message = main_error(finetune.main, ["--checkpoint", base, "--data", path, "--device", "cpu",
                                         "--out-dir", tmp_path / "out"], monkeypatch, capsys)
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


def test_text_that_is_not_utf8_is_refused(tmp_path):
    for data in ('[{"instruction": "é"}]'.encode("latin-1"), "[]".encode("utf-16"), b"\x1f\x8b"):
        (tmp_path / "rows.json").write_bytes(data)
        assert "is not UTF-8" in user_error(read_turns, tmp_path / "rows.json")


def test_missing_files(base, tmp_path, rows_file, monkeypatch, capsys):
    arguments = ["--out-dir", tmp_path / "out", "--device", "cpu"]
    message = main_error(finetune.main, ["--checkpoint", base, "--data", tmp_path / "no.json",
                                         *arguments], monkeypatch, capsys)
    assert "no.json" in message and "alpaca_downloader" in message
    message = main_error(finetune.main, ["--checkpoint", tmp_path / "no", "--data", rows_file,
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
                   and int((out / "latest").read_text()[5:]) >= kill * steps // 6, ranks)  # noqa: B023
        ranks.kill()
        assert ranks.wait() == [-9] * world_size
    ranks = Ranks(world_size, "finetune", [*argv, "--out-dir", str(out)], tmp_path / "c")
    assert ranks.wait() == [0] * world_size, ranks.output()
    assert_same_tuning(out, whole)
    assert read_prompt_template(out) == "alpaca"


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


def test_resume_refuses_a_run_of_a_version_with_another_order(base, rows_file, tmp_path,
                                                              monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "Run", lambda *arguments, row_order, **options: Run(
            *arguments, **options))
        train(tiny(base, rows_file, tmp_path / "out"), CPU_LAUNCH)
    again = tiny(base, rows_file, tmp_path / "out", resume=True)
    assert "rows in another order" in user_error(train, again, CPU_LAUNCH)


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
    monkeypatch.setattr("minigpt2.memory.on_cpu", lambda device: False)  # by trial, as on a GPU
    train(tiny(base, rows_file, tmp_path / "auto", micro_batch_size="auto"), CPU_LAUNCH)
    longest = max(map(num_tokens, make_examples(TURNS, 128)[0])) - 1
    assert seen[0] == (2, longest + -longest % PAD_TO_CPU)
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
