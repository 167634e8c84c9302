"""Turns a picture's file into the 28x28 pixels that the model takes."""
