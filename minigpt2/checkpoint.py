"""Checkpoints: Hugging Face GPT-2 folders (docs/formats.md). Nothing that runs code is loaded."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minigpt2 import tokenizer
from minigpt2.config import UserError, first_line
from minigpt2.files import sha256_of, sync
from minigpt2.tokenizer import ALPACA, EOT_TEXT, EOT_TOKEN, VOCABULARY
from model import GPT, INIT_STD, GPTConfig

CONFIG_FILE, WEIGHTS_FILE, SUMS_FILE = "config.json", "model.safetensors", "SHA256SUMS"
INDEX_FILE, TRAINING_STATE_FILE = "model.safetensors.index.json", "training_state.pt"
TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")  # stored as (in, out), a 1x1 conv
PREFIXES = re.compile(r"^((_orig_mod|module)\.)*(transformer\.)?")
SIZES = ("vocab_size", "n_layer", "n_head", "n_embd")  # and block_size, stored as n_positions
REWARD_HEAD = "GPT2ForSequenceClassification"  # transformers' class of a reward model
# Transformers' names of one function, up to rounding
GELU_NAMES = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")
ALLOWED_SETTINGS = {  # values of config.json, where present; the first one is written
    "model_type": ["gpt2"], "activation_function": GELU_NAMES, "layer_norm_epsilon": [1e-5],
    "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
    "add_cross_attention": [False], "tie_word_embeddings": [True]}


def save_checkpoint(out_dir: Path, step: int, model: GPT, *, training_state: dict | None = None,
                    prompt_template: str | None = None, keep_last: int = 0,
                    best_step: int | None = None) -> Path:
    """Writes OUT_DIR/step_NNNNNN atomically and returns it; points latest to it and best to
    `best_step`. With keep_last > 0, deletes older ones except best. Raises UserError."""
    folder, tensors = step_folder(out_dir, step), to_gpt2_layout(model)
    temporary = out_dir / f".{folder.name}.tmp"
    try:
        clean_up(out_dir)
        temporary.mkdir(parents=True)
        write_files(temporary, model.config, tensors, training_state, prompt_template)
        if folder.exists():  # this step is saved again
            os.replace(folder, temporary.with_suffix(".replaced"))
        os.replace(temporary, folder)
        write_pointers(out_dir, step, best_step)
        for path in list_checkpoints(out_dir)[:-keep_last] if keep_last > 0 else []:
            if int(path.name[5:]) != best_step:  # of step_NNNNNN
                os.replace(path, out_dir / f".{path.name}.old.tmp")  # deleted by clean_up
    except (SafetensorError, RuntimeError, OSError) as error:
        raise UserError(f"cannot write {folder} ({first_line(error)}): is the disk full? Earlier "
                        "checkpoints are intact: resume from them with --resume") from error
    finally:
        clean_up(out_dir)
    return folder


def write_files(folder: Path, config: GPTConfig, tensors: dict[str, torch.Tensor],
                training_state: dict | None, prompt_template: str | None) -> None:
    """Writes all files of a checkpoint and syncs them to disk."""
    settings = {name: allowed[0] for name, allowed in ALLOWED_SETTINGS.items()} | {
        name: getattr(config, name) for name in SIZES} | {
        "architectures": ["GPT2LMHeadModel"], "n_positions": config.block_size,
        "n_ctx": config.block_size, "initializer_range": INIT_STD, "bos_token_id": EOT_TOKEN,
        "eos_token_id": EOT_TOKEN, "embd_pdrop": config.dropout, "resid_pdrop": config.dropout,
        "attn_pdrop": config.dropout}  # written for transformers, never read here
    loader = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": config.block_size,
              "bos_token": EOT_TEXT, "eos_token": EOT_TEXT, "unk_token": EOT_TEXT}
    if prompt_template:
        settings["prompt_template"] = with_hash(prompt_template)
        loader["chat_template"] = tokenizer.chat_template(prompt_template)
    if "score.weight" in tensors:  # transformers reads the score at the last token that is not pad:
        settings |= {"architectures": [REWARD_HEAD], "id2label": {"0": "reward"},
                     "label2id": {"reward": 0}, "pad_token_id": 0}  # so pad must not be the end
        loader["pad_token"] = tokenizer.decode([0])
    for name, content in ((CONFIG_FILE, settings), ("tokenizer_config.json", loader)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in VOCABULARY:
        shutil.copyfile(tokenizer.vocabulary_path(name), folder / name)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if training_state is not None:
        torch.save(training_state, folder / TRAINING_STATE_FILE)
    sums = [f"{sha256_of(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / SUMS_FILE).write_text("".join(sums), encoding="utf-8")
    mode = (folder / CONFIG_FILE).stat().st_mode  # safetensors creates files with mode 0600
    for path in folder.iterdir():
        path.chmod(mode)
        sync(path)
    sync(folder)


def to_gpt2_layout(model: GPT) -> dict[str, torch.Tensor]:
    """The parameters as GPT-2 stores them, float32, on the CPU. Raises ValueError if packed."""
    tensors = {name: (tensor.t() if TRANSPOSED.search(name) else tensor).detach().to(
        "cpu", torch.float32).contiguous() for name, tensor in model.named_parameters()}
    if len(tensors) < 4 + 12 * model.config.n_layer:  # the tied head is listed once, as wte
        raise ValueError("cannot save a model after prepare_to_sample: it has no parameters left")
    return tensors


def clean_up(out_dir: Path) -> None:
    """Ends what a kill interrupted: a replaced checkpoint stays, unfinished ones are deleted."""
    for replaced in out_dir.glob(".step_*.replaced"):
        folder = out_dir / replaced.stem[1:]
        os.replace(replaced, replaced.with_suffix(".old.tmp") if folder.exists() else folder)
    for leftover in out_dir.glob(".step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)  # the next save tries again


def write_pointers(out_dir: Path, step: int, best_step: int | None) -> None:
    """Points latest, and best if it exists, to checkpoints: relative symlinks, or text files."""
    for name, target in (("latest", step), ("best", best_step)):
        if target is None or not step_folder(out_dir, target).exists():
            continue
        pointer, temporary = out_dir / name, out_dir / f".{name}.tmp"
        if pointer.is_dir() and not pointer.is_symlink():  # copied by a tool that follows links
            os.replace(pointer, out_dir / f".step_{name}.tmp")  # deleted by clean_up
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(step_folder(out_dir, target).name)
        except OSError:
            temporary.write_text(step_folder(out_dir, target).name + "\n", encoding="utf-8")
            sync(temporary)
        os.replace(temporary, pointer)
    sync(out_dir)


def step_folder(out_dir: Path, step: int) -> Path:
    return out_dir / f"step_{step:06d}"


def list_checkpoints(out_dir: Path) -> list[Path]:
    """The checkpoints of a run, damaged ones included, oldest first."""
    return sorted((path for path in out_dir.glob("step_*")
                   if re.fullmatch(r"step_\d{6,}", path.name)), key=lambda path: int(path.name[5:]))


def find_checkpoint(path: str | Path) -> Path:
    """Returns the folder of a checkpoint, given that folder, OUT_DIR/latest, OUT_DIR/best, OUT_DIR
    (its newest) or a name on the Hugging Face hub, which is downloaded. Raises UserError."""
    folder = Path(path)
    if folder.name in ("latest", "best") and (folder.is_symlink() or folder.is_file()):
        name = (os.readlink(folder) if folder.is_symlink() else
                folder.read_text(encoding="utf-8", errors="replace").strip())
        if name in (one.name for one in list_checkpoints(folder.parent)):
            return folder.with_name(name)  # a run in progress may change the pointer meanwhile
        if not folder.is_dir():
            raise UserError(f"{folder}: {name:.60} does not exist: use {folder.parent}, its newest")
    if (folder / CONFIG_FILE).is_file():
        return folder
    if checkpoints := list_checkpoints(folder):
        return checkpoints[-1]
    if folder.exists():
        raise UserError(f"{folder} is not a checkpoint, it has neither {CONFIG_FILE} nor folders "
                        "step_NNNNNN (those of nanoGPT and llm.c: see docs/formats.md)")
    from huggingface_hub import errors, snapshot_download  # slow to import, rarely needed
    try:
        return Path(snapshot_download(str(path), allow_patterns=[
            CONFIG_FILE, "model*.safetensors*", "tokenizer*.json", "added*.json", *VOCABULARY]))
    except (errors.HTTPError, errors.HFValidationError, OSError, RuntimeError) as error:  # Xet's
        raise UserError(f"checkpoint {path} is no folder here: change --checkpoint; nor could the "
                        f"Hugging Face hub provide it ({first_line(error)})") from None


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a file is read becomes a UserError, also a wrong SHA-256."""
    sums = path.with_name(SUMS_FILE)
    try:
        if sums.exists() and f"{sha256_of(path)}  {path.name}\n" not in sums.read_text("utf-8"):
            raise ValueError(f"it is damaged or was edited; after an edit, delete {SUMS_FILE}")
        yield
    except (SafetensorError, UnpicklingError, OSError, EOFError, ValueError, RuntimeError) as error:
        # torch's own message about code advises weights_only=False
        reason = ("it is damaged or holds code, which is never run"
                  if isinstance(error, UnpicklingError) else " ".join(str(error).split()))
        raise UserError(f"cannot load {path} ({reason:.400}): use another checkpoint") from None


