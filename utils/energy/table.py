"""The energy of a clip as a text of aligned columns."""


def format_report(report: dict) -> str:
    """report: of `energy_report`."""
    total, spikes = report["total_mj"], report["spikes"]
    rows = [("part", "operations", "kind", "mJ", "share")]
    for row, part in report["parts"].items():
        share = f"{100 * part['mj'] / total:.1f} %"
        rows.append((row, f"{part['operations']:,.0f}", part["kind"].upper(), f"{part['mj']:.3f}", share))
    rows.append(("total", "", "", f"{total:.3f}", "100.0 %"))
    lines = [f"Energy of one clip: {report['note']}", *_aligned(rows)]
    if spikes["firing_rates"]:
        lines.append(f"standard deviation over {spikes['clips']} clips: {report['total_mj_std']:.3f} mJ")
        lines.append(f"spikes as others publish them (firing rate x dense MACs): {spikes['rate_x_dense_mj']:.3f} mJ")
    if "memory" in report:
        *places, (_, memory) = report["memory"]["mj"].items()
        each = ", ".join(f"{name} {mj:.3f}" for name, mj in places)
        lines.append(f"memory, an estimate, not in the total: {memory:.3f} mJ ({each})")
    if "baselines" in report:
        rows = [("baseline", "MACs", "mJ", "x ReSpike", "memory mJ", "breaks even at a spike rate of")]
        for name, other in report["baselines"].items():
            rate = report["break_even_rate"][name]
            always = "ReSpike always costs " + ("less" if other["mj"] > total else "more")
            even = always if rate is None else f"{100 * rate:.1f} %"
            mj = (f"{other['mj']:.3f}", f"{other['mj'] / total:.2f}", f"{other['memory_mj']:.3f}")
            rows.append((name, f"{other['macs']:,}", *mj, even))
        if not spikes["firing_rates"]:  # a network without spikes breaks even at no rate
            rows = [
                (name, macs, mj, ratio.replace("ReSpike", "this"), memory) for name, macs, mj, ratio, memory, _ in rows
            ]
        lines += ["", *_aligned(rows)]
    lines += ["", "counted as zero:", *(f"  {name}: {reason}" for name, reason in report["counted_as_zero"].items())]
    return "\n".join(lines)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
