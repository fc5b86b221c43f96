"""Servers and databases that are away, ill or something else: one line with the reason, within seconds."""

import http.server
import threading
import time
from unittest import mock

import pytest
from mlflow import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, RESOURCE_DOES_NOT_EXIST
from sqlalchemy.exc import OperationalError

from metagmvae.configs.schema import TrackingSettings
from metagmvae.infra.tracking.mlflow_environment import TrackingError
from metagmvae.infra.tracking.store import connect, experiment_id
from metagmvae.infra.tracking.tracking_errors import ignored, reason

pytestmark = pytest.mark.mlflow


def test_database_that_is_away_is_tried_once(monkeypatch):
    """MLflow tries ten times, within 102 s."""

    def refuse():
        raise OperationalError(None, None, Exception("connection to 127.0.0.1 failed: Connection refused\nIs it up?"))

    engine = mock.Mock(connect=refuse)
    monkeypatch.setattr("sqlalchemy.create_engine", lambda uri: engine)
    monkeypatch.setattr("mlflow.MlflowClient", mock.Mock(side_effect=AssertionError("MLflow itself tried")))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://mlflow:secret@127.0.0.1:5432/runs")
    with pytest.raises(TrackingError) as caught:
        connect(TrackingSettings())
    reason = "(builtins.Exception) connection to 127.0.0.1 failed: Connection refused"
    assert str(caught.value) == f"MLflow at postgresql://127.0.0.1:5432/runs: {reason}"
    engine.dispose.assert_called_once_with()


class Answers(http.server.BaseHTTPRequestHandler):
    """A server that is not MLflow, or one that is ill: the first part of the path is the status of the answer."""

    def do_GET(self):
        status = int(self.path.split("/")[1])
        page = b"<html>\n<head><title>Log in</title></head></html>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Retry-After", "300")
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *words):
        pass


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (500, "answers with status 500 (Internal Server Error); see the log of the server"),
        (502, "answers with status 502 (Bad Gateway); see the log of the server"),
        (503, "answers with status 503 (Service Unavailable); see the log of the server"),
        (429, "answers with status 429 (Too Many Requests); try again later"),
        (401, "answers with status 401 (Unauthorized); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (404, "answers with status 404 (Not Found); check the URI"),
        (499, "answers with status 499; check the URI"),
        (200, "what answers there is no MLflow server, but perhaps a proxy or a page for logging in; check the URI"),
    ],
)
def test_answers_that_are_not_of_mlflow_have_a_reason_of_one_line(status, reason, monkeypatch):
    """And the pause that a server asks for (Retry-After, 300 s) is not made: the next upload comes by itself."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    started = time.monotonic()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}/{status}"
        with pytest.raises(TrackingError) as caught:
            experiment_id(connect(TrackingSettings(uri=uri)), "experiment")
        server.shutdown()
    assert str(caught.value).startswith(f"MLflow at {uri}: {reason}")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "HTTPSConnectionPool(host='x', port=443): Max retries exceeded with url: /a (Caused by SSLError("
            "SSLError(1, '[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)')))",
            "not reachable (TLS: wrong version number)",
        ),
        ("('Connection aborted.', RemoteDisconnected('…'))", "not reachable (the connection was broken off)"),
        ("('Connection broken: IncompleteRead(5 bytes read)', 1)", "not reachable (the connection was broken off)"),
    ],
)
def test_reason_of_a_connection_that_failed(text, expected):
    assert reason(Exception(text)) == expected


def test_only_errors_with_the_named_codes_are_ignored():
    with ignored("RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"):
        raise MlflowException("no run", RESOURCE_DOES_NOT_EXIST)
    with pytest.raises(MlflowException, match="down"), ignored("RESOURCE_DOES_NOT_EXIST"):
        raise MlflowException("down", INTERNAL_ERROR)
