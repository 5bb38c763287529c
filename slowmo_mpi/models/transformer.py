"""The Transformer of Vaswani et al. (2017), for translation, in the sizes of the paper.

As fairseq's transformer_wmt_en_de and transformer_vaswani_wmt_en_de_big, with which Ott et al. (2018) and the SlowMo
paper trained: one embedding shared by encoder, decoder and output, sinusoidal positions, normalisation behind each
residual sum, dropout on each sub-layer's output and on the embeddings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

PAD = 0  # data/vocabulary.py numbers it so


class Size(NamedTuple):
    """Of the vectors, of the hidden layer between them, heads of each attention, layers on either side."""

    width: int
    hidden: int
    heads: int
    layers: int


SIZES = {"small": Size(128, 512, 4, 2), "base": Size(512, 2048, 8, 6), "big": Size(1024, 4096, 16, 6)}
"""`base` and `big` are the papers'; `small` is for studies on a few cores."""


class Transformer(nn.Module):
    """(source, target so far) -> logits of the next token.

    vocabulary: entries, of which 0 is padding. Weights come from torch's global generator.
    """

    def __init__(self, size: Size, vocabulary: int, dropout: float):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size.width, padding_idx=PAD)
        nn.init.normal_(self.embedding.weight, std=size.width**-0.5)
        with torch.no_grad():
            self.embedding.weight[PAD].zero_()
        self.encoder = nn.ModuleList(EncoderLayer(size, dropout) for _ in range(size.layers))
        # Of DecoderLayers, which its type cannot say.
        self.decoder: Any = nn.ModuleList(DecoderLayer(size, dropout) for _ in range(size.layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """source (b, s) and target (b, t), int64, padded on the right, -> logits (b, t, vocabulary).

        The logits at position j see target[:, : j + 1].
        """
        memory, mask = self.encode(source)
        x = self._embed(target, 0)
        for layer in self.decoder:
            x = layer(x, layer.attention.remember(x), layer.cross.remember(memory), mask, causal=True)
        return self._logits(x)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """source, int64 (b, s) -> its vectors (b, s, width), and where they are no padding, bool (b, 1, 1, s)."""
        mask = (source != PAD)[:, None, None]
        x = self._embed(source, 0)
        for layer in self.encoder:
            x = layer(x, mask)
        return x, mask

    def start(self, source: Tensor) -> Decoding:
        """What `step` needs to translate source, int64 (b, s)."""
        memory, mask = self.encode(source)
        return Decoding(mask, [layer.cross.remember(memory) for layer in self.decoder])

    def step(self, tokens: Tensor, state: Decoding) -> Tensor:
        """The target's next tokens, int64 (b,), -> the logits of those after them, (b, vocabulary). Moves `state`."""
        x = self._embed(tokens[:, None], state.length)
        for i, layer in enumerate(self.decoder):
            new = layer.attention.remember(x)
            if state.length:
                new = Memory(*(torch.cat(both, dim=2) for both in zip(state.past[i], new, strict=True)))
                state.past[i] = new
            else:
                state.past.append(new)
            x = layer(x, new, state.source[i], state.mask, causal=False)
        state.length += 1
        return self._logits(x[:, 0])

    def _embed(self, tokens: Tensor, start: int) -> Tensor:
        """Vectors of the tokens (b, t) at the positions start, start + 1, ..."""
        width = self.embedding.embedding_dim
        positions = sinusoids(start, start + tokens.shape[1], width, tokens.device)
        return self.dropout(self.embedding(tokens) * math.sqrt(width) + positions)

    def _logits(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.embedding.weight)


class Memory(NamedTuple):
    """Keys and values of what an attention looks at, each (b, heads, positions, width / heads)."""

    keys: Tensor
    values: Tensor


@dataclass
class Decoding:
    """Where the translation of b sentences stands: the source's memory and the target's so far, a layer an entry.

    mask: where the source is no padding, bool (b, 1, 1, s). length: tokens of the target so far.
    """

    mask: Tensor
    source: list[Memory]
    past: list[Memory] = field(default_factory=list)
    length: int = 0

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, int64 (n,); a row may come twice, or not at all."""
        self.mask = self.mask[rows]
        self.source, self.past = (
            [Memory(m.keys[rows], m.values[rows]) for m in part] for part in (self.source, self.past)
        )


class Attention(nn.Module):
    """Scaled dot-product attention of several heads."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        # Drawn as one matrix of three would be, as fairseq does.
        self.query, self.key, self.value = (_linear(width, width, gain=2**-0.5) for _ in range(3))
        self.out = _linear(width, width)

    def remember(self, x: Tensor) -> Memory:
        """The keys and values of x, (b, s, width)."""
        return Memory(self._split(self.key(x)), self._split(self.value(x)))

    def forward(self, x: Tensor, memory: Memory, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """x (b, t, width) looks at the memory, where the mask, bool (b, 1, 1, s), is true; -> (b, t, width)."""
        found = functional.scaled_dot_product_attention(self._split(self.query(x)), *memory, mask, is_causal=causal)
        return self.out(found.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class EncoderLayer(nn.Module):
    """Attention to the source, then the hidden layer; behind each a residual sum and its normalisation."""

    def __init__(self, size: Size, dropout: float):
        super().__init__()
        self.attention = Attention(size.width, size.heads)
        self.hidden = _hidden(size)
        self.norms = nn.ModuleList(nn.LayerNorm(size.width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (b, s, width) -> (b, s, width); mask: bool (b, 1, 1, s)."""
        x = self.norms[0](x + self.dropout(self.attention(x, self.attention.remember(x), mask)))
        return self.norms[1](x + self.dropout(self.hidden(x)))


class DecoderLayer(nn.Module):
    """Attention to the target so far, attention to the source, then the hidden layer."""

    def __init__(self, size: Size, dropout: float):
        super().__init__()
        self.attention = Attention(size.width, size.heads)
        self.cross = Attention(size.width, size.heads)
        self.hidden = _hidden(size)
        self.norms = nn.ModuleList(nn.LayerNorm(size.width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, past: Memory, source: Memory, mask: Tensor, causal: bool) -> Tensor:
        """x (b, t, width) -> (b, t, width); causal: position j of x sees the first j + 1 of `past`, else all."""
        x = self.norms[0](x + self.dropout(self.attention(x, past, causal=causal)))
        x = self.norms[1](x + self.dropout(self.cross(x, source, mask)))
        return self.norms[2](x + self.dropout(self.hidden(x)))


def sinusoids(start: int, stop: int, width: int, device: torch.device) -> Tensor:
    """Vectors of the positions start ... stop - 1, float32 (stop - start, width): sines, then cosines.

    Made anew each time: kept as a buffer of the model they would be averaged between workers, and in checkpoints.
    """
    rates = torch.exp(torch.arange(width // 2, device=device) * (-math.log(10000.0) / max(1, width // 2 - 1)))
    angles = torch.arange(start, stop, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _hidden(size: Size) -> nn.Sequential:
    return nn.Sequential(_linear(size.width, size.hidden), nn.ReLU(), _linear(size.hidden, size.width))


def _linear(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
