"""The specification of hostenroll: what it does, section by section, in sentences.

Life-cycle scenarios are written once and go through three doors: the Registry, the Api, and a
server on a real socket. Where a promise is about processes, there are processes: real servers,
real curl, kill -9. The clock is a parameter; nothing sleeps where a clock or an event serves.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import fcntl
import hashlib
import hmac
import io
import ipaddress
import itertools
import json
import logging
import os
import pty
import py_compile
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tracemalloc
import urllib.error
import urllib.request
import warnings
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import pytest

import hostenroll
from hostenroll import Act, Api, Principal, Problem, Registry, RequestReader, Server, open_registry

MODULE = Path(hostenroll.__file__).resolve()
ROOT = MODULE.parent
SOURCE = MODULE.read_text(encoding="utf-8")
# How the tests run the program. CI also runs it with flags, as in HOSTENROLL_PYTHON_FLAGS=-OO; the
# tests go without: their asserts would be gone. Without flags they run what Python would compile
# the script to at each start, half of what a command takes, unless the start is in question.
PYTHON = [sys.executable, *shlex.split(os.environ.get("HOSTENROLL_PYTHON_FLAGS", ""))]
SCRIPT = [*PYTHON, str(MODULE)]
COMPILED = [*PYTHON, py_compile.compile(str(MODULE), doraise=True)]
PROGRAM = COMPILED if len(PYTHON) == 1 else SCRIPT
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


def read_content(content_type: str, body: bytes) -> Any:
    """What a body says: a JSON text as what it stands for, any other as a text."""
    if not body:
        return None
    return json.loads(body) if "json" in content_type else body.decode("utf-8")


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
    document = read_content(headers.get("content-type", ""), body)
    return Reply(int(status_line.split()[1]), document, headers)


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
        arrival = hostenroll.Applicant(
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
            return self.registry.beat(claims, lambda: changes, now)

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
        reader = RequestReader("192.0.2.7")
        request = reader.next(request_bytes(method, path, body, bearer, headers))
        assert request is not None
        admitted = self.api.admit(request, self.clock.ms)
        if isinstance(admitted, hostenroll.Response):
            return self._reply(admitted)
        response = None
        while response is None:  # a list comes in slices, one in a tick
            outcomes = self.api.run([admitted], self.clock.ms, lambda place: request)
            assert outcomes is not None
            response = self.api.answer(admitted, outcomes[0])
        return self._reply(response)

    def tick(self, requests: Sequence[bytes]) -> List[Reply]:
        """Requests in one tick, none of them a read; what each comes to."""
        admitted = [self._admit(data) for data in requests]
        work = [it for it in admitted if not isinstance(it, hostenroll.Response)]
        outcomes = iter(self.api.run(work, self.clock.ms) or [])
        return [
            self._reply(
                it
                if isinstance(it, hostenroll.Response)
                else self.api.answer(it, next(outcomes)) or hostenroll.Response(500)
            )
            for it in admitted
        ]

    def _admit(self, data: bytes) -> Any:
        """By the short way, where it goes that."""
        heard = self.api.hear(data, self.clock.ms)
        request = RequestReader("192.0.2.7").next(data)
        assert request is not None
        return heard[0] if heard else self.api.admit(request, self.clock.ms)

    @staticmethod
    def _reply(response: hostenroll.Response) -> Reply:
        headers = {name.lower(): value for name, value in response.headers}
        headers["content-type"] = response.content_type
        document = read_content(response.content_type, response.body)
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


# For enroll.lan, localhost and 127.0.0.1, until 2120: a certificate and its key, EC P-256.
PAIRS = {
    "one": """\
-----BEGIN CERTIFICATE-----
MIIBdDCCARugAwIBAgIBATAKBggqhkjOPQQDAjAVMRMwEQYDVQQDDAplbnJvbGwu
bGFuMCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAVMRMwEQYDVQQD
DAplbnJvbGwubGFuMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEYCihGu81/+P4
FPuVDn10OF1f7+OyH64aqFtbMz9uY/FxNPxQBfjtdcs/XpzlGVv5Y1Dy1nwWKYs/
AEfkvbZ6NKNaMFgwJgYDVR0RBB8wHYIKZW5yb2xsLmxhboIJbG9jYWxob3N0hwR/
AAABMA8GA1UdEwEB/wQFMAMBAf8wHQYDVR0OBBYEFKcRbyQrBy2v3QnvKmoGqzDp
E7jgMAoGCCqGSM49BAMCA0cAMEQCIAnzjhOiqFi54D4RgLkWuogR+0OOv3yB1FZi
IALEmtUlAiAt3y7SCgsLAjY2sSULPDECR4hk2sOQpEYCbvjbN9NoTg==
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgg2JYAMaTC0DE6CrG
u3r3vGJqCiaR0MXt6sE9qwCvQRuhRANCAARgKKEa7zX/4/gU+5UOfXQ4XV/v47If
rhqoW1szP25j8XE0/FAF+O11yz9enOUZW/ljUPLWfBYpiz8AR+S9tno0
-----END PRIVATE KEY-----
""",
    "other": """\
-----BEGIN CERTIFICATE-----
MIIBdDCCARugAwIBAgIBAjAKBggqhkjOPQQDAjAVMRMwEQYDVQQDDAplbnJvbGwu
bGFuMCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAVMRMwEQYDVQQD
DAplbnJvbGwubGFuMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEopJsbCzeaARr
sT+vZbKvsZid2MjIheGQi5ZfHLaTB3RKfF0ryiNd2E8jatYeaMBtmLT/feBFkVGK
DTh5nV9PW6NaMFgwJgYDVR0RBB8wHYIKZW5yb2xsLmxhboIJbG9jYWxob3N0hwR/
AAABMA8GA1UdEwEB/wQFMAMBAf8wHQYDVR0OBBYEFB0j1b4Wo6jsLYBOiF9VyCDx
0ZqvMAoGCCqGSM49BAMCA0cAMEQCIGGb3tC9ibNorFE6Of3Gz9Mqemyy2yuAPqdp
UIQ8c7fTAiAWnCO6g3GWw112UJJAiZ+yx4fIdl6lYMZniSO1iJ3P+w==
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgLmXGkUp1o3qIoe+/
R267l29HJoeEhEFuGdrSSC37Vf6hRANCAASikmxsLN5oBGuxP69lsq+xmJ3YyMiF
4ZCLll8ctpMHdEp8XSvKI13YTyNq1h5owG2YtP994EWRUYoNOHmdX09b
-----END PRIVATE KEY-----
""",
}
CERTIFICATE_END = "-----END CERTIFICATE-----\n"


def certificate_of(pair: str) -> str:
    return PAIRS[pair].partition(CERTIFICATE_END)[0] + CERTIFICATE_END


def write_pair(folder: Path, pair: str = "one") -> Tuple[str, str]:
    """A certificate and its key, in the files that serve is given."""
    files = folder / "tls.crt", folder / "tls.key"
    files[0].write_text(certificate_of(pair))
    files[1].write_text(PAIRS[pair].partition(CERTIFICATE_END)[2])
    return str(files[0]), str(files[1])


def trusting(pair: str = "one", **settings: Any) -> ssl.SSLContext:
    """A client's TLS that believes one certificate and no other."""
    context = ssl.create_default_context(cadata=certificate_of(pair))
    for name, value in settings.items():
        setattr(context, name, value)
    return context


class TlsDoor(SocketDoor):
    """A server on a real socket, through TLS."""

    def __init__(self, port: int, api_key: str, context: Optional[ssl.SSLContext] = None) -> None:
        super().__init__(port, api_key)
        self.context = context or trusting()

    def connect(self, timeout: float = 10) -> ssl.SSLSocket:
        return self.context.wrap_socket(
            super().connect(timeout), server_hostname="enroll.lan", suppress_ragged_eofs=False
        )

    def send(self, data: bytes, timeout: float = 10) -> List[Reply]:
        with self.connect(timeout) as peer, peer.makefile("rb") as stream:
            peer.sendall(data)
            socket.socket.shutdown(peer, socket.SHUT_WR)  # below TLS
            return list(iter(lambda: read_reply(stream), None))  # type: ignore[arg-type]


@contextlib.contextmanager
def tls_door(paths: Tuple[str, str], clock: Clock, **options: Any) -> Iterator[TlsDoor]:
    """A running server that speaks TLS, and a key for it."""
    pair = write_pair(Path(paths[0]).parent)
    options["load_tls"] = lambda: hostenroll.load_tls(*pair)[0]
    with live_door(paths, clock, **options) as live:
        yield TlsDoor(live.port, live.api_key)


@pytest.fixture(params=["registry", "api", "socket", "tls"])
def door(request: Any, paths: Tuple[str, str], clock: Clock) -> Iterator[Door]:
    """Each of the four doors in turn."""
    live = {"socket": live_door, "tls": tls_door}.get(request.param)
    if live is not None:
        with live(paths, clock) as there:
            yield there
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
    """This one's, without what would set hostenroll's options, or change how it writes."""
    strange = ("HOSTENROLL_", "PYTHONUNBUFFERED", "NO_COLOR", "COLUMNS")
    return {name: text for name, text in os.environ.items() if not name.startswith(strange)}


def cli(folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, as an operator does."""
    environment = {**clean_environment(), **options.pop("env", {})}
    return subprocess.run(
        [*PROGRAM, *arguments],
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
            [*more.pop("program", PROGRAM), "serve", "--port", "0", *options],
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


def table(rows: Dict[str, Any]) -> List[Any]:
    """Parameters by their ids; a row that is no tuple is one parameter."""
    return [
        pytest.param(*(row if type(row) is tuple else (row,)), id=name)
        for name, row in rows.items()
    ]


slow = pytest.mark.slow


def sample(rows: Dict[str, Any], *always: str) -> List[Any]:
    """A table of which the rows that are named always run, and the others with what is slow."""
    return [
        row if row.id in always else pytest.param(*row.values, id=row.id, marks=slow)
        for row in table(rows)
    ]


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


# Promises

SECTIONS = (
    "Limits", "Problems", "Shapes", "Secrets", "Store", "Registry",
    "Messages", "Assets", "Api", "Server", "Command line",
)  # fmt: skip
# The table of the design: which sections each may use, beside itself.
MAY_USE = {
    1: (), 2: (1,), 3: (1, 2), 4: (1, 2), 5: (1,), 6: (1, 2, 3, 4, 5), 7: (1, 2), 8: (1,),
    9: (1, 2, 3, 4, 6, 7, 8), 10: (1, 2, 7, 9), 11: (1, 2, 3, 4, 5, 6, 8, 9, 10),
}  # fmt: skip
POWERS = {
    "sqlite3": 5, "fcntl": 5, "secrets": 4, "hmac": 4, "hashlib": 4, "selectors": 10,
    "socket": 10, "ssl": 10, "argparse": 11, "print": 11, "os.environ": 11, "time.time": 11,
}  # fmt: skip
TREE = ast.parse(SOURCE)
BANNERS = [
    (SOURCE.count("\n", 0, match.start()) + 1, int(match[1]), match[2])
    for match in re.finditer(r"^# (\d+)\. (.+)$", SOURCE, re.MULTILINE)
]


def section_of(node: Any) -> int:
    """The section that a top-level statement stands in; 0 for what is above the first banner."""
    return max((number for line, number, _ in BANNERS if line <= node.lineno), default=0)


def names_defined(node: Any) -> List[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
    inner = [name for target in targets for name in ast.walk(target)]
    return [name.id for name in inner if isinstance(name, ast.Name)]


def names_used(node: Any) -> Dict[str, int]:
    """The names that a statement takes from outside itself, each with a line that does.

    Annotations are left out: they say what comes in, and nothing is called by them.
    """
    own = {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    used: Dict[str, int] = {}
    skipped = set()
    for inner in ast.walk(node):
        for annotation in (getattr(inner, "annotation", None), getattr(inner, "returns", None)):
            if annotation is not None:
                skipped.update(map(id, ast.walk(annotation)))
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and id(inner) not in skipped:
            if isinstance(inner.ctx, ast.Load):
                used.setdefault(inner.id, inner.lineno)
            else:
                own.add(inner.id)
    return {name: line for name, line in used.items() if name not in own}


def test_it_imports_the_standard_library_and_nothing_else() -> None:
    roots = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add(str(node.module).split(".")[0])
    assert {"sqlite3", "hmac"} <= roots
    known = getattr(sys, "stdlib_module_names", None)  # from Python 3.10 on
    if known is None:
        known = {root for root in roots if "site-packages" not in str(__import__(root))}
        known.add("sqlite3")  # of which CI puts an older one there
    assert roots <= set(known)
    assert not re.search(r"\b(__import__|importlib|exec|eval)\b *\(", SOURCE)


def test_the_sections_stand_in_their_order() -> None:
    assert [(number, name) for _, number, name in BANNERS] == list(enumerate(SECTIONS, 1))


def test_sections_only_look_up_and_only_where_they_may() -> None:
    home: Dict[str, int] = {}
    for node in TREE.body:
        if not isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr, ast.If)):
            home.update(dict.fromkeys(names_defined(node), section_of(node)))
    assert len(home) > 150
    strayed = [
        f"{section_of(node)} uses {name} of {home[name]} in line {line}"
        for node in TREE.body
        for name, line in names_used(node).items()
        if name in home and home[name] not in (section_of(node), *MAY_USE[section_of(node) or 11])
    ]
    assert strayed == []


def test_each_power_stands_in_one_section() -> None:
    seen: Dict[str, set] = {}
    for node in TREE.body:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
                seen.setdefault(f"{inner.value.id}.{inner.attr}", set()).add(section_of(node))
            elif isinstance(inner, ast.Name):
                seen.setdefault(inner.id, set()).add(section_of(node))
    assert seen["sqlite3"] and seen["print"] and seen["time.time"]
    strayed = {power: seen[power] - {at} for power, at in POWERS.items() if power in seen}
    assert {power: where for power, where in strayed.items() if where} == {}


def test_schema_sql_is_what_the_module_has_and_prints(tmp_path: Path) -> None:
    copy = (ROOT / "schema.sql").read_bytes()
    assert copy == hostenroll.SCHEMA.encode()
    assert cli(tmp_path, "schema").stdout.encode() == copy
    assert list(tmp_path.iterdir()) == []


class OtherServer(ServerProcess):
    """A server that is started by another command line, which ends with `serve --port 0`."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=str(folder),
            env=clean_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said = []
        self.port = self._read_port()
        self.reader = threading.Thread(target=self._drain, daemon=True)
        self.reader.start()


@pytest.mark.parametrize(
    "flags",
    sample(
        {
            "without site-packages": (("-I", "-S"),),
            "without asserts": (("-OO",),),
            "with every warning an error": (("-W", "error", "-X", "dev"),),
        },
        "without site-packages",
    ),
)
def test_one_file_alone_in_a_folder_is_the_whole_program(
    flags: Tuple[str, ...], tmp_path: Path
) -> None:
    shutil.copy(MODULE, tmp_path / "hostenroll.py")
    command = (sys.executable, *flags, "hostenroll.py")
    minted = subprocess.run(
        [*command, "mint-token"], cwd=str(tmp_path), env=clean_environment(), capture_output=True
    )
    assert minted.returncode == 0
    with OtherServer(tmp_path, *command, "serve", "--port", "0") as server:
        door = SocketDoor(server.port, "")
        enrolled = door.enroll(minted.stdout.decode().strip())
        assert door.beat(enrolled.document["credential"]).status == 200
        assert server.terminate() == 0
    assert "Warning" not in minted.stderr.decode() + "".join(server.said)


def test_a_server_starts_where_there_is_no_proc(tmp_path: Path) -> None:
    hidden = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$0" "$@"')
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run([*hidden, "true"], capture_output=True, check=False).returncode == 0:
            command = (*hidden, sys.executable, str(MODULE), "serve", "--port", "0")
            with OtherServer(tmp_path, *command) as server:
                assert SocketDoor(server.port, "").call("GET", "/healthz").status == 200
                assert server.terminate() == 0
            return
    pytest.skip("nothing can be mounted here")


WITHOUT_MEMFD = "import os\nif hasattr(os, 'memfd_create'):\n    del os.memfd_create\n"
LOADER = "/lib64/ld-linux-x86-64.so.2"


@pytest.mark.parametrize(
    "before, after",
    table({
        "as usual": ((), ()),
        "with options": ((), ("-O", "-X", "utf8", "-W", "error")),
        "after the last option": ((), ("--",)),
        "by the loader": ((LOADER,), ()),
        "without memfd_create": (("env", "PYTHONPATH=strange"), ()),
    }),
)  # fmt: skip
def test_a_server_starts_over_however_it_was_started(
    before: Tuple[str, ...], after: Tuple[str, ...], tmp_path: Path
) -> None:
    if before == (LOADER,) and not os.path.exists(LOADER):
        pytest.skip("this machine has another loader")
    name = "a folder, à côté" if sys.getfilesystemencoding() == "utf-8" else "a folder"
    folder = tmp_path / name
    (folder / "strange").mkdir(parents=True)
    (folder / "strange" / "sitecustomize.py").write_text(WITHOUT_MEMFD)
    shutil.copy(MODULE, folder / "hostenroll.py")
    python = os.path.realpath(sys.executable) if before == (LOADER,) else sys.executable
    command = (*before, python, *after, str(folder / "hostenroll.py"), "serve", "--port", "0")
    with OtherServer(folder, *command) as server:
        assert SocketDoor(server.port, "").call("GET", "/healthz").status == 200
        if sys.platform == "linux":
            words = Path(f"/proc/{server.process.pid}/cmdline").read_bytes().split(b"\0")
            is_told = sys.version_info >= (3, 10) or LOADER not in before
            assert (b"-c" in words) == (is_told and "PYTHONPATH=strange" not in before)
        assert server.terminate() == 0
    assert "Traceback" not in "".join(server.said)


def test_the_project_is_five_files() -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files"]
    listed = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split("\n")
    top = {name.split("/")[0] for name in listed if name}
    assert {name for name in top if not name.startswith(".")} == {
        "hostenroll.py", "test_hostenroll.py", "schema.sql", "pyproject.toml", "README.md",
    }  # fmt: skip


def test_no_line_is_longer_than_a_hundred_columns() -> None:
    assert [n for n, line in enumerate(SOURCE.split("\n"), 1) if len(line) > 100] == []


def test_the_readme_lists_every_route_command_and_refusal() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for route in hostenroll.ROUTES:
        assert f"| {route.method} | `{route.path}` | {route.caller} | {route.summary} |" in readme
    for command in hostenroll.COMMANDS:
        assert f"| `{command.name}` | {command.summary} |" in readme
    for problem in hostenroll.problems():
        assert f"| `{problem.code}` | {problem.status} | {problem.remedy} |" in readme


def functions(names: str) -> str:
    return rf"(?i)\b(?:{'|'.join(names.split())}) *\("


# What is newer than 3.31, the SQLite of the oldest boxes that we run on, by an example of each.
NEWER_SQL = {
    "SELECT iif(a, b, c)": functions("iif if"),  # 3.32, 3.48
    "SELECT json_extract(a, '$')": functions(r"jsonb?_\w+ jsonb?"),  # not in every build till 3.38
    "UPDATE t SET a = 1 FROM u WHERE u.b = t.b": r"\bUPDATE\b[^()]*\bFROM\b",  # 3.33
    "SELECT name FROM sqlite_schema": r"sqlite_(?:temp_)?schema",  # 3.33
    "SELECT substring(a, 1)": functions("substring"),  # 3.34
    "DELETE FROM t RETURNING a": r"\bRETURNING\b",  # 3.35
    "WITH a AS MATERIALIZED (SELECT 1)": r"\bMATERIALIZED\b",  # 3.35
    "ALTER TABLE t DROP COLUMN a": r"\bDROP COLUMN\b",  # 3.35
    "SELECT ceil(a), sqrt(b)": functions(  # 3.35, and not in every build
        "a?cosh? a?sinh? a?tanh? atan2 ceil ceiling degrees exp floor ln log log10 log2 mod pi pow"
        " power radians sign sqrt trunc"
    ),
    "CREATE TABLE t (a TEXT) STRICT": r"\bSTRICT\b",  # 3.37
    "PRAGMA table_list": r"\bPRAGMA (?:analysis_limit|table_list)\b",  # 3.32, 3.37
    "SELECT unixepoch('now')": functions("unixepoch timediff"),  # 3.38, 3.43
    "SELECT format('%d', a)": functions("format octet_length unhex unistr"),  # 3.38 to 3.50
    "SELECT a ->> 'b'": r"->",  # 3.38
    "SELECT a FROM t FULL JOIN u": r"\b(?:FULL|RIGHT)(?: OUTER)? JOIN\b",  # 3.39
    "SELECT a IS DISTINCT FROM b": r"\bDISTINCT FROM\b",  # 3.39
    "SELECT concat(a, b)": functions("concat concat_ws string_agg"),  # 3.44
    "SELECT group_concat(a ORDER BY b)": r"(?i)group_concat *\([^()]*\border by\b",  # 3.44
    "SELECT 1_000": r"\b[0-9]+_[0-9]",  # 3.46
}


def sql_in(source: str) -> List[str]:
    """Every text in a source but docstrings, without SQL's comments."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    said = [text.value for text in texts if isinstance(text.value, str) and id(text) not in prose]
    return [re.sub("--.*", "", text) for text in said]


def newer(statement: str) -> List[str]:
    """What of it an old SQLite does not know. A subquery stands for itself."""
    flat = re.sub(r"\((?:[^()]|\([^()]*\))*\)", "()", statement)
    return [
        example
        for example, pattern in NEWER_SQL.items()
        if re.search(pattern, flat if "UPDATE" in pattern else statement)
    ]


def test_the_sql_is_old_enough_for_sqlite_3_31() -> None:
    start, end = (line for line, number, _ in BANNERS if number in (5, 6))
    store = "\n".join(SOURCE.split("\n")[start:end])
    statements = sql_in(store)
    assert any("RAISE(ABORT" in statement for statement in statements) and len(statements) > 100
    assert [(statement, newer(statement)) for statement in statements if newer(statement)] == []
    assert [example for example in NEWER_SQL if example not in newer(example)] == []
    outside = SOURCE.replace(store, "")
    assert not re.search(r"(SELECT .+ FROM|INSERT INTO|DELETE FROM|UPDATE \w+ SET) ", outside)


def test_the_sqlite_is_the_one_that_this_run_is_about(tmp_path: Path) -> None:
    """CI has an older one for a run, which servers and commands have to run on, too."""
    wanted = os.environ.get("HOSTENROLL_SQLITE", sqlite3.sqlite_version)
    key = api_key_of(tmp_path)
    with ServerProcess(tmp_path) as server:
        said = SocketDoor(server.port, key).call("GET", "/metrics", bearer=key).document
    assert f'sqlite="{wanted}"' in said and sqlite3.sqlite_version == wanted


# 2. Problems

CODES = {  # what others hold us to
    code: status
    for status, codes in {
        400: "malformed-request invalid-body invalid-query",
        401: "token-unknown token-expired token-revoked token-used credential-missing "
        "credential-invalid credential-expired credential-superseded api-key-invalid",
        403: "forbidden token-host-mismatch host-revoked",
        404: "not-found",
        405: "method-not-allowed",
        408: "request-timeout",
        409: "conflict",
        410: "host-unknown",
        413: "body-too-large",
        417: "expectation-failed",
        429: "too-many-requests",
        431: "head-too-large",
        500: "internal",
        501: "not-implemented",
        503: "overloaded storage-unavailable",
        505: "http-version",
    }.items()
    for code in codes.split()
}
KINDS_OF_PROBLEM = [
    kind
    for kind in vars(hostenroll).values()
    if isinstance(kind, type) and issubclass(kind, Problem)
]
each_problem = pytest.mark.parametrize(
    "kind", [pytest.param(kind, id=kind.code) for kind in hostenroll.problems()]
)


def test_every_code_has_its_status_and_there_are_no_others() -> None:
    assert {kind.code: kind.status for kind in hostenroll.problems()} == CODES
    assert len(hostenroll.problems()) == len(CODES)


def test_two_classes_share_a_code_only_with_its_status_and_title() -> None:
    raised = set(KINDS_OF_PROBLEM) - {hostenroll.Unauthorized, hostenroll.Unframed}
    facts = {(kind.code, kind.status, kind.title, kind.remedy) for kind in raised}
    assert sorted(code for code, *_ in facts) == sorted(CODES)


@each_problem
def test_a_problem_document_has_the_members_of_rfc_9457(kind: Any) -> None:
    document = kind().document()
    lists = ["errors"] if kind.code in ("invalid-body", "invalid-query") else []
    assert list(document) == ["type", "title", "status", "detail", "code", *lists]
    assert document["type"] == f"urn:hostenroll:problem:{document['code']}"
    assert document["code"] == kind.code and document["status"] == kind.status
    assert kind("Do that.").document() == {**document, "detail": "Do that."}
    assert re.fullmatch(r"[A-Z][^\n]+[^.\n]", document["title"])


@each_problem
def test_every_problem_says_what_to_do(kind: Any) -> None:
    verbs = "Check|Choose|Correct|Enroll|Expect|Get|Send|Speak|Try|Use|Wait|get|ask"
    assert re.search(rf"\b({verbs})\b [^\n]+\.$", kind.remedy)
    assert str(kind()) == kind().detail == kind.remedy


def test_every_detail_in_the_source_is_a_whole_sentence() -> None:
    names = {kind.__name__ for kind in KINDS_OF_PROBLEM}
    details = [
        ast.unparse(call.args[0])
        for call in ast.walk(ast.parse(SOURCE))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        if call.func.id in names and call.args
    ]
    assert len(details) > 10
    assert [text for text in details if not re.fullmatch(r"f?(['\"])[A-Z{].*\.\1", text)] == []


@each_problem
def test_a_refusal_is_a_problem_document_with_the_fields_its_status_asks_for(kind: Any) -> None:
    """RFC 9110: 401 MUST have WWW-Authenticate (15.5.2), 503 SHOULD have Retry-After (15.6.4);
    RFC 6585: 429 MAY have it (section 4)."""
    response = hostenroll.refusal(kind())
    assert (response.status, response.content_type) == (kind.status, "application/problem+json")
    assert json.loads(response.body) == kind().document()
    headers = dict(response.headers)
    assert ("WWW-Authenticate" in headers) == (kind.status == 401)
    assert headers.get("WWW-Authenticate", "Bearer realm=").startswith("Bearer realm=")
    assert headers.get("Retry-After", "absent").isdigit() == (kind.status in (429, 503))
    assert response.closes == issubclass(kind, hostenroll.Unframed)


def test_a_challenge_names_no_error_where_nothing_was_presented() -> None:
    """RFC 6750 section 3.1: without authentication information there SHOULD be no error code."""
    challenges = [dict(kind().headers())["WWW-Authenticate"] for kind in (
        hostenroll.CredentialMissing, hostenroll.CredentialInvalid)]  # fmt: skip
    realm = 'Bearer realm="hostenroll"'
    assert challenges == [realm, f'{realm}, error="invalid_token"']


def test_the_headers_of_a_problem_come_beside_those_of_its_status() -> None:
    problem = hostenroll.MethodNotAllowed(headers=[("Allow", "GET")])
    assert problem.headers() == (("Allow", "GET"),)
    assert ("X", "y") in hostenroll.TokenUsed(headers=[("X", "y")]).headers()


def test_errors_stand_in_the_document_by_field() -> None:
    problem = hostenroll.InvalidBody(errors=[hostenroll.FieldError("name", "is missing")])
    assert problem.document()["errors"] == [{"field": "name", "detail": "is missing"}]


# 3. Shapes

WORD = hostenroll.Text(5, 2, "[a-z]+", "small letters")
COLOUR = hostenroll.Choice("red", "blue")
SHAPE = hostenroll.Shape(
    hostenroll.Field("word", WORD, required=True),
    hostenroll.Field("count", hostenroll.Whole((1, 10))),
    hostenroll.Field("colour", COLOUR),
    hostenroll.Field("label", hostenroll.Labels(), repeats=True),
)
OPEN = hostenroll.Shape(hostenroll.Field("word", WORD), open=True)
KINDS = {
    "text": hostenroll.Text(5),
    "text with a pattern": WORD,
    "whole": hostenroll.Whole((1, 10)),
    "whole below zero": hostenroll.Whole((-3, 0)),
    "choice": COLOUR,
    "labels": hostenroll.Labels(),
    "hostname": hostenroll.HOSTNAME,
    "slug": hostenroll.SLUG,
    "cursor": hostenroll.CURSOR,
}
VALUES: List[Any] = [
    "", "a", "ab", "abc", "abcde", "abcdef", "AB", "a b", "é", "😀" * 5, "😀" * 6,
    "a-b", "-a", "a-", "a.b", "a.", ".a", "a" * 64, "a" * 65, "a" * 253, "a" * 254, "0" * 16,
    "red", "blue", "RED", "red ", -4, -3, -1, 0, 1, 10, 11, 10**18, True, False, None, 1.5,
    [], ["red"], {}, {"a": "b"}, {"a/b.c": ""}, {"": "b"}, {"a b": "c"}, {"a": 1}, {"a": None},
    {"a" * 63: "v" * 255}, {"a" * 64: "v"}, {"a": "v" * 256},
    {str(n): "" for n in range(32)}, {str(n): "" for n in range(33)},
]  # fmt: skip


def accepts(kind: Any, value: Any) -> bool:
    try:
        assert kind.check(value) == value
    except ValueError as error:
        assert str(error)
        return False
    return True


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (hostenroll.Text(5), "at most 5"),
        (hostenroll.Text(5, 2), "2 to 5"),
        (hostenroll.Text(4, 4), "4"),
        (hostenroll.CURSOR, "16"),
    ],
    ids=["at most", "from and to", "exactly", "a cursor"],
)
def test_the_length_of_a_text_is_said_as_people_say_it(kind: hostenroll.Kind, said: str) -> None:
    with pytest.raises(ValueError, match=f"^must have {said} characters$"):
        kind.check("x" * 17)


def allows(schema: Dict[str, Any], value: Any) -> bool:
    """JSON Schema 2020-12, as much of it as is used here."""
    if "anyOf" in schema:
        return any(allows(one, value) for one in schema["anyOf"])
    types = {"string": str, "integer": (int, float), "object": dict, "array": list}
    if schema["type"] == "null" or isinstance(value, bool):
        return schema["type"] == "null" and value is None
    if not isinstance(value, types[schema["type"]]):
        return False
    if isinstance(value, str):
        pattern = re.sub(r"\$$", r"\\Z", schema.get("pattern", ""))
        return (
            schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
            and value in schema.get("enum", [value])
            and bool(re.search(pattern, value))
        )
    if isinstance(value, (int, float)):
        return value % 1 == 0 and bool(schema["minimum"] <= value <= schema["maximum"])
    if isinstance(value, list):
        return len(value) <= schema["maxItems"] and all(
            allows(schema["items"], item) for item in value
        )
    named, others = schema.get("properties", {}), schema["additionalProperties"]
    return (
        len(value) <= schema.get("maxProperties", len(value))
        and set(schema.get("required", ())) <= set(value)
        and all(allows({"type": "string", **schema.get("propertyNames", {})}, key) for key in value)
        and all(
            allows(named.get(key, others), value[key])
            if isinstance(named.get(key, others), dict)
            else others
            for key in value
        )
    )


@pytest.mark.parametrize("kind", table(KINDS))
def test_the_schema_describes_what_the_check_takes(kind: Any) -> None:
    taken = [value for value in VALUES if accepts(kind, value)]
    assert taken == [value for value in VALUES if allows(kind.schema(), value)]
    assert 0 < len(taken) < len(VALUES)


UNSHOWABLE = {
    "NUL": "\0", "CR LF": "\r\n", "newline": "\n", "tab": "\t", "escape": "\x1b[2J",
    "delete": "\x7f", "C1 control": "\x9b2J", "next line": "\x85", "line separator": "\u2028",
    "paragraph separator": "\u2029", "right-to-left override": "\u202e", "embedding": "\u202a",
    "isolate": "\u2066", "pop isolate": "\u2069", "left-to-right mark": "\u200e",
    "Arabic letter mark": "\u061c", "byte order mark": "\ufeff", "lone surrogate": "\udcff",
}  # fmt: skip


@pytest.mark.parametrize("nasty", table(UNSHOWABLE))
def test_no_text_brings_control_characters_or_reorders_what_stands_around_it(nasty: str) -> None:
    for text in (nasty, f"a{nasty}", f"{nasty}b", f"a{nasty}b"):
        assert not accepts(hostenroll.Text(50), text)
        assert not accepts(WORD, text) and not accepts(COLOUR, f"red{nasty}")
        assert not accepts(hostenroll.Labels(), {"a": text})
        assert not accepts(hostenroll.Labels(), {text: "b"})
    assert nasty not in hostenroll.printable(f"a{nasty}b")
    with pytest.raises(hostenroll.InvalidBody) as refused:
        SHAPE.check({"word": "abc", nasty: 1})
    assert nasty not in refused.value.errors[0].field


def test_a_peers_text_is_shown_short() -> None:
    assert hostenroll.printable("a" * 64) == "a" * 64
    assert hostenroll.printable("a" * 65) == "a" * 61 + "..."


@pytest.mark.parametrize(
    "value",
    table({"true": True, "float": 3.5, "text": "3", "null": None, "list": [3], "object": {},
           "zero": 0, "eleven": 11, "below": -1, "infinite": float("inf")}),
)  # fmt: skip
def test_a_count_is_an_integer_within_its_bounds(value: Any) -> None:
    with pytest.raises(hostenroll.InvalidBody) as refused:
        SHAPE.check({"word": "abc", "count": value})
    assert [error.field for error in refused.value.errors] == ["count"]
    for within in (1, 10):
        assert SHAPE.check({"word": "abc", "count": within})["count"] == within


@pytest.mark.parametrize(
    "text",
    ["", "+3", " 3", "3 ", "3\n", "0x3", "3.0", "1_0", "\u0663", "\u00b3", "1e1", "--3", "9" * 20,
     "9" * 5000],
)  # fmt: skip
def test_a_count_in_a_query_is_plain_digits(text: str) -> None:
    with pytest.raises(hostenroll.InvalidQuery):
        SHAPE.read([("count", text)])
    assert SHAPE.read([("count", "3")]) == {"count": 3}


def test_all_that_is_wrong_with_a_body_is_named_at_once() -> None:
    with pytest.raises(hostenroll.InvalidBody) as refused:
        SHAPE.check({"count": 0, "colour": ["red"], "label": {"a": 1}, "constructor": 1})
    errors = dict(refused.value.errors)
    assert set(errors) == {"word", "count", "colour", "label", "constructor"}
    assert errors["word"] == "is missing" and errors["constructor"] == "is not known here"
    assert all(errors.values())


def test_an_open_shape_ignores_what_it_does_not_know_and_gives_back_only_what_it_does() -> None:
    assert OPEN.check({"word": "abc", "__class__": {}, "later": [1]}) == {"word": "abc"}
    assert OPEN.check({}) == {}
    assert OPEN.schema()["additionalProperties"] is True
    schema = SHAPE.schema()
    assert (schema["required"], schema["additionalProperties"]) == (["word"], False)
    assert list(schema["properties"]) == ["word", "count", "colour", "label"]


@pytest.mark.parametrize(
    "value", table({"array": [], "text": "word", "number": 1, "null": None, "true": True})
)
def test_a_body_is_an_object(value: Any) -> None:
    for shape in (SHAPE, OPEN):
        with pytest.raises(hostenroll.InvalidBody):
            shape.check(value)


def test_a_query_parameter_comes_once_unless_it_repeats() -> None:
    pairs = [("label", "a=b"), ("word", "abc"), ("label", "c=d=e"), ("label", "a=")]
    assert SHAPE.read(pairs) == {"label": [("a", "b"), ("c", "d=e"), ("a", "")], "word": "abc"}
    with pytest.raises(hostenroll.InvalidQuery) as refused:
        SHAPE.read([("word", "abc"), ("word", "abc"), ("x", "1"), ("label", "a"), ("count", "0")])
    assert {error.field for error in refused.value.errors} == {"word", "x", "label", "count"}


@pytest.mark.parametrize(
    "body, value",
    table({
        "an object": (b'{"a":1}', {"a": 1}),
        "white space around": (b' \r\n\t{ "a" : [ ] }\n', {"a": []}),
        "UTF-8": ('{"é":"😀"}'.encode(), {"é": "😀"}),
        "a surrogate pair": (b'{"a":"\\ud83d\\ude00"}', {"a": "😀"}),
        "an escaped NUL": (b'{"a":"\\u0000"}', {"a": "\0"}),
        "a great integer": (b'{"a":9223372036854775807}', {"a": 2**63 - 1}),
        "one name at two depths": (b'{"a":{"a":{"a":1}}}', {"a": {"a": {"a": 1}}}),
        "one name in two objects": (b'[{"a":1},{"a":2}]', [{"a": 1}, {"a": 2}]),
        "some depth": (b"[" * 50 + b"]" * 50, json.loads("[" * 50 + "]" * 50)),
        "no object, which is the shape's to judge": (b'"text"', "text"),
    }),
)  # fmt: skip
def test_a_json_text_is_read(body: bytes, value: Any) -> None:
    assert hostenroll.read_json(body) == value


NOT_JSON: Dict[str, bytes] = {
    "empty": b"",
    "white space": b" \n",
    "cut off": b'{"a":1',
    "something behind": b"{}x",
    "two texts": b"{}{}",
    "a form": b"token=het_1&hostname=web-1",
    "a member twice": b'{"a":1,"a":1}',
    "a member twice, spelled otherwise": b'{"a":1,"\\u0061":2}',
    "a member twice, deep": b'{"x":[{"y":{"a":1,"b":2,"a":3}}]}',
    "NaN": b'{"a":NaN}',
    "Infinity": b'{"a":[Infinity]}',
    "-Infinity": b'{"a":-Infinity}',
    "a lone high surrogate": b'{"a":"\\ud800"}',
    "a lone low surrogate": b'{"a":"x\\udc00y"}',
    "surrogates in the wrong order": b'{"a":"\\ude00\\ud83d"}',
    "a lone surrogate as a name": b'{"\\uD800":1}',
    "a surrogate in UTF-8": b'{"a":"\xed\xa0\x80"}',
    "an overlong slash": b'{"a":"\xc0\xaf"}',
    "latin-1": b'{"a":"\xe9"}',
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "UTF-16 without a mark": '{"a":1}'.encode("utf-16-le"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a raw newline in a text": b'{"a":"x\ny"}',
    "a raw NUL in a text": b'{"a":"x\0y"}',
    "NUL behind": b"{}\0",
    "no-break space": "{\u00a0}".encode(),
    "single quotes": b"{'a':1}",
    "no quotes": b"{a:1}",
    "a comma at the end": b'{"a":1,}',
    "a comment": b'{"a":1}//',
    "a leading zero": b'{"a":01}',
    "a plus sign": b'{"a":+1}',
    "a bare point": b'{"a":1.}',
    "hexadecimal": b'{"a":0x1}',
    "Arabic digits": '{"a":\u0661}'.encode(),
    "too deep in arrays": b"[" * 65_000,
    "too deep in objects": b'{"a":' * 13_000 + b"1" + b"}" * 13_000,
    "too deep, with an escape": b'["\\u0041",' + b"[" * 30_000 + b"]" * 30_001,
}  # fmt: skip


@pytest.mark.parametrize("body", table(NOT_JSON))
def test_what_is_not_strictly_json_is_refused_at_once(body: bytes) -> None:
    began = time.process_time()
    with pytest.raises(hostenroll.InvalidBody):
        hostenroll.read_json(body)
    assert time.process_time() - began < 0.25


ANSWER_KINDS = {
    "time": hostenroll.Moment(),
    "text or null": hostenroll.Nullable(WORD),
    "choice or null": hostenroll.Nullable(COLOUR),
    "list of texts": hostenroll.ListOf(WORD, 2),
    "list of texts or null": hostenroll.ListOf(hostenroll.Nullable(WORD), 2),
    "list of lists": hostenroll.ListOf(hostenroll.ListOf(COLOUR, 1), 1),
    "object": hostenroll.ObjectOf(SHAPE),
    "objects": hostenroll.ListOf(hostenroll.ObjectOf(SHAPE), 2),
    "counts as floats": hostenroll.Whole((1, 10)),
}
ANSWER_VALUES: List[Any] = [
    "2027-01-15T08:00:00.000Z", "2027-01-15T08:00:00Z", "2027-01-15T08:00:00.000z",
    "2027-01-15 08:00:00.000Z", "2027-01-15T08:00:00.000+00:00", "2027-01-15T08:00:00.000Z\n",
    None, True, 0, 1, 1.0, 10.0, 11.0, 1.5, float("inf"), float("nan"), "", "abc", "red", [],
    [None], ["abc"], ["abc", "abc"], ["abc", None], ["abc"] * 3, ["red"], [["red"]], [["red"] * 2],
    [[], []], [1], {}, {"word": "abc"}, {"word": None}, {"word": "abc", "count": 1},
    {"word": "abc", "count": 0}, {"word": "abc", "colour": "red", "label": {"a": "b"}},
    {"word": "abc", "more": 1}, [{"word": "abc"}], [{"word": "abc"}, {}], [{"word": "abc"}] * 3,
]  # fmt: skip


@pytest.mark.parametrize("kind", table(ANSWER_KINDS))
def test_the_schema_of_an_answer_describes_what_its_check_takes(kind: Any) -> None:
    taken = [n for n, value in enumerate(ANSWER_VALUES) if accepts(kind, value)]
    assert taken == [n for n, v in enumerate(ANSWER_VALUES) if allows(kind.schema(), v)]
    assert 0 < len(taken) < len(ANSWER_VALUES)


@pytest.mark.parametrize("nasty", table(UNSHOWABLE))
def test_the_schema_of_a_text_takes_nothing_unprintable_either(nasty: str) -> None:
    """So a program that makes what the schema allows is never refused."""
    if nasty == UNSHOWABLE["lone surrogate"]:
        return  # no JSON text has one
    for text in (nasty, f"a{nasty}", f"{nasty}b", f"a{nasty}b"):
        assert not allows(hostenroll.Text(50).schema(), text)
        assert not allows(hostenroll.Labels().schema(), {"a": text})
        assert not allows(hostenroll.Labels().parameter(), f"a={text}")
    assert allows(hostenroll.Text(50).schema(), "K\u00fcche \U0001f600 \u4e2d\u6587 \u05d0")


@pytest.mark.parametrize(
    "text",
    ["", "a", "=", "=b", "a=", "a=b", "a=b=c", "a b=c", "a/b.c=d", "a/=b", "a=\u00fc",
     f"{'a' * 63}=b", f"{'a' * 64}=b", f"a={'v' * 255}", f"a={'v' * 256}"],
)  # fmt: skip
def test_a_label_in_a_query_is_described_as_the_text_that_it_is(text: str) -> None:
    label = hostenroll.Labels()
    try:
        key, value = label.read(text)
        taken = f"{key}={value}" == text
    except ValueError:
        taken = False
    assert taken == allows(label.parameter(), text)


def test_a_parameter_that_repeats_does_so_as_often_as_its_schema_says() -> None:
    described = {one["name"]: one for one in SHAPE.parameters("query")}
    assert list(described) == ["word", "count", "colour", "label"]
    assert [one["required"] for one in described.values()] == [True, False, False, False]
    most = described["label"]["schema"]["maxItems"]
    pairs = [("label", f"a={n}") for n in range(most + 1)]
    assert len(SHAPE.read(pairs[:-1])["label"]) == most
    with pytest.raises(hostenroll.InvalidQuery) as refused:
        SHAPE.read(pairs)
    assert [error.field for error in refused.value.errors] == ["label"]


def test_a_shape_with_a_name_is_described_in_one_place() -> None:
    named = hostenroll.Shape(hostenroll.Field("word", WORD), name="Word")
    assert hostenroll.ObjectOf(named).schema() == {"$ref": "#/components/schemas/Word"}
    assert hostenroll.ObjectOf(SHAPE).schema() == SHAPE.schema()


# 4. Secrets

B64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


@pytest.mark.parametrize("prefix", ["het", "hak"])
def test_a_secret_has_its_prefix_its_id_256_random_bits_and_a_check(prefix: str) -> None:
    secret = hostenroll.mint_secret(prefix, 0x1234)
    assert re.fullmatch(prefix + r"_0000000000001234_[A-Za-z0-9_-]{43}[0-9a-f]{8}", secret.text)
    assert hostenroll.read_secret(prefix, secret.text) == secret
    assert secret.digest() == hashlib.sha256(secret.text.encode()).digest()
    texts = {hostenroll.mint_secret(prefix, 0x1234).text[21:64] for _ in range(200)}
    assert len(texts) == 200
    # Every bit of all 32 bytes varies.
    octets = [int.from_bytes(base64.urlsafe_b64decode(text + "="), "big") for text in texts]
    assert {sum(o >> bit & 1 for o in octets) for bit in range(256)}.isdisjoint({0, 200})


def test_a_slip_of_the_pen_makes_no_secret() -> None:
    text = hostenroll.mint_secret("het", hostenroll.new_id(int(NOON * 1000))).text
    one = {text[:at] + c + text[at + 1 :] for at in range(len(text)) for c in B64 + " é\n"}
    swapped = {
        text[:at] + text[at + 1] + text[at] + text[at + 2 :] for at in range(4, len(text) - 1)
    }
    for slip in (one | swapped) - {text}:
        assert hostenroll.read_secret("het", slip) is None, slip
    assert len(one) > 4000


@pytest.mark.parametrize(
    "spoil",
    table({
        "nothing": lambda text: "",
        "a newline behind": lambda text: f"{text}\n",
        "space before": lambda text: f" {text}",
        "upper case": lambda text: text.upper(),
        "prefix in upper case": lambda text: "HET" + text[3:],
        "the other prefix": lambda text: "hak" + text[3:],
        "cut short": lambda text: text[:-1],
        "longer": lambda text: f"{text}0",
        "twice": lambda text: text * 2,
        "NUL": lambda text: f"{text}\0",
        "full-width digits": lambda text: text[:-8] + "\uff10" * 8,
        "very long": lambda text: text + "a" * 100_000,
        "another prefix, well checked": lambda text: hostenroll.mint_secret("hex", 1).text,
        "64 bits of id, well checked": lambda text: hostenroll.mint_secret("het", 2**63).text,
        "an API key": lambda text: hostenroll.mint_secret("hak", 1).text,
        "a credential": lambda text: KEY.sign(CLAIMS),
    }),
)  # fmt: skip
def test_a_text_that_we_cannot_have_minted_is_no_secret(spoil: Callable[[str], str]) -> None:
    assert hostenroll.read_secret("het", spoil(hostenroll.mint_secret("het", 1).text)) is None


def test_ids_are_in_the_order_of_time_and_fit_63_bits() -> None:
    noon, last = int(NOON * 1000), 3_700_000_000_000
    times = [0, 1_577_836_800_000, *range(noon, noon + 50_000, 1000), last]
    ids = [hostenroll.new_id(now) for now in times]
    assert ids[1:] == sorted(ids[1:]) and max(ids) < 2**63 and min(ids) >= 0
    assert len({hostenroll.new_id(0) for _ in range(20)}) == 20
    assert all(hostenroll.read_id(hostenroll.id_text(number)) == number for number in ids)


@pytest.mark.parametrize(
    "text", ["", "1", "0" * 15, "0" * 17, "8" + "0" * 15, "0" * 15 + "G", "A" * 16, "0" * 16 + "\n",
             "-" + "0" * 15, "0x" + "0" * 14, "0_" * 8, "\uff11" * 16, "' OR 1=1; --    "],
)  # fmt: skip
def test_an_id_has_one_spelling(text: str) -> None:
    assert hostenroll.read_id(text) == -1


OCTETS = bytes(range(32))
KEY = hostenroll.SigningKey("key-1", OCTETS)
CLAIMS = hostenroll.Claims(0x0D3A5F0012345678, "acme", 1_800_000_000, 3, None, "key-1")
HEADER = {"alg": "HS256", "typ": "JWT", "kid": "key-1"}
PAYLOAD = {
    "iss": "hostenroll",
    "sub": "0d3a5f0012345678",
    "org": "acme",
    "iat": 1_800_000_000,
    "ser": 3,
}


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def seal(signed: str, octets: bytes = OCTETS, digest: str = "sha256") -> str:
    """header.payload with a true signature: an attacker never gets as far."""
    return f"{signed}.{b64(hmac.new(octets, signed.encode(), digest).digest())}"


def forge(header: Any = None, payload: Any = None, *key: Any) -> str:
    """A JWT that says what it likes; a text goes as it is."""
    parts = (HEADER if header is None else header, PAYLOAD if payload is None else payload)
    texts = [p if isinstance(p, str) else json.dumps(p, separators=(",", ":")) for p in parts]
    return seal(".".join(b64(text.encode()) for text in texts), *key)


def respell(part: str) -> str:
    """Other base64url of the same bytes: the last character has bits to spare."""
    other = part[:-1] + B64[B64.index(part[-1]) + 1]
    assert unb64(other) == unb64(part)
    return other


@pytest.fixture
def keyring() -> hostenroll.Keyring:
    return hostenroll.Keyring([KEY, hostenroll.SigningKey("key-2", b"2" * 32)], b"a" * 32)


@pytest.mark.parametrize("expires_at", [None, 0, 1_800_086_400])
def test_a_credential_is_a_plain_jwt_that_any_library_verifies(
    keyring: hostenroll.Keyring, expires_at: Optional[int]
) -> None:
    """RFC 7515 section 3.1 and RFC 7519, by hand."""
    claims = CLAIMS._replace(expires_at=expires_at)
    credential = keyring.first.sign(claims)
    header, payload, signature = credential.split(".")
    expected = hmac.new(OCTETS, f"{header}.{payload}".encode("ascii"), hashlib.sha256).digest()
    assert unb64(signature) == expected and "=" not in credential
    assert json.loads(unb64(header)) == HEADER
    expiry = {} if expires_at is None else {"exp": expires_at}
    assert json.loads(unb64(payload)) == {**PAYLOAD, **expiry}
    assert keyring.verify(credential) == claims


def test_every_key_of_the_ring_verifies_and_the_first_signs(keyring: hostenroll.Keyring) -> None:
    old = keyring.keys[1].sign(CLAIMS)
    assert keyring.verify(old) == CLAIMS._replace(kid="key-2")
    assert keyring.first.kid == "key-1"
    with pytest.raises(hostenroll.CredentialInvalid):
        hostenroll.Keyring([KEY], b"a" * 32).verify(old)


@pytest.mark.parametrize(
    "claims",
    table({
        "the greatest": CLAIMS._replace(host=2**63 - 1, organization="Z" * 64, serial=10**12 - 1),
        "the least": CLAIMS._replace(host=0, organization="-", issued_at=0, serial=1, expires_at=0),
        "far off": CLAIMS._replace(expires_at=253_402_300_799),
    }),
)  # fmt: skip
def test_what_is_signed_verifies(keyring: hostenroll.Keyring, claims: Any) -> None:
    assert keyring.verify(keyring.first.sign(claims)) == claims


def test_the_forger_of_these_tests_writes_what_we_would() -> None:
    assert forge() == KEY.sign(CLAIMS)


GENUINE = KEY.sign(CLAIMS)
H, P, S = GENUINE.split(".")
PUBLIC = {"kty": "oct", "k": b64(b"evil" * 8)}


def said(text: str, instead: str) -> str:
    """The genuine payload, with something else in it, truly signed."""
    written = json.dumps(PAYLOAD, separators=(",", ":"))
    assert text in written
    return forge(None, written.replace(text, instead))


FORGED = {
    # RFC 8725 section 2.1: the algorithm must not be the attacker's to choose.
    "alg none": b64(b'{"alg":"none"}') + f".{P}.",
    "alg none with our kid": b64(b'{"alg":"none","typ":"JWT","kid":"key-1"}') + f".{P}.",
    "alg none, signed": forge({**HEADER, "alg": "none"}),
    "alg None": forge({**HEADER, "alg": "None"}),
    "alg HS384": forge({**HEADER, "alg": "HS384"}, None, OCTETS, "sha384"),
    "alg HS512": forge({**HEADER, "alg": "HS512"}, None, OCTETS, "sha512"),
    "alg HS512 with an HS256 signature": forge({**HEADER, "alg": "HS512"}),
    "alg RS256": forge({**HEADER, "alg": "RS256"}),
    "alg in lower case": forge({**HEADER, "alg": "hs256"}),
    "alg null": forge({**HEADER, "alg": None}),
    "no alg": forge({"typ": "JWT", "kid": "key-1"}),
    "no header": seal(f".{P}"),
    # RFC 8725 section 3.10: kid, jku, jwk and x5u are the attacker's words.
    "kid unknown": forge({**HEADER, "kid": "key-3"}),
    "kid of the other key": forge({**HEADER, "kid": "key-2"}),
    "kid missing": forge({"alg": "HS256", "typ": "JWT"}),
    "kid empty": forge({**HEADER, "kid": ""}, None, b""),
    "kid null": forge({**HEADER, "kid": None}),
    "kid a list": forge({**HEADER, "kid": ["key-1"]}),
    "kid a path": forge({**HEADER, "kid": "../../../../dev/null"}, None, b""),
    "kid SQL": forge({**HEADER, "kid": "key-1' UNION SELECT 'evil' --"}, None, b"evil"),
    "kid a command": forge({**HEADER, "kid": "key-1|id"}),
    "the audit key": forge({**HEADER, "kid": "audit"}, None, b"a" * 32),
    "an embedded key": forge({**HEADER, "jwk": PUBLIC}, None, b"evil" * 8),
    "an embedded key, truly signed": forge({**HEADER, "jwk": PUBLIC}),
    "a key's address": forge({**HEADER, "jku": "https://evil.test/jwks"}),
    "a certificate's address": forge({**HEADER, "x5u": "https://evil.test/evil.pem"}),
    "a certificate": forge({**HEADER, "x5c": [base64.b64encode(b"evil").decode()]}, None, b"evil"),
    "a certificate's thumbprint": forge({**HEADER, "x5t": b64(b"evil"), "x5t#S256": b64(b"evil")}),
    "a critical extension": forge({**HEADER, "crit": ["b64"], "b64": False}),
    "typ in lower case": forge({**HEADER, "typ": "jwt"}),
    "a content type": forge({**HEADER, "cty": "JWT"}),
    "members in another order": forge({"typ": "JWT", "alg": "HS256", "kid": "key-1"}),
    "space in the header": forge('{"alg": "HS256","typ":"JWT","kid":"key-1"}'),
    "alg twice": forge('{"alg":"none","alg":"HS256","typ":"JWT","kid":"key-1"}'),
    "a header that is no JSON": forge("x"),
    "a header that is no object": forge([HEADER]),
    # Claims, truly signed: whoever holds the key says something that we never would.
    **{
        f"without {name}": forge(None, {k: v for k, v in PAYLOAD.items() if k != name})
        for name in PAYLOAD
    },
    "no claims": forge(None, {}),
    "empty claims": seal(f"{H}."),
    "claims that are no object": forge(None, [PAYLOAD]),
    "claims that are no JSON": forge(None, "x"),
    "a further claim": forge(None, {**PAYLOAD, "aud": "x"}),
    "not before": forge(None, {**PAYLOAD, "nbf": 0}),
    "not before a text": forge(None, {**PAYLOAD, "nbf": "0"}),
    "a subject twice": said('"sub":', '"sub":"0000000000000000","sub":'),
    "an array of issuers": forge(None, {**PAYLOAD, "iss": ["hostenroll"]}),
    "claims in another order": forge(None, dict(reversed(list(PAYLOAD.items())))),
    "space in the claims": forge(None, json.dumps(PAYLOAD)),
    "a newline behind the claims": said("}", "}\n"),
    "a serial twice": said('"ser":3', '"ser":3,"ser":4'),
    "a serial as text": said('"ser":3', '"ser":"3"'),
    "a serial with a fraction": said('"ser":3', '"ser":3.0'),
    "a serial with an exponent": said('"ser":3', '"ser":3e0'),
    "a serial with a leading zero": said('"ser":3', '"ser":03'),
    "a serial that is true": said('"ser":3', '"ser":true'),
    "serial zero": said('"ser":3', '"ser":0'),
    "a serial below zero": said('"ser":3', '"ser":-3'),
    "a serial of 30 digits": said('"ser":3', '"ser":' + "3" * 30),
    "issued at a text": said('"iat":1800000000', '"iat":"1800000000"'),
    "issued before 1970": said('"iat":1800000000', '"iat":-1'),
    "expiry null": forge(None, {**PAYLOAD, "exp": None}),
    "expiry a text": forge(None, {**PAYLOAD, "exp": "1900000000"}),
    "expiry a float": forge(None, {**PAYLOAD, "exp": 1.9e9}),
    "expiry a list": forge(None, {**PAYLOAD, "exp": [1_900_000_000]}),
    "expiry true": forge(None, {**PAYLOAD, "exp": True}),
    "expiry below zero": forge(None, {**PAYLOAD, "exp": -1}),
    "expiry minus nothing": said('"ser":3', '"ser":3,"exp":-0'),
    "expiry of 13 digits": forge(None, {**PAYLOAD, "exp": 10**12}),
    "expiry of 501 digits": said('"ser":3', '"ser":3,"exp":1' + "0" * 500),
    "expiry twice": said('"ser":3', '"ser":3,"exp":1900000000,"exp":1'),
    "expiry infinite": said('"ser":3', '"ser":3,"exp":Infinity'),
    "another issuer": said("hostenroll", "hostenrolled"),
    "an id in capitals": said("0d3a5f", "0D3A5F"),
    "an id of 15 digits": said('"0d3a', '"d3a'),
    "an id of 64 bits": said('"0d3a', '"fd3a'),
    "an id that is a number": said('"0d3a5f0012345678"', "42"),
    "an id with an escape": said('"0d3a', '"\\u0030d3a'),
    "no organization": said("acme", ""),
    "an organization of 65 characters": said("acme", "a" * 65),
    "an organization with a path": said("acme", "../x"),
    "an organization that is not ASCII": said("acme", "é"),
    "an organization with NUL": said("acme", "a\0b"),
    # Signatures.
    "no signature": f"{H}.{P}.",
    "two parts": f"{H}.{P}",
    "a signature cut short": GENUINE[:-1],
    "the signature of another key": seal(f"{H}.{P}", b"evil" * 8),
    "the signature of no key": seal(f"{H}.{P}", b""),
    "a signature over the claims alone": f"{H}.{seal(P)}",
    "SHA-1": seal(f"{H}.{P}", OCTETS, "sha1"),
    "a signature in hexadecimal": f"{H}.{P}.{unb64(S).hex()}",
    "other claims with this signature": f"{H}.{said('3}', '4}').split('.')[1]}.{S}",
    # RFC 7515 section 2: one spelling, or a cache and a log can be led astray.
    "another last character of the header": seal(f"{respell(H)}.{P}"),
    "another last character of the claims": seal(f"{H}.{respell(P)}"),
    "another last character of the signature": f"{H}.{P}.{respell(S)}",
    "padding behind the header": seal(f"{H}=.{P}"),
    "padding behind the claims": seal(f"{H}.{P}="),
    "padding behind the signature": f"{GENUINE}=",
    "plain base64's plus": seal(f"{H}.{P[:-1]}+"),
    "plain base64's slash": seal(f"{H}.{P[:-1]}/"),
    "plain base64 of the signature": f"{H}.{P}." + base64.b64encode(unb64(S)).decode(),
    "tilde for a character": seal(f"{H}.{P[:-1]}~"),
    "one character too many in the claims": seal(f"{H}.{P + 'A' * ((1 - len(P)) % 4)}"),
    "space in the claims' base64": seal(f"{H}.{P[:8]} {P[8:]}"),
    "a newline at the end": f"{GENUINE}\n",
    "CR LF at the end": f"{GENUINE}\r\n",
    "space before": f" {GENUINE}",
    "NUL behind": f"{GENUINE}\0",
    "a scheme before": f"Bearer {GENUINE}",
    "four parts": f"{GENUINE}.{S}",
    "five parts, as of a JWE": f"{H}..{P}.{S}.{S}",
    "a dot before": f".{GENUINE}",
    "not ASCII": GENUINE[:-1] + "é",
    "full-width digits": GENUINE[:-1] + "\uff11",
    "a lone surrogate": GENUINE[:-1] + "\udcff",
    "JSON serialization": json.dumps({"protected": H, "payload": P, "signature": S}),
    "very long": seal(f"{H}.{b64(b'x' * 100_000)}"),
    "nothing": "",
    "dots": "..",
    "a token": hostenroll.mint_secret("het", 1).text,
    "an API key": hostenroll.mint_secret("hak", 1).text,
}  # fmt: skip


@pytest.mark.parametrize("credential", table(FORGED))
def test_only_what_we_signed_is_a_credential(keyring: hostenroll.Keyring, credential: str) -> None:
    with pytest.raises(hostenroll.CredentialInvalid):
        keyring.verify(credential)


def test_no_character_of_a_credential_can_be_another(keyring: hostenroll.Keyring) -> None:
    for at in range(len(GENUINE)):
        for other in "A-Zz09_.=":
            if other != GENUINE[at]:
                with pytest.raises(hostenroll.CredentialInvalid):
                    keyring.verify(GENUINE[:at] + other + GENUINE[at + 1 :])


def test_what_all_credentials_of_a_key_begin_with(keyring: hostenroll.Keyring) -> None:
    """And the host of each is to be read behind that."""
    opening = keyring.first.opening.decode("ascii")
    for host in (0, 1, 2**63 - 1, CLAIMS.host):
        credential = keyring.first.sign(CLAIMS._replace(host=host))
        assert credential.startswith(opening)
        assert hostenroll.host_of(credential[len(opening) :].encode("ascii")) == host
    assert not keyring.keys[1].sign(CLAIMS).startswith(opening)


def test_fresh_keyrings_share_nothing() -> None:
    one, other = hostenroll.new_keyring(), hostenroll.new_keyring()
    secrets = {o for ring in (one, other) for o in (ring.first.octets, ring.audit_key)}
    assert len(secrets) == 4 and {len(octets) for octets in secrets} == {32}
    assert one.first.kid != other.first.kid
    with pytest.raises(hostenroll.CredentialInvalid):
        other.verify(one.first.sign(CLAIMS))


def test_a_key_file_is_a_jwk_set_for_its_owner_alone(
    tmp_path: Path, keyring: hostenroll.Keyring
) -> None:
    """RFC 7517 section 5, RFC 7518 section 6.4."""
    path = tmp_path / "key"
    path.write_text("x" * 10_000)
    path.chmod(0o644)
    hostenroll.write_key_file(str(path), keyring)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keys = json.loads(path.read_bytes())["keys"]
    assert [(key["kty"], key["use"], key["kid"]) for key in keys] == [
        ("oct", "sig", "key-1"), ("oct", "sig", "key-2"), ("oct", "audit", "audit")]  # fmt: skip
    assert [unb64(key["k"]) for key in keys] == [OCTETS, b"2" * 32, b"a" * 32]
    loaded = hostenroll.load_keyring(str(path))
    assert [(key.kid, key.octets) for key in loaded.keys] == [
        ("key-1", OCTETS),
        ("key-2", b"2" * 32),
    ]
    assert loaded.audit_key == b"a" * 32
    assert loaded.verify(GENUINE) == CLAIMS


def test_a_new_key_file_is_never_open_to_others(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        hostenroll.write_key_file(str(tmp_path / "key"), hostenroll.new_keyring())
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def jwk(**members: Any) -> Dict[str, Any]:
    key = {"kty": "oct", "use": "sig", "alg": "HS256", "kid": "key-1", "k": b64(OCTETS), **members}
    return {name: value for name, value in key.items() if value is not ...}


AUDIT = jwk(use="audit", alg=..., kid="audit")


def jwks(*keys: Any) -> bytes:
    return json.dumps({"keys": [*keys, AUDIT]}).encode()


BAD_KEY_FILES = {
    "empty": b"",
    "cut off": jwks(jwk())[:-2],
    "binary": b"\x7fELF\xff\0",
    "an array": b"[]",
    "a text": b'"keys"',
    "no keys": b"{}",
    "keys null": b'{"keys":null}',
    "keys a text": b'{"keys":"k"}',
    "keys an object": b'{"keys":{"k":1}}',
    "a key that is null": jwks(None),
    "nested without end": b'{"keys":' + b"[" * 50_000,
    "no signing key": jwks(),
    "no signing key, but one for encryption": jwks(jwk(use="enc")),
    "no audit key": json.dumps({"keys": [jwk()]}).encode(),
    "two audit keys": jwks(jwk(), AUDIT),
    "one kid for two keys": jwks(jwk(), jwk(k=b64(b"2" * 32))),
    "no use": jwks(jwk(use=...)),
    "no kty": jwks(jwk(kty=...)),
    "an RSA key": jwks(jwk(kty="RSA")),
    "another algorithm": jwks(jwk(alg="HS512")),
    "no kid": jwks(jwk(kid=...)),
    "a kid that is a number": jwks(jwk(kid=1)),
    "a kid with a newline": jwks(jwk(kid="k\n1")),
    "a kid longer than a credential": jwks(jwk(kid="k" * 2000)),
    "no k": jwks(jwk(k=...)),
    "k null": jwks(jwk(k=None)),
    "k empty": jwks(jwk(k="")),
    "k of 31 bytes": jwks(jwk(k=b64(OCTETS[:31]))),
    "k not ASCII": jwks(jwk(k="é" * 43)),
    "k with something else in it": jwks(jwk(k=b64(OCTETS) + "!!!!")),
    "k of one character too many": jwks(jwk(k=b64(OCTETS + b"x") + "A")),
}


@pytest.mark.parametrize("content", table(BAD_KEY_FILES))
def test_a_bad_key_file_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "the.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(hostenroll.OperatorError) as refused:
        hostenroll.load_keyring(str(path))
    said = str(refused.value)
    assert str(path) in said and "\n" not in said and b64(OCTETS) not in said
    path.write_bytes(jwks(jwk(alg=...)))
    assert hostenroll.load_keyring(str(path)).first.octets == OCTETS


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o610, 0o601, 0o666])
def test_a_key_file_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "the.key"
    hostenroll.write_key_file(str(path), hostenroll.new_keyring())
    path.chmod(mode)
    with pytest.raises(hostenroll.OperatorError, match="chmod 600"):
        hostenroll.load_keyring(str(path))
    path.chmod(0o400)
    assert hostenroll.load_keyring(str(path)).keys


def test_a_key_file_that_is_not_there_is_an_operators_trouble(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(hostenroll.OperatorError, match="cannot read the key file"):
            hostenroll.load_keyring(str(path))


@pytest.mark.parametrize(
    "now, number",
    table({
        "the epoch": (hostenroll.ID_EPOCH_MS, 0),
        "1 ms on": (hostenroll.ID_EPOCH_MS + 1, 1 << 22),
        "a clock that was never set": (0, 0),
        "the last of 69 years": (hostenroll.ID_EPOCH_MS + (1 << 41) - 1, ((1 << 41) - 1) << 22),
        "after them": (hostenroll.ID_EPOCH_MS + (1 << 41), 0),
    }),
)  # fmt: skip
def test_an_id_begins_with_the_time_and_the_lowest_of_a_time_is_known(
    now: int, number: int
) -> None:
    assert hostenroll.first_id(now) == number
    made = [hostenroll.new_id(now) for _ in range(50)]
    assert {it >> 22 for it in made} == {number >> 22} and min(made) >= number
    assert len({it & (1 << 22) - 1 for it in made}) > 40
    assert hostenroll.read_id(hostenroll.id_text(max(made))) == max(made)


def test_a_rotated_ring_signs_with_a_key_that_is_new_and_verifies_by_all(
    keyring: hostenroll.Keyring,
) -> None:
    rotated = keyring.rotated()
    assert rotated.kids[1:] == keyring.kids == ["key-1", "key-2"]
    assert re.fullmatch("[0-9a-f]{16}", rotated.first.kid) and len(rotated.first.octets) == 32
    assert rotated.audit_key == keyring.audit_key
    assert rotated.verify(GENUINE) == CLAIMS
    fresh = rotated.first.sign(CLAIMS)
    assert rotated.verify(fresh) == CLAIMS._replace(kid=rotated.first.kid)
    without = rotated.without("key-1")
    assert without.kids == [rotated.first.kid, "key-2"]
    assert without.audit_key == keyring.audit_key
    for ring, credential in ((keyring, fresh), (without, GENUINE)):
        with pytest.raises(hostenroll.CredentialInvalid):
            ring.verify(credential)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o644)
    with hostenroll.replacing(str(path)) as file:
        file.write(b"new, and longer")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new, and longer"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ValueError), hostenroll.replacing(str(path)) as file:
        file.write(b"half")
        raise ValueError
    assert path.read_bytes() == b"new, and longer"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_one_left_is_no_hindrance_and_its_mode_is_not_inherited(
    tmp_path: Path,
) -> None:
    path, left = tmp_path / "file", tmp_path / "file.tmp"
    left.write_bytes(b"x" * 10_000)
    left.chmod(0o666)
    with hostenroll.replacing(str(path)) as file:
        assert stat.S_IMODE(left.stat().st_mode) == 0o600  # before the first byte
        file.write(b"new")
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"new", 0o600)
    assert not left.exists()


def test_a_file_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a file that was renamed and not synced is there, and empty."""
    path, done = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace

    def syncing(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def replacing(*names: Any) -> None:
        done.append("rename")
        replace(*names)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    with hostenroll.replacing(str(path)) as file:
        file.write(b"new")
    assert done == ["file", "rename", "folder"] and path.read_bytes() == b"new"


def test_what_cannot_be_replaced_leaves_nothing_beside_it(tmp_path: Path) -> None:
    """A half-written file of keys must not lie about."""
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError), hostenroll.replacing(str(tmp_path / "file")) as file:
        file.write(b"secret")
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_to_a_key_file_stays_one(tmp_path: Path, keyring: hostenroll.Keyring) -> None:
    """Else the file that it leads to would keep the old keys, for whoever reads it there."""
    (tmp_path / "safe").mkdir()
    path, real = tmp_path / "the.key", tmp_path / "safe" / "real.key"
    hostenroll.write_key_file(str(real), keyring)
    path.symlink_to("safe/real.key")
    hostenroll.write_key_file(str(path), keyring.rotated())
    assert path.is_symlink()
    assert len(hostenroll.load_keyring(str(real)).kids) == 3
    assert sorted(os.listdir(tmp_path)) == ["safe", "the.key"]
    assert os.listdir(tmp_path / "safe") == ["real.key"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_replaced_key_file_keeps_its_owner(tmp_path: Path, keyring: hostenroll.Keyring) -> None:
    """Root rotates the key of a service that runs as another user."""
    path = tmp_path / "the.key"
    hostenroll.write_key_file(str(path), keyring)
    os.chown(path, 12345, 23456)
    hostenroll.write_key_file(str(path), keyring.rotated())
    status = path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (12345, 23456, 0o600)


def test_a_key_file_is_read_again_when_it_has_changed_and_not_else(
    tmp_path: Path, keyring: hostenroll.Keyring
) -> None:
    path = tmp_path / "the.key"
    hostenroll.write_key_file(str(path), keyring)
    file = hostenroll.KeyFile(str(path))
    assert file.load().kids == keyring.kids
    assert file.reload(keyring) is None
    file.replace(keyring.rotated())
    assert file.reload(keyring) is None  # its own doing
    hostenroll.write_key_file(str(path), keyring.without("key-2"))
    assert file.reload(keyring).kids == ["key-1"]
    assert file.reload(keyring) is None
    assert file.trouble == ""


KEY_TROUBLES: Dict[str, Callable[[Path], Any]] = {
    "another database's": lambda path: hostenroll.write_key_file(
        str(path), hostenroll.new_keyring()
    ),
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 9),
    "not ours": lambda path: path.write_bytes(b"[]"),
    "open to others": lambda path: path.chmod(0o644),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path, 0o600)),
    "half a gigabyte": lambda path: os.truncate(path, 1 << 29),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
}


@pytest.mark.parametrize("spoil", table(KEY_TROUBLES))
def test_a_key_file_that_goes_bad_is_said_once_and_noticed_when_it_is_good_again(
    spoil: Callable[[Path], Any], tmp_path: Path, keyring: hostenroll.Keyring, caplog: Any
) -> None:
    path = tmp_path / "the.key"
    hostenroll.write_key_file(str(path), keyring)
    file = hostenroll.KeyFile(str(path))
    file.load()
    for _ in range(2):
        spoil(path)
        assert [file.reload(keyring) for _ in range(4)] == [None] * 4
        assert str(path) in file.trouble
        if path.is_dir():
            path.rmdir()
        elif path.is_symlink():
            path.unlink()
        hostenroll.write_key_file(str(path), keyring)
        assert file.reload(keyring).kids == keyring.kids
        assert file.trouble == "" and file.reload(keyring) is None
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all(str(path) in line and "\n" not in line for line in said)


def test_a_key_file_is_noticed_however_soon_its_mode_is_put_right(
    tmp_path: Path, keyring: hostenroll.Keyring
) -> None:
    """Copied, looked at, and chmod 600, within one tick of the clock of the file system."""
    path = tmp_path / "the.key"
    hostenroll.write_key_file(str(path), keyring)
    file = hostenroll.KeyFile(str(path))
    file.load()
    for _ in range(300):
        path.chmod(0o644)
        file.reload(keyring)
        path.chmod(0o600)
        file.reload(keyring)
        assert file.trouble == ""


def der(tag: int, *contents: bytes) -> bytes:
    """One element of DER."""
    body = b"".join(contents)
    if len(body) < 0x80:
        return bytes([tag, len(body)]) + body
    octets = len(body).to_bytes((len(body).bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + body


SUBJECT_KEY = der(0x30, der(0x30, b"\x06\x01\x2a"), der(0x03, b"\0" + b"k" * 300))


def certificate_with(key: bytes, version: Optional[bytes] = b"\2") -> bytes:
    """As RFC 5280 section 4.1 draws it; nothing of it is true but its shape."""
    name, times = der(0x30, b""), der(0x30, der(0x17, b"270115080000Z") * 2)
    head = () if version is None else (der(0xA0, der(2, version)),)
    rest = (der(2, b"\x7f" * 20), der(0x30, b"\x06\x01\x2a"), name, times, name, key)
    signed = der(0x30, *head, *rest, der(0xA3, b"x" * 200))
    return der(0x30, signed, der(0x30, b"\x06\x01\x2a"), der(0x03, b"\0" + b"s" * 256))


@pytest.mark.parametrize("version", [None, b"\2"], ids=["version 1", "version 3"])
def test_a_pin_is_the_hash_of_the_key_whatever_stands_before_it(version: Optional[bytes]) -> None:
    pin = hostenroll.public_key_pin(certificate_with(SUBJECT_KEY, version))
    digest = base64.b64encode(hashlib.sha256(SUBJECT_KEY).digest()).decode()
    assert pin == f"sha256//{digest}"


def test_whatever_is_no_certificate_has_no_pin_and_breaks_nothing() -> None:
    whole = certificate_with(SUBJECT_KEY)
    pin, seed = hostenroll.public_key_pin(whole), random.Random(7)
    signed = len(whole) - len(der(0x30, b"\x06\x01\x2a")) - len(der(0x03, b"s" * 257))
    junk = [whole[:length] for length in range(signed)]
    junk += [bytes([octet]) * size for octet in (0, 0x30, 0x80, 0x84, 0xFF) for size in range(9)]
    for data in junk:
        with pytest.raises(ValueError):
            hostenroll.public_key_pin(data)
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(seed.randint(1, 4)):
            data[seed.randrange(len(data))] = seed.randrange(256)
        with contextlib.suppress(ValueError):
            assert hostenroll.public_key_pin(bytes(data)).startswith("sha256//")
    assert hostenroll.public_key_pin(whole[:signed]) == pin


needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")


@needs_openssl
@pytest.mark.parametrize(
    "key, extensions",
    table({
        "EC": (["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"], True),
        "RSA": (["-newkey", "rsa:2048"], True),
        "Ed25519": (["-newkey", "ed25519"], True),
        "version 1": (["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"], False),
    }),
)  # fmt: skip
def test_a_pin_is_what_openssl_says(key: List[str], extensions: bool, tmp_path: Path) -> None:
    def openssl(*arguments: str, data: bytes = b"") -> bytes:
        done = subprocess.run(
            ["openssl", *arguments], cwd=tmp_path, input=data, capture_output=True, check=True
        )
        return done.stdout

    openssl("req", "-new", "-nodes", *key, "-subj", "/CN=x", "-keyout", "key", "-out", "request")
    (tmp_path / "extensions").write_text("subjectAltName=DNS:x\n")
    more = ["-extfile", "extensions"] if extensions else []
    openssl("x509", "-req", "-in", "request", "-signkey", "key", "-out", "cert", *more)
    public = openssl("pkey", "-pubin", "-outform", "der", data=openssl(
        "x509", "-in", "cert", "-noout", "-pubkey"))  # fmt: skip
    expected = base64.b64encode(openssl("dgst", "-sha256", "-binary", data=public)).decode()
    certificate = openssl("x509", "-in", "cert", "-outform", "der")
    assert hostenroll.public_key_pin(certificate) == f"sha256//{expected}"
    assert (b"\xa0\x03\x02\x01" in certificate[:20]) is extensions


# 5. Store


def failure(code: int, kind: Any = sqlite3.OperationalError) -> Any:
    """An error of SQLite, as Python says it since 3.11."""
    error = kind(f"error {code}")
    error.sqlite_errorcode = code
    return error


class Faulty:
    """A real connection of which one statement fails: the n-th, or the first that is `only`;
    before it has done its work or, what is worse, after. Some errors end the transaction too."""

    def __init__(
        self,
        real: Any,
        n: int = 0,
        only: str = "",
        after: bool = False,
        error: Any = None,
        rolls_back: bool = False,
    ) -> None:
        self.real, self.n, self.only, self.after = real, n, only, after
        self.error = error or failure(10)  # SQLITE_IOERR
        self.rolls_back = rolls_back
        self.count, self.failed = 0, False

    def _run(self, call: Callable[..., Any], statement: str, parameters: Any) -> Any:
        self.count += 1
        fails = not self.failed and (self.count == self.n or statement == self.only)
        self.failed = self.failed or fails
        if fails and self.rolls_back and self.real.in_transaction:
            self.real.execute("ROLLBACK")
        # A COMMIT that fails after it has worked is not a failure that anyone could undo.
        if fails and not (self.after and statement != "COMMIT"):
            raise self.error
        cursor = call(statement, parameters)
        if fails:
            raise self.error
        return cursor

    def execute(self, statement: str, parameters: Any = ()) -> Any:
        return self._run(self.real.execute, statement, parameters)

    def executemany(self, statement: str, parameters: Any) -> Any:
        return self._run(self.real.executemany, statement, parameters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@contextlib.contextmanager
def faulty(registry: Registry, **how: Any) -> Iterator[Faulty]:
    store: Any = registry._store
    real, store._connection = store._connection, Faulty(store._connection, **how)
    try:
        yield store._connection
    finally:
        store._connection = real


def connection_of(registry: Registry) -> Any:
    return registry._store._connection


def look(registry: Registry, statement: str, *parameters: Any) -> List[Any]:
    """A look by the registry's own connection, outside of any tick."""
    return list(connection_of(registry).execute(statement, parameters).fetchall())


def snapshot(registry: Registry) -> Dict[str, List[Any]]:
    """Every row of every table."""
    names = look(registry, "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
    return {name: look(registry, f"SELECT * FROM {name} ORDER BY 1") for (name,) in names}


def is_free(paths: Tuple[str, str]) -> bool:
    """Whether another process could write now."""
    other = hostenroll.WriteLock(paths[0])
    try:
        return other.attempt()
    finally:
        other.close()


def token_of(registry: Registry, clock: Clock, by: Principal = OPERATOR, **order: Any) -> str:
    wanted = hostenroll.TokenOrder(**order)
    return str(do(registry, clock, lambda now: registry.mint(by, wanted, now))[1])


def came_in(registry: Registry, clock: Clock, name: str = "web-1", **order: Any) -> Tuple[int, str]:
    """A host that has just enrolled: its id and its credential."""
    arrival = hostenroll.Applicant(token_of(registry, clock, **order), name)
    enrollment = do(registry, clock, lambda now: registry.enroll(arrival, now))
    return enrollment.host.id, enrollment.grant.credential


def serial_of(registry: Registry, credential: str) -> int:
    return int(registry.keyring.verify(credential).serial)


def plain(registry: Registry, credential: str, clock: Clock, **changes: Any) -> Any:
    """The plain heartbeat of who has a credential, or one with other claims."""
    claims = registry.authenticate(credential, clock.ms)
    return hostenroll.plain_beat(claims._replace(**changes))


def beat(registry: Registry, clock: Clock, credential: str, **facts: Any) -> Any:
    def act(now: int) -> Any:
        return registry.beat(registry.authenticate(credential, now), lambda: facts, now)

    return do(registry, clock, act)


def test_every_file_is_for_its_owner_alone_whatever_the_umask(
    paths: Tuple[str, str], clock: Clock
) -> None:
    before = os.umask(0)
    try:
        registry = open_registry(*paths, clock.ms)
        token_of(registry, clock)
    finally:
        os.umask(before)
    files = [paths[0] + suffix for suffix in ("", "-wal", "-shm", ".gate", ".lock")] + [paths[1]]
    modes = {file: stat.S_IMODE(os.stat(file).st_mode) for file in files}
    assert modes == dict.fromkeys(files, 0o600)
    registry.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_lock_files_that_root_makes_belong_to_the_owner_of_the_database(
    paths: Tuple[str, str], clock: Clock
) -> None:
    """Restored from a backup, then looked at by root: the service must still be able to lock."""
    open_registry(*paths, clock.ms).close()
    os.chown(paths[0], 12345, 12345)
    for suffix in (".gate", ".lock"):
        os.unlink(paths[0] + suffix)
    open_registry(*paths, clock.ms).close()
    owners = [os.stat(paths[0] + suffix).st_uid for suffix in (".gate", ".lock")]
    assert owners == [12345, 12345]


def test_the_database_says_what_it_is(registry: Registry) -> None:
    for pragma, value in (
        ("journal_mode", "wal"),
        ("application_id", hostenroll.APPLICATION_ID),
        ("user_version", hostenroll.SCHEMA_VERSION),
        ("foreign_keys", 1),
        ("wal_autocheckpoint", 0),
    ):
        assert look(registry, f"PRAGMA {pragma}") == [(value,)], pragma


def test_the_schema_in_the_database_is_the_one_in_the_module(registry: Registry) -> None:
    statement = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name"
    with contextlib.closing(sqlite3.connect(":memory:")) as reference:
        reference.executescript(hostenroll.SCHEMA)
        expected = reference.execute(statement).fetchall()
    assert look(registry, statement) == expected


def _newer(path: str) -> None:
    sql(path, f"PRAGMA user_version = {hostenroll.SCHEMA_VERSION + 1}")
    sql(path, f"PRAGMA application_id = {hostenroll.APPLICATION_ID}")


STRANGE_DATABASES: Dict[str, Tuple[Callable[[str], Any], str]] = {
    "made by a newer hostenroll": (_newer, "newer"),
    "of another program": (lambda path: sql(path, "CREATE TABLE bookmarks (url)"), "another"),
    "ten bytes": (lambda path: Path(path).write_bytes(b"0123456789"), "not a database"),
    "a page of text": (lambda path: Path(path).write_bytes(b"text\n" * 2000), "not a database"),
    "a folder": (lambda path: os.mkdir(path), "not a file"),
}


@pytest.mark.parametrize("make, word", STRANGE_DATABASES.values(), ids=STRANGE_DATABASES)
def test_a_strange_database_is_refused_in_one_line_and_left_as_it_is(
    make: Callable[[str], Any], word: str, paths: Tuple[str, str], clock: Clock
) -> None:
    make(paths[0])
    before = Path(paths[0]).read_bytes() if os.path.isfile(paths[0]) else None
    with pytest.raises(hostenroll.OperatorError) as caught:
        open_registry(*paths, clock.ms)
    assert word in str(caught.value) and "\n" not in str(caught.value)
    assert paths[0] in str(caught.value)
    assert before is None or Path(paths[0]).read_bytes() == before
    assert not os.path.exists(paths[1])
    assert is_free(paths)


def test_two_write_locks_exclude_each_other(tmp_path: Path) -> None:
    one, other = (hostenroll.WriteLock(str(tmp_path / "db")) for _ in range(2))
    assert one.attempt()
    assert not other.attempt()
    one.release()
    assert other.attempt()
    assert not one.attempt()
    one.close()
    other.close()


def test_who_waits_at_the_gate_goes_next(tmp_path: Path) -> None:
    """With one lock alone, a busy server that takes it again at once would starve all others."""
    busy, waiter, late = (hostenroll.WriteLock(str(tmp_path / "db")) for _ in range(3))
    assert busy.attempt()
    assert not waiter.attempt()
    assert not late.attempt()
    busy.release()
    assert not busy.attempt()
    assert not late.attempt()
    assert waiter.attempt()
    assert not late.attempt()  # at the gate now
    waiter.release()
    assert not busy.attempt()
    assert late.attempt()
    for lock in (busy, waiter, late):
        lock.close()


def test_waiting_is_bounded_and_gives_up_its_place(
    tmp_path: Path,
) -> None:
    holder, waiter, other = (hostenroll.WriteLock(str(tmp_path / "db")) for _ in range(3))
    assert holder.attempt()
    with pytest.raises(hostenroll.StoreBusy):
        waiter.wait(0.02)
    holder.release()
    assert other.attempt()
    for lock in (holder, waiter, other):
        lock.close()


def test_lock_files_are_never_unlinked(paths: Tuple[str, str], clock: Clock) -> None:
    """A lock on an unlinked file excludes nobody."""
    open_registry(*paths, clock.ms).close()
    numbers = [os.stat(paths[0] + suffix).st_ino for suffix in (".gate", ".lock")]
    for _ in range(3):
        registry = open_registry(*paths, clock.ms)
        token_of(registry, clock)
        registry.close()
    assert [os.stat(paths[0] + suffix).st_ino for suffix in (".gate", ".lock")] == numbers


def test_a_path_is_a_path_whatever_is_in_it(tmp_path: Path, clock: Clock) -> None:
    folder = tmp_path / os.fsdecode("a b?mode=memory#%41'\u00e9".encode())
    folder.mkdir()
    registry = open_registry(str(folder / "x?y.db"), str(folder / "x.key"), clock.ms)
    token_of(registry, clock)
    registry.close()
    assert sql(str(folder / "x?y.db"), "SELECT count(*) FROM token") == [(1,)]


def test_a_database_behind_a_link_has_one_lock(paths: Tuple[str, str], clock: Clock) -> None:
    """SQLite resolves the link for its WAL; a lock by another name would exclude nobody."""
    registry = open_registry(*paths, clock.ms)
    link = f"{paths[0]}.link"
    os.symlink(paths[0], link)
    behind = open_registry(link, paths[1], clock.ms)
    assert registry._store.lock.attempt()
    write = Act(lambda now: behind.add_organization(OPERATOR, "x", now))
    assert behind.tick([write], clock.ms) is None
    registry._store.lock.release()
    assert behind.tick([write], clock.ms) is not None
    behind.close()
    registry.close()


@pytest.mark.parametrize("way", ["deleted", "replaced by a copy", "replaced by an empty file"])
def test_a_database_that_is_gone_is_never_host_unknown(
    way: str, registry: Registry, api: ApiDoor, clock: Clock, paths: Tuple[str, str]
) -> None:
    """410 would send a whole fleet to enroll anew because someone moved a file."""
    enrolled = api.enroll(api.token()).document
    assert api.beat(enrolled["credential"]).status == 200
    os.rename(paths[0], paths[0] + ".away")
    if way == "replaced by a copy":
        shutil.copy(paths[0] + ".away", paths[0])
    elif way == "replaced by an empty file":
        Path(paths[0]).touch()
    answers = [
        api.beat(enrolled["credential"]),
        api.beat(enrolled["credential"], os="linux"),
        api.host(enrolled["hostId"]),
        api.mint(),
        api.enroll("het_0000000000000000_" + "a" * 43 + "00000000"),
        api.call("GET", "/readyz"),
    ]
    assert [(answer.status, answer.code) for answer in answers[:4]] == [
        (503, "storage-unavailable")
    ] * 4
    assert {answer.status for answer in answers} == {503}
    assert all("retry-after" in answer.headers for answer in answers)
    assert api.call("GET", "/healthz").status == 200
    assert is_free(paths)
    os.replace(paths[0] + ".away", paths[0])
    clock.advance(1)
    assert api.beat(enrolled["credential"]).status == 200
    assert api.host(enrolled["hostId"]).document["lastSeen"] == hostenroll.rfc3339(clock.ms)


def test_an_old_database_is_not_left_before_its_wal_is_in_it(
    registry: Registry,
    clock: Clock,
    paths: Tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The new one would be opened with the WAL of the old one beside it."""
    monkeypatch.setattr(hostenroll, "REOPEN_PAUSE", 0)
    (tmp_path / "backup").mkdir()
    copied, _ = registry.back_up(str(tmp_path / "backup"))
    came_in(registry, clock)
    os.link(paths[0], tmp_path / "old.db")
    os.replace(copied, paths[0])
    write = Act(lambda now: 1)
    for _ in range(3):
        with faulty(registry, only="PRAGMA wal_checkpoint(TRUNCATE)") as connection:
            outcome = registry.tick([write], clock.ms) or []
            assert isinstance(outcome[0], hostenroll.StorageUnavailable)
            registry.tidy()
            assert connection.failed and connection_of(registry) is connection
            assert is_free(paths)
    outcome = registry.tick([write], clock.ms) or []
    assert isinstance(outcome[0], hostenroll.StorageUnavailable)
    registry.tidy()
    assert registry.tick([write], clock.ms) == [1] and is_free(paths)
    assert look(registry, "SELECT count(*) FROM host") == [(0,)]
    assert sql(str(tmp_path / "old.db"), "SELECT count(*) FROM host") == [(1,)]


def test_an_old_database_is_not_left_while_others_read_it(
    registry: Registry,
    clock: Clock,
    paths: Tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What they have not seen yet cannot be moved out of the WAL, which is to go."""
    monkeypatch.setattr(hostenroll, "REOPEN_PAUSE", 0)
    (tmp_path / "backup").mkdir()
    copied, _ = registry.back_up(str(tmp_path / "backup"))
    write = Act(lambda now: 1)
    with contextlib.closing(sqlite3.connect(paths[0], isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM host").fetchall() == [(0,)]
        came_in(registry, clock)
        os.link(paths[0], tmp_path / "old.db")
        os.replace(copied, paths[0])
        before = connection_of(registry)
        for _ in range(2):
            outcome = registry.tick([write], clock.ms) or []
            assert isinstance(outcome[0], hostenroll.StorageUnavailable)
            registry.tidy()
            assert connection_of(registry) is before and is_free(paths)
            assert os.path.getsize(f"{paths[0]}-wal") > 0
    registry.tidy()
    assert registry.tick([write], clock.ms) == [1]
    assert look(registry, "SELECT count(*) FROM host") == [(0,)]
    assert sql(str(tmp_path / "old.db"), "SELECT count(*) FROM host") == [(1,)]


def test_a_database_that_is_put_in_place_is_told_of_the_server_and_counted_anew(
    registry: Registry,
    clock: Clock,
    paths: Tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hostenroll, "COUNTED_AT_ONCE", 2)
    do(registry, clock, lambda now: registry.start_service("http://old", now, "sha256//old"))
    (tmp_path / "backup").mkdir()
    copied, _ = registry.back_up(str(tmp_path / "backup"))
    registry.announce_pin("sha256//here")
    do(registry, clock, lambda now: registry.start_service("http://here", now, "sha256//here"))
    for _ in range(5):
        came_in(registry, clock)
    assert sum(census_of(registry, clock)[0].counts.values()) == 5
    os.replace(copied, paths[0])
    registry.tick([Act(lambda now: 1)], clock.ms)
    registry.tidy()
    assert look(registry, "SELECT public_url FROM service") == [("http://old",)]
    do(registry, clock, registry.keep_house)
    assert look(registry, "SELECT public_url, pin FROM service") == [
        ("http://here", "sha256//here")
    ]
    assert sum(census_of(registry, clock)[0].counts.values()) == 0


READ = Act(lambda now: "read", writes=False)
SYNCHRONOUS = {
    "plain heartbeats": (True, [], 1),
    "plain heartbeats and reads": (True, [READ], 1),
    "a sign of life": (False, [Act(lambda now: "alive", durable=False)], 1),
    "anything else that may write": (False, [Act(lambda now: "written")], 2),
    "heartbeats with anything else": (True, [READ, Act(lambda now: "written")], 2),
}


@pytest.mark.parametrize("beats, acts, level", SYNCHRONOUS.values(), ids=SYNCHRONOUS)
def test_what_is_acknowledged_is_on_the_disk_but_for_plain_heartbeats(
    beats: bool, acts: List[Act], level: int, registry: Registry, clock: Clock
) -> None:
    it = plain(registry, came_in(registry, clock)[1], clock)
    for before in ("NORMAL", "FULL"):
        connection_of(registry).execute(f"PRAGMA synchronous = {before}")
        registry._store._synchronous = before
        registry.tick([it, *acts] if beats else acts, clock.ms)
        assert look(registry, "PRAGMA synchronous") == [(level,)]


def seen_without_the_wal(paths: Tuple[str, str], folder: Path) -> Dict[int, int]:
    """What has been moved into the database, of last_seen by host."""
    # Not by this process: to close a descriptor of the database would drop its locks.
    subprocess.run(["cp", paths[0], str(folder / "moved.db")], check=True)
    header = bytearray((folder / "moved.db").read_bytes())
    header[18:20] = b"\1\1"  # not in WAL mode, or SQLite would look for one
    (folder / "moved.db").write_bytes(header)
    return dict(sql(str(folder / "moved.db"), "SELECT host_id, last_seen FROM heartbeat"))


def test_a_checkpoint_moves_all_but_the_last_transaction_and_then_the_rest(
    registry: Registry,
    clock: Clock,
    paths: Tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SQLite waits for the disk only when it has moved all: that is to be little."""
    monkeypatch.setattr(hostenroll, "CHECKPOINT_AFTER", 50)
    monkeypatch.setattr(hostenroll, "CHECKPOINT_DOUBLINGS", 0)
    monkeypatch.setattr(hostenroll, "CHECKPOINT_REST", 5)
    fill(registry, 3000)
    standing = hostenroll.Standing(1, "default", registry.keyring.first.kid)
    registry.tick([(n << 8, standing) for n in range(1, 3001)], clock.ms)
    registry._store.checkpoint(is_due=True)
    begin = clock.ms

    def beaten(*numbers: int) -> Dict[int, int]:
        clock.advance(1)
        registry.tick([(n << 8, standing) for n in numbers], clock.ms)
        registry.tidy()
        until(lambda: not registry._store._is_flushing())
        seen = seen_without_the_wal(paths, tmp_path)
        return {host >> 8: (at - begin) // 1000 for host, at in seen.items() if at != begin}

    # Each has a page of its own.
    assert beaten(*range(100, 2500, 40)) == {}  # much: nothing is moved before the next
    assert beaten(*range(2510, 2910, 40)) == dict.fromkeys(range(100, 2500, 40), 1)
    first = {**dict.fromkeys(range(100, 2500, 40), 1), **dict.fromkeys(range(2510, 2910, 40), 2)}
    assert beaten(10) == first  # ten are not little: another part
    assert beaten(50) == {**first, 10: 3, 50: 4}  # and now all
    size = os.stat(paths[0] + "-wal").st_size
    for n in range(40):
        beaten(40 * (n % 5) + 10)
    assert os.stat(paths[0] + "-wal").st_size == size  # it has begun anew


@pytest.mark.parametrize("missing", ["a thread", "a descriptor"])
def test_a_checkpoint_is_done_without_what_makes_it_quick(
    missing: str,
    registry: Registry,
    clock: Clock,
    paths: Tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hostenroll, "CHECKPOINT_AFTER", 20)
    monkeypatch.setattr(hostenroll, "CHECKPOINT_DOUBLINGS", 0)
    monkeypatch.setattr(hostenroll, "CHECKPOINT_REST", 5)

    def refused(*_: object, **__: object) -> Any:
        raise RuntimeError("can't start new thread")

    def busy() -> Any:
        raise failure(14)  # SQLITE_CANTOPEN

    if missing == "a thread":
        monkeypatch.setattr(threading.Thread, "start", refused)
    else:
        monkeypatch.setattr(registry._store, "_connect", busy)
    fill(registry, 10)
    standing = hostenroll.Standing(1, "default", registry.keyring.first.kid)
    for n in range(100):
        clock.advance(1)
        assert registry.tick([(n % 10 + 1 << 8, standing)], clock.ms) == [clock.ms]
        registry.tidy()
    oldest = min(seen_without_the_wal(paths, tmp_path).values())
    assert clock.ms - 60_000 < oldest and os.stat(paths[0] + "-wal").st_size < 100_000


def test_without_a_descriptor_nothing_leaks_and_nothing_is_told_with_each_tick(
    registry: Registry, clock: Clock, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostenroll, "CHECKPOINT_AFTER", 1)

    def busy() -> Any:
        raise failure(14)  # SQLITE_CANTOPEN

    monkeypatch.setattr(registry._store, "_connect", busy)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(30):
        token_of(registry, clock)
        registry.tidy()
    assert len(os.listdir("/proc/self/fd")) <= before + 1 and "checkpoint" not in caplog.text


@pytest.mark.parametrize("statement", ["BEGIN", "SELECT 1 FROM service", "COMMIT"])
@pytest.mark.parametrize("error", [MemoryError(), failure(5)], ids=["no memory", "busy"])
def test_a_reader_that_fails_is_done_without(
    statement: str,
    error: Exception,
    registry: Registry,
    clock: Clock,
    paths: Tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hostenroll, "CHECKPOINT_AFTER", 1)
    store: Any = registry._store
    for _ in range(2):
        token_of(registry, clock)
        registry.tidy()
    store._reader = Faulty(store._reader, only=statement, error=error)
    for _ in range(30):
        token_of(registry, clock)
        registry.tidy()
        assert store._held_at is None and not getattr(store._reader, "in_transaction", False)
        assert is_free(paths)


@pytest.mark.parametrize("whose", ["the flush", "the rest"])
def test_pages_that_the_disk_has_not_taken_end_the_process_before_their_wal_is_gone(
    whose: str, registry: Registry, clock: Clock, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite would move them again, but not those of a part: who opens it next does."""
    monkeypatch.setattr(hostenroll, "CHECKPOINT_AFTER", 20)
    monkeypatch.setattr(hostenroll, "CHECKPOINT_DOUBLINGS", 0)
    monkeypatch.setattr(hostenroll, "CHECKPOINT_REST", 1)

    class Ended(BaseException):
        """In the place of the end of the process."""

    def end(status: int) -> None:
        raise Ended(status)

    def failing(file: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "_exit", end)
    store = registry._store
    if whose == "the flush":
        monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(Ended):
        for _ in range(40):
            token_of(registry, clock)
            registry.tidy()
            if store._flush is not None:
                store._flush.join()
            if whose == "the rest" and store._moved_at > store._checkpointed_at:
                passive, unsynced = "PRAGMA wal_checkpoint(PASSIVE)", failure(1034)
                with faulty(registry, only=passive, error=unsynced):
                    store.checkpoint(is_due=True)
    assert caplog.text.count("the disk has not taken") == 1 and "start again" in caplog.text
    store._flush_failed = ""  # or else it could not be closed here


@pytest.mark.parametrize("code", [13, 778], ids=["full", "a page that cannot be written"])
def test_a_part_that_cannot_be_moved_ends_nothing(
    code: int, registry: Registry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was moved before is on its way to the disk, and the WAL has the rest."""
    monkeypatch.setattr(hostenroll, "CHECKPOINT_AFTER", 20)
    monkeypatch.setattr(hostenroll, "CHECKPOINT_DOUBLINGS", 0)
    monkeypatch.setattr(hostenroll, "CHECKPOINT_REST", 1)
    ended: List[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    store, failed = registry._store, 0
    for _ in range(60):
        token_of(registry, clock)
        registry.tidy()
        if store._moved_at > store._checkpointed_at:
            passive = "PRAGMA wal_checkpoint(PASSIVE)"
            with faulty(registry, only=passive, error=failure(code)) as connection:
                store.checkpoint(is_due=True)
                failed += connection.failed
    assert failed > 1 and ended == []


def test_who_closes_a_database_leaves_no_descriptor_and_no_thread(
    paths: Tuple[str, str], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostenroll, "CHECKPOINT_AFTER", 1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with opened(paths, clock) as registry:
            for _ in range(3):
                token_of(registry, clock)
                registry.tidy()
            assert registry._store._reader is not None and registry._store._flush is not None
            flush = registry._store._flush
        assert not flush.is_alive()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("before", [1, 100], ids=["alone", "after runs of many"])
def test_the_wal_stays_bounded_under_a_run_of_beats(
    before: int,
    registry: Registry,
    clock: Clock,
    paths: Tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hostenroll, "CHECKPOINT_AFTER", 64)
    fill(registry, before)
    standing = hostenroll.Standing(1, "default", registry.keyring.first.kid)
    beats = [(n << 8, standing) for n in range(1, 101)]
    most = 2 * (64 << hostenroll.CHECKPOINT_DOUBLINGS) * (hostenroll.PAGE_SIZE + 24)
    for run in [beats[:before]] * 100 + [beats[:1]] * 2500:
        clock.advance(1)
        assert registry.tick(run, clock.ms) == [clock.ms] * len(run)
        registry.tidy()
        assert os.stat(paths[0] + "-wal").st_size < most
    assert is_free(paths)


def test_a_checkpoint_is_for_who_holds_the_lock(
    registry: Registry, clock: Clock, paths: Tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite up to 3.51.2 can corrupt a database whose checkpoint meets another's write."""
    monkeypatch.setattr(hostenroll, "CHECKPOINT_AFTER", 0)
    token_of(registry, clock)
    before = Path(paths[0]).stat().st_mtime_ns
    other = hostenroll.WriteLock(paths[0])
    assert other.attempt()
    with faulty(registry) as connection:
        registry.tidy()
        assert connection.count == 0
        other.close()
        assert is_free(paths)  # not even the gate is kept by who does not go on asking
        registry.tidy()
        assert connection.count == 1
    assert Path(paths[0]).stat().st_mtime_ns > before
    assert is_free(paths)


def test_no_checkpoint_under_a_lock_that_others_do_not_know(
    registry: Registry, clock: Clock, paths: Tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostenroll, "CHECKPOINT_AFTER", 0)
    token_of(registry, clock)
    os.unlink(paths[0] + ".lock")
    with faulty(registry) as connection:
        registry.tidy()
        assert connection.count == 0


@pytest.mark.parametrize("writer", ["lock", "connection"])
def test_beside_another_writer_a_tick_asks_to_come_again(
    writer: str,
    registry: Registry,
    clock: Clock,
    paths: Tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hostenroll, "LOCK_PATIENCE", 0.02)
    it = plain(registry, came_in(registry, clock)[1], clock)
    lock = hostenroll.WriteLock(paths[0])
    foreign = sqlite3.connect(paths[0], isolation_level=None, timeout=0)
    if writer == "lock":
        assert lock.attempt()
    else:
        foreign.execute("BEGIN IMMEDIATE")
    assert registry.tick([it], clock.ms) is None
    assert registry.tick([Act(lambda now: 1)], clock.ms) is None
    assert registry.tick([READ], clock.ms) == ["read"]
    with pytest.raises(hostenroll.StorageUnavailable):
        token_of(registry, clock)
    lock.close()
    foreign.close()
    assert registry.tick([it], clock.ms) == [clock.ms]
    assert len(look(registry, "SELECT 1 FROM token")) == 1


def test_a_full_disk_undoes_the_tick_and_leaves_the_store_in_order(
    registry: Registry, clock: Clock, paths: Tuple[str, str]
) -> None:
    """SQLITE_FULL rolls the whole transaction back by itself: the next statement would commit."""
    it = plain(registry, came_in(registry, clock)[1], clock)
    (pages,) = look(registry, "PRAGMA page_count")[0]
    look(registry, f"PRAGMA max_page_count = {pages + 3}")
    before = snapshot(registry)

    def minting(size: int) -> Act:
        order = hostenroll.TokenOrder(description="x" * size)
        return Act(lambda now: registry.mint(OPERATOR, order, now))

    acts = [minting(1), minting(50_000), minting(1), READ]
    outcome = registry.tick([it, *acts], clock.ms) or []
    assert [type(result) for result in outcome] == [hostenroll.StorageUnavailable] * 5
    assert not connection_of(registry).in_transaction
    assert is_free(paths)
    assert snapshot(registry) == before
    assert registry.tick([it, READ], clock.ms) == [clock.ms, "read"]
    look(registry, "PRAGMA max_page_count = 1000000")
    outcome = registry.tick([it, *acts], clock.ms) or []
    assert len(outcome) == 5 and not any(isinstance(result, Problem) for result in outcome)
    assert look(registry, "PRAGMA integrity_check") == [("ok",)]


def test_a_new_pin_is_written_though_the_tick_that_wrote_it_has_died(
    registry: Registry, clock: Clock
) -> None:
    do(registry, clock, lambda now: registry.start_service("https://here", now, "old"))
    registry.announce_pin("new")

    def dies(now: int) -> None:
        raise hostenroll.StoreError("the disk is full")

    outcomes = registry.tick([Act(registry.keep_house), Act(dies)], clock.ms) or []
    assert [type(outcome) for outcome in outcomes] == [hostenroll.StorageUnavailable] * 2
    for _ in range(2):
        do(registry, clock, registry.keep_house)
        assert look(registry, "SELECT pin FROM service") == [("new",)]
    look(registry, "UPDATE service SET pin = 'of another server'")  # which comes after ours
    do(registry, clock, registry.keep_house)
    assert look(registry, "SELECT pin FROM service") == [("of another server",)]


@pytest.mark.parametrize("dies_first", [False, True], ids=["at once", "after a tick that died"])
def test_a_database_that_takes_the_place_of_another_hears_of_the_server(
    dies_first: bool, registry: Registry, clock: Clock, paths: Tuple[str, str], tmp_path: Path
) -> None:
    """Also where what lies beside the old one cannot be removed for a while."""
    (tmp_path / "backup").mkdir()
    registry.back_up(str(tmp_path / "backup"))
    do(registry, clock, lambda now: registry.start_service("https://here", now))
    os.replace(tmp_path / "backup" / "hostenroll.db", paths[0])
    os.remove(f"{paths[0]}-shm")
    os.mkdir(f"{paths[0]}-shm")
    assert isinstance(
        (registry.tick([Act(lambda now: "written")], clock.ms) or [])[0],
        hostenroll.StorageUnavailable,
    )
    registry.tidy()
    os.rmdir(f"{paths[0]}-shm")

    def is_back() -> bool:
        registry.tidy()
        return registry.tick([Act(lambda now: "written")], clock.ms) == ["written"]

    until(is_back)

    def dies(now: int) -> None:
        raise hostenroll.StoreError("the disk is full")

    if dies_first:
        registry.tick([Act(registry.keep_house), Act(dies)], clock.ms)
    do(registry, clock, registry.keep_house)
    assert look(registry, "SELECT public_url FROM service") == [("https://here",)]


Prepare = Callable[[Registry, Clock], Callable[[int], Any]]


def _enrolling(key: Optional[str]) -> Prepare:
    def prepare(registry: Registry, clock: Clock) -> Callable[[int], Any]:
        arrival = hostenroll.Applicant(token_of(registry, clock), "web-1", idempotency_key=key)
        return lambda now: registry.enroll(arrival, now)

    return prepare


def _replaying(registry: Registry, clock: Clock) -> Callable[[int], Any]:
    act = _enrolling("k")(registry, clock)
    do(registry, clock, act)
    return act


def _reenrolling(registry: Registry, clock: Clock) -> Callable[[int], Any]:
    number, _ = came_in(registry, clock)
    order = hostenroll.TokenOrder()
    text = do(registry, clock, lambda now: registry.reenroll(OPERATOR, number, order, now))[1]
    arrival = hostenroll.Applicant(text, "web-2", idempotency_key="k")
    return lambda now: registry.enroll(arrival, now)


def _beating(facts: Dict[str, str], later: float) -> Prepare:
    def prepare(registry: Registry, clock: Clock) -> Callable[[int], Any]:
        claims = registry.authenticate(came_in(registry, clock)[1], clock.ms)
        clock.advance(later)
        return lambda now: registry.beat(claims, lambda: facts, now)

    return prepare


def _on_host(name: str, token: bool = False) -> Prepare:
    def prepare(registry: Registry, clock: Clock) -> Callable[[int], Any]:
        number, _ = came_in(registry, clock)
        order = hostenroll.TokenOrder()
        if token:
            do(registry, clock, lambda now: registry.reenroll(OPERATOR, number, order, now))
        return lambda now: getattr(registry, name)(OPERATOR, number, now)

    return prepare


def _as_admin(name: str, *arguments: Any) -> Prepare:
    return lambda registry, clock: partial(getattr(registry, name), OPERATOR, *arguments)


def _on_token(registry: Registry, clock: Clock) -> Callable[[int], Any]:
    number = int(token_of(registry, clock).split("_")[1], 16)
    return lambda now: registry.revoke_token(OPERATOR, number, now)


def _superseding(registry: Registry, clock: Clock) -> Callable[[int], Any]:
    act = _replaying(registry, clock)
    claims = registry.authenticate(do(registry, clock, act).grant.credential, clock.ms)
    return lambda now: registry.beat(claims, dict, now)


def _restoring(registry: Registry, clock: Clock) -> Callable[[int], Any]:
    number, _ = came_in(registry, clock)
    do(registry, clock, lambda now: registry.revoke_host(OPERATOR, number, now))
    return lambda now: registry.restore_host(OPERATOR, number, now)


def _keeping_house(registry: Registry, clock: Clock) -> Callable[[int], Any]:
    do(registry, clock, lambda now: registry.start_service("http://here", now))
    token_of(registry, clock)
    registry.announce_pin("pin")
    clock.advance(61 * 86_400)
    return registry.keep_house


WRITES: Dict[str, Prepare] = {
    "mint": lambda registry, clock: (
        lambda now: registry.mint(OPERATOR, hostenroll.TokenOrder(), now)
    ),
    "enroll": _enrolling(None),
    "enroll with a key": _enrolling("k"),
    "replay": _replaying,
    "re-enroll": _reenrolling,
    "beat with facts": _beating({"os": "linux"}, 1),
    "beat late": _beating({"os": "linux"}, -1),
    "renewal": _beating({}, 80),
    "revoke": _on_host("revoke_host"),
    "delete": _on_host("delete_host", token=True),
}
OTHER_WRITES: Dict[str, Prepare] = {
    "supersede": _superseding,
    "restore": _restoring,
    "edit": lambda registry, clock: partial(
        registry.edit_host, OPERATOR, came_in(registry, clock)[0], {"name": "n", "labels": {}}
    ),
    "revoke a token": _on_token,
    "start a service": lambda registry, clock: partial(registry.start_service, "http://here"),
    "keep house": _keeping_house,
    "add an organization": _as_admin("add_organization", "berlin"),
    "mint an API key": _as_admin("mint_api_key", None, "admin", ""),
}
FAILURES: Dict[str, Dict[str, Any]] = {
    "before": {},
    "after": {"after": True},
    "full, and rolled back": {"error": failure(13), "rolls_back": True},
    "no memory, and rolled back": {"error": failure(7, sqlite3.DatabaseError), "rolls_back": True},
    "busy": {"error": failure(5)},
    "corrupt": {"error": failure(11, sqlite3.DatabaseError)},
}


@pytest.mark.parametrize(
    "how", [name if n < 2 else pytest.param(name, marks=slow) for n, name in enumerate(FAILURES)]
)
@pytest.mark.parametrize("prepare", table({**WRITES, **OTHER_WRITES}))
def test_whichever_statement_fails_it_is_all_or_nothing(
    prepare: Prepare, how: str, paths: Tuple[str, str], clock: Clock
) -> None:
    registry = open_registry(*paths, clock.ms, credential_ttl=100)
    act = prepare(registry, clock)
    before = snapshot(registry)
    failures = 0
    for n in range(1, 60):
        with faulty(registry, n=n, **FAILURES[how]) as connection:
            outcomes = registry.tick([Act(act)], clock.ms) or [registry.give_up()]
        if not isinstance(outcomes[0], hostenroll.StorageUnavailable):
            break
        failures += 1
        assert connection.failed
        assert not connection_of(registry).in_transaction
        assert is_free(paths)
        assert snapshot(registry) == before, n
    assert not connection.failed and failures >= 3
    assert not isinstance(outcomes[0], Problem)
    assert snapshot(registry) != before
    registry.close()


@pytest.mark.parametrize("only", ["BEGIN IMMEDIATE", "COMMIT", "SAVEPOINT act", "BEGIN"])
def test_a_damaged_database_is_unavailable_and_no_crash(
    only: str, registry: Registry, clock: Clock, paths: Tuple[str, str]
) -> None:
    """SQLITE_CORRUPT and SQLITE_NOTADB come as DatabaseError, not as OperationalError."""
    error = sqlite3.DatabaseError("database disk image is malformed")
    with faulty(registry, only=only, error=error) as connection:
        outcome = registry.tick([Act(lambda now: 1, writes=only != "BEGIN")], clock.ms)
        assert connection.failed
    assert outcome is not None
    assert isinstance(outcome[0], hostenroll.StorageUnavailable)
    assert is_free(paths)
    token_of(registry, clock)


@pytest.mark.parametrize("only", ["BEGIN IMMEDIATE", "COMMIT", "SAVEPOINT act", "RELEASE act"])
def test_without_memory_a_tick_is_undone_and_all_of_it_may_come_again(
    only: str, registry: Registry, clock: Clock, paths: Tuple[str, str], caplog: Any
) -> None:
    """Python says SQLITE_NOMEM as MemoryError; and it may lack memory itself."""
    before = snapshot(registry)
    add = Act(lambda now: registry.add_organization(OPERATOR, "x", now))
    with faulty(registry, only=only, error=MemoryError()):
        outcome = registry.tick([add, add], clock.ms) or []
    assert [type(it) for it in outcome] == [hostenroll.StorageUnavailable] * 2

    def starve(now: int) -> None:
        registry.add_organization(OPERATOR, "y", now)
        raise MemoryError

    outcome = registry.tick([add, Act(starve)], clock.ms) or []
    assert [type(it) for it in outcome] == [hostenroll.StorageUnavailable] * 2
    assert snapshot(registry) == before and is_free(paths)
    assert [record.getMessage() for record in caplog.records] == [
        f"storage: {paths[0]}: out of memory: give us more memory"
    ]
    assert do(registry, clock, add.run)


@pytest.mark.parametrize("error", [MemoryError(), sqlite3.OperationalError("disk I/O error")])
def test_a_checkpoint_that_fails_hurts_nobody(
    error: Exception, registry: Registry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostenroll, "CHECKPOINT_AFTER", 1)
    token_of(registry, clock)
    with faulty(registry, only="PRAGMA wal_checkpoint(PASSIVE)", error=error) as connection:
        registry.tidy()
        assert connection.failed
    token_of(registry, clock)


def test_a_checkpoint_that_fails_is_not_tried_and_told_of_with_each_tick(
    registry: Registry, clock: Clock, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostenroll, "CHECKPOINT_AFTER", 5)
    checkpoint, tried = "PRAGMA wal_checkpoint(PASSIVE)", 0
    for _ in range(12):
        token_of(registry, clock)
        with faulty(registry, only=checkpoint) as connection:
            registry.tidy()
            tried += connection.count
    assert 0 < tried < 12 and caplog.text.count("cannot checkpoint") == 1


def test_a_wal_that_cannot_grow_is_moved_into_the_database(
    registry: Registry, clock: Clock, paths: Tuple[str, str]
) -> None:
    """Else a disk that was full for a moment keeps heartbeats out until somebody looks."""
    token_of(registry, clock)
    before = Path(paths[0]).stat().st_mtime_ns
    full = sqlite3.OperationalError("database or disk is full")
    with faulty(registry, only="COMMIT", error=full):
        registry.tick([Act(lambda now: 1, durable=False)], clock.ms)
    registry.tidy()
    assert registry.storage_trouble and Path(paths[0]).stat().st_mtime_ns > before


def test_a_database_that_is_not_in_wal_mode_is_taken_as_it_is(
    paths: Tuple[str, str], clock: Clock
) -> None:
    """Such as what VACUUM INTO has made."""
    with opened(paths, clock) as registry:
        number, credential = came_in(registry, clock)
    assert sql(paths[0], "PRAGMA journal_mode = DELETE") == [("delete",)]
    with opened(paths, clock) as registry:
        token_of(registry, clock)
        beat(registry, clock, credential)
        assert registry.host(OPERATOR, number, clock.ms).status == "online"


def test_a_defect_in_a_tick_is_no_reason_to_try_again_at_once(
    registry: Registry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was to be audited waits, but a server that asks whether it should hurry must not."""
    registry.refused(hostenroll.ApiKeyInvalid(), hostenroll.Origin("::1", "1"), clock.ms)
    api = hostenroll.Api(registry)
    assert api.owes_notes

    def broken(keyring: object) -> None:
        raise TypeError("a defect")

    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(registry.audit, "write", broken)
        registry.tick([api.housekeeping()], clock.ms)
    assert "TypeError" in registry.storage_trouble and not api.owes_notes
    registry.tick([api.housekeeping()], clock.ms)
    assert not registry.storage_trouble and happened(registry, "refuse") != []


def test_an_audit_log_with_a_mac_of_text_goes_on(registry: Registry, clock: Clock) -> None:
    """Whoever has forged it so must not stop the server."""
    token_of(registry, clock)
    connection_of(registry).execute("DROP TRIGGER audit_is_never_changed")
    connection_of(registry).execute("UPDATE audit SET mac = 'text'")
    token_of(registry, clock)
    with pytest.raises(hostenroll.OperatorError, match="not as it was written"):
        registry.verify_audit(None)


def test_a_trouble_is_told_once_and_so_is_its_end(
    registry: Registry, clock: Clock, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though what only reads succeeds in between, and now and then a small tick that writes."""
    caplog.set_level(logging.INFO)
    write = Act(lambda now: 1, durable=False)
    for _ in range(3):
        for words in ("database or disk is full", "disk I/O error"):
            error = sqlite3.OperationalError(words)
            with faulty(registry, only="COMMIT", error=error) as connection:
                registry.tick([write], clock.ms)
                assert connection.failed and registry.storage_trouble
            assert registry.tick([READ], clock.ms) == ["read"] and registry.storage_trouble
        assert registry.tick([write], clock.ms) == [1] and not registry.storage_trouble
    monkeypatch.setattr(hostenroll, "TROUBLE_OVER", -1)
    for _ in range(3):
        assert registry.tick([READ, write], clock.ms) == ["read", 1]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and "full" in said[0] and "I/O" in said[1]
    assert said[2] == "storage: the database can be used again"


def test_a_commit_that_fails_answers_nothing_not_even_a_read(
    registry: Registry, clock: Clock, paths: Tuple[str, str]
) -> None:
    """A read may have seen rows that are gone."""
    it = plain(registry, came_in(registry, clock)[1], clock)
    before = snapshot(registry)
    acts = [Act(lambda now: registry.add_organization(OPERATOR, "x", now)), READ]
    with faulty(registry, only="COMMIT"):
        outcome = registry.tick([it, *acts], clock.ms + 1) or []
    assert [type(result) for result in outcome] == [hostenroll.StorageUnavailable] * 3
    assert snapshot(registry) == before
    with faulty(registry, only="COMMIT"):
        outcome = registry.tick([READ], clock.ms) or []
    assert [type(result) for result in outcome] == [hostenroll.StorageUnavailable]
    outcome = registry.tick([it, *acts], clock.ms + 1) or []
    assert (outcome[0], outcome[2]) == (clock.ms + 1, "read")


def _lose(path: str) -> None:
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + suffix)


def _other_key_file(paths: Tuple[str, str]) -> None:
    hostenroll.write_key_file(paths[1], hostenroll.new_keyring())


LOSSES: Dict[str, Tuple[Callable[[Tuple[str, str]], Any], str]] = {
    "no key file": (lambda paths: _lose(paths[1]), "restore the key file"),
    "no database": (lambda paths: _lose(paths[0]), "restore the database"),
    "an empty database": (lambda paths: os.truncate(paths[0], 0), "restore the database"),
    "another's key file": (_other_key_file, "not that of the database"),
}


@pytest.mark.parametrize("lose, sentence", LOSSES.values(), ids=LOSSES)
def test_half_of_a_pair_is_refused_unless_init_says_to_go_on(
    lose: Callable[[Tuple[str, str]], Any], sentence: str, paths: Tuple[str, str], clock: Clock
) -> None:
    registry = open_registry(*paths, clock.ms)
    _, credential = came_in(registry, clock)
    registry.close()
    lose(paths)
    there = [os.path.exists(path) for path in paths]
    key = Path(paths[1]).read_bytes() if there[1] else None
    for _ in range(2):
        with pytest.raises(hostenroll.OperatorError, match=sentence) as caught:
            open_registry(*paths, clock.ms)
        assert "--init" in str(caught.value) and "\n" not in str(caught.value)
        assert [os.path.exists(path) for path in paths] == there
    registry = open_registry(*paths, clock.ms, init=True)
    assert key is None or Path(paths[1]).read_bytes() == key
    # The old keys without their database know the credential, and no host of it.
    kept = lose in (LOSSES["no database"][0], LOSSES["an empty database"][0])
    with pytest.raises(hostenroll.HostUnknown if kept else hostenroll.CredentialInvalid):
        beat(registry, clock, credential)
    came_in(registry, clock)
    registry.close()
    open_registry(*paths, clock.ms).close()


def test_a_pair_is_opened_as_it_is(paths: Tuple[str, str], clock: Clock) -> None:
    open_registry(*paths, clock.ms).close()
    key = Path(paths[1]).read_bytes()
    for init in (False, True):
        open_registry(*paths, clock.ms, init=init).close()
        assert Path(paths[1]).read_bytes() == key
        assert not os.path.exists(paths[1] + ".new")


def _stop_before_the_rename(paths: Tuple[str, str], clock: Clock) -> None:
    open_registry(*paths, clock.ms).close()
    os.rename(paths[1], paths[1] + ".new")


def _stop_before_the_commit(paths: Tuple[str, str], clock: Clock) -> None:
    _stop_before_the_rename(paths, clock)
    _lose(paths[0])
    Path(paths[0]).touch()


def _stop_before_the_database(paths: Tuple[str, str], clock: Clock) -> None:
    _stop_before_the_rename(paths, clock)
    _lose(paths[0])


def _stop_in_the_key_file(paths: Tuple[str, str], clock: Clock) -> None:
    Path(paths[0]).touch()
    Path(paths[1] + ".new").write_text('{"keys": [{"kty"')


CRASHES = (
    _stop_in_the_key_file,
    _stop_before_the_database,
    _stop_before_the_commit,
    _stop_before_the_rename,
)


@pytest.mark.parametrize("crash", CRASHES, ids=lambda crash: crash.__name__.strip("_"))
def test_a_first_start_that_was_killed_is_made_good_by_the_next(
    crash: Callable[..., None], paths: Tuple[str, str], clock: Clock
) -> None:
    crash(paths, clock)
    prepared = Path(paths[1] + ".new").read_bytes()
    registry = open_registry(*paths, clock.ms)
    came_in(registry, clock)
    registry.close()
    assert not os.path.exists(paths[1] + ".new")
    assert stat.S_IMODE(os.stat(paths[1]).st_mode) == 0o600
    if crash is _stop_before_the_rename:  # the database knows these keys already
        assert Path(paths[1]).read_bytes() == prepared
    open_registry(*paths, clock.ms).close()


@pytest.mark.parametrize("left", ["torn", "foreign"])
def test_what_lies_beside_a_lost_key_file_is_not_taken_for_it(
    left: str, paths: Tuple[str, str], clock: Clock
) -> None:
    """A serve --init that was killed while it wrote must not be the end of all serve --init."""
    open_registry(*paths, clock.ms).close()
    if left == "foreign":
        hostenroll.write_key_file(paths[1] + ".new", hostenroll.new_keyring())
    else:
        Path(paths[1] + ".new").write_text('{"keys": [{"kty"')
    os.unlink(paths[1])
    with pytest.raises(hostenroll.OperatorError):
        open_registry(*paths, clock.ms)
    open_registry(*paths, clock.ms, init=True).close()
    open_registry(*paths, clock.ms).close()


def test_a_first_start_may_be_a_race(tmp_path: Path) -> None:
    done: List[Any] = []
    racers = [
        threading.Thread(target=lambda: done.append(cli(tmp_path, "list-orgs"))) for _ in range(4)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [(run.returncode, "default" in run.stdout) for run in done] == [(0, True)] * 4, done
    database = str(tmp_path / "hostenroll.db")
    key_file = hostenroll.load_keyring(str(tmp_path / "hostenroll.key"))
    assert sql(database, "SELECT kid FROM signing_key") == [(key.kid,) for key in key_file.keys]
    assert not (tmp_path / "hostenroll.key.new").exists()


@pytest.mark.parametrize("why", ["used", "revoked", "expired"])
def test_a_use_that_may_not_be_taken_is_not(why: str, registry: Registry, clock: Clock) -> None:
    """The statement itself is the guard, whatever was looked at before."""
    number = int(token_of(registry, clock)[4:20], 16)
    store = registry._store
    if why == "used":
        assert do(registry, clock, lambda now: store.use_token(number, now, ""))
    elif why == "revoked":
        do(registry, clock, lambda now: store.revoke_token(number, now))
    else:
        clock.advance(hostenroll.TOKEN_TTL)
    assert do(registry, clock, lambda now: store.use_token(number, now, "")) is False


BUGGY_VERSIONS = {
    (3, 6, 23): False, (3, 7, 0): True, (3, 31, 1): True, (3, 40, 1): True,
    (3, 44, 0): True, (3, 44, 5): True, (3, 44, 6): False, (3, 44, 9): False,
    (3, 45, 0): True, (3, 49, 2): True,
    (3, 50, 0): True, (3, 50, 6): True, (3, 50, 7): False, (3, 50, 99): False,
    (3, 51, 0): True, (3, 51, 2): True, (3, 51, 3): False, (3, 52, 0): False, (4, 0, 0): False,
}  # fmt: skip


@pytest.mark.parametrize("version, has_it", BUGGY_VERSIONS.items(), ids=map(str, BUGGY_VERSIONS))
def test_which_sqlite_has_the_wal_reset_bug(version: Tuple[int, ...], has_it: bool) -> None:
    assert hostenroll.has_wal_reset_bug(version) is has_it


SCHEMA_1 = """
PRAGMA journal_mode = WAL;
PRAGMA application_id = 0x686F7374;
PRAGMA user_version = 1;
CREATE TABLE organization (id TEXT NOT NULL PRIMARY KEY, created_at INTEGER NOT NULL)
    WITHOUT ROWID;
CREATE TABLE api_key (
    id INTEGER PRIMARY KEY, secret_hash BLOB NOT NULL,
    organization_id TEXT REFERENCES organization (id),
    role TEXT NOT NULL CHECK (role IN ('admin', 'viewer')), description TEXT NOT NULL,
    created_at INTEGER NOT NULL, created_by TEXT NOT NULL, revoked_at INTEGER);
CREATE TABLE token (
    id INTEGER PRIMARY KEY, secret_hash BLOB NOT NULL,
    organization_id TEXT NOT NULL REFERENCES organization (id), description TEXT NOT NULL,
    hostname TEXT, host_id INTEGER, labels TEXT NOT NULL,
    max_uses INTEGER NOT NULL CHECK (max_uses >= 1),
    uses INTEGER NOT NULL DEFAULT 0 CHECK (uses BETWEEN 0 AND max_uses),
    created_at INTEGER NOT NULL, created_by TEXT NOT NULL, expires_at INTEGER NOT NULL,
    used_at INTEGER, used_from TEXT, revoked_at INTEGER);
CREATE INDEX token_organization ON token (organization_id);
CREATE INDEX token_host ON token (host_id) WHERE host_id IS NOT NULL;
CREATE TABLE host (
    id INTEGER PRIMARY KEY, organization_id TEXT NOT NULL REFERENCES organization (id),
    name TEXT NOT NULL, hostname TEXT NOT NULL, bound INTEGER NOT NULL, os TEXT NOT NULL,
    architecture TEXT NOT NULL, docker_version TEXT NOT NULL, labels TEXT NOT NULL,
    issued INTEGER NOT NULL, enrolled_at INTEGER NOT NULL, revoked_at INTEGER,
    token_id INTEGER NOT NULL, admitted_by INTEGER NOT NULL, admitted_at INTEGER NOT NULL,
    admitted_serial INTEGER NOT NULL, idempotency BLOB);
CREATE INDEX host_organization ON host (organization_id);
CREATE INDEX host_token ON host (token_id);
CREATE UNIQUE INDEX host_idempotency ON host (admitted_by, idempotency)
    WHERE idempotency IS NOT NULL;
CREATE TABLE signing_key (
    number INTEGER PRIMARY KEY, kid TEXT NOT NULL UNIQUE, created_at INTEGER NOT NULL);
CREATE TABLE heartbeat (
    host_id INTEGER PRIMARY KEY REFERENCES host (id) ON DELETE CASCADE,
    last_seen INTEGER NOT NULL, serial INTEGER NOT NULL, key_number INTEGER NOT NULL,
    active INTEGER NOT NULL);
CREATE TABLE service (
    id INTEGER PRIMARY KEY CHECK (id = 1), started INTEGER NOT NULL, alive INTEGER NOT NULL,
    previous_alive INTEGER NOT NULL, interval INTEGER NOT NULL, public_url TEXT NOT NULL);
"""
OLD_HOSTS = {
    # name: issued, admitted_serial, seconds since the last beat, serial, active
    "beats": (1, 1, 5, 1, 1),
    "renewed": (4, 1, 5, 3, 1),
    "never beat": (1, 1, None, 0, 1),
    "asked again": (3, 1, None, 0, 1),
    "re-enrolls": (5, 5, 5, 3, 1),
    "revoked": (1, 1, 5, 1, 0),
    "revoked before it beat": (1, 1, None, 0, 0),
}


class Old(NamedTuple):
    """A fleet as the first version left it."""

    ids: Dict[str, int]
    keyring: Any
    token: Any  # valid
    used: Any  # let all the hosts in, each by its name as Idempotency-Key

    def credential(self, name: str, serial: int) -> str:
        number, first = self.ids[name], self.keyring.first
        claims = hostenroll.Claims(number, "default", 1_799_000_000, serial, None, first.kid)
        return str(first.sign(claims))


def old_fleet(paths: Tuple[str, str], clock: Clock) -> Old:
    keyring = hostenroll.new_keyring()
    hostenroll.write_key_file(paths[1], keyring)
    os.close(os.open(paths[0], os.O_WRONLY | os.O_CREAT, 0o600))
    before = clock.ms - 3_600_000
    token, used = (hostenroll.mint_secret("het", (before << 8) + n) for n in (1, 2))
    ids = {name: (before << 8) + n for n, name in enumerate(OLD_HOSTS)}
    with contextlib.closing(sqlite3.connect(paths[0])) as db:
        db.executescript(SCHEMA_1)
        db.execute("INSERT INTO organization VALUES ('default', ?)", (before,))
        db.execute("INSERT INTO signing_key VALUES (1, ?, ?)", (keyring.first.kid, before))
        db.execute("INSERT INTO service VALUES (1, 0, ?, 0, 30, 'http://x')", (clock.ms,))
        for secret, uses, ends in ((token, 0, 60_000), (used, 9, -1)):
            db.execute(
                """INSERT INTO token VALUES (?, ?, 'default', 'd', NULL, NULL, '{"a": "1"}', 9, ?,
                   ?, 'cli:x', ?, NULL, NULL, NULL)""",
                (secret.id, secret.digest(), uses, before, clock.ms + ends),
            )
        for name, (issued, admitted, silence, serial, active) in OLD_HOSTS.items():
            db.execute(
                """INSERT INTO host VALUES (?, 'default', ?, ?, 0, '', '', '', '{}', ?, ?, ?,
                   ?, ?, ?, ?, ?)""",
                (ids[name], name, f"{name}.lan", issued, before, None if active else before,
                 used.id, used.id, before, admitted, hostenroll.fingerprint(name)),
            )  # fmt: skip
            seen = 0 if silence is None else clock.ms - silence * 1000
            db.execute("INSERT INTO heartbeat VALUES (?, ?, ?, 1, ?)",
                       (ids[name], seen, serial, active))  # fmt: skip
        db.commit()
    return Old(ids, keyring, token, used)


def anatomy(path: str) -> Dict[str, Any]:
    """All that a schema means, and not how it is written."""
    with contextlib.closing(sqlite3.connect(path)) as db:

        def ask(pragma: str, name: str) -> List[Any]:
            return sorted(db.execute(f"PRAGMA {pragma}('{name}')").fetchall(), key=repr)

        def written(name: str) -> str:
            statement = "SELECT sql FROM sqlite_master WHERE name = ?"
            text = db.execute(statement, (name,)).fetchone()[0] or ""
            return " ".join(re.sub(r"--.*", "", text).split())

        found: Dict[str, Any] = {}
        for kind, name, of in db.execute("SELECT type, name, tbl_name FROM sqlite_master"):
            found[f"{kind} {name}"] = [of, written(name) if kind in ("index", "trigger") else ""]
            if kind == "table":
                columns = [row[1:] for row in ask("table_info", name)]
                indexes = sorted(row[1:] for row in ask("index_list", name))
                found[f"{kind} {name}"] += [sorted(columns), indexes, ask("foreign_key_list", name)]
            elif kind == "index":
                found[f"{kind} {name}"] += [ask("index_xinfo", name)]
        for pragma in ("application_id", "user_version", "journal_mode"):
            found[pragma] = db.execute(f"PRAGMA {pragma}").fetchone()
        return found


def contents(path: str) -> Tuple[List[str], Dict[str, Any]]:
    """What is in a database that nobody has open, and what it is written in."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        names = [n for (n,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {n: db.execute(f"SELECT * FROM {n} ORDER BY 1").fetchall() for n in sorted(names)}
    return sorted(anatomy(path)), rows


def test_a_migrated_database_is_what_a_fresh_one_is(
    paths: Tuple[str, str], clock: Clock, tmp_path: Path
) -> None:
    (tmp_path / "fresh").mkdir()
    fresh = str(tmp_path / "fresh" / "x.db"), str(tmp_path / "fresh" / "x.key")
    open_registry(*fresh, clock.ms).close()
    old_fleet(paths, clock)
    assert anatomy(paths[0]) != anatomy(fresh[0])
    key, before = Path(paths[1]).read_bytes(), contents(paths[0])[1]
    open_registry(*paths, clock.ms).close()
    assert anatomy(paths[0]) == anatomy(fresh[0])
    after = contents(paths[0])[1]
    assert {name: len(rows) for name, rows in after.items() if rows} == {
        name: len(rows) for name, rows in before.items() if rows
    }
    for name in ("organization", "token", "api_key"):
        assert after[name] == before[name]
    for name in ("host", "signing_key", "service"):
        assert [row[: len(old)] for row, old in zip(after[name], before[name])] == before[name]
    serials = [[row[2] for row in rows["heartbeat"]] for rows in (before, after)]
    assert serials == [[1, 3, 0, 0, 3, 1, 0], [1, 3, 1, 1, 3, 1, 1]]
    assert Path(paths[1]).read_bytes() == key
    open_registry(*paths, clock.ms).close()
    assert contents(paths[0])[1] == after


def test_whichever_statement_of_a_migration_fails_it_is_all_or_nothing(
    paths: Tuple[str, str], clock: Clock, tmp_path: Path
) -> None:
    old_fleet(paths, clock)
    before, old = contents(paths[0]), shutil.copy(paths[0], tmp_path / "old.db")
    open_registry(*paths, clock.ms).close()
    expected, failures = contents(paths[0]), 0
    for after in (False, True):
        shutil.copy(old, paths[0])
        for n in range(1, 200):
            store: Any = hostenroll.Store(paths[0])
            store.lock.wait(5)
            assert store.open()
            store._connection = Faulty(store._connection, n=n, after=after)
            try:
                store.migrate()
            except hostenroll.StoreError:
                failures += 1
                store.abandon()
            failed = store._connection.failed
            store.close()
            assert contents(paths[0]) == (before if failed else expected), n
            if not failed:
                break
        assert not failed and failures > 15


def killed_at(n: int, prepare: Callable[[], Any], act: Callable[[Any], Any]) -> bool:
    """Whether an act, in a process of its own, is killed before its n-th call of the system or of
    SQLite; False when it comes to its end first."""
    with warnings.catch_warnings():  # a thread of an earlier test may not quite have ended
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            calls = 0

            def watch(frame: Any, event: str, called: Any) -> None:
                nonlocal calls
                if event == "c_call":
                    owner = type(getattr(called, "__self__", None)).__module__
                    ours = ("_io", sqlite3.Connection.__module__)
                    if called.__module__ in ("posix", "fcntl") or owner in ours:
                        calls += 1
                        if calls == n:
                            os.kill(os.getpid(), signal.SIGKILL)

            prepared = prepare()
            sys.setprofile(watch)
            act(prepared)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status != 0


def test_a_migration_that_is_killed_leaves_a_whole_old_database(
    paths: Tuple[str, str], clock: Clock, tmp_path: Path
) -> None:
    old_fleet(paths, clock)
    (tmp_path / "run").mkdir()
    path = str(tmp_path / "run" / "hostenroll.db")
    before = contents(paths[0])

    def opened_store() -> hostenroll.Store:
        store = hostenroll.Store(path)
        store.lock.wait(5)
        assert store.open()
        return store

    n, outcomes = 0, []
    while True:
        n += 1
        _lose(path)
        shutil.copy(paths[0], path)
        killed = killed_at(n, opened_store, lambda store: store.migrate())
        version = sql(path, "PRAGMA user_version")[0][0]
        if version == 1:
            assert contents(path) == before
            outcomes.append(n)
        open_registry(path, paths[1], clock.ms).close()
        assert sql(path, "PRAGMA user_version") == [(hostenroll.SCHEMA_VERSION,)]
        assert sorted(anatomy(path)) != before[0]
        if not killed:
            break
    assert version == hostenroll.SCHEMA_VERSION and len(outcomes) > 20


APPEND_ONLY = {
    "no row is changed": "UPDATE audit SET actor = 'nobody' WHERE number = 1",
    "not even to the same": "UPDATE audit SET at = at",
    "the first is not deleted": "DELETE FROM audit WHERE number = 1",
    "nor another": "DELETE FROM audit WHERE number = 2",
    "nor are all": "DELETE FROM audit",
    "none is replaced": "INSERT OR REPLACE INTO audit SELECT number, 0, action, actor, address, "
    "organization_id, subject, code, detail, mac FROM audit WHERE number = 1",
    "nor quietly left out": "INSERT OR IGNORE INTO audit SELECT * FROM audit WHERE number = 1",
}


@pytest.mark.parametrize("statement", APPEND_ONLY.values(), ids=APPEND_ONLY)
def test_the_audit_log_is_append_only(
    statement: str, registry: Registry, clock: Clock, paths: Tuple[str, str]
) -> None:
    for _ in range(3):
        token_of(registry, clock)
    before = look(registry, "SELECT * FROM audit")
    registry.close()
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        sql(paths[0], statement)
    assert sql(paths[0], "SELECT * FROM audit") == before


def _with_api_key(registry: Registry, clock: Clock) -> Callable[[int], Any]:
    number = int(make_api_key(registry, clock).split("_")[1], 16)
    return lambda now: registry.revoke_api_key(OPERATOR, number, now)


def _with_token(registry: Registry, clock: Clock) -> Callable[[int], Any]:
    number = int(token_of(registry, clock).split("_")[1], 16)
    return lambda now: registry.revoke_token(OPERATOR, number, now)


def _restoring(registry: Registry, clock: Clock) -> Callable[[int], Any]:
    number, _ = came_in(registry, clock)
    do(registry, clock, lambda now: registry.revoke_host(OPERATOR, number, now))
    return lambda now: registry.restore_host(OPERATOR, number, now)


def _editing(registry: Registry, clock: Clock) -> Callable[[int], Any]:
    number, _ = came_in(registry, clock)
    changes = {"name": "front", "labels": {"a": "1"}}
    return lambda now: registry.edit_host(OPERATOR, number, changes, now)


AUDITED_WRITES: Dict[str, Tuple[str, Prepare]] = {
    "mint": ("mint", WRITES["mint"]),
    "enroll": ("enroll", WRITES["enroll"]),
    "replay": ("replay", WRITES["replay"]),
    "re-enroll": ("re-enroll", WRITES["re-enroll"]),
    "renewal": ("renew", WRITES["renewal"]),
    "revoke": ("revoke", WRITES["revoke"]),
    "delete": ("delete", WRITES["delete"]),
    "restore": ("restore", _restoring),
    "edit": ("edit", _editing),
    "revoke a token": ("revoke", _with_token),
    "revoke an API key": ("revoke", _with_api_key),
    "mint an API key": (
        "mint",
        lambda registry, clock: (
            lambda now: registry.mint_api_key(OPERATOR, "default", "admin", "", now)
        ),
    ),
    "add an organization": (
        "add",
        lambda registry, clock: lambda now: registry.add_organization(OPERATOR, "berlin", now),
    ),
}


@pytest.mark.parametrize("action, prepare", AUDITED_WRITES.values(), ids=AUDITED_WRITES)
def test_an_act_and_its_event_stand_together_or_not_at_all(
    action: str, prepare: Prepare, paths: Tuple[str, str], clock: Clock
) -> None:
    registry = open_registry(*paths, clock.ms, credential_ttl=100)
    act = prepare(registry, clock)
    before = snapshot(registry)
    for n in range(1, 60):
        try:
            with faulty(registry, n=n) as connection:
                do(registry, clock, act)
        except hostenroll.StorageUnavailable:
            assert snapshot(registry) == before, n
        else:
            break
    assert not connection.failed and n > 5
    after = snapshot(registry)
    assert after["audit"][:-1] == before["audit"]
    assert after["audit"][-1][2] == action
    others = [name for name in after if name != "audit" and after[name] != before[name]]
    assert others != []
    registry.close()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_credential_counts_and_the_log_says_so_or_neither(
    after: bool, registry: Registry, clock: Clock
) -> None:
    """The first beat with a newer credential is a plain one, and no act with a savepoint."""
    number, credential = came_in(registry, clock)
    newer = plain(registry, credential, clock, serial=2)
    before = snapshot(registry)
    clock.advance(1)
    for n in range(1, 60):
        with faulty(registry, n=n, after=after) as connection:
            outcome = registry.tick([newer], clock.ms) or []
        if outcome == [clock.ms]:
            break
        assert isinstance(outcome[0], hostenroll.StorageUnavailable)
        assert snapshot(registry) == before, n
    assert not connection.failed and n > 5
    assert look(registry, "SELECT action, subject FROM audit")[-1] == (
        "supersede", f"host:{hostenroll.id_text(number)}")  # fmt: skip
    assert look(registry, "SELECT serial, last_seen FROM heartbeat") == [(2, clock.ms)]


def test_two_processes_that_append_at_once_keep_one_chain(
    paths: Tuple[str, str], clock: Clock
) -> None:
    open_registry(*paths, clock.ms).close()
    code = (
        "import sys, hostenroll as h\n"
        "registry = h.open_registry(*sys.argv[1:3], 1)\n"
        "by = h.Principal(sys.argv[3], None, 'admin')\n"
        "for n in range(60):\n"
        "    registry.perform(h.Act(lambda now: registry.mint(by, h.TokenOrder(), now)), n)\n"
        "registry.close()\n"
    )
    command = [sys.executable, "-c", code, *paths]
    running = [
        subprocess.Popen([*command, name], cwd=str(ROOT), stderr=subprocess.PIPE, text=True)
        for name in ("one", "other")
    ]
    ended = [(process.communicate(timeout=60)[1], process.returncode) for process in running]
    assert ended == [("", 0)] * 2
    registry = open_registry(*paths, clock.ms)
    first, last, *_ = do(registry, clock, lambda now: registry.verify_audit(None), False)
    assert (first, last) == (1, 120)
    actors = [actor for (actor,) in look(registry, "SELECT actor FROM audit ORDER BY number")]
    assert actors.count("one") == actors.count("other") == 60
    registry.close()


# 6. Registry


def enrolled(door: Door, name: str = "web-1", **order: Any) -> Any:
    """The document of a host that has just enrolled."""
    reply = door.enroll(door.token(**order), name)
    assert reply.status == 201, reply
    return reply.document


def test_a_host_lives_and_dies(door: Door, clock: Clock) -> None:
    minted = door.mint(labels={"rack": "b4"}).document
    assert (minted["state"], minted["uses"], minted["hosts"]) == ("valid", 0, [])
    host = door.enroll(minted["token"], "web-1", os="linux", dockerVersion="27.1").document
    number, credential = host["hostId"], host["credential"]
    assert host["organizationId"] == "default" and host["name"] == "web-1"
    used = door.show_token(minted["id"]).document
    assert (used["state"], used["uses"], used["hosts"]) == ("used", 1, [number])
    assert used["usedAt"] == hostenroll.rfc3339(clock.ms) and "token" not in used
    shown = door.host(number).document
    assert (shown["status"], shown["lastSeen"]) == ("pending", None)
    assert (shown["os"], shown["architecture"], shown["dockerVersion"]) == ("linux", "", "27.1")
    assert (shown["labels"], shown["tokenId"]) == ({"rack": "b4"}, minted["id"])
    clock.advance(1)
    assert door.beat(credential).document["lastSeen"] == hostenroll.rfc3339(clock.ms)
    assert door.host(number).document["status"] == "online"
    for _ in range(2):
        assert door.revoke(number).document["status"] == "revoked"
        assert door.revoke(number).document["revokedAt"] == hostenroll.rfc3339(clock.ms)
        assert (door.beat(credential).status, door.beat(credential).code) == (403, "host-revoked")
        assert door.beat(credential, os="bsd").code == "host-revoked"
    seen = door.host(number).document
    assert (seen["os"], seen["lastSeen"]) == ("linux", hostenroll.rfc3339(clock.ms))
    for _ in range(2):
        assert door.restore(number).document["status"] == "online"
    assert door.beat(credential).status == 200
    assert door.delete(number).status == 204
    assert [door.delete(number).code, door.host(number).code] == ["not-found"] * 2
    assert (door.beat(credential).status, door.beat(credential).code) == (410, "host-unknown")
    assert door.enroll(minted["token"]).code == "token-used"


def test_a_token_enrolls_exactly_one_host(door: Door) -> None:
    token = door.token()
    assert [door.enroll(token, name).status for name in ("a", "b", "a")] == [201, 401, 401]
    assert door.enroll(token).code == "token-used"


def test_a_token_enrolls_as_many_hosts_as_it_was_minted_for(door: Door) -> None:
    minted = door.mint(maxUses=3).document
    numbers = {door.enroll(minted["token"]).document["hostId"] for _ in range(3)}
    assert len(numbers) == 3
    assert door.enroll(minted["token"]).code == "token-used"
    shown = door.show_token(minted["id"]).document
    assert (shown["uses"], set(shown["hosts"])) == (3, numbers)


@pytest.mark.parametrize("end", ["revoke", "delete"])
def test_a_used_token_stays_used_whatever_becomes_of_the_host(end: str, door: Door) -> None:
    token = door.token()
    number = door.enroll(token, key="k").document["hostId"]
    getattr(door, end)(number)
    assert door.enroll(token).code == "token-used"
    assert door.enroll(token, key="k").code == "token-used"


def test_a_token_has_one_state_and_says_the_strongest(door: Door, clock: Clock) -> None:
    minted = [door.mint(ttlSeconds=60).document for _ in range(4)]
    door.enroll(minted[1]["token"])
    door.revoke_token(minted[2]["id"])
    door.enroll(minted[3]["token"])
    door.revoke_token(minted[3]["id"])
    clock.advance(60)
    shown = [door.show_token(token["id"]).document for token in minted]
    assert [s["state"] for s in shown] == ["expired", "used", "revoked", "revoked"]
    assert [door.enroll(token["token"]).code for token in minted] == [
        f"token-{s['state']}" for s in shown
    ]
    assert door.revoke_token(minted[2]["id"]).status == 204
    assert door.show_token(minted[2]["id"]).document == shown[2]


@pytest.mark.parametrize("late, code", [(59.999, None), (60, "token-expired")])
def test_a_token_lives_to_the_millisecond(
    late: float, code: Optional[str], door: Door, clock: Clock
) -> None:
    token = door.token(ttlSeconds=60)
    clock.now = NOON + late
    assert door.enroll(token).code == code


def _slip(text: str) -> str:
    return text[:-1] + ("0" if text[-1] != "0" else "1")


def _other_secret(text: str) -> str:
    return str(hostenroll.mint_secret("het", int(text[4:20], 16)).text)


REFUSED_ENROLLMENTS: Dict[str, Tuple[Dict[str, Any], Callable[[Door, Any], Reply], str]] = {
    "a slip": ({}, lambda door, t: door.enroll(_slip(t["token"])), "token-unknown"),
    "a guess": ({}, lambda door, t: door.enroll(_other_secret(t["token"])), "token-unknown"),
    "in capitals": ({}, lambda door, t: door.enroll(t["token"].upper()), "token-unknown"),
    "a space": ({}, lambda door, t: door.enroll(t["token"] + " "), "token-unknown"),
    "an API key": ({}, lambda door, t: door.enroll("hak" + t["token"][3:]), "token-unknown"),
    "another host": (
        {"hostname": "db-1"},
        lambda door, t: door.enroll(t["token"], "db-10"),
        "token-host-mismatch",
    ),
}


@pytest.mark.parametrize(
    "order, attempt, code", REFUSED_ENROLLMENTS.values(), ids=REFUSED_ENROLLMENTS
)
def test_a_refused_enrollment_uses_up_nothing(
    order: Dict[str, Any], attempt: Callable[[Door, Any], Reply], code: str, door: Door
) -> None:
    minted = door.mint(**order).document
    before = door.show_token(minted["id"]).document
    assert [attempt(door, minted).code for _ in range(3)] == [code] * 3
    assert door.show_token(minted["id"]).document == before
    assert door.enroll(minted["token"], order.get("hostname", "web-1")).status == 201


def test_a_token_is_not_used_up_by_a_host_that_is_revoked(door: Door) -> None:
    """It is taken before the host is looked at, and given back."""
    number = door.enroll(door.token()).document["hostId"]
    again = door.reenroll(number).document
    door.revoke(number)
    before = door.show_token(again["id"]).document
    assert [door.enroll(again["token"]).code for _ in range(2)] == ["host-revoked"] * 2
    assert door.show_token(again["id"]).document == before
    door.restore(number)
    assert door.enroll(again["token"]).document["hostId"] == number


def test_why_a_token_is_refused_is_told_only_to_who_has_its_secret(door: Door) -> None:
    minted = door.mint().document
    door.revoke_token(minted["id"])
    assert door.enroll(minted["token"]).code == "token-revoked"
    assert door.enroll(_other_secret(minted["token"])).code == "token-unknown"


@pytest.mark.parametrize("name", ["db-1.lan", "DB-1.LAN", "db-1.lan.", "Db-1.Lan."])
def test_a_bound_hostname_is_compared_as_dns_does(name: str, door: Door) -> None:
    for bound in ("Db-1.lan", "db-1.LAN."):
        assert door.enroll(door.token(hostname=bound), name).status == 201


def test_a_beat_changes_facts_but_never_a_bound_hostname(door: Door) -> None:
    free, bound = enrolled(door), enrolled(door, "db-1", hostname="db-1")
    for host, hostname in ((free, "new"), (bound, "db-1")):
        facts = {"hostname": "new", "os": "linux", "architecture": "arm64", "dockerVersion": "1"}
        assert door.beat(host["credential"], **facts).status == 200
        shown = door.host(host["hostId"]).document
        assert {name: shown[name] for name in facts} == {**facts, "hostname": hostname}
        assert shown["name"] == host["name"]
        assert door.beat(host["credential"], os="").status == 200
        assert door.host(host["hostId"]).document["os"] == ""


def test_a_host_has_the_name_that_it_gives_or_its_hostname(door: Door) -> None:
    assert door.enroll(door.token(), "web-1").document["name"] == "web-1"
    assert door.enroll(door.token(), "web-1", name="Front").document["name"] == "Front"


def test_a_re_enrolled_host_is_the_same_host(door: Door, clock: Clock) -> None:
    host = enrolled(door, labels={"a": "1"})
    door.beat(host["credential"])
    before = door.host(host["hostId"]).document
    clock.advance(5)
    minted = door.reenroll(host["hostId"]).document
    assert (minted["hostId"], minted["maxUses"]) == (host["hostId"], 1)
    again = door.enroll(minted["token"], "web-9", name="other").document
    assert (again["hostId"], again["name"]) == (host["hostId"], "web-1")
    after = door.host(host["hostId"]).document
    assert after == {**before, **{k: after[k] for k in ("hostname", "statusReason")}}
    assert after["hostname"] == "web-9"
    assert door.show_token(before["tokenId"]).document["hosts"] == [host["hostId"]]
    assert door.show_token(minted["id"]).document["hosts"] == [host["hostId"]]
    # The old credential is good until the new one is first used, and not longer.
    assert door.beat(host["credential"]).status == 200
    assert door.beat(again["credential"]).status == 200
    assert door.beat(host["credential"]).code == "credential-superseded"
    assert door.enroll(minted["token"]).code == "token-used"


def test_a_revoked_host_does_not_re_enroll_and_a_deleted_one_has_no_token(door: Door) -> None:
    host = enrolled(door)
    minted = door.reenroll(host["hostId"]).document
    door.revoke(host["hostId"])
    assert door.enroll(minted["token"]).code == "host-revoked"
    assert door.show_token(minted["id"]).document["uses"] == 0
    door.delete(host["hostId"])
    assert door.show_token(minted["id"]).document["state"] == "revoked"
    assert door.enroll(minted["token"]).code == "token-revoked"
    assert door.reenroll(host["hostId"]).code == "not-found"


def test_a_lost_reply_can_be_asked_for_again(door: Door) -> None:
    minted = door.mint().document
    first = door.enroll(minted["token"], "web-1", "k", os="linux").document
    again = door.enroll(minted["token"], "other", "k", os="bsd", name="x").document
    assert (again["hostId"], again["name"]) == (first["hostId"], "web-1")
    assert again["credential"] != first["credential"]
    shown = door.host(first["hostId"]).document
    assert (shown["hostname"], shown["os"]) == ("web-1", "linux")
    assert door.show_token(minted["id"]).document["uses"] == 1
    assert door.enroll(minted["token"], key="other").code == "token-used"
    assert door.enroll(minted["token"]).code == "token-used"
    assert door.beat(first["credential"]).status == 200
    assert door.beat(again["credential"]).status == 200
    assert door.beat(first["credential"]).code == "credential-superseded"


DAY_MS = 86_400_000
REPLAYS: Dict[str, Tuple[Callable[[Door, Clock, Any, Any], Any], Optional[str]]] = {
    "at once": (lambda door, clock, token, host: None, None),
    "after a day": (lambda door, clock, token, host: clock.advance(DAY_MS / 1000), None),
    "after a day and 1 ms": (
        lambda door, clock, token, host: clock.advance(DAY_MS / 1000 + 0.001),
        "token-used",
    ),
    "after the token's hour": (lambda door, clock, token, host: clock.advance(3601), None),
    "after a beat": (lambda door, clock, token, host: door.beat(host["credential"]), "token-used"),
    "token revoked": (lambda door, clock, token, host: door.revoke_token(token), "token-revoked"),
    "host revoked": (lambda door, clock, token, host: door.revoke(host["hostId"]), "token-used"),
    "host deleted": (lambda door, clock, token, host: door.delete(host["hostId"]), "token-used"),
}


@pytest.mark.parametrize("between, code", REPLAYS.values(), ids=REPLAYS)
def test_a_replay_is_answered_until_the_first_beat_for_a_day(
    between: Callable[..., Any], code: Optional[str], door: Door, clock: Clock
) -> None:
    minted = door.mint().document
    host = door.enroll(minted["token"], key="k").document
    between(door, clock, minted["id"], host)
    reply = door.enroll(minted["token"], key="k")
    assert reply.code == code
    assert code or reply.document["hostId"] == host["hostId"]


def test_each_host_of_a_token_has_its_own_replays(door: Door) -> None:
    minted = door.mint(maxUses=3).document
    a, b = (door.enroll(minted["token"], key=key).document["hostId"] for key in "ab")
    assert a != b
    again = door.enroll(minted["token"], key="a").document
    assert (again["hostId"], door.show_token(minted["id"]).document["uses"]) == (a, 2)
    door.beat(again["credential"])
    # A key is one request for ever: it never lets in a second host.
    assert door.enroll(minted["token"], key="a").code == "token-used"
    assert door.show_token(minted["id"]).document["uses"] == 2
    assert door.enroll(minted["token"], key="c").status == 201
    assert door.enroll(minted["token"], key="d").code == "token-used"


def test_a_replay_of_a_re_enrollment_is_one_too(door: Door) -> None:
    host = enrolled(door)
    door.beat(host["credential"])
    token = door.reenroll(host["hostId"]).document["token"]
    first, again = (door.enroll(token, key="k").document for _ in range(2))
    assert first["hostId"] == again["hostId"] == host["hostId"]
    assert door.beat(host["credential"]).status == 200  # not the beat that ends it
    assert door.enroll(token, key="k").status == 201
    assert door.beat(again["credential"]).status == 200
    assert door.enroll(token, key="k").code == "token-used"


def test_the_serials_of_a_host(registry: Registry, clock: Clock) -> None:
    """Enrollment 1, a replay one more, a re-enrollment more than can have been lost."""
    arrival = hostenroll.Applicant(token_of(registry, clock), "web-1", idempotency_key="k")

    def enroll(arrival: Any) -> Any:
        return do(registry, clock, lambda now: registry.enroll(arrival, now))

    serials = [serial_of(registry, enroll(arrival).grant.credential) for _ in range(3)]
    assert serials == [1, 2, 3]
    number = look(registry, "SELECT id FROM host")[0][0]
    order = hostenroll.TokenOrder()
    text = do(registry, clock, lambda now: registry.reenroll(OPERATOR, number, order, now))[1]
    again = enroll(hostenroll.Applicant(text, "web-1"))
    assert serial_of(registry, again.grant.credential) == 3 + hostenroll.SERIALS_LOST + 1


@contextlib.contextmanager
def opened(paths: Tuple[str, str], clock: Clock, **options: Any) -> Iterator[Registry]:
    registry = open_registry(*paths, clock.ms, **options)
    try:
        yield registry
    finally:
        registry.close()


def test_each_renewal_is_a_serial_of_its_own_and_the_first_to_be_used_counts(
    paths: Tuple[str, str], clock: Clock
) -> None:
    with opened(paths, clock, credential_ttl=300) as registry:
        number, old = came_in(registry, clock)
        clock.advance(201)
        renewals = [beat(registry, clock, old).grant.credential for _ in range(3)]
        assert [serial_of(registry, new) for new in renewals] == [2, 3, 4]
        assert beat(registry, clock, renewals[1]).grant is None
        for older in (old, renewals[0]):
            with pytest.raises(hostenroll.CredentialSuperseded):
                beat(registry, clock, older)
        clock.advance(201)
        third = beat(registry, clock, renewals[1]).grant.credential
        assert serial_of(registry, third) == 5
        # Whoever holds an old copy cannot renew past a re-enrollment.
        order = hostenroll.TokenOrder()
        text = do(registry, clock, lambda now: registry.reenroll(OPERATOR, number, order, now))[1]
        arrival = hostenroll.Applicant(text, "web-1")
        newest = do(registry, clock, lambda now: registry.enroll(arrival, now)).grant.credential
        assert serial_of(registry, newest) == 5 + hostenroll.SERIALS_LOST + 1
        clock.advance(201)
        for copy in (renewals[1], third):
            assert beat(registry, clock, copy).grant is None
        renewed = serial_of(registry, beat(registry, clock, newest).grant.credential)
        assert renewed == 5 + hostenroll.SERIALS_LOST + 2
        with pytest.raises(hostenroll.CredentialSuperseded):
            beat(registry, clock, third)


def test_a_copy_that_beats_and_renews_beside_the_original_is_seen(
    paths: Tuple[str, str], clock: Clock
) -> None:
    """Also when both renew before either has used what it got."""
    with opened(paths, clock, credential_ttl=300) as registry:
        _, credential = came_in(registry, clock)
        held = {"host": credential, "thief": credential}
        refused: List[str] = []
        while not refused:
            clock.advance(30)
            for who in held:
                try:
                    grant = beat(registry, clock, held[who]).grant
                except hostenroll.CredentialSuperseded:
                    refused.append(who)
                else:
                    held[who] = grant.credential if grant else held[who]
        assert clock.now <= NOON + 300
        assert look(registry, "SELECT count(*) FROM audit WHERE code = ?", "credential-superseded")


def test_a_host_may_renew_whichever_of_its_enrollments_replies_it_got(
    paths: Tuple[str, str], clock: Clock
) -> None:
    with opened(paths, clock, credential_ttl=300) as registry:
        text = token_of(registry, clock)
        arrival = hostenroll.Applicant(text, "web-1", idempotency_key="k")
        replies = [
            do(registry, clock, lambda now: registry.enroll(arrival, now)).grant for _ in range(3)
        ]
        clock.advance(201)
        renewed = beat(registry, clock, replies[0].credential).grant
        assert renewed is not None and serial_of(registry, renewed.credential) == 4


def test_a_re_enrollment_outdoes_what_was_issued_after_the_backup_that_was_restored(
    paths: Tuple[str, str], clock: Clock, tmp_path: Path
) -> None:
    """The thief of a copy goes on with it, and a re-enrollment is the cure."""
    with opened(paths, clock, credential_ttl=300) as registry:
        number, credential = came_in(registry, clock)
        (tmp_path / "backup").mkdir()
        copies = registry.back_up(str(tmp_path / "backup"))
        for _ in range(5):
            clock.advance(250)
            credential = beat(registry, clock, credential).grant.credential
            beat(registry, clock, credential)
    restored(paths, copies)
    with opened(paths, clock, credential_ttl=300) as registry:
        order = hostenroll.TokenOrder()
        text = do(registry, clock, lambda now: registry.reenroll(OPERATOR, number, order, now))[1]
        arrival = hostenroll.Applicant(text, "web-1")
        fresh = do(registry, clock, lambda now: registry.enroll(arrival, now)).grant.credential
        beat(registry, clock, fresh)
        with pytest.raises(hostenroll.CredentialSuperseded):
            beat(registry, clock, credential)
        beat(registry, clock, fresh)


def test_a_forged_serial_cannot_shut_a_host_out_for_good(registry: Registry, clock: Clock) -> None:
    """Who has had the key file can sign any: a re-enrollment must be able to outdo it."""
    number, credential = came_in(registry, clock)
    claims = registry.authenticate(credential, clock.ms)
    far = claims._replace(serial=1 + hostenroll.SERIALS_LOST)
    beat(registry, clock, registry.keyring.first.sign(far))  # after a restored backup it may be
    too_far = claims._replace(serial=999_999_999_999)
    with pytest.raises(hostenroll.CredentialInvalid):
        beat(registry, clock, registry.keyring.first.sign(too_far))
    order = hostenroll.TokenOrder()
    text = do(registry, clock, lambda now: registry.reenroll(OPERATOR, number, order, now))[1]
    arrival = hostenroll.Applicant(text, "web-1")
    newest = do(registry, clock, lambda now: registry.enroll(arrival, now)).grant.credential
    beat(registry, clock, newest)


GRACE = 7 * 86400
AGES = {
    "two thirds": (200, "beats"),
    "1 ms more": (200.001, "renews"),
    "at its end": (300, "renews"),
    "7 days on": (300 + GRACE, "renews"),
    "7 days and 1 ms": (300 + GRACE + 0.001, "expired"),
}


@pytest.mark.parametrize("age, outcome", AGES.values(), ids=AGES)
def test_a_credential_is_renewed_in_its_last_third_and_for_a_week_after(
    age: float, outcome: str, paths: Tuple[str, str], clock: Clock
) -> None:
    with opened(paths, clock, credential_ttl=300) as registry:
        _, credential = came_in(registry, clock)
        clock.now = NOON + age
        if outcome == "expired":
            with pytest.raises(hostenroll.CredentialExpired):
                beat(registry, clock, credential)
            assert look(registry, "SELECT last_seen FROM heartbeat") == [(0,)]
            return
        beaten = beat(registry, clock, credential)
        assert beaten.last_seen == clock.ms
        assert (beaten.grant is not None) == (outcome == "renews")
        if beaten.grant is not None:
            assert beaten.grant.expires_at == clock.ms // 1000 + 300


TTLS = {
    "none to one": (None, 300, 0, True, True),
    "shorter": (600, 300, 0, True, True),
    "the same": (300, 300, 0, False, None),
    "longer": (300, 600, 0, False, None),
    "longer, in the last third": (300, 600, 201, True, True),
    "one to none": (300, None, 0, False, None),
    "one to none, in the last third": (300, None, 201, True, False),
    "none at all": (None, None, 10 * GRACE, False, None),
}


@pytest.mark.parametrize("before, now, age, renews, expires", TTLS.values(), ids=TTLS)
def test_another_lifetime_reaches_the_fleet_by_renewal(
    before: Optional[int],
    now: Optional[int],
    age: float,
    renews: bool,
    expires: Optional[bool],
    paths: Tuple[str, str],
    clock: Clock,
) -> None:
    with opened(paths, clock, credential_ttl=before) as registry:
        _, credential = came_in(registry, clock)
    clock.advance(age)
    with opened(paths, clock, credential_ttl=now) as registry:
        grant = beat(registry, clock, credential).grant
        assert (grant is not None) == renews
        if grant is not None:
            assert (grant.expires_at is not None) == expires
            assert beat(registry, clock, grant.credential).grant is None


def test_a_rotated_key_empties_by_itself(paths: Tuple[str, str], clock: Clock) -> None:
    with opened(paths, clock) as registry:
        _, old = came_in(registry, clock)
        beat(registry, clock, old)
    keyring = hostenroll.load_keyring(paths[1])
    new_key = hostenroll.SigningKey("new", b"n" * 32)
    both = hostenroll.Keyring([new_key, *keyring.keys], keyring.audit_key)
    hostenroll.write_key_file(paths[1], both)
    last_used = "SELECT kid FROM heartbeat JOIN signing_key ON number = key_number"
    with opened(paths, clock) as registry:
        renewed = beat(registry, clock, old).grant.credential
        assert registry.authenticate(renewed, clock.ms).kid == "new"
        assert look(registry, last_used) == [(keyring.first.kid,)]
        assert beat(registry, clock, renewed).grant is None
        assert look(registry, last_used) == [("new",)]
        unused = came_in(registry, clock)[1]
        assert registry.authenticate(unused, clock.ms).kid == "new"
    hostenroll.write_key_file(paths[1], hostenroll.Keyring([new_key], keyring.audit_key))
    with opened(paths, clock) as registry:
        assert beat(registry, clock, renewed).grant is None
        with pytest.raises(hostenroll.CredentialInvalid):
            beat(registry, clock, old)


def test_last_seen_never_goes_back(door: Door, clock: Clock) -> None:
    host = enrolled(door)
    clock.advance(100)
    latest = door.beat(host["credential"]).document["lastSeen"]
    for facts in ({}, {"os": "linux"}, {}):
        clock.advance(-30)
        assert door.beat(host["credential"], **facts).document["lastSeen"] == latest
        shown = door.host(host["hostId"]).document
        assert (shown["lastSeen"], shown["status"]) == (latest, "online")
    clock.now = NOON + 100.001
    assert door.beat(host["credential"]).document["lastSeen"] > latest


def host_at(**columns: Any) -> Any:
    """A host as a row, seen at NOON unless told."""
    row = dict.fromkeys(hostenroll.Host._fields, 0)
    row.update(revoked_at=None, last_seen=int(NOON * 1000), **columns)
    return hostenroll.Host(**row)


WEEK_MS = 7 * DAY_MS
STATUS_BY_SILENCE = [
    (-5_000, "online"),
    (0, "online"),
    (99_999, "online"),
    (100_000, "online"),
    (100_001, "offline"),
    (WEEK_MS - 1, "offline"),
    (WEEK_MS, "offline"),
    (WEEK_MS + 1, "missing"),
]


def status_at(
    host: hostenroll.Host, service: Optional[hostenroll.Service], now: int
) -> Tuple[str, str]:
    return hostenroll.host_status(host, hostenroll.watched(service, now))


@pytest.mark.parametrize("silence, status", STATUS_BY_SILENCE)
def test_status_comes_of_silence_to_the_millisecond(silence: int, status: str) -> None:
    noon = int(NOON * 1000)
    assert status_at(host_at(), None, noon + silence)[0] == status
    service = hostenroll.Service(noon - 1, noon + silence, noon - 1, 30, "")
    assert status_at(host_at(), service, noon + silence)[0] == status
    revoked = host_at()._replace(revoked_at=noon)
    assert status_at(revoked, service, noon + silence)[0] == "revoked"
    never = host_at()._replace(last_seen=0)
    assert status_at(never, service, noon + silence)[0] == "pending"


@pytest.mark.parametrize("interval, silence", [(1, 13), (30, 100), (3600, 10810)])
def test_online_is_three_intervals_and_ten_seconds(interval: int, silence: int) -> None:
    noon = int(NOON * 1000)
    for late, status in ((0, "online"), (1, "offline")):
        now = noon + silence * 1000 + late
        service = hostenroll.Service(noon - 1, now, noon - 1, interval, "")
        assert status_at(host_at(), service, now)[0] == status


def test_the_reason_is_a_sentence_with_the_numbers() -> None:
    noon = int(NOON * 1000)
    said = {s: status_at(host_at(), None, noon + s)[1] for s in (95_000, 150_000)}
    assert said[95_000] == "last seen 95 s ago, within 3 x 30 s + 10 s"
    assert said[150_000] == "last seen 150 s ago, more than 3 x 30 s + 10 s"
    assert status_at(host_at(), None, noon + 8 * DAY_MS)[1].startswith("last seen 8 d")
    revoked = status_at(host_at()._replace(revoked_at=noon), None, noon)[1]
    assert revoked == f"revoked at {hostenroll.rfc3339(noon)}"


def status_of(registry: Registry, clock: Clock, number: int) -> str:
    return str(do(registry, clock, lambda now: registry.host(OPERATOR, number, now), False).status)


def live_on(registry: Registry, clock: Clock, seconds: float) -> None:
    """A server lives for so long, and says so as one does."""
    for _ in range(int(seconds // 10)):
        clock.advance(10)
        do(registry, clock, registry.keep_alive)
    clock.advance(seconds % 10)
    do(registry, clock, registry.keep_alive)


def test_the_servers_own_downtime_is_nobodys_silence(registry: Registry, clock: Clock) -> None:
    start = lambda now: registry.start_service("http://here", now)  # noqa: E731
    do(registry, clock, start)
    number, credential = came_in(registry, clock)
    live_on(registry, clock, 200)  # long enough to have heard every host
    beat(registry, clock, credential)
    live_on(registry, clock, 60)
    clock.advance(3600)  # no server: to whoever asks, it is as it was
    assert status_of(registry, clock, number) == "online"
    do(registry, clock, start)
    assert status_of(registry, clock, number) == "online"  # 60 s of silence
    for seconds, status in ((40, "online"), (0.0015, "offline")):
        live_on(registry, clock, seconds)
        assert status_of(registry, clock, number) == status
    beat(registry, clock, credential)  # after the pause, which is no longer counted
    for seconds, status in ((100, "online"), (0.0015, "offline")):
        live_on(registry, clock, seconds)
        assert status_of(registry, clock, number) == status


def test_a_second_server_beside_a_living_one_makes_no_pause(
    registry: Registry, paths: Tuple[str, str], clock: Clock
) -> None:
    do(registry, clock, lambda now: registry.start_service("http://one", now))
    number, credential = came_in(registry, clock)
    beat(registry, clock, credential)
    for _ in range(11):
        clock.advance(10)
        do(registry, clock, registry.keep_alive)
        with opened(paths, clock, interval=30) as second:
            do(second, clock, lambda now: second.start_service("http://two", now))
    assert status_of(registry, clock, number) == "offline"
    assert do(registry, clock, lambda now: registry.service().public_url, False) == "http://two"
    clock.advance(-5)
    do(registry, clock, registry.keep_alive)
    assert look(registry, "SELECT alive FROM service") == [(int(NOON + 110) * 1000,)]


STEPS = {
    "hours ahead": [5 * 3600],
    "hours back": [-5 * 3600],
    "ahead and back": [5 * 3600, -5 * 3600],
    "back and ahead": [-5 * 3600, 5 * 3600],
    "years ahead and back": [9e8, -9e8],
    "before there were ids": [-NOON + 60],
}


@pytest.mark.parametrize("after", [30, 400], ids=["at once", "later"])
@pytest.mark.parametrize("steps", table(STEPS))
def test_a_clock_that_is_set_makes_nobody_silent_and_hides_nobodys_silence(
    steps: List[float], after: float, registry: Registry, clock: Clock, caplog: Any
) -> None:
    caplog.set_level(logging.WARNING)
    do(registry, clock, lambda now: registry.start_service("http://here", now))
    alive, credential = came_in(registry, clock, "alive")
    dies, last = came_in(registry, clock, "dies")
    dead, first = came_in(registry, clock, "dead")
    numbers = [alive, dies, dead]

    def statuses() -> List[str]:
        listed = [status_of(registry, clock, number) for number in numbers]
        query = hostenroll.HostQuery()
        page = do(registry, clock, lambda now: registry.hosts(OPERATOR, query, now), False)
        assert sorted(view.status for view in page.items) == sorted(listed)
        census = do(registry, clock, lambda now: registry.census(OPERATOR, now), False)
        assert sorted(status for _, status in census.counts.elements()) == sorted(listed)
        return listed

    beat(registry, clock, first)
    live_on(registry, clock, 300)
    beat(registry, clock, credential)
    beat(registry, clock, last)
    for n, step in enumerate(steps):
        heard = 1 if n and after > 100 else 2  # of late
        live_on(registry, clock, 10)
        clock.advance(step)
        assert set(statuses()[:heard]) == {"online"}  # before the server has noticed, too
        live_on(registry, clock, 5)
        assert set(statuses()[:heard]) == {"online"}
        live_on(registry, clock, after)
        beaten = beat(registry, clock, credential)
        assert beaten.last_seen == clock.ms
        assert statuses()[0] == "online"
    for _ in range(12):
        live_on(registry, clock, 10)
        beat(registry, clock, credential)
    assert statuses() == ["online", "offline", "offline"]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(steps) and all("the clock was set" in line for line in said)


def test_a_dead_host_is_not_taken_for_alive_because_the_clock_was_set_back(
    registry: Registry, clock: Clock
) -> None:
    do(registry, clock, lambda now: registry.start_service("http://here", now))
    number, credential = came_in(registry, clock)
    beat(registry, clock, credential)
    live_on(registry, clock, 3600)
    assert status_of(registry, clock, number) == "offline"
    clock.advance(-5 * 3600)
    assert status_of(registry, clock, number) == "offline"
    live_on(registry, clock, 5)
    view = do(registry, clock, lambda now: registry.host(OPERATOR, number, now), False)
    assert view.status == "offline"
    assert view.reason == (
        "last seen at 2027-01-15T08:00:00.000Z: the clock has gone back 60 min ago or more, more "
        "than 3 x 30 s + 10 s"
    )


@pytest.mark.parametrize("step", [5 * 3600, -5 * 3600, -NOON + 60], ids=["ahead", "back", "1970"])
def test_a_clock_that_is_set_breaks_no_ids_tokens_credentials_or_log(
    step: float, paths: Tuple[str, str], clock: Clock
) -> None:
    ttl = 3600 if step > -DAY_MS else None  # what expires in 1970 has expired
    with opened(paths, clock, credential_ttl=ttl) as registry:
        number, credential = came_in(registry, clock)
        beat(registry, clock, credential)
        text = token_of(registry, clock, ttl=86400)
        clock.advance(step)
        renewed = beat(registry, clock, credential)
        assert renewed.last_seen == clock.ms
        assert (renewed.grant is None) == (step < 0)
        fresh = [came_in(registry, clock, f"web-{n}") for n in range(50)]
        assert len({it for it, _ in fresh} | {number}) == 51
        arrival = hostenroll.Applicant(text, "web-1")
        assert do(registry, clock, lambda now: registry.enroll(arrival, now))
        clock.advance(-step)
        for _, it in fresh:
            assert beat(registry, clock, it).last_seen >= clock.ms
        found = do(registry, clock, lambda now: registry.verify_audit(None), False)
        assert found[1] == len(look(registry, "SELECT 1 FROM audit"))


def test_hosts_are_not_silent_while_nothing_could_be_written(
    registry: Registry, clock: Clock
) -> None:
    """A full disk for an hour is a pause as a stopped server is."""
    do(registry, clock, lambda now: registry.start_service("http://here", now))
    number, credential = came_in(registry, clock)
    live_on(registry, clock, 300)
    beat(registry, clock, credential)
    live_on(registry, clock, 10)
    for _ in range(360):
        clock.advance(10)
        with faulty(registry, only="BEGIN IMMEDIATE"):
            with pytest.raises(hostenroll.StorageUnavailable):
                do(registry, clock, registry.keep_alive)
    assert status_of(registry, clock, number) == "online"
    live_on(registry, clock, 5)
    assert status_of(registry, clock, number) == "online"
    live_on(registry, clock, 101)
    assert status_of(registry, clock, number) == "offline"


ALICE = Principal("alice", "a-team", "admin")
BOB = Principal("bob", "b-team", "admin")
BY_HOST = ("host", "revoke_host", "restore_host", "delete_host")


@pytest.fixture
def teams(registry: Registry, clock: Clock) -> Registry:
    for name in ("a-team", "b-team"):
        do(registry, clock, lambda now, name=name: registry.add_organization(OPERATOR, name, now))
    return registry


def test_an_organization_is_a_wall(teams: Registry, clock: Clock) -> None:
    """What is another's is refused as what does not exist is, word for word."""
    token, text = do(teams, clock, lambda now: teams.mint(ALICE, hostenroll.TokenOrder(), now))
    assert token.token.organization_id == "a-team"
    arrival = hostenroll.Applicant(text, "web-1")
    number = do(teams, clock, lambda now: teams.enroll(arrival, now)).host.id
    order = hostenroll.TokenOrder()
    on_host: List[Callable[[Principal, int, int], Any]] = [
        *(getattr(teams, name) for name in BY_HOST),
        lambda by, number, now: teams.reenroll(by, number, order, now),
        lambda by, number, now: teams.edit_host(by, number, {"name": "mine"}, now),
    ]
    before = snapshot(teams)
    for methods, there in ((on_host, number), ([teams.token, teams.revoke_token], token.token.id)):
        for method in methods:
            said = []
            for asked in (there, there + 1, -1):
                with pytest.raises(hostenroll.NotFound) as caught:
                    do(teams, clock, lambda now, m=method, n=asked: m(BOB, n, now))
                said.append(caught.value.document())
            assert said[0] == said[1] == said[2]
    for by, organization in ((BOB, "a-team"), (BOB, "no-team"), (OPERATOR, "no-team")):
        elsewhere = hostenroll.TokenOrder(organization=organization)
        kinds = (hostenroll.InvalidBody, hostenroll.InvalidQuery)
        kinds = (hostenroll.NotFound,) * 2 if by is BOB else kinds
        with pytest.raises(kinds[0]) as refused:
            do(teams, clock, lambda now, by=by, o=elsewhere: teams.mint(by, o, now))
        assert by is BOB or refused.value.errors[0].field == "organizationId"
        for listing, query in (
            (teams.hosts, hostenroll.HostQuery(organization=organization)),
            (teams.tokens, hostenroll.TokenQuery(organization=organization)),
        ):
            with pytest.raises(kinds[1]):
                do(teams, clock, lambda now, by=by, li=listing, q=query: li(by, q, now))
    assert snapshot(teams) == before
    for by, count in ((ALICE, 1), (BOB, 0), (OPERATOR, 1)):
        hosts = do(teams, clock, lambda now, by=by: teams.hosts(by, hostenroll.HostQuery(), now))
        tokens = do(teams, clock, lambda now, by=by: teams.tokens(by, hostenroll.TokenQuery(), now))
        assert (len(hosts.items), len(tokens.items)) == (count, count)
    assert do(teams, clock, lambda now: teams.host(ALICE, number, now)).status == "pending"
    with pytest.raises(hostenroll.Conflict):
        do(teams, clock, lambda now: teams.add_organization(OPERATOR, "a-team", now))


def test_an_api_key_is_good_until_it_is_revoked(teams: Registry, clock: Clock) -> None:
    text = make_api_key(teams, clock, "a-team", "viewer")
    by = do(teams, clock, lambda now: teams.identify(text, "", "", now), False)
    assert (by.organization, by.role, by.name) == ("a-team", "viewer", f"api-key:{by.id}")
    guess = str(hostenroll.mint_secret("hak", int(by.id, 16)).text)
    number = int(by.id, 16)
    for wrong in ("", "hak_", text + "0", text.upper(), "het" + text[3:], guess):
        with pytest.raises(hostenroll.ApiKeyInvalid):
            do(teams, clock, lambda now, wrong=wrong: teams.identify(wrong, "", "", now), False)
    for _ in range(2):
        do(teams, clock, lambda now: teams.revoke_api_key(OPERATOR, number, now))
        with pytest.raises(hostenroll.ApiKeyInvalid):
            do(teams, clock, lambda now: teams.identify(text, "", "", now), False)
        clock.advance(1)
    assert do(teams, clock, lambda now: teams.api_keys())[0].revoked_at == int(NOON * 1000)
    with pytest.raises(hostenroll.NotFound):
        do(teams, clock, lambda now: teams.revoke_api_key(OPERATOR, number + 1, now))
    with pytest.raises(hostenroll.InvalidBody):
        make_api_key(teams, clock, "no-team")


def pages(registry: Registry, clock: Clock, listing: str, query: Any) -> List[Any]:
    """Every page of a list."""
    found = []
    while True:
        page = do(
            registry,
            clock,
            lambda now, q=query: getattr(registry, listing)(OPERATOR, q, now),
            False,
        )
        found.append(page)
        if page.next is None:
            return found
        assert page.next < query.before, "a list that never ends"
        query = query._replace(before=page.next)


def ids(found: List[Any]) -> List[int]:
    return [item[0].id for page in found for item in page.items]


def fill(registry: Registry, count: int, token: int = 1, organization: str = "default") -> None:
    """Hosts by SQL, a millisecond each: the n-th has the id (n << 8)."""
    connection = connection_of(registry)
    connection.execute("BEGIN")
    connection.executemany(
        f"""INSERT INTO host VALUES (?, '{organization}', 'web', 'web.lan', 0, '', '', '',
            '{{"a": "1"}}', 1, 0, NULL, {token}, {token}, 0, 1, NULL, '', NULL)""",
        ((n << 8,) for n in range(1, count + 1)),
    )
    connection.executemany(
        "INSERT INTO heartbeat VALUES (?, 0, 1, 1, 1)", ((n << 8,) for n in range(1, count + 1))
    )
    connection.execute("COMMIT")


@pytest.mark.parametrize("limit", [1, 7, 40, 100])
def test_a_list_has_everything_once_the_newest_first(
    limit: int, teams: Registry, clock: Clock
) -> None:
    chance = random.Random(limit)
    made = []
    for n in range(40):
        organization = chance.choice(["default", "a-team"])
        number, credential = came_in(teams, clock, f"web-{n}", organization=organization)
        if chance.random() < 0.5:
            beat(teams, clock, credential)
        made.append((number, organization))
        clock.advance(chance.choice([1, 2]))
    newest = [number for number, _ in reversed(made)]
    found = pages(teams, clock, "hosts", hostenroll.HostQuery(limit=limit))
    assert ids(found) == newest
    assert {len(page.items) for page in found[:-1]} <= {limit} and found[-1].items
    tokens = ids(pages(teams, clock, "tokens", hostenroll.TokenQuery(limit=limit)))
    assert len(set(tokens)) == 40 and tokens == sorted(tokens, reverse=True)
    for organization in ("default", "a-team"):
        own = [number for number, whose in reversed(made) if whose == organization]
        for status in ("online", "pending"):
            query = hostenroll.HostQuery(organization, status, limit=limit)
            other = query._replace(status="pending" if status == "online" else "online")
            both = ids(pages(teams, clock, "hosts", query))
            both += ids(pages(teams, clock, "hosts", other))
            assert sorted(both, reverse=True) == own
    query = hostenroll.TokenQuery(state="used", limit=limit)
    assert ids(pages(teams, clock, "tokens", query)) == tokens


FILTERS: Dict[str, Tuple[Dict[str, Any], List[str]]] = {
    "a status": ({"status": "revoked"}, ["c"]),
    "a label": ({"labels": [("k", "1")]}, ["b", "a"]),
    "two labels": ({"labels": [("k", "1"), ("m", "x y")]}, ["b"]),
    "a label of another value": ({"labels": [("k", "2")]}, []),
    "a part of the name": ({"text": "ALPH"}, ["a"]),
    "a part of the hostname": ({"text": ".lan"}, ["c", "b", "a"]),
    "what spans name and hostname": ({"text": "alphaa.lan"}, []),
    "a label and a text": ({"labels": [("k", "1")], "text": "b.lan"}, ["b"]),
    "an SQL wildcard": ({"text": "%"}, []),
}


@pytest.mark.parametrize("query, expected", FILTERS.values(), ids=FILTERS)
def test_a_filter_finds_what_it_says(
    query: Dict[str, Any], expected: List[str], registry: Registry, clock: Clock
) -> None:
    for name, labels in (("a", {"k": "1"}), ("b", {"k": "1", "m": "x y"}), ("c", {})):
        number, _ = came_in(registry, clock, f"{name}.lan", labels=labels)
        if name == "a":
            change = hostenroll.partial(registry.edit_host, OPERATOR, number, {"name": "alpha"})
            do(registry, clock, change)
        if name == "c":
            do(registry, clock, hostenroll.partial(registry.revoke_host, OPERATOR, number))
        clock.advance(1)
    found = pages(registry, clock, "hosts", hostenroll.HostQuery(**query))
    assert [view.host.hostname[0] for page in found for view in page.items] == expected


# What a label's value may have in it to look like other labels, kept with white space or without.
ODD_PARTS = (
    '"',
    "\\",
    ": ",
    ", ",
    ":",
    ",",
    "}",
    "a",
    '"a":"',
    '", "b": "',
    "\u00fc",
    "\U0001f600",
)


def odd_text(chance: random.Random) -> str:
    return "".join(chance.choices(ODD_PARTS, k=chance.randrange(5)))


def test_a_label_is_found_by_the_whole_of_it_and_however_it_is_kept(
    registry: Registry, clock: Clock
) -> None:
    chance = random.Random(3)
    fill(registry, hostenroll.SLICE)
    for _ in range(100):
        pairs = {chance.choice("abc"): odd_text(chance) for _ in range(chance.randrange(4))}
        kept = chance.choice([json.dumps(pairs), hostenroll.json_text(pairs)])
        connection_of(registry).execute("UPDATE host SET labels = ?", (kept,))
        assert hostenroll.compact(kept) == hostenroll.json_text(pairs)
        sought = [*pairs.items(), *((name, odd_text(chance)) for name in "abc")]
        for wanted in [*([pair] for pair in sought), sought[:2], sought[-2:]]:
            query = hostenroll.HostQuery(labels=wanted)
            page = do(registry, clock, lambda now, q=query: registry.hosts(OPERATOR, q, now), False)
            assert bool(page.items) == (set(wanted) <= set(pairs.items())), (kept, wanted)


def test_a_list_shows_of_a_host_what_it_is_shown_as_by_itself(
    teams: Registry, clock: Clock
) -> None:
    for n, hostname in enumerate(("web-1", "web-1", "web-2", "web-3")):
        number, credential = came_in(teams, clock, hostname, labels={"n": f"{n}"})
        if n < 3:
            beat(teams, clock, credential)
        if n == 2:
            do(teams, clock, lambda now: teams.revoke_host(OPERATOR, number, now))
        clock.advance(30)
    found = [view for page in pages(teams, clock, "hosts", hostenroll.HostQuery())
             for view in page.items]  # fmt: skip
    assert {view.status for view in found} == {"online", "offline", "revoked", "pending"}
    assert [bool(view.warnings) for view in found] == [False, False, True, False]
    for listed in found:
        alone = do(
            teams, clock, lambda now, it=listed.host: teams.host(OPERATOR, it.id, now), False
        )
        columns = [getattr(alone.host, name) for name in listed.host._fields]
        assert (columns, alone[1:]) == (list(listed.host), listed[1:])


def test_a_page_looks_at_so_many_rows_and_may_be_empty(registry: Registry, clock: Clock) -> None:
    """Only next None ends a list."""
    fill(registry, 5000)
    for query in (
        hostenroll.HostQuery(text="nowhere"),
        hostenroll.HostQuery(status="missing", organization="default"),
        hostenroll.HostQuery(labels=[("a", "2")]),
    ):
        found = pages(registry, clock, "hosts", query)
        assert [len(page.items) for page in found] == [0] * -(-5000 // hostenroll.SLICE)
        assert found[0].next is not None
    last = hostenroll.HostQuery(text=f"{1 << 8:016x}")
    assert ids(pages(registry, clock, "hosts", last)) == [1 << 8]
    assert len(ids(pages(registry, clock, "hosts", hostenroll.HostQuery(limit=1000)))) == 5000


def test_no_act_looks_at_the_whole_fleet(registry: Registry, clock: Clock) -> None:
    """In steps of SQLite's machine: about 40 for a row that is looked at and given."""
    text = token_of(registry, clock, max_uses=1_000_000)
    number = int(text[4:20], 16)
    fill(registry, 20_000, number)
    steps = [0]

    def count() -> None:
        steps[0] += 100

    arrival = hostenroll.Applicant(text, "web-1", idempotency_key="k")
    acts: Dict[str, Tuple[int, Callable[[int], Any]]] = {
        "hosts": (
            200_000,
            lambda now: registry.hosts(OPERATOR, hostenroll.HostQuery(text="-"), now),
        ),
        "tokens": (
            20_000,
            lambda now: registry.tokens(OPERATOR, hostenroll.TokenQuery(state="valid"), now),
        ),
        "token": (5_000, lambda now: registry.token(OPERATOR, number, now)),
        "enroll": (5_000, lambda now: registry.enroll(arrival, now)),
        "replay": (5_000, lambda now: registry.enroll(arrival, now)),
        "delete": (5_000, lambda now: registry.delete_host(OPERATOR, 1 << 8, now)),
    }
    taken = {}
    connection_of(registry).set_progress_handler(count, 100)
    for name, (_, act) in acts.items():
        steps[0] = 0
        do(registry, clock, act)
        taken[name] = steps[0]
    connection_of(registry).set_progress_handler(None, 0)
    assert {name: n for name, n in taken.items() if n > acts[name][0]} == {}


def test_a_slice_of_a_list_is_small(registry: Registry, clock: Clock) -> None:
    """A heartbeat behind it waits for no more."""
    fill(registry, 3 * hostenroll.SLICE)
    steps = [0]

    def count() -> None:
        steps[0] += 100

    connection_of(registry).set_progress_handler(count, 100)
    for limit in (1, hostenroll.SLICE, 1000):
        steps[0] = 0
        query = hostenroll.HostQuery(limit=limit)
        page = do(registry, clock, lambda now, q=query: registry.hosts(OPERATOR, q, now), False)
        assert len(page.items) == min(limit, hostenroll.SLICE)
        assert steps[0] < 100 * hostenroll.SLICE
    connection_of(registry).set_progress_handler(None, 0)


def census_of(registry: Registry, clock: Clock, by: Principal = OPERATOR) -> Tuple[Any, int]:
    """A whole census, and how many ticks it took."""
    for ticks in range(1, 1000):
        census = do(registry, clock, lambda now: registry.census(by, now), False)
        if census is not None:
            return census, ticks
    raise AssertionError("a census that never ends")


def test_a_census_counts_each_host_once_by_organization_and_status(
    registry: Registry, clock: Clock
) -> None:
    do(registry, clock, lambda now: registry.add_organization(OPERATOR, "berlin", now))
    chance = random.Random(5)
    for n in range(60):
        number, credential = came_in(registry, clock, f"web-{n}", organization=chance.choice(
            ["default", "berlin"]))  # fmt: skip
        if chance.random() < 0.8:
            beat(registry, clock, credential)
        if chance.random() < 0.2:
            do(registry, clock, hostenroll.partial(registry.revoke_host, OPERATOR, number))
        clock.advance(chance.choice([1, 30, 3600, 86400 / 2]))
    beat(registry, clock, came_in(registry, clock, "web-now")[1])
    listed = [view for page in pages(registry, clock, "hosts", hostenroll.HostQuery())
              for view in page.items]  # fmt: skip
    expected = hostenroll.Counter((view.host.organization_id, view.status) for view in listed)
    assert len({status for _, status in expected}) == len(hostenroll.STATUSES)
    census, ticks = census_of(registry, clock)
    assert (census.counts, ticks) == (expected, 1)
    berlin = Principal("api-key:1", "berlin", "viewer")
    census, _ = census_of(registry, clock, berlin)
    assert census.counts == {key: n for key, n in expected.items() if key[0] == "berlin"}


def test_a_census_of_a_large_fleet_goes_in_slices_and_is_kept_for_a_while(
    registry: Registry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostenroll, "COUNTED_AT_ONCE", 100)
    fill(registry, 950)
    census, ticks = census_of(registry, clock)
    assert (ticks, census.counts) == (10, {("default", "pending"): 950})
    came_in(registry, clock)
    clock.advance(hostenroll.CENSUS_KEPT)
    again, ticks = census_of(registry, clock)
    assert (ticks, again) == (1, census)
    clock.advance(0.001)
    fresh, ticks = census_of(registry, clock)
    assert (ticks, fresh.counts) == (10, {("default", "pending"): 951})


def test_a_census_of_a_small_fleet_is_never_old(registry: Registry, clock: Clock) -> None:
    for n in range(3):
        assert sum(census_of(registry, clock)[0].counts.values()) == n
        came_in(registry, clock, f"web-{n}")


def test_a_census_that_was_left_alone_is_begun_anew(
    registry: Registry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostenroll, "COUNTED_AT_ONCE", 100)
    fill(registry, 400)
    assert do(registry, clock, lambda now: registry.census(OPERATOR, now), False) is None
    connection_of(registry).execute("DELETE FROM host")
    clock.advance(3600)
    assert census_of(registry, clock)[0].counts == {}


def test_two_who_ask_for_a_census_share_it(
    registry: Registry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostenroll, "COUNTED_AT_ONCE", 100)
    fill(registry, 400)
    ask = lambda: do(registry, clock, lambda now: registry.census(OPERATOR, now), False)  # noqa: E731
    assert [ask() is None for _ in range(5)] == [True, True, True, True, False]
    assert ask() is not None


def test_the_bounds_of_a_status_are_those_of_its_silence() -> None:
    chance = random.Random(11)
    for _ in range(3000):
        previous = chance.randrange(1, 5000)
        started = previous + chance.randrange(-previous + 1, 5000)
        alive = started + chance.randrange(0, 5000)
        now = alive + chance.choice([0, 10, 25_000, 25_001, 90_000])
        service = hostenroll.Service(started, alive, previous, 30, "")
        silence = chance.randrange(0, 12_000)
        watch = hostenroll.watched(service, now)
        bound = hostenroll.seen_since(watch, silence)
        for seen in (bound - 1, bound, bound + 1, previous, previous + 1, started, alive):
            if 0 < seen <= now:
                is_within = hostenroll.silence_ms(seen, watch) <= silence
                assert is_within == (seen >= bound), (service, now, silence, seen)


def test_each_of_a_tick_has_its_own_outcome(registry: Registry, clock: Clock) -> None:
    """The good, the revoked, the superseded, the deleted; a refusal, a bug, and neighbours."""
    hosts = [came_in(registry, clock, f"web-{n}") for n in range(5)]
    beats = [plain(registry, credential, clock) for _, credential in hosts]
    do(registry, clock, lambda now: registry.revoke_host(OPERATOR, hosts[1][0], now))
    registry.tick([plain(registry, hosts[2][1], clock, serial=2)], clock.ms)
    do(registry, clock, lambda now: registry.delete_host(OPERATOR, hosts[3][0], now))
    clock.advance(1)

    def refused(now: int) -> None:
        registry.add_organization(OPERATOR, "half", now)
        raise hostenroll.Forbidden()

    def broken(now: int) -> None:
        registry.add_organization(OPERATOR, "broken", now)
        raise ValueError("a defect")

    acts = [
        Act(lambda now: registry.add_organization(OPERATOR, "one", now).id),
        Act(refused),
        Act(broken),
        Act(lambda now: [o.id for o in registry.organizations()], writes=False),
        Act(lambda now: registry.add_organization(OPERATOR, "one", now)),
        Act(lambda now: registry.add_organization(OPERATOR, "two", now).id),
    ]
    outcome = registry.tick([*beats, *acts], clock.ms) or []
    beaten, done = outcome[:5], outcome[5:]
    outcome = registry.tick([acts[1], beats[0], acts[2]], clock.ms) or []
    assert outcome[1] == clock.ms
    assert [b if isinstance(b, int) else type(b).__name__ for b in beaten] == [
        clock.ms,
        "HostRevoked",
        "CredentialSuperseded",
        "HostUnknown",
        clock.ms,
    ]
    assert [d if isinstance(d, (str, list)) else type(d).__name__ for d in done] == [
        "one",
        "Forbidden",
        "Internal",
        ["default", "one"],
        "Conflict",
        "two",
    ]
    assert look(registry, "SELECT id FROM organization ORDER BY id") == [
        ("default",),
        ("one",),
        ("two",),
    ]
    seen = dict(look(registry, "SELECT host_id, last_seen FROM heartbeat"))
    assert [seen.get(number) for number, _ in hosts] == [
        clock.ms,
        0,
        clock.ms - 1000,
        None,
        clock.ms,
    ]
    with pytest.raises(hostenroll.Internal) as caught:
        do(registry, clock, broken)
    assert "defect" not in str(caught.value.document())


def test_what_is_raised_through_a_tick_leaves_it_undone(
    registry: Registry, clock: Clock, paths: Tuple[str, str]
) -> None:
    def interrupted(now: int) -> None:
        registry.add_organization(OPERATOR, "half", now)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(registry, clock, interrupted)
    assert not connection_of(registry).in_transaction and is_free(paths)
    assert look(registry, "SELECT count(*) FROM organization") == [(1,)]


def test_ids_are_unique_and_never_come_back(registry: Registry, clock: Clock) -> None:
    numbers = set()
    for _ in range(30):
        number, _ = came_in(registry, clock)
        do(registry, clock, lambda now, n=number: registry.delete_host(OPERATOR, n, now))
        numbers.add(number)
        clock.advance(0.001)
    assert len(numbers) == 30 and all(0 < number < 1 << 63 for number in numbers)


def at(milliseconds: Optional[int]) -> Optional[str]:
    """A time as the API writes it."""
    if not milliseconds:
        return None
    seconds, rest = divmod(milliseconds, 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest:03d}Z"


class Model:
    """What the fleet should be, as plain things in dictionaries. It knows the README's rules, and
    none of the Registry's: what has died is kept here, and looked for there."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.tokens: Dict[str, Any] = {}
        self.hosts: Dict[str, Any] = {}
        self.kids: List[str] = []  # the one that signs first
        self.retired: List[str] = []
        self.interval = 30
        self.paused = self.started = self.alive = 0  # the last pause of service, and its end
        self.events: Dict[Tuple[str, str], int] = {}

    def did(self, action: str, what: str) -> None:
        self.events[action, what] = self.events.get((action, what), 0) + 1

    # Tokens.

    def state(self, token: Any) -> str:
        if token.revoked:
            return "revoked"
        if token.uses == token.max:
            return "used"
        return "valid" if self.clock.ms < token.expires else "expired"

    def token_shown(self, token: Any) -> Dict[str, Any]:
        came = [host.id for host in self.living() if host.token == token.id]
        return {
            "id": token.id, "organizationId": token.organization, "state": self.state(token),
            "description": token.description, "hostname": token.hostname, "hostId": token.host,
            "labels": token.labels, "maxUses": token.max, "uses": token.uses,
            "createdAt": at(token.created), "createdBy": token.by, "expiresAt": at(token.expires),
            "usedAt": at(token.used), "usedFrom": token.used and "192.0.2.7",
            "revokedAt": at(token.revoked),
            "hosts": [token.host] * token.uses if token.host else came,
        }  # fmt: skip

    def prune(self) -> None:
        month_ago = self.clock.ms - 30 * DAY_MS
        for token in list(self.tokens.values()):
            end = token.used if token.uses == token.max else token.expires
            if token.created < month_ago and (token.revoked or end) <= month_ago:
                del self.tokens[token.id]

    # Hosts.

    def living(self) -> List[Any]:
        """The newest first."""
        living = [host for host in self.hosts.values() if not host.deleted]
        return sorted(living, key=lambda host: str(host.id), reverse=True)

    def status(self, host: Any) -> str:
        if host.revoked or not host.last:
            return "revoked" if host.revoked else "pending"
        silence = self.silence(host.last)
        if silence <= self.allowed:
            return "online"
        return "offline" if silence <= WEEK_MS else "missing"

    @property
    def allowed(self) -> int:
        """How long an online host may be silent."""
        return (3 * self.interval + 10) * 1000

    def silence(self, seen: int) -> int:
        """How long a server has been there and not heard who was last seen then."""
        now = self.clock.ms
        until = now if self.is_served() else self.alive
        was_set_back = self.paused > self.started
        if seen > max(now, self.alive) + 300_000:  # by a clock that is no more
            if was_set_back:  # by so much at least
                seen -= self.paused - self.started
            seen = min(seen, self.started)
        if was_set_back or seen >= self.started:
            return until - seen
        if seen > self.paused:  # in a life that was too brief to hear all
            return until - self.started
        return (self.paused - seen) + (until - self.started)

    def host_shown(self, host: Any) -> Dict[str, Any]:
        twin = self.hosts.get(host.twin)
        return {
            "id": host.id, "organizationId": host.organization, "name": host.name,
            "hostname": host.hostname, **host.facts, "labels": host.labels,
            "status": self.status(host), "enrolledAt": at(host.enrolled),
            "lastSeen": at(host.last), "tokenId": host.token, "revokedAt": at(host.revoked),
            "warnings": int(twin is not None and not twin.deleted and not twin.revoked),
        }  # fmt: skip

    def twin(self, organization: str, hostname: str, own: str = "") -> str:
        """Whom a host finds there by its own name; only the newest twenty are looked at."""
        plain = lambda name: name.lower().rstrip(".")  # noqa: E731
        same = [
            host
            for host in self.living()
            if host.organization == organization and plain(host.hostname) == plain(hostname)
        ]
        for host in same[:20]:
            if host.id != own and self.status(host) in ("pending", "online"):
                return str(host.id)
        return ""

    # Enrollments.

    def enroll(self, token: Any, key: str, hostname: str) -> Tuple[str, str, Any]:
        """The refusal; or else what happens, to which host: None for a new one."""
        if token is None or token.id not in self.tokens:
            return "token-unknown", "", None
        known = [it for it in self.living() if key and (it.admitted_by, it.key) == (token.id, key)]
        for host in known:
            lost = host.heard < host.admitted and self.clock.ms - host.admitted_at <= DAY_MS
            if lost and not token.revoked and not host.revoked:
                return "", "replay", host
        if self.state(token) != "valid":
            return f"token-{self.state(token)}", "", None
        if known:
            return "token-used", "", None
        if token.hostname and token.hostname.lower() != hostname.lower().rstrip("."):
            return "token-host-mismatch", "", None
        host = self.hosts.get(token.host)
        if host is not None and host.revoked:
            return "host-revoked", "", None
        return "", "re-enroll" if host else "enroll", host

    def admit(self, host: Any, token: Any, key: str, hostname: str, facts: Dict[str, str]) -> None:
        """A host comes in by a token; again, where it was there."""
        token.uses, token.used = token.uses + 1, self.clock.ms
        again = bool(host.issued)
        host.issued += hostenroll.SERIALS_LOST + 1 if again else 1
        host.admitted, host.admitted_at = host.issued, self.clock.ms
        host.admitted_by, host.key = token.id, key
        self.change(host, {**facts, "hostname": hostname})
        host.twin = self.twin(host.organization, host.hostname, host.id)

    @staticmethod
    def change(host: Any, facts: Dict[str, str]) -> None:
        host.facts.update({name: it for name, it in facts.items() if name != "hostname"})
        if "hostname" in facts and not (host.is_bound and host.hostname):
            host.hostname = facts["hostname"]

    # Heartbeats.

    def beat(self, credential: Any, facts: Dict[str, str]) -> str:
        """The refusal; or else the beat counts."""
        if credential.kid not in self.kids:
            return "credential-invalid"
        expires = credential.expires
        if expires is not None and self.clock.ms > expires * 1000 + WEEK_MS:
            return "credential-expired"
        host = self.hosts[credential.host]
        if host.deleted:
            return "host-unknown"
        if credential.serial < host.heard:
            return "credential-superseded"
        if host.revoked:
            return "host-revoked"
        if credential.serial > max(1, host.heard):
            host.kid = credential.kid
            self.did("supersede", "host")
        is_far_ahead = host.last > self.clock.ms + 300_000
        host.last = self.clock.ms if is_far_ahead else max(host.last, self.clock.ms)
        host.heard = credential.serial
        self.change(host, facts)
        return ""

    def renewal(self, credential: Any, ttl: Optional[int]) -> Optional[int]:
        """The serial of the credential that comes with the reply to a beat that counted."""
        host = self.hosts[credential.host]
        is_due = credential.kid != self.kids[0]
        if credential.expires is None:
            is_due = is_due or ttl is not None
        else:
            life = credential.expires - credential.issued
            left = credential.expires * 1000 - self.clock.ms
            is_due = is_due or (ttl is not None and life > ttl) or 3 * left < life * 1000
        if not is_due or credential.serial < host.admitted:
            return None
        host.issued += 1
        self.did("renew", "host")
        return int(host.issued)

    # Service.

    def start(self, interval: int) -> None:
        now = self.clock.ms
        if not self.alive:
            self.paused = self.started = self.alive = now
        elif abs(now - self.alive) <= 10_000:
            self.alive = max(now, self.alive)
        else:
            self.begin()
        self.interval = interval

    def is_served(self) -> bool:
        return abs(self.clock.ms - self.alive) <= 25_000

    def stay_alive(self) -> None:
        """A server says so; after too long, or by another clock, a new life begins with it."""
        if self.is_served():
            self.alive = max(self.alive, self.clock.ms)
        else:
            self.begin()

    def begin(self) -> None:
        """A pause is over. One that was only broken by too brief a life is still the same; but
        where the clock was set back there was none."""
        was_long = self.alive - self.started > self.allowed
        if was_long or self.paused > self.started:
            self.paused = self.alive
        self.started = self.alive = self.clock.ms


class Life:
    """A fleet that lives at random behind two servers on one database, and beside it the model.
    Whatever is done to one is done to the other, and both are asked what has become of it."""

    ACTS = {
        "mint": 12, "enroll": 20, "beat": 24, "beat_together": 6, "shut_out": 7, "delete": 3,
        "reenroll": 6, "revoke_token": 3, "edit": 4, "rotate": 1, "retire": 2, "stay_alive": 2,
        "keep_house": 1, "restart": 2, "forge": 2, "wait": 8, "wait_for_a_boundary": 5,
    }  # fmt: skip
    WAITS = (0.001, 1, 30, 99, 600, 18_000, 86_400, 3 * 86_400, 9 * 86_400, -0.001, -20, -50,
             -3600, -2 * 86_400)  # fmt: skip
    HOSTNAMES = ("web-1", "WEB-1.", "web-2", "web-3", "web-4")
    FACTS = ("os", "architecture", "dockerVersion")

    def __init__(self, paths: Tuple[str, str], clock: Clock, seed: int) -> None:
        self.paths, self.clock, self.chance = paths, clock, random.Random(seed)
        self.model = Model(clock)
        self.credentials: List[Any] = []
        self.servers = [self.start(30, None), self.start(30, 86_400)]
        self.touched: List[Any] = []
        first = self.servers[0].registry
        for name in ("a-team", "b-team"):
            do(first, clock, lambda now, name=name: first.add_organization(OPERATOR, name, now))
        keys = {"owner": (None, "admin"), "ann": ("a-team", "admin"), "ben": ("b-team", "admin"),
                "vic": (None, "viewer"), "eve": (None, "admin")}  # fmt: skip
        self.keys = {name: make_api_key(first, clock, *key) for name, key in keys.items()}
        self.scopes = {name: organization for name, (organization, _) in keys.items()}
        number = int(self.keys["eve"].split("_")[1], 16)
        do(first, clock, lambda now: first.revoke_api_key(OPERATOR, number, now))

    def start(self, interval: int, ttl: Optional[int]) -> Any:
        options = {"interval": interval, "credential_ttl": ttl}
        registry = open_registry(*self.paths, self.clock.ms, **options)
        self.model.kids = list(registry.keyring.kids)
        do(registry, self.clock, lambda now: registry.start_service("http://here", now))
        self.model.start(interval)
        return SimpleNamespace(registry=registry, door=ApiDoor(registry, self.clock), **options)

    def close(self) -> None:
        for server in self.servers:
            server.registry.close()

    # What is drawn.

    @property
    def server(self) -> Any:
        server = self.chance.choice(self.servers)
        server.door.api.notice_keys()  # as each turn of a server begins
        return server

    def one_of(self, things: Sequence[Any]) -> Any:
        """Most often one of the newest."""
        return self.chance.choice(things[-12:] if self.chance.random() < 0.9 else things)

    def caller(self) -> str:
        return self.chance.choices(list(self.keys), [20, 3, 3, 1, 1])[0]

    def facts(self) -> Dict[str, str]:
        names = self.chance.sample(self.FACTS, self.chance.choice([0, 0, 1, 2]))
        return {name: self.chance.choice("xyz") for name in names}

    # What is asked, and what is to come of it.

    def ask(self, caller: str, method: str, path: str, body: Any = None) -> Reply:
        reply: Reply = self.server.door.call(method, path, body, self.keys[caller])
        return reply

    def refusal(self, caller: str, thing: Any) -> Optional[str]:
        """Of somebody who wants to change a thing; None for a thing that is not there."""
        if caller in ("eve", "vic"):
            return "api-key-invalid" if caller == "eve" else "forbidden"
        own = thing is not None and self.scopes[caller] in (None, thing.organization)
        return None if own else "not-found"

    def took(self, credential: str, host: Any, serial: int, server: Any) -> Any:
        """Read a credential as anybody can, and keep it."""
        header, claims = (json.loads(unb64(part)) for part in credential.split(".")[:2])
        assert header == {"alg": "HS256", "typ": "JWT", "kid": self.model.kids[0]}
        issued, ttl = self.clock.ms // 1000, server.credential_ttl
        expires = None if ttl is None else issued + ttl
        wanted = {"iss": "hostenroll", "sub": host.id, "org": host.organization, "iat": issued,
                  "ser": serial, **({} if ttl is None else {"exp": expires})}  # fmt: skip
        assert claims == wanted
        self.credentials.append(
            SimpleNamespace(text=credential, host=host.id, serial=serial, kid=header["kid"],
                            issued=issued, expires=expires)
        )  # fmt: skip
        return at(None if expires is None else expires * 1000)

    def minted(self, reply: Reply, caller: str, ttl: int, **order: Any) -> None:
        document = dict(reply.document)
        token = SimpleNamespace(
            **order, id=document["id"], text=document.pop("token"), uses=0, used=None, revoked=None,
            created=self.clock.ms, expires=self.clock.ms + ttl * 1000,
            by=f"api-key:{self.keys[caller].split('_')[1]}",
        )  # fmt: skip
        assert token.id not in self.model.tokens and reply.status == 201
        self.model.tokens[token.id] = token
        self.model.did("mint", "token")
        assert document == self.model.token_shown(token)

    # The acts.

    def mint(self) -> None:
        caller, chance = self.caller(), self.chance
        ttl = chance.choice([60, 3600, 86_400, 30 * 86_400])
        asked = chance.choice([None, None, "default", "a-team", "b-team", "nowhere"])
        order = {"maxUses": chance.choice([1, 1, 2, 5]), "description": chance.choice("xy"),
                 "labels": {"rack": "b4"} if chance.random() < 0.3 else {}}  # fmt: skip
        hostname = chance.choice([None, None, None, "web-1"])
        more = {"hostname": hostname, "organizationId": asked}
        body = {**order, "ttlSeconds": ttl, **{k: v for k, v in more.items() if v}}
        reply = self.ask(caller, "POST", "/api/hosts/tokens", body)
        organization = asked or self.scopes[caller] or "default"
        refused = self.refusal(caller, SimpleNamespace(organization=organization))
        if refused is None and asked == "nowhere":
            refused = "invalid-body"
        assert reply.code == refused
        if refused is None:
            order["max"] = order.pop("maxUses")
            self.minted(
                reply, caller, ttl, **order, hostname=hostname, host=None, organization=organization
            )

    def enroll(self) -> None:
        if not self.model.tokens:
            return
        token, server = self.one_of(list(self.model.tokens.values())), self.server
        key, hostname = self.chance.choice(["", "k", "m"]), self.chance.choice(self.HOSTNAMES)
        facts = self.facts()
        refused, action, host = self.model.enroll(token, key, hostname)
        reply = server.door.enroll(token.text, hostname, key, **facts)
        assert (reply.code or "") == refused
        if refused:
            return
        if action == "enroll":
            host = self.newcomer(reply.document["hostId"], token, hostname)
        if action == "replay":
            host.issued += 1
        else:
            self.model.admit(host, token, key, hostname, facts)
        if action == "enroll":
            self.model.hosts[host.id] = host
        self.model.did(action, "host")
        self.touched += [host, token]
        credential = reply.document["credential"]
        assert reply.status == 201 and reply.document == {
            "hostId": host.id, "organizationId": host.organization, "name": host.name,
            "credential": credential,
            "credentialExpiresAt": self.took(credential, host, host.issued, server),
            "heartbeatIntervalSeconds": server.interval,
        }  # fmt: skip

    def newcomer(self, number: str, token: Any, hostname: str) -> Any:
        assert number not in self.model.hosts, "an id has come back"
        return SimpleNamespace(
            id=number, organization=token.organization, token=token.id, labels=token.labels,
            name=hostname, hostname="", is_bound=token.hostname is not None, issued=0, heard=0,
            last=0, facts=dict.fromkeys(self.FACTS, ""), enrolled=self.clock.ms,
            kid=self.model.kids[0], revoked=None, deleted=False,
        )  # fmt: skip

    def beat(self) -> None:
        if self.credentials:
            self.beat_with([self.one_of(self.credentials)], self.facts())

    def beat_together(self) -> None:
        """Several hosts in one tick."""
        drawn = [self.one_of(self.credentials) for _ in range(6) if self.credentials]
        self.beat_with(list({credential.host: credential for credential in drawn}.values()), {})

    def beat_with(self, credentials: Sequence[Any], facts: Dict[str, str]) -> None:
        server, path = self.server, "/api/agent/heartbeat"
        hostname = self.chance.choice([*self.HOSTNAMES, *[None] * 20])
        facts = {**facts, **({"hostname": hostname} if hostname else {})}
        asked = [request_bytes("POST", path, facts or None, it.text) for it in credentials]
        for credential, reply in zip(credentials, server.door.tick(asked)):
            host = self.model.hosts[credential.host]
            refused = self.model.beat(credential, facts)
            assert (reply.code or "") == refused
            self.touched.append(host)
            if refused:
                continue
            document = dict(reply.document)
            spread = document.pop("nextHeartbeatSeconds") / server.interval
            assert 0.85 <= spread <= 1.15
            wanted = {"hostId": host.id, "lastSeen": at(host.last)}
            serial = self.model.renewal(credential, server.credential_ttl)
            if serial is not None:
                renewed = document["credential"]
                expires = self.took(renewed, host, serial, server)
                wanted.update(credential=renewed, credentialExpiresAt=expires)
            assert document == wanted

    def on_host(self, method: str, more: str = "", body: Any = None) -> Tuple[Any, Reply, str]:
        """Somebody wants something of a host that may be gone; whoever it was heard so."""
        caller, host = self.caller(), self.one_of(list(self.model.hosts.values()))
        reply = self.ask(caller, method, f"/api/hosts/{host.id}{more}", body)
        assert reply.code == self.refusal(caller, None if host.deleted else host)
        self.touched.append(host)
        return host, reply, caller

    def shut_out(self) -> None:
        if not self.model.hosts:
            return
        action = self.chance.choice(["revoke", "restore", "restore"])
        host, reply, _ = self.on_host("POST", f"/{action}")
        if reply.code is None:
            if bool(host.revoked) != (action == "revoke"):
                host.revoked = self.clock.ms if action == "revoke" else None
                self.model.did(action, "host")
            self.require(reply.document, self.model.host_shown(host))

    def delete(self) -> None:
        if not self.model.hosts:
            return
        host, reply, _ = self.on_host("DELETE")
        if reply.code is None:
            host.deleted = True
            self.model.did("delete", "host")
            for token in self.model.tokens.values():
                if token.host == host.id and not token.revoked:
                    token.revoked = self.clock.ms

    def reenroll(self) -> None:
        if not self.model.hosts:
            return
        body = {"ttlSeconds": 600, "description": "again"}
        host, reply, caller = self.on_host("POST", "/reenroll", body)
        if reply.code is None:
            self.minted(
                reply, caller, 600, description="again", labels={}, max=1, hostname=None,
                host=host.id, organization=host.organization,
            )  # fmt: skip

    def edit(self) -> None:
        if not self.model.hosts:
            return
        changes = self.chance.choice([{}, {"name": "n"}, {"labels": {"a": "1"}, "name": "m"}])
        host, reply, _ = self.on_host("PATCH", "", changes)
        if reply.code is None:
            vars(host).update(changes)
            if changes:
                self.model.did("edit", "host")
            self.require(reply.document, self.model.host_shown(host))

    def revoke_token(self) -> None:
        if not self.model.tokens:
            return
        caller, token = self.caller(), self.one_of(list(self.model.tokens.values()))
        reply = self.ask(caller, "DELETE", f"/api/hosts/tokens/{token.id}")
        assert reply.code == self.refusal(caller, token)
        if reply.code is None and not token.revoked:
            token.revoked = self.clock.ms
            self.model.did("revoke", "token")
        self.touched.append(token)

    def rotate(self) -> None:
        server = self.server
        kid = do(server.registry, self.clock, partial(server.registry.rotate_signing_key, OPERATOR))
        assert kid not in (*self.model.kids, *self.model.retired)
        self.model.kids.insert(0, kid)
        self.model.did("rotate", "signing-key")

    def retire(self) -> None:
        server, model = self.server, self.model
        kid, force = self.chance.choice([*model.kids, *model.retired]), self.chance.random() < 0.3
        refused, hosts = self.may_retire(kid, force)
        act = partial(server.registry.retire_signing_key, OPERATOR, kid, force)
        try:
            assert do(server.registry, self.clock, act) == hosts
        except Problem as problem:
            assert problem.code == refused
            return
        assert refused is None
        model.kids.remove(kid)
        model.retired.append(kid)
        model.did("retire", "signing-key")

    def may_retire(self, kid: str, force: bool) -> Tuple[Optional[str], int]:
        """The refusal, and how many hosts may hold a credential of that key."""
        kids = self.model.kids
        if kid not in kids:
            return "not-found", 0
        as_old = kids[kids.index(kid) :]
        hosts = len([host for host in self.model.living() if host.kid in as_old])
        return "conflict" if kid == kids[0] or (hosts and not force) else None, hosts

    def stay_alive(self) -> None:
        assert self.server.door.call("GET", "/readyz").status == 200
        self.model.stay_alive()

    def keep_house(self) -> None:
        server = self.server
        do(server.registry, self.clock, server.registry.keep_house)
        self.model.stay_alive()
        self.model.prune()

    def restart(self) -> None:
        n = self.chance.randrange(2)
        self.servers[n].registry.close()
        options = self.chance.choice([1, 30, 30, 300]), self.chance.choice([None, 600, 172_800])
        self.servers[n] = self.start(*options)

    def forge(self) -> None:
        """What nobody was given is refused, and changes nothing."""
        door, dice = self.server.door, self.chance.randrange(4)
        if dice == 0:
            text = hostenroll.mint_secret("het", hostenroll.new_id(self.clock.ms)).text
            assert door.enroll(text).code == "token-unknown"
        elif dice == 1 and self.model.tokens:
            token = self.one_of(list(self.model.tokens.values()))
            text = hostenroll.mint_secret("het", int(token.id, 16)).text
            assert door.enroll(text).code == "token-unknown"
        elif dice == 2 and self.credentials:
            head, _, tail = self.one_of(self.credentials).text.rpartition(".")
            assert door.beat(f"{head}.{tail[::-1]}").code == "credential-invalid"
        else:
            assert door.call("POST", "/api/agent/heartbeat").code == "credential-missing"

    def wait(self) -> None:
        self.turn_clock(self.clock.ms + int(self.chance.choice(self.WAITS) * 1000))

    def wait_for_a_boundary(self) -> None:
        """To the very millisecond at which something will be judged otherwise, or one beside."""
        bounds = [token.expires for token in list(self.model.tokens.values())[-5:]]
        for host in list(self.model.hosts.values())[-5:]:
            since = max(host.last, self.model.started)
            bounds += [since + (3 * self.model.interval + 10) * 1000, since + WEEK_MS,
                       host.admitted_at + DAY_MS]  # fmt: skip
        for credential in self.credentials[-5:]:
            if credential.expires is not None:
                life = credential.expires - credential.issued
                bounds += [credential.expires * 1000 + WEEK_MS,
                           credential.expires * 1000 - life * 1000 // 3]  # fmt: skip
        near = [bound for bound in bounds if -1 <= bound - self.clock.ms <= 8 * DAY_MS]
        if near:
            self.turn_clock(self.chance.choice(near) + self.chance.choice([-1, 0, 1]))

    def turn_clock(self, milliseconds: int) -> None:
        self.clock.now = (milliseconds + 0.5) / 1000  # not to be rounded into another

    # What both say.

    def require(self, shown: Dict[str, Any], wanted: Dict[str, Any]) -> None:
        """A host is as it should be. Its sentences have tests of their own."""
        shown = {**shown, "warnings": len(shown["warnings"])}
        assert shown.pop("statusReason")
        assert shown == wanted

    def look(self) -> None:
        """At what was touched, and at something that was not."""
        for things in (self.model.hosts, self.model.tokens):
            if things:
                self.touched.append(self.chance.choice(list(things.values())))
        for thing in {id(thing): thing for thing in self.touched}.values():
            if hasattr(thing, "uses"):
                reply = self.ask("owner", "GET", f"/api/hosts/tokens/{thing.id}")
                assert reply.document == self.model.token_shown(thing)
            elif thing.deleted:
                assert self.ask("vic", "GET", f"/api/hosts/{thing.id}").code == "not-found"
            else:
                reply = self.ask("vic", "GET", f"/api/hosts/{thing.id}")
                self.require(reply.document, self.model.host_shown(thing))
        self.touched = []

    def look_at_all(self) -> None:
        """At every list, by each who sees another part of the fleet, and at the counts."""
        for caller in ("owner", "ann", "ben"):
            scope, server = self.scopes[caller], self.server
            mine = lambda thing, scope=scope: scope in (None, thing.organization)  # noqa: E731
            shown = walk(server.door, self.keys[caller], "/api/hosts?limit=1000", "hosts")
            hosts = list(filter(mine, self.model.living()))
            assert len(shown) == len(hosts)
            for host, document in zip(hosts, shown):
                self.require(document, self.model.host_shown(host))
            shown = walk(server.door, self.keys[caller], "/api/hosts/tokens?limit=1000", "tokens")
            tokens = [it for it in self.model.tokens.values() if mine(it)]
            tokens.sort(key=lambda token: str(token.id), reverse=True)
            assert shown == [self.model.token_shown(token) for token in tokens]
        self.look_at_counts()

    def look_at_counts(self) -> None:
        counts = dict.fromkeys(itertools.product(("default", "a-team", "b-team"), STATES), 0)
        for host in self.model.living():
            counts[host.organization, self.model.status(host)] += 1
        found = samples(self.ask("owner", "GET", "/metrics").document)
        for (organization, status), count in counts.items():
            labels = f'organization="{organization}",status="{status}"'
            assert found[f"hostenroll_hosts{{{labels}}}"] == count
        registry = self.server.registry
        views = do(registry, self.clock, lambda now: registry.signing_keys(), False)
        holders = [host.kid for host in self.model.living()]
        assert {view.key.kid: (view.state, view.hosts) for view in views} == {
            **{kid: ("retired", holders.count(kid)) for kid in self.model.retired},
            **{kid: ("verifies", holders.count(kid)) for kid in self.model.kids[1:]},
            self.model.kids[0]: ("signs", holders.count(self.model.kids[0])),
        }

    def look_at_log(self) -> None:
        """Every act has left its event, once."""
        registry = self.servers[0].registry
        rows = look(registry, "SELECT action, subject FROM audit WHERE code IS NULL")
        found: Dict[Tuple[str, str], int] = {}
        for action, subject in rows:
            what = (action, subject.partition(":")[0])
            found[what] = found.get(what, 0) + 1
        for what in (("add", "organization"), ("mint", "api-key"), ("revoke", "api-key")):
            assert found.pop(what)
        assert found == self.model.events
        assert do(registry, self.clock, lambda now: registry.verify_audit(None), False)

    def live(self, acts: int) -> None:
        for n in range(1, acts + 1):
            act = self.chance.choices(list(self.ACTS), list(self.ACTS.values()))[0]
            try:
                getattr(self, act)()
                self.look()
                if n % 500 == 0 or n == acts:
                    self.look_at_all()
            except BaseException:
                print(f"it was act {n}: {act}")
                raise
        self.look_at_log()


STATES = ("pending", "online", "offline", "missing", "revoked")


@pytest.mark.parametrize("acts", [800, pytest.param(10_000, marks=slow)])
def test_a_long_random_life_is_as_the_model_says(
    acts: int, paths: Tuple[str, str], clock: Clock
) -> None:
    seed = int(os.environ.get("HOSTENROLL_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"to see it again: HOSTENROLL_SEED={seed}")
    life = Life(paths, clock, seed)
    try:
        life.live(acts)
    finally:
        life.close()


def test_what_only_reads_keeps_our_place_in_the_turnstile(
    registry: Registry, clock: Clock, paths: Tuple[str, str]
) -> None:
    """Else whoever reads much waits for ever to write."""
    order = hostenroll.TokenOrder()
    mint = Act(lambda now: registry.mint(OPERATOR, order, now))
    look_up = Act(lambda now: registry.organizations(), writes=False)
    holder, other = (hostenroll.WriteLock(paths[0]) for _ in range(2))
    assert holder.attempt()
    assert registry.tick([mint], clock.ms) is None  # at the gate now
    assert registry.tick([look_up], clock.ms) is not None
    holder.release()
    assert not other.attempt()
    assert registry.tick([mint], clock.ms) is not None
    holder.close()
    other.close()


def test_a_database_that_was_read_only_for_a_while_can_be_written_again(
    paths: Tuple[str, str], clock: Clock
) -> None:
    """The locks have the mode of the database, but never one that locks us out."""
    open_registry(*paths, clock.ms).close()
    os.chmod(paths[0], 0o440)
    with contextlib.suppress(hostenroll.OperatorError):
        open_registry(*paths, clock.ms).close()
    for end in (".gate", ".lock"):
        assert stat.S_IMODE(os.stat(paths[0] + end).st_mode) == 0o640


def test_a_foreign_writer_is_waited_for_and_hinders_no_opening(
    registry: Registry, clock: Clock, paths: Tuple[str, str]
) -> None:
    with contextlib.closing(sqlite3.connect(paths[0], isolation_level=None)) as foreign:
        foreign.execute("BEGIN IMMEDIATE")
        open_registry(*paths, clock.ms).close()  # opening writes nothing
        assert registry.tick([Act(registry.keep_alive)], clock.ms) is None
        foreign.execute("COMMIT")
    do(registry, clock, registry.keep_alive)


def test_a_crash_loop_is_nobodys_silence_either(registry: Registry, clock: Clock) -> None:
    """A server that lives for seconds hears nobody: the pause before it still counts."""
    start = lambda now: registry.start_service("http://here", now)  # noqa: E731
    do(registry, clock, start)
    number, credential = came_in(registry, clock)
    live_on(registry, clock, 200)
    beat(registry, clock, credential)
    for pause in (3600, 15, 3600, 15):
        clock.advance(pause)
        do(registry, clock, start)
        assert status_of(registry, clock, number) == "online"
        clock.advance(2)
        other, second = came_in(registry, clock)
        beat(registry, clock, second)  # heard in a brief life
        clock.advance(2)
        do(registry, clock, registry.keep_alive)
    clock.advance(15)
    do(registry, clock, start)
    assert status_of(registry, clock, other) == "online"
    live_on(registry, clock, 101)
    assert status_of(registry, clock, other) == status_of(registry, clock, number) == "offline"


def test_a_pause_soon_after_the_clock_was_set_back_is_nobodys_silence(
    registry: Registry, clock: Clock
) -> None:
    """It is not the one that went on before, which the new clock has not come to yet."""
    start = lambda now: registry.start_service("http://here", now)  # noqa: E731
    do(registry, clock, start)
    number, credential = came_in(registry, clock)
    live_on(registry, clock, 200)
    clock.advance(-3600)
    do(registry, clock, registry.keep_alive)
    beat(registry, clock, credential)
    clock.advance(20)
    do(registry, clock, registry.keep_alive)
    clock.advance(7200)
    do(registry, clock, start)
    assert status_of(registry, clock, number) == "online"


@pytest.mark.parametrize("interval, shortest, longest", [(1, 1, 1), (5, 5, 5), (100, 85, 115)])
def test_the_interval_is_drawn_to_its_very_ends(
    interval: int, shortest: int, longest: int, paths: Tuple[str, str], clock: Clock
) -> None:
    with opened(paths, clock, interval=interval) as registry:
        drawn = {registry.next_heartbeat() for _ in range(2000)}
    assert (min(drawn), max(drawn)) == (shortest, longest)


def test_a_tick_that_fails_at_the_gate_leaves_it(
    registry: Registry, clock: Clock, paths: Tuple[str, str]
) -> None:
    """Else nobody could write until this process ends."""
    mint = Act(lambda now: registry.mint(OPERATOR, hostenroll.TokenOrder(), now))
    holder = hostenroll.WriteLock(paths[0])
    assert holder.attempt()
    assert registry.tick([mint], clock.ms) is None  # at the gate now
    os.rename(paths[0], f"{paths[0]}.away")
    failed = registry.tick([mint], clock.ms)
    assert failed is not None and failed[0].code == "storage-unavailable"
    os.rename(f"{paths[0]}.away", paths[0])
    holder.close()
    assert is_free(paths)


def test_who_gives_up_leaves_the_gate(
    registry: Registry, clock: Clock, paths: Tuple[str, str]
) -> None:
    mint = Act(lambda now: registry.mint(OPERATOR, hostenroll.TokenOrder(), now))
    holder = hostenroll.WriteLock(paths[0])
    assert holder.attempt()
    assert registry.tick([mint], clock.ms) is None
    registry.give_up()
    holder.close()
    assert is_free(paths)


def test_a_beat_is_not_judged_by_what_its_neighbours_wrote(
    registry: Registry, clock: Clock
) -> None:
    """Two of one host with two serials, and a stranger that makes the tick look twice."""
    _number, credential = came_in(registry, clock)
    older, newer = (plain(registry, credential, clock, serial=serial) for serial in (1, 2))
    stranger = plain(registry, credential, clock, host=1)
    outcomes = registry.tick([older, newer, stranger], clock.ms)
    assert outcomes is not None and outcomes[:2] == [clock.ms, clock.ms]
    assert outcomes[2].code == "host-unknown"


def test_a_clock_that_was_ahead_is_said_to_have_been(registry: Registry, clock: Clock) -> None:
    number, credential = came_in(registry, clock)
    clock.advance(3 * 86400)
    beat(registry, clock, credential)
    clock.advance(-2 * 86400)
    view = do(registry, clock, lambda now: registry.host(OPERATOR, number, now), False)
    assert view.status == "online" and view.reason.endswith("the clock has gone back")


OLD_BEATS = {
    "beats": ([1], []),
    "renewed": ([3, 4], [1, 2]),
    "never beat": ([1], []),
    "asked again": ([1, 2, 3], []),
    "re-enrolls": ([3, 5], [2]),
}


@pytest.mark.parametrize("ttl", [None, 300], ids=["for ever", "300 s"])
def test_the_fleet_of_the_first_version_goes_on_as_it_was(
    ttl: Optional[int], paths: Tuple[str, str], clock: Clock
) -> None:
    old = old_fleet(paths, clock)
    with opened(paths, clock, credential_ttl=ttl) as registry:

        def status(name: str) -> str:
            number = old.ids[name]
            return str(do(registry, clock, lambda now: registry.host(OPERATOR, number, now)).status)

        pending = {name for name, columns in OLD_HOSTS.items() if columns[2] is None}
        assert {name for name in old.ids if status(name) == "pending"} == (
            pending - {"revoked before it beat"}
        )
        for name in ("revoked", "revoked before it beat"):
            assert status(name) == "revoked"
            with pytest.raises(hostenroll.HostRevoked):
                beat(registry, clock, old.credential(name, 1))
            number = old.ids[name]
            do(registry, clock, lambda now, n=number: registry.restore_host(OPERATOR, n, now))
            beat(registry, clock, old.credential(name, 1))
        for name, (good, bad) in OLD_BEATS.items():
            for serial in bad:
                with pytest.raises(hostenroll.CredentialSuperseded):
                    beat(registry, clock, old.credential(name, serial))
            for serial in good:
                clock.advance(0.001)
                beaten = beat(registry, clock, old.credential(name, serial))
                assert beaten.last_seen == clock.ms
                assert (beaten.grant is not None) == (
                    ttl is not None and serial >= OLD_HOSTS[name][1]
                ), (name, serial)
            for serial in good[:-1]:
                with pytest.raises(hostenroll.CredentialSuperseded):
                    beat(registry, clock, old.credential(name, serial))
            assert status(name) == "online"


REPLAYED = {"never beat": True, "asked again": True, "re-enrolls": True, "beats": False}


@pytest.mark.parametrize("name, replays", REPLAYED.items(), ids=REPLAYED)
def test_a_reply_that_the_first_version_lost_can_be_asked_for_again(
    name: str, replays: bool, paths: Tuple[str, str], clock: Clock
) -> None:
    old = old_fleet(paths, clock)
    with opened(paths, clock) as registry:
        arrival = hostenroll.Applicant(old.used.text, "any", idempotency_key=name)
        if not replays:
            with pytest.raises(hostenroll.TokenUsed):
                do(registry, clock, lambda now: registry.enroll(arrival, now))
            return
        again = do(registry, clock, lambda now: registry.enroll(arrival, now))
        assert again.host.id == old.ids[name]
        assert serial_of(registry, again.grant.credential) == OLD_HOSTS[name][0] + 1
        beat(registry, clock, again.grant.credential)
        with pytest.raises(hostenroll.CredentialSuperseded):
            beat(registry, clock, old.credential(name, OLD_HOSTS[name][0]))
        with pytest.raises(hostenroll.TokenUsed):
            do(registry, clock, lambda now: registry.enroll(arrival, now))


def test_a_token_of_the_first_version_lets_in_a_host_and_one_back(
    paths: Tuple[str, str], clock: Clock
) -> None:
    old = old_fleet(paths, clock)
    with opened(paths, clock) as registry:
        arrival = hostenroll.Applicant(old.token.text, "beats.lan")
        enrolled = do(registry, clock, lambda now: registry.enroll(arrival, now))
        assert enrolled.host.twin_id == old.ids["beats"] and enrolled.host.labels == '{"a": "1"}'
        beat(registry, clock, enrolled.grant.credential)
        order, number = hostenroll.TokenOrder(), old.ids["renewed"]
        text = do(registry, clock, lambda now: registry.reenroll(OPERATOR, number, order, now))[1]
        arrival = hostenroll.Applicant(text, "new.lan")
        again = do(registry, clock, lambda now: registry.enroll(arrival, now))
        assert serial_of(registry, again.grant.credential) == 4 + hostenroll.SERIALS_LOST + 1
        beat(registry, clock, again.grant.credential)
        for serial in (3, 4):
            with pytest.raises(hostenroll.CredentialSuperseded):
                beat(registry, clock, old.credential("renewed", serial))
        assert do(registry, clock, lambda now: registry.verify_audit(None))[1] > 0


@pytest.mark.parametrize("order", list(itertools.permutations([1, 2, 3])), ids=str)
@pytest.mark.parametrize("is_plain", [True, False], ids=["plain", "with facts"])
def test_of_several_answers_to_one_enrollment_the_newest_that_is_used_counts(
    is_plain: bool, order: Tuple[int, ...], registry: Registry, clock: Clock
) -> None:
    arrival = hostenroll.Applicant(token_of(registry, clock), "web-1", idempotency_key="k")
    issued = [
        do(registry, clock, lambda now: registry.enroll(arrival, now)).grant.credential
        for _ in range(3)
    ]
    newest = 0
    for serial in [*order, *order]:
        clock.advance(1)
        claims = registry.authenticate(issued[serial - 1], clock.ms)
        act = Act(lambda now, claims=claims: registry.beat(claims, lambda: {"os": "x"}, now))
        (outcome,) = registry.tick(
            [hostenroll.plain_beat(claims) if is_plain else act], clock.ms
        ) or [None]
        if serial < newest:
            assert isinstance(outcome, hostenroll.CredentialSuperseded)
        else:
            assert not isinstance(outcome, Problem)
            newest = serial
        assert look(registry, "SELECT serial, issued FROM heartbeat, host") == [(newest, 3)]


def test_credentials_of_one_host_in_one_tick_are_taken_in_their_order(
    registry: Registry, clock: Clock
) -> None:
    arrival = hostenroll.Applicant(token_of(registry, clock), "web-1", idempotency_key="k")
    one, two = (
        plain(
            registry,
            do(registry, clock, lambda now: registry.enroll(arrival, now)).grant.credential,
            clock,
        )
        for _ in range(2)
    )
    outcome = registry.tick([one, two, one, two], clock.ms) or []
    assert [type(it).__name__ for it in outcome] == ["int", "int", "CredentialSuperseded", "int"]
    superseded = look(registry, "SELECT count(*) FROM audit WHERE action = 'supersede'")
    assert superseded == [(1,)]


# Signing keys.


def rotate(registry: Registry, clock: Clock) -> str:
    return str(do(registry, clock, lambda now: registry.rotate_signing_key(OPERATOR, now)))


def retire(registry: Registry, clock: Clock, kid: str, force: bool = False) -> int:
    return int(
        do(registry, clock, lambda now: registry.retire_signing_key(OPERATOR, kid, force, now))
    )


def test_a_key_is_in_use_while_a_renewal_of_it_may_be_on_its_way(
    registry: Registry, clock: Clock
) -> None:
    """The host has stored it, and sleeps: it was last heard with an older key."""
    first = registry.keyring.first.kid
    _, credential = came_in(registry, clock)
    second = rotate(registry, clock)
    stored = beat(registry, clock, credential).grant.credential
    rotate(registry, clock)
    for kid in (first, second):
        with pytest.raises(hostenroll.Conflict):
            retire(registry, clock, kid)
    latest = beat(registry, clock, stored).grant.credential
    assert retire(registry, clock, first) == 0
    beat(registry, clock, latest)
    assert retire(registry, clock, second) == 0


def test_a_key_file_that_is_a_folder_costs_no_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(hostenroll.OperatorError, match="cannot read the key file"):
            hostenroll.load_keyring(str(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_key_file_that_once_could_not_be_read_is_read_again(
    registry: Registry, clock: Clock, paths: Tuple[str, str]
) -> None:
    """Out of descriptors for a moment: the file does not change when that is over."""
    keyring = hostenroll.load_keyring(paths[1])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    hostenroll.write_key_file(paths[1], keyring.rotated())
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
    try:
        registry.notice_keys()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "Too many open files" in registry.key_trouble
    do(registry, clock, registry.keep_house)
    assert registry.key_trouble == "" and len(registry.keyring.keys) == 2


def keys_of(registry: Registry, clock: Clock) -> Dict[str, Tuple[str, int]]:
    """State of each key, and how many hosts use it."""
    views = do(registry, clock, lambda now: registry.signing_keys(), writes=False)
    return {view.key.kid: (view.state, view.hosts) for view in views}


def happened(registry: Registry, action: str) -> List[Tuple[str, str]]:
    statement = "SELECT subject, actor FROM audit WHERE action = ? ORDER BY number"
    return look(registry, statement, action)


def test_a_key_lives_from_rotation_to_retirement(registry: Registry, clock: Clock) -> None:
    old = registry.keyring.first.kid
    _, credential = came_in(registry, clock)
    _, never_beat = came_in(registry, clock, "web-2")
    beat(registry, clock, credential)
    assert keys_of(registry, clock) == {old: ("signs", 2)}
    with pytest.raises(hostenroll.Conflict):
        retire(registry, clock, old, force=True)
    new = rotate(registry, clock)
    assert keys_of(registry, clock) == {new: ("signs", 0), old: ("verifies", 2)}
    assert registry.authenticate(came_in(registry, clock, "web-3")[1], clock.ms).kid == new
    renewed = [beat(registry, clock, it).grant.credential for it in (credential, never_beat)]
    # A renewal that is not used yet may have been lost.
    assert keys_of(registry, clock) == {new: ("signs", 1), old: ("verifies", 2)}
    beat(registry, clock, renewed[0])
    assert keys_of(registry, clock) == {new: ("signs", 2), old: ("verifies", 1)}
    with pytest.raises(hostenroll.Conflict, match=r": 1\."):
        retire(registry, clock, old)
    beat(registry, clock, never_beat)  # refused to retire: it changes nothing
    beat(registry, clock, renewed[1])
    assert retire(registry, clock, old) == 0
    assert keys_of(registry, clock) == {new: ("signs", 3), old: ("retired", 0)}
    assert hostenroll.load_keyring(registry._key_file.path).kids == [new]
    for it in renewed:
        assert beat(registry, clock, it).grant is None
    with pytest.raises(hostenroll.CredentialInvalid):
        beat(registry, clock, credential)
    for kid in (old, "nobody", ""):
        with pytest.raises(hostenroll.NotFound):
            retire(registry, clock, kid)
    assert happened(registry, "rotate") == [(f"signing-key:{new}", "cli:test")]
    assert happened(registry, "retire") == [(f"signing-key:{old}", "cli:test")]


def test_who_is_locked_out_by_force_comes_back_by_a_re_enroll_token(
    registry: Registry, clock: Clock
) -> None:
    old = registry.keyring.first.kid
    number, credential = came_in(registry, clock)
    beat(registry, clock, credential)
    new = rotate(registry, clock)
    claims = registry.authenticate(credential, clock.ms)
    assert retire(registry, clock, old, force=True) == 1
    assert keys_of(registry, clock) == {new: ("signs", 0), old: ("retired", 1)}
    with pytest.raises(hostenroll.CredentialInvalid):
        beat(registry, clock, credential)
    with pytest.raises(hostenroll.CredentialInvalid):  # its request came before the retirement
        do(registry, clock, lambda now: registry.beat(claims, dict, now))
    order = hostenroll.TokenOrder()
    text = do(registry, clock, lambda now: registry.reenroll(OPERATOR, number, order, now))[1]
    arrival = hostenroll.Applicant(text, "web-1")
    back = do(registry, clock, lambda now: registry.enroll(arrival, now)).grant.credential
    beat(registry, clock, back)
    assert keys_of(registry, clock) == {new: ("signs", 1), old: ("retired", 0)}


def test_a_key_that_is_retired_while_a_beat_waits_counts_no_more(
    registry: Registry, clock: Clock
) -> None:
    _, credential = came_in(registry, clock)
    claims = registry.authenticate(credential, clock.ms)
    do(registry, clock, partial(registry.rotate_signing_key, OPERATOR))
    do(registry, clock, partial(registry.retire_signing_key, OPERATOR, claims.kid, True))
    outcomes = registry.tick([hostenroll.plain_beat(claims)], clock.ms) or []
    assert [type(it) for it in outcomes] == [hostenroll.CredentialInvalid]
    with pytest.raises(hostenroll.CredentialInvalid):
        do(registry, clock, lambda now: registry.beat(claims, dict, now))


def test_a_key_that_is_retired_is_not_forgotten_with_a_tick_that_dies(
    registry: Registry, clock: Clock
) -> None:
    beats = [plain(registry, came_in(registry, clock)[1], clock)]
    first = registry.keyring.first.kid
    assert registry.tick(beats, clock.ms) == [clock.ms]
    do(registry, clock, partial(registry.rotate_signing_key, OPERATOR))
    do(registry, clock, partial(registry.retire_signing_key, OPERATOR, first, True))
    with faulty(registry, only="COMMIT"):
        registry.tick(beats, clock.ms)
    outcomes = registry.tick(beats, clock.ms) or []
    assert [type(it) for it in outcomes] == [hostenroll.CredentialInvalid]


def test_a_key_that_was_retired_may_be_put_back(
    registry: Registry, clock: Clock, paths: Tuple[str, str]
) -> None:
    """The remedy for a hasty --force: the key file of a backup."""
    old = registry.keyring.first.kid
    _, credential = came_in(registry, clock)
    rotate(registry, clock)
    before = hostenroll.load_keyring(paths[1])
    retire(registry, clock, old, force=True)
    hostenroll.write_key_file(paths[1], before)
    do(registry, clock, lambda now: registry.keep_house(now))
    assert keys_of(registry, clock)[old] == ("verifies", 1)
    assert beat(registry, clock, credential).grant is not None
    assert look(registry, "SELECT count(*) FROM signing_key WHERE retired_at IS NULL") == [(2,)]


def test_a_running_registry_goes_by_what_another_process_has_done_to_the_keys(
    registry: Registry, clock: Clock, paths: Tuple[str, str]
) -> None:
    _, credential = came_in(registry, clock)
    with opened(paths, clock) as other:
        new = rotate(other, clock)
        registry.notice_keys()
        renewed = beat(registry, clock, credential).grant.credential
        assert registry.authenticate(renewed, clock.ms).kid == new
        beat(registry, clock, renewed)
        assert keys_of(other, clock)[new] == ("signs", 1)


def test_a_key_that_the_database_has_not_heard_of_is_learned_and_audited(
    registry: Registry, clock: Clock, paths: Tuple[str, str]
) -> None:
    """A rotation that was killed before its commit, and then a host comes in at once."""
    rotated = hostenroll.load_keyring(paths[1]).rotated()
    hostenroll.write_key_file(paths[1], rotated)
    _, credential = came_in(registry, clock)
    assert registry.authenticate(credential, clock.ms).kid == rotated.first.kid
    do(registry, clock, lambda now: registry.keep_house(now))
    assert registry.knows_keys()
    assert happened(registry, "rotate") == [(f"signing-key:{rotated.first.kid}", "key-file")]
    assert keys_of(registry, clock)[rotated.first.kid] == ("signs", 1)


def test_the_key_file_of_another_database_is_not_taken_for_ours(
    registry: Registry, clock: Clock, paths: Tuple[str, str]
) -> None:
    """It would refuse the whole fleet, and break the chain of the audit log for good."""
    _, credential = came_in(registry, clock)
    ours = Path(paths[1]).read_bytes()
    hostenroll.write_key_file(paths[1], hostenroll.new_keyring())
    registry.notice_keys()
    assert paths[1] in registry.key_trouble
    beat(registry, clock, credential)
    came_in(registry, clock)
    do(registry, clock, lambda now: registry.keep_house(now))
    Path(paths[1]).write_bytes(ours)
    registry.notice_keys()
    assert registry.key_trouble == ""
    beat(registry, clock, credential)
    do(registry, clock, lambda now: registry.verify_audit(None))
    assert len(keys_of(registry, clock)) == 1


@pytest.mark.parametrize("command", ["rotate", "retire"])
def test_a_key_file_that_cannot_be_written_is_the_operators_trouble_and_changes_nothing(
    command: str, registry: Registry, clock: Clock, paths: Tuple[str, str]
) -> None:
    old = registry.keyring.first.kid
    if command == "retire":
        rotate(registry, clock)
    before, key = snapshot(registry), Path(paths[1]).read_bytes()
    os.mkdir(f"{paths[1]}.tmp")
    with pytest.raises(hostenroll.OperatorError, match=re.escape(paths[1])):
        rotate(registry, clock) if command == "rotate" else retire(registry, clock, old)
    assert snapshot(registry) == before and Path(paths[1]).read_bytes() == key
    assert is_free(paths)
    os.rmdir(f"{paths[1]}.tmp")
    rotate(registry, clock) if command == "rotate" else retire(registry, clock, old)
    assert registry.knows_keys()


@slow
@pytest.mark.parametrize("command", ["rotate", "retire"])
def test_a_change_of_keys_that_is_killed_locks_nobody_out(
    command: str, paths: Tuple[str, str], clock: Clock
) -> None:
    def ready() -> Registry:
        return open_registry(*paths, clock.ms)

    with opened(paths, clock) as registry:
        credential = came_in(registry, clock)[1]
    done, n = 0, 0
    killed = True
    while killed:
        n += 1
        with opened(paths, clock) as registry:
            while len(registry.keyring.kids) < 3:
                rotate(registry, clock)
            fresh = beat(registry, clock, credential).grant
            if fresh is not None:
                credential = fresh.credential
                beat(registry, clock, credential)
            kids, last = registry.keyring.kids, registry.keyring.kids[-1]
        if command == "rotate":
            killed = killed_at(n, ready, lambda registry: rotate(registry, clock))
        else:
            killed = killed_at(n, ready, lambda registry: retire(registry, clock, last, True))
        now = hostenroll.load_keyring(paths[1]).kids  # whole, whenever it is looked at
        assert stat.S_IMODE(os.stat(paths[1]).st_mode) == 0o600
        assert now in (kids, kids[:-1] if command == "retire" else [now[0], *kids])
        done += now != kids
        with opened(paths, clock) as registry:
            assert registry.knows_keys() and registry.keyring.kids == now
            beat(registry, clock, credential)
            came_in(registry, clock)
            do(registry, clock, lambda now: registry.verify_audit(None))
            assert len(happened(registry, "rotate")) == len(keys_of(registry, clock)) - 1
    assert n > 20 and done >= 2


# Backups.


def copy_of(paths: Tuple[str, str], folder: Path) -> Tuple[str, str]:
    return str(folder / os.path.basename(paths[0])), str(folder / os.path.basename(paths[1]))


def assert_sound(paths: Tuple[str, str]) -> None:
    bad = [finding for finding in hostenroll.examine(*paths) if not finding.is_good]
    assert bad == []


def test_a_backup_is_a_pair_that_works(
    registry: Registry, clock: Clock, paths: Tuple[str, str], tmp_path: Path
) -> None:
    number, credential = came_in(registry, clock)
    beat(registry, clock, credential)
    folder = tmp_path / "copy"
    folder.mkdir(0o700)
    copies = copy_of(paths, folder)
    assert registry.back_up(str(folder)) == copies
    assert sorted(os.listdir(folder)) == sorted(map(os.path.basename, copies))
    assert {stat.S_IMODE(os.stat(path).st_mode) for path in copies} == {0o600}
    assert contents(copies[0]) == (sorted(anatomy(paths[0])), snapshot(registry))
    assert_sound(copies)
    came_in(registry, clock)
    assert is_free(paths) and not connection_of(registry).in_transaction
    registry.back_up(str(folder))  # over the older one
    assert contents(copies[0])[1] == snapshot(registry)
    with opened(copies, clock) as copy:
        assert do(copy, clock, lambda now: copy.host(OPERATOR, number, now)).status == "online"
        assert beat(copy, clock, credential)


@pytest.mark.parametrize("retires", [False, True], ids=["rotated", "and the old key retired"])
def test_keys_that_change_while_the_database_is_copied_leave_a_pair_that_works_or_none(
    retires: bool,
    registry: Registry,
    clock: Clock,
    paths: Tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hostenroll, "BACKUP_PAGES", 1)
    old = registry.keyring.first.kid
    _, credential = came_in(registry, clock)
    renewed: List[str] = []
    pauses = iter(range(1000))

    def pause(seconds: float) -> None:
        if next(pauses) == 3:
            with opened(paths, clock) as other:
                rotate(other, clock)
                renewed.append(beat(other, clock, credential).grant.credential)
                beat(other, clock, renewed[0])
                if retires:
                    retire(other, clock, old)

    folder = tmp_path / "copy"
    folder.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(hostenroll.time, "sleep", pause)
        if retires:  # the copy would know none of the keys beside it
            with pytest.raises(hostenroll.OperatorError, match="again"):
                registry.back_up(str(folder))
            assert os.listdir(folder) == []
        else:
            registry.back_up(str(folder))
    assert renewed
    copies = registry.back_up(str(folder)) if retires else copy_of(paths, folder)
    assert sql(copies[0], "SELECT count(*) FROM signing_key") == [(1 + retires,)]
    with opened(copies, clock) as copy:
        assert copy.knows_keys()
        beat(copy, clock, renewed[0])
        do(copy, clock, lambda now: copy.verify_audit(None))
    assert_sound(copies)


@pytest.mark.parametrize(
    "spoil",
    table({
        "a folder where the database goes": lambda f: (f / "hostenroll.db").mkdir(),
        "a folder where the keys go": lambda f: (f / "hostenroll.key").mkdir(),
        "a database in use": lambda f: (f / "hostenroll.db-wal").touch(),
    }),
)  # fmt: skip
def test_a_backup_that_fails_leaves_nothing_behind(
    spoil: Callable[[Path], Any],
    registry: Registry,
    clock: Clock,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    spoil(folder)
    before = os.listdir(folder)
    with pytest.raises((OSError, hostenroll.OperatorError, hostenroll.StoreError)):
        registry.back_up(str(folder))
    left = set(os.listdir(folder)) - set(before)
    assert left <= {"hostenroll.key"}
    came_in(registry, clock)


def test_a_backup_for_which_there_is_no_room_leaves_the_older_one_whole(
    registry: Registry, clock: Clock, paths: Tuple[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    copies = registry.back_up(str(folder))
    before = contents(copies[0])
    size = os.stat(copies[0]).st_size
    came_in(registry, clock)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (size - 4096, 4096, 1000, 0):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises((hostenroll.StoreError, OSError)):
                registry.back_up(str(folder))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [name for name in os.listdir(folder) if "tmp" in name] == []
        assert contents(copies[0]) == before
        assert_sound(copies)
    came_in(registry, clock)


@pytest.mark.parametrize("where", ["the database's folder", "the key file's folder", "a link"])
def test_a_backup_never_goes_over_what_it_copies(
    where: str, paths: Tuple[str, str], clock: Clock, tmp_path: Path
) -> None:
    for name in ("data", "keys"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("data")
    apart = str(tmp_path / "data" / "x.db"), str(tmp_path / "keys" / "x.key")
    folder = {"the database's folder": "data", "the key file's folder": "keys", "a link": "link"}
    with opened(apart, clock) as registry:
        before = snapshot(registry)
        with pytest.raises(hostenroll.OperatorError):
            registry.back_up(str(tmp_path / folder[where]))
        assert snapshot(registry) == before
    assert_sound(apart)


@pytest.mark.parametrize("there", ["another fleet's", "keys that are damaged", "a text"])
def test_a_backup_goes_over_nothing_but_an_older_one_of_its_own(
    there: str, registry: Registry, clock: Clock, paths: Tuple[str, str], tmp_path: Path
) -> None:
    (folder := tmp_path / "copy").mkdir()
    ours = copy_of(paths, folder)
    if there == "another fleet's":
        with opened(ours, clock):
            pass
    else:
        which = "damaged" in there
        Path(ours[which]).write_text("a text")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(hostenroll.OperatorError, match="name another folder"):
        registry.back_up(str(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for path in folder.iterdir():
        path.unlink()
    for _ in range(2):
        rotate(registry, clock)
        assert registry.back_up(str(folder)) == ours
    assert_sound(ours)


def test_a_database_and_a_key_file_of_one_name_are_not_copied_over_each_other(
    clock: Clock, tmp_path: Path
) -> None:
    for name in ("data", "keys", "copy"):
        (tmp_path / name).mkdir()
    apart = str(tmp_path / "data" / "fleet"), str(tmp_path / "keys" / "fleet")
    with opened(apart, clock) as registry, pytest.raises(hostenroll.OperatorError, match="name"):
        registry.back_up(str(tmp_path / "copy"))
    assert os.listdir(tmp_path / "copy") == []


def test_two_backups_into_one_folder_do_not_spoil_each_other(
    registry: Registry, clock: Clock, paths: Tuple[str, str], tmp_path: Path, monkeypatch: Any
) -> None:
    """A timer that comes again before the last copy is done."""
    monkeypatch.setattr(hostenroll, "BACKUP_PAGES", 1)
    folder = tmp_path / "copy"
    folder.mkdir()
    failures: List[Any] = []

    def again() -> None:
        try:
            with opened(paths, clock) as other:
                other.back_up(str(folder))
        except (hostenroll.OperatorError, hostenroll.StoreError) as error:
            failures.append(error)

    pauses: List[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            again()

    with monkeypatch.context() as patched:
        patched.setattr(hostenroll.time, "sleep", pause)
        copies = registry.back_up(str(folder))
    assert sorted(os.listdir(folder)) == ["hostenroll.db", "hostenroll.key"]
    assert contents(copies[0])[1] == snapshot(registry)
    assert len(failures) <= 1
    registry.back_up(str(folder))


@slow
def test_a_backup_that_is_killed_leaves_the_older_one_whole(
    paths: Tuple[str, str], clock: Clock, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    with opened(paths, clock) as registry:
        copies = registry.back_up(str(folder))
        rotate(registry, clock)
    ages = [sql(path, "SELECT count(*) FROM signing_key")[0][0] for path in (copies[0], paths[0])]
    seen, left, n = [], set(), 0
    killed = True
    while killed:
        n += 1
        killed = killed_at(
            n, lambda: open_registry(*paths, clock.ms), lambda it: it.back_up(str(folder))
        )
        left |= set(os.listdir(folder))
        assert sql(copies[0], "PRAGMA integrity_check") == [("ok",)]
        seen += sql(copies[0], "SELECT count(*) FROM signing_key")[0]
        kids = {kid for (kid,) in sql(copies[0], "SELECT kid FROM signing_key")}
        assert kids <= set(hostenroll.load_keyring(copies[1]).kids)
    assert ages == [1, 2] and seen == sorted(seen) and set(seen) == {1, 2}
    assert n > 15 and {"hostenroll.db.tmp", "hostenroll.key.tmp"} <= left
    assert sorted(os.listdir(folder)) == ["hostenroll.db", "hostenroll.key"]
    assert_sound(copies)


def restored(paths: Tuple[str, str], copies: Tuple[str, str]) -> None:
    """Put a backup in the place of a database: what lies in its log is of another life."""
    _lose(paths[0])
    for source, target in zip(copies, paths):
        shutil.copy(source, target)


def test_a_database_that_was_replaced_is_not_spoilt_by_who_closes_the_old_one(
    paths: Tuple[str, str], clock: Clock, tmp_path: Path
) -> None:
    """Its WAL would be taken for that of the new one: it holds what came after the backup."""
    (folder := tmp_path / "copy").mkdir()
    with opened(paths, clock) as registry:
        early, _ = came_in(registry, clock)
        copies = registry.back_up(str(folder))
        late, _ = came_in(registry, clock, "late")
        os.link(paths[0], tmp_path / "old.db")
        os.replace(copies[0], paths[0])
    assert not os.path.exists(paths[0] + "-wal")
    assert sql(paths[0], "SELECT id FROM host") == [(early,)]
    assert set(sql(str(tmp_path / "old.db"), "SELECT id FROM host")) == {(early,), (late,)}
    with opened(paths, clock) as registry:
        assert_sound(paths)


@pytest.mark.parametrize("keys", ["of the backup", "kept"])
def test_a_backup_that_is_restored_brings_back_its_day(
    keys: str, paths: Tuple[str, str], clock: Clock, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    with opened(paths, clock) as registry:
        do(registry, clock, lambda now: registry.start_service("http://x", now))
        door = ApiDoor(registry, clock)
        early, shut = (enrolled(door, name) for name in ("early", "shut"))
        for host in (early, shut):
            door.beat(host["credential"])
        waiting = door.token()
        copies = registry.back_up(str(folder))
        late = enrolled(door, "late")
        door.beat(late["credential"])
        assert door.revoke(shut["hostId"]).status == 200
        assert door.enroll(waiting).status == 201
        if keys == "kept":
            rotate(registry, clock)
            renewed = door.beat(early["credential"]).document["credential"]
            assert door.beat(renewed).status == 200
    clock.advance(3600)
    kept = Path(paths[1]).read_bytes()
    restored(paths, copies)
    if keys == "kept":
        Path(paths[1]).write_bytes(kept)
    with opened(paths, clock) as registry:
        do(registry, clock, lambda now: registry.start_service("http://x", now))
        door = ApiDoor(registry, clock)
        assert door.host(early["hostId"]).document["status"] == "online"  # the pause is nobody's
        assert door.beat(early["credential"]).status == 200
        assert door.beat(shut["credential"]).status == 200  # its revocation is undone
        gone = door.beat(late["credential"])
        assert (gone.status, gone.code) == (410, "host-unknown")
        if keys == "kept":
            assert door.beat(renewed).status == 200
        assert enrolled(door, "late")["hostId"] != late["hostId"]
        do(registry, clock, lambda now: registry.verify_audit(None))
    assert_sound(paths)


def test_a_host_re_enrolls_also_when_the_database_has_forgotten_its_last_serials(
    paths: Tuple[str, str], clock: Clock, tmp_path: Path
) -> None:
    """Restored from a backup, the database has issued fewer than the host has used."""
    folder = tmp_path / "copy"
    folder.mkdir()
    with opened(paths, clock, credential_ttl=300) as registry:
        number, credential = came_in(registry, clock)
        beat(registry, clock, credential)
        copies = registry.back_up(str(folder))
        for _ in range(5):
            clock.advance(250)
            credential = beat(registry, clock, credential).grant.credential
        beat(registry, clock, credential)
    restored(paths, copies)
    with opened(paths, clock, credential_ttl=300) as registry:
        beat(registry, clock, credential)
        order = hostenroll.TokenOrder()
        text = do(registry, clock, lambda now: registry.reenroll(OPERATOR, number, order, now))[1]
        arrival = hostenroll.Applicant(text, "web-1", idempotency_key="k")
        for _ in range(2):
            fresh = do(registry, clock, lambda now: registry.enroll(arrival, now)).grant.credential
        beat(registry, clock, fresh)
        with pytest.raises(hostenroll.CredentialSuperseded):
            beat(registry, clock, credential)


# What check looks at.


def verdicts(paths: Tuple[str, str]) -> Dict[str, bool]:
    return {finding.name: finding.is_good for finding in hostenroll.examine(*paths)}


SOUND = dict.fromkeys(("schema", "integrity", "sqlite", "keys", "audit", "modes"), True)


def test_a_fresh_pair_and_one_in_use_are_sound(
    registry: Registry, clock: Clock, paths: Tuple[str, str]
) -> None:
    assert verdicts(paths) == SOUND
    came_in(registry, clock)
    assert verdicts(paths) == SOUND
    came_in(registry, clock)
    registry.close()
    before = [Path(path).read_bytes() for path in paths]
    assert verdicts(paths) == SOUND
    assert [Path(path).read_bytes() for path in paths] == before


def _tamper(paths: Tuple[str, str]) -> None:
    sql(paths[0], "DROP TRIGGER audit_is_never_changed")
    sql(paths[0], "UPDATE audit SET actor = 'cli:mallory' WHERE number = 2")


UNSOUND: Dict[str, Tuple[Callable[[Tuple[str, str]], Any], Dict[str, Optional[bool]], str]] = {
    "a row that lacks its host": (
        lambda paths: sql(paths[0], "INSERT INTO heartbeat VALUES (5, 0, 1, 1, 1)"),
        {"integrity": False}, "heartbeat"),
    "an index that lacks a row": (
        lambda paths: _unindex(paths[0]), {"integrity": False}, "host_token"),
    "no key file": (lambda paths: os.unlink(paths[1]), {"keys": False, "audit": None}, "key file"),
    "a key file that is none": (
        lambda paths: Path(paths[1]).write_text("[]"), {"keys": False, "audit": None}, "JWK"),
    "another's key file": (
        lambda paths: _other_key_file(paths), {"keys": False, "audit": None}, "not the key file"),
    "a key file that others can read": (
        lambda paths: os.chmod(paths[1], 0o640), {"keys": False, "audit": None}, "chmod 600"),
    "a database that others can read": (
        lambda paths: os.chmod(paths[0], 0o604), {"modes": False}, "chmod 600"),
    "an audit log that was changed": (_tamper, {"audit": False, "integrity": False}, "event 2 "),
    "an audit log that lacks an event": (
        lambda paths: (sql(paths[0], "DROP TRIGGER audit_is_only_pruned"),
                       sql(paths[0], "DELETE FROM audit WHERE number = 1")),
        {"audit": False, "integrity": False}, "event 1 "),
}  # fmt: skip


def _unindex(path: str) -> None:
    """As SQLite leaves it that was cut short: a row without its entry in an index."""
    (text,) = sql(path, "SELECT sql FROM sqlite_master WHERE name = 'host_token'")[0]
    sql(path, "DROP INDEX host_token")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(text + " WHERE id < 0")
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'host_token'", (text,))


@pytest.mark.parametrize("spoil, verdict, word", UNSOUND.values(), ids=UNSOUND)
def test_what_is_unsound_is_found_and_nothing_is_changed(
    spoil: Callable[[Tuple[str, str]], Any],
    verdict: Dict[str, Optional[bool]],
    word: str,
    paths: Tuple[str, str],
    clock: Clock,
) -> None:
    with opened(paths, clock) as registry:
        came_in(registry, clock)
    spoil(paths)
    before = [Path(path).read_bytes() if os.path.exists(path) else None for path in paths]
    findings = hostenroll.examine(*paths)
    expected = {name: good for name, good in {**SOUND, **verdict}.items() if good is not None}
    assert {finding.name: finding.is_good for finding in findings} == expected
    assert any(word in finding.detail for finding in findings if not finding.is_good)
    after = [Path(path).read_bytes() if os.path.exists(path) else None for path in paths]
    assert after == before
    assert is_free(paths)


def _spoil_pages(path: str) -> None:
    data = bytearray(Path(path).read_bytes())
    for start in range(4096, len(data), 4096):
        data[start : start + 64] = b"\xff" * 64
    Path(path).write_bytes(bytes(data))


UNFIT: Dict[str, Tuple[Callable[[str], Any], str]] = {
    "not there": (_lose, "no database"),
    "empty": (lambda path: os.truncate(path, 0), "empty"),
    "of another program": (
        lambda path: (_lose(path), sql(path, "CREATE TABLE t (x)")), "another program"),
    "of a newer version": (_newer, "newer"),
    "no database at all": (lambda path: Path(path).write_bytes(b"text\n" * 999), "not a database"),
    "a folder": (lambda path: (_lose(path), os.mkdir(path)), "not a file"),
    "of torn pages": (_spoil_pages, "malformed"),
}  # fmt: skip


@pytest.mark.parametrize("spoil, word", UNFIT.values(), ids=UNFIT)
def test_what_cannot_be_looked_at_is_said_in_one_line_and_left_as_it_is(
    spoil: Callable[[str], Any], word: str, paths: Tuple[str, str], clock: Clock
) -> None:
    open_registry(*paths, clock.ms).close()
    spoil(paths[0])
    before = Path(paths[0]).read_bytes() if os.path.isfile(paths[0]) else None
    there, key = os.path.exists(paths[0]), Path(paths[1]).read_bytes()
    try:
        bad = [finding.detail for finding in hostenroll.examine(*paths) if not finding.is_good]
        said = "; ".join(bad)
    except hostenroll.OperatorError as error:
        said = str(error)
        assert paths[0] in said
    assert word in said and "\n" not in said
    assert os.path.exists(paths[0]) == there and Path(paths[1]).read_bytes() == key
    assert (Path(paths[0]).read_bytes() if os.path.isfile(paths[0]) else None) == before


def test_a_database_of_the_first_version_is_looked_at_and_not_brought_up(
    paths: Tuple[str, str], clock: Clock
) -> None:
    old_fleet(paths, clock)
    before = Path(paths[0]).read_bytes()
    findings = {finding.name: finding for finding in hostenroll.examine(*paths)}
    assert not findings["schema"].is_good and "1" in findings["schema"].detail
    assert f"brings it to {hostenroll.SCHEMA_VERSION}" in findings["schema"].detail
    assert all(finding.is_good for name, finding in findings.items() if name != "schema")
    assert Path(paths[0]).read_bytes() == before
    open_registry(*paths, clock.ms).close()
    assert_sound(paths)


def test_a_database_in_another_journal_mode_is_looked_at_as_it_is(
    paths: Tuple[str, str], clock: Clock
) -> None:
    """A copy that another tool made."""
    open_registry(*paths, clock.ms).close()
    sql(paths[0], "PRAGMA journal_mode = DELETE")
    before = Path(paths[0]).read_bytes()
    assert verdicts(paths) == SOUND
    assert Path(paths[0]).read_bytes() == before


def test_an_audit_log_that_is_pruned_while_it_is_looked_at_is_sound(
    paths: Tuple[str, str], clock: Clock
) -> None:
    with opened(paths, clock, audit_keep=86400) as registry:
        for _ in range(5):
            token_of(registry, clock)
        clock.advance(3 * 86400)
        token_of(registry, clock)
        looked: List[bool] = []

        class Anchored(hostenroll.Store):
            def anchor(self) -> Any:
                found = super().anchor()
                if not looked:
                    looked.append(True)
                    do(registry, clock, lambda now: registry.keep_house(now))
                return found

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(hostenroll, "Store", Anchored)
            assert verdicts(paths) == SOUND
        assert looked and look(registry, "SELECT count(*) FROM audit_anchor") == [(1,)]


@pytest.mark.parametrize("suffix", ["-wal", "-shm", ".gate", ".lock"])
def test_what_lies_beside_the_database_is_for_its_owner_alone_too(
    suffix: str, registry: Registry, clock: Clock, paths: Tuple[str, str]
) -> None:
    came_in(registry, clock)
    os.chmod(paths[0] + suffix, 0o640)
    if suffix in (".gate", ".lock"):  # whoever opens a lock puts its mode right
        assert verdicts(paths) == SOUND
        assert stat.S_IMODE(os.stat(paths[0] + suffix).st_mode) == 0o600
        return
    findings = {finding.name: finding for finding in hostenroll.examine(*paths)}
    assert {name for name, finding in findings.items() if not finding.is_good} == {"modes"}
    assert findings["modes"].detail == f"chmod 600 {paths[0]}{suffix}"
    os.chmod(paths[0] + suffix, 0o600)
    assert verdicts(paths) == SOUND


def log_of(registry: Registry) -> List[Any]:
    """The audit log, event after event."""
    rows = look(registry, "SELECT * FROM audit ORDER BY number")
    return [hostenroll.Event(*row) for row in rows]


def refusals_of(registry: Registry, code: str) -> List[Any]:
    return [event for event in log_of(registry) if event.code == code]


def detail_of(event: Any) -> Any:
    return json.loads(event.detail)


def keep_house(registry: Registry, clock: Clock) -> None:
    do(registry, clock, registry.keep_house)


# Tokens that have ended.

TOKEN_KEPT = 30 * 86400


def _end(*events: Any) -> Callable[[Registry, Clock, int, str], None]:
    """What becomes of a token, and after how many seconds."""

    def live(registry: Registry, clock: Clock, number: int, text: str) -> None:
        for at, what in events:
            clock.now = NOON + at
            if what == "use":
                arrival = hostenroll.Applicant(text, "web-1")
                do(registry, clock, lambda now, a=arrival: registry.enroll(a, now))
            else:
                do(registry, clock, lambda now: registry.revoke_token(OPERATOR, number, now))

    return live


ENDS: Dict[str, Tuple[int, Callable[..., None], int]] = {
    "expired": (1, _end(), 3600),
    "used": (1, _end((100, "use")), 100),
    "revoked": (1, _end((50, "revoke")), 50),
    "used, then revoked": (1, _end((100, "use"), (200, "revoke")), 200),
    "revoked after its hour": (1, _end((5000, "revoke")), 5000),
    "used twice of three, then expired": (3, _end((10, "use"), (20, "use")), 3600),
    "used three times of three": (3, _end((10, "use"), (20, "use"), (30, "use")), 30),
    "used once of three, then revoked": (3, _end((10, "use"), (40, "revoke")), 40),
}


@pytest.mark.parametrize("uses, live, ended", ENDS.values(), ids=ENDS)
def test_a_token_is_kept_for_thirty_days_after_its_end(
    uses: int, live: Callable[..., None], ended: int, registry: Registry, clock: Clock
) -> None:
    text = token_of(registry, clock, max_uses=uses)
    number = int(text.split("_")[1], 16)
    live(registry, clock, number, text)
    clock.now = NOON + ended + TOKEN_KEPT - 1
    for _ in range(2):
        keep_house(registry, clock)
    assert do(registry, clock, lambda now: registry.token(OPERATOR, number, now)).state != "valid"
    clock.now = NOON + ended + TOKEN_KEPT
    keep_house(registry, clock)
    with pytest.raises(hostenroll.NotFound):
        do(registry, clock, lambda now: registry.token(OPERATOR, number, now))
    # What came in by it stays, and still says by which.
    hosts = do(registry, clock, lambda now: registry.hosts(OPERATOR, hostenroll.HostQuery(), now))
    assert {view.host.token_id for view in hosts.items} <= {number}
    assert all(registry.host(OPERATOR, view.host.id, clock.ms) for view in hosts.items)
    with pytest.raises(hostenroll.TokenUnknown):
        do(registry, clock, lambda now: registry.enroll(hostenroll.Applicant(text, "web-1"), now))


def test_however_many_tokens_have_ended_a_few_go_each_time_and_the_living_stay(
    registry: Registry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostenroll, "PRUNED_AT_ONCE", 50)
    kept = []
    for n in range(130):
        living = n % 10 == 7
        ttl = TOKEN_KEPT if living else 60
        text = token_of(registry, clock, ttl=ttl)
        kept += [int(text.split("_")[1], 16)] if living else []
        clock.advance(0.001)
    count = "SELECT count(*) FROM token"
    clock.now = NOON + TOKEN_KEPT + 60 - 1
    keep_house(registry, clock)
    assert look(registry, count) == [(130,)]
    clock.now = NOON + TOKEN_KEPT + 62
    left = []
    for _ in range(4):
        keep_house(registry, clock)
        left.append(look(registry, count)[0][0])
    assert left == [85, 58, 13, 13]  # the first 50 had been looked at before
    assert [number for (number,) in look(registry, "SELECT id FROM token ORDER BY id")] == kept
    late = token_of(registry, clock)
    keep_house(registry, clock)
    assert do(registry, clock, lambda now: registry.token(OPERATOR, int(late[4:20], 16), now))


# Two machines of one name.


def twin_of(registry: Registry, clock: Clock, number: int) -> Sequence[str]:
    """The warnings of a host."""
    warnings = do(registry, clock, lambda now: registry.host(OPERATOR, number, now), False).warnings
    listed = do(registry, clock, lambda now: registry.hosts(OPERATOR, hostenroll.HostQuery(), now))
    assert [v.warnings for v in listed.items if v.host.id == number] == [warnings]
    return list(warnings)


def _beats(registry: Registry, clock: Clock, number: int, credential: str) -> None:
    beat(registry, clock, credential)


def _goes_silent(seconds: float) -> Callable[..., None]:
    def act(registry: Registry, clock: Clock, number: int, credential: str) -> None:
        beat(registry, clock, credential)
        clock.advance(seconds)

    return act


def _is(method: str) -> Callable[..., None]:
    def act(registry: Registry, clock: Clock, number: int, credential: str) -> None:
        do(registry, clock, lambda now: getattr(registry, method)(OPERATOR, number, now))

    return act


def _nothing(*_: Any) -> None:
    pass


TWINS: Dict[str, Tuple[str, Callable[..., None], str, bool]] = {
    "pending": ("web-1", _nothing, "default", True),
    "online": ("web-1", _beats, "default", True),
    "in other letters": ("WEB-1", _beats, "default", True),
    "with a final dot": ("web-1.", _beats, "default", True),
    "to the last second": ("web-1", _goes_silent(100), "default", True),
    "offline": ("web-1", _goes_silent(101), "default", False),
    "missing": ("web-1", _goes_silent(8 * 86400), "default", False),
    "revoked": ("web-1", _is("revoke_host"), "default", False),
    "deleted": ("web-1", _is("delete_host"), "default", False),
    "another name": ("web-10", _beats, "default", False),
    "a longer name": ("web-1.lan", _beats, "default", False),
    "another organization's": ("web-1", _beats, "a-team", False),
}


@pytest.mark.parametrize("again", [False, True], ids=["enrolls", "re-enrolls"])
@pytest.mark.parametrize("name, becomes, organization, warns", TWINS.values(), ids=TWINS)
def test_a_machine_of_a_live_hosts_name_comes_in_with_a_warning(
    name: str,
    becomes: Callable[..., None],
    organization: str,
    warns: bool,
    again: bool,
    teams: Registry,
    clock: Clock,
) -> None:
    registry = teams
    old, credential = came_in(registry, clock, name, organization=organization)
    becomes(registry, clock, old, credential)
    if again:
        new, _ = came_in(registry, clock, "web-2")
        assert twin_of(registry, clock, new) == []
        order = hostenroll.TokenOrder()
        text = do(registry, clock, lambda now: registry.reenroll(OPERATOR, new, order, now))[1]
        arrival = hostenroll.Applicant(text, "web-1")
        do(registry, clock, lambda now: registry.enroll(arrival, now))
    else:
        new, _ = came_in(registry, clock, "Web-1")
    event = log_of(registry)[-1]
    assert (event.action, event.subject) == (
        "re-enroll" if again else "enroll", f"host:{hostenroll.id_text(new)}")  # fmt: skip
    twin = hostenroll.id_text(old) if warns else None
    assert detail_of(event).get("sameHostnameAs") == twin
    warnings = twin_of(registry, clock, new)
    assert len(warnings) == int(warns)
    assert not warns or hostenroll.id_text(old) in warnings[0]
    if organization == "default" and becomes in (_beats, _nothing) and warns:
        assert twin_of(registry, clock, old) == []


@pytest.mark.parametrize("end", ["revoke_host", "delete_host"])
def test_a_warning_ends_with_the_other_host(end: str, registry: Registry, clock: Clock) -> None:
    old, _ = came_in(registry, clock)
    new, _ = came_in(registry, clock)
    assert len(twin_of(registry, clock, new)) == 1
    _is(end)(registry, clock, old, "")
    assert twin_of(registry, clock, new) == []
    if end == "revoke_host":
        _is("restore_host")(registry, clock, old, "")
        assert len(twin_of(registry, clock, new)) == 1


def test_a_host_that_re_enrolls_is_not_its_own_double(registry: Registry, clock: Clock) -> None:
    number, _ = came_in(registry, clock)
    other, _ = came_in(registry, clock)
    assert len(twin_of(registry, clock, other)) == 1
    _is("revoke_host")(registry, clock, number, "")
    order = hostenroll.TokenOrder()
    text = do(registry, clock, lambda now: registry.reenroll(OPERATOR, other, order, now))[1]
    do(registry, clock, lambda now: registry.enroll(hostenroll.Applicant(text, "web-1"), now))
    _is("restore_host")(registry, clock, number, "")
    assert twin_of(registry, clock, other) == []  # it was looked at anew
    assert "sameHostnameAs" not in detail_of(
        [event for event in log_of(registry) if event.action == "re-enroll"][-1]
    )


# The audit log.


def test_plain_heartbeats_leave_no_trace_in_the_log(registry: Registry, clock: Clock) -> None:
    _, credential = came_in(registry, clock)
    it = plain(registry, credential, clock)
    before = log_of(registry)
    for _ in range(5):
        clock.advance(30)
        assert registry.tick([it], clock.ms) == [clock.ms]
        beat(registry, clock, credential)
        beat(registry, clock, credential, os=f"linux {clock.now}")
        keep_house(registry, clock)
    assert log_of(registry) == before


def test_what_changes_nothing_is_no_event(registry: Registry, clock: Clock) -> None:
    number, _ = came_in(registry, clock)
    token = int(token_of(registry, clock)[4:20], 16)
    key = int(make_api_key(registry, clock).split("_")[1], 16)
    acts = [
        lambda now: registry.revoke_host(OPERATOR, number, now),
        lambda now: registry.revoke_token(OPERATOR, token, now),
        lambda now: registry.revoke_api_key(OPERATOR, key, now),
        lambda now: registry.restore_host(OPERATOR, number, now),
    ]
    for act in acts:
        before = len(log_of(registry))
        for _ in range(3):
            do(registry, clock, act)
        assert len(log_of(registry)) == before + 1
    before = len(log_of(registry))
    do(registry, clock, lambda now: registry.edit_host(OPERATOR, number, {}, now))
    assert len(log_of(registry)) == before


EDITS = {
    "a name": {"name": "front"},
    "labels": {"labels": {"rack": "b4"}},
    "both": {"name": "front", "labels": {"rack": "b4", "row": "2"}},
    "no labels": {"labels": {}},
}


@pytest.mark.parametrize("changes", EDITS.values(), ids=EDITS)
def test_an_edit_says_what_it_changes(
    changes: Dict[str, Any], registry: Registry, clock: Clock
) -> None:
    number, _ = came_in(registry, clock, labels={"a": "1"})
    do(registry, clock, lambda now: registry.edit_host(OPERATOR, number, changes, now))
    assert detail_of(log_of(registry)[-1]) == changes


def test_an_act_that_is_refused_leaves_no_event_but_the_refusal(
    registry: Registry, clock: Clock
) -> None:
    number, _ = came_in(registry, clock)
    order = hostenroll.TokenOrder()
    text = do(registry, clock, lambda now: registry.reenroll(OPERATOR, number, order, now))[1]
    do(registry, clock, lambda now: registry.revoke_host(OPERATOR, number, now))
    arrival = hostenroll.Applicant(text, "web-1", address="192.0.2.7")

    def half(now: int) -> None:
        registry.mint(OPERATOR, order, now)
        registry.add_organization(OPERATOR, "half", now)
        raise hostenroll.Forbidden().concerning("alice", "alice", None, request="POST /x")

    def broken(now: int) -> None:
        registry.mint(OPERATOR, order, now)
        raise ValueError("a defect")

    before = log_of(registry)
    acts = [
        Act(half),
        Act(lambda now: registry.enroll(arrival, now)),
        Act(broken),
        Act(lambda now: registry.add_organization(OPERATOR, "default", now)),
        Act(lambda now: registry.delete_host(OPERATOR, 1, now)),
        Act(lambda now: registry.add_organization(OPERATOR, "whole", now)),
    ]
    outcome = registry.tick(acts, clock.ms) or []
    assert [isinstance(it, Problem) for it in outcome] == [True] * 5 + [False]
    written = [(event.action, event.code, event.actor) for event in log_of(registry)[len(before) :]]
    assert written == [
        ("refuse", "forbidden", "alice"),
        ("refuse", "host-revoked", f"token:{text.split('_')[1]}"),
        ("add", None, "cli:test"),
    ]


_many = itertools.cycle(f"192.0.2.{n}" for n in range(200))  # addresses, to be told 401 still


def _bad_key(writes: bool) -> Callable[[Registry, Clock], None]:
    def attempt(registry: Registry, clock: Clock) -> None:
        asked = "hak_junk", "GET /x", next(_many)
        with pytest.raises(hostenroll.ApiKeyInvalid):
            do(registry, clock, lambda now: registry.identify(*asked, now), writes)

    return attempt


def _bad_credential(registry: Registry, clock: Clock) -> None:
    origin = hostenroll.Origin("192.0.2.9", "1-1")
    registry.refused(hostenroll.CredentialInvalid(), origin, clock.ms)


def _gone(registry: Registry, clock: Clock) -> None:
    standing = hostenroll.Standing(1, "default", registry.keyring.first.kid)
    outcome = registry.tick([(1 << 40, standing)], clock.ms) or []
    assert isinstance(outcome[0], hostenroll.HostUnknown)


def _bad_token(registry: Registry, clock: Clock) -> None:
    arrival = hostenroll.Applicant("het_junk", "web-1", address=next(_many))
    with pytest.raises(hostenroll.TokenUnknown):
        do(registry, clock, lambda now: registry.enroll(arrival, now))


FLOODS: Dict[str, Tuple[str, Callable[[Registry, Clock], None]]] = {
    "in acts that write": ("api-key-invalid", _bad_key(True)),
    "in acts that read": ("api-key-invalid", _bad_key(False)),
    "at admission": ("credential-invalid", _bad_credential),
    "in plain heartbeats": ("host-unknown", _gone),
    "at enrollment": ("token-unknown", _bad_token),
}


@pytest.mark.parametrize("code, attempt", FLOODS.values(), ids=FLOODS)
def test_of_a_flood_sixty_refusals_a_minute_are_written_and_the_others_counted(
    code: str, attempt: Callable[[Registry, Clock], None], registry: Registry, clock: Clock
) -> None:
    for n in range(150):
        clock.now = NOON + n * 0.25
        attempt(registry, clock)
        if n % 40 == 0:
            keep_house(registry, clock)
    clock.now = NOON + 59.999
    keep_house(registry, clock)
    assert len(refusals_of(registry, code)) == 60
    clock.now = NOON + 60
    keep_house(registry, clock)
    found = refusals_of(registry, code)
    assert len(found) == 61
    assert detail_of(found[-1]) == {"more": 90, "since": hostenroll.rfc3339(int(NOON * 1000))}
    summary = found[-1]
    assert (summary.at, summary.action, summary.actor, summary.address, summary.subject) == (
        clock.ms, "refuse", "anonymous", "", "")  # fmt: skip
    keep_house(registry, clock)
    assert len(refusals_of(registry, code)) == 61
    # A minute begins with its first refusal, and another code has its own.
    clock.advance(100)
    for _ in range(61):
        attempt(registry, clock)
    keep_house(registry, clock)
    assert len(refusals_of(registry, code)) == 121
    registry.refused(hostenroll.TokenUsed(), hostenroll.NOWHERE, clock.ms)
    keep_house(registry, clock)
    assert len(refusals_of(registry, "token-used")) == 1
    # The next minute's first refusal sums up the last's, where nobody kept house meanwhile.
    clock.advance(3600)
    attempt(registry, clock)
    keep_house(registry, clock)
    found = refusals_of(registry, code)
    assert len(found) == 123
    assert [detail_of(event).get("more") for event in found[-2:]] == [1, None]
    assert do(registry, clock, lambda now: registry.verify_audit(None), False)[1] == len(
        log_of(registry)
    )


def test_just_sixty_refusals_need_no_summary(registry: Registry, clock: Clock) -> None:
    for _ in range(60):
        _bad_credential(registry, clock)
    clock.advance(60)
    keep_house(registry, clock)
    assert Api(registry).last_will() is None
    assert [detail_of(event) for event in refusals_of(registry, "credential-invalid")] == [{}] * 60


def test_a_refusal_that_was_answered_is_written_though_a_tick_fails(
    registry: Registry, clock: Clock
) -> None:
    for _ in range(63):
        _bad_credential(registry, clock)
    for _ in range(2):
        with faulty(registry, only="COMMIT"), pytest.raises(hostenroll.StorageUnavailable):
            keep_house(registry, clock)
    keep_house(registry, clock)
    assert len(refusals_of(registry, "credential-invalid")) == 60
    clock.advance(60)
    with faulty(registry, only="COMMIT"), pytest.raises(hostenroll.StorageUnavailable):
        keep_house(registry, clock)
    keep_house(registry, clock)
    assert detail_of(log_of(registry)[-1]).get("more") == 3


def test_in_a_long_outage_refusals_are_counted_in_bounded_memory(
    registry: Registry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostenroll, "NOTES_MAXIMUM", 100, raising=False)
    for _ in range(6):
        for _ in range(70):
            _bad_credential(registry, clock)
        with faulty(registry, only="COMMIT"), pytest.raises(hostenroll.StorageUnavailable):
            keep_house(registry, clock)
        clock.advance(60)
    for _ in range(2):
        keep_house(registry, clock)
    found = [detail_of(event) for event in refusals_of(registry, "credential-invalid")]
    assert sum(said.get("more", 1) for said in found) == 6 * 70
    assert len(found) <= 102


@pytest.mark.parametrize("seed", [1, 2])
def test_every_refusal_is_in_the_log_or_counted_there(
    seed: int, registry: Registry, clock: Clock
) -> None:
    chance = random.Random(seed)
    refused: Dict[str, int] = {}
    for _ in range(400):
        code, attempt = chance.choice(list(FLOODS.values())[: chance.choice([1, 5])])
        attempt(registry, clock)
        refused[code] = refused.get(code, 0) + 1
        clock.now = round(clock.now + chance.choice([0, 0, 0.1, 0.5, chance.choice([1, 90])]), 3)
        if chance.random() < 0.02:
            keep_house(registry, clock)
    will = Api(registry).last_will()
    assert will is None or registry.tick([will], clock.ms)
    assert Api(registry).last_will() is None
    for code, count in refused.items():
        found = refusals_of(registry, code)
        assert sum(detail_of(event).get("more", 1) for event in found) == count, (seed, code)
        singles = [event.at for event in found if "more" not in detail_of(event)]
        for n in range(len(singles) - 121):
            assert singles[n + 121] - singles[n] >= 60_000, (seed, code)


# Of many wrong secrets.


def guesses(
    registry: Registry, clock: Clock, count: int, address: str = "192.0.2.7", kind: str = "het"
) -> List[str]:
    """What so many wrong secrets from an address come to."""
    codes = []
    for _ in range(count):
        text = hostenroll.mint_secret(kind, 1 << 40).text
        arrival = hostenroll.Applicant(text, "web-1", address=address)

        def prove(now: int, text: str = text, arrival: Any = arrival) -> Any:
            if kind == "hak":
                return registry.identify(text, "GET /x", address, now)
            return registry.prove_token(arrival, now)

        with pytest.raises(Problem) as caught:
            origin = hostenroll.Origin(address, "1-1")
            registry.perform(Act(prove, writes=False, origin=origin), clock.ms)
        codes.append(caught.value.code)
    return codes


def test_the_twenty_first_wrong_secret_in_a_minute_is_one_too_many(
    registry: Registry, clock: Clock
) -> None:
    text = token_of(registry, clock, max_uses=5)
    key = make_api_key(registry, clock)
    assert guesses(registry, clock, 10) == ["token-unknown"] * 10
    clock.advance(0.5)
    assert guesses(registry, clock, 10, kind="hak") == ["api-key-invalid"] * 10
    clock.now = NOON + 59.999
    assert guesses(registry, clock, 30) == ["too-many-requests"] * 30
    assert guesses(registry, clock, 30, kind="hak") == ["too-many-requests"] * 30
    # Another address, and whoever has a good secret, is not concerned.
    assert guesses(registry, clock, 1, "192.0.2.8") == ["token-unknown"]
    arrival = hostenroll.Applicant(text, "web-1", address="192.0.2.7")
    assert do(registry, clock, lambda now: registry.enroll(arrival, now)).host.hostname == "web-1"
    by = do(registry, clock, lambda now: registry.identify(key, "", "192.0.2.7", now), False)
    assert by.role == "admin"
    # A minute begins with its first failure, and ends whoever goes on meanwhile.
    clock.now = NOON + 60
    assert guesses(registry, clock, 21) == ["token-unknown"] * 20 + ["too-many-requests"]
    clock.now = NOON  # a clock that is put back forgets
    assert guesses(registry, clock, 1) == ["token-unknown"]


@pytest.mark.parametrize("passed, left", [(0, 60), (0.999, 60), (1, 59), (30, 30), (59.999, 1)])
def test_who_is_told_to_wait_is_told_how_long(
    passed: float, left: int, registry: Registry, clock: Clock
) -> None:
    guesses(registry, clock, hostenroll.FAILURES_ALLOWED)
    clock.now = round(NOON + passed, 3)
    arrival = hostenroll.Applicant("het_junk", "web-1", address="192.0.2.7")
    with pytest.raises(hostenroll.TooManyRequests) as caught:
        do(registry, clock, lambda now: registry.enroll(arrival, now))
    assert caught.value.headers() == (("Retry-After", str(left)),)
    clock.now = NOON + round(passed, 3) + left
    assert guesses(registry, clock, 1) == ["token-unknown"]


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("192.0.2.7", "192.0.2.8", False),
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff:ffff:ffff:ffff", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("::1", "::2", True),
        ("fe80::1%eth0", "fe80::2%eth0", True),
    ],
)
def test_an_ipv6_network_counts_as_one_address(
    one: str, other: str, same: bool, registry: Registry, clock: Clock
) -> None:
    assert guesses(registry, clock, 21, one)[-1] == "too-many-requests"
    assert (guesses(registry, clock, 1, other) == ["too-many-requests"]) is same


def test_whoever_proves_the_secret_is_told_why_it_is_refused(
    registry: Registry, clock: Clock
) -> None:
    used, revoked = token_of(registry, clock), token_of(registry, clock)
    key = make_api_key(registry, clock)
    do(registry, clock, lambda now: registry.enroll(hostenroll.Applicant(used, "web-1"), now))
    number = int(revoked.split("_")[1], 16)
    do(registry, clock, lambda now: registry.revoke_token(OPERATOR, number, now))
    number = int(key.split("_")[1], 16)
    do(registry, clock, lambda now: registry.revoke_api_key(OPERATOR, number, now))
    guesses(registry, clock, 100)
    for text, kind in ((used, hostenroll.TokenUsed), (revoked, hostenroll.TokenRevoked)):
        arrival = hostenroll.Applicant(text, "web-1", address="192.0.2.7")
        for _ in range(2):
            with pytest.raises(kind):
                do(registry, clock, lambda now, it=arrival: registry.enroll(it, now))
    for _ in range(30):  # and is not counted
        who = key, "", "192.0.2.9"
        with pytest.raises(hostenroll.ApiKeyInvalid, match="revoked"):
            do(registry, clock, lambda now, it=who: registry.identify(*it, now), False)


def test_who_has_very_many_addresses_fills_no_memory(registry: Registry, clock: Clock) -> None:
    remembered = hostenroll.FAILING_REMEMBERED
    failures = registry._failures
    for n in range(3 * remembered):
        address = f"2001:db8:{n >> 16:x}:{n & 0xFFFF:x}::1"
        assert failures.judge(hostenroll.TokenUnknown(), address, clock.ms).status == 401
    assert len(failures._windows) == remembered
    # The one whose minute began first is forgotten; who fails again later begins another.
    failures = hostenroll.Failures()
    for n in range(remembered):
        failures.judge(hostenroll.TokenUnknown(), f"2001:db8:0:{n:x}::1", clock.ms)
    clock.advance(60)
    failures.judge(hostenroll.TokenUnknown(), "2001:db8:0:0::1", clock.ms)
    failures.judge(hostenroll.TokenUnknown(), "192.0.2.7", clock.ms)
    assert hostenroll.network_of("2001:db8:0:0::1") in failures._windows
    assert hostenroll.network_of("2001:db8:0:1::1") not in failures._windows


def test_a_flood_of_wrong_secrets_is_a_few_rows_that_count_it_all(
    registry: Registry, clock: Clock
) -> None:
    """One by one as far as they are told 401, and the first that is told to wait."""
    for address in ("192.0.2.7", "192.0.2.8"):
        guesses(registry, clock, 500, address)
    keep_house(registry, clock)
    assert len(refusals_of(registry, "token-unknown")) == 40
    found = refusals_of(registry, "too-many-requests")
    assert [event.address for event in found] == ["192.0.2.7", "192.0.2.8"]
    assert [detail_of(event) for event in found] == [{"hostname": "web-1"}] * 2
    clock.advance(60)
    keep_house(registry, clock)
    *_, event = refusals_of(registry, "too-many-requests")
    assert (detail_of(event)["more"], event.address) == (2 * 479, "")


# Its chain.


@pytest.fixture
def chronicle(registry: Registry, clock: Clock) -> Registry:
    """A registry with a few events of each kind."""
    number, _ = came_in(registry, clock)
    clock.advance(1)
    do(registry, clock, lambda now: registry.edit_host(OPERATOR, number, {"name": "front"}, now))
    clock.advance(1)
    _bad_token(registry, clock)
    clock.advance(1)
    do(registry, clock, lambda now: registry.revoke_host(OPERATOR, number, now))
    make_api_key(registry, clock)
    do(registry, clock, lambda now: registry.add_organization(OPERATOR, "berlin", now))
    assert len(log_of(registry)) == 7
    return registry


def verified(registry: Registry, clock: Clock, head: Optional[bytes] = None) -> Any:
    return do(registry, clock, lambda now: registry.verify_audit(head), False)


@contextlib.contextmanager
def forging(registry: Registry) -> Iterator[Any]:
    """What somebody does who has the database, and not the keys."""
    connection = connection_of(registry)
    triggers = look(registry, "SELECT name FROM sqlite_master WHERE type = 'trigger'")
    for (name,) in triggers:
        connection.execute(f"DROP TRIGGER {name}")
    yield connection


def renumber(connection: Any, numbers: Dict[int, int]) -> None:
    """Move rows of the log, all at once."""
    for old in numbers:
        connection.execute("UPDATE audit SET number = ? WHERE number = ?", (1000 + old, old))
    for old, new in numbers.items():
        connection.execute("UPDATE audit SET number = ? WHERE number = ?", (new, 1000 + old))


def test_the_log_is_verified_from_its_first_event_to_its_head(
    chronicle: Registry, clock: Clock
) -> None:
    log = log_of(chronicle)
    assert [event.number for event in log] == list(range(1, 8))
    assert verified(chronicle, clock)[:4] == (1, 7, log[-1].mac, False)
    for event in log:
        assert verified(chronicle, clock, event.mac)[:4] == (1, 7, log[-1].mac, True)
    assert verified(chronicle, clock, b"\0" * 32)[3] is False
    assert len({event.mac for event in log}) == 7


COLUMNS: Dict[str, Sequence[Any]] = {
    "at": (0, 1_800_000_000_001, 1.5, "noon"),
    "action": ("", "enrol", b"enroll"),
    "actor": ("", "cli:other", b"cli:test"),
    "address": ("192.0.2.1", b""),
    "organization_id": (None, "", "berlin", "null", b"default"),
    "subject": ("", "host:0000000000000000", b"\xff"),
    "code": ("", "null", "forbidden", b"x"),
    "detail": ("", "{}", '{ "a": 1}', "no JSON", b"{}"),
    "mac": (b"", b"\0" * 32, b"\0" * 33, "", "text"),
}


@pytest.mark.parametrize("column", COLUMNS)
def test_no_column_of_an_event_can_be_changed(
    column: str, chronicle: Registry, clock: Clock
) -> None:
    log = log_of(chronicle)
    with forging(chronicle) as connection:
        for number in (1, 4, 7):
            original = getattr(log[number - 1], column)
            said = f"event {number} .* not as it was"
            for value in (other for other in COLUMNS[column] if other != original):
                change = f"UPDATE audit SET {column} = ? WHERE number = ?"
                connection.execute(change, (value, number))
                with pytest.raises(hostenroll.OperatorError, match=said):
                    verified(chronicle, clock)
                connection.execute(change, (original, number))
    assert verified(chronicle, clock)[:2] == (1, 7)


INSERT_COPY = """INSERT INTO audit SELECT {number}, at, action, actor, address, organization_id,
    subject, code, detail, {mac} FROM audit WHERE number = 3"""
FORGERIES: Dict[str, Tuple[Callable[[Any], Any], str]] = {
    "the first is missing": (lambda db: db.execute("DELETE FROM audit WHERE number = 1"), "1"),
    "one in the middle": (lambda db: db.execute("DELETE FROM audit WHERE number = 4"), "4"),
    "the first, and the rest moved up": (
        lambda db: (
            db.execute("DELETE FROM audit WHERE number = 1"),
            renumber(db, {n: n - 1 for n in range(2, 8)}),
        ),
        "1",
    ),
    "one, and the rest moved up": (
        lambda db: (
            db.execute("DELETE FROM audit WHERE number = 4"),
            renumber(db, {n: n - 1 for n in range(5, 8)}),
        ),
        "4",
    ),
    "two in the other order": (lambda db: renumber(db, {3: 4, 4: 3}), "3"),
    "one at the end": (lambda db: db.execute(INSERT_COPY.format(number=8, mac="mac")), "8"),
    "one at the end without a mac": (
        lambda db: db.execute(INSERT_COPY.format(number=8, mac="x''")), "8"),
    "one in the middle, the rest moved down": (
        lambda db: (
            renumber(db, {n: n + 1 for n in range(4, 8)}),
            db.execute(INSERT_COPY.format(number=4, mac="mac")),
        ),
        "4",
    ),
    "one before the first": (lambda db: db.execute(INSERT_COPY.format(number=0, mac="mac")), "0"),
    "one long before": (lambda db: db.execute(INSERT_COPY.format(number=-9, mac="mac")), "-9"),
    "one far away": (lambda db: db.execute(INSERT_COPY.format(number=99, mac="mac")), "8"),
}  # fmt: skip


@pytest.mark.parametrize("forge, named", FORGERIES.values(), ids=FORGERIES)
def test_no_event_can_be_taken_moved_or_put_in(
    forge: Callable[[Any], Any], named: str, chronicle: Registry, clock: Clock
) -> None:
    with forging(chronicle) as connection:
        forge(connection)
    with pytest.raises(hostenroll.OperatorError, match=f"event {named} "):
        verified(chronicle, clock)


def test_a_tail_that_was_cut_off_shows_only_against_an_earlier_head(
    chronicle: Registry, clock: Clock
) -> None:
    *_, before, last = log_of(chronicle)
    with forging(chronicle) as connection:
        connection.execute("DELETE FROM audit WHERE number = 7")
    assert verified(chronicle, clock, last.mac)[:4] == (1, 6, before.mac, False)
    assert verified(chronicle, clock, before.mac)[:4] == (1, 6, before.mac, True)
    token_of(chronicle, clock)  # and something else written in its place
    assert verified(chronicle, clock, last.mac)[3] is False
    assert verified(chronicle, clock, before.mac)[3] is True


def test_an_event_of_another_past_has_no_place_in_this_one(
    chronicle: Registry, clock: Clock
) -> None:
    """Restored from a backup, the log went on otherwise: both pasts are of the one key."""
    (*_, old) = log_of(chronicle)
    with forging(chronicle) as connection:
        connection.execute("DELETE FROM audit WHERE number = 7")
    for _ in range(2):
        token_of(chronicle, clock)
    assert verified(chronicle, clock)[:2] == (1, 8)
    with forging(chronicle) as connection:
        marks = ", ".join("?" * len(old))
        connection.execute(f"REPLACE INTO audit VALUES ({marks})", old)
    with pytest.raises(hostenroll.OperatorError, match="event 8 "):
        verified(chronicle, clock)


ANCHORS: Dict[str, Callable[[Any, Any], Any]] = {
    "none": lambda db, log: None,
    "its mac, unproved": lambda db, log: db.execute(
        "INSERT INTO audit_anchor VALUES (1, ?, ?, ?)", (4, log[3].mac, b"\0" * 32)
    ),
    "proved by that mac": lambda db, log: db.execute(
        "INSERT INTO audit_anchor VALUES (1, ?, ?, ?)", (4, log[3].mac, log[3].mac)
    ),
    "a proof that is text": lambda db, log: db.execute(
        "INSERT INTO audit_anchor VALUES (1, ?, ?, ?)", (4, log[3].mac, "text")
    ),
    "a mac that is text": lambda db, log: db.execute(
        "INSERT INTO audit_anchor VALUES (1, ?, ?, ?)", (4, "text", b"\0" * 32)
    ),
    "a number that is text": lambda db, log: db.execute(
        "INSERT INTO audit_anchor VALUES (1, ?, ?, ?)", ("four", log[3].mac, b"\0" * 32)
    ),
}


@pytest.mark.parametrize("anchor", ANCHORS.values(), ids=ANCHORS)
def test_the_start_of_the_log_cannot_be_cut_off_by_who_has_no_key(
    anchor: Callable[[Any, Any], Any], chronicle: Registry, clock: Clock
) -> None:
    log = log_of(chronicle)
    with forging(chronicle) as connection:
        connection.execute("DELETE FROM audit WHERE number <= 4")
        anchor(connection, log)
    with pytest.raises(hostenroll.OperatorError, match=r"anchor|event 1 "):
        verified(chronicle, clock)


KEEP = 10 * 86400


def keeping(paths: Tuple[str, str], clock: Clock) -> Any:
    return opened(paths, clock, audit_keep=KEEP)


def test_old_events_go_and_what_is_left_still_verifies(
    paths: Tuple[str, str], clock: Clock
) -> None:
    with keeping(paths, clock) as registry:
        for _ in range(6):
            token_of(registry, clock)
            clock.advance(86400)
        log = log_of(registry)
        clock.now = NOON + KEEP
        keep_house(registry, clock)
        assert log_of(registry) == log  # none is older than that
        clock.advance(0.001)
        keep_house(registry, clock)
        assert log_of(registry) == log[1:]
        assert verified(registry, clock)[:4] == (2, 6, log[-1].mac, False)
        assert verified(registry, clock, log[0].mac)[3] is True  # the anchor's
        clock.now = NOON + KEEP + 3.5 * 86400
        keep_house(registry, clock)
        assert log_of(registry) == log[4:]
        assert verified(registry, clock, log[3].mac)[::3] == (5, True)
        assert verified(registry, clock, log[2].mac)[3] is False
        # An older anchor is no way back, and nothing is put in front of it.
        with forging(registry) as connection:
            connection.execute("DELETE FROM audit WHERE number = 5")
        with pytest.raises(hostenroll.OperatorError, match=r"event 5 .* missing"):
            verified(registry, clock)


def test_a_log_that_is_pruned_to_its_end_goes_on(paths: Tuple[str, str], clock: Clock) -> None:
    with keeping(paths, clock) as registry:
        for _ in range(3):
            token_of(registry, clock)
        last = log_of(registry)[-1]
        clock.advance(KEEP + 1)
        keep_house(registry, clock)
        assert log_of(registry) == []
        assert verified(registry, clock, last.mac)[:4] == (4, 3, last.mac, True)
        token_of(registry, clock)
        assert [event.number for event in log_of(registry)] == [4]
        assert verified(registry, clock)[:2] == (4, 4)
    with opened(paths, clock) as registry:  # without --audit-keep all stay
        clock.advance(100 * KEEP)
        keep_house(registry, clock)
        assert verified(registry, clock)[:2] == (4, 4)


def test_an_event_of_a_clock_that_was_set_is_as_old_as_its_place(
    paths: Tuple[str, str], clock: Clock
) -> None:
    """One that is far ahead does not keep what comes after it, nor is it young or old by itself;
    one that is far behind takes nothing with it that is younger."""
    with keeping(paths, clock) as registry:
        for seconds in (100 * KEEP, -100 * KEEP, 10):
            clock.advance(seconds)
            token_of(registry, clock)
        keep_house(registry, clock)
        assert [event.number for event in log_of(registry)] == [1, 2, 3]
        clock.advance(KEEP + 1)
        token_of(registry, clock)
        keep_house(registry, clock)
        assert [event.number for event in log_of(registry)] == [4]
        clock.advance(-100 * KEEP)
        token_of(registry, clock)
        clock.advance(100 * KEEP)
        keep_house(registry, clock)
        assert [event.number for event in log_of(registry)] == [4, 5]


def test_a_sum_of_refusals_outlives_the_tick_that_it_came_with(
    registry: Registry, clock: Clock
) -> None:
    def refused(now: int) -> None:
        raise hostenroll.Forbidden()

    for _ in range(hostenroll.REFUSALS_AUDITED + 5):
        registry.tick([Act(refused)], clock.ms)
    clock.advance(61)
    registry.audit._notes = [registry.audit._event(0, "refuse", "a", "b", None, "c", {})] * (
        hostenroll.NOTES_MAXIMUM
    )  # so that the tick begins without summing up
    with faulty(registry, only="COMMIT"):
        registry.tick([Act(refused)], clock.ms)
    registry.tick([Act(refused)], clock.ms)
    clock.advance(61)
    registry.tick([Act(refused)], clock.ms)
    details = look(registry, "SELECT detail FROM audit WHERE code = 'forbidden'")
    assert sum(json.loads(detail).get("more", 0) for (detail,) in details) >= 5


def test_many_old_events_go_a_few_at_a_time(paths: Tuple[str, str], clock: Clock) -> None:
    with keeping(paths, clock) as registry:
        order = hostenroll.TokenOrder()
        mint = Act(lambda now: registry.mint(OPERATOR, order, now))
        for _ in range(3):
            registry.tick([mint] * 400, clock.ms)
        clock.advance(KEEP + 1)
        registry.tick([mint], clock.ms)
        left = []
        for _ in range(4):
            keep_house(registry, clock)
            left.append(len(log_of(registry)))
            first, last, *_ = verified(registry, clock)
            assert (first, last) == (1202 - left[-1], 1201)
        assert left[0] >= 1201 - hostenroll.PRUNED_AT_ONCE and left[-1] == 1


OLD_FORGERIES: Dict[str, Callable[[Any], Any]] = {
    "all are made old": lambda db: db.execute("UPDATE audit SET at = 0"),
    "the first few are made old": lambda db: db.execute("UPDATE audit SET at = 0 WHERE number < 4"),
    "all but one that is old": lambda db: (
        db.execute("DELETE FROM audit WHERE number < 7"),
        db.execute("UPDATE audit SET at = 0, mac = zeroblob(32)"),
    ),
}


@pytest.mark.parametrize("forge", OLD_FORGERIES.values(), ids=OLD_FORGERIES)
def test_the_server_does_not_prune_away_what_was_forged(
    forge: Callable[[Any], Any], chronicle: Registry, paths: Tuple[str, str], clock: Clock
) -> None:
    """Else whoever has the database has events pruned, and an anchor proved, by making them old."""
    with forging(chronicle) as connection:
        forge(connection)
    with keeping(paths, clock) as registry:
        keep_house(registry, clock)
        with pytest.raises(hostenroll.OperatorError, match="event 1 "):
            verified(registry, clock)
        token_of(registry, clock)
        keep_house(registry, clock)
        with pytest.raises(hostenroll.OperatorError, match="event 1 "):
            verified(registry, clock)


def test_new_keys_begin_the_log_anew(paths: Tuple[str, str], clock: Clock) -> None:
    with opened(paths, clock) as registry:
        for _ in range(3):
            token_of(registry, clock)
        log = log_of(registry)
    os.unlink(paths[1])
    with opened(paths, clock, init=True) as registry:
        again = log_of(registry)
        assert again[:3] == log
        assert [event.action for event in again[3:]] in (["init"], ["init", "rotate", "retire"])
        assert again[3].number == 4 and again[3].subject == "audit"
        token_of(registry, clock)
        first, last, *_ = verified(registry, clock)
        assert (first, last) == (4, len(log_of(registry)))
        assert verified(registry, clock).unverified == 3
        with forging(registry) as connection:
            connection.execute("UPDATE audit SET actor = 'x' WHERE number = 4")
        with pytest.raises(hostenroll.OperatorError, match="event 4 "):
            verified(registry, clock)


def test_two_that_write_in_turn_keep_one_chain(paths: Tuple[str, str], clock: Clock) -> None:
    with opened(paths, clock) as one, opened(paths, clock) as other:
        for n in range(12):
            token_of((one, other)[n % 3 == 0], clock)
            _bad_credential(one, clock)
        keep_house(one, clock)
        assert verified(one, clock) == verified(other, clock)
        assert verified(one, clock)[:2] == (1, 24)


@pytest.mark.parametrize("way", ["another process", "this one"])
def test_the_next_heartbeat_feels_what_was_done_to_its_host(
    way: str, paths: Tuple[str, str], clock: Clock
) -> None:
    with opened(paths, clock, credential_ttl=300) as registry, opened(paths, clock) as beside:
        other = beside if way == "another process" else registry
        number, credential = came_in(registry, clock)
        it = plain(registry, credential, clock)

        def outcomes() -> List[Any]:
            """Of a plain heartbeat, one with facts, one that is due a renewal, and each again."""
            clock.advance(1)
            found = []
            for facts in ({}, {"os": f"{clock.now}"}):
                found += registry.tick([it] * 2, clock.ms) or []
                try:
                    found.append(beat(registry, clock, credential, **facts).last_seen)
                except Problem as problem:
                    found.append(problem)
            return [it if isinstance(it, int) else it.code for it in found]

        assert outcomes() == [clock.ms] * 6
        for act, expected in (
            ("revoke_host", "host-revoked"),
            ("restore_host", None),
            ("revoke_host", "host-revoked"),
            ("delete_host", "host-unknown"),
        ):
            do(other, clock, lambda now, a=act: getattr(other, a)(OPERATOR, number, now))
            found = outcomes()
            assert found == [expected or clock.ms] * 6, act
            clock.advance(250)


def edit(door: Door, number: str, changes: Dict[str, Any]) -> Reply:
    """PATCH, or what stands behind it."""
    if isinstance(door, RegistryDoor):
        return door._do(
            200,
            lambda now: door.registry.edit_host(OPERATOR, int(number, 16), changes, now),
            hostenroll.host_document,
        )
    return door.call("PATCH", f"/api/hosts/{number}", changes, door.api_key)


def test_an_edit_shows_at_once_and_hinders_no_heartbeat(door: Door) -> None:
    host = enrolled(door, labels={"rack": "b4"})
    before = door.host(host["hostId"]).document
    named = edit(door, host["hostId"], {"name": "K\u00fcche"})
    assert (named.status, named.document) == (200, {**before, "name": "K\u00fcche"})
    assert door.host(host["hostId"]).document == named.document
    assert door.beat(host["credential"], os="linux").status == 200
    again = edit(door, host["hostId"], {"labels": {"a": "1", "b": ""}}).document
    assert (again["name"], again["labels"], again["os"]) == (
        "K\u00fcche", {"a": "1", "b": ""}, "linux")  # fmt: skip
    assert edit(door, host["hostId"], {"labels": {}}).document["labels"] == {}
    door.revoke(host["hostId"])
    assert edit(door, host["hostId"], {"name": "shut out"}).document["status"] == "revoked"
    assert door.beat(host["credential"]).code == "host-revoked"
    door.delete(host["hostId"])
    assert edit(door, host["hostId"], {"name": "x"}).code == "not-found"


def test_a_token_answers_questions(door: Door, clock: Clock) -> None:
    order = {"description": "the cellar", "labels": {"rack": "b4"}, "maxUses": 2}
    minted = door.mint(**order).document
    expected = {key: value for key, value in minted.items() if key != "token"}
    assert door.show_token(minted["id"]).document == expected
    creator = f"api-key:{door.api_key.split('_')[1]}" if hasattr(door, "api_key") else "cli:test"
    assert (minted["state"], minted["createdBy"]) == ("valid", creator)
    assert {name: minted[name] for name in order} == order
    numbers = []
    for n in (1, 2):
        clock.advance(10)
        numbers.insert(0, door.enroll(minted["token"], f"web-{n}").document["hostId"])
        shown = door.show_token(minted["id"]).document
        assert shown == {
            **expected,
            "state": "used" if n == 2 else "valid",
            "uses": n,
            "usedAt": hostenroll.rfc3339(clock.ms),
            "usedFrom": "127.0.0.1" if isinstance(door, SocketDoor) else "192.0.2.7",
            "hosts": numbers,
        }
        assert door.host(numbers[0]).document["labels"] == {"rack": "b4"}
    # The hosts' labels are a copy: what becomes of them is no matter of the token's.
    edit(door, numbers[0], {"labels": {"rack": "c5"}})
    assert door.show_token(minted["id"]).document["labels"] == {"rack": "b4"}
    assert door.host(numbers[1]).document["labels"] == {"rack": "b4"}
    clock.advance(10)
    assert door.enroll(minted["token"]).code == "token-used"
    assert door.show_token(minted["id"]).document == shown  # a refused use is no use
    door.delete(numbers[1])
    assert door.show_token(minted["id"]).document["hosts"] == [numbers[0]]
    door.revoke_token(minted["id"])
    ended = door.show_token(minted["id"]).document
    assert (ended["state"], ended["revokedAt"]) == ("revoked", hostenroll.rfc3339(clock.ms))


@pytest.mark.parametrize(
    ("values", "quantiles"),
    table(
        {
            "nothing": ([], (1, 1, 1)),
            "one value": ([2], (2, 2, 2)),
            "between two bounds, the upper one": ([3.5], (5, 5, 5)),
            "a hundred": (list(range(1, 101)), (50, 99, 100)),
            "a thousand, of which one is slow": ([1] * 999 + [90], (1, 1, 1)),
            "a thousand, of which two are": ([1] * 998 + [90] * 2, (1, 1, 90)),
            "half of them": ([1] * 5 + [7] * 5, (1, 7, 7)),
            "just more than half": ([1] * 5 + [7] * 6, (7, 7, 7)),
            "beyond the last bound": ([1, 101], (1, float("inf"), float("inf"))),
        }
    ),
)
def test_a_quantile_is_the_bound_that_so_many_do_not_exceed(
    values: List[float], quantiles: Tuple[float, float, float]
) -> None:
    bounds = [n for n in range(1, 101) if n != 4]
    histogram = hostenroll.Histogram(bounds)
    for value in values:
        histogram.observe(value)
    assert tuple(histogram.quantile(per_mille) for per_mille in (500, 990, 999)) == quantiles


def test_latencies_are_known_to_one_per_cent_and_never_taken_for_less() -> None:
    assert hostenroll.LATENCY_BUCKETS[0] == pytest.approx(1e-5)
    assert hostenroll.LATENCY_BUCKETS[-1] > hostenroll.BENCH_SECONDS_RANGE[1]
    for value in (0.0000123, 0.001, 0.0499, 0.0501, 12.5, 599.0):
        histogram = hostenroll.Histogram(hostenroll.LATENCY_BUCKETS)
        histogram.observe(value)
        assert value <= histogram.quantile(500) <= value * 1.0101


# 7. Messages


def get(target: bytes = b"/", fields: bytes = b"", version: bytes = b"1.1") -> bytes:
    """A GET; each further field line ends with its CR LF."""
    return b"GET %b HTTP/%b\r\nHost: h\r\n%b\r\n" % (target, version, fields)


def post(fields: bytes, body: bytes = b"") -> bytes:
    return b"POST /x HTTP/1.1\r\nHost: h\r\n%b\r\n\r\n%b" % (fields, body)


def chunked(body: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked", body)


def headed(size: int) -> bytes:
    """A head of so many bytes, with its empty line."""
    bare = len(get(b"/", b"X: \r\n"))
    return get(b"/", b"X: %b\r\n" % (b"a" * (size - bare)))


def hear(pieces: Sequence[bytes]) -> List[Any]:
    """The requests that a reader finds in a stream, and the problem or the state it ends in."""
    reader, heard = RequestReader(), []  # type: RequestReader, List[Any]
    try:
        for piece in pieces:
            request = reader.next(piece)
            while request is not None or reader.is_behind:
                if request is not None:
                    heard.append((request.head, request.authorization, request.body))
                request = reader.next()
    except Problem as problem:
        assert isinstance(problem, hostenroll.Unframed) and problem.closes
        return [*heard, problem.code]
    return [*heard, reader.is_in_body]


KIB = 1024
LAST = b"0\r\n\r\n"
LARGE = b"x" * 64 * KIB
AT_ROOT = [("GET", "/", "", b"")]
SENT, BARE = [("POST", "/x", "", b"{}")], [("POST", "/x", "", b"")]
GOOD = {  # method, path, query, body of each request
    "the least": (b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", AT_ROOT),
    "HTTP/1.0 without Host": (b"GET / HTTP/1.0\r\n\r\n", AT_ROOT),
    "HTTP/1.9, as RFC 9110 section 2.5 has it": (get(version=b"1.9"), AT_ROOT),
    "a method that nobody knows": (
        b"BREW /x HTTP/1.1\r\nHost: h\r\n\r\n", [("BREW", "/x", "", b"")]),
    "path and query": (
        get(b"/a%2Fb/c;d=1?x=%20&y=/?:@"), [("GET", "/a%2Fb/c;d=1", "x=%20&y=/?:@", b"")]),
    "an empty query": (get(b"/?"), AT_ROOT),
    "two slashes": (get(b"//h/x"), [("GET", "//h/x", "", b"")]),
    "absolute-form": (get(b"http://a.test:80/x?y=1"), [("GET", "/x", "y=1", b"")]),
    "absolute-form in capitals": (get(b"HTTPS://A/x"), [("GET", "/x", "", b"")]),
    "absolute-form without a path": (get(b"http://[::1]:8080?y"), [("GET", "/", "y", b"")]),
    "the server as a whole": (
        b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", [("OPTIONS", "*", "", b"")]),
    "no white space at all": (b"GET / HTTP/1.1\r\nHost:h\r\nX:\r\n\r\n", AT_ROOT),
    "white space around values": (post(b"Content-Length: \t 2 \t", b"{}"), SENT),
    "names in any case": (post(b"cOnTeNt-LeNgTh: 2", b"{}"), SENT),
    "zeros before the length": (post(b"Content-Length: 0002", b"{}"), SENT),
    # int() raises for more than 4,300 digits since Python 3.11, and is quadratic before it.
    "5,000 zeros before the length": (post(b"Content-Length: " + b"0" * 5000 + b"2", b"{}"), SENT),
    "nothing but zeros as the length": (post(b"Content-Length: " + b"0" * 5000), BARE),
    "a body for GET": (get(b"/", b"Content-Length: 1\r\n") + b"x", [("GET", "/", "", b"x")]),
    "a body of every byte": (
        post(b"Content-Length: 256", bytes(range(256))), [("POST", "/x", "", bytes(range(256)))]),
    "a body that looks like a request": (
        post(b"Content-Length: 27", get()) + get(b"/2"),
        [("POST", "/x", "", get()), ("GET", "/2", "", b"")]),
    "latin-1 in a value": (get(b"/", b"X: \xe9\xff\r\n"), AT_ROOT),
    "Host with a port": (b"GET / HTTP/1.1\r\nHost: a-b.test:8080\r\n\r\n", AT_ROOT),
    "Host of IPv6": (b"GET / HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n\r\n", AT_ROOT),
    "a field of ours twice, but not a single one": (get(b"/", b"X: 1\r\nX: 2\r\n"), AT_ROOT),
    "chunked": (chunked(b"2\r\n{}\r\n" + LAST), SENT),
    "Chunked": (post(b"Transfer-Encoding: ChunKed", LAST), BARE),
    "chunks": (chunked(b"a\r\n0123456789\r\n009\r\n\r\n0\r\n\r\nab\r\n" + LAST),
               [("POST", "/x", "", b"0123456789\r\n0\r\n\r\nab")]),
    "a chunk's extension": (chunked(b'2;a=b;c="d;\xe9"\r\n{}\r\n0;x\r\n\r\n'), SENT),
    "bad white space in it": (chunked(b'2 ; a = "b\\"" ;c\r\n{}\r\n' + LAST), SENT),
    "a body in small chunks": (
        chunked(b"10\r\n%b\r\n" % (b"x" * 16) * 4096 + LAST),
        [("POST", "/x", "", b"x" * 65_536)],
    ),
    "a size line of 256 bytes": (
        chunked(b"1;" + b"a" * 254 + b"\r\nx\r\n" + LAST), [("POST", "/x", "", b"x")]),
    "zeros as the last size": (chunked(b"00000000\r\n\r\n"), BARE),
    "100 trailers": (chunked(b"0\r\n" + b"X: y\r\n" * 100 + b"\r\n"), BARE),
    "trailers, which change nothing": (
        chunked(b"0\r\nX: y\r\nContent-Length: 9\r\nAuthorization: Bearer x\r\n\r\n"), BARE),
    "the largest body": (post(b"Content-Length: 65536", LARGE), [("POST", "/x", "", LARGE)]),
    "the largest body in chunks": (
        chunked(b"8000\r\n%b\r\n" % (b"x" * 32768) * 2 + LAST), [("POST", "/x", "", LARGE)]),
    "one byte a chunk": (chunked(b"1\r\nx\r\n" * 3000 + LAST), [("POST", "/x", "", b"x" * 3000)]),
    "the largest head": (headed(16 * KIB), AT_ROOT),
    "100 fields": (get(b"/", b"X: y\r\n" * 99), AT_ROOT),
    "100 fields, one of them a credential": (
        get(b"/", b"Authorization: Bearer x\r\n" + b"X: y\r\n" * 98), AT_ROOT),
    "one empty line before": (b"\r\n" + get(), AT_ROOT),
    "an empty line between": (
        get(b"/1") + b"\r\n" + get(b"/2"), [("GET", "/1", "", b""), ("GET", "/2", "", b"")]),
    "several at once": (
        get(b"/1") + post(b"Content-Length: 2", b"{}") + chunked(b"1\r\n!\r\n" + LAST) + get(b"/4"),
        [("GET", "/1", "", b""), *SENT, ("POST", "/x", "", b"!"), ("GET", "/4", "", b"")]),
}  # fmt: skip

MALFORMED = {
    # RFC 9112 section 6.3, and what two readers of a length have disagreed about.
    "two lengths": post(b"Content-Length: 2\r\nContent-Length: 3", b"{}x"),
    "two lengths that agree": post(b"Content-Length: 2\r\nContent-Length: 2", b"{}"),
    "two lengths that agree, apart": post(b"Content-Length: 2\r\nX: y\r\ncontent-length: 2", b"{}"),
    **{
        f"a length of {value!r}": post(b"Content-Length: " + value, b"{}xx")
        for value in (
            b"", b"+4", b"-4", b"-0", b"0_4", b"4,4", b"4, 4", b"4 4", b"0x4", b"4.0", b"4e0",
            b"4;", b'"4"', b"four", b"\xd9\xa4", b"\xef\xbc\x94", b"\xb2", b"4\x0b", b"4\x0c",
            b"\xa04", b"4\x85",
        )
    },
    "a length with NUL": post(b"Content-Length: 4\0", b"{}xx"),
    "TE and CL": post(b"Transfer-Encoding: chunked\r\nContent-Length: 5", LAST),
    "CL and TE": post(b"Content-Length: 5\r\nTransfer-Encoding: chunked", LAST),
    "CL and an unknown TE": post(b"Content-Length: 5\r\nTransfer-Encoding: x", LAST),
    "TE twice": post(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", LAST),
    "TE twice, the first empty": post(b"Transfer-Encoding:\r\nTransfer-Encoding: chunked", LAST),
    "TE in HTTP/1.0": b"POST / HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + LAST,
    "TE with a vertical tab": post(b"Transfer-Encoding: \x0bchunked", LAST),
    "TE in a folded line": post(b"Transfer-Encoding:\r\n chunked", LAST),
    "TE with space at the colon": post(b"Transfer-Encoding : chunked", LAST),
    # RFC 9112 section 2.2: a bare LF or CR is where two readers end a line differently.
    "bare LF everywhere": b"GET / HTTP/1.1\nHost: h\n\n",
    "bare LF after the request line": b"GET / HTTP/1.1\nHost: h\r\n\r\n",
    "bare LF between fields": get(b"/", b"X: y\nContent-Length: 3\r\n"),
    "bare LF at the head's end": b"GET / HTTP/1.1\r\nHost: h\r\n\n\r\n\r\n",
    "bare CR in a value": get(b"/", b"X: y\rContent-Length: 3\r\n"),
    "bare CR in the request line": get(b"/\r"),
    "bare CR before CR LF": get(b"/", b"X: y\r\r\n"),
    "bare CR at the head's end": b"GET / HTTP/1.1\r\nHost: h\r\r\n\r\n",
    "bare LF and another version": b"GET / HTTP/2.0\r\nHost: h\nX: y\r\n\r\n",
    "bare LF and an unknown coding": post(b"Transfer-Encoding: gzip\r\nX: y\nZ: z"),
    "two empty lines before": b"\r\n\r\n" + get(),
    "bare LF before": b"\n" + get(),
    "bare CR before": b"\r" + get(),
    "space before": b" " + get(),
    # RFC 9112 section 5: field lines.
    "a folded value": get(b"/", b"X: y\r\n z\r\n"),
    "a folded value, by a tab": get(b"/", b"X: y\r\n\tz\r\n"),
    "space before the first field": b"GET / HTTP/1.1\r\n Host: h\r\n\r\n",
    "space before the colon": get(b"/", b"X : y\r\n"),
    "a tab before the colon": get(b"/", b"X\t: y\r\n"),
    "no name": get(b"/", b": y\r\n"),
    "no colon": get(b"/", b"X\r\nContent-Length: 3\r\n"),
    "a name that is no token": get(b"/", b"X(y): z\r\n"),
    "a name that is not ASCII": get(b"/", b"\xe9: z\r\n"),
    "NUL in a name": get(b"/", b"X\0: y\r\n"),
    **{
        f"{c!r} in a value": get(b"/", b"X: y%bz\r\n" % c)
        for c in (b"\0", b"\x01", b"\x08", b"\x0b", b"\x1b", b"\x7f")
    },
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "two Hosts": get(b"/", b"Host: h\r\n"),
    "two Hosts in HTTP/1.0": get(b"/", b"host: h\r\n", b"1.0"),
    **{
        f"Host {host!r}": b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host
        for host in (
            b"", b"a b", b"a/b", b"a,b c", b"a@b", b"a:b", b"a:1:2", b"http://a", b"[::1", b"[x]",
            b"::1", b"a?", b"a#", b"a\\b", b"<a>", b"\xe9", b"%zz", b'"',
        )
    },
    "a bad Host in HTTP/1.0": b"GET / HTTP/1.0\r\nHost: a b\r\n\r\n",
    "a bad Host beside absolute-form": b"GET http://a/ HTTP/1.1\r\nHost: a b\r\n\r\n",
    "two credentials": get(b"/", b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\n"),
    "a credential and another scheme": get(
        b"/", b"authorization: Basic a\r\nAuthorization: Bearer b\r\n"),
    "a credential and an empty one": get(b"/", b"Authorization: Bearer b\r\nAuthorization:\r\n"),
    "two credentials and a large body": post(
        b"Authorization: Bearer a\r\nContent-Length: 99999\r\nAuthorization: Bearer b"),
    "two idempotency keys": get(b"/", b"Idempotency-Key: a\r\nidempotency-key: a\r\n"),
    "two expectations": post(
        b"Content-Length: 2\r\nExpect: 100-continue\r\nExpect: 100-continue", b"{}"),
    # RFC 9112 section 3: the request line.
    **{
        f"request line {line!r}": line + b"\r\nHost: h\r\n\r\n"
        for line in (
            b"GET /", b"GET / ", b"GET  / HTTP/1.1", b"GET / HTTP/1.1 ", b"GET /  HTTP/1.1",
            b"GET\t/ HTTP/1.1", b"GET / http/1.1", b"GET / HTTP/1", b"GET / HTTP/1.",
            b"GET / HTTP/1.10", b"GET / HTTP/01.1", b"GET / HTTP/+1.1", b"GET / HTTP 1.1",
            b"GET / HTTPS/1.1", b"GET / \xc9TTP/1.1", b"HTTP/1.1 200 OK", b"G(T / HTTP/1.1",
            b"G\xcbT / HTTP/1.1", b" GET / HTTP/1.1", b"/ HTTP/1.1", b"GET / x HTTP/1.1", b"GET",
        )
    },
    **{
        f"target {target!r}": get(target)
        for target in (
            b"x", b"*", b"?x", b"#", b"/#x", b"/x?y#z", b"/\xe9", b"/%", b"/%4", b"/%zz",
            b"/?%u0041", b"/\\x", b'/"', b"/<", b"/^", b"/`", b"/{", b"/|", b"/[", b"/\0", b"/\x7f",
            b"h:80", b"http:/x", b"http://", b"http:///x", b"http://a b/", b"http://u:p@h/",
            b"http://h:x/", b"http://h/#x", b"http://[::1/", b"ftp://h/", b"file:///etc",
            b"javascript:x", b"xhttp://h/", b"/*?\t",
        )
    },
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(32)),
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "NULs": b"\0" * 64,
    "a proxy's preface": b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + get(),
    # RFC 9112 section 7.1: chunks.
    **{
        f"a chunk's size {size!r}": chunked(size + b"\r\n{}\r\n" + LAST)
        for size in (
            b"", b" 2", b"2 ", b"\t2", b"+2", b"-2", b"0x2", b"2h", b"g", b"2,2", b"0_2", b"2;",
            b"2;;", b"2;=b", b"2;a=", b'2;a="b', b"2;\xff", b"2; ", b"2 x", b"\xd9\xa2", b"2\0",
            b"000000002", b"100000002", b"ffffffffffffffff2", b"2;\0", b"2;a\nb", b"2;a\rb",
            b"2\r", b"2\n", b"2;" + b"a" * 255,
        )
    },
    "a size line that never ends": chunked(b"2;" + b"a" * 300),
    "a chunk longer than its size": chunked(b"2\r\n{}}\r\n" + LAST),
    "a chunk shorter than its size": chunked(b"3\r\n{}\r\n" + LAST),
    "a chunk that ends in LF": chunked(b"2\r\n{}\n" + LAST),
    "LF after a chunk's size": chunked(b"2\n{}\r\n" + LAST),
    "LF after the last chunk": chunked(b"0\n\n"),
    "a chunk without an end": chunked(b"2\r\n{}" + LAST),
    "other bytes where a chunk should end": chunked(b"2\r\n{}xx" + LAST),
    **{
        f"trailer {line!r}": chunked(b"0\r\n" + line + b"\r\n\r\n")
        for line in (
            b"x", b" x: y", b"x : y", b"x: \0", b"x: y\r\n z", b": y", b"x: y\nz: z", b"x: y\rz",
            b"GET / HTTP/1.1", b"x: " + b"y" * 254,
        )
    },
}  # fmt: skip
OTHERWISE = {
    "body-too-large": {
        "a body of 64 KiB and 1": post(b"Content-Length: 65537"),
        "a length of 30 digits": post(b"Content-Length: " + b"9" * 30),
        "a length of 9,000 digits": post(b"Content-Length: 1" + b"0" * 9000),
        "a length near 2**64": post(b"Content-Length: 18446744073709551618", b"{}"),
        "a chunk of 64 KiB and 1": chunked(b"10001\r\n"),
        "a chunk of 4 GiB": chunked(b"ffffffff\r\n"),
        "64 KiB, and a chunk": chunked(b"10000\r\n" + b"x" * 65536 + b"\r\n1\r\n"),
        "very many chunks": chunked(b"1\r\nx\r\n" * 14_000 + LAST),
        "very long extensions": chunked(b"1;%b\r\nx\r\n" % (b"e" * 250) * 300 + LAST),
    },
    "head-too-large": {
        "very many trailers": chunked(b"0\r\n" + b"X: y\r\n" * 101 + b"\r\n"),
        "very long trailers": chunked(b"0\r\n" + b"X: %b\r\n" % (b"y" * 200) * 400 + b"\r\n"),
        "trailers that never end": chunked(b"0\r\n" + b"X: y\r\n" * 101),
        "a head of 16 KiB and 1": headed(16 * KIB + 1),
        "a head of 16 KiB and 4": headed(16 * KIB + 4),
        "a head that never ends": b"GET / HTTP/1.1\r\nX: " + b"a" * 40_000,
        "a request line that never ends": b"GET /" + b"a" * 40_000,
        "a large head before a body of lines": headed(17 * KIB) + b"{\n}\r",
        "101 fields": get(b"/", b"X: y\r\n" * 100),
        "101 fields, one of them a credential": get(
            b"/", b"Authorization: Bearer x\r\n" + b"X: y\r\n" * 99),
    },
    "not-implemented": {
        "CONNECT": b"CONNECT h:80 HTTP/1.1\r\nHost: h:80\r\n\r\n",
        "CONNECT to a path": b"CONNECT / HTTP/1.1\r\nHost: h\r\n\r\n",
        **{
            f"TE {coding!r}": post(b"Transfer-Encoding: " + coding, LAST)
            for coding in (
                b"", b"gzip", b"identity", b"gzip, chunked", b"chunked, gzip", b"chunked, chunked",
                b"chunked,", b",chunked", b"xchunked", b"chunked;q=1", b'"chunked"', b"chunked\xa0",
                b"chunked chunked",
            )
        },
    },
    "http-version": {
        "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        **{
            f"HTTP/{version.decode()}": get(version=version)
            for version in (b"0.9", b"2.0", b"3.0", b"9.9")
        },
    },
    "expectation-failed": {
        "another expectation": post(b"Content-Length: 2\r\nExpect: 200-ok", b"{}"),
        "two in one": post(b"Content-Length: 2\r\nExpect: 100-continue, x", b"{}"),
    },
}  # fmt: skip
BAD = {
    name: (data, code)
    for code, messages in {"malformed-request": MALFORMED, **OTHERWISE}.items()
    for name, data in messages.items()
}
UNFINISHED = {
    "nothing": b"",
    "half an empty line": b"\r",
    "an empty line": b"\r\n",
    "a method": b"POST",
    "half a line end": b"GET / HTTP/1.1\r",
    "a head but for its last byte": get()[:-1],
    "the largest head but for its last byte": headed(16 * KIB)[:-1],
    "no body yet": post(b"Content-Length: 2"),
    "half a body": post(b"Content-Length: 2", b"{"),
    "no chunk yet": chunked(b""),
    "half a chunk": chunked(b"2\r\n{"),
    "no last chunk": chunked(b"2\r\n{}\r\n"),
    "no end of the trailers": chunked(b"0\r\nX: y\r\n"),
}


@pytest.mark.parametrize("data, requests", table(GOOD))
def test_a_well_formed_message_is_read(data: bytes, requests: List[Any]) -> None:
    *heard, in_body = hear([data])
    assert [(head.method, head.path, head.query, body) for head, _, body in heard] == requests
    assert in_body is False


@pytest.mark.parametrize("data, code", table(BAD))
def test_a_message_that_others_might_read_otherwise_is_refused(data: bytes, code: str) -> None:
    assert hear([data]) == [code]
    # Whatever was whole before it is answered first; nothing behind it is ever a request.
    first, *rest = hear([get(b"/first") + data + get(b"/smuggled")])
    assert first[0].path == "/first" and rest == [code]


@pytest.mark.parametrize("data", table(UNFINISHED))
def test_an_unfinished_message_is_waited_for(data: bytes) -> None:
    assert hear([data]) == [b"\r\n\r\n" in data]


EVERY = {**{name: row[0] for name, row in {**GOOD, **BAD}.items()}, **UNFINISHED}


@pytest.mark.parametrize("data", table(EVERY))
def test_a_message_is_the_same_however_it_is_cut(data: bytes) -> None:
    whole, size = hear([data]), len(data)
    if size < 1000:
        cuts, slow_parts = list(range(size)), size
    else:
        edge, stride = 24, size // 12
        cuts = [*range(edge), *range(edge, size - edge, stride), *range(size - edge, size)]
        slow_parts = 400
    for cut in cuts:
        assert hear([data[:cut], data[cut:]]) == whole, cut
    assert hear([data[at : at + 1] for at in range(slow_parts)] + [data[slow_parts:]]) == whole
    tail = max(0, size - slow_parts)
    steps = [data[at : at + 89] for at in range(0, tail, 89)]
    kept = sum(map(len, steps))
    assert hear(steps + [data[at : at + 1] for at in range(kept, size)]) == whole


def mutants(seed: int, count: int) -> Iterator[bytes]:
    """Messages of the tables, spoiled here and there."""
    rng = random.Random(seed)
    stock = [data for data in EVERY.values() if 0 < len(data) < 400]
    nasty = [
        b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b";", b"0", b"4", b"\xff",
        b"%", b"#", b"\r\nHost: h", b"\r\nContent-Length: 3", b"\r\nTransfer-Encoding: chunked",
        b"\r\nAuthorization: Bearer x", b"\r\nAuthorization: Bearer x y", b"\r\nConnection: close",
        b"HTTP/2.0",
    ]  # fmt: skip
    for _ in range(count):
        data = rng.choice(stock)
        for _ in range(rng.randint(1, 3)):
            start = rng.randint(0, len(data))
            end = min(len(data), start + rng.choice([0, 0, 1, 1, 2, 8]))
            data = data[:start] + rng.choice([b"", *nasty, rng.choice(stock)]) + data[end:]
        yield data


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_whatever_arrives_is_requests_or_a_problem_however_it_is_cut(seed: int) -> None:
    rng, ends = random.Random(seed), set()
    for data in mutants(seed, 400):
        whole = hear([data])
        assert len(whole) <= 1 + len(data) // len(b"GET / HTTP/1.0\r\n\r\n")
        cut = rng.randint(0, len(data))
        assert hear([data[:cut], data[cut:]]) == whole, data
        assert hear([data[at : at + 1] for at in range(len(data))]) == whole, data
        ends.add(whole[-1])
    assert ends >= {False, "malformed-request", "not-implemented"}


def outcome(parse: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        head, authorization = parse(data)
    except Problem as problem:
        return problem.code
    return head._replace(authorization=None), authorization


def test_the_short_cut_past_the_credential_changes_nothing() -> None:
    """parse_head() is parse without a cache, and then bearer()."""

    def plainly(data: bytes) -> Any:
        head = hostenroll._parse_head(data)
        return head, hostenroll.bearer(head.authorization)

    rng = random.Random(7)
    values = [
        b" Bearer abc", b" Bearer a.b-c_d~e+f/g==", b" Bearer a=b", b" Bearer", b" Bearer ",
        b" Bearer  abc", b" Bearer a b", b" Bearer abc ", b" Bearer abc\t", b" bearer abc",
        b"Bearer abc", b" Bearer \xe9", b" Bearer a\rb", b" Bearer a\nb", b" Basic abc", b"",
        b" Bearer abc,", b" Bearer a\0",
    ]  # fmt: skip
    lines = [b"Authorization:" + value for value in values]
    lines += [b"authorization: Bearer x", b"Authorization : Bearer x", b"X-Authorization: Bearer x"]
    others = [
        b"X: y", b"Connection: close", b"Content-Length: 2", b"Content-Length: 99999", b"Expect: x",
        b"Host: h", b"Transfer-Encoding: gzip", b"Idempotency-Key: k", b"no colon", b" folded", b"",
    ]  # fmt: skip
    heads = [[line] for line in lines] + [[one, two] for one in lines for two in lines]
    heads += [
        rng.choices(lines, k=rng.randint(0, 2)) + rng.choices(others, k=rng.randint(0, 3))
        for _ in range(1500)
    ]
    heads += [[lines[0]] + [b"X: y"] * count for count in (97, 98, 99, 100)]
    outcomes = set()
    for fields in heads:
        rng.shuffle(fields)
        start = rng.choice(
            [b"GET / HTTP/1.1"] * 3 + [b"GET / HTTP/1.0", b"GET / HTTP/2.0", b"GET /"]
        )
        data = b"\r\n".join([start, b"Host: h", *fields])
        expected = outcome(plainly, data)
        for _ in range(2):
            assert outcome(hostenroll.parse_head, data) == expected, data
        outcomes.add(expected if isinstance(expected, str) else expected[1])
    assert outcomes >= {None, "", "abc", "a.b-c_d~e+f/g==", "a b"}
    assert outcomes >= {"malformed-request", "head-too-large", "http-version"}


def test_one_agents_credential_is_never_anothers() -> None:
    for name in ("one", "two", "one"):
        (head, authorization, _), _ = hear(
            [get(b"/", b"Authorization: Bearer %b\r\n" % name.encode())]
        )
        assert authorization == name and not head.authorization
    (_, nothing, _), _ = hear([get()])
    assert nothing is None
    assert hostenroll._parse_head_cached.cache_info().maxsize == hostenroll.HEADS_CACHED


# Trusted proxies, and whom they speak for.

PROXIES = tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "2001:db8:f::/48", "192.0.2.1")))
PROXY = "10.0.0.1"
FORWARDED = {  # X-Forwarded-For, one text for each line, and the address that the request gets
    "one client": (["198.51.100.7"], "198.51.100.7"),
    "white space around it": (["\t 198.51.100.7 "], "198.51.100.7"),
    "IPv6": (["2001:DB8:0::7"], "2001:db8::7"),
    "IPv6 in brackets": (["[2001:db8::7]"], "2001:db8::7"),
    "a port": (["198.51.100.7:4711"], "198.51.100.7"),
    "IPv6 and a port": (["[2001:db8::7]:443"], "2001:db8::7"),
    "IPv4 in IPv6": (["::ffff:198.51.100.7"], "198.51.100.7"),
    "IPv4 in IPv6, in brackets": (["[::ffff:c633:6407]:1"], "198.51.100.7"),
    "what the client says of himself": (["203.0.113.9, 198.51.100.7"], "198.51.100.7"),
    "a proxy behind a proxy": (["203.0.113.9, 198.51.100.7, 10.1.1.1"], "198.51.100.7"),
    "without spaces": (["203.0.113.9,198.51.100.7,10.1.1.1,192.0.2.1"], "198.51.100.7"),
    "a proxy in IPv6": (["198.51.100.7, 2001:db8:f::9"], "198.51.100.7"),
    "a proxy in mapped IPv6": (["198.51.100.7, ::ffff:10.1.1.1"], "198.51.100.7"),
    "two lines": (["203.0.113.9", "198.51.100.7"], "198.51.100.7"),
    "two lines, the last a proxy's": (["203.0.113.9, 198.51.100.7", "10.1.1.1"], "198.51.100.7"),
    "an empty line first": (["", "198.51.100.7"], "198.51.100.7"),
    "junk before it": (["<script>, unknown, 198.51.100.7"], "198.51.100.7"),
    "a proxy itself": (["10.1.1.1"], "10.1.1.1"),
    "proxies alone": (["10.1.1.1, 10.2.2.2"], "10.1.1.1"),
    "fifteen proxies": (["198.51.100.7" + ", 10.1.1.1" * 15], "198.51.100.7"),
    "more proxies than there are": (["198.51.100.7" + ", 10.1.1.1" * 1000], "10.1.1.1"),
    # Where none can be read it is the proxy's.
    "no such field": ([], PROXY),
    "nothing": ([""], PROXY),
    "a comma": ([","], PROXY),
    "nothing behind it": (["198.51.100.7,"], PROXY),
    "nobody known": (["unknown"], PROXY),
    "a name": (["web-1"], PROXY),
    "junk behind it": (["198.51.100.7, x"], PROXY),
    "junk before a proxy": (["198.51.100.7, x, 10.1.1.1"], PROXY),
    "an empty port": (["198.51.100.7:"], PROXY),
    "a long port": (["198.51.100.7:123456"], PROXY),
    "brackets that do not close": (["[2001:db8::7"], PROXY),
    "something behind the brackets": (["[2001:db8::7]x"], PROXY),
    "a zone": (["fe80::1%eth0"], PROXY),
    "a zone of markup": (["fe80::1%<b>"], PROXY),
    "three numbers": (["198.51.100"], PROXY),
    "a number too large": (["198.51.100.256"], PROXY),
    "one number": (["3325256711"], PROXY),
    "other digits": (["198.51.100.\u00b2"], PROXY),
    "a network": (["198.51.100.0/24"], PROXY),
    "quotes": (['"198.51.100.7"'], PROXY),
    "RFC 7239": (["for=198.51.100.7"], PROXY),
    "very long": (["1" * 5000], PROXY),
}


def proxied(values: Sequence[str], name: str = "X-Forwarded-For", target: bytes = b"/") -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for value in values)
    return get(target, lines.encode("latin-1"))


@pytest.mark.parametrize("values, address", table(FORWARDED))
def test_a_request_by_a_proxy_is_that_of_whom_the_proxy_has_heard(
    values: List[str], address: str
) -> None:
    for name in ("X-Forwarded-For", "x-forwarded-for"):
        request = RequestReader(PROXY, 1, PROXIES).next(proxied(values, name))
        assert request is not None and request.address == address
    # From anybody else it is what anybody can write; and no other field is believed.
    for reader, name in (
        (RequestReader("198.51.100.1"), "X-Forwarded-For"),
        (RequestReader(PROXY, 1, PROXIES), "Forwarded"),
        (RequestReader(PROXY, 1, PROXIES), "X-Real-IP"),
        (RequestReader(PROXY, 1, PROXIES), "X-Forwarded-For-"),
        (RequestReader(PROXY, 1, PROXIES), "X_Forwarded_For"),
    ):
        peer = reader.address
        request = reader.next(proxied(values, name))
        assert request is not None and request.address == peer


def test_each_request_on_a_proxys_connection_has_its_own_client() -> None:
    reader = RequestReader(PROXY, 1, PROXIES)
    first = proxied(["198.51.100.7"])
    body = post(b"X-Forwarded-For: 198.51.100.8\r\nContent-Length: 2", b"{}")
    heard = reader.next(first + body[:-1])
    assert heard is not None and heard.address == "198.51.100.7"
    assert reader.next() is None and reader.unread().address == "198.51.100.8"  # its body is late
    heard = reader.next(body[-1:])
    assert heard is not None and heard.address == "198.51.100.8"
    heard = reader.next(get())
    assert heard is not None and heard.address == PROXY
    assert reader.next(first + b"GET") is not None
    assert reader.unread().address == PROXY
    with pytest.raises(hostenroll.MalformedRequest):
        reader.next(b" / HTTP/1.1\n")
    assert reader.unread().address == PROXY


def test_what_proxies_add_changes_nothing_of_how_a_head_is_read() -> None:
    rng = random.Random(11)
    names = [b"X-Forwarded-For", b"x-real-ip", b"Forwarded", b"X-Request-ID", b"Via"]
    values = [b" 198.51.100.7", b"", b" \xe9", b" a\0b", b" a\rb", b" a\nb", b"x" * 300, b" \x7f"]
    lines = [name + b":" + value for name in names for value in values]
    lines += [b"X-Forwarded-For : a", b" X-Forwarded-For: a", b"X-Forwarded-For", b"Host: h"]
    lines += [b"Authorization: Bearer abc", b"Authorization: Bearer a b", b"Content-Length: 2"]
    outcomes = set()
    for _ in range(3000):
        fields = rng.choices(lines, k=rng.randint(0, 4)) + [b"X: y"] * rng.choice([0, 0, 97])
        rng.shuffle(fields)
        data = b"\r\n".join([b"GET / HTTP/1.1", b"Host: h", *fields])
        reader = RequestReader(PROXY, 1, PROXIES)
        expected = outcome(hostenroll.parse_head, data)
        assert outcome(hostenroll.parse_head, reader._unwrapped(data)) == expected, data
        outcomes.add(expected if isinstance(expected, str) else expected[1])
    assert outcomes == {None, "abc", "a b", "malformed-request", "head-too-large"}


def test_the_clients_of_a_proxy_share_a_head_in_the_cache() -> None:
    hostenroll._parse_head_cached.cache_clear()
    for n in range(50):
        names = "X-Forwarded-For", "X-Real-IP", "Forwarded", "X-Request-ID"
        lines = [f"{name}: 198.51.100.{n}\r\n" for name in names]
        data = get(b"/", "".join([*lines, f"Authorization: Bearer {n}\r\n"]).encode())
        request = RequestReader(PROXY, 1, PROXIES).next(data)
        assert request is not None and request.address == f"198.51.100.{n}"
    assert hostenroll._parse_head_cached.cache_info().misses == 1


def test_an_absurd_list_of_proxies_costs_little() -> None:
    data = proxied(["10.0.0.1," * 1700])
    began = time.process_time()
    for _ in range(100):
        assert RequestReader(PROXY, 1, PROXIES).next(data) is not None
    assert time.process_time() - began < 0.5


def test_an_ipv4_address_on_an_ipv6_socket_is_the_same_address() -> None:
    assert hostenroll.plain_address("::ffff:192.0.2.7") == "192.0.2.7"
    for other in ("192.0.2.7", "2001:db8::7", "::1", "::ffff:0", "fe80::1%eth0"):
        assert hostenroll.plain_address(other) == other


@pytest.mark.parametrize(
    "fields, version, keeps",
    [
        (b"", b"1.1", True), (b"", b"1.0", False), (b"Connection: keep-alive\r\n", b"1.0", False),
        (b"Connection: close\r\n", b"1.1", False), (b"Connection: CLOSE\r\n", b"1.1", False),
        (b"Connection: x,\tClose ,y\r\n", b"1.1", False), (b"Connection: closed\r\n", b"1.1", True),
        (b"Connection: keep-alive\r\nX: y\r\nConnection: close\r\n", b"1.1", False),
        (b"Connection:\r\n", b"1.1", True), (b"X-Connection: close\r\n", b"1.1", True),
    ],
)  # fmt: skip
def test_a_connection_is_kept_unless_somebody_says_close(
    fields: bytes, version: bytes, keeps: bool
) -> None:
    (head, _, _), _ = hear([get(b"/", fields, version)])
    assert head.keep_alive is keeps


@pytest.mark.parametrize(
    "data, waits",
    table({
        "a length": (post(b"Content-Length: 2\r\nExpect: 100-continue"), True),
        "chunked": (post(b"Transfer-Encoding: chunked\r\nExpect: 100-Continue"), True),
        "some of the body is here": (
            post(b"Content-Length: 2\r\nExpect: 100-continue", b"{"), False),
        "no expectation": (post(b"Content-Length: 2"), False),
        "an empty one": (post(b"Content-Length: 2\r\nExpect:"), False),
        "no head yet": (b"POST / HTTP/1.1\r\nExpect: 100-continue\r\n", False),
        "HTTP/1.0": (
            b"POST / HTTP/1.0\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n", False),
    }),
)  # fmt: skip
def test_only_a_peer_that_waits_for_100_is_told_to_go_on(data: bytes, waits: bool) -> None:
    """RFC 9110 section 10.1.1."""
    reader = RequestReader()
    assert reader.next(data) is None
    assert reader.awaits_continue is waits


def test_an_expectation_that_cannot_matter_is_ignored() -> None:
    (head, _, _), _ = hear([get(b"/", b"Expect: 100-continue\r\n")])
    assert not head.expects
    (head, _, _), _ = hear([get(b"/", b"Expect: a miracle\r\n", b"1.0")])
    assert not head.expects


def test_a_reader_holds_no_more_than_a_head_or_a_body() -> None:
    reader, most = RequestReader(), 0
    with pytest.raises(hostenroll.BodyTooLarge):
        reader.next(chunked(b""))
        while True:
            reader.next(b"1000\r\n%b\r\n" % (b"x" * 4096))
            most = max(most, reader.held)
    assert most == hostenroll.BODY_MAXIMUM
    reader = RequestReader()
    assert reader.next(post(b"Content-Length: 5", b"1234")) is None
    assert (reader.held, reader.is_in_body) == (4, True)
    assert reader.next(b"5") is not None
    assert (reader.held, reader.is_in_body) == (0, False)


@pytest.mark.parametrize(
    "data",
    table({
        "a head": b"GET / HTTP/1.1\r\nX: " + b"y" * 16_000,
        "a head of short lines": b"GET / HTTP/1.1\r\n" + b"X:\r\n" * 3000,
        "a body": post(b"Content-Length: 65536", b"x" * 65_000),
        "chunks of one byte": chunked(b"1\r\nx\r\n" * 13_000),
        "chunks of two bytes": chunked(b"2\r\nxy\r\n" * 13_000),
        "chunks of sixteen": chunked(b"10\r\n%b\r\n" % (b"x" * 16) * 4000),
        "half a chunk": chunked(b"10000\r\n" + b"x" * 65_000),
        "trailers": chunked(b"0\r\n" + b"".join(b"a%d:\r\n" % n for n in range(100))),
        "long trailers": chunked(b"0\r\n" + b"a: %b\r\n" % (b"x" * 250) * 100),
        "a long extension": chunked(b"1;" + b"x" * 254),
    }),
)  # fmt: skip
def test_what_is_said_to_be_held_is_what_is_held(data: bytes) -> None:
    """Else a crowd of unfinished requests would hold much more than it is allowed."""
    reader = RequestReader()
    tracemalloc.start()
    try:
        for at in range(0, len(data), hostenroll.RECEIVE_SIZE):
            assert reader.next(data[at : at + hostenroll.RECEIVE_SIZE]) is None
            while reader.is_behind:
                assert reader.next() is None
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held <= reader.held * 9 / 8 + 4096


@pytest.mark.parametrize(
    "data",
    table({
        "slashes": get(b"/" * 16_000),
        "slashes and a bad end": get(b"/" * 16_000 + b"#"),
        "path and a bad end": get(b"/" + b"a" * 16_000 + b"\\"),
        "percents": get(b"/" + b"%41" * 5300 + b"%"),
        "query and a bad end": get(b"/?" + b"a=/?" * 4000 + b"#"),
        "authority and a bad end": get(b"http://" + b"a" * 16_000 + b"@"),
        "http://": get(b"http://" * 2300),
        "a method without end": b"G" * 16_000 + b"\r\n\r\n",
        "spaces": b"GET " + b" " * 16_000 + b"\r\n\r\n",
        "targets": b"GET " + b"/ HTTP/1." * 1700 + b"\r\n\r\n",
        "Host and a bad end": b"GET / HTTP/1.1\r\nHost: " + b"a" * 16_000 + b"/\r\n\r\n",
        "Host of percents": b"GET / HTTP/1.1\r\nHost: " + b"%41" * 5300 + b"%\r\n\r\n",
        "Host of colons": b"GET / HTTP/1.1\r\nHost: [" + b":" * 16_000 + b"\r\n\r\n",
        "white space in a value": get(b"/", b"X:" + b" \t" * 8000 + b"\0\r\n"),
        "white space around a length": post(b"Content-Length:" + b" " * 16_000 + b"x"),
        "a length": post(b"Content-Length: " + b"9" * 16_000 + b"x"),
        "zeros": post(b"Content-Length: " + b"0" * 16_000),
        "commas": get(b"/", b"Connection:" + b" ,\t" * 5300 + b"\r\n"),
        "equals signs": get(b"/", b"Authorization: Bearer " + b"=" * 16_000 + b"\r\n"),
        "a credential and a bad end": get(b"/",
        b"Authorization: Bearer " + b"a" * 16_000 + b"=\xe9\r\n"),
        "a credential of dots": get(b"/", b"Authorization: Bearer " + b"a." * 8000 + b"\r\n"),
        "short lines": get(b"/", b"a:\r\n" * 4000),
        "empty chunks": chunked(b"0" * 16_000),
        "a chunk's extension": chunked(b"1" + b";" * 16_000),
    }),
)  # fmt: skip
def test_no_message_is_slow_to_judge(data: bytes) -> None:
    began = time.process_time()
    *heard, _ = hear([data])
    for _, authorization, _ in heard:
        assert hostenroll.read_secret("hak", authorization or "") is None
        with pytest.raises(hostenroll.CredentialInvalid):
            hostenroll.new_keyring().verify(authorization or "")
    assert time.process_time() - began < 0.25


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
DATED = (
    b"X-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n"
    b"Date: Fri, 15 Jan 2027 08:00:00 GMT\r\n"
)


@pytest.mark.parametrize(
    "response, closes, head_only, expected",
    table({
        "200": (
            hostenroll.Response(200, b'{"a":1}'), False, False,
            OK + DATED + b'Content-Length: 7\r\n\r\n{"a":1}'),
        "HEAD, RFC 9110 section 9.3.2": (
            hostenroll.Response(200, b'{"a":1}'), False, True,
            OK + DATED + b"Content-Length: 7\r\n\r\n"),
        "204, RFC 9112 section 6.2": (
            hostenroll.Response(204, headers=(("Allow", "GET, HEAD"),)), False, False,
            b"HTTP/1.1 204 No Content\r\nAllow: GET, HEAD\r\n" + DATED + b"\r\n"),
        "close": (
            hostenroll.Response(201, b"x", "text/plain"), True, False,
            b"HTTP/1.1 201 Created\r\nContent-Type: text/plain\r\nConnection: close\r\n" + DATED
            + b"Content-Length: 1\r\n\r\nx"),
        "an empty body": (
            hostenroll.Response(200), False, False,
            OK + DATED + b"Content-Length: 0\r\n\r\n"),
    }),
)  # fmt: skip
def test_an_answer_is_written_so(
    response: Any, closes: bool, head_only: bool, expected: bytes
) -> None:
    for _ in range(2):
        assert hostenroll.write_response(response, int(NOON), closes, head_only) == expected
    later = hostenroll.write_response(response, int(NOON) + 1, closes, head_only)
    assert later == expected.replace(b"08:00:00", b"08:00:01")


@pytest.mark.parametrize(
    "nasty", ["\r\nSet-Cookie: a=b", "\n\n<script>", "\r", "\0", "\u560d\u560a", "\u2028"]
)
def test_a_header_value_cannot_begin_another_line(nasty: str) -> None:
    for headers in ((("X", nasty),), ((nasty, "y"),)):
        response = hostenroll.Response(200, headers=headers)
        with pytest.raises(ValueError):
            hostenroll.write_response(response, int(NOON), False, False)


@each_problem
def test_a_refusal_is_a_well_formed_answer_with_nothing_raw_in_it(kind: Any) -> None:
    problem = kind(
        "Mind \r\n\x1b é 😀 </script>.", errors=[hostenroll.FieldError("\r\n", "\u202e")]
    )
    data = hostenroll.write_response(hostenroll.refusal(problem), int(NOON), True, False)
    head, _, body = data.partition(b"\r\n\r\n")
    assert re.fullmatch(rb"HTTP/1.1 %d [ -~]+(\r\n[A-Za-z-]+: [ -~]+)+" % kind.status, head)
    assert re.fullmatch(rb"[ -~]+", body) and json.loads(body) == problem.document()
    assert b"\r\nContent-Length: %d" % len(body) in head and b"\r\nConnection: close\r\n" in head


def test_json_is_written_so_that_sed_can_read_it() -> None:
    written = hostenroll.write_json({"a": [1, None, True], "b": "é\n\u2028"})
    assert written == b'{"a":[1,null,true],"b":"\\u00e9\\n\\u2028"}'


# 8. Assets

JOINS = {
    "https, by a pin": (
        "https://enroll.lan:8443", "sha256//a+b/c=",
        "--proto '=https' -k --pinnedpubkey sha256//a+b/c=", " --pin sha256//a+b/c=",
    ),
    "https, by two pins": (
        "https://enroll.lan", "sha256//a=;sha256//b=",
        "--proto '=https' -k --pinnedpubkey 'sha256//a=;sha256//b='",
        " --pin 'sha256//a=;sha256//b='",
    ),
    "https, by authorities": ("https://enroll.lan", "", "--proto '=https'", ""),
    "http on this machine": ("http://127.0.0.1:8080", "", "--proto '=http'", ""),
    "the same by name": ("http://localhost:8080", "sha256//a=", "--proto '=http'", ""),
    "the same in IPv6": ("http://[::1]:8080", "", "--proto '=http'", ""),
    "http elsewhere": ("http://192.0.2.7", "sha256//a=", "--proto '=http'", " --insecure-http"),
    "http to a name that looks near": (
        "http://127.0.0.1.evil.test", "", "--proto '=http'", " --insecure-http"),
}  # fmt: skip


@pytest.mark.parametrize("case", JOINS.values(), ids=JOINS)
def test_the_join_command_trusts_what_it_must_and_no_more(case: Any) -> None:
    url, pin, trust, more = case
    script, server = shlex.quote(f"{url}/agent.sh"), shlex.quote(url)
    assert hostenroll.join_command(url, pin, "het_x") == (
        f"curl -fsS {trust} -o hostenroll-agent {script} &&\n"
        f"  printf %s het_x | sh hostenroll-agent --server {server}{more} --token-file -"
    )


def test_the_agent_is_served_and_printed_byte_for_byte(live: SocketDoor, tmp_path: Path) -> None:
    served = live.call("GET", "/agent.sh")
    assert served.headers["content-type"] == "text/x-shellscript; charset=utf-8"
    assert served.document == cli(tmp_path, "agent-script").stdout
    assert f"VERSION={hostenroll.__version__}\n" in served.document
    assert served.document.startswith("#!/bin/sh\n") and served.document.endswith('\nmain "$@"\n')


# The agent, run for real: against a real server, over TLS.

SHELLS = {"dash": ("dash",), "bash": ("bash",), "busybox": ("busybox", "sh"), "ksh": ("ksh",)}


def in_shell_of(name: str) -> Any:
    absent = shutil.which(name) is None
    marks = [pytest.mark.skipif(absent, reason=f"{name} is not installed")]
    return pytest.param(SHELLS[name], id=name, marks=marks + ([] if name == "dash" else [slow]))


in_every_shell = pytest.mark.parametrize("shell", [in_shell_of(name) for name in SHELLS])
on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


class Machine:
    """A machine with the agent's script, and nothing in its environment but where programs are."""

    def __init__(self, folder: Path, door: SocketDoor, shell: Sequence[str] = ("sh",)) -> None:
        self.folder, self.door, self.shell = folder, door, shell
        self.state, self.script = folder / "state", folder / "hostenroll-agent"
        self.programs = folder / "programs"  # before all others
        self.programs.mkdir()
        self.script.write_text(hostenroll.AGENT_SCRIPT)
        self.environment = {
            "PATH": f"{self.programs}:{os.environ['PATH']}", "HOME": str(folder)}  # fmt: skip
        self.port = door.port
        self.trust: Tuple[str, ...] = ("--pin", pin_of("one"))

    def command(self, *options: str) -> List[str]:
        server = ("--server", f"https://127.0.0.1:{self.port}", *self.trust)
        return [*self.shell, str(self.script), *server, "--state", str(self.state), *options]

    def run(self, *options: str, token: str = "") -> subprocess.CompletedProcess[str]:
        """The agent, until it ends."""
        given = ("--token-file", "-") if token else ()
        return subprocess.run(
            self.command(*given, *options), input=token, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30, check=False,
            cwd=str(self.folder),
        )  # fmt: skip

    def once(self, *options: str, token: str = "") -> subprocess.CompletedProcess[str]:
        """One heartbeat; before it the enrollment, when there is a token."""
        return self.run("--once", *options, token=token)

    @contextlib.contextmanager
    def agent(self, *options: str, token: str = "") -> Iterator[subprocess.Popen[str]]:
        """The agent, which beats until it is stopped; what it says is in `said()`."""
        given = ("--token-file", "-") if token else ()
        with (self.folder / "said").open("wb") as log:
            agent = subprocess.Popen(
                self.command(*given, *options), env=self.environment, text=True,
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        assert agent.stdin is not None
        agent.stdin.write(token)
        agent.stdin.close()
        try:
            yield agent
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
            agent.wait(10)

    def said(self) -> List[str]:
        return (self.folder / "said").read_text().splitlines()

    def program(self, name: str, text: str) -> None:
        """Put a program before the machine's own."""
        (self.programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.programs / name).chmod(0o755)

    def credential(self) -> str:
        return (self.state / "credential").read_text().split("\n")[0]

    def hosts(self) -> List[Dict[str, Any]]:
        """As the server sees them."""
        listed = self.door.call("GET", "/api/hosts", bearer=self.door.api_key)
        hosts: List[Dict[str, Any]] = listed.document["hosts"]
        return hosts

    def host(self) -> Dict[str, Any]:
        [host] = self.hosts()
        return host

    def renewals(self) -> List[Any]:
        """The events of renewals, the newest first."""
        path = "/api/audit?action=renew"
        events: List[Any] = self.door.call("GET", path, bearer=self.door.api_key).document["events"]
        return events

    def refusals(self, code: str) -> int:
        """How often the server has refused something for one reason."""
        text = self.door.call("GET", "/metrics", bearer=self.door.api_key).document
        found = re.search(rf'^hostenroll_refusals_total{{code="{code}"}} (\d+)$', text, re.M)
        assert found is not None
        return int(found[1])


@pytest.fixture
def over_tls(tmp_path: Path, clock: Clock) -> Iterator[TlsDoor]:
    """A server to which hosts are to beat every second."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    paths = str(tmp_path / "hostenroll.db"), str(tmp_path / "hostenroll.key")
    with tls_door(paths, clock, interval=1, credential_ttl=30 * 86400) as door:
        yield door


@pytest.fixture
def machine(tmp_path: Path, over_tls: TlsDoor) -> Machine:
    return Machine(tmp_path, over_tls)


class Middle(threading.Thread):
    """Stands between, with the server's own key. What becomes of an exchange is one word for each:
    pass, lose (the answer, which the server has given), hold (the request), or an answer to give
    in the server's place."""

    def __init__(self, door: TlsDoor, folder: Path, *fates: Any) -> None:
        super().__init__(daemon=True)
        self.door, self.fates, self.requests = door, list(fates), []  # type: Any, List[Any], Any
        self.held, self.release = threading.Event(), threading.Event()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(*write_pair(folder))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    @staticmethod
    def message(stream: Any) -> bytes:
        """A request or an answer, whole; nothing when the peer has gone."""
        head = b"".join(itertools.takewhile(lambda line: line != b"\r\n", stream))
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        return head and head + b"\r\n" + (stream.read(int(length[1])) if length else b"")

    def run(self) -> None:
        while True:
            try:
                plain, _ = self.listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), self.context.wrap_socket(plain, True) as peer:
                with peer.makefile("rb") as stream:
                    self.requests.append(self.message(stream))
                if self.requests[-1]:
                    peer.sendall(self._answer(self.fates.pop(0) if self.fates else "pass"))

    def _answer(self, fate: Any) -> bytes:
        if isinstance(fate, bytes):
            return fate
        if fate == "hold":
            self.held.set()
            assert self.release.wait(20)
        with self.door.connect() as peer, peer.makefile("rb") as stream:
            peer.sendall(self.requests[-1])
            answer = self.message(stream)
        if callable(fate):
            fate()
        return b"" if fate == "lose" else answer

    def bodies(self) -> List[bytes]:
        return [request.partition(b"\r\n\r\n")[2] for request in self.requests]

    def __enter__(self) -> Middle:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.join(10)
        assert not self.is_alive()


def answer_of(status: str, body: bytes = b"", *fields: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


needs_shellcheck = pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed"
)


@needs_shellcheck
@slow
def test_shellcheck_finds_nothing_in_the_agent(tmp_path: Path) -> None:
    (tmp_path / "agent.sh").write_text(hostenroll.AGENT_SCRIPT)
    command = ["shellcheck", "--shell=sh", "--enable=quote-safe-variables", "agent.sh"]
    checked = subprocess.run(command, cwd=str(tmp_path), stdout=subprocess.PIPE, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_the_agent_asks_nothing_of_curl_that_7_58_cannot_do() -> None:
    newer = r"--fail-with-body|--retry|--json|--variable|%\{(json|header|errormsg|exitcode|onerror)"
    assert not re.search(newer, hostenroll.AGENT_SCRIPT)
    known = {  # and the version that brought it
        "-q": "", "-sS": "", "-g": "", "-i": "", "-A": "", "-w": "", "-k": "", "-K": "",
        "--cacert": "7.5", "--connect-timeout": "7.7", "--max-time": "4.0",
        "--max-filesize": "7.10.8", "--proto": "7.20.2", "--noproxy": "7.19.4",
        "--pinnedpubkey": "7.39",
    }  # fmt: skip
    asking = hostenroll.AGENT_SCRIPT.partition("\nask() {")[2].partition("\n}\n")[0]
    used = {word for word in re.findall(r"(?<=\s)--?[a-zA-Z][a-zA-Z-]*", asking) if word != "-z"}
    assert used - {"-n", "-ne"} == set(known)


@in_every_shell
def test_the_agent_enrolls_and_beats(shell: Any, tmp_path: Path, over_tls: TlsDoor) -> None:
    machine = Machine(tmp_path, over_tls, shell)
    name = 'a "b" \\ K\u00fcche'
    done = machine.once("--name", os.fsdecode(name.encode()), token=over_tls.token())
    assert done.returncode == 0, done.stdout
    host = machine.host()
    assert done.stdout == f"hostenroll-agent: enrolled as host {host['id']}\n"
    assert (host["name"], host["status"]) == (name, "online")
    assert (host["hostname"], host["architecture"]) == (os.uname().nodename, os.uname().machine)
    assert os.uname().release in host["os"]
    kept = {path.name: stat.S_IMODE(path.stat().st_mode) for path in machine.state.iterdir()}
    assert kept == {"credential": 0o600, "facts": 0o600}
    assert stat.S_IMODE(machine.state.stat().st_mode) == 0o700
    again = machine.once()
    assert (again.returncode, again.stdout) == (0, "")


@slow
@in_every_shell
def test_a_day_in_the_life_of_an_agent(shell: Any, tmp_path: Path, over_tls: TlsDoor) -> None:
    """Enrolled, heard, revoked, asking again, restored, enrolled anew, stopped."""
    machine = Machine(tmp_path, over_tls, shell)
    with machine.agent("--ask-again", "1", token=over_tls.token()) as agent:
        until(lambda: machine.hosts() and machine.host()["status"] == "online")
        number = machine.host()["id"]
        over_tls.revoke(number)
        until(lambda: machine.refusals("host-revoked") >= 2)
        over_tls.restore(number)
        until(lambda: "hostenroll-agent: the server hears this machine again" in machine.said())
        assert len([line for line in machine.said() if "host-revoked" in line]) == 1
        old = machine.credential()
        token = over_tls.reenroll(number).document["token"]
        assert machine.run(token=token).returncode == 0
        assert machine.credential() != old and machine.host()["id"] == number
        until(lambda: over_tls.beat(old).code == "credential-superseded")
        agent.terminate()
        assert agent.wait(5) == -signal.SIGTERM
    assert len(machine.said()) == 4, machine.said()


def test_an_enrollment_whose_answer_was_lost_is_one_host(machine: Machine, tmp_path: Path) -> None:
    token = machine.door.token()
    with Middle(machine.door, tmp_path, "lose") as middle:
        machine.port = middle.port
        lost = machine.once(token=token)
        assert (lost.returncode, "no answer" in lost.stdout) == (1, True)
        assert not (machine.state / "credential").exists()
        number = machine.host()["id"]
        done = machine.once(token=token)
    assert done.returncode == 0, done.stdout
    keys = [re.search(rb"(?i)idempotency-key: (\S+)", asked) for asked in middle.requests[:2]]
    assert keys[0] is not None and keys[1] is not None and keys[0][1] == keys[1][1]
    assert (machine.host()["id"], machine.host()["status"]) == (number, "online")
    assert not (machine.state / "enrolling").exists()


@slow
def test_an_agent_that_goes_on_asks_again_by_itself(machine: Machine, tmp_path: Path) -> None:
    with Middle(machine.door, tmp_path, "lose", answer_of("503 Busy")) as middle:
        machine.port = middle.port
        with machine.agent(token=machine.door.token()):
            until(lambda: machine.hosts() and machine.host()["status"] == "online", 20)
    assert machine.refusals("token-used") == 0


@slow
def test_another_token_gets_another_key(machine: Machine, tmp_path: Path) -> None:
    with Middle(machine.door, tmp_path, "lose", "lose") as middle:
        machine.port = middle.port
        machine.once(token=machine.door.token())
        first = (machine.state / "enrolling").read_text()
        machine.once(token=machine.door.token())
    assert set(first.split()).isdisjoint((machine.state / "enrolling").read_text().split())


@slow
def test_a_token_that_has_been_used_here_is_no_reason_to_enroll_again(machine: Machine) -> None:
    token = machine.door.token(maxUses=5)
    assert [machine.once(token=token).returncode for _ in range(2)] == [0, 0]
    assert len(machine.hosts()) == 1


@slow
def test_a_new_token_enrolls_anew_and_a_bad_one_changes_nothing(machine: Machine) -> None:
    first = machine.door.token()
    assert machine.once(token=first).returncode == 0
    kept = (machine.state / "credential").read_bytes()
    used = machine.door.token()
    machine.door.enroll(used, "another")
    refused = machine.once(token=used)
    assert refused.returncode == 3 and "refused (token-used)" in refused.stdout
    assert (machine.state / "credential").read_bytes() == kept
    assert machine.once().returncode == 0
    assert machine.once(token=machine.door.token()).returncode == 0
    assert (machine.state / "credential").read_bytes() != kept
    assert len(machine.hosts()) == 3


@slow
@pytest.mark.parametrize("text", ["", "\n", "nonsense", "het_", 'het_1_a","x":"', "het_1_a b"])
def test_what_is_no_token_is_not_sent(text: str, machine: Machine) -> None:
    (machine.folder / "token").write_text(text)
    done = machine.once("--token-file", str(machine.folder / "token"))
    assert done.returncode == 2 and "there is no token in" in done.stdout
    assert not (machine.state / "enrolling").exists()


@slow
def test_a_token_comes_from_a_file_as_well(machine: Machine) -> None:
    (machine.folder / "token").write_text(f"{machine.door.token()}\r\n")
    assert machine.once("--token-file", str(machine.folder / "token")).returncode == 0
    assert machine.host()["status"] == "online"


def act_revoke(machine: Machine) -> None:
    machine.door.revoke(machine.host()["id"])


def act_delete(machine: Machine) -> None:
    machine.door.delete(machine.host()["id"])


def act_reenroll(machine: Machine) -> None:
    """On another machine, which beats."""
    token = machine.door.reenroll(machine.host()["id"]).document["token"]
    machine.door.beat(machine.door.enroll(token).document["credential"])


def act_spoil(machine: Machine) -> None:
    whole = (machine.state / "credential").read_text()
    (machine.state / "credential").write_text(whole.replace(".", ".A", 1))


REFUSED_BEATS = {
    "host-revoked": act_revoke, "host-unknown": act_delete,
    "credential-superseded": act_reenroll, "credential-invalid": act_spoil,
}  # fmt: skip


@slow
@pytest.mark.parametrize("code", REFUSED_BEATS)
def test_a_refused_agent_says_so_once_and_asks_again_hourly(code: str, machine: Machine) -> None:
    assert machine.once(token=machine.door.token()).returncode == 0
    REFUSED_BEATS[code](machine)
    kept = (machine.state / "credential").read_bytes()
    once = machine.once()
    assert once.returncode == 3 and once.stdout.count("\n") == 1
    assert once.stdout.startswith(f"hostenroll-agent: refused ({code}): ")
    waits = recorded_sleeps(machine, 3)
    assert waits == [3600] * 3
    assert len(machine.said()) == 1 and f"refused ({code})" in machine.said()[0]
    assert (machine.state / "credential").read_bytes() == kept


def recorded_sleeps(machine: Machine, count: int, *options: str) -> List[int]:
    """How long the agent waits, one time after another; time is not lost on it."""
    log = machine.folder / "sleeps"
    machine.program(
        "sleep", f'echo "$1" >>{log}\n[ "$(wc -l <{log})" -lt {count} ] || exec tail -f /dev/null'
    )
    machine.shell = ("dash",) if shutil.which("dash") else ("bash",)  # its sleep is a program
    with machine.agent(*options):
        until(lambda: log.exists() and log.read_text().count("\n") >= count, 20)
    return [int(line) for line in log.read_text().split()]


@slow
def test_once_an_hour_the_agent_looks_for_new_facts(machine: Machine) -> None:
    looked = machine.folder / "looked"
    machine.program("docker", f"echo >>{looked}; echo Docker version 1, build 1")
    assert machine.once(token=machine.door.token()).returncode == 0
    act_revoke(machine)
    looked.unlink()
    assert recorded_sleeps(machine, 5, "--ask-again", "1800") == [1800] * 5
    assert looked.read_text().count("\n") == 1 + 2


@slow
def test_after_failures_an_agent_waits_longer_and_longer_by_chance(machine: Machine) -> None:
    assert machine.once(token=machine.door.token()).returncode == 0
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        machine.port = nobody.getsockname()[1]
        waits = recorded_sleeps(machine, 30)
    bounds = [min(2**n, 300) for n in range(30)]
    assert all(1 <= wait <= bound for wait, bound in zip(waits, bounds))
    assert len(set(waits[9:])) > 10 and max(waits) > 150  # by 2 ** -21, and worse
    (said,) = machine.said()
    assert "no answer from" in said and " ms" not in said  # or no two were alike


@slow
@pytest.mark.parametrize("body", [b"", b'{"code":"storage-unavailable"}'], ids=["bare", "named"])
def test_a_server_that_cannot_answer_now_is_not_called_strange(
    body: bytes, machine: Machine, tmp_path: Path
) -> None:
    token = machine.door.token()
    busy = answer_of("503 Service Unavailable", body, "Retry-After: 1")
    with Middle(machine.door, tmp_path, busy, "pass", "pass", busy) as middle:
        machine.port = middle.port
        enrolling, _, beating = (machine.once(token=token) for _ in range(3))
    why = "503 storage-unavailable" if body else "503"
    for done in (enrolling, beating):
        assert done.returncode == 1 and done.stdout.endswith(f" cannot answer now ({why})\n")


@slow
@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
def test_an_agent_waits_as_long_as_the_server_says(
    status: str, machine: Machine, tmp_path: Path
) -> None:
    assert machine.once(token=machine.door.token()).returncode == 0
    busy = answer_of(status, b"", "Retry-After: 77")
    with Middle(machine.door, tmp_path, busy, "pass", busy) as middle:
        machine.port = middle.port
        waits = recorded_sleeps(machine, 3)
    assert waits[0] == waits[2] == 78 and waits[1] in (
        1,
        2,
    )  # 1 s, 15 % more or less, in whole ones


RETRY_AFTERS = {  # the fields of an answer, and the seconds that they come to
    "none": ("", 0),
    "one": ("Retry-After: 77", 77),
    "one by HTTP/2": ("retry-after: 77", 77),
    "two, of which a proxy has added one": ("Retry-After: 5\nretry-after: 77", 77),
    "a zero before": ("Retry-After: 08", 8),
    "zeros before": ("Retry-After: 0000000012", 12),
    "zero": ("Retry-After: 0", 0),
    "zeros": ("Retry-After: 000", 0),
    "spaces about": ("Retry-After:  9  ", 9),
    "no space": ("Retry-After:9", 9),
    "no end of it": ("Retry-After: 99999", 0),
    "a date": ("Retry-After: Fri, 31 Dec 1999 23:59:59 GMT", 0),
    "a date after a number": ("Retry-After: 5\nRetry-After: Fri, 31 Dec 1999 23:59:59 GMT", 0),
    "a time before": ("Retry-After: -5", 0),
    "a fraction": ("Retry-After: 1.5", 0),
    "an expression": ("Retry-After: 1+1", 0),
    "another base": ("Retry-After: 0x10", 0),
    "a name": ("Retry-After: bound", 0),
    "nothing": ("Retry-After:", 0),
    "nothing after a number": ("Retry-After: 5\nRetry-After:", 0),
    "two in one": ("Retry-After: 5, 77", 0),
}


def in_agent(shell: Sequence[str], folder: Path, lines: str, text: str = "") -> List[str]:
    """What some lines print that have the functions of the agent; text is their stdin."""
    functions = hostenroll.AGENT_SCRIPT.rpartition("main ")[0]
    (folder / "lines").write_text(f"{functions}\nset -fuC\nLC_ALL=C\n{lines}\n")
    done = subprocess.run(
        [*shell, str(folder / "lines")], input=text, timeout=30, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={"PATH": os.environ["PATH"]},
        cwd=str(folder),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


@in_every_shell
def test_no_retry_after_ends_the_agent(shell: Any, tmp_path: Path) -> None:
    for n, (fields, _) in enumerate(RETRY_AFTERS.values()):
        answer = answer_of("503 Busy", b"", *fields.splitlines()) + b"\n503"
        (tmp_path / f"answer-{n:02}").write_bytes(answer)
    waits = in_agent(
        shell,
        tmp_path,
        """pause() { echo "$1"; }
        for n in $(seq -w 0 99); do
            [ ! -e "answer-$n" ] || (answer=$(cat "answer-$n") bound=1 && back_off)
        done; :""",
    )
    comes_to = [str(seconds + 1) for _, seconds in RETRY_AFTERS.values()]
    assert dict(zip(RETRY_AFTERS, waits)) == dict(zip(RETRY_AFTERS, comes_to))


INTERVALS = {
    "30": "30 30", "08": "8 8", "0": "1 1", "000": "1 1", "00000030": "30 30",
    "": "none", "-5": "none", "3.5": "none", "1e9": "none", "123456": "none",
    "30+1": "none", '"30"': "none", "null": "none", "bound": "none",
}  # fmt: skip


@in_every_shell
def test_no_interval_ends_the_agent(shell: Any, tmp_path: Path) -> None:
    waits = in_agent(
        shell,
        tmp_path,
        """sleep() { :; }
        said='' body='' facts='' told='' woken='' slept='' age=0 server=https://a
        while IFS= read -r reply; do
            (heard && pause "$next" && echo "$next $age") 2>/dev/null || echo none
        done""",
        "".join(f'{{"hostId":"a","nextHeartbeatSeconds":{text}}}\n' for text in INTERVALS),
    )
    assert dict(zip(INTERVALS, waits)) == INTERVALS


@in_every_shell
def test_a_number_by_chance_may_begin_with_a_zero(shell: Any, tmp_path: Path) -> None:
    lines = 'od() { echo " 00089"; }\ndraw 1; echo "$drawn"\ndraw 300; echo "$drawn"'
    one, some = map(int, in_agent(shell, tmp_path, lines))
    assert one == 1 and 1 <= some <= 300


STRANGE_ANSWERS = {
    "a page of somebody else": answer_of("200 OK", b"<html>Log in to the Wi-Fi!</html>"),
    "an empty one": answer_of("200 OK"),
    "a move": answer_of("302 Found", b"", "Location: https://evil.test/"),
    "nonsense": b"SSH-2.0-OpenSSH_9.2\r\n",
    "nothing": b"",
    "no such path": answer_of("404 Not Found", b'{"code":"not-found"}'),
    "an interval of nothing": answer_of("200 OK", b'{"nextHeartbeatSeconds":}'),
}


@slow
@pytest.mark.parametrize("answer", STRANGE_ANSWERS.values(), ids=STRANGE_ANSWERS)
def test_a_strange_answer_is_a_failure_and_changes_nothing(
    answer: bytes, machine: Machine, tmp_path: Path
) -> None:
    token = machine.door.token()
    with Middle(machine.door, tmp_path, answer, "pass", "pass", answer) as middle:
        machine.port = middle.port
        first = machine.once(token=token)
        assert first.returncode in (1, 3) and first.stdout.count("\n") == 1
        assert not (machine.state / "credential").exists()
        assert machine.once(token=token).returncode == 0
        kept = (machine.state / "credential").read_bytes()
        later = machine.once()
        assert later.returncode == 1 and later.stdout.count("\n") == 1
    assert (machine.state / "credential").read_bytes() == kept


@slow
def test_an_answer_without_an_end_is_not_taken(machine: Machine, tmp_path: Path) -> None:
    with Middle(machine.door, tmp_path, answer_of("200 OK", b"x" * 70_000)) as middle:
        machine.port = middle.port
        assert "file size" in machine.once(token=machine.door.token()).stdout


NOT_TRUSTED = {
    "a wrong pin": (("--pin", "other"), "pinned public key"),
    "no pin and no authority": ((), "certificate"),
    "another authority": (("--cacert", "other"), "certificate"),
    "a wrong pin beside the authority": (
        ("--pin", "other", "--cacert", "one"),
        "pinned public key",
    ),
    "another authority beside the pin": (("--pin", "one", "--cacert", "other"), "certificate"),
}


NOT_TRUSTED_CASES = [
    pytest.param(case, id=name, marks=[slow] if len(case[0]) == 4 else [])
    for name, case in NOT_TRUSTED.items()
]


def trust(folder: Path, *words: str) -> Tuple[str, ...]:
    """The options that say whom to trust: pairs of the tests by name."""
    options: List[str] = []
    for option, pair in zip(words[::2], words[1::2]):
        (folder / f"{pair}.pem").write_text(certificate_of(pair))
        options += [option, pin_of(pair) if option == "--pin" else str(folder / f"{pair}.pem")]
    return tuple(options)


@pytest.mark.parametrize("case", NOT_TRUSTED_CASES)
def test_a_server_that_is_not_the_one_hears_nothing(
    case: Any, machine: Machine, tmp_path: Path
) -> None:
    words, why = case
    machine.trust = trust(tmp_path, *words)
    (tmp_path / ".curlrc").write_text("insecure\n")
    with Middle(machine.door, tmp_path) as middle:
        machine.port = middle.port
        done = machine.run(token=machine.door.token())
    assert done.returncode == 1 and done.stdout.count("\n") == 1
    assert "not trusted, and told nothing" in done.stdout and why in done.stdout
    assert machine.hosts() == [] and all(request == b"" for request in middle.requests)


@slow
@pytest.mark.parametrize("words", [("--cacert", "one"), ("--pin", "one", "--cacert", "one")])
def test_the_server_that_is_the_one_is_trusted(
    words: Any, machine: Machine, tmp_path: Path
) -> None:
    machine.trust = trust(tmp_path, *words)
    assert machine.once(token=machine.door.token()).returncode == 0


@slow
def test_an_agent_that_has_enrolled_waits_for_the_right_server(
    machine: Machine, tmp_path: Path
) -> None:
    assert machine.once(token=machine.door.token()).returncode == 0
    machine.trust = trust(tmp_path, "--pin", "other")
    with Middle(machine.door, tmp_path) as middle:
        machine.port = middle.port
        assert recorded_sleeps(machine, 5)[0] == 1
        assert len(machine.said()) == 1 and "pinned public key" in machine.said()[0]
    assert all(request == b"" for request in middle.requests)


MISUSES: Dict[str, Tuple[Tuple[str, ...], str]] = {
    "nothing": ((), "--server URL is missing"),
    "an unknown option": (("--nope",), "--nope is no option"),
    "no value": (("--server",), "--server needs a value"),
    "an empty pin": (("--server", "https://a", "--pin", ""), "--pin needs a value"),
    "a pin that is a file": (("--server", "https://a", "--pin", "/etc/passwd"), "sha256//"),
    "a pin that is none": (("--server", "https://a", "--pin", "sha256//"), "sha256//"),
    "plain http": (("--server", "http://192.0.2.1"), "everybody between"),
    "a name that looks near": (("--server", "http://127.0.0.1.evil.test"), "everybody between"),
    "another": (("--server", "http://localhost.evil.test:80"), "everybody between"),
    "a pin over http": (("--server", "http://127.0.0.1", "--pin", "sha256//a"), "over http"),
    "a file": (("--server", "file:///etc/passwd"), "is not like"),
    "a user in the URL": (("--server", "https://a@b"), "is not like"),
    "a URL with more": (("--server", "https://a b"), "is not like"),
    "a URL with a query": (("--server", "https://a?b"), "is not like"),
    "no URL": (("--server", "enroll.lan"), "is not like"),
    "an hour of nothing": (("--server", "https://a", "--ask-again", "0"), "takes seconds"),
    "a hostname": (("--server", "https://a", "--hostname", "a b"), "--hostname takes"),
    "a name of two lines": (("--server", "https://a", "--name", "a\nb"), "one line"),
    "no such file": (("--server", "https://a", "--cacert", "/nowhere"), "cannot read"),
}


def run_script(folder: Path, *arguments: str, text: str = hostenroll.AGENT_SCRIPT) -> Any:
    """The script alone, in an environment that is nearly empty."""
    (folder / "agent.sh").write_text(text)
    return subprocess.run(
        ["sh", str(folder / "agent.sh"), *arguments], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30, check=False,
        env={"PATH": os.environ["PATH"]},
    )  # fmt: skip


@pytest.mark.parametrize("case", MISUSES.values(), ids=MISUSES)
def test_a_mistake_in_the_agents_arguments_is_said_in_one_line(case: Any, tmp_path: Path) -> None:
    arguments, said = case
    done = run_script(tmp_path, "--state", str(tmp_path / "state"), *arguments)
    assert done.returncode == 2 and said in done.stdout
    assert done.stdout.startswith("hostenroll-agent: ") and done.stdout.count("\n") == 1
    assert not (tmp_path / "state").exists()


def test_an_agent_without_token_and_credential_says_what_it_needs(tmp_path: Path) -> None:
    done = run_script(tmp_path, "--server", "https://a", "--state", str(tmp_path / "state"))
    assert (done.returncode, "--token-file" in done.stdout) == (1, True)
    assert list((tmp_path / "state").iterdir()) == []


def test_the_agent_says_its_version_and_its_options(tmp_path: Path) -> None:
    said = run_script(tmp_path, "--version").stdout
    assert said == f"hostenroll-agent {hostenroll.__version__}\n"
    options = set(re.findall(r"--[a-z-]+", run_script(tmp_path, "--help").stdout))
    taken = hostenroll.AGENT_SCRIPT.partition("\nread_arguments() {")[2].partition("\n}\n")[0]
    assert options == set(re.findall(r"--[a-z-]+", taken))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [option for option in options if f"`{option}" not in readme] == []


@slow
def test_of_a_script_that_was_cut_short_nothing_runs(tmp_path: Path) -> None:
    whole = hostenroll.AGENT_SCRIPT
    cuts = [*range(40, len(whole), len(whole) // 150), *range(len(whole) - 11, len(whole) - 4)]
    for cut in cuts:
        assert "usage: host" not in run_script(tmp_path, "--help", text=whole[:cut]).stdout, cut
    assert "usage: host" in run_script(tmp_path, "--help", text=whole).stdout


# What a machine says of itself.


def test_facts_are_told_when_they_change_and_not_with_every_beat(
    machine: Machine, tmp_path: Path
) -> None:
    machine.program("docker", "echo 'Docker version 20.10.5+dfsg1, build 55c4c88'")
    with Middle(machine.door, tmp_path) as middle:
        machine.port = middle.port
        machine.once("--hostname", "web-1", token=machine.door.token())
        assert machine.host()["dockerVersion"] == "20.10.5+dfsg1"
        machine.program("docker", "echo 'Docker version 27.1.0, build 1'")
        machine.once("--hostname", "web-2")
        machine.once("--hostname", "web-2")
    assert [body == b"{}" for body in middle.bodies()] == [False, True, False, True]
    assert (machine.host()["dockerVersion"], machine.host()["hostname"]) == ("27.1.0", "web-2")


HOSTILE = {
    "quotes": '"", "token": "x", $(id) `id`', "backslashes": "\\\\ \\n \\u0000 \\",
    "controls": "a\\033[31mb\\007\\tc\\r\\nd", "bytes": "\\377\\376\\303\\050 \\342\\200\\256",
    "length": "x" * 5000, "nothing": "", "options": "-e -n", "percent": "%s%n%d",
}  # fmt: skip


@slow
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_whatever_a_machine_is_called_it_can_enroll(text: str, machine: Machine) -> None:
    (machine.folder / "text").write_text(text)
    tell = f'printf %b "$(cat {machine.folder}/text)"'
    machine.program("uname", f'[ "$1" != -n ] || printf web.; {tell}')
    machine.program("docker", f"printf 'Docker version '; {tell}")
    done = machine.once(token=machine.door.token())
    assert done.returncode == 0, done.stdout
    host = machine.host()
    assert re.fullmatch(r"web[A-Za-z0-9._-]{0,250}", host["hostname"])
    for name in ("os", "architecture", "dockerVersion"):
        assert re.fullmatch("[ -~]{0,128}", host[name])
    if "quotes" in HOSTILE and text == HOSTILE["quotes"]:
        assert host["architecture"] == text
    assert machine.once().returncode == 0


@slow
def test_a_fact_that_the_server_does_not_take_keeps_no_host_silent(
    machine: Machine, tmp_path: Path
) -> None:
    assert machine.once(token=machine.door.token()).returncode == 0
    refused = answer_of(
        "400 Bad Request", b'{"detail":"Correct the \\"fields\\".","code":"invalid-body","errors":'
        b'[{"field":"os","detail":"is \\"odd\\" \\\\"}]}',
    )  # fmt: skip
    with Middle(machine.door, tmp_path, refused) as middle:
        machine.port = middle.port
        done = machine.once("--hostname", "web-9")
    assert done.returncode == 0 and "is 'odd' '" in done.stdout
    assert [body == b"{}" for body in middle.bodies()] == [False, True]


# Renewal, and disks that are full.


def renewal_due(clock: Clock) -> None:
    clock.advance(25 * 86400)


def test_a_renewed_credential_is_kept_before_it_is_used(machine: Machine, clock: Clock) -> None:
    assert machine.once(token=machine.door.token()).returncode == 0
    old = machine.credential()
    renewal_due(clock)
    assert machine.once().returncode == 0
    renewed = machine.credential()
    assert renewed != old
    assert machine.door.beat(old).status == 200  # so the new one has not been used
    assert machine.once().returncode == 0
    assert machine.door.beat(old).code == "credential-superseded"
    assert machine.credential() == renewed


@slow
def test_a_renewal_does_not_undo_an_enrollment_that_came_between(
    machine: Machine, clock: Clock, tmp_path: Path
) -> None:
    assert machine.once(token=machine.door.token()).returncode == 0
    renewal_due(clock)
    token = machine.door.reenroll(machine.host()["id"]).document["token"]
    newer: List[str] = []

    def enroll_between() -> None:
        """When the server has given the renewal, and before the agent has it."""
        newer.append(machine.door.enroll(token).document["credential"])
        (machine.state / "credential").write_text(f"{newer[0]}\n{NOWHERE}\n{NOWHERE}\n")

    with Middle(machine.door, tmp_path, enroll_between) as middle:
        machine.port = middle.port
        assert machine.once().returncode == 0
    assert len(machine.renewals()) == 1 and machine.credential() == newer[0]


@pytest.fixture
def fill_disk(machine: Machine) -> Iterator[Callable[[], None]]:
    """Has the machine keep its state on a small disk of its own; gives what fills that."""
    machine.state.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "none", str(machine.state)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")

    def fill() -> None:
        with contextlib.suppress(OSError), (machine.state / "filler").open("wb", 0) as filler:
            while filler.write(b"x" * 512):
                pass

    yield fill
    subprocess.run(["umount", "-l", str(machine.state)], check=True)


def make_room(machine: Machine) -> None:
    (machine.state / "filler").unlink()


@in_every_shell
@slow
def test_on_a_full_disk_nothing_is_asked_and_no_token_used(
    shell: Any, machine: Machine, fill_disk: Callable[[], None]
) -> None:
    machine.shell = shell
    fill_disk()
    token = machine.door.token()
    done = machine.run(token=token)
    assert done.returncode == 1 and "make room" in done.stdout
    assert machine.door.show_token(token.split("_")[1]).document["uses"] == 0
    make_room(machine)
    assert machine.once(token=token).returncode == 0


@slow
def test_a_disk_that_fills_while_the_server_answers_costs_no_token(
    machine: Machine, fill_disk: Callable[[], None], tmp_path: Path
) -> None:
    token = machine.door.token()
    with Middle(machine.door, tmp_path, fill_disk) as middle:
        machine.port = middle.port
        done = machine.once(token=token)
        assert done.returncode == 1 and "the same token" in done.stdout
        make_room(machine)
        assert machine.once(token=token).returncode == 0
    assert machine.host()["status"] == "online"


@in_every_shell
@slow
def test_on_a_full_disk_the_old_credential_stays_and_goes_on(
    shell: Any, machine: Machine, fill_disk: Callable[[], None], clock: Clock
) -> None:
    machine.shell = shell
    assert machine.once(token=machine.door.token()).returncode == 0
    old = (machine.state / "credential").read_bytes()
    fill_disk()
    renewal_due(clock)
    with machine.agent("--hostname", "web-2"):
        until(lambda: machine.said())
        beats = len(machine.renewals())
        until(lambda: len(machine.renewals()) > beats)
        assert (machine.state / "credential").read_bytes() == old
        assert len(machine.said()) == 1 and "make room" in machine.said()[0]
        make_room(machine)
        until(lambda: (machine.state / "credential").read_bytes() != old)
        until(lambda: machine.door.beat(old.decode().split()[0]).code == "credential-superseded")
    assert machine.said()[1:] == ["hostenroll-agent: the server hears this machine again"]
    assert sorted(path.name for path in machine.state.iterdir())[:2] == ["credential", "facts"]


@in_every_shell
@slow
def test_no_link_is_followed_that_somebody_has_put_in_the_folder(
    shell: Any, machine: Machine
) -> None:
    machine.shell = shell
    machine.state.mkdir()
    (machine.folder / "precious").write_text("precious")
    for name in ("credential.new", "enrolling.new", "facts.new"):
        (machine.state / name).symlink_to(machine.folder / "precious")
    (machine.state / "enrolling").write_text(f'{NOWHERE} x"\n')
    assert machine.once(token=machine.door.token()).returncode == 0
    assert (machine.folder / "precious").read_text() == "precious"
    assert not (machine.state / "credential").is_symlink()
    # And when it comes just after the last look.
    plant = f'case $2 in *.new) ln -s {machine.folder}/precious "$2" ;; esac'
    machine.program("rm", f'{shutil.which("rm")} "$@"; {plant}')
    machine.once(token=machine.door.token())
    assert (machine.folder / "precious").read_text() == "precious"


# Secrets, and other processes.


def processes_of(session: int) -> Iterator[Path]:
    """The processes of a session."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(entry.name)) == session:
                yield entry


def shown_of(session: int) -> Dict[str, bytes]:
    """What anybody, and what a child, can see of the processes of a session."""
    shown = {}
    for entry in processes_of(session):
        with contextlib.suppress(OSError):
            argv = (entry / "cmdline").read_bytes()
            shown[entry.name] = argv + b"\n" + (entry / "environ").read_bytes()
    return shown


@on_linux
@in_every_shell
@slow
def test_no_secret_is_in_an_argument_or_an_environment(
    shell: Any, machine: Machine, tmp_path: Path
) -> None:
    machine.shell, token = shell, machine.door.token()
    # Names of its own that come from outside are handed on to children, with their new values.
    words = set(re.findall(r"\b([a-z_]+)=", hostenroll.AGENT_SCRIPT)) - {"state", "server"}
    assert {"token", "credential", "answer", "config", "body"} <= words
    machine.environment.update(dict.fromkeys(words, "from-outside"))
    for secret in (token, "eyJ"):
        with Middle(machine.door, tmp_path, "hold") as middle:
            machine.port = middle.port
            given = token if secret == token else ""
            with machine.agent(token=given) as agent:
                assert middle.held.wait(10)
                shown = shown_of(agent.pid)
                assert any(b"curl\0" in text for text in shown.values()) and len(shown) >= 2
                assert [text for text in shown.values() if secret.encode() in text] == []
                assert secret.encode() in middle.requests[0]
                middle.release.set()
                until(lambda: (machine.state / "credential").exists())
                assert secret not in "".join(machine.said())


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_a_shell_whose_printf_is_a_program_is_not_trusted_with_secrets(machine: Machine) -> None:
    (machine.folder / "settings").write_text("enable -n printf\n")
    machine.environment["BASH_ENV"] = str(machine.folder / "settings")
    machine.shell = ("bash",)
    done = machine.once(token=machine.door.token())
    assert done.returncode == 1 and "would show secrets" in done.stdout
    assert machine.hosts() == []


@on_linux
@in_every_shell
@slow
def test_a_signal_ends_the_agent_at_once_and_leaves_nothing(shell: Any, machine: Machine) -> None:
    machine.shell = shell
    assert machine.once(token=machine.door.token()).returncode == 0
    act_revoke(machine)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        with machine.agent() as agent:
            until(lambda: machine.said())  # and now it sleeps for an hour
            until(lambda agent=agent: len(list(processes_of(agent.pid))) == 2)
            began = time.monotonic()
            agent.send_signal(number)
            assert agent.wait(10) == -signal.SIGTERM and time.monotonic() - began < 2
            until(lambda agent=agent: list(processes_of(agent.pid)) == [])
        assert not os.path.lexists(machine.state / "lock")


@in_every_shell
@slow
def test_one_agent_to_a_folder(shell: Any, machine: Machine) -> None:
    machine.shell = shell
    assert machine.once(token=machine.door.token()).returncode == 0
    lock = machine.state / "lock"
    with machine.agent() as agent:
        until(lambda: os.path.lexists(lock))
        second = machine.once()
        assert second.returncode == 1 and f"process {agent.pid}, runs" in second.stdout
        agent.kill()
        agent.wait(10)
        assert os.path.lexists(lock)
        assert machine.once().returncode == 0
    assert not os.path.lexists(lock)
    for stale in ("1-1", f"{os.getpid()}-1", "999999999-", "nonsense"):
        lock.symlink_to(stale)
        assert machine.once().returncode == 0, stale
        assert not os.path.lexists(lock)


def test_of_two_agents_that_find_a_dead_ones_lock_one_runs(machine: Machine) -> None:
    """The other has taken it when this one, which has seen whose it was, takes it away."""
    assert machine.once(token=machine.door.token()).returncode == 0
    lock = machine.state / "lock"
    lock.symlink_to("999999999-1")
    other = f"{os.getpid()}-"
    ls, seen = shutil.which("ls"), machine.folder / "seen"
    taking = f"ln -sfn {other} {lock}"
    machine.program("ls", f"""{ls} "$@"
        case $* in *lock) [ -e {seen} ] || {{ >{seen} && {taking}; }} ;; esac""")  # fmt: skip
    second = machine.once()
    assert second.returncode == 1 and f"process {os.getpid()}, runs" in second.stdout
    assert os.readlink(str(lock)) == other
    assert [path.name for path in machine.state.iterdir() if "lock" in path.name] == ["lock"]


@slow
def test_an_agent_that_waits_for_an_hour_hears_of_a_new_enrollment(machine: Machine) -> None:
    assert machine.once(token=machine.door.token()).returncode == 0
    number = machine.host()["id"]
    act_reenroll(machine)
    with machine.agent():
        until(lambda: machine.said())
        token = machine.door.reenroll(number).document["token"]
        done = machine.run(token=token)
        assert done.returncode == 0 and "goes on with that" in done.stdout
        until(lambda: machine.said()[-1].endswith("hears this machine again"))
    assert len(machine.said()) == 2


@slow
@needs_curl
def test_agents_go_on_when_the_server_is_started_again(tmp_path: Path) -> None:
    key = api_key_of(tmp_path)
    with TlsProcess(tmp_path, "--heartbeat-interval", "1s") as server:
        port = server.port
        machine = Machine(tmp_path, TlsDoor(port, key))
        token = cli(tmp_path, "mint-token").stdout.strip()
        with machine.agent(token=token):
            until(lambda: machine.hosts() and machine.host()["status"] == "online")
            server.kill()
            until(lambda: "no answer from" in "".join(machine.said()))
            with TlsProcess(tmp_path, "--heartbeat-interval", "1s", "--port", str(port)) as again:
                seen = machine.host()["lastSeen"]
                until(lambda: machine.host()["lastSeen"] > seen, 20)
                assert cli(tmp_path, "rotate-signing-key").returncode == 0
                old = machine.credential()
                until(lambda: machine.credential() != old, 20)
                again.terminate()
    assert [line for line in machine.said() if "refused" in line] == []


# Installation.

IN_A_NEW_ROOT = """
set -e
for folder in /usr/local/sbin /etc/systemd/system /var/lib /run; do
    mount -t tmpfs none $folder
done
"""


def in_a_new_root(machine: Machine, script: str) -> subprocess.CompletedProcess[str]:
    """Run lines where nothing is installed yet; $agent is the agent with its arguments."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    server = f"--server 'https://127.0.0.1:{machine.port}' {shlex.join(machine.trust)}"
    lines = f'{IN_A_NEW_ROOT}\nagent() {{ sh {machine.script} {server} "$@"; }}\n{script}'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", lines], env=machine.environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False,
    )  # fmt: skip
    if "unshare failed" in done.stdout or "mount: " in done.stdout:
        pytest.skip("nothing can be mounted here")
    return done


UNIT_FILE = "/etc/systemd/system/hostenroll-agent.service"


@slow
@on_linux
def test_installed_with_systemd_it_is_a_service_without_privileges(
    machine: Machine, tmp_path: Path
) -> None:
    machine.program("systemctl", f'echo "systemctl $*" >>{tmp_path}/calls')
    machine.trust += trust(tmp_path, "--cacert", "one")
    token = machine.door.token()
    (tmp_path / "another").write_text(machine.door.token())
    done = in_a_new_root(
        machine,
        f"""
        mkdir -p /run/systemd/system
        printf %s {token} | agent --install --state /var/lib/mine --token-file - || echo status $?
        printf %s {token} | agent --install --hostname web-7 --token-file -
        cp {UNIT_FILE} {tmp_path}/; stat -c '%a %n' {UNIT_FILE} /usr/local/sbin/* /var/lib/*/*
        systemd-analyze verify {UNIT_FILE} >{tmp_path}/verified 2>&1 || :
        chown 1234:1234 /var/lib/hostenroll-agent
        sh -c "$(sed -n 's/^ExecStart=//p' {UNIT_FILE}) --once --token-file {tmp_path}/another"
        stat -c '%u:%g %a' /var/lib/hostenroll-agent/credential
        agent --uninstall
        find {UNIT_FILE} /usr/local/sbin /etc/hostenroll-agent.pem /var/lib/*/credential 2>&- || :
        """,
    )
    assert done.returncode == 0, done.stdout
    assert "--state does not go with --install" in done.stdout and "status 2\n" in done.stdout
    assert f"644 {UNIT_FILE}\n755 /usr/local/sbin/hostenroll-agent\n" in done.stdout
    assert "600 /var/lib/hostenroll-agent/credential\n" in done.stdout
    assert "\n1234:1234 600\n" in done.stdout  # it is the service's, whoever wrote it
    assert done.stdout.endswith("\n/usr/local/sbin\n/var/lib/hostenroll-agent/credential\n")
    assert {host["hostname"] for host in machine.hosts()} == {"web-7"}
    name = "hostenroll-agent.service"
    assert (tmp_path / "calls").read_text().splitlines() == [
        "systemctl daemon-reload", f"systemctl enable {name}", f"systemctl restart {name}",
        f"systemctl disable --now {name}", "systemctl daemon-reload",
    ]  # fmt: skip
    unit = (tmp_path / name).read_text()
    assert "het_" not in unit and "eyJ" not in unit
    assert (
        shutil.which("systemd-analyze") is None or name not in (tmp_path / "verified").read_text()
    )


@slow
@on_linux
def test_without_systemd_install_prints_a_line_for_cron_that_works(
    machine: Machine, tmp_path: Path
) -> None:
    machine.program("logger", f"cat >>{tmp_path}/logged")
    token = machine.door.token()
    done = in_a_new_root(
        machine,
        f"""
        printf %s {token} | agent --install --token-file - >/run/line
        cat /run/line; sh -c "$(sed 's/.* sleep [0-9]*; //' /run/line)"
        agent --uninstall
        ls /usr/local/sbin
        """,
    )
    assert done.returncode == 0, done.stdout
    line = re.search(r"^\* \* \* \* \* sleep (\d+); sh /\S+ --server .*$", done.stdout, re.M)
    assert line is not None and 1 <= int(line[1]) <= 50 and "het_" not in line[0]
    assert (tmp_path / "logged").read_text() == ""
    assert machine.host()["status"] == "online"
    assert done.stdout.splitlines()[-1].startswith("hostenroll-agent: uninstalled;")


def test_what_has_no_credential_and_no_file_is_not_installed(tmp_path: Path) -> None:
    state = ("--state", str(tmp_path / "state"))
    done = run_script(tmp_path, "--server", "https://a", "--install", *state)
    assert done.returncode == 2 and "--token-file" in done.stdout
    (tmp_path / "state" / "credential").write_text("a.b.c\n0\n0\n")
    piped = subprocess.run(
        ["sh", "-s", "--", "--server", "https://a", "--install", *state], text=True,
        input=hostenroll.AGENT_SCRIPT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert piped.returncode == 1 and "save this script in a file" in piped.stdout


# 9. Api

NOWHERE = "0000000000000000"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
TOKEN = {
    "id",
    "organizationId",
    "state",
    "description",
    "hostname",
    "hostId",
    "labels",
    "maxUses",
    "uses",
    "createdAt",
    "createdBy",
    "expiresAt",
    "usedAt",
    "usedFrom",
    "revokedAt",
    "hosts",
}
HOST = {
    "id",
    "organizationId",
    "name",
    "hostname",
    "os",
    "architecture",
    "dockerVersion",
    "labels",
    "status",
    "statusReason",
    "enrolledAt",
    "lastSeen",
    "tokenId",
    "revokedAt",
    "warnings",
}
PATHS = sorted({route.path for route in hostenroll.ROUTES})
GETS = [route.path for route in hostenroll.ROUTES if route.method == "GET"]
USER_ROUTES = [route for route in hostenroll.ROUTES if route.caller in ("admin", "viewer")]


class Estate(NamedTuple):
    """One token, one host, and every kind of caller."""

    door: Any
    token: Reply
    enrolled: Reply
    callers: Dict[str, Optional[str]]

    def path(self, template: str) -> str:
        """A path with an id that exists."""
        number = self.token.document["id"] if "tokens" in template else self.host
        return template.replace("{id}", number)

    @property
    def host(self) -> str:
        return str(self.enrolled.document["hostId"])

    def ask(self, caller: str, method: str, path: str, body: Any = None) -> Reply:
        reply: Reply = self.door.call(method, path, body, self.callers[caller])
        return reply


@pytest.fixture
def estate(api: ApiDoor) -> Estate:
    registry, clock = api.registry, api.clock
    do(registry, clock, lambda now: registry.add_organization(OPERATOR, "berlin", now))
    callers: Dict[str, Optional[str]] = {
        "owner": api.api_key,
        "admin": make_api_key(registry, clock, "default"),
        "viewer": make_api_key(registry, clock, "default", "viewer"),
        "stranger": make_api_key(registry, clock, "berlin"),
        "nobody": None,
        "junk": "hak_junk",
        "forged": api.api_key[:-9] + ("A" if api.api_key[-9] != "A" else "B") + api.api_key[-8:],
        "revoked": make_api_key(registry, clock),
    }
    number = int(str(callers["revoked"]).split("_")[1], 16)
    do(registry, clock, lambda now: registry.revoke_api_key(OPERATOR, number, now))
    token = api.mint(maxUses=2, labels={"rack": "b4"}, description="the cellar")
    callers["token"] = str(token.document["token"])
    enrolled = api.enroll(token.document["token"])
    callers["credential"] = str(enrolled.document["credential"])
    return Estate(api, token, enrolled, callers)


ORDER = {
    "the path comes before the method": ("nobody", "PUT", "/api/nothing?x=1", b"{", "not-found"),
    "the method before the key": ("nobody", "PUT", "/api/hosts?x", b"{", "method-not-allowed"),
    "the key before the role": ("junk", "POST", "/api/hosts/tokens?x=1", b"{", "api-key-invalid"),
    "the role before the query": ("viewer", "POST", "/api/hosts/tokens?x=1", b"{}", "forbidden"),
    "the role before the body": ("viewer", "POST", "/api/hosts/tokens", b"{", "forbidden"),
    "the role before the object": (
        "viewer", "DELETE", f"/api/hosts/{NOWHERE}", None, "forbidden"),
    "the query before the object": (
        "owner", "GET", f"/api/hosts/{NOWHERE}?x=1", None, "invalid-query"),
    "the body before the object": (
        "owner", "PATCH", f"/api/hosts/{NOWHERE}", {"x": 1}, "invalid-body"),
    "the object last": ("owner", "PATCH", f"/api/hosts/{NOWHERE}", {}, "not-found"),
    "an id of no shape is not found": ("owner", "GET", "/api/hosts/none", None, "not-found"),
    "a credential before the body": ("nobody", "POST", "/api/agent/heartbeat", b"{",
        "credential-missing"),
    "a bad one before the body": ("owner", "POST", "/api/agent/heartbeat", b"{",
        "credential-invalid"),
    "a good one, then the body": ("credential", "POST", "/api/agent/heartbeat", b"{",
        "invalid-body"),
    "at enrollment the body": ("nobody", "POST", "/api/agent/enroll", {"token": "junk"},
        "invalid-body"),
    "and then the token": ("nobody", "POST", "/api/agent/enroll",
        {"token": "junk", "hostname": "a"}, "token-unknown"),
}  # fmt: skip


@pytest.mark.parametrize("case", ORDER.values(), ids=ORDER)
def test_the_order_of_refusals(case: Any, estate: Estate) -> None:
    caller, method, path, body, code = case
    assert estate.ask(caller, method, path, body).code == code


def test_framing_is_refused_before_the_path(live: SocketDoor) -> None:
    said = live.send(b"PUT /api/nothing HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n")
    assert [reply.code for reply in said] == ["malformed-request"]


@pytest.mark.parametrize("path", GETS)
def test_head_is_get_without_the_body(path: str, live: SocketDoor) -> None:
    token = live.mint()
    enrolled = live.enroll(token.document["token"])
    path = Estate(live, token, enrolled, {}).path(path)
    got = live.call("GET", path, bearer=live.api_key)
    with live.connect() as peer, peer.makefile("rb") as stream:
        # A body after the head would stand where the second answer is read.
        peer.sendall(request_bytes("HEAD", path, bearer=live.api_key) * 2)
        for _ in range(2):
            head = read_reply(stream, head_only=True)
            assert head is not None
            assert (head.status, head.document) == (200, None)
            moving = {"date": "", **({"content-length": ""} if path == "/metrics" else {})}
            assert {**head.headers, **moving} == {**got.headers, **moving}
    refused = live.call("HEAD", "/api/hosts")
    assert refused.status == 401 and int(refused.headers["content-length"]) > 0


@pytest.mark.parametrize("path", [*PATHS, "*"])
def test_every_path_says_what_it_allows(path: str, live: SocketDoor) -> None:
    methods = {route.method for route in hostenroll.ROUTES if path in ("*", route.path)}
    allowed = methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())
    target = path.replace("{id}", NOWHERE)
    options = live.call("OPTIONS", target)
    assert (options.status, options.document) == (204, None)
    assert "content-length" not in options.headers  # RFC 9110 section 8.6
    assert set(options.headers["allow"].split(", ")) == allowed
    assert options.headers["allow"].count(",") == len(allowed) - 1
    for method in () if path == "*" else {*hostenroll.METHODS} - allowed:
        refused = live.call(method, target)
        code = None if method == "HEAD" else "method-not-allowed"
        assert (refused.status, refused.code) == (405, code)
        assert refused.headers["allow"] == options.headers["allow"]


@pytest.mark.parametrize("method", ["FOO", "get", "PROPFIND", "M-SEARCH", "CONNECT"])
def test_a_method_that_nobody_knows_is_not_implemented(method: str, live: SocketDoor) -> None:
    target = "enroll.test:443" if method == "CONNECT" else "/healthz"
    assert live.call(method, target).code == "not-implemented"


@pytest.mark.parametrize(
    "path",
    [
        "/nothing", "/api", "/api/hosts/", "/api/hosts//", "//healthz", "/healthz/", "/HEALTHZ",
        "/api/hosts/../hosts", "/api/hosts/%2e%2e", "/%68ealthz", "/api/hosts/{id}/tokens",
        "/api/hosts/tokens/{id}/revoke", "/api/hosts;x/tokens",
    ],
)  # fmt: skip
def test_what_is_not_there_is_not_found(path: str, estate: Estate) -> None:
    reply = estate.ask("owner", "GET", path.replace("{id}", estate.host))
    assert (reply.status, reply.code) == (404, "not-found")


def test_every_refusal_is_a_problem_document(live: SocketDoor) -> None:
    asked = [
        request_bytes("GET", "/nothing"),
        request_bytes("PUT", "/healthz"),
        request_bytes("FOO", "/healthz"),
        request_bytes("GET", "/api/hosts"),
        request_bytes("GET", "/api/hosts?x=1", bearer=live.api_key),
        request_bytes("POST", "/api/agent/enroll", b"{}"),
        request_bytes("POST", "/api/agent/enroll", {"token": "het_", "hostname": "a"}),
        request_bytes("POST", "/api/agent/heartbeat"),
        b"GET / HTTP/3.0\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 65537\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 200-ok\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 17_000 + b"\r\n\r\n",
    ]
    codes = set()
    for data in asked:
        (reply,) = live.send(data)
        codes.add(reply.code)
        assert reply.headers["content-type"] == "application/problem+json"
        assert reply.document["type"] == f"urn:hostenroll:problem:{reply.code}"
        assert reply.document["status"] == reply.status >= 400
        assert reply.document["title"] and reply.document["detail"].endswith(".")
        assert set(reply.document) - {"errors"} == {"type", "title", "status", "detail", "code"}
        assert ("www-authenticate" in reply.headers) == (reply.status == 401)
        assert ("allow" in reply.headers) == (reply.status == 405)
    assert len(codes) == 13


def test_no_answer_is_stored_or_sniffed_or_open_to_other_sites(live: SocketDoor) -> None:
    token = live.mint()
    number = token.document["id"]
    enrolled = live.enroll(token.document["token"])
    replies = [token, enrolled, live.beat(enrolled.document["credential"])]
    replies += [live.revoke_token(number), live.call("OPTIONS", "/healthz"), live.host("none")]
    replies += [live.call("GET", "/healthz"), *live.send(b"nonsense\r\n\r\n")]
    for reply in replies:
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "no-store"
        assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} [\d:]{8} GMT", reply.headers["date"])
        assert not [h for h in reply.headers if h.startswith("access-control") or "cookie" in h]
        assert "server" not in reply.headers


# Contract shapes: exactly these members, no more and no fewer.


def test_a_token_has_exactly_its_members(estate: Estate, clock: Clock) -> None:
    minted = estate.token.document
    assert set(minted) == TOKEN | {"token"}
    assert (minted["state"], minted["uses"], minted["usedAt"], minted["hosts"]) == (
        "valid", 0, None, [])  # fmt: skip
    shown = estate.ask("owner", "GET", estate.path("/api/hosts/tokens/{id}")).document
    assert set(shown) == TOKEN
    assert (shown["uses"], shown["usedFrom"], shown["hosts"]) == (1, "192.0.2.7", [estate.host])
    assert shown["labels"] == {"rack": "b4"} and shown["createdBy"].startswith("api-key:")
    assert shown["createdAt"] == shown["usedAt"] == "2027-01-15T08:00:00.000Z"
    assert shown["expiresAt"] == "2027-01-15T09:00:00.000Z"
    listed = estate.ask("owner", "GET", "/api/hosts/tokens").document
    assert listed == {"tokens": [shown], "nextCursor": None}


def test_a_token_is_shown_once(estate: Estate) -> None:
    """Nor does any list, host, refusal or second look show a secret."""
    secrets = [str(text) for name, text in estate.callers.items() if text and name != "junk"]
    gets = [estate.path(route.path) for route in USER_ROUTES if route.method == "GET"]
    said = [estate.ask("owner", "GET", path).document for path in gets]
    said.append(estate.door.enroll(estate.token.document["token"] + "x").document)
    said.append(estate.ask("forged", "GET", "/api/me").document)
    assert [text for text in secrets if text in json.dumps(said)] == []


def test_a_host_has_exactly_its_members(estate: Estate, clock: Clock) -> None:
    shown = estate.door.host(estate.host).document
    assert set(shown) == HOST
    assert (shown["status"], shown["lastSeen"], shown["revokedAt"]) == ("pending", None, None)
    assert (shown["name"], shown["hostname"], shown["labels"]) == (
        "web-1", "web-1", {"rack": "b4"})  # fmt: skip
    assert (shown["os"], shown["tokenId"]) == ("", estate.token.document["id"])
    clock.advance(1.234)
    estate.door.beat(estate.callers["credential"], os="Debian", dockerVersion="27.1")
    revoked = estate.door.revoke(estate.host).document
    assert set(revoked) == HOST
    assert (revoked["status"], revoked["os"], revoked["dockerVersion"]) == (
        "revoked", "Debian", "27.1")  # fmt: skip
    assert revoked["lastSeen"] == revoked["revokedAt"] == "2027-01-15T08:00:01.234Z"
    listed = estate.ask("owner", "GET", "/api/hosts").document
    assert listed == {"hosts": [revoked], "nextCursor": None}


def test_the_agents_replies_have_exactly_their_members(paths: Any, clock: Clock) -> None:
    for ttl, more in ((None, set()), (30, {"credential", "credentialExpiresAt"})):
        registry = open_registry(*paths, clock.ms, credential_ttl=ttl)
        door = ApiDoor(registry, clock)
        enrolled = door.enroll(door.token())
        assert (enrolled.status, set(enrolled.document)) == (201, {
            "hostId", "organizationId", "name", "credential", "credentialExpiresAt",
            "heartbeatIntervalSeconds"})  # fmt: skip
        assert enrolled.document["organizationId"] == "default"
        assert enrolled.document["heartbeatIntervalSeconds"] == 30
        expires = enrolled.document["credentialExpiresAt"]
        assert (expires is None) == (ttl is None) and (expires is None or TIME.fullmatch(expires))
        clock.advance(25)
        beaten = door.beat(enrolled.document["credential"])
        assert set(beaten.document) == {"hostId", "lastSeen", "nextHeartbeatSeconds"} | more
        assert TIME.fullmatch(beaten.document["lastSeen"])
        assert beaten.document["hostId"] == enrolled.document["hostId"]
        if more:
            assert door.beat(beaten.document["credential"]).status == 200
        registry.close()


@pytest.mark.parametrize("interval", [1, 2, 5, 30, 3600])
def test_the_next_heartbeat_is_within_fifteen_percent(
    interval: int, paths: Any, clock: Clock
) -> None:
    registry = open_registry(*paths, clock.ms, interval=interval)
    door = ApiDoor(registry, clock)
    credential = door.enroll(door.token()).document["credential"]
    facts: List[Dict[str, str]] = [{}, {"os": "Debian"}]
    drawn = [
        door.beat(credential, **facts[n % 2]).document["nextHeartbeatSeconds"] for n in range(80)
    ]
    registry.close()
    assert all(isinstance(seconds, int) and seconds > 0 for seconds in drawn)
    assert interval * 0.85 <= min(drawn) <= max(drawn) <= interval * 1.15
    assert len(set(drawn)) > 1 or interval < 30  # a fleet does not beat as one


def test_me_says_whose_a_key_is(estate: Estate) -> None:
    seen = {
        caller: estate.ask(caller, "GET", "/api/me").document
        for caller in ("owner", "viewer", "stranger")
    }
    assert {name: (me["role"], me["organizationId"]) for name, me in seen.items()} == {
        "owner": ("admin", None),
        "viewer": ("viewer", "default"),
        "stranger": ("admin", "berlin"),
    }
    assert set(seen["owner"]) == {"id", "role", "organizationId"}
    assert seen["owner"]["id"] == str(estate.callers["owner"]).split("_")[1]


# The short way of a plain heartbeat.

BEAT_LINE = b"POST /api/agent/heartbeat HTTP/1.1"
CREDENTIAL_MARK = b"CREDENTIAL"
CURL_BEAT = [
    BEAT_LINE,
    b"Host: enroll.test",
    b"User-Agent: curl/7.88.1",
    b"Accept: */*",
    b"Authorization: Bearer CREDENTIAL",
]
USUAL_BEATS = {
    "curl's": b"\r\n".join(CURL_BEAT) + b"\r\n\r\n",
    "with a length": b"\r\n".join([*CURL_BEAT, b"Content-Length: 0"]) + b"\r\n\r\n",
    "with an object": b"\r\n".join([*CURL_BEAT, b"Content-Length: 2"]) + b"\r\n\r\n{}",
    "that closes": b"\r\n".join([*CURL_BEAT, b"Connection: close"]) + b"\r\n\r\n",
    "with a query": b"POST /api/agent/heartbeat?x=y HTTP/1.1\r\n"
    + b"\r\n".join(CURL_BEAT[1:])
    + b"\r\n\r\n",
    "of HTTP/1.0": BEAT_LINE[:-1] + b"0\r\n" + b"\r\n".join(CURL_BEAT[1:]) + b"\r\n\r\n",
    "after an empty line": b"\r\n" + b"\r\n".join(CURL_BEAT) + b"\r\n\r\n",
}


def the_long_way(api: ApiDoor, data: bytes) -> Any:
    """The claims and the head of a plain heartbeat that is read and admitted like any request;
    None of all else."""
    reader = RequestReader("192.0.2.7")
    try:
        request = reader.next(data)
    except Problem:
        return None
    if request is None or reader.buffer:
        return None
    admitted = api.api.admit(request, api.clock.ms)
    is_plain = not isinstance(admitted, (Act, hostenroll.Response))
    return (admitted, request.head) if is_plain else None


@pytest.mark.parametrize("data", USUAL_BEATS.values(), ids=USUAL_BEATS)
def test_a_usual_heartbeat_goes_the_short_way(api: ApiDoor, data: bytes) -> None:
    credential = api.enroll(api.token()).document["credential"].encode()
    data = data.replace(CREDENTIAL_MARK, credential)
    for _ in range(2):
        heard = api.api.hear(data, api.clock.ms)
        assert heard is not None and heard == the_long_way(api, data)
    for end in range(len(data)):
        assert api.api.hear(data[:end], api.clock.ms) is None
    assert api.api.hear(data + b"P", api.clock.ms) is None
    assert api.api.hear(data + data, api.clock.ms) is None
    more = data.replace(credential, credential + b"\r\nX: y")
    for told in (more, data, more):
        heard = api.api.hear(told, api.clock.ms)
        assert heard is not None and heard == the_long_way(api, told)


def test_what_is_no_heartbeat_is_not_heard_for_its_good_credential(api: ApiDoor) -> None:
    """Not even when there is none before it to compare it with."""
    credential = api.enroll(api.token()).document["credential"].encode()
    opening = api.registry.keyring.first.opening
    rest = credential[len(opening) :]
    usual = USUAL_BEATS["curl's"].replace(CREDENTIAL_MARK, credential)
    for is_first in (True, False):
        for start in (b"", b"\0", b"\r\n", b"\r\nAuthorization: Bearer ", b"\0" + opening, opening):
            for end in (b"", b"\0", b"\r\n", b"\r\n\r\n", b"\r\n\r\n{}"):
                api.api.relieve()
                assert is_first or api.api.hear(usual, api.clock.ms) is not None
                assert api.api.hear(start + rest + end, api.clock.ms) is None
                assert api.api.hear(start + end, api.clock.ms) is None


def proofs_of(monkeypatch: pytest.MonkeyPatch) -> List[bytes]:
    """The credentials that are verified from now on."""
    proven: List[bytes] = []
    read = hostenroll.Keyring.read

    def listing(keyring: hostenroll.Keyring, credential: bytes) -> Any:
        proven.append(credential)
        return read(keyring, credential)

    monkeypatch.setattr(hostenroll.Keyring, "read", listing)
    return proven


def plain_beats(api: ApiDoor, number: int) -> List[bytes]:
    """Those of so many hosts, as curl sends them."""
    tokens = [api.token() for _ in range(number)]
    credentials = [api.enroll(token).document["credential"].encode() for token in tokens]
    return [USUAL_BEATS["curl's"].replace(CREDENTIAL_MARK, it) for it in credentials]


def test_a_newcomer_takes_nobodys_place_among_the_credentials_that_are_known(
    api: ApiDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither does junk. Those for whom there is no room are verified each time."""
    monkeypatch.setattr(hostenroll, "CREDENTIALS_CACHED", 2)
    beats = plain_beats(api, 3)
    junk = re.sub(rb"(Bearer \S+)", rb"\1x", beats[0])
    proven = proofs_of(monkeypatch)
    for _ in range(5):
        heard = [api.api.hear(data, api.clock.ms) is not None for data in (junk, *beats)]
        assert heard == [False, True, True, True]
    times = sorted(proven.count(credential) for credential in set(proven))
    assert times == [1, 1, 5, 5]
    api.api.relieve()
    assert api.api.hear(beats[0], api.clock.ms) is not None
    assert len(proven) == 13  # for want of memory all were forgotten
    request = request_bytes("GET", "/api/hosts", bearer=api.api_key)
    assert api.api.hear(request, api.clock.ms) is None and len(proven) == 13


def test_keys_are_heeded_though_there_was_no_memory_when_they_changed(
    api: ApiDoor, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data,) = plain_beats(api, 1)
    assert api.api.hear(data, clock.ms) is not None
    rotate(api.registry, clock)

    def starved(keyring: hostenroll.Keyring) -> Any:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(hostenroll.Keyring, "first", property(starved))
        with pytest.raises(MemoryError):
            api.api.hear(data, clock.ms)
    assert api.api.hear(data, clock.ms) is None


@pytest.mark.parametrize("ttl, is_kept", [(None, True), (7200, True), (3600, False), (60, False)])
def test_a_credential_is_kept_no_longer_than_it_is_good_for(
    ttl: Optional[int],
    is_kept: bool,
    paths: Tuple[str, str],
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor for ever; and when the clock is set, all are verified anew."""
    kept, began = hostenroll.CREDENTIALS_KEPT_MS, clock.ms
    proven = proofs_of(monkeypatch)
    with contextlib.closing(open_registry(*paths, clock.ms, credential_ttl=ttl)) as registry:
        (data,) = plain_beats(ApiDoor(registry, clock), 1)
        hear = Api(registry).hear
        for later, times in ((0, 1), (0, 1), (1, 1), (kept - 1, 1), (kept, 2), (0, 3), (0, 3)):
            heard = hear(data, began + later)
            assert (heard is None) == (ttl is not None and later * 3 > ttl * 2000)
            if is_kept:
                assert len(proven) == times
        assert is_kept or len(proven) == 7
        rotate(registry, clock)
        assert hear(data, began) is None  # the new key is to sign another


def test_what_goes_the_short_way_would_come_to_the_same_the_long_way(api: ApiDoor) -> None:
    """Heads, bodies, chunks and trailers with an Authorization in every place: none is heard that
    the strict reader reads otherwise."""
    one, other = (api.enroll(api.token(), name).document["credential"] for name in ("a", "b"))
    names = [b"Authorization: Bearer ", b"authorization: Bearer ", b"Authorization:Bearer "]
    values = [one.encode(), other.encode(), b"junk", b"", one.encode() + b" ", b"\xe9"]
    values += [one.encode()[:-1], one.encode() + b"\r", one.encode() + b"\n", b" " + one.encode()]
    lines = [name + value for name in names for value in values] + [b"Authorization:", b"X: y"]
    others = [
        b"Content-Length: 0", b"Content-Length: 2", b"Content-Length: 4", b"Connection: close",
        b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", b"Expect: 100-continue",
        b"Host: b", b"no colon", b" folded", b"Content-Length: 2", b"X: y", b"X: \0",
    ]  # fmt: skip
    marked = b"\r\nAuthorization: Bearer " + one.encode() + b"\r\n"
    bodies = [
        b"", b"{}", b"{}\r\n", b"2\r\n{}\r\n0\r\n\r\n", b"2\r\n{}\r\n0" + marked + b"\r\n",
        b"0" + marked + b"\r\n", marked, b"{}" + marked, b"2;x=y\r\n{}\r\n0\r\n\r\n", b"[]",
        b'{"os":"x"}', BEAT_LINE + b"\r\nHost: h" + marked + b"\r\n",
        b"0\r\nX: y" + marked + b"\r\n", b"", b"", b"", b"{}",
    ]  # fmt: skip
    starts = [BEAT_LINE] * 6 + [
        b"POST /api/agent/enroll HTTP/1.1", b"GET /api/agent/heartbeat HTTP/1.1",
        b"POST http://h/api/agent/heartbeat HTTP/1.1", b"POST /api/agent/heartbeat HTTP/1.0",
        b"POST /api/agent/%68eartbeat HTTP/1.1", b"POST /api/agent/heartbeat HTTP/2.0",
        b"HEAD /api/agent/heartbeat HTTP/1.1", b"POST /api/hosts/tokens HTTP/1.1",
    ]  # fmt: skip
    rng = random.Random(11)
    heard = 0
    for _ in range(6000):
        if rng.random() < 0.1:
            api.api.relieve()
        fields = [lines[0]] * rng.randint(0, 1) + rng.sample(lines, rng.choice((0, 0, 1, 2)))
        fields += rng.choices(others, k=rng.choice((0, 1, 1, 2)))
        rng.shuffle(fields)
        head = b"\r\n".join([rng.choice(starts), b"Host: h", *fields])
        data = head + b"\r\n\r\n" + rng.choice(bodies)
        short = api.api.hear(data, api.clock.ms)
        if short is not None:
            heard += 1
            assert short == the_long_way(api, data), data
    assert heard > 100


def test_a_heartbeat_that_is_not_plain_goes_the_long_way(api: ApiDoor, tmp_path: Path) -> None:
    plain = USUAL_BEATS["curl's"]
    paths = str(tmp_path / "short.db"), str(tmp_path / "short.key")
    with contextlib.closing(open_registry(*paths, api.clock.ms, credential_ttl=90)) as registry:
        door = ApiDoor(registry, api.clock)
        credential = door.enroll(door.token()).document["credential"].encode()
        data = plain.replace(CREDENTIAL_MARK, credential)
        assert door.api.hear(data, api.clock.ms) is not None
        assert door.api.hear(data, api.clock.ms + 59_999) is not None
        assert door.api.hear(data, api.clock.ms + 60_001) is None  # due for renewal
        assert door.api.hear(data, api.clock.ms + 30 * 86_400_000) is None  # expired
        do(registry, api.clock, lambda now: registry.rotate_signing_key(OPERATOR, now))
        assert door.api.hear(data, api.clock.ms) is None  # signed with a key that is not the first
    stranger = hostenroll.new_keyring().first.sign(CLAIMS).encode()
    assert api.api.hear(plain.replace(CREDENTIAL_MARK, stranger), api.clock.ms) is None
    mine = api.enroll(api.token()).document["credential"].encode()
    fields = b"X-Long: %b\r\n" % (b"x" * hostenroll.HEAD_CACHED_MAXIMUM)
    long = plain.replace(b"Accept: */*\r\n", fields).replace(CREDENTIAL_MARK, mine)
    assert the_long_way(api, long) is not None and api.api.hear(long, api.clock.ms) is None


@pytest.mark.parametrize("interval", [1, 30, 66, 100, 900, 86_400])
@pytest.mark.parametrize("closes", [False, True], ids=["kept alive", "closed"])
def test_the_short_answer_is_the_long_one(
    paths: Tuple[str, str], clock: Clock, interval: int, closes: bool
) -> None:
    with contextlib.closing(open_registry(*paths, clock.ms, interval=interval)) as registry:
        door = ApiDoor(registry, clock)
        credential = door.enroll(door.token()).document["credential"]
        number, standing = plain(registry, credential, clock)
        for seed in range(20):
            random.seed(seed)
            response = door.api.answer((number, standing), clock.ms)
            assert response is not None
            long = hostenroll.write_response(response, int(clock.now), closes, False)
            random.seed(seed)
            short = door.api.answer_plainly(number, clock.ms, int(clock.now), closes)
            assert short == long


def test_refusals_on_the_short_way_name_their_requests_and_addresses(
    live: SocketDoor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    token = live.token(maxUses=2)
    good, bad = (live.enroll(token, name).document for name in ("web-1", "web-2"))
    live.revoke(bad["hostId"])
    data = USUAL_BEATS["curl's"]
    with live.connect() as peer, peer.makefile("rb") as stream:
        replies = []
        for one in (good, bad, bad, good, bad):
            peer.sendall(data.replace(CREDENTIAL_MARK, one["credential"].encode()))
            replies.append(read_reply(stream))
    assert [reply and reply.status for reply in replies] == [200, 403, 403, 200, 403]
    names = [reply.headers["x-request-id"] for reply in replies if reply and reply.status == 403]
    assert [name.split("-")[1] for name in names] == ["2", "3", "5"]
    until(lambda: sum("host-revoked" in line for line in caplog.messages) == 3)
    logged = [r for r in caplog.records if "host-revoked" in r.message]
    assert [r.__dict__["request"] for r in logged] == names
    assert all("from 127.0.0.1" in r.message for r in logged)


# Bodies and queries.

MANY_LABELS = {f"k{n}": "v" for n in range(33)}
BAD_ARRIVALS: Dict[str, Tuple[Dict[str, Any], str]] = {
    "nothing": ({"token": None, "hostname": None}, "hostname token"),
    "a token that is a number": ({"token": 1}, "token"),
    "an empty token": ({"token": ""}, "token"),
    "an endless token": ({"token": "x" * 257}, "token"),
    "no hostname": ({"hostname": ""}, "hostname"),
    "a hostname with a space": ({"hostname": "web 1"}, "hostname"),
    "a hostname with a newline": ({"hostname": "web-1\n"}, "hostname"),
    "a hostname that is an option": ({"hostname": "-rf"}, "hostname"),
    "a hostname with markup": ({"hostname": "<b>"}, "hostname"),
    "a hostname of 254": ({"hostname": "h" * 254}, "hostname"),
    "a name that turns the text": ({"name": "a\u202eb"}, "name"),
    "a name with an escape": ({"name": "\x1b[2J"}, "name"),
    "an empty name": ({"name": ""}, "name"),
    "facts of the wrong kind": ({"os": 1, "dockerVersion": []}, "dockerVersion os"),
    "a fact of 129": ({"architecture": "x" * 129}, "architecture"),
}


@pytest.mark.parametrize("case", BAD_ARRIVALS.values(), ids=BAD_ARRIVALS)
def test_an_enrollment_names_every_member_that_is_wrong(case: Any, api: ApiDoor) -> None:
    changes, fields = case
    body = {"token": api.token(), "hostname": "web-1"}
    refused = api.call("POST", "/api/agent/enroll", {**body, **changes})
    assert (refused.status, refused.code) == (400, "invalid-body")
    assert " ".join(sorted(e["field"] for e in refused.document["errors"])) == fields
    assert all(set(error) == {"field", "detail"} for error in refused.document["errors"])
    assert api.call("POST", "/api/agent/enroll", body).status == 201  # it was not used up


NOT_OBJECTS = {
    "half a body": b'{"token":', "a list": b"[]", "null": b"null", "a string": b'"x"',
    "not UTF-8": b'{"token":"\xff","hostname":"a"}', "a BOM": b"\xef\xbb\xbf{}",
    "a member twice": b'{"hostname":"a","hostname":"b"}', "NaN": b'{"os":NaN}',
    "a lone surrogate": b'{"name":"\\ud800"}', "too deep": b'{"x":' + b"[" * 60_000,
    "form data": b"token=x",
    "two bodies": b"{}{}", "a comment": b"{}//",
}  # fmt: skip


@pytest.mark.parametrize("body", NOT_OBJECTS.values(), ids=NOT_OBJECTS)
def test_what_is_not_a_json_object_is_refused(body: bytes, estate: Estate) -> None:
    for caller, path in (
        ("nobody", "/api/agent/enroll"),
        ("credential", "/api/agent/heartbeat"),
        ("owner", "/api/hosts/tokens"),
    ):
        refused = estate.ask(caller, "POST", path, body)
        assert (path, refused.status, refused.code) == (path, 400, "invalid-body")


def test_an_invalid_body_or_query_always_has_a_list_of_errors(estate: Estate) -> None:
    for body in (b"", b"[]", b"{", b'{"os":NaN}'):
        refused = estate.ask("nobody", "POST", "/api/agent/enroll", body).document
        assert isinstance(refused.get("errors"), list), body
    refused = estate.ask("owner", "GET", "/api/hosts?q=%ff").document
    assert isinstance(refused.get("errors"), list)


def test_what_an_empty_body_means(estate: Estate) -> None:
    assert estate.ask("credential", "POST", "/api/agent/heartbeat", b"").status == 200
    assert estate.ask("credential", "POST", "/api/agent/heartbeat", b"{}").status == 200
    assert estate.ask("nobody", "POST", "/api/agent/enroll", b"").code == "invalid-body"
    assert estate.ask("owner", "POST", "/api/hosts/tokens", b"").status == 201
    unchanged = estate.ask("owner", "PATCH", estate.path("/api/hosts/{id}"), b"")
    assert (unchanged.status, unchanged.document["name"]) == (200, "web-1")


def test_agents_may_say_more_than_we_know(estate: Estate) -> None:
    """A newer agent meets an older server; so does a query that a proxy added."""
    more = {"kernel": "6.1", "deep": [{"a": None}], "__class__": 1}
    token = estate.token.document["token"]
    arrival = {"token": token, "hostname": "web-2", **more}
    assert estate.ask("nobody", "POST", "/api/agent/enroll?from=proxy", arrival).status == 201
    assert estate.ask("credential", "POST", "/api/agent/heartbeat?x=1", more).status == 200
    assert estate.ask("nobody", "GET", "/healthz?verbose").status == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "\xff"])
def test_the_content_type_is_never_looked_at(kind: str, live: SocketDoor) -> None:
    body = json.dumps({"token": live.token(), "hostname": "web-1"}).encode()
    head = f"POST /api/agent/enroll HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\n"
    data = head.encode("latin-1") + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    assert [reply.status for reply in live.send(data)] == [201]


BAD_ORDERS: Dict[str, Tuple[Dict[str, Any], str]] = {
    "a second less than a minute": ({"ttlSeconds": 59}, "ttlSeconds"),
    "a second more than 30 days": ({"ttlSeconds": 2_592_001}, "ttlSeconds"),
    "text": ({"ttlSeconds": "3600"}, "ttlSeconds"),
    "a float": ({"ttlSeconds": 3600.5}, "ttlSeconds"),
    "true": ({"ttlSeconds": True}, "ttlSeconds"),
    "null": ({"ttlSeconds": None}, "ttlSeconds"),
    "no use": ({"maxUses": 0}, "maxUses"),
    "more than a million uses": ({"maxUses": 1_000_001}, "maxUses"),
    "a bad hostname": ({"hostname": "a b"}, "hostname"),
    "a long description": ({"description": "x" * 1001}, "description"),
    "labels in a list": ({"labels": ["a=b"]}, "labels"),
    "a label without a name": ({"labels": {"": "x"}}, "labels"),
    "a label that is a number": ({"labels": {"k": 1}}, "labels"),
    "too many labels": ({"labels": MANY_LABELS}, "labels"),
    "a member that nobody knows": ({"ttl": 60}, "ttl"),
    "members of the answer": ({"state": "valid", "uses": 0}, "state uses"),
    "no such organization": ({"organizationId": "nope"}, "organizationId"),
}


@pytest.mark.parametrize("case", BAD_ORDERS.values(), ids=BAD_ORDERS)
def test_an_order_for_a_token_is_strict(case: Any, api: ApiDoor) -> None:
    order, fields = case
    refused = api.mint(**order)
    assert (refused.status, refused.code) == (400, "invalid-body")
    assert " ".join(sorted(e["field"] for e in refused.document["errors"])) == fields
    assert api.call("GET", "/api/hosts/tokens", bearer=api.api_key).document["tokens"] == []


@pytest.mark.parametrize("order", [{"ttlSeconds": 60}, {"ttlSeconds": 2_592_000},
    {"maxUses": 1_000_000}, {"description": "x" * 1000}, {"labels": {"a/b.c_d-e": "\u00fc"}}],
    ids=str)  # fmt: skip
def test_what_is_just_within_bounds_is_taken(order: Dict[str, Any], api: ApiDoor) -> None:
    minted = api.mint(**order).document
    assert {name: minted[name] for name in order if name in minted} == {
        name: value for name, value in order.items() if name in minted
    }


BAD_QUERIES = (
    "limit=0", "limit=1001", "limit=-1", "limit=1e3", "limit=", "limit=%31%00", "limit=" + "9" * 30,
    "limit=1&limit=2", "status=up", "status=Online", "label=rack", "label==x", "cursor=",
    "cursor=x", "cursor=ffffffffffffffff", "nope=1", "Limit=1", "q=%00", "q=" + "x" * 256,
    "organization=nope",
    "organization=%27--", "state=valid", "q", "&".join(f"label=a{n}=b" for n in range(70)),
)  # fmt: skip


@pytest.mark.parametrize("query", BAD_QUERIES, ids=lambda query: query[:24])
def test_a_query_is_strict(query: str, api: ApiDoor) -> None:
    if query == "q":
        query = "q=%ff"
    refused = api.call("GET", f"/api/hosts?{query}", bearer=api.api_key)
    assert (refused.status, refused.code) == (400, "invalid-query")
    for error in refused.document.get("errors", ()):
        assert error["field"] in query and set(error) == {"field", "detail"}


def walk(door: Door, key: str, path: str, name: str) -> List[Any]:
    """A whole list, to its nextCursor null, in at most 50 pages."""
    found: List[Any] = []
    cursor = ""
    for _ in range(50):
        page = door.call("GET", f"{path}{cursor}", bearer=key)
        assert page.status == 200
        found += page.document[name]
        if page.document["nextCursor"] is None:
            return found
        cursor = f"&cursor={page.document['nextCursor']}"
    raise AssertionError("the list has no end")


def test_lists_go_on_and_end(api: ApiDoor, clock: Clock) -> None:
    token = api.token(maxUses=9)
    numbers = []
    for n in range(9):
        clock.advance(n % 2)  # some of the same second
        numbers.append(api.enroll(token, f"web-{n}").document["hostId"])
    for limit in (1, 2, 3, 8, 9, 10):
        found = walk(api, api.api_key, f"/api/hosts?limit={limit}", "hosts")
        assert [host["id"] for host in found] == sorted(numbers, reverse=True)
    chosen = walk(api, api.api_key, "/api/hosts?limit=1&q=WEB-3&status=pending", "hosts")
    assert [host["hostname"] for host in chosen] == ["web-3"]
    for n in range(4):
        api.mint(description=str(n))
    assert len(walk(api, api.api_key, "/api/hosts/tokens?limit=2&state=valid", "tokens")) == 4
    assert len(walk(api, api.api_key, "/api/hosts/tokens?limit=2&state=used", "tokens")) == 1
    past = api.call("GET", f"/api/hosts?cursor={NOWHERE}", bearer=api.api_key)
    assert past.document == {"hosts": [], "nextCursor": None}


def test_an_organization_sees_only_its_own(estate: Estate, clock: Clock) -> None:
    """By ids, filters and cursors: what is another's is like what does not exist."""
    clock.advance(1)
    minted = estate.ask("stranger", "POST", "/api/hosts/tokens", {"organizationId": "berlin"})
    assert minted.document["organizationId"] == "berlin"
    own = estate.door.enroll(minted.document["token"], "spree").document["hostId"]
    key = str(estate.callers["stranger"])
    everything = estate.ask("owner", "GET", "/api/hosts").document["hosts"]
    assert [host["id"] for host in everything] == [own, estate.host]
    paths = (
        "/api/hosts?limit=1",
        f"/api/hosts?limit=1&cursor={own[:-1]}f",
        "/api/hosts?q=web",
        f"/api/hosts?q={estate.host}",
        "/api/hosts?label=rack=b4",
        "/api/hosts?status=pending",
    )
    for path in paths:  # fmt: skip
        seen = estate.door.call("GET", path, bearer=key).document["hosts"]
        assert {host["id"] for host in seen} <= {own}, path
    tokens = walk(estate.door, key, "/api/hosts/tokens?limit=1", "tokens")
    assert [token["id"] for token in tokens] == [minted.document["id"]]
    for target in ("/api/hosts?organization={}", "/api/hosts/tokens"):
        body = None if "?" in target else {"organizationId": "{}"}
        said = []
        for name in ("default", "nothing"):
            order = body and {"organizationId": name}
            method = "POST" if body else "GET"
            said.append(estate.ask("stranger", method, target.format(name), order))
        assert said[0].document == said[1].document and said[0].status == 404
    there = estate.ask("stranger", "DELETE", f"/api/hosts/{estate.host}")
    assert there == estate.ask("stranger", "DELETE", f"/api/hosts/{NOWHERE}")
    assert estate.door.host(estate.host).document["status"] == "pending"


def test_revoking_is_idempotent_and_deleting_is_not(estate: Estate) -> None:
    token = estate.path("/api/hosts/tokens/{id}")
    assert [estate.ask("owner", "DELETE", token).status for _ in range(2)] == [204, 204]
    assert estate.ask("owner", "GET", token).document["state"] == "revoked"
    assert estate.door.enroll(estate.token.document["token"]).code == "token-revoked"
    host = estate.path("/api/hosts/{id}")
    for action, status in (("revoke", "revoked"), ("restore", "pending")):
        twice = [estate.ask("owner", "POST", f"{host}/{action}") for _ in range(2)]
        assert twice[0] == twice[1]
        assert (twice[0].status, twice[0].document["status"]) == (200, status)
    assert [estate.ask("owner", "DELETE", host).status for _ in range(2)] == [204, 404]
    assert estate.door.beat(estate.callers["credential"]).code == "host-unknown"


def test_patch_changes_what_it_names_and_nothing_else(estate: Estate) -> None:
    host = estate.path("/api/hosts/{id}")
    before = estate.ask("owner", "GET", host).document
    named = estate.ask("owner", "PATCH", host, {"name": "K\u00fcche"})
    assert (named.status, named.document) == (200, {**before, "name": "K\u00fcche"})
    cleared = estate.ask("owner", "PATCH", host, {"labels": {}}).document
    assert cleared == {**named.document, "labels": {}}
    for body in ({"name": ""}, {"name": None}, {"labels": None}, {"hostname": "x"}, {"os": "x"}):
        refused = estate.ask("owner", "PATCH", host, {"name": "no", **body})
        assert (refused.code, len(refused.document["errors"])) == ("invalid-body", 1)
    assert estate.ask("owner", "GET", host).document == cleared


def test_a_reenroll_token_brings_the_same_host_back(estate: Estate) -> None:
    minted = estate.ask("owner", "POST", estate.path("/api/hosts/{id}/reenroll"))
    assert (minted.status, set(minted.document)) == (201, TOKEN | {"token"})
    assert (minted.document["hostId"], minted.document["maxUses"]) == (estate.host, 1)
    again = estate.door.enroll(minted.document["token"])
    assert (again.status, again.document["hostId"]) == (201, estate.host)
    assert estate.door.beat(again.document["credential"]).status == 200
    superseded = estate.door.beat(estate.callers["credential"])
    assert superseded.code == "credential-superseded"


@pytest.mark.parametrize("key", ["", " ", "x" * 129, "a b", "\u00fc", "\x7f"], ids=repr)
def test_an_idempotency_key_is_visible_ascii(key: str, live: SocketDoor) -> None:
    body = json.dumps({"token": live.token(), "hostname": "web-1"}).encode()
    head = f"POST /api/agent/enroll HTTP/1.1\r\nHost: a\r\nIdempotency-Key: {key}\r\n"
    data = head.encode("utf-8") + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    assert [reply.code for reply in live.send(data)] == ["malformed-request"]


def test_health_is_not_readiness(live: SocketDoor, paths: Any) -> None:
    ready = live.call("GET", "/readyz")
    assert (ready.status, ready.document) == (200, {"status": "ready"})
    aside = f"{paths[0]}.aside"
    os.rename(paths[0], aside)  # gone
    for _ in range(2):
        assert live.call("GET", "/healthz").status == 200
        refused = live.call("GET", "/readyz")
        assert (refused.status, refused.code) == (503, "storage-unavailable")
        assert int(refused.headers["retry-after"]) > 0
        assert live.call("GET", "/api/hosts", bearer=live.api_key).code == "storage-unavailable"
        # Replaced by another file: what it does not know is not "gone for good" either.
        Path(paths[0]).write_bytes(b"")
    os.replace(aside, paths[0])
    assert live.call("GET", "/readyz").status == 200


def samples(text: str) -> Dict[str, float]:
    """Prometheus' text format, read by its rules."""
    found: Dict[str, float] = {}
    for line in text.split("\n")[:-1]:
        if not line.startswith("# "):
            name, _, value = line.rpartition(" ")
            assert re.fullmatch(r'[a-z_]+(\{[a-z_]+="[^"\n]*"(,[a-z_]+="[^"\n]*")*\})?', name), line
            assert name not in found
            found[name] = float(value)
    return found


def test_metrics_count_what_has_happened(estate: Estate, clock: Clock) -> None:
    before = samples(estate.ask("owner", "GET", "/metrics").document)
    estate.door.beat(str(estate.callers["credential"]))
    estate.door.beat(str(estate.callers["credential"]), os="Debian")
    estate.door.beat("x.y.z")
    estate.ask("viewer", "DELETE", f"/api/hosts/{estate.host}")
    estate.door.enroll(str(estate.callers["token"]), "web-2")
    estate.door.enroll(str(estate.callers["token"]), "web-3")
    after = samples(estate.ask("owner", "GET", "/metrics").document)
    changed = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    counted = {name: n for name, n in changed.items() if "seconds" not in name}
    counted.pop('hostenroll_database_bytes{file="wal"}', None)
    assert counted == {
        "hostenroll_heartbeats_total": 2,
        "hostenroll_enrollments_total": 1,
        'hostenroll_refusals_total{code="credential-invalid"}': 1,
        'hostenroll_refusals_total{code="forbidden"}': 1,
        'hostenroll_refusals_total{code="token-used"}': 1,
        'hostenroll_hosts{organization="default",status="online"}': 1,
    }
    assert after['hostenroll_hosts{organization="default",status="pending"}'] == 1
    assert changed["hostenroll_commit_duration_seconds_count"] >= 4


def test_an_organization_sees_its_own_hosts_in_metrics_and_nothing_else(estate: Estate) -> None:
    seen = samples(estate.ask("viewer", "GET", "/metrics").document)
    assert set(seen) == {
        f'hostenroll_hosts{{organization="default",status="{status}"}}'
        for status in hostenroll.STATUSES
    }
    other = samples(estate.ask("stranger", "GET", "/metrics").document)
    assert set(other.values()) == {0.0} and all('"berlin"' in name for name in other)


def test_a_histogram_is_cumulative_and_has_everything_in_its_last_bucket() -> None:
    histogram = hostenroll.Histogram((0.1, 1.0))
    for value, times in ((0.05, 1), (0.1, 2), (0.5, 1), (7.0, 3)):
        histogram.observe(value, times)
    text = hostenroll.Exposition()
    text.histogram("t", "Help.", histogram)
    seen = samples(text.response().body.decode())
    assert {name: n for name, n in seen.items() if name != "t_sum"} == {
        't_bucket{le="0.1"}': 3, 't_bucket{le="1"}': 4, 't_bucket{le="+Inf"}': 7, "t_count": 7
    }  # fmt: skip
    assert seen["t_sum"] == pytest.approx(0.05 + 0.2 + 0.5 + 21)


def test_a_host_is_written_as_json_writes_its_document() -> None:
    """Member by member, whatever there is in it."""
    chance = random.Random(8)
    for _ in range(500):
        texts = {
            name: odd_text(chance)
            for name in ("organization_id", "name", "hostname", "os", "architecture")
        }
        labels = {f"k{n}": odd_text(chance) for n in range(chance.randrange(3))}
        host = host_at(
            **texts,
            id=chance.randrange(1 << 63),
            docker_version="27.3.1",
            labels=hostenroll.json_text(labels),
            enrolled_at=chance.randrange(1, 1 << 42),
            token_id=chance.randrange(1 << 63),
        )._replace(
            last_seen=chance.choice([0, int(NOON * 1000)]),
            revoked_at=chance.choice([None, int(NOON * 1000)]),
        )
        at = lambda moment: hostenroll.rfc3339(moment) if moment else None  # noqa: E731
        warnings = chance.choice([[], [odd_text(chance), "b"]])
        document = {
            "id": f"{host.id:016x}", "organizationId": host.organization_id, "name": host.name,
            "hostname": host.hostname, "os": host.os, "architecture": host.architecture,
            "dockerVersion": "27.3.1", "labels": labels, "status": "online",
            "statusReason": "it is", "enrolledAt": at(host.enrolled_at),
            "lastSeen": at(host.last_seen), "tokenId": f"{host.token_id:016x}",
            "revokedAt": at(host.revoked_at), "warnings": warnings,
        }  # fmt: skip
        view = hostenroll.HostView(host.listed(), "online", "it is", warnings)
        assert hostenroll.host_json(view) == json.dumps(document, separators=(",", ":"))
        assert hostenroll.host_document(view) == document


def test_a_page_is_bounded_in_bytes_too(api: ApiDoor) -> None:
    fill(api.registry, 600)
    large = json.dumps({f"k{n}": "\U0001f600" * 255 for n in range(32)})
    connection_of(api.registry).execute("UPDATE host SET labels = ?", (large,))
    seen, cursor, sizes = 0, "", []
    while cursor is not None:
        path = "/api/hosts?limit=1000" + (f"&cursor={cursor}" if cursor else "")
        page = api.call("GET", path, bearer=api.api_key)
        sizes.append(len(json.dumps(page.document)))
        seen += len(page.document["hosts"])
        cursor = page.document["nextCursor"]
    slice_size = hostenroll.SLICE * 110_000
    assert seen == 600 and max(sizes) < hostenroll.PAGE_BYTES + slice_size


def test_a_tick_that_dies_has_counted_no_heartbeat(api: ApiDoor, clock: Clock) -> None:
    _, good = came_in(api.registry, clock)
    number, revoked = came_in(api.registry, clock, "web-2")
    do(api.registry, clock, hostenroll.partial(api.registry.revoke_host, OPERATOR, number))
    beats = [plain(api.registry, credential, clock) for credential in (good, revoked)]
    with faulty(api.registry, only="COMMIT"):
        api.registry.tick(beats, clock.ms)
    assert api.beat(good, os=7).code == "invalid-body"
    assert api.registry.metrics.counts["heartbeats"] == 0
    api.registry.tick(beats, clock.ms)
    assert api.registry.metrics.counts["heartbeats"] == 1


@pytest.mark.parametrize("path", ["/api/hosts/", "/api/hosts//revoke"])
@pytest.mark.parametrize("method", ["GET", "PUT", "OPTIONS"])
def test_a_path_without_an_id_where_one_belongs_is_no_path(
    method: str, path: str, api: ApiDoor
) -> None:
    assert api.call(method, path).code == "not-found"


def test_a_query_of_too_many_parameters_is_told_so(api: ApiDoor) -> None:
    query = "&".join(f"a{n}=1" for n in range(65))
    reply = api.call("GET", f"/api/hosts?{query}", bearer=api.api_key)
    assert reply.code == "invalid-query" and "at most 64" in reply.document["detail"]


@pytest.mark.parametrize("cut", range(4))
def test_what_is_no_http_is_told_the_same_however_it_comes(cut: int) -> None:
    reader, data = hostenroll.RequestReader(), b"@GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    with pytest.raises(hostenroll.MalformedRequest, match="it may be TLS"):
        for part in filter(None, (data[:cut], data[cut:])):
            reader.next(part)


def test_a_refusal_is_counted_when_it_is_the_answer_and_once(api: ApiDoor, clock: Clock) -> None:
    refusals, house = api.registry.metrics.refusals, Api(api.registry).housekeeping()
    with faulty(api.registry, only="COMMIT"):  # it is nobody's request
        api.registry.tick([house], clock.ms)
    assert refusals == {}
    token = api.token()
    with faulty(api.registry, only="COMMIT"):
        assert api.enroll(token).status == 503
    assert refusals == {"storage-unavailable": 1}
    assert api.enroll("nonsense").status == 401
    assert api.call("GET", "/nowhere").status == 404
    assert refusals == {"storage-unavailable": 1, "token-unknown": 1, "not-found": 1}


def test_who_is_told_that_another_writes_or_of_a_defect_is_counted(
    paths: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostenroll, "LOCK_PATIENCE", 0.2)
    with live_door(paths, clock) as door:
        beats = heartbeat_of(door) * 5
    with LiveServer(paths, clock) as live:
        door = SocketDoor(live.port, "")
        with write_lock(paths[0]):
            assert [reply.status for reply in door.send(beats)] == [503] * 5
        with monkeypatch.context() as patch:
            patch.setattr(hostenroll, "find_route", lambda *_: 1 // 0)
            assert door.call("GET", "/healthz").status == 500
        counted = live.server._metrics.refusals
        assert counted == {"storage-unavailable": 5, "internal": 1}


def test_only_what_is_committed_is_counted(api: ApiDoor, clock: Clock) -> None:
    token, counts = api.token(maxUses=9), api.registry.metrics.counts
    credential = api.enroll(token).document["credential"]
    do(api.registry, clock, hostenroll.partial(api.registry.rotate_signing_key, OPERATOR))
    assert counts == {"enrollments": 1}
    for attempt in (lambda: api.enroll(token), lambda: api.beat(credential)):
        with faulty(api.registry, only="COMMIT"):
            assert attempt().status == 503
        assert counts == {"enrollments": 1}
    assert api.enroll(token).status == 201 and "credential" in api.beat(credential).document
    assert counts == {"enrollments": 2, "heartbeats": 1, "renewals": 1}


def test_a_page_over_many_slices_is_one_json_text(api: ApiDoor, clock: Clock) -> None:
    fill(api.registry, 3000)
    path, seen, counts = "/api/hosts?limit=1000", [], []
    cursor = ""
    while cursor is not None:
        page = api.call("GET", path + (f"&cursor={cursor}" if cursor else ""), bearer=api.api_key)
        counts.append(len(page.document["hosts"]))
        seen += [host["id"] for host in page.document["hosts"]]
        cursor = page.document["nextCursor"]
    assert counts == [1000, 1000, 1000] and seen == sorted(set(seen), reverse=True)
    pages, cursor = 0, ""
    while cursor is not None:
        path = "/api/hosts?q=nowhere" + (f"&cursor={cursor}" if cursor else "")
        searched = api.call("GET", path, bearer=api.api_key).document
        pages, cursor = pages + 1, searched["nextCursor"]
        assert searched["hosts"] == []
    assert pages == 3


def beside_python(tool: str) -> Optional[str]:
    """A program of another package, from the environment of this Python or the path."""
    places = [os.path.dirname(sys.executable), os.environ.get("PATH", "")]
    return shutil.which(tool, path=os.pathsep.join(places))


def needs(tool: str) -> Any:
    return pytest.mark.skipif(beside_python(tool) is None, reason=f"{tool} is not installed")


class WitnessDoor(ApiDoor):
    """Holds every answer to what its route declares."""

    def __init__(self, registry: Registry, clock: Clock) -> None:
        super().__init__(registry, clock)
        self.seen: Dict[str, set] = {route.name: set() for route in hostenroll.ROUTES}

    def call(self, method: str, path: str, *more: Any, **named: Any) -> Reply:
        reply = super().call(method, path, *more, **named)
        route, _ = hostenroll.find_route(method, path.partition("?")[0])
        self.seen[route.name].add(reply.code or reply.status)
        if reply.status < 400:
            self._hold_answer(route, reply)
        else:
            kind = next(kind for kind in route.problems() if kind.code == reply.code)
            hostenroll.problem_shape(kind).check(reply.document)
            assert {name.lower() for name, _ in kind().headers()} <= set(reply.headers)
        return reply

    @staticmethod
    def _hold_answer(route: Any, reply: Reply) -> None:
        assert reply.status == route.status
        if route.answer is not None:
            route.answer.check(reply.document)
        else:
            assert isinstance(reply.document, type(None) if reply.status == 204 else str)


@pytest.fixture
def witness(paths: Tuple[str, str], clock: Clock) -> Iterator[WitnessDoor]:
    registry = open_registry(*paths, clock.ms, credential_ttl=30)
    yield WitnessDoor(registry, clock)
    registry.close()


def visit_agent_routes(door: WitnessDoor, clock: Clock) -> None:
    """Every answer and every refusal of what machines call."""
    token = door.token(maxUses=2, labels={"rack": "b4"})
    arrival = {"token": token, "hostname": "web-1"}
    enrolled = door.enroll(token, key="once", os="Debian").document
    door.enroll(token, key="once")  # again
    door.enroll(token, key="a key")  # with a space
    door.call("POST", "/api/agent/enroll", {**arrival, "os": 1})
    door.enroll("het_nonsense")
    door.enroll(door.token(hostname="web-2"), "web-3")
    expired, revoked = door.token(ttlSeconds=60), door.mint().document
    door.revoke_token(revoked["id"])
    door.enroll(revoked["token"])
    door.enroll(token, "web-2")  # the last use
    door.enroll(token)
    credential, host = enrolled["credential"], enrolled["hostId"]
    door.beat(credential)
    clock.advance(25)
    renewed = door.beat(credential).document["credential"]
    door.beat(renewed, os="Debian 13")
    door.beat(credential)
    door.call("POST", "/api/agent/heartbeat", {"os": 1}, renewed)
    door.call("POST", "/api/agent/heartbeat")
    door.beat("nonsense")
    again = door.reenroll(host).document["token"]
    door.revoke(host)
    door.enroll(again)
    door.beat(renewed)
    door.restore(host)
    door.enroll(again)
    door.delete(host)
    door.beat(renewed)
    clock.advance(8 * 86400)
    door.beat(renewed)
    door.enroll(expired)
    for _ in range(hostenroll.FAILURES_ALLOWED + 1):
        door.enroll("het_nonsense")


def visit_user_routes(door: WitnessDoor, clock: Clock) -> None:
    """Every answer and every refusal of what operators call."""
    viewer = make_api_key(door.registry, clock, "default", "viewer")
    for n in range(2):
        door.enroll(door.token(description=f"the cellar {n}", hostname="web-1"))
    token, host = (
        door.call("GET", f"/api/hosts{path}?limit=1", bearer=door.api_key).document
        for path in ("/tokens", "")
    )
    numbers = {True: token["tokens"][0]["id"], False: host["hosts"][0]["id"]}
    routes = [route for route in hostenroll.ROUTES if route.caller in ("viewer", "admin")]
    for _ in range(hostenroll.FAILURES_ALLOWED):
        door.call("GET", "/api/me", bearer="hak_nonsense")
    for route in sorted(routes, key=lambda route: route.method == "DELETE"):
        path = route.path.replace("{id}", numbers["tokens" in route.path])
        nowhere = route.path.replace("{id}", NOWHERE)
        for key in (door.api_key, viewer, None, "hak_nonsense"):
            door.call(route.method, path, bearer=key)
        for asked in (f"{path}?x=1", nowhere):
            door.call(route.method, asked, bearer=door.api_key)
        door.call(route.method, nowhere, [], door.api_key)
    for path in ("/api/hosts?organization=other", "/api/audit?organization=other"):
        door.call("GET", path, bearer=viewer)
    admin = make_api_key(door.registry, clock, "default")
    door.call("POST", "/api/hosts/tokens", {"organizationId": "other"}, admin)


def test_every_answer_fits_its_shape_and_every_refusal_is_declared(
    witness: WitnessDoor, clock: Clock
) -> None:
    """And what is declared happens, but for what is the server's and not the route's."""
    visit_agent_routes(witness, clock)
    visit_user_routes(witness, clock)
    for path in ("/healthz", "/readyz", "/openapi.json", "/agent.sh", "/"):
        witness.call("GET", path)
    servers = {kind.code for kind in KINDS_OF_PROBLEM if issubclass(kind, hostenroll.Unframed)}
    servers |= {"internal", "storage-unavailable"}
    for route in hostenroll.ROUTES:
        declared = {kind.code for kind in route.problems()} - servers
        if route.name == "enroll":  # its header; and of a host that is gone, tokens are revoked
            declared = declared - {"host-unknown"} | {"malformed-request"}
        assert witness.seen[route.name] == {route.status} | declared, route.name


def references(document: Any) -> Iterator[str]:
    if isinstance(document, dict):
        yield from ([document["$ref"]] if isinstance(document.get("$ref"), str) else [])
        document = list(document.values())
    for inner in document if isinstance(document, list) else ():
        yield from references(inner)


def test_the_openapi_document_has_exactly_the_routes() -> None:
    document = hostenroll.openapi_document()
    operations = {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert list(operations) == [(route.method, route.path) for route in hostenroll.ROUTES]
    assert len({operation["operationId"] for operation in operations.values()}) == len(operations)
    for route, operation in zip(hostenroll.ROUTES, operations.values()):
        statuses = {str(kind.status) for kind in route.problems()} | {str(route.status)}
        assert set(operation["responses"]) == statuses
        assert operation["security"] == (
            [] if route.caller in ("open", "token")
            else [{"credential" if route.caller == "credential" else "apiKey": []}]
        )  # fmt: skip


def test_the_openapi_document_refers_to_all_that_it_has_and_to_nothing_else() -> None:
    document = hostenroll.openapi_document()
    components = document["components"]
    there = {f"#/components/{kind}/{name}" for kind in components for name in components[kind]}
    schemes = {f"#/components/securitySchemes/{name}" for name in components["securitySchemes"]}
    assert set(references(document)) == there - schemes
    assert document["info"] == {"title": "hostenroll", "version": hostenroll.__version__}


@pytest.mark.parametrize("route", hostenroll.ROUTES, ids=lambda route: route.name)
def test_the_openapi_document_names_the_refusals_of_a_route(route: Any) -> None:
    document = hostenroll.openapi_document()
    components = document["components"]
    operation = document["paths"][route.path][route.method.lower()]
    codes = []
    for status, response in operation["responses"].items():
        if status != str(route.status):
            response = components["responses"][response["$ref"].rpartition("/")[2]]
            named = [reference.rpartition("/")[2] for reference in references(response)]
            assert all(CODES[code] == int(status) for code in named)
            assert ("WWW-Authenticate" in response.get("headers", ())) == (status == "401")
            assert ("Retry-After" in response.get("headers", ())) == (status in ("429", "503"))
            codes += named
    assert codes == [kind.code for kind in route.problems()]


@slow
@needs("openapi-spec-validator")
def test_openapi_spec_validator_finds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "openapi.json"
    path.write_text(cli(tmp_path, "openapi").stdout)
    command = [str(beside_python("openapi-spec-validator")), str(path)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr


# DELETE revokes a token, and a revoked one can still be looked at. The credential is that of a
# host of another organization, which the API key cannot delete; nor is a name that is not its own
# organization's an invalid query to it, which no schema could say.
SCHEMATHESIS = """
hooks = "each_from_its_own_address.py"
[auth.openapi.apiKey]
bearer = "{key}"
[auth.openapi.credential]
bearer = "{credential}"
[[operations]]
include-path = "/api/hosts/tokens/{{id}}"
checks.use_after_free.enabled = false
"""
# It tries wrong keys too, more than one client may in a minute. Behind a trusted proxy each request
# is another client's, and every wrong key is to be refused as one.
SCHEMATHESIS_HOOKS = """
import ipaddress, itertools, schemathesis
clients = map(ipaddress.ip_address, itertools.count(10 << 24))
@schemathesis.hook
def before_call(context, case, kwargs):
    case.headers["X-Forwarded-For"] = str(next(clients))
"""


@slow
@needs("schemathesis")
def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, "--trusted-proxy", "127.0.0.1") as server:
        cli(tmp_path, "add-org", "elsewhere")
        elsewhere, token = (
            cli(tmp_path, "mint-token", "--max-uses", "30", "--org", name).stdout.strip()
            for name in ("elsewhere", "default")
        )
        door = SocketDoor(server.port, cli(tmp_path, "mint-api-key").stdout.strip())
        credential = door.enroll(elsewhere).document["credential"]
        for n in range(30):  # to look at, change and delete
            door.enroll(token, f"web-{n}")
        configuration = SCHEMATHESIS.format(key=door.api_key, credential=credential)
        (tmp_path / "schemathesis.toml").write_text(configuration)
        (tmp_path / "each_from_its_own_address.py").write_text(SCHEMATHESIS_HOOKS)
        command = [
            *(str(beside_python("schemathesis")), "--config-file", "schemathesis.toml"),
            *("run", f"{server.url}/openapi.json", "--checks", "all", "--seed", "1"),
            *("--max-examples", "50", "--generation-database", "none"),
        ]
        found = subprocess.run(
            command, cwd=str(tmp_path), capture_output=True, text=True, timeout=300
        )
        assert found.returncode == 0, found.stdout[-9000:] + found.stderr
        tested = len(hostenroll.ROUTES) - 1  # all but the document's own
        assert f"{tested} selected / {tested} total" in found.stdout
        assert "Traceback" not in "".join(server.said)


NO_KEYS = ("nobody", "junk", "forged", "revoked", "token", "credential")
# What a query or a body could say to reach what is another's.
PEEKS: Dict[str, Sequence[str]] = {
    "organization": ("default", "nothing"),
    "cursor": ("7fffffffffffffff", "{host}", "{token}"),
    "q": ("web", "{host}"),
    "label": ("rack=b4",),
    "subject": ("host:{host}", "token:{token}", "organization:default"),
    "status": ("pending", "online"),
    "state": ("valid", "used"),
    "action": ("mint", "enroll", "refuse"),
    "code": ("token-unknown",),
    "limit": ("1", "1000"),
}
CLAIMED: Dict[str, Any] = {
    "organizationId": "default", "hostname": "web-1", "name": "mine", "labels": {"mine": "1"},
    "ttlSeconds": 60, "maxUses": 2, "description": "mine",
}  # fmt: skip


def world(estate: Estate) -> Dict[str, List[Any]]:
    """All that is remembered, but for the log and the sign of life, and what is berlin's."""
    rows = snapshot(estate.door.registry)
    del rows["audit"]
    rows["service"] = [row[:2] + row[3:] for row in rows["service"]]
    return {name: [row for row in found if "berlin" not in row] for name, found in rows.items()}


def intrusions(route: Any, estate: Estate) -> Iterator[Tuple[str, Any]]:
    """Every way in which a route lets a caller name something."""
    ids = {"host": estate.host, "token": estate.token.document["id"]}
    path, body = estate.path(route.path), None if route.body is None else {}
    yield path, body
    for name in route.query.schema()["properties"]:
        for text in PEEKS[name]:
            yield f"{path}?{name}={text.format(**ids)}", body
    for name in route.body.schema()["properties"] if route.body else ():
        yield path, {name: CLAIMED[name]}


@pytest.mark.parametrize(
    "route", hostenroll.ROUTES, ids=lambda route: f"{route.method} {route.path}"
)
def test_who_may_call_what(route: Any, estate: Estate) -> None:
    """Whoever may not changes nothing but the log."""
    door, path = estate.door, estate.path(route.path)
    do(door.registry, door.clock, lambda now: door.registry.start_service("http://a", now))
    before = world(estate)
    if route.caller == "open":
        for caller in estate.callers:
            assert estate.ask(caller, route.method, path).status in (200, 204)
    elif route.caller == "token":
        for caller, text in estate.callers.items():
            if caller not in ("nobody", "token"):
                assert door.enroll(str(text), "web-9").code == "token-unknown", caller
                asked = door.call("POST", path, {"hostname": "web-9"}, text)
                assert asked.code == "invalid-body"  # the header is no place for a token
    elif route.caller == "credential":
        for caller in estate.callers:
            if caller not in ("nobody", "credential"):
                for body in (None, {"os": "linux"}):
                    refused = estate.ask(caller, route.method, path, body)
                    assert refused.code == "credential-invalid", caller
        assert estate.ask("nobody", route.method, path).code == "credential-missing"
    else:
        for caller in NO_KEYS:
            for asked, body in intrusions(route, estate):
                door.clock.advance(60 / hostenroll.FAILURES_ALLOWED)
                reply = estate.ask(caller, route.method, asked, body)
                assert (caller, reply.status, reply.code) == (caller, 401, "api-key-invalid")
        if route.caller == "admin":
            for asked, body in intrusions(route, estate):
                assert estate.ask("viewer", route.method, asked, body).code == "forbidden"
    assert world(estate) == before
    if route.caller == "viewer":
        viewed = estate.ask("viewer", route.method, path)
        assert viewed.status == 200 and world(estate) == before
    if route.caller in ("admin", "viewer"):
        assert estate.ask("admin", route.method, path).status in (200, 201, 204)


@pytest.mark.parametrize("route", USER_ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_another_organizations_key_reaches_nothing(route: Any, estate: Estate) -> None:
    """By no path, query, body or cursor; and it cannot tell what is there from what is not."""
    door = estate.door
    own = door.call("POST", "/api/hosts/tokens", {}, estate.callers["stranger"]).document
    door.enroll(own["token"], "spree")
    keys = [str(estate.callers[name]).split("_")[1] for name in ("owner", "admin", "viewer")]
    treasures = [estate.host, estate.token.document["id"], *keys, "cellar", "rack", '"default"']
    before = world(estate)
    for path, body in intrusions(route, estate):
        reply = estate.ask("stranger", route.method, path, body)
        said = json.dumps([reply.document, reply.headers])
        assert [text for text in treasures if text in said] == [], path
        assert world(estate) == before, path
        if "{id}" in route.path:
            nothing = path.replace(estate.host, NOWHERE)
            nothing = nothing.replace(estate.token.document["id"], NOWHERE)
            assert reply.status == 404
            assert reply == estate.ask("stranger", route.method, nothing, body)
        elif "organization=" in path or "organizationId" in (body or {}):
            elsewhere = path.replace("=default", "=nothing")
            assert reply.status == 404
            assert reply == estate.ask(
                "stranger", route.method, elsewhere, body and {"organizationId": "nothing"}
            )
        else:
            assert reply.status in (200, 201), path
    assert estate.ask("admin", "GET", "/api/hosts").document["hosts"][0]["id"] == estate.host


def test_an_organizations_key_reads_its_own_log_and_counts_its_own_hosts(estate: Estate) -> None:
    door = estate.door
    own = door.call("POST", "/api/hosts/tokens", {}, estate.callers["stranger"]).document
    host = door.enroll(own["token"], "spree").document["hostId"]
    door.enroll("het_junk")
    door.enroll(own["token"], "spree")
    path = "/api/audit?limit=2"
    log = {
        name: walk(door, str(estate.callers[name]), path, "events")
        for name in ("stranger", "viewer", "owner")
    }
    assert [(event["action"], event["subject"]) for event in log["stranger"]] == [
        ("refuse", f"token:{own['id']}"),
        ("enroll", f"host:{host}"),
        ("mint", f"token:{own['id']}"),
        ("mint", f"api-key:{str(estate.callers['stranger']).split('_')[1]}"),
        ("add", "organization:berlin"),
    ]
    assert {event["organizationId"] for event in log["viewer"]} == {"default"}
    assert {event["organizationId"] for event in log["owner"]} == {"default", "berlin", None}
    numbers = [event["number"] for event in log["owner"]]
    assert numbers == list(range(len(numbers), 0, -1))
    assert {event["number"] for name in ("stranger", "viewer") for event in log[name]} == {
        event["number"] for event in log["owner"] if event["organizationId"]
    }
    for name, organization in (("stranger", "berlin"), ("viewer", "default")):
        for asked in ("/api/audit", "/api/audit?organization=" + organization):
            seen = estate.ask(name, "GET", asked).document["events"]
            assert seen == log[name]
    counted = estate.ask("stranger", "GET", "/metrics").document
    samples = [line for line in counted.split("\n") if line and not line.startswith("#")]
    assert len(samples) == len(hostenroll.STATUSES)
    assert 'hostenroll_hosts{organization="berlin",status="pending"} 1' in samples
    assert all('{organization="berlin",' in line for line in samples)
    everything = estate.ask("owner", "GET", "/metrics").document
    assert 'organization="default",status="pending"} 1' in everything
    assert "hostenroll_refusals_total" in everything


# The audit log.


def events_of(door: Any, query: str = "") -> List[Any]:
    """All events that are asked for, the newest first."""
    found = walk(door, door.api_key, f"/api/audit?limit=1000{query}", "events")
    return list(found)


def test_every_act_is_in_the_log(paths: Any, clock: Clock) -> None:
    with opened(paths, clock, credential_ttl=300) as registry:
        door = ApiDoor(registry, clock)
        key = f"api-key:{door.api_key.split('_')[1]}"
        expected: List[Tuple[Any, ...]] = []

        def happened(
            action: str, actor: str, subject: str, of: Any = "default", **more: Any
        ) -> None:
            address = "192.0.2.7" if actor[:3] != "cli" else None
            expected.append((hostenroll.rfc3339(clock.ms), action, actor, address, subject, of))
            event = events_of(door)[0]
            assert tuple(event[name] for name in (
                "time", "action", "actor", "address", "subject", "organizationId",
            )) == expected[-1]  # fmt: skip
            assert event["code"] is None
            assert {name: event["detail"].get(name) for name in more} == more
            clock.advance(1)

        happened("mint", "cli:test", key, None, role="admin")
        minted = door.mint(maxUses=2, description="the cellar").document
        token = f"token:{minted['id']}"
        happened("mint", key, token, maxUses=2, description="the cellar",
                 expiresAt=minted["expiresAt"])  # fmt: skip
        enrolled = door.enroll(minted["token"], "web-1", "k").document
        number = enrolled["hostId"]
        host = f"host:{number}"
        happened("enroll", token, host, hostname="web-1")
        again = door.enroll(minted["token"], "web-1", "k").document
        happened("replay", token, host, serial=2)
        door.beat(again["credential"])
        happened("supersede", host, host, serial=2, superseded=1)
        clock.advance(201)
        renewed = door.beat(again["credential"]).document["credential"]
        happened("renew", host, host, serial=3)
        door.beat(renewed)
        happened("supersede", host, host, serial=3, superseded=2)
        bound = door.reenroll(number).document
        happened("mint", key, f"token:{bound['id']}", host=number, maxUses=1)
        door.enroll(bound["token"], "web-2")
        newest = 3 + hostenroll.SERIALS_LOST + 1
        happened("re-enroll", f"token:{bound['id']}", host, hostname="web-2", serial=newest)
        door.call("PATCH", f"/api/hosts/{number}", {"name": "x", "labels": {}}, door.api_key)
        happened("edit", key, host, name="x", labels={})
        door.revoke(number)
        happened("revoke", key, host)
        door.restore(number)
        happened("restore", key, host)
        door.delete(number)
        happened("delete", key, host, hostname="web-2")
        door.revoke_token(minted["id"])
        happened("revoke", key, token)
        do(registry, clock, lambda now: registry.add_organization(OPERATOR, "berlin", now))
        happened("add", "cli:test", "organization:berlin", "berlin")
        text = make_api_key(registry, clock, "berlin", "viewer")
        other = f"api-key:{text.split('_')[1]}"
        happened("mint", "cli:test", other, "berlin", role="viewer")
        do(registry, clock, lambda now: registry.revoke_api_key(OPERATOR, int(other[8:], 16), now))
        happened("revoke", "cli:test", other, "berlin")
        old = registry.signing_keys()[0].key.kid
        new = do(registry, clock, lambda now: registry.rotate_signing_key(OPERATOR, now))
        happened("rotate", "cli:test", f"signing-key:{new}", None)
        do(registry, clock, lambda now: registry.retire_signing_key(OPERATOR, old, True, now))
        happened("retire", "cli:test", f"signing-key:{old}", None)
        assert len(events_of(door)) == len(expected)
        actions = {event[1] for event in expected}
        assert actions == set(hostenroll.ACTIONS) - {"refuse", "init"}
        number_of_all = do(registry, clock, lambda now: registry.verify_audit(None), False)[1]
        assert number_of_all == len(expected)


def _superseded(estate: Estate) -> Reply:
    token = estate.ask("owner", "POST", estate.path("/api/hosts/{id}/reenroll")).document["token"]
    newer = estate.door.enroll(token).document["credential"]
    assert estate.door.beat(newer).status == 200
    return estate.door.beat(estate.callers["credential"])


def _expired(estate: Estate) -> Reply:
    first = estate.door.registry.keyring.first
    claims = hostenroll.Claims(int(estate.host, 16), "default", 0, 1, 1, first.kid)
    return estate.door.beat(first.sign(claims))


def _of_one_use(estate: Estate, **order: Any) -> Any:
    minted = estate.door.mint(**order).document
    estate.callers["fresh"] = minted["id"]
    return minted


def _late(estate: Estate) -> Reply:
    minted = _of_one_use(estate)
    estate.door.clock.advance(3600)
    return estate.door.enroll(minted["token"])


def _taken_back(estate: Estate) -> Reply:
    minted = _of_one_use(estate)
    estate.door.revoke_token(minted["id"])
    return estate.door.enroll(minted["token"])


def _twice(estate: Estate) -> Reply:
    minted = _of_one_use(estate)
    estate.door.enroll(minted["token"], "web-7")
    return estate.door.enroll(minted["token"])


def _after(act: str) -> Callable[[Estate], Reply]:
    def refused(estate: Estate) -> Reply:
        getattr(estate.door, act)(estate.host)
        return estate.door.beat(estate.callers["credential"])

    return refused


def _shut_out_by_token(estate: Estate) -> Reply:
    minted = estate.ask("owner", "POST", estate.path("/api/hosts/{id}/reenroll")).document
    estate.callers["fresh"] = minted["id"]
    estate.door.revoke(estate.host)
    return estate.door.enroll(minted["token"])


def _me(caller: str) -> Callable[[Estate], Reply]:
    return lambda estate: estate.ask(caller, "GET", "/api/me")


Refused = Tuple[str, Callable[[Estate], Reply], str, Optional[str], Optional[str]]
AUDITED: Dict[str, Refused] = {
    "no token of ours": (
        "token-unknown", lambda e: e.door.enroll("het_junk"), "anonymous", None, None),
    "a guessed token": (
        "token-unknown", lambda e: e.door.enroll(_other_secret(e.token.document["token"])),
        "anonymous", "token:{token}", None),
    "late": ("token-expired", _late, "token:{fresh}", "token:{fresh}", "default"),
    "taken back": ("token-revoked", _taken_back, "token:{fresh}", "token:{fresh}", "default"),
    "twice": ("token-used", _twice, "token:{fresh}", "token:{fresh}", "default"),
    "another host": (
        "token-host-mismatch",
        lambda e: e.door.enroll(_of_one_use(e, hostname="db-1")["token"]),
        "token:{fresh}", "token:{fresh}", "default"),
    "shut out, by token": (
        "host-revoked", _shut_out_by_token, "token:{fresh}", "token:{fresh}", "default"),
    "no credential": (
        "credential-missing", lambda e: e.ask("nobody", "POST", "/api/agent/heartbeat"),
        "anonymous", None, None),
    "no credential of ours": (
        "credential-invalid", lambda e: e.door.beat("junk"), "anonymous", None, None),
    "an old one": ("credential-superseded", _superseded, "host:{host}", "host:{host}", "default"),
    "an expired one": ("credential-expired", _expired, "host:{host}", "host:{host}", "default"),
    "shut out": ("host-revoked", _after("revoke"), "host:{host}", "host:{host}", "default"),
    "gone": ("host-unknown", _after("delete"), "host:{host}", "host:{host}", "default"),
    "no API key": ("api-key-invalid", _me("nobody"), "anonymous", None, None),
    "no API key of ours": ("api-key-invalid", _me("junk"), "anonymous", None, None),
    "a revoked one": (
        "api-key-invalid", _me("revoked"), "api-key:{revoked}", "api-key:{revoked}", None),
    "a viewer who acts": (
        "forbidden", lambda e: e.ask("viewer", "POST", "/api/hosts/tokens"),
        "api-key:{viewer}", "api-key:{viewer}", "default"),
}  # fmt: skip


def test_every_refusal_that_should_be_is_tried_here() -> None:
    audited = {problem.code for problem in hostenroll.problems() if problem.is_audited}
    assert {row[0] for row in AUDITED.values()} == audited - {"too-many-requests"}  # below
    unaudited = {"not-found", "conflict", "invalid-body", "method-not-allowed", "internal"}
    assert not unaudited & audited


@pytest.mark.parametrize("code, attempt, actor, subject, of", AUDITED.values(), ids=AUDITED)
def test_a_refusal_is_in_the_log_with_who_and_whence(
    code: str,
    attempt: Callable[[Estate], Reply],
    actor: str,
    subject: Optional[str],
    of: Optional[str],
    estate: Estate,
) -> None:
    door = estate.door
    assert attempt(estate).code == code
    assert door.api.run([door.api.housekeeping()], door.clock.ms)
    names = {name: str(text).split("_")[1] for name, text in estate.callers.items()
             if str(text).startswith("hak_") and name != "junk"}  # fmt: skip
    names.update(host=estate.host, token=estate.token.document["id"])
    names["fresh"] = str(estate.callers.get("fresh"))
    event, *others = events_of(door, "&action=refuse")
    assert others == []
    assert event["number"] == events_of(door)[0]["number"]
    assert (event["code"], event["actor"], event["subject"], event["organizationId"]) == (
        code, actor.format(**names), subject and subject.format(**names), of)  # fmt: skip
    assert (event["address"], event["time"]) == ("192.0.2.7", hostenroll.rfc3339(door.clock.ms))


def call_from(
    address: str, door: Any, path: str, body: Any = None, bearer: Optional[str] = None
) -> Any:
    """What a POST from an address comes to."""
    request = RequestReader(address).next(request_bytes("POST", path, body, bearer))
    admitted = door.api.admit(request, door.clock.ms)
    (outcome,) = door.api.run([admitted], door.clock.ms, lambda place: request)
    return json.loads(door.api.answer(admitted, outcome).body)


def test_a_copied_credential_shows_with_both_addresses(estate: Estate) -> None:
    door, beat = estate.door, "/api/agent/heartbeat"
    token = estate.ask("owner", "POST", estate.path("/api/hosts/{id}/reenroll")).document["token"]
    body = {"token": token, "hostname": "web-1"}
    newer = call_from("192.0.2.8", door, "/api/agent/enroll", body)["credential"]
    assert "lastSeen" in call_from("192.0.2.88", door, beat, None, newer)
    for facts in (None, {"os": "linux"}):  # a plain beat, and one that is an act
        said = call_from("198.51.100.9", door, beat, facts, estate.callers["credential"])
        assert said["code"] == "credential-superseded"
    assert door.api.run([door.api.housekeeping()], door.clock.ms)
    *refused, superseded = events_of(door)[:3]
    assert (superseded["action"], superseded["address"]) == ("supersede", "192.0.2.88")
    for event in refused:
        assert (event["code"], event["address"]) == ("credential-superseded", "198.51.100.9")
        newest = 1 + hostenroll.SERIALS_LOST + 1
        assert event["detail"] == {"serial": 1, "newest": newest, "newestIssuedTo": "192.0.2.8"}


def test_a_token_says_where_it_was_last_used_and_the_log_where_else(estate: Estate) -> None:
    door, path = estate.door, "/api/agent/enroll"
    door.clock.advance(5)
    body = {"token": estate.token.document["token"], "hostname": "web-2"}
    assert "hostId" in call_from("192.0.2.8", door, path, body)
    used = door.clock.ms
    door.clock.advance(5)
    assert call_from("192.0.2.9", door, path, body)["code"] == "token-used"
    token = estate.ask("owner", "GET", estate.path("/api/hosts/tokens/{id}")).document
    assert (token["usedFrom"], token["usedAt"]) == ("192.0.2.8", hostenroll.rfc3339(used))
    events = events_of(door)
    assert [(event["action"], event["address"]) for event in events[:2]] == [
        ("refuse", "192.0.2.9"), ("enroll", "192.0.2.8")]  # fmt: skip


QUESTIONS: Dict[str, Tuple[str, Callable[[Any], bool]]] = {
    "everything": ("", lambda event: True),
    "an action": ("&action=enroll", lambda event: event["action"] == "enroll"),
    "another": ("&action=refuse", lambda event: event["action"] == "refuse"),
    "a subject": ("&subject=host:{host}", lambda event: "host:" in str(event["subject"])),
    "a code": ("&code=token-used", lambda event: event["code"] == "token-used"),
    "an organization": ("&organization=berlin", lambda event: event["organizationId"] == "berlin"),
    "all of them": (
        "&organization=default&action=refuse&code=token-used&subject=token:{token}",
        lambda event: event["code"] == "token-used",
    ),
    "none": ("&action=delete", lambda event: False),
    "no such code": ("&code=x", lambda event: False),
}


@pytest.mark.parametrize("query, chosen", QUESTIONS.values(), ids=QUESTIONS)
def test_the_log_is_listed_the_newest_first_page_by_page(
    query: str, chosen: Callable[[Any], bool], estate: Estate
) -> None:
    door = estate.door
    text, number = estate.token.document["token"], estate.token.document["id"]
    door.enroll(text, "web-2")
    for _ in range(75):  # more than one slice
        door.call("PATCH", f"/api/hosts/{estate.host}", {"name": "x"}, door.api_key)
    for _ in range(3):
        assert door.enroll(text).code == "token-used"
    everything = events_of(door)
    assert [event["number"] for event in everything] == list(range(len(everything), 0, -1))
    wanted = [event for event in everything if chosen(event)]
    if "subject=host" in query:
        wanted = [event for event in wanted if event["subject"] == f"host:{estate.host}"]
    asked = query.format(host=estate.host, token=number)
    for limit in (7, 1000) if len(wanted) > 20 else (1, 2, 3, 1000):
        found = walk(door, door.api_key, f"/api/audit?limit={limit}{asked}", "events")
        assert found == wanted, limit
    cursor = f"{40:016x}"
    below = walk(door, door.api_key, f"/api/audit?limit=1000{asked}&cursor={cursor}", "events")
    assert below == [event for event in wanted if event["number"] < 40]


@pytest.mark.parametrize(
    "query", ["action=x", "action=", "cursor=1", "limit=0", "since=1", "organization=nothing"]
)
def test_a_question_to_the_log_is_strict(query: str, api: ApiDoor) -> None:
    refused = api.call("GET", f"/api/audit?{query}", bearer=api.api_key)
    assert (refused.code, len(refused.document["errors"])) == ("invalid-query", 1)


def secrets_in(haystack: str, secrets: Sequence[str]) -> List[str]:
    """Secrets of which a part stands in a text."""
    return [text for text in secrets if any(
        text[at : at + 12] in haystack for at in range(0, len(text) - 12, 6))]  # fmt: skip


def test_no_secret_is_ever_in_the_database_or_the_log(
    paths: Any, clock: Clock, caplog: Any
) -> None:
    """Nor when somebody puts one where it does not belong."""
    caplog.set_level("INFO", logger="hostenroll")
    with opened(paths, clock, credential_ttl=300) as registry:
        door = ApiDoor(registry, clock)
        viewer = make_api_key(registry, clock, "default", "viewer")
        minted, spare = door.mint(maxUses=2).document, door.token()
        credentials = [door.enroll(minted["token"], "web-1", "a-key-of-mine").document["credential"]
                       for _ in range(2)]  # fmt: skip
        door.beat(credentials[1])
        clock.advance(250)
        credentials.append(door.beat(credentials[1], os="linux").document["credential"])
        for credential in (credentials[2], credentials[0], credentials[0][:-1] + "_"):
            door.beat(credential)
        number = door.call("GET", "/api/hosts", bearer=viewer).document["hosts"][0]["id"]
        door.enroll(door.reenroll(number).document["token"])
        do(registry, clock, lambda now: registry.rotate_signing_key(OPERATOR, now))
        texts = [door.api_key, viewer, minted["token"], spare, *credentials]
        for text in texts:
            door.enroll(text, "web-1")
            door.beat(text)
            door.call("GET", "/api/me", bearer=text)
            for method in ("GET", "DELETE"):
                for key in (viewer, "hak_junk"):
                    door.call(method, f"/api/hosts/{text}", bearer=key)
                    door.call(method, f"/api/hosts/tokens/{text}", bearer=key)
                    door.call(method, f"/api/hosts?q={text}", bearer=key)
        for text in texts[:4]:
            door.enroll("web-1", text)  # the two in the wrong order
        assert door.api.run([door.api.housekeeping()], clock.ms)
        ring = registry.keyring
        octets = [*(key.octets for key in ring.keys), ring.audit_key]
        rows = snapshot(registry)
        assert len(rows["audit"]) > 50
    # The ids of tokens and keys, and what credentials say, are no secrets.
    secrets = [text.split("_", 2)[2][:43] for text in texts[:4]]
    secrets += [credential.split(".")[2] for credential in credentials]
    secrets += [hostenroll.base64url(key) for key in octets] + ["a-key-of-mine"]
    for name, found in rows.items():
        for row in found:
            assert secrets_in(str(row), secrets) == [], (name, row)
    raw = b"".join(Path(path).read_bytes() for path in (paths[0], f"{paths[0]}-wal")
                   if os.path.exists(path))  # fmt: skip
    assert len(raw) > 10_000 and not any(key in raw for key in octets)
    assert secrets_in(raw.decode("latin-1"), secrets) == []
    formatters = (hostenroll.JsonFormatter(), hostenroll.TextFormatter())
    logged = "\n".join(form.format(record) for record in caplog.records for form in formatters)
    assert "enroll" in logged and secrets_in(logged, secrets) == []


def test_a_flood_that_is_refused_costs_the_log_sixty_one_rows_a_minute(
    api: ApiDoor, clock: Clock
) -> None:
    credential = enrolled(api)["credential"]
    before = len(events_of(api))
    for _ in range(3):
        for n in range(200):
            api.beat("junk")
            if n % 20 == 0:
                assert api.beat(credential).status == 200
        clock.advance(60)
        assert api.beat(credential).status == 200
        assert api.api.run([api.api.housekeeping()], clock.ms)
        rows = events_of(api)[:-before]
        before += len(rows)
        assert len(rows) == 61 and {row["code"] for row in rows} == {"credential-invalid"}
        assert (rows[0]["detail"]["more"], rows[0]["address"]) == (140, None)


@pytest.mark.parametrize("what", ["token", "API key to read", "API key to write"])
def test_a_wrong_secret_is_refused_without_a_tick(
    what: str, api: ApiDoor, clock: Clock, paths: Any
) -> None:
    """It takes no lock, and no heartbeat waits for the disk because of it."""
    good = {"token": api.token(), "API key to read": api.api_key}.get(what, api.api_key)
    for wrong in (good[:-9] + "B" + good[-8:], hostenroll.mint_secret(good[:3], 1 << 40).text):
        body = {"token": wrong, "hostname": "web-1"}
        call = {
            "token": request_bytes("POST", "/api/agent/enroll", body),
            "API key to read": request_bytes("GET", "/api/me", bearer=wrong),
            "API key to write": request_bytes("POST", "/api/hosts/tokens", {}, wrong),
        }[what]
        with write_lock(paths[0]):
            request = RequestReader("192.0.2.7").next(call)
            assert request is not None
            refused = api.api.admit(request, clock.ms)
        assert isinstance(refused, hostenroll.Response)
        code = "token-unknown" if what == "token" else "api-key-invalid"
        assert json.loads(refused.body)["code"] == code
    assert api.registry.metrics.refusals == {code: 2}


def test_a_secret_that_could_not_be_looked_up_is_not_called_wrong(api: ApiDoor) -> None:
    """The tick looks again; when it cannot either, it says so."""
    token = api.token()
    with faulty(api.registry, n=1) as database:
        assert api.enroll(token).status == 201
    assert database.failed
    with faulty(api.registry, n=1) as database:
        assert api.call("GET", "/api/me", bearer=api.api_key).status == 200
    assert database.failed and not api.registry.metrics.refusals


def test_a_token_that_is_revoked_in_its_own_tick_lets_nobody_in(api: ApiDoor, clock: Clock) -> None:
    minted = api.mint().document
    revoke = request_bytes("DELETE", f"/api/hosts/tokens/{minted['id']}", bearer=api.api_key)
    body = {"token": minted["token"], "hostname": "web-1"}
    admitted = [
        api.api.admit(RequestReader().next(data), clock.ms)  # type: ignore[arg-type]
        for data in (revoke, request_bytes("POST", "/api/agent/enroll", body))
    ]
    done, refused = api.api.run(admitted, clock.ms) or []
    assert isinstance(done, hostenroll.Response) and done.status == 204
    assert isinstance(refused, hostenroll.TokenRevoked)


def test_the_agent_is_not_told_of_another_machine_of_its_name(estate: Estate) -> None:
    door = estate.door
    alone = door.enroll(door.token(), "db-1")
    door.clock.advance(1)
    beside = door.enroll(door.token(), "WEB-1.")
    assert (beside.status, set(beside.document)) == (201, set(alone.document))
    assert "warnings" not in door.beat(beside.document["credential"]).document
    (warning,) = door.host(beside.document["hostId"]).document["warnings"]
    assert estate.host in warning
    assert door.host(estate.host).document["warnings"] == []
    listed = estate.ask("viewer", "GET", "/api/hosts?limit=1").document["hosts"][0]
    assert listed["warnings"] == [warning]
    assert events_of(door, "&action=enroll")[0]["detail"]["sameHostnameAs"] == estate.host


def test_a_host_outlives_the_record_of_its_token(estate: Estate) -> None:
    door, clock, number = estate.door, estate.door.clock, estate.token.document["id"]
    token = estate.path("/api/hosts/tokens/{id}")
    clock.advance(1)
    door.revoke_token(number)
    before = door.host(estate.host).document
    clock.advance(30 * 86400 - 1)
    assert door.api.run([door.api.housekeeping()], clock.ms)
    assert estate.ask("viewer", "GET", token).document["state"] == "revoked"
    clock.advance(1)
    assert door.api.run([door.api.housekeeping()], clock.ms)
    assert estate.ask("viewer", "GET", token).code == "not-found"
    assert door.enroll(estate.token.document["token"]).code == "token-unknown"
    assert door.host(estate.host).document == before and before["tokenId"] == number
    assert door.beat(estate.callers["credential"]).status == 200
    assert events_of(door, f"&action=mint&subject=token:{number}") != []


@pytest.mark.parametrize("kind", ["token", "API key", "credential"])
def test_a_secret_in_the_wrong_place_is_not_kept_in_the_audit_log(
    kind: str, api: ApiDoor, paths: Any
) -> None:
    token = api.token()
    secrets = {"token": api.token(), "API key": api.api_key}
    secrets["credential"] = api.enroll(token).document["credential"]
    secret = secrets[kind]
    for path in (f"/api/hosts/{secret}", f"/api/hosts/tokens/{secret}", f"/api/hosts?q={secret}"):
        for bearer in (None, "hak_nonsense", token):
            assert api.call("GET", path, bearer=bearer).status == 401
    api.token()  # a tick that writes, and with it what was refused
    details = [detail for (detail,) in look(api.registry, "SELECT detail FROM audit")]
    assert sum("GET /api/hosts" in detail for detail in details) == 9
    assert not any(secret[-20:] in detail or secret[22:40] in detail for detail in details)


def test_the_service_says_how_hosts_find_it(estate: Estate) -> None:
    registry, clock = estate.door.registry, estate.door.clock
    said = estate.ask("viewer", "GET", "/api/service").document
    assert said["publicUrl"] == "http://127.0.0.1:8080"  # no server ever ran
    assert said["pin"] is None and said["heartbeatIntervalSeconds"] == 30
    registry.announce_pin("sha256//a=")
    do(registry, clock, lambda now: registry.start_service("https://enroll.lan:8443", now))
    do(registry, clock, registry.keep_house)
    said = estate.ask("viewer", "GET", "/api/service").document
    command = said.pop("joinCommand")
    assert said == {
        "version": hostenroll.__version__, "publicUrl": "https://enroll.lan:8443",
        "pin": "sha256//a=", "heartbeatIntervalSeconds": 30,
    }  # fmt: skip
    url, pin = said["publicUrl"], said["pin"]
    whole = hostenroll.join_command(url, pin, "het_x").replace("\n ", "")
    assert command.replace("TOKEN", "het_x") == whole and "\n" not in command


# The page.


class Parts(HTMLParser):
    """What a document is made of: its tags, and what stands in its style and in its script."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: List[Tuple[str, Dict[str, Optional[str]]]] = []
        self.texts = {"style": "", "script": ""}
        self._inside = ""
        self.feed(document)
        self.close()

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in self.texts:
            self.texts[self._inside] += data


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts(hostenroll.page())


def policy_of(reply: Reply) -> Dict[str, str]:
    """What a content security policy says, by directive."""
    said = reply.headers["content-security-policy"].split("; ")
    return {name: value for name, _, value in (directive.partition(" ") for directive in said)}


def test_the_page_is_for_anybody_and_allows_only_its_own_text(live: SocketDoor) -> None:
    reply = live.call("GET", "/")
    assert (reply.status, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert reply.document == hostenroll.page()
    assert reply.headers["referrer-policy"] == "no-referrer"
    served = Parts(reply.document)
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in (served.texts["script"], served.texts["style"])
    ]
    assert policy_of(reply) == {
        "default-src": "'none'", "script-src": hashes[0], "style-src": hashes[1],
        "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'",
        "frame-ancestors": "'none'", "require-trusted-types-for": "'script'",
    }  # fmt: skip


def test_the_page_is_one_document_that_loads_nothing(parts: Parts) -> None:
    document = hostenroll.page()
    assert (
        re.findall(r"(?i)\b(?:https?|wss?|data|blob|javascript):|//\w|@import|url\(", document)
        == []
    )
    names = [tag for tag, _ in parts.tags]
    assert names.count("style") == names.count("script") == 1
    names = set(names)
    assert {"dialog", "table"} & names == {"dialog"}  # the script makes the tables
    assert names & {"link", "img", "iframe", "object", "embed", "base", "svg", "video"} == set()
    attributes = {name for _, found in parts.tags for name in found}
    assert attributes & {"src", "srcset", "action", "formaction", "style", "srcdoc"} == set()
    assert [name for name in attributes if name.startswith("on")] == []


def test_the_page_has_no_way_to_make_markup_of_a_name_or_to_keep_a_key() -> None:
    ways = (
        r"innerHTML|outerHTML|insertAdjacentHTML|setHTML|parseHTML|DOMParser|createContextualFragment"
        r"|document\.write|srcdoc|\beval\b|\bFunction\b|importScripts|\.cssText|javascript:"
        r"|localStorage|indexedDB|cookie|caches|location\.search|history\.pushState|window\.name"
    )
    assert re.findall(ways, hostenroll.PAGE_SCRIPT) == []
    kept = re.findall(r"sessionStorage\.\w+\(([^,)]*)", hostenroll.PAGE_SCRIPT)
    assert set(kept) == {"KEY"}
    assert "setAttribute(`on" not in hostenroll.PAGE_SCRIPT


def test_the_page_knows_every_status_state_and_action() -> None:
    def choices(name: str) -> List[str]:
        select = hostenroll.PAGE_MARKUP.partition(f'<select name="{name}">')[2]
        return re.findall(r"<option>([\w-]+)<", select.partition("</select>")[0])

    assert choices("state") == list(hostenroll.TOKEN_STATES)
    assert choices("action") == list(hostenroll.ACTIONS)
    statuses = re.search(r"STATUSES = (\[.*?\]);", hostenroll.PAGE_SCRIPT)
    assert statuses and sorted(json.loads(statuses[1])) == sorted(hostenroll.STATUSES)
    assert f"ROWS_EXAMINED = {hostenroll.ROWS_EXAMINED};" in hostenroll.PAGE_SCRIPT
    for word in (*hostenroll.STATUSES, *hostenroll.TOKEN_STATES):
        assert re.search(rf"\.{word}[^{{]*{{ color: var\(", hostenroll.PAGE_STYLE), word


def luminance(colour: str) -> float:
    """Of a colour in sRGB: WCAG 2.2."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_on_the_page_can_be_read(scheme: str) -> None:
    """WCAG 2.2, level AA: a contrast of 4.5 for text."""
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        for block in hostenroll.PAGE_STYLE.split("prefers-color-scheme: dark", 1)
    )
    assert set(light) == set(dark)
    colours = light if scheme == "light" else dark
    texts = ("text", "quiet", "accent", "danger", *hostenroll.STATUSES)
    pairs = [(text, ground) for text in texts for ground in ("card", "ground", "sunk")]
    pairs += [("text", "notice"), ("on-accent", "accent"), ("on-accent", "danger")]
    for text, ground in pairs:
        low, high = sorted((luminance(colours[text]), luminance(colours[ground])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


# The page in a browser, by WebDriver (W3C) over HTTP.

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"
)
CHROMIUM_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--window-size=1280,1000",
)  # fmt: skip
ROWS = "document.querySelectorAll('#{view} tbody tr')"


class Browser:
    """A Chromium with an empty profile, one tab of it."""

    def __init__(self, folder: Path) -> None:
        self.driver = subprocess.Popen(
            [str(DRIVER), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.driver.stdout is not None
        started = (re.search(r"successfully on port (\d+)", line) for line in self.driver.stdout)
        self.base = f"http://127.0.0.1:{next(found[1] for found in started if found)}/session"
        options = {"binary": CHROMIUM, "args": [*CHROMIUM_FLAGS, f"--user-data-dir={folder}"]}
        always = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        asked = {"capabilities": {"alwaysMatch": always}}
        try:
            self.base += "/" + self.ask("POST", "", asked)["sessionId"]
        except BaseException:
            self.close()
            raise

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            self.base + path,
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(error.read().decode()[:500]) from None

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self.ask("DELETE", "")
        self.driver.terminate()
        self.driver.wait(10)
        assert self.driver.stdout is not None
        self.driver.stdout.close()

    def open(self, url: str) -> None:
        """A page in a tab that remembers nothing."""
        self.ask("POST", "/url", {"url": url})
        self.run("sessionStorage.clear()")
        self.ask("POST", "/refresh", {})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def see(self, expression: str, *arguments: Any, seconds: float = 30) -> Any:
        """What an expression comes to, as soon as it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            seen = self.run(f"return {expression}", *arguments)
            if seen:
                return seen
            time.sleep(0.03)
        raise AssertionError(f"{expression} of {arguments}\n{self.text('body')}\n{self.log()}")

    def element(self, selector: str, text: str = "") -> str:
        """The first that can be seen, and says something; it is scrolled to."""
        found = self.see(
            "[...document.querySelectorAll(arguments[0])].find((e) => e.getClientRects().length "
            "&& e.textContent.includes(arguments[1]))",
            selector,
            text,
        )
        self.run("arguments[0].scrollIntoView({block: 'center'})", found)
        return str(next(iter(found.values())))

    def click(self, selector: str, text: str = "") -> None:
        self.ask("POST", f"/element/{self.element(selector, text)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """In the place of what is there."""
        self.ask("POST", f"/element/{self.element(selector)}/clear", {})
        self.ask("POST", f"/element/{self.element(selector)}/value", {"text": text})

    def press(self, key: str) -> None:
        """One key, wherever the focus is."""
        strokes = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        keyboard = {"type": "key", "id": "keyboard", "actions": strokes}
        self.ask("POST", "/actions", {"actions": [keyboard]})

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).innerText", selector))

    def rows(self, view: str = "hosts") -> List[str]:
        """The first cell of each row."""
        cells = f"return [...{ROWS.format(view=view)}].map((row) => row.cells[0].innerText)"
        return list(self.run(cells))

    def buttons(self) -> List[str]:
        """What those say that can be seen."""
        seen = "[...document.querySelectorAll('button')].filter((b) => b.getClientRects().length)"
        return list(self.run(f"return {seen}.map((button) => button.textContent)"))

    def wake(self) -> None:
        """What happens when a tab is looked at again: nothing waits for its turn."""
        self.run("document.dispatchEvent(new Event('visibilitychange'))")

    def log(self) -> List[str]:
        """What the browser has complained of since it was last asked."""
        return [entry["message"] for entry in self.ask("POST", "/se/log", {"type": "browser"})]

    def sign_in(self, url: str, key: str, fragment: str = "") -> None:
        self.open(f"{url}/{fragment}")
        self.type("#key", key)
        self.click("#sign-in button")
        self.see("!document.querySelector('#signed-in').hidden")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: Any) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The one browser, with nothing left of the test before."""
    yield chromium
    chromium.ask("POST", "/url", {"url": "about:blank"})
    chromium.log()


class Fleet(NamedTuple):
    """A server, and ways to it beside the browser."""

    folder: Path
    door: SocketDoor

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.door.port}"

    def key(self, *options: str) -> str:
        return cli(self.folder, "mint-api-key", *options).stdout.strip()

    def join(self, *names: str, **order: Any) -> List[Dict[str, Any]]:
        token = self.door.token(maxUses=len(names), **order)
        return [
            self.door.enroll(token, f"host-{n}", name=name).document for n, name in enumerate(names)
        ]


@pytest.fixture
def fleet(tmp_path: Path, live: SocketDoor) -> Fleet:
    return Fleet(tmp_path, live)


@pytest.fixture
def multitude(paths: Tuple[str, str], clock: Clock) -> Iterator[Fleet]:
    """A fleet of 270; every other host has a label with a space in it."""
    registry = open_registry(*paths, clock.ms)
    fill(registry, 270)
    connection_of(registry).execute(
        "UPDATE host SET name = printf('web-%03d', id >> 8), "
        """labels = CASE WHEN id >> 8 & 1 THEN '{}' ELSE '{"rack": "b 5"}' END"""
    )
    registry.close()
    with live_door(paths, clock) as live:
        yield Fleet(Path(paths[0]).parent, live)


@pytest.fixture
def quiet(browser: Browser) -> Iterator[None]:
    """Nothing that a browser complains of: no error, and nothing that the policy had to stop. What
    the server refuses is no fault of the page."""
    yield
    assert [said for said in browser.log() if "responded with a status of 4" not in said] == []


@slow
@needs_browser
def test_the_key_stays_in_its_tab(browser: Browser, fleet: Fleet, quiet: None) -> None:
    browser.open(fleet.url)
    for wrong in (fleet.door.token(), "hak_nonsense"):
        browser.type("#key", wrong)
        browser.click("#sign-in button")
        browser.see("document.querySelector('#sign-in-problem').textContent")
        assert browser.run("return sessionStorage.length") == 0
    browser.sign_in(fleet.url, fleet.door.api_key)
    browser.see(f"{ROWS.format(view='hosts')}.length === 0")
    browser.ask("POST", "/refresh", {})
    browser.type("#hosts [name=q]", fleet.door.api_key)
    browser.see("document.querySelector('#hosts [name=q]').validationMessage")
    everywhere = browser.run("""return {
      session: Object.entries(sessionStorage), local: localStorage.length,
      cookie: document.cookie, fields: document.querySelector("#key").value,
      urls: [location.href, document.referrer, ...performance.getEntries().map((e) => e.name)],
      document: document.documentElement.outerHTML}""")
    assert everywhere.pop("session") == [["hostenroll.key", fleet.door.api_key]]
    assert (everywhere["local"], everywhere["cookie"]) == (0, "")
    assert fleet.door.api_key not in json.dumps(everywhere)
    browser.click("#sign-out")
    browser.element("#sign-in")
    assert browser.run("return sessionStorage.length") == 0


@slow
@needs_browser
def test_a_key_that_is_revoked_ends_what_is_shown(browser: Browser, fleet: Fleet) -> None:
    fleet.join("web-1")
    key = fleet.key("--role", "viewer")
    browser.sign_in(fleet.url, key)
    browser.click("#hosts a", "web-1")
    browser.element("#host-facts", "host-0")
    cli(fleet.folder, "revoke-api-key", key.split("_")[1])
    browser.wake()
    browser.element("#sign-in")
    assert "has been revoked" in browser.text("#sign-in-problem")
    shown = browser.run("return document.documentElement.outerHTML")
    assert "web-1" not in shown and "host-0" not in shown
    assert browser.run("return sessionStorage.length") == 0


@slow
@needs_browser
def test_a_fleet_is_counted_searched_filtered_and_paged(
    browser: Browser, multitude: Fleet, quiet: None
) -> None:
    multitude.door.revoke(multitude.join("web-999")[0]["hostId"])
    browser.sign_in(multitude.url, multitude.door.api_key)
    browser.see("document.querySelector('#fleet').innerText.startsWith('271')")
    counts = " ".join(browser.text("#fleet").split())
    assert counts == "271 all hosts 0 online 0 offline 0 missing 270 pending 1 revoked"
    seen = browser.rows()
    assert len(seen) == 100 and browser.text("#hosts .pager span") == "hosts 1 to 100"
    for said in ("hosts 101 to 200", "hosts 201 to 271, the end of the list"):
        browser.click("#hosts .pager button", "Next")
        browser.see(
            "document.querySelector('#hosts .pager span').textContent === arguments[0]", said
        )
        seen += browser.rows()
    assert len(seen) == len(set(seen)) == 271
    browser.click("#hosts .pager button", "Previous")
    browser.see("document.querySelector('#hosts .pager span').textContent.includes('101 to 200')")
    assert browser.rows() == seen[100:200]
    browser.type("#hosts [name=q]", 'web-01 rack="b 5"')
    browser.see(f"{ROWS.format(view='hosts')}.length === 5")
    assert [name[:7] for name in browser.rows()] == [f"web-01{n}" for n in (8, 6, 4, 2, 0)]
    browser.type("#hosts [name=q]", "nowhere")
    browser.element("#hosts .empty", "No host matches.")
    browser.type("#hosts [name=q]", "")
    browser.see(f"{ROWS.format(view='hosts')}.length === 100")
    browser.click("#fleet button", "revoked")
    browser.see(f"{ROWS.format(view='hosts')}.length === 1")
    assert browser.rows()[0].startswith("web-999")
    assert "status=revoked" in browser.run("return location.hash")
    browser.ask("POST", "/refresh", {})
    browser.see(f"{ROWS.format(view='hosts')}.length === 1")
    browser.ask("POST", "/back", {})
    browser.see(f"{ROWS.format(view='hosts')}.length === 100")


@slow
@needs_browser
def test_a_search_through_more_than_one_answer_goes_on_by_itself_and_can_be_stopped(
    browser: Browser, paths: Tuple[str, str], clock: Clock
) -> None:
    registry = open_registry(*paths, clock.ms)
    fill(registry, 9000)
    registry.close()
    with live_door(paths, clock) as live:
        browser.sign_in(f"http://127.0.0.1:{live.port}", live.api_key)
        browser.see("document.querySelector('#fleet').innerText.startsWith('9,000')")
        # From the third part on an answer is held back until it is let go.
        browser.run("""const fetched = window.fetch; window.parts = 0;
          window.fetch = async (path, options) => {
            const isHeld = path.includes("q=nowhere") && (window.parts += 1) > 2;
            const response = await fetched(path, isHeld ? {...options, signal: null} : options);
            if (!isHeld) return response;
            await new Promise((go) => { window.go = go; });
            const text = await response.text();
            response.text = async () => { setTimeout(() => { window.late = 1; }); return text; };
            return response;
          };""")
        browser.type("#hosts [name=q]", "nowhere")
        browser.see("window.parts === 3")
        assert "Looked at about 2,000 of 9,000 hosts ..." in browser.text("#hosts .pager")
        browser.click("#hosts .pager button", "Stop")
        assert "Looked at about 2,000 of 9,000 hosts." in browser.text("#hosts .pager")
        browser.run("window.parts = -99")
        browser.click("#hosts .pager button", "Go on")
        browser.element("#hosts .empty", "No host matches.")
        assert browser.run("return window.parts") == -92
        # A newer question does not wait for an older one, nor is it answered by it.
        browser.run("window.parts = 2; window.go = null")
        browser.type("#hosts [name=q]", "nowhere ")
        browser.see("Boolean(window.go)")
        browser.type("#hosts [name=q]", hostenroll.id_text(8999 << 8))
        browser.see(f"{ROWS.format(view='hosts')}.length === 1")
        browser.element("#hosts .pager", "1 host")
        browser.run("""new MutationObserver(() => { window.touched = 1; }).observe(
          document.querySelector("#hosts tbody"), {childList: true}); window.go();""")
        browser.see("window.late")
        assert not browser.run("return window.touched")
        assert [name.split()[0] for name in browser.rows()] == ["web"]


@slow
@needs_browser
def test_a_host_says_why_and_is_revoked_restored_edited_and_deleted(
    browser: Browser, fleet: Fleet, quiet: None
) -> None:
    (host,) = fleet.join("web-1", labels={"rack": "b4"})
    fleet.door.beat(host["credential"], os="Debian 13", architecture="x86_64")
    browser.sign_in(fleet.url, fleet.door.api_key)
    browser.click("#hosts a", "web-1")
    browser.element("#host-why", "Last seen ")
    assert f"host={host['hostId']}" in browser.run("return location.hash")
    facts = browser.text("#host-facts")
    assert all(text in facts for text in ("Debian 13, x86_64", "rack=b4", host["hostId"], "ago"))
    browser.element("#host-events li", "enroll")
    browser.click("#host button", "Revoke")
    browser.click("#form-go")
    browser.element("#host-why", "Revoked at ")
    assert fleet.door.host(host["hostId"]).document["status"] == "revoked"
    browser.element("#host-events li", "revoke")
    browser.element("#hosts .status", "revoked")
    browser.click("#host button", "Restore")
    browser.press("\ue00c")  # Escape leaves all as it is, and the host open
    assert fleet.door.host(host["hostId"]).document["status"] == "revoked"
    browser.click("#host button", "Restore")
    browser.click("#form-go")
    browser.element("#host-why", "Last seen ")
    browser.click("#host button", "Edit")
    browser.type("#form [name=labels]", "rack")
    browser.click("#form-go")
    browser.element("#form-problem", "name=value")
    browser.type("#form [name=labels]", "rack=b 5\n\nsite = x=y ")
    browser.type("#form [name=name]", "web-2")
    browser.click("#form-go")
    browser.element("#host-name", "web-2")
    changed = fleet.door.host(host["hostId"]).document
    assert (changed["name"], changed["labels"]) == ("web-2", {"rack": "b 5", "site": "x=y"})
    browser.click("#host button", "Delete")
    browser.type("#form [name=name]", "web-1")
    browser.click("#form-go")
    browser.element("#form-problem", "Nothing was deleted")
    browser.type("#form [name=name]", "web-2")
    browser.click("#form-go")
    browser.see("!document.querySelector('dialog[open]')")
    assert fleet.door.host(host["hostId"]).status == 404
    browser.element("#hosts .empty")
    assert "host=" not in browser.run("return location.hash")


@slow
@needs_browser
@needs_curl
def test_a_token_is_minted_and_its_command_runs_as_it_is_shown(
    browser: Browser, fleet: Fleet, quiet: None
) -> None:
    cli(fleet.folder, "add-org", "berlin")
    browser.sign_in(fleet.url, fleet.door.api_key, "#tokens")
    browser.see("document.querySelectorAll('[name=organization] option').length === 6")
    browser.click("#tokens [data-mint]")
    browser.type("#form [name=maxUses]", "2")
    browser.type("#form [name=labels]", "=b4")
    browser.click("#form-go")
    browser.element("#form-problem", "labels")
    browser.see("document.querySelector('#form [name=labels]').ariaInvalid === 'true'")
    browser.type("#form [name=labels]", "rack=b4")
    browser.type("#form [name=description]", "the cellar")
    browser.run("document.querySelector('#form [name=organizationId]').value = 'berlin'")
    browser.click("#form-go")
    command = browser.see("document.querySelector('#join').textContent")
    token = browser.run("return document.querySelector('#token').textContent")
    assert command == hostenroll.join_command(fleet.url, "", token).replace("\n ", "")
    assert browser.run("return document.activeElement.textContent") == "Copy the command"
    browser.element("#arrivals", "Nobody has used it yet.")
    # The agent's own folder, and one heartbeat, are all that is added.
    joined = subprocess.run(
        ["sh", "-c", f"{command} --state agent --once"], cwd=str(fleet.folder), timeout=30
    )
    assert joined.returncode == 0
    browser.wake()
    (host,) = fleet.door.call("GET", "/api/hosts", bearer=fleet.door.api_key).document["hosts"]
    assert (host["organizationId"], host["labels"], host["status"]) == (
        "berlin", {"rack": "b4"}, "online")  # fmt: skip
    browser.element("#arrivals", "Used 1 of 2 times, last from 127.0.0.1.")
    browser.click("#secret button", "Done")
    assert token not in browser.run("return document.documentElement.outerHTML + location.href")
    assert browser.run("return sessionStorage.length") == 1
    browser.element("#tokens tr", "the cellar")
    browser.click("#tokens td button", "Revoke")
    browser.click("#form-go")
    browser.element("#tokens .status", "revoked")
    shown = fleet.door.show_token(token.split("_")[1]).document
    assert shown["state"] == "revoked"
    browser.click("nav a", "Hosts")
    browser.click("#hosts a")
    browser.click("#host button", "Re-enroll")
    browser.click("#form-go")
    command = browser.see("document.querySelector('#join').textContent")
    token = command.partition("printf %s ")[2].split()[0]
    assert fleet.door.enroll(token, host["hostname"]).document["hostId"] == host["id"]


@slow
@needs_browser
def test_where_there_is_no_clipboard_the_command_is_selected(
    browser: Browser, fleet: Fleet, quiet: None
) -> None:
    browser.sign_in(fleet.url, fleet.door.api_key)
    for there in (True, False):
        browser.click("#hosts [data-mint]")
        browser.click("#form-go")
        command = browser.see("document.querySelector('#join').textContent")
        clipboard = (
            "{writeText: async (text) => { window.copied = text; }}" if there else "undefined"
        )
        browser.run(
            f"Object.defineProperty(navigator, 'clipboard', {{value: {clipboard}, "
            "configurable: true})"
        )
        browser.click("#secret button", "Copy the command")
        browser.element("#copied", "Copied." if there else "press Ctrl+C.")
        got = "window.copied" if there else "getSelection().toString()"
        assert browser.run(f"return {got}") == command
        browser.click("#secret button", "Done")


NAMES = (
    "<img src=x onerror=alert(1)>", "'\"><script>alert(1)</script>", "</style><script>alert(1)//",
    "javascript:alert(1)", "&lt;b&gt;&amp;", "${alert(1)}", "a <!-- b", "\U0001f600 ünï",
)  # fmt: skip


@slow
@needs_browser
def test_names_are_never_markup(browser: Browser, fleet: Fleet, quiet: None) -> None:
    labels = {f"k{n}": name for n, name in enumerate(NAMES)}
    hosts = fleet.join(*NAMES, labels=labels, description=NAMES[0])
    fleet.door.beat(hosts[0]["credential"], os=NAMES[0], architecture=NAMES[1])
    browser.sign_in(fleet.url, fleet.door.api_key)
    browser.see(f"{ROWS.format(view='hosts')}.length === {len(NAMES)}")
    links = browser.run(
        "return [...document.querySelectorAll('#hosts th a')].map(e => e.textContent)"
    )
    assert sorted(links) == sorted(NAMES)
    browser.click("#hosts a", NAMES[0])
    browser.element("#host-facts", NAMES[0])
    browser.element("#host-facts a", f"k1={NAMES[1]}")
    assert browser.text("#host-name") == NAMES[0]
    browser.click("#host button", "Revoke")
    assert browser.text("#form-title") == f"Revoke {NAMES[0]}?"
    browser.click("#form [data-close]")
    browser.click("#host-log")
    browser.element("#audit tr", "enroll")
    browser.click("nav a", "Tokens")
    browser.element("#tokens tr", NAMES[0])
    made = browser.run(
        "return ['script', 'img', 'b > *', '[onerror]'].map((s) => "
        "document.querySelectorAll(s).length)"
    )
    assert made == [1, 0, 0, 0]


@slow
@needs_browser
def test_the_policy_stops_what_should_ever_get_in(browser: Browser, fleet: Fleet) -> None:
    browser.sign_in(fleet.url, fleet.door.api_key)
    browser.log()
    stopped = browser.run("""
      const image = document.createElement("img"), script = document.createElement("script");
      image.src = "/healthz"; document.body.append(image);
      document.body.setAttribute("style", "color: red");
      const stopped = [getComputedStyle(document.body).color !== "rgb(255, 0, 0)"];
      for (const act of [() => { document.body.innerHTML = "x"; },
                         () => { script.textContent = "window.ran = 1"; }])
        try { act(); stopped.push(false); } catch { stopped.push(true); }
      return stopped;""")
    assert stopped == [True, True, True]
    assert "Content Security Policy" in "".join(browser.log())


@slow
@needs_browser
def test_a_viewer_is_offered_nothing_that_it_may_not(
    browser: Browser, fleet: Fleet, quiet: None
) -> None:
    (host,) = fleet.join("web-1")
    fleet.door.mint()
    link = f"#hosts?q=web&host={host['hostId']}"
    browser.sign_in(fleet.url, fleet.key("--role", "viewer"), link)
    browser.element("#host-why", "not yet beaten")
    offered = set(browser.buttons())
    browser.press("\ue00c")
    browser.click("nav a", "Tokens")
    browser.element("#tokens .status", "valid")
    offered |= set(browser.buttons())
    assert {"Close", "Sign out", "Next"} <= offered
    assert not {"Mint a token", "Revoke", "Restore", "Re-enroll", "Edit", "Delete"} & offered


@slow
@needs_browser
def test_the_page_lives_without_being_touched(
    browser: Browser, fleet: Fleet, clock: Clock, quiet: None
) -> None:
    (first,) = fleet.join("web-1")
    clock.advance(1)
    (second,) = fleet.join("web-2")
    browser.sign_in(fleet.url, fleet.door.api_key)
    browser.element("#hosts a", "web-1")
    browser.press("/")
    assert browser.run("return document.activeElement.name") == "q"
    for key in ("\ue004",) * 9:  # Tab, as far as the rows
        if browser.run("return document.activeElement.closest('tbody') === null"):
            browser.press(key)
    browser.press("\ue015")  # down
    browser.run(
        "const cell = document.activeElement.closest('th'); window.place = scrollY;"
        "getSelection().selectAllChildren(cell)"
    )
    fleet.door.revoke(second["hostId"])
    fleet.door.beat(first["credential"])
    # Nobody touches anything.
    browser.see("document.querySelector('#hosts tbody').innerText.includes('revoked')")
    browser.see("document.querySelector('#said').textContent.includes('web-1 is online.')")
    kept = browser.run("return [document.activeElement.textContent, getSelection().toString()]")
    assert kept[0] == "web-1" and kept[1].startswith("web-1")


HOLD = """const fetched = window.fetch, [method, part] = arguments;
  Object.assign(window, {held: [], late: 0});
  const isLate = () => setTimeout(() => { window.late += 1; });
  window.fetch = async (path, options) => {
    if (options.method !== method || !path.includes(part)) return fetched(path, options);
    const isHeard = await new Promise((go) => { window.held.push(go); });
    if (!isHeard) { isLate(); throw new TypeError("no answer"); }
    const response = await fetched(path, {...options, signal: null});
    const text = await response.text();
    response.text = async () => { isLate(); return text; };
    return response;
  };"""


def hold(browser: Browser, method: str, part: str) -> None:
    """Hold back the requests for some paths, until they are let go."""
    browser.run(HOLD, method, part)


def let_go(browser: Browser, is_heard: bool = True) -> None:
    """Let the last one go, or have it fail; until the page has made of it what it will."""
    browser.see("window.held.length")
    late = browser.run("window.held.pop()(arguments[0]); return window.late", is_heard)
    browser.see("window.late > arguments[0]", late)


@slow
@needs_browser
def test_a_filter_is_of_its_own_view_and_of_no_other(
    browser: Browser, fleet: Fleet, quiet: None
) -> None:
    fleet.join("web-1")
    browser.sign_in(fleet.url, fleet.door.api_key)
    browser.element("#hosts a", "web-1")
    browser.type("#hosts [name=q]", "web")
    browser.click("nav a", "Audit")
    browser.run("setTimeout(() => { window.later = 1; }, 600)")
    browser.see("window.later")
    assert browser.run("return location.hash") == "#audit"
    browser.element("#audit tr", "enroll")
    assert browser.run("return document.querySelectorAll('#audit .problem').length") == 0
    browser.type("#audit [name=code]", "token-used")
    browser.see("location.hash === '#audit?code=token-used'")


@slow
@needs_browser
@pytest.mark.parametrize("view", ["toString", "constructor", "__proto__", "nonsense", ""])
def test_a_fragment_that_leads_nowhere_shows_the_hosts(
    view: str, browser: Browser, fleet: Fleet, quiet: None
) -> None:
    fleet.join("web-1")
    browser.sign_in(fleet.url, fleet.door.api_key, f"#{view}")
    browser.element("#hosts a", "web-1")


def show_host(browser: Browser, number: str, name: str) -> None:
    """Go to a host, as by a link."""
    browser.run("location.hash = `#hosts?host=${arguments[0]}`", number)
    browser.element("#host-name", name)
    browser.element("#host-acts")


@slow
@needs_browser
def test_what_is_done_is_done_to_the_host_that_was_shown_when_it_was_asked_for(
    browser: Browser, fleet: Fleet, quiet: None
) -> None:
    """Back leads to another host behind the form."""
    one, two = (host["hostId"] for host in fleet.join("web-1", "web-2"))
    browser.sign_in(fleet.url, fleet.door.api_key)
    for word, name, typed in (
        ("Re-enroll", "web-2", ""), ("Edit", "web-2", "web-3"), ("Delete", "web-3", "web-3"),
    ):  # fmt: skip
        show_host(browser, one, "web-1")
        show_host(browser, two, name)
        browser.click("#host button", word)
        browser.run("history.back()")
        browser.see("document.querySelector('#host-name').textContent === 'web-1'")
        if typed:
            browser.type("#form [name=name]", typed)
        browser.click("#form-go")
        browser.see("!document.querySelector('#form').open")
        assert browser.text("#host-name") == "web-1"
        assert browser.run("return document.querySelector('#host').open")
        if word == "Re-enroll":
            assert browser.text("#secret-title") == "Re-enroll web-2"
            token = browser.text("#join").partition("printf %s ")[2].split()[0]
            assert fleet.door.show_token(token.split("_")[1]).document["hostId"] == two
            browser.click("#secret button", "Done")
        if word == "Edit":
            assert fleet.door.host(two).document["name"] == "web-3"
    assert (fleet.door.host(one).status, fleet.door.host(two).status) == (200, 404)


@slow
@needs_browser
def test_that_one_host_is_not_there_is_not_said_of_another(
    browser: Browser, fleet: Fleet, quiet: None
) -> None:
    (host,) = fleet.join("web-1")
    browser.sign_in(fleet.url, fleet.door.api_key)
    hold(browser, "GET", f"api/hosts/{NOWHERE}")
    browser.run("location.hash = `#hosts?host=${arguments[0]}`", NOWHERE)
    browser.see("window.held.length")
    show_host(browser, host["hostId"], "web-1")
    let_go(browser)
    assert browser.text("#host-name") == "web-1"


@slow
@needs_browser
@pytest.mark.parametrize("is_heard", [True, False], ids=["heard", "lost"])
def test_a_late_answer_leaves_the_form_alone_that_was_opened_meanwhile(
    is_heard: bool, browser: Browser, fleet: Fleet, quiet: None
) -> None:
    (host,) = fleet.join("web-1")
    browser.sign_in(fleet.url, fleet.door.api_key)
    show_host(browser, host["hostId"], "web-1")
    hold(browser, "POST", "/revoke")
    browser.click("#host button", "Revoke")
    browser.click("#form-go")
    browser.see("window.held.length")
    browser.click("#form [data-close]")
    browser.click("#host button", "Edit")
    browser.see("!document.querySelector('#form-go').disabled", seconds=5)
    browser.type("#form [name=name]", "web-2")
    let_go(browser, is_heard)
    assert browser.run("return document.querySelector('#form').open")
    assert browser.text("#form-problem") == ""
    browser.click("#form-go")
    browser.element("#host-name", "web-2")
    changed = fleet.door.host(host["hostId"]).document
    assert (changed["name"], changed["status"] == "revoked") == ("web-2", is_heard)


@slow
@needs_browser
def test_the_answer_to_one_form_does_not_let_another_be_sent_twice(
    browser: Browser, fleet: Fleet, quiet: None
) -> None:
    (host,) = fleet.join("web-1")
    browser.sign_in(fleet.url, fleet.door.api_key)
    show_host(browser, host["hostId"], "web-1")
    hold(browser, "POST", "/revoke")
    for forms in (1, 2):
        browser.click("#host button", "Revoke")
        browser.click("#form-go")
        browser.see("window.held.length === arguments[0]", forms)
        if forms == 1:
            browser.click("#form [data-close]")
    browser.run("window.held.shift()(false)")
    browser.see("window.late === 1")
    assert browser.run("return document.querySelector('#form-go').disabled")
    let_go(browser)
    browser.see("!document.querySelector('#form').open")


@slow
@needs_browser
@pytest.mark.parametrize("when", [("GET", "api/service"), ("POST", "api/hosts/tokens")])
def test_a_token_whose_form_was_closed_is_not_shown(
    when: Tuple[str, str], browser: Browser, fleet: Fleet, quiet: None
) -> None:
    browser.sign_in(fleet.url, fleet.door.api_key, "#tokens")
    browser.element("#tokens .empty", "No tokens yet.")
    hold(browser, *when)
    browser.click("#tokens [data-mint]")
    browser.click("#form-go")
    browser.see("window.held.length")
    browser.click("#form [data-close]")
    browser.click("#tokens [data-mint]")
    browser.type("#form [name=description]", "the cellar")
    let_go(browser)
    assert not browser.run("return document.querySelector('#secret').open")
    assert browser.run("return document.querySelector('#form').open")
    made = fleet.door.call("GET", "/api/hosts/tokens", bearer=fleet.door.api_key).document
    assert len(made["tokens"]) == (when[0] == "POST")  # what was sent is seen, and can be revoked
    browser.click("#form [data-close]")
    if when[0] == "POST":
        browser.element("#tokens .status", "valid")


@slow
@needs_browser
def test_that_one_token_was_used_is_not_said_of_another(
    browser: Browser, fleet: Fleet, quiet: None
) -> None:
    browser.sign_in(fleet.url, fleet.door.api_key, "#tokens")
    hold(browser, "GET", "api/hosts/tokens/")
    for is_first in (True, False):
        browser.click("#tokens [data-mint]")
        browser.click("#form-go")
        browser.see("document.querySelector('#secret').open")
        browser.see("window.held.length === 1")
        if is_first:
            fleet.door.enroll(browser.text("#join").partition("printf %s ")[2].split()[0])
            browser.click("#secret button", "Done")
    let_go(browser)
    assert browser.text("#arrivals") == ""


@slow
@needs_browser
@pytest.mark.parametrize("status", [200, 503, 0], ids=["answered", "failed", "silent"])
def test_a_page_asks_a_server_in_trouble_for_a_tenth_of_its_time(
    status: int, browser: Browser, fleet: Fleet
) -> None:
    browser.sign_in(fleet.url, fleet.door.api_key)
    browser.element("#hosts .empty", "No hosts yet.")
    # The page's clock stands still, but that an answer takes 3 s by it.
    browser.run(
        """const fetched = window.fetch, [status] = arguments;
        Object.assign(window, {time: performance.now() + 9000, lists: 0, late: 0, turns: 0});
        performance.now = () => window.time;
        Object.defineProperty(document, "hidden", {get: () => { window.turns += 1; }});
        window.fetch = async (path, options) => {
          if (!path.startsWith("api/hosts?")) return fetched(path, options);
          window.lists += 1;
          await new Promise((go) => setTimeout(go, 20));
          window.time += 3000;
          setTimeout(() => { window.late += 1; });
          if (!status) throw new TypeError("no answer");
          const type = status === 200 ? "application/json" : "application/problem+json";
          const response = new Response("", {status, headers: {"Content-Type": type}});
          response.text = async () => `{"hosts": [], "title": "Busy", "status": ${status}}`;
          return response;
        };""",
        status,
    )
    browser.see("window.late === 1")
    if status != 200:
        browser.element("#trouble", "Busy" if status else "No answer")
    turns = browser.run("window.time += 29000; return window.turns")
    browser.see("window.turns > arguments[0]", turns)
    assert browser.run("return window.lists") == 1
    browser.run("window.time += 2000")
    browser.see("window.lists === 2")


def edits(fleet: Fleet) -> List[Any]:
    """What edits have changed, the newest first."""
    path = "/api/audit?action=edit"
    events = fleet.door.call("GET", path, bearer=fleet.door.api_key).document["events"]
    return [event["detail"] for event in events]


@slow
@needs_browser
def test_an_edit_changes_what_was_edited_and_nothing_else(
    browser: Browser, fleet: Fleet, quiet: None
) -> None:
    labels = {"note": "  two  words ", "rack": "b4"}
    (host,) = fleet.join("web-1", labels=labels)
    browser.sign_in(fleet.url, fleet.door.api_key)
    show_host(browser, host["hostId"], "web-1")

    def edit(name: str, text: Optional[str] = None) -> None:
        browser.click("#host button", "Edit")
        browser.type("#form [name=name]", name)
        if text is not None:
            browser.type("#form [name=labels]", text)
        browser.click("#form-go")
        browser.see("!document.querySelector('#form').open")
        browser.element("#host-name", name)

    edit("web-2")
    assert edits(fleet) == [{"name": "web-2"}]
    edit("web-2")
    assert edits(fleet) == [{"name": "web-2"}]
    assert fleet.door.host(host["hostId"]).document["labels"] == labels
    edit("web-2", "note=  two  words \n site = x \nrack=b5")
    changed = {"note": "  two  words ", "site": "x", "rack": "b5"}
    assert edits(fleet)[0] == {"labels": changed}
    edit("web-2", "")
    assert edits(fleet)[0] == {"labels": {}}


ODD_VALUES = (
    'say "hi" x', '"hi"', '"', '""', '" "', "", " ", " b 5 ", "a\\b c\\", 'a\\" b', 'x="y z"',
    "b=5", 'b" c="d',
)  # fmt: skip


@slow
@needs_browser
def test_a_label_leads_to_the_hosts_that_have_it(
    browser: Browser, fleet: Fleet, quiet: None
) -> None:
    hosts = [
        fleet.join(f"web-{n}", labels={"note": value})[0] for n, value in enumerate(ODD_VALUES)
    ]
    browser.sign_in(fleet.url, fleet.door.api_key)
    for n, host in enumerate(hosts):
        show_host(browser, host["hostId"], f"web-{n}")
        browser.click("#host-facts a", "note=")
        browser.see("!document.querySelector('#host').open")
        browser.see("document.querySelector('#hosts table').ariaBusy === 'false'")
        rows = browser.rows()
        assert [row.split()[0] for row in rows] == [f"web-{n}"], ODD_VALUES[n]


@slow
@needs_browser
def test_the_page_outlives_the_server(browser: Browser, tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server:
        key = cli(tmp_path, "mint-api-key", "--all-orgs").stdout.strip()
        fleet = Fleet(tmp_path, SocketDoor(server.port, key))
        fleet.join("web-1")
        browser.sign_in(fleet.url, key)
        browser.element("#hosts a", "web-1")
        assert server.terminate() == 0
    browser.wake()
    browser.element("#trouble", "No answer from the server since ")
    assert "web-1" in browser.text("#hosts")
    browser.run("document.querySelector('#hosts a').focus()")
    with ServerProcess(tmp_path, "--port", str(server.port)):
        fleet.join("web-2")
        browser.element("#hosts a", "web-2")
        browser.see("document.querySelector('#trouble').hidden")
        assert browser.run("return document.activeElement.textContent") == "web-1"


# 10. Server

HEALTH = request_bytes("GET", "/healthz")


@contextlib.contextmanager
def write_lock(database: Any) -> Iterator[None]:
    """What another process does that writes for long."""
    descriptor = os.open(f"{database}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def until(what: Callable[[], Any], seconds: float = 10) -> Any:
    """Ask again and again, until it is true."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def has_ended(peer: socket.socket) -> bool:
    """Closed, without another byte."""
    try:
        return peer.recv(1) == b""
    except ConnectionError:
        return True


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return True
    return False


def tokens_of(door: Door) -> int:
    return len(walk(door, door.api_key, "/api/hosts/tokens?limit=1000", "tokens"))


def many(count: int, work: Callable[[int], Any]) -> List[Any]:
    """The same in so many threads that start together; what each comes to."""
    barrier, results = threading.Barrier(count), [None] * count

    def one(n: int) -> None:
        barrier.wait(10)
        results[n] = work(n)

    threads = [threading.Thread(target=one, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_pipelined_requests_are_answered_in_order_and_each_in_full(live: SocketDoor) -> None:
    mint = request_bytes("POST", "/api/hosts/tokens", {"description": "x" * 500}, live.api_key)
    head, _, body = mint.partition(b"\r\n\r\n")
    chunked = head.replace(b"Content-Length: %d" % len(body), b"Transfer-Encoding: chunked")
    chunked += b"\r\n\r\n%x;a=b\r\n%b\r\n0\r\nX: y\r\n\r\n" % (len(body), body)
    nothing, me = request_bytes("GET", "/nothing"), request_bytes("GET", "/api/me")
    turn = [HEALTH, mint, nothing, chunked, me]
    said = live.send(b"".join(turn) * 30)
    assert [reply.status for reply in said] == [200, 201, 404, 201, 401] * 30
    assert tokens_of(live) == 60


def test_a_request_may_come_byte_by_byte(live: SocketDoor) -> None:
    mint = request_bytes("POST", "/api/hosts/tokens", {"description": "slow"}, live.api_key)
    with live.connect() as peer, peer.makefile("rb") as stream:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):
            for n in range(len(mint)):
                peer.sendall(mint[n : n + 1])
            reply = read_reply(stream)
            assert reply is not None and reply.status == 201


CLOSING = {
    "HTTP/1.1 stays": (b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", 2),
    "keep-alive stays": (b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: Keep-Alive\r\n\r\n", 2),
    "a refusal stays": (b"GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n", 2),
    "close closes": (b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: x, Close\r\n\r\n", 1),
    "close on a line of its own": (
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: x\r\nConnection: close\r\n\r\n", 1),
    "HTTP/1.0 closes": (b"GET /healthz HTTP/1.0\r\n\r\n", 1),
    "an absolute target": (b"GET http://b/healthz HTTP/1.1\r\nHost: a\r\n\r\n", 2),
}  # fmt: skip


@pytest.mark.parametrize("case", CLOSING.values(), ids=CLOSING)
def test_when_a_connection_ends(case: Any, live: SocketDoor) -> None:
    data, answers = case
    said = live.send(data * 2)
    assert len(said) == answers
    assert (said[-1].headers.get("connection") == "close") == (answers == 1)


# What one reader takes for a body and another for the next request is how requests are
# smuggled. In every row a second request, which would mint a token, hides behind the first.

POST = b"POST /api/hosts/tokens HTTP/1.1\r\nHost: a\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
SMUGGLED: Dict[str, bytes] = {
    "CL.TE": POST + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "TE.CL": POST + CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 0\r\nContent-Length: 5\r\n\r\n",
    "two equal lengths": POST + b"Content-Length: 0\r\ncontent-length: 0\r\n\r\n",
    "a list of lengths": POST + b"Content-Length: 0, 0\r\n\r\n",
    "a signed length": POST + b"Content-Length: +0\r\n\r\n",
    "a negative length": POST + b"Content-Length: -1\r\n\r\n",
    "a length with an underscore": POST + b"Content-Length: 0_0\r\n\r\n",
    "a hexadecimal length": POST + b"Content-Length: 0x0\r\n\r\n",
    "an empty length": POST + b"Content-Length:\r\n\r\n",
    "a length in other digits": POST + "Content-Length: \u0660\r\n\r\n".encode(),
    "a space before the colon": POST + b"Content-Length : 0\r\n\r\n",
    "a line without a colon": POST + b"Junk\r\n\r\n",
    "a folded line": POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "a folded first field": b"POST / HTTP/1.1\r\n Host: a\r\n\r\n",
    "chunked twice": POST + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n",
    "chunked and more": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "nearly chunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked with a vertical tab": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunked in HTTP/1.0": POST.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n0\r\n\r\n",
    "bare LF": POST.replace(b"\r", b"") + b"\n",
    "a bare LF in a value": POST + b"X: y\nContent-Length: 9\r\n\r\n",
    "a bare CR in a value": POST + b"X: y\rContent-Length: 9\r\n\r\n",
    "a NUL in a value": POST + b"X: \x00\r\n\r\n",
    "no host": b"POST /api/hosts/tokens HTTP/1.1\r\n\r\n",
    "two hosts": POST + b"Host: b\r\n\r\n",
    "two spaces": POST.replace(b" HTTP", b"  HTTP") + b"\r\n",
    "a chunk that is longer": POST + CHUNKED + b"\r\n1\r\nab\r\n0\r\n\r\n",
    "a signed chunk": POST + CHUNKED + b"\r\n+0\r\n\r\n",
    "a chunk in 0x": POST + CHUNKED + b"\r\n0x0\r\n\r\n",
    "a chunk with a space": POST + CHUNKED + b"\r\n0 \r\n\r\n",
    "a chunk with a bare LF": POST + CHUNKED + b"\r\n0\n\r\n",
    "an LF in an extension": POST + CHUNKED + b"\r\n0;a\n\r\n\r\n",
    "an endless chunk": POST + CHUNKED + b"\r\nfffffffffffffffff0\r\n",
    "a bad trailer": POST + CHUNKED + b"\r\n0\r\n: x\r\n\r\n",
    "a length that is too large": POST + b"Content-Length: 65537\r\n\r\n",
    "a protocol of its own": b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: Any) -> Iterator[SocketDoor]:
    """One server for all that must leave nothing behind."""
    folder = tmp_path_factory.mktemp("shared")
    with live_door((str(folder / "hostenroll.db"), str(folder / "hostenroll.key")), Clock()) as it:
        yield it


@pytest.mark.parametrize("first", SMUGGLED.values(), ids=SMUGGLED)
def test_what_is_malformed_is_answered_once_and_nothing_behind_it_is_run(
    first: bytes, shared: SocketDoor
) -> None:
    bearer = b"Authorization: Bearer " + shared.api_key.encode() + b"\r\n"
    first = first.replace(b"Host: a\r\n", b"Host: a\r\n" + bearer, 1)
    hidden = request_bytes("POST", "/api/hosts/tokens", {}, shared.api_key)
    (said,) = shared.send(first + hidden)
    assert said.status in (400, 413, 501)
    assert said.headers["connection"] == "close"
    assert tokens_of(shared) == 0


def test_tiny_chunks_are_read_a_few_in_a_turn_whoever_sends_them(paths: Any, clock: Clock) -> None:
    """All that arrives at once would be much work, and two thousand peers may send it at once."""
    body = json.dumps({"description": "x" * 990}).encode()
    with live_door(paths, clock) as live:
        head = POST + CHUNKED + b"Authorization: Bearer " + live.api_key.encode() + b"\r\n\r\n"
        whole = head + b"".join(b"1\r\n%c\r\n" % octet for octet in body) + b"0\r\nX: y\r\n\r\n"
        said = live.send(whole + HEALTH + whole)  # and then a half-close
        assert [reply.status for reply in said] == [201, 200, 201]
        assert said[0].document["description"] == "x" * 990
        broken = whole.replace(b"0\r\nX: y", b"0\r\nX y")
        assert [reply.status for reply in live.send(HEALTH + broken + HEALTH)] == [200, 400]
        assert tokens_of(live) == 2
    reader, calls = RequestReader(), 1
    request = reader.next(whole)
    while request is None:
        assert reader.is_behind
        request, calls = reader.next(), calls + 1
    assert request.body == body and not reader.is_behind
    assert calls > len(body) // hostenroll.CHUNK_LINES_AT_ONCE


def test_a_body_is_never_read_as_a_request(live: SocketDoor) -> None:
    hidden = request_bytes("POST", "/api/hosts/tokens", {}, live.api_key)
    assert [reply.status for reply in live.send(request_bytes("GET", "/healthz", hidden) * 2)] == [
        200, 200]  # fmt: skip
    assert tokens_of(live) == 0


def test_the_hundred_that_continues(live: SocketDoor) -> None:
    mint = request_bytes(
        "POST", "/api/hosts/tokens", {"maxUses": 3}, live.api_key, [("Expect", "100-continue")]
    )
    head, _, body = mint.partition(b"\r\n\r\n")
    with live.connect() as peer, peer.makefile("rb") as stream:
        for _ in range(2):
            peer.sendall(head + b"\r\n\r\n")
            assert (stream.readline(), stream.readline()) == (b"HTTP/1.1 100 Continue\r\n", b"\r\n")
            peer.sendall(body)
            reply = read_reply(stream)
            assert reply is not None and reply.document["maxUses"] == 3
    # The body is there already, or will never be welcome: nobody is told to go on.
    assert [reply.status for reply in live.send(mint)] == [201]
    large = head.replace(b"Content-Length: ", b"Content-Length: 99999")
    assert [reply.status for reply in live.send(large + b"\r\n\r\n")] == [413]


def test_who_sends_on_after_the_refusal_can_still_read_it(live: SocketDoor) -> None:
    """The head alone is refused; to close then would reset the connection under the body."""
    with live.connect() as peer, peer.makefile("rb") as stream:
        peer.sendall(
            b"POST /api/agent/enroll HTTP/1.1\r\nHost: h\r\nContent-Length: 999999\r\n\r\n"
        )
        select.select([peer], [], [], 10)
        for _ in range(100):
            peer.sendall(b"x" * 9999)
        reply = read_reply(stream)
        assert reply is not None and reply.code == "body-too-large"


def test_who_still_sends_can_read_the_refusal(live: SocketDoor) -> None:
    """To close on unread bytes resets the connection, and the answer would be lost."""
    head = b"POST /api/agent/enroll HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n"
    for _ in range(3):
        with live.connect() as peer, peer.makefile("rb") as stream:
            peer.sendall(head)
            for _ in range(10):
                peer.sendall(b"x" * 100_000)
            reply = read_reply(stream)
            assert reply is not None and reply.code == "body-too-large"
            assert stream.read() == b""


@slow
def test_nobody_waits_for_the_slow(paths: Any, clock: Clock) -> None:
    with live_door(paths, clock, deadlines=(0.5, 0.5, 0.5, 0.5)) as live:
        begun = time.monotonic()
        for started in (b"", b"GET /hea", b"POST /api/agent/enroll HTTP/1.1\r\nHost: a\r\nContent-"
                        b"Length: 9\r\n\r\n{", POST + CHUNKED + b"\r\n1\r\n{\r\n"):  # fmt: skip
            with live.connect() as peer, peer.makefile("rb") as stream:
                peer.sendall(started)
                reply = read_reply(stream)
                assert reply is not None and reply.code == "request-timeout"
                assert reply.headers["connection"] == "close"
                assert stream.read() == b""
        with live.connect() as peer, peer.makefile("rb") as stream:
            peer.sendall(HEALTH)
            assert read_reply(stream) is not None
            assert stream.read() == b""  # idle: closed without a word
        assert 2.4 < time.monotonic() - begun < 20


def test_an_answer_that_nobody_takes_is_dropped(paths: Any, clock: Clock) -> None:
    registry = open_registry(*paths, clock.ms)
    door = ApiDoor(registry, clock)
    token = door.token(maxUses=60, labels={f"k{n}": "x" * 250 for n in range(30)})
    for n in range(60):
        assert door.enroll(token, f"web-{n}").status == 201
    registry.close()
    with live_door(paths, clock, deadlines=(9, 9, 9, 0.3), connections=1) as live:
        ask = request_bytes("GET", "/api/hosts?limit=1000", bearer=live.api_key)
        with socket.socket() as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.connect(("127.0.0.1", live.port))
            peer.sendall(ask * 40)  # about 20 MB of answers
            # There is one place, and it is not given away to who comes: it falls free.
            assert live.call("GET", "/healthz").status == 200
            with peer.makefile("rb") as stream, contextlib.suppress(ConnectionError):
                assert len(stream.read()) < 19_000_000


def test_at_the_limit_who_has_been_silent_for_longest_gives_way(paths: Any, clock: Clock) -> None:
    """Between two requests or before the first: a crowd that never asks for anything must not push
    out those who do."""
    with live_door(paths, clock, connections=3) as live, contextlib.ExitStack() as stack:
        silent, older, newer = [stack.enter_context(live.connect()) for _ in range(3)]
        for peer in (older, newer):
            peer.sendall(HEALTH)
            assert peer.recv(65536).startswith(b"HTTP/1.1 200 ")
        for gone in (silent, older, newer):
            late = stack.enter_context(live.connect())
            late.sendall(b"GET /heal")
            assert has_ended(gone)
        late.sendall(b"thz HTTP/1.1\r\nHost: a\r\n\r\n")
        assert late.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_at_the_limit_a_stalled_body_gives_way_too(paths: Any, clock: Clock) -> None:
    """Else whoever stalls in as many bodies as there are places keeps everyone out."""
    with live_door(paths, clock, connections=2) as live, contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(live.connect()) for _ in range(2)]
        for peer in stalled:
            peer.sendall(POST + b"Content-Length: 9\r\n\r\n{")
        assert live.call("GET", "/healthz").status == 200
        assert has_ended(stalled[0])


def test_at_the_limit_the_busy_never_give_way(paths: Any, clock: Clock) -> None:
    with live_door(paths, clock, connections=2) as live, contextlib.ExitStack() as stack:
        mint = request_bytes("POST", "/api/hosts/tokens", {}, live.api_key)
        with write_lock(paths[0]):
            peers = []
            for _ in range(3):
                peers.append(stack.enter_context(live.connect()))
                peers[-1].sendall(mint)
            peers[2].settimeout(0.3)
            with pytest.raises(socket.timeout):
                peers[2].recv(1)
        peers[2].settimeout(10)
        for peer in peers:
            assert peer.recv(65536).startswith(b"HTTP/1.1 201 ")
            peer.close()
    assert sql(paths[0], "SELECT count(*) FROM token") == [(3,)]


def test_hundreds_who_say_nothing_disturb_nobody(live: SocketDoor) -> None:
    with contextlib.ExitStack() as stack:
        for n in range(300):
            peer = stack.enter_context(live.connect())
            peer.sendall((b"", b"GET /", POST + b"Content-Length: 9\r\n\r\n{")[n % 3])
        begun = time.monotonic()
        for _ in range(20):
            assert live.enroll(live.token()).status == 201
        assert time.monotonic() - begun < 10


# Many who connect and never finish what they begin; in a process of its own, so that what is
# measured beside it is the server alone. It says when all of them stand, and, when its stdin ends,
# how many still do.
CROWD = """
import resource, selectors, socket, sys
port, count, at_once, *begun = map(eval, sys.argv[1:])
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
selector, peers = selectors.DefaultSelector(), []

def stand():
    while selector.get_map():
        for key, _ in selector.select(10):
            selector.unregister(key.fileobj)
            key.fileobj.send(key.data)

for n in range(count):
    peers.append(socket.socket())
    peers[-1].setblocking(False)
    peers[-1].connect_ex(("127.0.0.1", port))
    selector.register(peers[-1], selectors.EVENT_WRITE, begun[n % len(begun)])
    if not at_once:
        stand()
stand()
print("all stand", flush=True)
sys.stdin.read()
ended = selectors.DefaultSelector()
for peer in peers:
    ended.register(peer, selectors.EVENT_READ)
print(count - len(ended.select(0)), flush=True)
"""


@contextlib.contextmanager
def crowd(port: int, count: int, at_once: bool, begun: Sequence[bytes]) -> Iterator[Any]:
    """So many who begin what they never finish; what it yields says whether all of them stand.
    Afterwards all of them still do."""
    arguments = map(repr, (port, count, at_once, *begun))
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", CROWD, *arguments], stdin=pipe, stdout=pipe, text=True
    ) as process:
        try:
            said: List[str] = []
            reader = threading.Thread(target=lambda: said.append(process.stdout.readline()))
            reader.start()
            yield lambda: said == ["all stand\n"]
            reader.join(30)
            left, _ = process.communicate("", 30)
        finally:
            process.kill()
    assert int(left) == count


def resident(process: Any) -> int:
    """The memory of a process, in bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def timed_beats(door: SocketDoor, credential: str, is_over: Callable[[], bool]) -> List[float]:
    """How long each heartbeat takes, on a connection that stays and on one of its own in turn."""
    beat, took = request_bytes("POST", "/api/agent/heartbeat", bearer=credential), []
    with door.connect(30) as kept:
        for n in itertools.count():
            if n % 2 == 0 and is_over():
                return took
            began = time.perf_counter()
            with contextlib.nullcontext(kept) if n % 2 else door.connect(30) as peer:
                peer.sendall(beat)
                assert b" 200 " in peer.recv(65536)
                took.append(time.perf_counter() - began)
    raise AssertionError


BEGUN = (
    b"", b"GET /", b"GET / HTTP/1.1\r\nX: " + b"x" * 4000,
    POST + b"Content-Length: 9000\r\n\r\n" + b"x" * 6000,
    POST + CHUNKED + b"\r\n" + b"2\r\n{}\r\n" * 100,
)  # fmt: skip
HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 40
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")


@slow
@needs_proc
@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "one by one"])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_while_two_thousand_open_and_stand_a_heartbeat_hardly_waits(
    tls: bool, at_once: bool, tmp_path: Path
) -> None:
    """A full queue of connections that wait to be accepted would cost an honest peer a second."""
    pair = write_pair(tmp_path)
    options = ("--tls-cert", pair[0], "--tls-key", pair[1]) if tls else ()
    with ServerProcess(tmp_path, *options) as server:
        door = TlsDoor(server.port, "") if tls else SocketDoor(server.port, "")
        token = cli(tmp_path, "mint-token").stdout.strip()
        credential = door.enroll(token).document["credential"]
        timed_beats(door, credential, iter([False] * 50 + [True]).__next__)
        before = resident(server.process)
        count, begun = (1000, (b"", HELLO)) if tls else (2000, BEGUN)
        with crowd(server.port, count, at_once, begun) as stands:
            took = timed_beats(door, credential, stands)
            took += timed_beats(door, credential, iter([False] * 200 + [True]).__next__)
            grown = resident(server.process) - before
        took.sort()
        assert took[-1] < 1 and took[len(took) * 99 // 100] < 0.25
        assert grown < 64 * 1024 * 1024


def test_nobody_gives_way_for_a_descriptor_that_nobody_wants(tmp_path: Path) -> None:
    """accept() says that there is none before it says that nobody waits."""
    with ServerProcess(tmp_path) as server:
        door = SocketDoor(server.port, "")
        number = server.process.pid
        with door.connect() as idle, idle.makefile("rb") as stream:
            idle.sendall(HEALTH)
            assert read_reply(stream) is not None
            in_use = len(os.listdir(f"/proc/{number}/fd"))
            _, hard = resource.prlimit(number, resource.RLIMIT_NOFILE)
            resource.prlimit(number, resource.RLIMIT_NOFILE, (in_use + 1, hard))
            with door.connect() as last, last.makefile("rb") as answers:
                for _ in range(3):
                    last.sendall(HEALTH)
                    assert read_reply(answers) is not None
            idle.sendall(HEALTH)
            assert read_reply(stream) is not None


@pytest.mark.parametrize("limit", [48, pytest.param(100, marks=slow)])
def test_a_server_that_runs_out_of_descriptors_goes_on(limit: int, tmp_path: Path) -> None:
    shell = f'ulimit -n {limit} && exec "$0" "$@" serve --port 0'
    with OtherServer(tmp_path, "sh", "-c", shell, *SCRIPT) as server:
        door = SocketDoor(server.port, "")
        assert door.call("GET", "/healthz").status == 200
        with contextlib.ExitStack() as stack:
            for _ in range(150):
                stack.enter_context(door.connect())
            for _ in range(3):
                assert door.call("GET", "/readyz").status == 200
        assert cli(tmp_path, "mint-token").returncode == 0
        assert server.terminate() == 0
    assert "Traceback" not in "".join(server.said)


# What is refused as bytes or as a value above is refused in the same way by a server.


@contextlib.contextmanager
def door_with_key(paths: Tuple[str, str], clock: Clock, key: Any) -> Iterator[SocketDoor]:
    """A running server that signs with a key of the test's."""
    registry = open_registry(*paths, clock.ms)
    own = registry.keyring
    registry.close()
    hostenroll.write_key_file(paths[1], hostenroll.Keyring([key, *own.keys], own.audit_key))
    with live_door(paths, clock) as live:
        yield live


def test_no_forged_credential_gets_past_a_server_either(paths: Any, clock: Clock) -> None:
    """Not as a credential, an API key or a token; and not over what it would mean as a header."""
    with door_with_key(paths, clock, KEY) as live:
        assert live.beat(GENUINE).code == "host-unknown"  # the server has the key
        for name, credential in FORGED.items():
            text = credential.encode("utf-8", "surrogateescape")
            data = request_bytes("POST", "/api/agent/heartbeat", bearer="@").replace(b"@", text)
            codes = [reply.code for reply in live.send(data)]
            if name in ("space before", "CR LF at the end"):  # of a header field: no part of it
                assert codes == ["host-unknown"]
            elif name == "nothing":
                assert codes == ["credential-missing"]
            elif name == "very long":
                assert codes == ["head-too-large"]
            else:
                assert codes in (["credential-invalid"], ["malformed-request"]), name
        texts = [text for text in (*FORGED.values(), GENUINE) if len(text) < 60_000]
        bodies = [{"token": text, "hostname": "a"} for text in texts]
        stream = [request_bytes("POST", "/api/agent/enroll", body) for body in bodies]
        codes = {reply.code for reply in live.send(b"".join(stream))}
        assert codes == {"invalid-body", "token-unknown", "too-many-requests"}
        assert live.call("GET", "/api/me", bearer=GENUINE).code == "too-many-requests"
        assert live.call("GET", "/api/me", bearer=live.api_key).status == 200


def test_what_is_not_json_is_refused_over_a_socket_too(live: SocketDoor) -> None:
    """One stream for all of it: none of it ends the connection, or loses where the next begins."""
    bodies = [body for body in NOT_JSON.values() if len(body) <= hostenroll.BODY_MAXIMUM]
    stream = [request_bytes("POST", "/api/agent/enroll", body) for body in bodies]
    said = live.send(b"".join(stream) + HEALTH)
    assert [reply.code for reply in said] == ["invalid-body"] * len(bodies) + [None]


@pytest.mark.parametrize("field", ["hostname", "name", "os", "token"])
def test_no_nasty_character_gets_in_over_a_socket(field: str, live: SocketDoor) -> None:
    bodies = []
    for nasty in UNSHOWABLE.values():
        for ascii_only in (True, False):
            body = {"token": "het_x", "hostname": "a", field: f"x{nasty}y"}
            text = json.dumps(body, ensure_ascii=ascii_only)
            bodies.append(text.encode("utf-8", "surrogatepass"))
    said = live.send(b"".join(request_bytes("POST", "/api/agent/enroll", body) for body in bodies))
    assert [reply.code for reply in said] == ["invalid-body"] * len(bodies)
    for reply in said:
        assert not hostenroll.UNPRINTABLE.search(reply.document["detail"])


def test_what_cannot_be_read_is_answered_once_by_a_server_too(shared: SocketDoor) -> None:
    for name, (data, code) in BAD.items():
        said = shared.send(HEALTH + data + HEALTH)
        assert [reply.code for reply in said] == [None, code], name
        assert said[-1].headers["connection"] == "close"


STRANGE: List[Any] = [
    None, True, -1, 0, 2**63, 10**30, 1e308, 0.5, "", "x" * 300, "\0", "\u202e", "\r\nX: y", "é",
    "../../etc/passwd", "' OR 1=1 --", "%00", "{}", [], {}, [[]], {"a": {"a": 1}}, "0" * 16,
]  # fmt: skip


def strange_request(rng: random.Random, secrets: Dict[str, str], ids: Sequence[str]) -> bytes:
    """A request to some route, right in many things and wrong in others."""
    route = rng.choice(hostenroll.ROUTES)
    method = rng.choice([route.method] * 9 + ["GET", "POST", "HEAD", "OPTIONS", "PUT", "BREW"])
    path = route.path.replace("{id}", rng.choice([*ids, *ids, "%2e%2e", "x" * 40, "%FF"]))
    names = [*route.query.schema()["properties"], "x", "limit", "cursor"]
    texts = [*ids, "1", "-1", "", "a=b", "%00", "%ff", "online", "default", "+", "%E2%80%AE"]
    for n in range(rng.choice([0] * 6 + [1, 2, 80])):
        path += f"{'&' if n else '?'}{rng.choice(names)}={rng.choice(texts)}"
    right = {
        "token": secrets["token"], "hostname": "web-1", "name": "x", "ttlSeconds": 60,
        "maxUses": 1, "labels": {"rack": "b4"}, "organizationId": "default",
    }  # fmt: skip
    fields = list(route.body.schema()["properties"]) if route.body else ["token"]
    body: Any = {
        name: right.get(name, "x") if rng.random() < 0.9 else rng.choice([*STRANGE, *ids])
        for name in (fields if rng.random() < 0.5 else rng.sample(fields, len(fields) // 2))
    }
    headers = [("Idempotency-Key", rng.choice(["k", "", "é", "x" * 200]))] * rng.choice([0, 0, 1])
    body = rng.choice([body] * 6 + [None, [body], b"{", b"\xff", b"[" * 5000])
    bearer = secrets.get("credential" if route.caller == "credential" else "key")
    if rng.random() < 0.3:
        bearer = rng.choice([*secrets.values(), None, "", "x.y.z", f"{bearer}="])
    return request_bytes(method, path, body, bearer, headers)


def well_formed_answers(data: bytes) -> List[int]:
    """The statuses of a stream of answers, none of them to HEAD: each is held to RFC 9112 and to
    what we promise."""
    statuses = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        line, *fields = head.split(b"\r\n")
        assert end and re.fullmatch(rb"HTTP/1\.1 [1-5][0-9]{2} [A-Za-z -]+", line), line
        assert all(re.fullmatch(rb"[A-Za-z-]+: [\x20-\x7e]+", field) for field in fields), fields
        status = int(line[9:12])
        if status == 100:
            continue
        named = {name.lower(): value for name, _, value in (f.partition(b": ") for f in fields)}
        assert len(named) == len(fields)
        length = int(named.get(b"content-length", b"0"))
        body = data[:length]
        data = data[length:]
        assert b"Traceback" not in body and b'hostenroll.py", line' not in body
        if body and status >= 400:
            assert json.loads(body)["status"] == status
        statuses.append(status)
    return statuses


@slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_whatever_is_sent_is_answered_in_well_formed_http_and_never_by_a_failure(
    seed: int, tmp_path: Path
) -> None:
    """Requests of every route with strange things in them, and some of those spoiled as bytes; on
    a connection each, some of which half-close, go away in the middle, or reset."""
    key = cli(tmp_path, "mint-api-key", "--all-orgs").stdout.strip()
    rng = random.Random(seed)
    spoiled = mutants(seed, 10_000)
    seen: Dict[int, int] = {}
    with ServerProcess(tmp_path) as server:
        door = SocketDoor(server.port, key)
        minted = door.mint(maxUses=1000, ttlSeconds=86400).document
        enrolled = door.enroll(minted["token"]).document
        secrets = {"key": key, "token": minted["token"], "credential": enrolled["credential"]}
        ids = [minted["id"], enrolled["hostId"], "0" * 16]
        for n in range(1000):
            data = strange_request(rng, secrets, ids) if n % 3 else next(spoiled)
            if n % 6 == 1:
                at, nasty = rng.randint(0, len(data)), [b"\0", b"\r", b"\n", b" ", b"\xff", b""]
                data = data[:at] + rng.choice(nasty) + data[at + 1 :]
            with door.connect() as peer:
                peer.sendall(data)
                if n % 10 == 0:  # goes away; with RST, where linger is of no seconds
                    linger = struct.pack("ii", n % 20 == 0, 0)
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    continue
                peer.shutdown(socket.SHUT_WR)
                said = b"".join(iter(lambda: peer.recv(65536), b""))
            if b"HEAD " not in data:
                for status in well_formed_answers(said):
                    seen[status] = seen.get(status, 0) + 1
        assert door.call("GET", "/api/me", bearer=key).status == 200
        assert door.call("GET", "/readyz").status == 200
        assert server.terminate() == 0
    assert not {500, 503} & set(seen)
    assert {200, 201, 204, 400, 401, 404, 405, 501} <= set(seen), seen
    assert not re.search("Traceback|ERROR|failed", "".join(server.said))
    assert cli(tmp_path, "check").returncode == 0


def test_a_flood_of_wrong_secrets_is_told_to_wait_and_keeps_nobody_out(live: SocketDoor) -> None:
    """A flood of them in one stream; and an honest machine behind the same address."""
    token, secret = live.token(), hostenroll.mint_secret("het", 1 << 40).text
    key = hostenroll.mint_secret("hak", 1 << 40).text
    wrong = [
        request_bytes("POST", "/api/agent/enroll", {"token": secret, "hostname": "web-1"}),
        request_bytes("GET", "/api/hosts", bearer=key),
        request_bytes("POST", "/api/hosts/tokens", {}, key),
    ]
    said = live.send(b"".join(wrong) * 100)
    allowed = hostenroll.FAILURES_ALLOWED
    assert [reply.status for reply in said] == [401] * allowed + [429] * (300 - allowed)
    for reply in said[allowed:]:
        assert (reply.code, reply.headers["retry-after"]) == ("too-many-requests", "60")
        assert "www-authenticate" not in reply.headers
    enrolled = live.enroll(token)
    assert enrolled.status == 201
    assert live.beat(enrolled.document["credential"]).status == 200
    assert live.call("GET", "/api/me", bearer=live.api_key).status == 200
    assert live.enroll(token).code == "token-used"
    # A credential is not a secret to be guessed, and who has an old one asks again and again: a
    # fleet whose key was retired must hear that it has to re-enroll.
    assert {live.beat("junk").code for _ in range(50)} == {"credential-invalid"}
    assert live.call("GET", "/api/me").code == "api-key-invalid"  # none at all


HERE = (ipaddress.ip_network("127.0.0.0/8"),)
ELSEWHERE = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("::/0"))


@pytest.mark.parametrize("doors", [live_door, tls_door], ids=["plain", "tls"])
def test_behind_a_trusted_proxy_each_client_has_its_own_address(
    doors: Any, paths: Any, clock: Clock
) -> None:
    """In the audit log, in usedFrom, and where wrong secrets are counted."""
    with doors(paths, clock, proxies=HERE) as live:
        minted = live.mint().document

        def enroll(token: str, client: str) -> bytes:
            named = [("X-Forwarded-For", f"203.0.113.9, {client}")]
            body = {"token": token, "hostname": "web-1"}
            return request_bytes("POST", "/api/agent/enroll", body, headers=named)

        wrong = hostenroll.mint_secret("het", 1 << 40).text
        streams = [enroll(wrong, f"198.51.100.{n % 2}") for n in range(60)]
        said = live.send(b"".join([*streams, enroll(minted["token"], "198.51.100.0")]))
        assert [reply.status for reply in said] == [401] * 40 + [429] * 20 + [201]
        shown = live.call("GET", f"/api/hosts/tokens/{minted['id']}", bearer=live.api_key)
        assert shown.document["usedFrom"] == "198.51.100.0"
        events = walk(live, live.api_key, "/api/audit?limit=1000", "events")
        counted: Dict[str, int] = {}
        for event in events:
            if event["code"] == "token-unknown":
                counted[event["address"]] = counted.get(event["address"], 0) + 1
        assert counted == {"198.51.100.0": 20, "198.51.100.1": 20}
        admitted = next(event for event in events if event["action"] == "enroll")
        assert admitted["address"] == "198.51.100.0"


def test_plain_heartbeats_by_a_proxy_are_those_of_its_clients(paths: Any, clock: Clock) -> None:
    """Also where another's went before on the same connection."""
    with live_door(paths, clock, proxies=HERE) as live:
        first = live.enroll(live.token()).document
        token = live.call("POST", f"/api/hosts/{first['hostId']}/reenroll", {}, live.api_key)
        second = live.enroll(token.document["token"]).document["credential"]

        def beat(credential: str, client: Optional[str]) -> bytes:
            named = [("X-Forwarded-For", client)] if client else []
            return request_bytes("POST", "/api/agent/heartbeat", None, credential, named)

        with live.connect() as peer, peer.makefile("rb") as stream:
            statuses = []
            for data in (
                beat(second, None),
                beat(second, "198.51.100.1"),
                beat(first["credential"], "198.51.100.2"),
                beat(second, None),
                beat(first["credential"], None),
            ):
                peer.sendall(data)
                reply = read_reply(stream)
                statuses.append(reply and reply.status)
        assert statuses == [200, 200, 401, 200, 401]
        events = walk(live, live.api_key, "/api/audit?action=refuse", "events")
        assert [event["address"] for event in events] == ["127.0.0.1", "198.51.100.2"]


def test_nobody_else_is_believed_whom_he_speaks_for(paths: Any, clock: Clock) -> None:
    with live_door(paths, clock, proxies=ELSEWHERE) as live:
        minted = live.mint().document
        for n in range(25):
            named = [("X-Forwarded-For", f"10.1.1.{n}"), ("Forwarded", f"for=10.1.1.{n}")]
            body = {"token": "het_junk", "hostname": "web-1"}
            reply = live.call("POST", "/api/agent/enroll", body, headers=named)
            assert reply.status == (401 if n < 20 else 429)
        body = {"token": minted["token"], "hostname": "web-1"}
        assert live.call("POST", "/api/agent/enroll", body, headers=named).status == 201
        shown = live.call("GET", f"/api/hosts/tokens/{minted['id']}", bearer=live.api_key)
        assert shown.document["usedFrom"] == "127.0.0.1"


def test_a_peer_that_resets_hurts_nobody(live: SocketDoor) -> None:
    token = live.token(maxUses=100, labels={f"k{n}": "x" * 250 for n in range(30)})
    for n in range(40):
        live.enroll(token, f"web-{n}")
    ask = request_bytes("GET", "/api/hosts?limit=1000", bearer=live.api_key)
    for n in range(30):
        peer = live.connect()
        peer.sendall(ask * 20 if n % 2 else ask[: n * 4])
        if n % 6 == 1:
            peer.recv(1000)
        # Linger of no seconds: close() sends RST.
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        peer.close()
        assert live.call("GET", "/readyz").status == 200


def test_while_another_process_writes_beats_wait_and_health_does_not(
    live: SocketDoor, paths: Any
) -> None:
    credential = live.enroll(live.token()).document["credential"]
    with live.connect() as peer, peer.makefile("rb") as stream:
        with write_lock(paths[0]):
            peer.sendall(request_bytes("POST", "/api/agent/heartbeat", bearer=credential) * 3)
            for _ in range(20):
                begun = time.monotonic()
                assert live.call("GET", "/healthz").status == 200
                assert time.monotonic() - begun < 3  # and not the 5 s of the others
            peer.settimeout(0.2)
            with pytest.raises(socket.timeout):
                peer.recv(1)
        peer.settimeout(10)
    with live.connect() as peer, peer.makefile("rb") as stream:
        with write_lock(paths[0]):
            peer.sendall(request_bytes("POST", "/api/agent/heartbeat", bearer=credential) * 3)
            assert live.call("GET", "/healthz").status == 200
        for _ in range(3):
            reply = read_reply(stream)
            assert reply is not None and reply.status == 200


def test_while_another_process_writes_what_only_reads_is_answered(
    live: SocketDoor, paths: Any
) -> None:
    credential = live.enroll(live.token()).document["credential"]
    with live.connect() as peer, peer.makefile("rb") as stream:
        with write_lock(paths[0]):
            peer.sendall(request_bytes("POST", "/api/agent/heartbeat", bearer=credential))
            for _ in range(3):
                assert live.call("GET", "/api/hosts", bearer=live.api_key).status == 200
            assert not select.select([peer], [], [], 0)[0]
        reply = read_reply(stream)
        assert reply is not None and reply.status == 200


@pytest.mark.parametrize("patience", [0.2, pytest.param(hostenroll.LOCK_PATIENCE, marks=slow)])
def test_who_waits_too_long_for_another_process_is_told_to_come_again(
    patience: float, live: SocketDoor, paths: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostenroll, "LOCK_PATIENCE", patience)
    credential = live.enroll(live.token()).document["credential"]
    begun = time.monotonic()
    with write_lock(paths[0]):
        refused = live.beat(credential)
        assert patience - 0.1 < time.monotonic() - begun < patience + 2
        assert (refused.status, refused.code) == (503, "storage-unavailable")
        assert int(refused.headers["retry-after"]) > 0
    assert live.beat(credential).status == 200


# Stopping.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_an_idle_server_stops_at_once_and_without_a_word(number: int, tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server:
        door = SocketDoor(server.port, "")
        with door.connect() as idle, door.connect():
            idle.sendall(HEALTH)
            assert idle.recv(65536)
            server.process.send_signal(number)
            assert idle.recv(1) == b""
        begun = time.monotonic()
        assert server.process.wait(10) == 0
        assert time.monotonic() - begun < 3
        server._wait()
        assert not re.search("Traceback|ERROR|Error", "".join(server.said))


# Another thread gets the signals, so they do not interrupt what the main thread waits in: as if
# they came just before.
LATE = """
import signal, sys, threading, time
import hostenroll
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
sys.exit(hostenroll.main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_that_comes_just_before_the_server_waits_is_heard_at_once(
    number: int, tmp_path: Path
) -> None:
    program = [sys.executable, "-c", LATE]
    env = {"PYTHONPATH": str(Path(hostenroll.__file__).parent)}
    with ServerProcess(tmp_path, program=program, env=env) as server:
        time.sleep(0.2)  # it waits, for the next thing that it has to do: seconds
        server.process.send_signal(number)
        begun = time.monotonic()
        assert server.process.wait(20) == 0
        assert time.monotonic() - begun < 3
        server._wait()


def test_a_server_at_its_limit_stops_like_any_other(paths: Any, clock: Clock) -> None:
    with contextlib.ExitStack() as peers, live_door(paths, clock, connections=1) as live:
        first = peers.enter_context(live.connect())
        first.sendall(b"nonsense\r\n\r\n")
        assert first.recv(65536)  # it lingers now, and there is no room for another
        peers.enter_context(live.connect())


@pytest.mark.parametrize(
    "cut",
    [
        "half of the head",
        *(pytest.param(n, marks=slow) for n in ("the head alone", "half of the body")),
    ],
)
def test_a_request_in_flight_is_answered_before_the_server_stops(cut: str, tmp_path: Path) -> None:
    token = cli(tmp_path, "mint-token").stdout.strip()
    enroll = request_bytes("POST", "/api/agent/enroll", {"token": token, "hostname": "web-1"})
    at = {"half of the head": 20, "half of the body": len(enroll) - 9}
    place = at.get(cut, enroll.index(b"\r\n\r\n") + 4)
    with ServerProcess(tmp_path) as server:
        with SocketDoor(server.port, "").connect() as peer, peer.makefile("rb") as stream:
            peer.sendall(HEALTH + enroll[:place])
            assert read_reply(stream) is not None  # so the rest has been read, too
            begun = time.monotonic()
            server.process.terminate()
            until(lambda: is_refused(server.port))
            peer.sendall(enroll[place:])
            reply = read_reply(stream)
            assert reply is not None and reply.status == 201
            assert reply.headers["connection"] == "close"
        assert server._wait() == 0
        assert time.monotonic() - begun < 5
    assert sql(str(tmp_path / "hostenroll.db"), "SELECT count(*), sum(uses) FROM token, host") == [
        (1, 1)]  # fmt: skip


@slow
def test_a_server_stops_in_time_also_while_another_process_writes(tmp_path: Path) -> None:
    """And however often it is told to."""
    token = cli(tmp_path, "mint-token").stdout.strip()
    with ServerProcess(tmp_path) as server, write_lock(tmp_path / "hostenroll.db"):
        with SocketDoor(server.port, "").connect() as peer:
            body = {"token": token, "hostname": "web-1"}
            peer.sendall(request_bytes("POST", "/api/agent/enroll", body))
            begun = time.monotonic()
            server.process.terminate()
            until(lambda: is_refused(server.port))
            while server.process.poll() is None and time.monotonic() < begun + 12:
                server.process.terminate()
                time.sleep(0.1)
        took = time.monotonic() - begun
        status = server._wait()
    assert "Traceback" not in "".join(server.said)
    assert "Bad file descriptor" not in "".join(server.said)
    assert status == 0 and took < 6


def test_a_restart_changes_nothing_for_a_host(tmp_path: Path) -> None:
    credential, seen = "", ""
    token = cli(tmp_path, "mint-token").stdout.strip()
    for round in range(3):
        with ServerProcess(tmp_path) as server:
            door = SocketDoor(server.port, "")
            credential = credential or door.enroll(token).document["credential"]
            beaten = door.beat(credential)
            assert beaten.status == 200 and beaten.document["lastSeen"] > seen
            seen = beaten.document["lastSeen"]
            assert server.terminate() == 0 if round else server.kill() is None


# Whatever fails, it is all or nothing, and the server lives.


class Plan:
    """Which call of a kind goes wrong, once: the n-th; or all of them, by the number 0. It raises
    an error, or moves so few bytes."""

    def __init__(self) -> None:
        self.call, self.what, self.n = "", None, 0
        self.count, self.has_failed = 0, False

    def arm(self, call: str, what: Any, n: int) -> None:
        self.call, self.what, self.n, self.count, self.has_failed = call, what, n, 0, False

    def meet(self, call: str) -> Optional[int]:
        """How many bytes this call moves, where it is not its own affair."""
        if call != self.call or self.has_failed:
            return None
        self.count += 1
        self.has_failed = self.count == self.n
        if self.has_failed and isinstance(self.what, BaseException):
            raise self.what
        return self.what if self.has_failed or self.n == 0 else None


class Spoilt:
    """A real socket, and those that it accepts: now and then a call goes as the plan says."""

    def __init__(self, real: Any, plan: Plan) -> None:
        self.real, self.plan = real, plan

    def accept(self) -> Tuple[Any, Any]:
        self.plan.meet("accept")
        peer, address = self.real.accept()
        return Spoilt(peer, self.plan), address

    def recv(self, size: int) -> bytes:
        most = self.plan.meet("recv")
        return bytes(self.real.recv(size if most is None else most))

    def send(self, data: Any) -> int:
        most = self.plan.meet("send")
        return int(self.real.send(data if most is None else data[:most]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class Client:
    """An agent and an operator in one, who ask again when an answer does not come."""

    def __init__(self, door: SocketDoor) -> None:
        self.door = door
        self.lost = self.refused = 0  # answers that did not come; 503s
        self.peer: Any = None

    def ask(self, *requests: bytes) -> List[Reply]:
        for _ in range(4):
            replies = self._once(requests)
            if any(reply.status == 503 for reply in replies):
                self.refused += 1
            elif len(replies) == len(requests):
                return replies
            else:
                self.lost += 1
        raise AssertionError("it is never answered")

    def _once(self, requests: Sequence[bytes]) -> List[Reply]:
        """The answers until one is missing, each of them whole."""
        replies: List[Reply] = []
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            if self.peer is None:
                self.peer = self.door.connect()
                self.stream = self.peer.makefile("rb")
            self.peer.sendall(b"".join(requests))
            for _ in requests:
                reply = read_reply(self.stream)
                if reply is None:
                    break
                replies.append(reply)
        if len(replies) < len(requests) or replies[-1].headers.get("connection") == "close":
            self.leave()
        return replies

    def leave(self) -> None:
        if self.peer is not None:
            self.stream.close()
            self.peer.close()
            self.peer = None

    def live(self, name: str) -> None:
        """A short life. What has been acknowledged is so; what has not may be asked for again."""
        key = self.door.api_key
        [minted] = self.ask(request_bytes("POST", "/api/hosts/tokens", {}, key))
        token = minted.document
        body = {"token": token["token"], "hostname": name}
        again = [("Idempotency-Key", name)]
        [enrolled] = self.ask(request_bytes("POST", "/api/agent/enroll", body, headers=again))
        host, credential = enrolled.document["hostId"], enrolled.document["credential"]
        beat = request_bytes("POST", "/api/agent/heartbeat", bearer=credential)
        self.leave()
        beaten, health, other = self.ask(beat, HEALTH, beat)
        assert (beaten.status, health.status, other.status) == (200, 200, 200)
        facts = {"os": name}
        [told] = self.ask(request_bytes("POST", "/api/agent/heartbeat", facts, credential))
        one = f"/api/hosts/{host}"
        for act, code, status in (
            ("revoke", "host-revoked", "revoked"),
            ("restore", None, "online"),
        ):
            [shown] = self.ask(request_bytes("POST", f"{one}/{act}", bearer=key))
            [judged] = self.ask(beat)
            assert (shown.document["status"], judged.code) == (status, code)
        [known] = self.ask(request_bytes("GET", one, bearer=key, headers=[("Connection", "close")]))
        [used] = self.ask(request_bytes("GET", f"/api/hosts/tokens/{token['id']}", bearer=key))
        self.leave()
        assert known.document["os"] == name and known.document["revokedAt"] is None
        assert (
            known.document["lastSeen"] == told.document["lastSeen"] == judged.document["lastSeen"]
        )
        assert (used.document["uses"], used.document["hosts"]) == (1, [host])


def goes_on(door: SocketDoor, clock: Clock, n: int) -> Client:
    """A life with whatever fails in it."""
    clock.advance(1)
    client = Client(door)
    client.live(f"web-{n}")
    return client


RESET = ConnectionResetError(104, "Connection reset by peer")
NOTHING = BlockingIOError(11, "Resource temporarily unavailable")
INTERRUPTED = InterruptedError(4, "Interrupted system call")
FAULTS: Dict[str, Tuple[str, Any, int]] = {  # and how many connections each may cost
    "a recv is reset": ("recv", RESET, 1),
    "a recv brings one byte": ("recv", 1, 0),
    "a send is reset": ("send", RESET, 1),
    "a send takes one byte": ("send", 1, 0),
    "an accept finds no descriptor": ("accept", OSError(24, "Too many open files"), 0),
}
MORE_FAULTS: Dict[str, Tuple[str, Any, int]] = {
    "a recv finds nothing": ("recv", NOTHING, 0),
    "a recv is interrupted": ("recv", INTERRUPTED, 0),
    "a recv finds the end": ("recv", 0, 1),
    "a recv has timed out": ("recv", TimeoutError(110, "Connection timed out"), 1),
    "a recv finds no memory": ("recv", OSError(12, "Cannot allocate memory"), 1),
    "a send finds no room": ("send", NOTHING, 0),
    "a send is interrupted": ("send", INTERRUPTED, 0),
    "a send has nobody to go to": ("send", BrokenPipeError(32, "Broken pipe"), 1),
    "a send finds no buffers": ("send", OSError(105, "No buffer space available"), 1),
    "an accept finds nobody": ("accept", NOTHING, 0),
    "an accept is interrupted": ("accept", INTERRUPTED, 0),
    "an accept finds one who has left": ("accept", ConnectionAbortedError(103, "gone"), 0),
    "an accept finds no buffers": ("accept", OSError(105, "No buffer space available"), 0),
    "an accept finds the table full": ("accept", OSError(23, "Too many open files"), 0),
}
SPOILT_CALLS = [
    *(pytest.param("plain", *row, id=name) for name, row in FAULTS.items()),
    *(pytest.param("plain", *row, id=name, marks=slow) for name, row in MORE_FAULTS.items()),
    *(
        pytest.param("tls", *row, id=f"{name}, through TLS", marks=slow)
        for name, row in {**FAULTS, **MORE_FAULTS}.items()
    ),
]


@contextlib.contextmanager
def spoilt_door(paths: Any, clock: Clock, plan: Plan, door: Any) -> Iterator[SocketDoor]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        with door(paths, clock, listener=Spoilt(listener, plan)) as live:
            yield live


@pytest.mark.parametrize("through, call, what, costs", SPOILT_CALLS)
def test_whichever_call_on_a_socket_fails_the_server_lives_and_nothing_is_lost(
    through: str, call: str, what: Any, costs: int, paths: Any, clock: Clock
) -> None:
    plan, doors = Plan(), {"plain": live_door, "tls": tls_door}
    with spoilt_door(paths, clock, plan, doors[through]) as door:
        for n in itertools.count(1):
            plan.arm(call, what, n)
            client = goes_on(door, clock, n)
            assert client.lost <= costs and client.refused == 0
            if not plan.has_failed:
                break
        assert n > {"accept": 2, "recv": 9, "send": 9}[call]
    assert sql(paths[0], "SELECT count(*), sum(os = hostname) FROM host") == [(n, n)]
    assert sql(paths[0], "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("call", ["recv", "send"])
def test_a_byte_at_a_time_is_as_good_as_all_at_once(call: str, paths: Any, clock: Clock) -> None:
    plan = Plan()
    with spoilt_door(paths, clock, plan, live_door) as door:
        plan.arm(call, 1, 0)
        client = goes_on(door, clock, 1)
        assert (client.lost, client.refused) == (0, 0) and plan.count > 2000


@slow
@pytest.mark.parametrize("how", ["before", "after", "full, and rolled back", "busy"])
def test_whichever_statement_of_a_server_fails_nothing_acknowledged_is_lost(
    how: str, paths: Any, clock: Clock
) -> None:
    with LiveServer(paths, clock, credential_ttl=1000) as live:
        registry = live.server._api._registry
        with opened(paths, clock) as beside:
            door = SocketDoor(live.port, make_api_key(beside, clock))
        goes_on(door, clock, 0)
        for n in itertools.count(1):
            with faulty(registry, n=n, **FAILURES[how]) as connection:
                client = goes_on(door, clock, n)
            assert client.lost == 0 and client.refused <= 1
            if not connection.failed:
                break
    assert n > 40
    rows = sql(paths[0], "SELECT count(*), sum(os = hostname), sum(admitted_serial) FROM host")
    assert rows[0][:2] == (n + 1, n + 1)
    with opened(paths, clock) as registry:
        assert do(registry, clock, lambda now: registry.verify_audit(None), False)


# Races and crashes.


def api_key_of(folder: Path) -> str:
    return cli(folder, "mint-api-key", "--all-orgs").stdout.strip()


def test_two_servers_let_in_exactly_as_many_as_a_token_says(tmp_path: Path) -> None:
    key = api_key_of(tmp_path)
    with ServerProcess(tmp_path) as one, ServerProcess(tmp_path) as other:
        doors = [SocketDoor(server.port, key) for server in (one, other)]
        for uses in (1, 5) * 6:
            token = doors[0].token(maxUses=uses)

            def rush(n: int, token: str = token) -> Reply:
                return doors[n % 2].enroll(token, f"web-{n}")

            said = many(16, rush)
            assert sorted(reply.code or "" for reply in said) == [""] * uses + ["token-used"] * (
                16 - uses
            )
            assert {reply.status for reply in said} == {201, 401}
    database = str(tmp_path / "hostenroll.db")
    assert sql(database, "SELECT count(*) FROM host") == [(6 * (1 + 5),)]


# Compiled once, so that a server is there in no time; and its clock is set by a file, in seconds.
QUICK = """
import os, sys, time
sys.dont_write_bytecode = False
sys.path.insert(0, sys.argv.pop(1))
offset = sys.argv.pop(1)
import hostenroll
def clock():
    return time.time() + (os.path.exists(offset) and float(open(offset).read() or 0))
sys.exit(hostenroll.main(clock=clock if offset else time.time))
"""


PYCACHE = tempfile.TemporaryDirectory()


def quick_server(folder: Path, offset: str = "") -> OtherServer:
    cached = f"pycache_prefix={PYCACHE.name}"
    command = [sys.executable, "-X", cached, "-c", QUICK, str(ROOT), offset]
    return OtherServer(folder, *command, "serve", "--port", "0")


class Ledger:
    """What servers have acknowledged, and which enrollments nobody has answered yet."""

    def __init__(self) -> None:
        self.open: List[str] = []  # tokens, each with an enrollment to be tried, or tried again
        self.hosts: Dict[str, Dict[str, Any]] = {}  # by token
        self.beats: Dict[str, str] = {}  # lastSeen, by host
        self.revoked: List[str] = []  # tokens
        self.minted: List[str] = []

    def load(self, port: int, key: str, dice: random.Random) -> None:
        """What some clients do until the server is gone."""
        with contextlib.suppress(OSError), SocketDoor(port, key).connect() as peer:
            with peer.makefile("rb") as stream:

                def call(*request: Any) -> Reply:
                    peer.sendall(request_bytes(*request))
                    reply = read_reply(stream)
                    if reply is None or reply.status >= 500:
                        raise ConnectionError
                    return reply

                while True:
                    with contextlib.suppress(IndexError):
                        self._enroll(call, self.open.pop(0))
                    self._beat(call, dice)
                    if dice.random() < 0.2:
                        minted = call("POST", "/api/hosts/tokens", {}, key).document
                        self.minted.append(minted["id"])
                    if self.minted and dice.random() < 0.1:
                        number = self.minted[-1]
                        assert (
                            call("DELETE", f"/api/hosts/tokens/{number}", None, key).status == 204
                        )
                        self.revoked.append(number)

    def _enroll(self, call: Callable[..., Reply], token: str) -> None:
        body = {"token": token, "hostname": "web-1"}
        try:
            headers = [("Idempotency-Key", token[4:20])]
            reply = call("POST", "/api/agent/enroll", body, None, headers)
        except (OSError, AssertionError):  # perhaps it is done: it is asked for again
            self.open.append(token)
            raise ConnectionError from None
        assert reply.status == 201, reply
        self.hosts[token] = reply.document

    def _beat(self, call: Callable[..., Reply], dice: random.Random) -> None:
        if self.hosts:
            host = dice.choice(list(self.hosts.values()))
            reply = call("POST", "/api/agent/heartbeat", None, host["credential"])
            assert reply.status == 200, reply
            seen = self.beats.get(host["hostId"], "")
            self.beats[host["hostId"]] = max(seen, reply.document["lastSeen"])

    def check(self, paths: Tuple[str, str]) -> None:
        """Nothing that was acknowledged is missing, and no token has let in two."""
        clock = Clock(time.time())
        with opened(paths, clock) as registry:
            assert look(registry, "PRAGMA integrity_check") == [("ok",)]
            assert look(registry, "PRAGMA foreign_key_check") == []
            do(registry, clock, lambda now: registry.verify_audit(None), False)
            rows = look(
                registry, "SELECT id, token_id, last_seen FROM host JOIN heartbeat ON host_id = id"
            )
            tokens = look(registry, "SELECT id, uses, revoked_at IS NOT NULL FROM token")
        stored = {f"{number:016x}": (f"{token:016x}", seen) for number, token, seen in rows}
        used = {f"{number:016x}": uses for number, uses, _ in tokens if uses}
        assert sorted(used) == sorted(
            token for token, _ in stored.values()
        )  # so none of them twice
        assert set(used.values()) <= {1}
        for text, host in self.hosts.items():
            assert stored[host["hostId"]][0] == text.split("_")[1]
        for number, seen in self.beats.items():
            assert hostenroll.rfc3339(stored[number][1]) >= seen
        assert set(self.minted) <= {f"{number:016x}" for number, _, _ in tokens}
        assert set(self.revoked) <= {f"{number:016x}" for number, _, gone in tokens if gone}


@pytest.mark.parametrize("cycles", [2, pytest.param(100, marks=slow)])
def test_after_kill_nine_nothing_acknowledged_is_missing(cycles: int, tmp_path: Path) -> None:
    """At any moment, under load: in every third cycle two servers share the database, in every
    fifth the command line is at work, too. Whoever got no answer asks again, in the next one."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"random.Random({seed})")
    dice = random.Random(seed)
    paths, clock = (str(tmp_path / "hostenroll.db"), str(tmp_path / "hostenroll.key")), Clock()
    ledger, key = Ledger(), api_key_of(tmp_path)
    for cycle in range(cycles):
        clock.now = time.time()
        with opened(paths, clock) as registry:
            order = hostenroll.TokenOrder()
            mint = Act(lambda now: registry.mint(OPERATOR, order, now))
            outcomes = registry.tick([mint] * 30, clock.ms)
            assert outcomes is not None
            ledger.open += [text for _, text in outcomes]
        with contextlib.ExitStack() as stack:
            count = 2 if cycle % 3 == 2 else 1
            servers = [stack.enter_context(quick_server(tmp_path)) for _ in range(count)]
            dies_at = time.monotonic() + dice.random() ** 2 * 0.4
            ports = [server.port for server in servers for _ in range(4 // count)]
            rolls = [random.Random(dice.random()) for _ in ports]
            loads = [
                threading.Thread(target=ledger.load, args=(port, key, roll), daemon=True)
                for port, roll in zip(ports, rolls)
            ]
            for load in loads:
                load.start()
            if cycle % 5 == 1:
                minted = cli(tmp_path, "mint-token", "--json")
                assert minted.returncode == 0
                ledger.minted.append(json.loads(minted.stdout)["id"])
            time.sleep(max(0, dies_at - time.monotonic()))
            for server in servers:
                server.process.kill()
            for load in loads:
                load.join(20)
        ledger.check(paths)
    assert len(ledger.hosts) > 5 * cycles and len(ledger.beats) > cycles
    assert ledger.minted and ledger.revoked


@slow
def test_beats_and_commands_do_not_starve_each_other(tmp_path: Path) -> None:
    key = api_key_of(tmp_path)
    with ServerProcess(tmp_path) as server:
        door = SocketDoor(server.port, key)
        credential = door.enroll(door.token()).document["credential"]
        beat = request_bytes("POST", "/api/agent/heartbeat", bearer=credential)
        done, slowest, commands = threading.Event(), [], []

        def work(n: int) -> None:
            if n == 0:
                for command in ("mint-token", "list-hosts", "mint-token", "list-tokens"):
                    begun = time.monotonic()
                    commands.append(cli(tmp_path, command).returncode)
                    slowest.append(time.monotonic() - begun)
                done.set()
                return
            with door.connect() as peer, peer.makefile("rb") as stream:
                while not done.is_set():
                    begun = time.monotonic()
                    peer.sendall(beat)
                    reply = read_reply(stream)
                    assert reply is not None and reply.status == 200
                    slowest.append(time.monotonic() - begun)

        many(5, work)
        assert (commands, server.terminate()) == ([0] * 4, 0)
    assert len(slowest) > 100 and max(slowest) < 4  # to starve is to wait for 5 s


@slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_host_is_on_the_disk_before_it_is_told_so(tmp_path: Path) -> None:
    token = cli(tmp_path, "mint-token").stdout.strip()
    trace = tmp_path / "trace"
    calls = "trace=pwrite64,fsync,fdatasync,recvfrom,sendto"
    strace = ["strace", "-f", "-y", "-s", "64", "-e", calls]
    tried = subprocess.run([*strace, "true"], capture_output=True)
    if tried.returncode:
        pytest.skip("strace may not trace here")
    command = [*strace, "-o", str(trace), *SCRIPT, "serve", "--port", "0"]
    with OtherServer(tmp_path, *command) as server:
        door = SocketDoor(server.port, "")
        enrolled = door.enroll(token)
        assert enrolled.status == 201
        assert door.beat(enrolled.document["credential"]).status == 200
        number = int(trace.read_text().split()[0])
        os.kill(number, signal.SIGTERM)
        server._wait()
    told = trace.read_text().split("\n")
    (asked,) = [n for n, line in enumerate(told) if "POST /api/agent/enroll" in line]
    (answered,) = [n for n, line in enumerate(told) if "HTTP/1.1 201" in line]
    meanwhile = [line for line in told[asked:answered] if "hostenroll.db-wal>" in line]
    done = [re.sub(r"^\d+ +(\w+)\(.* = (\d+)$", r"\1 \2", line) for line in meanwhile]
    assert len(done) > 2 and done[-1] in ("fdatasync 0", "fsync 0")
    assert {line.split()[0] for line in done[:-1]} == {"pwrite64"}  # nothing is written after it


BEATS = """
import sys, random, hostenroll
hostenroll.CHECKPOINT_AFTER, hostenroll.CHECKPOINT_REST = 64, 20
registry = hostenroll.open_registry("hostenroll.db", "hostenroll.key", 1)
connection, kid = registry._store._connection, registry.keyring.first.kid
standing = hostenroll.Standing(1, "default", kid)
for now in range(2, 400):
    numbers = random.sample(range(1, 2001), 16)
    registry.tick([(number << 8, standing) for number in numbers], now)
    registry.tidy()
registry.close()
"""


@slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_the_disk_has_what_a_checkpoint_relies_on(
    paths: Tuple[str, str], clock: Clock, tmp_path: Path
) -> None:
    """The WAL before a page of it is moved; the database, all of it, before the WAL begins anew."""
    with opened(paths, clock) as registry:
        fill(registry, 2000)
    trace = tmp_path / "trace"
    strace = ["strace", "-f", "-y", "-e", "trace=pwrite64,fdatasync,fsync", "-o", str(trace)]
    environment = {**os.environ, "PYTHONPATH": str(Path(hostenroll.__file__).parent)}
    done = subprocess.run(
        [*strace, sys.executable, "-c", BEATS], cwd=tmp_path, env=environment, capture_output=True
    )
    if b"ptrace" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    call = re.compile(r"(\d+) +(\w+)\(\d+<[^>]*hostenroll\.db(-wal)?>(?:.*, (\d+)\) +=)?")
    calls = [found.groups() for found in map(call.match, trace.read_text().splitlines()) if found]
    us = calls[0][0]
    last, unsynced, anew, flushed = "", 0, 0, 0
    for thread, name, wal, offset in calls:
        if thread != us:  # nothing depends on it
            assert (name, wal) == ("fdatasync", None)
            flushed += 1
        elif name == "pwrite64" and wal is None:
            assert last in ("wal synced", "moved")
            last, unsynced = "moved", unsynced + 1
        elif name == "pwrite64":
            if offset == "0":
                assert unsynced == 0
                anew += 1
            last = "wal written"
        else:
            last = "wal synced" if wal else "database synced"
            unsynced = unsynced if wal else 0
    assert flushed > 10 and anew > 5


# When things fail: each row of the README's table, with real processes.


def failures_in_readme() -> Dict[str, str]:
    """What the log says, by failure."""
    section = README.split("## When things fail")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ")]
    return {row[1].strip(): row[2].strip() for row in rows[1:]}


def is_told(failure: str, said: Sequence[str], times: int = 1, others: int = 0) -> None:
    """A failure is told in one line, as the README says, and nothing else is."""
    (words,) = re.findall("`(.+)`", failures_in_readme()[failure])
    pattern = ".*".join(map(re.escape, words.split("...")))
    complaints = [line for line in said if re.search(" (ERROR|WARNING) |^hostenroll: ", line)]
    assert len([line for line in complaints if re.search(pattern, line)]) == times, said
    assert len(complaints) == times + others, complaints
    assert "Traceback" not in "".join(said)


def test_every_failure_in_the_readme_is_made_here() -> None:
    made = re.findall(r'is_told\(\s*"([^"]+)"', Path(__file__).read_text(encoding="utf-8"))
    assert set(made) == set(failures_in_readme())


class Subject:
    """A real server with a host, and what its clients get."""

    def __init__(self, folder: Path, offset: str = "") -> None:
        self.folder, self.database = folder, str(folder / "hostenroll.db")
        key = api_key_of(folder)
        self.server = quick_server(folder, offset)
        self.door = SocketDoor(self.server.port, key)
        self.host = enrolled(self.door)
        self.token = self.door.token()
        assert self.answers() == [200] * 5

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.__exit__()

    def answers(self) -> List[int]:
        """To a beat, a beat with facts, what cannot be cached, a read, and readiness; and health
        is always good. What is not, may pass, and says when to come again."""
        door, credential = self.door, self.host["credential"]
        replies = [
            door.beat(credential),
            door.beat(credential, os=f"linux {random.random()}"),
            door.call("PATCH", f"/api/hosts/{self.host['hostId']}", {"name": "x"}, door.api_key),
            door.call("GET", "/api/hosts", bearer=door.api_key),
            door.call("GET", "/readyz"),
        ]
        assert door.call("GET", "/healthz").status == 200
        for reply in replies:
            assert reply.status == 200 or int(reply.headers["retry-after"]) > 0
            assert reply.code in (None, "storage-unavailable", "overloaded")
        return [reply.status for reply in replies]

    def goes_on(self) -> None:
        """All is well again, and the token that was refused meanwhile has not been used up."""
        until(lambda: self.answers() == [200] * 5)
        assert self.door.enroll(self.token, "web-2").status == 201
        self.token = self.door.token()

    def stop(self) -> List[str]:
        """Everything is in order; what the server has said."""
        assert self.server.terminate() == 0
        checked = cli(self.folder, "check")
        assert checked.returncode == 0, checked
        return self.server.said


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_up(path: Path) -> None:
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        for size in (65536, 512):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)


@slow
def test_on_a_full_disk_nothing_is_lost_and_what_only_reads_goes_on(disk: Path) -> None:
    with Subject(disk) as subject:
        fill_up(disk / "rest")
        while subject.door.mint(description="x" * 900).status == 201:
            pass  # into what the WAL has left
        while subject.door.beat(subject.host["credential"]).status == 200:
            pass
        for _ in range(3):
            assert subject.answers() == [503, 503, 503, 200, 503]
            assert subject.door.enroll(subject.token, "web-2").code == "storage-unavailable"
        refused = cli(disk, "mint-token")
        assert (refused.returncode, refused.stdout) == (1, "")
        is_told("disk full", refused.stderr.splitlines())
        os.unlink(disk / "rest")
        subject.goes_on()
        is_told("disk full", subject.stop())


@slow
def test_on_a_read_only_disk_nothing_starts_and_one_line_says_why(disk: Path) -> None:
    Subject(disk).stop()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for command in (["serve", "--port", "0"], ["mint-token"], ["check"]):
        refused = cli(disk, *command)
        assert (refused.returncode, refused.stdout) == (1, "")
        is_told("disk read-only at start", refused.stderr.splitlines())
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert cli(disk, "mint-token").returncode == 0


@contextlib.contextmanager
def injected(process: int, calls: str, error: str) -> Iterator[None]:
    """System calls of a process fail, as on a disk that is failing."""
    options = ["-e", f"trace={calls}", "-e", f"inject={calls}:error={error}", "-o", os.devnull]
    command = ["strace", *options, "-p", str(process)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        first = tracer.stderr.readline()
        if "attached" not in first:
            pytest.skip(f"strace may not trace here: {first}")
        try:
            yield
        finally:
            tracer.terminate()


needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
DISK_FAULTS = {
    "it is read-only now": ("pwrite64", "EROFS"),
    "it cannot be written": ("pwrite64", "EIO"),
    "it does not keep what is written": ("fdatasync,fsync", "EIO"),
}


@slow
@needs_strace
@pytest.mark.parametrize("calls, error", table(DISK_FAULTS))
def test_a_disk_that_fails_for_a_while_loses_nothing(
    calls: str, error: str, tmp_path: Path
) -> None:
    with Subject(tmp_path) as subject:
        with injected(subject.server.process.pid, calls, error):
            for _ in range(3):
                heard = subject.answers()
                assert heard in ([503, 503, 503, 200, 503], [200, 503, 503, 200, 200])
                assert subject.door.enroll(subject.token, "web-2").code == "storage-unavailable"
        subject.goes_on()
        is_told("disk failing, or read-only now", subject.stop())


@slow
@pytest.mark.parametrize("foreign", [False, True], ids=["one of ours", "another program"])
def test_while_another_has_the_database_locked_beats_wait_and_then_are_told(
    foreign: bool, tmp_path: Path
) -> None:
    with Subject(tmp_path) as subject:
        other = sqlite3.connect(subject.database, isolation_level=None)
        with contextlib.ExitStack() as stack:
            if foreign:
                other.execute("BEGIN IMMEDIATE")
            else:
                stack.enter_context(write_lock(subject.database))
            begun = time.monotonic()
            said = many(3, lambda n: subject.door.beat(subject.host["credential"]))
            assert {reply.code for reply in said} == {"storage-unavailable"}
            assert {reply.headers["retry-after"] for reply in said} == {"5"}
            assert 4.5 < time.monotonic() - begun < 9
            assert subject.door.call("GET", "/healthz").status == 200
            assert subject.door.call("GET", "/api/hosts", bearer=subject.door.api_key).status == 200
        other.close()
        subject.goes_on()
        said = subject.stop()
        if foreign:
            is_told("locked by another program", said)
        else:
            is_told("locked by a process of ours", said)


def garble(path: str, start: int) -> None:
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(random.Random(start).randbytes(os.stat(path).st_size - start))


DAMAGES = {
    "garbage in its pages": (lambda path: garble(path, 4096), "damaged"),
    "cut short": (lambda path: os.truncate(path, 3 * 4096), "damaged"),
    "garbage in its header": (lambda path: garble(path, 0), "not a database"),
    "something else": (lambda path: Path(path).write_text("hello" * 9999), "not a database"),
}


@slow
@pytest.mark.parametrize("damage, failure", table(DAMAGES))
def test_a_damaged_database_starts_nothing(
    damage: Callable[[str], Any], failure: str, tmp_path: Path
) -> None:
    subject = Subject(tmp_path)
    subject.stop()
    damage(subject.database)
    for command in (["serve", "--port", "0"], ["mint-token"], ["check"]):
        refused = cli(tmp_path, *command)
        assert (refused.returncode, refused.stdout) == (1, "")
        if failure == "damaged":
            is_told("database damaged", refused.stderr.splitlines())
        else:
            is_told("not a database any more", refused.stderr.splitlines())


@slow
def test_a_database_that_is_damaged_under_a_server_is_unavailable_until_a_backup_is_there(
    tmp_path: Path,
) -> None:
    """A page that has been read is kept, so a beat may go on; what meets the damage may not."""
    clock = Clock(time.time())
    with opened((str(tmp_path / "hostenroll.db"), str(tmp_path / "hostenroll.key")), clock) as it:
        fill(it, 3000)
    with Subject(tmp_path) as subject:
        assert cli(tmp_path, "backup", "backup").returncode == 0
        with contextlib.closing(sqlite3.connect(subject.database)) as other:
            (first,) = other.execute("SELECT min(id) FROM host").fetchone()
        subject.server.kill()
        subject.server = quick_server(tmp_path)
        subject.door.port = subject.server.port
        garble(subject.database, 8 * 4096)
        query = f"/api/hosts/{first:016x}"
        for _ in range(3):
            refused = subject.door.call("GET", query, bearer=subject.door.api_key)
            assert (refused.status, refused.code) == (503, "storage-unavailable")
        shutil.copy(tmp_path / "backup" / "hostenroll.db", tmp_path / "good")
        os.replace(tmp_path / "good", subject.database)
        subject.goes_on()
        assert subject.door.call("GET", query, bearer=subject.door.api_key).status == 200
        is_told("database damaged", subject.stop(), others=2)


@slow
@pytest.mark.parametrize("damage", ["cut short", "garbage at its end"])
def test_of_a_torn_wal_what_came_before_is_there(damage: str, tmp_path: Path) -> None:
    """As after a power cut: SQLite takes the WAL up to the last commit that is whole."""
    with Subject(tmp_path) as subject:
        before = os.stat(f"{subject.database}-wal").st_size
        assert subject.door.enroll(subject.token, "web-2").status == 201
        subject.server.kill()
        if damage == "cut short":
            os.truncate(f"{subject.database}-wal", before + 1000)
        else:
            garble(f"{subject.database}-wal", before + 1000)
        subject.server = quick_server(tmp_path)
        subject.door.port = subject.server.port
        subject.goes_on()
        subject.stop()


@slow
@pytest.mark.parametrize("count", [1, 2], ids=["one server", "two servers"])
def test_a_database_that_is_gone_for_a_while_is_missed_and_not_mourned(
    count: int, tmp_path: Path
) -> None:
    with Subject(tmp_path) as subject, contextlib.ExitStack() as stack:
        if count == 2:
            stack.enter_context(quick_server(tmp_path))
        os.rename(subject.database, tmp_path / "away")
        for _ in range(3):
            assert subject.answers() == [503] * 5
            assert subject.door.enroll(subject.token, "web-2").code == "storage-unavailable"
        refused = cli(tmp_path, "mint-token")
        assert refused.returncode == 1 and "restore the database" in refused.stderr
        os.rename(tmp_path / "away", subject.database)
        subject.goes_on()
        is_told("database gone", subject.stop())


@slow
@pytest.mark.parametrize("way", ["by README", "the WAL forgotten", "two servers"])
def test_a_backup_that_is_put_in_place_under_a_server_is_gone_on_with(
    way: str, tmp_path: Path
) -> None:
    with Subject(tmp_path) as subject, contextlib.ExitStack() as stack:
        servers = [subject.server]
        if way == "two servers":
            servers.append(stack.enter_context(quick_server(tmp_path)))
        assert cli(tmp_path, "backup", "backup").returncode == 0
        late = subject.door.enroll(subject.token, "late").document
        for server in servers:
            assert SocketDoor(server.port, "").beat(late["credential"]).status == 200
        os.link(subject.database, tmp_path / "old.db")
        if way == "by README":
            for suffix in ("-wal", "-shm"):
                os.unlink(subject.database + suffix)
        shutil.copy(tmp_path / "backup" / "hostenroll.db", tmp_path / "new.db")
        os.replace(tmp_path / "new.db", subject.database)
        for server in servers:
            door = SocketDoor(server.port, subject.door.api_key)
            said = door.beat(late["credential"])
            assert (said.status, said.code) == (503, "storage-unavailable")
            until(lambda door=door: door.call("GET", "/readyz").status == 200)
            assert door.beat(subject.host["credential"]).status == 200
            assert door.beat(late["credential"]).code == "host-unknown"
        assert subject.door.enroll(subject.token, "again").status == 201  # the backup's is unused
        subject.token = subject.door.token()
        subject.goes_on()
        for server in servers[1:]:
            assert server.terminate() == 0
            is_told("database replaced", server.said, others=1)
        is_told("database replaced", subject.stop(), others=1)
    # The old one has all that was ever acknowledged: its WAL was not taken for the new one's.
    assert sql(str(tmp_path / "old.db"), "PRAGMA integrity_check") == [("ok",)]
    assert sql(str(tmp_path / "old.db"), "SELECT hostname FROM host ORDER BY id") == [
        ("web-1",), ("late",)]  # fmt: skip
    assert sql(subject.database, "PRAGMA integrity_check") == [("ok",)]


STRANGERS = {
    "another's": ("is not that of the database", lambda path: api_key_of(path.parent)),
    "an empty file": ("is empty: restore it", lambda path: path.touch()),
    "no database": ("file is not a database", lambda path: path.write_bytes(b"hello" * 999)),
}


@slow
@pytest.mark.parametrize("words, make", table(STRANGERS))
def test_what_is_no_pair_with_the_key_file_is_not_worked_with(
    words: str, make: Callable[[Path], Any], tmp_path: Path
) -> None:
    strange = tmp_path / "elsewhere" / "hostenroll.db"
    strange.parent.mkdir()
    make(strange)
    with Subject(tmp_path) as subject:
        os.rename(subject.database, tmp_path / "away")
        shutil.copy(strange, tmp_path / "new")
        before = (tmp_path / "new").read_bytes()
        os.replace(tmp_path / "new", subject.database)
        for _ in range(3):
            assert subject.answers() == [503] * 5
            assert subject.door.enroll(subject.token, "web-2").code == "storage-unavailable"
        assert Path(subject.database).read_bytes() == before
        os.replace(tmp_path / "away", subject.database)
        subject.goes_on()
        said = subject.stop()
        is_kept = words.startswith("is empty")  # the old one: nothing has to be opened for it
        is_told("database replaced", said, others=1 if is_kept else 2)
        assert len([line for line in said if words in line]) == 1


@slow
def test_what_a_removed_wal_held_is_in_the_database_when_the_server_has_stopped(
    tmp_path: Path,
) -> None:
    with Subject(tmp_path) as subject:
        os.unlink(f"{subject.database}-wal")
        for _ in range(3):
            assert subject.answers() == [200, 503, 503, 200, 503]
            assert subject.door.enroll(subject.token, "web-2").code == "storage-unavailable"
        is_told("its WAL removed", subject.stop())
        subject.server = quick_server(tmp_path)
        subject.door.port = subject.server.port
        subject.goes_on()


@slow
def test_lock_files_that_are_removed_are_made_anew(tmp_path: Path) -> None:
    with Subject(tmp_path) as subject:
        for suffix in (".gate", ".lock"):
            os.unlink(subject.database + suffix)
        subject.door.mint()
        subject.goes_on()
        with write_lock(subject.database):
            held = threading.Thread(target=subject.door.mint, daemon=True)
            held.start()
            held.join(0.3)
            assert held.is_alive()
        held.join(10)
        is_told("its lock removed", subject.stop(), others=1)


@slow
@pytest.mark.parametrize("way", ["missing", "too open"])
def test_without_a_good_key_file_a_server_goes_on_and_none_starts(way: str, tmp_path: Path) -> None:
    key_file = tmp_path / "hostenroll.key"
    with Subject(tmp_path) as subject:
        if way == "missing":
            os.rename(key_file, tmp_path / "away")
        else:
            key_file.chmod(0o644)
        for _ in range(3):
            assert subject.answers() == [200, 200, 200, 200, 503]
        for command in (["serve", "--port", "0"], ["mint-token"]):
            refused = cli(tmp_path, *command)
            assert (refused.returncode, refused.stdout) == (1, "")
            assert len(refused.stderr.splitlines()) == 1 and str(key_file.name) in refused.stderr
        if way == "missing":
            os.rename(tmp_path / "away", key_file)
        else:
            key_file.chmod(0o600)
        subject.goes_on()
        if way == "missing":
            is_told("key file missing", subject.stop())
        else:
            is_told("key file open to others", subject.stop())


@slow
def test_without_descriptors_the_idle_give_way_and_nobody_is_lost(tmp_path: Path) -> None:
    with Subject(tmp_path) as subject:
        number = subject.server.process.pid
        in_use = len(os.listdir(f"/proc/{number}/fd"))
        soft, hard = resource.prlimit(number, resource.RLIMIT_NOFILE)
        resource.prlimit(number, resource.RLIMIT_NOFILE, (in_use + 5, hard))
        with contextlib.ExitStack() as stack:
            for _ in range(40):
                stack.enter_context(subject.door.connect())
            assert subject.answers() == [200] * 5
        resource.prlimit(number, resource.RLIMIT_NOFILE, (soft, hard))
        subject.goes_on()
        is_told("out of file descriptors", subject.stop())


@slow
@pytest.mark.parametrize("less", [0, 4 << 20], ids=["no more", "less than it has"])
def test_without_memory_requests_are_refused_and_the_loop_lives(less: int, tmp_path: Path) -> None:
    with Subject(tmp_path) as subject, contextlib.ExitStack() as stack:
        number = subject.server.process.pid
        before = resource.prlimit(number, resource.RLIMIT_AS)
        size = int(Path(f"/proc/{number}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(number, resource.RLIMIT_AS, (size - less, before[1]))
        large = request_bytes("POST", "/api/agent/heartbeat", {"x": "y" * 60_000}, "z")
        for n in range(240):
            peer = stack.enter_context(subject.door.connect())
            with contextlib.suppress(OSError):  # it has been refused in the middle
                peer.sendall(large[:-5])
            if n % 40 == 0:
                with contextlib.suppress(OSError, AssertionError):
                    subject.answers()
        assert subject.server.process.poll() is None
        resource.prlimit(number, resource.RLIMIT_AS, before)
        subject.goes_on()
        said = [line for line in subject.stop() if "storage:" not in line]
        is_told("out of memory", said)
        assert "".join(subject.server.said).count("storage:") <= 1


@pytest.mark.parametrize("times", [1, 3])
def test_a_turn_that_breaks_off_for_want_of_memory_is_made_good(
    times: int, paths: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    with live_door(paths, clock) as live, live.connect() as idle, live.connect() as busy:
        servers = [it.server for it in threading.enumerate() if isinstance(it, LiveServer)]
        (server,) = [it for it in servers if it.server_port == live.port]
        failures = iter(range(times))
        select_ = server._selector.select

        def fail(patience: float) -> Any:
            if next(failures, None) is not None:
                raise MemoryError
            return select_(patience)

        idle.sendall(HEALTH)
        assert idle.recv(65536)
        busy.sendall(POST + b"Content-Length: 9\r\n\r\n{")  # it holds memory: it gives way
        until(lambda: any(it.held for it in server._connections))
        monkeypatch.setattr(server._selector, "select", fail)
        server._waker.send(b"\0")
        assert has_ended(busy)
        idle.sendall(HEALTH)
        assert idle.recv(65536)
        assert live.enroll(live.token()).status == 201
    said = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [record.getMessage().partition(":")[0] for record in said] == ["out of memory"]
    assert not any(record.exc_info for record in said)


@slow
def test_a_clock_that_is_set_under_a_server_makes_nobody_offline(tmp_path: Path) -> None:
    offset = tmp_path / "offset"
    with Subject(tmp_path, str(offset)) as subject:
        path, key = f"/api/hosts/{subject.host['hostId']}", subject.door.api_key

        def status() -> str:
            return str(subject.door.call("GET", path, bearer=key).document["status"])

        for n, hours in enumerate((5, 0, -5, 0)):
            token = subject.door.token(ttlSeconds=86400)
            (tmp_path / "new").write_text(str(hours * 3600))
            os.replace(tmp_path / "new", offset)
            assert status() == "online"
            assert subject.door.call("GET", "/readyz").status == 200  # it notices
            assert status() == "online"
            assert subject.answers() == [200] * 5
            assert subject.door.enroll(token, f"web-{n}").status == 201
            assert status() == "online"
        subject.goes_on()
        is_told("clock set", subject.stop(), times=4)


def test_a_peer_that_leaves_while_it_is_told_to_continue_ends_nobody_else(
    live: SocketDoor,
) -> None:
    """The reset comes with the first answer; 100 Continue then goes to a socket that is closed."""
    expecting = POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    for _ in range(30):
        peer = live.connect()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.sendall(request_bytes("GET", "/healthz") + expecting)
        peer.close()
    assert live.call("GET", "/healthz").status == 200


@slow
def test_answers_that_are_taken_slowly_keep_their_order(live: SocketDoor) -> None:
    """One needs the database and one does not: neither may overtake, or cut into, the other."""
    paths = ["/readyz", "/healthz", "/api/me", "/nothing"]
    wanted = [paths[n * n % 4] for n in range(300)]
    codes = {"/readyz": 200, "/healthz": 200, "/api/me": 401, "/nothing": 404}
    with live.connect() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sender = threading.Thread(
            target=lambda: peer.sendall(b"".join(request_bytes("GET", path) for path in wanted))
        )
        sender.start()
        with peer.makefile("rb", buffering=512) as stream:
            for path in wanted:
                reply = read_reply(stream)
                assert reply is not None and reply.status == codes[path]
        sender.join(10)


def test_a_path_of_slashes_costs_no_more_than_another(live: SocketDoor) -> None:
    begun = time.process_time()
    for _ in range(20):
        assert live.call("GET", "/" * 15_000).code == "not-found"
    assert time.process_time() - begun < 1


def test_a_flood_of_lists_does_not_hold_up_a_beat(paths: Any, clock: Clock) -> None:
    """No tick looks at more than one page."""
    registry = open_registry(*paths, clock.ms)
    fill(registry, 3000)  # some milliseconds for each list
    registry.close()
    with live_door(paths, clock) as door:
        credential = door.enroll(door.token()).document["credential"]
        listing = request_bytes("GET", "/api/hosts?q=nobody", bearer=door.api_key)
        with contextlib.ExitStack() as stack:
            peers = [stack.enter_context(door.connect()) for _ in range(60)]
            beating = stack.enter_context(door.connect())
            for peer in peers:
                peer.sendall(listing)
            beating.sendall(request_bytes("POST", "/api/agent/heartbeat", bearer=credential))
            assert select.select([beating], [], [], 10)[0]
            assert len(select.select(peers, [], [], 0)[0]) < 30
            with beating.makefile("rb") as stream:
                reply = read_reply(stream)
            assert reply is not None and reply.status == 200
            for peer in peers:
                with peer.makefile("rb") as stream:
                    reply = read_reply(stream)
                    assert reply is not None and reply.status == 200


@pytest.mark.parametrize(
    "count, times", [(1, 16), (4, 16), (4, 1), pytest.param(30, 16, marks=slow)]
)
def test_answers_that_nobody_takes_hold_so_much_memory_and_no_more(
    count: int, times: int, paths: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostenroll, "HELD_MAXIMUM", 400_000)
    with opened(paths, clock) as registry:
        fill(registry, 1000)
        api_key = make_api_key(registry, clock)
    with LiveServer(paths, clock) as live, contextlib.ExitStack() as stack:
        door = SocketDoor(live.port, api_key)
        live.server.socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, 8192
        )  # of all it accepts
        request = request_bytes("GET", "/api/hosts?limit=1000", bearer=door.api_key)
        peers = []
        for _ in range(count):
            peer = stack.enter_context(socket.socket())
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            peer.connect(("127.0.0.1", door.port))
            peer.sendall(request * times)  # each answer is more than the kernel takes
            peers.append(peer)
        assert door.call("GET", "/healthz").status == 200
        until(lambda: not live.server._reads and not live.server._ready)  # nobody takes more
        ended = 0
        for peer in peers:
            peer.settimeout(10)
            with contextlib.suppress(OSError, AssertionError), peer.makefile("rb") as stream:
                for _ in range(times):
                    if read_reply(stream) is None:
                        break
                else:
                    continue
            ended += 1
        assert (ended > 0) == (count > 1)


def test_whoever_holds_most_gives_way_whatever_it_is(
    paths: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One who does not take a great answer, and four who have sent a part of a small request."""
    monkeypatch.setattr(hostenroll, "HELD_MAXIMUM", 400_000)
    with opened(paths, clock) as registry:
        fill(registry, 1000)
        api_key = make_api_key(registry, clock)
    with LiveServer(paths, clock) as live, contextlib.ExitStack() as stack:
        door = SocketDoor(live.port, api_key)
        live.server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        great = stack.enter_context(socket.socket())
        great.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        great.connect(("127.0.0.1", door.port))
        great.sendall(request_bytes("GET", "/api/hosts?limit=1000", bearer=api_key))
        until(lambda: live.server._held > 200_000)
        small = [stack.enter_context(door.connect()) for _ in range(4)]
        for peer in small:
            peer.sendall(POST + b"Content-Length: 60000\r\n\r\n" + b"x" * 59_000)
        until(lambda: 4 * 59_000 <= live.server._held < 5 * 59_000)
        for peer in small:
            peer.sendall(b"x" * 1000)
            with peer.makefile("rb") as stream:
                reply = read_reply(stream)
                assert reply is not None and reply.code == "api-key-invalid"
        assert door.call("GET", "/healthz").status == 200


def test_a_small_announcement_of_much_holds_little() -> None:
    reader = RequestReader()
    reader.next(POST + b"Transfer-Encoding: chunked\r\n\r\n10000\r\nabc")
    assert reader.held == 3
    assert reader.next(b"d" * 100) is None and reader.held == 103


@pytest.mark.parametrize(
    "request_line",
    [b"HEAD /x HTTP/1.1\r\n\r\n", b"HEAD /x HTTP/1.1\r\nHost: h\r\nContent-Length: 70000\r\n\r\n"],
    ids=["malformed", "too large"],
)
def test_a_refused_head_has_no_content_either(request_line: bytes, live: SocketDoor) -> None:
    with live.connect() as peer, peer.makefile("rb") as stream:
        peer.sendall(request_line)
        reply = read_reply(stream, head_only=True)
        assert reply is not None and reply.status in (400, 413)
        assert stream.read() == b""


def test_an_empty_line_behind_a_request_is_not_the_start_of_another(
    paths: Any, clock: Clock
) -> None:
    with live_door(paths, clock, deadlines=(0.3, 0.3, 0.5, 10)) as door:
        with door.connect() as peer, peer.makefile("rb") as stream:
            peer.sendall(request_bytes("GET", "/healthz") + b"\r\n")
            assert read_reply(stream)
            assert stream.read() == b""  # idle for too long: closed without a word


@slow
def test_who_waits_for_another_process_when_the_server_stops_is_told(tmp_path: Path) -> None:
    token = cli(tmp_path, "mint-token").stdout.strip()
    with ServerProcess(tmp_path) as server, write_lock(tmp_path / "hostenroll.db"):
        with SocketDoor(server.port, "").connect() as peer, peer.makefile("rb") as stream:
            body = {"token": token, "hostname": "web-1"}
            peer.sendall(request_bytes("POST", "/api/agent/enroll", body))
            until(lambda: curl(f"{server.url}/healthz").status == 200)
            server.process.terminate()
            reply = read_reply(stream)
            assert reply is not None and reply.code == "storage-unavailable"
            assert server._wait() == 0


def test_an_unfinished_crowd_holds_so_much_memory_and_no_more(
    paths: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostenroll, "HELD_MAXIMUM", 100_000)
    head = POST + b"Content-Length: 65536\r\n\r\n"
    with live_door(paths, clock) as door, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(door.connect()) for _ in range(4)]
        for peer in peers:
            peer.sendall(head + b"x" * 40_000)
        until(lambda: select.select(peers, [], [], 0)[0])
        ended = select.select(peers, [], [], 0.3)[0]
        assert 1 <= len(ended) <= 2
        with ended[0].makefile("rb") as stream:
            reply = read_reply(stream)
            assert reply is not None and reply.code == "overloaded"
        for peer in peers:
            peer.close()
        until(lambda: door.call("GET", "/api/me").code == "api-key-invalid")
        body = {"token": "x" * 40_000, "hostname": "web-1"}
        until(lambda: door.call("POST", "/api/agent/enroll", body).code == "invalid-body")


@pytest.mark.parametrize("doors", sample({"plain": live_door, "tls": tls_door}, "plain"))
@pytest.mark.parametrize(
    "count, begun",
    table({
        "bodies": (2, POST + b"Content-Length: 60000\r\n\r\n" + b"x" * 39_950),
        "heads": (5, b"GET / HTTP/1.1\r\nX: " + b"x" * 15_960),
    }),
)  # fmt: skip
def test_who_holds_little_is_not_kept_out_by_those_who_hold_too_much(
    count: int, begun: bytes, doors: Any, paths: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that sends head and body one after the other, while others hold all there is."""
    monkeypatch.setattr(hostenroll, "HELD_MAXIMUM", 80_000)
    body = b'{"maxUses":5,"description":"%b"}' % (b"x" * 900)
    with doors(paths, clock) as live, contextlib.ExitStack() as stack:
        whole = request_bytes("POST", "/api/hosts/tokens", body, live.api_key)
        holders = [stack.enter_context(live.connect()) for _ in range(count)]
        for holder in holders:
            holder.sendall(begun)
        for _ in range(20):  # meanwhile all of it is read
            assert live.call("GET", "/healthz").status == 200
        with live.connect() as honest, honest.makefile("rb") as stream:
            for at in range(0, len(whole), 400):
                honest.sendall(whole[at : at + 400])
                assert live.call("GET", "/healthz").status == 200
            reply = read_reply(stream)
            assert reply is not None and reply.status == 201
        assert sum(map(bool, (select.select([it], [], [], 0.1)[0] for it in holders))) >= 1


class HeldClock(Clock):
    """A clock that the server waits for, as long as it is held."""

    def __init__(self) -> None:
        super().__init__()
        self.is_held, self.goes_on = threading.Event(), threading.Event()
        self.goes_on.set()

    def __call__(self) -> float:
        if not self.goes_on.is_set():
            self.is_held.set()
            self.goes_on.wait(10)
        return self.now


def test_who_is_in_the_tick_does_not_give_way_and_is_not_answered_twice(
    paths: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large request that is whole, in the turn in which somebody else's makes it too much: were
    it refused, what it asks for would be done all the same."""
    monkeypatch.setattr(hostenroll, "HELD_MAXIMUM", 70_000)
    clock = HeldClock()
    with opened(paths, clock) as registry:
        api_key = make_api_key(registry, clock)
    body = b'{"maxUses":5%b}' % (b" " * 60_000)
    whole = request_bytes("POST", "/api/hosts/tokens", body, api_key)
    begun = POST + b"Content-Length: 60000\r\n\r\n" + b"x" * 8_000
    with LiveServer(paths, clock) as live, contextlib.ExitStack() as stack:
        door = SocketDoor(live.port, api_key)
        honest, other = (stack.enter_context(door.connect()) for _ in range(2))
        honest.sendall(whole[:-1])
        other.sendall(begun)
        until(lambda: live.server._held == len(body) - 1 + 8_000)
        clock.goes_on.clear()
        waker = stack.enter_context(door.connect())
        assert clock.is_held.wait(10)
        honest.sendall(whole[-1:])
        other.sendall(b"x" * 4_000)
        clock.goes_on.set()
        with honest.makefile("rb") as stream:
            reply = read_reply(stream)
            assert reply is not None and reply.status == 201
        assert not select.select([honest], [], [], 0.1)[0]
        with other.makefile("rb") as stream:
            reply = read_reply(stream)
            assert reply is not None and reply.code == "overloaded"
        assert waker.fileno() >= 0


def heartbeat_of(door: SocketDoor, *headers: Tuple[str, str]) -> bytes:
    """Of a host that has just enrolled, as most of them come."""
    credential = door.enroll(door.token()).document["credential"]
    return request_bytes("POST", "/api/agent/heartbeat", bearer=credential, headers=headers)


def test_a_heartbeat_in_the_middle_of_a_request_is_a_part_of_it(live: SocketDoor) -> None:
    """However it is cut: else who can choose a body could have it run as a request."""
    beat = heartbeat_of(live)
    for begun, code in (
        (POST + b"Content-Length: %d\r\n\r\n" % len(beat), "api-key-invalid"),
        (POST + b"X: y\r\n", "malformed-request"),
    ):
        with live.connect() as peer, peer.makefile("rb") as stream:
            peer.sendall(HEALTH + begun)
            assert read_reply(stream) is not None  # so the rest has been read, too
            peer.sendall(beat)
            reply = read_reply(stream)
            assert reply is not None and reply.code == code
            peer.shutdown(socket.SHUT_WR)
            assert stream.read() == b""


def test_a_heartbeat_that_asks_to_close_is_the_last(live: SocketDoor) -> None:
    beat = heartbeat_of(live, ("Connection", "close"))
    with live.connect() as peer, peer.makefile("rb") as stream:
        peer.sendall(HEALTH)  # what is new may go the long way
        assert read_reply(stream) is not None
        peer.sendall(beat)
        reply = read_reply(stream)
        assert reply is not None and (reply.status, reply.headers["connection"]) == (200, "close")
        assert stream.read() == b""


def test_a_heartbeat_that_waits_is_not_hurried_and_nothing_overtakes_it(
    paths: Any, clock: Clock
) -> None:
    with live_door(paths, clock, deadlines=(0.1, 0.1, 0.1, 9)) as live:
        beat = heartbeat_of(live)
        with live.connect() as peer, peer.makefile("rb") as stream:
            peer.sendall(HEALTH)
            assert read_reply(stream) is not None
            with write_lock(paths[0]):
                peer.sendall(beat)
                time.sleep(0.3)  # longer than any deadline
                peer.sendall(HEALTH)
                assert not select.select([peer], [], [], 0.05)[0]
            first, second = read_reply(stream), read_reply(stream)
        assert first is not None and "lastSeen" in first.document
        assert second is not None and second.document == {"status": "ok"}


def test_a_heartbeat_that_waits_when_the_server_stops_is_the_last(paths: Any, clock: Clock) -> None:
    with live_door(paths, clock) as door:
        beat = heartbeat_of(door)
    with LiveServer(paths, clock) as live:
        with SocketDoor(live.port, "").connect() as peer, peer.makefile("rb") as stream:
            with write_lock(paths[0]):
                peer.sendall(beat)
                until(lambda: live.server._waiting_since)
                live.server.stop()
                until(lambda: is_refused(live.port))
            reply = read_reply(stream)
            assert reply is not None and (reply.status, reply.headers["connection"]) == (
                200, "close")  # fmt: skip


def test_a_head_byte_by_byte_has_one_deadline(paths: Any, clock: Clock) -> None:
    with live_door(paths, clock, deadlines=(0.3, 9, 9, 9)) as live, live.connect() as peer:
        for n in range(len(HEALTH) - 1):
            peer.sendall(HEALTH[n : n + 1])
            if select.select([peer], [], [], 0.05)[0]:
                break
        assert 3 < n < 30
        with peer.makefile("rb") as stream:
            reply = read_reply(stream)
        assert reply is not None and reply.code == "request-timeout"


def test_what_comes_while_a_list_is_put_together_waits_for_it(
    paths: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list is read in slices, one in a turn, and others are answered in between."""
    monkeypatch.setattr(hostenroll, "SLICE", 5)  # so it takes a while
    with live_door(paths, clock) as live:
        with opened(paths, clock) as registry:
            fill(registry, 2000)
        listing = request_bytes("GET", "/api/hosts?q=nobody", bearer=live.api_key)
        for _ in range(5):
            with live.connect() as peer, peer.makefile("rb") as stream:
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                peer.sendall(listing)
                time.sleep(0.002)  # it is at work, and does not say so
                peer.sendall(HEALTH)
                first, second = read_reply(stream), read_reply(stream)
                assert first is not None and "hosts" in first.document
                assert second is not None and second.document == {"status": "ok"}


def test_few_lists_come_together_at_once_and_those_that_wait_hold_nothing(
    paths: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each may hold PAGE_BYTES, which nobody has asked for a second time."""
    monkeypatch.setattr(hostenroll, "SLICE", 5)
    parts: List[Any] = []
    begun: List[int] = []

    class Watched(hostenroll.Part):
        def __init__(self) -> None:
            super().__init__()
            parts.append(self)

    def hosts(store: Any, *arguments: Any) -> Any:
        begun.append(sum(part.slices > 0 and part.next is not None for part in parts))
        return real(store, *arguments)

    real = hostenroll.Store.hosts
    monkeypatch.setattr(hostenroll, "Part", Watched)
    monkeypatch.setattr(hostenroll.Store, "hosts", hosts)
    with live_door(paths, clock) as live, contextlib.ExitStack() as stack:
        with opened(paths, clock) as registry:
            fill(registry, 200)
        listing = request_bytes("GET", "/api/hosts?limit=1000", bearer=live.api_key)
        peers = [stack.enter_context(live.connect()) for _ in range(3 * hostenroll.READS_AT_ONCE)]
        for peer in peers:
            peer.sendall(listing)
        for peer in peers:
            reply = read_reply(stack.enter_context(peer.makefile("rb")))
            assert reply is not None and len(reply.document["hosts"]) == 200
    assert 1 < max(begun) <= hostenroll.READS_AT_ONCE + 1


@pytest.mark.parametrize(
    "request_of_all",
    [
        b"GET /openapi.json HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        b"GET /openapi.json HTTP/1.0\r\n\r\n",
        b"GET /healthz HTTP/1.0\r\nX: " + b"a" * (4096 - 30) + b"\r\n\r\n",
    ],
    ids=["close", "1.0", "as much as is read at once"],
)
def test_who_sends_more_while_the_last_answer_is_on_its_way_gets_all_of_it(
    request_of_all: bytes, live: SocketDoor
) -> None:
    """What arrives at a closed socket resets the connection: RFC 9112 section 9.6."""
    for _ in range(5):
        with socket.socket() as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.settimeout(10)
            peer.connect(("127.0.0.1", live.port))
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if len(request_of_all) < hostenroll.RECEIVE_SIZE:
                peer.sendall(request_of_all)
                time.sleep(0.002)
                peer.sendall(b"\r\n")
            else:
                peer.sendall(request_of_all + b"\r\n")
            time.sleep(0.05)
            answer = b"".join(iter(lambda: peer.recv(65536), b""))
            head, _, body = answer.partition(b"\r\n\r\n")
            length = re.search(rb"Content-Length: ([0-9]+)", head)
            assert length is not None and len(body) == int(length[1])


def test_a_body_in_tiny_chunks_has_one_deadline(paths: Any, clock: Clock) -> None:
    """More of them than are read at once buy no time, and no second 100 Continue."""
    with live_door(paths, clock, deadlines=(9, 1, 9, 9)) as live, live.connect() as peer:
        peer.sendall(POST + b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n")
        assert peer.recv(65536) == hostenroll.CONTINUE
        begun, got = time.monotonic(), b""
        peer.settimeout(0.4)
        while b"408" not in got and time.monotonic() - begun < 8:
            peer.sendall(b"1\r\n \r\n" * (hostenroll.CHUNK_LINES_AT_ONCE + 5))
            with contextlib.suppress(socket.timeout):
                got += peer.recv(65536)
        assert got.startswith(b"HTTP/1.1 408 ") and time.monotonic() - begun < 3


def test_a_server_that_stops_waits_for_another_writer_to_tell_of_its_refusals(
    paths: Any, clock: Clock
) -> None:
    with live_door(paths, clock) as live:
        assert live.enroll(live.token()).status == 201
        lock = write_lock(paths[0])
        lock.__enter__()
        assert live.enroll("het_0000000000000001_" + "x" * 50).status == 401
        release = threading.Timer(1, lambda: lock.__exit__(None, None, None))
        release.start()
    release.join()
    assert sql(paths[0], "SELECT code FROM audit ORDER BY number DESC LIMIT 1") == [
        ("token-unknown",)
    ]


def test_a_peer_that_never_stops_sending_is_not_listened_to_for_ever(
    paths: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostenroll, "LINGER_DEADLINE", 0.2)
    with live_door(paths, clock) as door, door.connect() as peer:
        peer.sendall(b"NONSENSE\r\n\r\n")
        with pytest.raises(OSError):
            for _ in range(1000):
                peer.sendall(b"x")
                time.sleep(0.01)


def test_of_two_idle_the_one_that_was_used_last_stays(paths: Any, clock: Clock) -> None:
    with live_door(paths, clock, connections=2) as door:
        with door.connect() as older, door.connect() as newer:
            for peer in (older, newer, older):
                peer.sendall(HEALTH)
                assert peer.recv(65536)
            assert door.call("GET", "/healthz").status == 200
            assert newer.recv(1) == b""
            older.sendall(HEALTH)
            assert older.recv(65536)


def test_what_goes_wrong_with_a_connection_ends_there(
    paths: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may refuse to watch one more: ENOSPC, ENOMEM."""
    with LiveServer(paths, clock) as live:
        door = SocketDoor(live.port, "")
        register = live.server._selector.register

        def fail(*arguments: Any) -> Any:
            monkeypatch.setattr(live.server._selector, "register", register)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(live.server._selector, "register", fail)
        with door.connect() as unlucky:
            assert unlucky.recv(1) == b""
        assert door.call("GET", "/healthz").status == 200


def test_an_idle_server_sleeps(paths: Any, clock: Clock) -> None:
    with LiveServer(paths, clock) as live:
        SocketDoor(live.port, "").call("GET", "/healthz")
        assert live.server._patience() > 5


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_promtool_finds_nothing_wrong_with_the_metrics(live: SocketDoor) -> None:
    live.beat(live.enroll(live.token()).document["credential"])
    text = live.call("GET", "/metrics", bearer=live.api_key).document
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=30
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Prometheus")
@slow
def test_a_real_prometheus_scrapes_us(live: SocketDoor, tmp_path: Path) -> None:
    live.beat(live.enroll(live.token()).document["credential"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "api-key").write_text(live.api_key)
    (tmp_path / "prometheus.yml").write_text(
        "scrape_configs:\n  - job_name: hostenroll\n    scrape_interval: 1s\n"
        f"    authorization: {{ credentials_file: {tmp_path}/api-key }}\n"
        f"    static_configs: [{{ targets: ['127.0.0.1:{live.port}'] }}]\n"
    )
    process = subprocess.Popen(
        ["prometheus", f"--config.file={tmp_path}/prometheus.yml",
         f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        query = "hostenroll_hosts{status='online'}%20==%201"
        deadline, found = time.monotonic() + 60, []
        while not found and time.monotonic() < deadline:
            time.sleep(0.2)
            done = subprocess.run(
                ["curl", "-sS", "-g", f"http://127.0.0.1:{port}/api/v1/query?query={query}"],
                capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode == 0 and done.stdout.startswith("{"):
                found = json.loads(done.stdout)["data"]["result"]
        assert [sample["metric"]["organization"] for sample in found] == ["default"]
    finally:
        process.terminate()
        process.wait(20)


def spoiled(path: Path, spoil: Callable[[Path], Any]) -> None:
    """Make a file bad as one who replaces it: no moment without a file that is not meant."""
    beside = path.with_name("beside")
    shutil.copy(path, beside)
    spoil(beside)
    if beside.exists() and not beside.is_dir():
        os.replace(beside, path)
    else:
        path.unlink()
        if beside.is_dir():
            beside.rename(path)


LIVE_KEY_TROUBLES = {name: KEY_TROUBLES[name] for name in KEY_TROUBLES if "link" not in name}


@pytest.mark.parametrize("spoil", table(LIVE_KEY_TROUBLES))
def test_a_server_goes_on_with_its_keys_while_the_key_file_is_bad_and_says_so_once(
    spoil: Callable[[Path], Any], live: SocketDoor, paths: Tuple[str, str], caplog: Any
) -> None:
    host, good = enrolled(live), Path(paths[1]).read_bytes()
    path = Path(paths[1])
    for _ in range(2):
        caplog.clear()
        spoiled(path, spoil)
        for n in range(3):
            assert live.beat(host["credential"]).status == 200
            assert live.beat(host["credential"], os=f"linux {n}").status == 200
            fresh = enrolled(live, f"web-{n}")
            ready = live.call("GET", "/readyz")
            assert (ready.status, ready.code) == (503, "storage-unavailable")
            assert "key file" in ready.document["detail"] and "retry-after" in ready.headers
            assert path.name not in json.dumps(ready.document)
            assert str(path.parent) not in json.dumps(ready.document)
            assert live.call("GET", "/healthz").status == 200
        said = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
        assert len(said) == len(set(said)) and 1 <= len(said) <= 2
        assert all(str(path) in line and "\n" not in line for line in said)
        if path.is_dir():
            path.rmdir()
        hostenroll.write_key_file(str(path), hostenroll.load_keyring(write_beside(path, good)))
        assert live.call("GET", "/readyz").document == {"status": "ready"}
        for credential in (host["credential"], fresh["credential"]):
            assert live.beat(credential).status == 200


def write_beside(path: Path, content: bytes) -> str:
    beside = path.with_name("good")
    beside.write_bytes(content)
    beside.chmod(0o600)
    return str(beside)


@slow
def test_every_server_goes_by_a_change_of_keys_at_once(tmp_path: Path) -> None:
    def kid_of(credential: str) -> str:
        return str(json.loads(unb64(credential.split(".")[0]))["kid"])

    def states() -> Dict[str, Tuple[str, int]]:
        listed = json.loads(cli(tmp_path, "list-signing-keys", "--json").stdout)["signingKeys"]
        return {key["kid"]: (key["state"], key["hosts"]) for key in listed}

    key = api_key_of(tmp_path)
    with ServerProcess(tmp_path) as one, ServerProcess(tmp_path) as other:
        doors = [SocketDoor(server.port, key) for server in (one, other)]
        hosts = [door.enroll(door.token()).document["credential"] for door in doors]
        for door, credential in zip(doors, hosts):
            assert set(door.beat(credential).document) == {
                "hostId", "lastSeen", "nextHeartbeatSeconds"}  # fmt: skip
        old = kid_of(hosts[0])
        rotated = cli(tmp_path, "rotate-signing-key")
        new = rotated.stdout.strip()
        assert rotated.returncode == 0 and new != old
        renewed = [door.beat(it).document["credential"] for door, it in zip(doors, hosts)]
        assert {kid_of(credential) for credential in renewed} == {new}
        for door in doors:
            assert kid_of(door.enroll(door.token()).document["credential"]) == new
        assert doors[1].beat(renewed[0]).status == 200
        assert states() == {new: ("signs", 3), old: ("verifies", 1)}
        refused = cli(tmp_path, "retire-signing-key", old)
        assert (refused.returncode, refused.stdout) == (3, "")
        assert "conflict" in refused.stderr and "--force" in refused.stderr
        assert doors[0].beat(hosts[1]).status == 200
        assert cli(tmp_path, "retire-signing-key", old, "--force").returncode == 0
        for door in doors:
            shut_out = door.beat(hosts[1])
            assert (shut_out.status, shut_out.code) == (401, "credential-invalid")
            assert door.beat(renewed[0]).status == 200
        assert doors[0].beat(renewed[1]).status == 200  # had got its renewal
        assert states() == {new: ("signs", 4), old: ("retired", 0)}
        for door in doors:
            assert door.call("GET", "/readyz").status == 200


@slow
def test_whenever_a_change_of_keys_is_killed_nobody_is_locked_out(tmp_path: Path) -> None:
    key, dice = api_key_of(tmp_path), random.Random(3)
    key_file, finished = str(tmp_path / "hostenroll.key"), 0
    with ServerProcess(tmp_path) as server:
        door = SocketDoor(server.port, key)
        credentials = [door.enroll(door.token(), f"web-{n}").document["credential"] for n in "ab"]
        begun = time.monotonic()
        assert cli(tmp_path, "list-signing-keys").returncode == 0
        usual = time.monotonic() - begun  # for a command, on this machine
        for round in range(40):
            kids = hostenroll.load_keyring(key_file).kids
            command = ["retire-signing-key", kids[-1]] if round % 2 else ["rotate-signing-key"]
            victim = subprocess.Popen(
                [*PROGRAM, *command],
                cwd=str(tmp_path),
                env=clean_environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            deadline = time.monotonic() + usual * dice.uniform(0.5, 3)
            while time.monotonic() < deadline and victim.poll() is None:
                for n, credential in enumerate(credentials):
                    beaten = door.beat(credential)
                    assert beaten.status == 200, beaten
                    credentials[n] = beaten.document.get("credential", credential)
            victim.kill()
            finished += victim.wait(10) == 0
            assert len(hostenroll.load_keyring(key_file).kids) >= 1
            assert door.call("GET", "/readyz").status == 200
        assert server.terminate() == 0
    assert 0 < finished < 40, finished
    assert cli(tmp_path, "check").returncode == 0


@slow
def test_a_backup_and_a_check_beside_a_busy_server_are_whole_and_sound(
    tmp_path: Path,
) -> None:
    key = api_key_of(tmp_path)
    with ServerProcess(tmp_path) as server:
        door = SocketDoor(server.port, key)
        token = door.token(maxUses=1000)
        hosts: List[Any] = []
        done, came = threading.Event(), []

        def load(n: int) -> None:
            if n == 0:
                until(lambda: len(hosts) > 30)
                before = list(hosts)
                made = cli(tmp_path, "backup", "copy")
                came.append((made.returncode, before))
                came.append((cli(tmp_path, "check").returncode, []))
                done.set()
                return
            while not done.is_set():
                host = door.enroll(token).document
                assert door.beat(host["credential"]).status == 200
                hosts.append(host["hostId"])

        many(3, load)
        assert server.terminate() == 0
    before = came[0][1]
    assert [status for status, _ in came] == [0, 0]
    copy = tmp_path / "copy"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o700
    assert sorted(os.listdir(copy)) == ["hostenroll.db", "hostenroll.key"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in copy.iterdir()} == {0o600}
    statement = "SELECT id FROM host JOIN heartbeat ON host_id = id WHERE last_seen > 0"
    stored = {f"{number:016x}" for (number,) in sql(str(copy / "hostenroll.db"), statement)}
    assert stored >= set(before) and len(before) > 30
    checked = cli(copy, "check")
    assert (checked.returncode, checked.stderr) == (0, "")


def refused_in(paths: Any) -> List[Any]:
    """The refusals in the log of a server that has ended: code, address, detail."""
    rows = sql(paths[0], "SELECT code, address, detail FROM audit WHERE code IS NOT NULL")
    return [(code, address, json.loads(detail)) for code, address, detail in rows]


@pytest.mark.parametrize("count", [1, 60, 75])
def test_a_server_that_ends_leaves_no_refusal_unwritten(
    count: int, paths: Any, clock: Clock
) -> None:
    with live_door(paths, clock) as live:
        junk = request_bytes("POST", "/api/agent/heartbeat", bearer="junk")
        assert [reply.code for reply in live.send(junk * count)] == ["credential-invalid"] * count
    written = refused_in(paths)
    single = ("credential-invalid", "127.0.0.1", {})
    assert written[:60] == [single] * min(count, 60)
    assert [detail.get("more") for _, _, detail in written[60:]] == ([15] if count == 75 else [])


def test_not_even_the_last_that_was_refused_goes_unwritten(paths: Any, clock: Clock) -> None:
    """A list is read when the last tick that writes has been."""
    open_registry(*paths, clock.ms).close()
    with LiveServer(paths, clock) as server:
        door = SocketDoor(server.port, "")
        data = request_bytes("GET", "/api/hosts", bearer="hak_junk")
        with door.connect() as peer, peer.makefile("rb") as stream:
            peer.sendall(data[:-2])
            until(lambda: any(c.held for c in server.server._connections))
            server.server.stop()
            until(lambda: is_refused(server.port))
            peer.sendall(data[-2:])
            reply = read_reply(stream)
            assert reply is not None and reply.code == "api-key-invalid"
    assert refused_in(paths) == [
        ("api-key-invalid", "127.0.0.1", {"request": "GET /api/hosts"})]  # fmt: skip


def test_what_is_refused_while_the_database_is_gone_is_written_when_it_is_back(
    paths: Any, clock: Clock
) -> None:
    with live_door(paths, clock) as live:
        until(lambda: live.call("GET", "/readyz").status == 200)
        os.rename(paths[0], f"{paths[0]}.away")
        assert live.beat("junk").code == "credential-invalid"
        assert live.call("GET", "/readyz").status == 503
        # Nor is it tried again and again until then.
        begun, process = time.monotonic(), time.process_time()
        for _ in range(5):
            assert live.call("GET", "/healthz").status == 200
            select.select([], [], [], 0.04)
        assert time.process_time() - process < 0.7 * (time.monotonic() - begun)
        os.rename(f"{paths[0]}.away", paths[0])
        assert live.call("GET", "/readyz").status == 200
    assert refused_in(paths) == [("credential-invalid", "127.0.0.1", {})]


class JsonServerProcess(ServerProcess):
    """One that says everything in JSON, also where it listens."""

    def _read_port(self) -> int:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            match = re.search(r"listens on [^ \"]+:(\d+)", line)
            if match:
                return int(match[1])
        raise AssertionError(f"it ended with {self.process.wait()}: {''.join(self.said)}")


def test_what_the_command_line_does_a_running_server_heeds_at_once(tmp_path: Path) -> None:
    """On a connection that is kept, and both write one log."""
    with JsonServerProcess(tmp_path, "--log-format", "json", "--access-log") as server:
        door = SocketDoor(server.port, "")
        text = cli(tmp_path, "mint-token").stdout.strip()
        host = door.enroll(text).document
        credential, number = host["credential"], host["hostId"]
        with door.connect() as peer, peer.makefile("rb") as stream:

            def beat_on() -> Any:
                peer.sendall(request_bytes("POST", "/api/agent/heartbeat", bearer=credential))
                return read_reply(stream)

            assert beat_on().status == 200
            for command, code in (
                ("revoke-host", "host-revoked"),
                ("delete-host", "host-unknown"),
            ):
                assert cli(tmp_path, command, number).returncode == 0
                assert beat_on().code == code
        assert door.enroll("web-1", text).code == "token-unknown"
        assert door.call("GET", f"/api/hosts/{text}", bearer="hak_junk").status == 401
        assert server.terminate() == 0
    files = str(tmp_path / "hostenroll.db"), str(tmp_path / "hostenroll.key")
    with opened(files, Clock()) as registry:
        first, last, *_ = do(registry, Clock(), lambda now: registry.verify_audit(None), False)
        events = [hostenroll.event_document(event) for event in log_of(registry)]
    assert (first, last) == (1, 8)
    assert [(event["action"], event["code"]) for event in events] == [
        ("mint", None), ("enroll", None), ("revoke", None), ("refuse", "host-revoked"),
        ("delete", None), ("refuse", "host-unknown"), ("refuse", "token-unknown"),
        ("refuse", "api-key-invalid"),
    ]  # fmt: skip
    by_server = [event for event in events if not event["actor"].startswith("cli:")]
    assert {event["address"] for event in by_server} == {"127.0.0.1"}
    lines = [json.loads(line) for line in server.said if line.startswith("{")]
    logged = [line["event"] for line in lines if "event" in line]
    assert logged == by_server
    assert all(re.fullmatch("[0-9a-f-]+", line["request"]) for line in lines if "event" in line)
    secrets = [text.split("_", 2)[2][:43], credential.split(".")[2]]
    assert secrets_in("".join(server.said), secrets) == []


class Peer:
    """A TLS client on a connection, whose bytes are in the hands of the test."""

    def __init__(self, port: int, context: Optional[ssl.SSLContext] = None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.session = (context or trusting()).wrap_bio(
            self._incoming, self._outgoing, server_hostname="enroll.lan"
        )

    def output(self) -> bytes:
        """What is to be sent now."""
        return self._outgoing.read()

    def hear(self) -> None:
        """Wait for more from the server."""
        data = self.socket.recv(65536)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def shake(self, step: int = 65536) -> None:
        """Shake hands, in pieces of so many bytes."""
        is_shaken = False
        while not is_shaken:
            try:
                self.session.do_handshake()
                is_shaken = True
            except ssl.SSLWantReadError:
                pass
            self.send(self.output(), step)
            if not is_shaken:
                self.hear()

    def send(self, data: bytes, step: int = 65536) -> None:
        for start in range(0, len(data), step):
            self.socket.sendall(data[start : start + step])

    def sealed(self, plain: bytes) -> bytes:
        """The records of a plain text."""
        self.session.write(plain)
        return self.output()

    def read(self) -> bytes:
        """What the server says next; b"" when it has said that it ends."""
        while True:
            try:
                return self.session.read(65536)
            except ssl.SSLWantReadError:
                self.hear()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
each_version = pytest.mark.parametrize("version", VERSIONS, ids=["TLS 1.2", "TLS 1.3"])


@pytest.fixture
def secure(paths: Tuple[str, str], clock: Clock) -> Iterator[TlsDoor]:
    with tls_door(paths, clock) as live:
        yield live


@pytest.fixture(scope="module")
def twins(tmp_path_factory: Any) -> Iterator[Tuple[SocketDoor, TlsDoor]]:
    """The same twice, without TLS and with it, for all that leaves nothing behind."""
    folders = [str(tmp_path_factory.mktemp(name)) for name in ("plain", "tls")]
    files = [(f"{folder}/hostenroll.db", f"{folder}/hostenroll.key") for folder in folders]
    with live_door(files[0], Clock()) as plain, tls_door(files[1], Clock()) as secure:
        yield plain, secure


@each_version
def test_tls_is_spoken_in_its_two_good_versions(version: Any, secure: TlsDoor) -> None:
    secure.context = trusting(minimum_version=version, maximum_version=version)
    with secure.connect() as peer:
        assert peer.version() == version.name.replace("_", ".")
    credential = secure.enroll(secure.token()).document["credential"]
    assert secure.beat(credential).status == 200


def test_of_the_protocols_that_a_client_offers_ours_is_taken(secure: TlsDoor) -> None:
    secure.context.set_alpn_protocols(["h2", "http/1.1"])
    with secure.connect() as peer:
        assert peer.selected_alpn_protocol() == "http/1.1"
    secure.context.set_alpn_protocols(["h2"])
    assert secure.call("GET", "/healthz").status == 200


def hello_of(version: bytes) -> bytes:
    """The least ClientHello of a version up to 1.2."""
    groups = b"\x00\x0a\x00\x04\x00\x02\x00\x17" + b"\x00\x0d\x00\x06\x00\x04\x04\x03\x02\x03"
    ciphers = b"\xc0\x2b\xc0\x2c\xc0\x09\xc0\x0a"
    body = version + bytes(32) + b"\0" + struct.pack(">H", len(ciphers)) + ciphers + b"\x01\x00"
    body += struct.pack(">H", len(groups)) + groups
    message = b"\x01" + struct.pack(">I", len(body))[1:] + body
    return b"\x16\x03\x01" + struct.pack(">H", len(message)) + message


OLD_VERSIONS = {"TLS 1.0": b"\x03\x01", "TLS 1.1": b"\x03\x02"}


@pytest.mark.parametrize("version", OLD_VERSIONS.values(), ids=OLD_VERSIONS)
def test_older_versions_of_tls_are_refused(version: bytes, secure: TlsDoor) -> None:
    said = []
    for offered in (version, b"\x03\x03"):
        with socket.create_connection(("127.0.0.1", secure.port), 10) as peer:
            peer.sendall(hello_of(offered))
            said.append(peer.recv(7))
    protocol_version, server_hello = 70, 2
    assert (said[0][0], said[0][5:]) == (21, bytes([2, protocol_version]))
    assert (said[1][0], said[1][5]) == (22, server_hello)


CHUNKED_BEAT = b"POST /api/agent/heartbeat HTTP/1.1\r\nHost: a\r\n" + CHUNKED
STREAMS: Dict[str, bytes] = {
    **{f"smuggled: {name}": SMUGGLED[name] + HEALTH for name in (
        "CL.TE", "two lengths", "a folded line", "bare LF", "a NUL in a value", "no host",
        "a chunk that is longer", "an endless chunk", "a length that is too large",
    )},
    **{f"ending: {name}": data * 2 for name, (data, _) in CLOSING.items()},
    "pipelined": HEALTH * 70,
    "pipelined and refused": HEALTH * 3 + b"nonsense\r\n\r\n" + HEALTH,
    "chunked": CHUNKED_BEAT + b"\r\n2;a=b\r\n{}\r\n0\r\nX: y\r\n\r\n" + HEALTH,
    "empty lines between": b"\r\n".join([HEALTH] * 3),
    "a head that is too large": b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
    "a body of several records": request_bytes("POST", "/api/agent/heartbeat", b"x" * 60_000) * 2,
    "half of a head": HEALTH + HEALTH[:-1],
    "half of a body": HEALTH + request_bytes("POST", "/api/agent/heartbeat", b"{}")[:-1],
    "nothing": b"",
    "TLS in TLS": b"\x16\x03\x01\x00\xa5\x01\x00\x00",
}  # fmt: skip


@pytest.mark.parametrize("data", STREAMS.values(), ids=STREAMS)
def test_through_tls_a_stream_is_answered_as_without(data: bytes, twins: Any) -> None:
    said = []
    for live in twins:
        replies = live.send(data)
        connections = [reply.headers.get("connection") for reply in replies]
        said.append([[reply[:2] for reply in replies], connections])
    assert said[0] == said[1]


@each_version
def test_through_tls_a_request_may_come_byte_by_byte(version: Any, secure: TlsDoor) -> None:
    """Of the handshake, too, and of the records."""
    with Peer(secure.port, trusting(minimum_version=version, maximum_version=version)) as peer:
        peer.shake(step=1)
        for data in (HEALTH, request_bytes("POST", "/api/agent/heartbeat", b"x" * 100)) * 2:
            peer.send(peer.sealed(data), step=1)
            assert peer.read().startswith(b"HTTP/1.1 200 " if data == HEALTH else b"HTTP/1.1 4")


def test_through_tls_a_record_for_each_byte_is_a_request_too(secure: TlsDoor) -> None:
    mint = request_bytes("POST", "/api/hosts/tokens", {"description": "slow"}, secure.api_key)
    with Peer(secure.port) as peer:
        peer.shake()
        peer.send(b"".join(peer.sealed(mint[n : n + 1]) for n in range(len(mint))))
        assert peer.read().startswith(b"HTTP/1.1 201 ")
    assert tokens_of(secure) == 1


def test_through_tls_a_long_answer_comes_whole_to_a_slow_reader(
    paths: Any, clock: Clock, secure: TlsDoor
) -> None:
    registry = open_registry(*paths, clock.ms)
    fill(registry, 1000)
    registry.close()
    ask = request_bytes("GET", "/api/hosts?limit=1000", bearer=secure.api_key)
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.settimeout(10)
    raw.connect(("127.0.0.1", secure.port))
    with secure.context.wrap_socket(raw, server_hostname="enroll.lan") as peer:
        peer.sendall(ask * 3)
        assert secure.call("GET", "/healthz").status == 200  # nobody waits for it
        with peer.makefile("rb") as stream:
            for _ in range(3):
                reply = read_reply(stream)
                assert reply is not None and len(reply.document["hosts"]) > 500


def test_through_tls_an_answer_that_nobody_takes_is_dropped(paths: Any, clock: Clock) -> None:
    registry = open_registry(*paths, clock.ms)
    fill(registry, 1000)
    registry.close()
    with tls_door(paths, clock, deadlines=(9, 9, 9, 0.3), connections=1) as live:
        ask = request_bytes("GET", "/api/hosts?limit=1000", bearer=live.api_key)
        with live.connect() as peer:
            peer.sendall(ask * 40)
            assert live.call("GET", "/healthz").status == 200


def test_the_hundred_that_continues_through_tls(secure: TlsDoor) -> None:
    mint = request_bytes(
        "POST", "/api/hosts/tokens", {"maxUses": 3}, secure.api_key, [("Expect", "100-continue")]
    )
    head, _, body = mint.partition(b"\r\n\r\n")
    with secure.connect() as peer, peer.makefile("rb") as stream:
        for _ in range(2):
            peer.sendall(head + b"\r\n\r\n")
            assert (stream.readline(), stream.readline()) == (b"HTTP/1.1 100 Continue\r\n", b"\r\n")
            peer.sendall(body)
            reply = read_reply(stream)
            assert reply is not None and reply.document["maxUses"] == 3


def test_through_tls_head_is_get_without_the_body(secure: TlsDoor) -> None:
    with secure.connect() as peer, peer.makefile("rb") as stream:
        for _ in range(2):
            peer.sendall(request_bytes("HEAD", "/healthz"))
            reply = read_reply(stream, head_only=True)
            assert reply is not None and int(reply.headers["content-length"]) > 0
        peer.sendall(HEALTH)
        assert read_reply(stream) is not None


ENDINGS: Dict[str, bytes] = {
    "Connection: close": b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    "HTTP/1.0": b"GET /healthz HTTP/1.0\r\n\r\n",
    "malformed": b"nonsense\r\n\r\n",
    "too large": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 999999\r\n\r\n" + b"x" * 99_999,
    "idle for too long": HEALTH,
    "a head that is slow": b"GET /heal",
    "a body that is slow": POST + b"Content-Length: 9\r\n\r\n{",
    "nothing sent": b"",
}


@pytest.mark.parametrize("data", ENDINGS.values(), ids=ENDINGS)
def test_every_end_is_a_close_notify(data: bytes, paths: Any, clock: Clock) -> None:
    """Else a client takes it for an attack that cuts the answer short."""
    with tls_door(paths, clock, deadlines=(0.1, 0.1, 0.1, 9)) as live:
        with live.connect() as peer, peer.makefile("rb") as stream:
            peer.sendall(data)
            assert read_reply(stream) is not None
            assert stream.read() == b""


def test_who_gives_way_and_who_is_there_at_the_stop_hear_a_close_notify(
    paths: Any, clock: Clock
) -> None:
    with contextlib.ExitStack() as peers:
        with tls_door(paths, clock, connections=1) as live:
            first = peers.enter_context(live.connect())
            first.sendall(HEALTH)
            assert first.recv(65536).startswith(b"HTTP/1.1 200 ")
            second = peers.enter_context(live.connect())
            assert first.recv(1) == b""
        assert second.recv(1) == b""


ASKED = {
    "nothing": b"",
    "one": HEALTH,
    "five": HEALTH * 5,
    "two and a half": HEALTH * 2 + b"GET /",
}


@each_version
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_who_says_that_it_ends_is_answered_and_parted_with(
    asked: bytes, version: Any, paths: Any, clock: Clock
) -> None:
    """Half a close: it will send no more, and waits for our close_notify before it closes."""
    context = trusting(minimum_version=version, maximum_version=version)
    with contextlib.ExitStack() as stack:
        live = stack.enter_context(tls_door(paths, clock, deadlines=(60, 60, 60, 60)))
        peer = stack.enter_context(Peer(live.port, context))
        peer.socket.settimeout(5)
        peer.shake()
        sealed = peer.sealed(asked) if asked else b""
        with contextlib.suppress(ssl.SSLWantReadError):
            peer.session.unwrap()
        peer.send(sealed + peer.output())
        received = b""
        data = peer.socket.recv(65536)
        while data:
            received += data
            data = peer.socket.recv(65536)
        assert received[:1] in (b"\x15", b"\x17")
        assert len(received) > 200 * asked.count(b"Host")


PLAIN = {
    method: request_bytes(method, "/api/hosts", b"{}" if method in ("POST", "PATCH") else None)
    for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD")
}


@pytest.mark.parametrize("step", [1, 1000], ids=["byte by byte", "at once"])
@pytest.mark.parametrize("method", PLAIN)
def test_plain_http_on_the_tls_port_is_told_so(method: str, step: int, secure: TlsDoor) -> None:
    door = SocketDoor(secure.port, "")
    with door.connect() as peer, peer.makefile("rb") as stream:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):  # we close as soon as we know
            for n in range(0, len(PLAIN[method]), step):
                peer.sendall(PLAIN[method][n : n + step])
        reply = read_reply(stream, head_only=method == "HEAD")
        assert reply is not None and reply.status == 400
        assert reply.headers["connection"] == "close"
        if method != "HEAD":
            assert reply.code == "malformed-request" and "https" in reply.document["detail"]
        if method != "HEAD" or step > 1:
            assert stream.read() == b""


JUNK: Dict[str, bytes] = {
    "zeros": bytes(3000),
    "random": random.Random(7).randbytes(3000),
    "a record of no kind": b"\x63\x03\x03\x00\x10" + b"x" * 16,
    "a record that is too long": b"\x16\x03\x01\xff\xff" + b"x" * 99_000,
    "application data first": b"\x17\x03\x03\x00\x10" + b"x" * 16,
    "an alert first": b"\x15\x03\x03\x00\x02\x02\x50",
    "an empty record": b"\x16\x03\x01\x00\x00",
    "a hello of SSL 2": b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + b"x" * 40,
    "a hello cut inside": hello_of(b"\x03\x03")[:-9] + b"\x00" * 9,
    "a hello with a tail of junk": hello_of(b"\x03\x03") + b"junk" * 1000,
    "a Finished too early": b"\x14\x03\x03\x00\x01\x01" + b"\x16\x03\x03\x00\x04\x14\x00\x00\x00",
}


@pytest.mark.parametrize("data", JUNK.values(), ids=JUNK)
def test_junk_on_the_tls_port_is_parted_with_and_hurts_nobody(data: bytes, secure: TlsDoor) -> None:
    with socket.create_connection(("127.0.0.1", secure.port), 10) as peer:
        with contextlib.suppress(ConnectionError):
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(65536):
                pass
    assert secure.call("GET", "/healthz").status == 200


def stall(peer: Peer, where: str) -> None:
    """Shake hands as far as that, and no further."""
    with contextlib.suppress(ssl.SSLWantReadError):
        peer.session.do_handshake()
    hello = peer.output()
    if where != "before the hello":
        peer.send(hello[:100] if where == "in the hello" else hello)
    if where == "after the server's hello":
        peer.hear()


STALLED = ["before the hello", "in the hello", "after the server's hello"]


@pytest.mark.parametrize("where", STALLED)
def test_a_handshake_that_stalls_ends_at_its_deadline_and_holds_up_nobody(
    where: str, paths: Any, clock: Clock
) -> None:
    with tls_door(paths, clock, deadlines=(0.2, 60, 60, 60)) as live:
        with Peer(live.port) as peer:
            stall(peer, where)
            assert live.call("GET", "/healthz").status == 200
            while peer.socket.recv(65536):
                pass


@slow
def test_a_handshake_byte_by_byte_has_one_deadline(paths: Any, clock: Clock) -> None:
    with tls_door(paths, clock, deadlines=(0.5, 60, 60, 60)) as live:
        with Peer(live.port) as peer:
            stall(peer, "before the hello")
            hello = hello_of(b"\x03\x03")
            with pytest.raises(ConnectionError):
                for n in range(len(hello)):
                    peer.socket.sendall(hello[n : n + 1])
                    time.sleep(0.1)


@pytest.mark.parametrize("where", STALLED)
def test_at_the_limit_the_slowest_handshake_gives_way(where: str, paths: Any, clock: Clock) -> None:
    with tls_door(paths, clock, connections=2) as live, contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(Peer(live.port)) for _ in range(2)]
        for peer in stalled:
            stall(peer, where)
        assert live.call("GET", "/healthz").status == 200
        while stalled[0].socket.recv(65536):
            pass


def test_hundreds_who_stall_in_their_handshake_disturb_nobody(secure: TlsDoor) -> None:
    with contextlib.ExitStack() as stack:
        for n in range(120):
            stall(stack.enter_context(Peer(secure.port, secure.context)), STALLED[n % 3])
        for _ in range(10):
            assert secure.enroll(secure.token()).status == 201


def test_a_hello_without_end_is_not_kept(secure: TlsDoor) -> None:
    """No honest one is larger than a head may be; 4,096 of the largest that TLS allows, 128 KiB
    each, would be half a gigabyte."""
    with socket.create_connection(("127.0.0.1", secure.port), 5) as peer:
        message = b"\x01\x01\xf0\x00\x03\x03" + bytes(100_000)
        with contextlib.suppress(ConnectionError):
            for n in range(0, len(message), 10_000):
                piece = message[n : n + 10_000]
                peer.sendall(b"\x16\x03\x01" + struct.pack(">H", len(piece)) + piece)
            while peer.recv(65536):
                pass
    assert secure.call("GET", "/healthz").status == 200


def test_half_a_record_counts_among_what_is_held(
    paths: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostenroll, "HELD_MAXIMUM", 50_000)
    with contextlib.ExitStack() as stack:
        live = stack.enter_context(tls_door(paths, clock, deadlines=(60, 60, 60, 60)))
        peers = [stack.enter_context(Peer(live.port)) for _ in range(6)]
        for peer in peers:
            peer.shake()
            peer.send(peer.sealed(b"GET /" + b"x" * 16_000)[:15_000])
        raw = [peer.socket for peer in peers]

        def ended() -> int:
            count = 0
            for peer in raw:
                peer.setblocking(False)
                try:
                    while peer.recv(65536):  # session tickets
                        pass
                    count += 1
                except BlockingIOError:
                    pass
                except ConnectionError:
                    count += 1
            return count

        until(ended)
        assert ended() <= 4
        assert live.call("GET", "/healthz").status == 200


@each_version
def test_many_at_once_and_many_beats_on_one_connection(version: Any, secure: TlsDoor) -> None:
    secure.context = trusting(minimum_version=version, maximum_version=version)
    token = secure.token(maxUses=6)

    def work(n: int) -> List[Tuple[int, str]]:
        enrolled = secure.enroll(token, f"web-{n}").document
        ask = request_bytes("POST", "/api/agent/heartbeat", None, enrolled["credential"])
        said = []
        with secure.connect() as peer, peer.makefile("rb") as stream:
            for _ in range(60):
                peer.sendall(ask)
                reply = read_reply(stream)
                assert reply is not None
                said.append((reply.status, reply.document["hostId"] == enrolled["hostId"]))
        return said

    assert many(6, work) == [[(200, True)] * 60] * 6


@pytest.mark.parametrize("how", ["closed", "reset", "half a record", "junk", "a bad record"])
def test_an_end_in_the_middle_of_tls_hurts_nobody(how: str, secure: TlsDoor) -> None:
    with secure.connect() as other, other.makefile("rb") as stream, Peer(secure.port) as peer:
        peer.shake()
        peer.send(peer.sealed(HEALTH))
        assert peer.read().startswith(b"HTTP/1.1 200 ")
        sealed = peer.sealed(HEALTH)
        if how == "reset":
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        elif how == "half a record":
            peer.send(sealed[:20])
        elif how == "junk":
            peer.send(b"GET / HTTP/1.1\r\n\r\n" * 10)
        elif how == "a bad record":
            peer.send(sealed[:-1] + bytes([sealed[-1] ^ 1]))
        if how in ("junk", "a bad record"):
            with contextlib.suppress(ConnectionError):
                while peer.socket.recv(65536):
                    pass
        peer.socket.close()
        other.sendall(HEALTH)
        assert read_reply(stream) is not None
        assert secure.call("GET", "/readyz").status == 200


@each_version
def test_a_client_that_does_not_trust_us_is_parted_with(version: Any, secure: TlsDoor) -> None:
    """Its alert comes in the middle of the handshake, or right behind it."""
    stranger = trusting("other", minimum_version=version, maximum_version=version)
    with Peer(secure.port, stranger) as peer:
        with pytest.raises(ssl.SSLCertVerificationError):
            peer.shake()
        peer.send(peer.output())
        with contextlib.suppress(ConnectionError):
            while peer.socket.recv(65536):
                pass
    assert secure.call("GET", "/healthz").status == 200


@slow
@needs_openssl
@pytest.mark.parametrize(
    ("version", "key", "goes_on"),
    [("-tls1_2", b"R\n", False), ("-tls1_3", b"K\n", True)],
    ids=["renegotiation", "a key update"],
)
def test_hands_are_shaken_once_and_keys_may_change(
    version: str, key: bytes, goes_on: bool, secure: TlsDoor
) -> None:
    client = subprocess.Popen(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{secure.port}", version],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
    )
    assert client.stdin is not None and client.stdout is not None
    with client.stdin, client.stdout:
        for data in (b"GET /healthz HTTP/1.1\r\n", key, b"Host: a\r\nConnection: close\r\n\r\n"):
            with contextlib.suppress(BrokenPipeError):
                client.stdin.write(data)
            time.sleep(0.3)  # its commands are such at the start of what it reads at once
        said = client.stdout.read()
        client.wait(10)
    assert (b"HTTP/1.1 200 OK" in said) == goes_on, said


def served_certificate(port: int) -> bytes:
    anyone = trusting(check_hostname=False, verify_mode=ssl.CERT_NONE)
    with TlsDoor(port, "", anyone).connect() as it:
        certificate = it.getpeercert(binary_form=True)
    assert certificate is not None
    return certificate


@contextlib.contextmanager
def reloadable(paths: Tuple[str, str], clock: Clock) -> Iterator[LiveServer]:
    pair = write_pair(Path(paths[0]).parent)
    with LiveServer(paths, clock, load_tls=lambda: hostenroll.load_tls(*pair)[0]) as live:
        yield live


def test_a_reload_is_for_the_connections_to_come(paths: Any, clock: Clock, tmp_path: Path) -> None:
    ders = {pair: ssl.PEM_cert_to_DER_cert(certificate_of(pair)) for pair in PAIRS}
    with reloadable(paths, clock) as live, TlsDoor(live.port, "").connect() as standing:
        assert served_certificate(live.port) == ders["one"]
        stalled = Peer(live.port)
        stall(stalled, "after the server's hello")
        write_pair(tmp_path, "other")
        live.server.reload()
        until(lambda: served_certificate(live.port) == ders["other"])
        assert TlsDoor(live.port, "", trusting("other")).call("GET", "/healthz").status == 200
        with standing.makefile("rb") as stream, stalled:
            standing.sendall(HEALTH)
            assert read_reply(stream) is not None
            stalled.shake()
            stalled.send(stalled.sealed(HEALTH))
            assert stalled.read().startswith(b"HTTP/1.1 200 ")


SPOILT_PAIRS = ["no certificate", "no key", "not PEM", "another's key", "half a certificate"]


def spoil_pair(folder: Path, how: str) -> None:
    certificate, key = folder / "tls.crt", folder / "tls.key"
    if how == "no certificate":
        certificate.unlink()
    elif how == "no key":
        key.unlink()
    elif how == "not PEM":
        certificate.write_bytes(ssl.PEM_cert_to_DER_cert(certificate_of("one")))
    elif how == "another's key":
        key.write_text(PAIRS["other"].partition(CERTIFICATE_END)[2])
    elif how == "half a certificate":
        certificate.write_text(certificate.read_text()[:300] + f"\n{CERTIFICATE_END}")


@pytest.mark.parametrize("how", SPOILT_PAIRS)
def test_a_bad_pair_is_said_in_one_line_and_the_old_one_stays(
    how: str, paths: Any, clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with reloadable(paths, clock) as live:
        spoil_pair(tmp_path, how)
        live.server.reload()
        until(lambda: caplog.records)
        assert TlsDoor(live.port, "").call("GET", "/healthz").status == 200
        (record,) = caplog.records
        assert record.levelname == "ERROR" and "\n" not in record.getMessage()
        assert "tls." in record.getMessage() and "stays" in record.getMessage()
        write_pair(tmp_path, "other")
        live.server.reload()
        other = ssl.PEM_cert_to_DER_cert(certificate_of("other"))
        until(lambda: served_certificate(live.port) == other)


def test_a_reload_without_tls_changes_nothing(paths: Any, clock: Clock) -> None:
    told: List[str] = []
    with LiveServer(paths, clock, notify=told.append) as live:
        for _ in range(3):
            live.server.reload()
            assert SocketDoor(live.port, "").call("GET", "/healthz").status == 200
        until(lambda: told[-1] == "READY=1" and len(told) >= 3)


LOADED: Dict[str, Tuple[str, str, str]] = {
    "no certificate": ("nowhere", "tls.key", "cannot read nowhere"),
    "no key": ("tls.crt", "nowhere", "cannot read nowhere"),
    "a folder": ("tls.crt", "folder", "folder is not a file"),
    "a folder as certificate": ("folder", "tls.key", "folder is not a file"),
    "an empty certificate": ("empty", "tls.key", "no PEM certificate in empty"),
    "bytes": ("bytes", "tls.key", "no PEM certificate in bytes"),
    "the key as certificate": ("tls.key", "tls.key", "no PEM certificate in tls.key"),
    "the certificate as key": ("tls.crt", "tls.crt", "tls.crt"),
    "an empty key": ("tls.crt", "empty", "empty"),
    "another's key": ("tls.crt", "other.key", "other.key is not the key of"),
    "a key of another kind": ("tls.crt", "ed25519.key", "ed25519.key is not the key of"),
    "a key with a password": ("tls.crt", "sealed.key", "password"),
}
SEALED_KEY = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAguCDoXhQqiDwICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEAQIEEDQ+rrNojG6t2UFw5cYmAbQEgZCG
ANNaVNmLVtJX+T5HhQRtmHJc5H5ET65/3lRoizTe67AC6YC8CHkElv3DPpraaZ5d
aEfPN3qFvbfBtPWCDcwNgukEcifLg6mgCy7VN6vyPkTjaUmoetISruSsCj5bcJfZ
THiJyNHz0re6V8KuhrC/twsoTRINZtRglZVOZglyQlJ9pOrg7FJKrlRD7+iydcw=
-----END ENCRYPTED PRIVATE KEY-----
"""
ED25519_KEY = """\
-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEIF9s8aWX3JPT+owS1+WfKEKYf7DWRPJ6lf+MYVK9RFLk
-----END PRIVATE KEY-----
"""


@pytest.mark.parametrize("case", LOADED.values(), ids=LOADED)
def test_a_pair_that_cannot_be_used_is_an_operators_trouble(
    case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key, said = case
    monkeypatch.chdir(tmp_path)
    write_pair(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    (tmp_path / "other.key").write_text(PAIRS["other"].partition(CERTIFICATE_END)[2])
    (tmp_path / "ed25519.key").write_text(ED25519_KEY)
    (tmp_path / "sealed.key").write_text(SEALED_KEY)
    with pytest.raises(hostenroll.OperatorError) as trouble:
        hostenroll.load_tls(certificate, key)
    assert said in str(trouble.value) and "\n" not in str(trouble.value)


PEM_FORMS: Dict[str, Callable[[str], str]] = {
    "as it is": lambda pem: pem,
    "with a text before it": lambda pem: f"subject=O = M\u00fcller\n{pem}",
    "with another behind it": lambda pem: pem + certificate_of("other"),
    "with lines that end in CR LF": lambda pem: pem.replace("\n", "\r\n"),
    "with its key": lambda pem: PAIRS["one"],
}


@pytest.mark.parametrize("form", PEM_FORMS.values(), ids=PEM_FORMS)
def test_a_certificate_is_read_as_openssl_reads_it(
    form: Callable[[str], str], tmp_path: Path
) -> None:
    certificate, key = write_pair(tmp_path)
    Path(certificate).write_bytes(form(certificate_of("one")).encode("utf-8"))
    context, leaf = hostenroll.load_tls(certificate, key)
    assert leaf == ssl.PEM_cert_to_DER_cert(certificate_of("one"))
    assert isinstance(context, ssl.SSLContext)


# Service managers.


def test_a_service_manager_is_told_when_the_server_answers_and_when_it_ends(
    paths: Any, clock: Clock
) -> None:
    told: List[str] = []
    with LiveServer(paths, clock, notify=told.append) as live:
        assert SocketDoor(live.port, "").call("GET", "/healthz").status == 200
        assert told == ["READY=1"]
    assert told == ["READY=1", "STOPPING=1"]


def test_a_reload_is_announced_and_its_end_too(paths: Any, clock: Clock) -> None:
    told: List[str] = []
    with LiveServer(paths, clock, notify=told.append) as live:
        until(lambda: told)
        before = time.monotonic()
        live.server.reload()
        until(lambda: len(told) == 3)
        state, moment = told[1].split("\n")
        assert state == "RELOADING=1" and told[2] == "READY=1"
        microseconds = int(moment.partition("MONOTONIC_USEC=")[2])
        assert before - 1 < microseconds / 1e6 <= time.monotonic()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def test_a_socket_that_somebody_else_has_bound_is_served(
    family: Any, paths: Any, clock: Clock
) -> None:
    listener = socket.socket(family)
    try:
        listener.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
    except OSError:
        listener.close()
        pytest.skip("this machine has no such address")
    port = listener.getsockname()[1]
    listener.listen(1)
    with LiveServer(paths, clock, listener=listener) as live:
        shown = "[::1]" if family == socket.AF_INET6 else "127.0.0.1"
        assert live.server.url == f"http://{shown}:{port}"
        with socket.create_connection((shown.strip("[]"), port), 10) as peer:
            peer.sendall(HEALTH)
            assert peer.recv(65536).startswith(b"HTTP/1.1 200 ")


# What refusals and the log call a request.


def test_a_refusal_names_its_request_and_nothing_else_does(
    live: SocketDoor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    wrong = request_bytes("GET", "/api/me", bearer="hak_nonsense")
    said = live.send(wrong + HEALTH + wrong + request_bytes("GET", "/nothing") + b"junk\r\n\r\n")
    assert [reply.status for reply in said] == [401, 200, 401, 404, 400]
    names = [reply.headers.get("x-request-id") for reply in said]
    assert names[1] is None and None not in names[2:]
    assert len(set(names)) == 5 and all(re.fullmatch("[0-9a-f]+-[0-9]+", n) for n in names if n)
    until(lambda: sum("api-key-invalid" in line for line in caplog.messages) == 2)
    logged = [r.__dict__["request"] for r in caplog.records if "api-key-invalid" in r.message]
    assert logged == [names[0], names[2]]


UNREADABLE: Dict[str, Tuple[bytes, int]] = {
    "a malformed head": (b"nonsense\r\n\r\n", 400),
    "a large body": (POST + b"Content-Length: 99999\r\n\r\n", 413),
    "a large head": (b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000, 431),
    "another version": (b"GET / HTTP/2.0\r\n\r\n", 505),
    "a method that is none": (b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    "an expectation": (b"GET / HTTP/1.1\r\nHost: a\r\nExpect: x\r\n\r\n", 417),
    "a protocol of its own": (b"\x16\x03\x01\x00\xa5\x01\x00\x00", 400),
}


@pytest.mark.parametrize("case", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_has_a_name_too(case: Any, live: SocketDoor) -> None:
    data, status = case
    said = live.send(HEALTH + data)
    assert [reply.status for reply in said] == [200, status]
    assert said[1].headers["x-request-id"].endswith("-2")


def test_no_two_requests_have_one_name(paths: Any, clock: Clock) -> None:
    """Not on one connection, not on two, not before and after a restart."""
    names: List[str] = []
    nothing = request_bytes("GET", "/nothing")
    for live_kind in (live_door, tls_door, live_door):
        with live_kind(paths, clock) as live:  # type: ignore[operator]
            for _ in range(3):
                names += [reply.headers["x-request-id"] for reply in live.send(nothing * 4)]
        clock.advance(1)
    assert len(names) == len(set(names)) == 36


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_defect_is_told_with_its_request_and_its_traceback(
    format: str, api: ApiDoor, clock: Clock
) -> None:
    formatter = hostenroll.JsonFormatter() if format == "json" else hostenroll.TextFormatter()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    hostenroll.log.addHandler(handler)
    try:

        def defect(now: int) -> None:
            raise ZeroDivisionError("by\nnothing")

        with pytest.raises(hostenroll.Internal):
            origin = hostenroll.Origin("192.0.2.7", "abc-1")
            api.registry.perform(Act(defect, origin=origin), clock.ms)
    finally:
        hostenroll.log.removeHandler(handler)
    if format == "text":
        assert "[abc-1]" in stream.getvalue() and "ZeroDivisionError" in stream.getvalue()
        return
    (line,) = stream.getvalue().splitlines()
    document = json.loads(line)
    assert (document["level"], document["request"]) == ("error", "abc-1")
    assert document["traceback"].startswith("Traceback") and "ZeroDivision" in document["traceback"]
    assert set(document) == {"time", "level", "message", "request", "traceback"}


def test_who_shakes_hands_is_not_kept_out_by_those_who_hold_too_much(
    paths: Tuple[str, str], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostenroll, "HELD_MAXIMUM", 60_000)
    head = b"POST /api/agent/enroll HTTP/1.1\r\nHost: a\r\nContent-Length: 59900\r\n\r\n"
    with tls_door(paths, clock) as door, door.connect() as holder:
        holder.sendall(head + b"x" * 59_800)
        holder.settimeout(0.05)
        answer = bytearray()

        def is_refused() -> bool:  # when the last of it has arrived, and somebody shakes hands
            assert door.call("GET", "/healthz").status == 200
            with contextlib.suppress(socket.timeout):
                answer.extend(holder.recv(65536))
            return b'"code":"overloaded"' in answer

        until(is_refused)


# The load of the benchmark, against servers that behave as they are told.


class ToyServer(threading.Thread):
    """Answers one request after the other, each connection in turn; what a request gets says
    reply, which may take its time."""

    def __init__(self, reply: Callable[[int], bytes], close: bool = False) -> None:
        super().__init__(daemon=True)
        self.reply, self.closes = reply, close
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        self.accepted = self.requests = 0
        self.stopped = False

    def run(self) -> None:
        peers = {self.listener}
        while not self.stopped:
            for ready in select.select(list(peers), [], [], 0.01)[0]:
                if ready is self.listener:
                    peer = self.listener.accept()[0]
                    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    peers.add(peer)
                    self.accepted += 1
                elif self._is_over(ready):
                    peers.remove(ready)
                    ready.close()
        for peer in peers:
            peer.close()

    def _is_over(self, peer: socket.socket) -> bool:
        try:
            return self._answer(peer)
        except ConnectionError:  # it has seen enough
            return True

    def _answer(self, peer: socket.socket) -> bool:
        """Answer a request; whether it is over with this peer."""
        data = peer.recv(65536)
        while data and not data.endswith(b"\r\n\r\n"):
            data += peer.recv(1 << 20)
        if data:
            assert data.count(b"\r\n\r\n") == 1  # never two outstanding
            self.requests += 1
            for part in self.reply(self.requests).partition(b"{"):  # in pieces
                peer.sendall(part)
        return self.closes or not data

    def __enter__(self) -> ToyServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped = True
        self.join(10)
        assert not self.is_alive()


FINE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def stalling(at: int, seconds: float) -> Callable[[int], bytes]:
    def reply(number: int) -> bytes:
        if number == at:
            time.sleep(seconds)  # what is tested: a server that stands still
        return FINE

    return reply


@contextlib.contextmanager
def load_on(port: int, clients: int, **options: Any) -> Iterator[hostenroll.Load]:
    load = hostenroll.Load(port, clients, **options)
    try:
        yield load
    finally:
        load.close()


def asking(path: str = "/") -> Iterator[bytes]:
    return itertools.repeat(request_bytes("GET", path))


def test_when_requests_are_paced_a_stall_is_felt_by_all_who_were_due_meanwhile() -> None:
    """200 a second for 0.5 s, and half of that time the server stands still."""
    took: List[float] = []
    with ToyServer(stalling(20, 0.25)) as server, load_on(server.port, 4) as load:
        done = load.run(asking(), 0.498, took.append, gaps=itertools.repeat(0.005))
    assert len(took) == done.answered == 100 and done.unanswered == 0
    late = sorted(second for second in took if second > 0.02)
    assert len(late) >= 40 and late[-1] >= 0.24
    assert late[len(late) // 2] == pytest.approx(0.125, abs=0.05)  # they were due all through it


@slow
def test_in_a_closed_loop_a_stall_is_felt_by_a_few() -> None:
    took: List[float] = []
    with ToyServer(stalling(20, 0.25)) as server, load_on(server.port, 4) as load:
        done = load.run(asking(), 0.4, took.append)
    assert done.answered == len(took) > 100
    assert 1 <= len([second for second in took if second > 0.2]) <= 4


def test_what_is_due_is_sent_at_its_time_though_nothing_else_happens() -> None:
    took: List[float] = []
    with ToyServer(lambda number: FINE) as server, load_on(server.port, 2) as load:
        done = load.run(asking(), 0.19, took.append, gaps=itertools.repeat(0.05))
    assert len(took) == 4 and 0.15 <= done.seconds < 0.4


@slow
def test_who_is_due_and_is_given_up_has_waited_all_that_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that answers 50 a second is asked for 500."""
    monkeypatch.setattr(hostenroll, "LOAD_PATIENCE", 0.1)

    def reply(number: int) -> bytes:
        time.sleep(0.02)
        return FINE

    took: List[float] = []
    with ToyServer(reply) as server, load_on(server.port, 2) as load:
        done = load.run(asking(), 0.199, took.append, gaps=itertools.repeat(0.002))
    assert done.unanswered > 50 and done.answered + done.unanswered == len(took) == 100
    assert max(took[: done.answered]) < min(0.45, done.seconds)
    assert all(second > 0.1 for second in took[done.answered :])


@pytest.mark.parametrize("close", [False, True], ids=["kept alive", "a connection each"])
def test_a_load_ends_with_its_requests_on_as_many_connections_as_it_is_to_have(close: bool) -> None:
    bodies: List[bytes] = []
    told: List[int] = []
    with (
        ToyServer(lambda number: FINE, close) as server,
        load_on(server.port, 8, close=close) as load,
    ):
        requests = itertools.islice(asking(), 100)
        done = load.run(requests, 10, abs, take=bodies.append, tell=told.append)
        assert done.answered == 100 == len(bodies) == server.requests and set(bodies) == {b"{}"}
        assert server.accepted == (100 if close else 8)
        assert done.seconds < 5


@pytest.mark.parametrize(
    ("reply", "word"),
    table(
        {
            "a refusal": (
                b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 6\r\n\r\n{\x1b[2J}",
                "503 Service Unavailable: {?[2J}",
            ),
            "a hang-up": (b"", "hung up"),
            "half an answer": (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "hung up"),
        }
    ),
)
def test_a_server_that_refuses_or_hangs_up_ends_the_load(reply: bytes, word: str) -> None:
    with ToyServer(lambda number: reply, close=True) as server, load_on(server.port, 2) as load:
        with pytest.raises(hostenroll.OperatorError) as ended:
            load.run(asking(), 5, abs)
    assert word in str(ended.value)


@slow
def test_a_server_that_answers_nothing_ends_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostenroll, "LOAD_PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with load_on(silent.getsockname()[1], 2) as load:
            with pytest.raises(hostenroll.OperatorError, match="answered nothing"):
                load.run(asking(), 30, abs)


@slow
def test_a_request_that_does_not_go_out_at_once_goes_out_whole() -> None:
    large = b"GET / HTTP/1.1\r\nX: " + b"x" * 5_000_000 + b"\r\n\r\n"
    with ToyServer(lambda number: FINE) as server, load_on(server.port, 2) as load:
        done = load.run(iter([large, large]), 10, abs)
    assert done.answered == 2 == server.requests


def test_a_client_whose_connection_was_closed_meanwhile_makes_another() -> None:
    took: List[float] = []
    with ToyServer(lambda number: FINE, close=True) as server, load_on(server.port, 1) as load:
        done = load.run(asking(), 0.19, took.append, gaps=itertools.repeat(0.05))
        assert done.answered == 4 == server.accepted


@pytest.mark.parametrize("close", [False, True], ids=["kept alive", "a connection each"])
def test_a_load_over_tls_trusts_one_certificate_alone(
    close: bool, paths: Tuple[str, str], clock: Clock, tmp_path: Path
) -> None:
    other = tmp_path / "other.crt"
    other.write_text(certificate_of("other"))
    end = [("Connection", "close")] if close else []
    with tls_door(paths, clock) as door:
        mine = hostenroll.trusting(str(tmp_path / "tls.crt"))
        with load_on(door.port, 4, close=close, tls=mine) as load:
            requests = itertools.repeat(request_bytes("GET", "/healthz", headers=end), 20)
            bodies: List[bytes] = []
            assert load.run(requests, 10, abs, take=bodies.append).answered == 20
            assert {json.loads(body)["status"] for body in bodies} == {"ok"}
        with load_on(door.port, 1, tls=hostenroll.trusting(str(other))) as load:
            with pytest.raises(ssl.SSLCertVerificationError):
                load.run(asking("/healthz"), 10, abs)


# 11. Command line


class Operator:
    """An operator who types commands in one folder, without a process for each."""

    def __init__(self, folder: Path, clock: Clock, capsys: Any) -> None:
        self.folder, self.clock, self.capsys = folder, clock, capsys
        self.environment: Dict[str, str] = {}

    def __call__(self, *arguments: str) -> SimpleNamespace:
        files = ["--db", str(self.folder / "hostenroll.db")]
        stored = bool(arguments) and arguments[0] in STORED
        stored = stored and not {"--db", "--help"} & set(arguments)
        argv = [*arguments, *(files if stored and not self.environment else [])]
        self.capsys.readouterr()
        try:
            status = hostenroll.main(argv, environment=self.environment, clock=self.clock)
        except SystemExit as usage:
            status = usage.code
        out, err = self.capsys.readouterr()
        assert "Traceback" not in err
        return SimpleNamespace(status=status, out=out, err=err)


@pytest.fixture
def operator(tmp_path: Path, clock: Clock, capsys: Any) -> Operator:
    return Operator(tmp_path, clock, capsys)


COMMANDS = [command.name for command in hostenroll.COMMANDS]
STORED = [command.name for command in hostenroll.COMMANDS if command.uses_store]


def test_a_token_stands_alone_on_stdout(operator: Operator) -> None:
    minted = operator("mint-token")
    assert minted.status == 0
    assert re.fullmatch(r"het_[0-9a-f]{16}_[A-Za-z0-9_-]{51}\n", minted.out)
    number = minted.out.split("_")[1]
    assert f"token {number} of default: 1 use, until 2027-01-15T09:00:00.000Z" in minted.err
    assert "/agent.sh" in minted.err and number in minted.err.partition("printf %s ")[2]
    key = operator("mint-api-key")
    assert re.fullmatch(r"hak_[0-9a-f]{16}_[A-Za-z0-9_-]{51}\n", key.out)
    assert "admin of default" in key.err


@needs_curl
def test_the_line_that_mint_token_says_enrolls_when_a_shell_runs_it(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server:
        line = printed_command(tmp_path)
        assert f"--server {server.url} " in line
        done = joined(tmp_path, line)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
    [host] = json.loads(cli(tmp_path, "list-hosts", "--json").stdout)["hosts"]
    assert (host["name"], host["status"]) == (os.uname().nodename, "online")


def test_json_has_the_shapes_of_the_api(operator: Operator) -> None:
    minted = json.loads(operator("mint-token", "--json", "--label", "rack=b4").out)
    assert set(minted) == TOKEN | {"token"} and minted["labels"] == {"rack": "b4"}
    number = minted["id"]
    registry = open_registry(
        str(operator.folder / "hostenroll.db"),
        str(operator.folder / "hostenroll.key"),
        operator.clock.ms,
    )
    host = ApiDoor(registry, operator.clock).enroll(minted["token"]).document["hostId"]
    registry.close()
    token = json.loads(operator("show-token", number, "--json").out)
    assert set(token) == TOKEN and token["hosts"] == [host]
    assert json.loads(operator("list-tokens", "--json").out) == {
        "tokens": [token],
        "nextCursor": None,
    }
    shown = json.loads(operator("show-host", host, "--json").out)
    assert set(shown) == HOST
    assert json.loads(operator("list-hosts", "--json").out)["hosts"] == [shown]
    edited = json.loads(operator("edit-host", host, "--name", "K\u00fcche", "--json").out)
    assert edited == {**shown, "name": "K\u00fcche"}
    again = json.loads(operator("reenroll-host", host, "--json").out)
    assert set(again) == TOKEN | {"token"} and again["hostId"] == host
    listed = json.loads(operator("list-orgs", "--json").out)["organizations"]
    assert {organization["id"] for organization in listed} == {"default"}
    key = json.loads(operator("mint-api-key", "--json", "--role", "viewer").out)
    listed = json.loads(operator("list-api-keys", "--json").out)["apiKeys"]
    assert [{**one, "apiKey": key["apiKey"]} for one in listed if one["role"] == "viewer"] == [key]
    for text in (minted["token"], key["apiKey"]):
        for command in ("list-tokens", "list-api-keys", "list-hosts"):
            assert text not in operator(command, "--json").out


def test_tables_are_aligned_and_say_the_same(operator: Operator) -> None:
    assert operator("list-hosts").out.split() == [
        "ID", "NAME", "STATUS", "LAST", "SEEN", "LABELS", "HOSTNAME", "ORG"]  # fmt: skip
    assert operator("list-hosts").err == "no host yet: mint-token says how one comes in\n"
    assert operator("list-hosts", "--q", "web").err == "no such host\n"
    assert operator("list-tokens", "--state", "used").err == "no such token\n"
    assert operator("list-hosts", "--json").err == ""
    for n in range(3):
        operator("mint-token", "--description", "x" * n * 9, "--max-uses", str(10**n))
    assert operator("list-tokens", "--limit", "1").out.count("\n") == 2
    lines = operator("list-tokens").out.rstrip("\n").split("\n")
    assert len(lines) == 4
    at = lines[0].index("STATE")
    assert {line[at : at + 6] for line in lines[1:]} == {"valid "}
    shown = operator("show-token", lines[1].split()[0]).out
    assert re.search(r"^state: +valid$", shown, re.MULTILINE)


def test_the_life_of_a_host_on_the_command_line(operator: Operator) -> None:
    token = operator("mint-token").out.strip()
    files = [str(operator.folder / f"hostenroll.{end}") for end in ("db", "key")]
    registry = open_registry(*files, operator.clock.ms)
    host = ApiDoor(registry, operator.clock).enroll(token).document["hostId"]
    registry.close()
    for command, status in (("revoke-host", "revoked"), ("restore-host", "pending")):
        for _ in range(2):
            assert operator(command, host).status == 0
            assert json.loads(operator("show-host", host, "--json").out)["status"] == status
    assert operator("edit-host", host, "--label", "a=b", "--label", "c=").status == 0
    for arguments, count in (
        (("--label", "a=b"), 1), (("--label", "a=x"), 0), (("--q", "WEB"), 1), (("--q", "xx"), 0),
        (("--status", "online"), 0), (("--org", "default"), 1), (("--limit", "1"), 1),
    ):  # fmt: skip
        assert len(json.loads(operator("list-hosts", "--json", *arguments).out)["hosts"]) == count
    assert [operator("delete-host", host).status for _ in range(2)] == [0, 3]
    number = token.split("_")[1]
    assert [operator("revoke-token", number).status for _ in range(2)] == [0, 0]
    assert json.loads(operator("list-tokens", "--state", "valid", "--json").out)["tokens"] == []


DURATIONS: Dict[str, Optional[int]] = {
    "60": 60, "60s": 60, "90s": 90, "30m": 1800, "24h": 86400, "7d": 604800, "30d": 2592000,
    "001h": 3600, "": None, "h": None, "1w": None, "1.5h": None, "-1h": None, "+1h": None,
    "1 h": None, "1H": None, "1h30m": None, "1_0m": None, "\u0661h": None, "1e2": None,
    "9" * 30: None, "60s\n": None,
}  # fmt: skip


@pytest.mark.parametrize("text", DURATIONS, ids=repr)
def test_how_durations_are_written(text: str, operator: Operator) -> None:
    minted = operator("mint-token", f"--ttl={text}", "--json")
    if DURATIONS[text] is None:
        assert (minted.status, minted.out) == (2, "")
        return
    expires = hostenroll.rfc3339(operator.clock.ms + int(DURATIONS[text] or 0) * 1000)
    assert json.loads(minted.out)["expiresAt"] == expires


UNKNOWN = "0ca4f1b28e3d7a95"
STATUSES: Dict[str, Tuple[int, str, Tuple[str, ...]]] = {
    "an unknown command": (2, "did you mean list-hosts?", ("lst-hosts",)),
    "a part of a command": (2, "did you mean mint-token or mint-api-key?", ("mint",)),
    "a command like no other": (2, "no command xyzzy (see: hostenroll.py --help)", ("xyzzy",)),
    "an unknown option": (
        2,
        "takes no option --nope (see: hostenroll.py mint-token --help)",
        ("mint-token", "--nope"),
    ),
    "a part of an option": (2, "did you mean --max-uses?", ("mint-token", "--max", "3")),
    "an argument too many": (2, "takes no argument berlin", ("list-orgs", "berlin")),
    "a missing id": (2, "needs ID (see: hostenroll.py show-host --help)", ("show-host",)),
    "a state that is none": (
        2,
        "not one of valid, used, expired, revoked",
        ("list-tokens", "--state", "dead"),
    ),
    "a label without =": (2, "--label: ", ("mint-token", "--label", "x")),
    **{
        f"{name} is --": (2, f"--{name}: -- is no value", (command, f"--{name}=--"))
        for command, name in (
            ("mint-token", "label"),
            ("mint-token", "db"),
            ("list-tokens", "limit"),
            ("list-tokens", "state"),
            ("verify-audit", "head"),
            ("serve", "port"),
        )
    },
    **{
        f"an empty {name}": (2, f"--{name}: ", ("serve", "--port", "0", f"--{name}", ""))
        for name in ("db", "key-file", "tls-cert", "tls-key", "host")
    },
    "an escape sequence": (1, "no folder", ("list-orgs", "--db", "x\x1b[31m\ny/z")),
    "a novel": (1, "no folder", ("list-orgs", "--db", f"{'x' * 200}/" * 100 + "y")),
    "a label twice": (
        2,
        "--label: a comes twice (see: hostenroll.py mint-token --help)",
        ("mint-token", "--label", "a=b", "--label", "a=c"),
    ),
    "a label twice, to have": (
        2,
        "--label: a comes twice",
        ("edit-host", UNKNOWN, "--label", "a=b", "--label", "a=b"),
    ),
    "labels and none": (
        2,
        "--no-labels does not go with --label (see: hostenroll.py edit-host --help)",
        ("edit-host", UNKNOWN, "--no-labels", "--label", "a=b"),
    ),
    "one organization and all": (
        2,
        "--org does not go with --all-orgs (see: hostenroll.py mint-api-key --help)",
        ("mint-api-key", "--org", "default", "--all-orgs"),
    ),
    "an option before the command": (
        2,
        "options come after the command: hostenroll.py list-hosts --json ",
        ("--json", "list-hosts"),
    ),
    "one with a value": (
        2,
        "options come after the command: hostenroll.py list-hosts --db ",
        ("--db", "x.db", "list-hosts"),
    ),
    "one with its value in it": (
        2,
        "options come after the command: hostenroll.py COMMAND --db ",
        ("--db=x.db",),
    ),
    "an address of bytes": (
        2,
        "--host: '\\udcff' is not an address or a name",
        ("serve", "--port", "0", "--host", "\udcff"),
    ),
    "an address of two lines": (
        2,
        "--host: 'a\\nb' is not an address or a name",
        ("serve", "--port", "0", "--host", "a\nb"),
    ),
    "a certificate alone": (
        2,
        "--tls-cert and --tls-key go together",
        ("serve", "--port", "0", "--tls-cert", "x"),
    ),
    "no days": (
        2,
        "--days: 0 is out of bounds: 1 to 36500",
        ("make-cert", "--name", "a", "--days", "0"),
    ),
    "days beyond all calendars": (
        2,
        "--days: 36501 is out of bounds: 1 to 36500",
        ("make-cert", "--name", "a", "--days", "36501"),
    ),
    "a port": (2, "--port: '65536' is not a port", ("serve", "--port", "65536")),
    "a role": (2, "not one of admin, viewer", ("mint-api-key", "--role", "root")),
    "no interval": (2, "out of bounds", ("serve", "--heartbeat-interval", "0s")),
    "a short time": (3, "--ttl", ("mint-token", "--ttl", "59s")),
    "a long time": (3, "--ttl", ("mint-token", "--ttl", "31d")),
    "no uses": (3, "--max-uses", ("mint-token", "--max-uses", "0")),
    "a bad hostname": (3, "hostname", ("mint-token", "--hostname", "a b")),
    "a description that rings": (3, "description", ("mint-token", "--description", "\a")),
    "a key's that rings": (3, "description", ("mint-api-key", "--description", "\a")),
    "an unknown organization": (3, "organization", ("mint-token", "--org", "nope")),
    "an unknown one for a key": (3, "organization", ("mint-api-key", "--org", "nope")),
    "an unknown one in a list": (3, "organization", ("list-hosts", "--org", "nope")),
    "one that is there": (3, "conflict", ("add-org", "default")),
    **{
        f"bytes for {option} of {command[0]}": (
            3,
            f"): {option}: must not ",
            (*command, *([option] if option.startswith("--") else []), "\udcff"),
        )
        for option, *command in (
            ("--q", "list-hosts"),
            ("--subject", "show-audit"),
            ("--code", "show-audit"),
            ("--name", "edit-host", UNKNOWN),
            ("--description", "mint-api-key"),
            ("--hostname", "mint-token"),
        )
    },
    **{
        f"no slug for {option} of {command[0]}": (
            3,
            f"): {option}: must be ",
            (*command, *([option] if option.startswith("--") else []), "a b"),
        )
        for option, *command in (
            ("NAME", "add-org"),
            ("--org", "mint-token"),
            ("--org", "list-tokens"),
            ("--org", "list-hosts"),
            ("--org", "show-audit"),
        )
    },
    "an unknown token": (3, "not-found", ("show-token", UNKNOWN)),
    "an unknown token to revoke": (3, "not-found", ("revoke-token", UNKNOWN)),
    "an unknown host": (3, "not-found", ("show-host", UNKNOWN)),
    "an unknown host to edit": (3, "not-found", ("edit-host", UNKNOWN, "--name", "x")),
    "an unknown host to revoke": (3, "not-found", ("revoke-host", UNKNOWN)),
    "an unknown host to restore": (3, "not-found", ("restore-host", UNKNOWN)),
    "an unknown host to delete": (3, "not-found", ("delete-host", UNKNOWN)),
    "an unknown host to re-enroll": (3, "not-found", ("reenroll-host", UNKNOWN)),
    "an unknown API key": (3, "not-found", ("revoke-api-key", UNKNOWN)),
    "no id at all": (3, "(not-found)", ("show-host", "'; DROP TABLE host")),
}
ENDS = {
    "no uses": STATUSES["no uses"],
    "an address of nobody": (1, "cannot listen", ("serve", "--port", "0", "--host", "203.0.113.1")),
    "no address": (1, "cannot listen", ("serve", "--port", "0", "--host", "a..b")),
}


def require_one_line(case: Any, status: int, out: str, err: str) -> None:
    wanted, word, _ = case
    assert (status, out) == (wanted, "")
    said = err.splitlines()
    assert len(said) == 1 and said[0].startswith("hostenroll: ") and len(said[0]) < 1100
    assert not hostenroll.UNPRINTABLE.search(said[0])
    assert word in said[0] and "argument --" not in said[0]


@pytest.mark.parametrize(
    "words",
    [
        ("mint-token", "--ttl"), ("list-tokens", "--state"), ("serve", "--public-url"),
        ("serve", "--port"), ("verify-audit", "--head"), ("mint-api-key", "--role"),
        ("mint-token", "--db"), ("serve", "--trusted-proxy"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_secret_that_is_typed_in_the_place_of_something_else_is_not_shown(
    words: Tuple[str, ...], operator: Operator
) -> None:
    secret = operator("mint-token").out.strip()
    done = operator(*words, f"{secret}/x")
    assert done.status in (1, 2) and secret[:20] in done.err and secret[22:] not in done.err


def test_who_types_no_command_is_shown_them_all(operator: Operator, tmp_path: Path) -> None:
    done = cli(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == operator("--help").out


@pytest.mark.parametrize("case", STATUSES.values(), ids=STATUSES)
def test_what_is_refused_is_said_in_one_line_and_a_status(case: Any, operator: Operator) -> None:
    done = operator(*case[2])
    require_one_line(case, done.status, done.out, done.err)


@pytest.mark.parametrize("case", ENDS.values(), ids=ENDS)
def test_a_process_ends_with_the_status_of_its_command(case: Any, tmp_path: Path) -> None:
    done = cli(tmp_path, *case[2])
    require_one_line(case, done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_has_an_example_and_fits_80_columns(
    name: str, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = operator(name, "--help")
    (command,) = (command for command in hostenroll.COMMANDS if command.name == name)
    assert said.status == 0 and said.out.startswith(f"usage: hostenroll.py {name} [options]")
    assert f"\nexample: hostenroll.py {command.example}\n" in said.out
    assert command.example.split()[0] == name
    assert "exit status: 0 done, 1 failed, 2 usage, 3 refused" in said.out
    assert max(map(len, said.out.splitlines())) <= 80


@slow
def test_every_example_in_the_help_does_what_it_says(
    operator: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "nice", lambda niceness: 0)  # it would stay, in this process
    (tmp_path / "var/backups").mkdir(parents=True)
    operator("add-org", "berlin")
    for command in hostenroll.COMMANDS:
        words = command.example.split()
        assert hostenroll.read_arguments(words, {}).command is command
        if command.operands == ["ID"]:
            words[1] = an_id(operator, command.listed_by)
        elif command.name == "retire-signing-key":
            listed = json.loads(operator("list-signing-keys", "--json").out)["signingKeys"]
            words[1:] = [listed[1]["kid"], "--force"]  # a day's replies are on their way
        elif command.name == "add-org":
            words[1] = "hamburg"
        elif command.name == "backup":
            words[1] = words[1].lstrip("/")
        if command.name not in RUN_ELSEWHERE:
            done = operator(*words)
            assert done.status == 0, (words, done.err)


def an_id(operator: Operator, kind: str) -> str:
    """That of a fresh thing of those that a command lists."""
    if kind == "list-api-keys":
        return operator("mint-api-key").out.split("_")[1]
    token = operator("mint-token").out.strip()
    if kind == "list-tokens":
        return token.split("_")[1]
    with opened(files_of(operator), operator.clock) as registry:
        return str(ApiDoor(registry, operator.clock).enroll(token).document["hostId"])


LIKE_AN_ID: Dict[str, Tuple[str, Callable[[str], str], str]] = {
    "the start of an id": (
        "show-host",
        lambda number: number[:12],
        "perhaps you mean {id} (web-1).",
    ),
    "an id in capitals": ("revoke-host", str.upper, "perhaps you mean {id} (web-1)."),
    "the name of a host": ("show-host", lambda number: "web-1", "perhaps you mean {id} (web-1)."),
    "a part of its name": ("delete-host", lambda number: "WEB", "perhaps you mean {id} (web-1)."),
    "an id as the log has it": ("edit-host", "host:{}".format, "perhaps you mean {id} (web-1)."),
    "the start of a token's": ("show-token", lambda number: number[:12], "perhaps you mean {id}."),
    "a token's in capitals": ("revoke-token", str.upper, "perhaps you mean {id}."),
    "the start of an API key's": (
        "revoke-api-key",
        lambda number: number[:12],
        "perhaps you mean {id}.",
    ),
    "nothing like any": ("show-host", lambda number: "nothing", "no id 'nothing'. See: list-hosts"),
    "nothing like a token's": ("show-token", lambda number: "x", "no id 'x'. See: list-tokens"),
    "another's id": ("restore-host", lambda number: UNKNOWN, "host with this id. See: list-hosts"),
    "no token's id": ("revoke-token", lambda number: UNKNOWN, "with this id. See: list-tokens"),
    "no key's id": ("revoke-api-key", lambda number: UNKNOWN, "with this id. See: list-api-keys"),
}


@pytest.mark.parametrize("command, typed, said", LIKE_AN_ID.values(), ids=LIKE_AN_ID)
def test_who_types_what_is_not_an_id_is_told_what_to_type(
    command: str, typed: Callable[[str], str], said: str, operator: Operator
) -> None:
    (kind,) = {c.listed_by for c in hostenroll.COMMANDS if c.name == command}
    number = an_id(operator, kind)
    before = operator(kind, "--json").out
    refused = operator(command, typed(number))
    assert (refused.status, refused.out, refused.err.count("\n")) == (3, "", 1)
    assert said.format(id=number) in refused.err
    assert before == operator(kind, "--json").out


def test_of_many_that_are_alike_none_is_meant(operator: Operator) -> None:
    for _ in range(4):
        number = an_id(operator, "list-hosts")
        refused = operator("show-host", "web")
    assert "perhaps" not in refused.err and "See: list-hosts" in refused.err
    operator("delete-host", number)
    assert operator("show-host", "web").err.count(" or ") == 2


@pytest.mark.parametrize("command", ["show-token", "revoke-token", "show-host", "revoke-api-key"])
def test_a_secret_in_the_place_of_an_id_is_not_repeated(command: str, operator: Operator) -> None:
    for mint in ("mint-token", "mint-api-key"):
        text = operator(mint).out.strip()
        refused = operator(command, text)
        assert refused.status == 3 and f"Its id is {text.split('_')[1]}." in refused.err
        assert text[21:] not in refused.err
        mistyped = operator(text)
        assert mistyped.status == 2 and text[21:] not in mistyped.err
        mistyped = operator("list-hosts", text)
        assert mistyped.status == 2 and text[21:] not in mistyped.err


WITHOUT_JSON = ("serve", "unit", "schema", "openapi", "agent-script")  # texts, stored as they are
RUN_ELSEWHERE = ("serve", "make-cert", "bench")  # they run on, or need openssl


def test_every_command_that_says_something_says_it_in_json_too(
    operator: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "nice", lambda niceness: 0)
    said: Dict[str, Any] = {}
    for command in hostenroll.COMMANDS:
        if command.name in (*WITHOUT_JSON, "bench"):
            continue
        if command.name == "make-cert" and shutil.which("openssl") is None:
            continue
        words = command.example.split()
        if command.operands == ["ID"]:
            words[1] = an_id(operator, command.listed_by)
        elif command.name == "retire-signing-key":
            words[1:] = [said["list-signing-keys"]["signingKeys"][0]["kid"], "--force"]
        elif command.name == "backup":
            words[1] = "copy"
        done = operator(*words, "--json")
        assert (done.status, done.err) == (0, ""), words
        said[command.name] = json.loads(done.out)
    assert (said["revoke-token"]["state"], set(said["revoke-token"])) == ("revoked", TOKEN)
    assert (said["revoke-host"]["status"], set(said["revoke-host"])) == ("revoked", HOST)
    assert (said["restore-host"]["status"], set(said["restore-host"])) == ("pending", HOST)
    assert re.fullmatch("[0-9a-f]{16}", said["delete-host"].pop("id")) and said["delete-host"] == {}
    assert said["add-org"]["id"] == "berlin"
    assert said["revoke-api-key"]["revokedAt"] and set(said["revoke-api-key"]) == {
        *said["list-api-keys"]["apiKeys"][0]}  # fmt: skip
    assert said["rotate-signing-key"]["state"] == "signs"
    assert (
        said["retire-signing-key"]["state"] == "retired" and said["retire-signing-key"]["hosts"] > 0
    )
    assert set(said["verify-audit"]) == {"head", "first", "last", "unverified"}
    files = {"database": "copy/hostenroll.db", "keyFile": "copy/hostenroll.key"}
    assert said["backup"] == {name: str(tmp_path / file) for name, file in files.items()}
    if "make-cert" in said:
        pair = said["make-cert"]["certificate"], said["make-cert"]["key"]
        assert said["make-cert"]["pin"] == hostenroll.public_key_pin(hostenroll.load_tls(*pair)[1])


def test_a_setting_that_is_none_is_pointed_out(tmp_path: Path) -> None:
    names = {"HOSTENROLL_PROT": "1", "HOSTENROLL_X\x1b": "", "HOSTENROLL_PORT": "8080"}
    done = cli(tmp_path, "list-orgs", env=names)
    nothing = "in the environment sets nothing"
    assert done.returncode == 0 and done.stderr.splitlines() == [
        f"hostenroll: HOSTENROLL_PROT {nothing}; did you mean HOSTENROLL_PORT?",
        f"hostenroll: HOSTENROLL_X? {nothing}",
    ]
    with JsonServerProcess(tmp_path, "--log-format", "json", env={"HOSTENROLL_DBB": "x"}) as server:
        server.terminate()
        lines = [json.loads(line) for line in server.said]
    assert [line["message"] for line in lines if line["level"] == "warning"] == [
        "HOSTENROLL_DBB in the environment sets nothing; did you mean HOSTENROLL_DB?"
    ]


def test_version_and_an_overview(operator: Operator) -> None:
    assert operator("--version").out == f"hostenroll {hostenroll.__version__}\n"
    overview = operator("--help").out
    summaries = re.findall(r"^  ([a-z]\S+) +(.+)$", overview, re.MULTILINE)
    assert sorted(summaries) == sorted((c.name, c.summary) for c in hostenroll.COMMANDS)
    grouped = [name for names in hostenroll.GROUPS.values() for name in names]
    assert len(grouped) == len(set(grouped)) and set(grouped) < set(COMMANDS)
    assert max(map(len, overview.splitlines())) <= 80
    assert overview.endswith("\nexit status: 0 done, 1 failed, 2 usage, 3 refused\n")


def test_organizations_are_added_once_and_by_slugs(operator: Operator) -> None:
    assert [operator("add-org", "berlin").status for _ in range(2)] == [0, 3]
    for bad in ("", "a b", "\u00fc", "x" * 65, "a/b", "_x"):
        assert operator("add-org", bad).status in (1, 2, 3)
    assert [line.split()[0] for line in operator("list-orgs").out.splitlines()] == [
        "ID", "berlin", "default"]  # fmt: skip
    minted = json.loads(operator("mint-token", "--org", "berlin", "--json").out)
    assert minted["organizationId"] == "berlin"


def test_the_environment_sets_files_and_the_options_of_serve(tmp_path: Path) -> None:
    environment = {
        "HOSTENROLL_DB": str(tmp_path / "a.db"), "HOSTENROLL_KEY_FILE": str(tmp_path / "b.key"),
        "HOSTENROLL_HEARTBEAT_INTERVAL": "7s", "HOSTENROLL_CREDENTIAL_TTL": "1h",
        "HOSTENROLL_ORG": "nope", "HOSTENROLL_TTL": "x", "HOSTENROLL_PORT": "1",
    }  # fmt: skip
    token = cli(tmp_path, "mint-token", env=environment).stdout.strip()
    files = {path.name for path in tmp_path.iterdir()}
    assert {"a.db", "b.key"} <= files and "hostenroll.key" not in files
    with ServerProcess(tmp_path, env=environment) as server:  # which has --port 0
        enrolled = SocketDoor(server.port, "").enroll(token).document
        assert enrolled["heartbeatIntervalSeconds"] == 7
        assert enrolled["credentialExpiresAt"] is not None
    with ServerProcess(tmp_path, "--heartbeat-interval", "9s", env=environment) as server:
        token = cli(tmp_path, "mint-token", env=environment).stdout.strip()
        enrolled = SocketDoor(server.port, "").enroll(token).document
        assert enrolled["heartbeatIntervalSeconds"] == 9
    assert cli(tmp_path, "list-tokens", "--db", "other.db").returncode == 0
    assert (tmp_path / "other.db").exists() and (tmp_path / "hostenroll.key").exists()


def test_what_is_wrong_is_called_by_where_it_was_said(tmp_path: Path) -> None:
    environment = {"HOSTENROLL_PORT": "x"}
    for options, said in (
        ((), "HOSTENROLL_PORT: 'x' is not a port"),
        (("--port", "y"), "--port: 'y' is not a port"),
        (("--port=y",), "--port: 'y' is not a port"),
        (("--port", "0", "--heartbeat-interval", "z"), "--heartbeat-interval: 'z' is not"),
    ):
        bad = cli(tmp_path, "serve", *options, env=environment)
        assert (bad.returncode, bad.stderr.startswith(f"hostenroll: {said}")) == (2, True)
        assert bad.stderr.count("\n") == 1


def spoil(folder: Path, how: str) -> None:
    database, key = folder / "hostenroll.db", folder / "hostenroll.key"
    if how == "no key file":
        key.unlink()
    elif how == "no database":
        database.unlink()
    elif how == "an empty database":
        database.write_bytes(b"")
    elif how == "a database that is none":
        database.write_bytes(b"nonsense" * 1000)
    elif how == "the database of another program":
        database.unlink()
        sql(str(database), "CREATE TABLE t (x)")
    elif how == "a database from the future":
        sql(str(database), "PRAGMA user_version = 99")
    elif how == "a key file that others can read":
        key.chmod(0o644)
    elif how == "a key file that is none":
        key.write_text("[]")
    elif how == "another's key file":
        hostenroll.write_key_file(str(key), hostenroll.new_keyring())


MENDED = ("no key file", "no database", "an empty database", "another's key file")
SPOILT = (
    *MENDED, "a database that is none", "the database of another program",
    "a database from the future", "a key file that others can read", "a key file that is none",
)  # fmt: skip


@slow
@pytest.mark.parametrize("how", SPOILT)
def test_a_database_and_its_key_file_belong_together(how: str, tmp_path: Path) -> None:
    assert cli(tmp_path, "mint-token").returncode == 0
    spoil(tmp_path, how)
    for command in (("mint-token",), ("list-hosts",), ("serve", "--port", "0")):
        refused = cli(tmp_path, *command)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.startswith("hostenroll: ") and refused.stderr.count("\n") == 1
        assert "hostenroll." in refused.stderr.split(" ", 1)[1]
    if how in MENDED:
        assert "serve --init" in refused.stderr
        with ServerProcess(tmp_path, "--init") as server:
            assert server.terminate() == 0
        assert cli(tmp_path, "mint-token").returncode == 0


@pytest.mark.parametrize("path", ["nowhere/a.db", "file/a.db", "folder", "folder/"])
def test_a_place_that_is_none_is_said_in_one_line(path: str, operator: Operator) -> None:
    (operator.folder / "file").write_text("")
    (operator.folder / "folder").mkdir()
    refused = operator("mint-token", "--db", f"{operator.folder}/{path}")
    assert (refused.status, refused.out) == (1, "")
    assert refused.err.startswith("hostenroll: ") and refused.err.count("\n") == 1


def test_a_port_that_is_taken_is_said_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        refused = cli(tmp_path, "serve", "--port", str(port))
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    is_told("port taken", refused.stderr.splitlines())
    assert f"port {port}" in refused.stderr and "--port" in refused.stderr


def test_serve_says_where_it_listens_and_warns_when_others_can_hear(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server:
        assert server.port > 0
        assert f"listens on {server.url}\n" in "".join(server.said)
        server.terminate()
    assert "WARNING" not in "".join(server.said)
    with ServerProcess(tmp_path, "--host", "0.0.0.0") as server:
        assert SocketDoor(server.port, "").call("GET", "/healthz").status == 200
        server.terminate()
    assert "without TLS" in "".join(server.said)


def test_commands_work_before_a_server_ran_while_it_runs_and_after(tmp_path: Path) -> None:
    first = cli(tmp_path, "mint-token").stdout.strip()
    with ServerProcess(tmp_path) as server:
        door = SocketDoor(server.port, "")
        second = cli(tmp_path, "mint-token").stdout.strip()
        enrolled = [door.enroll(token).document for token in (first, second)]
        assert cli(tmp_path, "revoke-host", enrolled[0]["hostId"]).returncode == 0
        assert door.beat(enrolled[0]["credential"]).code == "host-revoked"
        assert cli(tmp_path, "delete-host", enrolled[1]["hostId"]).returncode == 0
        assert door.beat(enrolled[1]["credential"]).code == "host-unknown"
    assert len(cli(tmp_path, "list-hosts").stdout.splitlines()) == 2


def test_first_commands_that_race_make_one_database(tmp_path: Path) -> None:
    minted = many(6, lambda n: cli(tmp_path, "mint-token"))
    assert [done.returncode for done in minted] == [0] * 6
    assert len({done.stdout for done in minted}) == 6
    assert len(json.loads(cli(tmp_path, "list-tokens", "--json").stdout)["tokens"]) == 6
    assert stat.S_IMODE((tmp_path / "hostenroll.key").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "arguments",
    sample(
        {
            f"--{name}": ((f"--{name}", b"k=\xff"),)
            for name in ("description", "label", "hostname", "org")
        },
        "--label",
    ),
)
def test_bytes_that_are_no_text_are_refused_and_break_nothing(
    arguments: Any, tmp_path: Path
) -> None:
    command = [*PROGRAM, "mint-token", "--json", *arguments]
    done = subprocess.run(command, cwd=str(tmp_path), env=clean_environment(), capture_output=True)
    assert done.returncode in (2, 3) and b"Traceback" not in done.stderr
    for more in ("--json", None):
        listed = cli(tmp_path, "list-tokens", *filter(None, [more]))
        assert listed.returncode == 0
        assert listed.stderr == ("" if more else "no token yet: mint-token makes one\n")


def test_a_database_may_lie_at_a_path_of_any_bytes(tmp_path: Path) -> None:
    for name in (b"a b%3f?#.db", b"\xff.db"):
        files = ["--db", name, "--key-file", name + b"k"]
        command = [*PROGRAM, "mint-token", *files]
        done = subprocess.run(command, cwd=str(tmp_path), capture_output=True)
        assert b"Traceback" not in done.stderr
        assert done.returncode == 0 and os.path.exists(os.fsencode(tmp_path) + b"/" + name)


def test_a_terminal_that_knows_few_letters_shows_the_others_somehow(tmp_path: Path) -> None:
    """A host names itself: it must not be able to break the operator's list."""
    with ServerProcess(tmp_path) as server:
        token = cli(tmp_path, "mint-token").stdout.strip()
        SocketDoor(server.port, "").enroll(token, name="\u65e5\u672c")
    for more in ((), ("--json",)):
        listed = cli(tmp_path, "list-hosts", *more, env={"PYTHONIOENCODING": "ascii"})
        assert (listed.returncode, listed.stderr) == (0, "") and "web-1" in listed.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_what_cannot_be_printed_is_a_failure_in_one_line(tmp_path: Path) -> None:
    for command in ("mint-token", "list-orgs", "schema", "--help"):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*PROGRAM, command], cwd=str(tmp_path), stdout=full,
                stderr=subprocess.PIPE, text=True, env=clean_environment(),
            )  # fmt: skip
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("hostenroll: ")
        assert done.returncode == 1


@contextlib.contextmanager
def pseudo_terminal(columns: int = 80) -> Iterator[Tuple[Any, Callable[[], str]]]:
    """A stream to a terminal that is so wide, and what the terminal has been sent so far."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    settings = termios.tcgetattr(its)
    settings[1] &= ~termios.OPOST  # a line ends as it was written
    termios.tcsetattr(its, termios.TCSANOW, settings)
    sent = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # so Linux says that nobody has it open any more
            for data in iter(lambda: os.read(ours, 65536), b""):
                sent.extend(data)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()

    def text() -> str:
        if stream.closed:
            reader.join(10)
        return sent.decode("utf-8", "replace")

    with open(its, "w", encoding="utf-8") as stream:
        yield stream, text
    reader.join(10)
    os.close(ours)


def on_terminal(operator: Operator, *arguments: str, columns: int = 80, **environment: str) -> str:
    """What a terminal is sent, so wide, when a command is typed there."""
    with pseudo_terminal(columns) as (stream, shown):
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            operator.environment = {"TERM": "xterm", **environment}
            operator(*arguments, "--db", str(operator.folder / "hostenroll.db"))
        operator.environment = {}
        stream.close()
        return shown()


@pytest.fixture
def motley(operator: Operator) -> Operator:
    """An operator with a host of each status, and some of many letters."""
    clock = operator.clock
    with opened(files_of(operator), clock) as registry:
        do(registry, clock, lambda now: registry.start_service("http://127.0.0.1", now))
        door = ApiDoor(registry, clock)
        labels = {"rack": "b4", "purpose": "the one that nobody dares to switch off"}
        token = door.token(maxUses=9, labels=labels, description="all of them " * 5)
        names = ["shut", "lost", "away", "K\u00fcche-" + "\u65e5\u672c" * 9, "new-1" + "x" * 60,
                 "new-2" + "y" * 60]  # fmt: skip
        hosts = [door.enroll(token, f"box-{name[0]}", name=name).document for name in names]
        door.revoke(hosts[0]["hostId"])
        for host in hosts[1:4]:
            assert door.beat(host["credential"]).status == 200
        clock.advance(8 * 86400)
        do(registry, clock, registry.keep_alive)
    database = files_of(operator)[0]
    month_ago = clock.ms - 30 * 86_400_000
    sql(database, "UPDATE service SET started = ?, previous_alive = ?", month_ago, month_ago)
    for host, silence in zip(hosts[1:4], (8 * 86400, 200, 0)):
        number, seen = int(host["hostId"], 16), clock.ms - silence * 1000
        sql(database, "UPDATE heartbeat SET last_seen = ? WHERE host_id = ?", seen, number)
    return operator


ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def columns_under(heading: str, line: str) -> Dict[str, str]:
    """The cells of a line of a table, by what stands above them. A wide letter counts as two."""
    spread = "".join(letter + "\0" * (hostenroll.columns_of(letter) - 1) for letter in line)
    starts = [match.start() for match in re.finditer(r"(?:(?<=  )|^)\S", heading)]
    cells = [spread[start:end] for start, end in zip(starts, [*starts[1:], None])]
    titles = re.split("  +", heading)
    return {name: cell.replace("\0", "").rstrip() for name, cell in zip(titles, cells)}


@pytest.mark.parametrize("columns", [250, 120, 100, 80, 60, 40])
def test_a_table_fits_its_terminal(columns: int, motley: Operator) -> None:
    whole = motley("list-hosts").out.splitlines()
    shown = ESCAPE.sub("", on_terminal(motley, "list-hosts", columns=columns)).splitlines()
    assert len(shown) == len(whole) == 7
    full = [columns_under(whole[0], line) for line in whole[1:]]
    cells = [columns_under(shown[0], line) for line in shown[1:]]
    assert [cell["ID"] for cell in cells] == [one["ID"] for one in full]
    assert len({cell["NAME"] for cell in cells}) == 6
    for cell, one in zip(cells, full):
        for heading, text in cell.items():
            start = text[:-1] if text.endswith("\u2026") else text
            assert one[heading].startswith(start) and (start or not one[heading])
            assert start == one[heading] or heading in ("NAME", "LABELS", "HOSTNAME", "ORG")
    wide = max(map(hostenroll.columns_of, shown))
    if columns == 250:
        assert shown == whole
    elif columns >= 60:
        assert columns - 8 <= wide <= columns and "LABELS" in shown[0]
    else:  # what must stay has no room
        assert list(cells[0]) == ["ID", "NAME", "STATUS", "LAST SEEN"]


def test_names_are_cut_no_further_than_they_can_be_told_apart() -> None:
    names = ["node-in-the-cellar-01", "node-in-the-cellar-02", "gateway" * 9, "node-in-the-attic"]
    column = hostenroll.Column("name", lambda document, now: "", least=12, is_name=True)
    for room in range(1, 80):
        (width,) = hostenroll.fitted([column], [["NAME", *names]], room)
        assert len({hostenroll.shortened(name, width) for name in names}) == 4
        assert width == min(max(room, 23), 63)
    unlike = ["alpha" * 5, "beta" * 5]
    assert hostenroll.fitted([column], [["NAME", *unlike]], 5) == [12]


def test_what_is_piped_is_never_cut_and_has_no_colour(motley: Operator) -> None:
    for command in (("list-hosts",), ("list-tokens",), ("show-audit",), ("list-api-keys",)):
        motley.environment = {
            "TERM": "xterm",
            "COLUMNS": "20",
            "HOSTENROLL_DB": files_of(motley)[0],
        }
        piped = motley(*command).out
        assert (
            "\x1b" not in piped
            and "\u2026" not in piped
            and "ORG" in piped + "ORG" * (command[0] == "show-audit")
        )
        assert max(map(len, piped.splitlines())) > 80 or command[0] == "list-api-keys"


STATE_COLOURS = {
    "online": "32", "offline": "31", "missing": "33", "revoked": "2", "pending": None,
}  # fmt: skip


def test_a_state_has_a_colour_on_a_terminal_and_nothing_else_has(motley: Operator) -> None:
    shown = on_terminal(motley, "list-hosts", columns=250)
    assert {*re.findall(r"\x1b\[[^m]*m", shown)} == {
        "\x1b[0m",
        *(f"\x1b[{colour}m" for colour in STATE_COLOURS.values() if colour),
    }
    for status, colour in STATE_COLOURS.items():
        painted = f"\x1b[{colour}m{status}\x1b[0m" if colour else f"  {status}  "
        assert painted in shown
    assert ESCAPE.sub("", shown) == motley("list-hosts").out
    host = json.loads(motley("list-hosts", "--status", "online", "--json").out)["hosts"][0]["id"]
    motley("edit-host", host, "--name", "revoked")
    shown = on_terminal(motley, "show-host", host)
    assert "\nname:            revoked\n" in shown
    assert "\nstatus:          \x1b[32monline\x1b[0m\n" in shown


@pytest.mark.parametrize(
    "environment",
    [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": ""}],
    ids=["NO_COLOR", "a dumb terminal", "no terminal that is known"],
)
def test_there_are_no_colours_for_who_wants_none(
    environment: Dict[str, str], motley: Operator
) -> None:
    for command in ("list-hosts", "check", "list-tokens"):
        shown = on_terminal(motley, command, columns=250, **environment)
        assert "\x1b" not in shown and shown == motley(command).out


def test_an_empty_no_color_asks_for_nothing(motley: Operator) -> None:
    assert "\x1b[32monline" in on_terminal(motley, "list-hosts", NO_COLOR="")


def test_the_environment_may_say_how_wide_a_terminal_is(motley: Operator) -> None:
    assert on_terminal(motley, "list-hosts", columns=250, COLUMNS="60") == on_terminal(
        motley, "list-hosts", columns=60
    )
    for nonsense in ("0", "-1", "x", "1e3", ""):
        assert on_terminal(motley, "list-hosts", columns=60, COLUMNS=nonsense) == on_terminal(
            motley, "list-hosts", columns=60
        )


AGO = {
    0: "now", 0.999: "now", 1: "1 s ago", 119: "119 s ago", 120: "2 min ago", 7199: "119 min ago",
    7200: "2 h ago", 172799: "47 h ago", 172800: "2 d ago", 40 * 86400: "40 d ago", -1: "in 1 s",
    -2520: "in 42 min", -3600: "in 60 min",
}  # fmt: skip


@pytest.mark.parametrize("seconds, said", AGO.items(), ids=AGO.values())
def test_times_are_said_from_now(seconds: float, said: str, clock: Clock) -> None:
    clock.advance(-0.877)
    timestamp = hostenroll.rfc3339(clock.ms)
    assert hostenroll.unix_ms(timestamp) == clock.ms
    assert hostenroll.ago(timestamp, clock.ms + round(seconds * 1000)) == said


def test_people_see_times_from_now_and_programs_exact_ones(motley: Operator) -> None:
    (host,) = json.loads(motley("list-hosts", "--status", "offline", "--json").out)["hosts"]
    listed = motley("list-hosts", "--status", "offline").out
    assert "3 min ago" in listed and host["lastSeen"] not in listed
    shown = motley("show-host", host["id"]).out
    assert f"last seen:       3 min ago ({host['lastSeen']})\n" in shown
    (token,) = json.loads(motley("list-tokens", "--json").out)["tokens"]
    assert "7 d ago" in motley("list-tokens").out
    shown = motley("show-token", token["id"]).out
    assert f"expires:       7 d ago ({token['expiresAt']})\n" in shown
    hosts = re.search(r"^hosts: +((?:[0-9a-f]{16}\n *){6})", shown, re.MULTILINE)
    assert hosts is not None and hosts[1].split() == token["hosts"]


class Terminal:
    """A command in a terminal of its own, as wide as it is told."""

    def __init__(self, folder: Path, *arguments: str, columns: int = 80, **env: str) -> None:
        ours, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environment = {**clean_environment(), "TERM": "xterm", **env}
        self.process = subprocess.Popen(
            [sys.executable, str(MODULE), *arguments],
            cwd=str(folder),
            env=environment,
            stdin=its,
            stdout=its,
            stderr=its,
        )
        os.close(its)
        self.file = ours
        self.shown = ""

    def _read(self) -> bool:
        try:
            data = os.read(self.file, 65536)
        except OSError:  # Linux says so when the last process has left a terminal
            data = b""
        self.shown += data.decode("utf-8")
        return bool(data)

    def wait_for(self, text: str) -> None:
        while text not in self.shown:
            assert self._read(), self.shown

    def end(self) -> int:
        """The exit status, when everything has been shown."""
        while self._read():
            pass
        os.close(self.file)
        return self.process.wait(10)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
            self.process.wait(10)


@slow
@pytest.mark.parametrize("ends", ["by itself", "by Ctrl-C"])
def test_what_lasts_is_said_on_a_terminal_in_one_line_that_goes_away(
    ends: str, tmp_path: Path
) -> None:
    assert cli(tmp_path, "list-orgs").returncode == 0
    with contextlib.ExitStack() as busy:
        busy.enter_context(write_lock(tmp_path / "hostenroll.db"))
        with Terminal(tmp_path, "mint-token", columns=20) as terminal:
            terminal.wait_for("\rmint-token: 1 s\x1b[K")
            if ends == "by Ctrl-C":
                terminal.process.send_signal(signal.SIGINT)
            else:
                busy.close()
            assert terminal.end() == (130 if ends == "by Ctrl-C" else 0)
    said, _, after = terminal.shown.rpartition("\r\x1b[K")
    lines = said.split("\r")[1:]
    assert all(re.fullmatch(r"mint-token: [0-9]+ s\x1b\[K", line) for line in lines), lines
    assert after == "" if ends == "by Ctrl-C" else after.startswith("het_")


def test_progress_is_counted_and_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PROGRESS_AFTER", "PROGRESS_EVERY"):
        monkeypatch.setattr(hostenroll, name, 0.005)
    with pseudo_terminal(32) as (stream, shown), contextlib.redirect_stderr(stream):
        with hostenroll.Progress("copying", {"TERM": "xterm"}) as progress:
            until(lambda: "\rcopying: 0 s\x1b[K" in shown())
            progress(1234)
            until(lambda: "\rcopying: 1,234, 0 s\x1b[K" in shown())
            progress(1234, 3702)
            until(lambda: "\rcopying: 1,234 of 3,702 (33 %)\u2026\x1b[K" in shown())
        until(lambda: shown().endswith("\r\x1b[K"))
        assert "\n" not in shown()


@pytest.mark.parametrize("where", ["a pipe", "a dumb terminal", "soon done"])
def test_where_nobody_waits_for_it_there_is_no_progress(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where != "soon done":
        monkeypatch.setattr(hostenroll, "PROGRESS_AFTER", 0.0)
    with pseudo_terminal() as (stream, shown):
        with contextlib.redirect_stderr(io.StringIO() if where == "a pipe" else stream) as stderr:
            term = "dumb" if where == "a dumb terminal" else "xterm"
            with hostenroll.Progress("copying", {"TERM": term}) as progress:
                progress(1, 2)
                time.sleep(0.02)
        stream.close()
        assert shown() == "" and (where != "a pipe" or stderr.getvalue() == "")


def test_long_acts_tell_how_much_of_them_is_done(
    paths: Tuple[str, str], clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostenroll, "BACKUP_PAGES", 4)
    said: List[Tuple[int, int]] = []
    with opened(paths, clock) as registry:
        for _ in range(5):
            do(registry, clock, lambda now: registry.mint(OPERATOR, hostenroll.TokenOrder(), now))
        registry.verify_audit(None, lambda done, total: said.append((done, total)))
        assert said == [(number, 5) for number in range(1, 6)]
        said.clear()
        (tmp_path / "copy").mkdir()
        registry.back_up(str(tmp_path / "copy"), lambda done, total: said.append((done, total)))
        totals = {total for _, total in said}
        assert len(said) > 2 and said == sorted(said) and totals == {said[-1][0]}
    said.clear()
    hostenroll.examine(*paths, lambda done, total: said.append((done, total)))
    assert said == [(number, 5) for number in range(1, 6)]


WIDTHS = {
    "web-1": 5, "": 0, "K\u00fcche": 5, "Ku\u0308che": 5, "\u65e5\u672c": 4, "\uff37\uff45": 4,
    "\U0001f5a5": 1, "\U0001f680": 2, "a\u200db": 2, "a\u00adb": 3, "\u1112\u1161\u11ab": 2,
    "\u0e19\u0e49\u0e33": 2, "\u05e9\u05c1": 1,
}  # fmt: skip


@pytest.mark.parametrize("text, columns", WIDTHS.items(), ids=map(ascii, WIDTHS))
def test_how_many_columns_a_text_takes(text: str, columns: int) -> None:
    assert hostenroll.columns_of(text) == columns
    for room in range(1, columns + 2):
        cut = hostenroll.shortened(text, room)
        if room >= columns:
            assert cut == text
        else:
            assert cut.endswith("\u2026") and text.startswith(cut[:-1])
            assert room - 1 <= hostenroll.columns_of(cut) <= room


def test_an_operator_may_lose_patience(tmp_path: Path) -> None:
    assert cli(tmp_path, "list-orgs").returncode == 0
    with write_lock(tmp_path / "hostenroll.db"):
        command = [*SCRIPT, "mint-token"]
        waiting = subprocess.Popen(
            command, cwd=str(tmp_path), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with open(tmp_path / "hostenroll.db.gate") as gate:

            def is_at_the_gate() -> bool:
                try:
                    fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
                fcntl.flock(gate, fcntl.LOCK_UN)
                return False

            until(is_at_the_gate)
        waiting.send_signal(signal.SIGINT)
        out, err = waiting.communicate(timeout=10)
    assert waiting.returncode not in (0, 2, 3) and out == ""
    assert "Traceback" not in err


@slow
def test_a_command_that_waits_too_long_fails_in_one_line(tmp_path: Path) -> None:
    assert cli(tmp_path, "list-orgs").returncode == 0
    with write_lock(tmp_path / "hostenroll.db"):
        begun = time.monotonic()
        done = cli(tmp_path, "mint-token")
        assert time.monotonic() - begun < 8
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


def test_serve_runs_nothing_from_the_folder_it_is_started_in(tmp_path: Path) -> None:
    """Modules of the standard library's names may lie in a folder that others can write to."""
    for name in ("secrets", "runpy", "hmac"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not me')\n")
    with ServerProcess(tmp_path) as server:
        assert curl(f"{server.url}/healthz").status == 200
        assert server.terminate() == 0


BY_NAME = ("-m hostenroll", "-um hostenroll", "-Bm hostenroll", "-umhostenroll")


@pytest.mark.parametrize("options", sample({it: (it,) for it in BY_NAME}, *BY_NAME[:2]))
def test_the_module_can_be_run_by_its_name(options: str, tmp_path: Path) -> None:
    command = [sys.executable, *options.split(), "serve", "--port", "0"]
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        command, cwd=str(tmp_path), env=environment, stderr=subprocess.PIPE, text=True
    )
    assert started.stderr is not None
    with started.stderr:
        assert "listens on" in started.stderr.readline()
        started.terminate()
        assert started.wait(10) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("mint-token", "--hostname", ""),
        ("mint-token", "--org", ""),
        ("mint-token", "--max-uses", "0"),
        ("list-hosts", "--org", "\udcff"),
        ("list-hosts", "--label", "rack"),
        ("list-tokens", "--org", "nowhere"),
    ],
    ids=" ".join,
)
def test_an_empty_or_wrong_option_is_refused_and_mints_nothing(
    arguments: Tuple[str, ...], operator: Operator
) -> None:
    done = operator(*arguments)
    assert (done.status, done.out) == (3, "")
    assert done.err.startswith("hostenroll: refused (") and done.err.count("\n") == 1
    assert "internal" not in done.err
    assert json.loads(operator("list-tokens", "--json").out)["tokens"] == []


def test_a_secret_that_nobody_could_read_is_not_minted(tmp_path: Path) -> None:
    command = f"{sys.executable} {MODULE} mint-token >&-"
    done = subprocess.run(["sh", "-c", command], cwd=str(tmp_path), stderr=subprocess.PIPE)
    assert done.returncode == 1 and b"stdout is closed" in done.stderr
    assert json.loads(cli(tmp_path, "list-tokens", "--json").stdout)["tokens"] == []


def test_with_stderr_closed_a_token_still_stands_alone(tmp_path: Path) -> None:
    command = f"exec {os.path.realpath(sys.executable)} {MODULE} mint-token 2>&-"
    done = subprocess.run(["sh", "-c", command], cwd=str(tmp_path), stdout=subprocess.PIPE)
    assert re.fullmatch(rb"het_\S+\n", done.stdout)


def test_serve_says_what_to_type_next_for_its_own_files(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    with ServerProcess(tmp_path, "--db", "a b/fleet.db") as server:
        until(lambda: len(server.said) > 1)
        assert server.terminate() == 0
    command = server.said[1].partition(": ")[2].split("mint-token", 1)[1]
    assert command.strip() == "--db 'a b/fleet.db'"


def test_serve_says_where_hosts_find_it(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, "--public-url", "https://enroll.lan:8443/") as server:
        until(lambda: len(server.said) > 2)
    assert server.said[1] == "hosts find it at https://enroll.lan:8443\n"


def test_where_no_server_lives_any_more_that_is_said(operator: Operator) -> None:
    """What it was the last to see is no news, and a join command leads nowhere."""
    registry = open_registry(
        str(operator.folder / "hostenroll.db"),
        str(operator.folder / "hostenroll.key"),
        operator.clock.ms,
    )
    url = "http://127.0.0.1:8080"
    do(registry, operator.clock, lambda now: registry.start_service(url, now))
    registry.close()
    commands = ("list-hosts",), ("mint-token",)
    operator.clock.advance(hostenroll.ALIVE_GRACE)
    assert not any("no server" in operator(*command).err for command in commands)
    operator.clock.advance(300)
    for command in commands:
        assert "no server is running, the last was 5 min ago" in operator(*command).err
        assert operator(*command, "--json").err == ""


@contextlib.contextmanager
def unreadable(kind: str = "closed") -> Iterator[Any]:
    """A file that nothing can be written to: of a pipe that nobody reads, or on a full disk."""
    if kind == "full":
        if not os.path.exists("/dev/full"):
            pytest.skip("no /dev/full")
        with open("/dev/full", "w") as full:
            yield full
        return
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone:
        yield gone


def told_to(
    stdout: Any, folder: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """cli(), with a stdout of its own."""
    return subprocess.run(
        [*PROGRAM, *arguments], cwd=str(folder), stdout=stdout,
        stderr=subprocess.PIPE, text=True, env={**clean_environment(), **environment}, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["list-orgs", "--help", "--version", "agent-script"])
def test_who_has_read_enough_hears_no_complaint(
    command: str, unbuffered: str, tmp_path: Path
) -> None:
    with unreadable() as gone:
        done = told_to(gone, tmp_path, command, PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_verdict_that_nobody_reads_is_no_other(tmp_path: Path) -> None:
    assert cli(tmp_path, "mint-token").returncode == 0
    (tmp_path / "hostenroll.key").chmod(0o644)
    for form in ((), ("--json",)):
        with unreadable() as gone:
            done = told_to(gone, tmp_path, "check", *form)
        assert (done.returncode, done.stderr) == (1, "")


SECRETS = {
    "mint-token": "revoke-token",
    "mint-token --json": "revoke-token",
    "reenroll-host": "revoke-token",
    "mint-api-key": "revoke-api-key",
    "mint-api-key --json": "revoke-api-key",
}


@pytest.mark.parametrize("stdout", ["closed", "full"])
@pytest.mark.parametrize("command", SECRETS)
def test_who_got_no_secret_is_told_how_to_revoke_it(
    command: str, stdout: str, tmp_path: Path
) -> None:
    words = command.split()
    with ServerProcess(tmp_path) as server:
        token = cli(tmp_path, "mint-token").stdout.strip()
        host = SocketDoor(server.port, "").enroll(token).document["hostId"]
    if command == "reenroll-host":
        words.append(host)
    with unreadable(stdout) as file:
        lost = told_to(file, tmp_path, *words)
    assert lost.returncode == 1 and lost.stderr.count("\n") == 1
    assert lost.stderr.startswith("hostenroll: ") and "is lost" in lost.stderr
    revoke = re.search(rf"{SECRETS[command]} ([0-9a-f]{{16}})", lost.stderr)
    assert revoke is not None and revoke[1] not in token
    revoked = json.loads(cli(tmp_path, *revoke[0].split(), "--json").stdout)
    assert revoked["id"] == revoke[1] and revoked["revokedAt"]


@pytest.mark.parametrize("stderr", ["closed", "full"])
def test_a_command_does_its_work_though_nothing_can_be_said(stderr: str, tmp_path: Path) -> None:
    for words, status in (
        (("mint-token",), 0), (("add-org", "a"), 0), (("add-org", "a"), 3),
        (("xyzzy",), 2), ((), 2),
    ):  # fmt: skip
        with unreadable(stderr) as file:
            done = subprocess.run(
                [*PROGRAM, *words], cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=file,
                text=True, env=clean_environment(), timeout=60,
            )  # fmt: skip
        assert done.returncode == status, words
        assert bool(re.fullmatch(r"het_\S+\n", done.stdout)) == (words == ("mint-token",))


@pytest.mark.parametrize("stderr", ["closed", "full"])
@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="Linux tells the port")
def test_a_server_serves_though_nothing_can_be_said(stderr: str, tmp_path: Path) -> None:
    with unreadable(stderr) as file:
        server = subprocess.Popen(
            [*PROGRAM, "serve", "--port", "0"], cwd=str(tmp_path), stderr=file,
            env=clean_environment(),
        )  # fmt: skip
    try:
        until(lambda: server.poll() is not None or port_of(server.pid))
        assert server.poll() is None
        door = SocketDoor(port_of(server.pid), "")
        until(lambda: door.call("GET", "/healthz").status == 200)
        server.terminate()
        assert server.wait(10) == 0
    finally:
        server.kill()
        server.wait()


def test_the_newest_come_first_to_the_millisecond(registry: Registry, clock: Clock) -> None:
    minted = []
    for _ in range(50):
        clock.advance(0.002)
        order = hostenroll.TokenOrder()
        minted.append(do(registry, clock, lambda now: registry.mint(OPERATOR, order, now))[0])
    listed = do(
        registry, clock, lambda now: registry.tokens(OPERATOR, hostenroll.TokenQuery(), now)
    )
    assert [view.token.id for view in listed.items] == [view.token.id for view in minted[::-1]]


class Block(NamedTuple):
    """Commands that the README shows, to be copied letter by letter."""

    line: int
    section: str
    text: str

    @property
    def first(self) -> str:
        """The first command; by it a block is known here."""
        return self.text.split("\n")[0]


README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
BLOCKS = [
    Block(
        README.count("\n", 0, match.start(1)) + 1,
        re.findall(r"^## (.+)$", README[: match.start()], re.MULTILINE)[-1],
        match[1],
    )
    for match in re.finditer(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
]
# Blocks for a machine on which nothing runs yet. The others are typed where the first minute has
# passed: a server runs, and one host has enrolled and beats.
ON_A_BARE_MACHINE = {"cp hostenroll.py /usr/local/lib/"}
NOT_RUN_HERE = {
    "python3 -m venv .venv && .venv/bin/pip install -q pytest && .venv/bin/python -m pytest":
        "it is these tests; .ci/run runs it, letter by letter",
    "TMPDIR=/var/tmp python3 hostenroll.py bench --hosts 100000":
        "it takes minutes; the tests of bench have fewer hosts",
}  # fmt: skip
ELIDED = "het_..."  # a block with this is what mint-token prints; the true one is pasted
TOLD = ("The first minute", "The second machine")  # each has a test that tells it as one story
TYPED = [
    block
    for block in BLOCKS
    if block.first not in NOT_RUN_HERE and block.section not in TOLD and ELIDED not in block.text
]


def _can_make_machines() -> bool:
    tools = ("unshare", "nsenter", "ip", "mount", "curl", "openssl")
    if os.geteuid() != 0 or any(shutil.which(tool) is None for tool in tools):
        return False
    tried = ["unshare", "-mnup", "--fork", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(tried, capture_output=True).returncode == 0


needs_machines = pytest.mark.skipif(
    not _can_make_machines(), reason="needs root, namespaces, iproute2, curl and openssl"
)
MAKE_MACHINE = """\
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
cd "$1"
mkdir upper work root
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" root
mount --rbind /sys root/sys
mount --rbind /dev root/dev
mount -t proc proc root/proc
mount --rbind /tmp root/tmp
cp "$2" root/srv/hostenroll.py
mkdir -p root/etc/prometheus
printf '#!/bin/sh\\nexec %s "$@"\\n' "$3" > root/usr/local/bin/python3
printf '%s' "$4" > root/usr/local/bin/systemctl
chmod 755 root/usr/local/bin/python3 root/usr/local/bin/systemctl
hostname "$5"
ip link set lo up
exec chroot root sh -c 'echo ready; exec sleep 600'
"""
# What systemd does with a unit, as far as the README's commands can tell.
SYSTEMCTL = """\
#!/bin/sh
set -e
[ "$1" = daemon-reload ] && exit
[ "$*" = "enable --now hostenroll" ]
unit=/etc/systemd/system/hostenroll.service
value() { sed -n "s/^$1=//p" "$unit"; }
mkdir -m "$(value StateDirectoryMode)" "/var/lib/$(value StateDirectory)"
export $(value Environment)
eval "exec $(value ExecStart)" 2>/var/log/hostenroll &
"""


class Box:
    """A machine with its own network, hostname, processes and files: but for /tmp, what is written
    there is written nowhere else, and what runs there ends with it."""

    def __init__(self, folder: Path, name: str = "first") -> None:
        place = folder / name
        place.mkdir()
        python = (
            os.path.realpath(sys.executable) if sys.prefix == sys.base_prefix else sys.executable
        )
        self.place = place
        self.unshared = subprocess.Popen(
            ["unshare", "-mnup", "--fork", "--kill-child", "sh", "-c", MAKE_MACHINE, "sh",
             str(place), str(MODULE), python, SYSTEMCTL, name],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.unshared.stdout is not None and self.unshared.stdout.readline() == b"ready\n"
        children = Path(f"/proc/{self.unshared.pid}/task/{self.unshared.pid}/children")
        self.process = children.read_text().strip()
        self.typed: List[Any] = []

    def inside(self, *command: str) -> List[str]:
        entered = [
            "nsenter",
            "-t",
            self.process,
            "-m",
            "-n",
            "-u",
            "-p",
            f"--root=/proc/{self.process}/root",
        ]
        return [*entered, *command]

    def type(
        self, text: str, stays: str = r"listens on|enrolled as host", seconds: float = 60
    ) -> Any:
        """Type commands into a shell in the folder where hostenroll.py lies, and wait for their
        end, or until what they start says that it is at work. What they said; a failure fails."""
        environment = {"PATH": "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin",
                       "HOME": "/root", "LC_ALL": "C.UTF-8"}  # fmt: skip
        stem = self.place.parent / f"{self.place.name}-{len(self.typed)}"
        out, err = stem.with_suffix(".out"), stem.with_suffix(".err")
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            shell = subprocess.Popen(
                self.inside("sh", "-ec", f"cd /srv\n{text}"), env=environment,
                stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            )  # fmt: skip
        self.typed.append(shell)
        until(lambda: shell.poll() is not None or re.search(stays, err.read_text()), seconds)
        if re.search(r"serve &$", text, re.MULTILINE):  # a person reads that it listens
            until(lambda: "listens on" in err.read_text(), seconds)
        said = SimpleNamespace(out=out.read_text(), err=err.read_text(), status=shell.poll())
        assert said.status in (0, None), f"{text}\nended with {said.status}:\n{said.out}{said.err}"
        return said

    def hosts(self) -> List[Any]:
        listed = self.type("python3 hostenroll.py list-hosts --json")
        return list(json.loads(listed.out)["hosts"])

    def pass_the_first_minute(self) -> Any:
        """What a newcomer does, with what mint-token prints pasted."""
        start, look = (block.text for block in BLOCKS if block.section == "The first minute")
        self.type(join_command_in(self.type(start)))
        until(lambda: [host["status"] for host in self.hosts()] == ["online"])
        return self.type(look)

    def __enter__(self) -> Box:
        return self

    def __exit__(self, *_: object) -> None:
        self.unshared.kill()
        self.unshared.wait(10)
        assert self.unshared.stdout is not None
        self.unshared.stdout.close()
        for shell in self.typed:
            shell.wait(10)


def join_command_in(said: Any) -> str:
    """What a person copies out of what mint-token says on the terminal."""
    found = re.search(r"^curl .*(?:\n +.*)*$", said.err, re.MULTILINE)
    assert found is not None, said.err
    return found[0]


def connect(one: Box, other: Box) -> None:
    """A wire between two machines; the first is 192.0.2.10."""
    add = ["ip", "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns"]
    subprocess.run(["nsenter", "-t", one.process, "-n", *add, other.process], check=True)
    for machine, address in ((one, "192.0.2.10/24"), (other, "192.0.2.20/24")):
        for change in (["addr", "add", address, "dev", "wire"], ["link", "set", "wire", "up"]):
            subprocess.run(["nsenter", "-t", machine.process, "-n", "ip", *change], check=True)


def test_the_readme_shows_no_command_that_no_test_would_run() -> None:
    assert {language for language, _ in FENCED} <= {"sh", "yaml", "json", "ini", "nginx"}, (
        "commands stand in ```sh blocks, so that tests run them"
    )
    for line in re.findall(r"\n\n((?:    .+\n)+)", README):
        assert re.match(r"    +(GET|POST|PATCH|DELETE|PUT) ", line), (
            f"an indented block is run by no test; put commands into a ```sh block:\n{line}"
        )
    assert {block.first for block in BLOCKS} >= ON_A_BARE_MACHINE
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "sed -n '/^## Tests/,/^## /p' README.md" in ci and 'eval "$command' in ci


@pytest.mark.parametrize("block", BLOCKS, ids=[f"line {block.line}" for block in BLOCKS])
def test_every_command_in_the_readme_is_well_formed(block: Block) -> None:
    if shutil.which("sh"):
        subprocess.run(["sh", "-n", "-c", block.text], check=True)
    text = block.text.replace("\\\n", " ")
    for line in re.findall(r"python3 \S*hostenroll\.py (.*)", text):
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        typed = itertools.takewhile(lambda word: word[0] not in "|>&)<;", words)
        assert hostenroll.read_arguments(list(typed), {}), line
    if ELIDED in block.text:
        printed = hostenroll.join_command("https://enroll.lan:8443", "sha256//...", ELIDED)
        assert shlex.split(block.text) == shlex.split(printed)


@slow
@needs_machines
def test_the_first_minute_takes_less(tmp_path: Path) -> None:
    begun = time.monotonic()
    with Box(tmp_path) as machine:
        shown = machine.pass_the_first_minute()
        lines = shown.out.splitlines()
        assert time.monotonic() - begun < 60
        assert len(lines) == 2 and "online" in lines[1].split()


@slow
@needs_machines
def test_the_second_machine_comes_in_over_tls_by_a_pinned_key(tmp_path: Path) -> None:
    serve, mint = (block.text for block in BLOCKS if block.section == "The second machine")
    with Box(tmp_path) as first, Box(tmp_path, "second") as second:
        connect(first, second)
        first.pass_the_first_minute()
        first.type(serve)
        join = join_command_in(first.type(mint))
        assert re.search("-k --pinnedpubkey '?sha256//", join)
        second.type(join)
        until(lambda: [host["status"] for host in first.hosts()] == ["online"] * 2)
        assert [host["name"] for host in first.hosts()] == ["second", "first"]


@slow
@needs_machines
@pytest.mark.parametrize(
    "block",
    TYPED,
    ids=[f"line {block.line}: {block.first[:60]}" for block in TYPED],
)
def test_what_the_readme_says_can_be_typed(block: Block, tmp_path: Path) -> None:
    """Each block on a machine of its own. One that fails or does not end, without `listens on`
    or `enrolled as host`, is wrong, or wants to be named in a table above."""
    with Box(tmp_path) as machine:
        if block.first not in ON_A_BARE_MACHINE:
            machine.pass_the_first_minute()
        said = machine.type(block.text)
        refused = re.search("Traceback|^hostenroll: |urn:hostenroll:problem", said.out + said.err)
        assert refused is None, said


def test_the_openapi_command_prints_what_the_server_serves(tmp_path: Path, api: ApiDoor) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    printed = cli(folder, "openapi")
    served = api.call("GET", "/openapi.json")
    assert served.headers["content-type"] == "application/json"
    assert json.loads(printed.stdout) == served.document == hostenroll.openapi_document()
    assert printed.stdout.startswith('{\n  "openapi": "3.1.0",')
    assert list(folder.iterdir()) == []


def test_signing_keys_are_rotated_listed_and_retired(operator: Operator) -> None:
    operator("mint-token")
    (old,) = json.loads(operator("list-signing-keys", "--json").out)["signingKeys"]
    assert old == {
        "kid": old["kid"], "state": "signs", "hosts": 0, "createdAt": old["createdAt"],
        "retiredAt": None,
    }  # fmt: skip
    refused = operator("retire-signing-key", old["kid"], "--force")
    assert refused.status == 3 and "(conflict)" in refused.err and "rotate" in refused.err
    operator.clock.advance(60)
    rotated = operator("rotate-signing-key")
    assert rotated.status == 0 and re.fullmatch("[0-9a-f]{16}\n", rotated.out)
    new = rotated.out.strip()
    lines = operator("list-signing-keys").out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["KID", "STATE", "HOSTS"], [new, "signs", "0"], [old["kid"], "verifies", "0"]]  # fmt: skip
    unknown = operator("retire-signing-key", "0123456789abcdef")
    assert unknown.status == 3 and "(not-found)" in unknown.err
    operator.clock.advance(60)
    retired = operator("retire-signing-key", old["kid"])
    assert (retired.status, retired.out) == (0, "") and old["kid"] in retired.err
    listed = json.loads(operator("list-signing-keys", "--json").out)["signingKeys"]
    assert [(key["kid"], key["state"], key["retiredAt"]) for key in listed] == [
        (new, "signs", None),
        (old["kid"], "retired", hostenroll.rfc3339(operator.clock.ms)),
    ]
    assert operator("retire-signing-key", old["kid"]).status == 3
    assert operator("verify-audit").status == 0


def test_keys_that_cannot_be_written_are_a_failure_that_says_why(
    operator: Operator, tmp_path: Path
) -> None:
    operator("mint-token")
    (tmp_path / "hostenroll.key.tmp").mkdir()
    failed = operator("rotate-signing-key")
    assert (failed.status, failed.out) == (1, "")
    assert "hostenroll.key" in failed.err and failed.err.count("\n") == 1


def test_verify_audit_names_the_event_that_was_changed(operator: Operator, tmp_path: Path) -> None:
    for _ in range(3):
        operator("mint-token")
    database = str(tmp_path / "hostenroll.db")
    _tamper((database, ""))
    failed = operator("verify-audit")
    assert (failed.status, failed.out) == (1, "")
    assert "event 2 of the audit log" in failed.err and failed.err.count("\n") == 1


def test_check_says_ok_or_what_is_bad(operator: Operator, tmp_path: Path) -> None:
    nothing = operator("check")
    assert (nothing.status, nothing.out, os.listdir(tmp_path)) == (1, "", [])
    assert "no database" in nothing.err and nothing.err.count("\n") == 1
    operator("mint-token")
    lines = operator("check").out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", name] for name in SOUND]
    sound = operator("check", "--json")
    document = json.loads(sound.out)
    assert (sound.status, sound.err, document["ok"]) == (0, "", True)
    assert [(f["name"], f["ok"]) for f in document["findings"]] == list(SOUND.items())
    assert all(set(f) == {"name", "ok", "detail"} for f in document["findings"])
    (tmp_path / "hostenroll.key").chmod(0o604)
    bad = operator("check")
    assert (bad.status, bad.err) == (1, "")
    assert [line.split()[:2] for line in bad.out.splitlines() if "BAD" in line] == [["BAD", "keys"]]
    document = json.loads(operator("check", "--json").out)
    assert not document["ok"]
    assert [f["name"] for f in document["findings"] if not f["ok"]] == ["keys"]


def test_a_first_command_brings_an_old_database_up(operator: Operator, tmp_path: Path) -> None:
    paths = str(tmp_path / "hostenroll.db"), str(tmp_path / "hostenroll.key")
    old_fleet(paths, operator.clock)
    before = Path(paths[0]).read_bytes()
    looked = operator("check")
    assert looked.status == 1 and "BAD  schema" in looked.out
    assert Path(paths[0]).read_bytes() == before
    listed = json.loads(operator("list-hosts", "--json").out)["hosts"]
    assert {host["name"] for host in listed} == set(OLD_HOSTS)
    assert operator("check").status == 0


def test_backup_makes_its_folder_for_its_owner_alone(tmp_path: Path) -> None:
    assert cli(tmp_path, "mint-token").returncode == 0
    made = cli(tmp_path, "backup", "copy", preexec_fn=lambda: os.umask(0))
    assert (made.returncode, made.stdout) == (0, "")
    copy = tmp_path / "copy"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in copy.iterdir()} == {0o600}
    assert cli(tmp_path, "check", "--db", "copy/hostenroll.db").returncode == 0
    assert cli(tmp_path, "backup", "copy").returncode == 0


PLACES_FOR_NO_BACKUP = {"a-file": "a-file", "a-file/copy": "a-file", ".": "in use"}


@pytest.mark.parametrize(
    "folder, word", sample({it: (it, word) for it, word in PLACES_FOR_NO_BACKUP.items()}, ".")
)
def test_where_no_backup_can_go_is_said_in_one_line(folder: str, word: str, tmp_path: Path) -> None:
    assert cli(tmp_path, "mint-token").returncode == 0
    (tmp_path / "a-file").write_text("")
    before = sorted(os.listdir(tmp_path))
    failed = cli(tmp_path, "backup", folder)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert word in failed.stderr and failed.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before


EVENT = {
    "number", "time", "action", "actor", "address", "organizationId", "subject", "code", "detail",
}  # fmt: skip


@pytest.fixture
def audited(operator: Operator) -> Operator:
    """An operator who has done a few things, and has refused one."""
    token = operator("mint-token").out.strip()
    operator("add-org", "berlin")
    with opened(files_of(operator), operator.clock) as registry:
        door = ApiDoor(registry, operator.clock)
        number = door.enroll(token).document["hostId"]
        door.enroll(token)
    assert operator("revoke-host", number).status == 0
    return operator


def files_of(operator: Operator) -> Tuple[str, str]:
    folder = operator.folder
    return str(folder / "hostenroll.db"), str(folder / "hostenroll.key")


def listed(operator: Operator, *arguments: str) -> List[Any]:
    shown = operator("show-audit", "--json", *arguments)
    assert shown.status == 0
    document = json.loads(shown.out)
    assert document["nextCursor"] is None
    return list(document["events"])


def test_the_log_on_the_command_line_is_that_of_the_api(audited: Operator) -> None:
    events = listed(audited)
    with opened(files_of(audited), audited.clock) as registry:
        door = ApiDoor(registry, audited.clock)
        assert events_of(door)[1:] == events  # the first: its API key
    assert {frozenset(event) for event in events} == {frozenset(EVENT)}
    assert [event["action"] for event in events] == [
        "revoke", "refuse", "enroll", "mint", "add", "mint"]  # fmt: skip
    assert events[0]["actor"].startswith("cli:") and events[0]["address"] is None
    assert [event["number"] for event in listed(audited)] == [7, 6, 5, 4, 3, 2, 1]


def test_the_log_as_a_table_and_a_part_of_it(audited: Operator) -> None:
    events = listed(audited)
    lines = audited("show-audit").out.rstrip("\n").split("\n")
    headings = ["NUMBER", "WHEN", "ACTION", "CODE", "SUBJECT", "ACTOR", "ADDRESS", "DETAIL", "TIME"]
    assert lines[0].split() == headings
    assert [(line.split()[:3], line.split()[-1]) for line in lines[1:]] == [
        ([str(event["number"]), "now", event["action"]], event["time"]) for event in events
    ]
    at = lines[0].index("ACTOR")
    assert all(line[at:].startswith(event["actor"]) for line, event in zip(lines[1:], events))
    assert "hostname=web-1" in audited("show-audit", "--code", "token-used").out
    subject = events[0]["subject"]
    for arguments, numbers in (
        (("--limit", "2"), [6, 5]),
        (("--limit", "100"), [6, 5, 4, 3, 2, 1]),
        (("--action", "mint"), [3, 1]),
        (("--action", "mint", "--limit", "1"), [3]),
        (("--subject", subject), [6, 4]),
        (("--code", "token-used"), [5]),
        (("--org", "berlin"), [2]),
        (("--org", "default", "--action", "add"), []),
    ):
        assert [event["number"] for event in listed(audited, *arguments)] == numbers, arguments
    assert audited("show-audit", "--action", "delete").out.count("\n") == 1
    assert audited("show-audit", "--org", "nothing").status == 3
    assert audited("show-audit", "--action", "x").status == 2


def unguarded(operator: Operator, statement: str) -> None:
    """What somebody does who has the database, and not the keys."""
    database = files_of(operator)[0]
    for (name,) in sql(database, "SELECT name FROM sqlite_master WHERE type = 'trigger'"):
        sql(database, f"DROP TRIGGER {name}")
    sql(database, statement)


def test_the_head_stands_alone_on_stdout_and_finds_a_tail_cut_off(audited: Operator) -> None:
    seen = audited("verify-audit")
    assert (seen.status, len(seen.out)) == (0, 65) and re.fullmatch("[0-9a-f]{64}\n", seen.out)
    assert "events 1 to 6 " in seen.err and "only with --head" in seen.err
    head = seen.out.strip()
    audited("mint-token")
    later = audited("verify-audit", "--head", head)
    assert later.status == 0 and later.out != seen.out
    assert "nothing up to the head given has been cut off" in later.err
    assert "what came after it only a later head can show" in later.err
    assert "only with --head" not in later.err
    unguarded(audited, "DELETE FROM audit WHERE number >= 6")
    without = audited("verify-audit")
    assert (without.status, "only with --head" in without.err) == (0, True)
    refused = audited("verify-audit", "--head", head)
    assert (refused.status, refused.out) == (1, "")
    assert "cut off" in refused.err and refused.err.count("\n") == 1
    assert audited("verify-audit", "--head", without.out.strip()).status == 0
    for bad in ("0", head[:-1], head + "0", head.upper(), "x" * 64):
        assert audited("verify-audit", "--head", bad).status == 2


def test_what_came_after_a_head_only_a_later_one_finds_cut_off(audited: Operator) -> None:
    early = audited("verify-audit").out.strip()
    audited("mint-token")
    late = audited("verify-audit").out.strip()
    unguarded(audited, "DELETE FROM audit WHERE number > 6")
    seen = audited("verify-audit", "--head", early)
    assert (seen.status, seen.out) == (0, f"{early}\n")
    assert "nothing after" not in seen.err and "nothing up to the head given" in seen.err
    assert audited("verify-audit", "--head", late).status == 1


def test_an_empty_log_has_a_head_too(operator: Operator) -> None:
    operator("list-hosts")
    seen = operator("verify-audit")
    assert (seen.status, seen.out) == (0, "\n") and "no events" in seen.err
    assert json.loads(operator("verify-audit", "--json").out)["head"] == ""


def test_a_head_that_was_lost_is_not_taken_for_that_of_an_empty_log(audited: Operator) -> None:
    """`--head "$(cat head)"` of a file that is empty would be satisfied with any log."""
    refused = audited("verify-audit", "--head", "")
    assert (refused.status, refused.out) == (2, "")
    assert "--head: it is empty" in refused.err and refused.err.count("\n") == 1


TAMPERED = {
    "changed": ("UPDATE audit SET actor = 'nobody' WHERE number = 3", "event 3 "),
    "changed to bytes": ("UPDATE audit SET detail = x'00' WHERE number = 3", "event 3 "),
    "no JSON any more": ("UPDATE audit SET detail = 'x' WHERE number = 3", "event 3 "),
    "missing": ("DELETE FROM audit WHERE number = 2", "event 2 of the audit log is missing"),
    "a forged anchor": ("INSERT INTO audit_anchor VALUES (1, 2, x'00', x'00')", "anchor"),
}


@pytest.mark.parametrize("statement, named", TAMPERED.values(), ids=TAMPERED)
def test_what_was_tampered_with_is_named_in_one_line(
    statement: str, named: str, audited: Operator
) -> None:
    unguarded(audited, statement)
    found = audited("verify-audit")
    assert (found.status, found.out) == (1, "")
    assert named in found.err and found.err.count("\n") == 1
    assert re.search(rf"^BAD +audit +.*{named}", audited("check").out, re.MULTILINE)


def test_an_event_of_another_history_does_not_fit(audited: Operator) -> None:
    """A backup that went on by itself has events as good as ours, by the same key."""
    assert audited("backup", str(audited.folder / "copy")).status == 0
    database, _ = files_of(audited)
    other = str(audited.folder / "copy" / "hostenroll.db")
    (last,) = sql(database, "SELECT max(number) FROM audit")[0]
    for files in (["--db", other], []):
        assert audited("mint-token", *files).status == audited("mint-token", *files).status == 0
    rows = sql(other, "SELECT * FROM audit WHERE number = ?", last + 1)
    unguarded(audited, f"DELETE FROM audit WHERE number = {last + 1}")
    marks = ", ".join("?" * len(rows[0]))
    sql(database, f"INSERT INTO audit VALUES ({marks})", *rows[0])
    found = audited("verify-audit")
    assert found.status == 1 and f"event {last + 2} of the audit log is not as" in found.err


def test_with_new_keys_the_log_is_verified_from_there(audited: Operator) -> None:
    files = files_of(audited)
    os.unlink(files[1])
    assert audited("verify-audit").status == 1
    open_registry(*files, audited.clock.ms, init=True).close()
    seen = audited("verify-audit")
    assert seen.status == 0 and re.search("events 7 to [0-9]+ ", seen.err)
    assert [event["number"] for event in listed(audited, "--action", "init")] == [7]
    unguarded(audited, "UPDATE audit SET actor = 'nobody' WHERE number = 7")
    assert audited("verify-audit").status == 1


def test_show_host_says_the_token_also_when_its_record_is_gone(operator: Operator) -> None:
    token = operator("mint-token", "--ttl", "1m", "--max-uses", "2").out.strip()
    with opened(files_of(operator), operator.clock) as registry:
        host = ApiDoor(registry, operator.clock).enroll(token).document["hostId"]
        operator.clock.advance(30 * 86400 + 60)
        keep_house(registry, operator.clock)
    number = token.split("_")[1]
    assert json.loads(operator("show-host", host, "--json").out)["tokenId"] == number
    gone = operator("show-token", number)
    assert gone.status == 3 and "no token with this id" in gone.err
    assert number not in operator("list-tokens").out
    assert [event["action"] for event in listed(operator, "--subject", f"token:{number}")] == [
        "mint"]  # fmt: skip


def pin_of(pair: str) -> str:
    return hostenroll.public_key_pin(ssl.PEM_cert_to_DER_cert(certificate_of(pair)))


class TlsProcess(ServerProcess):
    """`serve` with a pair of the tests."""

    def __init__(self, folder: Path, *options: str, **more: Any) -> None:
        certificate, key = write_pair(folder)
        pair = ("--tls-cert", certificate, "--tls-key", key)
        super().__init__(folder, *pair, *options, **more)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"


def printed_command(folder: Path) -> str:
    """What mint-token says to type on the host."""
    return cli(folder, "mint-token").stderr.split("enroll with it, on the host:\n")[1]


def in_shell(line: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, timeout=30, check=False, **options
    )


def joined(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    """A join command, run on a host that keeps its state in a folder, and beats once."""
    return in_shell(f"{line.rstrip()} --once --state {folder / 'state'}", cwd=str(folder))


@needs_curl
def test_what_mint_token_says_pins_the_servers_certificate(tmp_path: Path) -> None:
    with TlsProcess(tmp_path) as server:
        assert f"listens on {server.url}\n" in "".join(server.said)
        line = printed_command(tmp_path)
        assert f"-k --pinnedpubkey {pin_of('one')} " in line and "--proto '=https'" in line
        assert f"--pin {pin_of('one')} --token-file -" in line
        wrong = joined(tmp_path, line.replace(pin_of("one"), pin_of("other")))
        assert (wrong.returncode, wrong.stdout) == (90, "")
        in_clear = joined(tmp_path, line.replace("https://", "http://"))
        assert (in_clear.returncode, in_clear.stdout) == (1, "")  # a protocol that is off
        tokens = json.loads(cli(tmp_path, "list-tokens", "--json").stdout)["tokens"]
        assert [token["uses"] for token in tokens] == [0]
        right = joined(tmp_path, line)
        assert right.returncode == 0, right.stderr
        [host] = json.loads(cli(tmp_path, "list-hosts", "--json").stdout)["hosts"]
        assert (host["name"], host["status"]) == (os.uname().nodename, "online")
        assert server.terminate() == 0
    assert "Traceback" not in "".join(server.said)


@slow
def test_after_sighup_mint_token_says_the_new_pin(tmp_path: Path) -> None:
    with TlsProcess(tmp_path) as server:
        write_pair(tmp_path, "other")
        assert pin_of("one") in printed_command(tmp_path)
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "loaded the certificate anew" in "".join(server.said))
        until(lambda: pin_of("other") in printed_command(tmp_path))
        (tmp_path / "tls.key").write_text("nonsense")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "stays" in "".join(server.said))
        assert TlsDoor(server.port, "", trusting("other")).call("GET", "/healthz").status == 200
        assert pin_of("other") in printed_command(tmp_path)
        assert server.terminate() == 0
    assert len([line for line in server.said if "ERROR" in line]) == 1
    with ServerProcess(tmp_path) as server:
        assert "--pinnedpubkey" not in printed_command(tmp_path)


@slow
def test_sighup_without_tls_is_survived(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server:
        for _ in range(3):
            server.process.send_signal(signal.SIGHUP)
            assert SocketDoor(server.port, "").call("GET", "/healthz").status == 200
        assert server.terminate() == 0
    assert not re.search("ERROR|Traceback", "".join(server.said))


STARTS: Dict[str, Tuple[int, Tuple[str, ...], str]] = {
    "only a certificate": (2, ("--tls-cert", "tls.crt"), "go together"),
    "no such file": (1, ("--tls-cert", "nowhere", "--tls-key", "tls.key"), "nowhere"),
    "a key with a password": (1, ("--tls-cert", "tls.crt", "--tls-key", "sealed.key"), "password"),
    "only a key": (2, ("--tls-key", "tls.key"), "go together"),
    "a variable that is not set": (2, ("--tls-cert", "", "--tls-key", ""), "name a file"),
}


@pytest.mark.parametrize(
    "case",
    sample({name: (case,) for name, case in STARTS.items()}, "only a key", "a key with a password"),
)
def test_serve_does_not_start_without_the_tls_it_was_told(case: Any, tmp_path: Path) -> None:
    status, options, said = case
    write_pair(tmp_path)
    (tmp_path / "sealed.key").write_text(SEALED_KEY)
    # Without a terminal a question for the password would be asked on stderr.
    done = cli(
        tmp_path, "serve", "--port", "0", *options,
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("hostenroll: ") and done.stderr.count("\n") == 1
    assert said in done.stderr
    assert status == 1 or not (tmp_path / "hostenroll.db").exists()


@slow
def test_tls_is_set_by_the_environment_too(tmp_path: Path) -> None:
    certificate, key = write_pair(tmp_path)
    environment = {
        "HOSTENROLL_TLS_CERT": certificate,
        "HOSTENROLL_TLS_KEY": key,
        "HOSTENROLL_PUBLIC_URL": "https://enroll.lan:443/",
        "HOSTENROLL_ACCESS_LOG": "1",
        "HOSTENROLL_LOG_FORMAT": "json",
    }
    with Started(tmp_path, env=environment) as server:
        door = TlsDoor(server.port, "")
        assert door.call("GET", "/healthz").status == 200
        assert "https://enroll.lan:443/agent.sh" in printed_command(tmp_path)
        until(lambda: any("access" in line for line in server.lines()))


FLAGS = {"1": True, "yes": True, "true": True, "0": False, "no": False, "false": False, "": False}


@pytest.mark.parametrize("text", FLAGS)
def test_a_flag_in_the_environment_is_on_or_off(text: str) -> None:
    environment = {"HOSTENROLL_ACCESS_LOG": text}
    assert hostenroll.read_arguments(["serve"], environment).access_log is FLAGS[text]
    words = ["serve", "--access-log", "--log-format", "json"]
    assert hostenroll.read_arguments(words, environment).access_log is True


BAD_SETTINGS = {
    "HOSTENROLL_TRUSTED_PROXY": "10.0.0.0/8, proxy.lan",
    "HOSTENROLL_LOG_FORMAT": "xml",
    "HOSTENROLL_PUBLIC_URL": "enroll.lan",
    "HOSTENROLL_ACCESS_LOG": "perhaps",
    "HOSTENROLL_PORT": "x",
    "HOSTENROLL_AUDIT_KEEP": "1s",
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_bad_setting_in_the_environment_is_a_mistake_in_usage(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as usage:
        hostenroll.read_arguments(["serve"], {name: BAD_SETTINGS[name]})
    assert usage.value.code == 2 and "serve --help)" in capsys.readouterr().err
    assert hostenroll.read_arguments(["mint-token"], {name: BAD_SETTINGS[name]})  # not its own


# --trusted-proxy.

TRUSTED: Dict[str, Tuple[str, List[str], List[str]]] = {  # environment, arguments, networks
    "nobody": ("", [], []),
    "a network": ("", ["--trusted-proxy", "10.0.0.0/8"], ["10.0.0.0/8"]),
    "an address": ("", ["--trusted-proxy", "192.0.2.1"], ["192.0.2.1/32"]),
    "IPv6": ("", ["--trusted-proxy=2001:db8::/32"], ["2001:db8::/32"]),
    "several": (
        "", ["--trusted-proxy", "10.0.0.0/8", "--trusted-proxy", "::1", "--trusted-proxy=1.1.1.1"],
        ["10.0.0.0/8", "::1/128", "1.1.1.1/32"]),
    "several in one": (
        "", ["--trusted-proxy", "10.0.0.0/8,::1"], ["10.0.0.0/8", "::1/128"]),
    "the environment": ("10.0.0.0/8, ::1 1.1.1.1", [], ["10.0.0.0/8", "::1/128", "1.1.1.1/32"]),
    "arguments instead of it": (
        "10.0.0.0/8", ["--trusted-proxy", "::1", "--trusted-proxy", "1.1.1.1"],
        ["::1/128", "1.1.1.1/32"]),
}  # fmt: skip


@pytest.mark.parametrize("environment, arguments, expected", table(TRUSTED))
def test_how_trusted_proxies_are_named(
    environment: str, arguments: List[str], expected: List[str]
) -> None:
    settings = {"HOSTENROLL_TRUSTED_PROXY": environment}
    trusted = hostenroll.read_arguments(["serve", *arguments], settings).trusted_proxy
    assert [str(network) for network in trusted] == expected


@pytest.mark.parametrize(
    "text", ["", " ", ",", "proxy.lan", "10.0.0.1/8", "10.0.0.0/33", "*", "all"]
)
def test_what_names_no_network_is_a_mistake_in_usage(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as usage:
        hostenroll.read_arguments(["serve", f"--trusted-proxy={text}"], {})
    assert usage.value.code == 2 and "network" in capsys.readouterr().err


def test_the_log_of_a_server_behind_a_proxy_names_its_clients(tmp_path: Path) -> None:
    options = ("--trusted-proxy", "127.0.0.1", "--access-log")
    with ServerProcess(tmp_path, *options) as server:
        door = SocketDoor(server.port, "")
        named = [("X-Forwarded-For", "198.51.100.7")]
        assert door.call("GET", "/healthz", headers=named).status == 200
        assert door.call("GET", "/healthz").status == 200
        assert server.terminate() == 0
    seen = [line.split("GET")[0].split()[-1] for line in server.said if "/healthz" in line]
    assert seen == ["198.51.100.7", "127.0.0.1"]


# --public-url.

ADDRESSES = {
    "https://enroll.lan": ("'=https'", "https://enroll.lan", ""),
    "https://enroll.lan/": ("'=https'", "https://enroll.lan", ""),
    "https://enroll.lan:8443/fleet/": ("'=https'", "https://enroll.lan:8443/fleet", ""),
    "https://[2001:db8::1]:8443": ("'=https'", "https://[2001:db8::1]:8443", ""),
    "http://10.0.0.7:8080": ("'=http'", "http://10.0.0.7:8080", " --insecure-http"),
}


@pytest.mark.parametrize("url", ADDRESSES)
def test_mint_token_says_the_public_url(url: str, operator: Operator) -> None:
    """That of a proxy, with a certificate that authorities have signed: without pin and -k."""
    protocol, address, more = ADDRESSES[url]
    registry = open_registry(
        str(operator.folder / "hostenroll.db"),
        str(operator.folder / "hostenroll.key"),
        operator.clock.ms,
    )
    found = hostenroll.web_address(url)
    do(registry, operator.clock, lambda now: registry.start_service(found, now))
    registry.close()
    said = operator("mint-token").err
    fetched, joins = (shlex.quote(text) for text in (f"{address}/agent.sh", address))
    assert f"curl -fsS --proto {protocol} -o hostenroll-agent {fetched} &&" in said
    assert f"sh hostenroll-agent --server {joins}{more} --token-file -\n" in said
    assert " -k" not in said and "pin" not in said


@pytest.mark.parametrize(
    "url",
    [
        "", "enroll.lan", "https://", "https:///x", "ftp://enroll.lan", "https://a b",
        "https://a'b",
        "https://a?b", "https://a#b", "https://user:secret@a", "https://a;id", "https://$(id)",
        "https://a/`id`", "https://a\n", "https://a/x y", "https://\u00fc.lan", "//enroll.lan",
        "https://enroll.lan:port", "https://enroll.lan:99999", "https://]", "https://:8443",
        "https://a:1:2", "https://[::1", "https://-",
    ],
    ids=repr,
)  # fmt: skip
def test_an_address_that_is_none_is_refused(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as usage:
        hostenroll.read_arguments(["serve", f"--public-url={url}"], {})
    assert usage.value.code == 2 and "is not like https://" in capsys.readouterr().err


def test_behind_a_proxy_serve_says_where_the_proxy_finds_it(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, "--public-url", "https://enroll.lan") as server:
        assert f"listens on {server.url}\n" in "".join(server.said)
        assert "--server https://enroll.lan --token-file -" in printed_command(tmp_path)


# make-cert.


def made_cert(folder: Path, *arguments: str, **options: Any) -> Any:
    return cli(folder, "make-cert", *arguments, **options)


@slow
@needs_openssl
@needs_curl
def test_the_certificate_that_make_cert_makes_serves(tmp_path: Path) -> None:
    made = made_cert(tmp_path, "--name", "enroll.lan", "--name", "127.0.0.1", "--name", "::1")
    assert (made.returncode, made.stdout) == (0, ""), made.stderr
    command = next(line for line in made.stderr.splitlines() if line.startswith("serve "))
    assert stat.S_IMODE((tmp_path / "hostenroll-tls.key").stat().st_mode) == 0o600
    shown = in_shell(f"openssl x509 -noout -text -in {tmp_path}/hostenroll-tls.crt").stdout
    names = re.search(r"Subject Alternative Name:[^\n]*\n *([^\n]*)", shown)
    assert names is not None
    assert names[1] == "DNS:enroll.lan, IP Address:127.0.0.1, IP Address:0:0:0:0:0:0:0:1"
    assert "NIST CURVE: P-256" in shown and "ecdsa-with-SHA256" in shown
    with ServerProcess(tmp_path, *command.split()[1:]) as server:
        port = str(server.port)
        authority = ("--cacert", str(tmp_path / "hostenroll-tls.crt"))
        by_name = ("--resolve", f"enroll.lan:{port}:127.0.0.1", f"https://enroll.lan:{port}/readyz")
        assert curl(*authority, *by_name).status == 200
        assert curl(*authority, f"https://127.0.0.1:{port}/readyz").status == 200
        other = ("--resolve", f"other.lan:{port}:127.0.0.1", f"https://other.lan:{port}/readyz")
        with pytest.raises(subprocess.CalledProcessError) as stranger:
            curl(*authority, *other)
        assert stranger.value.returncode == 60
        enrolled = joined(tmp_path, printed_command(tmp_path))
        assert enrolled.returncode == 0 and "enrolled as host" in enrolled.stderr


@needs_openssl
@pytest.mark.parametrize(
    "there",
    [
        "hostenroll-tls.key",
        *(pytest.param(n, marks=slow) for n in ("hostenroll-tls.crt", "a link")),
    ],
)
def test_make_cert_overwrites_nothing(there: str, tmp_path: Path) -> None:
    if there == "a link":
        (tmp_path / "hostenroll-tls.key").symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / there).write_text("precious")
    before = sorted(path.name for path in tmp_path.iterdir())
    refused = made_cert(tmp_path, "--name", "enroll.lan")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert there == "a link" or (tmp_path / there).read_text() == "precious"


def test_without_an_openssl_program_make_cert_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    failed = made_cert(tmp_path, "--name", "enroll.lan", env={"PATH": ""})
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("hostenroll: ") and failed.stderr.count("\n") == 1
    assert "openssl" in failed.stderr and list(tmp_path.iterdir()) == []


def test_an_openssl_that_cannot_be_run_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "openssl").write_text("#!/nowhere\n")
    work = tmp_path / "work"
    work.mkdir()
    for _ in range(2):  # it is said again, and not that the key is there already
        failed = made_cert(work, "--name", "enroll.lan", env={"PATH": str(folder)})
        assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
        assert "the openssl program cannot be run (Permission denied)" in failed.stderr
        assert "make a pair on another machine" in failed.stderr
        assert list(work.iterdir()) == []


COMPLAINTS = {
    "a reason": ("echo 'no entropy' >&2; exit 1", "no entropy"),
    "no reason": ("printf '..+..\\n-----\\n' >&2; exit 3", "openssl ended with 3"),
    "a reason before dashes": ("printf 'no entropy\\n-----\\n' >&2; exit 1", "no entropy"),
    "half a certificate": (
        'while [ "$1" != -out ]; do shift; done; : > "$2"; echo full >&2; exit 1',
        "full",
    ),
}


@pytest.mark.parametrize("script, said", COMPLAINTS.values(), ids=COMPLAINTS)
def test_what_openssl_complains_of_is_said_and_nothing_is_left(
    script: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "bin/openssl").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "bin/openssl").chmod(0o755)
    path = {"PATH": str(tmp_path / "bin")}
    failed = made_cert(tmp_path / "work", "--name", "enroll.lan", env=path)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == f"hostenroll: cannot make a certificate: {said}\n"
    assert list((tmp_path / "work").iterdir()) == []


ODD_NAMES = [
    "", "a b", "a,DNS:evil", "a/O=x", "-a", ".a", "a.", "a\n", "a..b", "\u00fc.lan", "a_b",
    "x" * 300, "1.2.3.4/24", "fe80::1%eth0", "fe80::1%a,DNS:evil", "https://enroll.lan", "a:1",
    "*", "a*b", "a.*",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES, ids=[name[:20] for name in ODD_NAMES])
def test_a_name_that_is_none_gets_no_certificate(
    name: str, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(operator.folder)
    operator.environment = {"HOSTENROLL_DB": "unused"}
    refused = operator("make-cert", f"--name={name}")
    assert refused.status == 1 and refused.err.count("\n") == 1
    assert "is no name for a server" in refused.err
    assert list(operator.folder.iterdir()) == []


@slow
@needs_openssl
@pytest.mark.parametrize(
    "arguments",
    [
        ("--days", "0"),
        ("--days", "999999999"),
        ("--tls-cert", "same.pem", "--tls-key", "same.pem"),
        ("--tls-cert", "nowhere/a.crt"),
        ("--tls-key", "nowhere/a.key"),
    ],
    ids=" ".join,
)
def test_a_certificate_that_would_not_work_is_not_made(
    arguments: Tuple[str, ...], tmp_path: Path
) -> None:
    refused = made_cert(tmp_path, "--name", "enroll.lan", *arguments)
    assert refused.returncode in (1, 2, 3) and "hostenroll" in refused.stderr
    assert "Traceback" not in refused.stderr and list(tmp_path.iterdir()) == []


# systemd.


@contextlib.contextmanager
def service_manager(folder: Path, kind: str) -> Iterator[Tuple[str, Callable[[], str]]]:
    """The socket that a service tells its state to: its address, and what it has been told."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as it:
        if kind == "abstract":
            it.bind("")  # the kernel chooses a name
            address = "@" + it.getsockname()[1:].decode("ascii")
        else:
            address = str(folder / "notify")
            it.bind(address)
        it.settimeout(10)
        yield address, lambda: it.recv(4096).decode("ascii")


@pytest.mark.parametrize("kind", ["path", pytest.param("abstract", marks=slow)])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="abstract sockets are Linux's")
def test_systemd_hears_how_the_service_is(kind: str, tmp_path: Path) -> None:
    with service_manager(tmp_path, kind) as (address, told):
        with ServerProcess(tmp_path, env={"NOTIFY_SOCKET": address}) as server:
            assert told() == "READY=1"
            assert SocketDoor(server.port, "").call("GET", "/healthz").status == 200
            server.process.send_signal(signal.SIGHUP)
            assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=[0-9]+", told())
            assert told() == "READY=1"
            server.process.terminate()
            assert told() == "STOPPING=1"
            assert server._wait() == 0


def test_a_service_manager_that_is_not_there_is_done_without(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, env={"NOTIFY_SOCKET": str(tmp_path / "nowhere")}) as server:
        assert SocketDoor(server.port, "").call("GET", "/healthz").status == 200
        server.process.send_signal(signal.SIGHUP)
        until(lambda: sum("READY=1" in line for line in server.said) == 2)
        assert server.terminate() == 0
    complaints = [line for line in server.said if "service manager" in line]
    assert [re.findall("[A-Z]+=1", line) for line in complaints] == [
        ["READY=1"], ["RELOADING=1"], ["READY=1"], ["STOPPING=1"]]  # fmt: skip
    assert all(re.match(r"\S+Z WARNING cannot tell", line) for line in complaints)
    assert "USEC" not in "".join(server.said) and "Traceback" not in "".join(server.said)


# Runs a command as systemd does: with sockets from descriptor 3 on, and its own process id.
ACTIVATOR = """
import os, sys
given, count, process = eval(sys.argv[1]), sys.argv[2], sys.argv[3]
for place, descriptor in enumerate(given):
    os.dup2(descriptor, 100 + place)
for place in range(len(given)):
    os.dup2(100 + place, 3 + place)
    os.close(100 + place)
if not given:
    os.closerange(3, 10)
os.environ.update(LISTEN_FDS=count, LISTEN_PID=process or str(os.getpid()))
os.execv(sys.argv[4], sys.argv[4:])
"""


def activated(
    folder: Path, given: Sequence[socket.socket], *options: str, count: str = "", process: str = ""
) -> subprocess.Popen[str]:
    descriptors = [one.fileno() for one in given]
    return subprocess.Popen(
        [
            *(sys.executable, "-c", ACTIVATOR, repr(descriptors), count or str(len(given))),
            *(process, *SCRIPT, "serve", "--port", "0", *options),
        ],
        cwd=str(folder),
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=descriptors,
    )


@pytest.fixture
def bound() -> Iterator[socket.socket]:
    """What systemd has bound; a connection waits there before there is a server."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield listener


@pytest.mark.parametrize("scheme", [pytest.param("http", marks=slow), "https"])
def test_a_socket_of_systemd_is_served_and_whoever_waits_there(
    scheme: str, bound: socket.socket, tmp_path: Path
) -> None:
    pair = write_pair(tmp_path)
    options = ("--tls-cert", pair[0], "--tls-key", pair[1]) if scheme == "https" else ()
    port = bound.getsockname()[1]
    door = TlsDoor(port, "") if options else SocketDoor(port, "")
    said: List[Any] = []
    early = threading.Thread(target=lambda: said.append(door.call("GET", "/healthz").status))
    early.start()
    with activated(tmp_path, [bound], *options) as server:
        assert server.stderr is not None
        assert f"listens on {scheme}://127.0.0.1:{port}\n" in server.stderr.readline()
        early.join(10)
        assert said == [200]
        assert door.call("GET", "/readyz").status == 200
        server.terminate()
        assert server.wait(10) == 0


@pytest.mark.parametrize(
    "how",
    ["another process", pytest.param("nobody", marks=slow), pytest.param("no sockets", marks=slow)],
)
def test_a_socket_that_is_not_for_us_is_let_be(
    how: str, bound: socket.socket, tmp_path: Path
) -> None:
    process = {"another process": str(os.getpid()), "nobody": "x"}.get(how, "")
    count = "0" if how == "no sockets" else "1"
    with activated(tmp_path, [bound], count=count, process=process) as server:
        assert server.stderr is not None
        line = server.stderr.readline()
        assert "listens on" in line and f":{bound.getsockname()[1]}\n" not in line
        server.terminate()
        assert server.wait(10) == 0


@pytest.mark.parametrize(
    "what",
    [
        "a local socket",
        *(
            pytest.param(what, marks=slow)
            for what in ("two sockets", "a UDP socket", "one that does not listen", "nothing")
        ),
    ],
)
def test_a_socket_that_cannot_be_served_is_said_in_one_line(what: str, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        kinds = {
            "two sockets": [(socket.AF_INET, socket.SOCK_STREAM)] * 2,
            "a UDP socket": [(socket.AF_INET, socket.SOCK_DGRAM)],
            "a local socket": [(socket.AF_UNIX, socket.SOCK_STREAM)],
            "one that does not listen": [(socket.AF_INET, socket.SOCK_STREAM)],
        }
        given = [stack.enter_context(socket.socket(*kind)) for kind in kinds.get(what, ())]
        for one in given:
            local = one.family == socket.AF_UNIX
            one.bind(str(tmp_path / "local") if local else ("127.0.0.1", 0))
            if one.type == socket.SOCK_STREAM and what != "one that does not listen":
                one.listen(1)
        with activated(tmp_path, given, count="1" if what == "nothing" else "") as server:
            assert server.stderr is not None
            said = server.stderr.read()
            assert server.wait(10) == 1
    assert said.startswith("hostenroll: ") and said.count("\n") == 1
    assert "service manager" in said


needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


ODD_FOLDER = "with a blank, 100%i and $HOME"


@pytest.fixture(scope="module")
def units(tmp_path_factory: Any) -> Path:
    """The program in a folder of an odd name, and the units that it prints there."""
    folder: Path = tmp_path_factory.mktemp("units")
    program = folder / ODD_FOLDER / "hostenroll.py"
    program.parent.mkdir()
    shutil.copy(MODULE, program)
    for name, options in (("hostenroll.service", ()), ("hostenroll.socket", ("--socket",))):
        command = [sys.executable, str(program), "unit", *options]
        (folder / name).write_bytes(subprocess.run(command, stdout=subprocess.PIPE).stdout)
    return folder


def analyze(units: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["systemd-analyze", *arguments], cwd=str(units), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding="utf-8", timeout=60, check=False,
    )  # fmt: skip
    return done.stdout


@slow
@needs_systemd
def test_systemd_has_nothing_to_say_about_the_units(units: Path) -> None:
    names = [str(units / name) for name in ("hostenroll.service", "hostenroll.socket")]
    said = analyze(units, "verify", "--man=no", *names)
    assert [line for line in said.splitlines() if "hostenroll" in line] == []


def test_the_service_runs_the_program_wherever_it_lies(units: Path) -> None:
    unit = (units / "hostenroll.service").read_text()
    start = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert start is not None
    program = units / ODD_FOLDER / "hostenroll.py"
    # systemd.unit(5) has specifiers, which % begins, and systemd.service(5) variables.
    words = [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(start[1])]
    assert words == [sys.executable, str(program), "serve"]
    assert start[1].count("%") == start[1].count("%%") * 2 == 2
    typed = re.search(r"^# --db: sudo (.*)$", unit, re.MULTILINE)
    assert typed is not None
    assert shlex.split(typed[1])[:3] == [sys.executable, str(program), "mint-token"]


@slow
@needs_systemd
def test_a_python_at_an_odd_path_is_one_that_systemd_runs(units: Path) -> None:
    python = units / ODD_FOLDER / "python"
    python.symlink_to(os.path.realpath(sys.executable))
    command = [str(python), str(units / ODD_FOLDER / "hostenroll.py"), "unit"]
    (units / "odd.service").write_bytes(subprocess.run(command, stdout=subprocess.PIPE).stdout)
    assert "odd.service" not in analyze(units, "verify", "--man=no", str(units / "odd.service"))


@needs_systemd
def test_the_service_may_do_little(units: Path) -> None:
    said = analyze(units, "security", "--offline=true", str(units / "hostenroll.service"))
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said)
    if exposure is None:
        pytest.skip("this systemd-analyze knows no --offline")
    assert float(exposure[1]) < 2


# Logs.


class Started(ServerProcess):
    """`serve`, whatever it says when it listens: the port is found where it is bound."""

    def _read_port(self) -> int:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if "listens on" in line:
                until(lambda: port_of(self.process.pid))
                return port_of(self.process.pid)
        raise AssertionError(f"it ended with {self.process.wait()}: {''.join(self.said)}")

    def lines(self) -> List[Dict[str, Any]]:
        """What it has logged in JSON."""
        return [json.loads(line) for line in self.said]


def port_of(process: int) -> int:
    """The TCP port that a process listens on: Linux tells."""
    links = []
    for link in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(link))
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in links:
            return int(fields[1].partition(":")[2], 16)
    return 0


def some_life(door: SocketDoor) -> Dict[str, Any]:
    """An enrollment, three beats, a revocation and what comes of it; the secrets in it."""
    token = door.token()
    enrolled = door.enroll(token).document
    for _ in range(3):
        assert door.beat(enrolled["credential"]).status == 200
    assert door.revoke(enrolled["hostId"]).status == 200
    refused = [door.enroll(token), door.beat(enrolled["credential"])]
    assert [reply.code for reply in refused] == ["token-used", "host-revoked"]
    for secret in (token, enrolled["credential"], door.api_key):
        for place in ("", "api/hosts/", "api/hosts/tokens/x/", "healthz?x=", "api/hosts?q=", "/?"):
            door.call("GET", f"/{place}{secret}", bearer=secret)
        with door.connect() as peer:
            peer.sendall(f"{secret} / HTTP/1.1\r\nHost: {secret}\r\n\r\n".encode())
            peer.recv(65536)
    names = [reply.headers["x-request-id"] for reply in refused]
    return {
        "token": token,
        "host": enrolled["hostId"],
        "credential": enrolled["credential"],
        "refused": names,
    }


@pytest.mark.parametrize(
    "access",
    [
        pytest.param(False, id="events alone", marks=slow),
        pytest.param(True, id="with the access log"),
    ],
)
def test_json_logs_are_a_json_object_a_line(access: bool, tmp_path: Path) -> None:
    options = ("--log-format", "json", *(("--access-log",) if access else ()))
    key = api_key_of(tmp_path)
    with Started(tmp_path, *options) as server:
        door = SocketDoor(server.port, key)
        life = some_life(door)
        server.process.send_signal(signal.SIGHUP)
        assert server.terminate() == 0
    lines = server.lines()
    assert len(lines) > 5
    for line in lines:
        assert {"time", "level", "message"} <= set(line)
        assert set(line) <= {"time", "level", "message", "request", "event", "access"}
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert line["level"] in ("info", "warning", "error")
    events = {line["event"]["action"]: line for line in lines if "event" in line}
    assert {"mint", "enroll", "refuse", "revoke"} <= set(events)
    assert events["enroll"]["event"]["subject"] == f"host:{life['host']}"
    named = {line["request"]: line["event"]["code"] for line in lines if "event" in line}
    assert [named[name] for name in life["refused"]] == ["token-used", "host-revoked"]
    accesses = [line["access"] for line in lines if "access" in line]
    beats = [access for access in accesses if access["path"] == "/api/agent/heartbeat"]
    assert [beat["status"] for beat in beats] == ([200, 200, 200, 403] if access else [])
    for beat in beats:
        assert set(beat) == {"address", "method", "path", "status", "bytes", "seconds"}
        assert beat["address"] == "127.0.0.1" and 0 <= beat["seconds"] < 60
    assert_no_secret("".join(server.said), key, life)


def assert_no_secret(said: str, key: str, life: Dict[str, Any]) -> None:
    for secret in (key, life["token"]):
        assert secret.split("_", 2)[2][:12] not in said
    for part in life["credential"].split("."):
        assert part[-12:] not in said and part[:12] not in said


def test_text_logs_are_a_line_for_each_event(tmp_path: Path) -> None:
    key = api_key_of(tmp_path)
    with ServerProcess(tmp_path, "--access-log") as server:
        life = some_life(SocketDoor(server.port, key))
        assert server.terminate() == 0
    logged = server.said[2:]
    for line in logged:
        assert re.match(r"\d{4}-\d\d-\d\dT[0-9:.]+Z (INFO|WARNING|ERROR) \S", line), line
    said = "".join(logged)
    assert f" enroll host:{life['host']} by " in said and f" revoke host:{life['host']} by " in said
    for name, code in zip(life["refused"], ("token-used", "host-revoked")):
        assert re.search(rf"refuse .*: {code} \[{name}\]\n", said)
    assert len(re.findall(r"POST /api/agent/heartbeat 200 \d+ B [0-9.]+ s \[", said)) == 3
    assert_no_secret("".join(server.said), key, life)


NASTY = ["\n2027 INFO forged", "\r", "\x1b[31m", "\x00", "\u202e", "\u2028", "\x85", "\ud800"]


@pytest.mark.parametrize("format", ["text", pytest.param("json", marks=slow)])
def test_nothing_of_a_peers_making_breaks_a_line_of_the_log(format: str, tmp_path: Path) -> None:
    """Whether it comes in a path, a header, a body, or the name of the user at the terminal."""
    user = os.fsdecode("eve\u202e\x1b[31m\nERROR forged".encode())
    key = cli(tmp_path, "mint-api-key", "--all-orgs", env={"LOGNAME": user}).stdout.strip()
    options = ("--access-log", "--log-format", format)
    with Started(tmp_path, *options, env={"LOGNAME": user}) as server:
        door = SocketDoor(server.port, key)
        for nasty in NASTY:
            raw = nasty.encode("utf-8", "surrogatepass")
            escaped = "".join(f"%{byte:02X}" for byte in raw)
            assert door.call("GET", f"/x{escaped}").status == 404
            token = door.token()
            door.enroll(token, f"web{nasty}")
            door.enroll(token, "web", name=nasty, os=nasty)
            for data in (
                b"GET /x%b HTTP/1.1\r\nHost: a\r\n\r\n",
                b"G%bT / HTTP/1.1\r\nHost: a\r\n\r\n",
                b"GET / HTTP/1.1\r\nHost: a%b\r\nX: %b\r\n\r\n",
            ):
                with door.connect() as peer:
                    peer.sendall(data.replace(b"%b", raw))
                    peer.recv(65536)
        cli(tmp_path, "mint-token", env={"LOGNAME": user})
        long = "x" * 12_000
        assert door.call("GET", f"/{long}").status == 404
        assert door.call(long, "/").status == 501
        assert server.terminate() == 0
    for line in server.said:
        shown = line[:-1]
        assert not hostenroll.UNPRINTABLE.search(shown) and shown.isprintable(), shown
        assert len(shown) < 2000
        assert not shown.startswith(("2027", "ERROR"))
    if format == "json":
        for document in server.lines():
            assert not hostenroll.UNPRINTABLE.search(document["message"])


# Mutations: what the suite is worth. Each is a plausible slip in a key line. The table is checked
# against the source with every run; with HOSTENROLL_MUTATIONS=1 each slip is made in a copy, and
# the part of the suite that is named beside it has to turn red.


class Mutation(NamedTuple):
    text: str  # as it stands in the module, once
    slip: str  # what it becomes
    tests: str  # for -k
    marks: str = "not slow"  # for -m


MUTATIONS: Dict[str, Mutation] = {
    # 3. Shapes
    "a member may come twice": Mutation(
        "if len(members) != len(pairs):", "if False:", "strictly_json"
    ),
    "NaN is taken": Mutation(
        "parse_int=_read_integer, parse_constant=_refuse_constant",
        "parse_int=_read_integer",
        "strictly_json",
    ),
    "a lone surrogate is taken": Mutation(
        'json.dumps(value, ensure_ascii=False).encode("utf-8")', "pass", "strictly_json"
    ),
    "unknown members are taken": Mutation(
        "elif not self._open:", "elif False:", "wrong_with_a_body"
    ),
    "a parameter may come twice": Mutation("elif name in found:", "elif False:", "comes_once"),
    "a bound is outside": Mutation(
        "not self._minimum <= value <= self._maximum:",
        "not self._minimum <= value < self._maximum:",
        "a_count_is",
    ),
    "control characters are taken": Mutation(
        "if UNPRINTABLE.search(value):", "if False:", "no_text_brings"
    ),
    "a pattern need not match the whole": Mutation(
        "not re.fullmatch(self._pattern, value)", "not re.match(self._pattern, value)", "schema"
    ),
    # 4. Secrets
    "a slip of the pen passes": Mutation(
        'if zlib.crc32(text[:-8].encode("ascii")) != int(match[3], 16):', "if False:", "slip_of_the"
    ),
    "an API key is a token": Mutation(
        "if match is None or match[1] != prefix:", "if match is None:", "no_secret or api_key"
    ),
    "any signature is good": Mutation(
        "if key is None or not hmac.compare_digest(key.signature(signed), signature):",
        "if key is None:",
        "only_what_we_signed",
    ),
    "a payload has two spellings": Mutation(
        "return CLAIMS.fullmatch(octets) if _base64url(octets) == payload else None",
        "return CLAIMS.fullmatch(octets)",
        "only_what_we_signed or no_character",
    ),
    "a claim more is taken": Mutation(
        "return CLAIMS.fullmatch(octets) if",
        "return CLAIMS.match(octets) if",
        "only_what_we_signed",
    ),
    "the last key signs": Mutation("return self.keys[0]", "return self.keys[-1]", "ring"),
    "an event is not tied to the one before": Mutation(
        'return hmac.new(self.audit_key, previous + record, "sha256").digest()',
        'return hmac.new(self.audit_key, record, "sha256").digest()',
        "of_another_history",
    ),
    "a key file may be open to others": Mutation(
        "if mode & 0o077:", "if False:", "others_may_touch"
    ),
    "a key file is replaced before it is on the disk": Mutation(
        "            file.flush()\n            os.fsync(descriptor)\n",
        "            file.flush()\n",
        "takes_its_place",
    ),
    "another database's key file is taken": Mutation(
        "if not is_same(keyring.audit_key, current.audit_key):", "if False:", "another_database"
    ),
    # 5. Store
    "a superseded credential counts": Mutation(
        "WHERE host_id = ? AND serial = ? AND last_seen <= ? AND active",
        "WHERE host_id = ? AND serial <= ? AND last_seen <= ? AND active",
        "serial or random_life",
    ),
    "an older credential counts": Mutation(
        "WHERE host_id = ? AND serial = ? AND last_seen <= ? AND active",
        "WHERE host_id = ? AND serial >= ? AND last_seen <= ? AND active",
        "serial or random_life",
    ),
    "lastSeen goes back": Mutation(
        "AND serial = ? AND last_seen <= ? AND active",
        "AND serial = ? AND ? > 0 AND active",
        "never_goes_back or random_life",
    ),
    "lastSeen goes back in the slow way": Mutation(
        "return now if is_ahead else max(now, host.last_seen)",
        "return now",
        "never_goes_back or random_life",
    ),
    "a clock that was far ahead hides the silence of a host": Mutation(
        "return now if is_ahead else max(now, host.last_seen)",
        "return max(now, host.last_seen)",
        "clock or random_life",
    ),
    "a revoked host is heard": Mutation(
        "AND last_seen <= ? AND active", "AND last_seen <= ?", "lives_and_dies or random_life"
    ),
    "a token has one use too many": Mutation(
        "WHERE id = ? AND uses < max_uses AND revoked_at IS NULL AND expires_at > ?",
        "WHERE id = ? AND revoked_at IS NULL AND expires_at > ?",
        "may_not_be_taken",
    ),
    "a revoked token may be used": Mutation(
        "AND uses < max_uses AND revoked_at IS NULL AND expires_at > ?",
        "AND uses < max_uses AND expires_at > ?",
        "may_not_be_taken",
    ),
    "an expired token may be used": Mutation(
        "AND revoked_at IS NULL AND expires_at > ?",
        "AND revoked_at IS NULL AND ? > 0",
        "may_not_be_taken",
    ),
    "the gate is not taken": Mutation(
        "self._at_gate = self.take(self._gate)", "self._at_gate = True", "gate or turnstile"
    ),
    "the gate is kept with the lock": Mutation(
        "            if self._held:\n                self.leave_gate()\n", "", "gate or exclude"
    ),
    "who gives up keeps the gate": Mutation(
        "            if time.monotonic() > deadline:\n                self.leave_gate()\n",
        "            if time.monotonic() > deadline:\n",
        "waiting_is_bounded or gives_up",
    ),
    "the lock is not given back by a commit": Mutation(
        'self._run("COMMIT")\n        self.lock.release()', 'self._run("COMMIT")', "a_checkpoint_is"
    ),
    "a checkpoint takes no lock": Mutation(
        "if not self.lock.is_there() or not self.lock.attempt():",
        "if not self.lock.is_there():",
        "a_checkpoint_is",
    ),
    "a part holds nothing back": Mutation(
        "if self._is_part_due():\n            self._hold_back()", "pass", "moves_all_but"
    ),
    "the rest is never moved": Mutation(
        "return is_begun and changes - self._moved_at <= CHECKPOINT_REST",
        "return False",
        "moves_all_but",
    ),
    "a checkpoint takes a lock of nobody": Mutation(
        "if not self.lock.is_there() or not self.lock.attempt():",
        "if not self.lock.attempt():",
        "lock_that_others",
    ),
    "the WAL of what was replaced is left": Mutation(
        "self._let_go()  # else", "pass  # else", "spoilt_by_who"
    ),
    "nothing is ever checkpointed": Mutation(
        "if self._held_at is None and not is_whole:",
        "if not is_due:",
        "wal",
    ),
    "all is written without a sync": Mutation(
        'synchronous = "FULL" if durable else "NORMAL"', 'synchronous = "NORMAL"', "on_the_disk"
    ),
    "another file is taken for the database": Mutation(
        "if (status.st_dev, status.st_ino) != self._identity:", "if False:", "gone or replaced"
    ),
    "the old database is left while others read it": Mutation(
        '            if is_busy:\n                raise StoreBusy(f"{self.path} has been',
        '            if False:\n                raise StoreBusy(f"{self.path} has been',
        "old_database",
    ),
    "the WAL of a new database is taken for the old one's": Mutation(
        'if identity(f"{self.path}-wal") in (None, self._wal_identity):',
        "if True:",
        "replaced or put_in_place or old_database",
        "",
    ),
    "the WAL of an old database stays beside the new one": Mutation(
        'for path in (f"{self.path}-wal", f"{self.path}-shm"):\n                with suppress',
        "for path in ():\n                with suppress",
        "replaced or put_in_place or old_database",
        "",
    ),
    "foreign keys are not looked after": Mutation(
        'self._run("PRAGMA foreign_keys = ON")', "", "lives_and_dies or random_life"
    ),
    "the transaction goes on after its end": Mutation(
        'self._connection.execute("ROLLBACK")', "pass", "whichever_statement_fails"
    ),
    "who was admitted anew is overtaken by an old copy": Mutation(
        "WHERE id = ? AND admitted_serial <= ?", "WHERE id = ? AND ? > 0", "serial or random_life"
    ),
    "two get one serial": Mutation(
        "SET issued = max(issued, ?) + 1, issued_to = ?",
        "SET issued = ? + 1, issued_to = ?",
        "serial or random_life",
    ),
    "a deleted host's tokens live": Mutation(
        "UPDATE token SET revoked_at = ? WHERE host_id = ? AND revoked_at IS NULL",
        "UPDATE token SET revoked_at = ? WHERE host_id = ? AND 0",
        "deleted_one or random_life",
    ),
    "a revoked host stays active": Mutation(
        "active = int(revoked_at is None)", "active = 1", "lives_and_dies or random_life"
    ),
    "tokens are pruned too early": Mutation(
        "ELSE expires_at END) <= ?", "ELSE created_at END) <= ?", "prune or kept or random_life"
    ),
    "a page begins with the last of the one before": Mutation(
        "WHERE {own} {key} < ? ORDER BY", "WHERE {own} {key} <= ? ORDER BY", "a_list_has"
    ),
    "labels that are kept with white space are sent with it": Mutation(
        """if '": "' in labels else labels""",
        """if "'" in labels else labels""",
        "a_label_is_found",
    ),
    "a label is found by the end of its name": Mutation(
        """[f'"{name}":{json_text(value)}' for""",
        """[f':{json_text(value)}' for""",
        "a_label_is_found",
    ),
    "a text of a peer is sent as it is": Mutation(
        "text = encode_basestring_ascii", """text = '"{}"'.format""", "written_as_json"
    ),
    "a list shows all organizations": Mutation(
        'own = "" if organization is None else "organization_id = ? AND"',
        'own = "" if organization is None else "? IS NOT NULL AND"',
        "wall or a_list",
    ),
    "a census counts all organizations": Mutation(
        'where = "id > ?" if organization is None else "id > ? AND organization_id = ?"',
        'where = "id > ?" if organization is None else "id > ? AND ? IS NOT NULL"',
        "census or metrics",
    ),
    # 6. Registry
    "a token lives a millisecond longer": Mutation(
        'return "valid" if now < token.expires_at else "expired"',
        'return "valid" if now <= token.expires_at else "expired"',
        "to_the_millisecond",
    ),
    "online is a millisecond longer": Mutation(
        "if seen >= bounds.online:",
        "if seen >= bounds.online - 1:",
        "to_the_millisecond",
    ),
    "offline is a millisecond shorter": Mutation(
        'return "offline" if seen >= bounds.offline else',
        'return "offline" if seen > bounds.offline else',
        "to_the_millisecond",
    ),
    "the server's pause is silence": Mutation(
        "silence -= max(watch.pause, 0)", "silence -= 0", "silence or bounds_of_a_status"
    ),
    "the server's pause is silence in a census": Mutation(
        "return since if since > watch.started else since - max(0, watch.pause)",
        "return since",
        "bounds_of_a_status",
    ),
    "a clock that is set back leaves the servers alive": Mutation(
        "return service is not None and abs(now - service.alive) <=",
        "return service is not None and now - service.alive <=",
        "clock or random_life",
    ),
    "a pause under a server is silence": Mutation(
        "if service is None or is_served(service, now):", "if True:", "clock or random_life"
    ),
    "a pause goes on though the clock was set back": Mutation(
        "goes_on = is_brief and old.previous_alive <= old.started",
        "goes_on = is_brief",
        "soon_after_the_clock",
    ),
    "a dead host is alive by a clock that was set back": Mutation(
        "if seen > bounds.ahead:", "if False:", "dead_host or random_life"
    ),
    "the sentence of a dead host is of another clock": Mutation(
        "if last_seen > watch.ahead:",
        "if False:",
        "dead_host or clock or bounds_of",
    ),
    "who was heard in a brief life is silent": Mutation(
        "silence = watch.until - watch.started", "pass", "bounds_of_a_status or crash_loop"
    ),
    "a restart is a pause however brief": Mutation(
        "elif abs(now - old.alive) <= ALIVE_EVERY * SECOND_MS:",
        "elif False:",
        "second_server or pause or downtime",
    ),
    "a crash loop is everybody's silence": Mutation(
        "before = old.previous_alive if goes_on else old.alive", "before = old.alive", "crash_loop"
    ),
    "a token is burned by a refusal": Mutation(
        "                self._store.undo()\n                self.audit.undo(mark)",
        "                self._store.keep()\n                self.audit.undo(mark)",
        "not_used_up or random_life",
    ),
    "what was refused stands in the log as done": Mutation(
        "                self._store.undo()\n                self.audit.undo(mark)",
        "                self._store.undo()",
        "outcome or audit or refus",
    ),
    "a dead tick is answered as if it had lived": Mutation(
        "return [self._unavailable(error, writes)] * len(work)",
        "return [None] * len(work)",
        "full_disk or commit_that_fails",
    ),
    "it is answered before it is committed": Mutation(
        "        started = time.perf_counter()\n        self._store.commit()\n",
        "        started = time.perf_counter()\n",
        "lives_and_dies or commit_that_fails",
    ),
    "the audit log is not written": Mutation(
        "        self.audit.write(self.keyring)\n        started",
        "        started",
        "audit or event",
    ),
    "what was noted before a dead tick is lost": Mutation(
        "self._events, self._taken, self._notes = [], [], self._taken + self._notes",
        "self._events, self._taken, self._notes = [], [], []",
        "written_when_it_is_back or refus",
    ),
    "refusals are audited without end": Mutation(
        "if window.listed == REFUSALS_AUDITED or is_full or not problem.is_listed:",
        "if False:",
        "flood_that_is_refused or of_a_flood",
    ),
    "each that is told to wait stands in the log": Mutation(
        "instead.is_listed = count == FAILURES_ALLOWED", "instead.is_listed = True", "wrong_secrets"
    ),
    "nobody is told to wait": Mutation("if count < FAILURES_ALLOWED:", "if True:", "one_too_many"),
    "one too many is told that it is wrong": Mutation(
        "if count < FAILURES_ALLOWED:", "if count <= FAILURES_ALLOWED:", "one_too_many"
    ),
    "a guesser is told to wait for ever": Mutation(
        "if not 0 <= now - since < MINUTE * SECOND_MS:",
        "if False:",
        "one_too_many or wrong_secrets",
    ),
    "a network is as many as it has addresses": Mutation(
        '    if ":" not in address:\n        return address\n',
        "    if True:\n        return address\n",
        "ipv6_network",
    ),
    "guessers are remembered without bound": Mutation(
        "if len(self._windows) > FAILING_REMEMBERED:", "if False:", "fills_no_memory"
    ),
    "the newest guesser is forgotten first": Mutation(
        "self._windows.popitem(last=False)",
        "self._windows.popitem()",
        "fills_no_memory or wrong_secret",
    ),
    "what is not as it was written is pruned": Mutation(
        "if old and self._are_genuine(old, keyring):", "if old:", "prune"
    ),
    "an event is not chained in its order": Mutation(
        "number += 1\n                numbered",
        "number += 2\n                numbered",
        "audit or log",
    ),
    "the verifier overlooks a gap": Mutation(
        "        if event.number != number:\n", "        if False:\n", "tampered or audit"
    ),
    "the anchor need not be proved": Mutation(
        'if anchor.proof != keyring.chain(b"", anchor.record()):', "if False:", "tampered or audit"
    ),
    "an organization is no wall for hosts": Mutation(
        '        self._require_own(by, host.organization_id, "host")\n', "", "wall"
    ),
    "an organization is no wall for tokens": Mutation(
        '        self._require_own(by, token.organization_id, "token")\n', "", "wall"
    ),
    "a key of one organization may name another": Mutation(
        "if by.organization not in (ALL_ORGANIZATIONS, asked):", "if False:", "wall or random_life"
    ),
    "a revoked API key is good": Mutation(
        "        if key.revoked_at is not None:\n            problem = ApiKeyInvalid(",
        "        if False:\n            problem = ApiKeyInvalid(",
        "until_it_is_revoked",
    ),
    "an API key needs no secret": Mutation(
        "if secret is None or key is None or not is_same(secret.digest(), key.secret_hash):",
        "if secret is None or key is None:",
        "api_key",
    ),
    "a token needs no secret": Mutation(
        "if secret is None or token is None or not is_same(secret.digest(), token.secret_hash):",
        "if secret is None or token is None:",
        "random_life or only_to_who",
    ),
    "a replay is answered after the first beat": Mutation(
        "is_used = host.last_seen > 0 and host.serial >= host.admitted_serial",
        "is_used = False",
        "replay",
    ),
    "a replay is answered for ever": Mutation(
        "return not is_used and now - host.admitted_at <= REPLAY_WINDOW_MS",
        "return not is_used",
        "replay",
    ),
    "a replay is answered a millisecond less": Mutation(
        "now - host.admitted_at <= REPLAY_WINDOW_MS",
        "now - host.admitted_at < REPLAY_WINDOW_MS",
        "replay",
    ),
    "a replay with a revoked token is answered": Mutation(
        "if token.revoked_at is not None or host.revoked_at is not None:",
        "if host.revoked_at is not None:",
        "replay",
    ),
    "a bound hostname is not looked at": Mutation(
        "if token.hostname and not is_same_hostname(token.hostname, applicant.hostname):",
        "if False:",
        "uses_up_nothing or random_life",
    ),
    "a bound hostname changes with a beat": Mutation(
        "        if host.bound:\n            changes.pop(",
        "        if False:\n            changes.pop(",
        "bound_hostname",
    ),
    "a revoked host re-enrolls": Mutation(
        "        if host.revoked_at is not None:\n            raise HostRevoked()\n        serial",
        "        serial",
        "re_enroll",
    ),
    "a re-enrollment is one serial on": Mutation(
        "serial = max(host.issued, host.serial) + SERIALS_LOST + 1",
        "serial = max(host.issued, host.serial) + 1",
        "serials or random_life",
    ),
    "an expired credential is good a millisecond more": Mutation(
        "now > (expires_at + CREDENTIAL_GRACE) * SECOND_MS:",
        "now > (expires_at + CREDENTIAL_GRACE) * SECOND_MS + 1:",
        "week_after or random_life",
    ),
    "a credential is renewed too late": Mutation(
        "return (claims.expires_at * SECOND_MS - now) * 3 < life * SECOND_MS",
        "return (claims.expires_at * SECOND_MS - now) * 4 < life * SECOND_MS",
        "renewed",
    ),
    "a credential of an older key is not renewed": Mutation(
        "        if claims.kid != self.keyring.first.kid:\n            return True\n",
        "",
        "rotated_key",
    ),
    "a heartbeat that waited is judged by the keys of before": Mutation(
        "if self._beaten_by is self.keyring and ", "if ", "retired_while or not_forgotten_with"
    ),
    "what died is counted": Mutation(
        "        self.audit.forget()\n        self._counted.clear()\n",
        "        self.audit.forget()\n",
        "only_what_is_committed",
    ),
    "a key that is gone is good within its tick": Mutation(
        "if standing.kid not in self.keyring.kids:  # it was",
        "if False:  # it was",
        "counts_no_more",
    ),
    "a serial far ahead is good": Mutation(
        "if standing.serial > host.issued + SERIALS_LOST:", "if False:", "forged_serial"
    ),
    "a superseded credential is only revoked": Mutation(
        "        if standing.serial < host.serial:\n",
        "        if standing.serial > host.serial + 10**9:\n",
        "serial",
    ),
    "a newer credential supersedes nothing": Mutation(
        "        if standing.serial > host.serial:\n", "        if False:\n", "serial"
    ),
    "a key in use is retired": Mutation("if hosts and not force:", "if False:", "retire or keys"),
    "the key that signs is retired": Mutation(
        "if kid == self.keyring.first.kid:\n            raise Conflict",
        "if False:\n            raise Conflict",
        "retire or keys",
    ),
    "any database in the place of ours is gone on with": Mutation(
        "            if not _is_pair(store, self.keyring):\n                raise StoreError(",
        "            if False:\n                raise StoreError(",
        "no_pair",
        "",
    ),
    "a database that was put in place is told of no server": Mutation(
        "            self._is_to_announce = True\n            self._censuses",
        "            self._censuses",
        "put_in_place",
    ),
    "the counts of another database are shown": Mutation(
        "            self._censuses.clear()\n            log.",
        "            log.",
        "put_in_place",
    ),
    "a beat falls short and nobody asks why": Mutation(
        "self._store.beat(rows) == len(rows):",
        "self._store.beat(rows) >= 0:",
        "lives_and_dies",
    ),
    # 7. Messages
    "a field may come twice": Mutation(
        "if len(fields.get(name, ())) > 1:", "if len(fields.get(name, ())) > 2:", "read_otherwise"
    ),
    "a length stands beside chunks": Mutation(
        "if length is not None or minor == 0:", "if minor == 0:", "read_otherwise"
    ),
    "HTTP/1.0 has chunks": Mutation(
        "if length is not None or minor == 0:", "if length is not None:", "read_otherwise"
    ),
    "a length is what int() takes": Mutation(
        'if not re.fullmatch("[0-9]+", length):', "if False:", "read_otherwise"
    ),
    "a body is one byte longer": Mutation(
        "int(digits) > BODY_MAXIMUM:", "int(digits) > BODY_MAXIMUM + 1:", "read_otherwise"
    ),
    "a bare line feed ends a line": Mutation(
        'if not data.count(b"\\r\\n") == data.count(b"\\r") == data.count(b"\\n"):',
        "if False:",
        "read_otherwise",
    ),
    "a space stands before the colon": Mutation(
        "not FIELD_NAME.fullmatch(name)", "not FIELD_NAME.match(name)", "read_otherwise"
    ),
    "a field has control characters": Mutation(
        "not FIELD_VALUE.fullmatch(value)", "not FIELD_VALUE.match(value)", "read_otherwise"
    ),
    "a request needs no Host": Mutation(
        'if ("host" not in single and minor > 0) or', "if", "read_otherwise"
    ),
    "a chunk need not end": Mutation(
        'if not chunk.endswith(b"\\r\\n"):', "if False:", "read_otherwise"
    ),
    "chunks go over the bound together": Mutation(
        "self._announced += size", "self._announced = size", "read_otherwise"
    ),
    "who is not trusted is believed": Mutation(
        "if address is None or not is_within(address, proxies):",
        "if address is None:",
        "by_a_proxy",
    ),
    "a proxy's own address is a client's": Mutation(
        "if address is None or not is_within(address, proxies):", "if True:", "by_a_proxy"
    ),
    "what a client says of itself is believed": Mutation(
        "for hop in hops[: -HOPS_MAXIMUM - 1 : -1]:", "for hop in hops:", "by_a_proxy"
    ),
    "proxies are without number": Mutation(
        "for hop in hops[: -HOPS_MAXIMUM - 1 : -1]:",
        "for hop in hops[::-1]:",
        "by_a_proxy or absurd_list",
    ),
    "chunk lines are without bound": Mutation(
        "if self._overhead > CHUNK_OVERHEAD_MAXIMUM:", "if False:", "read_otherwise"
    ),
    "a head is one byte longer": Mutation(
        "if end < 0 or end + 4 - start > HEAD_MAXIMUM:",
        "if end < 0 or end + 3 - start > HEAD_MAXIMUM:",
        "read_otherwise or well_formed",
    ),
    "close is not heard": Mutation(
        'keep_alive=minor > 0 and b"close" not in',
        'keep_alive=minor > 0 and b"closed" not in',
        "when_a_connection_ends",
    ),
    "an answer to HEAD has a body": Mutation(
        "return head if head_only else head + response.body",
        "return head + response.body",
        "head",
    ),
    "a field of an answer is split": Mutation(
        'if UNPRINTABLE.search("".join(lines)):', "if False:", "control or field or header"
    ),
    # 8. Assets
    "the agent trusts whom it cannot check": Mutation(
        '[ -z "$pin" ] || [ -n "$cacert" ] || set --', "set --", "hears_nothing or is_trusted", ""
    ),
    "the agent trusts whoever has another pin": Mutation(
        '[ -z "$pin" ] || set -- "$@" --pinnedpubkey "$pin"', ":", "hears_nothing or is_trusted", ""
    ),
    "a .curlrc has a say": Mutation(
        'set -- -q "$server$1" -sS', 'set -- "$server$1" -sS', "hears_nothing", ""
    ),
    "a full disk takes the credential": Mutation(
        'mv -f "$new" "$state/$1" 2>/dev/null && return',
        'cat "$new" >"$state/$1" && return',
        "disk_the_old or disk_that_fills or kept_before",
        "",
    ),
    "an old credential takes the place of a new one": Mutation(
        'load_credential && [ "$credential" = "$used" ] || return 0',
        "load_credential || return 0",
        "renew or enrolls_anew",
        "",
    ),
    "secrets go over http": Mutation(
        '[ -n "$loopback$insecure" ] ||', "true ||", "mistake_in_the_agents"
    ),
    "an enrollment is not asked for again by its name": Mutation(
        '[ "$key_token" != "$token_id" ] || [ ${#key} -ne 32 ] || return 0',
        "false",
        "answer_was_lost",
    ),
    "a fleet waits as one": Mutation(
        'draw "$bound"\n    pause', "drawn=$bound\n    pause", "longer_and_longer", ""
    ),
    "an agent waits without bound": Mutation(
        '[ "$bound" -le "$LONGEST_WAIT" ] || bound=$LONGEST_WAIT', ":", "longer_and_longer", ""
    ),
    "two Retry-After lines are a sum": Mutation(
        "sed -n '$s/^0*", "sed -n 's/^0*", "no_retry_after"
    ),
    "an interval is a number in octal": Mutation(
        r"'0*\([0-9]\{1,5\}\)[,}]'", r"'\([0-9]\{1,5\}\)[,}]'", "no_interval_ends"
    ),
    "a name is markup": Mutation(
        "this.said.textContent = refused", "this.said.innerHTML = refused", "make_markup"
    ),
    "the page keeps the key for ever": Mutation(
        "  sessionStorage.setItem(KEY, key);", "  localStorage.setItem(KEY, key);", "to_keep_a_key"
    ),
    # 9. Api
    "a viewer may write": Mutation(
        'if route.caller == "admin" and by.role != "admin":',
        "if False:",
        "api_key or random_life",
    ),
    "a body is read before the role is looked at": Mutation(
        "        values = route.query.read(read_query(query))\n", "        values = {}\n", "query"
    ),
    "a write goes as a read": Mutation(
        'return Act(run, writes=route.method != "GET", origin=origin_of(request))',
        'return Act(run, writes=route.method == "POST", origin=origin_of(request))',
        "random_life",
    ),
    "a heartbeat is heard in a body": Mutation(
        'if b"\\r\\n\\r\\n" in before:', "if False:", "come_to_the_same"
    ),
    "what follows a heartbeat is not heard": Mutation(
        "if request is None or reader.buffer or request.body",
        "if request is None or request.body",
        "short_way or come_to_the_same",
    ),
    "a heartbeat with facts is heard as a plain one": Mutation(
        ' or request.body not in (b"", b"{}"):', ":", "come_to_the_same"
    ),
    "any request is heard as a heartbeat": Mutation(
        "return request.head if route.admit is _admit_heartbeat else None",
        "return request.head",
        "come_to_the_same",
    ),
    "a heartbeat that is due goes the short way": Mutation(
        "if claims is None or is_due(claims, now):",
        "if claims is None:",
        "not_plain_goes_the_long_way",
    ),
    "a credential that becomes due is kept": Mutation(
        " and not is_due(claims, self._until):", ":", "kept_no_longer"
    ),
    "what is verified once is good for ever": Mutation(
        " or not self._since <= now < self._until:", ":", "kept_no_longer"
    ),
    "a key that no longer signs is heard": Mutation(
        "if self._registry.keyring is not self._keyring or not self._since",
        "if not self._since",
        "kept_no_longer",
    ),
    "the cache of credentials has no bound": Mutation(
        "if len(self._known) < CREDENTIALS_CACHED and not", "if not", "takes_nobodys_place"
    ),
    "a head with more lines keeps all others from being heard": Mutation(
        "if END_OF_LINE in rest:", "if rest == END_OF_LINE:", "goes_the_short_way"
    ),
    "HEAD is not GET": Mutation(
        '            methods["HEAD"] = methods["GET"]\n', "            pass\n", "head"
    ),
    # 10. Server
    "a signal does not wake the loop": Mutation(
        "        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)\n",
        "",
        "just_before_the_server_waits",
    ),
    "for want of memory no credential is forgotten": Mutation(
        "        self._short_way.forget(0)\n", "        pass\n", "takes_nobodys_place"
    ),
    "a server reads on while its answer is owed": Mutation(
        "            self._reads.append(owed)\n            self._move(connection, None)\n",
        "            self._reads.append(owed)\n",
        "put_together",
    ),
    "an answer that is not taken whole is forgotten": Mutation(
        "connection.output = memoryview(data)[sent:]",
        "connection.output = memoryview(data)[:0]",
        "slow_reader or byte_at_a_time or on_a_socket",
    ),
    "a heartbeat is heard in the middle of a request": Mutation(
        "if is_between and not self._access_log and not reader.proxies:",
        "if not self._access_log and not reader.proxies:",
        "middle_of_a_request",
    ),
    "the access log misses the short way": Mutation(
        "if is_between and not self._access_log and not reader.proxies:",
        "if is_between and not reader.proxies:",
        "log",
    ),
    "a heartbeat that asks to close is kept alive": Mutation(
        "closes = is_stopping or not head.keep_alive",
        "closes = is_stopping",
        "asks_to_close",
    ),
    "a heartbeat is not told that the server stops": Mutation(
        "closes = is_stopping or not head.keep_alive",
        "closes = not head.keep_alive",
        "when_the_server_stops_is_the_last",
    ),
    "a refused heartbeat is called by the next one's name": Mutation(
        "reader.connection, reader.number - 1)", "reader.connection, reader.number)", "name"
    ),
    "who waits for another writer is hurried": Mutation(
        "            if connection.phase is not None:\n"
        "                self._move(connection, None)\n",
        "            pass\n",
        "is_not_hurried",
    ),
    "held memory is without bound": Mutation(
        "            if self._held > HELD_MAXIMUM and self._relieve(connection):\n"
        "                return None\n",
        "",
        "unfinished_crowd",
    ),
    "untaken answers are without bound": Mutation(
        "        if self._held > HELD_MAXIMUM and self._relieve(connection):\n"
        "            return False\n",
        "",
        "nobody_takes_hold",
    ),
    "who comes last gives way": Mutation(
        "greatest = max((*holders, connection), key=lambda it: it.held + len(it.output))",
        "greatest = connection",
        "holds_little",
    ),
    "who does not take answers holds nothing": Mutation(
        "key=lambda it: it.held + len(it.output))",
        "key=lambda it: it.held)",
        "holds_most",
    ),
    "everybody is taken for a proxy": Mutation(
        "if self._proxies and is_within(ipaddress.ip_address(address), self._proxies):",
        "if self._proxies:",
        "nobody_else_is_believed",
    ),
    "a heartbeat by a proxy is the proxy's": Mutation(
        "if is_between and not self._access_log and not reader.proxies:",
        "if is_between and not self._access_log:",
        "by_a_proxy",
    ),
    "nobody's time is ever over": Mutation(
        "return self.first() if moment - self.since >= self._seconds else None",
        "return None",
        "dropped",
    ),
    "a trickle buys time": Mutation(
        "if connection.phase is not self._in_head and reader.has_begun:",
        "if reader.has_begun:",
        "byte_by_byte_has_one_deadline",
    ),
    "a crowd keeps everybody out": Mutation(
        "            if connection is not None:\n                self._drop(connection)\n"
        "                return\n",
        "",
        "at_the_limit",
    ),
    "a refusal is reset away": Mutation(
        "if connection.lingers or connection.reader.buffer:",
        "if False:",
        "still_read or still_sends",
    ),
    "a request in flight is not answered at the end": Mutation(
        "if phase is self._shaking or not connection.held:", "if True:", "in_flight"
    ),
    "one connection's defect ends the loop": Mutation(
        '        self._own_up("a connection failed")\n        self._drop(connection)\n',
        "        raise\n",
        "goes_wrong_with_a_connection",
    ),
    "a newcomer is dropped for a descriptor that nobody wants": Mutation(
        "                if fresh:  # it is said",
        "                if False:  # it is said",
        "descriptor",
    ),
    "who waits for the lock is never told": Mutation(
        "if self._moment - self._waiting_since <= LOCK_PATIENCE:", "if True:", "waits_too_long"
    ),
    "a stall is felt by one": Mutation(
        "self._begin(self._idle.popleft(), request, due)",
        "self._begin(self._idle.popleft(), request, now)",
        "paced or is_due",
    ),
    "who is late makes the others late": Mutation(
        "due = now if gaps is None else due + next(gaps)",
        "due = now if gaps is None else now + next(gaps)",
        "paced or is_due",
    ),
    "who is given up has not waited": Mutation(
        "            self._observe(now - due)\n            given_up",
        "            given_up",
        "is_given_up",
        "",
    ),
    # 11. Command line
    "there are colours for who wants none": Mutation(
        'knows and not environment.get("NO_COLOR")', "knows", "who_wants_none"
    ),
    "what is refused has failed": Mutation(
        "        return EXIT_REFUSED\n",
        "        return EXIT_FAILED\n",
        "said_in_one_line_and_a_status",
    ),
    "who has read enough is told of it": Mutation(
        "    except BrokenPipeError:  # whoever read us has read enough\n",
        "    except BlockingIOError:\n",
        "read_enough",
    ),
    "a secret that is lost is no matter": Mutation(
        "    except OSError as error:\n        _abandon(sys.stdout)\n",
        "    except BlockingIOError as error:\n        _abandon(sys.stdout)\n",
        "got_no_secret",
    ),
    "an interrupted command is done": Mutation(
        "return EXIT_INTERRUPTED", "return 0", "interrupted_under_load", ""
    ),
}


def test_every_mutation_is_of_text_that_is_there_once_and_of_tests_that_there_are() -> None:
    there = {name: SOURCE.count(mutation.text) for name, mutation in MUTATIONS.items()}
    assert {name: count for name, count in there.items() if count != 1} == {}
    assert [name for name, mutation in MUTATIONS.items() if mutation.text == mutation.slip] == []
    tests = {name: test for name, test in globals().items() if name.startswith("test_")}
    fast = "\n".join(
        name
        for name, test in tests.items()
        if slow.mark not in getattr(test, "pytestmark", ()) and "mutation" not in name
    )
    for mutation in MUTATIONS.values():
        names = "\n".join(tests) if mutation.marks == "" else fast
        assert [word for word in mutation.tests.split(" or ") if word not in names] == []


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all slips: pytest takes seconds to make so many tests ready, and keeps them."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("test_hostenroll.py", "schema.sql", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@slow
@pytest.mark.skipif("HOSTENROLL_MUTATIONS" not in os.environ, reason="not HOSTENROLL_MUTATIONS=1")
@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_the_suite_turns_red_with(mutation: Mutation, copy: Path) -> None:
    text, slip, tests, marks = mutation
    for compiled in (copy / "__pycache__").glob("hostenroll.*"):  # known by second and size alone
        compiled.unlink()
    (copy / "hostenroll.py").write_text(SOURCE.replace(text, slip), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", marks]
    environment = {**clean_environment(), "PYTHONPATH": str(copy)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    run = subprocess.Popen(
        [*command, "-k", f"({tests}) and not mutation"],
        cwd=str(copy),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said = run.communicate(timeout=120)[0]
    except subprocess.TimeoutExpired:  # a suite that hangs is red, too
        run.kill()
        run.communicate()
        return
    assert run.returncode == 1 and re.search(" failed| error", said), said[-2000:]


# bench.


def test_a_fleet_beats_each_host_once_before_any_again(keyring: hostenroll.Keyring) -> None:
    beats = hostenroll.heartbeats(range(7, 507), keyring.first, b"", 1000)
    hosts = []
    for beat in itertools.islice(beats, 1000):
        request = RequestReader("192.0.2.7").next(beat)
        assert request is not None and request.authorization is not None
        claims = keyring.verify(request.authorization)
        assert claims._replace(host=0) == (0, "default", 1, 1, None, keyring.first.kid)
        hosts.append(claims.host)
    assert sorted(hosts[:500]) == sorted(hosts[500:]) == list(range(7, 507))
    near = [1 for one, other in zip(hosts, hosts[1:]) if abs(one - other) < 25]
    assert len(near) < 200  # a tenth of them by chance: neighbours do not come together


def test_the_hosts_of_a_benchmark_are_those_of_a_real_fleet(
    registry: Registry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostenroll, "BENCH_BATCH", 40)
    (kid,) = keys_of(registry, clock)
    made = hostenroll._make_fleet(registry, 100, kid, lambda: clock.ms, hostenroll.unheard)
    query = hostenroll.HostQuery(limit=1000)
    hosts = [view for page in pages(registry, clock, "hosts", query) for view in page.items]
    listed = pages(registry, clock, "tokens", hostenroll.TokenQuery())
    tokens = [view for page in listed for view in page.items]
    assert sorted(made) == sorted(view.host.id for view in hosts) and len(set(made)) == 100
    assert {view.status for view in hosts} == {"online"}
    facts = "SELECT count(DISTINCT hostname), count(DISTINCT issued_to) FROM host"
    assert connection_of(registry).execute(facts).fetchone() == (100, 100)
    uses = [(view.token.uses, view.token.max_uses) for view in tokens]
    assert sorted(uses) == [(20, 20), (40, 40), (40, 40)]
    assert len(happened(registry, "enroll")) == 100 and len(happened(registry, "mint")) == 3
    assert do(registry, clock, lambda now: registry.verify_audit(None), writes=False).last >= 103


@pytest.mark.parametrize(
    ("text", "usage"),
    table(
        {
            "linux": ("00:01:05   2048\n", (65.0, 2 << 20)),
            "days of it": ("1-02:00:05 10\n", (93605.0, 10240)),
            "a mac": ("  1:05.25  2048\n", (65.25, 2 << 20)),
        }
    ),
)
def test_where_there_is_no_proc_ps_says_what_a_process_takes(text: str, usage: Any) -> None:
    assert hostenroll.read_ps(text) == usage


def test_what_a_process_takes_is_known() -> None:
    before = time.process_time()
    cpu, resident = hostenroll.process_usage(os.getpid())
    assert before - 0.5 < cpu < time.process_time() + 0.5
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 10 << 20 < resident <= peak + (4 << 20)
    with pytest.raises(hostenroll.OperatorError):
        hostenroll.read_ps("")


def loaded(rate: float, each: float, p99: float = 1.0) -> Dict[str, Any]:
    return {"perSecond": rate, "serverCpuMicrosecondsEach": each, "p99Milliseconds": p99}


def bench_arguments(*arguments: str) -> Any:
    return hostenroll.read_arguments(["bench", *arguments], {})


@pytest.mark.parametrize(
    ("options", "full", "rates"),
    table(
        {
            "the server was the limit": ((), loaded(40_000, 25), [28_000, 19_600, 13_720, 9_604]),
            "the load was": ((), loaded(20_000, 25), [20_000, 14_000, 9_800, 6_860]),
            "one core for both": ((), loaded(22_000, 20), [22_000, 15_400, 10_780, 7_546]),
            "CPU too little to be seen": ((), loaded(1000, 0), [700, 490, 343, 240]),
            "hardly anything": ((), loaded(0.4, 0), [1, 1, 1, 1]),
            "a rate that is asked for": (("--rate", "16700"), loaded(20_000, 25), [16_700]),
        }
    ),
)
def test_what_a_box_is_to_hold_leaves_room_and_is_no_more_than_it_did(
    options: Tuple[str, ...], full: Any, rates: List[int]
) -> None:
    assert hostenroll.paced_rates(bench_arguments(*options).rate, full) == rates


@pytest.mark.parametrize(
    ("paced", "hosts"),
    table(
        {
            "in time": ([(20_000, 49.9)], (600_000, 1_200_000)),
            "in time at the second": ([(20_000, 80.0), (14_000, 9.0)], (420_000, 840_000)),
            "never": ([(20_000, 80.0), (14_000, 50.1)], (0, 0)),
        }
    ),
)
def test_a_box_holds_what_it_was_seen_to_answer_in_time(paced: Any, hosts: Any) -> None:
    tried = [{"duePerSecond": rate, "p99Milliseconds": p99} for rate, p99 in paced]
    document = hostenroll.bench_document(bench_arguments(), {"paced": tried}, 50 << 20)
    assert (document["hostsAt30Seconds"], document["hostsAt60Seconds"]) == hosts
    assert document["databaseBytesPerHost"] == round((50 << 20) / 100_000)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--hosts", "99"),
        ("--hosts", "10000001"),
        ("--hosts", "-1"),
        ("--seconds", "0"),
        ("--seconds", "601"),
        ("--connections", "0"),
        ("--connections", "1025"),
        ("--rate", "0"),
        ("--rate", "1e3"),
        ("--db", "hostenroll.db"),
    ],
    ids=" ".join,
)
def test_a_benchmark_out_of_bounds_is_a_mistake_in_usage(
    arguments: Tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as usage:
        bench_arguments(*arguments)
    assert usage.value.code == 2 and arguments[0] in capsys.readouterr().err


class BenchProcess:
    """`hostenroll.py bench` as a process that has all its children marked, and a folder of its
    own for what is temporary."""

    def __init__(self, folder: Path, *options: str, **more: Any) -> None:
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.mark = f"BENCH_OF={folder}"
        command = [*more.pop("command", (sys.executable, str(MODULE))), "bench", *options]
        settings = {"TMPDIR": str(self.scratch), "BENCH_OF": str(folder), "TERM": "xterm"}
        self.process = subprocess.Popen(
            command,
            cwd=str(folder),
            env={**clean_environment(), "HOSTENROLL_TLS_CERT": "/nowhere", **settings},
            stdout=subprocess.PIPE,
            stderr=more.pop("stderr", subprocess.PIPE),
            text=True,
            **more,
        )

    def alive(self) -> Dict[int, List[str]]:
        """The processes of this benchmark, with their command lines."""
        found = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if self.mark.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                    found[int(pid)] = [os.fsdecode(word) for word in words]
        return found

    def server(self) -> Optional[int]:
        """The process id of its server, when that listens."""
        logs = list(self.scratch.glob("*/log"))
        if not logs or "listens on" not in logs[0].read_text():
            return None
        return next((pid for pid, words in self.alive().items() if "serve" in words), None)

    def wait_for(self, what: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 30
        found = what()
        while not found:
            assert time.monotonic() < deadline
            time.sleep(0.005)
            found = what()
        return found

    def end(self) -> SimpleNamespace:
        """What it said; nothing of it is left."""
        out, err = self.process.communicate(timeout=60)
        self.wait_for(lambda: not self.alive())
        left = list(self.scratch.iterdir())
        return SimpleNamespace(status=self.process.returncode, out=out, err=err, left=left)

    def __enter__(self) -> BenchProcess:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()


SMALL = ("--hosts", "300", "--seconds", "1", "--connections", "8")
LOAD_MEMBERS = {
    "answered": int,
    "unanswered": int,
    "seconds": float,
    "perSecond": float,
    "serverCpuMicrosecondsEach": float,
    "serverCpuShareOfOneCore": float,
    "loadCpuShareOfOneCore": float,
    "p50Milliseconds": float,
    "p99Milliseconds": float,
    "p999Milliseconds": float,
}


@slow
@needs_proc
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--close",),
        pytest.param(("--tls",), marks=needs_openssl),
        pytest.param(("--tls", "--close", "--rate", "100"), marks=needs_openssl),
    ],
    ids=lambda options: " ".join(options) or "kept alive",
)
def test_a_benchmark_in_json_has_its_members(options: Tuple[str, ...], tmp_path: Path) -> None:
    with BenchProcess(tmp_path, *SMALL, *options, "--json") as bench:
        done = bench.end()
    assert (done.status, done.err, done.left) == (0, "", [])
    document = json.loads(done.out)
    settings = {
        name: document[name] for name in ("hosts", "seconds", "connections", "close", "tls")
    }
    assert settings == {
        "hosts": 300,
        "seconds": 1,
        "connections": 8,
        "close": "--close" in options,
        "tls": "--tls" in options,
    }
    for load in (document["enrollments"], document["fullLoad"], *document["paced"]):
        more = {} if load not in document["paced"] else {"duePerSecond": int}
        assert {name: type(value) for name, value in load.items()} == {**LOAD_MEMBERS, **more}
        assert 0 < load["p50Milliseconds"] <= load["p99Milliseconds"] <= load["p999Milliseconds"]
        assert load["answered"] / load["seconds"] == pytest.approx(load["perSecond"], rel=0.01)
    assert document["enrollments"]["answered"] == 150
    assert document["fullLoad"]["seconds"] == pytest.approx(1, abs=0.5)
    assert document["fullLoad"]["serverCpuMicrosecondsEach"] > 0
    last = document["paced"][-1]
    assert last["answered"] == pytest.approx(last["duePerSecond"], rel=0.4, abs=20)
    held = last["duePerSecond"] if last["p99Milliseconds"] <= 50 else 0
    assert document["heldPerSecond"] == held
    assert document["hostsAt30Seconds"] * 2 == document["hostsAt60Seconds"] == held * 60
    assert 100_000 < document["databaseBytes"] < 1_000_000
    assert 10 << 20 < document["memoryBytes"] < 150 << 20


@slow
@needs_proc
def test_a_benchmark_shows_on_a_terminal_how_far_it_is_and_then_what_it_measured(
    tmp_path: Path,
) -> None:
    ours, theirs = os.openpty()
    with BenchProcess(tmp_path, *SMALL, stderr=theirs) as bench:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while True:
                shown += os.read(ours, 4096)
        done = bench.end()
        os.close(ours)
    assert done.status == 0 and done.left == []
    assert "\n" not in shown.decode() and shown.endswith(b"\r\x1b[K")
    for step in (b"full load: ", b"heartbeats a second: "):  # what came before took no second
        assert step in shown
    names = [line.split("  ")[0] for line in done.out.splitlines() if line[:1] not in (" ", "")]
    for name in ("fleet", "enrollments", "full load", "paced", "memory", "database", "can hold"):
        assert name in names
    assert "Can hold: 70% of the heartbeats" in done.out


@slow
@needs_proc
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)
def test_a_benchmark_that_is_interrupted_under_load_leaves_nothing(
    number: signal.Signals, tmp_path: Path
) -> None:
    with BenchProcess(tmp_path, *SMALL, "--seconds", "60") as bench:
        bench.wait_for(lambda: bench.server() and len(bench.alive()) == 3)
        bench.process.send_signal(number)
        done = bench.end()
    assert (done.status, done.out, done.err, done.left) == (130, "", "", [])


@slow
@needs_proc
@pytest.mark.parametrize("again", [False, True], ids=["once", "again and again"])
def test_a_benchmark_that_is_interrupted_at_any_time_leaves_nothing(
    again: bool, tmp_path: Path
) -> None:
    for place in range(10):
        folder = tmp_path / str(place)
        folder.mkdir()
        with BenchProcess(folder, *SMALL, "--hosts", "2000", "--seconds", "60") as bench:
            bench.wait_for(lambda: list(bench.scratch.iterdir()))
            time.sleep(place * 0.1)
            bench.process.send_signal(signal.SIGINT)
            while again and bench.process.poll() is None:
                bench.process.send_signal(signal.SIGINT)
                time.sleep(0.002)
            done = bench.end()
        assert (done.status, done.out, done.err, done.left) == (130, "", "", []), place


@slow
@needs_proc
@pytest.mark.parametrize("who", ["server", "load"])
def test_when_a_child_of_a_benchmark_is_killed_it_says_so_and_leaves_nothing(
    who: str, tmp_path: Path
) -> None:
    with BenchProcess(tmp_path, *SMALL, "--seconds", "60") as bench:
        server = bench.wait_for(bench.server)
        bench.wait_for(lambda: len(bench.alive()) == 3)
        (load,) = set(bench.alive()) - {server, bench.process.pid}
        os.kill(server if who == "server" else load, signal.SIGKILL)
        done = bench.end()
    assert (done.status, done.out, done.left) == (1, "", [])
    assert done.err.startswith("hostenroll: ") and done.err.count("\n") == 1


@slow
@needs_proc
def test_when_a_benchmark_is_killed_its_server_does_not_outlive_it_for_long(tmp_path: Path) -> None:
    with BenchProcess(tmp_path, *SMALL, "--seconds", "60") as bench:
        bench.wait_for(lambda: bench.server() and len(bench.alive()) == 3)
        time.sleep(0.5)  # so that it is surely under load
        bench.process.kill()
        bench.end()


# Runs a command with a disk that is nearly full.
NARROW = """
import shutil, sys
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 40, (1 << 40) - 1, 150 << 20)
sys.path.insert(0, sys.argv.pop(1))
import hostenroll
sys.exit(hostenroll.main())
"""


@needs_proc
def test_a_fleet_for_which_there_is_no_room_is_not_begun(tmp_path: Path) -> None:
    narrow = (sys.executable, "-c", NARROW, str(ROOT))
    with BenchProcess(tmp_path, "--hosts", "200000", command=narrow) as bench:
        done = bench.end()
    assert (done.status, done.out, done.left) == (1, "", [])
    assert done.err == (
        f"hostenroll: 200000 hosts need some 227 MiB in {bench.scratch}, and 150 are free: "
        "name another folder in TMPDIR, or fewer --hosts\n"
    )


@slow
def test_without_an_openssl_program_a_benchmark_over_tls_says_so_at_once(tmp_path: Path) -> None:
    failed = cli(tmp_path, "bench", "--tls", env={"PATH": "", "TMPDIR": str(tmp_path)})
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "--tls needs the program openssl" in failed.stderr and failed.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
