"""The fleet's processes: `python -m workers NAME` runs one of them."""
