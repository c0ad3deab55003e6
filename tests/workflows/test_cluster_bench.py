"""`bench --ray`: rows of one node of each kind, with its machine."""

from dataclasses import replace
from pathlib import Path

import pytest
import ray_cluster

from convnext_deploy import api
from convnext_deploy.cluster.connection import Node
from convnext_deploy.errors import UsageError, WorkerError
from convnext_deploy.workflows import cluster_bench
from convnext_deploy.workflows.bench import Plan

ARTIFACT = Path(__file__).parents[1] / "golden" / "0.1.0" / "native-int8"
PLAN = Plan(seconds=0.1, warmup_limit_s=0.2, batches=(1,))


def test_nodes_of_the_same_processor_cores_and_gpus_are_one_kind() -> None:
    machines = [("EPYC", 8, ""), ("EPYC", 8, ""), ("EPYC", 16, ""), ("EPYC", 8, "L4"), ("Xeon", 8, "")]
    asked = [
        (Node(str(number), f"10.0.0.{number}", cores, 0), {"cpu": cpu, "cores": cores, "gpus": gpus, "memory": number})
        for number, (cpu, cores, gpus) in enumerate(machines)
    ]
    groups = {words: [node.id for node in group] for words, group in cluster_bench.kinds(asked).items()}
    assert groups == {
        "EPYC, 8 cores": ["0", "1"], "EPYC, 16 cores": ["2"], "EPYC, 8 cores, L4": ["3"], "Xeon, 8 cores": ["4"],
    }  # fmt: skip


def test_models_that_are_not_built_yet_are_refused() -> None:
    with pytest.raises(UsageError, match="ray 'local' is for artifacts, which the nodes are given"):
        list(api.bench(variants="tiny", ray="local"))


@pytest.mark.ray
@pytest.mark.slow
def test_one_node_of_a_kind_is_timed_and_its_rows_name_artifact_and_machine() -> None:
    with ray_cluster.nodes(2, cpus=1) as cluster:
        said: list[str] = []
        (row,) = api.bench(ARTIFACT, PLAN, ray=cluster.address, say=said.append)
        assert row.samples_ms
        assert row.status in ("valid", "invalid", "not steady")
        assert row.artifact == str(ARTIFACT)
        assert int(row.machine["cores"]) >= 1
        assert sum(line.startswith("node ") for line in said) == 1
        # An artifact that runs nowhere is the node's line, and a row that failed is a row.
        with pytest.raises(WorkerError, match=r"node .*: batch 4096; .* takes 1 to"):
            list(api.bench(ARTIFACT, replace(PLAN, batches=(4096,)), ray=cluster.address))
