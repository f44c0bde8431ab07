"""Evaluates checkpoints: validation loss, HellaSwag, LAMBADA, multiple choice.

    python evaluate.py --download                             # HellaSwag and LAMBADA, from the hub
    python evaluate.py out/pretrain out/finetune gpt2         # a table with one column each
    python evaluate.py out/pretrain --tasks hellaswag,my_questions.jsonl --limit 500
    torchrun --standalone --nproc-per-node=8 evaluate.py out/pretrain

Tasks, separated by commas; NAME=FILE reads another file:
    val                 loss, perplexity and bits per byte on the validation shard of --data-dir
    hellaswag           the file's own contexts, as build-nanogpt scores it
    lambada             the last word of each passage
    FILE                rows of `context`, `choices` and `label`: JSON Lines, JSON or parquet

Up to rounding, no number depends on the number of ranks. No prompt template is applied.
"""

if __name__ == "__main__":
    from minigpt2.config import share_cores
    share_cores()  # before PyTorch is imported

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from dataloader import TokenLoader, read_rows
from inference import load_gpt2
from minigpt2 import benchmarks
from minigpt2.checkpoint import find_checkpoint, read_config, weights_sha256
from minigpt2.config import ROOT, UserError, flag, parse_config, run_main
from minigpt2.distributed import Launch, SamplingDtype, autocast, pick_dtype, to_device
from minigpt2.faults import launched
from minigpt2.files import check_folder, sha256_of, write_json
from minigpt2.hub import fetch, list_files
from minigpt2.kernels import prepare_to_sample
from minigpt2.loss import IGNORE_INDEX
from minigpt2.progress import progress_bar
from minigpt2.shards import read_manifest
from minigpt2.tokenizer import EOT_TOKEN, N_VOCAB, load_tokenizer
from model import GPT

FILES = {"hellaswag": "hellaswag_val.parquet", "lambada": "lambada_test.jsonl"}  # in --eval-dir
DOWNLOADS = {  # file: (repository and commit on the hub, path there, SHA-256)
    "hellaswag_val.parquet": ("Rowan/hellaswag", "218ec52e09a7e7462a5400043bb9a69a41d06b76",
                              "data/validation-00000-of-00001.parquet",
                              "899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd"),
    "lambada_test.jsonl": ("EleutherAI/lambada_openai", "900124bf3b8235c6daf21033af9948b3f07346c4",
                           "data/lambada_test_en.jsonl",
                           "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226")}


@dataclass(frozen=True)
class EvaluateConfig:
    checkpoints: tuple[str, ...] = flag((), "folders or hub names", positional=True, is_path=True)
    tasks: str = flag("val,hellaswag,lambada", "what to evaluate, see above")
    data_dir: str = flag(str(ROOT / "pretrain_data" / "fineweb"), "shards, for val", is_path=True)
    eval_dir: str = flag(str(ROOT / "eval_data"), "folder of HellaSwag and LAMBADA", is_path=True)
    download: bool = flag(False, "download HellaSwag (10,042 rows) and LAMBADA (5,153) first")
    eval_tokens: int = flag(10_485_760, "tokens of the validation split, for val", minimum=1)
    limit: int | None = flag(None, "only the first rows of each benchmark", minimum=1)
    batch_tokens: int = flag(8192, "tokens per batch and rank", minimum=1)
    json: str | None = flag(None, "also write the results to this file", is_path=True)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: SamplingDtype = flag("auto", "autocast dtype, or int8; auto as in inference.py")


def lambada(row: dict) -> benchmarks.Question:
    """A row of LAMBADA: the last word, after the last space, is the only choice."""
    text = row.get("text")
    context, _, word = text.rpartition(" ") if isinstance(text, str) else ("", "", "")
    if not context or not word:
        raise ValueError("expected a `text` that ends with a space and a word")
    return benchmarks.make_question([text.removesuffix(word)], [word], 0)


