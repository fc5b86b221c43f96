"""Samples CPU, memory and GPU use of this machine during a run, under the names that MLflow's user interface shows.

Values that a machine does not offer (no GPU) are left out. Under Ray the machine is the driver's.
"""

from __future__ import annotations

import shutil
import subprocess

import psutil

MEGABYTE = 1e6
_GPU_QUERY = "index,utilization.gpu,memory.used,memory.total,power.draw"


class SystemSampler:
    """Samples the machine. CPU use is the mean since the previous sample of the same thread."""

    def __init__(self) -> None:
        self.nvidia_smi = shutil.which("nvidia-smi")
        psutil.cpu_percent()  # start of the first interval; psutil keeps it per thread

    def sample(self) -> dict[str, float]:
        """Return `system/…` values: percentages 0 to 100, megabytes (10^6 bytes), watts."""
        memory = psutil.virtual_memory()
        used = memory.total - memory.available
        return {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": used / MEGABYTE,
            "system/system_memory_usage_percentage": 100 * used / memory.total,
            "system/process_memory_megabytes": psutil.Process().memory_info().rss / MEGABYTE,
            **self._gpus(),
        }

    def _gpus(self) -> dict[str, float]:
        if self.nvidia_smi is None:
            return {}
        command = [self.nvidia_smi, f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader,nounits"]
        try:
            output = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return {}  # the driver is being reset, or there is no GPU: this sample has no GPU values
        return gpu_values(output)


def gpu_values(output: str) -> dict[str, float]:
    """Parse the CSV output of nvidia-smi; fields that it does not know ("[N/A]") are left out."""
    values: dict[str, float] = {}
    for row in output.splitlines():
        index, *fields = (field.strip() for field in row.split(","))
        if len(fields) != 4:
            continue  # a message ("No devices were found"), not a row
        numbers = [float(field) if field.replace(".", "", 1).isdigit() else None for field in fields]
        utilization, used, total, power = numbers
        named = {
            "utilization_percentage": utilization,
            # nvidia-smi counts in MiB.
            "memory_usage_megabytes": used * 2**20 / MEGABYTE if used is not None else None,
            "memory_usage_percentage": 100 * used / total if used is not None and total else None,
            "power_usage_watts": power,
        }
        values |= {f"system/gpu_{index}_{name}": v for name, v in named.items() if v is not None}
    return values
