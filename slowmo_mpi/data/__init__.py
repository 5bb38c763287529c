"""Data in the formats it comes in: reading, packing, and working ahead of the training. No torch, no MPI on import."""
