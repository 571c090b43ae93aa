"""What commands print: from the facts, which ``--json`` prints as they are, to lines of text."""

from __future__ import annotations

from typing import Any

from .parser import EXPORTS

__all__ = [
    "comparison_text",
    "conversion_text",
    "diameter_text",
    "models_text",
    "plan_text",
    "qc_text",
    "scene_text",
    "scripts_text",
    "summary_text",
    "training_text",
]

SHOWN_S = 0.05


def qc_text(facts: dict[str, Any]) -> list[str]:
    """A line per finding, those to look at marked, and where the page is."""
    lines = [
        f"{'!' if found['is_suspicious'] else ' '} {found['name']:<12} {found['text']}" for found in facts["findings"]
    ]
    return [
        *lines,
        f"  page         {facts['page'] or 'not written: there is no table to lie beside, give one with -o'}",
    ]


def scripts_text(facts: dict[str, Any]) -> list[str]:
    """Scripts one after another."""
    return [line for script, text in facts.items() for line in (f"==> {script} <==", *text.splitlines(), "")]


def conversion_text(facts: dict[str, Any]) -> list[str]:
    """What was written."""
    lines = _image_text(facts["image"])
    kept = f", {facts['n_kept']} of {facts['n_pieces']} pieces kept from before" if facts["n_kept"] else ""
    return [
        *lines,
        f"seconds      {facts['seconds']:.1f}{kept}",
        f"peak memory  {facts['peak_memory'] / 2**30:.2f} GiB over all processes",
    ]


def models_text(facts: dict[str, Any]) -> list[str]:
    """A paragraph per model."""
    lines = []
    for model in facts["models"]:
        state = model["path"] if model["is_here"] else f"not here; belongs to {model['path']}"
        lines += [f"{model['name']:<16} {model['purpose']}", f"{'':<16} {model['licence']}", f"{'':<16} {state}"]
    return lines


def training_text(facts: dict[str, Any]) -> list[str]:
    """What was learned."""
    lines = [
        f"learned from {facts['n_images']} images, {facts['n_held_out']} held out; {facts['n_objects']:,} objects of "
        f"{facts['diameter']:.1f} px",
        f"loss         {facts['loss']:.3f}",
    ]
    for name, key in ((facts["start"], "ap_before"), ("the new model", "ap_after")):
        if facts[key] is not None:
            scores = ", ".join(f"{ap:.3f} at {iou:g}" for ap, iou in zip(facts[key], (0.5, 0.75, 0.9), strict=True))
            lines.append(f"precision    {scores} by {name}, on what was held out")
    return [*lines, f"model        {facts['model']}", f"size model   {facts['size_model']}"]


def diameter_text(found: dict[str, Any]) -> str:
    low, high = found["quartiles"]
    if found["source"] == "given":
        return f"{found['value']:.2f} px, as given"
    if found["source"] == "default":
        return f"{found['value']:.2f} px, a guess: too few objects were found"
    return (
        f"{found['value']:.2f} px (quartiles {low:.1f} and {high:.1f}, {found['n_objects']} objects in "
        f"{found['n_windows']} windows)"
    )


def _per_time_text(moments: list[dict[str, Any]]) -> str:
    """Of time points with a diameter each."""
    if not moments:
        return ""
    values = [moment["diameter"]["value"] for moment in moments]
    return f", the largest; from {min(values):.2f} px over {len(values)} time points"


def summary_text(facts: dict[str, Any]) -> list[str]:
    """The closing summary of `segment`."""
    lines = [
        f"objects      {facts['n_objects']:,}",
        f"diameter     {diameter_text(facts['diameter'])}{_per_time_text(facts['per_time'])}",
        f"blocks       {facts['n_blocks']}, of which {facts['n_skipped_blocks']} skipped as empty",
        f"tiles        {facts['n_tiles']} computed, {facts['n_skipped_tiles']} skipped as empty",
        f"seams        {facts['n_pairs']} objects seen by two blocks, {facts['n_exact_pairs']} as the same pixels, "
        f"mean IoU {facts['mean_iou']:.3f}, {facts['n_seam'] - facts['n_seam_linked']} cut",
        f"cut by halo  {facts['n_cut_by_halo']} objects"
        + ("; a larger --halo sees them whole" if facts["n_cut_by_halo"] else ""),
    ]
    if facts["n_nonfinite"]:
        lines.append(f"not finite   {facts['n_nonfinite']} pixels are NaN or infinite and were taken as background")
    if facts["n_too_large"]:
        lines.append(f"too large    {facts['n_too_large']} objects were left out")
    kept = {stage: n for stage, n in facts["kept"].items() if n}
    if kept:
        lines.append("resumed      " + ", ".join(f"{stage} {n} pieces kept" for stage, n in kept.items()))
    if facts["quarantined"]:
        lines.append("set aside    " + "; ".join(facts["quarantined"]) + " (by earlier calls; now done)")
    precision = f", in {facts['model']['precision']}" if facts["model"] else ""
    lines += [
        "seconds      " + _seconds_text(facts),
        f"peak memory  {facts['peak_memory'] / 2**30:.2f} GiB over all processes",
        f"worked on    {facts['device']}, {facts['workers']}{precision}",
        f"labels       {facts['labels']}",
        f"table        {facts['table']}",
        *(f"{kind:<12} {facts[kind]}" for kind in EXPORTS if kind in facts),
        f"report       {facts['report']}",
        f"scratch      {facts['scratch']} (kept, so that mask settings can be changed; delete it when done)",
    ]
    return lines


