"""Probes that load what may crash or hang: each runs in a child (tools/doctor/child.py)."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import math
import os
import shutil
from pathlib import Path
from typing import Any

from vlmrt.runtime.host_memory import available_gib
from vlmrt.runtime.sweeper import MPS_CONTROL
from vlmrt.tools.doctor.findings import Finding, ok, problem, warning

OLDEST_GPU = (8, 0)  # Ampere: the first whose kernels are compiled for
GIB = 1 << 30
GPU_FRACTION = 0.92  # as --gpu-memory-fraction


def driver() -> list[Finding]:
    """The CUDA driver itself, and its GPUs."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        if Path("/dev/nvidiactl").exists():
            remedy = "install its libraries (libcuda.so.1); in a container, the NVIDIA container toolkit"
            return [problem("CUDA driver", "there is a GPU device, and no libcuda.so.1", remedy)]
        return [ok("CUDA driver", "none: everything runs on the CPU")]
    code = cuda.cuInit(0)
    if code != 0:
        name = _cuda_error(cuda, code)
        remedy = (
            "nvidia-smi says more; CUDA_VISIBLE_DEVICES may hide all GPUs; a driver and its kernel module must agree"
        )
        return [warning("CUDA driver", f"cuInit failed with {name}: everything runs on the CPU", remedy)]
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    found = [ok("CUDA driver", f"for CUDA {version.value // 1000}.{version.value % 1000 // 10}, {count.value} GPUs")]
    return found + [_gpu(cuda, index) for index in range(count.value)]


def _cuda_error(cuda: ctypes.CDLL, code: int) -> str:
    name = ctypes.c_char_p()
    cuda.cuGetErrorName(code, ctypes.byref(name))
    return name.value.decode() if name.value else f"error {code}"


def _gpu(cuda: ctypes.CDLL, index: int) -> Finding:
    from vlmrt.tools.devices import cuda_gpu

    subject = f"GPU {index}"
    gpu, total, device = cuda_gpu(index), ctypes.c_size_t(), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    text = f"{gpu}, {total.value / GIB:.0f} GiB"
    if gpu.capability < OLDEST_GPU:
        return problem(subject, text, "a GPU of compute capability 8.0 or newer, or --device cpu")
    return ok(subject, text)


def torch() -> list[Finding]:
    """PyTorch, and a multiplication on every GPU that it sees."""
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    found = [ok("PyTorch", f"{torch.__version__}, built for {built}")]
    from vlmrt.tools.devices import num_cuda_devices

    num_gpus = num_cuda_devices()
    if num_gpus and not torch.cuda.is_available():
        why = "it is built for CPUs" if not torch.version.cuda else "its CUDA is newer than the driver"
        remedy = "install the build of pytorch.org for this driver"
        return [*found, problem("PyTorch", f"sees none of the {num_gpus} GPUs: {why}", remedy)]
    for index in range(num_gpus):
        found.append(_multiply(torch, index))
    return found


def _multiply(torch: Any, index: int) -> Finding:
    subject = f"GPU {index}"
    try:
        free, total = torch.cuda.mem_get_info(index)
        ones = torch.ones((64, 64), dtype=torch.bfloat16, device=f"cuda:{index}")
        exact = bool((ones @ ones == 64).all())
    except RuntimeError as error:
        return problem(
            subject, f"cannot compute: {str(error).splitlines()[0]}", "nvidia-smi; other processes may hold it"
        )
    if not exact:
        return problem(subject, "computes wrong products", "nvidia-smi -q shows memory errors; use another GPU")
    text = f"computes; {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < GPU_FRACTION * total:
        return warning(subject, text, "others use it: end them, or set --gpu-memory-fraction, or CUDA_VISIBLE_DEVICES")
    return ok(subject, text)


def sharing() -> list[Finding]:
    """Whether ViTs and ranks could share a GPU by MPS."""
    from vlmrt.tools.devices import num_cuda_devices

    if not num_cuda_devices():
        return []
    control = shutil.which(MPS_CONTROL)
    if control is None:
        remedy = f"install {MPS_CONTROL} (it comes with the driver); without it GPUs are time-sliced"
        return [warning("MPS", f"no {MPS_CONTROL} on the PATH", remedy)]
    pipes = os.environ.get("CUDA_MPS_PIPE_DIRECTORY")
    text = f"{control}; a launch starts a daemon of its own"
    return [ok("MPS", text + (f" and leaves that of {pipes} alone" if pipes else ""))]


