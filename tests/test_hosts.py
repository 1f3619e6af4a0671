"""Replicas that torchrun or srun starts, on one host and on two. A host is a torchrun agent with
its own cache; or a network namespace, in which the test's folder `disk` is another one.

Traffic stays on loopback, and within namespaces that the tests make and remove.
"""

import contextlib
import glob
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT, TUNE, children_of, content, settings, trained, warm

import eval as evaluation
import hosts
import phantom

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ADDRESSES = "10.77.0.1", "10.77.0.2"
NETEM = "netem", "delay", "50ms", "loss", "1%"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def group(command, agents=2, each=1, address="127.0.0.1", inside=None, **options):
    """torchrun agents, each a host with `each` processes of command(node) -> their Popens. inside:
    node -> the beginning of a command line that runs within the host."""
    inside, port, found = inside or (lambda node: []), free_port(), []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        for node in range(agents):
            where = [f"--node-rank={node}", f"--master-addr={address}", f"--master-port={port}"]
            counts = [f"--nnodes={agents}", f"--nproc-per-node={each}"]
            line = [*inside(node), *TORCHRUN, *counts, *where, *map(str, command(node))]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            found.append(subprocess.Popen(line, cwd=ROOT, env=environment, **pipes, **options))
        yield found
    finally:
        for process in found:
            process.kill()  # the replicas end with it
            process.wait()


def ended(agents, seconds):
    """Wait for all -> [(returncode, output, errors)]."""
    deadline, found = time.monotonic() + seconds, []
    for process in agents:
        output, errors = process.communicate(timeout=max(1, deadline - time.monotonic()))
        found.append((process.returncode, output, errors))
    return found


def check_success(found):
    for node, (code, output, errors) in enumerate(found):
        assert code == 0, errors
        assert not errors.count("error: ")
        assert bool(output) == (node == 0)  # rank 0 alone prints


def training(root, folder, *more):
    """node -> train.py with a cache and a run folder of the host's own."""
    base = settings(root, folder)
    own = lambda node: [
        f"paths.cache_dir={folder}/cache{node}",
        f"paths.run_dir={folder}/run{node}",
    ]
    return lambda node: ["train.py", "--config", "configs/demo.yaml", *base, *own(node), *more]


def same(folder, other, most=1e-6):
    """Do run folders hold the same predictions of validation?"""
    a, b = (
        np.genfromtxt(f"{run}/predictions_val.csv", delimiter=",", skip_header=1)
        for run in (folder, other)
    )
    assert a.shape == b.shape and np.abs(a - b).max() <= most


CPU = "device.backend=cpu"
JOBS = {
    "probe": [CPU, "model.head.hidden=8", "data.batch_size=7"],
    "seeds": [CPU, "train.seeds=[1,2]"],
    "fine-tuning": TUNE,
}


# ------------------------------------------------------------------------------------ on loopback


@pytest.mark.slow
@pytest.mark.parametrize("job", ["probe", "fine-tuning"])
def test_two_hosts_give_the_predictions_of_one_process(written, tmp_path, job):
    with group(training(written, tmp_path, *JOBS[job]), each=2) as agents:
        found = ended(agents, 300)
    check_success(found)
    assert " on 4 x cpu" in found[0][1] and found[0][1].count("features: ") >= 1
    same(f"{tmp_path}/run0", f"{trained(written, *JOBS[job])}/run")
    assert not os.path.exists(f"{tmp_path}/run1")  # rank 0 alone writes
    assert not os.path.exists(f"{tmp_path}/.run0.lock")
    if job == "probe":  # each host has read its share, and no more
        kept = [set(glob.glob("*.npy", root_dir=f"{tmp_path}/cache{n}/volumes")) for n in (0, 1)]
        assert all(kept) and not kept[0] & kept[1]


