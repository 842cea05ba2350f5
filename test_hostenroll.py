"""The specification of hostenroll: what it does, section by section, in sentences.

Life-cycle scenarios are written once and go through three doors: the Registry, the Api, and a
server on a real socket. Where a promise is about processes, there are processes: real servers,
real curl, kill -9. The clock is a parameter; nothing sleeps where a clock or an event serves.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import hashlib
import hmac
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import stat
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import pytest

import hostenroll
from hostenroll import Act, Api, Principal, Problem, Registry, RequestReader, Server, open_registry

HERE = Path(__file__).resolve().parent
MODULE = Path(hostenroll.__file__).resolve()
SOURCE = MODULE.read_text(encoding="utf-8")
OPERATOR = Principal("cli:test", None, "admin")
NOON = 1_800_000_000.0  # a Friday in 2027


# Fixtures


class Clock:
    """A wall clock that stands still until it is told."""

    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    @property
    def ms(self) -> int:
        return int(self.now * 1000)

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def paths(tmp_path: Path) -> Tuple[str, str]:
    """A database and a key file that are not there yet."""
    return str(tmp_path / "hostenroll.db"), str(tmp_path / "hostenroll.key")


@pytest.fixture
def registry(paths: Tuple[str, str], clock: Clock) -> Iterator[Registry]:
    registry = open_registry(*paths, clock.ms)
    yield registry
    registry.close()


def do(registry: Registry, clock: Clock, act: Callable[[int], Any], writes: bool = True) -> Any:
    """One act in a tick of its own; its result, or the Problem that it raises."""
    return registry.perform(Act(act, writes), clock.ms)


def sql(path: str, statement: str, *parameters: Any) -> List[Any]:
    """Look into, or meddle with, a database that nobody has open."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(statement, parameters).fetchall()


class Reply(NamedTuple):
    """What came back: over HTTP, or as it would have."""

    status: int
    document: Any
    headers: Dict[str, str]

    @property
    def code(self) -> Optional[str]:
        """The name of the refusal; None when it is none."""
        return self.document.get("code") if isinstance(self.document, dict) else None


def request_bytes(
    method: str,
    path: str,
    body: Any = None,
    bearer: Optional[str] = None,
    headers: Sequence[Tuple[str, str]] = (),
) -> bytes:
    """A request as a client writes it; a body that is not bytes goes as JSON."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: enroll.test"]
    lines += [f"{name}: {value}" for name, value in headers]
    if bearer is not None:
        lines.append(f"Authorization: Bearer {bearer}")
    if data:
        lines.append(f"Content-Length: {len(data)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def read_reply(stream: Any, head_only: bool = False) -> Optional[Reply]:
    """One response from a binary stream; None at its end."""
    status_line = stream.readline()
    if not status_line:
        return None
    assert status_line.startswith(b"HTTP/1.1 "), status_line
    headers: Dict[str, str] = {}
    for line in iter(stream.readline, b"\r\n"):
        name, _, value = line.decode("latin-1").partition(":")
        assert name.lower() not in headers, f"{name} twice"
        headers[name.lower()] = value.strip()
    length = 0 if head_only else int(headers.get("content-length", 0))
    body = stream.read(length)
    assert len(body) == length
    return Reply(int(status_line.split()[1]), json.loads(body) if body else None, headers)


class Door:
    """A way in. All three speak in the API's documents, so that a scenario fits through each."""

    api_key: str

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        bearer: Optional[str] = None,
        headers: Sequence[Tuple[str, str]] = (),
    ) -> Reply:
        raise NotImplementedError

    def mint(self, **order: Any) -> Reply:
        return self.call("POST", "/api/hosts/tokens", order, self.api_key)

    def token(self, **order: Any) -> str:
        """The text of a fresh token."""
        reply = self.mint(**order)
        assert reply.status == 201, reply
        return str(reply.document["token"])

    def enroll(self, token: str, hostname: str = "web-1", key: str = "", **facts: Any) -> Reply:
        headers = [("Idempotency-Key", key)] if key else []
        body = {"token": token, "hostname": hostname, **facts}
        return self.call("POST", "/api/agent/enroll", body, headers=headers)

    def beat(self, credential: str, **facts: Any) -> Reply:
        return self.call("POST", "/api/agent/heartbeat", facts or None, credential)

    def host(self, number: str) -> Reply:
        return self.call("GET", f"/api/hosts/{number}", bearer=self.api_key)

    def revoke(self, number: str) -> Reply:
        return self.call("POST", f"/api/hosts/{number}/revoke", bearer=self.api_key)

    def restore(self, number: str) -> Reply:
        return self.call("POST", f"/api/hosts/{number}/restore", bearer=self.api_key)

    def delete(self, number: str) -> Reply:
        return self.call("DELETE", f"/api/hosts/{number}", bearer=self.api_key)

    def reenroll(self, number: str) -> Reply:
        return self.call("POST", f"/api/hosts/{number}/reenroll", bearer=self.api_key)

    def revoke_token(self, number: str) -> Reply:
        return self.call("DELETE", f"/api/hosts/tokens/{number}", bearer=self.api_key)

    def show_token(self, number: str) -> Reply:
        return self.call("GET", f"/api/hosts/tokens/{number}", bearer=self.api_key)


