"""A checkpoint is a Hugging Face GPT-2 folder, with our training state beside it.

    OUT_DIR/latest, OUT_DIR/best            the names of two checkpoints, as text
    OUT_DIR/step_000200/config.json         } what GPT2LMHeadModel.from_pretrained reads; tensors
    OUT_DIR/step_000200/model.safetensors   } in GPT-2's own layout, head tied, no padding
    OUT_DIR/step_000200/vocab.json ...      what AutoTokenizer reads
    OUT_DIR/step_000200/training_state.pt   see resume.py; tensors and plain values only
    OUT_DIR/step_000200/SHA256SUMS          of all these files, as `sha256sum -c` reads it

The same reader takes any folder or hub name in that format, OpenAI's `gpt2` ... `gpt2-xl` first of
all. Nothing that could run code is ever loaded.
"""

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minigpt2.config import NO_SPACE, UserError, first_line
from minigpt2.files import atomic_write, sha256_of, sync_folder
from minigpt2.tokenizer import EOT_TEXT, EOT_TOKEN, PROMPT_TEMPLATE, VOCABULARY, vocabulary_path
from model import GPT, INIT_STD, GPTConfig

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
TRAINING_STATE_FILE, SUMS_FILE = "training_state.pt", "SHA256SUMS"
LATEST, BEST = "latest", "best"
STEP_FOLDER = re.compile(r"step_(\d{6,})")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# GPT-2's linear layers were written as 1x1 convolutions: weights (in, out) where nn.Linear has
# (out, in). Everything else has one layout.
TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
# What a config.json may not say otherwise, with the value that its absence means.
FIXED_SETTINGS = {
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False, "tie_word_embeddings": True,
}


# --------------------------------------------------------------------------- writing


