"""The parts of scripts/test-docs.py."""
