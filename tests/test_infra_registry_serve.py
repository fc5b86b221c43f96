"""`metagmvae serve`: real requests to a server of a registered version and of a run folder, and its end."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys

import mlflow_template
import numpy as np
import pytest
import torch
from called_commands import answer_of, refusal_of

from metagmvae.configs.schema import ModelSettings, Settings
from metagmvae.evaluation.encoders.head_model import with_head, with_named_head
from metagmvae.evaluation.fewshot.predict_queries import predict_queries
from metagmvae.infra.cli import main
from metagmvae.infra.registry.register import register, save_pyfunc
from metagmvae.infra.registry.serve import ShortErrors, listen
from metagmvae.pipelines.records import DataError
from metagmvae.training.trainer.builders import build_encoder_model
from metagmvae.training.trainer.package import LoadedModel, save_package

pytestmark = pytest.mark.mlflow


@pytest.mark.slow
@pytest.mark.parametrize(("form", "number"), [("models:/few-shot@champion", signal.SIGTERM), ("run", signal.SIGINT)])
def test_server_answers_and_ends_cleanly(tmp_path, form, number):
    """In the folder of the training, without any variable, and without the environment on the PATH."""
    run = mlflow_template.new_run(tmp_path / "run")
    if form != "run":
        register(run, mlflow_template.new_store(tmp_path / "runs" / "mlflow"), "few-shot")
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from metagmvae.infra.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "serve", form, "--port", "0", "--json"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    server = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)
    try:
        lines = []
        while not lines or "answers at" not in lines[-1]:
            lines.append(server.stderr.readline())
            assert lines[-1], "".join(lines)
        port = int(lines[-1].partition("http://127.0.0.1:")[2].partition("/")[0])
        images = np.random.default_rng(0).integers(0, 256, (3, 1, 28, 28)).tolist()
        status, answer = mlflow_template.post(port, {"inputs": {"images": images, "label": [3, 7, -1]}})
        assert status == 200
        ((first, second),) = answer["predictions"]
        assert first + second == pytest.approx(1, abs=1e-6)
        status, answer = mlflow_template.post(port, {"inputs": {"images": images, "label": [3, 3, -1]}})
        assert status == 400
        assert answer["message"].startswith("1 classes and 1 queries")  # without the images of the request
        server.send_signal(number)
        out, err = server.communicate(timeout=30)
    finally:
        server.kill()
        server.wait()
    assert server.returncode == 0
    assert "Traceback" not in err
    ended_by = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
    assert json.loads(out) == {"served": form, "url": f"http://127.0.0.1:{port}", "ended_by": ended_by}


@pytest.mark.slow
def test_a_served_encoder_classifies_by_the_head_that_is_asked_for(tmp_path):
    """Through MLflow's own loading, as the server does; without labels it gives features."""
    import mlflow

    settings = Settings(name="conv4", model=ModelSettings(encoder="conv4", channels=4))
    net = build_encoder_model(settings.model, (1, 28, 28), seed=0)
    loaded = LoadedModel(net.eval(), settings, (1, 28, 28), {})
    images = np.random.default_rng(0).integers(0, 256, (6, 1, 28, 28), dtype=np.uint8)
    answers = {}
    for head in ("nearest-mean", "laplacian"):
        named = with_named_head(loaded, head, "conv4")
        save_package(tmp_path / head / "package", named)
        save_pyfunc(tmp_path / head / "model", tmp_path / head / "package", named)
        served = mlflow.pyfunc.load_model(str(tmp_path / head / "model"))
        answers[head] = served.predict({"images": list(images), "label": [0, 1, 1, None, None, None]})
        features = served.predict({"images": list(images)})
    expected = predict_queries(
        with_head(loaded, "laplacian").model,
        loaded.settings.adapt,
        torch.as_tensor(features[:3]),
        np.array([0, 1, 1]),
        torch.as_tensor(features[3:]),
    )
    np.testing.assert_allclose(answers["laplacian"], expected, atol=1e-6)
    assert not np.allclose(answers["nearest-mean"], answers["laplacian"], atol=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "192.0.2.1"], "Cannot assign requested address"),
        (["--host", "no host"], "--host no host --port 5001: "),
        (["--port", "70000"], "give a port from 1 to 65535"),
        (["--port", "-1"], "give a port from 1 to 65535"),
    ],
)
def test_place_that_cannot_be_served_is_one_line(tmp_path, words, message, capsys):
    assert message in refusal_of("serve", tmp_path, *words)