def save_checkpoint(out_dir: Path, step: int, model: GPT, *, training_state: dict | None = None,
                    prompt_template: str | None = None, keep_last: int = 0, keep_every: int = 0,
                    best_step: int | None = None) -> Path:
    """Writes OUT_DIR/step_NNNNNN, whole or not at all, and names it in OUT_DIR/latest.

    `model` is the raw module, not its DDP wrapper. `prompt_template` marks a fine-tuned model. With
    keep_last > 0 older checkpoints go, but for those of every keep_every-th step and the one of
    `best_step`, which OUT_DIR/best names. Raises UserError when the disk is full; earlier
    checkpoints are untouched then.
    """
    final = step_folder(out_dir, step)
    temporary = out_dir / f".{final.name}.tmp"
    tensors = to_gpt2_layout(model)
    for left_over in out_dir.glob(".step_*.tmp"):  # by a run that was killed while it saved
        shutil.rmtree(left_over, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_model(temporary, model.config, tensors, prompt_template)
        if training_state is not None:
            torch.save(training_state, temporary / TRAINING_STATE_FILE)
        sums = [f"{sha256_of(path)}  {path.name}\n" for path in sorted(temporary.iterdir())]
        (temporary / SUMS_FILE).write_text("".join(sums), encoding="utf-8")
        mode = (temporary / CONFIG_FILE).stat().st_mode  # safetensors writes for its owner alone
        for path in temporary.iterdir():
            path.chmod(mode)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(temporary)
        remove_checkpoint(final)  # a run that went back to an earlier one comes by again
        os.replace(temporary, final)
        for name, named in ((LATEST, step), (BEST, best_step)):
            if named is not None:
                with atomic_write(out_dir / name, text=True) as file:
                    file.write(step_folder(out_dir, named).name + "\n")
    except (SafetensorError, RuntimeError, OSError) as error:
        # safetensors and torch.save report a failed write as errors of their own
        full = getattr(error, "errno", None) in {None, *NO_SPACE}
        raise UserError(f"cannot write {final} ({first_line(error)}): "
                        + ("is the disk full? " if full else "") + "Earlier checkpoints are whole: "
                        "mend it and go on from them") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if keep_last > 0:  # of this run: one of a later step is not the newest of anything
        earlier = [path for path in list_checkpoints(out_dir) if step_of(path) <= step]
        for path in earlier[:-keep_last]:
            old = step_of(path)
            if old != best_step and (keep_every == 0 or old % keep_every):
                try:
                    remove_checkpoint(path)
                except OSError as error:  # no reason to end the run
                    print(f"{path} could not be removed ({error.strerror})", flush=True)
    return final


def step_folder(out_dir: Path, step: int) -> Path:
    return out_dir / f"step_{step:06d}"


def remove_checkpoint(folder: Path) -> None:
    """Out of sight first: a run killed half-way leaves no half of a checkpoint under its name."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.old.tmp")
        os.replace(folder, doomed)
        if doomed.is_symlink():
            doomed.unlink()
        else:
            shutil.rmtree(doomed)


def write_model(folder: Path, config: GPTConfig, tensors: dict[str, torch.Tensor],
                prompt_template: str | None) -> None:
    settings = FIXED_SETTINGS | {
        "architectures": ["GPT2LMHeadModel"], "n_positions": config.block_size,
        "n_ctx": config.block_size, "vocab_size": config.vocab_size, "n_layer": config.n_layer,
        "n_head": config.n_head, "n_embd": config.n_embd, "initializer_range": INIT_STD,
        "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0,
        "bos_token_id": EOT_TOKEN, "eos_token_id": EOT_TOKEN,
    }
    if prompt_template:
        settings["prompt_template"] = prompt_template
    tokenizer = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": config.block_size,
                 "bos_token": EOT_TEXT, "eos_token": EOT_TEXT, "unk_token": EOT_TEXT}
    write_json(folder / CONFIG_FILE, settings)
    write_json(folder / "tokenizer_config.json", tokenizer)
    for name in VOCABULARY:
        shutil.copyfile(vocabulary_path(name), folder / name)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def to_gpt2_layout(model: GPT) -> dict[str, torch.Tensor]:
    """The tensors of a GPT under GPT-2's names and in GPT-2's layout, on the CPU. Raises ValueError
    for a model whose weights were packed to sample from it."""
    tensors = {
        name: (tensor.detach().t() if TRANSPOSED.search(name) else tensor.detach())
        .to("cpu", torch.float32).contiguous()
        for name, tensor in model.named_parameters()  # a tied weight is met once, as wte
    }
    if len(tensors) != 4 + 12 * model.config.n_layer:
        raise ValueError("the model was made ready to sample, and lacks what is to be saved")
    return tensors


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------- finding


def list_checkpoints(out_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return [path for path in list_step_folders(out_dir) if (path / CONFIG_FILE).is_file()]


def list_step_folders(out_dir: Path) -> list[Path]:
    """What is called like a checkpoint of a run, whole or not, oldest first."""
    return sorted((path for path in out_dir.glob("step_*") if STEP_FOLDER.fullmatch(path.name)),
                  key=step_of)


def step_of(folder: Path) -> int:
    """How many updates a checkpoint's name says that it has seen."""
    return int(folder.name.removeprefix("step_"))


def find_checkpoint(path: str | Path) -> Path:
    """The local folder of a checkpoint, given that folder, OUT_DIR/latest, OUT_DIR/best, OUT_DIR
    (its newest checkpoint) or a name on the Hugging Face hub, which is downloaded. Raises
    UserError."""
    folder = Path(path)
    if folder.is_file() and folder.name in (LATEST, BEST):
        name = folder.read_text(encoding="utf-8", errors="replace").strip()
        if not STEP_FOLDER.fullmatch(name) or not (folder.parent / name).is_dir():
            raise UserError(f"{folder} names {name:.60}, which is not there: name a checkpoint, or "
                            f"{folder.parent} for its newest")
        folder = folder.parent / name
    if (folder / CONFIG_FILE).is_file():
        return folder
    if folder.is_dir():
        if checkpoints := list_checkpoints(folder):
            return checkpoints[-1]
        raise UserError(f"{folder} is no checkpoint: it has neither {CONFIG_FILE} nor step_NNNNNN "
                        "folders; make one with trainer.py or name a GPT-2 on the hub")
    if folder.exists() or not HUB_NAME.fullmatch(str(path)):
        raise UserError(f"checkpoint {folder} does not exist or is no folder")
    return download_checkpoint(str(path))


def download_checkpoint(name: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, "model*.safetensors"]))
    except (HTTPError, HFValidationError, OSError) as error:
        raise UserError(f"checkpoint {name} is no folder here, and the Hugging Face hub did not "
                        f"give it either ({first_line(error)})") from None


# --------------------------------------------------------------------------- reading


def verify(folder: Path, names: Iterable[str] | None = None) -> None:
    """Compares files of a checkpoint (default: all that a run can go on from) with their checksums.
    Raises UserError for one that is damaged or missing; a folder without checksums, made by others
    or changed on purpose, is taken as it is."""
    if not (folder / SUMS_FILE).exists():
        return
    try:
        lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / SUMS_FILE} is damaged ({first_line(error)})") from None
    whole = sums.keys() | {CONFIG_FILE, WEIGHTS_FILE, TRAINING_STATE_FILE}
    for name in sorted(whole if names is None else sums.keys() & set(names)):
        path = folder / name
        try:
            damaged = sha256_of(path) != sums.get(name)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): use another checkpoint"
                            ) from None
        if damaged:
            raise UserError(f"{path} is damaged or truncated, it is not what {SUMS_FILE} says: use "
                            f"an earlier checkpoint (if you changed it, delete {SUMS_FILE})")


