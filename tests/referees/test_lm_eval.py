"""evaluate.py against lm-evaluation-harness, offline, on the same rows: log-likelihoods within 1e-3
and equal accuracies. Rows of HellaSwag and LAMBADA can be given in two environment variables."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from helpers.common import CPU_LAUNCH

from evaluate import (
    choice_figures,
    hellaswag,
    hellaswag_harness,
    lambada,
    last_word_figures,
    read_questions,
    score,
)
from minigpt2.checkpoint import load_model

lm_eval = pytest.importorskip("lm_eval", reason="pip install -r requirements-referees.txt")

ROWS = 200
WORDS = ("the a old small river house king dog cat tree walked ran slept ate sang found lost over "
         "under with without apples Maximiliana yesterday quickly 1984 café naïve it's").split()
CHOICES = ("output_type: multiple_choice\ndoc_to_choice: {choices}\ndoc_to_target: label\n"
           "metric_list: [{{metric: acc}}, {{metric: acc_norm}}]\n")
# hellaswag_harness: what the harness's own preprocessing makes of a row
TASKS = {
    "hellaswag": 'doc_to_text: "{{ctx}}"\n' + CHOICES.format(choices="endings"),
    "hellaswag_harness": 'doc_to_text: "{{query}}"\n' + CHOICES.format(choices="choices"),
    "lambada": ("output_type: loglikelihood\n"
                "doc_to_text: \"{{text.split(' ')[:-1]|join(' ')}}\"\n"
                "doc_to_target: \"{{' '+text.split(' ')[-1]}}\"\n"
                "metric_list: [{metric: perplexity, aggregation: perplexity},"
                " {metric: acc, aggregation: mean}]\n")}


def made_rows() -> dict[str, list[dict]]:
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    stories = []
    for i in range(ROWS):
        a, b = text(3, 60).capitalize() + ".", text(1, 4)
        stories.append({"ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}", "label": rng.randrange(4),
                        "activity_label": text(1, 3).capitalize(),
                        "endings": [f"{text(1, 15)}{rng.choice(['.', ' [substeps] now.'])}"
                                    for _ in range(4)], "ind": i})
    return {"hellaswag": stories, "lambada": [{"text": text(20, 80)} for _ in range(ROWS)]}


def rows_of(task: str) -> list[dict]:
    given = os.environ.get("HELLASWAG_FILE" if "hellaswag" in task else "LAMBADA_FILE")
    if given:
        with open(given, encoding="utf-8") as file:
            rows = [json.loads(line) for line, _ in zip(file, range(ROWS), strict=False)]
    else:
        rows = made_rows()["lambada" if task == "lambada" else "hellaswag"]
    return rows


def harness_results(checkpoint: Path, task: str, path: Path) -> tuple[dict, list[float]]:
    """The harness's metrics, and its log-likelihoods in the order of the rows."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (path.parent / f"{task}.yaml").write_text(
        f"task: {task}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {path}}}}}\n"
        f"test_split: test\n{TASKS[task]}", encoding="utf-8")
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=16),
        tasks=[task], log_samples=True, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(path.parent), include_defaults=False))
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return (results["results"][task],
            [response[0] for sample in samples for response in sample["filtered_resps"]])


@pytest.mark.parametrize("task", TASKS)
def test_scores_and_accuracies_equal_the_harness(checkpoint, tmp_path, monkeypatch, task):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = rows_of(task)
    if task == "hellaswag_harness":
        if "ctx_a" not in rows[0]:
            pytest.skip("this file has no ctx_a and ctx_b")
        from datasets import Dataset
        from lm_eval.tasks.hellaswag.utils import process_docs
        processed = process_docs(Dataset.from_list(rows)).to_list()
        given = [row | {"label": row["gold"]} for row in processed]
    else:
        given = rows
    path, own_path = tmp_path / "rows.jsonl", tmp_path / "own.jsonl"
    for file, content in ((path, given), (own_path, rows)):
        file.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    metrics, expected = harness_results(checkpoint, task, path)

    model = load_model(checkpoint)
    render = {"hellaswag": hellaswag, "hellaswag_harness": hellaswag_harness, "lambada": lambada}
    questions = read_questions(own_path, render[task], None, model.config.block_size)
    pairs = [pair for question in questions for pair in question.pairs]
    scores = score(model, pairs, CPU_LAUNCH, torch.float32, 8192, task)
    assert scores[:, 0].tolist() == pytest.approx(expected, abs=1e-3)
    if task == "lambada":
        figures = last_word_figures(scores)
        assert figures["accuracy_last_word"] == metrics["acc,none"]
        assert figures["perplexity_per_word"] == pytest.approx(metrics["perplexity,none"], rel=1e-4)
    else:
        figures = choice_figures(questions, scores)
        assert figures["accuracy_summed"] == metrics["acc,none"]
        assert figures["accuracy_per_character"] == metrics["acc_norm,none"]
