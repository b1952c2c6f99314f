"""``tli train --rank 16`` or ``python -m tli train --rank 16``: every command under one name, as ``python -m tli.train`` runs it."""

import importlib
import sys
from typing import Any

import tli
from tli import config
from tli.runtime import cli
from tli.runtime.errors import TliError, run_command

COMMANDS = {
    "train": config.TrainConfig,
    "scan": config.ScanConfig,
    "map": config.MapConfig,
    "evaluate": config.EvaluateConfig,
    "study": config.StudyConfig,
    "export": config.ExportConfig,
    "memory": config.MemoryConfig,
    "tune": config.TuneConfig,
    "lexicon": config.LexiconConfig,
    "starter": config.StarterConfig,
}
_COMPLETION = "--completion"
_SHELLS: tuple[Any, ...] = ("bash", "zsh", "fish")


def main(argv: list[str] | None = None) -> None:
    """Run the command that the first argument names, with the others."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        importlib.import_module(f"tli.{name}").main(rest)
    elif name == _COMPLETION:
        shell = (rest or ["none"])[0]
        if shell not in _SHELLS:
            raise TliError(_COMPLETION, f"the shell must be one of {', '.join(_SHELLS)}", shell, "name one of these")
        print(_application().generate_completion(shell=shell))
    else:
        cli.answer(_application(), [name, *rest])


def _application():
    """All commands as one cyclopts app: for its help, its errors and the shell's completion."""
    import cyclopts

    app = cyclopts.App(
        name="tli",
        help=(tli.__doc__ or "").partition("\n")[0],
        help_epilogue=f'tli COMMAND --help lists a command\'s options. Completion: eval "$(tli {_COMPLETION} bash)", or zsh or fish.',
        **cli.appearance(),
    )
    for place, (name, kind) in enumerate(COMMANDS.items()):
        own = cli.application(kind, f"tli.{name}")
        own.sort_key = place
        app.command(own, name=name)
    app["study"].command(cli.application(config.ProtocolConfig, "tli.study protocol"), name="protocol")
    return app


def command() -> None:
    """The console script."""
    run_command(main)


if __name__ == "__main__":
    command()
