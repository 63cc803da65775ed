"""Trellis-coded quantisation with 4 states (Marcellin and Fischer 1990; Ungerboeck's partition): k bits per coordinate.

There are 2^(k+1) levels, twice as many as k bits can name, in four interleaved subsets; which two of the subsets a
coordinate may use depends on the two coordinates before it. k - 1 refine bits r and a path bit u say which level it is:

    index of the level, ascending = 4 r + 2 (u_t xor u_{t-2}) + u_{t-1},    u_{-1} = u_{-2} = 0

so decoding reads the path bits of two neighbours and no more: no state is carried along. The encoder finds the path of
least squared error by Viterbi's algorithm.

A code is r in sign and magnitude (:func:`stored_refine`) and, highest, u. The index of a negative level's magnitude is
the complement of its own, and stored like this r has been complemented: only the path's two bits are left.

**The order of coordinates** t is that of the bits in the path bits' plane (kvfold/layout.py): words of 32 coordinates,
coordinate e at bit ``4 (e % 8) + e // 8 % 4``. So u_{t-1} and u_{t-2} of a whole word are the word shifted by one and
two bits, with bits of the word before. Where the head ends within a word, the missing coordinates have u = 0.

The distortion at 2, 3 and 4 bits, with three prescales and least-squares scales, is .0861, .0226 and .0058 of the
energy of Gaussian vectors of 128 (Lloyd–Max: .1142, .0321, .0082).
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch

from kvfold.codebooks import trellis_levels
from kvfold.codecs import scaling
from kvfold.formats import Side

STATES = 4
_FAR = 1e30  # no path begins there
_VECTORS = 2**12  # at a time: a decision per step and state is kept of each, and the cache holds what a step reads


def positions(head_size: int) -> list[int]:
    """The coordinates in the trellis' order; -1 where a word has more bits than the head has coordinates."""
    order = []
    for t in range(-(-head_size // 32) * 32):
        coordinate = t // 32 * 32 + 8 * (t % 4) + t % 32 // 4
        order.append(coordinate if coordinate < head_size else -1)
    return order


@lru_cache(maxsize=64)
def tables(bits: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels ``[2^(bits+1)]``, ascending, and thresholds ``[4, 2^(bits-1) - 1]`` between the levels of each subset."""
    levels = torch.from_numpy(trellis_levels(bits).levels).to(device=device, dtype=torch.float32)
    subsets = levels.view(-1, STATES).T
    return levels, ((subsets[:, 1:] + subsets[:, :-1]) / 2).contiguous()


def stored_refine(r: torch.Tensor, bits: int) -> torch.Tensor:
    """Refine bits as codes have them: those below the highest are complemented where it is clear. Its own inverse."""
    positive = 2 ** (bits - 2)
    return torch.where(r < positive, positive - 1 - r, r)


@lru_cache(maxsize=64)
def stored_levels(bits: int, device: torch.device) -> torch.Tensor:
    """Levels ``[2^(bits+1)]`` by the refine bits as they are stored, above the path's two bits."""
    levels = tables(bits, device)[0]
    return levels.view(-1, STATES)[stored_refine(torch.arange(2 ** (bits - 1), device=device), bits)].flatten()


def encode(y: torch.Tensor, side: Side) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated vectors ``[..., d]`` to codes and scales; see :func:`kvfold.codecs.encode`."""
    return scaling.encode(y, side, partial(_best_paths, bits=int(side.bits)))


def _best_paths(z: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    flat = z.reshape(-1, z.shape[-1])
    parts = [_best_path(part, bits) for part in flat.split(_VECTORS)] or [(flat.to(torch.uint8), flat)]
    codes, levels = (torch.cat(list(of_all)).view(z.shape) for of_all in zip(*parts, strict=True))
    return codes, levels


def _best_path(z: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and levels ``[n, d]`` of vectors ``[n, d]``."""
    table, thresholds = tables(bits, z.device)
    subset = torch.arange(STATES, device=z.device)
    # the best level of each subset, for every coordinate
    refine = torch.stack([torch.bucketize(z.contiguous(), thresholds[s]) for s in range(STATES)], dim=-1)
    level = table[STATES * refine + subset]
    stored = stored_refine(refine, bits)
    error = (z[..., None] - level).square()

    order = positions(z.shape[-1])
    # a state is 2 u_{t-1} + u_{t-2}; what comes in with path bit u to state 2 u + a is from states 2 a and 2 a + 1
    cost = z.new_full((len(z), 2, 2), _FAR)
    cost[:, 0, 0] = 0
    came_from = torch.zeros((len(order), len(z), 2, 2), dtype=torch.bool, device=z.device)
    u, a = torch.arange(2, device=z.device)[:, None], torch.arange(2, device=z.device)
    even, odd = 2 * u + a, 2 * (1 - u) + a  # subsets, by whether u_{t-2} is 0 or 1
    for t, coordinate in enumerate(order):
        if coordinate < 0:  # u = 0, without cost
            came_from[t, :, 0] = cost[:, :, 1] < cost[:, :, 0]
            cost = torch.stack([cost.amin(dim=2), torch.full_like(cost[:, 0], _FAR)], dim=1)
            continue
        errors = error[:, coordinate]
        from_even, from_odd = cost[:, None, :, 0] + errors[:, even], cost[:, None, :, 1] + errors[:, odd]
        came_from[t] = from_odd < from_even
        cost = torch.minimum(from_even, from_odd)

    codes = torch.empty(z.shape, dtype=torch.uint8, device=z.device)
    levels = torch.empty_like(z)
    state, rows = cost.flatten(1).argmin(dim=1), torch.arange(len(z), device=z.device)
    for t in reversed(range(len(order))):
        path, before = state >> 1, state & 1
        two_before = came_from[t].flatten(1)[rows, state].long()
        if (coordinate := order[t]) >= 0:
            chosen = 2 * (path ^ two_before) + before
            levels[:, coordinate] = level[rows, coordinate, chosen]
            codes[:, coordinate] = (stored[rows, coordinate, chosen] | path << (bits - 1)).to(torch.uint8)
        state = 2 * before + two_before
    return codes, levels


def decode(codes: torch.Tensor, scale: torch.Tensor, side: Side) -> torch.Tensor:
    """Codes and scales to rotated vectors in float32."""
    bits = int(side.bits)
    order = torch.tensor(positions(codes.shape[-1]), device=codes.device)
    path = torch.where(order >= 0, codes.index_select(-1, order.clamp(min=0)) >> (bits - 1), 0).long()
    one = torch.nn.functional.pad(path, (1, 0))[..., :-1]
    two = torch.nn.functional.pad(path, (2, 0))[..., :-2]
    subset = torch.empty(codes.shape, dtype=torch.int64, device=codes.device)
    subset[..., order[order >= 0]] = (2 * (path ^ two) + one)[..., order >= 0]
    stored = (codes & (2 ** (bits - 1) - 1)).long()
    return stored_levels(bits, codes.device)[STATES * stored + subset] * scale.float().unsqueeze(-1)
