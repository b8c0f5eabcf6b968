"""Results of several noise blocks taken together: a distance of one set of noises is one draw, and papers print the mean or the best."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion2gan.files import write_json

# Of one block's pictures, and without meaning for several.
_OF_ONE = ("value", "values", "interval95", "interval", "standard_deviation_of_subsets")


def block_folder(out: Path, block: int) -> Path:
    return out / f"block-{block}"


def pool_blocks(out: Path, protocols: Sequence[str], blocks: Sequence[int]) -> list[str]:
    """Writes OUT/PROTOCOL.json from those of OUT/block-K: each value the mean over the blocks, with their standard deviation and the
    best. Returns the protocols that a block has no result of."""
    missing = []
    for protocol in protocols:
        paths = [block_folder(out, b) / f"{protocol}.json" for b in blocks]
        if not all(p.exists() for p in paths):
            missing.append(protocol)
            continue
        write_json(out / f"{protocol}.json", _pooled([json.loads(p.read_text()) for p in paths], blocks))
    samples = block_folder(out, blocks[0]) / "samples"
    if samples.exists():
        shutil.copytree(samples, out / "samples", dirs_exist_ok=True)
    return missing


def _pooled(results: Sequence[Mapping[str, Any]], blocks: Sequence[int]) -> dict[str, Any]:
    first = results[0]
    by_metric = [{(e["metric"], e["variant"]): e for e in r["results"]} for r in results]
    entries = []
    for key, entry in by_metric[0].items():
        if not all(key in found for found in by_metric):
            continue
        values = [found[key]["value"] for found in by_metric]
        spread = {"blocks": values, "value": statistics.mean(values), "standard_deviation": statistics.stdev(values)}
        if entry.get("better"):
            spread["best"] = (min if entry["better"] == "lower" else max)(values)
        entries.append({k: v for k, v in entry.items() if k not in _OF_ONE} | spread)
    seconds = [r["seconds_per_image"] for r in results if r["seconds_per_image"] is not None]
    return {
        **first,
        "partial": any(r["partial"] for r in results),
        "results": entries,
        "noise": {**first["noise"], "block": list(blocks)},
        "pictures_sha256": [r["pictures_sha256"] for r in results],
        "seconds_per_image": statistics.mean(seconds) if seconds else None,
        "notes": list(dict.fromkeys(n for r in results for n in r["notes"])),
    }
