"""Where the run happens: TPU cores, GPUs or CPU processes. The only file that names torch_xla, torch.cuda and torch.distributed.

    launch(main, cfg)                         # calls main(rank, cfg) in every replica
    dev = get(cfg.device.backend)             # inside main
    with autocast(dev, "bf16"): ...
    all_sum_gradients(parameters)             # after backward, before clipping and optimizer.step()
    step_done(dev)                            # after each step: XLA runs what was recorded

XLA: through xmp.spawn, a replica for every core of the host's (with PJRT_DEVICE=CPU, one). CUDA and CPU: device.processes of
them on this host, talking by nccl or gloo; with 1, main runs in this process. Every replica calls the same functions in the
same order. Needs torch alone; torch_xla where it is chosen.
"""

import contextlib
import ctypes
import functools
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures.process import BrokenProcessPool

import torch
import torch.distributed as dist


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


# --------------------------------------------------------------------------------------------------------------- replicas


def launch(main, cfg):
    """Run main(rank, cfg) in every replica. When one fails, all end within seconds, with the first error on the screen."""
    backend, processes = choose(cfg.device.backend), cfg.device.processes
    if backend == "xla":
        import torch_xla.distributed.xla_multiprocessing as xmp

        if processes != 1:
            raise ValueError("device.processes is for CPU and CUDA; on XLA there is a replica for every core: set device.processes=1")
        threading.Thread(target=watch_replicas, daemon=True).start()
        signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in multiprocessing.active_children()]
                                                 or sys.exit(128 + signal.SIGTERM))
        try:
            xmp.spawn(ReplicaXla(main, cfg))
        except BrokenProcessPool:
            sys.exit(1)  # the replica that failed has said why
    elif processes == 1:
        main(0, cfg)
    else:
        if backend == "cuda" and processes > torch.cuda.device_count():
            raise ValueError(f"device.processes={processes}, but there are {torch.cuda.device_count()} GPUs; "
                             "set device.processes to at most that")
        spawn(main, cfg, backend, processes)


def spawn(main, cfg, backend, world):
    context = multiprocessing.get_context("spawn")
    # replicas end by os._exit; the semaphores that they leave are cleared away without telling the user
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        replicas = [context.Process(target=replica, args=(rank, world, main, cfg, backend, meeting, pipes[rank][1]))
                    for rank in range(world)]
        for process in replicas:
            process.start()
        earlier = signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in replicas])
        try:
            running = {process.sentinel: process for process in replicas}
            while running:
                for sentinel in multiprocessing.connection.wait(list(running)):
                    process = running.pop(sentinel)
                    process.join()
                    if process.exitcode:
                        time.sleep(0.5)  # for what the others have to say: the first to fail may be slow to end
                        sys.exit(first_failure(replicas, pipes))
        finally:
            signal.signal(signal.SIGTERM, earlier)
            for process in replicas:
                process.kill()
                process.join()


def first_failure(replicas, pipes):
    """What goes to the screen or becomes the exit status: the error of the replica that failed first."""
    killed = [rank for rank, process in enumerate(replicas) if process.exitcode is not None and process.exitcode < 0]
    if killed:  # the others merely lost it
        number = -replicas[killed[0]].exitcode
        return f"error: replica {killed[0]} of {len(replicas)} was ended by {signal.Signals(number).name}" + (
            ", out of memory perhaps; lower device.processes" if number == signal.SIGKILL else "")
    failures = [pipe.recv() for pipe, _ in pipes if pipe.poll()]
    return min(failures)[1] if failures else 1  # without a word: it failed before main, and its traceback is on the screen


