"""Mixed traffic for as long as one likes, with processes that die meanwhile: see `run.py`."""
