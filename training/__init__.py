"""Fits BN-LeNet on Fashion-MNIST, folds its batch norm away, and exports one ONNX file."""

import os

# ONNX Runtime sends telemetry from its import on; this variable must be set before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
