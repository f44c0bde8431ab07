"""Evaluates checkpoints: validation loss, HellaSwag, LAMBADA, multiple choice, instructions.

    python evaluate.py --download                             # HellaSwag and LAMBADA, from the hub
    python evaluate.py out/pretrain out/finetune gpt2         # a table with one column each
    python evaluate.py out/pretrain --tasks hellaswag,my_questions.jsonl --limit 500
    python evaluate.py out/pretrain out/finetune --tasks answers=finetune_data/alpaca.json
    torchrun --standalone --nproc-per-node=8 evaluate.py out/pretrain

Tasks, separated by commas; NAME=FILE reads another file:

    val                 loss, perplexity and bits per byte on the validation shard of --data-dir
    hellaswag           the file's own contexts, as build-nanogpt scores it
    hellaswag_harness   the contexts of lm-evaluation-harness (needs the official file)
    lambada             the last word of each passage
    answers             on the instructions that finetune.py holds out: the loss of the responses,
                        and how answers to the first --answer-rows of them end, match and repeat
    FILE                rows of `context`, `choices` and `label`: JSON Lines, JSON or parquet

No number depends on the number of ranks. Results of a local checkpoint also go to evaluation.json
in its folder, the first 20 answers to answers.jsonl. Only `answers` applies the prompt template.
"""

import json
import math
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from dataloader import (
    Example,
    TokenLoader,
    make_examples,
    normalize,
    pad_rows,
    read_rows,
    split_rows,
    text_turns,
    token_ids,
)
from inference import check_vocabulary, decode_generation, finish_reasons, generate
from minigpt2 import benchmarks
from minigpt2.checkpoint import find_checkpoint, load_model
from minigpt2.config import UserError, flag, parse_config, run_main
from minigpt2.distributed import Dtype, Launch, autocast, pick_dtype, share_work, to_device
from minigpt2.faults import launched
from minigpt2.files import atomic_write, sha256_of
from minigpt2.hub import RetryPolicy, fetch, list_files
from minigpt2.kernels import prepare_to_sample
from minigpt2.loss import IGNORE_INDEX, linear_cross_entropy
from minigpt2.progress import progress_bar
from minigpt2.shards import read_manifest
from minigpt2.tokenizer import EOT_TOKEN, format_prompt, load_tokenizer
from model import GPT

ROOT = Path(__file__).resolve().parent
FILES = {"hellaswag": "hellaswag_val.parquet", "hellaswag_harness": "hellaswag_val.parquet",
         "lambada": "lambada_test.jsonl",  # in --eval-dir
         "answers": str(ROOT / "finetune_data" / "alpaca.json")}
