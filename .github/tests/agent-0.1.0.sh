#!/bin/sh
# hostenroll-agent: enrolls this machine at a hostenroll server, once, and from then on says that
# it lives. Needs a POSIX shell with its usual tools, and curl from 7.58 on.
#
# Functions, and one call in the last line: of a download that was cut short, nothing runs.

VERSION=0.1.0
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
