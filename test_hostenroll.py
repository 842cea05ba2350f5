"""The specification of hostenroll: what it does, section by section, in sentences.

Scenarios that are about the rules are written once and go through four doors: the registry, the
API without a socket, a socket, TLS. Where a promise is about processes, there are processes: real
servers, real curl, kill -9. The clock is a parameter; nothing sleeps where a clock or an event
serves. How to choose a door stands in .github/CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import base64
import configparser
import contextlib
import errno
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
import termios
import textwrap
import threading
import time
import tracemalloc
import urllib.error
import urllib.request
import warnings
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, NamedTuple, Optional

import pytest

import hostenroll
from hostenroll import OPERATION, Call, Origin, Principal, Problem, RequestReader, open_registry

MODULE = Path(hostenroll.__file__).resolve()
ROOT = MODULE.parent
SOURCE = MODULE.read_text(encoding="utf-8")
# How the tests run the program. CI also runs it with flags, as in HOSTENROLL_PYTHON_FLAGS=-OO; the
# tests go without: their asserts would be gone. Without flags they run what Python would compile
# the script to at each start, half of what a command takes, unless the start is in question.
PYTHON = [sys.executable, *shlex.split(os.environ.get("HOSTENROLL_PYTHON_FLAGS", ""))]
SCRIPT = [*PYTHON, str(MODULE)]
PROGRAM = SCRIPT if PYTHON[1:] else [*PYTHON, py_compile.compile(str(MODULE), doraise=True)]
OPERATOR = Principal("cli:test", None, "admin")
NOON = 1_800_000_000.0  # a Friday in 2027
DAY_MS = 86_400_000
ADDRESS = "192.0.2.7"  # of the peer, where there is no socket

slow = pytest.mark.slow
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def table(rows):
    """Parameters by their ids; a row that is no tuple is one parameter."""
    return [
        pytest.param(*(row if type(row) is tuple else (row,)), id=name)
        for name, row in rows.items()
    ]


def sample(rows, *always):
    """A table of which the rows named in `always` always run, and the others are slow."""
    return [
        row if row.id in always else pytest.param(*row.values, id=row.id, marks=slow)
        for row in table(rows)
    ]


def until(condition, seconds=10):
    """Ask again and again until the condition is true; its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.005)
    return value


# The clock, the files, and the database behind the program's back.


class Clock:
    """A wall clock that stands still until it is moved."""

    def __init__(self, now=NOON):
        self.now = now

    def __call__(self):
        return self.now

    @property
    def ms(self):
        return int(self.now * 1000)

    def advance(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def paths(tmp_path):
    """A database and a key file that are not there yet."""
    return str(tmp_path / "hostenroll.db"), str(tmp_path / "hostenroll.key")


@pytest.fixture
def registry(paths, clock):
    with opened(paths, clock) as registry:
        yield registry


def close(registry):
    """Close it; where Unrecoverable left its connections open, as the end of the process does."""
    registry.close()
    engine = registry.engine
    for connection in (engine._checkpoints._reader, engine._connection):
        if connection is not None:
            connection.close()


@contextlib.contextmanager
def opened(paths, clock, **options):
    registry = open_registry(*paths, clock.ms, **options)
    try:
        yield registry
    finally:
        close(registry)


def sql(path, statement, *parameters):
    """Look into, or change, a database that no process has open."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(statement, parameters).fetchall()


def look(registry, statement, *parameters):
    """Read by the registry's own connection, outside of any tick."""
    return registry.engine._connection.execute(statement, parameters).fetchall()


def snapshot(registry):
    """Every row of every table."""
    names = look(registry, "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
    return {name: look(registry, f"SELECT * FROM {name} ORDER BY 1") for (name,) in names}


def failure(code, kind=sqlite3.OperationalError):
    """An error of SQLite as Python raises it since 3.11."""
    error = kind(f"error {code}")
    error.sqlite_errorcode = code
    return error


class Faulty:
    """A real connection of which one statement fails: the n-th, or the first that is `only`;
    before it has done its work or, which is worse, after. Some errors end the transaction too."""

    def __init__(self, real, n=0, only="", after=False, error=None, rolls_back=False):
        self.real, self.n, self.only, self.after = real, n, only, after
        self.error = error or failure(10)  # SQLITE_IOERR
        self.rolls_back = rolls_back
        self.count, self.failed = 0, False

    def _run(self, method, statement, parameters):
        self.count += 1
        fails = not self.failed and (self.count == self.n or statement == self.only)
        self.failed = self.failed or fails
        if fails and self.rolls_back and self.real.in_transaction:
            self.real.execute("ROLLBACK")
        # A COMMIT that fails after it has worked is a failure that no program could undo.
        if fails and not (self.after and statement != "COMMIT"):
            raise self.error
        cursor = method(statement, parameters)
        if fails:
            raise self.error
        return cursor

    def execute(self, statement, parameters=()):
        return self._run(self.real.execute, statement, parameters)

    def executemany(self, statement, parameters):
        return self._run(self.real.executemany, statement, parameters)

    def __getattr__(self, name):
        return getattr(self.real, name)


@contextlib.contextmanager
def faulty(registry, **how):
    """For a while, one statement of the registry's connection fails."""
    engine = registry.engine
    real, engine._connection = engine._connection, Faulty(engine._connection, **how)
    try:
        yield engine._connection
    finally:
        engine._connection = real


def is_free(paths):
    """Whether another process could write now."""
    other = hostenroll.WriteLock(paths[0])
    try:
        return other.try_acquire()
    finally:
        other.close()


# Requests and replies as bytes.


class Reply(NamedTuple):
    """What came back: over HTTP, or as it would have."""

    status: int
    document: Any
    headers: Dict[str, str]

    @property
    def code(self) -> Optional[str]:
        """The code of the refusal; None where it is no refusal."""
        return self.document.get("code") if isinstance(self.document, dict) else None


def request_bytes(method, path, body=None, bearer=None, headers=()):
    """A request as a client writes it; a body that is not bytes goes as JSON."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: enroll.test"]
    lines += [f"{name}: {value}" for name, value in headers]
    if bearer is not None:
        lines.append(f"Authorization: Bearer {bearer}")
    if data:
        lines.append(f"Content-Length: {len(data)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def beat_bytes(credential, **facts):
    """The heartbeat of a host as bytes."""
    return request_bytes("POST", "/api/agent/heartbeat", facts or None, credential)


def read_content(content_type, body):
    """A body: JSON as the value that it stands for, any other as text."""
    if not body:
        return None
    return json.loads(body) if "json" in content_type else body.decode("utf-8")


def read_reply(stream, head_only=False):
    """One response from a binary stream; None at its end."""
    status_line = stream.readline()
    if not status_line:
        return None
    assert status_line.startswith(b"HTTP/1.1 "), status_line
    headers = {}
    for line in iter(stream.readline, b"\r\n"):
        name, _, value = line.decode("latin-1").partition(":")
        assert name.lower() not in headers, f"{name} twice"
        headers[name.lower()] = value.strip()
    length = 0 if head_only else int(headers.get("content-length", 0))
    body = stream.read(length)
    assert len(body) == length
    document = read_content(headers.get("content-type", ""), body)
    return Reply(int(status_line.split()[1]), document, headers)


# The doors.


class Door:
    """A way in. All speak in the API's documents, so that a scenario fits through each."""

    api_key = ""

    def ask(self, method, path, body=None):
        """A request of an operator: with the API key."""
        return self.call(method, path, body, self.api_key)

    def mint(self, **values):
        return self.ask("POST", "/api/hosts/tokens", values)

    def token(self, **values):
        """The text of a fresh token."""
        reply = self.mint(**values)
        assert reply.status == 201, reply
        return reply.document["token"]

    def enroll(self, token, hostname="web-1", key="", **facts):
        headers = [("Idempotency-Key", key)] if key else []
        body = {"token": token, "hostname": hostname, **facts}
        return self.call("POST", "/api/agent/enroll", body, headers=headers)

    def join(self, hostname="web-1", **facts):
        """Mint a token and enroll with it: the id of the host, and its credential."""
        reply = self.enroll(self.token(), hostname, **facts)
        assert reply.status == 201, reply
        return reply.document["hostId"], reply.document["credential"]

    def joined(self):
        """A host that has beaten, and its credential."""
        host, credential = self.join()
        assert self.beat(credential).status == 200
        return host, credential

    def beat(self, credential, **facts):
        return self.call("POST", "/api/agent/heartbeat", facts or None, credential)

    def host(self, host):
        return self.ask("GET", f"/api/hosts/{host}")

    def hosts(self, query=""):
        return self.ask("GET", f"/api/hosts?{query}")

    def revoke(self, host):
        return self.ask("POST", f"/api/hosts/{host}/revoke")

    def restore(self, host):
        return self.ask("POST", f"/api/hosts/{host}/restore")

    def delete(self, host):
        return self.ask("DELETE", f"/api/hosts/{host}")

    def reenroll(self, host):
        return self.ask("POST", f"/api/hosts/{host}/reenroll")

    def revoke_token(self, token):
        return self.ask("DELETE", f"/api/hosts/tokens/{token}")

    def show_token(self, token):
        return self.ask("GET", f"/api/hosts/tokens/{token}")

    def events(self, query=""):
        return self.ask("GET", f"/api/audit?{query}")


def act(registry, clock, name, /, id=-1, by=OPERATOR, **values):
    """Run an operation by its name as the command line does; its record. Raises the Problem."""
    number = hostenroll.parse_id(id) if isinstance(id, str) else id
    call = Call(OPERATION[name], by, number, values, Origin(ADDRESS))
    return registry.perform(call, clock.ms)


def perform(registry, clock, run, **options):
    """Run `run(now)` in a tick of its own, as a call of the server. Raises the Problem."""
    rule = hostenroll.InternalRule(lambda registry, call, now: run(now), **options)
    return registry.perform(Call(rule), clock.ms)


def verify_audit(registry, head=None, progress=hostenroll.no_progress):
    return hostenroll.verify_audit(registry.engine, registry.keys.keyring, head, progress)


def make_api_key(registry, clock, organization=None, role="admin"):
    """The text of a new API key: of one organization, or of all."""
    values = {"organizationId": organization} if organization else {}
    return act(registry, clock, "mint-api-key", role=role, **values).text


class RegistryDoor(Door):
    """The operations by name, without HTTP, as the command line runs them."""

    def __init__(self, registry, clock):
        self.registry, self.clock = registry, clock

    def _run(self, name, /, id=-1, by=OPERATOR, **values):
        operation = OPERATION[name]
        try:
            record = act(self.registry, self.clock, name, id, by, **values)
        except Problem as problem:
            return Reply(problem.status, problem.document(), {})
        document = None if operation.status == 204 else operation.document(record)
        return Reply(operation.status, document, {})

    def ask(self, method, path, body=None):
        path, _, query = path.partition("?")
        pairs = [tuple(pair.split("=", 1)) for pair in query.split("&") if pair]
        rows = [row for row in hostenroll.OPERATIONS if row.path and row.method == method]
        matches = [re.fullmatch(re.sub(r"{\w+}", "([^/]+)", row.path), path) for row in rows]
        found = [(match.groups(), row) for match, row in zip(matches, rows) if match]
        ids, row = min(found, key=lambda pair: len(pair[0]))  # tokens is no host
        return self._run(row.name, *ids, **row.query.parse(pairs), **(body or {}))

    def enroll(self, token, hostname="web-1", key="", **facts):
        try:
            row = self.registry.tokens.prove(token, hostname, Origin(ADDRESS), self.clock.ms)
        except Problem as problem:
            return Reply(problem.status, problem.document(), {})
        values = {"token": row, "hostname": hostname, "facts": fact_columns(facts, "")}
        values.update({"idempotencyKey": key} if key else {})
        values.update({"name": facts["name"]} if "name" in facts else {})
        return self._run("enroll", by=hostenroll.SYSTEM, **values)

    def beat(self, credential, **facts):
        try:
            claims = self.registry.keys.authenticate(credential, self.clock.ms)
        except Problem as problem:
            return Reply(problem.status, problem.document(), {})
        facts = fact_columns(facts)
        return self._run("beat", by=hostenroll.SYSTEM, claims=claims, facts=facts, problem=None)


def fact_columns(facts, missing=None):
    """Facts by their columns; missing: the text of those that are not given, or None."""
    names = [] if missing is None else [fact.name for fact in hostenroll.FACTS]
    columns = {hostenroll.COLUMNS[name]: missing for name in names}
    given = {column: facts[name] for name, column in hostenroll.COLUMNS.items() if name in facts}
    return {**columns, **given}


class ApiDoor(Door):
    """Requests as values: everything but the socket."""

    address = ADDRESS  # of the peer

    def __init__(self, registry, clock):
        self.registry, self.clock = registry, clock
        self.api = hostenroll.Api(registry)

    @cached_property
    def api_key(self):
        """Minted when it is first used: until then the audit log has no event of it."""
        return make_api_key(self.registry, self.clock)

    def call(self, method, path, body=None, bearer=None, headers=()):
        (reply,) = self.tick([request_bytes(method, path, body, bearer, headers)])
        return reply

    def admit(self, data):
        """Before the tick: a Response, or work for it; by the fast path where that takes it."""
        reader = RequestReader(self.address)
        match = self.api.match(data, reader, self.clock.ms)
        if match is not None:
            return match[0]
        request = reader.next(data)
        assert request is not None
        return self.api.admit(request, self.clock.ms)

    def tick(self, requests):
        """Requests as bytes, all of them in one tick; the reply to each."""
        admitted = [self.admit(data) for data in requests]
        works = [work for work in admitted if not isinstance(work, hostenroll.Response)]
        outcomes = iter((self.api.registry.run(works, self.clock.ms) if works else []) or [])
        return [
            self._reply(work if isinstance(work, hostenroll.Response) else next(outcomes), work)
            for work in admitted
        ]

    def _reply(self, outcome, work):
        response = outcome if outcome is work else self.api.answer(work, outcome)
        while response is None:  # the census goes in slices, one in a tick
            (outcome,) = self.api.registry.run([work], self.clock.ms)
            response = self.api.answer(work, outcome)
        headers = {name.lower(): value for name, value in response.headers}
        headers["content-type"] = response.content_type
        return Reply(response.status, read_content(response.content_type, response.body), headers)


class World(ApiDoor):
    """An ApiDoor with its registry, its clock and its files."""

    def __init__(self, paths, clock, **options):
        self.paths = paths
        super().__init__(open_registry(*paths, clock.ms, **options), clock)

    def reopen(self, **options):
        """Close the registry and open it again, as a restarted server does."""
        self.registry.close()
        self.registry = open_registry(*self.paths, self.clock.ms, **options)
        self.api = hostenroll.Api(self.registry)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        close(self.registry)

    def advance(self, seconds):
        self.clock.advance(seconds)

    def act(self, name, /, id=-1, by=OPERATOR, **values):
        return act(self.registry, self.clock, name, id, by, **values)

    def perform(self, run, **options):
        """Run `run(now)` as the server's own call."""
        return perform(self.registry, self.clock, run, **options)

    def run(self, *works):
        """Works in one tick; their outcomes."""
        return self.registry.run(works, self.clock.ms)

    def housekeeping(self):
        """What the server does now and then; True when it wants to go on at once."""
        return self.registry.perform(Call(hostenroll.HOUSEKEEPING), self.clock.ms)

    def heartbeat(self, credential, **claims):
        """The plain heartbeat of who has a credential, or one with other claims."""
        right = self.registry.keys.authenticate(credential, self.clock.ms)
        return hostenroll.heartbeat_of(right._replace(**claims), Origin(ADDRESS))

    def sql(self, statement, *parameters):
        return look(self.registry, statement, *parameters)

    def snapshot(self):
        return snapshot(self.registry)

    def audit(self, action=None):
        """The events of the audit log as documents, the oldest first."""
        events, cursor = [], ""
        while cursor is not None:
            query = f"limit=1000{cursor and f'&cursor={cursor}'}"
            page = self.events(query).document
            events += page["events"]
            cursor = page["nextCursor"]
        return [event for event in events[::-1] if action in (None, event["action"])]


@pytest.fixture
def world(paths, clock):
    with World(paths, clock) as world:
        yield world


class SocketDoor(Door):
    """A server on a real socket, a connection for each request; through TLS with a context."""

    def __init__(self, port, api_key="", tls=None):
        self.port, self.api_key, self.tls = port, api_key, tls

    @property
    def url(self):
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    def connect(self, timeout=10, tls=None):
        peer = socket.create_connection(("127.0.0.1", self.port), timeout)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as curl does
        context = tls or self.tls
        if context is None:
            return peer
        return context.wrap_socket(peer, server_hostname="enroll.lan", suppress_ragged_eofs=False)

    def call(self, method, path, body=None, bearer=None, headers=()):
        with self.connect() as peer, peer.makefile("rb") as stream:
            peer.sendall(request_bytes(method, path, body, bearer, headers))
            reply = read_reply(stream, head_only=method == "HEAD")
            assert reply is not None
            return reply

    def send(self, data, timeout=10):
        """Send bytes and no more; every answer until the server closes."""
        with self.connect(timeout) as peer, peer.makefile("rb") as stream:
            peer.sendall(data)
            socket.socket.shutdown(peer, socket.SHUT_WR)  # below TLS
            return list(iter(lambda: read_reply(stream), None))


@pytest.fixture(params=["registry", "api", "socket", "tls"])
def door(request, paths, clock):
    """Each of the four doors in turn."""
    if request.param in ("socket", "tls"):
        with start_server(paths, clock=clock, tls=request.param == "tls") as server:
            yield server
        return
    with opened(paths, clock) as registry:
        yield {"registry": RegistryDoor, "api": ApiDoor}[request.param](registry, clock)


# Servers.


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    """Servers in this process wait less for who is connected when they stop."""
    monkeypatch.setattr(hostenroll, "SHUTDOWN_GRACE", 0.1)


class ServerThread(SocketDoor):
    """A server in a thread of its own, with the clock of the test."""

    def __init__(self, paths, clock, tls, api_key, options):
        self.paths, self.clock = paths, clock
        # A test that makes its registry's options knows them from the server's by these names.
        names = ("interval", "credential_ttl", "audit_keep")
        self._registry_options = {name: options.pop(name) for name in names if name in options}
        self._options = options
        self.log, self.failure, self.server, self.registry = [], None, None, None
        self._handler = logging.Handler()
        self._handler.emit = lambda record: self.log.append(record.getMessage())
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        hostenroll.log.addHandler(self._handler)
        self._thread.start()
        assert self._started.wait(10)
        if self.failure is not None:
            raise self.failure
        super().__init__(self.server.server_port, api_key, tls)

    def _run(self):
        try:
            with opened(self.paths, self.clock, **self._registry_options) as registry:
                api, options = hostenroll.Api(registry), {"clock": self.clock, **self._options}
                with hostenroll.Server(api, "127.0.0.1", 0, **options) as self.server:
                    self.registry = registry
                    start = partial(registry.service.start, self.server.url)
                    perform(registry, self.clock, start, durable=True)
                    self._started.set()
                    self.server.serve_forever()
        except BaseException as error:
            self.failure = error
        finally:
            self._started.set()

    def wait(self, seconds=10):
        """Until it has ended: None, or what it failed with, which has been seen then."""
        self._thread.join(seconds)
        assert not self._thread.is_alive()
        hostenroll.log.removeHandler(self._handler)
        failure, self.failure = self.failure, None
        return failure

    def terminate(self):
        """Stop it as SIGTERM does."""
        self.server.stop()
        failure = self.wait()
        if failure is not None:
            raise failure
        return 0


class ServerProcess(SocketDoor):
    """`hostenroll.py serve` as a process of its own, on a free port; its log is stderr's lines."""

    def __init__(self, folder, command, tls, api_key, options):
        environment = {**clean_environment(), **(options.pop("env") or {})}
        self.process = subprocess.Popen(
            command,
            cwd=str(folder),
            env=environment,
            stdout=options.pop("stdout", subprocess.DEVNULL),
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        self.log = []
        super().__init__(self._read_port(), api_key, tls)
        self._reader = threading.Thread(
            target=lambda: self.log.extend(self.process.stderr), daemon=True
        )
        self._reader.start()

    def _read_port(self):
        for line in self.process.stderr:
            self.log.append(line)
            match = re.search(r"listens on [^ \"]+:(\d+)", line)
            if match:
                return int(match[1])
        status = self.process.wait(10)
        self.process.stderr.close()
        raise AssertionError(f"the server ended with {status}: {''.join(self.log)}")

    def kill(self):
        """kill -9."""
        self.process.kill()
        return self.wait()

    def terminate(self):
        """SIGTERM; the exit status."""
        self.process.terminate()
        return self.wait()

    def wait(self, seconds=10):
        """Until it has ended; the exit status."""
        status = self.process.wait(seconds)
        self._reader.join(seconds)
        self.process.stderr.close()
        return status


@contextlib.contextmanager
def start_server(
    where, *serve_options, how="thread", tls=False, clock=None, env=None, program=None,
    api_key=True, **options,
):  # fmt: skip
    """The one way to start a server: a SocketDoor of it, with an API key for all organizations.

    where: a folder, or the paths of the database and the key file in it. how: "thread", with the
    clock (the real one where none is given) and the options of Server and open_registry; or
    "process", with options of `serve` as words and of Popen by name. tls: True, or the name of one
    of PAIRS. program: the words before `serve`, or all of them where `serve` is among them.
    api_key=False: make no database before the server does.
    """
    folder = Path(where) if isinstance(where, (str, Path)) else Path(where[0]).parent
    if isinstance(where, (str, Path)):
        where = str(folder / "hostenroll.db"), str(folder / "hostenroll.key")
    clock = clock or Clock(time.time())
    key, context, pair = "", None, None
    if api_key:
        with opened(where, clock) as registry:
            key = make_api_key(registry, clock)
    if tls:
        name = tls if isinstance(tls, str) else "one"
        pair, context = write_pair(folder, name), trusting(name)
    if how == "thread":
        if pair:
            options["load_tls"] = lambda host: (hostenroll.load_tls(*pair)[0], lambda: None)
        server = ServerThread(where, clock, context, key, options)
    else:
        command = [*(program or PROGRAM)]
        command += [] if "serve" in command else ["serve"]
        command += ["--port", "0", *serve_options]
        command += ["--tls-cert", pair[0], "--tls-key", pair[1]] if pair else []
        server = ServerProcess(folder, command, context, key, {**options, "env": env})
    try:
        yield server
    finally:
        if how == "process":
            if server.process.returncode is None:
                server.kill()
        elif server._thread.is_alive():
            server.terminate()
        elif server.failure is not None:
            raise server.failure
        else:
            server.wait()


@pytest.fixture
def live(paths, clock):
    """A server on a real socket, in a thread."""
    with start_server(paths, clock=clock) as live:
        yield live


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


def certificate_of(pair):
    return PAIRS[pair].partition(CERTIFICATE_END)[0] + CERTIFICATE_END


def pin_of(pair):
    return hostenroll.read_certificate(ssl.PEM_cert_to_DER_cert(certificate_of(pair))).pin


def write_pair(folder, pair="one"):
    """A certificate and its key, in the files that serve is given."""
    files = folder / "tls.crt", folder / "tls.key"
    files[0].write_text(certificate_of(pair))
    files[1].touch(0o600)
    files[1].write_text(PAIRS[pair].partition(CERTIFICATE_END)[2])
    return str(files[0]), str(files[1])


class Authority:
    """An authority with an intermediate one, made by openssl; who knows it has `trust` in the
    environment."""

    def __init__(self, folder):
        self.folder, self.file = folder, folder / "root.pem"
        self.trust = dict.fromkeys(("SSL_CERT_FILE", "CURL_CA_BUNDLE"), str(self.file))
        self._openssl("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 99 "
                      "-subj /CN=Root -keyout root.key -out root.pem")  # fmt: skip
        self._sign("middle", "ec -pkeyopt ec_paramgen_curve:P-256", "root", 99,
                   "basicConstraints=critical,CA:TRUE", "Middle")  # fmt: skip

    def _openssl(self, words):
        command = ["openssl", *words.split()]
        subprocess.run(command, cwd=self.folder, capture_output=True, check=True)

    def _sign(self, name, key, by, days, extensions, subject="enroll.lan"):
        (self.folder / f"{name}.ext").write_text(f"{extensions}\n")
        self._openssl(f"req -new -newkey {key} -nodes -subj /CN={subject} -keyout {name}.key "
                      f"-out {name}.csr")  # fmt: skip
        self._openssl(f"x509 -req -in {name}.csr -CA {by}.pem -CAkey {by}.key -CAcreateserial "
                      f"-days {days} -extfile {name}.ext -out {name}.pem")  # fmt: skip

    def issue(self, into, key="ec -pkeyopt ec_paramgen_curve:P-256", days=60,
              names="DNS:enroll.lan,IP:127.0.0.1,IP:::1"):  # fmt: skip
        """Put a server's chain and a new key into a folder, as `serve` takes them."""
        self._sign("leaf", key, "middle", days, f"subjectAltName={names}" if names else "")
        chain = [(self.folder / f"{name}.pem").read_text() for name in ("leaf", "middle")]
        (into / "tls.crt").write_text("".join(chain))
        (into / "tls.key").write_text((self.folder / "leaf.key").read_text())
        return "--tls-cert", str(into / "tls.crt"), "--tls-key", str(into / "tls.key")


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    return Authority(tmp_path_factory.mktemp("authority"))


def trusting(pair="one", **settings):
    """A client's TLS that trusts one certificate and no other."""
    context = ssl.create_default_context(cadata=certificate_of(pair))
    for name, value in settings.items():
        setattr(context, name, value)
    return context


# Commands.


def clean_environment():
    """This process's, without what would set hostenroll's options, or change how it writes."""
    foreign = ("HOSTENROLL_", "PYTHONUNBUFFERED", "NO_COLOR", "COLUMNS", "SUDO_")
    return {name: text for name, text in os.environ.items() if not name.startswith(foreign)}


def cli(folder, *arguments, **options):
    """Run a command in a folder, as an operator does."""
    return subprocess.run(
        [*options.pop("program", PROGRAM), *arguments],
        cwd=str(folder),
        env={**clean_environment(), **options.pop("env", {})},
        text=True,
        timeout=60,
        check=False,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


def api_key_of(folder):
    return cli(folder, "mint-api-key", "--all-orgs").stdout.strip()


def curl(*arguments):
    """What real curl gets."""
    command = ["curl", "-sS", "-i", "--max-time", "20", *arguments]
    done = subprocess.run(command, capture_output=True, timeout=30, check=True)
    head, _, body = done.stdout.rpartition(b"\r\n\r\n")
    lines = head.split(b"\r\n\r\n")[-1].decode().split("\r\n")
    pairs = (line.partition(":") for line in lines[1:])
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    return Reply(int(lines[0].split()[1]), json.loads(body) if body else None, headers)


# The story


@needs_curl
def test_the_story_of_one_host(tmp_path):
    """Mint, enroll, beat, used token refused, online, revoked, refused, restored; by real curl."""
    with start_server(tmp_path, "--heartbeat-interval", "1s", how="process") as server:
        token = cli(tmp_path, "mint-token").stdout.strip()
        body = json.dumps({"token": token, "hostname": "web-1"})
        enrolled = curl(f"{server.url}/api/agent/enroll", "-d", body)
        assert enrolled.status == 201
        number = enrolled.document["hostId"]
        bearer = f"Authorization: Bearer {enrolled.document['credential']}"
        heartbeat = "-X", "POST", "-H", bearer, f"{server.url}/api/agent/heartbeat"
        beat = curl(*heartbeat)
        assert (beat.status, beat.document["hostId"]) == (200, number)
        assert curl(f"{server.url}/api/agent/enroll", "-d", body).code == "token-used"
        host = json.loads(cli(tmp_path, "show-host", number, "--json").stdout)
        assert (host["status"], host["lastSeen"]) == ("online", beat.document["lastSeen"])
        assert cli(tmp_path, "revoke-host", number).returncode == 0
        refused = curl(*heartbeat)
        assert (refused.status, refused.code) == (403, "host-revoked")
        assert cli(tmp_path, "restore-host", number).returncode == 0
        assert curl(*heartbeat).status == 200
        assert server.terminate() == 0
    # No host is silent because no server runs.
    assert "online" in cli(tmp_path, "list-hosts").stdout


# Promises

SECTIONS = (
    "Limits", "Problems", "Schemas", "Secrets", "Store", "Registry",
    "Messages", "Assets", "Operations", "Server", "Watch", "Command line",
)  # fmt: skip
# The table of the design: which sections each may use, beside itself.
MAY_USE = {
    0: (), 1: (), 2: (1,), 3: (1, 2), 4: (1, 2), 5: (1, 2, 4), 6: (1, 2, 3, 4, 5), 7: (1, 2),
    8: (1,), 9: (1, 2, 3, 4, 6, 7, 8), 10: (1, 2, 6, 7, 9), 11: (1, 2, 3, 4, 7),
    12: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11),
}  # fmt: skip
POWERS = {
    "sqlite3": {5}, "fcntl": {5}, "secrets": {4}, "hmac": {4}, "hashlib": {4}, "selectors": {10},
    "socket": {10, 11}, "ssl": {10, 11}, "http.client": {11}, "subprocess": {11, 12},
    "argparse": {12}, "print": {12}, "os.environ": {12}, "os._exit": {12}, "time.time": {12},
}  # fmt: skip
TREE = ast.parse(SOURCE)
BANNERS = [
    (SOURCE.count("\n", 0, match.start()) + 1, int(match[1]), match[2])
    for match in re.finditer(r"^# (\d+)\. (.+)$", SOURCE, re.MULTILINE)
]


def section_of(node):
    """The section that a top-level statement stands in; 0 for what is above the first banner."""
    return max((number for line, number, _ in BANNERS if line <= node.lineno), default=0)


def names_bound(node):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in node.names]
    targets = getattr(node, "targets", [getattr(node, "target", ast.Pass())])
    inner = [name for target in targets for name in ast.walk(target)]
    names = [name for name in inner if isinstance(name, ast.Name)]
    return [name.id for name in names if isinstance(name.ctx, ast.Store)]


def names_used(node):
    """The names that a statement takes from outside itself, in annotations too, with a line."""
    own = {inner.arg for inner in ast.walk(node) if isinstance(inner, ast.arg)}
    used = {}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            if isinstance(inner.ctx, ast.Load):
                used.setdefault(inner.id, inner.lineno)
            else:
                own.add(inner.id)
    return {name: line for name, line in used.items() if name not in own}


def is_standard(module):
    known = getattr(sys, "stdlib_module_names", None)  # from Python 3.10 on
    if known:
        return module in known
    replaced = ("sqlite3", "_sqlite3")  # of which CI puts an older one into site-packages
    return module in replaced or "site-packages" not in str(__import__(module))


def test_it_imports_the_standard_library_and_nothing_else():
    imports = [node for node in ast.walk(TREE) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {getattr(node, "level", 0) for node in imports} == {0}
    modules = [getattr(node, "module", alias.name) for node in imports for alias in node.names]
    roots = {module.split(".")[0] for module in modules} - {"sqlite3"}  # CI puts another one there
    assert "hmac" in roots
    assert [root for root in roots if not is_standard(root)] == []
    assert not re.search(r"\b(__import__|importlib|exec|eval)\b *\(", SOURCE)


def test_the_sections_stand_in_their_order():
    assert [(number, name) for _, number, name in BANNERS] == list(enumerate(SECTIONS, 1))


@pytest.mark.parametrize("path", [MODULE, Path(__file__)], ids=["the program", "the tests"])
def test_no_top_level_name_is_bound_twice(path):
    """The later one would hide the other, in other sections too; a test would not run."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    names = sorted(name for node in body for name in names_bound(node))
    assert len(names) > 150
    assert [name for name, after in zip(names, names[1:]) if name == after] == []


def test_sections_only_look_up_and_only_where_they_may():
    nodes = [node for node in TREE.body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    home = {name: section_of(node) for node in nodes for name in names_bound(node)}
    assert len(home) > 150
    strayed = [
        f"{section_of(node)} uses {name} of {home[name]} in line {line}"
        for node in TREE.body
        if node is not TREE.body[-1]  # which calls main()
        for name, line in names_used(node).items()
        if name in home and home[name] not in (section_of(node), *MAY_USE[section_of(node)])
    ]
    assert strayed == []


def test_each_power_stands_in_one_section_or_two():
    seen = {}
    for node in TREE.body:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
                seen.setdefault(f"{inner.value.id}.{inner.attr}", set()).add(section_of(node))
            elif isinstance(inner, ast.Name):
                seen.setdefault(inner.id, set()).add(section_of(node))
            elif isinstance(inner, ast.ImportFrom):
                assert inner.module not in POWERS, f"line {inner.lineno} hides a power"
    assert seen["sqlite3"] and seen["print"] and seen["time.time"] and seen["os._exit"]
    strayed = {power: seen[power] - homes for power, homes in POWERS.items() if power in seen}
    assert {power: where for power, where in strayed.items() if where} == {}


def test_schema_sql_is_what_the_module_has_and_prints(tmp_path):
    copy = (ROOT / "schema.sql").read_bytes()
    assert copy == hostenroll.SCHEMA.encode()
    assert cli(tmp_path, "schema").stdout.encode() == copy
    assert list(tmp_path.iterdir()) == []


WITHOUT_MEMFD = "import os\nif hasattr(os, 'memfd_create'):\n    del os.memfd_create\n"
WITHOUT_PROC = "unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$0" "$@"'


@pytest.mark.parametrize("before, after, restarts", sample({
    # words before and after the interpreter; whether a server starts itself again
    "without site-packages": ((), "-I -S {}", True),
    "without asserts": ((), "-OO {}", True),
    "with every warning an error": ((), "-X utf8 -W error -X dev {}", True),
    "as a module": ((), "-m hostenroll", False),
    "without memfd_create": (("env", "PYTHONPATH=strange"), "{}", False),
    "without /proc": (WITHOUT_PROC, "{}", False),
}, "without site-packages", "without memfd_create"))  # fmt: skip
def test_one_file_alone_in_a_folder_is_the_whole_program(before, after, restarts, tmp_path):
    """A server starts itself again from compiled code, which saves memory, where the system can."""
    hides = shutil.which("unshare") and subprocess.call([*WITHOUT_PROC, "true"], stderr=-3) == 0
    if before is WITHOUT_PROC and not hides:
        pytest.skip("nothing can be mounted here")
    is_utf8 = sys.getfilesystemencoding() == "utf-8"
    folder = tmp_path / ("a folder, à côté" if is_utf8 else "a folder")
    (folder / "strange").mkdir(parents=True)
    (folder / "strange" / "sitecustomize.py").write_text(WITHOUT_MEMFD)
    path = shutil.copy(MODULE, folder / "hostenroll.py")
    program = [*before, sys.executable, *(word.format(path) for word in after.split())]
    minted = cli(folder, "mint-token", program=program)
    with start_server(folder, how="process", program=program, api_key=False) as server:
        if sys.platform == "linux":
            words = Path(f"/proc/{server.process.pid}/cmdline").read_bytes().split(b"\0")
            assert (b"-c" in words) == (restarts and sys.version_info >= (3, 10))
        enrolled = server.enroll(minted.stdout.strip())
        assert server.beat(enrolled.document["credential"]).status == 200
        assert server.terminate() == 0
    assert not re.search("Warning|Traceback", minted.stderr + "".join(server.log))


def test_the_project_is_five_files():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files"]
    listed = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split("\n")
    top = {name.split("/")[0] for name in listed if name}
    assert {name for name in top if not name.startswith(".")} == {
        "hostenroll.py", "test_hostenroll.py", "schema.sql", "pyproject.toml", "README.md",
    }  # fmt: skip


def test_lines_functions_and_classes_are_short():
    def lengths(kind):
        nodes = [node for node in ast.walk(TREE) if isinstance(node, kind)]
        return sorted(node.end_lineno - node.lineno + 1 for node in nodes)

    assert [n for n, line in enumerate(SOURCE.split("\n"), 1) if len(line) > 100] == []
    functions = lengths(ast.FunctionDef)
    assert functions[len(functions) // 2] <= 8 and lengths(ast.ClassDef)[-1] <= 300


def test_a_connection_goes_only_where_the_table_of_transitions_lets_it():
    states, table_of = hostenroll.STATES, hostenroll.TRANSITIONS
    for before, state, has_more in itertools.product(states, states, (False, True)):
        here, there = socket.socketpair()
        connections = hostenroll.Connections({}, hostenroll.Metrics())
        with here, there, connections.selector:
            connection = hostenroll.Connection(here, SimpleNamespace(has_more=has_more), None)
            connection.state = before
            connections.add(connection)
            since = connections.moment
            connections.moment += 1
            goes = state is before or state in table_of[before]
            fails = pytest.raises(RuntimeError, match=f"{before.name} to {state.name}")
            with contextlib.nullcontext() if goes else fails:
                connections.move(connection, state)
            after = state if goes else before
            assert connection.state is after
            waits = state is hostenroll.BODY and has_more
            assert connection.interest == (state.events if goes and not waits else 0)
            is_gone = after is hostenroll.CLOSED is not before
            assert connections.within(states) == ([] if is_gone else [connection])
            if goes and (state is not before or state is hostenroll.IDLE):  # with a new deadline
                since = connections.moment
            assert connections.next_deadline() == since + after.deadline
    assert [s.name for s in states if hostenroll.CLOSED not in table_of[s]] == ["closed"]
    reached, seen = {hostenroll.HANDSHAKE, hostenroll.HEAD}, set()
    while reached - seen:
        seen |= reached
        reached |= {after for before in seen for after in table_of[before]}
    assert reached == set(states) == set(table_of) and table_of[hostenroll.CLOSED] == ()
    classes = (node for node in TREE.body if isinstance(node, ast.ClassDef))
    writers = {
        f"{owner.name}.{function.name}"
        for owner in classes if section_of(owner) == 10
        for function in owner.body for node in ast.walk(function)
        if getattr(node, "attr", "") == "state" and isinstance(node.ctx, ast.Store)
    }  # fmt: skip
    assert writers == {"Connection.__init__", "Connections.move"}


def test_the_readme_lists_every_operation_command_and_refusal():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [
        f"| {row.method} | `{row.path}` | {row.caller} | {row.summary} |"
        for row in hostenroll.OPERATIONS if row.path
    ]  # fmt: skip
    rows += [f"| `{row.name}` | {row.summary} |" for row in hostenroll.COMMANDS]
    rows += [f"| `{row.code}` | {row.status} | {row.remedy} |" for row in hostenroll.problems()]
    assert [row for row in rows if row not in readme] == []


def functions(names):
    return rf"(?i)\b(?:{'|'.join(names.split())}) *\("


# What is newer than 3.31, the SQLite of the oldest machines that we run on, by an example of each.
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


def texts_in(tree):
    """Every text in a tree but docstrings, as nodes."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node


def newer(statement):
    """What of it an old SQLite does not know. A subquery stands for itself."""
    flat = re.sub(r"\((?:[^()]|\([^()]*\))*\)", "()", statement)
    return [
        example for example, pattern in NEWER_SQL.items()
        if re.search(pattern, flat if "UPDATE" in pattern else statement)
    ]  # fmt: skip


def test_the_sql_is_old_enough_for_sqlite_3_31():
    store = ast.Module([node for node in TREE.body if section_of(node) == 5], [])
    statements = [re.sub("--.*", "", node.value) for node in texts_in(store)]
    assert any("RAISE(ABORT" in statement for statement in statements) and len(statements) > 100
    assert [(statement, newer(statement)) for statement in statements if newer(statement)] == []
    assert [example for example in NEWER_SQL if example not in newer(example)] == []
    start, end = (line for line, number, _ in BANNERS if number in (5, 6))
    lines = SOURCE.split("\n")
    outside = "\n".join([*lines[:start], *lines[end:]])
    assert not re.search(r"(SELECT .+ FROM|INSERT INTO|DELETE FROM|UPDATE \w+ SET) ", outside)


# What another engine would not take, by an example of each.
SQLITE_WORDS = {
    "PRAGMA synchronous": r"\bPRAGMA\b",
    "SELECT 1 FROM sqlite_master": r"\bsqlite_",
    "INSERT OR IGNORE INTO t": r"\b(?:INSERT|UPDATE) OR\b|\bREPLACE INTO\b",
    "SELECT max(a, b)": r"(?i)\b(?:max|min) *\([^()]*,",
    "WHERE a IS ?": r"\bIS (?:NOT )?[?:]",
    "WHERE active AND b": r"(?i)\b(?:where|and|or|not|when)\s+(?:\w+\.)?active\b(?! *=)",
    "SELECT rowid FROM t": r"(?i)\b_?rowid_?\b",
    "WHERE a GLOB b": r"\bGLOB\b",
    "FROM t INDEXED BY i": r"\bINDEXED\b",
    "FROM t LIMIT 1, 2": r"\bLIMIT\s+\S+,",
    "SELECT ifnull(a, b)": functions("ifnull zeroblob instr total changes last_insert_rowid"),
}


def test_the_queries_are_plain_sql_but_where_a_comment_says_why():
    lines = SOURCE.split("\n")
    (queries,) = (node for node in TREE.body if getattr(node, "name", "") == "Queries")
    foreign = [
        node.value
        for node in texts_in(queries)
        if any(re.search(pattern, node.value) for pattern in SQLITE_WORDS.values())
        if not any("# " in line for line in lines[node.lineno - 4 : node.end_lineno])
    ]
    assert foreign == []
    assert all(re.search(pattern, example) for example, pattern in SQLITE_WORDS.items())


def test_the_sqlite_is_the_one_that_this_run_is_about(tmp_path):
    """CI has an older one for a run, which servers and commands have to run on, too."""
    wanted = os.environ.get("HOSTENROLL_SQLITE", sqlite3.sqlite_version)
    with start_server(tmp_path, how="process") as server:
        exposition = server.ask("GET", "/metrics").document
    assert f'sqlite="{wanted}"' in exposition and sqlite3.sqlite_version == wanted


# Mutations: what the suite is worth. Every small slip that can be made in a key function has to
# turn a part of the suite red. The slips are made in the syntax tree, so the text may change.

NEGATED = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE,
    ast.LtE: ast.Gt, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
MOVED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
SQL_SLIPS = (("<=", "<"), (">=", ">"), (" < ", " <= "), (" = ?", " <> ?"), (" AND ", " OR "))
DROPPED = (ast.Expr, ast.Assign, ast.AugAssign, ast.Raise, ast.Delete)


def definition_of(name, tree):
    """The definition of a function, of a method as Class.method, or of a constant."""
    for part in name.split("."):
        (tree,) = (node for node in tree.body if part in names_bound(node))
    return tree


def slips_of(node):
    """Small changes of one expression or statement: what the change is, and what it becomes."""
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        for kind, operators in (("negated", NEGATED), ("boundary moved", MOVED)):
            if type(node.ops[0]) in operators:
                operator = operators[type(node.ops[0])]()
                yield kind, ast.Compare(node.left, [operator], node.comparators)
    elif isinstance(node, ast.BoolOp):
        operator = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "and, or exchanged", ast.BoolOp(operator, node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not dropped", node.operand
    elif isinstance(node, ast.IfExp):
        yield "branches exchanged", ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        is_bool = isinstance(node.value, bool)
        yield "constant", ast.Constant(not node.value if is_bool else node.value + 1)
    elif isinstance(node, ast.Constant) and re.match(r"\s*(SELECT|INS|UPD|DEL)", str(node.value)):
        for old, new in SQL_SLIPS:
            for n in range(node.value.count(old)):
                parts = node.value.split(old)
                text = old.join(parts[: n + 1]) + new + old.join(parts[n + 1 :])
                yield f"SQL {old} to {new}", ast.Constant(text)
    elif isinstance(node, ast.If):
        yield "condition negated", ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
        if node.orelse:
            yield "branches exchanged", ast.If(node.test, node.orelse, node.body)
    elif isinstance(node, DROPPED) and not is_docstring:
        yield "statement dropped", ast.Pass()
    elif isinstance(node, ast.Return) and not isinstance(node.value, (ast.Constant, type(None))):
        yield "returns nothing", ast.Return(None)


def mutants(name, source=SOURCE):
    """Every slip in a function: a description, and the source of the module that has it."""
    function = definition_of(name, ast.parse(source))
    for parent in list(ast.walk(function)):
        for field, value in list(ast.iter_fields(parent)):
            children = value if isinstance(value, list) else [value]
            for n, child in enumerate(children):
                for kind, slip in slips_of(child):
                    changed = [*children[:n], slip, *children[n + 1 :]]
                    setattr(parent, field, changed if children is value else slip)
                    mutant = with_function(source, function)
                    setattr(parent, field, value)
                    yield f"{name}, line {child.lineno - function.lineno}: {kind}", mutant


def with_function(source, function):
    """A source with another text of one function."""
    lines = source.split("\n")
    decorators = getattr(function, "decorator_list", [])
    first = min([function.lineno, *(node.lineno for node in decorators)])
    text = ast.unparse(ast.fix_missing_locations(function))
    text = textwrap.indent(text, " " * function.col_offset)
    return "\n".join([*lines[: first - 1], text, *lines[function.end_lineno :]])


SLIPPERY = """
class C:
    def f(self, a, n=3):
        \"""Docstring.\"""
        if a < n and not self:
            self.g()
        else:
            raise E
        return "SELECT 1 WHERE a = ? AND b <= ?" if a else n
"""


def test_every_kind_of_slip_is_made_and_nothing_else_changes():
    made = dict(mutants("C.f", SLIPPERY))
    assert len(made) == 14
    slips = (
        "if a >= n and", "if a <= n and", "if a < n or", "and self", "if not (a < n and",
        "n=4", "a <> ?", "OR b", "b < ?", "n if a else", "return\n", "pass",
    )  # fmt: skip
    assert [slip for slip in slips if slip not in "\n".join(made.values())] == []
    for mutant in made.values():
        assert mutant.startswith("\nclass C:\n    def f(") and ast.parse(mutant)


# The function; the part of the suite that has to turn red (for -k); how many of its slips survive,
# and why they may. A slip that survives and is not in this table is a test that is missing.
MUTATED = {
    "parse_secret": ("typing_error or minted_is_no_secret or secret_has_its_prefix", 0, ""),
    "Keyring.verify": ("text_that_we_signed or no_character_of or plain_jwt or key_of_a_ring", 1,
                       "no credential that we sign has the maximum length"),
    "require_own_file": ("user_prepared or stranger_prepared or it_cannot_have_made", 1,
                         "these tests run as root, whose id is the one that is changed"),
    "open_lock_file": ("another_user_prepared or lock_file_gets", 4,
                       "the second look is for a name that is swapped meanwhile"),
    "WriteLock.try_acquire": (
        "lock or writer or free", 4, "both files are open, or none; a lock can be taken again"),
    "_BEAT": ("strays_of or serial or api and (lives_and_dies or never_goes_back) or two_intervals "
              "or that_moves_is or alternates", 0, ""),
    "_TELL": ("strays_of or two_intervals or shut_out_lets or few_statements or old_credential_is",
              1, "lastSeen is not behind by more than a tick"),
    "Queries.use_token": ("use_that_may_not_be_taken", 0, ""),
    "token_state": ("api and token_has_one_state", 0, ""),
    "Tokens.prove": ("wrong_secret_is or api and (one_state or learns_why or uses_up)", 0, ""),
    "Enrollments._enroll": (
        "before_the_tick or api and (uses_up or answered_until or re_enrolled or as_many)",
        1, "use_token() fails only where _require_valid() refuses"),
    "Enrollments._require_replayable": ("api and (answered_until_the_first_beat or re_enrolled)", 1,
                                "last_seen is 0 or a time"),
    "Heartbeats.batch": ("strays or judged_by_what or each_call or locked_out or copied_c", 0, ""),
    "Heartbeats.accept": (
        "serial or copied_cred or locked_out or api and (lives_and_dies or never_goes_back)", 0,
        ""),
    "Heartbeats._tell_strays": (
        "two_intervals or few_statements or strays_of or neighbours or moves_no_host", 3,
        "what had matched is written once more, and is the same"),
    "Heartbeats._place": ("alternates or was_ahead_keeps or last_heartbeat_and_where", 0, ""),
    "Heartbeats._move": ("alternates or moves_of_a_host or last_heartbeat_and_where", 0, ""),
    "SigningKeys.is_due": ("in_its_last_third or another_lifetime or lives_from_rotation", 0, ""),
    "SigningKeys.retire": ("lives_from_rotation or locked_out", 0, ""),
    "ServicePeriod.silence_ms": ("silence_counts or hosts_silence or nobody_alive", 4,
                                 "the branches agree at their ends"),
    "ServicePeriod.status": ("status_follows or hosts_silence", 0, ""),
    "next_period": ("many_pauses or hosts_silence", 1, "a millisecond of a week"),
    "pauses_of": ("many_pauses or never_wrote_break or silence_counts", 0, ""),
    "FailedAuthLimiter.judge": ("in_a_minute_is or to_wait or ipv6_network or fill_no", 0, ""),
    "AuditLog.refuse": ("flood_sixty or long_outage or with_who_and_whence", 1,
                        "one refusal more in memory"),
    "AuditLog.prune": (
        "old_events or prun", 3,
        "a trouble that comes again is logged again; the same anchor is put again"),
    "chain_start": ("log_cannot or proves_no or named_for_ever or no_old_one or 2_goes_on", 0, ""),
    "begin_format": ("named_for_ever or 2_goes_on or migrated_database_is", 0, ""),
    "verify_events": ("no_event_can or verified_in_slices or 2_goes_on or named_for_ever", 1,
                      "the mac of the next finds it, too"),
    "ServiceRecord.watch_certificate": (
        "agents_have or pin_is_written or warned_of or set_back_keeps", 0, ""),
    "_body_length": ("well_formed_message_is_read or frame_differently", 0, ""),
    "ChunkedBody.feed": (
        "message_is_read or frame_differently or waits_for_the_rest or chunk and however_it_is_cut",
        4, "the last byte of a chunk is waited for; a line without its end is judged with it"),
    "Connections.move": ("goes_only_where", 0, ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def mutated_copy(tmp_path_factory):
    """The project in a folder of its own; a function that says whether the suite turns red."""
    folder = tmp_path_factory.mktemp("mutated")
    for name in ("test_hostenroll.py", "schema.sql", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    environment = {**clean_environment(), "PYTHONPATH": str(folder)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def turns_red(source, tests):
        for compiled in (folder / "__pycache__").glob("hostenroll.*"):  # known by second and size
            compiled.unlink()
        (folder / "hostenroll.py").write_text(source, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-k", f"({tests}) and not slip"]
        with contextlib.suppress(subprocess.TimeoutExpired):  # a suite that hangs is red, too
            done = subprocess.run(
                command, cwd=str(folder), env=environment, capture_output=True, text=True,
                timeout=120, check=False,
            )  # fmt: skip
            assert done.returncode in (0, 1, 2, 4), done.stdout
            return done.returncode != 0
        return True

    assert not turns_red(SOURCE, "one_file_alone")
    return turns_red


@slow
@pytest.mark.parametrize("name", list(MUTATED)[:3])
def test_the_suite_turns_red_with_a_slip_in(name, mutated_copy):
    description, mutant = next(mutants(name))
    assert mutated_copy(mutant, MUTATED[name][0]), description


@slow
@pytest.mark.skipif("HOSTENROLL_MUTATIONS" not in os.environ, reason="not HOSTENROLL_MUTATIONS=1")
@pytest.mark.parametrize("name", MUTATED)
def test_the_suite_turns_red_with_every_slip_in(name, mutated_copy):
    tests, allowed, _ = MUTATED[name]
    assert not mutated_copy(SOURCE, tests)
    survivors = [what for what, mutant in mutants(name) if not mutated_copy(mutant, tests)]
    assert len(survivors) <= allowed, "\n".join(survivors)


# 2. Problems

CODES = {  # the wire contract
    400: "malformed-request invalid-body invalid-query", 404: "not-found",
    401: "token-unknown token-expired token-revoked token-used credential-missing "
         "credential-invalid credential-expired credential-superseded api-key-invalid",
    403: "forbidden token-host-mismatch host-revoked", 405: "method-not-allowed",
    408: "request-timeout", 409: "conflict", 410: "changes-pruned host-unknown",
    413: "body-too-large",
    417: "expectation-failed", 429: "too-many-requests", 431: "head-too-large", 500: "internal",
    501: "not-implemented", 503: "overloaded storage-unavailable", 505: "http-version",
}  # fmt: skip
NAMED = vars(hostenroll).items()
PROBLEMS = {n: k for n, k in NAMED if isinstance(k, type) and issubclass(k, Problem)}
KINDS = [*hostenroll.problems(), hostenroll.ApiKeyMissing]
each_problem = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def test_every_code_has_its_status_and_there_are_no_others():
    codes = [(code, status) for status, codes in CODES.items() for code in codes.split()]
    assert sorted((kind.code, kind.status) for kind in hostenroll.problems()) == sorted(codes)


def test_two_classes_share_a_code_only_with_its_status_title_and_remedy():
    raised = set(PROBLEMS.values()) - {hostenroll.Unauthorized, hostenroll.Unframed}
    facts = {(kind.code, kind.status, kind.title, kind.remedy) for kind in raised}
    assert len(facts) == len(hostenroll.problems()) < len(raised)


def test_a_problem_is_a_class_of_its_own_name_that_can_be_caught():
    for name, kind in PROBLEMS.items():
        assert (kind.__name__, kind.__module__) == (name, "hostenroll")
        with pytest.raises(kind):
            raise kind("Do that.")
    assert issubclass(hostenroll.ApiKeyMissing, hostenroll.ApiKeyInvalid)
    assert issubclass(hostenroll.TokenUsed, hostenroll.Unauthorized)
    # No handler of exceptions may survive what cannot pass by itself.
    assert not issubclass(hostenroll.Unrecoverable, Exception)


@each_problem
def test_a_problem_document_has_the_members_of_rfc_9457_and_names_an_action(kind):
    document = kind().document()
    lists = {"errors": []} if kind.code in ("invalid-body", "invalid-query") else {}
    names = {"type": f"urn:hostenroll:problem:{kind.code}", "title": kind.title}
    lists = {"cursor": ""} if kind.code == "changes-pruned" else lists
    rest = {"status": kind.status, "detail": kind.remedy, "code": kind.code, **lists}
    assert list(document.items()) == [*names.items(), *rest.items()]
    assert kind("Do that.").document() == {**document, "detail": "Do that."}
    assert re.fullmatch(r"[A-Z][^\n]+[^.\n]", document["title"])
    verbs = "Check|Choose|Correct|Enroll|Expect|Get|Send|Speak|Try|Use|Wait|get|ask"
    assert re.search(rf"\b({verbs})\b [^\n]+\.$", kind.remedy)
    assert str(kind()) == kind.remedy


def test_every_detail_in_the_source_is_a_whole_sentence():
    details = [
        ast.unparse(call.args[0])
        for call in ast.walk(ast.parse(SOURCE))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        if call.func.id in PROBLEMS and call.args
    ]
    assert len(details) > 10
    assert [text for text in details if not re.fullmatch(r"f?(['\"])[A-Z{].*\.\1", text)] == []


@each_problem
def test_a_refusal_has_the_header_fields_that_its_status_asks_for(kind):
    """RFC 9110: 401 MUST have WWW-Authenticate (15.5.2), 503 SHOULD have Retry-After (15.6.4);
    RFC 6585: 429 MAY have it (section 4). Where nothing was presented the challenge SHOULD name no
    error: RFC 6750 section 3.1. What the problem brings itself stands before them."""
    response = hostenroll.refusal(kind(headers=(("X", "y"),)))
    assert (response.status, response.content_type) == (kind.status, "application/problem+json")
    assert json.loads(response.body) == kind().document()
    expected = {"X": "y"}
    if kind.status == 401:
        error = "" if "Missing" in kind.__name__ else ', error="invalid_token"'
        expected["WWW-Authenticate"] = f'Bearer realm="hostenroll"{error}'
    expected.update({429: {"Retry-After": "60"}, 503: {"Retry-After": "5"}}.get(kind.status, {}))
    assert dict(response.headers) == expected
    assert response.closes == issubclass(kind, hostenroll.Unframed)


def test_errors_stand_in_the_document_by_field_and_not_without_end():
    errors = [hostenroll.FieldError(f"name{n}", "is missing") for n in range(100)]
    documents = [{"field": f"name{n}", "detail": "is missing"} for n in range(20)]
    assert hostenroll.InvalidBody(errors=errors).document()["errors"] == documents


def test_peers_never_see_what_the_audit_log_records():
    problem = hostenroll.TokenUsed().with_audit("token:1", "host:2", "acme", hostname="web-1")
    assert (problem.actor, problem.subject, problem.organization) == ("token:1", "host:2", "acme")
    assert problem.audit_detail == {"hostname": "web-1"}
    assert problem.document() == hostenroll.TokenUsed().document()
    assert hostenroll.TokenUsed().audit_detail == {}


# 3. Schemas

WORD = hostenroll.Text(5, 2, "[a-z]+", "small letters")
COLOUR = hostenroll.Choice("red", "blue")
LABELS = hostenroll.Labels()
SCHEMA_OF_FOUR = hostenroll.Schema(
    hostenroll.Field("word", WORD, required=True),
    hostenroll.Field("count", hostenroll.Integer((1, 10))),
    hostenroll.Field("colour", COLOUR),
    hostenroll.Field("label", LABELS, repeats=True),
)  # fmt: skip
OPEN_SCHEMA = hostenroll.Schema(hostenroll.Field("word", WORD), open=True)
TYPES = {
    "text": hostenroll.Text(5), "text with a pattern": WORD,
    "integer": hostenroll.Integer((1, 10)), "integer below zero": hostenroll.Integer((-3, 0)),
    "choice": COLOUR, "labels": LABELS, "hostname": hostenroll.HOSTNAME, "slug": hostenroll.SLUG,
    "cursor": hostenroll.CURSOR, "name": hostenroll.NEW_NAME,
}  # fmt: skip
VALUES = [
    "", "a", "ab", "abc", "abcde", "abcdef", "AB", "a b", "é", "😀" * 5, "😀" * 6,
    "a-b", "-a", "a-", "a.b", "a.", ".a", "a" * 64, "a" * 65, "a" * 253, "a" * 254, "0" * 16,
    "red", "blue", "RED", "red ", -4, -3, -1, 0, 1, 10, 11, 10**18, True, False, None, 1.5,
    [], ["red"], {}, {"a": "b"}, {"a/b.c": ""}, {"": "b"}, {"a b": "c"}, {"a": 1}, {"a": None},
    {"a" * 63: "v" * 255}, {"a" * 64: "v"}, {"a": "v" * 256},
    {str(n): "" for n in range(32)}, {str(n): "" for n in range(33)},
    " a", "a\u00a0", "a\u3164b", "\u0301a", "e\u0301", "a\u200db", "a\u200d", "I \u2764\ufe0f U",
]  # fmt: skip
ANSWER_TYPES = {
    "time": hostenroll.TIME, "text or null": hostenroll.Nullable(WORD),
    "choice or null": hostenroll.Nullable(COLOUR), "list of texts": hostenroll.ListOf(WORD, 2),
    "list of texts or null": hostenroll.ListOf(hostenroll.Nullable(WORD), 2),
    "list of lists": hostenroll.ListOf(hostenroll.ListOf(COLOUR, 1), 1),
    "object": hostenroll.ObjectOf(SCHEMA_OF_FOUR),
    "objects": hostenroll.ListOf(hostenroll.ObjectOf(SCHEMA_OF_FOUR), 2),
    "counts as floats": hostenroll.Integer((1, 10)),
}  # fmt: skip
ANSWER_VALUES = [
    "2027-01-15T08:00:00.000Z", "2027-01-15T08:00:00Z", "2027-01-15T08:00:00.000z",
    "2027-01-15 08:00:00.000Z", "2027-01-15T08:00:00.000+00:00", "2027-01-15T08:00:00.000Z\n",
    None, True, 0, 1, 1.0, 10.0, 11.0, 1.5, float("inf"), float("nan"), "", "abc", "red", [],
    [None], ["abc"], ["abc", "abc"], ["abc", None], ["abc"] * 3, ["red"], [["red"]], [["red"] * 2],
    [[], []], [1], {}, {"word": "abc"}, {"word": None}, {"word": "abc", "count": 1},
    {"word": "abc", "count": 0}, {"word": "abc", "colour": "red", "label": {"a": "b"}},
    {"word": "abc", "more": 1}, [{"word": "abc"}], [{"word": "abc"}, {}], [{"word": "abc"}] * 3,
]  # fmt: skip
CHECKS = {name: (field_type, VALUES) for name, field_type in TYPES.items()}
CHECKS.update({name: (one, ANSWER_VALUES) for name, one in ANSWER_TYPES.items()})
UNSHOWABLE = {
    "NUL": "\0", "CR LF": "\r\n", "newline": "\n", "tab": "\t", "escape": "\x1b[2J",
    "delete": "\x7f", "C1 control": "\x9b2J", "next line": "\x85", "line separator": "\u2028",
    "paragraph separator": "\u2029", "right-to-left override": "\u202e", "embedding": "\u202a",
    "isolate": "\u2066", "pop isolate": "\u2069", "left-to-right mark": "\u200e",
    "Arabic letter mark": "\u061c", "byte order mark": "\ufeff", "lone surrogate": "\udcff",
}  # fmt: skip


def accepts(field_type, value):
    try:
        assert field_type.check(value) == value
    except ValueError as error:
        assert str(error)
        return False
    return True


def allows(schema, value):
    """JSON Schema 2020-12, as much of it as is used here."""
    if isinstance(schema, bool):
        return schema
    if "anyOf" in schema:
        return any(allows(one, value) for one in schema["anyOf"])
    types = {"string": str, "integer": (int, float), "object": dict, "array": list}
    if schema["type"] == "null" or isinstance(value, bool):
        return schema["type"] == "null" and value is None
    if not isinstance(value, types[schema["type"]]):
        return False
    if isinstance(value, str):
        pattern = re.sub(r"\$$", r"\\Z", schema.get("pattern", ""))
        fits = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
        fits &= "not" not in schema or not re.search(schema["not"]["pattern"], value)
        return fits and value in schema.get("enum", [value]) and bool(re.search(pattern, value))
    if isinstance(value, (int, float)):
        return value % 1 == 0 and bool(schema["minimum"] <= value <= schema["maximum"])
    if isinstance(value, list):
        items = schema["items"]
        return len(value) <= schema["maxItems"] and all(allows(items, item) for item in value)
    named, others = schema.get("properties", {}), schema["additionalProperties"]
    names = {"type": "string", **schema.get("propertyNames", {})}
    return (
        len(value) <= schema.get("maxProperties", len(value))
        and set(schema.get("required", ())) <= set(value)
        and all(allows(names, name) for name in value)
        and all(allows(named.get(name, others), member) for name, member in value.items())
    )


@pytest.mark.parametrize("field_type, values", table(CHECKS))
def test_the_json_schema_describes_what_the_check_takes(field_type, values):
    taken = [n for n, value in enumerate(values) if accepts(field_type, value)]
    assert taken == [n for n, v in enumerate(values) if allows(field_type.json_schema(), v)]
    assert 0 < len(taken) < len(values)


def test_the_length_of_a_text_is_named_in_words():
    rows = {"at most 5": (5,), "2 to 5": (5, 2), "4": (4, 4), "1 to 2": (2, 1), "0": (0,)}
    for lengths, bounds in rows.items():
        with pytest.raises(ValueError, match=f"^must have {lengths} characters$"):
            hostenroll.Text(*bounds).check("x" * 17)


@pytest.mark.parametrize("nasty", table(UNSHOWABLE))
def test_no_text_brings_control_characters_or_reorders_the_text_around_it(nasty):
    for text in (nasty, f"a{nasty}", f"{nasty}b", f"a{nasty}b"):
        rows = [(hostenroll.Text(50), text), (LABELS, {"a": text}), (LABELS, {text: "b"})]
        rows += [(WORD, text), (COLOUR, f"red{nasty}")]
        assert not any(itertools.starmap(accepts, rows))
        if nasty != UNSHOWABLE["lone surrogate"]:  # which no JSON text has
            # So a program that makes what the schema allows is never refused.
            assert not any(allows(one.json_schema(), value) for one, value in rows[:2])
            assert not allows(LABELS.parameter_schema(), f"a={text}")
    assert nasty not in hostenroll.sanitize(f"a{nasty}b")
    with pytest.raises(hostenroll.InvalidBody) as refused:
        SCHEMA_OF_FOUR.check({"word": "abc", nasty: 1})
    assert nasty not in refused.value.errors[0].field


def test_texts_of_all_languages_are_allowed_and_a_peers_is_shown_short():
    text = "K\u00fcche \U0001f600 \u4e2d\u6587 \u05d0"
    assert accepts(hostenroll.Text(50), text) and allows(hostenroll.Text(50).json_schema(), text)
    shown = [hostenroll.sanitize("a" * length) for length in (64, 65)]
    assert shown == ["a" * 64, "a" * 61 + "..."]


IGNORABLE = (  # Default_Ignorable_Code_Point, in hexadecimal: DerivedCoreProperties of Unicode 16
    "ad 34f 61c 115f-1160 17b4-17b5 180b-180f 200b-200f 202a-202e 2060-206f 3164 fe00-fe0f feff "
    "ffa0 fff0-fff8 1bca0-1bca3 1d173-1d17a e0000-e0fff"
)
GOOD_NAMES = {
    "ASCII": "web-1",
    "spaces within": "a b  c",
    "Latin, by a mark": "Ku\u0308che",
    "Persian with ZWNJ": "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "Hindi with ZWJ": "\u0915\u094d\u200d\u0937",
    "Hebrew with points": "\u05e9\u05bc\u05c1",
    "Korean": "\ud55c\uad6d",
    "Mongolian": "\u1820\u1821",
    "a no-break space within": "a\u00a0b",
    "a family": "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "a flag": "\U0001f1e9\U0001f1ea",
    "a heart": "\u2764\ufe0f",
    "a heart in a text": "I \u2764\ufe0f NY",
    "a heart on fire": "\u2764\ufe0f\u200d\U0001f525",
    "a keycap": "1\ufe0f\u20e3",
    "a beach": "on the \U0001f3d6\ufe0f",
    "skin": "\U0001f44d\U0001f3fd",
    "copyright": "\xa9\ufe0f",
    "255 of them": "\u2764\ufe0f\u200d" * 84 + "\u2764\ufe0f.",
}
BAD_NAMES = {
    **{
        f"U+{ord(c):04X} alone": c
        for c in " \xa0\u1680\u2003\u202f\u205f\u2800\u3000\U0001d159\u0301"
    },
    **{f"U+{ord(c):04X} behind": f"web{c}" for c in " \xa0\u2000\u2800\u3000\u200c\u200d\ufe0f"},
    **{
        f"U+{ord(c):04X} before": f"{c}web"
        for c in " \xa0\u2000\u2800\u3000\u200c\u200d\ufe0f\u0301"
    },
    "many, alone": "\u3164 \u200b" * 9,
    "a Hebrew point, first": "\u05b0a",
    "a vowel sign alone": "\u093e",
    "an annotation": "a\ufff9b",
    "a joiner behind a space": "a \u200db",
    "a joiner before a space": "a\u200c b",
    "joiners": "a\u200d\u200db",
    "a tag": "\U0001f3f4\U000e0067",
    "a variation of a letter": "a\ufe0f b",
    "two variations": "\u2764\ufe0f\ufe0f",
    "a joiner behind an emoji": "\u2764\ufe0f\u200d",
    "the other variation": "\u2764\ufe0e",
}


@pytest.mark.parametrize("name", table(GOOD_NAMES))
def test_a_name_may_be_in_any_language_and_of_emoji(name):
    assert accepts(hostenroll.NEW_NAME, name) and allows(hostenroll.NEW_NAME.json_schema(), name)


@pytest.mark.parametrize("name", table(BAD_NAMES))
def test_a_name_that_looks_like_nothing_or_like_another_is_refused(name):
    assert not accepts(hostenroll.NEW_NAME, name) and accepts(hostenroll.NAME, name)


def test_no_ignorable_character_is_anywhere_in_a_name():
    for first, _, last in (part.partition("-") for part in IGNORABLE.split()):
        for code in range(int(first, 16), int(last or first, 16) + 1):
            texts = [chr(code), f"{chr(code)}b", f"a{chr(code)}"]
            texts += [] if chr(code) in "\u200c\u200d\ufe0f" else [f"a{chr(code)}b"]
            assert not any(accepts(hostenroll.NEW_NAME, text) for text in texts), hex(code)


NO_DIGITS = ["", "+3", " 3", "3 ", "3\n", "0x3", "3.0", "1_0", "\u0663", "\u00b3", "1e1", "--3",
             "9" * 20, "9" * 5000]  # fmt: skip


@pytest.mark.parametrize("text", NO_DIGITS, ids=lambda text: repr(text[:9]))
def test_a_count_in_a_query_is_plain_digits(text):
    word = ("word", "web")
    with pytest.raises(hostenroll.InvalidQuery) as refused:
        SCHEMA_OF_FOUR.parse([word, ("count", text)])
    assert [error.field for error in refused.value.errors] == ["count"]
    assert SCHEMA_OF_FOUR.parse([word, ("count", "3")]) == {"word": "web", "count": 3}


def test_every_error_of_a_body_is_named_at_once():
    with pytest.raises(hostenroll.InvalidBody) as refused:
        SCHEMA_OF_FOUR.check({"count": 0, "colour": ["red"], "label": {"a": 1}, "constructor": 1})
    assert dict(refused.value.errors) == {
        "count": "must be an integer from 1 to 10", "colour": "must be one of red, blue",
        "label": "the label a must be a string", "constructor": "is not known here",
        "word": "is missing",
    }  # fmt: skip


def test_an_open_schema_ignores_members_that_it_does_not_know_and_drops_them():
    assert OPEN_SCHEMA.check({"word": "abc", "__class__": {}, "later": [1]}) == {"word": "abc"}
    assert OPEN_SCHEMA.check({}) == {}
    assert OPEN_SCHEMA.json_schema()["additionalProperties"] is True
    schema = SCHEMA_OF_FOUR.json_schema()
    assert (schema["required"], schema["additionalProperties"]) == (["word"], False)
    assert list(schema["properties"]) == ["word", "count", "colour", "label"]
    for value, one in itertools.product(([], "word", 1, None, True), (SCHEMA_OF_FOUR, OPEN_SCHEMA)):
        with pytest.raises(hostenroll.InvalidBody, match="must be a JSON object"):
            one.check(value)


def test_a_query_parameter_comes_once_unless_it_repeats():
    pairs = [("label", "a=b"), ("word", "abc"), ("label", "c=d=e"), ("label", "a=")]
    labels = [("a", "b"), ("c", "d=e"), ("a", "")]
    assert SCHEMA_OF_FOUR.parse(pairs) == {"label": labels, "word": "abc"}
    pairs = [("word", "abc"), ("word", "abc"), ("x", "1"), ("label", "a"), ("count", "0")]
    with pytest.raises(hostenroll.InvalidQuery) as refused:
        SCHEMA_OF_FOUR.parse(pairs)
    assert [error.field for error in refused.value.errors] == ["word", "x", "label", "count"]


def test_a_parameter_that_repeats_does_so_as_often_as_its_schema_allows():
    described = SCHEMA_OF_FOUR.parameters("query")
    names = [(one["name"], one["required"]) for one in described]
    assert names == [("word", True), ("count", False), ("colour", False), ("label", False)]
    most = described[-1]["schema"]["maxItems"]
    pairs = [("label", f"a={n}") for n in range(most + 1)]
    assert len(SCHEMA_OF_FOUR.parse([("word", "web"), *pairs[:-1]])["label"]) == most
    with pytest.raises(hostenroll.InvalidQuery) as refused:
        SCHEMA_OF_FOUR.parse(pairs)
    assert [error.field for error in refused.value.errors] == ["label", "word"]


def test_a_label_in_a_query_is_described_as_the_text_that_it_is():
    taken = ["a=", "a=b", "a=b=c", "a/b.c=d", "a=\u00fc", f"{'a' * 63}=b", f"a={'v' * 255}"]
    others = ["", "a", "=", "=b", "a b=c", "a/=b", f"{'a' * 64}=b", f"a={'v' * 256}"]
    assert ["=".join(LABELS.parse(text)) for text in taken] == taken
    for text in others:
        with pytest.raises(ValueError):
            LABELS.parse(text)
    assert [text for text in taken + others if allows(LABELS.parameter_schema(), text)] == taken


def test_a_schema_with_a_name_is_described_in_one_place():
    named = hostenroll.Schema(hostenroll.Field("word", WORD), name="Word")
    assert hostenroll.ObjectOf(named).json_schema() == {"$ref": "#/components/schemas/Word"}
    assert hostenroll.ObjectOf(SCHEMA_OF_FOUR).json_schema() == SCHEMA_OF_FOUR.json_schema()


NOT_JSON = {
    "empty": b"", "white space": b" \n", "cut off": b'{"a":1', "something behind": b"{}x",
    "two texts": b"{}{}", "a form": b"token=het_1&hostname=web-1",
    "a member twice": b'{"a":1,"a":1}',
    "a member twice, spelled differently": b'{"a":1,"\\u0061":2}',
    "a member twice, deep": b'{"x":[{"y":{"a":1,"b":2,"a":3}}]}', "NaN": b'{"a":NaN}',
    "Infinity": b'{"a":[Infinity]}', "-Infinity": b'{"a":-Infinity}',
    "a lone high surrogate": b'{"a":"\\ud800"}', "a lone low surrogate": b'{"a":"x\\udc00y"}',
    "surrogates in the wrong order": b'{"a":"\\ude00\\ud83d"}',
    "a lone surrogate as a name": b'{"\\uD800":1}',
    "a surrogate in UTF-8": b'{"a":"\xed\xa0\x80"}', "an overlong slash": b'{"a":"\xc0\xaf"}',
    "latin-1": b'{"a":"\xe9"}', "UTF-16": '{"a":1}'.encode("utf-16"),
    "UTF-16 without a mark": '{"a":1}'.encode("utf-16-le"),
    "a byte order mark": b"\xef\xbb\xbf{}", "a raw newline in a text": b'{"a":"x\ny"}',
    "a raw NUL in a text": b'{"a":"x\0y"}', "NUL behind": b"{}\0",
    "no-break space": "{\u00a0}".encode(), "single quotes": b"{'a':1}", "no quotes": b"{a:1}",
    "a comma at the end": b'{"a":1,}', "a comment": b'{"a":1}//', "a leading zero": b'{"a":01}',
    "a plus sign": b'{"a":+1}', "a bare point": b'{"a":1.}', "hexadecimal": b'{"a":0x1}',
    "Arabic digits": '{"a":\u0661}'.encode(), "too deep in arrays": b"[" * 65_000,
    "too deep in objects": b'{"a":' * 13_000 + b"1" + b"}" * 13_000,
    "too deep, with an escape": b'["\\u0041",' + b"[" * 30_000 + b"]" * 30_001,
}  # fmt: skip


@pytest.mark.parametrize("body, value", table({
    "an object": (b'{"a":1}', {"a": 1}), "no object": (b'"text"', "text"),
    "white space around": (b' \r\n\t{ "a" : [ ] }\n', {"a": []}),
    "UTF-8": ('{"é":"😀"}'.encode(), {"é": "😀"}), "NUL": (b'{"a":"\\u0000"}', {"a": "\0"}),
    "a surrogate pair": (b'{"a":"\\ud83d\\ude00"}', {"a": "😀"}),
    "a great integer": (b'{"a":9007199254740992}', {"a": 2**53}),
    "one name at two depths": (b'{"a":{"a":{"a":1}}}', {"a": {"a": {"a": 1}}}),
    "one name in two objects": (b'[{"a":1},{"a":2}]', [{"a": 1}, {"a": 2}]),
    "some depth": (b"[" * 50 + b"]" * 50, json.loads("[" * 50 + "]" * 50)),
}))  # fmt: skip
def test_a_json_text_is_read(body, value):
    assert hostenroll.parse_json(body) == value


@pytest.mark.parametrize("body", table(NOT_JSON))
def test_a_body_that_is_not_strictly_json_is_refused_at_once(body):
    began = time.process_time()
    with pytest.raises(hostenroll.InvalidBody):
        hostenroll.parse_json(body)
    assert time.process_time() - began < 0.25


def test_of_an_agents_body_the_brackets_are_counted():
    body = '{"os":"é","x":[[1,-2.5e9,{"y":null}]],"z":[{}]}'.encode()
    value = {"os": "é", "x": [[1, -2.5e9, {"y": None}]], "z": [{}]}
    assert hostenroll.parse_agent_json(body) == value
    for text in ("{", "["):  # six in the body, two more, and three more
        more = body.replace("é".encode(), text.encode() * 2)
        assert hostenroll.parse_agent_json(more)["os"] == text * 2
        with pytest.raises(hostenroll.InvalidBody, match="more than 8 "):
            hostenroll.parse_agent_json(more.replace(b"null", b"{}"))
    for text in ("", "{}x", '{"a":01}', '{"a":-}', '{"a":1,"a":2}', '{"a":NaN}', '{"a":"\\ud800"}'):
        with pytest.raises(hostenroll.InvalidBody):
            hostenroll.parse_agent_json(text.encode())


# 4. Secrets

B64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
OCTETS = bytes(range(32))
KEY = hostenroll.SigningKey("key-1", OCTETS)
CLAIMS = hostenroll.Claims(0x0D3A5F0012345678, "acme", 1_800_000_000, 3, None, "key-1")
HEADER = {"alg": "HS256", "typ": "JWT", "kid": "key-1"}
WRITTEN = '{"iss":"hostenroll","sub":"0d3a5f0012345678","org":"acme","iat":1800000000,"ser":3}'
PAYLOAD = json.loads(WRITTEN)
TEXT = hostenroll.mint_secret("het", 1).text
NO_SECRETS = [
    "", f"{TEXT}\n", f" {TEXT}", f"{TEXT}\0", TEXT.upper(), "HET" + TEXT[3:], "hak" + TEXT[3:],
    TEXT[:-1], f"{TEXT}0", TEXT * 2, TEXT[:-8] + "\uff10" * 8, TEXT + "a" * 100_000,
    hostenroll.mint_secret("hex", 1).text, hostenroll.mint_secret("het", 2**63).text,  # well made
    hostenroll.mint_secret("hak", 1).text, KEY.sign(CLAIMS),
]  # fmt: skip
NO_IDS = ["", "1", "0" * 15, "0" * 17, "8" + "0" * 15, "0" * 15 + "G", "A" * 16, "0" * 16 + "\n",
          "-" + "0" * 15, "0x" + "0" * 14, "0_" * 8, "\uff11" * 16, "' OR 1=1; --    "]  # fmt: skip


@pytest.mark.parametrize("prefix", ["het", "hak"])
def test_a_secret_has_its_prefix_its_id_256_random_bits_and_a_check(prefix):
    secret = hostenroll.mint_secret(prefix, 0x1234)
    assert re.fullmatch(prefix + r"_0000000000001234_[A-Za-z0-9_-]{43}[0-9a-f]{8}", secret.text)
    assert hostenroll.parse_secret(prefix, secret.text) == secret
    assert secret.digest() == hashlib.sha256(secret.text.encode()).digest()
    texts = {hostenroll.mint_secret(prefix, 0x1234).text[21:64] for _ in range(200)}
    assert len(texts) == 200
    octets = [int.from_bytes(unb64(text), "big") for text in texts]  # every bit of them varies
    assert {sum(o >> bit & 1 for o in octets) for bit in range(256)}.isdisjoint({0, 200})


def test_a_typing_error_makes_no_secret():
    text = hostenroll.mint_secret("het", hostenroll.new_id(int(NOON * 1000))).text
    wrong = {text[:at] + c + text[at + 1 :] for at in range(len(text)) for c in B64 + " é\n"}
    assert len(wrong) > 4000
    wrong |= {text[:n] + text[n + 1] + text[n] + text[n + 2 :] for n in range(4, len(text) - 1)}
    assert [one for one in wrong - {text} if hostenroll.parse_secret("het", one)] == []


def test_a_text_that_we_cannot_have_minted_is_no_secret_and_an_id_has_one_spelling():
    assert hostenroll.parse_secret("het", TEXT)
    assert [text for text in NO_SECRETS if hostenroll.parse_secret("het", text)] == []
    assert [text for text in NO_IDS if hostenroll.parse_id(text) != -1] == []


def test_ids_are_in_the_order_of_time_and_fit_63_bits():
    noon, epoch, last = int(NOON * 1000), 1_577_836_800_000, (1 << 41) - 1  # ms: 2020, and 69 years
    times = epoch, *range(noon, noon + 50_000, 1000), epoch + last
    ids = [hostenroll.new_id(now) for now in times]
    assert ids == sorted(ids) and max(ids) < 2**63 and min(ids) >= 0
    assert [hostenroll.parse_id(hostenroll.id_text(number)) for number in ids] == ids
    rows = {epoch: 0, epoch + 1: 1, 0: 0, epoch + last: last, epoch + last + 1: 0}
    for now, begins in rows.items():
        made = [hostenroll.new_id(now) for _ in range(50)]
        assert {one >> 22 for one in made} == {begins}
        assert hostenroll.first_id(now) == begins << 22
        assert len({one & (1 << 22) - 1 for one in made}) > 40


# Credentials.


def b64(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64(text):
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def seal(signed, octets=OCTETS, digest="sha256"):
    """header.payload with a true signature: an attacker never gets as far."""
    return f"{signed}.{b64(hmac.new(octets, signed.encode(), digest).digest())}"


def forge(header=HEADER, payload=WRITTEN, *key):
    """A JWT with any header and payload; a text goes as it is."""
    compact = partial(json.dumps, separators=(",", ":"))
    texts = [part if isinstance(part, str) else compact(part) for part in (header, payload)]
    return seal(".".join(b64(text.encode()) for text in texts), *key)


def respell(part):
    """Other base64url of the same bytes: the last character has bits to spare."""
    return part[:-1] + B64[B64.index(part[-1]) + 1]


def verify(ring, credential):
    return ring.verify(credential.encode("utf-8", "surrogatepass"))


KEY_2 = hostenroll.SigningKey("key-2", b"2" * 32)
RING = hostenroll.Keyring([KEY, KEY_2], b"a" * 32)


@pytest.mark.parametrize("claims", table({
    "for good": CLAIMS, "until a day": CLAIMS._replace(expires_at=1_800_086_400),
    "expired for long": CLAIMS._replace(expires_at=0),
    "until the year 9999": CLAIMS._replace(expires_at=253_402_300_799),
    "the greatest": CLAIMS._replace(host=2**63 - 1, organization="Z" * 64, serial=10**12 - 1),
    "the least": CLAIMS._replace(host=0, organization="-", issued_at=0, serial=1, expires_at=0),
    "the longest": hostenroll.Claims(2**63 - 1, "Z" * 64, *[10**12 - 1] * 3, "k" * 64),
}))  # fmt: skip
def test_a_credential_is_a_plain_jwt_that_any_library_verifies(claims):
    """RFC 7515 section 3.1 and RFC 7519, by hand."""
    key = hostenroll.SigningKey(claims.kid, OCTETS)
    credential = key.sign(claims)
    header, payload, signature = credential.split(".")
    expected = hmac.new(OCTETS, f"{header}.{payload}".encode("ascii"), hashlib.sha256).digest()
    assert unb64(signature) == expected and "=" not in credential
    assert json.loads(unb64(header)) == {**HEADER, "kid": claims.kid}
    names = dict(zip(("sub", "org", "iat", "ser"), (f"{claims.host:016x}", *claims[1:4])))
    expiry = {} if claims.expires_at is None else {"exp": claims.expires_at}
    assert json.loads(unb64(payload)) == {"iss": "hostenroll", **names, **expiry}
    assert verify(hostenroll.Keyring([key], b"a" * 32), credential) == claims


GENUINE = KEY.sign(CLAIMS)
H, P, S = GENUINE.split(".")
PUBLIC = {"kty": "oct", "k": b64(b"evil" * 8)}
CHANGED_HEADERS = [
    # RFC 8725 section 2.1: the algorithm must not be the attacker's to choose.
    {"alg": "none"}, {"alg": "None"}, {"alg": "HS512"}, {"alg": "RS256"}, {"alg": "hs256"},
    {"alg": None}, {"typ": "jwt"}, {"cty": "JWT"}, {"crit": ["b64"], "b64": False},
    # RFC 8725 section 3.10: kid, jku, jwk and x5u are the attacker's words.
    {"kid": "key-3"}, {"kid": "key-2"}, {"kid": None}, {"kid": ["key-1"]}, {"kid": "key-1|id"},
    {"jwk": PUBLIC}, {"jku": "https://evil.test/jwks"}, {"x5u": "https://evil.test/evil.pem"},
    {"x5t": b64(b"evil"), "x5t#S256": b64(b"evil")},
]  # fmt: skip
OTHERWISE_SIGNED = [  # what is changed in the header, and the key and the hash that sign it
    ({"alg": "HS384"}, OCTETS, "sha384"), ({"alg": "HS512"}, OCTETS, "sha512"), ({"kid": ""}, b""),
    ({"kid": "../../../../dev/null"}, b""), ({"kid": "key-1' UNION SELECT 'evil' --"}, b"evil"),
    ({"kid": "audit"}, b"a" * 32), ({"jwk": PUBLIC}, b"evil" * 8),
    ({"x5c": [base64.b64encode(b"evil").decode()]}, b"evil"),
]  # fmt: skip
OTHER_HEADERS = [  # members that are missing, in another order, or twice; space; no JSON, no object
    {"typ": "JWT", "kid": "key-1"}, {"alg": "HS256", "typ": "JWT"},
    {"typ": "JWT", "alg": "HS256", "kid": "key-1"}, '{"alg": "HS256","typ":"JWT","kid":"key-1"}',
    '{"alg":"none","alg":"HS256","typ":"JWT","kid":"key-1"}', "x", [HEADER],
]  # fmt: skip
OTHER_CLAIMS = [{}, [PAYLOAD], "x", dict(reversed(list(PAYLOAD.items()))), json.dumps(PAYLOAD)]
CHANGED_CLAIMS = {  # a text of the genuine payload, and what stands in its place, truly signed
    '"iss":"hostenroll",': [""], '"sub":"0d3a5f0012345678",': [""], '"org":"acme",': [""],
    '"iat":1800000000,': [""], ',"ser":3': [""], '"sub":': ['"sub":"0000000000000000","sub":'],
    '"hostenroll"': ['["hostenroll"]'], "hostenroll": ["hostenrolled"],
    ":3}": [':3,"ser":4}', ':"3"}', ":3.0}", ":3e0}", ":03}", ":true}", ":0}", ":-3}",
            ":" + "3" * 30 + "}"],
    ":1800000000": [':"1800000000"', ":-1"],
    "}": [',"aud":"x"}', ',"nbf":0}', ',"nbf":"0"}', "}\n", ',"exp":null}', ',"exp":"1900000000"}',
          ',"exp":1900000000.0}', ',"exp":[1900000000]}', ',"exp":true}', ',"exp":-1}',
          ',"exp":-0}', ',"exp":1000000000000}', ',"exp":1' + "0" * 500 + "}",
          ',"exp":1900000000,"exp":1}', ',"exp":Infinity}'],
    "0d3a5f": ["0D3A5F"], '"0d3a': ['"d3a', '"fd3a', '"\\u0030d3a'], '"0d3a5f0012345678"': ["42"],
    "acme": ["", "a" * 65, "../x", "é", "a\0b"],
}  # fmt: skip
FORGED = {
    **{json.dumps(members): forge({**HEADER, **members}) for members in CHANGED_HEADERS},
    **{f"{members} by {by}": forge({**HEADER, **members}, WRITTEN, *by)
       for members, *by in OTHERWISE_SIGNED},
    **{f"header {header}": forge(header) for header in OTHER_HEADERS},
    **{f"claims {claims}": forge(HEADER, claims) for claims in OTHER_CLAIMS},
    **{f"{text}{instead}"[:60]: forge(HEADER, WRITTEN.replace(text, instead))
       for text, instances in CHANGED_CLAIMS.items() for instead in instances},
    "alg none, not signed": b64(b'{"alg":"none"}') + f".{P}.",
    "alg none with our kid": b64(b'{"alg":"none","typ":"JWT","kid":"key-1"}') + f".{P}.",
    "no header": seal(f".{P}"), "empty claims": seal(f"{H}."),
    # Signatures.
    "no signature": f"{H}.{P}.", "two parts": f"{H}.{P}", "a signature cut short": GENUINE[:-1],
    "another key's": seal(f"{H}.{P}", b"evil" * 8), "no key's": seal(f"{H}.{P}", b""),
    "over the claims alone": f"{H}.{seal(P)}", "SHA-1": seal(f"{H}.{P}", OCTETS, "sha1"),
    "a signature in hexadecimal": f"{H}.{P}.{unb64(S).hex()}",
    "other claims with this signature": f"{H}.{b64(WRITTEN.replace('3}', '4}').encode())}.{S}",
    # RFC 7515 section 2: one spelling, or a cache and a log can be misled.
    "another last character of the header": seal(f"{respell(H)}.{P}"),
    "another last character of the claims": seal(f"{H}.{respell(P)}"),
    "another last character of the signature": f"{H}.{P}.{respell(S)}",
    "padding of the header": seal(f"{H}=.{P}"), "padding of the claims": seal(f"{H}.{P}="),
    "padding of the signature": f"{GENUINE}=", "plain base64's plus": seal(f"{H}.{P[:-1]}+"),
    "plain base64's slash": seal(f"{H}.{P[:-1]}/"), "a tilde": seal(f"{H}.{P[:-1]}~"),
    "plain base64 of the signature": f"{H}.{P}." + base64.b64encode(unb64(S)).decode(),
    "one character too many in the claims": seal(f"{H}.{P + 'A' * ((1 - len(P)) % 4)}"),
    "space in the claims' base64": seal(f"{H}.{P[:8]} {P[8:]}"),
    **{f"{text!r} behind": GENUINE + text for text in ("\n", "\r\n", "\0", f".{S}")},
    **{f"{text!r} before": text + GENUINE for text in (" ", "Bearer ", ".")},
    **{f"{text!r} at the end": GENUINE[:-1] + text for text in ("é", "\uff11", "\udcff")},
    "five parts, as of a JWE": f"{H}..{P}.{S}.{S}",
    "JSON serialization": json.dumps({"protected": H, "payload": P, "signature": S}),
    "very long": seal(f"{H}.{b64(b'x' * 100_000)}"), "nothing": "", "dots": "..",
    "a token": TEXT, "an API key": hostenroll.mint_secret("hak", 1).text,
}  # fmt: skip


@pytest.mark.parametrize("credential", table(FORGED))
def test_only_a_text_that_we_signed_is_a_credential(credential):
    assert verify(RING, credential) is None
    assert forge() == GENUINE and verify(RING, GENUINE) == CLAIMS  # else these forge nothing


def test_no_character_of_a_credential_can_be_another_and_all_of_a_key_begin_alike():
    for at, other in itertools.product(range(len(GENUINE)), "A-Zz09_.="):
        forged = GENUINE[:at] + other + GENUINE[at + 1 :]
        assert forged == GENUINE or verify(RING, forged) is None
    opening = KEY.opening.decode("ascii")
    for host in (0, 1, 2**63 - 1, CLAIMS.host):
        credential = KEY.sign(CLAIMS._replace(host=host))
        assert credential.startswith(opening)
        assert hostenroll.host_of(credential[len(opening) :].encode("ascii")) == host
    assert not KEY_2.sign(CLAIMS).startswith(opening)


def test_the_first_key_of_a_ring_signs_and_all_verify_also_when_it_is_rotated():
    rotated = RING.rotated()
    without, fresh, kid = rotated.without("key-1"), rotated.first.sign(CLAIMS), rotated.first.kid
    assert re.fullmatch("[0-9a-f]{16}", kid) and len(rotated.first.octets) == 32
    kids = [ring.kids for ring in (RING, rotated, without)]
    assert kids == [["key-1", "key-2"], [kid, "key-1", "key-2"], [kid, "key-2"]]
    assert RING.first.kid == "key-1" and rotated.audit_key == without.audit_key == RING.audit_key
    rows = (fresh, CLAIMS._replace(kid=kid)), (KEY_2.sign(CLAIMS), CLAIMS._replace(kid="key-2"))
    for credential, claims in (*rows, (GENUINE, CLAIMS)):
        assert verify(rotated, credential) == claims
    assert verify(RING, fresh) is verify(without, GENUINE) is None
    one, other = hostenroll.new_keyring(), hostenroll.new_keyring()  # which share nothing
    secrets = {o for ring in (one, other) for o in (ring.first.octets, ring.audit_key)}
    assert len(secrets) == 4 and {len(octets) for octets in secrets} == {32}
    assert one.first.kid != other.first.kid and verify(other, one.first.sign(CLAIMS)) is None


# Files that are safe to write. SERVICE owns the folder in which root works, as under systemd.

SERVICE, STRANGER = 12345, 54321
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


def owned(path):
    """Owner, group and permissions of what stands at a name."""
    status = os.lstat(path)
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


def make(path, user=SERVICE, mode=0o600):
    path.write_bytes(b"")
    path.chmod(mode)
    os.chown(path, user, user)


def device(path):
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("no devices are made here")


@contextlib.contextmanager
def pretending_to_be(user):
    os.setegid(user)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def replace(path, like=None):
    with hostenroll.replacing(str(path), like) as file:
        file.write(b"new")


PREPARED = {  # at a name in the folder, by its owner
    "a link to root's file": lambda path: path.symlink_to("../secret"),
    "a link to a file that is not there": lambda path: path.symlink_to("../made"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a second name of root's file": lambda path: os.link(path.parent.parent / "secret", path),
    "a pipe": os.mkfifo, "a device": device, "a stranger's file": lambda path: make(path, STRANGER),
}  # fmt: skip
OWNERS = {  # of key file, database and folder, the folder's mode, and who takes the keys
    "root's": (0, SERVICE, SERVICE, 0o755, (0, SERVICE)),
    "the service's, in root's folder": (SERVICE, SERVICE, 0, 0o775, (0, SERVICE)),
    "the service's, without a database": (SERVICE, None, SERVICE, 0o755, (0, SERVICE)),
    "the service's, in a folder of all": (SERVICE, SERVICE, 0, 0o1777, (SERVICE,)),
    "a stranger's pair, in a folder of all": (STRANGER, STRANGER, 0, 0o1777, ()),
    "a stranger's, in a folder of all": (STRANGER, None, 0, 0o1777, ()),
    "a stranger's, in root's folder": (STRANGER, 0, 0, 0o755, ()),
    "a stranger's, in his folder": (STRANGER, SERVICE, STRANGER, 0o755, ()),
}
ROOTS_COMMANDS = sample({  # a name in the folder, the link there, root's command, its exit status
    "the gate": ("hostenroll.db.gate", "../secret", "list-tokens", 1),
    "no database": ("hostenroll.db", "../made", "list-tokens", 1),
    "the key file": ("hostenroll.key", "../secret", "rotate-signing-key", 1),
    "no key file": ("hostenroll.key", "../made", "rotate-signing-key", 1),
    "a new key file": ("hostenroll.key.tmp", "../secret", "rotate-signing-key", 0),
}, "the gate", "a new key file")  # fmt: skip


@pytest.fixture
def attacked(tmp_path):
    """A folder of the service's user with a database, and beside the folder a file of root's."""
    folder, secret = tmp_path / "service", tmp_path / "secret"
    folder.mkdir()
    os.chown(folder, SERVICE, SERVICE)
    make(folder / "db", SERVICE, 0o640)
    make(secret, 0)
    secret.write_bytes(b"of root")
    yield folder
    assert (secret.read_bytes(), owned(secret)) == (b"of root", (0, 0, 0o600))
    assert not (tmp_path / "made").exists()


@needs_root
@pytest.mark.parametrize("prepare", table({**PREPARED, "a folder": os.mkdir}))
def test_no_file_that_another_user_prepared_is_taken_for_a_lock_or_a_wal(attacked, prepare):
    """A hard link at the name of the WAL would have SQLite write into the file that it names.
    Without a database the owner of the folder counts."""
    path, database = attacked / "db-wal", str(attacked / "db")
    prepare(path)
    before = os.lstat(path)
    reason = rf"^{re.escape(str(path))} .*remove it$"
    uses = hostenroll.open_lock_file, hostenroll.require_own_file
    for use, of in itertools.product(uses, (database, str(attacked / "none"))):
        with pytest.raises(hostenroll.OperatorError, match=reason):
            use(str(path), of)
    assert os.lstat(path)[:6] == before[:6]  # mode, inode, device, links, owner, group
    hostenroll.require_own_file(database, database)


@needs_root
@pytest.mark.parametrize("prepare, database, owner, mode", table({
    # what is there before, the database, owner and mode afterwards
    "made now": (lambda path: None, "db", SERVICE, 0o640),
    "made now, without a database": (lambda path: None, "none", 0, 0o600),
    "made now, where the database is a link": (lambda path: None, "link", 0, 0o600),
    "the service's": (lambda path: make(path, mode=0o644), "db", SERVICE, 0o644),
    "the service's, without a database": (make, "none", SERVICE, 0o600),
    "the service's, with a second name":
        (lambda path: (make(path), os.link(path, f"{path}.copy")), "db", SERVICE, 0o600),
    "root's, that was renamed into place": (lambda path: make(path, 0), "db", 0, 0o600),
    "made now, beside a database that is read-only for a while":
        (lambda path: path.with_name("db").chmod(0o440), "db", SERVICE, 0o640),
}))  # fmt: skip
def test_a_new_lock_file_gets_the_owner_of_the_database_and_an_old_one_keeps_its_own(
    attacked, prepare, database, owner, mode
):
    path = attacked / "db.gate"
    (attacked / "link").symlink_to("nothing")
    prepare(path)
    os.close(hostenroll.open_lock_file(str(path), str(attacked / database)))
    assert owned(path) == (owner, owner, mode)


@needs_root
@pytest.mark.parametrize("name", PREPARED)
def test_a_file_is_replaced_without_writing_to_what_another_user_prepared(attacked, name):
    path = attacked / "key"
    make(path)
    PREPARED[name](attacked / "key.tmp")
    replace(path, path.stat())
    assert owned(path) == (SERVICE, SERVICE, 0o600) and os.lstat(path).st_nlink == 1
    assert path.read_bytes() == b"new" and sorted(os.listdir(attacked)) == ["db", "key"]
    if "a link" not in name:  # which is refused
        path.unlink()
        PREPARED[name](path)
        replace(path)
        assert owned(path) == (0, 0, 0o600) and os.lstat(path).st_nlink == 1
        assert path.read_bytes() == b"new" and sorted(os.listdir(attacked)) == ["db", "key"]


@needs_root
@pytest.mark.parametrize("user, mode, maker, is_followed", table({
    # owner and mode of the folder, owner of the link, and whether it is followed
    "of root, in a folder of root": (0, 0o755, 0, True),
    "of the service": (0, 0o755, SERVICE, False),
    "of root, that the folder's owner may have renamed": (SERVICE, 0o755, 0, False),
    "of root, that the folder's group may have renamed": (0, 0o775, 0, False),
    "of root, in a folder of all": (0, 0o1777, 0, False),
}))  # fmt: skip
def test_a_link_is_followed_only_if_root_or_we_put_it_there(
    tmp_path, user, mode, maker, is_followed
):
    folder, real = tmp_path / "folder", tmp_path / "real"
    folder.mkdir()
    real.write_bytes(b"old")
    (folder / "key").symlink_to("../real")
    (tmp_path / "key").symlink_to("folder/key")  # also as the second of two
    os.chown(folder / "key", maker, maker, follow_symlinks=False)
    os.chown(folder, user, user)
    folder.chmod(mode)
    for path in (folder / "key", tmp_path / "key"):
        if is_followed:
            assert hostenroll.resolve_file(str(path)) == str(real)
            continue
        lock = hostenroll.WriteLock(str(path)).try_acquire
        for use in (hostenroll.resolve_file, replace, lambda _: lock()):
            with pytest.raises(hostenroll.OperatorError, match=r"name the file itself$"):
                use(str(path))
    assert real.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["folder", "key", "real"]


def test_a_path_is_made_absolute_and_a_link_to_itself_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "there").symlink_to("folder")
    (tmp_path / "loop").symlink_to("loop")
    for path, real in {"x": "x", "there/x": "folder/x", "there/../x": "x", "no/x": "no/x"}.items():
        assert hostenroll.resolve_file(path) == os.path.join(os.path.realpath(tmp_path), real)
    with pytest.raises(hostenroll.OperatorError, match="leads to itself"):
        hostenroll.resolve_file("loop")


# A user who may write in a folder puts files, links and nothing at some names in turn. He keeps his
# files open, and tells how often he could read something.
EXCHANGE = """
import contextlib, itertools, os, random, sys, time
os.setgroups([])
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
os.set_blocking(0, False)
mine, seen = [], []

def look():
    seen.extend(os.pread(each, 100, 0) for each in mine)
    while mine:
        os.close(mine.pop())

print(flush=True)
for name in itertools.cycle(sys.argv[2:]):
    with contextlib.suppress(BlockingIOError):
        if os.read(0, 1) == b"":
            break
    time.sleep(random.random() / 1000)
    with contextlib.suppress(OSError):
        how = random.choice(["file", "file", "link", "second name", "nothing"])
        if how == "file":
            mine.append(os.open("fresh", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        elif how == "link":
            os.symlink("../secret", "fresh")
        elif how == "second name":
            os.link("../secret", "fresh")
        os.rename("fresh", name) if how != "nothing" else os.unlink(name)
    with contextlib.suppress(OSError):
        os.unlink("fresh")
    with contextlib.suppress(OSError):
        with open(name, "rb") as file:
            seen.append(file.read(100))
    if len(mine) > 100:
        look()
look()
print(len(list(filter(None, seen))))
"""


@contextlib.contextmanager
def exchanging(folder, *names):
    command = [sys.executable, "-I", "-S", "-c", EXCHANGE, str(SERVICE), *names]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": folder}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == b"\n"
        yield
        assert process.communicate()[0] == b"0\n"  # none of his files has got anything


def outcomes_of(act, wanted):
    """Of doing it 20 times, and until what is wanted was met: it was done, it was refused."""
    met, deadline = [], time.monotonic() + 30
    while len(met) < 20 or (not wanted <= set(met) and time.monotonic() < deadline):
        try:
            act()
            met.append("done")
        except (hostenroll.OperatorError, hostenroll.StoreError, hostenroll.Unrecoverable, OSError):
            met.append("refused")
    return set(met)


@needs_root
def test_a_file_that_is_exchanged_all_the_time_leads_to_no_other(attacked):
    """The owner of the folder exchanges the names while root looks at them."""

    def work():
        os.close(hostenroll.open_lock_file(str(attacked / "db.gate"), str(attacked / "db")))
        replace(attacked / "key")

    with exchanging(attacked, "db.gate", "key.tmp", "key"):
        assert outcomes_of(work, {"done", "refused"}) == {"done", "refused"}


@needs_root
def test_a_key_file_is_given_to_nobody_but_the_owner_of_the_keys_that_were_read(attacked):
    """In a folder of all anybody can put his own file in its place after that look."""
    path, database = attacked / "key", attacked / "db"
    attacked.chmod(0o1777)
    for owner, group_reads in ((SERVICE, 0), (0, 0o040)):
        os.chown(write(path), owner, SERVICE)
        path.chmod(0o600 | group_reads)
        file = hostenroll.KeyFile(str(path), str(database))
        rotated = file.load().rotated()
        path.unlink()
        make(path, STRANGER)
        file.replace(rotated)
        assert owned(path) == (owner, SERVICE, 0o600 | group_reads)
    make(path, STRANGER)
    hostenroll.KeyFile(str(path), str(database)).replace(RING)  # a first one
    assert owned(path) == (0, 0, 0o600) and load(path).kids == RING.kids


@needs_root
def test_what_replaces_a_file_stays_in_its_folder_and_is_the_file_that_was_made(attacked):
    """Their owner renames the folder, and the file, while it is written."""
    other, path = attacked.parent / "other", attacked / "key"
    other.mkdir()
    for name in ("key", "key.tmp"):
        make(other / name, 0)
    with hostenroll.replacing(str(path)) as file:
        file.write(b"new")
        attacked.rename(attacked.parent / "moved")
        attacked.symlink_to("other")
    assert [(other / name).read_bytes() for name in ("key", "key.tmp")] == [b"", b""]
    attacked.unlink()
    attacked.parent.joinpath("moved").rename(attacked)
    assert path.read_bytes() == b"new"
    with pytest.raises(hostenroll.OperatorError, match=r"another user replaced .*key while"):
        with hostenroll.replacing(str(path)) as file:
            (attacked / "key.tmp").rename(attacked / "taken")
            make(attacked / "key.tmp", STRANGER)
    assert owned(attacked / "taken") == (0, 0, 0o600)


@needs_root
def test_a_file_in_the_way_that_only_its_owner_may_remove_is_named(attacked):
    attacked.chmod(0o1777)
    os.chown(attacked, 0, 0)
    make(attacked / "key.tmp", STRANGER)
    with contextlib.closing(hostenroll.Folder(str(attacked))) as folder, pretending_to_be(SERVICE):
        with pytest.raises(PermissionError, match=r"not permitted: remove .*/key\.tmp: '.*/key'$"):
            with folder.replacing("key"):
                pass
    assert owned(attacked / "key.tmp")[0] == STRANGER and not (attacked / "key").exists()


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775, 0o2770, 0o702])
def test_a_folder_is_open_to_all_where_others_may_replace_what_is_not_theirs(tmp_path, mode):
    """A group is chosen: a volume's, or that of one user."""
    folder, key = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    key.symlink_to("folder/key")
    folder.chmod(mode)
    is_open = mode in (0o777, 0o702)
    for files in ((folder / "db", key), (tmp_path / "db", key)):
        found = hostenroll.folders_open_to_all(*map(str, files))
        assert found == [str(folder)] * is_open
    if not is_open:
        write(folder / "key")
        return
    with pytest.raises(hostenroll.OperatorError, match=rf"{folder}: .*--key-file, or chmod o-w"):
        hostenroll.KeyFile(str(key), "/none").replace(RING)
    folder.chmod(0o700)
    file = hostenroll.KeyFile(str(write(folder / "key")), "/none")
    folder.chmod(mode)
    file.replace(file.load().rotated())  # a rotation goes on
    assert len(load(key).kids) == 3 and os.listdir(folder) == ["key"]


@needs_root
@pytest.mark.parametrize("name, target, command, exit_status", ROOTS_COMMANDS)
def test_no_command_of_root_touches_a_file_that_the_services_user_linked_to(
    attacked, name, target, command, exit_status
):
    assert cli(attacked, "add-org", "berlin").returncode == 0
    for each in attacked.iterdir():
        os.chown(each, SERVICE, SERVICE)
    (attacked / name).unlink(missing_ok=True)
    (attacked / name).symlink_to(target)
    done = cli(attacked, command, "--db", "hostenroll.db")
    assert (done.returncode, "Traceback" in done.stderr) == (exit_status, False)
    assert exit_status == 0 or (name in done.stderr and done.stderr.count("\n") == 1)


@pytest.mark.parametrize("umask, mode", [(0, 0o600), (0o777, 0o640)])
def test_a_new_file_has_exactly_its_mode_and_takes_the_place_of_nothing(tmp_path, umask, mode):
    (tmp_path / "link").symlink_to("nothing")
    before = os.umask(umask)
    try:
        descriptor = hostenroll.create_file(str(tmp_path / "new"), mode)
    finally:
        os.umask(before)
    with open(descriptor, "wb") as file:
        assert not os.get_inheritable(descriptor)
        file.write(b"old")
    assert owned(tmp_path / "new")[2] == mode
    for name in ("link", "new"):
        with pytest.raises(FileExistsError):
            hostenroll.create_file(str(tmp_path / name))
    assert sorted(os.listdir(tmp_path)) == ["link", "new"]
    assert (tmp_path / "new").stat().st_size == 3


def test_a_file_is_replaced_whole_or_not_at_all_and_is_on_the_disk_before(tmp_path, monkeypatch):
    """After a power cut a file that was renamed and not synced is there, and empty."""
    path, done, fsync, rename = tmp_path / "file", [], os.fsync, os.replace

    def syncing(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", lambda *at, **to: (done.append("rename"), rename(*at, **to)))
    path.write_bytes(b"old")
    path.chmod(0o644)
    with hostenroll.replacing(str(path)) as file:
        file.write(b"new, and longer")
        file.flush()
        assert (path.read_bytes(), owned(tmp_path / "file.tmp")[2]) == (b"old", 0o600)
    with pytest.raises(ValueError), hostenroll.replacing(str(path)) as file:
        file.write(b"half")
        raise ValueError
    assert (path.read_bytes(), owned(path)[2]) == (b"new, and longer", 0o600)
    assert done == ["file", "rename", "folder"] and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["key", "key.tmp"])
def test_a_file_that_cannot_be_replaced_leaves_nothing_beside_it(tmp_path, name):
    """A half-written file of keys must not stay."""
    (tmp_path / name).mkdir()
    with pytest.raises(hostenroll.OperatorError, match=r"^cannot write .*: Is a directory"):
        hostenroll.KeyFile(str(tmp_path / "key"), "/none").replace(RING)
    assert os.listdir(tmp_path) == [name]


# The key file.


def jwk(**members):
    key = {"kty": "oct", "use": "sig", "alg": "HS256", "kid": "key-1", "k": b64(OCTETS), **members}
    return {name: value for name, value in key.items() if value is not ...}


def jwks(*keys):
    return json.dumps({"keys": [*keys, AUDIT]}).encode()


def write(path, ring=RING):
    with hostenroll.replacing(str(path), ring.file) as file:
        file.write(ring.jwk_set())
    return path


def load(path, database="/none"):
    return hostenroll.load_keyring(str(path), str(database))


AUDIT = jwk(use="audit", alg=..., kid="audit", k=b64(b"a" * 32))
BAD_KEYS = [
    {"use": "enc"}, {"use": ...}, {"kty": ...}, {"kty": "RSA"}, {"alg": "HS512"}, {"kid": ...},
    {"kid": 1}, {"kid": "k\n1"}, {"kid": "k" * 2000}, {"k": ...}, {"k": None}, {"k": ""},
    {"k": b64(OCTETS[:31])}, {"k": "é" * 43}, {"k": b64(OCTETS) + "!!!!"},
    {"k": b64(OCTETS + b"x") + "A"},
]  # fmt: skip
KEY_TROUBLES = {
    "another database's": lambda path: write(path, hostenroll.new_keyring()),
    "gone": lambda path: path.unlink(), "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 9),
    "half a gigabyte": lambda path: os.truncate(path, 1 << 29),
    "not ours": lambda path: path.write_bytes(b"[]"), "open": lambda path: path.chmod(0o644),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path, 0o600)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
}  # fmt: skip


@pytest.fixture
def key_file(tmp_path):
    """One that has been loaded."""
    file = hostenroll.KeyFile(str(write(tmp_path / "the.key")), "/none")
    assert file.load().kids == RING.kids
    return file


def test_a_key_file_is_a_jwk_set_for_its_owner_alone(tmp_path):
    """RFC 7517 section 5, RFC 7518 section 6.4."""
    path = tmp_path / "key"
    path.write_text("x" * 10_000)
    path.chmod(0o644)
    assert owned(write(path))[2] == 0o600
    keys = [jwk(), jwk(kid="key-2", k=b64(b"2" * 32)), AUDIT]
    assert json.loads(path.read_bytes()) == {"keys": keys}
    kept = [load(path).audit_key, *[(key.kid, key.octets) for key in load(path).keys]]
    assert kept == [b"a" * 32, ("key-1", OCTETS), ("key-2", b"2" * 32)]
    assert verify(load(path), GENUINE) == CLAIMS


def test_a_link_to_a_key_file_stays_one(tmp_path):
    """Else the file that it leads to would keep the old keys, for those who read it there."""
    (tmp_path / "safe").mkdir()
    path, real = tmp_path / "the.key", write(tmp_path / "safe" / "real.key")
    path.symlink_to("safe/real.key")
    write(path, RING.rotated())
    assert path.is_symlink() and len(load(real).kids) == 3
    assert {each.name for each in tmp_path.rglob("*")} == {"safe", "the.key", "real.key"}


def test_a_mounted_secret_is_read_through_its_links_also_when_they_change(tmp_path):
    """As Kubernetes mounts and updates one: the.key -> ..data/the.key, ..data -> ..<time>."""
    tmp_path.chmod(0o1777)
    for version, ring in (("..1", RING), ("..2", RING.without("key-2"))):
        (tmp_path / version).mkdir()
        write(tmp_path / version / "the.key", ring)
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "the.key").symlink_to("..data/the.key")
    file = hostenroll.KeyFile(str(tmp_path / "the.key"), "/none")
    assert file.load().kids == RING.kids
    (tmp_path / "..new").symlink_to("..2")
    os.replace(tmp_path / "..new", tmp_path / "..data")
    shutil.rmtree(tmp_path / "..1")
    assert file.reload(RING).kids == ["key-1"] and file.trouble == ""


@pytest.mark.parametrize("content", table({
    **{f"a key with {members}"[:60]: jwks(jwk(**members)) for members in BAD_KEYS},
    **{repr(content): content for content in (
        b"", b"\x7fELF\xff\0", b"[]", b'"keys"', b"{}", b'{"keys":null}', b'{"keys":"k"}',
        b'{"keys":{"k":1}}')},
    "cut off": jwks(jwk())[:-2], "a key that is null": jwks(None),
    "nested without end": b'{"keys":' + b"[" * 50_000,
    "no signing key": jwks(), "no audit key": json.dumps({"keys": [jwk()]}).encode(),
    "two audit keys": jwks(jwk(), AUDIT), "one kid twice": jwks(jwk(), jwk(k=b64(b"2" * 32))),
}))  # fmt: skip
def test_a_bad_key_file_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "the.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(hostenroll.OperatorError, match=re.escape(str(path))) as refused:
        load(path)
    assert "\n" not in str(refused.value) and b64(OCTETS) not in str(refused.value)
    path.write_bytes(jwks(jwk(alg=...)))
    assert load(path).first.octets == OCTETS


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o610, 0o601, 0o666, 0o440, 0o444])
def test_a_key_file_that_is_open_to_others_or_not_there_is_refused(tmp_path, mode):
    """Root's may be read by a group: it is mounted for a service of that group."""
    path, database = write(tmp_path / "the.key"), tmp_path / "db"
    path.chmod(mode)
    rows = (path, "chmod 600"), *[(tmp_path / x, "cannot read the key file") for x in ("no", "")]
    if os.geteuid() == 0:
        if mode in (0o640, 0o440, 0o610):
            assert load(path).keys
        else:
            with pytest.raises(hostenroll.OperatorError, match="chmod 600"):
                load(path)
        for file in (path, database):
            file.touch()
            os.chown(file, SERVICE, SERVICE)
    for name, reason in rows:
        with pytest.raises(hostenroll.OperatorError, match=reason):
            load(name, database)
    path.chmod(0o400)
    assert load(path, database).keys


@needs_root
@pytest.mark.parametrize("owner, of_database, of_folder, mode, takers", table(OWNERS))
def test_keys_are_taken_from_root_us_and_the_databases_owner_alone(
    tmp_path, monkeypatch, owner, of_database, of_folder, mode, takers
):
    """Also through a link, since mounted secrets are links."""
    folder, elsewhere = tmp_path / "service", tmp_path / "elsewhere"
    for place in (folder, elsewhere):
        place.mkdir()
        os.chown(write(place / "key"), owner, SERVICE)
        os.chmod(place / "key", 0o600 if owner else 0o440)
    (folder / "link").symlink_to("../elsewhere/key")
    if of_database is not None:
        make(folder / "db", of_database)
    os.chown(folder, of_folder, of_folder)
    folder.chmod(mode)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(folder)  # what is above it is root's alone
    for user, name in itertools.product((0, SERVICE), ("key", "link")):
        with pretending_to_be(user):
            if user in takers:
                assert load(name, "db").kids == RING.kids
                continue
            with pytest.raises(hostenroll.OperatorError, match=r"another user, of id|cannot read"):
                load(name, "db")


def test_a_key_file_is_read_again_when_it_has_changed_however_soon_and_only_then(key_file):
    assert key_file.reload(RING) is None
    key_file.replace(RING.rotated())
    assert key_file.reload(RING) is None  # its own doing
    write(key_file.path, RING.without("key-2"))
    assert key_file.reload(RING).kids == ["key-1"]
    assert key_file.reload(RING) is None and key_file.trouble == ""
    # Copied, looked at, and chmod 600, within one tick of the clock of the file system.
    for mode in (0o644, 0o600) * 300:
        os.chmod(key_file.path, mode)
        key_file.reload(RING)
        assert (key_file.trouble == "") is (mode == 0o600)


@pytest.mark.parametrize("spoil", table(KEY_TROUBLES))
def test_a_bad_key_file_is_logged_once_and_read_when_it_is_good_again(spoil, key_file, caplog):
    path = Path(key_file.path)
    for _ in range(2):
        spoil(path)
        assert [key_file.reload(RING) for _ in range(4)] == [None] * 4
        assert str(path) in key_file.trouble
        if path.is_dir():
            path.rmdir()
        elif path.is_symlink():
            path.unlink()
        write(path)
        assert key_file.reload(RING).kids == RING.kids
        assert key_file.trouble == "" and key_file.reload(RING) is None
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and all(str(path) in line and "\n" not in line for line in lines)


# The pin of a certificate.

WHOLE = ssl.PEM_cert_to_DER_cert(certificate_of("one"))  # of version 3
OLD = b"0\x82%b0\x82%b" % tuple((len(WHOLE) - n).to_bytes(2, "big") for n in (9, 98)) + WHOLE[13:]
PIN = "sha256//k6hhnPvLMepU9qR29TqU64VNimlwgKGrtghuqd261Ys="  # computed by openssl


def test_a_pin_is_the_hash_of_the_key_and_bytes_that_are_no_certificate_have_none():
    ends = 4_733_510_400_000  # 2120-01-01
    for data in (WHOLE, OLD):
        assert hostenroll.read_certificate(data) == (PIN, ends)
    seed = random.Random(7)
    junk = [WHOLE[:length] for length in range(len(WHOLE))]
    junk += [bytes([octet]) * size for octet in (0, 0x30, 0x80, 0x84, 0xFF) for size in range(9)]
    for data in junk:
        with pytest.raises(hostenroll.OperatorError):
            hostenroll.read_certificate(data)
    for _ in range(3000):
        data = bytearray(WHOLE)
        for _ in range(seed.randint(1, 4)):
            data[seed.randrange(len(data))] = seed.randrange(256)
        with contextlib.suppress(hostenroll.OperatorError):
            read = hostenroll.read_certificate(bytes(data))
            assert read.pin.startswith("sha256//") and read.ends > 0


def der(tag, *parts):
    return bytes([tag, len(b"".join(parts))]) + b"".join(parts)


@pytest.mark.parametrize("kind, text, ends", [
    # kind and text of notAfter, the end in seconds
    (0x17, b"491231235959Z", 2_524_607_999), (0x17, b"500101000000Z", 1),
    (0x17, b"991231235959Z", 946_684_799), (0x17, b"000229120000Z", 951_825_600),
    (0x18, b"20500101000000Z", 2_524_608_000), (0x18, b"19700101000000Z", 1),
    (0x18, b"99991231235959Z", hostenroll.LAST_SECOND),  # none: RFC 5280 section 4.1.2.5
    (0x18, b"20501301000000Z", None), (0x18, b"2050010100Z", None),
    (0x17, b"\xff0101000000Z", None), (0x18, b"", None),
])  # fmt: skip
def test_the_end_of_a_certificate_is_read_as_rfc_5280_has_it(kind, text, ends):
    validity = der(0x30, der(0x17, b"200101000000Z"), der(kind, text))
    for version in (b"", der(0xA0, b"\2\1\2")):
        members = (
            version,
            der(2, b"1"),
            der(0x30),
            der(0x30, b"issuer"),
            validity,
            der(0x30),
            der(0x30, b"key"),
        )
        octets = der(0x30, der(0x30, *members), der(0x30), der(3))
        if ends is None:
            with pytest.raises(hostenroll.OperatorError, match="cannot read a: "):
                hostenroll.read_certificate(octets, "a")
            continue
        read = hostenroll.read_certificate(octets)
        assert read.ends == max(1, ends * 1000 if ends > 1 else 1)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")
@pytest.mark.parametrize("key", ["ec -pkeyopt ec_paramgen_curve:P-256", "rsa:1024", "ed25519"])
def test_a_pin_is_the_one_that_openssl_computes(key, tmp_path):
    def openssl(words, data=b""):
        command, options = ["openssl", *words.split()], {"cwd": tmp_path, "input": data}
        return subprocess.run(command, capture_output=True, check=True, **options).stdout

    openssl(f"req -new -nodes -subj /CN=x -keyout key -out request -newkey {key}")
    (tmp_path / "extensions").write_text("subjectAltName=DNS:x\n")
    for extensions in ("-extfile extensions", ""):  # version 3, version 1
        openssl(f"x509 -req -in request -signkey key -out cert {extensions}")
        public = openssl("pkey -pubin -outform der", openssl("x509 -in cert -noout -pubkey"))
        pin = base64.b64encode(openssl("dgst -sha256 -binary", public)).decode()
        certificate = openssl("x509 -in cert -outform der")
        assert hostenroll.read_certificate(certificate).pin == f"sha256//{pin}"
        assert (b"\xa0\x03\x02\x01" in certificate[:20]) is bool(extensions)


# 5. Store


def call(name, /, id=-1, by=OPERATOR, **values):
    """An operation as a call for a tick."""
    number = hostenroll.parse_id(id) if isinstance(id, str) else id
    return Call(OPERATION[name], by, number, values, Origin(ADDRESS))


def own_call(run, writes=True, durable=True):
    """A call of the server itself, of a function of the time."""
    return Call(hostenroll.InternalRule(lambda registry, call, now: run(now), writes, durable))


WRITE = own_call(lambda now: "written")
QUICK_WRITE = own_call(lambda now: "alive", durable=False)
READ = own_call(lambda now: "read", writes=False, durable=False)
LOCKS = (".gate", ".lock")
FULL = sqlite3.OperationalError("database or disk is full")
PASSIVE = "PRAGMA wal_checkpoint(PASSIVE)"


def number_of(token):
    """The id of a token, as an integer."""
    return int(token.split("_")[1], 16)


def fill(world, count):
    """Hosts by SQL, copies of one that enrolled: the n-th has the id n << 8."""
    host = int(world.join("web.lan", name="web")[0], 16)
    for name, key in (("host", "id"), ("heartbeat", "host_id")):
        columns = [column for _, column, *_ in world.sql(f"PRAGMA table_info({name})")]
        rest = ", ".join(column for column in columns if column != key)
        world.sql(
            "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < ?) INSERT "
            f"INTO {name} ({key}, {rest}) SELECT x << 8, {rest} FROM n, {name} WHERE {key} = ?",
            count,
            host,
        )
    world.delete(f"{host:016x}")


def beat_all(world, numbers):
    """One tick of plain heartbeats of hosts that fill() made."""
    reference = hostenroll.CredentialRef(1, "default", world.registry.keys.keyring.first.kid)
    return world.run(*(hostenroll.Heartbeat(n << 8, reference, Origin(ADDRESS)) for n in numbers))


def checkpoints_of(world):
    return world.registry.engine._checkpoints


def turn(world, numbers=()):
    """A second later a tick, of these hosts' heartbeats or of a new token, and its checkpoint."""
    world.advance(1)
    if numbers:
        assert beat_all(world, numbers) == [world.clock.ms] * len(numbers)
    else:
        world.token()
    world.registry.after_tick()


def raising(error):
    """A function that fails, whatever it is given."""

    def fail(*_, **__):
        raise error

    return fail


def are_unavailable(outcomes, count=1):
    """Whether so many works are answered with 503, all of them."""
    return [type(outcome) for outcome in outcomes] == [hostenroll.StorageUnavailable] * count


def test_every_file_is_for_its_owner_alone_whatever_the_umask(paths, clock, tmp_path):
    before = os.umask(0)
    try:
        with World(paths, clock) as world:
            world.token()
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    finally:
        os.umask(before)
    ends = ("db", "db-wal", "db-shm", "db.gate", "db.lock", "key")
    assert modes == {f"hostenroll.{end}": 0o600 for end in ends}


@pytest.mark.parametrize("prepare, opens", table({
    "of root": (lambda path, victim: path.touch(0o600), True),
    "of the folder's owner": (lambda path, victim: make(path), True),
    "of a stranger": (lambda path, victim: make(path, STRANGER), False),
    "of another name": (lambda path, victim: os.link(victim, path), False),
}))  # fmt: skip
@needs_root
def test_a_database_is_made_in_no_file_that_a_stranger_prepared(
    prepare, opens, paths, clock, tmp_path
):
    """An empty file is taken for no database: its owner would have had it open before."""
    victim = tmp_path / "victim"
    victim.touch(0o600)
    os.chown(tmp_path, SERVICE, SERVICE)
    tmp_path.chmod(0o1777)
    prepare(Path(paths[0]), victim)
    if opens:
        open_registry(*paths, clock.ms).close()
    else:
        with pytest.raises(hostenroll.OperatorError, match="is a link, a second name, or another"):
            open_registry(*paths, clock.ms)
    assert victim.stat().st_size == 0
    assert [os.path.exists(paths[1]), os.stat(paths[0]).st_size > 0] == [opens] * 2


def hot_journal(database, victim):
    """A rollback journal that SQLite plays back, and that has it delete another file."""
    page, magic, name = hostenroll.PAGE_SIZE, bytes.fromhex("d9d505f920a163d7"), os.fsencode(victim)
    head = magic + struct.pack(">5I", 0, 1234, os.path.getsize(database) // page, 512, page)
    ends = struct.pack(">I", 0x40000000 // page + 1), struct.pack(">2I", len(name), sum(name))
    return head.ljust(512, b"\0") + ends[0] + name + ends[1] + magic


@pytest.mark.parametrize("as_it_is", [False, True], ids=["to write", "to examine"])
@pytest.mark.parametrize("suffix, owner, opens", [
    # beside a database of the service: a file, its owner, and whether root opens it
    *(("-journal", owner, False) for owner in (0, SERVICE)),
    *((suffix, owner, owner == SERVICE) for suffix in ("-wal", "-shm") for owner in (0, SERVICE)),
    *((suffix, 54321, False) for suffix in ("-wal", "-shm", "-journal")),
    *((suffix, "a second name", False) for suffix in ("-wal", "-shm")),
])  # fmt: skip
@pytest.mark.skipif(os.geteuid() != 0, reason="only root works in the folders of others")
def test_root_has_sqlite_open_no_file_that_it_cannot_have_made(
    suffix, owner, opens, as_it_is, paths, clock, tmp_path
):
    """It would give it to the owner of the database, or delete what a journal names."""
    open_registry(*paths, clock.ms).close()
    for name in (tmp_path, *tmp_path.iterdir()):
        os.chown(name, SERVICE, SERVICE)
    victim, path = tmp_path / "victim", Path(paths[0] + suffix)
    victim.write_text("of root")
    Path(paths[0] + "-wal").touch()
    os.chown(paths[0] + "-wal", SERVICE, SERVICE)
    path.write_bytes(hot_journal(paths[0], victim) if suffix == "-journal" else b"")
    if owner == "a second name":
        os.link(path, tmp_path / owner)
    else:
        os.chown(path, owner, owner)
    before = path.stat()
    engine = hostenroll.Engine(paths[0])
    engine.lock.acquire(0)
    try:
        if opens:
            assert engine.open(as_it_is=as_it_is)
        else:
            with pytest.raises(hostenroll.OperatorError, match=f"{re.escape(str(path))} is a link"):
                engine.open(as_it_is=as_it_is)
            assert path.stat()[:7] == before[:7]
    finally:
        engine.close()
    assert victim.exists() and victim.stat().st_uid == 0


def test_a_journal_of_our_own_is_used_up(paths, clock, tmp_path):
    """As a first start leaves it that was killed; a victim shows that SQLite plays it back."""
    open_registry(*paths, clock.ms).close()
    (tmp_path / "victim").write_text("not empty")
    Path(paths[0] + "-journal").write_bytes(hot_journal(paths[0], tmp_path / "victim"))
    open_registry(*paths, clock.ms).close()
    assert not os.path.exists(paths[0] + "-journal") and not (tmp_path / "victim").exists()


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal", *LOCKS])
def test_no_database_is_made_beside_a_file_that_is_refused(suffix, paths, clock):
    os.symlink("elsewhere", paths[0] + suffix)
    with pytest.raises(hostenroll.OperatorError, match=rf"{suffix} is a link"):
        open_registry(*paths, clock.ms)
    assert not any(map(os.path.exists, paths))


def test_the_database_shows_what_it_is_and_has_the_schema_of_the_module(world):
    expected = {
        "journal_mode": "wal", "application_id": hostenroll.APPLICATION_ID, "foreign_keys": 1,
        "user_version": hostenroll.SCHEMA_VERSION, "page_size": hostenroll.PAGE_SIZE,
        "wal_autocheckpoint": 0,
    }  # fmt: skip
    assert {name: world.sql(f"PRAGMA {name}")[0][0] for name in expected} == expected
    statement = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name"
    with contextlib.closing(sqlite3.connect(":memory:")) as reference:
        reference.executescript(hostenroll.SCHEMA)
        assert world.sql(statement) == reference.execute(statement).fetchall()


# The lock between processes.


def test_a_waiter_at_the_gate_goes_next_unless_it_stops_waiting(tmp_path):
    """With one lock alone, a busy server that takes it again at once would starve all others."""

    def tried(*locks):
        return [lock.try_acquire() for lock in locks]

    busy, waiter, late = locks = [hostenroll.WriteLock(str(tmp_path / "db")) for _ in range(3)]
    assert tried(busy, waiter, late) == [True, False, False]
    busy.release()
    assert tried(busy, late, waiter, late) == [False, False, True, False]  # at the gate now
    waiter.release()
    assert tried(busy, late) == [False, True]
    with pytest.raises(hostenroll.StoreBusy):
        busy.acquire(0.02)
    late.release()
    assert tried(waiter) == [True]
    for lock in locks:
        lock.close()


def test_a_database_behind_a_link_has_one_lock(world, paths, clock):
    """SQLite resolves the link for its WAL; a lock by another name would exclude no process."""
    link = f"{paths[0]}.link"
    os.symlink(paths[0], link)
    with opened((link, paths[1]), clock) as behind:
        assert world.registry.engine.lock.try_acquire()
        assert behind.run([WRITE], clock.ms) is None
        world.registry.engine.lock.release()
        assert behind.run([WRITE], clock.ms) == ["written"]


# Files that are removed or replaced under a running process.


def forked(run):
    """Run it in a process of its own, which ends as main() ends it: nothing is closed. Its id."""
    with warnings.catch_warnings():  # a thread of an earlier test may not quite have ended
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(1)
    return child


class Forked:
    """A World in a process of its own, while none in this process has the database open."""

    def __init__(self, paths, clock):
        ours, theirs = socket.socketpair()
        self.child = forked(partial(self._serve, paths, clock, ours, theirs))
        theirs.close()
        self._socket, self._stream = ours, ours.makefile("rw")
        assert self._stream.readline() == "null\n"  # it is open

    @staticmethod
    def _serve(paths, clock, ours, theirs):
        ours.close()
        world, stream, answer = World(paths, clock), theirs.makefile("rw"), None
        while True:
            print(json.dumps(answer), file=stream, flush=True)
            name, *arguments = json.loads(stream.readline())
            try:
                answer = getattr(world, name)(*arguments)
            except hostenroll.Unrecoverable as error:
                answer = {"ended": str(error)}

    def do(self, name, *arguments):
        """A method of the World, and its value; {"ended": why} where it ends the process."""
        print(json.dumps([name, *arguments]), file=self._stream, flush=True)
        answer = json.loads(self._stream.readline())
        if isinstance(answer, dict):
            self.kill()
        return answer

    def beat(self, credential):
        """The status of a heartbeat, or why it ends the process."""
        answer = self.do("beat", credential)
        return answer[0] if isinstance(answer, list) else answer["ended"]

    def kill(self):
        """kill -9."""
        os.kill(self.child, signal.SIGKILL)
        os.waitid(os.P_PID, self.child, os.WEXITED | os.WNOWAIT)

    def close(self):
        self.kill()
        os.waitpid(self.child, 0)
        self._stream.close()
        self._socket.close()


@pytest.fixture
def fork(paths, clock):
    """A function that starts a process on the database; all of them are ended after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda at=paths: stack.enter_context(contextlib.closing(Forked(at, clock)))


@pytest.fixture
def swap(paths, clock, tmp_path):
    """A function that moves a file of the database away, and may put a copy in its place."""
    with World(paths, clock) as world:
        world.token(description="in the backup")
    shutil.copy(paths[0], tmp_path / "backup.db")
    (tmp_path / "empty").touch()

    def swap(suffix="", by=None):
        os.rename(paths[0] + suffix, tmp_path / "old.db")
        if by is not None:
            shutil.copy(tmp_path / by, paths[0] + suffix)

    return swap


@pytest.mark.parametrize("how", ["beat", "mint", "host", "housekeeping"])
@pytest.mark.parametrize("suffix, by, words", sample({
    # which file, what is in its place then, and what the line says
    "database removed": ("", None, "removed"),
    "replaced by a backup": ("", "backup.db", "replaced"),
    "replaced by an empty file": ("", "empty", "replaced"),
    "WAL removed": ("-wal", None, "-wal has been removed"),
    "WAL replaced": ("-wal", "old.db", "-wal has been replaced"),
    "lock removed": (".lock", None, "the lock beside"),
    "gate removed": (".gate", None, "the lock beside"),
    "lock replaced": (".lock", "empty", "the lock beside"),
}, "replaced by a backup", "WAL removed", "lock replaced", "gate removed"))  # fmt: skip
def test_a_file_that_is_removed_or_replaced_ends_the_process_and_loses_nothing(
    suffix, by, words, how, swap, paths, clock, tmp_path, fork
):
    """It never answers 410, which would send the whole fleet to enroll again."""
    process = fork()
    host, credential = process.do("join")
    process.do("mint")
    process.do("advance", 5)
    assert process.beat(credential) == 200
    swap(suffix, by)
    arguments = {"beat": [credential], "host": [host]}.get(how, [])
    if suffix in LOCKS and arguments:  # these do not need it
        assert process.do(how, *arguments)[0] == 200
        how, arguments = "mint", []
    line = process.do(how, *arguments)["ended"]
    assert words in line and paths[0] in line and line.endswith("start again") and "\n" not in line
    if not suffix:
        assert not os.path.exists(paths[0] + "-wal") and not os.path.exists(paths[0] + "-shm")
        if by == "backup.db":
            assert sql(paths[0], "SELECT count(*) FROM host") == [(0,)]
            assert sql(paths[0], "PRAGMA integrity_check") == [("ok",)]
        else:  # never an empty database that does not know the fleet
            with pytest.raises(hostenroll.OperatorError, match="no database"):
                open_registry(*paths, clock.ms)
        os.replace(tmp_path / "old.db", paths[0])
    with World(paths, clock) as world:
        assert world.sql("PRAGMA integrity_check") == [("ok",)]
        assert world.sql("SELECT count(*) FROM token") == [(3,)]
        assert world.sql("SELECT last_seen FROM heartbeat") == [(clock.ms + 5000,)]
        clock.advance(5)
        assert world.beat(credential).status == 200


def test_a_folder_that_is_moved_away_is_whole_where_it_is(paths, clock, tmp_path, fork):
    """With an emptied one in its place, or a file system that is unmounted."""
    folder = tmp_path / "data"
    folder.mkdir()
    process = fork((str(folder / "x.db"), paths[1]))
    _, credential = process.do("join")
    folder.rename(tmp_path / "away")
    folder.mkdir()
    assert "the lock beside" in process.beat(credential) and os.listdir(folder) == []
    with World((str(tmp_path / "away" / "x.db"), paths[1]), clock) as world:
        assert world.beat(credential).status == 200


def test_other_processes_on_an_old_database_leave_the_new_one_alone(swap, paths, tmp_path, fork):
    """What the first one has left, and the next start has begun, is no concern of the second."""
    first, second = fork(), fork()
    _, credential = first.do("join")
    assert second.beat(credential) == 200
    swap(by="backup.db")
    assert "replaced" in first.beat(credential)
    new = fork()
    _, fresh = new.do("join", "new")
    assert "replaced" in second.beat(credential)
    assert new.beat(fresh) == 200
    new.kill()
    for path, name in ((paths[0], "new"), (str(tmp_path / "old.db"), "web-1")):
        assert sql(path, "SELECT name FROM host") == [(name,)]
        assert sql(path, "PRAGMA integrity_check") == [("ok",)]


def test_two_processes_whose_wal_is_removed_lose_nothing_of_either(paths, clock, fork):
    first, second = fork(), fork()
    _, one = first.do("join", "one")
    _, other = second.do("join", "other")
    os.unlink(paths[0] + "-wal")
    assert "-wal has been removed" in first.beat(one)
    third = fork()
    assert "-wal has been replaced" in second.beat(other)
    assert third.beat(one) == third.beat(other) == 200


@pytest.mark.parametrize("checkpoints", [0, 1, 20])
@pytest.mark.parametrize("make", sample({  # what takes the place of a WAL
    "an empty file": lambda wal, older: Path(wal).touch(),
    "a text": lambda wal, older: Path(wal).write_text("a text" * 9999),
    "a copy of it": lambda wal, older: shutil.copy(f"{wal}.away", wal),
    "an older copy of it": lambda wal, older: shutil.copy(older, wal),
    "a folder": lambda wal, older: os.mkdir(wal),
    "a link": lambda wal, older: os.symlink("elsewhere", wal),
}, "an older copy of it", "a folder", "a link"))  # fmt: skip
@needs_proc
def test_a_wal_that_was_replaced_is_saved_and_the_other_not_mixed_in(
    make, checkpoints, paths, clock, fork, tmp_path, monkeypatch
):
    """Whether it goes on from its start, or has been begun again."""
    checkpoint = lambda world: world.registry.engine.checkpoint(True)  # noqa: E731
    monkeypatch.setattr(World, "checkpoint", checkpoint, raising=False)
    process, wal, older = fork(), paths[0] + "-wal", str(tmp_path / "older")
    host, credential = process.do("join")
    for _ in range(checkpoints):
        process.do("checkpoint")
        process.do("mint")
    shutil.copy(wal, older)
    process.do("revoke", host)
    process.do("mint")
    os.rename(wal, f"{wal}.away")
    make(wal, older)
    assert process.do("mint")["ended"] == (
        f"{wal} has been replaced, its changes are saved, and the new one is {wal}.replaced now: "
        "start again"
    )
    assert not os.path.lexists(wal) and not os.path.exists(paths[0] + "-shm")
    assert os.path.lexists(f"{wal}.replaced") and os.path.getsize(f"{wal}.away") == 0
    with World(paths, clock) as world:
        assert world.sql("PRAGMA integrity_check") == [("ok",)]
        assert world.sql("SELECT count(*) FROM token") == [(2 + checkpoints,)]
        assert world.beat(credential).status == 403


@pytest.mark.parametrize("rest", [False, True], ids=["a copy", "and a torn rest"])
@needs_proc
def test_a_wal_that_another_process_has_begun_with_is_left_to_it(rest, paths, clock, fork):
    """A copy, by the same index: what that process wrote is not in the old one."""
    process, wal = fork(), paths[0] + "-wal"
    _, credential = process.do("join")
    shutil.copy(wal, f"{wal}.copy")
    size = os.path.getsize(wal)
    os.rename(wal, f"{wal}.old")
    os.rename(f"{wal}.copy", wal)
    other = fork()
    other.do("mint")
    if rest:  # the same but for the last checksum
        octets = bytearray(Path(wal).read_bytes())
        octets[-hostenroll.PAGE_SIZE - 1] ^= 1
        with open(f"{wal}.old", "r+b") as file:
            file.seek(size)
            file.write(octets[size:])
    assert "-wal has been replaced, and what was written last may be" in process.beat(credential)
    assert other.beat(credential) == 200
    other.kill()
    with World(paths, clock) as world:
        assert world.sql("PRAGMA integrity_check") == [("ok",)]
        assert world.sql("SELECT count(*) FROM token") == [(2,)]
    assert not os.path.exists(f"{wal}.replaced")


@pytest.mark.parametrize("why", ["no /proc", "another index", "no index"])
def test_a_wal_that_may_be_of_another_process_is_left_alone(why, world, paths, monkeypatch):
    world.join()
    Path(paths[0] + "-new").write_bytes(b"of another")
    os.replace(paths[0] + "-new", paths[0] + "-wal")
    if why == "no /proc":
        monkeypatch.setattr(hostenroll, "descriptors_of", lambda file: [])
    else:
        os.unlink(paths[0] + "-shm")
        if why == "another index":
            Path(paths[0] + "-shm").write_bytes(bytes(32768))
    before = os.path.getsize(paths[0])
    with pytest.raises(hostenroll.Unrecoverable, match="-wal has been replaced, and what was"):
        world.run(WRITE)
    assert Path(paths[0] + "-wal").read_bytes() == b"of another"
    assert os.path.getsize(paths[0]) == before


@needs_proc
def test_a_foreign_wal_that_cannot_be_taken_out_of_the_way_is_waited_for(world, paths, monkeypatch):
    world.join()
    Path(paths[0] + "-new").touch()
    os.replace(paths[0] + "-new", paths[0] + "-wal")
    os.mkdir(paths[0] + "-wal.replaced")
    with monkeypatch.context() as patch:  # and while the disk cannot be read
        patch.setattr(os, "pread", raising(OSError(errno.EIO, "Input/output error")))
        assert are_unavailable(world.run(WRITE))
        assert "output error" in world.registry.storage_trouble
    for _ in range(2):
        assert are_unavailable(world.run(WRITE)) and is_free(paths)
        assert "-wal has been replaced, and its last" in world.registry.storage_trouble
    os.rmdir(paths[0] + "-wal.replaced")
    with pytest.raises(hostenroll.Unrecoverable, match="its changes are saved"):
        world.run(WRITE)


def test_an_old_database_is_not_left_while_others_read_it(swap, paths, tmp_path, fork):
    """What they have not seen yet cannot be moved out of the WAL, which is to go."""
    process, hosts = fork(), "SELECT count(*) FROM host"
    with contextlib.closing(sqlite3.connect(paths[0], isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute(hosts).fetchall() == [(0,)]
        _, credential = process.do("join")
        swap(by="backup.db")
        assert [process.beat(credential) for _ in range(2)] == [503, 503]
        assert os.path.getsize(f"{paths[0]}-wal") > 0
        reader.execute("COMMIT")
        assert "replaced" in process.beat(credential)
    assert sql(paths[0], hosts) == [(0,)] and sql(str(tmp_path / "old.db"), hosts) == [(1,)]


@pytest.mark.parametrize("suffix, by", [("", "empty"), ("-wal", None)], ids=["database", "WAL"])
def test_a_process_does_not_end_before_the_last_changes_are_saved(suffix, by, swap, world, paths):
    """On a full disk they are in the WAL alone, which has no name any more."""
    world.join()
    swap(suffix, by)
    for _ in range(2):
        with faulty(world.registry, only="PRAGMA wal_checkpoint(TRUNCATE)", error=FULL) as faults:
            assert are_unavailable(world.run(WRITE)) and faults.failed
        assert "cannot be saved" in world.registry.storage_trouble and is_free(paths)
    with pytest.raises(hostenroll.Unrecoverable):
        world.run(WRITE)


def test_what_lies_in_the_way_of_the_end_is_waited_for(world, paths, monkeypatch):
    """The WAL must not stay beside another database; and a part of it may be on its way."""
    monkeypatch.setattr(hostenroll, "CHECKPOINT_AFTER", 0)
    assert world.run(WRITE) == ["written"] and checkpoints_of(world)._snapshot_at is not None
    os.unlink(paths[0] + "-wal")
    os.unlink(paths[0] + "-shm")
    os.mkdir(paths[0] + "-shm")
    for _ in range(2):
        assert are_unavailable(world.run(WRITE))
        assert "-shm: " in world.registry.storage_trouble
    os.rmdir(paths[0] + "-shm")
    with pytest.raises(hostenroll.Unrecoverable, match="-wal has been removed"):
        world.run(WRITE)


def test_a_database_that_was_gone_for_a_moment_is_worked_with_again(world, paths, monkeypatch):
    """As if it had been renamed back between two looks: then nothing must be moved or removed."""
    world.join()
    lock, away = world.registry.engine.lock, paths[0] + ".away"
    acquire = lock.acquire
    os.rename(paths[0], away)
    monkeypatch.setattr(lock, "acquire", lambda wait: os.rename(away, paths[0]) or acquire(wait))
    assert are_unavailable(world.run(WRITE)) and is_free(paths)
    monkeypatch.undo()
    assert world.run(WRITE) == ["written"] and os.path.getsize(paths[0] + "-wal") > 0


def test_a_registry_is_not_closed_over_another_database(swap, world, paths):
    """SQLite would unlink the WAL that is at the path by then."""
    world.join()
    os.unlink(paths[0] + "-wal")
    swap()
    with contextlib.closing(sqlite3.connect(paths[0], isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("CREATE TABLE x (y)")
        with pytest.raises(hostenroll.Unrecoverable, match="replaced"):
            world.registry.close()
        assert os.path.getsize(paths[0] + "-wal") > 0 and is_free(paths)
        assert other.execute("SELECT count(*) FROM x").fetchall() == [(0,)]


def test_after_its_end_a_registry_is_closed_without_a_word(world, paths):
    world.join()
    before = os.path.getsize(paths[0])
    os.unlink(paths[0] + ".lock")
    with pytest.raises(hostenroll.Unrecoverable):
        world.act("mint-token")
    for _ in range(2):
        world.registry.close()
    assert os.path.getsize(paths[0]) == before and os.path.getsize(paths[0] + "-wal") > 0


def test_a_wal_that_was_removed_is_missed_by_the_next_start(paths, clock, fork):
    """It holds what was acknowledged last. A server that runs saves that when it ends."""
    open_registry(*paths, clock.ms).close()
    process = fork()
    _, credential = process.do("join")

    def remove():
        os.unlink(paths[0] + "-wal")
        for _ in range(2):
            with pytest.raises(hostenroll.StoreError, match=r"-wal has been removed.*-shm"):
                open_registry(*paths, clock.ms)

    remove()
    assert "-wal has been removed" in process.beat(credential)
    process = fork()
    assert process.beat(credential) == 200
    process.kill()
    remove()
    os.unlink(paths[0] + "-shm")
    open_registry(*paths, clock.ms).close()


@pytest.mark.parametrize("knows", [True, False], ids=["at the next housekeeping", "at once"])
def test_a_schema_that_a_newer_program_has_made_ends_the_process(knows, world):
    """At once where our statements fail; no heartbeat is answered with 503 for good."""
    beat = world.heartbeat(world.join()[1])
    world.sql(f"PRAGMA user_version = {hostenroll.SCHEMA_VERSION + 1}")
    if knows:
        assert world.run(beat) == [world.clock.ms]
    else:
        world.sql("ALTER TABLE heartbeat RENAME COLUMN state TO was_state")
    with pytest.raises(hostenroll.Unrecoverable, match=r"has schema \d+ now"):
        world.housekeeping() if knows else world.run(beat)


@pytest.mark.parametrize("how", [os.symlink, os.link])
def test_a_copy_never_goes_into_a_file_that_took_the_place_of_ours(how, world, tmp_path):
    """Nor into the database that is copied."""
    victim, engine = tmp_path / "victim", world.registry.engine
    victim.touch()
    before = contents(world.paths[0])
    for other in (victim, world.paths[0]):
        engine.begin(False, False)
        with pytest.raises(hostenroll.StoreError, match="replaced"):
            with hostenroll.replacing(str(tmp_path / "copy")) as copy:
                os.unlink(copy.name)
                how(other, copy.name)
                engine.copy_to(copy, lambda done, total: None)
        engine.rollback()
    assert victim.read_bytes() == b"" and contents(world.paths[0]) == before
    assert not list(tmp_path.glob("copy*")) and world.join()


def test_no_journal_beside_a_copy_is_played_back(world, tmp_path):
    victim, engine = tmp_path / "victim", world.registry.engine
    victim.touch()
    engine.begin(False, False)
    with hostenroll.replacing(str(tmp_path / "copy")) as copy:
        Path(f"{copy.name}-journal").write_bytes(hot_journal(world.paths[0], victim))
        engine.copy_to(copy, lambda done, total: None)
    engine.rollback()
    assert victim.exists() and contents(str(tmp_path / "copy")) == contents(world.paths[0])


def test_a_link_that_is_swapped_between_two_looks_is_not_followed(tmp_path):
    """The owner of the folder may do that at any time."""
    victim, link = tmp_path / "victim", tmp_path / "x.db"
    victim.touch()
    link.symlink_to(victim)

    def swap():
        was_link = link.is_symlink()
        link.unlink()
        link.touch() if was_link else link.symlink_to(victim)

    for error in (hostenroll.StoreError, hostenroll.Unrecoverable):
        engine = hostenroll.Engine(str(link))
        engine.lock.acquire(5)
        connect = engine.connect
        engine.connect = lambda *where, connect=connect: swap() or connect(*where)
        if link.is_symlink():
            swap()
        with pytest.raises(error, match="replaced while it was opened"):
            engine.open()
        engine.close()
    engine._connection.close()
    assert link.is_symlink() and victim.read_bytes() == b""


def test_a_database_that_changes_while_it_is_examined_is_not_judged(paths, clock, tmp_path):
    open_registry(*paths, clock.ms).close()
    folder = tmp_path / "copy"
    folder.mkdir()
    copy = str(shutil.copy(paths[0], folder / "x.db"))
    engine = hostenroll.Engine(copy)
    assert engine.open(as_it_is=True) and engine.faults() == []
    assert os.listdir(folder) == ["x.db"]
    assert sql(copy, "INSERT INTO organization VALUES ('x', 1)") == []
    (fault,) = engine.faults()
    assert "changed while it was examined" in fault and os.listdir(folder) == ["x.db"]
    for change in (lambda: None, lambda: os.unlink(copy)):
        change()
        with pytest.raises(hostenroll.StoreError, match="changed while"):
            engine.begin(False, False)
    engine.close()


@pytest.mark.parametrize("kept", [(), ("-wal",), ("-wal", "-shm")], ids=lambda kept: "".join(kept))
def test_an_examination_of_copied_files_leaves_them_as_they_are(kept, paths, tmp_path, fork):
    """Also of a database whose server was killed: what is in the WAL is examined, and stays."""
    fork().do("join")
    copies = [str(tmp_path / f"x.db{suffix}") for suffix in ("", *kept)]
    for suffix, copy in zip(("", *kept), copies):
        shutil.copy(paths[0] + suffix, copy)
    before = bytes_by_path(copies[:2])  # a reader writes into the -shm
    engine = hostenroll.Engine(copies[0])
    assert engine.open(as_it_is=True) == bool(kept)  # else all of it was in the WAL
    assert engine.faults() == [] and engine.version() == bool(kept) * hostenroll.SCHEMA_VERSION
    engine.close()
    assert bytes_by_path(copies[:2]) == before
    assert sorted(map(str, tmp_path.glob("x.db*"))) == sorted(copies)


# Checkpoints.


@pytest.mark.parametrize("beats, works, level", table({
    # whether a heartbeat is in the tick, what else, and the level
    "plain heartbeats": (True, [], 1),
    "plain heartbeats and reads": (True, [READ], 1),
    "a sign of life": (False, [QUICK_WRITE], 1),
    "anything else that may write": (False, [WRITE], 2),
    "heartbeats with anything else": (True, [READ, WRITE], 2),
}))  # fmt: skip
def test_what_is_acknowledged_is_on_the_disk_but_for_plain_heartbeats(beats, works, level, world):
    beat = world.heartbeat(world.joined()[1])
    for before in ("NORMAL", "FULL"):
        world.sql(f"PRAGMA synchronous = {before}")
        world.registry.engine._synchronous = before
        world.run(*[beat] * beats, *works)
        assert world.sql("PRAGMA synchronous") == [(level,)]


def seen_without_the_wal(paths, folder):
    """last_seen by host, as far as it has been moved into the database."""
    # Not by this process: to close a descriptor of the database would drop its locks.
    subprocess.run(["cp", paths[0], str(folder / "moved.db")], check=True)
    header = bytearray((folder / "moved.db").read_bytes())
    header[18:20] = b"\1\1"  # not in WAL mode, or SQLite would look for one
    (folder / "moved.db").write_bytes(header)
    return dict(sql(str(folder / "moved.db"), "SELECT host_id, last_seen FROM heartbeat"))


def checkpoint_after(monkeypatch, rows, rest=5, at_once=None):
    monkeypatch.setattr(hostenroll, "CHECKPOINT_AFTER", rows)
    monkeypatch.setattr(hostenroll, "CHECKPOINT_AT_ONCE", at_once or 2 * rows)
    monkeypatch.setattr(hostenroll, "CHECKPOINT_REST", rest)


def test_a_checkpoint_moves_all_but_the_last_then_the_rest(world, paths, tmp_path, monkeypatch):
    """SQLite waits for the disk only when it has moved all: that has to be little."""
    checkpoint_after(monkeypatch, 50, at_once=150)
    fill(world, 3000)
    beat_all(world, range(1, 3001))
    world.registry.engine.checkpoint(is_forced=True)
    begin = world.clock.ms

    def beaten(*numbers):
        turn(world, numbers)
        until(lambda: not checkpoints_of(world)._is_flushing())
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
    assert os.stat(paths[0] + "-wal").st_size == size  # it was begun again


@pytest.mark.parametrize("missing", ["thread", "connection", "descriptor"])
def test_a_checkpoint_is_done_without(missing, world, paths, tmp_path, caplog, monkeypatch):
    fill(world, 10)
    checkpoint_after(monkeypatch, 20)
    place, name, replacement = {
        "thread": (threading.Thread, "start", raising(RuntimeError("can't start new thread"))),
        "connection": (world.registry.engine, "connect", raising(hostenroll.StoreError("no"))),
        "descriptor": (world.registry.engine, "descriptor", -1),
    }[missing]
    monkeypatch.setattr(place, name, replacement)
    before = len(os.listdir("/proc/self/fd"))
    for n in range(100):
        turn(world, [n % 10 + 1])
    assert len(os.listdir("/proc/self/fd")) <= before + 3 and "checkpoint" not in caplog.text
    oldest = min(seen_without_the_wal(paths, tmp_path).values())
    assert world.clock.ms - 60_000 < oldest and os.stat(paths[0] + "-wal").st_size < 100_000


@pytest.mark.parametrize("statement", ["BEGIN", "SELECT 1 FROM sqlite_master", "COMMIT"])
def test_a_reader_that_fails_is_done_without(statement, world, paths, monkeypatch):
    monkeypatch.setattr(hostenroll, "CHECKPOINT_AFTER", 1)
    checkpoints = checkpoints_of(world)
    while checkpoints._reader is None:
        turn(world)
    checkpoints._reader = Faulty(checkpoints._reader, only=statement, error=failure(5))
    for _ in range(30):
        turn(world)
        assert checkpoints._snapshot_at is None and is_free(paths)
        assert not getattr(checkpoints._reader, "in_transaction", False)


def test_a_database_replaced_before_the_reader_opens_it_is_noticed(swap, world, monkeypatch):
    world.token()
    monkeypatch.setattr(hostenroll, "CHECKPOINT_AFTER", 1)
    engine, connect = world.registry.engine, world.registry.engine.connect
    monkeypatch.setattr(engine, "connect", lambda *where: swap(by="empty") or connect(*where))
    with pytest.raises(hostenroll.Unrecoverable, match="replaced"):
        world.token()


@pytest.mark.parametrize("error", [failure(1034), sqlite3.OperationalError("disk I/O error")])
@pytest.mark.parametrize("statement", ["COMMIT", PASSIVE])
def test_a_sync_that_fails_ends_the_process(statement, error, world, paths):
    """The next one might succeed without the pages that the system has dropped."""
    world.token()
    with faulty(world.registry, only=statement, error=error):
        with pytest.raises(hostenroll.Unrecoverable, match="not taken what was written"):
            world.run(WRITE)
            world.registry.engine.checkpoint(is_forced=True)
    assert os.path.getsize(paths[0] + "-wal") > 0


@pytest.mark.parametrize("end, most", table({
    # what is done then, and how many statements it may run
    "work goes on": (
        lambda world: [checkpoints_of(world)._flush.join(), *(turn(world) for _ in range(40))],
        999),
    "a whole checkpoint": (lambda world: world.registry.engine.checkpoint(is_forced=True), 0),
    "it is closed": (lambda world: world.registry.close(), 0),
}))  # fmt: skip
def test_pages_lost_by_a_flush_end_the_process_before_their_wal_goes(end, most, world, monkeypatch):
    """SQLite would not move the pages of a part again: the next process does, all of them. A whole
    checkpoint waits for the flush: a system reports a failure to one of two syncs."""
    checkpoint_after(monkeypatch, 20, rest=1)
    may_end, fail = threading.Event(), raising(OSError(5, "Input/output error"))
    monkeypatch.setattr(os, "fdatasync", lambda file: may_end.wait(10) and fail())
    while checkpoints_of(world)._flush is None:
        turn(world)
    threading.Timer(0.05, may_end.set).start()
    with faulty(world.registry) as connection:
        with pytest.raises(hostenroll.Unrecoverable, match=r"what was written: start again$"):
            end(world)
        assert connection.count <= most
    world.registry.close()
    assert world.registry.engine._connection is not None


def test_the_first_checkpoint_moves_all_that_an_earlier_process_left(paths, clock, tmp_path, fork):
    """A part of it may not be on the disk, though a sync of it was reported as done."""
    process = fork()
    _, credential = process.do("join")
    process.kill()
    with World(paths, clock) as world:
        assert world.beat(credential).status == 200
        with pytest.raises(sqlite3.DatabaseError):
            seen_without_the_wal(paths, tmp_path)
        world.registry.after_tick()
        assert list(seen_without_the_wal(paths, tmp_path).values()) == [clock.ms]
        with faulty(world.registry) as connection:
            world.registry.after_tick()
            assert connection.count == 0


@pytest.mark.parametrize("code", [13, 778], ids=["full", "a page that cannot be written"])
def test_a_part_that_cannot_be_moved_ends_nothing(code, world, monkeypatch):
    """What was moved before is on its way to the disk, and the WAL has the rest."""
    checkpoint_after(monkeypatch, 20, rest=1)
    checkpoints, failed = checkpoints_of(world), 0
    for _ in range(60):
        turn(world)
        if checkpoints._moved_at > checkpoints._checkpointed_at:
            with faulty(world.registry, only=PASSIVE, error=failure(code)) as connection:
                world.registry.engine.checkpoint(is_forced=True)
                failed += connection.failed
    assert failed > 1


def test_a_closed_database_leaves_no_descriptor_and_no_thread(paths, clock, monkeypatch):
    monkeypatch.setattr(hostenroll, "CHECKPOINT_AFTER", 1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with World(paths, clock) as world:
            while checkpoints_of(world)._reader is None or checkpoints_of(world)._flush is None:
                turn(world)
            flush = checkpoints_of(world)._flush
        assert not flush.is_alive()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("before", [1, 100], ids=["alone", "after batches of many"])
def test_the_wal_stays_bounded_under_a_run_of_beats(before, world, paths, monkeypatch):
    checkpoint_after(monkeypatch, 256, rest=64)
    fill(world, before)
    most = 3 * 256 * (hostenroll.PAGE_SIZE + 24)
    for count in [before] * 100 + [1] * 2500:
        turn(world, range(1, count + 1))
        assert os.stat(paths[0] + "-wal").st_size < most
    assert is_free(paths)


def test_a_checkpoint_needs_the_lock_that_others_know(world, paths, monkeypatch):
    """SQLite up to 3.51.2 can corrupt a database whose checkpoint meets another's write."""
    monkeypatch.setattr(hostenroll, "CHECKPOINT_AT_ONCE", 0)
    world.token()
    before = Path(paths[0]).stat().st_mtime_ns
    other = hostenroll.WriteLock(paths[0])
    assert other.try_acquire()
    with faulty(world.registry) as connection:
        world.registry.after_tick()
        assert connection.count == 0
        other.close()
        assert is_free(paths)  # not even the gate is kept
        world.registry.after_tick()
        assert connection.count == 1 and Path(paths[0]).stat().st_mtime_ns > before
        assert is_free(paths)
        os.unlink(paths[0] + ".lock")
        with pytest.raises(hostenroll.Unrecoverable):
            world.registry.after_tick()
        assert connection.count == 1


@pytest.mark.parametrize("error", [FULL, failure(10)], ids=str)
def test_a_failed_checkpoint_stops_nothing_and_is_logged_once(error, world, caplog, monkeypatch):
    checkpoint_after(monkeypatch, 5)
    tried = 0
    for _ in range(12):
        with faulty(world.registry, only=PASSIVE, error=error) as connection:
            turn(world)
            tried += connection.failed
    assert 1 < tried < 12 and caplog.text.count("cannot checkpoint") == 1


def test_a_wal_that_cannot_grow_is_moved_into_the_database(world, paths):
    """Else a disk that was full for a moment refuses heartbeats until an operator looks."""
    world.token()
    before = Path(paths[0]).stat().st_mtime_ns
    with faulty(world.registry, only="COMMIT", error=FULL):
        world.run(QUICK_WRITE)
    world.registry.after_tick()
    assert world.registry.storage_trouble and Path(paths[0]).stat().st_mtime_ns > before


def test_a_database_that_is_not_in_wal_mode_is_taken_as_it_is(paths, clock):
    """Such as what VACUUM INTO has made."""
    with World(paths, clock) as world:
        host, credential = world.join()
    assert sql(paths[0], "PRAGMA journal_mode = DELETE") == [("delete",)]
    with World(paths, clock) as world:
        world.token()
        assert world.beat(credential).status == 200
        assert world.host(host).document["status"] == "online"


# Transactions.


@pytest.mark.parametrize("writer", ["lock", "connection"])
def test_beside_another_writer_a_tick_asks_to_come_again(writer, world, clock, paths, monkeypatch):
    monkeypatch.setattr(hostenroll, "LOCK_PATIENCE", 0.02)
    beat = world.heartbeat(world.join()[1])
    lock = hostenroll.WriteLock(paths[0])
    foreign = sqlite3.connect(paths[0], isolation_level=None, timeout=0)
    assert lock.try_acquire() if writer == "lock" else foreign.execute("BEGIN IMMEDIATE")
    assert world.run(beat) is None
    monkeypatch.setattr(hostenroll, "CHECKPOINT_AFTER", 0)
    assert world.run(WRITE) is None
    assert checkpoints_of(world)._snapshot_at is None  # no snapshot is held for a part meanwhile
    assert world.run(READ) == ["read"]
    with pytest.raises(hostenroll.StorageUnavailable):
        world.act("mint-token")
    lock.close()
    foreign.close()
    assert world.run(beat) == [clock.ms] and len(world.sql("SELECT 1 FROM token")) == 1


STARTING = Call(hostenroll.START_SERVICE, values={"url": "http://here"})


def announce(world, key, pin=None, ends=1 << 60):
    """The server has a certificate of this key, which join commands pin unless another is given."""
    pin = key if pin is None else pin
    world.registry.service.announce(hostenroll.Certificate(key, ends), pin)


def test_a_new_pin_is_written_though_the_tick_that_wrote_it_has_died(world):
    announce(world, "old")
    world.run(STARTING)
    announce(world, "new")
    die = own_call(raising(hostenroll.StoreError("the disk is full")))
    assert are_unavailable(world.run(Call(hostenroll.HOUSEKEEPING), die), 2)
    for _ in range(2):
        world.housekeeping()
        assert world.sql("SELECT pin FROM service") == [("new",)]
    world.sql("UPDATE service SET pin = 'of another server'")  # which comes after ours
    world.housekeeping()
    assert world.sql("SELECT pin FROM service") == [("of another server",)]


def enrolling(world, key="", token=World.token, hostname="web-1"):
    row = world.registry.tokens.prove(token(world), hostname, Origin(ADDRESS), world.clock.ms)
    values = {"token": row, "hostname": hostname, "facts": fact_columns({}, "")}
    values.update({"idempotencyKey": key} if key else {})
    return call("enroll", by=hostenroll.SYSTEM, **values)


def replaying(world):
    again = enrolling(world, "k")
    world.run(again)
    world.advance(3600)  # until then it would change nothing
    return again


def beating(world, later, serial=1, **facts):
    """A durable heartbeat with facts, so many seconds after the enrollment."""
    claims = world.registry.keys.authenticate(world.join()[1], world.clock.ms)
    world.clock.advance(later)
    values = {"claims": claims._replace(serial=serial), "facts": fact_columns(facts)}
    beat = call("beat", by=hostenroll.SYSTEM, problem=None, **values)
    return beat._replace(operation=beat.operation._replace(durable=True))


def on_host(world, act, before=None, **values):
    """An act on a host, after another one."""
    host, _ = world.join()
    if before:
        getattr(world, before)(host)
    return call(act, host, **values)


def housekeeping(world):
    world.run(STARTING)
    world.token()
    announce(world, "pin")
    world.advance(61 * 86_400)
    return Call(hostenroll.HOUSEKEEPING)


FAILURES = {
    "before": {},
    "after": {"after": True},
    "full, and rolled back": {"error": failure(13), "rolls_back": True},
    "busy": {"error": failure(5)},
    "corrupt": {"error": failure(11, sqlite3.DatabaseError)},
}


@pytest.mark.parametrize("how", sample({name: name for name in FAILURES}, "before", "after"))
@pytest.mark.parametrize("prepare, action", table({
    # what it is: how to prepare it, the action that the audit log has of it ("": none)
    "mint": (lambda world: call("mint-token"), "mint"),
    "enroll": (enrolling, "enroll"),
    "enroll with a key": (partial(enrolling, key="k"), "enroll"),
    "replay": (replaying, "replay"),
    "re-enroll": (lambda world: enrolling(world, "k",
        lambda _: world.reenroll(world.join()[0]).document["token"], "new"), "re-enroll"),
    "beat with facts": (partial(beating, later=1, os="linux"), "edit"),
    "beat late": (partial(beating, later=-1, os="linux"), "edit"),
    "renewal": (partial(beating, later=80), "renew"),
    "revoke": (partial(on_host, act="revoke-host"), "revoke"),
    "delete": (partial(on_host, act="delete-host", before="reenroll"), "delete"),
    "supersede": (partial(beating, later=0, serial=2), "supersede"),
    "supersede by a plain heartbeat":
        (lambda world: world.heartbeat(world.joined()[1], serial=2), "supersede"),
    "restore": (partial(on_host, act="restore-host", before="revoke"), "restore"),
    "edit": (partial(on_host, act="edit-host", name="front", labels={"a": "1"}), "edit"),
    "revoke a token": (lambda world: call("revoke-token", number_of(world.token())), "revoke"),
    "start a service": (lambda world: STARTING, ""),
    "housekeeping": (housekeeping, ""),
    "add an organization": (lambda world: call("add-org", name="berlin"), "add"),
    "mint an API key": (lambda world: call("mint-api-key", role="admin"), "mint"),
    "revoke an API key":
        (lambda world: call("revoke-api-key", world.act("mint-api-key").key.id), "revoke"),
}))  # fmt: skip
def test_whichever_statement_fails_it_is_all_or_nothing(prepare, action, how, paths, clock):
    """Of an act and of its event in the audit log, and the answer is 503."""
    with World(paths, clock, credential_ttl=100) as world:
        work = prepare(world)
        before = world.snapshot()
        for n in range(1, 60):
            with faulty(world.registry, n=n, **FAILURES[how]) as connection:
                (outcome,) = world.run(work) or [world.registry.stop_waiting()]
            if not isinstance(outcome, hostenroll.StorageUnavailable):
                break
            assert connection.failed and is_free(paths)
            assert not world.registry.engine._connection.in_transaction
            assert world.snapshot() == before, n
        assert n > 3 and not connection.failed and not isinstance(outcome, Problem)
        after = world.snapshot()
        assert any(after[name] != before[name] for name in after if name != "audit")
        if action:
            assert after["audit"][:-1] == before["audit"] and after["audit"][-1][2] == action


@pytest.mark.parametrize(
    "only", ["BEGIN IMMEDIATE", "COMMIT", "SAVEPOINT act", "RELEASE act", "ROLLBACK"]
)
def test_without_memory_the_process_ends_and_the_tick_never_was(only, paths, clock):
    """Python raises SQLITE_NOMEM as MemoryError; and it may lack memory itself."""
    fails = own_call(raising(hostenroll.StoreError("and so the tick is rolled back")))
    world = World(paths, clock)
    before = world.snapshot()
    works = [call("add-org", name="x")] + [fails] * (only == "ROLLBACK")
    with faulty(world.registry, only=only, error=MemoryError()), pytest.raises(MemoryError):
        world.run(*works)
    world.registry.engine._connection.close()
    world.registry.engine.lock.close()
    with World(paths, clock) as world:
        assert world.snapshot() == before


def test_a_defect_in_a_tick_is_no_reason_to_try_again_at_once(world, clock, monkeypatch):
    """What has to be audited waits, but the server must not hurry because of it."""
    audit, tick = world.registry.audit, Call(hostenroll.HOUSEKEEPING)
    audit.refuse(hostenroll.ApiKeyInvalid(), Origin("::1"), clock.ms)
    assert audit.pending
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(audit, "write", raising(TypeError("a defect")))
        world.run(tick)
    assert "TypeError" in world.registry.storage_trouble
    world.run(tick)
    assert not world.registry.storage_trouble and world.audit("refuse") != []


def test_a_trouble_is_logged_once_and_so_is_its_end(world, caplog, monkeypatch):
    """Though reads succeed in between, and now and then a small tick that writes."""
    caplog.set_level(logging.INFO)
    readonly = sqlite3.OperationalError("attempt to write a readonly database")
    for _ in range(3):
        for error in (FULL, readonly):
            with faulty(world.registry, only="COMMIT", error=error) as connection:
                world.run(QUICK_WRITE)
                assert connection.failed and world.registry.storage_trouble
            assert world.run(READ) == ["read"] and world.registry.storage_trouble
        assert world.run(QUICK_WRITE) == ["alive"] and not world.registry.storage_trouble
    monkeypatch.setattr(hostenroll, "TROUBLE_OVER", -1)
    for _ in range(3):
        assert world.run(READ, QUICK_WRITE) == ["read", "alive"]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3 and "full" in lines[0] and "readonly" in lines[1]
    assert lines[2] == "storage: the database can be used again"


def test_a_tick_that_fails_is_undone_and_answers_nothing_not_even_a_read(world, clock, paths):
    """SQLITE_FULL rolls the whole transaction back by itself: the next statement would commit. And
    where a commit fails, a read may have seen rows that are gone. SQLITE_CORRUPT and SQLITE_NOTADB
    come as DatabaseError, not as OperationalError."""
    beat = world.heartbeat(world.join()[1])
    works = [beat, *(call("mint-token", description=text) for text in "xyz"), READ]
    before = world.snapshot()
    clock.advance(1)
    failing = [(only, works) for only in ("BEGIN IMMEDIATE", "SAVEPOINT act", "COMMIT")]
    for only, tick in [*failing, ("BEGIN", [READ]), ("COMMIT", [READ])]:
        malformed = sqlite3.DatabaseError("database disk image is malformed")
        for how in ({"error": malformed}, FAILURES["full, and rolled back"]):
            with faulty(world.registry, only=only, **how) as connection:
                assert are_unavailable(world.run(*tick), len(tick)) and connection.failed
            assert not world.registry.engine._connection.in_transaction and is_free(paths)
            assert world.snapshot() == before
    outcomes = world.run(*works)
    assert len(outcomes) == 5 and outcomes[::4] == [clock.ms, "read"]
    assert not any(isinstance(outcome, Problem) for outcome in outcomes)
    assert world.sql("PRAGMA integrity_check") == [("ok",)]


def test_what_is_committed_is_answered_though_the_lock_cannot_be_given_back(world, monkeypatch):
    """On NFS, of a server that has forgotten it."""
    flock, fail = fcntl.flock, raising(OSError(errno.ESTALE, os.strerror(errno.ESTALE)))
    by_operation = {fcntl.LOCK_UN: fail}
    monkeypatch.setattr(fcntl, "flock", lambda *how: by_operation.get(how[1], flock)(*how))
    assert world.run(WRITE) == world.run(WRITE) == ["written"]


# The pair of database and key file.


def lose(path):
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + suffix)


def bytes_by_path(paths):
    return {path: Path(path).read_bytes() for path in paths if os.path.exists(path)}


@pytest.mark.parametrize("spoil, sentence, is_known", table({
    # what is done, what the line says, whether the old credentials are known afterwards
    "no key file": (lambda paths: lose(paths[1]), "restore the key file", False),
    "no database": (lambda paths: lose(paths[0]), "restore the database", True),
    "an empty database": (lambda paths: os.truncate(paths[0], 0), "restore the database", True),
    "another's key file": (
        lambda paths: write(paths[1], hostenroll.new_keyring()),
        "not the key file of the database", False),
}))  # fmt: skip
def test_half_of_a_pair_is_refused_unless_init_allows_it(spoil, sentence, is_known, paths, clock):
    with World(paths, clock) as world:
        _, credential = world.join()
    spoil(paths)
    before = bytes_by_path(paths)
    for _ in range(2):
        with pytest.raises(hostenroll.OperatorError, match=sentence) as caught:
            open_registry(*paths, clock.ms)
        assert "--init" in str(caught.value) and "\n" not in str(caught.value)
        assert bytes_by_path(paths) == before
    with World(paths, clock, init=True) as world:
        assert paths[1] not in before or Path(paths[1]).read_bytes() == before[paths[1]]
        # The old keys without their database know the credential, and no host of it.
        assert world.beat(credential).status == (410 if is_known else 401)
        world.join()
    open_registry(*paths, clock.ms).close()


def test_a_pair_is_opened_as_it_is_whatever_its_path_and_its_lock_files_stay(clock, tmp_path):
    """A lock on an unlinked file excludes no process."""
    folder, seen = tmp_path / os.fsdecode("a b?mode=memory#%41'\u00e9".encode()), set()
    folder.mkdir()
    paths = str(folder / "x?y.db"), str(folder / "x.key")
    for init in (False, False, True):
        with World(paths, clock, init=init) as world:
            world.token()
        numbers = [os.stat(paths[0] + suffix).st_ino for suffix in LOCKS]
        seen.add((Path(paths[1]).read_bytes(), *numbers))
    assert len(seen) == 1 and sql(paths[0], "SELECT count(*) FROM token") == [(3,)]
    assert sorted(os.listdir(folder)) == ["x.key", "x?y.db", "x?y.db.gate", "x?y.db.lock"]


@slow
def test_a_first_start_that_is_killed_is_made_good_by_init_alone(paths, clock):
    """A server with half of a pair would answer for a fleet that it does not know."""
    n, refused, killed = 0, 0, True
    while killed:
        n += 1
        for path in (*paths, f"{paths[1]}.tmp", *(paths[0] + suffix for suffix in LOCKS)):
            lose(path)
        killed = killed_at(n, lambda: None, lambda _: open_registry(*paths, clock.ms))
        try:
            open_registry(*paths, clock.ms).close()
        except hostenroll.OperatorError as error:
            assert "--init" in str(error)
            refused += 1
            World(paths, clock, init=True).registry.close()
        assert stat.S_IMODE(os.stat(paths[1]).st_mode) == 0o600
        with World(paths, clock) as world:
            world.join()
    assert 0 < refused < n and n > 40


# Queries.


@pytest.mark.parametrize("why", ["used", "revoked", "expired"])
def test_a_use_that_may_not_be_taken_is_not(why, world, clock):
    """The statement itself is the guard, whatever was read before."""
    number, queries = number_of(world.token()), world.registry.queries
    if why == "used":
        assert world.perform(lambda now: queries.use_token(number, now, ""))
    elif why == "revoked":
        world.perform(lambda now: queries.revoke(hostenroll.Token, number, now))
    else:
        clock.advance(hostenroll.TOKEN_TTL)
    assert world.perform(lambda now: queries.use_token(number, now, "")) is False


def test_a_row_whose_id_is_taken_is_not_added_and_changes_nothing(world):
    queries, host = world.registry.queries, int(world.join()[0], 16)
    key = world.act("mint-api-key").key
    token = queries.get(hostenroll.Token, number_of(world.token()))
    before = world.snapshot()
    rows = [row._replace(created_at=1) for row in (token, key, queries.organizations()[0])]
    added = [world.perform(lambda now, row=row: queries.add(row)) for row in rows]
    twin = queries.get(hostenroll.Host, host)._replace(name="x")
    added.append(world.perform(lambda now: queries.add_host(twin)))
    assert added == [False] * 4 and world.snapshot() == before


def test_a_key_that_returns_keeps_its_number(world):
    queries = world.registry.queries
    (row,) = queries.signing_keys()
    world.perform(lambda now: queries.retire_signing_key(row.kid, now))
    assert queries.signing_keys()[0].retired_at is not None
    world.perform(lambda now: queries.add_signing_key(row.kid, now + 1))
    assert queries.signing_keys() == [row]


def test_the_strays_of_a_batch_are_found_whatever_its_size(world, clock, monkeypatch):
    """Of hosts that are revoked, deleted, superseded, or were last seen later."""
    fill(world, 30)
    beat_all(world, range(1, 31))
    world.sql("UPDATE heartbeat SET state = 5 WHERE host_id = 3 << 8")
    world.sql("UPDATE heartbeat SET serial = 2 WHERE host_id = 5 << 8")
    world.sql("UPDATE heartbeat SET last_seen = last_seen + 1 WHERE host_id = 7 << 8")
    world.sql("DELETE FROM host WHERE id = 9 << 8")
    world.sql("UPDATE heartbeat SET state = 3 WHERE host_id = 11 << 8")
    key = hostenroll.address_key(ADDRESS)
    expected = {(n << 8, 1 + (n == 5), 30, key) for n in range(1, 31) if n not in (3, 7, 9, 11)}
    for maximum in (1, 2, 7, 16, 29, 30, 31, 500):
        monkeypatch.setattr(hostenroll, "VARIABLES_MAXIMUM", maximum)
        beaten = world.registry.queries.beaten(clock.ms, [n << 8 for n in range(1, 31)])
        assert beaten == expected, maximum
    assert world.registry.queries.beaten(clock.ms, []) == set()


# Older schemas.

SCHEMA_1 = """
PRAGMA application_id = 0x686F7374; PRAGMA user_version = 1;
CREATE TABLE organization (id TEXT NOT NULL PRIMARY KEY, created_at INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE api_key (id INTEGER PRIMARY KEY, secret_hash BLOB NOT NULL, organization_id TEXT
    REFERENCES organization (id), role TEXT NOT NULL CHECK (role IN ('admin', 'viewer')),
    description TEXT NOT NULL, created_at INTEGER NOT NULL, created_by TEXT NOT NULL, revoked_at
    INTEGER);
CREATE TABLE token (id INTEGER PRIMARY KEY, secret_hash BLOB NOT NULL, organization_id TEXT NOT NULL
    REFERENCES organization (id), description TEXT NOT NULL, hostname TEXT, host_id INTEGER, labels
    TEXT NOT NULL, max_uses INTEGER NOT NULL CHECK (max_uses >= 1), uses INTEGER NOT NULL DEFAULT 0
    CHECK (uses BETWEEN 0 AND max_uses), created_at INTEGER NOT NULL, created_by TEXT NOT NULL,
    expires_at INTEGER NOT NULL, used_at INTEGER, used_from TEXT, revoked_at INTEGER);
CREATE INDEX token_organization ON token (organization_id);
CREATE INDEX token_host ON token (host_id) WHERE host_id IS NOT NULL;
CREATE TABLE host (id INTEGER PRIMARY KEY, organization_id TEXT NOT NULL REFERENCES organization
    (id), name TEXT NOT NULL, hostname TEXT NOT NULL, bound INTEGER NOT NULL, os TEXT NOT NULL,
    architecture TEXT NOT NULL, docker_version TEXT NOT NULL, labels TEXT NOT NULL, issued INTEGER
    NOT NULL, enrolled_at INTEGER NOT NULL, revoked_at INTEGER, token_id INTEGER NOT NULL,
    admitted_by INTEGER NOT NULL, admitted_at INTEGER NOT NULL, admitted_serial INTEGER NOT NULL,
    idempotency BLOB);
CREATE INDEX host_organization ON host (organization_id);
CREATE INDEX host_token ON host (token_id);
CREATE UNIQUE INDEX host_idempotency ON host (admitted_by, idempotency) WHERE idempotency IS NOT
    NULL;
CREATE TABLE signing_key (number INTEGER PRIMARY KEY, kid TEXT NOT NULL UNIQUE, created_at INTEGER
    NOT NULL);
CREATE TABLE heartbeat (host_id INTEGER PRIMARY KEY REFERENCES host (id) ON DELETE CASCADE,
    last_seen INTEGER NOT NULL, serial INTEGER NOT NULL, key_number INTEGER NOT NULL, active INTEGER
    NOT NULL);
CREATE TABLE service (id INTEGER PRIMARY KEY CHECK (id = 1), started INTEGER NOT NULL, alive INTEGER
    NOT NULL, previous_alive INTEGER NOT NULL, interval INTEGER NOT NULL, public_url TEXT NOT NULL);
"""


@contextlib.contextmanager
def old_pair(paths, schema):
    """A pair of another schema: its keys, and a function that adds a row to a table."""
    keyring = hostenroll.new_keyring()
    write(paths[1], keyring)
    os.close(os.open(paths[0], os.O_WRONLY | os.O_CREAT, 0o600))
    with contextlib.closing(sqlite3.connect(paths[0])) as db, db:
        db.executescript(f"PRAGMA journal_mode = WAL; {schema}")

        def add(name, *row):
            db.execute(f"INSERT INTO {name} VALUES ({', '.join('?' * len(row))})", row)

        add("organization", "default", 5)
        yield keyring, add


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


def old_fleet(paths, clock):
    """A fleet as the first version left it, with a used token that let all the hosts in, each by
    its name as Idempotency-Key."""
    before, kid = clock.ms - 3_600_000, ""
    used = hostenroll.mint_secret("het", (before << 8) + 2)
    ids = {name: (before << 8) + n for n, name in enumerate(OLD_HOSTS)}
    with old_pair(paths, SCHEMA_1) as (keyring, add):
        kid = keyring.first.kid
        add("signing_key", 1, kid, before)
        add("service", 1, 0, clock.ms, 0, 45, "http://x")
        add("token", used.id, used.digest(), "default", "d", None, None, '{"a": "1"}', 9, 9, before,
            "cli:x", clock.ms + 60_000, None, None, None)  # fmt: skip
        for name, (issued, admitted, silence, serial, active) in OLD_HOSTS.items():
            add("host", ids[name], "default", name, f"{name}.lan", 0, "", "", "", "{}", issued,
                before, None if active else before, used.id, used.id, before, admitted,
                hostenroll.sha256(name))  # fmt: skip
            seen = 0 if silence is None else clock.ms - silence * 1000
            add("heartbeat", ids[name], seen, serial, 1, active)

    def credential(name, serial):
        claims = hostenroll.Claims(ids[name], "default", 1_799_000_000, serial, None, kid)
        return str(keyring.first.sign(claims))

    return SimpleNamespace(ids=ids, keyring=keyring, used=used, credential=credential)


def test_what_agents_of_an_older_version_have_pinned_is_known(paths, clock):
    make_schema_2(paths, clock)
    sql(paths[0], "INSERT INTO service VALUES (1, 5, 5, 0, 30, 'https://x', 'a pin')")
    open_registry(*paths, clock.ms).close()
    assert sql(paths[0], "SELECT pin, pinned FROM service") == [("a pin", "a pin")]


# By the migration from schema 2: tables and columns.
ADDED = re.findall(r"ALTER TABLE (\w+) ADD COLUMN (\w+)", "; ".join(hostenroll.MIGRATIONS[2]))


def make_schema_2(paths, clock):
    """A pair of schema 2, which lacks the columns that its migration adds."""
    text = hostenroll.SCHEMA
    for name, column in ADDED:
        start = text.index(f"CREATE TABLE {name} (")
        end = text.index("\n);", start)
        table = re.sub(rf"\n +{column} [^\n]*", "", text[start:end])
        text = text[:start] + re.sub(r",( *(?:--[^\n]*)?)\Z", r"\1", table) + text[end:]
    start = text.index("CREATE TABLE heartbeat (")
    text = text[:start] + text[start:].replace(" state ", " active ", 1)
    for name in ("change", "change_host", "feed", "host_state", "api_key_maker"):
        text = text.replace(f"{hostenroll.SCHEMA_OBJECTS[name]};", "")
    with old_pair(paths, f"{text}; PRAGMA user_version = 2") as (keyring, add):
        add("signing_key", 1, keyring.first.kid, 5, None)
        add("host", 7, "default", "n", "n.lan", 0, "os", "a", "d", "{}", 1, 5, None, 1, 1, 5, 1,
            None, "::1", None)  # fmt: skip
        add("heartbeat", 7, 6, 1, 1, 1)


def anatomy(path):
    """All that a schema means, and not how it is written."""
    with contextlib.closing(sqlite3.connect(path)) as db:

        def ask(pragma, name):
            return sorted(db.execute(f"PRAGMA {pragma}('{name}')").fetchall(), key=repr)

        parts = {}
        statement = "SELECT type, name, tbl_name, sql FROM sqlite_master"
        for kind, name, of, text in db.execute(statement):
            if kind == "table":
                columns, indexes = ask("table_info", name), ask("index_list", name)
                part = [sorted(row[1:] for row in rows) for rows in (columns, indexes)]
                part += [ask("foreign_key_list", name)]
            else:
                text = re.sub(r"--.*", "", text or "")
                part = [of, " ".join(text.split()), ask("index_xinfo", name)]
            parts[f"{kind} {name}"] = part
        for pragma in ("application_id", "user_version", "journal_mode"):
            parts[pragma] = db.execute(f"PRAGMA {pragma}").fetchone()
        return parts


def contents(path):
    """What is in a database that no process has open, and what it is written in."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        names = [n for (n,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {n: db.execute(f"SELECT * FROM {n} ORDER BY 1").fetchall() for n in sorted(names)}
    return sorted(anatomy(path)), rows


@pytest.mark.parametrize("make", [old_fleet, make_schema_2], ids=["schema 1", "schema 2"])
def test_a_migrated_database_is_what_a_fresh_one_is(make, paths, clock, tmp_path):
    fresh = str(tmp_path / "fresh.db"), str(tmp_path / "fresh.key")
    open_registry(*fresh, clock.ms).close()
    make(paths, clock)
    assert anatomy(paths[0]) != anatomy(fresh[0])
    key, before = Path(paths[1]).read_bytes(), contents(paths[0])[1]
    sizes = {"feed": 1, **{name: len(rows) for name, rows in before.items() if rows}}
    for _ in range(2):
        open_registry(*paths, clock.ms).close()
        assert anatomy(paths[0]) == anatomy(fresh[0]) and Path(paths[1]).read_bytes() == key
        after = contents(paths[0])[1]
        assert {name: len(rows) for name, rows in after.items() if rows} == sizes
        for name in ("organization", "token", "api_key", "host", "signing_key", "service"):
            assert [row[: len(old)] for row, old in zip(after[name], before[name])] == before[name]
        told = 45 if make is old_fleet else 30  # what the server told them; 30 where none has run
        assert {row[-2:] for row in after["heartbeat"]} == {(told, 0)}
    if make is old_fleet:
        serials = [[row[2] for row in rows["heartbeat"]] for rows in (before, after)]
        assert serials == [[1, 3, 0, 0, 3, 1, 0], [1, 3, 1, 1, 3, 1, 1]]
    else:
        beats = [row[:-3] for row in after["heartbeat"]]
        assert beats == [row[:-1] for row in before["heartbeat"]]
        assert after["audit"] == before["audit"]


def locked_engine(path):
    engine = hostenroll.Engine(path)
    engine.lock.acquire(5)
    assert engine.open()
    return engine


def test_whichever_statement_of_a_migration_fails_it_is_all_or_nothing(
    paths, clock, tmp_path, monkeypatch
):
    monkeypatch.setattr(hostenroll, "new_history", lambda: "5e" * 8)

    def finish(engine):
        hostenroll.begin_feed(hostenroll.Queries(engine), clock.ms)

    old_fleet(paths, clock)
    before, old = contents(paths[0]), shutil.copy(paths[0], tmp_path / "old.db")
    open_registry(*paths, clock.ms).close()
    expected = contents(paths[0])
    for after in (False, True):
        shutil.copy(old, paths[0])
        for n in range(1, 200):
            engine = locked_engine(paths[0])
            engine._connection = Faulty(engine._connection, n=n, after=after)
            with contextlib.suppress(hostenroll.StoreError):
                engine.migrate(lambda older: finish(engine))
            engine.rollback()
            failed = engine._connection.failed
            engine.close()
            assert contents(paths[0]) == (before if failed else expected), n
            if not failed:
                break
        assert not failed and n > 8


def killed_at(n, prepare, act):
    """Whether an act, in a process of its own, is killed before its n-th call of the system or of
    SQLite; False when it comes to its end first."""
    calls = itertools.count(1)
    counted = {"posix", "fcntl", "_io", sqlite3.Connection.__module__}

    def watch(frame, event, called):
        owner = type(getattr(called, "__self__", None)).__module__
        if event == "c_call" and {called.__module__, owner} & counted and next(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    def run():
        prepared = prepare()
        sys.setprofile(watch)
        act(prepared)
        os._exit(0)

    status = os.waitpid(forked(run), 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status != 0


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=slow)])
def test_a_migration_that_is_killed_leaves_a_whole_old_database(step, paths, clock, tmp_path):
    old_fleet(paths, clock)
    before, path, old = contents(paths[0]), str(tmp_path / "run.db"), 0
    for n in itertools.count(1, step):
        lose(path)
        shutil.copy(paths[0], path)
        killed = killed_at(
            n, lambda: locked_engine(path), lambda engine: engine.migrate(lambda older: None)
        )
        version = sql(path, "PRAGMA user_version")[0][0]
        if version == 1:
            assert contents(path) == before
            old += 1
        open_registry(path, paths[1], clock.ms).close()
        assert sql(path, "PRAGMA user_version") == [(hostenroll.SCHEMA_VERSION,)]
        assert sorted(anatomy(path)) != before[0]
        if not killed:
            break
    assert version == hostenroll.SCHEMA_VERSION and old > 20 // step


def test_before_a_migration_a_copy_is_made_to_go_back_with(paths, clock):
    """Moved to the database's place it is what the older program left, with what was in its WAL."""
    old_fleet(paths, clock)
    before, copy = contents(paths[0]), Path(f"{paths[0]}.schema1")
    copy.write_text("an older copy, readable by all")
    if os.geteuid() == 0:
        os.chown(paths[0], SERVICE, SERVICE)
    open_registry(*paths, clock.ms).close()
    status = copy.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, os.stat(paths[0]).st_uid)
    (named,) = [found for found in hostenroll.examine(*paths) if found.name == "copy"]
    assert named.is_good and str(copy) in named.detail
    copy.chmod(0o644)
    assert f"chmod 600 {copy}" in [found.detail for found in bad_in(paths)]
    copy.replace(paths[0])
    assert contents(paths[0]) == before
    assert sorted(os.listdir(copy.parent)) == [
        "hostenroll.db", "hostenroll.db.gate", "hostenroll.db.lock", "hostenroll.key"
    ]  # fmt: skip


@pytest.mark.parametrize("lies", [False, True], ids=["as the system says", "as it turns out"])
def test_where_the_disk_is_short_a_migration_goes_on_without_a_copy(
    lies, tmp_path, paths, clock, caplog, monkeypatch
):
    with small_disk(tmp_path, "2m"):
        old_fleet(paths, clock)
        sql(paths[0], "UPDATE token SET description = hex(zeroblob(300000))")
        (tmp_path / "rest").write_bytes(bytes(shutil.disk_usage(tmp_path).free - 400_000))
        if lies:  # another program fills the disk meanwhile
            monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))
        open_registry(*paths, clock.ms).close()
        (line,) = caplog.messages
        assert "goes on without a copy" in line and paths[0] in line and hostenroll.ROOM in line
        assert not [name for name in os.listdir(tmp_path) if "schema1" in name]
        assert bad_in(paths) == []


def test_a_link_in_the_place_of_the_copy_is_not_written_through(paths, clock, tmp_path):
    old_fleet(paths, clock)
    before, victim = contents(paths[0]), tmp_path / "victim"
    victim.write_text("of root")
    for place in (".schema1", ".schema1.tmp"):
        os.symlink("victim", paths[0] + place)
    if os.geteuid() == 0:
        os.chown(paths[0] + ".schema1", SERVICE, SERVICE, follow_symlinks=False)
        with pytest.raises(hostenroll.OperatorError, match="schema1 is a link"):
            open_registry(*paths, clock.ms)
        assert contents(paths[0]) == before
    os.unlink(paths[0] + ".schema1")
    open_registry(*paths, clock.ms).close()
    assert victim.read_text() == "of root" and not os.path.exists(paths[0] + ".schema1.tmp")


@pytest.mark.parametrize("make", [old_fleet, make_schema_2], ids=["schema 1", "schema 2"])
def test_nothing_is_migrated_while_another_process_has_it_open(make, paths, clock, monkeypatch):
    """An older server would go on to write, in the format of its version."""
    monkeypatch.setattr(hostenroll, "LOCK_PATIENCE", 0.1)
    make(paths, clock)
    before = contents(paths[0])
    program = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); "
    program += "db.execute('SELECT * FROM host').fetchall(); print(flush=True); input()"
    command = [sys.executable, "-c", program, paths[0]]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(hostenroll.StoreBusy, match="stop all servers of older versions"):
            open_registry(*paths, clock.ms)
        assert contents(paths[0]) == before and ".schema" not in str(
            os.listdir(Path(paths[0]).parent)
        )
        other.communicate(b"\n")
    open_registry(*paths, clock.ms).close()
    assert bad_in(paths) == [] and ".schema" in str(os.listdir(Path(paths[0]).parent))


@pytest.mark.parametrize("make", [old_fleet, make_schema_2], ids=["schema 1", "schema 2"])
def test_an_older_schema_is_migrated_by_serve_alone_and_can_be_copied(
    make, paths, clock, tmp_path, operator
):
    make(paths, clock)
    version = sql(paths[0], "PRAGMA user_version")[0][0]
    with contextlib.closing(sqlite3.connect(paths[0])) as db:  # a WAL is left, as by kill -9
        db.execute("UPDATE service SET interval = 31")
        db.commit()
        lived = {name: Path(paths[0] + name).read_bytes() for name in ("", "-wal")}
    for name, octets in lived.items():
        Path(paths[0] + name).write_bytes(octets)
    before = bytes_by_path(tmp_path.iterdir())
    for words in (
        "mint-token", f"revoke-host {UNKNOWN}", f"show-host {UNKNOWN}", "list-hosts", "show-audit",
        "verify-audit", "rotate-signing-key", "list-signing-keys --json",
    ):  # fmt: skip
        refused = f"{paths[0]}: schema {version}: start serve of this version once\n"
        require_one_line(operator(*words.split()), 1, refused)
    checked = operator("check")
    assert checked.status == 1 and re.search(rf"^BAD +schema +{version}: serve", checked.out, re.M)
    assert bytes_by_path(tmp_path.iterdir()) == before
    Path(f"{paths[0]}-journal").touch()  # then there is no look before it is opened
    require_one_line(operator("add-org", "berlin"), 1, refused)
    done = operator("backup", str(tmp_path / "copy"))
    assert done.status == 0, done.err
    copies = [str(tmp_path / "copy" / Path(path).name) for path in paths]
    assert contents(copies[0]) == contents(paths[0]) and not os.path.exists(paths[0] + ".schema1")
    assert sql(copies[0], "PRAGMA user_version") == [(version,)]
    assert Path(copies[1]).read_bytes() == Path(paths[1]).read_bytes()
    for pair in (copies, paths):
        open_registry(*pair, clock.ms).close()
        assert operator("list-hosts", "--db", pair[0], "--key-file", pair[1]).status == 0


# Schemas that were altered.


def rewritten(name, old, new, column="sql"):
    """What is in sqlite_master, changed as only PRAGMA writable_schema allows."""

    def rewrite(path):
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("PRAGMA writable_schema = ON")
            of = f"sqlite_master SET {column} = replace({column}, ?, ?) WHERE name = ?"
            assert db.execute(f"UPDATE {of}", (old, new, name)).rowcount == 1
            text = db.execute(f"SELECT {column} FROM sqlite_master WHERE name = ?", (name,))
            assert new in text.fetchone()[0]

    return rewrite


def scripted(*statements):
    return lambda path: [sql(path, statement) for statement in statements]


SWALLOW = "CREATE TRIGGER swallow BEFORE INSERT ON {} WHEN 1 BEGIN SELECT RAISE(IGNORE); END"
AGAIN = "AFTER UPDATE ON token BEGIN UPDATE token SET uses = 0 WHERE id = NEW.id; END"
ALTERED_SCHEMAS = {  # how the database's schema is altered, and what is named
    **{f"rows of {name} are swallowed": (scripted(SWALLOW.format(name)), f"swallow on {name} is f")
       for name in ("audit", "HOST", "token", "heartbeat", "api_key", "audit_anchor")},
    "a token is let in again": (scripted(f"CREATE TRIGGER again {AGAIN}"), "again on token is for"),
    "by a name in no encoding":
        (scripted(f'CREATE TRIGGER "{{}}" {AGAIN}'.format("\x1b[2J\n")), "trigger ?[2J? on token"),
    "a trigger fires with what is deleted with a host":
        (scripted("CREATE TABLE x (h UNIQUE REFERENCES HOST (id) ON DELETE CASCADE)",
                  "CREATE TABLE y (x REFERENCES x (h) ON DELETE CASCADE, y REFERENCES y (x))",
                  "CREATE TRIGGER after AFTER DELETE ON y BEGIN DELETE FROM audit_anchor; END"),
         "trigger after on y is foreign"),
    **{f"a trigger is listed as {new!r}": (
        lambda path, column=column, new=new: (
            sql(path, SWALLOW.format("audit")),
            rewritten("swallow", new.partition("\0")[0].lower(), new, column)(path)),
        "swallow on")  # SQLite still takes it for a trigger on audit
       for column, new in (("tbl_name", "Audit"), ("tbl_name", "audit\0"), ("type", "TRIGGER"),
                           ("type", "trigger\0x"))},
    **{f"{name} is dropped": (scripted(f"DROP TRIGGER {name}"), f"{name} is missing")
       for name in hostenroll.SCHEMA_OBJECTS if name.startswith("audit_is")},
    "a trigger acts on one column":
        (scripted("DROP TRIGGER audit_is_never_changed",
                  "CREATE TRIGGER audit_is_never_changed BEFORE UPDATE OF mac ON audit BEGIN "
                  "SELECT RAISE(ABORT, 'the audit log is append-only'); END"),
         "trigger audit_is_never_changed is altered"),
    "a trigger looks at another table":  # to SQLite, no-break space is part of a name
        (scripted("CREATE TABLE audit_anchor\u00a0 (number)", "DROP TRIGGER audit_is_only_pruned",
                  hostenroll.SCHEMA_OBJECTS["audit_is_only_pruned"].replace(
                      "audit_anchor)", "audit_anchor\u00a0)")),
         "trigger audit_is_only_pruned is altered"),
    "a view takes the place of a table":
        (scripted("ALTER TABLE audit RENAME TO x", "CREATE VIEW audit AS SELECT * FROM x"),
         "view audit is altered"),
    "a table is gone": (scripted("DROP TABLE service"), "service is missing"),
    "a column is generated": (scripted("ALTER TABLE audit ADD g AS (1)"), "table audit is altered"),
    "a column has another name":
        (scripted("ALTER TABLE host RENAME issued TO x"), "table host is altered"),
    "a unique index is dropped":
        (scripted("DROP INDEX host_idempotency"), "host_idempotency is missing"),
    "a unique index is foreign":
        (scripted("CREATE UNIQUE INDEX u ON host (hostname)"), "index u on host is foreign"),
    "a unique index allows more":
        (rewritten("host_idempotency", "UNIQUE ", ""), "index host_idempotency is altered"),
    "an index compares with a text":
        (rewritten("token_host", "NULL", '"NULL"'), "index token_host is altered"),
    "an index has another condition":
        (rewritten("token_host", "IS NOT NULL", "> 9"), "index token_host is altered"),
    "a default is another": (rewritten("host", "''", "'--\n'"), "table host is altered"),
    "a check is another": (rewritten("token", ">= 1", ">= 0"), "table token is altered"),
    "a foreign key does less":
        (rewritten("heartbeat", " ON DELETE CASCADE", ""), "table heartbeat is altered"),
    "a conflict is passed over":
        (rewritten("audit", "PRIMARY KEY", "PRIMARY KEY ON CONFLICT IGNORE"), "table audit is al"),
    "texts are compared otherwise":
        (rewritten("signing_key", "TEXT ", "TEXT COLLATE NOCASE "), "table signing_key is altered"),
    "a type is another": (rewritten("audit", "BLOB ", "TEXT "), "table audit is altered"),
}  # fmt: skip


@pytest.mark.parametrize("alter, word", sample(ALTERED_SCHEMAS, *[*ALTERED_SCHEMAS][::3]))
def test_what_writes_refuses_a_schema_that_was_altered_and_what_reads_warns(
    alter, word, paths, clock
):
    """A trigger that swallows an event leaves no gap in the chain: it must not get to act."""
    with World(paths, clock) as world:
        world.join()
    alter(paths[0])
    before = bytes_of(paths)
    for purpose in ("serve", "act"):
        with pytest.raises(hostenroll.StoreError, match=re.escape(word)) as caught:
            open_registry(*paths, clock.ms, purpose=purpose)
        assert not hostenroll.UNPRINTABLE.search(str(caught.value))
    assert "integrity" in {found.name for found in bad_in(paths) if word in found.detail}
    for purpose in ("read", "copy"):
        with contextlib.suppress(hostenroll.StoreError):  # of the table that is missing
            registry = open_registry(*paths, clock.ms, purpose=purpose)
            assert word in registry.engine.schema_fault
            registry.close()
    assert bytes_of(paths) == before


HARMLESS = (
    "CREATE TABLE _litestream_seq (id INTEGER PRIMARY KEY AUTOINCREMENT, seq INTEGER)",
    "CREATE TRIGGER own AFTER INSERT ON _litestream_seq BEGIN DELETE FROM _litestream_seq; END",
    "CREATE VIEW online AS SELECT * FROM heartbeat WHERE state",
    "CREATE INDEX by_name ON host (name)",
    "DROP INDEX host_token",
)


def test_what_is_foreign_and_harmless_gives_one_warning(paths, clock, operator):
    open_registry(*paths, clock.ms).close()
    sql(paths[0], "ALTER TABLE audit RENAME TO x")
    sql(paths[0], "ALTER TABLE x RENAME TO audit")
    for name in ("audit_is_only_pruned", "token_host"):  # they only look otherwise
        text = hostenroll.SCHEMA_OBJECTS[name].replace(" ON ", "\n/* where */ ON -- it is\n\t")
        sql(paths[0], f"DROP {'INDEX' if 'INDEX' in text else 'TRIGGER'} {name}")
        sql(paths[0], text)
    sql(paths[0], "ANALYZE")
    assert operator("add-org", "berlin").err.count("\n") == 1 and verdicts(paths) == SOUND
    scripted(*HARMLESS)(paths[0])
    done, lines = operator("list-orgs"), operator("add-org", "bonn").err.split("\n")
    names = ("table _litestream_seq", "trigger own", "view online", "index by_name", "host_token")
    assert done.status == 0 and done.err == lines[0] + "\n" and len(lines) == 3
    assert [name for name in names if name not in done.err] == []
    assert verdicts(paths) == {**SOUND, "foreign": True}


def test_a_schema_that_is_altered_under_a_server_ends_it(world):
    for statement in (*HARMLESS, "ANALYZE"):
        world.sql(statement)
        world.housekeeping()
    world.sql(SWALLOW.format("audit"))
    with pytest.raises(hostenroll.Unrecoverable, match="trigger swallow on audit is foreign"):
        world.housekeeping()


def test_an_older_schema_is_not_migrated_with_what_was_put_into_it(paths, clock):
    old_fleet(paths, clock)
    sql(paths[0], SWALLOW.format("host"))
    before = contents(paths[0])
    with pytest.raises(hostenroll.StoreError, match="trigger swallow on host is foreign"):
        open_registry(*paths, clock.ms)
    assert contents(paths[0]) == before and not os.path.exists(f"{paths[0]}.schema1")
    assert any("trigger swallow on host is foreign" in found.detail for found in bad_in(paths))


@pytest.mark.parametrize("statement", [
    "UPDATE audit SET actor = 'x' WHERE number = 1",
    "UPDATE audit SET at = at",
    "DELETE FROM audit WHERE number = 1",
    "DELETE FROM audit WHERE number = 2",
    "DELETE FROM audit",
    "INSERT OR REPLACE INTO audit SELECT number, 0, action, actor, address, organization_id, "
    "subject, code, detail, mac FROM audit WHERE number = 1",
    "INSERT OR IGNORE INTO audit SELECT * FROM audit WHERE number = 1",
])  # fmt: skip
def test_the_audit_log_is_append_only(statement, paths, clock):
    with World(paths, clock) as world:
        for _ in range(3):
            world.act("mint-token")
        before = world.sql("SELECT * FROM audit")
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        sql(paths[0], statement)
    assert sql(paths[0], "SELECT * FROM audit") == before


def test_processes_that_race_make_one_pair_and_keep_one_chain_of_events(paths, clock):
    names = ("one", "two", "three", "four")

    def mint(name):
        with opened(paths, clock) as registry:
            for _ in range(30):
                act(registry, clock, "mint-token", by=Principal(name, None, "admin"))
        os._exit(0)

    children = [forked(partial(mint, name)) for name in names]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    with World(paths, clock) as world:
        kids = [kid for (kid,) in world.sql("SELECT kid FROM signing_key")]
        assert kids == [key.kid for key in world.registry.keys.keyring.keys]
        assert verify_audit(world.registry, None)[:2] == (1, 120)
        actors = [actor for (actor,) in world.sql("SELECT actor FROM audit")]
        assert [actors.count(name) for name in names] == [30] * 4


# 6. Registry


def enrolled(door, hostname="web-1", /, **values):
    """The document of a host that has just enrolled with a token of such values."""
    reply = door.enroll(door.token(**values), hostname)
    assert reply.status == 201, reply
    return reply.document


def reenrolled(world, host, hostname="web-1"):
    """The new credential of a host that has just re-enrolled."""
    return world.enroll(world.reenroll(host).document["token"], hostname).document["credential"]


def serial_of(world, credential):
    return world.registry.keys.authenticate(credential, world.clock.ms).serial


def replayed(world, token, count):
    """The documents of an enrollment and its replays, each from another address."""
    documents = []
    for n in range(count):
        world.address = f"192.0.2.{n}"
        documents.append(world.enroll(token, key="k").document)
    return documents


@pytest.fixture
def renewing(paths, clock):
    """A world whose credentials live for 300 seconds."""
    with World(paths, clock, credential_ttl=300) as world:
        yield world


# The life of hosts and tokens, through every door.


def test_a_host_lives_and_dies(door, clock):
    minted = door.mint(labels={"rack": "b4"}).document
    token = minted.pop("token")
    creator = f"api-key:{door.api_key.split('_')[1]}" if door.api_key else "cli:test"
    fresh = {"state": "valid", "uses": 0, "hosts": [], "createdBy": creator}
    assert minted == {**minted, **fresh} == door.show_token(minted["id"]).document
    host = door.enroll(token, "web-1", os="linux", dockerVersion="27.1", name="Front").document
    number, credential = host["hostId"], host["credential"]

    def refused_beats():
        replies = [door.beat(credential, **facts) for facts in ({}, {"os": "bsd"})]
        return {(reply.status, reply.code) for reply in replies}

    address = "127.0.0.1" if isinstance(door, SocketDoor) else ADDRESS
    wanted = {"state": "used", "uses": 1, "hosts": [number], "usedFrom": address}
    used = {**minted, **wanted, "usedAt": hostenroll.rfc3339(clock.ms)}
    assert door.show_token(minted["id"]).document == used
    shown = door.host(number).document
    assert shown == {
        **shown, "organizationId": "default", "name": "Front", "status": "pending",
        "lastSeen": None, "os": "linux", "architecture": "", "dockerVersion": "27.1",
        "labels": {"rack": "b4"}, "tokenId": minted["id"],
    }  # fmt: skip
    clock.advance(1)
    now = hostenroll.rfc3339(clock.ms)
    assert door.beat(credential).document["lastSeen"] == now
    assert door.host(number).document["status"] == "online"
    for _ in range(2):
        revoked = door.revoke(number).document
        assert (revoked["status"], revoked["revokedAt"]) == ("revoked", now)
        assert refused_beats() == {(403, "host-revoked")}
    seen = door.host(number).document
    assert (seen["os"], seen["lastSeen"]) == ("linux", now)
    assert [door.restore(number).document["status"] for _ in range(2)] == ["online"] * 2
    edited = door.ask("PATCH", f"/api/hosts/{number}", {"name": "K\u00fcche"}).document
    assert edited == {**door.host(number).document, "name": "K\u00fcche"}
    assert door.beat(credential, os="", agentVersion="1.2", hostname="new").status == 200
    facts = {"os": "", "agentVersion": "1.2", "hostname": "new"}
    assert door.host(number).document == {**edited, **facts}
    assert door.delete(number).status == 204
    assert [door.delete(number).code, door.host(number).code] == ["not-found"] * 2
    assert refused_beats() == {(410, "host-unknown")}
    assert door.enroll(token).code == "token-used"


def test_a_token_has_one_state_the_strongest_and_lives_to_the_millisecond(door, clock):
    minted = [door.mint(ttlSeconds=60).document for _ in range(5)]
    clock.now = NOON + 59.999
    assert [door.enroll(minted[n]["token"]).status for n in (1, 3, 4)] == [201] * 3
    for token in minted[2:4]:
        door.revoke_token(token["id"])
    clock.now = NOON + 60
    states = ["expired", "used", "revoked", "revoked", "used"]
    shown = [door.show_token(token["id"]).document for token in minted]
    assert [token["state"] for token in shown] == states
    refused = [door.enroll(token["token"]).code for token in minted]
    assert refused == [f"token-{state}" for state in states]
    assert door.revoke_token(minted[2]["id"]).code is None
    assert door.show_token(minted[2]["id"]).document == shown[2]


def _slip(text):
    return text[:-1] + ("1" if text[-1] == "0" else "0")


def _other_secret(text):
    return hostenroll.mint_secret("het", int(text[4:20], 16)).text


@pytest.mark.parametrize("bound, changed, hostname, code", table({
    # name: what the token is bound to, what is sent, from which host, the refusal
    "a slip": (None, _slip, "web-1", "token-unknown"),
    "a guess": (None, _other_secret, "web-1", "token-unknown"),
    "in capitals": (None, str.upper, "web-1", "token-unknown"),
    "a space": (None, lambda text: text + " ", "web-1", "token-unknown"),
    "an API key": (None, lambda text: "hak" + text[3:], "web-1", "token-unknown"),
    "another host": ("db-1", lambda text: text, "db-10", "token-host-mismatch"),
}))  # fmt: skip
def test_a_refused_enrollment_uses_up_nothing(bound, changed, hostname, code, door):
    minted = door.mint(**({"hostname": bound} if bound else {})).document
    before = door.show_token(minted["id"]).document
    sent = changed(minted["token"])
    assert [door.enroll(sent, hostname).code for _ in range(3)] == [code] * 3
    assert door.show_token(minted["id"]).document == before
    assert door.enroll(minted["token"], bound or "web-1").status == 201


def test_a_token_is_not_used_up_by_a_revoked_host(door):
    """The use is taken before the host is looked at, and rolled back."""
    number = enrolled(door)["hostId"]
    again = door.reenroll(number).document["token"]
    door.revoke(number)
    assert [door.enroll(again).code for _ in range(2)] == ["host-revoked"] * 2
    door.restore(number)
    assert door.enroll(again).document["hostId"] == number


def test_only_a_caller_with_its_secret_learns_why_a_token_is_refused_and_its_end_is_first(door):
    """Here it is for another host, too."""
    minted = door.mint(hostname="db-1").document
    door.revoke_token(minted["id"])
    codes = {minted["token"]: "token-revoked", _other_secret(minted["token"]): "token-unknown"}
    assert {text: door.enroll(text, "web-1").code for text in codes} == codes


def test_a_bound_hostname_is_compared_as_dns_does(door):
    names = "db-1.lan", "DB-1.LAN", "db-1.lan.", "Db-1.Lan."
    for bound, name in itertools.product(("Db-1.lan", "db-1.LAN."), names):
        assert door.enroll(door.token(hostname=bound), name).status == 201


def test_a_re_enrolled_host_is_the_same_host_and_its_reply_can_be_asked_for_again(door, clock):
    host = enrolled(door, labels={"a": "1"})
    number = host["hostId"]
    door.beat(host["credential"])
    before = door.host(number).document
    clock.advance(5)
    minted = door.reenroll(number).document
    assert (minted["hostId"], minted["maxUses"]) == (number, 1)

    def enroll():
        return door.enroll(minted["token"], "web-9", "k", name="other")

    replies = [enroll().document for _ in range(2)]
    assert {(it["hostId"], it["name"]) for it in replies} == {(number, "web-1")}
    after = door.host(number).document
    assert after == {**before, "hostname": "web-9", "statusReason": after["statusReason"]}
    for token in (before["tokenId"], minted["id"]):
        assert door.show_token(token).document["hosts"] == [number]
    # The old credential is good until the new one is first used, and not longer: that ends replays.
    assert door.beat(host["credential"]).status == 200
    assert enroll().status == 201
    assert door.beat(replies[1]["credential"]).status == 200
    assert door.beat(host["credential"]).code == "credential-superseded"
    assert [enroll().code, door.enroll(minted["token"]).code] == ["token-used"] * 2


def test_a_lost_reply_can_be_asked_for_again(door):
    minted = door.mint().document
    first = door.enroll(minted["token"], "web-1", "k", os="linux").document
    again = door.enroll(minted["token"], "other", "k", os="bsd", name="x").document
    assert (again["hostId"], again["name"]) == (first["hostId"], "web-1")
    assert again == first
    shown = door.host(first["hostId"]).document
    assert (shown["hostname"], shown["os"]) == ("web-1", "linux")
    assert door.show_token(minted["id"]).document["uses"] == 1
    refused = [door.enroll(minted["token"], key=key).code for key in ("other", "")]
    assert refused == ["token-used"] * 2
    assert door.beat(again["credential"]).status == 200


# fmt: off
REPLAYS = {
    # name: the token, which is used after 30 s; what is done then; the refusal
    "at once": ({}, lambda door, clock, it, host: None, None),
    "10 minutes after the use": (
        {"ttlSeconds": 60}, lambda door, clock, it, host: clock.advance(600), None),
    "1 ms later": (
        {"ttlSeconds": 60}, lambda door, clock, it, host: clock.advance(600.001), "token-used"),
    "with uses left": ({"ttlSeconds": 60, "maxUses": 2},
        lambda door, clock, it, host: clock.advance(600.001), "token-expired"),
    "at the token's end": ({}, lambda door, clock, it, host: clock.advance(3570), None),
    "1 ms after that": ({}, lambda door, clock, it, host: clock.advance(3570.001), "token-used"),
    "a day after the use": (
        {"ttlSeconds": 172_800}, lambda door, clock, it, host: clock.advance(86_400), None),
    "a day and 1 ms": ({"ttlSeconds": 172_800},
        lambda door, clock, it, host: clock.advance(86_400.001), "token-used"),
    "after a beat":
        ({}, lambda door, clock, it, host: door.beat(host["credential"]), "token-used"),
    "token revoked": ({}, lambda door, clock, it, host: door.revoke_token(it), "token-revoked"),
    "host revoked": ({}, lambda door, clock, it, host: door.revoke(host["hostId"]), "token-used"),
    "host deleted": ({}, lambda door, clock, it, host: door.delete(host["hostId"]), "token-used"),
}
# fmt: on


@pytest.mark.parametrize("values, between, code", table(REPLAYS))
def test_a_replay_is_answered_until_the_first_beat_while_the_token_lives(
    values, between, code, door, clock
):
    """For ten minutes at least, and a day at most."""
    minted = door.mint(**values).document
    clock.now = NOON + 30
    host = door.enroll(minted["token"], key="k").document
    between(door, clock, minted["id"], host)
    reply = door.enroll(minted["token"], key="k")
    assert reply.code == code
    if code:  # a used token stays used, whatever becomes of the host
        assert door.enroll(minted["token"]).code == code
    else:
        assert reply.document["hostId"] == host["hostId"]


def test_a_replay_comes_from_the_hostname_that_the_token_is_bound_to(door, clock):
    token = door.token(hostname="db-1.lan")
    first = door.enroll(token, "db-1.lan", "k").document
    assert door.enroll(token, "DB-1.LAN.", "k").document == first
    assert door.enroll(token, "db-2.lan", "k").code == "token-host-mismatch"
    assert door.enroll(token, "db-1.lan", "k").document == first
    clock.advance(3600.001)  # its end is first
    assert door.enroll(token, "db-2.lan", "k").code == "token-used"


def test_a_token_enrolls_as_many_hosts_as_it_was_minted_for_each_with_its_replays(door):
    minted = door.mint(maxUses=3).document

    def enroll(key):
        return door.enroll(minted["token"], key=key)

    a, b = (enroll(key).document["hostId"] for key in "ab")
    again = enroll("a").document
    assert (again["hostId"], door.show_token(minted["id"]).document["uses"]) == (a, 2)
    door.beat(again["credential"])
    # A key is one request for ever: it never lets in a second host.
    assert enroll("a").code == "token-used"
    c = enroll("").document["hostId"]
    assert [enroll(key).code for key in ("d", "", "")] == ["token-used"] * 3
    shown = door.show_token(minted["id"]).document
    assert (shown["uses"], sorted(shown["hosts"])) == (3, sorted({a, b, c}))


def test_last_seen_never_goes_back(door, clock):
    host = enrolled(door)
    clock.advance(100)
    latest = door.beat(host["credential"]).document["lastSeen"]
    for facts in ({}, {"os": "linux"}, {}):
        clock.advance(-30)
        assert door.beat(host["credential"], **facts).document["lastSeen"] == latest
        shown = door.host(host["hostId"]).document
        assert (shown["lastSeen"], shown["status"]) == (latest, "online")
    for ahead, is_kept in ((300, True), (300.001, False)):  # written by a clock that was far ahead
        clock.now = NOON + 100 - ahead
        seen = door.beat(host["credential"]).document["lastSeen"]
        assert door.host(host["hostId"]).document["lastSeen"] == seen
        assert (seen == latest) is is_kept
    assert door.events("action=supersede").document["events"] == []
    clock.now = NOON + 100.001
    assert door.beat(host["credential"]).document["lastSeen"] > latest


# What was looked up before the tick may have changed when it comes.


@pytest.mark.parametrize("change, key, codes", [
    ("revoke", "", ["token-revoked"]), ("revoke", "k", ["token-revoked"]),
    ("use", "", ["token-used"]), ("", "", [None, "token-used"]),
])  # fmt: skip
def test_a_token_lets_in_no_more_by_what_was_proved_before_the_tick(change, key, codes, world):
    """It changes between its proof and the tick, or two come in one tick."""
    minted = world.mint().document
    headers = [("Idempotency-Key", key)] if key else []
    body = {"token": minted["token"], "hostname": "late"}
    if key:
        world.enroll(minted["token"], key=key)
    request = request_bytes("POST", "/api/agent/enroll", body, headers=headers)
    late = [world.admit(request) for _ in codes]
    if change == "revoke":
        world.revoke_token(minted["id"])
    elif change == "use":
        world.enroll(minted["token"])
    hosts = world.sql("SELECT id, issued FROM host")
    outcomes = world.run(*late)
    assert [getattr(outcome, "code", None) for outcome in outcomes] == codes
    after = world.sql("SELECT id, issued FROM host")
    assert after[: len(hosts)] == hosts and len(after) == len(hosts) + codes.count(None)


def test_a_replay_whose_host_was_there_before_the_tick_is_an_enrollment_on_the_disk(world):
    token = world.token(maxUses=2)
    gone = world.enroll(token, key="k").document["hostId"]
    body = {"token": token, "hostname": "web-1"}
    headers = [("Idempotency-Key", "k")]
    late = world.admit(request_bytes("POST", "/api/agent/enroll", body, headers=headers))
    world.delete(gone)
    world.sql("PRAGMA synchronous = NORMAL")
    world.registry.engine._synchronous = "NORMAL"
    (outcome,) = world.run(late)
    assert hostenroll.id_text(outcome.host.id) != gone
    assert world.sql("PRAGMA synchronous") == [(2,)]


def test_an_api_key_that_is_revoked_between_look_up_and_tick_is_refused(world):
    number = world.api_key[4:20]
    requests = [
        request_bytes(it, "/api/hosts/tokens", None, world.api_key) for it in ("GET", "POST")
    ]
    late = [world.admit(request) for request in requests]
    world.act("revoke-api-key", number)
    refused = [outcome for work in late for outcome in world.run(work)]
    expected = ("api-key-invalid", f"api-key:{number}")
    assert [(problem.code, problem.actor) for problem in refused] == [expected] * 2
    assert world.sql("SELECT count(*) FROM token") == [(0,)]


# Serials and renewal.


def test_each_address_gets_a_serial_of_its_own_and_the_first_to_be_used_counts(renewing, clock):
    host, old = renewing.join()

    def renewed(credential, address=ADDRESS):
        renewing.address = address
        return renewing.beat(credential).document.get("credential")

    clock.advance(201)
    renewals = [renewed(old, f"192.0.2.{n}") for n in range(3)]
    assert [serial_of(renewing, new) for new in renewals] == [2, 3, 4]
    assert renewed(renewals[1]) is None
    for older in (old, renewals[0]):
        assert renewing.beat(older).code == "credential-superseded"
    clock.advance(201)
    third = renewed(renewals[1])
    assert serial_of(renewing, third) == 5
    # An old copy cannot be renewed past a re-enrollment.
    newest = reenrolled(renewing, host)
    assert serial_of(renewing, newest) == 5 + hostenroll.SERIALS_LOST + 1
    clock.advance(201)
    assert [renewed(copied) for copied in (renewals[1], third)] == [None, None]
    assert serial_of(renewing, renewed(newest)) == 5 + hostenroll.SERIALS_LOST + 2
    assert renewing.beat(third).code == "credential-superseded"


def test_a_serial_that_we_do_not_know_of_shuts_no_host_out_for_good(world):
    """It was issued after a backup that was restored since, or a thief of the key file signed it:
    a re-enrollment must be able to exceed it, whether it was used or not."""
    lost = hostenroll.SERIALS_LOST
    sign = world.registry.keys.keyring.first.sign
    for is_used in (False, True):
        host, credential = world.join()
        claims = world.registry.keys.authenticate(credential, world.clock.ms)
        for serial in (2 + lost, 999_999_999_999):
            assert world.beat(sign(claims._replace(serial=serial))).code == "credential-invalid"
        last = sign(claims._replace(serial=1 + lost))
        assert not is_used or world.beat(last).status == 200
        fresh = reenrolled(world, host)
        codes = [world.beat(it).code for it in (fresh, last, fresh)]
        assert codes == [None, "credential-superseded", None]


def asking(world, kind):
    """A function that asks for one credential again and again: of an enrollment, or of a renewal
    that is due. What it gets, and the level of synchronous that the tick had."""
    token = world.token(ttlSeconds=86_400)
    first = world.enroll(token, key="k").document["credential"]

    def ask():
        replay = world.enroll(token, key="k") if kind == "replay" else world.beat(first)
        return replay.document["credential"], world.sql("PRAGMA synchronous")[0][0]

    if kind == "renew":
        world.advance(201)
        ask()
    return ask


def swap_keys_for_a_moment(world):
    keyring = world.registry.keys.keyring
    rotate(world)
    write(world.paths[1], keyring)
    world.registry.keys.reload()


# fmt: off
REPEATS = {
    # name: what happens between the two, and whether they get the same
    "at once": (lambda world: None, True),
    "a second before its end": (lambda world: world.advance(299), True),
    "its end": (lambda world: world.advance(300), False),
    "a clock 1 ms back": (lambda world: world.advance(-0.001), False),
    "another address": (lambda world: setattr(world, "address", "192.0.2.9"), False),
    "a restart": (lambda world: world.reopen(credential_ttl=300), True),
    "another key": (lambda world: rotate(world), False),
    "another key, and the old key file": (swap_keys_for_a_moment, True),
    "another lifetime": (lambda world: world.reopen(credential_ttl=301), False),
    "no lifetime": (lambda world: world.reopen(credential_ttl=None), False),
    "a row of schema 2": (lambda world: world.sql(
        "UPDATE host SET issued_at = 0, issued_hash = NULL"), False),
}
# fmt: on


@pytest.mark.parametrize("kind", ["replay", "renew"])
@pytest.mark.parametrize("between, is_same", table(REPEATS))
def test_what_is_asked_for_again_is_the_same_bytes_or_a_new_serial(
    between, is_same, kind, renewing
):
    """The same takes no event and no wait for the disk; a new one is committed before it is
    answered, and is then itself the one that comes again."""
    renewing.clock.now = NOON + 0.7
    ask = asking(renewing, kind)
    first, before = ask()[0], len(renewing.audit(kind))
    between(renewing)
    again, synchronous = ask()
    serials = [serial_of(renewing, credential) for credential in (first, again)]
    assert (again == first, serials[1] - serials[0]) == (is_same, not is_same)
    assert synchronous == (1 if is_same else 2)
    assert len(renewing.audit(kind)) == before + (not is_same)
    assert ask() == (again, 1)
    if kind == "renew":
        assert renewing.sql("SELECT last_seen FROM heartbeat")[0][0] >= renewing.clock.ms
    assert renewing.beat(again).status == 200 and verified(renewing)


@pytest.mark.parametrize("seconds, is_same", [(3599.999, True), (3600, False)])
def test_a_credential_without_an_end_is_given_again_for_an_hour(seconds, is_same, world):
    token = world.token(ttlSeconds=86_400)
    first = world.enroll(token, key="k").document
    world.advance(seconds)
    assert (world.enroll(token, key="k").document == first) == is_same


@pytest.mark.parametrize("kind", ["replay", "renew"])
def test_two_servers_on_one_database_repeat_the_same_credential(kind, renewing, paths, clock):
    ask, servers = asking(renewing, kind), [renewing.registry]
    first = ask()[0]
    with opened(paths, clock, credential_ttl=300) as other:
        servers.append(other)
        for registry in servers * 2:
            renewing.registry, renewing.api = registry, hostenroll.Api(registry)
            assert ask() == (first, 1)
        renewing.registry = servers[0]


@pytest.mark.parametrize("kind", ["replay", "renew"])
def test_addresses_that_alternate_get_twelve_credentials_an_hour(kind, renewing):
    ask, got = asking(renewing, kind), []
    fresh = 12 - len(renewing.audit(kind))
    for n in range(40):
        renewing.address = f"192.0.2.{n}"
        got.append(ask())
    assert len(set(got[:fresh])) == fresh and {level for _, level in got[:fresh]} == {2}
    assert set(got[fresh:]) == {(got[fresh - 1][0], 1)}
    assert len(renewing.audit(kind)) == 12
    renewing.advance(3600)
    renewing.housekeeping()
    assert ask()[0] not in dict(got)


def test_a_credential_that_is_due_is_not_exchanged_for_that_of_a_re_enrollment(renewing, clock):
    host, old = renewing.join()
    renewing.beat(old)
    newest = reenrolled(renewing, host)
    clock.advance(201)
    for _ in range(2):
        assert "credential" not in renewing.beat(old).document
    assert serial_of(renewing, renewal(renewing, newest)) > serial_of(renewing, newest)


GRACE = 7 * 86400


@pytest.mark.parametrize("age, outcome", table({
    "two thirds": (200, "beats"),
    "1 ms more": (200.001, "renews"),
    "at its end": (300, "renews"),
    "7 days on": (300 + GRACE, "renews"),
    "7 days and 1 ms": (300 + GRACE + 0.001, "expired"),
}))  # fmt: skip
def test_a_credential_is_renewed_in_its_last_third_and_a_week_after(age, outcome, renewing, clock):
    _, credential = renewing.join()
    clock.now = NOON + age
    now, expires = (hostenroll.rfc3339(it) for it in (clock.ms, (clock.ms // 1000 + 300) * 1000))
    document = renewing.beat(credential).document
    names = "code", "lastSeen", "credentialExpiresAt"
    assert [document.get(name) for name in names] == {
        "beats": [None, now, None],
        "renews": [None, now, expires],
        "expired": ["credential-expired", None, None],
    }[outcome]
    assert ("credential" in document) == (outcome == "renews")
    seen = 0 if outcome == "expired" else clock.ms
    assert renewing.sql("SELECT last_seen FROM heartbeat") == [(seen,)]


@pytest.mark.parametrize("old, new, age, renews, ends", table({
    "none to one": (None, 300, 0, True, True),
    "shorter": (600, 300, 0, True, True),
    "the same": (300, 300, 0, False, None),
    "longer": (300, 600, 0, False, None),
    "longer, in the last third": (300, 600, 201, True, True),
    "one to none": (300, None, 0, False, None),
    "one to none, in the last third": (300, None, 201, True, False),
    "none at all": (None, None, 10 * GRACE, False, None),
}))  # fmt: skip
def test_another_lifetime_reaches_the_fleet_by_renewal(old, new, age, renews, ends, paths, clock):
    with World(paths, clock, credential_ttl=old) as world:
        _, credential = world.join()
        clock.advance(age)
        world.reopen(credential_ttl=new)
        document = world.beat(credential).document
        assert ("credential" in document) == renews
        if renews:
            assert (document["credentialExpiresAt"] is not None) == ends
            assert "credential" not in world.beat(document["credential"]).document


# Status and the service period.

NOON_MS = int(NOON * 1000)
WEEK_MS = 7 * DAY_MS


@pytest.mark.parametrize("told, silence, status", [
    (30, -5000, "online"), (30, 0, "online"), (30, 99_999, "online"), (30, 100_000, "online"),
    (30, 100_001, "offline"), (30, WEEK_MS - 1, "offline"), (30, WEEK_MS, "offline"),
    (30, WEEK_MS + 1, "missing"), (1, 13_000, "online"), (1, 13_001, "offline"),
    (3600, 10_810_000, "online"), (3600, 10_810_001, "offline"),
])  # fmt: skip
def test_status_follows_from_silence_to_the_millisecond(told, silence, status):
    """And from the interval that the host was told, whatever the server says now."""
    now = NOON_MS + silence
    for row in (hostenroll.Service(NOON_MS - 1, now, NOON_MS - 1, 30, ""), None):
        judge = hostenroll.ServicePeriod(row, now).status
        judged = judge(NOON_MS, None, told), judge(NOON_MS, NOON_MS, told), judge(0, None, told)
        assert judged == (status, "revoked", "pending")


@pytest.mark.parametrize("silence, revoked_at, reason", [
    (95_000, None, "last seen 95 s ago, within 3 x 30 s + 10 s"),
    (150_000, None, "last seen 150 s ago, more than 3 x 30 s + 10 s"),
    (8 * DAY_MS, None, "last seen 8 d ago, more than 3 x 30 s + 10 s"),
    (0, NOON_MS, "revoked at 2027-01-15T08:00:00.000Z"),
])  # fmt: skip
def test_the_reason_is_a_sentence_with_the_numbers(silence, revoked_at, reason):
    period = hostenroll.ServicePeriod(None, NOON_MS + silence)
    assert period.reason(NOON_MS, revoked_at, 30) == reason


@pytest.mark.parametrize("gap, last_seen, silence", [
    (60_000, 49_999, 1), (60_000, 0, 50_000), (60_000, -1, 50_000), (60_000, -60_000, 50_000),
    (60_000, -60_001, 50_001), (60_000, 350_000, 0), (60_000, 350_001, 50_000),
    (0, -1, 50_001), (-400_000, 390_000, 60_000), (-400_000, 401_000, 50_000),
])  # fmt: skip
def test_silence_counts_what_a_server_could_hear_to_the_millisecond(gap, last_seen, silence):
    """In a period that began at noon, 50 s ago; a gap below 0 is a clock that was set back."""
    now = NOON_MS + 50_000
    service = hostenroll.Service(NOON_MS, now, NOON_MS - gap, 30, "")
    assert hostenroll.ServicePeriod(service, now).silence_ms(NOON_MS + last_seen, 30)[0] == silence


def start(world, url="http://here"):
    """A server starts."""
    call = Call(hostenroll.START_SERVICE, values={"url": url})
    world.registry.perform(call, world.clock.ms)


def keep_alive(world):
    world.perform(world.registry.service.keep_alive)


# What hosts and operators hear of the server's certificate.

PINS = [pin_of(pair) for pair in PAIRS]
BOTH = ";".join(PINS)
KEY_CHANGES = {  # what was pinned, the key and the pin now, whether it is said, what is remembered
    "the same key": (PINS[0], PINS[0], PINS[0], False, PINS[0]),
    "another": (PINS[0], PINS[1], PINS[1], True, PINS[1]),
    "the next one": (BOTH, PINS[1], PINS[1], False, PINS[1]),
    "the next one, with one more": (BOTH, PINS[1], BOTH, False, BOTH),
    "the same, no longer pinned": (PINS[0], PINS[0], "", False, PINS[0]),
    "another, not pinned": (PINS[0], PINS[1], "", True, ""),
    "any, where none was pinned": ("", PINS[1], "", False, ""),
    "any, pinned for the first time": ("", PINS[1], PINS[1], False, PINS[1]),
    "any, after odd text": ("\x1b[2J'; id\n", PINS[1], "", True, ""),
    "a part of one": (PINS[0], PINS[0][:-1], "", True, ""),
}


@pytest.mark.parametrize("how", sample({"start": "start", "SIGHUP": "SIGHUP"}, "SIGHUP"))
@pytest.mark.parametrize("pinned, key, pin, is_said, then", table(KEY_CHANGES))
def test_a_key_that_agents_have_not_pinned_is_an_error_and_an_event(
    pinned, key, pin, is_said, then, how, world, caplog
):
    announce(world, PINS[0], "")
    start(world)
    world.housekeeping()
    world.sql("UPDATE service SET pin = ?, pinned = ?", pinned, pinned)
    announce(world, key, pin)
    if how == "start":
        start(world)
    for _ in range(3):
        world.housekeeping()
    lines = [line for line in caplog.messages if "has another key" in line]
    assert len(lines) == is_said and not hostenroll.UNPRINTABLE.search("".join(lines))
    events = [(event["detail"], event["subject"]) for event in world.audit("certificate")]
    assert events == ([({"pinned": pinned, "pin": key}, None)] if is_said else [])
    assert world.sql("SELECT pin, pinned FROM service") == [(pin, then)]
    assert not is_said or "agent-command" in lines[0]


def test_what_agents_have_pinned_is_remembered_while_a_server_without_tls_runs(world, caplog):
    announce(world, PINS[0])
    start(world)
    world.reopen()
    start(world)
    assert world.sql("SELECT pin, pinned, certificate_ends FROM service") == [("", PINS[0], 0)]
    announce(world, PINS[1])
    start(world)
    assert "has another key" in caplog.text


def test_from_21_days_before_its_end_a_certificate_is_warned_of_once_a_day(world, caplog):
    day, warned = 86_400, []
    announce(world, PINS[0], ends=world.clock.ms + 22 * day * 1000)
    start(world)
    for hour in range(0, 24 * 24 + 8, 8):
        if hour % 5 == 0:  # whatever is restarted
            start(world)
        world.housekeeping()
        if len(world.audit("certificate")) > len(warned):
            warned.append(hour)
        world.advance(8 * 3600)
    assert warned == [24 * n for n in range(1, 25)]
    events = world.audit("certificate")
    lines = [line for line in caplog.messages if line.startswith("the certificate's end is 2027-")]
    assert len(lines) == len(events) == 24 and events[0]["detail"] == {
        "endsAt": "2027-02-06T08:00:00.000Z"
    }
    assert (events[0]["actor"], events[0]["organizationId"]) == ("server", None)
    announce(world, PINS[0], ends=world.clock.ms + 20 * day * 1000)  # is told at once
    for _ in range(3):
        world.housekeeping()
    assert len(world.audit("certificate")) == 25
    announce(world, PINS[0], ends=world.clock.ms + 90 * day * 1000)
    world.housekeeping()
    world.advance(2 * day)
    world.housekeeping()
    assert len(world.audit("certificate")) == 25


def test_a_clock_that_is_set_back_keeps_no_warning_of_a_certificate_back(world, caplog):
    announce(world, PINS[0], ends=world.clock.ms + 1000)
    start(world)
    world.housekeeping()
    world.advance(-3 * 86_400)
    world.housekeeping()
    assert sum("the certificate's end" in line for line in caplog.messages) == 2


def test_check_says_when_the_certificate_ends(world):
    names = [finding.name for finding in hostenroll.examine(*world.paths)]
    start(world)
    assert [it.name for it in hostenroll.examine(*world.paths)] == names  # without TLS
    announce(world, PINS[0], ends=world.clock.ms)
    world.housekeeping()
    for now, is_good in ((world.clock.ms - 1, True), (world.clock.ms, False)):
        found = [*hostenroll.examine(*world.paths, now=now)]
        (named,) = [it for it in found if it.name not in names]
        assert (named.name, named.is_good) == ("certificate", is_good)
        assert hostenroll.rfc3339(world.clock.ms) in named.detail
    world.sql("UPDATE service SET certificate_ends = 'x'")
    assert {it.name for it in bad_in(world.paths)} == {"rows", "certificate"}


def live_on(world, seconds):
    """A server lives for so long, and writes so as one does."""
    for step in [10] * int(seconds // 10) + [seconds % 10]:
        world.advance(step)
        keep_alive(world)


def status_of(world, host):
    return world.act("show-host", host).status


def play(world, script):
    """The life of a server and its hosts, step by step; a status is asserted of all hosts. At the
    end, the reason for the status of the first."""
    hosts = [world.join()]

    def full(seconds):
        for _ in range(int(seconds) // 10):
            world.advance(10)
            with faulty(world.registry, only="BEGIN IMMEDIATE"):
                with pytest.raises(hostenroll.StorageUnavailable):
                    keep_alive(world)

    acts = {  # gap: no server, or a clock that is set; full: nothing can be written
        "start": lambda _: start(world), "live": partial(live_on, world), "gap": world.advance,
        "full": full, "join": lambda _: hosts.append(world.join()),
        "beat": lambda _: world.beat(hosts[-1][1]),
        "own": lambda seconds: world.act("edit-host", hosts[-1][0], intervalSeconds=int(seconds)),
    }  # fmt: skip
    for step in script.split(", "):
        word, _, seconds = step.partition(" ")
        if word in acts:
            acts[word](float(seconds or 0))
        else:
            assert [status_of(world, host) for host, _ in hosts] == [word] * len(hosts), step
    return world.act("show-host", hosts[0][0]).reason


@pytest.mark.parametrize("script, logged, reason", table({
    # what happens, how often the log has a clock that was set, the reason for the last status
    "the server's own downtime": (  # 60 s, the gap, 40 s, and 300 s for the way back
        "start, live 200, beat, live 60, gap 3600, online, start, online, live 340, online, "
        "live 0.0015, offline, beat, live 100, online, live 0.0015, offline", 0, ""),
    "a full disk for an hour": (
        "start, live 300, beat, live 10, full 3600, online, live 5, online, live 401, offline", 1,
        ""),
    "a crash loop": (  # a server that lives for seconds hears few hosts
        "start, live 200, beat, gap 3600, start, online, gap 2, join, beat, live 2, "
        "gap 15, start, online, gap 2, join, beat, live 2, "
        "gap 3600, start, online, gap 2, join, beat, live 2, "
        "gap 15, start, online, gap 2, join, beat, live 2, "
        "gap 15, start, online, live 731, offline", 0, ""),
    "a host that was offline before an outage": (
        "start, live 200, beat, live 100.001, offline, gap 360, start, offline, live 5, offline", 0,
        "last seen 105 s ago, more than 3 x 30 s + 10 s"),
    "the last millisecond online before an outage": (  # 20 s and 100 s; then the outage counts
        "start, live 200, beat, live 20, gap 50, start, live 130, online, live 0.0015, offline", 0,
        "last seen 150 s ago, more than 3 x 30 s + 10 s + 50 s after a pause of the server"),
    "two outages in a row": (  # who waits for 300 s is online when the second one begins
        "start, live 200, beat, gap 360, start, live 150, online, gap 360, start, online, "
        "live 549, online, live 2, offline", 0, ""),
    "two outages, and one who did not come back between them": (
        "start, live 200, beat, gap 60, start, live 161, offline, gap 360, start, offline", 0, ""),
    "an hour's interval, and periods that are too short for it": (
        "start, own 3600, beat, live 20, gap 36000, start, live 500, online, gap 36000, start, "
        "live 500, online", 0, ""),
    "servers that live longer than they rest, in a loop": (
        "start, live 200, beat" + ", gap 11, start, live 60" * 2 + ", online"
        + ", gap 11, start, live 60" * 16 + ", offline", 0, ""),
    "a server that hardly ever lives": (
        "start, live 200, beat" + ", gap 20, start, live 15" * 18 + ", online, live 300, offline",
        0, ""),
    "a gap soon after the clock was set back": (  # not the gap before it, which lies ahead now
        "start, live 200, gap -3600, live 0, beat, live 20, gap 7200, start, online", 1, ""),
    "a clock that is set ahead": (
        "start, live 300, beat, live 10, gap 18000, online, live 5, online, live 401, offline", 1,
        ""),
    "a clock that is set back": (
        "start, live 300, beat, live 10, gap -18000, online, live 5, online, live 30, beat, "
        "online, live 101, offline", 1, ""),
    "a clock that is set ahead and back": (
        "start, live 300, beat, live 10, gap 18000, online, live 30, beat, live 10, gap -18000, "
        "online, live 5, online, beat, live 101, offline", 2, ""),
    "a clock that is set years ahead and back": (
        "start, live 300, beat, live 10, gap 9e8, online, live 400, beat, live 10, gap -9e8, "
        "online, live 5, online, beat, live 101, offline", 2, ""),
    "a clock that is set back and ahead": (
        "start, live 300, beat, live 10, gap -18000, online, live 400, beat, live 10, gap 18000, "
        "online, live 5, online, live 401, offline", 2, ""),
    "a clock of before there were ids": (
        "start, live 300, beat, live 10, gap -1799999940, online, live 5, online, beat, live 101, "
        "offline", 1, ""),
    "a dead host and a clock that is set back": (
        "start, beat, live 3600, offline, gap -18000, offline, live 5, offline", 1,
        "last seen at 2027-01-15T08:00:00.000Z: the clock has gone back 60 min ago or more, more "
        "than 3 x 30 s + 10 s"),
    "a beat while the clock was ahead": (
        "gap 259200, beat, gap -172800, online", 0,
        "last seen at 2027-01-18T08:00:00.000Z: the clock has gone back"),
}))  # fmt: skip
def test_only_what_a_server_could_have_heard_is_a_hosts_silence(
    script, logged, reason, world, caplog
):
    assert play(world, script) == reason or not reason
    assert caplog.text.count("the clock was set") == logged


def lives_at(outages, now):
    return not any(start <= now < end for start, end in outages)


def service_rows(outages, until):
    """The row that servers keep, for each second; outages: from when to when no server lives."""
    row = hostenroll.Service(0, 0, 0, 30, "")
    for now in range(until):
        if lives_at(outages, now):
            if now * 1000 - row.alive > 10_000:
                row = hostenroll.next_period(row, now * 1000)
            elif now % 10 == 0:
                row = row._replace(alive=now * 1000)
        yield row


def live_by_the_rule(told, rows, draw, hears):
    """An agent as the contract has it; before each attempt: when that is, and its status then.
    Between two attempts no status is worse."""
    seen, failures, now = 1, 0, draw.uniform(1, 1.15 * told)
    longest = min(300, max(10, 2 * told))
    while now < len(rows):
        period = hostenroll.ServicePeriod(rows[int(now)], int(now * 1000))
        yield now, period.status(seen, None, told)
        if hears(now):
            seen, failures = int(now * 1000), 0
            now += draw.uniform(0.85 * told, 1.15 * told)
        else:
            now += draw.uniform(1, max(1, min(2**failures, longest)))
            failures += 1


@pytest.mark.parametrize("told, outages", table({
    "six minutes": (30, [(400, 760)]),
    "five seconds": (30, [(400, 405)]),
    "an hour": (30, [(400, 4000)]),
    "two in a row": (30, [(400, 760), (820, 1300)]),
    "a crash loop": (30, [(400, 1000), *((n, n + 58) for n in range(1002, 3000, 60))]),
    "a loop of longer lives": (30, [(n, n + 15) for n in range(400, 3000, 60)]),
    "an interval of five minutes": (300, [(400, 760), (1000, 1100)]),
    "an interval of an hour": (3600, [(4000, 24000), (24400, 30000), (30100, 30200)]),
}))  # fmt: skip
def test_after_an_outage_nobody_alive_is_offline_for_a_moment(told, outages):
    rows = list(service_rows(outages, outages[-1][1] + 3 * told + 300))
    for seed in range(30):
        draw = random.Random(seed)
        lives = live_by_the_rule(told, rows, draw, partial(lives_at, outages))
        assert [now for now, status in lives if status != "online"] == [], seed


def test_after_an_outage_of_the_network_hosts_are_offline_and_soon_back():
    rows = list(service_rows([], 1200))
    for seed in range(30):
        lives = live_by_the_rule(30, rows, random.Random(seed), lambda now: not 400 <= now < 1000)
        offline = [now for now, status in lives if status == "offline"]
        assert 465 < offline[0] <= 400 + 101 + 60 and 1000 <= offline[-1] <= 1000 + 2 * 30 + 40


@pytest.mark.parametrize("text, pauses", [
    ("", 0), ("1799999000000-1799999100000", 1), ("junk 5-6 -7-8- 9-", 2), ("9" * 99, 0),
])  # fmt: skip
def test_pauses_that_we_never_wrote_break_nothing(text, pauses):
    row = hostenroll.Service(NOON_MS, NOON_MS, NOON_MS, 30, "", pauses=text)
    assert len(hostenroll.pauses_of(row)) == pauses
    assert hostenroll.ServicePeriod(row, NOON_MS).status(1, None, 30) == "missing"
    assert hostenroll.next_period(row, NOON_MS + 99_000).previous_alive == NOON_MS


def test_so_many_pauses_are_kept_and_the_two_with_the_least_between_them_become_one():
    row, minute = hostenroll.Service(0, 0, 0, 30, ""), 60_000
    pauses = [((2 * n - 1) * minute, 2 * n * minute) for n in range(1, 19)]
    pauses[9] = 18.5 * minute, 20 * minute
    for end, start in pauses:
        row = hostenroll.next_period(row._replace(alive=int(end)), start)
    pauses[8:10] = [(17 * minute, 20 * minute)]
    assert hostenroll.pauses_of(row) == pauses and len(pauses) == hostenroll.PAUSES_KEPT + 1
    for lived, kept in ((WEEK_MS, 1), (WEEK_MS + 1, 0)):
        later = row._replace(alive=row.started + lived)
        assert len(hostenroll.next_period(later, later.alive + minute).pauses.split()) == kept
    back = hostenroll.next_period(row, 20 * minute)  # the clock: the later ones lie ahead
    assert hostenroll.pauses_of(back) == pauses[:9]


# The interval of a host.


def tells(door, credential, interval, **facts):
    """Whether the answer to a heartbeat tells an interval, 15 % more or less."""
    reply = door.beat(credential, **facts)
    assert reply.status == 200, reply
    return 85 * interval <= 100 * reply.document["nextHeartbeatSeconds"] <= 115 * interval


def test_a_host_goes_by_its_rhythm_then_its_own_interval_then_that_of_the_server(door, clock):
    minted = door.mint(intervalSeconds=1000).document
    assert minted["intervalSeconds"] == 1000
    enrolled = door.enroll(minted["token"]).document
    host, credential = enrolled["hostId"], enrolled["credential"]
    assert enrolled["heartbeatIntervalSeconds"] == 1000 and tells(door, credential, 1000)
    shown = door.host(host).document
    assert (shown["intervalSeconds"], shown["everySeconds"]) == (1000, None)

    def edit(interval):
        reply = door.ask("PATCH", f"/api/hosts/{host}", {"intervalSeconds": interval})
        assert reply.document["intervalSeconds"] == interval

    edit(300)
    assert tells(door, credential, 300) and tells(door, credential, 300)
    assert tells(door, credential, 60, everySeconds=60) and tells(door, credential, 60)
    edit(5000)
    assert tells(door, credential, 60)
    assert tells(door, credential, 5000, everySeconds=None) and tells(door, credential, 5000)
    edit(None)
    assert tells(door, credential, 30) and tells(door, credential, 30)
    assert door.host(host).document["statusReason"].endswith("within 3 x 30 s + 10 s")
    enrolled = door.enroll(door.token(intervalSeconds=300), everySeconds=86400).document
    assert enrolled["heartbeatIntervalSeconds"] == 86400
    events = door.events(f"action=edit&subject=host:{host}").document["events"]
    assert [event["detail"] for event in reversed(events)] == [
        {"intervalSeconds": 300}, {"facts": {"everySeconds": 60}}, {"intervalSeconds": 5000},
        {"facts": {"everySeconds": None}}, {"intervalSeconds": "none"},
    ]  # fmt: skip


@pytest.mark.parametrize("value", [0, -1, 1.5, "60", 86_401, True, False, [], {}, 1e300, ""])
def test_a_rhythm_that_is_none_is_refused(value, world):
    host, credential = world.join(everySeconds=60)
    assert world.enroll(world.token(), everySeconds=value).code == "invalid-body"
    assert world.beat(credential, everySeconds=value, os="new").code == "invalid-body"
    shown = world.host(host).document
    assert (shown["lastSeen"], shown["everySeconds"], shown["os"]) == (None, 60, "")
    for name in ("intervalSeconds", "everySeconds"):
        assert world.mint(**{name: value}).code == "invalid-body"


@pytest.mark.parametrize("value", [b"60", b"60.0", b"6e1"])
def test_a_rhythm_is_read_as_json_may_write_it(value, world):
    host, credential = world.join()
    path = "/api/agent/heartbeat"
    assert world.call("POST", path, b'{"everySeconds": %b}' % value, credential).status == 200
    assert world.host(host).document["everySeconds"] == 60


@pytest.mark.parametrize("old, new", [(300, 30), (30, 300), (30, 31)])
def test_each_host_is_judged_by_the_interval_that_it_was_last_told(old, new, paths, clock):
    """Of five, each is online until it was due by that, and 2 intervals and 10 s more; then by the
    new one, which its next heartbeat brings."""
    with World(paths, clock, interval=old) as world:
        start(world)
        hosts = [world.join(f"web-{n}") for n in range(5)]
        for _, credential in hosts:
            world.beat(credential)
            live_on(world, old / 5)
        assert tells(world, hosts[0][1], old)
        world.reopen(interval=new)
        start(world)
        live_on(world, 3 * old + 10 - 4 * old / 5)
        assert {status_of(world, host) for host, _ in hosts} == {"online"}
        assert world.act("list-hosts", status="online").items[4].host.told_interval == old
        world.advance(0.001)
        assert counted(world).counts == {("default", "online"): 4, ("default", "offline"): 1}
        for host, credential in hosts:
            assert tells(world, credential, new)
            assert world.act("show-host", host).host.told_interval == new
        live_on(world, 3 * new + 10)
        assert {status_of(world, host) for host, _ in hosts} == {"online"}
        world.advance(0.002)
        assert {status_of(world, host) for host, _ in hosts} == {"offline"}


def test_a_fleet_hears_of_a_new_interval_in_few_statements_without_the_disk(paths, clock):
    with World(paths, clock, interval=30) as world:
        hosts = [world.join(f"web-{n}") for n in range(40)]
        world.act("edit-host", hosts[0][0], intervalSeconds=60)
        beats = [world.heartbeat(credential) for _, credential in hosts]
        for _ in range(2):  # the first is durable
            assert world.run(*beats) == [clock.ms] * 40
        with faulty(world.registry) as plain:
            assert world.run(*beats) == [clock.ms] * 40
        events = world.audit()
        world.reopen(interval=300)
        with faulty(world.registry, only="PRAGMA synchronous = FULL") as corrected:
            assert world.run(*beats) == [clock.ms] * 40
        assert corrected.count == plain.count + 4 + 1  # the first tick sets PRAGMA synchronous
        with faulty(world.registry) as again:
            assert world.run(*beats) == [clock.ms] * 40
        assert again.count == plain.count
        assert world.audit() == events and world.registry.metrics.counts["heartbeats"] == 80
        told = world.sql("SELECT told_interval, count(*) FROM heartbeat GROUP BY 1")
        assert told == [(60, 1), (300, 39)]


def test_two_servers_with_two_intervals_tell_each_their_own_and_an_edit_reaches_both(world, paths):
    host, credential = world.join()
    with World(paths, world.clock, interval=300) as other:
        for _ in range(3):
            assert tells(other, credential, 300) and tells(other, credential, 300)
            assert world.act("show-host", host).host.told_interval == 300
            assert tells(world, credential, 30) and tells(world, credential, 30)
            assert other.act("show-host", host).host.told_interval == 30
        other.act("edit-host", host, intervalSeconds=1000)
        assert world.act("show-host", host).host.told_interval == 30
        assert tells(world, credential, 1000) and tells(other, credential, 1000)
        world.act("edit-host", host, intervalSeconds=None)
        assert tells(other, credential, 300) and tells(world, credential, 30)
        assert len(world.audit("edit")) == 2


@pytest.mark.parametrize("beats", [0, 2])
def test_an_edit_of_a_host_that_is_shut_out_lets_it_not_in_and_is_told_once_it_is_restored(
    beats, world
):
    host, credential = world.join()
    assert tells(world, credential, 30)
    world.revoke(host)
    world.act("edit-host", host, intervalSeconds=300)
    assert [world.beat(credential).code for _ in range(beats)] == ["host-revoked"] * beats
    assert not beats or world.beat(credential, everySeconds=60).code == "host-revoked"
    world.restore(host)
    assert world.act("show-host", host).host.told_interval == 30
    assert tells(world, credential, 300)


def test_of_a_host_that_re_enrolls_the_interval_stays_unless_the_token_has_one(world):
    host, old = world.join(everySeconds=60)
    world.act("edit-host", host, intervalSeconds=300)
    world.beat(old, everySeconds=None)
    path = f"/api/hosts/{host}/reenroll"
    before = 300
    for values, interval in (({}, 300), ({"intervalSeconds": 1000}, 1000), ({}, 1000),
                             ({"intervalSeconds": 90}, 90)):  # fmt: skip
        token = world.ask("POST", path, values).document["token"]
        enrolled = world.enroll(token).document
        assert enrolled["heartbeatIntervalSeconds"] == interval
        # Its answer may be lost, and the old credential go on; it may arrive, and the host wait.
        assert world.act("show-host", host).host.told_interval == max(before, interval)
        assert tells(world, old, interval)
        old, before = enrolled["credential"], interval
        assert tells(world, old, interval)
    for every, interval in ((50, 50), (None, 90)):
        token = world.ask("POST", path, {}).document["token"]
        answer = world.enroll(token, everySeconds=every).document
        assert answer["heartbeatIntervalSeconds"] == interval


def test_a_copy_with_an_old_credential_is_told_nothing_for_its_host(world):
    host, credential = world.join()
    newer = world.heartbeat(credential, serial=2)
    assert world.run(newer) == [world.clock.ms]
    world.act("edit-host", host, intervalSeconds=5)
    assert world.beat(credential).code == "credential-superseded"
    assert world.act("show-host", host).host.told_interval == 30
    assert world.run(newer) == [world.clock.ms]
    assert world.act("show-host", host).host.told_interval == 5


def test_what_hosts_were_told_fills_no_memory_and_is_told_right_all_the_same(world, monkeypatch):
    monkeypatch.setattr(hostenroll, "CREDENTIALS_CACHED", 3)
    joined = [world.join(f"web-{n}", everySeconds=100 + n) for n in range(7)]
    for _ in range(3):
        for n, (_, credential) in enumerate(joined):
            assert tells(world, credential, 100 + n)
            assert len(world.registry.heartbeats._told) <= 3


BERLIN, PARIS, ROME = (Origin(f"198.51.100.{n}") for n in (1, 2, 3))


def beat_from(world, credential, origin):
    beat = world.heartbeat(credential)._replace(origin=origin)
    assert world.run(beat) == [world.clock.ms]


def place_of(world, host):
    """Where it is, since when, and by which key its heartbeats are compared."""
    row = world.act("show-host", host).host
    return row.address, row.address_since, row.address_key


def place(origin, since):
    return origin.address, since, hostenroll.address_key(origin.address)


ADDRESS_KEYS = {
    "none": ("", 0), "IPv4": ("192.0.2.7", 0xC0000207), "the last": ("255.255.255.255", 2**32 - 1),
    "IPv6": ("2001:db8::1", int(hashlib.sha256(b"2001:db8::1").hexdigest()[-16:], 16) % 2**62),
    "of a link": ("fe80::1%eth0", int(hashlib.sha256(b"fe80::1%eth0").hexdigest(), 16) % 2**62),
}  # fmt: skip


@pytest.mark.parametrize("address, key", table(ADDRESS_KEYS))
def test_an_address_is_compared_as_a_number_of_62_bits(address, key):
    assert hostenroll.address_key(address) == key


def test_a_host_has_the_address_of_its_last_heartbeat_and_where_it_enrolled(door, clock):
    host, credential = door.join()
    shown = door.host(host).document
    origin = shown["enrolledFrom"]
    assert ipaddress.ip_address(origin)
    assert (shown["address"], shown["addressSince"]) == (None, None)
    assert (shown["refusedAt"], shown["refusedCode"]) == (None, None)
    assert door.beat(credential).status == 200
    since = clock.ms
    clock.advance(40)
    assert door.beat(credential).status == 200
    shown = door.host(host).document
    assert (shown["address"], shown["addressSince"]) == (origin, hostenroll.rfc3339(since))
    assert door.events("action=move").document["events"] == []


@pytest.mark.parametrize("brings", [{}, {"os": "new"}], ids=["plain", "facts"])
def test_a_host_that_moves_is_where_it_is_now_and_that_is_an_event(brings, world):
    host, credential = world.join()
    world.beat(credential)
    world.advance(30)
    world.address = "198.51.100.2"
    assert world.beat(credential, **brings).status == 200
    assert place_of(world, host) == place(PARIS, world.clock.ms)
    assert world.host(host).document["enrolledFrom"] == ADDRESS
    (event,) = world.audit("move")
    assert event["detail"] == {"from": ADDRESS, "to": "198.51.100.2"}
    assert (
        event["address"] == world.address and event["actor"] == event["subject"] == f"host:{host}"
    )
    world.beat(credential)
    with faulty(world.registry) as plain:
        assert world.beat(credential).status == 200
    assert plain.count == 3


def test_a_host_that_alternates_is_written_once_in_ten_minutes_and_costs_what_others_cost(world):
    host, credential = world.join()
    for origin in (BERLIN, PARIS):
        beat_from(world, credential, origin)
    since = world.clock.ms
    assert place_of(world, host) == place(PARIS, since)
    beat_from(world, credential, BERLIN)
    assert place_of(world, host)[:2] == (PARIS.address, since)
    with faulty(world.registry) as plain:
        for origin in (BERLIN, PARIS, ROME, BERLIN):
            beat_from(world, credential, origin)
    assert plain.count == 4 * 3
    # A stray that has all of a tick looked at changes nothing of it.
    stranger = world.heartbeat(credential, host=1)
    world.run(world.heartbeat(credential)._replace(origin=PARIS), stranger)
    with faulty(world.registry) as plain:
        beat_from(world, credential, BERLIN)
    assert plain.count == 3
    world.clock.now = (since + 599_999) / 1000
    beat_from(world, credential, BERLIN)
    assert place_of(world, host)[:2] == (PARIS.address, since)
    world.advance(0.001)
    beat_from(world, credential, BERLIN)
    assert place_of(world, host) == place(BERLIN, since + 600_000)
    beat_from(world, credential, PARIS)
    world.advance(600)  # who stays there from now on is compared by it again
    beat_from(world, credential, BERLIN)
    assert place_of(world, host) == place(BERLIN, since + 600_000)


def test_the_moves_of_a_host_are_one_event_an_hour_and_the_others_a_number(world):
    _, credential = world.join()
    beat_from(world, credential, BERLIN)
    for n, wait in enumerate((700, 700, 700, 700, 799.999, 600.001, 3600)):
        beat_from(world, credential, (PARIS, BERLIN)[n % 2])
        assert len([it for it in world.audit("move") if "from" in it["detail"]]) == 1 + (n > 5)
        world.advance(wait)
    world.housekeeping()
    moves = world.audit("move")
    assert [it["detail"]["to"] for it in moves if "to" in it["detail"]] == [PARIS.address] * 2
    summed = [event for event in moves if "more" in event["detail"]]
    assert sum(event["detail"]["more"] for event in summed) == 5
    assert {event["actor"] for event in summed} == {"server"}


def test_a_new_proxy_moves_a_fleet_in_few_statements_without_the_disk_and_with_sixty_events(world):
    fill(world, 80)
    assert beat_all(world, range(1, 81)) == [world.clock.ms] * 80
    assert world.audit("move") == []
    world.advance(61)
    reference = hostenroll.CredentialRef(1, "default", world.registry.keys.keyring.first.kid)
    beats = [hostenroll.Heartbeat(n << 8, reference, PARIS) for n in range(1, 81)]
    with faulty(world.registry, only="PRAGMA synchronous = FULL") as moved:
        assert world.run(*beats) == [world.clock.ms] * 80
    assert moved.count <= 3 + 4 + 1 + 4
    with faulty(world.registry) as plain:
        assert world.run(*beats) == [world.clock.ms] * 80
    assert plain.count == 3
    assert world.sql("SELECT address, count(*) FROM host GROUP BY 1") == [(PARIS.address, 80)]
    assert len(world.audit("move")) == 60
    world.advance(61)
    world.housekeeping()
    assert world.audit("move")[60]["detail"]["more"] == 20 and len(world.audit("move")) == 61


def test_who_is_refused_moves_no_host(world):
    host, credential = world.join()
    newer = world.heartbeat(credential, serial=2)
    world.run(newer)
    before = world.host(host).document["lastSeen"]
    world.advance(30)
    assert kinds(world.run(world.heartbeat(credential))) == ["CredentialSuperseded"]
    assert world.host(host).document["lastSeen"] == before
    copy = world.heartbeat(credential)._replace(origin=PARIS)
    here = newer._replace(origin=BERLIN)
    assert kinds(world.run(copy, here)) == ["CredentialSuperseded", world.clock.ms]
    assert place_of(world, host)[0] == BERLIN.address
    before = place_of(world, host)
    world.revoke(host)
    assert kinds(world.run(newer._replace(origin=PARIS))) == ["HostRevoked"]
    assert place_of(world, host) == before and len(world.audit("move")) == 1


def test_a_clock_that_was_ahead_keeps_no_address(world):
    host, credential = world.join()
    world.advance(86400)
    for origin in (BERLIN, PARIS, BERLIN):
        beat_from(world, credential, origin)
    assert place_of(world, host)[0] == PARIS.address
    world.advance(-86400)
    beat_from(world, credential, BERLIN)
    assert place_of(world, host) == place(BERLIN, world.clock.ms)


def test_a_row_with_a_forged_address_is_its_hosts_trouble_alone(world):
    hosts = [world.join(f"web-{n}") for n in range(3)]
    world.sql("UPDATE host SET address = x'00' WHERE name = 'web-1'")
    outcomes = world.run(*(world.heartbeat(credential) for _, credential in hosts))
    assert kinds(outcomes) == [world.clock.ms, "StorageUnavailable", world.clock.ms]


def refused(world, host):
    shown = world.host(host).document
    return shown["refusedAt"], shown["refusedCode"]


def test_a_refusal_leaves_a_trace_on_its_host_once_a_minute(world):
    host, credential = world.join()
    other, _ = world.join("web-2")
    world.beat(credential)
    world.revoke(host)
    at = world.clock.ms
    for _ in range(3):
        assert world.beat(credential).code == "host-revoked"
        assert world.beat(credential, os="new").code == "host-revoked"
        world.advance(19.9)
    assert refused(world, host) == (hostenroll.rfc3339(at), "host-revoked")
    world.restore(host)
    world.run(world.heartbeat(credential, serial=2))
    assert world.beat(credential).code == "credential-superseded"
    assert refused(world, host) == (hostenroll.rfc3339(at), "host-revoked")
    world.advance(0.3)
    assert world.beat(credential).code == "credential-superseded"
    assert refused(world, host) == (hostenroll.rfc3339(at + 60_000), "credential-superseded")
    assert refused(world, other) == (None, None)


def test_a_refusal_before_the_tick_leaves_its_trace_with_the_next(paths, clock):
    with World(paths, clock, credential_ttl=60) as world:
        host, credential = world.join()
        world.advance(60 + 7 * 86400 + 1)
        assert world.beat(credential).code == "credential-expired"
        at = clock.ms
        world.housekeeping()
        assert refused(world, host) == (hostenroll.rfc3339(at), "credential-expired")


def test_a_second_server_beside_a_live_one_makes_no_gap(world, paths, clock):
    start(world, "http://one")
    host, credential = world.join()
    world.beat(credential)
    for _ in range(11):
        live_on(world, 10)
        with World(paths, clock, interval=30) as second:
            start(second, "http://two")
    assert status_of(world, host) == "offline"
    assert world.registry.service.get().public_url == "http://two"
    clock.advance(-5)
    keep_alive(world)
    assert world.sql("SELECT alive FROM service") == [(NOON_MS + 110_000,)]


@pytest.mark.parametrize("step", [5 * 3600, -5 * 3600, -NOON + 60], ids=["ahead", "back", "1970"])
def test_a_clock_that_is_set_breaks_no_ids_tokens_credentials_or_log(step, paths, clock):
    ttl = 3600 if step > -DAY_MS else None  # what expires in 1970 has expired
    with World(paths, clock, credential_ttl=ttl) as world:
        host, credential = world.join()
        world.beat(credential)
        token = world.token(ttlSeconds=86400)
        clock.advance(step)
        beaten = world.beat(credential).document
        assert beaten["lastSeen"] == hostenroll.rfc3339(clock.ms)
        assert ("credential" in beaten) == (step > 0)
        fresh = [world.join(f"web-{n}") for n in range(50)]
        assert len({number for number, _ in fresh} | {host}) == 51
        assert world.enroll(token).status == 201
        clock.advance(-step)
        now = hostenroll.rfc3339(clock.ms)
        assert all(world.beat(own).document["lastSeen"] >= now for _, own in fresh)
        verified = verify_audit(world.registry, None)
        assert [(verified.last,)] == world.sql("SELECT count(*) FROM audit")


def test_a_server_that_is_ready_has_written_that_it_lives_once_a_second(world):
    start(world)
    for seconds, writes in ((1, True), (0.5, False), (0.499, False), (0.001, True)):
        world.advance(seconds)
        assert [world.call("GET", "/readyz").status for _ in range(3)] == [200] * 3
        assert (world.sql("SELECT alive FROM service") == [(world.clock.ms,)]) == writes
    world.advance(1)
    with faulty(world.registry, only="BEGIN IMMEDIATE"):
        assert world.call("GET", "/readyz").code == "storage-unavailable"
    before = world.snapshot()
    assert world.call("GET", "/readyz").status == 503  # a refusal is good for a second, too
    assert world.snapshot() == before
    world.advance(1)
    assert world.call("GET", "/readyz").document == {"status": "ready"}


@pytest.mark.parametrize("interval, shortest, longest", [(1, 1, 1), (5, 5, 5), (100, 85, 115)])
def test_the_interval_is_drawn_to_its_very_ends(interval, shortest, longest, paths, clock):
    with opened(paths, clock, interval=interval) as registry:
        drawn = {registry.heartbeats.next_interval(1) for _ in range(2000)}
    assert (min(drawn), max(drawn)) == (shortest, longest)


# Organizations and API keys.


def test_who_may_name_all_organizations_hears_of_one_that_is_not_there(world):
    for name in ("mint-token", "mint-api-key"):
        with pytest.raises(hostenroll.InvalidBody) as refused:
            world.act(name, role="admin", organizationId="no-team")
        assert [error.field for error in refused.value.errors] == ["organizationId"]
    for name in ("list-hosts", "list-tokens", "show-audit"):
        with pytest.raises(hostenroll.InvalidQuery):
            world.act(name, organization="no-team")
    with pytest.raises(hostenroll.Conflict):
        world.act("add-org", name="default")


def test_an_api_key_is_good_until_it_is_revoked(world):
    world.act("add-org", name="a-team")
    text = make_api_key(world.registry, world.clock, "a-team", "viewer")
    about = {"request": "", "origin": Origin(ADDRESS), "now": NOON_MS}
    identify = partial(world.registry.api_keys.identify, **about)
    by = identify(text)
    name = hostenroll.tagged_id("api-key", by.id)
    assert (by.organization, by.role, by.name) == ("a-team", "viewer", name)
    guess = hostenroll.mint_secret("hak", by.id).text
    for wrong in ("", "hak_", text + "0", text.upper(), "het" + text[3:], guess):
        with pytest.raises(hostenroll.ApiKeyInvalid):
            identify(wrong)
    for _ in range(2):
        assert world.act("revoke-api-key", by.id).key.revoked_at == NOON_MS
        with pytest.raises(hostenroll.ApiKeyInvalid):
            identify(text)
        world.advance(1)
    assert world.act("list-api-keys").items[0].key.revoked_at == NOON_MS
    assert len(world.audit("revoke")) == 1
    with pytest.raises(hostenroll.NotFound):
        world.act("revoke-api-key", by.id + 1)


# Lists and the census.


def pages(world, name, **values):
    """Every page of a list."""
    found = []
    while not found or found[-1].next is not None:
        found.append(world.act(name, **values))
        cursor = hostenroll.id_text(found[-1].next or 0)
        assert cursor < values.get("cursor", "8"), "a list that never ends"
        values["cursor"] = cursor
    return found


def ids(found):
    return [item[0].id for page in found for item in page.items]


def counted(world, by=OPERATOR):
    """A tick of a census: None while it goes on."""
    return world.perform(partial(world.registry.hosts.census, by), writes=False)


def census_of(world, by=OPERATOR):
    """A whole census, and how many ticks it took."""
    census, ticks = None, 0
    while census is None:
        census, ticks = counted(world, by), ticks + 1
        assert ticks < 1000
    return census, ticks


def test_lists_and_the_census_have_each_host_once_the_newest_first(world):
    world.act("add-org", name="berlin")
    chance, made = random.Random(5), []
    for n in range(61):
        world.advance(chance.choice([1, 30, 3600, 86400 / 2]))
        host = enrolled(world, f"web-{n % 20}", organizationId=chance.choice(["default", "berlin"]))
        made.insert(0, int(host["hostId"], 16))
        if n == 60 or chance.random() < 0.8:
            world.beat(host["credential"])
        if n < 60 and chance.random() < 0.2:
            world.revoke(host["hostId"])
        assert sum(census_of(world)[0].counts.values()) == n + 1  # of a small fleet, never old
    views = [view for page in pages(world, "list-hosts") for view in page.items]
    assert [world.act("show-host", number) for number in made] == views
    assert {bool(view.warnings) for view in views} == {False, True}
    groups = [(view.host.organization_id, view.status) for view in views]
    assert {status for _, status in groups} == set(hostenroll.STATUSES)
    census, ticks = census_of(world)
    assert (census.counts, ticks) == (hostenroll.Counter(groups), 1)
    census, _ = census_of(world, Principal("api-key:1", "berlin", "viewer"))
    assert census.counts == hostenroll.Counter(it for it in groups if it[0] == "berlin")
    for limit in (1, 7, 61, 100):
        found = pages(world, "list-hosts", limit=limit)
        assert ids(found) == made
        assert {len(page.items) for page in found[:-1]} <= {limit} and found[-1].items
        tokens = ids(pages(world, "list-tokens", limit=limit))
        assert len(set(tokens)) == 61 and tokens == sorted(tokens, reverse=True)
        assert ids(pages(world, "list-tokens", limit=limit, state="used")) == tokens
        for group in set(groups):
            asked = {"limit": limit, "organization": group[0], "status": group[1]}
            own = [number for number, its in zip(made, groups) if its == group]
            assert ids(pages(world, "list-hosts", **asked)) == own


FILTERS = {
    "a status": ({"status": "revoked"}, ["c"]),
    "a label": ({"label": [("k", "1")]}, ["b", "a"]),
    "two labels": ({"label": [("k", "1"), ("m", "x y")]}, ["b"]),
    "a label of another value": ({"label": [("k", "2")]}, []),
    "a part of the name": ({"q": "ALPH"}, ["a"]),
    "a part of the hostname": ({"q": ".lan"}, ["c", "b", "a"]),
    "what spans name and hostname": ({"q": "alphaa.lan"}, []),
    "a label and a text": ({"label": [("k", "1")], "q": "b.lan"}, ["b"]),
    "an SQL wildcard": ({"q": "%"}, []),
}


def test_a_filter_finds_what_it_names(world):
    hosts = []
    for name, labels in (("a", {"k": "1"}), ("b", {"k": "1", "m": "x y"}), ("c", {})):
        hosts.append(enrolled(world, f"{name}.lan", labels=labels)["hostId"])
        world.advance(1)
    world.act("edit-host", hosts[0], name="alpha")
    world.revoke(hosts[2])
    for name, (query, expected) in FILTERS.items():
        found = pages(world, "list-hosts", **query)
        shown = [view.host.hostname[0] for page in found for view in page.items]
        assert shown == expected, name


NETWORKS = {  # what is asked for, and which of the hosts below it finds
    "an address": ("192.0.2.7", "a"),
    "another": ("192.0.2.70", ""),
    "a network": ("192.0.2.0/24", "ab"),
    "with bits of the host": ("192.0.2.200/24", "ab"),
    "with a netmask": ("192.0.2.0/255.255.255.248", "a"),
    "all of IPv4": ("0.0.0.0/0", "ab"),
    "all of IPv6": ("::/0", "cd"),
    "IPv6": ("2001:db8:0:0::/64", "c"),
    "IPv6 of a link": ("FE80::/10", "d"),
}


@pytest.mark.parametrize("asked, expected", table(NETWORKS))
def test_hosts_are_found_by_address_and_network(asked, expected, world):
    places = {"a": "192.0.2.7", "b": "192.0.2.77", "c": "2001:db8::7", "d": "fe80::1%eth0", "e": ""}
    for name, address in places.items():
        world.join(name)
        world.sql("UPDATE host SET address = ? WHERE name = ?", address, name)
    found = world.hosts(f"address={asked.replace('%', '%25')}").document["hosts"]
    assert "".join(sorted(host["name"] for host in found)) == expected
    assert [host["name"] for host in world.hosts("q=2.77").document["hosts"]] == ["b"]


@pytest.mark.parametrize("forged", ["", "here", "10.0.0.1/8", "10.0.0.300", "\u00b2.0.0.1"])
def test_a_forged_address_is_in_no_network_and_hinders_no_search(forged, world):
    world.beat(world.join("web-1")[1])
    other, credential = world.join("web-2")
    world.beat(credential)
    world.sql("UPDATE host SET address = ? WHERE id <> ?", forged, int(other, 16))
    for network in ("::/0", "0.0.0.0/0"):
        reply = world.hosts(f"address={network}")
        assert reply.status == 200, reply.document
        assert [host["id"] for host in reply.document["hosts"]] == [other] * ("." in network)


@pytest.mark.parametrize(
    "asked",
    [
        "",
        "1",
        "web-1",
        "192.0.2.7/33",
        "192.0.2.0/-1",
        "::/129",
        "192.0.2",
        "010.0.0.1",
        "192.0.2.1/24/8",
        "1" * 65,
        ":",
    ],
)
def test_what_is_no_address_is_an_invalid_query(asked, world):
    reply = world.hosts(f"address={asked}")
    assert reply.code == "invalid-query"
    assert [error["field"] for error in reply.document["errors"]] == ["address"]


def test_a_label_is_found_by_the_whole_of_it_and_however_it_is_kept(world):
    chance = random.Random(3)
    # What may look like other labels, and what JSON may write in two ways.
    odd = ['"', "\\", ": ", ", ", ":", ",", "}", "a", '"a":"', '", "b": "', "\u00fc", "\U0001f600"]
    fill(world, 100)

    def odd_text():
        return "".join(chance.choices(odd, k=chance.randrange(5)))

    for _ in range(50):
        pairs = {chance.choice("abc"): odd_text() for _ in range(chance.randrange(4))}
        kept = chance.choice([json.dumps(pairs), hostenroll.json_text(pairs)])
        world.sql("UPDATE host SET labels = ?", kept)
        sought = [*pairs.items(), *((name, odd_text()) for name in "abc")]
        for wanted in [*([pair] for pair in sought), sought[:2], sought[-2:]]:
            found = world.act("list-hosts", label=wanted).items
            assert bool(found) == (set(wanted) <= set(pairs.items())), (kept, wanted)


def test_a_page_examines_so_many_rows_and_may_be_empty(world):
    """Only next None ends a list."""
    fill(world, 5000)
    nothing = ({"q": "nowhere"}, {"status": "missing", "organization": "default"},
               {"label": [("a", "2")]})  # fmt: skip
    for query in nothing:
        found = pages(world, "list-hosts", **query)
        assert [len(page.items) for page in found] == [0] * -(-5000 // hostenroll.ROWS_EXAMINED)
        assert found[0].next is not None
    assert ids(pages(world, "list-hosts", q=f"{1 << 8:016x}")) == [1 << 8]
    assert len(ids(pages(world, "list-hosts", limit=1000))) == 5000


def test_no_call_looks_at_the_whole_fleet(world):
    """In steps of SQLite's machine: about 40 for a row that is looked at and given."""
    minted, steps, taken = world.mint(maxUses=1_000_000).document, [], {}
    fill(world, 20_000)
    world.sql("UPDATE host SET token_id = ?", int(minted["id"], 16))
    world.api_key  # noqa: B018  minted now, and not in what is counted
    calls = {
        "hosts": (200_000, lambda: world.act("list-hosts", q="-")),
        "a page of hosts": (10_000, lambda: world.act("list-hosts")),
        "one host": (5_000, lambda: world.act("list-hosts", limit=1)),
        "tokens": (20_000, lambda: world.act("list-tokens", state="valid")),
        "token": (6_000, lambda: world.act("show-token", minted["id"])),
        "enroll": (5_000, lambda: world.enroll(minted["token"], key="k")),
        "replay": (5_000, lambda: world.enroll(minted["token"], key="k")),
        "delete": (5_000, lambda: world.act("delete-host", 1 << 8)),
    }  # fmt: skip
    for name, (_, run) in calls.items():
        steps.clear()
        world.registry.engine._connection.set_progress_handler(lambda: steps.append(10), 10)
        run()
        taken[name] = sum(steps)
    assert {name: n for name, n in taken.items() if n > calls[name][0]} == {}
    assert min(taken.values()) > 0


def test_a_census_of_a_large_fleet_goes_in_slices_and_is_kept_for_a_while(world, monkeypatch):
    monkeypatch.setattr(hostenroll, "COUNTED_AT_ONCE", 100)
    fill(world, 400)
    # All that ask share it; 100, 200, 300, 400, and the look that finds no more.
    asked = [counted(world, by) for by in (OPERATOR, OPERATOR._replace(name="cli:other")) * 3]
    assert asked[:4] == [None] * 4 and asked[4] == asked[5]
    assert asked[4].counts == {("default", "pending"): 400}
    world.join()
    world.advance(hostenroll.CENSUS_KEPT)
    assert census_of(world) == (asked[4], 1)
    world.advance(0.001)
    assert counted(world) is None
    fresh, ticks = census_of(world)
    assert (1 + ticks, fresh.counts) == (5, {("default", "pending"): 401})
    # One that was left alone begins again.
    world.advance(3600)
    assert counted(world) is None
    world.sql("DELETE FROM host")
    world.advance(3600)
    assert census_of(world)[0].counts == {}


# The tick.


def kinds(outcomes):
    """Outcomes that are refusals by the names of their classes."""
    return [type(it).__name__ if isinstance(it, Exception) else it for it in outcomes]


def test_each_call_of_a_tick_has_its_own_outcome(world, caplog):
    """The good, the revoked, the superseded, the deleted; a refusal, a defect, and neighbours."""
    registry, clock = world.registry, world.clock
    hosts = [world.join(f"web-{n}") for n in range(5)]
    beats = [world.heartbeat(credential) for _, credential in hosts]
    world.revoke(hosts[1][0])
    world.run(world.heartbeat(hosts[2][1], serial=2))
    world.delete(hosts[3][0])
    clock.advance(1)

    def half(error):
        def run(now):
            registry.organizations.add(Call(None, OPERATOR, values={"name": "half"}), now)
            raise error

        return own_call(run)

    refused = half(hostenroll.Forbidden().with_audit("alice", "alice", None))
    defect, mistake = half(ValueError("a defect")), half(hostenroll.OperatorError("a mistake"))
    calls = [
        call("add-org", name="one"), refused, defect, mistake, call("list-orgs"),
        call("add-org", name="one"), call("add-org", name="two"),
    ]  # fmt: skip
    now, outcomes = clock.ms, kinds(world.run(*beats, *calls))
    assert outcomes[:5] == [now, "HostRevoked", "CredentialSuperseded", "HostUnknown", now]
    one, *refusals, orgs, conflict, two = outcomes[5:]
    assert (one.id, two.id, conflict) == ("one", "two", "Conflict")
    assert refusals == ["Forbidden", "Internal", "OperatorError"]
    assert [organization.id for organization in orgs.items] == ["default", "one"]
    assert [it.id for it in world.act("list-orgs").items] == ["default", "one", "two"]
    seen = dict(world.sql("SELECT host_id, last_seen FROM heartbeat"))
    assert [seen.get(int(it, 16)) for it, _ in hosts] == [now, 0, now - 1000, None, now]
    # What is undone leaves no event but its refusal, by whom that names.
    events = [(event["action"], event["code"], event["actor"]) for event in world.audit()]
    codes = ("host-revoked", 1), ("credential-superseded", 2), ("host-unknown", 3)
    assert events[-6:] == [
        *(("refuse", code, f"host:{hosts[n][0]}") for code, n in codes),
        ("add", None, "cli:test"), ("refuse", "forbidden", "alice"), ("add", None, "cli:test"),
    ]  # fmt: skip
    assert kinds(world.run(refused, beats[0], defect)) == ["Forbidden", now, "Internal"]
    with pytest.raises(hostenroll.Internal) as caught:
        registry.perform(defect, clock.ms)
    assert "defect" not in str(caught.value.document())
    caplog.clear()
    with pytest.raises(hostenroll.OperatorError, match="a mistake"):
        registry.perform(mistake, clock.ms)
    # A call of the server's own has no caller who would see it, and it is no trouble of the disk.
    assert [record.getMessage() for record in caplog.records] == ["a mistake"]
    assert registry.storage_trouble == ""


def test_what_is_raised_through_a_tick_leaves_it_undone(world):
    def interrupted(now):
        world.registry.queries.add(hostenroll.Organization("half", now))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.perform(interrupted)
    assert not world.registry.engine._connection.in_transaction and is_free(world.paths)
    assert world.sql("SELECT count(*) FROM organization") == [(1,)]
    assert world.registry.storage_trouble == ""  # Ctrl-C is no trouble of the disk


# What was reported of hosts.


def changes_of(world, host=None):
    """was, status, actor, and the seconds from the last heartbeat to when it became true."""
    rows = world.sql(
        "SELECT host_id, was, status, actor, seen, at FROM change WHERE ? IN (0, host_id) "
        "ORDER BY number",
        int(host or "0", 16),
    )
    names = hostenroll.STATUS_NAMES
    return [
        (names[was], names[status], actor.partition(":")[0], seen and (at - seen) / 1000)
        for _, was, status, actor, seen, at in rows
    ]


def assert_states_agree(world):
    """Host and heartbeat have the state of the last change."""
    wrong = world.sql("""SELECT id FROM host JOIN heartbeat ON host_id = id WHERE heartbeat.state <>
        host.state OR (host.state, status_since) NOT IN (SELECT status, at FROM change WHERE host_id
        = id ORDER BY number DESC LIMIT 1)""")
    assert wrong == []


ENROLLED, ARRIVED = ("", "pending", "token", 0), ("pending", "online", "", 0)
REPORTED = {
    # acts on a host that has enrolled; its changes after that
    "it enrolls": ([], []),
    "it beats": (["beat", "beat"], [ARRIVED]),
    "it is revoked": (["beat", "revoke", "revoke"], [ARRIVED, ("online", "revoked", "cli", 5)]),
    "it is revoked before it beat": (["revoke"], [("pending", "revoked", "cli", 0)]),
    "it is restored": (
        ["beat", "revoke", "restore", "restore"],
        [ARRIVED, ("online", "revoked", "cli", 5), ("revoked", "online", "cli", 10)]),
    "it is restored too late": (
        ["beat", "revoke", "sleep", "restore", "beat"],
        [ARRIVED, ("online", "revoked", "cli", 5), ("revoked", "offline", "cli", 215),
         ("offline", "online", "", 0)]),
    "it is restored and has never beaten": (
        ["revoke", "restore", "beat"],
        [("pending", "revoked", "cli", 0), ("revoked", "pending", "cli", 0), ARRIVED]),
    "it is deleted": (["beat", "delete"], [ARRIVED, ("online", "deleted", "cli", 5)]),
    "it enrolls again": (["beat", "reenrolls"], [ARRIVED]),
    "its facts change": (["facts", "facts"], [ARRIVED]),
    "its name changes": (["beat", "rename"], [ARRIVED]),
    "it sends nonsense": (["nonsense", "beat"], [ARRIVED]),
}  # fmt: skip


@pytest.mark.parametrize("acts, expected", table(REPORTED))
def test_each_change_of_a_status_is_written_with_the_act_that_makes_it(acts, expected, world):
    host, credential = world.join()
    does = {
        "beat": lambda: world.beat(credential).status == 200,
        "facts": lambda: world.beat(credential, os=f"Debian {world.clock.ms}").status == 200,
        "nonsense": lambda: world.beat(credential, os=7).code == "invalid-body",
        "sleep": lambda: world.advance(200) is None,
        "rename": lambda: world.act("edit-host", host, name="front"),
        "reenrolls": lambda: reenrolled(world, host),
        "delete": lambda: world.act("delete-host", host),
        "revoke": lambda: world.act("revoke-host", host),
        "restore": lambda: world.act("restore-host", host),
    }
    for act in acts:
        assert does[act]()
        assert_states_agree(world)
        world.advance(5)
    assert changes_of(world) == [ENROLLED, *expected]


def test_a_change_has_name_and_labels_as_they_were(world):
    host, _ = world.joined()
    world.act("edit-host", host, name="front", labels={"rack": "b4"})
    world.act("revoke-host", host)
    world.act("edit-host", host, name="back", labels={})
    rows = world.sql("SELECT name, labels, organization_id FROM change WHERE status = 5")
    assert rows == [("front", '{"rack":"b4"}', "default")]


def test_a_refused_act_and_a_tick_that_fails_report_nothing(world):
    host, credential = world.join()
    other, _ = world.joined()
    before = world.snapshot()
    outcomes = world.run(call("act-on-hosts", action="revoke", hosts=[host], labels={}))
    assert kinds(outcomes) == ["InvalidBody"]
    with faulty(world.registry, only="COMMIT", error=FULL):
        assert are_unavailable(
            world.run(call("revoke-host", other), world.heartbeat(credential)), 2
        )
    after = world.snapshot()
    assert [after[name] for name in ("change", "host", "heartbeat")] == [
        before[name] for name in ("change", "host", "heartbeat")
    ]
    world.run(world.heartbeat(credential))
    assert changes_of(world, host) == [ENROLLED, ARRIVED]


def test_a_fleet_that_comes_back_is_reported_in_one_batch(world):
    hosts = [world.joined() for _ in range(40)]
    world.advance(400)
    world.sql("UPDATE heartbeat SET state = 3")
    world.sql("UPDATE host SET state = 3")
    beats = [world.heartbeat(credential) for _, credential in hosts]
    with faulty(world.registry) as statements:
        assert world.run(*beats) == [world.clock.ms] * 40
    assert statements.count < 30  # durable, so it ran twice
    assert [changes_of(world, host)[2:] for host, _ in hosts] == [
        [("offline", "online", "", 0)]
    ] * 40
    assert_states_agree(world)


def test_the_migration_sets_the_states_of_then_and_reports_nothing(paths, clock):
    old_fleet(paths, clock)
    sql(
        paths[0],
        "UPDATE heartbeat SET last_seen = ? WHERE serial = 1 AND active",
        clock.ms - 200_000,
    )
    open_registry(*paths, clock.ms).close()
    rows = sql(
        paths[0],
        "SELECT name, host.state, heartbeat.state, status_since - ? FROM host "
        "JOIN heartbeat ON host_id = id",
        clock.ms,
    )
    enrolled = -3_600_000
    assert {name: rest for name, *rest in rows} == {
        "beats": [3, 3, -200_000 + 145_000], "renewed": [1, 1, 0], "never beat": [2, 2, enrolled],
        "asked again": [2, 2, enrolled], "re-enrolls": [1, 1, 0], "revoked": [5, 5, enrolled],
        "revoked before it beat": [5, 5, enrolled],
    }  # fmt: skip
    assert sql(paths[0], "SELECT count(*) FROM change") == [(0,)]
    ((history,),) = sql(paths[0], "SELECT history FROM feed")
    assert re.fullmatch("[0-9a-f]{16}", history)


SINCE = {
    # seconds since the last beat; pauses, as seconds ago from and to; seconds ago that it began
    "no pause": (200, [], 100),
    "a pause before": (200, [(300, 250)], 100),
    "a pause in the silence that is allowed": (300, [(280, 230)], 100),
    "a pause after it became true": (300, [(150, 50)], 200),
    "long ago": (3 * 604_800 + 100, [], 2 * 604_800 + 100),
}  # fmt: skip


@pytest.mark.parametrize("ago, pauses, expected", table(SINCE))
def test_a_silence_counts_from_when_it_was_too_long(ago, pauses, expected):
    """100 s are allowed, and after a pause as much again as it took."""
    now = 1_800_000_000_000
    ((end, start),) = [(now - end * 1000, now - start * 1000) for end, start in pauses] or [(5, 5)]
    service = hostenroll.Service(start, now, end, 30, "")
    period = hostenroll.ServicePeriod(service, now)
    since = period.since(now - ago * 1000, 30)
    assert (now - since) / 1000 == expected


# Feeds: changes and events, for who goes on from a cursor.


def read_feed(door, query="", path="changes", bearer=None):
    """The items of an answer, and its cursor."""
    reply = door.call("GET", f"/api/{path}?{query}", bearer=bearer or door.api_key)
    assert reply.status == 200, reply
    return next(iter(reply.document.values())), reply.document["cursor"]


def let_in(world, hostname, **minted):
    """A host of a token with these labels or of this organization, and its credential."""
    enrolled = world.enroll(world.token(**minted), hostname).document
    return enrolled["hostId"], enrolled["credential"]


def told(changes):
    """What changes say, in short."""
    return [f"{it['host']['name']} {it['was']} {it['status']} {it['by']}" for it in changes]


def test_the_feed_tells_what_became_of_hosts_and_goes_on_from_a_cursor(world):
    _, empty = read_feed(world)
    host, credential = let_in(world, "web-1", labels={"rack": "b4"})
    first, cursor = read_feed(world, f"after={empty}")
    history, number = cursor.split("-")
    token = world.host(host).document["tokenId"]
    assert first == [{
        "cursor": f"{history}-1", "at": NOON_TEXT, "was": None, "status": "pending", "seen": None,
        "host": {"id": host, "name": "web-1", "organizationId": "default",
                 "labels": {"rack": "b4"}},
        "by": f"token:{token}", "muted": False,
    }]  # fmt: skip
    assert (empty, cursor, number) == (f"{history}-0", f"{history}-1", "1")
    world.beat(credential)
    world.revoke(host)
    world.act("delete-host", host)
    rest, end = read_feed(world, f"after={cursor}")
    key = f"api-key:{world.events().document['events'][-1]['subject'][8:]}"
    assert told(rest) == [
        "web-1 pending online None", f"web-1 online revoked {key}",
        "web-1 revoked deleted cli:test",
    ]  # fmt: skip
    assert [it["seen"] for it in rest] == [NOON_TEXT] * 3
    assert (rest[-1]["cursor"], end) == (f"{history}-4",) * 2
    assert read_feed(world, f"after={end}") == ([], end)
    assert read_feed(world, "after=now&wait=50") == ([], end)
    assert read_feed(world, f"after={cursor}&limit=2") == (rest[:2], rest[1]["cursor"])
    assert read_feed(world) == ([*first, *rest], end)


def test_a_host_that_is_muted_now_is_marked_in_the_feed(world):
    hosts = [world.join(f"web-{n}")[0] for n in range(2)]
    rows = [(world.clock.ms + 1, int(hosts[0], 16)), (world.clock.ms, int(hosts[1], 16))]
    for row in rows:
        world.sql("UPDATE host SET muted_until = ? WHERE id = ?", *row)
    marks = lambda: [change["muted"] for change in read_feed(world)[0]]  # noqa: E731
    assert marks() == [True, False]
    world.advance(0.001)
    assert marks() == [False, False]


FEED_FILTERS = {
    "a status": ("status=online", [2, 6]),
    "one of two": ("status=online&status=revoked", [2, 5, 6]),
    "deleted": ("status=deleted", [7]),
    "a label": ("label=rack=b4", [1, 2, 7]),
    "a label's name": ("label=rack", [1, 2, 3, 7]),
    "an empty label": ("label=empty=", [3]),
    "two labels": ("label=rack&label=empty", [3]),
    "none has it": ("label=rac", []),
    "a host": ("host={web-1}", [1, 2, 7]),
    "a host, from a number on": ("host={web-1}&limit=2", [1, 2]),
    "no host": ("host=7fffffffffffffff", []),
    "an organization": ("organization=berlin", [4, 5, 6]),
    "all at once": ("organization=default&status=pending&label=rack=b5&host={web-2}", [3]),
}


@pytest.mark.parametrize(
    "query, numbers", sample(FEED_FILTERS, "two labels", "an organization", "all at once")
)
def test_the_feed_is_filtered_and_an_organizations_key_sees_its_own(query, numbers, world):
    world.act("add-org", name="berlin")
    hosts, labels = {}, ({"rack": "b4"}, {"rack": "b5", "empty": ""})
    for n in (1, 2):
        hosts[f"web-{n}"], credential = let_in(world, f"web-{n}", labels=labels[n - 1])
        world.beat(credential) if n == 1 else None
    hosts["spree"], credential = let_in(world, "spree", organizationId="berlin")
    world.revoke(hosts["spree"])
    world.restore(hosts["spree"]), world.beat(credential)
    world.sql("DELETE FROM change WHERE status = 2 AND was = 5")
    world.sql("UPDATE change SET number = 6 WHERE number = 7")
    world.act("delete-host", hosts["web-1"])
    query = query.format(**hosts)
    seen, end = read_feed(world, query)
    assert [int(it["cursor"].split("-")[1]) for it in seen] == numbers
    assert end.endswith("-2" if "limit" in query else "-7")
    if "default" not in query:
        key = make_api_key(world.registry, world.clock, "berlin", "viewer")
        seen, end = read_feed(world, query, bearer=key)
        assert [int(it["cursor"].split("-")[1]) for it in seen] == [
            number for number in numbers if 3 < number < 7
        ]
        assert end.endswith("-7")


def test_the_feed_looks_at_a_thousand_rows_at_once_and_says_how_far(world):
    """Filters find the last of 2,500 changes in three answers; long labels end one sooner."""
    world.join()
    columns = "at, host_id, organization_id, name, labels, was, status, seen, actor"
    world.sql(f"""WITH RECURSIVE n(i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < 2500)
        INSERT INTO change (number, {columns}) SELECT i, {columns} FROM change, n""")
    world.sql("UPDATE change SET status = 5 WHERE number = 2500")
    cursor, ends, found = "", [], []
    for _ in range(4):
        seen, cursor = read_feed(world, f"status=revoked{cursor and f'&after={cursor}'}")
        found += seen
        ends.append(int(cursor.split("-")[1]))
    assert (ends, len(found)) == ([1000, 2000, 2500, 2500], 1)
    assert len(read_feed(world, "limit=1000")[0]) == 1000
    text = json.dumps({"k": "v" * 110 * 1024})
    world.sql("UPDATE change SET labels = ? WHERE number < 20", text)
    assert len(read_feed(world, "limit=1000")[0]) == 10


def test_a_cursor_of_what_is_not_kept_is_refused_with_one_to_go_on_from(world):
    host, _ = world.join()
    for _ in range(4):
        world.revoke(host), world.restore(host)
    seen, end = read_feed(world)
    history = end.split("-")[0]

    def refused(cursor, path="changes"):
        reply = world.ask("GET", f"/api/{path}?after={cursor}&wait=50")
        assert (reply.status, reply.code) == (410, "changes-pruned"), reply
        assert reply.document["cursor"] in reply.document["detail"]
        return reply.document["cursor"]

    world.sql("DELETE FROM change WHERE number < 4")
    assert refused(f"{history}-2") == refused(f"{history}-0") == f"{history}-3"
    assert read_feed(world, f"after={history}-3")[0] == seen[3:] == read_feed(world)[0]
    assert refused(f"{history}-10") == refused(f"{history}-{10**19 - 1}") == end
    assert read_feed(world, f"after={refused(end.replace(history, '0' * 16))}")[0] == seen[3:]
    # All but the last are pruned, and what a heartbeat brings comes after that.
    world.sql("DELETE FROM change WHERE number < 9")
    assert read_feed(world)[0] == seen[8:] and refused(f"{history}-7") == f"{history}-8"
    # The same of the audit log, where a number is enough.
    world.sql("INSERT INTO audit_anchor VALUES (1, 3, x'', x'')")
    world.sql("DELETE FROM audit WHERE number < 4")
    last = world.events().document["events"][0]["number"]
    assert refused(2, "audit") == refused(f"{history}-2", "audit") == f"{history}-3"
    assert refused(last + 1, "audit") == f"{history}-{last}"
    world.sql("UPDATE audit_anchor SET number = ?", last)
    world.sql("DELETE FROM audit")
    assert refused(3, "audit") == f"{history}-{last}"
    assert read_feed(world, f"after={last}", "audit") == ([], f"{history}-{last}")


BAD_CURSORS = {
    "no cursor": "x", "empty": "", "a number": "5", "no number": "{}-", "no history": "-5",
    "a sign": "{}--5", "twenty digits": "{}-12345678901234567890", "in capitals": "NOW",
    "a blank": "{}-5%20", "another alphabet": "{}-%D9%A5", "a line": "{}-5%0A",
}  # fmt: skip


@pytest.mark.parametrize("text", sample(BAD_CURSORS, "a number", "twenty digits"))
def test_what_is_no_cursor_is_a_bad_query(text, world):
    cursor = read_feed(world)[1].split("-")[0]
    for path in ("changes", "audit"):
        reply = world.ask("GET", f"/api/{path}?after={text.format(cursor)}")
        is_good = (path, text) == ("audit", "5")  # though there is no such event
        assert reply.code == ("changes-pruned" if is_good else "invalid-query")
    for query in ("wait=51", "wait=-1", "wait=1.5", "status=none", "host=x", "label=", "cursor=0"):
        assert world.ask("GET", f"/api/changes?{query}").code == "invalid-query"


def test_the_audit_log_goes_on_from_a_cursor_the_oldest_first(world):
    """Also for an organization's key, and by the filters of the list."""
    host, _ = world.join()
    events = world.audit()
    world.act("add-org", name="berlin")
    world.revoke(host)
    _, end = read_feed(world, "after=now", "audit")
    history = end.split("-")[0]
    seen = world.audit()
    for after in (len(events), f"{history}-{len(events)}"):
        assert read_feed(world, f"after={after}", "audit") == (seen[len(events) :], end)
    assert read_feed(world, "after=0&limit=2", "audit") == (seen[:2], f"{history}-2")
    assert read_feed(world, f"after=0&action=revoke&subject=host:{host}", "audit") == (
        [it for it in seen if it["action"] == "revoke"], end)  # fmt: skip
    key = make_api_key(world.registry, world.clock, "berlin", "viewer")
    owned, end = read_feed(world, "after=0", "audit", key)
    assert {it["organizationId"] for it in owned} == {"berlin"} and len(owned) == 2
    assert end == f"{history}-{len(seen) + 1}"
    reply = world.ask("GET", f"/api/audit?after=0&cursor={UNKNOWN_ID}")
    assert reply.code == "invalid-query" and reply.document["errors"][0]["field"] == "cursor"


def test_a_backup_begins_a_history_at_its_end(world):
    """A cursor from before goes on where that began: what is newer than it, nobody has seen."""
    folder = world.paths[0].rpartition("/")[0] + "/copy"
    os.mkdir(folder, 0o700)
    host, _ = world.join()
    _, seen = read_feed(world)
    world.revoke(host)
    _, newer = read_feed(world)
    old = read_feed(world, "after=now", "audit")[1]
    with World(world.registry.backup(folder), world.clock) as copy:
        first, events = read_feed(copy)[1], read_feed(copy, "after=now", "audit")[1]
        assert first[:16] == events[:16] != seen[:16]
        copy.act("restore-host", host)
        world.restore(host), world.revoke(host)
        for cursor, path, whole in (
            (newer, "changes", first), (read_feed(world)[1], "changes", first),
            (seen, "changes", first.replace("-2", "-1")), (old, "audit", first[:17] + old[17:]),
        ):  # fmt: skip
            reply = copy.ask("GET", f"/api/{path}?after={cursor}")
            assert (reply.code, reply.document["cursor"]) == ("changes-pruned", whole)
        assert told(read_feed(copy, f"after={first}")[0]) == ["web-1 revoked pending cli:test"]
        assert len(read_feed(copy, f"after={events}", "audit")[0]) >= 1


def test_strays_of_a_batch_are_judged_apart_and_the_others_stay_one_statement(world):
    hosts = [world.join(f"web-{n}") for n in range(40)]
    beats = [world.heartbeat(credential) for _, credential in hosts]
    for host, _ in hosts[:2]:
        world.revoke(host)
    world.advance(61)
    good = [world.clock.ms] * 38
    for _ in range(2):  # the first is durable
        world.run(*beats[2:])
    with faulty(world.registry) as all_good:
        assert world.run(*beats[2:]) == good
    with faulty(world.registry) as mixed:
        outcomes = world.run(*beats)
    assert kinds(outcomes) == ["HostRevoked", "HostRevoked", *good]
    # Four that find strays and tell them another interval; a look for each; the audit's last event
    # and insert; the trace on the hosts.
    assert mixed.count == all_good.count + 4 + 2 + 2 + 1
    assert world.registry.metrics.counts["heartbeats"] == 4 * 38
    assert [event["code"] for event in world.audit("refuse")] == ["host-revoked"] * 2


def test_a_beat_is_not_judged_by_what_its_neighbours_wrote(world):
    """Two of one host with two serials, and a stranger that has the tick look twice."""
    _, credential = world.join()
    older, newer = (world.heartbeat(credential, serial=serial) for serial in (1, 2))
    newer = newer._replace(origin=Origin("192.0.2.8"))
    stranger = world.heartbeat(credential, host=1)
    now = world.clock.ms
    outcomes = world.run(older, newer, stranger, older, newer)
    assert kinds(outcomes) == [now, now, "HostUnknown", "CredentialSuperseded", now]
    assert [event["address"] for event in world.audit("supersede")] == ["192.0.2.8"]
    assert world.registry.metrics.counts["heartbeats"] == 3


@pytest.mark.parametrize("stops", [False, True], ids=["a read", "the end of waiting"])
def test_a_place_in_the_turnstile_is_kept_by_a_read_and_given_up_at_the_end(stops, world):
    """Else a server with many readers would wait for ever to write."""
    holder, other = (hostenroll.WriteLock(world.paths[0]) for _ in range(2))
    assert holder.try_acquire()
    assert world.run(call("mint-token")) is None  # at the gate now
    assert world.run(call("list-orgs")) is not None
    if stops:
        assert world.registry.stop_waiting().code == "storage-unavailable"
    holder.release()
    assert other.try_acquire() == stops
    other.close()
    assert world.run(call("mint-token")) is not None
    holder.close()


def test_opening_writes_nothing_so_a_foreign_writer_does_not_hinder_it(world, paths, clock):
    with contextlib.closing(sqlite3.connect(paths[0], isolation_level=None)) as foreign:
        foreign.execute("BEGIN IMMEDIATE")
        open_registry(*paths, clock.ms).close()


def test_a_first_start_that_fails_leaves_no_keys_without_a_database(paths, clock, monkeypatch):
    """Else the next start would refuse them as half a pair."""
    interrupt = partial(signal.raise_signal, signal.SIGINT)
    monkeypatch.setattr(hostenroll.Engine, "create_schema", lambda engine: interrupt())
    with pytest.raises(KeyboardInterrupt):
        open_registry(*paths, clock.ms)
    assert not os.path.exists(paths[1])
    monkeypatch.undo()
    with opened(paths, clock):  # by one connection: to close another would drop SQLite's locks
        assert len(hostenroll.descriptors_of(hostenroll.file_id(paths[0]))) <= 1


@pytest.mark.parametrize("events", [1, 2, 3])
def test_a_forged_mac_makes_a_stranger_of_the_key_file_and_no_traceback(events, world):
    """Of a text in the place of a MAC, with all keys retired since a backup."""
    for _ in range(events):
        world.token()
    keyring = world.registry.keys.keyring
    world.registry.close()
    other = hostenroll.SigningKey("other", b"o" * 32)
    write(world.paths[1], hostenroll.Keyring([other], keyring.audit_key))
    world.reopen()  # the audit key verifies the last event
    world.registry.close()
    sql(world.paths[0], "UPDATE signing_key SET kid = 'gone' || number")
    name = "audit_is_never_changed"
    forge = (f"DROP TRIGGER {name}", "UPDATE audit SET mac = 'text'")
    for statement in (*forge, hostenroll.SCHEMA_OBJECTS[name]):
        sql(world.paths[0], statement)
    with pytest.raises(hostenroll.OperatorError, match="not the key file"):
        open_registry(*world.paths, world.clock.ms)
    findings = {finding.name: finding for finding in hostenroll.examine(*world.paths)}
    assert not findings["keys"].is_good


# A long random life beside a model.


def at(milliseconds):
    """A time as the API writes it."""
    seconds, rest = divmod(milliseconds or 0, 1000)
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest:03d}Z"
    return text if milliseconds else None


class Model:
    """What the fleet should be, as plain things in dictionaries. It knows the README's rules, and
    none of the Registry's: what is deleted is kept here, and looked for there."""

    def __init__(self, clock):
        self.clock, self.interval, self.events = clock, 30, hostenroll.Counter()
        self.tokens, self.hosts = {}, {}
        self.kids, self.retired = [], []  # the one that signs first
        self.paused = self.started = self.alive = 0  # the last gap in service, and its end
        self.pauses = []  # all of them, but those that a clock that was set back undid

    def state(self, token):
        if token.revoked or token.uses == token.maxUses:
            return "revoked" if token.revoked else "used"
        return "valid" if self.clock.ms < token.expires else "expired"

    def token_shown(self, token):
        own = [host.id for host in self.living() if host.tokenId == token.id]
        return {
            **token.asked, "state": self.state(token), "uses": token.uses,
            "usedAt": at(token.used), "usedFrom": token.used and ADDRESS,
            "revokedAt": at(token.revoked),
            "hosts": [token.hostId] * token.uses if token.hostId else own,
        }  # fmt: skip

    def prune(self):
        month_ago = self.clock.ms - 30 * DAY_MS
        for token in self.tokens.values():
            end = token.used if token.uses == token.maxUses else token.expires
            is_old = token.created < month_ago and (token.revoked or end) <= month_ago
            token.deleted = token.deleted or is_old

    def living(self, things=None):
        """The hosts, or other things, that are there, the newest first."""
        living = [it for it in (things or self.hosts).values() if not it.deleted]
        return sorted(living, key=lambda thing: thing.id, reverse=True)

    def status(self, host):
        if host.revoked or not host.last:
            return "revoked" if host.revoked else "pending"
        silence, allowed = self.silence(host.last, host.told)
        missing = "offline" if silence <= WEEK_MS else "missing"
        return "online" if silence <= allowed else missing

    def interval_of(self, host, server):
        """What a server is to tell a host."""
        own = host.shown["everySeconds"] or host.shown["intervalSeconds"]
        return own or server.interval

    def silence(self, seen, told):
        """How long a server has been there and not heard a host that was last seen then, and how
        long it may be silent and online."""
        now, allowed, silence = self.clock.ms, (3 * told + 10) * 1000, 0
        until = now if abs(now - self.alive) <= 25_000 else self.alive
        if seen > max(now, self.alive) + 300_000:  # by a clock that is no more
            if self.paused > self.started:  # by so much at least
                seen -= self.paused - self.started
            seen = min(seen, self.started)
        for begin, end in self.pauses if seen < self.started else ():
            if seen < end:
                silence, pause = silence + max(0, begin - seen), end - max(begin, seen)
                allowed += min(300_000, pause) if silence <= allowed else 0
                seen = end
        return silence + until - seen, allowed

    def shown(self, thing):
        return self.token_shown(thing) if hasattr(thing, "uses") else self.host_shown(thing)

    def host_shown(self, host):
        twin = self.hosts.get(host.twin)
        return {
            **host.shown, "status": self.status(host), "lastSeen": at(host.last),
            "revokedAt": at(host.revoked),
            "warnings": int(twin is not None and not twin.deleted and not twin.revoked)
            + (host.copied > 0 and self.clock.ms - host.copied < DAY_MS),
        }  # fmt: skip

    def twin(self, host):
        """The live host of its hostname; only the newest twenty are looked at."""
        own = host.shown["hostname"].lower().rstrip(".")
        same = [it for it in self.living() if it.organizationId == host.organizationId
                and it.shown["hostname"].lower().rstrip(".") == own][:20]  # fmt: skip
        live = (it.id for it in same if self.status(it) in ("pending", "online"))
        return next((number for number in live if number != host.id), "")

    def judge_enrollment(self, token, key, hostname):
        """The refusal; or else None, what happens, and to which host: None for a new one."""
        state = self.state(token)
        if token.deleted:
            return "token-unknown", "", None
        known = [it for it in self.living() if key and (it.admitted_by, it.key) == (token.id, key)]
        bound, action = token.hostname and token.hostname.lower(), ""
        for host in known:
            end = max(token.expires, host.admitted_at + 600_000)
            lost = host.heard < host.admitted
            lost = lost and self.clock.ms <= min(end, host.admitted_at + DAY_MS)
            action = "replay" if lost and not token.revoked and not host.revoked else ""
        if not action and (state != "valid" or known):
            return "token-used" if state == "valid" else f"token-{state}", "", None
        if bound and bound != hostname.lower().rstrip("."):
            return "token-host-mismatch", "", None
        if action:
            return None, action, known[0]
        host = self.hosts.get(token.hostId)
        if host is not None and host.revoked:
            return "host-revoked", "", None
        return None, "re-enroll" if host else "enroll", host

    def issue(self, host, held, ttl, count=1):
        """Issue a credential in place of another (0: for a token). False where it is the one that
        was issued for the same within the hour, and is still good."""
        newest, now = (self.kids[0], ttl, held), self.clock.ms
        is_same = host.newest == newest and 0 <= now - host.issued_at < 3_600_000
        if is_same and (ttl is None or now < (host.issued_at // 1000 + ttl) * 1000):
            return False
        host.newest, host.issued_at, host.issued = newest, now, host.issued + count
        return True

    def admit(self, host, token, key, facts, ttl):
        """A host enrolls with a token; again, where it was there."""
        token.uses, token.used = token.uses + 1, self.clock.ms
        host.newest, host.copied = None, 0
        self.issue(host, 0, ttl, hostenroll.SERIALS_LOST + 1 if host.issued else 1)
        host.admitted, host.admitted_at = host.issued, self.clock.ms
        host.admitted_by, host.key = token.id, key
        self.change(host, {name: text for name, text in facts.items() if text != ""})
        host.shown["intervalSeconds"] = token.intervalSeconds or host.shown["intervalSeconds"]
        host.twin = self.twin(host)

    @staticmethod
    def change(host, facts):
        before, is_fixed = dict(host.shown), host.is_bound and host.shown["hostname"]
        host.shown.update({k: v for k, v in facts.items() if k != "hostname" or not is_fixed})
        return host.shown != before

    def judge_beat(self, credential, facts):
        """The refusal; or else the beat counts."""
        now, host, expires = self.clock.ms, self.hosts[credential.host], credential.expires
        if credential.kid not in self.kids:
            return "credential-invalid"
        if expires is not None and now > expires * 1000 + WEEK_MS:
            return "credential-expired"
        if host.deleted:
            return "host-unknown"
        if credential.serial < host.heard:
            if not 0 <= now - host.copied < 3_600_000:  # one sign of a copy an hour
                host.copied = now
            return "credential-superseded"
        if host.revoked:
            return "host-revoked"
        if credential.serial > max(1, host.heard):
            host.kid = credential.kid
            self.events["supersede", "host"] += 1
        host.last = now if host.last > now + 300_000 else max(host.last, now)
        host.heard = credential.serial
        self.events["edit", "host"] += self.change(host, facts)
        return None

    def renewal(self, credential, ttl):
        """The serial of the credential in the reply to a beat that counted; None: there is none."""
        host, expires = self.hosts[credential.host], credential.expires
        is_due = credential.kid != self.kids[0] or (expires is None and ttl is not None)
        if expires is not None:
            life, left = expires - credential.issued, expires * 1000 - self.clock.ms
            is_due = is_due or (ttl is not None and life > ttl) or 3 * left < life * 1000
        if not is_due or credential.serial < host.admitted:
            return None
        self.events["renew", "host"] += self.issue(host, credential.serial, ttl)
        return host.issued

    def serve(self, interval):
        """A server starts."""
        if not self.alive:
            self.paused = self.started = self.alive = self.clock.ms
        self.keep_alive(10_000)
        self.interval = interval

    def keep_alive(self, grace=25_000):
        """A server writes that it lives; after too long, or by another clock, a gap is over. Of
        many, those with the least between them are one; where the clock was set back is none."""
        if abs(self.clock.ms - self.alive) <= grace:
            self.alive = max(self.alive, self.clock.ms)
            return
        ends = [*(begin for begin, _ in self.pauses[1:]), self.alive]
        lived = [end - pause[1] for pause, end in zip(self.pauses, ends)]
        self.pauses = [
            pause for n, pause in enumerate(self.pauses)
            if pause[1] <= self.clock.ms and sum(lived[n:]) <= WEEK_MS
        ]  # fmt: skip
        if len(self.pauses) > 16:
            between = [after[0] - before[1] for before, after in zip(self.pauses, self.pauses[1:])]
            n = between.index(min(between))
            self.pauses[n : n + 2] = [(self.pauses[n][0], self.pauses[n + 1][1])]
        self.paused, self.started = self.alive, self.clock.ms
        self.pauses += [(self.paused, self.started)] if self.paused < self.started else []
        self.alive = self.clock.ms


class Life(Model):
    """A fleet that lives at random behind two servers on one database. Whatever is done to it is
    done to the model, and both are asked what has become of it."""

    ACTS = (  # how often, the method, its arguments
        (12, "mint"), (20, "enroll"), (24, "beat", 1), (6, "beat", 6), (3, "revoke_token"),
        (2, "on_host", "revoke", "POST", "/revoke"), (5, "on_host", "restore", "POST", "/restore"),
        (2, "on_host", "edit", "PATCH", "", {}), (1, "on_host", "edit", "PATCH", "", {"name": "n"}),
        (1, "on_host", "edit", "PATCH", "", {"labels": {"a": "1"}, "name": "m"}),
        (2, "on_host", "edit", "PATCH", "", {"intervalSeconds": 45}),
        (1, "on_host", "edit", "PATCH", "", {"intervalSeconds": None, "name": "n"}),
        (3, "on_host", "delete", "DELETE"), (6, "on_host", "reenroll", "POST", "/reenroll",
                                             {"ttlSeconds": 600, "description": "again"}),
        (1, "rotate"), (2, "retire"), (2, "readyz"), (1, "housekeeping"), (2, "restart"),
        (8, "wait"), (5, "wait_for_a_boundary"),
    )  # fmt: skip
    WAITS = (0.001, 1, 30, 99, 600, 18_000, 86_400, 3 * 86_400, 9 * 86_400, -0.001, -20, -50,
             -3600, -2 * 86_400)  # fmt: skip
    HOSTNAMES = ("web-1", "WEB-1.", "web-1.lan", "web-2", "web-3")
    FACTS = ("os", "architecture", "dockerVersion", "agentVersion")
    # Who has an API key, and for which organization. Vic is a viewer, and Eve's is revoked.
    SCOPES = {"owner": None, "ann": "a-team", "ben": "b-team", "vic": None, "eve": None}

    def __init__(self, paths, clock, seed):
        super().__init__(clock)
        self.paths, self.chance = paths, random.Random(seed)
        self.credentials, self.touched = [], []
        self.servers = [self.start(30, None), self.start(30, 86_400)]
        first = self.servers[0]
        for name in ("a-team", "b-team"):
            first.act("add-org", name=name)
        self.keys = {
            name: make_api_key(first.registry, clock, scope, "viewer" if name == "vic" else "admin")
            for name, scope in self.SCOPES.items()
        }
        first.act("revoke-api-key", self.keys["eve"].split("_")[1])

    def start(self, interval, ttl):
        world = World(self.paths, self.clock, interval=interval, credential_ttl=ttl)
        world.interval, world.ttl, world.ready_at, world.pruned_at = interval, ttl, -DAY_MS, -DAY_MS
        self.kids = world.registry.keys.keyring.kids[:]
        start(world)
        self.serve(interval)
        return world

    @staticmethod
    def stop(world):
        world.run(Call(hostenroll.FINAL_AUDIT_FLUSH))
        world.registry.close()

    @property
    def server(self):
        server = self.chance.choice(self.servers)
        server.registry.keys.reload()  # as each turn of a server begins
        return server

    def one_of(self, things):
        """Most often one of the newest."""
        things = [*things.values()] if isinstance(things, dict) else things
        return self.chance.choice(things[-12:] if self.chance.random() < 0.9 else things)

    def caller(self):
        return self.chance.choices(list(self.SCOPES), [20, 3, 3, 1, 1])[0]

    def facts(self):
        names = self.chance.sample(self.FACTS, self.chance.choice([0, 0, 1, 2]))
        facts = {name: self.chance.choice(["x", "y", ""]) for name in names}
        rhythms = [{}] * 8 + [{"everySeconds": 7}, {"everySeconds": None}]
        return {**facts, **self.chance.choice(rhythms)}

    def ask(self, caller, method, path, body=None):
        return self.server.call(method, path, body, self.keys[caller])

    def refusal(self, caller, thing):
        """Of a caller who wants to change a thing; None for a thing that is not there."""
        if caller in ("eve", "vic"):
            return "api-key-invalid" if caller == "eve" else "forbidden"
        is_own = thing and self.SCOPES[caller] in (None, thing.organizationId)
        return None if is_own else "not-found"

    def took(self, text, host, serial, server):
        """Read a credential as anybody can, and keep it."""
        parts = (part + "=" * (-len(part) % 4) for part in text.split(".")[:2])
        header, claims = (json.loads(base64.urlsafe_b64decode(part)) for part in parts)
        assert header == {"alg": "HS256", "typ": "JWT", "kid": self.kids[0]}
        issued = host.issued_at // 1000
        expires = None if server.ttl is None else issued + server.ttl
        wanted = {"iss": "hostenroll", "sub": host.id, "org": host.organizationId, "iat": issued,
                  "ser": serial, **({} if expires is None else {"exp": expires})}  # fmt: skip
        assert claims == wanted
        self.credentials.append(SimpleNamespace(
            text=text, host=host.id, serial=serial, kid=self.kids[0], issued=issued, expires=expires
        ))  # fmt: skip
        return {"credential": text, "credentialExpiresAt": at(expires and expires * 1000)}

    def minted(self, reply, caller, ttl, **asked):
        document, now = dict(reply.document), self.clock.ms
        expires, text, number = now + ttl * 1000, document.pop("token"), document["id"]
        by = f"api-key:{self.keys[caller].split('_')[1]}"
        asked.update(id=number, createdAt=at(now), createdBy=by, expiresAt=at(expires))
        assert number not in self.tokens and reply.status == 201
        token = self.tokens[number] = SimpleNamespace(
            **asked, asked=asked, text=text, uses=0, used=None, revoked=None, deleted=False,
            created=now, expires=expires,
        )  # fmt: skip
        self.events["mint", "token"] += 1
        assert document == self.token_shown(token)

    def mint(self):
        caller, choice = self.caller(), self.chance.choice
        ttl = choice([60, 3600, 86_400, 30 * 86_400])
        asked = choice([None, None, "default", "a-team", "b-team", "nowhere"])
        values = {"maxUses": choice([1, 1, 2, 5]), "description": choice("xy"),
                  "labels": choice([{}, {}, {"rack": "b4"}]), "organizationId": asked,
                  "intervalSeconds": choice([None, None, None, 100]),
                  "hostname": choice([None, None, None, "web-1"])}  # fmt: skip
        body = {"ttlSeconds": ttl, **{name: it for name, it in values.items() if it}}
        reply = self.ask(caller, "POST", "/api/hosts/tokens", body)
        values["organizationId"] = asked or self.SCOPES[caller] or "default"
        refused = self.refusal(caller, SimpleNamespace(**values))
        refused = "invalid-body" if refused is None and asked == "nowhere" else refused
        assert reply.code == refused
        if refused is None:
            self.minted(reply, caller, ttl, hostId=None, **values)

    def enroll(self):
        token, server = self.one_of(self.tokens), self.server
        key, hostname = self.chance.choice(["", "k", "m"]), self.chance.choice(self.HOSTNAMES)
        facts = self.facts()
        refused, action, host = self.judge_enrollment(token, key, hostname)
        reply = server.enroll(token.text, hostname, key, **facts)
        assert reply.code == refused
        self.touched.append(token)
        if refused:
            return
        if action == "enroll":
            host = self.newcomer(reply.document["hostId"], token, hostname)
        if action == "replay":
            self.events[action, "host"] += self.issue(host, 0, server.ttl)
        else:
            self.admit(host, token, key, {**facts, "hostname": hostname}, server.ttl)
            host.told = max(host.told, self.interval_of(host, server))
            self.events[action, "host"] += 1
        self.hosts[host.id] = host
        self.touched += [host, token]
        assert reply.status == 201 and reply.document == {
            "hostId": host.id, "organizationId": host.organizationId, "name": host.shown["name"],
            **self.took(reply.document["credential"], host, host.issued, server),
            "heartbeatIntervalSeconds": self.interval_of(host, server),
        }  # fmt: skip

    def newcomer(self, number, token, hostname):
        assert number not in self.hosts, "an id has come back"
        fixed = {"id": number, "organizationId": token.organizationId, "tokenId": token.id}
        shown = {
            **fixed, "name": hostname, "hostname": "", **dict.fromkeys(self.FACTS, ""),
            "labels": token.labels, "enrolledAt": at(self.clock.ms), "everySeconds": None,
            "intervalSeconds": None,
        }  # fmt: skip
        return SimpleNamespace(
            **fixed, shown=shown, is_bound=token.hostname is not None, issued=0, heard=0, last=0,
            kid=self.kids[0], revoked=None, deleted=False, told=0,
        )  # fmt: skip

    def beat(self, count):
        """So many hosts in one tick; one may tell its facts."""
        facts = self.facts() if count == 1 else {}
        server, hostname = self.server, self.chance.choice([*self.HOSTNAMES, *[None] * 20])
        facts.update({"hostname": hostname} if hostname else {})
        drawn = [self.one_of(self.credentials) for _ in range(count) if self.credentials]
        credentials = list({credential.host: credential for credential in drawn}.values())
        replies = server.tick([beat_bytes(it.text, **facts) for it in credentials])
        for credential, reply in zip(credentials, replies):
            host, refused = self.hosts[credential.host], self.judge_beat(credential, facts)
            assert reply.code == refused
            self.touched.append(host)
            if refused is None:
                document = dict(reply.document)
                host.told = self.interval_of(host, server)
                assert 0.85 <= document.pop("nextHeartbeatSeconds") / host.told <= 1.15
                serial = self.renewal(credential, server.ttl)
                wanted = {"hostId": host.id, "lastSeen": at(host.last)}
                if serial is not None:
                    wanted.update(self.took(document["credential"], host, serial, server))
                assert document == wanted

    def on_host(self, action, method, more="", body=None):
        """A caller wants something of a host that may be gone."""
        caller, host = self.caller(), self.one_of(self.hosts)
        reply = self.ask(caller, method, f"/api/hosts/{host.id}{more}", body)
        assert reply.code == self.refusal(caller, None if host.deleted else host)
        self.touched.append(host)
        if reply.code is not None:
            return
        if action == "reenroll":
            asked = {"description": "again", "labels": {}, "maxUses": 1, "hostname": None}
            asked["intervalSeconds"] = None
            asked.update(hostId=host.id, organizationId=host.organizationId)
            self.minted(reply, caller, 600, **asked)
            return
        before = bool(host.revoked), host.deleted, dict(host.shown)
        if action in ("revoke", "restore") and before[0] != (action == "revoke"):
            host.revoked = self.clock.ms if action == "revoke" else None
        host.deleted = action == "delete"
        host.shown.update(body or {})
        self.events[action, "host"] += before != (bool(host.revoked), host.deleted, host.shown)
        assert host.deleted or self.plain(reply.document) == self.host_shown(host)
        for token in self.tokens.values():
            if host.deleted and token.hostId == host.id and not token.deleted:
                token.revoked = token.revoked or self.clock.ms

    def revoke_token(self):
        caller, token = self.caller(), self.one_of(self.tokens)
        reply = self.ask(caller, "DELETE", f"/api/hosts/tokens/{token.id}")
        assert reply.code == self.refusal(caller, None if token.deleted else token)
        if reply.code is None and not token.revoked:
            token.revoked = self.clock.ms
            self.events["revoke", "token"] += 1
        self.touched.append(token)

    def rotate(self):
        kid = self.server.act("rotate-signing-key").key.kid
        assert kid not in (*self.kids, *self.retired)
        self.kids.insert(0, kid)
        self.events["rotate", "signing-key"] += 1

    def retire(self):
        kid, force = self.chance.choice([*self.kids, *self.retired]), self.chance.random() < 0.3
        # How many hosts may hold a credential of that key.
        as_old = self.kids[self.kids.index(kid) :] if kid in self.kids else []
        hosts = len([host for host in self.living() if host.kid in as_old])
        refused = "conflict" if kid == self.kids[0] or (hosts and not force) else None
        refused = refused if as_old else "not-found"
        values = {"kid": kid, **({"force": "yes"} if force else {})}
        try:
            outcome = self.server.act("retire-signing-key", **values).hosts
        except Problem as problem:
            outcome = problem.code
        assert outcome == (hosts if refused is None else refused)
        if refused is None:
            self.kids.remove(kid)
            self.retired.append(kid)
            self.events["retire", "signing-key"] += 1

    def readyz(self):
        server, now = self.server, self.clock.ms
        assert server.call("GET", "/readyz").status == 200
        if not 0 <= now - server.ready_at < 1000:
            server.ready_at = now
            self.keep_alive()

    def housekeeping(self):
        server, now = self.server, self.clock.ms
        while server.housekeeping():
            pass
        self.keep_alive()
        if not 0 <= now - server.pruned_at < 3_600_000:
            server.pruned_at = now
            self.prune()

    def restart(self):
        n = self.chance.randrange(2)
        self.stop(self.servers[n])
        options = self.chance.choice([1, 30, 30, 300]), self.chance.choice([None, 600, 172_800])
        self.servers[n] = self.start(*options)

    def wait(self):
        self.turn_clock(self.clock.ms + int(self.chance.choice(self.WAITS) * 1000))

    def wait_for_a_boundary(self):
        """To the very millisecond at which something will be judged otherwise, or one beside."""
        bounds = [token.expires for token in [*self.tokens.values()][-5:]]
        for host in [*self.hosts.values()][-5:]:
            silence, allowed = self.silence(host.last, host.told)
            bounds += [self.clock.ms - silence + it for it in (allowed, WEEK_MS)]
            bounds += [host.issued_at + 3_600_000]
            bounds += [host.admitted_at + 600_000, host.admitted_at + DAY_MS]
            bounds += [host.copied + 3_600_000, host.copied + DAY_MS]
        for credential in self.credentials[-5:]:
            if credential.expires is not None:
                end, life = credential.expires * 1000, credential.expires - credential.issued
                bounds += [end + WEEK_MS, end - life * 1000 // 3]
        near = [bound for bound in bounds if -1 <= bound - self.clock.ms <= 8 * DAY_MS]
        if near:
            self.turn_clock(self.chance.choice(near) + self.chance.choice([-1, 0, 1]))

    def turn_clock(self, milliseconds):
        self.clock.now = (milliseconds + 0.5) / 1000  # not to be rounded into another

    @staticmethod
    def plain(document):
        """A document without the sentences about a host, and without where it is and what it was
        refused for, which have tests of their own."""
        for name in ("address", "addressSince", "enrolledFrom", "refusedAt", "refusedCode"):
            document.pop(name, None)
        if document.pop("statusReason", ""):
            document["warnings"] = len(document["warnings"])
        return document

    def look(self):
        """At what was touched, and at something that was not."""
        for things in (self.hosts, self.tokens):
            self.touched += self.chance.choices(list(things.values())) if things else []
        for thing in {id(thing): thing for thing in self.touched}.values():
            path = f"tokens/{thing.id}" if hasattr(thing, "uses") else thing.id
            reply = self.ask("vic", "GET", f"/api/hosts/{path}")
            assert reply.code == ("not-found" if thing.deleted else None)
            assert thing.deleted or self.plain(reply.document) == self.shown(thing)
        self.touched = []

    def documents(self, noun, scope):
        """Every item of a list, by any of the servers."""
        by = Principal("any", scope, "viewer")
        found = pages(self.server, f"list-{noun}s", limit=1000, by=by)
        return [OPERATION[f"show-{noun}"].document(it) for page in found for it in page.items]

    def look_at_all(self):
        """At every list, by each who sees another part of the fleet, and at the counts."""
        hosts, tokens = self.living(), self.living(self.tokens)
        for scope in (None, "a-team", "b-team"):
            mine = [it for it in (*hosts, *tokens) if scope in (None, it.organizationId)]
            documents = self.documents("host", scope) + self.documents("token", scope)
            assert [self.plain(it) for it in documents] == [self.shown(it) for it in mine]
        exposed = self.ask("owner", "GET", "/metrics").document.splitlines()
        counts = hostenroll.Counter((it.organizationId, self.status(it)) for it in hosts)
        for organization in ("default", "a-team", "b-team"):
            for status in hostenroll.STATUSES:
                labels = f'organization="{organization}",status="{status}"'
                assert f"hostenroll_hosts{{{labels}}} {counts[organization, status]}" in exposed
        views = self.server.act("list-signing-keys").items
        states = {**dict.fromkeys(self.retired, "retired"), **dict.fromkeys(self.kids, "verifies"),
                  self.kids[0]: "signs"}  # fmt: skip
        holders = hostenroll.Counter(host.kid for host in hosts)
        assert {view.key.kid: (view.state, view.hosts) for view in views} == {
            kid: (state, holders[kid]) for kid, state in states.items()
        }

    def look_at_log(self):
        """Every act has left its event, once, or is counted in one."""
        for server in self.servers:
            server.run(Call(hostenroll.FINAL_AUDIT_FLUSH))
        world, found = self.servers[0], hostenroll.Counter()
        for event in log_of(world):
            more = json.loads(event.detail).get("more", 1)
            found[event.action, event.subject.partition(":")[0]] += more * (event.code is None)
        found = +found
        for event in (("add", "organization"), ("mint", "api-key"), ("revoke", "api-key")):
            assert found.pop(event)
        assert found == +self.events
        assert verify_audit(world.registry, None)

    def live(self, acts):
        for n in range(1, acts + 1):
            (act,) = self.chance.choices(self.ACTS, [weight for weight, *_ in self.ACTS])
            if not self.tokens or (act[1] == "on_host" and not self.hosts):
                act = self.ACTS[0]
            try:
                getattr(self, act[1])(*act[2:])
                self.look()
                if n % 500 == 0 or n == acts:
                    self.look_at_all()
            except BaseException:
                print(f"it was act {n}: {act}")
                raise
        self.look_at_log()


@pytest.mark.parametrize("acts", [300, pytest.param(10_000, marks=slow)])
def test_a_long_random_life_is_as_the_model_says(acts, paths, clock):
    seed = int(os.environ.get("HOSTENROLL_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"to see it again: HOSTENROLL_SEED={seed}")
    life = Life(paths, clock, seed)
    try:
        life.live(acts)
    finally:
        for server in life.servers:
            server.registry.close()


# Databases of the first version.


@pytest.mark.parametrize("ttl", [None, 300], ids=["without an end", "300 s"])
def test_the_fleet_of_the_first_version_goes_on_as_it_was(ttl, paths, clock):
    old = old_fleet(paths, clock)
    ids = {name: hostenroll.id_text(number) for name, number in old.ids.items()}
    pending, shut = {"never beat", "asked again"}, ("revoked", "revoked before it beat")
    with World(paths, clock, credential_ttl=ttl) as world:
        door = RegistryDoor(world.registry, clock)  # these keys have spaces, which HTTP refuses
        status = {name: world.host(ids[name]).document["status"] for name in ids}
        assert {name for name in ids if status[name] == "pending"} == pending
        assert {name for name in ids if status[name] == "revoked"} == {*shut}
        for name in shut:
            assert world.beat(old.credential(name, 1)).code == "host-revoked"
            world.restore(ids[name])
            assert world.beat(old.credential(name, 1)).status == 200
        for name in ("beats", "renewed", "never beat", "asked again", "re-enrolls"):
            again = door.enroll(old.used.text, "any", name)  # its reply was lost, or not
            lost = {"never beat": 2, "asked again": 4, "re-enrolls": 6}.get(name)
            assert again.code == (None if lost else "token-used")
            if lost:
                assert again.document["hostId"] == ids[name]
                assert serial_of(world, again.document["credential"]) == lost
        for name, good, bad in (  # the serials that are good, in the order of their use, and bad
            ("beats", [1], []), ("renewed", [3, 4], [1, 2]), ("never beat", [1], []),
            ("asked again", [1, 2, 3], []), ("re-enrolls", [3, 5], [2]),
        ):  # fmt: skip
            for serial in bad:
                assert world.beat(old.credential(name, serial)).code == "credential-superseded"
            for serial in good:
                world.advance(0.001)
                beaten = world.beat(old.credential(name, serial)).document
                assert beaten["lastSeen"] == hostenroll.rfc3339(clock.ms)
                renews = ttl is not None and serial >= OLD_HOSTS[name][1]
                assert ("credential" in beaten) == renews, (name, serial)
            for serial in good[:-1]:
                assert world.beat(old.credential(name, serial)).code == "credential-superseded"
            assert world.host(ids[name]).document["status"] == "online"
    assert bad_in(paths) == []


# Signing keys.


def rotate(world):
    return world.act("rotate-signing-key").key.kid


def retire(world, kid, force=False):
    """Retire a key; how many hosts that locks out at most."""
    view = world.act("retire-signing-key", kid=kid, force=force)
    assert (view.key.kid, view.state) == (kid, "retired")
    return view.hosts


def keys_of(world):
    """State of each key, and how many hosts use it."""
    return {view.key.kid: (view.state, view.hosts) for view in world.act("list-signing-keys").items}


def header_of(credential):
    """The header of a JWT."""
    text = credential.partition(".")[0]
    return json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))


def renewal(world, credential):
    """The credential that a heartbeat brings; None if it brings none."""
    reply = world.beat(credential)
    assert reply.status == 200, reply
    return reply.document.get("credential")


def test_a_key_file_that_cannot_be_read_costs_no_descriptor_and_is_read_again(world, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(hostenroll.OperatorError, match="cannot read the key file"):
            load(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
    # Out of descriptors: the file does not change when that is over.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    write(world.paths[1], world.registry.keys.keyring.rotated())
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
    try:
        world.registry.keys.reload()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "Too many open files" in world.registry.keys.file.trouble
    world.housekeeping()
    assert world.registry.keys.file.trouble == "" and len(world.registry.keys.keyring.keys) == 2


def test_a_key_lives_from_rotation_to_retirement(world):
    old = world.registry.keys.keyring.first.kid
    (_, credential), (_, never_beat) = world.join(), world.join("web-2")
    world.beat(credential)
    assert keys_of(world) == {old: ("signs", 2)}
    with pytest.raises(hostenroll.Conflict):
        retire(world, old, force=True)
    new = rotate(world)
    assert keys_of(world) == {new: ("signs", 0), old: ("verifies", 2)}
    world.join("web-3")
    renewed = [renewal(world, it) for it in (credential, never_beat)]
    # A renewal that is not used yet may have been lost.
    assert keys_of(world) == {new: ("signs", 1), old: ("verifies", 2)}
    world.beat(renewed[0])
    assert keys_of(world) == {new: ("signs", 2), old: ("verifies", 1)}
    with pytest.raises(hostenroll.Conflict, match=r": 1\."):
        retire(world, old)
    # The refusal to retire has changed nothing.
    assert [world.beat(it).status for it in (never_beat, renewed[1])] == [200, 200]
    assert retire(world, old) == 0
    assert keys_of(world) == {new: ("signs", 3), old: ("retired", 0)}
    assert load(world.paths[1]).kids == [new]
    assert [renewal(world, it) for it in renewed] == [None, None]
    assert world.beat(credential).code == "credential-invalid"
    for kid in (old, "unknown", ""):
        with pytest.raises(hostenroll.NotFound):
            retire(world, kid)


def test_a_host_that_is_locked_out_by_force_comes_back_by_a_re_enroll_token(world):
    old, (number, credential) = world.registry.keys.keyring.first.kid, world.join()
    beat = world.heartbeat(credential)
    assert world.run(beat) == [world.clock.ms]
    new = rotate(world)
    late = world.admit(beat_bytes(credential, os="x")), beat
    assert retire(world, old, force=True) == 1
    assert keys_of(world) == {new: ("signs", 0), old: ("retired", 1)}
    assert world.beat(credential).code == "credential-invalid"
    # Their requests were read before the retirement; a tick that fails does not forget it.
    assert [problem.code for problem in world.run(*late)] == ["credential-invalid"] * 2
    with faulty(world.registry, only="COMMIT"):
        world.run(*late)
    assert [problem.code for problem in world.run(*late)] == ["credential-invalid"] * 2
    world.beat(reenrolled(world, number))
    assert keys_of(world) == {new: ("signs", 1), old: ("retired", 0)}


def knows_keys(world):
    """Whether the key file has just the keys that the database has not retired."""
    kids = {kid for (kid,) in world.sql("SELECT kid FROM signing_key WHERE retired_at IS NULL")}
    return kids == set(world.registry.keys.keyring.kids)


def test_a_key_that_the_database_does_not_know_or_has_retired_is_taken(world):
    """After a rotation that was killed before its commit, and then a host enrolls at once; and the
    remedy for a hasty --force: the key file of a backup."""
    old, (_, credential) = world.registry.keys.keyring.first.kid, world.join()
    rotated = load(world.paths[1]).rotated()
    for n in (1, 2):
        write(world.paths[1], rotated)
        world.registry.keys.reload()
        world.join()
        world.housekeeping()
        assert knows_keys(world)
        assert keys_of(world) == {rotated.first.kid: ("signs", n), old: ("verifies", 1)}
        events = [(event["subject"], event["actor"]) for event in world.audit("rotate")]
        kids = [rotated.first.kid, old][:n]
        assert events == [(f"signing-key:{kid}", "key-file") for kid in kids]
        if n == 1:
            retire(world, old, force=True)
    assert renewal(world, credential) is not None


def test_what_a_command_does_to_the_keys_another_process_goes_by_at_once(world):
    """Without a look at the file in every tick. A host waits for an hour after a 401."""
    old, (number, credential) = world.registry.keys.keyring.first.kid, world.join()
    beat = world.heartbeat(credential)
    with World(world.paths, world.clock) as command:
        new = rotate(command)
        fresh = reenrolled(command, number)
        assert world.beat(fresh).code == "storage-unavailable"
        world.registry.follow()  # as before each turn
        assert world.beat(fresh).status == 200
        assert [row["kid"] for row in map(header_of, (credential, fresh))] == [old, new]
        newest = rotate(command)
        assert header_of(world.join("web-2")[1])["kid"] == newest
        retire(command, new, force=True)
        world.registry.follow()
        assert world.beat(fresh).code == "credential-invalid"
        retire(command, old, force=True)
        world.registry.follow()
        assert [problem.code for problem in world.run(beat)] == ["credential-invalid"]
        assert keys_of(world) == {newest: ("signs", 1), new: ("retired", 1), old: ("retired", 0)}
    world.housekeeping()
    assert len(world.audit("rotate")) == len(world.audit("retire")) == 2


def test_a_credential_by_a_key_that_cannot_be_read_yet_is_asked_for_later(world):
    number, (_, junk) = world.join()[0], world.join("web-2")
    with World(world.paths, world.clock) as command:
        rotate(command)
        fresh = reenrolled(command, number)
    junk = junk[:-4] + "AAAA"
    os.chmod(world.paths[1], 0o644)
    assert [world.beat(it).code for it in (fresh, junk)] == ["storage-unavailable"] * 2
    os.chmod(world.paths[1], 0o600)
    world.housekeeping()
    assert world.beat(fresh).status == 200 and world.beat(junk).code == "credential-invalid"


def test_the_key_file_of_another_database_is_not_taken_for_ours(world):
    """It would refuse the whole fleet, and break the chain of the audit log for good."""
    path, (_, credential) = world.paths[1], world.join()
    for is_ours, keyring in enumerate((hostenroll.new_keyring(), load(path))):
        write(path, keyring)
        world.registry.keys.reload()
        trouble = world.registry.keys.file.trouble
        assert (path in trouble) == (trouble != "") == (not is_ours)
        assert world.beat(credential).status == 200
        world.join()
        world.housekeeping()
    assert verified(world).last and len(keys_of(world)) == 1


@pytest.mark.parametrize("retires", [False, True], ids=["rotate", "retire"])
def test_a_key_file_that_cannot_be_written_is_the_operators_trouble(retires, world):
    path, change = world.paths[1], partial(rotate, world)
    if retires:
        change = partial(retire, world, world.registry.keys.keyring.first.kid)
        rotate(world)
    before, key = world.snapshot(), Path(path).read_bytes()
    os.mkdir(f"{path}.tmp")
    with pytest.raises(hostenroll.OperatorError, match=re.escape(path)):
        change()
    assert (world.snapshot(), Path(path).read_bytes()) == (before, key)
    assert is_free(world.paths)
    os.rmdir(f"{path}.tmp")
    change()
    assert knows_keys(world)


@slow
@pytest.mark.parametrize("command", ["rotate", "retire"])
def test_a_change_of_keys_that_is_killed_locks_no_host_out(command, paths, clock, folder):
    with World(paths, clock) as world:
        credential = world.join()[1]
        for _ in range(2):
            rotate(world)
        credential = renewal(world, credential)
        world.beat(credential)
        copies, kids = backup(world, folder), world.registry.keys.keyring.kids
    change = rotate if command == "rotate" else partial(retire, kid=kids[-1], force=True)
    changed, n, killed = 0, 0, True
    while killed:
        n += 1
        restore(paths, copies)
        killed = killed_at(n, lambda: World(paths, clock), change)
        now = load(paths[1]).kids  # whole, at any time
        assert stat.S_IMODE(os.stat(paths[1]).st_mode) == 0o600
        assert now in (kids, kids[:-1] if command == "retire" else [now[0], *kids])
        changed += now != kids
        with World(paths, clock) as world:
            assert knows_keys(world) and world.registry.keys.keyring.kids == now
            assert (world.beat(credential).status, bool(world.join())) == (200, True)
            assert verified(world).last
            assert len(world.audit("rotate")) == len(keys_of(world)) - 1
    assert n > 20 and changed >= 2


# Backups.


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "copy").mkdir(mode=0o700)
    return tmp_path / "copy"


def backup(world, folder):
    return world.registry.backup(str(folder))


def copies_in(paths, folder):
    return tuple(str(folder / os.path.basename(path)) for path in paths)


def bad_in(paths):
    return [finding for finding in hostenroll.examine(*paths) if not finding.is_good]


def test_a_backup_is_a_pair_that_works(world, folder):
    number, credential = world.join()
    world.beat(credential)
    copies = copies_in(world.paths, folder)
    assert backup(world, folder) == copies
    assert sorted(os.listdir(folder)) == ["hostenroll.db", "hostenroll.key"]
    assert {stat.S_IMODE(os.stat(path).st_mode) for path in copies} == {0o600}
    histories = [look(world.registry, "SELECT history FROM feed")]

    def copied():
        """What the copy has: all but the history."""
        what, rows = contents(copies[0])
        histories.append([rows["feed"][0][1:2]])
        assert rows["feed"][0][2:] == (rows["change"][-1][0], rows["audit"][-1][0])
        return what, {**rows, "feed": world.snapshot()["feed"]}

    assert copied() == (sorted(anatomy(world.paths[0])), world.snapshot())
    assert bad_in(copies) == []
    world.join()
    assert is_free(world.paths) and not world.registry.engine._connection.in_transaction
    backup(world, folder)  # over the older one
    assert copied()[1] == world.snapshot()
    assert len(set(map(str, histories))) == 3
    with World(copies, world.clock) as copy:
        assert copy.host(number).document["status"] == "online"
        assert copy.beat(credential).status == 200


@pytest.fixture
def pauses(monkeypatch):
    """What is done while a backup pauses for the n-th time, by n. A page is copied at a time."""
    monkeypatch.setattr(hostenroll, "BACKUP_PAGES", 1)
    actions, count = {}, itertools.count()
    monkeypatch.setattr(hostenroll.time, "sleep", lambda _: actions.pop(next(count), int)())
    return actions


@pytest.mark.parametrize("retires", [False, True], ids=["rotated", "and the old key retired"])
def test_keys_that_change_during_a_backup_leave_a_good_pair_or_none(retires, world, folder, pauses):
    old, renewed = world.registry.keys.keyring.first.kid, []
    _, credential = world.join()

    def change():
        with World(world.paths, world.clock) as other:
            rotate(other)
            renewed.append(renewal(other, credential))
            other.beat(renewed[0])
            if retires:
                retire(other, old)

    pauses[3] = change
    if retires:  # the copy would know none of the keys beside it
        with pytest.raises(hostenroll.OperatorError, match="again"):
            backup(world, folder)
        assert renewed and os.listdir(folder) == []
    copies = backup(world, folder)
    assert sql(copies[0], "SELECT count(*) FROM signing_key") == [(1 + retires,)]
    with World(copies, world.clock) as copy:
        assert knows_keys(copy) and verified(copy).last
        assert copy.beat(renewed[0]).status == 200
    assert bad_in(copies) == []


@pytest.mark.parametrize("spoil", table({
    # what is done, with the paths that the copies will have
    "a folder where the database goes": lambda ours: os.mkdir(ours[0]),
    "a folder where the keys go": lambda ours: os.mkdir(ours[1]),
    "a database in use": lambda ours: Path(ours[0] + "-wal").touch(),
    "another fleet's": lambda ours: open_registry(*ours, 1).close(),
    "keys that are damaged": lambda ours: Path(ours[1]).write_text("a text"),
    "a text": lambda ours: Path(ours[0]).write_text("a text"),
}))  # fmt: skip
def test_a_backup_goes_over_nothing_but_an_older_one_of_its_own(spoil, world, folder):
    ours = copies_in(world.paths, folder)
    spoil(ours)
    before = {path.name: path.is_dir() or path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(hostenroll.OperatorError, match="name another folder"):
        backup(world, folder)
    assert {path.name: path.is_dir() or path.read_bytes() for path in folder.iterdir()} == before
    for path in folder.iterdir():
        path.rmdir() if path.is_dir() else path.unlink()
    for _ in range(2):
        rotate(world)
        assert backup(world, folder) == ours
    assert bad_in(ours) == []


@needs_root
@pytest.mark.parametrize("prepare", table(PREPARED))
def test_a_backup_goes_through_nothing_that_the_owner_of_its_folder_prepared(
    prepare, world, folder, tmp_path
):
    os.chown(folder, SERVICE, SERVICE)
    (tmp_path / "secret").write_bytes(b"of root")
    ours = copies_in(world.paths, folder)
    for path in ours:
        prepare(Path(path))
        with pytest.raises(hostenroll.OperatorError, match="name another folder"):
            backup(world, folder)
        os.unlink(path)
        prepare(Path(f"{path}.tmp"))
    assert backup(world, folder) == ours and sorted(map(str, folder.iterdir())) == sorted(ours)
    assert [owned(path) for path in ours] == [(0, 0, 0o600)] * 2
    assert (tmp_path / "secret").read_bytes() == b"of root" and bad_in(ours) == []


@needs_root
@pytest.mark.parametrize("act, mode, names, wanted", table({
    "first start": ("start", 0o1777, ["db", "key", "key.tmp"], {"done", "refused"}),
    "rotation": ("rotate", 0o777, ["key", "key.tmp"], {"done", "refused"}),
    "backup": ("backup", 0o755, ["db.tmp", "key.tmp"], {"refused"}),  # it takes several turns
}))  # fmt: skip
def test_who_exchanges_files_all_the_time_gets_no_key(act, mode, names, wanted, clock, tmp_path):
    """He may write in the folder of the files, or owns that of the backup."""
    data, copy, secret = tmp_path / "data", tmp_path / "copy", tmp_path / "secret"
    for place in (data, copy):
        place.mkdir(mode=0o755)
    os.chown(copy, SERVICE, SERVICE)
    secret.write_bytes(b"of root")
    secret.chmod(0o600)
    paths = str(data / "hostenroll.db"), str(data / "hostenroll.key")
    open_registry(*paths, clock.ms).close()
    keys = load(paths[1])

    def work():
        if act == "start":
            for path in data.iterdir():
                path.unlink(missing_ok=True)
        else:
            Path(paths[1]).unlink(missing_ok=True)
            write(paths[1], keys)
        with World(paths, clock) as world:
            if act == "rotate":
                rotate(world)
            elif act == "backup":
                backup(world, copy)

    data.chmod(mode)
    place = copy if act == "backup" else data
    with exchanging(place, *(f"hostenroll.{name}" for name in names)):
        assert outcomes_of(work, wanted) >= wanted
    assert secret.read_bytes() == b"of root"


def test_a_backup_into_a_folder_where_anybody_may_replace_it_is_refused(world, folder):
    folder.chmod(0o777)
    with pytest.raises(
        hostenroll.OperatorError, match=rf"^anybody .* {folder}: name another folder"
    ):
        backup(world, folder)
    assert os.listdir(folder) == []
    folder.chmod(0o1777)
    backup(world, folder)


def test_a_first_start_that_fails_removes_its_own_key_file_alone(paths, clock, monkeypatch):
    """The folder may be another one by then."""
    for is_ours in (True, False):

        def fail(engine, is_ours=is_ours):
            if not is_ours:
                os.rename(write(Path(f"{paths[1]}.other")), paths[1])
            raise hostenroll.StoreError("no room")

        monkeypatch.setattr(hostenroll.Engine, "create_schema", fail)
        with pytest.raises(hostenroll.StoreError, match="no room"):
            open_registry(*paths, clock.ms)
        assert os.path.exists(paths[1]) is not is_ours


def test_a_backup_for_which_there_is_no_room_leaves_the_older_one_whole(world, folder):
    copies = backup(world, folder)
    before, size = contents(copies[0]), os.stat(copies[0]).st_size
    world.join()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (size - 4096, 4096, 1000, 0):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises((OSError, hostenroll.OperatorError, hostenroll.StoreError)):
                backup(world, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [name for name in os.listdir(folder) if "tmp" in name] == []
        assert contents(copies[0]) == before and bad_in(copies) == []
    world.join()


@pytest.mark.parametrize("where, names, word", table({
    "where the database is": ("data", ("x.db", "x.key"), "in use"),
    "where the key file is": ("keys", ("x.db", "x.key"), "in use"),
    "through a link": ("link", ("x.db", "x.key"), "in use"),
    "two of one name": ("copy", ("fleet", "fleet"), "name"),
}))  # fmt: skip
def test_a_backup_never_goes_over_what_it_copies(where, names, word, clock, tmp_path, folder):
    for name in ("data", "keys"):
        (tmp_path / name).mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("data")
    apart = str(tmp_path / "data" / names[0]), str(tmp_path / "keys" / names[1])
    with World(apart, clock) as world:
        before = world.snapshot()
        with pytest.raises(hostenroll.OperatorError, match=word):
            backup(world, tmp_path / where)
        assert world.snapshot() == before and os.listdir(folder) == []
    assert bad_in(apart) == []


def test_two_backups_into_one_folder_do_not_spoil_each_other(world, folder, pauses):
    def again():  # as a timer that fires before the last copy is done
        with World(world.paths, world.clock) as other:
            with contextlib.suppress(hostenroll.OperatorError, hostenroll.StoreError):
                backup(other, folder)

    pauses[3] = again
    copies = backup(world, folder)
    assert sorted(os.listdir(folder)) == ["hostenroll.db", "hostenroll.key"]
    assert contents(copies[0])[1]["host"] == world.snapshot()["host"]
    assert not pauses
    backup(world, folder)


@slow
def test_a_backup_that_is_killed_leaves_the_older_one_whole(paths, clock, folder):
    with World(paths, clock) as world:
        copies = backup(world, folder)
        rotate(world)
    seen, left, n, killed = [1], set(), 0, True
    while killed:
        n += 1
        killed = killed_at(n, lambda: World(paths, clock), partial(backup, folder=folder))
        left |= set(os.listdir(folder))
        assert sql(copies[0], "PRAGMA integrity_check") == [("ok",)]
        kids = {kid for (kid,) in sql(copies[0], "SELECT kid FROM signing_key")}
        seen.append(len(kids))
        assert kids <= set(load(copies[1]).kids)
    assert seen == sorted(seen) and set(seen) == {1, 2}
    assert n > 15 and {"hostenroll.db.tmp", "hostenroll.key.tmp"} <= left
    assert sorted(os.listdir(folder)) == ["hostenroll.db", "hostenroll.key"]
    assert bad_in(copies) == []


def restore(paths, copies):
    """Put a backup in the place of a database; the WAL beside it belongs to the old one."""
    lose(paths[0])
    for source, target in zip(copies, paths):
        shutil.copy(source, target)


@pytest.mark.parametrize("keys", ["of the backup", "kept"])
def test_a_backup_that_is_restored_brings_back_its_day(keys, paths, clock, folder):
    with World(paths, clock) as world:
        start(world)
        (early, credential), (shut, back) = world.join("early"), world.join("shut")
        for it in (credential, back):
            world.beat(it)
        waiting, good = world.token(), [credential, back]  # the revocation will be undone
        copies = backup(world, folder)
        late, last = world.join("late")
        assert [world.beat(last).status, world.revoke(shut).status] == [200, 200]
        assert world.enroll(waiting).status == 201
        if keys == "kept":
            rotate(world)
            good.append(renewal(world, credential))
            assert renewal(world, good[-1]) is None
    clock.advance(3600)
    restore(paths, copies if keys == "of the backup" else copies[:1])
    with World(paths, clock) as world:
        start(world)
        assert world.host(early).document["status"] == "online"  # no server ran meanwhile
        assert [world.beat(it).status for it in good] == [200] * len(good)
        assert world.beat(last).code == "host-unknown"
        assert world.join("late")[0] != late and verified(world).last
    assert bad_in(paths) == []


# What check looks at.

SOUND = dict.fromkeys(("schema", "integrity", "sqlite", "keys", "minted", "audit", "modes"), True)


def verdicts(paths):
    return {finding.name: finding.is_good for finding in hostenroll.examine(*paths)}


def bytes_of(paths):
    return [Path(path).read_bytes() if os.path.isfile(path) else None for path in paths]


def drop_index_entries(path):
    """As SQLite leaves it when it is cut short: a row without its entry in an index."""
    (text,) = sql(path, "SELECT sql FROM sqlite_master WHERE name = 'host_token'")[0]
    sql(path, "DROP INDEX host_token")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(text + " WHERE id < 0")
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'host_token'", (text,))


def falsified(change):
    """A change of the audit log by who has the database, and not the keys."""
    drops = [f"DROP TRIGGER audit_is_{what}" for what in ("never_changed", "only_pruned")]
    return lambda db, key: [sql(db, statement) for statement in (*drops, change)]


CHANGE, DROP = "UPDATE audit SET actor = 'x' WHERE number = 2", "DELETE FROM audit WHERE number = 1"
KEYLESS = {"keys": False, "minted": None, "audit": None}
ALTERED = {"audit": False, "integrity": False}


@pytest.mark.parametrize("spoil, differs, word", table({
    # how it is spoiled, of the database and the key file; what is not as in SOUND; what is named
    "nothing": (lambda db, key: None, {}, None),
    "a row that lacks its host":
        (lambda db, key: sql(db, "INSERT INTO heartbeat VALUES (5, 0, 1, 1, 1, 30, 0)"),
         {"integrity": False}, "heartbeat"),
    "an index that lacks a row":
        (lambda db, key: drop_index_entries(db), {"integrity": False}, "host_token"),
    "no key file": (lambda db, key: os.unlink(key), KEYLESS, "key file"),
    "a key file that is none": (lambda db, key: Path(key).write_text("[]"), KEYLESS, "JWK"),
    "another's key file":
        (lambda db, key: write(key, hostenroll.new_keyring()), KEYLESS,
         "not the key file"),
    "a key file that others can read": (lambda db, key: os.chmod(key, 0o604), KEYLESS, "chmod 600"),
    "a database that others can read":
        (lambda db, key: os.chmod(db, 0o604), {"modes": False}, "chmod 600"),
    "an audit log that was changed": (falsified(CHANGE), ALTERED, "event 2 "),
    "an audit log that lacks an event": (falsified(DROP), ALTERED, "event 1 "),
    "a database of the first version":
        (lambda db, key: (lose(db), os.unlink(key), old_fleet((db, key), Clock())),
         {"schema": False, "minted": None, "audit": None}, f"1.*{hostenroll.SCHEMA_VERSION}"),
}))  # fmt: skip
def test_what_is_unsound_is_found_and_nothing_is_changed(spoil, differs, word, paths, clock):
    with World(paths, clock) as world:
        world.join()
    spoil(*paths)
    before = bytes_of(paths)
    expected = {name: good for name, good in {**SOUND, **differs}.items() if good is not None}
    assert verdicts(paths) == expected
    assert not word or any(re.search(word, finding.detail) for finding in bad_in(paths))
    assert bytes_of(paths) == before and is_free(paths)


@pytest.mark.parametrize("spoil, word, opens", table({
    # how it is spoiled, what the line says, whether it would be opened with a new key file
    "not there": (lose, "no database", True),
    "empty": (lambda path: os.truncate(path, 0), "empty", True),
    "of another program":
        (lambda path: (lose(path), sql(path, "CREATE TABLE t (x)")), "another program", False),
    "of a newer version":
        (lambda path: sql(path, f"PRAGMA user_version = {hostenroll.SCHEMA_VERSION + 1}"), "newer",
         False),
    "ten bytes": (lambda path: Path(path).write_bytes(b"0123456789"), "not a database", False),
    "a text": (lambda path: Path(path).write_bytes(b"text\n" * 999), "not a database", False),
    "a folder": (lambda path: (lose(path), os.mkdir(path)), "not a file", False),
    "of torn pages":
        (lambda path: Path(path).write_bytes(Path(path).read_bytes()[:4096].ljust(65536, b"\xff")),
         "malformed", True),
}))  # fmt: skip
def test_a_strange_database_is_named_in_one_line_and_left_as_it_is(
    spoil, word, opens, paths, clock
):
    open_registry(*paths, clock.ms).close()
    spoil(paths[0])
    before, exists = bytes_of(paths), os.path.exists(paths[0])
    try:
        lines = ["; ".join(finding.detail for finding in bad_in(paths))]
    except (hostenroll.OperatorError, hostenroll.StoreError) as error:
        lines = [str(error)]
        assert paths[0] in lines[0]
    if not opens:
        with pytest.raises(hostenroll.StoreError, match=re.escape(paths[0])) as caught:
            open_registry(paths[0], f"{paths[1]}.new", clock.ms)
        lines.append(str(caught.value))
    assert [word in line and "\n" not in line for line in lines] == [True] * len(lines)
    assert (os.path.exists(paths[0]), bytes_of(paths)) == (exists, before)
    assert not os.path.exists(f"{paths[1]}.new") and is_free(paths)


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_an_examination_makes_no_file_beside_the_database(mode, world, folder):
    """A backup has no lock files; an archive may be of another tool, or on read-only media: where
    only another process may be without root's power to write, it is tried as one."""
    world.join()
    copies = backup(world, folder)
    sql(copies[0], f"PRAGMA journal_mode = {mode}")
    before = bytes_of(copies)
    assert (verdicts(copies), bytes_of(copies)) == (SOUND, before)
    assert sorted(os.listdir(folder)) == ["hostenroll.db", "hostenroll.key"]
    mount = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", str(folder)]
    if shutil.which("unshare") is None or subprocess.call([*command, "true"], stderr=-3) != 0:
        pytest.skip("nothing can be mounted here")
    files = "--db", copies[0], "--key-file", copies[1]
    done = cli(folder.parent, "check", *files, program=[*command, *PROGRAM])
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_audit_log_that_is_pruned_while_it_is_examined_is_sound(paths, clock, monkeypatch):
    with World(paths, clock, audit_keep=86400) as world:
        for _ in range(5):
            world.token()
        clock.advance(3 * 86400)
        world.token()
        anchor = hostenroll.Queries.anchor

        def read_anchor(queries):
            record = anchor(queries)
            if queries is not world.registry.queries:
                prune(world)
            return record

        monkeypatch.setattr(hostenroll.Queries, "anchor", read_anchor)
        assert verdicts(paths) == SOUND
        assert world.sql("SELECT count(*) FROM audit_anchor") == [(1,)]


@pytest.mark.parametrize("suffix", ["-wal", "-shm", ".gate", ".lock"])
def test_a_file_beside_the_database_that_others_can_read_is_named(suffix, world):
    assert verdicts(world.paths) == SOUND  # also a fresh one, and one in use
    world.join()
    path = world.paths[0] + suffix
    os.chmod(path, 0o640)
    assert [(it.name, it.detail) for it in bad_in(world.paths)] == [("modes", f"chmod 600 {path}")]
    os.chmod(path, 0o600)
    assert verdicts(world.paths) == SOUND


def test_a_folder_where_anybody_may_replace_the_files_is_named(paths, clock, tmp_path):
    open_registry(*paths, clock.ms).close()
    tmp_path.chmod(0o777)
    findings = [(it.name, it.detail) for it in bad_in(paths)]
    assert findings == [("modes", f"chmod o-w {tmp_path}")]
    tmp_path.chmod(0o1777)
    assert verdicts(paths) == SOUND


# Tokens that have ended.

TOKEN_KEPT, KEEP = 30 * 86400, 10 * 86400  # s; KEEP: --audit-keep


@pytest.mark.parametrize("uses, life, ended", table({
    # uses allowed; seconds after the mint at which it is used or revoked; when it has ended
    "expired": (1, [], 3600),
    "used": (1, [(100, "use")], 100),
    "revoked": (1, [(50, "revoke")], 50),
    "used, then revoked": (1, [(100, "use"), (200, "revoke")], 200),
    "revoked after it expired": (1, [(5000, "revoke")], 5000),
    "used twice of three, then expired": (3, [(10, "use"), (20, "use")], 3600),
    "used three times of three": (3, [(10, "use"), (20, "use"), (30, "use")], 30),
    "used once of three, then revoked": (3, [(10, "use"), (40, "revoke")], 40),
}))  # fmt: skip
def test_a_token_is_kept_for_thirty_days_after_its_end(uses, life, ended, world):
    minted = world.mint(maxUses=uses).document
    for at, event in life:
        world.clock.now = NOON + at
        if event == "use":
            assert world.enroll(minted["token"]).status == 201
        else:
            world.revoke_token(minted["id"])
    world.clock.now = NOON + ended + TOKEN_KEPT - 1
    for _ in range(2):
        world.housekeeping()
    assert world.show_token(minted["id"]).document["state"] != "valid"
    world.reopen()  # it looks once an hour
    world.advance(1)
    world.housekeeping()
    assert world.show_token(minted["id"]).code == "not-found"
    # The hosts that it let in stay, and still name it.
    hosts = world.hosts().document["hosts"]
    assert {(it["tokenId"], world.host(it["id"]).status) for it in hosts} <= {(minted["id"], 200)}
    assert len(hosts) == sum(event == "use" for _, event in life)
    assert world.enroll(minted["token"]).code == "token-unknown"


def test_of_many_tokens_that_have_ended_a_few_go_in_a_turn_and_all_at_once(world, monkeypatch):
    """Housekeeping asks to run again in the next turn while there are more."""
    monkeypatch.setattr(hostenroll, "PRUNED_AT_ONCE", 50)
    minted = []
    for n in range(130):
        minted.append(world.mint(ttlSeconds=TOKEN_KEPT if n % 10 == 7 else 60).document["id"])
        world.advance(0.001)
    tokens = "SELECT id FROM token ORDER BY id"
    world.clock.now = NOON + TOKEN_KEPT + 60 - 1
    prune(world)
    assert len(world.sql(tokens)) == 130
    world.advance(3600)  # it looks once an hour
    left = [130]
    while world.housekeeping():
        left.append(len(world.sql(tokens)))
        assert left[-2] - 50 <= left[-1] < left[-2]
    assert [hostenroll.id_text(number) for (number,) in world.sql(tokens)] == minted[7::10]
    assert len(left) >= 3
    late = world.mint().document["id"]
    world.housekeeping()
    assert world.show_token(late).status == 200


def test_a_machine_of_a_live_hosts_name_gets_a_warning(world):
    """And the other does not. Which hosts are compared, and how, the random life shows."""
    old, new = world.join("web-1")[0], world.join("WEB-1.")[0]
    shown = {host["id"]: host["warnings"] for host in world.hosts().document["hosts"]}
    assert [old in text for text in shown[new]] == [True] and shown[old] == []
    assert world.host(new).document["warnings"] == shown[new]


# Copies of a credential.


def name_instances(world, credential, letters):
    """Machines A, B ... each from an address of its own, name their instances one by one."""
    for letter in letters:
        world.address = f"192.0.2.{ord(letter)}"
        reply = world.beat(credential, instance=f"{ord(letter):016x}", hostname=f"web-{letter}")
        assert reply.status == 200


def clones_of(world):
    """How many times the process has counted a sign of a copy."""
    text = world.ask("GET", "/metrics").document
    return int(re.search(r"^hostenroll_clones_total (\d+)$", text, re.M)[1])


def warned(world, host):
    (shown,) = [it for it in world.hosts().document["hosts"] if it["id"] == host]
    assert world.host(host).document == shown
    return ["more than one machine uses this credential" in text for text in shown["warnings"]]


INSTANCES = {  # who names an instance, how many seconds from one to the next; whether it is a copy
    "one machine": ("AAAAAAAA", 3600, False),
    "one that is started ten times in a day": ("ABCDEFGHIJ", 8640, False),
    "one that is started five times in four hours": ("ABCDE", 2880, False),
    "six in more than four hours": ("ABCDEF", 2880.001, False),
    "six in four hours": ("ABCDEF", 2880, True),
    "one that was restored from a snapshot": ("ABA", 60, False),
    "one that changes each day": ("ABABAB", 86400, False),
    "one of five days that comes again": ("ABCDEABCDE", 86400, False),
    "two returns in more than four hours": ("ABAB", 14400.001, False),
    "two returns in four hours": ("ABAB", 14400, True),
    "two machines": ("ABAB", 1800, True),
    "two, of which one is said twice": ("AABAAB", 1800, True),
    "three machines": ("ABCAB", 1200, True),
    "five machines": ("ABCDEA", 720, True),
    "seven machines": ("ABCDEF", 500, True),
}


@pytest.mark.parametrize("letters, step, is_copy", table(INSTANCES))
def test_more_than_one_machine_with_one_credential_is_seen_by_instances(
    letters, step, is_copy, world
):
    host, credential = world.join()
    for n, letter in enumerate(letters):
        world.clock.now = NOON + n * step
        assert warned(world, host) == []
        name_instances(world, credential, letter)
    assert warned(world, host) == [True] * is_copy
    assert len(world.audit("clone")) == clones_of(world) == is_copy
    assert world.host(host).document["status"] == "online"


@pytest.mark.parametrize("machines", [2, 3, 4, 7])
def test_copies_that_name_their_instances_at_random_are_seen_within_four_hours(machines, world):
    chance = random.Random(machines)
    host, credential = world.join()
    due = {letter: chance.uniform(0, 3600) for letter in "ABCDEFG"[:machines]}
    for _ in range(3 * machines):
        letter = min(due, key=due.get)
        world.clock.now = NOON + due[letter]
        name_instances(world, credential, letter)
        due[letter] += 3600 + chance.uniform(-600, 600)
    assert warned(world, host) == [True]
    assert world.clock.now - NOON < 4 * 3600


def test_the_event_of_a_copy_comes_once_an_hour_and_the_warning_stays_a_day(world):
    host, credential = world.join()
    name_instances(world, credential, "ABAB")
    name_instances(world, credential, "ABABAB" * 5)
    (event,) = world.audit("clone")
    assert event["actor"] == event["subject"] == f"host:{host}"
    assert (event["address"], event["detail"]) == ("192.0.2.66", {
        "hostname": "web-B", "otherHostname": "web-A", "otherAddress": "192.0.2.65"})  # fmt: skip
    world.clock.now = NOON + 3599.999
    name_instances(world, credential, "A")
    assert len(world.audit("clone")) == 1
    world.clock.now = NOON + 3600
    name_instances(world, credential, "B")
    assert len(world.audit("clone")) == clones_of(world) == 2
    world.clock.now = NOON + 3600 + 86399.999
    assert warned(world, host) == [True]
    world.clock.now = NOON + 3600 + 86400
    assert warned(world, host) == []
    assert verify_audit(world.registry).last == len(world.audit())


def test_a_clock_that_is_set_back_hides_no_copy_and_shows_none(world):
    other, its_own = world.join("db-1")
    host, credential = world.join()
    name_instances(world, its_own, "ABA")
    name_instances(world, credential, "ABAB")
    world.advance(-86400)
    name_instances(world, its_own, "B")
    assert warned(world, other) == []
    assert warned(world, host) == [True]
    name_instances(world, credential, "ABA")
    assert len(world.audit("clone")) == 2
    world.advance(86400)
    assert warned(world, host) == []


def test_an_instance_waits_for_no_disk_and_one_that_is_known_writes_nothing(world):
    _, credential = world.join("web-A")
    name_instances(world, credential, "A")
    before = world.sql("SELECT * FROM host")
    name_instances(world, credential, "AA")
    assert world.sql("SELECT * FROM host") == before
    for digit in "abcdabab":
        assert world.beat(credential, instance=digit * 16).status == 200
        assert world.sql("PRAGMA synchronous") == [(1,)]
    assert len(world.audit("clone")) == 1
    for digit in "0123456789":
        world.beat(credential, instance=digit * 16)
    assert len(world.sql("SELECT instances FROM host")[0][0].splitlines()) == 12


@pytest.mark.parametrize("facts", [{}, {"os": "linux"}, {"instance": "a" * 16}], ids=str)
def test_a_superseded_credential_that_is_seen_again_is_a_sign_of_a_copy(facts, world):
    """Written at most once an hour, though the heartbeat is refused and what it wrote undone."""
    host, old = world.join()
    new = world.enroll(world.reenroll(host).document["token"]).document["credential"]
    world.beat(new)
    assert warned(world, host) == []
    events = len(world.audit())
    for seconds, count in ((0, 1), (3599.999, 1), (3600, 2)):
        world.clock.now = NOON + seconds
        for _ in range(2):
            assert world.beat(old, **facts).code == "credential-superseded"
            assert world.sql("PRAGMA synchronous") == [(1,)]
            assert clones_of(world) == count and warned(world, host) == [True]
    assert [event["code"] for event in world.audit()[events:]] == ["credential-superseded"] * 6
    assert world.sql("SELECT instances FROM host") == [("",)]
    world.clock.now = NOON + 3600 + 86400
    assert warned(world, host) == []


def test_a_host_that_enrolls_again_begins_without_signs_of_copies(world):
    host, credential = world.join()
    name_instances(world, credential, "ABAB")
    new = world.enroll(world.reenroll(host).document["token"]).document["credential"]
    assert warned(world, host) == []
    name_instances(world, new, "ABA")
    assert warned(world, host) == []
    assert world.beat(credential).code == "credential-superseded"  # the copy is still there
    assert warned(world, host) == [True]


DAMAGED_SIGHTINGS = ("x", "\n\n", "new", "new 1 2 3 4", "back 9 " + "a" * 16 + "  ", "[[[[" * 999,
                     "\0", f"new {'9' * 99} {'a' * 16} x y")  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED_SIGHTINGS, ids=range(len(DAMAGED_SIGHTINGS)))
def test_what_we_never_wrote_about_instances_refuses_no_heartbeat(text, world):
    host, credential = world.join()
    world.sql("UPDATE host SET instances = ?", text)
    name_instances(world, credential, "ABAB")
    assert warned(world, host) == [True]


@pytest.mark.parametrize("value", ["", "a" * 15, "a" * 17, "A" * 16, "g" * 16, 7, None, ["a" * 16]])
def test_an_instance_has_sixteen_hexadecimal_digits(value, world):
    _, credential = world.join()
    reply = world.beat(credential, instance=value)
    assert reply.code == "invalid-body"
    assert [error["field"] for error in reply.document["errors"]] == ["instance"]


# Acts on many hosts.

ACTIONS_PATH = "/api/hosts/actions"
ON_MANY = {  # the action, what more the body has, how it shows, what the audit log has of each host
    "delete": ({}, None, {"hostname": "web-1", "reason": "moved"}),
    "revoke": ({}, ("revoked", {"a": "1"}), {"reason": "moved"}),
    "edit": ({"labels": {"a": None, "b": "2"}}, ("pending", {"b": "2"}),
             {"labels": {"b": "2"}, "reason": "moved"}),
}  # fmt: skip


@pytest.mark.parametrize("action", ON_MANY)
def test_an_act_on_many_is_done_to_each_once_and_names_what_is_no_host(action, world):
    more, shown, detail = ON_MANY[action]
    token = world.token(maxUses=9, labels={"a": "1"})
    hosts = [world.enroll(token).document["hostId"] for _ in range(3)]
    body = {
        "action": action,
        "reason": "moved",
        **more,
        "hosts": [*hosts[:2], hosts[0], UNKNOWN_ID],
    }
    before = len(world.audit())
    reply = world.ask("POST", ACTIONS_PATH, body)
    assert (reply.status, reply.document) == (200, {"done": 2, "notFound": [UNKNOWN_ID]})
    replies = [world.host(host).document for host in hosts]
    found = [(one["status"], one["labels"]) if "status" in one and "id" in one else None
             for one in replies]  # fmt: skip
    assert found == [shown, shown, ("pending", {"a": "1"})]
    events = world.audit()[before:]
    assert [(e["action"], e["subject"], e["detail"]) for e in events] == [
        (action, f"host:{host}", detail) for host in hosts[:2]
    ]


def test_an_act_that_is_refused_for_one_of_many_is_done_to_none(world):
    full, other = (world.enroll(world.token(labels=labels)).document["hostId"] for labels in (
        {f"k{n}": "" for n in range(32)}, {}))  # fmt: skip
    before = world.snapshot()
    for body in (
        {"action": "edit", "hosts": [other, full], "labels": {"one": "more"}},
        {"action": "revoke", "hosts": [other], "labels": {}},
        {"action": "revoke", "hosts": [other], "intervalSeconds": 9},
        {"action": "get", "hosts": [other]}, {"action": "delete", "hosts": [other] * 1001},
        {"action": "delete", "hosts": [other, "web-1"]}, {"action": "delete"},
        {"action": "edit", "hosts": [other], "name": "x"},
    ):  # fmt: skip
        assert world.ask("POST", ACTIONS_PATH, body).code == "invalid-body", body
        assert world.snapshot() == before
    body = {"action": "edit", "hosts": [full], "labels": {"k1": None, "one": "more"}}
    assert world.ask("POST", ACTIONS_PATH, body).document["done"] == 1
    assert len(world.host(full).document["labels"]) == 32


def test_a_reason_is_in_the_audit_log(world):
    host, _ = world.join()
    for method, path, body in (
        ("POST", "/revoke", {"reason": "a"}), ("POST", "/restore", {"reason": "b"}),
        ("PATCH", "", {"name": "x", "reason": "c"}), ("DELETE", "?reason=d", None),
    ):  # fmt: skip
        assert world.ask(method, f"/api/hosts/{host}{path}", body).status in (200, 204)
    assert [event["detail"]["reason"] for event in world.audit()[-4:]] == ["a", "b", "c", "d"]


MERGE_PATCHES = {  # a patch of {"a": "1", "b": "2"}, its media type, and what the labels are then
    "one is set": ({"labels": {"c": "3"}}, "", {"a": "1", "b": "2", "c": "3"}),
    "one is removed": ({"labels": {"a": None}}, "", {"b": "2"}),
    "one that is not there": ({"labels": {"x": None}}, "", {"a": "1", "b": "2"}),
    "one is changed": ({"labels": {"a": ""}}, "", {"a": "", "b": "2"}),
    "all are removed": ({"labels": None}, "", {}),
    "none is named": ({"name": "x"}, "", {"a": "1", "b": "2"}),
    "a parameter": ({"labels": {"a": None}}, "Application/Merge-Patch+JSON; charset=utf-8",
                    {"b": "2"}),
    "other JSON": ({"labels": {"c": "3"}}, "application/json", {"c": "3"}),
    "another patch": ({"labels": {"c": "3"}}, "application/json-patch+json", {"c": "3"}),
    "null in other JSON": ({"labels": {"a": None}}, "application/json", None),
    "a number": ({"labels": {"a": 0}}, "", None),
    "a bad name": ({"labels": {"-": None}}, "", None),
    "no object": ({"labels": []}, "", None),
}  # fmt: skip


@pytest.mark.parametrize("patch, media_type, labels", table(MERGE_PATCHES))
def test_a_merge_patch_changes_the_labels_that_it_names(patch, media_type, labels, world):
    """RFC 7396."""
    reply = world.enroll(world.token(labels={"a": "1", "b": "2"}))
    headers = [("Content-Type", media_type or "application/merge-patch+json")]
    path = f"/api/hosts/{reply.document['hostId']}"
    edited = world.call("PATCH", path, patch, world.api_key, headers)
    assert edited.code == (None if labels is not None else "invalid-body")
    assert labels is None or edited.document["labels"] == labels


def test_with_a_leaked_token_all_hosts_are_shut_out_that_came_in_by_it(world, monkeypatch):
    """In slices, each a tick; once it is repeated nothing more is done."""
    monkeypatch.setattr(hostenroll, "ACTED_AT_ONCE", 2)
    leaked, other = world.mint(maxUses=9).document, world.mint(maxUses=9).document
    own = [world.enroll(leaked["token"]).document["hostId"] for _ in range(5)]
    bystander = world.enroll(other["token"]).document["hostId"]
    world.revoke(own[3])
    for _ in range(2):
        path = f"{TOKENS_PATH}/{leaked['id']}?withHosts="
        assert world.ask("DELETE", f"{path}false").status == 204
        assert world.ask("DELETE", f"{path}true").status == 204
        shown = {host["id"]: host["status"] for host in world.hosts().document["hosts"]}
        assert shown == {**dict.fromkeys(own, "revoked"), bystander: "pending"}
    events = [event for event in world.audit() if event["action"] == "revoke"]
    assert len(events) == 6 and leaked["id"] in events[-1]["detail"]["reason"]


@pytest.mark.parametrize("since, status", [("", "revoked"), ("it is let in again", "pending")])
def test_a_token_bound_to_a_host_is_revoked_with_it_while_it_is_its_last(since, status, world):
    host, _ = world.join()
    bound = world.reenroll(host).document
    assert world.enroll(bound["token"]).status == 201
    if since:
        assert world.enroll(world.reenroll(host).document["token"]).status == 201
    assert world.ask("DELETE", f"{TOKENS_PATH}/{bound['id']}?withHosts=true").status == 204
    assert world.host(host).document["status"] == status


def test_a_server_answers_when_the_last_slice_of_a_leaked_token_is_done(live, monkeypatch):
    """Each slice is a tick of its own, so hosts that beat wait for one of them at most. The answer
    is for all of them."""
    monkeypatch.setattr(hostenroll, "ACTED_AT_ONCE", 2)
    leaked = live.mint(maxUses=9).document
    credentials = [live.enroll(leaked["token"]).document["credential"] for _ in range(5)]
    other = live.join()[1]
    assert live.ask("DELETE", f"{TOKENS_PATH}/{leaked['id']}?withHosts=true").status == 204
    assert {live.beat(one).code for one in credentials} == {"host-revoked"}
    assert live.beat(other).status == 200


def test_no_slice_of_a_leaked_tokens_hosts_looks_at_those_that_are_shut_out(world):
    """Else a million hosts would take half a million million looks."""
    token = world.registry.queries.get(hostenroll.Token, number_of(world.token()))
    statements = []
    world.registry.engine._connection.set_trace_callback(statements.append)
    world.registry.queries.live_hosts_of_token(token, 9)
    world.registry.engine._connection.set_trace_callback(None)
    plan = " ".join(row[3] for row in world.sql(f"EXPLAIN QUERY PLAN {statements[-1]}"))
    assert "host_token_live (token_id=?)" in plan and "SCAN" not in plan


def test_hosts_are_listed_by_their_token_in_pages(world):
    minted = [world.mint(maxUses=9).document for _ in range(2)]
    own = [[world.enroll(token["token"]).document["hostId"] for _ in range(3)] for token in minted]
    for token, hosts in zip(minted, own):
        first = world.hosts(f"token={token['id']}&limit=2").document
        rest = world.hosts(f"token={token['id']}&cursor={first['nextCursor']}").document
        found = [host["id"] for page in (first, rest) for host in page["hosts"]]
        assert found == sorted(hosts, reverse=True) and rest["nextCursor"] is None
    assert world.hosts(f"token={UNKNOWN_ID}").document["hosts"] == []
    assert world.hosts("token=web").code == "invalid-query"


# The audit log.


def test_an_edit_records_what_it_changes_and_one_that_changes_nothing_is_no_event(world):
    number, _ = world.join()
    for given, recorded in (
        ({}, []), ({"labels": {}}, []), ({"name": "a"}, [{"name": "a"}]), ({"name": "a"}, []),
        ({"labels": {"r": "b4"}}, [{"labels": {"r": "b4"}}]),
        ({"name": "a", "labels": {"r": "b4"}}, []), ({}, []),
        ({"name": "b", "labels": {"r": "2"}}, [{"name": "b", "labels": {"r": "2"}}]),
        ({"labels": {}}, [{"labels": {}}]), ({"name": "a", "labels": {}}, [{"name": "a"}]),
        ({"intervalSeconds": None}, []), ({"intervalSeconds": 9}, [{"intervalSeconds": 9}]),
        ({"intervalSeconds": 9}, []), ({"intervalSeconds": None}, [{"intervalSeconds": "none"}]),
    ):  # fmt: skip
        before = len(world.audit())
        world.act("edit-host", number, **given)
        assert [event["detail"] for event in world.audit()[before:]] == recorded, given


ADDRESSES = itertools.cycle(f"192.0.2.{n}" for n in range(200))  # too many to be made to wait
FLOODS = ["credential-invalid", "api-key-invalid", "host-unknown", "token-unknown"]


def attempt(world, code):
    """What is refused with a code."""
    world.address = next(ADDRESSES)
    key = world.registry.keys.keyring.first
    unknown = key.sign(hostenroll.Claims(1 << 40, "default", int(NOON), 1, None, key.kid))
    body = {"token": "het_junk", "hostname": "web-1"}
    request = {
        "api-key-invalid": request_bytes("GET", "/api/me", None, "hak_junk"),
        "credential-invalid": beat_bytes("junk"),
        "host-unknown": beat_bytes(unknown),
        "token-unknown": request_bytes("POST", "/api/agent/enroll", body),
    }[code]
    assert world.tick([request])[0].code == code


def refusals_of(world, code):
    return [event for event in log_of(world) if event.code == code]


def details_of(world, code):
    return [json.loads(event.detail) for event in refusals_of(world, code)]


def fail_once(world):
    """Housekeeping whose transaction cannot be committed."""
    with faulty(world.registry, only="COMMIT"), pytest.raises(hostenroll.StorageUnavailable):
        world.housekeeping()


def count_of(world, code):
    """How many refusals stand in the log, each for itself or counted."""
    return sum(detail.get("more", 1) for detail in details_of(world, code))


@pytest.mark.parametrize("code", FLOODS)
def test_of_a_flood_sixty_refusals_a_minute_are_written_and_the_others_counted(code, world):
    def written_at(moment):
        world.clock.now = moment
        world.housekeeping()
        return len(refusals_of(world, code))

    world.housekeeping()  # a minute begins
    for n in range(150):
        world.clock.now = NOON + n * 0.25
        attempt(world, code)
        if n % 40 == 0:
            world.housekeeping()
    assert [written_at(NOON + seconds) for seconds in (59.999, 60, 60)] == [60, 61, 61]
    summary = refusals_of(world, code)[-1]._asdict()
    detail = '{"more":90,"since":"2027-01-15T08:00:00.000Z"}'
    expected = {"at": world.clock.ms, "address": "", "subject": "", "detail": detail}
    assert summary == {**summary, **expected, "action": "refuse", "actor": "anonymous"}
    # The next minute has sixty of its own, and so has another code.
    for _ in range(61):
        attempt(world, code)
    world.registry.audit.refuse(hostenroll.TokenUsed(), hostenroll.LOCAL, world.clock.ms)
    assert (written_at(NOON + 60), len(refusals_of(world, "token-used"))) == (121, 1)
    assert written_at(NOON + 120) == 122
    attempt(world, code)
    assert written_at(NOON + 120) == 123
    assert [detail.get("more") for detail in details_of(world, code)[-2:]] == [1, None]
    assert verified(world).last == len(log_of(world))
    assert world.api.metrics.refusals[code] == 212


def test_in_a_long_outage_refusals_are_counted_in_bounded_memory(world, monkeypatch):
    monkeypatch.setattr(hostenroll, "PENDING_REFUSALS_MAXIMUM", 100)
    for _ in range(6):
        for _ in range(70):
            attempt(world, "credential-invalid")
        fail_once(world)
        world.advance(60)
    for _ in range(2):
        world.housekeeping()
    assert count_of(world, "credential-invalid") == 6 * 70
    assert len(details_of(world, "credential-invalid")) <= 102


@pytest.mark.parametrize("seed", [1, 2])
def test_every_refusal_is_in_the_log_or_counted_there(seed, world):
    chance, refused = random.Random(seed), dict.fromkeys(FLOODS, 0)
    for _ in range(400):
        code = chance.choice(FLOODS[: chance.choice([1, 4])])
        attempt(world, code)
        refused[code] += 1
        step = chance.choice([0, 0, 0.1, 0.5, chance.choice([1, 90])])
        world.clock.now = round(world.clock.now + step, 3)
        if chance.random() < 0.04:
            chance.choice([world.housekeeping, partial(fail_once, world)])()
    world.run(Call(hostenroll.FINAL_AUDIT_FLUSH))
    assert not world.registry.audit.pending and not world.registry.audit.refusals.excess
    assert {code: count_of(world, code) for code in FLOODS} == refused
    assert all(detail.get("more", 1) for code in FLOODS for detail in details_of(world, code))
    for code in FLOODS:
        singles = [it.at for it in refusals_of(world, code) if "more" not in json.loads(it.detail)]
        assert all(later - one >= 60_000 for one, later in zip(singles, singles[121:])), code


def changing(world):
    """A host that changes its facts with every heartbeat: by a name, and another one."""
    host, credential = world.join()
    names = itertools.cycle(("web-2", "web-1"))

    def change():
        hostname = next(names)
        assert world.beat(credential, hostname=hostname).status == 200
        assert world.host(host).document["hostname"] == hostname

    return change


def renewing_at_once(world):
    """A host whose credential lives for a second: it renews with every heartbeat."""
    world.reopen(credential_ttl=1)
    held = [world.join()[1]]

    def renew():
        world.advance(0.7)
        held[0] = world.beat(held[0]).document["credential"]

    return renew


@pytest.mark.parametrize("begin, action, level", [
    (changing, "edit", 1), (renewing_at_once, "renew", 2),
])  # fmt: skip
def test_of_what_a_host_does_without_end_twelve_events_an_hour_are_listed(
    begin, action, level, world
):
    """The rest is one event. Facts are on the disk while they are listed, later as heartbeats are;
    a credential always is."""
    act, other = begin(world), begin(world)
    since = hostenroll.rfc3339(world.clock.ms)
    world.housekeeping()
    for n in range(30):
        act()
        assert world.sql("PRAGMA synchronous") == [(2 if n < 12 else level,)]
    other()  # each host has twelve of its own
    events = world.audit(action)
    assert len(events) == 13 and len({event["subject"] for event in events[:12]}) == 1
    for seconds, count in ((3599.999, 13), (3600, 14), (3600, 14)):
        world.clock.now = NOON + seconds
        world.housekeeping()
        assert len(world.audit(action)) == count
    last = world.audit(action)[-1]
    about = {name: events[0][name] for name in ("actor", "subject", "organizationId", "code")}
    assert last == {**last, **about, "address": None, "detail": {"more": 18, "since": since}}
    for _ in range(13):
        act()
    assert len(world.audit(action)) == 14 + 12 and verified(world)


def test_an_event_of_changed_facts_has_them_by_their_names_in_json(world):
    host, credential = world.join()
    world.beat(credential, hostname="web-9", dockerVersion="27", os="")
    (event,) = world.audit("edit")
    assert (event["actor"], event["subject"]) == (f"host:{host}",) * 2
    assert event["detail"] == {"facts": {"hostname": "web-9", "dockerVersion": "27"}}


def test_what_a_tick_that_failed_has_changed_is_not_counted(world):
    change = changing(world)
    for _ in range(13):
        change()
    for _ in range(2):
        with faulty(world.registry, only="COMMIT"), pytest.raises(AssertionError, match="503"):
            change()
    fail_once(world)
    change()
    change()
    world.run(Call(hostenroll.FINAL_AUDIT_FLUSH))
    assert world.audit("edit")[-1]["detail"]["more"] == 3


def test_each_of_many_hosts_has_twelve_events_an_hour_and_the_rest_is_counted(world, monkeypatch):
    """Of more hosts than are counted by themselves it is counted by organization."""
    monkeypatch.setattr(hostenroll, "KINDS_COUNTED", 2)
    for change in [changing(world) for _ in range(4)]:
        for _ in range(14):
            change()
    events = world.audit("edit")
    assert len(events) == 4 * 12 and len({event["subject"] for event in events}) == 4
    world.advance(3600)
    world.housekeeping()
    summed = {event["subject"]: event for event in world.audit("edit")[48:]}
    assert [event["detail"]["more"] for event in summed.values()] == [2, 2, 4]
    assert (summed[None]["actor"], summed[None]["organizationId"]) == ("server", "default")


IN_VAIN = {
    # name: what becomes of a host whose key signs no more, what it reports, and the answer
    "asks again": (lambda world, host, held: world.beat(held), {}, None),
    "has re-enrolled": (lambda world, host, held: reenrolled(world, host), {}, None),
    "revoked": (lambda world, host, held: world.revoke(host), {}, "host-revoked"),
    "revoked, with facts": (lambda world, host, held: world.revoke(host), {"os": "x"},
                            "host-revoked"),
    "deleted": (lambda world, host, held: world.delete(host), {"os": "x"}, "host-unknown"),
    "superseded": (lambda world, host, held: world.beat(renewal(world, held)), {"os": "x"},
                   "credential-superseded"),
}  # fmt: skip


@pytest.mark.parametrize("act, facts, code", table(IN_VAIN))
def test_a_heartbeat_in_vain_waits_for_no_disk(act, facts, code, world):
    host, credential = world.joined()
    rotate(world)
    act(world, host, credential)
    before = len(log_of(world))
    for _ in range(3):
        assert world.beat(credential, **facts).code == code
        assert world.sql("PRAGMA synchronous") == [(1,)]
    assert len(log_of(world)) == before + 3 * bool(code)


@pytest.mark.parametrize("uses, key, code", [(1, "", "token-used"), (9, "k", None)])
def test_a_token_that_lets_in_no_more_waits_for_no_disk(uses, key, code, world):
    token = world.token(maxUses=uses)
    world.enroll(token, key="k")
    for _ in range(3):
        assert world.enroll(token, key=key).code == code
        assert world.sql("PRAGMA synchronous") == [(1,)]


def test_a_tick_that_finds_that_it_has_to_wait_for_the_disk_begins_again(world):
    """The other requests of it are done once."""
    token, beat = world.token(ttlSeconds=86_400), world.heartbeat(world.join()[1])
    first = world.enroll(token, key="k").document
    body, headers = {"token": token, "hostname": "web-1"}, [("Idempotency-Key", "k")]
    world.advance(3600)
    again = world.admit(request_bytes("POST", "/api/agent/enroll", body, headers=headers))
    assert not again.operation.durable
    refused, before = world.heartbeat(first["credential"], host=1), len(world.audit())
    outcomes = world.run(beat, again, refused)
    assert outcomes[0] == world.clock.ms and outcomes[2].code == "host-unknown"
    assert serial_of(world, outcomes[1].issued.credential) == 2
    assert world.sql("PRAGMA synchronous") == [(2,)]
    assert [event["action"] for event in world.audit()[before:]] == ["refuse", "replay"]
    assert world.registry.metrics.counts["heartbeats"] == 1


def test_refusals_in_a_tick_that_begins_again_are_counted_once(world):
    _, credential = world.join()
    refused = world.heartbeat(credential, host=1)
    world.run(*[refused] * 60)
    world.run(refused, world.admit(beat_bytes(credential, os="Debian 13")))
    assert world.sql("PRAGMA synchronous") == [(2,)]
    world.run(Call(hostenroll.FINAL_AUDIT_FLUSH))
    assert world.audit("refuse")[-1]["detail"]["more"] == 1


def guesses(world, count, address=ADDRESS, kind="het"):
    """The codes of the answers to so many wrong secrets from an address."""
    world.address, codes = address, []
    for _ in range(count):
        text = hostenroll.mint_secret(kind, 1 << 40).text
        reply = world.enroll(text) if kind == "het" else world.call("GET", "/api/me", None, text)
        codes.append(reply.code)
    return codes


def test_the_twenty_first_wrong_secret_in_a_minute_is_one_too_many(world):
    text = world.token()
    assert guesses(world, 10) == ["token-unknown"] * 10
    world.advance(0.5)
    assert guesses(world, 10, kind="hak") == ["api-key-invalid"] * 10
    world.clock.now = NOON + 59.999
    for kind in ("het", "hak"):
        assert guesses(world, 30, kind=kind) == ["too-many-requests"] * 30
    # Another address, and a good secret, are not concerned.
    assert guesses(world, 1, "192.0.2.8") == ["token-unknown"]
    world.address = ADDRESS
    assert (world.enroll(text).status, world.ask("GET", "/api/me").status) == (201, 200)
    # A minute begins with its first failure, and ends also if they go on meanwhile.
    world.clock.now = NOON + 60
    assert guesses(world, 21) == ["token-unknown"] * 20 + ["too-many-requests"]
    world.housekeeping()
    assert count_of(world, "too-many-requests") == 61  # each is in the audit log, or counted there
    world.clock.now = NOON  # a clock that is set back forgets
    assert guesses(world, 1) == ["token-unknown"]


@pytest.mark.parametrize("passed, left", [(0, 60), (0.999, 60), (1, 59), (30, 30), (59.999, 1)])
def test_the_answer_names_the_seconds_to_wait(passed, left, world):
    guesses(world, hostenroll.FAILURES_ALLOWED)
    world.clock.now = round(NOON + passed, 3)
    reply = world.enroll("het_junk")
    assert (reply.code, reply.headers["retry-after"]) == ("too-many-requests", str(left))
    world.clock.now = NOON + round(passed, 3) + left
    assert guesses(world, 1) == ["token-unknown"]


@pytest.mark.parametrize("one, other, same", [
    ("192.0.2.7", "192.0.2.8", False),
    ("2001:db8:0:1::1", "2001:db8:0:1:ffff:ffff:ffff:ffff", True),
    ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
    ("::1", "::2", True),
    ("fe80::1%eth0", "fe80::2%eth0", True),
])  # fmt: skip
def test_an_ipv6_network_counts_as_one_address(one, other, same, world):
    assert guesses(world, 21, one)[-1] == "too-many-requests"
    assert (guesses(world, 1, other) == ["too-many-requests"]) is same


def test_a_caller_who_proves_the_secret_is_not_made_to_wait(world):
    used, revoked = world.token(), world.mint().document
    key = make_api_key(world.registry, world.clock)
    world.enroll(used)
    world.revoke_token(revoked["id"])
    world.act("revoke-api-key", key.split("_")[1])
    guesses(world, 100)
    codes = [world.enroll(token).code for token in (used, revoked["token"]) * 2]
    assert codes == ["token-used", "token-revoked"] * 2
    world.address = "192.0.2.9"
    for _ in range(30):  # and is not counted
        reply = world.call("GET", "/api/me", bearer=key)
        assert reply.code == "api-key-invalid" and "revoked" in reply.document["detail"]


def test_very_many_addresses_fill_no_memory(clock):
    limiter, remembered = hostenroll.FailedAuthLimiter(), hostenroll.FAILING_REMEMBERED

    def judge(n):
        address = f"2001:db8:{n >> 16:x}:{n & 0xFFFF:x}::1"
        return limiter.judge(hostenroll.TokenUnknown(), address, clock.ms).status

    assert {judge(n) for n in range(3 * remembered)} == {401}
    assert len(limiter._windows) == remembered
    # The one whose minute began first is forgotten; a later failure begins another.
    clock.advance(60)
    judge(2 * remembered)
    judge(0)
    kept = [f"20010db8{n:08x}" in limiter._windows for n in (2 * remembered, 2 * remembered + 1)]
    assert kept == [True, False]


def verified(world, head=None):
    return verify_audit(world.registry, head)


def log_of(world):
    """The audit log as rows, the oldest first."""
    return [hostenroll.Event(*row) for row in world.sql("SELECT * FROM audit ORDER BY number")]


def head_of(world, event):
    """What verify-audit printed when an event was the last."""
    return hostenroll.Link(event.number, event.mac).head(world.registry.keys.keyring)


@pytest.fixture
def chronicle(world):
    """A world with events of several kinds, seven of them: the first is its API key's."""
    number, _ = world.join()
    world.advance(1)
    world.act("edit-host", number, name="front")
    world.advance(1)
    assert world.enroll("het_junk").code == "token-unknown"
    world.act("revoke-host", number)
    world.act("add-org", name="berlin")
    assert len(log_of(world)) == 7
    return world


def falsify(world, *statements):
    """What can be done by who has the database, and not the keys."""
    triggers = world.sql("SELECT name FROM sqlite_master WHERE type = 'trigger'")
    for statement in (*(f"DROP TRIGGER {name}" for (name,) in triggers), *statements):
        world.sql(statement)


def assert_refuted(world, match):
    with pytest.raises(hostenroll.OperatorError, match=match):
        verified(world)


def test_a_tail_that_was_cut_off_shows_only_against_an_earlier_head(chronicle):
    """And an event of it has no place in the log that went on otherwise, as after a restore of a
    backup: both pasts have the one key."""
    log = log_of(chronicle)
    *_, before, last = heads = [head_of(chronicle, event) for event in log]
    assert [event.number for event in log] == [1, 2, 3, 4, 5, 6, 7] and len({*heads}) == 7
    for head in (None, b"\0" * 32, *heads, *(event.mac for event in log)):
        assert verified(chronicle, head)[:4] == (1, 7, last, head in heads)
    falsify(chronicle, "DELETE FROM audit WHERE number = 7")
    for head in (before, last):
        assert verified(chronicle, head)[:4] == (1, 6, before, head == before)
    for number in (7, 8):
        chronicle.token()
        assert verified(chronicle, last)[1::2] == (number, False)
        assert verified(chronicle, before).has_head is True
    falsify(chronicle)
    chronicle.sql(f"REPLACE INTO audit VALUES ({', '.join('?' * len(log[-1]))})", *log[-1])
    assert_refuted(chronicle, "event 8 ")


def test_the_log_is_verified_in_slices_between_which_it_may_grow(chronicle, monkeypatch):
    """One snapshot for all of it would keep the WAL from being restarted meanwhile."""
    monkeypatch.setattr(hostenroll, "VERIFIED_AT_ONCE", 2)
    log, seen = log_of(chronicle), []

    def progress(done, total):
        assert not chronicle.registry.engine._connection.in_transaction
        seen.append(done)
        if len(seen) == 2:
            chronicle.token()

    found = verify_audit(chronicle.registry, head_of(chronicle, log[0]), progress)
    assert (found.first, found.has_head) == (1, True)
    assert found.last in (7, 8) and len(seen) > 2 and seen == sorted(seen)


@pytest.mark.parametrize("column, values", [
    ("at", (0, 1_800_000_000_001, 1.5, "noon")),
    ("action", ("", "enrol", b"enroll")),
    ("actor", ("", "cli:other", b"cli:test")),
    ("address", ("192.0.2.1", b"")),
    ("organization_id", (None, "", "berlin", "null", b"default")),
    ("subject", ("", "host:0000000000000000", b"\xff")),
    ("code", ("", "null", "forbidden", b"x")),
    ("detail", ("", "{}", '{ "a": 1}', "no JSON", b"{}")),
    ("mac", (b"", b"\0" * 32, b"\0" * 33, "", "text")),
], ids=hostenroll.Event._fields[1:])  # fmt: skip
def test_no_column_of_an_event_can_be_changed(column, values, chronicle):
    log, change = log_of(chronicle), f"UPDATE audit SET {column} = ? WHERE number = ?"
    falsify(chronicle)
    for number in (1, 4, 7):
        original = getattr(log[number - 1], column)
        for value in (other for other in values if other != original):
            chronicle.sql(change, value, number)
            assert_refuted(chronicle, f"event {number} ")
            chronicle.sql(change, original, number)
    assert verified(chronicle).last == 7


@pytest.mark.parametrize("dropped, numbers, inserted, named", table({
    # what is dropped; what is renumbered; what is inserted; the event that is named
    "the first is missing": ("= 1", {}, None, 1),
    "one in the middle is missing": ("= 4", {}, None, 4),
    "the first, and the rest moved up": ("= 1", {n: n - 1 for n in range(2, 8)}, None, 1),
    "one, and the rest moved up": ("= 4", {n: n - 1 for n in range(5, 8)}, None, 4),
    "two in the other order": ("< 0", {3: 4, 4: 3}, None, 3),
    "one at the end": ("< 0", {}, (8, "mac"), 8),
    "one at the end without a mac": ("< 0", {}, (8, "x''"), 8),
    "one put in the middle": ("< 0", {n: n + 1 for n in range(4, 8)}, (4, "mac"), 4),
    "one before the first": ("< 0", {}, (0, "mac"), 0),
    "one long before": ("< 0", {}, (-9, "mac"), -9),
    "one far away": ("< 0", {}, (99, "mac"), 8),
}))  # fmt: skip
def test_no_event_can_be_taken_moved_or_inserted(dropped, numbers, inserted, named, chronicle):
    move, columns = "UPDATE audit SET number = {} WHERE number = {}", hostenroll.Event._fields[1:-1]
    falsify(chronicle, f"DELETE FROM audit WHERE number {dropped}")
    falsify(chronicle, *(move.format(1000 + old, old) for old in numbers))
    falsify(chronicle, *(move.format(new, 1000 + old) for old, new in numbers.items()))
    if inserted:
        row = ", ".join([str(inserted[0]), *columns, inserted[1]])
        chronicle.sql(f"INSERT INTO audit SELECT {row} FROM audit WHERE number = 3")
    assert_refuted(chronicle, f"event {named} ")


@pytest.mark.parametrize("anchor", table({
    # number, mac and proof of an anchor, by the log
    "none": lambda log: None,
    "its mac, unproved": lambda log: (4, log[3].mac, b"\0" * 32),
    "proved by that mac": lambda log: (4, log[3].mac, log[3].mac),
    "a proof that is text": lambda log: (4, log[3].mac, "text"),
    "a mac that is text": lambda log: (4, "text", b"\0" * 32),
    "a number that is text": lambda log: ("four", log[3].mac, b"\0" * 32),
}))  # fmt: skip
def test_the_start_of_the_log_cannot_be_cut_off_without_the_key(anchor, chronicle):
    row = anchor(log_of(chronicle))
    falsify(chronicle, "DELETE FROM audit WHERE number <= 4")
    if row is not None:
        chronicle.sql("INSERT INTO audit_anchor VALUES (1, ?, ?, ?)", *row)
    assert_refuted(chronicle, r"anchor|event 1 ")


def prune(world):
    """Housekeeping until it has nothing more to do."""
    assert not all(world.housekeeping() for _ in range(50))


def test_old_events_go_and_what_is_left_still_verifies(world):
    world.reopen(audit_keep=KEEP)
    for _ in range(6):
        world.act("mint-token")
        world.advance(86400)
    log = log_of(world)
    heads = [head_of(world, event) for event in log]
    for age, left in ((KEEP, 6), (KEEP + 0.001, 5)):
        world.clock.now = NOON + age
        prune(world)
        assert log_of(world) == log[-left:]
    assert verified(world)[:4] == (2, 6, heads[-1], False)
    assert verified(world, heads[0]).has_head is True  # the anchor's
    world.clock.now = NOON + KEEP + 3.5 * 86400
    prune(world)
    assert log_of(world) == log[4:]
    assert [verified(world, heads[n])[:4:3] for n in (3, 2)] == [(5, True), (5, False)]
    # An older anchor is no way back, and nothing is put in front of it.
    falsify(world, "DELETE FROM audit WHERE number = 5")
    assert_refuted(world, r"event 5 .* missing")


def test_a_log_that_is_pruned_to_its_end_goes_on(world):
    world.reopen(audit_keep=KEEP)
    for _ in range(3):
        world.act("mint-token")
    head = head_of(world, log_of(world)[-1])
    world.advance(KEEP + 1)
    prune(world)
    assert verified(world, head)[:4] == (4, 3, head, True) and log_of(world) == []
    world.act("mint-token")
    world.reopen()  # without --audit-keep all stay
    world.advance(100 * KEEP)
    prune(world)
    assert len(log_of(world)) == 1 and verified(world)[:2] == (4, 4)


def test_an_event_of_a_clock_that_was_set_is_as_old_as_its_place(world):
    """One that is far ahead does not keep what comes after it, nor is it young or old by itself;
    one that is far behind takes nothing with it that is younger."""
    world.reopen(audit_keep=KEEP)
    for steps, rest, left in (
        ([100 * KEEP, -100 * KEEP, 10], 0, [1, 2, 3]), ([KEEP + 1], 0, [4]),
        ([-100 * KEEP], 100 * KEEP, [4, 5]),
    ):  # fmt: skip
        for seconds in steps:
            world.advance(seconds)
            world.act("mint-token")
        world.advance(rest)
        prune(world)
        assert [event.number for event in log_of(world)] == left


def test_many_old_events_go_in_bounded_turns_that_follow_at_once(world):
    world.reopen(audit_keep=KEEP)
    for _ in range(3):
        world.run(*[Call(OPERATION["mint-token"], OPERATOR)] * 400)
    world.advance(KEEP + 1)
    world.act("mint-token")
    left, more = [1201], True
    while more:
        more = world.housekeeping()
        left.append(len(log_of(world)))
        assert verified(world)[:2] == (1202 - left[-1], 1201)
        assert left[-2] - left[-1] <= hostenroll.PRUNED_AT_ONCE
    assert left[-1] == 1 and len(left) >= 1 + 1200 // hostenroll.PRUNED_AT_ONCE


@pytest.mark.parametrize("statements", table({
    "all are made old": ["UPDATE audit SET at = 0"],
    "and have a text for a mac": ["UPDATE audit SET at = 0, mac = 'text'"],
    "the first few are made old": ["UPDATE audit SET at = 0 WHERE number < 4"],
    "all but one that is old":
        ["DELETE FROM audit WHERE number < 7", "UPDATE audit SET at = 0, mac = zeroblob(32)"],
}))  # fmt: skip
def test_forged_events_are_not_pruned_away(statements, chronicle, caplog):
    """Else, with the database alone, one could have events pruned and an anchor proved."""
    triggers = [text for text in hostenroll.SCHEMA_OBJECTS.values() if " TRIGGER " in text]
    falsify(chronicle, *statements, *triggers)
    chronicle.reopen(audit_keep=KEEP)
    for _ in range(2):
        prune(chronicle)
        assert_refuted(chronicle, "event 1 ")
        chronicle.token()
    assert caplog.text.count("nothing of it is pruned") == 1


def test_the_mac_of_an_event_proves_no_anchor(chronicle):
    """Who can write the database chooses what the next event is chained to: the MAC of an event
    after this text proved an empty log."""
    falsify(chronicle, "UPDATE audit SET mac = CAST('anchor 0 P' AS BLOB) WHERE number = 7")
    assert chronicle.enroll("het_junk").code == "token-unknown"
    chronicle.run(Call(hostenroll.WRITE_REFUSALS))
    *_, refusal = log_of(chronicle)
    assert refusal.code == "token-unknown"
    falsify(chronicle, "DELETE FROM audit")
    mac = b"P" + hostenroll.audit_record(refusal[:-1])
    chronicle.sql("INSERT INTO audit_anchor VALUES (1, 0, ?, ?)", mac, refusal.mac)
    assert_refuted(chronicle, "anchor")


# Logs that a program of schema 2 began.


def old_log(paths, clock, anchored=None):
    """A pair of schema 2 with events 1 to 5, of which those up to an anchor were pruned; the MACs
    of all. The third minted an API key."""
    make_schema_2(paths, clock)
    keyring, macs, then = load(paths[1]), [b""], clock.ms - 60_000
    key = hostenroll.first_id(then + 3)
    sql(paths[0], f"INSERT INTO api_key VALUES ({key}, x'', NULL, 'admin', '', {then}, '', NULL)")
    for number in range(1, 6):
        about = "add", "cli:x", "", None, f"organization:o{number}", None, "{}"
        if number == 3:
            about = "mint", "cli:x", "", None, f"api-key:{key:016x}", None, '{"role": "admin"}'
        event = (number, then + number, *about)
        record = json.dumps(event, separators=(",", ":")).encode()
        macs.append(hmac.new(keyring.audit_key, macs[-1] + record, "sha256").digest())
        if number > (anchored or 0):
            row = (*event, macs[-1])
            sql(paths[0], f"INSERT INTO audit VALUES ({', '.join('?' * len(row))})", *row)
    if anchored is not None:
        anchor = anchored, macs[anchored]
        proof = hmac.new(keyring.audit_key, b"anchor %d %b" % anchor, "sha256").digest()
        sql(paths[0], "INSERT INTO audit_anchor VALUES (1, ?, ?, ?)", *anchor, proof)
    return macs[1:]


@pytest.mark.parametrize("anchored", [None, 0, 2, 5])
def test_a_log_of_schema_2_goes_on_in_the_new_format(anchored, paths, clock):
    macs, pruned = old_log(paths, clock, anchored), anchored or 0
    assert {it.name: it.is_good for it in hostenroll.examine(*paths)} == {**SOUND, "schema": False}
    with World(paths, clock, audit_keep=KEEP, purpose="serve") as world:
        begun = log_of(world)[-1]
        assert (begun.number, begun.action) == (6, "audit-format")
        assert json.loads(begun.detail) == {"number": 5, "mac": macs[-1].hex()}
        old = [verified(world, mac).has_head for mac in macs]
        assert old == [number >= pruned for number in range(1, 6)]  # the anchor's is one
        assert verified(world)[:3] == (pruned + 1, 6, head_of(world, begun))
        assert not verified(world, begun.mac).has_head
        for day in range(4):  # what is left is old and new, then new alone
            world.act("mint-token")
            assert verified(world, verified(world).head)[1::2] == (7 + day, True)
            world.advance(KEEP if day == 1 else 86400)
            prune(world)
            assert verified(world).last == 7 + day
        first = log_of(world)[0].number
        assert first > 6 and verified(world).first == first
        assert not any(verified(world, mac).has_head for mac in macs)
    sql(paths[0], "UPDATE signing_key SET kid = 'gone'")  # then the last event shows the pair
    with World(paths, clock) as world:
        assert verified(world).last >= 10
    assert verdicts(paths) == {**SOUND, "copy": True}


def spoil(*statements):
    """What is done to an old log before its migration."""

    def change(paths, macs):
        for (name,) in sql(paths[0], "SELECT name FROM sqlite_master WHERE type = 'trigger'"):
            sql(paths[0], f"DROP TRIGGER {name}")
        for statement in statements:
            sql(paths[0], statement)

    return change


def trick(number=0):
    """An anchor that the MAC of an event proves, as a server of schema 2 could be made to give."""

    def forge(paths, macs):
        keyring = load(paths[1])
        record = b'[9,1,"refuse","anonymous","",null,"","x","{}"]'
        proof = keyring.old_audit_mac(record, b"anchor %d P" % number)
        spoil("DELETE FROM audit")(paths, macs)
        mac = b"P" + record
        sql(paths[0], "REPLACE INTO audit_anchor VALUES (1, ?, ?, ?)", number, mac, proof)

    return forge


@pytest.mark.parametrize("change, pruned, named", table({
    # what is done before the migration; how many were pruned; what is named before it and after
    "an event is changed": (spoil("UPDATE audit SET actor = 'x' WHERE number = 3"), 0, "event 3 "),
    "the first is missing": (spoil("DELETE FROM audit WHERE number = 1"), 0, "event 1 "),
    "a mac is text": (spoil("UPDATE audit SET mac = 'text' WHERE number = 5"), 2, "event 5 "),
    "a mac is no text": (spoil("UPDATE audit SET mac = CAST(x'ff' AS TEXT)"), 2, "event 3 "),
    "the time is text": (spoil("UPDATE audit SET at = 'noon' WHERE number = 4"), 2, "event 4 "),
    "an event far away": (spoil(
        "INSERT INTO audit SELECT 99, at, action, actor, address, NULL, subject, code, detail, mac "
        "FROM audit WHERE number = 3"), 0, "event 6 "),
    "an event before": (spoil("UPDATE audit SET number = -7 WHERE number = 3"), 2, "event"),
    "nothing can follow": (spoil(
        "UPDATE audit SET number = 9223372036854775807 WHERE number = 5"), 0, "event [51] "),
    "the anchor is missing": (spoil("DELETE FROM audit_anchor"), 2, "event 1 "),
    "the anchor is moved": (spoil("UPDATE audit_anchor SET number = 3"), 2, "anchor"),
    "its number is text": (spoil("UPDATE audit_anchor SET number = 'x'"), 2, "anchor"),
    "its mac is text": (spoil("UPDATE audit_anchor SET mac = 'x'"), 5, "anchor"),
    "its proof is no text": (spoil("UPDATE audit_anchor SET proof = CAST(x'ff' AS TEXT)"), 2,
                             "anchor"),
    "an anchor proved by an event": (trick(), 0, "anchor"),
    "an anchor proved by an event of a full log": (trick(5), 2, "anchor"),
}))  # fmt: skip
def test_an_old_log_that_does_not_verify_is_migrated_and_named_for_ever(
    change, pruned, named, paths, clock, caplog
):
    change(paths, old_log(paths, clock, pruned or None))
    (before,) = (it.detail for it in hostenroll.examine(*paths) if it.name == "audit")
    assert re.search(named, before) and "as they were" not in before
    with World(paths, clock, audit_keep=86400, purpose="serve") as world:
        assert world.act("show-host", 7).host.hostname == "n.lan"
        for _ in range(2):
            assert_refuted(world, named)
            world.advance(2 * 86400)
            with contextlib.suppress(hostenroll.StorageUnavailable):
                world.act("mint-token")
                prune(world)
        (after,) = (it.detail for it in hostenroll.examine(*paths) if it.name == "audit")
    assert re.search(named, after) and "Traceback" not in caplog.text
    assert named != "event 3 " or "event 3 of the audit log is not as it" in caplog.text


def test_a_log_is_no_old_one_without_the_event_that_says_so(paths, clock):
    """An old log that is put back, and a copy of that event at another place, would need a MAC.
    Nor are its events pruned for old ones, before that event is looked at."""
    old_log(paths, clock)
    kept = sql(paths[0], "SELECT * FROM audit")
    with World(paths, clock, audit_keep=86400, purpose="serve") as world:
        for _ in range(3):
            world.act("mint-token")
        log, then = log_of(world), clock.ms + (86400 - 30) * 1000  # the old events are too old then
        put = f"INSERT INTO audit VALUES ({', '.join('?' * len(log[0]))})"
        format_event = log[5]
        for rows, named in (
            (kept, "event 1 "),
            ([*kept, *log[6:]], "event 1 "),
            ([*kept, format_event._replace(mac=kept[4][-1])], "event 6 "),
            ([*kept, format_event._replace(detail="{}")], "event 6 "),
            ([*kept[:3], format_event._replace(number=4), *log[4:]], "event 4 "),
            ([kept[0], *log[2:]], "event 2 "),
            ([*log[:8], format_event._replace(number=9)], "event 9 "),
        ):  # fmt: skip
            falsify(world, "DELETE FROM audit")
            for row in rows:
                world.sql(put, *row)
            assert_refuted(world, named)
            put_back, audit = log_of(world), world.registry.audit
            world.perform(lambda now, a=audit: a.prune(world.registry.keys.keyring, then))
            assert log_of(world) == put_back or rows[:6] == log[:6]


def test_events_of_a_key_that_is_gone_are_pruned_too(world):
    for _ in range(3):
        world.act("mint-token")
    os.unlink(world.paths[1])
    world.reopen(init=True, audit_keep=KEEP)
    world.advance(KEEP + 1)
    world.act("mint-token")
    prune(world)
    (last,) = log_of(world)
    assert verified(world)[:2] == (last.number, last.number)


def test_new_keys_for_an_old_log_begin_it_again(paths, clock, caplog):
    old_log(paths, clock, anchored=2)
    write(paths[1], hostenroll.new_keyring())
    with World(paths, clock, init=True, purpose="serve") as world:
        world.act("mint-token")
        found = verified(world)
        assert (found.first, found.unverified) == (6, 3) and found.last > 6
        assert log_of(world)[3].action == "init"
    assert "as it was written" not in caplog.text


def test_a_migration_that_is_had_again_makes_no_new_log_an_old_one(chronicle):
    falsify(chronicle)
    chronicle.registry.close()
    sql(chronicle.paths[0], "DROP INDEX host_state")
    sql(chronicle.paths[0], "DROP INDEX api_key_maker")
    sql(chronicle.paths[0], "ALTER TABLE heartbeat RENAME COLUMN state TO active")
    for name, column in ADDED:
        sql(chronicle.paths[0], f"ALTER TABLE {name} DROP COLUMN {column}")
    sql(chronicle.paths[0], "PRAGMA user_version = 2")
    chronicle.reopen(audit_keep=86400, purpose="serve")
    assert log_of(chronicle)[-1].action == "audit-format"
    chronicle.advance(2 * 86400)
    prune(chronicle)
    assert_refuted(chronicle, "event 1 ")


# Every game that can be played with a log of a dozen events, without its key.


class MemoryDatabase(hostenroll.Engine):
    """A copy of a database in memory, where a savepoint undoes what is done to it."""

    def __init__(self, world):
        super().__init__(":memory:")
        self._connection = sqlite3.connect(":memory:", isolation_level=None)
        world.registry.engine._connection.backup(self._connection)
        self._connection.text_factory = hostenroll._text

    def begin(self, **_):
        return True

    def rollback(self):
        pass


COPIED = ", ".join(hostenroll.Event._fields[1:])
RENUMBER = "UPDATE audit SET number = -number * 10; UPDATE audit SET number = "
ODD = [
    "NULL", "''", "'x'", "x''", "x'ff'", "CAST(x'ff' AS TEXT)", "0", "1", "-1", "1.5", "1e999",
    "9223372036854775807", "zeroblob(32)", "zeroblob(33)", "'{}'", "'[[['",
]  # fmt: skip


# fmt: off
def games(numbers):
    """Statements by the name of the game."""
    for n in numbers:
        other, here = numbers[n == numbers[0]], f"FROM audit WHERE number = {n}"
        for column in hostenroll.Event._fields[1:]:
            own = f"CAST({column} AS BLOB)", f"CAST({column} AS TEXT)", f"{column} || ' '"
            for value in (*ODD, *own, f"(SELECT {column} FROM audit WHERE number = {other})"):
                change = f"UPDATE OR IGNORE audit SET {column} = {value} WHERE number = {n}"
                yield f"{column} of {n}: {value}", change
        yield f"{n} is gone", f"DELETE {here}"
        yield (f"{n} is gone, the rest moves up",
               f"DELETE {here}; {RENUMBER}-number / 10 - (number < {-n * 10})")
        yield f"all up to {n} are gone", f"DELETE FROM audit WHERE number <= {n}"
        yield f"all from {n} on are gone", f"DELETE FROM audit WHERE number >= {n}"
        for m in (-1, 0, 99, (1 << 63) - 1):
            yield f"{n} becomes {m}", f"UPDATE audit SET number = {m} WHERE number = {n}"
            yield f"{n} also as {m}", f"INSERT INTO audit SELECT {m}, {COPIED} {here}"
        yield (f"{n} also after it", f"{RENUMBER}-number / 10 + (number < {-n * 10});"
               f"INSERT INTO audit SELECT {n + 1}, {COPIED} {here}")
        for m in (m for m in numbers if m > n):
            yield (f"{n} and {m} swap", f"{RENUMBER}CASE number WHEN {-n * 10} THEN {m} "
                   f"WHEN {-m * 10} THEN {n} ELSE -number / 10 END")
        for proof in ("mac", "zeroblob(32)", "''", "(SELECT proof FROM audit_anchor)"):
            yield (f"an anchor at {n}, proved by {proof}",
                   f"REPLACE INTO audit_anchor SELECT 1, {n}, mac, {proof} {here};"
                   f"DELETE FROM audit WHERE number <= {n}")
        yield (f"a view without {n}", "ALTER TABLE audit RENAME TO a;"
               f"CREATE VIEW audit AS SELECT * FROM a WHERE number <> {n}")
    yield "all move", f"{RENUMBER}-number / 10 + 1"
    yield "all are gone", "DELETE FROM audit"
    yield "an anchor at 0", "REPLACE INTO audit_anchor VALUES (1, 0, x'', x'')"
    for column, value in itertools.product(hostenroll.Anchor._fields, ODD):
        change = f"UPDATE OR IGNORE audit_anchor SET {column} = {value}"
        yield f"{column} of the anchor: {value}", change
    yield "no anchor", "DELETE FROM audit_anchor"
# fmt: on


@pytest.mark.parametrize("began, pruned", sample({
    "schema 2": (6, 0), "schema 2, anchored": (6, 2), "new": (0, 0), "new, anchored": (0, 3),
}, "new"))  # fmt: skip
def test_whatever_is_done_to_a_log_without_its_key_is_found(began, pruned, paths, clock):
    if began:
        old_log(paths, clock, pruned or None)
    with World(paths, clock, audit_keep=86400, purpose="serve") as world:
        for number in range(began, 12):
            world.act("mint-token")
            if number + 1 == pruned:
                world.advance(2 * 86400)
                prune(world)
        head, keyring, log = verified(world).head, world.registry.keys.keyring, log_of(world)
        database = MemoryDatabase(world)
    assert [event.number for event in log] == [*range(pruned + 1, 13)]
    db, unseen, played = database.db, [], 0
    for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        db.execute(f"DROP TRIGGER {name}")

    def state():
        tables = ("audit", "audit_anchor")
        return [db.execute(f"SELECT * FROM {name}").fetchall() for name in tables]

    before = state()
    for name, statements in games([event.number for event in log]):
        db.execute("SAVEPOINT game")
        for statement in statements.split(";"):
            with contextlib.suppress(sqlite3.IntegrityError):  # NULL, where the schema has none
                db.execute(statement)
        if state() != before:
            played += 1
            with contextlib.suppress(hostenroll.OperatorError):
                if hostenroll.verify_audit(database, keyring, head).has_head:
                    unseen.append(name)
        db.execute("ROLLBACK TO game")
    db.close()
    assert unseen == [] and played > 1500


# Rows that only a forger writes, wherever they are read.

GREATEST = hostenroll.LAST_ID  # of the integers of SQLite
HOSTILE_EVENTS = {  # what is set in the third event
    "a number that none can follow": f"number = {GREATEST}",
    "a number below all": "number = -5",
    "a time that is text": "at = 'noon'",
    "a time that is a BLOB": "at = x'ff'",
    "a time with a fraction": "at = 1.5",
    "a time beyond all calendars": f"at = {GREATEST}",
    "a time before all": f"at = -{GREATEST}",
    "an action with an escape": "action = 'x' || char(27) || '[31m'",
    "detail with an escape": """detail = '{"a": "\\u001b[31m"}'""",
    "a NUL in the actor": "actor = 'a' || char(0) || 'b'",
    "detail that is empty": "detail = ''",
    "detail that is no JSON": "detail = '{'",
    "detail that is a list": "detail = '[1]'",
    "detail with a NaN": """detail = '{"a": NaN}'""",
    "detail with a lone surrogate": """detail = '{"a": "\\udfff"}'""",
    "deep detail": f"detail = '{'[' * 500}'",
    "deep detail that is an object": f"""detail = '{'{"a":' * 500}1{'}' * 500}'""",
    "huge detail": "detail = hex(zeroblob(1500000))",
    "a subject that is a BLOB": "subject = x'ff'",
    **{f"{column} that is not UTF-8": f"{column} = CAST(x'ff' AS TEXT)"
       for column in hostenroll.Event._fields[1:]},
}  # fmt: skip


def is_quiet(caplog):
    return "Traceback" not in caplog.text and "a defect" not in caplog.text


@pytest.mark.parametrize("change", sample(HOSTILE_EVENTS, *[*HOSTILE_EVENTS][::3]))
@pytest.mark.parametrize("number", sample({"amid": 3, "at the end": 7}, "at the end"))
def test_a_hostile_event_is_named_and_hinders_nothing(number, change, chronicle, caplog):
    (_, credential), change = chronicle.join(), f"UPDATE audit SET {change} WHERE number = {number}"
    triggers = [text for text in hostenroll.SCHEMA_OBJECTS.values() if " TRIGGER " in text]
    falsify(chronicle, "DELETE FROM audit WHERE number > 7", change, *triggers)
    chronicle.reopen(audit_keep=86400)
    for _ in range(2):
        chronicle.advance(2 * 86400)
        prune(chronicle)
        assert chronicle.beat(credential).status == 200
        assert number in {event["number"] for event in chronicle.audit()} or "SET number" in change
        assert chronicle.ask("GET", "/metrics").status == 200
        assert "audit" in {finding.name for finding in bad_in(chronicle.paths)}
        assert is_quiet(caplog)
        if f"number = {GREATEST}" in change:  # what cannot be audited does not happen
            token = chronicle.sql("SELECT * FROM token")
            with pytest.raises(hostenroll.StorageUnavailable) as caught:
                chronicle.act("mint-token")
            assert f"event {GREATEST} " in str(caught.value.__cause__)
            assert chronicle.sql("SELECT * FROM token") == token
        else:
            assert chronicle.join()[0]
        assert_refuted(chronicle, "event")


def tries(world, token, credential, number):
    """What reads each table, as requests."""
    yield beat_bytes(credential)
    yield beat_bytes(credential, os="new", hostname="new")
    yield request_bytes("POST", "/api/agent/enroll", {"token": token, "hostname": "web-1"})
    hosts = f"/api/hosts/{number}"
    for method, path, body in (
        ("GET", "/api/hosts", None), ("GET", "/api/hosts?q=web&label=a=1&status=online", None),
        ("GET", hosts, None), ("PATCH", hosts, {"name": "n"}), ("POST", f"{hosts}/revoke", None),
        ("POST", f"{hosts}/restore", None), ("POST", f"{hosts}/reenroll", None),
        ("GET", "/api/hosts/tokens", None), ("GET", f"/api/hosts/tokens/{token[4:20]}", None),
        ("DELETE", f"/api/hosts/tokens/{token[4:20]}", None), ("GET", "/api/service", None),
        ("GET", "/metrics", None), ("GET", "/readyz", None),
    ):  # fmt: skip
        yield request_bytes(method, path, body, world.api_key)


@pytest.mark.parametrize("name", [
    "host", "heartbeat", "organization",
    *(pytest.param(name, marks=slow) for name in ("token", "api_key", "signing_key", "service")),
])  # fmt: skip
def test_a_hostile_row_refuses_by_name_what_reads_it_and_nothing_else(name, world, caplog):
    """The others of a tick stand."""
    (_, honest), refused = world.join(), set()
    world.perform(lambda now: world.registry.service.start("u", now))
    world.sql("PRAGMA foreign_keys = OFF")
    numbers, texts = ("'text'", f"-{GREATEST}", f"{GREATEST}"), ("CAST(x'ff' AS TEXT)", "'[[['")
    (_, key, *_), *columns = world.sql(f"PRAGMA table_info({name})")
    for _, column, kind, *_ in columns:
        for value in numbers if kind == "INTEGER" else texts:
            world.advance(0.001)  # the ids of one millisecond have no order
            host, credential = world.join()
            world.advance(0.001)
            text = world.token(labels={"a": "1"}, maxUses=9)
            world.sql(f"CREATE TEMP TABLE saved AS SELECT * FROM {name}")
            newest = f"WHERE {key} = (SELECT max({key}) FROM {name})"
            world.sql(f"UPDATE OR IGNORE {name} SET {column} = {value} {newest}")
            for data in tries(world, text, credential, host):
                one, other = world.tick([data, beat_bytes(honest)])
                assert one.status != 500, (column, value, data)
                assert other.status == 200 or name == "signing_key", (column, value, data)
                refused.update([column] if one.status == 503 else [])
            for act in ("list-orgs", "list-api-keys", "list-signing-keys", "mint-api-key"):
                with contextlib.suppress(Problem):
                    world.act(act)
            with contextlib.suppress(hostenroll.StorageUnavailable):
                world.housekeeping()
            world.sql(f"DELETE FROM {name}")
            world.sql(f"INSERT INTO {name} SELECT * FROM saved")
            world.sql("DROP TABLE saved")
    assert is_quiet(caplog) and refused
    assert re.search(f"row [^ ]+ of ({name}|host) holds what we never write", caplog.text)


@pytest.mark.parametrize("table, column, value", [
    ("host", "name", "x'ff00'"), ("host", "enrolled_at", "'soon'"), ("token", "max_uses", "1.5"),
    ("heartbeat", "last_seen", "'x'"), ("api_key", "created_at", "x'00'"),
    ("service", "alive", "'x'"), ("signing_key", "kid", "x'00'"),
])  # fmt: skip
def test_check_names_a_row_that_no_hostenroll_wrote(table, column, value, world):
    world.join()
    world.perform(lambda now: world.registry.service.start("u", now))
    world.act("mint-api-key")
    world.sql("PRAGMA foreign_keys = OFF")
    assert "rows" not in {finding.name for finding in bad_in(world.paths)}
    world.sql(f"UPDATE {table} SET {column} = {value}")
    (named,) = [finding for finding in bad_in(world.paths) if finding.name == "rows"]
    assert re.match(f"what we never write is in (host|{table}) ", named.detail), named


def test_a_serial_that_none_can_follow_is_a_refusal(world):
    number, _ = world.join()
    text = world.reenroll(number).document["token"]
    for serial in (GREATEST, GREATEST - 5):
        world.sql(f"UPDATE host SET issued = {serial}")
        before = world.snapshot()
        assert world.enroll(text).code == "storage-unavailable" and world.snapshot() == before
    world.sql("UPDATE host SET issued = 1")
    assert world.enroll(text).status == 201


IGNORED_INSERTS = {  # by table, what inserts a row
    "audit": lambda world, token: world.act("add-org", name="berlin"),
    "token": lambda world, token: world.act("mint-token"),
    "api_key": lambda world, token: world.act("mint-api-key"),
    "organization": lambda world, token: world.act("add-org", name="berlin"),
    "signing_key": lambda world, token: world.act("rotate-signing-key"),
    "service":
        lambda world, token: world.perform(lambda now: world.registry.service.start("", now)),
    "audit_anchor": lambda world, token: world.housekeeping(),
    "host": lambda world, token: world.enroll(token),
    "heartbeat": lambda world, token: world.enroll(token),
}  # fmt: skip


@pytest.mark.parametrize("name", IGNORED_INSERTS)
def test_an_insert_that_a_trigger_ignores_kills_the_tick(name, world, caplog):
    """It keeps an event out of the log, or a row out of its table, without an error."""
    world.reopen(audit_keep=86400)
    world.act("mint-token")
    world.advance(2 * 86400)
    token = world.token()
    # One in the schema ends the process, when the tick has failed.
    world.sql(f"CREATE TEMP TRIGGER t BEFORE INSERT ON main.{name} BEGIN SELECT RAISE(IGNORE); END")
    before = world.snapshot()
    for _ in range(2):
        try:
            code = IGNORED_INSERTS[name](world, token).code
        except hostenroll.StorageUnavailable as problem:
            code = problem.code
        assert (code, world.snapshot()) == ("storage-unavailable", before)
    assert caplog.text.count("a row was not added") == 1 and is_quiet(caplog)
    world.sql("DROP TRIGGER t")
    assert world.join() and verified(world)


MINTED = """INSERT INTO api_key
    SELECT {}, secret_hash, NULL, 'admin', '', {}, '', NULL, NULL, NULL, NULL FROM api_key"""


@pytest.mark.parametrize("statement, named", table({
    # what is done to a database with an API key and a token; what is named
    "nothing": ("SELECT 1", []),
    "an API key": (MINTED.format("id + 1", "created_at"), ["api-key:{:016x}"]),
    "an API key that is new by its id": (MINTED.format("id + 1", 0), ["api-key:{:016x}"]),
    "an API key that is new by its time":
        (MINTED.format(1, "created_at"), ["api-key:0000000000000001"]),
    "a token": (
        "INSERT INTO token SELECT id + 1, secret_hash, organization_id, '', NULL, NULL, '{}', 1, 0,"
        " created_at, '', expires_at, NULL, NULL, NULL, NULL, NULL FROM token", ["token:{:016x}"]),
    "a role": ("UPDATE api_key SET role = 'admin'", ["api-key:{:016x}"]),
    "an organization": ("UPDATE api_key SET organization_id = NULL", ["api-key:{:016x}"]),
    "a token's organization": ("UPDATE token SET organization_id = 'berlin'", ["token:{:016x}"]),
    "another id": ("UPDATE api_key SET id = id + 1", ["api-key:{:016x}"]),
    "one that is older than the log": (MINTED.format(1, 0), []),
    "a token that is gone": ("DELETE FROM token", []),
}))  # fmt: skip
def test_check_names_what_no_event_minted(statement, named, paths, clock):
    with World(paths, clock) as world:
        world.act("add-org", name="berlin")
        clock.advance(1)
        world.act("mint-token")
        world.act("mint-api-key", role="viewer", organizationId="berlin")
    sql(paths[0], statement)
    table = named[0].split(":")[0].replace("-", "_") if named else "token"
    newest = sql(paths[0], f"SELECT max(id) FROM {table}")[0][0]
    bad = {finding.name: finding.detail for finding in bad_in(paths)}
    assert [*bad] == ["minted"] * len(named)
    assert all(text.format(newest) in bad["minted"] for text in named)


def test_check_takes_for_minted_what_is_older_than_the_log_and_all_that_a_fleet_does(world):
    world.reopen(audit_keep=86400)
    number, _ = world.join()
    world.reenroll(number)
    world.advance(2 * 86400)
    prune(world)
    assert verdicts(world.paths) == SOUND  # no event is kept
    world.token()
    world.act("mint-api-key")
    world.reenroll(number)
    assert verdicts(world.paths) == SOUND


def test_new_keys_begin_the_log_again(world):
    for _ in range(3):
        world.act("mint-token")
    log = log_of(world)
    os.unlink(world.paths[1])
    world.reopen(init=True)
    again = log_of(world)
    assert again[:3] == log and (again[3].number, again[3].subject) == (4, "audit")
    assert [event.action for event in again[3:]] in (["init"], ["init", "rotate", "retire"])
    world.act("mint-token")
    found = verified(world)
    assert (found.first, found.last, found.unverified) == (4, len(again) + 1, 3)
    falsify(world, "UPDATE audit SET actor = 'x' WHERE number = 4")
    assert_refuted(world, "event 4 ")


# 7. Messages


def get(target=b"/", fields=b"", version=b"1.1"):
    """A GET; each further field line ends with its CR LF."""
    return b"GET %b HTTP/%b\r\nHost: h\r\n%b\r\n" % (target, version, fields)


def post(fields, body=b""):
    return b"POST /x HTTP/1.1\r\nHost: h\r\n%b\r\n\r\n%b" % (fields, body)


def chunked(body):
    return post(b"Transfer-Encoding: chunked", body)


def headed(size):
    """A head of so many bytes, with its empty line."""
    bare = len(get(b"/", b"X: \r\n"))
    return get(b"/", b"X: %b\r\n" % (b"a" * (size - bare)))


def got(path="/", query="", body=b"", method="GET"):
    return method, path, query, body


def sent(body):
    return [got("/x", "", body, "POST")]


def read_all(pieces):
    """The requests in a stream, then the code of the problem, or whether a body is open."""
    reader, requests = RequestReader(), []
    try:
        for piece in pieces:
            request = reader.next(piece)
            while request is not None or reader.has_more:
                if request is not None:
                    requests.append((request.head, request.authorization, request.body))
                request = reader.next()
    except Problem as problem:
        assert isinstance(problem, hostenroll.Unframed) and problem.closes
        return [*requests, problem.code]
    return [*requests, reader.is_in_body]


KIB, LAST = 1024, b"0\r\n\r\n"
LARGE = b"x" * 64 * KIB
AT_ROOT = [got()]
SENT, BARE = sent(b"{}"), sent(b"")
READ_AT_ROOT = {
    "the shortest": b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", "an empty query": get(b"/?"),
    "HTTP/1.0 without Host": b"GET / HTTP/1.0\r\n\r\n", "the largest head": headed(16 * KIB),
    "HTTP/1.9, as RFC 9110 section 2.5 has it": get(version=b"1.9"),
    "no white space at all": b"GET / HTTP/1.1\r\nHost:h\r\nX:\r\n\r\n",
    "latin-1 in a value": get(b"/", b"X: \xe9\xff\r\n"), "100 fields": get(b"/", b"X: y\r\n" * 99),
    "Host with a port": b"GET / HTTP/1.1\r\nHost: a-b.test:8080\r\n\r\n",
    "Host of IPv6": b"GET / HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n\r\n",
    "a field twice that may come twice": get(b"/", b"X: 1\r\nX: 2\r\n"),
    "one empty line before": b"\r\n" + get(),
    "100 with a credential": get(b"/", b"Authorization: Bearer x\r\n" + b"X: y\r\n" * 98),
}  # fmt: skip
GOOD = {  # method, path, query, body of each request
    **{name: (data, AT_ROOT) for name, data in READ_AT_ROOT.items()},
    "an unknown method": (b"BREW /x HTTP/1.1\r\nHost: h\r\n\r\n", [got("/x", method="BREW")]),
    "path and query": (get(b"/a%2Fb/c;d=1?x=%20&y=/?:@"), [got("/a%2Fb/c;d=1", "x=%20&y=/?:@")]),
    "two slashes": (get(b"//h/x"), [got("//h/x")]),
    "absolute-form": (get(b"http://a.test:80/x?y=1"), [got("/x", "y=1")]),
    "absolute-form in capitals": (get(b"HTTPS://A/x"), [got("/x")]),
    "absolute-form without a path": (get(b"http://[::1]:8080?y"), [got("/", "y")]),
    "the whole server": (b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", [got("*", method="OPTIONS")]),
    "white space around values": (post(b"Content-Length: \t 2 \t", b"{}"), SENT),
    "names in any case": (post(b"cOnTeNt-LeNgTh: 2", b"{}"), SENT),
    "zeros before the length": (post(b"Content-Length: 0002", b"{}"), SENT),
    # int() raises for more than 4,300 digits since Python 3.11, and is quadratic before it.
    "5,000 zeros before the length": (post(b"Content-Length: " + b"0" * 5000 + b"2", b"{}"), SENT),
    "nothing but zeros as the length": (post(b"Content-Length: " + b"0" * 5000), BARE),
    "a body for GET": (get(b"/", b"Content-Length: 1\r\n") + b"x", [got(body=b"x")]),
    "every byte": (post(b"Content-Length: 256", bytes(range(256))), sent(bytes(range(256)))),
    "a request as a body": (
        post(b"Content-Length: 27", get()) + get(b"/2"), [*sent(get()), got("/2")]),
    "chunked": (chunked(b"2\r\n{}\r\n" + LAST), SENT),
    "Chunked": (post(b"Transfer-Encoding: ChunKed", LAST), BARE),
    "chunks": (chunked(b"a\r\n0123456789\r\n009\r\n\r\n0\r\n\r\nab\r\n" + LAST),
               sent(b"0123456789\r\n0\r\n\r\nab")),
    "a chunk's extension": (chunked(b'2;a=b;c="d;\xe9"\r\n{}\r\n0;x\r\n\r\n'), SENT),
    "bad white space in it": (chunked(b'2 ; a = "b\\"" ;c\r\n{}\r\n' + LAST), SENT),
    "small chunks": (chunked(b"10\r\n%b\r\n" % (b"x" * 16) * 4096 + LAST), sent(b"x" * 65_536)),
    "a size line of 256 bytes": (chunked(b"1;" + b"a" * 254 + b"\r\nx\r\n" + LAST), sent(b"x")),
    "zeros as the last size": (chunked(b"00000000\r\n\r\n"), BARE),
    "100 trailers": (chunked(b"0\r\n" + b"X: y\r\n" * 100 + b"\r\n"), BARE),
    "trailers, which change nothing": (
        chunked(b"0\r\nX: y\r\nContent-Length: 9\r\nAuthorization: Bearer x\r\n\r\n"), BARE),
    "the largest body": (post(b"Content-Length: 65536", LARGE), sent(LARGE)),
    "large chunks": (chunked(b"8000\r\n%b\r\n" % (b"x" * 32768) * 2 + LAST), sent(LARGE)),
    "one byte a chunk": (chunked(b"1\r\nx\r\n" * 3000 + LAST), sent(b"x" * 3000)),
    "an empty line between": (get(b"/1") + b"\r\n" + get(b"/2"), [got("/1"), got("/2")]),
    "several at once": (
        get(b"/1") + post(b"Content-Length: 2", b"{}") + chunked(b"1\r\n!\r\n" + LAST) + get(b"/4"),
        [got("/1"), *SENT, *sent(b"!"), got("/4")]),
}  # fmt: skip

MALFORMED = {
    # RFC 9112 section 6.3, and what two readers of a length have disagreed about.
    **{f"a length of {value!r}": post(b"Content-Length: " + value, b"{}xx") for value in (
        b"", b"+4", b"-4", b"-0", b"0_4", b"4,4", b"4, 4", b"4 4", b"0x4", b"4.0", b"4e0", b"4;",
        b'"4"', b"four", b"\xd9\xa4", b"\xef\xbc\x94", b"\xb2", b"4\x0b", b"4\x0c", b"\xa04",
        b"4\x85")},
    "two lengths": post(b"Content-Length: 2\r\nContent-Length: 3", b"{}x"),
    "two lengths that agree": post(b"Content-Length: 2\r\nContent-Length: 2", b"{}"),
    "two lengths that agree, apart": post(b"Content-Length: 2\r\nX: y\r\ncontent-length: 2", b"{}"),
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
    "bare LF everywhere": b"GET / HTTP/1.1\nHost: h\n\n", "bare LF before": b"\n" + get(),
    "bare LF after the request line": b"GET / HTTP/1.1\nHost: h\r\n\r\n",
    "bare LF between fields": get(b"/", b"X: y\nContent-Length: 3\r\n"),
    "bare LF at the head's end": b"GET / HTTP/1.1\r\nHost: h\r\n\n\r\n\r\n",
    "bare CR in a value": get(b"/", b"X: y\rContent-Length: 3\r\n"), "space before": b" " + get(),
    "bare CR in the request line": get(b"/\r"), "bare CR before CR LF": get(b"/", b"X: y\r\r\n"),
    "bare CR at the head's end": b"GET / HTTP/1.1\r\nHost: h\r\r\n\r\n",
    "bare LF and another version": b"GET / HTTP/2.0\r\nHost: h\nX: y\r\n\r\n",
    "bare LF and an unknown coding": post(b"Transfer-Encoding: gzip\r\nX: y\nZ: z"),
    "two empty lines before": b"\r\n\r\n" + get(), "bare CR before": b"\r" + get(),
    # RFC 9112 section 5: field lines.
    **{f"{c} in a value": get(b"/", b"X: y%bz\r\n" % c) for c in (
        b"\0", b"\x01", b"\x08", b"\x0b", b"\x1b", b"\x7f")},
    **{f"Host {host!r}": b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host for host in (
        b"", b"a b", b"a/b", b"a,b c", b"a@b", b"a:b", b"a:1:2", b"http://a", b"[::1", b"[x]",
        b"::1", b"a?", b"a#", b"a\\b", b"<a>", b"\xe9", b"%zz", b'"')},
    "a credential and another scheme": get(
        b"/", b"authorization: Basic a\r\nAuthorization: Bearer b\r\n"),
    "two credentials and a large body": post(
        b"Authorization: Bearer a\r\nContent-Length: 99999\r\nAuthorization: Bearer b"),
    "two expectations": post(
        b"Content-Length: 2\r\nExpect: 100-continue\r\nExpect: 100-continue", b"{}"),
    "a folded value": get(b"/", b"X: y\r\n z\r\n"), "no name": get(b"/", b": y\r\n"),
    "a folded value, by a tab": get(b"/", b"X: y\r\n\tz\r\n"), "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "space before the first field": b"GET / HTTP/1.1\r\n Host: h\r\n\r\n",
    "space before the colon": get(b"/", b"X : y\r\n"), "NUL in a name": get(b"/", b"X\0: y\r\n"),
    "a tab before the colon": get(b"/", b"X\t: y\r\n"), "two Hosts": get(b"/", b"Host: h\r\n"),
    "no colon": get(b"/", b"X\r\nContent-Length: 3\r\n"),
    "a name that is no token": get(b"/", b"X(y): z\r\n"),
    "a name that is not ASCII": get(b"/", b"\xe9: z\r\n"),
    "two Hosts in HTTP/1.0": get(b"/", b"host: h\r\n", b"1.0"),
    "a bad Host in HTTP/1.0": b"GET / HTTP/1.0\r\nHost: a b\r\n\r\n",
    "a bad Host beside absolute-form": b"GET http://a/ HTTP/1.1\r\nHost: a b\r\n\r\n",
    "two credentials": get(b"/", b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\n"),
    "a credential and an empty one": get(b"/", b"Authorization: Bearer b\r\nAuthorization:\r\n"),
    "two idempotency keys": get(b"/", b"Idempotency-Key: a\r\nidempotency-key: a\r\n"),
    # RFC 9112 section 3: the request line.
    **{f"request line {line!r}": line + b"\r\nHost: h\r\n\r\n" for line in (
        b"GET /", b"GET / ", b"GET  / HTTP/1.1", b"GET / HTTP/1.1 ", b"GET /  HTTP/1.1",
        b"GET\t/ HTTP/1.1", b"GET / http/1.1", b"GET / HTTP/1", b"GET / HTTP/1.",
        b"GET / HTTP/1.10", b"GET / HTTP/01.1", b"GET / HTTP/+1.1", b"GET / HTTP 1.1",
        b"GET / HTTPS/1.1", b"GET / \xc9TTP/1.1", b"HTTP/1.1 200 OK", b"G(T / HTTP/1.1",
        b"G\xcbT / HTTP/1.1", b" GET / HTTP/1.1", b"/ HTTP/1.1", b"GET / x HTTP/1.1", b"GET")},
    **{f"target {target!r}": get(target) for target in (
        b"x", b"*", b"?x", b"#", b"/#x", b"/x?y#z", b"/\xe9", b"/%", b"/%4", b"/%zz", b"/?%u0041",
        b"/\\x", b'/"', b"/<", b"/^", b"/`", b"/{", b"/|", b"/[", b"/\0", b"/\x7f", b"h:80",
        b"http:/x", b"http://", b"http:///x", b"http://a b/", b"http://u:p@h/", b"http://h:x/",
        b"http://h/#x", b"http://[::1/", b"ftp://h/", b"file:///etc", b"javascript:x",
        b"xhttp://h/", b"/*?\t")},
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(32)), "NULs": b"\0" * 64,
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "a proxy's preface": b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + get(),
    # RFC 9112 section 7.1: chunks.
    **{f"a chunk's size {size!r}": chunked(size + b"\r\n{}\r\n" + LAST) for size in (
        b"", b" 2", b"2 ", b"\t2", b"+2", b"-2", b"0x2", b"2h", b"g", b"2,2", b"0_2", b"2;", b"2;;",
        b"2;=b", b"2;a=", b'2;a="b', b"2;\xff", b"2; ", b"2 x", b"\xd9\xa2", b"2\0", b"000000002",
        b"100000002", b"ffffffffffffffff2", b"2;\0", b"2;a\nb", b"2;a\rb", b"2\r", b"2\n",
        b"2;" + b"a" * 255)},
    **{f"trailer {line!r}": chunked(b"0\r\n" + line + b"\r\n\r\n") for line in (
        b"x", b" x: y", b"x : y", b"x: \0", b"x: y\r\n z", b": y", b"x: y\nz: z", b"x: y\rz",
        b"GET / HTTP/1.1", b"x: " + b"y" * 254)},
    "a size line that never ends": chunked(b"2;" + b"a" * 300),
    "a chunk longer than its size": chunked(b"2\r\n{}}\r\n" + LAST),
    "a chunk shorter than its size": chunked(b"3\r\n{}\r\n" + LAST),
    "a chunk that ends in LF": chunked(b"2\r\n{}\n" + LAST),
    "LF after a chunk's size": chunked(b"2\n{}\r\n" + LAST),
    "LF after the last chunk": chunked(b"0\n\n"),
    "a chunk without an end": chunked(b"2\r\n{}" + LAST),
    "other bytes where a chunk should end": chunked(b"2\r\n{}xx" + LAST),
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
        "too many chunks": chunked(b"1\r\nx\r\n" * 14_000 + LAST),
        "too long extensions": chunked(b"1;%b\r\nx\r\n" % (b"e" * 250) * 300 + LAST),
    },
    "head-too-large": {
        "too many trailers": chunked(b"0\r\n" + b"X: y\r\n" * 101 + b"\r\n"),
        "too long trailers": chunked(b"0\r\n" + b"X: %b\r\n" % (b"y" * 200) * 400 + b"\r\n"),
        "trailers that never end": chunked(b"0\r\n" + b"X: y\r\n" * 101),
        "a head of 16 KiB and 1": headed(16 * KIB + 1), "101 fields": get(b"/", b"X: y\r\n" * 100),
        "a head of 16 KiB and 4": headed(16 * KIB + 4),
        "a head that never ends": b"GET / HTTP/1.1\r\nX: " + b"a" * 40_000,
        "a request line that never ends": b"GET /" + b"a" * 40_000,
        "a large head before a body of lines": headed(17 * KIB) + b"{\n}\r",
        "101 with a credential": get(b"/", b"Authorization: Bearer x\r\n" + b"X: y\r\n" * 99),
    },
    "not-implemented": {
        **{f"TE {coding!r}": post(b"Transfer-Encoding: " + coding, LAST) for coding in (
            b"", b"gzip", b"identity", b"gzip, chunked", b"chunked, gzip", b"chunked, chunked",
            b"chunked,", b",chunked", b"xchunked", b"chunked;q=1", b'"chunked"', b"chunked\xa0",
            b"chunked chunked")},
        "CONNECT": b"CONNECT h:80 HTTP/1.1\r\nHost: h:80\r\n\r\n",
        "CONNECT to a path": b"CONNECT / HTTP/1.1\r\nHost: h\r\n\r\n",
    },
    "http-version": {
        **{f"HTTP/{version}": get(version=version) for version in (b"0.9", b"2.0", b"3.0", b"9.9")},
        "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    },
    "expectation-failed": {
        "another expectation": post(b"Content-Length: 2\r\nExpect: 200-ok", b"{}"),
        "two in one": post(b"Content-Length: 2\r\nExpect: 100-continue, x", b"{}"),
    },
}  # fmt: skip
BAD = {name: (data, "malformed-request") for name, data in MALFORMED.items()}
for code, messages in OTHERWISE.items():
    BAD.update({name: (data, code) for name, data in messages.items()})
UNFINISHED = {
    "nothing": b"", "half an empty line": b"\r", "an empty line": b"\r\n", "a method": b"POST",
    "half a line end": b"GET / HTTP/1.1\r", "a head but for its last byte": get()[:-1],
    "the largest head but for its last byte": headed(16 * KIB)[:-1], "no chunk yet": chunked(b""),
    "no body yet": post(b"Content-Length: 2"), "half a body": post(b"Content-Length: 2", b"{"),
    "half a chunk": chunked(b"2\r\n{"), "no last chunk": chunked(b"2\r\n{}\r\n"),
    "no end of the trailers": chunked(b"0\r\nX: y\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("data, requests", table(GOOD))
def test_a_well_formed_message_is_read(data, requests):
    *found, in_body = read_all([data])
    assert [(head.method, head.path, head.query, body) for head, _, body in found] == requests
    assert in_body is False


@pytest.mark.parametrize("data, code", table(BAD))
def test_a_message_that_two_readers_could_frame_differently_is_refused(data, code):
    assert read_all([data]) == [code]
    # A whole request before it is answered first; nothing behind it is ever a request.
    first, *rest = read_all([get(b"/first") + data + get(b"/smuggled")])
    assert first[0].path == "/first" and rest == [code]


@pytest.mark.parametrize("data", table(UNFINISHED))
def test_the_reader_waits_for_the_rest_of_an_unfinished_message(data):
    assert read_all([data]) == [b"\r\n\r\n" in data]


EVERY = {**{name: row[0] for name, row in {**GOOD, **BAD}.items()}, **UNFINISHED}


@pytest.mark.parametrize("data", sample(EVERY, *(set(EVERY) - {"too many chunks"})))
def test_a_message_is_the_same_however_it_is_cut(data):
    whole, size = read_all([data]), len(data)
    edge, singly = (size, size) if size < 1000 else (12, 200)
    between = range(edge, size - edge, size // 12 or 1)
    for cut in (*range(edge), *between, *range(size - edge, size)):
        assert read_all([data[:cut], data[cut:]]) == whole, cut
    singles = [data[at : at + 1] for at in range(size)]
    assert read_all([*singles[:singly], data[singly:]]) == whole
    steps = [data[at : at + 89] for at in range(0, size - singly, 89)]
    assert read_all(steps + singles[89 * len(steps) :]) == whole


NASTY_BYTES = [
    b"", b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b";", b"0", b"4", b"\xff",
    b"%", b"#", b"\r\nHost: h", b"\r\nContent-Length: 3", b"\r\nTransfer-Encoding: chunked",
    b"\r\nAuthorization: Bearer x", b"\r\nAuthorization: Bearer x y", b"\r\nConnection: close",
    b"HTTP/2.0",
]  # fmt: skip


def spoiled_message(rng):
    """A message of the tables with pieces cut out, doubled and put in."""
    stock = [data for data in EVERY.values() if 0 < len(data) < 400]
    data = rng.choice(stock)
    for _ in range(rng.randint(1, 3)):
        start = rng.randint(0, len(data))
        end = start + rng.choice([0, 0, 1, 1, 2, 8])
        data = data[:start] + rng.choice([*NASTY_BYTES, rng.choice(stock)]) + data[end:]
    return data


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_bytes_are_requests_or_a_problem_however_they_are_cut(seed):
    rng, ends = random.Random(seed), set()
    for _ in range(400):
        data = spoiled_message(rng)
        whole, cut = read_all([data]), rng.randint(0, len(data))
        assert len(whole) <= 1 + len(data) // len(b"GET / HTTP/1.0\r\n\r\n")
        assert read_all([data[:cut], data[cut:]]) == whole, data
        assert read_all([data[at : at + 1] for at in range(len(data))]) == whole, data
        ends.add(whole[-1])
    assert ends >= {False, "malformed-request", "not-implemented"}


def outcome(parse, data):
    try:
        head, authorization = parse(data)
    except Problem as problem:
        return problem.code
    return head._replace(authorization=None), authorization


def uncached(data):
    head = hostenroll._parse_head(data)
    scheme, _, value = (head.authorization or "").partition(" ")
    return head, value.strip(" ") if scheme.lower() == "bearer" else None


AUTHORIZATIONS = [
    b"authorization: Bearer x", b"Authorization : Bearer x", b"X-Authorization: Bearer x",
    *(b"Authorization:" + value for value in (
        b" Bearer abc", b" Bearer a.b-c_d~e+f/g==", b" Bearer a=b", b" Bearer", b" Bearer ",
        b" Bearer  abc", b" Bearer a b", b" Bearer abc ", b" Bearer abc\t", b" bearer abc",
        b"Bearer abc", b" Bearer \xe9", b" Bearer a\rb", b" Bearer a\nb", b" Basic abc", b"",
        b" Bearer abc,", b" Bearer a\0")),
]  # fmt: skip
OTHER_LINES = [
    b"X: y", b"Connection: close", b"Content-Length: 2", b"Content-Length: 99999", b"Expect: x",
    b"Host: h", b"Transfer-Encoding: gzip", b"Idempotency-Key: k", b"no colon", b" folded", b"",
]  # fmt: skip
FIRST_LINES = [b"GET / HTTP/1.1"] * 3 + [b"GET / HTTP/1.0", b"GET / HTTP/2.0", b"GET /"]


def test_cutting_out_the_credential_changes_nothing():
    rng, lines, outcomes = random.Random(7), AUTHORIZATIONS, set()
    heads = [*([line] for line in lines), *map(list, itertools.product(lines, lines))]
    for _ in range(1500):
        some = rng.choices(lines, k=rng.randint(0, 2))
        heads.append(some + rng.choices(OTHER_LINES, k=rng.randint(0, 3)))
    heads += [[b"Authorization: Bearer abc"] + [b"X: y"] * count for count in (97, 98, 99, 100)]
    for fields in heads:
        rng.shuffle(fields)
        data = b"\r\n".join([rng.choice(FIRST_LINES), b"Host: h", *fields])
        expected = outcome(uncached, data)
        assert [outcome(hostenroll.parse_head, data) for _ in range(2)] == [expected] * 2, data
        outcomes.add(expected if isinstance(expected, str) else expected[1])
    assert outcomes >= {None, "", "abc", "a.b-c_d~e+f/g==", "a b"}
    assert outcomes >= {"malformed-request", "head-too-large", "http-version"}
    assert hostenroll._parse_head_cached.cache_info().maxsize == hostenroll.HEADS_CACHED
    for name in ("one", "two", "one"):  # the cache never mixes them up
        data = get(b"/", f"Authorization: Bearer {name}\r\n".encode())
        (head, authorization, _), _ = read_all([data])
        assert authorization == name and not head.authorization
    assert read_all([get()])[0][1] is None


# Trusted proxies.

PROXIES = tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "2001:db8:f::/48", "192.0.2.1")))
PROXY = "10.0.0.1"
CLIENT = "198.51.100.7"
FROM_CLIENT = {  # X-Forwarded-For of requests of the client, one text for each line
    "one client": ["198.51.100.7"], "white space around it": ["\t 198.51.100.7 "],
    "a port": ["198.51.100.7:4711"], "IPv4 in IPv6": ["::ffff:198.51.100.7"],
    "IPv4 in IPv6, in brackets": ["[::ffff:c633:6407]:1"],
    "what the client claims": ["203.0.113.9, 198.51.100.7"],
    "a proxy behind a proxy": ["203.0.113.9, 198.51.100.7, 10.1.1.1"],
    "without spaces": ["203.0.113.9,198.51.100.7,10.1.1.1,192.0.2.1"],
    "a proxy in IPv6": ["198.51.100.7, 2001:db8:f::9"], "an empty line first": ["", "198.51.100.7"],
    "a proxy in mapped IPv6": ["198.51.100.7, ::ffff:10.1.1.1"],
    "two lines": ["203.0.113.9", "198.51.100.7"],
    "two lines, the last a proxy's": ["203.0.113.9, 198.51.100.7", "10.1.1.1"],
    "junk before it": ["<script>, unknown, 198.51.100.7"],
    "fifteen proxies": ["198.51.100.7" + ", 10.1.1.1" * 15],
}  # fmt: skip
FORWARDED = {  # X-Forwarded-For, and the address that the request gets
    **{name: (lines, CLIENT) for name, lines in FROM_CLIENT.items()},
    "IPv6": (["2001:DB8:0::7"], "2001:db8::7"), "a proxy itself": (["10.1.1.1"], "10.1.1.1"),
    "IPv6 in brackets": (["[2001:db8::7]"], "2001:db8::7"),
    "IPv6 and a port": (["[2001:db8::7]:443"], "2001:db8::7"),
    "proxies alone": (["10.1.1.1, 10.2.2.2"], "10.1.1.1"),
    "more proxies than there are": (["198.51.100.7" + ", 10.1.1.1" * 1000], "10.1.1.1"),
    # Where none can be read, the address is the proxy's.
    **{f"unreadable: {value[:20]}": ([value], PROXY) for value in (
        "", ",", "198.51.100.7,", "unknown", "web-1", "198.51.100.7, x",
        "198.51.100.7, x, 10.1.1.1", "198.51.100.7:", "198.51.100.7:123456", "[2001:db8::7",
        "[2001:db8::7]x", "fe80::1%eth0", "fe80::1%<b>", "198.51.100", "198.51.100.256",
        "3325256711", "198.51.100.\u00b2", "198.51.100.0/24", '"198.51.100.7"', "for=198.51.100.7",
        "1" * 5000)},
    "no such field": ([], PROXY),
}  # fmt: skip


def proxied(values, name="X-Forwarded-For", target=b"/"):
    lines = "".join(f"{name}: {value}\r\n" for value in values)
    return get(target, lines.encode("latin-1"))


@pytest.mark.parametrize("values, address", table(FORWARDED))
def test_a_request_through_a_trusted_proxy_has_the_address_of_the_client(values, address):
    for name in ("X-Forwarded-For", "x-forwarded-for"):
        request = RequestReader(PROXY, 1, PROXIES).next(proxied(values, name))
        assert request.origin == Origin(address, 1, 1)
    # No other field counts; and a peer that is no proxy could write anything there.
    for name in ("Forwarded", "X-Real-IP", "X-Forwarded-For-", "X_Forwarded_For"):
        request = RequestReader(PROXY, 1, PROXIES).next(proxied(values, name))
        assert request.origin.address == PROXY
    assert RequestReader(ADDRESS).next(proxied(values)).origin.address == ADDRESS


def test_each_request_on_a_proxys_connection_has_its_own_client():
    reader = RequestReader(PROXY, 1, PROXIES)
    first = proxied(["198.51.100.7"])
    body = post(b"X-Forwarded-For: 198.51.100.8\r\nContent-Length: 2", b"{}")
    assert reader.next(first + body[:-1]).origin == Origin("198.51.100.7", 1, 1)
    assert reader.next() is None
    assert reader.unfinished().origin == Origin("198.51.100.8", 1, 2)
    assert reader.next(body[-1:]).origin == Origin("198.51.100.8", 1, 2)
    assert reader.next(get()).origin == Origin(PROXY, 1, 3)
    assert reader.next(first + b"GET") is not None
    assert reader.unfinished().origin == Origin(PROXY, 1, 5)
    with pytest.raises(hostenroll.MalformedRequest):
        reader.next(b" / HTTP/1.1\n")
    assert reader.unfinished().origin == Origin(PROXY, 1, 5)


def test_cutting_out_what_proxies_add_changes_nothing():
    rng, outcomes = random.Random(11), set()
    names = [b"X-Forwarded-For", b"x-real-ip", b"Forwarded", b"X-Request-ID", b"Via"]
    values = [b" 198.51.100.7", b"", b" \xe9", b" a\0b", b" a\rb", b" a\nb", b"x" * 300, b" \x7f"]
    lines = [name + b":" + value for name in names for value in values]
    lines += [b"X-Forwarded-For : a", b" X-Forwarded-For: a", b"X-Forwarded-For", b"Host: h"]
    lines += [b"Authorization: Bearer abc", b"Authorization: Bearer a b", b"Content-Length: 2"]
    for _ in range(3000):
        fields = rng.choices(lines, k=rng.randint(0, 4)) + [b"X: y"] * rng.choice([0, 0, 97])
        rng.shuffle(fields)
        data = b"\r\n".join([b"GET / HTTP/1.1", b"Host: h", *fields])
        expected = outcome(hostenroll.parse_head, data)
        rest, _ = hostenroll.split_forwarded(data, PROXIES, PROXY)
        assert outcome(hostenroll.parse_head, rest) == expected, data
        outcomes.add(expected if isinstance(expected, str) else expected[1])
    assert outcomes == {None, "abc", "a b", "malformed-request", "head-too-large"}


def test_all_clients_of_a_proxy_share_one_cached_head():
    hostenroll._parse_head_cached.cache_clear()
    for n in range(50):
        names = ("X-Forwarded-For", "X-Real-IP", "Forwarded", "X-Request-ID")
        lines = [f"{name}: 198.51.100.{n}\r\n" for name in names]
        data = get(b"/", "".join([*lines, f"Authorization: Bearer {n}\r\n"]).encode())
        request = RequestReader(PROXY, 1, PROXIES).next(data)
        assert (request.origin.address, request.authorization) == (f"198.51.100.{n}", str(n))
    assert hostenroll._parse_head_cached.cache_info().misses == 1


def test_a_long_list_of_proxies_costs_little():
    data = proxied(["10.0.0.1," * 1700])
    began = time.process_time()
    for _ in range(100):
        assert RequestReader(PROXY, 1, PROXIES).next(data) is not None
    assert time.process_time() - began < 0.5


def test_an_ipv4_address_on_an_ipv6_socket_is_shown_as_ipv4():
    assert hostenroll.plain_address("::ffff:192.0.2.7") == "192.0.2.7"
    for other in ("192.0.2.7", "2001:db8::7", "::1", "::ffff:0", "fe80::1%eth0"):
        assert hostenroll.plain_address(other) == other


KEEPS_ALIVE = [  # header fields, the version, and whether the connection stays
    (b"", b"1.1", True), (b"", b"1.0", False), (b"Connection: keep-alive\r\n", b"1.0", False),
    (b"Connection: close\r\n", b"1.1", False), (b"Connection: CLOSE\r\n", b"1.1", False),
    (b"Connection: x,\tClose ,y\r\n", b"1.1", False), (b"Connection: closed\r\n", b"1.1", True),
    (b"Connection: keep-alive\r\nX: y\r\nConnection: close\r\n", b"1.1", False),
    (b"Connection:\r\n", b"1.1", True), (b"X-Connection: close\r\n", b"1.1", True),
]  # fmt: skip
EXPECTING = [  # what has arrived, and whether the peer waits for 100 Continue
    (post(b"Content-Length: 2\r\nExpect: 100-continue"), True),
    (post(b"Transfer-Encoding: chunked\r\nExpect: 100-Continue"), True),
    (post(b"Content-Length: 2\r\nExpect: 100-continue", b"{"), False),  # it did not wait
    (post(b"Content-Length: 2"), False), (post(b"Content-Length: 2\r\nExpect:"), False),
    (b"POST / HTTP/1.1\r\nExpect: 100-continue\r\n", False),
    (b"POST / HTTP/1.0\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n", False),
]  # fmt: skip


def test_a_connection_is_kept_alive_unless_one_side_sends_close():
    for fields, version, keeps in KEEPS_ALIVE:
        (head, _, _), _ = read_all([get(b"/", fields, version)])
        assert head.keep_alive is keeps, (fields, version)


def test_only_a_peer_that_waits_gets_100_continue():
    """RFC 9110 section 10.1.1. An expectation that cannot matter is ignored."""
    for data, waits in EXPECTING:
        reader = RequestReader()
        assert reader.next(data) is None and reader.awaits_continue is waits, data
    for data in (get(b"/", b"Expect: 100-continue\r\n"), get(b"/", b"Expect: x\r\n", b"1.0")):
        assert read_all([data])[0][0].expects is False


def test_a_reader_keeps_no_more_than_a_head_or_a_body():
    reader, most = RequestReader(), 0
    with pytest.raises(hostenroll.BodyTooLarge):
        reader.next(chunked(b""))
        while True:
            reader.next(b"1000\r\n%b\r\n" % (b"x" * 4096))
            most = max(most, reader.buffered)
    assert most == hostenroll.BODY_MAXIMUM
    reader = RequestReader()
    for data, kept in ((post(b"Content-Length: 5", b"1234"), 4), (b"5", 0)):
        assert (reader.next(data) is None) is reader.is_in_body is bool(kept)
        assert reader.buffered == kept


KEPT = {
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
}  # fmt: skip
ADVERSE = {
    "a credential and a bad end": get(
        b"/", b"Authorization: Bearer " + b"a" * 16_000 + b"=\xe9\r\n"),
    "slashes": get(b"/" * 16_000), "slashes and a bad end": get(b"/" * 16_000 + b"#"),
    "path and a bad end": get(b"/" + b"a" * 16_000 + b"\\"), "http://": get(b"http://" * 2300),
    "percents": get(b"/" + b"%41" * 5300 + b"%"), "spaces": b"GET " + b" " * 16_000 + b"\r\n\r\n",
    "query and a bad end": get(b"/?" + b"a=/?" * 4000 + b"#"),
    "authority and a bad end": get(b"http://" + b"a" * 16_000 + b"@"),
    "a method without end": b"G" * 16_000 + b"\r\n\r\n", "short lines": get(b"/", b"a:\r\n" * 4000),
    "targets": b"GET " + b"/ HTTP/1." * 1700 + b"\r\n\r\n", "empty chunks": chunked(b"0" * 16_000),
    "Host and a bad end": b"GET / HTTP/1.1\r\nHost: " + b"a" * 16_000 + b"/\r\n\r\n",
    "Host of percents": b"GET / HTTP/1.1\r\nHost: " + b"%41" * 5300 + b"%\r\n\r\n",
    "Host of colons": b"GET / HTTP/1.1\r\nHost: [" + b":" * 16_000 + b"\r\n\r\n",
    "white space in a value": get(b"/", b"X:" + b" \t" * 8000 + b"\0\r\n"),
    "white space around a length": post(b"Content-Length:" + b" " * 16_000 + b"x"),
    "a length": post(b"Content-Length: " + b"9" * 16_000 + b"x"),
    "zeros": post(b"Content-Length: " + b"0" * 16_000),
    "commas": get(b"/", b"Connection:" + b" ,\t" * 5300 + b"\r\n"),
    "equals signs": get(b"/", b"Authorization: Bearer " + b"=" * 16_000 + b"\r\n"),
    "a credential of dots": get(b"/", b"Authorization: Bearer " + b"a." * 8000 + b"\r\n"),
    "a chunk's extension": chunked(b"1" + b";" * 16_000),
}  # fmt: skip


@pytest.mark.parametrize("data", table(KEPT))
def test_the_reader_reports_all_the_memory_that_it_keeps(data):
    """Else many unfinished requests together could take far more than is allowed."""
    reader = RequestReader()
    tracemalloc.start()
    try:
        for at in range(0, len(data), hostenroll.RECEIVE_SIZE):
            assert reader.next(data[at : at + hostenroll.RECEIVE_SIZE]) is None
            while reader.has_more:
                assert reader.next() is None
        buffered, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert buffered <= reader.buffered * 9 / 8 + 4096


@pytest.mark.parametrize("data", table(ADVERSE))
def test_no_message_is_slow_to_read(data):
    began = time.process_time()
    *found, _ = read_all([data])
    for head, authorization, _ in found:
        with contextlib.suppress(Problem):
            hostenroll.find_operation(head.method, head.path)
        assert hostenroll.parse_secret("hak", authorization or "") is None
        assert hostenroll.new_keyring().verify((authorization or "").encode("latin-1")) is None
    assert time.process_time() - began < 0.25


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
DATED = (b"X-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n"
         b"Date: Fri, 15 Jan 2027 08:00:00 GMT\r\n")  # fmt: skip
JSON_ANSWER = hostenroll.Response(200, b'{"a":1}')
ANSWERS = {  # the response, whether it closes, whether the request was a HEAD; what is written
    "200": (JSON_ANSWER, False, False, OK + DATED + b'Content-Length: 7\r\n\r\n{"a":1}'),
    "HEAD, RFC 9110 section 9.3.2": (
        JSON_ANSWER, False, True, OK + DATED + b"Content-Length: 7\r\n\r\n"),
    "204, RFC 9112 section 6.2": (
        hostenroll.Response(204, headers=(("Allow", "GET, HEAD"),)), False, False,
        b"HTTP/1.1 204 No Content\r\nAllow: GET, HEAD\r\n" + DATED + b"\r\n"),
    "close": (
        hostenroll.Response(201, b"x", "text/plain"), True, False,
        b"HTTP/1.1 201 Created\r\nContent-Type: text/plain\r\nConnection: close\r\n" + DATED
        + b"Content-Length: 1\r\n\r\nx"),
    "an empty body": (
        hostenroll.Response(200), False, False, OK + DATED + b"Content-Length: 0\r\n\r\n"),
}  # fmt: skip
INJECTED = ["\r\nSet-Cookie: a=b", "\n\n<script>", "\r", "\0", "\u560d\u560a", "\u2028"]


@pytest.mark.parametrize("response, closes, head_only, expected", table(ANSWERS))
def test_an_answer_is_written_as_the_rfcs_say(response, closes, head_only, expected):
    for second in (0, 0, 1):
        written = hostenroll.write_response(response, int(NOON) + second, closes, head_only)
        assert written == expected.replace(b"08:00:00", b"08:00:%02d" % second)


@pytest.mark.parametrize("headers", [(pair,) for n in INJECTED for pair in (("X", n), (n, "y"))])
def test_a_header_value_cannot_begin_another_line(headers):
    with pytest.raises(ValueError):
        hostenroll.write_response(hostenroll.Response(200, headers=headers), 0, False, False)


@pytest.mark.parametrize("kind", hostenroll.problems(), ids=lambda kind: kind.code)
def test_a_refusal_is_a_well_formed_answer_with_nothing_raw_in_it(kind):
    errors = [hostenroll.FieldError("\r\n", "\u202e")]
    problem = kind("Mind \r\n\x1b é 😀 </script>.", errors=errors)
    data = hostenroll.write_response(hostenroll.refusal(problem), int(NOON), True, False)
    head, _, body = data.partition(b"\r\n\r\n")
    assert re.fullmatch(rb"HTTP/1.1 %d [ -~]+(\r\n[A-Za-z-]+: [ -~]+)+" % kind.status, head)
    assert re.fullmatch(rb"[ -~]+", body) and json.loads(body) == problem.document()
    assert b"\r\nContent-Length: %d" % len(body) in head and b"\r\nConnection: close\r\n" in head


def test_json_is_written_so_that_sed_can_read_it():
    written = hostenroll.json_response(200, {"a": [1, None, True], "b": "é\n\u2028"})
    assert written == hostenroll.Response(200, b'{"a":[1,null,true],"b":"\\u00e9\\n\\u2028"}')


# 8. Assets

JOINS = {
    "https, by a pin": ("https://enroll.lan:8443", "sha256//a+b/c=",
        "--proto =https -k --pinnedpubkey sha256//a+b/c=", " --pin sha256//a+b/c="),
    "https, by two pins": ("https://enroll.lan", "sha256//a=;sha256//b=",
        '--proto =https -k --pinnedpubkey "sha256//a=;sha256//b="',
        " --pin 'sha256//a=;sha256//b='"),
    "https, by authorities": ("https://enroll.lan", "", "--proto =https", ""),
    "http on this machine": ("http://127.0.0.1:8080", "", "--proto =http", ""),
    "the same by name": ("http://localhost:8080", "sha256//a=", "--proto =http", ""),
    "the same in IPv6": ("http://[::1]:8080", "", "--proto =http", ""),
    "http elsewhere": ("http://192.0.2.7", "sha256//a=", "--proto =http", " --insecure-http"),
    "http to a name that looks local": (
        "http://127.0.0.1.evil.test", "", "--proto =http", " --insecure-http"),
}  # fmt: skip


@pytest.mark.parametrize("token, given, last", [
    ("het_x", "printf %s het_x | ", "--token-file -"), ("", "", "--install"),
], ids=["with a token", "for agents that are enrolled"])  # fmt: skip
@pytest.mark.parametrize("url, pin, trust, more", table(JOINS))
def test_the_join_command_trusts_the_server_and_nothing_else(
    url, pin, trust, more, token, given, last
):
    script, server = shlex.quote(f"{url}/agent.sh").replace("'", '"'), shlex.quote(url)
    assert hostenroll.join_command(url, pin, token) == (
        f"{given}sh -c 'trap : HUP INT PIPE TERM; d=$(mktemp -d) &&\n"
        f'  curl -o "$d/hostenroll-agent" -fsS {trust} {script} &&\n'
        '  sh "$d/hostenroll-agent" "$@"; s=$?; rm -rf "$d"; exit $s\' '
        f"hostenroll-agent --server {server}{more} {last}"
    )


def test_the_agent_is_served_and_printed_byte_for_byte(world, tmp_path):
    served = world.call("GET", "/agent.sh")
    assert served.headers["content-type"] == "text/x-shellscript; charset=utf-8"
    assert served.document == cli(tmp_path, "agent-script").stdout
    assert f"VERSION={hostenroll.__version__}\n" in served.document
    assert served.document.startswith("#!/bin/sh\n") and served.document.endswith('\nmain "$@"\n')


# The agent, run for real against a real server with TLS.

SHELLS = {"dash": ["dash"], "bash": ["bash"], "busybox": ["busybox", "sh"], "ksh": ["ksh"]}
in_every_shell = pytest.mark.parametrize("shell", sample(SHELLS, "dash"), indirect=True)
in_every_shell_slowly = pytest.mark.parametrize("shell", sample(SHELLS), indirect=True)


@pytest.fixture
def shell(request):
    words = getattr(request, "param", ["sh"])
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    return words


def run_alone(command, folder, given="", environment=None, status=0, text=""):
    """Run a command in an environment that is nearly empty, until it ends as is expected (None: in
    any way), with a text in its output; the output."""
    done = subprocess.run(
        command, input=given, env=environment or {"PATH": os.environ["PATH"]}, cwd=str(folder),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert status in (None, done.returncode) and text in done.stdout, done
    return done.stdout


class Machine:
    """A machine with the agent's script, and nothing in its environment but PATH and HOME."""

    def __init__(self, folder, door, shell=("sh",)):
        self.folder, self.door, self.shell, self.port = folder, door, shell, door.port
        self.state, self.script = folder / "state", folder / "hostenroll-agent"
        self.log_file = folder / "log"
        self.programs = folder / "programs"  # before all others
        self.programs.mkdir()
        self.write_script()
        path = f"{self.programs}:{os.environ['PATH']}"
        self.environment = {"PATH": path, "HOME": str(folder)}
        self.trust = ("--pin", pin_of("one"))

    def write_script(self, **constants):
        """The agent's script with some constants changed: it does not try again by itself."""
        text = hostenroll.AGENT_SCRIPT
        for name, value in {"GIVE_UP": 0, "FACT_TIMEOUT": "05", **constants}.items():
            text, found = re.subn(f"(?m)^{name}=[^ \n]*", f"{name}={value}", text)
            assert found == 1, name
        self.script.write_text(text)

    def command(self, *options, token=""):
        options += ("--token-file", "-") if token else ()
        server = ("--server", f"https://127.0.0.1:{self.port}", *self.trust)
        return [*self.shell, str(self.script), *server, "--state", str(self.state), *options]

    def run(self, *options, token="", status=0, text=""):
        """The agent, until it ends as is expected, with a text in its output; the output."""
        command = self.command(*options, token=token)
        return run_alone(command, self.folder, token, self.environment, status, text)

    def once(self, *options, **expected):
        """One heartbeat; before it the enrollment, when there is a token."""
        return self.run("--once", *options, **expected)

    @contextlib.contextmanager
    def agent(self, *options, token=""):
        """The agent, which sends heartbeats until it is stopped; its messages are in `log()`."""
        with self.log_file.open("wb") as log:
            agent = subprocess.Popen(
                self.command(*options, token=token), env=self.environment, text=True,
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        agent.stdin.write(token)
        agent.stdin.close()
        try:
            yield agent
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
            agent.wait(10)

    def log(self):
        """Its messages, without that of a later start: that it is enrolled already."""
        lines = self.log_file.read_text().splitlines()
        return lines[1:] if lines and "already enrolled as host" in lines[0] else lines

    def program(self, name, text):
        """Put a program before the machine's own."""
        (self.programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.programs / name).chmod(0o755)

    def stored(self, name="credential"):
        """The text of a file in the agent's folder; None if there is none."""
        path = self.state / name
        return path.read_text() if path.exists() else None

    def credential(self):
        return self.stored().split("\n")[0]

    def hosts(self):
        """As the server sees them."""
        return self.door.hosts().document["hosts"]

    def host(self):
        (host,) = self.hosts()
        return host

    def is_online(self):
        return [host["status"] for host in self.hosts()] == ["online"]

    def renewals(self):
        return self.door.events("action=renew").document["events"]

    def refusals(self, code):
        """How many requests the server has refused with a code."""
        text = self.door.ask("GET", "/metrics").document
        return int(re.search(rf'^hostenroll_refusals_total{{code="{code}"}} (\d+)$', text, re.M)[1])


@pytest.fixture
def machine(tmp_path, clock, shell):
    """Its server asks the hosts for a heartbeat every second."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    options = {"interval": 1, "credential_ttl": 30 * 86400}
    with start_server(tmp_path, clock=clock, tls=True, **options) as door:
        yield Machine(tmp_path, door, shell)


@pytest.fixture
def member(machine):
    machine.once(token=machine.door.token())
    return machine


class Middle(threading.Thread):
    """A proxy in front of the server, with the server's own key. Each exchange has a fate: "pass",
    "lose" (the answer, after the server has given it), "hold" (the request), bytes to answer in
    the server's place, many of them, or a function to call between answer and client."""

    def __init__(self, door, folder, *fates):
        super().__init__(daemon=True)
        self.door, self.fates, self.requests, self.sent = door, list(fates), [], 0
        self.has_held, self.release = threading.Event(), threading.Event()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(*write_pair(folder))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    @staticmethod
    def message(stream):
        """A whole request or answer; nothing when the peer has gone."""
        head = b"".join(itertools.takewhile(lambda line: line != b"\r\n", stream))
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        return head and head + b"\r\n" + (stream.read(int(length[1])) if length else b"")

    def run(self):
        while True:
            try:
                plain, _ = self.listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), self.context.wrap_socket(plain, True) as peer:
                with peer.makefile("rb") as stream:
                    self.requests.append(self.message(stream))
                if self.requests[-1]:
                    for part in self._answer(self.fates.pop(0) if self.fates else "pass"):
                        peer.sendall(part)
                        self.sent += len(part)

    def _answer(self, fate):
        """In parts, which may be without end."""
        if not isinstance(fate, str) and not callable(fate):
            return [fate] if isinstance(fate, bytes) else fate
        if fate == "hold":
            self.has_held.set()
            assert self.release.wait(20)
        with self.door.connect() as peer, peer.makefile("rb") as stream:
            peer.sendall(self.requests[-1])
            answer = self.message(stream)
        if callable(fate):
            fate()
        return [b"" if fate == "lose" else answer]

    def has_facts(self):
        """Of each request, whether it has a body with members."""
        return [request.partition(b"\r\n\r\n")[2] != b"{}" for request in self.requests]

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.release.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.join(10)
        assert not self.is_alive()


@pytest.fixture
def behind(machine, tmp_path):
    """Put the machine behind a Middle with some fates."""
    with contextlib.ExitStack() as stack:

        def put(*fates):
            middle = stack.enter_context(Middle(machine.door, tmp_path, *fates))
            machine.port = middle.port
            return middle

        yield put


def answer_of(status, body=b"", *fields):
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@slow
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing_in_the_agent(tmp_path):
    (tmp_path / "agent.sh").write_text(hostenroll.AGENT_SCRIPT)
    command = ["shellcheck", "--shell=sh", "--enable=quote-safe-variables", "agent.sh"]
    assert run_alone(command, tmp_path) == ""


def test_the_agent_uses_no_option_that_curl_7_58_does_not_have():
    newer = r"--fail-with-body|--retry|--json|--variable|%\{(json|header|errormsg|exitcode|onerror)"
    assert not re.search(newer, hostenroll.AGENT_SCRIPT)
    known = "-q -sS -g -i -A -w -k -K --cacert --connect-timeout --max-time --noproxy"
    known += " --proto --pinnedpubkey"  # 7.20.2, 7.39: the newest of them
    asking = hostenroll.AGENT_SCRIPT.partition("\nask() {")[2].partition("\n}\n")[0]
    used = {word for word in re.findall(r"(?<=\s)--?[a-zA-Z][a-zA-Z-]*", asking) if word != "-z"}
    assert used - {"-n", "-ne", "-c"} == set(known.split())  # of test and head


@in_every_shell
def test_the_agent_enrolls_and_sends_heartbeats(machine):
    name = 'a "b" \\ K\u00fcche'
    shown = machine.once("--name", os.fsdecode(name.encode()), token=machine.door.token())
    host = machine.host()
    assert shown == f"hostenroll-agent: enrolled as host {host['id']}\n"
    assert (host["name"], host["status"]) == (name, "online")
    assert (host["hostname"], host["architecture"]) == (os.uname().nodename, os.uname().machine)
    assert os.uname().release in host["os"] and host["agentVersion"] == hostenroll.__version__
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in machine.state.iterdir()}
    assert files == {"credential": 0o600, "facts": 0o600}
    assert stat.S_IMODE(machine.state.stat().st_mode) == 0o700
    assert machine.once() == ""


@in_every_shell_slowly
def test_a_day_in_the_life_of_an_agent(machine, behind):
    """Enrolled in the third try, accepted, revoked, restored, enrolled again, stopped."""
    door = machine.door
    behind("lose", answer_of("503 Busy"))
    with machine.agent("--ask-again", "1", token=door.token()) as agent:
        until(machine.is_online, 20)
        assert machine.refusals("token-used") == 0
        number = machine.host()["id"]
        door.revoke(number)
        until(lambda: machine.refusals("host-revoked") >= 2)
        door.restore(number)
        until(lambda: "hostenroll-agent: the server accepts heartbeats again" in machine.log())
        assert len([line for line in machine.log() if "host-revoked" in line]) == 1
        old = machine.credential()
        machine.run(token=door.reenroll(number).document["token"])
        assert machine.credential() != old and machine.host()["id"] == number
        until(lambda: door.beat(old).code == "credential-superseded")
        agent.terminate()
        assert agent.wait(5) == -signal.SIGTERM
    assert len(machine.log()) == 6, "\n".join(machine.log())


def test_an_enrollment_whose_answer_was_lost_makes_one_host(machine, behind):
    token = machine.door.token()
    middle = behind("lose")
    machine.once(token=token, status=1, text="no answer")
    assert machine.stored() is None
    number = machine.host()["id"]
    machine.once(token=token)
    keys = [re.search(rb"(?i)idempotency-key: (\S+)", sent)[1] for sent in middle.requests[:2]]
    assert keys[0] == keys[1]
    assert machine.host()["id"] == number and machine.is_online()
    assert machine.stored("enrolling") is None


@slow
def test_a_token_enrolls_once_and_with_a_key_of_its_own(machine, behind):
    behind("lose", "lose")
    machine.once(token=machine.door.token(), status=1)
    first, token = machine.stored("enrolling"), machine.door.token(maxUses=5)
    machine.once(token=token, status=1)
    assert set(first.split()[:2]).isdisjoint(machine.stored("enrolling").split())
    for _ in range(2):
        machine.once(token=token)
    assert len(machine.hosts()) == 2
    before, used = machine.stored(), machine.door.token()
    machine.door.enroll(used, "another")
    machine.once(token=used, status=3, text="refused (token-used)")
    assert machine.stored() == before
    machine.once()
    machine.once(token=machine.door.token())
    assert machine.stored() != before and len(machine.hosts()) == 4


@slow
def test_a_token_can_come_from_a_file_and_a_text_that_is_no_token_is_not_sent(machine):
    file = machine.folder / "token"
    for text in ("", "\n", "nonsense", "het_", 'het_1_a","x":"', "het_1_a b"):
        file.write_text(text)
        machine.once("--token-file", str(file), status=2, text="there is no token in")
        assert machine.stored("enrolling") is None
    file.write_text(f"{machine.door.token()}\r\n")
    machine.once("--token-file", str(file))
    assert machine.is_online()


REFUSED_BEATS = {
    "host-revoked": Door.revoke,
    "host-unknown": Door.delete,
    "credential-superseded": lambda door, number: door.beat(  # on another machine
        door.enroll(door.reenroll(number).document["token"]).document["credential"]),
    "credential-invalid": lambda door, number: None,
}  # fmt: skip


@slow
@pytest.mark.parametrize("code", REFUSED_BEATS)
def test_a_refused_agent_reports_it_once_and_tries_hourly(code, member):
    REFUSED_BEATS[code](member.door, member.host()["id"])
    before = member.stored().replace(".", ".A" if code == "credential-invalid" else ".", 1)
    (member.state / "credential").write_text(before)
    shown = member.once(status=3)
    assert re.fullmatch(rf"hostenroll-agent: refused \({code}\): .*\n", shown)
    assert recorded_sleeps(member, 3) == [3600] * 3
    assert len(member.log()) == 1 and f"refused ({code})" in member.log()[0]
    assert member.stored() == before


def test_a_deleted_host_comes_back_by_a_token_that_is_still_good(machine, behind):
    file, middle = machine.folder / "token", behind()
    file.write_text(machine.door.token(maxUses=2))
    machine.once("--token-file", str(file), "--name", "web")
    old = machine.host()["id"]
    machine.door.delete(old)
    shown = machine.once("--token-file", str(file), "--name", "web")
    new = machine.host()
    assert (new["name"], new["status"]) == ("web", "online") and new["id"] != old
    assert re.search(f"refused .host-unknown(.*\n.*)anew with {file}\n.* host {new['id']}\n", shown)
    keys = re.findall(rb"(?i)idempotency-key: (\S+)", b"".join(middle.requests))
    assert len(keys) == 2 and keys[0] != keys[1]


@slow
def test_a_deleted_host_whose_token_is_refused_goes_on_asking_hourly(machine):
    file = machine.folder / "token"
    file.write_text(machine.door.token())
    machine.once("--token-file", str(file))
    machine.door.delete(machine.host()["id"])
    assert recorded_sleeps(machine, 4, "--token-file", str(file)) == [3600] * 4
    assert machine.refusals("token-used") == 1
    assert [line.split(":")[1].strip() for line in machine.log()] == [
        "refused (host-unknown)", "the host is deleted on the server",
        "refused (token-used)", "refused (host-unknown)",
    ]  # fmt: skip


def recorded_sleeps(machine, count, *options):
    """The waits of the agent, without waiting."""
    log = machine.folder / "sleeps"
    machine.program(
        "sleep",
        f"""[ "$1" != 05 ] || exec {shutil.which("sleep")} 5 # for docker
        echo "$1" >>{log}\n[ "$(wc -l <{log})" -lt {count} ] || exec tail -f /dev/null""",
    )
    machine.shell = ("dash",) if shutil.which("dash") else ("bash",)  # its sleep is a program
    with machine.agent(*options):
        until(lambda: log.exists() and log.read_text().count("\n") >= count, 20)
    return [int(line) for line in log.read_text().split()]


@slow
@in_every_shell_slowly
def test_an_agent_outlives_the_program_that_reads_its_log(member, behind):
    middle = behind("pass", *[answer_of("403 Forbidden")] * 2)
    ours, its = os.pipe()
    agent = subprocess.Popen(
        member.command(), env=member.environment, stderr=its, start_new_session=True
    )
    os.close(its)
    os.close(ours)
    try:
        until(lambda: len(middle.requests) > 4)
        assert agent.poll() is None and member.is_online()
    finally:
        os.killpg(agent.pid, signal.SIGKILL)
        agent.wait(10)


@slow
def test_once_an_hour_the_agent_looks_for_new_facts(machine):
    looked = machine.folder / "looked"
    machine.program("docker", f"echo >>{looked}; echo Docker version 1, build 1")
    machine.once(token=machine.door.token())
    machine.door.revoke(machine.host()["id"])
    looked.unlink()
    assert recorded_sleeps(machine, 5, "--ask-again", "1800") == [1800] * 5
    assert looked.read_text().count("\n") == 1 + 2


@slow
def test_after_failures_an_agent_waits_longer_and_at_random(member):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        member.port = closed.getsockname()[1]
        waits = recorded_sleeps(member, 30)
    bounds = [min(2**n, 60) for n in range(30)]
    assert all(1 <= wait <= bound for wait, bound in zip(waits, bounds))
    assert len(set(waits[7:])) > 10 and max(waits) > 30  # fails with a chance of 2 ** -23
    (line,) = member.log()
    assert "no answer from" in line and " ms" not in line  # a duration would make each one new


LONGEST_WAITS = {  # the interval that the server told last, and the agent's longest wait
    "": 60, "1": 10, "5": 10, "6": 12, "34": 68, "150": 300, "151": 300, "86400": 300,
}  # fmt: skip


@in_every_shell
def test_an_agent_waits_no_longer_than_a_server_expects_of_it(shell, tmp_path):
    """The 5 s in a Retry-After of our server are part of it. Who asks for more gets up to 5 min."""
    shown = in_agent(shell, tmp_path, f"""draw() {{ drawn=$1; }}
        pause() {{ echo "$1"; }}
        once='' act='' age=0
        for told in {" ".join(map(repr, LONGEST_WAITS))}; do
            for asked in '' 5 301; do answer="Retry-After: $asked" bound=999 && back_off; done
        done
        answer='' told=100 bound=1
        for _ in 1 2 3 4 5 6 7 8 9 10; do back_off; done""")  # fmt: skip
    waits = list(map(int, shown))
    expected = [[longest, longest, 301] for longest in LONGEST_WAITS.values()]
    assert waits[:-10] == list(itertools.chain(*expected))
    assert waits[-10:] == [1, 2, 4, 8, 16, 32, 64, 128, 200, 200]


@slow
@pytest.mark.parametrize("way", ["the enrollment", "a heartbeat"])
def test_an_agent_goes_by_the_interval_that_it_was_told_last(way, machine, behind):
    file = machine.folder / "token"
    file.write_text(machine.door.token())
    if way == "a heartbeat":
        machine.once("--token-file", str(file))
    behind("pass", *[answer_of("503 Busy")] * 25)
    waits = recorded_sleeps(machine, 25, "--token-file", str(file))
    assert 5 < max(waits) <= 10  # of a server that wants a heartbeat every second


@in_every_shell
def test_the_time_of_an_unanswered_try_counts_when_an_agent_gives_up(shell, tmp_path):
    shown = in_agent(shell, tmp_path, """draw() { drawn=$1; }
        pause() { echo "$1" && age=$((age + $1)); }
        once=yes act='' told='' age=0 bound=1 reported='' locked='' stopped=''
        exit_status=28 failure=''
        for line in "08.0 " "000" "30.0021 000 " "40.5 000${LINE}curl: (28) timed out"; do
            answer="404 x${LINE}$line" && back_off
        done
        (while :; do back_off; done) || :""")  # fmt: skip
    assert shown == ["1", "2", "4", "8", "16", "hostenroll-agent: gave up after 151 s"]


BUSY = {  # the answer, and how it is reported
    "503": ("503 Service Unavailable", b"", "503"),
    "503, named": ("503 Busy", b'{"code":"storage-unavailable"}', "503 storage-unavailable"),
    "429": ("429 Too Many Requests", b"", "429"),
}


@slow
@pytest.mark.parametrize("line, body, why", table(BUSY))
def test_a_busy_server_is_waited_for_as_long_as_it_asks(line, body, why, machine, behind):
    token, busy = machine.door.token(), answer_of(line, body, "Retry-After: 77")
    behind(busy, "pass", "pass", busy, busy, "pass", busy)
    for status in (1, 0, 1):  # enrolling, both, beating
        shown = machine.once(token=token, status=status)
        assert shown.endswith(f" cannot answer now ({why})\n") == bool(status)
    waits = recorded_sleeps(machine, 3)
    assert waits[0] == waits[2] == 78
    assert waits[1] in (1, 2)  # 1 s, 15 % more or less, in whole seconds


RETRY_AFTERS = {  # the fields of an answer, and the seconds that they mean
    "": 0, "Retry-After: 77": 77, "retry-after: 77": 77, "Retry-After: 08": 8,
    "Retry-After: 0000000012": 12, "Retry-After: 0": 0, "Retry-After: 000": 0,
    "Retry-After:  9  ": 9, "Retry-After:9": 9, "Retry-After: 99999": 0, "Retry-After: -5": 0,
    "Retry-After: 1.5": 0, "Retry-After: 1+1": 0, "Retry-After: 0x10": 0, "Retry-After: bound": 0,
    "Retry-After:": 0, "Retry-After: 5, 77": 0, "Retry-After: 5\nRetry-After:": 0,
    "Retry-After: 5\nretry-after: 77": 77,  # a proxy has added the second
    "Retry-After: Fri, 31 Dec 1999 23:59:59 GMT": 0,
    "Retry-After: 5\nRetry-After: Fri, 31 Dec 1999 23:59:59 GMT": 0,
}  # fmt: skip
INTERVALS = {
    "30": "30 30", "08": "8 8", "0": "1 1", "000": "1 1", "00000030": "30 30",
    "": "none", "-5": "none", "3.5": "none", "1e9": "none", "123456": "none",
    "30+1": "none", '"30"': "none", "null": "none", "bound": "none",
}  # fmt: skip


def in_agent(shell, folder, lines, text=""):
    """The output of some lines that can call the functions of the agent; text is their stdin."""
    functions = hostenroll.AGENT_SCRIPT.rpartition("main ")[0]
    (folder / "lines").write_text(f"{functions}\nset -fuC\nLC_ALL=C\n{lines}\n")
    return run_alone([*shell, str(folder / "lines")], folder, text).splitlines()


@in_every_shell
def test_no_number_from_outside_ends_the_agent(shell, tmp_path):
    """As 08 in shell arithmetic would: in a Retry-After, an interval, a random number."""
    for n, fields in enumerate(RETRY_AFTERS):
        answer = answer_of("503 Busy", b"", *fields.splitlines()) + b"\n503"
        (tmp_path / f"answer-{n:02}").write_bytes(answer)
    waits = in_agent(shell, tmp_path, """pause() { echo "$1"; }
        told=99 once='' act='' age=0
        for n in $(seq -w 0 99); do
            [ ! -e "answer-$n" ] || (answer=$(cat "answer-$n") bound=1 && back_off)
        done; :""")  # fmt: skip
    assert {fields: int(wait) - 1 for fields, wait in zip(RETRY_AFTERS, waits)} == RETRY_AFTERS
    replies = "".join(f'{{"hostId":"a","nextHeartbeatSeconds":{text}}}\n' for text in INTERVALS)
    waits = in_agent(shell, tmp_path, """sleep() { :; }
        reported='' body='' facts='' sent_facts='' woken='' slept='' age=0 server=https://a
        while IFS= read -r reply; do
            (accepted && pause "$next" && echo "$next $age") 2>/dev/null || echo none
        done""", replies)  # fmt: skip
    assert dict(zip(INTERVALS, waits)) == INTERVALS
    lines = 'head() { echo " 00089"; }\ndraw 1; echo "$drawn"\ndraw 300; echo "$drawn"'
    one, some = map(int, in_agent(shell, tmp_path, lines))
    assert one == 1 and 1 <= some <= 300


PASTED = {**SHELLS, "zsh": ["zsh"]}


@pytest.fixture
def paste(machine, shell):
    """Paste the join command for a token into a shell, with a trust and more options, in a folder
    where another user puts a script of his own in the place of what curl has fetched: a process
    that has begun."""
    typed, temporary = machine.folder / "typed", machine.folder / "temporary"
    typed.mkdir()
    temporary.mkdir()
    plant = f"echo 'echo >{typed}/planted' >{typed}/hostenroll-agent"
    machine.program("curl", f'{shutil.which("curl")} "$@"; status=$?; {plant}; exit $status')

    def start(token, *options, pin="one"):
        url = f"https://127.0.0.1:{machine.port}"
        command = hostenroll.join_command(url, pin_of(pin), token)
        words = ("--state", str(machine.state), *options)
        return subprocess.Popen(
            [*shell, "-c", f"{command} {shlex.join(words)}"], cwd=str(typed),
            env={**machine.environment, "TMPDIR": str(temporary)}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    yield start
    until(lambda: os.listdir(temporary) == [])
    assert os.listdir(typed) == ["hostenroll-agent"]


@pytest.mark.parametrize("shell", sample(PASTED, "dash"), indirect=True)
def test_the_join_command_uses_a_private_folder_and_ends_like_the_agent(paste, machine):
    token = machine.door.token()
    for options, pin, status in (
        ((), "other", 90), (("--once",), "one", 0), (("--token-file", "/nowhere"), "one", 2)
    ):  # fmt: skip
        with paste(token, *options, pin=pin) as joining:
            shown = joining.stdout.read().decode()
            assert joining.wait(20) == status, shown
    assert machine.is_online()


@pytest.mark.parametrize("shell", sample(PASTED, "dash"), indirect=True)
def test_the_join_command_removes_its_folder_when_it_is_interrupted(paste, machine):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with paste(machine.door.token()) as joining:
            until(lambda: machine.stored() and b"enrolled" in joining.stdout.readline())
            os.killpg(joining.pid, number)
            assert joining.wait(20) != 0
        (machine.state / "credential").unlink()


STRANGE_ANSWERS = {
    "the page of a Wi-Fi login": answer_of("200 OK", b"<html>Log in to the Wi-Fi!</html>"),
    "an empty one": answer_of("200 OK"),
    "a redirect": answer_of("302 Found", b"", "Location: https://evil.test/"),
    "nonsense": b"SSH-2.0-OpenSSH_9.2\r\n",
    "nothing": b"",
    "no such path": answer_of("404 Not Found", b'{"code":"not-found"}'),
    "no interval": answer_of("200 OK", b'{"nextHeartbeatSeconds":}'),
    "too long": answer_of("200 OK", b"x" * 70_000),
}


@slow
@pytest.mark.parametrize("answer", table(STRANGE_ANSWERS))
def test_a_strange_answer_is_a_failure_and_changes_nothing(answer, machine, behind):
    token = machine.door.token()
    behind(answer, "pass", "pass", answer)
    first = machine.once(token=token, status=3 if b" 404 " in answer else 1)
    assert first.count("\n") == 1 and ("sends more" in first) == (len(answer) > 70_000)
    assert machine.stored() is None
    machine.once(token=token)
    before = machine.stored()
    assert machine.once(status=1).count("\n") == 1
    assert machine.stored() == before


IN_CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
PASSING = {  # what a proxy answers in the server's place
    "403": (403, answer_of("403 Forbidden", b"<html>This device is not known yet</html>")),
    "404": (404, answer_of("404 Not Found", b"404 page not found\n")),
    "407": (407, answer_of("407 Proxy Authentication Required", b'{"code":"forbidden"}')),
    "421": (421, answer_of("421 Misdirected Request")),
    "401": (401, answer_of("401 Unauthorized", b'{"error":{"code":"token_missing"}}')),
}  # fmt: skip


def without_waiting(machine):
    """Its sleeps end at once, and are recorded; it tries for 2 minutes, as it is shipped."""
    machine.write_script(GIVE_UP=120)
    machine.shell = ("dash",) if shutil.which("dash") else ("bash",)  # its sleep is a program
    slept = machine.folder / "slept"
    machine.program("sleep", f'[ "$1" != 05 ] || exec tail -f /dev/null\necho "$1" >>{slept}')
    return lambda: [int(line) for line in slept.read_text().split()] if slept.exists() else []


@pytest.mark.parametrize("status, answer", sample(PASSING, "403"))
def test_a_refusal_that_is_not_the_servers_is_waited_out(status, answer, machine, behind):
    without_waiting(machine)
    behind(*[answer] * 3, "pass", *[answer] * 3)
    shown = machine.once(token=machine.door.token()).splitlines()
    for line, path in ((shown[0], "enroll"), (shown[2], "heartbeat")):
        url = f"https://127.0.0.1:{machine.port}/api/agent/{path}"
        assert line.startswith(f"hostenroll-agent: unexpected answer from {url} ({status}")
    assert "enrolled as host" in shown[1] and machine.is_online()
    assert shown[3:] == ["hostenroll-agent: the server accepts heartbeats again"]


@pytest.mark.parametrize("option, enrolled", sample({
    "an enrollment": ("--once", False), "an installation": ("--install", False),
    "a heartbeat": ("--once", True)}))  # fmt: skip
def test_a_run_that_is_to_end_gives_up_after_two_minutes(option, enrolled, machine, behind):
    token = machine.door.token()
    if enrolled:
        machine.once(token=token)
    slept, middle = without_waiting(machine), behind(*[PASSING["403"][1]] * 200)
    shown = machine.run(option, token="" if enrolled else token, status=1)
    assert shown.count("\n") == 2 and shown.endswith(": gave up after 120 s\n")
    assert sum(slept()) == 120 and len(middle.requests) == len(slept()) + 1 > 4


@slow
def test_what_is_final_is_not_tried_again(machine, behind):
    slept, used = without_waiting(machine), machine.door.token()
    machine.door.enroll(used)
    machine.once(token=used, status=3, text="refused (token-used)")
    machine.once("--name", "x" * 9000, token=machine.door.token(), status=3, text="body-too-large")
    machine.once(token=machine.door.token())
    machine.door.revoke(machine.stored().split()[1])
    machine.once(status=3, text="refused (host-revoked)")
    machine.trust = ("--pin", pin_of("other"))
    for token in (machine.door.token(), ""):
        shown = machine.once(token=token, status=1, text="not trusted, nothing was sent")
        assert shown.count("\n") == 1
    assert slept() == []


TRUST_FAILURES = {  # what curl says with each TLS library, and whether it passes by itself
    "60 (60) SSL certificate problem: certificate is not yet valid": True,  # OpenSSL
    "60 (60) server certificate verification failed. certificate not activated": True,  # GnuTLS
    "60 (60) Cert verify failed: BADCERT_FUTURE": True,  # mbed TLS
    "60 (60) The certificate validity starts in the future": True,
    "60 (60) SSL certificate problem: certificate has expired": False,
    "60 (60) SSL certificate problem: unable to get local issuer certificate": False,
    "90 (90) SSL: public key does not match pinned public key": False,
    "77 (77) error setting certificate file": False,
    "7 (7) Failed to connect": True, "35 (35) TLS connect error": True,
}  # fmt: skip


@in_every_shell
def test_a_certificate_is_refused_for_good_only_by_a_clock_that_is_set(shell, tmp_path):
    assert time.strptime(hostenroll.RELEASED, "%Y%m%d")
    texts = "".join(f"{text}\n" for text in TRUST_FAILURES)
    for day, passes in ((hostenroll.RELEASED, False), ("20251231", True), ("19700101", True)):
        lines = f"""date() {{ echo {day}; }}; RELEASED={hostenroll.RELEASED}
            while read -r exit_status failure; do
                if is_untrusted; then echo False; else echo True; fi
            done"""
        shown = in_agent(shell, tmp_path, lines, texts)
        assert shown == [str(passes or text) for text in TRUST_FAILURES.values()], day


@slow
def test_an_agent_whose_clock_is_not_set_waits_until_its_server_is_trusted(machine):
    without_waiting(machine)
    is_set = machine.folder / "is_set"
    (bundle,) = trust(machine.folder, "--cacert", "one")[1:]
    machine.program("date", "echo 20200101")
    machine.program("sleep", f'[ "$1" != 05 ] || exec tail -f /dev/null\n>{is_set}')
    machine.program("curl", f"""[ ! -e {is_set} ] || set -- "$@" --cacert {bundle}
        exec {shutil.which("curl")} "$@" """)  # fmt: skip
    machine.trust = ()
    shown = machine.once(token=machine.door.token())
    assert shown.count("\n") == 2 and "no answer" in shown and "enrolled as host" in shown


ENDLESS = {  # how an answer begins, and what then comes for ever
    "chunks": (IN_CHUNKS, b"8000\r\n" + b"x" * 0x8000 + b"\r\n"),
    "binary chunks": (IN_CHUNKS, b"8000\r\n" + bytes(range(256)) * 0x80 + b"\r\n"),
    "lines": (b"HTTP/1.1 200 OK\r\n\r\n", b"\n200\n" * 5000),
    "fields": (b"HTTP/1.1 200 OK\r\n", b"Retry-After: 9\r\n" * 2000),
    "heads": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "what looks like its end where it is cut": (
        b"HTTP/1.1 200 OK\r\n\r\n".ljust(65524, b"x") + b" \x1b[2J 200\n\n0",
        b"x" * 0x8000,
    ),
}


@pytest.mark.parametrize("begin, rest", sample(ENDLESS, "chunks"))
def test_an_answer_without_end_is_cut_off_and_changes_nothing(begin, rest, member, behind):
    before = member.stored()
    middle = behind(itertools.chain([begin], itertools.repeat(rest)))
    began = time.monotonic()
    shown = member.once(status=1)
    assert time.monotonic() - began < 10 and middle.sent < 16 << 20
    assert shown.count("\n") == 1 and not hostenroll.UNPRINTABLE.search(shown[:-1])
    assert member.stored() == before


CREDENTIALS = {  # in a JSON reply, and whether it replaces the old one
    '"a.b.c"': True, f'"{"a" * 1020}.b.c"': True, f'"{"a" * 1021}.b.c"': False, '"a.b"': False,
    '""': False, '"a.b.c\\n"': False, '"a.b.c\\""': False, '"a b.c.d"': False, "7": False,
    '"$(id).b.c"': False, '"\u00e4.b.c"': False, f'"{"a.b.c" * 9000}"': False, '["a.b.c"]': False,
    '"a.b.c': False, '"a\0.b.c"': False,
}  # fmt: skip


@in_every_shell
def test_only_a_credential_replaces_the_old_one(member, behind):
    old = member.stored()
    beat = b'{"hostId":"0","nextHeartbeatSeconds":1,"credential":%b,"credentialExpiresAt":"?"}'
    behind(*(answer_of("200 OK", beat % text.encode()) for text in CREDENTIALS))
    for text, is_good in CREDENTIALS.items():
        (member.state / "credential").write_text(old)
        shown = member.once()
        assert shown == "" if is_good else shown.count("\n") == 1 and "the old one stays" in shown
        assert (member.stored() == old) == (not is_good), text


# What the agent trusts, and why it does not trust the server "one"; "" where it does.
TRUSTS = {
    "a wrong pin": (("--pin", "other"), "pinned public key"),
    "no pin and no authority": ((), "certificate"),
    "another authority": (("--cacert", "other"), "certificate"),
    "its authority": (("--cacert", "one"), ""),
    "its pin and its authority": (("--pin", "one", "--cacert", "one"), ""),
    "a wrong pin with the right authority": (
        ("--pin", "other", "--cacert", "one"), "pinned public key"),
    "another authority with the right pin": (("--pin", "one", "--cacert", "other"), "certificate"),
}  # fmt: skip


def trust(folder, *words):
    """Options of the agent that trust some of PAIRS."""
    options = []
    for option, pair in zip(words[::2], words[1::2]):
        (folder / f"{pair}.pem").write_text(certificate_of(pair))
        options += [option, pin_of(pair) if option == "--pin" else str(folder / f"{pair}.pem")]
    return tuple(options)


@pytest.mark.parametrize("words, why", sample(TRUSTS, *[*TRUSTS][:1]))
def test_a_server_that_is_not_trusted_gets_nothing(words, why, machine, behind, tmp_path):
    machine.trust = trust(tmp_path, *words)
    (tmp_path / ".curlrc").write_text("insecure\n")
    middle, token = behind(), machine.door.token()
    if not why:
        machine.once(token=token)
        assert machine.is_online()
        return
    shown = machine.run(token=token, status=1, text="not trusted, nothing was sent")
    assert why in shown and shown.count("\n") == 1
    # When it is enrolled, it waits for the right server.
    (machine.state / "credential").write_text("a.b.c\n0\n0\n")
    assert recorded_sleeps(machine, 3)[0] == 1
    (waits,) = machine.log()
    assert "no answer" in waits and why in waits
    assert machine.hosts() == [] and all(request == b"" for request in middle.requests)


MISUSES = {  # arguments of the agent, and a part of its message
    "": "--server URL is missing", "--nope": "unknown option --nope",
    "--server": "--server needs a value", "--server https://a --pin ''": "--pin needs a value",
    "--server https://a --pin /etc/passwd": "sha256//",  # curl would read it as a file
    "--server https://a --pin sha256//": "sha256//",
    **{f"--server https://a --pin '{pins}'": "--pin must look like" for pins in (
        "sha256//a", f"{PIN};/etc/passwd", f"/etc/passwd;{PIN}", f"{PIN};", f";{PIN}", f"{PIN}\n",
        f"{PIN}\n{PIN}", f"{PIN} {PIN}", f"{PIN};;{PIN}", ";".join([PIN] * 5), f"{PIN}=")},
    f"--server https://a --ask-again 0 --pin '{PIN}'": "takes seconds",  # the pin is accepted
    f"--server https://a --ask-again 0 --pin '{';'.join([PIN] * 4)}'": "takes seconds",
    "--server http://192.0.2.1": "can read the secrets",
    "--server http://127.0.0.1.evil.test": "can read the secrets",
    "--server http://localhost.evil.test:80": "can read the secrets",
    "--server http://127.a:80": "can read the secrets",
    "--server http://127.0.0.1:80/a --ask-again 0": "takes seconds",  # the server is accepted
    "--server http://[::1]:80 --ask-again 0": "takes seconds",
    "--server http://127.0.0.1 --pin sha256//a": "over http",
    "--server file:///etc/passwd": "must look like", "--server https://a@b": "must look like",
    "--server 'https://a b'": "must look like", "--server https://a?b": "must look like",
    "--server enroll.lan": "must look like", "--server https://a --ask-again 0": "takes seconds",
    "--server https://a --hostname 'a b'": "--hostname takes",
    "--server https://a --name 'a\nb'": "one line",
    "--server https://a --cacert /nowhere": "cannot read",
    "--server https://a --every 60": "--every goes with --once",
    "--server https://a --once --every": "--every needs a value",
    "--server https://a --once --every 0": "takes seconds",
    "--server https://a --once --every 1.5": "takes seconds",
    "--server https://a --once --every 60:60": "takes seconds",
    "--server https://a --once --every 86401": "at most 86400",
}  # fmt: skip


def run_script(folder, *arguments, script=hostenroll.AGENT_SCRIPT, **expected):
    (folder / "agent.sh").write_text(script)
    return run_alone(["sh", str(folder / "agent.sh"), *arguments], folder, **expected)


@pytest.mark.parametrize("arguments, message", MISUSES.items(), ids=MISUSES)
def test_a_mistake_in_the_agents_arguments_is_reported_in_one_line(arguments, message, tmp_path):
    words = ("--state", str(tmp_path / "state"), *shlex.split(arguments))
    shown = run_script(tmp_path, *words, status=2, text=message)
    assert shown.startswith("hostenroll-agent: ") and shown.count("\n") == 1
    assert not (tmp_path / "state").exists()


def test_an_agent_needs_a_token_and_to_be_installed_a_file(tmp_path):
    state = tmp_path / "state"
    words = ("--server", "https://a", "--state", str(state))
    for more, status in (((), 1), (("--install",), 2)):
        run_script(tmp_path, *words, *more, status=status, text="--token-file")
        assert list(state.iterdir()) == []
    (state / "credential").write_text("a.b.c\n0\n0\n")
    piped, why = ["sh", "-s", "--", *words, "--install"], "save this script in a file"
    run_alone(piped, tmp_path, hostenroll.AGENT_SCRIPT, status=1, text=why)


def test_the_agent_shows_its_version_and_its_options(tmp_path):
    shown = run_script(tmp_path, "--version")
    assert shown == f"hostenroll-agent {hostenroll.__version__}\n"
    options = set(re.findall(r"--[a-z-]+", run_script(tmp_path, "--help")))
    taken = hostenroll.AGENT_SCRIPT.partition("\nread_arguments() {")[2].partition("; see")[0]
    assert options == set(re.findall(r"--[a-z-]+", taken))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [option for option in options if f"`{option}" not in readme] == []


@slow
def test_a_script_that_was_cut_short_runs_nothing(tmp_path):
    whole = hostenroll.AGENT_SCRIPT
    cuts = [*range(40, len(whole), len(whole) // 150), *range(len(whole) - 11, len(whole) - 4)]
    for cut in cuts:
        (tmp_path / "cut.sh").write_text(whole[:cut])
        assert "usage: host" not in run_alone(["sh", "cut.sh", "--help"], tmp_path, status=None)
    run_script(tmp_path, "--help", text="usage: host")


@slow
def test_a_key_that_was_used_elsewhere_is_tried_once_more_where_nothing_can_be_written(member):
    token = member.door.token()
    token_id = token.split("_")[1]
    member.door.enroll(token)
    (member.state / "enrolling").write_text(f"{token_id} {'0' * 32}\n")
    member.program("rm", f'[ "${{2##*/}}" != enrolling ] || exit 1; exec {shutil.which("rm")} "$@"')
    member.once(token=token, status=1, text="cannot write in ")
    assert member.refusals("token-used") == 1


# Facts.


def test_facts_are_sent_when_they_change_and_not_with_every_heartbeat(machine, behind):
    machine.program("docker", "echo 'Docker version 20.10.5+dfsg1, build 55c4c88'")
    refused = answer_of(
        "400 Bad Request", b'{"detail":"Correct the \\"fields\\".","code":"invalid-body","errors":'
        b'[{"field":"os","detail":"is \\"odd\\" \\\\"}]}',
    )  # fmt: skip
    middle = behind(*["pass"] * 6, refused)
    machine.once("--hostname", "web-1", token=machine.door.token())
    facts = {"dockerVersion": "20.10.5+dfsg1", "agentVersion": hostenroll.__version__}
    assert machine.host() == {**machine.host(), **facts}
    machine.program("docker", "echo 'Docker version 27.1.0, build 1'")
    for _ in range(2):
        machine.once("--hostname", "web-2")
    version = f"VERSION={hostenroll.__version__}\n"
    machine.script.write_text(hostenroll.AGENT_SCRIPT.replace(version, "VERSION=9.9.9\n"))
    for _ in range(2):
        machine.once("--hostname", "web-2")
    assert middle.has_facts() == [True, True, True, False, True, False]
    facts = {"dockerVersion": "27.1.0", "hostname": "web-2", "agentVersion": "9.9.9"}
    assert machine.host() == {**machine.host(), **facts}
    # Facts that the server refuses do not silence the host.
    machine.once("--hostname", "web-9", text="is 'odd' '")
    assert middle.has_facts()[6:] == [True, False]


def bodies(middle):
    """The members of the requests that the agent has sent."""
    return [json.loads(request.partition(b"\r\n\r\n")[2]) for request in middle.requests]


@in_every_shell_slowly
def test_an_agent_says_how_often_cron_runs_it(machine, behind):
    """A service goes by what the server tells it, and so does a run of which nothing is known."""
    middle = behind()
    machine.once(token=machine.door.token())
    for seconds in ("60", "60", "86400"):
        machine.once("--every", seconds)
    with machine.agent():
        until(lambda: len(middle.requests) > 6)
    machine.once("--every", "60")
    said = [body.get("everySeconds", "nothing") for body in bodies(middle)]
    assert said[:7] == [None, None, 60, "nothing", 86400, None, "nothing"] and said[-1] == 60
    assert machine.host()["everySeconds"] == 60


@slow
def test_a_run_by_cron_leaves_a_machine_to_the_run_before_it(member):
    """Which may still try: that is no news for the system's log."""
    with member.agent():
        until(lambda: os.path.lexists(member.state / "lock"))
        assert member.once("--every", "60") == ""
        member.once(status=1, text="uses")


TOOLS = re.search(r"(?s)for tool in ([a-z \\\n]+)", hostenroll.AGENT_SCRIPT)[1].split()


@in_every_shell
def test_an_agent_names_the_tool_that_it_misses(machine):
    """And works with those alone: small systems have no od, hexdump, setsid or timeout."""
    machine.shell = (shutil.which(machine.shell[0]), *machine.shell[1:])
    machine.environment["PATH"] = str(machine.programs)
    for tool in filter(str.isalpha, TOOLS):
        has_it = machine.shell[1:] and tool != "curl"
        (machine.programs / tool).symlink_to(machine.shell[0] if has_it else shutil.which(tool))
    machine.once(token=machine.door.token())
    for tool in filter(str.isalpha, TOOLS):
        hidden = (machine.programs / tool).rename(machine.folder / "hidden")
        shown = machine.once(status=None)
        is_builtin = shown == "" and (machine.shell[0][-3:], tool) == ("ksh", "sleep")
        assert is_builtin or shown == f"hostenroll-agent: {tool} is missing: install it\n"
        hidden.rename(machine.programs / tool)
    assert machine.once() == "" and machine.is_online()


HUNG = {  # how docker hangs; what it starts notes its process
    "itself": "echo $$ >>{pids}; exec sleep 100",
    "what it starts": "sleep 100 & echo $! >>{pids}; wait",
    "deaf": "trap '' TERM HUP INT; echo $$ >>{pids}; exec sleep 100",
    "when it has answered": "echo $$ >>{pids}; echo Docker version 20.1, build 1; exec sleep 100",
    "in a pipe": "sleep 100 | cat & echo $! >>{pids}; wait",
}


@in_every_shell
@pytest.mark.parametrize("how", sample(HUNG, "what it starts"))
def test_a_docker_that_hangs_costs_a_moment_and_nothing_of_it_stays(how, machine):
    machine.program("docker", "echo Docker version 20.1, build 1")
    machine.once(token=machine.door.token())
    pids = machine.folder / "pids"
    machine.program("docker", how.format(pids=pids))
    machine.write_script(FACT_TIMEOUT=0.2)
    began, shown = time.monotonic(), machine.once("--every", "60")
    assert time.monotonic() - began < 5
    assert ("docker --version hangs" in shown) == ("echo Docker" not in how)
    assert machine.host()["dockerVersion"] == "20.1" and machine.is_online()
    for pid in pids.read_text().split():
        until(lambda pid=pid: not has_arguments(pid))


def has_arguments(pid):
    """Whether a process is there, and no zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    return False


HOSTILE = {
    "quotes": '"", "token": "x", $(id) `id`', "backslashes": "\\\\ \\n \\u0000 \\",
    "controls": "a\\033[31mb\\007\\tc\\r\\nd", "bytes": "\\377\\376\\303\\050 \\342\\200\\256",
    "length": "x" * 5000, "nothing": "", "options": "-e -n", "percent": "%s%n%d",
}  # fmt: skip


@slow
@pytest.mark.parametrize("text", table(HOSTILE))
def test_a_machine_with_hostile_facts_can_enroll(text, machine):
    (machine.folder / "text").write_text(text)
    tell = f'printf %b "$(cat {machine.folder}/text)"'
    machine.program("uname", f'[ "$1" != -n ] || printf web.; {tell}')
    machine.program("docker", f"printf 'Docker version '; {tell}")
    machine.once(token=machine.door.token())
    host = machine.host()
    assert re.fullmatch(r"web[A-Za-z0-9._-]{0,250}", host["hostname"])
    for name in ("os", "architecture", "dockerVersion"):
        assert re.fullmatch("[ -~]{0,128}", host[name])
    if text == HOSTILE["quotes"]:
        assert host["architecture"] == text
    machine.once()


# Renewal, and full disks.

UNTIL_RENEWAL = 25 * 86400  # of 30 days


def test_a_renewed_credential_is_stored_before_it_is_used(member, behind, clock):
    old = member.credential()
    clock.advance(UNTIL_RENEWAL)
    member.once()
    renewed = member.credential()
    assert renewed != old
    assert member.door.beat(old).status == 200  # so the new one has not been used
    member.once()
    assert member.door.beat(old).code == "credential-superseded"
    assert member.credential() == renewed
    # A renewal does not undo an enrollment in between.
    clock.advance(UNTIL_RENEWAL)
    token = member.door.reenroll(member.host()["id"]).document["token"]
    newer = []

    def enroll_between():
        """When the server has given the renewal, and before the agent has it."""
        newer.append(member.door.enroll(token).document["credential"])
        (member.state / "credential").write_text(f"{newer[0]}\n{'0' * 16}\n{'0' * 16}\n")

    behind(enroll_between)
    member.once()
    assert len(member.renewals()) == 2 and member.credential() == newer[0]


@contextlib.contextmanager
def small_disk(folder, size):
    """A disk of its own in a folder; yields a function that fills it by a file `filler`."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")

    def write_until_full():
        with contextlib.suppress(OSError), (folder / "filler").open("wb", 0) as filler:
            while filler.write(b"x" * 512):
                pass

    try:
        yield write_until_full
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def fill_disk(machine):
    machine.state.mkdir(mode=0o700)
    with small_disk(machine.state, "64k") as fill:
        yield fill


@in_every_shell_slowly
def test_a_full_disk_costs_no_token_and_no_credential(machine, fill_disk, behind, clock):
    """Before the enrollment, during it, and at the renewal."""
    token, filler = machine.door.token(), machine.state / "filler"
    fill_disk()
    machine.run(token=token, status=1, text="make room")
    assert machine.door.show_token(token.split("_")[1]).document["uses"] == 0
    filler.unlink()
    middle = behind(fill_disk)
    machine.once(token=token, status=1, text="the same token")
    filler.unlink()
    machine.once(token=token)
    assert machine.is_online()
    old = machine.stored()
    (machine.state / "facts").unlink()  # which would make room
    fill_disk()
    clock.advance(UNTIL_RENEWAL)
    with machine.agent():
        until(machine.log)
        beats = len(middle.requests)
        until(lambda: len(middle.requests) > beats + 1)
        assert machine.stored() == old
        assert len(machine.log()) == 1 and "make room" in machine.log()[0]
        filler.unlink()
        until(lambda: machine.stored() != old)
        until(lambda: machine.door.beat(old.split()[0]).code == "credential-superseded")
    assert machine.log()[1:] == ["hostenroll-agent: the server accepts heartbeats again"]
    # Facts that could not be stored do not leave older ones, which the server no longer has.
    fill_disk()
    machine.once("--hostname", "web-2")
    machine.once()
    assert machine.host()["hostname"] == os.uname().nodename


@in_every_shell_slowly
def test_links_that_another_user_made_in_the_folder_are_not_followed(machine):
    precious = machine.folder / "precious"
    precious.write_text("precious")
    machine.state.mkdir()
    for name in ("credential.new", "enrolling.new", "facts.new"):
        (machine.state / name).symlink_to(precious)
    (machine.state / "enrolling").write_text(f'{"0" * 16} x"\n')
    machine.once(token=machine.door.token())
    assert precious.read_text() == "precious"
    assert not (machine.state / "credential").is_symlink()
    # A link that is made just after the last look.
    plant = f'case $2 in *.new) ln -s {precious} "$2" ;; esac'
    machine.program("rm", f'{shutil.which("rm")} "$@"; {plant}')
    machine.once(token=machine.door.token(), status=None)
    assert precious.read_text() == "precious"


def holder_of_lock(process):
    born = Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1].split()[19]
    return f"{process}-{born}"


def prepared(state, victim):
    """What another user may prepare in a folder, for root to use: where it must not be used."""
    for name in ("credential", "facts", "enrolling"):
        os.mkfifo(str(state / name))
        os.mknod(str(state / f"{name}.new"), stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (state / "lock").symlink_to(holder_of_lock(victim.pid))
    return {path.name for path in state.iterdir()}


FOREIGN = {  # whose the state's folder is and its mode, and the same of the one above it
    "another's": (STRANGER, 0o700, 0, 0o755), "another's link": (0, 0o700, 0, 0o755),
    "open to all": (0, 0o777, 0, 0o755), "sticky": (0, 0o1777, 0, 0o755),
    "open to a group": (0, 0o770, 0, 0o755), "in another's": (0, 0o700, STRANGER, 0o755),
    "in an open one": (0, 0o700, 0, 0o777),
}  # fmt: skip


@needs_root
@pytest.mark.parametrize("owner, mode, above, its_mode", table(FOREIGN))
def test_root_works_in_no_folder_that_others_can_change(
    owner, mode, above, its_mode, tmp_path, request
):
    """Not even to look: a FIFO would hold it, a lock has it signal others, text reach its
    terminal."""
    whole = tmp_path / "above"
    state = whole / "state"
    state.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as victim:
        names = prepared(state, victim)
        for folder, user, bits in ((state, owner, mode), (whole, above, its_mode)):
            os.chown(str(folder), user, -1)
            folder.chmod(bits)
        if "link" in request.node.name:
            state.rename(whole / "elsewhere")
            state.symlink_to("elsewhere")
            os.chown(str(state), STRANGER, -1, follow_symlinks=False)
        (tmp_path / "token").write_text("het_0123456789abcdef_x\n")
        for words in ((), ("--token-file", "token"), ("--once",)):
            arguments = ("--server", "https://127.0.0.1:9", "--state", str(state), *words)
            shown = run_script(tmp_path, *arguments, status=1)  # Linux may not follow such a link
            assert re.search("others can write in .*\n$|cannot make the folder .*\n$", shown), shown
            assert shown.count("\n") == 1 and victim.poll() is None
            assert {path.name for path in state.iterdir()} == names
        victim.kill()


def test_a_lock_that_no_agent_made_is_taken_over_unseen(member):
    """Its text may lead elsewhere, and control a terminal."""
    for text in ("../x/\x1b]0;y\x07-1", "0-", "-1", "1-1-1", f"{os.getpid()}-\x1b[2J"):
        (member.state / "lock").symlink_to(text)
        assert member.once() == "", text


# Copies of the folder, as on the disks of cloned machines.


def copy_of(machine, name, machine_id="", replaced=()):
    """A machine with a machine-id of its own and a copy of another's folder. replaced: texts of the
    agent's script, and others for them."""
    folder = machine.folder / name
    folder.mkdir()
    copy = Machine(folder, machine.door, machine.shell)
    copy.port, copy.machine_id, copy.mounts = machine.port, folder / "machine-id", folder / "mounts"
    if machine.state.exists():
        shutil.copytree(machine.state, copy.state, symlinks=True)
    if machine_id:
        copy.machine_id.write_text(f"{machine_id}\n")
    own = ("/etc/machine-id", copy.machine_id), ("/proc/self/mountinfo", copy.mounts)
    for old, new in (*own, *replaced):
        assert old in copy.script.read_text()
        copy.script.write_text(copy.script.read_text().replace(old, str(new)))
    return copy


def forget_time(*machines):
    """As if they had last named their instances long ago."""
    for machine in machines:
        facts = machine.stored("facts").split("\n")[0]
        (machine.state / "facts").write_text(f"{facts}\n1\n")


IDS = [digit * 32 for digit in "0123456789abcdef"]
WAS_COPIED = "this state was copied from another machine"


def copy_warnings(machine):
    text = "more than one machine uses this credential"
    return [text in warning for host in machine.hosts() for warning in host["warnings"]]


@in_every_shell
def test_copies_of_a_folder_show_as_one_host_with_a_warning(machine):
    one = copy_of(machine, "1")
    one.once(token=machine.door.token())
    two = copy_of(one, "2")
    names = [("--hostname", "web-2"), ("--hostname", "web-1")]
    for copy, words in ((two, names[0]), (one, names[1])):
        copy.once(*words)
    assert copy_warnings(machine) == []
    forget_time(one, two)
    two.once(*names[0])
    assert machine.is_online() and copy_warnings(machine) == [True]
    (event,) = machine.door.events("action=clone").document["events"]
    names = {"hostname": "web-2", "otherHostname": "web-1", "otherAddress": "127.0.0.1"}
    assert (event["detail"], event["address"]) == (names, "127.0.0.1")


@slow
def test_a_machine_that_is_run_again_and_again_names_one_instance_once_an_hour(member, behind):
    forget_time(member)
    middle = behind()
    for _ in range(3):
        member.once()
    assert middle.has_facts() == [True, False, False]
    text = rb'"instance":"([0-9a-f]{16})"}$'
    assert re.search(text, middle.requests[0])
    facts = member.stored("facts")
    assert int(facts.split("\n")[1]) >= NOON - 10 * 365 * 86400
    (member.state / "facts").write_text(facts.replace("\n", "\n08", 1))  # no time that we wrote
    member.once()
    forget_time(member)
    member.once()
    assert middle.has_facts()[3:] == [True, True]
    assert len({re.search(text, middle.requests[n])[1] for n in (0, 3, 4)}) == 1
    assert copy_warnings(member) == []


@slow
@pytest.mark.parametrize("shell", sample(SHELLS), indirect=True)
def test_three_agents_with_one_credential_are_seen_while_they_run(member):
    often = [("FACTS_EVERY=3600", "FACTS_EVERY=1")]
    with contextlib.ExitStack() as stack:
        for name in "abc":
            stack.enter_context(copy_of(member, name, replaced=often).agent())
        until(lambda: copy_warnings(member) == [True], 30)
        assert member.is_online()
    assert len(member.door.events("action=clone").document["events"]) == 1


@slow
def test_one_agent_that_is_started_five_times_is_no_copy(member):
    """By another boot id each time."""
    boot = member.folder / "boot-id"
    member.script.write_text(
        hostenroll.AGENT_SCRIPT.replace("/proc/sys/kernel/random/boot_id", str(boot))
    )
    forget_time(member)
    for n in range(4):  # the member has named one already
        boot.write_text(f"{n}\n")
        member.once()
    assert copy_warnings(member) == []
    boot.write_text("5\n")
    member.once()
    assert copy_warnings(member) == [True]


@in_every_shell
def test_a_folder_from_another_machine_is_noticed(machine):
    """Without a token it goes on; with one it is a host of its own."""
    one = copy_of(machine, "1", IDS[1])
    token = machine.door.token(maxUses=9)
    one.once(token=token)
    forget_time(one)
    assert one.once() == ""
    two = copy_of(one, "2", IDS[2])
    assert WAS_COPIED in two.once() and two.once() == ""  # said once an hour
    assert two.stored() == one.stored() and len(machine.hosts()) == 1
    two.once(token=token, text="enrolled as host")
    assert two.once(token=token) == one.once(token=token) == ""
    numbers = {host["id"] for host in machine.hosts()}
    assert len(numbers) == 2 and numbers == {it.stored().split()[1] for it in (one, two)}
    assert IDS[1] not in one.stored()


NO_MACHINE_IDS = {  # what the file is like, by a shell's lines
    "missing": "rm $file", "empty": ": >$file", "not yet made": "echo uninitialized >$file",
    "a link": "mv $file $file.1; ln -s $file.1 $file",
    "a mount": "echo 30 24 0:26 /machine-id $file ro - tmpfs tmpfs rw >mounts",
}  # fmt: skip


@slow
@pytest.mark.parametrize("lines", table(NO_MACHINE_IDS))
@pytest.mark.parametrize("first", [True, False])
def test_a_machine_without_a_lasting_id_is_never_taken_for_another(first, lines, machine):
    """As where nothing can write: there each boot may have another."""
    one = copy_of(machine, "1", IDS[1])

    def change(copy):
        run_alone(["sh", "-c", f"file={copy.machine_id}; {lines}"], copy.folder)

    if first:
        change(one)
    token = machine.door.token()
    one.once(token=token)
    two = copy_of(one, "2", IDS[2])
    if not first:
        change(two)
    assert two.once() == two.once(token=token) == ""
    assert len(machine.hosts()) == 1


@slow
def test_the_state_of_an_older_version_becomes_this_machines(machine):
    one = copy_of(machine, "1", IDS[1])
    one.once(token=machine.door.token())
    (one.state / "credential").write_text("\n".join(one.stored().split()[:3]) + "\n")
    forget_time(one)
    assert one.once() == "" and len(one.stored().split()) == 4
    assert WAS_COPIED in copy_of(one, "2", IDS[2]).once()


@in_every_shell_slowly
@pytest.mark.parametrize("with_ids", [True, False])
def test_an_unfinished_enrollment_in_an_image_makes_a_host_of_each_machine(with_ids, machine):
    token, port = machine.door.token(maxUses=50), machine.port
    image = copy_of(machine, "image", IDS[0] if with_ids else "")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        image.port = closed.getsockname()[1]
        image.once(token=token, status=1, text="no answer from")
    machines = [copy_of(image, str(n), IDS[n] if with_ids else "") for n in range(1, 5)]
    for one in machines:
        one.port = port
        one.once(token=token)
    assert len(machine.hosts()) == 4
    assert machine.refusals("token-used") == (0 if with_ids else 3)
    assert len({one.stored("enrolling") for one in machines}) == 1  # they are gone


@slow
def test_an_enrollment_whose_answer_was_lost_goes_on_after_a_start_of_the_machine(machine, behind):
    middle = behind("lose", "lose")
    one = copy_of(machine, "1", IDS[1], [("/proc/sys/kernel/random/boot_id", "/nowhere")])
    token = machine.door.token()
    for status in (1, 1, 0):
        one.once(token=token, status=status)
    keys = {re.search(rb"(?i)idempotency-key: (\S+)", sent)[1] for sent in middle.requests[:3]}
    assert len(keys) == 1 and len(machine.hosts()) == 1


@slow
def test_a_key_that_is_used_up_is_replaced_once(machine, behind):
    """With a token for one host the second answer is the same: then that is it."""
    token = machine.door.token()
    middle = behind("lose")
    machine.once(token=token, status=1)
    machine.door.beat(machine.door.enroll(token, key=machine.stored("enrolling").split()[1],
                      hostname=os.uname().nodename).document["credential"])  # fmt: skip
    machine.once(token=token, status=3, text="refused (token-used)")
    assert len(middle.requests) == 3


@in_every_shell_slowly
def test_sealing_leaves_nothing_that_makes_a_machine_a_host(member, shell):
    with member.agent() as agent:
        until(lambda: os.path.lexists(member.state / "lock"))
        for _ in range(2):
            member.run("--seal", status=1, text=f"process {agent.pid}, uses")
        assert member.stored() is not None
        agent.kill()
        agent.wait(10)
    assert os.path.lexists(member.state / "lock")
    (member.state / "enrolling").write_text("a b\n")
    (member.state / "credential.new").write_text(member.stored())  # of a run that was killed
    (member.state / "precious").write_text("another's\n")
    command = [*shell, str(member.script), "--seal", "--state", str(member.state)]
    for _ in range(2):
        run_alone(command, member.folder, text="sealed")
    assert [path.name for path in member.state.iterdir()] == ["precious"]
    member.once(status=1, text="no credential")
    member.once(token=member.door.token())
    assert len(member.hosts()) == 2


DIGESTS = ("sha256sum", "openssl", "md5sum", "cksum")


@in_every_shell
def test_a_digest_is_sixteen_digits_whatever_program_makes_it(shell, tmp_path):
    made = []
    for count in range(len(DIGESTS) + 1):
        missing = "\n".join(f"{name}() {{ return 127; }}" for name in DIGESTS[:count])
        lines = f"{missing}\nfor text in a a b; do printf %s $text | digest; done"
        made.append(in_agent(shell, tmp_path, lines))
    assert made.pop() == []
    for one, again, other in made:
        assert one == again != other and re.fullmatch("[0-9a-f]{16}", one)
    assert made[0][0] == hashlib.sha256(b"a").hexdigest()[:16]
    if shutil.which("openssl"):
        assert made[0] == made[1]


# Secrets, signals, and other processes.


def processes_of(session):
    if not Path("/proc/self").exists():
        pytest.skip("there is no /proc")
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(entry.name)) == session:
                yield entry


@in_every_shell_slowly
def test_no_secret_is_in_an_argument_or_an_environment(machine, behind):
    token = machine.door.token()
    # A variable of the script that the environment has too would go to children with its new value.
    words = set(re.findall(r"\b([a-z_]+)=", hostenroll.AGENT_SCRIPT))
    words -= {"state", "server", "all_proxy"}  # the last is for curl
    assert {"token", "credential", "answer", "config", "body"} <= words
    machine.environment.update(dict.fromkeys(words, "from-outside"))
    for secret in (token, "eyJ"):
        middle = behind("hold")
        with machine.agent(token=token if secret == token else "") as agent:
            assert middle.has_held.wait(10)
            shown = []  # the arguments and the environment of each process
            for entry in processes_of(agent.pid):
                with contextlib.suppress(OSError):
                    texts = [(entry / name).read_bytes() for name in ("cmdline", "environ")]
                    shown.append(b"\n".join(texts))
            assert any(b"curl\0" in text for text in shown) and len(shown) >= 2
            assert [text for text in shown if secret.encode() in text] == []
            assert secret.encode() in middle.requests[0]
            middle.release.set()
            until(lambda: machine.stored())
            assert secret not in "".join(machine.log())


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_a_shell_whose_printf_is_a_program_gets_no_secrets(machine):
    (machine.folder / "settings").write_text("enable -n printf\n")
    machine.environment["BASH_ENV"] = str(machine.folder / "settings")
    machine.shell = ("bash",)
    machine.once(token=machine.door.token(), status=1, text="would show secrets")
    assert machine.hosts() == []


@in_every_shell_slowly
def test_an_agent_in_its_long_wait_heeds_signals_and_a_new_enrollment(member):
    number = member.host()["id"]
    member.door.revoke(number)
    for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        with member.agent() as agent:
            until(member.log)  # and now it sleeps for an hour
            until(lambda agent=agent: len(list(processes_of(agent.pid))) == 2)
            began = time.monotonic()
            agent.send_signal(stop)
            assert agent.wait(10) == -signal.SIGTERM and time.monotonic() - began < 2
            until(lambda agent=agent: list(processes_of(agent.pid)) == [])
        assert not os.path.lexists(member.state / "lock")
    with member.agent():
        until(member.log)
        member.door.restore(number)
        token = member.door.reenroll(number).document["token"]
        member.run(token=token, text="goes on with the new credential")
        until(lambda: member.log()[-1].endswith("accepts heartbeats again"))
    assert len(member.log()) == 2


@in_every_shell_slowly
def test_one_agent_to_a_folder(member):
    lock = member.state / "lock"
    with member.agent() as agent:
        until(lambda: os.path.lexists(lock))
        member.once(status=1, text=f"process {agent.pid}, uses")
        agent.kill()
        agent.wait(10)
        assert os.path.lexists(lock)
        member.once()
    assert not os.path.lexists(lock)
    for stale in ("1-1", f"{os.getpid()}-1", "999999999-", "nonsense"):
        lock.symlink_to(stale)
        member.once()
        assert not os.path.lexists(lock), stale


PS = {  # a ps; whether it tells when a process began
    "one that knows": ("", True), "one that does not": ("exit 1", False),
    "one that is confused": ("echo PID USER COMMAND; exit 1", False),
}  # fmt: skip


@needs_proc
@pytest.mark.parametrize("ps, tells", sample(PS, "one that does not"))
def test_without_proc_a_lock_goes_by_the_holders_birth_and_no_stranger_gets_a_signal(
    ps, tells, member
):
    if shutil.which("ps") is None:
        pytest.skip("ps is not installed")
    text = hostenroll.AGENT_SCRIPT
    assert text.count("/proc/$1/stat") == 1
    member.script.write_text(text.replace("/proc/$1/stat", "/nowhere/$1"))
    if ps:
        member.program("ps", ps)
    lock = member.state / "lock"
    token = member.door.reenroll(member.host()["id"]).document["token"]
    with subprocess.Popen(["sleep", "60"]) as stranger:
        for held in (f"{stranger.pid}-", f"{stranger.pid}-1", str(stranger.pid)):
            lock.symlink_to(held)
            member.once(token=token)  # the first enrolls, and would wake the holder
            assert stranger.poll() is None and not os.path.lexists(lock), held
        stranger.kill()
    with member.agent() as agent:
        until(lambda: os.path.lexists(lock))
        holder = os.readlink(str(lock))
        assert re.fullmatch(rf"{agent.pid}-[0-9]*", holder) and tells == (holder[-1] != "-")
        if ps == "":
            member.once(status=1, text=f"process {agent.pid}, uses")
        elif not tells:
            member.once()


@slow
def test_an_agent_takes_over_a_lock_with_its_own_id_that_another_boot_left(member):
    ln = shutil.which("ln")
    member.program("ln", f"""[ -e {member.folder}/left ] || {{
        >{member.folder}/left; {ln} -s "$2" "$3"; }}; exec {ln} "$@" """)  # fmt: skip
    assert member.once() == "" and (member.folder / "left").exists()
    assert not os.path.lexists(member.state / "lock")


def test_of_two_agents_that_find_a_stale_lock_one_runs(member):
    """The other one takes the lock between this one's look and its removal."""
    lock = member.state / "lock"
    lock.symlink_to("999999999-1")
    other = holder_of_lock(os.getpid())
    ls, seen = shutil.which("ls"), member.folder / "seen"
    taking = f"ln -sfn {other} {lock}"
    member.program("ls", f"""{ls} "$@"
        case $* in *lock) [ -e {seen} ] || {{ >{seen} && {taking}; }} ;; esac""")  # fmt: skip
    member.once(status=1, text=f"process {os.getpid()}, uses")
    assert os.readlink(str(lock)) == other
    assert [path.name for path in member.state.iterdir() if "lock" in path.name] == ["lock"]


@slow
@needs_curl
def test_agents_go_on_when_the_server_is_started_again(tmp_path):
    often = ("--heartbeat-interval", "1s")
    with start_server(tmp_path, *often, how="process", tls=True) as server:
        machine = Machine(tmp_path, server)
        with machine.agent(token=server.token()):
            until(machine.is_online)
            server.kill()
            until(lambda: "no answer from" in "".join(machine.log()))
            again = (*often, "--port", str(server.port))
            with start_server(tmp_path, *again, how="process", tls=True):
                seen = machine.host()["lastSeen"]
                until(lambda: machine.host()["lastSeen"] > seen, 20)
                assert cli(tmp_path, "rotate-signing-key").returncode == 0
                old = machine.credential()
                until(lambda: machine.credential() != old, 20)
    assert [line for line in machine.log() if "refused" in line] == []


# One version apart. A server of 0.1.0 has no new members, and ignores those that it does not know.


@in_every_shell
def test_the_agent_of_the_version_before_enrolls_beats_and_renews(machine, clock):
    machine.script.write_text((ROOT / ".github/tests/agent-0.1.0.sh").read_text())
    assert machine.run("--version") == "hostenroll-agent 0.1.0\n"
    machine.once("--name", "web", token=machine.door.token())
    assert machine.is_online() and machine.host()["name"] == "web"
    old = machine.credential()
    clock.advance(UNTIL_RENEWAL)
    machine.once()
    assert machine.credential() != old
    machine.once()
    assert machine.door.beat(old).code == "credential-superseded" and machine.is_online()
    machine.write_script()
    assert machine.once() == ""  # the folder of the one is that of the other


@slow
def test_a_server_of_the_version_before_gets_the_facts_once(machine, behind):
    enrolled = b'{"hostId":"0123456789abcdef","organizationId":"default","name":"web",'
    enrolled += b'"credential":"a.b.c","credentialExpiresAt":null,"heartbeatIntervalSeconds":30}'
    beat = b'{"hostId":"0123456789abcdef","lastSeen":"2026-01-01T00:00:00.000Z",'
    beat += b'"nextHeartbeatSeconds":27'
    renewal = beat + b',"credential":"d.e.f","credentialExpiresAt":null}'
    beats = [answer_of("200 OK", text) for text in (beat + b"}", renewal, beat + b"}")]
    middle = behind(answer_of("201 Created", enrolled), *beats)
    machine.once("--every", "60", token=machine.door.token())
    for _ in range(2):
        assert machine.once("--every", "60") == ""
    assert middle.has_facts() == [True, True, False, False]
    used = re.findall(rb"(?i)authorization: Bearer (\S+)", b"".join(middle.requests))
    assert used == [b"a.b.c", b"a.b.c", b"d.e.f"] and machine.credential() == "d.e.f"


@in_every_shell
def test_an_agent_that_is_started_again_says_which_host_it_is(machine):
    token = machine.door.token()
    with machine.agent(token=token):
        until(lambda: machine.hosts() and machine.is_online())
        assert "already" not in machine.log_file.read_text()
    said = f"hostenroll-agent: already enrolled as host {machine.host()['id']}, sending heartbeats"
    for words in ({"token": token}, {}):  # as a boot script starts it, and without the token
        with machine.agent(**words):
            until(machine.log_file.read_text)
            assert machine.log_file.read_text() == f"{said}\n"
        assert machine.once(**words) == ""  # cron would mail it every minute


# A proxy that serves the server under a path.


class Stripping(Middle):
    """A proxy that takes /enroll off the path, and knows nothing else."""

    @staticmethod
    def message(stream):
        message = Middle.message(stream)
        if re.match(rb"[A-Z]+ /(?!enroll/)", message):
            return b"GET /a-path-of-another HTTP/1.1\r\nHost: x\r\n\r\n"
        return re.sub(rb"^([A-Z]+) /enroll/", rb"\1 /", message)


@needs_curl
def test_all_works_behind_a_proxy_that_strips_a_prefix(machine, tmp_path):
    """Each URL that the join command, the agent, the page and the OpenAPI document lead to."""
    assert parsed("serve", "PUBLIC_URL=https://h/enroll/").public_url == "https://h/enroll"
    with Stripping(machine.door, tmp_path) as proxy:
        url = f"https://127.0.0.1:{proxy.port}/enroll"
        command = hostenroll.join_command(url, pin_of("one"), machine.door.token())
        words = ("--once", "--state", str(machine.state))
        run_alone(["sh", "-c", f"{command} {shlex.join(words)}"], tmp_path, text="enrolled as host")
        assert machine.is_online()
        paths = ["/agent.sh", "/api/agent/enroll", "/api/agent/heartbeat"]
        asked = [request.split(b" ")[1].decode() for request in proxy.requests]
        assert asked == paths
        door = SocketDoor(proxy.port, machine.door.api_key, trusting())
        document = door.call("GET", "/enroll/openapi.json").document
        [place] = [urllib.parse.urljoin(f"{url}/openapi.json", each["url"])
                   for each in document["servers"]]  # RFC 3986  # fmt: skip
        assert place == f"{url}/" and {each[0] for each in document["paths"]} == {"/"}
        assert len(door.ask("GET", "/enroll/api/hosts").document["hosts"]) == 1
        assert door.call("GET", "/enroll/").document == PAGE


# Installation.

IN_A_NEW_ROOT = """set -e
for folder in /usr/local /var/lib /run; do mount -t tmpfs -o mode=755 none $folder; done
mkdir -p /run/etc/systemd /run/work
mount -t overlay none -o lowerdir=/etc,upperdir=/run/etc,workdir=/run/work /etc
rm -rf /etc/systemd/system && mkdir -p /etc/systemd/system
! grep -q hostenroll-agent /etc/passwd || userdel hostenroll-agent"""


def in_a_new_root(machine, script):
    """Run lines where nothing is installed yet; `agent` is the agent with its arguments."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    server = f"--server 'https://127.0.0.1:{machine.port}' {shlex.join(machine.trust)}"
    agent = f'agent() {{ {shlex.join(machine.shell)} {machine.script} {server} "$@"; }}'
    lines = f"{IN_A_NEW_ROOT}\n{agent}\n{script}"
    command = ["unshare", "--mount", "sh", "-c", lines]
    shown = run_alone(command, machine.folder, environment=machine.environment, status=None)
    if "unshare failed" in shown or "mount: " in shown:
        pytest.skip("nothing can be mounted here")
    return shown


UNIT_FILE = "/etc/systemd/system/hostenroll-agent.service"


# What systemd does with the unit of the agent: it runs once, and has ended when this has. A unit
# with the text in $CALLS.denied fails, as in a container that denies unshare(2).
SYSTEMD = f"""case $1 in
--version) echo "systemd ${{SYSTEMD_VERSION:-252}} (252.38)"; exit ;;
show) echo ActiveState=activating; echo SubState=auto-restart; echo Result=exit-code; exit ;;
-q) exec test -e "$CALLS.active" ;;
esac
echo "systemctl $*" >>"$CALLS"
value() {{ sed -n "s/^$1=//p" {UNIT_FILE}; }}
case $1 in *restart)
    rm -f "$CALLS.active"
    [ ! -e "$CALLS.denied" ] || ! grep -qf "$CALLS.denied" {UNIT_FILE} || exit 0
    folder=$(value StateDirectory)
    [ -z "$folder" ] ||
        install -d -o "$(value User)" -m "$(value StateDirectoryMode)" "/var/lib/$folder"
    file=$(value EnvironmentFile)
    [ ! -f "${{file#-}}" ] || {{ set -a; . "${{file#-}}"; set +a; }}
    eval "set -- $(value ExecStart) --once"
    runuser -u "$(value User)" -- "$@" </dev/null && touch "$CALLS.active" ;;
esac"""
SERVICE_DIR = "/var/lib/hostenroll-agent/service"  # its folder


@pytest.fixture
def service(machine, tmp_path):
    """Run lines with a systemd, of a sort, where nothing is installed yet: what they print."""
    if shutil.which("runuser") is None or shutil.which("useradd") is None:
        pytest.skip("runuser or useradd is not installed")
    machine.environment["CALLS"] = str(tmp_path / "calls")
    machine.program("systemctl", SYSTEMD)
    machine.trust += trust(tmp_path, "--cacert", "one")
    return lambda script: in_a_new_root(machine, f"mkdir -p /run/systemd/system\n{script}")


@slow
@needs_root
def test_installed_with_systemd_it_is_a_service_without_privileges(service, machine, tmp_path):
    token = machine.door.token()
    shown = service(f"""
        printf %s {token} | agent --install --state /var/lib/mine --token-file - || echo status $?
        printf %s {token} | agent --install --hostname web-7 --token-file -
        cp {UNIT_FILE} {tmp_path}/; stat -c '%a %U %n' {UNIT_FILE} /usr/local/sbin/* /var/lib/*/*
        cmp {machine.script} /usr/local/sbin/hostenroll-agent
        systemd-analyze verify {UNIT_FILE} >{tmp_path}/verified 2>&1 || :
        getent passwd hostenroll-agent
        agent --uninstall
        find {UNIT_FILE} /usr/local/sbin /etc/hostenroll-agent.pem /var/lib/*/* 2>&- || :
        """)  # fmt: skip
    assert "--state cannot be used with --install" in shown and "status 2\n" in shown
    program, kept = "/usr/local/sbin/hostenroll-agent", "/var/lib/hostenroll-agent/credential"
    assert f"644 root {UNIT_FILE}\n755 root {program}\n600 hostenroll-agent {kept}\n" in shown
    assert f"700 hostenroll-agent {SERVICE_DIR}\n" in shown and f"; {program} --uninstall" in shown
    assert re.search("^hostenroll-agent:.*:/:/usr/sbin/nologin$", shown, re.MULTILINE)
    end = shown.rpartition("; the credential stays in ")[2].splitlines()[1:]
    assert end == ["/usr/local/sbin", kept, "/var/lib/hostenroll-agent/facts"]
    host = machine.host()
    assert (host["hostname"], host["status"]) == ("web-7", "online")
    name = "hostenroll-agent.service"
    assert (tmp_path / "calls").read_text().splitlines() == [
        "systemctl daemon-reload", f"systemctl enable {name}", f"systemctl restart {name}",
        f"systemctl disable --now {name}", "systemctl daemon-reload",
    ]  # fmt: skip
    unit = (tmp_path / name).read_text()
    assert "het_" not in unit and "eyJ" not in unit and "\nUser=hostenroll-agent\n" in unit
    verified = (tmp_path / "verified").read_text()
    assert shutil.which("systemd-analyze") is None or name not in verified


@slow
@needs_root
def test_root_enrolls_for_the_service_and_leaves_its_folder_alone(service, machine, tmp_path):
    """Whatever the service, or who has broken into it, has put there."""
    secret = tmp_path / "secret"
    secret.write_text("a.b.c\n0\n0\n")
    tokens = [machine.door.token() for _ in range(3)]
    shown = service(f"""
        as_service() {{ runuser -u hostenroll-agent -- "$@"; }}
        printf %s {tokens[0]} | agent --install --token-file -
        sleep 60 & victim=$!
        as_service ln -s $victim-$(cut -d ' ' -f 22 /proc/$victim/stat) {SERVICE_DIR}/lock
        as_service mkfifo {SERVICE_DIR}/credential
        as_service ln -s {secret} {SERVICE_DIR}/credential.new
        echo 1; printf %s {tokens[1]} | agent --token-file - || echo status $?
        kill -0 $victim && kill $victim
        echo 2; printf %s {tokens[2]} | agent --hostname web-2 --token-file -
        echo 3; printf %s {tokens[2]} | agent --token-file - || echo status $?
        echo 4; cd /usr/local/sbin
        as_service sh hostenroll-agent --server https://a --state {SERVICE_DIR} --token-file - ||
            echo status $?
        as_service rm {SERVICE_DIR}/credential; as_service ln -s {secret} {SERVICE_DIR}/credential
        echo 5; agent --uninstall
        cd /var/lib/hostenroll-agent
        cmp {secret} credential || find {SERVICE_DIR} 2>/dev/null || echo gone
        """)  # fmt: skip
    parts = re.split(r"^\d\n", shown, flags=re.MULTILINE)
    assert "\nhostenroll-agent: systemd does not restart " in parts[1] and "status 1" in parts[1]
    assert parts[2].endswith("goes on with the new credential\n")
    assert "hostenroll-agent.service uses /var/lib/hostenroll-agent: " in parts[3]
    assert "enroll as root" in parts[4] and "status 2" in parts[4]
    assert parts[5].endswith("gone\n") and secret.read_text() == "a.b.c\n0\n0\n"
    seen = {host["hostname"] == "web-2": host["status"] for host in machine.hosts()}
    assert seen[True] == "online" and len(machine.hosts()) == 3


@slow
@needs_root
def test_a_service_keeps_its_renewals_until_root_enrolls_again(service, member, clock):
    """Also from one installation to the next."""
    root = "/var/lib/hostenroll-agent"
    first = member.credential()
    clock.advance(UNTIL_RENEWAL)
    (_, renewed), (_, again), listed, (new, own) = (
        part.split() for part in service(f"""
        mkdir -m 700 {root}; cp {member.state}/credential {root}/
        agent --install 2>&-; head -qn 1 {root}/credential {SERVICE_DIR}/credential
        systemctl restart
        agent --uninstall 2>&-; echo /; echo -; head -qn 1 {root}/credential
        agent --install 2>&-; echo /; ls {SERVICE_DIR}; echo /
        printf %s {member.door.token()} | agent --token-file - 2>&-
        head -qn 1 {root}/credential; [ -e {SERVICE_DIR}/credential ] || echo none
        """).split("/\n")
    )  # fmt: skip
    assert first != renewed == again and (listed, own) == (["answered", "facts"], "none")
    assert member.door.beat(first).code == "credential-superseded"
    assert member.door.beat(new).status == 200 and new != renewed


@slow
@needs_root
def test_a_clone_of_a_machine_with_the_service_enrolls_with_the_same_token_or_is_sealed(
    service, machine
):
    """The service goes by its new credential, not by the renewals that were copied with it."""
    token = machine.door.token(maxUses=9)
    shown = service(f"""
        root=/var/lib/hostenroll-agent
        rm -f /etc/machine-id; echo {IDS[1]} >/etc/machine-id
        printf %s {token} | agent --install --token-file - 2>&-
        printf %s {token} | agent --token-file - || echo status $?
        install -o hostenroll-agent -m 600 $root/credential {SERVICE_DIR}/credential
        echo {IDS[2]} >/etc/machine-id
        echo /; printf %s {token} | agent --token-file -
        echo /; sed -n 2p $root/credential
        mkdir -p /var/lib/private/hostenroll-agent/service # of a service with DynamicUser=
        echo /; agent --seal; ls /var/lib/private; find $root
        echo /; agent --once || echo status $?
        """)  # fmt: skip
    again, enrolled, kept, sealed, after = re.split("^/\n", shown, flags=re.MULTILINE)
    assert "enrolled" not in again and again.endswith("status 1\n")
    assert [host["status"] for host in machine.hosts()] == ["online"] * 2
    assert f"enrolled as host {kept}" in enrolled and "goes on with the new" in enrolled
    folder = "/var/lib/hostenroll-agent"
    assert "sealed: " in sealed and sealed.endswith(f"\n{folder}\n{folder}/program\n")
    assert "status 1" in after and True not in copy_warnings(machine)


LEFT = {  # what an older version's service has left as its credential
    "its credential": "", "an upgrade was interrupted": "rm /var/lib/hostenroll-agent",
    "a FIFO": "rm $file; mkfifo $file",
    "a link to a secret": "ln -sf ../../secret $file", "a secret": "ln -f /var/lib/secret $file",
}  # fmt: skip


@slow
@needs_root
@pytest.mark.parametrize("change", table(LEFT))
def test_the_service_of_an_older_version_becomes_one_with_a_user(change, service, member):
    """Its folder was under /var/lib/private. What another user may have put there is not read."""
    file = "/var/lib/private/hostenroll-agent/credential"
    shown = service(f"""
        mkdir -p -m 700 /var/lib/private; mkdir -m 700 {os.path.dirname(file)}
        ln -s private/hostenroll-agent /var/lib/hostenroll-agent
        printf '[Service]\nDynamicUser=yes\n' >{UNIT_FILE}
        cp {member.state}/credential {file}; cp {file} /var/lib/secret
        file={file}; {change or ":"}; chown -Rh 61999 /var/lib/private/*
        printf %s het_1_x | agent --token-file - || echo status $?
        agent --install || echo status $?
        ls -A /var/lib/private; cat {UNIT_FILE}; stat -c '%U %a' /var/lib/hostenroll-agent
        """)  # fmt: skip
    calls = (member.folder / "calls").read_text().splitlines()
    name = "hostenroll-agent.service"
    if "hostenroll-agent" not in change:
        assert ", or for a service with --install\nstatus 1\n" in shown
    assert f"systemctl stop {name}" in calls
    if change and "hostenroll-agent" not in change:
        assert "no credential in " in shown and calls[1:] == [f"systemctl start {name}"]
    else:
        assert "\nUser=hostenroll-agent\n" in shown and "DynamicUser" not in shown
        assert shown.endswith("\nroot 711\n") and calls[-1] == f"systemctl restart {name}"


@slow
@needs_root
def test_where_nothing_makes_users_systemd_does(service, member):
    shown = service(f"""
        mkdir -m 700 /var/lib/hostenroll-agent /run/bin
        cp {member.state}/credential /var/lib/hostenroll-agent/
        for program in $(ls /usr/bin); do
            case $program in *user*) ;; *) ln -s /usr/bin/$program /run/bin/$program ;; esac
        done
        PATH={member.programs}:/run/bin; agent --install || cat {UNIT_FILE}
        """)  # fmt: skip
    assert "\nDynamicUser=yes\nLoadCredential=credential:/var/lib/hostenroll-agent/c" in shown
    assert "\nUser=" not in shown and " --state '/var/lib/hostenroll-agent/service' " in shown
    # As systemd hands it over. The folder is the service's, and not yet there.
    given, folder = member.folder / "given", "/var/lib/hostenroll-agent/service"
    given.mkdir()
    (given / "credential").write_text(member.stored())
    lines = f"""id() {{ echo 1234; }}; state={folder} given=''
        CREDENTIALS_DIRECTORY={given}; find_state; load_credential; echo "$credential" """
    assert in_agent(["sh"], member.folder, lines)[-1:] == [member.credential()]


@slow
def test_without_systemd_install_prints_a_line_for_cron_that_works(machine, tmp_path):
    machine.program("logger", f"cat >>{tmp_path}/logged")
    shown = in_a_new_root(machine, f"""
        printf %s {machine.door.token()} | agent --install --token-file - >/run/line
        cat /run/line; sh -c "$(sed 's/.* sleep [0-9]*; //' /run/line)"
        for every in 120 660 1800; do agent --install --every $every; done
        for every in 30 90 3600; do agent --install --every $every || echo status $?; done
        agent --uninstall
        ls /usr/local/sbin
        """)  # fmt: skip
    line = re.search(
        r"^\* \* \* \* \* sleep (\d+); sh /\S+ --server .* --once --every 60 2>.*$", shown, re.M
    )
    assert line is not None and 1 <= int(line[1]) <= 50 and "het_" not in line[0]
    for every, minutes in ((60, "*"), (120, "*/2"), (660, "*/11"), (1800, "*/30")):
        assert f"\n{minutes} * * * * sleep" in shown, every
        assert re.search(rf"--once --every {every} 2>", shown)
    assert shown.count("status 2") == 3
    assert (tmp_path / "logged").read_text() == ""
    assert machine.is_online()
    assert shown.splitlines()[-1].startswith("hostenroll-agent: uninstalled;")


# What is on a machine of what --install puts there.
INSTALLED = f"""installed() {{
    cd /; for file in {UNIT_FILE} usr/local/sbin/* etc/hostenroll-agent.pem run/x/*/* \
        var/lib/hostenroll-agent/*; do [ ! -f $file ] || cksum $file; done; cd - >/dev/null; }}"""
DEAD_ENDS = {  # that do not work: to the server, and what is said of each
    "nobody listens": ("https://127.0.0.1:9", "one", "no answer from https://127.0.0.1:9: "),
    "another key": ("https://127.0.0.1:{port}", "other", "no answer from .*pinned public key"),
    "another program": ("https://127.0.0.1:{other}", "one", r"unexpected .*404"),
    "another path": ("https://127.0.0.1:{port}/elsewhere", "one", r"unexpected .*404"),
}  # fmt: skip


@slow
@needs_root
@in_every_shell_slowly
def test_an_installed_agent_is_updated_without_a_token(service, machine, behind, tmp_path):
    """By a new script, too, and it keeps its credential; the same again changes nothing. What does
    not reach the server replaces nothing: not even the service is stopped."""
    with Middle(machine.door, tmp_path, *[answer_of("404 Not Found", b'{"a":1}')] * 9) as other:
        tries = "".join(
            f"echo; {shlex.join(machine.shell)} {machine.script} --install --server "
            f"{url.format(port=machine.port, other=other.port)} --pin '{pin_of(pair)}' 2>&1 || "
            "echo status $?; installed | cksum; "
            for url, pair, _ in DEAD_ENDS.values()
        )
        shown = service(f"""{INSTALLED}
            printf %s {machine.door.token()} | agent --install --token-file - 2>&-
            sed -i '1a# newer' {machine.script}
            agent --install --ask-again 77 --pin '{pin_of("other")};{pin_of("one")}'
            agent --install --ask-again 77 --pin '{pin_of("other")};{pin_of("one")}'
            cat {UNIT_FILE}; cmp {machine.script} /usr/local/sbin/hostenroll-agent
            echo; installed | cksum; {tries}""")  # fmt: skip
    _, before, *after = shown.split("\n\n")[-len(DEAD_ENDS) - 2 :]
    assert f" --ask-again 77 --pin '{pin_of('other')};{pin_of('one')}' " in shown
    name = "hostenroll-agent.service"
    calls = ["systemctl daemon-reload", f"systemctl enable {name}", f"systemctl restart {name}"]
    assert (tmp_path / "calls").read_text().splitlines() == calls * 2
    for text, (*_, why) in zip(after, DEAD_ENDS.values()):
        *said, status, same = text.splitlines()
        assert "nothing was changed" in said[-1] and status == "status 1", text
        assert re.search(f"^hostenroll-agent: .*{why}", text, re.MULTILINE), text
        assert same == before.strip()
    assert machine.is_online() and len(machine.door.events("action=enroll").document["events"]) == 1


@slow
@needs_root
def test_what_does_not_run_after_an_update_is_put_back(service, machine, tmp_path):
    """The service is denied what its unit needs: all is as before, and the old one runs."""
    machine.script.write_text(
        machine.script.read_text().replace("LONGEST_START=60", "LONGEST_START=1")
    )
    shown = service(f"""{INSTALLED}
        https_proxy=http://127.0.0.1:1 no_proxy='*'; export https_proxy no_proxy
        printf %s {machine.door.token()} | agent --install --token-file - 2>&-; installed
        echo; echo ask-again.77 >"$CALLS.denied"; sed -i '1a# newer' {machine.script}; >"$CALLS"
        unset https_proxy no_proxy; agent --install --ask-again 77 --prefix /run/x || echo status $?
        echo; installed; ls /etc/systemd/system
        """)  # fmt: skip
    before, said, after = shown.split("\n\n")
    assert after.splitlines() == [*before.splitlines(), "hostenroll-agent.service"]
    assert re.search(
        "no heartbeat of hostenroll-agent.service .ActiveState=.* Result=exit-code", said
    )
    assert said.endswith("everything is as it was before\nstatus 1")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[-2:] == ["systemctl daemon-reload", "systemctl restart hostenroll-agent.service"]
    assert (tmp_path / "calls.active").exists()


@slow
@needs_root
def test_a_service_that_does_not_start_is_installed_and_reported(service, machine, tmp_path):
    """With exit status 1, because nobody would look again; it goes on trying. The next one that
    works is an update."""
    machine.script.write_text(
        machine.script.read_text().replace("LONGEST_START=60", "LONGEST_START=1")
    )
    shown = service(f"""
        echo ExecStart >"$CALLS.denied"
        printf %s {machine.door.token()} | agent --install --token-file - || echo status $?
        ls {UNIT_FILE} /usr/local/sbin/*; ls -A /etc/systemd/system
        rm "$CALLS.denied"; agent --install && echo status 0; echo
        ls -A /etc/systemd/system /usr/local/sbin /var/lib/hostenroll-agent""")  # fmt: skip
    assert "Result=exit-code): it is installed and goes on trying; journalctl -u " in shown
    assert f"\nstatus 1\n{UNIT_FILE}\n/usr/local/sbin/hostenroll-agent\n" in shown
    assert "status 0\n" in shown and ".old" not in shown and ".try" not in shown
    assert machine.is_online()


@slow
@needs_root
def test_an_update_that_is_interrupted_puts_back_what_was_there(service, machine):
    machine.program("sleep", "kill -INT $PPID")
    shown = service(f"""{INSTALLED}
        printf %s {machine.door.token()} | agent --install --token-file - 2>&-; installed
        echo ask-again.77 >"$CALLS.denied"; echo
        agent --install --ask-again 77 || echo status $?
        echo; installed""")  # fmt: skip
    before, said, after = shown.split("\n\n")
    assert said.endswith("interrupted: everything is as it was before\nstatus 1"), shown
    assert after.strip() == before


@slow
@needs_root
@pytest.mark.parametrize("file", ["credential", "service/answered"])
def test_an_update_is_done_though_the_clock_has_been_set_since(file, service, machine):
    machine.write_script(LONGEST_START=3)
    when = "tomorrow" if file == "credential" else "yesterday"
    shown = service(f"""
        printf %s {machine.door.token()} | agent --install --token-file - 2>&-
        touch -d {when} /var/lib/hostenroll-agent/{file}
        agent --install && echo done""")  # fmt: skip
    assert shown.endswith("\ndone\n"), shown


@slow
@needs_root
def test_an_update_for_which_there_is_no_room_leaves_what_was_there(service, machine):
    shown = service(f"""{INSTALLED}
        printf %s {machine.door.token()} | agent --install --token-file - 2>&-; installed; echo
        mount -o remount,size=60k /usr/local
        sed -i '1a# newer' {machine.script}; agent --install || echo status $?
        echo; installed; ls /usr/local/sbin""")  # fmt: skip
    before, said, after = shown.split("\n\n")
    assert "cannot write /usr/local/sbin/hostenroll-agent" in said and "\nstatus 1" in said, said
    assert after.splitlines() == [*before.splitlines(), "hostenroll-agent"]


@slow
@needs_root
def test_an_update_that_was_killed_anywhere_is_done_by_the_next_one(service, machine):
    """The next one restarts the service: it may still run what was there before."""
    machine.program(
        "mv",
        f"""count=$(cat "$CALLS.count" 2>/dev/null); echo $((count - 1)) >"$CALLS.count"
        [ "$count" = 1 ] || exec {shutil.which("mv")} "$@"
        next=$PPID all=
        while tr '\\0' '\\n' </proc/$next/cmdline | grep -qx -e --install; do
            all="$next $all" next=$(cut -d ' ' -f 4 /proc/$next/stat); done
        kill -9 $all""",
    )
    shown = service(f"""
        printf %s {machine.door.token()} | agent --install --token-file - 2>&-
        for step in 1 2 3 4 5 6 7 8 9; do
            sed -i "1a# $step" {machine.script}; >"$CALLS"
            echo $step >"$CALLS.count"
            agent --install --ask-again 5$step 2>&- && status=0 || status=$?
            echo 0 >"$CALLS.count"; agent --install --ask-again 5$step 2>&-
            grep -q "ask-again 5$step" {UNIT_FILE}
            cmp {machine.script} /usr/local/sbin/hostenroll-agent
            echo $step $status $(grep -c '.*restart' "$CALLS" || :)
        done; ls /etc/systemd/system /usr/local/sbin /var/lib/hostenroll-agent""")  # fmt: skip
    steps = re.findall(r"(?m)^\d (\d+) (\d+)$", shown)
    killed = [restarts for status, restarts in steps if status == "137"]
    assert len(killed) > 4 and len(steps) == 9, shown
    assert set(killed) == {"1"} and ".old" not in shown, shown


@slow
@needs_root
def test_without_systemd_an_update_that_does_not_work_replaces_nothing(machine):
    shown = in_a_new_root(machine, f"""
        printf %s {machine.door.token()} | agent --install --token-file - >/run/line 2>&-
        sed -i '1a# newer' {machine.script}
        agent --install --pin '{pin_of("other")}' || echo status $?
        cmp -s {machine.script} /usr/local/sbin/hostenroll-agent || echo old
        agent --install && cmp {machine.script} /usr/local/sbin/hostenroll-agent && echo new
        agent --install --prefix /run/x 2>&-; agent --install 2>&-; ls /run/x/sbin /usr/local/sbin
        agent --uninstall 2>&-; ls /run/x/sbin; echo end""")  # fmt: skip
    assert re.search("nothing was changed.*\nstatus 1\nold\n", shown) and "\nnew\n" in shown
    assert shown.endswith("\n/run/x/sbin:\nhostenroll-agent\n\n/usr/local/sbin:\nend\n")


@slow
@needs_root
@pytest.mark.parametrize("answer, is_new", table({
    "too many": (answer_of("429 Too Many", b'{"code":"too-many-requests"}'), True),
    "busy": (answer_of("503 Busy", b'{"code":"storage-unavailable"}'), True),
    "busy, says a proxy": (answer_of("503 Busy", b"<html>"), False),
    "another path": (answer_of("404 Not Found", b'{"code":"not-found"}'), False),
}))  # fmt: skip
def test_an_update_goes_on_where_the_server_answers_though_it_is_busy(
    answer, is_new, machine, behind
):
    behind("pass", answer)
    shown = in_a_new_root(
        machine,
        f"""
        printf %s {machine.door.token()} | agent --install --token-file - >/run/line 2>&-
        sed -i '1a# newer' {machine.script}
        agent --install >/run/line 2>&1 && echo status 0 || echo status $?
        cmp -s {machine.script} /usr/local/sbin/hostenroll-agent && echo new || echo old""",
    )
    assert shown.endswith("status 0\nnew\n" if is_new else "status 1\nold\n"), shown


READ_ONLY = {  # folders, arguments; where the program is, or why it is not installed
    "/usr": ("/usr/local", "", "/var/lib/hostenroll-agent/hostenroll-agent"),
    "/usr, and another place": ("/usr/local", "--prefix /opt/x", "/opt/x/sbin/hostenroll-agent"),
    "nothing": ("", "--prefix /opt/x", "/opt/x/sbin/hostenroll-agent"),
    "the other place": ("/opt", "--prefix /opt/x", "cannot make the folder /opt/x/sbin"),
    "a place of others": ("", "--prefix /srv/theirs", "others can write in /srv/theirs/sbin"),
    "a place that is nowhere": ("", "--prefix x", "cannot install with x/sbin/hostenroll-agent"),
    "an odd place": ("", "--prefix '/opt/a b'", "cannot install with /opt/a b/sbin/"),
    "systemd's": ("/etc/systemd/system", "", "cannot write in /etc/systemd/system: no token"),
}  # fmt: skip


@slow
@needs_root
@pytest.mark.parametrize("folders, words, outcome", table(READ_ONLY))
@pytest.mark.parametrize("manager", ["systemd", "cron"])
def test_no_token_is_used_for_what_cannot_be_installed(
    folders, words, outcome, manager, service, machine
):
    lines = f"""mount -t tmpfs none /opt; mount -t tmpfs none /srv; mkdir /srv/theirs
        chown {STRANGER} /srv/theirs
        for folder in {folders}; do
            mount --bind $folder $folder; mount -o remount,bind,ro $folder; done
        printf %s {machine.door.token()} | agent --install {words} --token-file - || echo status $?
        find / -xdev -path /proc -prune -o -name 'hostenroll-agent*' -type f -print 2>&- || :
        find /opt /var/lib -name hostenroll-agent -type f; echo; agent --uninstall
        find /opt /var/lib -name hostenroll-agent -type f; find /opt /var/lib -name '*.try'"""
    shown = service(lines) if manager == "systemd" else in_a_new_root(machine, lines)
    if manager == "cron" and folders == "/etc/systemd/system":
        outcome = "/usr/local/sbin/hostenroll-agent"
    before, after = shown.split("\n\n")
    (token,) = machine.door.ask("GET", "/api/hosts/tokens").document["tokens"]
    if outcome.startswith("/"):
        assert "status" not in before and machine.hosts()
        assert outcome in before.splitlines() or "/usr/local" in outcome
        assert len(after.splitlines()) == 1 + (manager == "cron"), after  # it says so
    else:
        assert f"hostenroll-agent: {outcome}" in before and "\nstatus 1" in before, before
        assert (token["state"], machine.hosts()) == ("valid", [])


@slow
@needs_root
@pytest.mark.parametrize("kind, is_warned", [("tmpfs", True), ("ramfs", True), ("", False)])
def test_a_credential_on_a_ram_disk_is_warned_of(kind, is_warned, machine, tmp_path):
    machine.environment["HOME"] = str(tmp_path)
    state = tmp_path / "kept"
    state.mkdir()
    mount = f"mount -t {kind} none {state}" if kind else ":"
    shown = in_a_new_root(
        machine,
        f"""{mount}
        printf %s {machine.door.token()} | agent --install --state {state}/agent --token-file -""",
    )
    assert (f"{state}/agent is on a RAM disk" in shown) == is_warned, shown


# Proxies.


class Proxy(threading.Thread):
    """An HTTP proxy that asks for a password, and goes nowhere but to one port."""

    USER, PASSWORD = "u", 'p"w$x`\\y%z'

    def __init__(self, port):
        super().__init__(daemon=True)
        self.target, self.tunnels, self.refused = port, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        secret = "".join(f"%{ord(c):02X}" if c in '%\\"`' else c for c in self.PASSWORD)
        self.url = f"http://{self.USER}:{secret}@127.0.0.1:{self.listener.getsockname()[1]}"

    def run(self):
        given = base64.b64encode(f"{self.USER}:{self.PASSWORD}".encode())
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), peer, peer.makefile("rb") as stream:
                head = b"".join(itertools.takewhile(lambda line: line != b"\r\n", stream))
                if b"Basic %b\r\n" % given not in head:
                    self.refused += 1
                    peer.sendall(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n")
                    continue
                with socket.create_connection(("127.0.0.1", self.target)) as server:
                    peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                    self.tunnels += 1
                    self.relay(peer, server)

    @staticmethod
    def relay(*ends):
        while True:
            for end in select.select(ends, [], [], 20)[0]:
                data = end.recv(65536)
                if not data:
                    return
                ends[end is ends[0]].sendall(data)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.join(10)
        assert not self.is_alive()


@pytest.fixture
def walled(machine):
    """A machine that reaches its server by a proxy only: there is no such port on it."""
    with Proxy(machine.port) as proxy:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            machine.port = closed.getsockname()[1]
        machine.proxy = proxy
        yield machine


def environment_of(text):
    """What systemd makes of an EnvironmentFile (systemd.exec(5), and its env-file.c)."""
    lines = re.findall(r'^(\w+)="((?:[^"\\]|\\.)*)"$', text, re.MULTILINE)
    assert len(lines) == len(text.splitlines())
    return {name: re.sub(r'\\(["\\$`])', r"\1", value) for name, value in lines}


@slow
@needs_root
@pytest.mark.parametrize("manager", ["systemd", "cron"])
@pytest.mark.parametrize("how", ["environment", "option"])
def test_the_proxy_of_the_installation_is_the_services(how, manager, service, walled, tmp_path):
    """And its password is where root alone reads it."""
    if how == "environment":
        said = f"env https_proxy='{walled.proxy.url}' no_proxy='10.0.0.0/8,\"$x\\`'"
        words = ""
    else:
        said = "env https_proxy=http://127.0.0.1:1 NO_PROXY=127.0.0.1 no_proxy=127.0.0.1"
        words = f"--proxy '{walled.proxy.url}'"
    walled.program("logger", "cat")
    file, agent = "/var/lib/hostenroll-agent/proxy", shlex.join(walled.command()[:-2])
    run = service if manager == "systemd" else partial(in_a_new_root, walled)
    shown = run(f"""agent="{agent} --token-file -"
        printf %s {walled.door.token()} | {said} $agent --install {words} >/run/out 2>&1
        cat /run/out {UNIT_FILE} 2>/dev/null || :; echo --
        stat -c '%a %U' {file}; cat {file}; echo --
        sh -c "$(sed -n 's/.* sleep [0-9]*; //p' /run/out)"
        {agent} --token-file /dev/null || :
        {agent} --uninstall; ls {file} || echo none""")  # fmt: skip
    secret = walled.proxy.url.rpartition("@")[0]
    public, kept, end = shown.split("\n--\n")
    assert secret[-8:] not in public + end and "none\n" in end, shown
    first, text = kept.split("\n", 1)
    assert first == "600 root"
    proxies = {"all_proxy": walled.proxy.url} if how == "option" else {
        "https_proxy": walled.proxy.url, "no_proxy": '10.0.0.0/8,"$x\\`'}  # fmt: skip
    assert environment_of(text) == proxies
    assert walled.is_online() and walled.proxy.tunnels >= 2 and walled.proxy.refused <= 0


@slow
@in_every_shell_slowly
def test_a_proxy_that_is_named_is_gone_by(walled):
    """Whatever the environment says, and its password is in no argument of curl."""
    walled.environment.update(https_proxy="http://127.0.0.1:1", no_proxy="127.0.0.1", NO_PROXY="*")
    curl = shutil.which("curl")
    walled.program("curl", f'echo "$@" >>{walled.folder}/arguments; exec {curl} "$@"')
    walled.once("--proxy", walled.proxy.url, token=walled.door.token())
    assert walled.is_online() and walled.proxy.tunnels == 2
    assert "127.0.0.1:" in (arguments := (walled.folder / "arguments").read_text())
    assert walled.proxy.url[7:20] not in arguments


@in_every_shell_slowly
def test_what_lies_in_the_file_of_the_proxy_is_not_run(walled):
    """Others may be able to write in the folder of a user."""
    proxy, ran = walled.proxy.url, walled.folder / "ran"
    token = walled.door.token()
    walled.once("--proxy", proxy, token=token)
    (walled.state / "proxy").write_text(
        f"""a_proxy="$(echo >{ran})"\nx=`echo >{ran}`\nPATH="/"\nb_proxy=c; echo >{ran}\n"""
        + f"""all_proxy="{proxy}"\n"; echo >{ran}\n"""
    )
    walled.once()
    assert walled.proxy.tunnels == 3 and not ran.exists()


# Versions of systemd.


SYSTEMDS = {  # its version, and words that its unit has, and has not
    "219": ("ReadWriteDirectories=/var/lib/hostenroll-agent/service",
            "Type= StateDirectory= SystemCallFilter SystemCallErrorNumber"),
    "237": ("ReadWriteDirectories=/var/lib/hostenroll-agent/service",
            "Type= StateDirectory= SystemCallFilter SystemCallErrorNumber"),
    "239": ("ReadWriteDirectories= SystemCallFilter=@system-service", "Type= StateDirectory="),
    "240": ("Type=exec StateDirectory=hostenroll-agent/service SystemCallFilter=@system-service",
            "ReadWriteDirectories"),
    "257~rc1": ("Type=exec StateDirectory=hostenroll-agent/service", "ReadWriteDirectories"),
}  # fmt: skip


@slow
@needs_root
@pytest.mark.parametrize("version", SYSTEMDS)
def test_each_systemd_gets_the_words_that_it_knows(version, service, machine, tmp_path):
    machine.environment["SYSTEMD_VERSION"] = version
    shown = service(f"""
        printf %s {machine.door.token()} | agent --install --token-file - 2>&-
        stat -c '%a %U' {SERVICE_DIR}; cat {UNIT_FILE}
        systemd-analyze verify {UNIT_FILE} 2>&1 | grep hostenroll || :
        agent --seal 2>&-; exec >{tmp_path}/again 2>&1
        printf %s {machine.door.token()} | agent --token-file -
        """)  # fmt: skip
    assert "goes on with the new credential" in (tmp_path / "again").read_text()
    assert [host["status"] for host in machine.hosts()] == ["online"] * 2
    there, missing = (words.split() for words in SYSTEMDS[version])
    assert shown.startswith("700 hostenroll-agent\n[Unit]\n") and shown.endswith("user.target\n")
    assert [word for word in there if f"\n{word}" not in shown] == []
    assert [word for word in missing if f"\n{word}" in shown] == []
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str
    unit.read_string(shown.partition("\n")[2])
    assert unit["Unit"]["StartLimitIntervalSec"] == "0" and unit["Service"]["Restart"] == "always"


# The page.

PAGE = hostenroll.page()


def test_the_page_asks_at_the_place_where_it_is():
    """With or without a slash at its end, and never another host."""
    assert re.findall(r"\bfetch\((\w*)", PAGE) == ["PLACE"]
    assert not re.findall(r"""["'`]/[a-z]""", PAGE)
    if shutil.which("node") is None:
        pytest.skip("needs node")
    [line] = re.findall("^const PLACE = .*;$", PAGE, re.MULTILINE)
    paths = ["/", "/enroll", "/enroll/", "/a/enroll//", "//evil.test/"]
    location = "const location = {origin: 'https://h:1', pathname}"
    script = f"for (const pathname of {paths}) {{ {location}; {line} console.log(PLACE); }}"
    shown = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == [f"https://h:1{path.rstrip('/')}/" for path in paths]


def test_the_page_is_public_and_allows_only_its_own_script_and_style(world):
    reply = world.call("GET", "/")
    assert (reply.status, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert reply.document == PAGE
    assert reply.headers["referrer-policy"] == "no-referrer"
    texts = re.findall(r"<(?:style|script)[^>]*>(.*?)</(?:style|script)>", PAGE, re.DOTALL)
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    style, script = (f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    directives = reply.headers["content-security-policy"].split("; ")
    assert dict(directive.split(" ", 1) for directive in directives) == {
        "default-src": "'none'", "script-src": script, "style-src": style,
        "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'",
        "frame-ancestors": "'none'", "require-trusted-types-for": "'script'",
    }  # fmt: skip


def test_the_page_is_one_document_that_loads_nothing():
    loads = r"(?i)\b(?:https?|wss?|data|blob|javascript):|//\w|@import|url\("
    assert re.findall(loads, PAGE) == []
    markup = re.sub('"[^"]*"', '""', hostenroll.PAGE_MARKUP)
    tags = re.findall(r"<([a-z]\w*)([^<>]*)>", markup)
    assert len(tags) == len(re.findall("<[a-z]", markup))
    names = {name for name, _ in tags}
    assert {"dialog", "table"} & names == {"dialog"}  # the script makes the tables
    forbidden = r"link|img|iframe|object|embed|base|svg|video|script|style"
    assert [name for name in names if re.fullmatch(forbidden, name)] == []
    assert PAGE.count("<script") == PAGE.count("<style") == 1
    attributes = {name for _, text in tags for name in re.findall(r"\s([a-z-]+)", text)}
    forbidden = r"src|srcset|action|formaction|style|srcdoc|on.*"
    assert [name for name in attributes if re.fullmatch(forbidden, name)] == []


def test_the_page_cannot_make_markup_from_names_or_store_a_key_for_good():
    ways = (
        r"innerHTML|outerHTML|insertAdjacentHTML|setHTML|parseHTML|DOMParser|"
        r"createContextualFragment|document\.write|srcdoc|\beval\b|\bFunction\b|importScripts|"
        r"\.cssText|javascript:|localStorage|indexedDB|cookie|caches|location\.search|"
        r"history\.pushState|window\.name|setAttribute\(`on"
    )
    assert re.findall(ways, hostenroll.PAGE_SCRIPT) == []
    kept = re.findall(r"sessionStorage\.\w+\(([^,)]*)", hostenroll.PAGE_SCRIPT)
    assert set(kept) == {"KEY"}


def test_the_page_knows_every_status_state_and_action():
    def choices(name):
        options = hostenroll.PAGE_MARKUP.partition(f'<select name="{name}">')[2]
        return re.findall(r"<option>([\w-]+)<", options.partition("</select>")[0])

    assert choices("state") == list(hostenroll.TOKEN_STATES)
    assert choices("action") == list(hostenroll.ACTIONS)
    statuses = re.search(r"STATUSES = (\[.*?\]);", hostenroll.PAGE_SCRIPT)
    assert statuses and sorted(json.loads(statuses[1])) == sorted(hostenroll.STATUSES)
    assert f"ROWS_EXAMINED = {hostenroll.ROWS_EXAMINED};" in hostenroll.PAGE_SCRIPT
    for word in (*hostenroll.STATUSES, *hostenroll.TOKEN_STATES):
        assert re.search(rf"\.{word}[^{{]*{{ color: var\(", hostenroll.PAGE_STYLE), word


def test_everything_on_the_page_can_be_read():
    """WCAG 2.2, level AA: a contrast of 4.5 for text."""

    def luminance(colour):
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [n / 12.92 if n <= 0.04045 else ((n + 0.055) / 1.055) ** 2.4 for n in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        for block in hostenroll.PAGE_STYLE.split("prefers-color-scheme: dark", 1)
    )
    assert set(light) == set(dark)
    texts = ("text", "quiet", "accent", "danger", *hostenroll.STATUSES)
    pairs = [*itertools.product(texts, ("card", "ground", "sunk"))]
    pairs += [("text", "notice"), ("on-accent", "accent"), ("on-accent", "danger")]
    for colours, pair in itertools.product((light, dark), pairs):
        low, high = sorted(luminance(colours[name]) for name in pair)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (pair, colours)


# The page in a browser, by WebDriver (W3C) over HTTP.

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
CHROMIUM_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--window-size=1280,1000",
)  # fmt: skip
ESC, TAB, DOWN = "\ue00c", "\ue004", "\ue015"
HOLD = """const fetched = window.fetch, [method, part] = arguments;
  Object.assign(window, {held: [], late: 0});
  const isLate = () => setTimeout(() => { window.late += 1; });
  window.fetch = async (path, options) => {
    if (options.method !== method || !path.includes(part)) return fetched(path, options);
    const isAnswered = await new Promise((go) => { window.held.push(go); });
    if (!isAnswered) { isLate(); throw new TypeError("no answer"); }
    const response = await fetched(path, {...options, signal: null});
    const text = await response.text();
    response.text = async () => { isLate(); return text; };
    return response;
  };"""


class Browser:
    """A Chromium with an empty profile and one tab. In scripts $ finds an element, $$ all."""

    may_complain = False  # whether this test expects errors in the browser's log

    def __init__(self, folder):
        self.driver = subprocess.Popen(
            [str(DRIVER), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        started = (re.search(r"successfully on port (\d+)", line) for line in self.driver.stdout)
        self.base = f"http://127.0.0.1:{next(match[1] for match in started if match)}/session"
        options = {"binary": CHROMIUM, "args": [*CHROMIUM_FLAGS, f"--user-data-dir={folder}"]}
        always = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            session = self.ask("POST", "", {"capabilities": {"alwaysMatch": always}})
        except BaseException:
            self.close()
            raise
        self.base += f"/{session['sessionId']}"

    def ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.base + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(error.read().decode()[:500]) from None

    def close(self):
        with contextlib.suppress(AssertionError, OSError):
            self.ask("DELETE", "")
        self.driver.terminate()
        self.driver.wait(10)
        self.driver.stdout.close()

    def load_again(self):
        self.ask("POST", "/refresh", {})

    def open(self, url):
        """Load a page in a tab without a session."""
        self.ask("POST", "/url", {"url": url})
        self.run("sessionStorage.clear()")
        self.load_again()

    def sign_in(self, fleet, fragment="", key=""):
        self.open(f"{fleet.url}/{fragment}")
        self.type("#key", key or fleet.api_key)
        self.click("#sign-in button")
        self.see("!$('#signed-in').hidden")

    def run(self, script, *arguments):
        finders = "const $ = (s) => document.querySelector(s), "
        finders += "$$ = (s) => [...document.querySelectorAll(s)];"
        script = {"script": f"{finders} {script}", "args": list(arguments)}
        return self.ask("POST", "/execute/sync", script)

    def get(self, expression, *arguments):
        return self.run(f"return {expression}", *arguments)

    def see(self, expression, *arguments, seconds=30):
        """The value of an expression, as soon as it is true."""
        end = time.monotonic() + seconds
        while not (seen := self.get(expression, *arguments)):
            shown = time.monotonic() < end or f"{self.text('body')}\n{self.log()}"
            assert shown is True, f"{expression} of {arguments}\n{shown}"
            time.sleep(0.03)
        return seen

    def element(self, selector, text=""):
        """The first visible element with the text; it is scrolled to."""
        element = self.see(
            "$$(arguments[0]).find((e) => e.getClientRects().length && "
            "e.textContent.includes(arguments[1]))", selector, text,
        )  # fmt: skip
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        return next(iter(element.values()))

    def click(self, selector, text=""):
        self.ask("POST", f"/element/{self.element(selector, text)}/click", {})

    def type(self, selector, text):
        """Replace the text of a field."""
        self.ask("POST", f"/element/{self.element(selector)}/clear", {})
        self.ask("POST", f"/element/{self.element(selector)}/value", {"text": text})

    def submit(self, **fields):
        """Fill in some fields of the form, and send it."""
        for name, text in fields.items():
            self.type(f"#form [name={name}]", text)
        self.click("#form-go")

    def act(self, word, **fields):
        """One of the acts of the host that is shown: its button, and its form."""
        self.click("#host button", word)
        self.submit(**fields)

    def mint(self, view="#tokens", **fields):
        self.click(f"{view} [data-mint]")
        self.submit(**fields)

    def press(self, key):
        """Press one key, where the focus is."""
        strokes = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        keyboard = {"type": "key", "id": "keyboard", "actions": strokes}
        self.ask("POST", "/actions", {"actions": [keyboard]})

    def text(self, selector):
        return self.get("$(arguments[0]).innerText", selector)

    def is_open(self, dialog):
        return self.get("$(arguments[0]).open", dialog)

    def rows(self):
        """The first cell of each row of the hosts."""
        return self.get("$$('#hosts tbody tr').map((row) => row.cells[0].innerText)")

    def see_rows(self, count):
        self.see(f"$$('#hosts tbody tr').length === {count}")

    def search(self, text):
        self.type("#hosts [name=q]", text)

    def buttons(self):
        """The texts of the visible buttons."""
        seen = "$$('button').filter((button) => button.getClientRects().length)"
        return set(self.get(f"{seen}.map((button) => button.textContent)"))

    def show_host(self, number, name="web-1"):
        """Go to a host, as by a link."""
        self.run("location.hash = `#hosts?host=${arguments[0]}`", number)
        self.element("#host-name", name)
        self.element("#host-acts")

    def wake(self):
        """As when the tab becomes visible again: all polls are due."""
        self.run("document.dispatchEvent(new Event('visibilitychange'))")

    def hold(self, method, part):
        """Hold back the requests for some paths, until let_go()."""
        self.run(HOLD, method, part)

    def let_go(self, is_answered=True):
        """Answer the last request that is held back, or make it fail, and wait for the page."""
        self.see("window.held.length")
        late = self.run("held.pop()(arguments[0]); return late", is_answered)
        self.see("window.late > arguments[0]", late)

    def log(self):
        """New errors and warnings of the browser. A refusal by the server is not one of them."""
        entries = self.ask("POST", "/se/log", {"type": "browser"})
        messages = [entry["message"] for entry in entries]
        return [text for text in messages if "responded with a status of 4" not in text]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium):
    """The one browser, with nothing left of the test before. Its log must be empty at the end."""
    chromium.may_complain = False
    yield chromium
    log = chromium.log()
    chromium.ask("POST", "/url", {"url": "about:blank"})
    chromium.log()
    assert chromium.may_complain or log == []


def join_all(live, *names, **values):
    """Hosts with some names, enrolled with one token: their ids and credentials."""
    token = live.token(maxUses=len(names), **values)
    replies = [live.enroll(token, f"host-{n}", name=name) for n, name in enumerate(names)]
    return [(reply.document["hostId"], reply.document["credential"]) for reply in replies]


@pytest.fixture
def web_1(browser, live):
    """The id of a host, which the page shows."""
    ((number, _),) = join_all(live, "web-1")
    browser.sign_in(live)
    browser.show_host(number)
    return number


@contextlib.contextmanager
def many_hosts(paths, clock, count):
    """A server with hosts by SQL: the n-th is web-n with the id n << 8; every other has a label."""
    with World(paths, clock) as world:
        number, _ = world.join()
        for name, key in (("host", "id"), ("heartbeat", "host_id")):
            columns = [row[1] for row in world.sql(f"PRAGMA table_info({name})")]
            values = ", ".join("n << 8" if column == key else column for column in columns)
            world.sql(f"""INSERT INTO {name} WITH RECURSIVE counter(n) AS
                (VALUES (1) UNION ALL SELECT n + 1 FROM counter WHERE n < {count})
                SELECT {values} FROM counter, (SELECT * FROM {name} LIMIT 1)""")
        world.sql("""UPDATE host SET name = printf('web-%03d', id >> 8),
            labels = CASE WHEN id >> 8 & 1 THEN '{}' ELSE '{"rack":"b 5"}' END""")
        world.delete(number)
    with start_server(paths, clock=clock) as server:
        yield server


@slow
def test_the_key_stays_in_its_tab(browser, live):
    browser.open(live.url)
    for wrong in (live.token(), "hak_nonsense"):
        browser.type("#key", wrong)
        browser.click("#sign-in button")
        browser.see("$('#sign-in-problem').textContent")
        assert browser.get("sessionStorage.length") == 0
    browser.sign_in(live)
    browser.see_rows(0)
    browser.load_again()
    browser.search(live.api_key)
    browser.see("$('#hosts [name=q]').validationMessage")
    everywhere = browser.get("""{
      session: Object.entries(sessionStorage), local: localStorage.length,
      cookie: document.cookie, fields: $("#key").value,
      urls: [location.href, document.referrer, ...performance.getEntries().map((e) => e.name)],
      document: document.documentElement.outerHTML}""")
    assert everywhere.pop("session") == [["hostenroll.key", live.api_key]]
    assert (everywhere["local"], everywhere["cookie"]) == (0, "")
    assert live.api_key not in json.dumps(everywhere)
    browser.click("#sign-out")
    browser.element("#sign-in")
    assert browser.get("sessionStorage.length") == 0


@slow
def test_a_viewer_is_offered_no_changes_and_its_revoked_key_ends_the_session(browser, live):
    ((number, _),) = join_all(live, "web-1")
    live.mint()
    folder = Path(live.paths[0]).parent
    key = cli(folder, "mint-api-key", "--role", "viewer").stdout.strip()
    browser.sign_in(live, f"#hosts?q=web&host={number}", key)
    browser.element("#host .status", "pending")
    offered = browser.buttons()
    browser.press(ESC)
    browser.click("nav a", "Tokens")
    browser.element("#tokens .status", "valid")
    offered |= browser.buttons()
    assert {"Close", "Sign out", "Next"} <= offered
    assert not {"Mint a token", "Revoke", "Restore", "Re-enroll", "Edit", "Delete"} & offered
    browser.click("nav a", "Hosts")
    browser.click("#hosts a", "web-1")
    browser.element("#host-facts", "host-0")
    cli(folder, "revoke-api-key", key.split("_")[1])
    browser.wake()
    browser.element("#sign-in")
    assert "has been revoked" in browser.text("#sign-in-problem")
    shown = browser.get("document.documentElement.outerHTML")
    assert "web-1" not in shown and "host-0" not in shown
    assert browser.get("sessionStorage.length") == 0


@slow
def test_a_fleet_is_counted_searched_filtered_and_paged(browser, paths, clock):
    with many_hosts(paths, clock, 270) as fleet:
        fleet.revoke(join_all(fleet, "web-999")[0][0])
        for view in ("toString", "constructor", "__proto__", "nonsense", ""):
            browser.sign_in(fleet, f"#{view}")
            browser.see_rows(100)
        browser.see("$('#fleet').innerText.startsWith('271')")
        counts = " ".join(browser.text("#fleet").split())
        assert counts == "271 all hosts 0 online 0 offline 0 missing 270 pending 1 revoked"
        seen = browser.rows()
        assert len(seen) == 100 and browser.text("#hosts .pager span") == "hosts 1 to 100"
        for position in ("hosts 101 to 200", "hosts 201 to 271, the end of the list"):
            browser.click("#hosts .pager button", "Next")
            browser.element("#hosts .pager span", position)
            seen += browser.rows()
        assert len(seen) == len(set(seen)) == 271
        browser.click("#hosts .pager button", "Previous")
        browser.element("#hosts .pager span", "hosts 101 to 200")
        assert browser.rows() == seen[100:200]
        browser.search('web-01 rack="b 5"')
        browser.see_rows(5)
        assert [name[:7] for name in browser.rows()] == [f"web-01{n}" for n in (8, 6, 4, 2, 0)]
        browser.search("nowhere")
        browser.element("#hosts .empty", "No host matches.")
        browser.search("")
        browser.see_rows(100)
        browser.click("#fleet button", "revoked")
        browser.see_rows(1)
        assert browser.rows()[0].startswith("web-999")
        assert "status=revoked" in browser.get("location.hash")
        browser.load_again()
        browser.see_rows(1)
        browser.ask("POST", "/back", {})
        browser.see_rows(100)
        browser.search("web")  # and leave before the page has searched
        browser.click("nav a", "Audit")
        browser.run("setTimeout(() => { window.later = 1; }, 600)")
        browser.see("window.later")
        assert browser.get("location.hash") == "#audit"
        browser.element("#audit tr", "enroll")
        assert browser.get("$$('#audit .problem').length") == 0
        browser.type("#audit [name=code]", "token-used")
        browser.see("location.hash === '#audit?code=token-used'")


@slow
def test_a_long_search_continues_by_itself_and_can_be_stopped(browser, paths, clock):
    with many_hosts(paths, clock, 9000) as fleet:
        browser.sign_in(fleet)
        browser.see("$('#fleet').innerText.startsWith('9,000')")
        browser.hold("GET", "q=nowhere")
        browser.search("nowhere")
        browser.let_go()
        browser.let_go()
        browser.see("held.length")
        assert "Looked at about 2,000 of 9,000 hosts ..." in browser.text("#hosts .pager")
        browser.click("#hosts .pager button", "Stop")
        browser.let_go()
        assert "Looked at about 2,000 of 9,000 hosts." in browser.text("#hosts .pager")
        browser.click("#hosts .pager button", "Continue")
        for _ in range(7):
            browser.let_go()
        browser.element("#hosts .empty", "No host matches.")
        assert browser.get("held.length") == 0
        # A newer search does not wait for an older one, and does not show its answer.
        browser.search("nowhere ")
        browser.see("held.length")
        browser.search(hostenroll.id_text(8999 << 8))
        browser.see_rows(1)
        browser.element("#hosts .pager", "1 host")
        browser.run("""new MutationObserver(() => { window.touched = 1; }).observe(
          $("#hosts tbody"), {childList: true});""")
        browser.let_go()
        assert not browser.get("window.touched")
        assert [name.split()[0] for name in browser.rows()] == ["web-8999"]


@slow
def test_a_host_shows_its_reason_and_is_revoked_restored_edited_and_deleted(browser, live):
    labels = {"note": "  two  words ", "rack": "b4"}
    ((number, credential),) = join_all(live, "web-1", labels=labels)
    live.beat(credential, os="Debian 13", architecture="x86_64")
    browser.sign_in(live)
    browser.click("#hosts a", "web-1")
    browser.element("#host-why", "Last seen ")
    assert f"host={number}" in browser.get("location.hash")
    facts = browser.text("#host-facts")
    assert all(text in facts for text in ("Debian 13, x86_64", "rack=b4", number, "ago"))
    browser.element("#host-events li", "enroll")
    browser.act("Revoke")
    browser.element("#host-why", "Revoked at ")
    assert live.host(number).document["status"] == "revoked"
    browser.element("#host-events li", "revoke")
    browser.element("#hosts .status", "revoked")
    browser.click("#host button", "Restore")
    browser.press(ESC)  # changes nothing, and the host stays open
    assert live.host(number).document["status"] == "revoked"
    browser.act("Restore")
    browser.element("#host-why", "Last seen ")
    # What was edited is changed, and nothing else.
    browser.act("Edit", labels="rack")
    browser.element("#form-problem", "name=value")
    browser.click("#form [data-close]")

    def edit(**fields):
        """Edit the host; the details of an operator's edits in the audit log, newest first."""
        browser.act("Edit", name="web-2", **fields)
        browser.see("!$('#form').open")
        browser.element("#host-name", "web-2")
        details = [it["detail"] for it in live.events("action=edit").document["events"]]
        return [detail for detail in details if "facts" not in detail]

    assert edit() == edit() == [{"name": "web-2"}]
    assert live.host(number).document["labels"] == labels
    edits = edit(labels="note=  two  words \n site = x=y \n\nrack=b 5")
    assert edits[0] == {"labels": {"note": "  two  words ", "site": "x=y", "rack": "b 5"}}
    assert edit(labels="")[0] == {"labels": {}}
    browser.act("Delete", name="web-1")
    browser.element("#form-problem", "Nothing was deleted")
    browser.submit(name="web-2")
    browser.see("!$('dialog[open]')")
    assert live.host(number).status == 404
    browser.element("#hosts .empty")
    assert "host=" not in browser.get("location.hash")


def shown_token(browser):
    return browser.text("#join").partition("printf %s ")[2].split()[0]


@slow
@needs_curl
def test_a_token_is_minted_and_its_command_runs_as_it_is_shown(browser, live, tmp_path):
    cli(tmp_path, "add-org", "berlin")
    browser.sign_in(live, "#tokens")
    browser.see("$$('[name=organization] option').length === 6")
    browser.mint(maxUses="2", labels="=b4")
    browser.element("#form-problem", "labels")
    browser.see("$('#form [name=labels]').ariaInvalid === 'true'")
    browser.run("$('#form [name=organizationId]').value = 'berlin'")
    browser.submit(labels="rack=b4", description="the cellar")
    command = browser.see("$('#join').textContent")
    token = browser.get("$('#token').textContent")
    assert command == hostenroll.join_command(live.url, "", token).replace("\n ", "")
    assert browser.get("document.activeElement.textContent") == "Copy the command"
    browser.element("#arrivals", "It has not been used yet.")
    for clipboard, message, copied in (
        ("{writeText: async (text) => { window.copied = text; }}", "Copied.", "window.copied"),
        ("undefined", "press Ctrl+C.", "getSelection().toString()"),
    ):
        definition = f"{{value: {clipboard}, configurable: true}}"
        browser.run(f"Object.defineProperty(navigator, 'clipboard', {definition})")
        browser.click("#secret button", "Copy the command")
        browser.element("#copied", message)
        assert browser.get(copied) == command
    # Only the agent's own folder, and one heartbeat, are added.
    run_alone(["sh", "-c", f"{command} --state agent --once"], tmp_path)
    browser.wake()
    (host,) = live.hosts().document["hosts"]
    expected = {"organizationId": "berlin", "labels": {"rack": "b4"}, "status": "online"}
    assert {**host, **expected} == host
    browser.element("#arrivals", "Used 1 of 2 times, last from 127.0.0.1.")
    browser.click("#secret button", "Done")
    assert token not in browser.get("document.documentElement.outerHTML + location.href")
    assert browser.get("sessionStorage.length") == 1
    browser.element("#tokens tr", "the cellar")
    browser.click("#tokens td button", "Revoke")
    browser.submit()
    browser.element("#tokens .status", "revoked")
    assert live.show_token(token.split("_")[1]).document["state"] == "revoked"
    browser.click("nav a", "Hosts")
    browser.click("#hosts a")
    browser.act("Re-enroll")
    browser.see("$('#join').textContent")
    reply = live.enroll(shown_token(browser), host["hostname"])
    assert reply.document["hostId"] == host["id"]


NAMES = (
    "<img src=x onerror=alert(1)>", "'\"><script>alert(1)</script>", "</style><script>alert(1)//",
    "javascript:alert(1)", "&lt;b&gt;&amp;", "${alert(1)}", "a <!-- b", "\U0001f600 ünï",
)  # fmt: skip


@slow
def test_names_are_never_markup_and_the_policy_stops_what_would_be(browser, live):
    labels = {f"k{n}": name for n, name in enumerate(NAMES)}
    hosts = join_all(live, *NAMES, labels=labels, description=NAMES[0])
    live.beat(hosts[0][1], os=NAMES[0], architecture=NAMES[1])
    browser.sign_in(live)
    browser.see_rows(len(NAMES))
    links = browser.get("$$('#hosts th a').map((link) => link.textContent)")
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
    counts = browser.get("['script', 'img', 'b > *', '[onerror]'].map((s) => $$(s).length)")
    assert (counts, browser.log()) == ([1, 0, 0, 0], [])
    browser.may_complain = True
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
def test_the_page_updates_itself_and_keeps_focus_and_selection(browser, live, clock):
    ((_, credential),) = join_all(live, "web-1")
    clock.advance(1)
    ((number, _),) = join_all(live, "web-2")
    browser.sign_in(live)
    browser.element("#hosts a", "web-1")
    browser.press("/")
    assert browser.get("document.activeElement.name") == "q"
    for _ in range(9):  # as far as the rows
        if browser.get("document.activeElement.closest('tbody') === null"):
            browser.press(TAB)
    browser.press(DOWN)
    browser.run("getSelection().selectAllChildren(document.activeElement.closest('th'))")
    live.revoke(number)
    live.beat(credential)
    browser.see("$('#hosts tbody').innerText.includes('revoked')")
    browser.see("$('#announcer').textContent.includes('web-1 is online.')")
    kept = browser.get("[document.activeElement.textContent, getSelection().toString()]")
    assert kept[0] == "web-1" and kept[1].startswith("web-1")


@slow
def test_a_form_changes_the_host_that_it_was_opened_for(browser, live):
    """The back button shows another host behind the form."""
    (one, _), (two, _) = join_all(live, "web-1", "web-2")
    browser.sign_in(live)
    for word, name, typed in (
        ("Re-enroll", "web-2", {}), ("Edit", "web-2", {"name": "web-3"}),
        ("Delete", "web-3", {"name": "web-3"}),
    ):  # fmt: skip
        browser.show_host(one)
        browser.show_host(two, name)
        browser.click("#host button", word)
        browser.run("history.back()")
        browser.see("$('#host-name').textContent === 'web-1'")
        browser.submit(**typed)
        browser.see("!$('#form').open")
        assert browser.text("#host-name") == "web-1" and browser.is_open("#host")
        if word == "Re-enroll":
            assert browser.text("#secret-title") == "Re-enroll web-2"
            token = shown_token(browser)
            assert live.show_token(token.split("_")[1]).document["hostId"] == two
            browser.click("#secret button", "Done")
        if word == "Edit":
            assert live.host(two).document["name"] == "web-3"
    assert (live.host(one).status, live.host(two).status) == (200, 404)


@slow
def test_a_late_answer_changes_nothing_that_was_opened_since(browser, live, web_1):
    browser.hold("GET", f"api/hosts/{'0' * 16}")
    browser.run("location.hash = `#hosts?host=${arguments[0]}`", "0" * 16)
    browser.see("held.length")
    browser.show_host(web_1)
    browser.let_go()  # a 404
    assert browser.text("#host-name") == "web-1"
    browser.hold("POST", "/revoke")
    for name, is_answered in (("web-2", False), ("web-3", True)):
        browser.act("Revoke")
        browser.see("held.length")
        browser.click("#form [data-close]")
        browser.click("#host button", "Edit")
        browser.see("!$('#form-go').disabled", seconds=5)
        browser.type("#form [name=name]", name)
        browser.let_go(is_answered)
        assert browser.is_open("#form") and browser.text("#form-problem") == ""
        browser.submit()
        browser.element("#host-name", name)
        changed = live.host(web_1).document
        assert (changed["name"], changed["status"] == "revoked") == (name, is_answered)
    # The answer to one form does not let another be sent twice.
    browser.hold("POST", "/restore")
    for forms in (1, 2):
        browser.act("Restore")
        browser.see("held.length === arguments[0]", forms)
        if forms == 1:
            browser.click("#form [data-close]")
    browser.run("held.shift()(false)")
    browser.see("late === 1")
    assert browser.get("$('#form-go').disabled")
    browser.let_go()
    browser.see("!$('#form').open")


@slow
def test_a_late_token_is_not_shown_in_another_form_nor_its_use(browser, live):
    for method, path in (("GET", "api/service"), ("POST", "api/hosts/tokens")):
        browser.sign_in(live, "#tokens")
        browser.element("#tokens .empty", "No tokens yet.")
        browser.hold(method, path)
        browser.mint()
        browser.see("held.length")
        browser.click("#form [data-close]")
        browser.click("#tokens [data-mint]")
        browser.type("#form [name=description]", "the cellar")
        browser.let_go()
        assert browser.is_open("#form") and not browser.is_open("#secret")
        minted = live.ask("GET", "/api/hosts/tokens").document["tokens"]
        assert len(minted) == (method == "POST")  # it is in the list, and can be revoked
        browser.click("#form [data-close]")
    browser.element("#tokens .status", "valid")
    browser.load_again()
    browser.hold("GET", "api/hosts/tokens/")
    for is_first in (True, False):
        browser.mint()
        browser.see("$('#secret').open && held.length === 1")
        if is_first:
            live.enroll(shown_token(browser))
            browser.click("#secret button", "Done")
    browser.let_go()
    assert browser.text("#arrivals") == ""


@slow
@pytest.mark.parametrize("status", [200, 503, 0], ids=["answered", "failed", "silent"])
def test_a_page_takes_at_most_a_tenth_of_the_servers_time(status, browser, live):
    browser.may_complain = True
    browser.sign_in(live)
    browser.element("#hosts .empty", "No hosts yet.")
    browser.see("$('#fleet').innerText.startsWith('0')")
    # The page's clock stands still, except that each answer takes 3 s. Other requests than those
    # for the list have no answer from now on: one would take the banner of trouble away.
    browser.run("""const [status] = arguments;
        Object.assign(window, {time: performance.now() + 9000, lists: 0, late: 0, turns: 0});
        performance.now = () => window.time;
        Object.defineProperty(document, "hidden", {get: () => { window.turns += 1; }});
        window.fetch = async (path, options) => {
          if (!path.includes("/api/hosts?")) return new Promise(() => {});
          window.lists += 1;
          await new Promise((go) => setTimeout(go, 20));
          window.time += 3000;
          setTimeout(() => { window.late += 1; });
          if (!status) throw new TypeError("no answer");
          const type = status === 200 ? "application/json" : "application/problem+json";
          const response = new Response("", {status, headers: {"Content-Type": type}});
          response.text = async () => `{"hosts": [], "title": "Busy", "status": ${status}}`;
          return response;
        };""", status)  # fmt: skip
    browser.see("late === 1")
    if status != 200:
        browser.element("#trouble", "Busy" if status else "No answer")
    turns = browser.run("window.time += 29000; return window.turns")
    browser.see("turns > arguments[0]", turns)
    assert browser.get("lists") == 1
    browser.run("window.time += 2000")
    browser.see("lists === 2")


ODD_VALUES = (
    'say "hi" x', '"hi"', '"', '""', '" "', "", " ", " b 5 ", "a\\b c\\", 'a\\" b', 'x="y z"',
    "b=5", 'b" c="d',
)  # fmt: skip


@slow
def test_a_label_leads_to_the_hosts_that_have_it(browser, live):
    hosts = [join_all(live, f"web-{n}", labels={"note": v})[0] for n, v in enumerate(ODD_VALUES)]
    browser.sign_in(live)
    for n, (number, _) in enumerate(hosts):
        browser.show_host(number, f"web-{n}")
        browser.click("#host-facts a", "note=")
        browser.see("!$('#host').open && $('#hosts table').ariaBusy === 'false'")
        assert [row.split()[0] for row in browser.rows()] == [f"web-{n}"], ODD_VALUES[n]


@slow
def test_the_page_outlives_the_server(browser, tmp_path):
    browser.may_complain = True
    with start_server(tmp_path, how="process") as server:
        join_all(server, "web-1")
        browser.sign_in(server)
        browser.element("#hosts a", "web-1")
        assert server.terminate() == 0
    browser.wake()
    browser.element("#trouble", "No answer from the server since ")
    assert "web-1" in browser.text("#hosts")
    browser.run("$('#hosts a').focus()")
    with start_server(tmp_path, "--port", str(server.port), how="process") as again:
        join_all(again, "web-2")
        browser.element("#hosts a", "web-2")
        browser.see("$('#trouble').hidden")
        assert browser.get("document.activeElement.textContent") == "web-1"


# 9. Operations

ENROLL_PATH, BEAT_PATH = "/api/agent/enroll", "/api/agent/heartbeat"
TOKENS_PATH, HOST_PATH = "/api/hosts/tokens", "/api/hosts/{id}"
UNKNOWN_ID, GONE = "0" * 16, "/api/hosts/" + "0" * 16
NOON_TEXT = "2027-01-15T08:00:00.000Z"
HTTP_OPERATIONS = hostenroll.HTTP_OPERATIONS
USER_OPERATIONS = [row for row in HTTP_OPERATIONS if row.caller in ("admin", "viewer", "owner")]
each_operation = partial(pytest.mark.parametrize, "operation", ids=lambda row: row.name)


class Estate(World):
    """A world with one token, one host, and every kind of caller."""

    def __init__(self, paths, clock):
        super().__init__(paths, clock)
        self.act("add-org", name="berlin")
        registry, key = self.registry, self.api_key
        self.callers = {
            "owner": key,
            "admin": make_api_key(registry, clock, "default"),
            "viewer": make_api_key(registry, clock, "default", "viewer"),
            "stranger": make_api_key(registry, clock, "berlin"),
            "none": None,
            "junk": "hak_junk",
            "forged": key[:-9] + "AB"[key[-9] == "A"] + key[-8:],
            "revoked": make_api_key(registry, clock),
            "spare": make_api_key(registry, clock, "default"),
        }
        self.act("revoke-api-key", self.key_id("revoked"))
        self.minted = self.mint(maxUses=2, labels={"rack": "b4"}, description="cellar").document
        self.token_id, self.callers["token"] = self.minted["id"], self.minted["token"]
        enrolled = self.enroll(self.minted["token"]).document
        self.host_id, self.credential = enrolled["hostId"], enrolled["credential"]
        self.callers["credential"] = self.credential

    def key_id(self, caller):
        return self.callers[caller].split("_")[1]

    def path(self, template):
        """A path with an id that exists."""
        ids = {"tokens": self.token_id, "hosts": self.host_id, "keys": self.key_id("spare")}
        kind = next((kind for kind in ids if kind in template), "hosts")
        return template.replace("{id}", ids[kind])

    def call_as(self, caller, method, path, body=None):
        return self.call(method, path, body, self.callers[caller])

    def read_as(self, caller, path):
        return self.call_as(caller, "GET", path).document


@pytest.fixture
def estate(paths, clock):
    with Estate(paths, clock) as estate:
        yield estate


# The rows.

ORDER = {
    "the method before the path": ("none", "FOO", "/api/nothing", b"{", "not-implemented"),
    "a method in small letters": ("none", "get", "/healthz", None, "not-implemented"),
    "a method of WebDAV": ("none", "PROPFIND", "/healthz", None, "not-implemented"),
    "a method with a hyphen": ("none", "M-SEARCH", "/healthz", None, "not-implemented"),
    "the path before what it allows": ("none", "PUT", "/api/nothing?x=1", b"{", "not-found"),
    "the method before the key": ("none", "PUT", "/api/hosts?x", b"{", "method-not-allowed"),
    "the key before the role": ("junk", "POST", TOKENS_PATH + "?x=1", b"{", "api-key-invalid"),
    "the role before the query": ("viewer", "POST", TOKENS_PATH + "?x=1", b"{}", "forbidden"),
    "the key before the body": ("junk", "POST", TOKENS_PATH, b"{", "api-key-invalid"),
    "the role before the body": ("viewer", "POST", TOKENS_PATH, b"{", "forbidden"),
    "the role before the object": ("viewer", "DELETE", GONE, None, "forbidden"),
    "the query before the object": ("owner", "GET", GONE + "?x=1", None, "invalid-query"),
    "the body before the object": ("owner", "PATCH", GONE, {"x": 1}, "invalid-body"),
    "the object last": ("owner", "PATCH", GONE, {}, "not-found"),
    "an id of no shape is not found": ("owner", "GET", "/api/hosts/none", None, "not-found"),
    "a credential before the body": ("none", "POST", BEAT_PATH, b"{", "credential-missing"),
    "a bad one before the body": ("owner", "POST", BEAT_PATH, b"{", "credential-invalid"),
    "a good one, then its brackets": ("credential", "POST", BEAT_PATH, b"[" * 9, "invalid-body"),
    "a good one, then the body": ("credential", "POST", BEAT_PATH, b"{", "invalid-body"),
    "at enrollment the body": ("none", "POST", ENROLL_PATH, {"token": "junk"}, "invalid-body"),
    "a token last": ("none", "POST", ENROLL_PATH, {"token": "x", "hostname": "a"}, "token-unknown"),
}  # fmt: skip


@pytest.mark.parametrize("caller, method, path, body, code", table(ORDER))
def test_the_order_of_refusals(caller, method, path, body, code, estate):
    assert estate.call_as(caller, method, path, body).code == code


def require_common_headers(reply):
    """No answer is stored, sniffed or open to other sites."""
    assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} [\d:]{8} GMT", reply.headers["date"])
    required = {"x-content-type-options": "nosniff", "cache-control": "no-store"}
    assert required.items() <= reply.headers.items()
    assert not [name for name in reply.headers if re.match("access-control|.*cookie|server$", name)]


def test_head_is_get_without_the_body(live):
    minted, (host, credential) = live.mint(), live.join()
    replies = [minted, live.beat(credential), live.revoke_token("none")]
    for path in [row.path for row in HTTP_OPERATIONS if row.method == "GET"]:
        path = path.replace("{id}", minted.document["id"] if "tokens" in path else host)
        got = live.ask("GET", path)
        replies.append(got)
        with live.connect() as peer, peer.makefile("rb") as stream:
            # A body after the head would stand where the second answer is read.
            peer.sendall(request_bytes("HEAD", path, bearer=live.api_key) * 2)
            for _ in range(2):
                head = read_reply(stream, head_only=True)
                assert (head.status, head.document) == (200, None)
                moving = {"date": "", **({"content-length": ""} if path == "/metrics" else {})}
                assert {**head.headers, **moving} == {**got.headers, **moving}
    refused, options = live.call("HEAD", "/api/hosts"), live.call("OPTIONS", "/healthz")
    assert refused.status == 401 and int(refused.headers["content-length"]) > 0
    assert (options.status, options.document) == (204, None)
    assert "content-length" not in options.headers  # RFC 9110 section 8.6
    for reply in (*replies, refused, options, live.enroll(minted.document["token"])):
        require_common_headers(reply)


@pytest.mark.parametrize("path", [*sorted({row.path for row in HTTP_OPERATIONS}), "*"])
def test_every_path_names_the_methods_that_it_allows(path, world):
    methods = {row.method for row in HTTP_OPERATIONS if path in ("*", row.path)}
    allowed = methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())
    target = path.replace("{id}", UNKNOWN_ID)
    options = world.call("OPTIONS", target)
    assert (options.status, options.document) == (204, None)
    assert sorted(options.headers["allow"].split(", ")) == sorted(allowed)
    for method in () if path == "*" else {*hostenroll.METHODS} - allowed:
        refused = world.call(method, target)
        require_declared(refused, [hostenroll.MethodNotAllowed])
        assert refused.headers["allow"] == options.headers["allow"]


def test_an_unknown_path_is_not_found(estate):
    for method, path in itertools.product(("GET", "PUT", "OPTIONS"), (
        "/nothing", "/api", "/api/hosts/", "/api/hosts//", "//healthz", "/healthz/", "/HEALTHZ",
        "/api/hosts/../hosts", "/api/hosts/%2e%2e", "/%68ealthz", "/api/hosts/{id}/tokens",
        "/api/hosts/tokens/{id}/revoke", "/api/hosts;x/tokens", "/api/hosts//revoke",
    )):  # fmt: skip
        known = path == "/api/hosts/%2e%2e" and method != "GET"  # there may be such an id
        reply = estate.call_as("owner", method, estate.path(path))
        assert known or (reply.status, reply.code) == (404, "not-found"), path


def require_declared(reply, kinds):
    """The reply is what one of these kinds of problems declares."""
    kind = next(kind for kind in kinds if kind.code == reply.code)
    hostenroll.problem_schema(kind).check(reply.document)
    assert reply.status == kind.status
    assert {name.lower() for name, _ in kind().headers()} <= set(reply.headers)
    assert reply.headers["content-type"] == "application/problem+json"
    assert ("www-authenticate" in reply.headers) == (reply.status == 401)
    assert ("allow" in reply.headers) == (reply.status == 405)
    assert reply.document["detail"].endswith(".")


# Documents: exactly these members, no more and no fewer.


def test_tokens_and_hosts_have_exactly_their_members(estate, clock):
    token = {
        "id": estate.token_id, "organizationId": "default", "state": "valid", "hosts": [],
        "description": "cellar", "hostname": None, "hostId": None, "labels": {"rack": "b4"},
        "maxUses": 2, "uses": 0, "createdAt": NOON_TEXT, "usedAt": None, "usedFrom": None,
        "createdBy": f"api-key:{estate.key_id('owner')}", "expiresAt": "2027-01-15T09:00:00.000Z",
        "revokedAt": None, "intervalSeconds": None,
    }  # fmt: skip
    assert estate.minted == {**token, "token": estate.callers["token"]}
    token.update(uses=1, usedAt=NOON_TEXT, usedFrom=ADDRESS, hosts=[estate.host_id])
    assert estate.show_token(estate.token_id).document == token
    assert estate.ask("GET", TOKENS_PATH).document == {"tokens": [token], "nextCursor": None}
    shown = estate.host(estate.host_id).document
    host = {
        "id": estate.host_id, "organizationId": "default", "name": "web-1", "hostname": "web-1",
        "os": "", "architecture": "", "dockerVersion": "", "agentVersion": "", "everySeconds": None,
        "labels": {"rack": "b4"}, "intervalSeconds": None, "status": "pending",
        "statusReason": shown["statusReason"],
        "enrolledAt": NOON_TEXT, "lastSeen": None, "address": None, "addressSince": None,
        "enrolledFrom": ADDRESS, "tokenId": estate.token_id, "revokedAt": None, "refusedAt": None,
        "refusedCode": None, "warnings": [],
    }  # fmt: skip
    assert list(shown.items()) == list(host.items())
    odd, later = '"\\/</script>\u00e9\U0001f600{}', "2027-01-15T08:00:01.234Z"
    facts = {fact.name: f"{fact.name} {odd}" for fact in hostenroll.FACTS}
    facts["everySeconds"] = 60
    changes = {"name": f"name {odd}", "labels": {"k": odd}, "intervalSeconds": 300}
    clock.advance(1.234)
    estate.beat(estate.credential, **facts)
    estate.ask("PATCH", f"/api/hosts/{estate.host_id}", changes)
    revoked = estate.revoke(estate.host_id).document
    reason = revoked["statusReason"]
    host.update(status="revoked", statusReason=reason, lastSeen=later, revokedAt=later)
    host.update(address=ADDRESS, addressSince=later)
    assert revoked == {**host, **facts, **changes}
    assert estate.hosts().document == {"hosts": [revoked], "nextCursor": None}


def test_a_secret_is_shown_once(estate):
    """No list, host, refusal or second look shows it again."""
    secrets = [text for name, text in estate.callers.items() if text and name != "junk"]
    gets = [estate.path(row.path) for row in USER_OPERATIONS if row.method == "GET"]
    shown = [estate.read_as("owner", path) for path in gets]
    shown.append(estate.enroll(estate.minted["token"] + "x").document)
    shown.append(estate.read_as("forged", "/api/me"))
    assert [text for text in secrets if text in json.dumps(shown)] == []


def test_every_fact_is_reported_at_enrollment_and_by_a_heartbeat(world):
    for name in ("os", "architecture", "dockerVersion", "agentVersion"):
        longest = 64 if name == "agentVersion" else 128
        host, credential = world.join(**{name: "as it was"})
        assert world.host(host).document[name] == "as it was"
        for text in ("as it is", "x" * longest):
            assert world.beat(credential, **{name: text}).status == 200
            assert world.host(host).document[name] == text
        for text in ("x" * (longest + 1), "a\u202eb"):
            assert world.beat(credential, **{name: text}).code == "invalid-body"


@pytest.mark.parametrize("ttl", [None, 30])
def test_the_replies_to_agents_have_exactly_their_members(ttl, paths, clock):
    """Also where there is another machine of the same name, which is for operators to know."""
    with World(paths, clock, credential_ttl=ttl, interval=5) as world:
        world.join("WEB-1.")
        status, enrolled, _ = world.enroll(world.token())
        host, credential = enrolled["hostId"], enrolled["credential"]
        expires = [ttl and hostenroll.rfc3339(clock.ms + (ttl + n) * 1000) for n in (0, 25)]
        assert (status, enrolled) == (201, {
            "hostId": host, "organizationId": "default", "name": "web-1", "credential": credential,
            "credentialExpiresAt": expires[0], "heartbeatIntervalSeconds": 5})  # fmt: skip
        plain = {"hostId": host, "lastSeen": NOON_TEXT, "nextHeartbeatSeconds": 5}
        assert world.beat(credential).document == plain
        clock.advance(25)
        if ttl is None:
            world.act("rotate-signing-key")
        renewed = world.beat(credential).document
        newer, plain["lastSeen"] = renewed["credential"], "2027-01-15T08:00:25.000Z"
        assert renewed == {**plain, "credential": newer, "credentialExpiresAt": expires[1]}
        assert newer != credential and world.beat(newer).status == 200


# The fast path of a plain heartbeat.

BEAT_LINE = b"POST /api/agent/heartbeat HTTP/1.1"


def curl_beat(*more, first=BEAT_LINE, body=b""):
    fields = [b"Host: enroll.test", b"User-Agent: curl/7.88.1", b"Accept: */*"]
    lines = [first, *fields, b"Authorization: Bearer CREDENTIAL", *more]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


USUAL_BEATS = {
    "of curl": curl_beat(),
    "with a length": curl_beat(b"Content-Length: 0"),
    "with an object": curl_beat(b"Content-Length: 2", body=b"{}"),
    "that closes": curl_beat(b"Connection: close"),
    "with a query": curl_beat(first=b"POST /api/agent/heartbeat?x=y HTTP/1.1"),
    "of HTTP/1.0": curl_beat(first=BEAT_LINE[:-1] + b"0"),
    "after an empty line": b"\r\n" + curl_beat(),
}
BEHIND = (ipaddress.ip_network("10.0.0.0/8"),)  # the proxies that are trusted


def match(world, data, now=None, proxies=()):
    """What the fast path makes of bytes that have arrived on a connection."""
    reader = RequestReader("10.0.0.1" if proxies else ADDRESS, 7, proxies)
    return world.api.match(data, reader, world.clock.ms if now is None else now)


def match_slowly(world, data, proxies=()):
    """The same for a plain heartbeat that is parsed and admitted like any request."""
    reader = RequestReader("10.0.0.1" if proxies else ADDRESS, 7, proxies)
    try:
        request = reader.next(data)
    except Problem:
        return None
    if request is None or reader.buffer:
        return None
    admitted = world.api.admit(request, world.clock.ms)
    return (admitted, request.head) if isinstance(admitted, hostenroll.Heartbeat) else None


def forget(world):
    """Make the fast path forget everything, as an hour does."""
    world.api.match.__self__.clear(world.clock.ms)


def plain_beats(world, number):
    return [curl_beat().replace(b"CREDENTIAL", world.join()[1].encode()) for _ in range(number)]


def sent_on(data, client=b"198.51.100.4", name=b"X-Forwarded-For"):
    """A request as a proxy sends it on."""
    line, rest = data.split(b"\r\nHost:")
    return b"%b\r\n%b: %b\r\nX-Request-ID: %b\r\nHost:%b" % (line, name, client, client, rest)


@pytest.mark.parametrize("data", table(USUAL_BEATS))
@pytest.mark.parametrize("proxies", [(), BEHIND], ids=["direct", "through a proxy"])
def test_a_usual_heartbeat_takes_the_fast_path(data, proxies, world):
    credential = world.join()[1].encode()
    data = data.replace(b"CREDENTIAL", credential)
    more = data.replace(credential, credential + b"\r\nX: y")
    data, more = (sent_on(data), sent_on(more)) if proxies else (data, more)
    fast, slowly = (partial(one, world, proxies=proxies) for one in (match, match_slowly))
    for _ in range(2):
        heartbeat, head = fast(data)
        assert (heartbeat, head) == slowly(data) and type(heartbeat.origin) is Origin
        assert heartbeat.origin == Origin("198.51.100.4" if proxies else ADDRESS, 7, 1)
    cut = [data[:end] for end in range(len(data))]
    assert {fast(other) for other in (*cut, data + b"P", data + data)} == {None}
    for other in (more, data, more):
        assert fast(other) == slowly(other) is not None


def test_clients_of_one_proxy_take_the_fast_path_one_after_the_other_each_as_itself(world):
    """The head is parsed once for all of them."""
    beats = plain_beats(world, 3)
    hostenroll._heartbeat_head.cache_clear()
    for n, data in enumerate(beats * 3):
        name = (b"X-Forwarded-For", b"x-forwarded-for")[n % 2]
        direct, _ = match(world, data)
        for client in (b"203.0.113.%d", b"6.6.6.6, 203.0.113.%d, 10.9.9.9"):
            forwarded_beat = sent_on(data, client % n, name)
            heartbeat, _ = match(world, forwarded_beat, proxies=BEHIND)
            assert heartbeat == direct._replace(origin=Origin(f"203.0.113.{n}", 7, 1))
    assert hostenroll._heartbeat_head.cache_info().misses == 3  # two spellings, and directly
    assert match(world, forwarded_beat)[0] == direct  # who is not a proxy is ignored


def test_other_requests_do_not_match_for_a_good_credential_in_them(world):
    """Not even when there was no heartbeat before to compare with."""
    (usual,) = plain_beats(world, 1)
    opening = world.registry.keys.keyring.first.opening
    rest = usual.partition(opening)[2].partition(b"\r\n")[0]
    starts = (b"", b"\0", b"\r\n", b"\r\nAuthorization: Bearer ", b"\0" + opening, opening)
    ends = (b"", b"\0", b"\r\n", b"\r\n\r\n", b"\r\n\r\n{}")
    for is_first, start, end in itertools.product((True, False), starts, ends):
        forget(world)
        assert is_first or match(world, usual) is not None
        for proxies, data in itertools.product(((), BEHIND), (start + rest + end, start + end)):
            assert match(world, data, proxies=proxies) is None


@pytest.fixture
def checked(monkeypatch):
    """The credentials that are checked from now on."""
    credentials, verify = [], hostenroll.Keyring.verify
    monkeypatch.setattr(hostenroll.Keyring, "verify", lambda keyring, credential: (
        credentials.append(credential), verify(keyring, credential))[1])  # fmt: skip
    return credentials


def test_a_new_credential_evicts_no_other_from_the_cache(world, monkeypatch, checked):
    """Nor does junk. Those for which there is no room are checked each time."""
    monkeypatch.setattr(hostenroll, "CREDENTIALS_CACHED", 2)
    beats = plain_beats(world, 3)
    junk = re.sub(rb"(Bearer \S+)", rb"\1x", beats[0])
    checked.clear()
    for _ in range(5):
        matches = [match(world, data) is not None for data in (junk, *beats)]
        assert matches == [False, True, True, True]
    assert sorted(checked.count(credential) for credential in set(checked)) == [1, 1, 5, 5]
    request = request_bytes("GET", "/api/hosts", bearer=world.api_key)
    assert match(world, request) is None and len(checked) == 12


@pytest.mark.parametrize("ttl, is_kept", [(None, True), (7200, True), (3600, False), (60, False)])
def test_a_credential_stays_in_the_cache_until_it_may_be_due(ttl, is_kept, paths, clock, checked):
    """And no longer than an hour; and when the clock is set, all are checked again."""
    kept, began = hostenroll.CREDENTIALS_KEPT_MS, clock.ms
    with World(paths, clock, credential_ttl=ttl) as world:
        (data,) = plain_beats(world, 1)
        forget(world)
        checked.clear()
        for later, times in ((0, 1), (0, 1), (1, 1), (kept - 1, 1), (kept, 2), (0, 3), (0, 3)):
            matched = match(world, data, began + later)
            assert (matched is None) == (ttl is not None and later * 3 > ttl * 2000)
            assert not is_kept or len(checked) == times
        assert is_kept or len(checked) == 7
        world.act("rotate-signing-key")
        assert match(world, data, began) is None  # the new key is to sign another


def test_the_fast_path_matches_nothing_that_the_strict_reader_reads_otherwise(world):
    """Heads, bodies, chunks and trailers with an Authorization in every place, and with what
    proxies add."""
    one, other = (world.join(name)[1].encode() for name in ("a", "b"))
    marked = b"\r\nAuthorization: Bearer " + one + b"\r\n"
    spoof = b"\r\nX-Forwarded-For: 6.6.6.6\r\n"
    names = [b"Authorization: Bearer ", b"authorization: Bearer ", b"Authorization:Bearer "]
    values = [one, other, b"junk", b"", one + b" ", b"\xe9", one[:-1], one + b"\r", one + b"\n"]
    values.append(b" " + one)
    others = [
        b"Content-Length: 0", b"Content-Length: 2", b"Content-Length: 4", b"Connection: close",
        b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", b"Expect: 100-continue",
        b"Host: b", b"no colon", b" folded", b"Content-Length: 2", b"X: y", b"X: \0",
        b"X-Forwarded-For: 203.0.113.7", b"x-forwarded-for: 203.0.113.8", b"Forwarded: for=x",
        b"X-Forwarded-For: 203.0.113.9, 10.0.0.9", b"X-Request-ID: 7", b"X-Forwarded-For:",
    ]  # fmt: skip
    bodies = [
        b"", b"{}", b"{}\r\n", b"2\r\n{}\r\n0\r\n\r\n", b"2\r\n{}\r\n0" + marked + b"\r\n",
        b"0" + marked + b"\r\n", marked, b"{}" + marked, b"2;x=y\r\n{}\r\n0\r\n\r\n", b"[]",
        b'{"os":"x"}', BEAT_LINE + b"\r\nHost: h" + marked + b"\r\n", spoof, b"{}" + spoof,
        b"0\r\nX: y" + marked + b"\r\n", b"0" + spoof + b"\r\n", b"", b"", b"", b"{}",
    ]  # fmt: skip
    starts = [BEAT_LINE] * 6 + [
        b"POST /api/agent/enroll HTTP/1.1", b"GET /api/agent/heartbeat HTTP/1.1",
        b"POST http://h/api/agent/heartbeat HTTP/1.1", b"POST /api/agent/heartbeat HTTP/1.0",
        b"POST /api/agent/%68eartbeat HTTP/1.1", b"POST /api/agent/heartbeat HTTP/2.0",
        b"HEAD /api/agent/heartbeat HTTP/1.1", b"POST /api/hosts/tokens HTTP/1.1",
    ]  # fmt: skip
    lines = [name + value for name in names for value in values] + [b"Authorization:", b"X: y"]
    rng = random.Random(11)
    matches = {(): 0, BEHIND: 0}
    for _ in range(8000):
        if rng.random() < 0.1:
            forget(world)
        fields = [lines[0]] * rng.randint(0, 1) + rng.sample(lines, rng.choice((0, 0, 1, 2)))
        fields += rng.choices(others, k=rng.choice((0, 1, 1, 2)))
        rng.shuffle(fields)
        head = b"\r\n".join([rng.choice(starts), b"Host: h", *fields])
        data = head + b"\r\n\r\n" + rng.choice(bodies)
        proxies = rng.choice(list(matches))
        fast = match(world, data, proxies=proxies)
        matches[proxies] += fast is not None
        assert fast in (None, match_slowly(world, data, proxies)), data
    assert min(matches.values()) > 60


def test_a_heartbeat_that_is_not_plain_does_not_match(paths, clock):
    with World(paths, clock, credential_ttl=90) as world:
        (data,) = plain_beats(world, 1)
        for later, matches in ((0, True), (59_999, True), (60_001, False), (30 * DAY_MS, False)):
            assert (match(world, data, clock.ms + later) is not None) == matches  # due, expired
        long = data.replace(b"*/*", b"x" * hostenroll.HEAD_CACHED_MAXIMUM)
        assert match_slowly(world, long) is not None and match(world, long) is None
        first = world.registry.keys.keyring.first
        claims = hostenroll.Claims(7, "default", clock.ms // 1000, 1, None, first.kid)
        stranger = hostenroll.new_keyring().first.sign(claims).encode()
        assert match(world, curl_beat().replace(b"CREDENTIAL", stranger)) is None


@pytest.mark.parametrize("interval", [1, 30, 66, 100, 900, 86_400])
def test_the_answer_of_the_fast_path_is_the_general_one(paths, clock, interval):
    with World(paths, clock, interval=interval) as world:
        heartbeat = world.heartbeat(world.join()[1])
        for seed, closes in itertools.product(range(20), (False, True)):
            random.seed(seed)
            response = world.api.answer(heartbeat, clock.ms)
            general = hostenroll.write_response(response, int(clock.now), closes, False)
            random.seed(seed)
            fast = world.api.heartbeat_answer(heartbeat.host, clock.ms, int(clock.now), closes)
            assert fast == general


def test_no_host_makes_every_tick_wait_for_the_disk(world):
    """By facts that it always sends, or by a body that is refused, to hosts that count only."""
    host, credential = world.join(os="Debian", agentVersion="0.2.0")
    assert world.beat(credential, os=7).code == "invalid-body"
    assert world.sql("PRAGMA synchronous") == [(1,)]  # though it would be its first heartbeat
    world.beat(credential)
    same = beat_bytes(credential, os="Debian", hostname="web-1", kernel="6.1")
    assert isinstance(world.admit(same), hostenroll.Heartbeat)
    assert world.beat(credential, os=7).code == "invalid-body"
    assert world.sql("PRAGMA synchronous") == [(1,)]
    assert world.beat(credential, os="Debian").status == 200
    assert world.beat(credential, os="Debian 13").status == 200
    assert world.sql("PRAGMA synchronous") == [(2,)]
    assert world.beat(credential, os="Debian").status == 200
    assert [reply.status for reply in world.tick([same, beat_bytes(credential)])] == [200, 200]
    world.revoke(host)
    assert {world.beat(credential, os=7).code, world.tick([same])[0].code} == {"host-revoked"}
    world.delete(host)
    assert {world.beat(credential, os=7).code, world.tick([same])[0].code} == {"host-unknown"}


# Bodies and queries.

MANY_LABELS = {f"k{n}": "v" for n in range(33)}
BAD_BODIES = {  # where, what is in the body beside what is right, the fields that are named
    "nothing": (ENROLL_PATH, {"token": None, "hostname": None}, "hostname token"),
    "a number, a space": (ENROLL_PATH, {"token": 1, "hostname": "web 1"}, "hostname token"),
    "nothing in them": (ENROLL_PATH, {"token": "", "hostname": ""}, "hostname token"),
    "too long": (ENROLL_PATH, {"token": "x" * 257, "hostname": "h" * 254}, "hostname token"),
    "a newline": (ENROLL_PATH, {"hostname": "web-1\n", "name": ""}, "hostname name"),
    "an option": (ENROLL_PATH, {"hostname": "-rf", "name": "a\u202eb"}, "hostname name"),
    "markup": (ENROLL_PATH, {"hostname": "<b>", "name": "\x1b[2J"}, "hostname name"),
    "facts of no text": (ENROLL_PATH, {"os": 1, "dockerVersion": []}, "dockerVersion os"),
    "a fact of 129": (ENROLL_PATH, {"architecture": "x" * 129}, "architecture"),
    "below": (TOKENS_PATH, {"ttlSeconds": 59, "maxUses": 0}, "maxUses ttlSeconds"),
    "above": (TOKENS_PATH, {"ttlSeconds": 2_592_001, "maxUses": 1_000_001}, "maxUses ttlSeconds"),
    "null": (TOKENS_PATH, {"ttlSeconds": None, "hostname": "a b"}, "hostname ttlSeconds"),
    "a long description": (TOKENS_PATH, {"description": "x" * 1001}, "description"),
    "too many labels": (TOKENS_PATH, {"labels": MANY_LABELS}, "labels"),
    "unknown, or answers": (TOKENS_PATH, {"ttl": 60, "state": "", "uses": 0}, "state ttl uses"),
    "no such organization": (TOKENS_PATH, {"organizationId": "nope"}, "organizationId"),
    "an edit to no labels": (HOST_PATH, {"name": "no", "labels": None}, "labels"),
    "an edit of a fact": (HOST_PATH, {"name": "no", "os": "x"}, "os"),
    "an edit without a name": (HOST_PATH, {"name": "", "hostname": "x"}, "hostname name"),
    "an edit to no name": (HOST_PATH, {"name": None}, "name"),
    "an edit to nothing visible": (HOST_PATH, {"name": "\u3164"}, "name"),
    "a name like another": (ENROLL_PATH, {"name": "web-1\u200b"}, "name"),
}  # fmt: skip
BAD_QUERIES = {
    "/api/hosts": (
        "limit=0", "limit=1001", "limit=-1", "limit=1e3", "limit=", "limit=%31%00",
        "limit=" + "9" * 30, "limit=1&limit=2", "status=up", "status=Online", "label=rack",
        "label==x", "cursor=", "cursor=x", "cursor=ffffffffffffffff", "nope=1", "Limit=1", "q=%00",
        "q=" + "x" * 256, "organization=nope", "organization=%27--", "state=valid",
    ),
    "/api/audit": (
        "action=x", "action=", "cursor=1", "limit=0", "since=1", "organization=nothing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("path, changes, fields", table(BAD_BODIES))
def test_a_refused_body_changes_nothing_and_its_members_are_named(path, changes, fields, estate):
    before, right = estate.snapshot(), {"token": estate.minted["token"], "hostname": "web-2"}
    method = "PATCH" if path == HOST_PATH else "POST"
    body = {**right, **changes} if path == ENROLL_PATH else changes
    refused = estate.ask(method, estate.path(path), body)
    assert (refused.status, refused.code) == (400, "invalid-body")
    assert all(set(error) == {"field", "detail"} for error in refused.document["errors"])
    assert " ".join(sorted(error["field"] for error in refused.document["errors"])) == fields
    assert estate.snapshot() == before


def test_a_body_that_is_no_json_object_is_refused(estate):
    callers = {"none": ENROLL_PATH, "credential": BEAT_PATH, "owner": TOKENS_PATH}
    bodies = (b'{"token":', b"[]", b'{"os":NaN}', b"token=x", b'{"x":' + b"[" * 8000)
    for (caller, path), body in itertools.product(callers.items(), bodies):
        refused = estate.call_as(caller, "POST", path, body)
        assert (refused.status, refused.code) == (400, "invalid-body"), (path, body)
        assert isinstance(refused.document["errors"], list)


def test_a_host_with_a_name_that_would_be_refused_today_goes_on(world):
    """It was let in by an older version."""
    host, credential = world.join()
    world.sql("UPDATE host SET name = '\u3164 '")
    assert world.beat(credential, name="\u3164 ", os="Debian 13").status == 200
    edited = world.ask("PATCH", f"/api/hosts/{host}", {"labels": {"rack": "b4"}})
    assert edited.document["labels"] == {"rack": "b4"}
    token = world.reenroll(host).document["token"]
    documents = {hostenroll.ENROLLMENT: world.enroll(token), hostenroll.HOST: world.host(host)}
    for described, reply in documents.items():
        assert described.schema.check(reply.document)["name"] == "\u3164 "


def test_a_large_body_of_an_agent_is_refused_before_its_path_and_its_secret(live):
    """It is read to its end, and the connection stays; but who waits with it is told not to."""
    large = b"x" * 8193
    chunks = b"2001\r\n%b\r\n0\r\n\r\n" % large
    for path in (ENROLL_PATH, f"http://a{BEAT_PATH}?x=1", "/api/agent/nothing"):
        start = b"POST %b HTTP/1.1\r\nHost: a\r\n" % path.encode()
        length = start + b"Content-Length: 8193\r\n"
        sent = length + b"\r\n" + large + start + b"Transfer-Encoding: chunked\r\n\r\n" + chunks
        replies = live.send(sent + request_bytes("POST", path, large[1:]) + HEALTH)
        codes = [reply.code for reply in replies]
        assert codes[:2] == ["body-too-large"] * 2 and replies[3].status == 200
        assert codes[2] in ("invalid-body", "credential-missing", "not-found")
        for waiting in (length + b"\r\n", length + b"Expect: 100-continue\r\n\r\n"):
            with live.connect() as peer, peer.makefile("rb") as stream:
                assert exchange(peer, stream, waiting)[0].code == "body-too-large"


def test_what_agents_send_is_small_and_anything_else_may_be_larger():
    """By the path, because the head is read before anything else is known of a request."""
    for row in HTTP_OPERATIONS:
        line = f"{row.method} {row.path} HTTP/1.0".replace("{id}", UNKNOWN_ID)
        head, _ = hostenroll.parse_head(line.encode())
        assert head.body_maximum == (8192 if row.caller in ("token", "credential") else 65_536)


def test_what_a_body_need_not_have_and_what_a_request_may_have_beside_it(estate):
    """A newer agent meets an older server; and a proxy may add a query."""
    host, more = estate.path(HOST_PATH), {"kernel": "6.1", "deep": [{"a": None}], "__class__": 1}
    arrival = {"token": estate.minted["token"], "hostname": "web-2", **more}
    for caller, method, path, body, status in (
        ("credential", "POST", BEAT_PATH, b"", 200), ("credential", "POST", BEAT_PATH, b"{}", 200),
        ("credential", "POST", BEAT_PATH + "?x=1", more, 200), ("owner", "PATCH", host, b"", 200),
        ("none", "POST", ENROLL_PATH, b"", 400), ("owner", "POST", TOKENS_PATH, b"", 201),
        ("none", "POST", ENROLL_PATH + "?from=proxy", arrival, 201),
        ("none", "GET", "/healthz?verbose", None, 200),
    ):  # fmt: skip
        assert estate.call_as(caller, method, path, body).status == status, (path, body)
    assert estate.host(estate.host_id).document["name"] == "web-1"


def test_the_content_type_is_ignored_and_an_idempotency_key_is_visible_ascii(live):
    types = ("text/plain", "application/x-www-form-urlencoded", "", "\xff")
    keys = ("", " ", "x" * 129, "a b", "\xc3\xbc", "\x7f")
    lines = {f"Content-Type: {text}": None for text in types}
    lines.update((f"Idempotency-Key: {key}", "malformed-request") for key in keys)
    for line, code in lines.items():
        body = json.dumps({"token": live.token(), "hostname": "web-1"})
        head = f"POST {ENROLL_PATH} HTTP/1.1\r\nHost: a\r\n{line}\r\nContent-Length: {len(body)}"
        replies = live.send(f"{head}\r\n\r\n{body}".encode("latin-1"))
        assert [(reply.status, reply.code) for reply in replies] == [(400 if code else 201, code)]


def test_values_at_the_bounds_are_taken(world):
    order = {"maxUses": 1_000_000, "description": "x" * 1000, "labels": {"a/b.c_d-e": "\u00fc"}}
    for ttl, expires in ((60, "2027-01-15T08:01:00.000Z"), (2_592_000, "2027-02-14T08:00:00.000Z")):
        minted = world.mint(ttlSeconds=ttl, **order).document
        assert minted == {**minted, **order, "expiresAt": expires}


def test_a_query_is_strict(world):
    for path, queries in BAD_QUERIES.items():
        for query in queries:
            refused = world.ask("GET", f"{path}?{query}")
            assert (refused.status, refused.code) == (400, "invalid-query"), query
            (error,) = refused.document["errors"]
            assert error["field"] in query and set(error) == {"field", "detail"}
    for query in ("q=%ff", "&".join(f"label=a{n}=b" for n in range(65))):
        refused = world.hosts(query)
        assert (refused.status, refused.code) == (400, "invalid-query"), query
        assert refused.document["errors"] == [] and "at most 64" in refused.document["detail"]


# Lists.


def walk(door, key, path, cursor="", pages=50):
    """A whole list, to its nextCursor null, in at most 50 pages."""
    assert pages > 0, "the list has no end"
    page = door.call("GET", path + cursor, bearer=key).document
    following, (items,) = page.pop("nextCursor"), page.values()
    rest = walk(door, key, path, f"&cursor={following}", pages - 1) if following else []
    return items + rest


def test_the_json_and_the_memory_of_a_page_are_bounded(world):
    fill(world, 240)
    large = json.dumps({f"k{n}": "\U0001f600" * 255 for n in range(32)})
    world.sql("UPDATE host SET labels = ?", large)
    seen, cursor, sizes = 0, "", []
    tracemalloc.start()
    while cursor is not None:
        page = world.hosts(f"limit=1000{cursor and f'&cursor={cursor}'}").document
        sizes.append(len(json.dumps(page)))
        seen += len(page["hosts"])
        cursor = page["nextCursor"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen == 240 and max(sizes) < hostenroll.PAGE_BYTES + 110_000
    assert peak < 16_000_000  # never all the rows of a page at once: that would be 24 MB


# Health, readiness, metrics.


def test_health_touches_no_database(world):
    with faulty(world.registry, n=1) as connection:
        assert world.call("GET", "/healthz").document == {"status": "ok"}
    assert not connection.failed


@pytest.mark.parametrize("trouble", [False, True], ids=["in good times", "with a bad key file"])
def test_readiness_takes_one_tick_a_second(trouble, world, clock, paths):
    """It is open to all: a flood of it must not take the write lock from heartbeats."""
    asked, status = request_bytes("GET", "/readyz"), 503 if trouble else "ready"
    ticks, run = [], world.registry.run
    world.registry.run = lambda work, now: ticks.append(len(work)) or run(work, now)
    if trouble:
        os.remove(paths[1])
        world.registry.keys.reload()
    assert {reply.document["status"] for reply in world.tick([asked] * 50)} == {status}
    assert ticks == [50]  # one transaction
    for later, times in ((0, 1), (999, 1), (1, 2), (-10_000, 3), (0, 3)):
        clock.advance(later / 1000)
        reply = world.call("GET", "/readyz")
        assert (reply.document["status"], len(ticks)) == (status, times), later
        if trouble:  # it has a reason, and no path
            assert "key file" in reply.document["detail"]
            assert os.path.dirname(paths[1]) not in json.dumps(reply.document)
    assert world.registry.metrics.refusals == ({"storage-unavailable": 55} if trouble else {})


def samples(text):
    """Prometheus' text format, read by its rules."""
    lines = [line.rpartition(" ") for line in text.split("\n")[:-1] if not line.startswith("# ")]
    for name, *_ in lines:
        assert re.fullmatch(r'[a-z_]+(\{[a-z_]+="[^"\n]*"(,[a-z_]+="[^"\n]*")*\})?', name), name
    values = {name: float(value) for name, _, value in lines}
    assert len(values) == len(lines)
    return values


def test_metrics_count_what_has_happened(estate):
    before = samples(estate.read_as("owner", "/metrics"))
    estate.beat(estate.credential)
    estate.beat(estate.credential, os="Debian")
    estate.beat("x.y.z")
    estate.call_as("viewer", "DELETE", f"/api/hosts/{estate.host_id}")
    estate.enroll(estate.minted["token"], "web-2")
    estate.enroll(estate.minted["token"], "web-3")
    after = samples(estate.read_as("owner", "/metrics"))
    changed = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert changed["hostenroll_commit_duration_seconds_count"] >= 3
    counted = {name[11:]: n for name, n in changed.items() if "seconds" not in name}
    counted.pop('database_bytes{file="wal"}', None)
    assert counted == {
        "heartbeats_total": 2, "enrollments_total": 1, 'refusals_total{code="forbidden"}': 1,
        'refusals_total{code="credential-invalid"}': 1, 'refusals_total{code="token-used"}': 1,
        'hosts{organization="default",status="online"}': 1,
    }  # fmt: skip
    assert after['hostenroll_hosts{organization="default",status="pending"}'] == 1


def test_a_histogram_is_cumulative_and_has_everything_in_its_last_bucket():
    histogram = hostenroll.Histogram((0.1, 1.0))
    for value, times in ((0.05, 1), (0.1, 2), (0.5, 1), (7.0, 3)):
        histogram.observe(value, times)
    lines = hostenroll.metric_family("t", "histogram", "H", hostenroll.histogram_samples(histogram))
    assert samples("".join(lines)) == {
        't_bucket{le="0.1"}': 3, 't_bucket{le="1"}': 4, 't_bucket{le="+Inf"}': 7, "t_count": 7,
        "t_sum": pytest.approx(0.05 + 0.2 + 0.5 + 21),
    }  # fmt: skip


def test_a_refusal_is_counted_when_it_is_the_answer_and_once(world):
    refusals, token = world.registry.metrics.refusals, world.token()
    with faulty(world.registry, only="COMMIT"):  # it is the server's own call
        world.run(Call(hostenroll.HOUSEKEEPING))
    assert refusals == {}
    with faulty(world.registry, only="COMMIT"):
        assert world.enroll(token).status == 503
    assert refusals == {"storage-unavailable": 1}
    assert [world.enroll("nonsense").status, world.call("GET", "/nowhere").status] == [401, 404]
    assert refusals == {"storage-unavailable": 1, "token-unknown": 1, "not-found": 1}


def test_what_waits_too_long_or_meets_a_defect_is_refused_and_counted(live, paths, monkeypatch):
    monkeypatch.setattr(hostenroll, "LOCK_PATIENCE", 0.05)
    beats, began = beat_bytes(live.join()[1]) * 5, time.monotonic()
    with write_lock(paths[0]):
        refused = [(reply.code, reply.headers["retry-after"]) for reply in live.send(beats)]
        assert refused == [("storage-unavailable", "5")] * 5
        assert 0.05 < time.monotonic() - began < 2.2
    assert [reply.status for reply in live.send(beats)] == [200] * 5
    monkeypatch.setattr(hostenroll, "find_operation", lambda *_: 1 // 0)
    assert live.call("GET", "/healthz").status == 500
    assert live.registry.metrics.refusals == {"storage-unavailable": 5, "internal": 1}


def test_an_operators_mistake_is_logged_and_the_peer_gets_500(world, caplog, monkeypatch):
    def fail(call, now):
        raise hostenroll.OperatorError("cannot write the key file: make room")

    monkeypatch.setattr(world.registry.hosts, "list", fail)
    assert world.hosts().code == "internal"
    assert "cannot write the key file: make room" in caplog.messages


def test_only_what_is_committed_is_counted(world):
    token, counts = world.token(maxUses=9), world.registry.metrics.counts
    enrolled, revoked = (world.enroll(token).document for _ in range(2))
    world.revoke(revoked["hostId"])
    beats = [world.heartbeat(host["credential"]) for host in (enrolled, revoked)]
    world.act("rotate-signing-key")
    attempts = (
        lambda: world.enroll(token).status,
        lambda: world.beat(enrolled["credential"]).status,  # a renewal is due
        lambda: [getattr(outcome, "status", 200) for outcome in world.run(*beats)],
    )
    for attempt in attempts:
        with faulty(world.registry, only="COMMIT"):
            assert attempt() in (503, [503, 503])
        assert counts == {"enrollments": 2}
    assert world.beat(enrolled["credential"], os=7).code == "invalid-body"
    assert [attempt() for attempt in attempts] == [201, 200, [200, 403]]
    assert counts == {"enrollments": 3, "heartbeats": 2, "renewals": 1}


# What is declared: every answer fits its schema, and every refusal is in the OpenAPI document.


class Witness(World):
    """Compares every answer with what its operation declares."""

    def __init__(self, paths, clock):
        self.seen = {row.name: set() for row in HTTP_OPERATIONS}
        super().__init__(paths, clock, credential_ttl=30)

    def call(self, method, path, *more, **named):
        reply = super().call(method, path, *more, **named)
        row, _ = hostenroll.find_operation(method, path.partition("?")[0])
        self.seen[row.name].add(reply.code or reply.status)
        schema = row.schema()
        if reply.status >= 400:
            require_declared(reply, row.problems())
        elif schema is None:
            assert isinstance(reply.document, type(None) if reply.status == 204 else str)
        else:
            schema.check(reply.document)
        return reply


def visit_agent_operations(door):
    token = door.token(maxUses=2, labels={"rack": "b4"})
    enrolled = door.enroll(token, key="once", os="Debian").document
    for key in ("once", "a key"):  # again, and with a space
        door.enroll(token, key=key)
    door.call("POST", ENROLL_PATH, {"token": token, "hostname": "web-1", "os": 1})
    door.enroll(door.token(hostname="web-2"), "web-3")
    expired, revoked = door.token(ttlSeconds=60), door.mint().document
    door.revoke_token(revoked["id"])
    door.enroll(revoked["token"])
    door.enroll(token, "web-2")  # the last use
    door.enroll(token)
    credential, host = enrolled["credential"], enrolled["hostId"]
    door.beat(credential)
    door.advance(25)
    renewed = door.beat(credential).document["credential"]
    door.beat(renewed, os="Debian 13")
    door.beat(credential)
    door.beat(renewed, os=1)
    door.call("POST", BEAT_PATH)
    door.beat("nonsense")
    again = door.reenroll(host).document["token"]
    for change in (door.revoke, door.restore, door.delete):
        change(host)
        door.enroll(again)
        door.beat(renewed)
    door.advance(8 * 86400)
    door.beat(renewed)
    door.enroll(expired)
    for _ in range(hostenroll.FAILURES_ALLOWED + 1):
        door.enroll("het_nonsense")


def visit_user_operations(door):
    admin, viewer = (make_api_key(door.registry, door.clock, "default", role)
                     for role in ("admin", "viewer"))  # fmt: skip
    token = [door.mint(description=f"cellar {n}").document["id"] for n in range(2)][1]
    host = [door.join()[0] for _ in range(2)][1]
    for path in (f"{TOKENS_PATH}?limit=1", "/api/hosts?limit=1"):  # with a cursor
        door.ask("GET", path)
    for _ in range(hostenroll.FAILURES_ALLOWED):
        door.call("GET", "/api/me", bearer="hak_nonsense")
    for row in sorted(USER_OPERATIONS, key=lambda row: row.method == "DELETE"):
        path = row.path.replace("{id}", token if "tokens" in row.path else host)
        unknown = row.path.replace("{id}", UNKNOWN_ID)
        for key in (door.api_key, viewer, None, "hak_nonsense"):
            door.call(row.method, path, bearer=key)
        for asked, body in ((f"{path}?x=1", None), (unknown, None), (unknown, [])):
            door.ask(row.method, asked, body)
    for path in ("/api/hosts", "/api/audit", "/api/changes"):
        door.call("GET", f"{path}?organization=other", bearer=viewer)
    for path, after in itertools.product(("audit", "changes"), ("now", f"{UNKNOWN_ID}-0")):
        door.ask("GET", f"/api/{path}?after={after}")
    door.call("POST", TOKENS_PATH, {"organizationId": "other"}, admin)
    door.ask("POST", ACTIONS_PATH, {"action": "delete", "hosts": [UNKNOWN_ID]})
    for _ in range(2):  # the second is a conflict
        door.ask("POST", "/api/organizations", {"name": "berlin"})
    key = door.ask("POST", "/api/keys", {"organizationId": "berlin"}).document["id"]
    for path in ("organization=nothing", "limit=1"):
        door.ask("GET", f"/api/keys?{path}")
    door.ask("POST", "/api/keys", {"organizationId": "nothing"})
    door.call("GET", "/api/keys?organization=berlin", bearer=admin)
    door.call("POST", "/api/keys", {"organizationId": "berlin"}, admin)
    for path in (door.api_key.split("_")[1], key):
        door.ask("DELETE", f"/api/keys/{path}")


def test_every_answer_fits_its_schema_and_every_refusal_is_declared(paths, clock):
    """And what is declared happens, except what is the server's and not the operation's."""
    with Witness(paths, clock) as witness:
        visit_agent_operations(witness)
        visit_user_operations(witness)
        for path in ("/healthz", "/readyz", "/openapi.json", "/agent.sh", "/"):
            witness.call("GET", path)
    of_the_server = {kind.code for kind in hostenroll.problems() if issubclass(kind,
                     hostenroll.Unframed)} | {"internal", "storage-unavailable"}  # fmt: skip
    for row in HTTP_OPERATIONS:
        declared = {kind.code for kind in row.problems()} - of_the_server
        if row.name == "enroll":  # its header; and of a host that is gone, tokens are revoked
            declared = declared - {"host-unknown"} | {"malformed-request"}
        assert witness.seen[row.name] == {row.status} | declared, row.name
        assert row.writes == (row.method != "GET") or row.caller == "open"


def references(document):
    if isinstance(document, dict):
        yield from ([document["$ref"]] if isinstance(document.get("$ref"), str) else [])
        document = list(document.values())
    for inner in document if isinstance(document, list) else ():
        yield from references(inner)


def test_the_openapi_document_has_exactly_the_operations_and_their_refusals():
    """And it refers to all components that it has and to nothing else."""
    document = hostenroll.openapi_document()
    assert document["info"] == {"title": "hostenroll", "version": hostenroll.__version__}
    components = document["components"]
    there = {f"#/components/{kind}/{name}" for kind in components for name in components[kind]}
    schemes = {name for name in there if "/securitySchemes/" in name}
    assert set(references(document)) == there - schemes
    described = {(method.upper(), path): operation for path, methods in document["paths"].items()
                 for method, operation in methods.items()}  # fmt: skip
    assert list(described) == [(row.method, row.path) for row in HTTP_OPERATIONS]
    assert len({operation["operationId"] for operation in described.values()}) == len(described)
    schemes = {"open": [], "token": [], "credential": [{"credential": []}]}
    headers = {"401": {"WWW-Authenticate"}, "429": {"Retry-After"}, "503": {"Retry-After"}}
    statuses = {kind.code: str(kind.status) for kind in hostenroll.problems()}
    for row, operation in zip(HTTP_OPERATIONS, described.values()):
        assert operation["security"] == schemes.get(row.caller, [{"apiKey": []}])
        responses, codes = dict(operation["responses"]), []
        assert responses.pop(str(row.status))
        for status, reference in responses.items():
            response = components["responses"][reference["$ref"].rpartition("/")[2]]
            named = [reference.rpartition("/")[2] for reference in references(response)]
            assert {statuses[code] for code in named} == {status}
            assert set(response.get("headers", ())) == headers.get(status, set())
            codes += named
        assert codes == [kind.code for kind in row.problems()]


def beside_python(tool):
    """A program of another package, from the environment of this Python or the path."""
    places = [os.path.dirname(sys.executable), os.environ.get("PATH", "")]
    return shutil.which(tool, path=os.pathsep.join(places))


def needs(tool):
    return pytest.mark.skipif(beside_python(tool) is None, reason=f"{tool} is not installed")


@slow
@needs("openapi-spec-validator")
def test_openapi_spec_validator_finds_nothing(tmp_path):
    path = tmp_path / "openapi.json"
    path.write_text(cli(tmp_path, "openapi").stdout)
    command = [beside_python("openapi-spec-validator"), str(path)]
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
# is another client's, and every wrong key is to be refused as one. No schema can say how many
# brackets the body of an agent has, what an address is, or that only edits take labels; and its
# patterns have no character beyond U+FFFF.
SCHEMATHESIS_HOOKS = """
import ipaddress, itertools, json, schemathesis
clients = map(ipaddress.ip_address, itertools.count(10 << 24))
@schemathesis.hook
def before_call(context, case, kwargs):
    case.headers["X-Forwarded-For"] = str(next(clients))
@schemathesis.hook
def filter_case(context, case):
    text = case.body if isinstance(case.body, (dict, list)) else ""
    text = json.dumps(text, default=str, ensure_ascii=False)
    if any("\\U000E0000" <= character <= "\\U000E0FFF" for character in text):
        return False
    if case.path.endswith("/actions"):
        return '"edit"' in text or not ('"labels"' in text or '"intervalSeconds"' in text)
    try:
        ipaddress.ip_network((case.query or {}).get("address", "::"), strict=False)
    except Exception:
        return False
    return "/agent/" not in case.path or text.count("{") + text.count("[") <= 8
"""


@slow
@needs("schemathesis")
def test_schemathesis_finds_nothing(tmp_path):
    behind = ("--trusted-proxy", "127.0.0.1")
    with start_server(tmp_path, *behind, how="process", api_key=False) as server:
        cli(tmp_path, "add-org", "elsewhere")
        elsewhere, token = (cli(tmp_path, "mint-token", "--max-uses", "30", "--org", name).stdout
                            for name in ("elsewhere", "default"))  # fmt: skip
        key = cli(tmp_path, "mint-api-key").stdout.strip()
        for n in range(30):  # to look at, change and delete
            server.enroll(token.strip(), f"web-{n}")
        credential = server.enroll(elsewhere.strip()).document["credential"]
        settings = SCHEMATHESIS.format(key=key, credential=credential)
        (tmp_path / "schemathesis.toml").write_text(settings)
        (tmp_path / "each_from_its_own_address.py").write_text(SCHEMATHESIS_HOOKS)
        command = [
            beside_python("schemathesis"), "--config-file", "schemathesis.toml", "run", "--checks",
            "all", "--seed", "1", "--max-examples", "50", "--generation-database", "none",
            f"{server.url}/openapi.json",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-9000:] + done.stderr
        tested = len(HTTP_OPERATIONS)
        assert f"{tested} selected / {tested} total" in done.stdout
        assert "Traceback" not in "".join(server.log)


# Who may call what.

NO_KEYS = ("none", "junk", "forged", "revoked", "token", "credential")
# What a query or a body could hold to reach what is another's.
PEEKS = {
    "organization": "default nothing", "cursor": "7fffffffffffffff {host} {token}",
    "q": "web {host}", "label": "rack=b4", "status": "pending online", "state": "valid used",
    "address": "::/0 0.0.0.0/0",
    "subject": "host:{host} token:{token} organization:default", "action": "mint enroll refuse",
    "code": "token-unknown", "limit": "1 1000", "token": "{token}", "withHosts": "true",
    "reason": "mine", "withKeys": "true", "self": "true", "after": "now", "wait": "0",
    "host": "{host}",
}  # fmt: skip
CLAIMED = {
    "organizationId": "default", "hostname": "web-1", "name": "mine", "labels": {"mine": "1"},
    "ttlSeconds": 60, "maxUses": 2, "description": "mine", "intervalSeconds": 60, "role": "admin",
    "action": "edit", "reason": "mine",
}  # fmt: skip


def remembered(estate):
    """All rows, but for the log, the sign of life, and what is berlin's."""
    rows = estate.snapshot()
    del rows["audit"]
    rows["service"] = [row[:2] + row[3:] for row in rows["service"]]
    return {name: [row for row in table if "berlin" not in row] for name, table in rows.items()}


def intrusions(operation, estate):
    """Every way in which an operation lets a caller name something: a path and a body."""
    claimed = {**CLAIMED, "hosts": [estate.host_id]}
    fields = operation.body.fields if operation.body else {}
    needed = {name: claimed[name] for name, field in fields.items() if field.required}
    path, body = estate.path(operation.path), None if operation.body is None else needed
    yield path, body
    for name in operation.query.fields:
        for text in PEEKS[name].format(host=estate.host_id, token=estate.token_id).split():
            yield f"{path}?{name}={text}", body
    for name in fields:
        yield path, {**needed, name: claimed[name]}


def attempts_of_strangers(operation, estate):
    """An operation as every caller who may not: caller, path, body, and what it is refused for."""
    path = estate.path(operation.path)
    if operation.caller == "token":
        for caller in (name for name in estate.callers if name not in ("none", "token")):
            body = {"token": estate.callers[caller], "hostname": "web-9"}
            yield caller, path, body, "token-unknown"
            yield caller, path, {"hostname": "web-9"}, "invalid-body"  # a header is no place for it
        yield "token", path, {"hostname": "web-9"}, "invalid-body"
    elif operation.caller == "credential":
        for caller, body in itertools.product(estate.callers, (None, {"os": "linux"})):
            if caller != "credential":
                code = "credential-missing" if caller == "none" else "credential-invalid"
                yield caller, path, body, code
    elif operation.caller != "open":
        ways = list(intrusions(operation, estate))
        yield from ((caller, *way, "api-key-invalid") for caller in NO_KEYS for way in ways)
        few = {"admin": ["viewer"], "owner": ["viewer", "admin", "stranger"]}
        for caller in few.get(operation.caller, ()):
            yield from ((caller, *way, "forbidden") for way in ways)


@each_operation(HTTP_OPERATIONS)
def test_who_may_call_what(operation, estate):
    """All others change nothing but the log."""
    method, path = operation.method, estate.path(operation.path)
    estate.perform(partial(estate.registry.service.start, "http://a"))
    before = remembered(estate)
    for caller, asked, body, code in attempts_of_strangers(operation, estate):
        estate.advance(60 / hostenroll.FAILURES_ALLOWED)
        assert estate.call_as(caller, method, asked, body).code == code, (caller, asked)
    readers = {"open": estate.callers, "viewer": ["viewer"]}.get(operation.caller, ())
    assert {estate.call_as(caller, method, path).status for caller in readers} <= {200}
    assert remembered(estate) == before
    if operation.caller in ("admin", "viewer", "owner"):
        way, caller = next(intrusions(operation, estate)), operation.caller
        caller = "admin" if caller == "viewer" else caller
        assert estate.call_as(caller, method, *way).status in (200, 201, 204)


@each_operation(USER_OPERATIONS)
def test_the_key_of_another_organization_reaches_nothing(operation, estate):
    """By no path, query, body or cursor; and it cannot tell what is there from what is not."""
    ask = partial(estate.call_as, "stranger", operation.method)
    own = estate.call_as("stranger", "POST", TOKENS_PATH, {}).document
    estate.enroll(own["token"], "spree")
    keys = [estate.key_id(name) for name in ("owner", "admin", "viewer")]
    treasures = [estate.host_id, estate.token_id, *keys, "cellar", "rack", '"default"']
    hosts, tokens = (walk(estate, estate.callers["stranger"], f"{path}?limit=1")
                     for path in ("/api/hosts", TOKENS_PATH))  # fmt: skip
    assert [host["hostname"] for host in hosts] == ["spree"]
    assert [token["id"] for token in tokens] == [own["id"]]
    before = remembered(estate)
    for path, body in intrusions(operation, estate):
        reply = ask(path, body)
        if operation.name == "act-on-hosts":  # it says which ids of the request are nothing here
            assert reply.document.pop("notFound") == [estate.host_id] and not reply.document["done"]
        shown = json.dumps([reply.document, reply.headers])
        assert [text for text in treasures if text in shown] == [], path
        assert remembered(estate) == before, path
        if "{id}" in operation.path or re.search("organization(=|Id)", f"{path}{body}"):
            known = f"{estate.host_id}|{estate.token_id}|{estate.key_id('spare')}"
            nothing = re.sub(known, UNKNOWN_ID, path)
            nowhere = json.loads(json.dumps(body).replace('"default"', '"nothing"'))
            assert reply.status == 404
            assert reply == ask(nothing.replace("=default", "=nothing"), nowhere), path
        else:
            assert reply.status in ((403,) if operation.caller == "owner" else (200, 201)), path
    assert estate.read_as("admin", "/api/hosts")["hosts"][0]["id"] == estate.host_id


def test_an_organizations_key_reads_its_own_log_and_counts_its_own_hosts(estate):
    own = estate.call_as("stranger", "POST", TOKENS_PATH, {}).document
    token, host = f"token:{own['id']}", estate.enroll(own["token"], "spree").document["hostId"]
    estate.enroll("het_junk")
    estate.enroll(own["token"], "spree")
    stranger, viewer, owner = logs = [walk(estate, estate.callers[name], "/api/audit?limit=2")
                                      for name in ("stranger", "viewer", "owner")]  # fmt: skip
    assert [(event["action"], event["subject"]) for event in stranger] == [
        ("refuse", token), ("enroll", f"host:{host}"), ("mint", token),
        ("mint", f"api-key:{estate.key_id('stranger')}"), ("add", "organization:berlin"),
    ]  # fmt: skip
    organizations = [{event["organizationId"] for event in log} for log in logs]
    assert organizations == [{"berlin"}, {"default"}, {"berlin", "default", None}]
    assert len(stranger + viewer) == len([event for event in owner if event["organizationId"]])
    assert all(event in owner for event in stranger + viewer)
    for name, log in (("stranger", stranger), ("viewer", viewer)):
        for query in ("", f"?organization={log[0]['organizationId']}"):
            assert estate.read_as(name, f"/api/audit{query}")["events"] == log
    name = 'hostenroll_hosts{{organization="{}",status="{}"}}'
    counted = {name.format("berlin", status): 0 for status in hostenroll.STATUSES}
    counted[name.format("berlin", "pending")] = 1
    assert samples(estate.read_as("stranger", "/metrics")) == counted


# API keys that make API keys.


def mint_key(estate, caller="admin", **body):
    """A key that another made: its id, and the new caller's name is that."""
    reply = estate.call_as(caller, "POST", "/api/keys", body)
    assert reply.status == 201, reply
    key = reply.document["id"]
    estate.callers[key] = reply.document["apiKey"]
    return key


def works(estate, caller):
    code = estate.call_as(caller, "GET", "/api/me").code
    assert code in (None, "api-key-invalid")
    return code is None


def listed_keys(estate, caller):
    document = estate.read_as(caller, "/api/keys?limit=1000")
    return {key["id"]: key for key in document["apiKeys"]}


WIDER = {
    # who asks, for what, and what comes of it: the organization and the role, or a refusal
    "its own by default": ("admin", {}, ("default", "admin")),
    "its own, and no more than it": ("admin", {"organizationId": None}, ("default", "admin")),
    "its own by name": ("admin", {"organizationId": "default"}, ("default", "admin")),
    "another": ("admin", {"organizationId": "berlin"}, "not-found"),
    "one that is not there": ("admin", {"organizationId": "nothing"}, "not-found"),
    "a viewer's": ("admin", {"role": "viewer"}, ("default", "viewer")),
    "by a viewer": ("viewer", {"role": "viewer"}, "forbidden"),
    "of all by one of all": ("owner", {}, (None, "admin")),
    "of one by one of all": ("owner", {"organizationId": "berlin"}, ("berlin", "admin")),
    "of none by one of all": ("owner", {"organizationId": "nothing"}, "invalid-body"),
    "another role": ("owner", {"role": "owner"}, "invalid-body"),
    "no time at all": ("admin", {"ttlSeconds": 0}, "invalid-body"),
}


@pytest.mark.parametrize("caller, body, expected", table(WIDER))
def test_no_key_makes_one_that_may_more_or_sees_more(caller, body, expected, estate):
    before = remembered(estate)
    reply = estate.call_as(caller, "POST", "/api/keys", body)
    if isinstance(expected, str):
        assert reply.code == expected and remembered(estate) == before
        return
    document = reply.document
    assert (document["organizationId"], document["role"]) == expected
    assert document["createdBy"] == f"api-key:{estate.key_id(caller)}"
    estate.callers["new"] = document.pop("apiKey")
    me = estate.read_as("new", "/api/me")
    assert (me["organizationId"], me["role"]) == expected
    assert listed_keys(estate, caller)[document["id"]]["createdBy"] == document["createdBy"]
    event = estate.audit("mint")[-1]
    assert (event["actor"], event["subject"]) == (
        document["createdBy"], f"api-key:{document['id']}")  # fmt: skip


def test_a_key_lists_and_revokes_those_of_its_organization_alone(estate):
    own = {estate.key_id(name) for name in ("admin", "viewer", "spare")}
    assert set(listed_keys(estate, "admin")) == own
    assert set(listed_keys(estate, "owner")) > own | {estate.key_id("stranger")}
    for name in ("owner", "stranger"):
        reply = estate.call_as("admin", "DELETE", f"/api/keys/{estate.key_id(name)}?withKeys=true")
        assert reply.code == "not-found" and works(estate, name)
    assert estate.call_as("admin", "DELETE", f"/api/keys/{estate.key_id('spare')}").status == 204
    assert not works(estate, "spare")
    assert listed_keys(estate, "admin")[estate.key_id("spare")]["state"] == "revoked"


def test_a_key_is_revoked_with_all_that_came_of_it(estate):
    """Also of one between that is revoked already; and by the command."""
    first = mint_key(estate)
    second = mint_key(estate, first)
    third = mint_key(estate, second, role="viewer")
    other = mint_key(estate)
    assert estate.call_as("admin", "DELETE", f"/api/keys/{second}").status == 204
    assert [works(estate, name) for name in (first, second, third)] == [True, False, True]
    assert estate.call_as("admin", "DELETE", f"/api/keys/{first}?withKeys=true").status == 204
    assert [works(estate, name) for name in (first, third, other, "admin")] == [
        False, False, True, True]  # fmt: skip
    revoked = [event["subject"] for event in estate.audit("revoke")[-3:]]
    assert revoked == [f"api-key:{key}" for key in (second, third, first)]
    estate.act("revoke-api-key", int(estate.key_id("admin"), 16), withKeys="true")
    assert not works(estate, other)


def test_many_keys_are_revoked_some_at_a_time(estate, monkeypatch):
    first = mint_key(estate)
    made = [mint_key(estate, first) for _ in range(7)]
    monkeypatch.setattr(hostenroll, "ACTED_AT_ONCE", 3)
    estate.act("revoke-api-key", int(first, 16), withKeys="true")
    assert [works(estate, name) for name in (first, *made)] == [False] * 8


def test_a_key_does_not_revoke_itself_by_mistake(estate):
    """Nor by what made it, with all that came of that."""
    child = mint_key(estate)
    before = remembered(estate)
    own = f"/api/keys/{estate.key_id('admin')}"
    for caller, path in (("admin", own), ("admin", f"{own}?self=false"),
                         (child, f"{own}?withKeys=true")):  # fmt: skip
        reply = estate.call_as(caller, "DELETE", path)
        assert reply.code == "conflict" and "self=true" in reply.document["detail"]
        assert remembered(estate) == before
    assert estate.call_as(child, "DELETE", f"{own}?withKeys=true&self=true").status == 204
    assert [works(estate, name) for name in ("admin", child)] == [False, False]


def test_a_key_with_an_end_is_refused_from_then_on(estate):
    key = mint_key(estate, ttlSeconds=3600)
    document = listed_keys(estate, "admin")[key]
    assert document["expiresAt"] == "2027-01-15T09:00:00.000Z" and document["state"] == "valid"
    estate.advance(3599.999)
    assert works(estate, key)
    text = "GET /api/me HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {}\r\n\r\n"
    late = estate.admit(text.format(estate.callers[key]).encode())
    estate.advance(0.001)
    (outcome,) = estate.run(late)
    assert isinstance(outcome, hostenroll.ApiKeyInvalid)  # though it was good before the tick
    reply = estate.call_as(key, "GET", "/api/me")
    assert reply.code == "api-key-invalid" and "expired" in reply.document["detail"]
    assert listed_keys(estate, "admin")[key]["state"] == "expired"
    lasting = mint_key(estate, ttlSeconds=None)
    assert listed_keys(estate, "admin")[lasting]["expiresAt"] is None


def test_when_a_key_was_used_is_known_to_the_hour_and_costs_no_request_a_write(estate):
    assert listed_keys(estate, "owner")[estate.key_id("viewer")]["lastUsedAt"] is None
    writes = estate.sql("PRAGMA data_version"), estate.registry.metrics.commits.sum
    assert works(estate, "viewer")
    assert (estate.sql("PRAGMA data_version"), estate.registry.metrics.commits.sum) == writes
    times = []
    for seconds in (0, 10, 3580, 20):
        estate.advance(seconds)
        assert works(estate, "viewer")
        estate.housekeeping()
        assert estate.sql("PRAGMA synchronous") == [(1,)]
        times.append(listed_keys(estate, "owner")[estate.key_id("viewer")]["lastUsedAt"])
    first, second = "2027-01-15T08:00:00.000Z", "2027-01-15T09:00:10.000Z"
    assert times == [first, first, first, second]


def test_organizations_are_listed_and_added_over_http(estate):
    for caller, expected in (("owner", ["berlin", "default"]), ("stranger", ["berlin"]),
                             ("viewer", ["default"])):  # fmt: skip
        listed = estate.read_as(caller, "/api/organizations")["organizations"]
        assert [each["id"] for each in listed] == expected
    assert estate.call_as("admin", "POST", "/api/organizations", {"name": "x"}).code == "forbidden"
    assert estate.call_as("owner", "POST", "/api/organizations", {"name": "x"}).status == 201
    assert estate.call_as("owner", "POST", "/api/organizations", {"name": "x"}).code == "conflict"


# The audit log.


def test_every_act_is_in_the_log(paths, clock):
    with World(paths, clock, credential_ttl=300) as world:
        key, actions = f"api-key:{world.api_key.split('_')[1]}", []

        def happened(action, actor, subject, organization="default", **more):
            """The newest event is this, and no other came with it."""
            actions.append(action)
            events = world.audit()
            address = more.get("to", ADDRESS)
            address = None if "signing-key" in subject else address  # keys are the machine's own
            assert [event["action"] for event in events] == actions
            assert events[-1] == {
                "number": len(events), "time": hostenroll.rfc3339(clock.ms), "action": action,
                "actor": actor, "address": address, "subject": subject, "code": None,
                "organizationId": organization, "detail": {**events[-1]["detail"], **more},
            }  # fmt: skip
            clock.advance(1)

        happened("mint", "cli:test", key, None, role="admin")
        asked = {"maxUses": 2, "description": "cellar", "labels": {"a": "b"}}
        minted = world.mint(**asked, ttlSeconds=86_400).document
        token, expires = f"token:{minted['id']}", minted["expiresAt"]
        happened("mint", key, token, maxUses=2, description="cellar", expiresAt=expires)
        number = world.enroll(minted["token"], "web-1", "k").document["hostId"]
        host = f"host:{number}"
        happened("enroll", token, host, hostname="web-1")
        clock.advance(3600)
        again = world.enroll(minted["token"], "web-1", "k").document
        happened("replay", token, host, serial=2)
        world.beat(again["credential"])
        happened("supersede", host, host, serial=2, superseded=1)
        clock.advance(201)
        renewed = world.beat(again["credential"]).document["credential"]
        happened("renew", host, host, serial=3)
        world.beat(renewed)
        happened("supersede", host, host, serial=3, superseded=2)
        for digit in "abab":
            world.beat(renewed, instance=digit * 16)
        happened("clone", host, host, hostname="web-1", otherHostname="web-1", otherAddress=ADDRESS)
        world.address = "192.0.2.8"
        world.beat(renewed)
        happened("move", host, host, **{"from": ADDRESS, "to": world.address})
        world.address = ADDRESS
        bound = world.reenroll(number).document
        happened("mint", key, f"token:{bound['id']}", host=number, maxUses=1)
        world.enroll(bound["token"], "web-2")
        newest = 3 + hostenroll.SERIALS_LOST + 1
        happened("re-enroll", f"token:{bound['id']}", host, hostname="web-2", serial=newest)
        world.ask("PATCH", f"/api/hosts/{number}", {"name": "x", "labels": {}})
        happened("edit", key, host, name="x", labels={})
        for verb, more in (("revoke", {}), ("restore", {}), ("delete", {"hostname": "web-2"})):
            getattr(world, verb)(number)
            happened(verb, key, host, **more)
        world.revoke_token(minted["id"])
        happened("revoke", key, token)
        world.act("add-org", name="berlin")
        happened("add", "cli:test", "organization:berlin", "berlin")
        other = make_api_key(world.registry, clock, "berlin", "viewer").split("_")[1]
        happened("mint", "cli:test", f"api-key:{other}", "berlin", role="viewer")
        world.act("revoke-api-key", other)
        happened("revoke", "cli:test", f"api-key:{other}", "berlin")
        old = world.act("list-signing-keys").items[0].key.kid
        new = world.act("rotate-signing-key").key.kid
        happened("rotate", "cli:test", f"signing-key:{new}", None)
        world.act("retire-signing-key", kid=old, force=True)
        happened("retire", "cli:test", f"signing-key:{old}", None)
        rest = {"refuse", "init", "audit-format", "certificate"}
        assert set(actions) == set(hostenroll.ACTIONS) - rest
        assert verify_audit(world.registry, None).last == len(actions)


ATTEMPTS = {
    "mint": lambda e: e.callers.update(fresh=e.token()),
    "mint for db-1": lambda e: e.callers.update(fresh=e.token(hostname="db-1")),
    "re-mint": lambda e: e.callers.update(fresh=e.reenroll(e.host_id).document["token"]),
    "wait": lambda e: e.advance(3600),
    "revoke token": lambda e: e.revoke_token(e.key_id("fresh")),
    "enroll": lambda e: e.enroll(e.callers["fresh"]),
    "enroll junk": lambda e: e.enroll("het_junk"),
    "guess": lambda e: e.enroll(hostenroll.mint_secret("het", int(e.token_id, 16)).text),
    "revoke": lambda e: e.revoke(e.host_id),
    "delete": lambda e: e.delete(e.host_id),
    "beat": lambda e: e.beat(e.credential),
    "beat newer": lambda e: e.beat(e.enroll(e.callers["fresh"]).document["credential"]),
    "beat expired": lambda e: e.beat(e.registry.keys.keyring.first.sign(hostenroll.Claims(
        int(e.host_id, 16), "default", 0, 1, 1, e.registry.keys.keyring.first.kid))),
    "beat junk": lambda e: e.beat("junk"),
    "beat without": lambda e: e.call("POST", BEAT_PATH),
    "ask without": lambda e: e.call("GET", "/api/me"),
    "ask as junk": lambda e: e.call_as("junk", "GET", "/api/me"),
    "ask as revoked": lambda e: e.call_as("revoked", "GET", "/api/me"),
    "mint as viewer": lambda e: e.call_as("viewer", "POST", TOKENS_PATH),
}  # fmt: skip
AUDITED = {  # what is tried, the code, the actor and subject, the organization
    "no token of ours": ("enroll junk", "token-unknown", "anonymous", None),
    "a guessed token": ("guess", "token-unknown", "anonymous token:{token}", None),
    "late": ("mint, wait, enroll", "token-expired", "token:{fresh}", "default"),
    "a revoked token": ("mint, revoke token, enroll", "token-revoked", "token:{fresh}", "default"),
    "twice": ("mint, enroll, enroll", "token-used", "token:{fresh}", "default"),
    "another host": ("mint for db-1, enroll", "token-host-mismatch", "token:{fresh}", "default"),
    "shut out, by token": ("re-mint, revoke, enroll", "host-revoked", "token:{fresh}", "default"),
    "no credential": ("beat without", "credential-missing", "anonymous", None),
    "no credential of ours": ("beat junk", "credential-invalid", "anonymous", None),
    "an old one": ("re-mint, beat newer, beat", "credential-superseded", "host:{host}", "default"),
    "an expired one": ("beat expired", "credential-expired", "host:{host}", "default"),
    "shut out": ("revoke, beat", "host-revoked", "host:{host}", "default"),
    "gone": ("delete, beat", "host-unknown", "host:{host}", "default"),
    "no API key": ("ask without", "api-key-invalid", "anonymous", None),
    "no API key of ours": ("ask as junk", "api-key-invalid", "anonymous", None),
    "a revoked one": ("ask as revoked", "api-key-invalid", "api-key:{revoked}", None),
    "a viewer who acts": ("mint as viewer", "forbidden", "api-key:{viewer}", "default"),
}  # fmt: skip


def test_every_refusal_that_is_audited_is_tried_here():
    audited = {problem.code for problem in hostenroll.problems() if problem.is_audited}
    assert {row[1] for row in AUDITED.values()} == audited - {"too-many-requests"}
    assert not {"not-found", "conflict", "invalid-body", "method-not-allowed", "internal"} & audited


@pytest.mark.parametrize("tried, code, actor, organization", table(AUDITED))
def test_a_refusal_is_in_the_log_with_who_and_whence(tried, code, actor, organization, estate):
    estate.address = "192.0.2.9"
    replies = [ATTEMPTS[attempt](estate) for attempt in tried.split(", ")]
    assert replies[-1].code == code
    estate.housekeeping()
    ids = {name: estate.key_id(name) for name in {*estate.callers} & {"fresh", "revoked", "viewer"}}
    actor, *subject = actor.format(**ids, host=estate.host_id, token=estate.token_id).split()
    (event,) = estate.audit("refuse")
    assert event == estate.audit()[-1]
    names = "code", "actor", "subject", "organizationId", "address", "time"
    assert [event[name] for name in names] == [
        code, actor, *(subject or [None if actor == "anonymous" else actor]), organization,
        estate.address, hostenroll.rfc3339(estate.clock.ms),
    ]  # fmt: skip


def test_a_copied_credential_or_token_shows_with_both_addresses(estate):
    token = estate.reenroll(estate.host_id).document["token"]
    estate.address = "192.0.2.8"
    newer = estate.enroll(token).document["credential"]
    estate.address = "192.0.2.9"
    assert estate.enroll(token).code == "token-used"
    used = estate.audit("re-enroll")[-1]["actor"].partition(":")[2]
    assert estate.show_token(used).document["usedFrom"] == "192.0.2.8"
    assert estate.audit()[-1]["address"] == "192.0.2.9"
    estate.address = "192.0.2.88"
    assert estate.beat(newer).status == 200
    estate.address = "198.51.100.9"
    for facts in ({}, {"os": "linux"}):  # a plain heartbeat, and a call
        assert estate.beat(estate.credential, **facts).code == "credential-superseded"
    estate.housekeeping()
    superseded, *refused = estate.audit()[-3:]
    assert (superseded["action"], superseded["address"]) == ("supersede", "192.0.2.88")
    newest = 1 + hostenroll.SERIALS_LOST + 1
    for event in refused:
        assert (event["code"], event["address"]) == ("credential-superseded", "198.51.100.9")
        assert event["detail"] == {"serial": 1, "newest": newest, "newestIssuedTo": "192.0.2.8"}


def test_the_log_is_listed_the_newest_first_page_by_page(estate):
    estate.enroll(estate.minted["token"], "web-2")
    for _ in range(105):  # more than are read at once
        estate.ask("PATCH", f"/api/hosts/{estate.host_id}", {"name": "x"})
    for _ in range(3):
        assert estate.enroll(estate.minted["token"]).code == "token-used"
    everything = estate.audit()[::-1]
    assert [event["number"] for event in everything] == list(range(len(everything), 0, -1))
    token = f"subject=token:{estate.token_id}"
    for query in (
        "", "action=enroll", "action=refuse", "action=delete", f"subject=host:{estate.host_id}",
        token, "code=token-used", "code=x", "organization=berlin",
        f"organization=default&action=refuse&code=token-used&{token}",
    ):  # fmt: skip
        pairs = query.replace("organization", "organizationId").split("&")
        chosen = dict(pair.split("=") for pair in pairs if pair)
        wanted = [event for event in everything if {**event, **chosen} == event]
        path = f"/api/audit?limit={{}}&{query}"
        for limit in (7, 1000) if len(wanted) > 20 else (1, 2, 3, 1000):
            found = walk(estate, estate.api_key, path.format(limit))
            assert found == wanted, (query, limit)
        below = walk(estate, estate.api_key, f"{path.format(1000)}&cursor={40:016x}")
        assert below == [event for event in wanted if event["number"] < 40], query


# Secrets.


def parts_in(haystack, secrets):
    """The secrets of which a part stands in a text."""
    return [text for text in secrets if any(
        text[at : at + 12] in haystack for at in range(0, len(text) - 12, 6))]  # fmt: skip


def misplace_secrets(world, viewer, texts):
    """Present every secret where it does not belong."""
    for text in texts:
        world.enroll(text, "web-1")
        world.beat(text)
        world.call("GET", "/api/me", bearer=text)
        for method, key in itertools.product(("GET", "DELETE"), (viewer, "hak_junk", None)):
            for path in (f"hosts/{text}", f"hosts/tokens/{text}", f"hosts?q={text}"):
                world.call(method, f"/api/{path}", bearer=key)
    for text in texts[:4]:
        world.enroll("web-1", text)  # the two in the wrong order
    world.housekeeping()


def test_no_secret_is_ever_in_the_database_or_the_log(paths, clock, caplog):
    caplog.set_level("INFO", logger="hostenroll")
    with World(paths, clock, credential_ttl=300) as world:
        viewer = make_api_key(world.registry, clock, "default", "viewer")
        token, spare = world.token(maxUses=2), world.token()
        replies = [world.enroll(token, key="a-key-of-mine").document for _ in range(2)]
        credentials = [reply["credential"] for reply in replies]
        world.beat(credentials[1])
        clock.advance(250)
        credentials.append(world.beat(credentials[1], os="linux").document["credential"])
        for credential in (credentials[2], credentials[0], credentials[0][:-1] + "_"):
            world.beat(credential)
        world.enroll(world.reenroll(replies[0]["hostId"]).document["token"])
        world.act("rotate-signing-key")
        texts = [world.api_key, viewer, token, spare, *credentials]
        misplace_secrets(world, viewer, texts)
        ring = world.registry.keys.keyring
        octets = [*(key.octets for key in ring.keys), ring.audit_key]
        rows = world.snapshot()
        assert len(rows["audit"]) > 50 and "GET /api/hosts" in str(rows["audit"])
    # The ids of tokens and keys, and what credentials say, are no secrets.
    secrets = ["a-key-of-mine", *(text.split("_", 2)[2][:43] for text in texts[:4])]
    secrets += [credential.split(".")[2] for credential in credentials]
    secrets += [base64.urlsafe_b64encode(key).decode().rstrip("=") for key in octets]
    assert not [name for name in rows for row in rows[name] if parts_in(str(row), secrets)]
    files = [Path(paths[0]), Path(f"{paths[0]}-wal")]
    raw = b"".join(path.read_bytes() for path in files if path.exists())
    assert len(raw) > 10_000 and not any(key in raw for key in octets)
    assert parts_in(raw.decode("latin-1"), secrets) == []
    formatters = [hostenroll.LogHandler(is_json) for is_json in (True, False)]
    logged = "\n".join(form.format(record) for record in caplog.records for form in formatters)
    assert "enroll" in logged and parts_in(logged, secrets) == []


def test_a_wrong_secret_is_refused_without_a_tick(world, paths):
    """It takes no lock, and no heartbeat waits for the disk because of it."""
    requests = []
    for good in (world.token(), world.api_key):
        guess = hostenroll.mint_secret(good[:3], 1 << 40).text
        for wrong in (good[:-9] + "AB"[good[-9] == "A"] + good[-8:], guess):
            requests += [
                ("POST", ENROLL_PATH, {"token": wrong, "hostname": "web-1"}),
                ("GET", "/api/me", None, wrong), ("POST", TOKENS_PATH, {}, wrong),
            ]  # fmt: skip
    lock = hostenroll.WriteLock(paths[0])
    lock.acquire(5)
    refused = [world.admit(request_bytes(*request)) for request in requests]
    lock.close()
    codes = ["token-unknown", "api-key-invalid", "api-key-invalid"] * 4
    assert [json.loads(one.body)["code"] for one in refused] == codes
    assert world.registry.metrics.refusals == {"token-unknown": 4, "api-key-invalid": 8}


def test_a_secret_that_could_not_be_looked_up_is_not_called_wrong(world):
    token, beat = world.token(), beat_bytes(world.join()[1], os="Debian")
    for ask in (
        lambda: world.enroll(token),
        lambda: world.ask("GET", "/api/me"),
        lambda: world.tick([beat])[0],  # the host is looked up for its facts
    ):
        with faulty(world.registry, n=1) as connection:
            assert ask().code == "storage-unavailable" and connection.failed
        assert ask().status in (200, 201)
    assert world.registry.metrics.refusals == {"storage-unavailable": 3}


def test_a_secret_is_looked_up_once_in_a_request(world, monkeypatch):
    lookups, get = [], hostenroll.Queries.get

    def counted(queries, record, number):
        # In the tick a key may have been revoked meanwhile: that is asked by its id.
        if record is hostenroll.Token or not world.registry.engine.db.in_transaction:
            lookups.append(number)
        return get(queries, record, number)

    monkeypatch.setattr(hostenroll.Queries, "get", counted)
    token = world.token()
    assert len(lookups) == 1
    assert world.enroll(token).status == 201 and len(lookups) == 2


# What documents say about the caller and the service.


def test_me_shows_whose_a_key_is_and_the_service_how_hosts_find_it(estate):
    for caller, role, organization in (
        ("owner", "admin", None), ("viewer", "viewer", "default"), ("stranger", "admin", "berlin")
    ):  # fmt: skip
        me = {"id": estate.key_id(caller), "role": role, "organizationId": organization}
        assert estate.read_as(caller, "/api/me") == me
    shown = estate.read_as("viewer", "/api/service")
    assert (shown["publicUrl"], shown["pin"]) == ("http://127.0.0.1:8080", None)  # no server yet
    pins = f"{pin_of('one')};{pin_of('other')}"
    announce(estate, pin_of("one"), pins)
    estate.perform(partial(estate.registry.service.start, "https://enroll.lan:8443"))
    estate.housekeeping()
    shown = estate.read_as("viewer", "/api/service")
    command, renewal = shown.pop("joinCommand"), shown.pop("agentCommand")
    assert shown == {
        "version": hostenroll.__version__, "publicUrl": "https://enroll.lan:8443",
        "pin": pins, "heartbeatIntervalSeconds": 30, "auditKeepSeconds": None,
        "credentialTtlSeconds": None, "certificateEndsAt": "9999-12-31T23:59:59.976Z",
    }  # fmt: skip
    whole = hostenroll.join_command(shown["publicUrl"], shown["pin"], "het_x").replace("\n ", "")
    assert command.replace("TOKEN", "het_x") == whole and "\n" not in command
    assert "--install" in renewal and "printf" not in renewal and "\n" not in renewal


ODD_TEXTS = {  # by column of service
    "pin": ("x", "\x1b[2J", '";id;"', PINS[0][:-1], f"{PINS[0]}\n", f"{PINS[0]};", f" {PINS[0]}",
            f"{BOTH};{BOTH};{PINS[0]}"),
    "public_url": ("", "u", "http://a b", "http://$(id)", "https://a;id", "http://a'b",
                   "http://a\n", 'https://"', "ftp://a", "https://\u0430.lan"),
}  # fmt: skip


def test_no_odd_text_of_a_database_becomes_a_command(estate):
    for good in ("", PINS[0], BOTH, f"{BOTH};{BOTH}"):
        estate.perform(partial(estate.registry.service.start, "https://enroll.lan"))
        estate.sql("UPDATE service SET pin = ?", good)
        assert estate.read_as("viewer", "/api/service")["pin"] == (good or None)
    for column, texts in ODD_TEXTS.items():
        for text in texts:
            estate.perform(partial(estate.registry.service.start, "https://enroll.lan"))
            estate.sql(f"UPDATE service SET {column} = ?", text)
            refused = estate.call_as("viewer", "GET", "/api/service")
            assert (refused.status, refused.code) == (503, "storage-unavailable"), text
            assert "start serve again" in refused.document["detail"]
            assert estate.call_as("viewer", "GET", "/api/hosts").status == 200


def test_a_metric_says_when_the_certificate_ends_to_who_may_see_the_process(estate):
    name = "hostenroll_tls_certificate_not_after_seconds"
    assert name not in estate.read_as("owner", "/metrics")
    announce(estate, PINS[0], ends=1_800_000_000_999)
    shown = estate.read_as("owner", "/metrics")
    assert f"# TYPE {name} gauge\n{name} 1800000000\n" in shown
    assert name not in estate.read_as("viewer", "/metrics")


# 10. Server

HEALTH = request_bytes("GET", "/healthz")
NOTHING_HERE = request_bytes("GET", "/nothing")
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl program")
RESETS = struct.pack("ii", 1, 0)  # as SO_LINGER: close() sends RST


@pytest.fixture
def secure(paths, clock):
    with start_server(paths, clock=clock, tls=True) as secure:
        yield secure


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A server without TLS and one with it, for all that leaves nothing behind."""
    folders = [tmp_path_factory.mktemp(name) for name in ("plain", "tls")]
    with start_server(folders[0], clock=Clock()) as plain:
        with start_server(folders[1], clock=Clock(), tls=True) as secure:
            yield plain, secure


def in_states(**seconds):
    return {getattr(hostenroll, name.upper()): value for name, value in seconds.items()}


def all_states(seconds):
    """The same deadline in every state that has one, but for answers."""
    return in_states(handshake=seconds, head=seconds, body=seconds, idle=seconds)


@contextlib.contextmanager
def write_lock(database):
    """What another process does that writes for a long time."""
    with open(f"{database}.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_to_end(peer):
    """Everything up to the end of a connection, however it ends."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := peer.recv(65536):
            received += data
    return received


def is_refused(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return False
    return True


def is_readable(peer, seconds=0.0):
    return bool(select.select([peer], [], [], seconds)[0])


def exchange(peer, stream, *requests):
    """Send requests one after the other on one connection; the reply to each."""
    replies = []
    for request in requests:
        peer.sendall(request)
        replies.append(read_reply(stream))
    return replies


def small_buffers(port, size=4096):
    """A connection of which the kernel takes only a little at once."""
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    peer.settimeout(10)
    peer.connect(("127.0.0.1", port))
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peer


def buffered(live):
    """Bytes that a server in this process buffers for its connections."""
    return live.server._connections.buffered


def tokens_of(door):
    return len(door.ask("GET", "/api/hosts/tokens?limit=1000").document["tokens"])


def beat_of(door, *headers):
    """The heartbeat of a host that has just enrolled, as bytes."""
    return request_bytes("POST", "/api/agent/heartbeat", None, door.join()[1], headers)


def many(count, work):
    """The same in several threads that start together; what each returns."""
    barrier, results = threading.Barrier(count), [None] * count

    def one(n):
        barrier.wait(10)
        results[n] = work(n)

    threads = [threading.Thread(target=one, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


# Requests and deadlines of a connection.


@pytest.mark.parametrize("state", hostenroll.STATES[:-1], ids=lambda state: state.name)
def test_only_an_idle_connection_gets_more_time_when_its_state_is_entered_again(state):
    ours, theirs = socket.socketpair()
    connections = hostenroll.Connections({}, hostenroll.Metrics())
    with ours, theirs, connections.selector:
        connection = hostenroll.Connection(ours, RequestReader(), state)
        connections.add(connection)
        end = connections.moment + state.deadline + (state is hostenroll.IDLE)
        connections.moment += 1
        connections.move(connection, state)
        assert connections.next_deadline() == end
        for connections.moment, overdue in ((end - 0.001, []), (end, [connection])):
            is_endless = state in (hostenroll.BUSY, hostenroll.HELD)
            assert is_endless or connections.overdue() == overdue


def test_pipelined_requests_are_answered_in_order_and_each_in_full(live):
    mint = request_bytes("POST", "/api/hosts/tokens", {"description": "x" * 500}, live.api_key)
    head, _, body = mint.partition(b"\r\n\r\n")
    chunked = head.replace(b"Content-Length: %d" % len(body), b"Transfer-Encoding: chunked")
    chunked += b"\r\n\r\n%x;a=b\r\n%b\r\n0\r\nX: y\r\n\r\n" % (len(body), body)
    turn = [HEALTH, mint, NOTHING_HERE, chunked, request_bytes("GET", "/api/me")]
    turn.append(request_bytes("POST", ENROLL_PATH, b"{"))
    replies = live.send(b"".join(turn) * 30)
    assert [reply.status for reply in replies] == [200, 201, 404, 201, 401, 400] * 30
    assert tokens_of(live) == 60


POST = b"POST /api/hosts/tokens HTTP/1.1\r\nHost: a\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"


def test_a_message_that_cannot_be_read_is_answered_once_and_nothing_behind_it_is_run(twins):
    """What one reader takes for a body and another for the next request is how requests are
    smuggled: behind each a request is hidden that would mint a token."""
    hidden = request_bytes("POST", "/api/hosts/tokens", {}, twins[0].api_key)
    for name, (data, code) in BAD.items():
        replies = twins[0].send(HEALTH + data + hidden)
        assert [reply.code for reply in replies] == [None, code], name
        require_common_headers(replies[-1])
        require_declared(replies[-1], hostenroll.problems())
        assert replies[-1].headers["connection"] == "close"
        assert replies[-1].headers["x-request-id"].endswith("-2")
    assert tokens_of(twins[0]) == 0


def test_tiny_chunks_are_read_a_few_in_a_turn(live):
    """All that arrives at once would be much work, and two thousand peers may send it at once."""
    body = json.dumps({"description": "x" * 990}).encode()
    head = POST + CHUNKED + b"Authorization: Bearer " + live.api_key.encode() + b"\r\n\r\n"
    whole = head + b"".join(b"1\r\n%c\r\n" % octet for octet in body) + b"0\r\nX: y\r\n\r\n"
    replies = live.send(whole + HEALTH + whole)  # and then a half-close
    assert [reply.status for reply in replies] == [201, 200, 201]
    assert replies[0].document["description"] == "x" * 990
    broken = whole.replace(b"0\r\nX: y", b"0\r\nX y")
    assert [reply.status for reply in live.send(HEALTH + broken + HEALTH)] == [200, 400]
    assert tokens_of(live) == 2
    reader = RequestReader()
    found = [reader.next(whole)]
    while found[-1] is None:
        assert reader.has_more
        found.append(reader.next())
    assert found[-1].body == body and not reader.has_more
    assert len(found) > len(body) // hostenroll.CHUNK_LINES_AT_ONCE


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_the_100_that_continues(tls, paths, clock):
    with start_server(paths, clock=clock, tls=tls) as live:
        headers = [("Expect", "100-continue")]
        mint = request_bytes("POST", "/api/hosts/tokens", {"maxUses": 3}, live.api_key, headers)
        head, end, body = mint.partition(b"\r\n\r\n")
        with live.connect() as peer, peer.makefile("rb") as stream:
            for _ in range(2):
                peer.sendall(head + end)
                assert stream.read(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
                assert exchange(peer, stream, body)[0].document["maxUses"] == 3
        # Not where the body has arrived already, or will never be accepted.
        large = head.replace(b"Content-Length: ", b"Content-Length: 99999") + end
        for data, status in ((mint, 201), (large, 413)):
            assert [reply.status for reply in live.send(data)] == [status]


def test_a_peer_that_still_sends_can_read_the_refusal(live):
    """To close on unread bytes resets the connection, and the answer would be lost."""
    head = b"POST /api/agent/enroll HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n"
    for waits in (True, False, False):
        with live.connect() as peer, peer.makefile("rb") as stream:
            peer.sendall(head)
            if waits:  # the head alone is refused
                is_readable(peer, 10)
            for _ in range(100):
                peer.sendall(b"x" * 10_000)
            assert read_reply(stream).code == "body-too-large"
            assert stream.read() == b""


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_an_answer_that_is_not_taken_is_dropped(tls, served):
    live = served(hosts=1000, tls=tls, connections=1, deadlines=in_states(writing=0.1))
    ask = request_bytes("GET", "/api/hosts?limit=1000", bearer=live.api_key)
    with live.connect() if tls else small_buffers(live.port) as peer:
        peer.sendall(ask * 40)  # 16 MB of answers
        # There is one place, and it is not given to a new connection: it becomes free.
        assert live.call("GET", "/healthz").status == 200
        assert tls or len(read_to_end(peer)) < 14_000_000


# Places for connections.


HALF_SENT = POST + b"Content-Length: 9\r\n\r\n{"
EVICTED = {  # places, which connection sends what (None: a heartbeat), and which are closed in turn
    "silent from the beginning": (3, [(1, HEALTH), (2, HEALTH)], [0, 0, 0]),
    "not used again": (2, [(0, HEALTH), (1, HEALTH), (0, HEALTH)], [1, 0]),
    "not used again for a heartbeat": (2, [(0, HEALTH), (1, HEALTH), (0, None)], [1, 0]),
    # Else a peer that stalls in as many bodies as there are places keeps everyone out.
    "stalled in its body": (2, [(0, HALF_SENT), (1, HALF_SENT)], [0]),
}  # fmt: skip


@pytest.mark.parametrize("count, uses, gone", table(EVICTED))
def test_at_the_limit_the_longest_silent_connection_is_closed(count, uses, gone, served):
    """Between two requests or before the first: a crowd that never asks for anything must not push
    out those who do."""
    live = served(connections=count)
    beat = beat_of(live)
    peers = live.peers(count)
    for n, data in uses:
        peers[n].sendall(data or beat)
        if data is HALF_SENT:  # it is read before the next one is
            waiting = live.server._connections._queues[hostenroll.BODY]
            until(lambda waiting=waiting, n=n: len(waiting) > n)
        else:
            assert peers[n].recv(65536).startswith(b"HTTP/1.1 200 ")
    for n in gone:
        (late,) = live.peers(1)
        late.sendall(HEALTH[:9])
        assert read_to_end(peers.pop(n)) == b""
        assert select.select(peers, [], [], 0)[0] == []
    late.sendall(HEALTH[9:])
    assert late.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_at_the_limit_a_connection_whose_request_runs_is_never_closed(served, paths):
    live = served(connections=2)
    with write_lock(paths[0]):
        peers = []
        for _ in range(3):  # the third comes when the requests of the others have been sent
            peers += live.peers(1)
            peers[-1].sendall(request_bytes("POST", "/api/hosts/tokens", {}, live.api_key))
        assert not is_readable(peers[2], 0.1)
    for peer in peers:
        assert peer.recv(65536).startswith(b"HTTP/1.1 201 ")
        peer.close()
    assert tokens_of(live) == 3


@contextlib.contextmanager
def crowd(port, count, at_once, begun):
    """Connections that stay unfinished; yields whether all of them stand. At the end all do."""
    limits, waiting = resource.getrlimit(resource.RLIMIT_NOFILE), select.poll()
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        peers = [stack.enter_context(socket.socket()) for _ in range(count)]

        def stand():
            for peer in peers if at_once else ():
                peer.setblocking(False)
                peer.connect_ex(("127.0.0.1", port))
            for n, peer in enumerate(peers):
                peer.settimeout(30)
                peer.connect_ex(("127.0.0.1", port))  # a second time, for nothing, if at once
                peer.sendall(begun[n % len(begun)])
                waiting.register(peer, select.POLLIN)

        thread = threading.Thread(target=stand)
        thread.start()
        yield lambda: not thread.is_alive()
        thread.join(60)
        assert waiting.poll(0) == [] and not thread.is_alive()


def resident(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)[1]) * 1024


def timed_beats(door, credential, turns):
    """How long each heartbeat takes, on a kept connection and on one of its own in turn."""
    beat, took = beat_bytes(credential), []
    with door.connect(30) as kept:
        for n, _ in enumerate(turns):
            began = time.perf_counter()
            with contextlib.nullcontext(kept) if n % 2 else door.connect(30) as peer:
                peer.sendall(beat)
                assert b" 200 " in peer.recv(65536)
                took.append(time.perf_counter() - began)
    return took


@contextlib.contextmanager
def turned_by_hand(world):
    """A server: a function that runs one turn, and returns the processor time that it took; and one
    that connects."""
    with contextlib.ExitStack() as stack:
        server = hostenroll.Server(world.api, "127.0.0.1", 0, clock=world.clock)
        door = SocketDoor(stack.enter_context(server).server_port)

        def turn():
            began = time.thread_time()
            server._turn(0)
            return time.thread_time() - began

        yield turn, lambda: stack.enter_context(door.connect())


COSTLY = {  # what is in a member that no agent sends, and how long that is
    "64 KiB of objects": (b"{},", 65_000),
    "8 KiB of objects": (b"{},", 7_900),
    "8 KiB of numbers": (b"1,", 7_900),
    "8 KiB of texts": (b'"\\u0041",', 7_900),
}


@pytest.mark.parametrize("item, size", table(COSTLY))
def test_under_a_flood_of_costly_bodies_a_heartbeat_hardly_waits(item, size, world):
    """In processor time, because others use the machine too. 128 strangers, with and without
    secrets of the right shape, and a host that was deleted, send as fast as they are answered."""
    body = b'"x":[%b1]}' % (item * (size // len(item)))
    token = b'{"hostname":"web-1","token":"%b",' % hostenroll.mint_secret("het", 1).text.encode()
    (gone, deleted), (_, credential) = world.join(), world.join()
    world.delete(gone)
    requests = [request_bytes("POST", ENROLL_PATH, start + body) for start in (b"{", token)]
    requests += [
        request_bytes("POST", BEAT_PATH, b"{" + body, bearer) for bearer in (None, GENUINE, deleted)
    ]
    hostile, waits = itertools.cycle(requests), []
    with turned_by_hand(world) as (turn, connect):
        honest, crowd = connect(), [connect() for _ in range(128)]
        for peer in crowd:
            peer.sendall(next(hostile))
        for _ in range(40):
            honest.sendall(beat_bytes(credential))
            waits.append(turn())
            while not is_readable(honest):
                for n, peer in enumerate(crowd):
                    if is_readable(peer):
                        if b"Connection: close" in peer.recv(65536):
                            peer.close()
                            crowd[n] = peer = connect()
                        peer.sendall(next(hostile))
                waits[-1] += turn()
            assert honest.recv(65536).startswith(b"HTTP/1.1 200 ")
    # One may have had to wait for the garbage of all the tests before.
    assert sorted(waits)[-2] < 0.05


def test_what_a_refused_peer_goes_on_to_send_keeps_its_connection_for_a_few_turns(world):
    """Else peers that come back after each refusal would hold all connections that there may be."""
    with turned_by_hand(world) as (turn, connect):
        peer = connect()
        peer.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 65537\r\n\r\n" + b"x" * 50_000)
        peer.shutdown(socket.SHUT_WR)
        for _ in range(6):
            turn()
        assert world.api.metrics.open_connections == 0


def test_a_heartbeat_does_not_wait_until_all_other_requests_are_judged(world, monkeypatch):
    """Those wait for their turn, in their order, as long as it takes."""
    monkeypatch.setattr(hostenroll, "JUDGING_TIME", -1)  # one request in a turn
    _, credential = world.join()
    with turned_by_hand(world) as (turn, connect):
        honest, peers = connect(), [connect() for _ in range(10)]
        for peer in (*peers, honest):
            peer.sendall(beat_bytes(credential) if peer is honest else NOTHING_HERE * 2)
        turn()  # accepts and reads
        for n in range(20):
            turn()
            assert is_readable(honest)
            answered = [peer for peer in peers if is_readable(peer)]
            assert answered == [peers[n % 10]]
            assert answered[0].recv(65536).count(b"HTTP/1.1 404 ") == 1


BEGUN = (
    b"", b"GET /", b"GET / HTTP/1.1\r\nX: " + b"x" * 4000,
    POST + b"Content-Length: 9000\r\n\r\n" + b"x" * 6000,
    POST + CHUNKED + b"\r\n" + b"2\r\n{}\r\n" * 100,
)  # fmt: skip
HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 40


CROWDS = {
    "plain, at once": (False, True), "plain, one by one": (False, False),
    "tls, at once": (True, True), "tls, one by one": (True, False),
}  # fmt: skip


@needs_proc
@pytest.mark.parametrize("tls, at_once", sample(CROWDS, "plain, at once", "tls, one by one"))
def test_while_two_thousand_connections_stall_a_heartbeat_hardly_waits(tls, at_once, tmp_path):
    """A full queue of connections that wait to be accepted would cost an honest peer a second."""
    with start_server(tmp_path, how="process", tls=tls) as server:
        _, credential = server.join()
        timed_beats(server, credential, range(100))
        before = resident(server.process)
        count, begun = (1000, (b"", HELLO)) if tls else (2000, BEGUN)
        with crowd(server.port, count, at_once, begun) as stands:
            took = timed_beats(server, credential, iter(stands, True))
            took += timed_beats(server, credential, range(400))
            grown = resident(server.process) - before
        took.sort()
        assert took[-1] < 1 and took[len(took) * 99 // 100] < 0.25
        assert grown < 64 * 1024 * 1024


@needs_proc
def test_no_connection_is_closed_for_a_descriptor_that_is_not_needed(tmp_path):
    """accept() reports that there is none before it reports that no connection waits."""
    with start_server(tmp_path, how="process") as server:
        number = server.process.pid
        with server.connect() as idle, idle.makefile("rb") as stream:
            assert exchange(idle, stream, HEALTH)[0].status == 200
            limit = len(os.listdir(f"/proc/{number}/fd")) + 1
            resource.prlimit(number, resource.RLIMIT_NOFILE, (limit, limit))
            with server.connect() as last, last.makefile("rb") as answers:
                assert all(exchange(last, answers, HEALTH, HEALTH, HEALTH))
            assert exchange(idle, stream, HEALTH)[0].status == 200


def test_a_server_that_runs_out_of_descriptors_goes_on(tmp_path):
    program = ["sh", "-c", 'ulimit -n 48 && exec "$0" "$@"', *PROGRAM, "serve"]
    with start_server(tmp_path, how="process", program=program) as server:
        with contextlib.ExitStack() as stack:
            for _ in range(150):
                stack.enter_context(server.connect())
            assert [server.call("GET", "/readyz").status for _ in range(3)] == [200] * 3
        assert cli(tmp_path, "mint-token").returncode == 0
        assert server.terminate() == 0
    assert "Traceback" not in "".join(server.log)


STRANGE = [
    None, True, -1, 0, 2**63, 10**30, 1e308, 0.5, "", "x" * 300, "\0", "\u202e", "\r\nX: y", "é",
    "../../etc/passwd", "' OR 1=1 --", "%00", "{}", [], {}, [[]], {"a": {"a": 1}}, "0" * 16,
]  # fmt: skip


def strange_request(rng, secrets, ids):
    """A request of some operation, right in many things and wrong in others."""
    operation = rng.choice([row for row in hostenroll.OPERATIONS if row.path])
    method = rng.choice([operation.method] * 9 + ["GET", "POST", "HEAD", "OPTIONS", "PUT", "BREW"])
    path = operation.path.replace("{id}", rng.choice([*ids, *ids, "%2e%2e", "x" * 40, "%FF"]))
    names = [*operation.query.json_schema()["properties"], "x", "limit", "cursor"]
    texts = [*ids, "1", "-1", "", "a=b", "%00", "%ff", "online", "default", "+", "%E2%80%AE"]
    for n in range(rng.choice([0] * 6 + [1, 2, 80])):
        path += f"{'&' if n else '?'}{rng.choice(names)}={rng.choice(texts)}"
    right = {
        "token": secrets["token"], "hostname": "web-1", "name": "x", "ttlSeconds": 60,
        "maxUses": 1, "labels": {"rack": "b4"}, "organizationId": "default",
    }  # fmt: skip
    fields = list(operation.body.json_schema()["properties"]) if operation.body else ["token"]
    body = {
        name: right.get(name, "x") if rng.random() < 0.9 else rng.choice([*STRANGE, *ids])
        for name in (fields if rng.random() < 0.5 else rng.sample(fields, len(fields) // 2))
    }
    headers = [("Idempotency-Key", rng.choice(["k", "", "é", "x" * 200]))] * rng.choice([0, 0, 1])
    body = rng.choice([body] * 6 + [None, [body], b"{", b"\xff", b"[" * 5000])
    bearer = secrets.get("credential" if operation.caller == "credential" else "key")
    if rng.random() < 0.3:
        bearer = rng.choice([*secrets.values(), None, "", "x.y.z", f"{bearer}="])
    return request_bytes(method, path, body, bearer, headers)


def well_formed_answers(data):
    """The statuses of a stream of answers, none of them to HEAD, held to RFC 9112."""
    head = rb"HTTP/1\.1 [1-5][0-9]{2} [A-Za-z -]+\r\n([A-Za-z-]+: [\x20-\x7e]+\r\n)*\r\n"
    stream, statuses = io.BytesIO(data), []
    while re.compile(head).match(data, stream.tell()):
        status, document, _ = read_reply(stream)
        assert not re.search(r'Traceback|hostenroll\.py", line', str(document))
        assert status < 400 or document is None or document["status"] == status
        statuses += [status] if status != 100 else []
    assert stream.tell() == len(data), data[stream.tell() :]
    return statuses


@slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_whatever_is_sent_is_answered_in_well_formed_http_and_never_by_a_failure(seed, tmp_path):
    """Requests of every operation with strange things in them, and some of those spoiled as bytes;
    on a connection each, some of which half-close, go away in the middle, or reset."""
    rng, seen = random.Random(seed), set()
    with start_server(tmp_path, how="process") as server:
        minted = server.mint(maxUses=1000, ttlSeconds=86400).document
        enrolled = server.enroll(minted["token"]).document
        secrets = {"key": server.api_key, "token": minted["token"]}
        secrets["credential"] = enrolled["credential"]
        ids = [minted["id"], enrolled["hostId"], "0" * 16]
        for n in range(1000):
            data = strange_request(rng, secrets, ids) if n % 3 else spoiled_message(rng)
            if n % 6 == 1:
                at, nasty = rng.randint(0, len(data)), [b"\0", b"\r", b"\n", b" ", b"\xff", b""]
                data = data[:at] + rng.choice(nasty) + data[at + 1 :]
            with server.connect() as peer:
                peer.sendall(data)
                if n % 10 == 0:  # goes away, or resets
                    linger = RESETS if n % 20 else b"\0" * 8
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    continue
                peer.shutdown(socket.SHUT_WR)
                answers = b"".join(iter(lambda: peer.recv(65536), b""))
            seen.update(well_formed_answers(answers) if b"HEAD " not in data else ())
        assert server.ask("GET", "/api/me").status == 200
        assert server.call("GET", "/readyz").status == 200
        assert server.terminate() == 0
    assert not {500, 503} & seen
    assert {200, 201, 204, 400, 401, 404, 405, 501} <= seen, seen
    assert not re.search("Traceback|ERROR|failed", "".join(server.log))
    assert cli(tmp_path, "check").returncode == 0


# Proxies.

HERE = (ipaddress.ip_network("127.0.0.0/8"),)
ELSEWHERE = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("::/0"))
CLIENTS = {"trusted": (HERE, ["198.51.100.0", "198.51.100.1"]), "not": (ELSEWHERE, ["127.0.0.1"])}


def forwarded(client):
    return [("X-Forwarded-For", client)] if client else []


@pytest.mark.parametrize("proxies, clients", table(CLIENTS))
def test_a_trusted_proxy_alone_speaks_for_its_clients(proxies, clients, paths, clock):
    """In the audit log, in usedFrom, and where wrong secrets are counted."""
    with start_server(paths, clock=clock, proxies=proxies) as live:
        minted, stream = live.mint().document, b""
        wrong = hostenroll.mint_secret("het", 1 << 40).text
        for token, n in (*((wrong, n % 2) for n in range(60)), (minted["token"], 0)):
            headers = [*forwarded(f"203.0.113.9, 198.51.100.{n}"), ("Forwarded", f"for=10.1.1.{n}")]
            body = {"token": token, "hostname": "web-1"}
            stream += request_bytes("POST", "/api/agent/enroll", body, headers=headers)
        statuses, counted = [reply.status for reply in live.send(stream)], 20 * len(clients)
        assert statuses == [401] * counted + [429] * (60 - counted) + [201]
        assert live.show_token(minted["id"]).document["usedFrom"] == clients[0]
        events = live.events("limit=1000").document["events"]
    unknown = [event["address"] for event in events if event["code"] == "token-unknown"]
    assert sorted(unknown) == sorted(clients * 20)
    enrolled = [event["address"] for event in events if event["action"] == "enroll"]
    assert enrolled == clients[:1]


def test_heartbeats_on_one_connection_of_a_proxy_are_those_of_its_clients(paths, clock, caplog):
    """Nothing that belongs to a host is kept by connection; and all of them take the fast path."""
    caplog.set_level("INFO")
    with start_server(paths, clock=clock, proxies=HERE, access_log=True) as live:
        host, first = live.join()
        second = live.enroll(live.reenroll(host).document["token"]).document["credential"]
        _, third = live.join("web-2")
        rows = [(second, None, 200), (second, "198.51.100.1", 200), (first, "198.51.100.2", 401),
                (third, "198.51.100.3", 200), (second, None, 200),
                (first, None, 401)]  # fmt: skip
        path, api = "/api/agent/heartbeat", live.server._exchanges._api
        beats = [request_bytes("POST", path, None, row[0], forwarded(row[1])) for row in rows]
        api.admit = None  # of the general path
        with live.connect() as peer, peer.makefile("rb") as stream:
            replies = exchange(peer, stream, *beats)
        del api.admit
        assert [reply.status for reply in replies] == [status for *_, status in rows]
        names = [replies[n].headers["x-request-id"].partition("-")[2] for n in (2, 5)]
        refused = [event["address"] for event in live.events("action=refuse").document["events"]]
        assert (names, refused) == (["3", "6"], ["127.0.0.1", "198.51.100.2"])
    logged = [r.access for r in caplog.records if hasattr(r, "access") and r.access["path"] == path]
    assert [(row["method"], row["address"], row["status"]) for row in logged] == [
        ("POST", client or "127.0.0.1", status) for _, client, status in rows]  # fmt: skip
    assert logged[0]["bytes"] == len(json.dumps(replies[0].document, separators=(",", ":")))


def test_a_peer_that_resets_hurts_no_other(served):
    live = served(hosts=40)
    ask = request_bytes("GET", "/api/hosts?limit=1000", bearer=live.api_key)
    for n in range(30):
        with live.connect() as peer:
            peer.sendall(ask * 20 if n % 2 else ask[: n * 4])
            if n % 6 == 1:
                peer.recv(1000)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESETS)
        assert live.call("GET", "/readyz").status == 200


# Requests that wait for more of a feed.


class Waiting:
    """A request that waits, on a connection of its own; its answer."""

    def __init__(self, live, query="wait=50", path="changes", key=None, method="GET", behind=b""):
        self.method, self.peer = method, live.connect()
        self.stream = self.peer.makefile("rb")
        cursor = read_feed(live, "after=now", path)[1]
        asked = f"/api/{path}?{query}" + ("" if "after=" in query else f"&after={cursor}")
        self.peer.sendall(request_bytes(method, asked, bearer=key or live.api_key) + behind)

    def answer(self):
        return read_reply(self.stream, head_only=self.method == "HEAD")

    def close(self):
        self.stream.close(), self.peer.close()


@pytest.fixture
def wait(live):
    """Has a request wait, and sees to it that it does."""
    with contextlib.ExitStack() as stack:

        def begin(*arguments, on=live, **options):
            before = places(on)
            waiting = Waiting(on, *arguments, **options)
            stack.callback(waiting.close)
            until(lambda: places(on) == before + 1)
            return waiting

        yield begin


def places(live):
    return live.registry.metrics.waiting_requests


def test_a_request_waits_for_a_change_that_it_asks_for(live, wait):
    """And for no other. The same connection goes on, also with a request that came meanwhile."""
    host, credential = live.join()
    one, any, events = wait("wait=50&status=online"), wait(), wait("wait=50", "audit")
    head, next = wait(method="HEAD"), wait(behind=request_bytes("GET", "/api/me", bearer="x"))
    live.revoke(host)
    assert told(any.answer().document["changes"])[0].startswith("web-1 pending revoked")
    assert [it["action"] for it in events.answer().document["events"]] == ["revoke"]
    reply = head.answer()
    assert (reply.status, reply.document) == (200, None) and int(reply.headers["content-length"])
    assert [next.answer().status for _ in range(2)] == [200, 401]
    live.restore(host)
    until(lambda: places(live) == 1)
    assert live.beat(credential).status == 200
    (change,) = one.answer().document["changes"]
    assert told([change]) == ["web-1 pending online None"]
    until(lambda: places(live) == 0)
    any.peer.sendall(request_bytes("GET", "/api/me", bearer=live.api_key))
    assert any.answer().status == 200


def test_what_is_there_or_asked_from_now_is_answered_at_once(live):
    live.join()
    for query in ("wait=50", "wait=50&after=now", "wait=0&status=missing", "status=missing"):
        read_feed(live, query)


def test_a_change_by_another_process_ends_the_wait(live, wait):
    host, _ = live.join()
    waiting, other = wait("wait=50&status=deleted"), wait("wait=50&status=online")
    with opened(live.paths, live.clock) as registry:
        act(registry, live.clock, "delete-host", host)
    assert told(waiting.answer().document["changes"]) == ["web-1 pending deleted cli:test"]
    live.terminate()
    assert other.answer().document["changes"] == []


@slow
def test_a_wait_ends_at_its_time_and_its_cursor_has_moved_on(live, wait):
    began = time.monotonic()
    waiting = wait("wait=1&status=missing")
    live.join()
    reply = waiting.answer()
    assert 0.9 < time.monotonic() - began < 2
    assert (reply.status, reply.document["changes"]) == (200, [])
    assert reply.document["cursor"] == read_feed(live, "after=now")[1]
    counts = live.registry.metrics.requests.counts
    assert sum(counts[-4:]) == 0  # a wait is no slow request


def test_a_server_that_stops_answers_who_waits_at_once(live, wait):
    waiting = [wait() for _ in range(3)]
    began = time.monotonic()
    live.terminate()
    assert time.monotonic() - began < 1
    for each in waiting:
        reply = each.answer()
        assert (reply.status, reply.document["changes"]) == (200, [])
        assert reply.headers["connection"] == "close" and each.answer() is None


def test_the_key_is_judged_again_when_the_answer_is_made(live, wait):
    host, _ = live.join()
    with opened(live.paths, live.clock) as beside:
        key = make_api_key(beside, live.clock)
        waiting = wait(key=key)
        act(beside, live.clock, "revoke-api-key", key.split("_")[1])
    live.revoke(host)
    assert waiting.answer().code == "api-key-invalid"


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_who_waits_and_goes_frees_a_place(tls, paths, clock, wait, monkeypatch):
    """Sixteen of a key wait, and the next are refused until one has gone."""
    monkeypatch.setattr(hostenroll, "WAITING_OF_KEY", 2)
    with start_server(paths, clock=clock, tls=tls) as live:
        first, second = wait(on=live), wait(on=live)
        path = f"/api/changes?wait=50&after={read_feed(live)[1]}"
        for _ in range(2):
            reply = live.ask("GET", path)
            assert (reply.status, reply.code) == (429, "too-many-requests")
            assert reply.headers["retry-after"] == "5"
        read_feed(live, "wait=50&after=now")
        first.close()
        until(lambda: places(live) == 1)
        third = wait(on=live)
        live.join()
        assert [len(each.answer().document["changes"]) for each in (second, third)] == [1, 1]
        assert len(live.server._exchanges.held) <= 1
        assert live.registry.metrics.refusals["too-many-requests"] == 2
        assert live.events("action=refuse").document["events"] == []


# Another process that writes.


def test_while_another_process_writes_heartbeats_wait_and_other_answers_do_not(live, paths):
    beat = beat_of(live)
    for closes in (False, True):
        with live.connect() as peer, peer.makefile("rb") as stream:
            with write_lock(paths[0]):
                peer.sendall(beat * 3)
                for _ in range(5):
                    began = time.monotonic()
                    assert live.call("GET", "/healthz").status == 200
                    assert live.hosts().status == 200
                    assert time.monotonic() - began < 3  # and not the 5 s of the others
                assert not is_readable(peer, 0.1)
                if closes:  # before it is answered: that ends nothing else
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESETS)
                    continue
            assert [read_reply(stream).status for _ in range(3)] == [200] * 3
    assert live.send(beat)[0].status == 200


# Stopping.

# Another thread gets the signals, so they do not interrupt what the main thread waits in: as if
# they came just before.
LATE = """
import signal, sys, threading, time
import hostenroll
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
sys.exit(hostenroll.main())
"""
CUTS = {"half of the head": b"enroll", "the head alone": b"{", "half of the body": b"hostname"}


STOPS = {
    "SIGTERM": (signal.SIGTERM, None), "SIGINT": (signal.SIGINT, None),
    "SIGTERM just before": (signal.SIGTERM, [sys.executable, "-c", LATE]),
    "SIGINT just before": (signal.SIGINT, [sys.executable, "-c", LATE]),
}  # fmt: skip


@pytest.mark.parametrize("number, program", sample(STOPS, "SIGTERM just before"))
def test_an_idle_server_stops_soon_and_without_a_word(number, program, tmp_path):
    options = {"program": program, "env": {"PYTHONPATH": str(ROOT)}}
    with start_server(tmp_path, how="process", **options) as server:
        with server.connect() as idle, server.connect():
            idle.sendall(HEALTH)
            assert idle.recv(65536)
            time.sleep(0.2 if program else 0)  # it waits for the next thing it has to do: seconds
            began = time.monotonic()
            server.process.send_signal(number)
            assert idle.recv(1) == b""
        assert server.wait() == 0
        assert time.monotonic() - began < 3
        assert not re.search("Traceback|ERROR|Error", "".join(server.log))


def test_a_server_at_its_limit_stops_like_any_other(paths, clock):
    with contextlib.ExitStack() as peers:
        options = {"connections": 1, "deadlines": in_states(linger=0.2)}
        with start_server(paths, clock=clock, **options) as live:
            first = peers.enter_context(live.connect())
            first.sendall(b"nonsense\r\n\r\n")
            assert first.recv(65536)  # it lingers now, and there is no room for another
            peers.enter_context(live.connect())


@pytest.mark.parametrize("rest", sample(CUTS, "half of the head"))
def test_a_request_in_flight_is_answered_before_the_server_stops(rest, tmp_path):
    with start_server(tmp_path, how="process") as server:
        body = {"token": server.token(), "hostname": "web-1"}
        enroll = request_bytes("POST", "/api/agent/enroll", body)
        at = enroll.index(rest)
        with server.connect() as peer, peer.makefile("rb") as stream:
            peer.sendall(HEALTH + enroll[:at])
            assert read_reply(stream) is not None  # so the rest has been read, too
            began = time.monotonic()
            server.process.terminate()
            until(lambda: is_refused(server.port))
            (reply,) = exchange(peer, stream, enroll[at:])
            assert (reply.status, reply.headers["connection"]) == (201, "close")
        assert server.wait() == 0
        assert time.monotonic() - began < 5
    assert sql(str(tmp_path / "hostenroll.db"), "SELECT count(*), sum(uses) FROM token, host") == [
        (1, 1)]  # fmt: skip


STOPPED = {  # whether it speaks TLS, and inherits its socket
    "plain": (False, False), "tls": (True, False), "plain, inherited": (False, True),
    "tls, inherited": (True, True),
}  # fmt: skip


@pytest.mark.parametrize("tls, inherits", sample(STOPPED, "tls, inherited"))
def test_a_stop_refuses_nobody_who_is_connected(tls, inherits, served, bound, monkeypatch):
    """Neither who has just come, nor who keeps a connection: a request that is on its way when its
    connection is closed is lost. Who waits in the backlog of an inherited socket is left to the
    next process."""
    monkeypatch.setattr(hostenroll, "SHUTDOWN_GRACE", 0.5)
    listener = bound.dup() if inherits else None
    live, plain = served(tls=tls, listener=listener), SocketDoor(bound.getsockname()[1])
    (kept,), silent = live.peers(1, HEALTH), live.peers(1)[0]
    assert kept.recv(65536).startswith(b"HTTP/1.1 200 ")
    late = SocketDoor(live.port).connect()  # it has not begun its handshake
    until(lambda: live.registry.metrics.open_connections == 3)
    live.server.stop()
    until(lambda: live.server._exchanges.is_stopping)
    with plain.connect() if inherits else contextlib.nullcontext() as waiting:
        if inherits:
            waiting.sendall(HEALTH)
        late = live.tls.wrap_socket(late, server_hostname="enroll.lan") if tls else late
        for peer in (kept, late):
            with peer, peer.makefile("rb") as stream:
                (reply,) = exchange(peer, stream, HEALTH)
                assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert not is_readable(silent)
        live.wait()
        assert silent.recv(1) == b""
        if inherits:
            bound.accept()[0].close()


def test_while_a_stopping_server_shakes_hands_its_port_is_closed(served):
    """Who connected meanwhile would be reset, and not know whether its request was run."""
    live, refused = served(tls=True), []
    client, hello = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        live.tls.wrap_bio(client, hello, server_hostname="enroll.lan").do_handshake()
    late = socket.socket()

    def on_hello(*_):
        if not refused:  # one more comes, and waits in the backlog when the stop begins
            late.connect(("127.0.0.1", live.port))
            late.sendall(hello.read())
            live.server.stop()
        refused.append(is_refused(live.port))

    live.server._tls.sni_callback = on_hello
    with late, contextlib.suppress(OSError), SocketDoor(live.port, tls=live.tls).connect():
        until(lambda: len(refused) == 2)
    assert refused == [False, True]


class Load:
    """Clients that send a request again and again: half of them on a connection each time, the
    others on one for as long as it is kept."""

    def __init__(self, door, request, clients=16):
        self.answered, self.failures, self._is_over = [], [], False
        self._door, self._request = door, request
        self._threads = [
            threading.Thread(target=self._ask, args=(n % 2 == 0,), daemon=True)
            for n in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, is_kept):
        while not self._is_over:
            with contextlib.ExitStack() as stack:
                try:
                    peer = stack.enter_context(self._door.connect())
                    stream = stack.enter_context(peer.makefile("rb"))
                    while not self._is_over:
                        (reply,) = exchange(peer, stream, self._request)
                        self.answered.append(reply.status)
                        if not is_kept or reply.headers.get("connection") == "close":
                            break
                except Exception as error:
                    self.failures.append(repr(error))

    def require_none_lost(self, more_than):
        """End, when so many are answered."""
        until(lambda: len(self.answered) > more_than or self.failures, 120)
        self._is_over = True
        for thread in self._threads:
            thread.join(15)
        assert self.failures == [] and set(self.answered) == {200}


@slow
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_restarts_behind_a_socket_of_systemd_lose_no_request(tls, bound, tmp_path):
    door = SocketDoor(bound.getsockname()[1], tls=trusting() if tls else None)
    load = None
    for n in range(5):
        given = activated([bound])
        with start_server(tmp_path, how="process", tls=tls, **given) as server:
            load = load or Load(door, beat_of(server))
            before = len(load.answered)
            until(lambda before=before: len(load.answered) > before + 300 or load.failures, 60)
            if n == 4:
                load.require_none_lost(1500)
            assert server.terminate() == 0


@slow
def test_a_server_stops_in_time_also_while_another_process_writes(tmp_path):
    """However often it is asked to; and a request that waits is answered 503."""
    with start_server(tmp_path, how="process") as server:
        body, lock = {"token": server.token(), "hostname": "web-1"}, tmp_path / "hostenroll.db"
        with write_lock(lock), server.connect() as peer, peer.makefile("rb") as stream:
            peer.sendall(request_bytes("POST", "/api/agent/enroll", body))
            assert server.call("GET", "/healthz").status == 200
            began = time.monotonic()
            server.process.terminate()
            until(lambda: is_refused(server.port))
            while server.process.poll() is None and time.monotonic() < began + 12:
                server.process.terminate()
                time.sleep(0.1)
            assert read_reply(stream).code == "storage-unavailable"
            assert server.wait() == 0 and time.monotonic() - began < 6
    assert not re.search("Traceback|Bad file descriptor", "".join(server.log))


# Whatever fails, it is all or nothing, and the server lives.


class Spoilt:
    """A real socket that listens, and those that it accepts. Of one kind of call the n-th goes
    wrong, or all do, by the number 0: the effect is an error, by name, or how few bytes move."""

    def __init__(self, real, listener=None):
        self.real, self.listener, self.call = real, listener or self, None

    def arm(self, call, effect, n):
        self.call, self.effect, self.n, self.count, self.has_failed = call, effect, n, 0, False

    def meet(self, call, size=0):
        """How many bytes this call moves, at most; by itself it would be `size`."""
        if call != self.call or self.has_failed:
            return size
        self.count += 1
        self.has_failed = self.count == self.n
        if self.has_failed and isinstance(self.effect, str):
            raise OSError(getattr(errno, self.effect), self.effect)
        return self.effect if self.has_failed or self.n == 0 else size

    def accept(self):
        self.meet("accept")
        peer, address = self.real.accept()
        return Spoilt(peer, self), address

    def recv(self, size):
        return self.real.recv(self.listener.meet("recv", size))

    def send(self, data):
        return self.real.send(data[: self.listener.meet("send", len(data))])

    def __getattr__(self, name):
        return getattr(self.real, name)


class Client(Door):
    """An agent and an operator in one, who ask again when an answer does not come."""

    def __init__(self, door):
        self.door, self.api_key, self.peer = door, door.api_key, None
        self.stack = contextlib.ExitStack()
        self.lost = self.refused = 0  # answers that did not come; 503s

    def call(self, *request, **headers):
        return self.exchange(request_bytes(*request, **headers))[0]

    def exchange(self, *requests):
        for _ in range(4):
            replies = []  # until one is missing, each of them whole
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                if self.peer is None:
                    self.peer = self.stack.enter_context(self.door.connect())
                    self.stream = self.stack.enter_context(self.peer.makefile("rb"))
                self.peer.sendall(b"".join(requests))
                while len(replies) < len(requests) and (reply := read_reply(self.stream)):
                    replies.append(reply)
            is_whole = len(replies) == len(requests)
            if not is_whole or replies[-1].headers.get("connection") == "close":
                self.leave()
            if any(reply.status == 503 for reply in replies):
                self.refused += 1
            elif is_whole:
                return replies
            else:
                self.lost += 1
        raise AssertionError("it is never answered")

    def leave(self):
        self.stack.close()
        self.peer = None


def goes_on(door, clock, n):
    """A short life, with whatever fails in it. What was acknowledged is done; what was not may be
    asked for again."""
    clock.advance(1)
    client, name = Client(door), f"web-{n}"
    token = client.mint().document
    enrolled = client.enroll(token["token"], name, key=name).document
    host, beat = enrolled["hostId"], beat_bytes(enrolled["credential"])
    client.leave()
    assert [reply.status for reply in client.exchange(beat, HEALTH, beat)] == [200] * 3
    beaten = client.beat(enrolled["credential"], os=name).document
    for verb, code, status in (("revoke", "host-revoked", "revoked"), ("restore", None, "online")):
        shown, (judged,) = getattr(client, verb)(host).document, client.exchange(beat)
        assert (shown["status"], judged.code) == (status, code)
    close = [("Connection", "close")]
    known = client.call("GET", f"/api/hosts/{host}", None, client.api_key, close).document
    used = client.show_token(token["id"]).document
    client.leave()
    assert (known["os"], known["revokedAt"]) == (name, None)
    assert known["lastSeen"] == beaten["lastSeen"] == judged.document["lastSeen"]
    assert (used["uses"], used["hosts"]) == (1, [host])
    return client


ALWAYS = ("recv ECONNRESET", "recv 1", "recv 1, through TLS", "send ECONNRESET", "send 1",
          "accept EMFILE")  # fmt: skip
FAULTS = {  # the effects on each call, and how many connections each may cost
    "recv": {"ECONNRESET": 1, "EAGAIN": 0, "EINTR": 0, "ETIMEDOUT": 1, "ENOMEM": 1, 1: 0, 0: 1},
    "send": {"ECONNRESET": 1, "EAGAIN": 0, "EINTR": 0, "EPIPE": 1, "ENOBUFS": 1, 1: 0},
    "accept": {"EMFILE": 0, "EAGAIN": 0, "EINTR": 0, "ECONNABORTED": 0, "ENOBUFS": 0, "ENFILE": 0},
}  # fmt: skip
THROUGH = {
    f"{call} {effect}{', through TLS' * tls}": (tls, call, effect, cost)
    for tls in (False, True) for call, effects in FAULTS.items() for effect, cost in effects.items()
}  # fmt: skip


@pytest.mark.parametrize("tls, call, effect, cost", sample(THROUGH, *ALWAYS))
def test_whichever_call_on_a_socket_fails_nothing_is_lost(tls, call, effect, cost, paths, clock):
    with contextlib.ExitStack() as stack:
        listener = Spoilt(stack.enter_context(socket.create_server(("127.0.0.1", 0))))
        start = start_server(paths, clock=clock, listener=listener, tls=tls)
        live = stack.enter_context(start)
        for n in itertools.count(effect != 1):  # 0: every call moves one byte
            listener.arm(call, effect, n)
            client = goes_on(live, clock, n)
            assert client.lost <= cost and client.refused == 0
            assert n or (client.lost == 0 and listener.count > 2000)
            if n and not listener.has_failed:
                break
        assert n > {"accept": 2, "recv": 9, "send": 9}[call]
    hosts = n + (effect == 1)
    assert sql(paths[0], "SELECT count(*), sum(os = hostname) FROM host") == [(hosts, hosts)]
    assert sql(paths[0], "PRAGMA integrity_check") == [("ok",)]


def fails_once(place, name, error):
    """The next call of a method of an object raises an error."""

    def fail(*arguments):
        delattr(place, name)
        raise error

    setattr(place, name, fail)


@pytest.mark.parametrize("where", ["admit", "run", "answer"])
def test_a_defect_ends_one_connection_or_one_tick_and_not_the_loop(where, live, caplog):
    _, credential = live.join()
    place = live.registry if where == "run" else live.server._exchanges._api
    fails_once(place, where, ZeroDivisionError("a defect"))
    with live.connect() as peer, peer.makefile("rb") as stream:
        (reply,) = exchange(peer, stream, request_bytes("GET", "/api/hosts", bearer=live.api_key))
    assert reply is None if where == "answer" else (reply.status, reply.code) == (500, "internal")
    assert live.beat(credential).status == 200
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.exc_info[0] is ZeroDivisionError


@pytest.mark.parametrize("failure", [MemoryError, hostenroll.Unrecoverable("it is gone")])
@pytest.mark.parametrize("where", ["admit", "run", "answer", "after_tick", "match"])
def test_what_cannot_pass_by_itself_ends_the_server(where, failure, paths, clock):
    """What is in the tick is answered 503, if there is memory for it."""
    with start_server(paths, clock=clock) as live:
        _, credential = live.join()
        api = live.server._exchanges._api
        with live.connect() as peer, peer.makefile("rb") as stream:
            exchange(peer, stream, HEALTH)
            fails_once(api if hasattr(api, where) else live.registry, where, failure)
            peer.sendall(beat_bytes(credential, os="BSD"))
            until(lambda: not live._thread.is_alive())
            with contextlib.suppress(ConnectionError):
                reply = read_reply(stream)
                if where == "run" and failure is not MemoryError:
                    close = reply.headers["connection"]
                    assert (reply.code, close) == ("storage-unavailable", "close")
                else:
                    assert reply is None or where == "after_tick"
        ended = live.wait()
        assert ended is failure or type(ended) is failure


def test_what_goes_wrong_with_one_connection_ends_there(live):
    """The kernel may refuse to watch one more: ENOSPC, ENOMEM."""
    error = OSError(errno.ENOSPC, "No space left on device")
    fails_once(live.server._connections.selector, "register", error)
    with live.connect() as unlucky:
        assert unlucky.recv(1) == b""
    assert live.call("GET", "/healthz").status == 200


# Races and crashes.


def test_two_servers_let_in_exactly_as_many_as_a_token_says(tmp_path):
    start = partial(start_server, tmp_path, how="process")
    with start() as one, start() as two:
        for uses in (1, 5) * 6:
            token = one.token(maxUses=uses)
            rush = partial(lambda token, n: (one, two)[n % 2].enroll(token, f"web-{n}"), token)
            results = sorted((reply.status, reply.code) for reply in many(16, rush))
            assert results == [(201, None)] * uses + [(401, "token-used")] * (16 - uses)
    assert sql(str(tmp_path / "hostenroll.db"), "SELECT count(*) FROM host") == [(6 * (1 + 5),)]


class Ledger:
    """What servers have acknowledged, and which enrollments have no answer yet."""

    def __init__(self):
        self.open = []  # tokens, each with an enrollment to be tried, or tried again
        self.hosts, self.beats = {}, {}  # documents by token; lastSeen by host
        self.minted, self.revoked = [], []  # tokens

    def load(self, port, key, dice):
        """What some clients do until the server is gone."""
        door = SocketDoor(port, key)
        with contextlib.suppress(OSError), door.connect() as peer, peer.makefile("rb") as stream:
            door.call = partial(self._call, peer, stream)
            while True:
                with contextlib.suppress(IndexError):
                    self._enroll(door, self.open.pop(0))
                host = dice.choice(list(self.hosts.values()))
                beaten = door.beat(host["credential"])
                assert beaten.status == 200, beaten
                seen = self.beats.get(host["hostId"], "")
                self.beats[host["hostId"]] = max(seen, beaten.document["lastSeen"])
                if dice.random() < 0.2:
                    self.minted.append(door.mint().document["id"])
                if self.minted and dice.random() < 0.1:
                    token = self.minted[-1]
                    assert door.revoke_token(token).status == 204
                    self.revoked.append(token)

    def _call(self, peer, stream, *request, **headers):
        (reply,) = exchange(peer, stream, request_bytes(*request, **headers))
        if reply is None or reply.status >= 500:
            raise ConnectionError
        return reply

    def _enroll(self, door, token):
        try:
            reply = door.enroll(token, key=token[4:20])
        except (OSError, AssertionError):  # perhaps it is done: it is asked for again
            self.open.append(token)
            raise ConnectionError from None
        assert reply.status == 201, reply
        self.hosts[token] = reply.document

    def check(self, paths):
        """Nothing that was acknowledged is missing, and no token has let in two."""
        with opened(paths, Clock(time.time())) as registry:
            for pragma, rows in (("integrity_check", [("ok",)]), ("foreign_key_check", [])):
                assert look(registry, f"PRAGMA {pragma}") == rows
            verify_audit(registry, None)
            statement = "SELECT id, token_id, last_seen FROM host JOIN heartbeat ON host_id = id"
            rows = look(registry, statement)
            tokens = look(registry, "SELECT id, uses, revoked_at IS NOT NULL FROM token")
        stored = {f"{number:016x}": (f"{token:016x}", seen) for number, token, seen in rows}
        used = sorted((f"{number:016x}", uses) for number, uses, _ in tokens if uses)
        assert used == sorted((token, 1) for token, _ in stored.values())  # so none twice
        hosts = {text.split("_")[1]: host["hostId"] for text, host in self.hosts.items()}
        assert [token for token, host in hosts.items() if stored[host][0] != token] == []
        for host, seen in self.beats.items():
            assert hostenroll.rfc3339(stored[host][1]) >= seen
        assert set(self.minted) <= {f"{number:016x}" for number, _, _ in tokens}
        assert set(self.revoked) <= {f"{number:016x}" for number, _, gone in tokens if gone}


@pytest.mark.parametrize("cycles", [2, pytest.param(100, marks=slow)])
def test_after_kill_nine_nothing_acknowledged_is_missing(cycles, tmp_path):
    """At any moment, under load: in every third cycle two servers share the database, in every
    fifth the command line is at work, too. A client without an answer asks again in the next."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"random.Random({seed})")
    dice, ledger, key = random.Random(seed), Ledger(), api_key_of(tmp_path)
    paths = str(tmp_path / "hostenroll.db"), str(tmp_path / "hostenroll.key")
    start = partial(start_server, tmp_path, how="process", api_key=False)
    for cycle in range(cycles):
        clock, count = Clock(time.time()), 2 if cycle % 3 == 2 else 1
        with opened(paths, clock) as registry:
            ledger.open += [act(registry, clock, "mint-token").text for _ in range(30)]
        with contextlib.ExitStack() as stack:  # at its end they are killed
            servers = [stack.enter_context(start()) for _ in range(count)]
            dies_at = time.monotonic() + dice.random() ** 2 * 0.4
            loads = [(servers[n % count].port, key, random.Random(dice.random())) for n in range(4)]
            threads = [threading.Thread(target=ledger.load, args=load) for load in loads]
            for thread in threads:
                thread.start()
            if cycle % 5 == 1:
                minted = cli(tmp_path, "mint-token", "--json")
                assert minted.returncode == 0
                ledger.minted.append(json.loads(minted.stdout)["id"])
            time.sleep(max(0, dies_at - time.monotonic()))
        for thread in threads:
            thread.join(20)
        ledger.check(paths)
    assert len(ledger.hosts) > 5 * cycles and len(ledger.beats) > cycles
    assert ledger.minted and ledger.revoked


@slow
def test_heartbeats_and_commands_do_not_starve_each_other(tmp_path):
    with start_server(tmp_path, how="process") as server:
        (_, credential), done = server.join(), threading.Event()

        def work(n):
            if n:
                return timed_beats(server, credential, iter(done.is_set, True))
            took = []
            for word in ("mint-token", "list-hosts", "mint-token", "list-tokens"):
                began = time.perf_counter()
                assert cli(tmp_path, word).returncode == 0
                took.append(time.perf_counter() - began)
            done.set()
            return took

        took = [*itertools.chain(*many(5, work))]
    assert len(took) > 100 and max(took) < 4  # to starve is to wait for 5 s


def traced(trace, calls, *options):
    """The words that run a command under strace."""
    command = ["strace", "-f", "-y", *options, "-e", f"trace={calls}", "-o", str(trace)]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("strace may not trace here")
    return command


@slow
@needs_strace
def test_a_host_is_on_the_disk_before_it_gets_its_answer(tmp_path):
    trace = tmp_path / "trace"
    program = traced(trace, "pwrite64,fsync,fdatasync,recvfrom,sendto", "-s", "64") + PROGRAM
    with start_server(tmp_path, how="process", program=program) as server:
        _, credential = server.join()
        assert server.beat(credential).status == 200
        os.kill(int(trace.read_text().split()[0]), signal.SIGTERM)
        server.wait()
    lines = trace.read_text().split("\n")
    (asked,) = [n for n, line in enumerate(lines) if "POST /api/agent/enroll" in line]
    (answered,) = [n for n, line in enumerate(lines) if n > asked and "HTTP/1.1 201" in line]
    meanwhile = [line for line in lines[asked:answered] if "hostenroll.db-wal>" in line]
    done = [re.sub(r"^\d+ +(\w+)\(.* = (\d+)$", r"\1 \2", line) for line in meanwhile]
    assert len(done) > 2 and done[-1] in ("fdatasync 0", "fsync 0")
    assert {line.split()[0] for line in done[:-1]} == {"pwrite64"}  # nothing is written after it


BEATS = """
import random, hostenroll
hostenroll.CHECKPOINT_AFTER, hostenroll.CHECKPOINT_REST = 64, 20
hostenroll.CHECKPOINT_AT_ONCE = 1024
registry = hostenroll.open_registry("hostenroll.db", "hostenroll.key", 1)
ref = hostenroll.CredentialRef(1, "default", registry.keys.keyring.first.kid)
for now in range(2, 400):
    numbers = random.sample(range(1, 2001), 16)
    registry.run([hostenroll.Heartbeat(n << 8, ref, hostenroll.LOCAL) for n in numbers], now)
    registry.after_tick()
registry.close()
"""


@slow
@needs_strace
def test_the_disk_has_what_a_checkpoint_relies_on(paths, clock, tmp_path):
    """The WAL before a page of it is moved; the database, all of it, before the WAL begins again
    at its start."""
    with World(paths, clock) as world:
        fill(world, 2000)
    trace = tmp_path / "trace"
    program = [*traced(trace, "pwrite64,fdatasync,fsync"), sys.executable, "-c", BEATS]
    done = cli(tmp_path, program=program, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    call = re.compile(r"(\d+) +(\w+)\(\d+<[^>]*hostenroll\.db(-wal)?>(?:.*, (\d+)\) +=)?")
    calls = [found.groups() for found in map(call.match, trace.read_text().splitlines()) if found]
    others = [row[1:3] for row in calls if row[0] != calls[0][0]]  # nothing depends on them
    assert set(others) == {("fdatasync", None)} and len(others) > 10
    story = ""  # of the main thread: a page moved, the WAL begun, written, synced, the file synced
    for thread, name, wal, offset in calls:
        if thread == calls[0][0] and name == "pwrite64":
            story += "p" if wal is None else "b" if offset == "0" else "w"
        elif thread == calls[0][0]:
            story += "d" if wal is None else "s"
    assert not re.search("(^|[^sp])p|p[^d]*b", story) and story.count("b") > 5


# When things fail: each row of the README's table, with real processes.


def failures_in_readme():
    """What the log says, by failure."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## When things fail")[1]
    lines = section.split("\n## ")[0].splitlines()
    rows = [line.split("|") for line in lines if line.startswith("| ")]
    return {row[1].strip(): row[2].strip() for row in rows[1:]}


def is_logged(failure, lines, times=1):
    """A failure is reported in one line, as the README says, and nothing else is."""
    (words,) = re.findall("`(.+)`", failures_in_readme()[failure])
    pattern = ".*".join(map(re.escape, words.split("...")))
    complaints = [line for line in lines if re.search(" (ERROR|WARNING) |^hostenroll: ", line)]
    assert [bool(re.search(pattern, line)) for line in complaints] == [True] * times, lines
    assert "Traceback" not in "".join(lines)


def test_every_failure_in_the_readme_is_made_here():
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in failures_in_readme() if f'"{name}"' not in source] == []


class Subject(contextlib.ExitStack):
    """A real server with a host, and what its clients get."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.database = folder, str(folder / "hostenroll.db")
        self.api_key = api_key_of(folder)
        self.start()
        self.host, self.credential = self.door.join()
        self.token = self.door.token()
        assert self.answers() == [200] * 5

    def start(self):
        start = start_server(self.folder, how="process", api_key=False)
        self.server = self.door = self.enter_context(start)
        self.door.api_key = self.api_key

    def answers(self):
        """To a beat, a beat with news, what cannot be cached, a read, and readiness; and health is
        always good. A refusal may pass, and says when to ask again."""
        door = self.door
        replies = [
            door.beat(self.credential),
            door.beat(self.credential, os=f"linux {random.random()}"),
            door.ask("PATCH", f"/api/hosts/{self.host}", {"name": f"x{random.random()}"}),
            door.hosts(),
            door.call("GET", "/readyz"),
        ]
        assert door.call("GET", "/healthz").status == 200
        for reply in replies:
            assert reply.status == 200 or int(reply.headers["retry-after"]) > 0
            assert reply.code in (None, "storage-unavailable")
        return [reply.status for reply in replies]

    def goes_on(self):
        """All is well again, and the token that was refused meanwhile has not been used up."""
        until(lambda: self.answers() == [200] * 5)
        assert self.door.enroll(self.token, "web-2").status == 201
        self.token = self.door.token()

    def only_reads(self):
        until(lambda: self.answers()[4] == 503)  # /readyz remembers its outcome for a second
        for _ in range(3):
            assert self.answers() == [503, 503, 503, 200, 503]
            assert self.door.enroll(self.token, "web-2").code == "storage-unavailable"

    def has_ended_with(self, failure):
        """The next request ends the server, which logs one line. It has no answer, or 503; never
        that there is no such host, nor success."""
        with contextlib.suppress(ConnectionError, AssertionError):
            while self.door.beat(self.credential, os=f"linux {random.random()}").status != 503:
                pass
        assert self.server.wait() == 1
        is_logged(failure, self.server.log)

    def stop(self):
        """Everything is in order; what the server has logged."""
        assert self.server.terminate() == 0
        checked = cli(self.folder, "check")
        assert checked.returncode == 0, checked
        return self.server.log


@slow
def test_on_a_full_disk_nothing_is_lost_and_reads_go_on(tmp_path):
    with small_disk(tmp_path, "2m") as fill, Subject(tmp_path) as subject:
        fill()
        full_since = time.monotonic()
        while time.monotonic() - full_since < 2 * hostenroll.TROUBLE_PAUSE:
            # A checkpoint makes room, until there is none in the database either.
            mints = [subject.door.mint(description="x" * size).status for size in (900, 0)]
            if 201 in mints or subject.door.beat(subject.credential).status == 200:
                full_since = time.monotonic()
        subject.only_reads()
        is_logged("disk full", *are_refused(tmp_path, "mint-token"))
        os.unlink(tmp_path / "filler")
        subject.goes_on()
        is_logged("disk full", subject.stop())


@slow
def test_on_a_read_only_disk_nothing_starts_and_one_line_says_why(tmp_path):
    with small_disk(tmp_path, "2m"):
        with Subject(tmp_path) as subject:
            subject.stop()
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        for lines in are_refused(tmp_path, "serve --port 0", "mint-token"):
            is_logged("disk read-only at start", lines)
        assert cli(tmp_path, "check").returncode == 0
        subprocess.run(["mount", "-o", "remount,rw", str(tmp_path)], check=True)
        assert cli(tmp_path, "mint-token").returncode == 0


@contextlib.contextmanager
def injected(process, calls, error):
    """System calls of a process fail, as on a disk that is failing."""
    options = ["-e", f"trace={calls}", "-e", f"inject={calls}:error={error}", "-o", os.devnull]
    command = ["strace", "-f", *options, "-p", str(process)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        with contextlib.ExitStack() as stack:
            stack.callback(tracer.terminate)
            if "attached" not in (first := tracer.stderr.readline()):
                pytest.skip(f"strace may not trace here: {first}")
            yield


@slow
@needs_strace
@pytest.mark.parametrize("error", ["EROFS", "EIO"])
def test_a_disk_that_fails_for_a_while_loses_nothing(error, subject):
    with injected(subject.server.process.pid, "pwrite64", error):
        subject.only_reads()
    subject.goes_on()
    is_logged("disk failing, or read-only now", subject.stop())


@slow
@needs_strace
def test_a_disk_that_does_not_keep_what_is_written_ends_the_server(subject):
    """The system may report it once and drop the pages, and the next sync would succeed."""
    with injected(subject.server.process.pid, "fdatasync,fsync", "EIO"):
        subject.has_ended_with("disk does not keep what is written (a failed sync)")
    comes_back(subject)


@pytest.fixture
def subject(tmp_path):
    with Subject(tmp_path) as subject:
        yield subject


def comes_back(subject):
    """Started again, it goes on; what it has logged."""
    subject.start()
    subject.goes_on()
    return subject.stop()


@contextlib.contextmanager
def transaction(database):
    """What another program does that writes for a long time."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def are_refused(folder, *commands):
    """Commands that fail print nothing, and say why in a line; these lines."""
    refused = [cli(folder, *words.split()) for words in commands]
    assert [(done.returncode, done.stdout) for done in refused] == [(1, "")] * len(commands)
    return [done.stderr.splitlines() for done in refused]


def garble(path, start):
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(random.Random(start).randbytes(os.stat(path).st_size - start))


LOCKED = {"locked by another program": transaction, "locked by a process of ours": write_lock}
DAMAGES = {
    "cut short": ("database damaged", lambda path: os.truncate(path, 3 * 4096)),
    "another file": ("not a database any more", lambda path: Path(path).write_text("hello" * 9999)),
}


@slow
@pytest.mark.parametrize("failure, lock", LOCKED.items())
def test_while_the_database_is_locked_heartbeats_wait_and_then_are_refused(failure, lock, subject):
    with lock(subject.database):
        began = time.monotonic()
        replies = many(3, lambda n: subject.door.beat(subject.credential))
        refused = {(reply.code, reply.headers["retry-after"]) for reply in replies}
        assert refused == {("storage-unavailable", "5")}
        assert 4.5 < time.monotonic() - began < 9
        assert subject.door.call("GET", "/healthz").status == 200
        assert subject.door.hosts().status == 200
        is_logged(failure, *are_refused(subject.folder, "mint-token"))
        assert time.monotonic() - began < 16
    subject.goes_on()
    is_logged(failure, subject.stop())


@slow
@pytest.mark.parametrize("failure, damage", table(DAMAGES))
def test_a_damaged_database_starts_nothing(failure, damage, subject, tmp_path):
    subject.stop()
    damage(subject.database)
    for lines in are_refused(tmp_path, "serve --port 0", "mint-token", "check"):
        is_logged(failure, lines)


@slow
def test_a_database_damaged_under_a_server_is_unavailable_where_it_is_damaged(subject, paths):
    """A page that was read is kept, so a beat may go on; what needs the damaged part may not."""
    subject.stop()
    with World(paths, Clock(time.time())) as world:
        fill(world, 3000)
    subject.start()
    garble(subject.database, 8 * 4096)
    for _ in range(3):
        refused = subject.door.host(f"{1 << 8:016x}")
        assert (refused.status, refused.code) == (503, "storage-unavailable")
    until(lambda: any("malformed" in line for line in subject.server.log))
    is_logged("database damaged", subject.server.log)


@slow
@pytest.mark.parametrize("damage", [os.truncate, garble], ids=["cut short", "garbage at its end"])
def test_of_a_torn_wal_everything_before_the_tear_is_there(damage, subject):
    """As after a power cut: SQLite takes the WAL up to the last whole commit."""
    wal = f"{subject.database}-wal"
    before = os.stat(wal).st_size
    assert subject.door.enroll(subject.token, "web-2").status == 201
    subject.server.kill()
    damage(wal, before + 1000)
    comes_back(subject)


def put(make):
    """In the place of the database, something that was made elsewhere, or nothing."""

    def replace(database):
        strange = Path(database).parent / "elsewhere" / "hostenroll.db"
        strange.parent.mkdir()
        make(strange)
        os.rename(database, f"{database}.away")
        if strange.exists():
            shutil.copy(strange, database)
        return lambda: os.replace(f"{database}.away", database)

    return replace


def migrate(database, version=99, names=("heartbeat", "heartbeats")):
    with contextlib.closing(sqlite3.connect(database)) as other:
        other.execute(f"PRAGMA user_version = {version}")
        other.execute("ALTER TABLE {} RENAME TO {}".format(*names))
    return lambda: migrate(database, 3, names[::-1])


def swallow(database):
    sql(database, SWALLOW.format("audit"))
    return lambda: sql(database, "DROP TRIGGER swallow")


ENDED = {  # the failure, how it is made, and how a restart is refused, if it is
    "gone": ("database gone", put(lambda path: None), "restore the database"),
    "another's": ("database replaced", put(lambda it: api_key_of(it.parent)), "not the key file"),
    "its WAL": ("its WAL removed or replaced", lambda path: os.unlink(f"{path}-wal"), ""),
    "its lock": ("its lock removed or replaced", lambda path: os.unlink(f"{path}.lock"), ""),
    "a newer program": ("database migrated by a newer version", migrate, ""),
    "its schema": ("schema altered", swallow, ""),
}  # fmt: skip
KEY_FILES = [
    ("key file missing", lambda path: path.rename(f"{path}.away"),
     lambda path: Path(f"{path}.away").rename(path)),
    ("key file open to others", lambda path: path.chmod(0o644), lambda path: path.chmod(0o600)),
    pytest.param("key file of another user", lambda path: os.chown(path, 54321, -1),
                 lambda path: os.chown(path, 0, -1), marks=needs_root),
]  # fmt: skip


@pytest.mark.parametrize("failure, damage, words", sample(ENDED, "gone"))
def test_what_cannot_pass_by_itself_ends_the_server_and_nothing_is_lost(
    failure, damage, words, subject, tmp_path
):
    """Started again and again, as by a service manager, no server makes an empty database, works
    with another's, or tells a fleet 410; with the database put back, it goes on."""
    mend = damage(subject.database)
    before = [path.read_bytes() for path in tmp_path.glob("hostenroll.db")]
    subject.has_ended_with(failure)
    for _ in range(2 if words else 0):
        restarted = cli(tmp_path, "serve", "--port", "0")
        assert restarted.returncode == 1 and words in restarted.stderr
        assert [path.read_bytes() for path in tmp_path.glob("hostenroll.db")] == before
    if mend:
        mend()
    comes_back(subject)


@slow
@pytest.mark.parametrize("failure, spoil, mend", KEY_FILES, ids=["missing", "too open", "his"])
def test_without_a_good_key_file_a_server_goes_on_and_none_starts(failure, spoil, mend, subject):
    key_file = subject.folder / "hostenroll.key"
    spoil(key_file)
    until(lambda: subject.answers()[4] == 503)
    for _ in range(3):
        assert subject.answers() == [200, 200, 200, 200, 503]
    for (line,) in are_refused(subject.folder, "serve --port 0", "mint-token"):
        assert key_file.name in line
    mend(key_file)
    subject.goes_on()
    is_logged(failure, subject.stop())


def test_a_key_file_on_a_mount_that_hangs_holds_up_nobody(live, monkeypatch):
    beat, keys, goes_on = beat_of(live), live.registry.keys.file, threading.Event()
    keys.patience, look = 0.05, hostenroll.KeyFile._look
    monkeypatch.setattr(hostenroll.KeyFile, "_look", lambda it: goes_on.wait(20) and look(it))
    for _ in range(3):
        live.clock.advance(10)
        assert live.call("GET", "/readyz").status == 503
        began = time.monotonic()
        assert live.call("GET", "/healthz").status == 200
        assert [reply.status for reply in live.send(beat * 20)] == [200] * 20
        assert time.monotonic() - began < 2
    assert sum("it takes too long" in line for line in live.log) == 1
    goes_on.set()
    until(lambda: live.clock.advance(2) or live.call("GET", "/readyz").status == 200)
    assert keys.trouble == ""


def test_where_another_server_listens_none_starts(live, tmp_path):
    (lines,) = are_refused(tmp_path, f"serve --port {live.port}")
    is_logged("port taken", lines)
    assert f"port {live.port}: " in lines[0] and "another with --host and --port" in lines[0]


@slow
@needs_proc
def test_without_descriptors_idle_connections_are_closed_and_nothing_is_lost(subject):
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
    is_logged("out of file descriptors", subject.stop())


@slow
@needs_proc
@pytest.mark.parametrize("less", [0, 4 << 20], ids=["no more", "less than it has"])
def test_without_memory_the_server_ends_and_nothing_is_lost(less, subject):
    number = subject.server.process.pid
    _, hard = resource.prlimit(number, resource.RLIMIT_AS)
    size = int(Path(f"/proc/{number}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(number, resource.RLIMIT_AS, (size - less, hard))
    large = request_bytes("POST", "/api/hosts/tokens", {"x": "y" * 60_000}, "z")
    with contextlib.ExitStack() as stack:
        for _ in range(400):
            with contextlib.suppress(OSError):  # it has ended
                stack.enter_context(subject.door.connect()).sendall(large[:-5])
        assert subject.server.wait() == 1
        is_logged("out of memory", [it for it in subject.server.log if "storage:" not in it])
        comes_back(subject)


def test_a_clock_that_is_set_is_logged_as_the_readme_says(world, caplog):
    """Section 6 shows that no host is offline because of it."""
    start(world)
    live_on(world, 300)
    world.advance(5 * 3600)
    live_on(world, 5)
    is_logged("clock set", [f" WARNING {line}" for line in caplog.messages])


# Limits on what a peer can make the server hold, and the order of answers.


@pytest.fixture
def served(paths, clock, monkeypatch):
    """Starts a server that buffers only so much, and has so many hosts; `peers` opens connections
    that stay open as long as it runs, and sends on all of them."""
    with contextlib.ExitStack() as stack:

        def start(buffers=hostenroll.BUFFERED_MAXIMUM, hosts=0, **options):
            monkeypatch.setattr(hostenroll, "BUFFERED_MAXIMUM", buffers)
            if hosts:
                with World(paths, clock) as world:
                    fill(world, hosts)
            live = stack.enter_context(start_server(paths, **{"clock": clock, **options}))

            def peers(count, begun=b"", connect=live.connect):
                opened = [stack.enter_context(connect()) for _ in range(count)]
                for peer in opened if begun else ():
                    peer.sendall(begun)
                return opened

            live.peers = peers
            return live

        yield start


def test_a_peer_that_leaves_during_100_continue_ends_no_other(live):
    """The reset comes with the first answer; 100 Continue then goes to a socket that is closed."""
    expecting = POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    for _ in range(30):
        with live.connect() as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESETS)
            peer.sendall(HEALTH + expecting)
    assert live.call("GET", "/healthz").status == 200


@slow
def test_answers_that_are_taken_slowly_keep_their_order(live):
    """One needs the database and one does not: neither may overtake, or cut into, the other."""
    codes = {"/readyz": 200, "/healthz": 200, "/api/me": 401, "/nothing": 404}
    wanted = [list(codes)[n * n % 4] for n in range(300)]
    requests = b"".join(request_bytes("GET", path) for path in wanted)
    with small_buffers(live.port, 2048) as peer:
        sender = threading.Thread(target=lambda: peer.sendall(requests))
        sender.start()
        with peer.makefile("rb", buffering=512) as stream:
            assert [read_reply(stream).status for _ in wanted] == [codes[path] for path in wanted]
        sender.join(10)


def test_a_flood_of_lists_does_not_hold_up_a_heartbeat(served):
    """A turn runs one page; and what a peer sends behind its list waits for it."""
    live = served(hosts=3000)  # some milliseconds for each list
    beat, listing = beat_of(live), request_bytes("GET", "/api/hosts?q=unknown", None, live.api_key)
    (beating,) = live.peers(1)
    peers = live.peers(60, listing)
    beating.sendall(beat)
    assert is_readable(beating, 10)
    assert len(select.select(peers, [], [], 0)[0]) < 30
    for peer in peers:
        peer.sendall(HEALTH)
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(peer.makefile("rb")) for peer in (*peers, beating)]
        assert [read_reply(stream).status for stream in streams] == [200] * 61
        behind = [read_reply(stream).document for stream in streams[:-1]]
        assert behind == [{"status": "ok"}] * 60


def test_a_census_in_many_slices_is_answered_and_others_meanwhile(served, monkeypatch):
    monkeypatch.setattr(hostenroll, "COUNTED_AT_ONCE", 5)
    live = served(hosts=1000)
    with live.connect() as peer, peer.makefile("rb") as stream:
        peer.sendall(request_bytes("GET", "/metrics", bearer=live.api_key))
        time.sleep(0.002)  # it is being counted
        peer.sendall(HEALTH)
        assert live.call("GET", "/healthz").status == 200
        assert 'status="pending"} 1000' in read_reply(stream).document
        assert read_reply(stream).document == {"status": "ok"}


def narrow_lists(live, count, times):
    """Peers that ask for lists and take nothing: each answer is more than the kernel takes."""
    live.server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # of all it accepts
    asked = request_bytes("GET", "/api/hosts?limit=1000", bearer=live.api_key) * times
    return live.peers(count, asked, lambda: small_buffers(live.port, 2048))


@pytest.mark.parametrize("n, times", [(1, 6), (4, 6), (4, 1), pytest.param(30, 16, marks=slow)])
def test_answers_that_are_not_taken_hold_only_so_much_memory(n, times, served):
    live, ended = served(600_000, hosts=1000), 0
    peers = narrow_lists(live, n, times)
    assert live.call("GET", "/healthz").status == 200
    exchanges = live.server._exchanges
    until(lambda: not exchanges.reads and not exchanges.ready)  # no peer takes more
    assert buffered(live) <= 1_200_000
    for peer in peers:
        with contextlib.suppress(OSError, AssertionError), peer.makefile("rb") as stream:
            ended -= None not in [read_reply(stream) for _ in range(times)]
        ended += 1
    assert (ended > 0) == (n > 1)


def test_the_connection_that_buffers_most_is_closed_in_whatever_state(served):
    """One that does not take a large answer, and four that sent a part of a small request."""
    live = served(600_000, hosts=1000)
    narrow_lists(live, 1, 1)
    until(lambda: buffered(live) > 200_000)
    small = live.peers(4, POST + b"Content-Length: 60000\r\n\r\n" + b"x" * 59_000)
    until(lambda: 4 * 59_000 <= buffered(live) < 5 * 59_000)
    for peer in small:
        with peer.makefile("rb") as stream:
            assert exchange(peer, stream, b"x" * 1000)[0].code == "api-key-invalid"
    assert live.call("GET", "/healthz").status == 200


def test_an_unfinished_crowd_holds_only_so_much_memory(served):
    live = served(100_000)
    peers = live.peers(4, POST + b"Content-Length: 65536\r\n\r\n" + b"x" * 40_000)
    until(lambda: select.select(peers, [], [], 0)[0])
    ended = select.select(peers, [], [], 0.3)[0]
    assert 1 <= len(ended) <= 2
    with ended[0].makefile("rb") as stream:
        assert read_reply(stream).code == "overloaded"
    for peer in peers:
        peer.close()
    until(lambda: live.call("GET", "/api/me").code == "api-key-invalid")
    body = {"token": "x" * 8000, "hostname": "web-1"}
    until(lambda: live.call("POST", "/api/agent/enroll", body).code == "invalid-body")


HOLDING = {  # how many connections, and what each has sent
    "bodies": (2, POST + b"Content-Length: 60000\r\n\r\n" + b"x" * 39_950),
    "heads": (5, b"GET / HTTP/1.1\r\nX: " + b"x" * 15_960),
}
LAST_PARTS = {  # the last request, and more behind it
    "close": [b"GET /openapi.json HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", b"\r\n"],
    "1.0": [b"GET /openapi.json HTTP/1.0\r\n\r\n", b"\r\n"],
    "what is read at once": [b"GET /healthz HTTP/1.0\r\nX: " + b"a" * 4066 + b"\r\n\r\n\r\n"],
}


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("count, begun", table(HOLDING))
def test_what_is_small_is_not_kept_out_by_those_that_hold_too_much(count, begun, tls, served):
    """A handshake, or a head and a body in small parts, while others hold all there is."""
    live = served(80_000, tls=tls)
    body = b'{"maxUses":5,"description":"%b"}' % (b"x" * 900)
    whole = request_bytes("POST", "/api/hosts/tokens", body, live.api_key)
    holders = live.peers(count, begun)
    for _ in range(20):  # meanwhile all of it is read
        assert live.call("GET", "/healthz").status == 200
    with live.connect() as honest, honest.makefile("rb") as stream:
        for at in range(0, len(whole), 400):
            honest.sendall(whole[at : at + 400])
            assert live.call("GET", "/healthz").status == 200
        assert read_reply(stream).status == 201
    assert any(is_readable(holder, 0.1) for holder in holders)


class HeldClock(Clock):
    """A clock that the server waits for, as long as its lock is held."""

    lock, is_held = threading.Lock(), False

    def __call__(self):
        self.is_held = self.lock.locked()
        with self.lock:
            return self.now


def test_the_end_of_what_a_peer_sends_does_not_cut_off_a_body_that_is_still_read(served):
    """The selector may report the end in the very turn that begins to read the tiny chunks."""
    live = served(clock=(clock := HeldClock()))
    head = POST + CHUNKED + b"Authorization: Bearer " + live.api_key.encode() + b"\r\n\r\n"
    body = b"1\r\n{\r\n" + b"1\r\n \r\n" * 99 + b"1\r\n}\r\n0\r\n\r\n"
    peer, other = live.peers(2, HEALTH)
    with peer.makefile("rb") as stream:
        assert is_readable(other, 10) and read_reply(stream).status == 200
        with clock.lock:
            other.sendall(HEALTH)
            until(lambda: clock.is_held)
            peer.sendall(HEALTH + head + body)
            peer.shutdown(socket.SHUT_WR)
        assert [read_reply(stream).status for _ in range(2)] == [200, 201]


def test_a_request_that_runs_is_not_refused_as_well(served):
    """A large request that is whole, in the turn in which another makes it too much: were it
    refused, what it asks for would be done all the same."""
    live = served(70_000, clock=(clock := HeldClock()))
    body = b'{"maxUses":5%b}' % (b" " * 60_000)
    whole = request_bytes("POST", "/api/hosts/tokens", body, live.api_key)
    (honest,) = live.peers(1, whole[:-1])
    (other,) = live.peers(1, POST + b"Content-Length: 60000\r\n\r\n" + b"x" * 8_000)
    until(lambda: buffered(live) == len(body) - 1 + 8_000)
    with clock.lock:
        live.peers(1)  # wakes it
        until(lambda: clock.is_held)
        honest.sendall(whole[-1:])
        other.sendall(b"x" * 4_000)
    with honest.makefile("rb") as stream:
        assert read_reply(stream).status == 201
    assert not is_readable(honest, 0.1)
    with other.makefile("rb") as stream:
        assert read_reply(stream).code == "overloaded"


@pytest.mark.parametrize("twin", [0, 1], ids=["plain", "tls"])
@pytest.mark.parametrize("parts", table(LAST_PARTS))
def test_a_peer_that_sends_more_during_its_last_answer_gets_all_of_it(parts, twin, twins):
    """However slowly it reads. What arrives at a closed socket resets the connection: RFC 9112
    section 9.6."""
    twins[twin].server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # inherited
    for _ in range(2):
        peer = small_buffers(twins[twin].port)
        if twin:
            peer = twins[twin].tls.wrap_socket(peer, server_hostname="enroll.lan")
        with peer:
            for part in parts:
                peer.sendall(part)
                time.sleep(0.002)
            time.sleep(0.05)
            assert twins[twin].call("GET", "/healthz").status == 200  # no other waits for it
            answer = b"".join(iter(lambda: peer.recv(65536), b""))
            head, _, body = answer.partition(b"\r\n\r\n")
            assert len(body) == int(re.search(rb"Content-Length: ([0-9]+)", head)[1])


def test_a_peer_that_never_stops_sending_is_cut_off(served):
    with served(deadlines=in_states(linger=0.2)).connect() as peer:
        peer.sendall(b"NONSENSE\r\n\r\n")
        with pytest.raises(OSError):
            for _ in range(1000):
                peer.sendall(b"x")
                time.sleep(0.01)


# Deadlines, and heartbeats by the fast path.


@pytest.mark.parametrize("tls", [False, True], ids=["head", "handshake"])
def test_what_begins_byte_by_byte_has_one_deadline(tls, served):
    live = served(tls=tls, deadlines=all_states(0.3))
    data = hello_of(b"\x03\x03") if tls else HEALTH
    with SocketDoor(live.port).connect() as peer, peer.makefile("rb") as stream:
        for n in range(len(data) - 1):
            peer.sendall(data[n : n + 1])
            if is_readable(peer, 0.05):
                break
        assert 3 < n < 30
        assert stream.read() == b"" if tls else read_reply(stream).code == "request-timeout"


def test_a_body_in_tiny_chunks_has_one_deadline(served):
    """More chunks than are read at once buy no time, and no second 100 Continue."""
    with served(deadlines=in_states(body=0.3)).connect() as peer:
        peer.sendall(POST + b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n")
        assert peer.recv(65536) == hostenroll.CONTINUE
        began, received = time.monotonic(), b""
        peer.settimeout(0.1)
        while b"408" not in received and time.monotonic() - began < 8:
            peer.sendall(b"1\r\n \r\n" * (hostenroll.CHUNK_LINES_AT_ONCE + 5))
            with contextlib.suppress(socket.timeout):
                received += peer.recv(65536)
        assert received.startswith(b"HTTP/1.1 408 ") and time.monotonic() - began < 3


def test_a_heartbeat_in_the_middle_of_a_request_is_a_part_of_it(live):
    """However it is cut: else a peer that can choose a body could have it run as a request."""
    beat = beat_of(live)
    for begun, code in (
        (POST + b"Content-Length: %d\r\n\r\n" % len(beat), "api-key-invalid"),
        (POST + b"X: y\r\n", "malformed-request"),
    ):
        with live.connect() as peer, peer.makefile("rb") as stream:
            # When the first is answered, the rest has been read, too.
            assert exchange(peer, stream, HEALTH + begun, beat)[1].code == code
            peer.shutdown(socket.SHUT_WR)
            assert stream.read() == b""


@pytest.mark.parametrize("ends", ["", "because it asks for that", "because the server stops"])
def test_a_heartbeat_that_waits_has_no_deadline_and_is_not_overtaken(ends, served, paths):
    """And where the connection ends, it is the last."""
    live = served(deadlines=all_states(0.05))
    beat = beat_of(live, *([("Connection", "close")] if "asks" in ends else []))
    with live.connect() as peer, peer.makefile("rb") as stream:
        exchange(peer, stream, HEALTH)
        with write_lock(paths[0]):
            peer.sendall(beat)
            until(lambda: live.server._exchanges.waiting_since)
            if "stops" in ends:
                live.server.stop()
                until(lambda: is_refused(live.port))
            time.sleep(0.15)  # longer than any deadline
            peer.sendall(b"" if ends else HEALTH)
            assert not is_readable(peer, 0.05)
        reply = read_reply(stream)
        assert reply.status == 200 and "lastSeen" in reply.document
        assert reply.headers.get("connection") == ("close" if ends else None)
        assert stream.read() == b"" if ends else read_reply(stream).document == {"status": "ok"}


# The audit log, keys and commands beside a running server.


REFUSED = "SELECT code, address, detail FROM audit WHERE code IS NOT NULL"


@pytest.mark.parametrize("count, locked", [(1, False), (60, False), (75, False), (75, True)])
def test_a_server_that_ends_leaves_no_refusal_unwritten(count, locked, live, paths):
    """Also where another process still writes when it stops."""
    lock = write_lock(paths[0]) if locked else contextlib.nullcontext()
    lock.__enter__()
    replies = live.send(beat_bytes("junk") * count)
    assert [reply.code for reply in replies] == ["credential-invalid"] * count
    release = threading.Timer(0.2 if locked else 0, lambda: lock.__exit__(None, None, None))
    release.start()
    live.terminate()
    release.join()
    written = sql(paths[0], REFUSED)
    assert written[:60] == [("credential-invalid", "127.0.0.1", "{}")] * min(count, 60)
    more = [json.loads(detail).get("more") for _, _, detail in written[60:]]
    assert more == ([15] if count == 75 else [])


def test_the_very_last_refusal_is_written_too(live, paths):
    """A list is read when the last tick that writes is over."""
    data = request_bytes("GET", "/api/hosts", bearer="hak_junk")
    with live.connect() as peer, peer.makefile("rb") as stream:
        peer.sendall(data[:-2])
        until(lambda: buffered(live))
        live.server.stop()
        until(lambda: is_refused(live.port))
        assert exchange(peer, stream, data[-2:])[0].code == "api-key-invalid"
    live.terminate()
    written = ("api-key-invalid", "127.0.0.1", '{"request":"GET /api/hosts"}')
    assert sql(paths[0], REFUSED) == [written]


def test_refusals_do_not_make_each_turn_do_the_housekeeping(live):
    """A peer without any secret causes them, and it reads hundreds of rows."""
    real, times = live.registry.housekeeping, []
    live.registry.housekeeping = lambda now: times.append(now) or real(now)
    for _ in range(20):
        assert live.beat("junk").status == 401
    until(lambda: not live.registry.audit.pending)
    assert len(live.events("action=refuse").document["events"]) == 20 and len(times) <= 1


@slow
def test_every_server_uses_changed_keys_at_once(tmp_path):
    start = partial(start_server, tmp_path, how="process")
    with start() as one, start() as two:
        hosts = [door.join()[1] for door in (one, two)]
        old = load(f"{tmp_path}/hostenroll.key").first.kid
        new = cli(tmp_path, "rotate-signing-key").stdout.strip()
        renewed = [door.beat(it).document["credential"] for door, it in zip((one, two), hosts)]
        joined = [door.join()[1] for door in (one, two)]
        heads = [json.loads(unb64(credential.split(".")[0])) for credential in renewed + joined]
        assert [head["kid"] for head in heads] == [new] * 4
        assert two.beat(renewed[0]).status == 200
        refused = cli(tmp_path, "retire-signing-key", old)
        assert (refused.returncode, "--force" in refused.stderr) == (3, True)
        assert one.beat(hosts[1]).status == 200
        assert cli(tmp_path, "retire-signing-key", old, "--force").returncode == 0
        for door in (one, two):
            assert door.beat(hosts[1]).code == "credential-invalid"
            assert door.beat(renewed[0]).status == 200
        assert one.beat(renewed[1]).status == 200  # it had got its renewal
        assert [door.call("GET", "/readyz").status for door in (one, two)] == [200, 200]


@slow
def test_a_backup_and_a_check_beside_a_busy_server_are_whole_and_sound(tmp_path):
    hosts, done = [], threading.Event()
    with start_server(tmp_path, how="process") as server:
        token = server.token(maxUses=1000)

        def load(_):
            while not done.is_set():
                host = server.enroll(token).document
                assert server.beat(host["credential"]).status == 200
                hosts.append(host["hostId"])

        loading = threading.Thread(target=many, args=(2, load))
        loading.start()
        until(lambda: len(hosts) > 30)
        before = list(hosts)
        statuses = [cli(tmp_path, *words).returncode for words in (["backup", "copy"], ["check"])]
        done.set()
        loading.join(60)
        assert statuses == [0, 0] and server.terminate() == 0
    statement = "SELECT id FROM host JOIN heartbeat ON host_id = id WHERE last_seen > 0"
    stored = {f"{number:016x}" for (number,) in sql(f"{tmp_path}/copy/hostenroll.db", statement)}
    assert stored >= set(before) and len(before) > 30
    checked = cli(tmp_path / "copy", "check")
    assert (checked.returncode, checked.stderr) == (0, "")


@slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Prometheus")
def test_a_real_prometheus_scrapes_us_and_its_tool_finds_nothing_wrong(live, tmp_path):
    live.beat(live.join()[1])
    options = {"input": live.ask("GET", "/metrics").document, "capture_output": True, "text": True}
    checked = subprocess.run(["promtool", "check", "metrics"], timeout=30, **options)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"job_name": "hostenroll", "scrape_interval": "1s"}
    job["authorization"] = {"credentials": live.api_key}
    job["static_configs"] = [{"targets": [f"127.0.0.1:{live.port}"]}]
    (tmp_path / "prometheus.yml").write_text(json.dumps({"scrape_configs": [job]}))
    words = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    words = ["prometheus", *words, f"--web.listen-address=127.0.0.1:{port}"]
    url = f"http://127.0.0.1:{port}/api/v1/query?query=hostenroll_hosts{{status='online'}}%20==%201"
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:

        def found():
            with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(url) as answer:
                return json.load(answer)["data"]["result"]

        try:
            assert [row["metric"]["organization"] for row in until(found, 60)] == ["default"]
        finally:
            process.terminate()


# TLS.


class Peer(contextlib.AbstractContextManager):
    """A TLS client on a connection, of which the test sends and receives the bytes."""

    def __init__(self, port, context=None):
        self.socket = socket.create_connection(("127.0.0.1", port), 10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.output = outgoing.read  # what is to be sent now
        wrap = (context or trusting()).wrap_bio
        self.session = wrap(self._incoming, outgoing, server_hostname="enroll.lan")

    def receive(self):
        if data := self.socket.recv(65536):
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def handshake(self):
        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                self.session.do_handshake()
                return self.send(self.output())
            self.send(self.output())
            self.receive()

    def send(self, data):
        self.socket.sendall(data)

    def sealed(self, plain):
        """The records of a plain text."""
        self.session.write(plain)
        return self.output()

    def read(self):
        """The next plain text from the server; b"" at its close_notify."""
        while True:
            try:
                return self.session.read(65536)
            except ssl.SSLWantReadError:
                self.receive()

    def __exit__(self, *_):
        self.socket.close()


VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
DER = {pair: ssl.PEM_cert_to_DER_cert(certificate_of(pair)) for pair in PAIRS}
each_version = pytest.mark.parametrize("version", VERSIONS, ids=["TLS 1.2", "TLS 1.3"])


def of_version(version, pair="one"):
    return trusting(pair, minimum_version=version, maximum_version=version)


def hello_of(version, padding=0):
    """The smallest ClientHello of a version up to 1.2, and so many bytes more: RFC 7685."""
    groups = b"\x00\x0a\x00\x04\x00\x02\x00\x17" + b"\x00\x0d\x00\x06\x00\x04\x04\x03\x02\x03"
    ciphers = b"\xc0\x2b\xc0\x2c\xc0\x09\xc0\x0a"
    body = version + bytes(32) + b"\0" + struct.pack(">H", len(ciphers)) + ciphers + b"\x01\x00"
    groups += struct.pack(">HH", 21, padding - 4) + bytes(padding - 4) if padding else b""
    body += struct.pack(">H", len(groups)) + groups
    message = b"\x01" + struct.pack(">I", len(body))[1:] + body
    parts = [message[at : at + 10_000] for at in range(0, len(message), 10_000)]
    return b"".join(b"\x16\x03\x01" + struct.pack(">H", len(part)) + part for part in parts)


STREAMS = {  # what is sent; the codes of the answers ("": accepted), or that it closes
    **{f"malformed: {name}": (BAD[name][0] + HEALTH, [BAD[name][1]]) for name in (
        "TE and CL", "two lengths", "a folded value", "bare LF everywhere", "no Host",
        "a chunk longer than its size", "too many trailers", "a length of 30 digits")},
    "close": ((HEALTH[:-2] + b"Connection: x, Close\r\n\r\n") * 2, ["close"]),
    "close in a second line": (
        (HEALTH[:-2] + b"Connection: x\r\nConnection: close\r\n\r\n") * 2, ["close"]),
    "HTTP/1.0": (b"GET /healthz HTTP/1.0\r\n\r\n" * 2, ["close"]),
    "pipelined": (HEALTH * 70, [""] * 70),
    "pipelined and refused": (HEALTH * 2 + b"nonsense\r\n\r\n" + HEALTH,
                              ["", "", "malformed-request"]),
    "chunked": (POST + CHUNKED + b"\r\n2;a=b\r\n{}\r\n0\r\nX: y\r\n\r\n" + HEALTH,
                ["api-key-invalid", ""]),
    "empty lines between": (b"\r\n".join([HEALTH] * 3), [""] * 3),
    "a head that is too large": (b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
                                 ["head-too-large"]),
    "a body of several records": (request_bytes("POST", TOKENS_PATH, b"x" * 60_000) * 2,
                                  ["api-key-invalid"] * 2),
    "half of a head": (HEALTH + HEALTH[:-1], [""]),
    "half of a body": (HEALTH + request_bytes("POST", BEAT_PATH, b"{}")[:-1], [""]),
    "nothing": (b"", []),
    "TLS in TLS": (b"\x16\x03\x01\x00\xa5\x01\x00\x00", ["malformed-request"]),
}  # fmt: skip
ENDINGS = {  # what is sent, and the status of the answer
    "too large": (
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 999999\r\n\r\n" + b"x" * 99_999, 413),
    "idle for too long": (HEALTH, 200),
    "idle behind an empty line, which begins no request": (HEALTH + b"\r\n", 200),
    "a slow head": (b"GET /heal", 408),
    "a slow body": (HALF_SENT, 408),
    "a slow body in chunks": (POST + CHUNKED + b"\r\n1\r\n{\r\n", 408),
    "nothing sent": (b"", 408),
    "a malformed HEAD": (b"HEAD /x HTTP/1.1\r\n\r\n", 400),
    "a HEAD that is too large": (
        b"HEAD /x HTTP/1.1\r\nHost: h\r\nContent-Length: 70000\r\n\r\n", 413),
}  # fmt: skip
ASKED = {"nothing": b"", "one": HEALTH, "five": HEALTH * 5, "two and a half": HEALTH * 2 + b"GET /"}
METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"]
JUNK = {
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
    # No honest one is larger than a head may be; 4,096 of the largest that TLS allows, 128 KiB
    # each, would be half a gigabyte.
    "a hello without end": b"\x16\x03\x01\x27\x10\x01\x01\xf0\x00\x03\x03" + bytes(9994)
    + (b"\x16\x03\x01\x27\x10" + bytes(10_000)) * 9,
}  # fmt: skip
STALLED = ["before the hello", "in the hello", "after the server's hello"]
RENEWED = {"renegotiation": ("-tls1_2", "R\\n", False), "a key update": ("-tls1_3", "K\\n", True)}


@each_version
def test_tls_is_spoken_in_its_two_good_versions(version, secure):
    """With our protocol, where the client offers others too, and without session tickets: curl, a
    process for each heartbeat, never resumes a session, and a ticket costs 20 us."""
    secure.tls = of_version(version)
    secure.tls.set_alpn_protocols(["h2", "http/1.1"])
    with secure.connect() as peer:
        peer.sendall(HEALTH)
        assert peer.recv(65536).startswith(b"HTTP/1.1 200 ")
        spoken = peer.version(), peer.selected_alpn_protocol()
        assert spoken == (version.name.replace("_", "."), "http/1.1")
        assert not (version == ssl.TLSVersion.TLSv1_3 and peer.session.has_ticket)
    secure.tls.set_alpn_protocols(["h2"])
    assert secure.call("GET", "/healthz").status == 200


HELLOS = {  # and the fatal alert that answers it, by RFC 8446 section 6; None: a ServerHello
    "of TLS 1.2": (hello_of(b"\x03\x03"), None),
    "of TLS 1.1": (hello_of(b"\x03\x02"), 70), "of TLS 1.0": (hello_of(b"\x03\x01"), 70),
    "of SSL 2": (b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + b"x" * 40, 70),
    "long": (hello_of(b"\x03\x03", 16_200), None),
    "too long": (hello_of(b"\x03\x03", 17_000), 47),
    "far too long": (hello_of(b"\x03\x03", 64_000), 47),
    "too long, with no end": (hello_of(b"\x03\x03", 64_000)[:20_000], 47),
    "too long, in records of a byte": (
        b"".join(b"\x16\x03\x01\0\1%c" % byte for byte in b"\1\0\xff\xff" + bytes(3000)), 47),
    "in a record that is too long": (b"\x16\x03\x01\xff\xff" + bytes(9000), 22),
}  # fmt: skip


@pytest.mark.parametrize("step", [1000, 1 << 20], ids=["in pieces", "at once"])
@pytest.mark.parametrize("hello, description", table(HELLOS))
def test_a_hello_that_is_not_taken_gets_its_alert_before_the_end(hello, description, step, twins):
    with SocketDoor(twins[1].port).connect() as peer, peer.makefile("rb") as stream:
        for at in range(0, len(hello), step):
            peer.sendall(hello[at : at + step])
        kind, _, length = struct.unpack(">BHH", stream.read(5))
        answer = stream.read(length)
        if description is None:
            assert (kind, answer[0]) == (22, 2)
        else:
            assert (kind, answer) == (21, bytes([2, description]))
            assert stream.read() == b""


@pytest.mark.parametrize("data, codes", table(STREAMS))
def test_through_tls_a_stream_is_answered_as_without(data, codes, twins):
    plain, secured = (
        [(*reply[:2], reply.headers.get("connection")) for reply in live.send(data)]
        for live in twins
    )
    assert secured == plain
    assert [document.get("code", end or "") for _, document, end in plain] == codes


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("data, status", sample(ENDINGS, *[*ENDINGS][::2]))
def test_every_end_is_behind_a_whole_answer(data, status, tls, served):
    """Through TLS a close_notify. Else a client takes it for an attack that truncates answers."""
    live = served(tls=tls, deadlines=all_states(0.1))
    with live.connect() as peer, peer.makefile("rb") as stream:
        peer.sendall(data)
        reply = read_reply(stream, head_only=data.startswith(b"HEAD"))
        assert (reply.status, reply.headers.get("connection")) == (
            status, None if status == 200 else "close")  # fmt: skip
        assert stream.read() == b""


def test_a_connection_closed_for_another_or_at_the_stop_gets_a_close_notify(served):
    live = served(tls=True, connections=1)
    (first,) = live.peers(1, HEALTH)
    assert first.recv(65536).startswith(b"HTTP/1.1 200 ")
    (second,) = live.peers(1)
    assert first.recv(1) == b""
    live.terminate()
    assert second.recv(1) == b""


@each_version
@pytest.mark.parametrize("asked", table(ASKED))
def test_what_was_asked_before_a_close_notify_is_answered(asked, version, twins):
    """A half-close: the peer waits for our close_notify before it closes."""
    with Peer(twins[1].port, of_version(version)) as peer:
        peer.socket.settimeout(5)
        peer.handshake()
        sealed = peer.sealed(asked) if asked else b""
        with contextlib.suppress(ssl.SSLWantReadError):
            peer.session.unwrap()
        peer.send(sealed + peer.output())
        received = b"".join(iter(lambda: peer.socket.recv(65536), b""))
        assert received[:1] in (b"\x15", b"\x17")
        assert len(received) > 200 * asked.count(b"Host")


@pytest.mark.parametrize("step", [1, 1000], ids=["byte by byte", "at once"])
@pytest.mark.parametrize("method", METHODS)
def test_the_answer_to_plain_http_on_the_tls_port_says_so(method, step, twins):
    data = request_bytes(method, "/api/hosts", b"{}" if method[0] == "P" else None)
    with SocketDoor(twins[1].port).connect() as peer, peer.makefile("rb") as stream:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):  # we close as soon as we know
            for n in range(0, len(data), step):
                peer.sendall(data[n : n + step])
        reply = read_reply(stream, head_only=method == "HEAD")
        assert (reply.status, reply.headers["connection"]) == (400, "close")
        if method != "HEAD":
            assert reply.code == "malformed-request" and "https" in reply.document["detail"]
        if method != "HEAD" or step > 1:
            assert stream.read() == b""


@pytest.mark.parametrize("data", table(JUNK))
def test_junk_on_the_tls_port_ends_its_connection_and_hurts_no_other(data, twins):
    with SocketDoor(twins[1].port).connect(5) as peer:
        with contextlib.suppress(ConnectionError):
            peer.sendall(data)
            if len(data) < 100_000:  # by then it is refused
                peer.shutdown(socket.SHUT_WR)
        read_to_end(peer)
    assert twins[1].call("GET", "/healthz").status == 200


def stall(peer, where):
    """Go as far as that in the handshake, and no further."""
    with contextlib.suppress(ssl.SSLWantReadError):
        peer.session.do_handshake()
    hello = peer.output()
    if where != "before the hello":
        peer.send(hello[:100] if where == "in the hello" else hello)
    if where == "after the server's hello":
        peer.receive()


@pytest.mark.parametrize("where", STALLED)
@pytest.mark.parametrize("n", sample({"at its deadline": 1, "for new": 2}, "at its deadline"))
def test_a_handshake_that_stalls_ends_at_its_deadline_or_for_a_new_connection(n, where, served):
    live = served(tls=True, deadlines=in_states(handshake=0.2 if n == 1 else 30), connections=2)
    peers = live.peers(n, connect=lambda: Peer(live.port))
    for peer in peers:
        stall(peer, where)
    assert live.call("GET", "/healthz").status == 200
    read_to_end(peers[0].socket)


def test_half_a_record_counts_among_what_is_buffered(served):
    live = served(50_000, tls=True)
    peers = live.peers(6, connect=lambda: Peer(live.port))
    for peer in peers:
        peer.handshake()
        peer.send(peer.sealed(b"GET /" + b"x" * 16_000)[:15_000])
    sockets = [peer.socket for peer in peers]
    until(lambda: select.select(sockets, [], [], 0)[0], 5)  # and not at a deadline
    assert len(select.select(sockets, [], [], 0)[0]) <= 4
    assert live.call("GET", "/healthz").status == 200


@pytest.mark.parametrize("how", ["closed", "reset", "half a record", "junk", "a bad record"])
def test_an_end_in_the_middle_of_tls_hurts_no_other(how, twins):
    secure = twins[1]
    with secure.connect() as other, other.makefile("rb") as stream, Peer(secure.port) as peer:
        peer.handshake()
        peer.send(peer.sealed(HEALTH))
        assert peer.read().startswith(b"HTTP/1.1 200 ")
        sealed = peer.sealed(HEALTH)
        bad = sealed[:-1] + bytes([sealed[-1] ^ 1])
        junk = {"junk": b"GET / HTTP/1.1\r\n\r\n" * 10, "a bad record": bad}
        peer.send({"half a record": sealed[:20], **junk}.get(how, b""))
        if how == "reset":
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESETS)
        elif how in junk:
            read_to_end(peer.socket)
        peer.socket.close()
        assert exchange(other, stream, HEALTH)[0].status == 200
        assert secure.call("GET", "/readyz").status == 200


@each_version
def test_a_client_that_does_not_trust_us_hurts_no_other(version, twins):
    """Its alert arrives in the middle of the handshake, or right behind it."""
    with Peer(twins[1].port, of_version(version, "other")) as peer:
        with pytest.raises(ssl.SSLCertVerificationError):
            peer.handshake()
        peer.send(peer.output())
        read_to_end(peer.socket)
    assert twins[1].call("GET", "/healthz").status == 200


@slow
@needs_openssl
@pytest.mark.parametrize("version, key, goes_on", table(RENEWED))
def test_there_is_one_handshake_but_keys_may_change(version, key, goes_on, secure):
    client = f"openssl s_client -connect 127.0.0.1:{secure.port} {version}"
    # A command is one at the start of what openssl reads at once.
    typed = ["GET /healthz HTTP/1.1\\r\\n", key, "Host: a\\r\\nConnection: close\\r\\n\\r\\n"]
    script = "; sleep 0.3; ".join(f"printf '{words}'" for words in typed)
    command = ["sh", "-c", f"({script}; sleep 1) | {client}"]
    output = subprocess.run(command, capture_output=True, timeout=30).stdout
    assert (b"HTTP/1.1 200 OK" in output) == goes_on, output


def served_certificate(port):
    anyone = trusting(check_hostname=False, verify_mode=ssl.CERT_NONE)
    with SocketDoor(port, tls=anyone).connect() as peer:
        return peer.getpeercert(binary_form=True)


def test_a_reload_is_for_the_connections_to_come_and_a_bad_pair_is_let_be(secure, tmp_path, caplog):
    (tmp_path / "tls.key").write_text(PAIRS["other"])
    secure.server.reload()
    until(lambda: caplog.records)
    [(level, line)] = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert level == "ERROR" and "tls." in line and "stays" in line and "\n" not in line
    assert served_certificate(secure.port) == DER["one"]
    with secure.connect() as standing, Peer(secure.port) as stalled:
        stall(stalled, "after the server's hello")
        write_pair(tmp_path, "other")
        secure.server.reload()
        until(lambda: served_certificate(secure.port) == DER["other"])
        other = SocketDoor(secure.port, tls=trusting("other"))
        assert other.call("GET", "/healthz").status == 200
        standing.sendall(HEALTH)
        stalled.handshake()
        stalled.send(stalled.sealed(HEALTH))
        for answer in (standing.recv(65536), stalled.read()):
            assert answer.startswith(b"HTTP/1.1 200 ")


def test_a_certificate_on_a_mount_that_hangs_holds_up_nobody(secure, tmp_path, monkeypatch):
    goes_on, load = threading.Event(), hostenroll.load_tls
    monkeypatch.setattr(hostenroll, "load_tls", lambda *pair: goes_on.wait(20) and load(*pair))
    write_pair(tmp_path, "other")
    for _ in range(3):
        secure.server.reload()
        assert secure.call("GET", "/healthz").status == 200
    goes_on.set()
    until(lambda: served_certificate(secure.port) == DER["other"])


LOADED = {
    "no certificate": ("nowhere tls.key", "cannot read nowhere"),
    "no key": ("tls.crt nowhere", "cannot read nowhere"),
    "a folder": ("tls.crt folder", "folder is not a file"),
    "a folder as certificate": ("folder tls.key", "folder is not a file"),
    "an empty certificate": ("empty tls.key", "no PEM certificate in empty"),
    "bytes": ("bytes tls.key", "no PEM certificate in bytes"),
    "the key as certificate": ("tls.key tls.key", "no PEM certificate in tls.key"),
    "the certificate as key": ("tls.crt tls.crt", "tls.crt"),
    "an empty key": ("tls.crt empty", "empty"),
    "another's key": ("tls.crt other.key", "the key is another's"),
    "a key of another kind": ("tls.crt ed25519.key", "the key is another's"),
    "a key with a password": ("tls.crt sealed.key", "password"),
}
PEM_FORMS = {
    "as it is": lambda pem: pem,
    "with a text before it": lambda pem: f"subject=O = M\u00fcller\n{pem}",
    "with another behind it": lambda pem: pem + certificate_of("other"),
    "with lines that end in CR LF": lambda pem: pem.replace("\n", "\r\n"),
    "with its key": lambda pem: PAIRS["one"],
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


@pytest.mark.parametrize("pair, words", table(LOADED))
def test_a_pair_that_cannot_be_used_is_an_operators_error(pair, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pair(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    (tmp_path / "other.key").write_text(PAIRS["other"])
    (tmp_path / "ed25519.key").write_text(ED25519_KEY)
    (tmp_path / "sealed.key").write_text(SEALED_KEY)
    with pytest.raises(hostenroll.OperatorError) as error:
        hostenroll.load_tls(*pair.split())
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("form", table(PEM_FORMS))
def test_a_certificate_is_read_as_openssl_reads_it(form, tmp_path):
    certificate, key = write_pair(tmp_path)
    Path(certificate).write_bytes(form(certificate_of("one")).encode("utf-8"))
    context, chain = hostenroll.load_tls(certificate, key)
    assert chain[0] == DER["one"]
    assert isinstance(context, ssl.SSLContext) and context.num_tickets == 0


KEYS = {  # of openssl req
    "P-256": "ec -pkeyopt ec_paramgen_curve:P-256", "P-521": "ec -pkeyopt ec_paramgen_curve:P-521",
    "RSA": "rsa:2048", "Ed25519": "ed25519",
}  # fmt: skip
CHAINS = {  # what is issued, the host, a part of why it is not trusted
    **{f"by {name}": ({"key": key}, "enroll.lan", "") for name, key in KEYS.items()},
    "by an address": ({}, "127.0.0.1", ""),
    "by an address in IPv6": ({}, "::1", ""),
    "another address": ({}, "127.0.0.2", "mismatch"),
    "another name": ({}, "other.lan", "mismatch"),
    "a short name": ({}, "enroll", "mismatch"),
    "a name that is none": ({}, f"{'a' * 70}.lan", ""),
    "an end that is past": ({"days": -1}, "enroll.lan", "expired"),
    "a name in the subject alone": ({"names": ""}, "enroll.lan", ""),
    "another name in the subject alone": ({"names": ""}, "other.lan", "mismatch"),
    "a wildcard": ({"names": "DNS:*.site.lan"}, "enroll.site.lan", ""),
    "a wildcard that is too wide": ({"names": "DNS:*.lan"}, "enroll.lan", "mismatch"),
}


def chain_of(folder):
    return hostenroll.load_tls(str(folder / "tls.crt"), None)[1]


@pytest.fixture
def known(authority, monkeypatch):
    """This machine knows the authority."""
    for name, value in authority.trust.items():
        monkeypatch.setenv(name, value)
    return authority


@needs_curl
@pytest.mark.parametrize("issued, host, why", sample(CHAINS, "by P-256", "another name"))
def test_a_chain_is_trusted_where_curl_trusts_it(issued, host, why, known, tmp_path):
    known.issue(tmp_path, **issued)
    reason = hostenroll.distrust(chain_of(tmp_path), host)
    context, _ = hostenroll.load_tls(str(tmp_path / "tls.crt"), str(tmp_path / "tls.key"))
    with start_server(tmp_path, load_tls=lambda host: (context, lambda: None)) as server:
        name = f"[{host}]" if ":" in host else host
        to = f"::{name}:443:127.0.0.1:{server.port}"[1:]
        asked = ["curl", "-qsS", "--connect-to", to[1:], f"https://{name}/healthz"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    assert (done.returncode == 0) == (reason == ""), (reason, done.stderr)
    assert why in reason and (why or not reason or "label" in reason)


@needs_openssl
def test_a_chain_is_not_trusted_without_its_links_or_by_who_does_not_know_its_root(
    known, tmp_path, monkeypatch
):
    known.issue(tmp_path)
    leaf, middle = chain_of(tmp_path)
    many = [leaf, middle, *[middle] * 42]  # more than a record of TLS holds
    assert len(b"".join(many)) > hostenroll.TLS_RECORD
    assert hostenroll.distrust(many, "enroll.lan") == ""
    for chain in ([leaf], [middle, leaf], [leaf, leaf], [DER["one"]], [DER["one"], middle],
                  [b"nonsense"], [b""], [leaf, middle, *[middle] * 4000]):  # fmt: skip
        assert hostenroll.distrust(chain, "enroll.lan"), chain
    for host in ("", ".", "a" * 300, "-", "*.lan"):
        assert hostenroll.distrust([leaf, middle], host), host
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere")
    for chain in ([leaf, middle], many):
        assert "issuer" in hostenroll.distrust(chain, "enroll.lan")


@needs_openssl
def test_a_certificate_that_signs_itself_is_trusted_where_it_is_known(tmp_path, monkeypatch):
    hostenroll.make_pair(
        str(tmp_path / "tls.crt"), str(tmp_path / "tls.key"), "enroll.lan", ["DNS:enroll.lan"], 9
    )
    assert "self" in hostenroll.distrust(chain_of(tmp_path), "enroll.lan")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "tls.crt"))
    assert hostenroll.distrust(chain_of(tmp_path), "enroll.lan") == ""


# Service managers, and the names of requests.


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_service_manager_is_notified_of_start_reload_and_stop(tls, served):
    states, before = [], time.monotonic()
    live = served(tls=tls, notify=states.append)
    for count in (1, 3, 5):
        until(lambda count=count: len(states) >= count)
        assert live.call("GET", "/healthz").status == 200 and len(states) == count
        assert live.server._timeout() > 5  # idle, it sleeps
        if count < 5:
            live.server.reload()
    live.terminate()
    states, moments = zip(*(state.partition("\nMONOTONIC_USEC=")[::2] for state in states))
    assert states == ("READY=1", *("RELOADING=1", "READY=1") * 2, "STOPPING=1")
    for n in (1, 3):
        assert before - 1 < int(moments[n]) / 1e6 <= time.monotonic()


def test_a_server_takes_an_ipv6_socket_that_is_bound_already(served):
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6, backlog=1)
    except OSError:
        pytest.skip("this machine has no such address")
    live, address = served(listener=listener), listener.getsockname()[:2]
    assert live.server.url == f"http://[::1]:{address[1]}"
    with socket.create_connection(address, 10) as peer:
        peer.sendall(HEALTH)
        assert peer.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_refusal_names_its_request_and_no_other_answer_does(live, caplog):
    caplog.set_level("INFO")
    wrong = request_bytes("GET", "/api/me", bearer="hak_nonsense")
    replies = live.send(wrong + HEALTH + wrong + NOTHING_HERE + b"junk\r\n\r\n")
    assert [reply.status for reply in replies] == [401, 200, 401, 404, 400]
    names = [reply.headers.get("x-request-id") for reply in replies]
    assert names[1] is None and None not in names[2:]
    assert len(set(names)) == 5 and all(re.fullmatch("[0-9a-f]+-[0-9]+", n) for n in names if n)
    until(lambda: sum("api-key-invalid" in line for line in caplog.messages) == 2)
    logged = [r.request for r in caplog.records if "api-key-invalid" in r.message]
    assert logged == [names[0], names[2]]


def test_no_two_requests_have_one_name(paths, clock):
    """Not on one connection, not on two, not before and after a restart."""
    names = []
    for tls in (False, True, False):
        with start_server(paths, clock=clock, tls=tls) as live:
            for _ in range(3):
                names += [reply.headers["x-request-id"] for reply in live.send(NOTHING_HERE * 4)]
        clock.advance(1)
    assert len(names) == len(set(names)) == 36


# 11. Watch

WATCH_KEY = hostenroll.mint_secret("hak", 1).text


class Receiver:
    """A server of HTTP that keeps the requests it gets, and answers as it is told: a status, bytes,
    or what a function of the request returns."""

    def __init__(self, answer=200, tls=None, closes=False):
        self.closes, self.answer = closes, answer
        self.requests, self.connections, self.peers = [], 0, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port, self.tls = self.listener.getsockname()[1], tls
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                peer = self.listener.accept()[0]
                self.connections += 1
                self.peers.append(peer)
                threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer):
        with contextlib.suppress(OSError):  # it went away
            if self.tls:
                peer = self.tls.wrap_socket(peer, server_side=True)
            with peer, peer.makefile("rb") as stream:
                while line := stream.readline():
                    fields = iter(stream.readline, b"\r\n")
                    headers = {name.lower(): text.strip() for name, _, text in
                               (field.decode().partition(":") for field in fields)}  # fmt: skip
                    body = stream.read(int(headers.get("content-length", 0)))
                    method, target, _ = line.decode().split()
                    request = SimpleNamespace(
                        method=method, target=target, headers=headers, body=body
                    )
                    self.requests.append(request)
                    answer = self.answer(request) if callable(self.answer) else self.answer
                    if isinstance(answer, int):
                        answer = b"HTTP/1.1 %d Some\r\nContent-Length: 0\r\n\r\n" % answer
                    peer.sendall(answer)
                    if self.closes:
                        return

    def close(self):
        self.listener.close()
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.close()


@pytest.fixture
def receive():
    """Makes a Receiver."""
    with contextlib.ExitStack() as stack:

        def make(*arguments, **options):
            receiver = Receiver(*arguments, **options)
            stack.callback(receiver.close)
            return receiver

        yield make


def answer_with(status, body, content_type="application/json"):
    """The bytes of an answer."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


@pytest.mark.parametrize("how", ["socket", "tls"])
def test_a_client_asks_a_server_and_is_refused_by_name(how, paths):
    with start_server(paths, tls=how == "tls") as server:
        pins = [pin_of("one")] if how == "tls" else []
        client = hostenroll.Client(server.url, server.api_key, pins=pins)
        assert client.get("/api/me")["role"] == "admin"
        assert client.get("/api/hosts", {"label": ["a=b", "c=d"], "limit": 1})["hosts"] == []
        token = client.post("/api/hosts/tokens", {"labels": {"k": "\xe4"}})
        assert token["labels"] == {"k": "\xe4"}
        with pytest.raises(hostenroll.InvalidQuery, match="limit: must be an integer"):
            client.get("/api/hosts", {"limit": 0})
        with pytest.raises(hostenroll.NotFound) as refused:
            client.get(f"/api/hosts/{UNKNOWN_ID}")
        assert (refused.value.code, refused.value.status) == ("not-found", 404)
        with pytest.raises(hostenroll.ApiKeyInvalid):
            hostenroll.Client(server.url, WATCH_KEY, pins=pins).get("/api/me")


PROBLEM = answer_with(
    418, {"code": "brand-new", "detail": "Do.", "status": 418, "errors": [
        {"field": "x", "detail": "y"}, {"field": "z", "detail": "no"}]},
    "application/problem+json",
)  # fmt: skip


@pytest.mark.parametrize("answer, complaint", table({
    "a redirect": (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\n"
                   b"Content-Length: 0\r\n\r\n", "answered 302, not as one of ours"),
    "a page of a proxy": (answer_with(200, b"<html>", "text/html"), "answered 200, not as"),
    "a failure without a document": (answer_with(502, {}), "answered 502"),
    "a list in place of a problem": (answer_with(400, [], "application/problem+json"), "400"),
    "a problem without a code": (answer_with(400, {"detail": "x", "status": 400}), "answered 400"),
    "a problem with bad errors": (answer_with(400, {"code": "x", "errors": [1]}), "answered 400"),
    "a number in place of a problem": (answer_with(400, b"1"), "answered 400"),
    "JSON that nobody agrees on": (answer_with(200, b'{"a":1,"a":2}'), "answered 200"),
    "nothing": (b" ", "cannot ask"), "no HTTP": (b"SSH-2.0-x\r\n", "cannot ask"),
    "less than it says": (answer_with(200, {})[:-1], "cut short"),
    "a head that is cut off": (b"HTTP/1.1 200 X\r\nA: b\r\n", "answered 200, not as"),
    "too little": (b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", "cannot ask"),
    "too much": (answer_with(200, b"9" * 1001), "cut short, or too long"),
    "a head without end": (b"HTTP/1.1 200 X\r\n" + b"A: b\r\n" * 200 + b"\r\n", "more than 100"),
}))  # fmt: skip
def test_what_is_no_answer_of_ours_is_said_in_one_line(answer, complaint, receive, monkeypatch):
    monkeypatch.setattr(hostenroll, "CLIENT_ANSWER_MAXIMUM", 1000)
    server = receive(answer, closes=True)
    with pytest.raises(hostenroll.NoAnswer, match=complaint) as failed:
        hostenroll.Client(server.url, WATCH_KEY).get("/secret/path")
    assert server.url in str(failed.value) and "\n" not in str(failed.value)
    assert "secret" not in str(failed.value) and len(server.requests) == 1


def test_a_refusal_that_this_version_does_not_know_keeps_its_name(receive):
    with pytest.raises(hostenroll.Problem, match=r"^x: y; z: no$") as refused:
        hostenroll.Client(receive(PROBLEM).url).get("/")
    assert (refused.value.code, refused.value.status) == ("brand-new", 418)
    assert hostenroll.Problem.code == "internal"


@pytest.mark.parametrize("answer", table({
    "nothing": b"", "a byte now and then": b"HTTP/1.1 200 X\r\nA: ",
    "half a body": b"HTTP/1.1 200 X\r\nContent-Length: 99\r\n\r\n",
}))  # fmt: skip
def test_a_server_has_so_much_time_for_all_of_an_answer(answer, receive, monkeypatch):
    over = threading.Event()

    def drip(request):
        peer = server.peers[-1]
        with contextlib.suppress(OSError):
            peer.sendall(answer)
            while answer and not over.wait(0.05):
                peer.sendall(b"x")
        return over.wait(10) and 200

    monkeypatch.setattr(hostenroll, "CLIENT_PATIENCE", 0.1)
    server, started = receive(drip), time.monotonic()
    with pytest.raises(hostenroll.NoAnswer):
        hostenroll.Client(server.url).get("/")
    over.set()
    assert time.monotonic() - started < 1


def test_a_server_that_is_not_there_is_said_to_refuse():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(hostenroll.NoAnswer, match="Connection refused"):
        hostenroll.Client(f"http://127.0.0.1:{port}").get("/")


@pytest.mark.parametrize("trust, complaint", table({
    "the authority": ({"cacert": "one"}, ""),
    "another authority": ({"cacert": "other"}, "certificate"),
    "the pin": ({"pins": ["other", "one"]}, ""), "another pin": ({"pins": ["other"]}, "pinned"),
    "both": ({"cacert": "one", "pins": ["one"]}, ""),
    "the pin, and another authority": ({"cacert": "other", "pins": ["one"]}, "certificate"),
    "the authority, and another pin": ({"cacert": "one", "pins": ["other"]}, "pinned"),
    "nothing that is known here": ({}, "certificate"),
    "the authority, by another name": ({"cacert": "one", "host": "127.0.0.2"}, "mismatch|not val"),
    "the pin, by another name": ({"pins": ["one"], "host": "127.0.0.2"}, ""),
}))  # fmt: skip
def test_a_secret_is_sent_only_to_a_server_that_is_trusted(trust, complaint, receive, tmp_path):
    server = receive(answer_with(200, {}), tls=hostenroll.load_tls(*write_pair(tmp_path))[0])
    if "cacert" in trust:
        (tmp_path / "ca.pem").write_text(certificate_of(trust["cacert"]))
        trust = {**trust, "cacert": str(tmp_path / "ca.pem")}
    trust = {**trust, "pins": [pin_of(name) for name in trust.get("pins", ())]}
    url = server.url.replace("127.0.0.1", trust.pop("host", "127.0.0.1"))
    if url != server.url:
        server = receive(answer_with(200, {}), tls=server.tls)
        server.listener.close()
        server.listener = socket.create_server(("127.0.0.2", 0))
        url = f"https://127.0.0.2:{server.listener.getsockname()[1]}"
        threading.Thread(target=server._accept, daemon=True).start()
    client = hostenroll.Client(url, WATCH_KEY, **trust)
    if not complaint:
        assert client.get("/") == {}
        return
    with pytest.raises(hostenroll.NoAnswer, match=complaint):
        client.get("/")
    assert server.requests == []


@pytest.mark.parametrize("url, environment, proxy", [
    ("https://a.lan", {}, ""), ("https://a.lan", {"https_proxy": "http://p:3128"}, "http://p:3128"),
    ("https://a.lan", {"HTTPS_PROXY": "p:3128"}, "http://p:3128"),
    ("https://a.lan", {"HTTPS_PROXY": "no", "https_proxy": "p"}, "http://p"),
    ("https://a.lan", {"all_proxy": "p"}, "http://p"), ("http://a.lan", {"https_proxy": "p"}, ""),
    ("http://127.0.0.1", {"http_proxy": "p", "all_proxy": "p"}, ""),
    *[("https://a.lan:8443", {"https_proxy": "p", "no_proxy": names}, "") for names in (
        "a.lan", "lan", ".lan", "*.lan", "b.example, A.LAN", "*")],
    *[("https://a.lan", {"https_proxy": "p", "no_proxy": names}, "http://p") for names in (
        "", ",", "b.lan", "an", "x.a.lan", "127.0.0.1")],
])  # fmt: skip
def test_a_proxy_is_taken_from_the_environment_as_curl_does(url, environment, proxy):
    assert hostenroll.proxy_of(url, environment) == proxy


def test_a_server_is_asked_through_a_proxy_that_learns_nothing(receive, tmp_path):
    def tunnel(request):
        with socket.create_connection(("127.0.0.1", server.port)) as far:
            near = proxy.peers[-1]
            near.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            seen.append(near.recv(65536))
            far.sendall(seen[0])
            threading.Thread(
                target=lambda: [near.sendall(d) for d in iter(partial(far.recv, 65536), b"")],
                daemon=True,
            ).start()
            for data in iter(partial(near.recv, 65536), b""):
                far.sendall(data)
                seen.append(data)
        return b""

    seen = []
    server = receive(answer_with(200, {}), tls=hostenroll.load_tls(*write_pair(tmp_path))[0])
    proxy = receive(tunnel, closes=True)
    through = f"http://joe:a%20b@127.0.0.1:{proxy.port}"
    client = hostenroll.Client(server.url, WATCH_KEY, pins=[pin_of("one")], proxy=through)
    assert client.get("/") == {}
    assert proxy.requests[0].target == f"127.0.0.1:{server.port}"
    assert proxy.requests[0].headers["proxy-authorization"] == "Basic am9lOmEgYg=="
    assert (
        WATCH_KEY.encode() not in b"".join(seen)
        and "authorization" not in proxy.requests[0].headers
    )
    refusing = receive(407)
    with pytest.raises(hostenroll.NoAnswer, match="407"):
        hostenroll.Client(server.url, proxy=refusing.url).get("/")
    with pytest.raises(hostenroll.OperatorError, match="must be http"):
        hostenroll.Client(server.url, proxy="socks5://127.0.0.1:1")


@pytest.mark.parametrize("url, is_allowed", [
    ("http://127.0.0.1:1", True), ("http://localhost", True), ("http://[::1]:1", True),
    ("http://127.9.9.9", True), ("https://enroll.lan", True), ("http://enroll.lan", False),
    ("http://10.0.0.1", False), ("http://localhost.evil", False), ("http://127.0.0.1.evil", False),
])  # fmt: skip
def test_secrets_go_in_the_clear_to_this_machine_alone(url, is_allowed):
    hostenroll.Client(url, WATCH_KEY, insecure_http=True)
    if is_allowed:
        hostenroll.Client(url, WATCH_KEY)
        return
    with pytest.raises(hostenroll.OperatorError, match=r"in the clear: .*--insecure-http"):
        hostenroll.Client(url, WATCH_KEY)


# 12. Command line


class Operator:
    """An operator who types commands in one folder, without a process for each."""

    def __init__(self, paths, clock, capsys):
        self.paths, self.clock, self.capsys = paths, clock, capsys
        self.folder = Path(paths[0]).parent
        self.environment = {"HOSTENROLL_DB": paths[0]}

    def __call__(self, *words):
        self.capsys.readouterr()
        try:
            status = hostenroll.main(words, environment=self.environment, clock=self.clock)
        except SystemExit as usage:
            status = usage.code
        out, err = self.capsys.readouterr()
        assert "Traceback" not in err
        return SimpleNamespace(status=status, out=out, err=err)

    def json(self, *words):
        done = self(*words, "--json")
        assert done.status == 0, done.err
        return json.loads(done.out)

    def mint(self, *words):
        return self("mint-token", *words).out.strip()

    def world(self):
        return World(self.paths, self.clock)

    def make_database(self):
        with self.world():
            pass

    def enroll(self, token=None, **facts):
        """Enroll a host, as through the API; its id."""
        with self.world() as world:
            return world.enroll(token or self.mint(), **facts).document["hostId"]


@pytest.fixture
def operator(paths, clock, capsys, monkeypatch):
    monkeypatch.chdir(Path(paths[0]).parent)
    monkeypatch.setattr(os, "nice", lambda niceness: 0)  # it would stay, in this process
    monkeypatch.setattr(hostenroll.log, "propagate", True)  # so would what serve makes of the log
    monkeypatch.setattr(hostenroll.log, "handlers", [*hostenroll.log.handlers])
    return Operator(paths, clock, capsys)


def run_apart(folder, *words, **options):
    """A command as a process of its own; how it ended, as an Operator has it."""
    done = cli(folder, *words, **options)
    return SimpleNamespace(status=done.returncode, out=done.stdout or "", err=done.stderr or "")


def require_one_line(done, status=1, word=""):
    """A failure or refusal: nothing on stdout, and on stderr one line that can be shown."""
    assert (done.status, done.out) == (status, ""), done.err
    lines = done.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("hostenroll: ") and len(lines[0]) < 1100
    assert not hostenroll.UNPRINTABLE.search(lines[0])
    assert word in done.err


COMMAND = {command.name: command for command in hostenroll.COMMANDS}
WITHOUT_JSON = ("serve", "unit", "schema", "openapi", "agent-script")  # texts, for files
RUN_ELSEWHERE = ("serve", "bench", *(() if shutil.which("openssl") else ("make-cert",)))
UNKNOWN = "0ca4f1b28e3d7a95"


def test_a_secret_stands_alone_on_stdout(operator):
    for command, prefix, fact in (
        ("mint-token", "het", "token {} of default: 1 use, until 2027-01-15T09:00:00.000Z\n"),
        ("mint-api-key", "hak", "API key {}: admin of default")):  # fmt: skip
        minted = operator(command)
        assert minted.status == 0
        assert re.fullmatch(rf"{prefix}_[0-9a-f]{{16}}_[A-Za-z0-9_-]{{51}}\n", minted.out)
        assert fact.format(minted.out.split("_")[1]) in minted.err


def test_lists_in_json_have_what_shows_each_item(operator):
    """The test of all examples holds each document to its schema."""
    minted = operator.json("mint-token", "--label", "rack=b4")
    host = operator.enroll(minted["token"])
    token, shown = operator.json("show-token", minted["id"]), operator.json("show-host", host)
    assert (token["labels"], token["hosts"]) == ({"rack": "b4"}, [host])
    assert operator.json("list-tokens") == {"tokens": [token], "nextCursor": None}
    assert operator.json("list-hosts") == {"hosts": [shown], "nextCursor": None}
    edited = operator.json("edit-host", host, "--name", "K\u00fcche")
    assert edited == {**shown, "name": "K\u00fcche"}
    assert operator.json("reenroll-host", host)["hostId"] == host
    key = operator.json("mint-api-key", "--role", "viewer")
    listed = operator.json("list-api-keys")["apiKeys"]
    assert [{**one, "apiKey": key["apiKey"]} for one in listed] == [key]


def test_tables_are_aligned_and_show_the_same(operator):
    headings = ["ID", "NAME", "STATUS", "LAST", "SEEN", "ADDRESS", "LABELS", "HOSTNAME", "ORG"]
    operator.make_database()
    assert operator("list-hosts").out.split() == headings
    assert operator("list-hosts").err.startswith("no host yet: mint-token ")
    assert operator("list-hosts", "--q", "web").err == "no such host\n"
    assert operator("list-tokens", "--state", "used").err == "no such token\n"
    assert operator("list-hosts", "--json").err == ""
    for n in range(3):
        operator("mint-token", "--description", "x" * n * 9, "--max-uses", str(10**n))
    assert operator("list-tokens", "--limit", "1").out.count("\n") == 2
    first, *lines = operator("list-tokens").out.rstrip("\n").split("\n")
    at = first.index("STATE")
    assert [line[at : at + 6] for line in lines] == ["valid "] * 3
    shown = operator("show-token", lines[0].split()[0]).out
    assert re.search(r"^state: +valid$", shown, re.MULTILINE)


def test_hosts_are_edited_and_found_by_what_they_are(operator):
    host = operator.enroll(agentVersion="0.2.0")
    assert "\nagent version:     0.2.0\n" in operator("show-host", host).out
    for words, labels in (
        ("--label x=y --label c=", {"x": "y", "c": ""}), ("--label c- --label z-", {"x": "y"}),
        ("--set-labels --label q=1", {"q": "1"}),
        ("--label a=b- --label q-", {"a": "b-"}), ("--label a=b --label c=", {"a": "b", "c": ""}),
    ):  # fmt: skip
        assert operator.json("edit-host", host, *words.split())["labels"] == labels
    for words, count in (
        ("--label a=b", 1), ("--label a=x", 0), ("--q WEB", 1), ("--q xx", 0),
        ("--label a=b --label c=", 1), ("--label a=b --label c=d", 0), ("--status online", 0),
        ("--org default", 1), ("--limit 1", 1),
    ):  # fmt: skip
        assert len(operator.json("list-hosts", *words.split())["hosts"]) == count
    assert operator.json("edit-host", host, "--no-labels")["labels"] == {}
    for typed, shown in (("5m", 300), ("none", None), ("1d", 86400)):
        assert operator.json("edit-host", host, "--interval", typed)["intervalSeconds"] == shown
    assert "\ninterval seconds:  86400\n" in operator("show-host", host).out
    assert operator.json("edit-host", host, "--name", "none")["intervalSeconds"] == 86400
    for words in (("mint-token",), ("reenroll-host", host)):
        for typed, shown in ((["--interval", "90s"], 90), ([], None)):
            token = operator.json(*words, *typed)
            assert token["intervalSeconds"] == shown
            assert operator("revoke-token", token["id"]).status == 0
    assert [operator("delete-host", host).status for _ in range(2)] == [0, 3]
    assert operator.json("list-tokens", "--state", "valid")["tokens"] == []


def test_an_act_on_many_is_asked_about_and_done_to_those_that_filters_find(operator):
    token = operator.mint("--max-uses", "9", "--label", "pool=web")
    web = [operator.enroll(token, hostname=f"web-{n}") for n in range(3)]
    other = operator.enroll()
    refused = operator("revoke-host", "--where", "pool=web")
    require_one_line(refused, 2, "hosts to revoke: 3; nothing is done: --dry-run shows them, --yes")
    dry = operator("delete-host", "--where", "pool=web", "--dry-run")
    found = sorted(web, reverse=True)
    assert (dry.status, dry.out.split(), dry.err) == (0, found, "hosts to delete: 3\n")
    assert operator.json("delete-host", other, "--dry-run") == {"hosts": [other]}
    revoked = operator("revoke-host", "--where=pool=web", "--yes", "--reason", "sold")
    assert (revoked.status, revoked.err) == (0, "hosts to revoke: 3; done: 3\n")
    assert '"reason": "sold"' in operator("show-audit", "--limit", "1", "--json").out
    restored = operator.json("restore-host", "--token", token.split("_")[1], "--yes")
    assert restored == {"done": 3, "notFound": []}
    edited = operator.json("edit-host", *web[:2], "--label", "pool-", "--label", "b=1", "--yes")
    assert edited["done"] == 2
    deleted = operator("delete-host", "--yes", web[0], UNKNOWN, "bogus\x1b")
    assert deleted.status == 3 and f"no host {UNKNOWN}\n" in deleted.err
    assert "done: 1\n" in deleted.err and "\x1b" not in deleted.err
    assert operator("delete-host", "--where", "b=1", "--status", "pending", "--yes").status == 0
    left = {host["id"] for host in operator.json("list-hosts")["hosts"]}
    assert left == {web[2], other}
    assert operator.json("delete-host", "--org", "default", "--yes")["done"] == 2


def test_on_a_terminal_a_person_says_whether_to_go_on(operator, monkeypatch):
    token = operator.mint("--max-uses", "2")
    hosts = [operator.enroll(token) for _ in range(2)]
    for typed, status in (("\n", 2), ("n\n", 2), ("", 2), ("Yes\n", 0)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        done = operator("delete-host", *hosts)
        assert done.status == status and done.err.startswith("hosts to delete: 2; go on? [y/N] ")
        assert ("done: 2" in done.err) == (status == 0)


def test_what_is_done_before_a_refusal_is_told(operator, monkeypatch):
    monkeypatch.setattr(hostenroll, "ACTED_AT_ONCE", 2)
    full = operator.enroll(operator.mint(*(f"--label=k{n}=" for n in range(32))))
    hosts = [operator.enroll(), full, operator.enroll()]
    refused = operator("edit-host", *hosts, "--label", "one=more", "--yes")
    assert refused.status == 3 and full in refused.err
    assert refused.err.startswith("hosts to edit: 3; done: 1\n")


def test_a_token_is_revoked_with_its_hosts(operator):
    token = operator.mint()
    host = operator.enroll(token)
    assert operator("revoke-token", token.split("_")[1], "--with-hosts").status == 0
    assert operator.json("show-host", host)["status"] == "revoked"
    assert operator.json("list-hosts", "--token", token.split("_")[1])["hosts"][0]["id"] == host


WAYS_BACK = {  # how a host's last token was minted, what happened since, and its uses left
    "a reusable token": ("--max-uses 9", "", "8 more uses"),
    "one use left": ("--max-uses 2", "", "1 more use"),
    "a token that is used up": ("", "", ""),
    "a token that has expired": ("--max-uses 9 --ttl 1m", "time goes on", ""),
    "a token that was revoked": ("--max-uses 9", "revoke-token", ""),
    "a token of its own since": ("--max-uses 9", "reenroll-host", ""),
    "one that was not used": ("--max-uses 9", "an unused one", "8 more uses"),
}


@pytest.mark.parametrize("words, since, uses", table(WAYS_BACK))
def test_who_deletes_a_host_is_told_of_the_token_that_lets_it_in_again(
    words, since, uses, operator
):
    token = operator.json("mint-token", *words.split())
    host = operator.enroll(token["token"])
    if since == "time goes on":
        operator.clock.advance(61)
    elif since == "revoke-token":
        operator("revoke-token", token["id"])
    elif since:
        bound = operator.mint() if since == "an unused one" else operator("reenroll-host", host).out
        assert since == "an unused one" or operator.enroll(bound.strip()) == host
    deleted = operator("delete-host", host)
    told = f"host {host} is deleted; the machine must enroll again\n"
    if uses:
        told += f"it came in by token {token['id']}, which is good for {uses}: it can come back; "
        told += f"revoke-host keeps it out, and so does revoke-token {token['id']}\n"
    assert (deleted.status, deleted.out, deleted.err) == (0, "", told)


def test_a_deleted_host_in_json_is_its_id_alone(operator):
    host = operator.enroll(operator.mint("--max-uses", "2"))
    deleted = operator("delete-host", host, "--json")
    assert (json.loads(deleted.out), deleted.err) == ({"id": host}, "")


def test_how_durations_are_written(operator):
    """And STATUSES has texts that are none."""
    for text, seconds in {
        "60": 60, "60s": 60, "90s": 90, "30m": 1800, "24h": 86400, "7d": 604800, "30d": 2592000,
        "001h": 3600,
    }.items():  # fmt: skip
        expires = hostenroll.rfc3339(operator.clock.ms + seconds * 1000)
        assert operator.json("mint-token", f"--ttl={text}")["expiresAt"] == expires


STATUSES = [  # the exit status, what the line has, the words typed
    (2, "did you mean list-hosts?", "lst-hosts"),
    (2, "did you mean mint-token or mint-api-key?", "mint"),
    (2, "no command xyzzy (see: hostenroll --help)", "xyzzy"),
    (2, "takes no option --nope (see: hostenroll mint-token --help)", "mint-token --nope"),
    (2, "did you mean --max-uses?", "mint-token --max 3"),
    (2, "takes no argument berlin", "list-orgs berlin"),
    (2, "'soon' is not a duration", "edit-host 0ca4f1b28e3d7a95 --interval soon"),
    (2, "'none' is not a duration", "mint-token --interval none"),
    (2, "2d is out of bounds: 1 s to 24 h", "mint-token --interval 2d"),
    (2, "needs ID (see: hostenroll show-host --help)", "show-host"),
    (2, "not one of valid, used, expired, revoked", "list-tokens --state dead"),
    (2, "--label: ", "mint-token --label x"),
    *((2, f"--{words.split('--')[1]}: -- is no value", f"{words}=--") for words in (
        "mint-token --label", "mint-token --db", "list-tokens --limit", "list-tokens --state",
        "verify-audit --head", "serve --port")),
    *((2, f"--{name}: ", f"serve --port 0 --{name}=")
      for name in ("db", "key-file", "tls-cert", "tls-key", "host")),
    (1, "no folder", "mint-token --db nowhere/a.db"),
    *((1, "", f"mint-token --db {path}") for path in ("/dev/null/a.db", ".", "./")),
    (1, "no folder", ("list-orgs", "--db", "x\x1b[31m\ny/z")),
    (1, "no folder", ("list-orgs", "--db", f"{'x' * 200}/" * 100 + "y")),
    (2, "--label: one key comes twice (see: hostenroll mint-token --help)",
     "mint-token --label a=b --label a=c"),
    (2, "--label: one key comes twice", f"edit-host {UNKNOWN} --label a=b --label a-"),
    (2, "--label: ", f"edit-host {UNKNOWN} --set-labels --label a-"),
    (2, "--label: ", f"edit-host {UNKNOWN} --label a"),
    (2, "are for one host", f"edit-host {UNKNOWN} {UNKNOWN[::-1]} --name x --yes"),
    (2, "are for one host", "edit-host --org default --no-labels --yes"),
    (2, "are for one host", "edit-host --org default --set-labels --label a=b --yes"),
    *((2, "needs ID, or else filters", f"{name}{words}")
      for name in ("delete-host", "revoke-host", "restore-host", "edit-host")
      for words in ("", " --yes", f" {UNKNOWN} --status missing")),
    (3, "--where: ", "delete-host --where pool --yes"),
    (3, "--org: ", ("delete-host", "--org=", "--yes")),
    (3, "--token: ", ("delete-host", "--token=", "--yes")),
    (3, "This is a secret", f"delete-host {UNKNOWN} het_{UNKNOWN}_x --yes"),
    (3, "--name: must be visible at both ends", ("edit-host", UNKNOWN, "--name", "\u3164")),
    (2, "--label: not allowed with --no-labels (see: hostenroll edit-host ",
     f"edit-host {UNKNOWN} --no-labels --label a=b"),
    (2, "--all-orgs: not allowed with --org (see: hostenroll mint-api-key ",
     "mint-api-key --org berlin --all-orgs"),
    (2, "options come after the command: hostenroll list-hosts --json ", "--json list-hosts"),
    (2, "options come after the command: hostenroll list-hosts --db ", "--db x.db list-hosts"),
    (2, "options come after the command: hostenroll COMMAND --db ", "--db=x.db"),
    (2, "--host: '\\udcff' is not an address or a name", "serve --port 0 --host \udcff"),
    (2, "--host: 'a\\nb' is not an address or a name", ("serve", "--port=0", "--host", "a\nb")),
    (2, "--tls-cert and --tls-key go together", "serve --tls-cert x"),
    (2, "--tls-cert and --tls-key go together", "serve --tls-key x"),
    (2, "--tls-pin-cert goes with", "serve --tls-pin-cert x"),
    (2, "--tls-pin-cert goes with", "serve --tls-pin-cert x --public-url http://a"),
    (2, "--tls-pin-cert goes with",
     "serve --tls-pin-cert x --public-url https://a --tls-cert x --tls-key x"),
    (2, "--pin always go with", "serve --pin always --public-url https://a"),
    (2, "--pin always go with", f"serve --next-pin {PINS[0]}"),
    (2, "--pin never pins no --next-pin",
     f"serve --tls-cert a --tls-key b --pin never --next-pin {PINS[0]}"),
    (2, "--pin: 'no' is not one of auto, always, never", "serve --pin no"),
    (2, "--days: 0 is out of bounds: 1 to 36500", "make-cert --name a --days 0"),
    (2, "--port: 65536 is out of bounds", "serve --port 65536"),
    (2, "not one of admin, viewer", "mint-api-key --role root"),
    (2, "out of bounds", "serve --heartbeat-interval 0s"),
    (2, "--limit: 0 is out of bounds", "list-hosts --limit 0"),
    (2, "--head: '' is not", "verify-audit --head="),
    *((2, "is not a duration", ("mint-token", f"--ttl={text}")) for text in (
        "", "h", "1w", "1.5h", "-1h", "+1h", "1 h", "1H", "1h30m", "1_0m", "\u0661h", "1e2",
        "9" * 30, "60s\n")),
    (3, "--ttl", "mint-token --ttl 59s"),
    (3, "--max-uses", "mint-token --max-uses 0"),
    (3, "--hostname", ("mint-token", "--hostname", "a b")),
    (3, "--description", "mint-token --description \a"),
    (3, "--description", "mint-api-key --description \a"),
    (3, "--label: ", "list-hosts --label rack"),
    (3, "--org", "mint-token --org="),
    *((3, "--org", f"{command} --org nope")
      for command in ("mint-token", "mint-api-key", "list-hosts", "list-tokens", "show-audit")),
    (3, "conflict", "add-org default"),
    *((3, f"): {words.split()[-1]}: must not ", f"{words} \udcff") for words in (
        "list-hosts --q", "show-audit --subject", "show-audit --code", "mint-token --hostname",
        "mint-api-key --description", f"edit-host {UNKNOWN} --name")),
    (3, "): NAME: must be ", ("add-org", "a b")),
    *((3, "): --org: must be ", (command, "--org", "a b"))
      for command in ("mint-token", "list-tokens", "list-hosts", "show-audit")),
    *((3, f"(not-found): There is no {words.split()[0].split('-', 1)[1].replace('api-', 'API ')}",
       words.format(UNKNOWN)) for words in (
        "show-token {}", "revoke-token {}", "show-host {}", "edit-host {} --name x",
        "revoke-host {}", "restore-host {}", "delete-host {}", "reenroll-host {}",
        "revoke-api-key {}")),
    *((3, f" with this id. See: list-{name.split('-', 1)[1]}s", f"{name} web-1")
      for name in ("show-host", "delete-host", "show-token", "revoke-api-key")),
    *((2, words.split()[0], f"bench {words}") for words in (
        "--hosts 99", "--hosts 10000001", "--hosts -1", "--seconds 0", "--seconds 601",
        "--connections 0", "--connections 1025", "--close", "--rate 1", "--db hostenroll.db")),
    *((1, "is no name for a server", ("make-cert", f"--name={name}")) for name in (
        "", "a b", "a,DNS:evil", "a/O=x", "-a", ".a", "a.", "a\n", "a..b", "\u00fc.lan", "a_b",
        "x" * 300, "1.2.3.4/24", "fe80::1%eth0", "fe80::1%a,DNS:evil", "https://enroll.lan", "a:1",
        "*", "a*b", "a.*")),
    (1, "", "make-cert --name a --tls-cert x --tls-key x"),
]  # fmt: skip
PROCESS_ENDS = [  # of commands that are processes
    (3, "--max-uses", "mint-token --max-uses 0"),
    (1, "cannot listen.*choose another with --host", "serve --port 0 --host 203.0.113.1"),
    (1, "cannot listen", "serve --port 0 --host a..b"),
    (1, "nowhere", "serve --port 0 --tls-cert nowhere --tls-key tls.key"),
    # Without a terminal, the question for a password would be asked on stderr.
    (1, "password", "serve --port 0 --tls-cert tls.crt --tls-key sealed.key"),
]  # fmt: skip


def by_words(rows):
    """Rows that have no name but the words typed, which stand last."""
    return [pytest.param(*row, id=ascii(row[-1])[:60]) for row in rows]


@pytest.mark.parametrize("status, word, words", by_words(STATUSES))
def test_what_is_refused_is_one_line_and_changes_nothing(status, word, words, operator):
    if status == 3:
        operator.make_database()
    require_one_line(operator(*(words.split() if type(words) is str else words)), status, word)
    made = {f"hostenroll.{name}" for name in ("db", "db.gate", "db.lock", "key")}
    assert set(os.listdir(operator.folder)) <= made
    if os.path.exists(operator.paths[0]):
        assert sql(operator.paths[0], "SELECT * FROM token") == []


@pytest.mark.parametrize("status, pattern, words", by_words(PROCESS_ENDS))
def test_a_process_ends_with_the_status_of_its_command(status, pattern, words, tmp_path):
    write_pair(tmp_path)
    (tmp_path / "sealed.key").write_text(SEALED_KEY)
    alone = {"stdin": subprocess.DEVNULL, "start_new_session": True}
    done = run_apart(tmp_path, *words.split(), **alone)
    require_one_line(done, status)
    assert re.search(pattern, done.err)


MISTYPED = (
    "mint-token --ttl", "list-tokens --state", "serve --public-url", "serve --port",
    "verify-audit --head", "mint-api-key --role", "mint-token --db", "serve --trusted-proxy",
    "show-token", "revoke-token", "show-host", "revoke-api-key", "list-hosts", "",
)  # fmt: skip


def test_a_secret_that_is_typed_in_the_place_of_something_else_is_not_shown(operator):
    for secret in (operator.mint(), operator("mint-api-key").out.strip()):
        for words in MISTYPED:
            typed = f"{secret}/x" if "--" in words else secret
            done = operator(*words.split(), typed)
            statuses = (1, 2) if "--" in words else (2,) if words in ("list-hosts", "") else (3,)
            assert done.status in statuses and secret[21:] not in done.err, words
            assert "--" not in words or secret[:20] in done.err


def test_the_overview_has_every_command_in_its_group(operator):
    overview = operator("--help").out
    summaries = re.findall(r"^  ([a-z]\S+) +(.+)$", overview, re.MULTILINE)
    assert summaries == [(command.name, command.summary) for command in hostenroll.COMMANDS]
    groups = re.findall("^([a-z].*):$", overview, re.MULTILINE)
    assert groups[:-1] == list(hostenroll.GROUPS)  # the last is "options", in argparse's words
    assert max(map(len, overview.splitlines())) <= 80
    assert overview.endswith("\nexit status: 0 done, 1 failed, 2 usage, 3 refused\n")
    done = run_apart(operator.folder, program=[sys.executable, str(MODULE)])
    assert (done.status, done.out) == (2, "")  # without a command
    assert done.err.split("\n", 1)[1] == overview.split("\n", 1)[1]


@pytest.mark.parametrize("name", COMMAND)
def test_the_help_of_every_command_has_an_example_and_fits_80_columns(name, operator, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = operator(name, "--help")
    assert shown.status == 0 and shown.out.startswith(f"usage: hostenroll {name} [options]")
    assert f"\nexample: hostenroll {COMMAND[name].example}\n" in shown.out
    assert COMMAND[name].example.split()[0] == name
    assert "exit status: 0 done, 1 failed, 2 usage, 3 refused" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80


def test_every_example_works_and_every_command_that_prints_data_prints_json_too(operator):
    documents, an_id = {}, {
        "token": lambda: operator.mint().split("_")[1], "host": operator.enroll,
        "api-key": lambda: operator("mint-api-key").out.split("_")[1],
    }  # fmt: skip
    for (name, command), form in itertools.product(COMMAND.items(), ((), ("--json",))):
        words = command.example.split()
        if not form:
            assert hostenroll.parse_arguments(words, {}).command is command
        if name in RUN_ELSEWHERE or (form and name in WITHOUT_JSON):
            continue
        if command.operands == ["ID"]:
            words[1] = an_id[name.partition("-")[2]]()
        elif name == "retire-signing-key":
            keys = operator.json("list-signing-keys")["signingKeys"]
            words[1:] = [[k["kid"] for k in keys if k["state"] == "verifies"][-1], "--force"]
        elif name == "rotate-signing-key":
            operator.clock.advance(1)
        elif name == "add-org":
            words[1] += "" if form else "-2"
        elif name == "mint-api-key":
            operator("add-org", "berlin")
            operator("mint-api-key", "--all-orgs")
        elif name == "backup":
            words[1] = "copy"
        elif name == "make-cert" and form:
            words += ["--tls-cert", "other.crt", "--tls-key", "other.key"]
        done = operator(*words, *form)
        assert done.status == 0 and (not form or done.err == ""), (words, done.err)
        documents[name] = document = json.loads(done.out) if form else None
        if form and name in OPERATION:
            row = OPERATION[name]
            assert row.path or row.writes != bool(row.list_of)
            for item in document[row.list_of] if row.list_of else [document]:
                row.answer.schema.check(item)
    of = documents.__getitem__
    assert [of(f"{verb}-host")["status"] for verb in ("revoke", "restore")] == [
        "revoked",
        "pending",
    ]
    assert set(of("verify-audit")) == {"head", "first", "last", "unverified"}
    copies = [str(operator.folder / f"copy/hostenroll.{name}") for name in ("db", "key")]
    assert of("backup") == dict(zip(("database", "keyFile"), copies))
    if "make-cert" in documents:
        pair = of("make-cert")["certificate"], of("make-cert")["key"]
        [certificate] = hostenroll.load_tls(*pair)[1]
        assert of("make-cert")["pin"] == hostenroll.read_certificate(certificate).pin


def test_a_setting_that_is_none_is_pointed_out(operator):
    """To a command; the test of JSON logs shows it of a server."""
    names = ("HOSTENROLL_PROT", "HOSTENROLL_X\x1b", "HOSTENROLL_PORT")
    operator.environment.update(dict.fromkeys(names, "1"))
    operator.make_database()
    shown = operator("list-orgs").err.splitlines()
    assert [line.split()[1] for line in shown] == ["HOSTENROLL_PROT", "HOSTENROLL_X?"]
    assert all(line.endswith(" in the environment sets nothing") for line in shown)


def test_the_version_comes_with_the_digest_of_the_file(tmp_path):
    shutil.copy(MODULE, tmp_path / "hostenroll.py")
    shown = cli(tmp_path, "--version", program=[sys.executable, "hostenroll.py"])
    digest = hashlib.sha256(MODULE.read_bytes()).hexdigest()
    assert shown.stdout == f"hostenroll {hostenroll.__version__}\nsha256 {digest}\n"
    assert cli(tmp_path, "--version").returncode == 0  # also of compiled code


def test_organizations_are_added_once_and_by_slugs(operator):
    assert [operator("add-org", "berlin").status for _ in range(2)] == [0, 3]
    listed = [line.split()[0] for line in operator("list-orgs").out.splitlines()]
    assert listed == ["ID", "berlin", "default"]
    assert operator.json("mint-token", "--org", "berlin")["organizationId"] == "berlin"
    for org, count in (("berlin", 1), ("default", 0)):
        assert len(operator.json("list-tokens", "--org", org)["tokens"]) == count
    for words, owner in (("", "default"), ("--org berlin", "berlin"), ("--all-orgs", None)):
        assert operator.json("mint-api-key", *words.split())["organizationId"] == owner
    listed = [line.split()[3] for line in operator("list-api-keys").out.splitlines()]
    assert sorted(listed) == ["ORG", "all", "berlin", "default"]


STARTED = {  # the words before a command
    "a script": ["PYTHON", "hostenroll.py"],
    "a script elsewhere": ["PYTHON", "../a b/hostenroll.py"],
    "a module": ["PYTHON", "-m", "hostenroll"],
    "a command": ["hostenroll"],
    "a command elsewhere": ["{folder}/bin/hostenroll"],
}


@pytest.mark.parametrize("program", sample(STARTED, "a script elsewhere"))
def test_the_next_command_is_written_as_this_one_was_started(program, tmp_path):
    """`hostenroll.py` alone would fail for most of them."""
    folder = tmp_path / "a b"
    (folder / "bin").mkdir(parents=True)
    shutil.copy(MODULE, folder / "hostenroll.py")
    python = f"exec {shlex.quote(sys.executable)} -c"
    entry = "import sys; sys.argv[0] = '$0'; import hostenroll; sys.exit(hostenroll.main())"
    (folder / "bin/hostenroll").write_text(f'#!/bin/sh\n{python} "{entry}" "$@"\n')
    (folder / "bin/hostenroll").chmod(0o755)
    path = "" if "{folder}" in program[0] else f"{folder}/bin:"
    environment = {"PATH": f"{path}{os.environ['PATH']}", "PYTHONPATH": str(folder)}
    name = os.path.basename(sys.executable)
    python = name if shutil.which(name) == sys.executable else sys.executable
    words = [word.format(folder=folder).replace("PYTHON", sys.executable) for word in program]
    shown = shlex.join(python if word == sys.executable else word for word in words)
    refused = run_apart(folder, "xyzzy", program=words, env=environment)
    assert refused.err == f"hostenroll: there is no command xyzzy (see: {shown} --help)\n"
    options = {"how": "process", "api_key": False, "program": words, "env": environment}
    with start_server(folder, "--db", "a b.db", **options) as server:
        assert server.terminate() == 0
    assert server.log[1:] == [f"next, in another terminal: {shown} mint-token --db 'a b.db'\n"]


# The audit log's actor: who really ran it.

ACTORS = {  # the user id, the environment, the actor
    "a user": (7, {}, "cli:alice"),
    "a user who lies": (7, {"LOGNAME": "bob", "USER": "bob", "SUDO_UID": "8"}, "cli:alice"),
    "root": (0, {}, "cli:root"),
    "root by sudo": (0, {"SUDO_UID": "7", "SUDO_USER": "bob"}, "cli:root (sudo: alice)"),
    "root by a strange sudo": (0, {"SUDO_UID": "7x"}, "cli:root"),
    "root by sudo of a lost user": (0, {"SUDO_UID": "99"}, "cli:root (sudo: 99)"),
    "a user without a name": (99, {}, "cli:99"),
    "a name that would break the log": (8, {}, "cli:eve??[31m?ERROR forged"),
}
ACCOUNTS = {0: "root", 7: "alice", 8: "eve\u202e\x1b[31m\nERROR forged"}


@pytest.mark.parametrize("uid, environment, actor", table(ACTORS))
def test_the_actor_is_the_user_who_ran_the_command(uid, environment, actor, operator, monkeypatch):
    """LOGNAME, which anyone can set, was taken for the user."""
    accounts = {uid: SimpleNamespace(pw_name=name) for uid, name in ACCOUNTS.items()}
    monkeypatch.setattr(os, "getuid", lambda: uid)
    monkeypatch.setattr(hostenroll.pwd, "getpwuid", accounts.__getitem__)
    operator.environment.update(environment)
    operator("mint-token")
    monkeypatch.undo()
    [event] = operator.json("show-audit")["events"]
    assert event["actor"] == actor


def test_the_environment_sets_files_and_the_options_of_serve(tmp_path):
    environment = {
        "HOSTENROLL_DB": str(tmp_path / "a.db"), "HOSTENROLL_KEY_FILE": str(tmp_path / "b.key"),
        "HOSTENROLL_HEARTBEAT_INTERVAL": "7s", "HOSTENROLL_CREDENTIAL_TTL": "1h",
        "HOSTENROLL_PORT": "1",
    }  # fmt: skip
    token = cli(tmp_path, "mint-token", env=environment).stdout.strip()
    files = {path.name for path in tmp_path.iterdir()}
    assert {"a.db", "b.key"} <= files and "hostenroll.key" not in files
    options = {"how": "process", "api_key": False, "env": environment}
    with start_server(tmp_path, **options) as server:  # which has --port 0
        enrolled = server.enroll(token).document
    assert enrolled["heartbeatIntervalSeconds"] == 7 and enrolled["credentialExpiresAt"] is not None
    assert cli(tmp_path, "add-org", "berlin", "--db", "other.db").returncode == 0
    assert (tmp_path / "other.db").exists() and (tmp_path / "hostenroll.key").exists()


PARSED = [  # settings, an option of serve, what it is then, words
    *((f"ACCESS_LOG={text}", "access_log", is_on, "") for text, is_on in {
        "1": True, "yes": True, "true": True, "0": False, "no": False, "false": False, "": False,
    }.items()),
    *((f"ACCESS_LOG={text}", "access_log", True, "--access-log --log-format json")
      for text in ("1", "yes", "true", "0", "no", "false", "")),
    ("HEARTBEAT_INTERVAL=7s", "heartbeat_interval", 9, "--heartbeat-interval 9s"),
    *((f"PUBLIC_URL={text}", "public_url", text.rstrip("/"), "") for text in (
        "https://enroll.lan", "https://enroll.lan/", "https://enroll.lan:8443/fleet/",
        "https://[2001:db8::1]:8443", "http://10.0.0.7:8080")),
    *((f"TRUSTED_PROXY={text}", "trusted_proxy", list(map(ipaddress.ip_network, networks)), words)
      for text, networks, words in (
        ("", [], ""),
        ("", ["10.0.0.0/8"], "--trusted-proxy 10.0.0.0/8"),
        ("", ["192.0.2.1/32"], "--trusted-proxy 192.0.2.1"),
        ("", ["2001:db8::/32"], "--trusted-proxy=2001:db8::/32"),
        ("", ["10.0.0.0/8", "::1/128", "1.1.1.1/32"],
         "--trusted-proxy 10.0.0.0/8 --trusted-proxy ::1 --trusted-proxy=1.1.1.1"),
        ("", ["10.0.0.0/8", "::1/128"], "--trusted-proxy 10.0.0.0/8,::1"),
        ("10.0.0.0/8, ::1 1.1.1.1", ["10.0.0.0/8", "::1/128", "1.1.1.1/32"], ""),
        ("10.0.0.0/8", ["::1/128", "1.1.1.1/32"], "--trusted-proxy ::1 --trusted-proxy 1.1.1.1"),
      )),
]  # fmt: skip
BAD_SETTINGS = [  # a setting, what the line has: by where it came from, words
    ("PORT=x", "hostenroll: HOSTENROLL_PORT: 'x' is not a number (", ()),
    ("PORT=x", "hostenroll: --port: 'y' is not a number (", ("--port", "y")),
    ("PORT=x", "hostenroll: --port: 'y' is not a number (", ("--port=y",)),
    ("PORT=x", "hostenroll: --audit-keep: 'z' is not a duration",
     ("--port", "0", "--audit-keep", "z")),
    *((setting, "serve --help)", ()) for setting in (
        "TRUSTED_PROXY=10.0.0.0/8, proxy.lan", "LOG_FORMAT=xml", "PUBLIC_URL=enroll.lan",
        "ACCESS_LOG=perhaps", "PORT=x", "AUDIT_KEEP=1s")),
    *(("PORT=", "is not like https://", (f"--public-url={text}",)) for text in (
        "", "enroll.lan", "https://", "https:///x", "ftp://enroll.lan", "https://a b",
        "https://a'b", "https://a?b", "https://a#b", "https://user:secret@a", "https://a;id",
        "https://$(id)", "https://a/`id`", "https://a\n", "https://a/x y", "https://\u00fc.lan",
        "//enroll.lan", "https://enroll.lan:port", "https://enroll.lan:99999", "https://]",
        "https://:8443", "https://a:1:2", "https://[::1", "https://-")),
    *(("PORT=", "network", (f"--trusted-proxy={text}",)) for text in (
        "", " ", ",", "proxy.lan", "10.0.0.1/8", "10.0.0.0/33", "*", "all")),
]  # fmt: skip


def parsed(command, setting, words=()):
    name, _, text = setting.partition("=")
    return hostenroll.parse_arguments([command, *words], {f"HOSTENROLL_{name}": text})


@pytest.mark.parametrize("setting, option, value, words", by_words(PARSED))
def test_what_settings_and_options_stand_for(setting, option, value, words):
    assert getattr(parsed("serve", setting, words.split()), option) == value


@pytest.mark.parametrize("setting, complaint, words", by_words(BAD_SETTINGS))
def test_a_bad_setting_is_a_mistake_in_usage(setting, complaint, words, capsys):
    with pytest.raises(SystemExit) as usage:
        parsed("serve", setting, words)
    line = capsys.readouterr().err
    assert (usage.value.code, line.count("\n")) == (2, 1) and complaint in line
    assert parsed("mint-token", setting)  # not its own


def begin_service(operator):
    """As a server does that begins to listen."""
    with operator.world() as world:
        place = Call(hostenroll.START_SERVICE, values={"url": "http://127.0.0.1:8080"})
        world.registry.perform(place, operator.clock.ms)


def test_where_no_server_runs_any_more_that_is_pointed_out(operator):
    """The statuses are those of its last day, and a join command leads nowhere."""
    commands = ("list-hosts",), ("mint-token",)
    assert not any("no server" in operator(*command).err for command in commands)
    begin_service(operator)
    operator.clock.advance(hostenroll.ALIVE_GRACE)
    assert not any("no server" in operator(*command).err for command in commands)
    operator.clock.advance(300)
    for command in commands:
        assert "no server is running (the last one was 5 min ago)" in operator(*command).err
        assert operator(*command, "--json").err == ""


# The files.


@pytest.fixture
def searcher(operator, monkeypatch):
    """An operator who names no database, where the service would have its own in a folder lib."""
    operator.environment.clear()
    operator.service = operator.folder / "lib" / "hostenroll.db"
    monkeypatch.setattr(hostenroll, "SERVICE_DATABASE", str(operator.service))
    return operator


def make_service(searcher):
    searcher.service.parent.mkdir()
    assert searcher("add-org", "of-service", "--db", str(searcher.service)).status == 0


def is_using(done, database, also=""):
    return (done.status, done.err) == (0, f"hostenroll: using {database}{also}\n")


def test_a_command_takes_the_database_that_is_named_else_the_one_here_else_the_services(searcher):
    make_service(searcher)
    (searcher.folder / "far").mkdir()
    searcher("add-org", "here", "--db", "hostenroll.db")
    searcher("add-org", "named", "--db", "far/a.db")

    def found(*words):
        orgs = {one["id"] for one in searcher.json("list-orgs", *words)["organizations"]}
        return orgs - {"default", "more"}

    assert [found(), found("--db", "far/a.db")] == [{"here"}, {"named"}]
    searcher.environment["HOSTENROLL_DB"] = "far/a.db"
    assert [found(), found("--db", "hostenroll.db")] == [{"named"}, {"here"}]
    searcher.environment["HOSTENROLL_DB"] = ""  # as where it is not set
    assert searcher("list-orgs").err == ""
    for path in searcher.folder.glob("hostenroll.*"):
        path.unlink()
    (searcher.folder / "hostenroll.db").touch()  # an empty file counts as missing
    before = sorted(os.listdir(searcher.folder))
    for words in ("list-orgs", "list-orgs --json", "check", "backup lib/copy", "add-org more"):
        done = searcher(*words.split())
        first, _, rest = done.err.partition("\n")
        assert (done.status, first) == (0, f"hostenroll: using {searcher.service}"), words
        assert rest.count("using") == 0
    assert found() == {"of-service"} and sorted(os.listdir(searcher.folder)) == before
    minted = searcher("mint-token")
    assert minted.status == 0 and minted.err.startswith(f"hostenroll: using {searcher.service}\n")
    assert hostenroll.find_database("serve", None) == "hostenroll.db"
    searcher("mint-token", "--key-file", "x.key")  # it is named: not that beside
    assert sorted(os.listdir(searcher.folder)) == before


def test_a_command_that_makes_no_database_says_where_it_looked_and_leaves_nothing(searcher):
    with_database = [one for one in COMMAND.values() if one.shared[-2:] == hostenroll.STORE_OPTIONS]
    makers = {"serve", "mint-token", "add-org", "mint-api-key"}
    assert len(with_database) > 20 and makers <= {one.name for one in with_database}
    missing = str(searcher.folder / "missing.db")
    for command in with_database:
        words = command.example.replace("/var/backups/hostenroll", "copy").split()
        if command.name not in makers:
            done = searcher(*words)
            require_one_line(done, 1, str(searcher.folder / "hostenroll.db"))
            assert str(searcher.service) in done.err and "--db" in done.err
            require_one_line(searcher(*words, "--db", missing), 1, f"no database {missing}: ")
    assert os.listdir(searcher.folder) == []
    for name in makers - {"serve"}:
        assert searcher(*COMMAND[name].example.replace("--org berlin", "").split()).status == 0
        assert (searcher.folder / "hostenroll.db").exists()
        for path in searcher.folder.iterdir():
            path.unlink()


def test_who_may_not_look_into_the_services_folder_is_told_to_use_sudo(searcher, monkeypatch):
    make_service(searcher)
    before = sorted(os.listdir(searcher.folder))
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, _: str(path) != str(searcher.service.parent))
        for words in ("mint-token", "list-hosts", "add-org berlin", "check"):
            require_one_line(searcher(*words.split()), 1, "run it with sudo")
        assert sorted(os.listdir(searcher.folder)) == before
        assert hostenroll.find_database("serve", None) == "hostenroll.db"
        assert searcher("mint-token", "--db", "hostenroll.db").status == 0
        assert searcher("list-tokens").err == ""  # of the one here


@needs_root
def test_root_takes_a_database_of_a_stranger_only_where_it_is_named(searcher):
    """He knows its keys, and could let in whom he likes."""
    searcher("add-org", "trap")
    trap = searcher.folder / "hostenroll.db"
    os.chown(trap, STRANGER, STRANGER)
    before = sorted(os.listdir(searcher.folder)), trap.read_bytes()
    refusal = f"root takes ./hostenroll.db of the user of id {STRANGER} only where --db names it"
    for words in ("list-orgs", "mint-token", "check", "backup copy", "serve --port 0"):
        require_one_line(searcher(*words.split()), 1, refusal)
    assert (sorted(os.listdir(searcher.folder)), trap.read_bytes()) == before
    assert searcher("list-orgs", "--db", "hostenroll.db").status == 0
    searcher.environment["HOSTENROLL_DB"] = "hostenroll.db"
    assert searcher("list-orgs").status == 0
    searcher.environment.clear()
    make_service(searcher)
    assert is_using(searcher("list-orgs"), searcher.service, f": {refusal}")
    require_one_line(searcher("serve", "--port", "0"), 1, refusal)  # it looks nowhere else
    os.chown(searcher.service.parent, STRANGER, STRANGER)
    assert "trap" in searcher("list-orgs").out  # of the service's user
    os.chown(searcher.service.parent, 0, 0)
    trap.unlink()
    trap.symlink_to("lib/hostenroll.db")
    os.chown(trap, STRANGER, STRANGER, follow_symlinks=False)
    assert is_using(searcher("list-orgs"), searcher.service, f": {refusal}")


@needs_root
def test_root_takes_no_key_file_of_a_stranger_that_lies_here(searcher, monkeypatch):
    searcher("mint-token")
    (searcher.folder / "hostenroll.db").unlink()
    os.chown(searcher.folder / "hostenroll.key", STRANGER, STRANGER)
    for words in ("mint-token", "list-hosts", "serve --init --port 0"):
        require_one_line(searcher(*words.split()), 1, "root takes ./hostenroll.key of the user")
    assert not (searcher.folder / "hostenroll.db").exists()
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)  # who is not root takes his own
    assert hostenroll.find_database("mint-token", None) == "hostenroll.db"


AS_ANOTHER_USER = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import hostenroll
os.setuid(int(sys.argv.pop(1)))
sys.exit(hostenroll.main())
"""
IN_THE_SERVICES_PLACE = """set -e
mount -t tmpfs -o mode=755 none /var/lib
mkdir -m 700 /var/lib/hostenroll /var/lib/elsewhere
cd /var/lib/elsewhere
"$@" 0 mint-token --db /var/lib/hostenroll/hostenroll.db 2>/dev/null
"$@" 0 mint-token
"$@" 0 list-tokens --json
ls
cd /var/lib
! "$@" 12345 mint-token
! "$@" 12345 list-tokens
"""


@slow
@needs_root
def test_the_service_has_its_database_in_var_lib(tmp_path):
    command = [sys.executable, "-c", AS_ANOTHER_USER, str(ROOT)]
    place = ["unshare", "--mount", "sh", "-c", IN_THE_SERVICES_PLACE, "sh", *command]
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs namespaces")
    done = subprocess.run(place, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, second, listed = done.stdout.split("\n", 2)
    tokens = [one["id"] for one in json.loads(listed)["tokens"]]  # and nothing from ls
    assert tokens == [secret.split("_")[1] for secret in (second, first)]
    used = [line for line in done.stderr.splitlines() if "hostenroll: " in line]
    folder = "/var/lib/hostenroll"
    assert used[:2] == [f"hostenroll: using {folder}/hostenroll.db"] * 2
    refused = f"hostenroll: only its owner can look into {folder}: run it with sudo, "
    assert [line.startswith(refused) for line in used[2:]] == [True, True]
    assert f"HOSTENROLL_DB={hostenroll.SERVICE_DATABASE}\n" in hostenroll.UNIT.template


def test_half_of_a_pair_is_made_whole_by_serve_init_alone(operator):
    operator("mint-token")
    os.unlink(operator.paths[0])
    for words in ("mint-token", "list-hosts", "backup copy"):
        require_one_line(operator(*words.split()), 1, "serve --init")
    require_one_line(run_apart(operator.folder, "serve", "--port=0"), 1, "serve --init")
    with start_server(operator.folder, "--init", how="process", api_key=False) as server:
        assert server.terminate() == 0
    assert operator("mint-token").status == 0


def test_serve_warns_when_others_can_listen_in_and_tells_where_hosts_find_it(tmp_path):
    """Without the first option there is no warning: see how the next command is written."""
    options = ("--host", "0.0.0.0", "--public-url", "https://enroll.lan:8443/")
    with start_server(tmp_path, *options, how="process") as server:
        assert server.call("GET", "/healthz").status == 200
        assert "--server https://enroll.lan:8443 --token-file -" in printed_command(tmp_path)
        assert server.terminate() == 0
    assert "without TLS" in "".join(server.log)
    assert "hosts find it at https://enroll.lan:8443\n" in server.log


def test_a_database_may_lie_at_a_path_of_any_bytes(tmp_path):
    for name in (b"a b%3f?#.db", b"\xff.db"):
        done = cli(tmp_path, "mint-token", "--db", name, "--key-file", name + b"k")
        assert done.returncode == 0, done.stderr
        assert os.path.exists(os.fsencode(tmp_path) + b"/" + name)


def test_a_terminal_that_knows_few_letters_shows_the_others_somehow(operator):
    """A host names itself: it must not be able to break the operator's list."""
    operator.enroll(name="\u65e5\u672c")
    for form in ((), ("--json",)):
        listed = run_apart(operator.folder, "list-hosts", *form, env={"PYTHONIOENCODING": "ascii"})
        assert (listed.status, listed.err) == (0, "") and "web-1" in listed.out


# What a terminal shows.


@contextlib.contextmanager
def pseudo_terminal(columns=80):
    """A stream to a terminal that is so wide, and what the terminal has been sent so far."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    settings = termios.tcgetattr(theirs)
    settings[1] &= ~termios.OPOST  # a line ends as it was written
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    sent = bytearray()

    def text():
        os.set_blocking(ours, stream.closed)  # then until the end, which Linux reports as an error
        with contextlib.suppress(OSError):
            for data in iter(lambda: os.read(ours, 65536), b""):
                sent.extend(data)
        return sent.decode("utf-8", "replace")

    with open(theirs, "w", encoding="utf-8") as stream:
        yield stream, text
    os.close(ours)


def on_terminal(operator, *words, columns=80, **environment):
    """What a terminal is sent when a command is typed there."""
    typist = Operator(operator.paths, operator.clock, operator.capsys)
    typist.environment.update({"TERM": "xterm", **environment})
    with pseudo_terminal(columns) as (stream, shown):
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            typist(*words)
        stream.close()
        return shown()


@pytest.fixture
def motley(operator):
    """An operator with a host of each status, some of them with long and wide names."""
    begin_service(operator)
    clock, (database, _) = operator.clock, operator.paths
    labels = {"rack": "b4", "purpose": "the one that stays on"}
    long = ["K\u00fcche-" + "\u65e5\u672c" * 9, "new-1" + "x" * 60, "new-2" + "y" * 60]
    with operator.world() as world:
        token = world.token(maxUses=9, labels=labels, description="all of them " * 5)
        names = ("shut", "lost", "away", *long)
        hosts = [world.enroll(token, f"box-{name[0]}", name=name).document for name in names]
        world.revoke(hosts[0]["hostId"])
        for host in hosts[1:4]:
            assert world.beat(host["credential"]).status == 200
        clock.advance(8 * 86400)
        world.perform(world.registry.service.keep_alive)
    month_ago = clock.ms - 30 * DAY_MS
    sql(database, "UPDATE service SET started = ?, previous_alive = ?", month_ago, month_ago)
    for host, silence in zip(hosts[1:4], (8 * 86400, 200, 0)):
        number, seen = int(host["hostId"], 16), clock.ms - silence * 1000
        sql(database, "UPDATE heartbeat SET last_seen = ? WHERE host_id = ?", seen, number)
    return operator


ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def test_a_table_fits_its_terminal(motley):
    whole = motley("list-hosts").out.splitlines()
    for columns in (250, 120, 80, 60, 40):
        shown = ESCAPE.sub("", on_terminal(motley, "list-hosts", columns=columns)).splitlines()
        assert len(shown) == len(whole) == 7
        widths = [hostenroll.text_width(line) for line in shown]
        assert max(widths) <= columns
        for line, full in zip(shown, whole):
            assert line[:18] == full[:18]  # an id is never cut, and no long name hides the status
            assert columns < 60 or full.startswith("ID") or re.search(r"  [a-z]+  ", line)
        if columns == 250:
            assert shown == whole
        else:
            assert max(widths) > columns - 8 and "\u2026" in "".join(shown)


def test_a_table_that_comes_in_parts_stays_aligned():
    table = hostenroll.Table(("id", "name"), hostenroll.Screen())
    row = {"id": "1", "name": "a"}
    assert table.add([row], 0) == "ID  NAME\n1   a"
    assert table.add([{**row, "id": "12345"}, row], 0) == "12345  a\n1      a"
    assert table.add([row], 0) == "1      a"


def test_a_state_has_a_colour_on_a_terminal_and_nothing_else_has(motley):
    shown = on_terminal(motley, "list-hosts", columns=250)
    colours = {"online": "32", "offline": "31", "missing": "33", "revoked": "2"}
    painted = {f"\x1b[{colour}m{status}\x1b[0m" for status, colour in colours.items()}
    assert {*re.findall(r"\x1b\[\d+m[^\x1b]*\x1b\[0m", shown)} == painted
    assert shown.count("\x1b") == 2 * len(painted) and "  pending  " in shown
    assert ESCAPE.sub("", shown) == motley("list-hosts").out
    host = motley.json("list-hosts", "--status", "online")["hosts"][0]["id"]
    motley("edit-host", host, "--name", "revoked")
    shown = on_terminal(motley, "show-host", host)
    assert "\nname:              revoked\n" in shown
    assert "\nstatus:            \x1b[32monline\x1b[0m\n" in shown


def test_there_are_no_colours_where_none_are_wanted_and_what_is_piped_is_never_cut(motley):
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": ""}):
        for command in ("list-hosts", "check", "list-tokens"):
            shown = on_terminal(motley, command, columns=300, **environment)
            assert "\x1b" not in shown and shown == motley(command).out
    assert "\x1b[32monline" in on_terminal(motley, "list-hosts", NO_COLOR="")
    motley.environment.update({"TERM": "xterm", "COLUMNS": "20"})
    for command in ("list-hosts", "list-tokens", "show-audit"):
        piped = motley(command).out
        assert not {"\x1b", "\u2026"} & {*piped} and max(map(len, piped.splitlines())) > 80


def test_columns_sets_the_width(motley):
    narrow = on_terminal(motley, "list-hosts", columns=60)
    assert on_terminal(motley, "list-hosts", columns=250, COLUMNS="60") == narrow
    for nonsense in ("0", "-1", "x", "1e3", ""):
        assert on_terminal(motley, "list-hosts", columns=60, COLUMNS=nonsense) == narrow


AGO = {
    0: "now", 0.999: "now", 1: "1 s ago", 119: "119 s ago", 120: "2 min ago", 7199: "119 min ago",
    7200: "2 h ago", 172799: "47 h ago", 172800: "2 d ago", 40 * 86400: "40 d ago", -1: "in 1 s",
    -2520: "in 42 min", -3600: "in 60 min",
}  # fmt: skip
WIDTHS = {
    "web-1": 5, "": 0, "K\u00fcche": 5, "\u65e5\u672c": 4, "\uff37\uff45": 4, "\U0001f5a5": 1,
    "\U0001f680": 2,
}  # fmt: skip


def test_times_are_shown_from_now(clock):
    clock.advance(-0.877)
    timestamp = hostenroll.rfc3339(clock.ms)
    for seconds, shown in AGO.items():
        assert hostenroll.relative_time(timestamp, clock.ms + round(seconds * 1000)) == shown


def test_people_see_times_from_now_and_programs_exact_ones(motley):
    (host,) = motley.json("list-hosts", "--status", "offline")["hosts"]
    listed = motley("list-hosts", "--status", "offline").out
    assert "3 min ago" in listed and host["lastSeen"] not in listed
    shown = motley("show-host", host["id"]).out
    assert f"last seen:         3 min ago ({host['lastSeen']})\n" in shown
    (token,) = motley.json("list-tokens")["tokens"]
    assert "7 d ago" in motley("list-tokens").out
    shown = motley("show-token", token["id"]).out
    assert f"expires:           7 d ago ({token['expiresAt']})\n" in shown
    hosts = re.search(r"^hosts: +((?:[0-9a-f]{16}\n *){6})", shown, re.MULTILINE)
    assert hosts is not None and hosts[1].split() == token["hosts"]


@pytest.mark.parametrize("text, columns", WIDTHS.items(), ids=map(ascii, WIDTHS))
def test_how_many_columns_a_text_takes(text, columns):
    assert hostenroll.text_width(text) == columns
    for room in range(1, columns + 2):
        cut = hostenroll.shorten(text, room)
        assert hostenroll.text_width(cut) <= room
        assert cut == text if room >= columns else text.startswith(cut[:-1]) and "\u2026" in cut


def test_progress_is_one_line_that_fits_and_goes_away(monkeypatch):
    for name in ("PROGRESS_AFTER", "PROGRESS_EVERY"):
        monkeypatch.setattr(hostenroll, name, 0.0)
    with pseudo_terminal(32) as (stream, shown), contextlib.redirect_stderr(stream):
        with hostenroll.progress_line("copying", {"TERM": "xterm"}) as progress:
            progress(1234, 0)
            until(lambda: shown() == "\rcopying: 1,234, 0 s\x1b[K")
            progress(1234, 3702)
            until(lambda: "\rcopying: 1,234 of 3,702 (33 %)\u2026\x1b[K" in shown())
        until(lambda: shown().endswith("\r\x1b[K"))
        assert "\n" not in shown()


@pytest.mark.parametrize("where", ["a pipe", "a dumb terminal", "soon done"])
def test_where_it_helps_no_one_there_is_no_progress(where, monkeypatch):
    if where != "soon done":
        monkeypatch.setattr(hostenroll, "PROGRESS_AFTER", 0.0)
    with pseudo_terminal() as (stream, shown):
        with contextlib.redirect_stderr(io.StringIO() if where == "a pipe" else stream) as stderr:
            term = "dumb" if where == "a dumb terminal" else "xterm"
            with hostenroll.progress_line("copying", {"TERM": term}) as progress:
                progress(1, 2)
        stream.close()
        assert shown() == "" and (where != "a pipe" or stderr.getvalue() == "")


def test_a_backup_and_a_check_report_how_much_of_them_is_done(operator, monkeypatch):
    monkeypatch.setattr(hostenroll, "BACKUP_PAGES", 4)
    operator("mint-token")
    (operator.folder / "copy").mkdir()
    with operator.world() as world:
        copy = partial(world.registry.backup, str(operator.folder / "copy"))
        for act in (copy, lambda report: [*hostenroll.examine(*operator.paths, report)]):
            reports = []
            act(lambda *report: reports.append(report))
            assert reports == sorted(reports) and reports[-1][0] == reports[-1][1] > 0


# Lists of any length.

MEASURED = """
import resource, subprocess, sys
print(subprocess.run(sys.argv[1:], stdout=open("out", "w")).returncode,
      resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@slow
@pytest.mark.parametrize("form", [(), ("--json",)], ids=["table", "json"])
def test_a_list_of_a_large_fleet_takes_no_more_memory_than_one_of_a_small(form, operator):
    """It held everything four times: 3 GB for a million hosts."""
    peaks = []
    for size in (2_000, 20_000):
        folder = operator.folder / str(size)
        folder.mkdir()
        hostenroll.make_fleet(session_of(operator, "bench", "--hosts", str(size)), str(folder))
        program = [sys.executable, "-c", MEASURED, *SCRIPT]
        measured = run_apart(folder, "list-hosts", *form, program=program)
        status, kibibytes = map(int, measured.out.split())
        text = (folder / "out").read_text()
        ids = [host["id"] for host in json.loads(text)["hosts"]] if form else text.split("\n")[1:-1]
        assert (status, len(ids), len(set(ids))) == (0, size, size)
        peaks.append(kibibytes)
    assert peaks[1] - peaks[0] < 12 * 1024, peaks


def test_a_list_has_each_item_once_however_its_pages_fall(operator, monkeypatch):
    monkeypatch.setattr(hostenroll, "PAGE_MAXIMUM", 3)
    monkeypatch.setattr(hostenroll, "PAGE_DEFAULT", 4)
    tokens = []
    for _ in range(10):
        operator.clock.advance(0.002)  # the newest come first, to the millisecond
        tokens.insert(0, operator.json("mint-token")["id"])
    for limit in (None, 1, 2, 3, 4, 6, 9, 10, 11):
        words = ("list-tokens", *(() if limit is None else ("--limit", str(limit))))
        listed = operator.json(*words)
        assert listed["nextCursor"] is None
        assert [token["id"] for token in listed["tokens"]] == tokens[:limit]
        lines = operator(*words).out.splitlines()
        assert [line.split()[0] for line in lines[1:]] == tokens[:limit]
    assert operator.json("list-hosts") == {"hosts": [], "nextCursor": None}


# Streams that end, fill up or are not there.


def test_an_operator_may_lose_patience(operator):
    operator.make_database()
    with open(f"{operator.paths[0]}.lock") as lock, open(f"{operator.paths[0]}.gate") as gate:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = subprocess.Popen(
            [*SCRIPT, "mint-token"], cwd=str(operator.folder), env=clean_environment(),
            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        with pytest.raises(BlockingIOError):  # until it stands at the gate
            for _ in iter(lambda: time.sleep(0.005), 0):
                fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(gate, fcntl.LOCK_UN)
        waiting.send_signal(signal.SIGINT)
        out, err = waiting.communicate(timeout=10)
    assert (waiting.returncode, out, err) == (130, "", "")


LOSE_MEMORY = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import hostenroll
def fail(*_):
    raise {}
hostenroll.Registry.perform = fail
hostenroll.Registry.close = lambda self: print("closed")
sys.exit(hostenroll.main())
"""
LOST = {
    "no memory": ("MemoryError", "out of memory: raise its limit, and start again"),
    "a replaced database": ("hostenroll.Unrecoverable('it is gone')", "it is gone"),
}


@pytest.mark.parametrize("error, line", sample(LOST, "no memory"))
@pytest.mark.parametrize("words", ["mint-token", "list-hosts --json", "serve --port 0"])
def test_what_cannot_pass_by_itself_ends_a_command_with_nothing_closed(
    words, error, line, tmp_path, paths, clock
):
    open_registry(*paths, clock.ms).close()
    program = [sys.executable, "-c", LOSE_MEMORY.format(error), str(ROOT)]
    done = run_apart(tmp_path, *words.split(), program=program)
    assert (done.status, done.out) == (1, "")
    start = r"\S+Z ERROR " if "serve" in words else "hostenroll: "
    assert re.fullmatch(f"{start}{re.escape(line)}\n", done.err)


@contextlib.contextmanager
def unwritable(kind="closed"):
    """A file that nothing can be written to: of a pipe that is closed, or full and not read, or on
    a full disk."""
    if kind == "full" and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    reader, writer = os.pipe()
    if kind == "not read":
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while os.write(writer, bytes(4096)):
                pass
        os.set_blocking(writer, True)
        with open(reader), open(writer, "w") as file:
            yield file
        return
    os.close(reader)
    if kind == "full":
        os.close(writer)
    with open("/dev/full" if kind == "full" else writer, "w") as file:
        yield file


PRINTING = {
    f"{words} {kind}{unbuffered}": (words, kind, unbuffered) for kind, unbuffered, commands in (
        ("full", "", ("mint-token", "list-orgs", "list-orgs --json", "schema", "--help")),
        ("closed", "", ("list-orgs", "--help", "--version", "agent-script")),
        ("closed", "1", ("list-orgs", "--help", "--version", "agent-script")))
    for words in commands
}  # fmt: skip
MINTS = ("mint-token", "mint-token --json", "reenroll-host", "mint-api-key", "mint-api-key --json")


@pytest.mark.parametrize(
    "words, kind, unbuffered",
    sample(PRINTING, "mint-token full", "list-orgs closed", "--help closed"),
)
def test_printing_fails_unless_the_reader_has_read_enough(words, kind, unbuffered, operator):
    operator.make_database()
    with unwritable(kind) as file:
        environment = {"PYTHONUNBUFFERED": unbuffered}
        done = run_apart(operator.folder, *words.split(), stdout=file, env=environment)
    if kind == "closed":
        assert (done.status, done.err) == (0, "")
    else:
        assert (done.status, done.err.count("\n")) == (1, 1) and done.err.startswith("hostenroll: ")


def test_a_verdict_that_is_not_read_is_no_other(operator):
    operator("mint-token")
    (operator.folder / "hostenroll.key").chmod(0o644)
    for form in ((), ("--json",)):
        with unwritable() as gone:
            done = run_apart(operator.folder, "check", *form, stdout=gone)
        assert (done.status, done.err) == (1, "")


@pytest.mark.parametrize("stdout", ["closed", pytest.param("full", marks=slow)])
@pytest.mark.parametrize("command", sample({c: c for c in MINTS}, "mint-token --json"))
def test_of_a_secret_that_was_lost_it_is_shown_how_to_revoke_it(command, stdout, operator):
    words, token = command.split(), operator.mint()
    if command == "reenroll-host":
        words.append(operator.enroll(token))
    with unwritable(stdout) as file:
        lost = run_apart(operator.folder, *words, stdout=file)
    require_one_line(lost, 1, "is lost")
    kind = "api-key" if "api-key" in command else "token"
    revoke = re.search(f"revoke-{kind} ([0-9a-f]{{16}})", lost.err)
    assert revoke is not None and revoke[1] not in token
    revoked = operator.json(*revoke[0].split())
    assert revoked["id"] == revoke[1] and revoked["revokedAt"]


def test_a_secret_goes_to_stdout_alone_or_is_not_minted(tmp_path):
    done = in_shell(f"{shlex.join(PROGRAM)} mint-token >&-", tmp_path)
    require_one_line(done, 1, "stdout is closed")
    assert not (tmp_path / "hostenroll.db").exists()
    done = in_shell(f"{shlex.join(PROGRAM)} mint-token 2>&-", tmp_path)
    assert re.fullmatch(r"het_\S+\n", done.out)


@pytest.mark.parametrize("stderr", [pytest.param("closed", marks=slow), "full"])
def test_a_command_does_its_work_though_nothing_can_be_reported(stderr, tmp_path):
    for words, status in (
        ("mint-token", 0), ("add-org a", 0), ("add-org a", 3), ("xyzzy", 2), ("", 2),
    ):  # fmt: skip
        with unwritable(stderr) as file:
            done = run_apart(tmp_path, *words.split(), stderr=file)
        assert done.status == status, words
        assert bool(re.fullmatch(r"het_\S+\n", done.out)) == (words == "mint-token")


@pytest.mark.parametrize("stderr", [pytest.param("closed", marks=slow), "full", "not read"])
def test_a_server_serves_and_stops_though_nothing_can_be_reported(stderr, bound, tmp_path):
    given = activated([bound])
    with unwritable(stderr) as file:
        server = subprocess.Popen(
            [*given["program"], "serve", "--port", "0", "--access-log"], cwd=str(tmp_path),
            stderr=file, env=clean_environment(), pass_fds=given["pass_fds"],
        )  # fmt: skip
        try:
            door = SocketDoor(bound.getsockname()[1])
            assert [reply.status for reply in door.send(HEALTH * 200)] == [200] * 200
            began = time.monotonic()
            server.terminate()
            assert server.wait(10) == 0 and time.monotonic() - began < 5
        finally:
            server.kill()
            server.wait()


@slow
@pytest.mark.parametrize("loses_memory", [False, True], ids=["at its start", "for good"])
def test_a_server_that_ends_by_itself_ends_though_its_log_is_not_read(
    loses_memory, bound, tmp_path
):
    program = [sys.executable, "-c", LOSE_MEMORY.format("MemoryError"), str(ROOT)]
    port = "0" if loses_memory else str(bound.getsockname()[1])
    with unwritable("not read") as file:
        began = time.monotonic()
        options = {"program": program} if loses_memory else {}
        done = run_apart(tmp_path, "serve", "--port", port, stderr=file, **options)
    assert done.status == 1 and time.monotonic() - began < 5


# What the README shows.

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [  # commands to be copied letter by letter, each known by the first of them
    SimpleNamespace(
        line=README.count("\n", 0, match.start(1)) + 1,
        section=re.findall(r"^## (.+)$", README[: match.start()], re.MULTILINE)[-1],
        text=match[1],
        first=match[1].split("\n")[0],
    )
    for match in re.finditer(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
]
# Blocks for a machine on which nothing runs yet. The others are typed where the first minute has
# passed: a server runs, and one host has enrolled and beats.
ON_A_BARE_MACHINE = {"useradd --system --shell /usr/sbin/nologin hostenroll"}
NOT_RUN_HERE = {
    # It is these tests; .ci/run runs it, letter by letter.
    "python3 -m venv .venv && .venv/bin/pip install -q pytest && .venv/bin/python -m pytest",
    # It takes minutes; the tests of bench have fewer hosts.
    "TMPDIR=/var/tmp python3 hostenroll.py bench --hosts 100000",
}
ELIDED = "het_..."  # a block with this is what mint-token prints; the true one is pasted
STORIES = ("The first minute", "The second machine")  # the one begins all tests below
TYPED = {
    f"line {block.line}: {block.first[:60]}": block
    for block in BLOCKS
    if block.first not in NOT_RUN_HERE and block.section not in STORIES and ELIDED not in block.text
}


MACHINE_TOOLS = ("unshare", "nsenter", "ip", "mount", "curl", "openssl", "runuser", "useradd")
TRIED = ["unshare", "-mnup", "--fork", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
needs_machines = pytest.mark.skipif(
    os.geteuid() != 0
    or not all(map(shutil.which, MACHINE_TOOLS))
    or subprocess.run(TRIED, capture_output=True).returncode != 0,
    reason="needs root, namespaces, iproute2, curl and openssl",
)
MAKE_MACHINE = """\
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
cd "$1"
mkdir upper work root
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" root
for shared in sys dev tmp; do mount --rbind /$shared root/$shared; done
mount -t proc proc root/proc
cp "$2" root/srv/hostenroll.py
mkdir -p root/etc/prometheus
printf '#!/bin/sh\\nexec %s "$@"\\n' "$3" > root/usr/local/bin/python3
printf '%s' "$4" > root/usr/local/bin/systemctl
chmod 755 root/usr/local/bin/python3 root/usr/local/bin/systemctl
chmod a+x root/root # a service with a user of its own may find its Python there
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
user=$(value User)
install -d -o "$user" -m "$(value StateDirectoryMode)" "/var/lib/$(value StateDirectory)"
export $(value Environment)
eval "exec runuser -u $user -- $(value ExecStart)" 2>/var/log/hostenroll &
until grep -q 'listens on' /var/log/hostenroll; do sleep 0.1; done # Type=notify
"""


class Box:
    """A machine with its own network, hostname, processes and files: but for /tmp, what is written
    there is written nowhere else, and what runs there ends with it."""

    def __init__(self, folder, name="first"):
        self.place, self.shells = folder / name, []
        self.place.mkdir()
        python = os.path.realpath(sys.executable)  # others cannot look into each venv
        self.unshared = subprocess.Popen(
            ["unshare", "-mnup", "--fork", "--kill-child", "sh", "-c", MAKE_MACHINE, "sh",
             str(self.place), str(MODULE), python, SYSTEMCTL, name],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.unshared.stdout.readline() == b"ready\n"
        children = Path(f"/proc/{self.unshared.pid}/task/{self.unshared.pid}/children")
        self.process = children.read_text().strip()

    def enter(self, *words, options=(), **more):
        """Start a program of ours in its network, or in more of it."""
        return subprocess.Popen(["nsenter", "-t", self.process, "-n", *options, *words], **more)

    def type(self, text):
        """Type commands into a shell in the folder where hostenroll.py lies, and wait for their
        end, or until what they start reports that it is at work. What they print; a failure
        fails."""
        environment = {"PATH": "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin",
                       "HOME": "/root", "LC_ALL": "C.UTF-8"}  # fmt: skip
        stem = self.place.parent / f"{self.place.name}-{len(self.shells)}"
        out, err = stem.with_suffix(".out"), stem.with_suffix(".err")
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            shell = self.enter(
                "sh", "-ec", f"cd /srv\n{text}", env=environment, stdin=subprocess.DEVNULL,
                stdout=stdout, stderr=stderr,
                options=["-m", "-u", "-p", f"--root=/proc/{self.process}/root"],
            )  # fmt: skip
        self.shells.append(shell)
        if re.search(r"serve &$", text, re.MULTILINE):  # the rest ends, and it listens
            until(lambda: shell.poll() is not None and "listens on" in err.read_text(), 60)
        stays = "listens on|enrolled as host"
        until(lambda: shell.poll() is not None or re.search(stays, err.read_text()), 60)
        done = SimpleNamespace(out=out.read_text(), err=err.read_text(), status=shell.poll())
        assert done.status in (0, None), f"{text}\nended with {done.status}:\n{done.out}{done.err}"
        return done

    def hosts(self):
        return json.loads(self.type("python3 hostenroll.py list-hosts --json").out)["hosts"]

    def pass_the_first_minute(self):
        """What a newcomer does, with what mint-token prints pasted. It takes less."""
        begun = time.monotonic()
        start, look = (block.text for block in BLOCKS if block.section == "The first minute")
        self.type(join_command_in(self.type(start)))
        until(lambda: [host["status"] for host in self.hosts()] == ["online"])
        lines = self.type(look).out.splitlines()
        assert len(lines) == 2 and "online" in lines[1].split() and time.monotonic() - begun < 60

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.unshared.kill()
        self.unshared.wait(10)
        self.unshared.stdout.close()
        for shell in self.shells:
            shell.wait(10)


def join_command_in(printed):
    """What a person copies out of what mint-token prints on the terminal."""
    command = re.search(r"^printf .*(?:\n +.*)*$", printed.err, re.MULTILINE)
    assert command is not None, printed.err
    return command[0]


def test_the_readme_shows_no_command_that_no_test_would_run():
    """Commands stand in ```sh blocks. An indented block is run by no test."""
    fences = re.findall(r"^```(\w*)\n.*?^```$", README, re.MULTILINE | re.DOTALL)
    assert set(fences) <= {"sh", "yaml", "json", "ini", "nginx", "dockerfile"}
    for line in re.findall(r"\n\n((?:    .+\n)+)", README):
        assert re.match(r"    +(GET|POST|PATCH|DELETE|PUT) ", line), line
    assert {block.first for block in BLOCKS} >= ON_A_BARE_MACHINE
    if (ROOT / ".ci/run").exists():
        ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
        assert "sed -n '/^## Tests/,/^## /p' README.md" in ci and 'eval "$command' in ci


@pytest.mark.parametrize("block", BLOCKS, ids=[f"line {block.line}" for block in BLOCKS])
def test_every_command_in_the_readme_is_well_formed(block):
    if shutil.which("sh"):
        subprocess.run(["sh", "-n", "-c", block.text], check=True)
    text = block.text.replace("\\\n", " ")
    for line in re.findall(r"python3 \S*hostenroll\.py (.*)", text):
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        typed = itertools.takewhile(lambda word: word[0] not in "|>&)<;", words)
        assert hostenroll.parse_arguments(list(typed), {}), line
    if ELIDED in block.text:
        printed = hostenroll.join_command("https://enroll.lan:8443", "sha256//...", ELIDED)
        assert shlex.split(block.text) == shlex.split(printed)


@slow
@needs_machines
def test_the_second_machine_enrolls_over_tls_by_a_pinned_key(tmp_path):
    serve, mint = (block.text for block in BLOCKS if block.section == "The second machine")
    with Box(tmp_path) as first, Box(tmp_path, "second") as second:
        for machine, change in (  # a wire between them
            (first, f"link add wire type veth peer name wire netns {second.process}"),
            (first, "addr add 192.0.2.10/24 dev wire"), (first, "link set wire up"),
            (second, "addr add 192.0.2.20/24 dev wire"), (second, "link set wire up"),
        ):  # fmt: skip
            assert machine.enter("ip", *change.split()).wait() == 0
        first.pass_the_first_minute()
        first.type(serve)
        join = join_command_in(first.type(mint))
        assert re.search("-k --pinnedpubkey '?sha256//", join)
        second.type(join)
        until(lambda: [host["status"] for host in first.hosts()] == ["online"] * 2)
        assert [host["name"] for host in first.hosts()] == ["second", "first"]


@slow
@needs_machines
def test_a_machine_that_is_imaged_again_stays_the_same_host(tmp_path):
    [block] = (block for block in BLOCKS if "reenroll-host" in block.text)
    with Box(tmp_path) as machine:
        machine.pass_the_first_minute()
        [before] = machine.hosts()
        edit = f"edit-host {before['id']} --name shelf-7 --label rack=b4"
        machine.type(f"python3 hostenroll.py {edit}")
        machine.type(  # its hostname only begins like that of the machine, and it is the newest
            """printf '{"token":"%s","hostname":"%s0"}' """
            '"$(python3 hostenroll.py mint-token)" "$(uname -n)" |'
            " curl -fsS http://127.0.0.1:8080/api/agent/enroll -d @-"
        )
        machine.type(block.text)
        other, after = machine.hosts()
    same = [(host["id"], host["enrolledAt"]) for host in (before, after)]
    assert same[0] == same[1] and (after["name"], after["labels"]) == ("shelf-7", {"rack": "b4"})
    assert (after["status"], other["status"]) == ("online", "pending")


[CONTAINERFILE] = re.findall(r"^```dockerfile\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
CONTAINER = dict(line.split(" ", 1) for line in CONTAINERFILE.replace("\\\n", "").splitlines())
SETTINGS_THERE = dict(pair.split("=") for pair in CONTAINER["ENV"].split())
CONTAINER_STARTS = json.loads(CONTAINER["ENTRYPOINT"]) + json.loads(CONTAINER["CMD"])
CONTAINER_CHECK = json.loads(CONTAINER["HEALTHCHECK"].partition("CMD ")[2])


def test_what_the_containerfile_names_is_there():
    known = "FROM RUN COPY ENV VOLUME EXPOSE USER HEALTHCHECK ENTRYPOINT CMD"
    assert list(CONTAINER) == known.split()
    source, target = CONTAINER["COPY"].split()
    assert (ROOT / source).is_file() and target.endswith("/")
    init, _, python, program, *words = CONTAINER_STARTS
    assert (init, python, program) == ("tini", "python3", target + source)
    assert f"install -y {init} " in CONTAINER["RUN"] and CONTAINER_CHECK[0] == python
    assert re.search(rf"useradd .*\b{CONTAINER['USER']} &&", CONTAINER["RUN"])
    assert CONTAINER["RUN"].endswith(f" -o {CONTAINER['USER']} {CONTAINER['VOLUME']}")
    assert hostenroll.unknown_settings(SETTINGS_THERE) == []
    arguments = hostenroll.parse_arguments(words, SETTINGS_THERE)
    assert arguments.command.name == "serve" and arguments.host == "0.0.0.0"
    assert os.path.dirname(arguments.db) == CONTAINER["VOLUME"]
    assert str(arguments.port) == CONTAINER["EXPOSE"]
    assert f":{arguments.port}/healthz" in CONTAINER_CHECK[-1]


# Stands in for apt-get and, where it is not installed, for what that would install.
APT_GET = """\
#!/bin/sh
[ "$1" != install ] || command -v tini >/dev/null || {
    cat >/usr/bin/tini <<'END'
#!/bin/sh
shift
trap 'kill -TERM $child' TERM
"$@" & child=$!
wait $child || wait $child
END
    chmod 755 /usr/bin/tini
}
"""


@slow
@needs_machines
def test_the_containerfile_makes_a_server_that_answers_and_stops_when_it_is_told(tmp_path):
    """On a machine of its own; what is started is process 1, as in a container."""
    settings = shlex.join(f"{name}={text}" for name, text in SETTINGS_THERE.items())
    user = f"setpriv --reuid {CONTAINER['USER']} --regid {CONTAINER['USER']} --clear-groups"
    within = f"{user} env {settings}"
    with Box(tmp_path) as machine:
        stub = "/usr/local/bin/apt-get"
        machine.type(f"printf %s {shlex.quote(APT_GET)} > {stub}; chmod 755 {stub}")
        machine.type(CONTAINER["RUN"])
        machine.type(f"cp {CONTAINER['COPY']}")
        isolated = "unshare --fork --pid --mount-proc --kill-child"
        machine.type(f"exec {isolated} {within} {shlex.join(CONTAINER_STARTS)}")
        container = machine.shells[-1]
        machine.type(f"{within} {shlex.join(CONTAINER_CHECK)}")
        machine.type(f"cd /; {within} {shlex.join([*CONTAINER_STARTS[2:4], 'mint-token'])}")
        look = "for each in /proc/[0-9]*; do read -r name < $each/comm; "
        machine.type(f'{look} [ "$name" != tini ] || kill -TERM "${{each#/proc/}}"; done')
        assert container.wait(10) == 0
        machine.type(f"! {within} {shlex.join(CONTAINER_CHECK)}")


NGINX = shutil.which("nginx")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


@slow
@needs_curl
@needs_nginx
def test_nginx_serves_it_under_a_path_as_the_readme_shows(tmp_path):
    [location] = re.findall(r"^```nginx\n(location /enroll/.*?)^```$", README, re.M | re.S)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/enroll"
    options = ("--public-url", f"{url}/", "--trusted-proxy", "127.0.0.1", "--access-log")
    with start_server(tmp_path, *options, how="process") as server:
        location = location.replace("127.0.0.1:8080", f"127.0.0.1:{server.port}")
        temporary = "".join(f"{each}_temp_path {tmp_path}/{each};\n" for each in (
            "client_body", "proxy", "fastcgi", "uwsgi", "scgi"))  # fmt: skip
        http = f"access_log off;\n{temporary}server {{ listen 127.0.0.1:{port};\n{location} }}"
        (tmp_path / "nginx.conf").write_text(
            f"daemon off; user root; pid {tmp_path}/pid; error_log {tmp_path}/error;\n"
            f"events {{}}\nhttp {{ {http} }}\n"
        )
        with subprocess.Popen([NGINX, "-c", str(tmp_path / "nginx.conf")]) as nginx:
            try:
                door = SocketDoor(port, server.api_key)
                until(lambda: (tmp_path / "pid").exists())
                done = joined(tmp_path, printed_command(tmp_path))
                assert done.status == 0, done.err
                [host] = door.ask("GET", "/enroll/api/hosts").document["hosts"]
                assert host["status"] == "online"
                assert door.call("GET", "/enroll/").document == PAGE
                assert door.call("GET", "/api/hosts").status == 404
            finally:
                nginx.terminate()


@slow
@needs_machines
@pytest.mark.parametrize("block", table(TYPED))
def test_what_the_readme_shows_can_be_typed(block, tmp_path):
    """Each block on a machine of its own. One that fails or does not end, without `listens on`
    or `enrolled as host`, is wrong, or wants to be named in a table above."""
    with Box(tmp_path) as machine:
        if block.first not in ON_A_BARE_MACHINE:
            machine.pass_the_first_minute()
        done = machine.type(block.text)
        refused = re.search("Traceback|^hostenroll: |urn:hostenroll:problem", done.out + done.err)
        assert refused is None, done


def test_the_openapi_command_prints_what_the_server_serves(operator):
    printed = operator("openapi").out
    assert printed.startswith('{\n  "openapi": "3.1.0",') and os.listdir(operator.folder) == []
    with operator.world() as world:
        assert json.loads(printed) == world.call("GET", "/openapi.json").document


# Keys, the audit log, backups.


def test_signing_keys_are_rotated_listed_and_retired(operator):
    def keys():
        listed = operator.json("list-signing-keys")["signingKeys"]
        return [(key["kid"], key["state"], key["hosts"], key["retiredAt"]) for key in listed]

    operator("mint-token")
    ((old, *rest),) = keys()
    assert rest == ["signs", 0, None]
    refused = operator("retire-signing-key", old, "--force")
    assert refused.status == 3 and "(conflict)" in refused.err and "rotate" in refused.err
    operator.clock.advance(60)
    rotated = operator("rotate-signing-key")
    new = rotated.out.strip()
    assert rotated.status == 0 and re.fullmatch("[0-9a-f]{16}\n", rotated.out)
    assert keys() == [(new, "signs", 0, None), (old, "verifies", 0, None)]
    require_one_line(operator("retire-signing-key", "0123456789abcdef"), 3, "(not-found)")
    operator.clock.advance(60)
    retired = operator("retire-signing-key", old)
    assert (retired.status, retired.out) == (0, "") and old in retired.err
    now = hostenroll.rfc3339(operator.clock.ms)
    assert keys() == [(new, "signs", 0, None), (old, "retired", 0, now)]
    lines = operator("list-signing-keys").out.splitlines()
    rows = [["KID", "STATE"], [new, "signs"], [old, "retired"]]
    assert [line.split()[:2] for line in lines] == rows
    assert [operator(*words.split()).status for words in ("verify-audit", "check")] == [0, 0]


def test_check_prints_ok_or_what_is_bad(operator):
    require_one_line(operator("check"), 1, "no database")
    assert os.listdir(operator.folder) == []
    operator("mint-token")
    before = sorted(os.listdir(operator.folder))
    names = ["schema", "integrity", "sqlite", "keys", "minted", "audit", "modes"]
    for bad in ("", "keys"):
        if bad:  # without them the audit log cannot be judged
            (operator.folder / "hostenroll.key").chmod(0o604)
            names = [name for name in names if name not in ("minted", "audit")]
        shown, printed = operator("check"), operator("check", "--json")
        assert [(done.status, done.err) for done in (shown, printed)] == [(bool(bad), "")] * 2
        rows = [["BAD" if name == bad else "ok", name] for name in names]
        assert [line.split()[:2] for line in shown.out.splitlines()] == rows
        document = json.loads(printed.out)
        assert document["ok"] == (not bad)
        assert all(set(finding) == {"name", "ok", "detail"} for finding in document["findings"])
        found = [(finding["name"], finding["ok"]) for finding in document["findings"]]
        assert found == [(name, name != bad) for name in names]
    assert sorted(os.listdir(operator.folder)) == before


def test_a_backup_goes_into_a_folder_of_its_owner_alone_or_nowhere(operator):
    operator("mint-token")
    (operator.folder / "a-file").write_text("")
    before = sorted(os.listdir(operator.folder))
    for folder, word in (("a-file", "a-file"), ("a-file/copy", "a-file"), (".", "in use")):
        require_one_line(operator("backup", folder), 1, word)
        assert sorted(os.listdir(operator.folder)) == before
    umask = os.umask(0)
    try:
        made = [operator("backup", "copy") for _ in range(2)]
    finally:
        os.umask(umask)
    assert [(done.status, done.out) for done in made] == [(0, "")] * 2
    copy = operator.folder / "copy"
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (copy, *copy.iterdir())]
    assert modes == [0o700, 0o600, 0o600]
    assert operator("check", "--db", "copy/hostenroll.db").status == 0


def test_where_anybody_may_replace_the_files_only_a_first_key_file_and_a_backup_are_refused(
    operator,
):
    folder, copy = operator.folder, operator.folder / "copy"
    copy.mkdir()
    copy.chmod(0o777)
    folder.chmod(0o777)
    require_one_line(operator("mint-token"), 1, "--key-file, or chmod o-w")
    require_one_line(run_apart(folder, "serve", "--init"), 1, "--key-file, or chmod o-w")
    assert not list(folder.glob("*.db")) + list(folder.glob("*.key*"))
    folder.chmod(0o700)
    operator("mint-token")
    folder.chmod(0o777)
    require_one_line(operator("backup", "copy"), 1, "name another folder")
    assert os.listdir(copy) == []
    operator("rotate-signing-key")
    assert len(operator("list-signing-keys").out.splitlines()) == 3
    checked = operator("check")
    assert (checked.status, f"chmod o-w {folder}" in checked.out) == (1, True)
    with start_server(folder, how="process", api_key=False) as server:
        assert server.call("GET", "/readyz").status == 200
        assert server.terminate() == 0
    assert [line.count(f"anybody can replace files in {folder}") for line in server.log].count(
        1
    ) == 1


@pytest.fixture
def audited(operator):
    """An operator who has done a few things, and has refused one."""
    token = operator.mint()
    operator("add-org", "berlin")
    operator("mint-api-key")
    with operator.world() as world:
        number = world.enroll(token).document["hostId"]
        assert world.enroll(token).code == "token-used"
    assert operator("revoke-host", number).status == 0
    return operator


def test_the_log_on_the_command_line_is_that_of_the_api_whole_and_in_parts(audited):
    events = audited.json("show-audit")["events"]
    first, *lines = audited("show-audit").out.rstrip("\n").split("\n")
    assert " ".join(first.split()) == "NUMBER WHEN ACTION CODE SUBJECT ACTOR ADDRESS DETAIL TIME"
    assert [(line.split()[:3], line.split()[-1]) for line in lines] == [
        ([str(event["number"]), "now", event["action"]], event["time"]) for event in events
    ]
    at = first.index("ACTOR")
    assert all(line[at:].startswith(event["actor"]) for line, event in zip(lines, events))
    assert "hostname=web-1" in audited("show-audit", "--code", "token-used").out
    for words, numbers in (
        ("--limit 2", [6, 5]), ("--action mint", [3, 1]), ("--code token-used", [5]),
        (f"--subject {events[0]['subject']}", [6, 4]), ("--org berlin", [2]),
    ):  # fmt: skip
        listed = audited.json("show-audit", *words.split())["events"]
        assert [event["number"] for event in listed] == numbers, words
    with audited.world() as world:
        assert world.audit()[:6] == events[::-1]  # then comes its API key
    actions = [event["action"] for event in events]
    assert actions == ["revoke", "refuse", "enroll", "mint", "add", "mint"]
    assert events[0]["actor"].startswith("cli:") and events[0]["address"] is None


def unguarded(operator, statement):
    """What someone does who has the database, and not the keys."""
    database = operator.paths[0]
    triggers = sql(database, "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
    drops = [f"DROP TRIGGER {name}" for name, _ in triggers]
    for each in (*drops, statement, *(text for _, text in triggers)):
        sql(database, each)


def test_the_head_stands_alone_on_stdout_and_finds_a_tail_cut_off(audited):
    seen = audited("verify-audit")
    assert seen.status == 0 and re.fullmatch("[0-9a-f]{64}\n", seen.out)
    assert "events 1 to 6 " in seen.err and "only --head" in seen.err
    head = seen.out.strip()
    audited("mint-token")
    later = audited("verify-audit", "--head", head)
    assert later.status == 0 and later.out != seen.out
    assert "up to the head given nothing has been cut off" in later.err
    assert "takes a later head" in later.err and "only --head" not in later.err
    unguarded(audited, "DELETE FROM audit WHERE number >= 6")
    without = audited("verify-audit")
    assert (without.status, "only --head" in without.err) == (0, True)
    require_one_line(audited("verify-audit", "--head", head), 1, "cut off")
    assert audited("verify-audit", "--head", without.out.strip()).status == 0
    for bad in ("0", head[:-1], head + "0", head.upper(), "x" * 64):
        assert audited("verify-audit", "--head", bad).status == 2


def test_an_empty_log_has_a_head_too(operator):
    operator.make_database()
    seen = operator("verify-audit")
    assert (seen.status, seen.out) == (0, "\n") and "no events" in seen.err
    assert operator.json("verify-audit")["head"] == ""


@pytest.mark.parametrize("change", sample(
    HOSTILE_EVENTS, "a number that none can follow", "detail with an escape",
    "detail that is not UTF-8", "a time beyond all calendars",
))  # fmt: skip
def test_a_hostile_event_can_be_shown_and_is_named(change, audited):
    unguarded(audited, f"UPDATE audit SET {change} WHERE number = 3")
    shown = audited("show-audit")
    assert (shown.status, audited("show-audit", "--limit", "2").status) == (0, 0)
    assert not hostenroll.UNPRINTABLE.search(shown.out.replace("\n", ""))
    audited.json("show-audit", "--action", "mint")
    require_one_line(audited("verify-audit"), 1, "event ")
    assert re.search(r"^BAD +audit +.*event ", audited("check").out, re.MULTILINE)
    assert audited("list-hosts").status == 0


@pytest.mark.parametrize("failure, change, command", [
    ("a row that no hostenroll wrote", "host SET issued = 'x'", "list-hosts"),
    ("an event that none can follow", f"audit SET number = {GREATEST} WHERE number = 6",
     "mint-token"),
])  # fmt: skip
def test_what_a_hostile_row_hinders_is_said_in_the_line_of_the_readme(
    failure, change, command, audited
):
    unguarded(audited, f"UPDATE {change}")
    done = audited(command)
    assert (done.status, done.out) == (1, "")
    is_logged(failure, done.err.splitlines())


def test_what_was_tampered_with_is_named_in_one_line(audited):
    unguarded(audited, "UPDATE audit SET actor = 'x' WHERE number = 3")
    require_one_line(audited("verify-audit"), 1, "event 3 ")
    assert re.search(r"^BAD +audit +.*event 3 ", audited("check").out, re.MULTILINE)


@pytest.mark.parametrize("name", ["rows of audit are swallowed", "audit_is_only_pruned is dropped"])
def test_a_command_does_what_is_safe_with_an_altered_schema(name, operator, tmp_path):
    number = operator.enroll()
    alter, word = ALTERED_SCHEMAS[name]
    alter(operator.paths[0])
    require_one_line(run_apart(tmp_path, "serve", "--port", "0"), 1, word)
    for words in ("mint-token", f"revoke-host {number}", "add-org berlin", "rotate-signing-key"):
        require_one_line(operator(*words.split()), 1, word)
    for words in ("list-hosts", f"show-host {number}", "show-audit --json", "backup copy"):
        done = operator(*words.split())
        assert (done.status, done.err.count(word)) == (0, 1), done.err
    assert operator("verify-audit").status == int("missing" not in word)  # that keeps nothing out
    done = operator("check")
    assert done.status == 1 and re.search(rf"^BAD +integrity.*{word}", done.out, re.MULTILINE)


# TLS.


def printed_command(folder):
    return cli(folder, "mint-token").stderr.split("enroll with it, on the host:\n")[1]


def in_shell(line, folder):
    return run_apart(folder, "-c", line, program=["sh"])


def joined(folder, line):
    """A join command, run on a host that keeps its state in a folder, and beats once."""
    return in_shell(f"{line.rstrip()} --once --state {folder / 'state'}", folder)


@needs_curl
@pytest.mark.parametrize("tls", [pytest.param(False, marks=slow), True], ids=["http", "https"])
def test_the_line_that_mint_token_prints_enrolls_when_a_shell_runs_it(tls, tmp_path):
    """Over TLS it pins the server's certificate."""
    with start_server(tmp_path, how="process", tls=tls) as server:
        line, pin = printed_command(tmp_path), pin_of("one")
        assert f"--server {server.url} " in line and ("--pinnedpubkey" in line) == tls
        if tls:
            assert f"-k --pinnedpubkey {pin} " in line and "--proto =https " in line
            assert f"--pin {pin} --token-file -" in line
            wrong = joined(tmp_path, line.replace(pin, pin_of("other")))
            in_clear = joined(tmp_path, line.replace("https://", "http://"))
            assert (wrong.status, wrong.out) == (90, "")
            assert (in_clear.status, in_clear.out) == (1, "")  # a protocol that is off
            assert server.hosts().document["hosts"] == []
        done = joined(tmp_path, line)
        assert (done.status, done.out) == (0, ""), done.err
        [host] = server.hosts().document["hosts"]
        assert (host["name"], host["status"]) == (os.uname().nodename, "online")
        assert server.terminate() == 0
    assert "Traceback" not in "".join(server.log)


def beaten(folder, line, **options):
    """A heartbeat of the agent that has joined by a command: it goes by the same options."""
    (folder / "agent.sh").write_text(hostenroll.AGENT_SCRIPT)
    words = shlex.split(line.rpartition("hostenroll-agent ")[2].replace("--token-file -", ""))
    state = ("--once", "--state", str(folder / "state"))
    return run_apart(folder, "agent.sh", *words, *state, program=["sh"], **options)


def renewed(server):
    """SIGHUP; what the log then has, up to the next housekeeping."""
    before = len(server.log)
    server.process.send_signal(signal.SIGHUP)
    return until(lambda: "loaded the certificate" in "".join(server.log[before:]))


@needs_curl
def test_a_certificate_of_a_known_authority_is_renewed_with_another_key(authority, tmp_path):
    """As certbot does unless it is told otherwise: no agent may have pinned the old key."""
    serve, trust = authority.issue(tmp_path), {"env": authority.trust}
    with start_server(tmp_path, *serve, how="process", **trust) as server:
        line = printed_command(tmp_path)
        assert "--server https://127.0.0.1:" in line and "pin" not in line and " -k" not in line
        joining = f"{line.rstrip()} --once --state {tmp_path / 'state'}"
        joined = run_apart(tmp_path, "-c", joining, program=["sh"], **trust)
        assert joined.status == 0 and "enrolled as host" in joined.err, joined.err
        authority.issue(tmp_path)
        renewed(server)
        assert beaten(tmp_path, line, **trust).status == 0
        assert beaten(tmp_path, line).status == 1  # who does not know the authority
        assert not [line for line in server.log if re.search("ERROR|WARNING", line)]


@slow
@needs_curl
@needs_openssl
@pytest.mark.parametrize("has_next", [False, True], ids=["unannounced", "announced"])
def test_a_certificate_that_signs_itself_is_renewed_with_another_key(has_next, tmp_path):
    for name in ("tls", "next"):
        words = ("--name=127.0.0.1", f"--tls-cert={name}.crt", f"--tls-key={name}.key")
        assert run_apart(tmp_path, "make-cert", *words).status == 0
    old, new = (hostenroll.read_certificate(
        hostenroll.load_tls(str(tmp_path / f"{name}.crt"), None)[1][0]).pin
        for name in ("tls", "next"))  # fmt: skip
    serve = ("--tls-cert", "tls.crt", "--tls-key", "tls.key")
    serve += ("--next-pin", "next.crt") if has_next else ()
    with start_server(tmp_path, *serve, how="process") as server:
        line = printed_command(tmp_path)
        assert joined(tmp_path, line).status == 0
        assert (f"--pin '{old};{new}'" in line) == has_next and f"{old}" in line
        for end in ("crt", "key"):
            os.replace(tmp_path / f"next.{end}", tmp_path / f"tls.{end}")
        renewed(server)
        until(lambda: old not in printed_command(tmp_path))
        beat = beaten(tmp_path, line)
        assert beat.status == (0 if has_next else 1), beat.err
        errors = [line for line in server.log if " ERROR " in line]
        assert len(errors) == (not has_next) and all(f"the pin {old} " in line for line in errors)
        shown = run_apart(tmp_path, "show-audit", "--action", "certificate", "--json")
        events = [event["detail"] for event in json.loads(shown.out)["events"]]
        assert events == ([] if has_next else [{"pinned": old, "pin": new}])
        anew = run_apart(tmp_path, "agent-command").out  # for who was shut out
        assert f"--pinnedpubkey {new} " in anew and f"--pin {new} --install" in anew
        assert beaten(tmp_path, anew.replace("--install", "")).status == 0


@slow
@needs_curl
def test_an_authority_of_ones_own_is_given_to_hosts_by_its_file(authority, tmp_path):
    (tmp_path / "ca.pem").write_text(authority.file.read_text())
    words = ("--pin", "never", *authority.issue(tmp_path))
    with start_server(tmp_path, *words, how="process") as server:
        line = printed_command(tmp_path).rstrip()
        assert joined(tmp_path, f"{line} --cacert ca.pem").status == 60
        given = f"export CURL_CA_BUNDLE=ca.pem\n{line} --cacert ca.pem"
        assert joined(tmp_path, given).status == 0
        authority.issue(tmp_path)
        renewed(server)
        assert beaten(tmp_path, f"{line} --cacert ca.pem").status == 0
        assert not [line for line in server.log if re.search("ERROR|WARNING", line)]


POLICIES = {  # options, whether the authority is known; what is pinned, whether there is a warning
    "auto": ("", True, "", False),
    "auto, by who does not know the authority": ("", False, "own", True),
    "auto, for another host": ("--public-url https://other.lan", True, "own", True),
    "auto, for its host by a path": ("--public-url https://enroll.lan:8443/hosts", True, "", False),
    "auto, for an address": ("--public-url https://[::1]:8443", True, "", False),
    "always": ("--pin always", True, "own", False),
    "always, with the next": (f"--pin always --next-pin {PINS[0]}", True, f"own;{PINS[0]}", False),
    "auto, with the next by its file": ("--next-pin next.crt", False, f"own;{PINS[0]}", True),
    "its own as the next": ("--pin always --next-pin tls.crt", True, "own", False),
    "never": ("--pin never", False, "", False),
    "auto, with a next that is not needed": ("--next-pin next.crt", True, "", False),
}


@pytest.mark.parametrize("way", sample({"own": "own", "a proxy's": "a proxy's"}, "a proxy's"))
@pytest.mark.parametrize(
    "words, is_known, pins, is_warned",
    sample(POLICIES, "auto, for another host", "auto, for an address", "always, with the next"),
)
def test_join_commands_pin_by_the_policy_of_serve(
    words, is_known, pins, is_warned, way, authority, operator, monkeypatch, caplog
):
    files = authority.issue(operator.folder)
    (operator.folder / "next.crt").write_text(certificate_of("one"))
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file if is_known else "/nowhere"))
    if way == "a proxy's":
        files = ("--tls-pin-cert", files[1])
        words += "" if "--public-url" in words else " --public-url https://enroll.lan"
    key = hostenroll.read_certificate(chain_of(operator.folder)[0]).pin
    session = session_of(operator, "serve", "--port", "0", *files, *words.split())
    with operator.world() as world:
        with hostenroll.listen(session, world.registry) as server:
            place = session.arguments.public_url or server.url
            assert server.url.startswith("https:" if way == "own" else "http:")
        world.registry.perform(Call(hostenroll.START_SERVICE, values={"url": place}), 5)
    assert [("shuts agents out" in line) for line in caplog.messages] == [True] * is_warned
    pins = pins.replace("own", key)
    shown = operator.json("agent-command")
    assert (shown["publicUrl"], shown["pin"]) == (place, pins or None)
    printed = operator("agent-command")
    assert printed.out == f"{shown['agentCommand']}\n" and "--install" in printed.out
    assert printed.err.count("\n") == 1
    asked = re.split(' "?https', printed.out)[0]  # of curl
    assert asked.endswith(f"-k --pinnedpubkey {quoted(pins)}" if pins else "--proto =https")
    words = shlex.split(printed.out)
    assert ("-k" in words[2].split(), "--pin" in words) == (bool(pins), bool(pins))
    assert not pins or words[words.index("--pin") + 1] == pins
    assert shlex.split(operator("mint-token").err.split("the host:\n")[1])[8:-2] == words[4:-1]


def quoted(pins):
    return f'"{pins}"' if ";" in pins else pins


def test_a_certificate_that_signs_itself_is_pinned_and_renewing_it_is_warned_of(operator, caplog):
    files = write_pair(operator.folder)
    words = ("serve", "--port=0", f"--tls-cert={files[0]}", f"--tls-key={files[1]}")
    with operator.world() as world:
        with hostenroll.listen(session_of(operator, *words), world.registry) as server:
            world.registry.perform(Call(hostenroll.START_SERVICE, values={"url": server.url}), 5)
    assert operator.json("agent-command")["pin"] == PINS[0]
    (warning,) = caplog.messages
    assert "self-signed" in warning and "--next-pin" in warning


BAD_NEXT = {  # --next-pin, a part of the line
    "no file": ("nowhere", "cannot read nowhere"), "a folder": (".", "not a file"),
    "a key": ("tls.key", "no PEM certificate in tls.key"),
    "two pins": (BOTH, "cannot read sha256//"), "half a pin": (PINS[0][:-1], "cannot read sha256"),
}  # fmt: skip


@pytest.mark.parametrize("text, complaint", table(BAD_NEXT))
def test_a_next_pin_that_is_none_starts_no_server(text, complaint, operator):
    files = write_pair(operator.folder)
    serve = ("serve", "--port=0", f"--tls-cert={files[0]}", f"--tls-key={files[1]}")
    session = session_of(operator, *serve, f"--next-pin={text}")
    with operator.world() as world:
        with pytest.raises(hostenroll.OperatorError, match=complaint):
            hostenroll.listen(session, world.registry)


@needs_openssl
def test_a_broken_certificate_at_sighup_changes_neither_pin_nor_trust(operator, authority):
    files = authority.issue(operator.folder)
    session = session_of(operator, "serve", "--port=0", "--pin=always", *files)
    with operator.world() as world:
        with hostenroll.listen(session, world.registry) as server:
            before = world.registry.service.certificate
            for text in ("", "nonsense", certificate_of("one").replace("MII", "MIJ", 1)):
                (operator.folder / "tls.crt").write_text(text)
                with pytest.raises(hostenroll.OperatorError):
                    server._load_tls()
                assert world.registry.service.certificate == before


def test_a_server_that_cannot_load_its_certificate_leaves_its_port_to_others(operator):
    files = write_pair(operator.folder)
    Path(files[0]).write_text("")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = ("serve", f"--port={port}", f"--tls-cert={files[0]}", f"--tls-key={files[1]}")
    with operator.world() as world:
        with pytest.raises(hostenroll.OperatorError, match="no PEM certificate"):
            hostenroll.listen(session_of(operator, *serve), world.registry)
    hostenroll.listening_socket("127.0.0.1", port).close()


@pytest.mark.parametrize("words, is_warned", [
    ("--host 0.0.0.0", True), ("--host ::", True), ("--host 127.0.0.1", False),
    ("--host 0.0.0.0 --public-url http://enroll.lan", False),
])  # fmt: skip
def test_a_url_with_a_hostname_that_nobody_has_chosen_is_warned_of(
    words, is_warned, operator, caplog
):
    session = session_of(operator, "serve", "--port", "0", *words.split())
    with operator.world() as world:
        with hostenroll.listen(session, world.registry) as server:
            hostenroll.greet(session, server)
            assert (socket.gethostname() in server.url) == ("127" not in words)
    lines = [line for line in caplog.messages if "hostname" in line]
    assert len(lines) == is_warned and all("--public-url" in line for line in lines)


@slow
def test_after_sighup_mint_token_prints_the_new_pin(tmp_path):
    with start_server(tmp_path, how="process", tls=True) as server:
        write_pair(tmp_path, "other")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: pin_of("other") in printed_command(tmp_path))
        (tmp_path / "tls.key").write_text("nonsense")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: any("ERROR" in line for line in server.log))
        assert pin_of("other") in printed_command(tmp_path)


@slow
@needs_openssl
@needs_curl
def test_the_certificate_that_make_cert_makes_serves(tmp_path):
    names = ("--name", "enroll.lan", "--name", "127.0.0.1", "--name", "::1")
    made = run_apart(tmp_path, "make-cert", *names)
    assert (made.status, made.out) == (0, ""), made.err
    [command] = re.findall("serve --tls-cert .*", made.err)
    key, certificate = tmp_path / "hostenroll-tls.key", tmp_path / "hostenroll-tls.crt"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (key, certificate)] == [0o600, 0o644]
    shown = in_shell(f"openssl x509 -noout -text -in {certificate}", tmp_path).out
    names = re.search(r"Subject Alternative Name:[^\n]*\n *([^\n]*)", shown)
    assert names[1] == "DNS:enroll.lan, IP Address:127.0.0.1, IP Address:0:0:0:0:0:0:0:1"
    assert "NIST CURVE: P-256" in shown and "ecdsa-with-SHA256" in shown
    extensions = re.findall(r"X509v3 ([^:]*): (critical)?\n *([^\n]*)", shown)
    assert {*extensions[:3]} == {  # whoever trusts it trusts its key for these names alone
        ("Basic Constraints", "critical", "CA:FALSE"),
        ("Key Usage", "critical", "Digital Signature"),
        ("Extended Key Usage", "", "TLS Web Server Authentication"),
    }

    def asked(name):
        url = f"https://{name}:{server.port}/readyz"
        options = ("--cacert", str(certificate), "--resolve", f"{name}:{server.port}:127.0.0.1")
        return curl(*options, url).status

    with start_server(tmp_path, *command.split()[1:], how="process") as server:
        assert [asked("enroll.lan"), asked("127.0.0.1")] == [200, 200]
        with pytest.raises(subprocess.CalledProcessError) as stranger:
            asked("other.lan")
        assert stranger.value.returncode == 60
        context = ssl.create_default_context(cafile=str(certificate))
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        with socket.create_connection(("127.0.0.1", server.port)) as plain:
            context.wrap_socket(plain, server_hostname="enroll.lan").close()
        enrolled = joined(tmp_path, printed_command(tmp_path))
        assert enrolled.status == 0 and "enrolled as host" in enrolled.err


UNMADE = {  # a file that is there, more words, what the line has
    "a key": ("hostenroll-tls.key", "", "is there already"),
    "a certificate": ("hostenroll-tls.crt", "", "is there already"),
    "a link": ("a link", "", "is there already"),
    "no place for a certificate": ("", "--tls-cert nowhere/a.crt", ""),
    "no place for a key": ("", "--tls-key nowhere/a.key", ""),
}


@needs_openssl
@pytest.mark.parametrize("there, words, complaint", table(UNMADE))
def test_make_cert_overwrites_nothing_and_makes_both_or_none(there, words, complaint, operator):
    if there == "a link":
        (operator.folder / "hostenroll-tls.key").symlink_to("elsewhere")
    elif there:
        (operator.folder / there).write_text("precious")
    before = sorted(os.listdir(operator.folder))
    require_one_line(operator("make-cert", "--name", "enroll.lan", *words.split()), 1, complaint)
    assert sorted(os.listdir(operator.folder)) == before
    assert there in ("", "a link") or (operator.folder / there).read_text() == "precious"


@needs_openssl
@pytest.mark.parametrize("umask", [0, 0o777])
def test_what_make_cert_makes_has_its_mode_whatever_the_umask(umask, operator):
    before = os.umask(umask)
    try:
        made = operator("make-cert", "--name", "enroll.lan")
    finally:
        os.umask(before)
    paths = (operator.folder / f"hostenroll-tls.{end}" for end in ("key", "crt"))
    assert made.status == 0 and [owned(path)[2] for path in paths] == [0o600, 0o644]


# fmt: off
BAD_OPENSSL = {  # a program, and what is made of its end
    "none": (None, "the openssl program cannot be run (No such file or directory): make a pair on "
                   "another machine"),
    "one that cannot be run": ("#!/nowhere\n", "the openssl program cannot be run"),
    "a reason": ("#!/bin/sh\necho 'no entropy' >&2; exit 1", ": no entropy\n"),
    "no reason": ("#!/bin/sh\nprintf '..+..\\n-----\\n' >&2; exit 3", ": openssl ended with 3\n"),
    "a reason before dashes": ("#!/bin/sh\nprintf 'no entropy\\n-----\\n' >&2; exit 1",
                               ": no entropy\n"),
    "half a pair": ("#!/bin/sh\nprintf -- '-----BEGIN CERTIFICATE-----\\nx\\n'", "ended with 0\n"),
}
# fmt: on


@pytest.mark.parametrize("program, complaint", table(BAD_OPENSSL))
def test_a_failing_openssl_is_one_line_and_leaves_nothing(
    program, complaint, operator, monkeypatch
):
    folder = operator.folder / "bin"
    folder.mkdir()
    if program:
        (folder / "openssl").write_text(program)
        (folder / "openssl").chmod(0o644 if "nowhere" in program else 0o755)
    monkeypatch.setenv("PATH", str(folder))
    for _ in range(2):  # the second finds nothing of the first
        failed = operator("make-cert", "--name", "enroll.lan")
        require_one_line(failed, 1, "cannot make a certificate: ")
        assert complaint in failed.err and os.listdir(operator.folder) == ["bin"]


# Behind nginx, as the README has it configured.

[NGINX_CONF] = re.findall(r"^```nginx\n(worker_processes .*?)^```$", README, re.M | re.S)


@contextlib.contextmanager
def behind_nginx(folder, listener, *ports):
    """nginx, as the README has it configured, on a socket of ours: a door through it to servers on
    ports of this machine."""
    pair, text = write_pair(folder), NGINX_CONF
    for old, new in (
        ("127.0.0.1:8081", f"127.0.0.1:{ports[0]}"), ("127.0.0.1:8082", f"127.0.0.1:{ports[1]}"),
        ("listen 443 ssl backlog=4096", f"listen 127.0.0.1:{listener.getsockname()[1]} ssl"),
        ("/etc/ssl/enroll.crt", pair[0]), ("/etc/ssl/enroll.key", pair[1]),
        ("/var/log/nginx", str(folder)), ("worker_processes auto", "worker_processes 1"),
        ("http {", f"http {{ client_body_temp_path {folder}/bodies;"),
    ):  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(f"daemon off; user root; pid {folder}/nginx.pid;\n{text}")
    log, descriptor = str(folder / "error.log"), listener.fileno()
    nginx = subprocess.Popen(
        [NGINX, "-p", str(folder), "-e", log, "-c", str(folder / "nginx.conf")],
        env={**os.environ, "NGINX": f"{descriptor};"}, pass_fds=[descriptor],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield SocketDoor(listener.getsockname()[1], tls=trusting())
    finally:
        nginx.terminate()
        nginx.wait(10)


@slow
@needs_nginx
@needs_root
def test_two_servers_behind_nginx_are_restarted_and_no_request_is_lost(bound, tmp_path):
    options = ("--trusted-proxy", "127.0.0.1", "--public-url", "https://enroll.lan")
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(start_server(tmp_path, *options, how="process")) for _ in range(2)
        ]
        ports = [server.port for server in servers]
        door = stack.enter_context(behind_nginx(tmp_path, bound, *ports))
        load, restarts = Load(door, beat_of(servers[0])), 0
        while len(load.answered) < 30_000 and not load.failures:
            for n, port in enumerate(ports):
                assert servers[n].terminate() == 0
                again = start_server(tmp_path, *options, "--port", str(port), how="process")
                servers[n] = stack.enter_context(again)
                restarts += 1
                time.sleep(0.5)
        load.require_none_lost(30_000)
        assert restarts >= 4
        [host] = servers[0].hosts().document["hosts"]
        assert host["status"] == "online"


@slow
@needs_nginx
@needs_root
def test_nginx_asks_another_server_for_a_heartbeat_and_for_no_enrollment(bound, tmp_path):
    """An enrollment that was lost may have been done. The agent asks again itself."""
    answer, asked = b"HTTP/1.1 503 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", []
    with contextlib.ExitStack() as stack:
        stubs = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]

        def serve(stub):
            with contextlib.suppress(OSError):
                while True:
                    peer, _ = stub.accept()
                    asked.append(peer.recv(65536).split()[1])
                    peer.sendall(answer)
                    peer.close()

        for stub in stubs:
            threading.Thread(target=serve, args=(stub,), daemon=True).start()
        ports = [stub.getsockname()[1] for stub in stubs]
        door = stack.enter_context(behind_nginx(tmp_path, bound, *ports))
        for path in ("/api/agent/heartbeat", "/api/agent/enroll"):
            peer = stack.enter_context(door.connect())
            peer.sendall(request_bytes("POST", path, {"a": "b"}))
            assert peer.recv(65536).startswith(b"HTTP/1.1 503 ")
        assert asked == [b"/api/agent/heartbeat"] * 2 + [b"/api/agent/enroll"]
        for stub in stubs:
            stub.shutdown(socket.SHUT_RDWR)


# systemd.


@pytest.mark.parametrize("kind", ["path", pytest.param("abstract", marks=slow)])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="abstract sockets are Linux's")
def test_systemd_is_notified_of_how_the_service_is(kind, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("" if kind == "abstract" else str(tmp_path / "notify"))  # "": the kernel's own
        manager.settimeout(10)
        name = manager.getsockname()
        environment = {"NOTIFY_SOCKET": name if kind == "path" else f"@{name[1:].decode()}"}
        with start_server(tmp_path, how="process", env=environment) as server:
            assert manager.recv(4096) == b"READY=1"
            server.process.send_signal(signal.SIGHUP)
            assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=[0-9]+", manager.recv(4096))
            assert manager.recv(4096) == b"READY=1"
            assert server.terminate() == 0
            assert manager.recv(4096) == b"STOPPING=1"


def test_a_service_manager_that_is_not_there_is_done_without(tmp_path):
    environment = {"NOTIFY_SOCKET": str(tmp_path / "nowhere")}
    with start_server(tmp_path, how="process", env=environment) as server:
        server.process.send_signal(signal.SIGHUP)
        until(lambda: sum("READY=1" in line for line in server.log) == 2)
        assert server.call("GET", "/healthz").status == 200
        assert server.terminate() == 0
    complaints = [line for line in server.log if "service manager" in line]
    states = [re.search("[A-Z]+(?==1)", line)[0] for line in complaints]
    assert states == ["READY", "RELOADING", "READY", "STOPPING"]
    assert all(re.match(r"\S+Z WARNING ", line) for line in complaints)
    assert not re.search("USEC|Traceback", "".join(server.log))


# Runs a command as systemd does: with sockets from descriptor 3 on, and its own process id.
ACTIVATOR = """
import fcntl, os, sys
given, (count, process, *command) = eval(sys.argv[1]), sys.argv[2:]
copies = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 100) for descriptor in given]
os.closerange(3, 10)
for place, copy in enumerate(copies):
    os.dup2(copy, 3 + place)
os.environ.update(LISTEN_FDS=count, LISTEN_PID=process or str(os.getpid()))
os.execv(command[0], command)
"""


def activated(given, count="", process="", program=PROGRAM):
    """The program of a server that is handed sockets, and how Popen hands them on."""
    descriptors = [one.fileno() for one in given]
    words = ["-c", ACTIVATOR, repr(descriptors), count or str(len(given)), process]
    return {"program": [sys.executable, *words, *program], "pass_fds": descriptors}


@pytest.fixture
def bound():
    """What systemd has bound; a connection waits there before there is a server."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield listener


@pytest.mark.parametrize("tls", [pytest.param(False, marks=slow), True], ids=["http", "https"])
def test_a_socket_of_systemd_is_served_and_who_waits_there(tls, bound, tmp_path):
    port, statuses = bound.getsockname()[1], []
    waiting = SocketDoor(port, tls=trusting() if tls else None)
    early = threading.Thread(target=lambda: statuses.append(waiting.call("GET", "/healthz").status))
    early.start()
    given = activated([bound], program=SCRIPT)  # as systemd starts it
    with start_server(tmp_path, how="process", tls=tls, **given) as server:
        assert server.url == waiting.url
        early.join(10)
        assert statuses == [200] and server.call("GET", "/readyz").status == 200


NOT_OURS = {  # the process that the socket is for, and how many
    "another process": (str(os.getpid()), "1"),
    "no process": ("x", "1"),
    "no sockets": ("", "0"),
}
UNSERVED = {  # the sockets that are handed over, as arguments of socket(), and whether they listen
    "two sockets": ([(socket.AF_INET, socket.SOCK_STREAM)] * 2, True),
    "a UDP socket": ([(socket.AF_INET, socket.SOCK_DGRAM)], False),
    "a local socket": ([(socket.AF_UNIX, socket.SOCK_STREAM)], True),
    "one that does not listen": ([(socket.AF_INET, socket.SOCK_STREAM)], False),
    "nothing": ([], False),
}


@pytest.mark.parametrize("process, count", sample(NOT_OURS, "another process"))
def test_a_socket_that_is_not_for_us_is_let_be(process, count, bound, tmp_path):
    given = activated([bound], count, process)
    with start_server(tmp_path, how="process", **given) as server:
        assert server.port != bound.getsockname()[1]


@pytest.mark.parametrize("kinds, listens", sample(UNSERVED, "a local socket"))
def test_a_socket_that_cannot_be_served_is_one_line(kinds, listens, tmp_path):
    with contextlib.ExitStack() as stack:
        given = [stack.enter_context(socket.socket(*kind)) for kind in kinds]
        for one in given:
            local = one.family == socket.AF_UNIX
            one.bind(str(tmp_path / "local") if local else ("127.0.0.1", 0))
            if listens:
                one.listen(1)
        handed = activated(given, "" if given else "1")
        require_one_line(run_apart(tmp_path, "serve", "--port=0", **handed), 1, "service manager")


needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)
ODD_FOLDER = "with a blank, 100%i and $HOME"


@pytest.fixture(scope="module")
def units(tmp_path_factory):
    """The program in a folder of an odd name, and the units that it prints there."""
    folder = tmp_path_factory.mktemp("units")
    program = folder / ODD_FOLDER / "hostenroll.py"
    program.parent.mkdir()
    shutil.copy(MODULE, program)
    python = folder / ODD_FOLDER / "python"
    python.symlink_to(os.path.realpath(sys.executable))
    printing = []
    for name, words in (
        ("hostenroll.service", (sys.executable, program, "unit")),
        ("hostenroll.socket", (sys.executable, program, "unit", "--socket")),
        ("odd.service", (python, program, "unit")),
        ("dynamic.service", (sys.executable, program, "unit", "--dynamic-user")),
    ):
        with (folder / name).open("wb") as file:
            printing.append(subprocess.Popen(words, stdout=file))
    assert [process.wait() for process in printing] == [0] * 4
    return folder


def analyze(units, *words):
    command = ["systemd-analyze", *words]  # which writes UTF-8 in any locale
    done = subprocess.run(command, cwd=units, capture_output=True, timeout=60, check=False)
    return (done.stdout + done.stderr).decode("utf-8")


@slow
@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_units(units):
    names = ["hostenroll.service", "hostenroll.socket", "odd.service", "dynamic.service"]
    found = analyze(units, "verify", "--man=no", *(str(units / name) for name in names))
    assert [line for line in found.splitlines() if re.search("hostenroll|odd|dyn", line)] == []


def test_the_service_is_started_again_until_it_runs(units):
    """An address or a key file may arrive long after the boot. A usage error ends it."""
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str
    unit.read_string((units / "hostenroll.service").read_text())
    for name in ("After", "Wants"):
        assert unit["Unit"][name] == "network-online.target"
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    service = {name: unit["Service"][name] for name in unit["Service"] if "Restart" in name}
    prevented = str(hostenroll.EXIT_USAGE)
    assert service == {
        "Restart": "on-failure", "RestartSec": "2", "RestartPreventExitStatus": prevented,
    }  # fmt: skip


USERS = {  # the uid of a user hostenroll, and whether it must still be made
    "none": (None, True), "a system user": (998, False),
    "one that systemd made for the service that runs": (61234, True),
}  # fmt: skip


@pytest.mark.parametrize("uid, is_missing", table(USERS))
def test_the_service_runs_as_a_user_that_the_operator_makes(uid, is_missing, operator, monkeypatch):
    def look_up(name):
        if uid is None:
            raise KeyError(name)
        return SimpleNamespace(pw_uid=uid)

    monkeypatch.setattr(hostenroll.pwd, "getpwnam", look_up)
    printed, dynamic = operator("unit"), operator("unit", "--dynamic-user")
    differences = set(printed.out.splitlines()) ^ set(dynamic.out.splitlines())
    assert differences == {"User=hostenroll", "DynamicUser=yes"}
    missing = re.findall(r"no user hostenroll .*: (.*)", printed.err)
    assert "no user" not in dynamic.err and len(missing) == is_missing
    assert not missing or re.match("useradd --system .* hostenroll$", missing[0])


def test_the_service_runs_the_program_wherever_it_lies(units):
    unit = (units / "hostenroll.service").read_text()
    start = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    program = units / ODD_FOLDER / "hostenroll.py"
    # systemd.unit(5) has specifiers, which % begins, and systemd.service(5) variables.
    words = [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(start[1])]
    assert words == [sys.executable, str(program), "serve"]
    assert start[1].count("%") == start[1].count("%%") * 2 == 2
    assert "\nSyslogIdentifier=hostenroll\n" in unit  # not the interpreter's name
    typed = re.search(r"^# .*: sudo (.*)$", unit, re.MULTILINE)
    assert shlex.split(typed[1])[:3] == [sys.executable, str(program), "mint-token"]


@needs_systemd
def test_the_service_may_do_little(units):
    found = analyze(units, "security", "--offline=true", str(units / "hostenroll.service"))
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", found)
    if exposure is None:
        pytest.skip("this systemd-analyze knows no --offline")
    assert float(exposure[1]) < 2


# Logs.


def some_life(door):
    """An enrollment, three beats, a revocation and what follows it; the secrets in it."""
    token = door.token()
    enrolled = door.enroll(token).document
    host, credential = enrolled["hostId"], enrolled["credential"]
    assert [door.beat(credential).status for _ in range(3)] == [200] * 3
    assert door.revoke(host).status == 200
    refused = [door.enroll(token), door.beat(credential)]
    assert [reply.code for reply in refused] == ["token-used", "host-revoked"]
    for secret in (token, credential, door.api_key):
        for place in ("", "api/hosts/", "api/hosts/tokens/x/", "healthz?x=", "api/hosts?q=", "/?"):
            door.call("GET", f"/{place}{secret}", bearer=secret)
        door.send(f"{secret} / HTTP/1.1\r\nHost: {secret}\r\n\r\n".encode())
    secrets = [text.split("_", 2)[2][:12] for text in (door.api_key, token)]
    for part in credential.split("."):
        secrets += part[:12], part[-12:]
    names = [reply.headers["x-request-id"] for reply in refused]
    return SimpleNamespace(host=host, refused=names, secrets=secrets)


@pytest.mark.parametrize(
    "access", [pytest.param(False, id="events alone", marks=slow), pytest.param(True, id="all")]
)
def test_json_logs_are_a_json_object_a_line(access, tmp_path):
    options = ("--log-format", "json", *(("--access-log",) if access else ()))
    strange = {"HOSTENROLL_DBB": "x"}
    with start_server(tmp_path, *options, how="process", env=strange) as server:
        life = some_life(server)
        listed = server.events("limit=1000").document["events"]
        assert server.terminate() == 0
    lines = [json.loads(line) for line in server.log]
    assert lines[0]["message"] == "HOSTENROLL_DBB in the environment sets nothing"
    assert lines[0]["level"] == "warning" and len(lines) > 5
    for line in lines:
        assert {"time", "level", "message"} <= set(line)
        assert set(line) <= {"time", "level", "message", "request", "event", "access"}
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert line["level"] in ("info", "warning", "error")
    events = {line["event"]["action"]: line for line in lines if "event" in line}
    assert {"mint", "enroll", "refuse", "revoke"} <= set(events)
    assert all(events[action]["event"] in listed for action in ("mint", "enroll", "revoke"))
    assert events["enroll"]["event"]["subject"] == f"host:{life.host}"
    named = {line["request"]: line["event"]["code"] for line in lines if "event" in line}
    assert [named[name] for name in life.refused] == ["token-used", "host-revoked"]
    accesses = [line["access"] for line in lines if "access" in line]
    beats = [access for access in accesses if access["path"] == "/api/agent/heartbeat"]
    assert [beat["status"] for beat in beats] == ([200, 200, 200, 403] if access else [])
    for beat in beats:
        assert set(beat) == {"address", "method", "path", "status", "bytes", "seconds"}
        assert beat["address"] == "127.0.0.1" and 0 <= beat["seconds"] < 60
    assert not any(secret in "".join(server.log) for secret in life.secrets)


def test_text_logs_are_a_line_for_each_event(tmp_path):
    """Behind a proxy they name its clients."""
    options = ("--trusted-proxy", "127.0.0.1", "--access-log")
    with start_server(tmp_path, *options, how="process") as server:
        life = some_life(server)
        for headers in ([("X-Forwarded-For", "198.51.100.7")], []):
            assert server.call("GET", "/livez", headers=headers).status == 404
        assert server.terminate() == 0
    lines = server.log[2:]
    for line in lines:
        assert re.match(r"\d{4}-\d\d-\d\dT[0-9:.]+Z (INFO|WARNING|ERROR) \S", line), line
    text = "".join(lines)
    assert f" enroll host:{life.host} by " in text and f" revoke host:{life.host} by " in text
    for name, code in zip(life.refused, ("token-used", "host-revoked")):
        assert re.search(rf"refuse .*: {code} \[{name}\]\n", text)
    assert len(re.findall(r"POST /api/agent/heartbeat 200 \d+ B [0-9.]+ s \[", text)) == 3
    assert re.findall(r"(\S+) GET /livez ", text) == ["198.51.100.7", "127.0.0.1"]
    assert not any(secret in text for secret in life.secrets)


@pytest.fixture
def log_pipe(monkeypatch):
    """Starts a log on a small pipe: its handler, and the pipe's other end as a stream."""
    with contextlib.ExitStack() as stack:

        def start(is_json=False, is_journal=False):
            ends = zip(os.pipe(), "rw")
            reader, writer = (stack.enter_context(open(end, mode)) for end, mode in ends)
            fcntl.fcntl(writer, 1031, 4096)  # F_SETPIPE_SZ has no name before Python 3.10
            monkeypatch.setattr(sys, "stderr", writer)
            status = os.fstat(writer.fileno())
            stream = f"{status.st_dev}:{status.st_ino}" if is_journal else f"{status.st_dev}:1"
            handler = hostenroll.LogHandler(is_json, {"JOURNAL_STREAM": stream})
            stack.callback(handler.close)
            return handler, reader

        yield start


def log_record(text, level=logging.INFO, error=None):
    return logging.LogRecord("hostenroll", level, "", 0, text, (), error)


def messages_of(lines, is_json=False):
    return [json.loads(line)["message"] if is_json else line.split(" ", 2)[2] for line in lines]


@pytest.mark.parametrize("is_json", [False, True], ids=["text", "json"])
def test_a_log_that_nobody_reads_is_bounded_and_tells_where_lines_are_missing(
    is_json, log_pipe, monkeypatch
):
    monkeypatch.setattr(hostenroll, "LOG_MAXIMUM", 20_000)
    handler, reader = log_pipe(is_json)
    for n in range(2000):
        handler.emit(log_record(f"line {n}"))
    counted, read, after = handler.counts["log_lines_dropped"], 0, 0
    assert counted > 500
    while after < 2000:
        [text] = messages_of([reader.readline().rstrip("\n")], is_json)
        missing = re.fullmatch(
            r"(\d+) lines of the log are missing here: its reader was slow", text
        )
        assert missing or text == f"line {after}"
        after += int(missing[1]) if missing else 1
        read += not missing
    assert after == 2000 == counted + read
    handler.emit(log_record("and on"))
    handler.close()
    assert messages_of([reader.readline().rstrip("\n")], is_json) == ["and on"]


def test_a_log_goes_on_after_an_error_and_writes_whole_lines(log_pipe, monkeypatch):
    """A pipe takes 4 KiB whole, and nothing of others in between; a longer line is one write."""
    handler, reader = log_pipe()
    write, written, errors = os.write, [], [errno.ENOSPC, errno.EIO, errno.EAGAIN]

    def fail_first(descriptor, data):
        if errors:
            raise OSError(errors.pop(), "no")
        written.append(bytes(data))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", fail_first)
    for count in range(1, 4):
        handler.put("lost")
        until(lambda count=count: handler.counts["log_lines_dropped"] == count)
    sizes = [1, 3000, 1090, 20, 9000, 1, *[40] * 300]
    for size in sizes:
        handler.put("x" * size)
    assert [len(reader.readline()) - 1 for _ in sizes] == sizes
    handler.close()
    assert handler.counts["log_lines_dropped"] == 3
    assert all(data.endswith(b"\n") for data in written)
    assert [len(data) for data in written if len(data) > 4096] == [9001]
    assert len(written) < 20


@pytest.mark.parametrize("is_json", [False, True], ids=["text", "json"])
def test_the_journal_gets_the_level_of_each_line_and_keeps_its_time(is_json, log_pipe):
    handler, reader = log_pipe(is_json, is_journal=True)
    try:
        raise ValueError("defect")
    except ValueError:
        error = sys.exc_info()
    handler.emit(log_record("fine"))
    handler.emit(log_record("look", logging.WARNING))
    handler.emit(log_record("broken", logging.ERROR, error))
    handler.put("of two\nlines")
    handler.close()
    sys.stderr.close()
    lines = [(line[:3], line[3:].rstrip("\n")) for line in reader]
    assert lines[-2:] == [("<6>", "of two"), ("<6>", "lines")]
    assert [level for level, _ in lines[:3]] == ["<6>", "<4>", "<3>"]
    assert {level for level, _ in lines[3:-2]} == (set() if is_json else {"<3>"})
    texts = [text for _, text in lines[:3]]
    if is_json:
        texts = [json.loads(text) for text in texts]
        assert all("time" in document for document in texts)
        texts = [document["message"] for document in texts]
    assert texts == ["fine", "look", "broken"]
    assert is_json or lines[-3] == ("<3>", "ValueError: defect")


@slow
def test_in_the_journal_every_line_of_a_server_has_a_level(tmp_path):
    reader, writer = os.pipe()
    status = os.fstat(writer)
    environment = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}", "HOSTENROLL_DBB": "x"}
    with open(reader) as stream:
        server = subprocess.Popen(
            [*PROGRAM, "serve", "--port", "0"], cwd=str(tmp_path), stderr=writer,
            env={**clean_environment(), **environment},
        )  # fmt: skip
        os.close(writer)
        lines = [stream.readline() for _ in range(3)]
        server.terminate()
        assert server.wait(10) == 0
        lines += stream
    assert lines[0] == "<4>HOSTENROLL_DBB in the environment sets nothing\n"
    assert all(re.match("<[46]>[a-zA-Z]", line) for line in lines)


def test_a_defect_has_its_traceback_in_both_formats():
    try:
        raise ValueError("defect")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "it broke", (), sys.exc_info())
    text, line = (hostenroll.LogHandler(is_json).format(record) for is_json in (False, True))
    assert re.search(r"Z ERROR it broke\nTraceback .*\nValueError: defect$", text, re.DOTALL)
    assert "\n" not in line and "ValueError: defect" in json.loads(line)["traceback"]


NASTY = ["\n2027 INFO forged", "\r", "\x1b[31m", "\x00", "\u202e", "\u2028", "\x85", "\ud800"]


@pytest.mark.parametrize("format", ["text", pytest.param("json", marks=slow)])
def test_nothing_that_a_peer_makes_breaks_a_line_of_the_log(format, tmp_path):
    """Whether it comes in a path, a header or a body."""
    with start_server(tmp_path, "--access-log", "--log-format", format, how="process") as server:
        for nasty in NASTY:
            raw = nasty.encode("utf-8", "surrogatepass")
            escaped = "".join(f"%{byte:02X}" for byte in raw)
            assert server.call("GET", f"/x{escaped}").status == 404
            token = server.token()
            server.enroll(token, f"web{nasty}")
            server.enroll(token, "web", name=nasty, os=nasty)
            for start in (b"GET /x%b HTTP/1.1\r\nHost: a", b"G%bT / HTTP/1.1\r\nHost: a",
                          b"GET / HTTP/1.1\r\nHost: a%b\r\nX: %b"):  # fmt: skip
                server.send(start.replace(b"%b", raw) + b"\r\n\r\n")
        long = "x" * 12_000
        assert server.call("GET", f"/{long}").status == 404
        assert server.call(long, "/").status == 501
        assert server.terminate() == 0
    for line in server.log:
        shown = line[:-1]
        assert not hostenroll.UNPRINTABLE.search(shown) and shown.isprintable(), shown
        assert len(shown) < 2000 and not shown.startswith(("2027", "ERROR"))
        if format == "json":
            assert not hostenroll.UNPRINTABLE.search(json.loads(line)["message"])


# bench.

SMALL = ("--hosts", "300", "--seconds", "1", "--connections", "8")


@contextlib.contextmanager
def benchmark(folder, *options, **more):
    """`bench` as a process in a folder of its own: its process, and a function that gives how it
    ended, after all its children have."""
    scratch = folder / "scratch"
    scratch.mkdir()
    environment = {**clean_environment(), "HOSTENROLL_TLS_CERT": "/nowhere", **more}
    process = subprocess.Popen(
        [*SCRIPT, "bench", *options], cwd=str(folder), env={**environment, "TMPDIR": str(scratch)},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip

    def children():
        return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()

    def end():
        out, err = process.communicate(timeout=60)
        with pytest.raises(ProcessLookupError):  # until none of its group is left
            until(lambda: os.killpg(process.pid, 0), 30)
        left = os.listdir(scratch)
        return SimpleNamespace(status=process.returncode, out=out, err=err, left=left)

    try:
        yield SimpleNamespace(process=process, children=children, end=end, scratch=scratch)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


TLS_WAY, KEPT_ALIVE = "TLS, a connection each", "kept alive"
WAYS = {  # options, whether there is an openssl program, the ways that are measured
    "both": ((), True, [TLS_WAY, KEPT_ALIVE]),
    "TLS alone": (("--tls",), True, [TLS_WAY]),
    "no openssl": ((), False, [KEPT_ALIVE]),
}


@slow
@needs_proc
@needs_openssl
@pytest.mark.parametrize("options, has_openssl, ways", table(WAYS))
def test_a_benchmark_measures_the_agents_way_first(options, has_openssl, ways, tmp_path):
    path = {} if has_openssl else {"PATH": ""}
    with benchmark(tmp_path, *SMALL, *options, "--json", **path) as bench:
        done = bench.end()
    assert (done.status, done.left) == (0, [])
    assert done.err == "" if has_openssl else "TLS is not measured: " in done.err
    document = json.loads(done.out)
    sizes = {name: document[name] for name in ("hosts", "seconds", "connections")}
    assert sizes == {"hosts": 300, "seconds": 1, "connections": 8}
    assert [result["way"] for result in document["results"]] == ways
    for result in document["results"]:
        assert result["perSecond"] > 20 and 5 < result["serverCpuMicroseconds"] < 20_000
        held = 0.7 * 1e6 / result["serverCpuMicroseconds"]
        for seconds in (30, 60):
            hosts = result[f"hostsAt{seconds}Seconds"]
            assert hosts == pytest.approx(held * seconds, rel=0.01)
    if len(ways) == 2:  # a handshake costs more than all the rest
        tls, kept = document["results"]
        assert tls["serverCpuMicroseconds"] > 2 * kept["serverCpuMicroseconds"]
        lines = cli(tmp_path, "bench", *SMALL).stdout.splitlines()
        assert lines[0].startswith("300 hosts, 8 connections; hosts: as many as 70% of a core")
        assert re.split("  +", lines[1])[-2:] == ["HOSTS AT 30 S", "HOSTS AT 60 S"]
        assert [re.split("  +", line)[0] for line in lines[2:]] == ways


def test_without_an_openssl_program_a_benchmark_over_tls_fails_at_once(tmp_path):
    failed = run_apart(tmp_path, "bench", "--tls", env={"PATH": "", "TMPDIR": str(tmp_path)})
    require_one_line(failed, 1, "the openssl program cannot be run")
    assert list(tmp_path.iterdir()) == []


def session_of(operator, *words):
    arguments = hostenroll.parse_arguments(words, {})
    surroundings = (operator.clock, clean_environment(), "hostenroll", hostenroll.Screen())
    return hostenroll.Session(arguments, arguments.command, *surroundings)


def test_the_hosts_of_a_benchmark_are_those_of_a_real_fleet(operator, monkeypatch):
    monkeypatch.setattr(hostenroll, "BENCH_BATCH", 40)
    session = session_of(operator, "bench", "--hosts", "100")
    requests = list(itertools.islice(hostenroll.make_fleet(session, str(operator.folder)), 200))
    hosts = operator.json("list-hosts")["hosts"]
    tokens = operator.json("list-tokens")["tokens"]
    assert len({host["hostname"] for host in hosts}) == len({host["id"] for host in hosts}) == 100
    assert sorted(token["uses"] for token in tokens) == [20, 40, 40]
    assert operator("verify-audit").err.startswith("events 1 to 103 ")
    with operator.world() as world:
        replies = [reply for request in requests for reply in world.tick([request])]
    beaten = [reply.document["hostId"] for reply in replies]
    ids = sorted(host["id"] for host in hosts)
    assert sorted(beaten[:100]) == sorted(beaten[100:]) == ids  # each once before any again
    assert beaten[:100] == beaten[100:] != ids


@slow
@needs_proc
@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_benchmark_that_is_interrupted_leaves_nothing(signal_name, tmp_path):
    for place in range(4):
        folder = tmp_path / str(place)
        folder.mkdir()
        with benchmark(folder, "--hosts", "2000", "--seconds", "60") as bench:
            until(lambda: list(bench.scratch.iterdir()), 30)
            if place:
                time.sleep(place * 0.4)  # in the middle of one thing or another
            else:
                until(bench.children, 30)
            bench.process.send_signal(getattr(signal, signal_name))
            done = bench.end()
        assert (done.status, done.out, done.err, done.left) == (130, "", "", []), place


@slow
@needs_proc
def test_when_the_server_of_a_benchmark_dies_that_is_one_line_and_nothing_is_left(tmp_path):
    with benchmark(tmp_path, *SMALL, "--seconds", "60") as bench:
        until(bench.children, 30)
        time.sleep(1)  # so that it is under load
        (server,) = bench.children()
        os.kill(int(server), signal.SIGKILL)
        done = bench.end()
    require_one_line(done)
    assert done.left == []


@needs_proc
def test_a_benchmark_that_measures_next_to_nothing_has_figures_all_the_same(operator, monkeypatch):
    """A processor's clock has ticks of 10 ms, and in less than one it divided by zero."""
    monkeypatch.setattr(hostenroll, "closed_loop", lambda *arguments: 0)
    session = session_of(operator, "bench", "--hosts", "100", "--seconds", "1")
    hostenroll.make_fleet(session, str(operator.folder))
    result = hostenroll.measure(session, str(operator.folder), iter(()), KEPT_ALIVE, ())
    assert result["perSecond"] == 1 and 0 < result["hostsAt30Seconds"] < 10_000


def test_a_certificate_that_only_openssl_can_read_stops_no_server(operator, monkeypatch):
    """At SIGHUP it would have ended the loop: only an OperatorError is a bad pair."""
    certificate, key = write_pair(operator.folder)
    words = ("serve", "--port", "0", "--tls-cert", certificate, "--tls-key", key)
    with operator.world() as world:
        with hostenroll.listen(session_of(operator, *words), world.registry) as server:
            monkeypatch.setattr(hostenroll, "timegm", lambda moment: int("no DER"))
            with pytest.raises(hostenroll.OperatorError, match="cannot read "):
                server._load_tls()
