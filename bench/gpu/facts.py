"""What a run was measured on: device, driver, packages."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from services.machine import inspect_machine

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "onnx")


def facts(target: str) -> dict[str, object]:
    """Everything a reader needs to tell two runs apart. A package that is not installed is None."""
    import onnxruntime

    machine = inspect_machine()
    found: dict[str, object] = {"processor": machine.processor, "cores": machine.cores}
    found["memory_gb"] = round(machine.memory_bytes / 1e9, 1)
    if target == "cuda":
        import torch

        from kernels.cuda.device import Device

        device = Device()
        about = device.facts
        device.close()
        found |= {"device": about.name, "device_memory_gb": round(about.memory_bytes / 1e9, 1)}
        found |= {"driver": about.driver, "cuda": torch.version.cuda}
    else:
        found["device"] = machine.processor
    # The module's own version: onnxruntime and onnxruntime-gpu are packages of different names.
    return found | {"onnxruntime": onnxruntime.__version__} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
