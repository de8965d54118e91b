"""``docs/reference/cli.md`` has every command, with each of its options, as ``--help`` has them."""

import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from typer.core import TyperCommand, TyperGroup

from smes_cli.app import app
from smes_cli.command_docs import commands, generated, options, usage

PAGE = (Path(__file__).resolve().parents[2] / "docs/reference/cli.md").read_text(encoding="utf-8")


def test_the_page_is_up_to_date() -> None:
    assert generated(PAGE) == PAGE, "run make docs"


def test_every_command_and_option_has_its_place() -> None:
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    sections = dict(re.findall(r"^## `(smes [^`]+)`\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))

    assert sections.keys() == {path for path, _ in commands(root)}
    for path, command in commands(root):
        shown = set(re.findall(r"^- `(-.*?)[`, ]", sections[path], re.MULTILINE))
        names = {p.opts[0] for p in command.params if p.param_type_name == "option"}
        assert shown == names, path


def sample() -> TyperCommand:
    one = typer.Typer(add_completion=False)

    @one.command()
    def act(
        where: Annotated[Path, typer.Argument(help="A folder.")],
        which: Annotated[list[str] | None, typer.Argument(metavar="[NAME=VALUE]…", help="Pairs.")] = None,
        last: Annotated[int, typer.Option(help="So many.", min=1)] = 20,
        form: Annotated[Literal["a", "b"], typer.Option(help="One of two.")] = "a",
        share: Annotated[float | None, typer.Option(help="A share; " + "long " * 30, min=0, max=1)] = None,
        loud: Annotated[int, typer.Option("-l", "--loud", count=True, help="Louder.")] = 0,
    ) -> None:
        """Act."""

    command = typer.main.get_command(one)
    assert isinstance(command, TyperCommand)
    return command


def test_arguments_options_ranges_and_defaults_are_said_in_words() -> None:
    long = "long " * 30
    *short, share, loud = options(sample(), "act")

    assert short == [
        "- `WHERE` (required): A folder.",
        "- `[NAME=VALUE]…`: Pairs.",
        "- `--last N` (default `20`, at least 1): So many.",
        "- `--form a|b` (default `a`): One of two.",
    ]
    assert " ".join(share.split()) == f"- `--share X` (from 0 to 1): A share; {long}".strip()
    assert max(map(len, share.splitlines())) <= 120
    assert loud == "- `-l, --loud`: Louder."
    assert usage(sample(), "smes act") == "smes act WHERE [NAME=VALUE]… [OPTIONS]"


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda page: page.replace("<!-- command: smes train -->", ""), "lacks 'smes train'"),
        (lambda page: page.replace("smes train -->", "smes trail -->"), "has 'smes trail', which there is not"),
        (lambda page: page + "<!-- command: smes -->\n<!-- end of command -->", "has 'smes' 2 times"),
    ],
)
def test_a_page_without_a_command_is_refused(change: object, wrong: str) -> None:
    assert callable(change)
    with pytest.raises(ValueError, match=wrong):
        generated(change(PAGE))


def test_an_option_without_help_is_refused() -> None:
    one = typer.Typer(add_completion=False)

    @one.command()
    def act(last: int = 20) -> None:
        """Act."""

    command = typer.main.get_command(one)
    assert isinstance(command, TyperCommand)
    with pytest.raises(ValueError, match=r"smes act --last <int>: expected a help text"):
        list(options(command, "smes act"))
