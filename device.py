"""Where the run happens: TPU cores, GPUs or CPU processes, and their attention kernels.

The only file that names torch_xla, torch.cuda and torch.distributed.

    launch(main, cfg)                         # calls main(rank, cfg) in every replica
    dev = get(cfg.device.backend)             # inside main
    with autocast(dev, "bf16"): ...
    all_sum_gradients(parameters)             # after backward, before clipping and optimizer.step()
    step_done(dev)                            # after each step: XLA runs what was recorded

XLA: through xmp.spawn, a replica for every core of the host (with PJRT_DEVICE=CPU, one). CUDA and
CPU: device.processes replicas on this host, which talk by nccl or gloo; with 1, main runs in this
process; where torchrun or srun has started replicas, on one host or several, they are joined. Every
replica calls the same functions in the same order. Needs torch, begin.py, files.py and
hosts.py beside it, and torch_xla where it is chosen.
"""

import contextlib
import ctypes
import functools
import importlib.util
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

import files
import hosts
from begin import STARTED_BY, end_when_gone, end_with_parent


def choose(backend):
    """The backend's name; "auto" is "xla" where torch_xla is installed, else "cuda", else "cpu".

    ValueError if the one asked for is not there.
    """
    has_xla = importlib.util.find_spec("torch_xla") is not None
    if backend == "auto":
        return "xla" if has_xla else "cuda" if torch.cuda.is_available() else "cpu"
    if backend == "xla" and not has_xla:
        raise ValueError(
            "device.backend=xla needs torch_xla: run with .venv-xla/bin/python (make setup-xla), "
            "or set device.backend=auto"
        )
    if backend == "cuda" and not torch.cuda.is_available():
        raise ValueError("device.backend=cuda finds no GPU; set device.backend=auto")
    return backend


# ---- replicas


def launch(main, cfg):
    """Run main(rank, cfg) in every replica.

    When one fails, all end within seconds, with the first error on the screen.
    """
    backend, processes = choose(cfg.device.backend), cfg.device.processes
    if hosts.find():
        if not GROUP:
            in_group(lambda: launch(main, cfg))
        else:
            join(main, cfg, backend, processes, *GROUP)
    elif backend == "xla":
        if processes != 1:
            raise ValueError(
                "device.processes is for CPU and CUDA; on XLA there is a replica for every core: "
                "set device.processes=1"
            )
        # torch_xla compiles the scalars 0, 1 and -1 into a program. One that becomes 1 in the
        # course of training, as AdamW's bias correction does, would compile it once more.
        os.environ.setdefault("XLA_NO_SPECIAL_SCALARS", "1")
        import torch_xla.distributed.xla_multiprocessing as xmp

        threading.Thread(target=watch_replicas, daemon=True).start()
        pass_on_sigterm()
        try:
            xmp.spawn(ReplicaXla(main, cfg))
        except BrokenProcessPool:
            sys.exit(1)  # the replica that failed has said why
    elif processes == 1:
        main(0, cfg)
    else:
        if backend == "cuda" and processes > torch.cuda.device_count():
            raise ValueError(
                f"device.processes={processes}, but there are {torch.cuda.device_count()} GPUs; "
                "set device.processes to at most that"
            )
        most = max(16, 4 * (os.cpu_count() or 1))
        if backend == "cpu" and processes > most:
            raise ValueError(
                f"device.processes={processes} is too many for {os.cpu_count()} cores; set "
                f"device.processes to at most {most}"
            )
        spawn(main, cfg, backend, processes)


def pass_on_sigterm():
    """SIGTERM ends the replicas, and this process after them, or at once where there are none."""

    def handler(*_):
        replicas = multiprocessing.active_children()
        for process in replicas:
            process.terminate()
        if not replicas:
            sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, handler)


