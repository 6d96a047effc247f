"""TRL's best-fit decreasing: reads lengths, budget and rounds as JSON, prints each round's processor time as JSON.

Runs in the peer's environment (see `environment`) and imports nothing of the engine.
"""

# pyright: reportMissingImports=false
# The peer's packages are not installed where types are checked.

import json
import sys
import time

import numpy as np
import pyarrow as pa
from trl.data_utils import _pack_bfd


def main() -> None:
    request = json.load(sys.stdin)
    offsets = np.cumsum([0, *request["lengths"]])
    values = pa.array(np.zeros(offsets[-1], np.int8))
    table = pa.table({"input_ids": pa.LargeListArray.from_arrays(offsets, values)})
    taken = []
    for _ in range(request["rounds"] + 1):
        begin = time.process_time()
        _pack_bfd(table, request["budget"])
        taken.append(time.process_time() - begin)
    print(json.dumps(taken[1:]))


if __name__ == "__main__":
    main()
