#!/bin/sh
# A machine that is imaged again stays the same host: its id, name, labels and history stay.
set -e
# In the pipeline, where the database is: a token for the machine's host, into the image.
NAME=$(uname -n)
(umask 077 && python3 hostenroll.py reenroll-host "$NAME" --ttl 2h > enroll.token)

# At the machine's first boot, with the server's URL:
curl -fsS -o hostenroll-agent http://127.0.0.1:8080/agent.sh
sh hostenroll-agent --server http://127.0.0.1:8080 --token-file enroll.token --state /var/lib/new
