"""Why a replica ends, out of what Serve reports: for those who see the number of replicas move."""

from __future__ import annotations

import asyncio

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

ASK_TIMEOUT_S = 1.5
"""New requests come in until the drain begins, which waits for the answer."""
TAKEN_DOWN = "the model is taken down"
UNKNOWN = "Ray Serve ends the replica and does not say why"
REASONS = {
    "CONFIG_UPDATE_STARTED": "another configuration was deployed",
    "AUTOSCALING": "the autoscaler wants fewer replicas",
    "HEALTH_CHECK_FAILED": "Ray Serve found it unhealthy",
    "DELETING": TAKEN_DOWN,
}
"""By Serve's `DeploymentStatusTrigger`."""


async def ask_why_it_ends(application: str) -> str:
    """What Serve says of it now. Bounded, and never raises for Serve: a replica drains all the same."""
    try:
        async with asyncio.timeout(ASK_TIMEOUT_S):
            status = await asyncio.to_thread(serve.status)
    except (RayError, RayServeException, TimeoutError):
        return UNKNOWN
    return describe_ending(status.applications.get(application))


def describe_ending(application: ApplicationStatusOverview | None) -> str:
    if application is None or application.status is ApplicationStatus.DELETING:
        return TAKEN_DOWN
    triggers = [deployment.status_trigger.value for deployment in application.deployments.values()]
    return next((REASONS[trigger] for trigger in triggers if trigger in REASONS), UNKNOWN)
