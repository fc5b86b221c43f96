"""CPU, memory and GPU of this machine, sampled beside a run; MLflow's names, so that its page shows them.

Read from /proc and `nvidia-smi`: psutil, which MLflow's own monitor needs, is not among our dependencies.
Where a source is missing (no Linux, no GPU) its keys are missing too. Under Ray the machine is the driver's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

MEGABYTE = 1e6
_GPU_QUERY = "index,utilization.gpu,memory.used,memory.total,power.draw"


class SystemSampler:
    """Samples the machine; CPU use is the mean since the sample before."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self.proc = proc
        self.smi = shutil.which("nvidia-smi")
        self.before = self._cpu_ticks()

    def sample(self) -> dict[str, float]:
        """Return `system/…` values: percentages 0 to 100, megabytes (10^6), watts."""
        return self._cpu() | self._memory() | self._process() | self._gpus()

    def _cpu_ticks(self) -> tuple[int, int] | None:
        """(busy, all) clock ticks of all processors since boot."""
        stat = self.proc / "stat"
        if not stat.exists():
            return None
        ticks = [int(field) for field in stat.read_text().splitlines()[0].split()[1:9]]
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks)

    def _cpu(self) -> dict[str, float]:
        before, now = self.before, self._cpu_ticks()
        self.before = now
        if before is None or now is None or now[1] == before[1]:
            return {}
        return {"system/cpu_utilization_percentage": 100 * (now[0] - before[0]) / (now[1] - before[1])}

    def _memory(self) -> dict[str, float]:
        info = self.proc / "meminfo"
        if not info.exists():
            return {}
        rows = dict(line.split(":") for line in info.read_text().splitlines())
        if not {"MemTotal", "MemAvailable"} <= rows.keys():
            return {}
        total, available = (int(rows[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
        used = total - available
        return {
            "system/system_memory_usage_megabytes": used * 1024 / MEGABYTE,
            "system/system_memory_usage_percentage": 100 * used / total,
        }

    def _process(self) -> dict[str, float]:
        statm = self.proc / "self" / "statm"
        if not statm.exists():
            return {}
        pages = int(statm.read_text().split()[1])
        return {"system/process_memory_megabytes": pages * os.sysconf("SC_PAGE_SIZE") / MEGABYTE}

    def _gpus(self) -> dict[str, float]:
        if self.smi is None:
            return {}
        command = [self.smi, f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return {}  # a driver that is being reset or a tool without a GPU: no sample this time
        return gpu_values(answer)


def gpu_values(answer: str) -> dict[str, float]:
    """Values from the CSV answer of nvidia-smi; fields that it does not know ("[N/A]") are left out."""
    values: dict[str, float] = {}
    for row in answer.splitlines():
        index, *fields = (field.strip() for field in row.split(","))
        if len(fields) != 4:
            continue  # a sentence ("No devices were found"), not a row
        numbers = [float(field) if field.replace(".", "", 1).isdigit() else None for field in fields]
        use, used, total, power = numbers
        share = 100 * used / total if used is not None and total else None
        named = {
            "utilization_percentage": use,
            # nvidia-smi counts in MiB.
            "memory_usage_megabytes": used * 2**20 / MEGABYTE if used is not None else None,
            "memory_usage_percentage": share,
            "power_usage_watts": power,
        }
        values |= {f"system/gpu_{index}_{name}": v for name, v in named.items() if v is not None}
    return values