def scene_text(facts: dict[str, Any]) -> list[str]:
    """What is looked at, and how to get there from elsewhere."""
    lines = [f"image        {facts['image']} ({', '.join(facts['channels'])})"] if facts["image"] else []
    lines += [f"labels       {', '.join(facts['labels'])}"] if facts["labels"] else []
    if "address" in facts:
        port = facts["port"]
        lines += [
            f"address      {facts['address']}",
            f"over SSH     on the machine you sit at: ssh -L {port}:127.0.0.1:{port} HOST, then open the address there "
            "(--port N keeps N)",
            "end          Ctrl-C",
        ]
    return lines


def _seconds_text(facts: dict[str, Any]) -> str:
    """Seconds per stage, and in which two were at work."""
    text = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in facts["seconds"].items())
    at_once = facts["seconds_at_once"]
    return text if at_once < SHOWN_S else f"{text} (two stages at once for {at_once:.1f})"


def plan_text(facts: dict[str, Any]) -> list[str]:
    """What an image is and what would be done with it."""
    lines = _image_text(facts["image"])
    if "n_blocks" not in facts:
        return [*lines, f"segment      would refuse: {facts['refused']}"]
    lines += ["segment      would do this:", *_needs_text(facts), f"  {'there is':<12} {facts['state']}"]
    return lines if facts["refused"] is None else [*lines, f"segment      would refuse: {facts['refused']}"]


def _image_text(image: dict[str, Any]) -> list[str]:
    """What an image is."""
    lines = [
        f"image        {image['name']}",
        f"axes         {image['axes']}, shape {tuple(image['shape'])}, {image['dtype']}",
        f"channels     {', '.join(image['channels'])}",
        "pixel size   "
        + (" x ".join(f"{s:g}" for s in image["spacing_um"]) + " µm" if image["spacing_um"] else "unknown"),
    ]
    lines += [
        f"level {i}      shape {tuple(level['shape'])}, chunks {tuple(level['chunks'])}, {level['path'] or '.'}"
        for i, level in enumerate(image["levels"])
    ]
    return lines


def _needs_text(facts: dict[str, Any]) -> list[str]:
    """What a run would do and need."""
    from ..preflight import size_text

    source = {"given": "as given", "assumed": "assumed, as the model's own; the survey will estimate it"}
    tasks = sorted(facts["task_bytes"].items(), key=lambda task: -task[1])
    rows = {
        "channel": facts["channel"],
        "diameter": f"{facts['diameter']:g} px, {source.get(facts['diameter_source'], 'as the survey found')}",
        "blocks": f"{facts['n_blocks']:,}, halo {facts['halo']} px",
        "tiles": f"{facts['n_tiles']:,} on a working grid of {facts['working_shape']}",
        "time": ", ".join(f"{stage} {_time_text(n)}" for stage, n in facts["seconds"].items())
        + " at the rate of this machine, more for reading and writing, less where nothing is"
        if facts["seconds"]
        else None,
        "memory": f"at most {size_text(facts['worker_bytes'])} per process, {size_text(facts['memory_bytes'])} in all "
        f"({facts['n_workers']} x {facts['n_threads']} threads)",
        "per task": ", ".join(f"{stage} {size_text(n)}" for stage, n in tasks),
        "labels": facts["labels"]
        and f"{facts['labels']} (with the table up to {size_text(facts['output_bytes'])}, {facts['n_files']:,} files)",
        "table": facts["table"],
        "scratch": facts["scratch"] and f"{facts['scratch']} (up to {size_text(facts['scratch_bytes'])})",
    }
    return [f"  {name:<12} {text}" for name, text in rows.items() if text is not None]


def _time_text(seconds: float) -> str:
    """A time for people: ``40 s``, ``12 min``, ``7.5 h`` or ``12 days``."""
    for unit, n_seconds, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < most:
            return f"{seconds / n_seconds:.{1 if unit == 'h' else 0}f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def comparison_text(facts: dict[str, Any]) -> list[str]:
    """A table of average precisions."""
    lines = [f"objects      {facts['overall']['n_predicted']} predicted, {facts['overall']['n_truth']} true"]
    for name in ("overall", "at_seams", "elsewhere"):
        score = facts[name]
        if score is not None:
            values = "  ".join(f"AP@{t:g} {ap:.3f}" for t, ap in zip(score["thresholds"], score["ap"], strict=True))
            lines.append(f"{name:<12} {values}  ({score['n_truth']} true objects)")
    if facts["n_cut"] is not None:
        lines.append(f"cut          {facts['n_cut']} true objects are cut at a block edge")
    lines.append("exact        " + ("bit-identical" if facts["exact"] else f"{facts['n_different']} pixels differ"))
    return lines