def spawn(main, cfg, backend, world):
    context = multiprocessing.get_context("spawn")
    # replicas end by os._exit; no warning about the semaphores that they leave is for the user
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    failures = context.SimpleQueue()  # the first is the cause, the others lost the connection to it
    with tempfile.TemporaryDirectory() as folder:
        args = world, main, cfg, backend, f"file://{folder}/meeting", failures
        replicas = [context.Process(target=replica, args=(rank, *args)) for rank in range(world)]
        for process in replicas:
            process.start()
        pass_on_sigterm()
        try:
            running = {process.sentinel: process for process in replicas}
            while running:
                for sentinel in multiprocessing.connection.wait(list(running)):
                    process = running.pop(sentinel)
                    process.join()
                    if process.exitcode:
                        time.sleep(0.5)  # one that was killed may end after those that noticed it
                        sys.exit(first_failure(replicas, failures))
        finally:
            for process in replicas:
                process.kill()
                process.join()
            erase_line()


def first_failure(replicas, failures):
    """The error of the replica that failed first, for the screen, or else its exit status."""
    for rank, process in enumerate(replicas):
        if (process.exitcode or 0) < 0:  # the others merely lost the connection to it
            name = signal.Signals(-process.exitcode).name
            hint = ", out of memory perhaps; lower device.processes" if name == "SIGKILL" else ""
            return f"error: replica {rank} of {len(replicas)} was ended by {name}{hint}"
    # a replica that has sent nothing failed before main, and its traceback is on the screen
    return 1 if failures.empty() else failures.get()


def replica(rank, world, main, cfg, backend, meeting, failures):
    """A process of `spawn`."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    here = rank, world, rank, world
    failure = failure_of(lambda: run_in_group(main, cfg, backend, *here, init_method=meeting))
    if failure:
        failures.put(failure)
    end_at_once(failure)


def run_in_group(main, cfg, backend, rank, world, local_rank, sharing, **meeting):
    """main(rank, cfg) as one of `world` replicas. sharing: how many share this host's threads."""
    if backend == "cuda":
        torch.cuda.set_device(local_rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // sharing))
    name = "nccl" if backend == "cuda" else "gloo"
    # A replica whose features are in the cache may wait for days for one that must encode its own.
    # That one of them has ended is noticed otherwise.
    patience = timedelta(days=30)
    dist.init_process_group(name, rank=rank, world_size=world, timeout=patience, **meeting)
    quietly(main, rank, cfg)
    dist.destroy_process_group()


def failure_of(job):
    """job() -> None, or why it failed: an exit status, or what to print."""
    try:
        job()
    except SystemExit as exit_:
        return exit_.code
    except KeyboardInterrupt:
        return "interrupted"
    except Exception as error:
        return explain(error)
    return None


def end_at_once(failure):
    """End this process, whatever its threads still fetch: a peer may wait."""
    sys.stdout.flush()
    sys.stderr.flush()
    status = 130 if failure == "interrupted" else bool(failure)
    os._exit(failure if isinstance(failure, int) else status)


# of this process where torchrun or srun has started it: hosts.Place, torch's store, hosts.Line
GROUP = []


def in_group(command):
    """command() as one of the replicas that torchrun or srun has started. With the first of them
    that fails, all end."""
    place = hosts.find()
    end_when_gone(STARTED_BY)  # torchrun, say, that is killed

    def job():
        # it waits in torch's C++, where no handler of Python's would run
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        GROUP.extend([place, *meet(place)])
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with silent(place.rank):
                command()
        except RuntimeError:
            time.sleep(2)  # has it lost another replica? The line then says so, and ends it
            raise

    failure = failure_of(job)
    if failure:
        erase_line()
    if GROUP:
        GROUP[2].leave(failure)
    elif isinstance(failure, str) and place.local_rank == 0:
        print(failure, file=sys.stderr, flush=True)
    if failure:
        end_at_once(failure)


def meet(place):
    """-> torch's store of the group, and its hosts.Line. ConnectionError where not all come."""
    where, patience = f"{place.address}:{place.port}", timedelta(seconds=hosts.MEETING)
    hosts.own_address(place)  # says at once what waiting would not help
    said = f"replica {place.rank} of {place.world} waits for the others at {where}"
    timer = threading.Timer(15, print, [said], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        found = dist.rendezvous("env://", place.rank, place.world, timeout=patience)
        store, _, _ = next(found)
        # torchrun --max-restarts may begin again with the same store
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"octprobe {attempt}", store)
        return store, hosts.Line(place, store)
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise ConnectionError(
            f"replica {place.rank} of {place.world} did not meet the others at {where} (MASTER_ADDR"
            f" and MASTER_PORT) within {hosts.MEETING} s: {reason}"
        ) from error
    finally:
        timer.cancel()


def join(main, cfg, backend, processes, place, store, line):
    """`launch` in a replica that torchrun or srun has started."""
    if processes != 1:
        raise ValueError(
            f"torchrun or srun has started {place.world} replicas, and device.processes={processes}"
            " would start more; set device.processes=1"
        )
    if backend == "xla":
        raise ValueError(
            "torchrun and srun are for GPUs and CPUs; on XLA, start this script by itself on every "
            "host, or set device.backend=cpu"
        )
    if backend == "cuda" and place.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK={place.local_rank}, but this process sees {torch.cuda.device_count()} "
            "GPUs; start at most one process for each (torchrun --nproc-per-node), and let every "
            "process see all GPUs of its host (Slurm: --gpus-per-node)"
        )
    name = hosts.interface(place)
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    # OMP_NUM_THREADS, which torchrun sets, is of each process
    share = 1 if "OMP_NUM_THREADS" in os.environ else place.local_world
    here = place.rank, place.world, place.local_rank, share
    run_in_group(main, cfg, backend, *here, store=store)


