import mmap
from importlib.util import find_spec
from pathlib import Path

from cluster.serving.ray_chores import RAY_CHORES

READERS = (
    "_raylet.so",
    "_private/log_monitor.py",
    "autoscaler/_private/constants.py",
    "dashboard/modules/event/event_consts.py",
    "dashboard/modules/reporter/reporter_consts.py",
    "serve/_private/constants.py",
)


def test_ray_still_reads_every_name() -> None:
    spec = find_spec("ray")
    assert spec is not None and spec.submodule_search_locations
    unread = set(RAY_CHORES)
    for reader in READERS:
        with (Path(spec.submodule_search_locations[0]) / reader).open("rb") as file:
            code = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            unread -= {name for name in unread if code.find(name.encode()) >= 0}
    assert not unread
