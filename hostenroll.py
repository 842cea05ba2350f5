#!/usr/bin/env python3
"""hostenroll: decides who may join a fleet of machines, and knows which of them are alive.

One file, the standard library alone, for networks with no way out. Copy it onto a box and run it:

    python3 hostenroll.py serve             listens on 127.0.0.1:8080
    python3 hostenroll.py mint-token        prints an enrollment token

An agent, which may be curl in a shell script, exchanges the token, once, for a host record and
a credential; with the credential it beats, and the host is online:

    POST /api/agent/enroll        {"token": "het_...", "hostname": "web-1"}      201, a credential
    POST /api/agent/heartbeat     Authorization: Bearer <credential>             200, lastSeen

Words, each with one meaning, in code, SQL, API and command line alike:

    token         lets hosts in: once (or --max-uses times), before its hour
    API key       lets a person or a script use the user API
    credential    what an enrolled host holds and beats with: a JWT, HS256
    signing key   what signs credentials; lives in the key file, never in the database
    host          a machine that has enrolled
    organization  whose it is, by its slug
    revoke        shut out until restored; the row stays
    delete        gone; it must enroll anew, and its id never returns
    re-enroll     a token bound to an existing host: new credential, same id, name and history
    serial        the number of a credential among those issued to one host
    tick          one turn of the server's loop: one batch of requests, one transaction, one time
    event         what happened, as a row of the audit log

Contents; each section uses only those above it, and a test holds it to that:

     1. Limits         imports and every number, with its unit and its reason
     2. Problems       every refusal by name
     3. Shapes         what a body and a query may say, checked and described from one declaration
     4. Secrets        ids, tokens, API keys; the keyring and its file; the pin of a certificate
     5. Store          the schema and the only SQL; the lock between processes
     6. Registry       the rules: mint, enroll, beat, revoke, rotate; the audit log; refusals
     7. Messages       the strict HTTP/1.1 reader and its writer: bytes to values and back
     8. Assets         texts for people to copy; the agent, in shell; the page, for browsers
     9. Api            routes, and the documents that they answer with; metrics
    10. Server         the loop: sockets, TLS, deadlines, shutdown; a load for the benchmark
    11. Command line   COMMANDS and main()

Laws that the code keeps, each explained where it is kept:

    An answer is a promise: a tick is one transaction, and is answered only after its commit.
    Between processes there is one writer at a time, and it is also the only one to checkpoint.
    Nothing but SQLite opens the database while a connection is open.
    Nothing secret is in the database, in a log, or in a refusal.
    A refused request changes nothing; a refused enrollment never uses up a token.
    Status is computed, never stored.
    Parsing never touches a socket.
    Memory and time are bounded for whatever a peer sends.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and sys.argv[1:2] == ["serve"] and sys.platform == "linux":
    # Python keeps the syntax tree of its main script for as long as that runs, a quarter of an
    # idle server's memory. So a server starts over, as this process, with the code of this file
    # handed over compiled; and before anything else, which would be done twice.
    import contextlib
    import marshal
    import os
    from importlib.util import MAGIC_NUMBER

    # A system may forbid it, and a Python may not have it: then the memory stays taken.
    with contextlib.suppress(OSError, AttributeError):
        if sys.version_info >= (3, 10):
            started = sys.orig_argv
        else:
            with open("/proc/self/cmdline", "rb") as file:
                started = list(map(os.fsdecode, file.read().split(b"\0")[:-1]))
        options = [it for it in started[1 : len(started) - len(sys.argv)] if it != "--"]
        # Before Python 3.10 it may be a loader that was started, and told to start Python.
        is_known = all(it.startswith("-") for it in options[:1]) and len(started) > len(sys.argv)
        is_script = is_known and __spec__ is None  # or it is run by its name: -m, or -um
        if sys.executable and is_script and os.path.exists("/proc/self/fd"):
            code = os.memfd_create("hostenroll", 0)  # which what starts over inherits
            with open(code, "wb", closefd=False) as compiled:  # as a .pyc file is
                compiled.write(MAGIC_NUMBER + bytes(12) + marshal.dumps(sys._getframe().f_code))
            again = (
                "import sys; sys.path[:] = filter(None, sys.path); del sys.argv[0]; "  # not the cwd
                f"import os, runpy; main = runpy.run_path('/proc/self/fd/{code}')['main']; "
                f"os.close({code}); sys.exit(main())"
            )
            os.execv(sys.executable, [sys.executable, *options, "-c", again, *sys.argv])

import argparse
import base64
import binascii
import errno
import fcntl
import getpass
import hashlib
import hmac
import io
import ipaddress
import json
import logging
import math
import os
import random
import re
import resource
import secrets
import selectors
import shlex
import signal
import socket
import sqlite3
import ssl
import stat
import string
import threading
import time
import unicodedata
import zlib
from array import array
from bisect import bisect_left
from calendar import timegm
from collections import Counter, OrderedDict, deque
from contextlib import contextmanager, suppress
from email.utils import formatdate
from functools import lru_cache, partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import accumulate, chain, product, repeat, takewhile
from json.encoder import encode_basestring_ascii
from typing import (
    Any,
    BinaryIO,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
    TypeVar,
    Union,
    cast,
)
from urllib.parse import parse_qsl, quote, urlsplit

# 1. Limits
#
# Every number stands here, with its unit and its reason. Times in milliseconds where the name
# ends in _MS, else in seconds; sizes in bytes. Below them, how times, ids and the texts of
# peers are written.

__version__ = "0.1.0"

SECOND_MS = 1000
MINUTE, HOUR, DAY = 60, 3600, 86400

# Tokens and credentials.
TOKEN_TTL = HOUR  # long enough to walk to the machine
TOKEN_TTL_RANGE = (MINUTE, 30 * DAY)
TOKEN_USES_RANGE = (1, 1_000_000)
TOKEN_HOSTS_SHOWN = 1000  # of the hosts that came in by a token, the newest
CREDENTIAL_TTL_RANGE = (1, 3650 * DAY)
CREDENTIAL_GRACE = 7 * DAY  # a beat this long after expiry still counts and brings a renewal
REPLAY_WINDOW_MS = DAY * SECOND_MS  # how long a lost enrollment reply can be asked for again
SERIALS_LOST = 1_000_000  # with a restored backup; a forged serial beyond could never be outdone
KEY_FILE_MODE = 0o600
KEY_FILE_MAXIMUM = 1024 * 1024  # of keys, and of a certificate chain
TOKEN_KEPT = 30 * DAY  # after it has ended
TWINS_EXAMINED = 20  # hosts with one hostname: of a fleet of "localhost", the newest

# Heartbeats and status.
HEARTBEAT_INTERVAL = 30
HEARTBEAT_INTERVAL_RANGE = (1, DAY)
HEARTBEAT_SPREAD = 15  # per cent; each reply draws its interval: a fleet must not beat as one
MISSED_BEATS = 3  # this many intervals of silence, and the slack, are still online
ONLINE_SLACK = 10
MISSING_AFTER = 7 * DAY
ALIVE_EVERY = 10  # how often a server writes that it lives
ALIVE_GRACE = 25  # two such writes missed, and then some: no server lives
CLOCK_SLACK = 300  # a time that is further ahead is of a clock that has been set back since

# Lists. No request looks at more rows than this, and no tick at more than a slice of them, so that
# a heartbeat behind it waits about a millisecond.
PAGE_DEFAULT = 100
PAGE_MAXIMUM = 1000
ROWS_EXAMINED = 1000
SLICE = 100  # ROWS_EXAMINED are ten of them, and a page of PAGE_DEFAULT is one
PAGE_BYTES = 1024 * 1024  # of a page; the slice that goes over it is the last
READS_AT_ONCE = 16  # pages that come together in turns; the others wait, and hold nothing
COUNTED_AT_ONCE = 1000  # hosts, in one slice of a census: SQLite counts them by itself
CENSUS_KEPT = 5  # a census that took longer than one slice is good for so long
PRUNED_AT_ONCE = 500

# The audit log.
NOTES_MAXIMUM = 1000  # while nothing can be written; what comes then is summed up
REFUSALS_AUDITED = 60  # of one code, in a minute; the others are summed up in one event
AUDIT_KEEP_RANGE = (DAY, 36500 * DAY)

# Wrong secrets. None of them can be guessed: what is limited is the noise that they make.
FAILURES_ALLOWED = 20  # of one network, in a minute: a third of what the audit log lists
FAILING_REMEMBERED = 4096  # networks, about 0.3 KiB each; the one that began first is forgotten
NETWORK_BITS = 64  # of an IPv6 address: who has one of such a network has all of them

# Metrics: upper bounds of histogram buckets.
SECONDS_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)

# Backups.
BACKUP_PAGES = 256  # copied at once
BACKUP_PAUSE = 0.005  # after each, so that processor and disk are there for others too
BACKUP_NICENESS = 10

# HTTP messages.
HEAD_MAXIMUM = 16 * 1024
FIELDS_MAXIMUM = 100
PARAMETERS_MAXIMUM = 64
BODY_MAXIMUM = 64 * 1024
CHUNK_LINE_MAXIMUM = 256
CHUNK_OVERHEAD_MAXIMUM = 64 * 1024  # size lines and trailers together: tiny chunks are work
CHUNK_LINES_AT_ONCE = 32  # then others have their turn; about as much work as a request
REPEATS_MAXIMUM = 32  # of one parameter in a query: a host has no more labels
ERRORS_NAMED = 20  # in one refusal: a body may be wrong in ten thousand places
INTEGER_DIGITS = 19  # int() of a 64 KiB number takes tens of milliseconds before Python 3.11
HOPS_MAXIMUM = 16  # of trusted proxies, one behind the other
HEAD_CACHED_MAXIMUM = 2048  # a longer head is parsed each time
HEADS_CACHED = 1024  # times the above: 2 MiB, and as much again for what they parse to
CREDENTIALS_CACHED = 110_000  # 0.2 KiB each, 0.3 where all is long: 22 to 32 MiB
CREDENTIALS_KEPT_MS = HOUR * SECOND_MS  # in the cache: longer than most intervals
CREDENTIAL_MAXIMUM = 1024

# Connections. Each deadline class has one length, so its queue is in order by itself.
CONNECTIONS_MAXIMUM = 4096
BACKLOG = 4096  # the kernel lowers it to its own limit; a full queue costs honest peers seconds
DESCRIPTORS_SPARE = 64  # beside the connections: database, locks, log, selector
HANDSHAKE_DEADLINE = 10
HEAD_DEADLINE = 10
BODY_DEADLINE = 30
IDLE_DEADLINE = 75
ANSWER_DEADLINE = 30
LINGER_DEADLINE = 2
HANDSHAKE_MAXIMUM = 16 * 1024  # of the peer's; OpenSSL alone would hold 128 KiB of a hello
TLS_RECORD = 16384  # the longest plain text of one: RFC 8446 section 5.1
RECEIVE_SIZE = 4096  # a request fits; a larger buffer costs more to make than it saves
HELD_MAXIMUM = 32 * 1024 * 1024  # of unfinished and large requests and of untaken answers, together
ACCEPTS_PER_TURN = 128  # so that a flood of connections does not hold up those that stand
ACCEPT_PAUSE = 0.1  # when there are no descriptors to be had
REOPEN_PAUSE = 0.5  # between attempts at a database that has taken the place of ours
MEMORY_PAUSE = 0.1  # when there is no memory to be had: others may give some back
SHUTDOWN_DEADLINE = 4
FIRST_INHERITED = 3  # the descriptor of a socket that a service manager hands over

# The store.
LOCK_PATIENCE = 5
CLOSE_PATIENCE = 0.5  # with SHUTDOWN_DEADLINE less than the 5 s in which a server stops
LOCK_POLL = 0.001
RETRY_AFTER = 5
TROUBLE_OVER = 30  # so long without one more failure: what failed can be used again
CHECKPOINT_AFTER = 2048  # rows changed: as many pages, of heartbeats
CHECKPOINT_TIME = 0.04  # others wait for it, or for the disk; the quicker, the less often it comes
CHECKPOINT_DOUBLINGS = 3  # of CHECKPOINT_AFTER: some 16 MiB of WAL, of heartbeats
CHECKPOINT_REST = 512  # rows: so few are moved while everybody waits for the disk
WAL_MAXIMUM = 16 * 1024 * 1024  # of the file, when it has once been larger
PAGE_SIZE = 1024  # a heartbeat changes one row of 23 bytes, and writes the whole page of it twice
PAGE_CACHE_KIB = 7168

# What a terminal shows.
PROGRESS_AFTER = 1.0  # an act that takes no longer needs no word about it
PROGRESS_EVERY = 0.2
COLUMNS_DEFAULT = 80  # of a terminal that does not say
COMPLAINT_MAXIMUM = 1000  # characters
CERTIFICATE_DAYS_RANGE = (1, 36500)  # openssl counts beyond all calendars

# The benchmark.
BENCH_HOSTS, BENCH_HOSTS_RANGE = 100_000, (100, 10_000_000)
BENCH_SECONDS, BENCH_SECONDS_RANGE = 10, (1, 600)
BENCH_CONNECTIONS, BENCH_CONNECTIONS_RANGE = 64, (1, 1024)
BENCH_RATE_RANGE = (1, 100_000)  # heartbeats a second
BENCH_BATCH = 1000  # hosts made in one transaction; larger ones are no faster
BENCH_ENROLLED = 20_000  # hosts at most that enroll over HTTP, or half the fleet
BENCH_ENROLLED_A_SECOND = 2000  # of --seconds: a short benchmark is to be short
BENCH_BYTES_PER_HOST = 1024  # of disk: twice what was measured
BENCH_START, BENCH_POLL = 30, 0.02  # how long a server may take to listen, and a look at it
BENCH_SHARE = 0.7  # of what a full server answers: a fleet is to leave room for its bad days
BENCH_P99 = 0.050  # and answers that take longer are late
BENCH_BUSY = 0.9  # of a core, that server and load take together when nothing holds them up
BENCH_TRIES = 4  # of rates, each BENCH_SHARE of the one before, until one is answered in time
BENCH_TELL = 0.2  # between two signs of life
LOAD_PATIENCE = 10  # with a server that answers nothing, and with what is owed at the end
LATENCY_BUCKETS = tuple(1e-5 * 1.01**n for n in range(1852))  # 10 us to 1000 s, to one per cent

DEFAULT_ORGANIZATION = "default"
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8080
DEFAULT_DATABASE, DEFAULT_KEY_FILE = "hostenroll.db", "hostenroll.key"  # beside each other

log = logging.getLogger("hostenroll")
log.addHandler(logging.NullHandler())  # commands say what went wrong themselves, once

T = TypeVar("T")

# Whoever waits for a long act is told how much of it is done, of how much.
Report = Callable[[int, int], Any]


def unheard(done: int, total: int) -> None:
    """For an act that nobody waits for."""


# Control characters, line and paragraph separators, lone surrogates, and the marks that reorder
# text (Unicode TR 36, section 3.3): none may reach a terminal, a log or a page through a name.
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


# JSON in ASCII, without white space. json.dumps() would make an encoder for each text.
json_text = json.JSONEncoder(separators=(",", ":")).encode

FRACTIONS = [f".{n:03d}Z" for n in range(SECOND_MS)]  # of seconds: a list has thousands of times


def rfc3339(milliseconds: int) -> str:
    """Unix time in milliseconds as an RFC 3339 timestamp in UTC, with milliseconds and Z."""
    return _date_and_time(milliseconds // SECOND_MS) + FRACTIONS[milliseconds % SECOND_MS]


@lru_cache(maxsize=1024)  # a list has many times of few seconds
def _date_and_time(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


ID = re.compile(r"[0-7][0-9a-f]{15}")  # 63 bits: SQLite's integers have a sign
LAST_ID = (1 << 63) - 1


def id_text(number: int) -> str:
    """An id as the world sees it: 16 hexadecimal digits."""
    return f"{number:016x}"


def named(kind: str, number: int) -> str:
    """A thing by its kind and its id, as the audit log names actors and subjects."""
    return f"{kind}:{id_text(number)}"


def read_id(text: str) -> int:
    """The number of an id; -1, which nothing has, for what cannot be one."""
    return int(text, 16) if ID.fullmatch(text) else -1


# A token, an API key or a credential, whole or cut short, where somebody has put it by mistake: in
# the place of an id, of a hostname.
SECRET_SHAPED = re.compile(r"((?:het|hak)_[0-7][0-9a-f]{15}_|eyJ)[A-Za-z0-9_.-]+")


def concealed(text: str) -> str:
    """A text without the secrets that are in it; of a token or an API key the id stays."""
    return SECRET_SHAPED.sub(r"\1...", text)


def printable(text: str) -> str:
    """A peer's text made safe to show: no control characters, no secrets, and not long."""
    shown = UNPRINTABLE.sub("?", concealed(text))
    return shown if len(shown) <= 64 else f"{shown[:61]}..."


def printable_path(path: str) -> str:
    """A path made safe to show. What is longer than an id may be a secret in the wrong place."""
    return printable(re.sub("[^/]{33,}", lambda long: f"{long[0][:4]}...", path))


def span(seconds: float, minutes_from: int = 10) -> str:
    """A duration for people: 95 s, 12 min, 3 h, 8 d."""
    if seconds < minutes_from * MINUTE:
        return f"{round(seconds)} s"
    for unit, size, least in (("d", DAY, 2), ("h", HOUR, 2)):
        if seconds >= least * size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds // MINUTE:.0f} min"


# 2. Problems
#
# Every refusal has a name, and each name has one thing for the caller to do. A Problem is raised
# at the place that knows and rendered in one place (section 7); what a peer may read of it is in
# the document, and nothing else is.


class OperatorError(Exception):
    """A mistake or a trouble on the operator's side: one line that says what to do."""


class FieldError(NamedTuple):
    """One complaint about a body or a query: the member's name, and what is wrong with it."""

    field: str
    detail: str


class Problem(Exception):
    """A refusal: a problem document of RFC 9457, and the exit status 3 of a command."""

    status = 500
    code = "internal"
    title = "The server failed"
    remedy = "Try again later; the server's log says more."
    closes = False  # the connection cannot be used further: where the next message starts is lost
    challenge = ""  # the error attribute of WWW-Authenticate, RFC 6750 section 3
    names_errors = False  # has a list of what is wrong with a body or a query
    is_audited = False  # somebody asked for what is not theirs
    is_listed = True  # in the audit log by itself; else only in the sum of those like it
    retry_after = 0  # seconds until the caller may come again; 0: that is not said

    # What the audit log may know of it; peers never see it.
    actor = "anonymous"
    subject = ""
    organization: Optional[str] = None
    particulars: Mapping[str, Any] = {}

    def __init__(
        self,
        detail: str = "",
        *,
        errors: Sequence[FieldError] = (),
        headers: Sequence[Tuple[str, str]] = (),
    ) -> None:
        super().__init__(detail or self.remedy)
        self.detail = detail or self.remedy
        self.errors = tuple(errors[:ERRORS_NAMED])
        self._headers = tuple(headers)

    def concerning(
        self, actor: str, subject: str, organization: Optional[str], **particulars: Any
    ) -> Problem:
        """The same, with what the audit log may know of it."""
        self.actor, self.subject, self.organization = actor, subject, organization
        self.particulars = particulars
        return self

    def document(self) -> Dict[str, Any]:
        """The members of RFC 9457 section 3.1, then code, then errors for a body or a query."""
        document: Dict[str, Any] = {
            "type": f"urn:hostenroll:problem:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
        }
        if self.names_errors:
            document["errors"] = [error._asdict() for error in self.errors]
        return document

    def headers(self) -> Tuple[Tuple[str, str], ...]:
        """Header fields that the status asks for: RFC 9110 sections 11.6.1 and 10.2.3."""
        if self.status == HTTPStatus.UNAUTHORIZED:
            error = f', error="{self.challenge}"' if self.challenge else ""
            return (*self._headers, ("WWW-Authenticate", f'Bearer realm="hostenroll"{error}'))
        if self.retry_after:
            return (*self._headers, ("Retry-After", str(self.retry_after)))
        return self._headers


class Internal(Problem):
    """A defect of ours; the log has the traceback, the peer never does."""


class Unframed(Problem):
    """A refusal after which nobody knows where the next message starts."""

    closes = True


class MalformedRequest(Unframed):
    """Bytes that cannot be framed, or read, as HTTP/1.1: RFC 9112 sections 2.2, 5 and 6.3."""

    status = 400
    code = "malformed-request"
    title = "The message is not HTTP/1.1 as we read it"
    remedy = "Send a well-formed HTTP/1.1 request."


class RequestTimeout(Unframed):
    """A head or a body that came too slowly: RFC 9110 section 15.5.9."""

    status = 408
    code = "request-timeout"
    title = "The request did not arrive in time"
    remedy = "Send the whole request without a pause."


class BodyTooLarge(Unframed):
    """More content than we read: RFC 9110 section 15.5.14."""

    status = 413
    code = "body-too-large"
    title = "The body is too large"
    remedy = f"Send a body of at most {BODY_MAXIMUM} bytes."


class HeadTooLarge(Unframed):
    """More fields, or longer ones, than we read: RFC 6585 section 5."""

    status = 431
    code = "head-too-large"
    title = "The request line and header fields are too large"
    remedy = f"Send at most {FIELDS_MAXIMUM} header fields and {HEAD_MAXIMUM} bytes of head."


class UnknownTransferCoding(Unframed):
    """Any transfer coding but chunked: RFC 9112 section 6.1."""

    status = 501
    code = "not-implemented"
    title = "The transfer coding or method is not implemented"
    remedy = "Send a method of the API, and a body plain or chunked."


class HttpVersion(Unframed):
    """A major version other than 1: RFC 9110 section 15.6.6."""

    status = 505
    code = "http-version"
    title = "The HTTP version is not supported"
    remedy = "Speak HTTP/1.1."


class ExpectationFailed(Unframed):
    """An expectation other than 100-continue: RFC 9110 section 10.1.1."""

    status = 417
    code = "expectation-failed"
    title = "The expectation cannot be met"
    remedy = "Expect 100-continue or nothing."


class UnknownMethod(UnknownTransferCoding):
    """A method that no route has: RFC 9110 section 9.1. The message itself is read."""

    closes = False


class InvalidBody(Problem):
    """Content that is not the JSON, or not the shape, that the route takes."""

    status = 400
    code = "invalid-body"
    title = "The body is not what is asked for"
    names_errors = True
    remedy = "Correct the fields named in errors."


class InvalidQuery(Problem):
    """A query that is not what the route takes."""

    status = 400
    code = "invalid-query"
    title = "The query is not what is asked for"
    names_errors = True
    remedy = "Correct the parameters named in errors."


class Unauthorized(Problem):
    """The caller has not shown that it may ask."""

    status = 401
    is_audited = True
    challenge = "invalid_token"


class TokenUnknown(Unauthorized):
    """A token that was never minted, or whose secret is wrong."""

    code = "token-unknown"
    title = "The token is not known"
    remedy = "Get a new token from the operator: mint-token."


class TokenExpired(Unauthorized):
    """Told, as the next two, only to a caller who has proved the secret."""

    code = "token-expired"
    title = "The token has expired"
    remedy = "Get a new token from the operator: mint-token."


class TokenRevoked(Unauthorized):
    """An operator took the token back, or deleted the host that it was bound to."""

    code = "token-revoked"
    title = "The token has been revoked"
    remedy = "Get a new token from the operator: mint-token."


class TokenUsed(Unauthorized):
    """No uses are left, whatever became of the hosts that came in by it."""

    code = "token-used"
    title = "The token has been used"
    remedy = "A token lets in as many hosts as it was minted for. Get a new one: mint-token."


class CredentialMissing(Unauthorized):
    """No Authorization of the scheme Bearer: RFC 6750 section 3."""

    code = "credential-missing"
    title = "There is no credential"
    remedy = "Send the credential from enrollment as Authorization: Bearer <credential>."
    challenge = ""


class CredentialInvalid(Unauthorized):
    """Not signed by a key that we hold, or not as we would have written it."""

    code = "credential-invalid"
    title = "The credential is not one of ours"
    remedy = "Get a re-enroll token from the operator; until then ask again hourly."


class CredentialExpired(Unauthorized):
    """Past its exp (RFC 7519 section 4.1.4) and the days of grace after it."""

    code = "credential-expired"
    title = "The credential has expired"
    remedy = "Get a re-enroll token from the operator; until then ask again hourly."


class CredentialSuperseded(Unauthorized):
    """Its serial is below one that has been seen."""

    code = "credential-superseded"
    title = "A newer credential of this host is in use"
    remedy = (
        "If this host holds no newer credential, another machine may hold a copy: get a "
        "re-enroll token from the operator; until then ask again hourly."
    )


class ApiKeyInvalid(Unauthorized):
    """No API key, or one that is unknown or revoked."""

    code = "api-key-invalid"
    title = "The API key is missing or not valid"
    remedy = "Send a live API key as Authorization: Bearer hak_...; mint-api-key makes one."


class ApiKeyMissing(ApiKeyInvalid):
    """No API key at all: RFC 6750 section 3.1 wants no error attribute then."""

    challenge = ""


class Forbidden(Problem):
    """The API key is good, and its role does not suffice."""

    status = 403
    is_audited = True
    code = "forbidden"
    title = "The API key may not do this"
    remedy = "Use an API key with the role admin."


class TokenHostMismatch(Problem):
    """A guard against mistakes, not a proof: a machine says its own name."""

    status = 403
    is_audited = True
    code = "token-host-mismatch"
    title = "The token is bound to another hostname"
    remedy = "Use the token on the host that it was minted for; it is not used up."


class HostRevoked(Problem):
    """The host is shut out, and its row stays."""

    status = 403
    is_audited = True
    code = "host-revoked"
    title = "The host has been revoked"
    remedy = "Wait until the operator restores the host; ask again hourly."


class NotFound(Problem):
    """No such path, or no such object in what the caller may see."""

    status = 404
    code = "not-found"
    title = "There is no such thing here"
    remedy = "Check the path and the id."


class MethodNotAllowed(Problem):
    """A method that other paths have: RFC 9110 section 15.5.6."""

    status = 405
    code = "method-not-allowed"
    title = "The method does not go with this path"
    remedy = "Use a method that the Allow header field names."


class Conflict(Problem):
    """What is asked for does not go with what there is."""

    status = 409
    code = "conflict"
    title = "It does not go with what there is"
    remedy = "Choose another name, or do first what the detail names."


class HostUnknown(Problem):
    """The credential is good, and its host has been deleted."""

    status = 410
    is_audited = True
    code = "host-unknown"
    title = "The host is gone"
    remedy = "Enroll anew with a new token; until then ask again hourly."


class TooManyRequests(Problem):
    """Said in place of token-unknown and api-key-invalid to an address with too many wrong
    secrets: RFC 6585 section 4. A good one is let in from there all the same."""

    status = 429
    is_audited = True
    retry_after = MINUTE
    code = "too-many-requests"
    title = "Too many wrong secrets came from this address"
    remedy = "Send a good secret, or try again after the time that Retry-After names."


class Overloaded(Unframed):
    """All unfinished requests together hold too much memory."""

    status = 503
    retry_after = RETRY_AFTER
    code = "overloaded"
    title = "The server has too much in hand"
    remedy = "Try again after the time that Retry-After names."


class StorageUnavailable(Problem):
    """The database failed, or another writer has had it for too long."""

    status = 503
    retry_after = RETRY_AFTER
    code = "storage-unavailable"
    title = "The database cannot be used now"
    remedy = "Nothing was changed. Try again after the time that Retry-After names."


def problems() -> Tuple[Type[Problem], ...]:
    """One class for each code, in the order of status and code."""

    def tree(parent: Type[Problem]) -> Iterator[Type[Problem]]:
        yield parent
        for child in parent.__subclasses__():
            yield from tree(child)

    by_code = {problem.code: problem for problem in reversed(list(tree(Problem)))}
    return tuple(sorted(by_code.values(), key=lambda problem: (problem.status, problem.code)))


# 3. Shapes
#
# What a body or a query may say is declared once: check() and schema() come from the same
# declaration. A Kind judges one value; a Shape judges an object member by member, names every
# member that is wrong, and gives back only what it knows. What the API answers is declared in the
# same way, for those who read schemas and for the tests.

# What UNPRINTABLE leaves, as ECMA-262 writes it, which JSON Schema goes by. Surrogates stay out:
# JSON that we read has none, and an engine that knows UTF-16 alone sees two of them in an emoji.
PRINTABLE = "[^" + json.dumps(UNPRINTABLE.pattern)[2:-1].replace(r"\ud800-\udfff", "")


class Kind:
    """What one value may be. check() returns it, or raises ValueError with what is wrong."""

    def check(self, value: Any) -> Any:
        """Judge a value from JSON."""
        raise NotImplementedError

    def read(self, text: str) -> Any:
        """Judge a value from a query, where everything is text."""
        return self.check(text)

    def schema(self) -> Dict[str, Any]:
        """The same in JSON Schema 2020-12."""
        raise NotImplementedError

    def parameter(self) -> Dict[str, Any]:
        """The schema of what read() takes."""
        return self.schema()


class Text(Kind):
    """A string of printable characters; a pattern is matched against the whole, and takes none
    that is not printable."""

    def __init__(self, maximum: int, minimum: int = 0, pattern: str = "", say: str = "") -> None:
        self._maximum, self._minimum = maximum, minimum
        self._pattern, self._say = pattern, say

    @property
    def pattern(self) -> str:
        """A regular expression for the whole, within the lengths."""
        return self._pattern or f"{PRINTABLE}{{{self._minimum},{self._maximum}}}"

    def check(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError("must be a string")
        if not self._minimum <= len(value) <= self._maximum:
            raise ValueError(f"must have {self._lengths()} characters")
        if UNPRINTABLE.search(value):
            raise ValueError("must not contain control characters or text direction marks")
        if self._pattern and not re.fullmatch(self._pattern, value):
            raise ValueError(f"must be {self._say}")
        return value

    def _lengths(self) -> str:
        if self._minimum == 0:
            return f"at most {self._maximum}"
        is_range = self._minimum < self._maximum
        return f"{self._minimum} to {self._maximum}" if is_range else str(self._maximum)

    def schema(self) -> Dict[str, Any]:
        return {
            "type": "string",
            "minLength": self._minimum,
            "maxLength": self._maximum,
            "pattern": f"^{self._pattern or PRINTABLE + '*'}$",
        }


class Moment(Text):
    """A time as rfc3339() writes it."""

    def __init__(self) -> None:
        pattern = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z"
        super().__init__(24, 24, pattern, "like 2027-01-15T08:00:00.000Z")

    def schema(self) -> Dict[str, Any]:
        return {**super().schema(), "format": "date-time"}


class Whole(Kind):
    """An integer within bounds, both included."""

    def __init__(self, bounds: Tuple[int, int], unit: str = "") -> None:
        self._minimum, self._maximum = bounds
        self._bounds = f" from {self._minimum} to {self._maximum}{unit and ' '}{unit}"

    def check(self, value: Any) -> int:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or value % 1 or not self._minimum <= value <= self._maximum:
            raise ValueError(f"must be an integer{self._bounds}")
        return int(value)

    def read(self, text: str) -> int:
        if not re.fullmatch(f"-?[0-9]{{1,{INTEGER_DIGITS}}}", text):
            return self.check(text)
        return self.check(int(text))

    def schema(self) -> Dict[str, Any]:
        return {"type": "integer", "minimum": self._minimum, "maximum": self._maximum}


class Choice(Kind):
    """One of a few words."""

    def __init__(self, *words: str) -> None:
        self._words = words

    def check(self, value: Any) -> str:
        if value not in self._words or not isinstance(value, str):
            raise ValueError(f"must be one of {', '.join(self._words)}")
        return value

    def schema(self) -> Dict[str, Any]:
        return {"type": "string", "enum": list(self._words)}


class Labels(Kind):
    """An object of short keys and printable values; in a query, one key=value."""

    COUNT = 32
    KEY = Text(63, 1, r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?", "letters, digits, . _ / -")
    VALUE = Text(255)

    def check(self, value: Any) -> Dict[str, str]:
        if not isinstance(value, dict):
            raise ValueError("must be an object")
        if len(value) > self.COUNT:
            raise ValueError(f"must have at most {self.COUNT} members")
        for key, text in value.items():
            self._check_one("a label's name", self.KEY, key)
            self._check_one(f"the label {key}", self.VALUE, text)
        return value

    def read(self, text: str) -> Tuple[str, str]:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError("must be written key=value")
        self.check({key: value})
        return key, value

    @staticmethod
    def _check_one(what: str, kind: Text, value: Any) -> None:
        try:
            kind.check(value)
        except ValueError as error:
            raise ValueError(f"{what} {error}") from None

    def schema(self) -> Dict[str, Any]:
        return {
            "type": "object",
            "maxProperties": self.COUNT,
            "propertyNames": self.KEY.schema(),
            "additionalProperties": self.VALUE.schema(),
        }

    def parameter(self) -> Dict[str, Any]:
        return {"type": "string", "pattern": f"^{self.KEY.pattern}={self.VALUE.pattern}$"}


class Nullable(Kind):
    """Something, or null where there is none."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind

    def check(self, value: Any) -> Any:
        return None if value is None else self._kind.check(value)

    def schema(self) -> Dict[str, Any]:
        return {"anyOf": [self._kind.schema(), {"type": "null"}]}


class ListOf(Kind):
    """An array of one kind of thing."""

    def __init__(self, kind: Kind, maximum: int) -> None:
        self._kind, self._maximum = kind, maximum

    def check(self, value: Any) -> List[Any]:
        if not isinstance(value, list):
            raise ValueError("must be an array")
        if len(value) > self._maximum:
            raise ValueError(f"must have at most {self._maximum} items")
        return [self._kind.check(item) for item in value]

    def schema(self) -> Dict[str, Any]:
        return {"type": "array", "maxItems": self._maximum, "items": self._kind.schema()}


class ObjectOf(Kind):
    """An object of a Shape, within another."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape

    def check(self, value: Any) -> Dict[str, Any]:
        try:
            return self._shape.check(value)
        except InvalidBody as problem:
            said = (f"{error.field} {error.detail}" for error in problem.errors)
            raise ValueError("; ".join(said) or "must be an object") from None

    def schema(self) -> Dict[str, Any]:
        return self._shape.reference()


class Field(NamedTuple):
    """One member of an object, or one parameter of a query."""

    name: str
    kind: Kind
    required: bool = False
    repeats: bool = False  # in a query: may come more than once, and is read as a list


def members(**kinds: Kind) -> List[Field]:
    """Members that are always there."""
    return [Field(name, kind, required=True) for name, kind in kinds.items()]


class Shape:
    """An object's members. An open one ignores members that it does not know. What has a name
    is described once in a document, and referred to."""

    def __init__(self, *fields: Field, open: bool = False, name: str = "") -> None:
        self._fields = {field.name: field for field in fields}
        self._open = open
        self.name = name

    def check(self, value: Any) -> Dict[str, Any]:
        """The known members of a JSON object. Raises InvalidBody, which names all that is wrong."""
        if not isinstance(value, dict):
            raise InvalidBody("The body must be a JSON object.")
        found: Dict[str, Any] = {}
        errors: List[FieldError] = []
        for name in value:
            if name in self._fields:
                self._judge(name, self._fields[name].kind.check, value[name], found, errors)
            elif not self._open:
                errors.append(FieldError(printable(name), "is not known here"))
        required = (field.name for field in self._fields.values() if field.required)
        errors += [FieldError(name, "is missing") for name in required if name not in value]
        if errors:
            raise InvalidBody(errors=errors)
        return found

    def read(self, pairs: Iterable[Tuple[str, str]]) -> Dict[str, Any]:
        """The parameters of a query. Raises InvalidQuery, which names all that is wrong."""
        found: Dict[str, Any] = {}
        errors: List[FieldError] = []
        for name, text in pairs:
            field = self._fields.get(name)
            if field is None:
                errors.append(FieldError(printable(name), "is not known here"))
            elif field.repeats:
                one: Dict[str, Any] = {}
                self._judge(name, field.kind.read, text, one, errors)
                found.setdefault(name, []).extend(one.values())
                if len(found[name]) == REPEATS_MAXIMUM + 1:
                    errors.append(FieldError(name, f"is given more than {REPEATS_MAXIMUM} times"))
            elif name in found:
                errors.append(FieldError(name, "is given more than once"))
            else:
                self._judge(name, field.kind.read, text, found, errors)
        if errors:
            raise InvalidQuery(errors=errors)
        return found

    @staticmethod
    def _judge(
        name: str,
        check: Callable[[Any], Any],
        value: Any,
        found: Dict[str, Any],
        errors: List[FieldError],
    ) -> None:
        try:
            found[name] = check(value)
        except ValueError as error:
            errors.append(FieldError(name, str(error)))

    def schema(self) -> Dict[str, Any]:
        """The object in JSON Schema 2020-12."""
        return {
            "type": "object",
            "properties": {field.name: field.kind.schema() for field in self._fields.values()},
            "required": [field.name for field in self._fields.values() if field.required],
            "additionalProperties": self._open,
        }

    def reference(self) -> Dict[str, Any]:
        """Where the schema stands in an OpenAPI document; the schema, if it has no name."""
        return {"$ref": f"#/components/schemas/{self.name}"} if self.name else self.schema()

    def parameters(self, place: str) -> List[Dict[str, Any]]:
        """The same as parameters of OpenAPI 3.1, in a place: query, header or path."""
        return [
            {"name": f.name, "in": place, "required": f.required, "schema": self._parameter(f)}
            for f in self._fields.values()
        ]

    @staticmethod
    def _parameter(field: Field) -> Dict[str, Any]:
        one = field.kind.parameter()
        return (
            {"type": "array", "maxItems": REPEATS_MAXIMUM, "items": one} if field.repeats else one
        )


def _read_members(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise InvalidBody("The body has an object with the same member twice.")
    return members


def _read_integer(digits: str) -> Union[int, float]:
    return int(digits) if len(digits) <= INTEGER_DIGITS else float(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidBody(f"The body has {name}, which JSON does not know.")


# Made once: json.loads() would make one for each body, and it takes longer than reading most.
_JSON = json.JSONDecoder(
    object_pairs_hook=_read_members, parse_int=_read_integer, parse_constant=_refuse_constant
)


def read_json(body: bytes) -> Any:
    """A JSON text (RFC 8259, with the strictness of RFC 8785: unique members, no lone surrogates).

    Raises InvalidBody.
    """
    try:
        value = _JSON.decode(body.decode("utf-8"))
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise InvalidBody("The body must be UTF-8, without lone surrogates.") from None
    except RecursionError:
        raise InvalidBody("The body is nested too deeply.") from None
    except ValueError:
        raise InvalidBody("The body must be a JSON object.") from None
    return value


# 4. Secrets
#
# The only section with secret randomness and cryptography. Tokens and API keys are 256 random bits,
# shown once and kept as SHA-256: what is random needs no slow hash. Credentials are compact JWS
# (RFC 7515) with the claims of a JWT (RFC 7519), signed with HMAC-SHA256 (RFC 7518, section 3.2).

ID_EPOCH_MS = 1_577_836_800_000  # 2020-01-01: ids begin with the time since


def first_id(now: int) -> int:
    """The lowest id that new_id() makes at a time in Unix ms."""
    return max(0, now - ID_EPOCH_MS) % (1 << 41) << 22


def new_id(now: int) -> int:
    """A fresh id for time now, in Unix ms: 41 bits of milliseconds, then 22 random ones.

    Ids in the order of time list themselves, keep new rows together at the end of a table's
    b-tree, and keep the id of a deleted row from ever coming back. Two of one millisecond may
    be the same: who adds a row with one looks whether it is taken.
    """
    return first_id(now) | secrets.randbits(22)


class Secret(NamedTuple):
    """A token or an API key: what the database may know of it, and the text that is shown once."""

    id: int
    text: str

    def digest(self) -> bytes:
        """What is kept of it: SHA-256 of the whole text, so that no other spelling matches."""
        return hashlib.sha256(self.text.encode("ascii")).digest()


TOKEN_PREFIX = "het"
API_KEY_PREFIX = "hak"
SECRET = re.compile(r"(het|hak)_([0-7][0-9a-f]{15})_[A-Za-z0-9_-]{43}([0-9a-f]{8})")


def mint_secret(prefix: str, number: int) -> Secret:
    """A new secret: prefix, id, 256 random bits in base64url, CRC-32 against slips of the pen."""
    text = f"{prefix}_{id_text(number)}_{secrets.token_urlsafe(32)}"
    return Secret(number, f"{text}{zlib.crc32(text.encode('ascii')):08x}")


def read_secret(prefix: str, text: str) -> Optional[Secret]:
    """The secret in a text, or None for what we cannot have minted."""
    match = SECRET.fullmatch(text)
    if match is None or match[1] != prefix:
        return None
    if zlib.crc32(text[:-8].encode("ascii")) != int(match[3], 16):
        return None
    return Secret(int(match[2], 16), text)


def is_same(one: bytes, other: bytes) -> bool:
    """Compare what must not be guessed, in constant time."""
    return hmac.compare_digest(one, other)


def fingerprint(text: str) -> bytes:
    """SHA-256 of a caller's text: what is kept of an Idempotency-Key."""
    return hashlib.sha256(text.encode("utf-8")).digest()


def base64url(data: bytes) -> str:
    """RFC 7515 section 2: base64url without padding."""
    return _base64url(data).decode("ascii")


# What base64's own functions do, without their care for types: each credential comes this way.
_TO_URL, _FROM_URL = bytes.maketrans(b"+/", b"-_"), bytes.maketrans(b"-_", b"+/")


def _base64url(data: bytes) -> bytes:
    return binascii.b2a_base64(data, newline=False).translate(_TO_URL, b"=")


def _read_base64url(text: bytes) -> bytes:
    return binascii.a2b_base64(text.translate(_FROM_URL) + b"==")


class Claims(NamedTuple):
    """What a credential says; times in Unix seconds."""

    host: int
    organization: str
    issued_at: int
    serial: int
    expires_at: Optional[int]
    kid: str  # of the key that signs it: said in the header


# 27 bytes, and a credential has 36 characters for them, whatever comes after.
_CLAIMS_OPENING = b'{"iss":"hostenroll","sub":"'
CLAIMS = re.compile(
    re.escape(_CLAIMS_OPENING) + rb'([0-7][0-9a-f]{15})","org":"([A-Za-z0-9_-]{1,64})",'
    rb'"iat":(0|[1-9][0-9]{0,11}),"ser":([1-9][0-9]{0,11})(?:,"exp":(0|[1-9][0-9]{0,11}))?\}'
)


def host_of(rest: bytes) -> int:
    """The host of a credential that has been verified, by what follows its opening: there stand
    the 16 digits of its id, and two bytes more."""
    return int(binascii.a2b_base64(rest[:24])[:16], 16)


KID = r"[A-Za-z0-9_-]{1,64}"


class SigningKey:
    """One key of the keyring: 32 random bytes by the name of a kid."""

    def __init__(self, kid: str, octets: bytes) -> None:
        self.kid = kid
        self.octets = octets
        self.header = _base64url(
            json.dumps({"alg": "HS256", "typ": "JWT", "kid": kid}, separators=(",", ":")).encode()
        )
        # What all credentials of this key begin with: a fleet's differ in the rest alone.
        self.opening = b"%b.%b" % (self.header, _base64url(_CLAIMS_OPENING))
        self._keyed = hmac.new(octets, digestmod="sha256")  # copied: half the cost of a new one

    def signature(self, signed: bytes) -> bytes:
        """The JWS signature of header.payload, in base64url."""
        mac = self._keyed.copy()
        mac.update(signed)
        return _base64url(mac.digest())

    def sign(self, claims: Claims) -> str:
        """A credential. verify() takes this spelling of these members and no other."""
        expiry = "" if claims.expires_at is None else f',"exp":{claims.expires_at}'
        payload = (
            f'{{"iss":"hostenroll","sub":"{id_text(claims.host)}","org":"{claims.organization}",'
            f'"iat":{claims.issued_at},"ser":{claims.serial}{expiry}}}'
        )
        signed = b"%b.%b" % (self.header, _base64url(payload.encode("ascii")))
        return (b"%b.%b" % (signed, self.signature(signed))).decode("ascii")


class Keyring:
    """The keys of one key file: the first signs, all verify. It never changes; a new file is a
    new Keyring."""

    def __init__(self, keys: Sequence[SigningKey], audit_key: bytes) -> None:
        self.keys = tuple(keys)
        self.audit_key = audit_key
        self._by_header = {key.header: key for key in keys}

    @property
    def first(self) -> SigningKey:
        """The key that signs."""
        return self.keys[0]

    @property
    def kids(self) -> List[str]:
        """The names of the keys, that of the first first."""
        return [key.kid for key in self.keys]

    def rotated(self) -> Keyring:
        """With a new key before the others."""
        return Keyring([_new_signing_key(), *self.keys], self.audit_key)

    def without(self, kid: str) -> Keyring:
        """With one key less."""
        return Keyring([key for key in self.keys if key.kid != kid], self.audit_key)

    def chain(self, previous: bytes, record: bytes) -> bytes:
        """The HMAC-SHA256 that ties a record of the audit log to all before it."""
        return hmac.new(self.audit_key, previous + record, "sha256").digest()

    def verify(self, credential: str) -> Claims:
        """The claims of a credential that we signed, however old it is. Raises
        CredentialInvalid."""
        claims = self.read(credential.encode("ascii")) if credential.isascii() else None
        if claims is None:
            raise CredentialInvalid()
        return claims

    def read(self, credential: bytes) -> Optional[Claims]:
        """The claims of a credential that we signed; None of anything else.

        The header is never parsed: it must be, byte for byte, the one that we write for a key
        that we hold. So there is no algorithm to choose, no embedded key to trust, no kid to
        look up elsewhere. The signature is compared as text, so it has one spelling.
        """
        if len(credential) > CREDENTIAL_MAXIMUM:
            return None
        signed, _, signature = credential.rpartition(b".")
        header, _, payload = signed.partition(b".")
        key = self._by_header.get(header)
        if key is None or not hmac.compare_digest(key.signature(signed), signature):
            return None
        claims = self._read_claims(payload)
        if claims is None:
            return None
        host, organization, issued_at, serial, expires_at = claims.groups()
        return Claims(
            int(host, 16),
            sys.intern(organization.decode("ascii")),
            int(issued_at),
            int(serial),
            None if expires_at is None else int(expires_at),
            key.kid,
        )

    @staticmethod
    def _read_claims(payload: bytes) -> Optional["re.Match[bytes]"]:
        try:
            octets = _read_base64url(payload)
        except binascii.Error:
            return None
        return CLAIMS.fullmatch(octets) if _base64url(octets) == payload else None


def _new_signing_key() -> SigningKey:
    return SigningKey(secrets.token_hex(8), secrets.token_bytes(32))


def new_keyring() -> Keyring:
    """One fresh signing key, and a key for the audit chain beside it."""
    return Keyring([_new_signing_key()], secrets.token_bytes(32))


def write_key_file(path: str, keyring: Keyring) -> None:
    """A JWK Set (RFC 7517 section 5) of mode 0600, on the disk when this returns. A file that is
    there is replaced whole, or not at all, and keeps its owner: the server may be another user
    than the operator."""
    keys = [
        {"kty": "oct", "use": "sig", "alg": "HS256", "kid": key.kid, "k": base64url(key.octets)}
        for key in keyring.keys
    ]
    keys.append({"kty": "oct", "use": "audit", "kid": "audit", "k": base64url(keyring.audit_key)})
    with replacing(path) as file:
        file.write(json.dumps({"keys": keys}, indent=2).encode("ascii") + b"\n")


@contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A file of mode 0600 that takes the place of path when all of it is on the disk. A link
    stays one."""
    path = os.path.realpath(path)
    fresh = f"{path}.tmp"
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, KEY_FILE_MODE)
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, KEY_FILE_MODE)
            with suppress(OSError):  # none is there, or it is not ours to give away
                status = os.stat(path)
                os.fchown(descriptor, status.st_uid, status.st_gid)
            yield file
            file.flush()
            os.fsync(descriptor)
        os.replace(fresh, path)
    except BaseException:
        os.remove(fresh)
        raise
    sync_folder(path)


def sync_folder(path: str) -> None:
    """Make a rename last: the folder is what changed."""
    sync_file(os.path.dirname(os.path.abspath(path)))


def sync_file(path: str) -> None:
    """Have what is written to a file, or a folder, on the disk. Never a database in use."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_jwk(jwk: Mapping[str, Any]) -> Tuple[str, str, bytes]:
    use, kid, octets = str(jwk["use"]), jwk["kid"], _read_base64url(str(jwk["k"]).encode("ascii"))
    if jwk["kty"] != "oct" or jwk.get("alg", "HS256") != "HS256" or not re.fullmatch(KID, kid):
        raise ValueError("a key is not an oct key for HS256 with a kid")
    if len(octets) < 32 or base64url(octets) != jwk["k"]:
        raise ValueError("a key is not 32 bytes or more in base64url")
    return use, kid, octets


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # for a writer, if it is a pipe


def load_keyring(path: str) -> Keyring:
    """The keyring of a key file. Raises OperatorError for a file that is bad or open to others."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            mode = stat.S_IMODE(status.st_mode)
            if not stat.S_ISREG(status.st_mode) or status.st_size > KEY_FILE_MAXIMUM:
                raise ValueError("not a file, or far too large")
            found = [_read_jwk(jwk) for jwk in json.load(file)["keys"]]
    except OSError as error:
        raise OperatorError(f"cannot read the key file {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OperatorError(
            f"the key file {path} is not a JWK Set of ours ({error}): restore it from a backup"
        ) from error
    if mode & 0o077:
        raise OperatorError(f"the key file {path} is open to others: chmod 600 {path}")
    signing = [SigningKey(kid, octets) for use, kid, octets in found if use == "sig"]
    audit = [octets for use, _, octets in found if use == "audit"]
    if not signing or len(audit) != 1 or len({key.kid for key in signing}) < len(signing):
        raise OperatorError(
            f"the key file {path} needs one audit key, and signing keys with a kid each: "
            "restore it from a backup"
        )
    return Keyring(signing, audit[0])


class KeyFile:
    """A key file that others may replace while we run."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.trouble = ""  # why what is in the file now is not what we go by
        self._seen: Optional[Tuple[int, ...]] = None

    def load(self) -> Keyring:
        """The keyring in it. Raises OperatorError."""
        self._seen = self._look()
        return load_keyring(self.path)

    def replace(self, keyring: Keyring) -> None:
        """Put a keyring into it, whole or not at all."""
        write_key_file(self.path, keyring)
        self._seen = self._look()

    def reload(self, current: Keyring) -> Optional[Keyring]:
        """The keyring in it, if it has changed since it was last looked at, is a good one, and is
        of the same database as the current one: the audit key never changes."""
        seen = self._look()
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            keyring = load_keyring(self.path)
            if not is_same(keyring.audit_key, current.audit_key):
                raise OperatorError(f"{self.path} is another database's: put the right one back")
        except OperatorError as error:
            if isinstance(error.__cause__, OSError):  # it may pass without a change of the file
                self._seen = ()
            if self.trouble != str(error):
                log.error("%s; until then the keys that were loaded before are used", error)
            self.trouble = str(error)
            return None
        if self.trouble:
            log.info("the key file %s is as it should be again", self.path)
        self.trouble = ""
        return keyring

    def _look(self) -> Optional[Tuple[int, ...]]:
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        # A write, a rename, a chmod: each changes st_ctime, unless within one tick of its clock.
        kept = status.st_dev, status.st_ino, status.st_mode, status.st_size
        return (*kept, status.st_ctime_ns)


def _read_der(octets: bytes) -> Tuple[int, bytes, bytes]:
    """The first element of DER (ITU-T X.690, section 8.1): tag, whole element, and what follows."""
    length, start = octets[1], 2
    if length & 0x80:
        start += length & 0x7F
        length = int.from_bytes(octets[2:start], "big")
    if len(octets) < start + length:
        raise ValueError("cut short")
    return octets[0], octets[: start + length], octets[start + length :]


def _der_contents(element: bytes) -> bytes:
    return element[2 + (element[1] & 0x7F if element[1] & 0x80 else 0) :]


def public_key_pin(certificate: bytes) -> str:
    """The pin of a certificate in DER, as curl's --pinnedpubkey takes it: SHA-256 of its
    SubjectPublicKeyInfo, which is the seventh member of what is signed, or the sixth where no
    version stands first (RFC 5280 section 4.1). Raises ValueError."""
    try:
        _, signed, _ = _read_der(_der_contents(certificate))
        rest = _der_contents(signed)
        members = []
        while rest:
            tag, element, rest = _read_der(rest)
            members.append((tag, element))
        has_version = members[0][0] == 0xA0
        key = members[6 if has_version else 5][1]
    except IndexError:
        raise ValueError("not a certificate") from None
    return f"sha256//{base64.b64encode(hashlib.sha256(key).digest()).decode('ascii')}"


# 5. Store
#
# The database remembers; it decides nothing and refuses nothing. The only section with SQL and
# the only one that takes the lock between processes. Its methods report facts: rows, or how many
# rows a guarded statement changed.

APPLICATION_ID = 0x686F7374  # "host"
SCHEMA_VERSION = 2

SCHEMA = """\
-- hostenroll's database. Times are Unix milliseconds unless a comment says otherwise.
-- Ids are integers here and 16 hexadecimal digits everywhere else.

PRAGMA application_id = 0x686F7374;
PRAGMA user_version = 2;

CREATE TABLE organization (
    -- Whose a host, a token or an API key is.
    id          TEXT    NOT NULL PRIMARY KEY,  -- the slug given to add-org
    created_at  INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE api_key (
    -- What lets a person or a script use the user API.
    id               INTEGER PRIMARY KEY,
    secret_hash      BLOB    NOT NULL,  -- SHA-256 of the key's text
    organization_id  TEXT    REFERENCES organization (id),  -- NULL: all of them
    role             TEXT    NOT NULL CHECK (role IN ('admin', 'viewer')),
    description      TEXT    NOT NULL,
    created_at       INTEGER NOT NULL,
    created_by       TEXT    NOT NULL,
    revoked_at       INTEGER
);

CREATE TABLE token (
    -- What lets hosts in. Rows stay for 30 days when they are used up, expired or revoked.
    id               INTEGER PRIMARY KEY,
    secret_hash      BLOB    NOT NULL,  -- SHA-256 of the token's text
    organization_id  TEXT    NOT NULL REFERENCES organization (id),
    description      TEXT    NOT NULL,
    hostname         TEXT,              -- bound to this hostname, where there is one
    host_id          INTEGER,           -- bound to this host: a re-enroll token
    labels           TEXT    NOT NULL,  -- a JSON object of strings, given to the host
    max_uses         INTEGER NOT NULL CHECK (max_uses >= 1),
    uses             INTEGER NOT NULL DEFAULT 0 CHECK (uses BETWEEN 0 AND max_uses),
    created_at       INTEGER NOT NULL,
    created_by       TEXT    NOT NULL,
    expires_at       INTEGER NOT NULL,
    used_at          INTEGER,           -- the last use
    used_from        TEXT,              -- the address of the last use
    revoked_at       INTEGER
);
CREATE INDEX token_organization ON token (organization_id);
CREATE INDEX token_host ON token (host_id) WHERE host_id IS NOT NULL;

CREATE TABLE host (
    -- A machine that has enrolled. What changes with each beat stands in heartbeat.
    id               INTEGER PRIMARY KEY,
    organization_id  TEXT    NOT NULL REFERENCES organization (id),
    name             TEXT    NOT NULL,
    hostname         TEXT    NOT NULL,
    bound            INTEGER NOT NULL,  -- 1: the token named the hostname, no beat changes it
    os               TEXT    NOT NULL,
    architecture     TEXT    NOT NULL,
    docker_version   TEXT    NOT NULL,
    labels           TEXT    NOT NULL,  -- a JSON object of strings
    issued           INTEGER NOT NULL,  -- the highest serial issued
    enrolled_at      INTEGER NOT NULL,
    revoked_at       INTEGER,
    token_id         INTEGER NOT NULL,  -- the token that it first came in by
    admitted_by      INTEGER NOT NULL,  -- the token that it last came in by, to re-enroll
    admitted_at      INTEGER NOT NULL,
    admitted_serial  INTEGER NOT NULL,  -- the serial that was issued for that token
    idempotency      BLOB,              -- SHA-256 of the Idempotency-Key sent with it
    issued_to        TEXT    NOT NULL DEFAULT '',  -- the address that the highest serial went to
    twin_id          INTEGER            -- a live host that had this hostname when it came in
);
CREATE INDEX host_organization ON host (organization_id);
CREATE INDEX host_hostname ON host (organization_id, lower(rtrim(hostname, '.')));
CREATE INDEX host_token ON host (token_id);
CREATE UNIQUE INDEX host_idempotency ON host (admitted_by, idempotency)
    WHERE idempotency IS NOT NULL;

CREATE TABLE signing_key (
    -- The keys of the key file by name, never the keys themselves.
    number      INTEGER PRIMARY KEY,
    kid         TEXT    NOT NULL UNIQUE,
    created_at  INTEGER NOT NULL,
    retired_at  INTEGER                -- NULL: it is in the key file
);

CREATE TABLE heartbeat (
    -- One narrow row for each host: all that a heartbeat reads and writes.
    host_id     INTEGER PRIMARY KEY REFERENCES host (id) ON DELETE CASCADE,
    last_seen   INTEGER NOT NULL,  -- 0: never
    serial      INTEGER NOT NULL,  -- that counts: the highest seen, at first the one expected
    key_number  INTEGER NOT NULL,  -- of the signing_key of the credential with that serial
    active      INTEGER NOT NULL   -- 0: revoked
);
CREATE INDEX heartbeat_key ON heartbeat (key_number);

CREATE TABLE service (
    -- One row: what the servers on this database say of themselves, for whoever reads status.
    id              INTEGER PRIMARY KEY CHECK (id = 1),
    started         INTEGER NOT NULL,  -- when service began again after the last pause
    alive           INTEGER NOT NULL,  -- when a server last said that it lives
    previous_alive  INTEGER NOT NULL,  -- when one last lived before that pause
    interval        INTEGER NOT NULL,  -- the heartbeat interval, in seconds
    public_url      TEXT    NOT NULL,  -- where agents find the server
    pin             TEXT    NOT NULL DEFAULT ''  -- of its certificate, where it speaks TLS itself
);

CREATE TABLE audit (
    -- What happened, event after event. Each mac covers its row and the mac before it, by the
    -- audit key of the key file: who has only the database can neither change a row nor add one.
    number           INTEGER PRIMARY KEY,  -- 1, 2, 3 ... without a gap
    at               INTEGER NOT NULL,
    action           TEXT    NOT NULL,  -- mint, enroll, refuse, renew ...
    actor            TEXT    NOT NULL,  -- api-key:<id>, cli:<user>, token:<id>, host:<id> ...
    address          TEXT    NOT NULL,  -- '': this machine's command line, or the server itself
    organization_id  TEXT,              -- whose it is; NULL: nobody's
    subject          TEXT    NOT NULL,  -- host:<id>, token:<id> ...; '': nothing that we know
    code             TEXT,              -- of a refusal
    detail           TEXT    NOT NULL,  -- a JSON object
    mac              BLOB    NOT NULL   -- HMAC-SHA256
);
CREATE INDEX audit_organization ON audit (organization_id);

CREATE TABLE audit_anchor (
    -- One row, where older events have been pruned: what the first of the rest is chained to.
    id      INTEGER PRIMARY KEY CHECK (id = 1),
    number  INTEGER NOT NULL,  -- of the last event before the rest
    mac     BLOB    NOT NULL,  -- its mac
    proof   BLOB    NOT NULL   -- HMAC-SHA256 of both, or else to cut the start would be easy
);

CREATE TRIGGER audit_is_never_changed BEFORE UPDATE ON audit
BEGIN
    SELECT RAISE(ABORT, 'the audit log is append-only');
END;

CREATE TRIGGER audit_is_never_replaced BEFORE INSERT ON audit
WHEN EXISTS (SELECT 1 FROM audit WHERE number = NEW.number)
BEGIN
    SELECT RAISE(ABORT, 'the audit log is append-only');
END;

CREATE TRIGGER audit_is_only_pruned BEFORE DELETE ON audit
WHEN OLD.number > coalesce((SELECT number FROM audit_anchor), 0)
BEGIN
    SELECT RAISE(ABORT, 'the audit log is append-only');
END;
"""

CREATED = re.compile(r"^CREATE (?:UNIQUE )?[A-Z]+ (\w+)", re.MULTILINE)

# What to alter in a database of an older version; what is new in SCHEMA is then created by it.
ALTERATIONS: Mapping[int, Sequence[str]] = {
    1: (
        "ALTER TABLE host ADD COLUMN issued_to TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE host ADD COLUMN twin_id INTEGER",
        "ALTER TABLE signing_key ADD COLUMN retired_at INTEGER",
        "ALTER TABLE service ADD COLUMN pin TEXT NOT NULL DEFAULT ''",
        "UPDATE heartbeat SET serial = 1 WHERE serial = 0",
    ),
}

SQLITE_VERSION = sqlite3.sqlite_version

# The WAL-reset bug, fixed in 3.51.3, 3.50.7 and 3.44.6.
WAL_RESET_BUG = ((3, 7, 0), (3, 51, 3))
WAL_RESET_FIXED = ((3, 50, 7), (3, 44, 6))


def has_wal_reset_bug(version: Tuple[int, ...] = sqlite3.sqlite_version_info) -> bool:
    """Whether a SQLite can corrupt a WAL database when a checkpoint meets another's write."""
    is_fixed = any(fixed <= version < (3, fixed[1] + 1, 0) for fixed in WAL_RESET_FIXED)
    return WAL_RESET_BUG[0] <= version < WAL_RESET_BUG[1] and not is_fixed


class Token(NamedTuple):
    """A row of token."""

    id: int
    secret_hash: bytes
    organization_id: str
    description: str
    hostname: Optional[str]
    host_id: Optional[int]
    labels: str
    max_uses: int
    uses: int
    created_at: int
    created_by: str
    expires_at: int
    used_at: Optional[int]
    used_from: Optional[str]
    revoked_at: Optional[int]


class Host(NamedTuple):
    """A row of host with its row of heartbeat."""

    id: int
    organization_id: str
    name: str
    hostname: str
    bound: int
    os: str
    architecture: str
    docker_version: str
    labels: str
    issued: int
    enrolled_at: int
    revoked_at: Optional[int]
    token_id: int
    admitted_by: int
    admitted_at: int
    admitted_serial: int
    idempotency: Optional[bytes]
    issued_to: str
    twin_id: Optional[int]
    last_seen: int
    serial: int
    key_number: int
    active: int

    def listed(self) -> ListedHost:
        """The same as in a list."""
        return ListedHost(*(getattr(self, column) for column in ListedHost._fields))


class ListedHost(NamedTuple):
    """What a list shows of a Host, or finds it by: each column more is a tenth of a millisecond for
    a page of a thousand."""

    id: int
    organization_id: str
    name: str
    hostname: str
    os: str
    architecture: str
    docker_version: str
    labels: str
    enrolled_at: int
    revoked_at: Optional[int]
    token_id: int
    twin_id: Optional[int]
    last_seen: int


AnyHost = Union[Host, ListedHost]


class ApiKey(NamedTuple):
    """A row of api_key."""

    id: int
    secret_hash: bytes
    organization_id: Optional[str]
    role: str
    description: str
    created_at: int
    created_by: str
    revoked_at: Optional[int]


class Organization(NamedTuple):
    """A row of organization."""

    id: str
    created_at: int


class Service(NamedTuple):
    """The row of service."""

    started: int
    alive: int
    previous_alive: int
    interval: int
    public_url: str
    pin: str = ""


class StatusBounds(NamedTuple):
    """What a host's last_seen says of its status, in Unix ms: online from one time on, offline
    from another, else missing. What lies ahead of a third is of a clock that has been set back:
    it counts as so much earlier, and as no later than when the clock was set."""

    online: int
    offline: int
    ahead: int
    started: int
    set_back: int


class SigningKeyRow(NamedTuple):
    """A row of signing_key."""

    number: int
    kid: str
    created_at: int
    retired_at: Optional[int]


class Event(NamedTuple):
    """A row of audit. Its number and its mac are given when it joins the chain."""

    number: int
    at: int
    action: str
    actor: str
    address: str
    organization_id: Optional[str]
    subject: str
    code: Optional[str]
    detail: str
    mac: bytes

    def record(self) -> bytes:
        """What its mac covers, beside the mac before it."""
        return json.dumps(self[:-1], separators=(",", ":"), default=repr).encode("ascii")


def _octets(value: Any) -> bytes:
    """What a BLOB holds; of anything else, which only a forger puts there, what nothing equals."""
    return value if isinstance(value, bytes) else repr(value).encode()


class Anchor(NamedTuple):
    """The row of audit_anchor, without its id."""

    number: int
    mac: bytes
    proof: bytes

    def record(self) -> bytes:
        """What its proof covers."""
        return b"anchor %a %b" % (self.number, _octets(self.mac))


# Of the heartbeat statement: last_seen, host_id, serial, last_seen.
Beat = Tuple[int, int, int, int]

_TOKEN = ", ".join(Token._fields)
_HOST = ", ".join(Host._fields)
_HOST_ALONE = Host._fields[: Host._fields.index("last_seen")]
_LISTED_HOST = ", ".join(ListedHost._fields)
_API_KEY = ", ".join(ApiKey._fields)
_SERVICE = ", ".join(Service._fields)
_EVENT = ", ".join(Event._fields)

# The whole authorization of a heartbeat, beside its signature: one matched row means that the
# host is active, that this is its credential that counts, and that the time is written. The
# first use of a newer credential, and a clock that went back, match nothing and go the slow way.
_BEAT = """UPDATE heartbeat SET last_seen = ?
            WHERE host_id = ? AND serial = ? AND last_seen <= ? AND active"""


def file_mode(path: str) -> Optional[int]:
    """The permissions of a file: looked at, never opened. None where there is none."""
    try:
        return stat.S_IMODE(os.stat(path).st_mode)
    except FileNotFoundError:
        return None


class StoreError(Exception):
    """The database failed. The transaction is dead: abandon it, and run nothing more in it."""


FAILURES = (sqlite3.Error, MemoryError)  # as which Python raises SQLITE_NOMEM

# What to do when SQLite or the system says so. Nothing is decided by these words: they lead to
# other words, and before 3.11 Python knows no more of an error.
ROOM = "make room on its disk"
WRITABLE = "mount its disk read-write, and give folder and file to our user"
DAMAGED = "see what check says, and restore it from a backup"
OUT_OF_MEMORY = "out of memory"
MEMORY = "give us more memory"
REMEDIES = {
    "database or disk is full": ROOM,
    os.strerror(errno.ENOSPC): ROOM,
    "attempt to write a readonly database": WRITABLE,
    os.strerror(errno.EROFS): WRITABLE,
    os.strerror(errno.EACCES): WRITABLE,
    os.strerror(errno.EPERM): WRITABLE,
    "unable to open database file": WRITABLE,
    "disk I/O error": "its disk is full, read-only or failing: see df and dmesg",
    "database disk image is malformed": DAMAGED,
    "malformed database schema": DAMAGED,
    "file is not a database": DAMAGED,
    "database is locked": "another program writes to it: end that one",
    OUT_OF_MEMORY: MEMORY,
    os.strerror(errno.ENOMEM): MEMORY,
    os.strerror(errno.EMFILE): "raise the limit of open files",
}


Identity = Optional[Tuple[int, int]]  # of a file: device and inode; None where there is none


def identity(path: Union[str, int]) -> Identity:
    """Which file is at a path, or open: looked at, never opened. Raises StoreError."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(told(str(path), error)) from error
    return status.st_dev, status.st_ino


def told(path: str, error: Exception) -> str:
    """What has gone wrong with a file, and what to do, in one line."""
    said = getattr(error, "strerror", None) or str(error) or OUT_OF_MEMORY
    found = (remedy for words, remedy in REMEDIES.items() if said.startswith(words))
    return ": ".join(filter(None, (path, said, next(found, ""))))


class StoreBusy(StoreError):
    """Another writer has had the database for too long."""


class StoreReplaced(StoreError):
    """What is at the path is not what is open: reopen() it."""


@lru_cache(maxsize=None)  # there are three
def _insert(table: str, columns: Sequence[str]) -> str:
    """Insert a row, unless its id, which is given once more at the end, is taken."""
    marks = ", ".join("?" * len(columns))
    taken = f"SELECT 1 FROM {table} WHERE id = ?"
    return f"INSERT INTO {table} ({', '.join(columns)}) SELECT {marks} WHERE NOT EXISTS ({taken})"


class WriteLock:
    """The one writer between processes: a turnstile of two flocks beside the database.

    A waiter takes the gate, then waits for the lock with the gate in its hand, so that nobody
    overtakes it; with the lock alone a busy server starves everyone else. Whoever does not go on
    asking leaves the gate. The files are never unlinked: a lock on an unlinked file excludes
    nobody.

    Checkpoints take it too. SQLite 3.7.0 to 3.51.2 can corrupt a WAL database when a checkpoint
    meets another connection's write, and the boxes that we run on keep their old SQLite.
    """

    def __init__(self, database: str) -> None:
        self._database = database
        self._gate = self._open(f"{database}.gate", database)
        try:
            self._lock = self._open(f"{database}.lock", database)
        except OSError:
            os.close(self._gate)
            raise
        self._at_gate = self._held = False

    @staticmethod
    def _open(path: str, database: str) -> int:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with suppress(OSError):  # no database yet, or not our file: then they are right already
            status = os.stat(database)
            os.fchown(descriptor, status.st_uid, status.st_gid)
            os.fchmod(descriptor, stat.S_IMODE(status.st_mode) | 0o600)
        return descriptor

    def is_there(self) -> bool:
        """Whether others lock the same files: somebody may have removed them."""
        gate, lock = identity(f"{self._database}.gate"), identity(f"{self._database}.lock")
        return gate == identity(self._gate) and lock == identity(self._lock)

    @staticmethod
    def take(descriptor: int) -> bool:
        """Lock a file, if that can be had without waiting."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise StoreError(f"cannot lock: {error.strerror}") from error
        return True

    def attempt(self) -> bool:
        """Go one step further without waiting. True when the lock is held."""
        if not self._at_gate:
            self._at_gate = self.take(self._gate)
        if self._at_gate:
            self._held = self.take(self._lock)
            if self._held:
                self.leave_gate()
        return self._held

    def wait(self, patience: float) -> None:
        """Take the lock. Raises StoreBusy when it is not to be had for so many seconds."""
        deadline = time.monotonic() + patience
        while not self.attempt():
            if time.monotonic() > deadline:
                self.leave_gate()
                raise StoreBusy(f"another process is writing to {self._database}")
            time.sleep(LOCK_POLL)

    def leave_gate(self) -> None:
        """Wait no longer."""
        if self._at_gate:
            fcntl.flock(self._gate, fcntl.LOCK_UN)
            self._at_gate = False

    def release(self) -> None:
        """Give the lock back, where it is held; a place at the gate is kept."""
        if self._held:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._held = False

    def close(self) -> None:
        """Release, and close the files. Idempotent."""
        if self._gate >= 0:
            self.release()
            self.leave_gate()
            os.close(self._gate)
            os.close(self._lock)
            self._gate = self._lock = -1


class Store:
    """One connection to the database.

    A transaction is begin(), statements, then commit() or abandon(). After any error of SQLite
    the transaction is dead: FULL, IOERR and NOMEM have rolled it back already, and a further
    statement would commit on its own.
    """

    def __init__(self, path: str) -> None:
        """Take a place beside the database; open() opens it. Raises StoreError."""
        self.path = os.path.realpath(path)  # a link must lead to the same lock
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise StoreError(f"{self.path} is not a file")
        folder = os.path.dirname(self.path)
        if not os.path.isdir(folder):
            raise StoreError(f"there is no folder {folder} for the database")
        try:
            self.lock = WriteLock(self.path)
        except OSError as error:
            raise StoreError(f"cannot open {told(error.filename, error)}") from error
        self._connection: Optional[sqlite3.Connection] = None
        self._identity: Identity = None
        self._wal_identity: Identity = None
        self._refused = ""  # why what is at the path is not worked with
        self._synchronous = ""
        self._waits_for = ""
        # Checkpoints. Moments are in the connection's count of rows changed.
        self._checkpointed_at = self._moved_at = 0  # all of the WAL, and a part of it
        self._doublings = 0  # of CHECKPOINT_AFTER
        self._slowest = 0.0  # seconds that a part, or the disk with it, has taken
        self._complaint = ""  # why the last one failed
        self._reader: Optional[sqlite3.Connection] = None
        self._held_at: Optional[int] = None  # what came later is held back by the reader
        self._file = -1  # the database's, for the flush
        self._flush: Optional[threading.Thread] = None
        self._flush_failed = ""  # why

    # Opening and closing: under the lock, by the caller.

    def exists(self) -> bool:
        """Whether there is a file: looked at, never opened."""
        return os.path.exists(self.path)

    @property
    def is_open(self) -> bool:
        """Whether there is a connection."""
        return self._connection is not None

    def open(self, as_it_is: bool = False) -> bool:
        """Connect, making an empty file of mode 0600 where there is none; or change nothing.

        True when the database has our schema, False when it is empty. Raises StoreError.
        """
        try:
            if not self.exists():
                # Closing a descriptor of a file drops the process's POSIX locks on it, and with
                # them those of SQLite: so never on a database that may be open.
                os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            opened = identity(self.path)
            self._synchronous, self._checkpointed_at, self._moved_at = "", 0, 0
            self._connection = self._connect()
            is_ours = self._recognize(as_it_is)
            self._identity, self._wal_identity = opened, identity(f"{self.path}-wal")
            return is_ours
        except OSError as error:
            raise StoreError(f"cannot make {told(self.path, error)}") from error
        except FAILURES as error:
            raise StoreError(f"cannot open {told(self.path, error)}") from error
        except StoreError as error:
            raise StoreError(f"cannot open {error}") from error

    def _connect(self) -> sqlite3.Connection:
        uri = f"file:{quote(os.fsencode(self.path))}?mode=rw"
        return sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None)

    def _disconnect(self) -> None:
        """The last descriptor of the database that is closed is one of SQLite's own, or ours after
        all of them: with any other its locks would go."""
        if self._flush is not None:
            self._flush.join()
        if self._flush_failed:
            self._end(self._flush_failed)
        for connection in filter(None, (self._reader, self._connection)):
            connection.close()
        if self._file >= 0:
            os.close(self._file)
        self._connection = self._reader = self._held_at = self._flush = None
        self._file = -1

    def _recognize(self, as_it_is: bool) -> bool:
        application = self._value("PRAGMA application_id")
        version = self._value("PRAGMA user_version")
        if application != APPLICATION_ID and self._value("SELECT count(*) FROM sqlite_master"):
            raise StoreError(f"{self.path}: it is the database of another program")
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{self.path}: it was made by a newer hostenroll (schema {version}, this one "
                f"knows {SCHEMA_VERSION}): use that one"
            )
        if application == APPLICATION_ID and version not in (SCHEMA_VERSION, *ALTERATIONS):
            raise StoreError(f"{self.path}: its schema version {version} was never one of ours")
        self._run(f"PRAGMA page_size = {PAGE_SIZE}")  # of a database that is empty
        if not as_it_is and self._value("PRAGMA journal_mode = WAL") != "wal":
            raise StoreError(f"{self.path}: its file system cannot do write-ahead logging")
        self._run("PRAGMA wal_autocheckpoint = 0")
        self._run(f"PRAGMA journal_size_limit = {WAL_MAXIMUM}")
        self._run("PRAGMA foreign_keys = ON")
        self._run(f"PRAGMA cache_size = -{PAGE_CACHE_KIB}")
        self.version()  # the first read makes the WAL, also where there was none until now
        return bool(application == APPLICATION_ID)

    def create(self, organization: Organization, kids: Iterable[str]) -> None:
        """Make the schema in an empty database, and what every database has; all or nothing."""
        self._begin_durable()
        self._complete_schema()
        self.add_organization(organization)
        for kid in kids:
            self.add_signing_key(kid, organization.created_at)
        self._run("COMMIT")
        self._wal_identity = identity(f"{self.path}-wal")

    def version(self) -> int:
        """Of the schema that the database has."""
        return int(self._value("PRAGMA user_version"))

    def migrate(self) -> None:
        """Bring the schema of an older version up to ours; all or nothing."""
        version = self.version()
        if version < SCHEMA_VERSION:
            self._begin_durable()
            for older in range(version, SCHEMA_VERSION):
                for statement in ALTERATIONS[older]:
                    self._run(statement)
            self._complete_schema()
            self._run("COMMIT")
            log.info("brought %s from schema %d to %d", self.path, version, SCHEMA_VERSION)

    def _begin_durable(self) -> None:
        self._run("PRAGMA synchronous = FULL")
        self._synchronous = "FULL"
        self._run("BEGIN IMMEDIATE")

    def _complete_schema(self) -> None:
        """Create what is missing, statement by statement: executescript() would commit first."""
        there = {row[0] for row in self._rows("SELECT name FROM sqlite_master")}
        statement = ""
        for line in SCHEMA.splitlines(keepends=True):
            statement += line
            if sqlite3.complete_statement(statement):
                created = CREATED.search(statement)
                if created is None or created[1] not in there:
                    self._run(statement)
                statement = ""

    def close(self) -> None:
        """Close under the lock: the last connection to close checkpoints. Whoever keeps the lock
        from us for so long is at work in the database, so ours is not the last."""
        if self._connection is not None:
            with suppress(StoreError):
                self.lock.wait(CLOSE_PATIENCE)
                if identity(self.path) not in (None, self._identity):
                    self._let_go()  # else its WAL would be taken for that of what lies there now
            self._disconnect()
        self.lock.close()

    # Transactions.

    def begin(self, writes: bool, durable: bool) -> bool:
        """Begin. False when another writer is at work: ask again, or abandon().

        A durable transaction is on the disk when commit() returns; one that is not may be lost
        with the power, and never with the process.
        """
        self.require_same_file()
        if durable:
            self.require_companions()
        if not writes:
            self._run("BEGIN")
            return True
        if not self.lock.attempt():
            self._waits_for = f"another process is writing to {self.path}"
            return False
        synchronous = "FULL" if durable else "NORMAL"
        if synchronous != self._synchronous:  # inside a transaction it is an error
            self._run(f"PRAGMA synchronous = {synchronous}")
            self._synchronous = synchronous
        if self._is_part_due():
            self._hold_back()
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except FAILURES as error:
            if not self._is_busy(error):
                raise self._failure(error) from error
            self._waits_for = str(self._failure(error))
            self.lock.release()
            return False
        return True

    def give_up(self) -> StoreBusy:
        """Wait no longer for the other writer; what there was to wait for."""
        self.lock.leave_gate()
        return StoreBusy(self._waits_for)

    @staticmethod
    def _is_busy(error: Exception) -> bool:
        """Whether another program, without our lock, is writing. Python before 3.11 does not say
        which error it is: then it may be, the wait is bounded, and in the end it is named."""
        busy = 5  # SQLITE_BUSY
        code = getattr(error, "sqlite_errorcode", busy)
        return isinstance(error, sqlite3.OperationalError) and code & 0xFF == busy

    def commit(self) -> None:
        """End the transaction and keep it. Raises StoreError; abandon() then."""
        self._run("COMMIT")
        self.lock.release()

    def abandon(self) -> None:
        """End the transaction, where there still is one, and keep nothing."""
        try:
            if self._connection is not None and self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except FAILURES as error:
            log.error("cannot roll back: %s", self._failure(error))
        finally:
            self.lock.release()
            self.lock.leave_gate()

    def start_over(self) -> None:
        """Undo all of a transaction that writes, and go on in a new one."""
        self._run("ROLLBACK")
        self._run("BEGIN IMMEDIATE")

    def savepoint(self) -> None:
        """Mark the place that rollback_to() returns to."""
        self._run("SAVEPOINT act")

    def keep(self) -> None:
        """Keep what came after the savepoint."""
        self._run("RELEASE act")

    def undo(self) -> None:
        """Undo what came after the savepoint."""
        self._run("ROLLBACK TO act")
        self._run("RELEASE act")

    # Checkpoints: PASSIVE ones, under the lock.
    #
    # A checkpoint that moves all of a large fleet's WAL waits for the disk, for pages that lie all
    # over the database: some 30 ms in which nobody is answered. One that cannot move all does not
    # wait: SQLite syncs the WAL before it moves a page, and the database only before the WAL is
    # begun anew, when all is moved. So most is moved while a reader holds the last frames back, and
    # a thread has the disk take it while we go on. What has come meanwhile is less, is moved in
    # the same way, and so on; what is left in the end is little, and the WAL begins anew. What
    # SQLite does for safety it does as ever: nothing depends on the thread, or on the reader.
    # But for one thing: pages that the disk has failed to take it would move once more, and those
    # of a part it would not. Then the process ends and closes nothing, so whoever opens the
    # database next moves all of the WAL again.
    #
    # How much is in the WAL is not to be had: the file is written over from its start, because to
    # truncate it and let it grow again costs a heartbeat a tenth of its time. So the rows that
    # change are counted: a heartbeat's is a page, each of an enrollment's up to three. Of a small
    # fleet they are the same few pages again and again: the more rows, the less a checkpoint costs
    # each of them.

    def checkpoint(self, is_due: bool = False) -> None:
        """Move a part of the WAL into the database, or the rest, when it is time or is_due; not
        while another writer is at work."""
        if self._flush_failed:
            self._end(self._flush_failed)
        changes = self._db.total_changes
        is_whole = is_due or self._is_rest(changes)
        if self._held_at is None and not is_whole:
            return
        try:
            # Another may hold a lock that has taken the place of ours.
            if not self.lock.is_there() or not self.lock.attempt():
                self.lock.leave_gate()
                return
            if is_whole:
                self._let_reader_go()
            moved = changes if self._held_at is None else self._held_at
            with self._timed():
                self._run("PRAGMA wal_checkpoint(PASSIVE)")
            self._moved_at, self._complaint = moved, ""
            if is_whole:
                self._checkpointed_at = changes
                step = 1 if self._slowest < CHECKPOINT_TIME else -1
                self._doublings = min(max(0, self._doublings + step), CHECKPOINT_DOUBLINGS)
                self._slowest = 0.0
            else:
                self._start_flush()
        except StoreError as error:
            if self._moved_at > self._checkpointed_at and self._is_of_a_sync(error.__cause__):
                self._end(str(error))
            self._checkpointed_at = self._moved_at = changes  # it is not tried again at once
            if not is_due and str(error) != self._complaint:  # what is due has been told already
                log.warning("cannot checkpoint: %s", error)
            self._complaint = str(error)
        finally:
            try:
                self._let_reader_go()
            finally:
                self.lock.release()

    def _is_rest(self, changes: int) -> bool:
        """Whether what is left is little, or so much that no part can be waited for."""
        if changes - self._checkpointed_at >= 2 * CHECKPOINT_AFTER << CHECKPOINT_DOUBLINGS:
            return True  # of the parts, or of trouble with them
        is_begun = self._moved_at > self._checkpointed_at and not self._is_flushing()
        return is_begun and changes - self._moved_at <= CHECKPOINT_REST

    def _is_part_due(self) -> bool:
        """Whether it is time for a part, when the transaction that begins is held back."""
        changes = self._db.total_changes
        if self._moved_at > self._checkpointed_at:
            is_due = changes - self._moved_at > CHECKPOINT_REST
        else:
            is_due = changes - self._checkpointed_at >= CHECKPOINT_AFTER << self._doublings
        return is_due and self._held_at is None and not self._is_flushing()

    def _hold_back(self) -> None:
        """Have the reader begin: what is written from now on stays in the WAL."""
        try:
            if self._file < 0:
                self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            if identity(self._file) != self._identity:
                return  # another has taken its place just now
            if self._reader is None:
                self._reader = self._connect()
            self._reader.execute("BEGIN")
            self._reader.execute("SELECT 1 FROM service").fetchall()
            self._held_at = self._db.total_changes
        except (*FAILURES, OSError, StoreError):
            self._let_reader_go()  # then all is moved at once, when it is much

    def _let_reader_go(self) -> None:
        self._held_at, reader = None, self._reader
        if reader is None or not reader.in_transaction:
            return
        try:
            reader.execute("COMMIT")
        except FAILURES:
            self._reader = None
            reader.close()

    @staticmethod
    def _is_of_a_sync(error: Optional[BaseException]) -> bool:
        """Whether SQLite could not sync; before Python 3.11 it may have been any of its EIO."""
        code = 1034  # SQLITE_IOERR_FSYNC
        may_be = code if str(error) == "disk I/O error" else 0
        return bool(getattr(error, "sqlite_errorcode", may_be) == code)

    def _end(self, error: str) -> None:
        log.critical("the disk has not taken what was written, start again: %s", error)
        os._exit(1)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._slowest = max(self._slowest, time.monotonic() - began)

    def _start_flush(self) -> None:
        def flush(file: int) -> None:
            try:
                with self._timed():
                    os.fdatasync(file)
            except OSError as error:
                self._flush_failed = told(self.path, error)

        with suppress(RuntimeError, MemoryError):  # no thread is to be had: then SQLite waits
            thread = threading.Thread(target=flush, args=(self._file,), daemon=True)
            thread.start()
            self._flush = thread

    def _is_flushing(self) -> bool:
        return self._flush is not None and self._flush.is_alive()

    @contextmanager
    def alone_in(self, folder: str) -> Iterator[None]:
        """Be the only one who copies into a folder. Raises StoreBusy."""
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            if not WriteLock.take(descriptor):
                raise StoreBusy(f"another backup into {folder} is under way")
            yield
        finally:
            os.close(descriptor)

    def copy_to(self, path: str, pause: Report) -> Set[str]:
        """Copy the database as it is at this moment into an empty file, while others go on
        writing: a read transaction holds the moment fast. A pause comes after BACKUP_PAGES. The
        kids that the copy knows."""
        try:
            target = sqlite3.connect(path, isolation_level=None)
            try:
                target.execute("PRAGMA journal_mode = OFF")
                target.execute("PRAGMA synchronous = OFF")  # the caller syncs, once
                self._run("BEGIN")
                known = {row.kid for row in self.signing_keys()}
                self._db.backup(
                    target,
                    pages=BACKUP_PAGES,
                    progress=lambda status, left, total: pause(total - left, total),
                )
                return known
            finally:
                self.abandon()
                target.close()
        except FAILURES as error:
            raise StoreError(f"cannot copy {told(self.path, error)}") from error

    def faults(self) -> List[str]:
        """What is wrong with the database, by SQLite's own checks and by our schema."""
        try:
            found = [row[0] for row in self._rows("PRAGMA integrity_check") if row[0] != "ok"]
            lacking = self._rows("PRAGMA foreign_key_check")
            found += [f"a row of {row[0]} lacks its {row[2]}" for row in lacking]
            there = {row[0] for row in self._rows("SELECT name FROM sqlite_master")}
            if self.version() == SCHEMA_VERSION:
                found += [
                    f"{name} is missing" for name in CREATED.findall(SCHEMA) if name not in there
                ]
        except StoreError as error:
            return [str(error)]
        return found

    def require_same_file(self) -> None:
        """See that what is at the path is what is open. Raises StoreError; StoreReplaced where
        something else is there."""
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise StoreError(f"{self.path} is gone ({error.strerror}): put it back") from error
        if (status.st_dev, status.st_ino) != self._identity:
            raise StoreReplaced(self._refused or f"{self.path} has been replaced")

    def require_companions(self) -> None:
        """See that what lies beside the database is what we go by: what is written into a WAL that
        has been removed nobody else sees. Raises StoreError."""
        if identity(f"{self.path}-wal") != self._wal_identity:
            raise StoreError(
                f"{self.path}-wal has been removed: stop every server, and start again; what it "
                "held is written into the database when the last one stops"
            )
        if not self.lock.is_there():
            raise StoreReplaced(f"the lock beside {self.path} has been removed")

    def is_replaced(self) -> bool:
        """Whether there is something to reopen()."""
        try:
            self.require_same_file()
            self.require_companions()
        except StoreError as error:
            return isinstance(error, StoreReplaced)
        return False

    def reopen(self) -> bool:
        """Open what is at the path now, and keep the lock that is there. False when another writer
        is at work. Raises StoreBusy or StoreReplaced, and the old one is still open; StoreError."""
        try:
            lock = WriteLock(self.path)
        except OSError as error:
            raise StoreBusy(f"cannot open {told(error.filename, error)}") from error
        if not lock.attempt():
            lock.close()
            return False
        self.lock.close()
        self.lock = lock
        if identity(self.path) != self._identity:
            if not self.file_sizes()[0]:
                raise StoreReplaced(f"{self.path} is empty: restore it from a backup")
            self._let_go()
            if not self.open():
                raise StoreError(f"{self.path} is empty: restore it from a backup")
        return True

    def _let_go(self) -> None:
        """Close a file that is no longer at the path. What is in its WAL goes into it, wherever it
        is now: SQLite would take that WAL for the one of the file that lies there instead. When
        it is not there, another server has done so, or somebody works with the new one already.
        """
        if self._connection is None:
            return
        self._let_reader_go()
        if identity(f"{self.path}-wal") in (None, self._wal_identity):
            try:
                is_busy, _, _ = self._rows("PRAGMA wal_checkpoint(TRUNCATE)")[0]
            except StoreError as error:
                said = f"the old {self.path} cannot be left: {error}"
                raise StoreBusy(said) from error
            if is_busy:
                raise StoreBusy(f"{self.path} has been replaced while others read the old one")
            self._unlink_wal()
        self.disown()

    def _unlink_wal(self) -> None:
        try:
            for path in (f"{self.path}-wal", f"{self.path}-shm"):
                with suppress(FileNotFoundError):
                    os.unlink(path)
        except OSError as error:
            said = f"the old {self.path} cannot be left: {told(error.filename, error)}"
            raise StoreBusy(said) from error

    def disown(self, reason: str = "") -> None:
        """Close a database that is not to be worked with; it counts as replaced."""
        self._identity, self._refused = None, reason
        self._disconnect()

    def file_sizes(self) -> Tuple[int, int]:
        """Bytes of the database and of its WAL: looked at, never opened."""
        sizes = []
        for path in (self.path, f"{self.path}-wal"):
            try:
                sizes.append(os.stat(path).st_size)
            except FileNotFoundError:
                sizes.append(0)
        return sizes[0], sizes[1]

    # Statements: what goes around these says why.

    @property
    def _db(self) -> sqlite3.Connection:
        assert self._connection is not None, "open() comes first"
        return self._connection

    def _failure(self, error: Exception) -> StoreError:
        return StoreError(told(self.path, error))

    def _run(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, parameters)
        except FAILURES as error:
            raise self._failure(error) from error

    def _rows(self, statement: str, *parameters: Any) -> List[Any]:
        try:
            return self._db.execute(statement, parameters).fetchall()
        except FAILURES as error:
            raise self._failure(error) from error

    def _value(self, statement: str, *parameters: Any) -> Any:
        rows = self._rows(statement, *parameters)
        return rows[0][0] if rows else None

    def _one(self, record: Callable[[Iterable[Any]], T], statement: str, *p: Any) -> Optional[T]:
        rows = self._rows(statement, *p)
        return record(rows[0]) if rows else None

    def _changed(self, statement: str, *parameters: Any) -> int:
        return self._run(statement, *parameters).rowcount

    # Organizations, API keys, signing keys, service.

    def add_organization(self, organization: Organization) -> bool:
        """False when there is one of that name."""
        statement = "INSERT OR IGNORE INTO organization (id, created_at) VALUES (?, ?)"
        return self._changed(statement, *organization) == 1

    def organizations(self) -> List[Organization]:
        """All, in the order of their names."""
        return [Organization(*row) for row in self._rows("SELECT * FROM organization ORDER BY id")]

    def has_organization(self, name: str) -> bool:
        """Whether there is one of that name."""
        return self._value("SELECT 1 FROM organization WHERE id = ?", name) is not None

    def add_api_key(self, key: ApiKey) -> bool:
        """False when there is one of that id."""
        return self._changed(_insert("api_key", ApiKey._fields), *key, key.id) == 1

    def api_key(self, number: int) -> Optional[ApiKey]:
        """One row, by id."""
        return self._one(ApiKey._make, f"SELECT {_API_KEY} FROM api_key WHERE id = ?", number)

    def api_keys(self) -> List[ApiKey]:
        """All, the newest first."""
        rows = self._rows(f"SELECT {_API_KEY} FROM api_key ORDER BY id DESC")
        return [ApiKey(*row) for row in rows]

    def revoke_api_key(self, number: int, now: int) -> bool:
        """False when there is none, or it is revoked already."""
        statement = "UPDATE api_key SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL"
        return self._changed(statement, now, number) == 1

    def signing_keys(self) -> List[SigningKeyRow]:
        """All that ever were, the newest first."""
        columns = ", ".join(SigningKeyRow._fields)
        rows = self._rows(f"SELECT {columns} FROM signing_key ORDER BY number DESC")
        return [SigningKeyRow(*row) for row in rows]

    def add_signing_key(self, kid: str, now: int) -> None:
        """Give a kid a number; one that was retired is there again."""
        statement = "INSERT OR IGNORE INTO signing_key (kid, created_at) VALUES (?, ?)"
        self._run(statement, kid, now)
        self._run("UPDATE signing_key SET retired_at = NULL WHERE kid = ?", kid)

    def retire_signing_key(self, kid: str, now: int) -> None:
        """Record that a key is no longer in the key file."""
        self._run("UPDATE signing_key SET retired_at = ? WHERE kid = ?", now, kid)

    def signing_key_number(self, kid: str) -> Optional[int]:
        """The number of a kid."""
        number: Optional[int] = self._value("SELECT number FROM signing_key WHERE kid = ?", kid)
        return number

    def hosts_by_signing_key(self, number: int) -> int:
        """How many hosts hold credentials that a key has signed."""
        return int(self._value("SELECT count(*) FROM heartbeat WHERE key_number = ?", number))

    def hosts_not_past(self, number: int) -> int:
        """How many hosts were last heard with a credential of a key or of an older one that is
        still good: the next one of those may be of this key, and not yet used."""
        statement = """SELECT count(*) FROM heartbeat WHERE key_number IN
             (SELECT number FROM signing_key WHERE number <= ? AND retired_at IS NULL)"""
        return int(self._value(statement, number))

    def service(self) -> Optional[Service]:
        """What the servers say of themselves; None before the first one ran."""
        return self._one(Service._make, f"SELECT {_SERVICE} FROM service")

    def put_service(self, service: Service) -> None:
        """Write the row anew."""
        marks = ", ".join("?" * len(service))
        self._run("DELETE FROM service")
        self._run(f"INSERT INTO service ({_SERVICE}) VALUES ({marks})", *service)

    def keep_alive(self, now: int) -> None:
        """Say that a server lives."""
        self._run("UPDATE service SET alive = max(alive, ?)", now)

    def put_pin(self, pin: str) -> None:
        """Say what the pin of the server's certificate is now."""
        self._run("UPDATE service SET pin = ?", pin)

    # Tokens.

    def add_token(self, token: Token) -> bool:
        """False when there is one of that id."""
        return self._changed(_insert("token", Token._fields), *token, token.id) == 1

    def token(self, number: int) -> Optional[Token]:
        """One row, by id."""
        return self._one(Token._make, f"SELECT {_TOKEN} FROM token WHERE id = ?", number)

    def tokens(self, organization: Optional[str], before: int, limit: int) -> List[Token]:
        """The newest with an id below before; of one organization, or of all."""
        return [Token(*row) for row in self._newest("token", _TOKEN, organization, before, limit)]

    def use_token(self, number: int, now: int, address: str) -> bool:
        """Take one use. False when it may not be taken: the guard against every race."""
        statement = """UPDATE token SET uses = uses + 1, used_at = ?, used_from = ?
             WHERE id = ? AND uses < max_uses AND revoked_at IS NULL AND expires_at > ?"""
        return self._changed(statement, now, address, number, now) == 1

    def revoke_token(self, number: int, now: int) -> None:
        """Revoke, unless it is."""
        self._run(
            "UPDATE token SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL", now, number
        )

    def prune_tokens(self, after: int, before: int, ended: int, limit: int) -> Optional[int]:
        """Look at so many tokens with an id between after and before, and delete those that have
        ended by a time. The id to go on after; None when all have been looked at."""
        statement = "SELECT id FROM token WHERE id > ? AND id < ? ORDER BY id LIMIT ?"
        rows = self._rows(statement, after, before, limit)
        if not rows:
            return None
        last: int = rows[-1][0]
        self._run(
            """DELETE FROM token WHERE id > ? AND id <= ? AND coalesce(revoked_at,
                 CASE WHEN uses >= max_uses THEN used_at ELSE expires_at END) <= ?""",
            after,
            last,
            ended,
        )
        return last if len(rows) == limit else None

    def hosts_by_token(self, number: int, limit: int) -> List[int]:
        """The ids of the newest hosts that came in by a token."""
        statement = "SELECT id FROM host WHERE token_id = ? ORDER BY id DESC LIMIT ?"
        return [row[0] for row in self._rows(statement, number, limit)]

    # Hosts.

    def add_host(self, host: Host) -> bool:
        """Add a row to host and one to heartbeat. False when there is one of that id."""
        columns = len(_HOST_ALONE)
        if self._changed(_insert("host", _HOST_ALONE), *host[:columns], host.id) == 0:
            return False
        statement = "INSERT INTO heartbeat VALUES (?, ?, ?, ?, ?)"
        self._run(statement, host.id, host.last_seen, host.serial, host.key_number, host.active)
        return True

    def host(self, number: int) -> Optional[Host]:
        """One row, by id."""
        statement = f"SELECT {_HOST} FROM host JOIN heartbeat ON host_id = id WHERE id = ?"
        return self._one(Host._make, statement, number)

    def replayed_host(self, token: int, idempotency: bytes) -> Optional[Host]:
        """The host that came in by a token with an Idempotency-Key."""
        statement = f"""SELECT {_HOST} FROM host JOIN heartbeat ON host_id = id
             WHERE admitted_by = ? AND idempotency = ?"""
        return self._one(Host._make, statement, token, idempotency)

    def hosts(self, organization: Optional[str], before: int, limit: int) -> List[ListedHost]:
        """The newest with an id below before; of one organization, or of all."""
        tables = "host JOIN heartbeat ON host_id = id"
        rows = self._newest(tables, _LISTED_HOST, organization, before, limit)
        return list(map(ListedHost._make, rows))

    def _newest(
        self,
        tables: str,
        columns: str,
        organization: Optional[str],
        before: int,
        limit: int,
        key: str = "id",
    ) -> List[Any]:
        own = "" if organization is None else "organization_id = ? AND"
        of = () if organization is None else (organization,)
        statement = f"""SELECT {columns} FROM {tables}
             WHERE {own} {key} < ? ORDER BY {key} DESC LIMIT ?"""
        return self._rows(statement, *of, before, limit)

    def edit_host(self, number: int, changes: Mapping[str, Any]) -> None:
        """Set columns of a host; the caller names them, never a peer."""
        settings = ", ".join(f"{column} = ?" for column in changes)
        self._run(f"UPDATE host SET {settings} WHERE id = ?", *changes.values(), number)

    def hosts_by_hostname(self, organization: str, hostname: str, limit: int) -> List[Host]:
        """The newest of an organization by a hostname: RFC 4343, without the final dot."""
        statement = f"""SELECT {_HOST} FROM host JOIN heartbeat ON host_id = id
             WHERE organization_id = ? AND lower(rtrim(hostname, '.')) = lower(rtrim(?, '.'))
             ORDER BY id DESC LIMIT ?"""
        return [Host(*row) for row in self._rows(statement, organization, hostname, limit)]

    def census(
        self, organization: Optional[str], after: int, limit: int, bounds: StatusBounds
    ) -> Tuple[List[Tuple[str, str, int]], Optional[int]]:
        """Count so many hosts with an id above after by organization and status. The counts, and
        the id to go on after; None at the end."""
        where = "id > ?" if organization is None else "id > ? AND organization_id = ?"
        of = () if organization is None else (organization,)
        last = (
            f"SELECT max(id), count(*) FROM (SELECT id FROM host WHERE {where} ORDER BY id LIMIT ?)"
        )
        until, examined = self._rows(last, after, *of, limit)[0]
        if not examined:
            return [], None
        seen = "CASE WHEN last_seen > ? THEN min(?, last_seen - ?) ELSE last_seen END AS seen"
        statement = f"""SELECT organization_id, CASE WHEN NOT active THEN 'revoked'
                 WHEN last_seen = 0 THEN 'pending' WHEN seen >= ? THEN 'online'
                 WHEN seen >= ? THEN 'offline' ELSE 'missing' END AS status, count(*)
             FROM (SELECT organization_id, active, last_seen, {seen}
                     FROM host JOIN heartbeat ON host_id = id WHERE {where} AND id <= ?)
             GROUP BY organization_id, status"""
        times = (bounds.online, bounds.offline, bounds.ahead, bounds.started, bounds.set_back)
        rows = self._rows(statement, *times, after, *of, until)
        return [(row[0], row[1], row[2]) for row in rows], until if examined == limit else None

    def issue(self, number: int, holds: int, address: str) -> Optional[int]:
        """Issue a serial that nobody has, to who holds another; None when the host has been
        admitted anew since that one."""
        statement = """UPDATE host SET issued = max(issued, ?) + 1, issued_to = ?
             WHERE id = ? AND admitted_serial <= ?"""
        if self._changed(statement, holds, address, number, holds) == 0:
            return None
        return int(self._value("SELECT issued FROM host WHERE id = ?", number))

    def activate(self, number: int, revoked_at: Optional[int]) -> None:
        """Restore a host, or shut it out since a time: at once, for the next heartbeat."""
        self._run("UPDATE host SET revoked_at = ? WHERE id = ?", revoked_at, number)
        active = int(revoked_at is None)
        self._run("UPDATE heartbeat SET active = ? WHERE host_id = ?", active, number)

    def delete_host(self, number: int, now: int) -> None:
        """Remove a host and its heartbeat, and revoke the tokens that are bound to it."""
        self._run(
            "UPDATE token SET revoked_at = ? WHERE host_id = ? AND revoked_at IS NULL", now, number
        )
        self._run("DELETE FROM host WHERE id = ?", number)

    # Heartbeats.

    def beat(self, beats: Sequence[Beat]) -> int:
        """Write a run of heartbeats; how many of them matched."""
        try:
            return self._db.executemany(_BEAT, beats).rowcount
        except FAILURES as error:
            raise self._failure(error) from error

    def beat_late(self, number: int, now: int) -> None:
        """Write one heartbeat, whatever is written of those before it."""
        self._run("UPDATE heartbeat SET last_seen = ? WHERE host_id = ?", now, number)

    def supersede(self, number: int, serial: int, key_number: int) -> None:
        """From now on this credential of a host counts, and older ones do not."""
        statement = "UPDATE heartbeat SET serial = ?, key_number = ? WHERE host_id = ?"
        self._run(statement, serial, key_number, number)

    # The audit log.

    def last_event(self) -> Tuple[int, bytes]:
        """Number and mac that the next event is chained to."""
        rows = self._rows("SELECT number, mac FROM audit ORDER BY number DESC LIMIT 1")
        if rows:
            return rows[0][0], _octets(rows[0][1])
        anchor = self.anchor()
        return (anchor.number, anchor.mac) if anchor else (0, b"")

    def add_events(self, events: Sequence[Event]) -> None:
        """Append to the log."""
        marks = ", ".join("?" * len(Event._fields))
        try:
            self._db.executemany(f"INSERT INTO audit ({_EVENT}) VALUES ({marks})", events)
        except FAILURES as error:
            raise self._failure(error) from error

    def events(self, organization: Optional[str], before: int, limit: int) -> List[Event]:
        """The newest with a number below before; of one organization, or all."""
        rows = self._newest("audit", _EVENT, organization, before, limit, "number")
        return [Event(*row) for row in rows]

    def events_after(self, number: int) -> Iterator[Event]:
        """All that follow a number, in order; in one transaction."""
        statement = f"SELECT {_EVENT} FROM audit WHERE number > ? ORDER BY number"
        cursor = self._run(statement, number)
        try:
            yield from map(Event._make, cursor)
        except FAILURES as error:
            raise self._failure(error) from error

    def oldest_event(self) -> Optional[int]:
        """The number of the first event that is there."""
        number: Optional[int] = self._value("SELECT min(number) FROM audit")
        return number

    def anchor(self) -> Optional[Anchor]:
        """What the first of the rest is chained to, where there is an anchor."""
        return self._one(Anchor._make, "SELECT number, mac, proof FROM audit_anchor")

    def put_anchor(self, anchor: Anchor) -> None:
        """Chain what follows to this; what is not after it may be pruned now."""
        self._run("DELETE FROM audit_anchor")
        self._run("INSERT INTO audit_anchor VALUES (1, ?, ?, ?)", *anchor)

    def oldest_events(self, before: int, now: int, limit: int) -> List[Event]:
        """The first events of the log, as long as they are older than a time. One of a clock that
        was ahead is as old as what comes after it."""
        statement = f"SELECT {_EVENT} FROM audit ORDER BY number LIMIT ?"
        rows = map(Event._make, self._rows(statement, limit))
        events = list(takewhile(lambda event: event.at < before or event.at > now, rows))
        while events and events[-1].at >= before:
            events.pop()
        return events

    def prune_events(self, last: int) -> None:
        """Delete the first events up to a number that is not after the anchor."""
        self._run("DELETE FROM audit WHERE number <= ?", last)


# 6. Registry
#
# The rules. Every rule runs inside a tick: one transaction, one time (now, in Unix ms), and
# answers that are given only after the commit. Secrets alone are looked at ahead of it too. The
# command line uses the same rules by the same door, as a tick of one act. What the Store reports
# becomes a refusal here.

ALL_ORGANIZATIONS: Optional[str] = None


class Principal(NamedTuple):
    """Who asks, on the user API or the command line."""

    name: str  # as createdBy shows it
    organization: Optional[str]  # ALL_ORGANIZATIONS, or the only one that it sees
    role: str  # admin or viewer
    id: str = ""


class Origin(NamedTuple):
    """Where a request came from, for the log and the audit log."""

    address: str = ""  # '': the command line of this machine, or the server itself
    request: str = ""  # its id


class Noted(NamedTuple):
    """An event, and the id of the request that it comes of."""

    event: Event
    request: str


NOWHERE = Origin()
UNFINISHED = object()  # what an act comes to that wants to be run again, in another tick


class Act(NamedTuple):
    """Something to do in a tick. Of one that may write, a refusal leaves nothing behind; one
    that only reads may be UNFINISHED."""

    run: Callable[[int], Any]  # given the tick's time in Unix ms; its result is what it comes to
    writes: bool = True
    durable: bool = True
    origin: Origin = NOWHERE


class Standing(NamedTuple):
    """What a credential is judged by, beside its host: most of a fleet have the same."""

    serial: int
    organization: str
    kid: str


PlainBeat = Tuple[int, Standing]  # of a host, with nothing to tell and nothing to renew


def plain_beat(claims: Claims) -> PlainBeat:
    """The plain heartbeat of who has a credential."""
    return claims.host, Standing(claims.serial, claims.organization, claims.kid)


Work = Union[PlainBeat, Act]  # what a tick runs


class TokenOrder(NamedTuple):
    """What a token is to be."""

    organization: Optional[str] = None
    ttl: int = TOKEN_TTL
    max_uses: int = 1
    description: str = ""
    hostname: Optional[str] = None
    labels: Mapping[str, str] = {}


class Applicant(NamedTuple):
    """What a machine says when it enrolls, and where it says it from."""

    token: str
    hostname: str
    name: Optional[str] = None
    os: str = ""
    architecture: str = ""
    docker_version: str = ""
    idempotency_key: Optional[str] = None
    address: str = ""


class Grant(NamedTuple):
    """A credential, fresh from the press; its expiry in Unix seconds."""

    credential: str
    expires_at: Optional[int]


class Enrollment(NamedTuple):
    """A host and the credential that it now holds."""

    host: Host
    grant: Grant


class Beaten(NamedTuple):
    """A heartbeat that counted: lastSeen in Unix ms, and a renewal where one is due."""

    last_seen: int
    grant: Optional[Grant]


class TokenView(NamedTuple):
    """A token and what is computed of it."""

    token: Token
    state: str
    hosts: List[int]


class HostView(NamedTuple):
    """A host and what is computed of it."""

    host: ListedHost
    status: str
    reason: str
    warnings: Sequence[str] = ()


class SigningKeyView(NamedTuple):
    """A signing key, what it does, and how many hosts hold a credential that it has signed."""

    key: SigningKeyRow
    state: str
    hosts: int


class Page(NamedTuple):
    """A part of a list. It may be empty and not the last: only next None ends a list."""

    items: List[Any]
    next: Optional[int]  # the id to go on below


def compact(labels: str) -> str:
    """Labels of a row as they are sent: in JSON without white space. So they are kept, but in an
    older database with it, and then it is behind each name."""
    return json_text(json.loads(labels)) if '": "' in labels else labels


class HostQuery(NamedTuple):
    """Which hosts to list."""

    organization: Optional[str] = None
    status: Optional[str] = None
    labels: Sequence[Tuple[str, str]] = ()
    text: str = ""
    before: int = LAST_ID
    limit: int = PAGE_DEFAULT

    def filter(self) -> Optional[Callable[[ListedHost, str], bool]]:
        """What says whether a host with a status is one of those asked for; None: all are."""
        asked, text = self.status, self.text.casefold()
        if asked is None and not text and not self.labels:
            return None
        # Nothing else in compact() looks like this: a name has no quotes, and those of values are
        # escaped.
        labels = [f'"{name}":{json_text(value)}' for name, value in self.labels]

        def matches(host: ListedHost, status: str) -> bool:
            if asked is not None and asked != status:
                return False
            if text and text not in f"{host.name}\n{host.hostname}\n{host.id:016x}".casefold():
                return False
            if not labels:
                return True
            its = compact(host.labels)
            return all(label in its for label in labels)

        return matches


class TokenQuery(NamedTuple):
    """Which tokens to list."""

    organization: Optional[str] = None
    state: Optional[str] = None
    before: int = LAST_ID
    limit: int = PAGE_DEFAULT


class EventQuery(NamedTuple):
    """Which events to list."""

    organization: Optional[str] = None
    action: Optional[str] = None
    subject: Optional[str] = None
    code: Optional[str] = None
    before: int = LAST_ID
    limit: int = PAGE_DEFAULT

    def matches(self, event: Event) -> bool:
        """Whether an event is one of those asked for."""
        return (
            self.action in (None, event.action)
            and self.subject in (None, event.subject)
            and self.code in (None, event.code)
        )


STATUSES = ("pending", "online", "offline", "missing", "revoked")
TOKEN_STATES = ("valid", "used", "expired", "revoked")
ACTIONS = (
    "mint",
    "enroll",
    "re-enroll",
    "replay",
    "renew",
    "supersede",
    "refuse",
    "edit",
    "revoke",
    "restore",
    "delete",
    "add",
    "rotate",
    "retire",
    "init",
)


class Histogram:
    """How often a measure was at most so much: cumulative only when it is shown."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, once or for as many as it is true of."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def quantile(self, per_mille: int) -> float:
        """The bound that so many of a thousand values do not exceed: never less than is true.
        Infinite where there is no such bound; of no values at all, the first bound."""
        rank = -(-per_mille * sum(self.counts) // 1000)
        reached = accumulate(self.counts)
        return next(
            bound for bound, so_far in zip((*self.bounds, math.inf), reached) if so_far >= rank
        )


class Metrics:
    """What a process has counted since it started. It may be forgotten."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()  # of what was accepted, or is committed
        self.open_connections = 0
        self.refusals: Counter[str] = Counter()  # by code
        self.requests = Histogram(SECONDS_BUCKETS)
        self.commits = Histogram(SECONDS_BUCKETS)
        self.lock_waits = Histogram(SECONDS_BUCKETS)
        self.ticks = Histogram(SIZE_BUCKETS)


class Census:
    """The fleet counted by organization and status, in slices: it may be a million hosts."""

    def __init__(self, organization: Optional[str], now: int) -> None:
        self.organization = organization
        self.counts: Counter[Tuple[str, str]] = Counter()
        self.is_finished = False
        self._at = now  # of the last slice
        self._after: Optional[int] = -1
        self._slices = 0

    def go_on(self, store: Store, bounds: StatusBounds, now: int) -> None:
        """Count one slice more."""
        if self._after is not None:
            rows, self._after = store.census(
                self.organization, self._after, COUNTED_AT_ONCE, bounds
            )
            self._slices += 1
            for organization, status, count in rows:
                self.counts[organization, status] += count
        self._at = now
        self.is_finished = self._after is None

    def is_good(self, now: int) -> bool:
        """Whether it need not be made anew: it goes on, or was long, and is not old."""
        is_worth_it = self._slices > 1 or not self.is_finished
        return is_worth_it and 0 <= now - self._at <= CENSUS_KEPT * SECOND_MS


def token_state(token: Token, now: int) -> str:
    """One of TOKEN_STATES, at a time in Unix ms."""
    if token.revoked_at is not None:
        return "revoked"
    if token.uses >= token.max_uses:
        return "used"
    return "valid" if now < token.expires_at else "expired"


def is_served(service: Optional[Service], now: int) -> bool:
    """Whether a server lives, and goes by the clock as it is now."""
    return service is not None and abs(now - service.alive) <= ALIVE_GRACE * SECOND_MS


def new_life(old: Service, now: int) -> Service:
    """Servers begin to hear the hosts after a time when none did: none lived, none could write, or
    the clock was set, and that time never was. It is nobody's silence; it goes on through lives
    that are too brief to hear the hosts, as in a crash loop."""
    is_brief = old.alive - old.started <= allowed_silence_ms(old.interval)
    goes_on = is_brief and old.previous_alive <= old.started  # not if the clock was set back
    before = old.previous_alive if goes_on else old.alive
    return old._replace(started=now, alive=now, previous_alive=before)


def allowed_silence_ms(interval: int) -> int:
    """How long a host may be silent and still be online, by the interval in seconds."""
    return (MISSED_BEATS * interval + ONLINE_SLACK) * SECOND_MS


class Watch(NamedTuple):
    """How servers have listened to the hosts, as it looks at a time: what is the same for all that
    are judged then. Times in Unix ms."""

    now: int
    until: int  # when one last listened: now, where one lives
    started: int
    previous_alive: int
    pause: int  # between these two; below 0: the clock was set back
    ahead: int  # a last_seen after this is of a clock that has been set back since
    interval: int  # in seconds
    ago: str  # how long before what
    allowed: str  # the silence of a host that is online


def watched(service: Optional[Service], now: int) -> Watch:
    """The watch of a service; of none, one without a pause and of any clock."""
    if service is None:
        always = Service(0, now, 0, HEARTBEAT_INTERVAL, "")
        return watched(always, now)._replace(ahead=LAST_ID)
    is_live = is_served(service, now)
    return Watch(
        now=now,
        until=now if is_live else service.alive,
        started=service.started,
        previous_alive=service.previous_alive,
        pause=service.started - service.previous_alive,
        ahead=max(now, service.alive) + CLOCK_SLACK * SECOND_MS,
        interval=service.interval,
        ago="ago" if is_live else "before the server stopped",
        allowed=f"{MISSED_BEATS} x {service.interval} s + {ONLINE_SLACK} s",
    )


def silence_ms(last_seen: int, watch: Watch) -> int:
    """How long a host has been silent while there was a server to hear it."""
    if last_seen > watch.ahead:
        last_seen = min(watch.started, last_seen + min(watch.pause, 0))
    silence = watch.until - last_seen
    if last_seen < watch.started:
        if last_seen <= watch.previous_alive:
            silence -= max(watch.pause, 0)
        else:  # heard in a life too brief to end the pause
            silence = watch.until - watch.started
    return silence if silence > 0 else 0


def seen_since(watch: Watch, silence: int) -> int:
    """The earliest last_seen of hosts that have not been silent for longer: silence_ms() turned
    round, because a census compares a million of them."""
    since = watch.until - silence
    return since if since > watch.started else since - max(0, watch.pause)


def status_bounds(watch: Watch) -> StatusBounds:
    """What last_seen says of a status."""
    online = seen_since(watch, allowed_silence_ms(watch.interval))
    offline = seen_since(watch, MISSING_AFTER * SECOND_MS)
    return StatusBounds(online, offline, watch.ahead, watch.started, max(0, -watch.pause))


def status_of(host: AnyHost, bounds: StatusBounds) -> str:
    """One of STATUSES, by what last_seen says at a time."""
    if host.revoked_at is not None:
        return "revoked"
    if host.last_seen == 0:
        return "pending"
    seen = host.last_seen
    if seen > bounds.ahead:
        seen = min(bounds.started, seen - bounds.set_back)
    if seen >= bounds.online:
        return "online"
    return "offline" if seen >= bounds.offline else "missing"


def status_reason(host: AnyHost, status: str, watch: Watch) -> str:
    """The sentence that says why a host has its status."""
    last_seen = host.last_seen
    if host.revoked_at is not None:
        return f"revoked at {rfc3339(host.revoked_at)}"
    if last_seen == 0:
        return "has enrolled and not yet beaten"
    silence = span(silence_ms(last_seen, watch) / SECOND_MS)
    seen = f"last seen {silence} {watch.ago}"
    if last_seen > watch.now:
        seen = f"last seen at {rfc3339(last_seen)}: the clock has gone back"
        if status == "online":
            return seen
        seen += f" {silence} ago or more"
    which = "within" if status == "online" else "more than"
    return f"{seen}, {which} {watch.allowed}"


def host_status(host: AnyHost, watch: Watch) -> Tuple[str, str]:
    """One of STATUSES and the sentence that says why."""
    status = status_of(host, status_bounds(watch))
    return status, status_reason(host, status, watch)


def is_same_hostname(one: str, other: str) -> bool:
    """DNS names are compared without case, with or without the final dot: RFC 4343."""
    return one.lower().rstrip(".") == other.lower().rstrip(".")


class Verified(NamedTuple):
    """What verify_chain() has found to be as it was written."""

    first: int
    last: int
    head: bytes  # the mac of the last
    has_head: bool  # an event has the head that was asked for
    unverified: int  # older events, chained with a key that is gone


def verify_chain(
    store: Store, keyring: Keyring, head: Optional[bytes], report: Report = unheard
) -> Verified:
    """Go through the whole audit log. Raises OperatorError, which names the first event that is
    not as it was written."""
    start, mac = chain_start(store, keyring)
    oldest = store.oldest_event()
    if oldest is not None and oldest < 1:
        raise OperatorError(f"event {oldest} of the audit log was never written")
    number, found = start, mac == head
    last, _ = store.last_event()
    for event in verified(store.events_after(start), start, mac, keyring):
        number, mac = event.number, event.mac
        found = found or mac == head
        report(number - start, last - start)
    older = 0 if oldest is None or oldest > start else start + 1 - oldest
    return Verified(start + 1, number, mac, found, older)


def said_of(verified: Verified) -> str:
    """The same in words."""
    first, last, _, _, older = verified
    said = f"events {first} to {last} are as they were written" if last >= first else "no events"
    return f"{said}; of {older} older ones the key is gone" if older else said


def chain_start(store: Store, keyring: Keyring) -> Tuple[int, bytes]:
    """What the first event is chained to. Raises OperatorError for a forged anchor."""
    anchor = store.anchor()
    if anchor is None:
        return 0, b""
    if anchor.proof != keyring.chain(b"", anchor.record()):
        raise OperatorError("the anchor of the audit log is not as it was written")
    return anchor.number, anchor.mac


def verified(events: Iterable[Event], number: int, mac: bytes, keyring: Keyring) -> Iterator[Event]:
    """Events as long as they are those that follow a number and its mac. Raises OperatorError."""
    for event in events:
        number += 1
        if event.number != number:
            raise OperatorError(f"event {number} of the audit log is missing")
        mac = keyring.chain(mac, event.record())
        if event.mac != mac:
            raise OperatorError(f"event {number} of the audit log is not as it was written")
        yield event


class RefusalWindow:
    """The refusals of one kind in a minute: so many are audited, the others summed up."""

    def __init__(self, now: int) -> None:
        self.since = now
        self.listed = 0  # one by one
        self.summed_up = 0

    def is_over(self, now: int) -> bool:
        """Whether its minute is."""
        return not 0 <= now - self.since < MINUTE * SECOND_MS


class AuditLog:
    """What happens, event after event. Acts record what they do while a tick goes on; its events
    are chained and written just before its commit, and logged after it."""

    def __init__(self, store: Store, keep: Optional[int]) -> None:
        self._store = store
        self._keep = keep  # seconds; None: for ever
        self.origin = NOWHERE  # of the act at hand
        self._events: List[Noted] = []  # of the tick at hand
        self._taken: List[Noted] = []  # by the tick at hand, of the notes
        self._notes: List[Noted] = []  # of refusals outside of one, for the next that writes
        # By code, and by the organization to whom it matters: nobody's noise hides another's.
        self._windows: Dict[Tuple[str, Optional[str]], RefusalWindow] = {}
        self._trouble = ""  # why it cannot be pruned

    # In a tick.

    def begin(self, now: int) -> None:
        """A tick that writes begins: it writes the notes too."""
        self._sum_up_minutes(now)
        self._taken, self._notes = self._notes, []
        self._events = list(self._taken)

    @property
    def mark(self) -> int:
        """The place that undo() returns to."""
        return len(self._events)

    def undo(self, mark: int) -> None:
        """What was recorded since has not happened."""
        del self._events[mark:]

    def forget(self) -> None:
        """The tick has died. What was noted before it, and has been answered, is kept."""
        self._events, self._taken, self._notes = [], [], self._taken + self._notes

    def record(
        self,
        now: int,
        action: str,
        actor: str,
        subject: str,
        organization: Optional[str],
        **detail: Any,
    ) -> None:
        """The act at hand does this. It stands in the log if the act does."""
        self._events.append(self._event(now, action, actor, subject, organization, None, detail))

    def _event(
        self,
        now: int,
        action: str,
        actor: str,
        subject: str,
        organization: Optional[str],
        code: Optional[str],
        detail: Mapping[str, Any],
    ) -> Noted:
        said = {name: value for name, value in detail.items() if value not in (None, "")}
        address, request = self.origin
        text = concealed(json.dumps(said))
        event = Event(0, now, action, actor, address, organization, subject, code, text, b"")
        return Noted(event, request)

    def write(self, keyring: Keyring) -> None:
        """Chain the tick's events to the last one, and append them."""
        if self._events:
            number, mac = self._store.last_event()
            for place, (event, request) in enumerate(self._events):
                number += 1
                numbered = event._replace(number=number)
                mac = keyring.chain(mac, numbered.record())
                self._events[place] = Noted(numbered._replace(mac=mac), request)
            self._store.add_events([noted.event for noted in self._events])

    def tell(self) -> None:
        """The tick is committed: its events go to the log for people too."""
        events, self._events, self._taken = self._events, [], []
        for event, request in events:
            log.info(
                "%s %s by %s%s%s",
                event.action,
                event.subject or "-",
                event.actor,
                f" from {event.address}" if event.address else "",
                f": {event.code}" if event.code else "",
                extra={"event": event, "request": request},
            )

    # Refusals: anybody can cause them, so they are bounded.

    def refuse(self, problem: Problem, now: int, in_tick: bool) -> None:
        """The act or the request at hand is refused."""
        if not problem.is_audited:
            return
        events = self._events if in_tick else self._notes
        which = problem.code, problem.organization
        window = self._windows.get(which)
        is_full = len(self._notes) >= NOTES_MAXIMUM
        if window is None or (window.is_over(now) and not is_full):
            self._sum_up(self._notes, which, now)
            window = self._windows[which] = RefusalWindow(now)
        if window.listed == REFUSALS_AUDITED or is_full or not problem.is_listed:
            window.summed_up += 1
        else:
            window.listed += 1
            about = (problem.actor, problem.subject, problem.organization, problem.code)
            events.append(self._event(now, "refuse", *about, problem.particulars))

    def _sum_up(self, events: List[Noted], which: Tuple[str, Optional[str]], now: int) -> None:
        window = self._windows.pop(which, None)
        if window is not None and window.summed_up:
            code, organization = which
            detail = {"more": window.summed_up, "since": rfc3339(window.since)}
            event = self._event(now, "refuse", "anonymous", "", organization, code, detail).event
            events.append(Noted(event._replace(address=""), ""))

    def sum_up_all(self, now: int) -> None:
        """In a tick: one event of each kind for the rest, though its minute is not over."""
        for which in list(self._windows):
            self._sum_up(self._events, which, now)

    def _sum_up_minutes(self, now: int) -> None:
        for which, window in list(self._windows.items()):
            if window.is_over(now) and len(self._notes) < NOTES_MAXIMUM:
                self._sum_up(self._notes, which, now)

    @property
    def owes_notes(self) -> bool:
        """Whether there are refusals for the next tick that writes."""
        return bool(self._notes)

    @property
    def is_behind(self) -> bool:
        """Whether there are refusals that are not written, one by one or summed up."""
        return self.owes_notes or any(window.summed_up for window in self._windows.values())

    # The start of the log.

    def put_anchor(self, keyring: Keyring, number: int, mac: bytes) -> None:
        """Chain what comes after a number to its mac alone."""
        anchor = Anchor(number, mac, b"")
        self._store.put_anchor(anchor._replace(proof=keyring.chain(b"", anchor.record())))

    def prune(self, keyring: Keyring, now: int) -> None:
        """Delete some of what is too old."""
        if self._keep is None:
            return
        old = self._store.oldest_events(now - self._keep * SECOND_MS, now, PRUNED_AT_ONCE)
        if old and self._are_genuine(old, keyring):
            last = old[-1]
            anchor = self._store.anchor()
            if anchor is None or anchor.number < last.number:
                self.put_anchor(keyring, last.number, last.mac)
            self._store.prune_events(last.number)

    def _are_genuine(self, old: Sequence[Event], keyring: Keyring) -> bool:
        """Whether the first events are as they were written. Else who has only the database could
        have us prune the log, and prove the anchor, by making events old."""
        trouble = ""
        try:
            number, mac = chain_start(self._store, keyring)
            for _ in verified([it for it in old if it.number > number], number, mac, keyring):
                pass
        except OperatorError as error:
            trouble = str(error)
        if trouble and trouble != self._trouble:
            log.error("%s: nothing of it is pruned", trouble)
        self._trouble = trouble
        return not trouble


def network_of(address: str) -> str:
    """What of an address is one party's: all of an IPv4 one, and the network of an IPv6 one."""
    if ":" not in address:
        return address
    return ipaddress.ip_address(address).packed[: NETWORK_BITS // 8].hex()


class Failures:
    """Wrong secrets by the network that they came from, in a minute that the first begins.

    A flood of them learns nothing, and is told to wait. Only wrong secrets are counted and only
    they are told so: whoever is behind the same address and has a good one is let in. An attacker
    with more networks than are remembered hears 401 for longer, and that is all.
    """

    def __init__(self) -> None:
        self._windows: OrderedDict[str, Tuple[int, int]] = OrderedDict()  # begin in ms, and count

    def judge(self, problem: Problem, address: str, now: int) -> Problem:
        """Count one more: the problem, or TooManyRequests in its place."""
        network = network_of(address)
        since, count = self._windows.get(network, (now, 0))
        if not 0 <= now - since < MINUTE * SECOND_MS:
            del self._windows[network]  # the order is that of the beginnings
            since, count = now, 0
        self._windows[network] = since, count + 1
        if len(self._windows) > FAILING_REMEMBERED:
            self._windows.popitem(last=False)
        if count < FAILURES_ALLOWED:
            return problem
        instead = TooManyRequests()
        instead.retry_after = MINUTE - (now - since) // SECOND_MS
        instead.is_listed = count == FAILURES_ALLOWED
        return instead


class Registry:
    """The fleet: what is remembered of it and what may be done to it."""

    def __init__(
        self,
        store: Store,
        key_file: KeyFile,
        keyring: Keyring,
        *,
        interval: int = HEARTBEAT_INTERVAL,
        credential_ttl: Optional[int] = None,
        audit_keep: Optional[int] = None,
    ) -> None:
        self._store = store
        self._key_file = key_file
        self.keyring = keyring
        self._beaten_by = keyring  # by which the last heartbeats that counted were judged
        self.interval = interval
        self._interval_bounds = (
            -(-interval * (100 - HEARTBEAT_SPREAD) // 100),
            interval * (100 + HEARTBEAT_SPREAD) // 100,
        )
        self._credential_ttl = credential_ttl
        self._trouble = ""  # why nothing can be written now
        self._told: Set[str] = set()  # what the log was told of it
        self._failed_at = 0.0
        self._reopen_after = 0.0
        self._url = ""  # of the server
        self._is_to_announce = False  # it, in a database that knows of another
        self._pin = ""  # of the server's certificate
        self._has_new_pin = False  # and it is not written yet
        self._tokens_looked_at = -1
        self._counted: Counter[str] = Counter()  # by the tick at hand, for the metrics
        self._censuses: Dict[Optional[str], Census] = {}
        self._failures = Failures()
        self.audit = AuditLog(store, audit_keep)
        self.metrics = Metrics()

    # Ticks.

    def screen(self, proof: Callable[[], Any]) -> None:
        """Have somebody prove a secret ahead of the tick that heeds it. A wrong one gets no
        further: else whoever sends many would have the others' heartbeats wait for the disk, with
        which a tick that enrolls ends. Raises what the proof raises.

        Where the database cannot be read, the tick will say so.
        """
        with suppress(StoreError):
            self._store.require_same_file()
            proof()

    def tick(
        self,
        work: Sequence[Work],
        now: int,
        origin_at: Callable[[int], Origin] = lambda place: NOWHERE,
    ) -> Optional[List[Any]]:
        """Heartbeats and acts in one transaction. What each comes to, a value or a Problem, when
        all of it is committed; None when another writer is at work: ask again, or give_up().
        origin_at says where the heartbeat at a place of work came from.

        If the transaction dies, so does every answer, also those of reads: they may have seen
        rows that are gone now.
        """
        acts = [act for act in work if isinstance(act, Act)]
        beats = (
            [it for it in work if not isinstance(it, Act)]
            if acts
            else cast(Sequence[PlainBeat], work)
        )
        keyring = self.keyring  # an act may change it
        writes = bool(beats) or any(act.writes for act in acts)
        durable = any(act.writes and act.durable for act in acts)
        try:
            if not self._store.begin(writes, durable):
                return None
            if writes:
                self.audit.begin(now)
            outcomes = self._beat_all(work, beats, now, origin_at) if beats else []
            if acts:
                outcomes = self._perform_all(work, iter(outcomes), now)
            self._commit(writes)
        except (StoreError, MemoryError) as error:
            self._abandon()
            return [self._unavailable(error, writes)] * len(work)
        except BaseException as error:
            self._abandon()
            self._take_note_of(f"a defect: {type(error).__name__}", writes)
            raise
        if self._told:
            self._recover(writes)
        if beats:
            self._beaten_by = keyring
        return outcomes

    def _abandon(self) -> None:
        self._store.abandon()
        self.audit.forget()
        self._counted.clear()

    def _commit(self, writes: bool) -> None:
        if not writes:
            self._store.commit()
            return
        self.audit.write(self.keyring)
        started = time.perf_counter()
        self._store.commit()
        with suppress(MemoryError):  # it is committed, so it must be answered
            self.metrics.commits.observe(time.perf_counter() - started)
            self.metrics.counts.update(self._counted)
            self._counted.clear()
            self.audit.tell()

    def _perform_all(self, work: Sequence[Work], beaten: Iterator[Any], now: int) -> List[Any]:
        self.notice_keys()
        return [self._perform(it, now) if isinstance(it, Act) else next(beaten) for it in work]

    def _perform(self, act: Act, now: int) -> Any:
        self.audit.origin = act.origin
        mark = self.audit.mark
        if act.writes:
            self._store.savepoint()
        try:
            result = act.run(now)
        except (StoreError, OperatorError, MemoryError):  # of the tick, and not of this act
            raise
        except Problem as problem:
            result = problem
        except Exception:
            log.exception("an act failed", extra={"request": act.origin.request})
            result = Internal()
        if isinstance(result, Problem):
            if act.writes:
                self._store.undo()
                self.audit.undo(mark)
            self.audit.refuse(result, now, in_tick=act.writes)
        elif act.writes:
            self._store.keep()
        return result

    def _unavailable(self, error: Exception, writes: bool) -> StorageUnavailable:
        self._take_note_of(str(error) or told(self._store.path, error), writes)
        problem = StorageUnavailable()
        problem.__cause__ = error
        return problem

    def _take_note_of(self, trouble: str, writes: bool) -> None:
        if trouble not in self._told:  # once for each, not once for each tick
            log.error("storage: %s", trouble)
            self._told.add(trouble)
        self._failed_at = time.monotonic()
        if writes:
            self._trouble = trouble

    def _recover(self, writes: bool) -> None:
        """A tick has succeeded. On a disk that is nearly full some do, and others do not."""
        if writes:
            self._trouble = ""
            if time.monotonic() - self._failed_at > TROUBLE_OVER:
                self._told.clear()
                with suppress(MemoryError):  # as with events: it is committed
                    log.info("storage: the database can be used again")

    def perform(self, act: Act, now: int) -> Any:
        """A tick of one act, or as many as it takes, waiting for other writers. Raises the
        Problem that it comes to."""
        deadline = time.monotonic() + LOCK_PATIENCE
        result = UNFINISHED
        while result is UNFINISHED:
            outcomes = self.tick([act], now)
            if outcomes is not None:
                result = outcomes[0]
            elif time.monotonic() > deadline:
                raise self.give_up()
            else:
                time.sleep(LOCK_POLL)
        if isinstance(result, Problem):
            raise result
        return result

    def give_up(self) -> StorageUnavailable:
        """Stop waiting for the other writer."""
        return self._unavailable(self._store.give_up(), writes=True)

    def tidy(self) -> None:
        """Between ticks: what no answer waits for."""
        if not self._trouble:
            self._store.checkpoint()
        elif time.monotonic() >= self._reopen_after:
            self._reopen_after = time.monotonic() + REOPEN_PAUSE
            if self._store.is_replaced():
                self._reopen()
            elif self._store.is_open:
                self._store.checkpoint(is_due=True)

    def _reopen(self) -> None:
        """Another file has taken the place of the database, such as a backup. Nothing is kept in
        memory that is not in it: if it and our keys are a pair, we go on with it."""
        store = self._store
        try:
            if not store.reopen():
                return
            if not _is_pair(store, self.keyring):
                raise StoreError(_not_a_pair(store.path))
            store.migrate()
        except (StoreBusy, StoreReplaced) as error:  # the old one is still open
            self._unavailable(error, writes=True)
        except StoreError as error:
            store.disown(str(error))  # under the lock
            store.abandon()
            self._unavailable(error, writes=True)
        else:
            self._is_to_announce = True
            self._censuses.clear()
            log.warning("opened %s anew", store.path)
        finally:
            store.lock.release()

    def back_up(self, folder: str, report: Report = unheard) -> Tuple[str, str]:
        """Copy database, then keys, into a folder, whole or not at all; where they are. The keys
        come last: then they are all that the copy of the database knows. Raises StoreError,
        OSError."""
        folder = os.path.realpath(folder)
        files = self._store.path, os.path.realpath(self._key_file.path)
        paths = [os.path.join(folder, os.path.basename(path)) for path in files]
        for path in (*paths, f"{paths[0]}-wal"):
            if path in files or (path.endswith("-wal") and os.path.exists(path)):
                raise OperatorError(f"{folder} has a database in use: name another folder")
        if paths[0] == paths[1]:
            raise OperatorError("database and key file have one name: rename one to copy both")
        with self._store.alone_in(folder):
            if any(map(os.path.exists, paths)) and not self._is_ours(paths[1]):
                raise OperatorError(
                    f"{folder} has other files of these names, such as another fleet's backup: "
                    "name another folder"
                )
            self._copy_to(paths[0], paths[1], report)
        return paths[0], paths[1]

    def _is_ours(self, key_file: str) -> bool:
        try:
            return is_same(load_keyring(key_file).audit_key, self.keyring.audit_key)
        except OperatorError:
            return False

    def _copy_to(self, database: str, key_file: str, report: Report) -> None:
        fresh = f"{database}.tmp"
        with suppress(FileNotFoundError):
            os.remove(fresh)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, KEY_FILE_MODE)

        def pause(done: int, total: int) -> None:
            report(done, total)
            os.fdatasync(descriptor)  # all at the end would hold up every other fsync
            time.sleep(BACKUP_PAUSE)

        try:
            known = self._store.copy_to(fresh, pause)
            os.fsync(descriptor)
            keyring = self._key_file.load()
            if not known.intersection(keyring.kids):
                raise OperatorError("all keys were retired meanwhile: back up again")
            write_key_file(key_file, keyring)
            os.replace(fresh, database)
            sync_folder(fresh)
        except BaseException:
            with suppress(FileNotFoundError):
                os.remove(fresh)
            raise
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Close the database."""
        self._store.close()

    # The audit log.

    def refused(self, problem: Problem, origin: Origin, now: int) -> None:
        """A refusal that no act came to: the next tick that writes audits it."""
        self.audit.origin = origin
        self.audit.refuse(problem, now, in_tick=False)

    def events(self, by: Principal, query: EventQuery, now: int) -> Page:
        """The newest first. Raises InvalidQuery."""
        organization = self._scope(by, query.organization, InvalidQuery, "organization")
        rows = self._store.events(organization, query.before, SLICE + 1)
        found = [row for row in rows[:SLICE] if query.matches(row)]
        if len(found) > query.limit:
            found = found[: query.limit]
            return Page(found, found[-1].number)
        return Page(found, rows[SLICE - 1].number if len(rows) > SLICE else None)

    def verify_audit(self, head: Optional[bytes], report: Report = unheard) -> Verified:
        """verify_chain() of this log."""
        return verify_chain(self._store, self.keyring, head, report)

    def start_audit_anew(self, now: int) -> None:
        """The audit key is another: only what follows can be verified with it."""
        self.audit.put_anchor(self.keyring, *self._store.last_event())
        self.audit.record(now, "init", "key-file", "audit", None)

    # Signing keys.

    def notice_keys(self) -> None:
        """Go by the key file as it is now: somebody may have rotated it."""
        keyring = self._key_file.reload(self.keyring)
        if keyring is not None:
            self.keyring = keyring

    @property
    def storage_trouble(self) -> str:
        """Why the last tick that was to write failed; '' when it did not."""
        return self._trouble

    @property
    def key_trouble(self) -> str:
        """Why the keys in use are not those in the key file; '' when they are."""
        return self._key_file.trouble

    def _key_number(self, kid: str, now: int) -> int:
        number = self._store.signing_key_number(kid)
        if number is None:  # the one whose request brings it up has not done it
            origin, self.audit.origin = self.audit.origin, NOWHERE
            self.audit.record(now, "rotate", "key-file", f"signing-key:{kid}", None)
            self.audit.origin = origin
            self._store.add_signing_key(kid, now)
            number = self._store.signing_key_number(kid)
            assert number is not None
        return number

    def _known_kids(self) -> Set[str]:
        return {row.kid for row in self._store.signing_keys() if row.retired_at is None}

    def learn_keys(self, actor: str, now: int) -> None:
        """Have the database know the keys of the key file, and no others."""
        known = self._known_kids()
        for kid in reversed(self.keyring.kids):
            if kid not in known:
                self._store.add_signing_key(kid, now)
                self.audit.record(now, "rotate", actor, f"signing-key:{kid}", None)
        for kid in sorted(known.difference(self.keyring.kids)):
            self._store.retire_signing_key(kid, now)
            self.audit.record(now, "retire", actor, f"signing-key:{kid}", None)

    def knows_keys(self) -> bool:
        """Whether the database knows the keys of the key file, and no others."""
        return self._known_kids() == set(self.keyring.kids)

    def signing_keys(self) -> List[SigningKeyView]:
        """All that ever were, the newest first."""
        states = dict.fromkeys(self.keyring.kids, "verifies")
        states[self.keyring.first.kid] = "signs"
        return [
            SigningKeyView(
                row,
                states.get(row.kid, "retired"),
                self._store.hosts_by_signing_key(row.number),
            )
            for row in self._store.signing_keys()
        ]

    def rotate_signing_key(self, by: Principal, now: int) -> str:
        """A new key signs from now on, and the others verify; its kid. The key file is replaced
        before the commit: if that fails, or we are killed, the database learns of it later."""
        self._replace_keys(self.keyring.rotated())
        self.learn_keys(by.name, now)
        return self.keyring.first.kid

    def retire_signing_key(self, by: Principal, kid: str, force: bool, now: int) -> int:
        """Verify by a key no longer; how many hosts that locks out at most. Raises NotFound,
        Conflict."""
        if kid not in self.keyring.kids:
            raise NotFound("The key file has no such key, or no longer: list-signing-keys.")
        if kid == self.keyring.first.kid:
            raise Conflict("This key signs. Make another first: rotate-signing-key.")
        hosts = self._store.hosts_not_past(self._key_number(kid, now))
        if hosts and not force:
            raise Conflict(
                f"Hosts that use this key, or may hold a credential of it: {hosts}. They move to "
                "the newest key when they beat; delete those that never will, or retire it with "
                "--force, and they must re-enroll."
            )
        self._replace_keys(self.keyring.without(kid))
        self.learn_keys(by.name, now)
        return hosts

    def _replace_keys(self, keyring: Keyring) -> None:
        try:
            self._key_file.replace(keyring)
        except OSError as error:
            raise OperatorError(f"cannot write {error.filename}: {error.strerror}") from error
        self.keyring = keyring

    # Service.

    def start_service(self, url: str, now: int, pin: str = "") -> None:
        """A server starts, to be found at a URL, its certificate by a pin."""
        self._url = url
        old = self._store.service()
        if old is None:
            service = Service(now, now, now, self.interval, url, pin)
        elif abs(now - old.alive) <= ALIVE_EVERY * SECOND_MS:
            service = old._replace(alive=max(now, old.alive))
        else:
            service = new_life(old, now)
        self._store.put_service(service._replace(interval=self.interval, public_url=url, pin=pin))

    def keep_alive(self, now: int) -> None:
        """A server lives, and can write. Where none could for a while, or the clock has been set,
        that is no host's silence."""
        self._store.require_companions()
        service = self._store.service()
        if service is None or is_served(service, now):
            self._store.keep_alive(now)
            return
        self._store.put_service(new_life(service, now))
        log.warning(
            "the clock was set, or nothing could be written: after %s comes %s; no host is the "
            "more silent for it",
            rfc3339(service.alive),
            rfc3339(now),
        )

    def keep_house(self, now: int) -> None:
        """What a server does every ALIVE_EVERY seconds, a little of it at a time."""
        if self._is_to_announce and self._url:
            self._announce(now)
        self.keep_alive(now)
        if self._has_new_pin:
            self._announce_pin()
        if not self.key_trouble and not self.knows_keys():
            self.learn_keys("key-file", now)
        self._prune_tokens(now)
        self.audit.prune(self.keyring, now)

    # What has been written counts when it is found there: the tick that wrote it may have died.

    def _announce(self, now: int) -> None:
        old = self._store.service()
        said = None if old is None else (old.interval, old.public_url, old.pin)
        self._is_to_announce = said != (self.interval, self._url, self._pin)
        if self._is_to_announce:
            self.start_service(self._url, now, self._pin)

    def _announce_pin(self) -> None:
        service = self._store.service()
        self._has_new_pin = service is not None and service.pin != self._pin
        if self._has_new_pin:
            self._store.put_pin(self._pin)

    def announce_pin(self, pin: str) -> None:
        """The server has another certificate: keep_house() writes its pin."""
        self._pin, self._has_new_pin = pin, True

    @property
    def announced_pin(self) -> str:
        """The pin of the server's certificate; '' where it speaks no TLS."""
        return self._pin

    def _prune_tokens(self, now: int) -> None:
        """Ids are in the order of time: what was minted since cannot have ended so long ago."""
        ended = now - TOKEN_KEPT * SECOND_MS
        looked_at = self._store.prune_tokens(
            self._tokens_looked_at, first_id(ended), ended, PRUNED_AT_ONCE
        )
        self._tokens_looked_at = -1 if looked_at is None else looked_at

    def service(self) -> Optional[Service]:
        """What the servers say of themselves; None before one ran."""
        return self._store.service()

    def census(self, by: Principal, now: int) -> Optional[Census]:
        """The fleet counted, or None: one slice more is, ask again in another tick."""
        census = self._censuses.get(by.organization)
        if census is None or not census.is_good(now):
            census = self._censuses[by.organization] = Census(by.organization, now)
        if not census.is_finished:
            census.go_on(self._store, status_bounds(watched(self._store.service(), now)), now)
        return census if census.is_finished else None

    def storage_bytes(self) -> Tuple[int, int]:
        """Of the database, and of its WAL."""
        return self._store.file_sizes()

    @property
    def sqlite_version(self) -> str:
        """Of the library that runs."""
        return SQLITE_VERSION

    def visible_organizations(self, by: Principal) -> List[str]:
        """Those that somebody sees."""
        if by.organization is not None:
            return [by.organization]
        return [organization.id for organization in self._store.organizations()]

    # Organizations and API keys.

    def add_organization(self, by: Principal, name: str, now: int) -> Organization:
        """Raises Conflict."""
        organization = Organization(name, now)
        if not self._store.add_organization(organization):
            raise Conflict(f"There is an organization {name} already.")
        self.audit.record(now, "add", by.name, f"organization:{name}", name)
        return organization

    def organizations(self) -> List[Organization]:
        """All of them."""
        return self._store.organizations()

    def mint_api_key(
        self, by: Principal, organization: Optional[str], role: str, description: str, now: int
    ) -> Tuple[ApiKey, str]:
        """A key and its text, shown this once. Raises InvalidBody for an unknown organization."""
        if organization is not None:
            self._require_organization(organization, InvalidBody, "organizationId")
        secret = mint_secret(API_KEY_PREFIX, new_id(now))
        key = ApiKey(
            secret.id, secret.digest(), organization, role, description, now, by.name, None
        )
        if not self._store.add_api_key(key):
            return self.mint_api_key(by, organization, role, description, now)
        subject = named("api-key", key.id)
        self.audit.record(now, "mint", by.name, subject, organization, role=role)
        return key, secret.text

    def api_keys(self) -> List[ApiKey]:
        """All of them."""
        return self._store.api_keys()

    def revoke_api_key(self, by: Principal, number: int, now: int) -> ApiKey:
        """Idempotent. Raises NotFound."""
        key = self._store.api_key(number)
        if key is None:
            raise NotFound("There is no API key with this id.")
        if self._store.revoke_api_key(number, now):
            subject = named("api-key", number)
            self.audit.record(now, "revoke", by.name, subject, key.organization_id)
            key = key._replace(revoked_at=now)
        return key

    def identify(self, text: str, what: str, address: str, now: int) -> Principal:
        """Whose an API key is, with which somebody asks for what. Raises ApiKeyInvalid,
        TooManyRequests."""
        secret = read_secret(API_KEY_PREFIX, text)
        key = self._store.api_key(secret.id) if secret else None
        name = named("api-key", secret.id) if secret else ""
        if secret is None or key is None or not is_same(secret.digest(), key.secret_hash):
            problem = self._failures.judge(ApiKeyInvalid(), address, now)
            raise problem.concerning("anonymous", name, None, request=what)
        if key.revoked_at is not None:
            problem = ApiKeyInvalid("The API key has been revoked; mint-api-key makes another.")
            raise problem.concerning(name, name, key.organization_id, request=what)
        return Principal(name, key.organization_id, key.role, id_text(key.id))

    def _require_organization(self, name: str, problem: Type[Problem], field: str) -> None:
        if not self._store.has_organization(name):
            raise problem(
                errors=[FieldError(field, "there is no such organization: add-org makes one")]
            )

    def _scope(
        self, by: Principal, asked: Optional[str], problem: Type[Problem], field: str
    ) -> Optional[str]:
        """The organization that a request is about. To a key of one organization there is no
        other, whether it exists or not."""
        if asked is None:
            return by.organization
        if by.organization not in (ALL_ORGANIZATIONS, asked):
            raise NotFound("There is no such organization.")
        self._require_organization(asked, problem, field)
        return asked

    @staticmethod
    def _require_own(by: Principal, organization: str, what: str) -> None:
        if by.organization not in (ALL_ORGANIZATIONS, organization):
            raise NotFound(f"There is no {what} with this id.")

    # Tokens.

    def mint(self, by: Principal, order: TokenOrder, now: int) -> Tuple[TokenView, str]:
        """A token and its text, shown this once. Raises InvalidBody."""
        organization = self._scope(by, order.organization, InvalidBody, "organizationId")
        return self._mint(by, order, organization or DEFAULT_ORGANIZATION, None, now)

    def reenroll(
        self, by: Principal, number: int, order: TokenOrder, now: int
    ) -> Tuple[TokenView, str]:
        """A token that gives an existing host a new credential. Raises NotFound."""
        host = self._host(by, number)
        return self._mint(by, order._replace(max_uses=1), host.organization_id, host.id, now)

    def _mint(
        self, by: Principal, order: TokenOrder, organization: str, host: Optional[int], now: int
    ) -> Tuple[TokenView, str]:
        secret = mint_secret(TOKEN_PREFIX, new_id(now))
        token = Token(
            id=secret.id,
            secret_hash=secret.digest(),
            organization_id=organization,
            description=order.description,
            hostname=order.hostname,
            host_id=host,
            labels=json_text(dict(order.labels)),
            max_uses=order.max_uses,
            uses=0,
            created_at=now,
            created_by=by.name,
            expires_at=now + order.ttl * SECOND_MS,
            used_at=None,
            used_from=None,
            revoked_at=None,
        )
        if not self._store.add_token(token):
            return self._mint(by, order, organization, host, now)
        self.audit.record(
            now,
            "mint",
            by.name,
            named("token", token.id),
            organization,
            host=None if host is None else id_text(host),
            maxUses=order.max_uses,
            expiresAt=rfc3339(token.expires_at),
            description=order.description,
            hostname=order.hostname,
            labels=dict(order.labels) or None,
        )
        return TokenView(token, "valid", []), secret.text

    def token(self, by: Principal, number: int, now: int) -> TokenView:
        """Raises NotFound."""
        return self._token_view(self._token(by, number), now)

    def _token(self, by: Principal, number: int) -> Token:
        token = self._store.token(number)
        if token is None:
            raise NotFound("There is no token with this id.")
        self._require_own(by, token.organization_id, "token")
        return token

    def _token_view(self, token: Token, now: int) -> TokenView:
        if token.host_id is None:
            hosts = self._store.hosts_by_token(token.id, TOKEN_HOSTS_SHOWN)
        else:
            hosts = [token.host_id] if token.uses else []
        return TokenView(token, token_state(token, now), hosts)

    def tokens(self, by: Principal, query: TokenQuery, now: int) -> Page:
        """The newest first. Raises InvalidQuery."""
        organization = self._scope(by, query.organization, InvalidQuery, "organization")
        rows = self._store.tokens(organization, query.before, SLICE + 1)
        found: List[TokenView] = []
        looked = 0
        for row in rows[:SLICE]:
            looked += 1
            if query.state in (None, token_state(row, now)):
                view = self._token_view(row, now)
                found.append(view)
                looked += len(view.hosts)
            if len(found) == query.limit or looked >= SLICE:
                return Page(found, row.id if row is not rows[-1] else None)
        return Page(found, rows[SLICE - 1].id if len(rows) > SLICE else None)

    def revoke_token(self, by: Principal, number: int, now: int) -> None:
        """Idempotent. Raises NotFound."""
        token = self._token(by, number)
        if token.revoked_at is None:
            self._store.revoke_token(token.id, now)
            subject = named("token", number)
            self.audit.record(now, "revoke", by.name, subject, token.organization_id)

    # Enrollment.

    def enroll(self, applicant: Applicant, now: int) -> Enrollment:
        """Exchange a token for a host and its credential. Raises TokenUnknown, TooManyRequests,
        TokenRevoked, TokenUsed, TokenExpired, TokenHostMismatch, HostRevoked, HostUnknown.

        Why a token is refused is told only to a caller who has proved its secret.
        """
        token = self.prove_token(applicant, now)
        try:
            return self._enroll(token, applicant, now)
        except Problem as problem:
            name = named("token", token.id)
            raise problem.concerning(
                name, name, token.organization_id, hostname=applicant.hostname
            ) from problem.__cause__

    def prove_token(self, applicant: Applicant, now: int) -> Token:
        """The token whose secret an applicant has. Raises TokenUnknown, TooManyRequests."""
        secret = read_secret(TOKEN_PREFIX, applicant.token)
        token = self._store.token(secret.id) if secret else None
        if secret is None or token is None or not is_same(secret.digest(), token.secret_hash):
            name = named("token", secret.id) if secret else ""
            problem = self._failures.judge(TokenUnknown(), applicant.address, now)
            raise problem.concerning("anonymous", name, None, hostname=applicant.hostname)
        return token

    def _enroll(self, token: Token, applicant: Applicant, now: int) -> Enrollment:
        idempotency = fingerprint(applicant.idempotency_key) if applicant.idempotency_key else None
        known = self._store.replayed_host(token.id, idempotency) if idempotency else None
        if known is not None and self._may_replay(token, known, now):
            return self._admit_again(token, known, applicant, now)
        self._require_valid(token, now)
        if known is not None:
            raise TokenUsed("This Idempotency-Key has let in a host; another needs its own.")
        if token.hostname and not is_same_hostname(token.hostname, applicant.hostname):
            raise TokenHostMismatch()
        if not self._store.use_token(token.id, now, applicant.address):
            raise TokenUsed()
        if token.host_id is not None:
            return self._readmit(token, token.host_id, applicant, idempotency, now)
        return self._admit(token, applicant, idempotency, now)

    @staticmethod
    def _require_valid(token: Token, now: int) -> None:
        refusals = {"revoked": TokenRevoked, "used": TokenUsed, "expired": TokenExpired}
        state = token_state(token, now)
        if state in refusals:
            raise refusals[state]()

    @staticmethod
    def _may_replay(token: Token, host: Host, now: int) -> bool:
        """Whether a reply that was lost may be given again: until it is used, for a day."""
        if token.revoked_at is not None or host.revoked_at is not None:
            return False
        is_used = host.last_seen > 0 and host.serial >= host.admitted_serial
        return not is_used and now - host.admitted_at <= REPLAY_WINDOW_MS

    def _admit_again(self, token: Token, host: Host, applicant: Applicant, now: int) -> Enrollment:
        serial = self._store.issue(host.id, host.issued, applicant.address)
        assert serial is not None, "what has been issued is not below what was admitted"
        self._record_admission(now, "replay", token, host, applicant, serial=serial)
        return Enrollment(host, self._grant(host.id, host.organization_id, serial, now))

    def _record_admission(
        self, now: int, action: str, token: Token, host: Host, applicant: Applicant, **more: Any
    ) -> None:
        actor, subject = named("token", token.id), named("host", host.id)
        hostname = applicant.hostname
        self.audit.record(
            now, action, actor, subject, host.organization_id, hostname=hostname, **more
        )

    def _twin(self, organization: str, hostname: str, own: int, now: int) -> Optional[int]:
        """A live host of an organization that has a hostname, and is another than own."""
        others = self._store.hosts_by_hostname(organization, hostname, TWINS_EXAMINED)
        if not others:
            return None
        watch = watched(self._store.service(), now)
        for host in others:
            live = host_status(host, watch)[0] in ("pending", "online")
            if live and host.id != own:
                return host.id
        return None

    def _admit(
        self, token: Token, applicant: Applicant, idempotency: Optional[bytes], now: int
    ) -> Enrollment:
        host = Host(
            id=new_id(now),
            organization_id=token.organization_id,
            name=applicant.name if applicant.name is not None else applicant.hostname,
            hostname=applicant.hostname,
            bound=int(token.hostname is not None),
            os=applicant.os,
            architecture=applicant.architecture,
            docker_version=applicant.docker_version,
            labels=token.labels,
            issued=1,
            enrolled_at=now,
            revoked_at=None,
            token_id=token.id,
            admitted_by=token.id,
            admitted_at=now,
            admitted_serial=1,
            idempotency=idempotency,
            issued_to=applicant.address,
            twin_id=self._twin(token.organization_id, applicant.hostname, -1, now),
            last_seen=0,
            serial=1,
            key_number=self._key_number(self.keyring.first.kid, now),
            active=1,
        )
        while not self._store.add_host(host):
            host = host._replace(id=new_id(now))
        twin = None if host.twin_id is None else id_text(host.twin_id)
        self._record_admission(now, "enroll", token, host, applicant, sameHostnameAs=twin)
        self._counted["enrollments"] += 1
        return Enrollment(host, self._grant(host.id, host.organization_id, 1, now))

    def _readmit(
        self,
        token: Token,
        number: int,
        applicant: Applicant,
        idempotency: Optional[bytes],
        now: int,
    ) -> Enrollment:
        """Re-enroll, by a serial beyond all that could be good: neither can an older credential
        be renewed past it, nor one count more that was issued after the backup that we may be."""
        host = self._store.host(number)
        if host is None:
            raise HostUnknown()
        if host.revoked_at is not None:
            raise HostRevoked()
        serial = max(host.issued, host.serial) + SERIALS_LOST + 1
        changes: Dict[str, Any] = {
            "issued": serial,
            "admitted_by": token.id,
            "admitted_at": now,
            "admitted_serial": serial,
            "idempotency": idempotency,
            "issued_to": applicant.address,
        }
        facts = {
            "hostname": applicant.hostname,
            "os": applicant.os,
            "architecture": applicant.architecture,
            "docker_version": applicant.docker_version,
        }
        changes.update(self._changes(host, {k: v for k, v in facts.items() if v}))
        hostname = changes.get("hostname", host.hostname)
        changes["twin_id"] = self._twin(host.organization_id, hostname, host.id, now)
        self._store.edit_host(host.id, changes)
        twin = None if changes["twin_id"] is None else id_text(changes["twin_id"])
        self._record_admission(
            now, "re-enroll", token, host, applicant, serial=serial, sameHostnameAs=twin
        )
        self._counted["enrollments"] += 1
        grant = self._grant(host.id, host.organization_id, serial, now)
        return Enrollment(host._replace(**changes), grant)

    def _grant(self, host: int, organization: str, serial: int, now: int) -> Grant:
        issued_at = now // SECOND_MS
        expires_at = None if self._credential_ttl is None else issued_at + self._credential_ttl
        first = self.keyring.first
        claims = Claims(host, organization, issued_at, serial, expires_at, first.kid)
        return Grant(first.sign(claims), expires_at)

    # Heartbeats.

    def authenticate(self, credential: str, now: int) -> Claims:
        """What a credential says, by its signature alone. Raises CredentialInvalid,
        CredentialExpired. When it was issued is never judged: with a clock an hour back we would
        refuse everyone."""
        claims = self.keyring.verify(credential)
        expires_at = claims.expires_at
        if expires_at is not None and now > (expires_at + CREDENTIAL_GRACE) * SECOND_MS:
            name = named("host", claims.host)
            raise CredentialExpired().concerning(name, name, claims.organization)
        return claims

    def is_due(self, claims: Claims, now: int) -> bool:
        """Whether a credential should be renewed: it is in the last third of its life, or signed
        by a key that no longer signs, or lives longer than credentials may now."""
        if claims.kid != self.keyring.first.kid:
            return True
        if claims.expires_at is None:
            return self._credential_ttl is not None
        life = claims.expires_at - claims.issued_at
        if self._credential_ttl is not None and life > self._credential_ttl:
            return True
        return (claims.expires_at * SECOND_MS - now) * 3 < life * SECOND_MS

    def beat(self, claims: Claims, read_facts: Callable[[], Mapping[str, Any]], now: int) -> Beaten:
        """A heartbeat that brings facts, or gets a renewal. The facts are read when the credential
        has been accepted, and not before. Raises what _beat_one() and read_facts() raise."""
        last_seen = self._beat_one(plain_beat(claims), now)
        facts = read_facts()
        host = self._store.host(claims.host) if facts else None
        changes = self._changes(host, facts) if host else {}
        if changes:
            self._store.edit_host(claims.host, changes)
        self._counted["heartbeats"] += 1
        return Beaten(last_seen, self._renew(claims, now))

    @staticmethod
    def _changes(host: Host, facts: Mapping[str, Any]) -> Dict[str, Any]:
        """What facts change of a host. A bound hostname stays as the token named it."""
        current = host._asdict()
        changes = {name: value for name, value in facts.items() if current[name] != value}
        if host.bound:
            changes.pop("hostname", None)
        return changes

    def _renew(self, claims: Claims, now: int) -> Optional[Grant]:
        """A serial that nobody else has: of two that renew copies of one credential, the first to
        use the new one shuts the other out, and that is seen. Whoever holds an old copy cannot
        renew past a re-enrollment. The credential in hand stays good until a new one is first
        used, so a lost reply locks nobody out."""
        if not self.is_due(claims, now):
            return None
        serial = self._store.issue(claims.host, claims.serial, self.audit.origin.address)
        if serial is None:
            return None
        name = named("host", claims.host)
        self.audit.record(now, "renew", name, name, claims.organization, serial=serial)
        self._counted["renewals"] += 1
        return self._grant(claims.host, claims.organization, serial, now)

    def _beat_all(
        self,
        work: Sequence[Work],
        beats: Sequence[PlainBeat],
        now: int,
        origin_at: Callable[[int], Origin],
    ) -> List[Any]:
        """lastSeen of each plain heartbeat, or the Problem that it comes to."""
        rows = [(now, host, standing.serial, now) for host, standing in beats]
        if self._beaten_by is self.keyring and self._store.beat(rows) == len(rows):
            self._counted["heartbeats"] += len(rows)
            return [now] * len(rows)
        self._store.start_over()  # else one beat would be judged by what others have written
        outcomes = [
            self._judge_beat(beat, now, origin_at(place))
            for place, beat in enumerate(work)
            if not isinstance(beat, Act)
        ]
        counted = sum(not isinstance(outcome, Problem) for outcome in outcomes)
        self._counted["heartbeats"] += counted
        return outcomes

    def _judge_beat(self, beat: PlainBeat, now: int, origin: Origin) -> Union[int, Problem]:
        self.audit.origin = origin
        try:
            return self._beat_one(beat, now)
        except Problem as problem:
            self.audit.refuse(problem, now, in_tick=True)
            return problem

    def _beat_one(self, beat: PlainBeat, now: int) -> int:
        """lastSeen. Raises CredentialInvalid, HostUnknown, CredentialSuperseded, HostRevoked."""
        number, standing = beat
        if standing.kid not in self.keyring.kids:  # it was, when the request came
            raise CredentialInvalid()
        if self._store.beat([(now, number, standing.serial, now)]) == 1:
            return now
        host = self._store.host(number)
        name = named("host", number)
        if host is None:
            raise HostUnknown().concerning(name, name, standing.organization)
        if standing.serial < host.serial:
            raise CredentialSuperseded().concerning(
                name,
                name,
                standing.organization,
                serial=standing.serial,
                newest=host.serial,
                newestIssuedTo=host.issued_to,
            )
        if not host.active:
            raise HostRevoked().concerning(name, name, standing.organization)
        if standing.serial > host.issued + SERIALS_LOST:
            raise CredentialInvalid().concerning(name, name, standing.organization)
        if standing.serial > host.serial:
            key_number = self._key_number(standing.kid, now)
            self._store.supersede(host.id, standing.serial, key_number)
            serials = {"serial": standing.serial, "superseded": host.serial}
            self.audit.record(now, "supersede", name, name, standing.organization, **serials)
        seen = self._seen(host, now)
        self._store.beat_late(host.id, seen)
        return seen

    @staticmethod
    def _seen(host: Host, now: int) -> int:
        """What lastSeen becomes. It does not go back, unless it is of a clock that was far ahead:
        else a host that falls silent would be online until the clock is there again."""
        is_ahead = host.last_seen > now + CLOCK_SLACK * SECOND_MS
        return now if is_ahead else max(now, host.last_seen)

    def next_heartbeat(self) -> int:
        """Seconds until the next one: the interval, HEARTBEAT_SPREAD per cent more or less."""
        shortest, longest = self._interval_bounds
        return shortest + int(random.random() * (longest - shortest + 1))

    # Hosts.

    def host(self, by: Principal, number: int, now: int) -> HostView:
        """Raises NotFound."""
        host = self._host(by, number)
        status = host_status(host, watched(self._store.service(), now))
        return HostView(host.listed(), *status, self._warnings(host.twin_id))

    def _warnings(self, twin_id: Optional[int]) -> Sequence[str]:
        """What an operator should look at. It goes away when the other host is shut out."""
        twin = None if twin_id is None else self._store.host(twin_id)
        if twin is None or twin.revoked_at is not None:
            return ()
        return [
            f"when it came in, host {id_text(twin.id)} with the same hostname was live: one of "
            "them may be a clone, or an old record to delete"
        ]

    def _host(self, by: Principal, number: int) -> Host:
        host = self._store.host(number)
        if host is None:
            raise NotFound("There is no host with this id.")
        self._require_own(by, host.organization_id, "host")
        return host

    def hosts(self, by: Principal, query: HostQuery, now: int) -> Page:
        """The newest first. Raises InvalidQuery."""
        organization = self._scope(by, query.organization, InvalidQuery, "organization")
        rows = self._store.hosts(organization, query.before, SLICE + 1)
        watch = watched(self._store.service(), now)
        bounds = status_bounds(watch)
        matches = query.filter()
        found: List[HostView] = []
        for row in rows[:SLICE]:
            status = status_of(row, bounds)
            if matches is None or matches(row, status):
                warnings = () if row.twin_id is None else self._warnings(row.twin_id)
                found.append(HostView(row, status, status_reason(row, status, watch), warnings))
                if len(found) == query.limit:
                    return Page(found, row.id if row is not rows[-1] else None)
        return Page(found, rows[SLICE - 1].id if len(rows) > SLICE else None)

    def edit_host(
        self, by: Principal, number: int, changes: Mapping[str, Any], now: int
    ) -> HostView:
        """Change name or labels. Raises NotFound."""
        host = self._host(by, number)
        columns = dict(changes)
        if "labels" in columns:
            columns["labels"] = json_text(columns["labels"])
        if columns:
            self._store.edit_host(host.id, columns)
            self._record_act(now, "edit", by, host, **changes)
        return self.host(by, number, now)

    def _record_act(self, now: int, action: str, by: Principal, host: Host, **more: Any) -> None:
        self.audit.record(
            now, action, by.name, named("host", host.id), host.organization_id, **more
        )

    def revoke_host(self, by: Principal, number: int, now: int) -> HostView:
        """Shut a host out: its next heartbeat is refused. Idempotent. Raises NotFound."""
        host = self._host(by, number)
        if host.revoked_at is None:
            self._store.activate(number, now)
            self._record_act(now, "revoke", by, host)
        return self.host(by, number, now)

    def restore_host(self, by: Principal, number: int, now: int) -> HostView:
        """Let a revoked host in again, with the credential that it has. Raises NotFound."""
        host = self._host(by, number)
        if host.revoked_at is not None:
            self._store.activate(number, None)
            self._record_act(now, "restore", by, host)
        return self.host(by, number, now)

    def delete_host(self, by: Principal, number: int, now: int) -> None:
        """Raises NotFound, also the second time."""
        host = self._host(by, number)
        self._store.delete_host(host.id, now)
        self._record_act(now, "delete", by, host, hostname=host.hostname)


def open_registry(
    database: str, key_file: str, now: int, *, init: bool = False, **options: Any
) -> Registry:
    """The registry of a database and its key file; where there is neither, makes both. Options
    are those of Registry.

    One without the other is refused, unless init says to make what is missing: a database
    without its keys would refuse its whole fleet, keys without their database would let every
    credential they ever signed knock again. Raises OperatorError.
    """
    try:
        store = Store(database)
        try:
            store.lock.wait(LOCK_PATIENCE)
            keys = KeyFile(key_file)
            keyring, is_adopted = _open_pair(store, keys, init, now)
            store.lock.release()
            registry = Registry(store, keys, keyring, **options)
            _settle_in(registry, is_adopted, now)
            return registry
        except BaseException:
            store.abandon()
            store.close()
            raise
    except StoreError as error:
        raise OperatorError(f"{error}") from error
    except StorageUnavailable as problem:
        raise OperatorError(f"{problem.__cause__}") from problem


def _settle_in(registry: Registry, is_adopted: bool, now: int) -> None:
    """Have the database know the keys of its key file. Keys that are not its own cannot verify
    its audit log so far: what follows is chained to an anchor."""

    def act(now: int) -> None:
        if is_adopted:
            registry.start_audit_anew(now)
        registry.learn_keys("key-file", now)

    if is_adopted or not registry.perform(Act(lambda now: registry.knows_keys(), False), now):
        registry.perform(Act(act), now)


def _open_pair(store: Store, keys: KeyFile, init: bool, now: int) -> Tuple[Keyring, bool]:
    """Open database and key file, or make them, with the lock held. The keyring, and whether it
    was not that of the database.

    database  key file
    there     there      they must know each other
    there     missing    refused; with init, new keys are made for it
    missing   there      refused; with init, a database is made for them
    missing   missing    both are made
    """
    key_file = keys.path
    is_file = store.exists()
    is_made = is_file and store.open()
    has_keys = os.path.exists(key_file) or (is_made and _recover_keys(store, key_file))
    if is_made != has_keys and not init:
        raise OperatorError(_half_a_pair(store.path, key_file, is_made))
    keyring = keys.load() if has_keys else _prepare_keys(key_file)
    is_adopted = is_made and not _is_pair(store, keyring)
    if not is_made:
        if not is_file:
            store.open()
        store.create(Organization(DEFAULT_ORGANIZATION, now), keyring.kids)
    else:
        if is_adopted and not init:
            raise OperatorError(_not_a_pair(store.path))
        store.migrate()
        if is_adopted:
            _require_no_server(store, has_keys, now)
    if not has_keys:
        _install_keys(key_file)
        keyring = keys.load()
    return keyring, is_adopted


def _half_a_pair(database: str, key_file: str, is_made: bool) -> str:
    if is_made:
        return (
            f"there is a database {database} but no key file {key_file}: restore the key file "
            "from a backup, or make new keys with serve --init (every host must re-enroll)"
        )
    return (
        f"there is a key file {key_file} but no database {database}: restore the database from a "
        "backup, name other files with --db and --key-file, or start anew with these keys with "
        "serve --init"
    )


def _prepare_keys(key_file: str) -> Keyring:
    """New keys, in a file beside their place: they come there when the database knows them. A
    first start that is killed in between is made good by the next."""
    keyring = new_keyring()
    write_key_file(f"{key_file}.new", keyring)
    return keyring


def _install_keys(key_file: str) -> None:
    os.replace(f"{key_file}.new", key_file)
    sync_folder(key_file)


def _recover_keys(store: Store, key_file: str) -> bool:
    """Put prepared keys that the database knows where they belong, if there are any."""
    try:
        prepared = load_keyring(f"{key_file}.new")
    except OperatorError:  # none, or torn: killed before the database knew of them
        return False
    is_known = _is_pair(store, prepared)
    if is_known:
        _install_keys(key_file)
    return is_known


def _is_pair(store: Store, keyring: Keyring) -> bool:
    """Whether they know each other: by a key, or, where all of those have been retired since a
    backup that is put back, by the audit log."""
    if any(store.signing_key_number(kid) is not None for kid in keyring.kids):
        return True
    return store.version() == SCHEMA_VERSION and _has_chained(store, keyring)


def _has_chained(store: Store, keyring: Keyring) -> bool:
    """Whether the last event is chained with the audit key."""
    events = store.events(None, LAST_ID, 2)
    if not events:
        return False
    anchor = store.anchor()
    oldest = anchor.mac if anchor else b""
    previous = events[1].mac if len(events) == 2 else oldest
    return is_same(keyring.chain(previous, events[0].record()), events[0].mac)


def _not_a_pair(database: str) -> str:
    return (
        f"the key file is not that of the database {database}: restore the pair from one "
        "backup, or go on with these keys with serve --init (every host must re-enroll)"
    )


def _require_no_server(store: Store, has_keys: bool, now: int) -> None:
    if is_served(store.service(), now):  # it would go on with the keys that it has
        raise OperatorError(f"a server has lived on {store.path} until now: stop it, wait 30 s")
    if not has_keys:
        log.warning("made new keys for %s: every host must re-enroll", store.path)


class Finding(NamedTuple):
    """What examine() has looked at."""

    name: str
    is_good: bool
    detail: str


def examine(database: str, key_file: str, report: Report = unheard) -> List[Finding]:
    """Look at a database and its key file, and change nothing in them. Raises OperatorError when
    the database cannot be looked at."""
    if not os.path.exists(database):
        raise OperatorError(f"there is no database {database}: name it with --db")
    try:
        store = Store(database)
        try:
            store.lock.wait(LOCK_PATIENCE)
            is_made = store.open(as_it_is=True)
            store.lock.release()
            store.begin(writes=False, durable=False)  # one moment for all that is looked at
            if not is_made:
                raise OperatorError(
                    f"the database {database} is empty: a first start was cut short"
                )
            return [
                *_examine_store(store),
                *_examine_keys(store, key_file, report),
                *_examine_modes(store),
            ]
        finally:
            store.abandon()
            store.close()
    except StoreError as error:
        raise OperatorError(f"{error}") from error


def _examine_store(store: Store) -> Iterator[Finding]:
    version, faults = store.version(), store.faults()
    is_ours = version == SCHEMA_VERSION
    then = "that of this program" if is_ours else f"the next start brings it to {SCHEMA_VERSION}"
    yield Finding("schema", is_ours, f"{version}: {then}")
    yield Finding("integrity", not faults, "; ".join(faults[:ERRORS_NAMED]) or "sound")
    said = "has no WAL-reset bug"
    if has_wal_reset_bug():
        said = "has the WAL-reset bug, which cannot strike: one lock is round every checkpoint"
    yield Finding("sqlite", True, f"{SQLITE_VERSION} {said}")


def _examine_keys(store: Store, key_file: str, report: Report) -> Iterator[Finding]:
    try:
        keyring = load_keyring(key_file)
    except OperatorError as error:
        yield Finding("keys", False, str(error))
        return
    if not _is_pair(store, keyring):
        yield Finding("keys", False, f"{key_file} is not the key file of this database")
        return
    yield Finding("keys", True, f"{len(keyring.keys)} in {key_file}")
    if store.version() == SCHEMA_VERSION:
        try:
            yield Finding("audit", True, said_of(verify_chain(store, keyring, None, report)))
        except OperatorError as error:
            yield Finding("audit", False, str(error))


def _examine_modes(store: Store) -> Iterator[Finding]:
    names = [f"{store.path}{suffix}" for suffix in ("", "-wal", "-shm", ".gate", ".lock")]
    modes = {name: file_mode(name) for name in names}
    wrong = [
        f"chmod 600 {name}" for name, mode in modes.items() if mode is not None and mode & 0o077
    ]
    yield Finding("modes", not wrong, "; ".join(wrong) or "only the owner can read the files")


# 7. Messages
#
# HTTP/1.1 as bytes: RFC 9112, read strictly. Whatever two readers could frame differently is
# refused, because that is how requests are smuggled past whoever stands in front. Parsing never
# touches a socket: the reader is given bytes and gives back requests.
#
# http.server's own parser is not used: from 3.9 to 3.13 it takes two Content-Length fields that
# differ, ignores Transfer-Encoding, reads "+4" and "0_4" as lengths, and drops every field after
# a line without a colon.

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY")

_TCHARS = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rb"(%b) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])" % _TCHARS)
FIELD_NAME = re.compile(_TCHARS)
FIELD_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")


def _encoded(characters: str) -> str:
    """A pattern of characters and of percent-encoded ones. In runs: one by one, a head full of
    them would be as much work as ten requests."""
    return f"[{characters}]*(?:%[0-9A-Fa-f]{{2}}[{characters}]*)*"


_NAME = "A-Za-z0-9._~!$&'()*+,;=-"  # unreserved and sub-delims, RFC 3986 section 2
TARGET = re.compile(
    r"(?:[Hh][Tt][Tt][Pp][Ss]?://(?P<authority>[^/?#]*))?"
    rf"(?P<path>(?:/{_encoded(f':@{_NAME}')})*)"
    rf"(?:\?(?P<query>{_encoded(f'/?:@{_NAME}')}))?"
)
HOST = re.compile(rf"(?:(?!:|$){_encoded(_NAME)}|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
_QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[ \t]*%b(?:[ \t]*=[ \t]*(?:%b|%b))?)*"
    % (_TCHARS, _TCHARS, _QUOTED)
)
TOKEN68 = (string.ascii_letters + string.digits + "-._~+/=").encode("ascii")
CHUNKED = -1  # as a length
SINGLE = (
    "host",
    "content-length",
    "transfer-encoding",
    "authorization",
    "idempotency-key",
    "expect",
)


class Head(NamedTuple):
    """The request line and the fields that matter to us."""

    method: str
    path: str
    query: str
    length: int  # of the body in bytes, or CHUNKED
    keep_alive: bool
    expects: bool  # 100-continue, and has a body
    authorization: Optional[str]
    idempotency_key: Optional[str]


class Request:
    """One whole request, and the address that it came from."""

    __slots__ = ("_connection", "_number", "address", "authorization", "body", "head")

    def __init__(
        self,
        head: Head,
        authorization: Optional[str],
        body: bytes,
        address: str = "",
        connection: int = 0,
        number: int = 0,
    ) -> None:
        self.head = head
        self.authorization = authorization
        self.body = body
        self.address = address
        self._connection = connection
        self._number = number

    @property
    def id(self) -> str:
        """What the log calls it, and the X-Request-Id of its refusal."""
        return request_id(self._connection, self._number)


def request_id(connection: int, number: int) -> str:
    """The number of a connection, and of a request among those on it."""
    return f"{connection:x}-{number}"


def _read_fields(lines: Sequence[bytes]) -> Dict[str, List[bytes]]:
    """Field lines by lower-case name (RFC 9112 section 5). No folding, no space at the colon."""
    if len(lines) > FIELDS_MAXIMUM:
        raise HeadTooLarge()
    fields: Dict[str, List[bytes]] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not FIELD_NAME.fullmatch(name) or not FIELD_VALUE.fullmatch(value):
            raise MalformedRequest("A header field line is malformed.")
        fields.setdefault(name.decode("ascii").lower(), []).append(value.strip(b" \t"))
    return fields


def _single_fields(fields: Mapping[str, List[bytes]]) -> Dict[str, str]:
    """The fields that may come only once, whoever else might take the first or the last."""
    for name in SINGLE:
        if len(fields.get(name, ())) > 1:
            raise MalformedRequest(f"The header field {name} comes more than once.")
    return {name: fields[name][0].decode("latin-1") for name in SINGLE if name in fields}


def _read_length(single: Mapping[str, str], minor: int) -> int:
    """The body's framing: RFC 9112 sections 6.1 to 6.3, without the leniencies."""
    length, coding = single.get("content-length"), single.get("transfer-encoding")
    if coding is not None:
        if length is not None or minor == 0:
            raise MalformedRequest("Transfer-Encoding may not stand beside Content-Length.")
        if coding.lower() != "chunked":
            raise UnknownTransferCoding()
        return CHUNKED
    if length is None:
        return 0
    if not re.fullmatch("[0-9]+", length):
        raise MalformedRequest("Content-Length is not a number.")
    digits = length.lstrip("0") or "0"  # int() of thousands of zeros raises since Python 3.11
    if len(digits) > len(str(BODY_MAXIMUM)) or int(digits) > BODY_MAXIMUM:
        raise BodyTooLarge()
    return int(digits)


def _read_target(method: str, text: str) -> Tuple[str, str]:
    """Path and query of the target, RFC 9112 section 3.2: origin-form, absolute-form, or *."""
    if text == "*" and method == "OPTIONS":
        return "*", ""
    match = TARGET.fullmatch(text)
    if match is None or (not match["path"] and match["authority"] is None):
        raise MalformedRequest("The request target is malformed.")
    if match["authority"] is not None and not HOST.fullmatch(match["authority"]):
        raise MalformedRequest("The authority of the request target is malformed.")
    return match["path"] or "/", match["query"] or ""


def _judge_beginning(data: bytes) -> None:
    if not FIELD_NAME.match(data):
        raise MalformedRequest("This is not HTTP/1.1; it may be TLS.")


def _parse_head(data: bytes) -> Head:
    """A head without its empty line. Raises a kind of Unframed."""
    if not data.count(b"\r\n") == data.count(b"\r") == data.count(b"\n"):
        raise MalformedRequest("Lines must end with CR LF.")
    first, *lines = data.split(b"\r\n")
    _judge_beginning(first)
    match = REQUEST_LINE.fullmatch(first)
    if match is None:
        raise MalformedRequest("The request line is malformed.")
    if match[3] != b"1":
        raise HttpVersion()
    method, minor = match[1].decode("ascii"), int(match[4])
    fields = _read_fields(lines)
    single = _single_fields(fields)
    if ("host" not in single and minor > 0) or not HOST.fullmatch(single.get("host", "-")):
        raise MalformedRequest("There must be one Host header field, and it must name a host.")
    length = _read_length(single, minor)
    if method == "CONNECT":
        raise UnknownTransferCoding()
    path, query = _read_target(method, match[2].decode("ascii"))
    options = b",".join(fields.get("connection", ())).lower()
    expectation = single.get("expect", "").lower() if minor > 0 else ""
    if expectation not in ("", "100-continue"):
        raise ExpectationFailed()
    return Head(
        method=method,
        path=path,
        query=query,
        length=length,
        keep_alive=minor > 0 and b"close" not in [o.strip(b" \t") for o in options.split(b",")],
        expects=bool(expectation) and length != 0,
        authorization=single.get("authorization"),
        idempotency_key=single.get("idempotency-key"),
    )


_parse_head_cached = lru_cache(maxsize=HEADS_CACHED)(_parse_head)
AUTHORIZATION = b"\r\nAuthorization:"
BEARER = AUTHORIZATION + b" Bearer "


def parse_head(data: bytes) -> Tuple[Head, Optional[str]]:
    """A head, without its empty line, and its Authorization. Raises a kind of Unframed.

    Agents' heads differ only in the credential. Where it is spelled as usual, it is cut out of
    its line before the head is parsed, so the cache holds a handful of heads for any fleet. The
    line stays, so a second Authorization is seen, and changes nothing of how others are read.
    """
    start = data.find(BEARER)
    if start > 0:
        end = data.find(b"\r\n", start + len(BEARER))
        end = len(data) if end < 0 else end
        value = data[start + len(BEARER) : end]
        if value and not value.translate(None, TOKEN68):
            rest = data[: start + len(AUTHORIZATION)] + data[end:]
            parse = _parse_head_cached if len(rest) <= HEAD_CACHED_MAXIMUM else _parse_head
            return parse(rest), value.decode("ascii")
    head = _parse_head(data)
    return head, bearer(head.authorization)


def bearer(authorization: Optional[str]) -> Optional[str]:
    """The token68 of a Bearer authorization (RFC 6750 section 2.1); None where there is none."""
    scheme, _, value = (authorization or "").partition(" ")
    return value.strip(" ") if scheme.lower() == "bearer" else None


Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Networks = Tuple[Union[ipaddress.IPv4Network, ipaddress.IPv6Network], ...]

# An address as proxies write it: some add a port. No zone, which could be any text.
HOP = re.compile(
    r"([0-9.]{7,15})(?::[0-9]{1,5})?|([0-9A-Fa-f:.]{2,45})"
    r"|\[([0-9A-Fa-f:.]{2,45})\](?::[0-9]{1,5})?"
)
_FORWARDED_FOR = re.compile(rb"\r\nX-Forwarded-For:([\t\x20-\x7e\x80-\xff]*)", re.IGNORECASE)
_ADDED_BY_PROXIES = re.compile(
    rb"(\r\n(?:X-Forwarded-For|X-Real-IP|X-Request-ID|Forwarded):)[\t\x20-\x7e\x80-\xff]*",
    re.IGNORECASE,
)


def plain_address(address: str) -> str:
    """An IPv4 address that has come over an IPv6 socket as itself, and any other as it is."""
    return address[7:] if address.startswith("::ffff:") and "." in address else address


def read_hop(text: str) -> Optional[Address]:
    """An address in X-Forwarded-For; None for what is none."""
    match = HOP.fullmatch(text)
    if match is None:
        return None
    try:
        address = ipaddress.ip_address(match[match.lastindex or 0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def is_within(address: Address, networks: Networks) -> bool:
    """Whether an address is in one of some networks."""
    return any(address in network for network in networks)


def forwarded_address(values: Sequence[bytes], proxies: Networks, peer: str) -> str:
    """Whom a trusted proxy speaks for: the last address in X-Forwarded-For that is not a trusted
    proxy's. Each proxy adds whom it has heard, so what stands before that one is what somebody
    says of himself. The proxy's own address where none can be read."""
    hops = b",".join(values).decode("latin-1").rsplit(",", HOPS_MAXIMUM)
    address: Optional[Address] = None
    for hop in hops[: -HOPS_MAXIMUM - 1 : -1]:
        address = read_hop(hop.strip(" \t"))
        if address is None or not is_within(address, proxies):
            break
    return peer if address is None else str(address)


class ChunkedBody:
    """A body in chunks, RFC 9112 section 7.1, read as it arrives and never twice. Chunks are not
    kept one by one: of two bytes each they would take twenty times as much memory."""

    def __init__(self) -> None:
        self._body = bytearray()
        self._announced = self._overhead = 0
        self._left = 0  # of the chunk at hand, with the CRLF behind it
        self._trailers = -1  # so many were read; none before the last chunk
        self.is_behind = False  # there is more to be read of what has been fed

    @property
    def body(self) -> bytes:
        """What has been read."""
        return bytes(self._body)

    @property
    def received(self) -> int:
        """How much has been read."""
        return len(self._body)

    def feed(self, data: bytes) -> Tuple[bytes, bool]:
        """Take from data what can be read, but no more than some lines. Gives back the rest, and
        whether the body has ended. Raises MalformedRequest, BodyTooLarge."""
        at = 0
        self.is_behind = False
        for _ in range(CHUNK_LINES_AT_ONCE):
            if self._left:
                if len(data) - at < self._left:
                    return data[at:], False
                self._take_chunk(data[at : at + self._left])
                at += self._left
                self._left = 0
            end = data.find(b"\r\n", at)
            line = data[at : end if end >= 0 else len(data)]
            if end < 0 and line.endswith(b"\r"):
                line = line[:-1]
            if len(line) > CHUNK_LINE_MAXIMUM or b"\n" in line or b"\r" in line:
                raise MalformedRequest("A chunk's size line is malformed.")
            if end < 0:
                return data[at:], False
            at = end + 2
            if self._take_line(line):
                return data[at:], True
        self.is_behind = True
        return data[at:], False

    def _take_chunk(self, chunk: bytes) -> None:
        if not chunk.endswith(b"\r\n"):
            raise MalformedRequest("A chunk is longer than its size.")
        self._body += chunk[:-2]

    def _take_line(self, line: bytes) -> bool:
        """A size line, or a line of the trailer section. True at the end of the body."""
        self._overhead += len(line) + 4
        if self._overhead > CHUNK_OVERHEAD_MAXIMUM:
            raise BodyTooLarge("Send the body in fewer and larger chunks.")
        if self._trailers >= 0:
            self._trailers += 1
            return not line or self._pass_trailer(line)
        match = CHUNK_LINE.fullmatch(line)
        if match is None:
            raise MalformedRequest("A chunk's size line is malformed.")
        size = int(match[1], 16)
        self._announced += size
        if self._announced > BODY_MAXIMUM:
            raise BodyTooLarge()
        if size:
            self._left = size + 2
        else:
            self._trailers = 0
        return False

    def _pass_trailer(self, line: bytes) -> bool:
        """Judge a line that changes nothing. Always False: it is not the end."""
        _read_fields([line])
        if self._trailers > FIELDS_MAXIMUM:
            raise HeadTooLarge()
        return False


class RequestReader:
    """The requests in a stream of bytes, one by one. After a Problem there are no more: where
    the next would start is not known."""

    __slots__ = (
        "_authorization",
        "_chunked",
        "_head",
        "_peer",
        "address",
        "buffer",
        "connection",
        "number",
        "proxies",
    )

    def __init__(self, address: str = "", connection: int = 0, proxies: Networks = ()) -> None:
        """proxies are for a peer who is one of them: then its requests say whose they are."""
        self.address = self._peer = address
        self.proxies = proxies
        self.connection = connection
        self.number = 1  # of the request that comes next
        self.buffer = b""
        self._head: Optional[Head] = None
        self._authorization: Optional[str] = None
        self._chunked: Optional[ChunkedBody] = None

    def next(self, data: bytes = b"") -> Optional[Request]:
        """Take more bytes; the next request if it has arrived whole. Raises Unframed's kinds."""
        buffer = self.buffer + data if self.buffer else data
        head = self._head
        if head is None:
            start = 2 if buffer.startswith(b"\r\n") else 0  # RFC 9112 section 2.2: one empty line
            end = buffer.find(b"\r\n\r\n", start)
            self.buffer = buffer
            if end < 0 or end + 4 - start > HEAD_MAXIMUM:
                self._judge_unfinished(buffer[start : start + HEAD_MAXIMUM])
                return None
            data = buffer[start:end]
            if self.proxies:
                data = self._unwrapped(data)
            head, self._authorization = parse_head(data)
            buffer = buffer[end + 4 :]
        length = head.length
        if length == CHUNKED:
            return self._next_chunked(head, buffer)
        if len(buffer) < length:
            self._head, self.buffer = head, buffer
            return None
        self._head, self.buffer = None, buffer[length:]
        return self._request(head, buffer[:length])

    def _unwrapped(self, data: bytes) -> bytes:
        """A head that a proxy has sent on: its client is who asks. What proxies write differs with
        each client or request, and would keep heads from being found in the cache: it is cut out,
        and its lines stay, so nothing changes of how others are read."""
        values = _FORWARDED_FOR.findall(data)
        self.address = forwarded_address(values, self.proxies, self._peer)
        return _ADDED_BY_PROXIES.sub(rb"\1", data)

    def _request(self, head: Head, body: bytes) -> Request:
        number = self.number
        self.number = number + 1
        return Request(head, self._authorization, body, self.address, self.connection, number)

    def _next_chunked(self, head: Head, buffer: bytes) -> Optional[Request]:
        self._head = head
        if self._chunked is None:
            self._chunked = ChunkedBody()
        self.buffer, ended = self._chunked.feed(buffer)
        if not ended:
            return None
        body, self._head, self._chunked = self._chunked.body, None, None
        return self._request(head, body)

    @staticmethod
    def _judge_unfinished(buffer: bytes) -> None:
        """Refuse at once what can never become a head: another protocol, a bare CR or LF, or too
        many bytes."""
        if buffer.strip(b"\r"):
            _judge_beginning(buffer)
        pairs = buffer.count(b"\r\n")
        bare = buffer.count(b"\r") - pairs - buffer.endswith(b"\r")
        if bare or buffer.count(b"\n") != pairs:
            raise MalformedRequest("Lines must end with CR LF.")
        if len(buffer) == HEAD_MAXIMUM:
            raise HeadTooLarge()

    @property
    def is_behind(self) -> bool:
        """Whether there is more to be read of what has arrived: call next() again."""
        return self._chunked is not None and self._chunked.is_behind

    def unread(self) -> Request:
        """What stands for a request that cannot be read, in its refusal and in the log."""
        method = "HEAD" if self.is_head else "-"
        head = Head(method, "-", "", 0, False, False, None, None)
        address = self.address if self.is_in_body else self._peer  # else it is the last client's
        return Request(head, None, b"", address, self.connection, self.number)

    @property
    def held(self) -> int:
        """Bytes that are kept of an unfinished request."""
        return len(self.buffer) + (self._chunked.received if self._chunked else 0)

    @property
    def is_head(self) -> bool:
        """Whether the unfinished request is a HEAD, whose answer has no content."""
        if self._head is not None:
            return self._head.method == "HEAD"
        return self.buffer.lstrip(b"\r\n").startswith(b"HEAD ")

    @property
    def has_begun(self) -> bool:
        """Whether there is anything of a request but the empty line that may come before it."""
        return self._head is not None or self.buffer not in (b"", b"\r", b"\r\n")

    @property
    def is_in_body(self) -> bool:
        """Whether a head has arrived and its body has not."""
        return self._head is not None

    @property
    def awaits_continue(self) -> bool:
        """Whether the peer waits for 100 Continue before it sends the body it has announced."""
        return self._head is not None and self._head.expects and not self.buffer


NOBODYS = RequestReader().unread()  # stands for the request where the server acts by itself

JSON = "application/json"
PROBLEM_JSON = "application/problem+json"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Response(NamedTuple):
    """One answer."""

    status: int
    body: bytes = b""
    content_type: str = JSON
    headers: Tuple[Tuple[str, str], ...] = ()
    closes: bool = False


def write_json(document: Any) -> bytes:
    """A JSON text in ASCII, without white space: sed in a shell script may have to read it."""
    return json_text(document).encode("ascii")


def json_response(status: int, document: Any) -> Response:
    """An answer with a JSON document."""
    return Response(status, write_json(document))


def refusal(problem: Problem) -> Response:
    """A Problem as its problem document: the one place where peers get to see one."""
    kind: Callable[[str], Problem] = type(problem)
    body = write_json(problem.document()) if problem.errors else _said_plainly(kind, problem.detail)
    return Response(problem.status, body, PROBLEM_JSON, problem.headers(), problem.closes)


@lru_cache(maxsize=128)
def _said_plainly(kind: Callable[[str], Problem], detail: str) -> bytes:
    """The document of a Problem without errors: in a flood of refusals most say the same."""
    return write_json(kind(detail).document())


@lru_cache(maxsize=4)
def http_date(seconds: int) -> bytes:
    """Unix time as an HTTP-date, RFC 9110 section 5.6.7."""
    return formatdate(seconds, usegmt=True).encode("ascii")


@lru_cache(maxsize=256)
def _fields(
    status: int, content_type: str, headers: Tuple[Tuple[str, str], ...], closes: bool
) -> bytes:
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers]
    if UNPRINTABLE.search("".join(lines)):
        raise ValueError("a header field with a control character")
    if status != HTTPStatus.NO_CONTENT:
        lines.append(f"Content-Type: {content_type}")
    if closes:
        lines.append("Connection: close")
    lines += ["X-Content-Type-Options: nosniff", "Cache-Control: no-store", "Date: "]
    return "\r\n".join(lines).encode("latin-1")


def write_head(
    response: Response, seconds: int, closes: bool, length: int, request: str = ""
) -> bytes:
    """The head of an answer given at a Unix time; a refusal names the request. A 204 has no
    Content-Length (RFC 9112 section 6.2)."""
    status, _, content_type, headers, _ = response
    fields = _fields(status, content_type, headers, closes)
    named = b"\r\nX-Request-Id: " + request.encode("ascii") if request else b""
    framing = b"" if status == 204 else b"\r\nContent-Length: %d" % length
    return b"%b%b%b%b\r\n\r\n" % (fields, http_date(seconds), named, framing)


def write_response(
    response: Response, seconds: int, closes: bool, head_only: bool, request: str = ""
) -> bytes:
    """The bytes of an answer. Content-Length is what a GET would have: RFC 9110 section 9.3.2."""
    head = write_head(response, seconds, closes, len(response.body), request)
    return head if head_only else head + response.body


# 8. Assets
#
# Texts for people to copy; the agent and the page. The agent is a program of its own, in the shell
# of whatever host it comes to: shellcheck reads it, and the tests run it in four shells. The page
# is another, in the browser of whoever opens it: the tests drive it in a Chromium.

AGENT_SCRIPT = r"""#!/bin/sh
# hostenroll-agent: enrolls this machine at a hostenroll server, once, and from then on says that
# it lives. Needs a POSIX shell with its usual tools, and curl from 7.58 on.
#
# Functions, and one call in the last line: of a download that was cut short, nothing runs.

VERSION=@VERSION@
PROGRAM=/usr/local/sbin/hostenroll-agent # where --install puts what it needs, for root
SERVICE=hostenroll-agent.service
UNIT=/etc/systemd/system/$SERVICE
AUTHORITIES=/etc/hostenroll-agent.pem

# Seconds.
FIRST_WAIT=1      # after a failure a wait is drawn from 1 to this, doubled with each in a row
LONGEST_WAIT=300  # and no more than this
FACTS_EVERY=3600  # so often it is looked whether there is a new Docker, kernel or hostname
CONNECT_TIMEOUT=10
ANSWER_TIMEOUT=30
LONGEST_ANSWER=65536 # bytes
LINE='
'

usage() {
    cat <<'END'
usage: hostenroll-agent --server URL [--pin PIN | --cacert FILE] [options]
Enrolls this machine with a token, where one is given, and then says that it lives, for as long as
it runs.

  --server URL        the server: https://HOST:PORT
  --pin PIN           trust the server with this public key, sha256//..., and no other
  --cacert FILE       trust the servers that these authorities, in PEM, have signed
  --insecure-http     allow http:// to other machines: whoever is between hears every secret
  --token-file FILE   enroll with the token in FILE; - is stdin
  --hostname NAME     the name of this machine (uname -n)
  --name TEXT         what to call the host, when it enrolls (the hostname)
  --state DIR         where to keep the credential (root: /var/lib/hostenroll-agent, others:
                      ~/.local/state/hostenroll-agent)
  --ask-again SECONDS how long to wait after a refusal (3600)
  --once              one heartbeat, for cron
  --install           as a systemd service; where there is none, print a line for cron
  --uninstall         undo --install; the credential stays
  --help, --version

Exit status: 0 done, 1 failed, 2 usage, 3 refused by the server.
END
}

say() {
    printf 'hostenroll-agent: %s\n' "$*" >&2
}

# What goes wrong is said when it begins or changes, not with every beat.
say_once() {
    [ "$*" = "$said" ] || say "$@"
    said=$*
}

end() { # STATUS [TEXT]
    ended=$1
    shift
    [ $# -eq 0 ] || say "$@"
    drop_lock
    exit "$ended"
}

# A number from 1 to $1. The 1 before it is there for an od that prints zeros first: 08 is no number
# in arithmetic but a syntax error, which ends the shell.
draw() {
    drawn=$(od -An -N2 -tu2 /dev/urandom 2>/dev/null | tr -dc 0-9)
    drawn=$((1${drawn:-$$} % $1 + 1))
}

# For a string in JSON, and for one in a curl config: both escape alike.
escape() {
    printf '%s' "$1" | sed 's/[\\"]/\\&/g'
}

# Of a command's output what may be sent as a fact: one line of printable ASCII, 128 characters.
fact() {
    tr '\n' ' ' | tr -dc ' -~' | sed 's/^ *//; s/ *$//' | cut -c 1-128
}

# Arguments.

read_arguments() {
    while [ $# -gt 0 ]; do
        case $1 in
        --help) usage && exit 0 ;;
        --version) echo "hostenroll-agent $VERSION" && exit 0 ;;
        --insecure-http) insecure=$1 ;;
        --once) once=yes ;;
        --install | --uninstall) act=${1#--} ;;
        --server | --pin | --cacert | --token-file | --hostname | --name | --state | --ask-again)
            [ -n "${2:-}" ] || end 2 "$1 needs a value; see --help"
            take "$1" "$2"
            shift
            ;;
        *) end 2 "$1 is no option; see --help" ;;
        esac
        shift
    done
}

take() {
    case $1 in
    --server) server=${2%/} ;;
    --pin) pin=$2 ;;
    --cacert) cacert=$2 ;;
    --token-file) token_file=$2 ;;
    --hostname) hostname=$2 ;;
    --name) name=$2 ;;
    --state) state=$2 ;;
    --ask-again) ask_again=$2 ;;
    esac
}

check_arguments() {
    check_server
    case $pin in # what is no hash, curl takes for a file
    *[!A-Za-z0-9+/=\;]*) pin=none ;;
    esac
    case $pin in
    '' | sha256//?*) ;;
    *) end 2 "--pin is not like sha256//..., which mint-token prints" ;;
    esac
    case $hostname in
    *[!A-Za-z0-9._-]*) end 2 "--hostname takes letters, digits, dots, - and _" ;;
    esac
    case $name in
    *[[:cntrl:]]*) end 2 "--name takes one line of text" ;;
    esac
    case $ask_again in
    *[!0-9]* | 0* | ??????*) end 2 "--ask-again takes seconds" ;;
    esac
    [ -z "$cacert" ] || [ -r "$cacert" ] || end 2 "cannot read $cacert"
}

check_server() {
    [ -n "$server" ] || end 2 "--server URL is missing; see --help"
    host=${server#*://}
    host=${host%%/*}
    case $server in
    *[!]A-Za-z0-9.:/_~[-]*) ;;
    https://?*) return 0 ;;
    http://?*) check_plain_http && return 0 ;;
    esac
    end 2 "--server is not like https://enroll.lan:8443"
}

check_plain_http() {
    [ -z "$pin$cacert" ] || end 2 "--pin and --cacert say nothing over http: give --server https://"
    case $host in
    '[::1]' | '[::1]':*) loopback=yes ;;
    *) case ${host%%:*} in
        localhost) loopback=yes ;;
        *[!0-9.]*) ;;
        127.*) loopback=yes ;;
        esac ;;
    esac
    [ -n "$loopback$insecure" ] ||
        end 2 "over http everybody between hears the secrets: use https, or --insecure-http"
}

# What is kept. Every file is written beside its place and then moved there, so that a full disk or
# a crash leaves the old one whole. Where root writes for the service, links that its user may have
# put there are not followed: set -C opens only what is new.

open_state() {
    if [ -z "$state" ] && [ "$(id -u)" = 0 ]; then
        state=/var/lib/hostenroll-agent
    elif [ -z "$state" ]; then
        [ -n "${XDG_STATE_HOME:-}${HOME:-}" ] || end 2 "there is no HOME: give --state DIR"
        state=${XDG_STATE_HOME:-$HOME/.local/state}/hostenroll-agent
    fi
    case $state in
    /*) ;;
    *) state=$PWD/$state ;;
    esac
    mkdir -p "$state" 2>/dev/null || [ -d "$state" ] || end 1 "cannot make the folder $state"
    # So that the service, which is not root, can read what root writes.
    # shellcheck disable=SC2012 # find -printf and stat are not on all systems
    [ "$(id -u)" != 0 ] ||
        owner=$(ls -nd "$state/." | sed 's/^[^ ]* *[0-9]* *\([0-9]*\) *\([0-9]*\) .*/\1:\2/')
}

store() { # FILE TEXT
    new=$state/$1.new
    rm -f "$new"
    { printf '%s\n' "$2" >"$new"; } 2>/dev/null &&
        { [ -z "$owner" ] || chown -h "$owner" "$new"; } 2>/dev/null &&
        sync "$new" 2>/dev/null &&
        mv -f "$new" "$state/$1" 2>/dev/null && return
    rm -f "$new"
    return 1
}

# The credential, and the ids of the host and of the token that brought it; fails without one.
load_credential() {
    credential='' host_id='' came_by=''
    [ -r "$state/credential" ] || return 1
    { read -r credential && read -r host_id && read -r came_by; } <"$state/credential"
    case $credential in
    *[!A-Za-z0-9._-]*) ;;
    *.*.*) return 0 ;;
    esac
    return 1
}

# One agent for a folder. The lock names its holder by process id and time of birth: the id alone
# may be another's by now.
birth() {
    sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20
}

is_alive() { # PROCESS-BIRTH
    if [ -n "${1#*-}" ]; then
        [ "$(birth "${1%%-*}")" = "${1#*-}" ]
    else
        kill -0 "${1%%-*}" 2>/dev/null # a system without /proc
    fi
}

holder_of() { # LOCK
    # shellcheck disable=SC2012 # there is no other way to read a link that all systems have
    ls -ld "$1" 2>/dev/null | sed -n 's/.* -> //p'
}

# Of two that find a lock without its holder, one may have taken it by the time that the other
# takes it away: so it is moved, looked at, and given back.
take_lock() {
    mine=$$-$(birth $$)
    until ln -s "$mine" "$state/lock" 2>/dev/null; do
        holder=$(holder_of "$state/lock")
        [ -n "$holder" ] || return 0 # a disk that is full or read-only must not stop the heart
        ! is_alive "$holder" || return 1
        mv -f "$state/lock" "$state/lock.$$" 2>/dev/null || [ ! -L "$state/lock" ] || return 0
        taken=$(holder_of "$state/lock.$$")
        rm -f "$state/lock.$$"
        [ "${taken:-$holder}" = "$holder" ] || ln -s "$taken" "$state/lock" 2>/dev/null
    done
    locked=yes
}

drop_lock() {
    [ -z "$locked" ] || rm -f "$state/lock"
    locked=''
}

# The server.

# Sets reply, the JSON text of the answer; status, that of HTTP, or 000 without an answer; code,
# the name of a refusal; and failure, what curl says. All that is secret is in the config, which
# goes through a pipe: it is in no argument, no environment and no file.
ask() { # PATH CONFIG
    config=$2
    # -q is heard in the first place only: a .curlrc could say that anybody is to be trusted.
    set -- -q "$server$1" -sS -g -i -A "hostenroll-agent/$VERSION" -w '\n%{http_code}'
    set -- "$@" --connect-timeout "$CONNECT_TIMEOUT" --max-time "$ANSWER_TIMEOUT"
    set -- "$@" --max-filesize "$LONGEST_ANSWER" --proto "=${server%%:*}"
    [ -z "$loopback" ] || set -- "$@" --noproxy '*'
    [ -z "$cacert" ] || set -- "$@" --cacert "$cacert"
    [ -z "$pin" ] || set -- "$@" --pinnedpubkey "$pin"
    [ -z "$pin" ] || [ -n "$cacert" ] || set -- "$@" -k # the pin decides
    answer=$(printf '%s\n' "$config" | curl "$@" -K - 2>&1)
    exit_status=$?
    config='' status=000 reply='' failure=''
    if [ "$exit_status" -ne 0 ]; then
        failure=$(printf '%s\n' "$answer" | sed -n 's/ after [0-9]* m[a-z]*//; s/^curl: //p' | fact)
    else
        status=${answer##*"$LINE"}
        reply=${answer%"$LINE"*}
        reply=${reply##*"$LINE"}
    fi
    code=$(member code '"\([a-z-]*\)"')
}

# A member of the reply. Quotes in JSON strings are escaped, so none of them looks like a member.
member() { # NAME PATTERN
    printf '%s\n' "$reply" | sed -n "s/.*\"$1\":$2.*/\\1/p"
}

detail() {
    reply=$(printf '%s\n' "$reply" | sed "s/\\\\[\"\\\\]/'/g")
    member detail '"\([^"]*\)"' | fact
}

# What this machine says of itself, as members of a JSON object.
gather_facts() {
    own=${hostname:-$(uname -n)}
    own=$(printf '%s' "$own" | tr -dc 'A-Za-z0-9._-' | cut -c 1-253 | sed 's/^[.-]*//; s/-*$//')
    [ -n "$own" ] || end 1 "this machine has no hostname that will do: give --hostname"
    os=$(sed -n 's/^PRETTY_NAME=//p' /etc/os-release 2>/dev/null | tr -d "\"'" | tail -n 1)
    os=$(printf '%s' "${os:+$os, }$(uname -s) $(uname -r)" | fact)
    docker=''
    command -v docker >/dev/null 2>&1 &&
        docker=$(docker --version 2>&1 </dev/null | sed -n 's/^Docker version \([^, ]*\).*/\1/p')
    docker=$(printf '%s' "$docker" | fact)
    facts="\"hostname\":\"$own\",\"os\":\"$(escape "$os")\""
    facts="$facts,\"architecture\":\"$(escape "$(uname -m | fact)")\""
    facts="$facts,\"dockerVersion\":\"$(escape "$docker")\""
    age=0
}

# Enrollment. The Idempotency-Key is kept before it is used: when the answer is lost, with the
# connection or with this process, the same token with the same key brings the same host.

enroll() {
    read_token
    token_id=${token#het_}
    token_id=${token_id%%_*}
    if load_credential && [ "$came_by" = "$token_id" ]; then
        token='' # as when this command runs a second time
        return
    fi
    keep_key
    gather_facts
    until ask_for_credential; do
        [ -z "$once$act" ] || end 1
        back_off
    done
    token='' said='' bound=$FIRST_WAIT enrolled=yes
    rm -f "$state/enrolling"
    say "enrolled as host $host_id"
}

read_token() {
    case $token_file in
    -) IFS= read -r token ;;
    *) [ -r "$token_file" ] && IFS= read -r token <"$token_file" ;;
    esac
    token=${token%"$(printf '\r')"}
    case $token in
    *[!A-Za-z0-9_-]*) ;;
    het_*_*) return 0 ;;
    esac
    end 2 "there is no token in $token_file: it begins with het_"
}

keep_key() {
    key='' key_token=''
    [ ! -r "$state/enrolling" ] || read -r key_token key <"$state/enrolling"
    case $key in
    *[!0-9a-f]*) ;;
    *) [ "$key_token" != "$token_id" ] || [ ${#key} -ne 32 ] || return 0 ;;
    esac
    key=$(od -An -N16 -tx1 /dev/urandom | tr -dc 0-9a-f)
    [ ${#key} -eq 32 ] || end 1 "cannot read /dev/urandom"
    store enrolling "$token_id $key" ||
        end 1 "cannot write in $state: make room there and run this again; the token is not used"
}

ask_for_credential() {
    body="{\"token\":\"$token\",$facts"
    [ -z "$name" ] || body="$body,\"name\":\"$(escape "$name")\""
    ask /api/agent/enroll "header = \"Idempotency-Key: $key\"
data-binary = \"$(escape "$body}")\""
    body=''
    case $status in
    201) keep_enrollment && return ;;
    000) trust_or_end && say_once "no answer from $server: $failure" ;;
    408 | 429 | 503) say_once "$server cannot answer now ($status${code:+ $code})" ;;
    4??) end 3 "refused (${code:-$status}): $(detail)" ;;
    *) say_once "$server does not answer as it should ($status${code:+ $code})" ;;
    esac
    return 1
}

# What curl says of a server that is not the one to be trusted: to wait will not mend it.
trust_or_end() {
    case $exit_status in
    51 | 60 | 77 | 83 | 90 | 91) end 1 "not trusted, and told nothing: $server: $failure" ;;
    esac
}

keep_enrollment() {
    credential=$(member credential '"\([A-Za-z0-9_.-]*\)"')
    host_id=$(member hostId '"\([0-9a-f]*\)"')
    came_by=$token_id
    if [ -z "$credential" ] || [ -z "$host_id" ]; then
        say_once "$server answers, but not as a hostenroll server"
    elif store credential "$credential
$host_id
$came_by"; then
        store facts "$facts" || rm -f "$state/facts"
        told=$facts
        return 0
    else
        say_once "cannot write in $state: make room there; the same token gets another credential"
    fi
    return 1
}

# Heartbeats. 0 heard, 1 failed, 3 refused.

beat() {
    load_credential || end 1 "no credential in $state: enroll with --token-file"
    body=''
    [ "$facts" = "$told" ] || body=$facts
    ask /api/agent/heartbeat "header = \"Authorization: Bearer $credential\"
data-binary = \"$(escape "{$body}")\""
    case $status:$code in
    200:*) heard ;;
    000:*) fail "no answer from $server: $failure" ;;
    4??:host-revoked | 4??:host-unknown | 4??:credential-*)
        say_once "refused ($code): $(detail)"
        return 3
        ;;
    400:invalid-body)
        [ -n "$body" ] || fail "refused ($code): $(detail)" || return
        say "the server does not take what this machine says of itself: $(detail)"
        told=$facts
        beat
        ;;
    408:* | 429:* | 503:*) fail "$server cannot answer now ($status${code:+ $code})" ;;
    *) fail "$server does not answer as it should ($status${code:+ $code})" ;;
    esac
}

fail() {
    say_once "$@"
    return 1
}

heard() {
    next=$(member nextHeartbeatSeconds '0*\([0-9]\{1,5\}\)[,}]')
    [ -n "$next" ] || fail "$server answers, but not as a hostenroll server" || return
    [ "$next" -gt 0 ] || next=1
    [ -z "$body" ] || store facts "$facts" || :
    told=$facts
    renewed=$(member credential '"\([A-Za-z0-9_.-]*\)"')
    if [ -n "$renewed" ] && ! keep_renewal; then
        say_once "cannot write in $state: make room there; the old credential goes on for now"
    else
        [ -z "$said" ] || say "the server hears this machine again"
        said=''
    fi
    return 0
}

# The renewed credential is stored before it is used: a beat goes by what is in the file. Another
# enrollment that came between is newer, and stays.
keep_renewal() {
    used=$credential
    load_credential && [ "$credential" = "$used" ] || return 0
    store credential "$renewed
$host_id
$came_by"
}

# Waits after a failure, in a row of them longer and longer, and each host another time: a fleet
# must not come back as one. Of two Retry-After lines, as a proxy may add one, the last counts, and
# one with something other than seconds, such as a date, counts as none.
back_off() {
    asked=$(printf '%s\n' "$answer" | tr -d '\r' | sed -n 's/^[Rr]etry-[Aa]fter: *//p' |
        sed -n '$s/^0*\([0-9]\{1,4\}\) *$/\1/p')
    draw "$bound"
    pause $((${asked:-0} + drawn))
    bound=$((bound * 2))
    [ "$bound" -le "$LONGEST_WAIT" ] || bound=$LONGEST_WAIT
}

# A signal ends the wait at once, and the sleep with it: TERM, INT and HUP the agent too. USR1 comes
# from another run, which has enrolled anew.
pause() {
    trap 'leave' TERM INT HUP
    sleep "$1" &
    [ -z "$woken" ] || end_sleep
    wait "$!" 2>/dev/null
    slept=$! woken=''
    trap - TERM INT HUP
    age=$((age + $1))
}

# Until the fork has become a sleep, a shell may have it take note of TERM, and forget it: so KILL
# too, of which alone bash would tell.
end_sleep() {
    [ "${!:-}" = "$slept" ] || kill "$!" 2>/dev/null
    [ "${!:-}" = "$slept" ] || kill -9 "$!" 2>/dev/null
}

wake() {
    woken=yes
    end_sleep
}

leave() {
    end_sleep
    drop_lock
    trap - TERM
    kill "$$"
}

beat_on() {
    while :; do
        beat
        outcome=$?
        [ -z "$once" ] || end "$outcome"
        case $outcome in
        0) bound=$FIRST_WAIT && pause "$next" ;;
        1) back_off ;;
        3) pause "$ask_again" ;;
        esac
        [ "$age" -lt "$FACTS_EVERY" ] || gather_facts
    done
}

# Installation.

# As a service the agent is nobody: systemd gives it a user of its own and the folder with its
# state. Its program and its unit are root's.
install() {
    [ -n "$enrolled" ] || load_credential || end 2 "no credential in $state: give --token-file"
    if [ -n "$as_service" ]; then
        install_service
    else
        install_for_cron
    fi
}

# Before a token is used.
check_install() {
    [ "$(tail -n 1 "$0" 2>/dev/null)" = 'main "$@"' ] || end 1 "save this script in a file first"
    if [ "$(id -u)" = 0 ] && [ -d /run/systemd/system ]; then
        as_service=yes
        [ "$state" = /var/lib/hostenroll-agent ] ||
            end 2 "--state does not go with --install: a service has /var/lib/hostenroll-agent"
        return
    fi
    [ "$(id -u)" = 0 ] || PROGRAM=${HOME:-}/.local/bin/hostenroll-agent
    case $cacert in
    '' | /*) ;;
    *) cacert=$PWD/$cacert ;;
    esac
    case $PROGRAM$state$cacert in
    *[!A-Za-z0-9/._@+-]*) end 1 "no line for cron can be made with $PROGRAM, $state and $cacert" ;;
    esac
}

put() { # FILE MODE, from stdin
    rm -f "$1.new"
    if ! { cat >"$1.new" && chmod "$2" "$1.new" && mv -f "$1.new" "$1"; }; then
        rm -f "$1.new"
        end 1 "cannot write $1"
    fi
}

# Quoted for a shell, and for systemd.
service_arguments() {
    printf %s "--server '$server' --state '$state' --ask-again $ask_again"
    [ -z "$pin" ] || printf %s " --pin '$pin'"
    [ -z "$cacert" ] || printf %s " --cacert '$cacert'"
    [ -z "$hostname" ] || printf %s " --hostname $hostname"
    [ -z "$insecure" ] || printf %s " $insecure"
}

install_service() {
    put "$PROGRAM" 755 <"$0"
    if [ -n "$cacert" ]; then
        put "$AUTHORITIES" 644 <"$cacert"
        cacert=$AUTHORITIES
    fi
    unit | put "$UNIT" 644 || end 1
    if systemctl daemon-reload && systemctl enable "$SERVICE" && systemctl restart "$SERVICE"; then
        end 0 "installed $SERVICE: it runs, and starts with the machine"
    fi
    end 1 "systemd does not start $SERVICE: systemctl status $SERVICE says why"
}

# No ProtectHostname: a changed hostname would not be seen. No ProtectProc: nor the lock's holder.
unit() {
    cat <<END
[Unit]
Description=says to hostenroll that this machine lives
Wants=network-online.target
After=network-online.target

[Service]
ExecStart=/bin/sh $PROGRAM $(service_arguments)
Restart=on-failure
RestartSec=60
StateDirectory=hostenroll-agent
StateDirectoryMode=0700
UMask=0077

DynamicUser=yes
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
END
}

# Each host has its own second of the minute.
install_for_cron() {
    mkdir -p "${PROGRAM%/*}" || end 1
    put "$PROGRAM" 755 <"$0"
    draw 50
    say "there is no systemd for this: let cron do it; crontab -e, and add this line"
    printf '* * * * * sleep %s; sh %s %s --once 2>&1 | logger -t hostenroll-agent\n' \
        "$drawn" "$PROGRAM" "$(service_arguments)"
    end 0
}

uninstall() {
    [ "$(id -u)" = 0 ] || PROGRAM=${HOME:-}/.local/bin/hostenroll-agent
    if [ -f "$UNIT" ] && [ "$(id -u)" = 0 ]; then
        systemctl disable --now "$SERVICE" || end 1 "systemd does not stop $SERVICE"
        rm -f "$UNIT" "$AUTHORITIES"
        systemctl daemon-reload
    else
        say "if cron has a line for it, remove that: crontab -e"
    fi
    rm -f "$PROGRAM"
    end 0 "uninstalled; the credential stays in $state, and rm -r removes it"
}

main() {
    # What the environment has under these names would be handed on to children as it changes.
    unset token credential answer reply config body key renewed used
    token='' credential='' answer='' said='' bound=$FIRST_WAIT locked='' slept='' woken=''
    server='' pin='' cacert='' token_file='' hostname='' name='' state='' ask_again=3600
    insecure='' loopback='' once='' act='' owner='' facts='' told='' enrolled='' as_service=''
    umask 077
    set -fuC
    LC_ALL=C
    export LC_ALL
    trap wake USR1
    read_arguments "$@"
    [ "$act" = uninstall ] || check_arguments
    case $(type printf) in
    *builtin*) ;;
    *) end 1 "the printf of this shell would show secrets to others: run this with dash or bash" ;;
    esac
    command -v curl >/dev/null 2>&1 || end 1 "there is no curl: install it"
    open_state
    [ "$act" != uninstall ] || uninstall
    [ "$act" != install ] || check_install
    [ -z "$token_file" ] || enroll
    [ "$act" != install ] || install
    take_lock || leave_to_holder
    [ -n "$facts" ] || gather_facts
    [ -z "$enrolled" ] || [ -n "$once" ] || say "beats until stopped; --install makes a service"
    told=$(cat "$state/facts" 2>/dev/null)
    beat_on
}

leave_to_holder() {
    [ -n "$enrolled" ] ||
        end 1 "another agent, process ${holder%%-*}, runs with $state: end it, or give --state DIR"
    kill -USR1 "${holder%%-*}"
    end 0 "another agent, process ${holder%%-*}, runs with $state and goes on with that"
}

main "$@"
""".replace("@VERSION@", __version__)


def join_command(url: str, pin: str, token: str) -> str:
    """What to type on a machine that is to be a host. The script comes from the server by the trust
    that it is then given for itself, and printf is part of the shell: the token is in no process's
    arguments, where ps would show it.

    With a certificate that no authority has signed, curl needs -k beside the pin, and the pin alone
    decides; without a pin -k would trust anybody. Over plain http a pin would be ignored without a
    word: hence --proto. Its argument is quoted for zsh, which would look for a command https.
    """
    scheme = urlsplit(url).scheme
    trust = ["--server", url]
    fetch = ["-fsS", "--proto", f"={scheme}"]
    if scheme == "https" and pin:
        fetch += ["-k", "--pinnedpubkey", pin]
        trust += ["--pin", pin]
    elif scheme == "http" and not _is_loopback(urlsplit(url).hostname or ""):
        trust += ["--insecure-http"]
    fetched = " ".join(map(_quote, [*fetch, "-o", "hostenroll-agent", f"{url}/agent.sh"]))
    joins = " ".join(map(_quote, ["hostenroll-agent", *trust, "--token-file", "-"]))
    return f"curl {fetched} &&\n  printf %s {_quote(token)} | sh {joins}"


def _quote(text: str) -> str:
    return f"'{text}'" if text.startswith("=") else shlex.quote(text)


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


UNIT = string.Template(
    """\
[Unit]
Description=hostenroll, which decides who may join the fleet and knows who is alive
After=network.target

[Service]
Type=notify
ExecStart=$start
ExecReload=/bin/kill -HUP $$MAINPID
Restart=on-failure
RestartSec=1
TimeoutStopSec=10
LimitNOFILE=8192

# Options: HOSTENROLL_PORT=8443 and so on, one a line. Commands beside the server need the same
# --db: sudo $typed mint-token --db /var/lib/hostenroll/hostenroll.db
Environment=HOSTENROLL_DB=/var/lib/hostenroll/hostenroll.db
EnvironmentFile=-/etc/default/hostenroll
StateDirectory=hostenroll
StateDirectoryMode=0700
UMask=0077

DynamicUser=yes
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""
)

SOCKET_UNIT = """\
[Unit]
Description=the socket of hostenroll

[Socket]
ListenStream=443
NoDelay=yes
Backlog=4096

[Install]
WantedBy=sockets.target
"""


# The page: one document that fetches nothing but the API. Style and script stand in it as they are
# here, because its content security policy names them by their hashes. It works in browsers of the
# last years, and is handed out to anybody: what it shows, it has by the API key of who signs in.

PAGE_STYLE = """
/* Colours have names by what they mean; each pair that text is read on has a contrast of 4.5. */
:root {
  color-scheme: light dark;
  --ground: #f5f6f8; --card: #ffffff; --sunk: #eef0f3; --line: #d5dae1; --text: #1a1f26;
  --quiet: #56606c; --accent: #0a58a8; --on-accent: #ffffff; --danger: #b3261e;
  --online: #15703a; --offline: #b3261e; --missing: #8f4700; --pending: #0a58a8;
  --revoked: #66509c; --notice: #fff4d6; --shade: rgb(15 20 30 / 45%);
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #0d1117; --card: #161c24; --sunk: #1f2731; --line: #323c48; --text: #e8edf3;
    --quiet: #9aa5b2; --accent: #74b6ff; --on-accent: #08121f; --danger: #ff8f86;
    --online: #5cd083; --offline: #ff8f86; --missing: #f0a860; --pending: #74b6ff;
    --revoked: #c0adf2; --notice: #3a2f12; --shade: rgb(0 0 0 / 60%);
  }
}
*, ::before, ::after { box-sizing: border-box; }
[hidden], dialog p:empty, form p:empty, div:empty, span:empty { display: none !important; }
html { -webkit-text-size-adjust: 100%; scroll-padding-bottom: 5rem; }
body {
  margin: 0; background: var(--ground); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
h1, h2, h3, p, ul, dl, dd, pre { margin: 0; padding: 0; }
h1 { font-size: 1.125rem; letter-spacing: -.01em; }
h2 { font-size: 1.375rem; line-height: 1.25; letter-spacing: -.01em; overflow-wrap: anywhere; }
h3 { font-size: .875rem; color: var(--quiet); }
a { color: var(--accent); text-underline-offset: .2em; text-decoration-thickness: 1px; }
code, pre, .mono { font: .875em/1.6 ui-monospace, Menlo, Consolas, "Liberation Mono", monospace; }
.quiet { color: var(--quiet); }
.mono { white-space: nowrap; }
code { overflow-wrap: anywhere; }
.small { font-size: .875rem; }
.unseen {
  position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap;
}
.skip { position: absolute; left: -999rem; padding: .75rem 1rem; background: var(--card); }
.skip:focus { left: .5rem; top: .5rem; z-index: 9; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; border-radius: 4px; }
main:focus { outline: none; }

/* What is pressed and filled in: as large as a thumb. */
button, input, select, textarea {
  font: inherit; color: inherit; min-height: 44px; padding: .5rem .875rem; max-width: 100%;
  background: var(--card); border: 1px solid var(--line); border-radius: 8px;
}
input, select, textarea { border-color: var(--quiet); }
::placeholder { color: var(--quiet); opacity: 1; }
textarea { width: 100%; min-height: 5.5rem; }
button { cursor: pointer; font-weight: 600; white-space: nowrap; }
button:not(.main):hover:enabled { border-color: var(--quiet); background: var(--sunk); }
button:disabled { opacity: .5; cursor: default; }
button.main { background: var(--accent); border-color: var(--accent); color: var(--on-accent); }
button.main:hover:enabled { filter: brightness(1.1); }
button.danger { color: var(--danger); }
button.main.danger { background: var(--danger); border-color: var(--danger);
  color: var(--on-accent); }
button.plain { border-color: transparent; background: none; }
label { display: grid; gap: .25rem; font-size: .875rem; font-weight: 600; }
label > * { font-size: 1rem; font-weight: 400; }
label .quiet { font-size: .875rem; }

header {
  display: flex; flex-wrap: wrap; align-items: center; gap: .25rem 1.5rem; padding: .5rem 1.5rem;
  background: var(--card); border-bottom: 1px solid var(--line);
}
nav { display: flex; gap: .25rem; flex: 1; }
nav a {
  padding: .625rem .75rem; border-radius: 8px; color: var(--quiet); text-decoration: none;
  font-weight: 600;
}
nav a:hover { background: var(--sunk); }
nav a[aria-current] { color: var(--text); box-shadow: inset 0 -3px var(--accent);
  border-radius: 8px 8px 0 0; }
main { max-width: 84rem; margin: 0 auto; padding: 1.25rem 1.5rem 3rem; display: grid; gap: 1rem; }
main > section { display: grid; gap: 1rem; min-width: 0; }
.banner { position: sticky; top: 0; z-index: 1; padding: .75rem 1.5rem; background: var(--notice);
  border-bottom: 1px solid var(--line); }
.row { display: flex; flex-wrap: wrap; gap: .75rem; align-items: end; }
.row > .grow { flex: 1 1 16rem; }
.row input[type=search] { width: 100%; }
.row [data-mint] { margin-left: auto; }
.problem { color: var(--danger); overflow-wrap: anywhere; }
.notice { padding: .625rem .875rem; background: var(--notice); border-radius: 8px; }

#sign-in {
  max-width: 27rem; margin: 12vh auto 0; padding: 2rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 12px;
}
#sign-in form { display: grid; gap: 1rem; }

/* The fleet at a glance: what is wrong first, in colour only where it is not zero. */
#fleet { display: grid; grid-template-columns: repeat(6, 1fr); gap: .75rem; }
#fleet button {
  display: grid; justify-items: start; padding: .75rem 1rem; border-radius: 12px;
  font-weight: 400; white-space: normal; min-width: 0;
}
#fleet b { font-size: 1.75rem; line-height: 1.2; font-variant-numeric: tabular-nums;
  letter-spacing: -.02em; }
#fleet [data-count="0"] b { color: var(--quiet); }
#fleet button[aria-pressed=true] { border-color: var(--accent);
  box-shadow: 0 0 0 1px var(--accent); }
#share { display: flex; height: 8px; border-radius: 4px; overflow: hidden;
  background: var(--sunk); }
#share i { background: currentColor; }

/* A status is a word, a shape and a colour, in this order of importance. */
.status { display: inline-flex; align-items: center; gap: .5em; font-weight: 600;
  white-space: nowrap; }
.status::before {
  content: ""; width: .75em; height: .75em; background: currentColor; flex: none;
  forced-color-adjust: none;
}
.online, .valid { color: var(--online); }
.offline { color: var(--offline); }
.missing, .expired { color: var(--missing); }
.pending { color: var(--pending); }
.revoked { color: var(--revoked); }
.used { color: var(--quiet); }
.online::before, .valid::before { border-radius: 50%; }
.offline::before { clip-path: polygon(50% 0, 100% 100%, 0 100%); }
.missing::before, .expired::before { clip-path: polygon(50% 0, 100% 50%, 50% 100%, 0 50%); }
.pending::before { border-radius: 50%; background: none; border: .17em solid; }
.revoked::before { clip-path: polygon(20% 0, 50% 30%, 80% 0, 100% 20%, 70% 50%, 100% 80%, 80% 100%,
  50% 70%, 20% 100%, 0 80%, 30% 50%, 0 20%); }
.all::before { display: none; }

.scroll { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .9375rem; }
caption { text-align: left; }
th, td { padding: .625rem 1rem; text-align: left; vertical-align: baseline; }
thead th { font-size: .8125rem; color: var(--quiet); border-bottom: 1px solid var(--line); }
tbody th, td { font-weight: 400; overflow-wrap: anywhere; }
tr + tr > * { border-top: 1px solid var(--line); }
tbody tr:hover { background: var(--sunk); }
tbody th a { font-weight: 600; }
td button { margin: -.5rem 0; }
.one-organization [data-title=Organization] { display: none; }
time { white-space: nowrap; font-variant-numeric: tabular-nums; }
.label { display: inline-block; margin: 0 .25rem .25rem 0; padding: 0 .5rem; border-radius: 6px;
  background: var(--sunk); font-size: .8125rem; line-height: 1.6; overflow-wrap: anywhere; }
.empty { padding: 2.5rem 1rem; text-align: center; }
[aria-busy=true] tbody { opacity: .6; }
.pager { display: flex; flex-wrap: wrap; align-items: center; gap: .75rem; padding: .5rem 0;
  position: sticky; bottom: 0; background: var(--ground); }
progress { width: 10rem; accent-color: var(--accent); }
@keyframes changed { from { background: var(--notice); } }
tr.changed { animation: changed 4s ease-out; }

dialog {
  width: min(38rem, 100vw - 2rem); max-height: calc(100dvh - 2rem); padding: 0; color: inherit;
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; overflow-y: auto;
}
dialog::backdrop { background: var(--shade); }
dialog > div, dialog > form { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1rem;
  padding: 1.5rem; }
dialog .top { display: flex; justify-content: space-between; align-items: start; gap: 1rem; }
dialog .top button { margin: -.375rem -.5rem 0 0; }
dialog.side { margin: 0 0 0 auto; height: 100dvh; max-height: none; width: min(40rem, 100vw);
  border-width: 0 0 0 1px; border-radius: 0; }
.why { font-size: 1.0625rem; display: grid; gap: .25rem; padding: .875rem 1rem;
  border-left: 4px solid currentColor; background: var(--sunk); border-radius: 0 8px 8px 0; }
.why p { color: var(--text); }
dl { display: grid; grid-template-columns: minmax(7rem, auto) 1fr; gap: .375rem 1rem; }
dt { color: var(--quiet); font-size: .875rem; line-height: 1.7; }
dd { overflow-wrap: anywhere; }
.events { list-style: none; display: grid; gap: .625rem; }
.events li { display: grid; gap: 0; padding-left: .875rem; border-left: 2px solid var(--line); }
pre { padding: .875rem 1rem; background: var(--sunk); border-radius: 8px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.fields { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; align-items: start; }
.fields .wide { grid-column: 1 / -1; }
.fields label > * { width: 100%; }
summary { min-height: 44px; padding: .625rem 0; cursor: pointer; }

@media (min-width: 40.01rem) { /* a host with many labels leaves the others their room */
  tbody th { min-width: 12rem; max-width: 20rem; }
  [data-title=Labels], [data-title=For] { min-width: 8rem; max-width: 20rem; }
  #audit tbody th { white-space: nowrap; }
}
@media (min-width: 40.01rem) and (max-width: 64rem) { /* the host itself still tells */
  #hosts [data-title=System] { display: none; }
}
@media (max-width: 64rem) { #fleet { grid-template-columns: repeat(3, 1fr); } }
@media (max-width: 40rem) {
  header { padding: .25rem 1rem; gap: 0 .75rem; }
  header #who { order: 1; flex: 1 1 0; }
  header #sign-out { order: 2; margin-right: -.75rem; }
  nav { order: 3; flex: 1 0 60%; margin-left: -.5rem; }
  nav a { padding: .625rem .5rem; }
  header #age { order: 4; }
  main { padding: 1rem 1rem 3rem; }
  .banner { padding: .75rem 1rem; }
  #fleet { gap: .5rem; grid-template-columns: repeat(auto-fit, minmax(6.5rem, 1fr)); }
  #fleet button { padding: .5rem .625rem; }
  #fleet b { font-size: 1.375rem; }
  #fleet .status { font-size: .875rem; gap: .35em; }
  .row > * { flex: 1 1 40%; }
  .row > .grow { flex-basis: 100%; }
  .row > button { flex-basis: auto; }
  .row select, .row input { width: 100%; }
  .fields { grid-template-columns: 1fr; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody { display: block; }
  tr { display: grid; grid-template-columns: 1fr auto; gap: .125rem 1rem; padding: .75rem 1rem; }
  tr + tr { border-top: 1px solid var(--line); }
  tr + tr > * { border: 0; }
  tbody th, td { padding: 0; }
  td { display: grid; grid-template-columns: 6.5rem 1fr; grid-column: 1 / -1; font-size: .875rem; }
  td::before { content: attr(data-title); color: var(--quiet); }
  td:nth-child(2) { display: block; grid-column: 2; font-size: inherit; }
  td:nth-child(2)::before, td[data-title=""]::before { content: none; }
  td.none { display: none; }
  td button { margin: .25rem 0; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
  dialog > div, dialog > form { padding: 1rem; }
}
@media (prefers-reduced-motion: no-preference) {
  dialog.side[open] { animation: slide .18s ease-out; }
  @keyframes slide { from { transform: translateX(2rem); opacity: 0; } }
}
@media (prefers-reduced-motion: reduce) { tr.changed { animation: none; } }
"""

PAGE_MARKUP = """
<a class="skip" href="#main">Skip to the content</a>
<div class="banner" id="trouble" role="alert" hidden></div>
<p class="unseen" id="said" role="status"></p>
<noscript><p class="banner">This page needs JavaScript. Without it, everything is on the command
line: <code>hostenroll.py --help</code>.</p></noscript>

<main id="sign-in" hidden>
  <form autocomplete="off">
    <div>
      <h1>hostenroll</h1>
      <p class="quiet">Who may join the fleet, and who is alive.</p>
    </div>
    <label>API key
      <input id="key" type="password" required autocomplete="off" spellcheck="false"
             autocapitalize="off" placeholder="hak_..." aria-describedby="key-help sign-in-problem">
    </label>
    <p class="small quiet" id="key-help">It stays in this tab, and is forgotten with it. To make
      one, on the server:<br><code>python3 hostenroll.py mint-api-key</code></p>
    <p class="problem" id="sign-in-problem" role="alert"></p>
    <button class="main">Sign in</button>
  </form>
</main>

<div id="signed-in" hidden>
<header>
  <h1>hostenroll</h1>
  <nav aria-label="Views">
    <a href="#hosts">Hosts</a><a href="#tokens">Tokens</a><a href="#audit">Audit</a>
  </nav>
  <span class="small quiet" id="age"></span>
  <span class="small quiet" id="who"></span>
  <button class="plain" id="sign-out">Sign out</button>
</header>
<main id="main" tabindex="-1">
<section id="hosts" aria-labelledby="hosts-title">
  <h2 class="unseen" id="hosts-title">Hosts</h2>
  <div id="fleet" role="group" aria-label="The fleet by status"></div>
  <div id="share" aria-hidden="true"></div>
  <form class="row" role="search" data-filters>
    <label class="grow">Search
      <input type="search" name="q" maxlength="255" autocomplete="off" spellcheck="false"
             placeholder="name, hostname, id, or label=value" aria-keyshortcuts="/"></label>
    <label data-organizations hidden>Organization
      <select name="organization"><option value="">all</option></select></label>
    <button class="main" type="button" data-admin data-mint>Mint a token</button>
  </form>
</section>
<section id="tokens" aria-labelledby="tokens-title" hidden>
  <h2 class="unseen" id="tokens-title">Tokens</h2>
  <form class="row" data-filters>
    <label>State
      <select name="state"><option value="">all</option><option>valid</option><option>used</option>
        <option>expired</option><option>revoked</option></select></label>
    <button class="main" type="button" data-admin data-mint>Mint a token</button>
  </form>
</section>
<section id="audit" aria-labelledby="audit-title" hidden>
  <h2 class="unseen" id="audit-title">Audit log</h2>
  <form class="row" data-filters>
    <label>Action
      <select name="action"><option value="">all</option><option>mint</option>
        <option>enroll</option><option>re-enroll</option><option>replay</option>
        <option>renew</option><option>supersede</option><option>refuse</option>
        <option>edit</option><option>revoke</option><option>restore</option>
        <option>delete</option><option>add</option><option>rotate</option>
        <option>retire</option><option>init</option></select></label>
    <label class="grow">About
      <input type="search" name="subject" maxlength="128" autocomplete="off" spellcheck="false"
             placeholder="host:<id> or token:<id>"></label>
    <label>Refused for
      <input type="search" name="code" maxlength="64" autocomplete="off" spellcheck="false"
             placeholder="token-used"></label>
    <label data-organizations hidden>Organization
      <select name="organization"><option value="">all</option></select></label>
  </form>
</section>
</main>
</div>

<dialog class="side" id="host" aria-labelledby="host-name">
  <div>
    <div class="top"><h2 id="host-name" tabindex="-1"></h2>
      <button class="plain" data-close>Close</button></div>
    <div class="why" id="host-why"></div>
    <div id="host-warnings"></div>
    <div class="row" data-admin id="host-acts">
      <button id="revoke">Revoke</button><button id="restore">Restore</button>
      <button id="reenroll">Re-enroll</button><button id="edit">Edit</button>
      <button class="danger" id="delete">Delete</button>
    </div>
    <dl id="host-facts"></dl>
    <h3>What happened</h3>
    <ul class="events" id="host-events"></ul>
    <a class="small" id="host-log">All of it in the audit log</a>
  </div>
</dialog>

<dialog id="form" aria-labelledby="form-title">
  <form autocomplete="off">
    <div class="top"><h2 id="form-title"></h2>
      <button class="plain" type="button" data-close>Cancel</button></div>
    <p id="form-text"></p>
    <div class="fields" id="form-fields"></div>
    <p class="problem" id="form-problem" role="alert"></p>
    <button class="main" id="form-go"></button>
  </form>
</dialog>

<dialog id="secret" aria-labelledby="secret-title">
  <div>
    <h2 id="secret-title"></h2>
    <p id="secret-text"></p>
    <pre id="join" tabindex="0" role="group" aria-label="The join command"></pre>
    <div class="row"><button class="main" data-copy="join">Copy the command</button>
      <button data-close>Done</button><span role="status" id="copied"></span></div>
    <p class="notice small">This is shown once. When it is closed, nobody can show it again.</p>
    <p class="problem" id="secret-warning"></p>
    <details><summary>The token alone</summary>
      <div class="row"><code class="grow" id="token"></code>
        <button data-copy="token">Copy the token</button></div></details>
    <p role="status" id="arrivals"></p>
  </div>
</dialog>
"""

PAGE_SCRIPT = r"""
// What peers say goes into text nodes and attributes that are text, never into markup. What the
// page shows stands in the URL's fragment, so that links, reload and the back button work; the API
// key stands in sessionStorage, and a token nowhere but in the dialog that shows it.

const KEY = "hostenroll.key";
const STATUSES = ["online", "offline", "missing", "pending", "revoked"];
const ROWS = 100; // shown at once
const ROWS_EXAMINED = 1000; // by the server for one request, about
const ANSWER_MS = 15000; // longer than the server waits for another writer
const LABEL = /(\S+?)=(?:"((?:[^"]|"")*)"|(\S+))/g; // in quotes "" is a quote
const COUNT = /^hostenroll_hosts\{organization="([^"]*)",status="(\w+)"\} (\d+)/gm;
const NUMBER = new Intl.NumberFormat("en");
const EXACT = new Intl.DateTimeFormat("en", {
  year: "numeric", month: "short", day: "numeric", hour: "2-digit", minute: "2-digit",
  second: "2-digit", hourCycle: "h23", timeZoneName: "short",
});

const $ = (id) => document.getElementById(id);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

/** An element with attributes and children; a string becomes a text node. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Give an element other children, but only if they are others: focus and selection stay. */
function show(element, ...children) {
  const fresh = make("div", {}, ...children);
  const now = element.childNodes;
  const same = now.length === fresh.childNodes.length &&
    [...now].every((node, n) => node.isEqualNode(fresh.childNodes[n]));
  if (!same) element.replaceChildren(...fresh.childNodes);
}

/** Say something to who listens instead of looking. */
function announce(text) {
  $("said").textContent = text;
}

// Time: by the server's clock, because the one here may be wrong.

let skew = 0;
const now = () => Date.now() + skew;

function span(ms) {
  const seconds = Math.round(ms / 1000);
  for (const [unit, size, least] of [["d", 86400, 2], ["h", 3600, 2], ["min", 60, 2]]) {
    if (seconds >= least * size) return `${Math.floor(seconds / size)} ${unit}`;
  }
  return `${seconds} s`;
}

function ago(time) {
  const ms = now() - Date.parse(time);
  return ms < -1500 ? `in ${span(-ms)}` : `${span(Math.max(ms, 0))} ago`;
}

const exactly = (time) => EXACT.format(Date.parse(time));

function when(time) {
  return make("time", {datetime: time, title: `${exactly(time)}, ${time}`}, ago(time));
}

/** A time as a fact: how long ago, and when. */
function moment(time) {
  return time ? [when(time), under(exactly(time))] : ["never"];
}

// The server.

/** The server has answered, and not with what was asked for. */
class Refusal extends Error {
  constructor(problem) {
    const fields = (problem.errors ?? []).map((error) => ` ${error.field} ${error.detail}.`);
    super(`${problem.title}. ${problem.detail ?? ""}${fields.join("")}`);
    this.status = problem.status;
    this.fields = (problem.errors ?? []).map((error) => error.field);
  }
}

/** Nothing has been heard of it, or nothing that it would say. */
class Silence extends Error {}

/** Somebody has asked for something else meanwhile. */
class Stale extends Error {}

async function ask(method, path, {query = "", body, run = new AbortController()} = {}) {
  const key = sessionStorage.getItem(KEY);
  const isStale = () => run.signal.aborted || key !== sessionStorage.getItem(KEY);
  const limit = new AbortController();
  const abort = () => limit.abort();
  const timer = setTimeout(abort, ANSWER_MS);
  run.signal.addEventListener("abort", abort);
  try {
    const response = await fetch(query ? `${path}?${query}` : path, {
      method, body: body && JSON.stringify(body), headers: {Authorization: `Bearer ${key}`},
      signal: limit.signal, cache: "no-store", credentials: "omit", redirect: "error",
    });
    const text = await response.text();
    if (isStale()) throw new Stale();
    return read(response, text);
  } catch (error) {
    if (error instanceof Refusal) throw error;
    throw isStale() ? new Stale() : new Silence(error.message);
  } finally {
    clearTimeout(timer);
  }
}

/** What an answer says. Throws a Refusal; one of the key signs out. */
function read(response, text) {
  const type = response.headers.get("Content-Type") ?? "";
  if (!response.ok && !type.startsWith("application/problem+json")) {
    throw new Error(`HTTP ${response.status}`);
  }
  const date = Date.parse(response.headers.get("Date"));
  if (date) skew = date - Date.now();
  if (response.ok) return type.startsWith("application/json") && text ? JSON.parse(text) : text;
  const refusal = new Refusal(JSON.parse(text));
  if (refusal.status === 401 && $("sign-in").hidden) signOut(refusal.message);
  throw refusal;
}

/** Show what has gone wrong with what nobody has pressed a button for. */
function report(error) {
  if (error instanceof Stale || error.status === 401) return;
  const time = EXACT.format(Date.now());
  if (!(error instanceof Silence || error instanceof Refusal)) console.error(error);
  if ($("trouble").hidden) {
    $("trouble").textContent = error instanceof Silence
      ? `No answer from the server since ${time}. What is shown may be old; the server goes on ` +
        "being asked."
      : `${error.message} (${time})`;
    $("trouble").hidden = false;
  }
}

/** Something done again and again while somebody looks. After what took long the pause is long
    too, whatever came of it: nothing that a page asks for while it is left open costs the server
    more than a tenth of its time, least of all a server in trouble. */
class Poll {
  constructor(pause, run) {
    Object.assign(this, {pause, run, due: 0, turn: null});
  }

  tick() {
    if (!this.turn && performance.now() >= this.due) this.go();
  }

  async go(run = this.run) {
    const turn = this.turn = {};
    const since = performance.now();
    try {
      await run();
      if (this.turn === turn) $("trouble").hidden = true;
    } catch (error) {
      report(error);
    }
    const pause = Math.max(this.pause, 10 * (performance.now() - since));
    if (this.turn === turn) Object.assign(this, {turn: null, due: performance.now() + pause});
  }
}

// Lists: hosts, tokens and events are had and shown in one way.

/** A list of the API, a page of it at a time. The server looks at some rows for each request, so
    that a page may come in parts; it can be stopped, and newer questions stop older ones. */
class List {
  constructor(view, {path, name, one, columns, query, empty, total = () => 0}) {
    Object.assign(this, {view, path, name, one, columns, query, empty, total});
    this.poll = new Poll(5000, () => this.look());
    this.build();
    this.begin(null);
  }

  build() {
    const heads = this.columns.map(([title]) =>
      make("th", {scope: "col", role: "columnheader", "data-title": title}, title));
    this.body = make("tbody", {role: "rowgroup"});
    this.said = make("span", {class: "quiet small"});
    this.progress = make("progress");
    const button = (text, act) => {
      const made = make("button", {type: "button"}, text);
      made.addEventListener("click", act);
      return made;
    };
    this.stop = button("Stop", () => this.halt());
    this.previous = button("Previous", () => this.turn(this.cursors.slice(0, -1)));
    this.following = button("Next", () => this.go());
    this.nothing = make("p", {class: "empty quiet"});
    this.pager = make("div", {class: "pager"}, this.previous, this.following, this.said,
      this.progress, this.stop);
    this.table = make("table", {role: "table", "aria-labelledby": `${this.view}-title`},
      make("thead", {role: "rowgroup"}, make("tr", {role: "row"}, ...heads)), this.body);
    $(this.view).append(make("div", {class: "scroll"}, this.table, this.nothing), this.pager);
    this.body.addEventListener("keydown", (event) => this.walk(event));
  }

  /** Another question, from its first page; the same one is asked again when it is time. */
  ask(filters) {
    if (filters === this.filters) return;
    this.begin(filters);
    this.poll.go();
  }

  begin(filters, cursors = [""]) {
    Object.assign(this, {filters, cursors, next: cursors.at(-1), rows: [], looked: 0, at: 0,
      isLoaded: false, isHalted: false});
  }

  /** Another page. */
  turn(cursors) {
    this.begin(this.filters, cursors);
    this.poll.go();
    if (this.table.getBoundingClientRect().top < 0) this.table.scrollIntoView();
  }

  /** Onwards, from where this page or what was stopped has ended. */
  go() {
    if (this.isLoaded) return this.turn([...this.cursors, this.next]);
    if (!this.isHalted) return undefined;
    this.isHalted = false;
    return this.poll.go();
  }

  halt() {
    this.run?.abort();
    this.isHalted = true;
    this.take(this.rows, this.next, this.looked);
    this.following.focus();
  }

  /** Ask until the page is full or the list has ended. A page that is shown stays as it is until
      all of it has been had anew. */
  async look() {
    if (this.isHalted) return;
    const isQuiet = this.isLoaded;
    let [rows, cursor, looked] = isQuiet ? [[], this.cursors.at(-1), 0]
      : [this.rows, this.next, this.looked];
    this.run?.abort();
    const run = this.run = new AbortController();
    this.state();
    try {
      do {
        const query = this.query(new URLSearchParams(this.filters));
        query.set("limit", ROWS - rows.length);
        if (cursor) query.set("cursor", cursor);
        const page = await ask("GET", this.path, {query, run});
        rows = rows.concat(page[this.name]);
        cursor = page.nextCursor;
        looked += ROWS_EXAMINED;
        if (!isQuiet) this.take(rows, cursor, looked);
      } while (cursor && rows.length < ROWS);
      Object.assign(this, {isLoaded: true, at: now()});
      this.take(rows, cursor, looked);
      if (!isQuiet) announce(this.said.textContent);
    } catch (error) {
      if (!(error instanceof Refusal) || error.status >= 500) throw error;
      this.isHalted = true;
      this.state(error.message);
    }
  }

  take(rows, next, looked) {
    Object.assign(this, {rows, next, looked});
    const changed = reconcile(this.body, rows, (item) => this.row(item));
    if (changed.length > 3) announce(`${changed.length} hosts have another status now.`);
    else if (changed.length) announce(changed.map((h) => `${h.name} is ${h.status}.`).join(" "));
    this.state();
  }

  row(item) {
    const cells = this.columns.map(([title, cell], n) => {
      const inner = make("div", {}, ...cell(item));
      const kind = n ? {role: "cell"} : {role: "rowheader", scope: "row"};
      const none = inner.hasChildNodes() ? {} : {class: "none"};
      return make(n ? "td" : "th", {...kind, ...none, "data-title": title}, inner);
    });
    return make("tr", {role: "row", "data-key": item.id ?? item.number,
      "data-status": item.status ?? ""}, ...cells);
  }

  /** Say where in the list this is, and offer what can be done. */
  state(refused = "") {
    const isLooking = !this.isLoaded && !this.isHalted;
    const total = this.total(new URLSearchParams(this.filters));
    const focused = document.activeElement;
    this.table.setAttribute("aria-busy", isLooking);
    this.said.textContent = refused || this.sentence(isLooking, total);
    this.said.classList.toggle("problem", Boolean(refused));
    this.stop.hidden = this.progress.hidden = !isLooking || !this.looked;
    if (total) Object.assign(this.progress, {max: total, value: Math.min(this.looked, total)});
    else this.progress.removeAttribute("value");
    this.previous.disabled = this.cursors.length < 2;
    this.following.disabled = Boolean(refused) || (this.isLoaded && !this.next);
    this.following.textContent = this.isHalted ? "Go on" : "Next";
    if (focused.disabled) (focused === this.previous ? this.following : this.previous).focus();
    this.nothing.hidden = !this.isLoaded || this.rows.length > 0;
    this.nothing.textContent = this.filters ? `No ${this.one} matches.` : this.empty;
  }

  sentence(isLooking, total) {
    if (isLooking || this.isHalted) {
      const looked = NUMBER.format(Math.min(this.looked, total || Infinity));
      const of = total ? ` of ${NUMBER.format(total)}` : "";
      const found = this.rows.length ? ` and found ${this.rows.length}` : "";
      if (!this.looked) return "Looking ...";
      return `Looked at about ${looked}${of} ${this.name}${found}${isLooking ? " ..." : "."}`;
    }
    const first = (this.cursors.length - 1) * ROWS + 1;
    const last = first + this.rows.length - 1;
    const rows = last === 1 ? `1 ${this.one}` : `${NUMBER.format(last)} ${this.name}`;
    if (first === 1 && !this.next) return rows;
    const end = this.next ? "" : ", the end of the list";
    return `${this.name} ${NUMBER.format(first)} to ${NUMBER.format(last)}${end}`;
  }

  /** Up and down lead from row to row. */
  walk(event) {
    const step = {ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling"}[event.key];
    const link = step && event.target.closest("tr")[step]?.querySelector("a, button");
    if (!link) return;
    event.preventDefault();
    link.focus();
  }
}

/** Make a table's body show items: cells that are as they were are not touched, so that focus,
    selection and scroll stay. The hosts whose status is another one are returned. */
function reconcile(body, items, row) {
  const old = new Map([...body.rows].map((tr) => [tr.dataset.key, tr]));
  const focused = body.contains(document.activeElement)
    ? document.activeElement.closest("tr").rowIndex : 0;
  const fresh = items.map(row);
  const keys = new Set(fresh.map((tr) => tr.dataset.key));
  for (const [key, tr] of old) if (!keys.has(key)) tr.remove();
  const changed = [];
  let place = body.firstElementChild;
  fresh.forEach((tr, n) => {
    const there = old.get(tr.dataset.key);
    if (!there) return body.insertBefore(tr, place);
    place = there.nextElementSibling;
    const isChanged = there.dataset.status !== tr.dataset.status;
    if (isChanged) changed.push(items[n]);
    there.classList.toggle("changed", isChanged);
    there.dataset.status = tr.dataset.status;
    [...tr.cells].forEach((cell, m) => {
      if (!there.cells[m].isEqualNode(cell)) there.cells[m].replaceWith(cell);
    });
    return undefined;
  });
  if (focused && !body.contains(document.activeElement)) {
    body.rows[Math.min(focused, body.rows.length) - 1]?.querySelector("a, button")?.focus();
  }
  return changed;
}

// What is shown of hosts, tokens and events.

const status = (word) => make("span", {class: `status ${word}`}, word);
const under = (text) => make("div", {class: "quiet small"}, text);
const mono = (text) => make("span", {class: "mono"}, text);
/** What there is of something to show: it, or nothing. */
const some = (value, shown = (it) => it) => value ? [shown(value)] : [];
const pairs = (labels) => Object.entries(labels).map(([name, value]) => `${name}=${value}`);

/** Where the fragment leads: a view, and what it is asked for. */
function here() {
  const [view, asked] = location.hash.slice(1).split("?", 2);
  return {view: Object.hasOwn(lists, view) ? view : "hosts", asked: new URLSearchParams(asked)};
}

/** The fragment that leads somewhere. */
function there(view, asked) {
  const query = new URLSearchParams(asked).toString();
  return query ? `#${view}?${query}` : `#${view}`;
}

/** A host's name, that opens it beside what is shown now. */
function hostLink(id, text) {
  const {view, asked} = here();
  asked.set("host", id);
  return make("a", {href: there(view, asked)}, text);
}

/** An actor or a subject of the audit log. */
function party(name) {
  const [kind, id] = name.split(":", 2);
  return make("span", {class: "mono"}, kind === "host" ? hostLink(id, name) : name);
}

function labelLinks(labels) {
  return pairs(labels).map((pair) => {
    const [name, value] = pair.split(/=(.*)/s);
    const quoted = `${name}="${value.replaceAll('"', '""')}"`;
    const q = /[\s"]/.test(value) || !value ? quoted : pair;
    return make("a", {class: "label", href: there("hosts", {q})}, pair);
  });
}

function hostName(host) {
  const cell = [hostLink(host.id, host.name)];
  if (host.hostname !== host.name) cell.push(under(host.hostname));
  if (host.warnings.length) cell.push(make("div", {class: "status missing small"}, "warning"));
  return cell;
}

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}.`;

function told(detail) {
  return Object.entries(detail).map(([name, value]) =>
    `${name}: ${typeof value === "string" ? value : JSON.stringify(value)}`).join(", ");
}

function system(host) {
  return [host.os, host.architecture, host.dockerVersion && `Docker ${host.dockerVersion}`]
    .filter(Boolean).join(", ");
}

/** The query of a list of hosts: words of the form label=value are labels, the rest is text. */
function hostQuery(asked) {
  const query = new URLSearchParams();
  for (const name of ["status", "organization"]) {
    if (asked.get(name)) query.set(name, asked.get(name));
  }
  const text = (asked.get("q") ?? "").replace(LABEL, (pair, name, quoted, bare) => {
    query.append("label", `${name}=${quoted?.replaceAll('""', '"') ?? bare}`);
    return " ";
  }).trim();
  if (text) query.set("q", text);
  return query;
}

const ORGANIZATION = ["Organization", (item) => some(item.organizationId)];

const lists = {
  hosts: new List("hosts", {
    path: "api/hosts", name: "hosts", one: "host", query: hostQuery,
    empty: "No hosts yet. Mint a token, and run its command on a machine.",
    total: (asked) => fleet.total(asked.get("organization")),
    columns: [
      ["Host", hostName],
      ["Status", (host) => [status(host.status)]],
      ["Last seen", (host) => [host.lastSeen ? when(host.lastSeen) : "never"]],
      ["System", (host) => some(system(host))],
      ["Labels", (host) => pairs(host.labels).map((pair) => make("span", {class: "label"}, pair))],
      ORGANIZATION,
    ],
  }),
  tokens: new List("tokens", {
    path: "api/hosts/tokens", name: "tokens", one: "token", query: (asked) => asked,
    empty: "No tokens yet.",
    columns: [
      ["Token", (token) => [mono(token.id), ...some(token.description, under)]],
      ["State", (token) => [status(token.state)]],
      ["Uses", tokenUses],
      ["Expires", (token) => [when(token.expiresAt)]],
      ["For", tokenFor],
      ["Minted", (token) => [when(token.createdAt), under(token.createdBy)]],
      ORGANIZATION,
      ["", tokenActs],
    ],
  }),
  audit: new List("audit", {
    path: "api/audit", name: "events", one: "event", query: (asked) => asked,
    empty: "Nothing has happened yet.",
    columns: [
      ["Time", (event) => moment(event.time)],
      ["Action", (event) => [make("b", {}, event.action), ...some(event.code, under)]],
      ["About", (event) => some(event.subject, party)],
      ["By", (event) => [party(event.actor), ...some(event.address, under)]],
      ["Detail", (event) => some(told(event.detail))],
      ORGANIZATION,
    ],
  }),
};

function tokenUses(token) {
  const shown = token.hosts.slice(0, 2).map((id) => make("div", {class: "mono"}, hostLink(id, id)));
  const more = token.hosts.length - shown.length;
  return [`${NUMBER.format(token.uses)} of ${NUMBER.format(token.maxUses)}`, ...shown,
    ...some(more, () => under(`and ${NUMBER.format(more)} more`))];
}

function tokenFor(token) {
  const host = token.hostId ? ["re-enrolling ", hostLink(token.hostId, token.hostId)]
    : token.hostname ? [token.hostname] : [];
  const labels = pairs(token.labels).map((pair) => make("span", {class: "label"}, pair));
  return labels.length ? [...host, make("div", {}, ...labels)] : host;
}

function tokenActs(token) {
  if (!isAdmin() || token.state !== "valid") return [];
  return [make("button", {type: "button", class: "danger", "data-revoke-token": token.id,
    "aria-label": `Revoke token ${token.id}`}, "Revoke")];
}

// The fleet at a glance, as the server counts it for /metrics.

const fleet = {
  counts: new Map(), // organization -> status -> number

  async count() {
    const text = await ask("GET", "metrics");
    this.counts = new Map();
    for (const [, organization, word, number] of text.matchAll(COUNT)) {
      if (!this.counts.has(organization)) this.counts.set(organization, new Map());
      this.counts.get(organization).set(word, Number(number));
    }
    this.show();
  },

  of(word, organization) {
    const counted = organization ? [this.counts.get(organization)] : [...this.counts.values()];
    return counted.reduce((sum, one) => sum + (one?.get(word) ?? 0), 0);
  },

  total(organization) {
    return STATUSES.reduce((sum, word) => sum + this.of(word, organization), 0);
  },

  show() {
    const {asked} = here();
    const organization = asked.get("organization");
    const total = this.total(organization);
    for (const tile of all("button", $("fleet"))) {
      const word = tile.dataset.status;
      const count = word ? this.of(word, organization) : total;
      tile.dataset.count = count;
      tile.setAttribute("aria-pressed", (asked.get("status") ?? "") === word);
      show(tile, make("b", {}, this.counts.size ? NUMBER.format(count) : "\u2013"), " ",
        make("span", {class: `status ${word || "all"}`}, word || "all hosts"));
    }
    const silent = this.of("offline", organization) + this.of("missing", organization);
    document.title = silent ? `${NUMBER.format(silent)} silent - hostenroll` : "hostenroll";
    this.share(organization);
    this.offer();
  },

  share(organization) {
    show($("share"), ...STATUSES.map((word) => make("i", {class: word})));
    STATUSES.forEach((word, n) => {
      $("share").children[n].style.flexGrow = this.of(word, organization);
    });
  },

  /** Let the organizations be chosen, where there are several. */
  offer() {
    const names = [...this.counts.keys()];
    document.body.classList.toggle("one-organization", names.length < 2);
    for (const place of all("[data-organizations]")) {
      place.hidden = names.length < 2;
      const select = place.querySelector("select");
      show(select, make("option", {value: ""}, "all"),
        ...names.map((name) => make("option", {value: name}, name)));
      select.value = here().asked.get("organization") ?? "";
    }
  },
};

// Dialogs.

let question = null; // what the form asks for; each has an object of its own
const isAsked = (one) => one === question && $("form").open;

/** Ask for something; what comes of it is shown in the dialog when it is refused. An answer that
    comes when that is closed, or asks for something else, leaves it alone. */
function fill({title, text = "", go, danger = false, fields = [], act}) {
  const own = question = {};
  $("form-title").textContent = title;
  $("form-text").textContent = text;
  $("form-problem").textContent = "";
  $("form-go").textContent = go;
  $("form-go").className = danger ? "main danger" : "main";
  $("form-go").disabled = false;
  const inputs = fields.map(input);
  $("form-fields").replaceChildren(...inputs.map((made) => made.closest("label")));
  $("form").querySelector("form").onsubmit = async (event) => {
    event.preventDefault();
    const values = Object.fromEntries(inputs.map((made) => [made.name, made.value]));
    $("form-go").disabled = true;
    const refusal = await act(values).then(() => null, (error) => error);
    if (!isAsked(own)) return;
    $("form-go").disabled = false;
    $("form-problem").textContent = refusal ? said(refusal) : "";
    for (const made of inputs) {
      made.setAttribute("aria-invalid", Boolean(refusal?.fields?.includes(made.name)));
    }
    if (!refusal) $("form").close();
  };
  $("form").showModal();
  (inputs[0] ?? $("form-go")).focus();
}

function input({name, label, help, tag = "input", options = [], value = "", wide, ...attributes}) {
  const choices = options.map(([text, choice]) => make("option", {value: choice}, text));
  const made = make(tag, {name, autocomplete: "off", ...attributes}, ...choices);
  made.value = value;
  make("label", wide ? {class: "wide"} : {}, label, made,
    ...some(help, (text) => make("span", {class: "quiet"}, text)));
  return made;
}

function said(error) {
  if (error instanceof Silence) return "No answer from the server. Nothing may have happened, or " +
    "all of it: look before you try again.";
  return error.message;
}

/** The labels of a text, one a line. Spaces about a name and a value are left out, but not of a
    line that was there before: it stays as it is. */
function readLabels(text, before = []) {
  const lines = text.split("\n").filter((line) => line.trim());
  return Object.fromEntries(lines.map((line) => {
    const [name, value] = line.split(/=(.*)/s, 2);
    if (value === undefined) throw new Error(`A label is written name=value, and not ${name}`);
    return before.includes(line) ? [name, value] : [name.trim(), value.trim()];
  }));
}

const TTLS = [["10 minutes", 600], ["1 hour", 3600], ["8 hours", 28800], ["1 day", 86400],
  ["7 days", 604800], ["30 days", 2592000]];
const LABELS_FIELD = {name: "labels", label: "Labels", tag: "textarea", wide: true,
  spellcheck: "false", placeholder: "rack=b4", help: "One a line."};

function mint() {
  const names = [...fleet.counts.keys()];
  const organization = {name: "organizationId", label: "Organization", tag: "select",
    options: names.map((name) => [name, name]),
    value: here().asked.get("organization") || names.find((name) => name === "default")};
  fill({
    title: "Mint a token",
    text: "A token lets machines join. What you get is the whole command to run on them.",
    go: "Mint",
    fields: [
      {name: "description", label: "What for", maxlength: 1000, wide: true},
      {name: "ttlSeconds", label: "Good for", tag: "select", options: TTLS, value: 3600},
      {name: "maxUses", label: "Machines", type: "number", min: 1, max: 1000000, value: 1,
        required: ""},
      {name: "hostname", label: "Only for the hostname", maxlength: 253, spellcheck: "false",
        autocapitalize: "off", help: "Any, when empty.", wide: names.length < 2},
      ...(names.length > 1 ? [organization] : []),
      LABELS_FIELD,
    ],
    act: async (values) => {
      const body = {ttlSeconds: Number(values.ttlSeconds), maxUses: Number(values.maxUses),
        description: values.description, labels: readLabels(values.labels)};
      if (values.hostname) body.hostname = values.hostname;
      if (values.organizationId) body.organizationId = values.organizationId;
      await mintAt("api/hosts/tokens", body, "Let a machine join",
        "Run this on the machine that is to join:");
    },
  });
}

/** Mint a token, and show the command with it. The command is had first: a token that could not
    be shown would be lost. Who has closed the form wants neither; a token that is minted by then
    stands in the list, where it can be revoked. */
async function mintAt(path, body, title, text) {
  const own = question;
  const service = await ask("GET", "api/service");
  if (!isAsked(own)) throw new Stale();
  const minted = await ask("POST", path, {body});
  lists.tokens.poll.due = 0;
  if (!isAsked(own)) throw new Stale();
  const isNear = /^https?:\/\/(localhost|127\.|\[::1\])/.test(service.publicUrl);
  $("secret-title").textContent = title;
  $("secret-text").textContent = text;
  $("join").textContent = service.joinCommand.replace("%s TOKEN", () => `%s ${minted.token}`);
  $("token").textContent = minted.token;
  $("secret-warning").textContent = isNear ? `Other machines cannot reach ${service.publicUrl}: ` +
    "serve --public-url says where they find this server." : "";
  $("secret").dataset.token = minted.id;
  $("form").close();
  $("secret").showModal();
  $("secret").querySelector("[data-copy]").focus();
}

/** Whether somebody has come in by the token that is shown. */
async function watch() {
  const asked = $("secret").dataset.token;
  const token = await ask("GET", `api/hosts/tokens/${asked}`);
  if (asked !== $("secret").dataset.token || !$("secret").open) return;
  const from = token.usedFrom ? `, last from ${token.usedFrom}` : "";
  const uses = `Used ${token.uses} of ${token.maxUses} times${from}. `;
  show($("arrivals"), ...(token.uses ? [uses, ...token.hosts.slice(0, 5).flatMap((id) =>
    [hostLink(id, id), " "])] : ["Nobody has used it yet."]));
}

/** Copy a text. Away from https and loopback a page has no clipboard: then it is selected. */
async function copy(source) {
  try {
    await navigator.clipboard.writeText(source.textContent);
    $("copied").textContent = "Copied.";
  } catch {
    getSelection().selectAllChildren(source);
    $("copied").textContent = "Selected: press Ctrl+C.";
  }
}

// A host.

let host = null;

/** Show the host that the fragment names. */
function openHost(id) {
  if ($("host").dataset.id === id && $("host").open) return;
  $("host").dataset.id = id;
  host = null;
  $("host-name").textContent = `Host ${id}`;
  for (const name of ["why", "warnings", "facts", "events"]) $(`host-${name}`).replaceChildren();
  $("host-acts").hidden = true;
  if (!$("host").open) $("host").showModal();
  $("host-log").href = there("audit", {subject: `host:${id}`});
  polls.host.go();
  polls.happened.go();
}

async function loadHost() {
  const {id} = $("host").dataset;
  try {
    const found = await ask("GET", `api/hosts/${encodeURIComponent(id)}`);
    if (id === $("host").dataset.id) showHost(found);
  } catch (error) {
    if (error.status !== 404) throw error;
    if (id !== $("host").dataset.id) return;
    $("host-name").textContent = "No such host";
    show($("host-why"), make("p", {}, `No host has the id ${id}: it was deleted, or never was.`));
    $("host-acts").hidden = true;
  }
}

function showHost(found) {
  host = found;
  const fact = (name, ...value) => [make("dt", {}, name), make("dd", {}, ...value)];
  $("host-name").textContent = host.name;
  $("host-why").className = `why ${host.status}`;
  show($("host-why"), status(host.status), make("p", {}, sentence(host.statusReason)));
  show($("host-warnings"), ...host.warnings.map((text) =>
    make("p", {class: "notice small"}, `Warning: ${text}.`)));
  show($("host-facts"),
    ...fact("Hostname", host.hostname), ...fact("Organization", host.organizationId),
    ...fact("Last seen", ...moment(host.lastSeen)),
    ...fact("Enrolled", ...moment(host.enrolledAt)),
    ...(host.revokedAt ? fact("Revoked", ...moment(host.revokedAt)) : []),
    ...fact("System", system(host) || "not said"),
    ...fact("Labels", ...(pairs(host.labels).length ? labelLinks(host.labels) : ["none"])),
    ...fact("Id", mono(host.id)),
    ...fact("Came in by", make("a", {href: there("audit", {subject: `token:${host.tokenId}`})},
      `token ${host.tokenId}`)));
  $("host-acts").hidden = !isAdmin();
  $("revoke").hidden = host.status === "revoked";
  $("restore").hidden = host.status !== "revoked";
}

/** The last events about the host; of a long log only the newest part is looked through. */
async function loadEvents() {
  const {id} = $("host").dataset;
  const query = new URLSearchParams({subject: `host:${id}`, limit: 8});
  const events = [];
  for (let parts = 0; parts < 5 && events.length < 8; parts += 1) {
    const page = await ask("GET", "api/audit", {query});
    events.push(...page.events);
    if (!page.nextCursor) break;
    query.set("cursor", page.nextCursor);
  }
  if (id !== $("host").dataset.id) return;
  show($("host-events"), ...events.slice(0, 8).map((event) => make("li", {},
    make("span", {}, make("b", {}, event.action), event.code ? ` ${event.code}` : "", " ",
      when(event.time)),
    make("span", {class: "quiet small"}, `by ${event.actor}`,
      event.address ? ` from ${event.address}` : "",
      told(event.detail) ? `: ${told(event.detail)}` : ""))),
  ...(events.length ? [] : [make("li", {class: "quiet"}, "Nothing of late.")]));
}

/** Do something to the host that is shown, after asking. By the time of the answer another may be
    shown, or none: Back leads there behind the form. */
function act(order) {
  const was = host;
  fill({...order, act: async (values) => {
    const changed = await order.act(`api/hosts/${was.id}`, values, was);
    if (changed?.id === $("host").dataset.id) showHost(changed);
    announce(`${order.go}: ${was.name}.`);
    for (const poll of [polls.happened, polls.fleet, lists[here().view].poll]) poll.go();
  }});
}

const ACTS = {
  revoke: () => act({
    title: `Revoke ${host.name}?`, go: "Revoke", danger: true,
    text: "It is shut out with its next heartbeat, until it is restored. Its record stays.",
    act: (path) => ask("POST", `${path}/revoke`),
  }),
  restore: () => act({
    title: `Restore ${host.name}?`, go: "Restore",
    text: "It is let in again, with the credential that it has. Its agent asks once an hour.",
    act: (path) => ask("POST", `${path}/restore`),
  }),
  reenroll: () => act({
    title: `Re-enroll ${host.name}?`, go: "Make the command",
    text: "You get a command for this host. It brings a new credential, and keeps the host's id, " +
      "name, labels and history. The old credential is good until the new one is first used.",
    act: (path, _, was) => mintAt(`${path}/reenroll`, {}, `Re-enroll ${was.name}`,
      "Run this on that host, and on no other:"),
  }),
  edit: () => act({
    title: `Edit ${host.name}`, go: "Save",
    fields: [
      {name: "name", label: "Name", maxlength: 255, required: "", value: host.name, wide: true},
      {...LABELS_FIELD, value: pairs(host.labels).join("\n")},
    ],
    act: async (path, {name, labels}, was) => {
      const before = pairs(was.labels);
      const body = {}; // what has been changed here; somebody else may have changed the rest
      if (name !== was.name) body.name = name;
      if (labels !== before.join("\n")) body.labels = readLabels(labels, before);
      return ask("PATCH", path, {body});
    },
  }),
  delete: () => act({
    title: `Delete ${host.name}?`, go: "Delete for good", danger: true,
    text: "Its record goes, and its id never returns: to come back it must enroll anew. To shut " +
      "it out for a while, revoke it.",
    fields: [{name: "name", label: `To go on, type its name: ${host.name}`, required: "",
      spellcheck: "false", autocapitalize: "off", wide: true}],
    act: async (path, typed, was) => {
      if (typed.name !== was.name) throw new Error("That is not its name. Nothing was deleted.");
      await ask("DELETE", path);
      if (was.id === $("host").dataset.id) $("host").close();
    },
  }),
};

function revokeToken(id) {
  fill({
    title: "Revoke this token?", go: "Revoke", danger: true,
    text: `Nobody can use ${id} any longer. Hosts that came in by it stay.`,
    act: async () => {
      await ask("DELETE", `api/hosts/tokens/${id}`);
      lists.tokens.poll.go();
      announce(`Revoked: token ${id}.`);
    },
  });
}

// Who is signed in.

let me = null;
const isAdmin = () => me?.role === "admin";

async function identify() {
  me = await ask("GET", "api/me");
  for (const place of all("[data-admin]")) place.hidden = !isAdmin();
  $("who").textContent = `${me.role}, ${me.organizationId ?? "all organizations"}`;
  $("sign-in").hidden = true;
  $("signed-in").hidden = false;
  route();
}

async function signIn(event) {
  event.preventDefault();
  const key = $("key").value.trim();
  $("sign-in-problem").textContent = "";
  if (!/^hak_[!-~]+$/.test(key)) {
    $("sign-in-problem").textContent = "That is no API key: they begin with hak_.";
    return;
  }
  sessionStorage.setItem(KEY, key);
  try {
    await identify();
    $("key").value = "";
  } catch (error) {
    sessionStorage.removeItem(KEY);
    $("sign-in-problem").textContent = error instanceof Silence ? "No answer from the server."
      : error.status === 401 ? "The server does not take this API key: mistyped, or revoked."
        : error.message;
  }
}

/** Forget the key and, by a new start, all that has been shown by it. */
function signOut(problem = "") {
  sessionStorage.removeItem(KEY);
  history.replaceState({problem}, "");
  location.reload();
}

function start() {
  listen();
  setInterval(tick, 1000);
  if (sessionStorage.getItem(KEY)) return polls.me.go();
  $("sign-in").hidden = false;
  $("sign-in-problem").textContent = history.state?.problem ?? "";
  history.replaceState(null, "");
  return $("key").focus();
}

// Where one is, and what comes next.

function route() {
  if (!me) return;
  const {view, asked} = here();
  const id = asked.get("host");
  asked.delete("host");
  for (const name of Object.keys(lists)) $(name).hidden = name !== view;
  for (const link of all("nav a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  for (const field of all("[data-filters] [name]", $(view))) {
    if (field !== document.activeElement) field.value = asked.get(field.name) ?? "";
  }
  fleet.show();
  lists[view].ask(asked.toString());
  if (id) openHost(id);
  else if ($("host").open) $("host").close();
}

/** Go somewhere; in place of where one is, if it is but a letter more of a search. */
function go(view, asked, isSame = false) {
  for (const [name, value] of [...asked]) if (!value) asked.delete(name);
  if (!isSame) {
    location.hash = there(view, asked);
    return;
  }
  history.replaceState(null, "", there(view, asked));
  route();
}

/** Ask for what the filters of a view say, and for more, unless somebody has gone to another view
    meanwhile. A secret in the wrong place is not sent anywhere. */
function filter(form, more) {
  const {view, asked} = here();
  if (!$(view).contains(form)) return undefined;
  for (const field of all("[name]", form)) {
    const isSecret = /(het|hak)_\w/.test(field.value);
    field.setCustomValidity(isSecret ? "That is a secret. It is not searched for." : "");
    if (isSecret) return field.reportValidity();
    asked.set(field.name, field.value);
  }
  for (const [name, value] of Object.entries(more ?? {})) asked.set(name, value);
  return go(view, asked, !more);
}

const polls = {
  fleet: new Poll(10000, () => fleet.count()),
  host: new Poll(5000, loadHost),
  happened: new Poll(30000, loadEvents),
  watch: new Poll(3000, watch),
  me: new Poll(3000, identify),
};

function tick() {
  if (document.hidden || !sessionStorage.getItem(KEY)) return;
  if (!me) return polls.me.tick();
  const list = lists[here().view];
  polls.fleet.tick();
  list.poll.tick();
  if ($("host").open) for (const poll of [polls.host, polls.happened]) poll.tick();
  if ($("secret").open) polls.watch.tick();
  for (const time of all("time")) {
    const text = ago(time.dateTime);
    if (time.textContent !== text) time.textContent = text;
  }
  $("age").textContent = list.at ? `updated ${span(Math.max(0, now() - list.at))} ago` : "";
}

/** Somebody looks again: everything may be old. */
function wake() {
  for (const poll of [...Object.values(polls), ...Object.values(lists).map((l) => l.poll)]) {
    poll.due = 0;
  }
  tick();
}

/** Leave what is typed alone for a moment. */
function debounced(run) {
  let timer = 0;
  return (argument) => {
    clearTimeout(timer);
    timer = setTimeout(run, 250, argument);
  };
}

function listen() {
  const soon = debounced(filter);
  $("sign-in").addEventListener("submit", signIn);
  $("sign-out").addEventListener("click", () => signOut());
  addEventListener("hashchange", route);
  document.addEventListener("visibilitychange", wake);
  addEventListener("online", wake);
  for (const form of all("[data-filters]")) {
    for (const kind of ["input", "change"]) form.addEventListener(kind, () => soon(form));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      filter(form);
    });
  }
  for (const word of ["", ...STATUSES]) {
    const tile = make("button", {type: "button", "data-status": word});
    tile.addEventListener("click", () => {
      const isOn = here().asked.get("status") === word;
      filter($("hosts").querySelector("form"), {status: isOn ? "" : word});
    });
    $("fleet").append(tile);
  }
  for (const name of Object.keys(ACTS)) $(name).addEventListener("click", ACTS[name]);
  for (const button of all("[data-mint]")) button.addEventListener("click", mint);
  for (const button of all("[data-copy]")) {
    button.addEventListener("click", () => copy($(button.dataset.copy)));
  }
  for (const button of all("[data-close]")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
  $("tokens").addEventListener("click", (event) => {
    const button = event.target.closest("[data-revoke-token]");
    if (button) revokeToken(button.dataset.revokeToken);
  });
  $("host").addEventListener("click", (event) => {
    if (event.target === $("host")) $("host").close();
  });
  $("host").addEventListener("close", () => {
    const {view, asked} = here();
    if (!asked.has("host")) return;
    asked.delete("host");
    go(view, asked, true);
  });
  $("secret").addEventListener("close", () => {
    for (const name of ["join", "token", "arrivals", "copied"]) $(name).replaceChildren();
    $("secret").querySelector("details").open = false;
  });
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    document.querySelector("main:not([hidden])").focus();
  });
  document.addEventListener("keydown", (event) => {
    const isTyping = event.target.closest("input, textarea, select, dialog");
    if (event.key !== "/" || isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    $(here().view).querySelector("input[type=search]")?.focus();
  });
}

start();
"""


def page() -> str:
    """The document at /."""
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>hostenroll</title>
<style>{PAGE_STYLE}</style>
</head>
<body>
{PAGE_MARKUP}
<script type="module">{PAGE_SCRIPT}</script>
</body>
</html>
"""


# 9. Api
#
# Routes, and the documents that they answer with. One table says what there is, who may call it
# and what it takes. A request is admitted first, which writes nothing; what comes of that is an
# answer, or a heartbeat or an act for the next tick.

HOSTNAME = Text(
    253, 1, r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_.])?", "letters, digits, dots, - and _"
)
NAME = Text(255, 1)
FACT = Text(128)
SLUG = Text(64, 1, r"[A-Za-z0-9][A-Za-z0-9_-]*", "letters, digits, - and _")
ID_TEXT = Text(16, 16, ID.pattern, "16 hexadecimal digits")
CURSOR = Text(16, 16, ID.pattern, "a nextCursor")
SECRET_TEXT = Text(256, 1)
LABELS = Labels()
DESCRIPTION = Text(1000)
IDEMPOTENCY_KEY = Text(128, 1, "[!-~]+", "visible ASCII characters")

# What only answers have.
TIME = Moment()
MAYBE_TIME = Nullable(TIME)
ACTOR = Text(255, 1)  # somebody or something by name, as in host:<id>
ADDRESS = Text(255, 1)
SENTENCE = Text(1000, 1)
CREDENTIAL = Text(CREDENTIAL_MAXIMUM, 1, r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+", "a JWT")
BEAT_RANGE = (1, HEARTBEAT_INTERVAL_RANGE[1] * (100 + HEARTBEAT_SPREAD) // 100)
ANYTHING = Shape(open=True)

FACTS = (
    Field("os", FACT),
    Field("architecture", FACT),
    Field("dockerVersion", FACT),
)
ENROLL_BODY = Shape(
    Field("token", SECRET_TEXT, required=True),
    Field("hostname", HOSTNAME, required=True),
    Field("name", NAME),
    *FACTS,
    open=True,
)
ENROLL_HEADERS = Shape(Field("Idempotency-Key", IDEMPOTENCY_KEY))
HEARTBEAT_BODY = Shape(Field("hostname", HOSTNAME), *FACTS, open=True)
MINT_BODY = Shape(
    Field("ttlSeconds", Whole(TOKEN_TTL_RANGE, "seconds")),
    Field("maxUses", Whole(TOKEN_USES_RANGE)),
    Field("description", DESCRIPTION),
    Field("hostname", HOSTNAME),
    Field("labels", LABELS),
    Field("organizationId", SLUG),
)
REENROLL_BODY = Shape(
    Field("ttlSeconds", Whole(TOKEN_TTL_RANGE, "seconds")), Field("description", DESCRIPTION)
)
EDIT_BODY = Shape(Field("name", NAME), Field("labels", LABELS))
PAGE_FIELDS = (Field("limit", Whole((1, PAGE_MAXIMUM))), Field("cursor", CURSOR))
TOKENS_QUERY = Shape(Field("state", Choice(*TOKEN_STATES)), *PAGE_FIELDS)
HOSTS_QUERY = Shape(
    Field("status", Choice(*STATUSES)),
    Field("organization", SLUG),
    Field("label", LABELS, repeats=True),
    Field("q", Text(255)),
    *PAGE_FIELDS,
)
AUDIT_QUERY = Shape(
    Field("organization", SLUG),
    Field("action", Choice(*ACTIONS)),
    Field("subject", Text(128)),
    Field("code", Text(64)),
    *PAGE_FIELDS,
)
API_KEY_BODY = Shape(Field("description", DESCRIPTION))
ORGANIZATION_BODY = Shape(Field("name", SLUG, required=True))
NOTHING = Shape()
ID_PATH = Shape(*members(id=ID_TEXT))

Document = Dict[str, Any]


def _when(milliseconds: Optional[int]) -> Optional[str]:
    return rfc3339(milliseconds) if milliseconds else None


def _labels(text: str) -> Document:
    return {} if text == "{}" else cast(Document, json.loads(text))  # most have none


TOKEN_MEMBERS = members(
    id=ID_TEXT,
    organizationId=SLUG,
    state=Choice(*TOKEN_STATES),
    description=DESCRIPTION,
    hostname=Nullable(HOSTNAME),
    hostId=Nullable(ID_TEXT),
    labels=LABELS,
    maxUses=Whole(TOKEN_USES_RANGE),
    uses=Whole((0, TOKEN_USES_RANGE[1])),
    createdAt=TIME,
    createdBy=ACTOR,
    expiresAt=TIME,
    usedAt=MAYBE_TIME,
    usedFrom=Nullable(ADDRESS),
    revokedAt=MAYBE_TIME,
    hosts=ListOf(ID_TEXT, TOKEN_HOSTS_SHOWN),
)
TOKEN_DOCUMENT = Shape(*TOKEN_MEMBERS, name="Token")
MINTED_TOKEN_DOCUMENT = Shape(*TOKEN_MEMBERS, *members(token=SECRET_TEXT), name="MintedToken")


def token_document(view: TokenView, text: Optional[str] = None) -> Document:
    """Token; with its text only in the answer that mints it."""
    token = view.token
    document = {
        "id": id_text(token.id),
        "organizationId": token.organization_id,
        "state": view.state,
        "description": token.description,
        "hostname": token.hostname,
        "hostId": None if token.host_id is None else id_text(token.host_id),
        "labels": _labels(token.labels),
        "maxUses": token.max_uses,
        "uses": token.uses,
        "createdAt": rfc3339(token.created_at),
        "createdBy": token.created_by,
        "expiresAt": rfc3339(token.expires_at),
        "usedAt": _when(token.used_at),
        "usedFrom": token.used_from,
        "revokedAt": _when(token.revoked_at),
        "hosts": [id_text(host) for host in view.hosts],
    }
    return document if text is None else {**document, "token": text}


HOST_DOCUMENT = Shape(
    *members(
        id=ID_TEXT,
        organizationId=SLUG,
        name=NAME,
        hostname=HOSTNAME,
        os=FACT,
        architecture=FACT,
        dockerVersion=FACT,
        labels=LABELS,
        status=Choice(*STATUSES),
        statusReason=SENTENCE,
        enrolledAt=TIME,
        lastSeen=MAYBE_TIME,
        tokenId=ID_TEXT,
        revokedAt=MAYBE_TIME,
        warnings=ListOf(SENTENCE, 10),
    ),
    name="Host",
)


def _time(milliseconds: Optional[int]) -> str:
    return f'"{rfc3339(milliseconds)}"' if milliseconds else "null"


def host_json(view: HostView) -> str:
    """Host, in JSON. A list has a thousand, and to make a document first takes twice as long."""
    host, status, reason, warnings = view
    text = encode_basestring_ascii
    # Twelve names of a NamedTuple take as long as a third of what is done with them.
    (number, organization, name, hostname, os_name, architecture, docker_version, labels,
     enrolled_at, revoked_at, token, _, last_seen) = host  # fmt: skip
    return (
        f'{{"id":"{number:016x}","organizationId":{text(organization)},'
        f'"name":{text(name)},"hostname":{text(hostname)},"os":{text(os_name)},'
        f'"architecture":{text(architecture)},"dockerVersion":{text(docker_version)},'
        f'"labels":{compact(labels)},"status":"{status}","statusReason":"{reason}",'
        f'"enrolledAt":"{rfc3339(enrolled_at)}","lastSeen":{_time(last_seen)},'
        f'"tokenId":"{token:016x}","revokedAt":{_time(revoked_at)},'
        f'"warnings":{json_text(warnings) if warnings else "[]"}}}'
    )


def host_document(view: HostView) -> Document:
    """Host."""
    return cast(Document, json.loads(host_json(view)))


EVENT_DOCUMENT = Shape(
    *members(
        number=Whole((1, LAST_ID)),
        time=TIME,
        action=Choice(*ACTIONS),
        actor=ACTOR,
        address=Nullable(ADDRESS),
        organizationId=Nullable(SLUG),
        subject=Nullable(ACTOR),
        code=Nullable(Choice(*(problem.code for problem in problems()))),
        detail=ObjectOf(ANYTHING),
    ),
    name="Event",
)


def event_document(event: Event) -> Document:
    """Event."""
    return {
        "number": event.number,
        "time": rfc3339(event.at),
        "action": event.action,
        "actor": event.actor,
        "address": event.address or None,
        "organizationId": event.organization_id,
        "subject": event.subject or None,
        "code": event.code,
        "detail": json.loads(event.detail),
    }


def token_order(values: Mapping[str, Any]) -> TokenOrder:
    """The order that MINT_BODY or REENROLL_BODY describes."""
    return TokenOrder(
        organization=values.get("organizationId"),
        ttl=values.get("ttlSeconds", TOKEN_TTL),
        max_uses=values.get("maxUses", 1),
        description=values.get("description", ""),
        hostname=values.get("hostname"),
        labels=values.get("labels", {}),
    )


def _paging(values: Mapping[str, Any]) -> Dict[str, Any]:
    paging = {"limit": values.get("limit", PAGE_DEFAULT)}
    if "cursor" in values:
        paging["before"] = int(values["cursor"], 16)
    return paging


def host_query(values: Mapping[str, Any]) -> HostQuery:
    """The query that HOSTS_QUERY describes."""
    return HostQuery(
        organization=values.get("organization"),
        status=values.get("status"),
        labels=values.get("label", ()),
        text=values.get("q", ""),
        **_paging(values),
    )


def token_query(values: Mapping[str, Any]) -> TokenQuery:
    """The query that TOKENS_QUERY describes."""
    return TokenQuery(state=values.get("state"), **_paging(values))


def event_query(values: Mapping[str, Any]) -> EventQuery:
    """The query that AUDIT_QUERY describes."""
    return EventQuery(
        organization=values.get("organization"),
        action=values.get("action"),
        subject=values.get("subject"),
        code=values.get("code"),
        **_paging(values),
    )


class Part:
    """What there is of a page of a list: it comes together in slices, one in a tick."""

    def __init__(self) -> None:
        self.text: List[bytes] = []  # the items in JSON, those of a slice in one
        self.items = self.slices = self.size = 0
        self.next: Optional[int] = None


class Listing(NamedTuple):
    """A list: what it is called, how a slice of it is had, and how that is written."""

    name: str
    query: Callable[[Mapping[str, Any]], Any]
    turn: Callable[[Registry, Principal, Any, int], Page]
    write: Callable[[Sequence[Any]], bytes]

    def go_on(self, registry: Registry, call: Call) -> Any:
        """One slice more: the whole page, or UNFINISHED."""
        query, part = self.query(call.values), call.part
        left = query.limit - part.items
        before = query.before if part.next is None else part.next
        page = self.turn(registry, call.by, query._replace(before=before, limit=left), call.now)
        if page.items:
            part.text.append(self.write(page.items))
            part.size += len(part.text[-1])
        part.items += len(page.items)
        part.slices += 1
        part.next = page.next
        is_full = (
            part.items == query.limit
            or part.slices * SLICE >= ROWS_EXAMINED
            or part.size >= PAGE_BYTES
        )
        if page.next is not None and not is_full:
            return UNFINISHED
        cursor = write_json(None if page.next is None else id_text(page.next))
        text = part.text or [b""]
        text[0] = b'{"%b":[%b' % (self.name.encode("ascii"), text[0])
        text[-1] += b'],"nextCursor":%b}' % cursor
        return Response(200, b",".join(text))


def _documents(document: Callable[[Any], Document], items: Sequence[Any]) -> bytes:
    return write_json([document(item) for item in items])[1:-1]


def _hosts(views: Sequence[HostView]) -> bytes:
    return ",".join(map(host_json, views)).encode("ascii")


def _list_document(name: str, of: Shape) -> Shape:
    """What Listing answers with."""
    items = ListOf(ObjectOf(of), PAGE_MAXIMUM)
    return Shape(*members(**{name: items}, nextCursor=Nullable(CURSOR)), name=f"{of.name}List")


TOKENS_DOCUMENT = _list_document("tokens", TOKEN_DOCUMENT)
HOSTS_DOCUMENT = _list_document("hosts", HOST_DOCUMENT)
EVENTS_DOCUMENT = _list_document("events", EVENT_DOCUMENT)


class Call(NamedTuple):
    """A request to the user API, after everything about it has been checked but its object."""

    by: Principal
    id: int  # of the path
    values: Mapping[str, Any]  # of the body, or of the query of a GET
    now: int
    part: Part


def _post_token(registry: Registry, call: Call) -> Response:
    view, text = registry.mint(call.by, token_order(call.values), call.now)
    return json_response(201, token_document(view, text))


def _get_token(registry: Registry, call: Call) -> Response:
    return json_response(200, token_document(registry.token(call.by, call.id, call.now)))


def _delete_token(registry: Registry, call: Call) -> Response:
    registry.revoke_token(call.by, call.id, call.now)
    return Response(204)


def _host_response(view: HostView) -> Response:
    return Response(200, _hosts([view]))


def _get_host(registry: Registry, call: Call) -> Response:
    return _host_response(registry.host(call.by, call.id, call.now))


def _patch_host(registry: Registry, call: Call) -> Response:
    return _host_response(registry.edit_host(call.by, call.id, call.values, call.now))


def _delete_host(registry: Registry, call: Call) -> Response:
    registry.delete_host(call.by, call.id, call.now)
    return Response(204)


def _post_revoke(registry: Registry, call: Call) -> Response:
    return _host_response(registry.revoke_host(call.by, call.id, call.now))


def _post_restore(registry: Registry, call: Call) -> Response:
    return _host_response(registry.restore_host(call.by, call.id, call.now))


def _post_reenroll(registry: Registry, call: Call) -> Response:
    view, text = registry.reenroll(call.by, call.id, token_order(call.values), call.now)
    return json_response(201, token_document(view, text))


ME_DOCUMENT = Shape(
    *members(id=ID_TEXT, role=Choice("admin", "viewer"), organizationId=Nullable(SLUG)), name="Me"
)


def _get_me(registry: Registry, call: Call) -> Response:
    by = call.by
    return json_response(200, {"id": by.id, "role": by.role, "organizationId": by.organization})


TOKENS = Listing("tokens", token_query, Registry.tokens, partial(_documents, token_document))
HOSTS = Listing("hosts", host_query, Registry.hosts, _hosts)
EVENTS = Listing("events", event_query, Registry.events, partial(_documents, event_document))


def service_place(service: Optional[Service]) -> Tuple[str, str]:
    """The URL at which hosts find the servers, and the pin: before one ran, those of the first."""
    if service is None:
        return f"http://{DEFAULT_HOST}:{DEFAULT_PORT}", ""
    return service.public_url, service.pin


SERVICE_DOCUMENT = Shape(
    *members(
        version=Text(64, 1),
        publicUrl=Text(2048, 1),
        pin=Nullable(Text(64, 1)),
        heartbeatIntervalSeconds=Whole(HEARTBEAT_INTERVAL_RANGE, "seconds"),
        joinCommand=Text(8192, 1),  # with TOKEN in the place of the token
    ),
    name="Service",
)


def _get_service(registry: Registry, call: Call) -> Response:
    service = registry.service()
    url, pin = service_place(service)
    document = {
        "version": __version__,
        "publicUrl": url,
        "pin": pin or None,
        "heartbeatIntervalSeconds": service.interval if service else HEARTBEAT_INTERVAL,
        "joinCommand": re.sub(r"\s*\n\s*", " ", join_command(url, pin, "TOKEN")),
    }
    return json_response(200, document)


class Exposition:
    """Metrics in Prometheus' text format, version 0.0.4."""

    CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self._lines: List[str] = []

    def head(self, name: str, kind: str, help: str) -> None:
        """Begin a family."""
        self._lines += [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]

    def sample(self, name: str, value: float, **labels: str) -> None:
        """One sample of the family that was begun last."""
        said = ",".join(f'{label}="{self._escape(text)}"' for label, text in labels.items())
        shown = f"{name}{{{said}}}" if said else name
        self._lines.append(f"{shown} {value!r}")

    def family(self, name: str, kind: str, help: str, value: float, **labels: str) -> None:
        """A family of one sample."""
        self.head(name, kind, help)
        self.sample(name, value, **labels)

    def histogram(self, name: str, help: str, histogram: Histogram) -> None:
        """A histogram: its buckets are cumulative, and the last has everything."""
        self.head(name, "histogram", help)
        below = 0
        for bound, count in zip((*histogram.bounds, math.inf), histogram.counts):
            below += count
            self.sample(f"{name}_bucket", below, le="+Inf" if bound == math.inf else f"{bound:g}")
        self.sample(f"{name}_sum", histogram.sum)
        self.sample(f"{name}_count", below)

    @staticmethod
    def _escape(text: str) -> str:
        return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    def response(self) -> Response:
        """All of it."""
        body = "".join(f"{line}\n" for line in self._lines).encode("utf-8")
        return Response(200, body, self.CONTENT_TYPE)


def _get_metrics(registry: Registry, call: Call) -> Any:
    """The fleet, to whoever may see it; what the process has counted, to keys for all."""
    census = registry.census(call.by, call.now)
    if census is None:
        return UNFINISHED
    text = Exposition()
    text.head("hostenroll_hosts", "gauge", "Hosts by organization and status.")
    organizations = registry.visible_organizations(call.by)
    for organization, status in product(organizations, STATUSES):
        count = census.counts[organization, status]
        text.sample("hostenroll_hosts", count, organization=organization, status=status)
    if call.by.organization is None:
        _expose_process(text, registry)
    return text.response()


COUNTERS = {  # counts of Metrics
    "heartbeats": "Heartbeats that counted.",
    "enrollments": "Hosts enrolled or re-enrolled.",
    "renewals": "Credentials renewed.",
    "connections": "Connections accepted.",
}
HISTOGRAMS = {  # of Metrics: what each is called, and what it measures
    "requests": ("request_duration_seconds", "From the turn that takes a request to its answer."),
    "commits": ("commit_duration_seconds", "To commit a tick that writes."),
    "lock_waits": ("lock_wait_seconds", "For another writer, where there was one."),
    "ticks": ("tick_requests", "Requests in a tick that writes."),
}


def _expose_process(text: Exposition, registry: Registry) -> None:
    metrics = registry.metrics
    for name, help in COUNTERS.items():
        text.family(f"hostenroll_{name}_total", "counter", help, metrics.counts[name])
    text.head("hostenroll_refusals_total", "counter", "Refusals by code.")
    for problem in problems():
        refused = metrics.refusals[problem.code]
        text.sample("hostenroll_refusals_total", refused, code=problem.code)
    for name, (shown, help) in HISTOGRAMS.items():
        text.histogram(f"hostenroll_{shown}", help, getattr(metrics, name))
    open_now = metrics.open_connections
    text.family("hostenroll_open_connections", "gauge", "Connections now.", open_now)
    _expose_state(text, registry)


def _expose_state(text: Exposition, registry: Registry) -> None:
    text.head("hostenroll_database_bytes", "gauge", "Size of the database's files.")
    for file, size in zip(("database", "wal"), registry.storage_bytes()):
        text.sample("hostenroll_database_bytes", size, file=file)
    is_good = int(not registry.key_trouble)
    text.family("hostenroll_keys_ok", "gauge", "1 while the key file is as it should be.", is_good)
    python = ".".join(map(str, sys.version_info[:3]))
    versions = {"version": __version__, "python": python, "sqlite": registry.sqlite_version}
    text.family("hostenroll_build_info", "gauge", "What runs.", 1, **versions)
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime
    text.family("process_cpu_seconds_total", "counter", "CPU time of the process.", cpu)


Pending = Work  # a request that waits for the tick
Admitted = Union[Response, Pending]


def origin_of(request: Request) -> Origin:
    """Where a request came from."""
    return Origin(request.address, request.id)


def _admit_user(
    registry: Registry, request: Request, route: Route, identifier: str, now: int
) -> Admitted:
    """The order of refusals: 401, the role, query and body; then the handler, 404 and the rest."""
    api_key, query = request.authorization, request.head.query
    body = b"" if route.body is None else request.body  # what is not read is not kept
    what = f"{route.method} {printable_path(request.head.path)}"
    if not api_key:
        raise ApiKeyMissing().concerning("anonymous", "", None, request=what)
    registry.screen(lambda: registry.identify(api_key, what, request.address, now))
    part = Part()

    def run(now: int) -> Any:
        by = registry.identify(api_key, what, request.address, now)
        if route.caller == "admin" and by.role != "admin":
            raise Forbidden().concerning(by.name, by.name, by.organization, request=what)
        values = route.query.read(read_query(query))
        if route.body is not None:
            values = route.body.check(read_json(body or b"{}"))
        return route.handle(registry, Call(by, read_id(identifier), values, now, part))

    return Act(run, writes=route.method != "GET", origin=origin_of(request))


def _read_idempotency_key(key: Optional[str]) -> Optional[str]:
    try:
        return None if key is None else IDEMPOTENCY_KEY.check(key)
    except ValueError as error:
        raise MalformedRequest(f"Idempotency-Key {error}.") from None


def _admit_enrollment(
    registry: Registry, request: Request, route: Route, identifier: str, now: int
) -> Admitted:
    key = _read_idempotency_key(request.head.idempotency_key)
    facts = ENROLL_BODY.check(read_json(request.body))
    applicant = Applicant(
        token=facts["token"],
        hostname=facts["hostname"],
        name=facts.get("name"),
        os=facts.get("os", ""),
        architecture=facts.get("architecture", ""),
        docker_version=facts.get("dockerVersion", ""),
        idempotency_key=key,
        address=request.address,
    )
    registry.screen(lambda: registry.prove_token(applicant, now))
    return Act(
        lambda now: _enrollment_response(registry, registry.enroll(applicant, now)),
        origin=origin_of(request),
    )


GRANT_KINDS: Mapping[str, Kind] = {
    "credential": CREDENTIAL,
    "credentialExpiresAt": MAYBE_TIME,
}
ENROLLMENT_DOCUMENT = Shape(
    *members(
        hostId=ID_TEXT,
        organizationId=SLUG,
        name=NAME,
        **GRANT_KINDS,
        heartbeatIntervalSeconds=Whole(HEARTBEAT_INTERVAL_RANGE),
    ),
    name="Enrollment",
)


def _enrollment_response(registry: Registry, enrollment: Enrollment) -> Response:
    host, grant = enrollment
    document = {
        "hostId": id_text(host.id),
        "organizationId": host.organization_id,
        "name": host.name,
        **_grant_document(grant),
        "heartbeatIntervalSeconds": registry.interval,
    }
    return json_response(201, document)


def _grant_document(grant: Grant) -> Document:
    expires_at = None if grant.expires_at is None else rfc3339(grant.expires_at * SECOND_MS)
    return {"credential": grant.credential, "credentialExpiresAt": expires_at}


def _admit_heartbeat(
    registry: Registry, request: Request, route: Route, identifier: str, now: int
) -> Admitted:
    """A plain heartbeat, with nothing to tell and nothing to renew, goes with the others of its
    tick in one statement; any other is an act."""
    if not request.authorization:
        raise CredentialMissing()
    claims = registry.authenticate(request.authorization, now)
    body = request.body
    if (not body or body == b"{}") and not registry.is_due(claims, now):
        return plain_beat(claims)

    def run(now: int) -> Response:
        beaten = registry.beat(claims, lambda: _read_facts(body or b"{}"), now)
        return _beaten_response(registry, claims.host, beaten)

    return Act(run, origin=origin_of(request))


def _read_facts(body: bytes) -> Dict[str, Any]:
    facts = HEARTBEAT_BODY.check(read_json(body))
    if "dockerVersion" in facts:
        facts["docker_version"] = facts.pop("dockerVersion")
    return facts


BEATEN_DOCUMENT = Shape(
    *members(hostId=ID_TEXT, lastSeen=TIME, nextHeartbeatSeconds=Whole(BEAT_RANGE)),
    *(Field(name, kind) for name, kind in GRANT_KINDS.items()),
    name="Heartbeat",
)


def _plain_response(registry: Registry, host: int, last_seen: int) -> Response:
    return _beaten_response(registry, host, Beaten(last_seen, None))


@lru_cache(maxsize=16)
def _plain_answer(last_seen: int, digits: int, seconds: int, closes: bool) -> bytes:
    """The bytes of an answer to a plain heartbeat, but for the host and the digits of the interval:
    _plain_response(), once for all that are answered together."""
    body = b'{"hostId":"%%016x","lastSeen":"%b","nextHeartbeatSeconds":%%b}' % (
        rfc3339(last_seen).encode("ascii")
    )
    length = len(body % (0, b"0" * digits))
    return write_head(Response(200), seconds, closes, length) + body


def _beaten_response(registry: Registry, host: int, beaten: Beaten) -> Response:
    document = {
        "hostId": id_text(host),
        "lastSeen": rfc3339(beaten.last_seen),
        "nextHeartbeatSeconds": registry.next_heartbeat(),
    }
    if beaten.grant is not None:
        document.update(_grant_document(beaten.grant))
    return json_response(200, document)


HEALTH_DOCUMENT = Shape(*members(status=Choice("ok")))
READINESS_DOCUMENT = Shape(*members(status=Choice("ready")))


def _admit_health(*_: object) -> Admitted:
    return json_response(200, {"status": "ok"})


def _admit_readiness(registry: Registry, *_: object) -> Admitted:
    """Ready is who can write: so it writes. Bad keys refuse nobody yet, and a restart would."""

    def run(now: int) -> Response:
        registry.keep_alive(now)
        if registry.key_trouble:
            raise StorageUnavailable(
                "The key file is missing or bad. The keys that were loaded before are in use; the "
                "log says what is wrong."
            )
        return json_response(200, {"status": "ready"})

    return Act(run, durable=False)


def _admit_openapi(*_: object) -> Admitted:
    return Response(200, _openapi_json())


SHELL_SCRIPT = "text/x-shellscript; charset=utf-8"


def _admit_agent_script(*_: object) -> Admitted:
    return Response(200, AGENT_SCRIPT.encode("utf-8"), SHELL_SCRIPT)


HTML = "text/html; charset=utf-8"


def _source(text: str) -> str:
    """What a content security policy calls a text that stands in the document."""
    return f"'sha256-{base64.b64encode(fingerprint(text)).decode('ascii')}'"


@lru_cache(maxsize=1)
def _page() -> Response:
    """The page. Whatever a name could put into it, a browser would run, load and send nothing of
    it; and no other site can show it in a frame."""
    policy = {
        "default-src": "'none'",
        "script-src": _source(PAGE_SCRIPT),
        "style-src": _source(PAGE_STYLE),
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    headers = (
        ("Content-Security-Policy", "; ".join(map(" ".join, policy.items()))),
        ("Referrer-Policy", "no-referrer"),
    )
    return Response(200, page().encode("utf-8"), HTML, headers)


def _admit_page(*_: object) -> Admitted:
    return _page()


def _unhandled(registry: Registry, call: Call) -> Response:
    raise NotImplementedError  # a route that is not the user API's has no handler


class Caller(NamedTuple):
    """Who may call a route: how that is shown, and what it is refused for."""

    tag: str
    scheme: Optional[str]  # of SECURITY_SCHEMES
    problems: Tuple[Type[Problem], ...]


AGENT_PROBLEMS = (HostRevoked, HostUnknown, StorageUnavailable)
TOKEN_PROBLEMS = (
    TokenUnknown,
    TokenExpired,
    TokenRevoked,
    TokenUsed,
    TokenHostMismatch,
    TooManyRequests,
)
CREDENTIAL_PROBLEMS = (
    CredentialMissing,
    CredentialInvalid,
    CredentialExpired,
    CredentialSuperseded,
)
USER_PROBLEMS = (ApiKeyInvalid, InvalidQuery, TooManyRequests, StorageUnavailable)
CALLERS = {
    "open": Caller("open", None, ()),
    "token": Caller("agent", None, (*TOKEN_PROBLEMS, *AGENT_PROBLEMS)),
    "credential": Caller("agent", "credential", (*CREDENTIAL_PROBLEMS, *AGENT_PROBLEMS)),
    "viewer": Caller("user", "apiKey", USER_PROBLEMS),
    "admin": Caller("user", "apiKey", (*USER_PROBLEMS, Forbidden)),
}


class Route(NamedTuple):
    """One method of one path: who may call it, what it takes, what is done, and what comes of
    it."""

    name: str  # as a command's, where one does the same
    method: str
    path: str
    caller: str  # of CALLERS: viewer is any API key
    summary: str
    admit: Callable[[Registry, Request, Route, str, int], Admitted] = _admit_user
    handle: Callable[[Registry, Call], Any] = _unhandled  # a Response, or UNFINISHED
    body: Optional[Shape] = None
    query: Shape = NOTHING
    headers: Shape = NOTHING
    status: int = 200
    answer: Optional[Shape] = None  # None: text, or nothing where the status says so
    content_type: str = JSON
    raises: Tuple[Type[Problem], ...] = ()  # beside what problems() knows

    def problems(self) -> List[Type[Problem]]:
        """What it can be refused for, in the order of status and code."""
        raised = {Problem, *CALLERS[self.caller].problems, *self.raises}
        if "{id}" in self.path:
            raised.add(NotFound)
        if self.body is not None:
            raised.add(InvalidBody)
        return [kind for kind in problems() if kind in raised or issubclass(kind, Unframed)]


ROUTES = (
    Route(
        "enroll",
        "POST",
        "/api/agent/enroll",
        "token",
        "Exchange a token for a host",
        _admit_enrollment,
        body=ENROLL_BODY,
        headers=ENROLL_HEADERS,
        status=201,
        answer=ENROLLMENT_DOCUMENT,
    ),
    Route(
        "beat",
        "POST",
        "/api/agent/heartbeat",
        "credential",
        "Say that a host lives",
        _admit_heartbeat,
        body=HEARTBEAT_BODY,
        answer=BEATEN_DOCUMENT,
    ),
    Route(
        "mint-token",
        "POST",
        "/api/hosts/tokens",
        "admin",
        "Mint a token",
        handle=_post_token,
        body=MINT_BODY,
        status=201,
        answer=MINTED_TOKEN_DOCUMENT,
        raises=(NotFound,),
    ),
    Route(
        "list-tokens",
        "GET",
        "/api/hosts/tokens",
        "viewer",
        "List tokens",
        handle=TOKENS.go_on,
        query=TOKENS_QUERY,
        answer=TOKENS_DOCUMENT,
    ),
    Route(
        "show-token",
        "GET",
        "/api/hosts/tokens/{id}",
        "viewer",
        "Show a token",
        handle=_get_token,
        answer=TOKEN_DOCUMENT,
    ),
    Route(
        "revoke-token",
        "DELETE",
        "/api/hosts/tokens/{id}",
        "admin",
        "Revoke a token",
        handle=_delete_token,
        status=204,
    ),
    Route(
        "list-hosts",
        "GET",
        "/api/hosts",
        "viewer",
        "List hosts",
        handle=HOSTS.go_on,
        query=HOSTS_QUERY,
        answer=HOSTS_DOCUMENT,
        raises=(NotFound,),
    ),
    Route(
        "show-host",
        "GET",
        "/api/hosts/{id}",
        "viewer",
        "Show a host",
        handle=_get_host,
        answer=HOST_DOCUMENT,
    ),
    Route(
        "edit-host",
        "PATCH",
        "/api/hosts/{id}",
        "admin",
        "Name or label a host",
        handle=_patch_host,
        body=EDIT_BODY,
        answer=HOST_DOCUMENT,
    ),
    Route(
        "delete-host",
        "DELETE",
        "/api/hosts/{id}",
        "admin",
        "Delete a host",
        handle=_delete_host,
        status=204,
    ),
    Route(
        "revoke-host",
        "POST",
        "/api/hosts/{id}/revoke",
        "admin",
        "Shut a host out",
        handle=_post_revoke,
        body=NOTHING,
        answer=HOST_DOCUMENT,
    ),
    Route(
        "restore-host",
        "POST",
        "/api/hosts/{id}/restore",
        "admin",
        "Let it in again",
        handle=_post_restore,
        body=NOTHING,
        answer=HOST_DOCUMENT,
    ),
    Route(
        "reenroll-host",
        "POST",
        "/api/hosts/{id}/reenroll",
        "admin",
        "Mint a token for a host that exists",
        handle=_post_reenroll,
        body=REENROLL_BODY,
        status=201,
        answer=MINTED_TOKEN_DOCUMENT,
    ),
    Route(
        "show-audit",
        "GET",
        "/api/audit",
        "viewer",
        "List what happened",
        handle=EVENTS.go_on,
        query=AUDIT_QUERY,
        answer=EVENTS_DOCUMENT,
        raises=(NotFound,),
    ),
    Route(
        "show-me",
        "GET",
        "/api/me",
        "viewer",
        "Show whose the API key is",
        handle=_get_me,
        answer=ME_DOCUMENT,
    ),
    Route(
        "show-service",
        "GET",
        "/api/service",
        "viewer",
        "Show how hosts find the server",
        handle=_get_service,
        answer=SERVICE_DOCUMENT,
    ),
    Route(
        "metrics",
        "GET",
        "/metrics",
        "viewer",
        "Count, for Prometheus",
        handle=_get_metrics,
        content_type=Exposition.CONTENT_TYPE,
    ),
    Route(
        "health",
        "GET",
        "/healthz",
        "open",
        "Whether the server answers",
        _admit_health,
        answer=HEALTH_DOCUMENT,
    ),
    Route(
        "readiness",
        "GET",
        "/readyz",
        "open",
        "Whether it can do its work",
        _admit_readiness,
        answer=READINESS_DOCUMENT,
        raises=(StorageUnavailable,),
    ),
    Route(
        "openapi",
        "GET",
        "/openapi.json",
        "open",
        "Describe this API in OpenAPI 3.1",
        _admit_openapi,
        answer=ANYTHING,
    ),
    Route(
        "agent-script",
        "GET",
        "/agent.sh",
        "open",
        "The agent, for a host with sh and curl",
        _admit_agent_script,
        content_type=SHELL_SCRIPT,
    ),
    Route("page", "GET", "/", "open", "Show all of this to people", _admit_page, content_type=HTML),
)

# The OpenAPI document says what ROUTES, the shapes and the problems say, and nothing else.

TAGS = {
    "agent": "What a machine calls, with a token and then with its credential.",
    "user": "What operators and their programs call, with an API key.",
    "open": "What anybody may call.",
}
SECURITY_SCHEMES = {
    "apiKey": {"type": "http", "scheme": "bearer", "bearerFormat": "hak_..."},
    "credential": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
}
NAMED_SHAPES = (
    TOKEN_DOCUMENT,
    MINTED_TOKEN_DOCUMENT,
    TOKENS_DOCUMENT,
    HOST_DOCUMENT,
    HOSTS_DOCUMENT,
    EVENT_DOCUMENT,
    EVENTS_DOCUMENT,
    ME_DOCUMENT,
    SERVICE_DOCUMENT,
    ENROLLMENT_DOCUMENT,
    BEATEN_DOCUMENT,
)
HEADERS: Mapping[str, Kind] = {
    "Retry-After": Whole((0, DAY), "seconds"),
    "WWW-Authenticate": Text(255, 1),
}
FIELD_ERROR = Shape(*members(field=Text(64), detail=SENTENCE), name="FieldError")


def problem_shape(kind: Type[Problem]) -> Shape:
    """What Problem.document() gives."""
    errors = ListOf(ObjectOf(FIELD_ERROR), ERRORS_NAMED)
    return Shape(
        *members(
            type=Choice(f"urn:hostenroll:problem:{kind.code}"),
            title=Choice(kind.title),
            status=Whole((kind.status, kind.status)),
            detail=SENTENCE,
            code=Choice(kind.code),
        ),
        *(members(errors=errors) if kind.names_errors else ()),
        name=kind.code,
    )


def _refusals(route: Route) -> Iterator[Tuple[int, str, List[Type[Problem]]]]:
    """For each status: what its response is called, and the problems that have it."""
    by_status: Dict[int, List[Type[Problem]]] = {}
    for kind in route.problems():
        by_status.setdefault(kind.status, []).append(kind)
    for status, kinds in by_status.items():
        yield status, "-or-".join(kind.code for kind in kinds), kinds


def _refusal_response(kinds: Sequence[Type[Problem]]) -> Document:
    named = {name for kind in kinds for name, _ in kind().headers()}
    headers = {n: {"required": True, "schema": HEADERS[n].schema()} for n in sorted(named)}
    schemas = [problem_shape(kind).reference() for kind in kinds]
    schema = schemas[0] if len(schemas) == 1 else {"oneOf": schemas}
    return {
        "description": "\n\n".join(f"{kind.code}: {kind.remedy}" for kind in kinds),
        **({"headers": headers} if headers else {}),
        "content": {PROBLEM_JSON: {"schema": schema}},
    }


def _success_response(route: Route) -> Document:
    response: Document = {"description": HTTPStatus(route.status).phrase}
    if route.status != HTTPStatus.NO_CONTENT:
        schema = {"type": "string"} if route.answer is None else route.answer.reference()
        response["content"] = {route.content_type: {"schema": schema}}
    return response


def _operation(route: Route) -> Document:
    tag, scheme, _ = CALLERS[route.caller]
    operation: Document = {
        "operationId": route.name,
        "summary": route.summary,
        "tags": [tag],
        "security": [{scheme: []}] if scheme else [],
        "parameters": [
            *(ID_PATH.parameters("path") if "{id}" in route.path else ()),
            *route.query.parameters("query"),
            *route.headers.parameters("header"),
        ],
    }
    if route.body is not None:
        schema = route.body.schema()
        required, content = bool(schema["required"]), {JSON: {"schema": schema}}
        operation["requestBody"] = {"required": required, "content": content}
    refusals = {
        str(status): {"$ref": f"#/components/responses/{name}"}
        for status, name, _ in _refusals(route)
    }
    operation["responses"] = {str(route.status): _success_response(route), **refusals}
    return operation


def openapi_document() -> Document:
    """The API in OpenAPI 3.1."""
    paths: Dict[str, Document] = {}
    responses: Document = {}
    raised = set()
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
        for _, name, kinds in _refusals(route):
            responses[name] = _refusal_response(kinds)
            raised.update(kinds)
    refused = [problem_shape(kind) for kind in problems() if kind in raised]
    shapes = (*NAMED_SHAPES, *refused, FIELD_ERROR)
    return {
        "openapi": "3.1.0",
        "info": {"title": "hostenroll", "version": __version__},
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": {shape.name: shape.schema() for shape in shapes},
            "responses": responses,
            "securitySchemes": SECURITY_SCHEMES,
        },
    }


@lru_cache(maxsize=1)
def _openapi_json() -> bytes:
    return write_json(openapi_document())


Methods = Dict[str, Route]


def _table(routes: Sequence[Route]) -> Dict[str, Methods]:
    paths: Dict[str, Methods] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method] = route
    for methods in paths.values():
        if "GET" in methods:
            methods["HEAD"] = methods["GET"]
    return paths


PATHS = _table(ROUTES)
SEGMENTS_MAXIMUM = max(path.count("/") for path in PATHS) + 1  # more of them match nothing


def _find_path(path: str) -> Tuple[Methods, str]:
    if path in PATHS:
        return PATHS[path], ""
    segments = path.split("/", SEGMENTS_MAXIMUM)
    for n, segment in enumerate(segments):
        methods = PATHS.get("/".join((*segments[:n], "{id}", *segments[n + 1 :])))
        if methods is not None and segment:
            return methods, segment
    raise NotFound("There is nothing at this path.")


def allow(methods: Methods) -> Tuple[Tuple[str, str], ...]:
    """The Allow header field of a path."""
    return (("Allow", ", ".join([*methods, "OPTIONS"])),)


@lru_cache(maxsize=256)  # a path may be 16 KiB long
def find_route(method: str, path: str) -> Tuple[Route, str]:
    """The route of a request, and the id in its path. Raises NotFound, MethodNotAllowed,
    UnknownMethod."""
    if method not in METHODS:
        raise UnknownMethod()
    methods, identifier = _find_path(path)
    if method not in methods:
        raise MethodNotAllowed(headers=allow(methods))
    return methods[method], identifier


def _answer_options(path: str) -> Response:
    everything = {method: route for methods in PATHS.values() for method, route in methods.items()}
    return Response(204, headers=allow(everything if path == "*" else _find_path(path)[0]))


def read_query(query: str) -> List[Tuple[str, str]]:
    """The parameters of a query. Raises InvalidQuery."""
    try:
        return parse_qsl(
            query, keep_blank_values=True, errors="strict", max_num_fields=PARAMETERS_MAXIMUM
        )
    except ValueError:
        raise InvalidQuery(
            f"A query is at most {PARAMETERS_MAXIMUM} parameters, percent-encoded in UTF-8."
        ) from None


END_OF_LINE = b"\r\n"
Heard = Tuple[PlainBeat, Head]


@lru_cache(maxsize=HEADS_CACHED)
def _plain_head(before: bytes, after: bytes) -> Optional[Head]:
    """The head of a plain heartbeat, of which the credential has been cut out between the two;
    None if they are anything else. It must have stood in the head's one Authorization: a body or
    a trailer may have a line that looks like it."""
    if b"\r\n\r\n" in before:
        return None
    reader = RequestReader()
    try:
        request = reader.next(before + AUTHORIZATION + b"\r\n" + after)
        if request is None or reader.buffer or request.body not in (b"", b"{}"):
            return None
        route, _ = find_route(request.head.method, request.head.path)
    except Problem:
        return None
    return request.head if route.admit is _admit_heartbeat else None


class ShortWay:
    """How plain heartbeats are heard. Agents send the same bytes with every beat, and a fleet's
    differ in the credential alone, and there only after the opening. So what stands around it is
    read once, and each credential is verified once.

    A newcomer takes nobody's place: a fleet beats in turn, so of one that is larger than the cache
    whoever was heard longest ago is the next. Now and then all is forgotten: nothing stays that
    nobody sends any more.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.forget(0)

    def forget(self, now: int) -> None:
        """Begin anew, with the keys as they are. They come last: where there is no memory for the
        rest, it is to be done again."""
        self._known: Dict[bytes, Standing] = {}  # by what follows the opening
        self._standings: Dict[Standing, Standing] = {}  # each of them once
        # Of the last that was heard: the next one looks the same, most often.
        self._before, self._after, self._head = b"\0", b"", NOBODYS.head  # like none at first
        self._since, self._until = now, now + CREDENTIALS_KEPT_MS
        keyring = self._registry.keyring
        self._opening = BEARER + keyring.first.opening
        self._keyring = keyring

    def hear(self, data: bytes, now: int) -> Optional[Heard]:
        """What is heard, if data is a whole plain heartbeat and nothing else. None for all that
        goes the long way: to be read, admitted, perhaps refused."""
        if self._registry.keyring is not self._keyring or not self._since <= now < self._until:
            self.forget(now)
        rest = END_OF_LINE
        if data.startswith(self._before) and data.endswith(self._after):
            rest = data[len(self._before) : -len(self._after)]
        standing = self._known.get(rest)
        if standing is None:
            if END_OF_LINE in rest:  # it does not look the same, or has more lines
                rest = self._cut(data)
            if not rest:
                return None
            standing = self._known.get(rest) or self._learn(rest, now)
            if standing is None:
                return None
        return (host_of(rest), standing), self._head

    def _cut(self, data: bytes) -> bytes:
        """The rest of the credential, of a plain heartbeat; nothing of anything else."""
        before, opening, behind = data.partition(self._opening)
        rest, end, after = behind.partition(END_OF_LINE)
        if not after or len(before) + len(after) > HEAD_CACHED_MAXIMUM:
            return b""
        head = _plain_head(before, after)
        if head is None:
            return b""
        self._before, self._after, self._head = before + opening, end + after, head
        return rest

    def _learn(self, rest: bytes, now: int) -> Optional[Standing]:
        """Verify a credential, and keep it if it needs no renewal for as long: only what was
        signed is kept, so junk cannot push out the fleet."""
        keyring, is_due = self._registry.keyring, self._registry.is_due
        claims = keyring.read(keyring.first.opening + rest)
        if claims is None or is_due(claims, now):
            return None
        _, standing = plain_beat(claims)
        if len(self._known) < CREDENTIALS_CACHED and not is_due(claims, self._until):
            self._known[rest] = self._standings.setdefault(standing, standing)
        return standing


class Api:
    """What requests come to."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._short_way = ShortWay(registry)
        self.hear = self._short_way.hear
        self.metrics = registry.metrics

    def admit(self, request: Request, now: int) -> Admitted:
        """What a request asks for, judged before the tick. Of the database only a secret is looked
        up, so that a wrong one gets no further."""
        head = request.head
        try:
            if head.method == "OPTIONS":
                return _answer_options(head.path)
            route, identifier = find_route(head.method, head.path)
            return route.admit(self._registry, request, route, identifier, now)
        except Problem as problem:
            return self.refuse(problem, request.address, request.id, now)

    def answer_plainly(self, host: int, last_seen: int, seconds: int, closes: bool) -> bytes:
        """The bytes of the answer to a plain heartbeat that counts, at a quarter of the cost."""
        interval = b"%d" % self._registry.next_heartbeat()
        return _plain_answer(last_seen, len(interval), seconds, closes) % (host, interval)

    def refuse(self, problem: Problem, address: str, request: str, now: int) -> Response:
        """The answer to what no act has come of."""
        self._registry.refused(problem, Origin(address, request), now)
        return self.refusal(problem)

    def refusal(self, problem: Problem) -> Response:
        """A Problem as its answer, which counts."""
        self.metrics.refusals[problem.code] += 1
        return refusal(problem)

    def run(
        self,
        pending: Sequence[Pending],
        now: int,
        request_at: Callable[[int], Request] = lambda place: NOBODYS,
    ) -> Optional[List[Any]]:
        """One tick: what each comes to, all of it committed, for answer(). None when another
        writer is at work: ask again with the same requests, or give_up(). request_at gives the
        request at a place."""
        return self._registry.tick(pending, now, lambda place: origin_of(request_at(place)))

    def answer(self, work: Pending, outcome: Any) -> Optional[Response]:
        """The answer to what has come to an outcome in a tick; None if it is an act that wants to
        be run again in another."""
        if isinstance(outcome, Problem):
            return self.refusal(outcome)
        if isinstance(work, Act):
            response: Optional[Response] = None if outcome is UNFINISHED else outcome
            return response
        return _plain_response(self._registry, work[0], outcome)

    @staticmethod
    def may_write(work: Pending) -> bool:
        """Whether it has to wait for other writers."""
        return not isinstance(work, Act) or work.writes

    def give_up(self) -> Problem:
        """Stop waiting for the other writer: what every call of the tick comes to."""
        return self._registry.give_up()

    def notice_keys(self) -> None:
        """Before a turn: go by the key file as it is now."""
        self._registry.notice_keys()

    def relieve(self) -> None:
        """Give back what memory can be had again."""
        self._short_way.forget(0)

    @property
    def owes_notes(self) -> bool:
        """Whether the next tick should come soon: there are refusals to be audited."""
        return self._registry.audit.owes_notes and not self._registry.storage_trouble

    def housekeeping(self) -> Act:
        """What a server does every ALIVE_EVERY seconds."""

        def run(now: int) -> Response:
            self._registry.keep_house(now)
            return Response(204)

        return Act(run, durable=False)

    def last_will(self) -> Optional[Act]:
        """What a server does before it ends, where there is something to do."""
        if not self._registry.audit.is_behind:
            return None

        def run(now: int) -> Response:
            self._registry.audit.sum_up_all(now)
            return Response(204)

        return Act(run, durable=False)

    def tidy(self) -> None:
        """Between ticks: what no answer waits for."""
        self._registry.tidy()


# 10. Server
#
# The loop: one thread, non-blocking sockets, no waiting but in one place. A turn takes whatever
# has arrived, at most one request of each connection, runs what may write as one tick, and answers
# when that is committed. http.server is the frame; its threads, its parser and its name look-ups
# at start are not used. At its end stands the other end: clients that load a server.

PEM_CERTIFICATE = re.compile("-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


class Phase:
    """What the server waits for from some connections, and for how long.

    All in a phase have the same time, so the queue is in order by itself, the longest waiting
    first, and each event costs O(1).
    """

    def __init__(self, seconds: float, events: int) -> None:
        self._seconds = seconds
        self.events = events  # that the selector watches for
        self._since: OrderedDict[Connection, float] = OrderedDict()

    def start(self, connection: Connection, moment: float) -> None:
        """Begin to wait, at the end of the queue."""
        self._since[connection] = moment
        self._since.move_to_end(connection)

    def stop(self, connection: Connection) -> None:
        """Wait no longer."""
        self._since.pop(connection, None)  # it is not there if there was no memory to begin

    def everyone(self) -> List[Connection]:
        """All who wait."""
        return list(self._since)

    def first(self) -> Optional[Connection]:
        """Who has waited longest."""
        return next(iter(self._since), None)

    @property
    def since(self) -> float:
        """When the first began to wait; later than ever, if nobody does."""
        return next(iter(self._since.values()), math.inf)

    def overdue(self, moment: float) -> Optional[Connection]:
        """Who has waited longest, if that is too long."""
        return self.first() if moment - self.since >= self._seconds else None

    def left(self, moment: float) -> float:
        """Seconds until somebody has waited too long."""
        return max(0.0, self.since + self._seconds - moment)


class Tls:
    """The TLS of one connection: bytes to bytes, it never touches the socket. A server's, or a
    client's where it is given the server's name."""

    def __init__(self, context: ssl.SSLContext, server: Optional[str] = None) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._session = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server is None, server_hostname=server
        )
        self.has_begun = False
        self.is_shaken = False  # hands are: the handshake is over
        self.has_ended = False  # the peer has said that it sends no more
        self.held = 0  # bytes of a handshake or a record that is not whole, at most

    def receive(self, data: bytes) -> bytes:
        """The plain text in what has arrived. Raises ssl.SSLError."""
        self._incoming.write(data)
        self.has_begun = True
        self.held += len(data)
        parts: List[bytes] = []
        with suppress(ssl.SSLWantReadError):
            if not self.is_shaken:
                self._session.do_handshake()
                self.is_shaken, self.held = True, 0
            part = self._session.read(TLS_RECORD)
            while part:
                parts.append(part)
                part = self._session.read(TLS_RECORD)
            self.has_ended = True
        if parts:
            self.held = 0
        if not self.is_shaken and self.held > HANDSHAKE_MAXIMUM:
            raise ssl.SSLError("a handshake that is too long")
        return b"".join(parts)

    def send(self, data: Union[bytes, memoryview]) -> bytes:
        """What to send for a plain text, after what is to be sent anyway."""
        self._session.write(data)
        return self._outgoing.read()

    def output(self) -> bytes:
        """What is to be sent anyway: a part of the handshake, an alert."""
        return self._outgoing.read()

    def farewell(self) -> bytes:
        """What to send last: without a close_notify an end may be an attack that cuts short."""
        with suppress(ssl.SSLError):
            self._session.unwrap()
        return self._outgoing.read()


TlsLoader = Callable[[], ssl.SSLContext]


def load_tls(certificate: str, key: str) -> Tuple[ssl.SSLContext, bytes]:
    """The TLS of a server with a certificate chain and its key, both PEM files; and the first
    certificate in DER. Raises OperatorError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    for path in (certificate, key):
        if os.path.exists(path) and not (
            os.path.isfile(path) and os.path.getsize(path) <= KEY_FILE_MAXIMUM
        ):
            raise OperatorError(f"{path} is not a file, or far too large")
    try:
        with open(certificate, encoding="latin-1") as file, open(key, "rb"):
            chain = PEM_CERTIFICATE.search(file.read())
        if chain is None:
            raise OperatorError(f"there is no PEM certificate in {certificate}")
        context.load_cert_chain(certificate, key, password=lambda: b"")  # never asks a terminal
        return context, ssl.PEM_cert_to_DER_cert(chain[0])
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
            raise OperatorError(f"{key} is not the key of the certificate {certificate}") from error
        raise OperatorError(
            f"{certificate} and {key} are not a certificate and its key without a password, in "
            f"PEM: {error.reason or error}"
        ) from error
    except OSError as error:
        raise OperatorError(f"cannot read {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise OperatorError(f"there is no PEM certificate in {certificate}") from error


class Connection:
    """A peer: its socket, what has come of its next request, what it has not yet taken."""

    __slots__ = (
        "closing",
        "held",
        "interest",
        "is_gone",
        "lingers",
        "output",
        "phase",
        "reader",
        "socket",
        "tls",
    )

    def __init__(
        self, peer: socket.socket, address: str, number: int, proxies: Networks = ()
    ) -> None:
        self.socket = peer
        self.tls: Optional[Tls] = None
        self.reader = RequestReader(address, number, proxies)
        self.output: Union[bytes, memoryview] = b""
        self.phase: Optional[Phase] = None  # None: the peer is not waited for
        self.interest = 0  # the events that the selector watches for
        self.held = 0  # bytes of an unfinished request, or of a large one in the tick
        self.closing = False  # when the output is taken
        # Before it closes: the peer may still be sending, or has so much of an answer to take that
        # whatever it sends meanwhile would cost it the rest.
        self.lingers = False
        self.is_gone = False


Beating = Tuple[Connection, Heard]  # a plain heartbeat, and who waits for its answer


class Owed(NamedTuple):
    """An answer that somebody waits for."""

    connection: Optional[Connection]  # None: nobody, it is the server's own business
    request: Request
    work: Pending
    since: float


DEADLINES = (HEAD_DEADLINE, BODY_DEADLINE, IDLE_DEADLINE, ANSWER_DEADLINE)


class Server(HTTPServer):
    """An HTTP server for one Api. serve_forever() returns after stop()."""

    request_queue_size = BACKLOG

    def __init__(
        self,
        api: Api,
        host: str,
        port: int,
        *,
        clock: Callable[[], float],
        connections: int = CONNECTIONS_MAXIMUM,
        deadlines: Tuple[float, float, float, float] = DEADLINES,
        load_tls: Optional[TlsLoader] = None,
        listener: Optional[socket.socket] = None,
        proxies: Networks = (),
        access_log: bool = False,
        notify: Callable[[str], None] = lambda state: None,
    ) -> None:
        """load_tls gives a fresh context when it starts and at each SIGHUP; a listener is one
        that somebody else has bound; proxies are believed whom they speak for; notify tells a
        service manager about our state."""
        self._api = api
        self._metrics = api.metrics
        self._clock = clock
        self._load_tls = load_tls
        self._tls = load_tls() if load_tls else None
        self._listener = listener
        self._proxies = proxies
        self._access_log = access_log
        self._notify = notify
        self._moment = time.monotonic()  # of this turn, for deadlines
        self._now = int(clock() * SECOND_MS)  # of this turn, for everything that is told
        self._connections: set[Connection] = set()
        self._connections_maximum = connections
        self._held = 0  # of all connections together
        head, body, idle, answer = deadlines
        shaking = min(head, HANDSHAKE_DEADLINE)
        reading = [
            Phase(seconds, selectors.EVENT_READ)
            for seconds in (shaking, head, body, idle, LINGER_DEADLINE)
        ]
        self._shaking, self._in_head, self._in_body, self._idle, self._lingering = reading
        self._taking = Phase(answer, selectors.EVENT_WRITE)
        self._phases = (*reading, self._taking)
        # Where a request begins if nothing is held of it; of who is in the tick nothing is read.
        self._between = (self._idle, self._in_head, None)
        # For the next turn; None: there is more to be read of what has arrived.
        self._ready: List[Tuple[Connection, Optional[Request]]] = []
        # What may write, of this turn, or of more when there is another writer.
        self._beats: List[Beating] = []
        self._tick: List[Owed] = []
        self._own_work = 0  # of that, what nobody has asked for
        self._reads: deque[Owed] = deque()
        self._waiting_since = 0.0  # for another writer; 0: not
        self._crowded = False  # somebody waits for a connection to give way
        self._short_at = -math.inf  # when there were no descriptors to be had
        self._starved_at = -math.inf  # when there was no memory to be had
        self._has_broken_off = False  # a turn, for want of it
        self._accept_after = 0.0  # 0: now
        self._alive_after = 0.0
        self._stop_before: Optional[float] = None
        self._has_willed = False
        self._is_to_reload = False
        self._accepted = self._now << 20  # numbers for connections, and not those of a life before
        self._selector = selectors.DefaultSelector()
        self._waker, self._wakened = socket.socketpair()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), BaseHTTPRequestHandler, bind_and_activate=False)
        try:
            self.server_bind()
            self.server_activate()
        except BaseException:
            self.server_close()
            raise

    # Starting and stopping.

    def server_bind(self) -> None:
        """Bind without the look-up of our own name that HTTPServer does: there may be no DNS. Or
        take what somebody else has bound."""
        if self._listener is not None:
            self.socket.close()
            self.socket = self._listener
            self._learn_address()
            return
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self._learn_address()

    def _learn_address(self) -> None:
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def server_activate(self) -> None:
        """Listen. Accepted sockets inherit TCP_NODELAY."""
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.socket.listen(self.request_queue_size)
        self._waker.setblocking(False)
        self._wakened.setblocking(False)
        self._selector.register(self._wakened, selectors.EVENT_READ)
        self._selector.register(self.socket, selectors.EVENT_READ)

    @property
    def url(self) -> str:
        """Where it listens; by the name of this machine when it listens on every address."""
        host = self.server_name
        if ipaddress.ip_address(host).is_unspecified:
            host = socket.gethostname()
        scheme = "https" if self._tls else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.server_port}"

    @property
    def is_in_the_clear(self) -> bool:
        """Whether secrets are sent to other machines for all on the way to read."""
        return self.is_exposed and self._tls is None

    @property
    def is_exposed(self) -> bool:
        """Whether other machines can connect."""
        return not ipaddress.ip_address(self.server_name).is_loopback

    def stop(self, *_: object) -> None:
        """Stop accepting, answer what has arrived, return from serve_forever(). A signal handler
        may call it, or another thread."""
        if self._stop_before is None:
            self._stop_before = time.monotonic() + SHUTDOWN_DEADLINE
        with suppress(OSError):  # it is awake already, or has ended
            self._waker.send(b"\0")

    shutdown = stop

    def reload(self, *_: object) -> None:
        """Load the certificate anew. A signal handler may call it, or another thread."""
        self._is_to_reload = True
        with suppress(OSError):
            self._waker.send(b"\0")

    @contextmanager
    def woken_by_signals(self) -> Iterator[None]:
        """In the main thread: its handlers run when Python has control again, and after a signal
        that comes just before the selector waits, that would be when something else happens."""
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Turn until stop() has been called and nobody is owed an answer."""
        listening = True
        self._notify("READY=1")
        while listening or (self._is_owing() and time.monotonic() < (self._stop_before or 0)):
            try:
                if self._has_broken_off:
                    self._pick_up()
                self._turn(self._patience())
            except MemoryError:
                self._has_broken_off = True
                time.sleep(MEMORY_PAUSE)
            if self._stop_before is not None and listening:
                listening = False
                self._notify("STOPPING=1")
                self._stop_listening()
        if self._waiting_since:
            self._settle_tick(repeat(self._api.give_up()))

    def _is_owing(self) -> bool:
        """Whether somebody is owed an answer, or the audit log what nobody waits for: the last
        will, which waits for other writers as everything does."""
        if not self._connections and not self._tick and not self._has_willed:
            last_will = self._api.last_will()
            if last_will is not None:
                self._owe(last_will)
            self._has_willed = True
        return bool(self._connections or self._tick)

    def _stop_listening(self) -> None:
        """Take those who have connected already; part with those who have sent nothing."""
        self._welcome_all(self._accept(BACKLOG))
        self._watch_listener(False)
        self._accept_after = 0.0
        self.socket.close()
        self._turn(0)  # reads what has arrived
        for phase in (self._idle, self._shaking, self._in_head):
            for connection in phase.everyone():
                if phase is self._shaking or not connection.held:
                    self._drop(connection)

    def server_close(self) -> None:
        """Close every socket."""
        for connection in list(self._connections):
            self._drop(connection)
        super().server_close()
        self._selector.close()
        self._waker.close()
        self._wakened.close()

    # One turn.

    def _turn(self, patience: float) -> None:
        events = self._selector.select(patience)
        self._moment = time.monotonic()
        self._now = int(self._clock() * SECOND_MS)
        self._api.notice_keys()
        if self._is_to_reload:
            self._reload()
        ready, self._ready = self._ready, []
        for connection, request in ready:
            try:
                if request is None and connection.phase is self._in_body:
                    request = self._parse(connection, b"")
                if request is not None:
                    self._admit(connection, request)
            except Exception:
                self._fail(connection)
        fresh = self._accept(ACCEPTS_PER_TURN) if self._attend_all(events) else []
        self._keep_house()
        self._write()
        self._read_one()
        self._welcome_all(fresh)
        if self._crowded:
            self._make_room()
        self._expire()

    def _patience(self) -> float:
        """How long the selector may wait for something to happen."""
        if self._ready or self._reads:
            return 0
        if self._waiting_since:
            return LOCK_POLL
        if self._beats or self._tick or self._api.owes_notes:
            return 0
        moment = time.monotonic()
        waits = [phase.left(moment) for phase in self._phases]
        waits.append(max(0.0, self._alive_after - moment))
        if self._accept_after:
            waits.append(max(0.0, self._accept_after - moment))
        if self._stop_before is not None:
            waits.append(max(0.0, self._stop_before - moment))
        return min(waits)

    def _fail(self, connection: Connection) -> None:
        """Whatever goes wrong with a connection ends there, and not the loop: others of the same
        tick are owed an answer."""
        with suppress(MemoryError):
            self._own_up("a connection failed")
        self._drop(connection)

    def _own_up(self, what: str, request: str = "") -> Problem:
        """What we answer to an exception that nothing should raise: it is a defect, or there was
        no memory. Of that the log is told once, not at every place where it may happen."""
        if not isinstance(sys.exc_info()[1], MemoryError):
            log.exception(what, extra={"request": request})
            return Internal()
        with suppress(MemoryError):
            self._tell_of_memory()
        return Overloaded()

    def _tell_of_memory(self) -> None:
        self._api.relieve()
        moment = time.monotonic()
        if moment - self._starved_at > TROUBLE_OVER:  # if not even this can be said, then later
            log.error("out of memory: requests are refused until there is more; raise its limit")
        self._starved_at = moment

    def _pick_up(self) -> None:
        """A turn has broken off: part with those who hold memory, and then, for which some is
        needed, with those whom nobody waits for now."""
        for phase in (self._in_body, self._taking, self._in_head):
            holder = phase.first()
            while holder is not None:
                self._drop(holder)
                holder = phase.first()
        self._tell_of_memory()
        waiting = {owed.connection for owed in (*self._tick, *self._reads)}
        waiting.update(connection for connection, _ in (*self._ready, *self._beats))
        for connection in self._connections.difference(waiting):
            if connection.phase is None:
                self._drop(connection)
        self._has_broken_off = False

    def _attend_all(self, events: Iterable[Tuple[selectors.SelectorKey, int]]) -> bool:
        """Take what has arrived. Whether somebody wants to connect."""
        is_called = False
        for key, _ in events:
            connection = key.data
            if connection is not None:
                try:
                    self._attend(connection)
                except Exception:
                    self._fail(connection)
            elif key.fileobj is self.socket:
                is_called = True
            else:
                self._wakened.recv(RECEIVE_SIZE)
        return is_called

    def _attend(self, connection: Connection) -> None:
        if connection.phase is self._taking:
            self._flush(connection)
        elif connection.phase is self._lingering:
            self._linger(connection)
        elif connection.phase is not None:
            request = self._receive(connection)
            if request is not None:
                self._admit(connection, request)

    def _receive(self, connection: Connection) -> Optional[Request]:
        """Take what has arrived; the request that is whole with it. A plain heartbeat, between two
        requests, comes into the tick by the short way; but what is to be logged one by one, or
        came by a proxy, goes the long one."""
        try:
            data = connection.socket.recv(RECEIVE_SIZE)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            data = b""
        if not data:
            self._drop(connection)
        elif len(data) == RECEIVE_SIZE:
            connection.lingers = True
        if data and connection.tls is not None:
            data = self._decrypt(connection, connection.tls, data)
        if not data:
            return None
        reader = connection.reader
        is_between = connection.phase in self._between and not reader.buffer
        if is_between and not self._access_log and not reader.proxies:
            heard = self._api.hear(data, self._now)
            if heard is not None:
                reader.number += 1
                self._beats.append((connection, heard))
                return None
        return self._parse(connection, data)

    def _decrypt(self, connection: Connection, tls: Tls, data: bytes) -> bytes:
        """The plain text in what has arrived; what TLS has to say goes out before an answer does,
        or at once where there will be none yet."""
        if not tls.has_begun and data[:1].isalpha():  # a record begins with 22
            connection.tls, connection.reader.buffer = None, data
            self._refuse(connection, MalformedRequest("This port speaks TLS: use https."))
            return b""
        try:
            plain = tls.receive(data)
        except ssl.SSLError:
            self._part_from_tls(connection, tls)
            return b""
        if tls.is_shaken and connection.phase in (None, self._shaking):
            self._move(connection, self._in_head)
        if plain:
            if connection.held:
                self._account(connection, connection.reader.held)
            return plain
        self._account(connection, connection.reader.held + tls.held)
        output = tls.output()
        if output:
            self._push(connection, output)
        if tls.has_ended:
            self._drop(connection)
        elif self._held > HELD_MAXIMUM:
            self._relieve(connection)
        return b""

    def _relieve(self, connection: Connection) -> bool:
        """Too much is held, with what has come of a connection or goes to it: whoever holds the
        most gives way, but none who is in the tick. So a crowd that holds what it can keeps nobody
        else out. True when that is the connection itself."""
        holders = [it for phase in self._phases for it in phase.everyone()]
        greatest = max((*holders, connection), key=lambda it: it.held + len(it.output))
        if not greatest.held and not greatest.output:
            return False
        if greatest.output or greatest.phase is self._shaking:
            self._drop(greatest)
        else:
            self._refuse(greatest, Overloaded())
        return greatest is connection

    def _part_from_tls(self, connection: Connection, tls: Tls) -> None:
        output = tls.output()
        connection.tls = None
        connection.closing = connection.lingers = True
        if not output or self._push(connection, output):
            self._start_lingering(connection)

    def _parse(self, connection: Connection, data: bytes) -> Optional[Request]:
        """The next request of what a connection has sent, if it is whole."""
        reader = connection.reader
        try:
            request = reader.next(data)
        except Problem as problem:
            self._refuse(connection, problem)
            return None
        except MemoryError:
            self._refuse(connection, self._own_up("a request could not be read"))
            return None
        if request is None or reader.buffer or connection.held:
            self._account(connection, reader.held + (len(request.body) if request else 0))
            if self._held > HELD_MAXIMUM and self._relieve(connection):
                return None
        if request is None:
            self._hold(connection)
        return request

    def _account(self, connection: Connection, held: int) -> None:
        self._held += held - connection.held
        connection.held = held

    def _hold(self, connection: Connection) -> None:
        """Give an unfinished request its time: no part of it buys more."""
        reader = connection.reader
        if connection.tls is not None and connection.tls.has_ended and not reader.is_behind:
            self._drop(connection)
        elif not reader.is_in_body:
            if connection.phase is not self._in_head and reader.has_begun:
                self._move(connection, self._in_head)
        elif connection.phase is not self._in_body:
            self._move(connection, self._in_body)
            if reader.awaits_continue:
                self._send(connection, CONTINUE)
        if reader.is_behind:
            self._ready.append((connection, None))
        events = 0 if reader.is_behind else selectors.EVENT_READ
        if connection.phase is self._in_body and connection.interest != events:
            self._watch(connection, events)

    def _admit(self, connection: Connection, request: Request) -> None:
        try:
            admitted = self._api.admit(request, self._now)
        except Exception:
            problem = self._own_up("a request could not be admitted", request.id)
            admitted = self._api.refusal(problem)
        if isinstance(admitted, Response):
            self._answer(connection, admitted, request)
            self._metrics.requests.observe(time.monotonic() - self._moment)
            return
        owed = Owed(connection, request, admitted, self._moment)
        if self._api.may_write(admitted):
            self._tick.append(owed)
            if connection.held:  # or else _relieve() might refuse what is done all the same
                self._move(connection, None)
        else:
            self._reads.append(owed)
            self._move(connection, None)

    # Ticks.

    def _keep_house(self) -> None:
        is_due = self._moment >= self._alive_after
        if is_due or (self._api.owes_notes and not self._waiting_since):
            self._alive_after = self._moment + ALIVE_EVERY
            self._owe(self._api.housekeeping())

    def _owe(self, work: Pending) -> None:
        """Put business of our own into the tick."""
        self._tick.append(Owed(None, NOBODYS, work, self._moment))
        self._own_work += 1

    def _reload(self) -> None:
        """Another certificate, for the connections to come; a bad one changes nothing."""
        self._is_to_reload = False
        self._notify(f"RELOADING=1\nMONOTONIC_USEC={int(self._moment * 1_000_000)}")
        if self._load_tls is not None:
            try:
                self._tls = self._load_tls()
                log.info("loaded the certificate anew")
            except OperatorError as error:
                log.error("%s; the certificate in use stays", error)
        self._alive_after = 0.0
        self._notify("READY=1")

    def _write(self) -> None:
        """Run what may write as one tick. While another process writes, gather and try again."""
        if not self._tick and not self._beats:
            return
        outcomes: Optional[Iterable[Any]] = self._run_tick()
        if outcomes is None:
            self._waiting_since = self._waiting_since or self._moment
            if self._moment - self._waiting_since <= LOCK_PATIENCE:
                self._wait()
                return
            outcomes = repeat(self._api.give_up())
        self._settle_tick(outcomes)
        self._api.tidy()

    def _run_tick(self) -> Optional[List[Any]]:
        beats, tick = self._beats, self._tick
        work: List[Pending] = [beat for _, (beat, _) in beats]
        if tick:
            work += [owed.work for owed in tick]

        def request_at(place: int) -> Request:
            if place < len(beats):
                return self._request_of(beats[place])
            return tick[place - len(beats)].request

        return self._run(work, request_at)

    @staticmethod
    def _request_of(beating: Beating) -> Request:
        connection, (_, head) = beating
        reader = connection.reader
        return Request(head, None, b"", reader.address, reader.connection, reader.number - 1)

    def _wait(self) -> None:
        """Who is in the tick is not read meanwhile, and not hurried."""
        connections = [beating[0] for beating in self._beats]
        connections += [owed.connection for owed in self._tick if owed.connection is not None]
        for connection in connections:
            if connection.phase is not None:
                self._move(connection, None)

    def _settle_tick(self, outcomes: Iterable[Any]) -> None:
        began = self._moment
        if self._waiting_since:
            began, self._waiting_since = self._waiting_since, 0.0
            self._metrics.lock_waits.observe(self._moment - began)
        beats, self._beats = self._beats, []
        tick, self._tick = self._tick, []
        came = iter(outcomes)
        self._settle_beats(beats, came)
        for owed, outcome in zip(tick, came):
            self._settle(owed, outcome)
        requests = len(beats) + len(tick) - self._own_work
        self._own_work = 0
        if requests:
            self._metrics.ticks.observe(requests)
            self._metrics.requests.observe(time.monotonic() - began, requests)

    def _settle_beats(self, beats: Sequence[Beating], outcomes: Iterable[Any]) -> None:
        answer, seconds = self._api.answer_plainly, self._now // SECOND_MS
        idle, moment, is_stopping = self._idle, self._moment, self._stop_before is not None
        for beating, outcome in zip(beats, outcomes):
            connection, (beat, head) = beating
            try:
                if not isinstance(outcome, int):
                    refused = cast(Response, self._api.answer(beat, outcome))
                    self._answer(connection, refused, self._request_of(beating))
                    continue
                closes = is_stopping or not head.keep_alive
                data = answer(beat[0], outcome, seconds, closes)
                if connection.phase is idle and connection.tls is None and not closes:
                    if self._push(connection, data):
                        idle.start(connection, moment)
                    continue
                connection.closing = closes
                if self._send(connection, data):
                    self._answered(connection)
            except Exception:
                self._fail(connection)

    def _settle(self, owed: Owed, outcome: Any) -> bool:
        """Answer; False for what wants to be run again."""
        connection = owed.connection
        if connection is not None:
            try:
                response = self._api.answer(owed.work, outcome)
                if response is None:
                    return False
                self._answer(connection, response, owed.request, owed.since)
            except Exception:
                self._fail(connection)
        return True

    def _read_one(self) -> None:
        """Run one act that only reads, or a slice of it, in a tick of its own: no beat waits for
        more, and it needs no lock that others wait for."""
        while self._reads:
            owed = self._reads.popleft()
            if owed.connection is None or owed.connection.is_gone:
                continue
            outcomes = self._run([owed.work], lambda place: NOBODYS)
            assert outcomes is not None, "what only reads waits for nobody"
            if self._settle(owed, outcomes[0]):
                self._metrics.requests.observe(time.monotonic() - owed.since)
            else:
                self._reads.insert(READS_AT_ONCE, owed)
            return

    def _run(
        self, work: Sequence[Pending], request_at: Callable[[int], Request]
    ) -> Optional[List[Any]]:
        try:
            return self._api.run(work, self._now, request_at)
        except Exception:
            return [self._own_up("a tick failed")] * len(work)

    # Answers.

    def _answer(
        self, connection: Connection, response: Response, request: Request, since: float = 0.0
    ) -> None:
        """Send an answer, and get on with what the connection sends next, or close it."""
        head = request.head
        closes = not head.keep_alive or response.closes or self._stop_before is not None
        connection.closing = closes
        name = request.id if response.content_type is PROBLEM_JSON else ""
        data = write_response(response, self._now // SECOND_MS, closes, head.method == "HEAD", name)
        if response.closes or len(data) > RECEIVE_SIZE:
            connection.lingers = True
        if self._access_log:
            self._log_access(request, response, since or self._moment)
        if self._send(connection, data):
            self._answered(connection)

    def _log_access(self, request: Request, response: Response, since: float) -> None:
        head = request.head
        access = {
            "address": request.address,
            "method": printable_path(head.method),
            "path": printable_path(head.path),
            "status": response.status,
            "bytes": len(response.body),
            "seconds": round(time.monotonic() - since, 6),
        }
        log.info(
            "%(address)s %(method)s %(path)s %(status)d %(bytes)d B %(seconds)f s",
            access,
            extra={"access": access, "request": request.id},
        )

    def _refuse(self, connection: Connection, problem: Problem) -> None:
        """Answer what is no whole request, and read no further."""
        reader = connection.reader
        request = reader.unread()
        connection.reader = RequestReader(
            reader.address, reader.connection
        )  # what it held is let go
        self._account(connection, 0)
        response = self._api.refuse(problem, request.address, request.id, self._now)
        self._answer(connection, response, request)

    def _send(self, connection: Connection, data: bytes) -> bool:
        """Send what the peer takes at once. True when that is all of it."""
        if connection.tls is not None:
            try:
                data = connection.tls.send(data)
            except ssl.SSLError:
                self._drop(connection)
                return False
        return self._push(connection, data)

    def _push(self, connection: Connection, data: Union[bytes, memoryview]) -> bool:
        try:
            sent = connection.socket.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self._drop(connection)
            return False
        if sent == len(data):
            return True
        connection.output = memoryview(data)[sent:]
        self._held += len(connection.output)
        if self._held > HELD_MAXIMUM and self._relieve(connection):
            return False
        if connection.phase is not self._taking:  # a trickle taken does not buy more time
            self._move(connection, self._taking)
        return False

    def _flush(self, connection: Connection) -> None:
        data, connection.output = connection.output, b""
        self._held -= len(data)
        if not self._push(connection, data):
            return
        if connection.tls is not None and not connection.tls.is_shaken:
            self._move(connection, self._shaking)
        elif connection.reader.is_in_body and not connection.closing:  # it was 100 Continue
            self._move(connection, self._in_body)
        else:
            self._answered(connection)

    def _answered(self, connection: Connection) -> None:
        """The peer has its answer: go on to its next request, or part."""
        if connection.closing:
            if connection.lingers or connection.reader.buffer:
                self._start_lingering(connection)
            else:
                self._drop(connection)
            return
        self._move(connection, self._idle)
        if connection.held:
            self._account(connection, connection.reader.held)
        if connection.reader.buffer:
            request = self._parse(connection, b"")
            if request is not None:
                self._make_ready(connection, request)
        elif connection.tls is not None and connection.tls.has_ended:
            self._drop(connection)

    def _make_ready(self, connection: Connection, request: Optional[Request]) -> None:
        """Put a request, or what there is to be read, into the next turn."""
        self._move(connection, None)
        self._ready.append((connection, request))

    # Connections.

    def _accept(self, most: int) -> List[Connection]:
        """Take new connections, while there is room."""
        fresh: List[Connection] = []
        while len(fresh) < most:
            if len(self._connections) >= self._connections_maximum:
                self._crowded = not fresh  # else it is the next turn that knows
                break
            try:
                peer, address = self.socket.accept()
            except (BlockingIOError, InterruptedError):
                break
            except ConnectionError:  # gone before we came
                continue
            except OSError as error:  # out of descriptors or memory: EMFILE, ENFILE, ENOBUFS
                if fresh:  # it is said before anybody is looked for: perhaps nobody waits
                    break
                if self._moment - self._short_at > TROUBLE_OVER:
                    log.warning(
                        "cannot accept connections: %s: raise the limit, ulimit -Hn or LimitNOFILE",
                        error.strerror,
                    )
                self._short_at = self._moment
                self._crowded = True
                break
            peer.setblocking(False)
            self._accepted += 1
            self._metrics.counts["connections"] += 1
            fresh.append(self._meet(peer, plain_address(address[0])))
            self._connections.add(fresh[-1])
        self._metrics.open_connections = len(self._connections)
        return fresh

    def _meet(self, peer: socket.socket, address: str) -> Connection:
        """X-Forwarded-For is heard from trusted proxies alone: anybody can write it."""
        if self._proxies and is_within(ipaddress.ip_address(address), self._proxies):
            return Connection(peer, address, self._accepted, self._proxies)
        return Connection(peer, address, self._accepted)

    def _welcome_all(self, fresh: Sequence[Connection]) -> None:
        for connection in fresh:
            try:
                self._welcome(connection)
            except Exception:
                self._fail(connection)

    def _welcome(self, connection: Connection) -> None:
        """Read a new connection. It was taken before the tick and is read after it: most often
        the request is there by now, and the selector never hears of the connection."""
        if self._tls is not None:
            connection.tls = Tls(self._tls)
        heard = len(self._beats)
        request = self._receive(connection)
        if request is not None:
            self._make_ready(connection, request)
        elif len(self._beats) > heard:
            return
        elif connection.phase is None and not connection.reader.is_behind:
            self._move(connection, self._shaking if connection.tls else self._in_head)

    def _make_room(self) -> None:
        """Who has been waited for longest gives way, between two requests or before the first: a
        crowd that says nothing must not push out those who do. Then the slowest body. When nobody
        can, new connections wait: the listener would stay readable, and the loop would spin."""
        self._crowded = False
        silent = min(self._idle, self._shaking, self._in_head, key=lambda phase: phase.since)
        for phase in (silent, self._in_body, self._lingering):
            connection = phase.first()
            if connection is not None:
                self._drop(connection)
                return
        self._accept_after = self._moment + ACCEPT_PAUSE
        self._watch_listener(False)

    def _watch_listener(self, watched: bool) -> None:
        if self.socket.fileno() < 0:  # we are stopping
            return
        is_watched = self.socket in self._selector.get_map()
        if watched and not is_watched:
            self._selector.register(self.socket, selectors.EVENT_READ)
        elif is_watched and not watched:
            self._selector.unregister(self.socket)

    def _move(self, connection: Connection, phase: Optional[Phase]) -> None:
        """Put a connection into a phase: under its deadline, and watched for its events."""
        if connection.is_gone:
            return
        if connection.phase is not None and connection.phase is not phase:
            connection.phase.stop(connection)
        connection.phase = phase
        if phase is not None:
            phase.start(connection, self._moment)
        events = 0 if phase is None else phase.events
        if events != connection.interest:
            self._watch(connection, events)

    def _watch(self, connection: Connection, events: int) -> None:
        if connection.interest == 0:
            self._selector.register(connection.socket, events, connection)
        elif events == 0:
            self._selector.unregister(connection.socket)
        else:
            self._selector.modify(connection.socket, events, connection)
        connection.interest = events

    def _expire(self) -> None:
        """Part with those whose time is over."""
        for phase in self._phases:
            connection = phase.overdue(self._moment)
            while connection is not None:
                try:
                    self._end(connection)
                except Exception:
                    self._fail(connection)
                connection = phase.overdue(self._moment)
        if self._accept_after and self._moment >= self._accept_after:
            self._accept_after = 0.0
            self._watch_listener(True)

    def _end(self, connection: Connection) -> None:
        """Whoever is in the middle of a request is told; the others have nothing to hear."""
        if connection.phase is self._in_head or connection.phase is self._in_body:
            self._refuse(connection, RequestTimeout())
        else:
            self._drop(connection)

    def _start_lingering(self, connection: Connection) -> None:
        """Close our side, and take what the peer still sends: to close on unread bytes would
        reset the connection, and the peer would lose the answer (RFC 9112 section 9.6)."""
        self._bid_farewell(connection)
        try:
            connection.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(connection)
            return
        self._move(connection, self._lingering)

    def _linger(self, connection: Connection) -> None:
        try:
            if connection.socket.recv(RECEIVE_SIZE):
                return
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            pass
        self._drop(connection)

    def _bid_farewell(self, connection: Connection) -> None:
        tls, connection.tls = connection.tls, None
        if tls is not None and tls.is_shaken and not connection.output:
            with suppress(OSError):
                connection.socket.send(tls.farewell())

    def _drop(self, connection: Connection) -> None:
        if connection.tls is not None:
            self._bid_farewell(connection)
        self._move(connection, None)
        connection.is_gone = True
        self._connections.discard(connection)
        self._held -= connection.held + len(connection.output)
        connection.held, connection.output = 0, b""
        connection.socket.close()
        self._metrics.open_connections = len(self._connections)


def tell_service_manager(address: str, state: str) -> None:
    """Say how we are, as sd_notify(3) does."""
    where = f"\0{address[1:]}" if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as it:
            it.setblocking(False)  # nobody may stop us by not listening
            it.sendto(state.encode("utf-8"), where)
    except OSError as error:
        said = state.partition("\n")[0]  # a line of the log, of what may be lines
        log.warning("cannot tell the service manager that %s: %s", said, error.strerror)


def inherited_listener(process: str, count: str) -> Optional[socket.socket]:
    """The socket that a service manager has bound for us, as sd_listen_fds(3) has it; None where
    there is none. Raises OperatorError."""
    if process != str(os.getpid()) or count in ("", "0"):
        return None
    if count != "1":
        raise OperatorError(f"the service manager hands over {count} sockets: we take one")
    try:
        listener = socket.socket(fileno=FIRST_INHERITED)
        accepts = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise OperatorError(f"the service manager's socket is none: {error.strerror}") from error
    if not accepts or listener.family not in (socket.AF_INET, socket.AF_INET6):
        listener.close()
        raise OperatorError("the service manager's socket does not listen for TCP connections")
    os.set_inheritable(FIRST_INHERITED, False)
    return listener


def fit_connections(wanted: int) -> int:
    """Raise the soft limit of descriptors for so many connections; how many it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + DESCRIPTORS_SPARE
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return max(1, min(wanted, needed - DESCRIPTORS_SPARE))


# The other end: what loads a server, for the benchmark.


class LoadClient:
    """One connection of a load."""

    __slots__ = ("answer", "due", "request", "socket", "tls", "unsent")

    def __init__(self) -> None:
        self.socket: Optional[socket.socket] = None
        self.tls: Optional[Tls] = None
        self.due: Optional[float] = None  # when what is outstanding was; None: nothing is
        self.request = b""  # that waits for the end of the handshake
        self.unsent: Union[bytes, memoryview] = b""
        self.answer = b""


class Loaded(NamedTuple):
    """What has come of a load."""

    answered: int
    seconds: float
    unanswered: int  # due, and given up: the server was too far behind


ANSWER_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)\r\n", re.IGNORECASE)


def answer_body(answer: bytes) -> Optional[bytes]:
    """The body of a whole answer; None while it is not whole. Raises OperatorError for anything
    but success."""
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end:
        return None
    length = ANSWER_LENGTH.search(head + b"\r\n")
    if length is None or len(body) < int(length[1]):
        return None
    if not head.startswith(b"HTTP/1.1 2"):
        said = (head.partition(b"\r\n")[0] + b": " + body).decode("utf-8", "replace")
        raise OperatorError(f"the server under load answered {UNPRINTABLE.sub('?', said)[:300]}")
    return body


def trusting(certificate: str) -> ssl.SSLContext:
    """The TLS of a client that trusts the certificate in a PEM file, and no other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certificate)
    return context


def _ignore(*_: object) -> None:
    pass


class Load:
    """Clients of one server on this machine, in one thread, each with one request outstanding at
    most. Raises OperatorError for a server that refuses, hangs up or falls silent."""

    def __init__(
        self, port: int, clients: int, *, close: bool = False, tls: Optional[ssl.SSLContext] = None
    ) -> None:
        """With close, the requests ask the server to end the connection after its answer."""
        self._address = (DEFAULT_HOST, port)
        self._closes = close
        self._context = tls
        self._clients = [LoadClient() for _ in range(clients)]
        self._idle = deque(self._clients)  # who has rested longest goes first
        self._selector = selectors.DefaultSelector()
        self._observe: Callable[[float], object] = _ignore
        self._take: Callable[[bytes], object] = _ignore
        self._answered = 0
        self._moved_at = 0.0  # when something was last sent or answered

    def close(self) -> None:
        """Close every connection."""
        for client in self._clients:
            self._drop(client)
        self._selector.close()

    def run(
        self,
        requests: Iterator[bytes],
        seconds: float,
        observe: Callable[[float], object],
        *,
        gaps: Optional[Iterator[float]] = None,
        take: Callable[[bytes], object] = _ignore,
        tell: Callable[[int], object] = _ignore,
    ) -> Loaded:
        """Send requests for so many seconds, or until there are no more, and wait for what is
        owed. observe is given the seconds that each answer took, take its body; tell, now and
        then, how many answers there were.

        Without gaps a client sends its next request when the last one is answered. That shows how
        much a server can do, but not how long anybody waits for it: one that stalls is asked
        less, and those who would have come meanwhile are never heard. With gaps, in seconds, a
        request is due that long after the one before it, whatever has been answered, and the
        time of its answer counts from when it was due.
        """
        self._observe, self._take, self._answered = observe, take, 0
        began = now = due = told_at = self._moved_at = time.monotonic()
        ends = began + seconds
        while True:
            gives_up = now >= ends + LOAD_PATIENCE
            while due <= now and due < ends and self._idle and not gives_up:
                request = next(requests, None)
                if request is None:
                    ends = began
                    break
                self._begin(self._idle.popleft(), request, due)
                due = now if gaps is None else due + next(gaps)
            is_over = gives_up or due >= ends
            if is_over and len(self._idle) == len(self._clients):
                break
            self._wait(due - now if self._idle and not is_over else BENCH_TELL)
            now = time.monotonic()
            if gaps is None:
                due = now
            if now - told_at >= BENCH_TELL:
                tell(self._answered)
                told_at = now
        unanswered = 0 if gaps is None else self._give_up(due, ends, gaps, now)
        return Loaded(self._answered, now - began, unanswered)

    def _give_up(self, due: float, ends: float, gaps: Iterator[float], now: float) -> int:
        """Count those who were due and wait still: they have waited at least so long."""
        given_up = 0
        while due < ends:
            self._observe(now - due)
            given_up += 1
            due += next(gaps)
        return given_up

    def _wait(self, seconds: float) -> None:
        """Attend to what comes within so many seconds at most. Selectors wait for whole
        milliseconds, rounded up, so the last one is spent awake."""
        ready = self._selector.select(max(0.0, min(seconds, BENCH_TELL) - 0.001))
        for key, _ in ready:
            self._attend(key.data)
        if not ready:
            if len(self._idle) < len(self._clients) and (
                time.monotonic() - self._moved_at > LOAD_PATIENCE
            ):
                raise OperatorError(f"the server has answered nothing for {LOAD_PATIENCE} s")
            os.sched_yield()  # where there is one core, it is the server's

    def _begin(self, client: LoadClient, request: bytes, due: float) -> None:
        client.due = due
        self._moved_at = time.monotonic()
        if client.socket is None:
            self._connect(client)
        tls = client.tls
        if tls is None:
            self._push(client, request)
        elif tls.is_shaken:
            self._push(client, tls.send(request))
        else:
            client.request = request
            tls.receive(b"")
            self._push(client, tls.output())

    def _connect(self, client: LoadClient) -> None:
        client.socket = peer = socket.socket()
        peer.setblocking(False)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(BlockingIOError):
            peer.connect(self._address)
        self._selector.register(peer, selectors.EVENT_READ, client)
        if self._context is not None:
            client.tls = Tls(self._context, DEFAULT_HOST)

    def _push(self, client: LoadClient, data: Union[bytes, memoryview]) -> None:
        peer = client.socket
        assert peer is not None
        try:
            sent = peer.send(data)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOTCONN):  # the latter: still connecting
                raise
            sent = 0
        was_unsent = bool(client.unsent)
        client.unsent = data[sent:]
        if bool(client.unsent) != was_unsent:
            events = selectors.EVENT_READ if was_unsent else selectors.EVENT_WRITE
            self._selector.modify(peer, events, client)

    def _attend(self, client: LoadClient) -> None:
        if client.unsent:
            self._push(client, client.unsent)
            return
        assert client.socket is not None
        data = client.socket.recv(RECEIVE_SIZE)
        if not data:
            if client.due is not None:
                raise OperatorError("the server hung up on a request")
            self._drop(client)  # it had nothing to do for long
            return
        if client.tls is not None:
            data = self._decrypt(client, client.tls, data)
        client.answer += data
        body = answer_body(client.answer) if client.due is not None else None
        if body is not None:
            self._finish(client, body)

    def _decrypt(self, client: LoadClient, tls: Tls, data: bytes) -> bytes:
        plain = tls.receive(data)
        output = tls.output()
        if tls.is_shaken and client.request:
            output += tls.send(client.request)
            client.request = b""
        if output:
            self._push(client, output)
        return plain

    def _finish(self, client: LoadClient, body: bytes) -> None:
        assert client.due is not None
        self._moved_at = time.monotonic()
        self._observe(self._moved_at - client.due)
        self._take(body)
        self._answered += 1
        client.due, client.answer = None, b""
        if self._closes:
            self._drop(client)
        self._idle.append(client)

    def _drop(self, client: LoadClient) -> None:
        if client.socket is not None:
            self._selector.unregister(client.socket)
            client.socket.close()
        client.socket = client.tls = None
        client.answer = client.unsent = b""


# 11. Command line
#
# What an operator types. A secret or a requested value stands alone on stdout, facts for people
# go to stderr. Exit status: 0 done, 1 failed, 2 usage, 3 refused. The only section that prints,
# reads the environment, and knows the wall clock.

EXIT_FAILED, EXIT_USAGE, EXIT_REFUSED, EXIT_INTERRUPTED = 1, 2, 3, 130
PROGRAM = "hostenroll.py"
EXIT_STATUSES = "exit status: 0 done, 1 failed, 2 usage, 3 refused"

DURATION = re.compile(r"([0-9]{1,9})([smhd]?)")
DURATION_UNITS = {"": 1, "s": 1, "m": MINUTE, "h": HOUR, "d": DAY}

ENVIRONMENT_PREFIX = "HOSTENROLL_"
FLAGS = {"1": True, "yes": True, "true": True, "0": False, "no": False, "false": False}


class UsageError(Exception):
    """Options that do not go together."""


def duration(text: str) -> int:
    """Seconds, written 90s, 30m, 24h or 7d. Raises ArgumentTypeError."""
    match = DURATION.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration: write 90s, 30m, 24h or 7d")
    return int(match[1]) * DURATION_UNITS[match[2]]


def count(text: str) -> int:
    """A number of things, in digits alone. Raises ArgumentTypeError."""
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return int(text)


def within(
    bounds: Tuple[int, int], read: Callable[[str], int] = count, said: Callable[[int], str] = str
) -> Callable[[str], int]:
    """What is read, and within bounds."""

    def check(text: str) -> int:
        number, (least, most) = read(text), bounds
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(
                f"{text} is out of bounds: {said(least)} to {said(most)}"
            )
        return number

    return check


def port_number(text: str) -> int:
    """A TCP port; 0 takes a free one. Raises ArgumentTypeError."""
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: 0 to 65535")
    return int(text)


def address_text(text: str) -> str:
    """An address to listen on, or a name of one. Raises ArgumentTypeError."""
    if not text or UNPRINTABLE.search(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an address or a name")
    return text


def file_name(text: str) -> str:
    """A path. Raises ArgumentTypeError for none: a variable that is not set may have been meant,
    and to go on without TLS or with other keys would be worse than to stop."""
    if not text:
        raise argparse.ArgumentTypeError("name a file, or leave it out")
    return text


def web_address(text: str) -> str:
    """Where agents find the server. Raises ArgumentTypeError."""
    name = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]"
    match = re.fullmatch(rf"https?://({name})(:([0-9]{{1,5}}))?(/[A-Za-z0-9._~/-]*)?", text)
    if match is None or int(match[4] or 0) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not like https://enroll.lan:8443")
    return text.rstrip("/")


def networks(text: str) -> Networks:
    """Networks and addresses, with commas or spaces between them. Raises ArgumentTypeError."""
    found = []
    for word in text.replace(",", " ").split():
        try:
            found.append(ipaddress.ip_network(word))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{word!r} is not an address or a network like 10.0.0.0/8"
            ) from None
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names no network")
    return tuple(found)


class Gathered(argparse.Action):
    """An option that may come again, with more of the same; the first takes the place of what the
    environment says."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option: object = None
    ) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default else (*before, *values))


class GatheredLabels(argparse.Action):
    """--label key=value, which may come again with another key: of two values of one key there is
    no telling which is meant."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option: object = None
    ) -> None:
        (key, value), before = values, getattr(namespace, self.dest)
        if key in before:
            raise argparse.ArgumentError(self, f"{key} comes twice")
        setattr(namespace, self.dest, {**before, key: value})


def one_of(*known: str) -> Callable[[str], str]:
    """One of a few words."""

    def check(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
        return text

    return check


def guess(word: str, known: Sequence[str], prefix: str = "") -> str:
    """A question about what may have been meant; '' when nothing is like it."""
    alike = [name for name in known if word and word in name]
    if not alike:
        from difflib import get_close_matches  # only a mistake is worth its hundredth of a second

        alike = get_close_matches(word, known, n=1)
    meant = " or ".join(prefix + name for name in alike)
    return f"; did you mean {meant}?" if 0 < len(alike) <= 4 else ""


def switch(text: str) -> bool:
    """Whether something is on: yes or no. Raises ArgumentTypeError."""
    if text not in FLAGS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(FLAGS)}")
    return FLAGS[text]


def positive(text: str) -> int:
    """A number of things, at least one. Raises ArgumentTypeError."""
    if count(text) == 0:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def label(text: str) -> Tuple[str, str]:
    """key=value. Raises ArgumentTypeError."""
    try:
        return LABELS.read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def columns_of(text: str) -> int:
    """How many columns of a terminal a text takes: letters of East Asia two, marks that go onto
    the letter before them none (Unicode TR 11)."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(letter) in ("W", "F") for letter in text)
    return len(text) + wide - sum(map(_is_mark, text))


def _is_mark(letter: str) -> bool:
    if letter == "\u00ad":  # a soft hyphen, which terminals show
        return False
    is_jamo = "\u1160" <= letter <= "\u11ff"  # the middle or the end of a Korean syllable
    return is_jamo or unicodedata.category(letter) in ("Mn", "Me", "Cf")


def shortened(text: str, columns: int) -> str:
    """A text in at most so many columns, with ... in one of them for what is left out."""
    if columns_of(text) <= columns:
        return text
    room, kept = columns - 1, ""
    for letter in text:
        room -= columns_of(letter)
        if room < 0:
            break
        kept += letter
    return f"{kept}\u2026"


def screen_columns(stream: Any, environment: Mapping[str, str]) -> Optional[int]:
    """How wide the terminal is that a stream goes to; None when it goes to none. COLUMNS says
    otherwise (POSIX, Environment Variables)."""
    try:
        if not stream.isatty():
            return None
        told = environment.get("COLUMNS", "")
        if re.fullmatch("[1-9][0-9]{0,3}", told):
            return int(told)
        return os.get_terminal_size(stream.fileno()).columns or COLUMNS_DEFAULT
    except (AttributeError, ValueError, OSError):  # it is None, closed, or no file
        return None


def knows_escapes(environment: Mapping[str, str]) -> bool:
    """Whether a terminal takes escape sequences (ECMA-48)."""
    return environment.get("TERM", "") not in ("", "dumb")


class Progress:
    """A word about an act that lasts: one line on the terminal of stderr, from PROGRESS_AFTER on,
    rewritten in place, and gone at the end. Where stderr is no terminal, nothing.

        with Progress("copying the database", environment) as progress:
            progress(done, total)
            progress.what = "what comes next"
    """

    def __init__(self, what: str, environment: Mapping[str, str]) -> None:
        self.what = what
        self._environment = environment
        self._done: Tuple[int, Optional[int]] = 0, None
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._write, daemon=True)

    def __call__(self, done: int, total: Optional[int] = None) -> None:
        """So much is done, of so much if that is known. As often as is convenient: this only
        takes note."""
        self._done = done, total

    def __enter__(self) -> Progress:
        columns = screen_columns(sys.stderr, self._environment)
        if columns is not None and knows_escapes(self._environment):
            self._writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._writer.ident is not None:
            self._writer.join()

    def _write(self) -> None:
        began, pause, has_written = time.monotonic(), PROGRESS_AFTER, False
        with suppress(OSError, ValueError):  # the terminal has gone
            while not self._ended.wait(pause):
                line = self._line(time.monotonic() - began)
                columns = screen_columns(sys.stderr, self._environment) or COLUMNS_DEFAULT
                sys.stderr.write(f"\r{shortened(line, columns - 1)}\x1b[K")
                sys.stderr.flush()
                pause, has_written = PROGRESS_EVERY, True
            if has_written:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()

    def _line(self, seconds: float) -> str:
        done, total = self._done
        counted = [f"{done:,} of {total:,} ({100 * done // total} %)" if total else f"{done:,}"]
        return f"{self.what}: {', '.join([*(counted if done else []), span(seconds)])}"


# How states look on a terminal (ECMA-48, SGR). Nothing else has a colour.
GREEN, RED, YELLOW, DIM = "32", "31", "33", "2"
COLOURS = {
    **dict.fromkeys(("online", "valid", "signs", "ok"), GREEN),
    **dict.fromkeys(("offline", "BAD"), RED),
    "missing": YELLOW,
    **dict.fromkeys(("revoked", "used", "expired", "retired"), DIM),
}


class Screen(NamedTuple):
    """What can be shown where a stream ends: so many columns, or any number; colours or none."""

    columns: Optional[int] = None
    has_colours: bool = False

    def paint(self, text: str, state: str) -> str:
        """A text in the colour of a state."""
        colour = COLOURS.get(state) if self.has_colours else None
        return f"\x1b[{colour}m{text}\x1b[0m" if colour else text


def screen_of(stream: Any, environment: Mapping[str, str]) -> Screen:
    """Colours only on a terminal that knows them, and never with NO_COLOR (no-color.org)."""
    columns = screen_columns(stream, environment)
    knows = columns is not None and knows_escapes(environment)
    return Screen(columns, knows and not environment.get("NO_COLOR"))


PLAIN = Screen()


class Column(NamedTuple):
    """A column of a table of documents, and how it gives way to a narrow terminal: it is cut to
    its least width, then left out, those whose turn comes first before the others."""

    heading: str
    cell: Callable[[Document, int], str]
    least: int = 0  # 0: it is never cut
    goes: int = 0  # 0: it is never left out
    is_name: bool = False  # names that differ are cut no further than they do
    is_state: bool = False


def natural_widths(cells: Sequence[Sequence[str]]) -> List[int]:
    """How wide columns have to be that have these cells."""
    return [max(map(columns_of, texts)) for texts in cells]


def fitted(columns: Sequence[Column], cells: Sequence[Sequence[str]], room: int) -> List[int]:
    """How wide columns are to be that have these cells, with two spaces between them; 0 for those
    that are left out. What room there is goes first to those that stay longest."""
    natural = natural_widths(cells)
    least = list(map(min, natural, map(_least, columns, cells)))
    order = sorted(range(len(columns)), key=lambda at: columns[at].goes or len(columns))
    spare = room + 2 - sum(width + 2 for width in least)
    while spare < 0 and order and columns[order[0]].goes:
        spare += least[order.pop(0)] + 2
    widths = [0] * len(columns)
    for at in reversed(order):
        widths[at] = least[at] + max(0, min(spare, natural[at] - least[at]))
        spare -= widths[at] - least[at]
    return widths


def _least(column: Column, texts: Sequence[str]) -> int:
    if not column.is_name:
        return column.least or max(map(columns_of, texts))
    names = sorted(set(texts))
    shared = max(map(columns_of, map(_shared, names, names[1:])), default=0)
    return max(column.least, shared + 3)  # and a letter that differs, of two columns, and ...


def _shared(one: str, other: str) -> str:
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(one, other))
    return "".join(letter for letter, _ in alike)


def table(
    rows: Sequence[Sequence[str]], columns: Sequence[Column] = (), screen: Screen = PLAIN
) -> str:
    """Rows, the first of them headings, in aligned columns, and within the screen."""
    columns = columns or [Column("", lambda document, now: "")] * len(rows[0])
    cells = list(zip(*rows))
    room = screen.columns
    widths = natural_widths(cells) if room is None else fitted(columns, cells, room)
    return "\n".join(_line(row, widths, columns, screen) for row in rows)


def _line(
    row: Sequence[str], widths: Sequence[int], columns: Sequence[Column], screen: Screen
) -> str:
    shown = []
    for text, width, column in zip(row, widths, columns):
        if width:
            short = shortened(text, width)
            padding = " " * (width - columns_of(short))
            shown.append(screen.paint(short, text if column.is_state else "") + padding)
    return "  ".join(shown).rstrip()


DIGITS = re.compile("[0-9]+")


def unix_ms(timestamp: str) -> int:
    """What rfc3339() wrote, in milliseconds of Unix time."""
    year, month, day, hour, minute, second, thousandth = map(int, DIGITS.findall(timestamp))
    return timegm((year, month, day, hour, minute, second)) * SECOND_MS + thousandth


def ago(timestamp: Optional[str], now: int) -> str:
    """A time for people, from now, in milliseconds: 3 min ago, in 42 min."""
    if timestamp is None:
        return "-"
    seconds = (now - unix_ms(timestamp)) / SECOND_MS
    if abs(seconds) < 1:
        return "now"
    shown = span(abs(seconds), minutes_from=2)
    return f"{shown} ago" if seconds > 0 else f"in {shown}"


def member(name: str) -> Callable[[Document, int], str]:
    """What a column shows: a member of a document, as it is."""
    return lambda document, now: _cell(document[name])


def since(name: str) -> Callable[[Document, int], str]:
    """What a column shows: a time, from now."""
    return lambda document, now: ago(document[name], now)


def facts(document: Document, now: int, screen: Screen) -> str:
    """One thing for people: a line for each member, and for each item of a list."""
    labels = {name: f"{words_of(name)}:" for name in document}
    width = max(map(len, labels.values()))
    lines = []
    for name, value in document.items():
        items = value if isinstance(value, list) and value else [value]
        for label, item in zip(chain([labels[name]], repeat("")), items):
            text = _fact(name, item, now)
            state = text if name in ("state", "status") else ""
            lines.append(f"{label:{width}}  {screen.paint(text, state)}")
    return "\n".join(lines)


def words_of(name: str) -> str:
    """The name of a member for people: lastSeen is last seen, expiresAt expires."""
    bare = re.sub("(?<=[a-z])(Id|At)$", "", name)
    return re.sub("[A-Z]", lambda letter: f" {letter[0].lower()}", bare)


def _fact(name: str, value: Any, now: int) -> str:
    if value and (name.endswith("At") or name == "lastSeen"):
        return f"{ago(value, now)} ({value})"
    return _cell(value)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={_inner(text)}" for key, text in value.items()) or "-"
    return "-" if value in (None, "", []) else str(value)


def _inner(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _say(*lines: str) -> None:
    """On stderr. Nobody may stop a command by not listening, and a full disk neither."""
    with suppress(OSError):
        for line in lines:
            if sys.stderr is not None:  # to print to None is to print to stdout
                print(line, file=sys.stderr)


def _complain(what: str) -> None:
    """In one line, whatever somebody has typed or pasted: no secret, and no escape sequence."""
    line = UNPRINTABLE.sub("?", concealed(what))
    _say(f"hostenroll: {line[:COMPLAINT_MAXIMUM]}")


def _print(text: str, end: str = "\n") -> None:
    """On stdout. Who has read enough does not change what a command does, and comes to."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:  # whoever read us has read enough
        _abandon(sys.stdout)


def _abandon(stream: Any) -> None:
    """What could not be written, the interpreter would try again at its end, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _settle(stream: Any) -> None:
    """Write what is left to write, or abandon it. Raises OSError."""
    try:
        if stream is not None:
            stream.flush()
    except OSError:
        _abandon(stream)
        raise


def _hand_over(text: str, what: str, number: str, revoke: str) -> None:
    """Print a secret, the only time. Raises OperatorError: then nobody has it, and it is good."""
    try:
        print(text, flush=True)
    except OSError as error:
        _abandon(sys.stdout)
        raise OperatorError(
            f"cannot write to stdout ({error.strerror}): {what} {number} is lost, and "
            f"{revoke} {number} makes it useless"
        ) from error


def json_lines(document: Any) -> str:
    """JSON for programs, which people can read too."""
    return json.dumps(document, indent=2)


def print_json(document: Any) -> None:
    """For programs."""
    _print(json_lines(document))


def api_key_document(key: ApiKey, text: Optional[str] = None) -> Document:
    """ApiKey; with its text only in the answer that mints it."""
    document = {
        "id": id_text(key.id),
        "organizationId": key.organization_id,
        "role": key.role,
        "description": key.description,
        "createdAt": rfc3339(key.created_at),
        "createdBy": key.created_by,
        "revokedAt": _when(key.revoked_at),
    }
    return document if text is None else {**document, "apiKey": text}


def organization_document(organization: Organization) -> Document:
    """Organization."""
    return {"id": organization.id, "createdAt": rfc3339(organization.created_at)}


def signing_key_document(view: SigningKeyView) -> Document:
    """SigningKey."""
    return {
        "kid": view.key.kid,
        "state": view.state,
        "hosts": view.hosts,
        "createdAt": rfc3339(view.key.created_at),
        "retiredAt": _when(view.key.retired_at),
    }


# The columns of lists. An id is always shown whole, and so is a name, as far as it takes to know it
# from the others.
ORG_COLUMN = Column("org", member("organizationId"), least=7, goes=1)
DESCRIPTION_COLUMN = Column("description", member("description"), least=11, goes=2)
TOKEN_COLUMNS = (
    Column("id", member("id")),
    Column("state", member("state"), is_state=True),
    Column("uses", lambda token, now: f"{token['uses']} of {token['maxUses']}"),
    Column("expires", since("expiresAt")),
    DESCRIPTION_COLUMN,
    ORG_COLUMN,
)
HOST_COLUMNS = (
    Column("id", member("id")),
    Column("name", member("name"), least=12, is_name=True),
    Column("status", member("status"), is_state=True),
    Column("last seen", since("lastSeen")),
    Column("labels", member("labels"), least=8, goes=3),
    Column("hostname", member("hostname"), least=8, goes=2),
    ORG_COLUMN,
)
ORGANIZATION_COLUMNS = (Column("id", member("id")), Column("created", since("createdAt")))
API_KEY_COLUMNS = (
    Column("id", member("id")),
    Column("role", member("role")),
    Column("org", lambda key, now: key["organizationId"] or "all", least=7, goes=3),
    Column("state", lambda key, now: "revoked" if key["revokedAt"] else "valid", is_state=True),
    Column("created", since("createdAt")),
    DESCRIPTION_COLUMN,
)
SIGNING_KEY_COLUMNS = (
    Column("kid", member("kid")),
    Column("state", member("state"), is_state=True),
    Column("hosts", member("hosts")),
    Column("created", since("createdAt")),
    Column("retired", since("retiredAt")),
)
EVENT_COLUMNS = (
    Column("number", member("number")),
    Column("when", since("time")),
    Column("action", member("action")),
    Column("code", member("code")),
    Column("subject", member("subject")),
    Column("actor", member("actor"), least=8, goes=4),
    Column("address", member("address"), least=8, goes=3),
    Column("detail", member("detail"), least=8, goes=5),
    Column("time", member("time"), goes=1),
)
FINDING_COLUMNS = (
    Column("", lambda finding, now: "ok" if finding["ok"] else "BAD", is_state=True),
    Column("", member("name")),
    Column("", member("detail")),
)


class JsonFormatter(logging.Formatter):
    """A log line as a JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever is in it."""
        line: Dict[str, Any] = {
            "time": rfc3339(int(record.created * SECOND_MS)),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        request, event, access = (
            getattr(record, name, None) for name in ("request", "event", "access")
        )
        if request:
            line["request"] = request
        if event is not None:
            line["event"] = event_document(event)
        if access is not None:
            line["access"] = access
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """A log line for people."""

    def format(self, record: logging.LogRecord) -> str:
        """The time with its zone, the level, what happened, and in which request."""
        request = getattr(record, "request", "")
        said = (
            f"{rfc3339(int(record.created * SECOND_MS))} {record.levelname} {record.getMessage()}"
        )
        lines = [f"{said} [{request}]" if request else said]
        if record.exc_info:
            lines.append(self.formatException(record.exc_info))
        return "\n".join(lines)


class LogHandler(logging.StreamHandler):  # type: ignore[type-arg]  # not before Python 3.11
    """The log on stderr."""

    def handleError(self, record: logging.LogRecord) -> None:
        """A log that cannot be written is no place to say so; a line that there was no memory for
        its caller can say later."""
        if isinstance(sys.exc_info()[1], MemoryError):
            raise


def _start_log(format: str) -> None:
    handler = LogHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


# What to type where a list is empty.
NONE_YET = {
    "hosts": "no host yet: mint-token says how one comes in",
    "tokens": "no token yet: mint-token makes one",
}


class Session(NamedTuple):
    """What a command works with: its arguments and the world around it."""

    arguments: argparse.Namespace
    clock: Callable[[], float]
    environment: Mapping[str, str] = {}

    @property
    def key_file(self) -> str:
        """The key file that the arguments name."""
        beside = os.path.join(os.path.dirname(self.arguments.db), DEFAULT_KEY_FILE)
        return str(self.arguments.key_file or beside)

    def now(self) -> int:
        """Unix time in milliseconds."""
        return int(self.clock() * SECOND_MS)

    def progress(self, what: str = "") -> Progress:
        """A word about this command, if it lasts."""
        return Progress(what or self.arguments.command.name, self.environment)

    @contextmanager
    def open(self, **options: Any) -> Iterator[Tuple[Registry, Principal]]:
        """The registry that the arguments name, and the operator of this machine."""
        registry = open_registry(self.arguments.db, self.key_file, self.now(), **options)
        try:
            yield registry, Principal(f"cli:{_user_name()}", ALL_ORGANIZATIONS, "admin")
        finally:
            registry.close()

    @property
    def screen(self) -> Screen:
        """Where stdout ends."""
        return screen_of(sys.stdout, self.environment)

    def print_one(self, document: Document) -> None:
        """One thing, for people or as JSON."""
        if self.arguments.json:
            print_json(document)
        else:
            _print(facts(document, self.now(), self.screen))

    def print_list(
        self,
        name: str,
        documents: Sequence[Document],
        columns: Sequence[Column],
        is_part: bool = False,
    ) -> None:
        """A list of things, all or those asked for: a table, or JSON as the API lists them, on one
        page."""
        if self.arguments.json:
            print_json({name: documents, "nextCursor": None})
            return
        self.print_table(documents, columns)
        if not documents and name in NONE_YET:
            _say(f"no such {name[:-1]}" if is_part else NONE_YET[name])

    def print_table(self, documents: Sequence[Document], columns: Sequence[Column]) -> None:
        """For people."""
        now = self.now()
        rows = [[column.cell(document, now) for column in columns] for document in documents]
        headings = [column.heading.upper() for column in columns]
        _print(table([headings, *rows] if any(headings) else rows, columns, self.screen))

    def report(self, document: Document, *lines: str) -> None:
        """What has been done: lines for people, on stderr, or JSON."""
        if self.arguments.json:
            print_json(document)
        else:
            _say(*lines)

    def ask(self, question: Callable[[Registry, Principal, int], T], writes: bool) -> T:
        """One act on the registry."""
        return self.wait_for(lambda r, by, now, report: question(r, by, now), writes)

    def wait_for(
        self, question: Callable[[Registry, Principal, int, Report], T], writes: bool
    ) -> T:
        """One act that can tell how much of it is done."""
        with self.progress() as progress, self.open() as (registry, by):
            act = Act(lambda now: question(registry, by, now, progress), writes)
            answer: T = registry.perform(act, self.now())
        return answer


def _user_name() -> str:
    try:
        return printable(getpass.getuser())
    except (KeyError, OSError):  # no such user in this container
        return str(os.getuid())


def _trim_memory() -> None:
    """Give back what it took to compile this file: the C library keeps it otherwise. Where that
    is not glibc, it stays."""
    with suppress(ImportError, OSError, AttributeError, MemoryError):
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)


def _run_serve(session: Session) -> int:
    arguments = session.arguments
    if bool(arguments.tls_cert) != bool(arguments.tls_key):
        raise UsageError("--tls-cert and --tls-key go together: make-cert makes a pair")
    _start_log(arguments.log_format)
    for said in strange_settings(session.environment):
        log.warning("%s", said)
    options = {
        "init": arguments.init,
        "interval": arguments.heartbeat_interval,
        "credential_ttl": arguments.credential_ttl,
        "audit_keep": arguments.audit_keep,
    }
    with session.open(**options) as (registry, _), _listen(session, registry) as server:
        _on_signals(server.stop)
        signal.signal(signal.SIGHUP, server.reload)
        pin = registry.announced_pin
        url = arguments.public_url or server.url
        start = Act(lambda now: registry.start_service(url, now, pin))
        registry.perform(start, session.now())
        _greet(session, server)
        _trim_memory()
        with server.woken_by_signals():
            server.serve_forever()
        _on_signals(signal.SIG_IGN)  # a second one must not spoil the exit status
    return 0


def _on_signals(action: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, action)


def _listen(session: Session, registry: Registry) -> Server:
    arguments, environment = session.arguments, session.environment
    connections = fit_connections(CONNECTIONS_MAXIMUM)
    if connections < CONNECTIONS_MAXIMUM:
        log.warning("the limit of open files allows %d connections: ulimit -Hn", connections)
    manager = environment.get("NOTIFY_SOCKET")
    try:
        return Server(
            Api(registry),
            arguments.host,
            arguments.port,
            clock=session.clock,
            connections=connections,
            load_tls=_tls_loader(arguments.tls_cert, arguments.tls_key, registry),
            listener=inherited_listener(
                environment.get("LISTEN_PID", ""), environment.get("LISTEN_FDS", "")
            ),
            proxies=arguments.trusted_proxy,
            access_log=arguments.access_log,
            notify=partial(tell_service_manager, manager) if manager else lambda state: None,
        )
    except (OSError, OverflowError) as error:
        raise OperatorError(
            f"cannot listen on {arguments.host} port {arguments.port}: {error}; choose another "
            "with --host and --port"
        ) from error


def _tls_loader(
    certificate: Optional[str], key: Optional[str], registry: Registry
) -> Optional[TlsLoader]:
    """What loads the pair that the arguments name, and announces its pin."""
    if not certificate or not key:
        return None

    def load() -> Any:
        context, leaf = load_tls(str(certificate), str(key))
        registry.announce_pin(public_key_pin(leaf))
        return context

    return load


def _greet(session: Session, server: Server) -> None:
    named = {"--db": session.arguments.db, "--key-file": session.arguments.key_file}
    usual = (DEFAULT_DATABASE, None)
    options = [word for pair in named.items() if pair[1] not in usual for word in pair]
    mint = shlex.join(["python3", "hostenroll.py", "mint-token", *options])
    if server.is_in_the_clear:
        log.warning("other machines can connect, and without TLS they send secrets in the clear")
    listens = f"hostenroll {__version__} listens on {server.url}"
    if session.arguments.log_format == "json":
        log.info(listens)
    else:
        _say(listens)
        if session.arguments.public_url:
            _say(f"hosts find it at {session.arguments.public_url}")
        _say(f"next, in another terminal: {mint}")


def _run_mint_token(session: Session) -> int:
    arguments = session.arguments
    values: Dict[str, Any] = {"ttlSeconds": arguments.ttl, "maxUses": arguments.max_uses}
    optional = {
        "organizationId": arguments.org,
        "hostname": arguments.hostname,
        "description": arguments.description,
        "labels": arguments.label,
    }
    values.update({name: value for name, value in optional.items() if value is not None})
    order = token_order(MINT_BODY.check(values))
    return _mint(session, lambda registry, by, now: registry.mint(by, order, now))


def _require_stdout() -> None:
    """Nothing is minted that nobody can read."""
    if sys.stdout is None:
        raise OperatorError("stdout is closed: the secret would be lost")


def _mint(
    session: Session, mint: Callable[[Registry, Principal, int], Tuple[TokenView, str]]
) -> int:
    """Mint a token; show its text on stdout, and on stderr what to do with it."""
    _require_stdout()
    (view, text), service = session.ask(
        lambda registry, by, now: (mint(registry, by, now), registry.service()), writes=True
    )
    document = token_document(view, text)
    is_json = session.arguments.json
    shown = json_lines(document) if is_json else text
    _hand_over(shown, "the token", str(document["id"]), "revoke-token")
    if is_json:
        return 0
    _warn_of_stop(service, session.now())
    uses = "1 use" if view.token.max_uses == 1 else f"{view.token.max_uses} uses"
    url, pin = service_place(service)
    _say(
        f"token {document['id']} of {document['organizationId']}: {uses}, "
        f"until {document['expiresAt']}",
        "enroll with it, on the host:",
        join_command(url, pin, text),
    )
    return 0


def _warn_of_stop(service: Optional[Service], now: int) -> None:
    """While no server lives, nobody can come in, and each status is as it was at its end. Before
    the first one there is nothing to be mistaken about, and it may be starting just now."""
    if service is not None and not is_served(service, now):
        last = ago(rfc3339(service.alive), now)
        _say(f"no server is running, the last was {last}, and no host is heard: serve starts one")


def _run_list_tokens(session: Session) -> int:
    arguments = session.arguments
    query = TokenQuery(_organization(arguments.org), arguments.state)
    documents = [
        token_document(view)
        for view in _all_pages(session, Registry.tokens, query, arguments.limit)
    ]
    session.print_list("tokens", documents, TOKEN_COLUMNS, is_part=query != TokenQuery())
    return 0


def _organization(name: Optional[str]) -> Optional[str]:
    return None if name is None else str(HOSTS_QUERY.read([("organization", name)])["organization"])


def _all_pages(
    session: Session,
    turn: Callable[[Registry, Principal, Any, int], Page],
    query: Any,
    limit: Optional[int] = None,
) -> List[Any]:
    """A whole list, or its first part, a slice in each transaction."""
    items: List[Any] = []
    with session.progress() as progress, session.open() as (registry, by):
        before: Optional[int] = query.before
        while before is not None and (limit is None or len(items) < limit):
            act = partial(turn, registry, by, query._replace(before=before, limit=PAGE_MAXIMUM))
            page = registry.perform(Act(act, writes=False), session.now())
            items += page.items
            before = page.next
            progress(len(items))
    return items[:limit]


def typed_id(session: Session) -> int:
    """The number of the id that was typed. Raises NotFound, which says what to type instead."""
    text = session.arguments.id
    if ID.fullmatch(text):
        return int(text, 16)
    secret = re.match(r"(het|hak)_([0-7][0-9a-f]{15})_", text)
    if secret:
        kind = {"het": "a token", "hak": "an API key"}[secret[1]]
        raise NotFound(f"This is {kind}, which is secret. Its id is {secret[2]}.")
    alike = LIKE[session.arguments.command.listed_by](session, text.rpartition(":")[2])
    if 0 < len(alike) < ALIKE_MAXIMUM:
        meant = " or ".join(alike)
        raise NotFound(f"There is no id {printable(text)!r}; perhaps you mean {meant}.")
    raise NotFound(f"There is no id {printable(text)!r}.")


ALIKE_MAXIMUM = 4  # more are no help, and looked for no further


def _hosts_like(session: Session, text: str) -> List[str]:
    views = _all_pages(session, Registry.hosts, HostQuery(text=text), ALIKE_MAXIMUM)
    return [f"{id_text(view.host.id)} ({view.host.name})" for view in views]


def _tokens_like(session: Session, text: str) -> List[str]:
    ids = [id_text(view.token.id) for view in _all_pages(session, Registry.tokens, TokenQuery())]
    return [number for number in ids if number.startswith(text.lower())]


def _api_keys_like(session: Session, text: str) -> List[str]:
    keys = session.ask(lambda r, by, now: r.api_keys(), writes=False)
    return [id_text(key.id) for key in keys if id_text(key.id).startswith(text.lower())]


LIKE = {
    "list-hosts": _hosts_like,
    "list-tokens": _tokens_like,
    "list-api-keys": _api_keys_like,
}


def _run_show_token(session: Session) -> int:
    number = typed_id(session)
    view = session.ask(lambda r, by, now: r.token(by, number, now), writes=False)
    session.print_one(token_document(view))
    return 0


def _run_list_hosts(session: Session) -> int:
    arguments = session.arguments
    asked = {"organization": arguments.org, "status": arguments.status, "q": arguments.q}
    pairs = [(name, text) for name, text in asked.items() if text is not None]
    pairs += [("label", text) for text in arguments.label]
    query = host_query(HOSTS_QUERY.read(pairs))
    documents = [
        host_document(view) for view in _all_pages(session, Registry.hosts, query, arguments.limit)
    ]
    session.print_list("hosts", documents, HOST_COLUMNS, is_part=bool(pairs))
    if not arguments.json:
        service = session.ask(lambda registry, by, now: registry.service(), writes=False)
        _warn_of_stop(service, session.now())
    return 0


def _run_show_host(session: Session) -> int:
    number = typed_id(session)
    view = session.ask(lambda r, by, now: r.host(by, number, now), writes=False)
    session.print_one(host_document(view))
    return 0


def _run_edit_host(session: Session) -> int:
    arguments = session.arguments
    changes: Dict[str, Any] = {}
    if arguments.name is not None:
        changes["name"] = arguments.name
    if arguments.label and arguments.no_labels:
        raise UsageError("--no-labels does not go with --label")
    if arguments.label or arguments.no_labels:
        changes["labels"] = arguments.label
    EDIT_BODY.check(changes)
    number = typed_id(session)
    view = session.ask(lambda r, by, now: r.edit_host(by, number, changes, now), writes=True)
    session.print_one(host_document(view))
    return 0


def _run_reenroll_host(session: Session) -> int:
    arguments = session.arguments
    order = token_order(REENROLL_BODY.check({"ttlSeconds": arguments.ttl}))
    number = typed_id(session)
    return _mint(session, lambda registry, by, now: registry.reenroll(by, number, order, now))


def _run_add_org(session: Session) -> int:
    name = str(ORGANIZATION_BODY.check({"name": session.arguments.name})["name"])
    made = session.ask(lambda r, by, now: r.add_organization(by, name, now), writes=True)
    session.report(
        organization_document(made), f"organization {name} is there: mint-token --org {name}"
    )
    return 0


def _run_list_orgs(session: Session) -> int:
    organizations = session.ask(lambda r, by, now: r.organizations(), writes=False)
    documents = [organization_document(organization) for organization in organizations]
    session.print_list("organizations", documents, ORGANIZATION_COLUMNS)
    return 0


def _run_mint_api_key(session: Session) -> int:
    arguments = session.arguments
    if arguments.all_orgs and arguments.org is not None:
        raise UsageError("--org does not go with --all-orgs")
    one = DEFAULT_ORGANIZATION if arguments.org is None else arguments.org
    organization = ALL_ORGANIZATIONS if arguments.all_orgs else one
    description = API_KEY_BODY.check({"description": arguments.description})["description"]

    _require_stdout()

    def mint(registry: Registry, by: Principal, now: int) -> Tuple[ApiKey, str]:
        return registry.mint_api_key(by, organization, arguments.role, description, now)

    key, text = session.ask(mint, writes=True)
    shown = json_lines(api_key_document(key, text)) if arguments.json else text
    _hand_over(shown, "the API key", id_text(key.id), "revoke-api-key")
    if not arguments.json:
        whose = key.organization_id or "all organizations"
        said = f"API key {id_text(key.id)}: {key.role} of {whose}"
        _say(f"{said}; it signs in to the server's page too")
    return 0


def _run_list_api_keys(session: Session) -> int:
    keys = session.ask(lambda r, by, now: r.api_keys(), writes=False)
    documents = [api_key_document(key) for key in keys]
    session.print_list("apiKeys", documents, API_KEY_COLUMNS)
    return 0


def _run_list_signing_keys(session: Session) -> int:
    views = session.ask(lambda r, by, now: r.signing_keys(), writes=False)
    documents = [signing_key_document(view) for view in views]
    session.print_list("signingKeys", documents, SIGNING_KEY_COLUMNS)
    return 0


def _run_rotate_signing_key(session: Session) -> int:
    kid = session.ask(lambda r, by, now: r.rotate_signing_key(by, now), writes=True)
    if session.arguments.json:
        print_json(_signing_key(session, kid))
        return 0
    _print(kid)
    _say(
        "signs from now on; hosts move to it when they beat: list-signing-keys counts them,",
        "and retire-signing-key ends an old one",
    )
    return 0


def _run_retire_signing_key(session: Session) -> int:
    kid, force = session.arguments.kid, session.arguments.force
    hosts = session.ask(lambda r, by, now: r.retire_signing_key(by, kid, force, now), writes=True)
    if session.arguments.json:
        print_json({**_signing_key(session, kid), "hosts": hosts})
    else:
        _say(f"signing key {kid} is retired; hosts that must re-enroll, at most: {hosts}")
    return 0


def _signing_key(session: Session, kid: str) -> Document:
    views = session.ask(lambda r, by, now: r.signing_keys(), writes=False)
    return next(signing_key_document(view) for view in views if view.key.kid == kid)


def _run_show_audit(session: Session) -> int:
    arguments = session.arguments
    asked = {
        "organization": arguments.org,
        "action": arguments.action,
        "subject": arguments.subject,
        "code": arguments.code,
    }
    pairs = [(name, text) for name, text in asked.items() if text is not None]
    query = event_query(AUDIT_QUERY.read(pairs))
    events = _all_pages(session, Registry.events, query, arguments.limit)
    documents = [event_document(event) for event in events]
    session.print_list("events", documents, EVENT_COLUMNS)
    return 0


def _run_verify_audit(session: Session) -> int:
    asked = session.arguments.head
    head = None if asked is None else bytes.fromhex(asked)
    verified = session.wait_for(
        lambda r, by, now, report: r.verify_audit(head, report), writes=False
    )
    if head is not None and not verified.has_head:
        raise OperatorError(
            "the audit log has no event with this head: its end has been cut off, or all of it "
            "up to there is pruned"
        )
    if session.arguments.json:
        print_json(
            {
                "head": verified.head.hex(),
                "first": verified.first,
                "last": verified.last,
                "unverified": verified.unverified,
            }
        )
        return 0
    _print(verified.head.hex())
    _say(
        f"{said_of(verified)}; the head of the log is on stdout",
        "whether its end has been cut off shows only with --head, the head of an earlier run"
        if head is None
        else "nothing up to the head given has been cut off; "
        "what came after it only a later head can show",
    )
    return 0


def mac_text(text: str) -> str:
    """The head of an audit log, in hexadecimal digits. Raises ArgumentTypeError."""
    if not text:  # of a file that has been lost: any log would satisfy it
        raise argparse.ArgumentTypeError("it is empty, and so shows nothing: leave it out")
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not what verify-audit prints")
    return text


def _run_backup(session: Session) -> int:
    folder = session.arguments.folder
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError as error:
        raise OperatorError(f"cannot make the folder {folder}: {error.strerror}") from error
    os.nice(BACKUP_NICENESS)
    with session.progress() as progress, session.open() as (registry, _):
        try:
            database, key_file = registry.back_up(folder, progress)
        except StoreError as error:
            raise OperatorError(f"{error}") from error
    session.report(
        {"database": database, "keyFile": key_file},
        f"copied the database to {database} and its keys to {key_file}: keep both secret",
    )
    return 0


def _run_check(session: Session) -> int:
    with session.progress() as progress:
        findings = examine(session.arguments.db, session.key_file, progress)
    is_good = all(finding.is_good for finding in findings)
    documents = [{"name": f.name, "ok": f.is_good, "detail": f.detail} for f in findings]
    if session.arguments.json:
        print_json({"ok": is_good, "findings": documents})
    else:
        session.print_table(documents, FINDING_COLUMNS)
    return 0 if is_good else EXIT_FAILED


def _unit_word(text: str) -> str:
    """A word as systemd reads it: systemd.syntax(7), and the specifiers of systemd.unit(5)."""
    escaped = text.replace("\\", r"\\").replace('"', r"\"").replace("%", "%%")
    return f'"{escaped}"'


def _run_unit(session: Session) -> int:
    if session.arguments.socket:
        _print(SOCKET_UNIT, end="")
        return 0
    program = os.path.abspath(__file__)
    # It looks for variables in arguments, and not in the path of what it runs: systemd.service(5).
    start = f"{_unit_word(sys.executable)} {_unit_word(program).replace('$', '$$')} serve"
    _print(UNIT.substitute(start=start, typed=shlex.join([sys.executable, program])), end="")
    for path in (sys.executable, program):
        if path.startswith(("/home/", "/root/", "/tmp/", "/var/tmp/")):
            _say(f"the service cannot see {path}: use one elsewhere, as in /usr/local/lib")
    return 0


def _run_make_cert(session: Session) -> int:
    arguments = session.arguments
    names = [_subject_alternative_name(name) for name in arguments.name]
    if os.path.realpath(arguments.tls_cert) == os.path.realpath(arguments.tls_key):
        raise OperatorError("--tls-cert and --tls-key name the same file")
    for path in (arguments.tls_cert, arguments.tls_key):
        if os.path.lexists(path):
            raise OperatorError(f"{path} is there already: remove it, or name another file")
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise OperatorError(f"there is no folder for {path}")
    _make_pair(arguments.tls_cert, arguments.tls_key, arguments.name[0], names, arguments.days)
    pin = public_key_pin(load_tls(arguments.tls_cert, arguments.tls_key)[1])
    session.report(
        {"certificate": arguments.tls_cert, "key": arguments.tls_key, "pin": pin},
        f"made {arguments.tls_cert} and {arguments.tls_key}; its pin is {pin}; now",
        f"serve --tls-cert {shlex.quote(arguments.tls_cert)} "
        f"--tls-key {shlex.quote(arguments.tls_key)}",
    )
    return 0


def _make_pair(certificate: str, key: str, subject: str, names: Sequence[str], days: int) -> None:
    import subprocess  # two commands of all need it, and it costs each a hundredth of a second

    os.close(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, KEY_FILE_MODE))
    command = [
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
        *("-nodes", "-sha256", "-days", str(days), "-subj", f"/CN={subject}"),
        *("-addext", f"subjectAltName={','.join(names)}", "-keyout", key, "-out", certificate),
    ]
    failure: Optional[str] = "interrupted"
    try:
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        failure = _openssl_failure(made.returncode, made.stderr) if made.returncode else None
    except OSError as error:  # it is not there, or not for us
        failure = (
            f"the openssl program cannot be run ({error.strerror}): make a pair on another "
            "machine, and copy it here"
        )
    finally:
        for path in (key, certificate) if failure else ():  # or the next try finds them there
            with suppress(FileNotFoundError):
                os.remove(path)
    if failure:
        raise OperatorError(f"cannot make a certificate: {failure}")


def _openssl_failure(status: int, stderr: str) -> str:
    """The last that it said but for its signs of life: dots, and a line of dashes."""
    said = [line for line in stderr.splitlines() if line.strip("-.+* ")]
    return said[-1] if said else f"openssl ended with {status}"


def _subject_alternative_name(name: str) -> str:
    if "%" not in name:  # a zone is of one machine, and may be any text
        with suppress(ValueError):
            return f"IP:{ipaddress.ip_address(name)}"
    label = "[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"
    if len(name) > 64 or not re.fullmatch(rf"(\*\.)?{label}(\.{label})*", name):
        raise OperatorError(
            f"{printable(name)!r} is no name for a server: letters, digits, . and -"
        )
    return f"DNS:{name}"


def _run_schema(session: Session) -> int:
    _print(SCHEMA, end="")
    return 0


def _run_agent_script(session: Session) -> int:
    _print(AGENT_SCRIPT, end="")
    return 0


def _run_openapi(session: Session) -> int:
    print_json(openapi_document())
    return 0


# The benchmark: a scratch fleet in a temporary folder, the real server in a process of its own, and
# in another one the load.

HEARTBEAT_REQUEST = (
    b"POST /api/agent/heartbeat HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: curl/8.5.0\r\n"
    b"Accept: */*\r\nAuthorization: Bearer %b\r\n%b\r\n"
)
ENROLL_REQUEST = (
    b"POST /api/agent/enroll HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: curl/8.5.0\r\n"
    b"Accept: */*\r\nContent-Length: %d\r\n%b\r\n%b"
)
PS_USAGE = re.compile(r"\s*(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)\s+(\d+)\s*")
BENCH_QUANTILES = {"p50": 500, "p99": 990, "p999": 999}
BENCH_RULE = (
    f"Can hold: {BENCH_SHARE:.0%} of the heartbeats that one core of the server answers at full "
    "load, and no more than were answered at all. They were then sent at that rate, whatever had "
    f"been answered: where p99, from when each was due, was over {BENCH_P99 * SECOND_MS:.0f} ms, "
    f"at {BENCH_SHARE:.0%} of it, and so on; the last rate counts."
)
BENCH_RATE_RULE = (
    f"Can hold: what --rate says, if p99, from when each heartbeat was due, was at most "
    f"{BENCH_P99 * SECOND_MS:.0f} ms."
)


class Bench(NamedTuple):
    """What the process that makes the load knows."""

    arguments: argparse.Namespace
    now: int
    fleet: array[int]  # the ids of its hosts
    key: SigningKey  # that their credentials are signed with
    token: str
    newcomers: int  # that are to enroll by it
    certificate: Optional[str]
    server: int  # its process id
    port: int


def read_ps(text: str) -> Tuple[float, int]:
    """CPU seconds and resident bytes, as ps shows them as time and rss."""
    match = PS_USAGE.fullmatch(text)
    if match is None:
        raise OperatorError("the server is gone, or neither /proc nor ps tells what it takes")
    days, hours, minutes, seconds, kibibytes = match.groups()
    whole = int(days or 0) * DAY + int(hours or 0) * HOUR + int(minutes) * MINUTE
    return whole + float(seconds), int(kibibytes) * 1024


def process_usage(process: int) -> Tuple[float, int]:
    """The CPU seconds that a process has taken, and its resident bytes."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except FileNotFoundError:
        import subprocess

        command = ["ps", "-o", "time=", "-o", "rss=", "-p", str(process)]
        return read_ps(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    ticks = int(fields[11]) + int(fields[12])  # utime and stime of proc(5); rss is the 24th there
    return ticks / os.sysconf("SC_CLK_TCK"), int(fields[21]) * os.sysconf("SC_PAGE_SIZE")


def heartbeats(fleet: Iterable[int], key: SigningKey, end: bytes, now: int) -> Iterator[bytes]:
    """A heartbeat of one host after the other, for ever: of each before any comes again, as in a
    fleet, and in an order that has nothing to do with that of the database."""
    order = array("q", fleet)
    random.shuffle(order)
    while True:
        for host in order:
            claims = Claims(host, DEFAULT_ORGANIZATION, now // SECOND_MS, 1, None, key.kid)
            yield HEARTBEAT_REQUEST % (key.sign(claims).encode("ascii"), end)


def _bench_facts(number: int) -> Dict[str, str]:
    return {
        "hostname": f"host-{number:07d}.example.net",
        "os": "Debian GNU/Linux 12 (bookworm)",
        "architecture": "x86_64",
        "docker_version": "27.3.1",
    }


def enrollments(token: str, numbers: Iterable[int], end: bytes) -> Iterator[bytes]:
    """An enrollment by one token after the other."""
    for number in numbers:
        facts = _bench_facts(number)
        facts["dockerVersion"] = facts.pop("docker_version")
        body = json.dumps({"token": token, **facts}).encode("ascii")
        yield ENROLL_REQUEST % (len(body), end, body)


class Driver:
    """What the process does that makes the load, step by step."""

    def __init__(self, bench: Bench, load: Load, tell: Callable[[str], None]) -> None:
        self._bench = bench
        self._load = load
        self._tell = tell
        self._end = b"Connection: close\r\n" if bench.arguments.close else b""
        self._resident = 0

    def run(self) -> Document:
        """All steps; what came of them."""
        bench, seconds = self._bench, self._bench.arguments.seconds
        document: Document = {"enrollments": self._enroll()}
        beats = heartbeats(bench.fleet, bench.key, self._end, bench.now)
        # First as in a fleet that beats already: each host once, or as many as time allows.
        once = (beat for beat, _ in zip(beats, bench.fleet))
        self._measure("warming up", once, seconds / 2)
        full = self._measure("full load", beats, seconds)
        document["fullLoad"] = full
        document["paced"] = paced = []
        for rate in paced_rates(bench.arguments.rate, full):
            tried = self._measure(f"{rate:,} heartbeats a second", beats, seconds, rate)
            paced.append({"duePerSecond": rate, **tried})
            if tried["p99Milliseconds"] <= BENCH_P99 * SECOND_MS:
                break
        return {**document, "memoryBytes": self._resident}

    def _enroll(self) -> Document:
        bench = self._bench
        fleet = bench.fleet
        numbers = range(len(fleet), len(fleet) + bench.newcomers)

        def take(body: bytes) -> None:
            fleet.append(read_id(json.loads(body)["hostId"]))

        requests = enrollments(bench.token, numbers, self._end)
        return self._measure("enrollments", requests, math.inf, take=take)

    def _measure(
        self,
        what: str,
        requests: Iterator[bytes],
        seconds: float,
        rate: Optional[int] = None,
        take: Callable[[bytes], object] = _ignore,
    ) -> Document:
        latencies = Histogram(LATENCY_BUCKETS)
        # Hosts are many and know nothing of each other: the gaps between them are exponential.
        gaps = None if rate is None else iter(partial(random.expovariate, rate), -1.0)
        before = process_usage(self._bench.server)[0], time.process_time()
        done = self._load.run(
            requests,
            seconds,
            latencies.observe,
            gaps=gaps,
            take=take,
            tell=partial(self._watch, what),
        )
        self._watch(what, done.answered)
        after = process_usage(self._bench.server)[0], time.process_time()
        return load_document(done, latencies, after[0] - before[0], after[1] - before[1])

    def _watch(self, what: str, answered: int) -> None:
        self._resident = max(self._resident, process_usage(self._bench.server)[1])
        self._tell(f"{what}: {answered:,} answered")


def paced_rates(asked: Optional[int], full: Mapping[str, Any]) -> List[int]:
    """What to try after a full load, in heartbeats a second, until one is answered in time. It
    may have been the load that kept the server from more: then CPU per heartbeat says how much a
    core of it could do."""
    if asked is not None:
        return [asked]
    answered, each = float(full["perSecond"]), float(full["serverCpuMicrosecondsEach"])
    wanted = min(answered, BENCH_SHARE * 1e6 / each) if each else BENCH_SHARE * answered
    return [max(1, round(wanted * BENCH_SHARE**tried)) for tried in range(BENCH_TRIES)]


def load_document(done: Loaded, latencies: Histogram, server: float, own: float) -> Document:
    """Load: what has come of one, with the CPU seconds that it has cost the server, and those
    that it took to make it."""
    quantiles = {
        f"{name}Milliseconds": round(latencies.quantile(per_mille) * SECOND_MS, 3)
        for name, per_mille in BENCH_QUANTILES.items()
    }
    return {
        "answered": done.answered,
        "unanswered": done.unanswered,
        "seconds": round(done.seconds, 3),
        "perSecond": round(done.answered / done.seconds, 1),
        "serverCpuMicrosecondsEach": round(server * 1e6 / max(1, done.answered), 2),
        "serverCpuShareOfOneCore": round(server / done.seconds, 3),
        "loadCpuShareOfOneCore": round(own / done.seconds, 3),
        **quantiles,
    }


def _drive(bench: Bench, pipe: Any, other_end: Any) -> None:
    """The process that makes the load: all that it has to say goes into the pipe."""
    other_end.close()  # it came with the fork, and we are to notice when nobody reads
    _on_end(signal.SIG_IGN)  # the parent ends it

    def tell(kind: str, said: Any) -> None:
        try:
            pipe.send((kind, said))
        except BrokenPipeError:  # the parent was killed: nobody else will end the server
            with suppress(ProcessLookupError):
                os.kill(bench.server, signal.SIGTERM)
            sys.exit(EXIT_FAILED)

    arguments = bench.arguments
    try:
        tls = trusting(bench.certificate) if bench.certificate else None
        load = Load(bench.port, arguments.connections, close=arguments.close, tls=tls)
        tell("done", Driver(bench, load, partial(tell, "progress")).run())
        load.close()
    except OperatorError as error:
        tell("failed", str(error))
    except OSError as error:
        tell("failed", f"cannot go on with the load: {error}")


def _interrupt(*_: object) -> None:
    _on_end(signal.SIG_IGN)  # a second one must not spoil the cleaning up
    raise KeyboardInterrupt


def _on_end(action: Any) -> None:
    _on_signals(action)
    signal.signal(signal.SIGHUP, action)


def _hold_signals() -> List[int]:
    """Let none come between the start of a child and our knowing of it: until _release_signals()
    they are kept in this list."""
    held: List[int] = []
    _on_end(lambda number, _: held.append(number))
    return held


def _release_signals(held: Sequence[int]) -> None:
    _on_end(_interrupt)
    if held:
        _interrupt()


def _run_bench(session: Session) -> int:
    import tempfile

    arguments = session.arguments
    if fit_connections(arguments.connections) < arguments.connections:
        raise OperatorError("the limit of open files allows fewer --connections: ulimit -Hn")
    _on_end(_interrupt)
    with tempfile.TemporaryDirectory(prefix="hostenroll-bench-") as folder:
        _require_room(folder, arguments.hosts)
        document = _bench(session, folder)
    if arguments.json:
        print_json(document)
    else:
        _print_bench(document)
    return 0


def _require_room(folder: str, hosts: int) -> None:
    import shutil

    free, needed = shutil.disk_usage(folder).free, hosts * BENCH_BYTES_PER_HOST + 2 * WAL_MAXIMUM
    if free < needed:
        raise OperatorError(
            f"{hosts} hosts need some {needed >> 20} MiB in {os.path.dirname(folder)}, and "
            f"{free >> 20} are free: name another folder in TMPDIR, or fewer --hosts"
        )


def _bench(session: Session, folder: str) -> Document:
    import shutil

    arguments = session.arguments
    files = [os.path.join(folder, name) for name in (DEFAULT_DATABASE, DEFAULT_KEY_FILE)]
    options = ["--port", "0"]
    certificate = None
    if arguments.tls:
        if shutil.which("openssl") is None:
            raise OperatorError("--tls needs the program openssl, for a certificate of its own")
        certificate, tls_key = os.path.join(folder, "tls.crt"), os.path.join(folder, "tls.key")
        _make_pair(certificate, tls_key, DEFAULT_HOST, [f"IP:{DEFAULT_HOST}"], 1)
        options += ["--tls-cert", certificate, "--tls-key", tls_key]
    most = arguments.seconds * BENCH_ENROLLED_A_SECOND
    newcomers = min(arguments.hosts // 2, most, BENCH_ENROLLED)
    registry = open_registry(files[0], files[1], session.now())
    key = load_keyring(files[1]).first
    try:
        with session.progress("making the fleet") as progress:
            wanted = arguments.hosts - newcomers
            fleet = _make_fleet(registry, wanted, key.kid, session.now, progress)
        token = _token(registry, newcomers, session.now())
    finally:
        registry.close()
    sync_file(files[0])  # or else the disk is busy with it while the server is measured
    with _scratch_server(session.environment, folder, options) as (server, port):
        now = session.now()
        bench = Bench(arguments, now, fleet, key, token, newcomers, certificate, server, port)
        document = _drive_elsewhere(bench, session.progress("measuring"))
    size = os.path.getsize(files[0])
    return bench_document(arguments, document, size)


def _token(registry: Registry, uses: int, now: int) -> str:
    by = Principal("cli:bench", ALL_ORGANIZATIONS, "admin")
    order = TokenOrder(max_uses=uses)
    return str(registry.perform(Act(lambda now: registry.mint(by, order, now)[1]), now))


def _make_fleet(
    registry: Registry, hosts: int, kid: str, clock: Callable[[], int], report: Report
) -> array[int]:
    """Enroll hosts by the rules, a whole transaction of them at once and without HTTP, and let
    each beat once: rows, history and size are those of a real fleet. Their ids."""
    fleet = array("q")
    standing = Standing(1, DEFAULT_ORGANIZATION, kid)
    while len(fleet) < hosts:
        numbers = range(len(fleet), min(hosts, len(fleet) + BENCH_BATCH))
        now = clock()
        admit = partial(_admit, registry, _token(registry, len(numbers), now), numbers)
        batch = registry.perform(Act(admit, durable=False), now)
        registry.tick([(it, standing) for it in batch], now)
        registry.tidy()
        fleet.extend(batch)
        report(len(fleet), hosts)
    return fleet


def _admit(registry: Registry, token: str, numbers: Iterable[int], now: int) -> List[int]:
    hosts = []
    for number in numbers:
        applicant = Applicant(
            token=token,
            name=None,
            idempotency_key=None,
            address=str(ipaddress.IPv4Address((10 << 24) + number)),
            **_bench_facts(number),
        )
        hosts.append(registry.enroll(applicant, now).host.id)
    return hosts


@contextmanager
def _scratch_server(
    environment: Mapping[str, str], folder: str, options: Sequence[str]
) -> Iterator[Tuple[int, int]]:
    """A server on what is in a folder: its process id, and its port."""
    import subprocess

    ours = (ENVIRONMENT_PREFIX, "NOTIFY_SOCKET", "LISTEN_")
    clean = {name: text for name, text in environment.items() if not name.startswith(ours)}
    said = os.path.join(folder, "log")
    held = _hold_signals()
    with open(said, "wb") as file:
        server = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "serve", *options],
            cwd=folder,
            env=clean,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    try:
        _release_signals(held)
        yield server.pid, _await_port(said, lambda: server.poll() is None)
    except OperatorError as error:
        raise OperatorError(f"{error}{_complaint(said)}") from error
    finally:
        _on_end(signal.SIG_IGN)
        server.terminate()
        try:
            server.wait(2 * SHUTDOWN_DEADLINE)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _await_port(said: str, lives: Callable[[], bool]) -> int:
    """The port of a server, by what it says when it listens. Raises OperatorError."""
    deadline = time.monotonic() + BENCH_START
    while lives() and time.monotonic() < deadline:
        with open(said, encoding="utf-8", errors="replace") as file:
            listens = re.search(r" listens on https?://\S+:([0-9]+)\n", file.read())
        if listens:
            return int(listens[1])
        time.sleep(BENCH_POLL)
    raise OperatorError("the server does not start")


def _complaint(said: str) -> str:
    """What a server said last, other than its greeting."""
    with open(said, encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if not line.startswith(("hostenroll ", "next, "))]
    return f"; the server said: {lines[-1].strip()}" if lines else ""


def _drive_elsewhere(bench: Bench, progress: Progress) -> Document:
    """Make the load in a process of its own; what came of it. Progress begins after the fork, which
    is not for a process with several threads. Raises OperatorError."""
    import multiprocessing

    context = multiprocessing.get_context("fork")  # it has the fleet, and needs no file of it
    ours, theirs = context.Pipe(duplex=False)
    driver = context.Process(target=_drive, args=(bench, theirs, ours), daemon=True)
    held = _hold_signals()
    driver.start()
    try:
        _release_signals(held)
        theirs.close()
        with progress:
            return _outcome(ours, progress)
    finally:
        _on_end(signal.SIG_IGN)  # what follows is cleaning up
        driver.kill()
        driver.join()


def _outcome(pipe: Any, progress: Progress) -> Document:
    while True:
        try:
            kind, said = pipe.recv()
        except EOFError:
            raise OperatorError("the process that makes the load has ended") from None
        if kind == "progress":
            progress.what = said
        elif kind == "failed":
            raise OperatorError(said)
        else:
            return cast(Document, said)


def bench_document(
    arguments: argparse.Namespace, measured: Mapping[str, Any], database: int
) -> Document:
    """Bench: what was measured and how, and how many hosts the box can hold, by which rule."""
    last = measured["paced"][-1]
    holds = last["duePerSecond"] if last["p99Milliseconds"] <= BENCH_P99 * SECOND_MS else 0
    return {
        "version": __version__,
        "python": sys.version.split()[0],
        "sqlite": SQLITE_VERSION,
        "cores": os.cpu_count(),
        "hosts": arguments.hosts,
        "seconds": arguments.seconds,
        "connections": arguments.connections,
        "close": arguments.close,
        "tls": arguments.tls,
        **measured,
        "databaseBytes": database,
        "databaseBytesPerHost": round(database / arguments.hosts),
        "rule": BENCH_RULE if arguments.rate is None else BENCH_RATE_RULE,
        "heldPerSecond": holds,
        "hostsAt30Seconds": holds * 30,
        "hostsAt60Seconds": holds * 60,
    }


def _print_bench(document: Mapping[str, Any]) -> None:
    import textwrap

    how = "a connection for each request" if document["close"] else "kept alive"
    over = " over TLS" if document["tls"] else ""
    rows = [
        ("fleet", f"{document['hosts']:,} hosts"),
        ("", f"{document['connections']} connections, {how}{over}"),
        *_load_rows("enrollments", document["enrollments"]),
        *_load_rows("full load", document["fullLoad"]),
        *(row for tried in document["paced"] for row in _load_rows("paced", tried)),
        ("memory", f"{document['memoryBytes'] / 2**20:.0f} MiB"),
        ("database", f"{document['databaseBytes'] / 2**20:.1f} MiB"),
        ("", f"{document['databaseBytesPerHost']} bytes a host"),
        ("can hold", f"{document['hostsAt30Seconds']:,} hosts at 30 s"),
        ("", f"{document['hostsAt60Seconds']:,} hosts at 60 s"),
    ]
    _print(table(rows))
    rule = document["rule"]
    if document["hostsAt60Seconds"] > 2 * document["hosts"]:
        rule += " It is a larger fleet than was measured, and one costs more: try it with --hosts."
    _print(textwrap.fill(rule, 100))
    full = document["fullLoad"]
    if full["serverCpuShareOfOneCore"] + full["loadCpuShareOfOneCore"] < BENCH_BUSY:
        _print(
            "At full load processors were idle or elsewhere: other programs run, or disks are slow."
        )


def _load_rows(name: str, load: Mapping[str, Any]) -> Iterator[Tuple[str, str]]:
    due = f"{load['duePerSecond']:,} due a second, answered " if "duePerSecond" in load else ""
    given_up = f", given up {load['unanswered']:,}" if load["unanswered"] else ""
    yield name, f"{due}{load['perSecond']:,.0f} a second{given_up}"
    each, share = load["serverCpuMicrosecondsEach"], load["serverCpuShareOfOneCore"]
    own = load["loadCpuShareOfOneCore"]
    yield "", f"{each:.0f} us of server CPU each, {share:.0%} of a core; the load {own:.0%}"
    took = (f"{load[f'{name}Milliseconds']:.2f}" for name in BENCH_QUANTILES)
    yield "", f"answered in {' / '.join(took)} ms (p50 / p99 / p99.9)"


# What the command line calls those members of bodies and queries that it has other names for.
OPTIONS = {
    "labels": "--label",
    "maxUses": "--max-uses",
    "organization": "--org",
    "organizationId": "--org",
    "ttlSeconds": "--ttl",
}


class Argument:
    """One argument of a command, as argparse takes it."""

    def __init__(self, *names: str, **options: Any) -> None:
        self.names = names
        self.options = options


JSON_OPTION = Argument("--json", action="store_true", help="print JSON, in the API's shapes")
LIMIT_OPTION = Argument("--limit", type=positive, metavar="N", help="only the newest")
ORG_OPTION = Argument("--org", metavar="NAME", help="only this organization")


def _file(name: str, default: Optional[str], help: str) -> Argument:
    return Argument(name, type=file_name, default=default, metavar="FILE", help=help)


STORE_OPTIONS = (
    _file("--db", DEFAULT_DATABASE, "the database (%(default)s)"),
    _file("--key-file", None, "the keys (hostenroll.key beside the database)"),
)
SWITCH = {"nargs": "?", "const": True, "type": switch, "default": "no", "metavar": "no"}
SERVE_OPTIONS = (
    Argument(
        "--host",
        type=address_text,
        default=DEFAULT_HOST,
        help="the address to listen on (%(default)s)",
    ),
    Argument(
        "--port",
        type=port_number,
        default=str(DEFAULT_PORT),
        help="the port to listen on, 0 for a free one (%(default)s)",
    ),
    Argument(
        "--heartbeat-interval",
        type=within(HEARTBEAT_INTERVAL_RANGE, duration, span),
        default=f"{HEARTBEAT_INTERVAL}s",
        metavar="TIME",
        help="how often hosts are to beat (%(default)s)",
    ),
    Argument(
        "--credential-ttl",
        type=within(CREDENTIAL_TTL_RANGE, duration, span),
        metavar="TIME",
        help="how long credentials live, and are renewed in time (forever)",
    ),
    _file("--tls-cert", None, "speak TLS, with this certificate chain in PEM"),
    _file("--tls-key", None, "its key, in PEM; SIGHUP loads both anew"),
    Argument(
        "--public-url",
        type=web_address,
        metavar="URL",
        help="where agents find the server, for mint-token to print",
    ),
    Argument(
        "--trusted-proxy",
        type=networks,
        action=Gathered,
        default=(),
        metavar="CIDR",
        help="believe X-Forwarded-For from these addresses; repeatable (from nobody)",
    ),
    Argument(
        "--audit-keep",
        type=within(AUDIT_KEEP_RANGE, duration, span),
        metavar="TIME",
        help="how long the audit log is kept (forever)",
    ),
    Argument(
        "--log-format",
        type=one_of("text", "json"),
        default="text",
        metavar="FORMAT",
        help="text or json (%(default)s)",
    ),
    Argument("--access-log", **SWITCH, help="log every request, heartbeats too"),
    Argument(
        "--init",
        **SWITCH,
        help="make what is missing of database and key file, though the other is there",
    ),
)


SETTINGS = (*STORE_OPTIONS, *SERVE_OPTIONS)


def choice(metavar: str, known: Sequence[str], default: Optional[str] = None) -> Dict[str, Any]:
    """What argparse is told of an option that takes one of a few words."""
    said = ", ".join(known) + (" (%(default)s)" if default else "")
    return {"type": one_of(*known), "metavar": metavar, "default": default, "help": said}


class Command(NamedTuple):
    """One command: what it does, an example, and what it takes."""

    name: str
    summary: str
    example: str
    run: Callable[[Session], int]
    arguments: Sequence[Argument] = ()
    uses_store: bool = True
    listed_by: str = ""  # the command that lists what its id names

    @property
    def operands(self) -> List[str]:
        """What it takes beside options."""
        positional = [one for one in self.arguments if not one.names[0].startswith("-")]
        return [str(one.options["metavar"]) for one in positional]

    def typed(self, member: str) -> str:
        """What it calls a member of a body or query."""
        option = OPTIONS.get(member, f"--{member}")
        metavars = {one.names[0]: one.options.get("metavar", "") for one in self.arguments}
        return option if option in metavars else str(metavars.get(member, member))


def _act(
    act: Callable[[Registry, Principal, int, int], Document], outcome: str
) -> Callable[[Session], int]:
    """What a command does that acts on what an id names, and shows what has become of it."""

    def run(session: Session) -> int:
        number = typed_id(session)
        document = session.ask(lambda r, by, now: act(r, by, number, now), writes=True)
        session.report(document, outcome.format(id=session.arguments.id))
        return 0

    return run


def _token_revoked(registry: Registry, by: Principal, number: int, now: int) -> Document:
    registry.revoke_token(by, number, now)
    return token_document(registry.token(by, number, now))


def _host_revoked(registry: Registry, by: Principal, number: int, now: int) -> Document:
    return host_document(registry.revoke_host(by, number, now))


def _host_restored(registry: Registry, by: Principal, number: int, now: int) -> Document:
    return host_document(registry.restore_host(by, number, now))


def _host_deleted(registry: Registry, by: Principal, number: int, now: int) -> Document:
    registry.delete_host(by, number, now)
    return {"id": id_text(number)}


def _api_key_revoked(registry: Registry, by: Principal, number: int, now: int) -> Document:
    return api_key_document(registry.revoke_api_key(by, number, now))


def _by_id(
    name: str, summary: str, run: Callable[[Session], int], *more: Argument, options: str = ""
) -> Command:
    return Command(
        name,
        summary,
        f"{name} 0ca4f1b28e3d7a95{options}",
        run,
        (Argument("id", metavar="ID"), *more, JSON_OPTION),
        listed_by=f"list-{name.partition('-')[2]}s",
    )


COMMANDS = (
    Command(
        "serve",
        "answer agents and operators over HTTP",
        "serve --host 127.0.0.1 --port 8080",
        _run_serve,
        SERVE_OPTIONS,
    ),
    Command(
        "mint-token",
        "make an enrollment token",
        "mint-token --ttl 30m --label rack=b4",
        _run_mint_token,
        (
            Argument("--org", metavar="NAME", help="whose hosts it lets in (default)"),
            Argument("--ttl", type=duration, default="1h", metavar="TIME", help="(%(default)s)"),
            Argument("--max-uses", type=count, default="1", metavar="N", help="(%(default)s)"),
            Argument("--hostname", metavar="H", help="bind it to the host of this name"),
            Argument("--description", metavar="TEXT", help="what it is for"),
            Argument(
                "--label",
                type=label,
                action=GatheredLabels,
                default={},
                metavar="K=V",
                help="given to the hosts that come in by it; repeatable",
            ),
            JSON_OPTION,
        ),
    ),
    Command(
        "list-tokens",
        "list tokens, the newest first",
        "list-tokens --state valid",
        _run_list_tokens,
        (
            ORG_OPTION,
            Argument("--state", **choice("STATE", TOKEN_STATES)),
            LIMIT_OPTION,
            JSON_OPTION,
        ),
    ),
    _by_id("show-token", "show a token and who came in by it", _run_show_token),
    _by_id(
        "revoke-token",
        "make a token useless",
        _act(_token_revoked, "token {id} is revoked; the hosts that it let in stay"),
    ),
    Command(
        "list-hosts",
        "list hosts, the newest first",
        "list-hosts --status offline --label rack=b4",
        _run_list_hosts,
        (
            ORG_OPTION,
            Argument("--status", **choice("STATUS", STATUSES)),
            Argument("--label", action="append", default=[], metavar="K=V"),
            Argument("--q", metavar="TEXT", help="a part of name, hostname or id"),
            LIMIT_OPTION,
            JSON_OPTION,
        ),
    ),
    _by_id("show-host", "show a host and why it has its status", _run_show_host),
    _by_id(
        "edit-host",
        "name or label a host",
        _run_edit_host,
        Argument("--name"),
        Argument(
            "--label",
            type=label,
            action=GatheredLabels,
            default={},
            metavar="K=V",
            help="the labels it is to have in place of all others; repeatable",
        ),
        Argument("--no-labels", action="store_true", help="it is to have none"),
        options=" --name web-1",
    ),
    _by_id(
        "revoke-host",
        "shut a host out until restored",
        _act(_host_revoked, "host {id} is shut out; restore-host lets it in again"),
    ),
    _by_id(
        "restore-host",
        "let a revoked host in again",
        _act(_host_restored, "host {id} is let in again; its agent asks once an hour"),
    ),
    _by_id(
        "delete-host",
        "remove a host; it must enroll anew",
        _act(_host_deleted, "host {id} is gone; the machine must enroll anew"),
    ),
    _by_id(
        "reenroll-host",
        "make a token that gives a host a new credential",
        _run_reenroll_host,
        Argument("--ttl", type=duration, default="1h", metavar="TIME", help="(%(default)s)"),
    ),
    Command(
        "add-org",
        "add an organization",
        "add-org berlin",
        _run_add_org,
        (Argument("name", metavar="NAME"), JSON_OPTION),
    ),
    Command("list-orgs", "list organizations", "list-orgs", _run_list_orgs, (JSON_OPTION,)),
    Command(
        "mint-api-key",
        "make a key for the user API",
        "mint-api-key --org berlin --role viewer",
        _run_mint_api_key,
        (
            Argument("--org", metavar="NAME", help=f"({DEFAULT_ORGANIZATION})"),
            Argument("--all-orgs", action="store_true", help="for all organizations"),
            Argument("--role", **choice("ROLE", ("admin", "viewer"), "admin")),
            Argument("--description", default="", metavar="TEXT"),
            JSON_OPTION,
        ),
    ),
    Command("list-api-keys", "list API keys", "list-api-keys", _run_list_api_keys, (JSON_OPTION,)),
    _by_id(
        "revoke-api-key",
        "make an API key useless",
        _act(_api_key_revoked, "API key {id} is revoked"),
    ),
    Command(
        "list-signing-keys",
        "list the keys that sign credentials",
        "list-signing-keys",
        _run_list_signing_keys,
        (JSON_OPTION,),
    ),
    Command(
        "rotate-signing-key",
        "sign with a new key from now on",
        "rotate-signing-key",
        _run_rotate_signing_key,
        (JSON_OPTION,),
    ),
    Command(
        "retire-signing-key",
        "accept no credential of a key any longer",
        "retire-signing-key 5b1c09d2f3a4e687",
        _run_retire_signing_key,
        (
            Argument("kid", metavar="KID"),
            Argument("--force", action="store_true", help="though hosts still use it"),
            JSON_OPTION,
        ),
    ),
    Command(
        "show-audit",
        "list what happened, the newest first",
        "show-audit --action refuse --limit 20",
        _run_show_audit,
        (
            ORG_OPTION,
            Argument("--action", **choice("ACTION", ACTIONS)),
            Argument("--subject", metavar="KIND:ID", help="as in host:0ca4f1b28e3d7a95"),
            Argument("--code", metavar="CODE", help="of a refusal"),
            LIMIT_OPTION,
            JSON_OPTION,
        ),
    ),
    Command(
        "verify-audit",
        "find what has been changed in the audit log",
        "verify-audit",
        _run_verify_audit,
        (
            Argument(
                "--head",
                type=mac_text,
                metavar="HASH",
                help="what an earlier run printed: is all still there, up to it?",
            ),
            JSON_OPTION,
        ),
    ),
    Command(
        "backup",
        "copy database and keys, also while a server runs",
        "backup /var/backups/hostenroll",
        _run_backup,
        (Argument("folder", metavar="DIR"), JSON_OPTION),
    ),
    Command(
        "check",
        "say whether database, keys and files are sound",
        "check",
        _run_check,
        (JSON_OPTION,),
    ),
    Command(
        "bench",
        "measure how many hosts this machine can hold",
        "bench --hosts 1000000",
        _run_bench,
        (
            Argument(
                "--hosts",
                type=within(BENCH_HOSTS_RANGE),
                default=str(BENCH_HOSTS),
                metavar="N",
                help="of the scratch fleet (%(default)s)",
            ),
            Argument(
                "--seconds",
                type=within(BENCH_SECONDS_RANGE),
                default=str(BENCH_SECONDS),
                metavar="S",
                help="that each step takes (%(default)s)",
            ),
            Argument(
                "--connections",
                type=within(BENCH_CONNECTIONS_RANGE),
                default=str(BENCH_CONNECTIONS),
                metavar="C",
                help="(%(default)s)",
            ),
            Argument("--close", action="store_true", help="a connection for each request"),
            Argument("--tls", action="store_true", help="over TLS"),
            Argument(
                "--rate",
                type=within(BENCH_RATE_RANGE),
                metavar="R",
                help="heartbeats a second to pace (70%% of what the machine can do)",
            ),
            Argument("--json", action="store_true", help="print JSON"),
        ),
        uses_store=False,
    ),
    Command(
        "make-cert",
        "make a self-signed certificate and its key",
        "make-cert --name enroll.lan",
        _run_make_cert,
        (
            Argument(
                "--name",
                action="append",
                required=True,
                metavar="NAME",
                help="a name or address that agents find the server by; repeatable",
            ),
            Argument(
                "--days",
                type=within(CERTIFICATE_DAYS_RANGE),
                default="3650",
                metavar="N",
                help="(%(default)s)",
            ),
            _file("--tls-cert", "hostenroll-tls.crt", "(%(default)s)"),
            _file("--tls-key", "hostenroll-tls.key", "(%(default)s)"),
            JSON_OPTION,
        ),
        uses_store=False,
    ),
    Command(
        "unit",
        "print a systemd unit",
        "unit",
        _run_unit,
        (Argument("--socket", action="store_true", help="that of a socket to go with it"),),
        uses_store=False,
    ),
    Command("schema", "print the database's schema", "schema", _run_schema, uses_store=False),
    Command(
        "openapi",
        "print the API in OpenAPI 3.1",
        "openapi",
        _run_openapi,
        uses_store=False,
    ),
    Command(
        "agent-script",
        "print the agent, for a host with sh and curl",
        "agent-script",
        _run_agent_script,
        uses_store=False,
    ),
)


# What an overview shows together; what is not named here stands in the last.
GROUPS = {
    "start": ("serve", "mint-token", "list-hosts"),
    "tokens": ("list-tokens", "show-token", "revoke-token"),
    "hosts": ("show-host", "edit-host", "revoke-host", "restore-host", "delete-host",
              "reenroll-host"),
    "organizations and API keys": ("add-org", "list-orgs", "mint-api-key", "list-api-keys",
                                   "revoke-api-key"),
    "signing keys": ("list-signing-keys", "rotate-signing-key", "retire-signing-key"),
    "operate": (),
}  # fmt: skip


def overview() -> str:
    """Every command in a line, in groups."""
    commands = {command.name: command for command in COMMANDS}
    named = {name for names in GROUPS.values() for name in names}
    lines = ["Decides who may join a fleet of machines, and knows which are alive."]
    for group, names in GROUPS.items():
        lines += ["", f"{group}:"]
        for name in names or [name for name in commands if name not in named]:
            lines.append(f"  {name:20} {commands[name].summary}")
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """argparse's, whose complaint is one line that says what to type next."""

    def __init__(self, **options: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=layout, **options)
        self.color = False  # which Python 3.14 has, and states alone have a colour here
        self.variables: Dict[str, str] = {}  # in the environment, that stand in for options
        self._words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's; of an option that is not among the words it is a variable that is wrong."""
        self._words = args or ()
        for word in self._words:
            if word.startswith("--") and word.endswith("=--"):  # argparse makes a list of nothing
                self.error(f"{word[:-3]}: -- is no value")
        return super().parse_known_args(args, namespace)

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse's, which lets a broken pipe through before Python 3.12: help, or the version."""
        if message:
            _print(message, end="")

    def error(self, message: str) -> NoReturn:
        """Raises SystemExit."""
        option, colon, said = re.sub("^argument ", "", message).partition(": ")
        if option not in [word.partition("=")[0] for word in self._words]:
            option = self.variables.get(option, option)
        said = option + colon + said
        said = said.replace("the following arguments are required:", "this needs")
        _complain(f"{said} (see: {self.prog} --help)")
        self.exit(EXIT_USAGE)


def _parser(environment: Mapping[str, str]) -> Tuple[Parser, Dict[str, Parser]]:
    """The parser of a command line, and those of the commands."""
    parser = Parser(
        prog=PROGRAM,
        usage="%(prog)s COMMAND ...",
        description=overview(),
        epilog="COMMAND --help says more, with an example. HOSTENROLL_<OPTION> in the\nenvironment "
        f"sets --db, --key-file and the options of serve.\n\n{EXIT_STATUSES}",
    )
    parser.add_argument("--version", action="version", version=f"hostenroll {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, help=argparse.SUPPRESS)
    parsers = {}
    for command in COMMANDS:
        parsers[command.name] = sub = commands.add_parser(
            command.name,
            prog=f"{parser.prog} {command.name}",
            usage=" ".join(["%(prog)s [options]", *command.operands]),
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=f"example: {parser.prog} {command.example}\n\n{EXIT_STATUSES}",
        )
        sub.set_defaults(command=command)
        for argument in (*command.arguments, *(STORE_OPTIONS if command.uses_store else ())):
            sub.add_argument(*argument.names, **argument.options)
            if argument in SETTINGS:
                _take_default(sub, argument, environment)
    return parser, parsers


def setting_of(argument: Argument) -> str:
    """The variable in the environment that stands in for an option."""
    return ENVIRONMENT_PREFIX + argument.names[0].lstrip("-").replace("-", "_").upper()


def _take_default(parser: Parser, argument: Argument, environment: Mapping[str, str]) -> None:
    text = environment.get(setting_of(argument))
    if text:
        parser.set_defaults(**{argument.names[0].lstrip("-").replace("-", "_"): text})
        parser.variables[argument.names[0]] = setting_of(argument)


def strange_settings(environment: Mapping[str, str]) -> List[str]:
    """What looks like a setting, and is none."""
    prefix = ENVIRONMENT_PREFIX
    names = [name[len(prefix) :] for name in sorted(environment) if name.startswith(prefix)]
    known = [setting_of(argument)[len(prefix) :] for argument in SETTINGS]
    return [
        f"{printable(prefix + name)} in the environment sets nothing{guess(name, known, prefix)}"
        for name in names
        if name not in known
    ]


def read_arguments(words: Sequence[str], environment: Mapping[str, str]) -> argparse.Namespace:
    """Raises SystemExit, after a line that says what is wrong, or help."""
    parser, parsers = _parser(environment)
    if not words:
        _say(parser.format_help().rstrip("\n"))
        parser.exit(EXIT_USAGE)
    option = words[0].partition("=")[0]
    if option.startswith("-") and words[0] not in ("-h", "--help", "--version", "--"):
        command_name = next((word for word in words if word in parsers), "COMMAND")
        typed = f"{parser.prog} {command_name} {printable(option)}"
        parser.error(f"options come after the command: {typed}")
    if not words[0].startswith("-") and words[0] not in parsers:
        name = printable(words[0])
        parser.error(f"there is no command {name}{guess(words[0], list(parsers))}")
    arguments: argparse.Namespace
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        word = next((word for word in unknown if word.startswith("-")), unknown[0])
        command: Command = arguments.command
        options = [name for argument in command.arguments for name in argument.names]
        what = "option" if word.startswith("-") else "argument"
        parsers[command.name].error(
            f"{command.name} takes no {what} {printable(word)}{guess(word, options)}"
        )
    return arguments


def main(
    argv: Optional[Sequence[str]] = None,
    *,
    environment: Mapping[str, str] = os.environ,
    clock: Callable[[], float] = time.time,
) -> int:
    """Run one command; its exit status."""
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv, environment, clock)
        finally:
            with suppress(BrokenPipeError):
                _settle(sys.stdout)
    except OSError as error:
        _complain(str(error))
        return EXIT_FAILED
    except MemoryError:
        _say("hostenroll: out of memory: give it more")
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    finally:
        with suppress(OSError):
            _settle(sys.stderr)


def _run(argv: Sequence[str], environment: Mapping[str, str], clock: Callable[[], float]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a host's name may not fit the terminal
            stream.reconfigure(errors="backslashreplace")
    arguments = read_arguments(argv, environment)
    command: Command = arguments.command
    if command.run is not _run_serve:  # which has a log for this
        _say(*(f"hostenroll: {said}" for said in strange_settings(environment)))
    try:
        return command.run(Session(arguments, clock, environment))
    except StorageUnavailable as problem:
        _complain(str(problem.__cause__ or problem.detail))
        return EXIT_FAILED
    except Problem as problem:
        said = "; ".join(f"{command.typed(name)}: {what}" for name, what in problem.errors)
        is_lost = isinstance(problem, NotFound) and command.listed_by
        hint = f" See: {command.listed_by}" if is_lost else ""
        _complain(f"refused ({problem.code}): {said or problem.detail}{hint}")
        return EXIT_REFUSED
    except UsageError as error:
        _complain(f"{error} (see: {PROGRAM} {command.name} --help)")
        return EXIT_USAGE
    except OperatorError as error:
        _complain(str(error))
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
