"""The model file: what it promises, how it is opened and run."""
