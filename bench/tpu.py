"""The programs of a TPU v4-32 for the full-size encoder, compiled by the TPU's own compiler,
libtpu, without a TPU.

    .venv-xla/bin/python bench/tpu.py                        # make test-tpu-compile: three minutes
    .venv-xla/bin/python bench/tpu.py --attention chunks     # without the flash kernel: 15 minutes
    .venv-xla/bin/python bench/tpu.py --part_of_chip core    # for one of a chip's two cores
    .venv-xla/bin/python bench/tpu.py --blocks scan          # `scanned`: FLOP, bytes of one block

features.begin and train.fit run as in one of 16 replicas, with one volume in bf16 at a time, but
nothing is computed: where torch_xla would run what was recorded, its program is written down, and
every tensor becomes zeros of its shape. They run on torch_xla's CPU device; the flash kernel is
lowered for the TPU. libtpu then compiles the programs for 16 chips of topology v4:2x2x4, each with
both cores ("megacore", as a pod runs).

FLOP and bytes are the compiler's own count, in which the backward kernels' products are missing:
these are added. "Read again" is computed from the kernels' block sizes: a kernel reads keys and
values once for every block of queries, or the other way round, and the compiler counts them once.
The time is the least that a chip's published figures allow. Tensors: all that live on the chip
meanwhile. Outputs that replace inputs are counted twice, which torch_xla would not need.
"""

import contextlib
import functools
import gc
import json
import os
import re
import tempfile
import time
from types import SimpleNamespace

os.environ |= {"PJRT_DEVICE": "CPU", "JAX_PLATFORMS": "cpu"}
# for libtpu: there is no TPU to ask for its settings, and others may use libtpu too
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import numpy as np  # noqa: E402
import torch  # noqa: E402
from fullsize import DIM, SIZE, TOKENS, build  # noqa: E402
from measure import apart, bench, figure, row  # noqa: E402
from probing import features_of  # noqa: E402

import config  # noqa: E402
import device  # noqa: E402
import features  # noqa: E402
import files  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402

REPLICAS, TOPOLOGY = 16, "v4:2x2x4"
PEAK, BANDWIDTH, MEMORY = 275e12, 1.2e12, 32e9  # of a v4 chip, by its data sheet
HEADS, LANES = 12, 128  # the kernels' arrays are padded to 128 lanes
# before the flash kernel, in CPU seconds; on shared cores a step took 130 in place of 86
CHUNKS_TOOK, BUSY = {"encode": 85, "step": 350}, 2

JOBS = {  # beside configs/finetune.yaml, and the programs in the order in which they are first run
    "encode": ([], ["encode"]),
    "step": (
        ["model.freeze_encoder=false", "model.unfreeze_at_epoch=-1"],
        ["zeros", "step: forward, backward", "step: reduce, clip, AdamW"],
    ),
    "head": ([], ["zeros", "head: forward, backward", "head: reduce, clip, AdamW"]),
}
STEPS = 2  # that are looked at: the first might differ from the later ones


# ---- tracing


class Enough(Exception):
    """All steps have been seen."""


def trace(rank, cfg):
    """A job in a replica: write its programs, and the order in which they would run, below
    cfg.paths.run_dir."""
    import torch_xla
    import torch_xla.core.xla_model as xm
    import torch_xla.debug.metrics as metrics

    pretend_pod(cfg.attention)
    if cfg.blocks == "scan":
        model.ViT3D.forward = scanned
    job, order, texts, run = cfg.log.run_name, [], [], torch_xla.sync

    def sync():
        text, live = own_program(xm.get_stablehlo())
        if text and text not in texts:
            texts.append(text)
            files.write(f"{cfg.paths.run_dir}/{job}{len(texts)}.mlir", text)
        if text:
            order.append([texts.index(text), live])
            if len(order) == cfg.expected:
                raise Enough
            forget()
        run()  # nothing is left to be run, if no tensor was overlooked
        assert not metrics.metric_data("CompileTime")

    torch_xla.sync = sync
    with contextlib.suppress(Enough):
        run_job(job, cfg, device.get("xla"))
    files.write(f"{cfg.paths.run_dir}/{job}.json", json.dumps(order))