def errors_of(found):
    """Lines that tell of an error, of all hosts; none shows where in the program it was."""
    assert all(code for code, _, _ in found)
    lines = [line for _, _, errors in found for line in errors.splitlines()]
    assert not any(f'File "{ROOT}/{name}.py"' in line for line in lines for name in MODULES)
    return [line for line in lines if line.startswith("error: ")]


MODULES = "train", "eval", "device", "hosts", "runs"
# Another error on one host alone, and one that all replicas find at once
WRONG = {
    "one host's": (["train.epochs=2"], ["paths.data=/nowhere"], "/nowhere"),
    "everybody's": (["train.epochs=0"], [], "train.epochs"),
    "processes": (["device.processes=2"], [], "set device.processes=1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG)
def test_an_error_is_one_sentence_once(written, tmp_path, case):
    everywhere, on_one, said = WRONG[case]
    command = training(written, tmp_path, CPU, *everywhere)
    with group(lambda node: command(node) + node * on_one, each=2) as agents:
        found = ended(agents, 60)
    (error,) = errors_of(found)
    assert said in error
    assert not on_one or error in found[1][2]  # where it happened


@pytest.mark.slow
@pytest.mark.parametrize("what", ["seed", "the encoder", "what the tables say", "train.save_every"])
def test_hosts_that_were_given_different_things_do_not_train(written, tmp_path, what):
    """Their gradients would be added up all the same."""
    if what == "the encoder":
        phantom.write_encoder(f"{tmp_path}/other.pt", (16, 64, 64), 128, 2)
        other = f"paths.checkpoint_path={tmp_path}/other.pt"
    elif what == "what the tables say":  # the same rows in another order
        shutil.copytree(written, f"{tmp_path}/data")
        table = pathlib.Path(tmp_path, "data", "participants.tsv")
        header, *rows = table.read_text().splitlines()
        table.write_text("\n".join([header, *rows[::-1]]) + "\n")
        other = f"paths.data={tmp_path}/data"
    else:
        other = f"{what}=7"
    command = training(written, tmp_path, CPU, "train.epochs=2")
    with group(lambda node: command(node) + node * [other]) as agents:
        (error,) = errors_of(ended(agents, 60))
    assert error.startswith(f"error: {what}") and "replica 1 of 2 has another" in error
    assert not os.path.exists(f"{tmp_path}/run0/provenance.json")


@pytest.mark.slow
def test_hosts_that_were_given_different_things_do_not_score(written, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        run = f"{trained(written, *JOBS['probe'], f'seed={seed}')}/run"
        shutil.copytree(run, f"{tmp_path}/{name}")
    cache = f"paths.cache_dir={tmp_path}/cache"
    start = lambda name, *more: ["eval.py", "--ckpt", f"{tmp_path}/{name}", cache, *more]
    for own, said in (
        ([start("a"), start("b")], "the checkpoint"),
        ([start("a"), start("a", "--split", "val")], "the command"),
        ([start("a"), start("a", "--export", f"{tmp_path}/x.npz")], "the command"),
        ([start("a"), start("a", "eval.probes=true")], "eval.probes"),
    ):
        with group(lambda node, own=own: own[node]) as agents:
            (error,) = errors_of(ended(agents, 60))
        assert error.startswith(f"error: {said} differs between the replicas"), error
        assert not os.path.exists(f"{tmp_path}/a/eval_test.json")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_replica_that_waits_for_the_others_says_so_and_can_be_ended(tmp_path, number):
    (tmp_path / "script.py").write_text(SCRIPT)
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    line = [sys.executable, tmp_path / "script.py", "run"]
    own = os.environ | where | {"RANK": "0", "LOCAL_RANK": "0"}
    with subprocess.Popen(line, env=own, stderr=subprocess.PIPE, text=True) as process:
        said = process.stderr.readline()  # after 15 s
        process.send_signal(number)
        assert process.wait(5) == -number
    assert said == f"replica 0 of 2 waits for the others at localhost:{where['MASTER_PORT']}\n"


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set in the environment, but RANK is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999"}, "MASTER_PORT is from 1 to"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE at least 1"),
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK, MASTER_PORT, MASTER_ADDR is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "LOCAL_RANK is"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "does not fit"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "whole numbers"),
    ],
)
def test_half_a_group_is_said(monkeypatch, variables, said):
    if len(variables) in (2, 3):
        rest = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        variables = rest | variables
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        hosts.find()


