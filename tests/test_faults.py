"""Signals, ranks that die, losses that are no numbers, full disks and memories: one line each, no
run that hangs, and nothing lost."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.common import (
    CPU_LAUNCH,
    ROOT,
    assert_user_error,
    make_corpus,
    run_script,
    script_env,
    user_error,
)
from helpers.ranks import Ranks, free_port, wait_until
from helpers.training import (
    SCRIPT,
    assert_same_run,
    curves,
    flags,
    interrupted,
    losses,
    tiny,
    trace,
)

import model
from minigpt2 import faults
from minigpt2.checkpoint import list_checkpoints, load_model, load_training_state
from minigpt2.faults import StopRequest, count_skipped
from minigpt2.metrics import read_log
from minigpt2.optimizer import SCHEDULES, is_block_matrix
from trainer import train


def long(corpus, out_dir, **changes):
    """Sixty updates, of which only the last is a checkpoint by itself."""
    return tiny(corpus, out_dir, **{"max_steps": 60, "save_interval": 1000, "eval_interval": 1000,
                                    "micro_batch_size": 2, "sample_steps": 0, "resume": True}
                | changes)


def records(out_dir) -> int:
    """How many whole lines the run log has."""
    path = out_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def assert_one_line(text: str, *words: str) -> None:
    errors = [line for line in text.splitlines() if "error:" in line]
    assert len(errors) == 1 and "Traceback" not in text, text
    assert all(word in errors[0] for word in words), errors[0]


# --------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_to_one_of_two_ranks_saves_and_ends_both_with_0(corpus, tmp_path, name):
    ranks = Ranks(2, "trainer", flags(long(corpus, tmp_path / "out")), tmp_path / "output")
    wait_until(lambda: records(tmp_path / "out") > 5, ranks)
    ranks.kill(1, number=getattr(signal, name))
    assert ranks.wait() == [0, 0], ranks.output()
    folder, = list_checkpoints(tmp_path / "out")
    assert 4 <= load_training_state(folder)["progress"]["step"] < 60
    assert str(folder) in ranks.output() and "--resume" in ranks.output()
    again = Ranks(2, "trainer", flags(long(corpus, tmp_path / "out")), tmp_path / "again")
    assert again.wait() == [0, 0], again.output()
    whole = Ranks(2, "trainer", flags(long(corpus, tmp_path / "whole")), tmp_path / "undisturbed")
    assert whole.wait() == [0, 0]
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_a_signal_where_an_evaluation_was_due_leaves_it_to_the_resumed_run(corpus, tmp_path,
                                                                           monkeypatch):
    changes = {"eval_interval": 1, "max_steps": 6}
    train(long(corpus, tmp_path / "whole", **changes), CPU_LAUNCH)
    for _ in range(9):  # an update at a time: each but the last is stopped by a signal
        with monkeypatch.context() as patch:
            patch.setattr("trainer.set_lr", lambda optimizer, lr: (
                faults_set_lr(optimizer, lr), os.kill(os.getpid(), signal.SIGTERM)))
            with StopRequest() as stop:
                train(long(corpus, tmp_path / "out", keep_last=0, **changes), CPU_LAUNCH, stop)
    assert len(list_checkpoints(tmp_path / "out")) == 6
    assert (tmp_path / "out" / "pretrain_loss.png").exists()
    assert curves(tmp_path / "out") == curves(tmp_path / "whole")
    final = [load_model(tmp_path / name).lm_head.weight for name in ("out", "whole")]
    assert torch.equal(*final)


def test_a_signal_during_a_validation_does_not_wait_for_its_end(corpus, tmp_path):
    """Two ranks with shares of 12,500 windows each; torchrun and SLURM send to all."""
    big = make_corpus(tmp_path / "big", [400_000, 3000], high=50)
    config = long(big, tmp_path / "out", eval_interval=20, micro_batch_size=1)
    ranks = Ranks(2, "trainer", flags(config), tmp_path / "output", mark_evaluations=tmp_path)
    wait_until(lambda: all((tmp_path / f"evaluation_{rank}").exists() for rank in (0, 1)), ranks)
    ranks.kill(number=signal.SIGTERM)
    assert ranks.wait(60) == [0, 0], ranks.output()
    assert "val" not in read_log(tmp_path / "out" / "metrics.jsonl")
    progress = load_training_state(list_checkpoints(tmp_path / "out")[-1])["progress"]
    assert progress["step"] == 0 and progress["val_loss"] is None


def faults_set_lr(optimizer, lr):
    from minigpt2.optimizer import set_lr
    set_lr(optimizer, lr)


def test_handlers_are_put_back_and_a_second_ctrl_c_ends_at_once(monkeypatch):
    before = {name: signal.getsignal(getattr(signal, name)) for name in faults.STOP_SIGNALS}
    now = [100.0]
    monkeypatch.setattr("minigpt2.faults.time.monotonic", lambda: now[0])
    with StopRequest() as stop:
        assert not stop.requested() and stop.flag(torch.device("cpu")) == 0
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 1  # torchrun hands on what the terminal has sent already
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested() and stop.flag(torch.device("cpu")) == 1 and stop.name == "SIGINT"
        now[0] += 9
        os.kill(os.getpid(), signal.SIGTERM)  # patient: it may come more than once
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert before == {name: signal.getsignal(getattr(signal, name)) for name in before}


# -------------------------------------------------------------------------------- torchrun


def torchrun(*arguments, namespace: str | None = None, **environment) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    if namespace:
        command = ["ip", "netns", "exec", namespace, *command]
    return subprocess.Popen(command, cwd=ROOT, env=script_env() | environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def workers(agent: subprocess.Popen) -> list[int]:
    """Process ids of the ranks that a torchrun has started, by rank."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        rank = environ_of(pid).get(b"RANK")
        if rank is not None and parent_of(pid) == agent.pid:
            found[int(rank)] = int(pid)
    return [found[rank] for rank in sorted(found)]


