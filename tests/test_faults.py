"""Fault tolerance: signals, lost ranks, non-finite losses, full disks, out of memory. Each ends in
one line; no rank hangs and no step is lost."""

import contextlib
import dataclasses
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.common import CPU_LAUNCH, ROOT, main_error, make_corpus, script_env, user_error
from helpers.ranks import NO_WAIT, Ranks, free_port, wait_until
from helpers.training import (
    SCRIPT,
    assert_same_model,
    assert_same_run,
    curves,
    final_state,
    flags,
    interrupted,
    losses,
    num_records,
    signal_at_the_end_of_a_step,
    tiny,
    trace,
)

import model
from minigpt2 import faults
from minigpt2.checkpoint import find_checkpoint, list_checkpoints, load_model, load_training_state
from minigpt2.distributed import Launch
from minigpt2.faults import StopRequest, count_skipped
from minigpt2.metrics import read_log
from minigpt2.optimizer import is_block_matrix, step_if_finite
from minigpt2.run import Run
from trainer import train

ONE_STEP_LATE = {"minigpt2.run.STEPS_LATE": {"cpu": 1}}  # numbers are read as on a GPU
HELD_SCRIPT = ROOT / "tests" / "helpers" / "held_trainer.py"


def long(corpus, out_dir, **changes):
    """A run that saves only after its last step, which no test waits for."""
    return tiny(corpus, out_dir, **{"max_steps": 100_000, "save_interval": 10**6, "resume": True,
                                    "eval_interval": 10**6, "micro_batch_size": 2} | changes)


def assert_one_line(text: str, *words: str) -> None:
    """Exactly one error line of our script, with these words. PyTorch's C++ code may print warnings
    of its own when a rank is lost."""
    errors = [line for line in text.splitlines() if "trainer.py: error: " in line]
    assert len(errors) == 1 and "Traceback" not in text, text
    assert all(word in errors[0] for word in words), errors[0]


