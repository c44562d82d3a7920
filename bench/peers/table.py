#!/usr/bin/env python3
"""The table of an operator beside those of its peers that were installed, from results of the scripts in this folder.

    bench/peers/table.py bench/results/NAME.json             prints it
    bench/peers/table.py bench/results/NAME.json README.md   puts it between the marks of that name in README.md
"""
import json
import os
import sys


def cell(peer, ours):
    if "ms" not in peer:
        return next((words for words in ("no answer", "wrong answer") if words in peer["error"]), "refuses")
    return f"{peer['ms']:.3f} ms" + (f", {peer['ms'] / ours['ms']:.1f} x" if ours else "")


def stands_for(op):
    """Which of our ops a peer's is compared with: softmax is no linear attention, which stands in for it without decay."""
    return "none" if op == "softmax" else op


def markdown(results):
    ours = {(row["op"], row["pass"], tuple(row["shape"])): row for row in results["ours"]}
    lines = [f"| {results['dimensions']} | op | pass | chela (share of copy) | peer | its time, over ours |", "|---|---|---|---|---|---|"]
    shapes = [row["shape"] for row in results["ours"]]
    for peer in sorted(results["peers"], key=lambda peer: shapes.index(peer["shape"])):
        shape = tuple(peer["shape"])
        op = stands_for(peer["op"])
        own = ours.get((op, peer["pass"], shape))
        if own is None or "No module named" in peer.get("error", ""):
            continue
        lines.append(f"| {', '.join(map(str, shape))} | {op} | {peer['pass']} | {own['ms']:.3f} ms ({own['share_of_copy']:.0%}) "
                     f"| {peer['peer']} | {cell(peer, own)} |")
    about = f"{results['device']}, driver {results['driver']}, PyTorch {results['torch']}, {results['date']}, revision {results['revision']}"
    return "\n".join(lines + ["", about + "."])


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    with open(sys.argv[1]) as file:
        table = markdown(json.load(file))
    if len(sys.argv) == 2:
        print(table)
        return
    with open(sys.argv[2]) as file:
        text = file.read()
    name = os.path.splitext(os.path.basename(sys.argv[1]))[0]
    begin, end = (f"<!-- {name}: {place} -->" for place in ("begin", "end"))
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        sys.exit(f"{sys.argv[2]} has no lines '{begin}' and '{end}': put them where the table should be")
    with open(sys.argv[2], "w") as file:
        file.write(f"{before}{begin}\n{table}\n{end}{after}")


if __name__ == "__main__":
    main()
