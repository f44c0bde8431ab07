"""Evaluates checkpoints: validation loss, HellaSwag, LAMBADA, and any multiple-choice file.

    python evaluate.py --download                             # HellaSwag and LAMBADA, from the hub
    python evaluate.py out/pretrain out/finetune gpt2         # a table with one column each
    python evaluate.py out/pretrain --tasks hellaswag,my_questions.jsonl --limit 500
    torchrun --standalone --nproc-per-node=8 evaluate.py out/pretrain

Tasks, separated by commas; NAME=FILE reads another file:

    val                 loss, perplexity and bits per byte on the validation shard of --data-dir
    hellaswag           the file's own contexts, as build-nanogpt scores it
    hellaswag_harness   the contexts of lm-evaluation-harness (needs the official file)
    lambada             the last word of each passage
    FILE                rows of `context`, `choices` and `label`: JSON Lines, JSON or parquet

The numbers do not depend on the number of ranks. The results of a local checkpoint are also written
to evaluation.json in its folder. No prompt template is applied.
"""

import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from dataloader import TokenLoader, read_rows
from inference import check_vocabulary
from minigpt2.checkpoint import find_checkpoint, load_model
from minigpt2.config import UserError, flag, parse_config, run_main
from minigpt2.distributed import Dtype, Launch, autocast, pick_dtype, to_device
from minigpt2.faults import launched
from minigpt2.files import atomic_write, sha256_of
from minigpt2.hub import RetryPolicy, fetch, list_files
from minigpt2.loss import IGNORE_INDEX, block_sizes, linear_cross_entropy
from minigpt2.progress import progress_bar
from minigpt2.tokenizer import EOT_TOKEN, N_VOCAB, encode, load_tokenizer
from model import GPT

ROOT = Path(__file__).resolve().parent
FILES = {"hellaswag": "hellaswag_val.parquet", "hellaswag_harness": "hellaswag_val.parquet",
         "lambada": "lambada_test.jsonl"}  # in --eval-dir
