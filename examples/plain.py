"""A plain PyTorch loop: digits, an MLP, SGD. library.py is this file after a few lines were changed.

    python examples/plain.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
mine = range(1500)

for epoch in range(20):
    for batch in torch.tensor(mine)[torch.randperm(len(mine))].split(32):
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

accuracy = (model(x[1500:]).argmax(1) == y[1500:]).float().mean()
print(f"test accuracy {accuracy:.3f}")
