"""Checkpoints: one HDF5 file written by all ranks together, complete or not there at all. FORMAT.md is the format."""
