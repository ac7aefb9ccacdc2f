"""What a GPU has left for this process."""

import torch


def unused_bytes() -> int:
    """Of the current GPU's memory: what PyTorch has reserved and not allocated, and what this process may still reserve."""
    free, total = torch.cuda.mem_get_info()
    may_take = total * torch.cuda.get_per_process_memory_fraction()
    reserved = torch.cuda.memory_reserved()
    return int(min(free, may_take - reserved)) + reserved - torch.cuda.memory_allocated()
