"""A frozen dataclass becomes a command line, and a user's mistake one line and exit status 2.

Every script declares what a user may choose as one frozen dataclass, one `flag(...)` a line.
`parse_config` derives the flags from it; `run_main` is the last line of every script.
"""

import argparse
import dataclasses
import errno
import functools
import math
import os
import signal
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

Config = typing.TypeVar("Config")  # the dataclass of one script
LATER_RANKS_WAIT = 3.0  # seconds
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class UserError(Exception):
    """What is wrong, what was got, what was expected, and the flag or command that mends it."""


def flag(default, help: str, *, minimum: float | None = None, below: float = math.inf,
         positional: bool = False, may_be_empty: bool = False):
    """A dataclass field that `parse_config` turns into `--field-name` (or a positional). A number
    has to be at least `minimum`, less than `below`, and finite; a text may not be empty (a shell's
    variable that is not set), unless said otherwise."""
    return dataclasses.field(default=default, metadata={
        "help": help, "minimum": minimum, "below": below, "positional": positional,
        "may_be_empty": may_be_empty})


class OneLineParser(argparse.ArgumentParser):
    """argparse without the usage block in front of its errors."""

    def error(self, message: str) -> typing.NoReturn:
        sys.exit(fail(f"{message} (--help lists the flags)"))


def parse_config(cls: type[Config], argv: Sequence[str] | None = None, *,
                 description: str) -> Config:
    """Builds `cls` from `argv` (default: the command line); unknown or abbreviated flags exit 2.

    Supported field types: int, float, str, bool (`--x/--no-x`), Literal[...], int | Literal[...]
    (a number or one of a few words), any of these `| None`, and tuple[str, ...] for a positional
    that takes any number of values.
    """
    parser = OneLineParser(
        description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        add_argument(parser, field, hints[field.name])
    values = vars(parser.parse_intermixed_args(argv))  # flags between positionals, too
    for field in dataclasses.fields(cls):
        minimum, below, value = (*map(field.metadata.get, ("minimum", "below")), values[field.name])
        number = isinstance(value, int | float)  # not None, nor the word of an `int | Literal`
        if minimum is not None and number and not minimum <= value < below:
            limit = "" if below == math.inf else f" and less than {below}"
            parser.error(f"{flag_name(field.name)} is {value}, expected a finite number of at "
                         f"least {minimum}{limit}")
        if value == "" and not field.metadata["may_be_empty"]:
            parser.error(f"{flag_name(field.name)} is empty")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def add_argument(parser: argparse.ArgumentParser, field: dataclasses.Field, hint) -> None:
    required = field.default is dataclasses.MISSING
    default = None if required else field.default
    shown = "" if required or default in (None, "", ()) else f" (default: {default})"
    options = {"help": (field.metadata["help"] + shown).replace("%", "%%")}
    # `int | None` is a flag that takes an int, and None where it is absent. Python has two classes
    # for unions: `int | Literal["auto"]` is of typing's, before 3.14.
    arms = [hint]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        arms = [arm for arm in typing.get_args(hint) if arm is not types.NoneType]
        hint = arms[0]
    if field.metadata["positional"]:
        parser.add_argument(field.name, nargs="*", **options)
        return
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif len(arms) == 2:  # int | Literal[...]
        options["type"] = functools.partial(int_or_word, words=typing.get_args(arms[1]))
    elif typing.get_origin(hint) is typing.Literal:
        options["choices"] = typing.get_args(hint)
    else:
        options["type"] = hint
    parser.add_argument(flag_name(field.name), default=default, required=required, **options)


def int_or_word(text: str, words: tuple[str, ...]) -> int | str:
    """The value of an `int | Literal[...]` flag."""
    if text in words:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a whole number nor {' nor '.join(words)}") from None


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def run_main(main: Callable[[], None]) -> typing.NoReturn:
    """Runs a script's `main`: a UserError, or a file that the system refuses to read or to write,
    is one line and exit 2, no traceback."""
    if sys.stderr is None:  # closed by the caller
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, open to the end
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # where a terminal has not every letter
    try:
        main()
    except UserError as error:
        sys.exit(fail(str(error)))
    except BrokenPipeError:  # of `| head`: who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno in NO_SPACE:
            sys.exit(fail(f"no space left while writing {error.filename or 'output'}; what was "
                          "finished earlier is whole: free space and run again"))
        if error.filename is None or error.strerror is None:
            raise
        sys.exit(fail(f"{error.filename}: {error.strerror}"))
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def first_line(error: BaseException) -> str:
    """What a library's error says, short enough for one line of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def fail(message: str) -> int:
    """Says what is wrong; of several ranks that find the same, rank 0 alone: the others give
    torchrun the time to end them."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(LATER_RANKS_WAIT)
        message += f" (rank {rank})"
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    return 2
