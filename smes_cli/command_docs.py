"""Write usage and options of every command in ``docs/reference/cli.md``, from the commands themselves (``make docs``).

They stand between ``<!-- command: NAME -->`` and ``<!-- end of command -->``, where NAME is ``smes train``, or ``smes``
for what stands before every command's name. What is said is what ``--help`` says.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import typer
from typer.core import TyperCommand, TyperGroup

from smes_cli.app import app
from smes_cli.generated_lists import filled, wrapped

_WORDS = {"int": "N", "float": "X", "str": "TEXT", "path": "PATH", "file": "FILE", "list": "TEXT"}
_RANGES = {
    r"(\S+)<=x<=(\S+)": r"from \1 to \2",
    r"x>=(\S+)": r"at least \1",
    r"x<=(\S+)": r"at most \1",
    r"default: (.+)": r"default `\1`",
}


def commands(group: TyperGroup, path: str = "smes") -> Iterator[tuple[str, TyperCommand]]:
    """All commands below a group, with their names from ``path`` on."""
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from commands(command, f"{path} {name}")
        else:
            assert isinstance(command, TyperCommand)
            yield f"{path} {name}", command


def options(command: TyperGroup | TyperCommand, path: str) -> Iterator[str]:
    """The arguments and options of a command as entries of a list, without ``--help``.

    Raises:
        ValueError: One has no help text.
    """
    context = command.make_context(path, [], resilient_parsing=True)
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None or "--help" in parameter.opts:
            continue
        meaning, _, conditions = record[1].partition("  [")
        if not getattr(parameter, "help", None):
            raise ValueError(f"{path} {record[0]}: expected a help text")
        name = re.sub(r"<(\w+)[^>|]*>", lambda kind: _WORDS.get(kind[1], kind[0]), record[0])
        name = re.sub(r"<([^>]+)>", r"\1", name)
        if parameter.param_type_name == "argument":
            name = argument(name.partition(" ")[0])
        counted = getattr(parameter, "count", False)  # how often it is there: its default says nothing
        known = [condition(text) for text in conditions.removesuffix("]").split("; ") if text and not counted]
        yield wrapped(f"- `{name}`{' (' + ', '.join(known) + ')' if known else ''}: {meaning}")


def condition(text: str) -> str:
    """What Typer says of a value's range or default, in words."""
    for pattern, words in _RANGES.items():
        if re.fullmatch(pattern, text):
            return re.sub(pattern, words, text)
    return text


def argument(piece: str) -> str:
    """An argument as it stands in a usage line: capitals where it has no fixed words."""
    required = piece.removeprefix("{").removesuffix("}")
    return required.upper() if re.fullmatch(r"\[?[a-z_]+\]?(\.\.\.)?", required) else required


def usage(command: TyperCommand, path: str) -> str:
    """The command line of a command, in short."""
    pieces = command.collect_usage_pieces(command.make_context(path, [], resilient_parsing=True))
    arguments = [argument(piece) for piece in pieces if piece != "[OPTIONS]"]
    known = [re.sub(r"\[(\[.*?\]…?)\](\.\.\.)?", r"\1", piece) for piece in arguments]  # [[ID]] is one in brackets
    return " ".join([path, *known, *(["[OPTIONS]"] if len(list(options(command, path))) > len(known) else [])])


def generated(page: str) -> str:
    """The page with every command's usage and options written anew.

    Raises:
        ValueError: The page lacks a command, or names one that does not exist.
    """
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    parts = {"smes": "\n".join(options(root, "smes"))}
    for path, command in commands(root):
        known = "\n".join(options(command, path))
        parts[path] = f"{command.help}\n\n```\n{usage(command, path)}\n```\n\n{known}".strip()
    return filled(page, "command", parts)


def main(path: Path) -> None:
    """Rewrite the page."""
    path.write_text(generated(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
