"""Where and with how many threads the arithmetic runs."""

import torch

from svdconvert.errors import RecipeError


def pick_device(name: str, local: int = 0) -> torch.device:
    """The device called `name`; "auto" is the GPU of this host's rank `local`, else the CPU.

    Raises RecipeError where it is absent.
    """
    if name == "auto":
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return torch.device("cuda", local % gpus) if gpus else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device {name!r} is not available here; give cpu, cuda or cuda:N") from error
    return device


def use_threads(count: int | None) -> int:
    """Use `count` threads in this process, or as many as torch chose; return the number in use."""
    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()
