#!/usr/bin/env python3
"""Times linear attention on one GPU beside its peers: the same shapes, the same run.

    bench/peers/linear_attention.py build/cuda-release/bench/bench_linear_attention{,_backward}_cuda --backward \
      --out bench/results/linear_attention_h100.json

Needs PyTorch; times flash-linear-attention (package `flash-linear-attention`) where it is installed. Each peer runs in
a process of its own, and has --patience seconds for the compiling and tuning of its first call. All are run once
before, several at a time, so that their compilers have done their work when they are timed, one at a time. Times are
medians of replayed CUDA graphs, of gradients plain calls; a call's buffers are rotated past the second-level cache, as in
our own benchmark.
"""
import measure

SHAPES = [(8, 2048, 16, 64), (4, 4096, 32, 128), (1, 4096, 32, 128)]

# Peer -> the member that it computes, as our benchmark names it, or softmax.
PEERS = {
    "fla fused_chunk_linear_attn": "none",
    "fla chunk_linear_attn": "none",
    "fla chunk_simple_gla": "per_token",
    "fla chunk_gla": "per_key",
    "torch scaled_dot_product_attention": "softmax",
}


def call_of(peer, decay):
    """The peer as a function of q, k, v [B, T, H, D] and a log-decay."""
    import torch

    if peer.startswith("torch"):

        def softmax(q, k, v, g):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        return softmax
    name = peer.split()[1]
    if decay == "none":
        from fla.ops import linear_attn

        op = getattr(linear_attn, name)
        return lambda q, k, v, g: op(q, k, v, normalize=False)[0]
    if decay == "per_token":
        from fla.ops.simple_gla import chunk_simple_gla

        return lambda q, k, v, g: chunk_simple_gla(q, k, v, g=g)[0]
    from fla.ops.gla import chunk_gla

    return lambda q, k, v, g: chunk_gla(q, k, v, g)[0]


def rotated_inputs(decay, shape):
    """Sets of q, k, v, log-decay and the gradient of o, together far larger than the second-level cache."""
    import torch

    batch, tokens, heads, dim = shape
    bytes_of_set = 10 * batch * tokens * heads * dim
    torch.manual_seed(0)
    sets = []
    for _ in range(measure.number_of_sets(bytes_of_set)):
        rows = [torch.rand(batch, tokens, heads, dim, device="cuda").mul_(2).sub_(1).bfloat16() for _ in range(4)]
        decay_shape = {"per_token": (batch, tokens, heads), "per_key": shape}.get(decay)
        g = None if decay_shape is None else torch.rand(decay_shape, device="cuda") * -0.2
        sets.append((rows[0], rows[1], rows[2], g, rows[3]))
    return sets


def error_of(op, decay, inputs, tokens=256):
    """RMS of the error over that of the answer, for the first tokens of one head, against a double product over all pairs."""
    import torch

    q, k, v, g = (None if x is None else x[:1, :tokens, :1].contiguous() for x in inputs)
    got = op(q, k, v, g)[0, :, 0].double()
    q, k, v = (x[0, :, 0].double() for x in (q, k, v))
    scale = q.shape[1] ** -0.5
    causal = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).tril()
    if decay == "softmax":
        weights = (scale * q @ k.T).masked_fill(~causal, -torch.inf).softmax(1)
    else:
        sums = torch.zeros_like(q) if g is None else g[0, :, 0].double().reshape(len(q), -1).expand_as(q).cumsum(0)
        kept = (sums[:, None] - sums[None]).masked_fill(~causal[..., None], -torch.inf).exp()
        weights = scale * torch.einsum("tk,sk,tsk->ts", q, k, kept)
    want = weights @ v
    return measure.relative_error(got, want)


def time_peer(row):
    import torch

    decay = row["op"]
    op = call_of(row["peer"], decay)
    sets = rotated_inputs(decay, row["shape"])
    if row["pass"] == "forward":
        with torch.no_grad():
            if not (error := error_of(op, decay, sets[0][:4])) < 0.01:
                return {"error": f"wrong answer: off by {error:.3f}"}
            return {"ms": measure.median_ms([lambda s=s: op(*s[:4]) for s in sets], captured=True)}

    def gradients(s):
        inputs = [x.detach().requires_grad_() for x in s[:4] if x is not None]
        q, k, v, g = inputs if s[3] is not None else (*inputs, None)
        o = op(q, k, v, g)
        return lambda: torch.autograd.grad(o, inputs, s[4], retain_graph=True)

    return {"ms": measure.median_ms([gradients(s) for s in sets[:2]], captured=False)}


def ours_of(program):
    name = r"linear_attention/tuned_(?P<op>\w+)/(?P<pass>\w+)/B:(?P<B>\d+)/T:(?P<T>\d+)/H:(?P<H>\d+)/K:(?P<K>\d+)/V:(?P=K)"
    for at, times in measure.run_ours(program, name, "tuned"):
        yield {"op": at["op"], "pass": at["pass"], "shape": [int(at[size]) for size in "BTHK"], **times}


if __name__ == "__main__":
    measure.main(__file__, __doc__, "B, T, H, D", SHAPES, PEERS, ours_of, time_peer)
