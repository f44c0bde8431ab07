"""lm-evaluation-harness on a checkpoint and a file of rows, without a network."""

from collections.abc import Callable
from pathlib import Path

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

CHOICES = ("output_type: multiple_choice\ndoc_to_choice: {choices}\ndoc_to_target: label\n"
           "metric_list: [{{metric: acc}}, {{metric: acc_norm}}]\n")
TASKS = {
    "hellaswag": 'doc_to_text: "{{ctx}}"\n' + CHOICES.format(choices="endings"),
    "lambada": ("output_type: loglikelihood\n"
                "doc_to_text: \"{{text.split(' ')[:-1]|join(' ')}}\"\n"
                "doc_to_target: \"{{' '+text.split(' ')[-1]}}\"\n"
                "metric_list: [{metric: perplexity, aggregation: perplexity},"
                " {metric: acc, aggregation: mean}]\n")}


def load_harness(checkpoint: Path, task: str, path: Path, **options) -> Callable[[], dict]:
    """A function that evaluates the JSON Lines file `path` in float32 on a CPU and returns the
    harness's results; `options` go to HFLM. Writes the task's description beside the file."""
    (path.parent / f"{task}.yaml").write_text(
        f"task: {task}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {path}}}}}\n"
        f"test_split: test\n{TASKS[task]}", encoding="utf-8")
    model = HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", **options)
    manager = TaskManager(include_path=str(path.parent), include_defaults=False)
    return lambda: lm_eval.simple_evaluate(model=model, tasks=[task], task_manager=manager,
                                           log_samples=True, bootstrap_iters=0)
