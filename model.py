"""The network: a V-JEPA2-style 3D ViT, strict loading of its pretraining checkpoint, pooling, and heads.

    encoder = load_encoder("checkpoints/single_domain_01.pt")      # eval mode
    tokens = encoder(volume)                                       # (B, 1, D, H, W) -> (B, N, C)
    features = pool(tokens, "mean")                                # (B, N, C) -> (B, C)
    logits = Head(C, num_classes=4)(features)                      # (B, C) -> (B, 4)

To train the encoder too, call encoder.train(); set encoder.drop_path and encoder.checkpoint as you like, and give
parameter_groups(...) to the optimizer.

D, H, W are depth (frames), height (rows) and width (columns) of a volume; C is the width of the embedding.
Needs torch, and scikit-learn for logistic regression.
"""

import hashlib
import math
import pickle
import re
import types
import warnings
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

HEAD_DIM = 64  # width of an attention head at pretraining; the weights do not tell it


@dataclass
class Noise:
    """The random numbers of one training step: `key` alone decides them, on any backend, in any number of replicas and micro-batches.

    key: a whole number of the step. places: (B,) where in the step's batch these B samples stand, -1 for padding; size: of
    that batch. Masks are drawn on the host for the whole batch, and each sample takes its own row.
    """

    key: int
    places: torch.Tensor
    size: int

    def keep(self, p, shape, layer):
        """Dropout's factors (B, *shape): 0 with probability p, else 1 / (1 - p). layer: a number for every layer that asks."""
        generator = torch.Generator().manual_seed(self.key + layer)
        return (torch.rand(self.size, *shape, generator=generator)[self.places] >= p) / (1 - p)


def any_noise(x):
    """Noise for a batch by itself, from torch's global generator."""
    return Noise(torch.randint(2**62, ()).item(), torch.arange(len(x)), len(x))


