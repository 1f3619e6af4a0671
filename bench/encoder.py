"""The full-size encoder (C 768, depth 12, 9216 tokens of 64x384x384) forward, as `make probe` runs it, against the same network
with the whole matrix of attention in memory: softmax(q k^T) v, float32.

    .venv/bin/python bench/encoder.py                # CPU: 5 minutes on two cores, 9 GB of memory; on a machine with a GPU also there
    .venv/bin/python bench/encoder.py --depth 2      # the same in a minute and a half: the blocks are alike
    .venv/bin/python bench/encoder.py --only cuda    # the GPU alone. This part has never met a GPU

CPU: each way runs in a process of its own, for its peak memory; bf16 runs before and after what it is compared with, and its mean
counts. GFLOP/s are of the forward pass, beside this machine's matrix product of 2048 x 2048, measured by the same process around it;
the table below says where the time goes. "Materialised" is V-JEPA's own expression; "q scaled" saves it one pass over the scores.
Exits 1 when bf16 (train.precision=bf16) is not 4.5 times faster than the first, or float32 or bf16 take more than a sixth of the
memory, or tokens differ by more than 1e-4 (float32) or 1e-2 (bf16), relative. Half of the reference's time is the system's, which
zeroes 12 GB in every block and does that no faster on two cores: with other processes on the machine the ratio falls, from 8 to 4.

GPU: volumes/s in bf16 by batch, share of the measured matrix product (aim: 45 %), memory; then `eval.features` from a full cache of
preprocessed volumes against the encoder alone (aim: 90 %). Printed, not required.

What was tried on CPU and did not pay, of a block's 3.0 s of processor time in bf16, of which 2.1 are attention: torch's kernel in bf16
(attention 3.8 s) and on float32 copies (3.6 s); flex_attention, compiled (over 6 s in float32, 12 s in bf16, on a shared machine; and
it needs a C++ compiler); bmm over all heads (2.8 s, and twice that beside other processes, for which every product waits); scores in
float32 (3.1 s); chunks of 64, 256, 512 (within 10 %); exp, sum and division apart from softmax (2.4 s); k packed beforehand for
oneDNN (the same); huge pages (THP_MEM_ALLOC_ENABLE=1: 5 % less, but only if set before torch is imported); weights cast to bf16
beforehand (less than 1 %). What remains: matrix products near this machine's peak, and softmax, 0.7 s.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch  # noqa: E402

import config  # noqa: E402
import data  # noqa: E402
import device  # noqa: E402
import eval as evaluation  # noqa: E402
import model  # noqa: E402

SIZE, DIM, TOKENS = (64, 384, 384), 768, 9216
WAYS = {"materialised": "fp32", "q scaled": "fp32", "float32": "fp32", "bf16": "bf16"}


def settings(precision):
    return config.load(os.path.join(ROOT, "configs", "base.yaml"),
                       [f"train.precision={precision}", "model.emb_dim=768", "log.wandb=disabled"])


def build(depth):
    torch.manual_seed(0)
    return model.ViT3D(DIM, depth, TOKENS).eval().requires_grad_(False)


def flop(depth):
    """Of a volume's forward pass: products of the patches, of each block's four layers, and of q k^T and of that with v."""
    return 2 * TOKENS * (4 * 16 * 16) * DIM + depth * (2 * TOKENS * 12 * DIM * DIM + 4 * TOKENS * TOKENS * DIM)


def materialised(q, k, v):
    """As V-JEPA's own code writes it where it does not call torch's kernel."""
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def q_scaled(q, k, v):
    """The leanest that still holds all scores: q is scaled in their place."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def matmul_rate(dev, dtype, n, times):
    """FLOP/s of the best of some products of n x n."""
    a, b, best = torch.randn(n, n, dtype=dtype, device=dev), torch.randn(n, n, dtype=dtype, device=dev), 0
    for _ in range(times):
        began = now(dev)
        a @ b
        best = max(best, 2 * n**3 / (now(dev) - began))
    return best


def matmul_rates(dev):
    """GFLOP/s of products of 2048 x 2048, by precision."""
    return {name: matmul_rate(dev, dtype, 2048, 3) / 1e9 for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16))}