def pretend_pod(attention):
    """Make torch_xla and device.py take this for a replica of 16 on a TPU."""
    import jax
    import jax._src.tpu_custom_call
    import jax.experimental.pallas  # noqa: F401
    import torch_xla.experimental.custom_kernel as kernels
    import torch_xla.runtime

    torch_xla.runtime.world_size = lambda: REPLICAS
    if attention == "flash":
        torch_xla.runtime.device_type = lambda: "TPU"
    # the version of the kernel's text that this libtpu reads; on a TPU, jax asks libtpu for its age
    jax._src.tpu_custom_call.get_ir_version = lambda context: 7
    jit, trace_pallas = jax.jit, kernels.trace_pallas

    def jit_for_tpu(kernel, **named):
        jax.jit = jit
        traced = jit(kernel, **named).trace
        lower = lambda *args, **more: traced(*args, **more).lower(lowering_platforms=("tpu",))
        return SimpleNamespace(lower=lower)

    def trace_for_tpu(*args, **named):
        jax.jit = jit_for_tpu  # for the first call alone, which is trace_pallas' own
        try:
            return trace_pallas(*args, **named)
        finally:
            jax.jit = jit

    kernels.trace_pallas = trace_for_tpu


def scanned(self, volume, noise=None):
    """model.ViT3D.forward with torch_xla's scan over the blocks, so that a single block is
    compiled. What is computed again in the backward pass is chosen by functorch's min-cut."""
    from functorch.compile import default_partition, min_cut_rematerialization_partition
    from torch_xla.experimental.scan import scan

    x = self.patch_embed(volume) + self.pos_embed
    blocks = [dict(block.named_parameters()) for block in self.blocks]
    each = {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}
    if self.training:
        shares = [self.drop_path * (i + 1) / len(blocks) for i in range(len(blocks))]
        keep = [noise.keep(share, (2, 1, 1), layer=i) for i, share in enumerate(shares)]
        # (depth, B, 2, 1, 1) -> (depth, 2, B, 1, 1)
        each["keep"] = torch.stack(keep).transpose(1, 2).to(x.device, x.dtype)

    def one(x, given):
        parameters = {name: value for name, value in given.items() if name != "keep"}
        args = x, given.get("keep")
        return torch.func.functional_call(self.blocks[0], parameters, args), None

    partition = min_cut_rematerialization_partition if self.training else default_partition
    return self.norm(scan(one, x, each, partition_fn=partition)[0])


def forget():
    """Every tensor on the device becomes zeros that lie there, whatever was to be computed."""
    kinds = torch.Tensor, torch.nn.Parameter  # no fake ones, which scan leaves behind
    found = [o for o in gc.get_objects() if type(o) in kinds and o.device.type == "xla"]
    found += [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]
    for tensor in {id(tensor): tensor for tensor in found}.values():
        tensor.data = zeros(tensor.shape, tensor.dtype).to(tensor.device)


@functools.cache
def zeros(shape, dtype):
    return torch.zeros(shape, dtype=dtype)


