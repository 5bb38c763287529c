"""Beam search: of all translations that a beam of hypotheses leads to, the best by length-normalised probability."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Decoder(Protocol):
    """What is searched: models/transformer.py's is one."""

    def start(self, source: Tensor) -> Any: ...

    def step(self, tokens: Tensor, state: Any) -> Tensor: ...


class Found(NamedTuple):
    """The best translations: their tokens without begin and end, and log p / length^penalty, the end counted."""

    tokens: list[list[int]]
    scores: list[float]


@torch.no_grad()
def beam_search(
    model: Decoder, source: Tensor, begin: int, end: int, never: list[int], beam: int, penalty: float, longest: int
) -> Found:
    """Translate source, int64 (b, s), all sentences side by side.

    At each position every living hypothesis may end, and of those that go on the `beam` most probable live. A
    sentence is done when none that lives can come to a better score any more (log p only falls; penalty >= 0).
    begin, end: tokens; never: tokens that no translation has; longest: tokens of a translation at most, besides its
    end. With `beam` as large as the number of prefixes the search is exhaustive.
    """
    rows = torch.arange(len(source), device=source.device)  # the sentences that are not done
    best: list[list[int]] = [[] for _ in rows]
    best_scores = torch.full((len(source),), -math.inf, device=source.device)
    state = model.start(source)
    # Of each such sentence the living hypotheses, (rows, living): last token, log p; and all tokens.
    tokens = torch.full((len(source), 1), begin, device=source.device)
    scores = torch.zeros(len(source), 1, device=source.device)
    prefixes = tokens.new_zeros(len(source), 1, 0)
    for length in range(longest + 1):
        logits = model.step(tokens.flatten(), state).float()
        logits[:, never] = -math.inf
        total = scores[:, :, None] + logits.log_softmax(dim=1).unflatten(0, scores.shape)
        ended, which = (total[:, :, end] / (length + 1) ** penalty).max(dim=1)
        for i in (ended > best_scores[rows]).nonzero().flatten().tolist():
            best[rows[i]] = prefixes[i, which[i]].tolist()
        best_scores[rows] = best_scores[rows].maximum(ended)

        total[:, :, end] = -math.inf
        scores, chosen = total.flatten(1).topk(min(beam, total[0].numel()), dim=1)
        going = (scores[:, 0] / (longest + 1) ** penalty > best_scores[rows]).nonzero().flatten()
        if length == longest or not len(going):
            break
        parents, tokens, scores = chosen[going] // total.shape[2], chosen[going] % total.shape[2], scores[going]
        prefixes = torch.cat([prefixes[going[:, None], parents], tokens[:, :, None]], dim=2)
        state.select((going[:, None] * total.shape[1] + parents).flatten())
        rows = rows[going]
    return Found(best, best_scores.tolist())
