"""What turns a frozen dataclass into a command line: a field is declared once, with its default, its group and its help.

``parse`` makes of the fields of any such class flags of the same names with argparse. (tyro was tried: it groups only nested classes,
which would give a field and its flag two names, and its errors are boxes where one line is wanted.) A field whose default the recipe
decides is ``None`` until ``fill_by_recipe`` fills it in, so a flag or an argument that was given always wins over the recipe.
"""

import argparse
import dataclasses
import os
import pathlib
import sys
import types
import typing

import tli
from tli.runtime.errors import TliError


def option(default, group: str, help: str, paper=dataclasses.MISSING, choices: tuple[str, ...] = ()):
    """A configuration field. ``paper`` is its value under ``--recipe paper`` where that differs."""
    by_recipe = paper is not dataclasses.MISSING
    metadata = {"group": group, "help": help, "choices": choices, "recipes": {"default": default, "paper": paper} if by_recipe else None}
    return dataclasses.field(default=None if by_recipe else default, metadata=metadata)


def argument(help: str):
    """A field that must be given: on the command line it stands without a flag, in the order of the fields."""
    return dataclasses.field(metadata={"group": "arguments", "help": help, "choices": (), "recipes": None})


def fill_by_recipe(config) -> None:
    for field in dataclasses.fields(config):
        if field.metadata["recipes"] and getattr(config, field.name) is None:
            object.__setattr__(config, field.name, field.metadata["recipes"][config.recipe])


def check_choices(config) -> None:
    """Raise ``TliError`` for a field whose value is not among its choices."""
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata["choices"]
        if choices and value is not None and value not in choices:
            raise TliError(
                f"--{field.name.replace('_', '-')}", f"the value must be one of {', '.join(choices)}", repr(value), "choose one of these"
            )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        print(f"error: {self.prog}: the command line must be valid, got {message}; see --help", file=sys.stderr)
        sys.exit(2)


def parse(config_class, module: str, arguments: list[str] | None = None, many_processes: bool = False):
    """Read the command line of ``python -m <module>`` into a ``config_class``; leaves with 2 on a wrong flag or value.

    many_processes: the command shares its work among torchrun's processes; of any other there must be one
    """
    # as the console command ``tli``, ``tli.train`` is called ``tli train``
    prog = module.replace(".", " ", 1) if pathlib.Path(sys.argv[0]).stem == "tli" else f"python -m {module}"
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [options]",
        description=config_class.__doc__,
        formatter_class=_help_format,
        allow_abbrev=False,
    )
    kinds = typing.get_type_hints(config_class)
    groups: dict[str, typing.Any] = {}
    for field in dataclasses.fields(config_class):
        group = field.metadata["group"]
        groups.setdefault(group, parser.add_argument_group(group) if group not in groups else None)
        flag, help_text = f"--{field.name.replace('_', '-')}", field.metadata["help"] + _default_text(field)
        if typing.get_origin(kinds[field.name]) is tuple:
            # what stands without a flag: ADAPTER for the field ``adapters``
            name = field.name.removesuffix("s").upper()
            parser.usage = f"{prog} [{name} ...] [options]"
            groups[group].add_argument(field.name, nargs="*", metavar=name, default=argparse.SUPPRESS, help=help_text)
        elif field.default is dataclasses.MISSING:
            # set as the parser was made
            assert parser.usage is not None
            parser.usage = parser.usage.replace("[options]", f"{field.name.upper()} [options]")
            groups[group].add_argument(field.name, metavar=field.name.upper(), help=help_text)
        elif kinds[field.name] is bool:
            action = argparse.BooleanOptionalAction if field.metadata["recipes"] else "store_true"
            groups[group].add_argument(flag, action=action, default=argparse.SUPPRESS, help=help_text)
        else:
            choices = field.metadata["choices"] or None
            kind = _plain_type(kinds[field.name])
            metavar = None if choices else kind.__name__.upper()
            groups[group].add_argument(flag, type=kind, choices=choices, metavar=metavar, default=argparse.SUPPRESS, help=help_text)
    parser.add_argument("--version", action="version", version=f"tli {tli.__version__}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(parser.parse_args(arguments)).items()}
    try:
        if not many_processes:
            _require_one_process(module)
        return config_class(**given)
    except TliError as error:
        parser.exit(2, f"error: {error}\n")


def _require_one_process(module: str) -> None:
    """Raise ``TliError`` under torchrun with several processes, which would all do the same in the same folder."""
    processes = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    if processes != "1":
        raise TliError(module, "one process must do this", f"torchrun's WORLD_SIZE {processes}", "run it without torchrun")


def _help_format(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=32)


def _plain_type(kind):
    """``int`` for ``int | None``: a flag that is given always carries a value. A word among numbers comes as it is."""
    kinds = [k for k in typing.get_args(kind) if k is not types.NoneType] or [kind]
    words = [word for k in kinds[1:] for word in typing.get_args(k)]
    if not words:
        return kinds[0]

    def number_or_word(text: str):
        return text if text in words else kinds[0](text)

    number_or_word.__name__ = "|".join([kinds[0].__name__, *words])
    return number_or_word


def _default_text(field: dataclasses.Field) -> str:
    if field.metadata["recipes"]:
        return " (default: {default}; paper: {paper})".format(**{name: _shown(value) for name, value in field.metadata["recipes"].items()})
    return "" if field.default in (None, (), dataclasses.MISSING) else f" (default: {_shown(field.default)})"


def _shown(value) -> str:
    # a space would not be seen
    return repr(value) if isinstance(value, str) and not value.strip() else str(value)


def as_dict(config) -> dict:
    """The resolved configuration as plain JSON values."""
    return {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in dataclasses.asdict(config).items()}
