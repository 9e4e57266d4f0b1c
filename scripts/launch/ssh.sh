#!/usr/bin/env bash
# Train on the hosts of HOSTFILE: scripts/launch/ssh.sh HOSTFILE --config configs/x.yaml [a.b=c ...]; remote.py says how.
exec "${PYTHON:-python}" "$(dirname "$0")/remote.py" ssh "$@"
