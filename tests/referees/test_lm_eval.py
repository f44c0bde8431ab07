"""evaluate.py against lm-evaluation-harness, offline, on the same rows: log-likelihoods within 1e-3
and equal accuracies. Rows of HellaSwag and LAMBADA can be given in two environment variables."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from helpers.common import CPU_LAUNCH, ROOT, run_script, write_rows

from dataloader import read_rows
from evaluate import lambada
from minigpt2.benchmarks import (
    choice_figures,
    last_word_figures,
    make_questions,
    multiple_choice,
    score,
)
from minigpt2.checkpoint import load_model

harness = pytest.importorskip("harness_tasks", reason="pip install -r requirements-referees.txt")

ROWS = 200
WORDS = ("the a old small river house king dog cat tree walked ran slept ate sang found lost over "
         "under with without apples Maximiliana yesterday quickly 1984 café naïve it's").split()


def made_rows() -> dict[str, list[dict]]:
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    stories = []
    for i in range(ROWS):
        a, b = text(3, 60).capitalize() + ".", text(1, 4)
        stories.append({"ctx": f"{a} {b}", "label": rng.randrange(4),
                        "endings": [f"{text(1, 15)}{rng.choice(['.', ' [substeps] now.'])}"
                                    for _ in range(4)], "ind": i})
    return {"hellaswag": stories, "lambada": [{"text": text(20, 80)} for _ in range(ROWS)]}


def rows_of(task: str) -> list[dict]:
    given = os.environ.get("HELLASWAG_FILE" if task == "hellaswag" else "LAMBADA_FILE")
    if given:
        rows = [row for _, row in read_rows(Path(given))][:ROWS]
    else:
        rows = made_rows()["lambada" if task == "lambada" else "hellaswag"]
    return rows


@pytest.mark.parametrize("task", harness.TASKS)
def test_scores_and_accuracies_equal_the_harness(checkpoint, tmp_path, monkeypatch, task):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = rows_of(task)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    results = harness.load_harness(checkpoint, task, path, batch_size=16)()
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    expected = [response[0] for sample in samples for response in sample["filtered_resps"]]
    metrics = results["results"][task]

    model = load_model(checkpoint)
    render = lambada if task == "lambada" else multiple_choice
    questions = make_questions(path, read_rows(path), render, model.config.block_size)
    pairs = [pair for question in questions for pair in question.pairs]
    scores = score(model, pairs, CPU_LAUNCH, torch.float32)
    assert scores[:, 0].tolist() == pytest.approx(expected, abs=1e-3)
    if task == "lambada":
        figures = last_word_figures(scores)
        assert figures["accuracy_last_word"] == metrics["acc,none"]
        assert figures["perplexity_per_word"] == pytest.approx(metrics["perplexity,none"], rel=1e-4)
    else:
        figures = choice_figures(questions, scores)
        assert figures["accuracy_summed"] == metrics["acc,none"]
        assert figures["accuracy_per_character"] == metrics["acc_norm,none"]


def test_the_speed_of_hellaswag_is_measured_on_equal_accuracies(tmp_path):
    path, log = tmp_path / "rows.jsonl", tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made_rows()["hellaswag"]))
    run_script(ROOT / "tests/referees/hellaswag_speed.py", "--file", path, "--quick", "--log", log)
    figures = json.loads(log.read_text().splitlines()[-1])
    assert figures["rows"] == 8 and figures["ours_accuracy"] == figures["lm_eval_accuracy"]
    assert figures["ratio"] == pytest.approx(
        figures["ours_rows_per_sec"] / figures["lm_eval_rows_per_sec"])
