"""Why a replica ends, in words that tell a redeploy from `wattline down` and from an autoscaler."""

from __future__ import annotations

import pytest
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
    ServeStatus,
)

from cluster.serving.ending_report import ask_why_it_ends, describe_ending


def make_application(
    status: ApplicationStatus, trigger: DeploymentStatusTrigger
) -> ApplicationStatusOverview:
    deployment = DeploymentStatusOverview(
        status=DeploymentStatus.UPDATING, status_trigger=trigger, replica_states={}, message=""
    )
    return ApplicationStatusOverview(
        status=status, message="", last_deployed_time_s=0.0, deployments={"m": deployment}
    )


def test_each_hand_that_ends_a_replica_has_its_words() -> None:
    deploying, trigger = ApplicationStatus.DEPLOYING, DeploymentStatusTrigger
    said = {
        one: describe_ending(make_application(deploying, one))
        for one in (trigger.CONFIG_UPDATE_STARTED, trigger.AUTOSCALING, trigger.HEALTH_CHECK_FAILED)
    }
    assert list(said.values()) == [
        "another configuration was deployed",
        "the autoscaler wants fewer replicas",
        "Ray Serve found it unhealthy",
    ]
    deleting = make_application(ApplicationStatus.DELETING, trigger.CONFIG_UPDATE_COMPLETED)
    assert describe_ending(deleting) == describe_ending(None) == "the model is taken down"
    unspecified = make_application(ApplicationStatus.RUNNING, trigger.UNSPECIFIED)
    assert describe_ending(unspecified) == "Ray Serve ends the replica and does not say why"


async def test_a_serve_that_does_not_answer_holds_up_no_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> ServeStatus:
        raise RayServeException("no controller")

    monkeypatch.setattr(serve, "status", fail)
    assert await ask_why_it_ends("m") == "Ray Serve ends the replica and does not say why"