def environ_of(pid: str) -> dict[bytes, bytes]:
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it ended meanwhile
        return {}
    return dict(item.split(b"=", 1) for item in content.split(b"\0") if b"=" in item)


def parent_of(pid: str | int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def test_sigterm_to_a_worker_of_torchrun_is_a_success(corpus, tmp_path):
    agent = torchrun("--standalone", "--nproc-per-node=2", SCRIPT,
                     *flags(long(corpus, tmp_path / "out", max_steps=5000)))
    wait_until(lambda: records(tmp_path / "out") > 3)
    os.kill(workers(agent)[1], signal.SIGTERM)
    output, _ = agent.communicate(timeout=60)
    assert agent.returncode == 0, output
    assert len(list_checkpoints(tmp_path / "out")) == 1 and "--resume" in output


def test_sigterm_to_torchrun_saves_on_all_ranks(corpus, tmp_path):
    """torchrun hands the signal on, waits, and ends with an error of its own."""
    agent = torchrun("--standalone", "--nproc-per-node=2", SCRIPT,
                     *flags(long(corpus, tmp_path / "out", max_steps=5000)))
    wait_until(lambda: records(tmp_path / "out") > 3)
    agent.terminate()
    output, _ = agent.communicate(timeout=60)
    assert "SIGTERM: stopped after" in output
    folder, = list_checkpoints(tmp_path / "out")
    assert load_training_state(folder)["progress"]["step"] < 5000


def test_max_restarts_goes_on_after_a_rank_was_killed(corpus, tmp_path):
    config = long(corpus, tmp_path / "out", save_interval=5)
    agent = torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=2", SCRIPT,
                     *flags(config))
    wait_until(lambda: len(list_checkpoints(tmp_path / "out")) > 1)
    os.kill(workers(agent)[1], signal.SIGKILL)
    output, _ = agent.communicate(timeout=120)
    assert agent.returncode == 0, output
    starts = read_log(tmp_path / "out" / "metrics.jsonl")["run"]
    assert len(starts) == 2 and max(starts) > 0
    whole = dataclasses.replace(config, out_dir=str(tmp_path / "whole"))
    assert Ranks(2, "trainer", flags(whole), tmp_path / "output").wait() == [0, 0]
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def two_nodes(config, endpoint: str, namespaces=(None, None), restarts: int = 0, **environment):
    """Two torchruns that know each other only by a rendezvous address, one rank each."""
    return [torchrun("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=7",
                     f"--max-restarts={restarts}",
                     f"--rdzv-endpoint={endpoint}", f"--rdzv-conf=is_host={int(node == 0)}",
                     *([f"--local-addr=10.77.0.{node + 1}"] if namespaces[node] else []),
                     SCRIPT, *flags(config), namespace=namespaces[node], **environment)
            for node in (0, 1)]


