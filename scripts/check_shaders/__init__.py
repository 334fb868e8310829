"""The compilers of `scripts/check-shaders.py`, one per module, and the code that they share."""
