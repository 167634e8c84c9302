"""Writing a file whole or not at all, whatever happens meanwhile."""

import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its place and then move it there: nobody ever meets half of it.

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
