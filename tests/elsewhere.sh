#!/usr/bin/env bash
# Runs the tests on other releases and processors, in containers, and says what it ran:
#   make test-elsewhere                 all of these
#   ./tests/elsewhere.sh debian13       `make test` on Debian 13, Python 3.13
#   ./tests/elsewhere.sh python314      `make test` with Python 3.14
#   ./tests/elsewhere.sh arm64          the tests of the service and of its contract on arm64
# The last commit is unpacked from a tarball, in a path with spaces; the user is not root and cannot write
# the home folder; the locale is C, the time zone is not a whole hour from others. Needs Docker; arm64 on
# another processor needs qemu-user-static and binfmt-support, and an hour or more. There the packages are
# unpacked by this machine, which is much faster; torch is left out. DEBIAN13, PYTHON314 and ARM64 name other
# images (with python3, venv and apt-get); FASHION_MNIST_DIR is the data set's folder.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${FASHION_MNIST_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/bn-lenet/fashion-mnist}
[ -d "$data" ] || { echo "test-elsewhere needs the data set: make data, or set FASHION_MNIST_DIR" >&2; exit 1; }
scratch=$(mktemp -d)
results=$scratch/results
log=$scratch/log
trap 'rm -rf "$scratch"' EXIT

# ONNX Runtime for arm64 reads the caches of the processor from /sys, and crashes on those of an x86-64.
hidden=()
for caches in /sys/devices/system/cpu/cpu[0-9]*/cache; do hidden+=(--tmpfs "$caches"); done

packages() { # packages IMAGE FOLDER: unpack the service's and the tests' packages for arm64
  local version
  version=$(docker run --rm --platform linux/arm64 "$1" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  .venv/bin/python -m uv pip install --quiet --python-platform aarch64-unknown-linux-gnu --python-version "$version" \
    --target "$2" --constraint constraints.txt '.[cpu,dev]' onnx
}

say='python3 -c "import platform as p; print(\"ran on Python\", p.python_version(), p.machine())"'

run() { # run NAME IMAGE PLATFORM COMMAND [OPTION OF DOCKER ...]
  echo "test-elsewhere: $1: $4 in $2"
  local status=0
  git archive HEAD |
    docker run --rm --interactive --init --platform "$3" --cpu-shares 512 --env COMMAND="$say; $4" \
      --env TZ=Asia/Kathmandu --env LC_ALL=C --env FASHION_MNIST_DIR=/data --volume "$data:/data:ro" \
      --volume "bn-lenet-pip-$1:/pip" "${@:5}" "$2" bash -euc '
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends curl make >/dev/null 2>&1
        mkdir "/tmp/a path"
        cd "/tmp/a path"
        tar -x
        chown -R 1234:1234 . /pip
        export HOME=/ PIP_CACHE_DIR=/pip
        exec setpriv --reuid 1234 --regid 1234 --clear-groups bash -euc "$COMMAND"
      ' 2>&1 | tee "$log" || status=$?
  echo "$1: exit status $status, $(grep '^ran on' "$log"), \`$4\`: $(grep -E '^=.* in [0-9.]+s' "$log" | tr -d =)" >>"$results"
}

[ $# -gt 0 ] || set -- debian13 python314 arm64
native=linux/$(docker version --format '{{.Server.Arch}}')
for name; do
  case $name in
    debian13) run "$name" "${DEBIAN13:-python:3.13-slim-trixie}" "$native" "make test" ;;
    python314) run "$name" "${PYTHON314:-python:3.14-slim-trixie}" "$native" "make test" ;;
    arm64)
      image=${ARM64:-python:3.13-slim-trixie}
      # Compiled once, not by each process: under emulation that takes a minute.
      options=(--volume "$scratch/packages:/packages:ro" --env PYTHONPATH=/packages)
      options+=(--env PYTHONPYCACHEPREFIX=/tmp/compiled)
      [ "$native" = linux/arm64 ] || options+=("${hidden[@]}")
      packages "$image" "$scratch/packages"
      run "$name" "$image" linux/arm64 \
        "python3 -m pytest -n 2 --dist loadfile --timeout 3000 tests/service tests/contract" "${options[@]}"
      ;;
    *) echo "there is no $name, only debian13, python314 and arm64" >&2; exit 2 ;;
  esac
done
echo "test-elsewhere ran:"
cat "$results"
! grep -qv 'exit status 0,' "$results"
