"""The command line of a frozen dataclass: a field is declared once, with its type, default, group, help and bounds.

``parse`` makes flags of the fields with cyclopts: the types say what a value may be, a ``Literal`` which words. (jsonargparse was tried:
a file named behind a flag wins over it, its errors do not name the file, and TOML needs a parser of its own. tyro groups only nested
classes, which would give a field and its flag two names.) A field whose default the recipe decides is ``None`` until ``check`` fills it
in, so a flag, a key of ``--config`` or an argument that was given always wins over the recipe.
"""

import dataclasses
import functools
import inspect
import json
import math
import operator
import os
import pathlib
import sys
import types
import typing
from collections.abc import Callable

import tli
from tli.runtime.errors import TliError, one_line

if typing.TYPE_CHECKING:
    import cyclopts

# in the order in which --help shows them; "" stands for any other
_GROUPS = (
    "arguments",
    "grid",
    "model",
    "words",
    "vectors",
    "measures",
    "language model",
    "table",
    "adapter",
    "objective",
    "training",
    "tuning",
    "running",
    "",
    "output",
    "configuration",
    "commands",
)
_HYPHEN = "\0-"
# bounds of a number: how they are said, what must hold, and what to do where it does not
_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool], str]] = {
    "least": ("at least", operator.ge, "raise it"),
    "above": ("above", operator.gt, "raise it"),
    "most": ("at most", operator.le, "lower it"),
    "below": ("below", operator.lt, "lower it"),
}
_POSITIONAL: typing.Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
_KEYWORD: typing.Any = inspect.Parameter.KEYWORD_ONLY


def option(
    default,
    group: str,
    help: str,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    **recipes,
):
    """A field of a configuration.

    least, above, most, below   bounds of a number, which is always finite: ``least`` and ``most`` are allowed, ``above`` and ``below`` not
    recipes                     its value under ``--recipe`` of these names, where that differs; None stands for one that is left open
    """
    by_recipe = {"default": default, **recipes} if recipes else None
    bounds = {name: bound for name, bound in zip(_BOUNDS, (least, above, most, below)) if bound is not None}
    metadata = {"group": group, "help": help, "recipes": by_recipe, "bounds": bounds}
    return dataclasses.field(default=None if by_recipe else default, metadata=metadata)


def argument(help: str):
    """A field that must be given: on the command line it stands without a flag, in the order of the fields."""
    return dataclasses.field(metadata={"group": "arguments", "help": help, "recipes": None, "bounds": {}})


