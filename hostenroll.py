#!/usr/bin/env python3
"""hostenroll: enrolls machines in a fleet and shows which of them are alive.

One file, the standard library alone, for networks with no way out. Copy it onto a box and run it:

    python3 hostenroll.py serve             listens on 127.0.0.1:8080
    python3 hostenroll.py mint-token        prints an enrollment token

An agent, which may be curl in a shell script, enrolls once with the token: it gets a host record
and a credential. With the credential it sends heartbeats, and the host is online:

    POST /api/agent/enroll        {"token": "het_...", "hostname": "web-1"}      201, a credential
    POST /api/agent/heartbeat     Authorization: Bearer <credential>             200, lastSeen

Words, each with one meaning, in code, SQL, API and command line alike:

    token           enrolls one host (or --max-uses of them), before it expires
    API key         lets a person or a script use the user API
    credential      what an enrolled host sends with each heartbeat: a JWT, HS256
    signing key     signs credentials; it is in the key file, never in the database
    host            a machine that has enrolled
    organization    owns hosts, tokens and API keys; known by its slug
    revoke          block a host until it is restored; the row stays
    delete          remove the row; the machine must enroll again, and the id never returns
    re-enroll       enroll by a token bound to a host: new credential; same id, name and history
    serial          the number of a credential among those issued to one host
    tick            one turn of the server's loop: one batch of requests, one transaction, one time
    operation       an act that HTTP, a command or both offer: a row of OPERATIONS
    call            an operation with its caller and its values, from HTTP or a command
    engine          SQLite and its files; queries: the plain SQL that runs in it
    interval        seconds between heartbeats; a host is judged by the last interval sent to it
    service period  the time in which servers listen without a pause; pauses are no silence of hosts
    instance        a machine, its boot and the agent's folder: instances that take turns are copies
    event           what happened, as a row of the audit log

Contents; each section uses only those above it, and a test checks that:

     1. Limits         every number, with its unit and its reason
     2. Problems       every refusal by name
     3. Schemas        bodies and queries, checked and described from one declaration
     4. Secrets        ids, tokens, API keys; the keyring and its file; files that are safe to write
     5. Store          the schema; the lock between processes; the engine; the queries
     6. Registry       the rules, a class for each noun; the audit log; the tick's transaction
     7. Messages       the strict HTTP/1.1 reader and its writer: bytes to values and back
     8. Assets         texts for people to copy; the agent, in shell; the page, for browsers
     9. Operations     OPERATIONS: one row each; the documents they answer with; OpenAPI; metrics
    10. Server         the loop: sockets, TLS, connection states, deadlines, shutdown
    11. Watch          an HTTP client; it notifies people of what has changed on a server
    12. Command line   what people type and see for each operation; main()

Laws that the code keeps, each explained where it is kept:

    An answer is a promise: a tick is one transaction, and is answered only after its commit.
    Of all processes, one at a time writes; only that process may checkpoint.
    Nothing but SQLite opens the database while a connection is open.
    Nothing secret is in the database, in a log, or in a refusal.
    A refused request changes nothing; a refused enrollment never uses up a token.
    Status is computed by one function, never stored.
    Parsing never touches a socket.
    Control goes down once: a door makes calls, the registry runs them, queries run in the engine.
    A failure that cannot pass by itself ends the process: one line, exit status 1, a new start.
    Nothing is written through a link or a file that another user prepared.
    Memory and time are bounded for whatever a peer sends.
    The loop waits for the selector, the write lock and the commit, and for nothing else.

A tour, by function names. A heartbeat, the same bytes every 30 s:

    Server._turn waits for the sockets; Exchanges.on_ready reads what arrived.
    HeartbeatFastPath.match recognizes the bytes, knows the credential as verified, and returns a
      Heartbeat. Otherwise RequestReader.next parses and Api.admit judges (Keyring.verify).
    Exchanges.run_tick hands all calls that may write to Registry.run: one transaction.
    Heartbeats.batch runs one statement for all heartbeats, and a second one for hosts whose
      interval has changed; Heartbeats.accept judges the remaining heartbeats one by one.
    Registry._commit commits; then Api.heartbeat_answer writes each answer.

An enrollment, and every other request:

    RequestReader.next turns bytes into a Request. Api.admit finds the operation (find_operation),
      checks body and query (Schema) and the token (Tokens.prove): a Call, or a refusal.
    Registry.run has Registry._run_one run the operation's rule in a savepoint: Enrollments.enroll,
      where the guarded UPDATE of Queries.use_token decides. AuditLog.record notes the event.
    After the commit Api.answer makes the Response from the operation's Document, and write_response
      turns it into bytes.

A command runs the same rule without HTTP. main calls run_command, which calls parse_arguments.
Session.call makes an UncheckedCall. LocalBackend.perform checks it and runs it by Registry.perform,
or RemoteBackend.perform sends it to a server. The command shows the operation's Document.

How to add a fact, an operation, a refusal or a migration: .github/CONTRIBUTING.md.
"""

from __future__ import annotations

import marshal
import os
import sys
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from importlib.util import MAGIC_NUMBER

# Python keeps the syntax tree of its main script while the script runs: 20 of the 47 MiB of an idle
# server. So a server starts again, in the same process, from this file's compiled code. If that
# fails, it continues with more memory. This comes first, so that little work is done twice.
# sys.path loses the working directory, where others may have put modules.
if __name__ == "__main__" and __spec__ is None and sys.argv[1:2] == ["serve"]:
    with suppress(AttributeError, OSError):  # Python before 3.10, not Linux, or forbidden
        _options = [word for word in sys.orig_argv[1 : -len(sys.argv)] if word != "--"]
        if "-m" not in _options and os.path.exists("/proc/self/fd"):  # -m: under a debugger
            _code = os.memfd_create("hostenroll", 0)  # inherited
            with open(_code, "wb", closefd=False) as _file:  # laid out as a .pyc file
                _file.write(MAGIC_NUMBER + bytes(12) + marshal.dumps(sys._getframe().f_code))
            _main = f"runpy.run_path('/proc/self/fd/{_code}')['main']"
            _start = "import sys; sys.path[:] = filter(None, sys.path); del sys.argv[0]; "
            _start += f"import os, runpy; main = {_main}; os.close({_code}); sys.exit(main())"
            os.execv(sys.executable, [sys.executable, *_options, "-c", _start, *sys.argv])

import argparse
import base64
import binascii
import csv
import errno
import fcntl
import hashlib
import hmac
import http.client
import io
import ipaddress
import json
import logging
import math
import pwd
import random
import re
import resource
import secrets
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import string
import subprocess
import tempfile
import threading
import time
import typing
import unicodedata
import zlib
from array import array
from bisect import bisect_left
from calendar import timegm
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from email.utils import formatdate
from functools import cached_property, lru_cache, partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import chain, cycle, groupby, islice, product, repeat, starmap, takewhile
from operator import attrgetter, itemgetter
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple, NoReturn, Optional, Protocol, TypeVar, Union, cast
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit
from weakref import WeakSet

# 1. Limits
#
# Law: every number that we chose stands here, with its unit and the reason for its size. A time is
# in milliseconds if its name ends in _MS, else in seconds; a size is in bytes.
#
# Contents: numbers by topic; Progress, Origin; in_background(); the texts of JSON, times and ids.

__version__ = "0.2.0"
RELEASED = "20261129"  # the day of the release: a clock that shows an earlier day is not set

SECOND_MS = 1000
LAST_SECOND = 253_402_300_799  # the end of the year 9999, the last that RFC 3339 can write
MINUTE, HOUR, DAY = 60, 3600, 86400

# Tokens and credentials.
TOKEN_TTL = HOUR  # long enough to walk to the machine
TOKEN_TTL_RANGE = (MINUTE, 30 * DAY)
API_KEY_TTL_RANGE = (MINUTE, 3650 * DAY)
SIGN_IN_TTL = 12 * HOUR  # the life of the API key in a sign-in link
TOKEN_USES_RANGE = (1, 1_000_000)
TOKEN_HOSTS_SHOWN = 1000  # the newest hosts that a token enrolled: there may be a million
TOKEN_KEPT = 30 * DAY  # after a token has ended: show-token can still report what became of it
CREDENTIAL_TTL_RANGE = (1, 3650 * DAY)
CREDENTIAL_GRACE = 7 * DAY  # a heartbeat so long after expiry still counts, and its reply renews
CREDENTIAL_MAXIMUM = 1024  # the longest that we sign, with kid and slug of 64 each, has 413
CREDENTIAL_REPEATED_MS = HOUR * SECOND_MS  # so long, a repeated request gets the same credential
REPLAY_SHORTEST_MS = 10 * MINUTE * SECOND_MS  # for so long at least, an enrollment can be repeated
REPLAY_LONGEST_MS = DAY * SECOND_MS  # for so long at most, even while its token is valid
SERIALS_LOST = 1_000_000  # serials that a restored backup may lack; forged higher ones are refused
DUPLICATES_EXAMINED = 20  # of the hosts with one hostname, such as "localhost": the newest

# Copies of a credential, as of a machine that was cloned. Agents name their instance every hour.
INSTANCES_KNOWN = 4  # the newest of a host; if one of these is named again, it has returned
COPY_RETURNS = 2  # returns: a restarted machine has none, a restored machine has one
COPY_NEW = 6  # new instances: more machines than are known, or one that restarts often
COPY_WINDOW_MS = 4 * HOUR * SECOND_MS  # so many returns or new instances in this time mean a copy
SIGHTINGS_KEPT = 12  # the newest of a host: so many are enough to reach one of the two numbers
COPY_SHOWN_MS = DAY * SECOND_MS  # the warning is shown for so long after the last sign of a copy

# Files with secrets.
PRIVATE_MODE = 0o600
KEY_FILE_MAXIMUM = 1024 * 1024  # thousands of keys, or of certificates in a chain
LINKS_MAXIMUM = 40  # links that lead to links: as many as Linux follows
FILE_PATIENCE = 0.5  # how long a server waits for its key file: a disk takes 1 ms, a mount may hang

# Heartbeats and status.
HEARTBEAT_INTERVAL = 30
HEARTBEAT_INTERVAL_RANGE = (1, DAY)
HEARTBEAT_SPREAD = 15  # per cent; each reply draws its interval: a fleet must not beat as one
MISSED_BEATS = 3  # a host that is silent for so many intervals, and the slack, is still online
ONLINE_SLACK = 10
MISSING_AFTER = 7 * DAY
PAUSE_ALLOWANCE = 300  # after a pause of the servers: the longest wait of an agent between attempts
PAUSES_KEPT = 16  # pauses of the servers; more within MISSING_AFTER are restarts in a loop
ALIVE_EVERY = 10  # how often a server records that it lives
ALIVE_GRACE = 25  # longer than two such periods: after that, no server lives
ADDRESS_KEPT_MS = 10 * MINUTE * SECOND_MS  # the address of a host whose address changes often
CLOCK_SLACK = 300  # a time that is further ahead came from a clock that has been set back since
READY_EVERY = 1  # between two writes by /readyz, which anybody may request
SWEPT_AT_ONCE = 2000  # hosts that SQL examines in a slice of the sweep: half a millisecond
JUDGED_AT_ONCE = 200  # hosts of these that Python judges: 10 ms if all have fallen silent
CHANGES_MANY = 8  # in a tick: to run the next tick twice then costs more than to wait for the disk
SWEEP_REST = 3  # between two sweeps, and before the first: agents that waited beat first
SWEEP_RESTS = 40  # or the rest is so many times as long as the last sweep: 3 % of a core at most
CHANGES_KEPT = 30 * DAY
CHANGES_KEEP_RANGE = (DAY, 3650 * DAY)  # incidents and the brake of expiry need a day
CHANGES_MAXIMUM = 1_000_000  # rows: some 200 MiB

# Hosts that expire: they are deleted after a silence.
EXPIRY_INTERVALS = 10  # a shorter silence must not delete a host: it may be alive
EXPIRY_RANGE = (EXPIRY_INTERVALS * HEARTBEAT_INTERVAL_RANGE[0], 3650 * DAY)
EXPIRY_CALM_MS = 10 * MINUTE * SECOND_MS  # after a start: twice the longest wait of an agent
EXPIRED_AT_ONCE, EXPIRY_REST = 25, 0.25  # hosts, s: at most 100 hosts a second, in slices of 5 ms
EXPIRED_FREELY, EXPIRED_SHARE = 10, 5  # hosts of an organization in a day, or one host in so many

# Lists. No request examines more than ROWS_EXAMINED, so that a heartbeat after it waits a few ms.
PAGE_DEFAULT = 100
PAGE_MAXIMUM = 1000
FITS_SHOWN = 5  # objects that match a word that a person typed
HISTORY_SHOWN = 5  # events of a host
ROWS_EXAMINED = 1000
ROWS_READ = 100  # rows of a list that are read at once: a page of PAGE_DEFAULT without a filter
PAGE_BYTES = 1024 * 1024  # the row that exceeds it ends a page: 1,000 hosts may be 100 MiB
ROW_BYTES = PAGE_BYTES // ROWS_EXAMINED  # of text: a row with more text counts as several
COUNTED_AT_ONCE = 1000  # hosts in one slice of a task that goes through all of them
ACTED_AT_ONCE = 1000  # hosts in one tick; half as many in a command, which servers wait for
INVENTORY_HOSTS = 10_000
INVENTORY_BYTES = 16 * 1024 * 1024  # 1.6 KiB for each; half of BUFFERED_MAXIMUM
INVENTORIES_AT_ONCE = 4  # in progress; further requests wait
INVENTORY_LEFT = 5000  # ms: an inventory without a slice for so long has been given up
LISTED_AT_ONCE = 200  # hosts of an inventory in one tick: 10 ms
DOWN_SHOWN = 1000  # hosts that are down: each is a time series
VERSIONS_SHOWN = 10  # versions of agents: a machine can report any text
EXPORTER_PORT = 9100  # of Prometheus' node exporter
VERIFIED_AT_ONCE = 1000  # events in one read transaction: a longer one holds up the WAL
PRUNED_AT_ONCE = 500  # rows in a turn, a few ms; the next turn prunes the rest
VARIABLES_MAXIMUM = 500  # values in an IN list; SQLite before 3.32 takes 999 in a statement

# The audit log.
PENDING_REFUSALS_MAXIMUM = 1000  # kept in memory while nothing can be written: 1 MiB at most
REFUSALS_AUDITED = 60  # a minute, of one code and organization; moves too; the rest are one event
SUCCESSES_AUDITED = 12  # an hour, of each act that a host can repeat as often as it likes
KIND_SLOTS = 1 << 17  # counts of a byte each: the kinds of events in one slot share its maximum
KINDS_COUNTED = 2000  # kinds of unlisted events, 1 MiB; further kinds are counted by organization
AUDIT_KEEP_RANGE = (DAY, 36500 * DAY)
STORED_NESTING = 8  # brackets in a column of JSON: a deeper value could not be encoded again
UNREADABLE_MAXIMUM = 200  # characters shown of a column whose JSON we did not write

# Wrong secrets. No secret can be guessed: the limit is for the load and the log.
FAILURES_ALLOWED = 20  # of one network in a minute: a third of what the audit log lists
FAILING_REMEMBERED = 4096  # networks, about 0.3 KiB each; the oldest entry is forgotten first
NETWORK_BITS = 64  # of an IPv6 address: who has one address of such a network has all of them

# Feeds: changes and events after a cursor, the oldest first.
WAIT_RANGE = (0, 50)  # seconds; most proxies wait 60 for an answer
WAITING_MAXIMUM = 256  # requests that wait for news of a feed: few beside CONNECTIONS_MAXIMUM
WAITING_OF_KEY = 16  # such requests of one API key, so that other keys have room
FOLLOW_EVERY = 0.5  # between two looks for commits of other processes

# Incidents: hosts that fell silent together, of the last day.
INCIDENT_SMALLEST = 3
INCIDENT_INTERVALS = 2  # between the first host and any other: hosts of one cause beat in turn
INCIDENTS_OPEN = 4  # the newest, which may grow: a sweep finds hosts by id, not in order of time
INCIDENT_HOSTS_SHOWN = 100
TRAITS_COUNTED = 1000  # traits of an incident: the traits that most of its hosts share come early
LOOKED_AT_ONCE = 300  # changes, or hosts of the fleet, in a slice of a few ms
SHARES_KEPT = MINUTE  # counts are used for so long, and dropped after so long without a request
SHARES_MAXIMUM = 100_000  # hosts: to count more each minute would take a noticeable part of a core

# Metrics: upper bounds of histogram buckets.
SECONDS_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)

# Backups.
BACKUP_PAGES = 256  # copied at once, in less than a millisecond
BACKUP_PAUSE = 0.005  # after each copy, so that others get processor and disk too
BACKUP_NICENESS = 10  # the default of nice(1)
BACKUPS_KEPT, BACKUPS_KEPT_RANGE = 14, (1, 1000)  # two weeks, by the timer of the systemd unit
LOST_WAIT = DAY  # for so long, hosts that a restore lost wait before they enroll again
LOST_NAMED = 10  # lost hosts that are named

# HTTP messages.
HEAD_MAXIMUM = 16 * 1024  # nginx and Apache take lines of 8 KiB: one, and what proxies add
FIELDS_MAXIMUM = 100  # as Apache's LimitRequestFields
PARAMETERS_MAXIMUM = 64  # labels and all others; no list needs more
BODY_MAXIMUM = 64 * 1024  # the largest valid body, a host's 32 longest labels in UTF-8, has 35 KiB
AGENT_BODY_MAXIMUM = 8 * 1024  # anybody can send one; the largest valid body has 3.5 KiB
AGENT_BRACKETS_MAXIMUM = 8  # { and [ in such a body: an agent sends one; thousands are slow to read
CHUNK_LINE_MAXIMUM = 256  # a size has up to 16 digits; the rest of the line is extensions: ignored
CHUNK_OVERHEAD_MAXIMUM = 64 * 1024  # size lines and trailers of one body: tiny chunks are work
CHUNK_LINES_AT_ONCE = 32  # then other connections have their turn; about the work of one request
REPEATS_MAXIMUM = 32  # of one parameter in a query: a host has no more labels
ERRORS_NAMED = 20  # in one refusal: a body may be wrong in ten thousand places
INTEGER_DIGITS = 19  # in a query or JSON; int() of thousands of digits is slow before Python 3.11
HOPS_MAXIMUM = 16  # trusted proxies that a request passes
HOP_LENGTH = 64  # of an address in X-Forwarded-For: IPv6 with brackets and port has 53
HOPS_CACHED = 4096  # 0.3 KiB each, and its key; parsing a hop is half of the cost of a heartbeat
HEAD_CACHED_MAXIMUM = 2048  # a longer head is parsed each time
HEADS_CACHED = 1024  # of up to HEAD_CACHED_MAXIMUM: 2 MiB, and 2 MiB for the parsed heads
CREDENTIALS_CACHED = 110_000  # 0.2 to 0.3 KiB each: 22 to 32 MiB; as many intervals are kept
CREDENTIALS_KEPT_MS = HOUR * SECOND_MS  # in the cache: longer than most intervals

# Connections. Each kind of deadline has one length, so its queue is always in order.
CONNECTIONS_MAXIMUM = 4096
BACKLOG = 4096  # the kernel lowers it to its own limit; a full queue delays honest peers by seconds
DESCRIPTORS_SPARE = 64  # beside the connections: database, locks, log, selector
HANDSHAKE_DEADLINE = 10  # a lost packet is sent again after 1, 3 and 7 s: RFC 6298
HEAD_DEADLINE = 10  # for the same reason; a head is one or two packets
BODY_DEADLINE = 30  # BODY_MAXIMUM at 2 KiB/s
IDLE_DEADLINE = 75  # as in nginx; two heartbeat intervals and their spread fit
ANSWER_DEADLINE = 30  # PAGE_BYTES at 35 KiB/s
LINGER_DEADLINE = 2  # for the peer to read the answer before a reset drops it: RFC 9112 section 9.6
HANDSHAKE_MAXIMUM = 16 * 1024  # bytes from the peer; OpenSSL alone would keep 128 KiB of a hello
TLS_RECORD = 16384  # the longest plain text of a record: RFC 8446 section 5.1
QUEUED_MAXIMUM = 1024  # lists and acts on many that wait to run: their connections stay open
QUEUED_OF_KEY = 128  # of an API key: some seconds of work, and no agent is kept out
RECEIVE_SIZE = 4096  # a request fits; a larger buffer takes longer to make than it saves
DROP_SIZE = 64 * 1024  # bytes read at once after a refusal: smaller pieces would take 16 turns
BUFFERED_MAXIMUM = 32 * 1024 * 1024  # all unfinished requests and unsent answers together
ACCEPTS_PER_TURN = 128  # so that a flood of new connections does not delay the others
ACCEPT_PAUSE = 0.1  # when no descriptor is free
HANDSHAKES_AT_ONCE = 16  # of TLS: the first of them waits 4 ms for the others
DAMAGED_PATIENCE = 2  # for what check reads of a damaged database: forged rows may have no end
JUDGING_TIME = 0.005  # per turn: heartbeats wait no longer while other requests are judged
SHUTDOWN_DEADLINE = 4  # with CLOSE_PATIENCE and LOG_PATIENCE less than 5 s for the whole shutdown
SHUTDOWN_GRACE = 1  # for open connections to bring a request: a handshake has two round trips
FIRST_INHERITED = 3  # the descriptor of a socket that a service manager hands over

# The log.
LOG_MAXIMUM = 1024 * 1024  # that waits to be written, and as much again that is being written
LOG_PIECE = 4096  # written at once: a pipe takes it whole, and mixes it with no other text
LOG_PAUSE = 0.01  # after each write; lines gather in it, so a busy access log makes few writes
LOG_PATIENCE = 0.4  # at the end of the process: a working reader takes LOG_MAXIMUM in less

# Requests of ours to other servers.
CLIENT_PATIENCE = 30  # for a connection, and for an answer after the time that it was to be held
CLIENT_ANSWER_MAXIMUM = 64 * 1024 * 1024  # an inventory: 10,000 hosts with many labels

# What watch reports.
PENDING_REPORTED_AFTER = 10 * MINUTE  # a machine that is being installed may restart once
FLAPPING_ABOVE = 6  # changes of a host in an hour; above that it is reported once an hour
BATCH_LONGEST = MINUTE  # while a batch has an incident that may grow
MUTED_FOR = 10  # then the feed is asked whether the host is still muted
REPORTED_MAXIMUM, EVENTS_MAXIMUM = 1000, 10_000  # in a message, about 400 KiB; in its queue
WATCH_WAIT = 10  # for changes; between two waits, events are read
RETRY_LONGEST = 300
EXEC_PATIENCE, EXEC_GRACE = 60, 5  # of a command that notifies people: then it gets TERM, then KILL
WATCH_SAVES = 10  # between saves of news that the feed still has: each save writes the whole state
WATCH_STATE_MAXIMUM = 256 * 1024 * 1024  # a million hosts that are down

# The store.
LOCK_PATIENCE = 5  # many times as long as a command holds the lock: then something is wrong
CLOSE_PATIENCE = 0.5  # a server that stops leaves the last checkpoint to the next server
LOCK_POLL = 0.001  # a tick takes about as long
RETRY_AFTER = 5  # as LOCK_PATIENCE
TROUBLE_OVER = 30  # so long without a further failure: what failed works again
TROUBLE_PAUSE = 0.5  # between attempts to end a trouble by a checkpoint, which makes room
CHECKPOINT_AFTER = 8192  # rows; heartbeats: 8 MiB at most, which hold up the loop for 15 ms
CHECKPOINT_AT_ONCE = 32768  # rows; heartbeats: 32 MiB at most: then the whole WAL is moved at once
CHECKPOINT_REST = 512  # rows: so few are moved while the loop waits for the disk
WAL_MAXIMUM = 16 * 1024 * 1024  # the file is cut to this size after it has been larger
PAGE_SIZE = 1024  # a heartbeat changes one row of 30 bytes, and its whole page is written twice
PAGE_CACHE_KIB = 7168  # the heartbeats of some 200,000 hosts

# What a terminal shows.
PROGRESS_AFTER = 1.0  # an act that takes less time needs no progress line
PROGRESS_EVERY = 0.2
COLUMNS_DEFAULT = 80  # of a terminal that does not report its width
COMPLAINT_MAXIMUM = 1000  # characters
CERTIFICATE_DAYS_RANGE = (1, 36500)  # openssl takes numbers beyond all calendars
CERTIFICATE_WARNING = 21 * DAY  # before it ends: certbot renews 30 days before, so it has failed

# The benchmark.
BENCH_HOSTS, BENCH_HOSTS_RANGE = 100_000, (100, 10_000_000)
BENCH_SECONDS, BENCH_SECONDS_RANGE = 10, (1, 600)
BENCH_CONNECTIONS, BENCH_CONNECTIONS_RANGE = 64, (1, 1024)
BENCH_BATCH = 1000  # hosts created in one transaction; larger batches are no faster
BENCH_SHARE = 0.7  # of the rate of a full core: a fleet needs room for its bad days

DEFAULT_ORGANIZATION = "default"
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8080
DEFAULT_DATABASE, DEFAULT_KEY_FILE = "hostenroll.db", "hostenroll.key"  # in the same folder
SERVICE_DATABASE = "/var/lib/hostenroll/hostenroll.db"  # of the unit: commands look here last

log = logging.getLogger("hostenroll")
log.addHandler(logging.NullHandler())  # commands print their errors themselves, once

Progress = Callable[[int, int], Any]  # called with how much is done, and the total


def no_progress(done: int, total: int) -> None:
    """The Progress of an act that shows none."""


class Origin(NamedTuple):
    """Where a call came from: for the log, the audit log and limits."""

    address: str = ""  # of the client; '': this machine's command line, or the server itself
    connection: int = 0  # the number of the connection
    number: int = 0  # of the request on its connection, from 1

    @property
    def request(self) -> str:
        """The id of the request, and the X-Request-Id of its refusal; '' if there is no request."""
        return f"{self.connection:x}-{self.number}" if self.number else ""


def is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def in_background(read: Callable[[], Any]) -> futures.Future[Any]:
    """Run a function that may hang, as a read of a dead mount does: only its thread hangs."""
    outcome: futures.Future[Any] = futures.Future()

    def run() -> None:
        try:
            outcome.set_result(read())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


# Control characters, line and paragraph separators, lone surrogates, and the marks that reorder
# text (Unicode TR 36, section 3.3). No name may carry one to a terminal, a log or a page.
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)

# Writes JSON in ASCII, without white space. json.dumps() would make an encoder for each text.
json_text = json.JSONEncoder(separators=(",", ":")).encode


def rfc3339(milliseconds: int) -> str:
    """Unix time in milliseconds as an RFC 3339 timestamp in UTC, with milliseconds and Z."""
    return f"{_date_and_time(milliseconds // SECOND_MS)}.{milliseconds % SECOND_MS:03d}Z"


@lru_cache(maxsize=1024)  # the times in a list are often of the same second
def _date_and_time(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(min(max(seconds, 0), LAST_SECOND)))


def unix_ms(timestamp: str) -> int:
    """The Unix time in milliseconds of a timestamp of rfc3339(), or of one without milliseconds."""
    numbers = [*map(int, re.findall("[0-9]+", timestamp)), 0]
    return timegm(tuple(numbers[:6])) * SECOND_MS + numbers[6]


ID = re.compile(r"[0-7][0-9a-f]{15}")  # 63 bits: SQLite's integers have a sign
ID_PREFIX = re.compile(r"[0-7][0-9a-f]{5,14}")  # the start of an id, which people may type
LAST_ID = (1 << 63) - 1


def id_text(number: int) -> str:
    """An id as everything outside the database shows it: 16 hexadecimal digits."""
    return f"{number:016x}"


def tagged_id(kind: str, number: int) -> str:
    """The name of an actor or a subject in the audit log, such as host:<id>."""
    return f"{kind}:{id_text(number)}"


def parse_id(text: str) -> int:
    """The number of an id; -1, which no object has, for a text that is not an id."""
    return int(text, 16) if ID.fullmatch(text) else -1


# A token, an API key or a credential, whole or cut off, in the place of an id or a hostname.
SECRET_SHAPED = re.compile(r"((?:het|hak)_[0-7][0-9a-f]{15}_|eyJ)[A-Za-z0-9_.-]+")


def redact(text: str) -> str:
    """A text with the secrets in it cut off; the ids of tokens and API keys stay."""
    return SECRET_SHAPED.sub(r"\1...", text)


def sanitize(text: str) -> str:
    """A peer's text, safe to show: no control characters, no secrets, at most 64 characters."""
    shown = UNPRINTABLE.sub("?", redact(text))
    return shown if len(shown) <= 64 else f"{shown[:61]}..."


def sanitize_path(path: str) -> str:
    """A path, safe to show. A segment longer than an id may be a secret in the wrong place."""
    return sanitize(re.sub("[^/]{33,}", lambda long: f"{long[0][:4]}...", path))


def format_duration(seconds: float, minutes_from: int = 10) -> str:
    """A duration for people: 95 s, 12 min, 3 h, 8 d. Below minutes_from it is in seconds."""
    if seconds < minutes_from * MINUTE:
        return f"{round(seconds)} s"
    for unit, size in (("d", DAY), ("h", HOUR)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds // MINUTE:.0f} min"


# 2. Problems
#
# Law: every refusal has a name, and each name has one thing for the caller to do. A Problem is
# raised where its reason is known, and refusal() in section 7 alone writes it. A peer sees the
# problem document and nothing else.
#
# Contents: the errors for operators; Problem; the refusals, as rows; problems().


class OperatorError(Exception):
    """A mistake of the operator, or a trouble of the machine: one line that says what to do."""


class Unrecoverable(BaseException):
    """A failure that cannot pass by itself: a database, WAL or lock that is gone or replaced, or a
    failed sync. Its text is one line for the log.

    main() prints the line and ends the process with status 1. The database stays as it is: to close
    it would checkpoint into a file that cannot be trusted. This is no Exception, so that no caller
    takes it for a failure that the process can survive.
    """


Headers = tuple[tuple[str, str], ...]  # names and values of header fields


class FieldError(NamedTuple):
    """One error in a body or a query: the name of the member or parameter, and what is wrong."""

    field: str
    detail: str


class Problem(Exception):
    """A refusal: a problem document of RFC 9457, and the exit status 3 of a command. actor,
    subject, organization and audit_detail are for the audit log; peers never see them."""

    status = 500
    code = "internal"
    title = "The server failed"
    remedy = "Try again later. The server's log has the reason."  # the detail if none is given
    closes = False  # the connection closes: the start of the next message is not known
    challenge = ""  # the error attribute of WWW-Authenticate: RFC 6750 section 3
    names_errors = False  # the document lists what is wrong with a body or a query
    is_audited = False  # the caller tried something that it may not do
    retry_after = 0  # seconds, in Retry-After; 0: no such field

    actor = "anonymous"
    subject = ""
    organization: Optional[str] = None
    audit_detail: Mapping[str, Any] = {}

    def __init__(
        self, detail: str = "", *, errors: Sequence[FieldError] = (), headers: Headers = (),
        cursor: str = "",
    ) -> None:  # fmt: skip
        super().__init__(detail or self.remedy)
        self.detail = detail or self.remedy
        self.errors = tuple(errors[:ERRORS_NAMED])
        self.cursor = cursor
        self._headers = headers

    def with_audit(
        self, actor: str, subject: str, organization: Optional[str], **detail: Any
    ) -> Problem:
        """This problem, with what the audit log records of it."""
        self.actor, self.subject, self.organization = actor, subject, organization
        self.audit_detail = detail
        return self

    def document(self) -> dict[str, Any]:
        """The members of RFC 9457 section 3.1, then code, then errors and cursor if it has them."""
        document: dict[str, Any] = {
            "type": f"urn:hostenroll:problem:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
        }
        if self.names_errors:
            document["errors"] = [error._asdict() for error in self.errors]
        if self.cursor:
            document["cursor"] = self.cursor
        return document

    def headers(self) -> Headers:
        """The header fields that the status requires: RFC 9110 sections 11.6.1 and 10.2.3."""
        if self.status == HTTPStatus.UNAUTHORIZED:
            error = f', error="{self.challenge}"' if self.challenge else ""
            return (*self._headers, ("WWW-Authenticate", f'Bearer realm="hostenroll"{error}'))
        if self.retry_after:
            return (*self._headers, ("Retry-After", str(self.retry_after)))
        return self._headers


class Internal(Problem):
    """A defect of the program. The log has the traceback; a peer never sees it."""


class Unframed(Problem):
    """A refusal after which the start of the next message is not known."""

    closes = True


class Unauthorized(Problem):
    """The caller has not shown that it may do this."""

    status = 401
    is_audited = True
    challenge = "invalid_token"


def _variant(name: str, base: type[Problem], **attributes: Any) -> type[Problem]:
    """A class of Problem that differs from its base in these attributes."""
    return cast("type[Problem]", type(name, (base,), {"__module__": __name__, **attributes}))


def _refusal(
    code: str, status: int, title: str, remedy: str, base: type[Problem] = Problem, **others: Any
) -> type[Problem]:
    """A class of Problem with a code, and a name made from the code: TokenUsed from token-used."""
    members = {"code": code, "status": status, "title": title, "remedy": remedy, **others}
    return _variant(code.title().replace("-", ""), base, **members)


GET_TOKEN = "Get a new token from the operator: mint-token."
GET_REENROLL_TOKEN = "Get a re-enroll token from the operator; until then retry hourly."
RETRY_LATER = "Try again after the time in Retry-After."

# fmt: off

# Framing: the message cannot be read, or not to its end. Sources in the order of the rows: RFC 9112
# sections 2.2, 5 and 6.3; RFC 9110 section 15.5.9; 15.5.14; RFC 6585 section 5; RFC 9112 section
# 6.1; RFC 9110 section 15.6.6; 10.1.1; and 9.1 for the last row, a method that no operation has: a
# message with such a method is read to its end.
MalformedRequest = _refusal("malformed-request", 400, "The request is not valid HTTP/1.1",
    "Send a well-formed HTTP/1.1 request.", Unframed)
RequestTimeout = _refusal("request-timeout", 408, "The request did not arrive in time",
    "Send the whole request without a pause.", Unframed)
BodyTooLarge = _refusal("body-too-large", 413, "The body is too large",
    f"Send at most {BODY_MAXIMUM} bytes; from an agent, at most {AGENT_BODY_MAXIMUM}.",
    Unframed)
HeadTooLarge = _refusal("head-too-large", 431, "The request line and header fields are too large",
    f"Send at most {FIELDS_MAXIMUM} header fields and {HEAD_MAXIMUM} bytes of head.", Unframed)
UnknownTransferCoding = _variant("UnknownTransferCoding", Unframed, code="not-implemented",
    status=501, title="The transfer coding or method is not implemented",
    remedy="Use a method of the API, and send the body plain or chunked.")
HttpVersion = _refusal("http-version", 505, "The HTTP version is not supported",
    "Use HTTP/1.1.", Unframed)
ExpectationFailed = _refusal("expectation-failed", 417, "The expectation cannot be met",
    "Send Expect: 100-continue, or no Expect.", Unframed)
AgentBodyTooLarge = _variant(  # the body is read to its end: a new connection would cost more
    "AgentBodyTooLarge", BodyTooLarge, closes=False)
UnknownMethod = _variant("UnknownMethod", UnknownTransferCoding, closes=False)

# The message can be read, and asks for what cannot be done.
InvalidBody = _refusal("invalid-body", 400, "The body is not valid",
    "Correct the fields named in errors.", names_errors=True)
InvalidQuery = _refusal("invalid-query", 400, "The query is not valid",
    "Correct the parameters named in errors.", names_errors=True)
NotFound = _refusal("not-found", 404, "Not found",
    "Check the path and the id.")
MethodNotAllowed = _refusal("method-not-allowed", 405, "The path does not allow this method",
    "Use a method that the Allow header field lists.")
Conflict = _refusal("conflict", 409, "The request conflicts with what exists",
    "Choose another name, or first do what the detail says.")

ChangesPruned = _refusal("changes-pruned", 410, "What follows the cursor is no longer kept",
    "Continue from the cursor in this answer, and check the lists for what you missed.")

# Tokens. Only a caller who has the secret of a token learns that it has expired, was revoked or is
# used up. A bound hostname guards against mistakes, not attacks: a machine can report any hostname.
TokenUnknown = _refusal("token-unknown", 401, "The token is not known", GET_TOKEN, Unauthorized)
TokenExpired = _refusal("token-expired", 401, "The token has expired", GET_TOKEN, Unauthorized)
TokenRevoked = _refusal("token-revoked", 401, "The token has been revoked", GET_TOKEN, Unauthorized)
TokenUsed = _refusal("token-used", 401, "The token has been used",
    "The token has enrolled as many hosts as it may. Get a new one: mint-token.", Unauthorized)
TokenHostMismatch = _refusal("token-host-mismatch", 403, "The token is bound to another hostname",
    "Use the token on the machine that has this hostname; it is still valid.", is_audited=True)

# Credentials. If none was sent, the challenge names no error: RFC 6750 section 3.1.
CredentialMissing = _refusal("credential-missing", 401, "The credential is missing",
    "Send the credential from enrollment as Authorization: Bearer <credential>.", Unauthorized,
    challenge="")
CredentialInvalid = _refusal("credential-invalid", 401, "The credential is not valid",
    GET_REENROLL_TOKEN, Unauthorized)
CredentialExpired = _refusal("credential-expired", 401, "The credential has expired",
    GET_REENROLL_TOKEN, Unauthorized)
CredentialSuperseded = _refusal("credential-superseded", 401,
    "A newer credential of this host is in use",
    "If this host has no newer credential, another machine may have a copy: get a re-enroll "
    "token from the operator; until then retry hourly.", Unauthorized)
HostRevoked = _refusal("host-revoked", 403, "The host has been revoked",
    "Wait until the operator restores the host; retry hourly.", is_audited=True)
HostUnknown = _refusal("host-unknown", 410, "The host has been deleted",
    "Enroll again with a new token; until then retry hourly.", is_audited=True)
HostLost = _variant("HostLost", HostUnknown, status=503, title="An older backup has been restored",
    remedy="The host may have enrolled after that backup: keep the credential, and try again after "
    "the time in Retry-After.", retry_after=5 * MINUTE)

# API keys.
ApiKeyInvalid = _refusal("api-key-invalid", 401, "The API key is missing or not valid",
    "Send a valid API key as Authorization: Bearer hak_...; mint-api-key creates one.",
    Unauthorized)
ApiKeyMissing = _variant("ApiKeyMissing", ApiKeyInvalid, challenge="")
Forbidden = _refusal("forbidden", 403, "The API key may not do this",
    "Use an API key with the role admin.", is_audited=True)

# Limits and troubles. An address that sent too many wrong secrets gets too-many-requests in place
# of token-unknown and api-key-invalid (RFC 6585 section 4). A correct secret is still accepted.
TooManyRequests = _refusal("too-many-requests", 429, "Too many requests",
    "Try again after the time in Retry-After. If this address sent wrong secrets, a correct one is "
    "accepted at once.", is_audited=True, retry_after=MINUTE)
Overloaded = _refusal("overloaded", 503, "The server is overloaded", RETRY_LATER, Unframed,
    retry_after=RETRY_AFTER)
StorageUnavailable = _refusal("storage-unavailable", 503, "The database cannot be used now",
    f"Nothing was changed. {RETRY_LATER}", retry_after=RETRY_AFTER)

# fmt: on


def problems() -> tuple[type[Problem], ...]:
    """One class for each code: the first row that has it. In the order of status and code."""
    kinds = [k for k in globals().values() if isinstance(k, type) and issubclass(k, Problem)]
    by_code = {kind.code: kind for kind in reversed(kinds)}
    return tuple(sorted(by_code.values(), key=lambda kind: (kind.status, kind.code)))


# 3. Schemas
#
# Law: what a body or a query may be is declared once: the check and the JSON Schema come from one
# declaration. A FieldType judges one value. A Schema judges an object member by member, names every
# member that is wrong, and returns only members that it knows. Answers are declared the same way,
# for readers of the OpenAPI document and for the tests.

# All characters but UNPRINTABLE, in the syntax of ECMA-262, which JSON Schema uses. Surrogates may
# match: JSON that we read has none, and an engine that knows only UTF-16 sees two in each emoji.
PRINTABLE = "[^" + json.dumps(UNPRINTABLE.pattern)[2:-1].replace(r"\ud800-\udfff", "")

# People click names, and tell hosts apart by them. These characters show nothing, or nothing by
# themselves. They are ranges, because Python's own tables differ by its version (Unicode 16,
# DerivedCoreProperties): Default_Ignorable_Code_Point without UNPRINTABLE and the joiners, which
# languages and emoji need; white space and the blank of Braille; the blocks of combining marks.
_IGNORABLE = (
    "\xad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u2060-\u2065\u206a-\u206f\u3164"
    "\ufe00-\ufe0e\uffa0\ufff0-\ufffb"
)
_JOINERS = "\u200c\u200d\ufe0f"
_BLANK = " \xa0\u1680\u2000-\u200a\u202f\u205f\u2800\u3000"
_MARKS = "\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"
# One joiner, or U+FE0F and then U+200D, may stand between visible characters. U+FE0F may also end
# a word, after a symbol: there it makes the symbol an emoji.
_INVISIBLE = (
    f"[{_IGNORABLE}]|^[{_BLANK}{_MARKS}{_JOINERS}]|[{_BLANK}]$|[{_BLANK}][{_JOINERS}]"
    f"|[\u200c\u200d](?:[{_BLANK}{_JOINERS}]|$)|\ufe0f[\u200c\ufe0f]"
)
_EMOJI = "\xa9\xae\u203c\u2049\u2100-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001faff"
INVISIBLE = re.compile(
    f"{_INVISIBLE}|[^{_EMOJI}]\ufe0f(?:[{_BLANK}]|$)"
    "|[\U0001bca0-\U0001bca3\U0001d159\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


class FieldType:
    """What one value may be."""

    def check(self, value: Any) -> Any:
        """The checked value of a value from JSON. Raises ValueError, with "must be ..."."""
        raise NotImplementedError

    def parse(self, text: str) -> Any:
        """The checked value of a text from a query. Raises ValueError."""
        return self.check(text)

    def json_schema(self) -> dict[str, Any]:
        """The JSON Schema 2020-12 of the values that check() takes."""
        raise NotImplementedError

    def parameter_schema(self) -> dict[str, Any]:
        """The JSON Schema 2020-12 of the texts that parse() takes."""
        return self.json_schema()


class Text(FieldType):
    """A string of printable characters. A pattern has to match the whole string, and must take only
    printable characters; description tells people what it takes. extra: JSON Schema members."""

    def __init__(
        self, maximum: int, minimum: int = 0, pattern: str = "", description: str = "", **extra: str
    ) -> None:
        self._maximum, self._minimum = maximum, minimum
        self._pattern, self._description, self._extra = pattern, description, extra
        self.pattern = pattern or f"{PRINTABLE}{{{minimum},{maximum}}}"  # of the whole text
        self._lengths = f"{minimum} to {maximum}" if minimum else f"at most {maximum}"
        if minimum == maximum:
            self._lengths = str(maximum)

    def check(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError("must be a string")
        if not self._minimum <= len(value) <= self._maximum:
            raise ValueError(f"must have {self._lengths} characters")
        if UNPRINTABLE.search(value):
            raise ValueError("must not contain control characters or text direction marks")
        if self._pattern and not re.fullmatch(self._pattern, value):
            raise ValueError(f"must be {self._description}")
        return value

    def json_schema(self) -> dict[str, Any]:
        return {
            "type": "string",
            "minLength": self._minimum,
            "maxLength": self._maximum,
            "pattern": f"^(?:{self._pattern or PRINTABLE + '*'})$",
            **self._extra,
        }


class Name(Text):
    """A text that no other text looks like. It has nothing invisible inside or at an end. Of the
    spellings that Unicode calls canonically equivalent, check() returns the composed one (NFC)."""

    RULE = "must begin and end with visible characters, and have no invisible ones but joiners"

    def check(self, value: Any) -> str:
        text = super().check(unicodedata.normalize("NFC", super().check(value)))
        if INVISIBLE.search(text) or unicodedata.category(text[0]).startswith("M"):
            raise ValueError(self.RULE)
        return text

    def json_schema(self) -> dict[str, Any]:
        """The pattern ends at U+FFFF, for engines that know only UTF-16; check() goes further."""
        pattern = json.dumps(_INVISIBLE)[1:-1]
        return {**super().json_schema(), "not": {"pattern": pattern}, "description": self.RULE}


class Network(Text):
    """An address or a network in a query. The value is a network of the module ipaddress."""

    def check(self, value: Any) -> Any:
        return ipaddress.ip_network(super().check(value), strict=False)


class Integer(FieldType):
    """An integer within bounds, both included. JSON may write 3 as 3.0 (RFC 8259 section 6)."""

    def __init__(self, bounds: tuple[int, int], unit: str = "") -> None:
        self._minimum, self._maximum = bounds
        self._bounds = f" from {self._minimum} to {self._maximum}{unit and ' '}{unit}"

    def check(self, value: Any) -> int:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or value % 1 or not self._minimum <= value <= self._maximum:
            raise ValueError(f"must be an integer{self._bounds}")
        return int(value)

    def parse(self, text: str) -> int:
        is_short = re.fullmatch(f"-?[0-9]{{1,{INTEGER_DIGITS}}}", text)
        return self.check(int(text) if is_short else text)

    def json_schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self._minimum, "maximum": self._maximum}


class Choice(FieldType):
    """One of a few words, or a boolean."""

    def __init__(self, *words: Any) -> None:
        self._words = words

    def check(self, value: Any) -> Any:
        if value not in self._words or not isinstance(value, type(self._words[0])):
            raise ValueError(f"must be one of {', '.join(map(str, self._words))}")
        return value

    def json_schema(self) -> dict[str, Any]:
        is_bool = isinstance(self._words[0], bool)
        return {"type": "boolean" if is_bool else "string", "enum": list(self._words)}


class Labels(FieldType):
    """An object of short keys and printable values. In a query, one label as key=value."""

    COUNT = 32
    KEY = Text(63, 1, r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?", "letters, digits, . _ / -")
    TEXT = Text(255)
    VALUE: FieldType = TEXT

    def check(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError("must be an object")
        if len(value) > self.COUNT:
            raise ValueError(f"must have at most {self.COUNT} members")
        for key, text in value.items():
            subject = "a label's name"
            try:
                self.KEY.check(key)
                subject = f"the label {key}"
                self.VALUE.check(text)
            except ValueError as error:
                raise ValueError(f"{subject} {error}") from None
        return value

    def parse(self, text: str) -> tuple[str, Optional[str]]:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError("must be written key=value")
        self.check({key: value})
        return key, value

    def json_schema(self) -> dict[str, Any]:
        return {
            "type": "object",
            "maxProperties": self.COUNT,
            "propertyNames": self.KEY.json_schema(),
            "additionalProperties": self.VALUE.json_schema(),
        }

    def parameter_schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": f"^{self.KEY.pattern}={self.TEXT.pattern}$"}


class Nullable(FieldType):
    """A value of another type, or null."""

    def __init__(self, type: FieldType) -> None:
        self._type = type

    def check(self, value: Any) -> Any:
        return None if value is None else self._type.check(value)

    def json_schema(self) -> dict[str, Any]:
        return {"anyOf": [self._type.json_schema(), {"type": "null"}]}


class LabelChanges(Labels):
    """Labels to set; a null removes the label. In a query or a command, one key=value or key-."""

    VALUE = Nullable(Labels.VALUE)

    def parse(self, text: str) -> tuple[str, Optional[str]]:
        if "=" in text or not text.endswith("-"):
            return super().parse(text)
        self.check({text[:-1]: None})
        return text[:-1], None


LabelTerm = tuple[str, Optional[str], bool]  # key, value or None, whether a host must have it


class LabelFilter(Labels):
    """A condition on a host's labels, in a query: key=value, key!=value (all other hosts), key (the
    label exists) or key! (it does not). In the last two, the value of the LabelTerm is None."""

    def parse(self, text: str) -> Any:  # a LabelTerm
        key, equals, value = text.partition("=")
        name = key[:-1] if key.endswith("!") else key
        self.check({name: value})
        return name, value if equals else None, name == key

    def parameter_schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": f"^{self.KEY.pattern}(!?={self.TEXT.pattern}|!)?$"}


def has_labels(labels: Mapping[str, Any], terms: Iterable[LabelTerm]) -> bool:
    """Whether labels meet all terms."""
    return all(
        (key in labels and value in (None, labels[key])) is has_it for key, value, has_it in terms
    )


class ListOf(FieldType):
    def __init__(self, type: FieldType, maximum: int) -> None:
        self._type, self._maximum = type, maximum

    def check(self, value: Any) -> list[Any]:
        if not isinstance(value, list) or len(value) > self._maximum:
            raise ValueError(f"must be an array of at most {self._maximum} items")
        return [self._type.check(item) for item in value]

    def json_schema(self) -> dict[str, Any]:
        return {"type": "array", "maxItems": self._maximum, "items": self._type.json_schema()}


class ObjectOf(FieldType):
    """An object of a Schema inside another object. Only answers have such objects."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema

    def check(self, value: Any) -> dict[str, Any]:
        return self._schema.check(value)

    def json_schema(self) -> dict[str, Any]:
        return self._schema.reference()


class Field(NamedTuple):
    """One member of an object, or one parameter of a query."""

    name: str
    type: FieldType
    required: bool = False
    repeats: bool = False  # a query may have the parameter more than once; the value is a list

    def parameter_schema(self) -> dict[str, Any]:
        schema, maximum = self.type.parameter_schema(), REPEATS_MAXIMUM
        return {"type": "array", "maxItems": maximum, "items": schema} if self.repeats else schema


def required(**types: FieldType) -> list[Field]:
    """Fields of members that an object must have."""
    return [Field(name, type, required=True) for name, type in types.items()]


class Schema:
    """The members of an object. An open schema ignores members that it does not know. A schema with
    a name stands once in an OpenAPI document, which refers to it by that name."""

    def __init__(self, *fields: Field, open: bool = False, name: str = "") -> None:
        self.fields = {field.name: field for field in fields}
        self._open = open
        self.name = name

    def check(self, value: Any) -> dict[str, Any]:
        """The known members of a JSON object. Raises InvalidBody, which lists the errors."""
        if not isinstance(value, dict):
            raise InvalidBody("The body must be a JSON object.")
        judged = self._judge(value.items(), lambda field, v: field.type.check(v), InvalidBody)
        return {name: member for name, (member,) in judged.items()}

    def parse(self, pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
        """The parameters of a query. Raises InvalidQuery, which lists the errors."""
        judged = self._judge(pairs, lambda field, text: field.type.parse(text), InvalidQuery)
        return {name: v if self.fields[name].repeats else v[0] for name, v in judged.items()}

    def _judge(
        self, pairs: Iterable[tuple[str, Any]], judge: Callable[[Field, Any], Any],
        problem: type[Problem],
    ) -> dict[str, list[Any]]:  # fmt: skip
        values: dict[str, list[Any]] = {}
        errors: list[FieldError] = []
        for name, value in pairs:
            field = self.fields.get(name)
            if field is None and self._open:
                continue
            judged = values.setdefault(name, [])
            try:
                if field is None:
                    raise ValueError("is unknown")
                if judged and not field.repeats:
                    raise ValueError("is given more than once")
                judged.append(judge(field, value))
                if len(judged) == REPEATS_MAXIMUM + 1:
                    raise ValueError(f"is given more than {REPEATS_MAXIMUM} times")
            except ValueError as error:
                errors.append(FieldError(sanitize(name), str(error)))
        missing = (f.name for f in self.fields.values() if f.required and f.name not in values)
        errors += [FieldError(name, "is missing") for name in missing]
        if errors:
            raise problem(errors=errors)
        return values

    def json_schema(self) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {name: field.type.json_schema() for name, field in self.fields.items()},
            "required": [name for name, field in self.fields.items() if field.required],
            "additionalProperties": self._open,
        }

    def reference(self) -> dict[str, Any]:
        """A reference to the schema in an OpenAPI document; the schema itself if it has no name."""
        return {"$ref": f"#/components/schemas/{self.name}"} if self.name else self.json_schema()


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise InvalidBody("The body has an object with the same member twice.")
    return members


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidBody(f"The body has {name}, which is not JSON.")


def _read_integer(digits: str) -> float:
    """The number; a float if it is long: the time of int() grows by the square of the digits."""
    return int(digits) if len(digits) <= INTEGER_DIGITS else float(digits)


# Made once: json.loads() would make a decoder for each body, which takes longer than reading most.
_JSON = json.JSONDecoder(
    object_pairs_hook=_unique_members, parse_constant=_refuse_constant, parse_int=_read_integer
)


def parse_agent_json(body: bytes) -> Any:
    """The value of a JSON text from a caller who has not shown a secret yet. Raises InvalidBody."""
    if body.count(b"{") + body.count(b"[") > AGENT_BRACKETS_MAXIMUM:
        raise InvalidBody(f"The body has more than {AGENT_BRACKETS_MAXIMUM} characters {{ and [.")
    return parse_json(body)


def parse_json(body: bytes) -> Any:
    """The value of JSON (RFC 8259). As in RFC 8785, members are unique, and surrogates are paired.
    Raises InvalidBody."""
    try:
        value = _JSON.decode(body.decode("utf-8"))
        if b"\\u" in body:  # only an escape can stand for a lone surrogate
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise InvalidBody("The body must be UTF-8, without lone surrogates.") from None
    except RecursionError:
        raise InvalidBody("The body is nested too deeply.") from None
    except ValueError:
        raise InvalidBody("The body must be a JSON object.") from None
    return value


_STORED_JSON = json.JSONDecoder(parse_constant=_refuse_constant)
_STRING = re.compile(r'(?s)"(?:[^"\\]|\\.?)*"?')  # a string in JSON, also one without an end


def stored_object(text: str) -> dict[str, Any]:
    """The object in a column of JSON; {"unreadable": text} if we cannot have written the text."""
    if text == "{}":  # the labels of most hosts
        return {}
    value: Any = None
    brackets = text.count("{") + text.count("[")
    if brackets > STORED_NESTING:  # brackets in strings do no harm, but to find them takes long
        brackets = len(re.findall(r"[\[{]", _STRING.sub("", text)))
    if brackets <= STORED_NESTING:
        with suppress(Problem, ValueError):
            value = _STORED_JSON.decode(text)
    return value if isinstance(value, dict) else {"unreadable": text[:UNREADABLE_MAXIMUM]}


# 4. Secrets
#
# Law: secret randomness, cryptography and safe files stand here alone. Tokens and API keys are 256
# random bits, shown once and kept as SHA-256: random bits need no slow hash. Credentials are JWS in
# compact form (RFC 7515) with the claims of a JWT (RFC 7519), signed with HMAC-SHA256 (RFC 7518
# section 3.2). Nothing is written through a link or a file that another user prepared.

ID_EPOCH_MS = 1_577_836_800_000  # 2020-01-01: ids begin with the time since then


def first_id(now: int) -> int:
    """The lowest id that new_id() makes at a time (Unix ms)."""
    return max(0, now - ID_EPOCH_MS) % (1 << 41) << 22


def new_id(now: int) -> int:
    """A new id at the time now (Unix ms): 41 bits of milliseconds, then 22 random bits.

    Ids in the order of time need no other column to sort by, keep new rows together at the end of
    a table's b-tree, and keep a deleted id from coming back. Two ids of one millisecond may be
    equal: look for the id before you add a row.
    """
    return first_id(now) | secrets.randbits(22)


def new_history() -> str:
    """A name for a history of changes and events: no other history has it."""
    return secrets.token_hex(8)


class Secret(NamedTuple):
    """A token or an API key: its id, which the database knows, and its text, shown once."""

    id: int
    text: str

    def digest(self) -> bytes:
        """What the database keeps: SHA-256 of the whole text, so that no other spelling matches."""
        return sha256(self.text)


equal_secrets = hmac.compare_digest  # the time that == takes shows how much of a guess was right
TOKEN_PREFIX, API_KEY_PREFIX = "het", "hak"
SECRET = re.compile(r"(het|hak)_([0-7][0-9a-f]{15})_[A-Za-z0-9_-]{43}([0-9a-f]{8})")


def mint_secret(prefix: str, number: int) -> Secret:
    """A new secret: prefix, id, 256 random bits in base64url, CRC-32 against typing errors."""
    text = f"{prefix}_{id_text(number)}_{secrets.token_urlsafe(32)}"
    return Secret(number, f"{text}{zlib.crc32(text.encode('ascii')):08x}")


def parse_secret(prefix: str, text: str) -> Optional[Secret]:
    """The secret in a text; None if we cannot have minted the text."""
    match = SECRET.fullmatch(text)
    if match is None or match[1] != prefix or zlib.crc32(text[:-8].encode()) != int(match[3], 16):
        return None
    return Secret(int(match[2], 16), text)


def sha256(data: Union[str, bytes]) -> bytes:
    """The SHA-256 of octets, or of a text in UTF-8."""
    return hashlib.sha256(data.encode("utf-8") if isinstance(data, str) else data).digest()


# Every credential passes these two tables: the functions of base64 take three times as long.
_TO_URL, _FROM_URL = bytes.maketrans(b"+/", b"-_"), bytes.maketrans(b"-_", b"+/")


def base64url(data: bytes) -> bytes:
    """RFC 7515 section 2: base64url without padding."""
    return binascii.b2a_base64(data, newline=False).translate(_TO_URL, b"=")


def webhook_signature(secret: bytes, at: int, body: bytes) -> str:
    """Shows a receiver who sent a body, and when (Unix time), since others can send it again."""
    return f"t={at},v1={hmac.new(secret, b'%d.%b' % (at, body), hashlib.sha256).hexdigest()}"


def _decode_base64url(text: bytes) -> bytes:
    return binascii.a2b_base64(text.translate(_FROM_URL) + b"==")


class Claims(NamedTuple):
    """The claims of a credential. Times are in Unix seconds."""

    host: int
    organization: str
    issued_at: int
    serial: int
    expires_at: Optional[int]
    kid: str  # of the signing key; it stands in the header, not in the payload


# 27 bytes: in a credential they are 36 characters, whatever follows.
_CLAIMS_OPENING = b'{"iss":"hostenroll","sub":"'
CLAIMS = re.compile(
    re.escape(_CLAIMS_OPENING) + rb'([0-7][0-9a-f]{15})","org":"([A-Za-z0-9_-]{1,64})",'
    rb'"iat":(0|[1-9][0-9]{0,11}),"ser":([1-9][0-9]{0,11})(?:,"exp":(0|[1-9][0-9]{0,11}))?\}'
)


def host_of_credential(rest: bytes) -> int:
    """The host of a verified credential. rest: the credential without SigningKey.opening; its first
    24 characters are the 16 digits of the host's id and two more bytes."""
    return int(binascii.a2b_base64(rest[:24])[:16], 16)


KID = r"[A-Za-z0-9_-]{1,64}"


@lru_cache(maxsize=256)
def credential_header(kid: str) -> bytes:
    """The JWS header of the credentials of a signing key, in base64url."""
    return base64url(json_text({"alg": "HS256", "typ": "JWT", "kid": kid}).encode())


class SigningKey:
    """One key of the keyring: random bytes with a kid as its name. Keys that we make have 32."""

    def __init__(self, kid: str, octets: bytes) -> None:
        self.kid = kid
        self.octets = octets
        self.header = credential_header(kid)
        # All credentials of this key begin with these bytes, and differ only in the rest.
        self.opening = b"%b.%b" % (self.header, base64url(_CLAIMS_OPENING))
        self._keyed = hmac.new(octets, digestmod="sha256")  # to copy it costs half of a new one

    def signature(self, signed: bytes) -> bytes:
        """The JWS signature of header.payload, in base64url."""
        mac = self._keyed.copy()
        mac.update(signed)
        return base64url(mac.digest())

    def sign(self, claims: Claims) -> str:
        """A credential. Keyring.verify() takes only these members, in exactly this spelling."""
        expiry = "" if claims.expires_at is None else f',"exp":{claims.expires_at}'
        payload = (
            f'{{"iss":"hostenroll","sub":"{id_text(claims.host)}","org":"{claims.organization}",'
            f'"iat":{claims.issued_at},"ser":{claims.serial}{expiry}}}'
        )
        signed = b"%b.%b" % (self.header, base64url(payload.encode("ascii")))
        return (b"%b.%b" % (signed, self.signature(signed))).decode("ascii")


_AUDIT_RECORD = json.JSONEncoder(separators=(",", ":"), default=list).encode


def audit_record(values: Sequence[Any]) -> bytes:
    """The text that a MAC covers. No other values have it: a forger's octets become an array."""
    return _AUDIT_RECORD(values).encode("ascii")


class Keyring:
    """The keys of one key file: the first key signs, all keys verify. A keyring never changes."""

    def __init__(
        self, keys: Sequence[SigningKey], audit_key: bytes, file: Optional[os.stat_result] = None
    ) -> None:
        """file: the status of the file that the keys were read from; None: the keys are new."""
        self.keys, self.file = tuple(keys), file
        self.first = keys[0]
        self.kids = [key.kid for key in keys]
        self.audit_key = audit_key
        self._by_header = {key.header: key for key in keys}
        # An attacker who can write the database can choose what an event is chained to. With one
        # key for all three, the MAC of that event would pass for the proof of an anchor.
        domains = b"event", b"anchor", b"head"
        self._audit_keys = {name: hmac.digest(audit_key, name, "sha256") for name in domains}

    def rotated(self) -> Keyring:
        return Keyring([_new_signing_key(), *self.keys], self.audit_key, self.file)

    def without(self, kid: str) -> Keyring:
        return Keyring([key for key in self.keys if key.kid != kid], self.audit_key, self.file)

    def jwk_set(self) -> bytes:
        """The contents of a key file: a JWK Set (RFC 7517 section 5)."""
        rows = [({"use": "sig", "alg": "HS256", "kid": key.kid}, key.octets) for key in self.keys]
        rows.append(({"use": "audit", "kid": "audit"}, self.audit_key))
        keys = [{"kty": "oct", **names, "k": base64url(k).decode("ascii")} for names, k in rows]
        return json.dumps({"keys": keys}, indent=2).encode("ascii") + b"\n"

    def audit_mac(self, domain: bytes, record: bytes, previous: bytes = b"") -> bytes:
        """The HMAC-SHA256 of a record of the audit log. The MAC of an event also covers the MAC
        before it, and so all earlier events. The length of previous comes first, so that no forged
        MAC, of whatever length, passes for a part of a record."""
        framed = b"%d:%b%b" % (len(previous), previous, record)
        return hmac.digest(self._audit_keys[domain], framed, "sha256")

    def old_audit_mac(self, record: bytes, previous: bytes = b"") -> bytes:
        """The MAC of a record in schema 2, which used the audit key itself for every record."""
        return hmac.digest(self.audit_key, previous + record, "sha256")

    def verify(self, credential: bytes) -> Optional[Claims]:
        """The claims of a credential that we signed, however old it is; None for all other bytes.

        The header is never parsed: it must be, byte for byte, the header that we write for a key of
        this keyring. So there is no algorithm to choose, no embedded key to trust, no kid to look
        up elsewhere (RFC 8725 sections 2.1 and 3.10). The signature is compared as text, so it has
        only one spelling.
        """
        if len(credential) > CREDENTIAL_MAXIMUM:
            return None
        signed, _, signature = credential.rpartition(b".")
        header, _, payload = signed.partition(b".")
        key = self._by_header.get(header)
        if key is None or not equal_secrets(key.signature(signed), signature):
            return None
        try:
            octets = _decode_base64url(payload)
        except binascii.Error:
            return None
        match = CLAIMS.fullmatch(octets)
        if match is None or base64url(octets) != payload:
            return None
        host, organization, issued_at, serial, expires_at = match.groups()
        slug = sys.intern(organization.decode("ascii"))
        expiry = None if expires_at is None else int(expires_at)
        return Claims(int(host, 16), slug, int(issued_at), int(serial), expiry, key.kid)


def _new_signing_key() -> SigningKey:
    return SigningKey(secrets.token_hex(8), secrets.token_bytes(32))


def new_keyring() -> Keyring:
    """A keyring with one new signing key and a new audit key."""
    return Keyring([_new_signing_key()], secrets.token_bytes(32))


# Files that are safe to write
#
# Root runs commands in a folder that belongs to the service's user. The owner of a folder decides
# what stands at a name in it, and when: a link to a file of root's, a hard link to one, a file of
# root's that was renamed, a pipe that never answers. So no function below writes to, gives away or
# replaces the file that a name happens to lead to. It creates the file itself (O_EXCL takes no link
# and no existing file), or opens it without following a link and judges the open descriptor. A file
# that replaces another is created, synced and renamed in a folder that is opened once, wherever the
# path of the folder leads by then. The server and the operator may be different users: a new key
# file gets the owner of the file that was read and judged before, whatever is at the name by then.


def resolve_file(path: str) -> str:
    """The absolute path of a file that is to be written. A link in the last component is followed
    only if root or we made it, in a folder that only root or we may write: the owner of a folder
    can rename any link to that name. Raises OperatorError."""
    for _ in range(LINKS_MAXIMUM):
        folder = os.path.realpath(os.path.dirname(path))
        path = os.path.join(folder, os.path.basename(path))
        try:
            status, of_folder = os.lstat(path), os.stat(folder)
        except OSError:
            return path
        if not stat.S_ISLNK(status.st_mode):
            return path
        if {status.st_uid, of_folder.st_uid} - {0, os.geteuid()} or of_folder.st_mode & 0o022:
            raise OperatorError(f"{path} is a link that others can replace: name the file itself")
        path = os.path.join(folder, os.readlink(path))
    raise OperatorError(f"{path} is a link that leads to itself: name the file itself")


def create_file(path: str, mode: int = PRIVATE_MODE, dir_fd: Optional[int] = None) -> int:
    """The descriptor of a new file with exactly this mode, open for writing. dir_fd: the descriptor
    of the folder, if path is a name. Raises FileExistsError if the name exists, also as a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(path, flags, mode, dir_fd=dir_fd)
    os.fchmod(descriptor, mode)  # whatever the umask
    return descriptor


def require_own_file(path: str, database: str, descriptor: int = -1) -> None:
    """Raises OperatorError unless the database, or a file beside it, is regular and may be used.

    descriptor: the file is open; else it is examined by its name. The owner is the owner of the
    database; if there is none yet, or the file itself is the database, the owner of the folder.
    The database and lock files may belong to the owner, and also to root or us if they have one
    name only: a second name may be a hard link to any file of root's. A file that SQLite opens
    beside the database must have one name. If we are root, SQLite gives it to the owner, so it must
    be the owner's already; else it may also be ours. SQLite deletes any file that a -journal names,
    so a -journal must be ours."""
    status = os.lstat(path) if descriptor < 0 else os.fstat(descriptor)
    owner = os.stat(os.path.dirname(database) or ".").st_uid
    if path != database:
        with suppress(FileNotFoundError):
            owner = os.lstat(database).st_uid
    is_single, we = status.st_nlink == 1, os.geteuid()
    if path.endswith((".gate", ".lock", ".serve")) or path == database:
        is_own = status.st_uid == owner or (is_single and status.st_uid in (0, we))
    else:
        trusted = {owner, we or owner} & ({we} if path.endswith("-journal") else {owner, we})
        is_own = is_single and status.st_uid in trusted
    if not stat.S_ISREG(status.st_mode) or not is_own:
        raise OperatorError(
            f"{path} is a link, a second name, or another user's file: if it belongs to this "
            "database, chown it to the database's owner and run this as that user, else remove it"
        )


def open_lock_file(path: str, database: str) -> int:
    """The descriptor of a lock file beside a database; a missing file is created. A new file gets
    the owner and the mode of the database, if there is one; an existing file is not changed.
    Raises OperatorError for a file that cannot be a lock file of ours, and OSError."""
    try:
        descriptor = create_file(path)
    except FileExistsError:
        require_own_file(path, database)  # so it is no link, folder or socket
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would wait
        try:
            require_own_file(path, database, descriptor)  # the name may lead elsewhere by now
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor
    with suppress(OSError):  # no database yet, or another user's: then the file stays as it is
        status = os.lstat(database)
        if stat.S_ISREG(status.st_mode):
            os.fchown(descriptor, status.st_uid, status.st_gid)
            os.fchmod(descriptor, status.st_mode & 0o666 | PRIVATE_MODE)
    return descriptor


class Folder:
    """An open folder. Its methods act on names in this very folder, and follow no link."""

    def __init__(self, path: str, parent: Optional[Folder] = None) -> None:
        """path: with a parent, a name in the parent. Raises OSError, also if the name is a link."""
        self.path: str = os.path.join(parent.path, path) if parent else os.path.realpath(path)
        flags, name = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, path if parent else self.path
        self.descriptor: int = os.open(name, flags, dir_fd=parent.descriptor if parent else None)

    def close(self) -> None:
        os.close(self.descriptor)

    def status(self, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)

    def remove(self, name: str) -> None:
        """Remove the file with a name, if there is one."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    @contextmanager
    def replacing(self, name: str, like: Optional[os.stat_result] = None) -> Iterator[BinaryIO]:
        """A new file of mode 0600. At the end of the with block, when all of it is on the disk, it
        replaces the file with this name; after an error that file stays as it is. like: the status
        of a file, whose owner the new file gets; its group may read the new file if it could read
        that one. One process at a time. Raises OSError, OperatorError."""
        fresh, path = f"{name}.tmp", os.path.join(self.path, name)
        try:
            self.remove(fresh)  # left by a process that was killed, or an attacker's
            descriptor = create_file(fresh, dir_fd=self.descriptor)
            with open(f"{path}.tmp", "wb", opener=lambda *_: descriptor) as file:
                if like is not None:
                    with suppress(OSError):  # only root may give files away
                        os.fchown(descriptor, like.st_uid, like.st_gid)
                        os.fchmod(descriptor, PRIVATE_MODE | like.st_mode & 0o040)
                yield file
                file.flush()
                os.fsync(descriptor)
                os.replace(fresh, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
                if not os.path.samestat(self.status(name), os.fstat(descriptor)):
                    raise OperatorError(f"another user replaced {path} while it was written")
            os.fsync(self.descriptor)  # else the rename may be lost with the power
        except BaseException as error:
            with suppress(OSError):  # the first error says more
                self.remove(fresh)
            if not isinstance(error, OSError):
                raise
            remedy = f": remove {path}.tmp" if fresh in os.listdir(self.descriptor) else ""
            raise OSError(error.errno, f"{error.strerror}{remedy}", path) from error


@contextmanager
def replacing(path: str, like: Optional[os.stat_result] = None) -> Iterator[BinaryIO]:
    """Folder.replacing() for the file that resolve_file() finds at a path."""
    folder, name = os.path.split(resolve_file(path))
    with closing(Folder(folder)) as opened, opened.replacing(name, like) as file:
        yield file


OPEN_TO_ALL = "any user can replace files in {0}: {1}, or chmod o-w {0}"


def is_open_to_all(folder: Union[str, int]) -> bool:
    """Whether any user may replace the files in a folder: others may write, and no sticky bit
    protects the files of other users. A group that may write was chosen on purpose."""
    return os.stat(folder).st_mode & (stat.S_ISVTX | stat.S_IWOTH) == stat.S_IWOTH


def folders_open_to_all(*files: str) -> list[str]:
    """The folders that are open to all, among those of files and of what the files link to."""
    paths = {path for file in files for path in (os.path.abspath(file), os.path.realpath(file))}
    folders = sorted(set(map(os.path.dirname, paths)))
    return [folder for folder in folders if os.path.isdir(folder) and is_open_to_all(folder)]


def _parse_jwk(jwk: Mapping[str, Any]) -> tuple[str, str, bytes]:
    use, kid, octets = str(jwk["use"]), jwk["kid"], _decode_base64url(str(jwk["k"]).encode("ascii"))
    if jwk["kty"] != "oct" or jwk.get("alg", "HS256") != "HS256" or not re.fullmatch(KID, kid):
        raise ValueError("a key is not an oct key for HS256 with a kid")
    if len(octets) < 32 or base64url(octets).decode("ascii") != jwk["k"]:
        raise ValueError("a key is not 32 bytes or more in base64url")
    return use, kid, octets


def read_private(
    path: str, kind: str, owner: int = 0, maximum: int = KEY_FILE_MAXIMUM
) -> tuple[bytes, os.stat_result]:
    """The contents of a file of secrets, and its status. Raises OperatorError for a file that
    cannot be read, is open to others, or belongs to neither root, us nor the owner. Links are
    followed, since mounted secrets are links; the opened file is judged."""
    try:
        # Without O_NONBLOCK, a pipe would wait for its writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as f:
            status = os.fstat(f.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > maximum:
                raise OSError(errno.EINVAL, "not a file, or far too large")
            octets = f.read()
    except OSError as error:
        raise OperatorError(f"cannot read the {kind} {path}: {error.strerror}") from error
    if status.st_uid not in (0, os.geteuid(), owner):
        raise OperatorError(
            f"the {kind} {path} belongs to another user, of id {status.st_uid}: run this as that "
            "user, or put the right file back and chown it to root or the database's owner"
        )
    # A secret that is mounted for a service belongs to root, and the service's group may read it.
    if status.st_mode & (0o077 if status.st_uid else 0o027):
        raise OperatorError(f"the {kind} {path} is open to others: chmod 600 {path}")
    return octets, status


def load_keyring(path: str, database: str) -> Keyring:
    """The keyring in a key file, which may belong to the database's owner. Raises OperatorError."""
    # If there is no database, or any user may have put it there, the folder's owner counts.
    try:
        folder = owner = os.stat(os.path.dirname(database) or ".")
        if not folder.st_mode & 0o002:
            with suppress(FileNotFoundError):
                owner = os.lstat(database)
    except OSError as error:
        raise OperatorError(f"cannot read the key file {path}: {error.strerror}") from error
    octets, status = read_private(path, "key file", owner.st_uid)
    try:
        keys = [_parse_jwk(jwk) for jwk in json.loads(octets)["keys"]]
        signing = [SigningKey(kid, octets) for use, kid, octets in keys if use == "sig"]
        audit = [octets for use, _, octets in keys if use == "audit"]
        if not signing or len(audit) != 1 or len({key.kid for key in signing}) < len(signing):
            raise ValueError("it needs one audit key, and signing keys with a kid each")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OperatorError(
            f"the key file {path} is not one of hostenroll ({error}): restore it from a backup"
        ) from error
    return Keyring(signing, audit[0], status)


class KeyFile:
    """A key file that others may replace while we run. The path is resolved at each read, because a
    mounted secret is updated by a new target of a link in its path."""

    def __init__(self, path: str, database: str) -> None:
        self.path, self._database = path, database
        self.trouble = ""  # why the keys that are in the file now are not used
        self.patience: Optional[float] = None  # seconds that reload() may take; None: no limit
        self._seen: Optional[tuple[int, ...]] = None
        self._reading: Optional[futures.Future[Any]] = None

    def load(self) -> Keyring:
        """The keyring in the file. Raises OperatorError."""
        self._seen = self._fingerprint()
        return load_keyring(self.path, self._database)

    def replace(self, keyring: Keyring) -> None:
        """Write a keyring into the file, whole or not at all. Raises OperatorError, also for a new
        keyring in a folder where any user may replace the file."""
        folders = folders_open_to_all(self.path)
        if folders and keyring.file is None:
            raise OperatorError(OPEN_TO_ALL.format(folders[0], "name a file by --key-file"))
        try:
            with replacing(self.path, keyring.file) as file:
                file.write(keyring.jwk_set())
        except OSError as error:
            raise OperatorError(f"cannot write {error.filename}: {error.strerror}") from error
        self._seen = self._fingerprint()

    def remove(self) -> None:
        """Remove the file that replace() has just made, and no other."""
        folder, name = os.path.split(os.path.realpath(self.path))
        with suppress(OSError), closing(Folder(folder)) as opened:
            status = opened.status(name)
            if self._seen and (status.st_dev, status.st_ino) == self._seen[:2]:
                opened.remove(name)

    def reload(self, current: Keyring) -> Optional[Keyring]:
        """The keyring in the file if the file has changed; else None. A keyring that is not valid,
        or is of another database than the current one, is not used but logged. The audit key tells
        the database, since it never changes."""
        patience: Optional[float] = 0  # for an earlier read that is late already
        if self._reading is None or self._reading.done():
            patience, known = self.patience, () if self.trouble else self._seen
            self._reading = in_background(partial(self._read, known))
        try:
            seen, keyring = self._reading.result(patience)
            if keyring is not None and not equal_secrets(keyring.audit_key, current.audit_key):
                raise OperatorError(f"{self.path} is of another database: put the right one back")
        except (OperatorError, futures.TimeoutError) as error:
            trouble = str(error) or f"cannot read the key file {self.path}: it takes too long"
            if self.trouble != trouble:
                log.error("%s; until then the server uses the keys that it loaded before", trouble)
            self.trouble = trouble
            return None
        if self.trouble:
            log.info("the key file %s is valid again", self.path)
        self.trouble, self._seen = "", seen
        return keyring if isinstance(keyring, Keyring) else None

    def _read(self, known: object) -> tuple[object, Optional[Keyring]]:
        """The fingerprint of the file, and the keyring in it if it has another one than known."""
        seen = self._fingerprint()
        return seen, None if seen == known else load_keyring(self.path, self._database)

    def _fingerprint(self) -> Optional[tuple[int, ...]]:
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        # A write, a rename or a chmod changes st_ctime, unless within one tick of its clock.
        return status.st_dev, status.st_ino, status.st_mode, status.st_size, status.st_ctime_ns


def _der_elements(octets: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """The elements in DER octets (ITU-T X.690 section 8.1): tag, whole element, contents."""
    while octets:
        length, start = octets[1], 2
        if length & 0x80:
            start += length & 0x7F
            length = int.from_bytes(octets[2:start], "big")
        if len(octets) < start + length:
            raise ValueError("cut short")
        yield octets[0], octets[: start + length], octets[start : start + length]
        octets = octets[start + length :]


PIN = "sha256//[A-Za-z0-9+/]{43}="  # the pin of a public key, as curl's --pinnedpubkey takes it


class Certificate(NamedTuple):
    pin: str  # SHA-256 of the SubjectPublicKeyInfo
    ends: int  # notAfter in Unix ms, at least 1


def read_certificate(octets: bytes, path: str = "it") -> Certificate:
    """A certificate in DER (RFC 5280 section 4.1). Raises OperatorError, where OpenSSL may not."""
    try:
        _, _, contents = next(_der_elements(octets))
        _, _, signed = next(_der_elements(contents))
        kinds, members, contents_of = zip(*_der_elements(signed))
        issuer = 3 if kinds[0] == 0xA0 else 2  # version 1 is left out; others are the first member
        key = members[issuer + 3]
        _, (kind, _, not_after) = _der_elements(contents_of[issuer + 1])
        text = not_after.decode("ascii")
        if kind == 0x17:  # UTCTime has two digits of the year: section 4.1.2.5.1
            text = f"{'19' if text >= '50' else '20'}{text}"
        ends = timegm((int(text[:4]), *(int(text[at : at + 2]) for at in range(4, 14, 2))))
    except (IndexError, StopIteration, ValueError) as error:
        raise OperatorError(f"cannot read {path}: not an X.509 certificate") from error
    pin = f"sha256//{base64.b64encode(sha256(key)).decode('ascii')}"
    return Certificate(pin, max(1, ends * SECOND_MS))


# 5. Store
#
# Law: the database remembers; it decides nothing and refuses nothing. SQL and the lock between
# processes stand here alone. Methods report facts: rows, or how many rows a statement changed.
#
# Contents: the schema and its migrations; the records; WriteLock; Engine (SQLite: its files,
# transactions and checkpoints); Queries (every other statement, in SQL that PostgreSQL knows too).

APPLICATION_ID = 0x686F7374  # "host"
SCHEMA_VERSION = 3

SCHEMA = """\
-- hostenroll's database. Times are Unix milliseconds unless a comment says otherwise.
-- Ids are integers here and 16 hexadecimal digits everywhere else.

PRAGMA application_id = 0x686F7374;
PRAGMA user_version = 3;

CREATE TABLE organization (
    -- Owns hosts, tokens and API keys.
    id          TEXT    NOT NULL PRIMARY KEY,  -- the slug given to add-org
    created_at  INTEGER NOT NULL,
    expiry      INTEGER NOT NULL DEFAULT 0  -- above 0: when it stopped; below: allowed at -expiry
) WITHOUT ROWID;

CREATE TABLE api_key (
    -- Lets a person or a script use the user API.
    id               INTEGER PRIMARY KEY,
    secret_hash      BLOB    NOT NULL,  -- SHA-256 of the key's text
    organization_id  TEXT    REFERENCES organization (id),  -- NULL: all of them
    role             TEXT    NOT NULL CHECK (role IN ('admin', 'viewer')),
    description      TEXT    NOT NULL,
    created_at       INTEGER NOT NULL,
    created_by       TEXT    NOT NULL,
    revoked_at       INTEGER,
    maker_id         INTEGER,           -- the API key that made it, or NULL
    expires_at       INTEGER,           -- NULL: never
    last_used_at     INTEGER            -- within the hour; NULL: never
);
CREATE INDEX api_key_maker ON api_key (maker_id) WHERE maker_id IS NOT NULL;

CREATE TABLE token (
    -- Lets hosts in. Rows stay for 30 days when they are used up, expired or revoked.
    id               INTEGER PRIMARY KEY,
    secret_hash      BLOB    NOT NULL,  -- SHA-256 of the token's text
    organization_id  TEXT    NOT NULL REFERENCES organization (id),
    description      TEXT    NOT NULL,
    hostname         TEXT,              -- bound to this hostname; NULL: to none
    host_id          INTEGER,           -- bound to this host: a re-enroll token
    labels           TEXT    NOT NULL,  -- a JSON object of strings, given to the host
    max_uses         INTEGER NOT NULL CHECK (max_uses >= 1),
    uses             INTEGER NOT NULL DEFAULT 0 CHECK (uses BETWEEN 0 AND max_uses),
    created_at       INTEGER NOT NULL,
    created_by       TEXT    NOT NULL,
    expires_at       INTEGER NOT NULL,
    used_at          INTEGER,           -- the last use
    used_from        TEXT,              -- the address of the last use
    revoked_at       INTEGER,
    own_interval     INTEGER,           -- seconds between the heartbeats of its hosts, or NULL
    ephemeral        INTEGER            -- seconds of silence that delete its hosts, or NULL
);
CREATE INDEX token_organization ON token (organization_id);
CREATE INDEX token_host ON token (host_id) WHERE host_id IS NOT NULL;
CREATE INDEX token_end ON token
    (coalesce(revoked_at, CASE WHEN uses >= max_uses THEN used_at ELSE expires_at END));

CREATE TABLE host (
    -- A machine that has enrolled. The table heartbeat has what changes with each heartbeat.
    id               INTEGER PRIMARY KEY,
    organization_id  TEXT    NOT NULL REFERENCES organization (id),
    name             TEXT    NOT NULL,
    hostname         TEXT    NOT NULL,
    bound            INTEGER NOT NULL,  -- 1: the token named the hostname; heartbeats keep it
    os               TEXT    NOT NULL,
    architecture     TEXT    NOT NULL,
    docker_version   TEXT    NOT NULL,
    labels           TEXT    NOT NULL,  -- a JSON object of strings
    issued           INTEGER NOT NULL,  -- the highest serial issued
    enrolled_at      INTEGER NOT NULL,
    revoked_at       INTEGER,
    token_id         INTEGER NOT NULL,  -- the token that it enrolled with
    admitted_by      INTEGER NOT NULL,  -- the token of its last enrollment or re-enrollment
    admitted_at      INTEGER NOT NULL,
    admitted_serial  INTEGER NOT NULL,  -- the serial that was issued for that token
    idempotency      BLOB,              -- SHA-256 of the Idempotency-Key sent with that token
    issued_to        TEXT    NOT NULL DEFAULT '',  -- the address that the highest serial went to
    twin_id          INTEGER,           -- a live host that had this hostname at admitted_at
    agent_version    TEXT    NOT NULL DEFAULT '',  -- as the agent reports it
    issued_at        INTEGER NOT NULL DEFAULT 0,  -- when the highest serial was issued
    issued_hash      BLOB,              -- SHA-256 of that credential and the serial it replaces
    instances        TEXT    NOT NULL DEFAULT '',  -- sightings, a line for each, newest first
    copied_at        INTEGER NOT NULL DEFAULT 0,  -- the last sign of a copied credential, or 0
    every_seconds    INTEGER,           -- its rhythm, if cron decides it; NULL: the server does
    own_interval     INTEGER,           -- seconds between its heartbeats; NULL: the server's
    enrolled_from    TEXT    NOT NULL DEFAULT '',  -- the address that it enrolled from
    address          TEXT    NOT NULL DEFAULT '',  -- of its last heartbeat; empty: not known
    address_since    INTEGER NOT NULL DEFAULT 0,
    moved_at         INTEGER NOT NULL DEFAULT 0,  -- the last move that was an event, or 0
    refused_at       INTEGER NOT NULL DEFAULT 0,  -- the last refusal of the host, or 0
    refused_code     TEXT    NOT NULL DEFAULT '',  -- the code of that refusal
    restored_at      INTEGER NOT NULL DEFAULT 0,  -- when it was last restored, or 0
    state            INTEGER NOT NULL DEFAULT 2,  -- a copy of heartbeat.state, for lists
    status_since     INTEGER NOT NULL DEFAULT 0,  -- when its status last changed
    muted_until      INTEGER NOT NULL DEFAULT 0,  -- until then notifications are off
    ephemeral        INTEGER            -- seconds of silence after which it is deleted, or NULL
);
CREATE INDEX host_state ON host (state, status_since);
CREATE INDEX host_name ON host (state, name);
CREATE INDEX host_owner_state ON host (organization_id, state, status_since);
CREATE INDEX host_owner_name ON host (organization_id, state, name);
CREATE INDEX host_organization ON host (organization_id);
CREATE INDEX host_hostname ON host (organization_id, lower(rtrim(hostname, '.')));
CREATE INDEX host_token ON host (token_id);
CREATE INDEX host_token_live ON host (token_id) WHERE revoked_at IS NULL;
CREATE UNIQUE INDEX host_idempotency ON host (admitted_by, idempotency)
    WHERE idempotency IS NOT NULL;

CREATE TABLE census (
    -- How many hosts an organization has in each state. The triggers below keep it.
    organization_id  TEXT    NOT NULL,
    state            INTEGER NOT NULL,
    hosts            INTEGER NOT NULL,
    PRIMARY KEY (organization_id, state)
) WITHOUT ROWID;

CREATE TABLE signing_key (
    -- The keys of the key file by name, never the keys themselves.
    number      INTEGER PRIMARY KEY,
    kid         TEXT    NOT NULL UNIQUE,
    created_at  INTEGER NOT NULL,
    retired_at  INTEGER                -- NULL: it is in the key file
);

CREATE TABLE heartbeat (
    -- One narrow row for each host: all that a heartbeat reads and writes.
    host_id        INTEGER PRIMARY KEY REFERENCES host (id) ON DELETE CASCADE,
    last_seen      INTEGER NOT NULL,  -- 0: never
    serial         INTEGER NOT NULL,  -- the valid serial: the highest seen; at first the one issued
    key_number     INTEGER NOT NULL,  -- of the signing_key of the credential with that serial
    state          INTEGER NOT NULL,  -- the status that was last reported: see change
    told_interval  INTEGER NOT NULL DEFAULT 30,  -- the last interval sent to it, in seconds
    address_key    INTEGER NOT NULL DEFAULT 0  -- for its address; below 0: any till -address_key
);
CREATE INDEX heartbeat_key ON heartbeat (key_number);

CREATE TABLE change (
    -- What was reported of a host: 1 online, 2 pending, 3 offline, 4 missing, 5 revoked, 6 deleted.
    number           INTEGER PRIMARY KEY,  -- in the order of the commits; the last is never pruned
    at               INTEGER NOT NULL,  -- when it became true
    host_id          INTEGER NOT NULL,  -- of a host that may be deleted by now
    organization_id  TEXT    NOT NULL,
    name             TEXT    NOT NULL,  -- as it was then
    labels           TEXT    NOT NULL,  -- as they were then
    was              INTEGER NOT NULL,  -- the status before; 0: it has just enrolled
    status           INTEGER NOT NULL,
    seen             INTEGER NOT NULL,  -- the last heartbeat as of then; 0: there was none
    actor            TEXT    NOT NULL,  -- as in audit; empty: time, or a heartbeat
    ephemeral        INTEGER,           -- as it was then
    address          TEXT    NOT NULL DEFAULT ''  -- as it was then
);
CREATE INDEX change_host ON change (host_id, number);
CREATE INDEX change_expired ON change (organization_id, at)
    WHERE actor = 'expire' AND ephemeral IS NULL;

CREATE TABLE feed (
    -- One row. After a restore the numbers of changes and events are given out again. So a new
    -- database begins a history of its own, and so does each copy.
    id       INTEGER PRIMARY KEY CHECK (id = 1),
    history  TEXT    NOT NULL,  -- random: the first part of every cursor
    change   INTEGER NOT NULL,  -- the last change when the history began; 0: none
    event    INTEGER NOT NULL,  -- the last event when the history began; 0: none
    lost_until   INTEGER NOT NULL DEFAULT 0,  -- until then, hosts that a restore lost wait
    newest_host  INTEGER NOT NULL DEFAULT 0,  -- the backup's highest id: higher ones may be lost
    lost         INTEGER NOT NULL DEFAULT 0   -- how many hosts are lost; 0: not known
);

CREATE TABLE service (
    -- One row: what the servers on this database write about themselves, to compute status.
    id              INTEGER PRIMARY KEY CHECK (id = 1),
    started         INTEGER NOT NULL,  -- when service began again after the last pause
    alive           INTEGER NOT NULL,  -- when a server last wrote that it lives
    previous_alive  INTEGER NOT NULL,  -- when a server last lived before that pause
    interval        INTEGER NOT NULL,  -- the heartbeat interval, in seconds
    public_url      TEXT    NOT NULL,  -- where agents find the server
    pin             TEXT    NOT NULL DEFAULT '',  -- what join commands pin: curl's --pinnedpubkey
    pinned          TEXT    NOT NULL DEFAULT '',  -- the last pin that was not ''
    certificate_ends INTEGER NOT NULL DEFAULT 0,  -- 0: there is none
    warned_at       INTEGER NOT NULL DEFAULT 0,  -- when the log last warned of that end
    pauses          TEXT    NOT NULL DEFAULT ''  -- earlier pauses: previous_alive-started, ...
);

CREATE TABLE audit (
    -- What happened, event after event. Each mac covers its row and the mac before it, by a key
    -- made of the audit key: with the database alone no row can be changed or added unseen.
    number           INTEGER PRIMARY KEY,  -- 1, 2, 3 ... without a gap
    at               INTEGER NOT NULL,
    action           TEXT    NOT NULL,  -- mint, enroll, refuse, renew ...
    actor            TEXT    NOT NULL,  -- api-key:<id>, cli:<user>, token:<id>, host:<id> ...
    address          TEXT    NOT NULL,  -- '': this machine's command line, or the server itself
    organization_id  TEXT,              -- the owner; NULL: none
    subject          TEXT    NOT NULL,  -- host:<id>, token:<id> ...; '': none
    code             TEXT,              -- of a refusal
    detail           TEXT    NOT NULL,  -- a JSON object
    mac              BLOB    NOT NULL   -- HMAC-SHA256
);
CREATE INDEX audit_organization ON audit (organization_id);
CREATE INDEX audit_format ON audit (action) WHERE action = 'audit-format';

CREATE TABLE audit_anchor (
    -- One row if older events have been pruned: what the first remaining event is chained to.
    id      INTEGER PRIMARY KEY CHECK (id = 1),
    number  INTEGER NOT NULL,  -- of the event before the first remaining one
    mac     BLOB    NOT NULL,  -- its mac
    proof   BLOB    NOT NULL   -- HMAC-SHA256 of both; without it, to cut the start would be easy
);

CREATE TRIGGER census_adds AFTER INSERT ON host
BEGIN
    INSERT INTO census VALUES (NEW.organization_id, NEW.state, 1)
        ON CONFLICT (organization_id, state) DO UPDATE SET hosts = hosts + 1;
END;

CREATE TRIGGER census_moves AFTER UPDATE OF state ON host
WHEN OLD.state <> NEW.state
BEGIN
    INSERT INTO census VALUES (OLD.organization_id, OLD.state, -1),
        (NEW.organization_id, NEW.state, 1)
        ON CONFLICT (organization_id, state) DO UPDATE SET hosts = hosts + excluded.hosts;
END;

CREATE TRIGGER census_removes AFTER DELETE ON host
BEGIN
    UPDATE census SET hosts = hosts - 1
        WHERE organization_id = OLD.organization_id AND state = OLD.state;
END;

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

# The CREATE statements of SCHEMA by the name of the table, index or trigger.
SCHEMA_OBJECTS = {
    name: text for text, name in re.findall(r"(?ms)^(CREATE [A-Z ]+ (\w+).*?);$(?!\nEND)", SCHEMA)
}

# The steps for a database of an older version: columns get their present names (RENAMES), then what
# is missing of SCHEMA is added, then the values of old rows are set (MIGRATIONS).
RENAMES: Mapping[int, Sequence[str]] = {
    2: ("ALTER TABLE heartbeat RENAME COLUMN active TO state",),
}
MIGRATIONS: Mapping[int, Sequence[str]] = {
    1: ("UPDATE heartbeat SET serial = 1 WHERE serial = 0",),
    2: (
        "UPDATE service SET pinned = pin",
        "UPDATE heartbeat SET told_interval = coalesce((SELECT interval FROM service), 30)",
        "UPDATE host SET status_since = enrolled_at",
        # After this, begin_feed() computes the states of hosts that have sent a heartbeat.
        "UPDATE heartbeat SET state = CASE WHEN state = 0 THEN 5 WHEN last_seen = 0 THEN 2 ELSE 1"
        " END",
    ),
}

# The words of SQL. White space is only what SQLite takes for it; all else belongs to a name.
_SQL_WORDS = re.compile(r"""(?as)--[^\n]*|/\*.*?(?:\*/|\Z)|'(?:[^']|'')*'|"[a-z_]+"|\w+|\S""")


def canonical(statement: str) -> str:
    """A CREATE statement in a form that can be compared. It has no comments and no layout. The
    columns of a table are in alphabetical order, since ALTER TABLE puts a new column last. Names
    lose the quotation marks that its RENAME adds. A statement that SQLite reads differently from
    one of SCHEMA stays different, since SCHEMA has its keywords in capitals, and no comma, bracket
    or comment between quotation marks."""
    words = (word for word in _SQL_WORDS.findall(statement) if not word.startswith(("--", "/*")))
    text = " ".join(word.strip('"') or word for word in words)
    head, _, rest = text.partition(" ( ")
    if not head.startswith("CREATE TABLE"):
        return text
    body, _, tail = rest.rpartition(" )")
    return " , ".join([head, *sorted(re.split(r" , (?![^()]* \))", body)), tail])


ONLINE, PENDING, OFFLINE, MISSING, REVOKED, DELETED = range(1, 7)  # the states in a row of change


class Token(NamedTuple):  # a record, as the classes below: one row, with the columns of SCHEMA
    id: int
    secret_hash: bytes
    organization_id: str
    description: str
    hostname: Optional[str]
    host_id: Optional[int]
    labels: str
    max_uses: int
    created_at: int
    created_by: str
    expires_at: int
    own_interval: Optional[int]
    ephemeral: Optional[int]
    uses: int = 0
    used_at: Optional[int] = None
    used_from: Optional[str] = None
    revoked_at: Optional[int] = None


class Host(NamedTuple):
    """A row of host with its row of heartbeat. A value that a new host lacks has a default."""

    id: int
    organization_id: str
    name: str
    hostname: str
    bound: int
    os: str
    architecture: str
    docker_version: str
    agent_version: str
    labels: str
    issued: int
    enrolled_at: int
    token_id: int
    admitted_by: int
    admitted_at: int
    admitted_serial: int
    issued_to: str
    issued_at: int
    twin_id: Optional[int]
    every_seconds: Optional[int]
    own_interval: Optional[int]
    enrolled_from: str
    status_since: int
    ephemeral: Optional[int]
    revoked_at: Optional[int] = None
    idempotency: Optional[bytes] = None
    issued_hash: Optional[bytes] = None
    instances: str = ""
    copied_at: int = 0
    address: str = ""
    address_since: int = 0
    moved_at: int = 0
    refused_at: int = 0
    refused_code: str = ""
    restored_at: int = 0
    muted_until: int = 0
    last_seen: int = 0
    serial: int = 1
    key_number: int = 0
    state: int = PENDING
    told_interval: int = 0
    address_key: int = 0

    @property
    def status_inputs(self) -> tuple[int, Optional[int], int]:
        """The values that decide the host's status."""
        return self.last_seen, self.revoked_at, self.told_interval


class Change(NamedTuple):
    """A row of change. A new row gets its number when it is written."""

    number: int
    at: int
    host_id: int
    organization_id: str
    name: str
    labels: str
    was: int
    status: int
    seen: int
    actor: str
    ephemeral: Optional[int] = None
    address: str = ""


class Census(NamedTuple):
    organization_id: str
    state: int
    hosts: int


class Feed(NamedTuple):
    history: str
    change: int
    event: int
    lost_until: int = 0
    newest_host: int = 0
    lost: int = 0


class ApiKey(NamedTuple):
    id: int
    secret_hash: bytes
    organization_id: Optional[str]
    role: str
    description: str
    created_at: int
    created_by: str
    maker_id: Optional[int]
    expires_at: Optional[int]
    revoked_at: Optional[int] = None
    last_used_at: Optional[int] = None


class Organization(NamedTuple):
    id: str
    created_at: int
    expiry: int = 0


class Service(NamedTuple):
    started: int
    alive: int
    previous_alive: int
    interval: int
    public_url: str
    pin: str = ""
    pinned: str = ""
    certificate_ends: int = 0
    warned_at: int = 0
    pauses: str = ""


class SigningKeyRow(NamedTuple):
    number: int
    kid: str
    created_at: int
    retired_at: Optional[int]


class Event(NamedTuple):
    """A row of audit. A new event gets its number and its mac when it joins the chain."""

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

    def legible(self) -> Event:
        """This event with types that can be shown: a forger can put any type into any column."""
        if _fits_record(Event, tuple(map(type, self))):
            return self
        at = self.at if isinstance(self.at, int) else 0
        shown = [v if type(v) in types else repr(v) for v, types in zip(self, _column_types(Event))]
        return Event._make((self.number, at, *shown[2:-1], self.mac))


class Anchor(NamedTuple):
    number: int
    mac: bytes
    proof: bytes


class StoreError(Exception):
    """The database failed, and the transaction is dead: roll it back. After SQLITE_FULL, IOERR and
    NOMEM SQLite has rolled back already, and a further statement would be committed by itself."""


class NotDurable(StoreError):
    """The transaction does not wait for the disk, but what it writes must be on the disk."""


class StoreBusy(StoreError):
    """Another process has locked the database."""


class BadRow(StoreError):
    """A row has values that we never write: SQLite takes any type. Only acts on the row fail."""


# SQLite's name for the type of a value, by the type in a record.
STORED_AS = {int: "'integer'", str: "'text'", bytes: "'blob'", type(None): "'null'"}


def _row_name(value: Any) -> str:
    """The name of a row in messages, made from its first value."""
    return id_text(value) if isinstance(value, int) else ascii(value)


def _column_types(record: type[Any]) -> list[tuple[type, ...]]:
    """The types that each column of a record may have."""
    hints = typing.get_type_hints(record, globals()).values()
    return [typing.get_args(hint) or (hint,) for hint in hints]


@lru_cache(maxsize=256)
def _fits_record(record: type[Any], types: tuple[type, ...]) -> bool:
    """Whether a record can be made of values of these types."""
    return all(kind in kinds for kind, kinds in zip(types, _column_types(record)))


def _decode_text(octets: bytes) -> Union[str, bytes]:
    """A TEXT of a database. If it is not UTF-8, it stays octets, and so fits no column of text."""
    try:
        return octets.decode("utf-8")
    except UnicodeDecodeError:
        return octets


SQLITE_BUSY, SQLITE_IOERR_FSYNC = 5, 1034  # result codes

# What an operator can do about an error of SQLite or of the system, by the start of its text.
ROOM = "make room on its disk"
WRITABLE = "mount its disk read-write, or chown folder and file to the server's user"
RESTORE = "restore it from a backup"
DAMAGED = f"run check, and {RESTORE}"
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
    "'utf-8' codec can't decode": DAMAGED,  # the name in an error of SQLite
    "file is not a database": DAMAGED,
    "database is locked": "another program is writing to it: end that program",
    "interrupted": "it has damaged rows without end",  # see DAMAGED_PATIENCE
    "Python int too large": RESTORE,  # a forged number to which we add
    os.strerror(errno.EMFILE): "raise the limit of open files",
}


def describe_error(path: str, error: Exception) -> str:
    """What went wrong with a file, and what to do, in one line."""
    text = getattr(error, "strerror", None) or str(error)
    text = text or "malformed database schema"  # Python 3.9 and 3.10 cannot decode the name in it
    remedies = (remedy for start, remedy in REMEDIES.items() if text.startswith(start))
    return ": ".join(filter(None, (path, text, next(remedies, ""))))


def file_id(file: Union[str, int]) -> Optional[tuple[int, int]]:
    """Device and inode of a file, by path or descriptor; None if there is none. The file is not
    opened: closing any descriptor of a database drops SQLite's locks on it. Raises StoreError."""
    try:
        status = os.lstat(file) if isinstance(file, str) else os.fstat(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(describe_error(str(file), error)) from error
    return status.st_dev, status.st_ino


def descriptors_of(file: Optional[tuple[int, int]]) -> list[int]:
    """The descriptors of a file in this process, also SQLite's. Without /proc, an empty list."""
    numbers = []
    with suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with suppress(StoreError):  # the descriptor of the listing itself is closed by now
                if file_id(int(name)) == file:
                    numbers.append(int(name))
    return numbers


def try_flock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock a file. False if another process has locked it. Raises StoreError."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StoreError(f"cannot lock: {error.strerror}") from error
    return True


def open_lock(database: str, suffix: str) -> tuple[str, int]:
    """Path and descriptor of a lock file. Raises StoreError and OperatorError."""
    try:
        path = resolve_file(database)
        return f"{path}{suffix}", open_lock_file(f"{path}{suffix}", path)
    except OSError as error:
        raise StoreError(f"cannot open {describe_error(error.filename, error)}") from error


@contextmanager
def service_lock(database: str, is_shared: bool) -> Iterator[None]:
    """The lock that servers share while they run, and that a restore has alone. Raises StoreError
    (StoreBusy if others have the lock) and OperatorError."""
    _, descriptor = open_lock(database, ".serve")
    try:
        if not try_flock(descriptor, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX):
            reason = "a server runs, or a backup is being restored: end that first"
            raise StoreBusy(f"{resolve_file(database)}: {reason}")
        yield
    finally:
        os.close(descriptor)


class WriteLock:
    """The lock that lets one process at a time write: two flocks, gate and lock, on files beside
    the database.

    A process takes the gate, then waits for the lock while it holds the gate, so that no other
    process overtakes it; with the lock alone, a busy server would starve all others. A process that
    stops waiting must release the gate. The files are never unlinked: a lock on an unlinked file
    excludes no process. The first try opens them, and may raise OperatorError. Checkpoints need the
    lock too: SQLite before 3.51.3 can corrupt a database if one meets another process's write.
    """

    def __init__(self, database: str) -> None:
        self._database = database
        self._files: list[tuple[str, int]] = []  # path and descriptor: the gate, then the lock
        self._holds = [False, False]  # gate, lock

    def exists_unchanged(self) -> bool:
        """Whether the files at the paths, which other processes lock, are those that we opened."""
        return all(file_id(path) == file_id(descriptor) for path, descriptor in self._files)

    def try_acquire(self) -> bool:
        """Go one step further without waiting. True when the lock is held. Raises StoreError."""
        for suffix in (".gate", ".lock")[len(self._files) :]:
            self._files.append(open_lock(self._database, suffix))
        self._holds[0] = self._holds[0] or try_flock(self._files[0][1])
        if self._holds[0]:
            self._holds[1] = try_flock(self._files[1][1])
            if self._holds[1]:
                self.release_gate()
        return self._holds[1]

    def acquire(self, patience: float) -> None:
        """Take the lock. Raises StoreBusy if others keep it for patience seconds."""
        deadline = time.monotonic() + patience
        while not self.try_acquire():
            if time.monotonic() > deadline:
                self.release_gate()
                raise StoreBusy(f"another process is writing to {self._database}")
            time.sleep(LOCK_POLL)

    def release_gate(self) -> None:
        """Stop waiting for the lock."""
        self.release(0)

    def release(self, number: int = 1) -> None:
        """Release the lock (number 0: the gate) if we hold it."""
        if self._holds[number]:
            self._holds[number] = False
            with suppress(OSError):  # a commit stays valid; the next attempt reports the error
                fcntl.flock(self._files[number][1], fcntl.LOCK_UN)

    def close(self) -> None:
        """Release lock and gate, and close their files."""
        self.release()
        self.release_gate()
        while self._files:
            os.close(self._files.pop()[1])


class Database:
    """A database file: the connection, its statements and their errors, and the schema. After
    Unrecoverable it is not closed: SQLite would unlink whatever WAL is at the path by then."""

    def __init__(self, path: str) -> None:
        self.path, self._wal_path, self._shm_path = path, f"{path}-wal", f"{path}-shm"
        self._connection: Optional[sqlite3.Connection] = None
        self._is_lost = False  # Unrecoverable was raised
        # Results of compare_schema(): SQLite's count of schema changes then; what was altered; the
        # line about that and what is missing; the line about differences that do no harm.
        self._schema_cookie = -1
        self.altered: list[str] = []
        self.schema_fault = self.schema_remark = ""

    def file_sizes(self) -> tuple[int, int]:
        """The sizes in bytes of the database and of its WAL, without opening them."""
        sizes = [0, 0]
        for number, path in enumerate((self.path, self._wal_path)):
            with suppress(FileNotFoundError):
                sizes[number] = os.stat(path).st_size
        return sizes[0], sizes[1]

    def connect(self, path: str, mode: str) -> sqlite3.Connection:
        """A connection to an existing file. mode: URI parameters."""
        try:
            uri = f"file:{quote(os.fsencode(path))}?{mode}"
            return sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None)
        except sqlite3.Error as error:
            raise self._failure(error) from error

    @property
    def db(self) -> sqlite3.Connection:
        assert self._connection is not None, "open() comes first"
        return self._connection

    def run(self, statement: str, *parameters: Any) -> int:
        """Run a statement; the number of rows that it changed. This and every method that runs a
        statement raises StoreError and Unrecoverable."""
        try:
            return self.db.execute(statement, parameters).rowcount
        except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
            raise self._failure(error, statement) from error

    def many(self, statement: str, rows: Iterable[Sequence[Any]]) -> int:
        """Run a statement for each row of parameters; the number of rows changed in all."""
        try:
            return self.db.executemany(statement, rows).rowcount
        except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
            raise self._failure(error) from error

    def rows(self, statement: str, *parameters: Any) -> list[Any]:
        try:
            return self.db.execute(statement, parameters).fetchall()
        except (sqlite3.Error, UnicodeDecodeError) as error:  # that in the text of its error
            if "decode to UTF-8" not in str(error) or self.db.text_factory is not str:
                raise self._failure(error, statement) from error
        self.db.text_factory = _decode_text  # only for this read: it is called for each text
        try:
            return self.rows(statement, *parameters)
        finally:
            self.db.text_factory = str

    def value(self, statement: str, *parameters: Any) -> Any:
        """The first value of the first row; None if there is no row."""
        rows = self.rows(statement, *parameters)
        return rows[0][0] if rows else None

    def savepoint(self) -> None:
        self.run("SAVEPOINT act")

    def end_savepoint(self, keeps: bool) -> None:
        """Keep what was written since savepoint(), or undo it."""
        if not keeps:
            self.run("ROLLBACK TO act")
        self.run("RELEASE act")

    def _failure(self, error: Exception, statement: str = "") -> StoreError:
        """The exception for an error of SQLite. Raises Unrecoverable for a failed sync: the system
        may report it once and drop the pages, and then the next sync succeeds without them."""
        code = getattr(error, "sqlite_errorcode", None)
        if code is None:  # before Python 3.11 there is only the text, which names no sync
            codes = {"database is locked": SQLITE_BUSY}
            if statement.startswith(("COMMIT", "PRAGMA wal_checkpoint")):
                codes["disk I/O error"] = SQLITE_IOERR_FSYNC
            code = codes.get(str(error), 0)
        if code == SQLITE_IOERR_FSYNC:
            reason = f"{self.path}: the disk failed to store the last changes"
            raise self.unrecoverable(reason) from error
        kind = StoreBusy if code & 0xFF == SQLITE_BUSY else StoreError
        return kind(describe_error(self.path, error))

    def unrecoverable(self, reason: str) -> Unrecoverable:
        """The exception to raise when the database cannot be used any more."""
        self._is_lost = True
        return Unrecoverable(f"{reason}: start again")

    def version(self) -> int:
        return int(self.value("PRAGMA user_version"))

    def data_version(self) -> int:
        """A number that changes with each commit of another process."""
        return int(self.value("PRAGMA data_version"))

    def _recognize(self) -> bool:
        """True if the database has our schema, False if it is empty; else raises StoreError."""
        application, version = self.value("PRAGMA application_id"), self.version()
        if application != APPLICATION_ID and self.value("SELECT count(*) FROM sqlite_master"):
            raise StoreError(f"{self.path} is the database of another program")
        if version > SCHEMA_VERSION:
            raise StoreError(f"{self.path} is of a newer hostenroll (schema {version}): use that")
        if application == APPLICATION_ID and version not in (SCHEMA_VERSION, *MIGRATIONS):
            raise StoreError(f"{self.path}: no hostenroll has a schema version {version}")
        return bool(application == APPLICATION_ID)

    def require_our_schema(self) -> None:
        """Raises Unrecoverable if the schema has another version, or was altered since opening."""
        version = self.version()
        if version != SCHEMA_VERSION:
            raise self.unrecoverable(
                f"{self.path} has schema {version} now, and this program knows {SCHEMA_VERSION}: "
                "use the version that migrated it"
            )
        if self.value("PRAGMA schema_version") != self._schema_cookie:
            self.compare_schema()
            if self.schema_fault:
                raise self.unrecoverable(self.schema_fault)

    def compare_schema(self, refuses: bool = False) -> None:
        """Compare the schema with SCHEMA. A trigger that drops events leaves no gap in their chain,
        so no foreign trigger may ever run. refuses: raise StoreError for an altered schema. In an
        older schema only foreign objects count. A forged value may be of any type."""
        self._schema_cookie = self.value("PRAGMA schema_version")
        self.altered, remarks, missing = [], [], dict(SCHEMA_OBJECTS)
        is_older = self.version() < SCHEMA_VERSION
        columns = ", ".join(f"CAST({name} AS BLOB)" for name in ("type", "name", "tbl_name", "sql"))
        # An object that a table makes by itself, such as the index of a UNIQUE column, has no text.
        for row in self.rows(f"SELECT {columns} FROM sqlite_master WHERE sql IS NOT NULL"):
            texts = (str(value or b"", "utf-8", "replace") for value in row)
            kind, name, table, text = (text.partition("\0")[0] for text in texts)  # to a NUL
            label = sanitize(f"{kind} {name}")  # SQLite before 3.32 reads the text, not the kind:
            is_trigger = "trigger" in (kind.lower(), *canonical(text).lower().split()[1:2])
            is_on_ours = table.lower() in SCHEMA_OBJECTS
            if is_trigger and not is_on_ours:  # a foreign key can delete its rows with ours
                is_on_ours = bool(self.rows("SELECT 1 FROM pragma_foreign_key_list(?)", table))
            if name in SCHEMA_OBJECTS:
                ours = missing.pop(name, SCHEMA_OBJECTS[name])
                if not is_older and text != ours and canonical(text) != canonical(ours):
                    self.altered.append(f"{label} is altered")
            elif is_on_ours and (is_trigger or canonical(text).startswith("CREATE UNIQUE ")):
                self.altered.append(f"{label} on {sanitize(table)} is foreign")
            elif not name.startswith("sqlite_"):  # tables of ANALYZE and AUTOINCREMENT
                remarks.append(f"{label} is foreign")
        missing = {} if is_older else missing
        slow = [name for name in missing if missing[name].startswith("CREATE INDEX")]
        remarks += [f"index {name} is missing, so requests take longer" for name in slow]
        faults = [*self.altered, *(f"{name} is missing" for name in missing if name not in slow)]
        first_faults, first_remarks = (", ".join(r[:ERRORS_NAMED]) for r in (faults, remarks))
        remedy = "stop every server, and DROP what is foreign or restore a backup"
        self.schema_fault = f"the schema of {self.path}: {first_faults}: {remedy}" if faults else ""
        self.schema_remark = f"the schema of {self.path}: {first_remarks}" if remarks else ""
        if faults and refuses:
            raise StoreError(self.schema_fault)

    def create_schema(self) -> None:
        """Create the missing objects of SCHEMA, in the caller's transaction."""
        self.run(f"PRAGMA application_id = {APPLICATION_ID}")
        self.run(f"PRAGMA user_version = {SCHEMA_VERSION}")
        existing = {row[0] for row in self.rows("SELECT name FROM sqlite_master")}
        for name, statement in SCHEMA_OBJECTS.items():
            if name not in existing:
                self.run(statement)

    def _add_columns(self) -> None:
        """Add the columns that tables of an older schema lack, in the words of SCHEMA, since the
        words are compared. A NOT NULL column must have a default, which old rows get."""
        for table, text in SCHEMA_OBJECTS.items():
            existing = {row[0] for row in self.rows("SELECT name FROM pragma_table_info(?)", table)}
            for name, kind in re.findall(r"(?m)^    ([a-z_]+)( .*?),?(?: *--.*)?$", text):
                if existing and name not in existing:
                    self.run(f"ALTER TABLE {table} ADD COLUMN {name}{kind}")

    def migrate(self, finish: Callable[[int], object]) -> None:
        """Bring an older schema to our version, all or nothing. The caller holds the lock. finish
        is called with the old version before the commit. After StoreError, call rollback()."""
        version = self.version()
        if version < SCHEMA_VERSION:
            self.run("BEGIN IMMEDIATE")  # synchronous is FULL until begin() changes it
            older = range(version, SCHEMA_VERSION)
            for statement in chain.from_iterable(RENAMES.get(number, ()) for number in older):
                self.run(statement)
            self._add_columns()
            for statement in chain.from_iterable(MIGRATIONS[number] for number in older):
                self.run(statement)
            self.create_schema()
            self.compare_schema(refuses=True)
            finish(version)
            self.run("COMMIT")
            log.info("migrated %s from schema %d to %d", self.path, version, SCHEMA_VERSION)


def has_hot_journal(path: str) -> bool:
    """Whether SQLite will play back a journal beside a database. SQLite ignores, and leaves there,
    a journal that begins with a zero: its process was killed before it wrote to the database."""
    with suppress(FileNotFoundError), open(f"{path}-journal", "rb") as journal:
        return journal.read(1) > b"\0"
    return False


class Engine(Database):
    """The database, its files and its transactions: begin(), statements, commit() or rollback()."""

    sqlite_version = sqlite3.sqlite_version

    def __init__(self, path: str) -> None:
        """Check the path of a database; open() opens it. Raises StoreError."""
        super().__init__(os.path.realpath(path))  # SQLite resolves links for its WAL
        self._given_path = path
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise StoreError(f"{self.path} is not a file")
        folder = os.path.dirname(self.path)
        if not os.path.isdir(folder):
            raise StoreError(f"there is no folder {folder} for the database")
        self.lock = WriteLock(path)
        self.descriptor = -1  # SQLite's descriptor of the database; -1: not known
        self._files: tuple[Any, ...] = ()  # see _identify_files(): those that were opened
        self._is_examined = self._is_immutable = self._makes_shm = False
        self._synchronous, self._changes_before = "FULL", 0
        self._waits_for = ""
        self._checkpoints = Checkpoints(self)
        self.checkpoint = self._checkpoints.run

    # Opening and closing.

    def open(self, as_it_is: bool = False) -> bool:
        """Open the database; the caller holds the lock. A missing file is created, empty, with mode
        0600. True if the database has our schema, False if it is empty. as_it_is: only examine it:
        no file is created or changed, read-only media suffice, and no lock is needed. Raises
        StoreError, and OperatorError for files that another user put there."""
        if self._connection is not None:  # an earlier call has opened a file without a schema
            return self._recognize()
        self._is_examined = as_it_is
        try:
            # Whoever exchanges a file between this check and SQLite's open can still misuse root:
            # only running as the database's owner would prevent that.
            for suffix in ("-wal", "-shm", "-journal"):
                with suppress(FileNotFoundError):
                    require_own_file(f"{self.path}{suffix}", self.path)
            return self._open_to_examine() if as_it_is else self._open_to_write()
        except OSError as error:
            raise StoreError(f"cannot open {describe_error(self.path, error)}") from error

    def _open_to_write(self) -> bool:
        if resolve_file(self._given_path) != self.path:
            raise StoreError(f"{self.path} has been replaced while it was opened")
        # SQLite creates the WAL before the -shm and removes it after, also if it is killed between.
        if os.path.exists(self._shm_path) and not os.path.exists(self._wal_path):
            raise StoreError(
                f"{self._wal_path} has been removed, with the last changes in it: stop every "
                "server (each saves what it still has), or put the file back; to give up those "
                f"changes, remove {self._shm_path} too"
            )
        if not os.path.exists(self.path):
            os.close(create_file(self.path))
        self._checkpoints.has_old_wal = self.file_sizes()[1] > 0
        opened = file_id(self.path)
        self._connection = self.connect(self.path, "mode=rw")
        self.descriptor = next(iter(descriptors_of(opened)), -1)
        if self.descriptor < 0 and os.path.exists("/proc/self/fd"):
            raise self.unrecoverable(f"{self.path} has been replaced while it was opened")
        is_ours = self._recognize()
        if not is_ours:
            require_own_file(self.path, self.path, self.descriptor)
        self.run(f"PRAGMA page_size = {PAGE_SIZE}")  # it takes effect on an empty database only
        if self.value("PRAGMA journal_mode = WAL") != "wal":
            raise StoreError(f"{self.path}: its file system does not support write-ahead logging")
        self.run("PRAGMA wal_autocheckpoint = 0")
        self.run(f"PRAGMA journal_size_limit = {WAL_MAXIMUM}")
        self.run("PRAGMA foreign_keys = ON")
        self.run(f"PRAGMA cache_size = -{PAGE_CACHE_KIB}")
        self.run("PRAGMA synchronous = FULL")
        self.version()  # the first read creates the WAL if there is none
        self._files = opened, file_id(self._wal_path)
        return is_ours

    def require_alone(self, patience: float) -> None:
        """Raises StoreBusy if another process keeps the database open for patience seconds, such as
        an older server: until it sees the new schema, it would write in its own format. To leave
        WAL mode SQLite needs an exclusive lock, and each open connection holds a shared one."""
        deadline = time.monotonic() + patience
        while self.value("PRAGMA journal_mode") == "wal":
            try:
                self.run("PRAGMA journal_mode = DELETE")
            except StoreBusy as error:
                if time.monotonic() > deadline:
                    reason = "another process has it open: stop every server, watch and --follow"
                    raise StoreBusy(f"{self.path}: {reason}") from error
                time.sleep(LOCK_POLL)
        self.run("PRAGMA journal_mode = WAL")
        self.version()
        self._files = file_id(self.path), file_id(self._wal_path)

    def _open_to_examine(self) -> bool:
        """Without a WAL there is no writer. SQLite would create a WAL, so it is told that the file
        does not change (immutable), and _identify_files() notices if it does. With a WAL, SQLite
        creates a missing -shm, and close() removes that."""
        is_written = os.path.exists(self._wal_path) or has_hot_journal(self.path)
        self._is_immutable = not is_written
        self._makes_shm = not self._is_immutable and not os.path.exists(self._shm_path)
        self._files = self._identify_files()
        mode = "mode=ro&immutable=1" if self._is_immutable else "mode=ro"
        self._connection = self.connect(self.path, mode)
        return self._recognize()

    def close(self) -> None:
        """Close, under the lock: the last connection to close checkpoints. If another process keeps
        the lock, ours is not the last. Raises Unrecoverable if the files are not ours any more."""
        try:
            if self._connection is None or self._is_lost:
                return
            if self._files and not self._is_examined:
                with suppress(StoreError):
                    self.lock.acquire(CLOSE_PATIENCE)
                try:
                    self.require_unchanged(durable=True)
                except StoreError as error:
                    raise self.unrecoverable(f"cannot close {error}") from error
            self._checkpoints.finish_part()
            self._connection.close()
            self._connection = None
            if self._makes_shm and not os.path.exists(f"{self.path}.lock"):  # so no server runs
                with suppress(OSError):
                    os.unlink(self._shm_path)
        finally:
            self.lock.close()

    # The open files. All acknowledged changes are in the database and its WAL, and SQLite continues
    # with the files that it has open, whatever happens to their names. So the names are checked
    # before each transaction. If a file is gone or replaced, the process ends, but first:
    #
    #   database gone    All of the WAL is moved into the database that we have open, wherever its
    #   or replaced      name is now, and the WAL is removed: SQLite would take it for the WAL of
    #                    the new file at the path, and ruin that file.
    #   WAL removed      All of the WAL is moved: a new process would begin another WAL.
    #   WAL replaced     All of our WAL is moved. The new file is renamed, or the next start would
    #                    mix it in. But if the index in shared memory is not that of our WAL,
    #                    another process works with the new WAL, and nothing is moved.
    #   lock removed     Nothing is moved, since another process may hold a new lock. The WAL is in
    #   or replaced      its place, and the next start uses it.
    #
    # If the WAL cannot be moved now (a full disk, readers): StoreError, and the next check tries.

    def _identify_files(self) -> tuple[Any, ...]:
        """The ids of the database and its WAL; for an immutable database also its last change."""
        database, wal = file_id(self.path), file_id(self._wal_path)
        if self._is_immutable and database is not None:
            return database, wal, os.stat(self.path).st_mtime_ns
        return database, wal

    def require_unchanged(self, durable: bool) -> None:
        """Raises Unrecoverable if database or WAL, or (with durable) a lock file, is not the one
        that we have open; StoreError if that is not known, or the WAL cannot be moved now."""
        if self._identify_files() == self._files and (not durable or self.lock.exists_unchanged()):
            return
        if self._is_examined:
            raise StoreError(f"{self.path} changed while it was examined: examine it again")
        if not self.lock.exists_unchanged():
            raise self.unrecoverable(f"the lock beside {self.path} has been removed or replaced")
        self.lock.acquire(CLOSE_PATIENCE)
        database, wal = self._identify_files()
        if (database, wal) == self._files:
            raise StoreError(f"{self.path} was gone for a moment")
        name = self._wal_path if database == self._files[0] else self.path
        reason = f"{name} has been {'replaced' if file_id(name) else 'removed'}"
        try:
            if wal in (None, self._files[1]):
                self._save_wal()
            elif name != self.path and self._has_index_of_our_wal():
                self._save_wal()
                reason += f"; its changes are saved, and the new file is now {name}.replaced"
            elif name != self.path:
                reason += ", and the last changes may be lost with it"
        except (StoreError, OSError) as error:
            cause = describe_error(error.filename, error) if isinstance(error, OSError) else error
            text = f"{reason}, and its last changes cannot be saved: {cause}"
            raise StoreError(text) from error
        raise self.unrecoverable(reason)

    def _has_index_of_our_wal(self) -> bool:
        """Whether the -shm at the path is open here, and its last frame is in our WAL with the same
        checksum, which covers all frames before it (sqlite.org/walformat.html)."""
        wal, shm = descriptors_of(self._files[1]), descriptors_of(file_id(self._shm_path))
        if not wal or not shm:
            return False
        index, page = os.pread(shm[0], 40, 0), int.from_bytes(os.pread(wal[0], 4, 8), "big")
        last, *sums = (int.from_bytes(index[n : n + 4], sys.byteorder) for n in (16, 24, 28))
        frame = os.pread(wal[0], 24, 32 + (last - 1) * (24 + page)) if last else b""
        return not last or frame[8:] == index[32:] + b"".join(n.to_bytes(4, "big") for n in sums)

    def _save_wal(self) -> None:
        """Move all of our WAL into the database that we have open; no WAL stays at the path."""
        self._checkpoints.finish_part()
        if self.value("PRAGMA wal_checkpoint(TRUNCATE)"):
            raise StoreError("other processes still read the database: end them")
        if file_id(self._wal_path) not in (None, self._files[1]):
            os.replace(self._wal_path, f"{self._wal_path}.replaced")
        for path in (self._shm_path, self._wal_path):
            with suppress(FileNotFoundError):
                os.unlink(path)

    # Transactions.

    def begin(self, writes: bool, durable: bool) -> bool:
        """Begin a transaction. False if another process is writing: call it again, or
        stop_waiting(). A durable transaction is on the disk when commit() returns. Others survive
        the end of the process, but not of the power. Raises StoreError, Unrecoverable."""
        self.require_unchanged(durable)
        if not writes:
            self.run("BEGIN")
            return True
        if not self.lock.try_acquire():
            # An earlier reason is kept: whoever has our lock may be waiting for another program.
            self._waits_for = self._waits_for or f"another process is writing to {self.path}"
            return False
        synchronous = "FULL" if durable else "NORMAL"
        if synchronous != self._synchronous:  # inside a transaction, the PRAGMA is an error
            self.run(f"PRAGMA synchronous = {synchronous}")
            self._synchronous = synchronous
        self._checkpoints.begin_part()
        self._changes_before = self.db.total_changes
        try:
            self.run("BEGIN IMMEDIATE")
        except StoreBusy as error:  # another program is writing, without our lock
            self._waits_for = str(error)
            self._checkpoints.release_reader()
            self.lock.release()
            return False
        self._waits_for = ""
        return True

    def require_durable(self) -> None:
        """Raises NotDurable if the transaction is not durable."""
        if self._synchronous != "FULL":
            raise NotDurable("the transaction is not durable")

    def stop_waiting(self) -> StoreBusy:
        """Stop waiting for another writer; the exception to raise, with the reason."""
        self.lock.release_gate()
        return StoreBusy(self._waits_for)

    def commit(self) -> bool:
        """Commit the transaction; whether it changed any row. Raises StoreError, Unrecoverable."""
        self.run("COMMIT")
        self.lock.release()
        return self.db.total_changes > self._changes_before

    def rollback(self) -> None:
        """Undo the transaction, if there still is one, and release the lock."""
        try:
            if self._connection is not None and self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            log.error("cannot roll back: %s", describe_error(self.path, error))
        finally:
            self.lock.release()
            self.lock.release_gate()

    def faults(self) -> list[str]:
        """Faults of the schema, and of SQLite's checks, which a forged schema can make fail."""
        faults: list[str] = []
        try:
            self.compare_schema()
            faults += filter(None, [self.schema_fault])
            pages = [text for (text,) in self.rows("PRAGMA integrity_check") if text != "ok"]
            orphans = [] if pages else self.rows("PRAGMA foreign_key_check")  # which reads rows
            faults += [*pages, *(f"a row of {row[0]} lacks its {row[2]}" for row in orphans)]
            self.require_unchanged(durable=False)
        except StoreError as error:
            faults.append(str(error))
        return faults

    def copy_to(self, copy: BinaryIO, pause: Progress) -> None:
        """Copy the database, as the caller's read transaction sees it, into the empty file of
        replacing(), while others write. pause() is called after each BACKUP_PAGES pages."""
        with self.opened_copy(copy) as target:
            show = lambda _, left, total: pause(total - left, total)  # noqa: E731
            self.db.backup(target.db, pages=BACKUP_PAGES, progress=show)
        # The copy is not in WAL mode, or SQLite would create files beside it when it is opened
        # (sqlite.org/fileformat2.html, section 1.3.3). A server that uses it sets WAL mode again.
        os.pwrite(copy.fileno(), b"\1\1", 18)

    @contextmanager
    def opened_copy(self, copy: BinaryIO) -> Iterator[Database]:
        """A Database that writes the file of replacing(). SQLite opens it by its name, so nothing
        is written unless it has opened that very file. No file is created beside it."""
        file = file_id(copy.fileno())
        before = descriptors_of(file)
        target = Database(copy.name)
        target._connection = self.connect(copy.name, "mode=rw")
        try:
            if before and len(descriptors_of(file)) == len(before):
                raise StoreError(f"{copy.name} has been replaced")
            target.db.execute("PRAGMA journal_mode = OFF")
            target.db.execute("PRAGMA synchronous = OFF")  # the caller syncs
            yield target
        except sqlite3.Error as error:
            raise StoreError(f"cannot copy {describe_error(self.path, error)}") from error
        finally:
            target.db.close()


class Checkpoints:
    """When the WAL is moved into the database, and how.

    A checkpoint moves the pages in the WAL into the database. When all are moved, SQLite syncs, and
    the next commit writes over the WAL from its start. At a million hosts that sync waits for pages
    all over the disk: some 30 ms in which no request is answered.

    So the WAL is moved in parts. Before a transaction, a second connection begins to read; after
    it, a checkpoint moves the pages that are older than the reader's snapshot. Since pages are
    left, SQLite does not sync: a thread does, while the loop continues. When few pages are left,
    they are moved without a reader, with SQLite's own short sync, and the WAL begins again.

    Safety depends on neither thread nor reader: SQLite syncs all of the database before it writes
    over the WAL. A sync that fails is the exception: a system may drop the pages, and SQLite would
    not move pages of earlier parts again. So the process ends, and the next one moves all pages.

    Only a checkpoint tells how much is in the WAL. The size of the file does not: to truncate it
    and let it grow again would cost a heartbeat a tenth of its time, so it stays as large as it
    was. Changed rows are counted instead. While another process, such as a backup, reads an old
    snapshot, no newer page can be moved.
    """

    def __init__(self, engine: Engine) -> None:
        self.has_old_wal = False  # an earlier process has left a WAL
        self._engine = engine
        # These times are the connection's count of changed rows at that time.
        self._checkpointed_at = self._moved_at = 0  # when the whole WAL was moved, and a part of it
        self._snapshot_at: Optional[int] = None  # the reader holds back later changes
        self._complaint = ""  # why the last checkpoint failed
        self._reader: Optional[sqlite3.Connection] = None
        self._flush: Optional[threading.Thread] = None
        self._flush_failed = ""  # why a sync failed

    def begin_part(self) -> None:
        """Before a transaction that writes: begin the reader's snapshot if a part is due."""
        changes = self._engine.db.total_changes
        has_begun = self._moved_at > self._checkpointed_at
        is_due = changes - self._moved_at >= (CHECKPOINT_REST if has_begun else CHECKPOINT_AFTER)
        can_flush = self._engine.descriptor >= 0 and not self._is_flushing()
        if not is_due or not can_flush or self._snapshot_at is not None:
            return
        try:
            if self._reader is None:
                self._reader = self._engine.connect(self._engine.path, "mode=rw")
                self._engine.require_unchanged(durable=True)  # or we have connected to another file
            self._reader.execute("BEGIN")
            self._reader.execute("SELECT 1 FROM sqlite_master").fetchall()
            self._snapshot_at = changes
        except (sqlite3.Error, StoreError):
            self.release_reader()

    def run(self, is_forced: bool = False) -> None:
        """Between transactions: move a part of the WAL, or all of it, if due or is_forced."""
        changes = self._engine.db.total_changes
        has_begun = self._moved_at > self._checkpointed_at and not self._is_flushing()
        is_rest = has_begun and changes - self._moved_at <= CHECKPOINT_REST
        is_overdue = changes - self._checkpointed_at >= CHECKPOINT_AT_ONCE  # parts do not keep up
        is_whole = is_forced or self.has_old_wal or is_rest or is_overdue
        if self._snapshot_at is None and not is_whole:
            return
        try:
            self._engine.require_unchanged(durable=True)
            if not self._engine.lock.try_acquire():
                self._engine.lock.release_gate()
                return
            if is_whole:
                self.finish_part()
            moved = changes if self._snapshot_at is None else self._snapshot_at
            self._engine.run("PRAGMA wal_checkpoint(PASSIVE)")
            self._moved_at, self._complaint = moved, ""
            if is_whole:
                self._checkpointed_at, self.has_old_wal = changes, False
            else:
                with suppress(RuntimeError):  # no thread can be had: then SQLite waits for the disk
                    thread = threading.Thread(target=self._sync, daemon=True)
                    thread.start()
                    self._flush = thread
        except StoreError as error:
            self._checkpointed_at = self._moved_at = changes  # do not try again at once
            if not is_forced and str(error) != self._complaint:  # else it has been logged
                log.warning("cannot checkpoint: %s", error)
            self._complaint = str(error)
        finally:
            self.release_reader()
            self._engine.lock.release()

    def release_reader(self) -> None:
        """End the reader's snapshot, so that it holds back no page."""
        self._snapshot_at, reader = None, self._reader
        if reader is None or not reader.in_transaction:
            return
        try:
            reader.execute("COMMIT")
        except sqlite3.Error:
            self._reader = None
            reader.close()

    def _sync(self) -> None:
        """In a thread: sync the database by SQLite's own descriptor (file_id() says why)."""
        try:
            os.fdatasync(self._engine.descriptor)
        except OSError as error:
            trouble = describe_error(self._engine.path, error)
            self._flush_failed = f"{trouble}: the disk failed to store the last changes"

    def _is_flushing(self) -> bool:
        return self._flush is not None and self._flush.is_alive()

    def finish_part(self) -> None:
        """Close the reader and wait for the thread, before SQLite syncs the database itself: a
        system reports a failure to only one of two syncs by a descriptor. Raises Unrecoverable."""
        if self._reader is not None:
            self._reader.close()
        self._snapshot_at = self._reader = None
        if self._flush is not None:
            self._flush.join()
        if self._flush_failed:
            raise self._engine.unrecoverable(self._flush_failed)


T = TypeVar("T")

# The table of each record.
TABLES: Mapping[Any, str] = {
    Organization: "organization", ApiKey: "api_key", Token: "token", SigningKeyRow: "signing_key",
    Service: "service", Event: "audit", Anchor: "audit_anchor", Change: "change", Feed: "feed",
    Census: "census", Host: "host JOIN heartbeat ON host_id = id",
}  # fmt: skip


def _conditions(**columns: Any) -> tuple[str, list[Any]]:
    """The start of a WHERE clause for the values of columns, and these values. None: any value."""
    wanted = {column: value for column, value in columns.items() if value is not None}
    return " ".join(f"{column} = ? AND" for column in wanted), [*wanted.values()]


# The two rows of a host: the table, the column with the host's id, and the columns in Host.
_FIRST = Host._fields.index("last_seen")  # of the columns of heartbeat
HOST_ROWS = ("host", "id", Host._fields[:_FIRST]), ("heartbeat", "host_id", Host._fields[_FIRST:])
UNMATCHED = LAST_ID  # an address_key that no address has: beat() matches no next heartbeat

# The lowest and the highest state that a column can have.
STATES_IN = {"state": (ONLINE, REVOKED), "was": (0, REVOKED), "status": (ONLINE, DELETED)}
HOST_STATES = ONLINE, PENDING, OFFLINE, MISSING, REVOKED  # for indexes that begin with them


def _selected(record: Any) -> list[str]:
    """The columns of a record as SQL. A state that does not exist is read as NULL, and so fits no
    record. Host and heartbeat both have a column state; this reads that of heartbeat."""
    table = "heartbeat." if record is Host else ""
    state = f"CASE WHEN {table}{{0}} BETWEEN {{1}} AND {{2}} THEN {table}{{0}} END".format
    return [state(name, *STATES_IN[name]) if name in STATES_IN else name for name in record._fields]


SELECT = {row: f"SELECT {', '.join(_selected(row))} FROM {table}" for row, table in TABLES.items()}

# With the signature, this is the whole authorization of a heartbeat. It matches no row at the first
# use of a newer credential, after a clock was set back, or for a host that will get another
# interval, has another address or was reported as not online: the general path judges these.
_BEAT = """UPDATE heartbeat SET last_seen = ? WHERE last_seen <= ? AND host_id = ? AND serial = ?
            AND told_interval = ? AND (address_key = ? OR address_key < ?) AND state = 1"""
BeatRow = tuple[int, ...]  # the values of _BEAT
Silence = tuple[int, int, int, int]  # host_id, last_seen, told_interval and state of heartbeat


class Records:
    """Statements that several tables share. Every method raises StoreError and Unrecoverable."""

    def __init__(self, engine: Database) -> None:
        self._run, self._many = engine.run, engine.many
        self._rows, self._value = engine.rows, engine.value

    def _read(self, record: Any, where: str, *values: Any) -> list[Any]:
        """Rows with the columns of a record. Raises BadRow."""
        rows = self._rows(f"{SELECT[record]} {where}", *values)
        if record in (Event, Anchor):  # their MACs show what we never wrote
            return rows
        fitting: tuple[type, ...] = ()  # the types of the row before: to compare them costs little
        for row in rows:
            types = tuple(map(type, row))
            if types != fitting and not _fits_record(record, types):
                table = TABLES[record].partition(" ")[0]
                raise BadRow(f"row {_row_name(row[0])} of {table} has impossible values: {RESTORE}")
            fitting = types
        return rows

    def _all(self, record: Callable[..., T], where: str, *values: Any) -> list[T]:
        return [*starmap(record, self._read(record, where, *values))]

    def _one(self, record: Callable[..., T], where: str, *values: Any) -> Optional[T]:
        return next(iter(self._all(record, where, *values)), None)

    def get(self, record: Callable[..., T], id: Union[int, str]) -> Optional[T]:
        return self._one(record, "WHERE id = ?", id)

    def oldest(self, record: Any, before: int, now: int, limit: int) -> list[Any]:
        """The first events or changes while they are older than a time (Unix ms), up to limit. One
        written by a clock that was ahead counts as old as the rows after it."""
        # Types are not checked: a forged row must not stop the other tasks of housekeeping.
        rows = starmap(record, self._rows(f"{SELECT[record]} ORDER BY number LIMIT ?", limit))
        old = [*takewhile(lambda r: isinstance(r.at, int) and not before <= r.at <= now, rows)]
        while old and old[-1].at >= before:
            old.pop()
        return old

    def first_number(self, record: Any) -> Optional[int]:
        """The number of the first event or change that is kept; None if there is none."""
        return cast(Optional[int], self._value(f"SELECT min(number) FROM {TABLES[record]}"))

    def newest(
        self, record: Any, owner: Optional[str], before: int, limit: int, **columns: Any
    ) -> list[Any]:
        key, (equal, values) = record._fields[0], _conditions(organization_id=owner, **columns)
        where = f"WHERE {equal} {key} < ? ORDER BY {key} DESC LIMIT ?"
        return self._all(record, where, *values, before, limit)

    def following(self, record: Any, number: int, limit: int, **columns: Any) -> list[Any]:
        """The events or changes after a number, the oldest first."""
        equal, values = _conditions(**columns)
        where = f"WHERE {equal} number > ? ORDER BY number LIMIT ?"
        return self._all(record, where, *values, number, limit)

    def revoke(self, record: type[Union[ApiKey, Token]], number: int, now: int) -> bool:
        """Revoke an API key or a token. False if it is revoked already."""
        statement = "SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL"
        return self._run(f"UPDATE {TABLES[record]} {statement}", now, number) == 1

    def _insert(self, table: str, columns: Sequence[str], *rows: Sequence[Any]) -> None:
        """Add rows. Raises StoreError, also if a foreign trigger prevents that by RAISE(IGNORE)."""
        marks = ", ".join("?" * len(columns))
        statement = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})"
        if self._many(statement, rows) < len(rows):
            raise StoreError("a row was not added, perhaps because of a foreign trigger: run check")

    def add(self, row: Union[Organization, ApiKey, Token]) -> bool:
        """Add a row. False if there is a row with this id."""
        return self._add(TABLES[type(row)], row._fields, row)

    def _add(self, table: str, columns: Sequence[str], values: Sequence[Any]) -> bool:
        if self._rows(f"SELECT 1 FROM {table} WHERE id = ?", values[0]):
            return False
        self._insert(table, columns, values)
        return True

    def put(self, row: Union[Service, Anchor, Feed]) -> None:
        """Replace the only row of a table. After a new anchor the events up to it can be pruned."""
        table = TABLES[type(row)]
        self._run(f"DELETE FROM {table}")
        self._insert(table, ("id", *row._fields), (1, *row))


class Changes(Records):
    """The statements about the reported states of hosts."""

    def feed(self) -> Feed:
        feed = self._one(Feed, "")
        if feed is None or not re.fullmatch("[0-9a-f]{16}", feed.history):
            raise BadRow(f"the row of feed has impossible values: {RESTORE}")
        return feed

    def add_changes(self, changes: Sequence[Change]) -> None:
        """Raises StoreError if no higher number is left: SQLite would then take any free number."""
        last = self.last_change()
        if last > LAST_ID - len(changes):
            raise StoreError(f"change {last} of the feed was never written: {DAMAGED}")
        self._insert("change", Change._fields[1:], *(change[1:] for change in changes))

    def set_states(self, states: Sequence[tuple[int, int, int]]) -> None:
        """Write the reported states of hosts. states: the state, since when (Unix ms), the id."""
        self._many("UPDATE host SET state = ?, status_since = ? WHERE id = ?", states)
        statement = "UPDATE heartbeat SET state = ? WHERE host_id = ?"
        self._many(statement, ((state, host) for state, _, host in states))

    def count_hosts(self) -> None:
        """Fill the census of a migrated database; afterwards its triggers keep it."""
        columns = "organization_id, state"
        self._run(f"INSERT INTO census SELECT {columns}, count(*) FROM host GROUP BY {columns}")

    def census(self, organization: Optional[str]) -> list[tuple[str, int, int]]:
        """Rows of an organization, a state, and how many of its hosts are in that state."""
        equal, values = _conditions(organization_id=organization)
        return self._read(Census, f"WHERE {equal} hosts > 0", *values)

    def hosts_by(
        self, column: str, way: str, states: Sequence[int], owner: Optional[str],
        after: Sequence[Any], limit: int,
    ) -> list[Host]:  # fmt: skip
        """Hosts in some states, in the order of a column (name or status_since) and then of the id.
        after: the values of both to continue after. way: ASC or DESC. Each part of the union is
        read in the order of an index. Rows with an equal value in the column are a part of their
        own: if row values were compared, SQLite would walk through all of these rows."""
        (owned, owners), sign = _conditions(organization_id=owner), {"ASC": ">", "DESC": "<"}[way]
        parts, values = [], []
        for state in states:
            for bound in (f"{column} = ? AND id {sign} ?", f"{column} {sign} ?"):
                parts.append(f"WHERE {owned} host.state = ? AND {bound}")
                values += [*owners, state, *after[: bound.count("?")]]
        where = f" UNION ALL {SELECT[Host]} ".join(parts)
        return self._all(Host, f"{where} ORDER BY {column} {way}, id {way} LIMIT ?", *values, limit)

    def change_before(self, at: int) -> int:
        """The number before the first change since a time (Unix ms). Numbers rise with time, unless
        a clock was set or a change was noticed late."""
        low, high = self.first_number(Change) or 0, self.last_change()
        statement = "SELECT at < ? FROM change WHERE number >= ? ORDER BY number LIMIT 1"
        while low < high:
            middle = (low + high) // 2
            is_before = self._value(statement, at, middle)
            low, high = (middle + 1, high) if is_before else (low, middle)
        return low - 1

    def last_change(self) -> int:
        """The number of the last change; 0 if there is none."""
        return int(self._value("SELECT max(number) FROM change") or 0)

    def prune_changes(self, before: int, now: int) -> bool:
        """Delete the first changes, PRUNED_AT_ONCE at most, while they are older than a time or too
        many; never the last change. True if there may be more to delete."""
        last, old = self.last_change(), self.oldest(Change, before, now, PRUNED_AT_ONCE)
        slice_end = (self.first_number(Change) or 0) + PRUNED_AT_ONCE - 1
        end = max(old[-1].number if old else 0, min(last - CHANGES_MAXIMUM, slice_end))
        statement = "DELETE FROM change WHERE number <= ? AND number < ?"
        return self._run(statement, end, last) >= PRUNED_AT_ONCE

    def silences(
        self, after: int, examined: int, limit: int, now: int, is_new_period: bool
    ) -> tuple[list[Silence], Optional[int]]:
        """Examine some hosts with an id above after. Returns those, limit at most, that may have
        another state than the reported one, and the id to continue after (None: that was the end).

        SQL does not know the pauses of servers, so it takes no silence for shorter than it is. In a
        new service period a silence may have become shorter, so hosts in other states than online
        are returned too. So is a host whose last_seen is far ahead, since that says nothing."""
        statement = "SELECT host_id FROM heartbeat WHERE host_id > ? ORDER BY host_id LIMIT 1"
        end = self._value(f"{statement} OFFSET ?", after, examined - 1)
        # Pending and revoked hosts are left out: the passing of time does not change their state.
        statement = f"""SELECT host_id, last_seen, told_interval, state FROM heartbeat
             WHERE host_id > ? AND host_id <= ? AND state IN (1, 3, 4)
             AND ((? = 1 AND state <> 1) OR last_seen > ? OR state <> CASE
                 WHEN last_seen >= ? - (told_interval * {MISSED_BEATS} + {ONLINE_SLACK}) * 1000
                 THEN 1 WHEN last_seen >= ? THEN 3 ELSE 4 END) ORDER BY host_id LIMIT ?"""
        limits = now + CLOCK_SLACK * SECOND_MS, now, now - MISSING_AFTER * SECOND_MS
        ends = after, LAST_ID if end is None else end
        rows = self._rows(statement, *ends, int(is_new_period), *limits, limit)
        fitting = [row for row in rows if {*map(type, row)} == {int}]
        return fitting, rows[-1][0] if len(rows) == limit else end

    def expired(self, organization: str, since: int) -> int:
        """How many hosts of an organization have expired since a time, without ephemeral hosts."""
        statement = """SELECT count(*) FROM change WHERE organization_id = ? AND at >= ?
             AND actor = 'expire' AND ephemeral IS NULL"""
        return int(self._value(statement, organization, since))

    def set_expiry(self, owner: Optional[str], expiry: int) -> int:
        statement = "UPDATE organization SET expiry = ? WHERE id = coalesce(?, id)"
        return self._run(statement, expiry, owner)


class Queries(Changes):
    """All statements, in SQL that PostgreSQL knows too: CASE in place of max() and min() of two
    values, = 1 for truth, no RETURNING. None as an organization or owner stands for all of them.
    Lists begin with the newest row, and hold rows with an id below before. Every method raises
    StoreError and Unrecoverable."""

    def organizations(self) -> list[Organization]:
        return self._all(Organization, "ORDER BY id")

    def live_keys_made_by(self, maker: int, first: int, now: int, limit: int) -> list[ApiKey]:
        """Up to limit valid API keys that a key made, directly or through keys that it made; the
        key first comes first, if it is one of these."""
        where = """WHERE id IN (WITH RECURSIVE made(id) AS (SELECT id FROM api_key WHERE
             maker_id = ? UNION SELECT api_key.id FROM api_key JOIN made ON maker_id = made.id)
             SELECT id FROM made) AND revoked_at IS NULL AND coalesce(expires_at, ?) > ?
             ORDER BY CASE WHEN id = ? THEN 0 ELSE 1 END LIMIT ?"""
        return self._all(ApiKey, where, maker, now + 1, now, first, limit)

    def use_api_keys(self, uses: Mapping[int, int]) -> None:
        """Record when API keys were used, for each key once an hour. uses: Unix ms by key id."""
        hour = HOUR * SECOND_MS
        statement = """UPDATE api_key SET last_used_at = ?
             WHERE id = ? AND coalesce(last_used_at, 0) NOT BETWEEN ? AND ?"""
        self._many(statement, ((at, key, at - hour + 1, at) for key, at in uses.items()))

    def signing_keys(self) -> list[SigningKeyRow]:
        return self._all(SigningKeyRow, "ORDER BY number DESC")

    def kids(self, with_retired: bool = True) -> set[str]:
        """The kids of all keys. Without retired keys, these should be the keys in the key file."""
        which = "" if with_retired else " WHERE retired_at IS NULL"
        return {kid for (kid,) in self._rows(f"SELECT kid FROM signing_key{which}")}

    def add_signing_key(self, kid: str, now: int) -> None:
        """Give a kid a number. A kid that was retired keeps its number, and is in use again."""
        if not self._run("UPDATE signing_key SET retired_at = NULL WHERE kid = ?", kid):
            self._insert("signing_key", ("kid", "created_at"), (kid, now))

    def retire_signing_key(self, kid: str, now: int) -> None:
        self._run("UPDATE signing_key SET retired_at = ? WHERE kid = ?", now, kid)

    def signing_key_number(self, kid: str) -> Optional[int]:
        statement = "SELECT number FROM signing_key WHERE kid = ?"
        return cast(Optional[int], self._value(statement, kid))

    def hosts_by_signing_key(self, number: int) -> int:
        return int(self._value("SELECT count(*) FROM heartbeat WHERE key_number = ?", number))

    def hosts_up_to_key(self, number: int) -> int:
        """How many hosts were last seen with a credential of this key, or of an older key that is
        not retired. Such a host may hold an unused credential of this key."""
        statement = """SELECT count(*) FROM heartbeat WHERE key_number IN
             (SELECT number FROM signing_key WHERE number <= ? AND retired_at IS NULL)"""
        return int(self._value(statement, number))

    def service(self) -> Optional[Service]:
        """The service row, or None if no server has run yet."""
        return self._one(Service, "")

    def keep_alive(self, now: int) -> None:
        """Record that a server lives. A time that was set back changes nothing."""
        self._run("UPDATE service SET alive = ? WHERE alive < ?", now, now)

    def use_token(self, number: int, now: int, address: str) -> bool:
        """Take one use of a token. False if it may not be used: this guards against every race."""
        statement = """UPDATE token SET uses = uses + 1, used_at = ?, used_from = ?
             WHERE id = ? AND uses < max_uses AND revoked_at IS NULL AND expires_at > ?"""
        return self._run(statement, now, address, number, now) == 1

    def prune_tokens(self, ended: int) -> bool:
        """Delete up to PRUNED_AT_ONCE tokens that ended by a time, as the index token_end computes
        their end. True if there may be more to delete."""
        statement = """DELETE FROM token WHERE id IN (SELECT id FROM token WHERE coalesce(
             revoked_at, CASE WHEN uses >= max_uses THEN used_at ELSE expires_at END) <= ? LIMIT ?)
            """
        return self._run(statement, ended, PRUNED_AT_ONCE) >= PRUNED_AT_ONCE

    def hosts_by_token(self, number: int, limit: int) -> list[int]:
        statement = "SELECT id FROM host WHERE token_id = ? ORDER BY id DESC LIMIT ?"
        return [row[0] for row in self._rows(statement, number, limit)]

    def hosts_named(self, word: str, owner: Optional[str], limit: int) -> list[Host]:
        """Some hosts with a name (as it is, or in NFC as Name keeps it) or with that hostname."""
        equal, values = _conditions(organization_id=owner)
        where = f"WHERE {equal} host.state IN {HOST_STATES} AND name IN (?, ?) LIMIT ?"
        named = self._all(Host, where, *values, word, unicodedata.normalize("NFC", word), limit)
        equal = equal or "organization_id IN (SELECT id FROM organization) AND"
        where = f"WHERE {equal} lower(rtrim(hostname, '.')) = lower(rtrim(?, '.')) LIMIT ?"
        return named + self._all(Host, where, *values, word, limit)

    def hosts_of_key(self, number: int, _: None, before: int, limit: int) -> list[Host]:
        """The newest hosts, of all organizations, whose valid credential a signing key signed."""
        where = "WHERE key_number = ? AND host_id < ? ORDER BY host_id DESC LIMIT ?"
        return self._all(Host, where, number, before, limit)

    def live_hosts_of_token(self, token: Token, limit: int) -> list[int]:
        """Some hosts, not revoked, that a token enrolled, or that it was the last to re-enroll."""
        statement = """SELECT id FROM host WHERE revoked_at IS NULL
             AND (token_id = ? OR (id = ? AND admitted_by = ?)) LIMIT ?"""
        values = token.id, token.host_id, token.id
        return [row[0] for row in self._rows(statement, *values, limit)]

    def add_host(self, host: Host) -> bool:
        """Add a row to host and one to heartbeat. False if there is a host with this id."""
        (table, _, columns), (beat_table, key, beat_columns) = HOST_ROWS
        if not self._add(table, columns, host[: len(columns)]):
            return False
        self._insert(beat_table, (key, *beat_columns), (host.id, *host[len(columns) :]))
        return True

    def replayed_host(self, token: int, idempotency: bytes) -> Optional[Host]:
        """The host that a token admitted with an Idempotency-Key, unless it was admitted again."""
        return self._one(Host, "WHERE admitted_by = ? AND idempotency = ?", token, idempotency)

    def hosts_by_hostname(self, organization: str, hostname: str, limit: int) -> list[Host]:
        """The newest hosts with a hostname, whatever its letter case (RFC 4343) and a final dot."""
        where = """WHERE organization_id = ? AND lower(rtrim(hostname, '.')) = lower(rtrim(?, '.'))
             ORDER BY id DESC LIMIT ?"""
        return self._all(Host, where, organization, hostname, limit)

    def has_namesake(self, host: Host, organization: Optional[str]) -> bool:
        """Whether an organization (None: any) has another host of this name."""
        equal, values = _conditions(organization_id=organization, name=host.name)
        statement = f"SELECT 1 FROM host WHERE {equal} state IN {HOST_STATES} AND id <> ? LIMIT 1"
        return bool(self._rows(statement, *values, host.id))

    def agents_slice(self, owner: Optional[str], after: int, limit: int, since: int) -> list[Any]:
        """Count the next hosts, limit at most, with an id above after. Rows of an agent_version,
        its hosts, those of them with a sign of a copy since a time, and the highest id."""
        equal, values = _conditions(organization_id=owner)
        statement = f"""SELECT agent_version, count(*), sum(CASE WHEN copied_at > ? THEN 1 ELSE 0
             END), max(id) FROM (SELECT id, agent_version, copied_at FROM host WHERE {equal} id > ?
             ORDER BY id LIMIT ?) AS slice GROUP BY agent_version"""
        return self._rows(statement, since, *values, after, limit)

    def edit_host(self, number: int, changes: Mapping[str, Any]) -> None:
        """Set columns of a host, in either of its rows. The program names them, never a peer."""
        for table, key, columns in HOST_ROWS:
            values = {column: changes[column] for column in columns if column in changes}
            if values:
                settings = ", ".join(f"{column} = ?" for column in values)
                statement = f"UPDATE {table} SET {settings} WHERE {key} = ?"
                self._run(statement, *values.values(), number)

    def mark_copied(self, number: int, now: int) -> bool:
        """Record a sign of a copied credential. False if one was recorded within the hour."""
        statement = "UPDATE host SET copied_at = ? WHERE id = ? AND copied_at NOT BETWEEN ? AND ?"
        return self._run(statement, now, number, now - HOUR * SECOND_MS + 1, now) == 1

    def delete_host(self, number: int, now: int) -> None:
        """Remove a host and its heartbeat, and revoke the tokens that are bound to it."""
        statement = "UPDATE token SET revoked_at = ? WHERE host_id = ? AND revoked_at IS NULL"
        self._run(statement, now, number)
        self._run("DELETE FROM host WHERE id = ?", number)

    def beat(self, rows: Sequence[BeatRow]) -> int:
        """Write heartbeats, with the values of _BEAT; how many of them matched."""
        return self._many(_BEAT, rows)

    def write_beats(self, rows: Sequence[tuple[int, int, int, int]]) -> None:
        """Write heartbeats that were judged in this transaction. rows: last_seen, and told_interval
        and address_key, which the next heartbeat is compared with, and the host's id."""
        statement = """UPDATE heartbeat SET last_seen = ?, told_interval = ?, address_key = ?,
             state = 1 WHERE host_id = ?"""
        self._many(statement, rows)

    def beats_written(self, now: int, hosts: Sequence[int]) -> set[BeatRow]:
        """The hosts whose heartbeats beat() wrote now: id, serial, told_interval, address_key."""
        statement = """SELECT host_id, serial, told_interval, address_key FROM heartbeat
             WHERE last_seen = ? AND state = 1 AND host_id IN"""
        return set(self._rows_of(hosts, statement, now))

    def hosts(self, numbers: Sequence[int]) -> list[Host]:
        """The hosts with these ids, in no particular order. A host whose row has impossible values
        is left out."""
        rows = self._rows_of(numbers, f"{SELECT[Host]} WHERE id IN")
        return [Host._make(row) for row in rows if _fits_record(Host, tuple(map(type, row)))]

    def set_addresses(self, rows: Sequence[tuple[str, int, int, int]]) -> None:
        statement = "UPDATE host SET address = ?, address_since = ?, moved_at = ? WHERE id = ?"
        self._many(statement, rows)

    def record_refusals(self, rows: Sequence[tuple[int, str, int, int, int]]) -> None:
        """Record refusals, one a minute for each host. rows: time, code, host's id, time, time."""
        statement = f"""UPDATE host SET refused_at = ?, refused_code = ?
             WHERE id = ? AND refused_at NOT BETWEEN ? - {MINUTE * SECOND_MS - 1} AND ?"""
        self._many(statement, rows)

    def _rows_of(self, hosts: Sequence[int], statement: str, *values: Any) -> Iterator[Any]:
        for start in range(0, len(hosts), VARIABLES_MAXIMUM):
            chunk = hosts[start : start + VARIABLES_MAXIMUM]
            yield from self._rows(f"{statement} ({', '.join('?' * len(chunk))})", *values, *chunk)

    def last_event(self) -> tuple[int, bytes]:
        """The number and the mac that the next event is chained to."""
        for table in ("audit", "audit_anchor"):  # CAST, because a forged mac may be a text
            statement = f"""SELECT CAST(number AS INTEGER), CAST(mac AS BLOB) FROM {table}
                 ORDER BY number DESC LIMIT 1"""
            for number, mac in self._rows(statement):
                return number, mac or b""  # NULL, too
        return 0, b""

    def add_events(self, events: Sequence[Event]) -> None:
        self._insert("audit", Event._fields, *events)

    def begin_history(self, *restored: int) -> None:
        """Begin the history of a new database or copy: cursors of other histories are not valid in
        it. restored: the last values of Feed, after a restore."""
        self.put(Feed(new_history(), *self.feed_ends(), *restored))

    def newest_host(self) -> int:
        """The highest id of a host; 0 if there is none."""
        return int(self._value("SELECT max(id) FROM host") or 0)

    def host_names_after(self, number: int) -> list[str]:
        """The names of the hosts with a higher id, in the order of the ids."""
        statement = "SELECT name FROM host WHERE id > ? ORDER BY id"
        return [row[0] for row in self._rows(statement, number)]

    def having(self, record: Callable[..., T], column: str) -> list[T]:
        """The rows that have a value in a column."""
        return self._all(record, f"WHERE {column} IS NOT NULL")

    def take_uses(self, tokens: Sequence[Token]) -> int:
        """Take the uses of tokens from a newer database; how many tokens had fewer uses here."""
        values = attrgetter("uses", "used_at", "used_from", "id", "uses")
        statement = "SET uses = ?, used_at = ?, used_from = ? WHERE id = ? AND uses < ?"
        return self._many(f"UPDATE token {statement}", map(values, tokens))

    def feed_ends(self) -> tuple[int, int]:
        """The numbers of the last change and the last event; 0 if there is none."""
        return self.last_change(), self.last_event()[0]

    def labels_slice(self, owner: Optional[str], after: int, limit: int) -> list[Any]:
        """The next hosts, limit at most, with an id above after: id, labels and address."""
        equal, values = _conditions(organization_id=owner)
        statement = f"SELECT id, labels, address FROM host WHERE {equal} id > ? ORDER BY id LIMIT ?"
        return self._rows(statement, *values, after, limit)

    def format_event(self, after: int) -> Optional[Event]:
        """The first event after a number that marks the start of the present format of events."""
        where = "WHERE action = 'audit-format' AND number > ? ORDER BY number LIMIT 1"
        return self._one(Event, where, after)

    def unminted_secrets(self, limit: int) -> list[str]:
        """Up to limit subjects of API keys and tokens that no event minted with their organization
        and role, although they are newer than the oldest event that can be verified."""
        # The set of minted subjects is made once. Version 0.1.0 wrote spaces. printf() is SQLite's.
        statement = """WITH oldest AS (SELECT at FROM audit WHERE number >
                 coalesce((SELECT number FROM audit_anchor), 0) ORDER BY number LIMIT 1),
             secret AS (SELECT printf('token:%016x', id) AS subject, organization_id AS owner,
                     '' AS role, id, created_at FROM token
                 UNION ALL SELECT printf('api-key:%016x', id), coalesce(organization_id, ''),
                     printf('{"role":"%s"}', role), id, created_at FROM api_key)
             SELECT subject FROM secret, oldest WHERE (created_at > at OR id >> 22 > at - ?)
             AND (subject, owner, role) NOT IN (SELECT subject, coalesce(organization_id, ''),
                 CASE WHEN subject LIKE 'token:%' THEN '' ELSE replace(detail, ' ', '') END
                 FROM audit WHERE action = 'mint') LIMIT ?"""
        return [row[0] for row in self._rows(statement, ID_EPOCH_MS, limit)]

    def anchor(self) -> Optional[Anchor]:
        """What the first event is chained to, if older events have been pruned."""
        return self._one(Anchor, "")

    def prune_events(self, last: int) -> int:
        """Delete the events up to a number, which is not after the anchor; how many they were."""
        return self._run("DELETE FROM audit WHERE number <= ?", last)


def bad_rows(engine: Engine, limit: int) -> list[str]:
    """The names of up to limit rows, outside the audit log, with values that we never write: of
    another type, or in contradiction to other values."""
    names: list[str] = []
    odd = {Change: f"number < 1 OR number = {LAST_ID}", Host: "heartbeat.state <> host.state"}
    for record, table in TABLES.items():
        if record in (Event, Anchor):
            continue
        wrong = " OR ".join(
            f"typeof({column}) NOT IN ({', '.join(STORED_AS[kind] for kind in kinds)})"
            for column, kinds in zip(_selected(record), _column_types(record))
        )
        wrong += f" OR {odd[record]}" if record in odd else ""
        rows = engine.rows(f"SELECT {record._fields[0]} FROM {table} WHERE {wrong} LIMIT {limit}")
        names += [f"{table.partition(' ')[0]} {_row_name(row[0])}" for row in rows]
    rows = engine.rows(
        f"""SELECT owner FROM (SELECT organization_id AS owner, state, hosts FROM census UNION ALL
         SELECT organization_id, state, -count(*) FROM host GROUP BY organization_id, state)
         GROUP BY owner, state HAVING sum(hosts) <> 0 LIMIT {limit}"""
    )
    names += [f"census {_row_name(row[0])}" for row in rows]
    return names[:limit]


# 6. Registry
#
# Law: every rule runs inside a tick, which is one transaction with one time (now, in Unix ms), and
# is answered only after the commit. Only secrets and facts are looked up before the tick. Errors of
# the Store become refusals here. HTTP, commands and the server itself all make a Call.
#
# Contents: values; the audit log; then a class of Rules for each other noun; the Registry with its
# transactions; backing up, opening and examining the files.

Owner = Optional[str]  # the slug of an organization; None: all organizations, or none
ALL_ORGANIZATIONS: Owner = None


class Principal(NamedTuple):
    """Who makes a call."""

    name: str  # as createdBy and the audit log show it
    organization: Owner  # the only one that the caller sees, or ALL_ORGANIZATIONS
    role: str  # admin or viewer
    id: int = -1  # of the caller's API key; -1: no key, as for the command line


SYSTEM = Principal("server", ALL_ORGANIZATIONS, "admin")
LOCAL = Origin()
AUDITED_SINCE = 2  # the schema that brought the audit log


class CredentialRef(NamedTuple):
    """The claims by which a credential is judged, without the host. Most hosts have equal ones."""

    serial: int
    organization: str
    kid: str


class Heartbeat(NamedTuple):
    """A plain heartbeat, without facts or a renewal. A tick runs all of these in one batch."""

    host: int
    credential: CredentialRef
    origin: Origin = LOCAL


def heartbeat_of(claims: Claims, origin: Origin = LOCAL) -> Heartbeat:
    """The plain heartbeat of a host that presents a credential with these claims."""
    credential = CredentialRef(claims.serial, claims.organization, claims.kid)
    return Heartbeat(claims.host, credential, origin)


class Rule(Protocol):
    """What a call runs. now is the tick's time in Unix ms. If the call is refused, its writes are
    rolled back. The commit of a durable rule waits for the disk."""

    @property
    def run(self) -> Callable[[Registry, Call, int], Any]: ...
    @property
    def writes(self) -> bool: ...
    @property
    def durable(self) -> bool: ...


class InternalRule(NamedTuple):
    """A rule for calls that the program itself makes."""

    run: Callable[[Registry, Call, int], Any]
    writes: bool = True
    durable: bool = False


class Named(NamedTuple):
    """An object, by the word that a person typed. takes_prefix: an id may be shortened."""

    kind: type[Any]
    word: str
    takes_prefix: bool

    def id_among(self, titles: Mapping[str, str]) -> str:
        """The id of the only object that the word matches. titles: the titles of all matches, by
        id. Raises NotFound if there are none; Conflict, which lists them, if there are several."""
        if not titles:
            title = KINDS[self.kind].replace("api-", "API ")
            is_id = self.kind is not Host or ID.fullmatch(self.word)
            how = "id" if is_id else "id or name"
            is_short = ID_PREFIX.fullmatch(self.word) and not self.takes_prefix
            hint = ". Type the whole id" if is_short else ""
            raise NotFound(f"There is no {title} with this {how}{hint}.")
        if len(titles) > 1:
            ellipsis = ["more"] if len(titles) > FITS_SHOWN else []
            matches = ", ".join([*islice(titles.values(), FITS_SHOWN), *ellipsis])
            raise Conflict(f"{self.word} matches several: {matches}. Type the id of one.")
        return next(iter(titles))


class Call(NamedTuple):
    """An operation with its caller and its values, which have been checked."""

    operation: Rule
    by: Principal = SYSTEM
    id: int = -1  # of the object that the operation is about
    # Values by their names on the wire. A rule that needs a further tick returns the call to run in
    # that tick, in place of an outcome; the values of this call hold the progress so far.
    values: Mapping[str, Any] = MappingProxyType({})
    origin: Origin = LOCAL
    named: Optional[Named] = None  # in place of the id, which the call's transaction looks up


Work = Union[Heartbeat, Call]  # what a tick runs


class IssuedCredential(NamedTuple):
    """A new credential, and when it expires in Unix ms; 0 if it never does."""

    credential: str
    expires_at: int

    def hash(self, held: int) -> bytes:
        """A hash of the credential and of held, the serial that it replaces (0: for a token)."""
        return sha256(f"{held} {self.credential}")


class Enrollment(NamedTuple):
    """A host, the credential issued to it, and its heartbeat interval in seconds."""

    host: Host
    issued: IssuedCredential
    interval: int


class HeartbeatResult(NamedTuple):
    """An accepted heartbeat: lastSeen in Unix ms, a renewal if due, seconds until the next one."""

    host: int
    last_seen: int
    issued: Optional[IssuedCredential]
    next_interval: int


class TokenView(NamedTuple):
    """A token, its state and the hosts that it enrolled. text is set only when it is minted."""

    token: Token
    state: str
    hosts: Sequence[int]
    text: Optional[str] = None


class ApiKeyView(NamedTuple):
    """An API key and its state. text is set only when it is minted."""

    key: ApiKey
    state: str
    text: Optional[str] = None


class HostView(NamedTuple):
    """A host, its status, a sentence with the reason of the status, and warnings for people."""

    host: Host
    status: str
    reason: str
    warnings: list[str]


class DeletedHost(NamedTuple):
    """A deleted host, and the token that enrolled it last if this token can still enroll hosts."""

    host: Host
    token: Optional[Token]


class BulkResult(NamedTuple):
    """How many objects an act on many reached, and the ids or names that no host has."""

    done: int
    not_found: list[str]


class SigningKeyView(NamedTuple):
    """A signing key, its state, and how many hosts hold a credential that it signed."""

    key: SigningKeyRow
    state: str  # signs, verifies or retired
    hosts: int


class Page(NamedTuple):
    """A part of a list. An empty page is not always the last: a list ends only where next is None.
    For a feed, more holds the cursor up to which the feed was searched."""

    items: list[Any]
    next: Optional[str] = None  # the cursor at which the list continues
    more: Mapping[str, Any] = {}  # other members of the answer


class Order(NamedTuple):
    """The order of a list: its start, a row's position in it, and a position as a cursor."""

    start: Any = LAST_ID  # before the newest row: rows come by id, the newest first
    cursor: Callable[[Any], str] = id_text
    parse: Callable[[str], Any] = partial(int, base=16)  # raises ValueError, IndexError
    position: Callable[[Any], Any] = itemgetter(0)


NEWEST = Order()


class ChangeView(NamedTuple):
    change: Change
    cursor: str
    muted: bool  # whether its host is muted now


# The states by number. 0 is the state before the first report of a host that has just enrolled.
STATUS_NAMES = ("", "online", "pending", "offline", "missing", "revoked", "deleted")
STATUSES = STATUS_NAMES[ONLINE:DELETED]
CHANGED_TO = STATUS_NAMES[ONLINE:]
EDITED = {"name": "name", "labels": "labels", "intervalSeconds": "own_interval",
          "mutedUntil": "muted_until"}  # fmt: skip
TOKEN_STATES = ("valid", "used", "expired", "revoked")
TITLES = {kind.code: f"{kind.title[0].lower()}{kind.title[1:]}" for kind in problems()}
KEY_STATES = ("valid", "expired", "revoked")  # of API keys
EVENT_TEXTS = {  # what happened, for people, by action
    "mint": "$actor created $subject",
    "enroll": "$subject enrolled with $actor",
    "re-enroll": "$subject re-enrolled with $actor",
    "replay": "$subject requested its first credential again",
    "renew": "$subject renewed its credential",
    "supersede": "$subject used a newer credential; older ones are now refused",
    "refuse": "$actor was refused: $problem",
    "edit": "$actor changed $changed of $subject",
    "revoke": "$actor revoked $subject",
    "restore": "$actor restored $subject",
    "delete": "$actor deleted $subject ($hostname)",
    "add": "$actor added $subject",
    "rotate": "$actor rotated $subject",
    "retire": "$actor retired $subject",
    "init": "$actor started the audit log",
    "audit-format": "The format of the audit log changed",
    "certificate": "The certificate expires soon, or agents pin another key",
    "clone": "$subject is used by more than one machine",
    "move": "$subject moved from $from to $to",
    "key-file": "The key file has a problem: $trouble",
    "expire": "$subject ($hostname) was deleted after a long silence",
    "allow-expiry": "$actor allowed hosts to expire for a day, however many",
    "restore-backup": "$actor restored a backup",
    "accept-history": "$actor made hosts that a restore lost enroll again",
}
ACTIONS = tuple(EVENT_TEXTS)


class Histogram:
    """Counts of measured values by upper bound; cumulative only when they are exposed."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


class Metrics:
    """What this process has counted since its start. No decision depends on it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()  # of committed ticks, and of connections
        self.tick: Counter[str] = Counter()  # of the running tick: added to counts at its commit
        self.refusals: Counter[str] = Counter()  # by code
        self.open_connections = 0
        self.waiting_requests = 0
        self.requests = Histogram(SECONDS_BUCKETS)
        self.commits = Histogram(SECONDS_BUCKETS)
        self.lock_waits = Histogram(SECONDS_BUCKETS)
        self.ticks = Histogram(SIZE_BUCKETS)


Row = Union[ApiKey, Host, Token]
AnyRow = TypeVar("AnyRow", ApiKey, Host, Token)
AnySecret = TypeVar("AnySecret", ApiKey, Token)
KINDS: Mapping[type[Any], str] = {ApiKey: "api-key", Host: "host", Token: "token"}
EventKind = tuple[str, str, str, Owner, str]  # action, actor, subject, organization, code


class Rules:
    """The base of the rules of each noun. A rule is a method (call, now) -> record, which raises
    the Problem that refuses the call. It reaches the rules of other nouns through the registry.

    To an API key of one organization, objects of others are refused as if they did not exist.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._queries = registry.queries

    @staticmethod
    def _event_kind(action: str, row: Row, actor: str = "") -> EventKind:
        """The kind of an event about a row. Without an actor, the row itself is the actor."""
        subject = tagged_id(KINDS[type(row)], row.id)
        return action, actor or subject, subject, row.organization_id, ""

    def _record(self, action: str, actor: str, row: Row, **detail: Any) -> None:
        self._registry.audit.record(*self._event_kind(action, row, actor), **detail)

    def _scope(self, call: Call, problem: type[Problem], field: str) -> Owner:
        """The organization that a call is about: the one in a field of its values, or the caller's.
        Raises NotFound if the caller may not see it, and the problem if it does not exist."""
        slug: Owner = call.values.get(field)
        if slug is None:
            return call.by.organization
        if call.by.organization not in (ALL_ORGANIZATIONS, slug):
            raise NotFound("The organization does not exist.")
        if self._queries.get(Organization, slug) is None:
            detail = "the organization does not exist: create it with add-org"
            raise problem(errors=[FieldError(field, detail)])
        return slug

    def _row_of(self, call: Call, record: type[AnyRow]) -> AnyRow:
        """The row that a call is about. Raises NotFound, also if another organization has it."""
        row = self._queries.get(record, call.id)
        if row is None or call.by.organization not in (ALL_ORGANIZATIONS, row.organization_id):
            raise NotFound(f"There is no {KINDS[record].replace('api-', 'API ')} with this id.")
        return row

    def _prove(
        self, record: type[AnySecret], secret: Optional[Secret], problem: Problem, origin: Origin,
        now: int, **detail: str,
    ) -> AnySecret:  # fmt: skip
        """Before the tick: the row of the secret that a caller presents, in whatever state the row
        is. Raises the problem, TooManyRequests, StorageUnavailable."""
        with self._registry.reading():
            row = self._queries.get(record, secret.id) if secret else None
        if secret is None or row is None or not equal_secrets(secret.digest(), row.secret_hash):
            name = tagged_id(KINDS[record], secret.id) if secret else ""
            problem = self._registry.failures.judge(problem, origin.address, now)
            raise problem.with_audit("anonymous", name, None, **detail)
        return row

    def _owned_id(
        self, record: type[Any], owner: Owner, column: str, id: Optional[str]
    ) -> Optional[int]:
        """The number of an id in a column, to filter rows by. All rows with this id belong to one
        organization. If that is another than the owner, the result is -1, which no row has: to read
        such rows would take time, and the time would reveal that they exist."""
        if id is None:
            return None
        rows = self._queries.newest(record, None, LAST_ID, 1, **{column: parse_id(id)})
        is_own = rows and owner in (ALL_ORGANIZATIONS, rows[0].organization_id)
        return parse_id(id) if is_own else -1

    def _reader(self, record: type[Row], call: Call) -> Callable[[Owner, int, int], Sequence[Any]]:
        """A function that reads a list. values: named, a word that rows must match (see Names)."""
        if "named" not in call.values:
            return partial(self._queries.newest, record)

        def read(owner: Owner, before: int, limit: int) -> Sequence[Any]:
            rows = self._registry.names.matching(owner, record, call.values["named"])
            return [row for row in rows if row.id < before][:limit]

        return read

    def _page(
        self, call: Call, read: Callable[[Owner, Any, int], Sequence[Any]],
        view: Callable[[Any], Any], text: str = "labels", order: Order = NEWEST,
    ) -> Page:  # fmt: skip
        """One page of a list. It ends at its limit or after ROWS_EXAMINED rows. values:
        organization, limit, cursor. Raises InvalidQuery, NotFound.

        read(owner, position, limit) returns the rows after it. view(row) returns the item, or
        None for a row that does not match. text names the column with the longest text: a row with
        a long text counts as several rows, and so does a token with many hosts.
        """
        owner = self._scope(call, InvalidQuery, "organization")
        limit, cursor = call.values.get("limit", PAGE_DEFAULT), call.values.get("cursor")
        try:
            position = order.start if cursor is None else order.parse(cursor)
        except (ValueError, IndexError):
            error = FieldError("cursor", "must be a nextCursor of a list in this order")
            raise InvalidQuery(errors=[error]) from None
        items: list[Any] = []
        examined = 0
        while True:
            rows = read(owner, position, ROWS_READ + 1)
            for row in rows[:ROWS_READ]:
                examined += 1 + len(str(getattr(row, text))) // ROW_BYTES  # any type, if forged
                item = view(row)
                if item is not None:
                    items.append(item)
                    examined += len(getattr(item, "hosts", ()))
                if len(items) == limit or examined >= ROWS_EXAMINED:
                    is_last = row is rows[-1]
                    return Page(items, None if is_last else order.cursor(order.position(row)))
            if len(rows) <= ROWS_READ:
                return Page(items)
            position = order.position(row)

    def _feed_page(
        self, call: Call, record: type[Union[Change, Event]], view: Callable[[Any], Any],
        **columns: Any,
    ) -> Page:  # fmt: skip
        """A page of changes or events with these columns, the oldest first, for a reader that
        continues from a cursor (values: after): <history>-<number>, or for events the number alone.
        A cursor is valid in the history that gave it, from the oldest number that is kept to the
        last. Any other is refused with one to continue from, so that the reader learns what it
        missed; for a cursor of another history that is the last number before this history began.

        view is as in _page(). It must leave out rows of other organizations: a query that did it
        could pass many of them between two of the caller's. Raises ChangesPruned.
        """
        history, *began_at = self._queries.feed()
        oldest, n = self._queries.first_number(record), (Change, Event).index(record)
        began, last = began_at[n], self._queries.feed_ends()[n]
        following = lambda _, *page: self._queries.following(record, *page, **columns)  # noqa: E731
        cursor, floor = f"{history}-{{}}".format, last if oldest is None else oldest - 1
        after = call.values.get("after", cursor(floor))
        named, _, digits = (cursor(last) if after == "now" else after).rpartition("-")
        is_ours, number = named in ("", history), int(digits)
        valid = max(floor, min(number, last if is_ours else began))
        if valid != number or not is_ours:
            start = cursor(valid)
            raise ChangesPruned(f"{ChangesPruned.remedy} The cursor is {start}.", cursor=start)
        order = Order(number, cursor, "".index)  # a feed takes no nextCursor
        page = self._page(call, following, view, ("labels", "detail")[n], order)
        return page._replace(more={"cursor": page.next or cursor(last)})


def title(name: str, id: str, organization: Owner, address: str = "") -> str:
    """The text by which people know a host, a token or an API key."""
    facts = id, organization or "all organizations", address
    return f"{name or 'no description'} ({', '.join(filter(None, facts))})"


def title_of(row: Row) -> str:
    identity = id_text(row.id), row.organization_id
    if isinstance(row, Host):
        return title(row.name, *identity, row.address or row.enrolled_from)
    return title(row.description, *identity)


class Names(Rules):
    """Finds what a command is about by the word that a person typed.

    A host is known by its id, its name, its hostname or the first digits of its id. Machines report
    their hostnames, and names too until an operator gives others. So that no machine can pose as
    another, a word that matches several hosts is refused, in whatever way it matches them; and a
    word with the form of an id is only ever an id, also after the host with that id is gone.
    """

    def matching(self, owner: Owner, kind: type[Any], word: str, takes_prefix: bool = True) -> Any:
        """The rows that a word matches, the newest first; for each way of matching, at most one
        more than is shown to people."""
        rows: list[Any] = []
        if ID.fullmatch(word) or (takes_prefix and ID_PREFIX.fullmatch(word)):
            first, last = (int(word.ljust(16, digit), 16) for digit in "0f")
            newest = self._queries.newest(kind, owner, min(last + 1, LAST_ID), FITS_SHOWN + 1)
            rows += [row for row in newest if row.id >= first]
        if kind is Host and not ID.fullmatch(word):
            rows += self._queries.hosts_named(word, owner, FITS_SHOWN + 1)
        return sorted({row.id: row for row in rows}.values(), key=attrgetter("id"), reverse=True)

    def find(self, owner: Owner, named: Named) -> Any:
        """The row that a word names. Raises NotFound, Conflict."""
        rows = {id_text(row.id): row for row in self.matching(owner, *named)}
        return rows[named.id_among({id: title_of(row) for id, row in rows.items()})]


class EventLimit:
    """Bounds the events that a peer can cause as often as it likes. In each period the first events
    of a kind are listed; the others are counted, and become one event at the period's end."""

    def __init__(self, maximum: int, length: int) -> None:
        """maximum: how many events of a kind are listed in a period; length: its seconds."""
        self._maximum, self.length_ms = maximum, length * SECOND_MS
        self.since = 0  # when the period began
        self._listed = bytearray(KIND_SLOTS)  # how many events, by the hash of their kind
        self.excess: Counter[EventKind] = Counter()  # events that were only counted
        self.unlisted: list[EventKind] = []  # of the running tick: added to excess at its commit

    def has_room(self, kind: EventKind) -> bool:
        return self._listed[hash(kind) % KIND_SLOTS] < self._maximum

    def try_list(self, kind: EventKind, is_full: bool = False, in_tick: bool = True) -> bool:
        """Count one more event. True if it is to be listed, because there is room."""
        is_listed = self.has_room(kind) and not is_full
        if is_listed:
            self._listed[hash(kind) % KIND_SLOTS] += 1
        elif in_tick:
            self.unlisted.append(kind)
        else:
            self._count(kind)
        return is_listed

    def _count(self, kind: EventKind) -> None:
        if kind not in self.excess and len(self.excess) >= KINDS_COUNTED:
            action, _, _, owner, code = kind
            kind = action, "server", "", owner, code
        self.excess[kind] += 1

    def after_commit(self) -> None:
        """To be called when the tick is committed."""
        for kind in self.unlisted:
            self._count(kind)
        self.unlisted.clear()

    def begin(self, now: int) -> None:
        """Begin a period."""
        self.since, self._listed = now, bytearray(KIND_SLOTS)
        self.excess.clear()


class AuditLog(Rules):
    """The events that happened, in a chain.

    Rules record events while a tick runs. Just before the commit the events are chained to the last
    one (each MAC covers its event and the MAC before it) and written; after the commit they are
    logged. If a call is refused, its events are undone, and its refusal is recorded. A refusal
    outside of a tick that writes is pending until the next tick that does.

    Any peer can cause refusals. Each code and organization has a kind of its own, so that noise in
    one hides none in another. Renewals, replays and changed facts have a kind for each host.
    """

    def __init__(self, registry: Registry, keep: Optional[int]) -> None:
        """keep: for how many seconds events are kept; None: for ever."""
        super().__init__(registry)
        self.origin = LOCAL  # of the call that runs
        self._now = 0  # the time of the tick
        self.keep = keep
        self.events: list[tuple[Event, str]] = []  # of the tick, each with the id of its request
        self._taken = 0  # how many of them, at the front, were pending before the tick
        self.pending: list[tuple[Event, str]] = []  # refusals, for the next tick that may write
        self.refusals = EventLimit(REFUSALS_AUDITED, MINUTE)  # and moves: a new proxy moves a fleet
        self.successes = EventLimit(SUCCESSES_AUDITED, HOUR)
        self.limits = self.refusals, self.successes
        self.refused: list[tuple[int, str, int, int, int]] = []  # rows of record_refusals()
        self._trouble = ""  # why the log cannot be pruned

    def begin(self, now: int) -> None:
        self.origin, self._now = LOCAL, now
        self.events, self.pending = self.pending, []
        if len(self.events) < PENDING_REFUSALS_MAXIMUM:
            self.end_periods(now)
        self._taken = len(self.events)

    def roll_back(self) -> None:
        """The tick is rolled back. Refusals that were pending before it are answered: keep them."""
        self.events, self.pending = [], self.events[: self._taken] + self.pending
        for limit in self.limits:
            limit.unlisted.clear()

    def record(
        self, action: str, actor: str, subject: str, owner: Owner, code: str = "", **detail: Any
    ) -> None:
        """Record an event of the running call. Details that are None or '' are left out."""
        text = redact(json_text({k: v for k, v in detail.items() if v not in (None, "")}))
        fields = action, actor, self.origin.address, owner, subject, code or None, text
        self.events.append((Event(0, self._now, *fields, b""), self.origin.request))

    def refuse(self, problem: Problem, origin: Origin, now: int, in_tick: bool = False) -> None:
        """Record that a call or a request was refused. in_tick: during a tick that writes."""
        if not problem.is_audited:
            return
        if problem.subject[:5] == "host:" and len(self.refused) < PENDING_REFUSALS_MAXIMUM:
            self.refused.append((now, problem.code, parse_id(problem.subject[5:]), now, now))
        kind = "refuse", "anonymous", "", problem.organization, problem.code
        is_full = len(self.pending) >= PENDING_REFUSALS_MAXIMUM
        if not self.refusals.try_list(kind, is_full, in_tick):
            return
        self.origin, self._now = origin, now
        fields = problem.actor, problem.subject, problem.organization, problem.code
        self.record("refuse", *fields, **problem.audit_detail)
        if not in_tick:
            self.pending.append(self.events.pop())

    def end_periods(self, now: int, at_once: bool = False) -> None:
        """In a tick: end the periods that are over, or all, and record what they counted."""
        for limit in self.limits:
            is_over = not 0 <= now - limit.since < limit.length_ms
            if at_once or is_over:
                for kind, count in limit.excess.items():
                    self.record(*kind, more=count, since=rfc3339(limit.since))
                limit.begin(now)

    def write(self, keyring: Keyring) -> None:
        if self.refused:
            self._queries.record_refusals(self.refused)
        if not self.events:
            return
        number, mac = self._queries.last_event()
        if number > LAST_ID - len(self.events):  # what cannot be audited must not happen
            raise StoreError(f"event {number} of the audit log was never written: {DAMAGED}")
        for place, (event, request) in enumerate(self.events):
            number += 1
            numbered = event._replace(number=number)
            mac = keyring.audit_mac(b"event", audit_record(numbered[:-1]), mac)
            self.events[place] = numbered._replace(mac=mac), request
        self._queries.add_events([event for event, _ in self.events])

    def log_events(self) -> None:
        self.refused.clear()
        for limit in self.limits:
            limit.after_commit()
        events, self.events = self.events, []
        for event, request in events:
            text = f"{event.action} {event.subject or '-'} by {event.actor}"
            text += f" from {event.address}" if event.address else ""
            text += f": {event.code}" if event.code else ""
            log.info("%s", text, extra={"event": event, "request": request})

    def prune(self, keyring: Keyring, now: int) -> bool:
        """Delete up to PRUNED_AT_ONCE events that are too old. True if there may be more."""
        if self.keep is None:
            return False
        old = self._queries.oldest(Event, now - self.keep * SECOND_MS, now, PRUNED_AT_ONCE)
        if not old:
            return False
        # Delete only unchanged events. Otherwise a thief who has the database but no keys could
        # backdate events, and make us prune the log and sign the anchor.
        try:
            start = chain_start(self._queries, keyring)
            keyless = range(1, start.number + 1)  # their key is gone
            verify_events([event for event in old if event.number not in keyless], start, keyring)
        except OperatorError as error:
            if str(error) != self._trouble:
                log.error("%s: old events are not deleted", error)
            self._trouble = str(error)
            return False
        self._trouble = ""
        if start.number < old[-1].number:
            put_anchor(self._queries, keyring, old[-1].number, old[-1].mac)
        return self._queries.prune_events(old[-1].number) >= PRUNED_AT_ONCE

    def list(self, call: Call, now: int) -> Page:
        """A page of events. values: organization, action (one or more), subject, code,
        sinceSeconds; after, for a page of a feed. Raises InvalidQuery, NotFound, ChangesPruned."""
        filters = [call.values.get(name) for name in ("subject", "code")]
        filters.append(call.values.get("organization", call.by.organization))
        actions, queries = call.values.get("action"), self._queries
        since = now - call.values.get("sinceSeconds", LAST_ID) * SECOND_MS

        def view(event: Event) -> Optional[EventView]:
            event = event.legible()
            pairs = zip(filters, (event.subject, event.code, event.organization_id))
            matches = (actions is None or event.action in actions) and event.at >= since
            matches &= all(wanted in (None, value) for wanted, value in pairs)
            return event_view(event, called) if matches else None

        called = lru_cache(partial(self._name_of, call.by.organization))  # names change

        def read_back(*page: Any) -> list[Event]:
            events = queries.newest(Event, *page)
            return [*takewhile(lambda event: event.legible().at >= since, events)]

        if "after" not in call.values:
            return self._page(call, read_back, view, "detail")
        return self._feed_page(call, Event, view)

    def _name_of(self, owner: Owner, party: str) -> str:
        """An actor or a subject as people know it: by name, unless another organization owns it."""
        kind, _, word = party.partition(":")
        record = next((record for record, name in KINDS.items() if name == kind), None)
        row = None if record is None else self._queries.get(record, parse_id(word))
        if row is not None and owner in (ALL_ORGANIZATIONS, row.organization_id):
            word = getattr(row, "name", "") or getattr(row, "description", "") or word
        kind = "" if kind in ("cli", "host") else kind.replace("api", "API").replace("-", " ")
        return f"{kind} {word}".strip()


class EventView(NamedTuple):
    event: Event
    text: str  # for people


def event_view(event: Event, called: Callable[[str], str] = str) -> EventView:
    """An event and its sentence. called(party): how people call an actor or a subject."""
    detail = stored_object(event.detail)
    changed = detail["facts"] if isinstance(detail.get("facts"), dict) else detail
    fields = {
        "hostname": "-", **detail, "problem": TITLES.get(event.code or ""),
        "actor": called(event.actor), "action": event.action, "subject": called(event.subject),
        "changed": ", ".join(name for name in changed if name != "reason"),
    }  # fmt: skip
    template = EVENT_TEXTS.get(event.action, "$actor: $action $subject")  # if it was forged
    if (event.action, event.actor) == ("edit", event.subject):
        template = "$subject reported a change of $changed"
    text = string.Template(template).safe_substitute(fields)
    text += f": {detail['reason']}" if detail.get("reason") else ""
    text += f", and {detail['more']} more like it" if detail.get("more") else ""
    return EventView(event, text[:1000])


# The formats of the audit log: theory of operation.
#
# In schema 2 the MAC of an event was made with the audit key itself, now with the key for events.
# The migration writes an audit-format event, the first one of the new format. It is chained to the
# last old event, and its detail has the number and MAC of that one. Events before it are verified
# in the old format. Only who has the key can make or move it. Without it all events are verified in
# the new format, so nobody can pass off a log as an old one; if it was pruned, so were all old
# events.
#
# A head is a MAC made with a key of its own, so that nobody can read a head from the database. In
# schema 2 it was the MAC of the event itself, which for old events is still taken as a head.


class ChainLink(NamedTuple):
    """The number and MAC of an event to which the next event is chained. Events up to the number
    old_until have the old format."""

    number: int
    mac: bytes
    old_until: int = 0

    def head(self, keyring: Keyring) -> bytes:
        """What verify-audit prints if this is the last event: for an old one, its MAC."""
        is_old = self.number <= self.old_until
        return self.mac if is_old else keyring.audit_mac(b"head", b"%d %b" % self[:2])


def _anchor_proof(keyring: Keyring, number: int, mac: bytes) -> bytes:
    return keyring.audit_mac(b"anchor", audit_record((number, mac)))


def put_anchor(queries: Queries, keyring: Keyring, number: int, mac: bytes) -> None:
    """Store the number and MAC of an event with a proof by the key. The events after it are chained
    to these, and the event itself is no longer needed."""
    queries.put(Anchor(number, mac, _anchor_proof(keyring, number, mac)))


def chain_start(queries: Queries, keyring: Keyring, is_schema_2: bool = False) -> ChainLink:
    """The link to which the first event is chained. Raises OperatorError if it was forged."""
    anchor = queries.anchor()
    number, mac = (anchor.number, anchor.mac) if anchor else (0, b"")
    proof: Optional[bytes] = _anchor_proof(keyring, number, mac)
    if is_schema_2:  # else the MAC of an event could be a proof
        is_ours = isinstance(number, int) and isinstance(mac, bytes) and len(mac) in (0, 32)
        proof = keyring.old_audit_mac(b"anchor %d %b" % (number, mac)) if is_ours else None
    if anchor and anchor.proof != proof:
        raise OperatorError("the anchor of the audit log has been changed")
    event = None if is_schema_2 else queries.format_event(number)
    if event is None:
        return ChainLink(number, mac, LAST_ID if is_schema_2 else 0)
    named = re.search('"mac":"((?:[0-9a-f]{2})*)"', str(event.detail))
    before = ChainLink(event.number - 1, bytes.fromhex(named[1]) if named else b"")
    verify_events([event], before, keyring)
    return ChainLink(number, mac, before.number)


def verify_events(events: Iterable[Event], link: ChainLink, keyring: Keyring) -> ChainLink:
    """Verify events that follow a link; returns the link of the last. Raises OperatorError at the
    first that is wrong."""
    number, mac, old_until = link
    for event in events:
        number += 1
        if event.number != number:
            raise OperatorError(f"event {number} of the audit log is missing")
        record = audit_record(event[:-1])
        if number <= old_until:
            mac = keyring.old_audit_mac(record, mac)
        else:
            mac = keyring.audit_mac(b"event", record, mac)
        if event.mac != mac:
            raise OperatorError(f"event {number} of the audit log has been changed")
    return ChainLink(number, mac, old_until)


def begin_audit_format(queries: Queries, keyring: Keyring, now: int, older: int) -> None:
    """The end of a migration from an older schema: verify the old events, and begin the new format
    after them. A log that does not verify is not mended, so it continues to be reported."""
    number, mac = queries.last_event()
    if older < AUDITED_SINCE or (number, mac) == (0, b"") or number == LAST_ID:
        return
    try:
        link = chain_start(queries, keyring, is_schema_2=True)
        if queries.anchor():
            put_anchor(queries, keyring, link.number, link.mac)
        while events := queries.following(Event, link.number, VERIFIED_AT_ONCE):
            link = verify_events(events, link, keyring)
    except OperatorError as error:
        log.error("%s", error)
    detail = json_text({"number": number, "mac": mac.hex()})
    event = number + 1, now, "audit-format", "server", "", None, "audit", None, detail
    mac = keyring.audit_mac(b"event", audit_record(event), mac)
    queries.add_events([Event(*event, mac)])


class Verified(NamedTuple):
    """The events that verify_audit() found unchanged."""

    first: int  # the number of an event
    last: int
    head: bytes  # of the last event
    has_head: bool  # this head, or an earlier one, is the one that the caller named
    unverified: int  # older events, chained with a key that is gone

    def summary(self) -> str:
        text = f"events {self.first} to {self.last} are unchanged"
        text = text if self.last >= self.first else "no events"
        older = f"; {self.unverified} older ones cannot be checked: their key is gone"
        return text + (older if self.unverified else "")


def verify_audit(
    engine: Engine, keyring: Keyring, head: Optional[bytes], progress: Progress = no_progress
) -> Verified:
    """Verify the whole audit log, and look for the event of an earlier head. Raises OperatorError,
    which names the first event that was changed; StoreError.

    Each slice of the log has its own read transaction: one for all would keep the WAL of a busy
    server from restarting. If that server prunes meanwhile, a slice begins at the new anchor.
    """
    queries, link, start, has_head = Queries(engine), ChainLink(0, b""), -1, False
    while True:
        engine.begin(writes=False, durable=False)
        try:
            anchored = chain_start(queries, keyring, engine.version() < SCHEMA_VERSION)
            link = link._replace(old_until=anchored.old_until)
            if start < 0 or anchored.number > link.number:
                link, has_head = anchored, has_head or anchored.head(keyring) == head
            if start < 0:
                start, oldest = link.number, queries.first_number(Event)
            last, _ = queries.last_event()
            events = queries.following(Event, link.number, VERIFIED_AT_ONCE)
        finally:
            engine.rollback()
        if oldest is not None and oldest < 1:
            raise OperatorError(f"event {oldest} of the audit log was never written")
        if not events:
            unverified = 0 if oldest is None or oldest > start else start + 1 - oldest
            return Verified(start + 1, link.number, link.head(keyring), has_head, unverified)
        link = verify_events(events, link, keyring)
        if head is not None and not has_head:
            links = (ChainLink(event.number, event.mac, link.old_until) for event in events)
            has_head = any(candidate.head(keyring) == head for candidate in links)
        progress(link.number - start, max(link.number, last) - start)


class SigningKeys(Rules):
    """The keys that sign and verify credentials, and their names in the database.

    The key file decides. A command or a restored backup may replace it while we run: reload() reads
    it, and sync_kids() writes its kids to the database. A command commits after it has changed the
    file, so reload_if_changed() looks after commits. Housekeeping, and so SIGHUP, finds the rest.
    """

    def __init__(
        self, registry: Registry, key_file: KeyFile, keyring: Keyring, ttl: Optional[int]
    ) -> None:
        """ttl: how many seconds a credential is valid; None: it does not expire."""
        super().__init__(registry)
        self.keyring = keyring
        self.file = key_file
        self.ttl = ttl
        self._version = -1  # of the database, when reload_if_changed() looked
        self._noted = ""  # the trouble with the file that is in the audit log already

    def reload(self) -> None:
        self.keyring = self.file.reload(self.keyring) or self.keyring

    def record_trouble(self) -> None:
        """Audit trouble with the key file, once. No host is refused, but a restart would fail."""
        trouble = self.file.trouble
        if trouble not in ("", self._noted):
            self._registry.audit.record("key-file", "server", "", None, trouble=trouble)
        self._noted = trouble

    def reload_if_changed(self) -> None:
        """Read the key file if another process has committed and the database has other keys. A
        look at the file in every tick would hang if its mount hangs."""
        version = self._registry.engine.data_version()
        if version != self._version:
            self._version = version
            if self._queries.kids(with_retired=False) != set(self.keyring.kids):
                self.reload()

    def authenticate(self, credential: str, now: int) -> Claims:
        """The claims of a credential whose signature is good and which has not expired. The time of
        issue is not checked: a clock an hour back would refuse all hosts. Raises CredentialInvalid,
        CredentialExpired, StorageUnavailable."""
        claims = self.keyring.verify(credential.encode("ascii", "replace"))
        if claims is None:  # a refusal makes an agent wait an hour: none if a key is unreadable
            with self._registry.reading():
                kept = self._queries.kids(with_retired=False)
                retired = self._queries.kids() - kept if kept.issubset(self.keyring.kids) else None
            if retired is None:
                raise StorageUnavailable()
            header = credential.partition(".")[0].encode("ascii", "replace")
            if header in map(credential_header, retired):
                raise CredentialInvalid("Its signing key was retired. Get a re-enroll token.")
            raise CredentialInvalid()
        expires_at = claims.expires_at
        if expires_at is not None and now > (expires_at + CREDENTIAL_GRACE) * SECOND_MS:
            name = tagged_id("host", claims.host)
            raise CredentialExpired().with_audit(name, name, claims.organization)
        return claims

    def is_due(self, claims: Claims, now: int) -> bool:
        """Whether a credential must be renewed: it is in the last third of its life, was signed by
        a key that no longer signs, or lives longer than credentials may now."""
        if claims.kid != self.keyring.first.kid:
            return True
        if claims.expires_at is None:
            return self.ttl is not None
        life = claims.expires_at - claims.issued_at
        if self.ttl is not None and life > self.ttl:
            return True
        return (claims.expires_at * SECOND_MS - now) * 3 < life * SECOND_MS

    # Issuing. A reply can be lost, so its request may come again: an enrollment with its
    # Idempotency-Key, a heartbeat with a credential that is due. A host that wants to fill the disk
    # repeats it a million times. So the newest credential is signed again, without an event or a
    # wait for the disk, until it is used, has expired or is an hour old. Its hash shows whether the
    # bytes are the same: the first key or the lifetime may have changed. Another address gets
    # another one: of two machines with copies, the first to use its new credential must supersede
    # the other. If addresses alternate, that ends when the hour has no room for events; then all
    # get one.

    def sign(self, host: Host) -> IssuedCredential:
        """The credential with the highest serial that was issued to a host."""
        issued_at, first = host.issued_at // SECOND_MS, self.keyring.first
        expires_at = None if self.ttl is None else issued_at + self.ttl
        claims = host.id, host.organization_id, issued_at, host.issued, expires_at, first.kid
        return IssuedCredential(first.sign(Claims(*claims)), (expires_at or 0) * SECOND_MS)

    def issue(
        self, host: Host, changes: Mapping[str, Any], held: int, address: str, now: int
    ) -> IssuedCredential:
        """Issue a credential to an address. held: the serial that it replaces; 0 if it is for a
        token. changes: columns of the host to write, with a higher serial."""
        changes = {**changes, "issued_to": address, "issued_at": now}
        issued = self.sign(host._replace(**changes))
        self._queries.edit_host(host.id, {**changes, "issued_hash": issued.hash(held)})
        return issued

    def issue_again(
        self, host: Host, held: int, kind: EventKind, address: str, now: int, **detail: Any
    ) -> IssuedCredential:
        """The newest credential of a host if it was issued for the same request, or else a new one,
        with an event of a kind. held: as in issue()."""
        audit, newest = self._registry.audit, self.sign(host)
        is_known = newest.hash(held) == host.issued_hash
        is_recent = 0 <= now - host.issued_at < CREDENTIAL_REPEATED_MS
        is_good = newest.expires_at == 0 or now < newest.expires_at
        is_owner = address == host.issued_to or not audit.successes.has_room(kind)
        if is_known and is_recent and is_good and is_owner:
            return newest
        self._registry.engine.require_durable()
        serial = max(host.issued, held) + 1
        if audit.successes.try_list(kind):
            audit.record(*kind, **detail, serial=serial)
        self._registry.metrics.tick["renewals"] += kind[0] == "renew"
        return self.issue(host, {"issued": serial}, held, address, now)

    def number_of(self, kid: str, now: int) -> int:
        """The number of a key in the database. If the database lacks the key, it is added."""
        number = self._queries.signing_key_number(kid)
        if number is None:
            self.sync_kids("key-file", now)
            number = self._queries.signing_key_number(kid)
            assert number is not None, "it is a key of the keyring"
        return number

    def sync_kids(self, actor: str, now: int, restarts_audit: bool = False) -> None:
        """Make the database have exactly the keys of the key file. The running call did not cause
        the difference, so its origin is not recorded."""
        audit, stored = self._registry.audit, self._queries.kids(with_retired=False)
        if restarts_audit:  # the audit key is new: it verifies only later events
            put_anchor(self._queries, self.keyring, *self._queries.last_event())
            audit.record("init", "key-file", "audit", None)
        origin, audit.origin = audit.origin, LOCAL
        for kid in reversed(self.keyring.kids):
            if kid not in stored:
                self._queries.add_signing_key(kid, now)
                audit.record("rotate", actor, f"signing-key:{kid}", None)
        for kid in sorted(stored.difference(self.keyring.kids)):
            self._queries.retire_signing_key(kid, now)
            audit.record("retire", actor, f"signing-key:{kid}", None)
        audit.origin = origin

    def rotate(self, call: Call, now: int) -> SigningKeyView:
        """Make a new key, which signs from now on; the others verify."""
        self.reload()
        return self._replace(self.keyring.rotated(), call, now)[0]

    def retire(self, call: Call, now: int) -> SigningKeyView:
        """Stop verifying with a key; values: kid, force. hosts of the view: how many this locks out
        at most. Raises NotFound; Conflict for the key that signs, or one in use without force."""
        self.reload()
        kid = call.values["kid"]
        if kid not in self.keyring.kids:
            raise NotFound("The key file does not have this key: see list-signing-keys.")
        if kid == self.keyring.first.kid:
            raise Conflict("This key signs. First create another: rotate-signing-key.")
        hosts = self._queries.hosts_up_to_key(self.number_of(kid, now))
        if hosts and not call.values.get("force"):
            raise Conflict(
                f"Hosts that use this key, or may have a credential signed by it: {hosts}. They "
                "move to the newest key with a heartbeat. Delete hosts that send none, or use "
                "--force: hosts that still use the key must then re-enroll."
            )
        views = self._replace(self.keyring.without(kid), call, now)
        return next(view._replace(hosts=hosts) for view in views if view.key.kid == kid)

    def _replace(self, keyring: Keyring, call: Call, now: int) -> list[SigningKeyView]:
        """Replace the key file before the commit: if that fails, the database is updated later."""
        self.file.replace(keyring)
        self.keyring = keyring
        self.sync_kids(call.by.name, now)
        return self.list(call, now).items

    def list(self, call: Call, now: int) -> Page:
        """All keys that ever were, the newest first."""
        states = {**dict.fromkeys(self.keyring.kids, "verifies"), self.keyring.first.kid: "signs"}
        rows, hosts_of = self._queries.signing_keys(), self._queries.hosts_by_signing_key
        return Page(
            [SigningKeyView(it, states.get(it.kid, "retired"), hosts_of(it.number)) for it in rows]
        )


# The service period, and the status of hosts.
#
# Theory of operation. A host's status follows from its silence: the time for which a server could
# have heard it, and did not. Time without a server must not count, or a restart after an hour would
# show the whole fleet offline. Nor must time in which nothing could be written (a full disk), nor
# time that never passed (the clock was set).
#
# So the servers on one database keep a row, service, with three times. alive: a server writes it
# every ALIVE_EVERY seconds; if it is older than ALIVE_GRACE, no server lives. started: when the
# current service period began. previous_alive: when the one before it ended. The time between those
# two is a pause; the column pauses has the earlier ones.
#
# A server that starts, or finds that alive is not close to its clock, begins a new period: started
# and alive become now, and previous_alive becomes what alive was.
#
# A host may be silent for MISSED_BEATS of the last interval sent to it, and ONLINE_SLACK. In a
# pause its heartbeats fail, and it waits longer and longer between attempts. So a host that was
# online when a pause began may be silent for the length of the pause more, but at most
# PAUSE_ALLOWANCE. A host that was offline then stays offline until it is heard.
#
#     silence   = the time in service since last_seen
#     allowance = MISSED_BEATS * told_interval + ONLINE_SLACK
#               + min(pause, PAUSE_ALLOWANCE), for each pause that began with silence <= allowance
#
# In a crash loop, servers live for seconds and hear few hosts: each pause allows for more than what
# the period before it adds. If there are more than PAUSES_KEPT pauses, the two that are closest for
# their age become one, and a host last seen between them may count as seen at its end.
#
# While no server lives, alive is used in place of now: the fleet looks as the server left it. A
# last_seen far ahead of now was written before the clock was set back. It is moved back by as much
# as the clock was, or to the start of this period if that is earlier.


def is_served(service: Optional[Service], now: int) -> bool:
    """Whether a server lives, and writes times that are close to now (Unix ms)."""
    return service is not None and abs(now - service.alive) <= ALIVE_GRACE * SECOND_MS


def allowed_silence_ms(told_interval: int) -> int:
    """How long a host with an interval (in s) may be silent and still be online, without pauses."""
    return (MISSED_BEATS * told_interval + ONLINE_SLACK) * SECOND_MS


def pauses_of(service: Service) -> list[tuple[int, int]]:
    """The remembered pauses, the oldest first, each as its begin and its end in Unix ms."""
    pairs = re.findall("([0-9]{1,15})-([0-9]{1,15})", service.pauses)
    pauses = [(int(end), int(start)) for end, start in pairs]
    if service.previous_alive < service.started:  # else the clock was set back
        pauses.append((service.previous_alive, service.started))
    return pauses


def next_period(old: Service, now: int) -> Service:
    """The service row for a new service period that begins at now, in Unix ms. It drops pauses that
    a clock which was set back has yet to reach. Of too many, the two that are closest for their age
    become one: as long as both, with the end of the later, so that no silence looks too long."""
    pauses = [pause for pause in pauses_of(old) if pause[1] <= now]
    if len(pauses) > PAUSES_KEPT:
        spans = [(b[1] - a[0]) / max(now - a[0], 1) for a, b in zip(pauses, pauses[1:])]
        n = spans.index(min(spans))
        (end, start), (later_end, later_start) = pauses[n : n + 2]
        pauses[n : n + 2] = [(later_end - (start - end), later_start)]
    text = " ".join(f"{end}-{start}" for end, start in pauses)
    return old._replace(started=now, alive=now, previous_alive=old.alive, pauses=text)


class ServicePeriod:
    """The service row at one time, from which the status of every host is computed."""

    def __init__(self, service: Optional[Service], now: int) -> None:
        """now: in Unix ms. service: None before the first server has run; then all time counts."""
        row = service or Service(0, now, 0, HEARTBEAT_INTERVAL, "")
        self._now, self._started, self._pauses = now, row.started, pauses_of(row)
        self._set_back = min(row.started - row.previous_alive, 0)  # of the clock: 0 ms or less
        self.is_live = is_served(row, now)  # whether a server lives, and hears hosts
        self._until = now if self.is_live else row.alive
        self._ahead = max(now, row.alive) + CLOCK_SLACK * SECOND_MS if service else LAST_ID
        self._ago = "ago" if self.is_live else "before the server stopped"

    def silence_ms(self, last_seen: int, told_interval: int) -> tuple[int, int]:
        """How long a host was silent while a server could hear it, and how much silence pauses
        allow it, both in ms. told_interval: in seconds."""
        if last_seen > self._ahead:
            last_seen = min(self._started, last_seen + self._set_back)
        silence, allowance, since = 0, 0, last_seen
        allowed = allowed_silence_ms(told_interval)  # once: a dead host has many pauses
        for end, start in self._pauses if since < self._started else ():
            if since < start:
                end = end if end > since else since
                silence += end - since
                if silence <= allowed + allowance:
                    allowance += min(start - end, PAUSE_ALLOWANCE * SECOND_MS)
                since = start
        silence += self._until - since
        return silence if silence > 0 else 0, allowance

    def since(self, last_seen: int, told_interval: int) -> int:
        """When a silent host became offline, or missing if it is, in Unix ms; now for others."""
        silence, allowance = self.silence_ms(last_seen, told_interval)
        missing = MISSING_AFTER * SECOND_MS
        limit = allowed_silence_ms(told_interval) + allowance
        excess, at = silence - (missing if silence > missing else limit), self._until
        for end, start in reversed(self._pauses):  # pauses are no silence
            if at - excess >= start:
                break
            excess, at = excess - (at - start), end
        return min(max(at - excess, 0), self._now)  # forged numbers may have any size

    def status(self, last_seen: int, revoked_at: Optional[int], told_interval: int) -> str:
        """The status of a host, one of STATUSES. No other function computes it."""
        if revoked_at is not None:
            return "revoked"
        if last_seen == 0:
            return "pending"
        silence, allowance = self.silence_ms(last_seen, told_interval)
        if silence <= allowed_silence_ms(told_interval) + allowance:
            return "online"
        return "offline" if silence <= MISSING_AFTER * SECOND_MS else "missing"

    def reason(self, last_seen: int, revoked_at: Optional[int], told_interval: int) -> str:
        """Why a host has its status, in sentences for people."""
        if revoked_at is not None:
            ago = format_duration(max(0, self._now - revoked_at) / SECOND_MS)
            return f"Revoked {ago} ago. Its agent retries hourly and is refused."
        if last_seen == 0:
            return "Enrolled, no heartbeat yet. Is the agent still running there?"
        status = self.status(last_seen, revoked_at, told_interval)
        silence, allowance = self.silence_ms(last_seen, told_interval)
        duration = format_duration(silence / SECOND_MS)
        text, due = "", f"one is due every {told_interval} s"
        if last_seen > self._now:
            text = f"The clock has gone back: the last heartbeat was at {rfc3339(last_seen)}. "
        if status == "online":
            return text.rstrip() or f"Last heartbeat {duration} {self._ago}; {due}."
        text += f"No heartbeat for {duration}{'' if self._ago == 'ago' else f' {self._ago}'}"
        if status == "missing":
            return f"{text}: a host is missing after {format_duration(MISSING_AFTER)}."
        limit = format_duration((allowed_silence_ms(told_interval) + allowance) / SECOND_MS)
        text += f"; {due}, and a host is offline after {limit} without one"
        pause = format_duration(allowance / SECOND_MS)
        return text + (f" ({pause} of it while the server was down)." if allowance else ".")


class ServiceRecord(Rules):
    """The row in which the servers on a database keep their service period, interval and URL."""

    def __init__(self, registry: Registry) -> None:
        super().__init__(registry)
        self.certificate: Optional[Certificate] = None  # in use; None without TLS
        self._pin = ""  # what join commands pin
        self._is_new = False  # whether these are not in the row yet
        self.ready_at = -1  # the time of the last tick in which ready() wrote

    def period(self, now: int) -> ServicePeriod:
        return ServicePeriod(self._queries.service(), now)

    def start(self, url: str, now: int) -> None:
        """A server starts. If another one lives, or just did, the service period continues."""
        old, interval = self._queries.service(), self._registry.interval
        if old is None:
            old = Service(now, now, now, interval, url)
        elif abs(now - old.alive) <= ALIVE_EVERY * SECOND_MS:
            old = old._replace(alive=max(now, old.alive))
        else:
            old = next_period(old, now)
        if url != old.public_url:
            log.info("commands for machines now have the URL %s, not %s", url, old.public_url)
        self._queries.put(self._with_certificate(old._replace(interval=interval, public_url=url)))

    def keep_alive(self, now: int) -> None:
        service = self._queries.service()
        if service is None or is_served(service, now):
            self._queries.keep_alive(now)
            return
        self._queries.put(next_period(service, now))
        times = rfc3339(service.alive), rfc3339(now)
        log.warning("the clock was set, or nothing could be written, from %s to %s", *times)

    def ready(self, call: Call, now: int) -> None:
        """Check that the server can write, by writing. Raises StorageUnavailable for a bad key
        file: it refuses no host yet, but a restart would fail."""
        if now != self.ready_at:  # once in a tick: thousands may have waited for another writer
            self.keep_alive(now)
            self._registry.keys.reload()
            self.ready_at = now
        if self._registry.keys.file.trouble:
            raise StorageUnavailable(
                "The key file is missing or invalid. The server uses the keys that it loaded "
                "before; its log has the reason."
            )

    def announce(self, certificate: Certificate, pin: str) -> None:
        """The server has a new certificate, and from now on join commands pin this ('': nothing).
        Housekeeping writes both to the row."""
        self.certificate, self._pin, self._is_new = certificate, pin, True

    def _with_certificate(self, row: Service) -> Service:
        """The row with the certificate in use. If agents pin another key, this is logged once."""
        if self.certificate is None:
            return row._replace(pin="", certificate_ends=0)
        key, ends, pinned = self.certificate.pin, self.certificate.ends, row.pinned
        if pinned and key not in pinned.split(";"):
            text = "the certificate has another key: hosts that pin %s refuse this server until "
            text += "you run what agent-command prints on them"
            log.error(text, UNPRINTABLE.sub("?", pinned))
            self._registry.audit.record("certificate", "server", "", None, pinned=pinned, pin=key)
            pinned = ""
        warned_at = row.warned_at if ends == row.certificate_ends else 0
        row = row._replace(certificate_ends=ends, warned_at=warned_at)
        return row._replace(pin=self._pin, pinned=self._pin or pinned)

    def watch_certificate(self, now: int) -> None:
        """Write a new certificate to the row. A tick may fail, so it counts as written when a later
        turn reads it. Near the certificate's end, warn once a day, however often servers start."""
        row = self._queries.service()
        if row is None:
            return
        fresh = self._with_certificate(row) if self._is_new else row
        self._is_new = fresh != row
        ends, has_warned = fresh.certificate_ends, 0 <= now - fresh.warned_at < DAY * SECOND_MS
        if ends and ends - now <= CERTIFICATE_WARNING * SECOND_MS and not has_warned:
            log.warning("the certificate expires at %s: renew it, and send SIGHUP", rfc3339(ends))
            self._registry.audit.record("certificate", "server", "", None, endsAt=rfc3339(ends))
            fresh = fresh._replace(warned_at=now)
        if fresh != row:
            self._queries.put(fresh)


# What is reported of hosts: theory of operation
#
# The status of a host is computed, and its changes are reported. For that the database has the
# state of each host: the status that was last reported. If the two differ there is a change, which
# is written in one transaction with the new state. So each change is reported once, however many
# servers there are. Lists, their filters and counts show the state, too: what was reported.
#
# An act of an operator is reported at once. So is a heartbeat of a host that was not online: the
# statement for plain heartbeats does not match such a host. Hosts that fall silent are found by the
# sweep. It looks at all hosts in the order of their ids, in slices: no heartbeat waits for more
# than one, and one that is rolled back, as on a full disk, is done again. SQL leaves out hosts
# whose state agrees with last_seen; the service period judges the others. After a new period has
# begun, as at a start or when the clock was set, it judges all that were reported as offline or
# missing.
#
# While no server lives by the clock, silence cannot be known: the sweep waits until housekeeping
# has begun a service period, and the time before is a pause. The rest after a sweep is longer the
# more time it took, so that sweeps take a fixed share of the processor at most.


class Sweep(NamedTuple):
    """The last sweep that ended, and the progress of the one that runs."""

    last_started: int  # the start of the service period in which it began
    last_spent: float  # seconds of processor time, of all its slices
    last_ended: float  # by the monotonic clock
    after: int = -1  # the id of the last host that was judged; -1: none yet
    started: int = -1
    spent: float = 0.0


class Reports(Rules):
    """Reports changes of hosts. A rule sets the state of a host at once; its changes are written at
    the end of the tick, which then waits for the disk, so that readers of the feed miss none. A
    plain heartbeat is no change: its host was reported as online."""

    def __init__(self, registry: Registry, keep: int) -> None:
        """keep: for how many seconds changes are kept."""
        super().__init__(registry)
        self._keep = keep
        self.changes: list[Change] = []  # of the tick
        self.are_many = False  # in the last tick: then the next is durable from its beginning
        self.swept = self._sweep = Sweep(-1, 0.0, time.monotonic())  # as committed; as of the tick

    def report(
        self, hosts: Sequence[tuple[Host, int, int]], actor: str = "", is_new: bool = False
    ) -> None:
        """Report the new states of hosts: each host with its state, and since when in Unix ms.
        actor: who caused it, as the audit log names them; is_new: the hosts have just enrolled."""
        for host, state, at in hosts:
            fields = host.id, host.organization_id, host.name, host.labels
            reported = 0 if is_new else host.state, state, host.last_seen, actor
            self.changes.append(Change(0, at, *fields, *reported, host.ephemeral, host.address))
        if not is_new:  # the row of a deleted host is deleted, too
            states = [(state, at, host.id) for host, state, at in hosts if state != DELETED]
            self._queries.set_states(states)

    def write(self) -> None:
        self.are_many = len(self.changes) >= CHANGES_MANY
        if self.changes:
            self._registry.engine.require_durable()
            self._queries.add_changes(self.changes)

    def end_tick(self, is_committed: bool) -> None:
        self.changes.clear()
        self.swept = self._sweep = self._sweep if is_committed else self.swept

    def sweep(self, now: int) -> float:
        """Report which hosts of a slice fell silent. Returns the seconds until the next slice."""
        began, sweep, service = time.thread_time(), self.swept, self._queries.service()
        period, started = ServicePeriod(service, now), service.started if service else 0
        if not period.is_live:
            return SWEEP_REST
        if sweep.after < 0:
            sweep = sweep._replace(started=started)
        limits = SWEPT_AT_ONCE, JUDGED_AT_ONCE, now, started != sweep.last_started
        silences, after = self._queries.silences(sweep.after, *limits)
        self._report_changed(silences, period)
        spent = sweep.spent + time.thread_time() - began
        if after is not None:
            self._sweep = sweep._replace(after=after, spent=spent)
            return 0
        self._sweep = Sweep(sweep.started, spent, time.monotonic())
        return max(SWEEP_REST, SWEEP_RESTS * spent)

    def _report_changed(self, silences: Sequence[Silence], period: ServicePeriod) -> None:
        """Report the hosts whose status is not their state."""
        changed: dict[int, tuple[int, int]] = {}
        for host, last_seen, told_interval, was in silences:
            state = STATUS_NAMES.index(period.status(last_seen, None, told_interval))
            if state != was:
                changed[host] = state, period.since(last_seen, told_interval)
        if changed:
            reports = [(host, *changed[host.id]) for host in self._queries.hosts([*changed])]
            self.report(sorted(reports, key=itemgetter(2)))

    def list(self, call: Call, now: int) -> Page:
        """A page of changes. values: after or sinceSeconds, organization, status and label (one or
        more of each), host. Raises InvalidQuery, NotFound, ChangesPruned."""
        queries, values = self._queries, call.values
        statuses, labels = values.get("status", CHANGED_TO), values.get("label", ())
        owner = values.get("organization", call.by.organization)
        host = self._owned_id(Change, owner, "host_id", values.get("host"))
        since = now - values.get("sinceSeconds", LAST_ID) * SECOND_MS

        def view(change: Change) -> Optional[Change]:
            is_wanted = owner in (ALL_ORGANIZATIONS, change.organization_id) and change.at >= since
            is_wanted &= STATUS_NAMES[change.status] in statuses
            is_wanted &= not labels or has_labels(stored_object(change.labels), labels)
            return change if is_wanted else None

        if "sinceSeconds" in values and "after" not in values:
            after = f"{queries.feed().history}-{max(queries.change_before(since), 0)}"
            call = call._replace(values={**values, "after": after})
        page = self._feed_page(call, Change, view, host_id=host)
        hosts = queries.hosts([*{change.host_id for change in page.items}])
        muted = {host.id for host in hosts if host.muted_until > now}
        cursor = f"{queries.feed().history}-{{}}".format
        items = [ChangeView(row, cursor(row.number), row.host_id in muted) for row in page.items]
        return page._replace(items=items)

    def last_change_at(self) -> int:
        """When the last change was, in Unix ms; 0 if there is none."""
        return sum(change.at for change in self._queries.newest(Change, None, LAST_ID, 1))

    def redo_after_restore(self, call: Call, now: int) -> dict[str, Any]:
        """In a copy of a backup, redo what must not be undone, and return what that was. values,
        all of the newer database: revoked (rows by their record), used (tokens), lost (names of
        hosts), and trouble: why it cannot be read."""
        queries, by, newer, lost = self._queries, call.by.name, call.values, call.values["lost"]
        queries.begin_history(now + LOST_WAIT * SECOND_MS, queries.newest_host(), len(lost))
        times = {row.id: row.revoked_at for row in newer["revoked"][Host]}
        hosts = [host for host in queries.hosts([*times]) if host.revoked_at is None]
        for host in hosts:
            queries.edit_host(host.id, {"revoked_at": times[host.id]})
        self.report([(host, REVOKED, now) for host in hosts], by)
        api_keys, tokens = (
            sum(queries.revoke(kind, row.id, row.revoked_at) for row in newer["revoked"][kind])
            for kind in (ApiKey, Token)
        )
        done = {"hostsRevoked": len(hosts), "apiKeysRevoked": api_keys, "tokensRevoked": tokens,
                "tokensUsed": queries.take_uses(newer["used"]), "hostsLost": len(lost)}  # fmt: skip
        self._registry.audit.record("restore-backup", by, "", None, "", **cast("Any", done))
        return {**done, "firstLost": lost[:LOST_NAMED], "notReadable": newer["trouble"]}

    def accept_history(self, call: Call, now: int) -> None:
        """From now on, hosts that a restore lost must enroll again. Idempotent."""
        self._queries.put(self._queries.feed()._replace(lost_until=0))
        self._registry.audit.record("accept-history", call.by.name, "", None)

    def prune(self, now: int) -> bool:
        """Delete some changes that are too old or too many. True if there may be more."""
        return self._queries.prune_changes(now - self._keep * SECOND_MS, now)


def begin_feed(queries: Queries, now: int) -> None:
    """The end of a migration: the state of each host becomes its status, without a change."""
    queries.begin_history()
    queries.count_hosts()
    period, after = ServicePeriod(queries.service(), now), -1
    while rows := queries.labels_slice(None, after, COUNTED_AT_ONCE):
        states, after = [], rows[-1][0]
        for host in queries.hosts([row[0] for row in rows]):
            status = period.status(*host.status_inputs)
            if status != "pending":
                since = host.revoked_at or period.since(host.last_seen, host.told_interval)
                states.append((STATUS_NAMES.index(status), since, host.id))
        queries.set_states(states)


# Incidents: hosts that fell silent together, as found in changes.

SILENT = OFFLINE, MISSING


@lru_cache(maxsize=HOPS_CACHED)
def network_of(address: str) -> list[str]:
    """The network of a host and its neighbours, /24 or /64; none if the text is no address."""
    if match := re.fullmatch(r"((?:[0-9]{1,3}\.){3})[0-9]{1,3}", address):
        return [f"{match[1]}0/24"]  # as ipaddress writes it, ten times as fast
    with suppress(ValueError):
        return [str(ipaddress.ip_network(f"{address}/{NETWORK_BITS}", strict=False))]
    return []


def traits_of(labels: str, address: str) -> list[str]:
    """What a host may share with others: labels as key=value, and its network."""
    pairs = stored_object(labels).items()
    return [*(f"{key}={value}" for key, value in pairs), *network_of(address)]


class Incident:
    """Hosts that fell silent within some time of the first one. Times are in Unix ms."""

    # The fleet to compare it with: how many hosts there are, and how many of them have each trait.
    fleet: Optional[tuple[int, Counter[str]]] = None

    def __init__(self, id: str, at: int) -> None:
        self.id, self.at = id, at  # the cursor and the time of its first change
        self.until: Optional[int] = None  # when the last of its hosts was back
        self.hosts: dict[int, None] = {}  # in the order in which they fell silent
        self.down = 0  # how many of them are still down
        self.traits: Counter[str] = Counter()

    @property
    def count(self) -> int:
        return len(self.hosts)

    def common(self) -> list[str]:
        """The traits that most of its hosts have, the most frequent first."""
        return [trait for trait, hosts in self.traits.most_common() if 2 * hosts > self.count]

    def _share_elsewhere(self, trait: str) -> float:
        """The share of all other hosts that has a trait. If there are none, no trait is special."""
        if self.fleet is None:
            return 0.0
        others = self.fleet[0] - self.count
        return max(0, self.fleet[1][trait] - self.traits[trait]) / others if others > 0 else 1.0

    @property
    def text(self) -> str:
        """A sentence, with the trait that most of its hosts have and most others do not."""
        count, text = self.count, f"{self.count} hosts went offline together"
        special = [trait for trait in self.common() if self._share_elsewhere(trait) <= 0.5]
        if special:
            trait = max(special, key=lambda t: self.traits[t] / count - self._share_elsewhere(t))
            verb = "have" if "=" in trait else "are in"
            text += f", {self.traits[trait]} of the {count} {verb} {sanitize(trait)}"
            if self.fleet is not None:
                text += f", {self.fleet[1][trait]} of {self.fleet[0]} in the fleet"
        if self.down == count:
            return text
        return text + (f"; {self.down} still down" if self.down else "; all are back or gone")


class IncidentScan:
    """The incidents of one organization, or of all, as found in the changes searched so far."""

    def __init__(self, after: int, window: int) -> None:
        """after: the number of the last change that was searched; window: a host belongs to an
        incident if it falls silent within so many ms of the first host."""
        self.after, self._window = after, window
        self._found: list[Incident] = []  # the oldest first; one of few hosts does not count yet
        self._of_host: dict[int, Incident] = {}  # of each host that is down
        self.asked_at = self.counted_at = 0
        self.traits: set[str] = set()  # the traits that are counted
        self.shares: Counter[str] = Counter()
        self.last, self.hosts = -1, 0  # the last host that was counted, and how many were

    def add(self, history: str, change: Change) -> None:
        """Search the next change in the feed."""
        is_silent, host = change.status in SILENT, change.host_id
        if is_silent and change.was in SILENT:
            return
        if incident := self._of_host.pop(host, None):
            incident.down -= 1
            incident.until = None if incident.down else change.at
        if is_silent and not change.actor:
            last = self._found[-INCIDENTS_OPEN:]
            incident = next((one for one in last if abs(change.at - one.at) <= self._window), None)
            if incident is None:
                incident = Incident(f"{history}-{change.number}", change.at)
                self._found.append(incident)
            self._of_host[host], incident.until = incident, None
            incident.down += 1
            if host not in incident.hosts:
                incident.hosts[host], counts = None, incident.traits
                traits = traits_of(change.labels, change.address)
                counts.update(t for t in traits if t in counts or len(counts) < TRAITS_COUNTED)

    def since(self, at: int) -> list[Incident]:
        """The incidents since a time, the newest first. Older ones are dropped."""
        self._found = [one for one in self._found if one.at >= at]
        return [one for one in reversed(self._found) if one.count >= INCIDENT_SMALLEST]


class IncidentLog(Rules):
    """The incidents of the last day. While requests ask for them, what was found in the changes is
    kept in memory: then only newer changes are searched, and what hosts share is counted again."""

    def __init__(self, registry: Registry) -> None:
        super().__init__(registry)
        self._scans: dict[Owner, IncidentScan] = {}

    def list(self, call: Call, now: int) -> Any:
        """A page of incidents, the newest first; after a slice, the call. values: organization.
        Raises InvalidQuery, NotFound."""
        owner = self._scope(call, InvalidQuery, "organization")
        scan = self._scan_of(owner, now)
        if not self._search(scan, owner):
            return call
        incidents = scan.since(now - DAY * SECOND_MS)[:PAGE_MAXIMUM]
        traits = {trait for incident in incidents for trait in incident.common()}
        is_known = traits and sum(row[2] for row in self._queries.census(owner)) <= SHARES_MAXIMUM
        if is_known and not self._count_traits(scan, owner, traits, now):
            return call
        for incident in incidents:
            incident.fleet = (scan.hosts, scan.shares) if is_known else None
        return Page(incidents)

    def forget(self, now: int) -> None:
        """Drop scans that were not asked for in SHARES_KEPT: one may take 100 MiB."""
        age, scans = SHARES_KEPT * SECOND_MS, self._scans.items()
        self._scans = {owner: scan for owner, scan in scans if 0 <= now - scan.asked_at <= age}

    def _scan_of(self, owner: Owner, now: int) -> IncidentScan:
        if owner not in self._scans:
            interval = (self._queries.service() or self._registry).interval
            # One hour more: the first changes may belong to an earlier incident.
            after = self._queries.change_before(now - (DAY + HOUR) * SECOND_MS)
            self._scans[owner] = IncidentScan(after, INCIDENT_INTERVALS * interval * SECOND_MS)
        self._scans[owner].asked_at = now
        return self._scans[owner]

    def _search(self, scan: IncidentScan, owner: Owner) -> bool:
        """Search a slice of the changes. True if it was the last one."""
        changes = self._queries.following(Change, scan.after, LOOKED_AT_ONCE)
        history = self._queries.feed().history
        for change in changes:
            scan.after = change.number
            if owner in (ALL_ORGANIZATIONS, change.organization_id):
                scan.add(history, change)
        return len(changes) < LOOKED_AT_ONCE

    def _count_traits(self, scan: IncidentScan, owner: Owner, traits: set[str], now: int) -> bool:
        """Count who in a slice of the fleet has these traits. True if it was the last slice."""
        is_kept = 0 <= now - scan.counted_at <= SHARES_KEPT * SECOND_MS
        if not (is_kept and traits <= scan.traits):
            scan.counted_at, scan.traits, scan.shares = now, traits, Counter()
            scan.last, scan.hosts = -1, 0
        rows = self._queries.labels_slice(owner, scan.last, LOOKED_AT_ONCE)
        for scan.last, labels, address in rows:
            if isinstance(labels, str) and isinstance(address, str):  # else they were forged
                scan.shares.update(scan.traits.intersection(traits_of(labels, address)))
        scan.hosts += len(rows)
        if len(rows) < LOOKED_AT_ONCE:
            return True
        scan.counted_at = now  # else a slow pass would be too old at its end
        return False


class Organizations(Rules):
    """The owners of hosts, tokens and API keys."""

    def add(self, call: Call, now: int) -> Organization:
        """Create an organization. values: name. Raises Conflict if it exists."""
        name = call.values["name"]
        organization = Organization(name, now)
        if not self._queries.add(organization):
            raise Conflict(f"The organization {name} exists already.")
        self._registry.audit.record("add", call.by.name, f"organization:{name}", name)
        return organization

    def list(self, call: Call, now: int) -> Page:
        """The organizations that the caller sees."""
        owner = call.by.organization
        return Page([row for row in self._queries.organizations() if owner in (None, row.id)])


class FailedAuthLimiter:
    """Counts the wrong secrets of each network, in the minute after the first of them.

    A flood of guesses gets 429 and a time to wait. Only wrong secrets are counted and refused: a
    valid one is accepted. Who has more networks than are remembered gets 401 for longer, that is
    all.
    """

    def __init__(self) -> None:
        self._windows: OrderedDict[str, tuple[int, int]] = OrderedDict()  # begin in ms, and count

    def judge(self, problem: Problem, address: str, now: int) -> Problem:
        """Count one more wrong secret. Returns the problem, or TooManyRequests in its place."""
        network = address  # for IPv6, the network that one party controls
        if ":" in address:
            network = ipaddress.ip_address(address).packed[: NETWORK_BITS // 8].hex()
        since, count = self._windows.get(network, (now, 0))
        if not 0 <= now - since < MINUTE * SECOND_MS:
            del self._windows[network]  # so that the windows stay in the order of their beginnings
            since, count = now, 0
        self._windows[network] = since, count + 1
        if len(self._windows) > FAILING_REMEMBERED:
            self._windows.popitem(last=False)
        if count < FAILURES_ALLOWED:
            return problem
        limited = TooManyRequests()
        limited.retry_after = MINUTE - (now - since) // SECOND_MS
        return limited


def secret_state(row: Union[ApiKey, Token], now: int) -> str:
    """The state of a secret at a time in Unix ms, one of TOKEN_STATES or KEY_STATES."""
    if row.revoked_at is not None:
        return "revoked"
    if isinstance(row, Token) and row.uses >= row.max_uses:
        return "used"
    return "valid" if row.expires_at is None or now < row.expires_at else "expired"


class ApiKeys(Rules):
    """The keys of people and scripts that use the user API. A key of one organization creates keys
    of that one alone, a key of all creates any; they stay valid when it expires or is revoked."""

    def __init__(self, registry: Registry) -> None:
        super().__init__(registry)
        self.uses: dict[int, int] = {}  # the last uses by key id, in Unix ms, for housekeeping

    def mint(self, call: Call, now: int) -> ApiKeyView:
        """Create a key. Its text is shown this once. values: organizationId (None: the caller's
        scope), role, description, ttlSeconds (None: no end). Raises InvalidBody, NotFound."""
        values, owner = call.values, self._scope(call, InvalidBody, "organizationId")
        secret, ttl = mint_secret(API_KEY_PREFIX, new_id(now)), values.get("ttlSeconds")
        key = ApiKey(
            id=secret.id, secret_hash=secret.digest(), organization_id=owner,
            role=values.get("role", "admin"), description=values.get("description", ""),
            created_at=now, created_by=call.by.name,
            maker_id=call.by.id if call.by.id >= 0 else None,
            expires_at=None if ttl is None else now + ttl * SECOND_MS,
        )  # fmt: skip
        if not self._queries.add(key):
            return self.mint(call, now)  # two ids of one millisecond may be the same
        self._record("mint", call.by.name, key, role=key.role)
        return ApiKeyView(key, secret_state(key, now), secret.text)

    def revoke(self, call: Call, now: int) -> Any:
        """Revoke a key. Idempotent. values: withKeys, for the keys too that it created, directly or
        not; self, for the caller's too. The call while there may be more. Raises NotFound,
        Conflict."""
        key, keys = self._row_of(call, ApiKey), []
        if call.values.get("withKeys") == "true":
            keys = self._queries.live_keys_made_by(key.id, call.by.id, now, ACTED_AT_ONCE)
        has_more = len(keys) == ACTED_AT_ONCE
        for target in (*keys, key):
            if target.id == call.by.id and call.values.get("self") != "true":
                remedy = "confirm with self=true, or --yes"
                raise Conflict(f"This would revoke the key that you use: {remedy}.")
            if has_more and target.id == call.by.id:  # it must still be valid in the next tick
                continue
            if self._queries.revoke(ApiKey, target.id, now):
                self._record("revoke", call.by.name, target)
        if has_more:
            return call
        return ApiKeyView(key._replace(revoked_at=key.revoked_at or now), "revoked")

    def identify(self, text: str, request: str, origin: Origin, now: int) -> Principal:
        """Before the tick: the caller that presents an API key with a request; see Api.admit().
        Raises ApiKeyInvalid, TooManyRequests, StorageUnavailable."""
        secret = parse_secret(API_KEY_PREFIX, text)
        key = self._prove(ApiKey, secret, ApiKeyInvalid(), origin, now, request=request)
        by = Principal(tagged_id("api-key", key.id), key.organization_id, key.role, key.id)
        self._require_valid(key, by, request, now)
        self.uses[key.id] = now
        return by

    def require_live(self, by: Principal, now: int) -> None:
        """In the tick: the key may have been revoked since identify(). Raises ApiKeyInvalid."""
        self._require_valid(self._queries.get(ApiKey, by.id), by, "", now)

    @staticmethod
    def _require_valid(key: Optional[ApiKey], by: Principal, request: str, now: int) -> None:
        state = "revoked" if key is None else secret_state(key, now)
        if state != "valid":
            word = "has expired" if state == "expired" else "has been revoked"
            problem = ApiKeyInvalid(f"The API key {word}; mint-api-key creates another.")
            raise problem.with_audit(by.name, by.name, by.organization, request=request)

    def record_uses(self) -> None:
        """Write the last uses. Housekeeping does, without a wait for the disk: no request waits."""
        self._queries.use_api_keys(self.uses)
        self.uses.clear()

    def list(self, call: Call, now: int) -> Page:
        """A page of API keys. values: organization, named. Raises InvalidQuery, NotFound."""

        def view(key: ApiKey) -> ApiKeyView:
            used = key.last_used_at or self.uses.get(key.id)  # the first use is not written yet
            return ApiKeyView(key._replace(last_used_at=used), secret_state(key, now))

        return self._page(call, self._reader(ApiKey, call), view, "description")


class Tokens(Rules):
    """The tokens with which hosts enroll: minted, shown, revoked, proved. Enrollments uses them."""

    def mint(self, call: Call, now: int) -> TokenView:
        """Create a token. Its text is shown this once. values: ttlSeconds, maxUses, description,
        hostname, labels, intervalSeconds, ephemeralSeconds (the silence that ends its hosts),
        organizationId. Raises InvalidBody, NotFound."""
        usual = (self._queries.service() or self._registry).interval
        least = EXPIRY_INTERVALS * call.values.get("intervalSeconds", usual)
        if call.values.get("ephemeralSeconds", least) < least:
            detail = f"must be at least {least}, {EXPIRY_INTERVALS} heartbeat intervals"
            raise InvalidBody(errors=[FieldError("ephemeralSeconds", detail)])
        owner = self._scope(call, InvalidBody, "organizationId") or DEFAULT_ORGANIZATION
        return self._mint(call, owner, None, now)

    def reenroll(self, call: Call, now: int) -> TokenView:
        """Create a token that gives an existing host a new credential. Raises NotFound."""
        host = self._row_of(call, Host)
        return self._mint(call, host.organization_id, host.id, now)

    def _mint(self, call: Call, owner: str, host: Optional[int], now: int) -> TokenView:
        secret, values = mint_secret(TOKEN_PREFIX, new_id(now)), call.values
        labels, max_uses = values.get("labels", {}), values.get("maxUses", 1)
        token = Token(
            id=secret.id, secret_hash=secret.digest(), organization_id=owner,
            description=values.get("description", ""), hostname=values.get("hostname"),
            host_id=host, labels=json_text(labels), max_uses=max_uses,
            created_at=now, created_by=call.by.name,
            expires_at=now + values.get("ttlSeconds", TOKEN_TTL) * SECOND_MS,
            own_interval=values.get("intervalSeconds"), ephemeral=values.get("ephemeralSeconds"),
        )  # fmt: skip
        if not self._queries.add(token):
            return self._mint(call, owner, host, now)  # the id is taken
        self._record(
            "mint", call.by.name, token, host=None if host is None else id_text(host),
            maxUses=max_uses, expiresAt=rfc3339(token.expires_at),
            description=token.description, hostname=token.hostname, labels=labels or None,
            intervalSeconds=token.own_interval, ephemeralSeconds=token.ephemeral,
        )  # fmt: skip
        return TokenView(token, "valid", (), secret.text)

    def get(self, call: Call, now: int) -> TokenView:
        """Raises NotFound."""
        return self._view(self._row_of(call, Token), now)

    def _view(self, token: Token, now: int) -> TokenView:
        if token.host_id is None:
            hosts = self._queries.hosts_by_token(token.id, TOKEN_HOSTS_SHOWN)
        else:
            hosts = [token.host_id] if token.uses else []
        return TokenView(token, secret_state(token, now), hosts)

    def revoke(self, call: Call, now: int) -> Any:
        """Revoke a token. Idempotent. values: withHosts, whether also the hosts that enrolled with
        it: the call while there may be more. Raises NotFound."""
        token = self._row_of(call, Token)
        if self._queries.revoke(Token, token.id, now):
            self._record("revoke", call.by.name, token)
        if call.values.get("withHosts") == "true":
            hosts = self._queries.live_hosts_of_token(token, ACTED_AT_ONCE)
            reason = f"it enrolled with token {id_text(token.id)}"
            host_call = call._replace(values={"reason": reason})
            for number in hosts:
                self._registry.hosts.revoke(host_call._replace(id=number), now)
            if len(hosts) == ACTED_AT_ONCE:
                return call
        return self.get(call, now)

    def prove(self, text: str, hostname: str, origin: Origin, now: int) -> Token:
        """Before the tick: the token whose secret a caller has, in whatever state the token is.
        Raises TokenUnknown, TooManyRequests, StorageUnavailable."""
        secret = parse_secret(TOKEN_PREFIX, text)
        return self._prove(Token, secret, TokenUnknown(), origin, now, hostname=hostname)

    def list(self, call: Call, now: int) -> Page:
        """A page of tokens. values: organization, state, named. Raises InvalidQuery, NotFound."""
        states = call.values.get("state", TOKEN_STATES)

        def view(token: Token) -> Optional[TokenView]:
            return self._view(token, now) if secret_state(token, now) in states else None

        return self._page(call, self._reader(Token, call), view)


def changed_facts(host: Host, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts, by column, that differ from a host's. A hostname that a token bound stays."""
    current = host._asdict()
    changes = {name: value for name, value in facts.items() if current[name] != value}
    if host.bound:
        changes.pop("hostname", None)
    return changes


class Sighting(NamedTuple):
    """An instance of an agent begins to use a credential (new), or does so again (back)."""

    kind: str
    at: int  # Unix ms
    instance: str  # names a machine, its boot and a folder
    address: str
    hostname: str


_SEEN = re.compile(r"(?m)^(new|back) ([0-9]{1,15}) ([0-9a-f]{16}) (\S*) (\S*)$")


class Enrollments(Rules):
    """Exchanges a token for a host and its credential.

    Serials: a new host gets 1. A replay (the reply was lost, and the same token comes again with
    the same Idempotency-Key) gets the same credential, or one with the next serial. A re-enrollment
    gets a serial beyond all that can be valid: no older credential can be renewed past it, and none
    counts that was issued after the backup from which this database may have been restored.
    """

    def enroll(self, call: Call, now: int) -> Enrollment:
        """Enroll a host. values: token (the row, of a caller who proved its secret), hostname,
        name, facts (by column, '' if not given), idempotencyKey.

        Raises TokenRevoked, TokenUsed, TokenExpired, TokenHostMismatch, HostRevoked, HostUnknown.
        """
        token: Token = call.values["token"]
        try:
            return self._enroll(token, call, now)
        except Problem as problem:
            name, hostname = tagged_id("token", token.id), call.values["hostname"]
            problem.with_audit(name, name, token.organization_id, hostname=hostname)
            raise

    def _enroll(self, token: Token, call: Call, now: int) -> Enrollment:
        """The token's row was read before the tick. Only columns that never change are used from
        it. The guarded use_token() decides by its state; for a replay the row is read again."""
        text, address = call.values.get("idempotencyKey"), call.origin.address
        key = sha256(text) if text else None
        replayed = self._queries.replayed_host(token.id, key) if key else None
        if replayed is None:
            self._require_valid(token, now)
        else:
            self._require_replayable(self._queries.get(Token, token.id) or token, replayed, now)
        names = token.hostname or call.values["hostname"], call.values["hostname"]
        if len({name.lower().rstrip(".") for name in names}) > 1:  # compared as in RFC 4343
            raise TokenHostMismatch()
        if replayed is not None:
            kind = self._event_kind("replay", replayed, tagged_id("token", token.id))
            issued = self._registry.keys.issue_again(
                replayed, 0, kind, address, now, hostname=call.values["hostname"]
            )
            return Enrollment(replayed, issued, self._registry.heartbeats.interval_of(replayed))
        self._registry.engine.require_durable()
        if not self._queries.use_token(token.id, now, address):
            self._require_valid(self._queries.get(Token, token.id), now)
            raise TokenUsed()
        if token.host_id is None:
            return self._enroll_new(token, key, call, now)
        return self._enroll_again(token, key, call, now)

    @staticmethod
    def _require_valid(token: Optional[Token], now: int) -> None:
        refusals = {"revoked": TokenRevoked, "used": TokenUsed, "expired": TokenExpired}
        state = "used" if token is None else secret_state(token, now)
        if state in refusals:
            raise refusals[state]()

    def _require_replayable(self, token: Token, host: Host, now: int) -> None:
        """A lost reply may be requested again until its credential is used or the token expires:
        but for REPLAY_SHORTEST_MS after the enrollment at least, and REPLAY_LONGEST_MS at most."""
        is_revoked = token.revoked_at is not None or host.revoked_at is not None
        is_used = host.last_seen > 0 and host.serial >= host.admitted_serial
        end = max(token.expires_at, host.admitted_at + REPLAY_SHORTEST_MS)
        if is_revoked or is_used or now > min(end, host.admitted_at + REPLAY_LONGEST_MS):
            self._require_valid(token, now)
            raise TokenUsed("This Idempotency-Key has enrolled a host already: use another.")

    def _enroll_new(self, token: Token, key: Optional[bytes], call: Call, now: int) -> Enrollment:
        hostname, keys, address = call.values["hostname"], self._registry.keys, call.origin.address
        facts = dict(call.values["facts"])
        facts["every_seconds"] = facts["every_seconds"] or None
        host = Host(
            id=new_id(now), organization_id=token.organization_id, token_id=token.id,
            name=call.values.get("name", hostname), hostname=hostname,
            bound=int(token.hostname is not None), labels=token.labels, **facts,
            enrolled_at=now, enrolled_from=address, issued=1, issued_to=address, issued_at=now,
            admitted_by=token.id, admitted_at=now, admitted_serial=1, idempotency=key,
            twin_id=self._duplicate_of(token.organization_id, hostname, -1, now),
            key_number=keys.number_of(keys.keyring.first.kid, now), status_since=now,
            own_interval=token.own_interval, ephemeral=token.ephemeral,
        )  # fmt: skip
        issued, interval = keys.sign(host), self._registry.heartbeats.interval_of(host)
        host = host._replace(issued_hash=issued.hash(0), told_interval=interval)
        if not self._queries.add_host(host):
            return self._enroll_new(token, key, call, now)  # the id is taken
        actor = tagged_id("token", token.id)
        self._registry.reports.report([(host, PENDING, now)], actor, is_new=True)
        return self._enrolled("enroll", token, host, issued, call)

    def _enroll_again(self, token: Token, key: Optional[bytes], call: Call, now: int) -> Enrollment:
        host = self._queries.get(Host, token.host_id) if token.host_id is not None else None
        if host is None:
            raise HostUnknown()
        if host.revoked_at is not None:
            raise HostRevoked()
        facts = {"hostname": call.values["hostname"], **call.values["facts"]}
        changes = changed_facts(host, {name: fact for name, fact in facts.items() if fact != ""})
        owner, hostname = host.organization_id, changes.get("hostname", host.hostname)
        serial = max(host.issued, host.serial) + SERIALS_LOST + 1
        changes.update(
            issued=serial, admitted_by=token.id, admitted_at=now, admitted_serial=serial,
            idempotency=key, twin_id=self._duplicate_of(owner, hostname, host.id, now),
            instances="", copied_at=0, address_key=UNMATCHED,
            own_interval=token.own_interval or host.own_interval,
        )  # fmt: skip
        # The answer may be lost: then the host keeps its present interval.
        interval = self._registry.heartbeats.interval_of(host._replace(**changes))
        changes["told_interval"] = max(interval, host.told_interval)
        issued = self._registry.keys.issue(host, changes, 0, call.origin.address, now)
        return self._enrolled("re-enroll", token, host._replace(**changes), issued, call)

    def _duplicate_of(self, owner: str, hostname: str, excluded: int, now: int) -> Optional[int]:
        """The id of another host of an organization with a hostname, if it is online or pending."""
        candidates = self._queries.hosts_by_hostname(owner, hostname, DUPLICATES_EXAMINED)
        if not candidates:
            return None
        period = self._registry.service.period(now)
        for host in candidates:
            if period.status(*host.status_inputs) in ("pending", "online") and host.id != excluded:
                return host.id
        return None

    def _enrolled(
        self, action: str, token: Token, host: Host, issued: IssuedCredential, call: Call
    ) -> Enrollment:
        self._registry.metrics.tick["enrollments"] += 1
        self._record(
            action, tagged_id("token", token.id), host, hostname=call.values["hostname"],
            serial=host.issued if host.issued > 1 else None,
            sameHostnameAs=None if host.twin_id is None else id_text(host.twin_id),
        )  # fmt: skip
        return Enrollment(host, issued, self._registry.heartbeats.interval_of(host))


@lru_cache(maxsize=1024)
def interval_range(interval: int) -> tuple[int, int]:
    """The shortest interval that is drawn around one in seconds, and how many can be drawn."""
    shortest = -(-interval * (100 - HEARTBEAT_SPREAD) // 100)
    return shortest, interval * (100 + HEARTBEAT_SPREAD) // 100 - shortest + 1


@lru_cache(maxsize=HOPS_CACHED)
def address_key(address: str) -> int:
    """The number that stands for an address in heartbeats: an IPv4 address itself; 62 bits of the
    SHA-256 of an IPv6 address, as Origin spells it; 0 if the address is not known."""
    try:
        return int.from_bytes(map(int, address.split(".")), "big") if address else 0
    except ValueError:
        return int.from_bytes(sha256(address)[-8:], "big") & (LAST_ID >> 1)


class Heartbeats(Rules):
    """A host presents its credential, and its lastSeen advances.

    The plain heartbeats of a tick go in one statement, Queries.beat(), which also authorizes them.
    Some do not match because interval, address or state has changed: the rows of their hosts tell,
    and they are written together. The others are judged by accept(), one by one: the first use of a
    newer credential, a clock that went back, or a refusal. Heartbeats with facts, or with a renewal
    due, are calls: beat().

    Law: an interval is in the host's row before it is sent, because the status follows from the
    row. Plain heartbeats are answered from memory, so the statement compares that with the row.
    """

    def __init__(self, registry: Registry) -> None:
        super().__init__(registry)
        # The last interval sent to each host, if it is not the server's. It may be out of date,
        # because another server may have answered since. Then the statement does not match.
        self._intervals: dict[int, int] = {}
        self._usual_range = interval_range(registry.interval)

    def interval_of(self, host: Host) -> int:
        """The interval in seconds to send to a host."""
        return host.every_seconds or host.own_interval or self._registry.interval

    def next_interval(self, host: int) -> int:
        """Seconds until a host's next heartbeat, at random: a fleet must not beat all at once."""
        interval = self._intervals.get(host)
        shortest, choices = self._usual_range if interval is None else interval_range(interval)
        return shortest + int(random.random() * choices)

    def _remember(self, host: Host) -> int:
        """Remember the interval that is sent to a host from now on, and return it."""
        interval = self.interval_of(host)
        if interval == self._registry.interval:
            self._intervals.pop(host.id, None)
        else:
            self._intervals[host.id] = interval
        return interval

    def batch(self, beats: Sequence[Heartbeat], now: int) -> Sequence[Union[int, Problem]]:
        """lastSeen of each plain heartbeat, or its refusal."""
        kids = self._registry.keys.keyring.kids  # a key may have been retired since
        if len(self._intervals) >= CREDENTIALS_CACHED:  # now, not later: the answers need them
            self._intervals.clear()
        interval, usual = self._intervals.get, self._registry.interval
        rows: list[BeatRow] = [
            (now, now, host, ref.serial, interval(host, usual), address_key(origin.address), -now)
            for host, ref, origin in beats
            if ref.kid in kids
        ]
        counts = self._registry.metrics.tick
        if self._queries.beat(rows) == len(beats):
            counts["heartbeats"] += len(beats)
            return [now] * len(beats)
        # A query finds the rows that the statement matched: online, with this serial and lastSeen
        # now. After a heartbeat that did not match, later ones of the same host are judged too.
        origins = [origin for _, ref, origin in beats if ref.kid in kids]
        written = self._write_strays(rows, origins, now)
        strays: set[int] = set()
        outcomes: list[Union[int, Problem]] = []
        for host, credential, origin in beats:
            outcome: Union[int, Problem] = now
            is_written = (host, credential.serial) in written and credential.kid in kids
            if not is_written or host in strays:
                strays.add(host)
                self._registry.audit.origin = origin
                try:
                    outcome = self.accept(Heartbeat(host, credential, origin), now).last_seen
                except Problem as problem:
                    self._registry.refuse(problem, origin, now, in_tick=True)
                    outcome = problem
                except BadRow as error:
                    outcome = self._registry.unavailable(error, writes=False)
            outcomes.append(outcome)
        counts["heartbeats"] += sum(not isinstance(outcome, Problem) for outcome in outcomes)
        return outcomes

    def _write_strays(
        self, rows: list[BeatRow], origins: list[Origin], now: int
    ) -> set[tuple[int, ...]]:
        """Write those rows of a batch whose hosts get another interval, have moved or are back.
        Returns host and serial of all that are written. A new --heartbeat-interval or a new proxy
        brings the whole fleet here at once: hence few statements, and few events."""
        written = self._queries.beats_written(now, [row[2] for row in rows])
        strays = {row[2:4]: o for row, o in zip(rows, origins) if row[2:6] not in written}
        heard = [
            (self._with_address_key(host, origin, now), origin)
            for host in self._queries.hosts([host for host, _ in strays])
            if (origin := strays.get((host.id, host.serial)))
            and host.last_seen <= now
            and host.state != REVOKED
        ]
        self._write_addresses(heard, now)
        self._write_beats([host for host, _ in heard], now)
        return {row[:2] for row in written}.union((host.id, host.serial) for host, _ in heard)

    def _with_address_key(self, host: Host, origin: Origin, now: int) -> Host:
        """A host with the address_key that a heartbeat leaves. One that moves again soon is heard
        from any address for a while: else each of its heartbeats would take the general way."""
        is_other = origin.address not in ("", host.address) and host.moved_at > 0
        if 0 <= now - host.address_since < ADDRESS_KEPT_MS and (is_other or host.address_key < 0):
            return host._replace(address_key=-(host.address_since + ADDRESS_KEPT_MS))
        return host._replace(address_key=address_key(origin.address or host.address))

    def _write_addresses(self, heard: Sequence[tuple[Host, Origin]], now: int) -> None:
        """Write the new addresses of hosts, as _with_address_key() left them. The first known one
        is no event; further ones within an hour are summed up."""
        audit, rows = self._registry.audit, []
        for host, origin in heard:
            if origin.address in ("", host.address) or host.address_key < 0:
                continue
            is_due = host.address != "" and not 0 <= now - host.moved_at < HOUR * SECOND_MS
            limit = audit.refusals if is_due else audit.successes
            kind = "move", "server", "", host.organization_id, ""
            if host.address and limit.try_list(kind, is_full=not is_due):
                audit.origin = origin
                addresses = {"from": host.address, "to": origin.address}
                self._record("move", tagged_id("host", host.id), host, **addresses)
            rows.append((origin.address, now, now if is_due else host.moved_at, host.id))
        if rows:
            self._queries.set_addresses(rows)

    def _write_beats(self, hosts: Sequence[Host], last_seen: int) -> None:
        """Write accepted heartbeats, and report which hosts are back."""
        rows = [(last_seen, self._remember(host), host.address_key, host.id) for host in hosts]
        self._queries.write_beats(rows)
        returned = [host._replace(last_seen=last_seen) for host in hosts if host.state != ONLINE]
        if returned:
            self._registry.reports.report([(host, ONLINE, last_seen) for host in returned])

    def accept(self, beat: Heartbeat, now: int) -> Host:
        """Judge and write one heartbeat. Returns the host as it is then. Raises CredentialInvalid,
        HostUnknown, HostLost, CredentialSuperseded, HostRevoked."""
        number, (serial, owner, kid), origin = beat
        name = tagged_id("host", number)
        if kid not in self._registry.keys.keyring.kids:  # retired since the credential was verified
            raise CredentialInvalid()
        host = self._queries.get(Host, number)
        if host is None:
            feed = self._queries.feed()
            after = first_id(feed.lost_until - LOST_WAIT * SECOND_MS + 1)  # ids of later hosts
            is_lost = now < feed.lost_until and feed.newest_host < number < after
            raise (HostLost() if is_lost else HostUnknown()).with_audit(name, name, owner)
        if serial < host.serial:  # one of the two is a copy: the audit log has both addresses
            detail = {"serial": serial, "newest": host.serial, "newestIssuedTo": host.issued_to}
            raise CredentialSuperseded().with_audit(name, name, owner, **detail)
        if host.state == REVOKED:
            raise HostRevoked().with_audit(name, name, owner)
        # A serial beyond all that a restored backup can have lost was forged with a stolen key, and
        # no re-enrollment could exceed it.
        if serial > host.issued + SERIALS_LOST:
            raise CredentialInvalid().with_audit(name, name, owner)
        if serial > host.serial:  # the first use of a newer credential: older ones end here
            key_number = self._registry.keys.number_of(kid, now)
            self._queries.edit_host(host.id, {"serial": serial, "key_number": key_number})
            self._record("supersede", name, host, serial=serial, superseded=host.serial)
            host = host._replace(serial=serial, key_number=key_number)
        host = self._with_address_key(host, origin, now)
        self._write_addresses([(host, origin)], now)
        # lastSeen does not go back, unless a clock that was far ahead wrote it: else a host that
        # falls silent would be online until the clock gets there again.
        is_ahead = host.last_seen > now + CLOCK_SLACK * SECOND_MS
        last_seen = now if is_ahead else max(now, host.last_seen)
        self._write_beats([host], last_seen)
        return host._replace(last_seen=last_seen, state=ONLINE)

    def beat(self, call: Call, now: int) -> HeartbeatResult:
        """A heartbeat with facts, or with a credential that is due for renewal. values: claims,
        facts (by column), problem (of the body). Raises what accept() raises, then the problem."""
        claims, facts = call.values["claims"], dict(call.values.get("facts") or {})
        host = self.accept(heartbeat_of(claims, call.origin), now)
        if call.values.get("problem"):
            raise call.values["problem"]
        audit, keys, address = self._registry.audit, self._registry.keys, call.origin.address
        if "instances" in facts:
            self._judge_instance(host, facts, address, now)
        changes, issued = changed_facts(host, facts), None
        if changes:
            kind = self._event_kind("edit", host)
            if audit.successes.has_room(kind):
                self._registry.engine.require_durable()
            self._queries.edit_host(host.id, changes)
            host = host._replace(**changes)
            self._write_beats([host], host.last_seen)
            names = (re.sub("_(.)", lambda match: match[1].upper(), column) for column in changes)
            if audit.successes.try_list(kind):
                audit.record(*kind, facts=dict(zip(names, changes.values())))
        # A copy from before a re-enrollment is not renewed. The old credential is valid until the
        # new one is first used, so a lost reply locks no host out.
        if keys.is_due(claims, now) and claims.serial >= host.admitted_serial:
            kind = self._event_kind("renew", host)
            issued = keys.issue_again(host, claims.serial, kind, address, now)
        self._registry.metrics.tick["heartbeats"] += 1
        return HeartbeatResult(host.id, host.last_seen, issued, self.next_interval(host.id))

    def _judge_instance(self, host: Host, facts: dict[str, Any], address: str, now: int) -> None:
        """Take the instance out of facts, and judge it. Copies of a credential take turns, so their
        instances return; a machine that restarts has a new one. Does not wait for the disk."""
        instance, hostname = facts.pop("instances"), facts.get("hostname", host.hostname)
        seen = [Sighting(kind, int(at), *rest) for kind, at, *rest in _SEEN.findall(host.instances)]
        instances = list(dict.fromkeys(each.instance for each in seen))[:INSTANCES_KNOWN]
        if instances[:1] == [instance]:
            return
        kind = "back" if instance in instances else "new"
        seen.insert(0, Sighting(kind, now, instance, address, hostname))
        lines = [" ".join(map(str, each)) for each in seen[:SIGHTINGS_KEPT]]
        self._queries.edit_host(host.id, {"instances": "\n".join(lines)})
        recent = Counter(each.kind for each in seen if 0 <= now - each.at <= COPY_WINDOW_MS)
        is_copied = recent["back"] >= COPY_RETURNS or recent["new"] >= COPY_NEW
        if is_copied and self.note_copy(host.id, now):
            other = {"otherAddress": seen[1].address, "otherHostname": seen[1].hostname}
            self._record("clone", tagged_id("host", host.id), host, hostname=hostname, **other)

    def note_copy(self, number: int, now: int) -> bool:
        """Count a sign that a credential was copied. False if there was one within the hour."""
        is_first = self._queries.mark_copied(number, now)
        self._registry.metrics.tick["clones"] += is_first
        return is_first

    def is_plain(self, claims: Claims, facts: Mapping[str, Any], now: int) -> bool:
        """Before the tick: whether a heartbeat needs no renewal, and its facts (by column) change
        nothing. Raises StorageUnavailable."""
        if self._registry.keys.is_due(claims, now):
            return False
        if not facts:
            return True
        with self._registry.reading():
            host = self._queries.get(Host, claims.host)
        return host is None or not changed_facts(host, facts)


def is_within(address: str, network: Any) -> bool:
    """Whether a host's address is in a network. The column may hold any text, if it was forged."""
    with suppress(ValueError):
        return ipaddress.ip_address(address) in network
    return False


def _states_of(values: Mapping[str, Any]) -> set[int]:
    return {STATUS_NAMES.index(status) for status in values.get("status", STATUSES)}


def host_filter(values: Mapping[str, Any], now: int) -> Callable[[Host], bool]:
    """A function that says whether a list shows a host, by the values of Hosts.list()."""
    states = _states_of(values)
    text, network = values.get("q", "").casefold(), values.get("address")
    token = parse_id(values["token"]) if "token" in values else None
    older = values.get("olderSeconds", -LAST_ID) * SECOND_MS
    labels = [*values.get("label", ())]
    labels += [(key, value, not has_it) for key, value, has_it in values.get("label!", ())]

    def is_wanted(host: Host) -> bool:
        if host.state not in states or token not in (None, host.token_id):
            return False
        if now - host.status_since < older or (network and not is_within(host.address, network)):
            return False
        if labels and not has_labels(stored_object(host.labels), labels):
            return False
        return not text or text in _searched_text(host)

    return is_wanted


def _searched_text(host: Host) -> str:
    """The text in which q is searched for, a value a line: no query has an end of line."""
    names = host.name, host.hostname, id_text(host.id), host.address, host.os, host.architecture
    return "\n".join((*names, *map(str, stored_object(host.labels).values()))).casefold()


# The orders of a list of hosts, except enrolledAt: groups of states, one group after the other,
# each with the column that the group is ordered by.
ORDERS: Mapping[str, Sequence[tuple[Sequence[int], str]]] = {
    "attention": (
        *(((state,), "status_since") for state in (OFFLINE, MISSING, PENDING, REVOKED)),
        ((ONLINE,), "name"),
    ),
    "name": ((range(ONLINE, DELETED), "name"),),
    "statusSince": ((range(ONLINE, DELETED), "status_since"),),
}
# For each column its direction, and the position before all hosts: a value and an id.
WAYS: Mapping[str, Any] = {"name": ("ASC", "", -1), "status_since": ("DESC", LAST_ID, LAST_ID)}
HostPosition = tuple[int, Any, int]  # the number of its group, the value of the column, its id


class HostOrder:
    """An order of hosts for which there are indexes."""

    def __init__(self, queries: Queries, sort: str, shown: set[int]) -> None:
        """shown: the states that the list shows."""
        groups = [([s for s in states if s in shown], column) for states, column in ORDERS[sort]]
        self._queries, self._groups = queries, [group for group in groups if group[0]]
        start = 0, *WAYS[self._groups[0][1]][1:]
        self.order = Order(start, self._cursor, self._parse, self._position)

    def read(self, owner: Owner, position: HostPosition, limit: int) -> list[Host]:
        first, *after = position
        hosts: list[Host] = []
        for number, (states, column) in enumerate(self._groups[first:], first):
            way, *begin = WAYS[column]
            query = column, way, states, owner, after if number == first else begin
            hosts += self._queries.hosts_by(*query, limit - len(hosts))
            if len(hosts) == limit:
                break
        return hosts

    def _position(self, host: Host) -> HostPosition:
        number = next(n for n, (states, _) in enumerate(self._groups) if host.state in states)
        return number, getattr(host, self._groups[number][1]), host.id

    def _cursor(self, position: HostPosition) -> str:
        number, value, id = position
        key = value.encode().hex() if isinstance(value, str) else id_text(value)
        return f"{number}.{id_text(id)}.{key}"

    def _parse(self, cursor: str) -> HostPosition:
        number, id, key = cursor.split(".")
        is_name = self._groups[int(number)][1] == "name"
        if not is_name and not ID.fullmatch(key):
            raise ValueError
        value = bytes.fromhex(key).decode() if is_name else int(key, 16)
        return int(number), value, int(id, 16)


class Hosts(Rules):
    """The machines that have enrolled, as operators see and change them. Each change takes a
    reason, for the audit log."""

    def get(self, call: Call, now: int) -> HostView:
        """Raises NotFound."""
        return self._view(self._row_of(call, Host), self._registry.service.period(now), now)

    def _view(self, host: Host, period: ServicePeriod, now: int, reported: str = "") -> HostView:
        """reported: the status that lists show, so that rows agree with counts."""
        status, reason = period.status(*host.status_inputs), period.reason(*host.status_inputs)
        if reported not in ("", status):  # until the next sweep
            reason = f"Reported as {reported} at {rfc3339(host.status_since)}."
        title = TITLES.get(host.refused_code)
        if title and host.last_seen < host.refused_at >= (host.revoked_at or 0):
            ago = format_duration(max(0, now - host.refused_at) / SECOND_MS)
            reason += f" Its agent still calls; refused {ago} ago: {title}."
        view = HostView(host, reported or status, reason, [])
        other = None if host.twin_id is None else self._queries.get(Host, host.twin_id)
        if other is not None and other.revoked_at is None:
            view.warnings.append(
                f"host {id_text(other.id)} with the same hostname was online when this one "
                "enrolled: after a reinstallation delete the old record; else one is a clone"
            )
        if host.copied_at and now - host.copied_at < COPY_SHOWN_MS:
            view.warnings.append(
                f"more than one machine uses this credential, seen {rfc3339(host.copied_at)}: "
                "enroll each copy with its own token, and re-enroll this host to block the others"
            )
        return view

    def edit(self, call: Call, now: int) -> HostView:
        """values, any of: name, labels (with merges, changes of them), intervalSeconds (None: the
        server's), mutedUntil. Raises NotFound, InvalidBody."""
        host, changes, detail = self._row_of(call, Host), {}, {}
        for name in filter(call.values.__contains__, EDITED):
            column, value = EDITED[name], call.values[name]
            if name == "labels" and call.values.get("merges"):
                value = self._merged_labels(host, value)
            stored = json_text(value) if name == "labels" else value
            if name == "mutedUntil":
                stored = max(unix_ms(value), 0) if value else 0
            if stored != getattr(host, column):
                changes[column], detail[name] = stored, "none" if value is None else value
        if "own_interval" in changes:  # then the next heartbeat is answered with it
            changes["address_key"] = UNMATCHED
        if changes:
            self._queries.edit_host(host.id, changes)
            self._record("edit", call.by.name, host, **detail, reason=call.values.get("reason"))
        return self.get(call, now)

    @staticmethod
    def _merged_labels(host: Host, changes: Optional[Mapping[str, Any]]) -> dict[str, Any]:
        """A host's labels after changes. By RFC 7396, None as a value removes one label, and None
        as changes removes all."""
        both = {} if changes is None else {**stored_object(host.labels), **changes}
        labels = {key: value for key, value in both.items() if value is not None}
        if len(labels) > Labels.COUNT:
            detail = f"would be {len(labels)} of host {id_text(host.id)}, more than {Labels.COUNT}"
            raise InvalidBody(errors=[FieldError("labels", detail)])
        return labels

    def revoke(self, call: Call, now: int) -> HostView:
        """Block a host: its next heartbeat is refused. Idempotent. Raises NotFound."""
        return self._set_block("revoke", now, call, now)

    def restore(self, call: Call, now: int) -> HostView:
        """Accept a host again, with the credential that it has. Idempotent. Raises NotFound."""
        return self._set_block("restore", None, call, now)

    def _set_block(self, action: str, revoked_at: Optional[int], call: Call, now: int) -> HostView:
        host = self._row_of(call, Host)
        if (host.revoked_at is None) != (revoked_at is None):
            times = {"revoked_at": revoked_at, "restored_at": 0 if revoked_at else now}
            self._queries.edit_host(host.id, times)
            period = self._registry.service.period(now)
            status = period.status(host.last_seen, revoked_at, host.told_interval)
            state = STATUS_NAMES.index(status)
            self._registry.reports.report([(host, state, now)], call.by.name)
            self._record(action, call.by.name, host, reason=call.values.get("reason"))
        return self.get(call, now)

    def delete(self, call: Call, now: int, action: str = "delete") -> DeletedHost:
        """Also revoke the tokens bound to the host. Raises NotFound, also the second time."""
        host, reason = self._row_of(call, Host), call.values.get("reason")
        self._registry.reports.report([(host, DELETED, now)], call.by.name)
        self._queries.delete_host(host.id, now)
        self._record(action, call.by.name, host, hostname=host.hostname, reason=reason)
        token = self._queries.get(Token, host.admitted_by)
        is_good = token is not None and secret_state(token, now) == "valid"
        return DeletedHost(host, token if is_good else None)

    def act(self, call: Call, now: int) -> BulkResult:
        """Run an act above on many hosts; if it is refused for one of them, on none. values:
        action, hosts (ids or Named), those of edit() with labels as changes. Raises InvalidBody,
        Conflict."""
        act, not_found = getattr(self, call.values["action"]), []
        if act != self.edit and any(name in call.values for name in EDITED):
            raise InvalidBody("Only the action edit takes labels, intervalSeconds and mutedUntil.")
        host_call = call._replace(values={**call.values, "merges": True})
        hosts: dict[int, None] = {}
        for host in call.values["hosts"]:  # find all first: without one, its name may match another
            named = host if isinstance(host, Named) else Named(Host, host, False)
            try:
                hosts[self._registry.names.find(call.by.organization, named).id] = None
            except NotFound:
                not_found.append(named.word)
        for number in hosts:
            act(host_call._replace(id=number), now)
        return BulkResult(len(hosts), not_found)

    def census(self, owner: Owner) -> Counter[tuple[str, str]]:
        """How many hosts each organization in sight has in each status, as reported."""
        rows = self._queries.census(owner)
        return Counter({(slug, STATUS_NAMES[state]): hosts for slug, state, hosts in rows})

    def list(self, call: Call, now: int) -> Any:
        """A page of hosts; the call while incidents are searched. values: organization, status (one
        or more), address (a network), q, label (values of a LabelFilter), label! (the opposite),
        token, signingKey, olderSeconds (since its status began), incident, named, sort (of ORDERS,
        or enrolledAt). Raises InvalidQuery, NotFound."""
        values, queries = call.values, self._queries
        period, is_wanted = self._registry.service.period(now), host_filter(values, now)
        incident, incidents = values.get("incident"), Page([])
        if incident:
            incidents = self._registry.incidents.list(call, now)
            if incidents is call:
                return call
        members = {host for one in incidents.items if one.id == incident for host in one.hosts}

        owner, kid = self._scope(call, InvalidQuery, "organization"), values.get("signingKey")
        key = queries.signing_key_number(kid) or 0 if kid else None  # no key has 0

        def view(host: Host) -> Optional[HostView]:
            if not is_wanted(host) or (incident and host.id not in members):
                return None
            if key not in (None, host.key_number):
                return None
            return self._view(host, period, now, STATUS_NAMES[host.state])

        order, sort = NEWEST, values.get("sort", "enrolledAt")
        read: Callable[[Owner, Any, int], Sequence[Any]] = self._reader(Host, call)
        if "named" in values:
            sort = "enrolledAt"
        elif "token" in values:
            token = self._owned_id(Host, owner, "token_id", values["token"])
            read = lambda _, *page: queries.newest(Host, None, *page, token_id=token)  # noqa: E731
        elif key is not None and owner is ALL_ORGANIZATIONS:  # else all may be of others
            read = partial(queries.hosts_of_key, key)
        if sort != "enrolledAt":
            sorted_hosts = HostOrder(queries, sort, _states_of(values))
            read, order = sorted_hosts.read, sorted_hosts.order
        page = self._page(call, read, view, order=order)
        counts = Counter(dict.fromkeys(STATUSES, 0))
        for _, state, hosts in queries.census(owner):
            counts[STATUS_NAMES[state]] += hosts
        return page._replace(more={"counts": counts})


class Expiry(Rules):
    """Deletes hosts that have been silent for too long: those of ephemeral tokens, and with serve
    --expire-missing all others. They were reported as silent by then, and no pause of the servers
    counts, as in their status. A cut cable must not delete a fleet: when too many others of an
    organization expire in a day, the rest stay until an operator allows it for a day. The
    organization's row says so, for all servers."""

    FIRST = -1, -1  # the position before all hosts

    def __init__(self, registry: Registry) -> None:
        super().__init__(registry)
        self._began = 0  # when this server first looked, in Unix ms
        self._after = self.FIRST  # that of the last host examined: status_since and id

    def run(self, call: Call, now: int) -> float:
        """Examine EXPIRED_AT_ONCE silent hosts. Returns the seconds until the next are due."""
        service, quotas = self._queries.service(), dict[str, int]()
        self._began = min(self._began or now, now)
        began = max(self._began, service.started) if service else now
        if not is_served(service, now) or now - began < EXPIRY_CALM_MS:
            return ALIVE_EVERY  # live hosts may not have been heard yet
        after, period = self._after, ServicePeriod(service, now)
        silent = "status_since", "ASC", (PENDING, OFFLINE, MISSING), ALL_ORGANIZATIONS
        hosts = self._queries.hosts_by(*silent, after, EXPIRED_AT_ONCE)
        host_call = call._replace(by=SYSTEM._replace(name="expire"))
        for host in hosts:
            after = host.status_since, host.id
            since = max(host.last_seen, host.admitted_at, host.restored_at)
            silence, _ = period.silence_ms(since, host.told_interval)
            limit = host.ephemeral or self._registry.expire_missing or LAST_SECOND
            is_due = silence > max(limit, EXPIRY_INTERVALS * host.told_interval) * SECOND_MS
            if is_due and (host.ephemeral or self._may_expire(host.organization_id, quotas, now)):
                self._registry.engine.require_durable()  # before this rule remembers anything
                self._registry.hosts.delete(host_call._replace(id=host.id), now, "expire")
        has_more = len(hosts) == EXPIRED_AT_ONCE
        self._after = after if has_more else self.FIRST
        return EXPIRY_REST if has_more else ALIVE_EVERY

    def _may_expire(self, owner: str, quotas: dict[str, int], now: int) -> bool:
        """Whether one more host of an organization may expire. quotas: how many still may."""
        quotas[owner] = (quotas[owner] if owner in quotas else self._quota(owner, now)) - 1
        if quotas[owner] == -1:
            log.warning("too many hosts of %s expired in a day: run expire-hosts --force", owner)
            self._queries.set_expiry(owner, now)
        return quotas[owner] >= 0

    def _quota(self, owner: str, now: int) -> int:
        """How many hosts of an organization may expire now; -1 if it is stopped."""
        row, day = self._queries.get(Organization, owner), DAY * SECOND_MS
        if row is None or row.expiry > 0:
            return -1
        if 0 <= now + row.expiry < day:
            return EXPIRED_AT_ONCE
        expired = self._queries.expired(owner, now - day)
        hosts = expired + sum(self._registry.hosts.census(owner).values())
        return max(0, max(EXPIRED_FREELY, hosts // EXPIRED_SHARE) - expired)

    def force(self, call: Call, now: int) -> BulkResult:
        """Let any number of hosts expire for a day. values: organization. Raises InvalidQuery."""
        owner = self._scope(call, InvalidQuery, "organization")
        self._registry.audit.record("allow-expiry", call.by.name, "", owner)
        return BulkResult(self._queries.set_expiry(owner, -now), [])


# The registry.
#
# Theory of operation: the tick. run() runs all calls that have arrived in one transaction, which
# waits for the disk once if any of them is durable. If a rule finds that the transaction must be
# durable and is not, it is rolled back and run again. Heartbeats go first, in one statement; then
# each call, in a savepoint if it may write: a refused call is undone, and the others stand.
#
# If the database fails, the whole transaction is dead: SQLite may have rolled it back, and one more
# statement would be committed by itself. So every answer of the tick becomes 503, also that of a
# read, which may have seen rows that are gone. If another process holds the write lock, run()
# returns None: call it again. A defect in a rule gives that call 500. What cannot pass by itself
# (Unrecoverable, no memory) is not caught: nothing is rolled back or closed, and the process ends.


class Registry:
    """The nouns of a database and its key file, and the transactions in which their rules run."""

    def __init__(
        self, engine: Engine, key_file: KeyFile, keyring: Keyring, *,
        interval: int = HEARTBEAT_INTERVAL, credential_ttl: Optional[int] = None,
        audit_keep: Optional[int] = None, changes_keep: int = CHANGES_KEPT,
        expire_missing: Optional[int] = None,
    ) -> None:  # fmt: skip
        """All in seconds. None: neither credentials nor hosts expire; events are kept for ever."""
        self.engine = engine
        self.interval, self.expire_missing = interval, expire_missing
        self.queries = Queries(engine)
        self.metrics = Metrics()
        self.failures = FailedAuthLimiter()
        self.names = Names(self)
        self.audit = AuditLog(self, audit_keep)
        self.keys = SigningKeys(self, key_file, keyring, credential_ttl)
        self.service = ServiceRecord(self)
        self.reports = Reports(self, changes_keep)
        self.incidents = IncidentLog(self)
        self.organizations = Organizations(self)
        self.api_keys = ApiKeys(self)
        self.tokens = Tokens(self)
        self.enrollments = Enrollments(self)
        self.heartbeats = Heartbeats(self)
        self.hosts = Hosts(self)
        self.expiry = Expiry(self)
        self.inventories: WeakSet[Any] = WeakSet()  # those that are being made
        self.storage_trouble = ""  # why the last tick that was to write failed; '' if it succeeded
        self._logged: set[str] = set()  # troubles that were logged: each once, not in every tick
        self._failed_at = 0.0
        self._next_checkpoint = 0.0  # while there is trouble

    def run(self, calls: Sequence[Work], now: int, durable: bool = False) -> Optional[list[Any]]:
        """Run calls in one transaction. Returns the outcome of each, in order, all committed: the
        value of its rule, or the Problem (for a command also the OperatorError) that refuses it.
        None if another writer is at work: call it again with the same calls, or stop_waiting()."""
        requests = [call for call in calls if isinstance(call, Call)]
        beats = [call for call in calls if isinstance(call, Heartbeat)] if requests else calls
        writes = bool(beats) or any(call.operation.writes for call in requests)
        durable |= any(call.operation.writes and call.operation.durable for call in requests)
        durable |= writes and self.reports.are_many
        try:
            if not self.engine.begin(writes, durable):
                return None
            if requests:
                self.keys.reload_if_changed()
            if writes:
                self.audit.begin(now)
            outcomes: list[Any] = []
            if beats:
                outcomes += self.heartbeats.batch(cast("Sequence[Heartbeat]", beats), now)
            if requests:
                beat_outcomes = iter(outcomes)
                outcomes = [
                    self._run_one(call, now) if isinstance(call, Call) else next(beat_outcomes)
                    for call in calls
                ]
            self._commit(writes)
        except NotDurable:
            self._roll_back()
            return self.run(calls, now, durable=True)
        except StoreError as error:
            self._roll_back()
            return [self.unavailable(error, writes)] * len(calls)
        except (Unrecoverable, MemoryError):
            raise
        except BaseException as error:
            self._roll_back()
            if isinstance(error, Exception):
                self._note_failure(f"a defect: {type(error).__name__}", writes)
            raise
        return outcomes

    def _run_one(self, call: Call, now: int) -> Any:
        """The outcome of one call of the tick."""
        self.audit.origin = call.origin
        marks = len(self.audit.events), len(self.reports.changes)
        writes = call.operation.writes
        if writes:
            self.engine.savepoint()
        try:
            if call.by.id >= 0:
                self.api_keys.require_live(call.by, now)
            if call.named is not None:
                call = call._replace(id=self.names.find(call.by.organization, call.named).id)
            outcome = call.operation.run(self, call, now)
        except BadRow as error:  # this call fails, and not the tick
            outcome = self.unavailable(error, writes=False)
        except (StoreError, MemoryError):
            raise
        except (Problem, OperatorError) as error:
            outcome = error
            if isinstance(error, OperatorError) and call.by is SYSTEM:
                log.error("%s", error, extra={"request": call.origin.request})
        except Exception:
            log.exception("a call failed", extra={"request": call.origin.request})
            outcome = Internal()
        if writes:
            self.engine.end_savepoint(keeps=not isinstance(outcome, Exception))
        if isinstance(outcome, Exception):
            del self.audit.events[marks[0] :], self.reports.changes[marks[1] :]
        if isinstance(outcome, Problem):
            self.refuse(outcome, call.origin, now, in_tick=writes)
        return outcome

    def refuse(self, problem: Problem, origin: Origin, now: int, in_tick: bool) -> None:
        """Record that a call was refused. Its writes are undone already."""
        self.audit.refuse(problem, origin, now, in_tick)
        if isinstance(problem, CredentialSuperseded):
            self.heartbeats.note_copy(parse_id(problem.subject.partition(":")[2]), now)

    def _commit(self, writes: bool) -> None:
        if not writes:
            self.engine.commit()
            return
        self.reports.write()
        self.audit.write(self.keys.keyring)
        started = time.perf_counter()
        has_written = self.engine.commit()
        self.metrics.commits.observe(time.perf_counter() - started)
        self.metrics.counts.update(self.metrics.tick)
        self.metrics.tick.clear()
        self.reports.end_tick(is_committed=True)
        self.audit.log_events()
        if has_written:  # a commit of nothing succeeds on a full disk, too
            self.storage_trouble = ""
        # On a disk that is nearly full some ticks succeed, and others fail.
        if self._logged and time.monotonic() - self._failed_at > TROUBLE_OVER:
            self._logged.clear()
            log.info("storage: the database can be used again")

    def _roll_back(self) -> None:
        self.engine.rollback()
        self.audit.roll_back()
        self.reports.end_tick(is_committed=False)
        self.service.ready_at = -1  # nothing was written
        self.metrics.tick.clear()

    def _note_failure(self, trouble: str, writes: bool) -> None:
        if trouble not in self._logged:
            log.error("storage: %s", trouble)
            self._logged.add(trouble)
        self._failed_at = time.monotonic()
        if writes:
            self.storage_trouble = trouble

    def unavailable(self, error: StoreError, writes: bool) -> Problem:
        """The refusal of calls if the database failed. Raises Unrecoverable if it was migrated."""
        with suppress(StoreError):
            self.engine.require_our_schema()
        self._note_failure(str(error), writes)
        problem = StorageUnavailable()
        problem.__cause__ = error
        return problem

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Surrounds a look-up outside of a tick. Raises StorageUnavailable."""
        try:
            self.engine.require_unchanged(durable=False)
            yield
        except StoreError as error:
            raise self.unavailable(error, writes=False) from error

    def perform(self, call: Call, now: int) -> Any:
        """Run one call, in as many ticks as it needs, and return its value. Each tick waits up to
        LOCK_PATIENCE seconds for other writers. Raises the Problem or OperatorError."""
        outcome: Any = call
        while isinstance(outcome, Call):
            deadline = time.monotonic() + LOCK_PATIENCE
            while (outcomes := self.run([outcome], now)) is None:
                if time.monotonic() > deadline:
                    raise self.stop_waiting()
                time.sleep(LOCK_POLL)
            outcome = outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def stop_waiting(self) -> Problem:
        """Stop waiting for another writer. Returns the refusal of the calls that waited."""
        return self.unavailable(self.engine.stop_waiting(), writes=True)

    def reload_changed_keys(self) -> None:
        """Between ticks: use the keys as other processes have changed them."""
        with suppress(StoreError):  # the tick fails, too
            self.keys.reload_if_changed()

    def feed_ends(self) -> tuple[int, int]:
        """Between ticks: the numbers of the last change and the last event."""
        with suppress(StoreError):
            return self.queries.feed_ends()
        return -1, -1  # then waiting reads run again, and fail

    def after_tick(self) -> None:
        """Between ticks: a checkpoint. No answer waits for it. It may make room on a full disk."""
        if not self.storage_trouble:
            self.engine.checkpoint()
        elif time.monotonic() >= self._next_checkpoint:
            self._next_checkpoint = time.monotonic() + TROUBLE_PAUSE
            self.engine.checkpoint(is_forced=True)

    def housekeeping(self, now: int) -> float:
        """The call that a server makes every ALIVE_EVERY seconds. Returns the seconds until the
        next: 0 while there is more to prune, to keep pace with any load. Raises Unrecoverable."""
        self.engine.require_unchanged(durable=True)
        self.engine.require_our_schema()
        self.service.keep_alive(now)
        self.service.watch_certificate(now)
        self.api_keys.record_uses()
        self.keys.reload()
        self.keys.record_trouble()
        if not self.keys.file.trouble:
            self.keys.sync_kids("key-file", now)
        self.incidents.forget(now)
        has_more = [self.queries.prune_tokens(now - TOKEN_KEPT * SECOND_MS)]
        has_more += self.reports.prune(now), self.audit.prune(self.keys.keyring, now)
        return 0 if any(has_more) else ALIVE_EVERY

    def copies_in(self, folder: str) -> list[str]:
        """The paths of database and key file in a backup that is in this folder."""
        sources = self.engine.path, os.path.realpath(self.keys.file.path)
        return [os.path.join(folder, os.path.basename(path)) for path in sources]

    def backup(self, folder: str, progress: Progress = no_progress,
               parent: Optional[Folder] = None) -> tuple[str, str]:  # fmt: skip
        """Copy database and key file into a folder, whole or not at all; returns their paths. It
        must have no database in use and no other fleet's files. Raises OperatorError,
        StoreError."""
        with closing(Folder(folder, parent)) as copies:
            names, (database, key_file) = self.copies_in(""), self.copies_in(copies.path)
            sources = self.engine.path, os.path.realpath(self.keys.file.path)
            if {database, key_file}.intersection(sources) or os.path.exists(f"{database}-wal"):
                raise OperatorError(f"{copies.path} has a database in use: name another folder")
            if database == key_file:
                raise OperatorError("database and key file have the same name: rename one")
            lock_for_backup(copies)
            if os.path.lexists(database) or os.path.lexists(key_file):
                self.keys_of_backup(copies.path)
            self._copy_pair(copies, names, progress)
        return database, key_file

    def keys_of_backup(self, folder: str) -> Keyring:
        """The keys of a backup. Raises OperatorError if it is of another fleet: the audit key of a
        fleet never changes."""
        with suppress(OperatorError):
            keyring = load_keyring(self.copies_in(folder)[1], self.engine.path)
            if equal_secrets(keyring.audit_key, self.keys.keyring.audit_key):
                return keyring
        raise OperatorError(f"{folder} has other files of these names: name another folder")

    def _copy_pair(self, copies: Folder, names: Sequence[str], progress: Progress) -> None:
        """The key file is read last, so that it has the keys that the copy of the database knows.
        Both are renamed into place when they are on the disk. They are ours, whatever they
        replace."""
        with copies.replacing(names[0]) as copy:

            def pause(done: int, total: int) -> None:
                progress(done, total)
                os.fdatasync(copy.fileno())  # one sync at the end would delay all others
                time.sleep(BACKUP_PAUSE)

            self.engine.begin(writes=False, durable=False)
            try:
                kids = self.queries.kids()  # the schema may be an older one
                self.engine.copy_to(copy, pause)
            finally:
                self.engine.rollback()
            with self.engine.opened_copy(copy) as opened:
                if opened.version() == SCHEMA_VERSION:
                    Queries(opened).begin_history()
            os.fsync(copy.fileno())
            keyring = self.keys.file.load()
            if not kids.intersection(keyring.kids):
                raise OperatorError("all keys were retired during the backup: back up again")
            with copies.replacing(names[1]) as file:
                file.write(keyring.jwk_set())

    def close(self) -> None:
        self.engine.close()


# Calls of the program itself. Values: url of START_SERVICE, restarts_audit of SYNC_KIDS.
# fmt: off
HOUSEKEEPING = InternalRule(lambda registry, call, now: registry.housekeeping(now))
SWEEP = InternalRule(lambda registry, call, now: registry.reports.sweep(now))
EXPIRE = InternalRule(lambda registry, call, now: registry.expiry.run(call, now))
WRITE_REFUSALS = InternalRule(lambda registry, call, now: None)  # as every tick that writes does
FINAL_AUDIT_FLUSH = InternalRule(lambda registry, call, now: registry.audit.end_periods(now, True))
START_SERVICE = InternalRule(
    lambda registry, call, now: registry.service.start(**call.values, now=now), durable=True)
KNOWN_KIDS = InternalRule(
    lambda registry, call, now: registry.queries.kids(with_retired=False), writes=False)
SYNC_KIDS = InternalRule(
    lambda registry, call, now: registry.keys.sync_kids("key-file", now, **call.values),
    durable=True)
REDO_AFTER_RESTORE = InternalRule(
    lambda registry, call, now: registry.reports.redo_after_restore(call, now), durable=True)
ACCEPT_HISTORY = InternalRule(
    lambda registry, call, now: registry.reports.accept_history(call, now), durable=True)
# fmt: on
# The calls that a server repeats: seconds until the first. Each returns those until the next.
RECURRING = {HOUSEKEEPING: 0, SWEEP: SWEEP_REST, EXPIRE: ALIVE_EVERY}


# Opening a database and its key file.


def open_registry(
    database: str, key_file: str, now: int, *, init: bool = False, purpose: str = "serve",
    **options: Any,
) -> Registry:  # fmt: skip
    """The registry of a database and its key file. Options are those of Registry.

    purpose  a database of an older schema            one whose schema was altered
    serve    is brought up to ours, after a copy      is refused
    act      is refused, and not touched              is refused
    read     is refused, and not touched              gives a warning
    copy     is taken as it is                        gives a warning

    database  key file
    there     there     they must know each other, or init adopts the keys
    there     missing   refused: it would refuse its whole fleet; init makes new keys
    missing   there     refused: a database that vanished must not come back empty and tell its
                        fleet that it is unknown; init makes a new database
    missing   missing   both are made

    An empty database file counts as missing. Raises OperatorError, StoreError, StorageUnavailable.
    """
    engine = Engine(database)
    if purpose not in ("serve", "copy") and not os.path.exists(f"{engine.path}-journal"):
        with closing(Engine(database)) as probe:  # opening it to write would make and move files
            if probe.file_sizes()[0] > 0 and probe.open(as_it_is=True):
                _require_our_version(probe)
    try:
        engine.lock.acquire(LOCK_PATIENCE)
        keys = KeyFile(key_file, engine.path)
        keyring, is_adopted = _open_pair(engine, keys, init, purpose, now)
        engine.lock.release()
        registry = Registry(engine, keys, keyring, **options)
        if engine.version() < SCHEMA_VERSION or engine.schema_fault:  # opened to read
            return registry
        if is_adopted or registry.perform(Call(KNOWN_KIDS), now) != set(registry.keys.keyring.kids):
            registry.perform(Call(SYNC_KIDS, values={"restarts_audit": is_adopted}), now)
        return registry
    except (Unrecoverable, MemoryError):
        raise
    except BaseException:
        engine.rollback()
        engine.close()
        raise


def _require_our_version(engine: Engine) -> None:
    version = engine.version()
    if version < SCHEMA_VERSION:
        raise OperatorError(f"{engine.path} has schema {version}: run serve of this version once")


def _open_pair(
    engine: Engine, keys: KeyFile, init: bool, purpose: str, now: int
) -> tuple[Keyring, bool]:
    """With the lock held: open or make both. Returns the keys, and whether to adopt them."""
    database, key_file = engine.path, keys.path
    has_database = engine.file_sizes()[0] > 0 and engine.open()
    if not has_database and (remedy := how_to_continue(database)):
        raise OperatorError(remedy)
    if has_database and purpose not in ("serve", "copy"):
        _require_our_version(engine)
    if has_database:
        engine.compare_schema(refuses=purpose not in ("read", "copy"))
    has_keys = os.path.exists(key_file)
    if not init:
        _require_both_or_none(database, key_file, has_database, has_keys)
    keyring = keys.load() if has_keys else new_keyring()
    if not has_database:
        _make_database(engine, keys, keyring, not has_keys, now)
        return keyring, False
    is_adopted = not is_pair(engine, keyring)
    if is_adopted and not init:
        raise OperatorError(
            f"{key_file} is not the key file of the database {database}: restore the pair from one "
            "backup, or use these keys with serve --init (every host must re-enroll)"
        )
    if purpose == "serve" and engine.version() < SCHEMA_VERSION:
        engine.require_alone(LOCK_PATIENCE)
        _copy_older(engine)

        def finish(older: int) -> None:
            # With adopted keys the log begins again: they cannot verify the old one.
            if not is_adopted:
                begin_audit_format(Queries(engine), keyring, now, older)
            begin_feed(Queries(engine), now)

        engine.migrate(finish)
    if is_adopted and is_served(Queries(engine).service(), now):
        # That server would use its keys until it reads the new ones.
        raise OperatorError(f"a server is running on {database}: stop it, and wait 30 s")
    if not has_keys:
        keys.replace(keyring)
        log.warning("made new keys for %s: every host must re-enroll", database)
    return keyring, is_adopted


def _require_both_or_none(database: str, key_file: str, has_database: bool, has_keys: bool) -> None:
    if has_database and not has_keys:
        raise OperatorError(
            f"there is a database {database} but no key file {key_file}: restore the key file "
            "from a backup, or make new keys with serve --init (every host must re-enroll)"
        )
    if has_keys and not has_database:
        raise OperatorError(
            f"there is a key file {key_file} but no database {database}: restore the database "
            "from a backup, name other files with --db and --key-file, or make a new database for "
            "these keys with serve --init"
        )


def _copy_older(engine: Engine) -> None:
    """Before a migration, copy the database to a file named by its schema, for the older program;
    if the disk is short, migrate without. Raises OperatorError, StoreError."""
    path, room = f"{engine.path}.schema{engine.version()}", 2 * sum(engine.file_sizes())
    try:
        if shutil.disk_usage(os.path.dirname(path)).free < room:  # for copy and migration
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with replacing(path, os.stat(engine.path)) as copy:
            os.fchmod(copy.fileno(), PRIVATE_MODE)
            engine.copy_to(copy, no_progress)
        log.info("copied the database to %s, to go back to the older version", path)
    except (OSError, StoreError) as error:
        text = str(error) if isinstance(error, StoreError) else describe_error(path, error)
        if not text.endswith(ROOM):
            raise StoreError(f"no copy before the migration: {text}") from error
        log.warning("the migration continues without a copy of the old database: %s", text)


def _make_database(engine: Engine, keys: KeyFile, keyring: Keyring, is_new: bool, now: int) -> None:
    """Make the key file first, so that no database is ever without its keys. If the database then
    cannot be made, remove new keys again: nothing knows them."""
    if is_new:
        keys.replace(keyring)
    try:
        engine.open()
        if not engine.begin(writes=True, durable=True):
            raise engine.stop_waiting()
        engine.create_schema()
        queries = Queries(engine)
        queries.add(Organization(DEFAULT_ORGANIZATION, now))
        queries.begin_history()
        for kid in keyring.kids:
            queries.add_signing_key(kid, now)
        engine.commit()
    except (Unrecoverable, MemoryError):
        raise
    except BaseException:
        if is_new:
            keys.remove()
        raise


def is_pair(engine: Engine, keyring: Keyring) -> bool:
    """Whether database and keyring belong together: they share a key; or, if all were retired since
    the database was backed up, the audit key verifies its last event. Raises StoreError."""
    queries = Queries(engine)
    if any(queries.signing_key_number(kid) is not None for kid in keyring.kids):
        return True
    has_log = engine.version() >= AUDITED_SINCE
    events = queries.newest(Event, None, LAST_ID, 2) if has_log else []
    if not events:
        return False
    anchor = queries.anchor()
    previous = events[1].mac if len(events) == 2 else anchor.mac if anchor else b""
    if not isinstance(previous, bytes):  # it was forged
        return False
    record = audit_record(events[0].legible()[:-1])
    macs = keyring.audit_mac(b"event", record, previous), keyring.old_audit_mac(record, previous)
    return events[0].mac in macs


# Folders of backups: theory of operation.
#
# Each backup is a folder, named by its time. It is made and removed under another name, so what a
# killed run leaves is not taken for a backup, and the next run removes it. Only whole backups of
# this fleet that belong to the user who runs this are counted and removed: a damaged one does not
# take the place of a good one. What is dated after the new one is removed first.

BACKUP_NAME = re.compile("[0-9]{4}(-[0-9]{2}){2}T[0-9]{6}[.][0-9]{3}Z")  # they sort by time


def lock_for_backup(folder: Folder) -> None:
    """Lock a folder until it is closed. Raises OperatorError if anybody may replace what is in it,
    and StoreBusy while another process has locked it."""
    if is_open_to_all(folder.descriptor):
        raise OperatorError(OPEN_TO_ALL.format(folder.path, "name another folder"))
    if not try_flock(folder.descriptor):
        raise StoreBusy(f"another backup into {folder.path} is running")


@contextmanager
def checked_folder(parent: Folder, name: str, files: Sequence[str]) -> Iterator[Folder]:
    """Open a folder in another that holds only these files, or parts of them. Raises OSError, also
    for a link, and OperatorError if another user owns it or it has other files, as links."""
    with closing(Folder(name, parent)) as folder:
        names = os.listdir(folder.descriptor)
        is_own = {file.removesuffix(".tmp") for file in names}.issubset(files)
        is_own &= all(stat.S_ISREG(folder.status(file).st_mode) for file in names)
        if os.fstat(folder.descriptor).st_uid != os.geteuid() or not is_own:
            raise OperatorError(f"{folder.path} is another user's, or has other files: move it")
        yield folder


def remove_folder(parent: Folder, name: str, files: Sequence[str]) -> None:
    """Remove a folder that holds only these files, or parts of them. Idempotent."""
    with suppress(FileNotFoundError), checked_folder(parent, name, files) as folder:
        for file in os.listdir(folder.descriptor):
            folder.remove(file)
        os.rmdir(name, dir_fd=parent.descriptor)


class Backups(NamedTuple):
    """The backups of a fleet in a folder."""

    registry: Registry
    folder: Folder

    def add(self, keep: int, now: int, progress: Progress) -> list[str]:
        """Make a backup, then remove the oldest of more than keep. Returns the path of the new one
        and those of the removed ones. Raises OperatorError, StoreError, OSError."""
        lock_for_backup(self.folder)
        at, name = self.folder.descriptor, rfc3339(now).replace(":", "")
        unfinished = f"{self.registry.copies_in('')[0]}.unfinished"
        rename = partial(os.rename, src_dir_fd=at, dst_dir_fd=at)
        remove = partial(remove_folder, self.folder, unfinished, self.registry.copies_in(""))
        remove()
        os.mkdir(unfinished, 0o700, dir_fd=at)
        try:
            pair = self.registry.backup(unfinished, progress, self.folder)
            require_sound(*pair, now, self.registry.engine.path)
            rename(unfinished, name)
            os.fsync(at)
        except BaseException:
            with suppress(OSError, OperatorError):  # the first error tells more
                remove()
            raise
        names = filter(BACKUP_NAME.fullmatch, os.listdir(at))
        others = sorted(filter(self._is_whole, {*names} - {name}), key=lambda it: (it < name, it))
        removed = others[: max(0, len(others) + 1 - keep)]
        for backup in removed:
            rename(backup, unfinished)
            remove()
        return [os.path.join(self.folder.path, backup) for backup in (name, *removed)]

    def _is_whole(self, name: str) -> bool:
        with suppress(OSError, OperatorError, StoreError):
            with checked_folder(self.folder, name, self.registry.copies_in("")) as folder:
                keyring = self.registry.keys_of_backup(folder.path)
            with closing(Engine(self.registry.copies_in(folder.path)[0])) as engine:
                return engine.open(as_it_is=True) and is_pair(engine, keyring)
        return False


# Restoring a backup: theory of operation.
#
# Servers share a lock for their lives, and a restore takes it alone. In WAL mode each connection
# holds a lock of SQLite on the database: if we can leave that mode, no other process has it open.
#
# The new pair is made ready beside the old one. Then the old database moves to DB.before-<time>
# with its -wal and -shm, the key file is replaced if it has to be, and the new database is moved
# in. If this is killed in between, there is no database: no command makes another one there, all
# say what to do, and the next restore first moves the old one back. The key file stays if it can:
# it has the keys that renewed hosts since the backup, and none that were retired.

DATABASE_FILES = ("", "-wal", "-shm", "-journal", ".gate", ".lock", ".serve")


def moved_database(path: str) -> str:
    """Where a restore has moved the database, if the new one of the same time waits; or ""."""
    begins = os.path.basename(f"{path}{RESTORING}")
    new = [] if os.path.lexists(path) else files_beginning(f"{path}{RESTORING}")
    old = (f"{path}.before{name[len(begins) :]}" for name in new if name.endswith("Z"))
    return max(filter(os.path.lexists, old), default="")


def how_to_continue(database: str) -> str:
    """What to do if a restore was interrupted after it moved the database; "" if none was."""
    path = os.path.realpath(database)
    end = (old := moved_database(path))[len(path) :]
    back = f"mv {old} {path}, with its -wal and -shm if it has them"
    keys = f"and the key file's copy, whose name ends with {end}, if there is one"
    return old and f"a restore was interrupted: run it again, or go back: {back}, {keys}"


def move_database(path: str, target: str, is_back: bool = False) -> None:
    """Move a database with -wal and -shm. It goes first and comes back last: it needs those."""
    for end in DATABASE_FILES[3::-1] if is_back else DATABASE_FILES[:4]:
        with suppress(FileNotFoundError):
            os.rename(f"{path}{end}", f"{target}{end}")
    with closing(Folder(os.path.dirname(target))) as folder:
        os.fsync(folder.descriptor)


# The new pair is made ready under names that begin with this, and not in a folder of its own: the
# owner of the folder around that could replace it by a link to files of root's.
RESTORING = ".restoring"


def files_beginning(start: str) -> list[str]:
    folder, begins = os.path.split(start)
    return sorted(name for name in os.listdir(folder) if name.startswith(begins))


def remove_files(start: str) -> None:
    """Remove the files that begin with this path."""
    with closing(Folder(os.path.dirname(start))) as folder:
        for name in files_beginning(start):
            folder.remove(name)


class Restore(NamedTuple):
    """Puts a backup in place of a database and its key file, even if these are missing."""

    path: str
    key_path: str
    as_it_was: bool  # nothing is redone, and the keys are the backup's

    def run(self, folder: str, by: Principal, now: int, progress: Progress) -> dict[str, Any]:
        """Returns what was done. Raises OperatorError, StoreError, Problem and OSError."""
        shown, source, saved = self._find_backup(folder, now)
        with service_lock(self.path, is_shared=False), ExitStack() as stack:
            lock = stack.enter_context(closing(WriteLock(self.path)))
            lock.acquire(LOCK_PATIENCE)
            self._go_back()
            remove_files(f"{self.path}{RESTORING}")  # left by a restore that was killed
            new = f"{self.path}{RESTORING}-{rfc3339(now).replace(':', '')}"
            new_keys = f"{new}.key"
            stack.callback(remove_files, new)
            stack.callback(self._go_back)
            values, retired = self._read_old(lock, self._copy_backup(source, new, progress))
            keyring, is_kept = self._choose_keys(self._load_keys(saved, source), new, retired)
            KeyFile(new_keys, new).replace(keyring)
            with closing(open_registry(new, new_keys, now)) as registry:
                done = registry.perform(Call(REDO_AFTER_RESTORE, by, values=values), now)
            require_sound(new, new_keys, now, shown)
            moved = self._put_in_place(new, None if is_kept else keyring, now)
        return {"backup": shown, "oldDatabase": moved, "keysKept": is_kept, **done}

    def _find_backup(self, folder: str, now: int) -> list[str]:
        """The backup in a folder, or the newest whole one in its folders, as typed; its files."""
        names = [os.path.basename(path) for path in (self.path, self.key_path)]
        made = [*filter(BACKUP_NAME.fullmatch, os.listdir(folder) if os.path.isdir(folder) else ())]
        ahead = rfc3339(now + DAY * SECOND_MS).replace(":", "")  # of a wrong clock: it goes last
        made.sort(key=lambda backup: (backup <= ahead, backup))
        places = [os.path.join(folder, backup) for backup in ("", *made)]
        pairs = [[os.path.join(place, name) for name in names] for place in places]
        whole = [pair for pair in pairs if all(map(os.path.isfile, pair))]
        if not whole or os.path.realpath(whole[-1][0]) == self.path:
            raise OperatorError(f"there is no backup in {folder}: no {names[0]} with {names[1]}")
        if len(whole) > 1 and whole[0] is pairs[0]:
            remedy = f"name one of these, as {os.path.dirname(whole[-1][0])}"
            raise OperatorError(f"{folder} is a backup, and has others in it: {remedy}")
        place = resolve_file(os.path.dirname(whole[-1][0]))
        return [whole[-1][0], *(resolve_file(os.path.join(place, name)) for name in names)]

    def _load_keys(self, path: str, database: str) -> Keyring:
        """The keys of a backup. Raises OperatorError, OSError if they were read through a link made
        since _find_backup(): the owner of a folder of backups would be given a file of root's."""
        keyring, (outer, name) = load_keyring(path, database), os.path.split(os.path.dirname(path))
        with closing(Folder(outer)) as parent, closing(Folder(name or ".", parent)) as place:
            own, owner = place.status(os.path.basename(path)), os.fstat(place.descriptor).st_uid
        is_single = own.st_nlink == 1 or own.st_uid == owner  # some backups share their files
        if not keyring.file or not os.path.samestat(own, keyring.file) or not is_single:
            raise OperatorError(f"{path} is a link or a second name: copy it, and name the copy")
        return keyring

    def _copy_backup(self, source: str, new: str, progress: Progress) -> int:
        """Copy a backup, for the old database's owner. Returns the id of its newest host."""
        like = os.lstat(self.path if os.path.lexists(self.path) else os.path.dirname(self.path))
        with closing(Engine(source)) as backup, replacing(new, like) as copy:
            os.fchmod(copy.fileno(), PRIVATE_MODE)
            if backup.file_sizes()[0] == 0 or not backup.open(as_it_is=True):
                raise OperatorError(f"{source} is empty: name another backup")
            backup.begin(writes=False, durable=False)
            backup.copy_to(copy, progress)
            return Queries(backup).newest_host()

    def _read_old(self, lock: WriteLock, newest: int) -> tuple[dict[str, Any], set[str]]:
        """What must not be undone, as values for redo_after_restore(), and the signing keys that
        are retired: none if the old database cannot be read. Raises StoreBusy if it is in use."""
        kinds, old = (Host, ApiKey, Token), Engine(self.path)
        values: dict[str, Any] = {"used": (), "lost": [], "trouble": None}
        values["revoked"] = dict.fromkeys(kinds, ())
        old.lock, retired = lock, set[str]()
        try:
            if old.file_sizes()[0] > 0 and old.open():
                old.require_alone(LOCK_PATIENCE)
                _require_our_version(old)
                old.compare_schema(refuses=True)
                queries = Queries(old)
                values["lost"] = queries.host_names_after(newest)
                if not self.as_it_was:
                    retired = queries.kids() - queries.kids(with_retired=False)
                    values["used"] = queries.having(Token, "used_at")
                    values["revoked"] = {kind: queries.having(kind, "revoked_at") for kind in kinds}
        except StoreBusy:
            raise
        except (StoreError, OperatorError) as error:
            values["trouble"] = str(error)
        finally:
            if old._connection is not None:
                old.db.close()
        return values, retired

    def _choose_keys(self, saved: Keyring, new: str, retired: set[str]) -> tuple[Keyring, bool]:
        """The keys to use from now on, and whether the key file has them. Raises OperatorError if
        that is damaged, or of another database."""
        kept = load_keyring(self.key_path, new) if os.path.lexists(self.key_path) else None
        keyring = Keyring(saved.keys, saved.audit_key, kept.file if kept else os.stat(new))
        if self.as_it_was or (kept and kept.audit_key == saved.audit_key):
            return keyring if self.as_it_was else kept or keyring, not self.as_it_was
        if kept:
            text = "belongs to another database than the backup: move it away, or give --as-it-was"
            raise OperatorError(f"{self.key_path} {text}")
        for kid in retired.intersection(saved.kids):
            keyring = (keyring if len(keyring.keys) > 1 else keyring.rotated()).without(kid)
        return keyring, False

    def _put_in_place(self, new: str, keyring: Optional[Keyring], now: int) -> Optional[str]:
        """Move the old database away and the new one in. Returns where the old one is now, if there
        was one. keyring: what to write to the key file."""
        end = f".before-{rfc3339(now).replace(':', '')}"
        move_database(self.path, f"{self.path}{end}")
        if keyring and os.path.lexists(self.key_path):
            octets, status = read_private(self.key_path, "key file", os.stat(new).st_uid)
            with replacing(f"{self.key_path}{end}", status) as copy:
                copy.write(octets)
        if keyring:
            KeyFile(self.key_path, self.path).replace(keyring)
        move_database(new, self.path)
        return f"{self.path}{end}" if os.path.lexists(f"{self.path}{end}") else None

    def _go_back(self) -> None:
        """Where a restore was interrupted, to what was there before: keys first, then database."""
        if old := moved_database(self.path):
            with suppress(FileNotFoundError):
                os.replace(f"{self.key_path}{old[len(self.path) :]}", self.key_path)
            move_database(old, self.path, is_back=True)


class Finding(NamedTuple):  # of examine()
    name: str
    is_good: bool
    detail: str


def examine(
    database: str, key_file: str, progress: Progress = no_progress, now: int = 0
) -> Iterator[Finding]:
    """Examine a database and its key file, and change nothing: not even lock files are made. now:
    Unix ms. Raises OperatorError, StoreError if the database cannot be read."""
    if not os.path.exists(database):
        remedy = f"there is no database {database}: name it with --db"
        raise OperatorError(how_to_continue(database) or remedy)
    with closing(Engine(database)) as engine:
        if not engine.open(as_it_is=True):
            raise OperatorError(f"the database {database} is empty: serve creates one")
        copies = [*filter(os.path.exists, (f"{engine.path}.schema{older}" for older in MIGRATIONS))]
        faults = engine.faults()
        if faults:  # rows that a forger wrote may have no end
            end = time.monotonic() + DAMAGED_PATIENCE
            engine.db.set_progress_handler(lambda: time.monotonic() > end, 100_000)
        yield from _examine_schema(engine, faults, copies)
        yield from _examine_contents(engine, key_file, not faults, progress, now)
        paths = [f"{engine.path}{suffix}" for suffix in DATABASE_FILES]
        existing = filter(os.path.exists, [*paths, *copies])
        wrong = [f"chmod 600 {path}" for path in existing if os.stat(path).st_mode & 0o077]
        wrong += [f"chmod o-w {folder}" for folder in folders_open_to_all(engine.path, key_file)]
        yield Finding("modes", not wrong, "; ".join(wrong) or "only the owner can read the files")


def _examine_schema(engine: Engine, faults: list[str], copies: list[str]) -> Iterator[Finding]:
    version = engine.version()
    is_ours = version == SCHEMA_VERSION
    then = "current" if is_ours else f"serve migrates it to {SCHEMA_VERSION}"
    yield Finding("schema", is_ours, f"{version}: {then}")
    yield Finding("integrity", not faults, "; ".join(faults[:ERRORS_NAMED]) or "sound")
    if engine.schema_remark:
        yield Finding("foreign", True, engine.schema_remark)
    if copies:
        yield Finding("copy", True, f"{', '.join(copies)}: left by a migration, may be removed")
    if left := ", ".join(files_beginning(f"{engine.path}{RESTORING}")):
        yield Finding("copy", True, f"{left}: left by a restore; the next one removes it")
    yield Finding("sqlite", True, engine.sqlite_version)


def _examine_contents(
    engine: Engine, key_file: str, is_sound: bool, progress: Progress, now: int
) -> Iterator[Finding]:
    name = "rows"
    try:
        version = engine.version()
        is_ours = version == SCHEMA_VERSION
        bad = ", ".join(bad_rows(engine, ERRORS_NAMED)) if is_ours and is_sound else ""
        if bad:
            yield Finding(name, False, f"impossible values in {bad}: {RESTORE}")
        elif is_ours:
            Queries(engine).feed()
        name = "keys"
        keyring = load_keyring(key_file, engine.path)
        if not is_pair(engine, keyring):
            raise OperatorError(f"{key_file} is not the key file of this database")
        yield Finding(name, True, f"{len(keyring.keys)} in {key_file}")
        name = "audit"
        if version >= AUDITED_SINCE:
            strangers = Queries(engine).unminted_secrets(ERRORS_NAMED)
            text = "every API key and token newer than the log has its event"
            if strangers:
                text = f"no event created {', '.join(strangers)}: revoke them"
            yield Finding("minted", not strangers, text)
            yield Finding(name, True, verify_audit(engine, keyring, None, progress).summary())
        feed = Queries(engine).feed() if is_ours else None
        if feed and now < feed.lost_until:
            text = f"lost hosts wait until {rfc3339(feed.lost_until)}, or accept-history"
            yield Finding("restore", True, f"{text}: {feed.lost or 'none is known'}")
        name = "certificate"
        service = Queries(engine).service() if is_ours else None
        if service and (ends := service.certificate_ends):
            is_valid = ends > now
            word = "is valid until" if is_valid else "expired at"
            yield Finding(name, is_valid, f"the server's {word} {rfc3339(ends)}")
    except (OperatorError, StoreError) as error:
        yield Finding(name, False, str(error))


def require_sound(database: str, key_file: str, now: int, shown: str) -> None:
    """Raises OperatorError for what must not be restored. shown: the database to name."""
    for finding in examine(database, key_file, now=now):
        if not finding.is_good and finding.name in ("integrity", "rows", "keys"):
            raise OperatorError(f"{shown} is damaged: {finding.detail}")
        if finding.name == "keys":  # verifying the log takes longer
            return


# 7. Messages
#
# HTTP/1.1 as bytes: RFC 9112, read strictly. A message that two readers could frame differently is
# refused, because such messages smuggle requests past a proxy. Parsing never touches a socket: a
# reader takes bytes and returns requests, a writer takes a response and returns bytes.
#
# http.server's own parser is not used: from Python 3.9 to 3.13 it accepts two Content-Length fields
# that differ, ignores Transfer-Encoding, reads "+4" as a length, and drops every field after a line
# without a colon.

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY")

# token = 1*tchar                                                       RFC 9110 section 5.6.2
# request-line = method SP request-target SP HTTP-version               RFC 9112 section 3
# field-line = field-name ":" OWS field-value OWS                       RFC 9112 section 5
# field-value holds HTAB, SP, VCHAR and obs-text                        RFC 9110 section 5.5
_TCHARS = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(%b) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])" % _TCHARS)
_TOKEN = re.compile(_TCHARS)
_VALUE_BYTES = rb"[\t\x20-\x7e\x80-\xff]*"
_FIELD_VALUE = re.compile(_VALUE_BYTES)


def _encoded(characters: str) -> str:
    """A pattern for *( characters / pct-encoded ). It matches runs of characters: to match them one
    by one would make a head full of them as much work as ten requests."""
    return f"[{characters}]*(?:%[0-9A-Fa-f]{{2}}[{characters}]*)*"


# origin-form = absolute-path [ "?" query ]                             RFC 9112 section 3.2.1
# absolute-form = absolute-URI                                          RFC 9112 section 3.2.2
# absolute-path = 1*( "/" segment ), segment = *pchar                   RFC 9110 section 4.1
# pchar = unreserved / pct-encoded / sub-delims / ":" / "@"             RFC 3986 section 3.3
# query = *( pchar / "/" / "?" )                                        RFC 3986 section 3.4
# Host = uri-host [ ":" port ], uri-host = IP-literal / reg-name        RFC 9110 section 7.2
_NAME = "A-Za-z0-9._~!$&'()*+,;=-"  # unreserved and sub-delims, RFC 3986 section 2
_TARGET = re.compile(
    r"(?:[Hh][Tt][Tt][Pp][Ss]?://(?P<authority>[^/?#]*))?"
    rf"(?P<path>(?:/{_encoded(f':@{_NAME}')})*)"
    rf"(?:\?(?P<query>{_encoded(f'/?:@{_NAME}')}))?"
)
_HOST_FIELD = re.compile(rf"(?:(?!:|$){_encoded(_NAME)}|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")

# chunk = chunk-size [ chunk-ext ] CRLF chunk-data CRLF                 RFC 9112 section 7.1
# chunk-ext = *( BWS ";" BWS chunk-ext-name [ BWS "=" BWS chunk-ext-val ] )
# chunk-ext-val = token / quoted-string                                 RFC 9112 section 7.1.1
_QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
_CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[ \t]*%b(?:[ \t]*=[ \t]*(?:%b|%b))?)*"
    % (_TCHARS, _TCHARS, _QUOTED)
)

# token68 = 1*( ALPHA / DIGIT / "-" / "." / "_" / "~" / "+" / "/" ) *"="    RFC 9110 section 11.2
_TOKEN68_BYTES = (string.ascii_letters + string.digits + "-._~+/=").encode("ascii")

CHUNKED = -1  # as the length of a body
MERGE_PATCH = "application/merge-patch+json"
AGENT_PATHS = "/api/agent/"  # the start of the paths of agents' requests
# A second field of these is refused: one server would take the first, another server the last.
_SINGLE_FIELDS = (
    "host", "content-length", "transfer-encoding", "authorization", "idempotency-key", "expect",
)  # fmt: skip


class Head(NamedTuple):
    """The request line and the header fields that matter here."""

    method: str
    path: str
    query: str
    length: int  # of the body in bytes, or CHUNKED
    keep_alive: bool
    expects: bool  # "Expect: 100-continue" was sent, and a body follows
    authorization: Optional[str]  # None also if parse_head() returns the credential by itself
    idempotency_key: Optional[str]
    merges: bool = False  # the body is a merge patch (RFC 7396)
    takes_html: bool = False  # Accept names text/html, as that of a browser does
    takes_gzip: bool = False
    tags: bytes = b""  # If-None-Match: the entity tags that the client has

    @property
    def body_maximum(self) -> int:
        return AGENT_BODY_MAXIMUM if self.path.startswith(AGENT_PATHS) else BODY_MAXIMUM


class Request(NamedTuple):
    head: Head
    authorization: Optional[str]  # the token68 of a Bearer authorization
    body: bytes
    origin: Origin


def _parse_fields(lines: Sequence[bytes]) -> dict[str, list[bytes]]:
    """Values by lower-case name. RFC 9112 section 5: no folding, no space before the colon."""
    if len(lines) > FIELDS_MAXIMUM:
        raise HeadTooLarge()
    fields: dict[str, list[bytes]] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not _TOKEN.fullmatch(name) or not _FIELD_VALUE.fullmatch(value):
            raise MalformedRequest("A header field line is malformed.")
        fields.setdefault(name.decode("ascii").lower(), []).append(value.strip(b" \t"))
    return fields


def _takes(word: bytes, values: Iterable[bytes]) -> bool:
    """Whether a list with weights (RFC 9110 section 12.4.2) names a word with a weight above 0."""
    items = b",".join(values).lower().split(b",")
    named = [item for item in items if item.partition(b";")[0].strip(b" \t") == word]
    return any(not re.search(rb";[ \t]*q=0(\.0*)?[ \t]*$", item) for item in named)


def _body_length(single: Mapping[str, str], minor: int) -> int:
    """The length of the body in bytes, or CHUNKED: RFC 9112 sections 6.1 to 6.3, strictly."""
    length, coding = single.get("content-length"), single.get("transfer-encoding")
    if coding is not None:
        if length is not None or minor == 0:
            raise MalformedRequest("Transfer-Encoding must not be sent with Content-Length.")
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


def _split_target(method: str, text: str) -> tuple[str, str]:
    """The path and the query of a target in origin-form, absolute-form or asterisk-form."""
    if text == "*" and method == "OPTIONS":
        return "*", ""
    match = _TARGET.fullmatch(text)
    if match is None or (not match["path"] and match["authority"] is None):
        raise MalformedRequest("The request target is malformed.")
    if match["authority"] is not None and not _HOST_FIELD.fullmatch(match["authority"]):
        raise MalformedRequest("The authority of the request target is malformed.")
    return match["path"] or "/", match["query"] or ""


def _parse_head(data: bytes) -> Head:
    if not data.count(b"\r\n") == data.count(b"\r") == data.count(b"\n"):
        raise MalformedRequest("Lines must end with CR LF.")
    first, *lines = data.split(b"\r\n")
    match = _REQUEST_LINE.fullmatch(first)
    if match is None:
        raise MalformedRequest("The request line is malformed.")
    if match[3] != b"1":
        raise HttpVersion()
    method, minor = match[1].decode("ascii"), int(match[4])
    fields = _parse_fields(lines)
    for name in _SINGLE_FIELDS:
        if len(fields.get(name, ())) > 1:
            raise MalformedRequest(f"The header field {name} is sent more than once.")
    single = {n: fields[n][0].decode("latin-1") for n in _SINGLE_FIELDS if n in fields}
    if ("host" not in single and minor > 0) or not _HOST_FIELD.fullmatch(single.get("host", "-")):
        raise MalformedRequest("Send one Host header field that names a host.")
    length = _body_length(single, minor)
    if method == "CONNECT":  # what follows its head is not HTTP
        raise UnknownTransferCoding()
    path, query = _split_target(method, match[2].decode("ascii"))
    options = b",".join(fields.get("connection", ())).lower().split(b",")
    keep_alive = minor > 0 and b"close" not in [option.strip(b" \t") for option in options]
    expectation = single.get("expect", "").lower() if minor > 0 else ""
    if expectation not in ("", "100-continue"):
        raise ExpectationFailed()
    expects = bool(expectation) and length != 0
    media_type = b",".join(fields.get("content-type", ())).partition(b";")[0].strip().lower()
    takes_html = _takes(b"text/html", fields.get("accept", ()))
    return Head(
        method, path, query, length, keep_alive, expects, single.get("authorization"),
        single.get("idempotency-key"), media_type == MERGE_PATCH.encode("ascii"),
        takes_html, _takes(b"gzip", fields.get("accept-encoding", ())),
        b",".join(fields.get("if-none-match", ())),
    )  # fmt: skip


_parse_head_cached = lru_cache(maxsize=HEADS_CACHED)(_parse_head)
AUTHORIZATION = b"\r\nAuthorization:"
BEARER = AUTHORIZATION + b" Bearer "


def parse_head(data: bytes) -> tuple[Head, Optional[str]]:
    """The Head of a request, and its bearer credential. data: without the empty line that ends the
    head. Raises Unframed.

    The heads of agents differ only in the credential. If it is written in the usual way, it is cut
    out of its line before the head is parsed, so the cache holds a handful of heads for any fleet.
    The line itself stays, so that a second Authorization is noticed. All other lines are unchanged.
    """
    before, _, after = data.partition(BEARER)
    value, line_end, after = after.partition(b"\r\n")
    if value and not value.translate(None, _TOKEN68_BYTES):
        rest = b"%b%b%b%b" % (before, AUTHORIZATION, line_end, after)
        parse = _parse_head_cached if len(rest) <= HEAD_CACHED_MAXIMUM else _parse_head
        return parse(rest), value.decode("ascii")
    head = _parse_head(data)
    scheme, _, credential = (head.authorization or "").partition(" ")  # RFC 6750 section 2.1
    return head, credential.strip(" ") if scheme.lower() == "bearer" else None


# Trusted proxies.

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Networks = tuple[Union[ipaddress.IPv4Network, ipaddress.IPv6Network], ...]

# An address as proxies write it; some add a port. A zone is not allowed: it could be any text.
_HOP = re.compile(
    r"([0-9.]{7,15})(?::[0-9]{1,5})?|([0-9A-Fa-f:.]{2,45})"
    r"|\[([0-9A-Fa-f:.]{2,45})\](?::[0-9]{1,5})?"
)
# Groups: the name and the colon; the name if it is X-Forwarded-For; the value.
_ADDED_BY_PROXIES = re.compile(
    rb"(\r\n(?:(X-Forwarded-For)|X-Real-IP|X-Request-ID|Forwarded):)(%b)" % _VALUE_BYTES,
    re.IGNORECASE,
)


def plain_address(address: str) -> str:
    """An IPv4 address without the prefix that an IPv6 socket adds; other addresses unchanged."""
    return address[7:] if address.startswith("::ffff:") and "." in address else address


@lru_cache(maxsize=HOPS_CACHED)
def _parse_hop(text: str) -> Optional[tuple[Address, str]]:
    """An address and its usual spelling; None if the text is not an address."""
    match = _HOP.fullmatch(text)
    if match is None:
        return None
    try:
        address = ipaddress.ip_address(match[match.lastindex or 0])
    except ValueError:
        return None
    address = getattr(address, "ipv4_mapped", None) or address
    return address, str(address)


def split_forwarded(head: bytes, proxies: Networks, peer: str) -> tuple[bytes, str]:
    """The head of a request from a trusted proxy, without the values that proxies add, and the
    client's address: the last address in X-Forwarded-For that is not a trusted proxy's. Each proxy
    appends the address of its peer, so all addresses before that one are only claims of the client.
    If no address can be read, it is the address of the peer.

    The values of proxies differ from client to client and from request to request, and would keep
    the head out of every cache. Their lines stay, with an empty value, so the head parses as
    before. head must end where the head ends: a body may contain lines that look like these.
    """
    parts = _ADDED_BY_PROXIES.split(head)  # text, then (name, group 2, value, text) for each field
    if len(parts) == 1:
        return head, peer
    values = [value for name, value in zip(parts[2::4], parts[3::4]) if name]
    rest = b"".join([text + name for text, name in zip(parts[0::4], (*parts[1::4], b""))])
    hops = b",".join(values).decode("latin-1").rsplit(",", HOPS_MAXIMUM)
    client: Optional[tuple[Address, str]] = None
    for hop in hops[: -HOPS_MAXIMUM - 1 : -1]:
        text = hop.strip(" \t")
        client = _parse_hop(text) if len(text) <= HOP_LENGTH else None
        if client is None or not any(client[0] in network for network in proxies):
            break
    return rest, peer if client is None else client[1]


class ChunkedBody:
    """A body in chunks (RFC 9112 section 7.1), read as it arrives, each byte once. Chunks are
    joined at once: as separate objects, chunks of two bytes would take twenty times the memory."""

    def __init__(self) -> None:
        self.body = bytearray()  # the data of all chunks so far
        self._announced = self._overhead = 0  # bytes: the sizes of all chunks; all other lines
        self._left = 0  # the size of the current chunk with its CR LF; 0: a line comes next
        self._trailers = -1  # lines of the trailer section so far; -1: before the last chunk
        self.has_more = False  # feed() stopped early: it can read on in the rest that it returned

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """Read at most CHUNK_LINES_AT_ONCE lines of data. Returns the unread rest, and whether the
        body has ended. Raises MalformedRequest, BodyTooLarge, HeadTooLarge."""
        at = 0
        self.has_more = False
        for _ in range(CHUNK_LINES_AT_ONCE):
            if self._left:
                if len(data) - at < self._left:
                    return data[at:], False
                chunk = data[at : at + self._left]
                if not chunk.endswith(b"\r\n"):
                    raise MalformedRequest("A chunk is longer than its size.")
                self.body += chunk[:-2]
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
            if self._read_line(line):
                return data[at:], True
        self.has_more = True
        return data[at:], False

    def _read_line(self, line: bytes) -> bool:
        """Read a size line, or a line of the trailer section. True if it ends the body."""
        self._overhead += len(line) + 4
        if self._overhead > CHUNK_OVERHEAD_MAXIMUM:
            raise BodyTooLarge("Send the body in fewer and larger chunks.")
        if self._trailers >= 0:  # trailers are checked and dropped: RFC 9110 section 6.5.1
            if not line:
                return True
            _parse_fields([line])
            self._trailers += 1
            if self._trailers > FIELDS_MAXIMUM:
                raise HeadTooLarge()
            return False
        match = _CHUNK_LINE.fullmatch(line)
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


class RequestReader:
    """The requests in a stream of bytes, one by one. After a Problem there are no more requests."""

    def __init__(self, peer: str = "", connection: int = 0, proxies: Networks = ()) -> None:
        """proxies: the trusted proxies if the peer is one of them, else none."""
        self.peer = self.address = peer  # address: that of the client of the last head
        self.proxies = proxies
        self.connection = connection
        self.number = 1  # of the next request
        self.buffer = b""
        self._head: Optional[Head] = None
        self._authorization: Optional[str] = None
        self._chunked: Optional[ChunkedBody] = None

    def next(self, data: bytes = b"") -> Optional[Request]:
        """Take more bytes; the next request, if all of it has arrived. Raises Unframed. Each piece
        has the head searched again: quadratic, but bounded by 16 KiB and ten seconds."""
        buffer = self.buffer + data if self.buffer else data
        head = self._head
        if head is None:
            start = 2 if buffer.startswith(b"\r\n") else 0  # RFC 9112 section 2.2: one empty line
            end = buffer.find(b"\r\n\r\n", start)
            self.buffer = buffer
            if end < 0 or end + 4 - start > HEAD_MAXIMUM:
                self._check_unfinished_head(buffer[start : start + HEAD_MAXIMUM])
                return None
            text = buffer[start:end]
            if self.proxies:
                text, self.address = split_forwarded(text, self.proxies, self.peer)
            head, self._authorization = parse_head(text)
            buffer = buffer[end + 4 :]
            if head.length > head.body_maximum and not buffer:
                raise BodyTooLarge()  # before the body is sent; else Api.admit() refuses it
        length = head.length
        if length == CHUNKED:
            self._chunked = self._chunked or ChunkedBody()
            self.buffer, has_ended = self._chunked.feed(buffer)
            body = bytes(self._chunked.body) if has_ended else b""
        else:
            has_ended = len(buffer) >= length
            body, self.buffer = buffer[:length], buffer[length:] if has_ended else buffer
        if not has_ended:
            self._head = head
            return None
        self._head = self._chunked = None
        origin = Origin(self.address, self.connection, self.number)
        self.number += 1
        return Request(head, self._authorization, body, origin)

    @staticmethod
    def _check_unfinished_head(buffer: bytes) -> None:
        """Refuse at once what cannot become a head: another protocol, a bare CR or LF, too much."""
        if buffer.strip(b"\r") and not _TOKEN.match(buffer):  # a method is a token
            raise MalformedRequest("This is not HTTP/1.1; it may be TLS.")
        pairs = buffer.count(b"\r\n")
        bare = buffer.count(b"\r") - pairs - buffer.endswith(b"\r")
        if bare or buffer.count(b"\n") != pairs:
            raise MalformedRequest("Lines must end with CR LF.")
        if len(buffer) == HEAD_MAXIMUM:
            raise HeadTooLarge()

    @property
    def has_more(self) -> bool:
        """Whether more of the arrived bytes can be read: call next() again."""
        return self._chunked is not None and self._chunked.has_more

    @property
    def buffered(self) -> int:
        return len(self.buffer) + (len(self._chunked.body) if self._chunked else 0)

    @property
    def has_begun(self) -> bool:
        """Whether any byte of a request has arrived, after the empty line that may precede it."""
        return self._head is not None or self.buffer not in (b"", b"\r", b"\r\n")

    @property
    def is_in_body(self) -> bool:
        return self._head is not None

    @property
    def awaits_continue(self) -> bool:
        """Whether the peer waits for 100 Continue before it sends the body."""
        return self._head is not None and self._head.expects and not self.buffer

    def unfinished(self) -> Request:
        """A stand-in for a request that cannot be read, for its refusal and for the log. It tells
        only whether the method is HEAD, because the answer to HEAD has no content."""
        if self._head is not None:
            is_head, address = self._head.method == "HEAD", self.address
        else:  # self.address is still the previous request's
            is_head, address = self.buffer.lstrip(b"\r\n").startswith(b"HEAD "), self.peer
        head = Head("HEAD" if is_head else "-", "-", "", 0, False, False, None, None)
        return Request(head, None, b"", Origin(address, self.connection, self.number))


INTERNAL_REQUEST = RequestReader().unfinished()  # for the server's own calls


JSON = "application/json"
PROBLEM_JSON = "application/problem+json"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Response(NamedTuple):
    status: int
    body: bytes = b""
    content_type: str = JSON
    headers: Headers = ()
    closes: bool = False


def json_response(status: int, document: Any) -> Response:
    """An answer with a JSON document, in a form that sed in a shell script can read."""
    return Response(status, json_text(document).encode("ascii"))


def refusal(problem: Problem) -> Response:
    """The answer for a Problem. No other function shows a Problem to a peer."""
    body = json_text(problem.document()).encode("ascii")
    return Response(problem.status, body, PROBLEM_JSON, problem.headers(), problem.closes)


@lru_cache(maxsize=4)
def http_date(seconds: int) -> bytes:
    """A Unix time as an HTTP-date: RFC 9110 section 5.6.7."""
    return formatdate(seconds, usegmt=True).encode("ascii")


@lru_cache(maxsize=256)
def _field_lines(status: int, content_type: str, headers: Headers, closes: bool) -> bytes:
    """The status line and all fields up to the name of Date."""
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers]
    if UNPRINTABLE.search("".join(lines)):  # response splitting: a value would begin a new line
        raise ValueError("a header field with a control character")
    if status not in (204, 304):
        lines.append(f"Content-Type: {content_type}")
    if closes:
        lines.append("Connection: close")
    caching = [] if "Cache-Control" in dict(headers) else ["Cache-Control: no-store"]
    lines += ["X-Content-Type-Options: nosniff", *caching, "Date: "]
    return "\r\n".join(lines).encode("latin-1")


def write_response(
    response: Response, seconds: int, closes: bool, head_only: bool, request: str = ""
) -> bytes:
    """The bytes of an answer. seconds: the Unix time. request: the id of a refused request. A 204
    and a 304 have no Content-Length (RFC 9110 section 8.6), and an answer to HEAD has the
    Content-Length of the answer to GET (section 9.3.2)."""
    status, body, content_type, headers, _ = response
    fields = _field_lines(status, content_type, headers, closes)
    request_id = b"\r\nX-Request-Id: " + request.encode("ascii") if request else b""
    framing = b"" if status in (204, 304) else b"\r\nContent-Length: %d" % len(body)
    head = b"%b%b%b%b\r\n\r\n" % (fields, http_date(seconds), request_id, framing)
    return head if head_only else head + body


# 8. Assets
#
# Texts that other programs run: the agent, the systemd units and the page. The agent is a program
# of its own for a POSIX shell: shellcheck checks it, and the tests run it in four shells. The page
# is a program for a browser: the tests drive it in Chromium.

# How both units end. Lists of address families add up.
UNIT_END = """\
StateDirectoryMode=0700
UMask=0077
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
WantedBy=multi-user.target"""

_SCRIPT = r"""#!/bin/sh
# hostenroll-agent: enrolls this machine at a hostenroll server, once, and then sends heartbeats.
# It needs a POSIX shell with its usual tools, and curl 7.58 or newer.
#
# It is all functions, with one call in the last line: a download that was cut short runs nothing.

VERSION=@VERSION@
RELEASED=@RELEASED@ # a clock that shows an earlier day is not set
PROGRAM=/usr/local/sbin/hostenroll-agent # where --install copies this script, for root
SERVICE=hostenroll-agent.service
UNIT=/etc/systemd/system/$SERVICE
AUTHORITIES=/etc/hostenroll-agent.pem
ACCOUNT=hostenroll-agent # the user of the service
STATE=/var/lib/hostenroll-agent
MACHINE_ID=/etc/machine-id

# Seconds.
FIRST_WAIT=1      # after a failure: a random wait from 1 to this, doubled with each more in a row
SHORT_WAIT=10     # up to twice the server's interval, at least to this,
LONGEST_WAIT=300  # but never more than this
INTERVAL=30       # until the server sets one
GIVE_UP=120       # how long --once and --install try
FACTS_EVERY=3600  # how often to look for a new Docker, kernel or hostname, and to send the facts
FACT_TIMEOUT=5
CONNECT_TIMEOUT=10
ANSWER_TIMEOUT=30
LONGEST_START=60 # how long --install waits until a heartbeat of the service is answered
LONGEST_ANSWER=65536 # bytes, with the head
LONGEST_CREDENTIAL=1024
NUMBER='0*\([0-9]\{1,5\}\)[,}]' # in JSON
LINE='
'

usage() {
    cat <<'END'
usage: hostenroll-agent --server URL [--pin PIN | --cacert FILE] [options]
With a token, enrolls this machine. Then sends heartbeats until it is stopped.

  --server URL        the server: https://HOST:PORT
  --pin PIN           trust only the server with this public key, sha256//... (or 'PIN;PIN')
  --cacert FILE       trust servers whose certificate these authorities (PEM) have signed
  --insecure-http     allow http:// to other machines: others on the network can read secrets
  --proxy URL         use this proxy (default: https_proxy and similar variables)
  --token-file FILE   enroll with the token in FILE; - is stdin
  --hostname NAME     the name of this machine (uname -n)
  --name TEXT         the name of the host, when it enrolls (the hostname)
  --state DIR         where to keep the credential (root: /var/lib/hostenroll-agent, others:
                      ~/.local/state/hostenroll-agent)
  --ask-again SECONDS how long to wait after a refusal (3600)
  --once              send one heartbeat and exit, for cron; retry failures for 2 minutes
  --every SECONDS     how often cron runs this: with --once, or with --install (60)
  --install           install or update a systemd service; without systemd, print a line for cron
  --prefix DIR        install the program below DIR (/usr/local, or ~/.local)
  --uninstall         undo --install; the credential stays
  --seal              remove the credential, before you take an image of this machine
  --help, --version

Exit status: 0 done, 1 failed, 2 usage, 3 refused by the server.
END
}

say() {
    printf 'hostenroll-agent: %s\n' "$*" >&2 || : # its reader may be gone
}

# A failure is reported when it begins or changes, not with every heartbeat.
fail() {
    [ "$*" = "$reported" ] || say "$@"
    reported=$*
    return 1
}

quit() { # STATUS [TEXT]; zsh has "end" for itself
    [ -z "${2:-}" ] || say "$2"
    [ -z "$locked" ] || rm -f "$state/lock"
    [ -z "$stopped" ] || systemctl start "$SERVICE"
    exit "$1"
}

# Random characters of a set. Small systems have no od.
random() { # SET NUMBER
    head -c 4096 /dev/urandom 2>/dev/null | tr -dc "$1" | cut -c "1-$2"
}

# A random number from 1 to $1. It gets a 1 in front because it may begin with zeros: 08 is a
# syntax error in shell arithmetic, and ends the shell.
draw() {
    drawn=$((1$(random 0-9 5) % $1 + 1))
}

# For a string in JSON and for one in a curl config: both have the same escapes.
escape() {
    printf '%s' "$1" | sed 's/[\\"]/\\&/g'
}

# A command's output as a fact: one line of at most 128 printable ASCII characters.
fact() { # [LENGTH]
    tr '\n' ' ' | tr -dc ' -~' | sed 's/^ *//; s/ *$//' | cut -c "1-${1:-128}"
}

read_arguments() {
    while [ $# -gt 0 ]; do
        case $1 in
        --help) usage && exit 0 ;;
        --version) echo "hostenroll-agent $VERSION" && exit 0 ;;
        --insecure-http) insecure=$1 ;;
        --once) once=yes ;;
        --install | --uninstall | --seal) act=${1#--} ;;
        *) take "$1" "${2:-}" && shift ;;
        esac
        shift
    done
}

take() { # OPTION VALUE
    case $1 in
    --server) server=${2%/} ;;
    --pin) pin=$2 ;;
    --cacert) cacert=$2 ;;
    --token-file) token_file=$2 ;;
    --hostname) hostname=$2 ;;
    --name) name=$2 ;;
    --state) state=$2 ;;
    --proxy) # which curl takes from there; it may have a password
        unset https_proxy HTTPS_PROXY http_proxy no_proxy NO_PROXY all_proxy ALL_PROXY
        export all_proxy="$2" && proxy=given
        ;;
    --prefix) prefix=$2 ;;
    --ask-again) ask_again=$2 ;;
    --every) every=$2 ;;
    *) quit 2 "unknown option $1; see --help" ;;
    esac
    [ -n "$2" ] || quit 2 "$1 needs a value; see --help"
}

check_arguments() {
    check_server
    hash='sha256//[A-Za-z0-9+/]\{43\}=' # curl takes anything else for the name of a file
    hash=$(printf %s "$pin" | tr '\n' ' ' | sed -n "\|^$hash\(;$hash\)\{0,3\}$|p")
    [ "$hash" = "$pin" ] ||
        quit 2 "--pin must look like sha256//..., or up to 4 of them with ; between"
    case $hostname in
    *[!A-Za-z0-9._-]*) quit 2 "--hostname must be letters, digits, dots, - and _" ;;
    esac
    case $name in
    *[[:cntrl:]]*) quit 2 "--name must be one line of text" ;;
    esac
    case $ask_again:$every in
    *[!0-9:]* | 0* | *:0* | ??????*:* | *:??????*) quit 2 "--ask-again, --every: not seconds" ;;
    esac
    [ "${every:-1}" -le 86400 ] || quit 2 "--every must be at most 86400 seconds"
    [ -z "$every" ] || [ -n "$once" ] || [ "$act" = install ] || quit 2 "--every needs --once"
    [ -z "$cacert" ] || [ -r "$cacert" ] || quit 2 "cannot read $cacert"
}

check_server() {
    [ -n "$server" ] || quit 2 "--server URL is missing; see --help"
    host=${server#*://}
    host=${host%%/*}
    case $server in
    *[!]A-Za-z0-9.:/_~[-]*) ;;
    https://?*) return 0 ;;
    http://?*) check_plain_http && return 0 ;;
    esac
    quit 2 "--server must look like https://enroll.lan:8443"
}

check_plain_http() {
    [ -z "$pin$cacert" ] || quit 2 "--pin and --cacert have no effect over http: use https://"
    case $host in
    127.*[!0-9.:]*) ;; # a name
    127.* | '[::1]' | '[::1]':* | localhost | localhost:*) loopback=yes ;;
    esac
    [ -n "$loopback$insecure" ] ||
        quit 2 "others on the network can read secrets in http: use https, or --insecure-http"
}

# Files. The agent works where no other user can write: links, devices or process ids that another
# user prepares would be used with its rights. So the service, which is not root, has a folder of
# its own in root's folder. Root leaves it alone while the service may run: root enrolls in its own
# folder, and the service takes the credential from there.

find_state() {
    user=$(id -u)
    if [ "$user" = 0 ]; then
        state=${state:-$STATE}
    else
        PROGRAM=${HOME:-}/.local/bin/hostenroll-agent
        [ -n "$state${XDG_STATE_HOME:-}${HOME:-}" ] || quit 2 "HOME is not set: give --state DIR"
        state=${state:-${XDG_STATE_HOME:-${HOME:-}/.local/state}/hostenroll-agent}
    fi
    while case $state in ?*/) ;; *) false ;; esac; do state=${state%/}; done # a shell adds it
    case $state in
    /*) ;;
    *) state=$PWD/$state ;;
    esac
    case $user:$state in
    0:"$STATE" | 0:"$STATE/service")
        state=$STATE
        [ ! -f "$UNIT" ] || served=yes owner=$(sed -n 's/^User=//p' "$UNIT")
        ;;
    *:"$STATE/service") given=${CREDENTIALS_DIRECTORY:-$STATE}/credential ;;
    esac
}

# For root, the folder and all above it must be root's, and writable by others in none but those
# above it that have the sticky bit; also where links lead to it.
open_folder() { # FOLDER
    mkdir -p "$1" 2>/dev/null || [ -d "$1" ] || quit 1 "cannot make the folder $1"
    [ "$user" = 0 ] || return 0
    others=$(list_folders "$1/." |
        sed 's/^\([^ ]* *[0-9]* *0 \)/0\1/; /^0d....-..-/d; /^0l/d; 1!{/^0d........[tT]/d;}')
    [ -z "$others" ] ||
        quit 1 "other users can write in $1: run this as its owner, or with --install for a service"
}

# A folder and all above it, also where links on the way lead, as ls shows them.
list_folders() ( # PATH
    folder=$1
    while [ -n "$folder" ]; do
        # shellcheck disable=SC2012 # not all systems have stat or find -printf
        ls -nd "$folder" || echo gone
        target=$(target_of "$folder")
        case $target in
        '') ;;
        /*) list_folders "$target" ;;
        *) list_folders "${folder%/*}/$target" ;;
        esac
        folder=${folder%/*}
    done
)

# Each file is written under another name and then moved into place, so that a full disk or a crash
# leaves the old one whole.
put() { # FILE MODE [OWNER], from stdin
    rm -f "$1.new"
    {
        cat >"$1.new" && chmod "$2" "$1.new" && { [ -z "${3:-}" ] || chown "$3" "$1.new"; } &&
            sync "$1.new" && mv -f "$1.new" "$1" && return
    } 2>/dev/null
    rm -f "$1.new"
    return 1
}

store_credential() { # CREDENTIAL
    printf '%s\n' "$1" "$host_id" "$enrolled_with" "${mark:-$machine}" |
        put "$state/credential" 600 "$owner"
}

# Reads the credential, the id of the host, the ids of the last tokens used here (newest first)
# and the machine's mark. Fails without a credential.
read_credential() { # FILE
    credential='' host_id='' enrolled_with='' mark=''
    [ -f "$1" ] || return 1 # a FIFO would never end
    # shellcheck disable=SC2046 # four words
    set -- $(head -c 2048 "$1" 2>/dev/null | tr -dc '\n -~') '' '' '' ''
    credential=$1 host_id=$2 enrolled_with=$3 mark=$4
    is_credential "$credential"
}

is_credential() {
    case $1 in
    *[!A-Za-z0-9._-]*) return 1 ;;
    *.*.*) [ "${#1}" -le "$LONGEST_CREDENTIAL" ] ;;
    *) return 1 ;;
    esac
}

# The service's own credential renews the one that root has given it, or is of an older enrollment.
choose_credential() { # OWN GIVEN
    given_as=''
    ! read_credential "$2" || given_as=$enrolled_with$host_id
    ! read_credential "$1" || case $given_as in '' | "$enrolled_with$host_id") return 0 ;; esac
    read_credential "$2"
}

load_credential() {
    choose_credential "$state/credential" "$given"
}

# What --install has put there. No shell runs it: others may write in the folder of a user.
read_proxy() {
    while IFS='=' read -r variable value; do
        case $variable in *[!A-Za-z_]*) continue ;; *_[Pp][Rr][Oo][Xx][Yy]) ;; *) continue ;; esac
        value=$(printf %s "$value" | sed 's/^"//; s/"$//; s/\\\(.\)/\1/g')
        export "$variable=$value"
    done <"$state/proxy"
}

# One agent for each folder. The lock names its holder by process id and start time: the system may
# have given the id to another process since. Where neither /proc nor ps tells start times, no lock
# is heeded: two agents may beat then, but no stranger's process silences them or gets a signal.
start_time() { # PROCESS
    { sed 's/.*) [^Z] \([^ ]* \)\{18\}\([0-9]*\).*/\2/' "/proc/$1/stat" || # Z: it has ended
        TZ=UTC0 ps -o lstart= -p "$1"; } 2>/dev/null | tr -dc 0-9
}

is_alive() { # PROCESS-STARTTIME
    case $1 in
    '' | [!1-9]* | *[!0-9-]* | *-) return 1 ;;
    esac
    [ "$(start_time "${1%%-*}")" = "${1#*-}" ]
}

target_of() { # LINK
    # shellcheck disable=SC2012 # not all systems have readlink
    ls -ld "$1" 2>/dev/null | sed -n 's/.* -> //p'
}

# Two agents may find the same stale lock. When one removes it, the other may have taken it already:
# so it is moved aside, looked at, and put back if it is a new one.
take_lock() {
    mine=$$-$(start_time $$)
    until ln -s "$mine" "$state/lock" 2>/dev/null; do
        holder=$(target_of "$state/lock")
        [ -n "$holder" ] || return 0 # a full or read-only disk must not stop the heartbeats
        [ "$holder" = "$mine" ] || ! is_alive "$holder" || return 1 # ours was left by another boot
        mv -f "$state/lock" "$state/lock.$$" 2>/dev/null || [ ! -L "$state/lock" ] || return 0
        taken=$(target_of "$state/lock.$$")
        rm -f "$state/lock.$$"
        [ "${taken:-$holder}" = "$holder" ] || ln -s "$taken" "$state/lock" 2>/dev/null
    done
    locked=yes
}

# The machine. A copy of the state, as on a cloned disk, would be the same host to the server. So a
# credential, and an Idempotency-Key, is stored with a mark: a salted hash of the machine-id. Where
# that is a mount or a link, it often differs with each boot: there is no mark then.

find_machine() {
    machine=$(head -n 1 "$MACHINE_ID" 2>/dev/null | tr -dc 0-9a-f)
    [ ${#machine} -eq 32 ] && [ ! -L "$MACHINE_ID" ] || machine='' # such as "uninitialized"
    case $LINE$(cut -d ' ' -f 5 /proc/self/mountinfo 2>/dev/null)$LINE in
    *"$LINE$MACHINE_ID$LINE"*) machine='' ;;
    esac
    [ -z "$machine" ] || machine=$(printf %s "hostenroll-agent $machine" | digest)
}

# 16 hexadecimal digits for what is on stdin, by the first of these programs that exists.
digest() {
    { sha256sum || openssl dgst -sha256 -r || md5sum || cksum || cat >/dev/null; } 2>/dev/null |
        sed 's/ .*/0000000000000000/' | cut -c 1-16
}

is_mine() { # MARK
    [ -z "$1" ] || [ -z "$machine" ] || [ "$1" = "$machine" ]
}

# The server.

# Sets reply (the JSON text of the answer), status (of HTTP; 000 without an answer), code (of a
# refusal) and failure (the message of curl). All secrets are in the config, which goes through a
# pipe: they are in no argument, no environment and no file. An answer that was cut off ends without
# the exit status of curl, though a server can make it look otherwise.
ask() { # PATH CONFIG
    url=$server$1 config=$2
    # -q works only as the first option. Without it a .curlrc could turn verification off.
    set -- -q "$url" -sS -g -i -A "hostenroll-agent/$VERSION" -w '\n%{time_total} %{http_code}'
    set -- "$@" --connect-timeout "$CONNECT_TIMEOUT" --max-time "$ANSWER_TIMEOUT"
    set -- "$@" --proto "=${server%%:*}"
    [ -z "$loopback" ] || set -- "$@" --noproxy '*'
    [ -z "$cacert" ] || set -- "$@" --cacert "$cacert"
    [ -z "$pin" ] || set -- "$@" --pinnedpubkey "$pin"
    [ -z "$pin" ] || [ -n "$cacert" ] || set -- "$@" -k # the pin decides
    answer=$({
        printf '%s\n' "$config" | curl "$@" -K - 2>&1
        printf '\n%s' "$?"
    } 2>/dev/null | head -c "$LONGEST_ANSWER" | { # TERM may end its reader
        tr '\000' ' ' && printf . # which keeps the newlines before it
    } 2>/dev/null)
    answer=${answer%.} config='' status=000 reply='' failure=''
    exit_status=$(printf '%s\n' "$answer" | tail -n 1)
    [ "${#answer}" != "$LONGEST_ANSWER" ] || exit_status=''
    case $exit_status in
    0)
        answer=${answer%"$LINE"*}
        status=${answer##* }
        reply=$(printf '%s\n' "${answer%"$LINE"*}" | tail -n 1)
        ;;
    [1-9] | [1-9][0-9] | [1-9][0-9][0-9])
        # It may quote the URL of a proxy, which has a password.
        failure=$(printf '%s\n' "$answer" |
            sed -n "s/ after [0-9]* m[a-z]*//; s/'.*@/'/; s/^curl: //p" | tail -n 1 | fact)
        ;;
    *) exit_status=63 failure="it sends more than $LONGEST_ANSWER bytes" ;;
    esac
    code=$(member code '"\([a-z-]*\)"')
}

# A member of the reply. Quotes inside JSON strings are escaped, so no string looks like a member.
member() { # NAME PATTERN
    printf '%s\n' "$reply" | sed -n "s/.*\"$1\":$2.*/\\1/p"
}

detail() {
    reply=$(printf '%s\n' "$reply" | sed "s/\\\\[\"\\\\]/'/g")
    member detail '"\([^"]*\)"' | fact 500
}

# The reason of a failure that may pass.
fail_for_now() {
    case $status in
    000)
        ! is_untrusted || failure="not trusted, nothing was sent: $failure"
        fail "no answer from $server: $failure"
        ;;
    408 | 429 | 503) fail "$server cannot answer now ($status${code:+ $code})" ;;
    *) fail "unexpected answer from $url ($status${code:+ $code})" ;;
    esac
}

# Curl does not trust the server, and no waiting helps. It does as long as the clock is behind: for
# such a clock, certificates are not valid yet.
is_untrusted() {
    case $exit_status:$failure in
    60:*'not yet '* | 60:*activat* | 60:*[Ff]uture* | 60:*FUTURE*) return 1 ;;
    51:* | 60:* | 77:* | 83:* | 90:* | 91:*) [ "$(date -u +%Y%m%d)" -ge "$RELEASED" ] ;;
    *) return 1 ;;
    esac
}

# Runs a command that may hang, as docker does on a dead mount. When its time is over, it is ended,
# with all that it has started where there is setsid, and what it has printed ends with a "?".
limited() { # COMMAND...
    command -v "$1" >&2 || return 0
    sleep "$FACT_TIMEOUT" >/dev/null &
    timer=$!
    ! command -v setsid >&2 || set -- setsid "$@"
    (
        "$@" &
        trap 'kill -9 "-$!" || kill -9 "$!"; exit' TERM
        wait "$!"
        kill -9 "$timer"
    ) &
    ! wait "$timer" || { kill "$!" && printf '?'; }
    echo
}

# The facts about this machine, as members of a JSON object.
gather_facts() {
    own=${hostname:-$(uname -n)}
    own=$(printf '%s' "$own" | tr -dc 'A-Za-z0-9._-' | cut -c 1-253 | sed 's/^[.-]*//; s/-*$//')
    [ -n "$own" ] || quit 1 "this machine has no usable hostname: give --hostname"
    os=$(sed -n 's/^PRETTY_NAME=//p' /etc/os-release 2>/dev/null | tr -d "\"'" | tail -n 1)
    os=$(printf '%s' "${os:+$os, }$(uname -s) $(uname -r)" | fact)
    docker=$(limited docker --version </dev/null 2>/dev/null |
        sed -n '/^[?]*$/{p;q;};/^Docker version /{s///;s/[, ].*//;p;q;}' | fact)
    facts="\"agentVersion\":\"$VERSION\",\"hostname\":\"$own\",\"os\":\"$(escape "$os")\""
    facts="$facts,\"architecture\":\"$(escape "$(uname -m | fact)")\""
    [ "$docker" != '?' ] || say "docker --version hangs: the server keeps the last known version"
    [ "$docker" = '?' ] || facts="$facts,\"dockerVersion\":\"$(escape "$docker")\""
    facts="$facts,\"everySeconds\":${every:-null}"
    # The server sees copies by the instance: a machine, a boot of it and a folder.
    boot=${boot:-$(cat /proc/sys/kernel/random/boot_id 2>/dev/null)}
    [ -n "$boot$once" ] || boot=$(random 0-9a-f 32)
    instance=$(printf %s "$boot $(uname -n) $(cd "$state" && pwd -P)" | digest)
    [ -z "$instance" ] || facts="$facts,\"instance\":\"$instance\""
    age=0 sent_facts=''
}

# The facts that the server has, and when they were sent. Without the file they are sent again.
store_facts() { # [TIME]
    printf '%s\n' "$facts" "${1:-}" | put "$state/facts" 600 || rm -f "$state/facts" 2>/dev/null
    sent_facts=$facts
}

# A copy keeps beating: that is better than a silent machine, and the server shows it.
read_state() {
    since=$(sed -n '2s/^\([1-9][0-9]\{0,11\}\)$/\1/p' "$state/facts" 2>/dev/null)
    since=$(($(date +%s | tr -dc 0-9) - ${since:-0}))
    [ -z "$once" ] || [ "$since" -lt 0 ] || [ "$since" -ge "$FACTS_EVERY" ] ||
        sent_facts=$(head -n 1 "$state/facts")
    load_credential || return 0
    [ -n "$mark" ] || [ -z "$machine" ] || store_credential "$credential" # an older version's
    is_mine "$mark" || [ "$facts" = "$sent_facts" ] || say "this state was copied from another" \
        "machine: stop the agent, run --seal on the image, enroll with a new token"
}

# Enrollment. The Idempotency-Key is stored before it is used: if the answer is lost, because the
# connection or this process ends, the same token with the same key returns the same host.

enroll() {
    [ -z "$given" ] || quit 2 "this folder belongs to the service: enroll as root, without --state"
    read_token || quit 2 "there is no token in $token_file: a token begins with het_"
    { load_credential && is_mine "$mark"; } || enrolled_with=''
    case ,$enrolled_with, in
    *",$token_id,"*) token='' && return ;; # this command has run before
    esac
    keep_key || quit 1
    gather_facts
    until ask_for_credential; do
        [ "$?" != 3 ] || quit 3
        ! is_untrusted || quit 1
        back_off
    done
}

# A host that was deleted comes back, as a new one, with a token that can be read again.
enroll_again() {
    [ "$code" = host-unknown ] && [ -f "$token_file" ] && read_token || return 3
    [ "$token_id" != "$tried" ] || return 3
    tried=$token_id
    say "the host was deleted on the server: enrolling again with $token_file"
    keep_key && ask_for_credential
}

read_token() {
    case $token_file in
    -) IFS= read -r token ;;
    *) [ -r "$token_file" ] && IFS= read -r token <"$token_file" ;;
    esac
    token=${token%"$(printf '\r')"}
    token_id=${token#het_}
    token_id=${token_id%%_*}
    case $token in
    *[!A-Za-z0-9_-]*) return 1 ;;
    het_[!_]*_*) ;;
    *) return 1 ;;
    esac
}

keep_key() {
    key='' key_token='' key_mark=''
    [ ! -f "$state/enrolling" ] || read -r key_token key key_mark <"$state/enrolling"
    key=$(printf '%s' "$key" | tr -dc 0-9a-f)
    is_mine "$key_mark" && [ "$key_token" = "$token_id" ] && [ ${#key} -eq 32 ] && return
    key=$(random 0-9a-f 32)
    [ ${#key} -eq 32 ] || fail "head -c or tr cannot read /dev/urandom" || return
    printf '%s\n' "$token_id $key $machine" | put "$state/enrolling" 600 ||
        fail "cannot write in $state: make room and run this again; the token has not been used"
}

# Returns 0 enrolled, 1 failed, 3 refused.
ask_for_credential() {
    body="{\"token\":\"$token\",$facts"
    [ -z "$name" ] || body="$body,\"name\":\"$(escape "$name")\""
    ask /api/agent/enroll "header = \"Idempotency-Key: $key\"
data-binary = \"$(escape "$body}")\""
    body=''
    case $status:$code in # a proxy's refusal has none of these codes, and may pass
    201:*) keep_enrollment ;;
    4??:token-* | 4??:host-* | 4??:invalid-body | 4??:malformed-request | 4??:not-found | \
        413:body-too-large)
        [ "$code:$key_token" = "token-used:$token_id" ] ||
            fail "refused ($code): $(detail)" || return 3
        # With that key, in a copy of this state, another machine has enrolled.
        rm -f "$state/enrolling" || fail "cannot write in $state" || return
        keep_key && ask_for_credential
        ;;
    *) fail_for_now ;;
    esac
}

keep_enrollment() {
    credential=$(member credential '"\([^"]*\)"[,}]')
    host_id=$(member hostId '"\([0-9a-f]\{1,64\}\)"')
    mark=''
    [ "${enrolled_with%%,*}" = "$token_id" ] || # in a try that failed; the last nine are kept
        enrolled_with=$(printf %s "$token_id${enrolled_with:+,$enrolled_with}" | cut -d , -f 1-9)
    { is_credential "$credential" && [ -n "$host_id" ]; } ||
        fail "$server does not answer like a hostenroll server" || return
    store_credential "$credential" ||
        fail "cannot write in $state: make room; the same token then works again" || return
    store_facts
    rm -f "$state/enrolling"
    say "enrolled as host $host_id"
    interval=$(member heartbeatIntervalSeconds "$NUMBER")
    # The first heartbeat sends the facts again. And this succeeds where no process reads stderr.
    token='' reported='' bound=$FIRST_WAIT enrolled=yes sent_facts=''
}

# Heartbeats. Returns 0 accepted, 1 failed, 3 refused.

beat() {
    load_credential || quit 1 "no credential in $state: enroll with --token-file"
    body=''
    [ "$facts" = "$sent_facts" ] || body=$facts
    ask /api/agent/heartbeat "header = \"Authorization: Bearer $credential\"
data-binary = \"$(escape "{$body}")\""
    case $status:$code:$body in
    200:*) accepted ;;
    4??:host-revoked:* | 4??:host-unknown:* | 4??:credential-*)
        fail "refused ($code): $(detail)" || enroll_again || return
        beat
        ;;
    400:invalid-body:?*)
        say "the server does not accept the facts about this machine: $(detail)"
        sent_facts=$facts
        beat
        ;;
    *) fail_for_now ;;
    esac
}

accepted() {
    next=$(member nextHeartbeatSeconds "$NUMBER")
    [ -n "$next" ] || fail "$server does not answer like a hostenroll server" || return
    [ "$next" -gt 0 ] || next=1
    interval=$next
    [ -z "$body" ] || store_facts "$(date +%s)"
    case $reply in
    *'"credential":'*) keep_renewal || return 0 ;;
    esac
    [ -z "$reported" ] || say "the server accepts heartbeats again"
    reported=''
}

# The renewed credential is stored before it is used: a heartbeat sends the one in the file. If
# another run has enrolled in the meantime, its credential is newer and stays.
keep_renewal() {
    renewed=$(member credential '"\([^"]*\)"[,}]') used=$credential
    is_credential "$renewed" ||
        fail "$server sent an invalid new credential: the old one stays" || return
    load_credential && [ "$credential" = "$used" ] || return 0
    store_credential "$renewed" ||
        fail "cannot write in $state: make room; the old credential still works for now"
}

# Wait after a failure: longer with each in a row, and random, because a fleet must not return all
# at once; what the server asks for, it allows. If a proxy has added a second Retry-After, the last
# one counts. One that is not a number of seconds, such as a date, is ignored.
back_off() {
    longest=$((${interval:-$INTERVAL} * 2))
    [ "$longest" -ge "$SHORT_WAIT" ] || longest=$SHORT_WAIT
    [ "$longest" -le "$LONGEST_WAIT" ] || longest=$LONGEST_WAIT
    asked=$(printf '%s\n' "$answer" | tr -d '\r' | sed -n 's/^[Rr]etry-[Aa]fter: *//p' |
        sed -n '$s/^0*\([0-9]\{1,4\}\) *$/\1/p')
    [ "${asked:=0}" -le "$LONGEST_WAIT" ] || asked=$LONGEST_WAIT
    longest=$((longest > asked ? longest - asked : 1))
    [ "$bound" -le "$longest" ] || bound=$longest
    draw "$bound"
    took=$(printf '%s\n' "$answer" | sed -n 's/^0*\([0-9]\{1,2\}\)\.[0-9]* ...$/\1/p' | tail -n 1)
    age=$((age + ${took:-0})) drawn=$((asked + drawn))
    left=$((GIVE_UP - age))
    if [ -n "$once$act" ]; then
        [ "$left" -gt 0 ] || [ "$GIVE_UP" = 0 ] || say "gave up after $age s"
        { [ "$left" -gt 0 ] && ! is_untrusted; } || quit 1
        [ "$drawn" -le "$left" ] || drawn=$left
    fi
    pause "$drawn"
    bound=$((bound * 2))
}

# A signal ends the wait and the sleep at once; TERM, INT and HUP also end the agent. USR1 comes
# from another run that has just enrolled.
pause() {
    trap 'leave' TERM INT HUP
    sleep "$1" &
    [ -z "$woken" ] || end_sleep
    wait "$!" 2>/dev/null
    slept=$! woken=''
    [ -n "$stopped" ] || trap - TERM INT HUP
    age=$((age + $1))
}

# Before the forked shell has become sleep, it may catch TERM and forget it. So send KILL too; not
# KILL alone, because bash would report that.
end_sleep() {
    [ "${!:-}" = "$slept" ] || kill "$!" 2>/dev/null
    [ "${!:-}" = "$slept" ] || kill -9 "$!" 2>/dev/null
}

leave() {
    end_sleep
    [ -z "$locked" ] || rm -f "$state/lock"
    [ -z "$stopped" ] || systemctl start "$SERVICE"
    trap - TERM
    kill "$$"
}

beat_on() {
    while :; do
        beat
        outcome=$?
        case $given:$outcome$answered in # root looks at the time of the file, and does not open it
        /*:[03]) { printf '' >|"$state/answered" && answered=yes; } 2>/dev/null ;;
        esac
        [ -z "$once" ] || [ "$outcome" = 1 ] || quit "$outcome"
        case $outcome in
        0) tried='' bound=$FIRST_WAIT && pause "$next" ;;
        1) tried='' && back_off ;;
        3) pause "$ask_again" ;;
        esac
        [ "$age" -lt "$FACTS_EVERY" ] || gather_facts
    done
}

# Installation.

# As a service the agent has no privileges: it has a user and a folder of its own. Its program and
# its unit belong to root. What is installed is the text that was read at the start.
install() {
    [ -n "$enrolled" ] || load_credential || quit 2 "no credential in $state: give --token-file"
    # No credential is sent: the service's may be newer, and root's would look like a copy of it.
    if [ -z "$enrolled" ] && [ -f "$installed" ]; then
        updates=yes
        ask /api/agent/heartbeat 'data-binary = "{}"'
        case $code in # the server's own answers, also where it cannot do more now
        credential-missing | too-many-requests | overloaded | storage-unavailable) ;;
        *) fail_for_now || quit 1 "nothing was changed" ;;
        esac
        trap 'put_back interrupted' HUP INT TERM
    fi
    replace "$PROGRAM" 755 "$script"
    replace "$state/program" 600 "$PROGRAM"
    # As systemd reads it.
    replace "$state/proxy" 600 "$(env | sed -n 's/["\\$`]/\\&/g
        s/^\([A-Za-z]*_[Pp][Rr][Oo][Xx][Yy]\)=\(..*\)/\1="\2"/p')"
    [ -z "$as_service" ] || install_service
    keep_new
    draw 50 # each host gets its own second of the minute
    say "systemd cannot be used here: run crontab -e and add this line"
    printf '%s * * * * sleep %s; sh %s %s --once --every %s 2>&1 | logger -t hostenroll-agent\n' \
        "${minutes%/1}" "$drawn" "$PROGRAM" "$(service_arguments)" "$every"
    quit 0
}

# This runs before a token is used.
check_install() {
    script=$(cat "$0" 2>/dev/null)
    [ "${script##*"$LINE"}" = 'main "$@"' ] || quit 1 "save this script in a file first"
    if [ "$user" = 0 ] && [ -d /run/systemd/system ]; then
        as_service=yes
        [ -z "$every" ] || quit 2 "--every is for cron: the server sets the interval of a service"
        [ "$state" = "$STATE" ] ||
            quit 2 "--state cannot be used with --install: a service uses $STATE"
        systemd=$(systemctl --version | sed -n '1s/^[^0-9]*\([0-9]*\).*/\1/p')
        older=${STATE%/*}/private/${STATE##*/}
        case $(target_of "$STATE") in
        *private/*) leave_private ;;
        *) [ ! -f "$older/credential" ] || leave_private ;; # an upgrade that was interrupted
        esac
        return
    fi
    every=${every:-60}
    minutes="*/$((every / 60))"
    { [ "$((every % 60))" = 0 ] && [ "$every" -le 1800 ]; } ||
        quit 2 "--every must be whole minutes for cron, 60 to 1800"
    case $cacert in
    '' | /*) ;;
    *) cacert=$PWD/$cacert ;;
    esac
}

# The program stays where it was installed, unless --prefix names another place.
check_places() {
    place=$prefix/${PROGRAM##*local/}
    [ ! -f "$state/program" ] || read -r PROGRAM <"$state/program"
    installed=$PROGRAM
    [ -z "$prefix" ] || PROGRAM=$place
    case $PROGRAM$state${as_service:-$cacert} in
    [!/]* | *[!A-Za-z0-9/._@+-]*) quit 1 "cannot install with $PROGRAM, $state and $cacert" ;;
    esac
    [ -z "$prefix" ] || (umask 022 && open_folder "${PROGRAM%/*}") || exit 1
    can_write "${PROGRAM%/*}" || {
        [ -z "$prefix" ] || quit 1 "cannot write in ${PROGRAM%/*}: no token was used"
        say "cannot write in ${PROGRAM%/*} (see --prefix): installing the program in $state"
        PROGRAM=$state/hostenroll-agent
    }
    place=$(df -P "$state" 2>/dev/null | sed -n '$s/.* //p')
    case $(sed -n "s|^[^ ]* $place ||p" /proc/mounts 2>/dev/null | tail -n 1) in
    tmpfs* | ramfs* | rootfs*) say "$state is on a RAM disk: a reboot loses the credential" ;;
    esac
    [ -n "$as_service" ] || return 0
    { can_write "${UNIT%/*}" && can_write "${AUTHORITIES%/*}"; } ||
        quit 1 "cannot write in ${UNIT%/*}: no token was used"
    make_account
}

can_write() { # FOLDER
    (umask 022 && mkdir -p "$1") 2>/dev/null
    echo | put "$1/hostenroll-agent.try" 600 && rm -f "$1/hostenroll-agent.try"
}

# What was there before lies beside it until the new way works. What a run that was killed has left
# there is kept: the service may never have run what is there now.
replace() { # FILE MODE TEXT
    [ -f "$1.old" ] || [ "$(cat "$1" 2>/dev/null)" != "$3" ] || return 0
    [ -f "$1.old" ] || [ ! -f "$1" ] || put "$1.old" "$2" <"$1" || put_back "cannot write $1.old"
    replaced="$replaced $1"
    printf '%s\n' "$3" | put "$1" "$2" || put_back "cannot write $1"
}

keep_new() {
    trap '' HUP INT TERM # from here on nothing can be put back
    for file in $replaced; do rm -f "$file.old"; done
    [ "$installed" = "$PROGRAM" ] || rm -f "$installed"
}

put_back() { # WHY
    trap '' HUP INT TERM
    for file in $replaced; do mv -f "$file.old" "$file" 2>/dev/null || rm -f "$file"; done
    [ -z "$served" ] || { systemctl daemon-reload && systemctl restart "$SERVICE"; }
    quit 1 "$1: everything is as before"
}

# Where nothing can make a user, systemd does (DynamicUser=).
make_account() {
    owner=$ACCOUNT
    ! id -u "$owner" >/dev/null 2>&1 || return 0
    if command -v useradd >/dev/null 2>&1; then
        useradd --system --user-group --home-dir / --shell /usr/sbin/nologin "$owner"
    elif command -v adduser >/dev/null 2>&1; then # of busybox
        adduser -S -D -H -h / -s /sbin/nologin "$owner"
    else
        owner='' && [ "${systemd:-247}" -ge 247 ] # which hands it a credential
    fi || quit 1 "cannot make the user $ACCOUNT"
}

# An older version's service had DynamicUser=: its folder is elsewhere, its user not a lasting one.
leave_private() {
    stopped=yes
    trap leave HUP INT TERM
    systemctl stop "$SERVICE" || [ ! -f "$UNIT" ] || quit 1 "systemd cannot stop $SERVICE"
    [ ! -L "$STATE" ] || rm -f "$STATE"
    take_back "$older"
}

# The files of a stopped service become root's again. After the chmod no other user can change what
# is there; a FIFO, a link, and a second name of another user's file are not read.
take_back() { # FOLDER
    state=$STATE owner=''
    open_folder "$state"
    [ -d "$1" ] || return 0
    { chown 0:0 "$1" && chmod 700 "$1"; } || quit 1 "cannot take $1 from the service"
    own=$(find "$1/credential" -type f -links 1 2>/dev/null)
    ! choose_credential "$own" "$state/credential" || store_credential "$credential" ||
        quit 1 "cannot write in $state: make room"
    rm -rf "$1"
}

# Before an image of this machine is taken: else each copy of it is this host.
seal() {
    holder=$(target_of "$state/service/lock")
    { ! is_alive "$holder" && take_lock; } || leave_to_holder
    [ -z "$served" ] || [ "$(systemctl is-active "$SERVICE")" != active ] || quit 1 "$SERVICE runs"
    if [ "$user:$state" = "0:$STATE" ]; then
        [ -L "$state/service" ] || take_back "$state/service"
        rm -rf "${STATE%/*}/private/${STATE##*/}"
    fi
    rm -f "$state/credential" "$state/credential.new" "$state/facts" "$state/facts.new" \
        "$state/enrolling" "$state/enrolling.new" ||
        quit 1 "cannot write in $state"
    quit 0 "sealed: each machine that starts from this image needs a token"
}

# Quoted for a shell and for systemd.
service_arguments() {
    printf %s "--server '$server' --state '$state${as_service:+/service}' --ask-again $ask_again"
    [ -z "$pin" ] || printf %s " --pin '$pin'"
    [ -z "$cacert" ] || printf %s " --cacert '$cacert'"
    [ -z "$hostname" ] || printf %s " --hostname $hostname"
    [ -z "$insecure" ] || printf %s " $insecure"
}

install_service() {
    if [ -n "$cacert" ]; then
        # All can read it; the file that was given may have a private key, too.
        replace "$AUTHORITIES" 644 "$(sed -n '/PRIVATE KEY-----/,/PRIVATE KEY-----/d
            /-----BEGIN .*CERTIFICATE-----/,/-----END /p' "$cacert")"
        cacert=$AUTHORITIES
    fi
    replace "$UNIT" 644 "$(unit)"
    waited=0
    if [ -n "$replaced$enrolled" ] || ! is_answered || ! systemctl -q is-active "$SERVICE"; then
        [ -z "$owner" ] || ! mkdir "$STATE/service" 2>/dev/null || chown "$owner" "$STATE/service"
        { chmod 711 "$state" && load_credential && store_credential "$credential"; } ||
            put_back "cannot write in $state"
        stopped=''
        { systemctl daemon-reload && systemctl enable "$SERVICE" &&
            systemctl restart "$SERVICE"; } || waited=$LONGEST_START
    fi
    until is_answered; do
        [ "$waited" -lt "$LONGEST_START" ] || leave_unanswered
        sleep 1
        waited=$((waited + 1))
    done
    keep_new
    quit 0 "installed $SERVICE: it starts with the machine; $PROGRAM --uninstall removes it"
}

# Since root has given the service its credential. Without the file find prints that.
is_answered() {
    [ -z "$(find "$STATE/credential" -newer "$STATE/service/answered" 2>&1)" ]
}

leave_unanswered() {
    why=$(systemctl show -p ActiveState,SubState,Result "$SERVICE" | fact)
    why="the server has answered no heartbeat of $SERVICE ($why)"
    [ -z "$updates" ] || put_back "$why"
    keep_new
    quit 1 "$why: it is installed and keeps trying; see journalctl -u $SERVICE"
}

# No ProtectHostname: it would hide a changed hostname. No ProtectProc: the lock's holder.
unit() {
    runs_as=User=$owner
    [ -n "$owner" ] || runs_as="DynamicUser=yes${LINE}LoadCredential=credential:$STATE/credential"
    edits=''
    [ "${systemd:-240}" -ge 240 ] || edits="/^Type=/d;s|^State.*/|ReadWriteDirectories=$STATE/|"
    [ "${systemd:-240}" -ge 239 ] || edits="$edits;/^SystemCall[FE]/d" # no calls in an unknown set
    sed "$edits" <<END
[Unit]
Description=hostenroll agent: heartbeats of this machine
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart=/bin/sh $PROGRAM $(service_arguments)
EnvironmentFile=-$STATE/proxy
Restart=always
RestartSec=60
IgnoreSIGPIPE=no
StateDirectory=${STATE##*/}/service

$runs_as
RestrictAddressFamilies=AF_NETLINK
@UNIT_END@
END
}

uninstall() {
    if [ -f "$UNIT" ] && [ "$user" = 0 ]; then
        systemctl disable --now "$SERVICE" || quit 1 "systemd cannot stop $SERVICE"
        rm -f "$UNIT" "$AUTHORITIES"
        systemctl daemon-reload
        [ ! -d "$STATE/service" ] || [ -L "$STATE/service" ] || take_back "$STATE/service"
    else
        say "if cron has a line for it, remove that: crontab -e"
    fi
    [ ! -f "$state/program" ] || ! (open_folder "$state") ||
        { read -r PROGRAM <"$state/program" && rm -f "$state/program" "$state/proxy"; }
    rm -f "$PROGRAM"
    quit 0 "uninstalled; the credential stays in $state: rm -r removes it"
}

main() {
    # If the environment has one of these names, children would get its new value too.
    unset token credential host_id enrolled_with answer reply config body key renewed used
    unset QUOTING_STYLE # ls would quote what the lock says
    token='' credential='' answer='' reported='' bound=$FIRST_WAIT locked='' slept='' woken=''
    server='' pin='' cacert='' token_file='' hostname='' name='' state='' ask_again=3600
    insecure='' loopback='' once='' act='' owner='' facts='' sent_facts='' enrolled=''
    as_service='' given='' served='' stopped='' boot='' proxy='' prefix=''
    answered='' replaced='' updates='' every='' interval='' tried=''
    umask 077
    set -fuC +e # SHELLOPTS of the environment may have e
    LC_ALL=C
    export LC_ALL
    trap 'woken=yes; end_sleep' USR1
    trap : PIPE # of a log that has ended. Tools have the default: cut off, they end without a word
    read_arguments "$@"
    [ -z "$act" ] || trap '' PIPE # systemctl finishes what it began
    case $(type printf) in
    *builtin*) ;;
    *) quit 1 "printf in this shell would show secrets to others: run this with dash or bash" ;;
    esac
    for tool in cat chmod curl cut date head id ln ls mkdir mv rm sed sleep sync tail tr uname \
        ${act:+chown env find}; do
        command -v "$tool" >/dev/null 2>&1 || quit 1 "$tool is missing: install it"
    done
    [ "$act" = uninstall ] || [ "$act" = seal ] || check_arguments
    find_state
    find_machine
    [ "$act" != uninstall ] || uninstall
    [ "$act" != install ] || check_install
    open_folder "$state"
    [ -n "$act$proxy" ] || [ ! -f "$state/proxy" ] || read_proxy
    [ "$act" != seal ] || seal
    [ "$act" != install ] || check_places
    [ -z "$as_service" ] || take_lock || leave_to_holder
    [ -z "$token_file" ] || enroll
    [ "$act" != install ] || install
    [ -z "$served" ] || leave_to_service
    take_lock || leave_to_holder
    [ -n "$facts" ] || gather_facts
    [ -z "$enrolled" ] || [ -n "$once" ] ||
        say "sending heartbeats until stopped; --install sets up a service"
    [ -n "$enrolled$once" ] || ! load_credential ||
        say "already enrolled as host $host_id, sending heartbeats"
    read_state
    beat_on
}

leave_to_service() {
    [ -n "$enrolled" ] || quit 1 "$SERVICE uses $state: see systemctl status $SERVICE"
    [ -z "$owner" ] || ! mkdir "$STATE/service" 2>/dev/null || chown "$owner" "$STATE/service"
    systemctl try-restart "$SERVICE" || quit 1 "systemd cannot restart $SERVICE"
    systemctl -q is-active "$SERVICE" || quit 0 "$SERVICE does not run: systemctl start $SERVICE"
    quit 0 "$SERVICE now uses the new credential"
}

leave_to_holder() {
    [ -n "$enrolled$act" ] || [ -z "$every" ] || quit 0 # the run before this one still tries
    [ -n "$enrolled" ] ||
        quit 1 "another agent, process ${holder%%-*}, uses $state: stop it, or give --state DIR"
    kill -USR1 "${holder%%-*}"
    quit 0 "another agent, process ${holder%%-*}, uses $state: it now uses the new credential"
}

main "$@"
""".replace("@VERSION@", __version__).replace("@UNIT_END@", UNIT_END)
AGENT_SCRIPT = _SCRIPT.replace("@RELEASED@", RELEASED)


def join_command(url: str, pin: str, token: str = "") -> str:
    """The shell command that makes a machine a host; without a token, the one that renews the
    agent of a machine that is one: script, service, URL and pins.

    The script is fetched into a new private folder, which is removed afterwards: in a folder of
    others it could be exchanged before it runs. The agent's options stand last, so that more can be
    appended; its exit status is that of the command. printf is part of the shell, so the token is
    in no process's arguments, where ps would show it.

    The script is fetched with the same trust in the server as it then gets as options. With a
    self-signed certificate curl needs -k beside the pin, and the pin alone decides; without a pin
    -k would trust any server: hence -q, because a .curlrc may have it. Over plain http curl would
    ignore the pin silently: hence --proto.
    """
    server = urlsplit(url)
    fetch, trust = ["--proto", f"={server.scheme}"], ["--server", url]
    if server.scheme == "https" and pin:
        fetch += ["-k", "--pinnedpubkey", pin]
        trust += ["--pin", pin]
    elif server.scheme == "http" and not is_loopback(server.hostname or ""):
        trust += ["--insecure-http"]
    # No URL and no pin has a character that double quotes do not quote.
    fetch_words = shlex.join([*fetch, f"{url}/agent.sh"]).replace("'", '"')
    given = f"printf %s {shlex.quote(token)} | " if token else ""
    trust += ["--token-file", "-"] if token else ["--install"]
    return (
        f"{given}sh -c 'trap : HUP INT PIPE TERM; d=$(mktemp -d) &&\n"
        f'  curl -q -o "$d/hostenroll-agent" -fsS {fetch_words} &&\n'
        '  sh "$d/hostenroll-agent" "$@"; s=$?; rm -rf "$d"; exit $s\' hostenroll-agent '
        f"{shlex.join(trust)}"
    )


SERVICE_USER = "hostenroll"
UNIT = string.Template(
    """\
[Unit]
Description=hostenroll: enrolls machines and shows which are alive
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart=$start
ExecReload=/bin/kill -HUP $$MAINPID
Restart=on-failure
RestartPreventExitStatus=2
RestartSec=2
TimeoutStartSec=infinity
TimeoutStopSec=10
SyslogIdentifier=hostenroll
LimitNOFILE=8192

# Options go into /etc/default/hostenroll, one on each line: HOSTENROLL_PORT=8443 and so on.
# Commands find the database by themselves: sudo $typed mint-token
Environment=HOSTENROLL_DB=/var/lib/hostenroll/hostenroll.db
EnvironmentFile=-/etc/default/hostenroll
StateDirectory=hostenroll

$runs_as
ProtectHostname=yes
ProtectProc=invisible
@UNIT_END@
""".replace("@UNIT_END@", UNIT_END)
)

WATCH_LINES = {  # of the unit of watch, in the place of others
    "enrolls machines and shows which are alive": "reports changes of hosts",
    "Type=notify": "Type=exec", "ExecReload=/bin/kill -HUP $MAINPID\n": "",
    "SyslogIdentifier=hostenroll": "SyslogIdentifier=hostenroll-watch",
    # It finds that by itself; the options may name a server in its place.
    "Environment=HOSTENROLL_DB=/var/lib/hostenroll/hostenroll.db\n": "",
}  # fmt: skip

BACKUP_LINES = {  # of the unit of the backup; nice(2) is one of those that change resources
    "enrolls machines and shows which are alive": "backs up its database and keys",
    "StartLimitIntervalSec=0": "RequiresMountsFor=@FOLDER@",
    "Type=notify": "Type=oneshot",
    "ExecReload=/bin/kill -HUP $MAINPID\nRestart=on-failure\nRestartPreventExitStatus=2\n"
    "RestartSec=2\n": "",
    "SyslogIdentifier=hostenroll": "SyslogIdentifier=hostenroll-backup",
    "ProtectSystem=strict": "ProtectSystem=strict\nReadWritePaths=@FOLDER@",
    "@privileged @resources": "@privileged @resources\nSystemCallFilter=setpriority",
    "\n[Install]\nWantedBy=multi-user.target\n": "",
}  # fmt: skip

TIMER_UNIT = """\
[Unit]
Description=daily backup of hostenroll

[Timer]
OnCalendar=daily
RandomizedDelaySec=1h
Persistent=true

[Install]
WantedBy=timers.target
"""

SOCKET_UNIT = """\
[Unit]
Description=hostenroll socket

[Socket]
ListenStream=443
NoDelay=yes
Backlog=4096

[Install]
WantedBy=sockets.target
"""


# The page: one document that fetches nothing but the API. Style and script are inside it, and its
# content security policy names them by their hashes. It needs a browser from recent years. It is
# public: everything that it shows comes from the API, with the API key that a person signs in with.

PAGE_STYLE = """
/* Colours are named by meaning. Text has a contrast of at least 4.5 on every background. Health is
   quiet: only what is offline is red, and one button of a screen is filled. */
:root {
  color-scheme: light dark;
  --ground: #fcfcfd; --card: #ffffff; --sunk: #f3f4f6; --line: #e4e7eb; --edge: #858e99;
  --text: #16191d; --quiet: #5d6773; --accent: #1d5fd1; --on-accent: #ffffff;
  --offline: #c6282d; --alarm: #fdf0f0; --missing: #8a5300; --pending: #1d5fd1; --online: #1a7f43;
  --revoked: #6b5a9e; --selected: #eef4ff; --notice: #fff6df; --shade: rgb(10 14 20 / 40%);
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #0e1013; --card: #14171b; --sunk: #1c2025; --line: #282d34; --edge: #6b747f;
    --text: #e9ecef; --quiet: #98a2ad; --accent: #7ab0ff; --on-accent: #0b1220;
    --offline: #ff8a85; --alarm: #2a1617; --missing: #eeb15f; --pending: #7ab0ff;
    --online: #58c983; --revoked: #b8a6ec; --selected: #17233a; --notice: #322a12;
    --shade: rgb(0 0 0 / 60%);
  }
}
*, ::before, ::after { box-sizing: border-box; }
[hidden], :is(p, div, span):empty { display: none !important; }
html { -webkit-text-size-adjust: 100%; scroll-padding: 3.5rem 0 4rem; }
body {
  margin: 0; background: var(--ground); color: var(--text); font-variant-numeric: tabular-nums;
  font: .875rem/1.25rem system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
h1, h2, h3, p, ul, ol, dl, dd, pre { margin: 0; padding: 0; list-style: none; }
header b { font-size: .9375rem; letter-spacing: -.01em; }
h1, h2 { font-size: 1.125rem; line-height: 1.5rem; overflow-wrap: anywhere; }
h3 { font-weight: 500; color: var(--quiet); }
a { color: inherit; text-decoration: none; }
a:hover, p a { text-decoration: underline; text-underline-offset: .2em; }
code, pre, .mono, kbd { font: .78rem/1.25rem ui-monospace, Menlo, Consolas, monospace; }
.quiet, dt { color: var(--quiet); }
h3, .small, .foot, thead th { font-size: .75rem; }
.problem { color: var(--offline); overflow-wrap: anywhere; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
#skip:not(:focus) { position: absolute; left: -999rem; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; border-radius: 4px; }
main:focus, h2:focus, aside:focus { outline: none; }
kbd { padding: 0 .3rem; border: 1px solid var(--line); border-radius: 4px; }
.row, .foot, .incident, .banner, #selection, .top, .top form, .segments {
  display: flex; flex-wrap: wrap; gap: .5rem; align-items: center;
}
.why, .command, .notice, .incident, pre, #arrivals {
  padding: .625rem .875rem; border-radius: 8px; background: var(--sunk); overflow-wrap: anywhere;
}
#sign-in, .menu > div, #selection, aside, dialog {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}

/* Controls: small for a mouse, as large as a thumb without one. */
button, input, select, textarea, summary, .button {
  min-height: 2rem; padding: .25rem .75rem; max-width: 100%; font: inherit; color: inherit;
  background: var(--card); border: 1px solid var(--line); border-radius: 6px;
}
input, select, textarea { border-color: var(--edge); }
input[type=checkbox] { min-height: 0; width: 1rem; height: 1rem; vertical-align: middle; }
::placeholder { color: var(--quiet); opacity: 1; }
textarea { width: 100%; min-height: 5rem; }
button, summary, .button { cursor: pointer; font-weight: 500; white-space: nowrap; }
button:not(.main):hover:enabled, .menu summary:hover { background: var(--sunk); }
button:disabled { opacity: .5; cursor: default; }
.button { display: inline-flex; align-items: center; }
button.main { background: var(--accent); border-color: var(--accent); color: var(--on-accent); }
button.main:hover:enabled { filter: brightness(1.1); }
button.danger { color: var(--offline); }
button.main.danger { background: var(--offline); border-color: transparent; color: var(--card); }
button.plain, summary { border-color: transparent; background: none; }
details:not(.menu) summary { padding-left: 0; }
label { display: grid; gap: .25rem; font-weight: 500; }
label > * { font-weight: 400; }
.end { margin-left: auto; }
.menu { position: relative; }
.menu summary { display: flex; align-items: center; }
.menu > div { position: absolute; right: 0; z-index: 4; display: grid; padding: .25rem; }
.menu > div button { border: 0; text-align: left; font-weight: 400; }
.menu > div, #selection { box-shadow: 0 4px 20px var(--shade); }

header {
  position: sticky; top: 0; z-index: 3; display: flex; align-items: center; gap: .25rem 1rem;
  padding: .4375rem 1.25rem; background: var(--card); border-bottom: 1px solid var(--line);
}
nav { display: flex; gap: .25rem; flex: 1; overflow-x: auto; }
nav a { padding: .25rem .625rem; border-radius: 6px; }
nav a, #tabs a { color: var(--quiet); font-weight: 500; }
nav a[aria-current=page] { background: var(--sunk); color: var(--text); }
#live::before, .status::before { content: ""; flex: none; width: .5rem; height: .5rem;
  display: inline-block; border-radius: 50%; background: currentColor; forced-color-adjust: none; }
#live::before { margin-right: .4rem; background: var(--online); }
.banner { position: sticky; top: 0; z-index: 5; padding: .5rem 1.25rem; background: var(--notice); }
main { max-width: 108rem; margin: 0 auto; padding: 0 1.25rem 2rem; }
main > section { display: grid; gap: .75rem; grid-template-columns: minmax(0, 1fr); }
#sign-in { max-width: 26rem; margin-top: 12vh; padding: 2rem; }
#sign-in form { display: grid; gap: 1rem; }

/* The tabs of the hosts: a count for each status, and the share of each as a line below. */
.top { align-items: end; padding-top: .625rem; min-height: 3rem; }
.top form { margin: 0 0 .25rem auto; }
.top input { width: 18rem; }
#tabs { display: flex; gap: .125rem; overflow-x: auto; scrollbar-width: none; }
#tabs a { padding: .375rem .625rem; white-space: nowrap; border-bottom: 2px solid transparent; }
#tabs a[aria-current] { color: var(--text); border-color: var(--text); }
#tabs b { color: var(--text); font-weight: 600; }
#tabs .offline:not([data-count="0"]) b { color: var(--offline); }
#shares, #day { display: flex; background: var(--sunk); }
#shares { height: 3px; margin-top: -.75rem; }
#shares i, #day i { background: currentColor; }

/* A status is a word, a shape and a colour: nothing depends on the colour alone. */
.status { display: inline-flex; align-items: center; gap: .5rem; font-weight: 500; }
.status b { display: inline-block; font-weight: inherit; }
.status b::first-letter { text-transform: uppercase; }
.offline { color: var(--offline); }
.missing, .expired { color: var(--missing); }
.pending { color: var(--pending); }
.revoked { color: var(--revoked); }
.online, .valid { color: var(--online); }
.used, .status.online { color: var(--quiet); }
.status:is(.online, .valid)::before { background: var(--online); }
.status.offline::before { clip-path: polygon(50% 0, 100% 100%, 0 100%); border-radius: 0; }
.status:is(.missing, .expired)::before { transform: rotate(45deg) scale(.85); border-radius: 0; }
.status.pending::before { background: none; border: 2px solid; }
.status:is(.revoked, .used)::before { height: 2px; border-radius: 0; }
.was, .stale #live { display: none; }
.stale .was { display: inline; }
.stale .status b::first-letter { text-transform: none; }
.stale :is(table, aside, #tabs, #shares) { opacity: .55; }

/* Lists: one line a row, columns that stay where they are. What does not fit is in the title. */
.split { display: flex; gap: 1.25rem; align-items: start; }
.list { flex: 1; min-width: 0; container-type: inline-size; }
table { width: 100%; border-collapse: collapse; table-layout: fixed; }
th, td { height: 2.25rem; padding: 0 .625rem; text-align: left; font-weight: 400;
  border-bottom: 1px solid var(--line); }
th, td, .label { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
thead th { height: 1.875rem; color: var(--quiet); font-weight: 500; }
thead button { min-height: 1.75rem; padding: 0; border: 0; background: none !important; }
[aria-sort=ascending] button::after { content: " ↑"; }
[aria-sort=descending] button::after { content: " ↓"; }
tbody tr:hover > * { background: var(--sunk); }
tr.chosen > *, tr:has(:checked) > * { background: var(--selected); }
tr.chosen > :first-child { box-shadow: inset 3px 0 var(--accent); }
tr.day > * { vertical-align: bottom; background: none !important; font-weight: 600; }
[data-open] { cursor: pointer; }
td button { min-height: 1.75rem; padding: 0 .5rem; }
.c-host, .c-token, .c-key { width: 26%; }
.c-host input { margin-right: .75rem; }
.c-host a { font-weight: 550; }
.c-status { width: 11.5rem; }
.c-system, .c-address, .c-expires, .c-used, .c-last-used { width: 8.75rem; }
.c-last-seen, .c-time, .c-enrolled, .c-role, .c-state, .c-organization { width: 7.25rem; }
.c-acts { width: 6.5rem; text-align: right; }
body:not(.several) :is(.c-organization, [data-organizations]) { display: none; }
.label { display: inline-block; margin-right: .25rem; padding: 0 .4rem; border-radius: 4px;
  max-width: 100%; background: var(--sunk); font-size: .75rem; vertical-align: middle; }
.label i { font-style: normal; color: var(--quiet); }
#chips button { background: var(--sunk); }
.foot { gap: .5rem 1rem; min-height: 2.5rem; padding: .375rem .625rem; color: var(--quiet); }
.nothing { padding: 2.5rem 1rem; text-align: center; }
.bones { height: 18rem;
  background: repeating-linear-gradient(var(--sunk) 0 1.25rem, transparent 0 2.25rem); }
.incident, .why { border-left: 3px solid; border-radius: 0 8px 8px 0; }
.incident, .why.offline { background: var(--alarm); }
.incident { border-color: var(--offline); }
.incident > div { flex: 1 1 16rem; }
#start, .empty #hosts > :not(#start) { display: none; }
.empty #start { display: grid; justify-self: center; gap: 1rem; padding: 4rem 0; }
#start li { list-style: decimal inside; padding: .25rem 0; }
#selection { position: sticky; bottom: .5rem; z-index: 2; justify-self: center; padding: .5rem; }

/* A host: beside the list where there is room, else over it. */
aside { width: 26.25rem; flex: none; padding: 1rem 1.25rem; overflow-y: auto; }
aside, dialog > * { display: grid; grid-template-columns: minmax(0, 1fr); gap: .75rem; }
aside .title { display: flex; justify-content: space-between; align-items: start; }
.why { display: grid; gap: .25rem; }
.why p:not(.quiet) { color: var(--text); }
.notice { background: var(--notice); }
.command { display: flex; gap: .5rem; align-items: center; padding: .25rem .25rem .25rem .75rem; }
.command code { flex: 1; }
.command button { min-height: 1.625rem; padding: 0 .5rem; font-size: .75rem; }
#day { height: 1.375rem; border-radius: 3px; overflow: hidden; }
#day i:not(.none) { min-width: 2px; }
#day .none { color: var(--line); }
dl, .history li { display: grid; grid-template-columns: 6rem minmax(0, 1fr); gap: .25rem .75rem; }
dd, li { overflow-wrap: anywhere; }
@media (min-width: 68.75rem) {
  aside { position: sticky; top: 3.75rem; max-height: calc(100vh - 4.5rem); }
}
@media (max-width: 68.74rem) {
  aside { position: fixed; inset: 0 0 0 auto; z-index: 6; width: min(28rem, 100vw);
    border-width: 0 0 0 1px; border-radius: 0; box-shadow: 0 0 40px var(--shade); }
}
dialog { width: min(42rem, 100vw - 1.5rem); max-height: calc(100dvh - 1.5rem); padding: 0;
  color: inherit; }
dialog::backdrop { background: var(--shade); }
dialog > * { gap: .875rem; padding: 1.25rem 1.5rem; }
pre { overflow-x: auto; }
.fields { display: grid; grid-template-columns: 1fr 1fr; gap: .875rem 1rem; align-items: start; }
.fields .wide { grid-column: 1 / -1; }
.segments [aria-pressed=true] { background: var(--sunk); border-color: var(--edge); }

@container (max-width: 73rem) { .c-enrolled, #hosts .c-organization { display: none; } }
@container (max-width: 52rem) { .c-system, .c-created, .c-limits { display: none; } }
@container (max-width: 40rem) { #hosts .c-labels, .c-last-used { display: none; } }
@container (max-width: 34rem) { /* rows of two lines */
  table, tbody { display: block; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  tr { display: grid; grid-template-columns: minmax(0, 1fr) auto; padding: .375rem 0;
    border-bottom: 1px solid var(--line); }
  th, td { height: auto; padding: 0 .25rem; border: 0; width: auto !important; }
  .c-host input, .c-last-seen, .hostname, .c-organization { display: none; }
  #hosts tbody .c-labels { display: block; order: 4; text-align: right; max-width: 55cqw; }
  .c-labels .label:nth-child(n + 3) { display: none; }
  .c-status, .c-state { text-align: right; }
  .c-address { order: 3; color: var(--quiet); }
  #audit td { white-space: normal; grid-column: 1 / -1; }
}
@media (max-width: 40rem) {
  header { flex-wrap: wrap; gap: 0 .25rem; padding: .25rem .75rem; position: static; }
  header b { flex: 1 1 0; overflow: hidden; }
  nav { order: 9; flex: 1 0 100%; }
  header :is(button, summary) { padding: 0 .5rem; }
  main { padding: 0 .75rem 2rem; }
  .top { padding-top: .25rem; gap: .375rem; }
  .top form { order: -1; width: 100%; margin: 0; }
  .top form > * { flex: 1; min-width: 8rem; }
  #live { display: none; }
  .fields { grid-template-columns: 1fr; }
}
@media (pointer: coarse) {
  button, input:not([type=checkbox]), select, summary, .button { min-height: 2.75rem; }
  #tabs a, nav a { padding-block: .75rem; }
  td button, .command button, thead button { min-height: 2rem; }
}
@media (forced-colors: active) {
  tr.chosen > * { outline: 1px solid Highlight; outline-offset: -1px; }
  :is([aria-current=page], [aria-current=true], [aria-pressed=true]) { text-decoration: underline; }
}
"""

PAGE_MARKUP = """
<button id="skip">Skip to the content</button>
<div class="banner" id="trouble" role="alert" hidden><span id="trouble-text"></span>
  <span id="retry-in" aria-live="off"></span><button id="retry">Retry now</button></div>
<p class="unseen" id="announcer" role="status"></p>
<noscript><p class="banner">This page needs JavaScript. The command line can do the same:
hostenroll.py --help.</p></noscript>

<main id="sign-in" hidden>
  <form autocomplete="off">
    <div><h1>hostenroll</h1><p class="quiet">Enroll machines and see which are alive.</p></div>
    <label>API key
      <input id="key" type="password" required autocomplete="off" spellcheck="false"
        placeholder="hak_..." aria-describedby="key-help sign-in-problem"></label>
    <p class="small quiet" id="key-help">Kept in this tab only. Create one on the server:<br>
      <code>python3 hostenroll.py mint-api-key --all-orgs</code></p>
    <p class="problem" id="sign-in-problem" role="alert"></p>
    <button class="main">Sign in</button>
  </form>
</main>
<div id="signed-in" hidden>
<header>
  <b>hostenroll</b>
  <nav aria-label="Views"><a href="#hosts">Hosts</a><a href="#tokens">Tokens</a>
    <a href="#audit">Audit</a><a href="#keys" data-admin>Keys</a></nav>
  <span class="small quiet" id="live"></span>
  <details class="menu"><summary id="who"></summary>
    <div><button data-help>Keyboard shortcuts</button>
      <button data-update>Update or move an agent</button>
      <button id="sign-out">Sign out</button></div></details>
  <button class="main" data-admin data-add>Add host</button>
</header>
<main id="main" tabindex="-1"><section id="hosts" aria-labelledby="hosts-title">
  <h1 class="unseen" id="hosts-title">Hosts</h1>
  <div class="top">
    <div id="tabs" role="group" aria-label="Hosts by status"></div>
    <form role="search" data-filters>
      <select name="organization" aria-label="Organization" data-organizations></select>
      <input type="search" name="q" maxlength="255" autocomplete="off" spellcheck="false"
             aria-label="Search hosts" placeholder="Search name, address, label   /">
    </form>
  </div>
  <div id="shares" aria-hidden="true"></div><div class="row" id="chips"></div>
  <div class="incident" id="incident" role="status" hidden></div>
  <div id="start">
    <h2>No hosts yet</h2>
    <ol><li>Choose Add host: you get one command.</li>
      <li>Run it on a machine. It enrolls, and installs a service.</li>
      <li>The machine is online here within seconds.</li></ol>
    <div><button class="main" data-admin data-add>Add host</button></div>
  </div>
  <div class="split">
    <div class="list"></div>
    <aside id="host" role="region" aria-labelledby="host-name" tabindex="-1" hidden>
      <div class="title">
        <div><h2 id="host-name" tabindex="-1"></h2>
          <span class="quiet" id="host-hostname" data-part></span></div>
        <button class="plain" id="host-close" aria-label="Close">&#x2715;</button>
      </div>
      <div class="why" id="host-why" data-part></div><div id="host-warnings" data-part></div>
      <div id="host-command"><p class="quiet">On the machine:</p>
        <div class="command"><code id="on-machine">systemctl status hostenroll-agent</code>
          <button data-copy="on-machine">Copy</button></div></div>
      <div id="host-day"><h3 id="day-title"></h3><div id="day" role="img"></div></div>
      <dl id="host-facts" data-part></dl>
      <div class="row" id="host-acts">
        <button data-act="edit">Edit</button><button data-act="reenroll">Re-enroll</button>
        <button data-act="revoke">Revoke</button><button data-act="restore">Restore</button>
        <details class="menu end"><summary aria-label="More actions">&#x22ef;</summary>
          <div><button data-act="mute">Mute</button><button data-update>Update its agent</button>
            <button class="danger" data-act="delete">Delete</button></div></details>
      </div>
      <h3>History</h3><ul class="history" id="host-history" data-part></ul>
      <p class="small"><a id="host-log">View in the audit log</a></p>
    </aside>
  </div>
  <div id="selection" role="group" aria-label="Selected hosts" hidden>
    <b id="selected-count"></b><button data-many="label">Label</button>
    <button data-many="mute">Mute</button><button data-many="revoke">Revoke</button>
    <button data-many="restore">Restore</button><button class="danger" data-many="delete">Delete
    </button><button class="plain" id="unselect">Clear</button>
  </div>
</section>
<section id="tokens" aria-labelledby="tokens-title" hidden>
  <div class="top"><h1 id="tokens-title">Tokens</h1>
    <form data-filters>
      <select name="state" aria-label="State"><option value="">all states</option>@STATES@
      </select></form></div>
  <div class="list"></div>
</section>
<section id="audit" aria-labelledby="audit-title" hidden>
  <div class="top"><h1 id="audit-title">Audit log</h1>
    <form data-filters>
      <select name="organization" aria-label="Organization" data-organizations></select>
      <select name="action" aria-label="Action"><option value="">all actions</option>@ACTIONS@
      </select><input type="search" name="subject" maxlength="128" spellcheck="false"
        aria-label="Target" placeholder="host:ID or token:ID">
      <input type="search" name="code" maxlength="64" spellcheck="false"
        aria-label="Refusal code" placeholder="refusal: token-used"></form></div>
  <div class="list"></div>
</section>
<section id="keys" aria-labelledby="keys-title" hidden>
  <div class="top"><h1 id="keys-title">API keys</h1>
    <button class="end" id="add-key">Create API key</button></div>
  <div class="list"></div>
</section>
</main>
</div>
<dialog id="form" aria-labelledby="form-title">
  <form autocomplete="off">
    <h2 id="form-title"></h2><p id="form-text"></p>
    <div class="fields" id="form-fields"></div>
    <details id="form-options"><summary>Options</summary>
      <div class="fields" id="form-more"></div></details>
    <p class="problem" id="form-problem" role="alert"></p>
    <div class="row"><button class="main" id="form-go"></button>
      <button type="button" data-close>Cancel</button></div>
  </form>
</dialog>
<dialog id="secret" aria-labelledby="secret-title">
  <div>
    <h2 id="secret-title"></h2>
    <div id="ways" class="segments" role="group" aria-label="How the agent runs"></div>
    <p class="quiet" id="secret-text"></p>
    <pre id="join" tabindex="0" role="group" aria-label="The command"></pre>
    <div class="row"><button class="main" data-copy="join">Copy</button>
      <button data-close>Done</button><span class="quiet end" id="secret-meta"></span></div>
    <p class="problem" id="secret-warning"></p><div id="arrivals" role="status"></div>
    <div class="notice row" id="secret-ask" role="alert" hidden>
      <span>This token is unused, and it cannot be shown again.</span>
      <button data-close>Close anyway</button></div>
  </div>
</dialog>
<dialog id="help" aria-labelledby="help-title">
  <div>
    <h2 id="help-title">Keyboard shortcuts</h2>
    <dl>
      <dt><kbd>j</kbd> <kbd>k</kbd></dt><dd>next, previous host (also the arrow keys)</dd>
      <dt><kbd>Enter</kbd></dt><dd>open the host</dd>
      <dt><kbd>Esc</kbd></dt><dd>close it, or clear the selection</dd>
      <dt><kbd>x</kbd></dt><dd>select; with Shift, a range</dd>
      <dt><kbd>/</kbd></dt><dd>search; write a label as key=value</dd>
      <dt><kbd>a</kbd></dt><dd>add a host</dd>
    </dl>
    <div><button data-close>Close</button></div>
  </div>
</dialog>
"""

PAGE_SCRIPT = r"""
// Texts of hosts and people go into text nodes and text attributes, never into markup. The URL's
// fragment names what is shown, so that links, reload and the back button work. The API key is in
// sessionStorage; a token is nowhere but in the dialog that shows it. Sentences are the server's:
// the page formats only times.

const KEY = "hostenroll.key";
const STATUSES = ["offline", "missing", "pending", "online", "revoked"];
const MEANINGS = {
  offline: "It has missed heartbeats.", missing: "Offline for more than 7 days.",
  pending: "Enrolled, no heartbeat yet.", online: "Its heartbeats arrive.",
  revoked: "Its heartbeats are refused until you restore it.",
};
const ROWS = 100; // asked for at once
const ROWS_MOST = 1000; // shown, and acted on at once
const ROWS_EXAMINED = 1000; // about as many as the server examines for one request
const ANSWER_MS = 15000; // longer than the server waits for another writer
const DAY_MS = 86400000;
const NUMBER = new Intl.NumberFormat();
const format = (options) => new Intl.DateTimeFormat(undefined, options);
const CLOCK = format({hour: "2-digit", minute: "2-digit", second: "2-digit"});
const DATE = format({day: "numeric", month: "short"});
const MINUTE = format({day: "numeric", month: "short", hour: "2-digit", minute: "2-digit"});
const DAY = format({weekday: "long", day: "numeric", month: "long", year: "numeric"});
const EXACT = format({dateStyle: "medium", timeStyle: "long"});

const $ = (id) => document.getElementById(id);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const count = (number, one) => `${NUMBER.format(number)} ${one}${number === 1 ? "" : "s"}`;
const announce = (text) => { $("announcer").textContent = text; }; // to a screen reader

/** An element with attributes and children; a string becomes a text node. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const button = (text, act, attributes = {}) =>
  Object.assign(make("button", {type: "button", ...attributes}, text), {onclick: act});

/** Replace an element's children, but only if they differ: focus and selection stay. */
function show(element, ...children) {
  const fresh = make("div", {}, ...children);
  const now = element.childNodes;
  const same = now.length === fresh.childNodes.length &&
    [...now].every((node, n) => node.isEqualNode(fresh.childNodes[n]));
  if (!same) element.replaceChildren(...fresh.childNodes);
}

// Time: by the server's clock, because the browser's may be wrong.

let skew = 0;
const now = () => Date.now() + skew;

/** 42 s, 1 min 42 s, 38 min, 3 h 43 min, 9 days. */
function duration(ms) {
  const seconds = Math.max(0, Math.round(ms / 1000));
  const [days, hours, minutes] = [86400, 3600, 60].map((size) => Math.floor(seconds / size));
  const rest = (word, left) => left ? ` ${left} ${word}` : "";
  if (days) return days > 1 ? `${days} days` : `1 day${rest("h", hours % 24)}`;
  if (hours) return `${hours} h${rest("min", minutes % 60)}`;
  return minutes ? `${minutes} min${minutes < 10 ? rest("s", seconds % 60) : ""}` : `${seconds} s`;
}

const isRecent = (at) => Math.abs(now() - at) < 0.8 * DAY_MS;
const TIMES = { // how a time is shown
  ago: (at) => at > now() + 1500 ? `in ${duration(at - now())}` : `${duration(now() - at)} ago`,
  age: (at) => duration(now() - at),
  time: (at) => CLOCK.format(at),
  date: (at) => (isRecent(at) ? CLOCK : DATE).format(at),
  minute: (at) => (isRecent(at) ? CLOCK : MINUTE).format(at),
};

function when(time, shown = "ago") {
  const at = Date.parse(time);
  return make("time", {datetime: time, title: `${EXACT.format(at)}, ${time}`, "data-shown": shown},
    TIMES[shown](at));
}

// The server.

/** The server has refused the request. */
class Refusal extends Error {
  constructor({title, detail = "", status, cursor, errors = []}) {
    super([`${title}. ${detail}`, ...errors.map((it) => `${it.field} ${it.detail}.`)].join(" "));
    Object.assign(this, {status, cursor, fields: errors.map((it) => it.field)});
  }
}

/** There was no answer, or one that this server would not send. */
class NoAnswer extends Error {
  message = "No answer from the server. It may or may not have worked: check the list first.";
}

/** The answer is not wanted any more. */
class Stale extends Error {}

// A proxy may serve this page under any path, with or without a slash at its end.
const PLACE = location.origin + location.pathname.replace(/\/*$/, "/");

/** The document of an answer. Throws a Refusal; if the API key was refused, the page signs out. */
async function ask(method, path, {query = "", body, stop = new AbortController()} = {}) {
  const signal = AbortSignal.any([AbortSignal.timeout(ANSWER_MS), stop.signal]);
  const headers = {Authorization: `Bearer ${sessionStorage.getItem(KEY)}`};
  let response, text;
  try {
    response = await fetch(PLACE + (`${query}` ? `${path}?${query}` : path), {method, headers,
      signal, body: body && JSON.stringify(body), cache: "no-store", credentials: "omit",
      redirect: "error"});
    text = await response.text();
  } catch (error) {
    throw stop.signal.aborted ? new Stale() : new NoAnswer("", {cause: error});
  }
  if (stop.signal.aborted) throw new Stale();
  const type = response.headers.get("Content-Type") ?? "";
  if (!response.ok && !type.startsWith("application/problem+json")) throw new NoAnswer();
  const date = Date.parse(response.headers.get("Date"));
  if (date) skew = date - Date.now();
  const answer = text && JSON.parse(text);
  if (response.ok) return answer;
  const refusal = new Refusal(answer);
  if (refusal.status === 401) signOut(refusal.message);
  throw refusal;
}

/** Show a failure of a request that the page made by itself. */
function report(error) {
  if (error instanceof Stale || error.status === 401) return;
  if (!(error instanceof NoAnswer || error instanceof Refusal)) console.error(error);
  if (!$("trouble").hidden) return;
  const time = CLOCK.format(now());
  document.body.classList.toggle("stale", error instanceof NoAnswer);
  $("trouble-text").textContent = error instanceof NoAnswer
    ? `Server unreachable since ${time}. Showing data from then.` : `${error.message} (${time})`;
  $("trouble").hidden = false;
}

/** A request that is repeated while the page is visible. The pause is at least ten times as long as
    the request took, also after a failure: a page that is left open costs the server at most a
    tenth of its time, also when the server is in trouble. */
class Poll {
  constructor(pause, run, isWanted = () => true) {
    Object.assign(this, {pause, run, isWanted, due: 0, turn: null});
  }

  tick() {
    if (!this.turn && performance.now() >= this.due && this.isWanted()) this.go();
  }

  async go() {
    const turn = this.turn = {};
    const since = performance.now();
    try {
      await this.run();
      if (this.turn === turn) {
        $("trouble").hidden = true;
        document.body.classList.remove("stale");
      }
    } catch (error) {
      report(error);
    }
    const pause = Math.max(this.pause, 10 * (performance.now() - since));
    if (this.turn === turn) Object.assign(this, {turn: null, due: performance.now() + pause});
  }
}

// Lists: one class for hosts, tokens, events and keys.

/** A list of the API. The server examines a limited number of rows for each request, so what is
    shown may need several. Another filter or another view stops a search. */
class List {
  constructor(view, options) {
    Object.assign(this, {
      view, items: (rows) => rows, signature: JSON.stringify, attributes: () => ({}),
      query: (asked) => asked, took: () => {}, total: () => 0, ...options,
    });
    this.poll = new Poll(5000, () => this.look(), () => here().view === view);
    this.build();
    this.begin(null);
  }

  build() {
    const heads = this.columns.map(([title, , head = [title]]) =>
      make("th", {scope: "col", role: "columnheader", class: columnClass(title)}, ...head));
    this.body = make("tbody", {role: "rowgroup"});
    this.summary = make("span");
    this.more = button("Show more", () => this.goOn());
    this.nothing = make("p", {class: "nothing quiet"});
    this.bones = make("div", {class: "bones"}, " "); // in place of rows that are on their way
    this.table = make("table", {role: "table", "aria-labelledby": `${this.view}-title`},
      make("thead", {role: "rowgroup"}, make("tr", {role: "row"}, ...heads)), this.body);
    this.foot = make("div", {class: "foot"}, this.summary, this.more);
    $(this.view).querySelector(".list").append(this.table, this.bones, this.nothing, this.foot);
    this.body.onmouseover = ({target}) => {
      const cell = target.closest("th, td");
      if (cell && cell.scrollWidth > cell.clientWidth) cell.title = cell.innerText;
    };
    new IntersectionObserver(([seen]) => seen.isIntersecting && this.goOn()).observe(this.more);
  }

  /** Show other filters from the first row; the same ones are refreshed by the poll. */
  ask(filters) {
    if (filters === this.filters) return;
    this.begin(filters);
    this.take([], "", 0);
    this.poll.go();
  }

  begin(filters) {
    this.stop?.abort();
    Object.assign(this, {filters, rows: [], next: "", looked: 0, at: 0, wanted: ROWS,
      isLoaded: false, refused: ""});
  }

  goOn() {
    Object.assign(this, {wanted: Math.min(this.rows.length + ROWS, ROWS_MOST), isLoaded: false});
    this.more.hidden = true; // for a frame: the observer reports only that it is seen again
    requestAnimationFrame(() => this.poll.go());
  }

  /** Ask until enough rows are there or the list has ended. Rows that are already shown are
      replaced only when all of them have been loaded again. */
  async look() {
    if (this.refused) return;
    const isQuiet = this.isLoaded;
    let [rows, cursor, looked] = isQuiet ? [[], "", 0] : [this.rows, this.next, this.looked];
    this.stop?.abort();
    const stop = this.stop = new AbortController();
    try {
      do {
        const query = this.query(new URLSearchParams(this.filters));
        query.set("limit", this.wanted - rows.length);
        if (cursor) query.set("cursor", cursor);
        const page = await ask("GET", this.path, {query, stop});
        const there = new Set(rows.map(keyOf)); // one may have moved meanwhile
        rows = rows.concat(page[this.name].filter((row) => !there.has(keyOf(row))));
        cursor = page.nextCursor ?? "";
        looked += ROWS_EXAMINED;
        this.took(page);
        if (!isQuiet) this.take(rows, cursor, looked);
      } while (cursor && rows.length < this.wanted);
      Object.assign(this, {isLoaded: true, at: now()});
      this.take(rows, cursor, looked);
      if (!isQuiet) announce(this.summary.textContent);
    } catch (error) {
      if (!(error instanceof Refusal) || error.status >= 500) throw error;
      this.refused = error.message;
      this.take(this.rows, "", this.looked);
    }
  }

  take(rows, next, looked) {
    Object.assign(this, {rows, next, looked});
    const changed = reconcile(this.body, this.items(rows), this);
    markOpen();
    if (changed.length > 3) announce(`${changed.length} hosts have changed status.`);
    else if (changed.length) announce(changed.map((h) => `${h.name} is ${h.status}.`).join(" "));
    this.state();
  }

  row(item) {
    const cells = item.day ? [make("th", {role: "rowheader", colspan: 3}, item.day)]
      : this.columns.map(([title, cell], n) => make(n ? "td" : "th",
        {role: n ? "cell" : "rowheader", class: columnClass(title)}, ...cell(item)));
    return make("tr", {role: "row", "data-key": keyOf(item), "data-status": item.status ?? "",
      class: item.day ? "day" : "", ...this.attributes(item)}, ...cells);
  }

  /** Update what stands below the rows. */
  state() {
    const isFull = this.rows.length >= ROWS_MOST;
    const total = this.total(new URLSearchParams(this.filters), !this.isLoaded);
    const of = total ? ` of ${NUMBER.format(total)}` : "";
    const found = NUMBER.format(this.rows.length);
    const looked = NUMBER.format(Math.min(this.looked, total || Infinity));
    this.table.setAttribute("aria-busy", !this.isLoaded);
    this.summary.textContent = this.refused ||
      (!this.isLoaded ? `Searching: ${looked}${of}, ${found} found`
        : this.next ? `1-${found}${of}${isFull ? ": search or filter to see others" : ""}`
          : count(this.rows.length, this.one));
    this.summary.classList.toggle("problem", Boolean(this.refused));
    this.bones.hidden = this.isLoaded || this.looked > 0 || Boolean(this.refused);
    this.more.hidden = !this.isLoaded || isFull || !this.next;
    this.foot.hidden = this.isLoaded && !this.rows.length;
    this.nothing.hidden = !this.foot.hidden;
    show(this.nothing, ...(this.filters ? [`No ${this.one} matches. `,
      make("a", {href: `#${this.view}`}, "Clear filters")] : [this.empty]));
  }
}

const columnClass = (title) => `c-${title.toLowerCase().replaceAll(" ", "-")}`;
const keyOf = (item) => String(item.id ?? item.number ?? item.day);
const signatures = new WeakMap(); // of the rows that are shown: what they show

/** Make a table's body show the items. Rows and cells that did not change are not touched, so that
    focus, selection and scroll stay. Returns the items whose status changed. */
function reconcile(body, items, list) {
  const focused = body.contains(document.activeElement)
    ? document.activeElement.closest("tr").sectionRowIndex : -1;
  const keys = new Set(items.map(keyOf));
  for (const tr of [...body.rows]) if (!keys.has(tr.dataset.key)) tr.remove();
  const shown = new Map([...body.rows].map((tr) => [tr.dataset.key, tr]));
  const changed = [];
  let place = body.firstElementChild;
  for (const item of items) {
    const signature = list.signature(item);
    let tr = shown.get(keyOf(item));
    if (!tr || signatures.get(tr) !== signature) {
      const fresh = list.row(item);
      tr ??= fresh;
      if (tr.dataset.status !== fresh.dataset.status) changed.push(item);
      tr.dataset.status = fresh.dataset.status;
      if (tr !== fresh) [...fresh.cells].forEach((cell, n) => {
        if (!tr.cells[n].isEqualNode(cell)) tr.cells[n].replaceWith(cell);
      });
      signatures.set(tr, signature);
    }
    if (tr === place) place = place.nextElementSibling;
    else body.insertBefore(tr, place);
  }
  if (focused >= 0 && !body.contains(document.activeElement)) {
    body.rows[Math.min(focused, body.rows.length - 1)]?.querySelector("a, button")?.focus();
  }
  return changed;
}

// Cells for hosts, tokens, events and keys.

const quiet = (...children) => make("span", {class: "quiet"}, ...children);
const mono = (text) => make("span", {class: "mono"}, text);
/** A list of one child, or of none for an empty value. */
const some = (value, shown = (item) => item) => value ? [shown(value)] : [];

/** A status with its age. While the server does not answer, it is what the status was. */
function status(word, time) {
  return make("span", {class: `status ${word}`, title: MEANINGS[word] ?? ""}, make("span", {},
    make("span", {class: "was"}, "was "), make("b", {}, word),
    ...(time && word !== "online" ? [" ", when(time, "age")] : [])));
}

/** The view that the fragment names, and its parameters. */
function here() {
  const [view, asked] = location.hash.slice(1).split("?", 2);
  return {view: Object.hasOwn(lists, view) ? view : "hosts", asked: new URLSearchParams(asked)};
}

/** The fragment for a view and its parameters. */
function fragment(view, asked) {
  const query = new URLSearchParams(asked).toString();
  return query ? `#${view}?${query}` : `#${view}`;
}

/** The parameters of the hosts that are shown; none in another view. */
const hostsAsked = () => here().view === "hosts" ? here().asked : new URLSearchParams();

/** A link that opens a host, beside the list of hosts. */
function hostLink(id, text, attributes = {}) {
  const query = hostsAsked();
  query.set("host", id);
  return make("a", {href: fragment("hosts", query), ...attributes}, text);
}

/** Labels; each leads to the hosts that have it too. */
function labelLinks(labels, attributes = {}) {
  return Object.entries(labels).map(([name, value]) => {
    const [query, pair] = [hostsAsked(), `${name}=${value}`];
    if (!query.getAll("label").includes(pair)) query.append("label", pair);
    return make("a", {class: "label", href: fragment("hosts", query), title: pair, ...attributes},
      make("i", {}, `${name}=`), value);
  });
}

function hostName(host) {
  const box = make("input", {type: "checkbox", "aria-label": `Select ${host.name}`, tabindex: -1});
  box.checked = selected.has(host.id);
  const warning = {class: "missing", title: host.warnings.join("\n")};
  const isHere = document.activeElement.closest("tr")?.dataset.key === host.id;
  return [box, hostLink(host.id, host.name, {tabindex: isHere ? 0 : -1}),
    ...some(host.hostname !== host.name, () => make("span", {class: "quiet hostname"},
      ` ${host.hostname}`)),
    ...some(host.warnings.length, () => make("span", warning, " \u26a0 warning")),
    ...some(isMuted(host), () => quiet(" muted"))];
}

const isMuted = (host) => Boolean(host.mutedUntil) && Date.parse(host.mutedUntil) > now();
const since = (host) => host.status === "missing" ? host.lastSeen : host.statusSince;
const lastSeen = (host) => host.lastSeen
  ? when(host.lastSeen, host.status === "online" ? "ago" : "date") : "never";
/** The name of a system without its kernel, which the host's own panel shows. */
const systemName = (host) => host.os.replace(/GNU\/Linux | \(.*| [\d.]+-.*/g, "");

/** The query for hosts: of what was typed, words like key=value and key!=value are labels. */
function hostQuery(asked) {
  const query = new URLSearchParams({sort: "attention"});
  for (const [name, value] of asked) if (name === "sort") query.set(name, value);
    else if (name !== "q") query.append(name, value);
  const rest = (asked.get("q") ?? "").replace(/(?<!\S)([^\s=!]+)(!?)=(\S+)/g, (_, key, no, value) =>
    query.append(`label${no}`, `${key}=${value}`) ?? "").trim();
  if (rest) query.set("q", rest);
  return query;
}

const ORGANIZATION = ["Organization", (item) => some(item.organizationId)];
const CREATED = ["Created", (item) => [quiet(when(item.createdAt), ` ${item.createdBy}`)]];
const described = (item) => [make("b", {}, item.description || "no description"), " ",
  quiet(mono(item.id))];
const selectAll = make("input", {type: "checkbox", "aria-label": "Select all"});
const SHOWN = ["name", "hostname", "status", "statusSince", "lastSeen", "address", "labels", "os",
  "warnings", "mutedUntil"]; // in a row
/** What heads a column that can be sorted: in one order, or in the next. */
const sorted = (title, ...orders) => make("button", {type: "button", "data-sorts":
  orders.join(" ")}, title);

const lists = {
  hosts: new List("hosts", {
    path: "api/hosts", name: "hosts", one: "host", query: hostQuery, empty: "",
    took: (page) => fleet.take(page.counts), total: (...of) => fleet.total(...of),
    signature: (host) => JSON.stringify([here().asked.toString(), ...SHOWN.map((n) => host[n])]),
    attributes: (host) => ({"data-open": host.id}),
    columns: [
      ["Host", hostName, [selectAll, sorted("Host", "name")]],
      ["Status", (host) => [status(host.status, since(host))],
        [sorted("Status", "attention", "statusSince")]],
      ["Last seen", (host) => [quiet(lastSeen(host))]],
      ["Address", (host) => some(host.address ?? host.enrolledFrom, mono)],
      ["Labels", (host) => labelLinks(host.labels, {tabindex: -1})],
      ["System", (host) => [quiet(systemName(host))]], ORGANIZATION,
      ["Enrolled", (host) => [quiet(when(host.enrolledAt, "date"))],
        [sorted("Enrolled", "enrolledAt")]],
    ],
  }),
  tokens: new List("tokens", {
    path: "api/hosts/tokens", name: "tokens", one: "token", empty: "No tokens yet.",
    columns: [
      ["Token", described],
      ["State", (token) => [status(token.state)]],
      ["Used", (token) => [token.uses ? make("a", {href: fragment("hosts", {token: token.id})},
        count(token.uses, "host")) : "0", quiet(` of ${NUMBER.format(token.maxUses)}`)]],
      ["Expires", (token) => [quiet(when(token.expiresAt))]],
      ["Limits", (token) => [...some(token.hostId, (id) => hostLink(id, "re-enrolls a host")),
        ...some(token.hostname), " ", ...labelLinks(token.labels)]],
      CREATED,
      ORGANIZATION,
      ["Actions", (token) => some(isAdmin() && !["revoked", "expired"].includes(token.state),
        () => revokes("token", token))],
    ],
  }),
  audit: new List("audit", {
    path: "api/audit", name: "events", one: "event", empty: "No events yet.", items: folded,
    columns: [
      ["Time", (event) => [quiet(when(event.time, "time"))]],
      ["Event", (event) => [sentence(event), ...some(event.times > 1, () =>
        quiet(` ${event.times} times since `, when(event.since, "time")))]],
      ["Address", (event) => some(event.address, mono)],
      ORGANIZATION,
    ],
  }),
  keys: new List("keys", {
    path: "api/keys", name: "apiKeys", one: "API key", empty: "No API keys.",
    columns: [
      ["Key", described],
      ["State", (key) => [status(key.state)]],
      ["Role", (key) => [key.role]],
      ["Organization", (key) => [key.organizationId ?? "all"]],
      ["Last used", (key) => [quiet(key.lastUsedAt ? when(key.lastUsedAt) : "never")]],
      CREATED,
      ["Expires", (key) => [quiet(key.expiresAt ? when(key.expiresAt) : "never")]],
      ["Actions", (key) => some(key.state === "valid", () => revokes("key", key))],
    ],
  }),
};

function revokes(kind, item) {
  const label = `Revoke ${kind} ${item.description || item.id}`;
  return button("Revoke", () => revoke(kind, item.id), {class: "danger", "aria-label": label});
}

/** The sentence of an event; where it is about a host, a link to that. */
const sentence = ({subject, text}) =>
  subject?.startsWith("host:") ? hostLink(subject.slice(5), text) : text;

/** Events with a heading for each day; equal refusals, one after another, are one. */
function folded(events) {
  const items = [];
  for (const event of events) {
    const day = DAY.format(Date.parse(event.time));
    if (items.findLast((item) => item.day)?.day !== day) items.push({day});
    const last = items.at(-1);
    if (event.action === "refuse" && last.text === event.text && last.subject === event.subject) {
      Object.assign(last, {times: last.times + 1, since: event.time});
    } else items.push({...event, times: 1, since: event.time});
  }
  return items;
}

// The fleet: the counts that came with the rows, and incidents.

const fleet = {
  counts: null, // status -> number, or null while the server still counts
  incidents: [],

  take(counts) {
    this.counts = counts ?? this.counts;
    this.show();
  },

  /** How many hosts these filters leave, or are searched; 0: not known. */
  total(asked, isSearched = true) {
    const isSearch = ["q", "label", "label!", "token", "incident"].some((name) => asked.has(name));
    if (!this.counts || (isSearch && !isSearched)) return 0;
    const words = asked.has("status") ? asked.getAll("status") : STATUSES;
    return words.reduce((sum, word) => sum + this.counts[word], 0);
  },

  show() {
    if (here().view !== "hosts") return;
    const all = this.total(new URLSearchParams());
    show($("tabs"), ...["", ...STATUSES].map((word) => {
      const {asked} = here();
      const isChosen = asked.getAll("status").join() === word;
      asked.delete("status");
      if (word) asked.set("status", word);
      const number = word ? this.counts?.[word] : all;
      return make("a", {href: fragment("hosts", asked), class: word, "data-count": number ?? "",
        title: MEANINGS[word] ?? "", ...(isChosen ? {"aria-current": "true"} : {})},
      word ? word[0].toUpperCase() + word.slice(1) : "All",
      ...(this.counts ? [" ", make("b", {}, NUMBER.format(number))] : []));
    }));
    show($("shares"), ...STATUSES.map((word) => make("i", {class: word})));
    STATUSES.forEach((word, n) => {
      $("shares").children[n].style.flexGrow = this.counts?.[word] ?? 0;
    });
    const isEmpty = this.counts && !all && !here().asked.has("organization");
    $("signed-in").classList.toggle("empty", isEmpty);
    document.querySelector("header [data-add]").classList.toggle("main", !isEmpty);
    this.sign();
  },

  /** The number of offline hosts in the title and in the icon. */
  sign() {
    const down = this.counts?.offline ?? 0;
    document.title = down ? `(${NUMBER.format(down)}) offline - hostenroll` : "hostenroll";
    const svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">' +
      `<circle cx="16" cy="16" r="16" fill="${down ? "#c6282d" : "#1a7f43"}"/><text x="16" ` +
      'y="22" fill="#fff" font-family="sans-serif" font-size="17" text-anchor="middle">' +
      `${Math.min(down, 99) || ""}</text></svg>`;
    const icon = `data:image/svg+xml,${encodeURIComponent(svg)}`;
    if ($("icon").href !== icon) $("icon").href = icon;
  },

  /** The newest incident that is not over, in one sentence over the list. */
  async look() {
    const organization = here().asked.get("organization");
    const query = organization ? new URLSearchParams({organization}) : "";
    ({incidents: this.incidents} = await ask("GET", "api/incidents", {query}));
    const latest = this.incidents.filter((it) => !it.until && it.down)
      .sort((a, b) => b.at.localeCompare(a.at))[0];
    $("incident").hidden = !latest;
    if (!latest) return;
    const href = fragment("hosts", {incident: latest.id});
    show($("incident"), make("div", {}, make("b", {class: "offline"}, latest.text), make("div",
      {class: "quiet"}, when(latest.at), ", at ", when(latest.at, "minute"),
      `. ${latest.down} of ${latest.count} are still down.`)),
    make("a", {class: "button", href}, `Show these ${latest.count}`));
  },
};

let several = []; // organizations, as choices; none where there is one

async function loadOrganizations() {
  const page = me.organizationId ? {organizations: []} : await ask("GET", "api/organizations");
  several = page.organizations.length < 2 ? [] : page.organizations.map(({id}) => [id, id]);
  document.body.classList.toggle("several", several.length > 0);
  for (const select of all("[data-organizations]")) {
    show(select, ...choices([["all organizations", ""], ...several]));
    select.value = here().asked.get("organization") ?? "";
  }
}

/** What the hosts are filtered by, beside the status: each can be taken away. */
function showChips(asked) {
  const words = {label: (v) => v, "label!": (v) => v.replace("=", "!="),
    token: () => "enrolled with a token", incident: () => "one incident"};
  $("chips").replaceChildren(...[...asked].filter(([name]) => words[name]).map((pair) => {
    const text = words[pair[0]](pair[1]);
    const rest = [...asked].filter((other) => other.join() !== pair.join());
    return button(`${text} \u2715`, () => go("hosts", new URLSearchParams(rest)),
      {"aria-label": `Remove the filter ${text}`});
  }));
}

// The selection: hosts that are acted on together.

const selected = new Map(); // id -> host
let lastSelected = ""; // a range begins there
function select(id, isOn, isRange = false) {
  const at = (one) => lists.hosts.rows.findIndex((host) => host.id === one);
  const ends = [at(id), isRange && at(lastSelected) >= 0 ? at(lastSelected) : at(id)];
  for (const one of lists.hosts.rows.slice(Math.min(...ends), Math.max(...ends) + 1)) {
    selected[isOn ? "set" : "delete"](one.id, one);
  }
  lastSelected = id;
  showSelection();
}

function showSelection() {
  for (const box of all("input", lists.hosts.body)) {
    box.checked = selected.has(box.closest("tr").dataset.key);
  }
  selectAll.checked = selected.size > 0 && selected.size === lists.hosts.rows.length;
  $("selection").hidden = !selected.size;
  $("selected-count").textContent = `${NUMBER.format(selected.size)} selected`;
}

const clearSelection = () => {
  selected.clear();
  showSelection();
};

// Dialogs.

let question = null; // identifies the use of the form that is open now
const isAsked = (one) => one === question && $("form").open;

/** Open the form. It shows a refusal. An answer that arrives after it was closed, or opened for
    something else, does not touch it. */
function fill({title, text = "", go, danger = false, fields = [], options = [], act}) {
  const own = question = {};
  for (const [part, content] of Object.entries({title, text, problem: "", go})) {
    $(`form-${part}`).textContent = content;
  }
  Object.assign($("form-go"), {className: danger ? "main danger" : "main", disabled: false});
  Object.assign($("form-options"), {hidden: !options.length, open: false});
  const inputs = [...fields, ...options].map(input);
  const places = inputs.map((made) => made.closest("label"));
  $("form-fields").replaceChildren(...places.slice(0, fields.length));
  $("form-more").replaceChildren(...places.slice(fields.length));
  $("form").querySelector("form").onsubmit = async (event) => {
    event.preventDefault();
    const values = Object.fromEntries(inputs.map((made) => [made.name, made.value]));
    $("form-go").disabled = true;
    const refusal = await act(values).then(() => null, (error) => error);
    if (!isAsked(own)) return;
    $("form-go").disabled = false;
    $("form-problem").textContent = refusal?.message ?? "";
    for (const it of inputs) it.ariaInvalid = String(Boolean(refusal?.fields?.includes(it.name)));
    if (!refusal) $("form").close();
  };
  $("form").showModal();
  (inputs[0] ?? $("form-go")).focus();
}

const choices = (pairs) => pairs.map(([text, value]) => make("option", {value}, text));

function input({name, label, help, tag = "input", options = [], value = "", wide, ...attributes}) {
  const made = make(tag, {name, autocomplete: "off", ...attributes}, ...choices(options));
  made.value = value;
  make("label", {class: wide ? "wide" : ""}, label, made, ...some(help, quiet));
  return made;
}

const pairs = (labels) => Object.entries(labels).map(([name, value]) => `${name}=${value}`);

/** The labels of a text, one on each line. Spaces around a name and a value are dropped, except in
    a line that was there before the edit. key- stands for a label that is to go. */
function readLabels(text, before = []) {
  return Object.fromEntries(text.split("\n").filter((line) => line.trim()).map((line) => {
    const [name, value] = line.split(/=(.*)/s, 2);
    if (value === undefined && /-\s*$/.test(name)) return [name.trim().slice(0, -1), null];
    if (value === undefined) throw new Error(`Write ${name.trim()} as key=value.`);
    return before.includes(line) ? [name, value] : [name.trim(), value.trim()];
  }));
}

const TTLS = [["10 minutes", 600], ["1 hour", 3600], ["8 hours", 28800], ["1 day", 86400],
  ["7 days", 604800], ["30 days", 2592000]];
const DESCRIPTION = {name: "description", label: "Description", maxlength: 1000, wide: true};
const AS_TYPED = {wide: true, spellcheck: "false", autocapitalize: "off"};
const LABELS = {name: "labels", label: "Labels", tag: "textarea", ...AS_TYPED,
  placeholder: "rack=b4", help: "One key=value per line."};

function addHost() {
  $("secret").close();
  const organization = {name: "organizationId", label: "Organization", tag: "select",
    options: several, value: here().asked.get("organization") || "default"};
  fill({
    title: "Add a host", go: "Create command",
    text: "You get a command that enrolls a machine.",
    fields: [
      {name: "maxUses", label: "Hosts", type: "number", min: 1, max: 1000000, value: 1},
      {name: "ttlSeconds", label: "Expires in", tag: "select", options: TTLS, value: 3600},
      ...some(several.length, () => organization),
    ],
    options: [DESCRIPTION, {name: "hostname", label: "Only this hostname", maxlength: 253,
      ...AS_TYPED, help: "Leave empty for any."}, LABELS],
    act: async ({ttlSeconds, maxUses, labels, hostname, ...rest}) => mintAt("api/hosts/tokens", {
      ...rest, ttlSeconds: Number(ttlSeconds), maxUses: Number(maxUses),
      labels: readLabels(labels), ...(hostname && {hostname}),
    }, "Add a host"),
  });
}

const WAYS = [ // how the agent runs: the title, how its command differs, what people should know
  ["Install as a service", (line) => `${line.replace("| sh -c", "| sudo sh -c")} --install`,
    "Run this on the machine. It enrolls once, and installs a service that survives reboots. " +
    "If you are root, leave out sudo."],
  ["Run in this terminal", (line) => line,
    "Run this on the machine. It is online while the command runs."],
  ["cron", (line) => `${line} --install --every 60`,
    "Without systemd: run this as the user that should run the agent. It enrolls, and prints a " +
    "line for crontab -e."],
];

/** A command with each group of options on a line of its own. */
const wrapped = (line) => line.replace(" | ", " |\n").replace(/ &&\s+/g, " &&\n  ")
  .replace(/ (?=--(?:server|pin|cacert|token-file|insecure-http|install)\b)/g, " \\\n  ");

/** Mint a token and show the command with it. The command is fetched first: a token that could not
    be shown would be lost. If the form was closed in the meantime, neither is shown; a token that
    was minted by then is in the list, where it can be revoked. */
async function mintAt(path, body, title, about = "") {
  const own = question;
  const service = await ask("GET", "api/service");
  if (!isAsked(own)) throw new Stale();
  const token = await ask("POST", path, {body});
  lists.tokens.poll.due = 0;
  if (!isAsked(own)) throw new Stale();
  const line = service.joinCommand.replace("%s TOKEN", () => `%s ${token.token}`);
  const isNear = /^https?:\/\/(localhost|127\.|\[::1\])/.test(service.publicUrl);
  showSecret({
    title, token,
    ways: WAYS.map(([name, change, text]) => [name, wrapped(change(line)), about || text]),
    meta: [count(token.maxUses, "host"), ", expires ", when(token.expiresAt), ", shown only once"],
    warning: isNear ? "Works only on this machine. For others: serve --host 0.0.0.0 " +
      "--public-url https://NAME:PORT" : "",
  });
  polls.watch.go();
}

/** Show a command, or something else that is copied. ways: title, command, text of each. */
function showSecret({title, ways, token = null, meta = [], warning = ""}) {
  const choose = (n) => {
    all("button", $("ways")).forEach((made, m) => made.setAttribute("aria-pressed", m === n));
    [, $("join").textContent, $("secret-text").textContent] = ways[n];
  };
  const buttons = ways.map(([name], n) => button(name, () => choose(n)));
  $("ways").replaceChildren(...buttons.length < 2 ? [] : buttons);
  choose(0);
  $("secret-title").textContent = title;
  show($("secret-meta"), ...meta);
  $("secret-warning").textContent = warning;
  show($("arrivals"), ...some(token, () => make("span", {class: "status pending"},
    "Waiting for the machine ...")));
  $("secret-ask").hidden = true;
  Object.assign($("secret").dataset, {token: token?.id ?? "", isUsed: token ? "" : "yes"});
  $("form").close();
  $("secret").showModal();
  $("secret").querySelector("[data-copy]").focus();
}

/** Show the hosts that have enrolled with the token in the dialog. */
async function watch() {
  const asked = $("secret").dataset.token;
  const token = await ask("GET", `api/hosts/tokens/${asked}`);
  const hosts = await Promise.all(token.hosts.slice(0, 5).map((id) =>
    ask("GET", `api/hosts/${id}`).catch(() => null)));
  if (asked !== $("secret").dataset.token || !token.uses) return;
  $("secret").dataset.isUsed = "yes";
  $("secret-ask").hidden = true;
  show($("arrivals"), ...hosts.filter(Boolean).map((one) => make("div", {class: "row"},
    make("b", {class: `status ${one.status}`}, `${one.name} joined and is ${one.status}.`),
    hostLink(one.id, "Open", {class: "button"}))),
  ...some(token.maxUses > 1, () => quiet(`${token.uses} of ${token.maxUses} joined. `)),
  make("button", {"data-add": ""}, "Add another"));
}

/** The command that renews the agent of a host: it needs no token. */
async function showUpdate() {
  const {agentCommand} = await ask("GET", "api/service");
  showSecret({title: "Update or move an agent", ways: [["", wrapped(`sudo ${agentCommand}`),
    "Run this on an enrolled machine: it gets this server's agent and URL, and keeps its " +
    "credential."]]});
}

/** Copy a text. Without https or loopback a page has no clipboard, but an older way. */
async function copy(source, pressed) {
  let isCopied = true;
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch {
    getSelection().selectAllChildren(source);
    isCopied = document.execCommand("copy");
  }
  const text = pressed.textContent;
  pressed.textContent = isCopied ? "Copied" : "Press Ctrl+C";
  announce(pressed.textContent);
  if (text !== pressed.textContent) setTimeout(() => { pressed.textContent = text; }, 2000);
}

// A host.

let [hostId, host] = ["", null]; // the one that is shown; as the server last described it
let past = {changes: [], events: [], after: {}}; // of its status; what else happened to it
const isSheet = () => matchMedia("(max-width: 68.74rem)").matches;
const rowOf = (id) => all("tr[data-open] th a", lists.hosts.body)
  .find((link) => link.closest("tr").dataset.key === id);

/** Show the host that the fragment names; none: close the panel. */
function openHost(id) {
  if (id === hostId) return;
  const was = hostId;
  [hostId, host, past] = [id, null, {changes: [], events: [], after: {}}];
  $("host").hidden = !id;
  markOpen();
  if (!id && document.activeElement === document.body) rowOf(was)?.focus();
  if (!id) return;
  for (const part of all("#host [data-part]")) part.replaceChildren();
  for (const part of all("#host-day, #host-acts, #host-command")) part.hidden = true;
  $("host-name").textContent = `Host ${id}`;
  $("host-log").href = fragment("audit", {subject: `host:${id}`});
  const known = lists.hosts.rows.find((one) => one.id === id);
  if (known) showHost(known);
  if (isSheet()) $("host-name").focus();
  for (const poll of DETAILS) poll.go();
}

/** Mark the row of the open host. What is behind a sheet is out of reach. One row is in the order
    of the Tab key: the open host's, or the one that had the focus last, or the first. */
function markOpen() {
  for (const part of all("header, #hosts > :not(h1, .split), #hosts .list")) {
    part.inert = Boolean(hostId) && isSheet();
  }
  for (const tr of lists.hosts.body.rows) tr.classList.toggle("chosen", tr.dataset.key === hostId);
  const links = all("tr[data-open] th a", lists.hosts.body);
  const one = rowOf(hostId) ?? links.find((link) => link === document.activeElement)
    ?? links.find((link) => link.tabIndex === 0) ?? links[0];
  for (const link of links) link.tabIndex = link === one ? 0 : -1;
}

async function loadHost() {
  const id = hostId;
  const found = await ask("GET", `api/hosts/${encodeURIComponent(id)}`).catch((error) => {
    if (error.status !== 404) throw error;
  });
  if (id !== hostId) return;
  if (found) showHost(found);
  else show($("host-why"), make("p", {}, `No host has the id ${id}. It may have been deleted.`));
  if (!found) for (const part of all("#host-day, #host-acts, #host-command")) part.hidden = true;
}

function showHost(found) {
  host = found;
  const isDown = ["offline", "missing"].includes(host.status);
  const from = (address) => address ? [" from ", mono(address)] : [];
  const docker = host.dockerVersion && `Docker ${host.dockerVersion}`;
  const system = [host.os, host.architecture, docker].filter(Boolean).join(", ");
  const incident = isDown && fleet.incidents.find((it) => it.hosts.includes(host.id));
  $("host-name").textContent = host.name;
  $("host-hostname").textContent = host.hostname === host.name ? "" : host.hostname;
  $("host-why").className = `why ${host.status}`;
  show($("host-why"), status(host.status, since(host)), make("p", {}, host.statusReason),
    ...some(host.lastSeen, () => make("p", {class: "quiet"}, "Last heartbeat ",
      when(host.lastSeen, "minute"), ...from(host.address), ".")),
    ...some(incident, () => make("p", {class: "quiet"}, `${incident.text}. `,
      make("a", {href: fragment("hosts", {incident: incident.id})}, "Show them"))));
  show($("host-warnings"), ...host.warnings.map((text) => make("p", {class: "notice"}, text)));
  const facts = {
    System: [system || "not reported"],
    Labels: labelLinks(host.labels),
    Organization: [host.organizationId],
    Address: some(host.address, mono),
    "Address since": some(host.address && host.addressSince, (time) => when(time, "minute")),
    Enrolled: [when(host.enrolledAt), ...from(host.enrolledFrom), ", with ",
      make("a", {href: fragment("audit", {subject: `token:${host.tokenId}`})}, "a token")],
    Muted: isMuted(host) ? ["until ", when(host.mutedUntil, "minute")] : [],
    Agent: some(host.agentVersion),
    Id: [mono(host.id)],
  };
  show($("host-facts"), ...Object.entries(facts).filter(([, value]) => value.length)
    .flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, ...value)]));
  $("host-command").hidden = !isDown && host.status !== "pending";
  $("host-acts").hidden = !isAdmin();
  const useless = host.status === "revoked" ? "revoke" : "restore";
  for (const made of all("[data-act]")) made.hidden = made.dataset.act === useless;
  showDay();
}

/** The changes of the host's status since the last time, and the newest events about it. */
async function loadPast() {
  const own = past;
  const query = new URLSearchParams({host: hostId, limit: 1000, ...own.after});
  const about = new URLSearchParams({subject: `host:${hostId}`, limit: 50});
  const [{changes, cursor}, {events}] = await Promise.all([
    ask("GET", "api/changes", {query}).catch((error) => {
      if (!error.cursor) throw error; // what followed this cursor is pruned
      return {changes: [], cursor: error.cursor};
    }), ask("GET", "api/audit", {query: about})]);
  own.changes.push(...changes);
  Object.assign(own, {after: {after: cursor}, events});
  if (own === past && host) showDay();
}

/** The last 24 hours, and the history: the changes and what the audit log has. */
function showDay() {
  const spans = spansOf(past.changes, now() - DAY_MS, now());
  const sum = (some) => some.reduce((ms, [, from, to]) => ms + to - from, 0);
  const known = sum(spans.filter(([word]) => word !== "none"));
  const share = Math.floor(1000 * sum(spans.filter(([word]) => word === "online")) / known) / 10;
  $("host-day").hidden = !known;
  $("day-title").textContent = `Last 24 hours: ${share} % online`;
  $("day").setAttribute("aria-label", $("day-title").textContent);
  show($("day"), ...spans.map(([word, from, to]) => make("i", {class: word,
    title: `${word}, ${CLOCK.format(from)} to ${CLOCK.format(to)}`})));
  spans.forEach(([, from, to], n) => { $("day").children[n].style.flexGrow = to - from; });
  const lines = past.changes.filter((it) => !it.by && it.was).map((it) =>
    ({time: it.at, text: changeText(it)}));
  const merged = [...lines, ...folded(past.events).filter((event) => event.text)]
    .sort((a, b) => b.time.localeCompare(a.time)).slice(0, 12);
  show($("host-history"), ...merged.map((it) => make("li", {}, quiet(when(it.time, "minute")),
    make("span", {}, it.text, ...some(it.times > 1, () => ` ${it.times} times`)))));
}

/** What the status was between two times: [status, from, to] of each span. */
function spansOf(list, from, to) {
  const first = list[0]?.was === undefined ? host.status : list[0].was ?? "none";
  let [at, word] = [from, first];
  const spans = [];
  const marks = [[Date.parse(host.enrolledAt), first === "none" ? first : null],
    ...list.map((change) => [Date.parse(change.at), change.status]), [to, ""]];
  if (marks[0][0] > from) word = "none";
  for (const [time, next] of marks) {
    if (time > at) spans.push([word, at, time]);
    [at, word] = [Math.max(at, time), next ?? first];
  }
  return spans;
}

function changeText({was, status: word, at}) {
  const before = past.changes.findLast((it) => it.at < at);
  if (word === "missing") return "Missing: no heartbeat for 7 days";
  if (word !== "online") return `Went ${word}`;
  return was === "pending" || !before ? "First heartbeat"
    : `Back online after ${duration(Date.parse(at) - Date.parse(before.at))}`;
}

// Acts on a host, and on many.

/** Do something with hosts, after a question. Other hosts may be shown when the answer comes. */
function actOn(hosts, action, {title, members = () => ({}), ...order}) {
  const names = hosts.length === 1 ? hosts[0].name : count(hosts.length, "host");
  fill({title: `${title} ${names}?`, go: title, ...order, act: async (values) => {
    const body = {action, hosts: hosts.map((one) => one.id), ...members(values)};
    const {done, notFound} = await ask("POST", "api/hosts/actions", {body});
    announce(`${title}: ${count(done, "host")}, ${notFound.length} not found.`);
    const {view, asked} = here();
    if (action === "delete" && body.hosts.includes(asked.get("host"))) asked.delete("host");
    clearSelection();
    go(view, asked);
    refresh();
  }});
}

const MUTES = [["1 hour", 3600], ["8 hours", 28800], ["1 day", 86400], ["7 days", 604800],
  ["unmute", 0]];
const ACTS = { // each takes a list of hosts
  revoke: (hosts) => actOn(hosts, "revoke", {title: "Revoke", danger: true,
    text: "Heartbeats are refused from now on. You can restore it later."}),
  restore: (hosts) => actOn(hosts, "restore", {title: "Restore", text:
    "Accepted again with the current credential. It may take up to an hour to come back."}),
  mute: (hosts) => actOn(hosts, "edit", {
    title: "Mute", text: "No notifications about it until then. It stays in the list.",
    fields: [{name: "mute", label: "For", tag: "select", options: MUTES, value: 3600}],
    members: ({mute}) => ({mutedUntil: Number(mute)
      ? new Date(now() + 1000 * mute).toISOString() : null}),
  }),
  label: (hosts) => actOn(hosts, "edit", {
    title: "Label", members: ({labels}) => ({labels: readLabels(labels)}),
    fields: [{...LABELS, help: "One key=value per line; key- removes a label. Others stay."}],
  }),
  delete: (hosts) => {
    const isOne = hosts.length === 1;
    const [kind, word] = isOne ? ["name", hosts[0].name] : ["number", String(hosts.length)];
    actOn(hosts, "delete", {
      title: "Delete", danger: true, go: isOne ? "Delete host" : `Delete ${word} hosts`,
      text: "Deletes the record for good; the machine must enroll again. To block it for now, " +
        "revoke it.",
      fields: [{name: "typed", required: "", ...AS_TYPED,
        label: `Type the ${kind} to confirm: ${word}`}],
      members: ({typed}) => {
        if (typed !== word) throw new Error(`The ${kind} does not match.`);
      },
    });
  },
  reenroll: ([was]) => fill({
    title: `Re-enroll ${was.name}?`, go: "Create command",
    text: "Creates a command that gives this host a new credential; id, name, labels and history " +
      "stay. The old credential works until the new one is used.",
    act: () => mintAt(`api/hosts/${was.id}/reenroll`, {}, `Re-enroll ${was.name}`,
      "Run this on that host, and on no other."),
  }),
  edit: ([was]) => fill({
    title: `Edit ${was.name}`, go: "Save",
    fields: [
      {name: "name", label: "Name", maxlength: 255, required: "", value: was.name, wide: true},
      {...LABELS, value: pairs(was.labels).join("\n")},
    ],
    act: async ({name, labels}) => {
      const before = pairs(was.labels);
      const body = {}; // only the fields changed here; the others may have changed elsewhere
      if (name !== was.name) body.name = name;
      if (labels !== before.join("\n")) body.labels = readLabels(labels, before);
      await ask("PATCH", `api/hosts/${was.id}`, {body});
      announce(`Saved: ${name}.`);
      refresh();
    },
  }),
};

/** Revoke a token or an API key. */
function revoke(kind, id) {
  const item = lists[`${kind}s`].rows.find((row) => row.id === id); // as it is now
  const text = id === me.id ? " It is your own: you will be signed out." : "";
  fill({
    title: `Revoke this ${kind}?`, go: "Revoke", danger: true,
    text: `${item.description || id} stops working at once.${text}`,
    fields: some(item.uses, () => ({name: "withHosts", label: "Its hosts", tag: "select",
      options: [["stay", ""], [`${count(item.uses, "host")} revoked too`, "true"]]})),
    act: async ({withHosts}) => {
      const [path, query] = kind === "key" ? ["api/keys", id === me.id ? "self=true" : ""]
        : ["api/hosts/tokens", withHosts ? "withHosts=true" : ""];
      await ask("DELETE", `${path}/${id}`, {query});
      refresh();
    },
  });
}

function addKey() {
  const organization = {name: "organizationId", label: "Organization", tag: "select",
    options: [["all", ""], ...several.length ? several : [["default", "default"]]]};
  fill({
    title: "Create an API key", go: "Create",
    fields: [
      {...DESCRIPTION, required: "", help: "Who or what uses it: the audit log shows this."},
      {name: "role", label: "Role", tag: "select", value: "viewer",
        options: [["viewer: reads", "viewer"], ["admin: changes", "admin"]]},
      ...some(!me.organizationId, () => organization),
    ],
    act: async ({organizationId = me.organizationId, ...rest}) => {
      const own = question;
      const body = {...rest, organizationId: organizationId || null};
      const minted = await ask("POST", "api/keys", {body});
      refresh();
      if (isAsked(own)) showSecret({title: "New API key", meta: ["shown only once"], ways: [
        ["The key", minted.apiKey, "For a program: Authorization: Bearer, and the key."],
        ["A sign-in link", `${PLACE}#key=${minted.apiKey}`, "Opens this page, signed in."]]});
    },
  });
}

// Signing in.

let me = null;
const isAdmin = () => me?.role === "admin";

async function identify() {
  me = await ask("GET", "api/me");
  for (const place of all("[data-admin]")) place.hidden = !isAdmin();
  $("who").textContent = [isAdmin() ? "admin" : "read only", ...some(me.organizationId)].join(", ");
  $("key").value = "";
  $("sign-in").hidden = true;
  $("signed-in").hidden = false;
  route();
}

function signIn(event) {
  event.preventDefault();
  const key = $("key").value.trim();
  const isKey = /^hak_[!-~]+$/.test(key);
  $("sign-in-problem").textContent = isKey ? "" : "API keys start with hak_.";
  if (isKey) sessionStorage.setItem(KEY, key);
  if (isKey) polls.me.go();
}

/** Forget the key and, by reloading, everything that was shown with it. */
function signOut(problem = "") {
  sessionStorage.removeItem(KEY);
  history.replaceState({problem}, "");
  location.reload();
}

function start() {
  const [, given] = location.hash.match(/^#key=(hak_[!-~]+)$/) ?? [];
  if (given) { // a sign-in link: the key leaves the address bar and the history
    sessionStorage.setItem(KEY, given);
    history.replaceState(null, "", location.pathname);
  }
  listen();
  setInterval(tick, 1000);
  if (sessionStorage.getItem(KEY)) return polls.me.go();
  $("sign-in").hidden = false;
  $("sign-in-problem").textContent = history.state?.problem ?? "";
  history.replaceState(null, "");
  return $("key").focus();
}

// Navigation.

function route() {
  if (/^#key=hak_[!-~]+$/.test(location.hash)) return location.reload(); // start() takes it
  if (!me) return;
  const {view, asked} = here();
  const id = asked.get("host") ?? "";
  asked.delete("host");
  for (const name of Object.keys(lists)) $(name).hidden = name !== view;
  for (const link of all("nav a")) link.ariaCurrent = link.hash === `#${view}` ? "page" : "false";
  for (const field of all("[data-filters] [name]", $(view))) {
    if (field !== document.activeElement) field.value = asked.get(field.name) ?? "";
  }
  const isNew = asked.toString() !== lists[view].filters;
  lists[view].ask(asked.toString());
  if (view === "hosts") {
    if (isNew) clearSelection();
    fleet.show();
    showChips(asked);
    showSort(asked.get("sort") ?? "attention");
  }
  openHost(view === "hosts" ? id : "");
}

function showSort(sort) {
  for (const made of all("[data-sorts]")) {
    const isIt = made.dataset.sorts.split(" ").includes(sort);
    const order = sort === "name" ? "ascending" : "descending";
    made.closest("th").setAttribute("aria-sort", isIt ? order : "none");
    made.title = isIt && sort === "statusSince" ? "Latest change first" : "Sort";
  }
}

/** Sort the hosts in the first of these orders, or in the next where they are in one. */
function sortBy(sorts) {
  const {view, asked} = here();
  const next = sorts.indexOf(asked.get("sort") ?? "attention") + 1;
  asked.set("sort", sorts[next % sorts.length]);
  go(view, asked);
}

/** Show a view with other parameters, without a step in the history. */
function go(view, asked) {
  for (const [name, value] of [...asked]) if (!value) asked.delete(name);
  history.replaceState(null, "", fragment(view, asked));
  route();
}

/** Apply the filters of a view, unless another view is shown by now. A secret that was typed into
    a filter is not sent. */
function filter(form) {
  const {view, asked} = here();
  if (!$(view).contains(form)) return undefined;
  for (const field of all("[name]", form)) {
    const isSecret = /(het|hak)_\w/.test(field.value);
    field.setCustomValidity(isSecret ? "This looks like a secret. It was not searched for." : "");
    if (isSecret) return field.reportValidity();
    asked.set(field.name, field.value);
  }
  return go(view, asked);
}

const isOpen = () => Boolean(hostId);
const DETAILS = [new Poll(5000, loadHost, isOpen), new Poll(15000, loadPast, isOpen)];
const polls = {
  me: new Poll(3000, identify, () => !me),
  incidents: new Poll(10000, () => fleet.look(), () => here().view === "hosts"),
  organizations: new Poll(60000, loadOrganizations),
  watch: new Poll(3000, watch, () => Boolean($("secret").dataset.token)),
};
const POLLS = [lists.hosts.poll, lists.tokens.poll, lists.audit.poll, lists.keys.poll,
  ...Object.values(polls), ...DETAILS];

function tick() {
  if (document.hidden || !sessionStorage.getItem(KEY)) return;
  for (const poll of me ? POLLS : [polls.me]) poll.tick();
  for (const time of all("time")) {
    const text = TIMES[time.dataset.shown](Date.parse(time.dateTime));
    if (time.textContent !== text) time.textContent = text;
  }
  const list = lists[here().view];
  const age = now() - list.at;
  $("live").textContent = !list.at ? "" : age < 15000 ? "Live" : `updated ${duration(age)} ago`;
  const wait = Math.max(0, Math.ceil((list.poll.due - performance.now()) / 1000));
  $("retry-in").textContent = list.poll.turn ? "Retrying ..." : `Retrying in ${wait} s`;
}

/** Ask for everything that is shown: it may be old. */
function refresh() {
  if (!document.hidden && me) for (const poll of POLLS) if (poll.isWanted()) poll.go();
}

/** Move the focus to the next host, or the one before; an open panel follows. */
function step(by) {
  const ids = lists.hosts.rows.map((one) => one.id);
  const at = ids.indexOf(document.activeElement.closest("tr")?.dataset.key ?? hostId);
  const id = ids[Math.min(Math.max(at + by, 0), ids.length - 1)];
  rowOf(id)?.focus();
  if (hostId && id) openInstead(id);
  else markOpen();
}

function openInstead(id) {
  const {view, asked} = here();
  asked.set("host", id); // an empty one is left out
  go(view, asked);
}

function closeHost() {
  const was = hostId;
  openInstead("");
  rowOf(was)?.focus();
}

const KEYS = {
  "/": () => $(here().view).querySelector("input[type=search]")?.focus(),
  "?": () => $("help").showModal(), a: () => { if (isAdmin()) addHost(); },
  j: () => step(1), ArrowDown: () => step(1), k: () => step(-1), ArrowUp: () => step(-1),
  x: (event) => {
    const id = document.activeElement.closest("tr")?.dataset.open ?? hostId;
    if (id) select(id, !selected.has(id), event.shiftKey);
  },
  Escape: () => hostId ? closeHost() : clearSelection(),
};
KEYS.X = KEYS.x;

function press(event) {
  const {target, key} = event;
  if (key === "Escape") for (const menu of all(".menu[open]")) menu.open = false;
  const isTyping = target.matches("input:not([type=checkbox]), textarea, select");
  const leaves = target.matches("[type=search]") && ["ArrowDown", "Escape"].includes(key);
  const isElsewhere = event.ctrlKey || event.metaKey || event.altKey || (isTyping && !leaves) ||
    target.closest("dialog, .menu") || (target.closest("aside") && key.startsWith("Arrow")) ||
    (here().view !== "hosts" && !"?/a".includes(key));
  const act = Object.hasOwn(KEYS, key) && KEYS[key];
  if (!me || isElsewhere || !act) return;
  event.preventDefault();
  if (key === "Escape" && isTyping) target.blur();
  else act(event);
}

/** What is clicked: the first of these that holds it. */
const CLICKS = {
  "#sign-out": () => signOut(), "#retry": refresh, "#host-close": closeHost,
  "#unselect": clearSelection, "#add-key": addKey, "[data-add]": addHost, "[data-help]": KEYS["?"],
  "[data-update]": () => showUpdate().catch(report),
  "[data-act]": (made) => ACTS[made.dataset.act]([host]),
  "[data-many]": (made) => ACTS[made.dataset.many]([...selected.values()]),
  "[data-copy]": (made) => copy($(made.dataset.copy), made),
  "[data-close]": (made) => made.closest("dialog").close(),
  "[data-sorts]": (made) => sortBy(made.dataset.sorts.split(" ")),
  "#skip": () => document.querySelector("main:not([hidden])").focus(),
  "#arrivals a": () => $("secret").close(),
  "#hosts tbody input": (made, event) =>
    select(made.closest("tr").dataset.key, made.checked, event.shiftKey),
  "#hosts tbody a": () => {},
  "tr[data-open]": (tr) => {
    if (!getSelection().isCollapsed) return;
    tr.querySelector("th a").click();
    tr.querySelector("th a").focus({preventScroll: true});
  },
};

function click(event) {
  for (const menu of all(".menu[open]")) {
    if (!menu.querySelector("summary").contains(event.target)) menu.open = false;
  }
  const found = Object.keys(CLICKS).find((selector) => event.target.closest(selector));
  const made = found && event.target.closest(found);
  if (made) CLICKS[found](made, event);
  else if (isOpen() && isSheet() && !event.target.closest("aside, dialog")) closeHost();
}

function listen() {
  const heard = {hashchange: route, resize: markOpen, online: refresh, visibilitychange: refresh,
    keydown: press, click};
  for (const [kind, act] of Object.entries(heard)) addEventListener(kind, act);
  $("sign-in").onsubmit = signIn;
  for (const form of all("[data-filters]")) {
    let typing = 0; // wait until the typing pauses
    form.oninput = form.onchange = () => {
      clearTimeout(typing);
      typing = setTimeout(filter, 250, form);
    };
    form.onsubmit = (event) => {
      event.preventDefault();
      filter(form);
    };
  }
  selectAll.onchange = () => {
    selected.clear();
    if (selectAll.checked) for (const one of lists.hosts.rows) selected.set(one.id, one);
    showSelection();
  };
  $("secret").oncancel = (event) => {
    if ($("secret").dataset.isUsed || !$("secret-ask").hidden) return;
    event.preventDefault();
    $("secret-ask").hidden = false;
    $("secret-ask").querySelector("button").focus();
  };
  $("secret").onclose = () => {
    for (const name of ["join", "arrivals"]) $(name).replaceChildren();
    $("secret").dataset.token = "";
  };
}

start();
"""


def page(states: Iterable[str], actions: Iterable[str]) -> str:
    """The HTML document at /, with what tokens and events can be filtered by."""
    markup = PAGE_MARKUP
    for place, words in (("@STATES@", states), ("@ACTIONS@", actions)):
        markup = markup.replace(place, "".join(f"<option>{word}</option>" for word in words))
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>hostenroll</title>
<link rel="icon" id="icon" href="data:,">
<style>{PAGE_STYLE}</style>
</head>
<body>
{markup}
<script type="module">{PAGE_SCRIPT}</script>
</body>
</html>
"""


# 9. Operations
#
# Law: each operation is one row of OPERATIONS, and each document is declared once. Dispatch, the
# OpenAPI document, the README's table and the commands of the same name come from these rows.
#
# Contents: what bodies and queries may hold; documents; the rows; OpenAPI; the Api, which turns a
# request into a Call before the tick, and the outcome of the Call into an answer after it.

HOSTNAME = Text(
    253, 1, r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_.])?", "letters, digits, dots, - and _"
)
NAME = Text(255, 1)  # of existing hosts: earlier versions had a laxer rule for names
NEW_NAME = Name(255, 1)
SLUG = Text(64, 1, r"[A-Za-z0-9][A-Za-z0-9_-]*", "letters, digits, - and _")
ID_TEXT = Text(16, 16, ID.pattern, "16 hexadecimal digits")
INSTANCE = Text(16, 16, "[0-9a-f]{16}", "16 hexadecimal digits")  # an agent's
CURSOR = Text(16, 16, ID.pattern, "a nextCursor")
HOST_CURSOR = Text(  # a list by name has the name in it: 255 characters of 4 octets, in hexadecimal
    2100, 16, rf"({ID.pattern}|[0-9]\.{ID.pattern}\.[0-9a-f]*)", "a nextCursor"
)
FEED_CURSOR = Text(36, 18, "[0-9a-f]{16}-[0-9]{1,19}", "a cursor")
AFTER_CHANGE = Text(36, 3, f"now|{FEED_CURSOR.pattern}", "a cursor, or now")
AFTER_EVENT = Text(36, 1, "now|([0-9a-f]{16}-)?[0-9]{1,19}", "a cursor or number, or now")
WAIT = Integer(WAIT_RANGE, "seconds")
SINCE = Integer((0, EXPIRY_RANGE[1]), "seconds")
SECRET_TEXT = Text(256, 1)
LABELS = Labels()
LABEL_FILTER = LabelFilter()
LABEL_CHANGES = LabelChanges()
NETWORK = Network(64, 2, "[0-9A-Fa-f:.]+(/[0-9.]+)?", "an address or a network, as 192.0.2.0/24")
DESCRIPTION = Text(1000)
IDEMPOTENCY_KEY = Text(128, 1, "[!-~]+", "visible ASCII characters")
ROLE = Choice("admin", "viewer")

# The types below are used in answers only.
BOOLEAN = Choice(True, False)
_NOT_BY_4 = "([02468][1235679]|[13579][01345789])"  # two digits that are not divisible by 4
TIME = Text(  # as rfc3339() writes times, or without milliseconds
    24, 20,
    rf"(?!([0-9]{{2}}{_NOT_BY_4}|{_NOT_BY_4}00)-02-29)"
    r"[1-9][0-9]{3}-((0[1-9]|1[0-2])-(0[1-9]|[12][0-9])|(0[13-9]|1[0-2])-30|(0[13578]|1[02])-31)"
    r"T([01][0-9]|2[0-3])(:[0-5][0-9]){2}(\.[0-9]{3})?Z",
    "like 2027-01-15T08:00:00.000Z", format="date-time",
)  # fmt: skip
MAYBE_TIME = Nullable(TIME)
EXPIRY = Integer(EXPIRY_RANGE, "seconds")
ACTOR = Text(255, 1)  # such as host:<id> or cli:<user>
ADDRESS = Text(255, 1)
SENTENCE = Text(1000, 1)
CREDENTIAL = Text(CREDENTIAL_MAXIMUM, 1, r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+", "a JWT")
INTERVAL = Integer(HEARTBEAT_INTERVAL_RANGE, "seconds")
MAYBE_INTERVAL = Nullable(INTERVAL)
REFUSAL_CODE = Nullable(Choice(*(problem.code for problem in problems())))
NEXT_INTERVAL = Integer((1, HEARTBEAT_INTERVAL_RANGE[1] * (100 + HEARTBEAT_SPREAD) // 100))


# fmt: off
FACTS = (  # what an agent reports about its machine; COLUMNS has the columns of the host
    Field("os",            Text(128)),
    Field("architecture",  Text(128)),
    Field("dockerVersion", Text(128)),
    Field("agentVersion",  Text(64)),
    Field("everySeconds",  MAYBE_INTERVAL),
)
COLUMNS = {name: re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", name)
           for name in ("hostname", *(fact.name for fact in FACTS))}
COLUMNS["instance"] = "instances"  # never equal to an instance: such a heartbeat is not plain

# What bodies, queries and headers may hold.
NO_MEMBERS = Schema()
ENROLL_BODY = Schema(
    *required(token=SECRET_TEXT, hostname=HOSTNAME), Field("name", NEW_NAME), *FACTS, open=True)
ENROLL_HEADERS = Schema(Field("Idempotency-Key", IDEMPOTENCY_KEY))
HEARTBEAT_BODY = Schema(
    Field("hostname", HOSTNAME), *FACTS, Field("instance", INSTANCE), open=True)
REENROLL_FIELDS = (
    Field("ttlSeconds", Integer(TOKEN_TTL_RANGE, "seconds")), Field("description", DESCRIPTION),
    Field("intervalSeconds", INTERVAL))
REENROLL_BODY = Schema(*REENROLL_FIELDS)
MINT_BODY = Schema(
    *REENROLL_FIELDS, Field("maxUses", Integer(TOKEN_USES_RANGE)), Field("hostname", HOSTNAME),
    Field("labels", LABELS), Field("organizationId", SLUG), Field("ephemeralSeconds", EXPIRY))
REASON = Schema(Field("reason", DESCRIPTION))
EDIT_FIELDS = (Field("intervalSeconds", MAYBE_INTERVAL), Field("mutedUntil", MAYBE_TIME),
               *REASON.fields.values())
EDIT_BODY = Schema(Field("name", NEW_NAME), Field("labels", LABELS), *EDIT_FIELDS)
MERGED_FIELDS = (Field("labels", Nullable(LABEL_CHANGES)), *EDIT_FIELDS)
EDIT_PATCH = Schema(Field("name", NEW_NAME), *MERGED_FIELDS)
ACTION_BODY = Schema(
    *required(action=Choice("delete", "revoke", "restore", "edit"),
              hosts=ListOf(ID_TEXT, ACTED_AT_ONCE)), *MERGED_FIELDS)
PAGE_FIELDS = (Field("limit", Integer((1, PAGE_MAXIMUM))), Field("cursor", CURSOR))
NAMED = Field("named", Text(255, 1))
KEYS_QUERY = Schema(Field("organization", SLUG), NAMED, *PAGE_FIELDS)
TOKENS_QUERY = Schema(
    Field("organization", SLUG), Field("state", Choice(*TOKEN_STATES), repeats=True), NAMED,
    *PAGE_FIELDS)
HOSTS_QUERY = Schema(
    Field("status", Choice(*STATUSES), repeats=True), Field("organization", SLUG),
    Field("address", NETWORK), Field("label", LABEL_FILTER, repeats=True),
    Field("label!", LABEL_FILTER, repeats=True), Field("q", Text(255)), Field("token", ID_TEXT),
    Field("signingKey", Text(64, 1)),
    Field("olderSeconds", Integer((0, EXPIRY_RANGE[1]), "seconds")), Field("incident", FEED_CURSOR),
    NAMED, Field("sort", Choice("enrolledAt", *ORDERS)), PAGE_FIELDS[0],
    Field("cursor", HOST_CURSOR))
HOST_COUNTS = Schema(
    *required(**dict.fromkeys(STATUSES, Integer((0, LAST_ID)))), name="HostCounts")
PORT = Integer((1, 65535))
HOST_FILTERS = [HOSTS_QUERY.fields[name] for name in ("organization", "label", "label!", "address")]
INVENTORY_QUERY = Schema(HOSTS_QUERY.fields["status"], *HOST_FILTERS)
TARGETS_QUERY = Schema(  # no pending or revoked hosts: their machines may not be there
    *HOST_FILTERS, Field("status", Choice("online", "offline", "missing"), repeats=True),
    Field("port", PORT), Field("port_label", Labels.KEY))
DOWN_QUERY = Schema(Field("show", Labels.KEY, repeats=True))
AUDIT_QUERY = Schema(
    Field("organization", SLUG), Field("sinceSeconds", SINCE),
    Field("action", Choice(*ACTIONS), repeats=True), Field("subject", Text(128)),
    Field("code", Text(64)), Field("after", AFTER_EVENT), Field("wait", WAIT), *PAGE_FIELDS)
CHANGES_QUERY = Schema(
    Field("sinceSeconds", SINCE), Field("after", AFTER_CHANGE),
    Field("wait", WAIT), Field("organization", SLUG),
    Field("status", Choice(*CHANGED_TO), repeats=True), Field("label", LABEL_FILTER, repeats=True),
    Field("host", ID_TEXT), PAGE_FIELDS[0])
ORGANIZATION_BODY = Schema(*required(name=SLUG))
API_KEY_BODY = Schema(
    Field("organizationId", Nullable(SLUG)), Field("role", ROLE), Field("description", DESCRIPTION),
    Field("ttlSeconds", Nullable(Integer(API_KEY_TTL_RANGE, "seconds"))))
BOOL_TEXT = Choice("true", "false")
RETIRE_BODY = Schema(*required(kid=Text(64, 1)), Field("force", Choice("yes")))
# fmt: on


CONSTANT = "__class__"  # every record has this attribute: for members that ignore the record


class Member(NamedTuple):
    """A member of a document: its name, its type, the attribute of the record that holds its value
    (a dotted one is an attribute of a part), and the function that converts the value to JSON. A
    member that is not required is left out if the attribute is None."""

    name: str
    type: FieldType
    attribute: str
    convert: Optional[Callable[[Any], Any]] = None
    required: bool = True


class Document:
    """How a record becomes a JSON object: of() makes the object, and schema describes it."""

    def __init__(self, name: str, *members: Member, open: bool = False) -> None:
        fields = [Field(member.name, member.type, member.required) for member in members]
        self.schema = Schema(*fields, open=open, name=name)
        self._names = [member.name for member in members]
        # One call gets all attributes, because a page has a thousand records with sixteen members.
        # The attribute CONSTANT is added so that attrgetter returns a tuple for one member, too.
        self._attributes = attrgetter(*(member.attribute for member in members), CONSTANT)
        self._converted = [(member.name, member.convert) for member in members if member.convert]
        self._optional = [member.name for member in members if not member.required]

    def of(self, record: Any) -> dict[str, Any]:
        document = dict(zip(self._names, self._attributes(record)))
        for name in self._optional:
            if document[name] is None:
                del document[name]
        for name, convert in self._converted:
            if name in document:
                document[name] = convert(document[name])
        return document


class ServiceInfo(NamedTuple):
    """Where hosts find the servers, and how often they send a heartbeat."""

    url: str = f"http://{DEFAULT_HOST}:{DEFAULT_PORT}"  # until a server has run
    pin: str = ""  # one or more pins, as curl takes them; "": none
    interval: int = HEARTBEAT_INTERVAL
    certificate_ends: int = 0  # Unix ms; 0: there is no certificate
    credential_ttl: Optional[int] = None  # an option of the server, in seconds; None: no expiry
    audit_keep: Optional[int] = None  # an option of the server, in seconds; None: forever

    @property
    def join_line(self) -> str:
        """The command that enrolls a machine, in one line, with TOKEN in place of a token."""
        return re.sub(r"\s*\n\s*", " ", join_command(self.url, self.pin, "TOKEN"))

    @property
    def agent_line(self) -> str:
        """The command that updates the agent of an enrolled host, in one line."""
        return re.sub(r"\s*\n\s*", " ", join_command(self.url, self.pin))


def service_info(url: str, pin: str, *options: Any) -> ServiceInfo:
    """A ServiceInfo of values that the database or a server has. Raises StorageUnavailable for a
    URL or a pin that serve never writes, because people paste both into a shell."""
    ours = rf"(?a)https?://[\w.:~/%\[\]-]+ ({PIN}(;{PIN}){{,3}})?"
    with suppress(ValueError):  # of a host in brackets that is no address
        if re.fullmatch(ours, f"{url} {pin}") and urlsplit(url).hostname:
            return ServiceInfo(url, pin, *options)
    raise StorageUnavailable("The database has a bad URL or pin: start serve again.")


def _service(registry: Registry, call: Call, now: int) -> ServiceInfo:
    service, options = registry.queries.service(), (registry.keys.ttl, registry.audit.keep)
    if service is None:
        return ServiceInfo()
    stored = service.public_url, service.pin, service.interval, service.certificate_ends
    return service_info(*stored, *options)


def _or_null(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A conversion that gives None for a missing value: None, an empty text, or the time 0."""
    return lambda value: convert(value) if value else None


# fmt: off
TOKEN_MEMBERS = (  # of a TokenView
    Member("id",             ID_TEXT,                    "token.id", id_text),
    Member("organizationId", SLUG,                       "token.organization_id"),
    Member("state",          Choice(*TOKEN_STATES),      "state"),
    Member("description",    DESCRIPTION,                "token.description"),
    Member("hostname",       Nullable(HOSTNAME),         "token.hostname"),
    Member("hostId",         Nullable(ID_TEXT),          "token.host_id", _or_null(id_text)),
    Member("labels",         LABELS,                     "token.labels", stored_object),
    Member("maxUses",        Integer(TOKEN_USES_RANGE),  "token.max_uses"),
    Member("uses",           Integer((0, TOKEN_USES_RANGE[1])), "token.uses"),
    Member("createdAt",      TIME,                       "token.created_at", rfc3339),
    Member("createdBy",      ACTOR,                      "token.created_by"),
    Member("expiresAt",      TIME,                       "token.expires_at", rfc3339),
    Member("usedAt",         MAYBE_TIME,                 "token.used_at", _or_null(rfc3339)),
    Member("usedFrom",       Nullable(ADDRESS),          "token.used_from"),
    Member("revokedAt",      MAYBE_TIME,                 "token.revoked_at", _or_null(rfc3339)),
    Member("intervalSeconds", MAYBE_INTERVAL,            "token.own_interval"),
    Member("ephemeralSeconds", Nullable(EXPIRY),         "token.ephemeral"),
    Member("hosts",          ListOf(ID_TEXT, TOKEN_HOSTS_SHOWN),
           "hosts", lambda numbers: list(map(id_text, numbers))),
)
TOKEN = Document("Token", *TOKEN_MEMBERS)
MINTED_TOKEN = Document("MintedToken", *TOKEN_MEMBERS, Member("token", SECRET_TEXT, "text"))
HOST = Document(  # of a HostView
    "Host",
    Member("id",             ID_TEXT,              "host.id", id_text),
    Member("organizationId", SLUG,                 "host.organization_id"),
    Member("name",           NAME,                 "host.name"),
    Member("hostname",       HOSTNAME,             "host.hostname"),
    *(Member(fact.name, fact.type, f"host.{COLUMNS[fact.name]}") for fact in FACTS),
    Member("labels",         LABELS,               "host.labels", stored_object),
    Member("intervalSeconds", MAYBE_INTERVAL,      "host.own_interval"),
    Member("ephemeralSeconds", Nullable(EXPIRY),   "host.ephemeral"),
    Member("mutedUntil",     MAYBE_TIME,           "host.muted_until", _or_null(rfc3339)),
    Member("status",         Choice(*STATUSES),    "status"),
    Member("statusReason",   SENTENCE,             "reason"),
    Member("statusSince",    MAYBE_TIME,           "host.status_since", _or_null(rfc3339)),
    Member("enrolledAt",     TIME,                 "host.enrolled_at", rfc3339),
    Member("lastSeen",       MAYBE_TIME,           "host.last_seen", _or_null(rfc3339)),
    Member("address",        Nullable(ADDRESS),    "host.address", _or_null(str)),
    Member("addressSince",   MAYBE_TIME,           "host.address_since", _or_null(rfc3339)),
    Member("enrolledFrom",   Nullable(ADDRESS),    "host.enrolled_from", _or_null(str)),
    Member("tokenId",        ID_TEXT,              "host.token_id", id_text),
    Member("revokedAt",      MAYBE_TIME,           "host.revoked_at", _or_null(rfc3339)),
    Member("refusedAt",      MAYBE_TIME,           "host.refused_at", _or_null(rfc3339)),
    Member("refusedCode",    REFUSAL_CODE,         "host.refused_code", _or_null(str)),
    Member("warnings",       ListOf(SENTENCE, 10), "warnings"),
)
ACTED = Document("Acted", Member("done", Integer((0, ACTED_AT_ONCE)), "done"),
                 Member("notFound", ListOf(ID_TEXT, ACTED_AT_ONCE), "not_found"))
FREED = Document("Freed", Member("organizations", Integer((0, LAST_ID)), "done"))
DELETED_HOST = Document(
    "DeletedHost",
    Member("id",             ID_TEXT,              "host.id", id_text),
    Member("tokenId",        ID_TEXT,              "token", lambda token: id_text(token.id), False),
    Member("usesLeft",       Integer(TOKEN_USES_RANGE), "token",
           lambda token: token.max_uses - token.uses, False),
)
EVENT = Document(  # of an EventView
    "Event",
    Member("number",         Integer((1, LAST_ID)), "event.number"),
    Member("text",           SENTENCE,              "text"),
    Member("time",           TIME,                  "event.at", rfc3339),
    Member("action",         Choice(*ACTIONS),      "event.action"),
    Member("actor",          ACTOR,                 "event.actor"),
    Member("address",        Nullable(ADDRESS),     "event.address", _or_null(str)),
    Member("organizationId", Nullable(SLUG),        "event.organization_id"),
    Member("subject",        Nullable(ACTOR),       "event.subject", _or_null(str)),
    Member("code",           REFUSAL_CODE,          "event.code"),
    Member("detail",         ObjectOf(Schema(open=True)), "event.detail", stored_object),
)
CHANGED_HOST = Document(  # of a Change
    "ChangedHost",
    Member("id",             ID_TEXT,              "host_id", id_text),
    Member("name",           NAME,                 "name"),
    Member("organizationId", SLUG,                 "organization_id"),
    Member("labels",         LABELS,               "labels", stored_object),
)
CHANGE = Document(  # of a ChangeView
    "Change",
    Member("cursor",         FEED_CURSOR,          "cursor"),
    Member("at",             TIME,                 "change.at", rfc3339),
    Member("host",           ObjectOf(CHANGED_HOST.schema), "change", CHANGED_HOST.of),
    Member("was",            Nullable(Choice(*STATUSES)), "change.was",
           _or_null(STATUS_NAMES.__getitem__)),
    Member("status",         Choice(*CHANGED_TO),  "change.status", STATUS_NAMES.__getitem__),
    Member("seen",           MAYBE_TIME,           "change.seen", _or_null(rfc3339)),
    Member("by",             Nullable(ACTOR),      "change.actor", _or_null(str)),
    Member("muted",          BOOLEAN,              "muted"),
)
INCIDENT = Document(
    "Incident",
    Member("id",             FEED_CURSOR,           "id"),
    Member("at",             TIME,                  "at", rfc3339),
    Member("until",          MAYBE_TIME,            "until", _or_null(rfc3339)),
    Member("count",          Integer((1, LAST_ID)), "count"),
    Member("down",           Integer((0, LAST_ID)), "down"),
    Member("text",           SENTENCE,              "text"),
    Member("hosts",          ListOf(ID_TEXT, INCIDENT_HOSTS_SHOWN), "hosts",
           lambda numbers: list(map(id_text, islice(numbers, INCIDENT_HOSTS_SHOWN)))),
)
ORGANIZATION = Document(  # of an Organization
    "Organization",
    Member("id",             SLUG,                 "id"),
    Member("createdAt",      TIME,                 "created_at", rfc3339),
)
API_KEY_MEMBERS = (  # of an ApiKeyView
    Member("id",             ID_TEXT,              "key.id", id_text),
    Member("organizationId", Nullable(SLUG),       "key.organization_id"),
    Member("role",           ROLE,                 "key.role"),
    Member("description",    DESCRIPTION,          "key.description"),
    Member("createdAt",      TIME,                 "key.created_at", rfc3339),
    Member("createdBy",      ACTOR,                "key.created_by"),
    Member("state",          Choice(*KEY_STATES),  "state"),
    Member("expiresAt",      MAYBE_TIME,           "key.expires_at", _or_null(rfc3339)),
    Member("lastUsedAt",     MAYBE_TIME,           "key.last_used_at", _or_null(rfc3339)),
    Member("revokedAt",      MAYBE_TIME,           "key.revoked_at", _or_null(rfc3339)),
)
API_KEY = Document("ApiKey", *API_KEY_MEMBERS)
MINTED_API_KEY = Document("MintedApiKey", *API_KEY_MEMBERS, Member("apiKey", SECRET_TEXT, "text"))
SIGNING_KEY = Document(  # of a SigningKeyView
    "SigningKey",
    Member("kid",            Text(64, 1),          "key.kid"),
    Member("state",          Choice("signs", "verifies", "retired"), "state"),
    Member("hosts",          Integer((0, LAST_ID)), "hosts"),
    Member("createdAt",      TIME,                 "key.created_at", rfc3339),
    Member("retiredAt",      MAYBE_TIME,           "key.retired_at", _or_null(rfc3339)),
)
ME = Document(  # of a Principal
    "Me",
    Member("id",             ID_TEXT,              "id", id_text),
    Member("role",           ROLE,                 "role"),
    Member("organizationId", Nullable(SLUG),       "organization"),
)
ENROLLMENT = Document(  # of an Enrollment
    "Enrollment",
    Member("hostId",                   ID_TEXT,    "host.id", id_text),
    Member("organizationId",           SLUG,       "host.organization_id"),
    Member("name",                     NAME,       "host.name"),
    Member("credential",               CREDENTIAL, "issued.credential"),
    Member("credentialExpiresAt",      MAYBE_TIME, "issued.expires_at", _or_null(rfc3339)),
    Member("heartbeatIntervalSeconds", INTERVAL,   "interval"),
)
HEARTBEAT = Document(  # of a HeartbeatResult
    "Heartbeat",
    Member("hostId",               ID_TEXT,       "host", id_text),
    Member("lastSeen",             TIME,          "last_seen", rfc3339),
    Member("nextHeartbeatSeconds", NEXT_INTERVAL, "next_interval"),
    Member("credential",           CREDENTIAL,    "issued", attrgetter("credential"), False),
    Member("credentialExpiresAt",  MAYBE_TIME,    "issued", required=False,
           convert=lambda issued: _or_null(rfc3339)(issued.expires_at)),
)
HEALTH = Document("Health", Member("status", Choice("ok"), CONSTANT, lambda _: "ok"))
READINESS = Document("Readiness", Member("status", Choice("ready"), CONSTANT, lambda _: "ready"))
SERVICE = Document(  # of a ServiceInfo
    "Service",
    Member("version",                  Text(64, 1),           CONSTANT, lambda _: __version__),
    Member("publicUrl",                Text(2048, 1),         "url"),
    Member("pin",                      Nullable(Text(256, 1)), "pin", _or_null(str)),
    Member("heartbeatIntervalSeconds", INTERVAL,              "interval"),
    Member("certificateEndsAt",        MAYBE_TIME, "certificate_ends", _or_null(rfc3339)),
    Member("credentialTtlSeconds",     Nullable(Integer((0, LAST_ID))), "credential_ttl"),
    Member("auditKeepSeconds",         Nullable(Integer((0, LAST_ID))), "audit_keep"),
    Member("joinCommand",              Text(8192, 1),         "join_line"),
    Member("agentCommand",             Text(8192, 1),         "agent_line"),
)
# fmt: on


EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"  # Prometheus' text format


def metric_labels(**pairs: str) -> str:
    """Labels in braces, as they follow the name of a metric."""
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    return "{" + ",".join(f'{n}="{text.translate(escapes)}"' for n, text in pairs.items()) + "}"


def metric(
    name: str, help: str, samples: Union[float, Iterable[tuple[str, float]]], kind: str = "gauge",
    prefix: str = "hostenroll_",
) -> str:  # fmt: skip
    """The lines of a metric. samples: its one value, or pairs of what follows the name of the
    metric (labels, a suffix) and a value."""
    pairs = [("", samples)] if isinstance(samples, (int, float)) else samples
    lines = [f"{prefix}{name}{end} {value!r}\n" for end, value in pairs]
    return f"# HELP {prefix}{name} {help}\n# TYPE {prefix}{name} {kind}\n{''.join(lines)}"


def histogram_samples(histogram: Histogram) -> Iterator[tuple[str, float]]:
    """The samples of a histogram. Buckets are cumulative, and the last one counts everything."""
    below = 0
    for bound, count in zip((*histogram.bounds, math.inf), histogram.counts):
        below += count
        yield "_bucket" + metric_labels(le="+Inf" if bound == math.inf else f"{bound:g}"), below
    yield from (("_sum", histogram.sum), ("_count", below))


COUNTERS = (  # of Metrics.counts
    ("heartbeats", "Heartbeats accepted."),
    ("enrollments", "Hosts enrolled or re-enrolled."),
    ("renewals", "Credentials renewed."),
    ("connections", "Connections accepted."),
    ("log_lines_dropped", "Log lines that could not be written."),
    ("clones", "Signs that several machines use one credential, at most one an hour for each."),
)
HISTOGRAMS = (  # attributes of Metrics, the names that Prometheus sees, what they measure
    ("requests", "request_duration_seconds", "Time from reading a request to its answer."),
    ("commits", "commit_duration_seconds", "Time to commit a tick that writes."),
    ("lock_waits", "lock_wait_seconds", "Time waited for another writer."),
    ("ticks", "tick_requests", "Requests in a tick that writes."),
)


def _metrics(registry: Registry, call: Call, now: int) -> Any:
    """The metrics of the caller: hosts by organization and status, and versions of their agents;
    for an API key of all organizations also the metrics of the process."""
    owner, agents = call.by.organization, _agent_metrics(registry, call, now)
    if isinstance(agents, Call):
        return agents
    census = registry.hosts.census(owner)
    rows = [row for row in registry.queries.organizations() if owner in (None, row.id)]
    hosts = [
        (metric_labels(organization=row.id, status=status), census[row.id, status])
        for row, status in product(rows, STATUSES)
    ]
    stopped = [(metric_labels(organization=row.id), int(row.expiry > 0)) for row in rows]
    process = _process_metrics(registry, now) if owner is ALL_ORGANIZATIONS else ()
    help = "1 while expiry is stopped because too many hosts expired."
    return "".join([
        metric("hosts", "Hosts by organization and status.", hosts),
        metric("expiry_stopped", help, stopped), *agents, *process,
    ])  # fmt: skip


def _most_frequent(counts: Counter[str], number: int) -> Counter[str]:
    """The counts of so many frequent texts, and the sum of the rest as `other`. A machine may
    report the text `other`, too."""
    rest = counts.pop("other", 0)
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    rest += sum(count for _, count in ranked[number:])
    return Counter({**dict(ranked[:number]), "other": rest})


def _agent_metrics(registry: Registry, call: Call, now: int) -> Union[Call, list[str]]:
    """The metrics of agents. Each tick counts one slice of the hosts: until the last slice is
    counted, the call to run in the next tick is returned."""
    after, counted, copied = call.values.get("counted", (-1, Counter(), 0))
    versions = Counter(counted)
    owner, since = call.by.organization, now - COPY_SHOWN_MS
    rows = registry.queries.agents_slice(owner, after, SWEPT_AT_ONCE, since)
    for version, count, copies, last in rows:
        versions[str(version)] += count
        copied, after = copied + copies, max(after, last)
    if sum(row[1] for row in rows) == SWEPT_AT_ONCE:
        # A version that is frequent in the fleet is frequent in each slice, so it is not dropped.
        counted = after, _most_frequent(versions, COUNTED_AT_ONCE), copied
        return call._replace(values={"counted": counted})
    shown = _most_frequent(versions, VERSIONS_SHOWN).items()
    agents = [(metric_labels(version=version), count) for version, count in shown]
    return [
        metric("agents", "Hosts by version of the agent.", agents),
        metric("copied_hosts", "Hosts with signs of a copied credential.", copied),
    ]


def _process_metrics(registry: Registry, now: int) -> Iterator[str]:
    metrics, queries, swept = registry.metrics, registry.queries, registry.reports.swept
    keys_ok, feed = int(not registry.keys.file.trouble), queries.feed()
    for name, help in COUNTERS:
        yield metric(f"{name}_total", help, metrics.counts[name], "counter")
    refusals = [(metric_labels(code=kind.code), metrics.refusals[kind.code]) for kind in problems()]
    yield metric("refusals_total", "Refusals by code.", refusals, "counter")
    for name, shown_name, help in HISTOGRAMS:
        yield metric(shown_name, help, histogram_samples(getattr(metrics, name)), "histogram")
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime
    yield metric("cpu_seconds_total", "CPU time of the process.", cpu, "counter", "process_")
    python = ".".join(map(str, sys.version_info[:3]))
    build = metric_labels(version=__version__, python=python, sqlite=registry.engine.sqlite_version)
    yield metric("build_info", "Versions of hostenroll, Python and SQLite.", [(build, 1)])
    files = [metric_labels(file=file) for file in ("database", "wal")]
    sizes = zip(files, registry.engine.file_sizes())
    yield metric("database_bytes", "Size of the database files.", sizes)
    yield metric("open_connections", "Open connections.", metrics.open_connections)
    waiting = metrics.waiting_requests
    yield metric("waiting_requests", "Requests that wait for changes or events.", waiting)
    yield metric("keys_ok", "1 while the key file is valid.", keys_ok)
    lost = feed.lost if now < feed.lost_until else 0
    yield metric("lost_hosts", "Hosts that a restore lost and that wait.", lost)
    at = registry.reports.last_change_at() / SECOND_MS
    yield metric("last_change_timestamp_seconds", "Time of the last change of a status.", at)
    age = time.monotonic() - swept.last_ended
    yield metric("sweep_age_seconds", "Time since the last sweep for silent hosts.", age)
    spent = swept.last_spent
    yield metric("sweep_seconds", "CPU time of the last sweep for silent hosts.", spent)
    if certificate := registry.service.certificate:
        ends, help = certificate.ends // SECOND_MS, "Time when the certificate expires."
        yield metric("tls_certificate_not_after_seconds", help, ends)


# What other tools get to know about hosts.

# A text as a part of a name in another tool. Two different texts may give the same name.
clean_name = partial(re.sub, "[^A-Za-z0-9_]", "_")

# Names that Ansible takes for groups or for its own machine; and names that end in an id, as the
# program may name another host.
AMBIGUOUS_NAMES = re.compile(
    r"all|ungrouped|localhost|127\.0\.0\.1|(status|organization|label)_.*|.*-[0-7][0-9a-f]{15}"
)


def host_summary(view: HostView) -> dict[str, str]:
    """What other tools get to know about a host, under the names that they use."""
    host, labels = view.host, stored_object(view.host.labels)
    return {
        "id": id_text(host.id), "name": host.name, "hostname": host.hostname,
        "organization": host.organization_id, "status": view.status, "address": host.address,
        "os": host.os, "architecture": host.architecture, "agent_version": host.agent_version,
        **{f"label_{clean_name(key)}": str(labels[key]) for key in sorted(labels)},
    }  # fmt: skip


def _down_hosts(registry: Registry, call: Call, now: int) -> str:
    """Metrics for Prometheus: a series for each host that is down, the latest first, and how many
    hosts are not shown. values: show (labels). Raises InvalidQuery if two labels would have the
    same name in Prometheus: it would reject every series."""
    keys = {*call.values.get("show", ())}
    shown = {f"label_{clean_name(key)}": key for key in sorted(keys)}
    if len(shown) < len(keys):
        raise InvalidQuery(errors=[FieldError("show", "two labels become one in Prometheus")])
    down = ["offline", "missing"]
    values = {"status": down, "sort": "attention", "limit": DOWN_SHOWN}
    page, samples = registry.hosts.list(call._replace(values=values), now), []
    for view in page.items:
        host, labels = view.host, stored_object(view.host.labels) if shown else {}
        pairs = {"id": id_text(host.id), "host": host.name, "organization": host.organization_id}
        pairs.update(status=view.status, muted=json_text(host.muted_until > now))
        pairs.update((name, str(labels.get(key, ""))) for name, key in shown.items())
        samples.append((metric_labels(**pairs), 1))
    rest = max(0, sum(map(page.more["counts"].get, down)) - len(samples))
    return metric("host_down", "Hosts that are offline or missing.", samples) + metric(
        "hosts_down_not_shown", "Offline and missing hosts that are not listed.", rest
    )


class Inventory:
    """The list of hosts for another tool, while a call collects it: a text for each host; for
    Ansible also its groups, each with the names of its hosts."""

    def __init__(self) -> None:
        self.hosts: list[str] = []
        self.groups: dict[str, list[str]] = {}
        self.owner_groups: dict[str, str] = {}  # organizations, and the name of the group of each
        self.length = 0  # the characters of all these texts
        self.at = 0  # when the last page was added, in Unix ms


def _inventory(
    put: Callable[[Inventory, HostView, Registry, Call], None], text: Callable[[Inventory], str],
    registry: Registry, call: Call, now: int,
) -> Any:  # fmt: skip
    """The hosts that a call finds, as text for another tool. Each tick gives one page of hosts to
    put(); until the last page, the call to run in the next tick is returned. Raises InvalidQuery,
    NotFound."""
    inventory = call.values.get("inventory")
    if inventory is None:
        # A call that was refused, or whose tick failed, is not continued: the time of its inventory
        # says so.
        times = [other.at for other in registry.inventories]
        if sum(0 <= now - at < INVENTORY_LEFT for at in times) >= INVENTORIES_AT_ONCE:
            return call._replace(values={**call.values, "waits": True})
        inventory = Inventory()
        registry.inventories.add(inventory)
        values = {**call.values, "inventory": inventory, "limit": LISTED_AT_ONCE, "waits": False}
        call = call._replace(values=values)
    inventory.at, has_more = now, False
    try:
        page = registry.hosts.list(call, now)
        for view in page.items:
            put(inventory, view, registry, call)
        if len(inventory.hosts) > INVENTORY_HOSTS or inventory.length > INVENTORY_BYTES:
            maximum = f"{INVENTORY_HOSTS} hosts, or {INVENTORY_BYTES >> 20} MiB"
            remedy = "filter by status, label or organization"
            raise InvalidQuery(f"The inventory has more than {maximum}: {remedy}.")
        if page.next is None:
            return text(inventory)
        has_more = True
        return call._replace(values={**call.values, "cursor": page.next})
    finally:  # also for a refusal: while its exception is kept, it keeps the inventory alive
        if not has_more:
            registry.inventories.discard(inventory)


def _put_target(inventory: Inventory, view: HostView, registry: Registry, call: Call) -> None:
    """Add a target of Prometheus' HTTP service discovery. values: port, port_label (the label that
    has the port of a host). A host without an address or a port is no target."""
    host, label = host_summary(view), call.values.get("port_label")
    port = call.values.get("port", EXPORTER_PORT if label is None else None)
    with suppress(ValueError):
        port = PORT.parse(str(stored_object(view.host.labels).get(label or "")))
    if host["address"] and port and host["status"] != "revoked":
        address = f"[{host['address']}]" if ":" in host["address"] else host["address"]
        labels = {f"__meta_hostenroll_{name}": text for name, text in host.items()}
        inventory.hosts.append(json_text({"targets": [f"{address}:{port}"], "labels": labels}))
        inventory.length += len(inventory.hosts[-1])


def ansible_value(text: str) -> Any:
    """A text as a value for Ansible, which must not run it: Ansible runs templates in texts."""
    is_plain = re.fullmatch(r"[\w ./:@+,~()=-]*", text)
    return text if is_plain else {"__ansible_unsafe": text}


def _organization_group(organization: str, registry: Registry, call: Call) -> str:
    """The name of Ansible's group for an organization. If the names of several organizations that
    the caller may see would give the same group, then the one that has exactly this name keeps it,
    and a checksum is added for the others."""
    name, slugs = clean_name(organization), [organization]
    if call.by.organization is ALL_ORGANIZATIONS and name != organization:
        slugs = [row.id for row in registry.queries.organizations()]
    is_shared = [*map(clean_name, slugs)].count(name) > 1
    return f"organization_{name}{f'_{sha256(organization).hex()[:8]}' if is_shared else ''}"


def _put_ansible_host(inventory: Inventory, view: HostView, registry: Registry, call: Call) -> None:
    """Add a host with its variables and groups, for Ansible. The filters of the call do not change
    the name of a host."""
    host = host_summary(view)
    name = re.sub("^[^A-Za-z0-9_]|[^A-Za-z0-9_.-]", "_", host["name"])[:63]
    is_shared = registry.queries.has_namesake(view.host, call.by.organization)
    if is_shared or name != host["name"] or AMBIGUOUS_NAMES.fullmatch(name):
        name += f"-{host['id']}"
    variables = {f"hostenroll_{key}": ansible_value(text) for key, text in host.items()}
    target = host["address"] or view.host.enrolled_from  # else Ansible connects to the name
    if re.fullmatch("[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?", target):
        variables["ansible_host"] = target
    inventory.hosts.append(f'"{name}":{json_text(variables)}')
    labels = stored_object(view.host.labels).items()  # two of them may become one variable
    groups = {clean_name(f"label_{key}_{text}") for key, text in labels}
    owner = host["organization"]
    if owner not in inventory.owner_groups:
        inventory.owner_groups[owner] = _organization_group(owner, registry, call)
    groups.update((f"status_{host['status']}", inventory.owner_groups[owner]))
    for group in groups:
        inventory.groups.setdefault(group, []).append(f'"{name}"')
    inventory.length += len(inventory.hosts[-1]) + len(groups) * len(f'"{name}",')


def _ansible_text(inventory: Inventory) -> str:
    """The inventory in JSON, as Ansible expects it of an inventory script."""
    groups = inventory.groups.items()
    texts = [f',"{name}":{{"hosts":[{",".join(hosts)}]}}' for name, hosts in groups]
    return f'{{"_meta":{{"hostvars":{{{",".join(inventory.hosts)}}}}}{"".join(texts)}}}'


# Answers that are the same for every request.

SHELL_SCRIPT = "text/x-shellscript; charset=utf-8"
HTML = "text/html; charset=utf-8"
PLAIN = "text/plain; charset=utf-8"


class Asset:
    """A text that clients may cache, if they ask whether it has changed before they use it again:
    RFC 9110 sections 8.8.3 and 13.1.2. The text is compressed once. Its entity tag is weak, because
    the plain and the compressed form share it."""

    def __init__(self, text: str, content_type: str, headers: Headers = ()) -> None:
        self.tag = f'"{sha256(text).hex()[:32]}"'
        caching = ("Cache-Control", "no-cache"), ("Vary", "Accept, Accept-Encoding")
        headers = (*headers, *caching, ("ETag", f"W/{self.tag}"))
        self.plain = Response(200, text.encode("utf-8"), content_type, headers)
        compressor = zlib.compressobj(9, wbits=16 + zlib.MAX_WBITS)  # as gzip
        compressed = compressor.compress(self.plain.body) + compressor.flush()
        headers += (("Content-Encoding", "gzip"),)
        self.compressed = self.plain._replace(body=compressed, headers=headers)

    def answer(self, head: Head) -> Response:
        if self.tag.encode() in head.tags or head.tags == b"*":
            return self.plain._replace(status=HTTPStatus.NOT_MODIFIED, body=b"")
        return self.compressed if head.takes_gzip else self.plain


def _page_asset() -> Asset:
    """The page. Its security policy lets a browser run only the page's own script and style, and
    connect only to this server, whatever the name of a host might put into the page. No other site
    can show the page in a frame."""

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(sha256(text)).decode('ascii')}'"

    policy = (
        f"default-src 'none'; script-src {source(PAGE_SCRIPT)}; style-src {source(PAGE_STYLE)}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    )
    headers = (("Content-Security-Policy", policy), ("Referrer-Policy", "no-referrer"))
    return Asset(page(TOKEN_STATES, ACTIONS), HTML, headers)


OVERVIEW = f"""\
hostenroll {__version__}: enrolls machines and shows which are alive.
The page:    this address, in a browser.
The agent:   agent.sh; the command that mint-token prints fetches and runs it.
The API:     openapi.json describes it; mint-api-key creates a key for it.
Monitoring:  healthz, readyz, and metrics for Prometheus.
In a shell:  hostenroll.py --help, on the server.
"""


def _cached_asset(make: Callable[[], Asset]) -> Callable[[Head], Response]:
    """A function that answers with an asset, which is made when the first request comes."""
    asset = lru_cache(make)
    return lambda head: asset().answer(head)


_page = _cached_asset(_page_asset)
_overview = _cached_asset(lambda: Asset(OVERVIEW, PLAIN))


def _page_response(head: Head) -> Response:
    """The page for browsers; a short text for clients that do not ask for HTML, such as curl."""
    return (_page if head.takes_html else _overview)(head)


# The rows.


class Caller(NamedTuple):
    """Who may call an operation: the tag and the security scheme of its operations in OpenAPI, and
    the problems that they may be refused for."""

    tag: str
    scheme: Optional[str]  # of SECURITY_SCHEMES
    problems: tuple[type[Problem], ...]


# fmt: off
AGENT_PROBLEMS = (HostRevoked, HostUnknown, StorageUnavailable)
USER_PROBLEMS = (ApiKeyInvalid, InvalidQuery, TooManyRequests, StorageUnavailable)
CALLERS = {
    "open":       Caller("open", None, ()),
    "token":      Caller("agent", None, (
        TokenUnknown, TokenExpired, TokenRevoked, TokenUsed, TokenHostMismatch, TooManyRequests,
        *AGENT_PROBLEMS)),
    "credential": Caller("agent", "credential", (
        CredentialMissing, CredentialInvalid, CredentialExpired, CredentialSuperseded,
        *AGENT_PROBLEMS)),
    "viewer":     Caller("user", "apiKey", USER_PROBLEMS),  # any API key
    "admin":      Caller("user", "apiKey", (*USER_PROBLEMS, Forbidden)),
    "owner":      Caller("user", "apiKey", (*USER_PROBLEMS, Forbidden)),  # admin, all organizations
}
# fmt: on


JSON_TYPES: Mapping[str, Any] = {
    "string": str, "integer": (int, float), "boolean": bool, "array": list, "object": dict,
    "null": type(None),
}  # fmt: skip


class Operation(NamedTuple):
    """Something to do: by HTTP, by the command of the same name, or by both."""

    name: str
    method: str  # "": the operation is a command only
    path: str
    caller: str  # a key of CALLERS
    rule: Union[str, Callable[[Registry, Call, int], Any]]  # a name: of a method in the registry
    summary: str
    body: Optional[Schema] = None
    patch: Optional[Schema] = None  # the body, if its media type is MERGE_PATCH
    query: Schema = NO_MEMBERS
    headers: Schema = NO_MEMBERS
    status: int = 200
    answer: Optional[Document] = None  # for the record of the rule, or for each item of a list
    list_of: str = ""  # if the rule returns a Page: the member that holds the items
    more: Mapping[str, FieldType] = {}  # members of a list beside the items
    columns: tuple[str, ...] = ()  # of a table for people: members, or keys of CELLS in section 12
    content_type: str = JSON
    raises: tuple[type[Problem], ...] = ()  # what problems() cannot derive
    writes: bool = True
    durable: bool = True  # what the operation writes is on the disk before the answer
    static: Optional[Callable[[Head], Response]] = None  # makes the answer, if the rule is ""

    def run(self, registry: Registry, call: Call, now: int) -> Any:
        """Run the rule, such as registry.tokens.mint(call, now), and return its record."""
        if isinstance(self.rule, str):
            return attrgetter(self.rule)(registry)(call, now)
        return self.rule(registry, call, now)

    def check(self, members: Any, merges: bool) -> dict[str, Any]:
        """The values of a body, or of a merge patch, if it merges. Raises InvalidBody."""
        if merges and self.patch is not None:
            return {**self.patch.check(members), "merges": True}
        assert self.body is not None
        return self.body.check(members)

    def problems(self) -> list[type[Problem]]:
        """The problems that a request over HTTP may be refused for, by status and code."""
        raised = {Problem, *CALLERS[self.caller].problems, *self.raises}
        raised |= {InvalidBody} if self.body is not None else set()
        names = {*self.query.fields, *(self.body.fields if self.body else ())}
        if "{id}" in self.path or names & {"organization", "organizationId"}:
            raised.add(NotFound)
        if "after" in names:
            raised.add(ChangesPruned)
        return [kind for kind in problems() if kind in raised or issubclass(kind, Unframed)]

    def document(self, record: Any) -> dict[str, Any]:
        """The answer as a JSON object. record: what the rule returned."""
        assert self.answer is not None
        if not self.list_of:
            return self.answer.of(record)
        items = list(map(self.answer.of, record.items))
        end = {} if "cursor" in record.more else {"nextCursor": record.next}
        return {self.list_of: items, **end, **record.more}

    def response(self, record: Any) -> Response:
        """The answer over HTTP. record: what the rule returned."""
        if self.status == HTTPStatus.NO_CONTENT:
            return Response(self.status)
        if self.answer is None:
            body = record.encode("utf-8", "replace")  # a forger can write lone surrogates
            return Response(self.status, body, self.content_type)
        return json_response(self.status, self.document(record))

    def shape(self) -> dict[str, Any]:
        """The members that document() has at least, each with its types in Python. A newer version
        may add members, and values of a Choice."""
        assert self.answer is not None
        members: dict[str, Any] = {}
        for field in self.answer.schema.fields.values():
            schema = field.type.json_schema()
            types = [
                JSON_TYPES[part.get("type", "object")] for part in schema.get("anyOf", [schema])
            ]
            is_name = field.type in (ID_TEXT, SLUG, FEED_CURSOR)  # which scripts type again
            shape = re.compile(schema["pattern"]) if is_name else tuple(types)
            members.update({field.name: shape} if field.required else {})
        return {self.list_of: [members]} if self.list_of else members

    def schema(self) -> Optional[Schema]:
        """The schema of document(); None if the answer is text, or empty."""
        if self.answer is None or self.status == HTTPStatus.NO_CONTENT:
            return None
        item = self.answer.schema
        if not self.list_of:
            return item
        members = required(**{self.list_of: ListOf(ObjectOf(item), PAGE_MAXIMUM)}, **self.more)
        if "cursor" not in self.more:
            is_feed = "after" in self.query.fields  # a feed has cursor, and a list nextCursor
            cursor = self.query.fields.get("cursor", Field("", CURSOR)).type
            members.append(Field("nextCursor", Nullable(cursor), required=not is_feed))
            members += [Field("cursor", FEED_CURSOR)] if is_feed else []
        return Schema(*members, name=f"{item.name}List")


# fmt: off
OPERATIONS = (
    Operation("enroll", "POST", "/api/agent/enroll", "token", "enrollments.enroll",
              "enroll a host with a token",
              body=ENROLL_BODY, headers=ENROLL_HEADERS, status=201, answer=ENROLLMENT),
    Operation("beat", "POST", "/api/agent/heartbeat", "credential", "heartbeats.beat",
              "send a heartbeat", durable=False, body=HEARTBEAT_BODY, answer=HEARTBEAT),
    Operation("mint-token", "POST", "/api/hosts/tokens", "admin", "tokens.mint",
              "create an enrollment token",
              body=MINT_BODY, status=201, answer=MINTED_TOKEN),
    Operation("list-tokens", "GET", "/api/hosts/tokens", "viewer", "tokens.list",
              "list tokens, newest first",
              writes=False, query=TOKENS_QUERY, answer=TOKEN, list_of="tokens",
              columns=("description", "state", "uses", "expiresAt", "organizationId", "id")),
    Operation("show-token", "GET", "/api/hosts/tokens/{id}", "viewer", "tokens.get",
              "show a token and the hosts that enrolled with it", writes=False, answer=TOKEN),
    Operation("revoke-token", "DELETE", "/api/hosts/tokens/{id}", "admin", "tokens.revoke",
              "revoke a token, and its hosts if asked",
              query=Schema(Field("withHosts", BOOL_TEXT)), status=204, answer=TOKEN),
    Operation("list-hosts", "GET", "/api/hosts", "viewer", "hosts.list",
              "list hosts, newest first",
              writes=False, query=HOSTS_QUERY, answer=HOST, list_of="hosts",
              more={"counts": ObjectOf(HOST_COUNTS)},
              columns=("name", "status", "age", "address", "labels", "lastSeen", "hostname",
                       "organizationId", "id")),
    Operation("show-host", "GET", "/api/hosts/{id}", "viewer", "hosts.get",
              "show a host and why it has its status", writes=False, answer=HOST),
    Operation("edit-host", "PATCH", "/api/hosts/{id}", "admin", "hosts.edit",
              "rename, label or mute a host, or set its interval",
              body=EDIT_BODY, patch=EDIT_PATCH, answer=HOST),
    Operation("delete-host", "DELETE", "/api/hosts/{id}", "admin", "hosts.delete",
              "delete a host; it must enroll again",
              query=REASON, status=204, answer=DELETED_HOST),
    Operation("revoke-host", "POST", "/api/hosts/{id}/revoke", "admin", "hosts.revoke",
              "block a host until it is restored", body=REASON, answer=HOST),
    Operation("restore-host", "POST", "/api/hosts/{id}/restore", "admin", "hosts.restore",
              "unblock a revoked host", body=REASON, answer=HOST),
    Operation("act-on-hosts", "POST", "/api/hosts/actions", "admin", "hosts.act",
              "delete, revoke, restore or edit many hosts", body=ACTION_BODY, answer=ACTED),
    Operation("reenroll-host", "POST", "/api/hosts/{id}/reenroll", "admin", "tokens.reenroll",
              "create a token that gives a host a new credential",
              body=REENROLL_BODY, status=201, answer=MINTED_TOKEN),
    Operation("show-audit", "GET", "/api/audit", "viewer", "audit.list",
              "show the audit log, newest first",
              writes=False, query=AUDIT_QUERY, answer=EVENT, list_of="events",
              columns=("when", "text", "address", "actor")),
    Operation("list-changes", "GET", "/api/changes", "viewer", "reports.list",
              "list status changes of hosts, oldest first",
              writes=False, query=CHANGES_QUERY, answer=CHANGE, list_of="changes",
              more={"cursor": FEED_CURSOR}, columns=("name", "was", "status", "at", "by", "host")),
    Operation("list-incidents", "GET", "/api/incidents", "viewer", "incidents.list",
              "list hosts that went offline together in the last day",
              writes=False, query=Schema(Field("organization", SLUG)), answer=INCIDENT,
              list_of="incidents", columns=("at", "count", "down", "text", "id")),
    Operation("show-me", "GET", "/api/me", "viewer", lambda registry, call, now: call.by,
              "show the role and organization of the API key", writes=False, answer=ME),
    Operation("show-service", "GET", "/api/service", "viewer", _service,
              "show how hosts reach the server", writes=False, answer=SERVICE),
    Operation("metrics", "GET", "/metrics", "viewer", _metrics,
              "show metrics for Prometheus", writes=False, content_type=EXPOSITION),
    Operation("host-metrics", "GET", "/metrics/hosts", "viewer", _down_hosts,
              "list hosts that are down, for Prometheus", writes=False, query=DOWN_QUERY,
              content_type=EXPOSITION),
    Operation("targets", "GET", "/api/inventory/prometheus", "viewer",
              partial(_inventory, _put_target, lambda made: f"[{','.join(made.hosts)}]"),
              "list hosts as Prometheus targets", writes=False, query=TARGETS_QUERY),
    Operation("inventory", "GET", "/api/inventory/ansible", "viewer",
              partial(_inventory, _put_ansible_host, _ansible_text),
              "list hosts as an Ansible inventory", writes=False, query=INVENTORY_QUERY),
    Operation("health", "GET", "/healthz", "open", "", "check that the server answers",
              static=lambda head: json_response(200, HEALTH.of(None)), answer=HEALTH),
    Operation("readiness", "GET", "/readyz", "open", "service.ready", "check that it can work",
              durable=False, answer=READINESS, raises=(StorageUnavailable,)),
    Operation("openapi", "GET", "/openapi.json", "open", "", "print the API as OpenAPI 3.1",
              static=_cached_asset(lambda: Asset(json_text(openapi_document()), JSON)),
              answer=Document("", open=True)),
    Operation("agent-script", "GET", "/agent.sh", "open", "",
              "print the agent, for a host with sh and curl", content_type=SHELL_SCRIPT,
              static=_cached_asset(lambda: Asset(AGENT_SCRIPT, SHELL_SCRIPT))),
    Operation("page", "GET", "/", "open", "", "show the admin page",
              static=_page_response, content_type=HTML),
    Operation("add-org", "POST", "/api/organizations", "owner", "organizations.add",
              "add an organization", body=ORGANIZATION_BODY, status=201, answer=ORGANIZATION,
              raises=(Conflict,)),
    Operation("list-orgs", "GET", "/api/organizations", "viewer", "organizations.list",
              "list organizations",
              writes=False, answer=ORGANIZATION, list_of="organizations",
              columns=("id", "createdAt")),
    Operation("mint-api-key", "POST", "/api/keys", "admin", "api_keys.mint",
              "create an API key", body=API_KEY_BODY, status=201, answer=MINTED_API_KEY),
    Operation("list-api-keys", "GET", "/api/keys", "admin", "api_keys.list",
              "list API keys, newest first",
              writes=False, query=KEYS_QUERY, answer=API_KEY, list_of="apiKeys",
              columns=("description", "state", "role", "organizationId", "lastUsedAt", "expiresAt",
                       "createdBy", "createdAt", "id")),
    Operation("revoke-api-key", "DELETE", "/api/keys/{id}", "admin", "api_keys.revoke",
              "revoke an API key, and the keys it created if asked",
              query=Schema(Field("withKeys", BOOL_TEXT), Field("self", BOOL_TEXT)), status=204,
              answer=API_KEY, raises=(Conflict,)),
    # Commands only: whoever runs them can read the key file or the database anyway.
    Operation("expire-hosts", "", "", "admin", "expiry.force",
              "delete expired hosts, even if they are many",
              query=Schema(Field("organization", SLUG)), answer=FREED),
    Operation("list-signing-keys", "", "", "admin", "keys.list",
              "list the keys that sign credentials",
              writes=False, answer=SIGNING_KEY, list_of="signingKeys",
              columns=("state", "hosts", "createdAt", "retiredAt", "kid")),
    Operation("rotate-signing-key", "", "", "admin", "keys.rotate",
              "create a signing key and use it from now on", answer=SIGNING_KEY),
    Operation("retire-signing-key", "", "", "admin", "keys.retire",
              "stop accepting a signing key", body=RETIRE_BODY, answer=SIGNING_KEY),
)
# fmt: on
OPERATION = {operation.name: operation for operation in OPERATIONS}
HTTP_OPERATIONS = tuple(operation for operation in OPERATIONS if operation.path)
BEAT, READY = OPERATION["beat"], OPERATION["readiness"]


class UncheckedCall(NamedTuple):
    """An operation with its values as a JSON body or a query has them, before any check."""

    operation: Operation
    values: Mapping[str, Any] = {}  # of a query: texts, and lists of texts
    merges: bool = False  # the body is a merge patch
    target: Optional[Named] = None  # the object that the operation is about
    hosts: Sequence[Named] = ()  # the objects of act-on-hosts

    def query(self) -> list[tuple[str, str]]:
        lists = {name: v if isinstance(v, list) else [v] for name, v in self.values.items()}
        return [(name, text) for name in lists for text in lists[name]]

    def checked(self) -> dict[str, Any]:
        """The values for a Call. Raises InvalidBody, InvalidQuery."""
        if self.operation.body is None:
            return self.operation.query.parse(self.query())
        return self.operation.check(self.values, self.merges)


# The OpenAPI document is made of the rows, the schemas and the problems, and of nothing else.

TAGS = {
    "agent": "Calls by machines, with a token and then with a credential.",
    "user": "Calls by operators and their programs, with an API key.",
    "open": "Calls that need no secret.",
}
SECURITY_SCHEMES = {
    "apiKey": {"type": "http", "scheme": "bearer", "bearerFormat": "hak_..."},
    "credential": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
}
HEADER_TYPES: Mapping[str, FieldType] = {
    "Retry-After": Integer((0, DAY), "seconds"),
    "WWW-Authenticate": Text(255, 1),
}
ID_PATH = Schema(*required(id=ID_TEXT))
FIELD_ERROR = Schema(*required(field=Text(64), detail=SENTENCE), name="FieldError")
PROBLEM = Schema(  # as Problem.document() makes it
    *required(
        type=Text(255, 1), title=Text(255, 1), status=Integer((400, 599)), detail=SENTENCE,
        code=Choice(*(kind.code for kind in problems())),
    ),
    Field("errors", ListOf(ObjectOf(FIELD_ERROR), ERRORS_NAMED)), Field("cursor", FEED_CURSOR),
    name="Problem",
)  # fmt: skip


AN_ID, A_TIME, AN_ORGANIZATION = "0ca4f1b28e3d7a95", "2027-01-15T08:00:00.000Z", "default"
A_CURSOR = "5e0ff1ce5e0ff1ce-7"
# For the name of each member or parameter: its meaning, an example, and its value if a request
# leaves it out. A name with a document or an operation before it has this meaning only there.
# fmt: off
MEANINGS: Mapping[str, tuple[Any, ...]] = {
    "Idempotency-Key": ("a retry with the same key and token gets the same host", "b1946ac9"),
    "action": ("what happened", "enroll"),
    "ActOnHostsRequest.action": ("what to do with each host", "revoke"),
    "actor": ("who did it: cli:<user>, api-key:<id>, token:<id>, host:<id> or server", "cli:alice"),
    "address": ("hosts at this address or in this network", "192.0.2.0/24"),
    "Event.address": ("the address of the caller; null: this machine", "192.0.2.7"),
    "Host.address": ("the address of the last heartbeat; null: not known", "192.0.2.7"),
    "addressSince": ("since when the host has this address", A_TIME),
    "after": ("only items after this cursor; now: only new ones", A_CURSOR),
    "agentCommand": ("the command that updates or moves an installed agent", "curl ..."),
    "agentVersion": ("the version of the agent", "0.2.0"),
    "apiKey": ("the API key; it is shown only once", "hak_0ca4f1b28e3d7a95_..."),
    "architecture": ("the machine's, as uname -m prints it", "x86_64"),
    "at": ("when the status changed", A_TIME),
    "Incident.at": ("when the first host went offline", A_TIME),
    "auditKeepSeconds": ("how long events are kept; null: forever", 7776000),
    "by": ("who did it; null: time, or a heartbeat", "cli:alice"),
    "certificateEndsAt": ("when the server's certificate expires; null: it has none", A_TIME),
    "code": ("the code of the problem", "not-found"),
    "counts": ("how many hosts have each status, without the filter by status",
               dict.fromkeys(STATUSES, 7)),
    "createdAt": ("when it was created", A_TIME),
    "createdBy": ("who created it", "cli:alice"),
    "credential": ("the credential to send with each heartbeat", "eyJh..."),
    "credentialExpiresAt": ("when the credential expires; null: never", A_TIME),
    "credentialTtlSeconds": ("the lifetime of credentials; null: unlimited", 2592000),
    "cursor": ("the nextCursor of the previous page", AN_ID),
    "Change.cursor": ("continue after this change with it", A_CURSOR),
    "ChangeList.cursor": ("continue after this page with it", A_CURSOR),
    "EventList.cursor": ("continue after this page with it", A_CURSOR),
    "Problem.cursor": ("where to continue", A_CURSOR),
    "count": ("how many hosts", 7),
    "down": ("how many of them are still down", 5),
    "description": ("what it is for", "the cellar", ""),
    "detail": ("what to do about it", "Get a new token."),
    "Event.text": ("what happened, in a sentence", "web-1 enrolled with token web tier"),
    "Event.detail": ("details of the event; they depend on the action", {"hostname": "web-1"}),
    "FieldError.detail": ("what is wrong with it", "must be a string"),
    "dockerVersion": ("the version of Docker; empty: none", "27.3.1"),
    "done": ("how many hosts were found and changed", 2),
    "enrolledAt": ("when the host enrolled", A_TIME),
    "enrolledFrom": ("the address that it enrolled from", "192.0.2.7"),
    "errors": ("the errors of a body or a query, by field", []),
    "everySeconds": ("how often cron runs the agent; null: not by cron", 300),
    "expiresAt": ("when it expires; null: never", A_TIME),
    "field": ("the name of the member or parameter", "hostname"),
    "heartbeatIntervalSeconds": ("how often a heartbeat is expected", 30),
    "host": ("the host, as it was then", {"id": AN_ID, "name": "web-1"}),
    "list-changes.host": ("only changes of this host", AN_ID),
    "hostId": ("the id of the host", AN_ID),
    "Token.hostId": ("the host that it re-enrolls; null: it enrolls new hosts", AN_ID),
    "hostname": ("as reported by the machine", "web-1.example.net"),
    "Token.hostname": ("the only hostname that may use it; null: any", "web-1.example.net"),
    "MintTokenRequest.hostname": ("the only hostname that may use it", "web-1.example.net"),
    **dict.fromkeys(("apiKeys", "changes", "events", "hosts", "organizations", "tokens"),
                    ("one page of the list", [])),
    "Token.hosts": ("the ids of some hosts that it enrolled", [AN_ID]),
    "ActOnHostsRequest.hosts": ("the ids of the hosts", [AN_ID]),
    "Incident.hosts": ("the ids of some of its hosts", [AN_ID]),
    "id": ("its id", AN_ID),
    "Incident.id": ("the cursor of its first change", A_CURSOR),
    "incident": ("only hosts of this incident of the last day", A_CURSOR),
    "incidents": ("hosts that went offline together, newest first", []),
    "Organization.id": ("its name", AN_ORGANIZATION),
    "instance": ("identifies a running agent on one machine", "5e0ff1ce5e0ff1ce"),
    "ephemeralSeconds": ("the silence after which a host is deleted; null: it is kept", 86400),
    "intervalSeconds": ("the time between heartbeats of the host; null: the server's", 60),
    "joinCommand": ("the command that enrolls a machine; replace TOKEN", "curl ..."),
    "label": ("only with this label, or this key; label!=rack=b4: without; repeatable", "rack=b4"),
    "labels": ("keys and values, for people and tools", {"rack": "b4"}, {}),
    "EditHostPatch.labels": ("labels to set, or with null to remove; null: all", {"rack": None}),
    "ActOnHostsRequest.labels": ("labels to set, or with null to remove", {"rack": None}),
    "lastSeen": ("when the last heartbeat came; null: none yet", A_TIME),
    "lastUsedAt": ("when it was last used, to the hour; null: never", A_TIME),
    "limit": ("the most items on a page", 100, PAGE_DEFAULT),
    "maxUses": ("how many hosts it may enroll", 1, 1),
    "mutedUntil": ("until when notifications are off; null: it is not muted", A_TIME),
    "muted": ("whether notifications are off now", False),
    "name": ("what people call the host", "web-1"),
    "named": ("what this names: an id, what it begins with (6 digits or more), or of a host its "
              "name or hostname", "web-1"),
    "EnrollRequest.name": ("what people call the host (its hostname)", "web-1"),
    "AddOrgRequest.name": ("the name of the new organization", AN_ORGANIZATION),
    "nextCursor": ("the cursor of the next page; null: this is the last page", AN_ID),
    "nextHeartbeatSeconds": ("when to send the next heartbeat", 29),
    "notFound": ("ids that no host has", [AN_ID]),
    "number": ("1, 2, 3 ... without gaps", 7),
    "signingKey": ("only hosts that use this signing key", "5b1c09d2f3a4e687"),
    "sinceSeconds": ("only items of the last so many seconds", 3600),
    "olderSeconds": ("only hosts that have had their status for so many seconds", 86400),
    "organization": ("only this organization", AN_ORGANIZATION),
    "organizationId": ("its organization; null: all", AN_ORGANIZATION),
    "os": ("the operating system", "Debian GNU/Linux 12"),
    "pin": ("the keys that agents trust, as in curl --pinnedpubkey; null: any", "sha256//..."),
    "port": ("the port of each target", EXPORTER_PORT),
    "port_label": ("the label with the port of a host", "port"),
    "publicUrl": ("the URL where agents reach the server", "https://enroll.lan:8443"),
    "q": ("part of a name, hostname, id, address, system or label value", "web"),
    "reason": ("the reason, for the audit log", "sold"),
    "refusedAt": ("when a request of the host was last refused; null: never", A_TIME),
    "refusedCode": ("the code of that refusal", "credential-superseded"),
    "revokedAt": ("when it was revoked; null: it was not", A_TIME),
    "role": ("admin: may change things; viewer: may only read", "viewer", "admin"),
    "seen": ("the last heartbeat before the change; null: there was none", A_TIME),
    "self": ("allow revoking the key of this request", "true", "false"),
    "show": ("a label to show with each host; repeatable", "rack"),
    "sort": ("the order; attention: hosts that are down come first", "attention", "enrolledAt"),
    "state": ("whether it is valid, and if not, why", "valid"),
    "status": ("only this status; repeatable", "offline"),
    "Host.status": ("the status of the host", "online"),
    "Problem.status": ("the HTTP status", 404),
    "Change.status": ("the new status", "offline"),
    "Health.status": ("the server answers", "ok"),
    "Readiness.status": ("the server can work", "ready"),
    "statusSince": ("when the status began; null: not known", A_TIME),
    "statusReason": ("why the host has its status, in sentences",
                     "Last heartbeat 5 s ago; one is due every 30 s."),
    "subject": ("the target: host:<id>, token:<id> and so on", f"host:{AN_ID}"),
    "time": ("when it happened", A_TIME),
    "text": ("the incident in a sentence", "7 hosts went offline together"),
    "title": ("the problem in a few words", "Not found"),
    "token": ("the token; it is shown only once", "het_0ca4f1b28e3d7a95_..."),
    "EnrollRequest.token": ("the enrollment token", "het_0ca4f1b28e3d7a95_..."),
    "list-hosts.token": ("only hosts that enrolled with this token", AN_ID),
    "tokenId": ("the id of the token that it enrolled with first", AN_ID),
    "ttlSeconds": ("its lifetime", 3600, TOKEN_TTL),
    "MintApiKeyRequest.ttlSeconds": ("its lifetime; null: unlimited", 43200),
    **{f"HostCounts.{status}": ("how many hosts have this status", 7) for status in STATUSES},
    "type": ("urn:hostenroll:problem: and the code", "urn:hostenroll:problem:not-found"),
    "until": ("when the last of them was back; null: some are still down", A_TIME),
    "usedAt": ("when it was last used; null: never", A_TIME),
    "usedFrom": ("the address that it was last used from", "192.0.2.7"),
    "uses": ("how many hosts enrolled with it", 1),
    "version": ("the version of the server", __version__),
    "wait": ("how long to wait if there is nothing new", 30, 0),
    "warnings": ("warnings about the host, in sentences", []),
    "was": ("the status before; null: it has just enrolled", "online"),
    "withHosts": ("also revoke the hosts that enrolled with it", "true", "false"),
    "withKeys": ("also revoke the keys that it created, and theirs", "true", "false"),
}
# fmt: on


def _described(owner: str, name: str, schema: dict[str, Any], is_request: bool) -> dict[str, Any]:
    """Add the meaning to the schema of a member or a parameter. is_request: a request has it."""
    text, example, *default = MEANINGS.get(f"{owner}.{name}") or MEANINGS[name]
    rule = schema.get("description")
    described = {**schema, "description": f"{text}; {rule}" if rule else text}
    defaults = {"default": default[0]} if default and is_request else {}
    return {**described, "examples": [example], **defaults}


def _extensible(schema: Any) -> Any:
    """The part of an answer's schema that clients may rely on: newer versions may add members, and
    values of an enum. The tests check answers against the strict schema."""
    if isinstance(schema, list):
        return [*map(_extensible, schema)]
    if not isinstance(schema, dict):
        return schema
    names = {"enum": "x-extensible-enum"}
    opened = {names.get(name, name): _extensible(value) for name, value in schema.items()}
    if opened.get("additionalProperties") is False:
        del opened["additionalProperties"]
    return opened


def _object_schema(name: str, schema: Schema, is_request: bool) -> dict[str, Any]:
    """The component of a body (is_request) or of an answer."""
    document = schema.json_schema() if is_request else _extensible(schema.json_schema())
    members, owner = document["properties"], name.replace("Minted", "")
    document["properties"] = {n: _described(owner, n, members[n], is_request) for n in members}
    return cast("dict[str, Any]", document)


def _parameters(operation: Operation) -> Iterator[dict[str, Any]]:
    for place, schema in (
        ("path", ID_PATH if "{id}" in operation.path else NO_MEMBERS),
        ("query", operation.query),
        ("header", operation.headers),
    ):
        for name, field in schema.fields.items():
            if name == "label!":  # generators of clients would make one name of label! and label
                continue
            described = _described(operation.name, name, field.parameter_schema(), True)
            text, (example,) = described.pop("description"), described.pop("examples")
            parameter = {"name": name, "in": place, "required": field.required}
            yield {**parameter, "description": text, "schema": described, "example": example}


def _request_body(operation: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    body, name = operation.body, operation.name.title().replace("-", "")
    bodies = (JSON, f"{name}Request", body), (MERGE_PATCH, f"{name}Patch", operation.patch)
    content: dict[str, Any] = {}
    for media, name, schema in bodies:
        if schema is not None:
            schemas[name] = _object_schema(name, schema, True)
            content[media] = {"schema": {"$ref": f"#/components/schemas/{name}"}}
    is_required = body is not None and any(field.required for field in body.fields.values())
    return {"required": is_required, "content": content}


def _refusal_response(kinds: Sequence[type[Problem]]) -> dict[str, Any]:
    names = sorted({name for kind in kinds for name, _ in kind().headers()})
    headers = {n: {"required": True, "schema": HEADER_TYPES[n].json_schema()} for n in names}
    mistake = [FieldError("hostname", "must be a string")]
    examples = {
        kind.code: {"value": kind(errors=mistake if kind.names_errors else ()).document()}
        for kind in kinds
    }
    return {
        "description": "\n\n".join(f"{kind.code}: {kind.remedy}" for kind in kinds),
        **({"headers": headers} if headers else {}),
        "content": {PROBLEM_JSON: {"schema": PROBLEM.reference(), "examples": examples}},
    }


def _openapi_operation(
    operation: Operation, schemas: dict[str, Any], responses: dict[str, Any]
) -> dict[str, Any]:
    """The description of an operation. The schemas of its bodies are added to schemas, and its
    refusals to responses: both become components."""
    tag, scheme, _ = CALLERS[operation.caller]
    document: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "tags": [tag],
        "security": [{scheme: []}] if scheme else [],
        "parameters": [*_parameters(operation)],
    }
    if operation.body is not None:
        document["requestBody"] = _request_body(operation, schemas)
    success: dict[str, Any] = {"description": HTTPStatus(operation.status).phrase}
    if operation.status != HTTPStatus.NO_CONTENT:
        answer = operation.schema()
        text: dict[str, Any] = {} if operation.content_type == JSON else {"type": "string"}
        schema = text if answer is None else answer.reference()
        kinds = (HTML, PLAIN) if operation.content_type == HTML else (operation.content_type,)
        success["content"] = {kind: {"schema": schema} for kind in kinds}
    document["responses"] = {str(operation.status): success}
    for status, refusals in groupby(operation.problems(), attrgetter("status")):
        group = list(refusals)
        name = "-or-".join(kind.code for kind in group)
        responses[name] = _refusal_response(group)
        document["responses"][str(status)] = {"$ref": f"#/components/responses/{name}"}
    return document


def openapi_document() -> dict[str, Any]:
    """The HTTP API in OpenAPI 3.1. Newer versions may add members to answers, and values to an
    x-extensible-enum. The schemas of requests are exactly what requests are checked against."""
    paths: dict[str, dict[str, Any]] = {}
    responses: dict[str, Any] = {}
    schemas: dict[str, Any] = {}
    answers = [PROBLEM, FIELD_ERROR, CHANGED_HOST.schema, HOST_COUNTS]
    for operation in HTTP_OPERATIONS:
        methods = paths.setdefault(operation.path, {})
        methods[operation.method.lower()] = _openapi_operation(operation, schemas, responses)
        if operation.answer is not None and (schema := operation.schema()) is not None:
            answers += [operation.answer.schema, schema]
    schemas.update({one.name: _object_schema(one.name, one, False) for one in answers if one.name})
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "hostenroll",
            "version": __version__,
            "summary": "Enroll machines and see which are alive.",
            "description": "Newer versions may add members and words to answers.",
        },
        # The URL is relative to this document, because a proxy may remove a prefix from paths.
        "servers": [{"url": ".", "description": "the server of this document"}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": responses,
            "securitySchemes": SECURITY_SCHEMES,
        },
    }


# From a method and a path to an operation.

Methods = dict[str, Operation]
PATHS: dict[str, Methods] = {}
for _operation in HTTP_OPERATIONS:
    PATHS.setdefault(_operation.path, {})[_operation.method] = _operation
for _methods in PATHS.values():
    if "GET" in _methods:
        _methods["HEAD"] = _methods["GET"]
ALL_METHODS = list(dict.fromkeys(chain.from_iterable(PATHS.values())))
SEGMENTS_MAXIMUM = max(path.count("/") for path in PATHS) + 1  # a longer path matches nothing


def _find_path(path: str) -> tuple[Methods, str]:
    if path in PATHS:
        return PATHS[path], ""
    segments = path.split("/", SEGMENTS_MAXIMUM)
    for n, segment in enumerate(segments):
        methods = PATHS.get("/".join((*segments[:n], "{id}", *segments[n + 1 :])))
        if methods is not None and segment:
            return methods, segment
    raise NotFound("This path does not exist.")


def _allow(methods: Iterable[str]) -> Headers:
    return (("Allow", ", ".join([*methods, "OPTIONS"])),)


@lru_cache(maxsize=256)  # a path may be 16 KiB long
def find_operation(method: str, path: str) -> tuple[Operation, str]:
    """The operation, and the id in the path. Raises NotFound, MethodNotAllowed, UnknownMethod."""
    if method not in METHODS:
        raise UnknownMethod()
    methods, identifier = _find_path(path)
    if method not in methods:
        raise MethodNotAllowed(headers=_allow(methods))
    return methods[method], identifier


# The fast path of heartbeats.


@lru_cache(maxsize=HEADS_CACHED)
def _heartbeat_head(before: bytes, after: bytes) -> Optional[Head]:
    """Parse a heartbeat whose credential was cut out: before and after are the bytes around it.
    None unless the credential was the value of the head's only Authorization field (a body or a
    trailer may hold a line that looks like one), and the bytes are one whole plain heartbeat."""
    if b"\r\n\r\n" in before:
        return None
    reader = RequestReader()
    try:
        request = reader.next(before + AUTHORIZATION + b"\r\n" + after)
        if request is None or reader.buffer or request.body not in (b"", b"{}"):
            return None
        operation, _ = find_operation(request.head.method, request.head.path)
    except Problem:
        return None
    return request.head if operation is BEAT else None


_tuple_of = tuple.__new__  # a NamedTuple's own constructor takes twice as long


class HeartbeatFastPath:
    """Recognizes plain heartbeats without parsing them.

    An agent sends the same bytes with every heartbeat, and the heads of a fleet differ only in the
    credential. All credentials of one signing key begin with the same header and first claim: the
    opening. So the bytes around the credential are compared with those of the heartbeat before, and
    parsed only if they differ; and a credential is verified once an hour, then found in a dict.

    The keys of the dict are what follows the opening. The dict evicts nothing: hosts beat in
    rotation, so in an LRU cache smaller than the fleet each entry would be evicted just before its
    next use. It is cleared once an hour, with every change of the keys, and when the clock is set.
    """

    def __init__(self, keys: SigningKeys) -> None:
        self._keys = keys
        self.clear(0)

    def clear(self, now: int) -> None:
        """Forget all credentials, and use the keys as they are now. now: Unix ms."""
        self._verified: dict[bytes, CredentialRef] = {}
        self._refs: dict[CredentialRef, CredentialRef] = {}  # one object for all equal ones
        # The bytes around the credential of the last heartbeat. No request begins with a zero byte.
        self._before, self._after, self._head = b"\0", b"", INTERNAL_REQUEST.head
        self._gap = slice(1, 0)  # where the bytes have what follows the opening
        self._since, self._until = now, now + CREDENTIALS_KEPT_MS
        self._keyring = self._keys.keyring
        self._opening = BEARER + self._keyring.first.opening

    def match(
        self, data: bytes, reader: RequestReader, now: int
    ) -> Optional[tuple[Heartbeat, Head]]:
        """The heartbeat, if data is one whole plain heartbeat with a valid credential that is not
        due for renewal; None for all other data, which is then parsed and admitted. data: what
        arrived on the connection of the reader, which is between two requests. now: Unix ms."""
        if self._keys.keyring is not self._keyring or not self._since <= now < self._until:
            self.clear(now)
        address = reader.peer
        if reader.proxies:
            end = data.find(b"\r\n\r\n")
            head, address = split_forwarded(data[:end], reader.proxies, address)
            data = head + data[end:]
        rest = b"\r\n"
        if data.startswith(self._before) and data.endswith(self._after):
            rest = data[self._gap]
        ref = self._verified.get(rest)
        if ref is None:
            if b"\r\n" in rest:  # the bytes around the credential differ, or there are more lines
                rest = self._cut_credential(data)
            ref = self._verified.get(rest) or self._verify(rest, now)
            if ref is None:
                return None
        origin = _tuple_of(Origin, (address, reader.connection, reader.number))
        return _tuple_of(Heartbeat, (host_of_credential(rest), ref, origin)), self._head

    def _cut_credential(self, data: bytes) -> bytes:
        """What follows the opening of the credential in a plain heartbeat; empty for other data."""
        before, opening, behind = data.partition(self._opening)
        rest, end, after = behind.partition(b"\r\n")
        if not after or len(before) + len(after) > HEAD_CACHED_MAXIMUM:
            return b""
        head = _heartbeat_head(before, after)
        if head is None:
            return b""
        self._before, self._after, self._head = before + opening, end + after, head
        self._gap = slice(len(self._before), -len(self._after))
        return rest

    def _verify(self, rest: bytes, now: int) -> Optional[CredentialRef]:
        """Verify a credential, and keep it in the dict, unless it becomes due for renewal before
        the next clear(). Only credentials that we signed are kept, so junk cannot fill the dict."""
        if not rest:
            return None
        keys = self._keys
        claims = keys.keyring.verify(keys.keyring.first.opening + rest)
        if claims is None or keys.is_due(claims, now):
            return None
        ref = heartbeat_of(claims, LOCAL).credential
        if len(self._verified) < CREDENTIALS_CACHED and not keys.is_due(claims, self._until):
            ref = self._verified[rest] = self._refs.setdefault(ref, ref)
        return ref


@lru_cache(maxsize=16)  # enough for one second: intervals differ in digits, answers in closes
def _heartbeat_answer(digits: int, seconds: int, closes: bool) -> bytes:
    """The whole answer to a plain heartbeat, as write_response() makes it, with 0 as lastSeen, and
    placeholders for the host and for an interval with this number of digits."""
    interval = 10 ** (digits - 1)
    document = HEARTBEAT.of(HeartbeatResult(0, 0, None, interval))
    answer = write_response(json_response(BEAT.status, document), seconds, closes, False)
    answer = answer.replace(id_text(0).encode("ascii"), b"%016x")
    return answer.replace(b'Seconds":%d' % interval, b'Seconds":%b')


@lru_cache(maxsize=16)  # enough for one tick, as above
def _heartbeat_template(last_seen: int, digits: int, seconds: int, closes: bool) -> bytes:
    """The same with lastSeen, which is all that differs from tick to tick."""
    answer = _heartbeat_answer(digits, seconds, closes)
    return answer.replace(rfc3339(0).encode("ascii"), rfc3339(last_seen).encode("ascii"))


class Api:
    """HTTP's door to the registry: admit() turns a request into a Call, the server has the registry
    run the Call in a tick, and answer() turns its outcome into a Response."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.metrics = registry.metrics
        self.match = HeartbeatFastPath(registry.keys).match
        self._next_interval = registry.heartbeats.next_interval
        self._readiness_at, self._readiness = 0, object()  # the time and outcome of the last READY

    # Before the tick.

    def admit(self, request: Request, now: int) -> Union[Response, Work]:
        """Judge a request: the answer, if there is one already, or the work for the next tick. All
        that is read from the database is the row of a secret, and the facts of a host. Wrong
        secrets are refused here, because ticks that enroll wait for the disk: a flood of wrong
        secrets must not get into one."""
        head = request.head
        try:
            if len(request.body) > head.body_maximum:
                raise AgentBodyTooLarge()
            if head.method == "OPTIONS":
                methods = ALL_METHODS if head.path == "*" else _find_path(head.path)[0]
                return Response(204, headers=_allow(methods))
            operation, identifier = find_operation(head.method, head.path)
            if operation.static is not None:
                return operation.static(head)
            if operation.caller == "credential":
                return self._admit_heartbeat(request, now)
            if operation.caller == "token":
                return self._admit_enrollment(operation, request, now)
            if operation is READY:
                # Everybody may ask, and the check writes to the database: so each outcome, good or
                # bad, is used again for READY_EVERY.
                call = Call(READY, origin=request.origin)
                if not 0 <= now - self._readiness_at < READY_EVERY * SECOND_MS:
                    self._readiness_at, self._readiness = now, call
                return self.answer(call, self._readiness) or call
            return self._admit_user(operation, request, identifier, now)
        except Problem as problem:
            return self.refuse(problem, request.origin, now)

    def _admit_user(
        self, operation: Operation, request: Request, identifier: str, now: int
    ) -> Call:
        """Raises refusals in this order: 401, 403 for the role, 400; the tick adds the others."""
        requested = f"{operation.method} {sanitize_path(request.head.path)}"
        if not request.authorization:
            raise ApiKeyMissing().with_audit("anonymous", "", None, request=requested)
        by = self.registry.api_keys.identify(request.authorization, requested, request.origin, now)
        problem = None
        if operation.caller == "owner" and by.organization is not ALL_ORGANIZATIONS:
            problem = Forbidden("Use an admin's API key for all organizations.")
        if operation.caller != "viewer" and by.role != "admin":
            problem = problem or Forbidden()
        if problem:
            raise problem.with_audit(by.name, by.name, by.organization, request=requested)
        options: dict[str, Any] = {"errors": "strict", "max_num_fields": PARAMETERS_MAXIMUM}
        try:
            pairs = parse_qsl(request.head.query, keep_blank_values=True, **options)
        except ValueError:
            raise InvalidQuery(
                f"A query is at most {PARAMETERS_MAXIMUM} parameters, percent-encoded in UTF-8."
            ) from None
        values = operation.query.parse(pairs)
        if operation.body is not None:
            values = operation.check(parse_json(request.body or b"{}"), request.head.merges)
        return Call(operation, by, parse_id(identifier), values, request.origin)

    def _admit_enrollment(self, operation: Operation, request: Request, now: int) -> Call:
        key = request.head.idempotency_key
        try:
            key = None if key is None else IDEMPOTENCY_KEY.check(key)
        except ValueError as error:
            raise MalformedRequest(f"Idempotency-Key {error}.") from None
        body = ENROLL_BODY.check(parse_agent_json(request.body))
        token = self.registry.tokens.prove(body["token"], body["hostname"], request.origin, now)
        facts = {COLUMNS[fact.name]: body.get(fact.name, "") for fact in FACTS}
        values = {**body, "token": token, "facts": facts, "idempotencyKey": key}
        if secret_state(token, now) != "valid" or (key is not None and token.uses > 0):
            # Most likely nothing is written. If something is, the tick begins again as durable.
            operation = operation._replace(durable=False)
        return Call(operation, values=values, origin=request.origin)

    def _admit_heartbeat(self, request: Request, now: int) -> Work:
        """A plain Heartbeat, if it brings no new facts and needs no renewal; else a Call."""
        if not request.authorization:
            raise CredentialMissing()
        claims = self.registry.keys.authenticate(request.authorization, now)
        facts: dict[str, Any] = {}
        problem: Optional[Problem] = None
        if request.body not in (b"", b"{}"):
            try:
                values = HEARTBEAT_BODY.check(parse_agent_json(request.body))
                facts = {COLUMNS[name]: value for name, value in values.items()}
            except InvalidBody as error:  # raised in the tick, once the credential is accepted
                problem = error
        if problem is None and self.registry.heartbeats.is_plain(claims, facts, now):
            return heartbeat_of(claims, request.origin)
        values = {"claims": claims, "facts": facts, "problem": problem}
        return Call(BEAT, values=values, origin=request.origin)

    # After the tick.

    def answer(self, work: Work, outcome: Any) -> Optional[Response]:
        """The answer for the outcome of work in a tick; None if the outcome is a Call, which is to
        be run in a later tick."""
        if isinstance(work, Call) and work.operation is READY:
            self._readiness = outcome
        if isinstance(outcome, OperatorError):  # a fault of this machine: no caller can correct it
            log.error("%s", outcome)
            outcome = Internal()
        if isinstance(outcome, Problem):
            return self.refusal(outcome)
        if isinstance(outcome, Call):
            return None
        if isinstance(work, Heartbeat):
            result = HeartbeatResult(work.host, outcome, None, self._next_interval(work.host))
            return BEAT.response(result)
        operation = work.operation
        assert isinstance(operation, Operation), "the server's own calls have no answer"
        return operation.response(outcome)

    def heartbeat_answer(self, host: int, last_seen: int, seconds: int, closes: bool) -> bytes:
        """The bytes of the answer to a plain heartbeat, at a quarter of the cost of answer() and
        write_response(). last_seen: Unix ms; seconds: Unix time of the answer."""
        interval = b"%d" % self._next_interval(host)
        return _heartbeat_template(last_seen, len(interval), seconds, closes) % (host, interval)

    def refuse(self, problem: Problem, origin: Origin, now: int) -> Response:
        """The answer to a request that is refused before any tick. The next tick audits it."""
        self.registry.audit.refuse(problem, origin, now)
        return self.refusal(problem)

    def refusal(self, problem: Problem) -> Response:
        """Count a Problem, and make its answer."""
        self.metrics.refusals[problem.code] += 1
        return refusal(problem)


# 10. Server
#
# Law: the loop waits for the selector, the write lock and the disk (a commit, a checkpoint), and
# for nothing else. Threads write the log, and read files, because a mount may hang. Sockets do not
# block. http.server is the frame: its threads, its parser and its name look-up at the start are not
# used.
#
# Contents: connection states; TLS; Connections, which keeps them, receives and sends; Exchanges,
# from requests to answers; Server, whose _turn() is the loop; service managers; bench's client.


# Connection states: theory of operation
#
# A connection is in one state, which says what the server waits for: bytes from the peer
# (HANDSHAKE, HEAD, BODY, IDLE, LINGER), the peer to take ours (WRITING), or nothing from the peer
# (BUSY: its request runs, or waits to run; HELD: its request waits for more of a feed; CLOSED). It
# begins in HEAD, or with TLS in HANDSHAKE. STATES has a row for each state, TRANSITIONS the states
# that may follow it. Only Connections.move() changes the state.
#
# All connections in a state have the same time for it. So each state has a queue, the longest
# waiting first, and a turn looks at the heads of the queues, not at thousands of connections. To
# enter a state again does not move the deadline: a byte now and then buys no time. Only IDLE starts
# again, with each answer. Past a deadline Server._expire() answers 408 if a request may have begun,
# and closes.
#
# A BUSY connection has no deadline and is not evicted: its call ends by itself, and may be
# committed. Its socket is not read, so a peer cannot pile up requests. But the selector watches the
# socket until the peer sends more, because most requests are answered before that. For the same
# reason the connection of a plain heartbeat stays IDLE in the turn that answers it, and becomes
# BUSY only if that turn does not get the write lock.
#
# A HELD connection waits until the time of its request is over. Its socket is read, to see whether
# the peer has gone; up to RECEIVE_SIZE bytes of the next request are taken, and wait.
#
# If the socket does not take all output at once, the connection becomes WRITING. When all is taken,
# Connection.next_state follows: the state that was interrupted (by a part of the handshake, or 100
# Continue), or after an answer IDLE or CLOSED. To close a socket with unread bytes resets it, and
# the peer may lose the answer: while it may be sending, LINGER comes first (RFC 9112 section 9.6).


class State:
    """What the server waits for from a connection. A plain class, not a NamedTuple: states are
    compared and hashed by identity, which saves 0.4 us in each move."""

    def __init__(self, name: str, deadline: float, events: int, eviction: int) -> None:
        self.name = name
        self.deadline = deadline  # seconds
        self.events = events  # that the selector watches for
        self.eviction = eviction  # if a new connection needs its place: 1 first, 0 never


READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
MORE_FOLLOWS: int = getattr(socket, "MSG_MORE", 0)  # of Linux: what is sent may wait for the rest

# fmt: off
#                 name         deadline            events  eviction
HANDSHAKE = State("handshake", HANDSHAKE_DEADLINE, READ,   1)
HEAD      = State("head",      HEAD_DEADLINE,      READ,   1)
IDLE      = State("idle",      IDLE_DEADLINE,      READ,   1)
BODY      = State("body",      BODY_DEADLINE,      READ,   2)
LINGER    = State("linger",    LINGER_DEADLINE,    READ,   3)
WRITING   = State("writing",   ANSWER_DEADLINE,    WRITE,  4)
HELD      = State("held",      math.inf,           READ,   5)
BUSY      = State("busy",      math.inf,           0,      0)
CLOSED    = State("closed",    math.inf,           0,      0)

STATES = (HANDSHAKE, HEAD, IDLE, BODY, LINGER, WRITING, HELD, BUSY, CLOSED)

TRANSITIONS: dict[State, set[State]] = {
    HANDSHAKE: {HEAD, WRITING, LINGER, CLOSED},
    HEAD:      {BODY, BUSY, WRITING, IDLE, LINGER, CLOSED},
    IDLE:      {HEAD, BODY, BUSY, WRITING, LINGER, CLOSED},
    BODY:      {BUSY, WRITING, IDLE, LINGER, CLOSED},
    BUSY:      {HEAD, BODY, WRITING, HELD, IDLE, LINGER, CLOSED},
    HELD:      {BUSY, WRITING, IDLE, LINGER, CLOSED},
    WRITING:   {HANDSHAKE, HEAD, BODY, BUSY, IDLE, LINGER, CLOSED},
    LINGER:    {CLOSED},
    CLOSED:    set(),
}
# fmt: on


class Tls:
    """The TLS of one connection, from bytes to bytes: it never touches the socket."""

    # A fatal alert, illegal_parameter, as OpenSSL sends at its own limit: RFC 8446 section 6.2.
    TOO_LONG = bytes((21, 3, 3, 0, 2, 2, 47))

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()  # parts of the handshake, alerts, records
        self.session = context.wrap_bio(self._incoming, self.outgoing, server_side=True)
        self.handshake_done = False
        self.has_ended = False  # the peer sends no more
        self.buffered = 0  # an upper bound of the bytes of an unfinished handshake or record
        self.taken = b""  # the bytes that take() was given last, until read()
        self.can_read = self._has_failed = False

    def take(self, data: bytes) -> None:
        """Take what has arrived. Then can_read, or shake_hands() comes first."""
        self._incoming.write(data)
        self.buffered += len(data)
        self.taken, self.can_read = data, self.handshake_done

    def shake_hands(self) -> None:
        """Go on with the handshake. read() raises what it fails with."""
        self.can_read = True
        try:
            self.session.do_handshake()
            self.handshake_done, self.buffered = True, 0
        except ssl.SSLWantReadError:
            pass
        except (OSError, ValueError):  # ssl.SSLError is an OSError
            self._has_failed = True

    def read(self) -> bytes:
        """The plain text of what was taken. Raises ssl.SSLError."""
        self.taken, self.can_read = b"", False
        if self._has_failed:
            raise ssl.SSLError("the handshake has failed")
        parts: list[bytes] = []
        try:
            # Stop when nothing is pending: to raise SSLWantReadError takes longer than to decrypt.
            while self.handshake_done and self._incoming.pending and not self.has_ended:
                parts.append(self.session.read(TLS_RECORD))
                self.has_ended = not parts[-1]
        except ssl.SSLWantReadError:
            pass
        if parts:
            self.buffered = 0
        if not self.handshake_done and self.buffered > HANDSHAKE_MAXIMUM:
            self.outgoing.read()  # drop an answer, if this was the end of the hello
            self.outgoing.write(self.TOO_LONG)
            raise ssl.SSLError("the handshake is too long")
        return b"".join(parts)

    def send(self, data: bytes, is_last: bool) -> bytes:
        """The bytes to send for a plain text, after all that wait. Raises ssl.SSLError."""
        self.session.write(data)
        return self.end() if is_last else self.outgoing.read()

    def end(self) -> bytes:
        """The bytes that wait to be sent, then close_notify: without it, the end may be a
        truncation attack (RFC 8446 section 6.1)."""
        self._incoming.write_eof()  # the peer's is not waited for: nothing depends on it
        with suppress(ssl.SSLError):  # without IGNORE_EOF
            self.session.unwrap()
        return self.outgoing.read()


# With this option OpenSSL 3 takes the end of the input for the peer's close_notify. Only Tls.end()
# reports such an end, and saves the 5 us of an exception.
IGNORE_EOF: int = getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
RSA_KEY = bytes.fromhex("2a864886f70d010101")  # in a certificate: rsaEncryption, RFC 3279
PEM = re.compile(r"-----BEGIN (PRIVATE KEY|CERTIFICATE)-----.+?-----END \1-----", re.DOTALL)


def load_tls(certificate: str, key: Optional[str]) -> tuple[Optional[ssl.SSLContext], list[bytes]]:
    """The TLS context of a server, from a certificate chain and its key, both PEM files; and the
    chain in DER, the server's own first. Without the key, which a proxy has, only the chain. Raises
    OperatorError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | IGNORE_EOF
    context.num_tickets = 0  # curl never resumes a session; two tickets are 40 of 283 us of CPU
    context.set_alpn_protocols(["http/1.1"])
    try:
        for path in filter(None, (certificate, key)):
            is_usable = os.path.isfile(path) and os.path.getsize(path) <= KEY_FILE_MAXIMUM
            if os.path.exists(path) and not is_usable:
                raise OperatorError(f"{path} is not a file, or far too large")
        with open(certificate, encoding="latin-1") as file, open(key or certificate, "rb"):
            chain = [found[0] for found in PEM.finditer(file.read()) if found[1] == "CERTIFICATE"]
        if not chain:
            raise OperatorError(f"there is no PEM certificate in {certificate}")
        if key:
            context.load_cert_chain(certificate, key, password=lambda: b"")  # never asks a terminal
        return context if key else None, [*map(ssl.PEM_cert_to_DER_cert, chain)]
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        if reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
            reason = "the key does not match the certificate"
        what = "and its key without a password, in PEM"
        named = f"{certificate} and {key} are not a certificate {what}" if key else certificate
        raise OperatorError(f"{named}: {reason}") from error
    except OSError as error:
        raise OperatorError(f"cannot read {error.filename}: {error.strerror}") from error


# Takes the server's host; returns its TLS, and what the loop calls when it begins to use that.
TlsLoader = Callable[[str], tuple[Optional[ssl.SSLContext], Callable[[], None]]]


def distrust(chain: Sequence[bytes], host: str) -> str:
    """Why this machine's own trust store does not verify a chain, in DER, for a host; "" if it
    does. A client in memory is given the messages in which a TLS 1.2 server shows its chain: they
    are in the clear, so it takes no key to make them (RFC 5246 sections 7.4.1.3 and 7.4.2)."""
    client, incoming = ssl.create_default_context(), ssl.MemoryBIO()
    client.verify_flags &= ~ssl.VERIFY_X509_STRICT  # from Python 3.13 on; curl is not strict
    client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_2
    suite = b"\xc0\x30" if RSA_KEY in chain[0] else b"\xc0\x2c"  # ECDHE, RSA or ECDSA, AES-256
    hello = b"\3\3%b\0%b\0\0\5\xff\1\0\1\0" % (bytes(32), suite)  # the end: RFC 5746
    certificates = b"".join(len(der).to_bytes(3, "big") + der for der in chain)
    shown = len(certificates).to_bytes(3, "big") + certificates
    flight = b"\2\0\0%c%b\x0b%b%b" % (len(hello), hello, len(shown).to_bytes(3, "big"), shown)
    for at in range(0, len(flight), TLS_RECORD):
        part = flight[at : at + TLS_RECORD]
        incoming.write(b"\x16\3\3" + len(part).to_bytes(2, "big") + part)
    try:
        session = client.wrap_bio(incoming, ssl.MemoryBIO(), server_hostname=host)
        with suppress(ssl.SSLWantReadError):  # the chain is verified, and it waits for the rest
            session.do_handshake()
    except (OSError, ValueError) as error:
        return getattr(error, "verify_message", "") or str(error)
    return ""


class Connection:
    """A peer: its socket and state, its next request so far, and output that it has not taken."""

    def __init__(self, peer: socket.socket, reader: RequestReader, state: State) -> None:
        self.socket = peer
        self.reader = reader
        self.tls: Optional[Tls] = None
        self.state = state
        self.interest = 0  # events that the selector watches for
        self.buffered = 0  # bytes of an unfinished request, or of a large one that runs
        self.output: Union[bytes, memoryview] = b""
        self.next_state = IDLE  # the state that follows when the output is taken
        self.key = -1  # the id of the API key for which it is HELD
        self.lingers = False  # before it closes: the peer may still be sending


class Connections:
    """All connections, by state. Receives and sends on their sockets."""

    def __init__(
        self, deadlines: Mapping[State, float], metrics: Metrics,
        maximum: int = CONNECTIONS_MAXIMUM, number: int = 0,
    ) -> None:  # fmt: skip
        """deadlines: seconds, if not those of STATES. number: before the first connection's."""
        self.metrics, self._maximum, self._number = metrics, maximum, number
        self.is_crowded = False  # a new connection waits for a place or a descriptor
        self._short_at = -math.inf  # when no descriptor was free
        # For each state, its connections and when they entered it; the longest waiting first.
        self._queues: dict[State, OrderedDict[Connection, float]] = {
            state: OrderedDict() for state in STATES
        }
        self._idle = self._queues[IDLE]
        self._deadlines = [(self._queues[s], deadlines.get(s, s.deadline)) for s in STATES]
        self.handshakes: list[tuple[Connection, Tls]] = []  # to go on with, and then to receive
        self.selector = selectors.DefaultSelector()
        self.moment = time.monotonic()  # of this turn
        self.buffered = 0  # bytes, with the output, of all connections together

    def accept(self, listener: socket.socket, most: int, state: State) -> list[Connection]:
        """Accept connections, into a state, while there is room. They are read after the tick."""
        accepted: list[Connection] = []
        most = min(most, self._maximum - self.metrics.open_connections)
        self.is_crowded = most <= 0
        while len(accepted) < most:
            try:
                peer, address = listener.accept()
            except (BlockingIOError, InterruptedError):
                break
            except ConnectionError:  # the peer has gone already
                continue
            except OSError as error:  # EMFILE, ENFILE, ENOBUFS, ENOMEM
                if accepted:  # perhaps no other one waits: a later turn looks
                    break
                self.is_crowded = True
                if self.moment - self._short_at > TROUBLE_OVER:
                    advice = "raise the limit, ulimit -Hn or LimitNOFILE"
                    log.warning("cannot accept connections: %s: %s", error.strerror, advice)
                self._short_at = self.moment
                break
            peer.setblocking(False)
            self._number += 1
            reader = RequestReader(plain_address(address[0]), self._number)
            accepted.append(Connection(peer, reader, state))
            self.add(accepted[-1])
        return accepted

    def add(self, connection: Connection) -> None:
        """Add an accepted connection. The first move() watches it."""
        self._queues[connection.state][connection] = self.moment
        self.metrics.counts["connections"] += 1
        self.metrics.open_connections += 1

    def move(self, connection: Connection, state: State) -> None:
        """Put a connection into a state, under its deadline, and watch for its events."""
        before = connection.state
        if state is IDLE and before is IDLE:
            self.restart_deadline(connection)
        elif state is not before:
            if state not in TRANSITIONS[before]:
                raise RuntimeError(f"a connection cannot go from {before.name} to {state.name}")
            del self._queues[before][connection]
            connection.state = state
            if state is not CLOSED:
                self._queues[state][connection] = self.moment
        events = state.events
        if state is BODY and connection.reader.has_more:
            events = 0  # receive no more until the buffer is parsed
        if events != connection.interest and state is not BUSY:
            self.watch(connection, events)

    def restart_deadline(self, connection: Connection) -> None:
        """Move the deadline of an idle connection."""
        self._idle[connection] = self.moment
        self._idle.move_to_end(connection)

    def watch(self, connection: Connection, events: int) -> None:
        if connection.interest == 0:
            self.selector.register(connection.socket, events, connection)
        elif events == 0:
            self.selector.unregister(connection.socket)
        else:
            self.selector.modify(connection.socket, events, connection)
        connection.interest = events

    def next_deadline(self) -> float:
        """When the next deadline passes, by the monotonic clock."""
        return min(
            next(iter(queue.values()), math.inf) + seconds for queue, seconds in self._deadlines
        )

    def overdue(self) -> list[Connection]:
        late: list[Connection] = []
        for queue, seconds in self._deadlines:
            for connection, since in queue.items():
                if self.moment - since < seconds:
                    break
                late.append(connection)
        return late

    def evictable(self) -> Optional[Connection]:
        """The connection to close for a new one: the longest waiting of the lowest rank."""
        queues = [(s.eviction, queue) for s, queue in self._queues.items() if s.eviction and queue]
        queues.sort(key=lambda ranked: (ranked[0], next(iter(ranked[1].values()))))
        return next(iter(queues[0][1])) if queues else None

    def in_states(self, states: Iterable[State]) -> list[Connection]:
        return [connection for state in states for connection in self._queues[state]]

    def note_buffered(self, connection: Connection, size: int) -> None:
        """Note how many bytes of input a connection buffers."""
        self.buffered += size - connection.buffered
        connection.buffered = size

    def receive(self, connection: Connection, size: int = RECEIVE_SIZE) -> bytes:
        """The plain text of what has arrived; b"" if there is none, or if it is for the handshake,
        which is then to go on. Closes a connection that has ended. Raises MalformedRequest for
        plain HTTP where TLS is spoken."""
        tls = connection.tls
        if tls is None or not tls.taken:
            try:
                data = connection.socket.recv(size)
            except (BlockingIOError, InterruptedError):
                return b""
            except OSError:
                data = b""
            if not data:
                self.close(connection)
            elif len(data) == RECEIVE_SIZE:
                connection.lingers = True
            if tls is None or not data:
                return data
            tls.take(data)
            if not tls.can_read:
                self.handshakes.append((connection, tls))
        return self._decrypt(connection, tls) if tls.can_read else b""

    def shake_hands(self) -> list[Connection]:
        """Go on with the next handshakes; the connections that are then to be received again. They
        are made one right after the other: with more of Python's code in between, neither that nor
        OpenSSL's is in the processor's caches when it is needed, which takes 40 of 390 us."""
        some = self.handshakes[:HANDSHAKES_AT_ONCE]
        del self.handshakes[:HANDSHAKES_AT_ONCE]
        for _, tls in some:
            tls.shake_hands()
        return [connection for connection, _ in some]

    def _decrypt(self, connection: Connection, tls: Tls) -> bytes:
        data = tls.taken
        has_begun = tls.handshake_done or tls.buffered > len(data)
        if not has_begun and data[:1].isalpha():  # a TLS record begins with 22
            connection.tls, connection.reader.buffer = None, data
            raise MalformedRequest("This port speaks TLS: use https.")
        try:
            plain = tls.read()
        except ssl.SSLError:
            connection.tls = None
            connection.lingers = True  # so that the peer can read the alert
            if self.push(connection, tls.outgoing.read(), CLOSED):
                self.linger(connection)
            return b""
        if tls.handshake_done and connection.state is HANDSHAKE:
            self.move(connection, HEAD)
        if plain:
            if connection.buffered:
                self.note_buffered(connection, connection.reader.buffered)
            return plain  # the answer takes the output of TLS along
        self.note_buffered(connection, connection.reader.buffered + tls.buffered)
        if tls.outgoing.pending:
            state = connection.state
            if not self.push(connection, tls.outgoing.read(), state) and state is HELD:
                self.close(connection)  # its answer could not be sent either
        if tls.has_ended:
            self.close(connection)
        return b""

    def send(self, connection: Connection, data: bytes, next_state: State) -> bool:
        """Send what the peer takes at once, and the rest later. True if all of it was taken."""
        tls = connection.tls
        if tls is not None:
            try:  # close_notify goes in one segment with the end: another send() costs 10 us
                data = tls.send(data, next_state is CLOSED)
            except ssl.SSLError:
                self.close(connection)
                return False
            if next_state is CLOSED:
                connection.tls = None
        return self.push(connection, data, next_state)

    def push(
        self, connection: Connection, data: Union[bytes, memoryview], next_state: State
    ) -> bool:
        """Send bytes as they are, without TLS or after it. The last bytes of a connection wait for
        the end, which follows at once, as one segment with it: two cost the kernel 4 us more."""
        connection.next_state = next_state
        try:
            sent = connection.socket.send(data, MORE_FOLLOWS if next_state is CLOSED else 0)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.close(connection)
            return False
        if sent == len(data):
            return True
        rest = memoryview(data)[sent:]  # a copy where it is small: a view would keep all of data
        connection.output = bytes(rest) if 2 * len(rest) < len(cast(bytes, rest.obj)) else rest
        self.buffered += len(connection.output)
        self.move(connection, WRITING)
        return False

    def flush(self, connection: Connection) -> bool:
        """Send more of the output. True if that was the end of an answer."""
        data, connection.output = connection.output, b""
        self.buffered -= len(data)
        if not self.push(connection, data, connection.next_state):
            return False
        if connection.next_state in (IDLE, CLOSED):
            return True
        self.move(connection, connection.next_state)
        return False

    def linger(self, connection: Connection) -> None:
        """Close our side, and continue to receive until the peer closes its side."""
        try:
            connection.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.close(connection)
            return
        self.move(connection, LINGER)

    def close(self, connection: Connection) -> None:
        """Close a connection, if it is not closed already."""
        if connection.state is CLOSED:
            return
        tls = connection.tls
        if tls is not None and tls.handshake_done and not connection.output:
            with suppress(OSError):
                connection.socket.send(tls.end())
        self.move(connection, CLOSED)
        self.buffered -= connection.buffered + len(connection.output)
        connection.buffered, connection.output = 0, b""
        connection.socket.close()
        connection.tls = None
        self.metrics.open_connections -= 1


# A turn of the loop: theory of operation
#
# serve_forever() repeats Server._turn(). A turn reads whatever has arrived, at most one request of
# each connection, and turns it into calls: Api.match() or Api.admit() returns a Heartbeat or a
# Call, or an answer at once. A turn admits requests for JUDGING_TIME, so that a crowd of requests
# that are slow to judge delays only itself. Calls that may write become pending, and all pending
# calls run in one transaction, a tick, with one time; their answers are sent when it is committed.
# So the more there is to do, the more each commit carries. Calls that only read wait in another
# queue, and one runs in a turn; of acts on many, one runs in a tick: no heartbeat waits for more
# than one of either.
#
# If another process holds the write lock, the tick does not run and the turn continues without it:
# reads and /healthz are answered, more becomes pending, and the selector waits for LOCK_POLL at
# most. After LOCK_PATIENCE all pending calls are answered 503.
#
# A read of a feed may wait for more: it is held, and runs again, like any other read, when a change
# or event is committed (by another process too: each turn looks), when its time is over, or when
# the server stops. So its API key is judged again, and many waiting reads delay no other. An
# inventory is held, too, while too many are being made, and runs again after FOLLOW_EVERY.
#
# A defect (an exception that no rule raises on purpose) ends the connection or the tick in which it
# happened, not the loop: others wait for their answers. MemoryError and Unrecoverable end the
# process, and whatever supervises it starts it again. If a tick or a read meets Unrecoverable, its
# requests are still answered, 503.

ON_MANY = {"hosts", "withHosts", "withKeys"}  # values of acts on up to ACTED_AT_ONCE, 0.1 s each

# A call that waits to run: its connection (None: the server's own call), the call, the head of its
# request, and when that arrived, by the monotonic clock.
Pending = tuple[Optional[Connection], Work, Head, float]


def choose_queue(call: Call, pending: Any, large: Any, reads: Any) -> Any:
    """The queue that a call joins, one of these three. Raises TooManyRequests if no more calls of
    its API key can wait in a queue of calls that are run one by one."""
    is_large = not ON_MANY.isdisjoint(call.values)
    if call.operation.writes and not is_large:
        return pending
    queue = large if is_large else reads
    keys = [queued.by.id for _, queued, *_ in queue]
    if len(keys) >= QUEUED_MAXIMUM or keys.count(call.by.id) >= QUEUED_OF_KEY:
        raise TooManyRequests(
            f"Try later: {QUEUED_OF_KEY} lists, and as many acts on many, of a key can wait."
        )
    return queue


class HeldReads:
    """Reads of feeds that have found nothing yet, and inventories that wait for others."""

    def __init__(self, reads: deque[Pending], connections: Connections, api: Api) -> None:
        """reads: the queue that they join to run again."""
        self._reads, self._connections, self._api = reads, connections, api
        self._held: list[tuple[Connection, Call, Head, float]] = []  # as Pending
        self._ends = (0, 0)  # the last numbers of the feeds, when wake() looked

    def hold(self, pending: Pending, outcome: Any, is_stopping: bool) -> Any:
        """The outcome to answer a read with. None if it found nothing, and waits or runs again."""
        (connection, call, head, since), moment = pending, self._connections.moment
        is_feed = isinstance(outcome, Page) and not outcome.items and "cursor" in outcome.more
        if not is_feed and not (isinstance(outcome, Call) and outcome.values.get("waits")):
            return outcome
        assert connection is not None and isinstance(call, Call)
        values = {"until": since + call.values.get("wait", 0), **call.values}
        if not is_feed:
            values = {**outcome.values, "until": moment + FOLLOW_EVERY}
        is_over = is_stopping or moment >= values["until"] or values.get("after") == "now"
        if is_over or connection.state not in (BUSY, HELD):
            return outcome
        if connection.state is not HELD:
            keys = [other.key for other in self._connections.in_states((HELD,))]
            if len(keys) >= WAITING_MAXIMUM or keys.count(call.by.id) >= WAITING_OF_KEY:
                return TooManyRequests(
                    f"Try later, or without wait: {WAITING_OF_KEY} requests of a key can wait."
                )
            connection.key = call.by.id
            self._connections.move(connection, HELD)
        values.update({"after": outcome.more["cursor"]} if is_feed else {})
        queue = self._reads if is_feed and outcome.next else self._held
        queue.append((connection, call._replace(values=values), head, since))
        return None

    def receive(self, connection: Connection) -> None:
        if data := self._connections.receive(connection):
            connection.reader.buffer += data
            self._connections.note_buffered(connection, connection.reader.buffered)
            self._connections.watch(connection, 0)
        elif connection.state is not HELD:  # its TLS has failed: nothing can be answered
            self._connections.close(connection)

    def wake(self, is_stopping: bool) -> None:
        """Run held reads again whose feed has news, or whose time is over."""
        ends = self._api.registry.feed_ends() if self._held else self._ends
        has_news, self._ends = ends != self._ends or is_stopping, ends
        moment, held, self._held = self._connections.moment, self._held, []
        for connection, call, head, _ in held:
            is_news = has_news and (is_stopping or "after" in call.values)
            is_due = is_news or moment >= call.values["until"]
            if connection.state is HELD:  # its peer has not gone
                queue = self._reads if is_due else self._held
                queue.append((connection, call, head, moment))  # the wait is not measured
        self._api.metrics.waiting_requests = len(self._connections.in_states((HELD,)))

    def next_wake(self) -> float:
        """When to call wake() at the latest, by the monotonic clock."""
        times: list[float] = [call.values["until"] for _, call, _, _ in self._held]
        return min(self._connections.moment + FOLLOW_EVERY, *times) if times else math.inf


class Exchanges:
    """The requests of all connections, from their bytes to their answers."""

    def __init__(self, api: Api, connections: Connections, access_log: bool) -> None:
        self._api = api
        self._registry = api.registry
        self._connections = connections
        self._access_log = access_log
        self.pending: list[Pending] = []  # calls that may write
        self.large: deque[Pending] = deque()  # acts on many, which may write: one runs in a tick
        self.reads: deque[Pending] = deque()
        self.unjudged: deque[tuple[Connection, Request, float]] = deque()  # and when each arrived
        self.ready: list[Connection] = []  # the next turn parses more of what they sent
        self.now = 0  # of this turn, Unix time in milliseconds
        self.waiting_since = 0.0  # since when we wait for the write lock, monotonic; 0: we do not
        # When the server's own calls are due, by the monotonic clock; inf while one is pending.
        self.due = {rule: connections.moment + first for rule, first in RECURRING.items()}
        self.held = HeldReads(self.reads, connections, api)
        self.is_stopping = False  # each answer is then the last of its connection

    # Requests.

    def on_ready(self, connection: Connection) -> None:
        """Handle a connection that the selector reports as readable or writable."""
        if not connection.interest:  # this turn has closed it, or has more of it to parse first
            return
        state = connection.state
        if state is IDLE or state is HEAD or state is BODY or state is HANDSHAKE:
            self.read(connection)
        elif state is WRITING:
            if self._connections.flush(connection):
                self._after_answer(connection)
        elif state is LINGER:
            self._connections.receive(connection, DROP_SIZE)
        elif state is HELD:
            self.held.receive(connection)
        else:  # BUSY: what it sends now waits in its socket
            self._connections.watch(connection, 0)

    def read(self, connection: Connection) -> None:
        """Receive what has arrived: a plain heartbeat, for the fast path, or bytes to parse."""
        try:
            data = self._connections.receive(connection)
        except Problem as problem:
            self.refuse(connection, problem)
            return
        reader = connection.reader
        if data and not reader.buffer and connection.state is not BODY:
            match = self._api.match(data, reader, self.now)
            if match is not None:
                reader.number += 1
                self.pending.append((connection, match[0], match[1], self._connections.moment))
                if connection.state is not IDLE:
                    self._connections.move(connection, BUSY)
                return
        if data:
            self.parse(connection, data)
        elif self._connections.buffered > BUFFERED_MAXIMUM:
            self._shed_load(connection)

    def parse(self, connection: Connection, data: bytes = b"") -> None:
        """Parse more of a connection's request. When it is complete, queue it to be judged."""
        reader = connection.reader
        try:
            request = reader.next(data)
        except Problem as problem:
            self.refuse(connection, problem)
            return
        if request is None or reader.buffer or connection.buffered:
            size = reader.buffered + (len(request.body) if request else 0)
            self._connections.note_buffered(connection, size)
            if self._connections.buffered > BUFFERED_MAXIMUM and self._shed_load(connection):
                return
        if request is None:
            self._await_rest(connection)
        else:
            self._connections.move(connection, BUSY)
            self.unjudged.append((connection, request, self._connections.moment))

    def _await_rest(self, connection: Connection) -> None:
        reader, tls = connection.reader, connection.tls
        if tls is not None and tls.has_ended and not reader.has_more:
            self._connections.close(connection)
        elif reader.is_in_body:
            is_new = connection.state is not BODY
            self._connections.move(connection, BODY)
            if reader.has_more:
                self.ready.append(connection)
            elif is_new and reader.awaits_continue:
                self._connections.send(connection, CONTINUE, BODY)  # this is no answer
        elif reader.has_begun:
            self._connections.move(connection, HEAD)
        elif connection.state is BUSY:  # an empty line after the last request
            self._connections.move(connection, IDLE)

    def judge(self) -> None:
        """Judge what has arrived, one by one. What this turn has no time for waits for the next."""
        end = time.monotonic() + JUDGING_TIME
        while self.unjudged:
            self.guard(self._admit, *self.unjudged.popleft())
            if time.monotonic() > end:
                return

    def _admit(self, connection: Connection, request: Request, moment: float) -> None:
        origin, queue = request.origin, cast(Any, self.pending)
        try:
            admitted = self._api.admit(request, self.now)
            if isinstance(admitted, Call):
                queue = choose_queue(admitted, self.pending, self.large, self.reads)
        except Problem as refused:
            admitted = self._api.refusal(refused)
        except Exception as error:
            problem = log_defect("a request could not be admitted", error, origin.request)
            admitted = self._api.refusal(problem)
        if isinstance(admitted, Response):
            self._answer(connection, admitted, request.head, origin, moment)
            self._api.metrics.requests.observe(time.monotonic() - moment)
            return
        queue.append((connection, admitted, request.head, moment))

    def refuse(self, connection: Connection, problem: Problem) -> None:
        """Answer a request that is not complete, and read no more of it."""
        reader = connection.reader
        request = reader.unfinished()
        connection.reader = RequestReader(reader.peer, reader.connection)  # frees its buffer
        self._connections.note_buffered(connection, 0)
        response = self._api.refuse(problem, request.origin, self.now)
        self._answer(connection, response, request.head, request.origin, self._connections.moment)

    def _shed_load(self, connection: Connection) -> bool:
        """More than BUFFERED_MAXIMUM is buffered, and a connection adds to it: refuse or close the
        one that buffers most, but none whose call runs. So a crowd that buffers all it can hurts
        only itself. True if it was this connection."""
        waiting = self._connections.in_states(s for s in STATES if s not in (BUSY, HELD))
        largest = max((*waiting, connection), key=lambda peer: peer.buffered + len(peer.output))
        if largest.output or largest.state is HANDSHAKE:
            self._connections.close(largest)
        elif largest.buffered:
            self.refuse(largest, Overloaded())
        else:
            return False
        return largest is connection

    # Ticks.

    def add_internal(self, rule: InternalRule) -> None:
        """Run a call of the server's own in the next tick."""
        self.pending.append((None, Call(rule), INTERNAL_REQUEST.head, self._connections.moment))

    def add_due_calls(self) -> None:
        """Run those of the server's own calls that are due in the next tick."""
        for rule, at in self.due.items():
            if self._connections.moment >= at:
                self.due[rule] = math.inf
                self.add_internal(rule)

    def run_tick(self, is_last: bool = False) -> None:
        """Run the pending calls, and one act on many. is_last: at the stop, none waits longer."""
        if self.large and not self.waiting_since:
            self.pending.append(self.large.popleft())
        outcomes: Optional[Iterable[Any]] = self._run(self.pending)
        if outcomes is None:
            self.waiting_since = self.waiting_since or self._connections.moment
            if self._connections.moment - self.waiting_since <= LOCK_PATIENCE and not is_last:
                for connection, _, _, _ in self.pending:
                    if connection is not None and connection.state is IDLE:
                        self._connections.move(connection, BUSY)
                return
            outcomes = repeat(self._registry.stop_waiting())
            self.pending, self.large = [*self.pending, *self.large], deque()
        self._answer_pending(outcomes)
        if is_last:  # what had no turn in time
            self.pending = [*self.large, *self.reads]
            self._answer_pending(repeat(Overloaded()))
        self._registry.after_tick()

    def run_read(self) -> None:
        """Run one call that only reads, or a slice of it: it needs no lock."""
        if not self.reads:
            return
        pending = self.reads.popleft()
        outcomes = self._run([pending])
        assert outcomes is not None, "only writers wait for other writers"
        outcome = self.held.hold(pending, outcomes[0], self.is_stopping)
        if outcome is None:
            return
        if self._answer_one(pending, outcome):
            self._api.metrics.requests.observe(time.monotonic() - pending[3])
        else:
            self.reads.append((pending[0], outcome, *pending[2:]))

    def _run(self, pending: Sequence[Pending]) -> Optional[list[Any]]:
        try:
            return self._registry.run([entry[1] for entry in pending], self.now)
        except Unrecoverable:
            self.is_stopping = True
            for entry in pending:
                self._answer_one(entry, StorageUnavailable())
            raise
        except Exception as error:
            return [log_defect("a tick failed", error)] * len(pending)

    def _answer_pending(self, outcomes: Iterable[Any]) -> None:
        began = moment = self._connections.moment
        if self.waiting_since:
            self._api.metrics.lock_waits.observe(began - self.waiting_since)
            began, self.waiting_since = self.waiting_since, 0.0
        answered, self.pending = self.pending, []
        requests = len(answered)
        beat_answer, seconds = self._api.heartbeat_answer, self.now // SECOND_MS
        for pending, outcome in zip(answered, outcomes):
            connection, work, head, since = pending
            if connection is None:
                requests -= 1
                if (rule := cast(Call, work).operation) in self.due:
                    rest = outcome if isinstance(outcome, (int, float)) else ALIVE_EVERY
                    self.due[rule] = moment + rest
            elif isinstance(work, Heartbeat) and isinstance(outcome, int):
                closes = self.is_stopping or not head.keep_alive
                data = beat_answer(work.host, outcome, seconds, closes)
                if self._access_log:
                    length = len(data) - data.index(b"\r\n\r\n") - 4
                    log_access(head, work.origin, 200, length, since)
                is_plain = connection.state is IDLE and connection.tls is None and not closes
                try:  # a short cut of _send() for most: it saves 0.7 of 13 us
                    if not is_plain:
                        self._send(connection, data, CLOSED if closes else IDLE)
                    elif self._connections.push(connection, data, IDLE):
                        self._connections.restart_deadline(connection)
                except Exception as error:
                    self.fail(connection, error)
            elif not self._answer_one(pending, outcome):
                self.large.append((connection, outcome, head, since))  # behind the others
        if requests:
            self._api.metrics.ticks.observe(requests)
            self._api.metrics.requests.observe(time.monotonic() - began, requests)

    def _answer_one(self, pending: Pending, outcome: Any) -> bool:
        """Answer a call. False if its outcome is another call, to run later."""
        connection, call, head, since = pending
        if connection is not None:
            try:
                response = self._api.answer(call, outcome)
                if response is None:
                    return False
                self._answer(connection, response, head, call.origin, since)
            except Exception as error:
                self.fail(connection, error)
        return True

    # Answers.

    def _answer(
        self, connection: Connection, response: Response, head: Head, origin: Origin, since: float
    ) -> None:
        closes = not head.keep_alive or response.closes or self.is_stopping
        request = origin.request if response.content_type is PROBLEM_JSON else ""
        seconds = self.now // SECOND_MS
        data = write_response(response, seconds, closes, head.method == "HEAD", request)
        if response.closes or len(data) > RECEIVE_SIZE:  # the peer may send until it has all
            connection.lingers = True
        if self._access_log:
            log_access(head, origin, response.status, len(response.body), since)
        self._send(connection, data, CLOSED if closes else IDLE)

    def _send(self, connection: Connection, data: bytes, next_state: State) -> None:
        if self._connections.send(connection, data, next_state):
            self._after_answer(connection)
        elif self._connections.buffered > BUFFERED_MAXIMUM:
            self._shed_load(connection)

    def _after_answer(self, connection: Connection) -> None:
        """All of an answer is taken: continue with the next request, or close."""
        reader = connection.reader
        if connection.next_state is CLOSED:
            if connection.lingers or reader.buffer:
                self._connections.linger(connection)
            else:
                self._connections.close(connection)
            return
        if connection.buffered:
            self._connections.note_buffered(connection, reader.buffered)
        if reader.buffer:
            self._connections.move(connection, BUSY)
            self.ready.append(connection)
        elif connection.tls is not None and connection.tls.has_ended:
            self._connections.close(connection)
        else:
            self._connections.move(connection, IDLE)

    def guard(self, handle: Callable[..., None], connection: Connection, *arguments: Any) -> None:
        try:
            handle(connection, *arguments)
        except Exception as error:
            self.fail(connection, error)

    def fail(self, connection: Connection, error: Exception) -> None:
        """Log a defect in the handling of a connection, and close the connection."""
        log_defect("a connection failed", error)
        self._connections.close(connection)


def log_defect(message: str, error: Exception, request: str = "") -> Problem:
    """Log a defect. Returns the answer to the request that it ended."""
    if isinstance(error, MemoryError):
        raise error
    log.error(message, exc_info=error, extra={"request": request})
    return Internal()


def log_access(head: Head, origin: Origin, status: int, length: int, since: float) -> None:
    """Log a request. length: of the content, in bytes; since: by the monotonic clock."""
    access = {
        "address": origin.address,
        "method": sanitize_path(head.method),
        "path": sanitize_path(head.path),
        "status": status,
        "bytes": length,
        "seconds": round(time.monotonic() - since, 6),
    }
    log.info(
        "%(address)s %(method)s %(path)s %(status)d %(bytes)d B %(seconds)f s",
        access,
        extra={"access": access, "request": origin.request},
    )


class Listener(socket.socket):
    """A TCP socket to accept from. It returns sockets of C: to make one of Python's class, with
    enums of its family and type, takes 5 us for each connection."""

    @cached_property
    def family(self) -> socket.AddressFamily:
        return super().family

    def accept(self) -> tuple[Any, Any]:
        descriptor, address = cast(Any, self)._accept()  # as socket.socket does
        return socket.SocketType(self.family, socket.SOCK_STREAM, 0, descriptor), address


class Server(HTTPServer):
    """An HTTP server for one Api. serve_forever() returns after stop()."""

    def __init__(
        self, api: Api, host: str, port: int, *, clock: Callable[[], float],
        connections: int = CONNECTIONS_MAXIMUM, deadlines: Optional[Mapping[State, float]] = None,
        load_tls: Optional[TlsLoader] = None,
        listener: Optional[socket.socket] = None, proxies: Networks = (), access_log: bool = False,
        notify: Callable[[str], None] = lambda state: None,
    ) -> None:  # fmt: skip
        """clock: Unix time in seconds. deadlines: in seconds, if not those of STATES. load_tls is
        called with our host, now and in a thread at each reload. listener: a socket that a service
        manager has bound. proxies: believed in X-Forwarded-For. notify is given our states, as in
        sd_notify(3). Raises OSError."""
        super().__init__((host, port), BaseHTTPRequestHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener or Listener(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._is_inherited = listener is not None
        try:
            self._listen(host, port)
            self._load_tls = partial(load_tls, self.host) if load_tls else None
            self._tls, announce = self._load_tls() if self._load_tls else (None, lambda: None)
            announce()
        except BaseException:
            self.socket.close()
            raise
        self._registry = api.registry
        self._registry.keys.file.patience = FILE_PATIENCE
        self._clock = clock
        self._proxies = proxies
        self._notify = notify
        number = int(clock() * SECOND_MS) << 20  # above any that an earlier start has used
        self._connections = Connections(deadlines or {}, api.metrics, connections, number)
        self._exchanges = Exchanges(api, self._connections, access_log)
        self._accept_at = math.inf  # when to accept again; inf: no pause
        self._stop_before: Optional[float] = None
        self._is_audit_flushed = False
        self._reload_requested = False
        self._loading: Optional[futures.Future[Any]] = None  # loads the certificate
        self._waker, self._wakened = socket.socketpair()
        self._waker.setblocking(False)
        self._wakened.setblocking(False)
        self._connections.selector.register(self._wakened, READ)
        self._watch_listener(True)

    # Starting and stopping.

    def _listen(self, host: str, port: int) -> None:
        if not self._is_inherited:  # server_bind() would ask DNS for our name, and wait
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind((host, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted ones take it
        self.socket.setblocking(False)
        self.socket.listen(BACKLOG)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    @property
    def host(self) -> str:
        """The server's address, or this machine's name if it listens on every address."""
        is_one = not ipaddress.ip_address(self.server_name).is_unspecified
        return self.server_name if is_one else socket.gethostname()

    @property
    def url(self) -> str:
        scheme, host = "https" if self._tls else "http", self.host
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.server_port}"

    @property
    def is_in_the_clear(self) -> bool:
        """Whether other machines can connect without TLS."""
        return self._tls is None and not ipaddress.ip_address(self.server_name).is_loopback

    def stop(self, *_: object) -> None:
        """Stop accepting, answer what has arrived, and return from serve_forever(). A signal
        handler or another thread may call this."""
        if self._stop_before is None:
            self._stop_before = time.monotonic() + SHUTDOWN_DEADLINE
        self._wake()

    def reload(self, *_: object) -> None:
        """Load the certificate again. A signal handler or another thread may call this."""
        self._reload_requested = True
        self._wake()

    def _wake(self) -> None:
        with suppress(OSError):  # it is awake already, or has ended
            self._waker.send(b"\0")

    @contextmanager
    def woken_by_signals(self) -> Iterator[None]:
        """For the main thread: a signal wakes select(), also one that arrives just before it.
        Python runs the handler only after that."""
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Run turns until stop() was called and all that arrived is answered."""
        self._notify("READY=1")
        while self._stop_before is None:
            self._turn(self._timeout())
        self._notify("STOPPING=1")
        self._stop_listening()
        deadline = self._stop_before
        self._finish(deadline - SHUTDOWN_DEADLINE + SHUTDOWN_GRACE)
        self._close_unused()
        self._finish(deadline)
        self._exchanges.run_tick(is_last=True)

    def _stop_listening(self) -> None:
        """Accept the waiting connections, unless the next process inherits the socket. One that
        comes before the close is reset, so handshakes, which take long, come after it."""
        self._exchanges.is_stopping = True
        self._watch_listener(False)
        accepted = [] if self._is_inherited else self._accept(BACKLOG)
        self.socket.close()
        self._connections.is_crowded, self._accept_at = False, math.inf
        for connection in accepted:
            self._exchanges.guard(self._on_accept, connection)

    def _finish(self, deadline: float) -> None:
        """Run turns until all that arrived is answered, or a deadline has passed."""
        self._stop_before = deadline
        while self._has_work_left() and time.monotonic() < deadline:
            self._turn(self._timeout())

    def _close_unused(self) -> None:
        """Close the connections without a request. Not before: a peer may just have sent one, and
        without an answer it cannot know whether that ran."""
        self._turn(0)  # reads what has arrived
        for connection in self._connections.in_states((IDLE, HANDSHAKE, HEAD)):
            if connection.state is HANDSHAKE or not connection.buffered:
                self._connections.close(connection)

    def _has_work_left(self) -> bool:
        """Whether requests wait for answers. If none does, a last tick writes the refusals that are
        still to be audited. It waits for other writers, like any other tick."""
        exchanges, is_open = self._exchanges, self._connections.metrics.open_connections > 0
        if not (is_open or exchanges.pending or self._is_audit_flushed):
            audit = self._registry.audit
            if audit.pending or any(limit.excess for limit in audit.limits):
                exchanges.add_internal(FINAL_AUDIT_FLUSH)
            self._is_audit_flushed = True
        return is_open or bool(exchanges.pending)

    def server_close(self) -> None:
        for connection in self._connections.in_states(STATES):
            self._connections.close(connection)
        super().server_close()
        self._connections.selector.close()
        self._waker.close()
        self._wakened.close()

    # The loop.

    def _turn(self, timeout: float) -> None:
        connections, exchanges = self._connections, self._exchanges
        # 1. Wait until something happens. This is the turn's time.
        events = connections.selector.select(timeout)
        moment = connections.moment = time.monotonic()
        exchanges.now = int(self._clock() * SECOND_MS)
        # 2. Use the keys as other processes have changed them.
        self._registry.reload_changed_keys()
        # 3. Parse more of what arrived in earlier turns: pipelined requests, bodies in tiny chunks.
        ready, exchanges.ready = exchanges.ready, []
        for connection in ready:
            if connection.state in (BUSY, BODY):  # it was not refused meanwhile
                exchanges.guard(exchanges.parse, connection)
        # 4. Read what has arrived, and judge it; accept new connections.
        accepted: list[Connection] = []
        for key, _ in events:
            if key.data is not None:
                try:
                    exchanges.on_ready(key.data)
                except Exception as error:
                    exchanges.fail(key.data, error)
            elif key.fileobj is self.socket:
                accepted = self._accept(ACCEPTS_PER_TURN)
            else:
                self._wakened.recv(RECEIVE_SIZE)
        exchanges.judge()
        # 5. Load the certificate again, or use it. Add the server's own calls: housekeeping every
        #    ALIVE_EVERY seconds; a slice of the sweep; expiry; and if nothing else is pending, a
        #    tick that writes the refusals which wait to be audited.
        if self._reload_requested or self._loading is not None:
            self._reload()
        exchanges.add_due_calls()
        if self._has_refusals and not exchanges.pending:
            exchanges.add_internal(WRITE_REFUSALS)
        # 6. Run the pending calls as one tick, and answer them.
        if exchanges.pending or exchanges.large:
            exchanges.run_tick()
        # 7. Run one call that only reads.
        exchanges.held.wake(exchanges.is_stopping)
        exchanges.run_read()
        # 8. Read the new connections. They had the time of the tick to send their requests, so the
        #    selector never hears of most connections that bring one request.
        for connection in accepted:
            exchanges.guard(self._on_accept, connection)
        # 9. Go on with handshakes: last, because one takes as long as many heartbeats.
        while some := connections.shake_hands():
            for connection in some:
                exchanges.guard(exchanges.read, connection)
        # 10. Make room for a new connection; close those whose deadline has passed.
        if connections.is_crowded:
            self._make_room()
        for connection in connections.overdue():
            exchanges.guard(self._expire, connection)
        if moment >= self._accept_at:
            self._accept_at = math.inf
            self._watch_listener(True)

    @property
    def _has_refusals(self) -> bool:
        """Whether refusals wait to be audited, and the database can be written."""
        return bool(self._registry.audit.pending) and not self._registry.storage_trouble

    def _timeout(self) -> float:
        """Seconds that the selector may wait for something to happen."""
        exchanges = self._exchanges
        if exchanges.ready or exchanges.reads or exchanges.unjudged or self._connections.handshakes:
            return 0
        if exchanges.waiting_since:
            return LOCK_POLL
        if exchanges.pending or exchanges.large or self._has_refusals:
            return 0
        nearest = min(
            self._connections.next_deadline(),
            exchanges.held.next_wake(),
            *exchanges.due.values(),
            self._accept_at,
            math.inf if self._stop_before is None else self._stop_before,
        )
        return max(0.0, nearest - time.monotonic())

    def _reload(self) -> None:
        """Begin to load the certificate, or use it once it is loaded. A bad one changes nothing."""
        if self._loading is None:
            self._reload_requested = False
            self._notify(f"RELOADING=1\nMONOTONIC_USEC={int(self._connections.moment * 1e6)}")
            self._loading = in_background(self._load_tls or (lambda: None))
            self._loading.add_done_callback(lambda _: self._wake())
        elif self._loading.done():
            loading, self._loading = self._loading, None
            try:
                if loaded := loading.result():
                    self._tls, announce = loaded
                    announce()
                    log.info("reloaded the certificate")
            except OperatorError as error:
                log.error("%s; the server keeps the certificate in use", error)
            self._exchanges.due[HOUSEKEEPING] = 0.0  # reads the key file, and writes what is new
            self._notify("READY=1")

    # Accepting and expiring.

    def _accept(self, most: int) -> list[Connection]:
        return self._connections.accept(self.socket, most, HANDSHAKE if self._tls else HEAD)

    def _on_accept(self, connection: Connection) -> None:
        if self._tls is not None:
            connection.tls = Tls(self._tls)
        if self._proxies:
            address = ipaddress.ip_address(connection.reader.peer)
            if any(address in network for network in self._proxies):
                connection.reader.proxies = self._proxies
        self._exchanges.read(connection)
        if connection.state in (HANDSHAKE, HEAD):
            self._connections.move(connection, connection.state)  # and watch it

    def _watch_listener(self, watched: bool) -> None:
        with suppress(KeyError, ValueError):  # it is so already, or the listener is closed
            if watched:
                self._connections.selector.register(self.socket, READ)
            else:
                self._connections.selector.unregister(self.socket)

    def _make_room(self) -> None:
        """Close a connection for the new one that waits. If none can be closed, stop accepting for
        a while: the listener would stay readable, and the loop would spin."""
        self._connections.is_crowded = False
        connection = self._connections.evictable()
        if connection is not None:
            self._connections.close(connection)
            return
        self._accept_at = self._connections.moment + ACCEPT_PAUSE
        self._watch_listener(False)

    def _expire(self, connection: Connection) -> None:
        if connection.state in (HEAD, BODY):
            self._exchanges.refuse(connection, RequestTimeout())
        else:
            self._connections.close(connection)


def notify_service_manager(address: str, state: str) -> None:
    """Send our state to a service manager, as sd_notify(3) does."""
    path = f"\0{address[1:]}" if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.setblocking(False)  # a manager that does not read must not stop us
            sender.sendto(state.encode("utf-8"), path)
    except OSError as error:
        first_line = state.partition("\n")[0]
        log.warning("cannot notify the service manager of %s: %s", first_line, error.strerror)


def inherited_listener(process: str, count: str) -> Optional[socket.socket]:
    """The socket that a service manager has bound for us, from LISTEN_PID and LISTEN_FDS as in
    sd_listen_fds(3); None if there is none. Raises OperatorError."""
    if process != str(os.getpid()) or count in ("", "0"):
        return None
    if count != "1":
        raise OperatorError(f"the service manager passes {count} sockets: pass one")
    with suppress(OSError):  # it is not a socket
        listener = Listener(fileno=FIRST_INHERITED)
        listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if listens and listener.family in (socket.AF_INET, socket.AF_INET6):
            os.set_inheritable(FIRST_INHERITED, False)
            return listener
        listener.close()
    raise OperatorError("the socket of the service manager does not listen for TCP connections")


def fit_connections(wanted: int) -> int:
    """Raise the soft limit of descriptors for so many connections. Returns how many it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + DESCRIPTORS_SPARE
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return max(1, min(wanted, needed - DESCRIPTORS_SPARE))


def has_reader(file: Any, seconds: float) -> bool:
    """Wait for so many seconds. False as soon as a pipe has no reader any more."""
    with selectors.DefaultSelector() as selector:
        if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
            selector.register(file, READ)  # for this end of a pipe, only its end is reported
        return not selector.select(seconds)


# The other end of a connection, for bench.


def closed_loop(
    port: int, requests: Iterator[bytes], connections: int, seconds: float, certificate: str = ""
) -> int:
    """Load a server on this machine, in rounds: a request on each connection, then all answers;
    returns their number. With a certificate to trust, each request has a TLS connection of its own;
    handshakes come one at a time, which costs a little more. Raises OperatorError, OSError."""
    context = ssl.create_default_context(cafile=certificate) if certificate else None

    def connect() -> socket.socket:
        peer = socket.create_connection((DEFAULT_HOST, port))
        return context.wrap_socket(peer, server_hostname=DEFAULT_HOST) if context else peer

    answered, end = 0, time.monotonic() + seconds
    peers: list[socket.socket] = []
    while time.monotonic() < end:
        peers = peers or [connect() for _ in range(connections)]
        for peer in peers:
            peer.sendall(next(requests))
        for peer in peers:
            answer = peer.recv(RECEIVE_SIZE)
            if not answer.startswith(b"HTTP/1.1 200 "):
                raise OperatorError(f"the server answered {answer[:99]!r}")
            if context:
                peer.close()
        answered += len(peers)
        peers = [] if context else peers
    for peer in peers:
        peer.close()
    return answered


# 11. Watch
#
# Law: this section sends requests to other servers, and answers none. A secret is sent only to this
# machine, or over TLS to a server that a pinned key, an authority or the trust store vouches for.
#
# Contents: Client, which commands use too; pure functions that decide what to report; Watch, which
# reads the feeds and makes messages; ways to deliver a message to people.


def proxy_of(url: str, environment: Mapping[str, str]) -> str:
    """The proxy for requests to an https URL, chosen as curl chooses it; "" for none."""
    named = {name.lower(): text for name, text in sorted(environment.items())}  # lower case wins
    host, proxy = urlsplit(url).hostname, named.get("https_proxy") or named.get("all_proxy", "")
    direct = named.get("no_proxy", "").lower().replace(",", " ").split()
    ends = [f".{name.lstrip('*.')}" if name != "*" else "" for name in direct]
    if not url.startswith("https:") or f".{host}".endswith(tuple(ends)):
        return ""
    return proxy if "://" in proxy or not proxy else f"http://{proxy}"


def has_shape(value: Any, shape: Any) -> bool:
    """Whether a JSON value has a shape: a type, a pattern for a text, an object with at least these
    members, or a list whose items have one shape."""
    if isinstance(shape, dict):
        is_object = isinstance(value, dict) and value.keys() >= shape.keys()
        return is_object and all(has_shape(value[name], inner) for name, inner in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(has_shape(item, shape[0]) for item in value)
    if isinstance(shape, re.Pattern):
        return isinstance(value, str) and bool(shape.fullmatch(value))
    return isinstance(value, shape)


PROBLEM_SHAPE = {"code": str, "detail": str, "cursor": str,
                 "errors": [{"field": str, "detail": str}]}  # fmt: skip


def shut_down(connection: socket.socket) -> None:
    """Shut a connection down: whatever waits for it stops waiting."""
    with suppress(OSError):  # the connection has ended already
        connection.shutdown(socket.SHUT_RDWR)


class Client:
    """Sends requests to one server, each on its own connection, and follows no redirect."""

    def __init__(
        self, url: str, api_key: str = "", *, pins: Sequence[str] = (), cacert: str = "",
        insecure_http: bool = False, proxy: str = "",
    ) -> None:  # fmt: skip
        """pins: the server must have one of these keys; cacert: a file with authorities, in PEM.
        Without both, the trust store of this machine decides. Raises OperatorError."""
        try:
            server, self._pins, self._proxy = urlsplit(url), pins, urlsplit(proxy)
            port, _ = server.port, self._proxy.port
        except ValueError as error:  # nothing else has checked a proxy from the environment
            raise OperatorError(f"{error}: correct the server's or the proxy's URL") from error
        self.name = f"{server.scheme}://{server.netloc}"  # the path of a webhook is a secret
        self._path = f"{server.path}?{server.query}" if server.query else server.path
        self._is_https = server.scheme == "https"
        self._address = server.hostname or "", port or (443 if self._is_https else 80)
        headers = {"User-Agent": f"hostenroll/{__version__}", "Connection": "close"}
        self._headers = {**headers, "Authorization": f"Bearer {api_key}"} if api_key else headers
        is_allowed = insecure_http or is_loopback(self._address[0])
        if not self._is_https and (pins or not is_allowed):
            remedy = "use https, or allow this with --insecure-http"
            raise OperatorError(f"secrets would go to {self.name} unencrypted: {remedy}")
        if self._proxy.scheme not in ("", "http"):
            raise OperatorError(f"the proxy's URL begins with {self._proxy.scheme}: use http")
        self._http_class: Callable[..., http.client.HTTPConnection] = http.client.HTTPConnection
        if not self._is_https:
            return
        try:
            self._context = ssl.create_default_context(cafile=cacert or None)
        except OSError as error:  # also for a file that OpenSSL cannot parse
            raise OperatorError(f"cannot read {cacert}: {error.strerror or error}") from error
        self._context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # as in distrust()
        # The class only gives the Host field the right port: _secure() starts TLS.
        self._http_class = partial(http.client.HTTPSConnection, context=self._context)
        if pins and not cacert:
            self._context.check_hostname, self._context.verify_mode = False, ssl.CERT_NONE

    def document(self, status: int, body: bytes) -> Any:
        """The JSON of an answer. Raises OperatorError, or the Problem that a refusal describes."""
        try:
            document: Any = parse_json(body)
            if 200 <= status < 300:
                return document
            document = {"errors": [], "cursor": "", **document}
            if status < 400 or not has_shape(document, PROBLEM_SHAPE):
                raise ValueError
            errors = [FieldError(item["field"], item["detail"]) for item in document["errors"]]
            kind = next((kind for kind in problems() if kind.code == document["code"]), Problem)
            problem = kind(document["detail"], errors=errors, cursor=document["cursor"])
            problem.code, problem.status = document["code"], status
        except (InvalidBody, TypeError, ValueError) as error:
            raise self.unexpected_answer(status) from error
        raise problem

    def unexpected_answer(self, answer: object) -> OperatorError:
        """The error for an answer that no server of ours would give."""
        what = "does not answer like a hostenroll server"
        return OperatorError(f"{self.name} {what} ({answer}): check the URL")

    def request(
        self, method: str, path: str, body: Optional[bytes] = None,
        headers: Mapping[str, str] = {}, patience: float = 0, reads: bool = True,
    ) -> tuple[int, bytes]:  # fmt: skip
        """The status and the body of any answer; reads: whether to read the body. patience: how
        many seconds longer than CLIENT_PATIENCE the answer may take. Raises OperatorError."""
        patience += CLIENT_PATIENCE
        end = time.monotonic() + 1.1 * patience
        try:
            with closing(self._http_class(*self._address)) as connection:
                connection.sock = self._connect(end)
                connection.sock.settimeout(patience)
                # A timer limits the whole request, because a server or a proxy might send a byte
                # now and then for ever. TLS takes over the socket, so the timer has a duplicate.
                with closing(connection.sock.dup()) as duplicate:
                    timer = threading.Timer(max(0, end - time.monotonic()), shut_down, [duplicate])
                    timer.daemon = True  # a Ctrl-C may come before the timer can be cancelled
                    timer.start()
                    try:
                        connection.sock = self._secure(connection.sock)
                        unsent: Optional[OSError] = None
                        try:
                            connection.request(
                                method, self._path + path or "/", body, {**self._headers, **headers}
                            )
                        except OSError as error:  # it may have answered, and takes no more
                            unsent = error
                        try:
                            response = connection.getresponse()
                        except http.client.RemoteDisconnected as error:
                            raise unsent or error from None
                        with response:
                            octets = response.read(CLIENT_ANSWER_MAXIMUM + 1) if reads else b""
                    finally:
                        timer.cancel()
                        timer.join()
            if reads and (response.length or len(octets) > CLIENT_ANSWER_MAXIMUM):
                raise ValueError("its answer is cut short, or too long")
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or error
            text = UNPRINTABLE.sub("?", redact(str(reason).strip()))
            if isinstance(error, ssl.SSLCertVerificationError) and "Authorization" in self._headers:
                text += ": give --pin, or its authority with --cacert"
            raise OperatorError(f"no answer from {self.name}: {text}") from error
        return response.status, octets

    def _connect(self, end: float) -> socket.socket:
        """Connect to the server or its proxy, before the time end. Raises OSError."""
        proxy, failure = self._proxy, OSError("it has no address")
        target = (proxy.hostname, proxy.port or 80) if proxy.hostname else self._address
        lookup = in_background(partial(socket.getaddrinfo, *target, type=socket.SOCK_STREAM))
        try:
            found = lookup.result(max(0, end - time.monotonic()))
        except futures.TimeoutError:
            raise OSError("the name servers do not answer") from None
        for *kind, _, address in found:
            connection = socket.socket(*kind)
            try:
                connection.settimeout(max(0.001, end - time.monotonic()))
                connection.connect(address)
            except OSError as error:
                connection.close()
                failure = error
            else:
                return connection
        raise failure

    def _secure(self, connection: socket.socket) -> socket.socket:
        """Add a proxy's tunnel, and TLS for https. Raises OSError, ValueError, HTTPException."""
        if self._proxy.hostname:
            self._tunnel(connection)
        if not self._is_https:
            return connection
        secured = self._context.wrap_socket(connection, server_hostname=self._address[0])
        if self._pins:
            shown = secured.getpeercert(True) or b""
            if read_certificate(shown, self.name).pin not in self._pins:
                secured.close()
                raise ValueError("its key is not one of the pinned keys")
        return secured

    def _tunnel(self, connection: socket.socket) -> None:
        """Ask the proxy for a tunnel: RFC 9110 section 9.3.6. Raises OSError, HTTPException."""
        user = base64.b64encode(unquote(self._proxy.netloc.rpartition("@")[0]).encode()).decode()
        authorization = f"Proxy-Authorization: Basic {user}\r\n" if user else ""
        host, port = self._address
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        head = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n{authorization}\r\n"
        connection.sendall(head.encode("ascii"))
        with http.client.HTTPResponse(connection, method="CONNECT") as answer:
            answer.begin()
        if answer.status != HTTPStatus.OK:
            raise OSError(f"the proxy answers {answer.status}")


# Watching: theory of operation
#
# Watch reads both feeds from their cursors on. For each host it keeps what it reported last, and
# when it will report what has changed since: that a host is down, after the delay; that the host is
# back, at once. So an outage that ends within the delay is not reported at all. Changes that are
# due form a batch, which stays open while more and more hosts fall silent. When the batch closes,
# it becomes a message in the outbox.
#
# The cursors, the hosts and the outbox are the state. Watch writes the state to its file before it
# sends a message, and again when the message was accepted. What it reads in between is written at
# intervals, because it can be read again. A message that may or may not have arrived is sent again,
# in the same bytes with the same Idempotency-Key, while the next batch grows. So everything is sent
# at least once, and in order for each host.

CHANGES_PATH, EVENTS_PATH, INCIDENTS_PATH = "/api/changes", "/api/audit", "/api/incidents"
HOSTS_PATH = "/api/hosts"
DOWN_STATUSES = ("offline", "missing")
REPORTED_STATUSES = (*DOWN_STATUSES, "pending")
STATUS_WORDS = {"online": "back", "pending": "pending (no heartbeat yet)"}
REPORTED_EVENTS = ("clone", CredentialSuperseded.code, "refuse-burst", "certificate", "key-file")

# The shapes, for has_shape(), of what Watch reads in answers and in its state.
CHANGE_SHAPE = {"cursor": str, "at": str, "status": str, "muted": bool,
                "host": {"id": str, "name": str, "labels": dict}}  # fmt: skip
EVENT_SHAPE = {"time": str, "action": str, "code": (str, type(None)), "detail": dict}
NUMBER, POSITION = (int, float), re.compile("now|[0-9a-f]{16}-[0-9]{1,19}")
ANSWER_SHAPES = {
    CHANGES_PATH: {"cursor": POSITION, "changes": [CHANGE_SHAPE]},
    EVENTS_PATH: {"cursor": POSITION, "events": [EVENT_SHAPE]},
    INCIDENTS_PATH: {"incidents": [{"text": str, "hosts": [str]}]},
    HOSTS_PATH: {"hosts": [{"mutedUntil": (str, type(None))}]},
}
STATE_SHAPE = {
    CHANGES_PATH: POSITION, EVENTS_PATH: POSITION, "outbox": [dict], "events": [EVENT_SHAPE],
    "hosts": [{"reported": str, "due": NUMBER, "before": str, "times": [NUMBER]}],
    "changes": [CHANGE_SHAPE], "at": [NUMBER],
}  # fmt: skip


class WatchOptions(NamedTuple):
    """What people want to get reported, and when. Times are in seconds."""

    delay: int
    batch: int
    statuses: Sequence[str] = REPORTED_STATUSES
    events: Sequence[str] = REPORTED_EVENTS  # as event_keywords() names them
    query: Sequence[tuple[str, str]] = ()  # the organization and the labels to report


class TrackedHost(NamedTuple):
    """A host that was reported as down, or changed within the last hour. Times are Unix time."""

    reported: str = ""  # the last report: one of REPORTED_STATUSES, flapping, or unknown
    due: float = 0  # when to report the last change; 0: never
    change: Mapping[str, Any] = {}  # the last change, as the feed has it, if it will be reported
    before: str = ""  # the cursor just before the last change
    times: Sequence[float] = ()  # of the changes within the last hour


def track(host: TrackedHost, change: Mapping[str, Any], before: str, now: float,
          options: WatchOptions) -> TrackedHost:  # fmt: skip
    """The host after a change. before: the cursor just before the change."""
    status, reported, due = change["status"], host.reported, 0.0
    times = [*(at for at in host.times if now - HOUR < at <= now), now]
    was = change.get("was")
    if reported and not host.due and was != reported and was in ("online", *options.statuses):
        reported = "unknown"  # the feed had a gap, or the host had other labels for some time
    if status in ("revoked", "deleted") and status not in options.statuses:
        reported = ""  # an operator made this change, and knows about it
    elif reported == "flapping":
        due = host.due
    elif len(times) > FLAPPING_ABOVE or (status == "online" and reported):
        due = now
    elif status in options.statuses:
        waits = dict.fromkeys(DOWN_STATUSES, options.delay)
        due = now + {**waits, "pending": PENDING_REPORTED_AFTER}.get(status, 0)
    return TrackedHost(reported, due, change if due else {}, before, times)


def after_report(host: TrackedHost, now: float) -> tuple[TrackedHost, list[Mapping[str, Any]]]:
    """A host that was due, after its report; and the changes to report, if they are news."""
    status, times = host.change["status"], [at for at in host.times if now - HOUR < at <= now]
    if len(times) > FLAPPING_ABOVE:
        flapping = {**host.change, "flapping": len(times)}
        return host._replace(reported="flapping", due=now + HOUR, times=times), [flapping]
    news = [host.change] if status != host.reported else []
    return TrackedHost(status if status in REPORTED_STATUSES else "", times=times), news


def closes_at(dues: Sequence[float], batch: float) -> float:
    """When a batch closes. dues: the times at which the changes and events in it were due."""
    if len(dues) < INCIDENT_SMALLEST:
        return min(dues) + batch
    return min(max(dues) + batch, min(dues) + max(batch, BATCH_LONGEST))


def event_keywords(event: Mapping[str, Any]) -> set[str]:
    """The words of --audit that select an event: its action, its code, and ACTION-burst for an
    event that sums up many."""
    burst = f"{event['action']}-burst" if "more" in event["detail"] else ""
    return {event["action"], event["code"] or "", burst}


def status_clause(status: str, changes: Sequence[Mapping[str, Any]], incidents: str) -> str:
    """A clause that says which hosts have a status now. It names a label that most of these hosts
    have, if the texts of incidents name the label, too: then most other hosts do not have it. A
    hostile machine may choose its own name, so no name can notify everybody in a chat, or look like
    a link."""
    safe, status_text = partial(re.sub, r"[^\w .=+-]", "?"), STATUS_WORDS.get(status, status)
    hosts, count = [change["host"] for change in changes], len(changes)
    if count < INCIDENT_SMALLEST:
        *names, last = (safe(sanitize(host["name"])) for host in hosts)
        return f"{names[0]} and {last} are {status_text}" if names else f"{last} is {status_text}"
    labels = Counter(f"{key}={value}" for host in hosts for key, value in host["labels"].items())
    named = re.split(" have |, |; ", incidents)
    for label, labelled in labels.most_common():
        if status in DOWN_STATUSES and 2 * labelled > count and label in named:
            return f"{count} hosts are {status_text}, {labelled} of them {safe(sanitize(label))}"
    return f"{count} hosts are {status_text}"


def message(kind: str, text: str, now: float, changes: Sequence[Mapping[str, Any]] = (),
            events: Sequence[Mapping[str, Any]] = (),
            incidents: Sequence[Mapping[str, Any]] = ()) -> str:  # fmt: skip
    """The message to deliver: a line of JSON."""
    groups: dict[str, list[Any]] = {}
    for change in changes:
        status = "flapping" if "flapping" in change else change["status"]
        groups.setdefault(status, []).append(change)
    joined = "; ".join(incident["text"] for incident in incidents)
    texts = [text, *(status_clause(status, group, joined) for status, group in groups.items())]
    actions = Counter(event["action"] for event in events)
    events_text = ", ".join(f"{count} {action}" for action, count in actions.items())
    times = [change["at"] for change in changes] + [event["time"] for event in events]
    times = times or [rfc3339(int(now * SECOND_MS))]
    return json_text({
        "kind": kind, "from": min(times), "to": max(times),
        "counts": {**{status: len(group) for status, group in groups.items()}, **actions},
        "text": "; ".join(filter(None, [*texts, events_text and f"events: {events_text}"])),
        "incidents": incidents,
        "changes": changes[:REPORTED_MAXIMUM], "events": events[:REPORTED_MAXIMUM],
        "truncated": max(len(changes), len(events)) > REPORTED_MAXIMUM,
    })  # fmt: skip


class Watch:
    """Reads the feeds and reports to people. read(path, query, seconds to wait) returns a document,
    and deliver(line) sends a message. Both may raise OperatorError, OSError or a Problem."""

    def __init__(
        self, read: Callable[[str, Sequence[tuple[str, str]], float], Any],
        deliver: Callable[[str], Any], options: WatchOptions, path: str, clock: Callable[[], float],
        sleep: Callable[[float], Any],
    ) -> None:  # fmt: skip
        """path: the file for the state, which no other watch may use; "": no file. Raises
        OperatorError."""
        self._read, self._deliver, self._options, self._path = read, deliver, options, path
        self._clock, self._sleep = clock, sleep
        self._is_current, self._save_at = False, 0.0
        self._hosts: dict[str, TrackedHost] = {}
        self._state: dict[str, Any] = {
            CHANGES_PATH: "now", EVENTS_PATH: "now", "events": [], "outbox": []
        }  # fmt: skip
        if path and os.path.lexists(path):
            octets = read_private(path, "state file", maximum=WATCH_STATE_MAXIMUM)[0]
            try:
                self._state = json.loads(octets)
                hosts = self._state.pop("hosts").items()
                self._hosts = {id: TrackedHost(*host) for id, host in hosts}
                if not has_shape(self._checkable_state(), STATE_SHAPE):
                    raise ValueError
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                remedy = "remove it, and watch reports what happens from now on"
                raise OperatorError(f"{path} is not a state file of watch: {remedy}") from error

    def _checkable_state(self) -> dict[str, Any]:
        """The state, as STATE_SHAPE describes it. Raises ValueError, TypeError, LookupError."""
        hosts, events = self._hosts.values(), self._state["events"]
        changes = [host.change for host in hosts if host.due]
        members = {"hosts": [host._asdict() for host in hosts], "changes": changes}
        members["outbox"] = [json.loads(line.encode("ascii")) for line in self._state["outbox"]]
        notes = {"at": [at for at, _ in events], "events": [event for _, event in events]}
        return {**self._state, **members, **notes}

    def run(self) -> None:
        """Watch until KeyboardInterrupt. A failure is logged once, and the pause before each new
        attempt gets longer. Raises the Problem that refuses the first request."""
        pause = 0
        with suppress(KeyboardInterrupt):
            while True:
                try:
                    self.turn()
                    if pause:
                        log.info("watch works again")
                    pause = 0
                except (OperatorError, OSError, Problem) as error:
                    is_new = self._state[CHANGES_PATH] == "now"
                    if is_new and isinstance(error, Problem) and error.status < 429:
                        raise
                    if not pause:
                        text = UNPRINTABLE.sub("?", redact(str(error)))  # it may be a server's
                        log.error("%s; watch keeps trying", text[:COMPLAINT_MAXIMUM])
                    pause = min(max(1, 2 * pause), RETRY_LONGEST)
                    self._sleep(pause)

    def turn(self) -> None:
        """Wait for news until a report is due, and deliver what is in the outbox."""
        now, longest = self._clock(), max(PENDING_REPORTED_AFTER, self._options.delay)
        for id, host in self._hosts.items():  # if the clock was set back, they would wait too long
            latest = now + (HOUR if host.reported == "flapping" else longest)
            if host.due > latest:
                self._hosts[id] = host._replace(due=latest)
        self._state["events"] = [(min(at, now), event) for at, event in self._state["events"]]
        self._save_at = min(self._save_at, now + HOUR)
        dues = [host.due for host in self._hosts.values() if host.due]
        wait = min([WATCH_WAIT, *(due - now for due in dues if due > now)])
        if self._state["outbox"] or not self._is_current:
            wait = 0
        elif self._state["events"] or min(dues, default=math.inf) <= now:
            wait = min(wait, 1)  # a batch is open
        self._read_feeds(wait)
        if self._is_current and not self._state["outbox"]:
            self._close_batch()
        try:
            if self._is_current and self._save_at <= self._clock():
                self._save()
        finally:  # messages are delivered even if the disk is full
            while self._state["outbox"]:
                self._deliver(self._state["outbox"][0])
                del self._state["outbox"][0]
                self._save_at = 0
                self._save()

    def _read_feeds(self, wait: float) -> None:
        """Read the next page of both feeds."""
        start = before = self._state[CHANGES_PATH]
        changes = self._next_page(CHANGES_PATH, "changes", wait)
        for change in changes:
            id, now = change["host"]["id"], self._clock()
            host = track(self._hosts.get(id, TrackedHost()), change, before, now, self._options)
            self._hosts[id], before = host, change["cursor"]
            self._save_at = min(self._save_at, now + WATCH_SAVES)
        is_end = start == self._state[CHANGES_PATH]
        self._is_current = is_end or (self._is_current and len(changes) < PAGE_MAXIMUM)
        for event in self._next_page(EVENTS_PATH, "events", 0) if self._options.events else ():
            is_wanted = event_keywords(event).intersection(self._options.events)
            if is_wanted and len(self._state["events"]) < EVENTS_MAXIMUM:
                self._state["events"].append((self._clock(), event))
                self._save_at = min(self._save_at, self._clock() + WATCH_SAVES)

    def _ask(self, path: str, patience: float = 0, **values: object) -> Any:
        scope = [pair for pair in self._options.query if path == CHANGES_PATH or pair[0] != "label"]
        answer = self._read(path, [*scope, *((k, str(v)) for k, v in values.items())], patience)
        if not has_shape(answer, ANSWER_SHAPES[path]):
            raise OperatorError(f"{path} does not answer like a hostenroll server: check the URL")
        return answer

    def _next_page(self, path: str, member: str, wait: float) -> list[Any]:
        """The items on the next page of a feed. If the server no longer has what follows the
        cursor, a message says that changes may be missing."""
        query = {"after": self._state[path], "limit": PAGE_MAXIMUM, "wait": math.ceil(wait)}
        try:
            page = self._ask(path, wait, **query)
        except ChangesPruned as pruned:
            page = self._ask(path, **{**query, "after": pruned.cursor, "wait": 0})
            text = "changes up to now may be missing: the server no longer keeps all of them"
            outbox, line = self._state["outbox"], message("pruned", text, self._clock())
            outbox += [] if outbox and outbox[-1].startswith(line[:16]) else [line]  # once for both
            self._save_at = 0
        self._state[path] = page["cursor"]
        return cast("list[Any]", page[member])

    def _close_batch(self) -> None:
        """Make a message of everything that is due, if its batch closes now. Changes are read again
        first, because their hosts may have been muted in the meantime."""
        now, changes, events = self._clock(), [], self._state["events"]
        ready = {id: host for id, host in self._hosts.items() if 0 < host.due <= now}
        dues = [*(host.due for host in ready.values()), *(at for at, _ in events)]
        if not dues or closes_at(dues, self._options.batch) > now:
            return
        fresh: dict[str, Any] = {}
        for host in ready.values():
            if host.change["cursor"] not in fresh:
                limit = min(len(ready), PAGE_MAXIMUM)
                try:
                    page = self._ask(CHANGES_PATH, after=host.before, limit=limit)
                    fresh.update((change["cursor"], change) for change in page["changes"])
                except ChangesPruned:
                    hosts = self._ask(HOSTS_PATH, named=host.change["host"]["id"])["hosts"]
                    until = max((it["mutedUntil"] or "" for it in hosts), default="")
                    is_muted = until > rfc3339(int(now * SECOND_MS))
                    fresh[host.change["cursor"]] = {"muted": is_muted, "isGone": not hosts}
        silent, incidents = [id for id in ready if ready[id].change["status"] in DOWN_STATUSES], []
        if len(silent) >= INCIDENT_SMALLEST:
            recent = self._ask(INCIDENTS_PATH)["incidents"]
            incidents = [
                incident for incident in recent if {*silent}.intersection(incident["hosts"])
            ]
        for id, host in ready.items():
            change = fresh.get(host.change["cursor"], host.change)
            if change["muted"]:  # a change that is not kept takes two requests to look again
                pause = MUTED_FOR if "cursor" in change else MINUTE
                self._hosts[id] = host._replace(due=now + pause)
            elif change.get("isGone"):  # it was deleted in a gap of the feed
                self._hosts[id] = TrackedHost()
            else:
                self._hosts[id], news = after_report(host, now)
                changes += news
        self._state["events"] = []
        if changes or events:
            self._save_at = 0
            kind, noticed = "changes" if changes else "events", [event for _, event in events]
            self._state["outbox"].append(message(kind, "", now, changes, noticed, incidents))

    def _save(self) -> None:
        """Forget hosts without news, and write the state file. Raises OSError, OperatorError."""
        since = self._clock() - HOUR
        for id, host in [*self._hosts.items()]:
            if not host.reported and not host.due and max(host.times, default=0) <= since:
                del self._hosts[id]
        if self._path:
            with replacing(self._path) as file:
                file.write(json_text({**self._state, "hosts": self._hosts}).encode("ascii"))
        self._save_at = self._clock() + HOUR  # so the saved cursors stay young enough for the feeds


def deliver_by_command(command: str, line: str) -> None:
    """Run a command in a shell, with a message as its input. Raises OperatorError, OSError."""
    with subprocess.Popen(
        ["sh", "-c", command], stdin=subprocess.PIPE, stdout=2, start_new_session=True
    ) as process:
        try:
            process.communicate(f"{line}\n".encode("ascii"), EXEC_PATIENCE)
        except BaseException as error:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(EXEC_GRACE)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise OperatorError(f"the command took more than {EXEC_PATIENCE} s") from error
    if process.returncode:
        raise OperatorError(f"the command failed with exit status {process.returncode}")


def deliver_by_webhook(
    client: Client, secret: bytes, clock: Callable[[], float], line: str
) -> None:
    """POST a message. If the receiver says that it is too large, as chats may, POST it again
    without its lists. Raises OperatorError."""
    short = json_text({**json.loads(line), "changes": [], "events": [], "truncated": True})
    for body in (line.encode("ascii"), short.encode("ascii")):
        headers = {"Content-Type": JSON, "Idempotency-Key": sha256(body).hex()[:32]}
        if secret:
            headers["X-Hostenroll-Signature"] = webhook_signature(secret, int(clock()), body)
        status, _ = client.request("POST", "", body, headers, reads=False)
        if status != HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            break
    if not 200 <= status < 300:
        raise OperatorError(f"{client.name} answered {status}")


# 12. Command line
#
# What people type and see around OPERATIONS. A secret or a requested value stands alone on stdout;
# facts for people go to stderr. Only this section prints, and reads the environment and the wall
# clock. A command with the name of an operation turns the typed words into a call and performs it;
# main() ends the process on a fault that cannot pass by itself.

EXIT_FAILED, EXIT_USAGE, EXIT_REFUSED, EXIT_INTERRUPTED = 1, 2, 3, 130
EXIT_STATUSES = "exit status: 0 done, 1 failed, 2 usage, 3 refused"
ENVIRONMENT_PREFIX = "HOSTENROLL_"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

DYNAMIC_USERS = range(61184, 65520)  # uids of systemd, while a unit with DynamicUser= runs
FLAG_WORDS = {"1": True, "yes": True, "true": True, "0": False, "no": False, "false": False}
UNITS = {"m": MINUTE, "h": HOUR, "d": DAY}  # of durations


class UsageError(Exception):
    """Arguments that do not fit together."""


# Types of arguments. argparse calls them, and shows the text of an ArgumentTypeError.


def matching(pattern: str, complaint: str, convert: Callable[[str], Any] = str) -> Any:
    def check(text: str) -> Any:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} {complaint}")
        return convert(text)

    return check


def one_of(*words: str) -> Any:
    check = matching("|".join(words), f"is not one of {', '.join(words)}")
    check.words = words  # for print_completion()
    return check


number = matching("[0-9]{1,9}", "is not a number", int)
listen_address = matching("[!-~]+", "is not an address or a name")
# An empty file name comes from a shell variable that was not set. To run without TLS or with other
# keys would then be worse than to stop. An empty head would be found in any audit log.
file_name = matching("(?s).+", "is not a file: name one, or leave the option out")
utf8_word = matching("(?s)[^\ud800-\udfff]*", "is not in UTF-8, and names nothing")
duration = matching(
    "[0-9]{1,9}[smhd]?",
    "is not a duration: write 90s, 30m, 24h or 7d",
    lambda text: int(text.rstrip("smhd")) * UNITS.get(text[-1], 1),
)
_events = [*ACTIONS, *(f"{action}-burst" for action in ACTIONS), *(k.code for k in problems())]
event_words = matching(f"none|(({'|'.join(_events)})(,(?!$)|$))+", "is not an action or code",
                       lambda text: [] if text == "none" else text.split(","))  # fmt: skip
pins = matching(rf"{PIN}(;{PIN}){{0,3}}", "is not sha256//...", lambda text: text.split(";"))
audit_head = matching("[0-9a-f]{64}", "is not what verify-audit prints", bytes.fromhex)


def within(
    bounds: tuple[int, int], parse: Callable[[str], int] = number, show: Callable[[int], str] = str
) -> Callable[[str], int]:
    def check(text: str) -> int:
        parsed, (least, most) = parse(text), bounds
        if least <= parsed <= most:
            return parsed
        raise argparse.ArgumentTypeError(f"{text} is out of bounds: {show(least)} to {show(most)}")

    return check


interval = within(HEARTBEAT_INTERVAL_RANGE, duration, format_duration)
silence = within(EXPIRY_RANGE, duration, format_duration)


def web_address(text: str) -> str:
    name = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]"
    match = re.fullmatch(rf"https?://({name})(:([0-9]{{1,5}}))?(/[A-Za-z0-9._~/-]*)?", text)
    if match is None or not 0 < int(match[4] or 1) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not like https://enroll.lan:8443")
    return text.rstrip("/")


def webhook_address(text: str) -> str:
    web_address(re.sub("(?<=[^/:])[/?][!-~]*$", "", text))
    return text


def networks(text: str) -> list[Any]:
    """Networks and addresses, with commas or blanks between them."""
    with suppress(ValueError):
        parsed = list(map(ipaddress.ip_network, text.replace(",", " ").split()))
        if parsed:
            return parsed
    raise argparse.ArgumentTypeError(f"{text!r} is not a network like 10.0.0.0/8, or several")


# What a terminal shows.


def text_width(text: str) -> int:
    """The columns that a text takes on a terminal: a wide East Asian letter takes two (UAX 11)."""
    if text.isascii():
        return len(text)
    return len(text) + sum(unicodedata.east_asian_width(letter) in ("W", "F") for letter in text)


def shorten(text: str, width: int) -> str:
    """A text in at most width columns: if the text is longer, an ellipsis replaces its end."""
    if text_width(text) <= width:
        return text
    text = text[:width]
    while text_width(text) >= width:
        text = text[:-1]
    return f"{text}\u2026"


COLOURS = {  # only states have a colour (ECMA-48, SGR): green, red, dim, yellow
    **dict.fromkeys(("online", "valid", "signs", "ok"), "32"),
    **dict.fromkeys(("offline", "BAD"), "31"),
    **dict.fromkeys(("revoked", "used", "expired", "retired"), "2"),
    "missing": "33",
}
STATE_COLUMNS = ("state", "status", "ok")
LEAST_WIDTHS = {  # of columns that may be cut: never an address, an actor, an id or a time
    "name": 20, "host": 20, "text": 20, "description": 16, "subject": 16, "labels": 12,
    "hostname": 12, "detail": 12, "organizationId": 8,
}  # fmt: skip
TIME_NAME = re.compile("At$|^at$|^lastSeen$|Since$|Until$")  # members shown by relative_time()
HEADINGS = {
    "organizationId": "org", "perSecond": "a second", "serverCpuMicroseconds": "CPU us each",
    "hostsAt30Seconds": "hosts at 30 s", "hostsAt60Seconds": "hosts at 60 s", "text": "what",
}  # fmt: skip
DUMB_TERMINALS = ("", "dumb")  # values of TERM for terminals without escape sequences


class Screen(NamedTuple):
    """What the terminal of a stream can show; columns is None if the stream is no terminal."""

    columns: Optional[int] = None
    has_colours: bool = False

    def paint(self, text: str, state: str) -> str:
        colour = COLOURS.get(state) if self.has_colours else None
        return f"\x1b[{colour}m{text}\x1b[0m" if colour else text


def screen_of(stream: Any, environment: Mapping[str, str]) -> Screen:
    """COLUMNS overrides the width of the terminal (POSIX), NO_COLOR its colours (no-color.org)."""
    try:
        if not stream.isatty():
            return Screen()
        columns = os.get_terminal_size(stream.fileno()).columns or COLUMNS_DEFAULT
    except (AttributeError, ValueError, OSError):  # the stream is None, closed, or has no file
        return Screen()
    if re.fullmatch("[1-9][0-9]{0,3}", environment.get("COLUMNS", "")):
        columns = int(environment["COLUMNS"])
    is_dumb = environment.get("TERM", "") in DUMB_TERMINALS
    return Screen(columns, not is_dumb and not environment.get("NO_COLOR"))


@contextmanager
def progress_line(title: str, environment: Mapping[str, str]) -> Iterator[Progress]:
    """Show the progress of long work in one line on the terminal of stderr, from PROGRESS_AFTER on,
    until the work ends. The work calls the yielded function from time to time."""
    columns, start = screen_of(sys.stderr, environment).columns, time.monotonic()
    first = due = start + PROGRESS_AFTER

    def show(done: int, total: int) -> None:
        nonlocal due
        moment = time.monotonic()
        if columns and moment >= due and environment.get("TERM", "") not in DUMB_TERMINALS:
            amount = f"{done:,} of {total:,} ({100 * done // total} %)" if total else f"{done:,}"
            write(shorten(f"{title}: {amount}, {format_duration(moment - start)}", columns - 1))
            due = moment + PROGRESS_EVERY

    def write(line: str) -> None:
        with suppress(OSError, ValueError):  # the terminal has gone
            print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if due != first:
            write("")


class Table:
    """Documents as rows of aligned columns. On a narrow screen the widest text columns are cut
    first; a column that still does not fit is left out. add() makes one part of a table, so that
    only one part is in memory; columns get wider when a later part needs that."""

    def __init__(self, columns: Sequence[str], screen: Screen, has_headings: bool = True) -> None:
        self._columns, self._screen = columns, screen
        self._widths = [0] * len(columns)
        headings = [HEADINGS.get(name, readable_name(name)).upper() for name in columns]
        self._rows = [headings] if has_headings else []

    def add(self, documents: Sequence[dict[str, Any]], now: int) -> str:
        self._rows += [[cell(each, name, now) for name in self._columns] for each in documents]
        for at, texts in enumerate(zip(*self._rows)):
            self._widths[at] = max(self._widths[at], *map(text_width, texts))
        widths = self._shown_widths()
        lines, self._rows = [self._line(row, widths) for row in self._rows], []
        return "\n".join(lines)

    def _shown_widths(self) -> dict[int, int]:
        """The widths of the columns that are shown."""
        widths: dict[int, int] = {}
        room = (self._screen.columns or sys.maxsize) + 2
        for at, (name, width) in enumerate(zip(self._columns, self._widths)):
            least = min(width, LEAST_WIDTHS.get(name, width))
            if least + 2 <= room or not widths:
                widths[at], room = least, room - least - 2
        while room > 0:
            growing = [at for at in widths if widths[at] < self._widths[at]]
            if not growing:
                break
            narrowest = min(growing, key=widths.__getitem__)
            widths[narrowest], room = widths[narrowest] + 1, room - 1
        return widths

    def _line(self, row: Sequence[str], widths: Mapping[int, int]) -> str:
        line = ""
        for at, width in widths.items():
            name, text, short = self._columns[at], row[at], shorten(row[at], width)
            padding = " " * (width + 2 - text_width(short))
            line += self._screen.paint(short, text if name in STATE_COLUMNS else "") + padding
        return line.rstrip()


def cell(document: Mapping[str, Any], name: str, now: int) -> str:
    """The text of a column: the document's member of this name, or what CELLS makes of others."""
    value = document.get(name)
    if name in CELLS and (value is None or name in ("uses", "ok", "host", "status")):
        return CELLS[name](document, now)
    if TIME_NAME.search(name) and value is not None:
        return relative_time(value, now)
    return plain_text(value)


def is_muted(item: Mapping[str, Any], now: int) -> bool:
    """Whether a host, or the host of a change, is muted. item: the document of either."""
    return bool(item.get("muted")) or (item.get("mutedUntil") or "") > rfc3339(now)


CELLS: dict[str, Callable[[Mapping[str, Any], int], str]] = {
    "uses": lambda token, now: f"{token['uses']} of {token['maxUses']}",
    "when": lambda event, now: relative_time(event["time"], now),
    "organizationId": lambda api_key, now: "all",
    "ok": lambda finding, now: "ok" if finding["ok"] else "BAD",
    "status": lambda item, now: plain_text(item["status"]) + ", muted" * is_muted(item, now),
    "name": lambda change, now: plain_text(change["host"].get("name")),
    "host": lambda change, now: plain_text(change["host"].get("id")),
    "age": lambda host, now: age_of(host["statusSince"], now),
}


def relative_time(timestamp: str, now: int) -> str:
    """A timestamp of rfc3339() for people: 3 min ago, in 42 min. now: Unix ms."""
    if not re.fullmatch(TIME.pattern, str(timestamp)):  # a newer server may write other times
        return plain_text(timestamp)
    elapsed = now - unix_ms(timestamp)
    if abs(elapsed) < SECOND_MS:
        return "now"
    seconds = abs(elapsed // SECOND_MS)  # rounded up, if ahead: a new token of an hour has 60 min
    shown = format_duration(seconds, minutes_from=2)
    return f"{shown} ago" if elapsed > 0 else f"in {shown}"


def age_of(timestamp: Optional[str], now: int) -> str:
    return relative_time(timestamp, now).replace(" ago", "") if timestamp else "-"


def plain_text(value: Any) -> str:
    """A value for people, without control characters: a forger can store what no peer can."""
    text = "" if value in (None, [], ()) else str(value)
    if isinstance(value, dict):
        shown = partial(json.dumps, ensure_ascii=False)
        pairs = {key: v if isinstance(v, str) else shown(v) for key, v in value.items()}
        text = " ".join(f"{key}={pair}" for key, pair in pairs.items())
    return UNPRINTABLE.sub("?", text) or "-"


def readable_name(name: str) -> str:
    """The name of a member for people: "last seen" for lastSeen, "expires" for expiresAt."""
    bare = re.sub("(?<=[a-z])(Id|At)$", "", name)
    return re.sub("[A-Z]", lambda letter: f" {letter[0].lower()}", bare)


def describe(document: Mapping[str, Any], now: int, screen: Screen) -> str:
    """A document for people: a line for each member, and for each item of a list in it."""
    width = max(len(readable_name(name)) for name in document) + 1
    lines = []
    for name, value in document.items():
        title = f"{readable_name(name)}:"
        for item in value if isinstance(value, list) and value else [value]:
            text = plain_text(item)
            if TIME_NAME.search(name) and item:
                text = f"{relative_time(item, now)} ({text})"
            painted = screen.paint(text, text) if name in STATE_COLUMNS else text
            lines.append(f"{title:{width}}  {painted}")
            title = ""
    return "\n".join(lines)


# Output. The reader of our output may stop at any time: the command still does its work, and ends
# with its usual exit status. Only a secret must reach its reader.


def discard(stream: Any) -> None:
    """Drop what could not be written: at its end, the interpreter would try again, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def inform(*lines: str, level: int = logging.INFO) -> None:
    """Write facts to stderr, or a server's log. A closed stderr or a full disk stops nothing."""
    handler = server_log()
    with suppress(OSError):
        if lines and handler:
            handler.put("\n".join(lines), level)
        elif lines and sys.stderr is not None:  # print() to None prints to stdout
            print(*lines, sep="\n", file=sys.stderr)


def complain(text: str) -> None:
    """Write one line to stderr, without the secrets and control characters that were pasted."""
    line = UNPRINTABLE.sub("?", redact(text))
    inform(f"hostenroll: {line[:COMPLAINT_MAXIMUM]}", level=logging.ERROR)


def output(text: str, end: str = "\n") -> None:
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        discard(sys.stdout)


def print_line(text: str) -> None:
    """Print a line of a command that keeps running. The command ends if stdout has no reader."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard(sys.stdout)
        raise KeyboardInterrupt from None


def output_secret(session: Session, document: Mapping[str, Any], member: str, title: str) -> None:
    """Show a secret alone or in JSON. It is shown only now: raises OperatorError if it is lost."""
    shown = json.dumps(document, indent=2) if session.arguments.json else document[member]
    try:
        print(shown, flush=True)
    except OSError as error:
        discard(sys.stdout)
        id, kind = document["id"], title.lower().replace(" ", "-")
        raise OperatorError(
            f"cannot write to stdout ({error.strerror}): the {title} {id} is lost, so revoke it: "
            f"revoke-{kind} {id}"
        ) from error


class LogHandler(logging.Handler):
    """The log on stderr: a line for people, or a JSON object, for each record. A thread writes the
    log, because its reader may hang. If too many lines wait, new ones are dropped and counted."""

    def __init__(self, is_json: bool, environment: Mapping[str, str] = os.environ) -> None:
        super().__init__()
        self._is_json = is_json
        try:
            self._descriptor, self.has_file = sys.stderr.fileno(), True
        except (AttributeError, OSError):  # stderr is closed, or in memory
            self._descriptor, self.has_file = os.open(os.devnull, os.O_WRONLY), False
        status = os.fstat(self._descriptor)
        self._is_journal = environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
        self.counts: Counter[str] = Counter()
        self._waiting, self._dropped = bytearray(), 0  # waiting lines, the number of dropped lines
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def format(self, record: logging.LogRecord) -> str:
        """A record as one line, and the traceback of a defect. JSON escapes line ends."""
        time, message = rfc3339(int(record.created * SECOND_MS)), record.getMessage()
        request = getattr(record, "request", "")
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
        if not self._is_json:
            start = "" if self._is_journal else f"{time} {record.levelname} "
            request = f" [{request}]" if request else ""
            return f"{start}{message}{request}" + (f"\n{trace}" if trace else "")
        event = EVENT.of(event_view(record.event)) if hasattr(record, "event") else None
        line = {"time": time, "level": record.levelname.lower(), "message": message,
                "request": request, "event": event, "access": getattr(record, "access", None),
                "traceback": trace}  # fmt: skip
        return json.dumps({name: value for name, value in line.items() if value})

    def emit(self, record: logging.LogRecord) -> None:
        self.put(self.format(record), record.levelno)

    def put(self, text: str, level: int = logging.INFO) -> None:
        """Have a text written, or drop the text if too much waits. The journal takes the level of a
        line from its prefix, and cuts the prefix off, also before a JSON object: sd-daemon(3)."""
        if self._is_journal:
            prefix = f"<{3 if level >= logging.ERROR else 4 if level >= logging.WARNING else 6}>"
            text = prefix + text.replace("\n", f"\n{prefix}")
        line = f"{text}\n".encode("utf-8", "backslashreplace")
        with self._changed:
            if not self._waiting:
                self._changed.notify()
            if len(self._waiting) + len(line) <= LOG_MAXIMUM:
                self._waiting += line
            else:
                self._dropped += 1
                self.counts["log_lines_dropped"] += 1

    def _run(self) -> None:
        """Write what waits, until close(). This runs in the thread."""
        while not self._is_closed or self._waiting:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                lines, self._waiting = self._waiting, bytearray()
                if self._dropped:
                    text = f"{self._dropped} log lines are missing here: their reader was slow"
                    record = log.makeRecord(log.name, logging.WARNING, "", 0, text, (), None)
                    self._dropped = 0
                    self.put(self.format(record), record.levelno)
            at = 0
            with suppress(OSError):  # the reader has gone, or the disk is full
                while at < len(lines):
                    end = lines.rfind(b"\n", at, at + LOG_PIECE) + 1 or lines.find(b"\n", at) + 1
                    at += os.write(self._descriptor, lines[at:end])
            self.counts["log_lines_dropped"] += lines.count(b"\n", at)
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed, LOG_PAUSE)

    def close(self) -> None:
        """Have what waits written, within LOG_PATIENCE; logging.shutdown() calls it at the end."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(LOG_PATIENCE)


def server_log() -> Optional[LogHandler]:
    """The handler that writes the log of a server; None in a command."""
    handlers = (each for each in log.handlers if isinstance(each, LogHandler) and each.has_file)
    return next(handlers, None)


def refuse_secrets(words: Sequence[str]) -> None:
    """Stop a secret that was pasted in place of an id, before it goes anywhere. Raises NotFound."""
    if secret := re.search("(?:^| )(?:het|hak)_([0-7][0-9a-f]{15})_", " ".join(words)):
        raise NotFound(f"This is a secret, not an id. Its id is {secret[1]}.")


class Session(NamedTuple):
    """What a command works with: its arguments, the clock, the environment, the screen."""

    arguments: argparse.Namespace
    command: Command
    clock: Callable[[], float]
    environment: Mapping[str, str]
    program: str  # how to start this program, for commands that people may type next
    screen: Screen  # of stdout

    @property
    def operation(self) -> Operation:
        return OPERATION[self.command.name]

    @property
    def by(self) -> Principal:
        return Principal(f"cli:{user_name(self.environment)}", ALL_ORGANIZATIONS, "admin")

    def files(self) -> tuple[str, str]:
        """The paths of the database and the key file; the key file is beside the database, unless
        it is named. Raises OperatorError; UsageError if the environment names a server instead."""
        command, arguments = self.command, self.arguments
        is_elsewhere = self.environment.get("HOSTENROLL_SERVER") and command.run is not serve
        if is_elsewhere and not arguments.typed.intersection(("--db", "--key-file")):
            raise UsageError(NEEDS_FILES.format(command.name))
        database = find_database(command.name, arguments.db)
        return database, arguments.key_file or key_file_beside(database)

    def client(self) -> Optional[Client]:
        """A Client of the server that --server names, if any. Raises OperatorError, UsageError."""
        arguments = self.arguments
        if "server" not in arguments:
            return None
        url, path = arguments.server, arguments.api_key_file
        typed_options = arguments.typed & {each.name for each in CLIENT_OPTIONS}
        if not url and typed_options <= ({"--insecure-http"} if "webhook" in arguments else set()):
            return None
        if url and (arguments.db or arguments.key_file):
            raise UsageError("--server and --db exclude each other: leave one out")
        if not (url and path):
            client_options = "--pin, --cacert and --insecure-http"
            raise UsageError(f"--server needs --api-key-file, and {client_options} need both")
        text = read_private(path, "API key file")[0].decode("latin-1").strip()
        if parse_secret(API_KEY_PREFIX, text) is None:
            raise OperatorError(f"there is no API key in {path}: create one with mint-api-key")
        return Client(
            url, text, pins=arguments.pin or (), cacert=arguments.cacert or "",
            insecure_http=arguments.insecure_http, proxy=proxy_of(url, self.environment),
        )  # fmt: skip

    def now(self) -> int:
        return int(self.clock() * SECOND_MS)

    def progress(self, title: str = "") -> AbstractContextManager[Progress]:
        return progress_line(title or self.command.name, self.environment)

    @contextmanager
    def open(self, purpose: str = "act", **options: Any) -> Iterator[Registry]:
        """The registry of files(). After a fault that cannot pass by itself, the database is not
        closed, because closing would write to it: main() ends the process."""
        registry = open_registry(*self.files(), self.now(), purpose=purpose, **options)
        if warning := registry.engine.schema_fault or registry.engine.schema_remark:
            (log.warning if purpose == "serve" else complain)(warning)
        try:
            yield registry
        finally:
            if not isinstance(sys.exc_info()[1], (Unrecoverable, MemoryError)):
                registry.close()

    @contextmanager
    def backend(self, writes: bool = True) -> Iterator[Backend]:
        """What performs operations: the database here, or the server that is named."""
        client = self.client()
        if client is not None:
            yield RemoteBackend(client)
        else:
            with self.open(purpose="act" if writes else "read") as registry:
                yield LocalBackend(self, registry)

    def call(self) -> UncheckedCall:
        """The operation with the values that were typed. The values are checked here, before a
        database or a connection is opened. Raises UsageError, OperatorError, and Problems."""
        if sys.stdout is None and self.operation.answer in (MINTED_TOKEN, MINTED_API_KEY):
            raise OperatorError("stdout is closed: the secret would be lost")
        words = getattr(self.arguments, "id", [])
        words = [words] if isinstance(words, str) else words
        refuse_secrets(words)
        call = unchecked_call(self.arguments, self.operation, self.now())
        call.checked()
        return call._replace(target=self.named(words[0]) if len({*words}) == 1 else None)

    @property
    def asks_first(self) -> bool:
        """Whether a person at a terminal is asked before the command destroys something."""
        is_destructive = self.command.name in DESTRUCTIVE
        return is_destructive and not self.arguments.yes and is_at_terminal()

    def named(self, word: str) -> Named:
        """The object that the command is about. For a destructive command, only a person who is
        asked first may type a part of an id: a script would not see which object that is."""
        kind = next(kind for kind, noun in KINDS.items() if self.command.name.endswith(noun))
        return Named(kind, word, self.asks_first or self.command.name not in DESTRUCTIVE)

    def perform(self) -> Any:
        """Perform the operation and return its document. Raises what call() and the backend raise,
        and OperatorError if the person who is asked says no."""
        call = self.call()
        with self.backend(self.operation.writes) as backend:
            if self.asks_first:
                what = call.values.get("kid", "")
                if call.target is not None:
                    id, what = backend.find(call.target)
                    call = call._replace(target=call.target._replace(word=id))
                self.confirm(f"{self.command.name.replace('-', ' ')} {what}", backend)
            if "self" in self.operation.query.fields and self.arguments.yes:
                call = call._replace(values={**call.values, "self": "true"})
            return backend.perform(call)

    def confirm(self, what: str, backend: Backend) -> None:
        """Ask the person at the terminal. Raises OperatorError unless the answer is yes."""
        where = f" on {backend.name}" if backend.name else ""
        question = f"{plain_text(what)}{where}; continue? [y/N]"
        print(question, end=" ", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise OperatorError("nothing was done")

    def report(self, document: Mapping[str, Any], shown: Optional[str], *facts: str) -> None:
        """With --json, print the document; else print shown, if any, and the facts to stderr."""
        if self.arguments.json:
            shown, facts = json.dumps(document, indent=2), ()
        if shown is not None:
            output(shown)
        inform(*facts)


class LocalBackend:
    """Performs operations in the database on this machine."""

    name = ""

    def __init__(self, session: Session, registry: Registry) -> None:
        self._registry, self._by, self._now = registry, session.by, session.now

    def _run(self, call: Call) -> Any:
        return self._registry.perform(call._replace(by=self._by), self._now())

    def perform(self, call: UncheckedCall) -> Any:
        """The document of an operation. With wait, a feed without news is answered after a second.
        Raises the Problem that refuses the operation."""
        operation, values = call.operation, call.checked()
        if call.hosts:
            values["hosts"] = call.hosts
        record = self._run(Call(operation, values=values, named=call.target))
        if operation.answer is None:
            return json.loads(record)
        document = operation.document(record)
        if values.get("wait") and document.get("cursor") == values.get("after"):
            time.sleep(1)
        return document

    def find(self, named: Named) -> tuple[str, str]:
        """The id and the title of a typed object. Raises NotFound, Conflict."""
        row = self._run(Call(FIND_RULE, named=named))
        return id_text(row.id), title_of(row)

    def remarks(self, before_first: str = "") -> list[str]:
        """What to tell people if no server is running: no host can enroll then, and each status is
        as it was when the server stopped. before_first: the remark if no server has run yet."""
        service, now = self._run(Call(SERVICE_RULE)), self._now()
        if service is None:
            return [before_first] if before_first else []
        last = relative_time(rfc3339(service.alive), now)
        ended = f"no server is running (the last one was {last}): serve starts one"
        return [] if is_served(service, now) else [ended]


SECRETS = (MINTED_TOKEN, "token", TOKEN_PREFIX), (MINTED_API_KEY, "apiKey", API_KEY_PREFIX)


class RemoteBackend:
    """Performs operations on a server. Only the types in its documents are checked: any text may
    be in them, so they are shown like other text from a peer."""

    def __init__(self, client: Client) -> None:
        self._client, self.name = client, client.name

    def perform(self, call: UncheckedCall) -> Any:
        """The document of an operation; if the answer is empty, a document with the id. Raises the
        Problem that refuses the operation, OperatorError."""
        operation, values, lost = call.operation, {**call.values}, []
        id = "" if call.target is None else self._id(call.target)
        for named in call.hosts:
            try:
                values["hosts"] = [*values["hosts"], self._id(named)]
            except NotFound:
                lost.append(named.word)
        path, query = operation.path.replace("{id}", quote(id, safe="")), call.query()
        if operation.body is None:
            wait, method = int(dict(query).get("wait", 0)), operation.method
            path += f"?{urlencode(query)}"
            status, octets = self._client.request(method, path, patience=wait)
        else:
            body, media = json_text(values).encode("ascii"), MERGE_PATCH if call.merges else JSON
            headers = {"Content-Type": media}
            status, octets = self._client.request(operation.method, path, body, headers)
        if status == operation.status == HTTPStatus.NO_CONTENT:
            return {"id": id}
        document = self._client.document(status, octets)
        shape = operation.shape() if operation.answer else {"_meta": {"hostvars": dict}}
        if status != operation.status or not has_shape(document, shape):
            raise self._client.unexpected_answer(status)
        for answer, member, prefix in SECRETS:
            if operation.answer is answer and parse_secret(prefix, document[member]) is None:
                raise self._client.unexpected_answer("no secret")
        if lost:
            document["notFound"] += lost
        return document

    def _id(self, named: Named) -> str:
        return named.word if ID.fullmatch(named.word) else self.find(named)[0]

    def find(self, named: Named) -> tuple[str, str]:
        """The id and the title of a typed object. Raises NotFound, Conflict, OperatorError."""
        operation, titles = OPERATION[f"list-{KINDS[named.kind]}s"], {}
        documents = self.perform(UncheckedCall(operation, {"named": named.word}))[operation.list_of]
        spellings = named.word, unicodedata.normalize("NFC", named.word)
        for document in documents:
            id, name = document["id"], document.get("name")
            hostname = document.get("hostname") or ""
            is_whole = named.word == id or name in spellings
            is_whole |= hostname.rstrip(".").lower() == named.word.rstrip(".").lower() != ""
            if is_whole or named.takes_prefix:
                address = document.get("address") or document.get("enrolledFrom") or ""
                name = name or document.get("description", "")
                titles[id] = title(name, id, document["organizationId"], address)
        id = named.id_among(titles)
        return id, titles[id]

    def remarks(self, before_first: str = "") -> list[str]:
        return []


Backend = Union[LocalBackend, RemoteBackend]
NEEDS_FILES = "{} works on the database's files: type it where they are, with --db, not --server"

DATABASE_MAKERS = ("serve", "mint-token", "add-org", "mint-api-key", "restore")


def find_database(command: str, named: Optional[str]) -> str:
    """The path of a command's database: the one that --db or HOSTENROLL_DB names, else the one in
    this folder, else (but not for serve) the service's, else the one to create. An empty file
    counts as missing. Nothing is opened or created. Raises OperatorError, StoreError, OSError."""
    path, folder = named or DEFAULT_DATABASE, os.path.dirname(SERVICE_DATABASE)
    refusal = "" if named else refusal_of_foreign_files(folder)
    engine = Engine(path)
    if engine.file_sizes()[0] > 0 and not refusal:
        return path
    if not named and command != "serve" and os.path.lexists(folder):
        if not os.access(folder, os.X_OK):
            remedy = "run it with sudo, or name another database with --db"
            raise OperatorError(f"only its owner can open {folder}: {remedy}")
        is_its = command == "restore" or how_to_continue(SERVICE_DATABASE)
        if is_its or Engine(SERVICE_DATABASE).file_sizes()[0] > 0:
            complain(f"using {SERVICE_DATABASE}" + (refusal and f": {refusal}"))
            return SERVICE_DATABASE
    if refusal:
        raise OperatorError(refusal)
    if command not in DATABASE_MAKERS and not os.path.exists(key_file_beside(path)):
        places = engine.path + ("" if named else f", and no {SERVICE_DATABASE}")
        remedy = "name one with --db, or create one with serve or mint-token"
        remedy = how_to_continue(path) or remedy
        raise OperatorError(f"there is no database {places}: {remedy}")
    return path


def key_file_beside(database: str) -> str:
    return os.path.join(os.path.dirname(database), DEFAULT_KEY_FILE)


def refusal_of_foreign_files(folder: str) -> str:
    """Why root must not use the files in this folder, or "". Whoever can write the database or
    knows the keys can let in any host, so root or the service folder's owner must own both."""
    trusted = {0}
    if os.path.isdir(folder):
        trusted.add(os.stat(folder).st_uid)
    for name in filter(os.path.lexists, (DEFAULT_DATABASE, DEFAULT_KEY_FILE)):
        owner = os.lstat(name).st_uid
        if os.geteuid() == 0 and owner not in trusted:
            return f"root uses ./{name}, a file of user {owner}, only if --db names it"
    return ""


# The attributes of arguments for members of bodies and queries that the command line renames.
OPTION_NAMES = {
    "intervalSeconds": "interval", "label": "where", "labels": "label", "maxUses": "max_uses",
    "signingKey": "signing_key", "sinceSeconds": "since", "mutedUntil": "mute",
    "ephemeralSeconds": "ephemeral", "olderSeconds": "older",
    "organization": "org", "organizationId": "org", "ttlSeconds": "ttl", "withHosts": "with_hosts",
    "withKeys": "with_keys", "named": "id",
}  # fmt: skip


def unchecked_call(arguments: argparse.Namespace, operation: Operation, now: int) -> UncheckedCall:
    """An operation with the values that the arguments of a command have. Raises UsageError."""
    schema = operation.query if operation.body is None else operation.body
    names = [name for name in schema.fields if name not in ("limit", "cursor", "named")]
    options = {name: getattr(arguments, OPTION_NAMES.get(name, name), None) for name in names}
    if getattr(arguments, "down", False) and "status" in options:
        options["status"] = [*(options["status"] or ()), *DOWN_STATUSES]
    values: dict[str, Any] = {name: v for name, v in options.items() if v is not None}
    if operation.body is None:
        return UncheckedCall(operation, values)
    if values.get("intervalSeconds") == "none":
        values["intervalSeconds"] = None
    if (mute := values.get("mutedUntil")) is not None:
        values["mutedUntil"] = rfc3339(now + mute * SECOND_MS) if mute else None
    merges = operation.patch is not None and arguments.label != [] and not arguments.set_labels
    if "labels" in values:
        try:
            parse = LABEL_CHANGES.parse if merges else LABELS.parse
            values["labels"] = dict(map(parse, arguments.label))
        except ValueError as error:
            raise UsageError(f"--label: {error}") from None
        if len(values["labels"]) < len(arguments.label):
            raise UsageError("--label: a key is given twice")
    return UncheckedCall(operation, values, merges)


def user_name(environment: Mapping[str, str]) -> str:
    """The name of the user who runs this, for the audit log: the name of the uid, because a user
    can choose LOGNAME, but not the uid. Under sudo also the user before, which root can forge."""

    def name_of(uid: int) -> str:
        with suppress(KeyError, OverflowError):  # no such user in this container
            return sanitize(pwd.getpwuid(uid).pw_name)
        return str(uid)

    name, before = name_of(os.getuid()), environment.get("SUDO_UID", "")
    if os.getuid() == 0 and re.fullmatch("[0-9]{1,10}", before):
        return f"{name} (sudo: {name_of(int(before))})"
    return name


# Commands that are an operation.

# The Service row; None if no server has run yet.
SERVICE_RULE = InternalRule(lambda registry, call, now: registry.queries.service(), writes=False)
FIND_RULE = InternalRule(  # the row of the object that the call names
    lambda registry, call, now: registry.names.find(ALL_ORGANIZATIONS, cast("Named", call.named)),
    writes=False,
)
DESTRUCTIVE = ("delete-host", "revoke-host", "revoke-token", "revoke-api-key", "retire-signing-key")


def show(session: Session) -> None:
    """Report what was done in a sentence, or the whole document. The token of a deleted host may
    still enroll hosts: then the report says that the machine can enroll again."""
    document, command = session.perform(), session.command
    if not command.outcome:
        session.report(document, describe(document, session.now(), session.screen))
        return
    facts = [command.outcome_text(document)]
    if command.name == "delete-host" and "usesLeft" in document:
        left, id = document["usesLeft"], document["tokenId"]
        hosts = "1 more host" if left == 1 else f"{left} more hosts"
        facts.append(
            f"its token {id} can enroll {hosts}, so the machine can come back: to prevent that, "
            f"revoke-token {id}"
        )
    shown = document["kid"] if command.name == "rotate-signing-key" else None  # stands alone
    session.report(document, shown, *facts)


def show_host(session: Session) -> None:
    """Show a host: its status and the reason in a headline, then its facts, then its last events,
    as far as one page of the audit log reaches."""
    call, now = session.call(), session.now()
    with session.backend(writes=False) as backend:
        host = backend.perform(call)
        query = {"subject": f"host:{host['id']}", "limit": str(HISTORY_SHOWN)}
        events = backend.perform(UncheckedCall(OPERATION["show-audit"], query))["events"]
    status, in_head = host["status"], ("name", "status", "statusSince", "statusReason", "warnings")
    age = f" for {age_of(host['statusSince'], now)}" if host["statusSince"] else ""
    facts = {name: value for name, value in host.items() if name not in in_head and value}
    state = session.screen.paint(plain_text(status), status)
    lines = [f"{plain_text(host['name'])}: {state}{age}"]
    lines += map(plain_text, [host["statusReason"], *host["warnings"]])
    lines += ["", describe(facts, now, session.screen)]
    history = Table(("when", "text", "address"), session.screen, False)
    lines += ["", "last events:", history.add(events, now)] if events else []
    session.report(host, "\n".join(lines))


def act_on_hosts(session: Session) -> Optional[int]:
    """Act on one host at once. On several hosts, or on hosts that filters find, act only after a
    yes, and in short ticks, because a server may run, too. Returns the exit status."""
    arguments, call, action = session.arguments, session.call(), session.command.name[:-5]
    filters = unchecked_call(arguments, OPERATION["list-hosts"], session.now())
    words = [*dict.fromkeys(arguments.id)]
    if bool(words) == bool(filters.values):
        raise UsageError("give a HOST, or filters that find hosts")
    if len(words) == 1 and not arguments.dry_run:
        show(session)
        return None
    if "name" in call.values or (session.operation.patch and not call.merges):
        raise UsageError("--name, --set-labels and --no-labels are for one host")
    filters.checked()
    with session.backend(writes=not arguments.dry_run) as backend:
        if filters.values:
            hosts = chain.from_iterable(pages(session, backend, filters))
            words = [host["id"] for host in hosts]
        elif arguments.dry_run or session.asks_first or len(words) > ACTED_AT_ONCE // 2:
            titles = dict(backend.find(session.named(word)) for word in words)
            words = [*titles]
            if session.asks_first:
                inform(*map(plain_text, titles.values()))
        count = f"hosts to {action}: {len(words)}"
        if arguments.dry_run:
            session.report({"hosts": words}, "\n".join(words) or None, count)
            return None
        if not arguments.yes and not is_at_terminal():
            raise UsageError(f"{count}; nothing was done: --dry-run lists them, --yes confirms")
        if not arguments.yes:
            session.confirm(count, backend)
        return act_in_steps(session, backend, words, {**call.values, "action": action}, count)


def act_in_steps(
    session: Session, backend: Backend, words: Sequence[str], values: Mapping[str, Any], count: str
) -> Optional[int]:
    """Act on a part of the hosts in each tick. What is done stays done if a later tick fails."""
    total: dict[str, Any] = {"done": 0, "notFound": []}
    act = UncheckedCall(OPERATION["act-on-hosts"], {**values, "hosts": []})
    step = ACTED_AT_ONCE // 2
    try:
        for start in range(0, len(words), step):
            hosts = [session.named(word) for word in words[start : start + step]]
            acted = backend.perform(act._replace(hosts=hosts))
            total = {name: total[name] + acted[name] for name in total}
    finally:
        missing = [f"there is no host {plain_text(id)}" for id in total["notFound"]]
        session.report(total, None, f"{count}; done: {total['done']}", *missing)
    return EXIT_REFUSED if total["notFound"] else None


def is_at_terminal() -> bool:
    return all(stream and stream.isatty() for stream in (sys.stdin, sys.stderr))


def service_of(backend: Backend) -> ServiceInfo:
    """The URL and pins of the servers. Raises StorageUnavailable."""
    service = backend.perform(UncheckedCall(OPERATION["show-service"]))
    return service_info(service["publicUrl"], service["pin"] or "")


def mint_token(session: Session) -> None:
    call, is_person, now = session.call(), is_at_terminal(), session.now()
    with session.backend() as backend:
        before_first = "no server has run on this database yet: run serve"
        server, remarks = service_of(backend), backend.remarks(before_first if is_person else "")
        token = backend.perform(call)  # last, so that a command that fails has minted nothing
    output_secret(session, token, "token", "token")
    if not session.arguments.json:
        uses = "1 host" if token["maxUses"] == 1 else f"{token['maxUses']} hosts"
        expiry, whose = relative_time(token["expiresAt"], now), token["organizationId"]
        inform(
            *remarks,
            plain_text(f"token {token['id']} (organization {whose}): {uses}, expires {expiry}"),
            "run this on the machine:",
            join_command(server.url, server.pin, token["token"]),
        )
        if is_person:
            inform("the agent stops with its terminal; as root, add --install at the end to get a",
                   "service, or without systemd a line for cron")  # fmt: skip


def mint_api_key(session: Session) -> None:
    arguments = session.arguments
    if arguments.link and arguments.ttl is None:
        arguments.ttl = SIGN_IN_TTL
    call = session.call()
    with session.backend() as backend:
        url = service_of(backend).url
        if backend.name and not arguments.typed & {"--org", "--all-orgs"}:  # the caller's own
            organization = backend.perform(UncheckedCall(OPERATION["show-me"]))["organizationId"]
            values = {**call.values, "organizationId": organization or DEFAULT_ORGANIZATION}
            call = call._replace(values=values)
        key = backend.perform(call)
    if arguments.link:
        key["link"] = f"{url}/#key={key['apiKey']}"  # browsers send no fragment to a server
    output_secret(session, key, "link" if arguments.link else "apiKey", "API key")
    if not session.arguments.json:
        facts = f"{key['role']} of {key['organizationId'] or 'all organizations'}"
        inform(plain_text(f"API key {key['id']}: {facts}; it also signs in to the server's page"))


def agent_command(session: Session) -> None:
    with session.backend(writes=False) as backend:
        service = backend.perform(UncheckedCall(OPERATION["show-service"]))
    line = service_info(service["publicUrl"], service["pin"] or "").agent_line
    facts = "run this as root on enrolled machines: it updates the agent, its URL and its pins"
    session.report(service, line, facts)


def list_items(session: Session) -> None:
    """Show a list, page by page, so that a million hosts need no more memory than a thousand. In
    JSON, each item of a feed is a line, so that a program can follow the feed."""
    arguments, name = session.arguments, session.operation.list_of
    form, counts = "json" if arguments.json else arguments.form or "table", Counter[str]()
    is_screen = form == "table" and session.screen.columns is not None
    follows = getattr(arguments, "follow", False)
    is_part = is_screen and not (arguments.all or follows or getattr(arguments, "limit", None))
    if is_part:
        arguments.limit = PAGE_DEFAULT
    with session.backend(writes=False) as backend:
        word = getattr(arguments, "host", None)
        if word is not None and not ID.fullmatch(word):
            refuse_secrets([word])
            arguments.host, _ = backend.find(Named(Host, word, True))
        call = session.call()
        if name == "events" and follows:
            call = call._replace(values={"after": "now", **call.values})
        batches = pages(session, backend, call)
        first = next(batches, [])
        is_feed = name == "changes" or "after" in call.values
        try:
            for text in list_text(session, chain([first], batches), form, is_feed, counts):
                print(text, end="", flush=True)
        except BrokenPipeError:  # the reader has read enough
            discard(sys.stdout)
            return
        remarks = backend.remarks() if form == "table" and name == "hosts" else ()
    if is_screen and counts:
        has_more = is_part and sum(counts.values()) == PAGE_DEFAULT
        inform(summary_line(name, counts) + ("; --all shows all" if has_more else ""))
    if form == "table" and not first and name in ("hosts", "tokens"):
        inform(f"no {name} match" if call.values else f"no {name} yet: run mint-token")
    inform(*remarks)


def list_text(
    session: Session, batches: Iterable[list[dict[str, Any]]], form: str, is_feed: bool,
    counts: Counter[str],
) -> Iterator[str]:  # fmt: skip
    """The parts of a list's text in a form, one of those of -o. For a table, the states of its
    items are counted in counts."""
    operation, documents = session.operation, chain.from_iterable(batches)
    if form == "table":
        table = Table(operation.columns, session.screen)
        for batch in batches:
            counts.update(item.get("status") or item.get("state") or "" for item in batch)
            yield f"{table.add(batch, session.now())}\n"
    elif form == "csv":
        members = list(cast("Document", operation.answer).schema.fields)
        yield csv_line(members)
        yield from (csv_line(map(document.get, members)) for document in documents)
    elif form == "name":
        yield from (f"{plain_text(name_to_type(document))}\n" for document in documents)
    elif is_feed:
        yield from (f"{json.dumps(document)}\n" for document in documents)
    else:
        yield from json_list(operation.list_of, batches)


def name_to_type(document: Mapping[str, Any]) -> Any:
    """What a script types for an object: its name, if the name is safe, else its id. A machine may
    call itself --all, "a b", or the id of another host: a script would then act on other hosts."""
    name = document.get("name")  # a newer server may send any value
    if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name) and not ID.fullmatch(name):
        return name
    return next(filter(None, map(document.get, ["kid", "id", "number", "cursor"])), "")


def summary_line(name: str, counts: Mapping[str, int]) -> str:
    """How many items a list has, and how many of them in each state."""
    total, noun = sum(counts.values()), readable_name(name)
    known = (*REPORTED_STATUSES, *STATUSES, *filter(None, counts))
    order = filter(counts.get, dict.fromkeys(known))
    states = ", ".join(f"{counts[state]:,} {plain_text(state)}" for state in order)
    return f"{total:,} {noun[:-1] if total == 1 else noun}" + (states and f": {states}")


FORMULA = ("=", "+", "-", "@", "\t", "\r")  # where a spreadsheet runs what a cell says


def csv_line(values: Iterable[Any]) -> str:
    """A line of CSV (RFC 4180). Machines choose their names, so no cell begins like a formula."""
    cells, line = [], io.StringIO()
    for value in values:
        text = " ".join(map(str, value)) if isinstance(value, list) else value
        text = "" if text in (None, {}) else text
        text = text if isinstance(text, str) else plain_text(text)
        cells.append("'" * text.startswith(FORMULA) + (text and plain_text(text)))
    csv.writer(line).writerow(cells)
    return line.getvalue()


def pages(session: Session, backend: Backend, call: UncheckedCall) -> Iterator[list[Any]]:
    """The items of a list, at most --limit of them, in parts. While a part takes long, the progress
    line shows how many items were found."""
    left = getattr(session.arguments, "limit", None) or LAST_ID
    follows = getattr(session.arguments, "follow", False)
    operation, values, is_last = call.operation, dict(call.values), False
    is_feed, end = operation.list_of == "changes" or "after" in values, 0
    if is_feed and not follows:  # the end of a feed moves, so stop where it is now
        end = feed_number(backend.perform(UncheckedCall(operation, {"after": "now", "limit": "1"})))
    while not is_last:
        items: list[dict[str, Any]] = []
        with session.progress() as progress:
            while not is_last and len(items) < PAGE_DEFAULT:
                if "limit" in operation.query.fields:
                    values["limit"] = str(min(left, PAGE_MAXIMUM))
                page = perform_with_retries(backend, call._replace(values=values))
                items, left = items + page[operation.list_of], left - len(page[operation.list_of])
                name, member = ("after", "cursor") if is_feed else ("cursor", "nextCursor")
                before, values[name] = values.get(name), page.get(member)
                is_last = feed_number(page) >= end or follows if is_feed else values[name] is None
                is_last |= left <= 0
                if before == values[name] and not is_last:
                    raise OperatorError("the list never ends: check the URL of the server")
                progress(len(items), 0)
        if items:
            yield items
        if follows and left > 0:
            is_last = not (sys.stdout and has_reader(sys.stdout, 0))
            values["wait"] = str(WATCH_WAIT)


def perform_with_retries(backend: Backend, call: UncheckedCall) -> Any:
    """The document of a call. A call that follows a feed, after its first page, is repeated until
    a server that restarts is back; one line says what fails. Raises what the backend raises."""
    pause = 0
    while True:
        try:
            return backend.perform(call)
        except (OperatorError, StorageUnavailable, Overloaded) as error:
            if "wait" not in call.values:
                raise
            if not pause:
                complain(f"{error}; --follow tries again until it works")
            pause = min(max(1, 2 * pause), RETRY_LONGEST)
            if not has_reader(sys.stdout, pause):
                raise


def feed_number(page: Mapping[str, Any]) -> int:
    """The number in the cursor of a page of a feed. Raises OperatorError."""
    if not re.fullmatch(FEED_CURSOR.pattern, str(page.get("cursor"))):
        raise OperatorError("the answer has no cursor: check the URL of the server")
    return int(page["cursor"].rpartition("-")[2])


def json_list(name: str, batches: Iterable[list[dict[str, Any]]]) -> Iterator[str]:
    """A list in JSON as the API would send it on one page, with one line for each item."""
    yield f'{{\n  "{name}": ['
    separator = ""
    for documents in filter(None, batches):
        yield separator + ",".join(f"\n    {json.dumps(document)}" for document in documents)
        separator = ","
    yield ("\n  ]" if separator else "]") + ',\n  "nextCursor": null\n}\n'


# Commands that are not operations.


def check_tls_options(arguments: argparse.Namespace) -> None:
    if bool(arguments.tls_cert) != bool(arguments.tls_key):
        raise UsageError("--tls-cert and --tls-key need each other: make-cert creates a pair")
    is_https = "https:" in (arguments.public_url or "")
    if arguments.tls_pin_cert and (arguments.tls_cert or not is_https):
        raise UsageError("--tls-pin-cert needs --public-url https://..., and excludes --tls-cert")
    wants_pin = arguments.next_pin or arguments.pin == "always"
    if wants_pin and not (arguments.tls_cert or arguments.tls_pin_cert):
        raise UsageError("--next-pin and --pin always need --tls-cert or --tls-pin-cert")
    if arguments.next_pin and arguments.pin == "never":
        raise UsageError("--pin never excludes --next-pin: leave one of them out")


def serve(session: Session) -> None:
    """Run a server until SIGTERM or SIGINT."""
    arguments = session.arguments
    check_tls_options(arguments)
    with suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps the memory that compiling this file took
        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX: each thread would reserve 64 MiB
    handler = LogHandler(arguments.log_format == "json", session.environment)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    for warning in unknown_settings(session.environment):
        log.warning("%s", warning)
    names = "init", "credential_ttl", "audit_keep", "changes_keep", "expire_missing"
    options = {name: getattr(arguments, name) for name in names}
    options["interval"] = arguments.heartbeat_interval
    with service_lock(session.files()[0], is_shared=True), ExitStack() as stack:
        registry = stack.enter_context(session.open(purpose="serve", **options))
        server = stack.enter_context(listen(session, registry))
        registry.metrics.counts = handler.counts
        for folder in folders_open_to_all(registry.engine.path, registry.keys.file.path):
            log.warning("any user can replace files in %s: chmod o-w %s", folder, folder)
        for number in STOP_SIGNALS:
            signal.signal(number, server.stop)
        signal.signal(signal.SIGHUP, server.reload)
        values = {"url": arguments.public_url or server.url}
        registry.perform(Call(START_SERVICE, values=values), session.now())
        announce_start(session, server)
        announce_page(session, registry, values["url"])
        with server.woken_by_signals():
            server.serve_forever()
        for number in STOP_SIGNALS:  # a second signal must not change the exit status
            signal.signal(number, signal.SIG_IGN)


def listen(session: Session, registry: Registry) -> Server:
    """Make the server that the arguments describe. Raises OperatorError."""
    arguments, environment = session.arguments, session.environment
    connections = fit_connections(CONNECTIONS_MAXIMUM)
    if connections < CONNECTIONS_MAXIMUM:
        log.warning("the limit of open files allows %d connections: ulimit -Hn", connections)
    manager = environment.get("NOTIFY_SOCKET")
    try:
        return Server(
            Api(registry), arguments.host, arguments.port, clock=session.clock,
            connections=connections, load_tls=tls_loader(arguments, registry.service),
            listener=inherited_listener(
                environment.get("LISTEN_PID", ""), environment.get("LISTEN_FDS", "")),
            proxies=tuple(arguments.trusted_proxy), access_log=arguments.access_log,
            notify=partial(notify_service_manager, manager) if manager else lambda state: None,
        )  # fmt: skip
    except (OSError, OverflowError) as error:
        raise OperatorError(
            f"cannot listen on {arguments.host} port {arguments.port}: {error}; choose another "
            "with --host and --port"
        ) from error


def tls_loader(arguments: argparse.Namespace, service: ServiceRecord) -> Optional[TlsLoader]:
    """What reads the certificate, and decides what join commands pin. Raises OperatorError."""
    public_host = urlsplit(arguments.public_url or "").hostname
    file, next_pin = arguments.tls_cert or arguments.tls_pin_cert, arguments.next_pin or ""
    if next_pin and not re.fullmatch(PIN, next_pin):
        next_pin = read_certificate(load_tls(next_pin, None)[1][0], next_pin).pin

    def load(host: str) -> Any:
        context, chain = load_tls(file, arguments.tls_key)
        certificate = read_certificate(chain[0], file)
        reason = distrust(chain, public_host or host) if arguments.pin == "auto" else ""
        if reason and not next_pin:
            log.warning(
                "join commands pin the certificate's key (%s): agents refuse a renewed certificate "
                "with another key. Keep the key (certbot --reuse-key), name the next with "
                "--next-pin, or use serve --pin never and give agents the authority with --cacert",
                reason,
            )
        is_pinned = reason or arguments.pin == "always"
        pins = filter(None, dict.fromkeys((certificate.pin, next_pin)))
        return context, partial(service.announce, certificate, ";".join(pins) if is_pinned else "")

    return load if file else None


def announce_start(session: Session, server: Server) -> None:
    if server.is_in_the_clear:
        log.warning("other machines can connect, and without TLS their secrets are not encrypted")
    if server.host != server.server_name and not session.arguments.public_url:
        log.warning("join commands contain this machine's hostname: give --public-url")
    listens = f"hostenroll {__version__} listens on {server.url}"
    if session.arguments.log_format == "json":
        log.info(listens)
        return
    inform(listens)
    if session.arguments.public_url:
        inform(f"hosts reach it at {session.arguments.public_url}")
    named = ("--db", session.arguments.db), ("--key-file", session.arguments.key_file)
    options = chain(*(pair for pair in named if pair[1] is not None))
    mint = " ".join([session.program, "mint-token", *map(shlex.quote, options)])
    inform(f"next, in another terminal: {mint}")


def announce_page(session: Session, registry: Registry, url: str) -> None:
    """On a terminal, print the page's URL; if there is no API key yet, a link that signs in."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    if session.arguments.log_format == "json" or not is_terminal:
        return
    call = Call(OPERATION["list-api-keys"], SYSTEM, values={"limit": 1})
    if registry.perform(call, session.now()).items:
        inform(f"page: {url}/ (sign in with {session.program} mint-api-key --all-orgs --link)")
        return
    values = {"role": "admin", "ttlSeconds": SIGN_IN_TTL, "description": "sign-in link"}
    minted = registry.perform(Call(OPERATION["mint-api-key"], SYSTEM, values=values), session.now())
    inform(f"page, with a sign-in for 12 h: {url}/#key={minted.text}")


def check_audit(session: Session) -> None:
    """Verify the audit log, and print its head. Raises OperatorError if the log was changed."""
    head = session.arguments.head
    with session.progress() as progress, session.open(purpose="read") as registry:
        verified = verify_audit(registry.engine, registry.keys.keyring, head, progress)
    if registry.engine.altered:
        raise OperatorError("the events are unchanged, but the schema was altered")
    if head is not None and not verified.has_head:
        reason = "its end was cut off, or all events up to there were deleted by age"
        raise OperatorError(f"the audit log has no event with this head: {reason}")
    numbers = {name: getattr(verified, name) for name in ("first", "last", "unverified")}
    scope = "keep this head elsewhere: a later run with --head detects a log that was cut off"
    if head is not None:
        scope = "no event up to the given head is missing; a later head is needed for the rest"
    facts = f"{verified.summary()}; the head of the log is on stdout", scope
    session.report({"head": verified.head.hex(), **numbers}, verified.head.hex(), *facts)


def run_backup(session: Session) -> None:
    folder, keep, removed = session.arguments.folder, session.arguments.keep, list[str]()
    os.nice(BACKUP_NICENESS)
    try:
        with session.progress() as progress, session.open(purpose="copy") as registry:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            with closing(Folder(folder)) as parent:
                if keep:
                    folder, *removed = Backups(registry, parent).add(keep, session.now(), progress)
                else:
                    registry.backup(folder, progress)
            database, key_file = registry.copies_in(os.path.realpath(folder))
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else ""  # or it is a descriptor
        path = os.path.join(folder, name)
        raise OperatorError(f"cannot copy to {path}: {error.strerror}") from error
    copied = f"copied the database to {database} and its keys to {key_file}: keep both secret"
    facts = copied, *(f"removed {path}" for path in removed)
    session.report({"database": database, "keyFile": key_file, "removed": removed}, None, *facts)


def run_restore(session: Session) -> None:
    path, key_path = map(resolve_file, session.files())
    restore = Restore(path, key_path, session.arguments.as_it_was)
    with session.progress() as progress:
        folder = session.arguments.folder
        done = restore.run(folder, session.by, session.now(), progress)
    place, file = os.path.split(done["backup"])
    taken, names = os.path.basename(place), filter(BACKUP_NAME.fullmatch, os.listdir(folder))
    has_copy = (name for name in names if os.path.isfile(os.path.join(folder, name, file)))
    newest = max(has_copy, default="")
    facts = []
    if BACKUP_NAME.fullmatch(taken) and newest > taken:
        facts = [f"{newest} has a later date, but is ahead of this clock: if the clock is wrong, "
                 "restore that"]  # fmt: skip
    session.report(done, describe(done, session.now(), session.screen), *facts)


def accept_history(session: Session) -> None:
    with session.open() as registry:
        registry.perform(Call(ACCEPT_HISTORY, session.by), session.now())
    session.report({}, None, "hosts that enrolled after the backup must enroll again")


def print_inventory(session: Session) -> None:
    """Print what Ansible expects of an inventory script: all hosts, or the variables of one."""
    document, host = session.perform(), session.arguments.host
    if host is not None:
        document = document["_meta"]["hostvars"].get(host, {})
    output(json.dumps(document, indent=2))


def run_check(session: Session) -> Optional[int]:
    arguments = session.arguments
    if arguments.ready is not None:  # plain http is allowed, because no secret is sent
        port = session.environment.get("HOSTENROLL_PORT") or DEFAULT_PORT
        url = f"http://{DEFAULT_HOST}:{port}" if arguments.ready is True else arguments.ready
        pins = arguments.pin or ()
        client = Client(url, pins=pins, cacert=arguments.cacert or "", insecure_http=True)
        if client.request("GET", READY.path)[0] != HTTPStatus.OK:
            raise OperatorError(f"{client.name} is not ready")
        return None
    with session.progress() as progress:
        findings = [*examine(*session.files(), progress, session.now())]
    is_good = all(finding.is_good for finding in findings)
    documents = [{"name": f.name, "ok": f.is_good, "detail": f.detail} for f in findings]
    table = Table(("ok", "name", "detail"), session.screen, has_headings=False)
    shown = table.add(documents, session.now())
    session.report({"ok": is_good, "findings": documents}, shown)
    return None if is_good else EXIT_FAILED


def watch(session: Session) -> None:
    """Report changes until SIGTERM or SIGINT."""
    arguments, path = session.arguments, session.arguments.state
    session.client()  # raises errors in the options before anything is reported
    deliver = delivery_of(session)
    if arguments.test:
        deliver(message("test", "this is a test of hostenroll: it works", session.clock()))
        return
    query = [("organization", arguments.org)] if arguments.org else []
    query += [("label", pair) for pair in arguments.label or ()]
    statuses, events = arguments.status or REPORTED_STATUSES, arguments.audit
    options = WatchOptions(arguments.delay, arguments.batch, statuses, events, query)
    log.addHandler(LogHandler(False, session.environment))
    log.setLevel(logging.INFO)
    with ExitStack() as stack:
        if path:
            lock = open_lock_file(f"{resolve_file(path)}.lock", path)
            stack.callback(os.close, lock)
            if not try_flock(lock):
                raise OperatorError(f"another watch uses {path}: stop it, or name another file")
        backend = stack.enter_context(session.backend(writes=False))

        def read(path: str, query: Sequence[tuple[str, str]], patience: float) -> Any:
            values: dict[str, list[str]] = {}
            for name, text in query:
                values.setdefault(name, []).append(text)
            call = UncheckedCall(find_operation("GET", path)[0], values)
            call.checked()
            return backend.perform(call)

        signal.signal(signal.SIGTERM, signal.default_int_handler)
        Watch(read, deliver, options, path or "", session.clock, time.sleep).run()


def delivery_of(session: Session) -> Callable[[str], None]:
    """A function that delivers messages as the arguments say. Raises OperatorError, UsageError."""
    arguments, url, secret = session.arguments, session.arguments.webhook, b""
    if arguments.secret_file and not url:
        raise UsageError("--secret-file needs --webhook")
    if arguments.exec:
        return partial(deliver_by_command, arguments.exec)
    if not url:
        return print_line
    if arguments.secret_file:
        secret = read_private(arguments.secret_file, "secret file")[0].strip()
        if not secret:
            raise OperatorError(f"there is no secret in {arguments.secret_file}")
    proxy = proxy_of(url, session.environment)
    client = Client(url, proxy=proxy, insecure_http=arguments.insecure_http)
    return partial(deliver_by_webhook, client, secret, session.clock)


def print_unit(session: Session) -> None:
    arguments = session.arguments
    if arguments.socket or arguments.timer:
        output(SOCKET_UNIT if arguments.socket else TIMER_UNIT, end="")
        return

    def word(text: str) -> str:  # quoted: systemd.syntax(7), and the specifiers of systemd.unit(5)
        escaped = text.replace("\\", r"\\").replace('"', r"\"").replace("%", "%%")
        return f'"{escaped}"'

    program, state = os.path.abspath(__file__), f"{os.path.dirname(SERVICE_DATABASE)}/watch"
    folder = os.path.abspath(arguments.backup) if arguments.backup else ""
    command, words, lines = "serve", list[str](), dict[str, str]()
    if arguments.watch:
        command, words, lines = "watch", ["--state", state, *arguments.words], WATCH_LINES
    elif folder:
        command, words, lines = "backup", [folder, "--keep", str(BACKUPS_KEPT)], BACKUP_LINES
        if arguments.dynamic_user:
            raise UsageError("with --dynamic-user each unit has a user of its own: not --backup")
    # systemd replaces variables in arguments, but not in the program's path: systemd.service(5).
    path, *options = (word(each).replace("$", "$$") for each in (program, *words))
    start = " ".join([word(sys.executable), path, command, *options])
    typed = shlex.join([sys.executable, program])
    runs_as = "DynamicUser=yes" if arguments.dynamic_user else f"User={SERVICE_USER}"
    text = UNIT.substitute(start=start, typed=typed, runs_as=runs_as)
    for of_serve, of_other in lines.items():
        text = text.replace(of_serve, of_other)
    output(text.replace("@FOLDER@", word(folder)), end="")
    report_unit_needs(arguments.dynamic_user, program, folder)


def report_unit_needs(has_user: bool, program: str, folder: str) -> None:
    """Say on stderr what the unit needs and this machine does not have yet."""
    with suppress(KeyError):
        has_user |= pwd.getpwnam(SERVICE_USER).pw_uid not in DYNAMIC_USERS
    if not has_user:
        add = f"useradd --system --shell /usr/sbin/nologin {SERVICE_USER}"
        inform(f"there is no user {SERVICE_USER} here yet: {add}")
    if folder and not os.path.isdir(folder):
        make = f"install -d -m 700 -o {SERVICE_USER} {shlex.quote(folder)}"
        inform(f"there is no folder {folder} here yet: {make}")
    for path in (sys.executable, program, folder):
        if path.startswith(("/home/", "/root/", "/tmp/", "/var/tmp/")):
            inform(f"the service cannot read {path}: put it in /usr/local/lib or so")


# Names of hosts are not completed: machines choose them, and compgen expands words as a shell does.
COMPLETION = string.Template("""\
_hostenroll() {
  local words="" word="$${COMP_WORDS[COMP_CWORD]}" before=""
  [ "$$COMP_CWORD" = 1 ] || before="$${COMP_WORDS[1]} $${COMP_WORDS[COMP_CWORD-1]} "
  case "$$before" in
    "" | "help help ") words="$commands" ;;
$cases
  esac
  COMPREPLY=($$(compgen -W "$$words" -- "$$word"))
}
complete -o default -F _hostenroll hostenroll hostenroll.py
""")
ZSH_COMPLETION = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"


def print_completion(session: Session) -> None:
    """Print what completes commands, options and their words; else the shell completes files."""
    lines = []
    for command in COMMANDS:
        for argument in command.arguments:
            before = argument.name if argument.name.startswith("-") else command.name
            if words := " ".join(getattr(argument.options.get("type"), "words", ())):
                lines += [f'    "{command.name} {before} ") words="{words}" ;;']
        names = " ".join(each.name for each in command.arguments if each.name.startswith("-"))
        lines += [f'    "{command.name} "*) words="{names}" ;;']
    commands = " ".join(("help", *(command.name for command in COMMANDS)))
    is_zsh = session.arguments.shell == "zsh"
    text = COMPLETION.substitute(commands=commands, cases="\n".join(lines))
    output((ZSH_COMPLETION if is_zsh else "") + text, end="")


def make_cert(session: Session) -> None:
    arguments = session.arguments
    names = [subject_alternative_name(name) for name in arguments.name]
    certificate, key = arguments.tls_cert, arguments.tls_key
    if os.path.realpath(certificate) == os.path.realpath(key):
        raise OperatorError("--tls-cert and --tls-key name the same file")
    make_pair(certificate, key, arguments.name[0], names, arguments.days)
    pin = read_certificate(load_tls(certificate, key)[1][0], certificate).pin
    document = {"certificate": certificate, "key": key, "pin": pin}
    files = f"--tls-cert {shlex.quote(certificate)} --tls-key {shlex.quote(key)}"
    command = f"{session.program} serve {files}"
    session.report(document, None, f"made {certificate} and {key}; its pin is {pin}; now", command)


def run_openssl(subject: str, names: Sequence[str], days: int) -> dict[str, str]:
    """A new self-signed certificate and its key, in PEM by their kind. Raises OperatorError."""
    # The system's configuration of openssl is not used, because it makes authorities: whoever
    # imports an authority for the page trusts its key for every name.
    config = (
        "[req]\ndistinguished_name=req\nx509_extensions=server\n[server]\n"
        "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n"
        f"extendedKeyUsage=serverAuth\nsubjectAltName={','.join(names)}\n"
    )
    command = [
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
        *("-nodes", "-sha256", "-days", str(days), "-subj", f"/CN={subject}"),
        *("-config", "/dev/stdin", "-keyout", "/dev/stdout"),
    ]
    try:
        result = subprocess.run(command, input=config, capture_output=True, text=True, check=False)
    except OSError as error:
        raise OperatorError(
            f"cannot make a certificate: cannot run openssl ({error.strerror}): "
            "make a pair on another machine, and copy it here"
        ) from error
    pair = {match[1]: f"{match[0]}\n" for match in PEM.finditer(result.stdout)}
    if result.returncode or len(pair) != 2:
        # The reason is the last line, apart from progress output: dots, and a line of dashes.
        reasons = [line for line in result.stderr.splitlines() if line.strip("-.+* ")]
        reason = (reasons or [f"openssl ended with {result.returncode}"])[-1]
        raise OperatorError(f"cannot make a certificate: {reason}")
    return pair


def make_pair(certificate: str, key: str, subject: str, names: Sequence[str], days: int) -> None:
    """Make a self-signed certificate and its key, in new files. Raises OperatorError."""
    for path in (certificate, key):
        if os.path.lexists(path):
            raise OperatorError(f"{path} exists already: remove it, or name another file")
    pair, created = run_openssl(subject, names, days), list[str]()
    files = (key, "PRIVATE KEY", PRIVATE_MODE), (certificate, "CERTIFICATE", 0o644)
    try:
        for path, kind, mode in files:
            with open(create_file(path, mode), "w", encoding="ascii") as file:
                created.append(path)
                file.write(pair[kind])
    except OSError as error:
        for leftover in created:  # or the next attempt would refuse, because they exist
            os.remove(leftover)
        raise OperatorError(f"cannot make {path}: {error.strerror}") from error


def subject_alternative_name(name: str) -> str:
    """The name or address of a server, as openssl expects it. Raises OperatorError."""
    if "%" not in name:  # the zone of an address belongs to one machine, and may be any text
        with suppress(ValueError):
            return f"IP:{ipaddress.ip_address(name)}"
    label = "[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"
    if len(name) > 64 or not re.fullmatch(rf"(\*\.)?{label}(\.{label})*", name):
        raise OperatorError(f"{sanitize(name)!r} is not a server name: letters, digits, . and -")
    return f"DNS:{name}"


# bench makes a scratch fleet in a temporary folder, starts the real server, and sends it requests.

HEARTBEAT_REQUEST = (
    b"POST /api/agent/heartbeat HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: curl/8.5.0\r\n"
    b"Accept: */*\r\nAuthorization: Bearer %b\r\n\r\n"
)
BENCH_RULE = f"hosts: as many as {BENCH_SHARE:.0%} of a core answers, each every 30 s or every 60 s"


def bench(session: Session) -> None:
    """Measure heartbeats as agents send them, each on a TLS connection, then on kept-alive ones."""
    arguments = session.arguments
    fit_connections(arguments.connections)
    for number in (signal.SIGTERM, signal.SIGHUP):  # clean up as after a Ctrl-C
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="hostenroll-bench-") as folder:
        pair = os.path.join(folder, "tls.crt"), os.path.join(folder, "tls.key")
        ways = [("TLS, a connection each", pair), ("kept alive", ())][: 1 if arguments.tls else 2]
        if arguments.tls or shutil.which("openssl", path=session.environment.get("PATH")):
            make_pair(*pair, DEFAULT_HOST, [f"IP:{DEFAULT_HOST}"], 1)
        else:
            inform("TLS is not measured: there is no openssl program")
            del ways[0]
        requests = make_fleet(session, folder)
        results = [measure(session, folder, requests, *way) for way in ways]
    sizes = {name: getattr(arguments, name) for name in ("hosts", "seconds", "connections")}
    table = Table(tuple(results[0]), session.screen).add(results, session.now())
    title = f"{arguments.hosts:,} hosts, {arguments.connections} connections; {BENCH_RULE}"
    document = {"version": __version__, **sizes, "results": results, "rule": BENCH_RULE}
    session.report(document, f"{title}\n{table}")


def make_fleet(session: Session, folder: str) -> Iterator[bytes]:
    """Enroll hosts by the rules, BENCH_BATCH in a transaction, so that rows and history are those
    of a real fleet. Returns heartbeats of all hosts in random order, again and again."""
    by, hosts = Principal("cli:bench", ALL_ORGANIZATIONS, "admin"), session.arguments.hosts
    files = [os.path.join(folder, name) for name in (DEFAULT_DATABASE, DEFAULT_KEY_FILE)]
    facts = {COLUMNS[fact.name]: fact.name for fact in FACTS}
    facts["every_seconds"], fleet, now = "", array("q"), session.now()
    registry = open_registry(files[0], files[1], now)
    key, origin = registry.keys.keyring.first, Origin(DEFAULT_HOST)
    claims = Claims(0, DEFAULT_ORGANIZATION, now // SECOND_MS, 1, None, key.kid)
    with session.progress("making the fleet") as progress:
        while len(fleet) < hosts:
            names = [f"host-{n:07d}.example.net" for n in range(len(fleet), hosts)[:BENCH_BATCH]]
            mint = Call(OPERATION["mint-token"], by, values={"maxUses": len(names)})
            token = registry.tokens.prove(registry.perform(mint, now).text, "", LOCAL, now)
            values = ({"token": token, "hostname": name, "facts": facts} for name in names)
            batch = [Call(OPERATION["enroll"], values=each) for each in values]
            new = [enrolled.host.id for enrolled in registry.run(batch, now) or ()]
            fleet.extend(new)  # their first heartbeats tell the registry their addresses:
            registry.run([heartbeat_of(claims._replace(host=host), origin) for host in new], now)
            registry.after_tick()
            progress(len(fleet), hosts)
    registry.close()
    random.shuffle(fleet)
    credentials = (key.sign(claims._replace(host=host)) for host in cycle(fleet))
    return (HEARTBEAT_REQUEST % credential.encode("ascii") for credential in credentials)


def cpu_ticks(process: int) -> int:
    """The CPU time that a process has taken, in clock ticks: proc(5)."""
    with open(f"/proc/{process}/stat", "rb") as file:
        return sum(map(int, file.read().rpartition(b")")[2].split()[11:13]))


def measure(
    session: Session, folder: str, requests: Iterator[bytes], way: str, pair: Sequence[str]
) -> dict[str, Any]:
    """Measure a server for --seconds, after half that time to fill its caches. way: the name of the
    measurement; pair: the certificate and key, if over TLS. Raises OperatorError."""
    connections, seconds = session.arguments.connections, session.arguments.seconds
    ours = (ENVIRONMENT_PREFIX, "NOTIFY_SOCKET", "LISTEN_")
    clean = {n: text for n, text in session.environment.items() if not n.startswith(ours)}
    tls = [f"{option}={path}" for option, path in zip(("--tls-cert", "--tls-key"), pair)]
    command = [sys.executable, os.path.abspath(__file__), "serve", "--port=0", *tls]
    with subprocess.Popen(command, cwd=folder, env=clean, stderr=subprocess.PIPE) as server:
        try:
            line, listens, log = b"", None, cast("BinaryIO", server.stderr)
            while listens is None:
                last, line = line, log.readline()
                if not line:
                    raise OperatorError(f"the server does not start: {last.decode()}")
                listens = re.search(rb" listens on https?://\S+:([0-9]+)\n", line)
            threading.Thread(target=log.read, daemon=True).start()  # or a full pipe would stop it
            load = partial(closed_loop, int(listens[1]), requests, connections)
            with session.progress(f"measuring {way}") as progress:
                progress(load(seconds / 2, *pair[:1]), 0)
                before = cpu_ticks(server.pid)
                answered = max(1, load(seconds, *pair[:1]))
                ticks = max(1, cpu_ticks(server.pid) - before)
        except OSError as error:
            raise OperatorError(f"the load was interrupted: {error}") from error
        finally:
            server.terminate()
    cpu_seconds = ticks / os.sysconf("SC_CLK_TCK") / answered
    return {
        "way": way,
        "perSecond": round(answered / seconds),
        "serverCpuMicroseconds": round(cpu_seconds * 1e6, 1),
        "hostsAt30Seconds": int(BENCH_SHARE / cpu_seconds * 30),
        "hostsAt60Seconds": int(BENCH_SHARE / cpu_seconds * 60),
    }


class Argument(NamedTuple):
    """An argument of a command, as argparse takes it. Arguments of one group exclude each other."""

    name: str
    options: dict[str, Any]
    group: str = ""

    @property
    def attribute(self) -> str:
        return self.options.get("dest") or self.name.lstrip("-").replace("-", "_")

    @property
    def setting(self) -> str:
        """The environment variable that sets this argument, if it was not typed."""
        return ENVIRONMENT_PREFIX + self.attribute.upper()


def option(name: str, metavar: Optional[str], help: str = "", type: Any = str, default: Any = None,
           group: str = "", **more: Any) -> Argument:  # fmt: skip
    options = {"metavar": metavar, "help": help, "type": type, "default": default, **more}
    return Argument(name, options, group)


def choice(
    name: str, metavar: str, words: Sequence[str], default: str = "", **more: Any
) -> Argument:
    end = " (%(default)s)" if default else "; repeatable" if "action" in more else ""
    return option(name, metavar, ", ".join(words) + end, one_of(*words), default or None, **more)


def flag(name: str, help: str, group: str = "", **more: Any) -> Argument:
    return Argument(name, {"help": help, **(more or {"action": "store_true"})}, group)


# fmt: off
SWITCH: dict[str, Any] = {"nargs": "?", "const": True, "default": "no", "metavar": "no",
                          "type": lambda text: FLAG_WORDS[one_of(*FLAG_WORDS)(text)]}
STORE_OPTIONS = (
    option("--db", "FILE", "the database (hostenroll.db, or the service's)", file_name),
    option("--key-file", "FILE", "the keys (hostenroll.key beside the database)", file_name),
)
SERVE_OPTIONS = (
    option("--host", None, "the address to listen on (%(default)s)", listen_address, DEFAULT_HOST),
    option("--port", None, "the port to listen on, 0 for a free one (%(default)s)",
           within((0, 65535)), str(DEFAULT_PORT)),
    option("--heartbeat-interval", "TIME", "the time between heartbeats (%(default)s)",
           interval, f"{HEARTBEAT_INTERVAL}s"),
    option("--credential-ttl", "TIME", "the lifetime of credentials; agents renew them (forever)",
           within(CREDENTIAL_TTL_RANGE, duration, format_duration)),
    option("--tls-cert", "FILE", "use TLS, with this certificate chain in PEM", file_name),
    option("--tls-key", "FILE", "its key, in PEM; SIGHUP reloads both", file_name),
    option("--pin", "WHEN", "pin its key in join commands: always, never, or auto: if this "
           "machine's trust store does not verify it (%(default)s)",
           one_of("auto", "always", "never"), "auto"),
    option("--next-pin", "PIN|CERT", "pin the key of the next certificate too", file_name),
    option("--tls-pin-cert", "FILE", "the certificate chain of the proxy in front", file_name),
    option("--public-url", "URL", "the URL where agents reach the server", web_address),
    option("--trusted-proxy", "CIDR", "trust X-Forwarded-For from these addresses; repeatable "
           "(none)", networks, [], action="extend"),
    option("--audit-keep", "TIME", "how long the audit log is kept (forever)",
           within(AUDIT_KEEP_RANGE, duration, format_duration)),
    option("--changes-keep", "TIME", "how long changes of status are kept (30d)",
           within(CHANGES_KEEP_RANGE, duration, format_duration), CHANGES_KEPT),
    option("--expire-missing", "TIME", "delete hosts after this silence (never)", silence),
    choice("--log-format", "FORMAT", ("text", "json"), "text"),
    flag("--access-log", "log every request, heartbeats too", **SWITCH),
    flag("--init", "create the database or the key file even if the other exists",
         **SWITCH),
)
CLIENT_OPTIONS = (
    option("--server", "URL", "use this server (the database on this machine)", web_address),
    option("--api-key-file", "FILE", "an API key, in a file of mode 0600", file_name),
    option("--pin", "PIN", "the key that the server must have", pins),
    option("--cacert", "FILE", "the authority of its certificate, in PEM", file_name),
    flag("--insecure-http", "allow secrets over plain http to other machines"),
)
SETTINGS = (*STORE_OPTIONS, *SERVE_OPTIONS, *CLIENT_OPTIONS[:2])

ID_OPERAND = Argument("id", {"metavar": "ID", "help": "or its first 6 or more digits",
                             "type": utf8_word})
HOST_HELP = "name, hostname or id, or the first 6 or more digits of the id"
HOST_OPERAND = Argument("id", {"metavar": "HOST", "help": HOST_HELP, "type": utf8_word})
YES_OPTION = flag("--yes", "do not ask")
JSON_OPTION = flag("--json", "print JSON, in the API's shapes", "form")
LIST_OPTIONS = (
    choice("-o", "FORMAT", ("table", "csv", "json", "name"), dest="form", group="form"),
    flag("--all", "show everything, also on a terminal"))
LIMIT_OPTION = option("--limit", "N", "only the newest", within((1, 999_999_999)))
ORG_OPTION = option("--org", "NAME", "only this organization")
SINCE_OPTION = option("--since", "TIME", "only the last 1h, 7d and so on",
                      lambda text: str(duration(text)))
FEED_OPTIONS = (
    option("--after", "CURSOR", "oldest first, after this cursor; now: only new ones"),
    flag("--follow", "keep running and show new ones; with --json one per line"))
TTL_OPTION = option("--ttl", "TIME", "(%(default)s)", duration, "1h")
WITH_HOSTS_OPTION = flag("--with-hosts", "revoke its hosts too", action="store_const",
                         const="true")
LABEL_OPTION = option("--label", "K=V", "with this label: also K, K!=V; repeatable",
                      action="append", dest="where")
STATUS_OPTION = choice("--status", "STATUS", STATUSES, action="append")
FILTERS = (
    ORG_OPTION, STATUS_OPTION, flag("--down", "offline or missing"),
    option("--signing-key", "KID", "that use this signing key"),
    option("--token", "ID", "that enrolled with this token"),
    option("--older", "TIME", "with its status for this long", lambda text: str(duration(text))),
    option("--incident", "ID", "of this incident"))
MANY_ARGUMENTS = (
    Argument("id", {"metavar": "HOST", "nargs": "*", "help": f"{HOST_HELP}; or filters",
                    "type": utf8_word}),
    *FILTERS,
    option("--where", "K=V", "with this label: also K, K!=V; repeatable", action="append"),
    option("--reason", "TEXT", "for the audit log"),
    flag("--dry-run", "only show which hosts"), YES_OPTION)
INTERVAL_OPTION = option("--interval", "TIME", "time between its hosts' heartbeats (the server's)",
                         interval)
# fmt: on


class Command(NamedTuple):
    """A command that people type. It performs the operation of its name, if there is one."""

    name: str
    example: str
    run: Callable[[Session], Optional[int]]
    own_arguments: Sequence[Argument] = ()
    outcome: str = ""  # the sentence of show(), with members of the document in braces
    own_summary: str = ""
    shared: Sequence[Argument] = (JSON_OPTION, *STORE_OPTIONS)

    @property
    def summary(self) -> str:
        return self.own_summary or OPERATION[self.name].summary

    @property
    def arguments(self) -> Sequence[Argument]:
        lists = LIST_OPTIONS if self.run is list_items else ()
        is_over_http = self.name in OPERATION and OPERATION[self.name].path
        clients = CLIENT_OPTIONS if is_over_http and STORE_OPTIONS[0] in self.shared else ()
        return (*self.own_arguments, *lists, *self.shared, *clients)

    @property
    def operands(self) -> list[str]:
        operands = [argument.options for argument in self.arguments if argument.name[0] != "-"]
        return [f"{each['metavar']}{' ...' if 'nargs' in each else ''}" for each in operands]

    def outcome_text(self, document: Mapping[str, Any]) -> str:
        """The sentence that says what the command has done."""
        return self.outcome.format(**{name: plain_text(v) for name, v in document.items()})

    def argument_of(self, member: str) -> str:
        """The option or operand that sets a member of a body or query."""
        for each in self.arguments:
            if each.attribute == OPTION_NAMES.get(member, member):
                return each.name if each.name[0] == "-" else str(each.options["metavar"])
        return member


# fmt: off
def by_id(name: str, outcome: str = "", run: Callable[[Session], Optional[int]] = show,
          arguments: Sequence[Argument] = (ID_OPERAND,)) -> Command:
    return Command(name, f"{name} 0ca4f1b28e3d7a95", run, arguments, outcome)


GROUPS = {
    "server and tokens": (
        Command("serve", "serve --host 127.0.0.1 --port 8080", serve, SERVE_OPTIONS,
                own_summary="answer agents and operators over HTTP", shared=STORE_OPTIONS),
        Command("mint-token", "mint-token --ttl 30m --label rack=b4", mint_token, (
            option("--org", "NAME", "the organization of its hosts (default)"), TTL_OPTION,
            option("--max-uses", "N", "(%(default)s)", number, "1"),
            option("--hostname", "H", "only for this hostname"),
            option("--description", "TEXT", "what it is for"),
            option("--label", "K=V", "for the hosts that enroll; repeatable", action="append"),
            option("--ephemeral", "TIME", "delete its hosts after this silence", silence),
            INTERVAL_OPTION)),
        Command("list-tokens", "list-tokens --state valid", list_items, (
            ORG_OPTION, LIMIT_OPTION,
            choice("--state", "STATE", TOKEN_STATES, action="append"))),
        Command("agent-command", "agent-command", agent_command,
                own_summary="print the command that updates or moves enrolled agents",
                shared=(JSON_OPTION, *STORE_OPTIONS, *CLIENT_OPTIONS)),
        by_id("show-token"),
        by_id("revoke-token", "token {id} is revoked; without --with-hosts its hosts stay enrolled",
              arguments=(ID_OPERAND, WITH_HOSTS_OPTION, YES_OPTION)),
    ),
    "hosts": (
        Command("list-hosts", "list-hosts --status offline --label rack=b4", list_items, (
            *FILTERS,
            LABEL_OPTION,
            option("--q", "TEXT", "a part of names, id, address, system or a label's value"),
            choice("--sort", "ORDER", ("attention", "name", "enrolledAt", "statusSince")),
            option("--address", "CIDR", "of this address or network"), LIMIT_OPTION)),
        Command("list-changes", "list-changes --status offline --label rack=b4", list_items, (
            ORG_OPTION, SINCE_OPTION,
            option("--status", "STATUS", "the new status; repeatable", action="append"),
            LABEL_OPTION,
            option("--host", "HOST", "only this one", utf8_word), *FEED_OPTIONS)),
        by_id("show-host", run=show_host, arguments=(HOST_OPERAND,)),
        Command("inventory", "inventory --list --status online", print_inventory, (
            flag("--list", "all hosts (this is the default)", "what"),
            option("--host", "NAME", "the variables of this host", group="what"),
            ORG_OPTION, STATUS_OPTION, LABEL_OPTION),
            shared=STORE_OPTIONS),
        Command("list-incidents", "list-incidents", list_items, (ORG_OPTION,)),
        Command("edit-host", "edit-host 0ca4f1b28e3d7a95 --name web-1", act_on_hosts, (
            *MANY_ARGUMENTS, option("--name", "NAME"),
            option("--label", "K=V", "K=V sets a label, K- removes it; repeatable", group="labels",
                   action="append"),
            flag("--set-labels", "the labels replace all others"),
            flag("--no-labels", "remove all labels", "labels", action="store_const", const=[],
                 dest="label"),
            option("--interval", "TIME", "time between heartbeats; none: the server's",
                   lambda text: text if text == "none" else interval(text)),
            option("--mute", "TIME", "no notifications for this long; none: unmute",
                   lambda text: 0 if text == "none" else duration(text)))),
        by_id("revoke-host", "host {id} is blocked; restore-host unblocks it",
              act_on_hosts, MANY_ARGUMENTS),
        by_id("restore-host", "host {id} is unblocked; its agent retries once an hour",
              act_on_hosts, MANY_ARGUMENTS),
        by_id("delete-host", "host {id} is deleted; the machine must enroll again",
              act_on_hosts, MANY_ARGUMENTS),
        Command("expire-hosts", "expire-hosts --force", show, (
            ORG_OPTION, flag("--force", "for a day", required=True, action="store_true")),
            "expiry does not stop for a day; organizations: {organizations}"),
        Command("reenroll-host", "reenroll-host 0ca4f1b28e3d7a95", mint_token,
                (HOST_OPERAND, TTL_OPTION, INTERVAL_OPTION)),
    ),
    "organizations and API keys": (
        Command("add-org", "add-org berlin", show, (Argument("name", {"metavar": "NAME"}),),
                "organization {id} exists: mint-token --org {id}"),
        Command("list-orgs", "list-orgs", list_items),
        Command("mint-api-key", "mint-api-key --org berlin --role viewer", mint_api_key, (
            option("--org", "NAME", "(%(default)s)", default=DEFAULT_ORGANIZATION, group="org"),
            flag("--all-orgs", "for all organizations", "org", action="store_const", const=None,
                 dest="org"),
            choice("--role", "ROLE", ("admin", "viewer"), "admin"),
            option("--ttl", "TIME", "until it expires (never)", duration),
            flag("--link", "show it as a sign-in link to the page (--ttl 12h)"),
            option("--description", "TEXT", default=""))),
        Command("list-api-keys", "list-api-keys", list_items, (ORG_OPTION, LIMIT_OPTION)),
        by_id("revoke-api-key", "API key {id} is revoked", arguments=(
            ID_OPERAND, YES_OPTION, flag("--with-keys", "and the keys that it created, and theirs",
                                         action="store_const", const="true"))),
    ),
    "signing keys": (
        Command("list-signing-keys", "list-signing-keys", list_items),
        Command("rotate-signing-key", "rotate-signing-key", show, (),
                "it signs from now on; each host gets a new credential with a heartbeat.\n"
                "list-signing-keys counts the hosts of each key; retire-signing-key ends one"),
        Command("retire-signing-key", "retire-signing-key 5b1c09d2f3a4e687", show, (
            Argument("kid", {"metavar": "KID"}), YES_OPTION,
            flag("--force", "even if hosts still use it", action="store_const", const="yes")),
            "signing key {kid} is retired; hosts that must re-enroll, at most: {hosts}"),
    ),
    "operate": (
        Command("show-audit", "show-audit --action refuse --limit 20", list_items, (
            ORG_OPTION, SINCE_OPTION,
            choice("--action", "ACTION", ACTIONS, action="append"),
            option("--subject", "KIND:ID", "as in host:0ca4f1b28e3d7a95"),
            option("--code", "CODE", "of a refusal"), LIMIT_OPTION, *FEED_OPTIONS)),
        Command("verify-audit", "verify-audit", check_audit, (
            option("--head", "HASH", "the head of an earlier run: is all up to it still there?",
                   audit_head),),
            own_summary="check the audit log for tampering"),
        Command("watch", "watch --webhook https://chat.lan/hooks/fleet", watch, (
            ORG_OPTION,
            option("--label", "K=V", "only hosts with this label; repeatable", action="append"),
            option("--status", "STATUS", "report hosts with this new status; repeatable "
                   f"({', '.join(REPORTED_STATUSES)})", one_of(*CHANGED_TO), action="append"),
            option("--audit", "WORD,...", "report events with these actions or codes, or none "
                   "(%(default)s)", event_words, ",".join(REPORTED_EVENTS)),
            option("--delay", "TIME", "report what lasts this long (%(default)s)", duration, "2m"),
            option("--batch", "TIME", "collect for this long (%(default)s)", duration, "10s"),
            option("--state", "FILE", "keep the position, for restarts", file_name),
            option("--exec", "COMMAND", "run this with JSON as its input",
                   matching("(?s).+", "is not a command"), group="how"),
            option("--webhook", "URL", "POST JSON to this URL", webhook_address, group="how"),
            option("--secret-file", "FILE", "signs webhooks; mode 0600", file_name),
            flag("--test", "send a test message and exit")),
            own_summary="notify people of changes", shared=(*STORE_OPTIONS, *CLIENT_OPTIONS)),
        Command("backup", "backup /var/backups/hostenroll", run_backup,
                (Argument("folder", {"metavar": "DIR"}),
                 option("--keep", "N", "into a new folder in DIR; remove all but the newest N",
                        within(BACKUPS_KEPT_RANGE))),
                own_summary="copy database and keys, also while a server runs"),
        Command("restore", "restore /var/backups/hostenroll", run_restore, (
            Argument("folder", {"metavar": "DIR"}),
            flag("--as-it-was", "do not repeat what was done since the backup")),
            own_summary="restore a backup; what was revoked stays revoked"),
        Command("accept-history", "accept-history", accept_history,
                own_summary="make hosts that a restore lost enroll again"),
        Command("check", "check", run_check, (
            option("--ready", "URL", "only check that this server is ready", web_address,
                   nargs="?", const=True), *CLIENT_OPTIONS[2:4]),
                own_summary="check database, keys and permissions"),
        Command("bench", "bench --hosts 1000000", bench, (
            option("--hosts", "N", "in the scratch fleet (%(default)s)",
                   within(BENCH_HOSTS_RANGE), str(BENCH_HOSTS)),
            option("--seconds", "S", "of each measurement (%(default)s)",
                   within(BENCH_SECONDS_RANGE), str(BENCH_SECONDS)),
            option("--connections", "C", "(%(default)s)",
                   within(BENCH_CONNECTIONS_RANGE), str(BENCH_CONNECTIONS)),
            flag("--tls", "only over TLS, a connection each")),
            own_summary="measure how many hosts this machine can hold", shared=(JSON_OPTION,)),
        Command("make-cert", "make-cert --name enroll.lan", make_cert, (
            option("--name", "NAME", "a name or address of the server; repeatable",
                   action="append", required=True),
            option("--days", "N", "(%(default)s)", within(CERTIFICATE_DAYS_RANGE), "3650"),
            option("--tls-cert", "FILE", "(%(default)s)", file_name, "hostenroll-tls.crt"),
            option("--tls-key", "FILE", "(%(default)s)", file_name, "hostenroll-tls.key")),
            own_summary="create a self-signed certificate and its key", shared=(JSON_OPTION,)),
        Command("unit", "unit", print_unit, (
            flag("--socket", "the socket unit", group="of"),
            flag("--watch", "a unit for watch", group="of"),
            option("--backup", "DIR", f"a unit for backup DIR --keep {BACKUPS_KEPT}", file_name,
                   group="of"),
            flag("--timer", "the timer for daily backups", group="of"),
            Argument("words", {"metavar": "OPTION", "nargs": "*", "help": "of watch, after --"}),
            flag("--dynamic-user", "let systemd create the service's user (DynamicUser=)")),
                own_summary="print a systemd unit", shared=()),
        Command("completion", "completion bash", print_completion, (
            Argument("shell", {"metavar": "SHELL", "type": one_of("bash", "zsh"),
                               "help": "bash or zsh"}),),
                own_summary="print completions, for a shell to eval", shared=()),
        Command("schema", "schema", lambda session: output(SCHEMA, end=""),
                own_summary="print the database's schema", shared=()),
        Command("openapi", "openapi",
                lambda session: output(json.dumps(openapi_document(), indent=2)), shared=()),
        Command("agent-script", "agent-script",
                lambda session: output(AGENT_SCRIPT, end=""), shared=()),
    ),
}
# fmt: on
COMMANDS = tuple(chain.from_iterable(GROUPS.values()))


def suggestion(word: str, known: Iterable[str]) -> str:
    """A question whether a similar option or command was meant; "" if there is no similar one."""
    word = {"--label": "--where", "--where": "--label"}.get(word, word)  # some take the other
    similar = [name for name in known if word and word in name]
    if not similar:
        from difflib import get_close_matches  # takes 10 ms: imported only after a mistake

        similar = get_close_matches(word, list(known), n=1)
    return f"; did you mean {' or '.join(similar)}?" if 0 < len(similar) <= 4 else ""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line that says what to type next."""

    def __init__(self, typed: set[str], **options: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=layout, **options)
        self.color = False  # no colours in help, which Python 3.14 has: only states have a colour
        self.variables: dict[str, str] = {}  # options, and the environment variables that set them
        self._typed = typed

    def _print_message(self, message: str, file: Any = None) -> None:
        """Replaces argparse's method, which raises for a broken pipe before Python 3.12."""
        if message:
            output(message, end="")

    def error(self, message: str) -> NoReturn:
        """Complain and raise SystemExit. A bad value that was not typed is from the environment."""
        name, colon, rest = re.sub("argument (?=-)", "", message).partition(": ")
        name = name if name in self._typed else self.variables.get(name, name)
        text = f"{name}{colon}{rest}".replace("the following arguments are required:", "this needs")
        complain(f"{text} (see: {self.prog} --help)")
        self.exit(EXIT_USAGE)


def add_arguments(
    parser: Parser, command: Command, typed: set[str], environment: Mapping[str, str]
) -> None:
    """Add the arguments of a command to its parser, with their settings in the environment."""
    parser.set_defaults(command=command, typed=typed)
    groups = {each.group: parser.add_mutually_exclusive_group() for each in command.arguments}
    for argument in command.arguments:
        into = groups[argument.group] if argument.group else parser
        into.add_argument(argument.name, **argument.options)
        # What is typed wins: --db over HOSTENROLL_SERVER, and --server over HOSTENROLL_DB.
        names = {argument.name}
        names |= {"--server"} if argument in STORE_OPTIONS else set()
        names |= {"--db", "--key-file"} if argument in CLIENT_OPTIONS else set()
        takes_setting = argument in SETTINGS and not names & typed
        if takes_setting and environment.get(argument.setting):
            parser.set_defaults(**{argument.attribute: environment[argument.setting]})
            parser.variables[argument.name] = argument.setting


def make_parser(
    words: Sequence[str], program: str, environment: Mapping[str, str]
) -> tuple[Parser, dict[str, Parser]]:
    typed = {word.partition("=")[0] for word in words}
    overview = ["Enroll machines and see which are alive."]
    for group, rows in GROUPS.items():
        overview += ["", f"{group}:", *(f"  {row.name:20} {row.summary}" for row in rows)]
    parser = Parser(
        typed,
        prog=program,
        usage="%(prog)s COMMAND ...",
        description="\n".join(overview),
        epilog="help COMMAND shows more, with an example. HOSTENROLL_<OPTION> in the\nenvironment "
        "sets --db, --key-file, --server, --api-key-file and the options\nof serve.\n\n"
        f"{EXIT_STATUSES}",
    )
    version = "the version, and the SHA-256 of this file"
    parser.add_argument("--version", action="store_true", help=version)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, help=argparse.SUPPRESS)
    parsers = {}
    for command in COMMANDS:
        parsers[command.name] = sub = commands.add_parser(
            command.name,
            typed=typed,
            prog=f"{program} {command.name}",
            usage=" ".join(["%(prog)s [options]", *command.operands]),
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=f"example: {program} {command.example}\n\n{EXIT_STATUSES}",
        )
        add_arguments(sub, command, typed, environment)
    return parser, parsers


def unknown_settings(environment: Mapping[str, str]) -> list[str]:
    """Complaints about environment variables that look like settings, but are none."""
    names = {name for name in environment if name.startswith(ENVIRONMENT_PREFIX)}
    unknown = sorted(names - {argument.setting for argument in SETTINGS})
    return [f"{sanitize(name)} in the environment sets nothing" for name in unknown]


def parse_arguments(
    words: Sequence[str], environment: Mapping[str, str], program: str = "hostenroll"
) -> argparse.Namespace:
    """The parsed words. Raises SystemExit after help, the version, or a line about a mistake."""
    words = [*words[1:2], "--help"] if words[:1] in (["help"], ("help",)) else words
    parser, parsers = make_parser(words, program, environment)
    if not words:
        inform(parser.format_help().rstrip("\n"))
        parser.exit(EXIT_USAGE)
    if words[0] == "--version":
        with open(__file__, "rb") as file:
            output(f"hostenroll {__version__}\nsha256 {sha256(file.read()).hex()}")
        parser.exit(0)
    if words[0].startswith("-") and words[0] not in ("-h", "--help", "--"):
        command_name = next((word for word in words if word in parsers), "COMMAND")
        first = sanitize(words[0].partition("=")[0])
        parser.error(f"options come after the command: {program} {command_name} {first}")
    if not words[0].startswith("-") and words[0] not in parsers:
        parser.error(f"there is no command {sanitize(words[0])}{suggestion(words[0], parsers)}")
    for word in words:
        if word.startswith("--") and word.endswith("=--"):  # argparse would make an empty list
            parser.error(f"{word[:-3]}: -- is not a value")
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        word = next((word for word in unknown if word.startswith("-")), unknown[0])
        kind = "option" if word.startswith("-") else "argument"
        command: Command = arguments.command
        if word.partition("=")[0] == "--server" and STORE_OPTIONS[0] in command.arguments:
            parsers[command.name].error(NEEDS_FILES.format(command.name))
        hint = suggestion(word, [argument.name for argument in command.arguments])
        parsers[command.name].error(f"{command.name} has no {kind} {sanitize(word)}{hint}")
    return arguments


def how_started(environment: Mapping[str, str]) -> str:
    """What to type in a shell to start this program again."""

    def shell_word(path: str) -> str:  # only the name, if a shell finds this file by the name
        name = os.path.basename(path)
        return name if shutil.which(name, path=environment.get("PATH")) == path else path

    script = sys.argv[0]
    if __name__ == "hostenroll":  # imported by the command that pip installs, or by a test
        return shlex.quote(shell_word(script)) if script.endswith("/hostenroll") else "hostenroll"
    module = ["-m", "hostenroll"] if __spec__ is not None else [script]
    return shlex.join([shell_word(sys.executable), *module])


def main(argv: Optional[Sequence[str]] = None, *, environment: Mapping[str, str] = os.environ,
         clock: Callable[[], float] = time.time) -> int:  # fmt: skip
    """Run one command, and return its exit status."""
    status = EXIT_FAILED
    try:
        status = run_command(sys.argv[1:] if argv is None else argv, environment, clock)
    except (Unrecoverable, MemoryError) as error:
        end_process(error)
    except OSError as error:
        complain(str(error))
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except OSError:
                discard(stream)
    return status


def end_process(error: BaseException) -> NoReturn:
    """Crash only: end the process after one line, with nothing closed. To close a database that was
    replaced would write to it; its files have all that was acknowledged, for the next start."""
    try:
        text = str(error)
        if isinstance(error, MemoryError):
            text = "out of memory: raise its limit, and start again"
        (log.error if server_log() else complain)(text)
        logging.shutdown()
    finally:  # even if there is no memory left for the line
        os._exit(EXIT_FAILED)


def run_command(argv: Sequence[str], environment: Mapping[str, str],
                clock: Callable[[], float]) -> int:  # fmt: skip
    """Run one command. A refusal or a failure is reported in one line. Returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # its encoding may lack letters of a host's name
            stream.reconfigure(errors="backslashreplace")
    program = how_started(environment)
    arguments = parse_arguments(argv, environment, program)
    command: Command = arguments.command
    if command.run is not serve:  # serve writes these warnings to its log
        inform(*(f"hostenroll: {warning}" for warning in unknown_settings(environment)))
    try:
        screen = screen_of(sys.stdout, environment)
        session = Session(arguments, command, clock, environment, program, screen)
        return command.run(session) or 0
    except StorageUnavailable as problem:
        complain(str(problem.__cause__ or problem.detail))
    except Problem as problem:
        fields = [f"{command.argument_of(field)}: {detail}" for field, detail in problem.errors]
        is_lost = isinstance(problem, NotFound) and hasattr(arguments, "id")
        hint = f" See: list-{command.name.partition('-')[2]}s" if is_lost else ""
        if isinstance(problem, ApiKeyInvalid):
            hint = f" The key is in {arguments.api_key_file}."
        complain(f"refused ({problem.code}): {'; '.join(fields) or problem.detail}{hint}")
        return EXIT_REFUSED if problem.status < 500 else EXIT_FAILED
    except UsageError as error:
        complain(f"{error} (see: {program} {command.name} --help)")
        return EXIT_USAGE
    except (OperatorError, StoreError) as error:
        complain(str(error))
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
