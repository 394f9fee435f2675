#!/usr/bin/env python3
"""Measures vlmc beside llama.cpp, OpenVINO GenAI, onnxruntime-genai and torch: see README.md."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
from itertools import groupby
from pathlib import Path

import setup
from commands import Failed, run
from measure import PEERS, Peer, measure_peer, measure_vlmc, prompt_tokens
from rows import BY_NAME, Row, chosen
from setup import HERE, REPOSITORY, Place, log


def arguments() -> argparse.Namespace:
    words = lambda text: [word for word in text.split(",") if word]  # noqa: E731
    tools = list(setup.PACKAGES)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=words, default=tools, metavar="A,B", help=f"of {', '.join(tools)} [default: all]")
    parser.add_argument("--threads", type=words, default=["2", "1"], metavar="N,M", help="[default: 2,1]")
    parser.add_argument("--rows", type=words, default=list(BY_NAME), metavar="A,B", help=f"of {', '.join(BY_NAME)}, or the beginning of a name up to '-' [default: all]")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="measurements of each [default: 5]")
    parser.add_argument("--repeat-long", type=int, default=1, metavar="N", help="measurements of the largest picture, which takes minutes, and of memory with a picture [default: 1]")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "target/bench", metavar="DIR", help="where peers and models are made and kept: 25 GB [default: target/bench]")
    parser.add_argument("--vlmc", type=Path, metavar="PATH", help="binary to measure [default: built from this repository]")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs", metavar="DIR", help="where benchmarks.md and benchmarks.svg go [default: docs]")
    args = parser.parse_args()
    unknown = [name for name in args.peers if name not in tools]
    if unknown:
        parser.error(f"--peers: there is no '{unknown[0]}'; there are {', '.join(tools)}")
    if not all(n.isdecimal() and int(n) > 0 for n in args.threads):
        parser.error("--threads: numbers from 1 on, with commas between them")
    if args.repeat < 1 or args.repeat_long < 0:
        parser.error("--repeat: 1 at least; --repeat-long: 0 at least")
    try:
        args.rows = chosen(args.rows)
    except ValueError as e:
        parser.error(str(e))
    return args


def machine() -> dict[str, str]:
    """Of this machine, what speed depends on."""
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in lines}
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return {
        "processor": fields.get("model name", platform.machine()),
        "cores": str(os.cpu_count()),
        "instructions": ", ".join(flag for flag in known if flag in fields.get("flags", "").split()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "kernel": platform.release(),
    }


def versions(place: Place, vlmc: Path) -> dict[str, str]:
    packages = {
        "openvino": ["openvino-genai", "optimum-intel", "transformers"],
        "onnxruntime-genai": ["onnxruntime-genai", "onnxruntime"],
        "torch": ["torch", "transformers"],
    }
    found = {}
    for environment, names in packages.items():
        installed = setup.versions(place, environment)
        of = [f"{name} {installed[name]}" for name in names if name in installed]
        if of:
            found[environment] = ", ".join(of)
    source = place.root / "llama.cpp/source/VERSION"
    if source.exists():
        found["llama.cpp"] = f"of {source.read_text()}"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()
    found["vlmc"] = f"{run([vlmc, '--version']).output.split()[-1]}" + (f" ({commit})" if commit else "")
    return found


def measure(args: argparse.Namespace, place: Place, vlmc: Path, peers: list[Peer], results: dict, save) -> None:
    """Runs a peer, then vlmc, then the next peer, then vlmc, and so on, `--repeat` times."""
    tokens = prompt_tokens(place, vlmc)
    failed: set[tuple[str, str, int]] = set()

    def pair(peer: Peer, rows: list[Row], threads: int) -> None:
        names = [row.name for row in rows]
        theirs = measure_peer(place, peer, names, threads, tokens)
        ours, limits = measure_vlmc(place, vlmc, peer.quant, names, threads)
        for name in names:
            sample = {"peer": peer.name, "row": name, "threads": threads, "theirs": theirs[name], "ours": ours[name]}
            results["samples"].append(sample | ({"of_limit": limits[name]} if name in limits else {}))
            log(f"{threads} threads, {name}: {peer.name} {theirs[name]:.3g}, vlmc {ours[name]:.3g} {BY_NAME[name].unit}")

    for threads in map(int, args.threads):
        for i in range(max(args.repeat, args.repeat_long)):
            for peer in peers:
                rows = [row for row in args.rows if row.name in peer.rows and i < (args.repeat_long if row.long else args.repeat)]
                for group, of_group in groupby(rows, key=lambda row: row.group):
                    if (peer.name, group, threads) in failed:
                        continue
                    try:
                        pair(peer, list(of_group), threads)
                    except Failed as e:
                        log(f"{peer.name}, {group}: {e}")
                        failed.add((peer.name, group, threads))
                        results["failures"].append({"peer": peer.name, "threads": threads, "group": group, "reason": str(e)})
                    save()


def main() -> None:
    args = arguments()
    place = Place(args.work.resolve())
    place.root.mkdir(parents=True, exist_ok=True)
    vlmc = setup.vlmc(place, args.vlmc and args.vlmc.resolve())
    not_set_up = setup.peers(place, args.peers)
    peers = [peer for peer in PEERS if peer.tool in args.peers]
    results = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(place, vlmc),
        "peers": {peer.name: {"weights": peer.weights, "quant": peer.quant} for peer in peers},
        "failures": [{"peer": peer.name, "reason": not_set_up[peer.tool]} for peer in peers if peer.tool in not_set_up],
        "samples": [],
    }
    file = place.root / "results.json"
    save = lambda: file.write_text(json.dumps(results, indent=1))  # noqa: E731
    measure(args, place, vlmc, [peer for peer in peers if peer.tool not in not_set_up], results, save)
    save()
    log(f"{file}: every measurement")
    run([place.python(setup.SHARED_ENVIRONMENT), HERE / "report.py", file, args.docs])
    log(f"{args.docs}/benchmarks.md and benchmarks.svg are written")


if __name__ == "__main__":
    try:
        main()
    except Failed as e:
        raise SystemExit(f"error: {e}") from e
