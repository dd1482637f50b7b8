"""What the README and the other documents show works and is where they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from caltech_sweep.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ("cluster", "commands", "design", "settings", "studies")
EXAMPLES = [
    "\n".join(line[4:] for line in found.splitlines()) for found in re.findall(r"(?:^(?:    .*)?\n)+", README, re.M)
]


def example(word: str) -> str:
    """Return the one indented example that contains a word."""
    (found,) = [text for text in EXAMPLES if word in text]
    return found.strip() + "\n"


def test_the_study_and_the_mocked_trial_run_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.yaml").write_text(example("title: My sweep"), encoding="utf-8")
    torch = "\n\ndef test_torch_is_not_needed():\n    import sys\n\n    assert 'torch' not in sys.modules\n"
    (tmp_path / "test_mine.py").write_text(example("ScriptedExecutor") + torch, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "2 passed" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("command", sorted(set(re.findall(r"caltech-sweep ([a-z]+)", README))))
def test_every_command_that_is_shown_exists(command: str) -> None:
    assert command in main.commands


def test_every_target_of_make_that_is_shown_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets


def test_every_option_that_is_shown_exists() -> None:
    for line in re.findall(r"caltech-sweep (?:[a-z]+ ).*", README):
        words = line.split("#")[0].split()
        options = {name for option in main.commands[words[1]].params for name in option.opts}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= options or words[1] == "data", line


def test_every_option_that_any_document_names_exists() -> None:
    commands = [main, *main.commands.values(), main.commands["data"].commands["list"]]  # type: ignore[attr-defined]
    known = {name for command in commands for each in command.params for name in (*each.opts, *each.secondary_opts)}
    others = {
        "--head",
        "--port",
        "--block",
        "--num-cpus",
        "--no-deps",
        "--help",
        "--stage-budget",
    }  # Ray's, pip's, an older name
    for document in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", *(f"docs/{name}.md" for name in DOCUMENTS)):
        text = (ROOT / document).read_text(encoding="utf-8")
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known | others, document


@pytest.mark.parametrize("document", ["README.md", "docs/design.md", "docs/studies.md"])
def test_every_file_of_the_project_that_is_named_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:[a-z_]+/)+[a-z_]+\.(?:py|yaml)\b|[a-z_]+\.py\b", text))
    missing = {n for n in named if not any((place / n).exists() for place in (ROOT, ROOT / "caltech_sweep"))}
    assert missing <= {"sweeps/mine.yaml", "mynet.py"}  # which the reader writes
