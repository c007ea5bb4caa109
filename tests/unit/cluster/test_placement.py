"""Bundles, logical CPUs and Serve options, as pure functions of the configuration."""

from __future__ import annotations

from cluster.config import Config, ModelSection, parse_config
from cluster.serving.placement import (
    Placement,
    application_name,
    deployment_options,
    logical_cpus,
    place,
    resolve_device,
)


def make_section(**changes: object) -> ModelSection:
    return ModelSection.model_validate({"name": "m", "source": "somewhere"} | changes)


def make_config(*models: dict[str, object]) -> Config:
    return parse_config({"models": [{"source": "null"} | model for model in models]})


def test_bundle_0_holds_supervisor_and_rank_0() -> None:
    section = make_section(parallel={"tensor": 2}, cpus_per_rank=2)
    assert place(section, device="cpu").bundles() == [{"CPU": 3.0}, {"CPU": 2.0}]


def test_every_rank_on_cuda_has_one_gpu() -> None:
    placement = place(make_section(parallel={"tensor": 2, "expert": 2}), device="cuda")
    assert placement.bundles() == [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}]
    assert placement.num_gpus == 2


def test_a_person_waiting_is_told_what_must_be_free() -> None:
    placement = Placement(num_ranks=4, cpus_per_rank=1.5, gpus_per_rank=1)
    assert placement.describe() == "7 CPU and 4 GPU on one node"


def test_over_hosts_each_has_one_bundle_with_all_its_ranks_on_a_node_of_its_own() -> None:
    section = make_section(parallel={"tensor": 8, "hosts": 4})
    placement = place(section, device="cuda")
    assert placement.bundles() == [{"CPU": 3.0, "GPU": 2.0}] + [{"CPU": 2.0, "GPU": 2.0}] * 3
    assert [placement.bundle_of(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    options = deployment_options(section, device="cuda", environment={})
    assert options["placement_group_strategy"] == "STRICT_SPREAD"
    assert placement.describe() == "3 CPU and 2 GPU on one node, 2 CPU and 2 GPU on each of 3 others"
    two = place(make_section(parallel={"tensor": 2, "hosts": 2}), device="cpu")
    assert two.describe() == "2 CPU on one node, 1 CPU on another"


def test_own_ray_announces_the_plan_and_one_spare() -> None:
    config = make_config(
        {"name": "a", "parallel": {"tensor": 2}}, {"name": "b", "replicas": {"min": 2, "max": 2}}
    )
    assert logical_cpus(config) == (1 + 2) + 2 * (1 + 1) + 1


def test_auto_takes_gpus_where_there_are_any() -> None:
    section = make_section()
    assert resolve_device(section, has_gpus=True) == "cuda"
    assert resolve_device(section, has_gpus=False) == "cpu"


def test_a_named_device_is_taken_and_the_null_engine_needs_none() -> None:
    assert resolve_device(make_section(device="cpu"), has_gpus=True) == "cpu"
    assert resolve_device(make_section(source="null", device="cuda"), has_gpus=True) == "cpu"


def test_application_names_are_file_names_and_stay_apart() -> None:
    assert application_name("llama-3.1") == "llama-3.1"
    slashed, flat = application_name("meta/llama"), application_name("meta-llama")
    assert slashed.startswith("meta-llama-")
    assert "/" not in slashed
    assert slashed != flat


def test_serve_replaces_a_dead_replica_within_seconds_and_drains_as_long_as_told() -> None:
    section = make_section(limits={"drain_s": 45}, replicas={"min": 3, "max": 3})
    options = deployment_options(section, device="cpu", environment={})
    assert options["num_replicas"] == 3
    assert options["health_check_period_s"] == 1.0
    assert options["graceful_shutdown_timeout_s"] == 45
    assert options["placement_group_strategy"] == "STRICT_PACK"
    assert options["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 0}


def test_an_environment_of_its_own_is_asked_for_only_where_needed() -> None:
    options = deployment_options(make_section(), device="cpu", environment={"A": "1"})
    assert options["ray_actor_options"] == {
        "num_cpus": 1.0,
        "num_gpus": 0,
        "runtime_env": {"env_vars": {"A": "1"}},
    }
