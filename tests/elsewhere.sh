#!/usr/bin/env bash
# Runs the tests on other releases and processors, in containers, and says what it ran:
#   make test-elsewhere                 all of these
#   ./tests/elsewhere.sh debian13       `make test` on Debian 13, Python 3.13
#   ./tests/elsewhere.sh python314      `make test` with Python 3.14
#   ./tests/elsewhere.sh arm64          the contract tests, from here, against the service on arm64
# `make test` gets the last commit as a tarball, in a path with spaces; the user is not root and cannot write
# the home folder; the locale is C, the time zone is not a whole hour from others. Needs Docker; arm64 on
# another processor needs qemu-user-static and binfmt-support, and ten minutes. DEBIAN13, PYTHON314 and ARM64
# name other images (with python3, venv and apt-get); FASHION_MNIST_DIR is the data set's folder.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${FASHION_MNIST_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/bn-lenet/fashion-mnist}
[ -d "$data" ] || { echo "test-elsewhere needs the data set: make data, or set FASHION_MNIST_DIR" >&2; exit 1; }
scratch=$(mktemp -d)
results=$scratch/results
log=$scratch/log
trap 'rm -rf "$scratch"' EXIT

say='python3 -c "import platform as p; print(\"ran on Python\", p.python_version(), p.machine())"'

run() { # run NAME IMAGE COMMAND: in a container of this machine's kind
  echo "test-elsewhere: $1: $3 in $2"
  local status=0
  git archive HEAD |
    docker run --rm --interactive --init --cpu-shares 512 --env COMMAND="$say; $3" \
      --env TZ=Asia/Kathmandu --env LC_ALL=C --env FASHION_MNIST_DIR=/data --volume "$data:/data:ro" \
      --volume "bn-lenet-pip-$1:/pip" "$2" bash -euc '
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends curl make >/dev/null 2>&1
        mkdir "/tmp/a path"
        cd "/tmp/a path"
        tar -x
        chown -R 1234:1234 . /pip
        export HOME=/ PIP_CACHE_DIR=/pip
        exec setpriv --reuid 1234 --regid 1234 --clear-groups bash -euc "$COMMAND"
      ' 2>&1 | tee "$log" || status=$?
  report "$1" "$status" "$3"
}

# The packages are unpacked by this machine: under emulation pip takes an hour. ONNX Runtime for arm64 reads
# the caches of the processor from /sys, and crashes on those of an x86-64, so they are hidden.
arm64() { # arm64 IMAGE: the contract tests from here, against the service in a container
  local command="pytest tests/contract" hidden=() status=0 version
  echo "test-elsewhere: arm64: $command against $1"
  version=$(docker run --rm --platform linux/arm64 "$1" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  .venv/bin/python -m uv pip install --quiet --python-platform aarch64-unknown-linux-gnu --python-version "$version" \
    --target "$scratch/packages" --constraint constraints.txt '.[cpu]'
  mkdir "$scratch/source"
  git archive HEAD | tar -x -C "$scratch/source"
  if [ "$(uname -m)" = x86_64 ]; then
    for caches in /sys/devices/system/cpu/cpu[0-9]*/cache; do hidden+=(--tmpfs "$caches"); done
  fi
  container=$(docker run --detach --rm --init --platform linux/arm64 ${hidden[@]+"${hidden[@]}"} \
    --volume "$scratch/packages:/packages:ro" --volume "$scratch/source:/source:ro" --workdir /source --user 1234 \
    --env PYTHONPATH=/packages --env BNLENET_HOST=0.0.0.0 --publish 127.0.0.1::8000 "$1" python3 -m service)
  trap 'docker stop "$container" >/dev/null; rm -rf "$scratch"' EXIT
  local url
  url=http://$(docker port "$container" 8000)
  until curl --silent --fail --output /dev/null "$url/readyz"; do
    [ "$(docker inspect --format '{{.State.Running}}' "$container")" = true ] || { echo "the service ended" >&2; exit 1; }
    sleep 2
  done
  { docker exec "$container" bash -c "$say" &&
    BASE_URL=$url .venv/bin/python -m pytest --timeout 3000 tests/contract; } 2>&1 | tee "$log" || status=$?
  report arm64 "$status" "$command"
}

report() { # report NAME STATUS COMMAND
  echo "$1: exit status $2, $(grep '^ran on' "$log"), \`$3\`: $(grep -E '^=.* in [0-9.]+s' "$log" | tr -d =)" >>"$results"
}

[ $# -gt 0 ] || set -- debian13 python314 arm64
for name; do
  case $name in
    debian13) run "$name" "${DEBIAN13:-python:3.13-slim-trixie}" "make test" ;;
    python314) run "$name" "${PYTHON314:-python:3.14-slim-trixie}" "make test" ;;
    arm64) arm64 "${ARM64:-python:3.13-slim-trixie}" ;;
    *) echo "there is no $name, only debian13, python314 and arm64" >&2; exit 2 ;;
  esac
done
echo "test-elsewhere ran:"
cat "$results"
! grep -qv 'exit status 0,' "$results"
