import json

import pytest
import torch
from conftest import ROOT, assert_user_error, run_script, user_error
from matplotlib.axes import Axes

from metrics import RunLog, check_image, draw_loss_graph, flops_per_token, peak_flops, read_log
from model import GPT, GPTConfig


def test_flops_of_gpt2_by_hand():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    # embedding and head 50257 x 768, a block 12 x 768^2 + 13 x 768, a final LayerNorm 2 x 768
    multiplied = 50257 * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    assert multiplied == 123_653_376
    assert flops_per_token(model, 1024) == 6 * multiplied + 12 * 12 * 768 * 1024 == 855_166_464


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("Tesla V100-SXM2-16GB", 125e12), ("NVIDIA A10G", 70e12),
    ("NVIDIA A10", 125e12), ("NVIDIA GeForce RTX 4090", 165.2e12), ("NVIDIA L40S", 362e12),
    ("NVIDIA GeForce GTX 1080", None), ("NVIDIA A1000 Laptop GPU", None)])
def test_peak_is_the_cards_or_unknown(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_log_is_appended_and_a_torn_line_is_cut_off(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    log = RunLog(path)
    log.write(0, "val", loss=10.5)
    log.write(0, "train", loss=10.25, lr=1e-4)
    log.close()
    with open(path, "ab") as file:
        file.write(b'{"step": 1, "kind": "tra')  # killed while it wrote
    log = RunLog(path)
    log.write(1, "train", loss=9.5)
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 0, "kind": "val", "loss": 10.5},
                     {"step": 0, "kind": "train", "loss": 10.25, "lr": 1e-4},
                     {"step": 1, "kind": "train", "loss": 9.5}]


def test_numbers_that_json_has_not_become_null(tmp_path):
    log = RunLog(tmp_path / "metrics.jsonl")
    log.write(0, "train", loss=float("nan"), grad_norm=float("inf"), lr=0.5)
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 0, "kind": "train", "loss": None, "grad_norm": None, "lr": 0.5}


def test_the_graph_shows_what_was_logged(tmp_path, monkeypatch):
    drawn, real = {}, Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, xs, ys, label, **style: drawn.update(
        {label: (list(xs), list(ys))}) or real(axes, xs, ys, label=label, **style))
    for name in ("a", "b$_$"):
        log = RunLog(tmp_path / name / "metrics.jsonl")
        for step in range(3):
            log.write(step, "train", loss=5.0 - step)
        log.write(1, "train", loss=None)
        log.write(2, "val", loss=0.5)
        log.close()
    runs = [(name, tmp_path / name / "metrics.jsonl") for name in ("a", "b$_$")]
    draw_loss_graph(runs, tmp_path / "x.png", r"$\frac{$")
    assert drawn["a train"] == ([0, 2], [5.0, 3.0]) and drawn["a val"] == ([2], [0.5])
    assert set(drawn) == {"a train", "a val", r"b\$_\$ train", r"b\$_\$ val"}
    (tmp_path / "empty.jsonl").touch()
    message = user_error(draw_loss_graph, [("", tmp_path / "empty.jsonl")], tmp_path / "y.png", "")
    assert "empty.jsonl" in message and not (tmp_path / "y.png").exists()


def test_an_image_that_cannot_be_written_is_said_at_once(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for name in ("metrics.jsonl", "file/x.png", "folder.png"):
        assert str(tmp_path / name) in user_error(check_image, tmp_path / name)
    check_image(tmp_path / "new" / "deep" / "x.png")
    assert not (tmp_path / "new").exists()


def test_the_later_record_of_a_step_wins(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = RunLog(path)
    for step, loss in [(0, 3.0), (1, 2.0), (2, 1.0), (1, 2.5), (2, 1.5)]:  # resumed at step 1
        log.write(step, "train", loss=loss)
    log.close()
    assert {s: r["loss"] for s, r in read_log(path)["train"].items()} == {0: 3.0, 1: 2.5, 2: 1.5}


def test_plot_loss_draws_committed_logs(tmp_path):
    path = tmp_path / "a" / "metrics.jsonl"
    log = RunLog(path)
    for step in range(5):
        log.write(step, "train", loss=5.0 - step)
    log.write(5, "val", loss=0.5)
    log.close()
    for logs in ([path], [path, path]):
        run_script(ROOT / "image" / "plot_loss.py", *logs, "--out", tmp_path / "x.png")
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "x.png").unlink()
    path.write_text("not json\n")
    assert "line 1" in user_error(read_log, path)
    for arguments in ([], [path], [tmp_path / "none.jsonl"]):
        result = run_script(ROOT / "image" / "plot_loss.py", *arguments, "--out",
                            tmp_path / "x.png", check=False)
        assert_user_error(result)
    assert not (tmp_path / "x.png").exists()