def now(dev):
    if dev.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def watch(encoder, spent):
    """Add to `spent` the seconds of each part of the encoder."""
    def timed(name, call):
        def run(*args):
            began = time.perf_counter()
            out = call(*args)
            spent[name] = spent.get(name, 0) + time.perf_counter() - began
            return out
        return run

    encoder.patch_embed.forward = timed("patch embedding", encoder.patch_embed.forward)
    for block in encoder.blocks:
        for name, layer in (("qkv", block.attn.qkv), ("proj", block.attn.proj), ("fc1, fc2", block.mlp.fc1),
                            ("fc1, fc2", block.mlp.fc2), ("norms", block.norm1), ("norms", block.norm2)):
            layer.forward = timed(name, layer.forward)
        block.attn.kernel = timed("attention", block.attn.kernel)


def forward(way, depth, path):
    """Run in a process of its own; prints seconds, peak GB, GFLOP/s of matrix products and seconds by part, and writes the tokens."""
    dev, encoder, volume, spent, tokens = (
        device.get("cpu"), build(depth), torch.randn(1, *SIZE, generator=torch.Generator().manual_seed(1)).half(), {}, [])
    if way in ("materialised", "q scaled"):
        model.Attention.kernel = staticmethod(materialised if way == "materialised" else q_scaled)
    watch(encoder, spent)
    encoder.register_forward_hook(lambda module, args, out: tokens.append(out))
    rates = [matmul_rates(dev)]
    began = time.perf_counter()
    evaluation.encode(settings(WAYS[way]), encoder, volume, dev)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    rates.append(matmul_rates(dev))
    spent["gelu, sums, casts, pooling"] = seconds - sum(spent.values())
    torch.save(tokens[0].float(), path)
    print(json.dumps([seconds, peak, {name: max(r[name] for r in rates) for name in rates[0]}, spent]))