# --------------------------------------------------------------------------------- signals


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_and_stops_both(corpus, tmp_path):
    """Three times, by three signals; the run resumed each time equals an uninterrupted one. Which
    micro-step comes first, in the held step or the next, is left to chance."""
    whole, out = (tiny(corpus, tmp_path / name, max_steps=12, save_interval=1000, resume=True,
                       eval_interval=1000, micro_batch_size=2) for name in ("whole", "out"))
    ranks = Ranks(2, "trainer", flags(whole), tmp_path / "uninterrupted")
    assert ranks.wait() == [0, 0], ranks.output()
    done = 0
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        released = tmp_path / name
        ranks = Ranks(2, "trainer", flags(out), tmp_path / f"ranks_{name}", hold=(2, released))
        wait_until(lambda: len(losses_so_far(tmp_path / "out")) == done + 2, ranks)  # noqa: B023
        ranks.kill(1, number=getattr(signal, name))
        released.touch()
        assert ranks.wait() == [0, 0], ranks.output()
        folder = list_checkpoints(tmp_path / "out")[-1]
        before, done = done, load_training_state(folder)["progress"]["step"]
        assert done - before in (2, 3, 4)  # before or after the held step, or one step later
        assert str(folder) in ranks.output() and "--resume" in ranks.output()
    ranks = Ranks(2, "trainer", flags(out), tmp_path / "last")
    assert ranks.wait() == [0, 0], ranks.output()
    assert_same_run(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_after_a_micro_step(corpus, tmp_path):
    """Rank 0 is held in a micro-step that is not its last while rank 1, which got the signal, has
    already left the step: neither waits for the other. Steps have 32 micro-steps; the second one,
    in which DDP rebuilds its buckets, would be completed."""
    whole, out = (tiny(corpus, tmp_path / name, max_steps=3, save_interval=1000, resume=True,
                       eval_interval=1000, micro_batch_size=1, total_batch_size=1024)
                  for name in ("whole", "out"))
    ranks = Ranks(2, "trainer", flags(whole), tmp_path / "uninterrupted")
    assert ranks.wait() == [0, 0], ranks.output()
    ranks = Ranks(2, "trainer", flags(out), tmp_path / "ranks", signal_in_micro_step={
        "rank": 1, "number": 64 + 5, "held": 64 + 9, "folder": str(tmp_path)})
    assert ranks.wait() == [0, 0], ranks.output()
    assert final_state(tmp_path / "out")["progress"]["step"] == 2
    counts = [int((tmp_path / f"micro_steps_{rank}").read_text()) for rank in (0, 1)]
    assert counts == [64 + 9, 64 + 5]
    assert "a signal to another rank: stopped after 2 of 3 steps" in ranks.output()
    ranks = Ranks(2, "trainer", flags(out), tmp_path / "last")
    assert ranks.wait() == [0, 0], ranks.output()
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def micro_steps_of_ranks(random, store, step: int, signals: dict[int, int]) -> list[int]:
    """Runs the micro-steps of one step on some ranks, in a random order; rank r gets a signal once
    it has run signals[r]. Returns how many each has run; as in DDP, all enter the last or none."""
    module = torch.nn.Identity()
    runs = [SimpleNamespace(
        stop=StopRequest(), launch=Launch(rank, len(signals), torch.device("cpu"), store),
        step=step, first_step=step, updates=[], stopping=False, train_model=module,
        trained=module)
        for rank in signals]
    generators = [Run.micro_steps(run, range(4)) for run in runs]
    counts, unfinished = [0] * len(runs), list(signals)
    while unfinished:
        rank = random.choice(unfinished)
        if counts[rank] >= signals[rank]:
            runs[rank].stop.name = "SIGTERM"
        if next(generators[rank], None) is None:
            unfinished.remove(rank)
        else:
            counts[rank] += 1
    assert len({run.stopping for run in runs}) == 1
    assert len({count == 4 for count in counts}) == 1, counts
    assert runs[0].stopping == (max(counts) < 4)
    return counts


def test_no_rank_enters_its_last_micro_step_if_another_has_stopped():
    """Whatever the order in which three ranks get on, with signals at any time."""
    random, store = Random(0), dist.PrefixStore("a", dist.HashStore())
    found = [micro_steps_of_ranks(random, store, step, {rank: random.randint(0, 6)
                                                        for rank in range(3)})
             for step in range(500)]
    assert sum(max(counts) < 4 for counts in found) > 100
    assert sum(min(counts) == 4 for counts in found) > 20
    assert any(max(counts) - min(counts) == 3 for counts in found)  # nobody waits


@pytest.mark.parametrize("libuv", [False, True])
def test_a_choice_without_a_word_is_none(libuv):
    """Both of PyTorch's stores take the value "" for one that was never set."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=libuv)
    launch = Launch(0, 2, torch.device("cpu"), dist.PrefixStore("x", store))
    choices = ["", "", "go", "stop", "", "go"]
    assert [launch.first_choice("step 1", choice) for choice in choices] == [
        "", "", "go", "go", "go", "go"]
    assert CPU_LAUNCH.first_choice("step 1", "stop") == "stop"


def losses_so_far(out_dir) -> list[float]:
    """The losses logged by a run that may have just started."""
    log = out_dir / "metrics.jsonl"
    return losses(out_dir) if log.exists() and "train" in read_log(log) else []


def test_a_signal_before_a_due_validation_leaves_it_to_the_resumed_run(corpus, tmp_path,
                                                                       monkeypatch):
    changes = {"eval_interval": 1, "max_steps": 4, "save_interval": 1000}
    train(tiny(corpus, tmp_path / "whole", **changes), CPU_LAUNCH)

    for _ in range(6):
        with monkeypatch.context() as patch, StopRequest() as stop:
            signal_at_the_end_of_a_step(patch, stop)
            train(tiny(corpus, tmp_path / "out", keep_last=0, resume=True, **changes), CPU_LAUNCH,
                  stop)
    assert len(list_checkpoints(tmp_path / "out")) == 4
    assert (tmp_path / "out" / "pretrain_loss.png").exists()
    assert curves(tmp_path / "out") == curves(tmp_path / "whole")
    assert_same_model(load_model(tmp_path / "out"), load_model(tmp_path / "whole"))


def test_a_signal_interrupts_a_validation(corpus, tmp_path):
    """Two ranks validate on 12,500 windows each; torchrun and SLURM signal all ranks."""
    big = make_corpus(tmp_path / "big", [400_000, 3000], high=50)
    config = long(big, tmp_path / "out", micro_batch_size=1, eval_tokens=400_000)
    ranks = Ranks(2, "trainer", flags(config), tmp_path / "ranks", mark_validation=tmp_path)
    wait_until(lambda: all((tmp_path / f"validation_{rank}").exists() for rank in (0, 1)), ranks)
    ranks.kill(number=signal.SIGTERM)
    assert ranks.wait() == [0, 0], ranks.output()
    assert "val" not in read_log(tmp_path / "out" / "metrics.jsonl")
    progress = final_state(tmp_path / "out")["progress"]
    assert progress["step"] == 0 and progress["val_loss"] is None


def test_handlers_are_restored_and_a_second_ctrl_c_stops_at_once(monkeypatch):
    before = {name: signal.getsignal(getattr(signal, name)) for name in faults.STOP_SIGNALS}
    now = [100.0]
    monkeypatch.setattr("minigpt2.faults.time.monotonic", lambda: now[0])
    with StopRequest() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 1  # torchrun forwards what the terminal has already sent
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested() and stop.name == "SIGINT"
        now[0] += 9
        os.kill(os.getpid(), signal.SIGTERM)  # may be repeated
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert before == {name: signal.getsignal(getattr(signal, name)) for name in before}


@pytest.mark.slow
def test_ctrl_c_saves_although_the_pipe_is_closed(corpus, tmp_path):
    process = subprocess.Popen([sys.executable, SCRIPT, *flags(long(corpus, tmp_path / "out"))],
                               cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, env=script_env())
    wait_until(lambda: num_records(tmp_path / "out") > 3)
    process.stdout.close()  # Ctrl-C has ended the tee of `| tee log`, too
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 0  # not the 120 of a stream that cannot be flushed at exit
    assert len(list_checkpoints(tmp_path / "out")) == 1


# -------------------------------------------------------------------------------- torchrun


AGENTS: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def no_torchrun_survives():
    """Kills what a failed test left running; ranks end when their torchrun is gone."""
    yield
    while AGENTS:
        agent = AGENTS.pop()
        agent.kill()
        agent.wait()
        agent.stdout.close()


def start_process(command: list[str], **environment) -> subprocess.Popen:
    AGENTS.append(subprocess.Popen(command, cwd=ROOT, env=script_env() | environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    return AGENTS[-1]


def torchrun(*arguments, namespace: str | None = None, **environment) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    return start_process(["ip", "netns", "exec", namespace, *command] if namespace else command,
                         **environment)


def finish(process: subprocess.Popen) -> str:
    """Waits for the process and returns its output."""
    return process.communicate(timeout=120)[0]


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
    except OSError:  # it has ended
        return {}
    return dict(item.split(b"=", 1) for item in content.split(b"\0") if b"=" in item)


def parent_of(pid: str | int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


@pytest.mark.slow
def test_sigterm_to_a_worker_of_torchrun_is_a_success(corpus, tmp_path):
    agent = torchrun("--standalone", "--nproc-per-node=2", SCRIPT,
                     *flags(long(corpus, tmp_path / "out")))
    wait_until(lambda: num_records(tmp_path / "out") > 3)
    os.kill(workers(agent)[1], signal.SIGTERM)
    output = finish(agent)
    assert agent.returncode == 0, output
    assert len(list_checkpoints(tmp_path / "out")) == 1 and "--resume" in output


@pytest.mark.slow
@pytest.mark.parametrize(("end", "status", "error"), [
    ("return", 0, ""), ("raise UserError('no data')", 2, "-c: error: no data\n"),
    ("raise RuntimeError('x')", 1, "RuntimeError: x\n")])
def test_a_rank_can_exit_while_a_thread_is_in_pytorch(end, status, error):
    """As gloo's threads are when they free the tensors of the last collective. They outlive the
    process group, and Python's own exit would abort the process: "terminate called"."""
    code = (f"import sys, threading; sys.path.insert(0, {str(ROOT)!r})\nimport torch\n"
            "from minigpt2.config import UserError, run_main\n"
            "torch.set_num_threads(1)\nx, busy = torch.ones(300, 300), threading.Event()\n"
            "def multiply():\n    while True: busy.set() or torch.mm(x, x)\n"
            "def main():\n    threading.Thread(target=multiply, daemon=True).start()\n"
            f"    busy.wait()\n    print('a line')\n    {end}\nrun_main(main)\n")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            env=script_env() | {"RANK": "0"}, timeout=120)
    assert (result.returncode, result.stdout) == (status, "a line\n"), result.stderr
    assert result.stderr.endswith(error) and ("Traceback" in result.stderr) == (status == 1)


