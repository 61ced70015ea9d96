"""The certificate in words: table cells, plain text, Markdown."""

from __future__ import annotations

import math
import re
from statistics import fmean, median
from typing import TYPE_CHECKING

from .intervals import mean_interval, slope_interval

if TYPE_CHECKING:
    from .certificate import Certificate, Row

HEADER = ("model", "dt", "state", "energy", "buffers", "ε_Ω", "D/|H₀|", "slope", "passes")
DOSE_HEADER = ("momentum", "running: state", "running: ε_Ω", "batch: buffers", "batch: energy")
LEGEND = (
    "state, energy, buffers: relative round-trip errors; ε_Ω: change of the 2-form; "
    "D: median energy change per step; slope: of log D against log dt; ✗: beyond its threshold; "
    "floor: what rounding alone explains, at the dt where it is least; "
    "passes: seeds that pass every probe."
)


def table_cells(certificate: Certificate) -> list[tuple[str, ...]]:
    """One line per model and dt, columns as in `HEADER`; after each model its smallest floors."""
    lines = []
    for name in certificate.names:
        rows = [row for row in certificate.rows if row.name == name]
        lines += [_cells(row) for row in rows]
        floors = (short(min(row.floor[probe] for row in rows)) for probe in rows[0].floor)
        lines.append((name, "floor", *floors, "", ""))
    return lines


def _cells(row: Row) -> tuple[str, ...]:
    probes = (
        short(value) + ("" if row.passed[probe] else " ✗") for probe, value in row.value.items()
    )
    slope = "–" if math.isnan(row.slope) else f"{row.slope:+.2f}"
    return (row.name, f"{row.dt:g}", *probes, slope, f"{row.passing}/{row.seeds}")


def short(x: float, digits: int = 2) -> str:
    """1.5e-8 in place of 1.5000e-08; 0 for zero."""
    if x == 0:
        return "0"
    return re.sub(r"e([+-])0*(\d+)", r"e\1\2", f"{x:.{digits - 1}e}").replace("e+", "e")


def dose_cells(certificate: Certificate) -> list[tuple[str, ...]]:
    """One row per momentum, columns as in `DOSE_HEADER`."""
    return [
        (f"{d.momentum:g}", *(short(x) for x in (d.state, d.epsilon, d.buffers, d.energy)))
        for d in certificate.doses
    ]


def text_table(certificate: Certificate) -> str:
    """The table with columns of equal width, then legend, thresholds, findings, doses and time."""
    parts = [_columns(HEADER, table_cells(certificate))]
    parts += [LEGEND + "\n" + thresholds_line(certificate), "\n".join(findings(certificate))]
    if certificate.doses:
        parts.append(_columns(DOSE_HEADER, dose_cells(certificate)))
    return "\n\n".join([*parts, time_line(certificate)])


def markdown(certificate: Certificate, figures: list[str]) -> str:
    """certificate.md: verdict, table, findings, doses, settings, figures."""
    verdict = "yes" if certificate.passed else "no"
    parts = [
        "# Certificate",
        f"Every probe within its threshold: **{verdict}**",
        _markdown_table(HEADER, table_cells(certificate)),
        LEGEND,
        thresholds_line(certificate),
        "\n".join(f"- {line}" for line in findings(certificate)),
    ]
    if certificate.doses:
        parts.append(_markdown_table(DOSE_HEADER, dose_cells(certificate)))
    parts.append(time_line(certificate))
    parts.append("\n".join(f"- {key}: {value}" for key, value in certificate.settings.items()))
    parts += [f"![{name}]({name})" for name in figures]
    return "\n\n".join(parts) + "\n"


def thresholds_line(certificate: Certificate) -> str:
    """The thresholds in one sentence."""
    t = certificate.thresholds
    return (
        f"Thresholds: state {short(t.state, 1)}, energy {short(t.energy, 1)}, buffers "
        f"{short(t.buffers, 1)}, ε_Ω {short(t.epsilon, 1)}, D/|H₀| {short(t.drift, 1)}, slope "
        f"at least {t.slope:g} (where D exceeds its floor)."
    )


def findings(certificate: Certificate) -> list[str]:
    """One sentence per model, and one on the dose.

    Where it passes, what fails elsewhere; the mean drift slope and its interval (of the fit; with
    several seeds, over the seeds); dt_zero, the median over the seeds that have one.
    """
    lines = [
        _finding(certificate, name) for name in dict.fromkeys(r.name for r in certificate.runs)
    ]
    points = [d for d in certificate.doses if d.momentum > 0 and 0 < d.epsilon < math.inf]
    slope, interval = slope_interval(
        [math.log10(d.momentum) for d in points], [math.log10(d.epsilon) for d in points]
    )
    if interval:
        lines.append(
            f"dose: ε_Ω of the regime running grows as momentum^{slope:.2f} "
            f"[{interval[0]:.2f}, {interval[1]:.2f}]."
        )
    return lines


def _finding(certificate: Certificate, name: str) -> str:
    rows = [row for row in certificate.rows if row.name == name]
    good = [f"{row.dt:g}" for row in rows if row.passing == row.seeds]
    failed = dict.fromkeys(probe for row in rows for probe, ok in row.passed.items() if not ok)
    text = f"{name}: passes at dt {', '.join(good)}" if good else f"{name}: passes at no dt"
    if failed:
        text += f"; fails {', '.join(failed)}".replace("epsilon", "ε_Ω")
    drifts = list({run.seed: run.drift for run in certificate.runs if run.name == name}.values())
    slopes = [drift.slope for drift in drifts]
    interval = drifts[0].slope_interval if len(drifts) == 1 else mean_interval(slopes)
    if interval and not math.isnan(interval[0]):
        text += f"; drift slope {fmean(slopes):+.2f} [{interval[0]:+.2f}, {interval[1]:+.2f}]"
    zeros = [drift.dt_zero for drift in drifts if drift.dt_zero is not None]
    if zeros:
        text += f"; dt_zero {median(zeros):.3g}"
    return text + "."


def time_line(certificate: Certificate) -> str:
    """Seconds in all, and the shares of probes, gradients and gti kernels."""
    s = certificate.seconds
    total = s["probes"] + s.get("training", 0.0)
    return (
        f"Time: {total:.1f} s, of which probes {s['probes'] / total:.0%}; in all, gradients "
        f"{s['gradients'] / total:.0%} and gti kernels {s['kernels'] / total:.1%}."
    )


def _columns(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = tuple("─" * width for width in widths)
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, rule, *rows]
    )


def _markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in lines)
