"""The compilers of `scripts/check-shaders.py`, a module each, and what they share."""
