"""A driver library with no GPU behind it, for everything that must go through the real NVML binding."""

from tests.stand_in.driver import Gpu, NoCompiler, Process, StandInDriver, Step, build, build_or_skip

__all__ = ["Gpu", "NoCompiler", "Process", "StandInDriver", "Step", "build", "build_or_skip"]