def attend(q, k, v, chunk=512):
    """softmax(q k^T / sqrt(d)) v of (B, heads, N, d). XLA would hold all N x N scores at once (4 GB a sample and layer at 9216
    tokens), so there the queries go in chunks; elsewhere torch has kernels that do the like."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not (torch.is_grad_enabled() and q.requires_grad):
        return attend_bfloat16(q, k, v)
    if q.device.type != "xla":
        return F.scaled_dot_product_attention(q, k, v)
    return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.split(chunk, dim=2)], dim=2)


def attend_bfloat16(q, k, v, chunk=128):
    """The same on CPU in bfloat16, without a gradient: torch's own kernel multiplies bfloat16 no faster than float32 there, plain
    matrix products do (1.6 times faster in all, bench/encoder.py). A head is one thread's business: threads that share every product
    would wait for each other hundreds of times a layer, and for long where other processes want the cores too."""

    def head(q, k, v):  # each (N, d)
        # softmax cancels what all keys share, and a smaller score loses less to rounding
        k = (k.float() - k.float().mean(dim=0)).to(k.dtype).T.contiguous()
        q, v, out = q * q.shape[-1] ** -0.5, v.contiguous(), torch.empty(v.shape, dtype=v.dtype)
        scores = torch.empty(chunk, len(v), dtype=v.dtype)  # they stay in the cache, and malloc is not asked again
        for part, to in zip(q.split(chunk), out.split(chunk)):
            s = scores[:len(part)]
            torch.mm(part, k, out=s)
            torch.softmax(s, dim=-1, out=s)
            torch.mm(s, v, out=to)
        return out

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        out = [list(pool.map(head, *sample)) for sample in zip(q, k, v)]  # B lists of (N, d), one for each head
    torch.set_num_threads(threads)  # a thread's own 1 would be the start of threads to come
    return torch.stack([torch.stack(heads, dim=1) for heads in out]).transpose(1, 2)  # (B, N, heads, d) -> (B, heads, N, d)


class Attention(nn.Module):
    kernel = staticmethod(attend)  # or a faster one, where the backend has it: device.attention

    def __init__(self, dim):
        super().__init__()
        self.num_heads = dim // HEAD_DIM
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, HEAD_DIM).permute(2, 0, 3, 1, 4)  # (3, B, heads, N, 64)
        x = self.kernel(*qkv.unbind(0))  # (B, heads, N, 64)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))  # (B, N, C)


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # exact GELU, as at pretraining


class Block(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = Attention(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x, keep=None):
        """Tokens x (B, N, C) -> the same; keep (2, B, 1, 1): factors of the two branches (drop-path)."""
        attn = self.attn(self.norm1(x))
        x = x + (attn if keep is None else attn * keep[0])
        mlp = self.mlp(self.norm2(x))
        return x + (mlp if keep is None else mlp * keep[1])


class PatchEmbed(nn.Module):
    def __init__(self, dim, patch_size):
        super().__init__()
        self.proj = nn.Conv3d(1, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        """(B, 1, D, H, W) -> (B, N, C). Patches do not overlap, so the convolution is a matrix product of them; in bfloat16 on CPU
        it is ten times faster so."""
        for axis, size in zip((2, 4, 6), self.proj.kernel_size):
            x = x.unflatten(axis, (-1, size))  # in the end (B, 1, d, 4, h, 16, w, 16)
        patches = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)  # (B, d, h, w, 1, 4, 16, 16) -> (B, N, 1024)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class ViT3D(nn.Module):
    """Pre-norm 3D ViT without CLS token, learned absolute positions: (B, 1, D, H, W) float -> tokens (B, N, C).

    In training mode, a sample skips a block's branch with a probability that grows to drop_path at the last block (Huang et al.
    2016), and `checkpoint` (called as torch.utils.checkpoint.checkpoint is) runs each block, to compute it again in the
    backward pass instead of keeping what lies within.
    """

    drop_path = 0.0
    checkpoint = None

    def __init__(self, dim, depth, num_tokens, hidden=None, patch_size=(4, 16, 16)):
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.image_size = None  # (D, H, W) of the pretraining, where its checkpoint says so
        self.patch_embed = PatchEmbed(dim, self.patch_size)
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, dim).normal_(std=0.02))
        self.blocks = nn.ModuleList(Block(dim, hidden or 4 * dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, volume, noise=None):
        self.check_size(volume.shape[-3:])
        x = self.patch_embed(volume) + self.pos_embed
        noise = noise or (any_noise(x) if self.training and self.drop_path else None)
        for i, block in enumerate(self.blocks):
            args = [x]
            if self.training and self.drop_path:
                keep = noise.keep(self.drop_path * (i + 1) / len(self.blocks), (2, 1, 1), layer=i)
                args.append(keep.transpose(0, 1).to(x.device, x.dtype))  # (B, 2, 1, 1) -> (2, B, 1, 1)
            x = self.checkpoint(block, *args) if self.training and self.checkpoint else block(*args)
        return self.norm(x)

    def grid(self, size):
        """Tokens along each axis (d, h, w) of a volume of `size` (D, H, W)."""
        return tuple(n // p for n, p in zip(size, self.patch_size))

    def check_size(self, size):
        """ValueError unless volumes of `size` (D, H, W) are what the positions were learned for."""
        fits = all(n % p == 0 for n, p in zip(size, self.patch_size)) and math.prod(self.grid(size)) == self.pos_embed.shape[1]
        if self.image_size is not None:
            fits = fits and tuple(size) == self.image_size
        if not fits:
            raise ValueError(
                f"volumes of size {tuple(size)} do not fit the encoder: it has {self.pos_embed.shape[1]} positions of "
                f"patches {self.patch_size}"
                + (f" and was pretrained at image_size {self.image_size}" if self.image_size else "")
            )


# ---------------------------------------------------------------------------------------------- loading, strictly

# All that a checkpoint's pickle may name: rebuilding tensors and plain containers. Settings objects of the pretraining
# become inert Settings; anything else is refused, so no code of the file runs and OmegaConf is not needed.
REBUILD = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): lambda *args: {},
    ("collections", "Counter"): lambda *args: {},
    ("_codecs", "encode"): lambda *args: b"",  # how numpy's scalars and arrays are pickled; Settings hold those
    **{(module, t.__name__): t for module in ("builtins", "__builtin__") for t in (dict, list, set, tuple, int, float)},
    ("__builtin__", "long"): int,
    **{("torch", name): getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64", "int64")},
}
INERT = ("omegaconf", "typing", "pathlib", "numpy", "argparse", "enum", "datetime")


class Settings(dict):
    """Stands for a settings object of the pretraining; holds its state, does nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.update(state)


class SafeUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) in REBUILD:
            return REBUILD[module, name]
        if module.split(".")[0] in INERT:
            return Settings
        raise ValueError(f"its pickle asks for {module}.{name}, which a checkpoint has no need of; refused, nothing was run")


def plain(value):
    """An OmegaConf value, as Settings hold it -> plain Python."""
    if isinstance(value, Settings):
        value = value.get("_content", value.get("_val"))
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def read_checkpoint(path):
    """The pretraining's `torch.save` dict, tensors memory-mapped (the optimizer's are never read). ValueError if it is none."""
    safe_pickle = types.SimpleNamespace(Unpickler=SafeUnpickler, __name__="safe_pickle")  # all that torch asks of a pickle module
    try:
        if any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
            raise ValueError("it is a TorchScript program")
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=safe_pickle)
    except OSError:
        raise  # no such file, no permission: the message already names the path
    except Exception as error:  # torch, zip and pickle raise a dozen types for a damaged file
        raise ValueError(f"{path} is not a checkpoint that can be read whole and safely: {error}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model_state_dict"), dict):
        found = sorted(map(str, checkpoint))[:10] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"{path} has no 'model_state_dict'; found {found}")
    return checkpoint


def load_encoder(path, encoder="context"):
    """Encoder of a pretraining checkpoint, in eval mode: (B, 1, D, H, W) float -> tokens (B, N, C).

    encoder: "context", or "target" (its EMA copy). Sizes come from the weights. ValueError naming the keys when
    anything is missing, unexpected, of the wrong shape or not finite; nothing is left at random.
    """
    prefixes = {"context": "context_encoder.", "target": "target_encoder.encoder."}
    if encoder not in prefixes:
        raise ValueError(f"encoder must be 'context' or 'target', not {encoder!r}")
    checkpoint = read_checkpoint(path)
    prefix = prefixes[encoder]
    state = {k[len(prefix):]: v for k, v in checkpoint["model_state_dict"].items() if str(k).startswith(prefix)}

    def refuse(what):
        raise ValueError(f"{path}: {encoder} encoder not loaded: {what}")

    if not state:
        found = sorted({str(k).split(".")[0] for k in checkpoint["model_state_dict"]})
        refuse(f"no keys begin with '{prefix}'; found {found}")
    not_tensors = [prefix + k for k, v in state.items() if not (isinstance(v, torch.Tensor) and v.is_floating_point())]
    if not_tensors:
        refuse(f"not tensors of floating-point numbers: {not_tensors}")

    # sizes: from the weights that carry them, everything else must then agree
    ndim = {"pos_embed": 3, "patch_embed.proj.weight": 5, "blocks.0.mlp.fc1.weight": 2}
    missing = [prefix + k for k in ndim if k not in state]
    if missing:
        refuse(f"missing {missing}")
    wrong = [f"{prefix + k} {tuple(state[k].shape)}" for k, n in ndim.items() if state[k].ndim != n]
    if wrong:
        refuse(f"wrong shape: {wrong}")
    dim, _, *patch_size = state["patch_embed.proj.weight"].shape
    if dim == 0 or dim % HEAD_DIM:
        refuse(f"width {dim} of {prefix}patch_embed.proj.weight is not a multiple of {HEAD_DIM}, the width of a head")
    if state["pos_embed"].shape[1] == 0:
        refuse(f"{prefix}pos_embed is empty")
    depth = 1 + max(int(m[1]) for k in state if (m := re.match(r"blocks\.(\d+)\.", k)))
    with torch.device("meta"):  # shapes without memory: no random weights are drawn to be replaced
        model = ViT3D(dim, depth, state["pos_embed"].shape[1], state["blocks.0.mlp.fc1.weight"].shape[0], patch_size)
    expected = model.state_dict()
    problems = {
        "missing": [prefix + k for k in expected if k not in state],
        "unexpected": [prefix + k for k in state if k not in expected],
        "wrong shape": [f"{prefix + k} {tuple(state[k].shape)}, expected {tuple(expected[k].shape)}"
                        for k in expected if k in state and state[k].shape != expected[k].shape],
    }
    problems = {what: keys for what, keys in problems.items() if keys}
    if problems:
        refuse("; ".join(f"{what}: {', '.join(keys)}" for what, keys in problems.items()))
    not_finite = [prefix + k for k, v in state.items() if not torch.isfinite(v).all()]
    if not_finite:
        refuse(f"not finite: {', '.join(not_finite)}")
    # copies, as float32: nothing of the mapped file is kept, which may be replaced or cut short while this runs
    model.load_state_dict({k: torch.empty(v.shape, device="cpu").copy_(v) for k, v in state.items()}, strict=True, assign=True)

    settings = checkpoint.get("config")
    image_size = plain(settings.get("image_size")) if isinstance(settings, dict) else None
    if image_size is not None:
        if not isinstance(image_size, list) or len(image_size) != 3 or not all(isinstance(n, int) for n in image_size):
            refuse(f"its config.image_size is {image_size!r}, not [depth, height, width]")
        model.image_size = tuple(image_size)
        model.check_size(model.image_size)
    return model.eval()


