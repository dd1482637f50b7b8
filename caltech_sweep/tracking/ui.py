"""The MLflow UI on the local stores."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

from caltech_sweep import paths
from caltech_sweep.errors import StoreError, UsageError
from caltech_sweep.stores import Address, tracking_store
from caltech_sweep.tracking.client import open_client

_PRIVATE = ("10.*", "192.168.*", *(f"172.{second}.*" for second in range(16, 32)), "fc00:*", "fd00:*")
_LOOPBACK = ("localhost", "127.0.0.1", "[[]::1]")  # as fnmatch reads them


def _names(host: str) -> list[str]:
    """Return the names, as patterns with and without a port, by which browsers may ask a server on this machine.

    MLflow refuses requests to any other, so that no page of another site can have its name point here.
    """
    own = {host, socket.gethostname(), socket.getfqdn()} - {"", "0.0.0.0", "::"}
    names = dict.fromkeys([*_LOOPBACK, *_PRIVATE, *sorted(own), *(f"{name.lower()}" for name in sorted(own))])
    return [pattern for name in names for pattern in (name, f"{name}:*")]


def _open_to(host: str) -> None:
    """Let a server that others may reach answer them; what the environment says already stays."""
    if host in ("localhost", "127.0.0.1", "::1"):
        return
    names = _names(host)
    os.environ.setdefault("MLFLOW_SERVER_ALLOWED_HOSTS", ",".join(names))
    os.environ.setdefault("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS", ",".join(f"http://{name}" for name in names))


def serve(host: str, port: int, tracking_uri: Address = None) -> None:
    """Run the MLflow server of a tracking store until Ctrl-C; raise UsageError when the port is taken."""
    store = tracking_store(tracking_uri)
    if store.is_web:
        raise UsageError(f"{store.shown} is a server already; open it in a browser")
    open_client(store, create=False)  # says what is wrong with a store, without the secrets that the server would say
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(
                f"--port: {host}:{port} cannot be used ({error.strerror}); try --port {port + 1}"
            ) from error
    artifacts = store.folder / paths.ARTIFACTS.name
    os.environ["MLFLOW_BACKEND_STORE_URI"] = store.uri  # anybody may read the arguments of a process
    _open_to(host)
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # five idle processes that nothing here needs
    # Without the query MLflow opens an experiment in its view for language models, which shows no trials.
    address = f"http://{host}:{port}/#/experiments?workflowType=machine_learning"
    print(f"MLflow UI: {address} (Ctrl-C stops it)", file=sys.stderr, flush=True)
    arguments = ["server", "--host", host, "--port", str(port), "--workers", "1"]
    arguments += ["--default-artifact-root", artifacts.as_uri(), "--uvicorn-opts", "--log-level warning"]
    # In a session of its own, so that Ctrl-C reaches only this process: the server would answer it with a traceback.
    with subprocess.Popen([sys.executable, "-m", "mlflow", *arguments], start_new_session=True) as server:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            code = server.wait()
        except KeyboardInterrupt:
            os.killpg(server.pid, signal.SIGTERM)
            return
    if code:
        raise StoreError(f"the MLflow server ended with exit code {code}; what it said is above")
