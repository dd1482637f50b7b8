"""Every command of the program, and arguments with which it comes as far as it can."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import click

from caltech_sweep.cli import main

# Every text that a command takes is one of these; a new option has to be put where it belongs.
TAKES_ADDRESS = {"tracking_uri", "storage", "url"}
TAKES_OTHER_TEXT = {
    "overrides",
    "data",
    "name",
    "namespace",
    "device",
    "rows",
    "host",
    "folder",
    "run_id",
    "alias",
    "model",
    "compare",
    "budget",
    "address",
    "slots",
    "cache",
}
ARGUMENTS = {"study": ["tiny"], "studies": ["tiny"], "images": ["image.png"]}
FURTHER = {  # what else a command is given, so that it comes as far as it can
    ("run",): [["--in-process", "--threads", "1"]],
    ("report",): [[], ["--format", "html"]],
    ("predict",): [[], ["--model", "tiny@champion"], ["--model", "0" * 32]],
    ("promote",): [[], ["--run", "0" * 32]],
    ("data", "list"): [["--split", "test"]],
    ("cache",): [["--clear"]],
    ("new",): [["--from", "images"]],
    ("doctor",): [[], ["--fix"]],
}


def commands(group: click.Group = main, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield every command of the program that does something."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield (*path, name), command


COMMANDS = dict(commands())


def options(command: click.Command, names: set[str]) -> list[str]:
    return [parameter.opts[0] for parameter in command.params if parameter.name in names]


def calls(path: tuple[str, ...]) -> Iterator[list[str]]:
    """Yield a command's arguments without those that name a store."""
    arguments = [ARGUMENTS[str(p.name)] for p in COMMANDS[path].params if isinstance(p, click.Argument)]
    for further in FURTHER.get(path, [[]]):
        yield [*path, *itertools.chain(*arguments), *further]