DOWNLOADS = {  # file: (repository and commit on the hub, path there, SHA-256)
    "hellaswag_val.parquet": (
        "Rowan/hellaswag", "218ec52e09a7e7462a5400043bb9a69a41d06b76",
        "data/validation-00000-of-00001.parquet",
        "899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd"),
    "lambada_test.jsonl": (
        "EleutherAI/lambada_openai", "900124bf3b8235c6daf21033af9948b3f07346c4",
        "data/lambada_test_en.jsonl",
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226")}
RESULTS_FILE, ANSWERS_FILE, SHOWN_ANSWERS = "evaluation.json", "answers.jsonl", 20
ROWS_PER_BATCH, SHORT_WORDS = 32, 5  # answers generated at once; words of a short reference
# Published results of OpenAI's 124M weights: llm.c (FineWeb, also pre-tokenized), build-nanogpt
# (FineWeb-Edu, hellaswag), lm-evaluation-harness (hellaswag_harness and the last word), the GPT-2
# paper, table 3 (the last token). Those of val are named after the corpus.
PUBLISHED = {"gpt2": {
    "HuggingFaceFW/fineweb": {"loss": 3.4250}, "kjj0/fineweb10B-gpt2": {"loss": 3.4250},
    "HuggingFaceFW/fineweb-edu": {"loss": 3.2924},
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
    val_fraction: float = flag(0.05, "fraction of the instructions held out, for answers",
                               minimum=0, below=1)
    answer_rows: int = flag(200, "instructions to answer, and short ones to match", minimum=1)
    answer_tokens: int = flag(128, "maximum number of tokens of an answer", minimum=1)
    answer_temperature: float = flag(0.0, "sampling temperature of answers; 0: greedy", minimum=0)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Dtype = flag("auto", "autocast dtype; auto: bfloat16 (or float16) on CUDA, else float32")


def hellaswag_harness(row: dict) -> benchmarks.Question:
    """A row of HellaSwag as lm-evaluation-harness renders it: with the activity as a heading, the
    second sentence capitalized, and WikiHow's marks removed."""
    def clean(text: str) -> str:
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    texts = [row.get(key) for key in ("activity_label", "ctx_a", "ctx_b")]
    endings = row["endings"] if isinstance(row.get("endings"), list) else [None]
    if not all(isinstance(text, str) for text in (*texts, *endings)):
        raise ValueError("activity_label, ctx_a, ctx_b and endings are not all there, which the "
                         "harness's form needs: use the official file, or the task hellaswag")
    question = clean(f"{texts[0]}: {texts[1]} {texts[2].capitalize()}")
    return benchmarks.multiple_choice(row | {"context": question,
                                             "choices": list(map(clean, endings))})


def lambada(row: dict) -> benchmarks.Question:
    """A row of LAMBADA: the last word, after the last space, is the only choice."""
    text = row.get("text")
    context, _, word = text.rpartition(" ") if isinstance(text, str) else ("", "", "")
    if not context or not word:
        raise ValueError("expected a `text` that ends with a space and a word")
    return benchmarks.make_question([context], [word], 0)


RENDERERS = {"hellaswag": benchmarks.hellaswag, "hellaswag_harness": hellaswag_harness,
             "lambada": lambada}


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
    byte_counts = torch.tensor([*(len(text_of(token)) for token in range(EOT_TOKEN)), 0],
                               device=launch.device)  # (V,)
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


# ----------------------------------------------------------------- answers to instructions
def answer_figures(model: GPT, path: Path, config: EvaluateConfig, launch: Launch,
                   dtype: torch.dtype, folder: Path | None) -> dict[str, float]:
    """On the held-out rows of a file: the loss of the responses, and figures of generated answers;
    the first of these are written to `folder`. Afterwards, the model can only sample."""
    texts = [text_turns(row, place) for place, row in read_rows(path)]
    turns, examples, summary = make_examples(texts, model.config.block_size)
    if not examples:
        raise UserError(f"{path}: {summary}: give other rows, or a model with a longer context")
    _, held_out, split = split_rows(turns, config.val_fraction)
    launch.print0(f"answers: {summary}; {split}")
    held_out = held_out[: config.limit]
    loss = response_loss(model, [examples[i] for i in held_out], config, launch, dtype)

    first = held_out[: config.answer_rows]
    short = [i for i in held_out if len(turns[i][2].split()) <= SHORT_WORDS][: config.answer_rows]
    chosen = sorted({*first, *short})
    prompts = [examples[i][0][0] for i in chosen]
    found = dict(zip(chosen, answer(model, prompts, config, launch, dtype), strict=True))
    if folder and launch.is_master:
        lines = [{"prompt": format_prompt(*turns[i][:2]), "reference": turns[i][2]} | found[i]
                 for i in first[:SHOWN_ANSWERS]]
        with atomic_write(folder / ANSWERS_FILE, text=True) as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    matches = [plain(found[i]["answer"]) == plain(turns[i][2]) for i in short]
    counts = {"rows": len(held_out), "exact_match_rows": len(short)}
    return {"response_loss": loss} | counts | benchmarks.means({
        "stopped": [found[i]["finish_reason"] == "stop" for i in first],
        "repeated_4grams": [repeated_4grams(found[i]["answer"]) for i in first],
        "answer_tokens": [found[i]["tokens"] for i in first],
        "reference_tokens": [len(examples[i][0][1]) - 1 for i in first],
        **({"exact_match": matches} if short else {})})


def response_loss(model: GPT, examples: list[Example], config: EvaluateConfig, launch: Launch,
                  dtype: torch.dtype) -> float:
    """The loss of the responses, in nats per token, <|endoftext|> included."""
    pairs = [(token_ids(example[:turn]) + prompt, response) for example in examples
             for turn, (prompt, response) in enumerate(example)]
    scores = benchmarks.score(model, pairs, launch, dtype, label="answers, loss",
                              batch_tokens=config.batch_tokens)
    return -scores[:, 0].sum().item() / sum(len(response) for _, response in pairs)


def answer(model: GPT, prompts: list[list[int]], config: EvaluateConfig, launch: Launch,
           dtype: torch.dtype) -> list[dict]:
    """An answer to each prompt, its finish reason, and its tokens without <|endoftext|>. Batches
    are made by length, alike for any number of ranks."""
    prepare_to_sample(model, dtype)

    def work(batch: list[int]) -> dict[int, dict]:
        ids, masks = pad_rows([prompts[i] for i in batch])
        output = generate(model, ids, masks, config.answer_temperature, config.answer_tokens,
                          seed=batch)  # also apart for rows of one prompt
        reasons = finish_reasons(*output, masks, config.answer_tokens)
        lengths = (output[1].sum(1).cpu() - masks.sum(1)).tolist()
        return {i: {"answer": text, "finish_reason": reason, "tokens": length - (reason == "stop")}
                for i, text, reason, length in zip(batch, decode_generation(*output, masks),
                                                   reasons, lengths, strict=True)}

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[i : i + ROWS_PER_BATCH] for i in range(0, len(order), ROWS_PER_BATCH)]
    found = share_work(batches, work, launch, label="answers")
    return [found[i] for i in range(len(prompts))]


def plain(text: str) -> str:
    """The text without differences in case, whitespace and final punctuation."""
    return normalize(text).rstrip(" .,;:!?")


def repeated_4grams(text: str) -> float:
    """The share of the 4-grams of a text's words that occurred earlier in it; 0 if it has none."""
    words = text.split()
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# ------------------------------------------------------------------------------ the script
def parse_tasks(config: EvaluateConfig) -> dict[str, Path | None]:
    """Task names and their files; None for val. Raises UserError for one that does not exist."""
    tasks = {}
    for word in config.tasks.split(","):
        name, _, file = word.strip().partition("=")
        path = Path(file or (Path(config.eval_dir) / FILES[name] if name in FILES else name))
        key = name if name in FILES or name == "val" or file else path.stem
        if key in tasks or (key in (*FILES, "val") and key != name) or (name == "val" and file):
            raise UserError(f"--tasks {word}: the name {key} is taken: give another as NAME=FILE")
        if name != "val" and not path.is_file():
            fix = ("run finetune_data/alpaca_downloader.py" if name == "answers" else
                   "add --download" if name in FILES else f"name one of val, {', '.join(FILES)}")
            raise UserError(f"--tasks {word}: {path} does not exist: {fix}, or give NAME=FILE")
        tasks[key] = None if name == "val" else path
    return tasks


def evaluate_checkpoint(name: str, folder: Path, config: EvaluateConfig, launch: Launch,
                        tasks: dict[str, Path | None]) -> dict[str, dict[str, float]]:
    """The figures of a checkpoint in every task, `answers` last; those of a local checkpoint are
    also written to its folder."""
    is_local = Path(name).exists() and os.access(folder, os.W_OK)
    if Path(name).exists() and not is_local:
        launch.print0(f"{folder} is not writable: its results are only printed")
    model, dtype = load_model(folder, launch.device), pick_dtype(config.dtype, launch.device)
    check_vocabulary(model, name)
    results = {}
    for task, path in sorted(tasks.items(), key=lambda item: item[0] == "answers"):
        if task == "val":
            results[task] = validation_figures(model, config, launch, dtype)
        elif task == "answers":
            results[task] = answer_figures(model, path, config, launch, dtype,
                                           folder if is_local else None)
        else:
            questions = benchmarks.make_questions(
                path, read_rows(path)[: config.limit],
                RENDERERS.get(task, benchmarks.multiple_choice), model.config.block_size)
            results[task] = benchmarks.question_figures(
                model, questions, launch, dtype, label=task, batch_tokens=config.batch_tokens)
    results = {task: {name: value for name, value in figures.items() if value == value}
               for task, figures in results.items()}  # NaN is the standard error of a single row
    if is_local and launch.is_master:
        write_results(folder, results)
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
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        for file in list_files(repo, commit, str(Path(path).parent), retry):
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
        text = json.dumps(before | results, indent=1)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it") from None
    with atomic_write(path, text=True) as file:
        file.write(text + "\n")


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
        for name, folder in [(name, find_checkpoint(name)) for name in config.checkpoints]:
            results[name] = evaluate_checkpoint(name, folder, config, launch, tasks)
            if published := PUBLISHED.get(name.removeprefix("openai-community/")):
                manifest = read_manifest(Path(config.data_dir)) if "val" in tasks else {}
                corpus = manifest.get("source", {}).get("name")
                figures = published | {"val": published.get(corpus, {})}
                results[f"{name}, published"] = {t: figures[t] for t in tasks if t in figures}
        launch.print0(table(results))


if __name__ == "__main__":
    run_main(main)
