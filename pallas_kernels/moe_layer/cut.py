"""How a mixture of experts with its router is cut for one launch, and what fits it."""

from pallas_kernels.expert_ffn.block import default_launch
from pallas_kernels.expert_ffn.layout import (
    BARRIER_WORDS,
    MARK,
    MOST_ROUTED,
    ROUTED,
    KernelWeights,
)
from pallas_kernels.expert_ffn.ring import flow_misfit
from pallas_kernels.expert_ffn.slots import TOKENS
from pallas_kernels.moe_layer.front import MOST_OWN, PIECE, Front

_LANES = 32


def front_of(
    weights: KernelWeights,
    t: int,
    choices: int,
    wide: bool,
    blocks: int,
    epsilon: float = 0.0,
    normalise: bool = True,
    scale: float = 1.0,
) -> Front:
    """What goes before the experts, cut as their rows are."""
    plan = weights.gate_up_plan
    return Front(
        t,
        choices,
        weights.gate_up.shape[0],
        plan.columns,
        plan.warps,
        plan.column_warps,
        blocks,
        wide,
        epsilon,
        normalise,
        scale,
        (MARK, ROUTED),
    )


def shared_bytes(front: Front) -> int:
    """Of shared memory: each array begins at a multiple of 1024."""
    return sum(-(-4 * words // 1024) * 1024 for words in front.shared.values())


def misfit(
    weights: KernelWeights, t: int, choices: int, wide: bool, blocks: int | None = None
) -> str | None:
    """What one launch would take that these are not, or None."""
    front = front_of(weights, t, choices, wide, blocks or default_launch().ctas)
    if weights.barrier.size < BARRIER_WORDS:
        return (
            f"{BARRIER_WORDS} words of `barrier`, as pack_experts makes, not {weights.barrier.size}"
        )
    experts = front.experts
    if experts % _LANES or TOKENS * experts > MOST_ROUTED or front.own > MOST_OWN:
        most = min(MOST_ROUTED // TOKENS, MOST_OWN * front.blocks)
        return f"a multiple of {_LANES} experts, at most {most}, not {experts}"
    if choices > _LANES:
        return f"at most {_LANES} choices, not {choices}"
    if front.columns // front.slices % PIECE or front.warps < t:
        return f"slices of whole {PIECE} columns, and a warp for each token, not {front}"
    plans = weights.gate_up_plan, weights.down_plan
    why = flow_misfit(*plans, t, choices, experts, shared_bytes(front))
    return None if why is None else f"what fits one launch, but here {why}"