def assert_two_nodes_train_like_one(corpus, tmp_path, *arguments, **options) -> None:
    config = tiny(corpus, tmp_path / "two", micro_batch_size=2)
    agents = two_nodes(config, *arguments, **options)
    outputs = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    train(tiny(corpus, tmp_path / "one", micro_batch_size=2), CPU_LAUNCH)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    logs = [read_log(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert logs[0]["val"][10]["loss"] == pytest.approx(logs[1]["val"][10]["loss"], abs=1e-5)


def test_two_nodes_train_to_the_losses_of_one_process(corpus, tmp_path):
    assert_two_nodes_train_like_one(corpus, tmp_path, f"127.0.0.1:{free_port()}")


@pytest.mark.parametrize("node", [0, 1])
def test_two_nodes_start_again_when_the_rank_of_one_was_killed(corpus, tmp_path, node):
    """The two torchruns count restarts differently: the other one did not fail."""
    config = long(corpus, tmp_path / "out", save_interval=5, max_steps=100)
    agents = two_nodes(config, f"127.0.0.1:{free_port()}", restarts=2)
    wait_until(lambda: len(list_checkpoints(tmp_path / "out")) > 1)
    os.kill(*workers(agents[node]), signal.SIGKILL)
    outputs = [agent.communicate(timeout=100)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert sorted(read_log(tmp_path / "out" / "metrics.jsonl")["train"]) == list(range(100))


@pytest.fixture
def namespaces():
    """Two hosts on one machine, a cable between them: 10.77.0.1 and 10.77.0.2."""
    names, commands = ("minigpt2a", "minigpt2b"), []
    for name in names:
        commands += [f"ip netns add {name}", f"ip -n {name} link set lo up"]
    commands += [f"ip link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}"]
    for i, name in enumerate(names):
        commands += [f"ip -n {name} addr add 10.77.0.{i + 1}/24 dev veth0",
                     f"ip -n {name} link set veth0 up"]
    try:
        for command in commands:
            try:
                subprocess.run(command.split(), check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces here: {command}: {error}")
        yield names
    finally:
        if shutil.which("ip"):
            for name in names:
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_hosts_with_a_network_between_them(corpus, tmp_path, namespaces):
    assert_two_nodes_train_like_one(corpus, tmp_path, f"10.77.0.1:{free_port()}",
                                    namespaces=namespaces, GLOO_SOCKET_IFNAME="veth0")


@pytest.mark.parametrize("node", [0, 1])
def test_killing_the_torchrun_of_one_node_ends_the_other(corpus, tmp_path, node):
    """Node 0 hosts the rendezvous: of its loss torchrun itself speaks first. The killed torchrun
    leaves its rank behind, which must not train on as an orphan."""
    config = long(corpus, tmp_path / "out", max_steps=100_000)
    agents = two_nodes(config, f"127.0.0.1:{free_port()}")
    wait_until(lambda: records(tmp_path / "out") > 3)
    orphan, = workers(agents[node])
    begun = time.monotonic()
    agents[node].kill()
    output, _ = agents[1 - node].communicate(timeout=60)
    assert agents[1 - node].returncode != 0 and time.monotonic() - begun < 60
    assert ("trainer.py: error: " in output and "--resume" in output) or (
        node == 0 and "The connection to the C10d store has failed" in output), output
    wait_until(lambda: not os.path.exists(f"/proc/{orphan}"))
    agents[node].stdout.close()


def test_the_slurm_script_saves_and_succeeds_when_its_time_is_up(corpus, tmp_path):
    """With stand-ins for SLURM's two commands, and SIGUSR1 to every process of the step."""
    commands = {"scontrol": "echo localhost", "srun": 'exec setsid "$@"',
                "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"'}
    for name, line in commands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    config = dataclasses.replace(long(corpus, tmp_path / "out", max_steps=5000), resume=False)
    job = subprocess.Popen(
        ["bash", "runs/slurm.sh", *flags(config)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=script_env() | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "localhost",
            "SLURM_JOB_ID": "42", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"})
    wait_until(lambda: records(tmp_path / "out") > 3)
    ranks = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and environ_of(pid).get(
        b"TORCHELASTIC_RUN_ID") == b"42"]
    assert len(ranks) == 2
    for pid in (parent_of(ranks[0]), *ranks):  # torchrun and what it started
        os.kill(pid, signal.SIGUSR1)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    assert "SIGUSR1: stopped after" in output and len(list_checkpoints(tmp_path / "out")) == 1


# -------------------------------------------------------------------------- ranks that are gone


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_takes_the_others_with_it(corpus, tmp_path, killed):
    config = long(corpus, tmp_path / "out", max_steps=100_000)
    ranks = Ranks(2, "trainer", flags(config), tmp_path / "output")
    wait_until(lambda: records(tmp_path / "out") > 3, ranks)
    ranks.kill(killed)
    codes = ranks.wait(60)
    assert codes[killed] == -9 and codes[1 - killed] in (1, 2)
    assert_one_line(ranks.output(1 - killed), "--resume")


def test_a_rank_that_hangs_is_noticed(corpus, tmp_path):
    """Stopped, not killed: its connections stay open, and a collective would wait half an hour."""
    config = long(corpus, tmp_path / "out", max_steps=100_000)
    ranks = Ranks(2, "trainer", flags(config), tmp_path / "output", silent_seconds=3.0)
    wait_until(lambda: records(tmp_path / "out") > 3, ranks)
    ranks.kill(1, number=signal.SIGSTOP)
    ranks.processes[0].join(60)
    assert ranks.processes[0].exitcode == 1
    assert_one_line(ranks.output(), "rank 1 is lost", "--resume")
    ranks.kill()
    ranks.wait()


def test_a_rank_that_is_done_waits_for_one_that_is_not(corpus, tmp_path):
    """Rank 0 draws for longer than a rank may be silent; a signal meanwhile changes nothing."""
    ranks = Ranks(2, "trainer", flags(tiny(corpus, tmp_path / "out", micro_batch_size=2)),
                  tmp_path / "output", silent_seconds=2.0, slow_graph=5.0)
    wait_until(lambda: (tmp_path / "out" / "step_000010").exists(), ranks)
    ranks.kill(number=signal.SIGTERM)
    assert ranks.wait(60) == [0, 0], ranks.output()
    assert "finished 10 steps" in ranks.output()


def test_a_job_that_was_suspended_goes_on(corpus, tmp_path):
    """All ranks slept together: that none has heard of another is no wonder."""
    config = long(corpus, tmp_path / "out", max_steps=100_000)
    ranks = Ranks(2, "trainer", flags(config), tmp_path / "output", silent_seconds=3.0)
    wait_until(lambda: records(tmp_path / "out") > 3, ranks)
    time.sleep(2)  # the watches have looked
    ranks.kill(number=signal.SIGSTOP)
    time.sleep(7)
    ranks.kill(number=signal.SIGCONT)
    size = records(tmp_path / "out")
    wait_until(lambda: records(tmp_path / "out") > size + 50, ranks)
    ranks.kill(number=signal.SIGTERM)
    assert ranks.wait() == [0, 0], ranks.output()


def test_the_error_of_one_rank_is_said_by_rank_0(corpus, tmp_path):
    config = long(corpus, tmp_path / "out")
    ranks = Ranks(2, "trainer", flags(config), tmp_path / "output",
                  also={1: ["--data-dir", str(tmp_path / "nowhere")]})
    codes = ranks.wait(60)
    assert codes == [2, 2]
    assert_one_line(ranks.output(0), "nowhere")


def test_memory_that_is_out_on_one_rank_is_said_by_rank_0_with_the_flag(corpus, tmp_path):
    ranks = Ranks(2, "trainer", flags(long(corpus, tmp_path / "out")), tmp_path / "output",
                  out_of_memory=1)
    codes = ranks.wait(60)
    assert codes == [2, 2]
    text = ranks.output(0) + ranks.output(1)
    assert "--micro-batch-size auto" in text and "Traceback" not in text


def test_an_orphan_of_a_single_rank_ends_too(corpus, tmp_path):
    """No other rank would notice: torchrun with one process, killed."""
    agent = torchrun("--standalone", "--nproc-per-node=1", SCRIPT,
                     *flags(long(corpus, tmp_path / "out", max_steps=100_000)))
    wait_until(lambda: records(tmp_path / "out") > 3)
    orphan, = workers(agent)
    agent.kill()
    wait_until(lambda: not os.path.exists(f"/proc/{orphan}"), seconds=20)
    assert "was killed" in agent.communicate(timeout=20)[0]


def test_a_second_run_in_the_same_folder_is_refused(corpus, tmp_path):
    config = long(corpus, tmp_path / "out", max_steps=100_000)
    ranks = Ranks(1, "trainer", flags(config), tmp_path / "output")
    wait_until(lambda: records(tmp_path / "out") > 3, ranks)
    assert "another process is writing" in user_error(train, config, CPU_LAUNCH)
    ranks.kill(number=signal.SIGTERM)
    assert ranks.wait() == [0], ranks.output()


def test_ctrl_c_in_a_pipe_saves_though_the_reader_is_gone(corpus, tmp_path):
    config = long(corpus, tmp_path / "out", max_steps=100_000)
    process = subprocess.Popen([sys.executable, SCRIPT, *flags(config)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=script_env())
    wait_until(lambda: records(tmp_path / "out") > 3)
    process.stdout.close()  # `| tee log` has got its Ctrl-C, too
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert len(list_checkpoints(tmp_path / "out")) == 1


@pytest.mark.parametrize("flag, words", [
    (["--max-lr", "0.5"], ["max_lr differs: 0.01 on rank 0, 0.5 on rank 1"]),
    (["--data-dir", "other"], ["data_sha256 differs"])])
def test_ranks_that_were_started_differently_are_told_so(corpus, tmp_path, flag, words):
    other = shutil.copytree(corpus, tmp_path / "other")
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text().replace("{", '{"name": "other",', 1))
    ranks = Ranks(2, "trainer", flags(long(corpus, tmp_path / "out")), tmp_path / "output",
                  also={1: [str(other) if word == "other" else word for word in flag]})
    assert ranks.wait(60) == [2, 2], ranks.output()
    assert_one_line(ranks.output(0), *words)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------- not a number


def test_a_loss_that_is_no_number_on_one_rank_skips_the_update_on_both(corpus, tmp_path):
    """Updates 4 and 8 (of two micro-steps each) of rank 1 are poisoned; nothing of them is left."""
    config = tiny(corpus, tmp_path / "out", micro_batch_size=2, keep_last=0, save_interval=1)
    ranks = Ranks(2, "trainer", flags(config), tmp_path / "output", poison={1: [9, 16]})
    assert ranks.wait() == [0, 0], ranks.output()
    log = read_log(tmp_path / "out" / "metrics.jsonl")["train"]
    assert [step for step, record in log.items() if record.get("skipped")] == [4, 8]
    assert log[4]["loss"] is None and log[4]["grad_norm"] is None and log[5]["loss"] > 0
    models = {step: load_model(tmp_path / "out" / f"step_{step:06d}") for step in range(1, 11)}
    for step in range(1, 10):
        same = torch.equal(models[step].lm_head.weight, models[step + 1].lm_head.weight)
        assert same == (step in (4, 8))
    assert "step 4 skipped" in ranks.output()
    assert load_training_state(tmp_path / "out" / "step_000005")["progress"]["skipped"] == 1


def test_three_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(corpus, tmp_path):
    config = tiny(corpus, tmp_path / "out", micro_batch_size=2, save_interval=3)
    ranks = Ranks(2, "trainer", flags(config), tmp_path / "output", poison={0: [10, 12, 14]})
    assert ranks.wait() == [2, 2]
    assert_one_line(ranks.output(), "diverged", "--max-lr", "before them is", "step_000003")
    log = read_log(tmp_path / "out" / "metrics.jsonl")["train"]
    assert [step for step, record in log.items() if record.get("skipped")] == [5, 6]
    assert all(p.isfinite().all() for p in load_model(tmp_path / "out").parameters())


def test_a_streak_is_counted_across_a_restart(corpus, tmp_path, monkeypatch):
    real, poisoned = model.linear_cross_entropy, []
    monkeypatch.setattr(model, "linear_cross_entropy", lambda *arguments: real(*arguments) * (
        float("nan") if poisoned and torch.is_grad_enabled() else 1.0))
    config = tiny(corpus, tmp_path / "out", save_interval=1)
    with monkeypatch.context() as patch:
        schedule = lambda step, **options: (  # noqa: E731
            poisoned.append(1) if step == 4 else None, 1e-3)[1]
        patch.setitem(SCHEDULES, "cosine", schedule)
        patch.setattr("trainer.set_lr", lambda optimizer, lr: (
            faults_set_lr(optimizer, lr),
            len(poisoned) and os.kill(os.getpid(), signal.SIGTERM)))
        with StopRequest() as stop:
            train(config, CPU_LAUNCH, stop)
    assert load_training_state(tmp_path / "out" / "step_000005")["progress"]["skipped"] == 1
    message = user_error(train, dataclasses.replace(config, resume=True), CPU_LAUNCH)
    assert "3 consecutive steps" in message
    assert max(read_log(tmp_path / "out" / "metrics.jsonl")["train"]) == 5


def test_the_scalers_search_for_its_scale_is_no_fault(corpus, tmp_path, monkeypatch):
    """Begun 2**30 too high, float16 overflows again and again, each time at half the scale."""
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: real(
        device, init_scale=2.0**36, enabled=enabled))
    train(tiny(corpus, tmp_path / "out", dtype="float16", max_steps=24, save_interval=24,
               eval_interval=24), CPU_LAUNCH)
    norms = [norm for norm, in trace(tmp_path / "out", "grad_norm")]
    assert norms[:5] == [None] * 5 and None not in norms[-3:]

    class Scaler:
        def __init__(self, scale):
            self.scale = scale

        def is_enabled(self):
            return True

        def get_scale(self):
            return self.scale

    infinity = float("inf")
    assert count_skipped(2, 9, 4.0, infinity, Scaler(1.0), tmp_path) == 2
    assert "diverged" in user_error(count_skipped, 2, 9, 4.0, infinity, Scaler(0.5), tmp_path)
    assert "diverged" in user_error(count_skipped, 2, 9, infinity, 1.0, Scaler(1.0), tmp_path)


# ------------------------------------------------------------------- full disks and memories


def resumable(corpus, out_dir):
    """A run of 10 updates that was stopped after 5, and its configuration."""
    whole = out_dir.parent / "whole"
    train(tiny(corpus, whole), CPU_LAUNCH)
    interrupted(whole, out_dir, 5)
    return tiny(corpus, out_dir, resume=True)


def assert_only_the_first_checkpoint(out_dir, whole) -> None:
    assert [folder.name for folder in list_checkpoints(out_dir)] == ["step_000005"]
    assert load_training_state(list_checkpoints(out_dir)[0])["progress"]["step"] == 5
    load_model(out_dir)
    assert (out_dir / "metrics.jsonl").read_bytes().endswith(b"}\n")
    assert curves(out_dir)["train"].keys() <= curves(whole)["train"].keys()


@pytest.mark.parametrize("kilobytes", [12, 4000])  # the log's next line; the optimizer's state
def test_a_file_size_limit_leaves_checkpoint_and_log_whole(corpus, tmp_path, kilobytes):
    config = resumable(corpus, tmp_path / "out")
    log = tmp_path / "out" / "metrics.jsonl"
    whole = log.read_text().rpartition("\n")[0]
    log.write_text("\n".join([whole, *['{"step": 1, "kind": "note"}'] * 280]) + "\n")  # 11 KB
    assert 10_000 < log.stat().st_size < 12_000
    command = ["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "-", sys.executable, str(SCRIPT),
               *flags(config)]
    result = subprocess.run(command, env=script_env(), text=True, capture_output=True, cwd=ROOT)
    assert_user_error(result, "step_000010" if kilobytes > 12 else "metrics.jsonl")
    assert_only_the_first_checkpoint(tmp_path / "out", tmp_path / "whole")
    train(config, CPU_LAUNCH)  # there is room again
    assert_same_run(tmp_path / "out", tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 16 MB: room for one checkpoint of 10 MB and a little."""
    mount = tmp_path / "disk"
    mount.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", mount], check=True,
                       capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted here: {error}")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def test_a_full_disk_leaves_checkpoint_and_log_whole(corpus, tmp_path, small_disk):
    config = resumable(corpus, tmp_path / "out")
    shutil.copytree(tmp_path / "out", small_disk / "out")
    on_disk = dataclasses.replace(config, out_dir=str(small_disk / "out"))
    result = run_script(SCRIPT, *flags(on_disk), check=False)
    assert_user_error(result, "step_000010", "disk full")
    assert_only_the_first_checkpoint(small_disk / "out", tmp_path / "whole")


def test_no_memory_names_the_flag(corpus, tmp_path):
    """A limit of the address space stands in for a full memory: one batch too large for it."""
    config = tiny(corpus, tmp_path / "out", micro_batch_size=2**13, total_batch_size=2**17,
                  max_steps=1, n_embd=256)
    command = ["bash", "-c", 'ulimit -v 3000000; exec "$@"', "-", sys.executable, str(SCRIPT),
               *flags(config)]
    result = subprocess.run(command, env=script_env(), text=True, capture_output=True, cwd=ROOT)
    assert_user_error(result, "out of memory", "--micro-batch-size auto")


def test_auto_finds_a_micro_batch_and_keeps_the_losses(corpus, tmp_path, monkeypatch, capsys):
    train(tiny(corpus, tmp_path / "whole"), CPU_LAUNCH)
    real = model.linear_cross_entropy

    def limited(x, weight, targets):
        if len(targets) > 4 * 16:
            raise torch.OutOfMemoryError("out of memory")
        return real(x, weight, targets)

    monkeypatch.setattr(model, "linear_cross_entropy", limited)
    capsys.readouterr()
    train(tiny(corpus, tmp_path / "auto", micro_batch_size="auto"), CPU_LAUNCH)
    assert "2 micro-steps x 4 x 16" in capsys.readouterr().out
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)


# ---------------------------------------------------------------------- the sharded optimizer


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_sharded_optimizer_gives_the_same_run_from_half_the_memory(optimizer, corpus, tmp_path):
    """Also resumed, at one rank and at two, from checkpoints of the one format that there is."""
    plain = tiny(corpus, tmp_path / "plain", micro_batch_size=2, keep_last=0,
                 optimizer=optimizer)
    sharded = dataclasses.replace(plain, out_dir=str(tmp_path / "sharded"), shard_optimizer=True)
    held = []
    for config in (plain, sharded):
        output = tmp_path / f"output_{config.shard_optimizer}"
        ranks = Ranks(2, "trainer", flags(config), output, note_moments=output)
        assert ranks.wait() == [0, 0], ranks.output()
        held.append([int((output / f"moments_{rank}.txt").read_text()) for rank in (0, 1)])
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
    assert_same_run(tmp_path / "sharded", tmp_path / "plain")
    total = sum((4 if optimizer == "muon" and is_block_matrix(name, p) else 8) * p.numel()
                for name, p in load_model(tmp_path / "plain").named_parameters())
    assert held[0] == [total, total] and sum(held[1]) == total and min(held[1]) > 0

    for name, world_size, shard in (("one", 1, False), ("two", 2, True)):
        interrupted(tmp_path / "sharded", tmp_path / name, 5)
        config = dataclasses.replace(plain, out_dir=str(tmp_path / name), resume=True,
                                     shard_optimizer=shard)
        ranks = Ranks(world_size, "trainer", flags(config), tmp_path / f"{name}_output")
        assert ranks.wait() == [0] * world_size, ranks.output()
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
    assert_same_run(tmp_path / "two", tmp_path / "plain")


def test_deterministic_refuses_nothing_on_a_cpu_and_changes_nothing(corpus, tmp_path):
    for name in ("plain", "strict"):
        config = tiny(corpus, tmp_path / name, deterministic=name == "strict")
        run_script(SCRIPT, *flags(config))
    assert curves(tmp_path / "strict") == curves(tmp_path / "plain")
