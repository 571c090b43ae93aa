"""The command line: a thin skin over the Python functions, its options generated from the settings.

`parser` says which commands and options there are, `commands` calls the functions, `texts` says what they found.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import NoReturn

from ..addresses import without_credentials
from ..ending import end_process
from ..errors import TiledsegError
from ..malloc import share_freed_memory
from .commands import COMMANDS
from .parser import make_parser

__all__ = ["command_line", "main"]

MISUSED = 2
UNREAD = 141
INTERRUPTED = 130
GARBAGE_OBJECTS = 20_000
"""New objects after which Python looks for garbage; 700 if left alone."""


def command_line() -> NoReturn:
    """`main` as a process of its own, which begins and ends half a second sooner for it.

    Python looks through all objects for garbage again and again while modules are imported, and takes them all apart at
    its end, when nothing is gained by it; torch alone has a million of them.
    """
    share_freed_memory()
    gc.set_threshold(GARBAGE_OBJECTS)
    try:
        code = main()
    except SystemExit as asked:
        if not isinstance(asked.code, int | None):
            raise
        code = asked.code or 0  # of argparse, which has said why
    atexit._run_exitfuncs()
    end_process(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 if compared labels differ, 2 for bad input."""
    options = make_parser().parse_args(arguments)
    with _messages():
        return _run(options)


@contextlib.contextmanager
def _messages() -> Iterator[None]:
    """Show what the package has to say while a command runs; other packages' logs stay as they are."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Cleaned("tiledseg: %(message)s"))
    logger = logging.getLogger("tiledseg")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Cleaned(logging.Formatter):
    """Messages without what gives access: what a program says is kept in files."""

    def format(self, record: logging.LogRecord) -> str:
        return without_credentials(super().format(record))


def _run(options: Namespace) -> int:
    """Run the chosen command; its errors become one sentence."""
    try:
        code = COMMANDS[options.command](options)
        sys.stdout.flush()
    except TiledsegError as error:
        if options.debug:
            raise
        print(without_credentials(f"tiledseg: {error}"), file=sys.stderr)
        return MISUSED
    except BrokenPipeError:
        # Whoever read the output, as `head`, has seen enough; Python would write the rest when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except KeyboardInterrupt:
        print(f"tiledseg: interrupted{options.if_interrupted}.", file=sys.stderr)
        return INTERRUPTED
    return code
