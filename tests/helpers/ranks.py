"""Ranks of a real gloo run as processes that a test can kill.

They are forked from a server that has loaded torch (`preload`), so that a start takes a fraction of
a second instead of four, and get torchrun's environment variables. torchrun itself is tested
elsewhere. Hooks, the functions below up to `Ranks`, inject faults into a rank or record its work.
"""

import importlib
import itertools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

import dpo
import evaluate
import finetune
import judge
import model
import reward
import rlhf
import trainer
from dataloader import TokenLoader
from helpers import held_trainer, toy_script, worlds
from helpers.common import main_of
from minigpt2 import distributed, faults, run
from minigpt2.config import run_main

# For tests in which all ranks fail alike: the later ones need not wait for a torchrun to end them
NO_WAIT = {"minigpt2.config.RANK_DELAY_S": 0.0}
SCRIPTS = {"trainer": trainer, "finetune": finetune, "reward": reward, "dpo": dpo, "rlhf": rlhf,
           "toy": toy_script, "evaluate": evaluate, "judge": judge}


def run_rank(script: str, argv: list[str], environment: dict[str, str], output: Path,
             hooks: dict[str, object]) -> None:
    """In the forked process: calls every hook with its argument, then becomes a rank of `script`
    with its output in a file."""
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    for name, argument in hooks.items():
        globals()[name](argument)
    sys.argv = [f"{script}.py", *argv]
    run_main(main_of(SCRIPTS[script]))


# ----------------------------------------------------------------------------------- hooks


def constants(values: dict[str, object]) -> None:
    """Sets constants, named as "minigpt2.faults.SILENT_SECONDS"."""
    for path, value in values.items():
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path
        setattr(importlib.import_module(module), name, value)


def other_files_on_rank_1(old_and_new: tuple[str, str]) -> None:
    """evaluate.py reads other files there, as on a node with a disk of its own."""
    def parse(*arguments, real=evaluate.parse_config, **options):
        config = real(*arguments, **options)
        return replace(config, tasks=config.tasks.replace(*old_and_new), checkpoints=tuple(
            path.replace(*old_and_new) for path in config.checkpoints))

    if os.environ["RANK"] == "1":
        evaluate.parse_config = parse


def hold(after_and_until: tuple[int, Path]) -> None:
    """See `held_trainer.hold`."""
    held_trainer.hold(*after_and_until)


