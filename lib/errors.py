"""What a user can do wrong: one exception, and one way for a command to report it."""

import io
import os
import reprlib
import signal
import sys
from collections.abc import Callable
from typing import Any

LONGEST = 40  # characters that a message quotes
SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother, SHORT.maxlong = 3, LONGEST, LONGEST, LONGEST


class InputError(ValueError):
    """A file, flag or array that does not fit. The message is one line: where, what was found, what was expected."""


def brief(value: Any) -> str:
    """A value as ASCII text of at most 40 characters on one line; of an array its shape and type."""
    if getattr(value, "shape", ()):
        return f"an array {value.shape} of {value.dtype}"
    try:
        text = SHORT.repr(value)  # repr alone would spell out all of a list in a list in a list …
    except (ValueError, RecursionError):  # a number of thousands of digits
        return f"a large {type(value).__name__}"
    return " ".join(text.encode("ascii", "backslashreplace").decode()[:LONGEST].split())


def report(message: str) -> None:
    """Print `error: message` on stderr and leave with status 2."""
    print("error: " + message, file=sys.stderr)
    sys.exit(2)


def make_streams_safe() -> None:
    """Have stdout and stderr print what they cannot encode as escapes; where there is no stderr, messages are lost."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run(main: Callable[[], Any]) -> None:
    """Call main(), the body of a command line.

    An InputError, an OSError or a GPU that is out of memory becomes one line on stderr and exit status 2, Ctrl-C status
    130, SIGTERM in training 143.
    """
    make_streams_safe()
    try:
        main()
    except InputError as error:
        report(str(error).strip())
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader (head, less) went away
        sys.exit(1)
    except OSError as error:
        report(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except RuntimeError as error:
        torch = sys.modules.get("torch")
        if not torch or not isinstance(error, torch.OutOfMemoryError):
            raise
        report(f"{str(error).splitlines()[0]} A smaller --batch_size takes less.")
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
