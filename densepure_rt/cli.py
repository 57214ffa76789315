"""The command line: options in, one call, one printed result. Nothing is computed here."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from densepure_rt import logs, signals
from densepure_rt._version import __version__
from densepure_rt.commands.audit import audit
from densepure_rt.commands.bench import bench
from densepure_rt.commands.certify import certify
from densepure_rt.commands.compare import compare
from densepure_rt.commands.console import in_options, speak_for, stderr, stdout
from densepure_rt.commands.doctor import doctor
from densepure_rt.commands.export import export
from densepure_rt.commands.import_results import import_
from densepure_rt.commands.inspect import inspect
from densepure_rt.commands.merge import merge
from densepure_rt.commands.parity import parity
from densepure_rt.commands.predict import predict
from densepure_rt.commands.replay import replay
from densepure_rt.commands.report import report
from densepure_rt.commands.reveal import reveal
from densepure_rt.commands.serve import serve
from densepure_rt.errors import DensePureError, EnvironmentFault
from densepure_rt.runtime.native_calls import leaving_calls
from densepure_rt.text import printable

READER_GONE = 141  # 128 + SIGPIPE, as of a program that the signal ends
UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF, errno.EPIPE, errno.EROFS)


class Commands(TyperGroup):
    """Ctrl-C, or a signal that means the same, ends anywhere in one line and the shell's exit code for it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            stderr.print("stopped")
            raise typer.Exit(signals.exit_code()) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Certified-robust classification by diffusion purification and voting (DensePure), on ONNX engines.",
)


@app.callback(invoke_without_command=True)
def densepure_rt(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        stdout.print(__version__)
        raise typer.Exit


app.command()(certify)
app.command()(predict)
app.command()(serve)
app.command()(export)
app.command()(parity)
app.command()(bench)
app.command()(report)
app.command()(compare)
app.command()(merge)
app.command()(audit)
app.command()(replay)
app.command()(reveal)
app.command("import")(import_)
app.command()(inspect)
app.command()(doctor)
speak_for(app)


@leaving_calls
def main() -> None:
    """Run the command line: any error, also of output that cannot be written, is one message and its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where the terminal knows fewer characters
    if sys.stderr is None:  # closed by whoever started it: print would take stdout instead
        sys.stderr = io.TextIOWrapper(io.FileIO(os.devnull, "w"))
    code = ended()
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        code = code or not_written(error)
    sys.exit(code or (EnvironmentFault.exit_code if logs.lost() else 0))


def ended() -> int:
    """Run the command. Returns its exit code, and says of an error what it is."""
    out = sys.stdout
    try:
        with signals.asking_to_end():
            app()
    except KeyboardInterrupt:  # between a command's end and ours
        tell("stopped")
        return signals.exit_code()
    except SystemExit as exit:
        if sys.stdout is not out:  # click puts another in its place when who reads it is gone
            return READER_GONE
        if exit.code and signals.asked():  # click makes 1 of an interrupt that comes before or after a command
            return signals.exit_code()
        return int(exit.code or 0)
    except DensePureError as error:
        tell("stopped" if signals.swallowed() else printable(f"error: {in_options(str(error))}", keep="\n"))
        return signals.exit_code() if signals.asked() else error.exit_code
    except MemoryError:
        tell("error: this does not fit into memory: ask for a smaller --batch")
        return EnvironmentFault.exit_code
    except OSError as error:
        if error.errno in UNWRITTEN:
            return not_written(error)
        where = "" if error.filename is None else f"{error.filename}: "
        tell(printable(f"error: {where}{error.strerror or error}"))
        return EnvironmentFault.exit_code
    except Exception:  # compiled code makes errors of many kinds of an interrupt: any other is a fault of ours
        if not signals.asked():
            raise
        tell("stopped")
        return signals.exit_code()
    return 0


def not_written(error: OSError) -> int:
    """Say that output could not be written, unless its reader is gone: `| head` has had enough."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError):  # of a stream that is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit stays quiet
    if isinstance(error, BrokenPipeError):
        return READER_GONE
    where = error.filename or "the output"
    tell(printable(f"error: cannot write {where} ({error.strerror}): what was done before it is kept"))
    return EnvironmentFault.exit_code


def tell(message: str) -> None:
    """Print on stderr, if that takes it."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr)
