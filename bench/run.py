#!/usr/bin/env python3
"""Measures vlmc beside llama.cpp, OpenVINO GenAI, onnxruntime-genai and torch: see README.md."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import time
from itertools import groupby
from pathlib import Path

import setup
from commands import Failed, run
from measure import PEERS, Peer, accuracy, count_tokens, measure_peer, measure_vlmc
from rows import BY_NAME, Row, chosen
from setup import HERE, REPOSITORY, Place, log


def arguments() -> argparse.Namespace:
    words = lambda text: [word for word in text.split(",") if word]  # noqa: E731
    tools = list(dict.fromkeys(peer.tool for peer in PEERS))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=words, default=tools, metavar="A,B", help=f"of {', '.join(tools)} [default: all]")
    parser.add_argument("--threads", type=words, default=["2", "1"], metavar="N,M", help="[default: 2,1]")
    parser.add_argument("--rows", type=words, default=list(BY_NAME), metavar="A,B", help=f"of {', '.join(BY_NAME)}, or the beginning of a name up to '-' [default: all]")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="measurements of each [default: 5]")
    parser.add_argument("--repeat-long", type=int, default=1, metavar="N", help="measurements of the largest picture, which takes minutes, and of memory with a picture [default: 1]")
    parser.add_argument("--add", action="store_true", help="to what results.json has of this machine; measurements of the same row, peer and threads are replaced")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "target/bench", metavar="DIR", help="where peers and models are made and kept: 35 GB [default: target/bench]")
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
        # Virtual machines often have the maker's name only; family and model tell which cores these are.
        "processor": " ".join([fields.get("model name", platform.machine()), *(f"{name} {fields[name]}" for name in ("cpu family", "model") if name in fields)]),
        "cores": str(os.cpu_count()),
        "instructions": ", ".join(flag for flag in known if flag in fields.get("flags", "").split()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "kernel": platform.release(),
    }


def versions(place: Place, vlmc: Path) -> dict[str, str]:
    packages = {
        "openvino": ["openvino-genai", "optimum-intel", "transformers"],
        "onnxruntime-genai": ["onnxruntime-genai", "onnxruntime"],
        "mobius-onnx": ["mobius-onnx"],
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
    tokens = count_tokens(place, vlmc)
    failed: set[tuple[str, str, int]] = set()

    def pair(peer: Peer, rows: list[Row], threads: int) -> None:
        names = [row.name for row in rows]
        quant = rows[0].artifact or peer.quant
        start = time.monotonic()
        theirs = measure_peer(place, vlmc, peer, names, threads, tokens)
        ours = measure_vlmc(place, vlmc, quant, names, threads)
        for name in names:
            sample = {"peer": peer.name, "row": name, "threads": threads, "quant": quant, "theirs": theirs[name], "ours": ours[name].pop("value")}
            results["samples"].append(sample | ours[name])
            log(f"{threads} threads, {name}: {peer.name} {theirs[name]:.3g}, vlmc {sample['ours']:.3g} {BY_NAME[name].unit}")
        log(f"that took {time.monotonic() - start:.0f} s")

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


def added(before: dict, now: dict, args: argparse.Namespace) -> dict:
    """What was measured before, but for what is to be measured again, with the versions of both."""
    if before["machine"] != now["machine"]:
        raise Failed(f"--add: results.json is of another machine: {before['machine']}")
    again = {(peer, row.name, threads) for peer in now["peers"] for row in args.rows for threads in map(int, args.threads)}
    groups = {(peer, BY_NAME[row].group, threads) for peer, row, threads in again}
    versions = {name: before["versions"].get(name, []) for name in before["versions"] | now["versions"]}
    for name, new in now["versions"].items():
        versions[name] += [version for version in new if version not in versions[name]]
    peers = before["peers"] | now["peers"]
    stale = lambda f: (f["peer"], f["group"], f["threads"]) in groups if "group" in f else f["peer"] in now["peers"]  # noqa: E731
    return now | {
        "versions": versions,
        "peers": {peer.name: peers[peer.name] for peer in PEERS if peer.name in peers},
        "failures": [f for f in before["failures"] if not stale(f)] + now["failures"],
        "samples": [s for s in before["samples"] if (s["peer"], s["row"], s["threads"]) not in again],
    }


def main() -> None:
    args = arguments()
    place = Place(args.work.resolve())
    place.root.mkdir(parents=True, exist_ok=True)
    peers = [peer for peer in PEERS if peer.tool in args.peers]
    # `g32` tells how many tokens a prompt has.
    artifacts = {"g32"} | {row.artifact or peer.quant for peer in peers for row in args.rows if row.name in peer.rows}
    vlmc = setup.vlmc(place, args.vlmc and args.vlmc.resolve(), artifacts)
    not_set_up = setup.peers(place, args.peers)
    file = place.root / "results.json"
    results = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": {name: [version] for name, version in versions(place, vlmc).items()},
        "peers": {peer.name: {"weights": peer.weights, "quant": peer.quant} for peer in peers},
        "accuracy": accuracy(place, vlmc),
        "failures": [{"peer": peer.name, "reason": not_set_up[peer.tool]} for peer in peers if peer.tool in not_set_up],
        "samples": [],
    }
    if args.add and file.exists():
        results = added(json.loads(file.read_text()), results, args)
    save = lambda: file.write_text(json.dumps(results, indent=1))  # noqa: E731
    measure(args, place, vlmc, [peer for peer in peers if peer.tool not in not_set_up], results, save)
    save()
    log(f"{file}: every measurement")
    args.docs.mkdir(parents=True, exist_ok=True)
    run([place.python(setup.SHARED_ENVIRONMENT), HERE / "report.py", file, args.docs])
    log(f"{args.docs}/benchmarks.md and benchmarks.svg are written")


if __name__ == "__main__":
    try:
        main()
    except Failed as e:
        raise SystemExit(f"error: {e}") from e
