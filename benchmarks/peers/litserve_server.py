"""A LitServe server with our model file: `python litserve_server.py PORT`."""

# mypy: ignore-errors
# (runs in LitServe's own environment)

import sys

import litserve
import numpy as np
from session import load


class Api(litserve.LitAPI):
    """JSON pixels in, the model, JSON probabilities out."""

    def setup(self, device: str) -> None:  # noqa: ARG002 - LitServe's signature
        """Open the session."""
        self.session = load()

    def decode_request(self, request: dict) -> np.ndarray:
        """Take the pixels out of the body."""
        return np.array(request["pixels"], dtype=np.uint8).reshape(1, 1, 28, 28)

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        """Run the model."""
        return self.session.run(None, {"pixels": pixels})[0]

    def encode_response(self, probabilities: np.ndarray) -> dict:
        """Answer with the probabilities."""
        return {"probabilities": probabilities[0].tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Api(), accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )
