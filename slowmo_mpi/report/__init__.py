"""Reports on run folders: read them, compare them, show them.

    runs.py      a run folder -> Run: settings, state, records; damaged lines are counted, not fatal
    compare.py   runs -> Comparison: rows by setting, mean and spread over seeds, time to a target
    table.py     Comparison -> text, or plain data for JSON
    figures.py   Comparison -> PNG files and SVG text (the only matplotlib here)
    page.py      Comparison and figures -> one HTML page
    follow.py    a run that still goes on, on a terminal
    export.py    CSV, TensorBoard

Nothing here imports torch, MPI or h5py: reports are read on login nodes.
"""
