"""The model: its file is checked, loaded and run."""
