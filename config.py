"""A frozen dataclass becomes a command line, and a user's mistake one line and exit status 2.

Every script declares what a user may choose as one frozen dataclass, one `flag(...)` a line.
`parse_config` derives the flags from it; `run_main` is the last line of every script.
"""

import argparse
import dataclasses
import errno
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

Config = typing.TypeVar("Config")  # the dataclass of one script
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class UserError(Exception):
    """What is wrong, what was got, what was expected, and the flag or command that mends it."""


def flag(default, help: str, *, minimum: float | None = None, positional: bool = False):
    """A dataclass field that `parse_config` turns into `--field-name` (or a positional)."""
    return dataclasses.field(
        default=default, metadata={"help": help, "minimum": minimum, "positional": positional}
    )


class OneLineParser(argparse.ArgumentParser):
    """argparse without the usage block in front of its errors."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def parse_config(cls: type[Config], argv: Sequence[str] | None = None, *,
                 description: str) -> Config:
    """Builds `cls` from `argv` (default: the command line); unknown or abbreviated flags exit 2.

    Supported field types: int, float, str, bool (`--x/--no-x`), Literal[...], any of these
    `| None`, and tuple[str, ...] for a positional that takes any number of values.
    """
    parser = OneLineParser(
        description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        add_argument(parser, field, hints[field.name])
    values = vars(parser.parse_args(argv))
    for field in dataclasses.fields(cls):
        minimum, value = field.metadata["minimum"], values[field.name]
        if minimum is not None and value is not None and not value >= minimum:
            parser.error(f"{flag_name(field.name)} is {value}, expected at least {minimum}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def add_argument(parser: argparse.ArgumentParser, field: dataclasses.Field, hint) -> None:
    required = field.default is dataclasses.MISSING
    default = None if required else field.default
    shown = "" if required or default in (None, "", ()) else f" (default: {default})"
    options = {"help": (field.metadata["help"] + shown).replace("%", "%%")}
    if isinstance(hint, types.UnionType):  # `int | None`: the flag takes an int, its absence None
        hint = next(arm for arm in hint.__args__ if arm is not types.NoneType)
    if field.metadata["positional"]:
        parser.add_argument(field.name, nargs="*", **options)
        return
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(hint) is typing.Literal:
        options["choices"] = typing.get_args(hint)
    else:
        options["type"] = hint
    parser.add_argument(flag_name(field.name), default=default, required=required, **options)


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def run_main(main: Callable[[], None]) -> typing.NoReturn:
    """Runs a script's `main`: a UserError or a full disk is one line and exit 2, no traceback."""
    rank = os.environ.get("RANK", "0")
    prefix = Path(sys.argv[0]).name + ("" if rank == "0" else f" [rank {rank}]")
    try:
        main()
    except UserError as error:
        sys.exit(fail(prefix, str(error)))
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        sys.exit(fail(prefix, f"no space left while writing {error.filename or 'output'}; "
                              "what was finished earlier is whole: free space and run again"))
    except KeyboardInterrupt:
        print(f"{prefix}: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def first_line(error: BaseException) -> str:
    """What a library's error says, short enough for one line of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def fail(prefix: str, message: str) -> int:
    print(f"{prefix}: error: {message}", file=sys.stderr, flush=True)
    return 2
