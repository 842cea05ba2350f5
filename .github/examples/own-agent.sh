#!/bin/sh
# An agent of your own is two requests. Secrets go through pipes, because ps shows arguments.
set -e
TOKEN=$(python3 hostenroll.py mint-token)
CREDENTIAL=$(
  printf '{"token":"%s","hostname":"%s"}' "$TOKEN" "$(uname -n)" |
    curl -sS http://127.0.0.1:8080/api/agent/enroll -d @- |
    sed -n 's/.*"credential":"\([^"]*\)".*/\1/p'
)
printf 'header = "Authorization: Bearer %s"\n' "$CREDENTIAL" |
  curl -sS -X POST -K - http://127.0.0.1:8080/api/agent/heartbeat
echo

# A script that asks has an API key.
KEY=$(python3 hostenroll.py mint-api-key --role viewer)
printf 'header = "Authorization: Bearer %s"\n' "$KEY" |
  curl -sS -K - "http://127.0.0.1:8080/api/hosts?status=online"
