"""torch tensors over regions: `import libmshare.tensors`, and they travel by reference.

torch.multiprocessing, its queues and DataLoaders copy a tensor into shared memory of their own
before they send it.  One that lies in a region is there already: it is sent as where it lies.
"""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.multiprocessing import reductions

from libmshare import arrays


def rebuild(
    where: arrays.Where, dtype: torch.dtype, size: tuple[int, ...], strides: tuple[int, ...]
) -> torch.Tensor:
    """The tensor that _reduce() took apart; for pickle."""
    flat = torch.frombuffer(arrays.bytes_of(where, readonly=False), dtype=dtype)
    return torch.as_strided(flat, size, strides)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is what its bytes are: no gradient is wanted, and nothing is computed late."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.numel() > 0
        and not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg())
    )


def _reduce(tensor: torch.Tensor) -> Any:
    if _is_plain(tensor):
        size, strides = tuple(tensor.shape), tensor.stride()
        low = tensor.data_ptr()
        reach = sum((extent - 1) * each for extent, each in zip(size, strides, strict=True))
        high = low + (reach + 1) * tensor.element_size()
        where = arrays.reference(low, high)
        if where is not None:
            return rebuild, (where, tensor.dtype, size, strides)
    return reductions.reduce_tensor(tensor)


ForkingPickler.register(torch.Tensor, _reduce)
