"""The run log, the documented trackers, run metadata, FLOPs, and the graphs drawn from logs."""

import dataclasses
import errno
import json
import os
import platform
import re
import resource
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.common import ROOT, main_error, run_script, user_error
from matplotlib.figure import Figure
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from image.plot_loss import main
from image.plot_report import check_image
from minigpt2 import metrics
from minigpt2.metrics import RunLog, draw_runs, peak_flops, read_log, run_metadata
from model import GPT, GPTConfig


def write_log(path, records: list[tuple]):
    path.parent.mkdir(exist_ok=True)
    log = RunLog(path)
    for step, kind, values in records:
        log.write(step, kind, **values)
    log.close()
    return path


def losses(path, kind: str) -> dict[int, float]:
    return {step: record["loss"] for step, record in read_log(path).get(kind, {}).items()}


def test_flops_per_token_of_gpt2():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    # embedding and head 50257 x 768, a block 12 x 768^2 + 13 x 768, a final LayerNorm 2 x 768
    multiplied = 50257 * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    assert multiplied == 123_653_376
    assert model.flops_per_token(1024) == 6 * multiplied + 12 * 12 * 768 * 1024 == 855_166_464


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("Tesla V100-SXM2-16GB", 125e12), ("NVIDIA A10G", 70e12),
    ("NVIDIA A10", 125e12), ("NVIDIA GeForce RTX 4090", 165.2e12), ("NVIDIA L40S", 362e12),
    ("NVIDIA GeForce GTX 1080", None), ("NVIDIA A1000 Laptop GPU", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 3090 Ti", None),
    ("NVIDIA GeForce RTX 4090 D", None),
    ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None), ("NVIDIA H100 NVL", 835e12)])
def test_peak_flops(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_partial_last_line_is_dropped_before_appending(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = RunLog(path)
    log.write(0, "val", loss=10.5)
    log.write(0, "train", loss=10.25, lr=1e-4)
    log.close()
    with open(path, "ab") as file:
        file.write(b'{"step": 1, "kind": "tra')  # killed while writing
    log = RunLog(path)
    log.write(1, "train", loss=9.5)
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 0, "kind": "val", "loss": 10.5},
                     {"step": 0, "kind": "train", "loss": 10.25, "lr": 1e-4},
                     {"step": 1, "kind": "train", "loss": 9.5}]


def test_non_finite_numbers_become_null(tmp_path):
    log = RunLog(tmp_path / "metrics.jsonl")
    log.write(0, "train", loss=float("nan"), grad_norm=float("inf"), lr=0.5)
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 0, "kind": "train", "loss": None, "grad_norm": None, "lr": 0.5}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_the_error_of_a_partial_write_names_the_log(number, tmp_path):
    class Full:
        """A file on a disk with ten free bytes."""

        def __init__(self, file):
            self.file, self.free = file, 10

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if not self.free:
                raise OSError(number, os.strerror(number))
            written = self.file.write(data[: self.free])
            self.free -= written
            return written

    path = tmp_path / "metrics.jsonl"
    log = RunLog(path)
    log.write(0, "train", loss=2.0)
    log.file = Full(log.file)
    with pytest.raises(OSError) as caught:
        log.write(1, "train", loss=1.0)
    log.close()
    assert (caught.value.errno, caught.value.filename) == (number, str(path))
    assert losses(path, "train") == {0: 2.0}, "the partial line is ignored"
    write_log(path, [(1, "train", {"loss": 0.5})])
    assert losses(path, "train") == {0: 2.0, 1: 0.5}, "and dropped by the next run"


def test_full_disk_is_one_error_line_and_the_log_can_continue(tmp_path, monkeypatch, capsys):
    path = tmp_path / "metrics.jsonl"

    def fill_the_disk():  # a file size limit stands in for it
        log = RunLog(path)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
        try:
            for step in range(100):
                log.write(step, "train", loss=0.5)
        finally:
            log.close()
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    message = main_error(fill_the_disk, [], monkeypatch, capsys)
    assert "no space left" in message and str(path) in message
    assert path.stat().st_size == 500
    written = losses(path, "train")
    assert sorted(written) == list(range(len(written)))
    write_log(path, [(len(written), "train", {"loss": 0.25})])
    assert losses(path, "train") == written | {len(written): 0.25}


