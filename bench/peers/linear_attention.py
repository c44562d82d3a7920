#!/usr/bin/env python3
"""Times linear attention on one GPU beside its peers: the same shapes, the same run.

    bench/peers/linear_attention.py build/cuda-release/bench/bench_linear_attention{,_backward}_cuda --backward \
      --out bench/results/linear_attention_h100.json

Needs PyTorch; times flash-linear-attention (package `flash-linear-attention`) where it is installed. Each peer runs in
a process of its own, and has --patience seconds for the compiling and tuning of its first call. All are run once
before, several at a time, so that their compilers have done their work when they are timed, one at a time. Times are
medians of replayed CUDA graphs, or of plain calls where a peer cannot be captured; a call's buffers are rotated past
the second-level cache, as in our own benchmark.
"""
import argparse
import concurrent.futures
import datetime
import json
import re
import subprocess
import sys

SHAPES = [(8, 2048, 16, 64), (4, 4096, 32, 128), (1, 4096, 32, 128)]

# Peer -> the member that it computes, as our benchmark names it. softmax is no member: it is what linear attention stands in for.
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
    for _ in range(max(2, min(16, round(3e8 / bytes_of_set)))):
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
    return ((got - want).square().mean().sqrt() / want.square().mean().sqrt()).item()


def median_ms(calls, replays=15):
    """Median time of one call; `calls` are run in turn, as one graph if they can be captured."""
    import torch

    for call in calls:
        call()
    torch.cuda.synchronize()

    def all_calls():
        for call in calls:
            call()

    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_calls()
        run = graph.replay
    except Exception:
        torch.cuda.synchronize()
        run = all_calls
    run()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / len(calls))
    return sorted(times)[len(times) // 2]


def time_peer(peer, shape, backward):
    """What the process of one peer prints: milliseconds as JSON."""
    import torch

    decay = PEERS[peer]
    op = call_of(peer, decay)
    sets = rotated_inputs(decay, shape)
    if not backward:
        with torch.no_grad():
            if not (error := error_of(op, decay, sets[0][:4])) < 0.01:
                return {"error": f"wrong answer: off by {error:.3f}"}
            return {"ms": median_ms([lambda s=s: op(*s[:4]) for s in sets])}

    def gradients(s):
        inputs = [x.detach().requires_grad_() for x in s[:4] if x is not None]
        q, k, v, g = inputs if s[3] is not None else (*inputs, None)
        o = op(q, k, v, g)
        return lambda: torch.autograd.grad(o, inputs, s[4], retain_graph=True)

    return {"ms": median_ms([gradients(s) for s in sets[:2]])}


def run_peer(peer, shape, backward, patience):
    command = [sys.executable, __file__, "--only", peer, "--shape", *map(str, shape)] + (["--backward"] if backward else [])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {patience} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    complaint = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    return {"error": complaint[:200]}


def run_ours(program):
    """[(member, pass, shape, ms, share of copy)] from one of our own benchmarks."""
    done = subprocess.run([program, "--benchmark_format=json", "--benchmark_filter=tuned"], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{program} failed:\n{done.stderr}")
    rows = []
    for run in json.loads(done.stdout)["benchmarks"]:
        if run.get("error_occurred"):
            sys.exit(f"{run['name']}: {run['error_message']}")
        name = re.match(r"linear_attention/tuned_(\w+)/(\w+)/B:(\d+)/T:(\d+)/H:(\d+)/K:(\d+)/V:(\d+)", run["name"])
        if name and name[6] == name[7]:
            shape = [int(name[i]) for i in (3, 4, 5, 6)]
            rows.append({"member": name[1], "pass": name[2], "shape": shape, "ms": run["real_time"],
                         "share_of_copy": run["share_of_copy"]})
    return rows


def shell(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", help="our benchmarks, bench_linear_attention_cuda and ..._backward_cuda")
    parser.add_argument("--out", help="where the results go, as JSON")
    parser.add_argument("--revision", default=None, help="of our sources; asked of git if not given")
    parser.add_argument("--patience", type=int, default=300, help="seconds for each peer and shape")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--jobs", type=int, default=8, help="peers that compile at the same time")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes")
    parser.add_argument("--backward", action="store_true", help="time gradients too")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(time_peer(args.only, tuple(args.shape), args.backward)))
        return
    if not args.programs:
        parser.error("name our benchmark programs")

    ours = [row for program in args.programs for row in run_ours(program)]
    passes = [False, True] if args.backward else [False]
    runs = [(peer, shape, backward) for shape in SHAPES[: args.shapes] for peer in args.peers for backward in passes]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda run: run_peer(*run, args.patience), runs))
    peers = []
    for peer, shape, backward in runs:
        row = {"peer": peer, "member": PEERS[peer], "pass": "backward" if backward else "forward", "shape": list(shape)}
        row.update(run_peer(peer, shape, backward, args.patience))
        peers.append(row)
        print(row, file=sys.stderr, flush=True)
    import torch

    results = {
        "device": torch.cuda.get_device_name(),
        "driver": shell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "revision": args.revision or shell("git", "rev-parse", "--short", "HEAD"),
        "ours": ours,
        "peers": peers,
    }
    if args.out:
        with open(args.out, "w") as file:
            json.dump(results, file, indent=1)
            file.write("\n")
    from table import markdown

    print(markdown(results))


if __name__ == "__main__":
    main()
