"""Recognizes the errors of allocators that run out of memory."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; the CPU's allocator has no class for it."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        allocator in str(error)
        for allocator in ("DefaultCPUAllocator: ", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out")
    )
