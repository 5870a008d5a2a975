"""Tensors are copied."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch


def rebuild_tensor(data: bytes, dtype: Any, size: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(size)


def reduce_tensor(tensor: torch.Tensor) -> Any:
    array = tensor.numpy()
    return rebuild_tensor, (array.tobytes(), tensor.dtype, tuple(tensor.shape))


ForkingPickler.register(torch.Tensor, reduce_tensor)