class RegistryDoor(Door):
    """The rules themselves, by their methods."""

    def __init__(self, registry: Registry, clock: Clock) -> None:
        self.registry, self.clock = registry, clock

    def _do(self, status: int, act: Callable[[int], Any], show: Callable[[Any], Any]) -> Reply:
        try:
            return Reply(status, show(do(self.registry, self.clock, act)), {})
        except Problem as problem:
            return Reply(problem.status, problem.document(), {})

    def mint(self, **order: Any) -> Reply:
        wanted = hostenroll.token_order(order)
        return self._do(
            201,
            lambda now: self.registry.mint(OPERATOR, wanted, now),
            lambda minted: hostenroll.token_document(*minted),
        )

    def enroll(self, token: str, hostname: str = "web-1", key: str = "", **facts: Any) -> Reply:
        arrival = hostenroll.Arrival(
            token,
            hostname,
            facts.get("name"),
            facts.get("os", ""),
            facts.get("architecture", ""),
            facts.get("dockerVersion", ""),
            key or None,
            "192.0.2.7",
        )
        return self._do(
            201,
            lambda now: self.registry.enroll(arrival, now),
            lambda enrollment: {
                "hostId": hostenroll.id_text(enrollment.host.id),
                "organizationId": enrollment.host.organization_id,
                "name": enrollment.host.name,
                "credential": enrollment.grant.credential,
            },
        )

    def beat(self, credential: str, **facts: Any) -> Reply:
        columns = {"dockerVersion": "docker_version"}
        changes = {columns.get(name, name): value for name, value in facts.items()}

        def show(beaten: Any) -> Dict[str, Any]:
            document = {"lastSeen": hostenroll.rfc3339(beaten.last_seen)}
            return {**document, **(beaten.grant._asdict() if beaten.grant else {})}

        def act(now: int) -> Any:
            claims = self.registry.authenticate(credential, now)
            return self.registry.beat(claims, changes, now)

        return self._do(200, act, show)

    def _on_host(self, method: Callable[..., Any], number: str) -> Reply:
        return self._do(
            200,
            lambda now: method(OPERATOR, int(number, 16), now),
            lambda view: hostenroll.host_document(view) if view else None,
        )

    def host(self, number: str) -> Reply:
        return self._on_host(self.registry.host, number)

    def revoke(self, number: str) -> Reply:
        return self._on_host(self.registry.revoke_host, number)

    def restore(self, number: str) -> Reply:
        return self._on_host(self.registry.restore_host, number)

    def delete(self, number: str) -> Reply:
        return self._on_host(self.registry.delete_host, number)._replace(status=204)

    def reenroll(self, number: str) -> Reply:
        order = hostenroll.TokenOrder()
        return self._do(
            201,
            lambda now: self.registry.reenroll(OPERATOR, int(number, 16), order, now),
            lambda minted: hostenroll.token_document(*minted),
        )

    def revoke_token(self, number: str) -> Reply:
        return self._do(
            204,
            lambda now: self.registry.revoke_token(OPERATOR, int(number, 16), now),
            lambda nothing: nothing,
        )

    def show_token(self, number: str) -> Reply:
        return self._do(
            200,
            lambda now: self.registry.token(OPERATOR, int(number, 16), now),
            hostenroll.token_document,
        )


