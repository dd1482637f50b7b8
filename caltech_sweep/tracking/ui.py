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


def serve(host: str, port: int, tracking_uri: Address = None) -> None:
    """Run the MLflow server of a tracking store until Ctrl-C; raise UsageError when the port is taken."""
    store = tracking_store(tracking_uri)
    if store.is_web:
        raise UsageError(f"{store.shown} is a server already; open it in a browser")
    open_client(
        store, create=False
    )  # says what is wrong with a store that cannot be opened; the server would say more than it may
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
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
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
