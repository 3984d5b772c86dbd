"""The rows of a case as text."""

from typing import Any

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
    cells = [[*_COLUMNS.values(), ""], *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    first = rows[0]
    lines = [
        f"{first['resolution']}×{first['resolution']} pixels, batch {first['batch']}, threads: "
        f"{first['threads']}; {first['rounds']} rounds; baseline: {first['baseline']}"
    ]
    for line in cells:
        text = [cell.ljust(width) for cell, width in zip(line[:3], widths, strict=False)]
        text += [cell.rjust(width) for cell, width in zip(line[3:-1], widths[3:], strict=False)]
        lines.append("  ".join([*text, line[-1]]).rstrip())
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
        "*" if row["noisy"] else "",
    ]


def _density(row: dict[str, Any]) -> str:
    return "own" if row["density"] is None else f"{row['density']:g}"