@pytest.mark.parametrize("finishes", [True, False])
def test_a_rank_that_finishes_may_find_the_store_gone(finishes, monkeypatch, capsys):
    """Without torchrun, rank 0 hosts the store, and may have exited a moment earlier."""
    class Leaving(threading.Event):
        waits = 0

        def wait(self, timeout=None):
            self.waits += 1
            if self.waits > 1 and finishes:  # the first wait is for the next heartbeat
                self.set()
            return self.is_set()

    def stopped(status):
        statuses.append(status)
        raise SystemExit

    statuses = []
    monkeypatch.setattr("minigpt2.faults.os._exit", stopped)
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    monitor = faults.RankMonitor()
    monitor.store, monitor.leaving, monitor.heartbeat = object(), Leaving(), None
    beat = Future()
    beat.set_exception(RuntimeError("Connection reset by peer"))
    monitor.store_thread = SimpleNamespace(submit=lambda call: beat)
    with contextlib.suppress(SystemExit):
        monitor.run()
    assert statuses == ([] if finishes else [1])
    assert ("node does not answer (Connection reset" in capsys.readouterr().err) != finishes


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_on_all_ranks(corpus, tmp_path):
    """torchrun forwards the signal, waits, and fails with an error of its own."""
    agent = torchrun("--standalone", "--nproc-per-node=2", SCRIPT,
                     *flags(long(corpus, tmp_path / "out")))
    wait_until(lambda: num_records(tmp_path / "out") > 3)
    agent.terminate()
    assert "SIGTERM: stopped after" in finish(agent)
    folder, = list_checkpoints(tmp_path / "out")
    assert load_training_state(folder)["progress"]["step"] < 100_000


def held_torchrun(*arguments, released: Path, config) -> subprocess.Popen:
    """A torchrun whose ranks stop in their eighth step until `released` exists."""
    return torchrun(*arguments, HELD_SCRIPT, *flags(config), HOLD_AFTER="7",
                    HOLD_UNTIL=str(released))


