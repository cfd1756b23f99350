"""What the bytes of a merge depend on beside recipe and inputs."""

from __future__ import annotations

import platform

import torch


def versions() -> dict[str, str]:
    """Return torch's version and the CPU capability that its kernels use."""
    return {
        "torch": torch.__version__,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }
