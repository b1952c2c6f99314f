"""Every number that a command takes is finite and has its bounds declared where it is declared itself."""

import dataclasses
import math
import typing

import pytest

from tli import config
from tli.runtime.cli import flag
from tli.runtime.errors import TliError

# what a model, a list or a text bounds, where it is read
_BOUNDED_ELSEWHERE = {"layer", "sample", "window"}
_GIVEN = {"EvaluateConfig": {"adapters": ("adapter",)}, "ExportConfig": {"adapter": "adapter", "output": "merged"}}


def numbers() -> list:
    """A parameter for each field that may be a number, of each command's options."""
    classes = [kind for kind in vars(config).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    return [
        pytest.param(kind, field, id=f"{kind.__name__}-{field.name}")
        for kind in classes
        if kind.__module__ == config.__name__
        for field in dataclasses.fields(kind)
        if {int, float} & {typing.get_type_hints(kind)[field.name], *typing.get_args(typing.get_type_hints(kind)[field.name])}
    ]


@pytest.mark.parametrize(("kind", "field"), numbers())
def test_a_number_beyond_its_bounds_is_refused(kind, field):
    def refused(value: float) -> None:
        with pytest.raises(TliError, match=f"^{flag(field.name)}: the number must be .*, got "):
            kind(**_GIVEN.get(kind.__name__, {}), **{field.name: value})

    bounds = field.metadata["bounds"]
    if field.name not in _BOUNDED_ELSEWHERE:
        assert bounds.keys() & {"least", "above"}
    beyond = {"least": lambda bound: bound - 1, "above": lambda bound: bound, "most": lambda bound: bound + 1, "below": lambda bound: bound}
    for name, bound in bounds.items():
        refused(beyond[name](bound))
    if float in {typing.get_type_hints(kind)[field.name], *typing.get_args(typing.get_type_hints(kind)[field.name])}:
        for value in (math.nan, math.inf, -math.inf):
            with pytest.raises(TliError, match=f"^{flag(field.name)}: the number must be .*, got (nan|inf|-inf); give a number"):
                kind(**_GIVEN.get(kind.__name__, {}), **{field.name: value})