@pytest.mark.slow
def test_max_restarts_resumes_after_a_lost_rank(corpus, tmp_path):
    config = long(corpus, tmp_path / "out", save_interval=5, max_steps=12)
    released = tmp_path / "released"
    agent = held_torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=2",
                          released=released, config=config)
    wait_until(lambda: list_checkpoints(tmp_path / "out"))
    os.kill(workers(agent)[1], signal.SIGKILL)
    released.touch()
    output = finish(agent)
    assert agent.returncode == 0, output
    starts = read_log(tmp_path / "out" / "metrics.jsonl")["run"]
    assert len(starts) == 2 and max(starts) > 0
    whole = dataclasses.replace(config, out_dir=str(tmp_path / "whole"))
    assert Ranks(2, "trainer", flags(whole), tmp_path / "ranks").wait() == [0, 0]
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def node_arguments(node: int, endpoint: str, restarts: int = 0) -> list[str]:
    """torchrun's arguments for one of two nodes of one rank each, which know each other only by
    the rendezvous endpoint. Node 0 hosts it."""
    return ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=7",
            f"--max-restarts={restarts}", f"--rdzv-endpoint={endpoint}",
            f"--rdzv-conf=is_host={int(node == 0)}"]


@pytest.mark.slow
@pytest.mark.parametrize("node", [0, 1])
def test_two_nodes_restart_after_a_lost_rank(corpus, tmp_path, node):
    """The torchruns of the two nodes count restarts differently: one of them did not fail."""
    config = long(corpus, tmp_path / "out", save_interval=5, max_steps=12)
    endpoint, released = f"127.0.0.1:{free_port()}", tmp_path / "released"
    agents = [held_torchrun(*node_arguments(n, endpoint, restarts=2), released=released,
                            config=config) for n in (0, 1)]
    wait_until(lambda: list_checkpoints(tmp_path / "out"))
    os.kill(*workers(agents[node]), signal.SIGKILL)
    released.touch()
    outputs = [finish(agent) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    log = read_log(tmp_path / "out" / "metrics.jsonl")
    assert sorted(log["train"]) == list(range(12)) and len(log["run"]) == 2


@pytest.fixture
def hosts():
    """Names of two network namespaces, joined by a veth pair with the addresses 10.77.0.1 and
    10.77.0.2; None twice where namespaces cannot be made."""
    names = [f"gpt2-{os.getpid()}-{i}" for i in (1, 2)]
    commands = [command for name in names
                for command in (f"ip netns add {name}", f"ip -n {name} link set lo up")]
    commands += [f"ip link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}"]
    for i, name in enumerate(names, 1):
        commands += [f"ip -n {name} addr add 10.77.0.{i}/24 dev veth0",
                     f"ip -n {name} link set veth0 up"]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True)
        yield names
    except (OSError, subprocess.CalledProcessError):
        yield [None, None]
    finally:
        if shutil.which("ip"):
            for name in names:
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_hosts_train_to_the_losses_of_one_process(corpus, tmp_path, hosts):
    """In two network namespaces where the machine allows them, else on the loopback device."""
    config, networked = tiny(corpus, tmp_path / "two", micro_batch_size=2), hosts[0] is not None
    endpoint = f"{'10.77.0.1' if networked else '127.0.0.1'}:{free_port()}"
    agents = [torchrun(*node_arguments(node, endpoint),
                       *([f"--local-addr=10.77.0.{node + 1}"] if networked else []), SCRIPT,
                       *flags(config), namespace=hosts[node],
                       **({"GLOO_SOCKET_IFNAME": "veth0"} if networked else {}))
              for node in (0, 1)]
    outputs = [finish(agent) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    train(tiny(corpus, tmp_path / "one", micro_batch_size=2), CPU_LAUNCH)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    logs = [read_log(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert logs[0]["val"][10]["loss"] == pytest.approx(logs[1]["val"][10]["loss"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("node", [0, 1])
def test_killing_the_torchrun_of_one_node_ends_the_other(corpus, tmp_path, node):
    """The loss of node 0, which hosts the rendezvous, may be reported by torchrun itself. The rank
    of the killed torchrun must not train on as an orphan."""
    endpoint = f"127.0.0.1:{free_port()}"
    agents = [torchrun(*node_arguments(n, endpoint), SCRIPT, *flags(long(corpus, tmp_path / "out")))
              for n in (0, 1)]
    wait_until(lambda: num_records(tmp_path / "out") > 3)
    orphan, = workers(agents[node])
    agents[node].kill()
    output = finish(agents[1 - node])
    assert agents[1 - node].returncode != 0
    assert ("trainer.py: error: " in output and "--resume" in output) or (
        node == 0 and "The connection to the C10d store has failed" in output), output
    wait_until(lambda: not os.path.exists(f"/proc/{orphan}"))


@pytest.mark.slow
def test_an_orphaned_single_rank_ends(corpus, tmp_path):
    """torchrun with one process, killed: no other rank can notice."""
    agent = torchrun("--standalone", "--nproc-per-node=1", SCRIPT,
                     *flags(long(corpus, tmp_path / "out")))
    wait_until(lambda: num_records(tmp_path / "out") > 3)
    orphan, = workers(agent)
    agent.kill()
    wait_until(lambda: not os.path.exists(f"/proc/{orphan}"))
    assert "was killed" in finish(agent)


@pytest.mark.slow
def test_the_slurm_script_saves_and_succeeds_at_its_time_limit(corpus, tmp_path):
    """With stand-ins for SLURM's commands, and SIGUSR1 to every process of the step."""
    commands = {"scontrol": "echo localhost",
                "srun": '[[ $1 == --cpus-per-task=2 ]] && exec setsid "${@:2}"',
                "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"'}
    for name, line in commands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    job_id = str(os.getpid())
    job = start_process(
        ["bash", "runs/slurm.sh", *flags(long(corpus, tmp_path / "out", resume=False))],
        PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_NODELIST="localhost",
        SLURM_JOB_ID=job_id, SLURM_NNODES="1", SLURM_GPUS_ON_NODE="2", SLURM_CPUS_ON_NODE="2")
    wait_until(lambda: num_records(tmp_path / "out") > 3)
    ranks = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and environ_of(pid).get(
        b"TORCHELASTIC_RUN_ID") == job_id.encode()]
    assert len(ranks) == 2
    for pid in (parent_of(ranks[0]), *ranks):  # torchrun and its ranks
        os.kill(pid, signal.SIGUSR1)
    output = finish(job)
    assert job.returncode == 0, output
    assert "SIGUSR1: stopped after" in output and len(list_checkpoints(tmp_path / "out")) == 1


# ------------------------------------------------------------------------------ lost ranks


@pytest.mark.parametrize("killed", [0, 1])
def test_a_lost_rank_ends_the_others(corpus, tmp_path, killed):
    ranks = Ranks(2, "trainer", flags(long(corpus, tmp_path / "out")), tmp_path / "ranks",
                  constants=NO_WAIT)
    wait_until(lambda: num_records(tmp_path / "out") > 3, ranks)
    ranks.kill(killed)
    codes = ranks.wait()
    assert codes[killed] == -9 and codes[1 - killed] in (1, 2)
    assert_one_line(ranks.output(1 - killed), "--resume")


@pytest.mark.slow
def test_a_hanging_rank_counts_as_lost(corpus, tmp_path):
    """Stopped, not killed: its connections stay open, and a collective would wait half an hour."""
    ranks = Ranks(2, "trainer", flags(long(corpus, tmp_path / "out")), tmp_path / "ranks",
                  constants={"minigpt2.faults.SILENT_SECONDS": 3.0})
    wait_until(lambda: num_records(tmp_path / "out") > 3, ranks)
    ranks.kill(1, number=signal.SIGSTOP)
    wait_until(lambda: ranks.processes[0].exitcode is not None)
    assert ranks.processes[0].exitcode == 1
    assert_one_line(ranks.output(), "rank 1 is lost", "--resume")


@pytest.mark.slow
def test_a_busy_rank_is_not_lost(corpus, tmp_path):
    """It runs pure Python for longer than a rank may be silent; its monitor still gets its turn."""
    ranks = Ranks(2, "trainer", flags(tiny(corpus, tmp_path / "out", micro_batch_size=2)),
                  tmp_path / "ranks", constants={"minigpt2.faults.SILENT_SECONDS": 3.0},
                  busy=(1, 6.0))
    assert ranks.wait() == [0, 0], ranks.output()


@pytest.mark.slow
def test_a_finished_rank_waits_for_a_slow_one(corpus, tmp_path):
    """Rank 0 plots for longer than a rank may be silent; a signal during that changes nothing."""
    ranks = Ranks(2, "trainer", flags(tiny(corpus, tmp_path / "out", micro_batch_size=2)),
                  tmp_path / "ranks", constants={"minigpt2.faults.SILENT_SECONDS": 3.0},
                  delay_graph=4.5)
    wait_until(lambda: (tmp_path / "out" / "step_000010").exists(), ranks)
    ranks.kill(number=signal.SIGTERM)
    assert ranks.wait() == [0, 0], ranks.output()
    assert "finished 10 steps" in ranks.output()


def test_a_heartbeat_in_flight_outlives_a_suspension(monkeypatch):
    """After it, every deadline has passed: the heartbeat gets as many waits as beats fit in."""
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    monitor, beat, waits = faults.RankMonitor(), Future(), []

    def wait(futures, timeout):
        waits.append(timeout)
        if len(waits) == 3 and not beat.done():
            beat.set_result(([1], None))
            monitor.leaving.set()

    for name, value in (("HEARTBEAT_SECONDS", 0.05), ("SILENT_SECONDS", 0.2), ("wait", wait)):
        monkeypatch.setattr(faults, name, value)
    monkeypatch.setattr(faults.RankMonitor, "end", lambda self, why, status=1: pytest.fail(why))
    monitor.store, monitor.store_thread = object(), SimpleNamespace(submit=lambda call: beat)
    monitor.run()
    assert waits == [0.05] * 4


@pytest.mark.slow
def test_a_suspended_job_continues(corpus, tmp_path):
    """All ranks were suspended for longer than a rank may be silent: none of them is lost."""
    ranks = Ranks(2, "trainer", flags(long(corpus, tmp_path / "out")), tmp_path / "ranks",
                  constants={"minigpt2.faults.SILENT_SECONDS": 4.0,
                             "minigpt2.faults.HEARTBEAT_SECONDS": 0.2}, record_heartbeats=tmp_path)

    def heartbeats() -> int:
        paths = [tmp_path / f"heartbeats_{rank}" for rank in (0, 1)]
        return min(path.stat().st_size if path.exists() else 0 for path in paths)

    wait_until(lambda: heartbeats() > 2 and num_records(tmp_path / "out") > 3, ranks)
    ranks.kill(number=signal.SIGSTOP)
    time.sleep(5)
    ranks.kill(number=signal.SIGCONT)
    records, beats = num_records(tmp_path / "out"), heartbeats()
    wait_until(lambda: heartbeats() > beats + 25 and num_records(tmp_path / "out") > records + 25,
               ranks)
    ranks.kill(number=signal.SIGTERM)
    assert ranks.wait() == [0, 0], ranks.output()


@pytest.mark.slow
def test_rank_0_reports_the_error_of_another_rank(corpus, tmp_path):
    ranks = Ranks(2, "trainer", flags(long(corpus, tmp_path / "out")), tmp_path / "ranks",
                  also={1: ["--data-dir", str(tmp_path / "nowhere")]})
    assert ranks.wait() == [2, 2]
    assert_one_line(ranks.output(0), "nowhere")


@pytest.mark.slow
def test_rank_0_reports_out_of_memory_on_another_rank_with_the_flag(corpus, tmp_path):
    ranks = Ranks(2, "trainer", flags(long(corpus, tmp_path / "out")), tmp_path / "ranks",
                  out_of_memory=1)
    assert ranks.wait() == [2, 2]
    text = ranks.output(0) + ranks.output(1)
    assert "--micro-batch-size auto" in text and "Traceback" not in text


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_ends_while_another_starts_is_not_overwritten(corpus, tmp_path, resume):
    """Between the look into the folder and the lock, the other wrote a checkpoint."""
    config = tiny(corpus, tmp_path / "out", max_steps=4, save_interval=2, resume=resume)
    content = []
    if resume:
        train(dataclasses.replace(config, max_steps=2), CPU_LAUNCH)

    def prepare(self, *arguments, real=Run.prepare, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "prepare", real)
            train(config if resume else dataclasses.replace(config, seed=7), CPU_LAUNCH)
        content.append((tmp_path / "out" / "metrics.jsonl").read_bytes())
        return real(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "prepare", prepare)
        message = user_error(train, config, CPU_LAUNCH)
    assert "another run has written" in message
    assert list_checkpoints(tmp_path / "out")[-1].name == "step_000004"
    assert content == [(tmp_path / "out" / "metrics.jsonl").read_bytes()]


def test_a_finished_run_without_its_log_is_still_finished(corpus, tmp_path, capsys):
    config = tiny(corpus, tmp_path / "out", max_steps=2)
    train(config, CPU_LAUNCH)
    for name in ("metrics.jsonl", "pretrain_loss.png"):
        (tmp_path / "out" / name).unlink()
    train(dataclasses.replace(config, resume=True), CPU_LAUNCH)
    assert capsys.readouterr().out.count("finished 2 steps") == 2


def test_a_second_run_in_the_same_folder_is_refused(corpus, tmp_path):
    config = long(corpus, tmp_path / "out")
    ranks = Ranks(1, "trainer", flags(config), tmp_path / "ranks")
    wait_until(lambda: num_records(tmp_path / "out") > 3, ranks)
    assert "another process is writing" in user_error(train, config, CPU_LAUNCH)
    ranks.kill(number=signal.SIGTERM)
    assert ranks.wait() == [0], ranks.output()


def test_a_file_system_without_locks_is_one_line(corpus, tmp_path, monkeypatch):
    """Such as NFS without its lock service."""
    def flock(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    assert "its file system has no locks" in user_error(train, tiny(corpus, tmp_path / "out"),
                                                        CPU_LAUNCH)


@pytest.mark.parametrize("flag, word", [
    (["--max-lr", "0.5"], "max_lr differs: 0.01 on rank 0, 0.5 on rank 1"),
    (["--data-dir", "other"], "data_sha256 differs")])
def test_ranks_with_different_settings_are_refused(corpus, tmp_path, flag, word):
    other = shutil.copytree(corpus, tmp_path / "other")
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text().replace("{", '{"name": "other",', 1))
    ranks = Ranks(2, "trainer", flags(long(corpus, tmp_path / "out")), tmp_path / "ranks",
                  also={1: [str(other) if value == "other" else value for value in flag]},
                  constants=NO_WAIT)
    assert ranks.wait() == [2, 2], ranks.output()
    assert_one_line(ranks.output(0), word)
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------- non-finite losses


@pytest.mark.slow
@pytest.mark.parametrize("shard_optimizer", [False, True])
def test_a_nan_loss_on_one_rank_skips_the_step_on_both(corpus, tmp_path, shard_optimizer):
    """The loss of rank 1 is NaN in steps 4 and 8, of two micro-steps each."""
    config = tiny(corpus, tmp_path / "out", micro_batch_size=2, keep_last=0, save_interval=1,
                  shard_optimizer=shard_optimizer)
    ranks = Ranks(2, "trainer", flags(config), tmp_path / "ranks", inject_nan={1: [9, 16]},
                  constants=ONE_STEP_LATE if shard_optimizer else {})
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


@pytest.mark.parametrize("late", [0, 1])
def test_three_skipped_steps_stop_the_run(corpus, tmp_path, late):
    config = tiny(corpus, tmp_path / "out", micro_batch_size=2, save_interval=3)
    ranks = Ranks(2, "trainer", flags(config), tmp_path / "ranks", inject_nan={0: [10, 12, 14]},
                  constants=NO_WAIT | (ONE_STEP_LATE if late else {}))
    assert ranks.wait() == [2, 2]
    assert_one_line(ranks.output(), "diverged", "--max-lr", "--resume continues")
    log = read_log(tmp_path / "out" / "metrics.jsonl")["train"]
    assert [step for step, record in log.items() if record.get("skipped")] == [5, 6]
    assert all(p.isfinite().all() for p in load_model(tmp_path / "out").parameters())


@pytest.mark.parametrize("sample_tokens", [0, 2])
def test_weights_with_a_non_finite_validation_loss_are_not_saved(corpus, tmp_path, monkeypatch,
                                                                 sample_tokens):
    """A step of a finite loss can make the weights overflow, also in the last two steps."""
    config = tiny(corpus, tmp_path / "out", max_steps=4, eval_interval=2, save_interval=2,
                  sample_tokens=sample_tokens)
    monkeypatch.setattr("trainer.learning_rate", lambda step, **_: 1e-3 if step < 3 else 1e38)
    message = user_error(train, config, CPU_LAUNCH)
    assert message.startswith("the run has diverged: validation loss nan after 4 steps: lower")
    assert read_log(tmp_path / "out" / "metrics.jsonl")["val"][4]["loss"] is None
    assert find_checkpoint(tmp_path / "out").name == "step_000002"


def test_skipped_steps_are_counted_across_a_resume(corpus, tmp_path, monkeypatch):
    real, diverging = model.linear_cross_entropy, []
    monkeypatch.setattr(model, "linear_cross_entropy", lambda *arguments: real(*arguments) * (
        float("nan") if diverging and torch.is_grad_enabled() else 1.0))

    def schedule(step, **options):
        if step == 4:
            diverging.append(step)
        return 1e-3

    def stop_when_diverging(*arguments):
        step_if_finite(*arguments)
        if diverging:
            os.kill(os.getpid(), signal.SIGTERM)

    config = tiny(corpus, tmp_path / "out", save_interval=1)
    with monkeypatch.context() as patch, StopRequest() as stop:
        patch.setattr("trainer.learning_rate", schedule)
        patch.setattr("minigpt2.run.step_if_finite", stop_when_diverging)
        train(config, CPU_LAUNCH, stop)
    assert load_training_state(tmp_path / "out" / "step_000005")["progress"]["skipped"] == 1
    message = user_error(train, dataclasses.replace(config, resume=True), CPU_LAUNCH)
    assert "3 consecutive steps" in message
    assert max(read_log(tmp_path / "out" / "metrics.jsonl")["train"]) == 5


@pytest.mark.slow
def test_overflows_while_the_scaler_lowers_its_scale_are_not_a_fault(corpus, tmp_path, monkeypatch):
    """The scale starts 2**20 times too high, so that float16 overflows step after step."""
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: real(
        device, init_scale=2.0**36, enabled=enabled))
    train(tiny(corpus, tmp_path / "out", dtype="float16", max_steps=24, save_interval=24,
               eval_interval=24, eval_tokens=16, total_batch_size=16, micro_batch_size=1),
          CPU_LAUNCH)
    norms = [norm for norm, in trace(tmp_path / "out", "grad_norm")]
    assert norms[:5] == [None] * 5 and None not in norms[-3:]


def test_overflows_are_a_fault_once_the_scale_cannot_be_lowered():
    class Scaler:
        def __init__(self, scale):
            self.scale = scale

        def is_enabled(self):
            return True

        def get_scale(self):
            return self.scale

    infinity = float("inf")
    assert count_skipped(2, 4.0, infinity, Scaler(1.0)) == 2
    assert "diverged" in user_error(count_skipped, 2, 4.0, infinity, Scaler(0.5))
    assert "diverged" in user_error(count_skipped, 2, infinity, 1.0, Scaler(1.0))


# ----------------------------------------------------------------- full disk, out of memory


def assert_only_the_first_checkpoint(out_dir, finished_run) -> None:
    assert [folder.name for folder in list_checkpoints(out_dir)] == ["step_000005"]
    assert final_state(out_dir)["progress"]["step"] == 5
    load_model(out_dir)
    assert curves(out_dir)["train"].keys() <= curves(finished_run)["train"].keys()


@contextlib.contextmanager
def file_size_limit(kilobytes: int):
    """As `ulimit -f`: a write beyond the limit fails with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kilobytes, file", [
    (12, "metrics.jsonl"), (4000, "step_000010")])  # its next line; the optimizer's state
def test_a_file_size_limit_damages_neither_checkpoint_nor_log(
        corpus, tmp_path, finished_run, kilobytes, file, monkeypatch, capsys):
    out = interrupted(finished_run, tmp_path / "out", 5)
    log = out / "metrics.jsonl"
    complete = log.read_text().rpartition("\n")[0]
    log.write_text("\n".join([complete, *['{"step": 1, "kind": "note"}'] * 280]) + "\n")  # 11 KB
    assert 10_000 < log.stat().st_size < 12_000
    config = tiny(corpus, out, resume=True)
    with file_size_limit(kilobytes):
        assert file in main_error(lambda: train(config, CPU_LAUNCH), [], monkeypatch, capsys)
    assert_only_the_first_checkpoint(out, finished_run)
    train(config, CPU_LAUNCH)  # without the limit
    assert_same_run(out, finished_run)


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


def test_a_full_disk_damages_neither_checkpoint_nor_log(corpus, small_disk, finished_run,
                                                        monkeypatch, capsys):
    out = interrupted(finished_run, small_disk / "out", 5)
    config = tiny(corpus, out, resume=True)
    message = main_error(lambda: train(config, CPU_LAUNCH), [], monkeypatch, capsys)
    assert "step_000010" in message and "disk full" in message
    assert_only_the_first_checkpoint(out, finished_run)


@pytest.mark.slow
def test_out_of_memory_names_the_flag(corpus, tmp_path):
    """A limit on the address space stands in for full memory."""
    config = tiny(corpus, tmp_path / "out", micro_batch_size=2**13, total_batch_size=2**17,
                  max_steps=1, n_embd=256)
    ranks = Ranks(1, "trainer", flags(config), tmp_path / "ranks", limit_memory=10**9)
    assert ranks.wait() == [2], ranks.output()
    assert_one_line(ranks.output(), "out of memory", "--micro-batch-size auto")


def test_auto_finds_a_micro_batch_and_keeps_the_losses(corpus, tmp_path, finished_run, monkeypatch,
                                                       capsys):
    real = model.linear_cross_entropy

    def limited(x, weight, targets, reduction):
        if len(targets) > 4 * 16:
            raise torch.OutOfMemoryError("out of memory")
        return real(x, weight, targets, reduction)

    monkeypatch.setattr(model, "linear_cross_entropy", limited)
    monkeypatch.setattr("minigpt2.faults.on_cpu", lambda device: False)  # by trial, as on a GPU
    train(tiny(corpus, tmp_path / "auto", micro_batch_size="auto"), CPU_LAUNCH)
    assert "2 micro-steps x 4 x 16" in capsys.readouterr().out
    assert losses(tmp_path / "auto") == pytest.approx(losses(finished_run), abs=1e-6)


# ------------------------------------------------------- sharded optimizer, deterministic runs


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_sharded_optimizer_gives_the_same_run_with_half_the_state(optimizer, corpus, tmp_path):
    """Also when resumed at one rank and at two: the checkpoint format is the same."""
    plain = tiny(corpus, tmp_path / "plain", micro_batch_size=2, keep_last=0, max_steps=6,
                 save_interval=3, eval_interval=3, optimizer=optimizer)
    sharded = dataclasses.replace(plain, out_dir=str(tmp_path / "sharded"), shard_optimizer=True)
    held = []
    for config in (plain, sharded):
        output = tmp_path / f"ranks_{config.shard_optimizer}"
        ranks = Ranks(2, "trainer", flags(config), output, record_optimizer_bytes=output,
                      record_broadcasts=output)
        assert ranks.wait() == [0, 0], ranks.output()
        held.append([int((output / f"bytes_{rank}.txt").read_text()) for rank in (0, 1)])
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
    assert_same_run(tmp_path / "sharded", tmp_path / "plain")
    total = sum((4 if optimizer == "muon" and is_block_matrix(name, p) else 8) * p.numel()
                for name, p in load_model(tmp_path / "plain").named_parameters())
    assert held[0] == [total, total] and sum(held[1]) == total and min(held[1]) > 0
    # The state travels tensor by tensor, as it is: pickling it would block the interpreter
    sent = set(map(tuple, map(json.loads, (output / "broadcasts_1.jsonl").open())))
    sizes = {p.numel() for p in load_model(tmp_path / "plain").parameters()}
    assert sent == {("torch.float32", numel) for numel in sizes | {1}}

    for name, world_size, shard in (("one", 1, False), ("two", 2, True)):
        interrupted(tmp_path / "sharded", tmp_path / name, 3)
        config = dataclasses.replace(plain, out_dir=str(tmp_path / name), resume=True,
                                     shard_optimizer=shard)
        ranks = Ranks(world_size, "trainer", flags(config), tmp_path / f"ranks_{name}")
        assert ranks.wait() == [0] * world_size, ranks.output()
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
    assert_same_run(tmp_path / "two", tmp_path / "plain")


@pytest.mark.slow
def test_deterministic_changes_nothing_on_a_cpu(corpus, tmp_path):
    for name in ("plain", "deterministic"):
        config = tiny(corpus, tmp_path / name, deterministic=name == "deterministic")
        ranks = Ranks(1, "trainer", flags(config), tmp_path / f"ranks_{name}")
        assert ranks.wait() == [0], ranks.output()
    assert curves(tmp_path / "deterministic") == curves(tmp_path / "plain")
