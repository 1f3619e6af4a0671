"""What a TPU pod would do, as far as it can be seen without one: the step of 16 replicas, with its
reduction, the TPU's attention kernel, and the programs kept for the next start.
Runs in .venv-xla (make test-xla)."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from helpers import DEMO, ROOT, settings

pytest.importorskip("torch_xla", reason="needs torch_xla: make test-xla")
pytest.importorskip("jax", reason="needs jax, which torch_xla[pallas] brings: make test-xla")

ENVIRONMENT = {
    **os.environ,
    "PJRT_DEVICE": "CPU",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": ROOT,
    "OMP_NUM_THREADS": "1",
}
NO_START = "train.choose_by=balanced_accuracy"  # without epoch 0, which takes no step


def run(*script, **more):
    """python script -> what it printed; it must end well."""
    environment = {**ENVIRONMENT, **more}
    command = [sys.executable, *map(str, script)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------ 16 replicas that really reduce

TUNE = [
    "model.freeze_encoder=false",
    "model.drop_path=0.1",
    "model.head.hidden=8",
    "model.head.dropout=0.2",
    "train.lr_encoder=1e-3",
    "train.grad_clip=1",
    "train.micro_batch=2",
    "data.augment.flip=true",
]


@pytest.fixture(scope="module")
def features_file(written, tmp_path_factory):
    """Folder with features.pkl: those of training and of validation, by the plain CPU run."""
    import torch

    import config
    import features
    import ledger

    folder = tmp_path_factory.mktemp("pod")
    cfg = config.load(DEMO, [*settings(written, folder), "device.backend=cpu"])
    book, encoder = ledger.read(cfg), features.open_encoder(cfg)
    found = features.encode_for_training(cfg, book, encoder, torch.device("cpu"))
    (folder / "features.pkl").write_bytes(pickle.dumps(found))
    return folder


@pytest.mark.parametrize("overrides", [[], TUNE], ids=["head", "fine-tuning"])
def test_sixteen_replicas_take_the_step_of_one_process(written, features_file, overrides):
    """Steps of 37 and of the other 21 volumes: 11 and 27 rows of the 48 are padding."""
    more = [NO_START, "device.backend=cpu", "data.batch_size=37", *overrides]
    run("tests/replicas.py", features_file, DEMO, *settings(written, features_file), *more)
    steps = pickle.loads((features_file / "steps.pkl").read_bytes())
    for step in steps:
        plain, pod = step["plain"], step["pod"]
        assert len(step["programs"]) == 16 and len(set(step["programs"])) == 1
        assert '"stablehlo.all_reduce"' in step["programs"][0]
        assert "[DEFAULT" not in step["programs"][0]  # products that a TPU would round to bfloat16
        # AdamW may count its steps on the host
        assert set(pod) <= set(plain) and all(n.endswith(" step") for n in set(plain) - set(pod))
        scale = max(np.abs(plain[name]).max() for name in plain if "gradient" in name)
        for name, values in pod.items():  # (16, ...)
            if name in ("losses", "norms", "seen"):  # each replica has its share
                relative = np.abs(values.sum(axis=0) - plain[name]) / np.abs(plain[name]).max()
                assert relative.max() <= 1e-5, name
            elif "direction" not in name:  # of a zero gradient, AdamW's is the sign of a rounding
                most = 1e-5 * scale if "gradient" in name else 1e-5
                assert np.abs(values - plain[name]).max() <= most, name
                assert (values == values[0]).all(), name
    for name in steps[0]["plain"]:
        if "weight" in name:  # what was compared has moved
            change = np.abs(steps[1]["plain"][name] - steps[0]["plain"][name]).max()
            assert change > 1e-4, name
    # and without the reduction, they would be of each replica's own share
    for name, values in steps[0]["alone"].items():
        if "weight" in name:
            assert np.abs(values - steps[0]["plain"][name]).max() > 1e-4, name
    assert max(len(set(map(bytes, v))) for v in steps[0]["alone"].values()) == 16


# ------------------------------------------------------------------------- the TPU's own attention


@pytest.fixture()
def interpreted(monkeypatch):
    """device.attention as on a TPU: torch_xla prepares its flash attention kernel, and Pallas's
    interpret mode stands in for the TPU that would run it."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    import jax.numpy as jnp
    import torch
    import torch_xla
    import torch_xla.experimental.custom_kernel as custom_kernel
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds

    import device

    traced = []

    def trace_pallas(
        kernel, *args, static_argnums=None, static_argnames=None, use_cache=0, **named
    ):
        traced.append((kernel, args, named))
        return "the kernel's code", [x for x in args if torch.is_tensor(x)]

    def to_jax(x):
        return jnp.asarray(x.detach().cpu().float().numpy()).astype(str(x.dtype).split(".")[1])

    def custom_call(args, code, shapes, dtypes):
        kernel, given, named = traced.pop()

        def value(x):
            if isinstance(x, SegmentIds):  # shapes alone; the numbers come with the call
                q, kv = (to_jax(arg) for arg in args if arg.dtype == torch.int32)
                return SegmentIds(q[:, :, 0], kv[:, 0])  # (B, N, 128), (B, 8, N) -> (B, N) each
            return to_jax(x) if torch.is_tensor(x) else x

        with pltpu.force_tpu_interpret_mode():
            found = kernel(*map(value, given), **named)
        found = [
            x for x in (found if isinstance(found, (tuple, list)) else [found]) if x is not None
        ]
        outputs = []
        for x, shape, dtype in zip(found, shapes, dtypes, strict=True):
            x = torch.from_numpy(np.array(x.astype(jnp.float32)))
            x = (
                x.expand(tuple(shape))
                if x.ndim == len(shape)
                else x[..., None].expand(tuple(shape))
            )
            outputs.append(x.to(dtype).to(args[0].device))
        return outputs

    monkeypatch.setattr(custom_kernel, "trace_pallas", trace_pallas)
    monkeypatch.setattr(torch_xla._XLAC, "_xla_tpu_custom_call", custom_call)
    monkeypatch.setattr(device, "has_flash_attention", lambda: True)
    yield
    assert not traced