def limit_memory(extra: int) -> None:
    """Lets this process allocate only `extra` more bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def record_windows(folder: Path) -> None:
    """Appends the (shard, first token) pairs that every micro-step of this rank reads."""
    real = TokenLoader.batch

    def batch(self, step, micro_step):
        first = (step * self.windows_per_step
                 + (micro_step * self.world_size + self.rank) * self.micro_batch_size)
        places = [self.locate(first + i) for i in range(self.micro_batch_size)]
        append_json(folder / f"windows_{self.rank}.jsonl", [step, places])
        return real(self, step, micro_step)

    TokenLoader.batch = batch


def record_heartbeats(folder: Path) -> None:
    """Appends a byte to heartbeats_RANK whenever the monitor of this rank has read the others."""
    real = faults.RankMonitor.heartbeat

    def heartbeat(self):
        result = real(self)
        with open(folder / f"heartbeats_{self.rank}", "ab") as file:
            file.write(b".")
        return result

    faults.RankMonitor.heartbeat = heartbeat


def inject_nan(micro_steps_of: dict[int, list[int]]) -> None:
    """Makes the loss NaN in the given micro-steps, by rank."""
    real, chosen = model.linear_cross_entropy, micro_steps_of.get(int(os.environ["RANK"]), [])
    count = iter(range(10**9))

    def nan_loss(*arguments):
        loss = real(*arguments)
        return loss * float("nan") if torch.is_grad_enabled() and next(count) in chosen else loss

    model.linear_cross_entropy = nan_loss


def signal_in_micro_step(options: dict) -> None:
    """One of two ranks gets SIGTERM in its micro-step `number`, once the other is in its micro-step
    `held`, and leaves its step before the other gets on. Both write how many micro-steps they ran.
    """
    real, count, rank = run.Run.micro_steps, itertools.count(1), int(os.environ["RANK"])
    counts = [Path(options["folder"]) / f"micro_steps_{one}" for one in (0, 1)]
    is_held = Path(options["folder"]) / "held"

    def micro_steps(self, batches):
        number = 0
        for batch in real(self, batches):
            number = next(count)
            if rank == options["rank"] and number == options["number"]:
                wait_until(is_held.exists)
                os.kill(os.getpid(), signal.SIGTERM)
            elif rank != options["rank"] and number == options["held"]:
                is_held.touch()
                wait_until(counts[options["rank"]].exists)
            yield batch
        if self.stopping:
            counts[rank].write_text(str(number), encoding="utf-8")

    run.Run.micro_steps = micro_steps


def delay_graph(seconds: float) -> None:
    """Makes rank 0 slow at the end of the run."""
    real = run.draw_runs
    run.draw_runs = lambda *arguments: (time.sleep(seconds), real(*arguments))


def out_of_memory(rank: int) -> None:
    """Makes the third micro-step of one rank run out of memory."""
    real, count = model.linear_cross_entropy, iter(range(10**9))

    def failing_loss(*arguments):
        chosen = int(os.environ["RANK"]) == rank and torch.is_grad_enabled()
        if chosen and next(count) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(*arguments)

    model.linear_cross_entropy = failing_loss


def mark_validation(folder: Path) -> None:
    """Creates validation_RANK when the rank has read five validation batches."""
    real = TokenLoader.eval_batches

    def eval_batches(self, max_tokens):
        for number, batch in enumerate(real(self, max_tokens)):
            if number == 5:
                (folder / f"validation_{self.rank}").touch()
            yield batch

    TokenLoader.eval_batches = eval_batches


def record_optimizer_bytes(folder: Path) -> None:
    """Writes the bytes of optimizer state that this rank holds at the end of the run."""
    real, optimizers = trainer.make_optimizer, []

    def make_optimizer(*arguments, **options):
        optimizers.append(real(*arguments, **options))
        return optimizers[-1]

    def record(*arguments, real=trainer.Run.__exit__):
        real(*arguments)
        states = getattr(optimizers[0], "optim", optimizers[0]).state.values()
        held = sum(v.nbytes for state in states for k, v in state.items() if k != "step")
        (folder / f"bytes_{os.environ['RANK']}.txt").write_text(str(held), encoding="utf-8")

    trainer.make_optimizer = make_optimizer
    trainer.Run.__exit__ = record


def record_collectives(folder: Path) -> None:
    """Appends the reductions of this rank: every gradient bucket, with its bytes and the number of
    parameters whose gradients were ready by then, and the size of every other all-reduce."""
    path, ready = folder / f"collectives_{os.environ['RANK']}.jsonl", []
    real_parallel, real_reduce = distributed.data_parallel, torch.distributed.all_reduce

    def hook(group, bucket):
        append_json(path, {"bucket": bucket.index(), "bytes": bucket.buffer().nbytes,
                           "ready": len(ready)})
        return default_hooks.allreduce_hook(group, bucket)

    def data_parallel(module, launch):
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(ready.append)
        wrapped = real_parallel(module, launch)
        wrapped.register_comm_hook(None, hook)
        return wrapped

    def all_reduce(tensor, *arguments, **options):
        append_json(path, {"elements": tensor.numel()})
        return real_reduce(tensor, *arguments, **options)

    def loss_of_new_micro_step(*arguments, real=model.linear_cross_entropy):
        ready.clear()
        return real(*arguments)

    distributed.data_parallel, torch.distributed.all_reduce = data_parallel, all_reduce
    model.linear_cross_entropy = loss_of_new_micro_step


def record_gradients(folder: Path) -> None:
    """Appends, after every micro-step, the storages of gradients and of reduced buckets with their
    bytes, by address."""
    path = folder / f"gradients_{os.environ['RANK']}.jsonl"
    real_parallel, real_steps = distributed.data_parallel, run.Run.micro_steps
    seen: dict[str, dict[int, int]] = {"gradients": {}, "buckets": {}}

    def note(kind, tensor):
        storage = tensor.untyped_storage()
        seen[kind][storage.data_ptr()] = storage.nbytes()

    def hook(group, bucket):
        note("buckets", bucket.buffer())
        return default_hooks.allreduce_hook(group, bucket)

    def data_parallel(module, launch):
        wrapped = real_parallel(module, launch)
        wrapped.register_comm_hook(None, hook)
        return wrapped

    def micro_steps(self, batches):
        for batch in real_steps(self, batches):
            seen.update(gradients={}, buckets={})
            yield batch
            for parameter in self.model.parameters():
                note("gradients", parameter.grad)
            append_json(path, seen)

    distributed.data_parallel, run.Run.micro_steps = data_parallel, micro_steps


def save_gradients(folder: Path) -> None:
    """Saves the gradients of this rank's last step as the optimizer receives them."""
    real = run.step_if_finite

    def step_if_finite(optimizer, numbers):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        torch.save(gradients, folder / f"gradients_{os.environ.get('RANK', 0)}.pt")
        real(optimizer, numbers)

    run.step_if_finite = step_if_finite


