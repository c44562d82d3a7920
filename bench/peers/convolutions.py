#!/usr/bin/env python3
"""Times convolutions of bf16 data on one GPU beside their peers: the same shapes, the same run.

    bench/peers/convolutions.py build/cuda-release/bench/bench_{long,short}_conv_cuda --backward \
      --out bench/results/convolutions_h100.json

Long kernels are as long as the sequence, and given as taps at each call: their transform is part of the time. Needs
PyTorch; times FlashFFTConv, the package `causal-conv1d` and flash-linear-attention's short convolution where they are
installed. Short ones are of width 4 with bias and SiLU. See linear_attention.py for how times are taken.
"""
import os

import measure

SHAPES = [(8, 1024, 2048), (64, 768, 1024), (8, 1024, 4096), (8, 1024, 8192), (4, 1024, 16384), (1, 1024, 131072)]
WIDTH = 4

# Peer -> the convolution that it computes.
PEERS = {
    "torch fft": "long [B,D,T]",
    "FlashFFTConv": "long [B,D,T]",
    "torch conv1d": "short [B,D,T]",
    "causal_conv1d": "short [B,D,T]",
    "fla causal_conv1d": "short [B,T,D]",
}


def call_of(peer, shape):
    """The peer as a function of x [B, D, T], taps [D, L] and a bias [D]."""
    import torch

    if peer == "torch fft":

        def long(x, taps, bias):
            tokens = x.shape[-1]
            spectrum = torch.fft.rfft(x.float(), 2 * tokens) * torch.fft.rfft(taps, 2 * tokens)
            return torch.fft.irfft(spectrum, 2 * tokens)[..., :tokens].bfloat16()

        return long
    if peer == "FlashFFTConv":
        from flashfftconv import FlashFFTConv

        convolution = FlashFFTConv(2 * shape[2], dtype=torch.bfloat16).cuda()
        return lambda x, taps, bias: convolution(x, taps)
    silu = torch.nn.functional.silu
    if peer == "torch conv1d":
        return lambda x, taps, bias: silu(torch.nn.functional.conv1d(
            x, taps.flip(1).to(x.dtype)[:, None], bias.to(x.dtype), padding=WIDTH - 1, groups=x.shape[1])[..., : x.shape[2]])
    if peer == "causal_conv1d":
        from causal_conv1d import causal_conv1d_fn

        return lambda x, taps, bias: causal_conv1d_fn(x, taps.flip(1), bias, activation="silu")
    from fla.modules.causal_conv1d import causal_conv1d

    def channels_last(x, taps, bias):
        y = causal_conv1d(x.transpose(1, 2), taps.flip(1), bias, activation="silu", backend="triton")
        return (y[0] if isinstance(y, tuple) else y).transpose(1, 2)

    return channels_last


def rotated_inputs(op, shape):
    """Sets of x, taps, bias and the gradient of y, together far larger than the second-level cache."""
    import torch

    batch, channels, tokens = shape
    length = tokens if op.startswith("long") else WIDTH
    torch.manual_seed(0)

    def rows():
        x = torch.rand(batch, channels, tokens, device="cuda").mul_(2).sub_(1).bfloat16()
        return x.transpose(1, 2).contiguous().transpose(1, 2) if op.endswith("[B,T,D]") else x

    def taps():
        return torch.rand(channels, length, device="cuda").mul_(2).sub_(1) * length**-0.5

    sets = measure.number_of_sets(6 * batch * channels * tokens)
    return [(rows(), taps(), torch.rand(channels, device="cuda"), rows()) for _ in range(sets)]


def error_of(got, op, inputs):
    """Of some outputs of the last row and channel, against sums in double."""
    import torch

    x, taps, bias = (row[-1].double() for row in (inputs[0][-1], *inputs[1:3]))
    places = torch.arange(x.shape[0] - 1, -1, -max(x.shape[0] // 40, 1), device=x.device)
    want = torch.stack([(x[: t + 1].flip(0)[: len(taps)] * taps[: t + 1]).sum() for t in places])
    if op.startswith("short"):
        want = torch.nn.functional.silu(want + bias)
    return measure.relative_error(got[-1, -1, places], want)


def time_peer(row):
    import torch

    op = row["op"]
    call = call_of(row["peer"], row["shape"])
    sets = rotated_inputs(op, row["shape"])
    if row["pass"] == "forward":
        with torch.no_grad():
            if not (error := error_of(call(*sets[0][:3]), op, sets[0])) < 0.01:
                return {"error": f"wrong answer: off by {error:.3f}"}
            return {"ms": measure.median_ms([lambda s=s: call(*s[:3]) for s in sets], captured=True)}

    def gradients(s):
        inputs = [x.detach().requires_grad_() for x in s[: 2 if op.startswith("long") else 3]]
        y = call(*inputs, *s[len(inputs) : 3])
        return lambda: torch.autograd.grad(y, inputs, s[3], retain_graph=True)

    return {"ms": measure.median_ms([gradients(s) for s in sets[:2]], captured=False)}


def ours_of(program):
    long = (r"long_conv/bf16_(?P<layout>bdt|btd)_automatic_kernel_made/(?P<pass>\w+)/whole_sequences"
            r"/B:(?P<B>\d+)/D:(?P<D>\d+)/T:(?P<T>\d+)/L:\d+")
    short = r"short_conv/bf16_width4_silu(?P<layout>_tokens_last)?/(?P<pass>\w+)/B:(?P<B>\d+)/T:(?P<T>\d+)/D:(?P<D>\d+)"
    for kind, name, filter in (("long", long, "bf16_b.._automatic_kernel_made"), ("short", short, "bf16_width4")):
        if kind not in os.path.basename(program):
            continue
        for at, times in measure.run_ours(program, name, filter):
            layout = "[B,D,T]" if at["layout"] in ("bdt", "_tokens_last") else "[B,T,D]"
            yield {"op": f"{kind} {layout}", "pass": at["pass"], "shape": [int(at[size]) for size in "BDT"], **times}


if __name__ == "__main__":
    measure.main(__file__, __doc__, "B, D, T", SHAPES, PEERS, ours_of, time_peer)