class ApiDoor(Door):
    """Requests as values: everything but the socket."""

    def __init__(self, registry: Registry, clock: Clock) -> None:
        self.registry, self.clock = registry, clock
        self.api = Api(registry)
        self.api_key = make_api_key(registry, clock)

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        bearer: Optional[str] = None,
        headers: Sequence[Tuple[str, str]] = (),
    ) -> Reply:
        request = RequestReader().next(request_bytes(method, path, body, bearer, headers))
        assert request is not None
        admitted = self.api.admit(request, "192.0.2.7", self.clock.ms)
        if isinstance(admitted, hostenroll.Response):
            return self._reply(admitted)
        responses = self.api.run([admitted], self.clock.ms)
        assert responses is not None
        return self._reply(responses[0])

    @staticmethod
    def _reply(response: hostenroll.Response) -> Reply:
        headers = {name.lower(): value for name, value in response.headers}
        headers["content-type"] = response.content_type
        document = json.loads(response.body) if response.body else None
        return Reply(response.status, document, headers)


class SocketDoor(Door):
    """A server on a real socket, a connection for each request."""

    def __init__(self, port: int, api_key: str) -> None:
        self.port, self.api_key = port, api_key

    def connect(self, timeout: float = 10) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        bearer: Optional[str] = None,
        headers: Sequence[Tuple[str, str]] = (),
    ) -> Reply:
        with self.connect() as peer, peer.makefile("rb") as stream:
            peer.sendall(request_bytes(method, path, body, bearer, headers))
            reply = read_reply(stream, head_only=method == "HEAD")
            assert reply is not None
            return reply

    def send(self, data: bytes, timeout: float = 10) -> List[Reply]:
        """Send bytes, and nothing more; every answer until the server closes."""
        with self.connect(timeout) as peer, peer.makefile("rb") as stream:
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            return list(iter(lambda: read_reply(stream), None))  # type: ignore[arg-type]


def make_api_key(
    registry: Registry, clock: Clock, organization: Optional[str] = None, role: str = "admin"
) -> str:
    def mint(now: int) -> str:
        return registry.mint_api_key(OPERATOR, organization, role, "", now)[1]

    return str(do(registry, clock, mint))


class LiveServer(threading.Thread):
    """A server in a thread of its own, with the clock of the test."""

    def __init__(self, paths: Tuple[str, str], clock: Clock, **options: Any) -> None:
        super().__init__(daemon=True)
        self.paths, self.clock, self.options = paths, clock, options
        self.started = threading.Event()
        self.failure: Optional[BaseException] = None
        self.server: Any = None

    def run(self) -> None:
        try:
            registry_options = {
                name: self.options.pop(name)
                for name in ("interval", "credential_ttl")
                if name in self.options
            }
            registry = open_registry(*self.paths, self.clock.ms, **registry_options)
            try:
                with Server(Api(registry), "127.0.0.1", 0, clock=self.clock, **self.options) as it:
                    self.server = it
                    start = Act(lambda now: registry.start_service(it.url, now))
                    registry.perform(start, self.clock.ms)
                    self.started.set()
                    it.serve_forever()
            finally:
                registry.close()
        except BaseException as error:
            self.failure = error
        finally:
            self.started.set()

    @property
    def port(self) -> int:
        return int(self.server.server_port)

    def __enter__(self) -> LiveServer:
        self.start()
        assert self.started.wait(10)
        assert self.failure is None, self.failure
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()
        self.join(10)
        assert not self.is_alive()
        assert self.failure is None, self.failure


@contextlib.contextmanager
def live_door(paths: Tuple[str, str], clock: Clock, **options: Any) -> Iterator[SocketDoor]:
    """A running server and a key for it."""
    registry = open_registry(*paths, clock.ms)
    api_key = make_api_key(registry, clock)
    registry.close()
    with LiveServer(paths, clock, **options) as live:
        yield SocketDoor(live.port, api_key)


@pytest.fixture(params=["registry", "api", "socket"])
def door(request: Any, paths: Tuple[str, str], clock: Clock) -> Iterator[Door]:
    """Each of the three doors in turn."""
    if request.param == "socket":
        with live_door(paths, clock) as live:
            yield live
        return
    registry = open_registry(*paths, clock.ms)
    kinds: Dict[str, Callable[[Registry, Clock], Door]] = {"registry": RegistryDoor, "api": ApiDoor}
    yield kinds[request.param](registry, clock)
    registry.close()


@pytest.fixture
def api(registry: Registry, clock: Clock) -> ApiDoor:
    return ApiDoor(registry, clock)


@pytest.fixture
def live(paths: Tuple[str, str], clock: Clock) -> Iterator[SocketDoor]:
    with live_door(paths, clock) as live:
        yield live


# Processes


def clean_environment() -> Dict[str, str]:
    """This one's, without what would set hostenroll's options."""
    return {k: v for k, v in os.environ.items() if not k.startswith("HOSTENROLL_")}


def cli(folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, as an operator does."""
    environment = {**clean_environment(), **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, str(MODULE), *arguments],
        cwd=str(folder),
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


class ServerProcess:
    """`hostenroll.py serve` as a process of its own, on a free port."""

    def __init__(self, folder: Path, *options: str, **more: Any) -> None:
        environment = {**clean_environment(), **more.pop("env", {})}
        self.process = subprocess.Popen(
            [sys.executable, str(MODULE), "serve", "--port", "0", *options],
            cwd=str(folder),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **more,
        )
        self.said: List[str] = []
        self.port = self._read_port()
        self.reader = threading.Thread(target=self._drain, daemon=True)
        self.reader.start()

    def _read_port(self) -> int:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            match = re.search(r"listens on \S+:(\d+)$", line.strip())
            if match:
                return int(match[1])
        raise AssertionError(f"it ended with {self.process.wait()}: {''.join(self.said)}")

    def _drain(self) -> None:
        assert self.process.stderr is not None
        self.said.extend(self.process.stderr)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self._wait()

    def terminate(self) -> int:
        """SIGTERM; the exit status."""
        self.process.terminate()
        return self._wait()

    def _wait(self) -> int:
        status = self.process.wait(10)
        self.reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.kill()


slow = pytest.mark.slow
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def curl(*arguments: str) -> Reply:
    """What real curl gets."""
    done = subprocess.run(
        ["curl", "-sS", "-i", "--max-time", "20", *arguments],
        capture_output=True,
        timeout=30,
        check=True,
    )
    head, _, body = done.stdout.rpartition(b"\r\n\r\n")
    lines = head.split(b"\r\n\r\n")[-1].decode().split("\r\n")
    headers = {
        name.lower(): value.strip() for name, _, value in (h.partition(":") for h in lines[1:])
    }
    return Reply(int(lines[0].split()[1]), json.loads(body) if body else None, headers)


# The story


@needs_curl
def test_the_story_of_one_host(tmp_path: Path) -> None:
    """Mint, enroll, beat, used token refused, online, offline when it stops, revoked, refused."""
    with ServerProcess(tmp_path, "--heartbeat-interval", "1s") as server:
        token = cli(tmp_path, "mint-token").stdout.strip()
        body = json.dumps({"token": token, "hostname": "web-1"})
        enrolled = curl(f"{server.url}/api/agent/enroll", "-d", body)
        assert enrolled.status == 201
        number = enrolled.document["hostId"]
        bearer = f"Authorization: Bearer {enrolled.document['credential']}"
        beat = curl("-X", "POST", "-H", bearer, f"{server.url}/api/agent/heartbeat")
        assert (beat.status, beat.document["hostId"]) == (200, number)
        assert curl(f"{server.url}/api/agent/enroll", "-d", body).code == "token-used"
        host = json.loads(cli(tmp_path, "show-host", number, "--json").stdout)
        assert (host["status"], host["lastSeen"]) == ("online", beat.document["lastSeen"])
        assert cli(tmp_path, "revoke-host", number).returncode == 0
        refused = curl("-X", "POST", "-H", bearer, f"{server.url}/api/agent/heartbeat")
        assert (refused.status, refused.code) == (403, "host-revoked")
        assert cli(tmp_path, "restore-host", number).returncode == 0
        assert curl("-X", "POST", "-H", bearer, f"{server.url}/api/agent/heartbeat").status == 200
        assert server.terminate() == 0
    # The silence while no server lives is nobody's fault.
    assert "online" in cli(tmp_path, "list-hosts").stdout
