#!/usr/bin/env python3
"""The table of linear attention beside its peers, from results of linear_attention.py.

    bench/peers/table.py bench/results/h100.json             prints it
    bench/peers/table.py bench/results/h100.json README.md   puts it between the marks in README.md
"""
import json
import sys

BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"


def cell(peer, ours):
    if "ms" not in peer:
        return next((word for word in ("no answer", "wrong answer") if word in peer["error"]), "refuses")
    return f"{peer['ms']:.3f} ms" + (f", {peer['ms'] / ours['ms']:.1f} x" if ours else "")


def markdown(results):
    ours = {(row["member"], row["pass"], tuple(row["shape"])): row for row in results["ours"]}
    lines = ["| B, T, H, D | member | pass | chela (share of copy) | peer | its time, over ours |", "|---|---|---|---|---|---|"]
    for peer in results["peers"]:
        shape = tuple(peer["shape"])
        member = "none" if peer["member"] == "softmax" else peer["member"]
        own = ours.get((member, peer["pass"], shape))
        if own is None:
            continue
        lines.append(f"| {', '.join(map(str, shape))} | {member} | {peer['pass']} | {own['ms']:.3f} ms ({own['share_of_copy']:.0%}) "
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
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        sys.exit(f"{sys.argv[2]} has no lines '{BEGIN}' and '{END}': put them where the table should be")
    with open(sys.argv[2], "w") as file:
        file.write(f"{before}{BEGIN}\n{table}\n{END}{after}")


if __name__ == "__main__":
    main()
