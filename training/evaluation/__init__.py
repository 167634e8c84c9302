"""Accuracy, calibration, robustness, pictures and the model card."""