def own_program(text):
    """A StableHLO module of all live tensors -> what a run of it would compile, as text ("": it
    would not run), and the live tensors' bytes.

    Tensors that are merely passed through are left out. Inputs are numbered in the order of their
    use, and functions in that of their calls, so that the same program is the same text.
    """
    head = re.search(r"^  func\.func @main\((.*)\) -> .* \{$", text, re.M)
    if not head:
        return "", 0
    kinds = dict(argument.split(": ") for argument in head[1].split(", ") if argument)
    body, returned, types, end = re.fullmatch(
        r"(.*?)^    return (.*?) : (.*?)$(.*)", text[head.end() :], re.M | re.S
    ).groups()
    results = [
        pair for pair in zip(returned.split(", "), types.split(", ")) if pair[0] not in kinds
    ]
    if not results:
        return "", 0
    results.sort(key=lambda pair: [int(n) for n in re.findall(r"\d+", pair[0])])
    names, types = map(", ".join, zip(*results))
    numbers = {}
    body = re.sub(r"%arg\d+\b", lambda m: f"%arg{numbers.setdefault(m[0], len(numbers))}", body)
    inputs = ", ".join(f"%arg{n}: {kinds[name]}" for name, n in numbers.items() if name in kinds)
    signature = f"  func.func @main({inputs}) -> ({types}) {{"
    start = re.sub(r"@IrToHlo\.\d+", "@program", text[: head.start()])
    whole = f"{start}{signature}{body}    return {names} : {types}{end}"
    called = list(dict.fromkeys(re.findall(r"@[a-zA-Z]+\.\d+\b", whole)))  # by scan
    whole = re.sub(r"@[a-zA-Z]+\.\d+\b", lambda m: f"@called{called.index(m[0])}", whole)
    return whole, sum(map(size_of, kinds.values()))


def size_of(kind):
    """Bytes of "tensor<2x3xbf16>"."""
    *shape, dtype = kind.removeprefix("tensor<").removesuffix(">").split("x")
    return int(np.prod([int(n) for n in shape])) * max(1, int(re.sub(r"\D", "", dtype)) // 8)


def run_job(job, cfg, dev):
    """The project's own functions, until Enough."""
    module = build(cfg.depth)
    if job == "encode":
        module = module.to(dev)
        device.step_done(dev)
        for _ in range(STEPS):
            features.begin(cfg, module, torch.zeros(1, *SIZE, dtype=torch.float16), dev)
    train.volumes_of = lambda cfg, samples, steps, encoder, epoch: (
        torch.zeros(len(indices), 1, *SIZE, dtype=torch.float16)
        for step in steps
        for _, indices in step
    )
    parts = [features_of(torch.zeros(n, DIM), np.arange(n) % 4) for n in (743, 159)]
    train.fit(cfg, 0, *parts, dev, features.Encoder(module, SIZE, "0" * 64))


# ---- compiling


def compile_alone(path, part_of_chip):
    """-> figures of a program that libtpu compiles for 16 replicas."""
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir
    from jax.experimental import topologies

    named = {"chip_config_name": "megacore"} if part_of_chip == "chip" else {}
    found = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY, **named).devices
    chips = [one for one in found if one.core_on_chip == 0]
    assert len(chips) == REPLICAS and len(found) == (16 if part_of_chip == "chip" else 32)
    with mlir.make_ir_context(), open(path, encoding="utf-8") as f:
        code = mlir.module_to_bytecode(ir.Module.parse(f.read()))
    options = xla_client.CompileOptions()
    options.num_replicas = REPLICAS
    assignment = np.array([[chip.id] for chip in chips])
    options.device_assignment = xla_client.DeviceAssignment.create(assignment)
    began = time.process_time()
    done = chips[0].client.compile(code, xla_client.DeviceList(tuple(chips)), options)
    took, memory, cost = time.process_time() - began, done.get_compiled_memory_stats(), {}
    for part in [done.cost_analysis()]:
        cost |= part[0] if isinstance(part, list) else part
    return {
        "flop": cost["flops"],
        "bytes": cost["bytes accessed"],
        "temporary": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "took": took,
    }


def of_kernels(name, depth):
    """FLOP that the compiler does not count, and bytes that the flash kernels read again."""
    from torch_xla.experimental.custom_kernel import FlashAttention

    size = FlashAttention.DEFAULT_BLOCK_SIZES
    again = lambda block: TOKENS / size[block] - 1
    matrix, sums = TOKENS * LANES * 2, TOKENS * LANES * 4  # of one head
    forward = again("block_q") * 2 * matrix  # k, v
    if name == "encode":
        return 0, depth * HEADS * forward
    # of the queries' gradient: 3 products, k and v again; of those of keys and values: 4 products,
    # q, the output's gradient and three sums again
    backward = again("block_q_dq") * 2 * matrix
    backward += again("block_k_major_dkv") * (2 * matrix + 3 * sums)
    return depth * 14 * TOKENS**2 * DIM, depth * HEADS * (2 * forward + backward)


