"""A BentoML service with our model file."""

# mypy: ignore-errors
# (runs in BentoML's own environment)

import bentoml
import numpy as np
from session import load


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class Classifier:
    """JSON pixels in, the model, JSON probabilities out."""

    def __init__(self) -> None:
        self.session = load()

    @bentoml.api
    def predict(self, pixels: list[list[int]]) -> list[float]:
        """Classify one image."""
        image = np.array(pixels, dtype=np.uint8).reshape(1, 1, 28, 28)
        return self.session.run(None, {"pixels": image})[0][0].tolist()
