"""``python -m tli.study``: how alignment depends on LoRA rank; ``python -m tli.study protocol``: the paper's protocol, switch by switch.

Options first, and nothing heavy for them: ``--help`` and a wrong flag must not wait for torch.
"""

import json
import sys

from tli.config import ProtocolConfig, StudyConfig
from tli.runtime.cli import parse
from tli.runtime.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """The command."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["protocol"]:
        config = parse(ProtocolConfig, "tli.study protocol", arguments[1:])
        from tli.commands.protocol import protocol

        results = protocol(config)
    else:
        config = parse(StudyConfig, "tli.study", arguments, many_processes=True)
        from tli.commands.study import study

        results = study(config)
    if config.json:
        print(json.dumps(results, allow_nan=False))


if __name__ == "__main__":
    run_command(main)
