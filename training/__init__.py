"""Fits BN-LeNet on Fashion-MNIST, folds its batch norm away, and exports one ONNX file."""
