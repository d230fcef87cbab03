"""Utilization of processor and GPUs, from files and from a library that stand in for the kernel's and NVIDIA's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from services.telemetry.device import CpuMeter, DeviceCollector
from services.telemetry.nvml import Nvml

CORES = len(os.sched_getaffinity(0))


class Machine:
    """A cgroup tree and two clocks."""

    def __init__(self, root: Path, *, limit: str | None = "50000 100000") -> None:
        self.group = root / "cgroup" / "pod"
        self.group.mkdir(parents=True)
        self.own = root / "self"
        self.own.write_text("1:name=systemd:/old\n0::/pod\n")
        self.now_s = 100.0
        self.process_s = 5.0
        self.use(0.0)
        if limit is not None:
            (self.group / "cpu.max").write_text(limit + "\n")
        self.meter = CpuMeter(
            cgroups=root / "cgroup", own_cgroup=self.own, now_s=lambda: self.now_s, own_s=lambda: self.process_s
        )

    def use(self, seconds: float) -> None:
        (self.group / "cpu.stat").write_text(f"usage_usec {round(seconds * 1e6)}\nuser_usec 1\nsystem_usec 1\n")


def test_a_container_is_measured_against_its_quota(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.use(1.0)
    machine.now_s += 10.0
    assert machine.meter.ratio() == pytest.approx(1.0 / 5.0)
    machine.use(5.5)
    machine.now_s += 10.0
    assert machine.meter.ratio() == pytest.approx(4.5 / 5.0)


def test_without_a_quota_it_is_measured_against_the_cores(tmp_path: Path) -> None:
    machine = Machine(tmp_path, limit="max 100000")
    machine.use(2.0)
    machine.now_s += 10.0
    assert machine.meter.ratio() == pytest.approx(2.0 / (10.0 * CORES))


@pytest.mark.parametrize("own", ["0::/\n", "", "2:cpu:/pod\n"])
def test_outside_a_container_the_process_is_measured(tmp_path: Path, own: str) -> None:
    machine = Machine(tmp_path)
    machine.own.write_text(own)
    meter = CpuMeter(
        cgroups=tmp_path / "cgroup",
        own_cgroup=machine.own,
        now_s=lambda: machine.now_s,
        own_s=lambda: machine.process_s,
    )
    machine.now_s += 10.0
    machine.process_s += 3.0
    assert meter.ratio() == pytest.approx(3.0 / (10.0 * CORES))


def test_two_scrapes_at_once_see_the_same_time(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert machine.meter.ratio() == 0.0
    machine.use(2.0)
    machine.now_s += 10.0
    assert machine.meter.ratio() == machine.meter.ratio() == pytest.approx(0.4)


def test_a_ratio_never_leaves_its_range(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.use(20.0)
    machine.now_s += 10.0
    assert machine.meter.ratio() == 1.0
    (machine.group / "cpu.stat").unlink()  # the group is gone: what counts now is the process
    machine.now_s += 10.0
    assert machine.meter.ratio() == 0.0


# As in nvml.h: three devices, one of which does not say.
NVML = """
typedef struct { unsigned int gpu, memory; } utilization;
static int is_up;
int nvmlInit_v2(void) { is_up = 1; return INIT_CODE; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 3; return is_up ? 0 : 1; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) {
    *device = (void *)(0x700000000000ull + index);
    return 0;
}
int nvmlDeviceGetUtilizationRates(void *device, utilization *found) {
    unsigned int index = (unsigned int)((unsigned long long)device - 0x700000000000ull);
    found->gpu = 40 * index;
    found->memory = 99;
    return index == 1 ? 3 : 0;
}
"""


def built(directory: Path, source: str) -> str:
    """A shared library of this C text, without a libc; the compiler leaves nothing elsewhere."""
    (directory / "source.c").write_text(source)
    command = [sys.executable, "-m", "ziglang", "cc", "-O1", "-shared", "-fPIC", "-nostdlib"]
    caches = {"ZIG_GLOBAL_CACHE_DIR": str(directory / "global"), "ZIG_LOCAL_CACHE_DIR": str(directory / "local")}
    command += ["-o", str(directory / "library.so"), str(directory / "source.c")]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, **caches})
    return str(directory / "library.so")


def test_gpus_say_how_busy_they_are(tmp_path: Path) -> None:
    nvml = Nvml.open(built(tmp_path, NVML.replace("INIT_CODE", "0")))
    assert nvml is not None
    assert nvml.utilization() == pytest.approx([0.0, float("nan"), 0.8], nan_ok=True)
    registry = CollectorRegistry()
    registry.register(DeviceCollector(gpus=nvml.utilization))
    assert registry.get_sample_value("millrace_device_utilization_ratio", {"device": "gpu2"}) == pytest.approx(0.8)
    assert registry.get_sample_value("millrace_device_utilization_ratio", {"device": "cpu"}) is not None


@pytest.mark.parametrize("source", [NVML.replace("INIT_CODE", "9"), "int nothing;"])
def test_a_driver_that_does_not_work_is_no_gpu(tmp_path: Path, source: str) -> None:
    assert Nvml.open(built(tmp_path, source)) is None


def test_without_a_driver_there_is_no_gpu(tmp_path: Path) -> None:
    assert Nvml.open(str(tmp_path / "nowhere.so")) is None
