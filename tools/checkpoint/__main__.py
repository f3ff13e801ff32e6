"""python -m vlmrt.tools.checkpoint OUT --preset NAME: a random-weight checkpoint of a public or a small shape."""

import argparse
import sys
import time
from pathlib import Path

from vlmrt.tools.checkpoint.make import FORMAT_DTYPES, SHARD_BYTES, make_checkpoint
from vlmrt.tools.checkpoint.presets import PRESETS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlmrt.tools.checkpoint", description=__doc__)
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--preset", choices=PRESETS, default="test-qwen2-vl")
    parser.add_argument("--dtype", choices=FORMAT_DTYPES, help="default: float32 for small presets, else bfloat16")
    parser.add_argument("--device", default="cpu", help="where the values are drawn, e.g. cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--std", type=float, help="spread of the weights")
    parser.add_argument("--layers", type=int, help="fewer decoder layers")
    parser.add_argument("--vision-depth", type=int, help="fewer vision layers")
    parser.add_argument("--shard-gb", type=float, default=SHARD_BYTES / 1e9)
    parser.add_argument("--no-weights", action="store_true", help="configuration and tokenizer only")
    parser.add_argument(
        "--tokenizer",
        default="demo",
        help="a wheel of the package dashscope or a .tiktoken file; demo (the default): a small vocabulary",
    )
    options = parser.parse_args(arguments)

    def progress(done: int, total: int) -> None:
        print(f"\r{done / 1e9:.2f} of {total / 1e9:.2f} GB", end="", file=sys.stderr, flush=True)

    start = time.monotonic()
    try:
        make_checkpoint(
            options.out,
            options.preset,
            dtype=options.dtype,
            seed=options.seed,
            std=options.std,
            device=options.device,
            layers=options.layers,
            vision_depth=options.vision_depth,
            shard_bytes=int(options.shard_gb * 1e9),
            tokenizer=None if options.tokenizer == "demo" else Path(options.tokenizer),
            weights=not options.no_weights,
            progress=progress if sys.stderr.isatty() else None,
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {options.preset} in {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