@dataclasses.dataclass(frozen=True)
class SomeConfig:
    data_dir: str = "somewhere"
    max_steps: int | None = None
    seed: int = 7


def test_run_metadata(monkeypatch, tmp_path):
    def metadata(data, **config):
        return run_metadata(SomeConfig(**config), world_size=8, device=torch.device("cpu"),
                            data=data)

    found = metadata({"tokens": 5, "shards": [{"file": "a"}]})
    assert json.loads(json.dumps(found)) == found
    assert {type(value) for value in found.values()} <= {str, int, type(None)}
    torch.save(found, tmp_path / "metadata.pt")  # checkpoints may hold only plain values
    assert torch.load(tmp_path / "metadata.pt", weights_only=True) == found
    expected = {"data_dir": "somewhere", "max_steps": None, "seed": 7, "world_size": 8,
                "python": platform.python_version(), "torch": torch.__version__,
                "numpy": np.__version__, "cuda": torch.version.cuda}
    assert {name: found[name] for name in expected} == expected
    assert set(found) == {*expected, "git_commit", "code_sha256", "data_sha256", "device_name"}
    # the hash depends on the content of a manifest, not on the order of its keys
    same, other = ({"shards": [{"file": file}], "tokens": 5} for file in "ab")
    assert metadata(same)["data_sha256"] == found["data_sha256"]
    assert metadata(other)["data_sha256"] != found["data_sha256"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    assert run_metadata(SomeConfig(), world_size=1, device=torch.device("cuda", 1),
                        data={})["device_name"] == "card 1"


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_git_commit(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # a hook sets GIT_DIR
    def git(*arguments):
        name = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *name, *arguments], cwd=tmp_path, check=True, text=True,
                              capture_output=True).stdout.strip()

    def found():
        return run_metadata(SomeConfig(), world_size=1, device=torch.device("cpu"),
                            data={})["git_commit"]

    monkeypatch.setattr(metrics, "ROOT", tmp_path)
    (tmp_path / "metrics.py").write_text("pass\n")
    assert found() is None  # not in a repository
    git("init", "--quiet")
    git("add", "metrics.py")
    assert found() is None  # no commit yet
    git("commit", "--quiet", "-m", "one")
    assert found() == git("rev-parse", "HEAD") and re.fullmatch("[0-9a-f]{40}", found())
    (tmp_path / "metrics.py").write_text("pass  # changed\n")
    assert found() == git("rev-parse", "HEAD") + "+changes"
    monkeypatch.setenv("PATH", str(tmp_path))  # git is not installed
    assert found() is None