def test_a_meeting_point_that_is_nowhere_is_said_at_once():
    with pytest.raises(ValueError, match="MASTER_ADDR=nowhere.invalid: .* does not reach that"):
        hosts.own_address(hosts.Place(0, 2, 0, 1, "nowhere.invalid", 29500))


SCRIPT = f"""
import sys
sys.path.insert(0, {ROOT!r})
import torch
import device
from types import SimpleNamespace


def main(rank, cfg):
    assert (rank, device.world()) == (device.rank(), 2)
    print("rank", rank, device.all_sum(torch.tensor([rank + 1.0])).item())
    if rank == 1 and "fail" in sys.argv:
        raise ValueError("no such thing")
    device.barrier(torch.device("cpu"))


if __name__ == "__main__":
    settings = SimpleNamespace(backend="cpu", processes=1)
    job = lambda: device.launch(main, SimpleNamespace(device=settings))
    device.run(job) if "run" in sys.argv else job()
"""


@pytest.mark.parametrize("arguments", [["run"], [], ["run", "fail"]])
def test_processes_that_srun_starts_are_one_group(tmp_path, arguments):
    (tmp_path / "script.py").write_text(SCRIPT)
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    line, pipes = [sys.executable, tmp_path / "script.py", *arguments], {"text": True}
    pipes |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    own = [where | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    processes = [subprocess.Popen(line, env=os.environ | more, **pipes) for more in own]
    found = ended(processes, 60)
    assert [output for _, output, _ in found] == ["rank 0 3.0\n", ""]
    fails = "fail" in arguments
    assert [code for code, _, _ in found] == [fails, fails]
    assert [errors for _, _, errors in found] == ["", "error: no such thing\n" if fails else ""]


LONG = [*TUNE, "train.epochs=300", "train.early_stopping.enabled=false"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_one_host_ends_all(written, tmp_path, number):
    """SIGTERM: with all saved. SIGKILL to the agent alone: its replicas do not outlive it."""
    with group(training(written, tmp_path, *LONG, warm(written)), each=2) as agents:
        read_until(agents[0], "epoch   1/300")
        families = [d for agent in agents for d in descendants(agent.pid)]
        agents[1].send_signal(number)
        begun, found = time.monotonic(), ended(agents, 40)
    assert time.monotonic() - begun < 15 and all(code for code, _, _ in found)
    while any(map(is_alive, families)):
        assert time.monotonic() - begun < 15
        time.sleep(0.1)
    everything = "".join(output + errors for _, output, errors in found)
    if number == signal.SIGTERM:
        assert everything.count("stopped by SIGTERM after") == 1
        assert os.path.exists(f"{tmp_path}/run0/last.pt") and "error: " not in everything
    elif number == signal.SIGINT:
        assert everything.count("interrupted\n") == 1 and "error: " not in everything
    else:
        assert everything.count("error: replica ") == 1


@pytest.mark.slow
def test_a_run_is_scored_by_several_hosts(written, tmp_path):
    own = lambda node: f"paths.cache_dir={tmp_path}/{node}/cache"
    with group(training(written, tmp_path, *JOBS["probe"]), each=2) as agents:
        check_success(ended(agents, 100))
    places = [f"{tmp_path}/{node}" for node in (0, 1)]
    for node, place in enumerate(places):  # every host has the checkpoint, and what it encoded
        shutil.copytree(f"{tmp_path}/run0", f"{place}/run")
        shutil.copytree(f"{tmp_path}/cache{node}", f"{place}/cache")
    command = lambda node: ["eval.py", "--ckpt", f"{places[node]}/run", own(node)]
    with group(command, each=2) as agents:
        check_success(ended(agents, 100))
    for node in (0, 1):
        shutil.copytree(f"{tmp_path}/cache{node}", f"{tmp_path}/cache", dirs_exist_ok=True)
    cache = f"paths.cache_dir={tmp_path}/cache"
    alone, _ = evaluation.evaluate_run(f"{places[1]}/run", "test", [cache])
    many = json.loads(content(f"{places[0]}/run/eval_test.json"))
    assert set(many) == set(alone)
    # predictions, scores, groups; and all points of the map, wherever their features are
    for key in set(many) - {"content_sha256", "checkpoint_sha256", "looks"}:
        assert flat(many[key]) == pytest.approx(flat(alone[key]), abs=1e-6), key
    # of two that compare what is written, one does
    pair = ["eval.py", "--compare", *(f"{place}/run" for place in places)]
    with group(lambda node: pair, agents=1, each=2) as agents:
        found = ended(agents, 60)
    assert found[0][1].count("written: ") == 1
    # one host lacks the checkpoint
    shutil.rmtree(f"{places[1]}/run")
    with group(command) as agents:
        (error,) = errors_of(ended(agents, 60))
    assert f"--ckpt {places[1]}/run" in error


def flat(value):
    """Nested dicts and lists -> a list of what is in them."""
    parts = value.values() if isinstance(value, dict) else value
    return [x for part in parts for x in flat(part)] if isinstance(value, dict | list) else [value]


@pytest.mark.slow
def test_the_demos_data_are_written_once_a_host(tmp_path):
    demo = f"demo.dir={tmp_path}/demo demo.participants=20 paths.data={tmp_path}/demo/data"
    demo += f" paths.checkpoint_path={tmp_path}/demo/encoder.pt"
    command = ["train.py", "--config", "configs/demo.yaml", CPU, *demo.split(), "train.epochs=1"]
    command += ["train.sweep=null", f"paths.run_dir={tmp_path}/run"]
    command += [f"paths.cache_dir={tmp_path}/cache"]
    with group(lambda node: command, agents=1, each=3) as agents:
        found = ended(agents, 300)
    check_success(found)
    assert sorted(os.listdir(f"{tmp_path}/demo")) == ["data", "encoder.pt"]
    assert found[0][1].count("demo: writing") in (0, 2)  # by rank 0, or by another, which is silent


# ------------------------------------------------------------------------------------------ Slurm

# as Slurm's: a task for each of two, on this machine
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
pids=()
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 "$@" & pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames host[1-2]" ] && printf 'localhost\nhost2\n'
"""


def slurm(tmp_path, *overrides, **variables):
    (tmp_path / "bin").mkdir(exist_ok=True)
    for name, script in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "host[1-2]",
        "SLURM_SUBMIT_DIR": ROOT,
        "MASTER_PORT": str(free_port()),
        "RUN": f"{tmp_path}/run",
        **variables,
    }
    line = ["bash", f"{ROOT}/scripts/slurm.sh", *overrides]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_slurm_trains_and_scores(written, tmp_path):
    more = [m for m in settings(written, tmp_path) if "run_dir" not in m] + JOBS["probe"]
    done = slurm(tmp_path, *more)
    assert done.returncode == 0, done.stderr
    assert " on 2 x cpu" in done.stdout and done.stdout.count("report: ") == 2
    same(f"{tmp_path}/run", f"{trained(written, *JOBS['probe'])}/run")
    # again: the run is there; an error ends all with one sentence
    done = slurm(tmp_path, *more, "data.batch_size=8")
    assert done.returncode and done.stderr.count("error: ") == 1
    assert "data.batch_size 7 -> 8" in done.stderr and "Traceback" not in done.stderr


def test_slurm_scores_the_folder_that_it_trains(tmp_path):
    done = slurm(tmp_path, f"paths.run_dir={tmp_path}/elsewhere", DRY="1")
    assert done.returncode == 1 and "name the run's folder with RUN=" in done.stderr
    assert not done.stdout


def test_slurm_only_prints_when_asked(tmp_path):
    done = slurm(tmp_path, "seed=1", DRY="1", CKPT="single_domain_01", MODE="finetune", RUN="")
    first, *others = done.stdout.splitlines()
    run = "runs/cls_single_domain_01_finetune"
    assert first.startswith("srun .venv/bin/python train.py --config configs/single_domain_01.yaml")
    assert first.endswith(f"paths.run_dir={run} train.resume=auto seed=1")
    assert [line.split("eval.py ")[1] for line in others] == [
        f"--ckpt {run} --split {split}" for split in ("val", "test")
    ]
    assert not os.path.exists(f"{tmp_path}/run")


# ------------------------------------------------------------- two hosts with disks of their own


def shell(*command):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def must(*command):
    done = shell(*command)
    assert done.returncode == 0, f"{command}: {done.stderr}"


class Lab:
    """Two hosts: namespaces with a network between them and nothing else, each with its own disk
    at the same path."""

    def __init__(self, folder):
        self.names = [f"octprobe{os.getpid()}{letter}" for letter in "ab"]
        self.disk, self.disks = f"{folder}/disk", [f"{folder}/disk{n}" for n in (0, 1)]
        self.wire = None

    def make(self):
        for name in self.names:
            done = shell("ip", "netns", "add", name)
            if done.returncode:
                pytest.skip(f"ip netns add is not possible here: {done.stderr.strip()}")
            must("ip", "-n", name, "link", "set", "lo", "up")
        for folder in (self.disk, *self.disks):
            os.mkdir(folder)

    def connect(self, network):
        """veth: a cable; netem: the same with 50 ms and 1 % loss; relay: slow_wire.py's."""
        a, b = self.names
        if network == "relay":
            script = [sys.executable, f"{ROOT}/tests/slow_wire.py", a, b, "oct0", "0.05", "0.01"]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            self.wire = subprocess.Popen(script, **pipes)
            if not self.wire.stdout.readline():
                pytest.skip(f"no TUN device here: {self.wire.stderr.read().splitlines()[-1]}")
        else:
            ends = ["oct0", "netns", a, "type", "veth", "peer", "name", "oct0", "netns", b]
            done = shell("ip", "link", "add", *ends)
            if done.returncode:
                pytest.skip(f"this kernel has no veth: {done.stderr.strip()}")
        for name, own, other in zip(self.names, ADDRESSES, reversed(ADDRESSES)):
            must("ip", "-n", name, "address", "add", own, "peer", other, "dev", "oct0")
            must("ip", "-n", name, "link", "set", "oct0", "up")
            if network == "netem":
                done = shell("tc", "-n", name, "qdisc", "add", "dev", "oct0", "root", *NETEM)
                if done.returncode:
                    pytest.skip(f"this kernel has no netem: {done.stderr.strip()}")

    def inside(self, node):
        """The beginning of a command line on a host."""
        mount = f'mount --bind {self.disks[node]} {self.disk} && exec "$@"'
        return ["ip", "netns", "exec", self.names[node], "sh", "-c", mount, "sh"]

    def group(self, job, hosts_=2, **options):
        base = settings(f"{self.disk}/data", self.disk)
        command = ["train.py", "--config", "configs/demo.yaml", *base, *job]
        more = {"address": ADDRESSES[0], "inside": self.inside, **options}
        return group(lambda node: command, hosts_, **more)

    def remove(self):
        if self.wire:
            self.wire.kill()
            self.wire.communicate()
        for name in self.names:
            shell("ip", "netns", "delete", name)  # and with it what is in it


@pytest.fixture()
def lab(written, tmp_path):
    for tool in ("ip", "tc"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not there; install iproute2")
    if os.geteuid():
        pytest.skip("network namespaces are made by root alone")
    hosts_ = Lab(tmp_path)
    try:
        hosts_.make()
        for disk in hosts_.disks:
            shutil.copytree(written, f"{disk}/data")
        yield hosts_
    finally:
        hosts_.remove()


@pytest.mark.slow
@pytest.mark.parametrize(
    "network, job",
    [("veth", "probe"), ("veth", "seeds"), ("veth", "fine-tuning")]
    + [("netem", "fine-tuning"), ("relay", "fine-tuning")],
)
def test_hosts_that_share_no_disk_give_the_predictions_of_one_process(lab, written, network, job):
    lab.connect(network)
    with lab.group(JOBS[job]) as agents:
        found = ended(agents, 400)
    check_success(found)
    same(f"{lab.disks[0]}/run", f"{trained(written, *JOBS[job])}/run")
    assert not os.path.exists(f"{lab.disks[1]}/run") and os.path.exists(f"{lab.disks[1]}/cache")


def descendants(pid):
    children = children_of(pid) if os.path.exists(f"/proc/{pid}") else []
    return children + [d for child in children for d in descendants(child)]


def is_alive(pid):
    """And no zombie, which its new parent has not noticed yet."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return content(f"/proc/{pid}/stat").rpartition(")")[2].split()[0] != "Z"
    return False


def kill_host(agent):
    family = [agent.pid, *descendants(agent.pid)]
    for pid in family:
        os.kill(pid, signal.SIGSTOP)  # none lives to tell of another's end
    for pid in family:
        os.kill(pid, signal.SIGKILL)


def read_until(process, beginning):
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_all_end_when_a_host_is_killed_and_the_restart_goes_on(lab, written, killed):
    lab.connect("veth")
    more = [*TUNE, "train.save_every=2", "train.resume=auto"]
    with lab.group(more) as agents:
        read_until(agents[0], "epoch   1/3")
        kill_host(agents[killed])
        left, begun = agents[1 - killed], time.monotonic()
        _, errors = left.communicate(timeout=60)
        took = time.monotonic() - begun
    print(f"ended {took:.1f} s after a host was killed")
    assert took < 15 and left.returncode
    assert errors.count("error: ") == 1
    assert f"error: replica {killed} of 2, on {ADDRESSES[killed]}, was killed" in errors
    # one host has what the other lacks
    with lab.group(more) as agents:
        found = ended(agents, 100)
    said = "".join(errors for _, _, errors in found)
    assert all(code for code, _, _ in found) and said.count("error: ") == 1
    assert "every host needs the same" in said
    if killed == 0:  # on another number of hosts, where the run's folder is
        with lab.group(more, hosts_=1, each=3) as agents:
            found = ended(agents, 200)
    else:
        shutil.copytree(f"{lab.disks[0]}/run", f"{lab.disks[1]}/run")
        with lab.group(more) as agents:
            found = ended(agents, 200)
    check_success(found)
    assert "resuming after" in found[0][1]
    same(f"{lab.disks[0]}/run", f"{trained(written, *TUNE)}/run", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("network, during", [("veth", "encoding"), ("relay", "epoch")])
def test_all_end_when_a_network_is_gone(lab, network, during):
    """Its cable is pulled out, or it loses every packet from now on: nothing says so."""
    lab.connect(network)
    more = [*TUNE, "train.epochs=500", "train.early_stopping.enabled=false"]
    with lab.group(more) as agents:
        read_until(agents[0], "epoch   1/500" if during == "epoch" else "(with a volume")
        if network == "veth":
            must("ip", "-n", lab.names[1], "link", "set", "oct0", "down")
        else:
            lab.wire.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        found = ended(agents, 60)
        took = time.monotonic() - begun
    print(f"ended {took:.1f} s after the network was gone")
    assert took < 20 and all(code for code, _, _ in found)
    assert all(errors.count("error: replica") == 1 for _, _, errors in found)
