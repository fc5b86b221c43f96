"""Samples of CPU, memory and GPU use."""

from types import SimpleNamespace

import pytest

from metagmvae.infra.tracking.system_metrics import SystemSampler, gpu_values


def test_system_metrics(monkeypatch):
    memory = SimpleNamespace(total=1000 * 1024, available=750 * 1024)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    sampler = SystemSampler()
    sampler.nvidia_smi = None
    sample = sampler.sample()
    assert 0 <= sample.pop("system/cpu_utilization_percentage") <= 100
    assert sample.pop("system/process_memory_megabytes") > 10
    assert sample == {
        "system/system_memory_usage_percentage": pytest.approx(25),
        "system/system_memory_usage_megabytes": pytest.approx(0.256),
    }


def test_gpu_metrics():
    assert gpu_values("0, 55, 1000, 4000, 80.5\n1, [N/A], 0, 4000, [N/A]\n") == {
        "system/gpu_0_utilization_percentage": 55,
        "system/gpu_0_memory_usage_megabytes": pytest.approx(1048.576),
        "system/gpu_0_memory_usage_percentage": 25,
        "system/gpu_0_power_usage_watts": 80.5,
        "system/gpu_1_memory_usage_megabytes": 0,
        "system/gpu_1_memory_usage_percentage": 0,
    }
    assert gpu_values("No devices were found\n") == {}
