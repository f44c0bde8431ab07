import json

import pyarrow
import pyarrow.parquet
from conftest import ROOT, assert_user_error, run_script

import bench
from model import GPTConfig


def test_every_data_measurement_runs_and_is_logged(tmp_path, monkeypatch):
    texts = [f"{i} " + "some words of a document, " * 60 for i in range(400)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    monkeypatch.setattr(bench, "LOADER_BATCHES", 2)
    config = bench.BenchConfig(what=("data",), files=str(tmp_path / "a.parquet"), repeats=1,
                               workers=1, log=str(tmp_path / "log.jsonl"))
    bench.bench_data(config)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    figures = {record["bench"]: record for record in records}
    assert {"encoder equality", "encoder", "tokenise", "loader",
            "loader beside training"} == set(figures)
    assert figures["encoder equality"]["different"] == 0
    assert figures["tokenise"]["documents"] == 400 and figures["tokenise"]["peak_mib"] > 10


def test_computed_memory_stands_beside_measured_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SAVED_SHAPE", (2, 64))
    monkeypatch.setattr(bench, "STEP_SIZES", GPTConfig(128, 50257, 2, 2, 256))
    monkeypatch.setattr(bench, "STEP_LENGTH", 128)
    bench.bench_memory(bench.BenchConfig(what=("memory",), log=str(tmp_path / "log.jsonl")))
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    figures = {name: [record for record in records if record["bench"] == name]
               for name in ("memory", "kept for backward", "peak of a process")}
    assert [len(found) for found in figures.values()] == [4, 2, 2]
    first = figures["memory"][0]
    assert first["model"] == "gpt2" and first["state_bytes"] > 16 * 124_439_808
    assert first["plain_24gb"] <= first["sharded_24gb"] <= first["sharded_checkpointed_24gb"]
    for found in figures["kept for backward"]:
        assert 0.95 < found["ratio"] < 1.05
    for found in figures["peak of a process"]:
        assert found["measured_bytes"] > found["baseline_bytes"] > 50e6


def test_measures_are_taken_in_turn_and_the_median_counts():
    calls, values = [], iter([9, 9, 1, 10, 5, 30, 3, 20])

    def measure(name):
        calls.append(name)
        return next(values)

    medians = bench.in_turn(3, a=lambda: measure("a"), b=lambda: measure("b"))
    assert calls == ["a", "b"] * 4 and medians == {"a": 3, "b": 20}


def test_what_cannot_be_measured_is_said():
    assert_user_error(run_script(ROOT / "bench.py", "speed", check=False), "speed", "expected data")
    assert_user_error(run_script(ROOT / "bench.py", check=False), "nothing")
