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
}


def format_case(rows: list[dict[str, Any]]) -> str:
    """The rows of one case as a table."""
    first = rows[0]
    lines = [
        f"{first['resolution']}×{first['resolution']} pixels, batch {first['batch']}, threads: "
        f"{first['threads']}; {first['rounds']} rounds; baseline: {first['baseline']}",
        *aligned([list(_COLUMNS.values()), *map(_cells, rows)], left=3),
    ]
    for row in rows:
        if "flipped_masks" in row:
            lines.append(
                f"bfloat16 at {_density(row)}: features differ by {row['feature_difference']:.1e} of "
                f"the largest, {row['flipped_masks']:.2%} of the gates decide otherwise"
            )
    return "\n".join([*lines, *noisy_note(rows)])


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        *(row["engine"], row["dtype"], row["runtime"], _density(row)),
        f"{row['realised_density']:.3f}",
        f"{row['milliseconds']:.2f}",
        f"{row['speedup']:.2f}×",
        f"{row['ceiling']:.2f}×",
        f"{row['efficiency']:.0%}",
        *(["*"] if row["noisy"] else []),
    ]


def _density(row: dict[str, Any]) -> str:
    return "own" if row["density"] is None else f"{row['density']:g}"
