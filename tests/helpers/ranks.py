"""Ranks of a real gloo run as processes that a test can kill: forked from a server that has loaded
torch once, so that a start costs a fraction of a second, not four. torchrun itself is the subject
of other tests; here only its environment variables are given."""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import time
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401, as the next: what a run loads on its way
import torch
import torch._dynamo
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

import finetune
import model
import trainer
from dataloader import TokenLoader
from helpers import toy_script
from minigpt2 import faults, run
from minigpt2.config import run_main

MAINS = {"trainer": trainer.main, "finetune": finetune.main, "toy": toy_script.main}


def run_rank(script: str, argv: list[str], environment: dict, output: Path,
             hooks: dict[str, object]) -> None:
    """In the forked process: becomes one rank of `script`, after every hook, a function below, was
    called with its argument."""
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    for name, argument in hooks.items():
        globals()[name](argument)
    sys.argv = [f"{script}.py", *argv]
    run_main(MAINS[script])


def note_windows(folder: Path) -> None:
    """Appends which (shard, first token) every micro-step of this process reads."""
    real = TokenLoader.batch

    def batch(self, step, micro_step):
        first = (step * self.windows_per_step
                 + (micro_step * self.world_size + self.rank) * self.micro_batch_size)
        places = [self.locate(first + i) for i in range(self.micro_batch_size)]
        with open(folder / f"windows_{self.rank}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([step, places]) + "\n")
        return real(self, step, micro_step)

    TokenLoader.batch = batch


def silent_seconds(seconds: float) -> None:
    faults.SILENT_SECONDS = seconds


def poison(of_rank: dict[int, list[int]]) -> None:
    """Makes the loss of the given micro-steps of this rank not a number."""
    real, steps = model.linear_cross_entropy, of_rank.get(int(os.environ["RANK"]), [])
    count = iter(range(10**9))

    def poisoned_loss(x, weight, targets):
        loss = real(x, weight, targets)
        return loss * float("nan") if torch.is_grad_enabled() and next(count) in steps else loss

    model.linear_cross_entropy = poisoned_loss


def slow_graph(seconds: float) -> None:
    """Makes rank 0 take its time at the end."""
    real = run.draw_runs
    run.draw_runs = lambda *arguments: (time.sleep(seconds), real(*arguments))


def out_of_memory(of_rank: int) -> None:
    """Makes the third micro-step of a rank fail for want of memory."""
    real, count = model.linear_cross_entropy, iter(range(10**9))

    def failing_loss(x, weight, targets):
        mine = int(os.environ["RANK"]) == of_rank and torch.is_grad_enabled()
        if mine and next(count) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(x, weight, targets)

    model.linear_cross_entropy = failing_loss


def mark_evaluations(folder: Path) -> None:
    """Makes a file when the first validation of a rank has begun."""
    real = TokenLoader.eval_batches

    def eval_batches(self, max_tokens):
        for number, batch in enumerate(real(self, max_tokens)):
            if number == 5:
                (folder / f"evaluation_{self.rank}").touch()
            yield batch

    TokenLoader.eval_batches = eval_batches


def note_moments(folder: Path) -> None:
    """Writes how many bytes of optimizer state this process holds at the end."""
    real, made = trainer.make_optimizer, []

    def make_optimizer(*arguments, **options):
        made.append(real(*arguments, **options))
        return made[-1]

    def note(self):
        state = getattr(made[0], "optim", made[0]).state.values()
        held = sum(v.nbytes for values in state for k, v in values.items() if k != "step")
        (folder / f"moments_{os.environ['RANK']}.txt").write_text(str(held), encoding="utf-8")

    trainer.make_optimizer = make_optimizer
    faults.Launch.barrier = note  # what every rank calls at its end


def note_collectives(folder: Path) -> None:
    """Appends what this process reduces: every bucket of gradients, with its bytes and how many
    parameters had their gradients by then, and the elements of every other reduction."""
    name, ready = folder / f"collectives_{os.environ['RANK']}.jsonl", []
    real_parallel, real_reduce = run.data_parallel, torch.distributed.all_reduce

    def note(**event) -> None:
        with open(name, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def hook(group, bucket):
        note(bucket=bucket.index(), bytes=bucket.buffer().nbytes, ready=len(ready))
        return default_hooks.allreduce_hook(group, bucket)

    def data_parallel(module, launch):
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(ready.append)
        wrapped = real_parallel(module, launch)
        wrapped.register_comm_hook(None, hook)
        return wrapped

    def all_reduce(tensor, *arguments, **options):
        note(elements=tensor.numel())
        return real_reduce(tensor, *arguments, **options)

    def noted_loss(x, weight, targets, real=model.linear_cross_entropy):
        ready.clear()  # a new micro-step
        return real(x, weight, targets)

    run.data_parallel, torch.distributed.all_reduce = data_parallel, all_reduce
    model.linear_cross_entropy = noted_loss


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def fork_server() -> multiprocessing.context.BaseContext:
    """A context whose server has this file loaded; it needs to be told where that is."""
    context, here = multiprocessing.get_context("forkserver"), Path(__file__).parents[1]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{here}:{here.parent}"
    try:
        context.set_forkserver_preload(["helpers.ranks"])
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


class Ranks:
    """The processes of one launch. Their output is appended to files named `rank_N.txt`; `also`
    holds further flags for one rank only."""

    def __init__(self, world_size: int, script: str, argv: list[str], folder: Path,
                 also: dict[int, list[str]] | None = None, **hooks):
        context = fork_server()
        port, self.folder = free_port(), folder
        folder.mkdir(parents=True, exist_ok=True)
        self.processes = []
        for rank in range(world_size):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size,
                           "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": port, "PYTHONWARNINGS": "ignore"}
            arguments = (script, argv + (also or {}).get(rank, []),
                         {name: str(value) for name, value in environment.items()},
                         folder / f"rank_{rank}.txt", hooks)
            self.processes.append(context.Process(target=run_rank, args=arguments))
        for process in self.processes:
            process.start()

    def kill(self, *ranks: int, number: int = signal.SIGKILL) -> None:
        for rank in ranks or range(len(self.processes)):
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit codes by rank; what has not ended by then is killed, and its code is None."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        for process in self.processes:
            process.join()
        return codes

    def output(self, rank: int = 0) -> str:
        return (self.folder / f"rank_{rank}.txt").read_text(encoding="utf-8")

    def done(self) -> bool:
        return all(process.exitcode is not None for process in self.processes)


def wait_until(condition, ranks: "Ranks | None" = None, seconds: float = 60) -> None:
    """Looks every few milliseconds until something is so, or the ranks have ended."""
    end = time.monotonic() + seconds
    while not condition():
        if ranks is not None and ranks.done():
            return
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.002)