def weights_hash(model):
    """sha256 over names, shapes and values of a model's weights: says which encoder made a feature."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- pooling and heads


def pool(tokens, method):
    """Tokens (B, N, C) -> features (B, C) by "mean" or "max"."""
    return tokens.mean(dim=1) if method == "mean" else tokens.amax(dim=1)


def pool_grid(tokens, shape, size, method):
    """Tokens (B, N, C) of a grid `shape` (d, h, w), N = d h w -> (B, T, C) of a coarser one `size`, T its product; method: "mean"
    or "max"."""
    B, N, C = tokens.shape
    grid = tokens.transpose(1, 2).reshape(B, C, *shape)  # (B, C, d, h, w)
    grid = F.adaptive_avg_pool3d(grid, size) if method == "mean" else F.adaptive_max_pool3d(grid, size)
    return grid.flatten(2).transpose(1, 2)  # (B, C, *size) -> (B, T, C)


class AttentivePool(nn.Module):
    """Tokens (B, T, C) -> features (B, C): each of C / 64 learned queries weights the tokens and fills its 64 channels of the mean.

    A cross-attention whose key projection is folded into the queries, with no other projections (efficient probing, Psomas et
    al. 2025, arXiv 2506.10178): so few parameters suit few participants. Zero queries, the start, are the mean of the tokens.
    """

    def __init__(self, dim):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(dim // HEAD_DIM, dim))

    def forward(self, x):
        return self.look(x, self.query)

    @staticmethod
    def look(x, query):
        """x (B, T, C), query (..., heads, C): of one head, or of many -> (..., B, C)."""
        weights = torch.einsum("btc,...hc->...bht", x, query / HEAD_DIM**0.5).softmax(dim=-1)
        values = x.unflatten(2, (-1, HEAD_DIM))  # (B, T, heads, 64)
        return torch.einsum("...bht,bthk->...bhk", weights, values).flatten(-2)


class HostDropout(nn.Module):
    """Dropout whose mask is drawn on the host, so that a seed gives the same run on CPU, GPU and TPU; see Noise."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x, noise=None):
        if not self.training or self.p == 0:
            return x
        keep = (noise or any_noise(x)).keep(self.p, x.shape[-1:], layer=-1)
        return x * keep.to(x.device, x.dtype)


