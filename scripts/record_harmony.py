#!/usr/bin/env python3
"""Record what openai-harmony says of random answers: tests/text/harmony_oracle.jsonl, which the tests compare with.

    pip install openai-harmony
    TIKTOKEN_ENCODINGS_BASE=FOLDER scripts/record_harmony.py          FOLDER has o200k_base.tiktoken

The answers are symbols (tests/helpers/harmony_cases.py), so that the record needs no vocabulary. With the same variable
tests/text/test_harmony_oracle.py also asks the library itself, about ids of the whole vocabulary.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from harmony_cases import Library, byte_ids, oracle, sequences

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "tests" / "text" / "harmony_oracle.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=240, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    library = Library.found()
    if isinstance(library, str):
        sys.exit(f"record_harmony: {library}")
    with FILE.open("w", encoding="utf-8") as file:
        for symbols in sequences(options.answers, options.seed):
            ids = byte_ids(symbols, library.control, library.byte)
            modes = [(prompted, strict) for prompted in (True, False) for strict in (True, False)]
            told = [oracle(library.encoding, ids, prompted=prompted, strict=strict) for prompted, strict in modes]
            line = {"symbols": symbols, "told": [vars(each) for each in told if each.messages]}
            file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(f"{FILE.relative_to(ROOT)}: {options.answers} answers, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
