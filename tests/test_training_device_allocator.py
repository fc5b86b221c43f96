"""Memory that a step frees stays with the process: the next step finds its pages, where else there are new ones."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone has mallopt")

COUNT = """
import resource, sys
import torch
from metagmvae.training.device.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
for _ in range(20):  # until the allocator's own small leftovers have found their places
    torch.ones(48 * 2**20, dtype=torch.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(48 * 2**20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults_of_another_block(way: str) -> int:
    done = subprocess.run([sys.executable, "-c", COUNT, way], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_block_of_48_mib_takes_the_pages_of_one_before() -> None:
    assert faults_of_another_block("kept") < 100


def test_without_it_each_block_is_made_of_new_pages() -> None:
    # 12,288 pages of 4 KiB, or 24 of 2 MiB where the system makes large ones of its own accord.
    assert faults_of_another_block("given back") >= 24
