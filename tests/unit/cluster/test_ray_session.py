"""What a Ray of our own cannot do is said before it is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.command_error import CommandError
from cluster.config import parse_config
from cluster.serving.ray_session import RaySession
from cluster.serving.run_folder import RunFolder


def test_a_group_over_hosts_needs_a_ray_of_several_nodes(tmp_path: Path) -> None:
    models: list[dict[str, object]] = [{"name": "a", "source": "null"}]
    models += [{"name": "b", "source": "null", "parallel": {"tensor": 4, "hosts": 2}}]
    session = RaySession(parse_config({"models": models}), RunFolder(tmp_path))
    with pytest.raises(CommandError, match=r"models\[1\].parallel.hosts is 2.*set ray.address"):
        session.start()
