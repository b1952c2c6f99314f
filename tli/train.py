"""``python -m tli.train``: align word pairs at layer L with LoRA adapters, and measure what came of it."""

from tli.config import TrainConfig, closed_form
from tli.runtime.cli import parse, print_json
from tli.runtime.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """The command; nothing heavy is loaded before its options are known."""
    config = parse(TrainConfig, "tli.train", argv)
    if config.epochs == 0:
        from tli.commands.map import fit_map

        print_json(config, fit_map(closed_form(config)))
        return
    from tli.commands.train import train

    print_json(config, train(config))


if __name__ == "__main__":
    run_command(main)
