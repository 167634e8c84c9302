"""The answer of `POST /predict`: its schema, and its fast renderer."""

from typing import Annotated, Literal, Self

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from service.model.artefact import ModelInfo
from service.pictures.conversion import ModelInput

Probability = Annotated[float, Field(ge=0, le=1)]
ClassId = Annotated[int, Field(ge=0, le=9, description="The class's number in the data set.")]


class ClassProbability(BaseModel):
    """A class and its probability."""

    class_id: ClassId
    label: str
    probability: Probability


class Model(BaseModel):
    """The model that answered."""

    name: str
    version: str
    revision: Annotated[str, Field(description="The first digits of the model file's SHA-256.")]


class Prediction(BaseModel):
    """The most probable class, and the list of the `top_k` most probable classes."""

    class_id: ClassId
    label: str
    confidence: Probability
    predictions: Annotated[
        list[ClassProbability],
        Field(min_length=1, max_length=10, description="Most probable first."),
    ]
    preprocessing: Annotated[
        Literal["none", "dataset"],
        Field(
            description="`none`: the model saw the pixels as sent. `dataset`: the picture was"
            " converted as the data set was made."
        ),
    ]
    model: Model
    notes: Annotated[
        list[str] | None,
        Field(
            description="What the conversion guessed or left out. If a note begins with"
            ' "Not sure", do not rely on the answer.'
        ),
    ] = None
    pixels: Annotated[
        list[list[int]] | None,
        Field(description="The pixels that the model saw; only with `echo=pixels`."),
    ] = None

    @classmethod
    def of(
        cls, model: ModelInfo, probabilities: NDArray[np.float32], image: ModelInput, top_k: int
    ) -> Self:
        """Return the answer as a record, without pixels; `Renderer` writes the same as JSON.

        Args:
            model: the model that ran.
            probabilities: float32 [n, 10], of `image.images`.
            image: what the model saw.
            top_k: how many classes to list.
        """
        values: list[float] = probabilities[0].tolist()
        classes = [
            ClassProbability(class_id=i, label=label, probability=value)
            for i, (label, value) in enumerate(zip(model.classes, values, strict=True))
        ]
        # Sorting is stable: of equally probable classes, the lower id comes first.
        classes.sort(key=lambda one: one.probability, reverse=True)
        return cls(
            class_id=classes[0].class_id,
            label=classes[0].label,
            confidence=classes[0].probability,
            predictions=classes[:top_k],
            preprocessing=image.preprocessing,
            model=Model(name=model.name, version=model.version, revision=model.revision),
            notes=[*image.notes_for(probabilities)] or None,
        )


class Renderer:
    """Writes answers as JSON. Everything but the numbers is prepared once, as bytes.

    Args:
        model: the model that answers.
    """

    def __init__(self, model: ModelInfo) -> None:
        classes = [(i, orjson.dumps(name)) for i, name in enumerate(model.classes)]
        self._first = [b'{"class_id":%d,"label":%b,"confidence":' % c for c in classes]
        self._listed = [b'{"class_id":%d,"label":%b,"probability":' % c for c in classes]
        self._ids = range(len(classes))
        served_by = {"name": model.name, "version": model.version, "revision": model.revision}
        self._end = b'","model":%b' % orjson.dumps(served_by)

    def __call__(
        self, probabilities: NDArray[np.float32], image: ModelInput, top_k: int, echo: bool
    ) -> bytes:
        """Return the answer as JSON.

        Args:
            probabilities: float32 [n, 10], of `image.images`.
            image: what the model saw.
            top_k: how many classes to list.
            echo: whether to return the pixels too.
        """
        # Python floats: JSON then carries the exact float32 values.
        values: list[float] = probabilities[0].tolist()
        # Sorting is stable: of equally probable classes, the lower id comes first.
        order = sorted(self._ids, key=values.__getitem__, reverse=True)[:top_k]
        numbers = orjson.dumps(values)[1:-1].split(b",")
        listed = b"},".join([self._listed[i] + numbers[i] for i in order])
        first = order[0]
        preprocessing = image.preprocessing.encode()
        parts = (self._first[first], numbers[first], listed, preprocessing, self._end)
        answer = b'%b%b,"predictions":[%b}],"preprocessing":"%b%b' % parts
        if notes := image.notes_for(probabilities):
            answer += b',"notes":' + orjson.dumps(notes)
        if echo:
            answer += b',"pixels":' + orjson.dumps(image.pixels.reshape(28, 28).tolist())
        return answer + b"}"