def replica(rank, world, main, cfg, backend, meeting, pipe):
    """A process of `spawn`."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if backend == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // world))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    code = 0
    try:
        dist.init_process_group("nccl" if backend == "cuda" else "gloo", init_method=meeting, rank=rank, world_size=world)
        quietly(main, rank, cfg)
        dist.destroy_process_group()
    except SystemExit as exit_:
        code = exit_.code
        pipe.send((time.time(), code))
    except BaseException as error:
        pipe.send((time.time(), explain(error)))
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)  # not waiting for threads that still fetch, nor for a peer


def end_with_parent():
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class ReplicaXla:
    """What xmp.spawn calls, in a thread of a child process; its index counts the host's replicas, rank() those of all hosts."""

    def __init__(self, main, cfg):
        self.main, self.cfg = main, cfg

    def __setstate__(self, state):
        # unpickled by the child's main thread, the only one that may say what SIGTERM does
        self.__dict__ = state
        end_with_parent()
        signal.signal(signal.SIGTERM, lambda *_: [event.set() for event in SIGTERM_EVENTS] or os._exit(128 + signal.SIGTERM))

    def __call__(self, index):
        try:
            quietly(self.main, rank(), self.cfg)
        except SystemExit:
            raise
        except BaseException as error:
            if world() == 1:
                raise
            print(explain(error), file=sys.stderr, flush=True)
            os._exit(1)  # the others would wait for it in the next reduction


def watch_replicas():
    """In the parent on XLA: when a replica has died, the others of this host are killed, for they wait for it and SIGTERM does not
    end them."""
    seen = set()
    while True:
        time.sleep(0.5)
        seen |= set(multiprocessing.active_children())
        if any(process.exitcode for process in seen):
            for process in seen:
                process.kill()


def quietly(main, rank, cfg):
    """main(rank, cfg), printing only on rank 0."""
    with contextlib.redirect_stdout(open(os.devnull, "w")) if rank else contextlib.nullcontext():
        main(rank, cfg)


def explain(error):
    """One sentence for what the user can mend; a traceback for the rest, and with python -X dev."""
    if isinstance(error, (ValueError, OSError)) and not sys.flags.dev_mode:
        return f"error: {error}"
    return "".join(traceback.format_exception(error)).rstrip()


