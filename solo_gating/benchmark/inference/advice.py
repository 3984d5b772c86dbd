"""What a user should pick on this CPU, from the rows of a case."""

from typing import Any

# Engines nearer to each other than this are called equal.
_EQUAL = 1.05
# A density that is further from the one that was asked for is named.
_OFF = 0.03
# Rows that give a gated encoder's features, not an approximation's.
_EXACT = ("dynamic", "dynamic on static", "static")


def advice(rows: list[dict[str, Any]]) -> str:
    """What is fastest in any precision, and in float32 where that is another engine.

    Args:
        rows: from `measure`, of one case.
    """
    plain = [row for row in rows if row["dtype"] == "float32"]
    lines = ["Fastest here: " + _picks(rows)]
    if _fastest_dense(rows)["dtype"] != "float32":
        lines.append("Fastest in float32: " + _picks(plain))
    if any(row["noisy"] for row in rows):
        lines.append("Some times were too noisy to be sure of it.")
    return "\n".join(lines)


def _picks(rows: list[dict[str, Any]]) -> str:
    dense = _fastest_dense(rows)
    parts = [f"{_name(dense)} for the dense encoder ({dense['milliseconds']:.2f} ms)"]
    gated = [row for row in rows if row["engine"] in _EXACT]
    for density in dict.fromkeys(row["density"] for row in gated):
        best = _fastest_gated([row for row in gated if row["density"] == density])
        ratio = dense["milliseconds"] / best["milliseconds"]
        at = "the encoder's own density" if density is None else f"density {density:g}"
        if density is not None and abs(best["realised_density"] - density) > _OFF:
            at += f" ({best['realised_density']:.2f}, the nearest that its gates give)"
        if ratio > _EQUAL:
            found = f"{_name(best)}, {ratio:.1f}× as fast"
        elif ratio * _EQUAL > 1:
            found = f"either, {_name(best)} being as fast"
        else:
            found = f"the dense one, as {_name(best)} takes {1 / ratio:.1f}× its time"
        parts.append(f"at {at} {found}")
    return "; ".join(parts) + "."


def _fastest_dense(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of ours and the others'."""
    return _fastest([row for row in rows if row["flops_cut"] == 0])


def _fastest_gated(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The dynamic engine where it is nearly the fastest: it needs no export and turns with the dial."""
    best = _fastest(rows)
    near = [
        row
        for row in rows
        if row["engine"] == "dynamic" and row["milliseconds"] <= _EQUAL * best["milliseconds"]
    ]
    return _fastest(near or [best])


def _fastest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return min(rows, key=lambda row: row["milliseconds"])


def _name(row: dict[str, Any]) -> str:
    names = {
        **{"dense": "ours", "dynamic": "ours", "dynamic on static": "ours on the static network"},
        "static": f"the static network on {row['runtime']}",
    }
    return f"{names.get(row['engine'], row['engine'])} in {row['dtype']}"
