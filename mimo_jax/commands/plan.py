"""Say what a model needs on some devices, which need not be there, and how fast it can be."""

import argparse
import json
import os

from mimo_jax.commands.model import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("model", metavar="DIR|PRESET", help="a checkpoint, or a release's name")
    group = parser.add_argument_group("devices")
    group.add_argument("--devices", type=int, default=8, metavar="N", help="how many (default 8)")
    group.add_argument(
        "--hbm-gb", type=positive, default=141, help="memory of each, in 10^9 bytes (default 141)"
    )
    group.add_argument(
        "--bandwidth-gbs", type=positive, default=4800, help="of each, in GB/s (default 4800)"
    )
    group.add_argument(
        "--layout",
        choices=("tensor", "expert"),
        default="tensor",
        help="cut every expert (default), or give each device whole ones",
    )
    group.add_argument(
        "--experts",
        choices=("auto", "mxfp4"),
        default="auto",
        help="as `mimo_jax.load` holds them: FP8 as bfloat16 (auto), or in MXFP4",
    )
    use = parser.add_argument_group("use")
    use.add_argument(
        "--max-len", type=int, default=131072, metavar="N", help="tokens a sequence (131072)"
    )
    use.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (default 1)")
    use.add_argument("--block", type=int, metavar="N", help="rows of a verified block")
    use.add_argument(
        "--drafter", default="auto", help="dflash, mtp or none (default: what the model has)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.epilog = "example: mimo plan mimo-v2.6-pro --devices 8 --hbm-gb 141 --max-len 131072"


def main(options: argparse.Namespace) -> int:
    """Runs the command."""
    # Nothing is computed on a device: a GPU's memory must not be taken for this.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from mimo_jax.planning.report import plan

    made = plan(
        options.model,
        options.devices,
        options.max_len,
        drafter={"auto": True, "none": False}.get(options.drafter, options.drafter),
        batch=options.batch,
        block=options.block,
        layout=options.layout,
        experts=options.experts,
        memory=options.hbm_gb * 1e9,
        bandwidth=options.bandwidth_gbs * 1e9,
    )
    print(json.dumps(made.to_dict()) if options.json else made)
    return 0