class Standardise(nn.Module):
    """(x - mean) / std with the training features' statistics; linear probes need it (MAE: BatchNorm without affine, eps 1e-6)."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def fit(self, features):
        """features (rows, C) of the training split, and of no other; a row is a volume, or one of its tokens."""
        self.mean.copy_(features.mean(dim=0))
        self.std.copy_((features.var(dim=0, unbiased=False) + 1e-6).sqrt())

    def forward(self, x):
        return (x - self.mean) / self.std


class Head(nn.Sequential):
    """Features (B, C) -> logits (B, num_classes): standardise, dropout, linear; with hidden > 0 an MLP of one hidden layer.

    attentive: takes tokens (B, T, C), and pools them first. log_prior (num_classes,): subtracted from the logits except while
    training; zeros unless the loss asks for it.
    """

    def __init__(self, dim, num_classes, hidden=0, dropout=0.0, attentive=False):
        layers = [AttentivePool(dim)] if attentive else []
        layers += [nn.Linear(dim, hidden), nn.GELU()] if hidden else []
        super().__init__(Standardise(dim), *layers, HostDropout(dropout), nn.Linear(hidden or dim, num_classes))
        self.register_buffer("log_prior", torch.zeros(num_classes))
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)  # DINOv2's and V-JEPA's probes: start near uniform answers
                nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def share_direction(self):
        """Make the last layer's weights those of an ordinal head: w (k - mean k) for class k (adjacent-category logits, Agresti 2010)."""
        self[-1].weight.copy_(ordinal(self[-1].weight))

    def forward(self, x, noise=None):
        for layer in self:
            x = layer(x, noise) if isinstance(layer, HostDropout) else layer(x)
        return x if self.training else x - self.log_prior


class KNN(nn.Module):
    """Features (B, C) -> log of the k nearest training volumes' votes (B, num_classes).

    Nearest by cosine between standardised features; a vote weighs exp(cosine / 0.07), as in DINO's kNN (Caron et al. 2021, from
    Wu et al. 2018), times its class's weight. n: number of training volumes.
    """

    def __init__(self, dim, num_classes, n):
        super().__init__()
        self.standardise = Standardise(dim)
        self.register_buffer("features", torch.zeros(n, dim))
        self.register_buffer("votes", torch.zeros(n, num_classes))
        self.register_buffer("k", torch.tensor(1))

    def fit(self, x, labels, weights, k):
        """x (n, C) and labels (n,) of the training split, weights (num_classes,)."""
        self.standardise.fit(x)
        self.features.copy_(F.normalize(self.standardise(x)))
        self.votes.copy_(F.one_hot(labels, len(weights)) * weights)
        self.k.fill_(k)
        return self

    def forward(self, x):
        near, which = (F.normalize(self.standardise(x)) @ self.features.T).topk(self.k.item())  # (B, k)
        votes = ((near / 0.07).exp()[..., None] * self.votes[which]).sum(dim=1)  # (B, k, num_classes) -> (B, num_classes)
        return (votes + torch.finfo(votes.dtype).tiny).log()


