"""The command of the guide `infra/commands/README.md` works as it stands there."""

import re
from argparse import Namespace
from pathlib import Path
from textwrap import dedent
from typing import Any

from metagmvae.infra.commands.parsing import Answer, Parser, Parsers, add_command

GUIDE = Path(__file__).parents[1] / "infra" / "commands" / "README.md"


def test_the_command_of_the_guide(dataset: Any) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    names: dict[str, Any] = {"Namespace": Namespace, "Answer": Answer, "Parsers": Parsers, "add_command": add_command}
    exec(dedent(program), names)
    parser = Parser(prog="metagmvae")
    names["add"](parser.add_subparsers(dest="command"))
    arguments = parser.parse_args(["count", str(dataset.root)])
    assert arguments.run(arguments) == {split: len(dataset.labels(split)) for split in dataset.splits}
