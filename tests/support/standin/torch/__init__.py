"""What libmshare.tensors and its test use of torch, over numpy.

A tensor is strided memory, and knows nothing of who owns it: as there, sending one copies it,
unless somebody registers another way.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np

strided = "strided"
dtype = np.dtype


class Device:
    """Where a tensor is."""

    type = "cpu"


class Tensor:
    """A view of memory: data_ptr(), shape, stride(), which counts elements."""

    requires_grad = False
    layout = strided
    device = Device()

    def __init__(self, array: Any) -> None:
        self._array = array
        self.dtype = array.dtype
        self.shape = array.shape

    def data_ptr(self) -> int:
        return int(self._array.__array_interface__["data"][0])

    def stride(self) -> tuple[int, ...]:
        return tuple(each // self._array.itemsize for each in self._array.strides)

    def element_size(self) -> int:
        return int(self._array.itemsize)

    def numel(self) -> int:
        return int(self._array.size)

    def is_conj(self) -> bool:
        return False

    def is_neg(self) -> bool:
        return False

    def t(self) -> Tensor:
        return Tensor(self._array.T)

    def numpy(self) -> Any:
        return self._array

    def reshape(self, size: tuple[int, ...]) -> Tensor:
        return Tensor(self._array.reshape(size))

    def tolist(self) -> Any:
        return self._array.tolist()

    def __getitem__(self, key: Any) -> Tensor:
        return Tensor(self._array[(*key, ...)])

    def __iadd__(self, number: int) -> Self:
        self._array += number
        return self


def from_numpy(array: Any) -> Tensor:
    return Tensor(array)


def frombuffer(buffer: Any, *, dtype: Any) -> Tensor:
    return Tensor(np.frombuffer(buffer, dtype))


def as_strided(tensor: Tensor, size: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    step = tensor.element_size()
    bytes_ = tuple(each * step for each in strides)
    return Tensor(np.lib.stride_tricks.as_strided(tensor._array, size, bytes_))


from torch import multiprocessing as multiprocessing  # noqa: E402 - it is made of these