# ---- the table and the requirements


def traced(job, attention, blocks, depth, folder):
    """-> (path of the program, bytes of live tensors) by name."""
    settings, names = JOBS[job]
    more = f"""train.precision=bf16 model.emb_dim={DIM} log.wandb=disabled log.run_name={job}
        train.choose_by=balanced_accuracy device.backend=xla paths.run_dir={folder}""".split()
    cfg = config.load(["configs/base.yaml", "configs/finetune.yaml"], [*more, *settings])
    micro_batches = {"encode": 0, "step": cfg.data.batch_size // REPLICAS, "head": 1}[job]
    of_step = [*[1] * micro_batches, 2] if micro_batches else [0]
    expected = [*[0] * bool(micro_batches), *of_step * STEPS]
    cfg.expected = len(expected)
    cfg.attention, cfg.blocks, cfg.depth = attention, blocks, depth
    apart(device.launch, trace, cfg)
    with open(f"{folder}/{job}.json", encoding="utf-8") as f:
        order = json.load(f)
    is_same = [number for number, _ in order] == expected
    figure(f"{job}: each of {STEPS} steps is the same programs", is_same, at_least=1)
    live = {names[number]: size for number, size in order}
    paths = {name: f"{folder}/{job}{n}.mlir" for n, name in enumerate(names, 1)}
    return {name: (paths[name], live[name]) for name in names if name != "zeros"}


def programs(depth=12, attention="flash", blocks="apart", part_of_chip="chip"):
    share = 1 if part_of_chip == "chip" else 2
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for job in JOBS:
            paths = traced(job, attention, blocks, depth, folder)
            for name, (path, live) in paths.items():
                [found[name]] = apart(compile_alone, path, part_of_chip)
                found[name]["live"] = live
    columns = """TFLOP, GB accessed, GB read again, GB temporary, GB of tensors, MB of code, CPU
        seconds to compile, ms for FLOP, ms for bytes, bound by"""
    row(f"one v4 {part_of_chip}", *" ".join(columns.split()).split(", "))
    for name, one in found.items():
        uncounted, again = 0, 0
        if attention == "flash" and not name.startswith("head") and "AdamW" not in name:
            uncounted, again = of_kernels(name, depth)
        flop = one["flop"] + uncounted
        times = [1e3 * share * t for t in (flop / PEAK, (one["bytes"] + again) / BANDWIDTH)]
        cells = flop / 1e12, one["bytes"] / 1e9, again / 1e9, one["temporary"] / 1e9
        cells = *cells, one["live"] / 1e9, one["code"] / 1e6, one["took"], *times
        bound = "matrix units" if times[0] > times[1] else "memory"
        row(name, *(f"{n:.3g}" for n in cells), bound)
        held = sum(one[part] for part in ("temporary", "live", "outputs", "code"))
        figure(f"{name}: share of memory", held * share / MEMORY, at_most=0.5)
    is_whole = attention == "flash" and blocks == "apart" and depth == 12
    for job, most in (("encode", 15), ("step", 65)):
        parts = [one for name, one in found.items() if name.startswith(job)]
        gb, took = sum(one["bytes"] for one in parts) / 1e9, sum(one["took"] for one in parts)
        longest = BUSY * CHUNKS_TOOK[job] / 4 if is_whole else None
        figure(f"{job}: GB accessed", gb, at_most=most if is_whole else None)
        figure(f"{job}: CPU seconds to compile", took, at_most=longest)


if __name__ == "__main__":
    bench(__doc__, programs=programs)
