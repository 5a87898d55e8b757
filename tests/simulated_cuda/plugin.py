"""Simulates CUDA devices from here on."""

from simulated_cuda import load_runtime

load_runtime()

from simulated_cuda import device  # noqa: E402  (torch comes after its runtime)

device.install()