def record_pair_gradient(folder: Path) -> None:
    """Writes the gradient of the first step of dpo.py, as it is before clipping, to gradient_RANK.
    The reference's log-probabilities are made up: with the true ones, all pairs would weigh the
    same in that step."""
    real = torch.nn.utils.clip_grad_norm_

    def made_up(reference, batches, run):
        pairs = [pair for batch in batches for pair in batch]
        return {pair.place: [-200.0 + 7 * (len(pair.chosen) % 9), -200.0] for pair in pairs}

    def record(parameters, limit):
        parameters = list(parameters)
        path = folder / f"gradient_{os.environ['RANK']}.pt"
        if not path.exists():
            torch.save([parameter.grad.clone() for parameter in parameters], path)
        return real(parameters, limit)

    dpo.reference_logprobs, torch.nn.utils.clip_grad_norm_ = made_up, record


def small_vocabulary(name: str) -> None:
    """See `worlds.World.use_small_vocabulary`."""
    getattr(worlds, name).use_small_vocabulary(pytest.MonkeyPatch())


def start_value_head(scale: float) -> None:
    """Makes the head of rlhf.py's value model start at +-scale instead of 0, with which its trunk
    would have no gradient in the first step."""
    real = rlhf.load_value_model

    def load_value_model(*arguments):
        value = real(*arguments)
        with torch.no_grad():
            value.score.weight.fill_(scale)[:, ::2] *= -1
        return value

    rlhf.load_value_model = load_value_model


def record_broadcasts(folder: Path) -> None:
    """Appends the type and the number of elements of every tensor that this rank broadcasts."""
    path, real = folder / f"broadcasts_{os.environ['RANK']}.jsonl", torch.distributed.broadcast

    def broadcast(tensor, *arguments, **options):
        append_json(path, [str(tensor.dtype), tensor.numel()])
        return real(tensor, *arguments, **options)

    torch.distributed.broadcast = broadcast


def record_dropout(folder: Path) -> None:
    """Appends the step and the sum of the mask of every micro-step's first dropout."""
    real, inside = run.Run.micro_steps, []

    def dropout(x, p):
        mask = torch.nn.functional.dropout(torch.ones_like(x), p)
        if inside:
            weights = torch.arange(mask.numel(), dtype=torch.float64).view(mask.shape)
            append_json(folder / f"masks_{os.environ['RANK']}.jsonl",
                        [inside.pop(), (mask * weights).sum().item()])
        return x * mask

    def micro_steps(self, batches):
        for batch in real(self, batches):
            inside[:] = [self.step]
            yield batch

    model.F = SimpleNamespace(**vars(torch.nn.functional) | {"dropout": dropout})
    run.Run.micro_steps = micro_steps


def busy(rank_and_seconds: tuple[int, float]) -> None:
    """Makes one rank run pure Python in its third step, so that its monitor has to wait."""
    finish_step, count, (rank, seconds) = run.Run.finish_step, itertools.count(), rank_and_seconds

    def finish_step_late(self, *arguments, **options):
        if self.launch.rank == rank and next(count) == 2:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                sum(range(1000))
        return finish_step(self, *arguments, **options)

    run.Run.finish_step = finish_step_late


def append_json(path: Path, value) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


# ------------------------------------------------------------------------------- processes


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def fork_server() -> multiprocessing.context.BaseContext:
    """A multiprocessing context whose server has loaded `preload`."""
    context, tests = multiprocessing.get_context("forkserver"), Path(__file__).parents[1]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{tests}:{tests.parent}"
    try:
        context.set_forkserver_preload(["helpers.preload"])
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


STARTED: list["Ranks"] = []


class Ranks:
    """The processes of one launch. The output of rank N is appended to FOLDER/rank_N.txt; `also`
    holds further flags, by rank."""

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
        STARTED.append(self)

    def kill(self, *ranks: int, number: int = signal.SIGKILL) -> None:
        """Sends a signal to the given ranks, by default to all."""
        for rank in ranks or range(len(self.processes)):
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit codes by rank; None for a rank still running after `seconds`, then killed."""
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


def kill_all() -> None:
    """Kills all ranks that are still running."""
    while STARTED:
        STARTED.pop().wait(0)


def wait_until(condition, ranks: Ranks | None = None, seconds: float = 120) -> None:
    """Polls until the condition is true or all ranks have ended; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if ranks is not None and ranks.done():
            return
        assert time.monotonic() < end, f"did not happen within {seconds} s"
        time.sleep(0.002)