@dataclass
class ReplicaXla:
    """What xmp.spawn calls, in a thread of a child process.

    Its index counts the replicas of the host; rank() counts those of all hosts.
    """

    main: object
    cfg: object

    def __setstate__(self, state):
        # unpickled by the child's main thread, the only one that may say what SIGTERM does
        self.__dict__ = state
        end_with_parent()
        signal.signal(
            signal.SIGTERM,
            lambda *_: [event.set() for event in SIGTERM_EVENTS] or os._exit(128 + signal.SIGTERM),
        )

    def __call__(self, index):
        try:
            keep_programs(self.cfg)
            quietly(self.main, rank(), self.cfg)
        except Exception as error:
            if world() == 1:
                raise
            print(explain(error), file=sys.stderr, flush=True)
            os._exit(1)  # the others would wait for it in the next reduction


def keep_programs(cfg):
    """On a TPU, before anything is computed: programs are kept below paths.cache_dir when they have
    been compiled, so that the next start finds them. XLA_PERSISTENT_CACHE_PATH says another place.

    Each replica has a folder of its own, because torch_xla writes a file under its final name.
    """
    import torch_xla.runtime

    # the CPU's client writes such files, and cannot read them
    if "XLA_PERSISTENT_CACHE_PATH" in os.environ or torch_xla.runtime.device_type() != "TPU":
        return
    cache = files.local_folder(cfg.paths.cache_dir, "paths.cache_dir", must_write=False)
    folder = os.path.join(cache, "compiled", torch_xla.__version__, str(rank()))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:  # a cache that is for reading alone
        print(f"note: compiled programs are not kept: {error}", file=sys.stderr)
        return
    torch_xla.runtime.initialize_cache(folder, readonly=not os.access(folder, os.W_OK))


def watch_replicas():
    """In the parent on XLA: when a replica of this host has died, kill the others.

    They wait for it, and SIGTERM does not end them.
    """
    seen = set()
    while True:
        time.sleep(0.5)
        seen |= set(multiprocessing.active_children())
        if any(process.exitcode for process in seen):
            for process in seen:
                process.kill()


