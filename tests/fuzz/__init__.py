"""Fuzzers of everything that takes bytes or texts from outside: see `run.py`."""
