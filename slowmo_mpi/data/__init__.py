"""Data in the formats it comes in: reading, packing, and working ahead of the training. No torch, no MPI on import."""

NOT_COUNTED = -100  # the label of a sample that is to be passed over; the default ignore_index of torch's losses
