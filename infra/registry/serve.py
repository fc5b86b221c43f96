"""Serves a model over HTTP with MLflow's scoring server, in this process.

The model is loaded as by every other command: its package is read, and code that is logged beside a registered version
is not run. The server is the one of `mlflow models serve`, with the same requests and answers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metagmvae.evaluation.encoders.head_model import with_named_head
from metagmvae.infra.registry.register import quiet_mlflow, save_pyfunc
from metagmvae.infra.runs.stop_signals import Terminated, deferred_signals
from metagmvae.infra.tracking.mlflow_environment import import_mlflow
from metagmvae.pipelines.records import DataError

if TYPE_CHECKING:
    from metagmvae.training.trainer.package import LoadedModel

LOG = logging.getLogger(__name__)
GRACE_S = 10
"""Longest time that requests in progress have to end after a signal."""
REPEATED = {"Failed to predict data ": "\nError: ", "Failed to enforce schema of data ": ". Error: "}
"""Beginnings of messages of MLflow that repeat the request, and what stands before the reason in them."""
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on a port of this machine; port 0: a free one.

    Raises:
        DataError: the port is in use or not allowed, or the host is no address of this machine.
    """
    if not 0 <= port < 2**16:
        raise DataError(f"--port {port}: give a port from 1 to 65535, or 0 for any free one")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
        raise DataError(f"--host {host} --port {port}: {reason}; choose another --port (0: any free one)") from error


def serve(loaded: LoadedModel, listener: socket.socket, name: str, head: str | None = None) -> dict[str, Any]:
    """Answer requests until Ctrl-C or SIGTERM.

    Args:
        loaded: the model.
        listener: a listening socket, which is closed at the end.
        name: of the model, for the log.
        head: of an encoder alone, as in `with_head`.

    Returns:
        `url` and the signal that ended the server.

    Raises:
        DataError: `head` is given for a model that is no encoder alone.
    """
    loaded = with_named_head(loaded, head, name)
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    signal_name = ""
    try:
        with listener, deferred_signals() as stopped:
            app = scoring_app(loaded)
            if not stopped():
                LOG.info("%s: answers at %s/invocations; Ctrl-C ends the server", name, url)
                _answer(app, listener, stopped)
    except KeyboardInterrupt as stop:
        signal_name = "SIGTERM" if isinstance(stop, Terminated) else "Ctrl-C"
    return {"served": name, "url": url, "ended_by": signal_name}


def scoring_app(loaded: LoadedModel) -> Any:
    """Return MLflow's scoring server for a model, as an ASGI application."""
    mlflow = import_mlflow("metagmvae serve")
    from mlflow.pyfunc import scoring_server

    from metagmvae.training.trainer.package import save_package

    with tempfile.TemporaryDirectory() as folder, quiet_mlflow():
        package, logged = Path(folder) / "package", Path(folder) / "model"
        save_package(package, loaded)
        save_pyfunc(logged, package, loaded)
        return ShortErrors(scoring_server.init(mlflow.pyfunc.load_model(str(logged))))


class ShortErrors:
    """The scoring server with errors that are JSON and say the reason only.

    MLflow repeats the request, with all its images, in the message of an error, and gives no reason at all for JSON
    that is nested too deeply and for requests that are cancelled when the server ends.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        """Answer one request, as an ASGI application; answers with an error status are held until the app is done."""
        start: Message | None = None
        body = b""
        started = False

        async def hold_error(message: Message) -> None:
            nonlocal start, body, started
            if message["type"] == "http.response.start" and message["status"] >= 400:
                start = message
            elif start is None:
                started = True
                await send(message)
            else:
                body += message.get("body", b"")

        gone = False

        async def watch() -> Message:
            nonlocal gone
            message: Message = await receive()
            gone = gone or message["type"] == "http.disconnect"
            return message

        try:
            await self.app(scope, watch, hold_error)
        except RecursionError:
            start, body = {"status": 400}, _error("BAD_REQUEST", "the JSON is nested too deeply; send a flat request")
        except asyncio.CancelledError:
            if started:
                raise
            reason = "the server is stopping; send the request again to another one"
            start, body = {"status": 503}, _error("TEMPORARILY_UNAVAILABLE", reason)
        except Exception:
            if not gone:
                raise
            LOG.debug("a client went away before its request was complete")
            return
        if start is not None:
            body = short_message(body)
            replaced = (b"content-length", b"content-type")
            headers = [(name, value) for name, value in start.get("headers", []) if name.lower() not in replaced]
            headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": start["status"], "headers": headers})
            await send({"type": "http.response.body", "body": body})


def _error(code: str, message: str) -> bytes:
    return json.dumps({"error_code": code, "message": message}).encode()


def short_message(body: bytes) -> bytes:
    """Return the body of an error of MLflow as one JSON object, without the request that its message repeats."""
    try:
        error = json.loads(body)
    except ValueError:
        error = body.decode(errors="replace")
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return _error("BAD_REQUEST", error if isinstance(error, str) else body.decode(errors="replace"))
    message = error["message"]
    for beginning, before_reason in REPEATED.items():
        if message.startswith(beginning):
            message = message.rpartition(before_reason)[2]
    if message.endswith("All arrays must be of the same length"):
        message = "the lists of a request differ in length; give one label per image, -1 or null for a query"
    return json.dumps(error | {"message": message.partition("\nInput: ")[0]}).encode()


def _answer(app: Any, listener: socket.socket, stopped: Callable[[], bool]) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        """Ends when `stopped` says so, instead of by signal handlers of its own."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def on_tick(self, counter: int) -> bool:
            return stopped() or await super().on_tick(counter)

    config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=GRACE_S)
    Server(config).run(sockets=[listener])
