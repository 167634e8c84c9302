"""Training's command line on a data set so small that a fit takes seconds.

`python -m benchmarks.reliability.small_training fit --out FOLDER` is
`python -m training fit --out FOLDER` on images from a formula.
"""

import hashlib
import sys
from unittest.mock import patch

import numpy as np

import training.__main__ as command_line
from training.dataset import FashionMNIST, Split


def small() -> FashionMNIST:
    """Return 400 training and 200 test images: stripes, as wide as the class says, and noise."""
    random = np.random.default_rng(0)

    def split(count: int) -> Split:
        labels = (np.arange(count) % 10).astype(np.uint8)
        stripes = (np.arange(28) // (labels[:, None] + 1) % 2 * 200)[:, None, :]
        noise = random.integers(0, 56, (count, 28, 28))
        return Split((stripes + noise).astype(np.uint8), labels)

    return FashionMNIST(split(400), split(200), hashlib.sha256(b"stripes").hexdigest())


if __name__ == "__main__":
    with patch.object(command_line, "load", lambda *_: small()):
        sys.exit(command_line.main(prog_name="python -m training"))
