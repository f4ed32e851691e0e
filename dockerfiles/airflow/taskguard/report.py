"""The ledger and the guard's state as JSON, for `make memory` and `make doctor`.

`python3 -m taskguard.report [since]`: `since` in seconds since 1970 bounds the overruns.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from taskguard import protocol
from taskguard.ledger import Ledger


def main(argv: Sequence[str]) -> int:
    """Prints one JSON object."""
    ledger = Ledger(os.environ["TASKGUARD_LEDGER"])
    try:
        with protocol.connect() as link:
            now = protocol.ask(link, {"op": "status"})
    except OSError:
        now = {}
    since = float(argv[0]) if argv else 0.0
    print(json.dumps({"guard": now, "tasks": ledger.tasks(), "overruns": ledger.overruns(since)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