def test_port_in_use_is_one_line_before_the_model_is_loaded(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", str(tmp_path / "no-model"), "--port", str(port)]) == 2
        with pytest.raises(DataError, match="Address already in use; choose another --port"):
            listen("127.0.0.1", port)
    error = capsys.readouterr().err
    assert error == (
        f"metagmvae serve: --host 127.0.0.1 --port {port}: Address already in use; choose another --port "
        "(0: any free one)\n"
    )


def test_store_of_the_option_is_used_by_one_command_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = mlflow_template.new_run(tmp_path / "run")
    register(run, mlflow_template.new_store(tmp_path / "store"), "few-shot", alias="")
    (model,) = answer_of("models", "--tracking", f"sqlite:///{tmp_path}/store/mlflow.db")["models"]
    assert model["name"] == "few-shot"
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert main(["models"]) == 2
    assert "write http://127.0.0.1:5000" in refusal_of("models", "--tracking", "127.0.0.1:5000")


def answers(app):
    """Status and body of the answer to one request."""
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(ShortErrors(app)({"type": "http"}, None, send))
    start, *bodies = sent
    content = b"".join(message["body"] for message in bodies)
    assert dict(start["headers"]).get(b"content-length", b"%d" % len(content)) == b"%d" % len(content)
    return start["status"], content


def replies(status, *parts):
    async def app(scope, receive, send):
        size = str(sum(map(len, parts))).encode()
        headers = [(b"content-length", size), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for number, part in enumerate(parts, start=1):
            await send({"type": "http.response.body", "body": part, "more_body": number < len(parts)})

    return app


def fails(error):
    async def app(scope, receive, send):
        await replies(500, b"Internal Server Error")(scope, receive, send)
        raise error

    return app


@pytest.mark.parametrize(
    ("message", "short"),
    [
        ("Failed to predict data '{'images': ['AAAA']}'. \nError: mode is 'x'; choose", "mode is 'x'; choose"),
        ("Invalid input. Error: 'JSONDecodeError(1)'\nInput: \nb'{'\n", "Invalid input. Error: 'JSONDecodeError(1)'"),
        ("Failed to enforce schema of data '{'images': 'AAA'}' with schema '[]'. Error: no images", "no images"),
        (
            "Failed to enforce schema of data '{}'. Error: casting: All arrays must be of the same length",
            "the lists of a request differ in length; give one label per image, -1 or null for a query",
        ),
        ("The input must be a JSON dictionary", "The input must be a JSON dictionary"),
    ],
)
def test_an_error_gives_the_reason_without_the_request(message, short):
    body = json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": message}).encode()
    status, content = answers(replies(400, body[:9], body[9:]))
    assert status == 400
    assert json.loads(content) == {"error_code": "INVALID_PARAMETER_VALUE", "message": short}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"plain text", "plain text"),
        (b'"a text in JSON"', "a text in JSON"),
        (b"[1]", "[1]"),
        (b'{"message": 3}', '{"message": 3}'),
        (b"null", "null"),
        (b"\xff", "\ufffd"),
    ],
)
def test_every_error_is_one_json_object_and_answers_are_passed_on(body, message):
    status, content = answers(replies(415, body))
    assert (status, json.loads(content)) == (415, {"error_code": "BAD_REQUEST", "message": message})
    assert b"\n" not in content
    assert answers(replies(200, body, body)) == (200, body + body)


def test_a_client_that_goes_away_is_no_error_of_the_server():
    """The server of MLflow raises an exception then."""
    sent = []

    async def app(scope, receive, send):
        await receive()
        raise RuntimeError("client disconnected")

    async def call(message):
        async def receive():
            return {"type": message}

        async def send(message):
            sent.append(message)

        await ShortErrors(app)({"type": "http"}, receive, send)

    asyncio.run(call("http.disconnect"))
    assert sent == []
    with pytest.raises(RuntimeError):
        asyncio.run(call("http.request"))


def test_a_request_that_is_nested_too_deeply_and_one_at_the_end_of_the_server_get_a_reason():
    status, content = answers(fails(RecursionError()))
    assert (status, json.loads(content)["error_code"]) == (400, "BAD_REQUEST")
    status, content = answers(fails(asyncio.CancelledError()))
    assert (status, json.loads(content)["error_code"]) == (503, "TEMPORARILY_UNAVAILABLE")
    with pytest.raises(KeyError):
        answers(fails(KeyError("other")))
