"""Classifies images of garments over HTTP, with the ONNX file that `training` exports."""
