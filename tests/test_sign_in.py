"""What MLflow's client needs to reach a server is enough for us: certificates, tokens, passwords and proxies."""

from __future__ import annotations

import base64
import ipaddress
import ssl
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from caltech_sweep.errors import StoreError
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.places import invoke
from helpers.servers import Gate, gated_mlflow

pytestmark = pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 that signs itself, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "the company")])
    own = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = datetime.now() - timedelta(days=1)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(made)
        .not_valid_after(made + timedelta(days=9))
        .add_extension(own, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    file = tmp_path_factory.mktemp("company") / "both.pem"
    file.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(serialization.Encoding.PEM, *plain)
    )
    return file


@pytest.fixture(scope="module", params=["one side", "both sides"])
def secured(request: pytest.FixtureRequest, company: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(company)
    if request.param == "both sides":
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(company)
    with gated_mlflow(tmp_path_factory.mktemp("secured"), context) as gate:
        gate.both_sides = request.param == "both sides"
        yield gate


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "MLFLOW_TRACKING_SERVER_CERT_PATH", "INSECURE"])
def test_a_server_with_a_company_s_certificate_is_used_as_mlflow_uses_it(
    secured: Gate, company: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    if secured.both_sides:
        monkeypatch.setenv("MLFLOW_TRACKING_CLIENT_CERT_PATH", str(company))
    if variable == "INSECURE":
        monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    else:
        monkeypatch.setenv(variable, str(company))
    assert MlflowTracker(secured.address).start_study(variable, "A title", {})


def test_a_certificate_that_is_not_trusted_is_a_sentence_that_says_how_to_trust_it(secured: Gate) -> None:
    refused = invoke("report", "--tracking-uri", secured.address)
    assert refused.exit_code == 2 and refused.output.count("\n") == 1
    assert "certificate" in refused.output and "REQUESTS_CA_BUNDLE" in refused.output


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    with gated_mlflow(tmp_path) as gate:
        yield gate


def test_tokens_and_passwords_reach_the_server_as_mlflow_sends_them(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.wants = "Bearer of the day"
    with pytest.raises(StoreError, match=r"does not let this process in .*MLFLOW_TRACKING_TOKEN"):
        MlflowTracker(gate.address)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "of the day")
    assert MlflowTracker(gate.address).start_study("token", "A title", {})
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
    gate.wants = f"Basic {base64.b64encode(b'me:secret').decode()}"
    assert MlflowTracker(gate.address.replace("://", "://me:secret@")).start_study("address", "A title", {})
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    assert MlflowTracker(gate.address).start_study("password", "A title", {})


@pytest.mark.parametrize("token", ["hunter2\n", "hunter2\r\nX: 1", "hunter2€"])
def test_a_token_that_no_header_can_hold_is_a_sentence_about_it_that_does_not_tell_it(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)
    refused = invoke("report", "--tracking-uri", gate.address)
    assert refused.exit_code == 2 and "renew what MLflow signs in with (MLFLOW_TRACKING_TOKEN" in refused.output
    assert "hunter2" not in refused.output and "start it" not in refused.output


def test_a_server_behind_a_proxy_is_reached_through_it(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", gate.address)
    monkeypatch.setenv("NO_PROXY", "")
    assert MlflowTracker("http://mlflow.invalid:5000").start_study("proxied", "A title", {})
    assert ("GET", "/health") in gate.asked
