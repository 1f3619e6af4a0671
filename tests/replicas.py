"""The training loop in 16 replicas: torch_xla traces each one's step, jax's CPU client executes it.

    python tests/replicas.py FOLDER CONFIG OVERRIDES...

torch_xla's own CPU client deadlocks in a reduction of many replicas. So train.fit runs in 16
threads, each with the rank and the share of a batch that it has on a pod. What a replica computes
by itself is executed by torch_xla. The program of a step, which holds the reduction, is taken as
StableHLO, compiled by jax for 16 replicas and executed on the inputs that torch_xla holds for it.
Its results are given back to torch_xla, and the loop goes on to the next step.

FOLDER has features.pkl: what train.fit takes. steps.pkl is written there, of each step: `plain`,
what one process makes of it in plain PyTorch; `pod`, what the 16 replicas make of it, {name:
values} each, and of the first step `alone`, what each makes of it where nothing is added up;
`programs`, a text for each replica. test_tpu.py runs this, as a process of its own.
"""

import os
import pickle
import sys
import threading
import traceback

REPLICAS, STEPS = 16, 2
os.environ["CPU_NUM_DEVICES"] = str(REPLICAS)
# of jax's CPU devices; programs are compiled quickly, not to run quickly
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={REPLICAS} --xla_backend_optimization_level=0"
)
os.environ["XLA_NO_SPECIAL_SCALARS"] = "1"  # as device.launch sets it

import numpy as np  # noqa: E402
import torch  # noqa: E402

import config  # noqa: E402
import device  # noqa: E402
import features  # noqa: E402
import train  # noqa: E402

FOLDER, CONFIG, *OVERRIDES = sys.argv[1:]


class Enough(Exception):
    """So many steps were taken."""


class Replica(threading.local):
    """What a thread is asked to do after a step, and the gradients of the step, summed over
    replicas and not yet clipped."""

    after_step, gradients = None, ()


REPLICA = Replica()
all_sum_gradients_, step_done_ = device.all_sum_gradients, device.step_done


def all_sum_gradients(parameters):
    all_sum_gradients_(parameters)
    REPLICA.gradients = [p.grad.clone() for p in parameters]


def step_done(dev):
    """In place of device.step_done: REPLICA.after_step(state) after a step."""
    if not REPLICA.gradients:
        return step_done_(dev)
    of_fit = sys._getframe(1).f_locals  # train.fit's own names
    state = state_after_step(of_fit["optimizer"], of_fit["summary"])
    REPLICA.gradients = ()
    return REPLICA.after_step(state)


def state_after_step(optimizer, summary):
    """{name: tensor} of all that a step writes."""
    trained = optimizer.trained()
    found = {f"gradient {i}": gradient for i, gradient in enumerate(REPLICA.gradients)}
    found |= {f"weight {i}": p for i, p in enumerate(trained)}
    found |= {f"emptied {i}": p.grad for i, p in enumerate(trained)}
    found |= {f"direction {i}": p for i, p in enumerate(optimizer.directions)}
    for group in optimizer.adamw.param_groups:
        for p in group["params"]:
            for name, value in optimizer.adamw.state.get(p, {}).items():
                found[f"adamw {len(found)} {name}"] = value
    return found | {name: vars(summary)[name] for name in ("losses", "norms", "seen")}


def fit(dev, after_step):
    """train.fit until after_step, which takes the state after a step, raises Enough."""
    REPLICA.after_step = after_step
    cfg = config.load(CONFIG, OVERRIDES)
    with open(f"{FOLDER}/features.pkl", "rb") as f:
        train_set, val_set = pickle.load(f)
    encoder = None if cfg.model.freeze_encoder else features.open_encoder(cfg)
    try:
        train.fit(cfg, cfg.seed, train_set, val_set, dev, encoder)
    except Enough:
        return
    raise RuntimeError(f"training ended before step {STEPS}")


# --------------------------------------------------------------------------- one plain process


def plain():
    """-> [{name: array}] after each step in plain PyTorch."""
    steps = []

    def after_step(state):
        steps.append({name: value.detach().numpy().copy() for name, value in state.items()})
        if len(steps) == STEPS:
            raise Enough

    fit(torch.device("cpu"), after_step)
    return steps


# --------------------------------------------------------------------------- 16 replicas

BATON = threading.Lock()  # one traces at a time, for all share torch's generator of random numbers
MEETING = threading.Barrier(REPLICAS)
TRACED = {}  # rank: (program, inputs of the program, names of its outputs, {name: other values})
EXECUTED = []  # of each step {"pod": ..., "programs": ..., "alone": ...}