def validation_figures(model: GPT, config: EvaluateConfig, launch: Launch,
                       dtype: torch.dtype) -> dict[str, float]:
    """The mean loss over the first targets of the validation split, in nats per token, and in bits
    per byte of their text; of the latter, <|endoftext|>, which is no text, is left out."""
    T = model.config.block_size
    loader = TokenLoader(Path(config.data_dir), "val", sequence_length=T, total_batch_size=T,
                         micro_batch_size=max(1, config.batch_tokens // T), rank=launch.rank,
                         vocab_size=N_VOCAB, world_size=launch.world_size)
    text_of = load_tokenizer().decode_single_token_bytes
    byte_counts = torch.tensor([*(len(text_of(token)) for token in range(EOT_TOKEN)), 0])  # (V,)
    sums = torch.zeros(4, dtype=torch.float64)  # nats, tokens; those of <|endoftext|>, bytes
    batches = list(loader.eval_batches(config.eval_tokens))
    for inputs, targets in progress_bar(len(batches), 0, "val", enabled=launch.is_master,
                                        over=batches):  # (B, T) each
        with torch.no_grad(), autocast(launch.device, dtype):
            _, nats = model(to_device(inputs, launch.device), to_device(targets, launch.device),
                            reduction="none", return_logits=False)
        nats, valid = nats.cpu().double(), targets != IGNORE_INDEX  # (B, T) each
        sums += torch.stack([nats.sum(), valid.sum(), nats[targets == EOT_TOKEN].sum(),
                             byte_counts[targets[valid]].sum()])
    nats, tokens, end_nats, num_bytes = launch.sum(sums).tolist()
    if not num_bytes:
        raise UserError(f"--data-dir {config.data_dir}: the validation split holds no text")
    perplexity = torch.tensor(nats / tokens, dtype=torch.float64).exp().item()  # or inf
    return {"loss": nats / tokens, "perplexity": perplexity, "tokens": int(tokens),
            "bits_per_byte": (nats - end_nats) / (math.log(2) * num_bytes), "bytes": int(num_bytes)}


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
            fix = "add --download" if name in FILES else f"name one of val, {', '.join(FILES)}"
            problem = "is a folder" if path.is_dir() else "does not exist"
            raise UserError(f"--tasks {word}: {path} {problem}: {fix}, or give NAME=FILE")
        tasks[key] = None if name == "val" else path
    return tasks


def evaluate_checkpoint(folder: Path, config: EvaluateConfig, launch: Launch,
                        tasks: dict[str, Path | None]) -> dict[str, float]:
    """The figures of a checkpoint, named "TASK FIGURE"."""
    model, dtype = load_gpt2(folder, launch.device), pick_dtype(config.dtype, launch.device)
    rows = [sha256_of(p) if p else read_manifest(Path(config.data_dir)) for p in tasks.values()]
    launch.check_same({"weights": weights_sha256(model), "rows": rows, "limit": config.limit,
                       "--dtype": str(dtype)})
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:N_VOCAB])  # without padding
    if dtype == torch.int8:  # what is not in int8 is in float32
        model, dtype = prepare_to_sample(model, dtype), torch.float32
    results = {}
    for task, path in tasks.items():
        if path is None:
            figures = validation_figures(model, config, launch, dtype)
        else:
            render = lambada if task == "lambada" else benchmarks.multiple_choice
            questions = benchmarks.make_questions(path, read_rows(path)[: config.limit], render,
                                                  model.config.block_size)
            figures = benchmarks.question_figures(
                model, questions, launch, dtype, label=task, batch_tokens=config.batch_tokens)
        results |= {f"{task} {figure}": value for figure, value in figures.items()}
    return results


def download_benchmark(target: Path) -> None:
    """Downloads and verifies a file, unless it is there already. Raises UserError."""
    if target.exists():  # it was renamed into place when it was complete
        return
    repo, commit, path, digest = DOWNLOADS[target.name]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        source = fetch(repo, commit, *list_files(repo, commit, path), Path(scratch))
        if sha256_of(source) != digest:
            raise UserError(f"{path} of {repo} does not have the expected SHA-256")
        source.replace(target)
    print(f"wrote {target}")


def main() -> None:
    config = parse_config(EvaluateConfig, description=__doc__)
    if not config.checkpoints and not config.download:
        raise UserError("no checkpoint given: python evaluate.py out/pretrain")
    if config.json and Path(config.json).is_dir():
        raise UserError(f"--json {config.json} is a folder, expected a file")
    if config.json:
        check_folder(Path(config.json).parent, f"--json {config.json}")
    with launched(config.device) as launch:
        for file in DOWNLOADS if config.download and launch.is_master else ():
            download_benchmark(Path(config.eval_dir) / file)
        launch.gather(None)  # the other ranks wait for the files
        if not config.checkpoints:
            return
        folders, tasks = list(map(find_checkpoint, config.checkpoints)), parse_tasks(config)
        for folder in folders:
            read_config(folder)  # refuses one at once, before the others are evaluated
        results = {name: evaluate_checkpoint(folder, config, launch, tasks)
                   for name, folder in zip(config.checkpoints, folders, strict=True)}
        if config.json and launch.is_master:
            write_json(Path(config.json), results)
        launch.print0(benchmarks.table(results))


if __name__ == "__main__":
    run_main(main)
