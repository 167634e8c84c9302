"""From the bytes of a picture to 28x28 pixels."""
