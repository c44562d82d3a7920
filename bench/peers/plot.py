#!/usr/bin/env python3
"""Draws time per element of long convolutions against tokens, ours and peers', from results of convolutions.py.

    bench/peers/plot.py bench/results/convolutions_h100.json bench/results/long_conv_h100.svg
"""
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from plot_long_conv import draw


def read_series(results):
    """{name/pass: {tokens: nanoseconds per element}}"""
    series = {}
    for row in results["ours"] + results["peers"]:
        if not row["op"].startswith("long") or "ms" not in row:
            continue
        batch, channels, tokens = row["shape"]
        name = f"{row['peer']}/{row['pass']}" if "peer" in row else f"chela {row['op'][5:]}/{row['pass']}"
        series.setdefault(name, {})[tokens] = 1e6 * row["ms"] / (batch * channels * tokens)
    return series


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with open(sys.argv[1]) as file:
        results = json.load(file)
    series = read_series(results)
    if not series:
        sys.exit(f"{sys.argv[1]} has no times of long convolutions")
    with open(sys.argv[2], "w") as file:
        file.write(draw(series, f"Long convolution of bf16 data, kernel transformed at each call, {results['device']}"))


if __name__ == "__main__":
    main()
