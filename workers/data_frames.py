"""What keeps the Neo4j driver from loading NumPy, pandas and PyArrow."""

import sys


def leave_out_data_frames() -> None:
    """Hide the libraries of data frames from the imports that follow.

    The driver imports them where they are installed, as they are beside Ray. That makes a worker
    larger and its start slower, and nothing here reads results as data frames.
    """
    for name in ("numpy", "pandas", "pyarrow"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # documented: import fails
