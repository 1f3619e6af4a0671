"""Where the run happens: TPU core, GPU or CPU. The only file that names torch_xla and torch.cuda.

    launch(main, cfg)                         # calls main(rank, cfg): through xmp.spawn on XLA, plainly elsewhere
    dev = get(cfg.device.backend)             # inside main
    with autocast(dev, "bf16"): ...
    step_done(dev)                            # after each step: XLA runs what was recorded

One replica for now, on every backend. Needs torch alone; torch_xla where it is chosen.
"""

import contextlib
import importlib.util
import io

import torch


def choose(backend):
    """"auto" -> "xla" where torch_xla is installed, else "cuda", else "cpu". ValueError when what is asked for is not there."""
    has_xla = importlib.util.find_spec("torch_xla") is not None
    if backend == "auto":
        return "xla" if has_xla else "cuda" if torch.cuda.is_available() else "cpu"
    if backend == "xla" and not has_xla:
        raise ValueError("device.backend=xla needs torch_xla: run with .venv-xla/bin/python (make setup-xla), or set device.backend=auto")
    if backend == "cuda" and not torch.cuda.is_available():
        raise ValueError("device.backend=cuda finds no GPU; set device.backend=auto")
    return backend


def launch(main, cfg):
    """Run main(rank, cfg) on the configured backend."""
    if choose(cfg.device.backend) == "xla":
        import torch_xla.distributed.xla_multiprocessing as xmp

        xmp.spawn(main, args=(cfg,), nprocs=1)
    else:
        main(0, cfg)


def get(backend):
    """The torch.device of this process."""
    backend = choose(backend)
    if backend == "xla":
        import torch_xla

        return torch_xla.device()
    return torch.device(backend)


def describe(dev):
    """What the device is, for people."""
    if dev.type == "xla":
        import torch_xla.runtime

        return f"xla ({torch_xla.runtime.device_type()})"
    return torch.cuda.get_device_name(dev) if dev.type == "cuda" else "cpu"


def seed(number, dev):
    """Seed torch, on the host and on the device."""
    torch.manual_seed(number)  # CPU and CUDA
    if dev.type == "xla":
        import torch_xla

        torch_xla.manual_seed(number)


def autocast(dev, precision):
    """bf16 matrix products within; fp32 changes nothing."""
    return torch.autocast(dev.type, dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def step_done(dev):
    """Marks the end of a step: XLA compiles and runs what was recorded; elsewhere nothing is to be done."""
    if dev.type == "xla":
        import torch_xla

        torch_xla.sync()


def to_host(value):
    """Nested dicts, lists and tuples with their tensors on the CPU: what is saved from one backend loads on any."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {k: to_host(v) for k, v in value.items()}
    return type(value)(to_host(v) for v in value) if isinstance(value, (list, tuple)) else value


def to_bytes(value):
    """What torch.save would write, with all tensors on the CPU."""
    out = io.BytesIO()
    torch.save(to_host(value), out)
    return out.getvalue()
