#!/usr/bin/env python3
"""Write a synthetic gpt-oss checkpoint (random weights) for tests and benchmarks.

    scripts/make_checkpoint.py OUT --size 20b
    scripts/make_checkpoint.py OUT --size tiny --layers 3 --experts 7 --dtype-experts bf16

Every number of the architecture is an option; what is left out comes from the size.
"""

import argparse
import sys
import time
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from epmoe.errors import UserError
from epmoe.weights.synthetic import SIZES, Synthetic, make_checkpoint

_CHOICES = {"dtype_experts": ("mxfp4", "bf16"), "rope_spelling": ("scaling", "parameters")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("directory")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    for field in fields(Synthetic):
        option = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(option, type=field.type, choices=_CHOICES.get(field.name))
    options = vars(parser.parse_args())
    directory = options.pop("directory")
    begin = time.perf_counter()
    try:
        path = make_checkpoint(directory, **options)
    except UserError as error:
        parser.error(str(error))
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    print(f"{path}: {size / 1e9:.3f} GB in {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()
