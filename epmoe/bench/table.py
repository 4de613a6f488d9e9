"""What `python -m epmoe.bench` has measured, for people."""

from epmoe.bench.conditions import Record, heading, markdown


def table(record: Record) -> str:
    """Conditions and numbers, in Markdown."""
    lines = [*_conditions(record), "", *_decode(record)]
    for part in (_prefill(record), _first(record), _mixed(record)):
        lines += ["", *part] if part else []
    return "\n".join(lines)


def _conditions(record: Record) -> list[str]:
    short, long = record["lengths"]
    source = {key: "measured" if key in record["measured"] else "given" for key in ("bandwidth", "flops")}
    lines = [
        heading(record),
        f"prompts of {record['prompt_tokens']} random tokens, decodes by {record['sampling']}, "
        f"a step = (t({long}) - t({short})) / {long - short}, "
        f"median of {record['repeat']}, prefill in chunks of {record['runtime']['prefill_chunk']}",
        f"limits: {record['bandwidth'] / 1e12:.3g} TB/s ({source['bandwidth']}), "
        f"{record['flops'] / 1e12:.3g} TFLOP/s ({source['flops']})",
        f"load {record['load_s']:.2f} s, then ready in {record['ready_s']:.2f} s; memory of a rank at most "
        f"{max(record['peak_bytes']) / 1e9:.2f} GB, cache {max(record['cache_bytes']) / 1e9:.2f} GB of it",
    ]
    if "peer" in record:
        other = record["peer"]
        lines.append(
            f"peer: {other['name']} {other['release']}, experts {other['experts']}, load {other['load_s']:.2f} s"
        )
    return lines


def _decode(record: Record) -> list[str]:
    heads = ["batch", "ms a step", "tokens/s", "first token, ms", "GB to read", "floor, ms", "of floor"]
    beside = any("greedy_ms" in row for row in record["decode"])
    rows = [
        [
            f"{row['batch']}",
            f"{row['ms']:.3f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['first_token_ms']:.1f}",
            f"{row['floor_bytes'] / 1e9:.4g}",
            f"{row['floor_ms']:.4g}",
            f"{row['of_floor']:.2f}",
            *([f"{row['greedy_ms']:.3f}", f"{100 * row['above_greedy']:.1f}"] if beside else []),
            *_compared(row),
        ]
        for row in record["decode"]
    ]
    return markdown([*heads, *(_GREEDY if beside else []), *(_PEER if "peer" in record else [])], rows)


_PEER = ["peer, ms", "speedup"]
_GREEDY = ["greedy, ms", "above, %"]


def _compared(row: Record) -> list[str]:
    """The last cells of a row, where a peer has run too."""
    if "peer_ms" not in row:
        return []
    return ["memory", ""] if row["peer_ms"] is None else [f"{row['peer_ms']:.2f}", f"{row['speedup']:.2f}"]


def _prefill(record: Record) -> list[str]:
    if not (prefill := record["prefill"]):
        return []
    line = (
        f"prefill {prefill['sequences']} x {prefill['tokens']}: {prefill['s']:.3f} s, "
        f"{prefill['tokens_per_s']:,.0f} tokens/s, arithmetic allows {prefill['limit_tokens_per_s']:,.0f}"
    )
    if "peer" in record:
        theirs = prefill["peer_tokens_per_s"]
        line += f"; {record['peer']['name']}: " + ("out of memory" if theirs is None else f"{theirs:,.0f}")
    return [line]


def _first(record: Record) -> list[str]:
    heads = ["prompt", "first token, ms", f"best of {record['samples']}", "floor, ms", "of floor"]
    rows = [
        [
            f"{row['tokens']}",
            f"{row['ms']:.3f}",
            f"{row['best_ms']:.3f}",
            f"{row['floor_ms']:.4g}",
            f"{row['of_floor']:.2f}",
            *_compared(row),
        ]
        for row in record["first"]
    ]
    return markdown([*heads, *_PEER] if "peer" in record else heads, rows) if rows else []


def _mixed(record: Record) -> list[str]:
    if not (mixed := record["mixed"]):
        return []
    heads = [
        "decoding x prompt",
        "first token, ms",
        "best",
        "steps",
        "floor, ms",
        "between tokens, ms",
        "without prompt",
    ]
    cells = [
        f"{mixed['sequences']} x {mixed['tokens']}",
        *(f"{mixed[key]:.3f}" for key in ("first_ms", "best_first_ms")),
        f"{mixed['steps']}",
        f"{mixed['floor_ms']:.4g}",
        *(f"{mixed[key]:.3f}" for key in ("between_ms", "bare_ms")),
    ]
    return markdown(heads, [cells])
