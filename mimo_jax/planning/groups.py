"""The groups in which bytes of parameters are counted, and sizes in words."""

EXPERTS, EMBEDDING, HEAD, MTP = "experts", "embedding", "head", "MTP layers"


def group_of(name: str) -> str:
    """The group of a parameter.

    Args:
      name: with the part that it belongs to in front.

    Example:
      >>> group_of("target.layers.3.attention.qkv_scale")
      'attention qkv'
    """
    part, *path, last = name.split(".")
    if part != "target":
        return MTP if part == "mtp" else part
    if "experts" in path:
        return EXPERTS
    if "router" in path:
        return "router"
    if last in (EMBEDDING, HEAD):
        return last
    if last in ("weight", "sink"):
        return "norms, sinks"
    if "attention" in path:
        return f"attention {last.removesuffix('_scale')}"
    return "dense MLP"


def gigabytes(size: float | int) -> str:
    """A size in words: "73.1 GB" of 10^9 bytes, or smaller units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.{1 if size < 1000 * factor else 0}f} {unit}"
    return f"{size:.0f} B"
