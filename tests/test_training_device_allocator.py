"""Freed memory stays with the process: the next block of 48 MiB reuses its pages. It can be given back once."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc has mallopt")

COUNT = """
import resource
import torch
from metagmvae.training.device.allocator import keep_freed_memory

def page_faults_of_a_block(warm_up):
    for _ in range(warm_up):  # until small allocations have settled
        torch.ones(48 * 2**20, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(48 * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

by_default = page_faults_of_a_block(2)
assert keep_freed_memory()
print(by_default, page_faults_of_a_block(20))
"""


def test_freed_memory_is_reused_without_page_faults() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    by_default, kept = map(int, done.stdout.split())
    # 12,288 pages of 4 KiB, or 24 of 2 MiB where the system uses huge pages.
    assert by_default >= 24
    assert kept < min(100, by_default)


GIVE_BACK = """
import torch
from metagmvae.evaluation.bench.memory import current_rss
from metagmvae.training.device.allocator import give_back_freed_memory, keep_freed_memory

keep_freed_memory()
torch.ones(256 * 2**20, dtype=torch.uint8)
kept = current_rss()
give_back_freed_memory()
print(kept - current_rss())
"""


def test_kept_memory_can_be_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", GIVE_BACK], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 256 * 2**20
