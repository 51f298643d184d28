"""Command lines: flags with their defaults in --help, and mistakes of the user as one line."""

import argparse
import math
import os
import sys


class UserError(Exception):
    """The caller's mistake: shown as one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    """--help shows the module's docstring and every default; a bad flag is a UserError."""

    def __init__(self, doc=None, usage="%(prog)s [flags]", **options):
        super().__init__(description=doc, usage=usage, formatter_class=_Help, allow_abbrev=False,
                         **options)

    def error(self, message):
        raise UserError(message)


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        if (not action.option_strings or "(default: " in action.help
                or action.default is argparse.SUPPRESS):
            return action.help
        words = {"False": "off", "True": "on", "None": "none"}
        return f"{action.help} (default: {words.get(str(action.default), action.default)})"

    def _get_default_metavar_for_optional(self, action):
        kind = getattr(action.type, "__name__", None)
        return {"int": "N", "float": "X"}.get(kind, action.dest.upper())


def between(low, high=math.inf, kind=float):
    """The type of a flag that is a number in low … high."""
    def number(text):
        x = kind(text)  # argparse reports its ValueError
        if not (low <= x <= high and (x < math.inf or high == math.inf and kind is float)):
            end = f"be at least {low:g}" if high == math.inf else f"lie in {low:g} … {high:g}"
            raise argparse.ArgumentTypeError(f"{text}: must {end}")
        return x

    number.__name__ = kind.__name__
    return number


at_least_one = between(1, 10 ** 9, int)
a_seed = between(0, 2 ** 31, int)


def a_temperature(text):
    """The type of a flag: 0 (greedy) or 0.001 … 100."""
    return float(text) if text in ("0", "0.0") else between(1e-3, 100)(text)


def command_line(main, interrupted="interrupted"):
    """Run `main`: the user's mistakes and Ctrl-C become one line on stderr; a plain ValueError is a
    bug and keeps its traceback (GameError and DataError are kinds of it)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # where the terminal has no π
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has left: `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, ValueError, OSError) as error:
        if os.environ.get("TRACEBACK") or type(error) is ValueError:
            raise
        print(f"error: {error}".splitlines()[0][:500], file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)
