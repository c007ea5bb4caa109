"""The Serve applications of a configuration, one per model: deployed, watched, deleted."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ray import serve
from ray.serve.api import RunTarget, run_many
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview
from ray.util import placement_group_table

from cluster.config import Config, ModelSection
from cluster.serving.application import build, has_gpus
from cluster.serving.failure_report import is_permanent, summarise_failure
from cluster.serving.placement import Placement, application_name, place, resolve_device

UNPLACED = ("PENDING", "RESCHEDULING")
"""States of a placement group that has no node."""
DELETE_POLL_S = 0.1
DELETE_GRACE_S = 10.0
"""Beyond the drain budget, for Serve's own work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far Serve is with a model. `failure` says why Serve gave up, `hint` what it waits for."""

    model: str
    wanted: int
    running: int
    failure: str = ""
    hint: str = ""


class Deployments:
    """The applications that one `up` keeps in one Ray."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._names = {section.name: application_name(section.name) for section in config.models}

    def deploy(self) -> None:
        """Hand every application to Serve and return at once. Deploying again is a rolling update."""
        run_many(
            [
                RunTarget(
                    target=build({"config": self._config, "model": model}), name=name, route_prefix=None
                )
                for model, name in self._names.items()
            ],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )

    def progress(self) -> tuple[Progress, ...]:
        applications = serve.status().applications
        return tuple(
            _progress(section, applications.get(self._names[section.name])) for section in self._config.models
        )

    def shortages(self) -> list[str]:
        """Why models that were whole once are not: of a lack of room Serve says nothing then."""
        unplaced = [
            list(group["bundles"].values())
            for group in placement_group_table().values()
            if group["state"] in UNPLACED
        ]
        reasons = []
        for section, one in zip(self._config.models, self.progress(), strict=True):
            has_no_room = _placement(section).bundles() in unplaced
            reason = one.failure or one.hint or (_no_room(section) if has_no_room else "")
            if reason:
                reasons.append(f"{one.model}: {reason}")
        return reasons

    def delete(self) -> bool:
        """Drain and end every replica; False if they did not end in time."""
        for name in self._names.values():
            serve.delete(name, _blocking=False)
        drain_s = max(section.limits.drain_s for section in self._config.models)
        end_s = time.monotonic() + drain_s + DELETE_GRACE_S
        while time.monotonic() < end_s:
            if not set(serve.status().applications) & set(self._names.values()):
                return True
            time.sleep(DELETE_POLL_S)
        return False


def _progress(section: ModelSection, application: ApplicationStatusOverview | None) -> Progress:
    if application is None:
        return Progress(model=section.name, wanted=section.replicas.min, running=0)
    (deployment,) = application.deployments.values() or (None,)
    states = deployment.replica_states if deployment else {}
    message = (deployment.message if deployment else "") or application.message
    has_failed = application.status == ApplicationStatus.DEPLOY_FAILED or is_permanent(message)
    return Progress(
        model=section.name,
        wanted=section.replicas.min,
        running=states.get("RUNNING", 0),
        failure=summarise_failure(message) if has_failed else "",
        hint=_hint(section, message),
    )


def _hint(section: ModelSection, message: str) -> str:
    if "Retrying" in message:
        return f"trying again: {summarise_failure(message)}"
    if "to be scheduled" not in message:
        return ""
    return _no_room(section)


def _no_room(section: ModelSection) -> str:
    return f"Ray has no room yet: a replica needs {_placement(section).describe()}"


def _placement(section: ModelSection) -> Placement:
    return place(section, device=resolve_device(section, has_gpus=has_gpus()))
