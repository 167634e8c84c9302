"""Other model servers with our model file: how to install, start and ask them."""

import subprocess
import venv
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.load import BenchmarkError, Cores, Server, free_port, serving

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Peer:
    """A model server.

    Attributes:
        name: its name.
        requirement: the package to install.
        command: the program in its environment, and its arguments; `{port}` is replaced.
        ready: the path that answers 200 once the server is ready.
        path: the path that takes images.
        open_inference: whether bodies follow the Open Inference Protocol; otherwise they are
            `{"pixels": rows}`.
        probabilities: finds the ten probabilities in an answer.
    """

    name: str
    requirement: str
    command: tuple[str, ...]
    ready: str
    path: str
    open_inference: bool
    probabilities: Callable[[Any], list[float]]

    def install(self, cache: Path) -> Path:
        """Make its virtual environment if there is none; return the folder of its programs.

        Raises:
            BenchmarkError: it cannot be installed here; the message has the end of pip's output.
        """
        packages = [self.requirement, *(f"{name}=={version(name)}" for name in SHARED)]
        environment = cache.resolve() / "-".join(packages).replace("==", "-")
        done = environment / "installed"
        if not done.exists():
            venv.create(environment, with_pip=True, clear=True)
            pip = (environment / "bin" / "python", "-m", "pip", "install", "--only-binary=:all:")
            run = subprocess.run([*pip, *packages], capture_output=True, text=True, check=False)
            if run.returncode != 0:
                reason = (run.stderr.strip() or "pip failed").splitlines()[-1]
                raise BenchmarkError(f"{self.requirement} cannot be installed here: {reason}")
            done.touch()
        return environment / "bin"

    def serving(
        self, programs: Path, model: Path, folder: Path, cores: Cores
    ) -> AbstractContextManager[Server]:
        """Return a context that runs the server.

        Args:
            programs: the result of `install`.
            model: the ONNX file.
            folder: the working directory.
            cores: the server runs on `cores.server`.
        """
        port = free_port()
        program, *arguments = (part.format(port=port) for part in self.command)
        environment = {
            "BENCH_MODEL": str(model),
            "PYTHONPATH": str(FOLDER),
            "BENTOML_HOME": str(folder),
            "BENTOML_DO_NOT_TRACK": "True",
            "MLSERVER_HTTP_PORT": str(port),
            "MLSERVER_GRPC_PORT": str(free_port()),
            "MLSERVER_METRICS_PORT": str(free_port()),
            "MLSERVER_HOST": "127.0.0.1",
            "MLSERVER_PARALLEL_WORKERS": "0",  # on one core, a second process only costs time
            "MLSERVER_DEBUG": "false",  # no access log
        }
        return serving(
            [str(programs / program), *arguments],
            cores=cores,
            port=port,
            ready=self.ready,
            environment=environment,
            folder=folder,
        )


SHARED = ("onnxruntime", "numpy")  # in our versions
PEERS = (
    Peer(
        "MLServer",
        "mlserver==1.7.1",
        ("mlserver", "start", str(FOLDER)),
        "/v2/models/bn-lenet/ready",
        "/v2/models/bn-lenet/infer",
        True,
        lambda answer: answer["outputs"][0]["data"],
    ),
    Peer(
        "LitServe",
        "litserve==0.2.19",
        ("python", str(FOLDER / "litserve_server.py"), "{port}"),
        "/health",
        "/predict",
        False,
        lambda answer: answer["probabilities"],
    ),
    Peer(
        "BentoML",
        "bentoml==1.4.39",
        ("bentoml", "serve", "bentoml_service:Classifier", "--host=127.0.0.1", "--port={port}"),
        "/readyz",
        "/predict",
        False,
        lambda answer: answer,
    ),
)
