"""What the scripts of this folder share: times on the GPU, a process for each peer, and our own benchmarks' answers."""
import argparse
import concurrent.futures
import datetime
import json
import re
import subprocess
import sys

from table import markdown, stands_for


def median_ms(calls, captured, replays=15):
    """Median time of one call; `calls` are run in turn, as one graph if `captured`, which autograd's are not."""
    import torch

    for call in calls:
        call()
    torch.cuda.synchronize()

    def all_calls():
        for call in calls:
            call()

    run = all_calls
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_calls()
        run = graph.replay
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


def relative_error(got, want):
    """RMS of the error over that of the answer."""
    return ((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt()).item()


def number_of_sets(bytes_of_set):
    """So many that they are together far larger than the second-level cache."""
    return max(2, min(16, round(3e8 / bytes_of_set)))


def run_ours(program, pattern, filter):
    """Rows of one of our own benchmarks, with the groups of `pattern`, which its names have to match."""
    command = [program, "--benchmark_format=json", f"--benchmark_filter={filter}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{program} failed:\n{done.stderr}")
    rows = []
    for run in json.loads(done.stdout)["benchmarks"]:
        if run.get("error_occurred"):
            sys.exit(f"{run['name']}: {run['error_message']}")
        if name := re.match(pattern, run["name"]):
            rows.append((name.groupdict(), {"ms": run["real_time"], "share_of_copy": run["share_of_copy"]}))
    return rows


def shell(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def answers(script, rows, patience):
    """What time_peer of a script says of rows of one peer, from a process of its own; what is late is an error."""
    command = [sys.executable, script, "--only", json.dumps(rows)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=patience)
        lines, complaint = done.stdout, (done.stderr.decode().strip().splitlines() or ["it ended without a word"])[-1]
    except subprocess.TimeoutExpired as late:
        lines, complaint = late.stdout or b"", f"no answer in {patience} s"
    found = [json.loads(line) for line in lines.decode().splitlines() if line.startswith("{")]
    return found + [{"error": complaint[:200]}] * (len(rows) - len(found))


def answer(time_peer, rows):
    """The process of one peer: a line for each row."""
    for row in rows:
        try:
            said = time_peer(row)
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps(said), flush=True)


def main(script, description, dimensions, shapes, peers, ours_of, time_peer):
    """A script's main function. peers says which op each of them computes; a row is a dictionary with peer, op, pass and
    shape. ours_of(program) gives our own rows with their times, and time_peer(row) a peer's, in a process of its own.
    Peers are run where we have a row to compare."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", help="our own benchmarks")
    parser.add_argument("--out", help="where the results go, as JSON, after every peer")
    parser.add_argument("--revision", default=None, help="of our sources; asked of git if not given")
    parser.add_argument("--patience", type=int, default=300, help="seconds that a peer has for its first answers, and again for all of its times")
    parser.add_argument("--peers", nargs="*", default=list(peers), choices=list(peers))
    parser.add_argument("--jobs", type=int, default=8, help="peers that compile at the same time")
    parser.add_argument("--shapes", type=int, default=len(shapes), help="how many of the shapes")
    parser.add_argument("--backward", action="store_true", help="time gradients too")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        answer(time_peer, json.loads(args.only))
        return
    if not args.programs:
        parser.error("name our benchmark programs")
    import torch

    results = {
        "device": torch.cuda.get_device_name(),
        "driver": shell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "revision": args.revision or shell("git", "rev-parse", "--short", "HEAD"),
        "dimensions": dimensions,
        "ours": [row for program in args.programs for row in ours_of(program)],
        "peers": [],
    }
    compared = [(row["op"], row["pass"], tuple(row["shape"])) for row in results["ours"]]
    rows = [{"peer": peer, "op": peers[peer], "pass": name, "shape": list(shape)}
            for shape in shapes[: args.shapes] for peer in args.peers for name in ("forward", "backward")[: 1 + args.backward]
            if (stands_for(peers[peer]), name, tuple(shape)) in compared]
    # All once before, several at a time: their compilers have done their work when they are timed, one at a time.
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        first_answers = list(pool.map(lambda row: answers(script, [row], args.patience)[0], rows))
    print(f"{len(rows)} first answers; now one at a time", file=sys.stderr, flush=True)
    for peer in args.peers:
        results["peers"] += [{**row, **first} for row, first in zip(rows, first_answers) if row["peer"] == peer and "error" in first]
        own = [row for row, first in zip(rows, first_answers) if row["peer"] == peer and "error" not in first]
        results["peers"] += [{**row, **said} for row, said in zip(own, answers(script, own, args.patience) if own else [])]
        print(f"{peer}: {sum('ms' in row for row in results['peers'] if row['peer'] == peer)} times", file=sys.stderr, flush=True)
        if args.out:
            with open(args.out, "w") as file:
                json.dump(results, file, indent=1)
                file.write("\n")
    print(markdown(results))
