"""The compose file: what it starts, and that the commands in it are commands of this version."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from ruamel.yaml import YAML

from caltech_sweep.cli import main

FOLDER = Path(__file__).parent.parent / "deploy"
TEXT = (FOLDER / "compose.yml").read_text()
SERVICES = YAML(typ="safe").load(TEXT)["services"]


def test_only_mlflow_is_published_and_only_on_this_machine() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"mlflow": ["127.0.0.1:5000:5000"]}


def test_no_password_stands_in_a_file_or_in_a_command() -> None:
    passwords = re.findall(r"PASSWORD: (.*)", TEXT)
    assert passwords and all(value.startswith("${POSTGRES_PASSWORD:?") for value in passwords)
    assert not re.search(r"//\w+:\w+@", TEXT)


def test_services_wait_for_services_that_are_there_and_the_files_that_they_name_exist() -> None:
    for service in SERVICES.values():
        assert set(service.get("depends_on", ())) <= SERVICES.keys()
        for volume in service.get("volumes", ()):
            if volume.startswith("."):
                assert (FOLDER / volume.partition(":")[0]).exists()


def test_the_commands_in_it_are_commands_of_this_version() -> None:
    text = re.sub(r"\\\n#\s+", "", TEXT)
    found = [shlex.split(line) for line in re.findall(r"exec head caltech-sweep (.*)", text)]
    assert [words[0] for words in found] == ["run", "report"]
    for name, *words in found:
        main.commands[name].make_context(name, words)
    address = found[0][found[0].index("--address") + 1]
    assert SERVICES["node"]["command"].startswith(f"ray start --address={address} ")
    assert f"--port={address.partition(':')[2]} " in SERVICES["head"]["command"]