def video() -> list[Finding]:
    """The readers of clips."""
    found = []
    try:
        import av

        found.append(ok("video", f"PyAV {av.__version__}"))
    except (ImportError, OSError) as error:
        found.append(problem("video", f"PyAV cannot be loaded: {_line(error)}", "pip install --force-reinstall av"))
    if importlib.util.find_spec("decord") is None:
        return [*found, warning("video", "decord is not installed: PyAV reads all clips", "pip install decord")]
    try:
        decord = importlib.import_module("decord")
        found.append(ok("video", f"decord {decord.__version__}"))
    except (ImportError, OSError) as error:
        remedy = "pip install --force-reinstall decord, or --video-reader av"
        found.append(warning("video", f"decord cannot be loaded: {_line(error)}", remedy))
    return found


def engines() -> list[Finding]:
    """What else may run the vision tower; each is optional."""
    found = []
    if importlib.util.find_spec("onnxruntime") is None:
        found.append(ok("engines", "onnxruntime is not installed (optional: pip install 'vlmrt[onnx]')"))
    else:
        try:
            onnxruntime = importlib.import_module("onnxruntime")
            providers = ", ".join(
                name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()
            )
            found.append(ok("engines", f"onnxruntime {onnxruntime.__version__} ({providers})"))
        except (ImportError, OSError) as error:
            remedy = "pip install --force-reinstall onnxruntime; only --vit-engine onnxruntime needs it"
            found.append(warning("engines", f"onnxruntime cannot be loaded: {_line(error)}", remedy))
    for name in ("tensorrt", "tensorrt_rtx"):
        if importlib.util.find_spec(name) is None:
            continue
        try:
            found.append(ok("engines", f"{name} {importlib.import_module(name).__version__}"))
        except (ImportError, OSError) as error:
            remedy = "reinstall it; only --vit-engine tensorrt needs it"
            found.append(warning("engines", f"{name} cannot be loaded: {_line(error)}", remedy))
    return found


def model(name: str, revision: str, tp: str) -> list[Finding]:
    """A model's files, from their headers; a hub id is looked for on this machine and not downloaded."""
    from vlmrt.actors.models.checkpoint_files import check_weight_files
    from vlmrt.actors.models.config import CheckpointError
    from vlmrt.actors.models.registry import (
        check_tensor_parallel,
        load_generation_defaults,
        load_image_processing,
        load_model_config,
        load_video_processing,
    )
    from vlmrt.runtime.errors import StartupError
    from vlmrt.tools.launch import check_texts

    directory = _directory(name, revision)
    if isinstance(directory, Finding):
        return [directory]
    try:
        config = load_model_config(directory)
        load_image_processing(directory)
        load_video_processing(directory)
        load_generation_defaults(directory)
        check_tensor_parallel(config, int(tp))
        files = check_weight_files(directory)
        check_texts(directory, None)
    except (CheckpointError, StartupError) as error:
        return [problem("model", str(error), "download it again, or name another --model")]
    num_parameters = sum(math.prod(entry.shape) for entry in files.tensors.values())
    found = ok("model", f"{config.model_type}, {num_parameters / 1e9:.2f} billion parameters, in {directory}")
    return [found, _fit(num_parameters, int(tp))]


def _directory(name: str, revision: str) -> Path | Finding:
    from vlmrt.runtime.errors import StartupError
    from vlmrt.tools.model_source import HUB_ID, locate_model

    if not Path(name).expanduser().exists() and HUB_ID.fullmatch(name):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            remedy = "the first launch downloads it; on a machine without network, copy its directory"
            return warning("model", f"{name} is not on this machine yet", remedy)
    try:
        return locate_model(name, revision)
    except StartupError as error:
        return problem("model", str(error), "a directory with config.json and safetensors, or a hub id")


def _fit(num_parameters: int, tp: int) -> Finding:
    """Whether the weights leave room for anything else."""
    from vlmrt.tools.devices import num_cuda_devices

    if num_cuda_devices():
        import torch

        have = GPU_FRACTION * torch.cuda.get_device_properties(0).total_memory / GIB
        need, where = 2 * num_parameters / tp / GIB, f"of a GPU's {have:.1f} GiB, for each of {tp} ranks"
        remedy = f"--tp {2 * tp}, or a smaller model"
    else:
        have, need = available_gib(), 4 * num_parameters / GIB
        where, remedy = f"of {have:.1f} GiB available, in float32 on the CPU", "--dtype bfloat16, or a smaller model"
    text = f"weights take about {need:.1f} GiB {where}"
    if need > have:
        return problem("model", text, remedy)
    return warning("model", text, remedy) if need > 0.8 * have else ok("model", text)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
