#!/usr/bin/env python3
"""Draws time per element against tokens from the output of bench_long_conv_cpu. Needs nothing but Python.

    bench_long_conv_cpu --benchmark_out=long.json --benchmark_out_format=json
    bench/plot_long_conv.py long.json long.svg [--threads 1] [--variants direct transform fftw]
"""
import argparse
import json
import math
import sys

COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f"]
WIDTH, HEIGHT = 900, 560
LEFT, RIGHT, TOP, BOTTOM = 80, 220, 50, 60


def read_series(path, threads):
    """{variant/pass: {tokens: least nanoseconds per element}} of batch 1."""
    with open(path) as file:
        runs = json.load(file)["benchmarks"]
    series = {}
    for run in runs:
        parts = run["name"].split("/")
        sizes = dict(part.split(":") for part in parts if ":" in part)
        if "items_per_second" not in run or run.get("run_type") == "aggregate":
            continue
        if int(sizes.get("B", 1)) != 1 or int(sizes.get("threads", 1)) != threads:
            continue
        name = "/".join(part for part in parts[1:] if ":" not in part and part != "manual_time")
        nanoseconds = 1e9 / float(run["items_per_second"])
        points = series.setdefault(name, {})
        tokens = int(sizes["T"])
        points[tokens] = min(points.get(tokens, math.inf), nanoseconds)
    return series


def ticks(low, high, base):
    first, last = math.floor(math.log(low, base) + 1e-9), math.ceil(math.log(high, base) - 1e-9)
    return [base**i for i in range(first, last + 1)]


def draw(series, title):
    tokens = [t for points in series.values() for t in points]
    times = [v for points in series.values() for v in points.values()]
    x_ticks = ticks(min(tokens), max(tokens), 4)
    y_ticks = ticks(min(times), max(times), 2)
    x_low, x_high = math.log(x_ticks[0]), math.log(x_ticks[-1])
    y_low, y_high = math.log(y_ticks[0]), math.log(y_ticks[-1])

    def x(value):
        return LEFT + (math.log(value) - x_low) / max(x_high - x_low, 1e-9) * (WIDTH - LEFT - RIGHT)

    def y(value):
        return HEIGHT - BOTTOM - (math.log(value) - y_low) / max(y_high - y_low, 1e-9) * (HEIGHT - TOP - BOTTOM)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
           f'<text x="{LEFT}" y="28" font-size="16">{title}</text>']
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for value in x_ticks:
        out.append(f'<line x1="{x(value):.1f}" y1="{TOP}" x2="{x(value):.1f}" y2="{bottom}" stroke="#ddd"/>')
        out.append(f'<text x="{x(value):.1f}" y="{bottom + 20}" text-anchor="middle">{value}</text>')
    for value in y_ticks:
        out.append(f'<line x1="{LEFT}" y1="{y(value):.1f}" x2="{right}" y2="{y(value):.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    out.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 15}" text-anchor="middle">tokens</text>')
    out.append(f'<text transform="translate(22,{(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
               'nanoseconds per element</text>')
    for i, (name, points) in enumerate(sorted(series.items())):
        colour = COLOURS[i % len(COLOURS)]
        dashes = ' stroke-dasharray="6 4"' if i >= len(COLOURS) else ""
        line = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in sorted(points.items()))
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        for t, v in points.items():
            out.append(f'<circle cx="{x(t):.1f}" cy="{y(v):.1f}" r="3" fill="{colour}"/>')
        row = TOP + 10 + 22 * i
        out.append(f'<line x1="{right + 15}" y1="{row}" x2="{right + 40}" y2="{row}" stroke="{colour}" '
                   f'stroke-width="2"{dashes}/>')
        out.append(f'<text x="{right + 46}" y="{row + 4}">{name}</text>')
    return "\n".join(out + ["</svg>", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json")
    parser.add_argument("svg")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", nargs="*", help="only these first parts of the names; all by default")
    args = parser.parse_args()
    series = read_series(args.json, args.threads)
    if args.variants:
        series = {name: points for name, points in series.items() if name.split("/")[0] in args.variants}
    if not series:
        sys.exit(f"{args.json} has no matching runs of bench_long_conv_cpu")
    with open(args.svg, "w") as file:
        file.write(draw(series, f"Long convolution, 256 channels, float, {args.threads} thread(s)"))


if __name__ == "__main__":
    main()
