#!/usr/bin/env bash
# Builds the image with the classic builder, starts it with compose, and checks the container: user,
# file system, contents, size and stop. Runs the contract tests against it.
#   make test-docker          needs Docker with compose, and a free port (PORT, 8000 by default)
# BASE_IMAGE and RUNTIME go to the build; the image may add MAX_MEGABYTES to its base.
set -euo pipefail
cd "$(dirname "$0")/.."
export COMPOSE_PROJECT_NAME=bn-lenet-test PORT=${PORT:-8000} DOCKER_BUILDKIT=0
export BNLENET_LOG_LEVEL=warning # so that the log of a failure is short
export BASE_IMAGE=${BASE_IMAGE:-python:3.11-slim-bookworm}
MAX_MEGABYTES=${MAX_MEGABYTES:-250}

if docker compose version >/dev/null 2>&1; then compose=(docker compose); else compose=(docker-compose); fi
fail() { echo "test-docker: $*" >&2; exit 1; }
inside() { docker exec "$container" "$@"; }
megabytes() { echo $(($(docker image inspect --format '{{.Size}}' "$1") / 1000000)); }

"${compose[@]}" build
trap '"${compose[@]}" logs --tail 50; "${compose[@]}" down --volumes' EXIT
"${compose[@]}" up --detach
container=$("${compose[@]}" ps --quiet bn-lenet)

started=$SECONDS
until [ "$(docker inspect --format '{{.State.Health.Status}}' "$container")" = healthy ]; do
  [ $((SECONDS - started)) -lt 60 ] || fail "not healthy after a minute"
  sleep 0.2
done
echo "healthy after $((SECONDS - started)) s"

[ "$(inside id -u)" != 0 ] || fail "runs as root"
! inside touch /app/x 2>/dev/null || fail "the file system can be written"
inside touch /tmp/x || fail "/tmp cannot be written"
inside grep -q '^CapEff:\s*0*$' /proc/1/status || fail "has capabilities"
inside grep -q '^NoNewPrivs:\s*1$' /proc/1/status || fail "may gain privileges"
inside python -c '
import importlib.util, sys
sys.exit(any(map(importlib.util.find_spec, ("torch", "onnx", "training", "pip"))))
' || fail "contains torch, onnx, training or pip"
[ "$(inside printenv BNLENET_LOG_FORMAT)" = json ] || fail "compose unsets the image's log format"
inside python -c '
import pathlib, socket
ours = ["::1"] if pathlib.Path("/proc/net/if_inet6").read_text().strip() else []
for address in ("127.0.0.1", *ours):
    socket.create_connection((address, 8000), timeout=5).close()
' || fail "does not listen on both IP families"

# A model file of the host, as docs/operations.md mounts it, without a published port.
folder=$(mktemp -d)
chmod 755 "$folder"
cp models/bn_lenet.onnx "$folder/another.onnx"
other=$("${compose[@]}" run --detach --volume "$folder:/model:ro" -e BNLENET_MODEL_PATH=/model/another.onnx bn-lenet)
until docker exec "$other" python -c 'import urllib.request as u; u.urlopen("http://127.0.0.1:8000/readyz")' 2>/dev/null; do
  [ "$(docker inspect --format '{{.State.Running}}' "$other")" = true ] || fail "does not serve a file of the host"
  sleep 0.2
done
docker exec "$other" grep -qz BNLENET_MODEL_PATH=/model/another.onnx /proc/1/environ || fail "serves another file"
docker rm --force "$other" >/dev/null
rm -r "$folder"

added=$(($(megabytes bn-lenet) - $(megabytes "$BASE_IMAGE")))
echo "the image adds $added MB to its base"
[ "$added" -le "$MAX_MEGABYTES" ] || fail "the image adds more than $MAX_MEGABYTES MB"

BASE_URL="http://127.0.0.1:$PORT" .venv/bin/python -m pytest tests/contract

docker stop --time 30 "$container" >/dev/null # SIGTERM; exit status 137 would mean that it was killed
status=$(docker inspect --format '{{.State.ExitCode}}' "$container")
[ "$status" = 0 ] || fail "stopped with $status"
trap '"${compose[@]}" down --volumes' EXIT
echo "test-docker: passed"