@pytest.mark.parametrize(
    "shape, kind",
    [
        ((3, 2, 64, 64), "float32"),  # the tests' encoder
        ((1, 1, 300, 80), "float32"),  # less than the kernel's block
        ((1, 1, 512, 64), "float32"),  # whole blocks
        ((2, 1, 600, 64), "float32"),  # a part of a second one
        ((2, 1, 600, 64), "bfloat16"),
    ],
    ids=str,
)
def test_the_tpus_kernel_is_plain_attention(interpreted, shape, kind):
    """At any number of tokens; torch_xla alone counts the zeros that fill its last block."""
    import torch
    import torch_xla

    import device

    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(getattr(torch, kind)) for _ in range(4)]
    results = []
    for dev, attention in (
        ("cpu", torch.nn.functional.scaled_dot_product_attention),
        (torch_xla.device(), device.attention),
    ):
        *qkv, direction = (x.float().clone() if dev == "cpu" else x.to(dev) for x in values)
        for x in qkv:
            x.requires_grad_()
        out = attention(*qkv)
        out.backward(direction)
        results.append([x.detach().cpu().float() for x in (out, *(y.grad for y in qkv))])
    for plain, flash in zip(*results):
        assert plain.shape == flash.shape
        most = 1e-5 if kind == "float32" else 1e-2 * plain.abs().max()
        assert (plain - flash).abs().max() <= most


COMPILED = """
import json
import torch, torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.experimental.custom_kernel as custom_kernel
import jax, jax.experimental.pallas, jax._src.tpu_custom_call
from jax._src.interpreters import mlir
from jax._src.lib import xla_client
from jax._src.lib.mlir import ir
from jax.experimental import topologies
import device
# the newest that libtpu 0.0.21 reads; on a TPU's host, jax asks libtpu for its age
jax._src.tpu_custom_call.get_ir_version = lambda ctx: 7
def trace_pallas(kernel, *args, static_argnums=None, static_argnames=None, use_cache=0, **named):
    given = [custom_kernel.to_jax_shape_dtype_struct(x) if torch.is_tensor(x) else x for x in args]
    jitted = jax.jit(kernel, static_argnums=static_argnums, static_argnames=static_argnames)
    precisions.add(jax.config.jax_default_matmul_precision)
    lowered = jitted.trace(*given, **named).lower(lowering_platforms=("tpu",))
    return custom_kernel._extract_backend_config(lowered.compiler_ir()), None
custom_kernel.trace_pallas = trace_pallas
device.has_flash_attention = lambda: True
place = topologies.get_topology_desc(platform="tpu", topology_name="v4:2x2x4").devices[0]
for kind, tokens in (("bfloat16", 64), ("bfloat16", 600), ("float32", 64)):
    zeros = torch.zeros(2, 2, tokens, 64, dtype=getattr(torch, kind))
    q, k, v = (zeros.to("xla").requires_grad_() for _ in range(3))
    precisions = set()
    out = device.attention(q, k, v)
    out.sum().backward()
    program = xm.get_stablehlo([out, q.grad, k.grad, v.grad])
    with mlir.make_ir_context():
        module = mlir.module_to_bytecode(ir.Module.parse(program))
    devices, options = xla_client.DeviceList((place,)), xla_client.CompileOptions()
    place.client.compile(module, devices, options)
    kernels = program.count("tpu_custom_call")
    print("COMPILED", json.dumps([kind, tokens, kernels, *precisions]))
"""


def test_googles_compiler_takes_the_kernel_at_any_number_of_tokens():
    """Forward, and the two kernels of the backward pass, for one core of a v4. In float32 they
    multiply in float32."""
    pytest.importorskip("libtpu", reason="needs libtpu, which torch_xla[tpu] brings")
    of_no_tpu = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    printed = run("-c", COMPILED, **of_no_tpu).splitlines()
    found = [json.loads(line.split(" ", 1)[1]) for line in printed if "COMPILED" in line]
    of_bfloat16 = [["bfloat16", tokens, 3, None] for tokens in (64, 600)]
    assert found == [*of_bfloat16, ["float32", 64, 3, "highest"]]


# ------------------------------------------------------------------------ programs that are kept


def test_a_tpu_keeps_its_programs_for_the_next_start(monkeypatch, tmp_path, capsys):
    import torch_xla
    import torch_xla.runtime

    import config
    import device

    calls = []
    monkeypatch.delenv("XLA_PERSISTENT_CACHE_PATH", raising=False)
    monkeypatch.setattr(torch_xla.runtime, "device_type", lambda: "TPU")
    monkeypatch.setattr(
        torch_xla.runtime, "initialize_cache", lambda *a, readonly: calls.append((*a, readonly))
    )
    cfg = config.load(DEMO, [f"paths.cache_dir={tmp_path}/cache"])
    replica = device.ReplicaXla(lambda rank, cfg: calls.append(("main", rank)), cfg)
    replica(0)
    kept = f"{tmp_path}/cache/compiled/{torch_xla.__version__}/0"
    assert calls == [(kept, False), ("main", 0)] and os.path.isdir(kept)

    calls.clear()
    cfg.paths.cache_dir = f"{tmp_path}/readonly"
    os.makedirs(cfg.paths.cache_dir)
    (tmp_path / "readonly" / "compiled").touch()  # in place of what root may write nevertheless
    replica(0)
    assert calls == [("main", 0)]
    assert "note: compiled programs are not kept:" in capsys.readouterr().err

    calls.clear()
    monkeypatch.setenv("XLA_PERSISTENT_CACHE_PATH", "/yours")
    replica(0)
    assert calls == [("main", 0)]


KEPT = """
import json, sys
import torch_xla.debug.metrics as met
import config, train
train.main(0, config.load("configs/demo.yaml", sys.argv[1:]))
names = "PersistentCacheMiss", "PersistentCacheDeserializeFailure"
counts = [met.counter_value(name) or 0 for name in names]
print("KEPT", json.dumps([met.metric_data("CompileTime")[0], *counts]))
"""


def test_a_second_start_asks_for_the_programs_of_the_first(written, tmp_path):
    """So that on a TPU it compiles none. torch_xla's CPU client writes programs, and does not
    support to read them again: a program that was found counts as a failure to read it."""
    found = []
    for start in ("first", "second"):
        more = [NO_START, "model.freeze_encoder=false", "train.epochs=1", "data.batch_size=13"]
        more += ["device.backend=xla", "train.micro_batch=13"]
        folder = tmp_path / start  # nothing but the programs is kept
        kept = f"{tmp_path}/programs"
        named = {
            "XLA_PERSISTENT_CACHE_PATH": kept,
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        }
        printed = run("-c", KEPT, *settings(written, folder), *more, **named)
        found.append(json.loads(printed.split("KEPT")[1]))
    (compiled, missing, _), second = found
    assert compiled > 5 and missing == compiled == len(os.listdir(kept))
    assert second == [compiled, 0, compiled]