def quietly(main, rank, cfg):
    """main(rank, cfg), printing only on rank 0."""
    print_safely()
    with silent(rank):
        main(rank, cfg)


def silent(rank):
    """Within, nothing is printed, but on rank 0."""
    nowhere = open(os.devnull, "w")  # noqa: SIM115
    return contextlib.redirect_stdout(nowhere) if rank else contextlib.nullcontext()


# what torch and Python say with an error of the program's own kind, and what it means
SHORTAGES = {
    "can't start new thread": "the system starts no further thread",
    "can't allocate memory": "out of memory",
    "out of memory": "out of memory",
}
MORE_ROOM = (
    "allow this process more (ulimit -v, ulimit -u), or lower data.batch_size, data.prefetch, "
    "data.num_workers or device.processes"
)


def explain(error):
    """One sentence for what the user can mend; a traceback for the rest, and with python -X dev."""
    if isinstance(error, (ValueError, OSError)) and not sys.flags.dev_mode:
        if isinstance(error, OSError) and error.filename and error.strerror:
            return printable(f"error: {error.filename}: {error.strerror}")  # without "[Errno 2]"
        return printable(f"error: {error}")
    shortage = next((words for sign, words in SHORTAGES.items() if sign in str(error)), None)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and shortage):
        return f"error: {shortage or 'out of memory'}; {MORE_ROOM}"
    return "".join(traceback.format_exception(error)).rstrip()


def printable(text, keep="\n\t"):
    """The text, with all but letters, signs and what is to be kept as an escape such as \\x1b: an
    id or a name that was read must not move the terminal's cursor, or be no text at all."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def print_safely():
    """From now on nothing that is printed ends this process, whatever letters the terminal's
    encoding lacks, or gives the terminal an order."""
    sys.stdout.reconfigure(errors="backslashreplace")
    write = sys.stdout.write
    sys.stdout.write = lambda text: write(printable(text))


def run(command):
    """Call a script's command(): an error is one sentence and exit status 1, Ctrl-C is 130."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in place of begin.process
    print_safely()
    try:
        in_group(command) if hosts.find() else command()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        sys.exit(explain(error))
    except KeyboardInterrupt:
        erase_line()
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def erase_line():
    """Begin a new line on a terminal, where a replica that was killed may have left its progress
    line."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


SIGTERM_EVENTS = []  # of the replicas in this process


def sigterm():
    """An event that SIGTERM sets instead of ending the process: for a loop that saves first."""
    event = threading.Event()
    SIGTERM_EVENTS.append(event)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: event.set())
    return event


IS_ALONE = False  # see `alone`


@contextlib.contextmanager
def alone():
    """Within, each replica is the only one: it does all the work, and adds up with no other."""
    global IS_ALONE
    IS_ALONE = True
    try:
        yield
    finally:
        IS_ALONE = False


def rank_and_world():
    """Number of this replica, of all hosts', and how many there are."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if "torch_xla" in sys.modules:
        import torch_xla.runtime

        return torch_xla.runtime.global_ordinal(), torch_xla.runtime.world_size()
    return (GROUP[0].rank, GROUP[0].world) if GROUP else (0, 1)


def rank():
    """Number of this replica, of all hosts'."""
    return rank_and_world()[0]


def world():
    """Number of replicas, on all hosts."""
    return 1 if IS_ALONE else rank_and_world()[1]


# ---- devices


def get(backend):
    """The torch.device of this replica."""
    backend = choose(backend)
    if backend == "xla":
        import torch_xla.backends

        # a TPU would round float32 to bfloat16 before it multiplies; bfloat16 is not concerned
        logging.getLogger("torch_xla.backends").disabled = True  # it warns at the first time too
        torch_xla.backends.set_mat_mul_precision("highest")
        return torch_xla.device()
    if backend == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # glibc keeps freed tensors of up to 32 MB in a fragmented heap: a training step of the full
        # encoder would hold 5 GB in place of 2. M_MMAP_THRESHOLD (-3): tensors from 4 MB on are
        # given back to the system at once
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
    """The tensor on dev. A GPU copies it from page-locked memory while it still computes."""
    return tensor.pin_memory().to(dev, non_blocking=True) if dev.type == "cuda" else tensor.to(dev)


