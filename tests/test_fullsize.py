"""What makes the full size bearable gives the same numbers as the plain way; how fast it is, bench/
says."""

import os
import threading

import pytest
import torch
import torch.nn.functional as F

import device
import model
import phantom


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.fixture(params=[True, False], ids=["AMX", "no AMX"])
def processor(request, monkeypatch):
    """This processor, as one that multiplies tiles of bfloat16, and as one that does not."""
    monkeypatch.setattr(device, "has_amx", lambda: request.param)


@pytest.mark.parametrize("scale", [0.3, 1, 3])  # attention from even to sharp
@pytest.mark.parametrize("tokens", [1, 129, 500])  # below, above and no multiple of the chunk
def test_bfloat16_attention_on_cpu(tokens, scale, processor):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, tokens, 64)
    q, k = q * scale, k * scale + 2  # an offset that all keys share
    exact = F.scaled_dot_product_attention(q, k, v)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    out, usual = device.attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
    assert out.shape == exact.shape and out.dtype == torch.bfloat16
    # its scores are rounded, the usual kernel's are not
    assert relative(out, exact) <= max(1e-2, 2 * relative(usual, exact))
    with torch.inference_mode():
        assert torch.equal(device.attention(q * 1, k * 1, v * 1), out)


def test_bfloat16_attention_leaves_the_threads_as_they_were(processor):
    q = torch.randn(1, 4, 20, 64).bfloat16()
    before, later = torch.get_num_threads(), []
    device.attention(q, q, q)
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert torch.get_num_threads() == before and later == [before]


def test_a_gradient_goes_through_bfloat16_attention(processor):
    q = torch.randn(1, 2, 20, 64).bfloat16().requires_grad_()
    device.attention(q, q, q).sum().backward()
    assert q.grad.abs().sum() > 0


def test_patches_are_the_convolution():
    torch.manual_seed(0)
    embed, x = model.PatchEmbed(128, (4, 16, 16)), torch.randn(2, 1, 8, 48, 64)
    expected = embed.proj(x).flatten(2).transpose(1, 2)
    assert (embed(x) - expected).abs().max() <= 1e-5
    embed(x).square().sum().backward()
    ours, embed.proj.weight.grad = embed.proj.weight.grad, None
    embed.proj(x).square().sum().backward()
    assert relative(ours, embed.proj.weight.grad) <= 1e-5


def test_bfloat16_tokens_are_near_those_of_float32():
    torch.manual_seed(0)
    net, x = model.ViT3D(192, 3, 2 * 3 * 4).eval(), torch.randn(2, 1, 8, 48, 64)
    with torch.no_grad():
        exact = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(net(x), exact) <= 1e-2


@pytest.fixture()
def with_optimizer(tmp_path):
    """Paths of the same encoder's checkpoint, without and with the optimizer's state."""
    plain, whole = (str(tmp_path / name) for name in ("plain.pt", "whole.pt"))
    phantom.write_encoder(plain, (8, 32, 32), 64, 1)
    phantom.write_encoder(whole, (8, 32, 32), 64, 1, optimizer=True)
    assert os.path.getsize(whole) > 1.8 * os.path.getsize(plain)
    return plain, whole


def test_a_checkpoint_with_the_optimizers_state_holds_the_same_encoder(with_optimizer):
    a, b = map(model.load_encoder, with_optimizer)
    assert model.weights_hash(a) == model.weights_hash(b)


def test_nothing_of_a_loaded_encoder_lies_in_the_file(with_optimizer):
    a, b = map(model.load_encoder, with_optimizer)
    with open(with_optimizer[1], "r+b") as f:
        f.truncate(0)
    assert model.weights_hash(b) == model.weights_hash(a)
    assert all(p.requires_grad and p.is_leaf and p.device.type == "cpu" for p in b.parameters())
