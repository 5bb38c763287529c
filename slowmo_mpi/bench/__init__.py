"""Benchmarks of what a machine's ranks do with each other: `slowmo bench`. One module per command.

Each has `measure(bench, ...)`, called on all ranks together, which returns a `Report`.
"""
