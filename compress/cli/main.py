"""The ``compress`` command: its subcommands, exit codes and error messages."""

import sys
import traceback
from typing import Any

import click

from compress import __version__
from compress.cli import DONE, FAILED, INTERRUPTED, WRONG_INPUT
from compress.errors import CompressError, UnmetBudgetError, unknown_name

# Subcommand -> the module and function that hold it; imported when it is called, so that --help is quick.
COMMANDS = {
    "run": ("compress.cli.run", "Run passes over a model and print what each step cost and bought."),
    "eval": ("compress.cli.inspect", "Measure EER, minDCF and threshold of a model on a trial list."),
    "bench": ("compress.cli.inspect", "Time models side by side."),
    "compare": ("compress.cli.inspect", "Print the tables of several runs as one."),
    "check": ("compress.cli.inspect", "Verify an artifact folder: hashes, and golden outputs on this machine."),
    "lint": ("compress.cli.lint", "Check an ONNX graph against what a target's parser demands."),
    "embed": ("compress.cli.inspect", "Compute the embedding of audio files."),
    "verify": ("compress.cli.inspect", "Compare the speakers of two audio files."),
    "threshold": ("compress.cli.threshold", "Fit thresholds, log-odds and AS-Norm to trials, and store them."),
    "passes": ("compress.cli.lists", "List the passes and their settings."),
    "models": ("compress.cli.lists", "List the networks known by name."),
    "doctor": ("compress.cli.doctor", "Tell what this machine can run, what is missing, and whether INT8 pays."),
    "data": ("compress.cli.data", "Check data folders; make them from corpora."),
    "train": ("compress.cli.train", "Train a network from a recipe."),
}

# For the help page, which does not import the passes: they import PyTorch.
OWN_PASSES = ("prune", "distill", "finetune", "onnx", "optimize", "ptq", "trt", "openvino")


class LazyGroup(click.Group):
    """A group whose subcommands are imported when called; every pass is a subcommand too."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the help page."""
        from compress.passes import passes

        return [*COMMANDS, *(name for name in passes() if name not in COMMANDS)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a subcommand, or build it from a pass."""
        if cmd_name in COMMANDS:
            module = __import__(COMMANDS[cmd_name][0], fromlist=[cmd_name])
            command: click.Command = getattr(module, f"{cmd_name}_command")
            return command
        from compress.cli.one_pass import command_of
        from compress.passes import passes

        if cmd_name in passes():
            return command_of(passes()[cmd_name])
        raise unknown_name("command", cmd_name, [*COMMANDS, *passes()])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_text) for name, (_, help_text) in COMMANDS.items()])
        with formatter.section("One pass alone: MODEL in, artifact folder out"):
            formatter.write_text(f"{', '.join(OWN_PASSES)}, and any other that `compress passes` lists")


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="compress")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Compress speech models: prune, quantize, export, and measure every step."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a step failed, 2 wrong usage or input, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    sys.exit(exit_code(given))


def exit_code(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    debug = "--debug" in arguments  # wherever it stands: it is typed after the command that went wrong
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        outcome: Any = cli.main(args=arguments, prog_name="compress", standalone_mode=False)
        return outcome if isinstance(outcome, int) else DONE
    except CompressError as error:
        if debug:
            traceback.print_exc()
        click.echo(f"error: {error}", err=True)
        return FAILED if isinstance(error, UnmetBudgetError) else WRONG_INPUT
    except click.ClickException as error:
        error.show()
        return WRONG_INPUT
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted.", err=True)
        return INTERRUPTED
    except ImportError as error:
        if not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        click.echo("interrupted.", err=True)  # while a native module was loaded, which reports it as its own failure
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, closed standard output
        sys.stderr.close()
        return DONE
