"""Command lines from frozen dataclasses, and one-line errors with exit status 2."""

import argparse
import contextlib
import dataclasses
import errno
import math
import os
import re
import signal
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository
Config = typing.TypeVar("Config")  # the configuration dataclass of a script
RANK_DELAY_S = 3.0  # after rank 0 has failed, torchrun stops the other ranks within this time
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
OUT_OF_MEMORY = re.compile(  # CUDA, MPS, NCCL, Triton; PyTorch on a CPU; C++; Python; cuBLAS
    "out of memory|DefaultCPUAllocator|bad_alloc|can't start new thread|CUBLAS_STATUS_ALLOC_FAILED"
    "|could not create a primitive")  # oneDNN, which gives no reason


class UserError(Exception):
    """A user error, in one line: what, got, expected, and the command or flag that fixes it."""


def flag(default, help: str, *, minimum: float | None = None, below: float = math.inf,
         positional: bool = False, may_be_empty: bool = False, is_path: bool = False, old=""):
    """A dataclass field that becomes `--field-name` or a positional argument. With `minimum`, a
    number must be finite and in [minimum, below). An empty string, such as an unset shell variable,
    is an error unless `may_be_empty`. In a path, a leading ~ is expanded. `old`: also accepted."""
    return dataclasses.field(default=default, metadata=locals())  # all arguments, by name


def parse_config(cls: type[Config], argv: list[str] | None = None, *, description: str) -> Config:
    """Parses `argv` (default: the command line) into `cls`; exits with status 2 on an error. Types:
    int, float, str, bool (`--x/--no-x`), Literal[...], int | Literal[...], these with `| None`, and
    tuple[str, ...] for positional values, as is everything after "--"."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(fail(  # one line, instead of the usage text
        f"{message} (--help lists the flags, -- ends them)"))
    hints, fields = typing.get_type_hints(cls), dataclasses.fields(cls)
    for field in fields:
        add_argument(parser, field, hints[field.name])
    argv = list(sys.argv[1:] if argv is None else argv)
    literal = next((field.name for field in fields if field.metadata["positional"]), None)
    end = argv.index("--") if literal and "--" in argv else len(argv)
    words = [re.sub(r"^--[a-z0-9_]+(?==|\Z)", lambda m: m[0].replace("_", "-"), word)
             for word in argv[:end]]  # --max_lr is --max-lr
    values = vars(parser.parse_intermixed_args(words))  # accepts flags between positionals
    if literal:
        values[literal] = (*values[literal], *argv[end + 1 :])
    for field in fields:
        name, value = flag_name(field.name), values[field.name]
        minimum, below = field.metadata["minimum"], field.metadata["below"]
        if value == "" and not field.metadata["may_be_empty"]:
            parser.error(f"{name} is empty")
        if minimum is not None and isinstance(value, int | float) and not minimum <= value < below:
            parser.error(f"{name} is {value}, expected a finite number of at least {minimum}"
                         + (f" and less than {below}" if below < math.inf else ""))
    return cls(**values)


def add_argument(parser: argparse.ArgumentParser, field: dataclasses.Field, hint) -> None:
    shown = "" if field.default in (None, "", ()) else f" (default: {field.default})"
    options = {"help": (field.metadata["help"] + shown).replace("%", "%%")}
    kind, *words = (arm for arm in typing.get_args(hint | None) if arm is not type(None))
    if field.metadata["is_path"]:
        options["type"] = os.path.expanduser
    elif kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif words:  # int | Literal[...]
        options["type"] = lambda text: int_or_word(text, typing.get_args(words[0]))
    elif typing.get_origin(kind) is typing.Literal:
        options["choices"] = typing.get_args(kind)
    elif not field.metadata["positional"]:
        options["type"] = kind
    if field.metadata["positional"]:
        parser.add_argument(field.name, nargs="*", **options)
    else:
        names = [flag_name(name) for name in (field.name, field.metadata["old"]) if name]
        parser.add_argument(*names, default=field.default, **options)


def int_or_word(text: str, words: tuple[str, ...]) -> int | str:
    """Parses the value of an `int | Literal[...]` flag."""
    if text not in words and not re.fullmatch(r"-?\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r}, expected an integer or {' or '.join(words)}")
    return text if text in words else int(text)


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def run_main(main: Callable[[], None]) -> typing.NoReturn:
    """Runs `main` and exits: with one line and status 2 after a UserError or a failed file."""
    # A thread of gloo that frees a tensor while Python exits aborts the process: ranks skip that
    leave = os._exit if os.environ.get("RANK") else sys.exit
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None if it is closed
        # Not every terminal is UTF-8, and in a log file lines should be seen at once
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
        print(end="", flush=True)  # a write that fails is reported here, not by Python at exit
    except UserError as error:
        leave(fail(str(error)))
    except BrokenPipeError:  # the reader of a pipe exited, as `| head` does
        discard(sys.stdout)
        leave(128 + signal.SIGPIPE)
    except (OSError, RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            leave(fail(f"out of memory ({first_line(error):.120}): free some, or lower "
                       "--batch-size or --workers, where there is one"))
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            if error.filename is None and sys.stdout is not None:
                discard(sys.stdout)
            leave(fail(f"no space left while writing {error.filename or 'output'}; files "
                       "completed earlier are intact: free some space and run again"))
        if isinstance(error, OSError) and None not in (error.filename, error.strerror):
            leave(fail(f"{error.filename}: {error.strerror}"))
        if leave is sys.exit:
            raise
        sys.excepthook(*sys.exc_info())  # prints the traceback
        leave(1)
    except KeyboardInterrupt:
        if (os.environ.get("RANK") or "0") == "0":
            print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        leave(128 + signal.SIGINT)
    leave(0)


def discard(stream: typing.TextIO) -> None:
    """Drops what a stream still holds; else Python fails to write it at exit, with status 120."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def share_cores() -> None:
    """Lets OpenMP's threads sleep at barriers instead of spinning for a millisecond there: beside
    another busy process, training is 3 times as fast, alone 1 % slower. To be called before PyTorch
    is imported, since OpenMP (GNU's; LLVM's on macOS) then reads these variables. The cores of a
    node are divided among torchrun's ranks, to which it gives one each unless the user chose."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # iterations
        os.environ.setdefault("KMP_BLOCKTIME", "0")  # milliseconds
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    with contextlib.suppress(OSError):  # no /proc, as on macOS, or not to be read
        given = Path(f"/proc/{os.getppid()}/environ").read_bytes()  # torchrun's own variables
        if ranks.isdecimal() and b"OMP_NUM_THREADS=" not in given:
            threads = len(os.sched_getaffinity(0)) // max(1, int(ranks))
            os.environ["OMP_NUM_THREADS"] = str(max(1, threads))


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is an out-of-memory error of any device."""
    return error is not None and (
        isinstance(error, MemoryError) or is_out_of_memory(error.__cause__)
        or (isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))))


def fail(message: str) -> int:
    """Prints an error, returns 2. Ranks wait: if rank 0, or their node's first, fails, they end."""
    rank = os.environ.get("RANK") or "0"
    if rank != "0":
        time.sleep(RANK_DELAY_S * (2 if rank != os.environ.get("LOCAL_RANK", rank) != "0" else 1))
        message += f" (rank {rank})"
    message = message.replace("\n", "\\n")  # a path may hold one
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    return 2
