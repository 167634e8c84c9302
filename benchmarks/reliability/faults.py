"""Faults of a running service: killed and stopped processes, changed files, full disks, no memory.

A function makes a fault and returns its rows. A fault that is impossible here is reported as not
measured, with the reason.
"""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import onnx
import psutil

from benchmarks.load import BenchmarkError
from benchmarks.reliability.report import Options, Row
from benchmarks.reliability.service import ROOT, Service, environment, serving
from benchmarks.reliability.traffic import Load, form, good, post
from benchmarks.serving import png
from tests.service.model.mutations import COMMITTED, sealed, set_entry
from tests.service.pictures.drawings import encode, shaded, worn

IN_FLIGHT = "only those in flight"
TRAINING = (sys.executable, "-m", "benchmarks.reliability.small_training")
FIT = ("fit", "--epochs", "1", "--device", "cpu", "--threads", "1", "--quiet", "--out")
LIMITED = """
import os, resource, sys
limit = getattr(resource, sys.argv[1]), int(sys.argv[2])
resource.setrlimit(limit[0], (limit[1], limit[1]))
os.execvp(sys.argv[3], sys.argv[3:])
"""
NO_TEMPORARY_FOLDER = "import tempfile\ntempfile.tempdir = '/nonexistent'\n"
DESCRIPTORS = 64
CONNECTIONS = 200
SMALL_DISK_BYTES = 65_536  # less than a checkpoint, more than a configuration
SPARE_MEMORY = 2**26
FAKETIME = "/usr/lib/*/faketime/libfaketimeMT.so.1"


def run(options: Options) -> list[Row]:
    """Make all faults; if one cannot be judged, the others still run."""
    rows = []
    for fault in QUICK if options.quick else FAULTS:
        try:
            rows += fault()
        except (BenchmarkError, OSError, psutil.Error, subprocess.SubprocessError) as exc:
            name = fault.__name__.replace("_", " ")
            rows.append(Row.holds(name, f"failed: {exc}", "no error", met=False))
    return rows


# Processes


def a_worker_is_killed() -> list[Row]:
    """Kill one of two workers under load."""
    with serving() as service, Load(service.port, good()["784 bytes"]) as load:
        load.wait_for(200)
        victim = service.workers()[0]
        victim.kill()
        seconds = service.wait_until_ready()
        load.wait_for(200)
    return [
        _lost("kill -9 of a worker", load, load.clients),
        Row.at_most("kill -9 of a worker: seconds until it is replaced", seconds, 10),
    ]


def the_supervisor_is_killed() -> list[Row]:
    """Kill the supervisor: its workers must not outlive it, and the port must be free again."""
    with serving() as service:
        workers = service.workers()
        service.process.kill()
        service.process.wait()
        gone, alive = psutil.wait_procs(workers, timeout=20)
        free = _can_bind(service.port)
    return [
        Row.at_most("kill -9 of the supervisor: workers that outlive it", len(alive), 0),
        Row.holds(
            "kill -9 of the supervisor: its port afterwards",
            "free" if free else "taken",
            "free",
            met=free and len(gone) == len(workers),
        ),
    ]


def a_worker_is_stopped() -> list[Row]:
    """Stop one of two workers for five seconds: the other must answer meanwhile."""
    with serving() as service, Load(service.port, good()["784 bytes"]) as load:
        load.wait_for(200)
        victim = service.workers()[0]
        victim.suspend()
        begin = time.monotonic()
        time.sleep(5)
        meanwhile = sum(o.began > begin and o.status == 200 for o in load.outcomes)
        with suppress(psutil.NoSuchProcess):  # the supervisor may have replaced it
            victim.resume()
        service.wait_until_ready()
        load.wait_for(200)
    return [
        _lost("SIGSTOP of a worker for 5 s", load, load.clients),
        Row.at_least(
            "SIGSTOP of a worker for 5 s: answers of the other worker meanwhile", meanwhile, 1
        ),
    ]


def the_service_is_stopped() -> list[Row]:
    """Send SIGTERM under load, while clients open a connection for every request."""
    request = good()["784 bytes"].replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
    return _stopped_by(signal.SIGTERM, request)