DOWNLOADS = {  # file: (repository and commit on the hub, path there, SHA-256)
    "hellaswag_val.parquet": (
        "Rowan/hellaswag", "218ec52e09a7e7462a5400043bb9a69a41d06b76",
        "data/validation-00000-of-00001.parquet",
        "899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd"),
    "lambada_test.jsonl": (
        "EleutherAI/lambada_openai", "900124bf3b8235c6daf21033af9948b3f07346c4",
        "data/lambada_test_en.jsonl",
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226")}
RESULTS_FILE = "evaluation.json"
# Published results of OpenAI's 124M weights: build-nanogpt (hellaswag), lm-evaluation-harness
# (hellaswag_harness and the last word), the GPT-2 paper, table 3 (the last token)
PUBLISHED = {"gpt2": {
    "hellaswag": {"accuracy_summed": 0.2859, "accuracy_per_token": 0.2955},
    "hellaswag_harness": {"accuracy_summed": 0.2892, "accuracy_per_character": 0.3114},
    "lambada": {"accuracy_last_word": 0.3256, "perplexity_per_word": 40.06,
                "accuracy_last_token": 0.4599}}}


@dataclass(frozen=True)
class EvaluateConfig:
    checkpoints: tuple[str, ...] = flag((), "folders, OUT_DIRs of runs, or hub names",
                                        positional=True)
    tasks: str = flag("val,hellaswag,lambada", "what to evaluate, see above")
    data_dir: str = flag(str(ROOT / "pretrain_data" / "fineweb"), "token shards, for val",
                         is_path=True)
    eval_dir: str = flag(str(ROOT / "eval_data"), "folder of HellaSwag and LAMBADA", is_path=True)
    download: bool = flag(False, "download HellaSwag (10,042 rows) and LAMBADA (5,153) first")
    eval_tokens: int = flag(10_485_760, "tokens of the validation split, for val", minimum=1)
    limit: int | None = flag(None, "only the first rows of each benchmark", minimum=1)
    batch_tokens: int = flag(8192, "tokens per batch and rank", minimum=1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Dtype = flag("auto", "autocast dtype; auto: bfloat16 (or float16) on CUDA, else float32")


Pair = tuple[list[int], list[int]]  # ids of the context, ids of the continuation


@dataclass(frozen=True)
class Question:
    pairs: list[Pair]  # one per choice
    label: int  # the index of the right choice
    characters: list[int]  # length of each choice as text, without the leading space


# ------------------------------------------------------------------------------- rendering
def make_question(contexts: list[str], choices: list[str], label: int) -> Question:
    """A question with one context per choice. Whitespace between them, a single space unless the
    context ends with some, belongs to the continuation. An empty context is <|endoftext|>; the
    choice then starts a text."""
    pairs = []
    for context, choice in zip(contexts, choices, strict=True):
        end = len(context.rstrip())
        pairs.append((encode(context[:end]), encode((context[end:] or " ") + choice)) if end else
                     ([EOT_TOKEN], encode(choice)))
    return Question(pairs, label, list(map(len, choices)))


def multiple_choice(row: dict) -> Question:
    """A row of `context` (or a list of contexts, one per choice), `choices` and `label`."""
    context, choices, label = (row.get(key) for key in ("context", "choices", "label"))
    contexts = context if isinstance(context, list) else [context] * len(choices or ())
    if not isinstance(choices, list) or len(choices) < 2 or len(contexts) != len(choices):
        raise ValueError("expected a list of at least two `choices`, and a `context`, or one each")
    if not all(isinstance(text, str) for text in (*contexts, *choices)):
        raise ValueError("`context` and `choices` must be text")
    if "" in [choice.strip() for choice in choices]:
        raise ValueError("a choice is empty")
    return make_question(contexts, choices, label_of(label, choices))


def label_of(label: object, choices: list) -> int:
    """A label as an index. The official HellaSwag files hold it as text."""
    index = int(label) if isinstance(label, str) and label.isdecimal() else label
    if not isinstance(index, int) or not 0 <= index < len(choices):
        raise ValueError(f"label is {label!r:.40}, expected 0 to {len(choices) - 1}")
    return index


def hellaswag(row: dict) -> Question:
    """A row of HellaSwag as it stands, as in build-nanogpt's hellaswag.py."""
    return multiple_choice({"context": row.get("ctx"), "choices": row.get("endings"),
                            "label": row.get("label")})


def hellaswag_harness(row: dict) -> Question:
    """A row of HellaSwag as lm-evaluation-harness renders it: with the activity as a heading, the
    second sentence capitalized, and WikiHow's marks removed."""
    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    if not all(isinstance(row.get(key), str) for key in ("activity_label", "ctx_a", "ctx_b")):
        raise ValueError("activity_label, ctx_a and ctx_b are not all there, which the harness's "
                         "form needs: use the official file, or the task hellaswag")
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return multiple_choice({"context": clean(context), "label": row.get("label"),
                            "choices": [clean(ending) for ending in row.get("endings") or ()]})


def lambada(row: dict) -> Question:
    """A row of LAMBADA: the last word, after the last space, is the only choice."""
    context, space, word = str(row.get("text") or "").rpartition(" ")
    if not space or not context or not word:
        raise ValueError("expected a `text` that ends with a space and a word")
    return make_question([context], [word], 0)


RENDERERS = {"hellaswag": hellaswag, "hellaswag_harness": hellaswag_harness, "lambada": lambada}


def read_questions(path: Path, render: Callable[[dict], Question], limit: int | None,
                   block_size: int) -> list[Question]:
    """The questions of a file (JSON, JSON Lines or parquet), cut to the context from the left.
    Raises UserError naming the first bad row."""
    questions = []
    for place, row in read_rows(path)[:limit]:
        try:
            question = render(row if isinstance(row, dict) else {})
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        if (longest := max(len(continuation) for _, continuation in question.pairs)) > block_size:
            raise UserError(f"{place}: a choice has {longest} tokens, the context {block_size}: "
                            "leave the row out")
        questions.append(question)
    if not questions:
        raise UserError(f"{path} has no rows")
    return questions


# --------------------------------------------------------------------------------- scoring
@torch.no_grad()
def score(model: GPT, pairs: list[Pair], launch: Launch, dtype: torch.dtype, batch_tokens: int,
          label: str) -> torch.Tensor:
    """For each pair: the log-probability of the continuation (nats), whether every one of its
    tokens is the most likely one, and whether the last one is: (N, 3) float64, equal on all ranks.

    Pairs are sorted by length into batches of about batch_tokens, which do not depend on the number
    of ranks. Contexts are cut on the left. Only the continuations pass through the output head.
    """
    limit = model.config.block_size + 1  # the last token is only a target
    rows = [((context + choice)[-limit:], len(choice)) for context, choice in pairs]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    batches, scores = [], torch.zeros(len(rows), 3, dtype=torch.float64)
    while order:
        size = max(1, batch_tokens // len(rows[order[0]][0]))
        batches.append(order[:size])
        order = order[size:]
    mine = batches[launch.rank :: launch.world_size]
    for batch in progress_bar(len(mine), 0, label, enabled=launch.is_master,
                              over=mine):
        scores[batch] = score_batch(model, [rows[i] for i in batch], launch.device, dtype)
    return launch.sum(scores).cpu()


def score_batch(model: GPT, rows: list[tuple[list[int], int]], device: torch.device,
                dtype: torch.dtype) -> torch.Tensor:
    """One batch of (ids, length of the continuation) -> (B, 3) float64, see `score`."""
    inputs = torch.zeros(len(rows), max(len(row) for row, _ in rows) - 1,
                         dtype=torch.int64)  # (B, T)
    places = []  # (row, position of the token before, target) of every scored token
    for i, (row, length) in enumerate(rows):
        inputs[i, : len(row) - 1] = torch.tensor(row[:-1])
        places += [(i, p - 1, row[p]) for p in range(len(row) - length, len(row))]
    row, position, target = torch.tensor(places).T.to(device)  # (N,) each
    with autocast(device, dtype):
        x = model.hidden_states(inputs.to(device))[row, position]  # (N, C)
        step, _ = block_sizes(device)
        logits = (model.lm_head(part)[:, :N_VOCAB].float() for part in x.split(step))
        parts = [(-F.cross_entropy(scores, ids, reduction="none"), scores.argmax(1) == ids)
                 for scores, ids in zip(logits, target.split(step), strict=True)]
    logprob, greedy = (torch.cat(tensors).double() for tensors in zip(*parts, strict=True))  # (N,)
    total = torch.zeros(len(rows), dtype=torch.float64, device=device).index_add_(0, row, logprob)
    wrong = torch.zeros_like(total).index_add_(0, row, 1 - greedy)
    last = torch.tensor([length for _, length in rows]).cumsum(0).to(device) - 1  # (B,)
    return torch.stack([total, (wrong == 0).double(), greedy[last]], dim=1).cpu()


# ----------------------------------------------------------------------------- the figures
def validation_figures(model: GPT, config: EvaluateConfig, launch: Launch,
                       dtype: torch.dtype) -> dict[str, float]:
    """The mean loss over the first targets of the validation split, in nats per token, and in bits
    per byte of their text. <|endoftext|>, which is no text, is left out of both sums of the latter.
    """
    T = model.config.block_size
    loader = TokenLoader(Path(config.data_dir), "val", sequence_length=T,
                         micro_batch_size=max(1, config.batch_tokens // T), total_batch_size=T,
                         vocab_size=model.config.vocab_size, seed=0, rank=launch.rank,
                         world_size=launch.world_size)
    text_of = load_tokenizer().decode_single_token_bytes
    byte_counts = torch.tensor([len(text_of(token)) for token in range(EOT_TOKEN)] + [0])  # (V,)
    byte_counts = byte_counts.to(launch.device)
    sums = torch.zeros(4, dtype=torch.float64)  # nats, tokens; those of <|endoftext|>, bytes
    batches = list(loader.eval_batches(config.eval_tokens))
    for batch in progress_bar(len(batches), 0, "val", enabled=launch.is_master,
                              over=batches):
        inputs, targets = (to_device(x, launch.device) for x in batch)  # (B, T) each
        with torch.no_grad(), autocast(launch.device, dtype):
            x, targets = model.hidden_states(inputs).flatten(0, 1), targets.flatten()
            ends = targets.where(targets == EOT_TOKEN, IGNORE_INDEX)
            nats, end_nats = (linear_cross_entropy(x, model.lm_head.weight, t).item()
                              for t in (targets, ends))
        valid = targets[targets != IGNORE_INDEX]
        sums += torch.tensor([nats, len(valid), end_nats, byte_counts[valid].sum().item()],
                             dtype=torch.float64)
    nats, tokens, end_nats, num_bytes = launch.sum(sums).tolist()
    if not num_bytes:
        raise UserError(f"--data-dir {config.data_dir}: the validation split holds no text")
    return {"loss": nats / tokens, "perplexity": math.exp(nats / tokens), "tokens": int(tokens),
            "bits_per_byte": (nats - end_nats) / (math.log(2) * num_bytes), "bytes": int(num_bytes)}


def choice_figures(questions: list[Question], scores: torch.Tensor) -> dict[str, float]:
    """Accuracies of the choice with the highest log-probability: summed (lm-evaluation-harness's
    acc), per token (build-nanogpt's acc_norm) and per character (the harness's acc_norm)."""
    right = {"accuracy_summed": 0, "accuracy_per_token": 0, "accuracy_per_character": 0}
    for question, logprobs in zip(questions, split_by_question(questions, scores[:, 0]),
                                  strict=True):
        tokens = torch.tensor([len(continuation) for _, continuation in question.pairs])
        divisors = (torch.ones(()), tokens, torch.tensor(question.characters))
        for name, divisor in zip(right, divisors, strict=True):
            right[name] += int((logprobs / divisor).argmax()) == question.label
    n, figures = len(questions), {}
    for name, count in right.items():
        figures |= {name: count / n, f"{name}_stderr": stderr(count / n, n)}
    return figures | {"rows": n}


def split_by_question(questions: list[Question], values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return values.split([len(question.pairs) for question in questions])


def stderr(p: float, n: int) -> float:
    """The standard error of a fraction p of n rows."""
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan


def last_word_figures(scores: torch.Tensor) -> dict[str, float]:
    """LAMBADA: accuracy of the whole last word (lm-evaluation-harness) and of its last token (the
    GPT-2 paper's), and the perplexity per word, exp of the mean negative log-probability."""
    n, figures = len(scores), {}
    for name, hits in (("accuracy_last_word", scores[:, 1]), ("accuracy_last_token", scores[:, 2])):
        figures |= {name: hits.mean().item(), f"{name}_stderr": stderr(hits.mean().item(), n)}
    perplexity = math.exp(-scores[:, 0].mean().item())
    deviation = scores[:, 0].std().item() if n > 1 else math.nan
    return figures | {"perplexity_per_word": perplexity, "rows": n,
                      "perplexity_per_word_stderr": perplexity * deviation / math.sqrt(n)}


# ------------------------------------------------------------------------------ the script
def parse_tasks(config: EvaluateConfig) -> dict[str, Path | None]:
    """Task names and their files; None for val. Raises UserError for one that does not exist."""
    tasks = {}
    for word in config.tasks.split(","):
        name, _, file = word.strip().partition("=")
        if name == "val":
            tasks[name] = None
            continue
        default = Path(config.eval_dir) / FILES[name] if name in FILES else Path(name)
        path = Path(file) if file else default
        if not path.is_file():
            fix = ("add --download, or give NAME=FILE" if name in FILES else
                   f"expected a file, val, or one of {', '.join(FILES)}")
            raise UserError(f"--tasks {word}: {path} does not exist: {fix}")
        tasks[name if name in FILES or file else path.stem] = path
    return tasks


def evaluate(model: GPT, config: EvaluateConfig, tasks: dict[str, Path | None],
             launch: Launch) -> dict[str, dict[str, float]]:
    """The figures of every task."""
    results, dtype = {}, pick_dtype(config.dtype, launch.device)
    for name, path in tasks.items():
        if path is None:
            results[name] = validation_figures(model, config, launch, dtype)
            continue
        questions = read_questions(path, RENDERERS.get(name, multiple_choice), config.limit,
                                   model.config.block_size)
        pairs = [pair for question in questions for pair in question.pairs]
        scores = score(model, pairs, launch, dtype, config.batch_tokens, name)
        results[name] = (last_word_figures(scores) if name == "lambada" else
                         choice_figures(questions, scores))
    return results


def download_benchmark(target: Path) -> None:
    """Downloads and verifies a file, unless it is there already. Raises UserError."""
    repo, commit, path, digest = DOWNLOADS[target.name]
    if target.exists():
        if sha256_of(target) != digest:
            raise UserError(f"{target} is not the file of {repo}: delete it")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    retry = RetryPolicy()
    files = list_files(repo, commit, str(Path(path).parent), retry)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        for file in files:
            if file.path == path:
                source = fetch(repo, commit, file, Path(scratch), retry)
                if sha256_of(source) == digest:
                    os.replace(source, target)
    if not target.exists():
        raise UserError(f"{repo} has no file {path} with the expected SHA-256")
    print(f"wrote {target}")


def write_results(folder: Path, results: dict) -> None:
    """Adds results to evaluation.json of a checkpoint; those of other tasks stay."""
    path = folder / RESULTS_FILE
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it") from None
    with atomic_write(path, text=True) as file:
        file.write(json.dumps(before | results, indent=1) + "\n")


def table(results: dict[str, dict]) -> str:
    """One row per figure, one column per checkpoint: value, and standard error if there is one."""
    names = list(dict.fromkeys((task, figure) for tasks in results.values()
                               for task, figures in tasks.items() for figure in figures
                               if not figure.endswith("_stderr")))
    rows = [["", *results]]
    for task, figure in names:
        cells = []
        for tasks in results.values():
            value = tasks.get(task, {}).get(figure)
            error = tasks.get(task, {}).get(f"{figure}_stderr")
            digits = "," if isinstance(value, int) else ".4f"
            cells.append(("" if value is None else f"{value:{digits}}")
                         + (f" +- {error:.4f}" if error is not None else ""))
        rows.append([f"{task} {figure}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
                     .rstrip() for row in rows)


def main() -> None:
    config = parse_config(EvaluateConfig, description=__doc__)
    if not config.checkpoints and not config.download:
        raise UserError("no checkpoint given: python evaluate.py out/pretrain")
    with launched(config.device) as launch:
        for file in DOWNLOADS if config.download and launch.is_master else ():
            download_benchmark(Path(config.eval_dir) / file)
        launch.barrier()  # the other ranks wait for the files
        if not config.checkpoints:
            return
        tasks, results = parse_tasks(config), {}
        for name in config.checkpoints:
            model = load_model(find_checkpoint(name), launch.device)
            check_vocabulary(model, name)
            results[name] = evaluate(model, config, tasks, launch)
            if Path(name).exists() and launch.is_master:
                write_results(find_checkpoint(name), results[name])
            if name in PUBLISHED:
                results[f"{name}, published"] = {
                    task: figures for task, figures in PUBLISHED[name].items() if task in tasks}
        launch.print0(table(results))


if __name__ == "__main__":
    run_main(main)