def autocast(dev, precision):
    """bf16 matrix products within; fp32 changes nothing."""
    return torch.autocast(dev.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def attention(q, k, v, chunk=512):
    """softmax(q k^T / sqrt(d)) v of q, k, v (B, heads, N, d), by the kernel of their device."""
    if q.device.type == "xla":
        if has_flash_attention():
            return attention_flash(q, k, v)
        # XLA would hold all N x N scores, 4 GB a sample and layer at 9216 tokens
        parts = [F.scaled_dot_product_attention(part, k, v) for part in q.split(chunk, dim=2)]
        return torch.cat(parts, dim=2)
    trains = torch.is_grad_enabled() and q.requires_grad
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not trains and not has_amx():
        return attention_bfloat16(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


@functools.cache
def has_flash_attention():
    """Is this a TPU, with jax beside torch_xla? Its flash attention is a Pallas kernel."""
    if importlib.util.find_spec("jax") is None:
        return False
    import torch_xla.runtime

    return torch_xla.runtime.device_type() == "TPU"


def attention_flash(q, k, v):
    """`attention` by the TPU's kernel, which takes whole blocks of tokens alone.

    torch_xla 2.9 fills the last block of keys with zeros that the softmax counts, and has no
    backward pass for a part of a block. So tokens are added here, which no other looks at.
    """
    import jax
    from torch_xla.experimental.custom_kernel import flash_attention

    # as in `get`, for the kernels of this pass and of its backward pass; they refuse it of bfloat16
    precision = "highest" if q.dtype == torch.float32 else None
    jax.config.update("jax_default_matmul_precision", precision)
    n = q.shape[2]
    # sizes that all of the kernel's blocks divide: 128, 256, 512, and multiples of 1024
    block = next((size for size in (128, 256, 512) if n <= size), 1024)
    segments, added = None, -n % block
    if added:
        q, k, v = (F.pad(x, (0, 0, 0, added)) for x in (q, k, v))
        # (B, N): tokens look at those of their own number
        segments = (torch.arange(n + added, device=q.device) >= n).int().expand(len(q), -1)
    scale = q.shape[-1] ** -0.5
    out = flash_attention(q, k, v, q_segment_ids=segments, kv_segment_ids=segments, sm_scale=scale)
    return out[:, :, :n] if added else out


@functools.cache
def has_amx():
    """Does this processor multiply tiles of bfloat16 (Intel AMX)? torch's own attention then takes
    half the time of attention_bfloat16, and elsewhere 1.6 times as long (docs/performance.md)."""
    # torch before 2.11 or so does not tell; there attention is slower, and as right
    return getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)


def attention_bfloat16(q, k, v, chunk=128):
    """`attention` in bfloat16 on processors without AMX, without a gradient: (B, heads, N, d) each.

    torch's own kernel multiplies bfloat16 no faster than float32 there; plain matrix products do.
    Each head is computed by one thread: threads that share every product would wait for each other
    hundreds of times a layer.
    """

    def head(q, k, v):  # each (N, d)
        # softmax cancels what all keys share, and a smaller score loses less to rounding
        k = (k.float() - k.float().mean(dim=0)).to(k.dtype).T.contiguous()  # (d, N)
        q, v, out = q * q.shape[-1] ** -0.5, v.contiguous(), torch.empty(v.shape, dtype=v.dtype)
        # allocated once, small enough for the cache
        scores = torch.empty(chunk, len(v), dtype=v.dtype)
        for part, result in zip(q.split(chunk), out.split(chunk)):
            s = torch.mm(part, k, out=scores[: len(part)])
            torch.mm(torch.softmax(s, dim=-1, out=s), v, out=result)
        return out

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        out = list(pool.map(head, *(x.flatten(0, 1) for x in (q, k, v))))  # B * heads of (N, d)
    torch.set_num_threads(threads)  # threads that start later would inherit a worker's 1
    return torch.stack(out).view(v.shape)  # (B, heads, N, d)


def checkpointing(dev):
    """f(module, *args) that computes the module's activations again in the backward pass."""
    if dev.type == "xla":
        from torch_xla.utils.checkpoint import checkpoint  # torch's own crashes there

        return checkpoint
    from torch.utils.checkpoint import checkpoint

    return functools.partial(checkpoint, use_reentrant=False)


def step_done(dev):
    """Mark the end of a step: XLA compiles and runs what was recorded."""
    if dev.type == "xla":
        import torch_xla

        torch_xla.sync()


# ---- between replicas


def share(rows, size):
    """This replica's rows of a global batch of `size` samples, padded with -1.

    rows: tensor (n,) of indices, n <= size. Row i of the batch belongs to replica i % world. The
    result has (ceil(size / world),) rows, whatever n is.
    """
    world_ = world()
    padded = torch.full((-(-size // world_) * world_,), -1)
    padded[: len(rows)] = rows
    return padded[rank() % world_ :: world_]


def all_sum(tensor):
    """Sum of the replicas' tensors, with the same bits in every replica.

    Rows that are zero in all replicas but one are gathered exactly.
    """
    if world() == 1:
        return tensor
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor
    import torch_xla.core.xla_model as xm

    return xm.all_reduce(xm.REDUCE_SUM, tensor)


def all_sum_gradients(parameters):
    """Sum the replicas' gradients in one reduction; the loss must divide by the whole batch."""
    if world() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients[0].device.type == "xla":
        import torch_xla.core.xla_model as xm

        xm.all_reduce(xm.REDUCE_SUM, gradients)  # in place, one reduction, without copies of them
        return
    total = all_sum(torch.cat([g.flatten() for g in gradients]))
    for gradient, part in zip(gradients, total.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


def gather(value, dev):
    """[value of replica 0, of replica 1, ...] in every replica; value: anything that JSON can hold.

    By sums of padded rows alone: torch_xla's own gathering of objects compiles another program in
    every replica.
    """
    if world() == 1:
        return [value]
    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.int32)

    def rows_of_all(row):  # (n,) -> (world, n)
        table = torch.zeros(world(), len(row), dtype=torch.int32)
        table[rank()] = row
        return all_sum(table.to(dev)).cpu().tolist()

    lengths = [length for (length,) in rows_of_all(torch.tensor([len(text)]))]
    padded = torch.zeros(max(lengths), dtype=torch.int32)
    padded[: len(text)] = text
    rows = zip(rows_of_all(padded), lengths)
    return [json.loads(bytes(row[:length])) for row, length in rows]


def agree(what, dev):
    """ValueError, in every replica, that names what differs between them. what: {name: text}."""
    of_all = gather({name: files.hashed(text)[:16] for name, text in what.items()}, dev)
    for name, hashed in of_all[0].items():
        others = [rank for rank, found in enumerate(of_all) if found.get(name) != hashed]
        if others:
            raise ValueError(
                f"{name} differs between the replicas: replica {others[0]} of {world()} has "
                "another than replica 0; start all hosts with the same"
            )


def any_replica(value, dev):
    """Is value true in any replica? The same answer in all."""
    return value if world() == 1 else bool(all_sum(torch.tensor(float(value), device=dev)).item())


def barrier(dev):
    """Wait until every replica is here."""
    gather(None, dev)


# ---- saving


def to_host(value):
    """Nested dicts, lists and tuples with their tensors on the CPU, to be loaded on any backend."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {k: to_host(v) for k, v in value.items()}
    return type(value)(to_host(v) for v in value) if isinstance(value, (list, tuple)) else value
