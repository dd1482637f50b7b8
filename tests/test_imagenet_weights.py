"""ImageNet weights: really downloaded from a server, gone on with, checked, and never run as code."""

from __future__ import annotations

import hashlib
import io
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import ModelError
from caltech_sweep.training.models import build_model
from helpers.places import invoke
from helpers.servers import FileServer, serve

ARCH = "squeezenet1_1"
CONFIG = TrialConfig(arch=ARCH, weights="imagenet")
CHECKPOINTS = "torch/hub/checkpoints"  # of torch.hub, below TORCH_HOME's parent


class Code:
    """A pickle that would make a file when it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")

    def __init__(self, path: Path) -> None:
        self.path = path


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return torchvision.models.get_model(ARCH).state_dict()


def ours() -> nn.Module:
    return build_model(CONFIG, 101)


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def publish(server: FileServer, body: bytes, monkeypatch: pytest.MonkeyPatch) -> str:
    """Serve a body as torchvision publishes weights, with its checksum in its name; return the name."""
    name = f"{ARCH}-{hashlib.sha256(body).hexdigest()[:8]}.pth"
    server.files[name] = body
    published = next(iter(torchvision.models.get_model_weights(ARCH)))
    monkeypatch.setattr(published.value, "url", server.url(name))
    return name


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with serve() as running:
        yield running


def test_weights_are_downloaded_once_and_loaded(
    server: FileServer, state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = publish(server, saved(state), monkeypatch)
    server.cut = 2_000_000  # of about 5 MB: the connection breaks, and is gone on with
    for _ in range(2):
        model = build_model(CONFIG, 101)
        assert torch.equal(model.state_dict()["features.0.weight"], state["features.0.weight"])
        assert model.state_dict()["classifier.1.weight"].shape[0] == 101
    assert server.asked == [None, "bytes=2000000-", "bytes=4000000-"]
    assert [p.name for p in (tmp_path / CHECKPOINTS).iterdir()] == [name]


def test_torchvision_and_this_package_share_their_downloads(
    server: FileServer, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish(server, saved(state), monkeypatch)
    weights = next(iter(torchvision.models.get_model_weights(ARCH)))

    def theirs() -> nn.Module:
        return torchvision.models.get_model(ARCH, weights=weights)

    for first, second in ((theirs, ours), (ours, theirs)):
        server.asked.clear()
        kept, loaded = (make().state_dict()["features.0.weight"] for make in (first, second))
        assert torch.equal(kept, loaded) and server.asked == [None]
        shutil.rmtree(tmp_path / CHECKPOINTS)


def test_a_cache_that_cannot_be_written_is_read(
    server: FileServer, state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / CHECKPOINTS).mkdir(parents=True)
    (tmp_path / CHECKPOINTS / publish(server, saved(state), monkeypatch)).write_bytes(saved(state))
    (tmp_path / CHECKPOINTS).chmod(0o555)
    ours()
    assert not server.asked


def test_a_cache_that_cannot_be_made_names_the_variable_that_helps(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(server, b"", monkeypatch)
    (tmp_path / "torch").write_bytes(b"")
    with pytest.raises(ModelError, match=r"checkpoints cannot be made \(Not a directory\).* variable TORCH_HOME"):
        ours()


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_file_is_noticed_and_fetched_again(
    server: FileServer, state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    body = saved(state)
    target = tmp_path / CHECKPOINTS / publish(server, body, monkeypatch)
    target.parent.mkdir(parents=True)
    middle = len(body) // 2
    flipped = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
    target.write_bytes(body[:middle] if damage == "truncated" else flipped)
    build_model(CONFIG, 101)
    assert target.read_bytes() == body
    server.files[target.name], server.asked = flipped, []
    target.unlink()
    with pytest.raises(ModelError, match="weights of squeezenet1_1 are not available: .*was deleted"):
        build_model(CONFIG, 101)
    assert len(server.asked) == 1 and not list(target.parent.iterdir())


def test_offline_is_one_sentence_with_the_fix(
    server: FileServer, state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = saved(state)
    name = publish(server, body, monkeypatch)
    folder = tmp_path / CHECKPOINTS
    del server.files[name]
    with pytest.raises(ModelError) as caught:
        build_model(CONFIG, 101)
    url = server.url(name)
    assert str(caught.value) == (
        f"weights: the ImageNet weights of squeezenet1_1 are not available: {url} answered 404 Not Found; "
        f"run again to try when it answers, or put {name} into {folder}"
    )
    (folder / name).write_bytes(body)  # the fix
    server.asked = []
    build_model(CONFIG, 101)
    assert not server.asked


def test_pickled_code_is_refused(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for body in (saved({"features.0.weight": Code(tmp_path / "evil")}), pickle.dumps(Code(tmp_path / "evil"))):
        publish(server, body, monkeypatch)
        with pytest.raises(ModelError, match="holds more than tensors and is not loaded"):
            build_model(CONFIG, 101)
    assert not (tmp_path / "evil").exists()


def test_a_study_says_that_it_downloads_before_anything_runs(
    server: FileServer, state: dict[str, torch.Tensor], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(server, saved(state), monkeypatch)
    options = (f"--set=arch={ARCH}", "--set=weights=imagenet", "--set=epochs=1", "--row", "First")
    result = invoke("run", "tiny", "--in-process", "--threads", "1", *options)
    assert result.exit_code == 0 and "study tiny: 1 complete" in result.output, result.output
    assert result.output.index("downloading published weights: ") < result.output.index("First: started")
    assert len(server.asked) == 1
