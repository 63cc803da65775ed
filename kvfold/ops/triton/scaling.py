# mypy: disable-error-code="no-untyped-def, import-untyped"
"""What a trial of the prescale search is worth, and the scale that it stores: :mod:`kvfold.codecs.scaling`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def judged(scale, zz, ze, ee, RULE: tl.constexpr):
    """The sine^2 between vectors z and their levels, and the scales to store, by the rule's number in ``sides.RULES``.

    ``scale`` is the unit of z, 0 if there is none; ``zz``, ``ze`` and ``ee`` are the products of z and its error e.
    """
    zz0, z0z0 = zz - ze, zz - 2 * ze + ee
    sine = (zz * ee - ze * ze) / (zz * z0z0)
    if RULE == 1:
        stored = scale * zz / zz0
    elif RULE == 2:
        stored = scale * tl.sqrt(zz / z0z0)
    elif RULE == 3:
        stored = scale * zz0 / z0z0
    else:
        stored = scale
    return sine, tl.where(scale > 0, stored, 0.0)