def run(way, depth, path):
    done = subprocess.run([sys.executable, __file__, "--one", way, path, "--depth", str(depth)],
                          capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{way}: {done.stderr or done.returncode}")
    return json.loads(done.stdout)


def cpu(depth):
    """-> what is not met."""
    results, missed = {way: [] for way in WAYS}, []
    print(f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads: "
          f"{flop(depth) / 1e12:.2f} TFLOP a volume ({DIM} wide, {depth} deep)")
    with tempfile.TemporaryDirectory() as folder:
        for way in ("bf16", "materialised", "bf16", "q scaled", "bf16", "float32"):
            results[way].append(run(way, depth, f"{folder}/{way}.pt"))
        tokens = {way: torch.load(f"{folder}/{way}.pt") for way in WAYS}
    seconds = {way: statistics.mean(r[0] for r in results[way]) for way in WAYS}
    memory = {way: max(r[1] for r in results[way]) for way in WAYS}
    print(f"{'':<14}{'time':>9}{'faster':>9}{'peak memory':>13}{'share':>8}"
          f"{'GFLOP/s':>9}{'matrix product':>16}{'share':>8}{'difference':>12}")
    for way in WAYS:
        faster, share = seconds["materialised"] / seconds[way], memory[way] / memory["materialised"]
        rate, limit = flop(depth) / seconds[way] / 1e9, max(r[2]["bf16" if way == "bf16" else "float32"] for r in results[way])
        difference = ((tokens[way] - tokens["materialised"]).norm() / tokens["materialised"].norm()).item()
        print(f"{way:<14}{seconds[way]:>7.1f} s{faster:>8.1f}x{memory[way]:>10.2f} GB{share:>8.0%}"
              f"{rate:>9.0f}{limit:>16.0f}{rate / limit:>8.0%}{difference:>12.1e}")
        missed += [f"{way}: {what}" for what, is_met in (
            ("4.5 times faster", way != "bf16" or faster >= 4.5),
            ("a sixth of the memory", way in ("materialised", "q scaled") or share <= 1 / 6),
            ("the same tokens", difference <= (1e-2 if way == "bf16" else 1e-4))) if not is_met]
    print(f"bf16 against the leaner reference: {seconds['q scaled'] / seconds['bf16']:.1f} times faster; "
          f"its runs before, between and after: {', '.join(f'{r[0]:.1f} s' for r in results['bf16'])}")
    print("(difference: norm of the tokens' difference to the materialised ones', against the norm of those)\n\nshare of the time")
    parts = sorted(results["bf16"][0][3], key=results["bf16"][0][3].get, reverse=True)
    print(f"{'':<14}" + "".join(f"{part:>{max(12, len(part) + 2)}}" for part in parts))
    for way in WAYS:
        print(f"{way:<14}" + "".join(
            f"{sum(r[3][part] for r in results[way]) / sum(r[0] for r in results[way]):>{max(12, len(part) + 2)}.1%}" for part in parts))
    return missed


def cuda(depth, volumes=64):
    """Never run yet: no GPU was at hand."""
    dev, encoder = device.get("cuda"), build(depth).to("cuda")
    limit, best = matmul_rate(dev, torch.bfloat16, 8192, 20), (0, 0)
    print(f"\n{device.describe(dev)}, bf16: matrix product of 8192 x 8192 {limit / 1e12:.0f} TFLOP/s\n"
          f"{'batch':<8}{'volumes/s':>10}{'share of it':>13}{'peak memory':>13}")
    for batch in (1, 2, 4, 8, 16):
        x = torch.randn(batch, 1, *SIZE, device=dev)
        torch.cuda.reset_peak_memory_stats()
        rates = []
        for _ in range(6):  # the first ones choose kernels
            began = now(dev)
            with torch.no_grad(), device.autocast(dev, "bf16"):
                encoder(x)
            rates.append(batch / (now(dev) - began))
        rate = statistics.median(rates[2:])
        best = max(best, (rate, batch))
        print(f"{batch:<8}{rate:>10.1f}{rate * flop(depth) / limit:>13.0%}{torch.cuda.max_memory_allocated() / 1e9:>10.1f} GB", flush=True)
    print(f"best: {best[0]:.1f} volumes/s at batch {best[1]}, {best[0] * flop(depth) / limit:.0%} of the matrix product (aim: 45 %)")
    passed = feature_pass(dev, encoder, volumes)
    print(f"feature pass from preprocessed volumes: {passed:.1f} volumes/s, {passed / best[0]:.0%} of the best batch's rate (aim: 90 %)")


def fill_cache(folder, count, size):
    """Preprocessed volumes of `count` participants below folder -> (their samples, cache_dir)."""
    samples, cache = [], f"{folder}/cache"
    for i in range(count):
        with open(f"{folder}/{i}", "w", encoding="utf-8") as f:
            f.write(str(i))  # never decoded: what it would give is in the cache
        samples.append(data.Sample(str(i), data.SPLITS[i % 3], 0, "", "L", f"{folder}/{i}", data.b2.Object(f"{folder}/{i}", 1)))
    kept = data.Volumes(samples, size, cache)
    for i in range(count):
        data.b2.write(kept.note(i), data.b2.checksum(samples[i].path, "sha1"))
        data.save_array(os.path.join(kept.folder, kept.key(i) + ".npy"), torch.randn(size).half().numpy())
    return samples, cache


def feature_pass(dev, encoder, count):
    """Volumes/s of eval.features when all preprocessed volumes are in the cache."""
    cfg = settings("bf16")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        samples, cfg.paths.cache_dir = fill_cache(folder, count, SIZE)
        ledger = data.Ledger([], samples)
        began = now(dev)
        evaluation.features(cfg, ledger, samples, encoder, SIZE, "0" * 64, dev)
        return count / (now(dev) - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--only", choices=("cpu", "cuda"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # what a way's process is called with
    args = parser.parse_args()
    if args.one:
        forward(args.one[0], args.depth, args.one[1])
        return
    missed = cpu(args.depth) if args.only != "cuda" else []
    if device.choose("auto") == "cuda":
        cuda(args.depth)
    elif args.only != "cpu":
        print("no GPU is here: nothing measured on one")
    sys.exit(f"not met: {'; '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
