#!/usr/bin/env bash
# Train on a Cloud TPU VM: scripts/launch/tpu_pod.sh NAME ZONE --config configs/x.yaml [a.b=c ...]; remote.py says how.
exec "${PYTHON:-python}" "$(dirname "$0")/remote.py" tpu "$@"
