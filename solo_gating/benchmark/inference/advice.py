"""What a user should pick on this CPU, from the rows of a case."""

from typing import Any

# Engines nearer to each other than this are called equal.
_EQUAL = 1.05
# Rows that give a gated encoder's features, not an approximation's.
_EXACT = ("dynamic", "dynamic on static", "static")


def advice(rows: list[dict[str, Any]]) -> str:
    """A sentence for the rows of one case: what is fastest in the precision that is fastest, and in float32.

    Args:
        rows: from `measure`.
    """
    plain = [row for row in rows if row["dtype"] == "float32"]
    picks = [_pick(rows)]
    if _fastest_dense(plain) is not _fastest_dense(rows) and len(plain) > 1:
        picks.append("Where it must be float32: " + _pick(plain))
    caution = " Some times were too noisy to tell." if any(row["noisy"] for row in rows) else ""
    return "Pick " + " ".join(f"{pick}." for pick in picks) + caution


def _fastest_dense(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of ours and the others'."""
    dense = [row for row in rows if row["flops_cut"] == 0]
    return min(dense, key=lambda row: row["milliseconds"])


def _pick(rows: list[dict[str, Any]]) -> str:
    dense = _fastest_dense(rows)
    gated = [row for row in rows if row["engine"] in _EXACT]
    parts = []
    for density in dict.fromkeys(row["density"] for row in gated):
        best = min(
            (row for row in gated if row["density"] == density),
            key=lambda row: row["milliseconds"],
        )
        ratio = dense["milliseconds"] / best["milliseconds"]
        at = "at the encoder's own density" if density is None else f"at {density:g}"
        if ratio > _EQUAL:
            parts.append(f"{at} {_name(best)} ({ratio:.1f}×)")
        elif ratio * _EQUAL > 1:
            parts.append(f"{at} {_name(best)} or the dense one, which are as fast")
        else:
            parts.append(
                f"{at} still the dense one ({_name(best)} takes {1 / ratio:.1f}× its time)"
            )
    whole = f"for the dense encoder {_name(dense)}, {dense['milliseconds']:.2f} ms"
    return whole + ("; for the gated one " + ", ".join(parts) if parts else "")


def _name(row: dict[str, Any]) -> str:
    ours = {"dense": "ours", "dynamic": "ours", "dynamic on static": "ours on the static network"}
    name = ours.get(row["engine"], row["engine"])
    if row["engine"] == "static":
        name += f" on {row['runtime']}"
    return f"{name} in {row['dtype']}"
