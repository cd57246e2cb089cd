"""The benchmark's results as a Markdown table with a few lines below it, and as growth plots."""

import os
from statistics import median

PRECISIONS = ("highest", "high", "medium")  # --matmul_precision, the default first
HEAD = """\
| work | published way | this code | faster | of its products' time | memory, published | here | difference |
|---|---|---|---|---|---|---|---|"""


def rows(s):
    """The table's rows: the work, and the names of the published way's measurement and of this code's."""
    score = f"score and rank {s['images']:,} × {s['images'] * s['per_image']:,}"
    for way in ("t2i", "i2t"):
        yield f"{score}, {way}", f"score {way} published", f"score {way} highest"
        for precision in PRECISIONS[1:]:
            work = f"the same, `--matmul_precision {precision}`"
            yield work, f"score {way} published", f"score {way} {precision}"
    for way in ("t2i", "i2t"):
        yield f"training step, batch {s['batch_size']}, {way}", f"train {way} published", f"train {way}"
        yield "the same, `--amp`", f"train {way} published", f"train {way} amp"
    work = f"encode {s['images']:,} images, {s['images'] * s['per_image']:,} captions"
    yield work, "encode published", "encode"
    yield f"position grids of {s['images']:,} images", "grids published", "grids"


def report(s, r):
    """The results as Markdown. s: sizes; r: {name: measurement}."""
    rate = max(r["products"]["gflops"].values()) * 1e9
    lines = [machine_line(r["machine"]), "", HEAD]
    lines += [*(table_row(work, r[published], r[ours], ours, rate) for work, published, ours in rows(s)), ""]
    lines.append(f"Fastest float32 product: {r['products']['best']}, {rate / 1e9:.0f} GFLOP/s.")
    lines += [recalls_line(r, way) for way in ("t2i", "i2t")]
    lines.append(f"Position grids of {s['all_grids']:,} images: {time_text(r['all grids'])}.")
    lines += [start_line(r[f"start {n}"]) for n in s["train_images"]]
    n = s["growth"][-1]
    for way in ("t2i", "i2t"):
        scored = r[f"growth {way} {n}"]
        lines.append(
            f"Scoring {n:,} × {n * s['per_image']:,}, {way}: {memory_text(scored)}; {time_text(scored)}, "
            f"one block of {scored['every']} computed."
        )
    per_pair = ", ".join(f"{n:,}: {1e6 * x:.2f}" for n, x in time_per_pair(s, r).items())
    lines.append(f"µs a pair by images, t2i: {per_pair}.")
    steps = ", ".join(f"{n}: {x:.3g} s" for n, x in step_times(s, r).items())
    lines.append(f"Training step by batch size, t2i: {steps}.")
    return "\n".join(lines)


def machine_line(machine):
    cores, instructions = machine["cores"], ", ".join(machine["instructions"])
    device = "" if machine["device"] == "cpu" else f" and {machine['device']}"
    return f"{cores} cores of {machine['processor']} ({instructions}){device}, torch {machine['torch']}:"


def table_row(work, published, ours, name, rate):
    """A row: ours, the measurement of that name, beside the published way's. rate: float32 operations a second."""
    difference = published["differences"].get(name)
    cells = [
        work,
        time_text(published),
        time_text(ours),
        f"{median(published['seconds']) / median(ours['seconds']):.3g}×",
        f"{median(ours['seconds']) * rate / ours['flops']:.2f}×" if "flops" in ours else "",
        ("≥ " if "part" in published else "") + memory_text(published),
        memory_text(ours),
        "" if difference is None else f"{difference:.0e}",
    ]
    return f"| {' | '.join(cells)} |"


def time_text(result):
    value = median(result["seconds"])
    if value >= 1000:
        return f"{value:,.0f} s"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


def memory_text(result):
    return f"{result.get('device_gb') or result['peak_gb']:.2f} GB"


def recalls_line(r, way):
    exact, *others = (r[f"score {way} {precision}"]["recalls"] for precision in PRECISIONS)
    gaps = [max(abs(a - b) for a, b in zip(exact, other, strict=True)) for other in others]
    away = ", ".join(f"with {name} at most {gap:.2f} away" for name, gap in zip(PRECISIONS[1:], gaps, strict=True))
    return f"Recalls {way}: {' '.join(f'{x:.1f}' for x in exact)} (i2t, t2i R@1 5 10); {away}."


def start_line(start):
    anonymous = ", ".join(f"{x:.2f}" for x in start["own_gb"])
    return (
        f"Training on {start['file_gb']:.2f} GB of features: first batch after {median(start['seconds']):.1f} s; "
        f"memory without the pages of files then and after each of two steps {anonymous} GB."
    )


def time_per_pair(s, r):
    """Seconds of a pair, t2i, by number of images."""
    results = {n: r["score t2i highest" if n == s["images"] else f"growth t2i {n}"] for n in s["growth"]}
    return {n: median(result["seconds"]) / result["pairs"] for n, result in results.items()}


def step_times(s, r):
    """Seconds of a training step, t2i, by batch size."""
    return {n: median(r["train t2i" if n == s["batch_size"] else f"batch {n}"]["seconds"]) for n in s["batches"]}


def plot(s, r, path):
    """Draw how time grows: scoring a pair by the number of images, a training step by the size of its batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    pairs = {n: 1e6 * x for n, x in time_per_pair(s, r).items()}
    middle = median(pairs.values())
    left.axhspan(0.85 * middle, 1.15 * middle, color="0.92", label="median ± 15 %")
    left.plot(list(pairs), list(pairs.values()), "o-")
    left.set(xscale="log", xlabel=f"images ({s['per_image']} captions each)", ylabel="µs a pair")
    left.set_ylim(0, 1.6 * middle)
    left.set_title("score and rank, t2i", fontsize=10)
    left.set_xticks(list(pairs), [f"{n:,}" for n in pairs])
    left.minorticks_off()
    left.legend(frameon=False)
    right.plot(s["batches"], list(step_times(s, r).values()), "o-")
    right.set(xlabel="pairs in the batch", ylabel="seconds", ylim=(0, None), xticks=s["batches"])
    right.set_title("training step, t2i", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=120)
