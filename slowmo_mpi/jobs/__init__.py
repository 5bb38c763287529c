"""Jobs for a scheduler: site profiles, scripts made from templates, submitting them, asking how they do.

Runs on a login node: nothing here imports torch, MPI or h5py.
"""
