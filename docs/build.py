"""Write the pages that are made from the code, or check that they are current and that no link is broken.

python docs/build.py            # writes docs/commands.md and docs/settings.md
python docs/build.py --check    # writes nothing; exits with 1 and says what is wrong
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

from caltech_sweep.cli import main
from caltech_sweep.config import DATASET_FIELDS, TRIAL_FIELDS, TRIAL_RULES
from caltech_sweep.data.registry import DATASETS, dataset_rules

ROOT = Path(__file__).resolve().parent.parent
_MADE = "<!-- Made by docs/build.py; do not edit. -->\n\n"
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def _help(command: click.Command, path: str) -> list[str]:
    context = click.Context(command, info_name=path, terminal_width=100, max_content_width=100)
    parts = [f"## `{path}`\n\n```text\n{command.get_help(context).rstrip()}\n```\n"]
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            parts += _help(command.commands[name], f"{path} {name}")
    return parts


def commands() -> str:
    """Return the page of every command's help."""
    return f"{_MADE}# Commands\n\n" + "\n".join(_help(main, "caltech-sweep"))


def _rows(fields: dict, rules: dict, prefix: str) -> list[str]:
    def default(value: object) -> str:
        if isinstance(value, bool) or value is None:
            return {True: "true", False: "false", None: "null"}[value]
        return "[]" if value == () else str(value)

    return [
        f"| `{prefix}{name}` | {rules[name].words} | `{default(f.default)}` | {f.metadata['about']} |"
        for name, f in fields.items()
        if name in rules
    ]


def settings() -> str:
    """Return the page of every setting, what it may be, and its default."""
    own = {
        name: ", ".join(f"`{field}`" for field in DATASET_FIELDS if field in entry.settings)
        for name, entry in DATASETS.items()
    }
    names = "\n".join(f"| `{name}` | {entry.about} | {own[name]} |" for name, entry in DATASETS.items())
    datasets = f"## Datasets\n\n| name | what it is | settings of its own |\n| --- | --- | --- |\n{names}\n"
    head = "| setting | may be | default | what it is |\n| --- | --- | --- | --- |\n"
    trial, dataset = _rows(TRIAL_FIELDS, TRIAL_RULES, ""), _rows(DATASET_FIELDS, dataset_rules(), "dataset.")
    return (
        f"{_MADE}# Settings\n\nWhat a study file may fix, sample or set in a row, and what `--set` takes.\n\n"
        f"## Of a trial\n\n{head}"
        + "\n".join(trial)
        + f"\n\n## Of the dataset\n\n{head}"
        + "\n".join(dataset)
        + f"\n\n{datasets}"
    )


PAGES = {"docs/commands.md": commands, "docs/settings.md": settings}


def problems() -> list[str]:
    """Return a sentence for each page that is not current and each relative link that leads nowhere."""
    found = []
    for name, make in PAGES.items():
        page = ROOT / name
        if not page.is_file() or page.read_text(encoding="utf-8") != make():
            found.append(f"{name} is not current; run `make docs`")
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in _LINK.findall(page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                found.append(f"{page.relative_to(ROOT)}: there is no {target}")
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sentences = problems()
        print("\n".join(sentences) or "docs: current, and every link leads somewhere")
        sys.exit(bool(sentences))
    for name, make in PAGES.items():
        (ROOT / name).write_text(make(), encoding="utf-8")
