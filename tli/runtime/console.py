"""How a run speaks, shows how far it is, and stops cleanly when it is asked to: the console, bars and signals."""

import contextlib
import threading
import time
import typing
from collections.abc import Callable, Iterable, Iterator

from tli.runtime.errors import handle_stops, printable


class ShowStep(typing.Protocol):
    """What ``training_bar`` yields."""

    def __call__(self, step: int, loss: float, words: int) -> None: ...


def open_console(stderr: bool = True):
    """rich's console on standard error, or on standard output, that shows text as it is: ``[v2]`` in a path is no markup, and nothing in a
    name steers the terminal (``printable``).
    """
    from rich.console import Console
    from rich.segment import Segment

    class PlainConsole(Console):
        def render(self, renderable, options=None):
            for segment in super().render(renderable, options):
                # its own colours come later, and its cursor's moves are marked
                yield segment if segment.control else Segment(printable(segment.text), segment.style)

    return PlainConsole(stderr=stderr, highlight=False, markup=False, emoji=False)


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C, or another signal to end, sets; a second one ends the program at once."""
    stop = threading.Event()

    def handle(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    with handle_stops(handle):
        yield stop


@contextlib.contextmanager
def training_bar(console, total: int) -> Iterator[ShowStep]:
    """A bar of steps with the loss, words per second and the time left; yields what to call after each step.

    It is called with the steps done, the last one's loss and its words.
    """
    from rich.progress import TextColumn

    columns = TextColumn("loss {task.fields[loss]:.4f}"), TextColumn("{task.fields[speed]:,.0f} words/s")
    with _bar(console, "training", *columns) as bar:
        task, shown = bar.add_task("training", total=total, loss=float("nan"), speed=0.0), time.monotonic()

        def show(step: int, loss: float, words: int) -> None:
            nonlocal shown
            now = time.monotonic()
            bar.update(task, completed=step, loss=loss, speed=words / (now - shown))
            shown = now

        yield show


@contextlib.contextmanager
def layer_bar(console, total: int, name: str = "measuring layers") -> Iterator[Callable[[], None]]:
    """A bar of layers with the time left; yields what to call after each layer."""
    with _bar(console, name) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def _bar(console, name: str, *columns):
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(TextColumn(name), BarColumn(), MofNCompleteColumn(), *columns, TimeRemainingColumn(), console=console)


@contextlib.contextmanager
def cells_bar(console, weights: Iterable[float]) -> Iterator[Callable[[float], None]]:
    """A bar of cells with the time left, each counted by its weight; yields what to call with that of a complete one."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    weights = list(weights)
    began, was_there = time.monotonic(), 0.0
    columns = (
        BarColumn(),
        TextColumn("{task.fields[complete]}/{task.fields[cells]} cells"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=sum(weights), complete=0, cells=len(weights), left="")
        complete = 0

        def done(weight: float) -> None:
            nonlocal complete, was_there
            complete += 1
            if time.monotonic() - began < 1:
                # what an earlier run did says nothing of this one's speed
                was_there += weight
            bar.advance(task, weight)
            state = bar.tasks[task]
            # every bar knows its total
            assert state.total is not None
            new, left = state.completed - was_there, state.total - state.completed
            estimate = "" if new <= 0 else f"about {_duration(left * (time.monotonic() - began) / new)} left"
            bar.update(task, complete=complete, left=estimate)

        yield done


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min" if minutes else f"{seconds:.0f} s"
