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
