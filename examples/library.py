"""The same loop on every rank of an MPI job, with SlowMo over SGP: your model, your optimizer, your data.

    mpirun -n 4 python examples/library.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from slowmo_mpi import SGP, Communicator, SlowMo

torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
comm = Communicator()
worker = SlowMo(model, optimizer, comm, base=SGP("exponential"), tau=12, alpha=1.0, beta=0.2)
mine = range(1500)[comm.rank :: comm.size]

for epoch in range(20):
    for batch in torch.tensor(mine)[torch.randperm(len(mine))].split(32):
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        worker.step()

with worker.averaged():
    accuracy = (model(x[1500:]).argmax(1) == y[1500:]).float().mean()
if comm.rank == 0:
    print(f"test accuracy {accuracy:.3f}")