def wandb_history(file: Path) -> list[dict]:
    """The rows that W&B stored in a .wandb file: a LevelDB log (7 bytes of header, then records of
    CRC, length and type in blocks of 32 KiB) of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, payload, rows = file.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        if 2**15 - position % 2**15 < 7:  # too short for another header
            position += 2**15 - position % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        payload += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record, payload = Record.FromString(payload), b""
            if record.WhichOneof("record_type") == "history":
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json)
                             for item in record.history.item})
    return rows


def documented_trackers() -> tuple[str, str]:
    """The programs of docs/training.md that send a run log to TensorBoard and to W&B."""
    docs = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    code, = re.findall(r"metrics.jsonl \| python -c '\n(.*?)'\n```", docs, re.DOTALL)
    instead, = re.findall(r"```python\n(import wandb\n.*?)```", docs, re.DOTALL)
    lines, (*first, last) = code.splitlines(), instead.splitlines()
    assert last.endswith("'")  # the shell's, as in the last line that it replaces
    return code, "\n".join([lines[0], *first, *lines[3:-1], last[:-1]])


@pytest.fixture
def tracked_log(tmp_path) -> str:
    return write_log(tmp_path / "metrics.jsonl", [
        (0, "run", {"max_lr": 0.5}), (0, "val", {"loss": 9.0}), (0, "train", {"loss": 8.0}),
        (1, "train", {"loss": None, "mfu": None, "lr": 0.5}), (1, "run", {"max_lr": 0.25})
    ]).read_text()


@pytest.mark.slow
def test_the_documented_command_sends_the_log_to_tensorboard(tmp_path, tracked_log):
    run_script("-c", documented_trackers()[0], stdin=tracked_log, cwd=tmp_path)
    events = EventAccumulator(str(tmp_path / "out" / "pretrain" / "tensorboard")).Reload()
    assert {name: [(event.step, event.value) for event in events.Scalars(name)]
            for name in events.Tags()["scalars"]} == {
        "val/loss": [(0, 9.0)], "train/loss": [(0, 8.0)], "train/lr": [(1, 0.5)]}


@pytest.mark.slow
def test_the_documented_command_sends_the_log_to_wandb(tmp_path, tracked_log):
    """The real package, without a network, in an empty home folder."""
    run_script("-c", documented_trackers()[1], stdin=tracked_log, cwd=tmp_path, env={
        "HOME": str(tmp_path), "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": "", "NETRC": "",
        "WANDB_API_KEY": "", "WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    file, = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows = [{name: value for name, value in row.items() if name[0] != "_"}
            for row in wandb_history(file)]
    assert rows == [{"step": 0, "val/loss": 9.0}, {"step": 0, "train/loss": 8.0},
                    {"step": 1, "train/lr": 0.5}]


def draw_and_capture(monkeypatch, *arguments) -> Figure:
    """Calls draw_runs and returns the figure it drew."""
    figures = []

    class CapturedFigure(Figure):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            figures.append(self)

    monkeypatch.setattr("matplotlib.figure.Figure", CapturedFigure)
    draw_runs(*arguments)
    return figures[-1]


def lines_of(axes) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
            for line in axes.lines}


def test_graph_shows_the_logged_values(tmp_path, monkeypatch):
    runs = []
    for name, scale in (("a", 1), ("b$_$", 100)):
        records = [(step, "train", {"loss": 5.0 - step, "lr": 0.5, "grad_norm": scale + step})
                   for step in range(3)]
        records += [(1, "train", {"loss": None}), (2, "val", {"loss": 0.5}),
                    (0, "run", {"time": 5.0})][: 2 if name == "a" else 3]
        runs.append((name, write_log(tmp_path / name / "metrics.jsonl", records)))
    figure = draw_and_capture(monkeypatch, runs, tmp_path / "x.png", r"$\frac{$")
    loss, lr, grad_norm = figure.axes
    assert lines_of(loss) == {"a train": ([0, 2], [5.0, 3.0]), "a val": ([2], [0.5]),
                              "a skipped": ([1], [0.03])}  # b restarted at step 0
    assert loss.get_ylim()[0] > 0.1, "the cross does not stretch the loss axis"
    assert [list(line.get_ydata()) for line in lr.lines] == [[0.5, 0.5], []]
    assert grad_norm.get_yscale() == "linear"
    assert [line.get_color() for line in grad_norm.lines] == ["C0", "C1"]
    assert len({line.get_color() for line in loss.lines}) == 1
    assert [text.get_text() for text in loss.get_legend().get_texts()] == list(lines_of(loss))
    assert imread(tmp_path / "x.png").shape[1] == 960

    write_log(runs[1][1], [(0, "train", {"loss": 4.0, "grad_norm": 100.0}),
                           (1, "train", {"loss": 3.0, "skipped": True})])
    loss, _, grad_norm = draw_and_capture(monkeypatch, runs, tmp_path / "x.png", "").axes
    assert lines_of(loss)["b$_$ train"] == ([0, 1], [4.0, 3.0])
    assert lines_of(loss)["b$_$ skipped"][0] == [1] and grad_norm.get_yscale() == "log"
    assert {line.get_color() for line in loss.lines} == {"C0", "C1"}


@pytest.mark.parametrize("losses, limits", [
    ([10.8, 8, 5, 4.5, 4.2, 4], (3.95, 5.05)),  # the fall is left out
    ([5.8, 5.6, 5.2, 4.9, 4.7, 4.5], None), ([0.69, 0.69, 0.7, 0.66, 0.68, 0.65], None),
    ([3.0], None), ([4.0, 4.0], None), ([1e9, -2, -2.2, -2.1, -2.3, -2.4], (-2.42, -1.98))])
def test_the_loss_axis_shows_the_useful_range(losses, limits, tmp_path, monkeypatch):
    """The first tenth of the steps does not fix it if the fall would take more than half."""
    steps = [0, 5, 10, 40, 70, 100][: len(losses)]
    log = write_log(tmp_path / "metrics.jsonl", [
        (step, kind, {"loss": loss}) for step, loss in zip(steps, losses, strict=True)
        for kind in ("train", "val")])
    if limits is not None:
        losses[1:2] = [5.0] if losses[0] < 100 else [-2.0]
        write_log(log, [(step, "train", {"loss": loss})
                        for step, loss in zip([0, 10, 12, 40, 70, 100], losses, strict=True)])
    axes = draw_and_capture(monkeypatch, [("", log)], tmp_path / "x.png", "").axes[0]
    if limits is None:
        low, high = axes.get_ylim()
        assert low < min(losses) and high > max(losses)
    else:
        assert axes.get_ylim() == pytest.approx(limits)


def test_graph_shows_hellaswag_if_it_was_scored(tmp_path, monkeypatch):
    path = write_log(tmp_path / "log.jsonl", [
        (0, "train", {"loss": 5.0, "lr": 0.5, "grad_norm": 1.0}),
        *((step, "hellaswag", {"accuracy_per_token": 0.25 + step}) for step in (0, 4))])
    figure = draw_and_capture(monkeypatch, [("", path)], tmp_path / "x.png", "")
    _, hellaswag, lr, grad_norm = figure.axes
    assert list(lines_of(hellaswag).values()) == [([0, 4], [0.25, 4.25])]
    assert [axes.get_ylabel() for axes in (hellaswag, lr, grad_norm)] == [
        "HellaSwag", "learning rate", "gradient norm"]


@pytest.mark.parametrize("names", [["_a", "__b"], ["_nolegend_", "b"], ["_", ""], ["a"], ["_a"]])
def test_every_run_is_in_the_legend(names, tmp_path, monkeypatch):
    path = write_log(tmp_path / "log.jsonl", [(0, "val", {"loss": 2.5}), (1, "train", {"loss": 2})])
    runs = [(name, path) for name in names]
    (axes,) = draw_and_capture(monkeypatch, runs, tmp_path / "x.png", "_title").axes
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert shown == ([f"{name} {kind}" for name in names for kind in ("train", "val")]
                     if len(names) > 1 else ["train", "val"])


def test_graph_of_losses_only_and_of_empty_logs(tmp_path, monkeypatch):
    path = write_log(tmp_path / "log.jsonl", [(0, "val", {"loss": 2.5}), (1, "train", {"loss": 2})])
    (axes,) = draw_and_capture(monkeypatch, [("", path)], tmp_path / "x.png", "t").axes
    assert lines_of(axes) == {"train": ([1], [2]), "val": ([0], [2.5])}
    assert axes.get_xlabel() == "step"
    for records in ([], [(0, "train", {"loss": None, "lr": 0.5})], [(0, "run", {})]):
        (tmp_path / "empty.jsonl").unlink(missing_ok=True)
        write_log(tmp_path / "empty.jsonl", records)
        message = user_error(draw_runs, [("", tmp_path / "empty.jsonl")], tmp_path / "y.png", "")
        assert "empty.jsonl" in message and not (tmp_path / "y.png").exists()


def test_check_image_rejects_unwritable_paths(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for name in ("metrics.jsonl", "file/x.png", "folder.png"):
        assert f"--out {tmp_path / name}" in user_error(check_image, tmp_path / name)
    check_image(tmp_path / "new" / "deep" / "x.png")
    assert not (tmp_path / "new").exists()


def test_last_record_of_a_step_wins(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = RunLog(path)
    for step, loss in [(0, 3.0), (1, 2.0), (2, 1.0), (1, 2.5), (2, 1.5)]:  # resumed at step 1
        log.write(step, "train", loss=loss)
    log.close()
    assert {s: r["loss"] for s, r in read_log(path)["train"].items()} == {0: 3.0, 1: 2.5, 2: 1.5}


def test_run_record_discards_later_steps(tmp_path):
    def records(start: int, end: int, value: float):
        yield start, "run", {"git_commit": f"commit {value}"}
        for step in range(start, end):
            if step % 2 == 0 and (step > start or start == 0):
                yield step, "val", {"loss": value}
            yield step, "train", {"loss": value, "lr": 0.5}

    path = write_log(tmp_path / "log.jsonl", [*records(0, 8, 1.0), *records(4, 6, 2.0)])
    # steps 6 and 7 are discarded; the validation loss of step 4 still holds after the restart
    assert losses(path, "train") == dict.fromkeys(range(4), 1.0) | {4: 2.0, 5: 2.0}
    assert losses(path, "val") == {0: 1.0, 2: 1.0, 4: 1.0}
    write_log(path, records(4, 5, 3.0))
    log = read_log(path)
    assert losses(path, "train") == dict.fromkeys(range(4), 1.0) | {4: 3.0}
    assert {step: record["git_commit"] for step, record in log["run"].items()} == {
        0: "commit 1.0", 4: "commit 3.0"}
    write_log(path, [(0, "run", {})])
    assert read_log(path)["train"] == {} and losses(path, "val") == {0: 1.0}


@pytest.mark.parametrize("line", [
    b"not json", b"", b"[]", b"7", b"null", b'{"step": 1}', b'{"kind": "val"}',
    b'{"step": Infinity, "kind": "val"}', b'{"step": null, "kind": "val"}',
    b'{"step": "one", "kind": "val"}',
    b'{"step": 1, "kind": "' + b"\xff" * 1000, b"\0\0\0\0\0\0", b"\xff\xfe" * 1000, b"[" * 100_000])
def test_damaged_line_is_reported_with_its_number(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "kind": "val", "loss": 1.0}\n' + line + b"\n")
    message = user_error(read_log, path)
    assert f"{path} line 2 is no record, delete it" in message and len(message) < 500


def test_partial_last_line_is_ignored(tmp_path):
    path = write_log(tmp_path / "log.jsonl", [(0, "val", {"loss": 1.0})])
    path.write_bytes(path.read_bytes() + '{"step": 1, "kind": "é'.encode()[:-1])
    assert losses(path, "val") == {0: 1.0}


@pytest.mark.slow
def test_plot_loss_draws_several_logs(tmp_path):
    path = write_log(tmp_path / "a" / "metrics.jsonl", [
        *((step, "train", {"loss": 5.0 - step}) for step in range(5)), (5, "val", {"loss": 0.5})])
    run_script(ROOT / "image" / "plot_loss.py", path, path, "--out", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_plot_loss_writes_beside_the_run_it_draws(tmp_path, monkeypatch, capsys):
    log = write_log(tmp_path / "a" / "metrics.jsonl", [(0, "train", {"loss": 5.0})])
    for given in (log, tmp_path / "a"):
        monkeypatch.setattr("sys.argv", ["plot_loss.py", str(given)])
        main()
        assert capsys.readouterr().out == f"wrote {tmp_path / 'a' / 'loss.png'}\n"
        (tmp_path / "a" / "loss.png").unlink()


def test_plot_loss_rejects_missing_and_damaged_logs(tmp_path, monkeypatch, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text("not json\n")
    for logs, word in (([], "no run log"), ([path], "line 1"), ([tmp_path / "no"], "No such file")):
        assert word in main_error(main, [*logs, "--out", tmp_path / "x.png"], monkeypatch, capsys)
    assert not (tmp_path / "x.png").exists()
