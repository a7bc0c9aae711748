"""verl on a CPU: a platform whose accelerator is the CPU itself, and a process group that works there."""

from __future__ import annotations

import os
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import verl.utils.distributed
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry, set_platform


def _device_module() -> types.ModuleType:
    """`torch.cpu` plus the calls verl makes on `torch.cuda`, answered for a machine without an accelerator."""
    module = types.ModuleType("verl_plugins_cpu_device")
    module.__dict__.update({name: getattr(torch.cpu, name) for name in dir(torch.cpu) if not name.startswith("__")})
    memory = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
    quiet = ("empty_cache", "reset_peak_memory_stats", "synchronize", "set_device", "ipc_collect")
    module.__dict__.update(dict.fromkeys(memory, lambda *_, **__: 0))
    module.__dict__.update(dict.fromkeys(quiet, lambda *_, **__: None))
    module.current_device = lambda: 0
    module.device_count = lambda: 1
    module.is_available = lambda: True
    module.mem_get_info = lambda *_, **__: (1 << 34, 1 << 34)
    module.get_device_name = lambda *_, **__: "cpu"
    module.manual_seed = module.manual_seed_all = torch.manual_seed
    module.get_rng_state = lambda *_, **__: torch.get_rng_state()
    module.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    return module


class PlatformCPU(PlatformBase):
    """The CPU as verl's accelerator. Ray counts it as one logical "GPU", the only resource verl asks for."""

    _module = _device_module()

    device_name = property(lambda self: "cpu")
    vendor_name = property(lambda self: "cpu")
    device_module = property(lambda self: self._module)

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return not torch.cuda.is_available()

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def initialize_process_group(timeout_second: int | None = None, backend: str | None = None) -> None:
    """Plain gloo; verl would ask for `cpu:gloo,cpu:gloo`, which torch refuses as a duplicate."""
    from verl.utils import model

    model.load_valuehead_model = load_value_model
    if torch.distributed.is_initialized():
        return
    torch.distributed.init_process_group(
        backend="gloo",
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        timeout=timedelta(seconds=timeout_second) if timeout_second is not None else None,
        init_method=os.environ.get("DIST_INIT_METHOD") or _meeting_place(),
    )


def load_value_model(local_path: str, torch_dtype: torch.dtype, model_config: Any, trust_remote_code: bool) -> Any:
    """The critic's model with the attention of its configuration; verl always asks for flash attention."""
    from transformers import AutoModelForTokenClassification

    return AutoModelForTokenClassification.from_pretrained(
        local_path,
        dtype=torch_dtype,
        config=model_config,
        attn_implementation=model_config._attn_implementation,
        trust_remote_code=trust_remote_code,
    )


def _meeting_place() -> str | None:
    """Where ranks of one machine find each other: a file of the run, since torch's server listens on all interfaces."""
    if os.environ.get("MASTER_ADDR") not in ("127.0.0.1", "localhost"):
        return None
    return f"file://{tempfile.gettempdir()}/ranks_{os.environ['MASTER_PORT']}"


def install() -> None:
    """Make the CPU this process's platform; doing it twice is harmless."""
    PlatformRegistry.register(platform="cpu")(PlatformCPU)
    set_platform(PlatformCPU())
    verl.utils.distributed.initialize_global_process_group_ray = initialize_process_group


def unpin_offloading() -> None:
    """Let FSDP2 keep offloaded parameters (the reference model's) in ordinary memory: there is no device to pin for."""
    from torch.distributed.fsdp import CPUOffloadPolicy
    from verl.workers.engine.fsdp import transformer_impl

    transformer_impl.CPUOffloadPolicy = lambda **_: CPUOffloadPolicy(pin_memory=False)
