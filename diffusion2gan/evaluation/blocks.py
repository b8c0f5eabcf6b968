"""Results of several noise blocks taken together: a distance of one set of noises is one draw, and papers print the mean or the best."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion2gan.errors import UserError
from diffusion2gan.evaluation.evaluate import Evaluation, describe
from diffusion2gan.files import write_bytes_atomic, write_json

# Of one block's pictures, and without meaning for several.
_OF_ONE = ("value", "values", "interval95", "interval", "standard_deviation_of_subsets")


def block_folder(out: Path, block: int) -> Path:
    return out / f"block-{block}"


def run_blocks(evaluation: Evaluation, protocols: Sequence[str], count: int) -> dict[str, list[str]]:
    """`evaluation.run` from `count` noise blocks, from its own on, each in OUT/block-K, and their means in OUT. Raises UserError for
    pictures whose noises nobody can choose, and where other blocks were evaluated."""
    model, out = evaluation.model, evaluation.out
    blocks = list(range(evaluation.block, evaluation.block + count))
    if model.folder is not None:
        raise UserError(f"--blocks {count}: {model.name} is a folder of pictures, whose noises are past choosing; name a model")
    # Before anything is drawn: a folder of other blocks is refused.
    describe(out, model.name, model.identity, {"blocks": blocks}, look=True)
    skipped: dict[str, list[str]] = {}
    for block in blocks:
        # All with the same scoring networks, loaded once.
        for protocol, reasons in replace(evaluation, out=block_folder(out, block), block=block).run(protocols).items():
            skipped.setdefault(protocol, []).extend(reasons)
        if (block_folder(out, block) / "model.json").exists():
            describe(out, model.name, model.identity, {"blocks": blocks})
    if not evaluation.worker.rank:
        for protocol, why in pool_blocks(out, protocols, blocks).items():
            skipped.setdefault(protocol, []).append(why)
    return skipped


def pool_blocks(out: Path, protocols: Sequence[str], blocks: Sequence[int]) -> dict[str, str]:
    """Writes OUT/PROTOCOL.json from those of OUT/block-K: each value the mean over the blocks, with their standard deviation and the
    best. Returns why a protocol has none: a block without a result, or with one of other pictures, references or networks."""
    for picture in sorted((block_folder(out, blocks[0]) / "samples").rglob("*.*")):
        write_bytes_atomic(out / "samples" / picture.parent.name / picture.name, picture.read_bytes())
    missing = {}
    for protocol in protocols:
        path, of_blocks = out / f"{protocol}.json", [block_folder(out, b) / f"{protocol}.json" for b in blocks]
        without = [str(b) for b, p in zip(blocks, of_blocks, strict=True) if not p.exists()]
        if without:
            why = f"noise block {', '.join(without)} has no result"
        else:
            results = [json.loads(p.read_text()) for p in of_blocks]
            why = _what_differs(results)
        if why:
            missing[protocol] = why
            # One from before would be taken for this one.
            path.unlink(missing_ok=True)
        else:
            write_json(path, _pooled(results, blocks))
    return missing


def _what_differs(results: Sequence[Mapping[str, Any]]) -> str:
    for key in ("n", "model", "prompts", "reference", "teacher"):
        if len({json.dumps(r[key], sort_keys=True) for r in results}) > 1:
            return f"the noise blocks were evaluated with other {key}; remove the older ones' folders and run it again"
    networks = [sorted(json.dumps([e["metric"], e["variant"], e["network"]], sort_keys=True) for e in r["results"]) for r in results]
    if any(n != networks[0] for n in networks):
        return "the noise blocks were scored by other networks; remove the older ones' folders and run it again"
    return ""


def _other_software(results: Sequence[Mapping[str, Any]]) -> list[str]:
    same = len({json.dumps(r["versions"], sort_keys=True) for r in results}) == 1
    return [] if same else ["the noise blocks were evaluated by other versions or machines; those of the first are named"]


def _pooled(results: Sequence[Mapping[str, Any]], blocks: Sequence[int]) -> dict[str, Any]:
    first = results[0]
    by_metric = [{(e["metric"], e["variant"]): e for e in r["results"]} for r in results]
    entries = []
    for key, entry in by_metric[0].items():
        values = [found[key]["value"] for found in by_metric]
        spread = {"blocks": values, "value": statistics.mean(values), "standard_deviation": statistics.stdev(values)}
        if entry.get("better"):
            spread["best"] = (min if entry["better"] == "lower" else max)(values)
        entries.append({k: v for k, v in entry.items() if k not in _OF_ONE} | spread)
    seconds = [r["seconds_per_image"] for r in results if r["seconds_per_image"] is not None]
    return {
        **first,
        "results": entries,
        "noise": {**first["noise"], "block": list(blocks)},
        "pictures_sha256": [r["pictures_sha256"] for r in results],
        "seconds_per_image": statistics.mean(seconds) if seconds else None,
        "notes": list(dict.fromkeys([*(n for r in results for n in r["notes"]), *_other_software(results)])),
    }
