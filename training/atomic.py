"""Writing a file whole or not at all."""

import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write a temporary file and rename it: a reader never sees half of it.

    Raises:
        OSError: it cannot be written; the error names `path`, whose old file, if any, is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:  # of a full disk it would not say where
        raise OSError(error.errno, error.strerror, str(path)) from error