def load_model(path: str | Path, device: str | torch.device = "cpu",
               model_class: type[GPT] = GPT, dropout: float = 0.0) -> GPT:
    """The model of a checkpoint, a GPT or a RewardModel, float32, in evaluation mode, with this
    dropout. Raises UserError for another kind of model, damage and NaN weights."""
    folder = find_checkpoint(path)
    config = dataclasses.replace(read_config(folder, model_class is not GPT), dropout=dropout)
    tokenizer.check_files(folder)
    parameters: dict[str, torch.Tensor] = {}
    for file, name, tensor in read_tensors(folder):
        tensor = tensor.t() if TRANSPOSED.search(name) and tensor.dim() == 2 else tensor
        tensor = tensor.to(device, torch.float32).contiguous()
        if not tensor.isfinite().all():
            raise UserError(f"{file}: {name} has NaN or infinite values: use another checkpoint")
        if not torch.equal(parameters.setdefault(name, tensor), tensor):
            raise UserError(f"{file}: lm_head differs from wte, but the head of GPT-2 is tied")
    with reading(folder / CONFIG_FILE):  # which the tensors have to match
        return model_from_parameters(config, parameters, model_class).eval()


def model_from_parameters(config: GPTConfig, parameters: dict[str, torch.Tensor],
                          model_class: type[GPT] = GPT) -> GPT:
    """A model that uses these tensors, not copies. Raises RuntimeError if they do not fit."""
    with torch.device("meta"):  # allocates nothing, draws no random numbers
        model = model_class(config)
    tied = {"lm_head.weight": parameters.get("transformer.wte.weight")}
    model.load_state_dict(parameters | tied, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    return model


def weights_sha256(model: GPT) -> str:
    """The SHA-256 of all parameters, whatever files they came from."""
    digest = hashlib.sha256(repr(model.config).encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def read_config(folder: Path, is_reward: bool = False) -> GPTConfig:
    """The sizes in config.json. Raises UserError if it is not a GPT-2 with the head wanted."""
    settings, kinds = read_json(folder / CONFIG_FILE), ("a language model", "a reward model")
    with reading(folder / CONFIG_FILE):
        if (settings.get("architectures") == [REWARD_HEAD]) != is_reward:
            raise ValueError(f"it is {kinds[not is_reward]}, expected {kinds[is_reward]}")
        for name, allowed in ALLOWED_SETTINGS.items():
            if settings.get(name, allowed[0]) not in allowed:
                raise ValueError(f"{name} is {settings[name]!r}, expected {allowed[0]!r}")
        config = GPTConfig(settings.get("n_positions"), *map(settings.get, SIZES))
        if settings.get("n_inner") not in (None, 4 * config.n_embd):
            raise ValueError(f"n_inner is {settings['n_inner']}, expected 4 n_embd")
        return config


def read_json(path: Path) -> dict:
    with reading(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content


def with_hash(text: str) -> dict[str, str]:
    return {"text": text, "sha256": hashlib.sha256(text.encode(errors="replace")).hexdigest()}


def read_prompt_template(path: str | Path) -> str | None:
    """The text of a fine-tuned model's template, None for a base model. Raises UserError."""
    folder = find_checkpoint(path)
    stored = read_json(folder / CONFIG_FILE).get("prompt_template")
    if stored is None:
        return None
    if not isinstance(stored, dict) or stored != with_hash(str(stored.get("text"))):
        raise UserError(f"{folder} has the prompt template {stored!r:.200}, which is unknown or "
                        "damaged: use another checkpoint")
    return stored["text"]


def shared_template(*paths: str | Path) -> str:
    """The template of all these checkpoints, or Alpaca's if none has one. Raises UserError."""
    found = {read_prompt_template(path): path for path in paths}
    found.pop(None, None)
    if len(found) > 1:
        raise UserError(f"{' and '.join(map(str, found.values()))} were trained with different "
                        "prompt templates: fine-tune them with the same --template")
    return next(iter(found), ALPACA)


def read_tensors(folder: Path) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """Yields (file, name, tensor) of every weight, the tensor as stored, the name as in GPT: other
    files lack its prefix or, from DDP and torch.compile, have more. A stored head is wte."""
    names = {WEIGHTS_FILE}
    if not (folder / WEIGHTS_FILE).exists():  # files are chosen as by transformers
        index = read_json(folder / INDEX_FILE).get("weight_map")
        names = set(map(str, index.values() if isinstance(index, dict) else ()))
    for file in (folder / name for name in sorted(names)):
        with reading(file), safe_open(file, framework="pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118, not a dict
                name = re.sub(PREFIXES, "", stored).replace("lm_head", "wte")
                name = name if name == "score.weight" else f"transformer.{name}"
                if not re.search(r"\.attn\.(masked_)?bias$", name):
                    yield file, name, tensors.get_tensor(stored)


def load_training_state(folder: Path) -> dict:
    """The `training_state`, memory-mapped. Raises UserError for damage and for code."""
    path = folder / TRAINING_STATE_FILE
    with reading(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
