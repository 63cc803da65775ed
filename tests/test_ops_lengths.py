"""Lengths that the host knows."""

from __future__ import annotations

import gc

import pytest
import torch

from kvfold import ops
from kvfold.ops import lengths
from kvfold.ops.lengths import on_host


def test_lengths_are_read_once_and_again_after_a_write() -> None:
    tensor = torch.tensor([3, 5])
    first = on_host(tensor)
    assert first == [3, 5]
    assert on_host(tensor) is first
    tensor.add_(1)
    assert on_host(tensor) == [4, 6]


def test_lengths_that_were_told_are_not_read() -> None:
    tensor = torch.empty(2, dtype=torch.int32, device="meta")  # cannot be read
    ops.remember_lengths(tensor, (7, 0))
    assert on_host(tensor) == [7, 0]
    with pytest.raises(NotImplementedError):
        on_host(tensor[:1])  # a view is another tensor


def test_nothing_is_kept_of_tensors_that_are_gone() -> None:
    tensor = torch.tensor([1])
    key = id(tensor)
    ops.remember_lengths(tensor, [1])
    assert key in lengths._known
    del tensor
    gc.collect()
    assert key not in lengths._known


def test_tensors_of_inference_mode_are_read_each_time() -> None:
    with torch.inference_mode():
        tensor = torch.tensor([2])
        assert on_host(tensor) == [2]
        tensor.add_(1)
        assert on_host(tensor) == [3]
    with pytest.raises(ValueError, match="inference mode"):
        ops.remember_lengths(tensor, [3])


@pytest.mark.parametrize("values", [[], [1, 2, 3]])
def test_as_many_values_as_there_are(values: list[int]) -> None:
    with pytest.raises(ValueError, match="values are told"):
        ops.remember_lengths(torch.tensor([1, 2]), values)
