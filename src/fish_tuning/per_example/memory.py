"""Telling a lack of memory from other errors."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator failed; that of the processor has no error class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        allocator in str(error)
        for allocator in ("DefaultCPUAllocator: ", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out")
    )
