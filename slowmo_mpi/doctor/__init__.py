"""slowmo doctor: is this machine ready? Every check is proved by doing it, on the ranks that really joined.

reach.py      before anything else, with plain MPI messages: does every pair of hosts reach each other
hosts.py      versions, clocks and limits of every host
ranks.py      where the ranks are: hosts, cores, GPUs
messages.py   sums of every type; how CUDA tensors travel
links.py      latency and bandwidth of each host's link; slow ones are named
storage.py    scratch space, the shared folder, and parallel HDF5 by a collective write
checks.py     what a check is, and how the ranks run one together
wire.py       MPI messages of bytes with an end to every wait
"""
