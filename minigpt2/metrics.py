"""What a run reports: a JSONL log and its mirrors, the facts to repeat it, and MFU."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import secrets
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from minigpt2.config import UserError, first_line
from minigpt2.files import atomic_write
from model import GPT

# Dense bf16 (fp16 where noted) tensor-core peak in TFLOP/s with fp32 accumulation, from the
# vendors' data sheets. The longest name whose words all occur in the device's name wins.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "A100": 312,
    "A40": 149.7, "A10": 125, "A10G": 70, "L40S": 362, "L40": 181, "L4": 121, "RTX A6000": 154.8,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71,
    "V100": 125, "T4": 65,  # fp16: no bf16 units
}


def peak_flops(device: torch.device) -> float | None:
    """The data-sheet peak of a GPU in FLOP/s; None for a card not in the table, and for CPUs."""
    if device.type != "cuda":
        return None
    words = set(re.split(r"[\s\-_]+", torch.cuda.get_device_name(device)))
    known = [name for name in PEAK_TFLOPS if set(name.split()) <= words]
    return PEAK_TFLOPS[max(known, key=len)] * 1e12 if known else None


def flops_per_token(model: GPT, sequence_length: int) -> int:
    """Forward and backward, PaLM's count (Chowdhery et al. 2022, appendix B): 6 per parameter that
    multiplies (all but the position table) plus 12 n_layer C T for attention, not halved for
    causality. 6 x 123,653,376 + 12 x 12 x 768 x 1024 = 855,166,464 for GPT-2 124M at T = 1024."""
    config = model.config
    multiplied = model.num_parameters() - model.transformer.wpe.weight.numel()
    return 6 * multiplied + 12 * config.n_layer * config.n_embd * sequence_length


def run_metadata(config, *, world_size: int, device: torch.device, data: dict) -> dict:
    """What it takes to repeat a run, flat and JSON-able: every setting, versions, the commit of
    this code, the SHA-256 of `data` (a manifest) as canonical JSON, the number and name of devices.
    A run logs it at every start."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"{device.type} {platform.machine()}"
    facts = {"python": platform.python_version(), "torch": str(torch.__version__),
             "numpy": np.__version__, "cuda": torch.version.cuda, "git_commit": git_commit(),
             "data_sha256": hashlib.sha256(canonical.encode()).hexdigest(),
             "code_sha256": code_sha256(), "world_size": world_size, "device_name": name}
    settings = dataclasses.asdict(config)
    clash = settings.keys() & {*facts, "step", "kind", "time"}
    assert not clash, f"settings and facts of a run are both called {clash}"
    return settings | facts


def code_sha256() -> str:
    """Of all the Python files at the root of this repository and in minigpt2/."""
    root = Path(__file__).resolve().parents[1]
    files = [*sorted(root.glob("*.py")), *sorted(root.glob("minigpt2/*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def git_commit() -> str | None:
    """The commit of this file's repository, `+changes` appended when tracked files differ from it;
    None where this file is not tracked or there is no git."""
    folder = Path(__file__).resolve().parent
    # not the repository, nor the index, of a git hook that may have started this
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", "--no-optional-locks", *arguments], cwd=folder, check=True,
                              env=environment, capture_output=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # a copy inside another checkout?
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD").decode() + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class RunLog:
    """One flat JSON object a line, appended: at least step and kind, for most of them loss."""

    def __init__(self, path: Path, fresh: bool = False, mirrors: Sequence = ()):
        """`fresh` begins anew, over what a run left that did not get to its first checkpoint.
        Mirrors (see `open_mirrors`) get every record, too, and are closed with the log."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        self.path, self.mirrors = path, list(mirrors)
        self.file = open(path, "a+b", buffering=0)  # noqa: SIM115, closed by `close`
        self.drop_half_written_line()

    def drop_half_written_line(self) -> None:
        """A run killed while it wrote a line leaves a part of one: cut it off before appending."""
        self.file.seek(0)
        whole = self.file.read().rfind(b"\n") + 1
        self.file.truncate(whole)

    def write(self, step: int, kind: str, **values) -> None:
        """Appends a record; a number that is not finite, which JSON has not, becomes null. Raises
        OSError with `filename` where there is no room; the log then ends in a whole line."""
        finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                  for name, value in values.items()}
        line = json.dumps({"step": step, "kind": kind, **finite}, ensure_ascii=False)
        self.append(line.encode("utf-8") + b"\n")
        self.to_mirrors("write", step, kind, finite)

    def append(self, line: bytes) -> None:
        whole = os.fstat(self.file.fileno()).st_size
        try:
            while line:  # a full disk takes a part first; why it takes no more, the next try says
                line = line[self.file.write(line):]
        except OSError as error:
            error.filename = str(self.path)
            with contextlib.suppress(OSError):  # else the next start cuts it off
                self.file.truncate(whole)
            raise

    def to_mirrors(self, method: str, *arguments) -> None:
        """A mirror that fails is left out from there on, with a line: the log has everything."""
        for mirror in tuple(self.mirrors):
            try:
                getattr(mirror, method)(*arguments)
            except OSError as error:
                self.mirrors.remove(mirror)
                print(f"{type(mirror).__name__} ends here ({first_line(error)}): {self.path} has "
                      "everything", flush=True)

    def close(self) -> None:
        self.file.close()
        self.to_mirrors("close")


def start_log(out_dir: Path, *, fresh: bool, start_step: int, facts: dict, tensorboard: bool,
              wandb: str | None) -> RunLog:
    """OUT_DIR/metrics.jsonl of a run that begins (`fresh`) or goes on at start_step, with the
    mirrors that the user chose and the record of this start. Raises UserError for a log with a line
    that is none: better now than at the graph."""
    if not fresh and (out_dir / "metrics.jsonl").exists():
        read_log(out_dir / "metrics.jsonl")
    mirrors = open_mirrors(tensorboard=tensorboard, wandb=wandb, out_dir=out_dir,
                           start_step=start_step, facts=facts)
    log = RunLog(out_dir / "metrics.jsonl", fresh=fresh, mirrors=mirrors)
    log.write(start_step, "run", time=time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts)
    return log


def read_log(path: Path) -> dict[str, dict[int, dict]]:
    """kind -> step -> record. The last record of a step counts, and a "run" record of step S, with
    which a run starts from S, undoes the updates from S on: their train records, and the val
    records after S. Raises UserError naming the line that is no record."""
    records: dict[str, dict[int, dict]] = {}
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # the last: empty, or half-written
    except OSError as error:
        raise UserError(f"cannot read the run log {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step, kind = record["step"], record["kind"]
            if type(step) is not int or not isinstance(kind, str):
                raise TypeError(f"step is {step!r}, kind is {kind!r}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} line {number} is no record of a run log "
                            f"({error!r:.200})") from None
        if kind == "run":
            for undone, first in (("train", step), ("val", step + 1)):
                if undone in records:
                    records[undone] = {s: r for s, r in records[undone].items() if s < first}
        records.setdefault(kind, {})[step] = record
    return records


def open_mirrors(*, tensorboard: bool, wandb: str | None, out_dir: Path, start_step: int,
                 facts: dict) -> list:
    """The mirrors of a run log that the user chose: a TensorBoard folder, a W&B project. Neither
    needs a network. Raises UserError where a package is missing or W&B refuses."""
    for package, wanted in (("tensorboard", tensorboard), ("wandb", wandb is not None)):
        spec = importlib.util.find_spec(package) if wanted else None
        if wanted and (spec is None or spec.origin is None):  # a mere folder of that name has none
            raise UserError(f"--{package} needs a package that is not installed: "
                            f"pip install {package}")
    out_dir.mkdir(parents=True, exist_ok=True)
    mirrors = [TensorBoardMirror(out_dir, start_step, facts)] if tensorboard else []
    return mirrors + ([] if wandb is None else [WandbMirror(wandb, out_dir, facts)])


def chart_values(kind: str, values: dict) -> dict[str, int | float]:
    """What a chart can show of a record, as train/loss, val/loss, train/lr."""
    return {f"{kind}/{name}": value for name, value in values.items()
            if kind not in ("run", "end") and name != "step" and isinstance(value, int | float)}


class TensorBoardMirror:
    """OUT_DIR/tensorboard, for `tensorboard --logdir OUT_DIR`."""

    def __init__(self, out_dir: Path, start_step: int, facts: dict):
        from torch.utils.tensorboard import SummaryWriter  # optional, as wandb below

        self.writer = SummaryWriter(str(out_dir / "tensorboard"), flush_secs=10,
                                    purge_step=start_step)
        self.writer.add_text("run", f"```\n{json.dumps(facts, indent=1)}\n```", start_step)
        log = out_dir / "metrics.jsonl"
        if start_step and log.exists():  # purged, too, but not undone: the validation of this step
            self.write(start_step, "val", read_log(log).get("val", {}).get(start_step, {}))

    def write(self, step: int, kind: str, values: dict) -> None:
        for name, value in chart_values(kind, values).items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandbMirror:
    """A W&B run under OUT_DIR/wandb whose id is kept in OUT_DIR/wandb_id: a restart goes on with
    it. A server out of reach is waited for 40 s at the start and 60 s at the end."""

    def __init__(self, project: str, out_dir: Path, facts: dict):
        from wandb import Settings, init, login
        from wandb.errors import Error

        id_file = out_dir / "wandb_id"
        if not id_file.exists():
            with atomic_write(id_file, text=True) as file:
                file.write(secrets.token_hex(4))
        settings = Settings(init_timeout=20, finish_timeout=60, disable_git=True, console="off")
        try:
            chosen = "WANDB_MODE" in os.environ or login(prompt=False, verify=False)
            if not chosen:
                print(f"W&B: no login, so the run stays on this disk; `wandb sync {out_dir}/wandb/"
                      "offline-run-*` uploads it", flush=True)
            self.run = init(project=project, id=id_file.read_text(encoding="utf-8").strip(),
                            dir=str(out_dir), resume="allow", mode=None if chosen else "offline",
                            config=facts, allow_val_change=True, settings=settings)
        except Error as error:
            raise UserError(f"W&B does not start --wandb {project} ({first_line(error)}): "
                            f"WANDB_MODE=offline needs no server, rm {id_file} begins another run"
                            ) from None
        # W&B's own step only grows; on this axis, updates made again after a restart are kept
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, kind: str, values: dict) -> None:
        shown = chart_values(kind, values)
        if shown:
            self.run.log({"step": step, **shown})

    def close(self) -> None:
        self.run.finish()