def load_model(path: str | Path, device: str | torch.device = "cpu") -> GPT:
    """The model of a checkpoint (see `find_checkpoint`), fp32, in evaluation mode, on `device`.

    Raises UserError for a damaged file, for a setting that is not GPT-2's, and for a tensor that is
    missing, unknown or of another shape than the configuration says.
    """
    folder = find_checkpoint(path)
    verify(folder, [CONFIG_FILE, WEIGHTS_FILE])
    config = read_config(folder)
    with torch.device("meta"):  # sizes only: no memory taken, no random number drawn
        shapes = {name: parameter.shape for name, parameter in GPT(config).named_parameters()}
    found: dict[str, torch.Tensor] = {}
    for file, name, tensor in read_tensors(folder):
        if name not in shapes:
            raise UserError(f"{file} holds a tensor {name}, which GPT-2 has not")
        if TRANSPOSED.search(name) and tensor.dim() == 2:
            tensor = tensor.t()
        if tensor.shape != shapes[name]:
            raise UserError(f"{file}: {name} has shape {tuple(tensor.shape)}, expected "
                            f"{tuple(shapes[name])} for the sizes in {CONFIG_FILE}")
        tensor = tensor.to(device, torch.float32).contiguous()
        if not torch.equal(found.setdefault(name, tensor), tensor):
            raise UserError(f"{file}: lm_head differs from wte, but GPT-2's head is tied")
    if missing := set(shapes) - set(found):
        raise UserError(f"{folder} lacks {len(missing)} tensors, {min(missing)} first: it is "
                        "incomplete or of another model; use another checkpoint")
    return model_around(config, found).eval()


def model_around(config: GPTConfig, parameters: dict[str, torch.Tensor]) -> GPT:
    """A GPT whose parameters are the given tensors themselves, under their names in it."""
    with torch.device("meta"):
        model = GPT(config)
    tied = {"lm_head.weight": parameters["transformer.wte.weight"]}
    model.load_state_dict(parameters | tied, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    return model


def read_config(folder: Path) -> GPTConfig:
    settings = read_settings(folder)
    for name, value in FIXED_SETTINGS.items():
        if settings.get(name, value) != value:
            raise UserError(f"{folder / CONFIG_FILE}: {name} is {settings[name]!r}, but GPT-2 has "
                            f"{value!r}: not a model that this project can run")
    try:
        config = GPTConfig(block_size=settings["n_positions"], vocab_size=settings["vocab_size"],
                           n_layer=settings["n_layer"], n_head=settings["n_head"],
                           n_embd=settings["n_embd"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{folder / CONFIG_FILE} does not describe a GPT-2: {error}") from None
    if settings.get("n_inner") not in (None, 4 * config.n_embd):
        raise UserError(f"{folder / CONFIG_FILE}: n_inner is {settings['n_inner']}, but GPT-2 has "
                        f"4 n_embd = {4 * config.n_embd}")
    return config


def read_settings(folder: Path) -> dict:
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG_FILE} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{folder / CONFIG_FILE} holds no JSON object")
    return settings


def read_prompt_template(path: str | Path) -> str | None:
    """The template a checkpoint was fine-tuned with, None for a base model. Raises UserError for
    one that this project does not have."""
    folder = find_checkpoint(path)
    template = read_settings(folder).get("prompt_template")
    if template not in (None, PROMPT_TEMPLATE):
        raise UserError(f"{folder} was fine-tuned with the template {template!r}, which is unknown "
                        f"here (known: {PROMPT_TEMPLATE})")
    return template


def read_tensors(folder: Path) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """(file, name, tensor) of every weight under our name for it, whichever of the format's
    variants the folder is in: OpenAI's files lack the prefix `transformer.` and carry attention
    masks; others carry `module.` or `_orig_mod.`, or the tied head a second time."""
    files = [folder / WEIGHTS_FILE]
    if not files[0].is_file():
        files = sorted(folder.glob("model-*-of-*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no {WEIGHTS_FILE}: only safetensors checkpoints are read")
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for stored in tensors.keys():  # noqa: SIM118, it is no dict
                    name = re.sub(r"^((_orig_mod|module)\.)+", "", stored)
                    if re.search(r"\.attn\.(masked_)?bias$", name):
                        continue
                    if name == "lm_head.weight":
                        name = "transformer.wte.weight"
                    elif not name.startswith("transformer."):
                        name = "transformer." + name
                    yield file, name, tensors.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or truncated ({first_line(error)}): use an earlier "
                            "checkpoint") from None


def load_training_state(folder: Path, mapped: bool = False) -> dict:
    """What `save_checkpoint` was given as `training_state`, on the CPU; `mapped` reads tensors from
    the file as they are used. Raises UserError; a file that holds more than tensors and plain
    values is refused unread. `verify` finds other damage."""
    path = folder / TRAINING_STATE_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {TRAINING_STATE_FILE}: training cannot go on from it")
    try:
        if not zipfile.is_zipfile(path):  # torch.load would take it for its format before 1.6
            raise pickle.UnpicklingError("no zip archive")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        # what torch says, to load it without the check, is not to be repeated
        raise UserError(f"{path} is damaged, or holds code, which is never run "
                        f"({type(error).__name__})") from None