def flag(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def check(config) -> None:
    """Fill in what the recipe decides, make paths strings, and raise ``TliError`` for a word that is no choice, a number out of bounds."""
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        object.__setattr__(config, field.name, _without_paths(getattr(config, field.name)))
        metadata, value, words = field.metadata, getattr(config, field.name), _words(kinds[field.name])
        if words and isinstance(value, str) and value not in words:
            raise TliError(flag(field.name), f"the value must be one of {', '.join(words)}", repr(value), "choose one of these")
        if value is None and metadata["recipes"]:
            object.__setattr__(config, field.name, metadata["recipes"].get(config.recipe, metadata["recipes"]["default"]))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            _check_number(flag(field.name), value, metadata["bounds"])


def _check_number(where: str, value: float, bounds: dict[str, float]) -> None:
    must = f"the number must be {' and '.join(f'{_BOUNDS[name][0]} {bound}' for name, bound in bounds.items()) or 'finite'}"
    if not math.isfinite(value):
        raise TliError(where, must, value, "give a number")
    for name, bound in bounds.items():
        _, holds, remedy = _BOUNDS[name]
        if not holds(value, bound):
            raise TliError(where, must, value, remedy)


def _without_paths(value):
    """The value with strings in the place of paths."""
    if isinstance(value, tuple):
        return tuple(map(_without_paths, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def parse(config_class, module: str, arguments: list[str] | None = None, many_processes: bool = False):
    """Read the command line of ``python -m <module>`` into a ``config_class``; leaves with 2 on a wrong flag or value.

    many_processes: the command shares its work among torchrun's processes; of any other there must be one
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        # cyclopts takes a lone hyphen, which stands for standard input, for an option
        tokens = [_HYPHEN if argument == "-" else argument for argument in arguments]
        make, given, named = answer(application(config_class, module, _config_file(arguments)), tokens)
        given, named = tuple(map(_with_hyphens, given)), {name: _with_hyphens(value) for name, value in named.items()}
        shown = named.pop("print_config", False)
        named.pop("config", None)
        config = make(*given, **named)
        if not many_processes:
            _require_one_process(module)
    except TliError as error:
        _leave(str(error))
    if shown:
        import yaml

        # what follows from other options and was not given stays open, so that it follows them where the file is read, too
        kept = {field.name for field in dataclasses.fields(config) if field.default is not None or field.metadata["recipes"]}
        options = {name: value if name in kept or name in named else None for name, value in as_dict(config).items()}
        # tuples as lists
        print(yaml.safe_dump(json.loads(json.dumps(options)), sort_keys=False, allow_unicode=True), end="")
        sys.exit(0)
    return config


def _with_hyphens(value: typing.Any) -> typing.Any:
    return tuple(map(_with_hyphens, value)) if isinstance(value, tuple) else "-" if value == _HYPHEN else value


def answer(app: "cyclopts.App", arguments: list[str]) -> tuple[Callable, tuple, dict[str, typing.Any]]:
    """The app's function with what to call it with; leaves after ``--help`` and ``--version``, and with 2 on a wrong command line."""
    import cyclopts

    try:
        function, bound, _ = app.parse_args(arguments, print_error=False, exit_on_error=False)
    except cyclopts.CycloptsError as error:
        _leave(f"{app.name[0]}: the command line must be valid, got {' '.join(str(error).split()).rstrip('.')}; see --help")
    if function is app.default_command:
        return function, bound.args, dict(bound.kwargs)
    function(*bound.args, **bound.kwargs)
    sys.exit(0)


def appearance() -> dict[str, typing.Any]:
    """What all commands' apps have in common."""
    return {
        "help_flags": ("--help", "-h"),
        "version_flags": "--version",
        "version": f"tli {tli.__version__}",
        "help_format": "plaintext",
        "help_formatter": _plain_tables(),
        "group_commands": _group("commands"),
    }


def application(config_class, module: str, config_file: pathlib.Path | None = None) -> "cyclopts.App":
    """The cyclopts app of a command, whose function makes the configuration.

    Raises:
        TliError: the file is not there or cannot be read.
    """
    import cyclopts

    sources: list[typing.Any] = []
    if config_file is not None:
        kind = cyclopts.config.Toml if config_file.suffix == ".toml" else cyclopts.config.Yaml
        sources = [kind(config_file, must_exist=True, search_parents=False)]
        try:
            # read now, so that what is wrong with it is said of it
            sources[0].config  # noqa: B018
        except Exception as error:
            must = "the file must be YAML or TOML of a command's options"
            raise TliError("--config", must, f"{config_file}: {one_line(error)}", "begin with what --print-config prints") from error
    example = f"Example: {config_class.EXAMPLE.format(prog=program(module))}" if hasattr(config_class, "EXAMPLE") else None
    app = cyclopts.App(
        name=program(module),
        usage=f"Usage: {' '.join([program(module), *_positional(config_class), '[OPTIONS]'])}",
        help=config_class.__doc__,
        help_epilogue=example,
        config=sources,
        **appearance(),
    )
    app.default(_function(config_class))
    return app


@functools.cache
def _group(name: str) -> "cyclopts.Group":
    """The group of this name, one object for all commands."""
    import cyclopts

    return cyclopts.Group(name, sort_key=_GROUPS.index(name) if name in _GROUPS else _GROUPS.index(""))


def _plain_tables():
    """The form of ``--help``: groups without boxes, so that a narrow terminal and a pager show it, too."""
    from cyclopts.help import DefaultFormatter, PanelSpec
    from rich import box

    return DefaultFormatter(panel_spec=PanelSpec(box=box.SIMPLE_HEAD, padding=(0, 0), border_style="none", expand=False))


def _function(config_class) -> Callable:
    """``config_class`` as a function with a parameter for each field, and for ``--config`` and ``--print-config``."""
    from cyclopts import Parameter

    kinds, parameters = typing.get_type_hints(config_class), []
    for field in dataclasses.fields(config_class):
        kind, default = kinds[field.name], field.default
        several = typing.get_origin(kind) is tuple
        # what stands without a flag
        how = _POSITIONAL if several or default is dataclasses.MISSING else _KEYWORD
        kind = kind | None if default is None else kind
        told = Parameter(
            group=_group(field.metadata["group"]),
            help=field.metadata["help"] + _default_text(field),
            show_default=False,
            show_env_var=False,
            # of a flag that is repeated the last counts: an alias can be overridden
            allow_repeating=None if several else True,
            negative=() if several or field.name.startswith("no_") else None,
        )
        default = inspect.Parameter.empty if default is dataclasses.MISSING else default
        parameters.append(inspect.Parameter(field.name, how, default=default, annotation=typing.Annotated[kind, told]))
    own: dict[str, typing.Any] = {"group": _group("configuration"), "show_default": False, "negative": ()}
    further: tuple[tuple[str, typing.Any, typing.Any, str], ...] = (
        ("config", pathlib.Path | None, None, "a YAML or TOML file of these options; flags win"),
        ("print_config", bool, False, "print what would be run, as a file for --config, and stop"),
    )
    for name, kind, default, help in further:
        annotation = typing.Annotated[kind, Parameter(help=help, **own)]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter(name, _KEYWORD, default=default, annotation=annotation))

    signature = inspect.Signature(sorted(parameters, key=lambda one: one.kind))

    def make(*given, **named):
        return config_class(**signature.bind(*given, **named).arguments)

    make.__signature__ = signature  # type: ignore[attr-defined]
    return make


def _positional(config_class) -> list[str]:
    """What stands without a flag, as the usage shows it: ADAPTER for a field that must be given, [ADAPTER ...] for a tuple."""
    kinds, shown = typing.get_type_hints(config_class), []
    for field in dataclasses.fields(config_class):
        if typing.get_origin(kinds[field.name]) is tuple:
            shown.append(f"[{field.name.removesuffix('s').upper()} ...]")
        elif field.default is dataclasses.MISSING:
            shown.append(field.name.upper())
    return shown


def program(module: str) -> str:
    """A command's name: ``tli.train`` is ``tli train`` as the console command, else ``python -m tli.train``."""
    return module.replace(".", " ", 1) if pathlib.Path(sys.argv[0]).stem == "tli" else f"python -m {module}"


def _config_file(arguments: list[str]) -> pathlib.Path | None:
    """The file that ``--config`` names; it must be known before the other flags are read, which win over it."""
    for i, given in enumerate(arguments):
        if given == "--config" and i + 1 < len(arguments):
            return pathlib.Path(arguments[i + 1])
        if given.startswith("--config="):
            return pathlib.Path(given.partition("=")[2])
    return None


def _require_one_process(module: str) -> None:
    """Raise ``TliError`` under torchrun with several processes, which would all do the same in the same folder."""
    processes = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    if processes != "1":
        raise TliError(module, "one process must do this", f"torchrun's WORLD_SIZE {processes}", "run it without torchrun")


def _leave(message: str) -> typing.NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _words(kind) -> tuple[str, ...]:
    """The words that a type allows: those of its ``Literal``, alone or among other kinds."""
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)
    parts = typing.get_args(kind) if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union else ()
    return tuple(word for part in parts for word in _words(part))


def _default_text(field: dataclasses.Field) -> str:
    if field.metadata["recipes"]:
        return f" ({'; '.join(f'{name}: {_shown(value)}' for name, value in field.metadata['recipes'].items())})"
    return "" if field.default in (None, (), False, dataclasses.MISSING) else f" (default: {_shown(field.default)})"


def _shown(value) -> str:
    # a space would not be seen
    return repr(value) if isinstance(value, str) and not value.strip() else str(value)


def print_json(config, facts: dict) -> None:
    """What ``--json`` asks for: one object on standard output."""
    if config.json:
        print(json.dumps(facts, allow_nan=False))


def as_dict(config) -> dict:
    """The resolved configuration as plain JSON values."""
    return {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in dataclasses.asdict(config).items()}
