"""Every benchmark runs at a small size and compares what is equal."""

import importlib.util
import json
import os
import resource
import subprocess
import sys
import unittest.mock

import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers.common import ROOT, assert_user_error, run_script, user_error
from helpers.ranks import fork_server
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bench import data as bench_data
from bench import decode as bench_decode
from bench import finetune as bench_finetune
from bench import gpu as bench_gpu
from bench import harness
from bench import memory as bench_memory
from bench import train as bench_train
from bench.harness import BenchConfig, alternate, compare
from minigpt2.kernels import can_pack
from minigpt2.metrics import draw_runs
from model import GPT, GPTConfig

SMALL = GPTConfig(block_size=64, n_layer=1, n_head=1, n_embd=16)
SCRIPTS = ("train", "decode", "data", "memory", "finetune", "gpu")


def records_of(path) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for record in map(json.loads, path.read_text().splitlines()):
        found.setdefault(record["bench"], []).append(record)
    return found


@pytest.fixture
def quick(tmp_path, monkeypatch) -> BenchConfig:
    """The quick mode at a size for tests, its worker processes forked from a loaded server."""
    context = fork_server()
    monkeypatch.setattr(harness.multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setitem(bench_train.SIZES, "tiny", SMALL)
    monkeypatch.setattr(bench_train, "LOSS_STEPS", 3)
    monkeypatch.setattr(bench_train, "QUICK_SHAPE", (2, 32))
    return BenchConfig(quick=True, log=str(tmp_path / "log.jsonl"))


# --------------------------------------------------------------------------------- harness


def make_counter(name: str, fails_at: int):
    """A step that counts, and says in which process it runs."""
    count = [0]

    def step() -> float:
        count[0] += 1
        if count[0] == fails_at:
            raise ValueError("as told")
        return count[0] + os.getpid() * 1000
    return step


def make_death(name: str):
    return lambda: os._exit(3)


@pytest.mark.slow
def test_variants_alternate_in_processes_of_their_own(quick):
    timings = compare(("a", "b"), 3, make_counter, 9)
    pids = {name: {int(value // 1000) for value in timing.results}
            for name, timing in timings.items()}
    assert len(pids["a"]) == len(pids["b"]) == 1 and pids["a"] != pids["b"] != {os.getpid()}
    for timing in timings.values():
        assert [value % 1000 for value in timing.results] == [1, 2, 3]
        assert timing.seconds > 0 and timing.peak > 50e6


@pytest.mark.slow
def test_a_failing_variant_ends_the_benchmark(quick):
    with pytest.raises(ValueError, match="as told"):
        compare(("a",), 3, make_counter, 2)
    assert "a benchmark process died" in user_error(compare, ("a",), 1, make_death)


def test_calls_alternate_after_a_warm_up_round():
    calls = []
    medians = alternate(3, a=lambda: calls.append("a"), b=lambda: calls.append("b"))
    assert calls == ["a", "b"] * 4 and set(medians) == {"a", "b"} and min(medians.values()) >= 0


def test_a_failing_script_is_one_line():
    message = user_error(harness.run_script, "trainer.py", {"n_layer": 0})
    assert "trainer.py ended with 2" in message and "--n-layer" in message


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_is_a_script(name, tmp_path):
    assert "--quick" in run_script(ROOT / "bench" / f"{name}.py", "--help", cwd=tmp_path).stdout


def test_the_first_record_is_what_reproduces_a_benchmark(tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    monkeypatch.setattr("sys.argv", ["bench.py", "--repeats", "3", "--log", str(log)])
    monkeypatch.setattr(harness, "share_cores", lambda: None)  # changes the environment
    with pytest.raises(SystemExit, match="0"):
        harness.run_bench(lambda config: None, BenchConfig, "")
    machine, = records_of(log)["machine"]
    assert machine["repeats"] == 3 and machine.keys() >= {"cores", "torch", "git_commit"}


def test_missing_input_is_one_line(tmp_path):
    assert_user_error(run_script(ROOT / "bench" / "finetune.py", check=False), "--data")
    if not torch.cuda.is_available():
        assert "--quick" in user_error(bench_gpu.bench_gpu, BenchConfig())


# ------------------------------------------------------------------------------- subjects


@pytest.mark.slow
def test_data(tmp_path, quick):
    texts = [f"{i} " + "some words of a document, " * 60 for i in range(400)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    config = bench_data.DataBenchConfig(files=str(tmp_path / "a.parquet"), repeats=1, workers=1,
                                   log=quick.log)
    bench_data.bench_data(config)
    figures = records_of(tmp_path / "log.jsonl")
    assert {"encoder equality", "encoder", "tokenize", "loader"} <= set(figures)
    assert all(found["different"] == 0 for found in figures["encoder equality"])
    assert figures["tokenize"][0]["documents"] == 400


@pytest.mark.slow
def test_training_compares_equal_losses(tmp_path, quick):
    for dtype in bench_train.DTYPES:
        bench_train.measure_training(quick, "losses", "tiny", dtype, (2, 32), 3,
                                     ("ours", "textbook", "other_seed"))
    bench_train.measure_training(quick, "training", "tiny", torch.float32, (2, 32), 3,
                                 bench_train.WAYS)
    figures = records_of(tmp_path / "log.jsonl")
    exact, rough = figures["losses"]
    assert exact["differ_from_textbook"] < 1e-5 < exact["differ_from_other_seed"]
    assert rough["differ_from_textbook"] < rough["differ_from_other_seed"]
    speed = figures["training"][0]
    for way in ("textbook", "hugging_face"):
        assert speed[f"{way}_tokens_per_sec"] > 0 and speed[f"loss_differs_from_{way}"] < 1e-5
    assert speed["over_textbook"] == pytest.approx(
        speed["ours_tokens_per_sec"] / speed["textbook_tokens_per_sec"])


@pytest.mark.slow
def test_the_training_step_needs_less_memory_than_the_textbooks(tmp_path, quick):
    bench_train.measure_training(quick, "training memory", "tiny", torch.float32, (32, 32), 2,
                                 ("ours", "textbook"))
    assert 0 < records_of(tmp_path / "log.jsonl")["training memory"][0]["memory_ratio"] < 1


@pytest.mark.slow
def test_decoding(tmp_path, quick):
    bench_decode.bench_decode(quick)
    figures = records_of(tmp_path / "log.jsonl")
    full, *int8 = figures["decoding"]
    assert len(int8) == can_pack(torch.int8)
    assert full["same_tokens_as_hugging_face"] and full["over_hugging_face"] > 0
    assert all(one["ours_tokens_per_sec"] > 0 and "hugging_face_tokens_per_sec" not in one
               for one in int8)
    for one in (full, *int8) if importlib.util.find_spec("ctranslate2") else ():
        assert one["over_ctranslate2"] == pytest.approx(
            one["ours_tokens_per_sec"] / one["ctranslate2_tokens_per_sec"])
        assert one["same_tokens_as_ctranslate2"] or one in int8
    limits, = figures["limits"]
    assert limits["read_gb_per_sec"] > 0 and limits["float32_gflops"] > 1


@pytest.mark.slow
def test_training_beside_another_process():
    """The process computes while, and only while, the second comparison runs; one contestant has
    the default spin count."""
    seen = []

    def measure(config, kind, *training):
        busy = subprocess.run(["ps", "-ww", "-o", "args=", "--ppid", str(os.getpid())], check=True,
                              capture_output=True, text=True).stdout
        seen.append(("os.getppid() == parent" in busy, training[-1]))

    with unittest.mock.patch.object(bench_train, "measure_training", measure):
        bench_train.measure_busy(BenchConfig(quick=True), "tiny", torch.float32, (2, 32), 2)
    assert seen == [(False, ("ours", "ours_spinning")), (True, ("ours", "ours_spinning"))]
    counts = compare(("ours", "ours_spinning"), 1, make_spin_count)
    assert counts["ours_spinning"].results == [300000]
    assert counts["ours"].results == [int(os.environ.get("GOMP_SPINCOUNT", 0))]


def test_memory_table_and_checkpoint_stall(tmp_path, quick, monkeypatch):
    bench_memory.bench_memory(quick)
    figures = records_of(tmp_path / "log.jsonl")
    assert [found["model"] for found in figures["memory"]] == [
        "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    committed = records_of(ROOT / "image/logs/bench_memory.jsonl")["memory"]
    for found, logged in zip(figures["memory"], committed, strict=True):
        assert found == logged  # the table in docs/benchmarks.md is of today's formula
    assert figures["checkpoint"][0]["ratio"] > 0


def make_spin_count(name: str):
    return lambda: int(os.environ.get("GOMP_SPINCOUNT", 0))


def make_too_large(name: str):
    def step() -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.82 GiB.\nGPU 0 has")
    return step


@pytest.mark.slow
def test_gpu_benchmark_on_a_cpu(tmp_path, quick, monkeypatch, capsys):
    """A contestant that this card cannot run is one line, and the others are measured."""
    seen = []
    monkeypatch.setattr(bench_gpu, "measure_micro_batch", lambda config, way, *arguments: (
        compare((way,), 1, make_too_large) if way == "ours_tuned" else seen.append(way)))
    monkeypatch.setattr(bench_gpu, "measure_decoding", lambda *arguments: seen.append("decode"))
    bench_gpu.bench_gpu(quick)
    figures = records_of(tmp_path / "log.jsonl")
    assert seen == ["decode", "ours", "ours_without_cudnn", "textbook"]
    assert figures["limits"][0]["bfloat16_gflops"] > 0 and figures["limits"][0]["size"] == 256
    assert "training, ours_tuned, micro-batch 2: not measured: CUDA out of memory. Tried to " \
           "allocate 9.82 GiB." in capsys.readouterr().out.splitlines()


def test_an_optimizer_step_follows_all_micro_steps(monkeypatch):
    calls, forward = [], GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda *arguments, **options: (
        calls.append("forward"), forward(*arguments, **options))[1])
    for way in ("ours", "textbook"):
        step = bench_train.make_training(way, SMALL, (2, 32), torch.float32,
                                         bench_train.zipf_tokens(3 * 65), micro_steps=3)
        hook = register_optimizer_step_pre_hook(lambda *arguments: calls.append("step"))
        losses = [step(), step()]  # of the same three batches
        hook.remove()
        assert calls == ["forward", "forward", "forward", "step"] * 2 and losses[1] < losses[0]
        calls.clear()


@pytest.mark.slow
def test_fine_tuning_compares_equal_losses(tmp_path, quick):
    rows = [{"instruction": f"Repeat {i}.", "input": "so " * (i % 2), "output": f"{i} " * (i % 5)}
            for i in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = bench_finetune.FinetuneBenchConfig(quick=True, data=str(tmp_path / "rows.json"),
                                                log=quick.log)
    bench_finetune.bench_finetune(config)
    found, = records_of(tmp_path / "log.jsonl")["fine-tuning"]
    assert 12 < found["rows"] < 24 and len(found["losses"]) == bench_finetune.LOSS_STEPS
    assert found["losses"][0] > found["losses"][-1] and found["loss_differs"] < 1e-5
    assert found["ratio"] == pytest.approx(
        found["ours_tokens_per_sec"] / found["hugging_face_tokens_per_sec"])


# ------------------------------------------------------------------------------- figures


def test_runs_of_one_name_are_drawn_in_one_color(tmp_path, monkeypatch):
    for name in ("a", "b"):
        lines = [{"step": step, "kind": "val", "loss": 3.0 - step} for step in (0, 1)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    colors = []
    monkeypatch.setattr("minigpt2.metrics.draw_loss", lambda axes, label, records, color: (
        colors.append(color), axes.plot([0, 1], color=color, label=label)))
    runs = [("x", tmp_path / "a.jsonl"), ("y", tmp_path / "b.jsonl"), ("x", tmp_path / "b.jsonl")]
    draw_runs(runs, tmp_path / "out.png", "")
    assert colors == ["C0", "C1", "C0"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_kept(tmp_path):
    """Page faults of a process that allocates and frees 64 MB again and again."""
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
    returned, kept = (int(run_script(script, how).stdout) for how in ("returned", "kept"))
    if returned < 5 * pages:
        pytest.skip("this C library keeps freed memory by itself")
    assert kept < returned / 2
