"""The rows of a case as text."""

from typing import Any

from ...texts import aligned
from ..timing import noisy_note

_COLUMNS = {
    "engine": "engine",
    "dtype": "dtype",
    "runtime": "runs on",
    "density": "density",
    "realised_density": "realised",
    "milliseconds": "ms",
    "speedup": "speed-up",
    "ceiling": "ceiling",
    "efficiency": "efficiency",
    "speedup_over_float32": "over float32",
}


def format_case(rows: list[dict[str, Any]]) -> str:
    """The rows of one case as a table."""
    first = rows[0]
    baselines = {
        row["dtype"]: f"{row['baseline']} {row['baseline_milliseconds']:.2f} ms"
        + (f" in {row['baseline_dtype']}" if row["baseline_dtype"] != row["dtype"] else "")
        for row in rows
    }
    lines = [
        f"{first['resolution']}×{first['resolution']} pixels, batch {first['batch']}, threads: "
        f"{first['threads']}; {first['rounds']} rounds; fastest dense engines: "
        + ", ".join(f"{dtype} {baseline}" for dtype, baseline in baselines.items()),
        *aligned([list(_COLUMNS.values()), *map(_cells, rows)], left=3),
    ]
    lines += [_rounding(row) for row in rows if "feature_difference" in row]
    return "\n".join([*lines, *noisy_note(rows)])


def _rounding(row: dict[str, Any]) -> str:
    where = "" if row["flops_cut"] == 0 else f" at {_density(row)}"
    line = f"{row['engine']} in {row['dtype']}{where}: features are {row['feature_difference']:.1%} off"
    if "flipped_masks" in row:
        line += f" with the same masks, {row['flipped_masks']:.1%} of the gates decide otherwise"
    if "threshold" in row:
        line += f"; threshold {row['threshold']:.2g} for the density"
    return line


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        *(row["engine"], row["dtype"], row["runtime"], _density(row)),
        f"{row['realised_density']:.3f}",
        f"{row['milliseconds']:.2f}",
        f"{row['speedup']:.2f}×",
        f"{row['ceiling']:.2f}×",
        f"{row['efficiency']:.0%}",
        f"{row['speedup_over_float32']:.2f}×",
        *(["*"] if row["noisy"] else []),
    ]


def _density(row: dict[str, Any]) -> str:
    return "own" if row["density"] is None else f"{row['density']:g}"
