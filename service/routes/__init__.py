"""What clients can call: prediction, the Open Inference Protocol, operations, the page."""
