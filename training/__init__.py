"""Fits BN-LeNet on Fashion-MNIST, folds its batch norm away, and exports one ONNX file."""

import os

# ONNX Runtime reports to its makers from the moment it is imported, unless told not to before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
