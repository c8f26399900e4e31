"""Entry of the command line: parses, runs a command, and turns errors and signals into one line and an exit status."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence

import click

from cem_fast import __version__
from cem_fast.cli import commands, console, parser, torchrun
from cem_fast.cli.commands import COMMANDS, DATA_ROOT, SKIP_CORRUPT
from cem_fast.cli.signals import Terminated, clean_imports, heed_sigterm


@click.pass_context
def _start(ctx: click.Context) -> None:
    if ctx.invoked_subcommand is None:
        raise click.UsageError(f"expected one of the commands {', '.join(COMMANDS)}")


PROGRAM = parser.Program(
    "cem-fast",
    callback=_start,
    commands={**COMMANDS},
    help="Conditional entropy maximization against model inversion attacks.",
    epilog="cem-fast COMMAND --help lists the flags of a command.",
    invoke_without_command=True,
    no_args_is_help=False,
    subcommand_metavar="COMMAND ...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
click.version_option(__version__, message="cem-fast %(version)s", help="Show the version and exit.")(PROGRAM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the arguments after ``cem-fast``; None for those of this process.

    Returns:
        The exit status: 0; 1 for an error while running; 2 for a bad setting or bad input; 3 for a limit of an audit that fails;
        130 after Ctrl-C and 143 after SIGTERM, with finished runs kept.

    Example:
        >>> from cem_fast.cli.main import main
        >>> main(["train", "--help"]) == 0
        Usage: ...
        True
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    console.replace_what_cannot_be_printed()
    try:
        parsed = PROGRAM.main(arguments, "cem-fast", standalone_mode=False)
        if not isinstance(parsed, tuple):  # --help or --version
            return int(parsed or 0)
        function, values = parsed
        if values.get("data_root") is not None:
            os.environ[DATA_ROOT] = values["data_root"]  # also read by the worker processes of a grid
        if values.get("skip_corrupt"):
            os.environ[SKIP_CORRUPT] = "1"
        if function is not commands.train and torchrun.count() > 1:
            raise ValueError("torchrun starts cem-fast train alone; the other commands share the cores by --jobs")
        with clean_imports():
            import cem_fast.ops  # noqa: F401, imports torch and reads the environment variables of backends
        heed_sigterm()
        return int(function(command=shlex.join(["cem-fast", *arguments]), **values))
    except click.ClickException as error:
        known = {str(param.name) for command in COMMANDS.values() for param in command.params}
        console.fail(parser.explain(error, known))
        return 2
    except (KeyboardInterrupt, click.Abort):
        console.fail(f"interrupted{_kept(arguments)}")
        return 130
    except Terminated:
        console.fail(f"terminated{_kept(arguments)}")
        return 143
    except (ValueError, FileNotFoundError) as error:
        return _explain(error, status=2)
    except (FloatingPointError, OSError, MemoryError, ImportError) as error:
        return _explain(error, status=1)


def _kept(arguments: Sequence[str]) -> str:
    runs = "every run that had finished"
    kept = {
        "train": "the training up to its latest epoch, from which --resume continues,",
        "data": "what has been downloaded",
        "bench": "every race that had ended",
    } | dict.fromkeys(("demo", "evaluate", "figures", "tune"), runs)
    found = kept.get("".join(arguments[:1]))
    return "" if found is None else f"; {found} is kept"


def _explain(error: BaseException, *, status: int) -> int:
    if os.environ.get("CEM_FAST_DEBUG") == "1":
        traceback.print_exception(error)
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    console.fail(text)
    return status
