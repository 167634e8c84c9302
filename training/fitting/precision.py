"""Computes products of float32 numbers in float32; by default a GPU may use TF32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch TF32 off within the block, or within the function that it decorates.

    TF32 has 10 of the 23 bits of a float32's mantissa. By default, torch uses it for convolutions
    on a GPU. This network's time is mostly kernel launches, so TF32 would save no time.
    """
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined] # torch forgot
    backends = torch.backends.cuda.matmul, convolutions
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