def _stopped_by(number: signal.Signals, request: bytes) -> list[Row]:
    with serving(drain_seconds=1) as service, Load(service.port, request) as load:
        load.wait_for(200)
        service.process.send_signal(number)
        status = service.process.wait(30)
    return [
        Row.at_most(f"{number.name} under load: failed requests", len(load.failed()), 0),
        Row.at_most(f"{number.name} under load: exit status", status, 0),
    ]


# The model file


def the_model_file_changes() -> list[Row]:
    """Replace, truncate and remove the file of a running service; then kill a worker."""
    content = COMMITTED.read_bytes()
    damages: dict[str, Callable[[Path], object]] = {
        "replaced": lambda path: _replace(path, another_model()),
        "cut short": lambda path: os.truncate(path, 1000),
        "unreadable": _make_unreadable,
    }
    rows = []
    for name, damage in damages.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(content)
            with (
                serving(model_path=path) as service,
                Load(service.port, good()["784 bytes"]) as load,
            ):
                load.wait_for(100)
                damage(path)
                service.workers()[0].kill()
                service.wait_until_ready()
                load.wait_for(100)
            what = f"model file {name} while it runs"
            rows.append(Row.at_most(f"{what}: different answers", len(load.bodies), 1))
            rows.append(_start_again(what, path, starts=name == "replaced"))
    return rows


def another_model() -> bytes:
    """Return a valid model file with another version."""
    model = onnx.load(COMMITTED)
    set_entry(model, "version", "2")
    data: bytes = model.SerializeToString(deterministic=True)
    return sealed(data)


