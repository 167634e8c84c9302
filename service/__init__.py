"""Classifies images of garments over HTTP, with the ONNX file that `training` exports."""

import os

__version__ = "0.1.0"

# ONNX Runtime reports to its makers from the moment it is imported, unless told not to before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
