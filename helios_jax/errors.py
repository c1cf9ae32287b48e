"""User mistakes: one clear line, a non-zero exit code, no traceback.

Library code raises :class:`UserError` for everything that a user can mend (a wrong size, a missing file, a
foreign checkpoint). The line names the field, the value received and what is allowed. Programs wrap their
``main`` in :func:`command_line`, which turns that exception into one line on stderr and exit code 2.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable

NOT_FINITE = "frames: got NaN or infinity, need finite numbers (a 16-bit run may have overflowed)"


class UserError(ValueError):
    """A mistake of the user: the message is one line that says what is wrong and what is allowed."""


def command_line(main: Callable[..., int | None]) -> Callable[..., None]:
    """Wraps a program's ``main``: prints a :class:`UserError` as one line and exits with code 2.

    Any other exception is a defect of this project and keeps its traceback. Ctrl-C exits with code 130. Where the
    reader of stdout has gone (``| head``) the program ends with code 1 and says nothing.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        try:
            try:
                code = main(*args, **kwargs)
            except SystemExit as end:  # argparse's --help
                code = end.code
            sys.stdout.flush()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's own flush complains
            sys.exit(1)
        sys.exit(code or 0)

    return run