def _replace(path: Path, content: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.replace(path)


def _make_unreadable(path: Path) -> None:
    """Put a folder in its place: root can read a file with any mode."""
    path.unlink()
    path.mkdir()


def _start_again(what: str, path: Path, starts: bool) -> Row:
    """Start with the present file: the service serves the new one, or fails with one sentence."""
    if starts:
        with serving(workers=1, model_path=path) as service:
            found = '"version":"2"' in service.get("/readyz").replace(" ", "")
        return Row.holds(
            f"{what}: after a restart", "the new" if found else "the old", "the new", met=found
        )
    done = subprocess.run(
        [sys.executable, "-m", "service"],
        cwd=ROOT,
        env=environment(port=0, model_path=path),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return _one_sentence(f"{what}: a restart", done)


def the_service_gets_sighup() -> list[Row]:
    """Send SIGHUP under load: the service drains and exits, so that it can be started again."""
    return _stopped_by(signal.SIGHUP, good()["784 bytes"])


# Disks


def the_disk_is_full() -> list[Row]:
    """Serve, fit and export on a full disk."""
    rows = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        disk, wrapper = stack.enter_context(_small_disk(folder / "disk"))
        how = f"disk full ({'a small tmpfs' if not wrapper else 'RLIMIT_FSIZE'})"
        run_folder, file = folder / "run", folder / "disk" / "model" / "bn_lenet.onnx"
        file.parent.mkdir()
        file.write_bytes(b"the old file")
        _fill(disk, spare=0 if wrapper else SMALL_DISK_BYTES)
        done = _train(*wrapper, *TRAINING, *FIT, str(disk / "run"))
        rows.append(_one_sentence(f"{how}: a fit", done))
        shutil.rmtree(disk / "run", ignore_errors=True)
        whole = _train(*TRAINING, *FIT, str(run_folder))
        if whole.returncode:
            raise BenchmarkError(f"a fit failed: {whole.stderr}")
        export = (*TRAINING, "export", str(run_folder), "--out", str(file))
        done = _train(*wrapper, *export)
        rows.append(_one_sentence(f"{how}: an export", done))
        intact = file.read_bytes() == b"the old file"
        rows.append(
            Row.holds(f"{how}: the old file", "intact" if intact else "lost", "intact", met=intact)
        )
        _fill(disk, spare=0)
        log = disk / "log"
        log.touch()
        with serving(extra={"TMPDIR": str(disk)}, log=log, wrapper=wrapper) as service:
            rows.append(_all_forms(f"{how}: forms of body answered", service))
    return rows


def there_is_no_temporary_folder() -> list[Row]:
    """Serve, fit and export without any folder for temporary files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sitecustomize.py").write_text(NO_TEMPORARY_FOLDER)
        extra = {"PYTHONPATH": name}
        with serving(extra=extra) as service:
            rows = [_all_forms("no /tmp: forms of body answered", service)]
        run_folder = str(folder / "run")
        for what, command in (
            ("a fit", (*FIT, run_folder)),
            ("an export", ("export", run_folder, "--out", f"{run_folder}/bn_lenet.onnx")),
        ):
            done = _train(*TRAINING, *command, extra=extra)
            rows.append(Row.at_most(f"no /tmp: exit status of {what}", done.returncode, 0))
    return rows


@contextmanager
def _small_disk(folder: Path) -> Iterator[tuple[Path, Sequence[str]]]:
    """Mount a small disk; if this is not allowed, limit the size of files instead.

    Yields:
        the folder, and the beginning of a command line with the limit; empty if it is mounted.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = sys.platform == "linux" and os.geteuid() == 0 and _succeeds(mount)
    try:
        yield folder, () if mounted else limited("RLIMIT_FSIZE", SMALL_DISK_BYTES)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)  # noqa: S607 - found on the path


def _succeeds(command: Sequence[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _fill(disk: Path, spare: int) -> None:
    """Fill a mounted disk except `spare` bytes; if it is not mounted, do nothing."""
    if not os.path.ismount(disk):
        return
    state = os.statvfs(disk)
    size = state.f_bavail * state.f_frsize - spare
    if size > 0:
        with (disk / f"full-{spare}").open("wb") as file:
            file.write(bytes(size))


# Limits of a process


def descriptors_run_out() -> list[Row]:
    """Open more connections than the service has descriptors."""
    with serving(workers=1, wrapper=limited("RLIMIT_NOFILE", DESCRIPTORS)) as service:
        held = []
        for _ in range(CONNECTIONS):
            connection = socket.create_connection(("127.0.0.1", service.port), timeout=5)
            connection.sendall(good()["784 bytes"])
            held.append(connection)
        time.sleep(1)
        process = psutil.Process(service.process.pid)
        busy = process.cpu_percent(1.0)
        for connection in held:
            connection.close()
        deadline = time.monotonic() + 10
        while not (answers := bool(service.get("/readyz"))) and time.monotonic() < deadline:
            time.sleep(0.1)
        what = f"{CONNECTIONS} connections, {DESCRIPTORS} descriptors"
        return [
            Row.at_most(f"{what}: processor time meanwhile", busy, 50, " %"),
            Row.holds(
                f"{what}: afterwards", "answers" if answers else "silent", "answers", met=answers
            ),
            Row.at_most(f"{what}: tracebacks in the log", service.tracebacks(), 0),
        ]


def memory_runs_out() -> list[Row]:
    """Send large pictures to a service with too little memory for them."""
    what = "memory limit (RLIMIT_AS), pictures of 12 megapixels"
    if not hasattr(psutil.Process, "rlimit"):
        return [Row.not_measured(what, "only Linux can limit a running process")]
    request = post("/predict", {"Content-Type": "image/webp"}, _large_picture())
    rows = []
    for when in ("cold", "warm"):
        with serving(workers=1) as service:
            process = psutil.Process(service.process.pid)
            with Load(service.port, good()["JPEG photograph"], clients=1) as load:
                load.wait_for(1 if when == "warm" else 0)
            most = process.memory_info().vms + SPARE_MEMORY
            process.rlimit(resource.RLIMIT_AS, (most, most))
            with Load(service.port, request, clients=4) as load:
                time.sleep(3)
            statuses = {o.status for o in load.outcomes}
            found = ", ".join(map(str, sorted(statuses)))
            fine = bool(statuses) and statuses <= {200, 503}
            row = Row.holds(f"{what}, {when}: answers", found, "200 or 503", met=fine)
            rows.append(row)
            ready = bool(service.get("/readyz"))
            rows.append(
                Row.holds(
                    f"{what}, {when}: afterwards", "ready" if ready else "dead", "ready", met=ready
                )
            )
    return rows


def _large_picture() -> bytes:
    return encode(worn(shaded()).resize((3400, 3400)), "WEBP", quality=20)


def the_clock_jumps() -> list[Row]:
    """Set the service's clock forward by an hour and back, with libfaketime."""
    what = "the clock jumps by an hour, and back"
    found = [*Path("/").glob(FAKETIME[1:])]
    if not found:
        return [Row.not_measured(what, "libfaketime is not there (apt-get install libfaketime)")]
    with tempfile.TemporaryDirectory() as folder:
        offset = Path(folder) / "offset"
        offset.write_text("+0")
        extra = {
            "LD_PRELOAD": str(found[0]),
            "FAKETIME_TIMESTAMP_FILE": str(offset),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        with (
            serving(extra=extra) as service,
            Load(service.port, good()["784 bytes"]) as load,
        ):
            before = {one.pid for one in service.workers()}
            for jump in (3600, -3600, 0):
                load.wait_for(100)
                offset.write_text(f"{jump:+d}")
                time.sleep(2)
                found_jump = _clock(service) - time.time()
                if abs(found_jump - jump) > 60:
                    raise BenchmarkError(f"the clock jumped by {found_jump:.0f} s, not by {jump}")
            load.wait_for(100)
            replaced = len(before - {one.pid for one in service.workers()})
    return [
        Row.at_most(f"{what}: failed requests", len(load.failed()), 0),
        Row.at_most(f"{what}: workers replaced", replaced, 0),
    ]


def _clock(service: Service) -> float:
    """Return the service's time of its last inference: seconds since 1970."""
    (statistics,) = json.loads(service.get("/v2/models/stats"))["model_stats"]
    return float(statistics["last_inference"] / 1000)


# Shared by the faults


def limited(name: str, limit: int) -> tuple[str, ...]:
    """Return the beginning of a command line that runs the rest with a limit of `resource`."""
    return (sys.executable, "-c", LIMITED, name, str(limit))


def _lost(what: str, load: Load, most: int) -> Row:
    """Return the row of failed requests: at most `most` of them."""
    failed = load.failed()
    figure = f"{len(failed)} of {len(load.outcomes):,}"
    return Row.holds(f"{what}: failed requests", figure, IN_FLIGHT, met=len(failed) <= most)


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _train(*command: str, extra: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, [(extra or {}).get("PYTHONPATH", ""), str(ROOT)]))
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | (extra or {}) | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _one_sentence(what: str, done: subprocess.CompletedProcess[str]) -> Row:
    """Return the row of a command that must fail with one sentence and no traceback."""
    lines = done.stderr.strip().splitlines()
    fine = done.returncode > 0 and len(lines) == 1 and lines[0].endswith(".")
    figure = f"status {done.returncode}, {lines[-1][:100] if lines else 'no message'}"
    return Row.holds(what, "one sentence" if fine else figure, "one sentence", met=fine)


def _all_forms(what: str, service: Service) -> Row:
    """Return the row of a service that must answer every form of body, and a large upload."""
    noise = os.urandom(2_000_000)
    requests = [*good().values(), form(png_of(noise))]
    well = 0
    for request in requests:
        with Load(service.port, request, clients=1) as load:
            load.wait_for(1)
        well += not load.failed() and bool(load.outcomes)
    return Row.at_least(what, well, len(requests))


def png_of(noise: bytes) -> bytes:
    """Return a PNG file of two megabytes, more than most libraries keep in memory."""
    return png(np.frombuffer(noise, np.uint8).reshape(1000, 2000))


FAULTS: tuple[Callable[[], list[Row]], ...] = (
    a_worker_is_killed,
    the_supervisor_is_killed,
    a_worker_is_stopped,
    the_service_is_stopped,
    the_model_file_changes,
    the_service_gets_sighup,
    the_disk_is_full,
    there_is_no_temporary_folder,
    descriptors_run_out,
    memory_runs_out,
    the_clock_jumps,
)
QUICK = (a_worker_is_killed, the_supervisor_is_killed, the_service_is_stopped, descriptors_run_out)
