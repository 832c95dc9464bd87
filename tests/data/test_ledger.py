"""The ledger on a disk that fills up: lines are lost, the file stays one that can be read."""

import json
import subprocess
import sys

FILLS_UP = """
import resource, sys
from pathlib import Path
from types import SimpleNamespace

from data_pipelines.ledger import Ledger
from data_pipelines.samples import LedgerEvent

ledger = Ledger(Path(sys.argv[1]))
events = [LedgerEvent("web", "k", "bad_json", "not JSON")]
for pack, room in enumerate((resource.RLIM_INFINITY, 100, 100, resource.RLIM_INFINITY)):  # bytes of a file
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    ledger.add([SimpleNamespace(number=pack, events=events)])
"""


def test_lines_that_find_no_room_are_lost_and_those_after_them_stand_alone(tmp_path):
    path = tmp_path / "ledger-rank0.jsonl"
    said = subprocess.run([sys.executable, "-c", FILLS_UP, path], capture_output=True, text=True, check=True).stderr
    assert [json.loads(line)["pack"] for line in path.read_text().splitlines()] == [0, 3]
    assert said == (
        f"{path} cannot be written, what is lost is only counted from here ([Errno 27] File too large: '{path}')\n"
    )
