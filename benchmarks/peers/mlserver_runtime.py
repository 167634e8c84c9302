"""MLServer's custom runtime around our file, as its documentation writes one."""

# mypy: ignore-errors
# (runs in MLServer's own environment)

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from session import load


class Runtime(MLModel):
    """Open Inference Protocol in, the model, Open Inference Protocol out."""

    async def load(self) -> bool:
        """Open the session."""
        self.session = load()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Classify one request's images."""
        pixels = NumpyCodec.decode_input(payload.inputs[0])
        (probabilities,) = self.session.run(None, {"pixels": pixels})
        output = NumpyCodec.encode_output("probabilities", probabilities)
        return InferenceResponse(model_name=self.name, outputs=[output])