def pod_replica(rank):
    """What xmp.spawn calls in each of 16 threads."""
    with BATON:
        try:
            fit(device.get("xla"), after_step_of_replica)
        except Exception:
            traceback.print_exc()  # with that of the others, who would wait for this one
            MEETING.abort()
            raise
    if rank == 0:
        with open(f"{FOLDER}/pod.pkl", "wb") as f:
            pickle.dump(EXECUTED, f)


def after_step_of_replica(state):
    import torch_xla.core.xla_model as xm

    state = {name: value for name, value in state.items() if value.device.type == "xla"}
    # what a step sums up may be computed before its last program
    done = [name for name in ("losses", "norms", "seen") if not is_pending(state[name])]
    others = {name: state[name].cpu().numpy() for name in done}
    pending = {name: value for name, value in state.items() if name not in others}
    outputs = list(pending.values())
    program = xm.get_stablehlo(outputs)
    _, inputs = xm.torch_xla._XLAC._get_tensors_xla_device_data_node(outputs)
    rank = device.rank()
    TRACED[rank] = program, [value.cpu().numpy() for value in inputs], list(pending), others
    BATON.release()
    try:
        MEETING.wait()
        if rank == 0:
            EXECUTED.append(execute())
        MEETING.wait()
    finally:
        BATON.acquire()
    pod = EXECUTED[-1]["pod"]
    with torch.no_grad():
        for name, value in pending.items():
            value.copy_(torch.as_tensor(pod[name][rank]))
    if len(EXECUTED) == STEPS:
        raise Enough
    # torch_xla must have nothing left to reduce: it would deadlock
    assert "all_reduce" not in xm.get_stablehlo([])


def is_pending(value):
    """Has torch_xla recorded what gives this tensor, and not executed it?"""
    import torch_xla

    recorded = torch_xla._XLAC._get_xla_tensors_text([value])
    return not ("xla::device_data" in recorded and recorded.count(" = ") == 1)


def execute():
    """The step that all replicas have traced."""
    programs, inputs, (names, *_), others = zip(*(TRACED[rank] for rank in range(REPLICAS)))

    def by_name(rows):  # -> {name: (replicas, ...)}
        found = {name: np.stack([row[i] for row in rows]) for i, name in enumerate(names)}
        return found | {name: np.stack([row[name] for row in others]) for name in others[0]}

    step = {"programs": programs, "pod": by_name(run_by_jax(programs[0], inputs))}
    if not EXECUTED:
        # of one replica in all, the reduction is the sum of one
        alone = [run_by_jax(programs[0], [one])[0] for one in inputs]
        step["alone"] = by_name(alone)
    return step


COMPILED = {}


def run_by_jax(program, inputs):
    """StableHLO, and a list of arrays for each replica -> the list of arrays that each gives."""
    import jax
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)  # the optimizer's scalars are float64
    devices = jax.devices("cpu")[: len(inputs)]
    if (program, len(inputs)) not in COMPILED:
        options = xla_client.CompileOptions()
        options.num_replicas = len(devices)
        places = np.array([[d.id] for d in devices])
        options.device_assignment = xla_client.DeviceAssignment.create(places)
        with mlir.make_ir_context():
            module = mlir.module_to_bytecode(ir.Module.parse(program))
        COMPILED[program, len(inputs)] = devices[0].client.compile_and_load(
            module, xla_client.DeviceList(tuple(devices)), options
        )
    # "replicated", which jax takes on trust: each device holds its own replica's input
    sharding = jax.sharding.NamedSharding(
        jax.sharding.Mesh(np.array(devices), ("replica",)), jax.sharding.PartitionSpec()
    )
    arguments = [
        jax.make_array_from_single_device_arrays(
            rows[0].shape, sharding, [jax.device_put(row, d) for row, d in zip(rows, devices)]
        )
        for rows in zip(*inputs)
    ]
    results = COMPILED[program, len(inputs)].execute_sharded(arguments)
    outputs = results.disassemble_into_single_device_arrays()  # of each output, of each device
    return [[np.asarray(output[r]) for output in outputs] for r in range(len(devices))]


device.all_sum_gradients, device.step_done = all_sum_gradients, step_done

if __name__ == "__main__":
    steps = [{"plain": step} for step in plain()]
    import torch_xla.distributed.xla_multiprocessing as xmp

    xmp.spawn(pod_replica)
    with open(f"{FOLDER}/pod.pkl", "rb") as f:
        steps = [step | executed for step, executed in zip(steps, pickle.load(f))]
    with open(f"{FOLDER}/steps.pkl", "wb") as f:
        pickle.dump(steps, f)