def run(command):
    """command() as a script's __main__: its errors become one sentence and exit status 1, Ctrl-C becomes 130."""
    try:
        command()
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        sys.exit(explain(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


SIGTERM_EVENTS = []  # of the replicas in this process


def sigterm():
    """An event that SIGTERM sets, in place of ending the process: for a loop that saves before it ends."""
    event = threading.Event()
    SIGTERM_EVENTS.append(event)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: event.set())
    return event


def rank():
    """Number of this replica, of all hosts'."""
    if dist.is_initialized():
        return dist.get_rank()
    if "torch_xla" in sys.modules:
        import torch_xla.runtime

        return torch_xla.runtime.global_ordinal()
    return 0


def world():
    """Number of replicas, on all hosts."""
    if dist.is_initialized():
        return dist.get_world_size()
    if "torch_xla" in sys.modules:
        import torch_xla.runtime

        return torch_xla.runtime.world_size()
    return 1


# ---------------------------------------------------------------------------------------------------------------- devices


def get(backend):
    """The torch.device of this replica."""
    backend = choose(backend)
    if backend == "xla":
        import torch_xla

        return torch_xla.device()
    if backend == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # glibc keeps freed tensors of up to 32 MB in a heap that falls to pieces: a training step of the full encoder would hold
        # 5 GB in place of 2. M_MMAP_THRESHOLD: from 4 MB on, what is freed goes back at once
        libc.mallopt(-3, 4 << 20)
    return torch.device("cpu")


def describe(dev):
    """What the device is, for people."""
    name = "cpu"
    if dev.type == "xla":
        import torch_xla.runtime

        name = f"xla ({torch_xla.runtime.device_type()})"
    elif dev.type == "cuda":
        name = torch.cuda.get_device_name(dev)
    return name if world() == 1 else f"{world()} x {name}"


def seed(number, dev):
    """Seed torch, on the host and on the device, alike in every replica."""
    torch.manual_seed(number)  # CPU and CUDA
    if dev.type == "xla":
        import torch_xla

        torch_xla.manual_seed(number)


def send(tensor, dev):
    """tensor on dev. A GPU fetches it from page-locked memory while it still computes what came before."""
    return tensor.pin_memory().to(dev, non_blocking=True) if dev.type == "cuda" else tensor.to(dev)


def autocast(dev, precision):
    """bf16 matrix products within; fp32 changes nothing."""
    return torch.autocast(dev.type, dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def attention(dev, default):
    """TPU's own attention (Pallas: jax must be installed beside torch_xla) as f(q, k, v) of (B, heads, N, d); elsewhere the default."""
    if dev.type == "xla" and importlib.util.find_spec("jax") is not None:
        import torch_xla.runtime
        from torch_xla.experimental.custom_kernel import flash_attention

        if torch_xla.runtime.device_type() == "TPU":
            return lambda q, k, v: flash_attention(q, k, v, sm_scale=q.shape[-1] ** -0.5)
    return default


def checkpointing(dev):
    """f(module, *args) that keeps none of the module's activations and computes them again in the backward pass."""
    if dev.type == "xla":
        from torch_xla.utils.checkpoint import checkpoint  # torch's own crashes there

        return checkpoint
    from torch.utils.checkpoint import checkpoint

    return functools.partial(checkpoint, use_reentrant=False)


def step_done(dev):
    """Marks the end of a step: XLA compiles and runs what was recorded; elsewhere nothing is to be done."""
    if dev.type == "xla":
        import torch_xla

        torch_xla.sync()


# ------------------------------------------------------------------------------------------------------- between replicas


def share(rows, size):
    """This replica's rows of a global batch: (size,) -> (ceil(size / world),), padded with -1; world and size alone decide its length.

    rows: tensor (n,) of indices, n <= size. Row i of the batch belongs to replica i % world.
    """
    world_ = world()
    padded = torch.full((-(-size // world_) * world_,), -1)
    padded[:len(rows)] = rows
    return padded[rank()::world_]


def all_sum(tensor):
    """Sum of the replicas' tensors, the same bits in every replica. Rows that all but one replica leave zero are gathered exactly."""
    if world() == 1:
        return tensor
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor
    import torch_xla.core.xla_model as xm

    return xm.all_reduce(xm.REDUCE_SUM, tensor)


def all_sum_gradients(parameters):
    """Add up the replicas' gradients, in one reduction. The loss divides by what belongs to the whole batch."""
    if world() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = all_sum(torch.cat([g.flatten() for g in gradients]))
    for gradient, part in zip(gradients, total.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


def gather(value, dev):
    """[value of replica 0, of replica 1, ...] in every replica; value is anything that JSON can hold."""
    if world() == 1:
        return [value]
    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.int32)
    lengths = torch.zeros(world(), dtype=torch.int32)
    lengths[rank()] = len(text)
    lengths = all_sum(lengths.to(dev)).cpu().tolist()
    table = torch.zeros(world(), max(lengths), dtype=torch.int32)
    table[rank(), :len(text)] = text
    table = all_sum(table.to(dev)).cpu().tolist()
    return [json.loads(bytes(row[:length])) for row, length in zip(table, lengths)]


def any_replica(value, dev):
    """Is value true in any replica? The same answer in all."""
    return value if world() == 1 else bool(all_sum(torch.tensor(float(value), device=dev)).item())


def barrier(dev):
    """Wait until every replica is here."""
    gather(None, dev)


# ------------------------------------------------------------------------------------------------------------------ saving


def to_host(value):
    """Nested dicts, lists and tuples with their tensors on the CPU: what is saved from one backend loads on any."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {k: to_host(v) for k, v in value.items()}
    return type(value)(to_host(v) for v in value) if isinstance(value, (list, tuple)) else value
