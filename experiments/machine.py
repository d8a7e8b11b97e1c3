"""A description of the machine, saved with each measured figure.

`python experiments/machine.py` prints the kind of its units as a part of a file name, such as `avx512_bf16`.
"""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import torch

LIMITS = (("oneDNN", "ONEDNN_MAX_CPU_ISA"), ("MKL", "MKL_ENABLE_INSTRUCTIONS"))
"""Libraries of matrix products, each with the variable that limits its instructions."""


def units() -> str:
    """Return the fastest units for matrix products that torch uses: AMX, AVX512-BF16, AVX512, AVX2, or a GPU.

    The limits that the environment sets for the libraries of matrix products are part of the name.
    """
    if torch.cuda.is_available():
        return "GPU"
    limits = [f"{library} limited to {os.environ[name]}" for library, name in LIMITS if name in os.environ]
    capability = torch.backends.cpu.get_cpu_capability()
    if limits:
        return ", ".join([capability, *limits])
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else capability


def machine() -> dict[str, object]:
    """Return the processor, cores, instruction set, torch version and date."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "units": units(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    print(units().lower().replace(", ", "_").replace(" ", "_").replace("-", "_"))
