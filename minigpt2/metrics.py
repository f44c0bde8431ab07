"""The run log (JSON Lines, optionally TensorBoard and W&B), run metadata, and FLOPs for MFU."""

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import platform
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from minigpt2.config import UserError, first_line
from minigpt2.files import atomic_write

# Dense bf16 tensor-core peak in TFLOP/s with fp32 accumulation (V100 and T4: fp16), from the
# vendors' data sheets. The longest name whose words all occur in the device name wins.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "A100": 312,
    "A40": 149.7, "A10": 125, "A10G": 70, "L40S": 362, "L40": 181, "L4": 121, "RTX A6000": 154.8,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71, "V100": 125, "T4": 65}
OF_WEIGHTS = ("val", "hellaswag")  # kinds of records about the weights after so many steps


def peak_flops(device: torch.device) -> float | None:
    """Returns the data-sheet peak of a GPU in FLOP/s; None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    words = set(torch.cuda.get_device_name(device).replace("-", " ").replace("_", " ").split())
    known = [name for name in PEAK_TFLOPS if set(name.split()) <= words]
    return PEAK_TFLOPS[max(known, key=len)] * 1e12 if known else None


def run_metadata(config, *, world_size: int, device: torch.device, data: dict) -> dict:
    """Returns what is needed to reproduce a run, as a flat JSON object: settings, versions, commit,
    SHA-256 of the code and of `data` (a manifest, as canonical JSON), world size, device name."""
    root = Path(__file__).resolve().parents[1]
    code = b"".join(path.read_bytes() for folder in (root, root / "minigpt2")
                    for path in sorted(folder.glob("*.py")))
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    name = (torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"{device.type} {platform.machine()}")
    environment = {"python": platform.python_version(), "torch": str(torch.__version__),
                   "numpy": np.__version__, "cuda": torch.version.cuda, "git_commit": git_commit(),
                   "code_sha256": hashlib.sha256(code).hexdigest(),
                   "data_sha256": hashlib.sha256(canonical.encode()).hexdigest(),
                   "world_size": world_size, "device_name": name}
    return vars(config) | environment


def git_commit() -> str | None:
    """Returns the commit of this file's repository, with "+changes" if tracked files are modified;
    None if git is missing or does not track this file."""
    # a git hook that starts a run sets GIT_DIR and GIT_INDEX_FILE to those of its own repository
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    file = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        return subprocess.check_output(["git", "--no-optional-locks", *arguments], cwd=file.parent,
                                       env=environment, text=True, stderr=subprocess.DEVNULL)

    try:
        git("ls-files", "--error-unmatch", file.name)  # fails for a copy inside another repository
        return git("describe", "--always", "--abbrev=64", "--exclude=*", "--dirty=+changes").strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class RunLog:
    """Appends records to a JSON Lines file: {"step": 3, "kind": "train", "loss": 4.2}. `fresh`
    deletes an existing file first. `mirror` gets a copy of every record and is closed with the log;
    if it raises OSError, the log prints one line and continues without it."""

    def __init__(self, path: Path, fresh: bool = False, mirror: "TensorBoardMirror | None" = None):
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        self.path, self.mirror = path, mirror
        self.file = open(path, "a+b", buffering=0)  # noqa: SIM115, closed by `close`
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b"\n") + 1)  # drop a line that a kill cut short

    def write(self, step: int, kind: str, **values) -> None:
        """Appends a record; non-finite numbers, which JSON lacks, become null. Raises OSError with
        `filename` set when the disk is full; the log then still ends in a complete line."""
        finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                  for name, value in values.items()}
        record = {"step": step, "kind": kind, **finite}
        # A lone surrogate, from a path that is not UTF-8, becomes JSON's \udcxx
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        size = os.fstat(self.file.fileno()).st_size
        try:
            while line:  # an almost full disk accepts a part; the next write raises
                line = line[self.file.write(line):]
        except OSError as error:
            error.filename = str(self.path)
            with contextlib.suppress(OSError):  # else the next start drops the partial line
                self.file.truncate(size)
            raise
        self.call_mirror("write", record)

    def call_mirror(self, method: str, *arguments) -> None:
        try:
            if self.mirror is not None:
                getattr(self.mirror, method)(*arguments)
        except OSError as error:
            self.mirror = None
            print(f"TensorBoard or W&B failed ({first_line(error)}): logging only to "
                  f"{self.path}", flush=True)

    def close(self) -> None:
        self.file.close()
        self.call_mirror("close")


def read_log(path: Path) -> dict[str, dict[int, dict]]:
    """The records of a run log as {kind: {step: record}}; the last of a step wins. A "run" record
    of step S discards the train records from S on and those of OF_WEIGHTS after S. An incomplete
    last line is ignored. Raises UserError for a damaged line."""
    records: dict[str, dict[int, dict]] = {}
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # the last one is empty or incomplete
    except OSError as error:
        raise UserError(f"cannot read the run log {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step, kind = record["step"], record["kind"]
            if type(step) is not int or not isinstance(kind, str):
                raise TypeError(f"step is {step!r}, kind is {kind!r}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not a record ({error!r:.200})") from None
        for other in ("train", *OF_WEIGHTS) if kind == "run" else ():
            first = step if other == "train" else step + 1
            if other in records:
                records[other] = {s: r for s, r in records[other].items() if s < first}
        records.setdefault(kind, {})[step] = record
    return records


def start_log(out_dir: Path, *, fresh: bool, start_step: int, metadata: dict, tensorboard: bool,
              wandb: str | None) -> RunLog:
    """Opens OUT_DIR/metrics.jsonl of a new (`fresh`) or resumed run, mirrored to TensorBoard and to
    the W&B project `wandb` if asked for, and writes a "run" record. Raises UserError for a missing
    package and for a damaged log, which could not be plotted later."""
    packages = ["tensorboard", "wandb"] if wandb is not None else ["tensorboard"] * tensorboard
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # a mere folder of that name has no origin
            raise UserError(f"--{packages[-1]} needs the package {package}: pip install {package}")
    path = out_dir / "metrics.jsonl"
    records = read_log(path) if path.exists() and not fresh else {}
    mirror = TensorBoardMirror(out_dir, start_step, wandb, metadata) if packages else None
    log = RunLog(path, fresh=fresh, mirror=mirror)
    log.write(start_step, "run", time=time.strftime("%Y-%m-%dT%H:%M:%S%z"), **metadata)
    for kind in OF_WEIGHTS:
        if start_step in records.get(kind, {}):  # TensorBoard purges it, but it is still valid
            log.call_mirror("write", records[kind][start_step])
    return log


class TensorBoardMirror:
    """Copies the numbers of a run log to event files in OUT_DIR/tensorboard, named train/loss,
    val/loss, ... With a W&B project, W&B uploads these files."""

    def __init__(self, out_dir: Path, start_step: int, project: str | None, metadata: dict):
        from torch.utils.tensorboard import SummaryWriter  # optional
        folder = out_dir / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        self.wandb_run = start_wandb(project, folder, metadata) if project is not None else None
        self.writer = SummaryWriter(str(folder), flush_secs=10, purge_step=start_step)

    def write(self, record: dict) -> None:
        step, kind = record["step"], record["kind"]
        if kind == "run":
            self.writer.add_text("run", f"```\n{json.dumps(record, indent=1)}\n```", step)
        for name, value in record.items():
            if kind not in ("run", "end") and name != "step" and isinstance(value, int | float):
                self.writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def start_wandb(project: str, folder: Path, metadata: dict):
    """Starts or resumes the W&B run with the id in OUT_DIR/wandb_id; it follows the event files in
    `folder`. Waits for the server here, and up to 60 s in `finish`. Raises UserError."""
    import wandb  # optional
    out_dir, id_file = folder.parent, folder.parent / "wandb_id"
    if not id_file.exists():
        with atomic_write(id_file, text=True) as file:
            file.write(os.urandom(4).hex())
    settings = {"init_timeout": 20, "finish_timeout": 60, "disable_git": True, "console": "off"}
    try:
        online = "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
        run = wandb.init(project=project, id=id_file.read_text(encoding="utf-8").strip(),
                         resume="allow", mode=None if online else "offline", dir=str(out_dir),
                         config=metadata, allow_val_change=True, settings=settings)
    except wandb.Error as error:
        raise UserError(f"--wandb {project}: W&B did not start ({first_line(error)}): set "
                        f"WANDB_MODE=offline, or rm {id_file} to start a new W&B run") from None
    wandb.tensorboard.unpatch()  # of an earlier run in this process
    # like wandb.init(sync_tensorboard=True), which needs 10 s to guess the root folder
    wandb.tensorboard.patch(save=False, root_logdir=str(folder))
    run.define_metric("global_step")  # unlike W&B's own step, this axis may decrease: it keeps
    run.define_metric("*", step_metric="global_step")  # the steps repeated after a restart
    return run
