"""multiprocessing, and how tensors travel in it."""

from multiprocessing import get_context

from torch.multiprocessing import reductions

__all__ = ["get_context", "reductions"]
