import dataclasses
import json
import os
import resource
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers.common import ROOT, assert_user_error, make_corpus, run_script, user_error
from helpers.ranks import fork_server

from bench import data as bench_data
from bench import decode as bench_decode
from bench import gpu as bench_gpu
from bench import memory as bench_memory
from bench import recipes as bench_recipes
from bench import train as bench_train
from bench.harness import BenchConfig, Contestant, contest, in_turn, run_quietly
from bench.memory import bench_memory as measure_memory
from minigpt2.graphs import draw_runs
from minigpt2.metrics import read_log
from model import GPTConfig

SMALL = GPTConfig(block_size=64, n_layer=1, n_head=1, n_embd=16)


def records_of(path) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for record in map(json.loads, path.read_text().splitlines()):
        found.setdefault(record["bench"], []).append(record)
    return found


def make_counter(start: int, fails_at: int):
    """In a process of its own: counts, and says in which process."""
    count = [start]

    def step() -> float:
        count[0] += 1
        if count[0] == fails_at:
            raise ValueError("as told")
        return count[0] + os.getpid() * 1000
    return step


def test_contestants_are_processes_that_take_turns():
    runs = {name: Contestant(make_counter, start, 9) for name, start in (("a", 0), ("b", 5))}
    taken = contest(3, runs)
    pids = {name: {int(value // 1000) for value in result.results}
            for name, result in taken.items()}
    assert len(pids["a"]) == len(pids["b"]) == 1 and pids["a"] != pids["b"] != {os.getpid()}
    assert [value % 1000 for value in taken["a"].results] == [1, 2, 3]
    assert [value % 1000 for value in taken["b"].results] == [6, 7, 8]
    assert all(len(result.seconds) == 2 and min(result.seconds) > 0 for result in taken.values())
    assert all(result.peak > 50e6 for result in taken.values())
    assert all(not run.process.is_alive() for run in runs.values())
    assert taken["a"].rate(10) == 20 / sum(taken["a"].seconds)  # the median of two


def fails_at_once() -> None:
    raise ValueError("as told")


def test_a_contestant_that_fails_ends_the_measurement_with_a_line():
    run = Contestant(make_counter, 0, 2)
    run.step()
    assert "ended with 1" in user_error(run.step)
    run = Contestant(fails_at_once)
    run.process.join()  # before it is asked
    assert "ended with 1" in user_error(run.step)


def test_a_command_that_fails_is_one_line(tmp_path):
    (tmp_path / "x.py").write_text("import os, sys\nsys.exit('no ' + os.environ['WORD'])")
    assert "x.py ended with 1: no luck" in user_error(
        run_quietly, [sys.executable, str(tmp_path / "x.py")], WORD="luck")


def test_every_data_measurement_runs_and_is_logged(tmp_path, monkeypatch):
    texts = [f"{i} " + "some words of a document, " * 60 for i in range(400)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    monkeypatch.setattr(bench_data, "LOADER_BATCHES", 2)
    config = BenchConfig(what=("data",), files=str(tmp_path / "a.parquet"), repeats=1,
                         workers=1, log=str(tmp_path / "log.jsonl"))
    bench_data.bench_data(config)
    figures = records_of(tmp_path / "log.jsonl")
    assert {"encoder equality", "encoder", "tokenize", "loader",
            "loader beside training"} == set(figures)
    assert figures["encoder equality"][0]["different"] == 0
    assert figures["tokenize"][0]["documents"] == 400
    assert figures["tokenize"][0]["peak_mib"] > 10


def test_computed_memory_stands_beside_measured_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_memory, "SAVED_SHAPE", (2, 64))
    monkeypatch.setattr(bench_memory, "STEP_SIZES", GPTConfig(128, 50257, 2, 2, 256))
    monkeypatch.setattr(bench_memory, "STEP_LENGTH", 128)
    measure_memory(BenchConfig(what=("memory",), log=str(tmp_path / "log.jsonl")))
    figures = records_of(tmp_path / "log.jsonl")
    assert [len(figures[name]) for name in ("memory", "kept for backward", "peak of a process")
            ] == [4, 2, 2]
    first = figures["memory"][0]
    assert first["model"] == "gpt2" and first["state_bytes"] > 16 * 124_439_808
    assert first["plain_24gb"] <= first["sharded_24gb"] <= first["sharded_checkpointed_24gb"]
    for found in figures["kept for backward"]:
        assert 0.95 < found["ratio"] < 1.05
    for found in figures["peak of a process"]:
        assert found["measured_bytes"] > found["baseline_bytes"] > 50e6


@pytest.fixture
def smallest(monkeypatch):
    """The quick mode of the sections at a size for tests, their processes forked."""
    context = fork_server()
    monkeypatch.setattr("bench.harness.multiprocessing.get_context", lambda kind: context)
    monkeypatch.setattr(bench_train, "corpus_ids", lambda: list(range(5000)))
    monkeypatch.setitem(bench_train.SIZES, "tiny", SMALL)
    monkeypatch.setattr(bench_train, "LOSS_STEPS", 3)
    monkeypatch.setattr(bench_train, "QUICK_SHAPE", (2, 32))
    monkeypatch.setattr(bench_train, "QUICK_WIDE_SHAPE", (32, 32))


def test_the_training_section_compares_equal_losses(tmp_path, smallest):
    config = BenchConfig(repeats=1, log=str(tmp_path / "log.jsonl"), quick=True)
    bench_train.measure_speed(config, "tiny", (2, 32), torch.float32, bench_train.WAYS)
    bench_train.measure_losses(config, "tiny", ("ours", "textbook"))
    bench_train.measure_peak(config, "tiny", torch.float32)
    figures = records_of(tmp_path / "log.jsonl")
    speed, exact, rough = figures["training"][0], *figures["losses"]
    for way in ("textbook", "hugging_face"):
        assert speed[f"{way}_tokens_per_sec"] > 0 and speed[f"loss_differs_from_{way}"] < 1e-5
    assert speed["over_textbook"] == pytest.approx(
        speed["ours_tokens_per_sec"] / speed["textbook_tokens_per_sec"])
    assert exact["differ_from_textbook"] < 1e-5 < exact["two_seeds_differ"]
    assert rough["differ_from_textbook"] < rough["two_seeds_differ"]
    assert 0 < figures["training memory"][0]["ratio"] < 1


def test_what_of_a_run_is_no_update_is_measured(tmp_path, smallest):
    config = BenchConfig(repeats=1, log=str(tmp_path / "log.jsonl"), quick=True)
    make_corpus(tmp_path / "data", [3000, 40_000])
    bench_train.measure_run(config, "tiny", tmp_path)
    bench_train.measure_start(config, "tiny", tmp_path)
    figures = records_of(tmp_path / "log.jsonl")
    assert 0 < figures["run"][0]["share"] < 1 and figures["start"][0]["seconds"] > 0


def test_decoding_and_validation_agree_with_what_they_are_measured_against(tmp_path, smallest,
                                                                           monkeypatch):
    monkeypatch.setattr(bench_decode, "QUICK_EVAL_SHAPE", (2, 32))
    config = BenchConfig(repeats=1, log=str(tmp_path / "log.jsonl"), quick=True)
    bench_decode.bench_decode(config)
    bench_decode.bench_eval(config)
    figures = records_of(tmp_path / "log.jsonl")
    assert figures["decoding"][0]["same_tokens"] and figures["decoding"][0]["ratio"] > 0
    assert figures["growth"][0]["ratio"] > 0 and figures["first token"][0]["ms"] > 0
    assert len(figures["validation"]) == 2
    assert figures["validation"][0]["loss_differs"] < 1e-6


def test_the_readme_quotes_the_log_of_decoding():
    figures = records_of(ROOT / "image/logs/bench_decode.jsonl")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = {(one["batch"], one["prompt"]): one["ratio"] for one in figures["first token"]}
    points = {(one["batch"], one["prompt"], one["dtype"]): one for one in figures["decoding"]}
    assert len(points) == len(figures["decoding"]) == 12 and len(first) == 6
    for rows, prompt in first:
        cells = [f"{rows}, {prompt}"]
        for dtype in ("float32", "bfloat16"):
            one = points[rows, prompt, dtype]
            assert one["same_tokens"] or dtype == "bfloat16"
            cells += [f"{one['ours_tokens_per_sec']:.0f} tokens/s",
                      f"{one['hugging_face_tokens_per_sec']:.0f}", f"{one['ratio']:.2f}"]
        assert f"| {' | '.join(cells)} | {first[rows, prompt]:.2f} |" in readme
    assert [f"{one['ratio']:.2f}" for one in figures["growth"]] == ["1.19", "2.14", "3.14"]


def test_the_gpu_section_can_be_tried_on_a_cpu(tmp_path, smallest, monkeypatch):
    monkeypatch.setattr(bench_gpu, "measure_micro_batch",
                        lambda config, name, shape, ways, device, matmul: seen.append(ways))
    monkeypatch.setattr(bench_gpu, "measure_decoding", lambda *arguments: seen.append("decode"))
    seen = []
    config = BenchConfig(repeats=1, log=str(tmp_path / "log.jsonl"), quick=True)
    bench_gpu.bench_gpu(config)
    figures = records_of(tmp_path / "log.jsonl")
    assert seen == [("ours", "textbook"), "decode"] and figures["gpu matmul"][0]["tflops"] > 0
    assert figures["gpu bandwidth"][0]["bound_tokens_per_sec"] > 0
    assert "MATH" in {found["backend"] for found in figures["gpu attention"]}
    if not torch.cuda.is_available():
        assert "--quick" in user_error(bench_gpu.bench_gpu, BenchConfig())


def test_the_recipes_are_compared_and_the_comparison_goes_on(tmp_path, monkeypatch):
    data = make_corpus(tmp_path / "data", [5000, 90_000], high=50)
    monkeypatch.setattr(bench_recipes, "TRIALS", {
        "gpt2": [{"max_lr": 1e-2, "min_lr": 1e-3}], "fast": [{"max_lr": 1e-2, "muon_lr": 1e-2}]})
    monkeypatch.setattr(bench_recipes, "SEEDS", (1, 2))
    config = BenchConfig(quick=True, data_dir=str(data), out_dir=str(tmp_path / "out"),
                         log=str(tmp_path / "log.jsonl"))
    bench_recipes.bench_recipes(config)
    figures = records_of(tmp_path / "log.jsonl")
    assert [found["recipe"] for found in figures["recipe"]] == ["gpt2", "fast"]
    gpt2, fast = (found["losses"] for found in figures["recipe"])
    for recipe, losses in (("gpt2_4updates_max_lr0.01", gpt2),
                           ("fast_4updates_max_lr0.01_muon_lr0.01", fast)):
        for seed, loss in enumerate(losses, 1):
            log = read_log(tmp_path / "out" / f"{recipe}_seed{seed}" / "metrics.jsonl")
            assert round(log["val"][4]["loss"], 4) == loss
    assert figures["recipes"][0]["fast_minus_gpt2"] == pytest.approx(
        sum(fast) / 2 - sum(gpt2) / 2, abs=1e-4)
    monkeypatch.setattr(bench_recipes, "run_quietly", None)  # all of it is there
    bench_recipes.bench_recipes(config)
    assert records_of(tmp_path / "log.jsonl")["recipe"][2:] == figures["recipe"]
    stopped = []
    monkeypatch.setattr(bench_recipes, "run_quietly", lambda *command, **also: stopped.append(1))
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    config = dataclasses.replace(config, out_dir=str(tmp_path / "other"))
    assert "was stopped: the same command" in user_error(bench_recipes.bench_recipes, config)
    assert len(stopped) < 6  # what was still to come is not begun


def test_runs_of_one_name_are_drawn_in_one_colour(tmp_path, monkeypatch):
    for name in ("a", "b"):
        lines = [{"step": step, "kind": "val", "loss": 3.0 - step} for step in (0, 1)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    colors = []
    monkeypatch.setattr("minigpt2.graphs.draw_loss", lambda axes, label, records, color: (
        colors.append(color), axes.plot([0, 1], color=color, label=label)))
    runs = [("x", tmp_path / "a.jsonl"), ("y", tmp_path / "b.jsonl"), ("x", tmp_path / "b.jsonl")]
    draw_runs(runs, tmp_path / "out.png", "")
    assert colors == ["C0", "C1", "C0"]


def test_measures_are_taken_in_turn_and_the_median_counts():
    calls, values = [], iter([9, 9, 1, 10, 5, 30, 3, 20])

    def measure(name):
        calls.append(name)
        return next(values)

    medians = in_turn(3, a=lambda: measure("a"), b=lambda: measure("b"))
    assert calls == ["a", "b"] * 4 and medians == {"a": 3, "b": 20}


def test_what_cannot_be_measured_is_said():
    assert_user_error(run_script(ROOT / "bench.py", "speed", check=False), "speed",
                      "expected some of train, data")
    assert_user_error(run_script(ROOT / "bench.py", check=False), "nothing")
    assert_user_error(run_script(ROOT / "bench.py", "recipes", check=False), "--data-dir")


def test_freed_memory_is_kept(tmp_path):
    """Pages that the system hands out, of a process that makes and frees 64 MB again and again."""
    script = tmp_path / "faults.py"
    script.write_text("import resource, sys\n"
                      f"sys.path.insert(0, {str(ROOT)!r})\n"
                      "import torch\n"
                      "from minigpt2.distributed import keep_freed_memory\n"
                      "if sys.argv[1] == 'kept':\n    keep_freed_memory()\n"
                      "for _ in range(5):\n    torch.ones(2**24)\n"
                      "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
                      "for _ in range(10):\n    torch.ones(2**24)\n"
                      "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n")
    pages = 2**26 // resource.getpagesize()
    given, kept = (int(run_script(script, how).stdout) for how in ("given", "kept"))
    if given < 5 * pages:
        pytest.skip("the C library here keeps what is freed by itself")
    assert kept < given / 2
