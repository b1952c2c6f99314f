"""``python -m tli.study``: alignment by LoRA rank and arm; ``python -m tli.study protocol``: the paper's protocol, switch by switch."""

import sys

from tli.config import ProtocolConfig, StudyConfig
from tli.runtime.cli import parse, print_json
from tli.runtime.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """The command; nothing heavy is loaded before its options are known."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["protocol"]:
        protocol_config = parse(ProtocolConfig, "tli.study protocol", arguments[1:])
        from tli.commands.protocol import protocol

        print_json(protocol_config, protocol(protocol_config))
    else:
        config = parse(StudyConfig, "tli.study", arguments, many_processes=True)
        from tli.commands.study import study

        print_json(config, study(config))


if __name__ == "__main__":
    run_command(main)