def fit_logistic_regression(head, x, labels, weights, C):
    """Make a linear head scikit-learn's logistic regression (L2 penalty 1 / (2 C)) on x (n, C), labels (n,) -> did it converge?

    ValueError when a class is missing from labels."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if labels.unique().numel() < len(weights):
        raise ValueError(f"model.head.kind=logistic_regression needs every one of {len(weights)} classes in training; "
                         f"found {labels.unique().tolist()}")
    head[0].fit(x)
    fitted = LogisticRegression(C=C, class_weight=dict(enumerate(weights.tolist())), max_iter=1000, tol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said by the result instead
        fitted.fit(head[0](x).double().numpy(), labels.numpy())
    with torch.no_grad():
        head[-1].weight.copy_(torch.from_numpy(fitted.coef_))
        head[-1].bias.copy_(torch.from_numpy(fitted.intercept_))
    return bool(fitted.n_iter_.max() < fitted.max_iter)


def discriminant(x, labels, participants, num_classes, is_ordinal):
    """Penalised discriminant analysis (Hastie, Buja and Tibshirani 1995) -> weight (num_classes, C) and bias (num_classes,) for
    equal priors.

    Ridge regression of the class (is_ordinal: of its rank) on x (n, C), with the penalty that predicts best when a participant, with all
    volumes, is left out; then Gaussian classes of one covariance on what was predicted so. participants (n,): integers from 0 on.
    """
    x, y = x.double(), F.one_hot(labels, num_classes).double()  # (n, C), (n, num_classes)
    target = labels[:, None].double() if is_ordinal else y[:, 1:]  # (n, d)
    centre, target = x.mean(dim=0), target - target.mean(dim=0)
    values, axes = torch.linalg.eigh((x - centre).T @ (x - centre))  # principal axes (C, C)
    x = (x - centre) @ axes
    rows = torch.argsort(participants, stable=True).split(participants.bincount().tolist())
    rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)  # (P, volumes)
    own = x[rows] * (rows >= 0)[..., None]  # (P, volumes, C)
    best = None
    for penalty in values.mean().clamp(min=1e-12) * torch.logspace(-4, 4, 17, dtype=torch.float64):
        shrunk = 1 / (values + penalty)
        coefficients = shrunk[:, None] * (x.T @ target)  # (C, d)
        residual = (target - x @ coefficients)[rows] * (rows >= 0)[..., None]
        # (P, volumes, d): exact, without a refit
        left_out = torch.linalg.solve(torch.eye(rows.shape[1], dtype=torch.float64) - own * shrunk @ own.mT, residual)
        error = left_out.square().sum()
        if best is None or error < best[0]:
            scores = target.clone()
            scores[rows[rows >= 0]] -= left_out[rows >= 0]
            best = error, coefficients, scores
    _, coefficients, scores = best  # scores (n, d)
    means = y.T @ scores / y.sum(dim=0).clamp(min=1)[:, None]  # (num_classes, d)
    # few volumes: do not believe how well they part
    covariance = (scores - means[labels]).T @ (scores - means[labels]) + (num_classes + 1) * scores.T @ scores / len(x)
    slopes = torch.linalg.lstsq(covariance / (len(x) + num_classes + 1), means.T).solution.T  # (num_classes, d)
    bias = -(slopes * means).sum(dim=1) / 2
    if is_ordinal:  # equal slopes; the borders between neighbours stay in the middle
        slopes = ordinal(slopes)
        bias = -F.pad((slopes.diff(dim=0) * (means[1:] + means[:-1]) / 2).cumsum(dim=0)[:, 0], (1, 0))
    weight = slopes @ coefficients.T @ axes.T  # (num_classes, C)
    return weight.float(), (bias - weight @ centre).float()


def ordinal(weight):
    """weight (..., num_classes, C) -> the nearest that share one direction and differ by the class's rank."""
    rank = torch.arange(weight.shape[-2], device=weight.device, dtype=weight.dtype)[:, None]
    rank = (rank - rank.mean()) / (rank - rank.mean()).norm()  # (num_classes, 1)
    return rank * (rank * weight).sum(dim=-2, keepdim=True)


def parameter_groups(head, encoder, lr_head, lr_encoder, layer_decay, weight_decay):
    """Groups for an optimizer: those of the head, and of the encoder unless it is None; `peak` is a group's learning rate.

    Layer l of the encoder learns at lr_encoder * layer_decay ** (depth + 1 - l): patches and positions are layer 0, block i is
    layer i + 1, the last norm is layer depth + 1 (BEiT, MAE). Biases, norms and positions do not decay.
    """
    found = {}
    for name, parameter in head.named_parameters():
        found.setdefault(("head", lr_head, parameter.ndim > 1), []).append(parameter)
    for name, parameter in encoder.named_parameters() if encoder else ():
        top = len(encoder.blocks) + 1
        block = re.match(r"blocks\.(\d+)\.", name)
        layer = int(block[1]) + 1 if block else top if name.startswith("norm.") else 0
        found.setdefault(("encoder", lr_encoder * layer_decay ** (top - layer), parameter.ndim > 1 and name != "pos_embed"),
                         []).append(parameter)
    return [{"part": part, "params": parameters, "lr": peak, "peak": peak, "weight_decay": weight_decay if decays else 0.0}
            for (part, peak, decays), parameters in found.items()]
