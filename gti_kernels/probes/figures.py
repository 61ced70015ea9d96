"""The certificate as figures (PNG)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extras import require

if TYPE_CHECKING:
    from .certificate import Certificate


def save_figures(certificate: Certificate, folder: Path) -> list[Path]:
    """Draw round_trip.png, omega.png, drift.png and, with doses, dose_response.png; their paths."""
    require("matplotlib", "drawing the figures")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def draw(name: str, panels: int, paint: Callable[[Any, Certificate], None]) -> Path:
        # The object interface with Agg: no display, and pyplot's global state is left alone.
        figure = Figure(figsize=(4.2 * panels + 1.4, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, panels, squeeze=False)[0]
        paint(axes, certificate)
        path = folder / name
        figure.savefig(path, dpi=130)
        return path

    paths = [
        draw("round_trip.png", 3, _round_trip),
        draw("omega.png", 1, _omega),
        draw("drift.png", 1, _drift),
    ]
    if certificate.doses:
        paths.append(draw("dose_response.png", 2, _dose_response))
    return paths


def _round_trip(axes: Any, certificate: Certificate) -> None:
    for axis, probe in zip(axes, ("state", "energy", "buffers"), strict=True):
        _against_dt(axis, certificate, probe, f"round trip: {probe}", "relative error")


def _omega(axes: Any, certificate: Certificate) -> None:
    _against_dt(axes[0], certificate, "epsilon", "change of the symplectic 2-form", "ε_Ω")


def _drift(axes: Any, certificate: Certificate) -> None:
    """D over every dt that entered the slope, of the first seed; the floor is in the title."""
    axis = axes[0]
    floors = []
    for i, name in enumerate(certificate.names):
        drift = next(run.drift for run in certificate.runs if run.name == name)
        label = name if math.isnan(drift.slope) else f"{name}, slope {drift.slope:+.2f}"
        relative = [d / abs(drift.energy) for d in drift.drift]
        axis.plot(drift.dts, relative, "o-", color=f"C{i}", markersize=5, label=label)
        floors.append(drift.floor / abs(drift.energy))
    axis.set_xscale("log")
    axis.set_yscale("log")
    title = f"energy drift per step (rounding floor {max(floors):.0e})"
    axis.set(title=title, xlabel="step size dt", ylabel="D / |H₀|")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axis.grid(alpha=0.25)


def _against_dt(axis: Any, certificate: Certificate, probe: str, title: str, label: str) -> None:
    """One line with markers per model, its rounding floor dashed, the threshold as a grey line."""
    rows = certificate.rows
    models = list(dict.fromkeys(row.name for row in rows))
    shown = []
    for i, name in enumerate(models):
        dts = [row.dt for row in rows if row.name == name]
        # Markers of falling size, so that models that coincide stay visible.
        style = {"color": f"C{i}", "markersize": 10 - 1.4 * i, "label": name}
        values = [row.value[probe] for row in rows if row.name == name]
        floors = [row.floor[probe] for row in rows if row.name == name]
        axis.plot(dts, values, "o-", **style)
        axis.plot(dts, floors, "--", color=f"C{i}", alpha=0.5)
        shown += values + floors
    threshold = getattr(certificate.thresholds, probe)
    axis.axhline(threshold, color="0.4", linewidth=1)
    axis.annotate(
        "threshold", (0.99, threshold), xycoords=("axes fraction", "data"), color="0.4",
        ha="right", va="bottom", fontsize=8,
    )  # fmt: skip
    axis.set_xscale("log")
    # Zero errors have a place of their own at the lower edge.
    _log_from_zero(axis, [threshold, *shown])
    axis.set(title=title, xlabel="step size dt", ylabel=label)
    axis.plot([], [], "--", color="0.5", label="rounding floor")
    if axis.get_subplotspec().is_last_col():
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axis.grid(alpha=0.25)


def _dose_response(axes: Any, certificate: Certificate) -> None:
    doses = certificate.doses
    momenta = [d.momentum for d in doses]
    for axis, title, lines in (
        (axes[0], "running: statistics inside the map", {"state": "state", "epsilon": "ε_Ω"}),
        (axes[1], "batch: statistics as hidden state", {"buffers": "buffers", "energy": "energy"}),
    ):
        for i, (response, label) in enumerate(lines.items()):
            axis.plot(
                momenta, [getattr(d, response) for d in doses], "o-", color=f"C{i}", label=label
            )
        axis.set_xscale("symlog", linthresh=min((m for m in momenta if m > 0), default=1.0))
        _log_from_zero(axis, [getattr(d, response) for d in doses for response in lines])
        axis.set(title=title, xlabel="momentum of the running statistics", ylabel="error")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.25)


def _log_from_zero(axis: Any, values: list[float]) -> None:
    """A logarithmic axis over the positive values; 0, where it occurs, a decade below them."""
    positive = [x for x in values if 0 < x < math.inf]
    low = 10.0 ** math.floor(math.log10(min(positive, default=1.0)))
    high = 3 * max(positive, default=1.0)
    if 0.0 in values:
        axis.set_yscale("symlog", linthresh=low, linscale=1)
        axis.set_ylim(-0.1 * low, high)
    else:
        axis.set_yscale("log")
        axis.set_ylim(low, high)
