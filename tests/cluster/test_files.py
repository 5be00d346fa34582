"""The cluster files agree with the schemas of those who read them.

Ray's own schema comes with Ray. KubeRay's resource definitions are not on PyPI: KUBERAY below holds the fields of its API
reference (ray.io/v1, KubeRay 1.6) that our files use, so that a misspelt or misplaced key is found; it is no full validation.
"""

from pathlib import Path
from typing import Any

import pytest
import ray
from ruamel.yaml import YAML

from distlm import clusterfile
from distlm.errors import SpecError
from distlm.head import LocalCluster

ROOT = Path(__file__).parents[2]
KUBERAY: dict[str, set[str]] = {
    "RayCluster": {"apiVersion", "kind", "metadata", "spec"}, "RayJob": {"apiVersion", "kind", "metadata", "spec"},
    "RayJobSpec": {"activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata", "clusterSelector",
                   "submitterConfig", "managedBy", "deletionStrategy", "entrypoint", "runtimeEnvYAML", "jobId", "submissionMode",
                   "entrypointResources", "entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished",
                   "shutdownAfterJobFinishes", "suspend"},
    "RayClusterSpec": {"authOptions", "suspend", "managedBy", "autoscalerOptions", "headServiceAnnotations", "enableInTreeAutoscaling",
                       "gcsFaultToleranceOptions", "headGroupSpec", "rayVersion", "workerGroupSpecs"},
    "HeadGroupSpec": {"template", "headService", "enableIngress", "rayStartParams", "serviceType"},
    "WorkerGroupSpec": {"suspend", "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "rayStartParams",
                        "template", "scaleStrategy", "numOfHosts"},
    "AutoscalerOptions": {"resources", "image", "imagePullPolicy", "securityContext", "idleTimeoutSeconds", "upscalingMode", "version",
                          "env", "envFrom", "volumeMounts"},
    "AuthOptions": {"mode", "secretName", "enableK8sTokenAuth"},
}


def load(name: str) -> Any:
    return YAML(typ="safe").load(ROOT / "cluster" / name)


@pytest.mark.parametrize("name, provider", [("cluster.yaml", "aws"), ("cluster/gcp.yaml", "gcp")])
def test_cloud_files_pass_rays_own_schema(name, provider):
    found = clusterfile.read(ROOT / name)
    assert isinstance(found, clusterfile.RayUpFile) and found.config["provider"]["type"] == provider
    rows = dict(found.rows())
    assert "the head" in rows["head"] and " to " in rows["gpu"]
    for start in (*found.config["head_start_ray_commands"], *found.config["worker_start_ray_commands"]):
        assert "0.0.0.0" not in start
    assert any(path.endswith("/.ray/auth_token") for path in found.config["file_mounts"])
    assert "RAY_AUTH_MODE=token" in " ".join(found.config["setup_commands"])


def test_the_local_file_says_the_defaults():
    assert clusterfile.read(ROOT / "cluster" / "local.yaml") == LocalCluster()


@pytest.mark.parametrize("text, said", [
    ("name: x\ncpu: 4\n", ":2: cpu: unknown key; did you mean cpus?"), ("name: x\nport: 80\n", ":2: port: 80: must be at least 1024"),
    ("cluster_name: a\nprovider: {type: aws, region: us-west-2}\nworkers: 1\n", ":3: workers: unknown key; did you mean max_workers?"),
    ("cluster_name: a\nmax_wokers: 1\nprovider: {type: aws, region: us-west-2}\n",
     "cluster.yaml:2: max_wokers: unknown key; did you mean max_workers?"),
    ("provider: {type: aws, region: us-west-2}\nxyz: 1\n", "cluster.yaml:2: xyz: unknown key; `ray up` has no such key"),
    ("cluster_name: a\nprovder: {type: aws}\n", "cluster.yaml:2: provder: unknown key; did you mean provider?"),
    ("cluster_name: a\nprovider: aws\n", "cluster.yaml:2: provider: 'aws': must be a section; its keys are type, region"),
    ("name: x\ncpus: '4'\n", "cluster.yaml:2: cpus: '4': must be a whole number; take the quotes off"),
    ("cluster_name: a\nmax_workers: x\nprovider: {type: aws, region: us-west-2}\n", ":2: max_workers: 'x' is not of type 'integer'")])
def test_a_mistake_in_a_cluster_file_is_named_with_its_line(text, said, tmp_path):
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(SpecError) as error:
        clusterfile.read(tmp_path / "cluster.yaml")
    assert said in str(error.value)


def test_a_missing_cluster_file_is_the_users_mistake(tmp_path):
    with pytest.raises(SpecError, match="cannot be read"):
        clusterfile.read(tmp_path / "none.yaml")


def check_cluster(spec: dict[str, Any]) -> None:
    assert set(spec) <= KUBERAY["RayClusterSpec"] and set(spec.get("autoscalerOptions", {})) <= KUBERAY["AutoscalerOptions"]
    assert spec["rayVersion"] == ray.__version__
    assert set(spec["authOptions"]) <= KUBERAY["AuthOptions"] and spec["authOptions"]["mode"] == "token"
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert set(groups[0]) <= KUBERAY["HeadGroupSpec"] and {"template", "rayStartParams"} <= set(groups[0])
    for group in groups[1:]:
        assert set(group) <= KUBERAY["WorkerGroupSpec"] and {"groupName", "template", "maxReplicas"} <= set(group)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())      # the API takes text alone
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert all(isinstance(value, str) for value in container["resources"]["limits"].values())


def test_the_kuberay_cluster_has_the_fields_of_its_api():
    file = load("kuberay/raycluster.yaml")
    assert set(file) == KUBERAY["RayCluster"] and (file["apiVersion"], file["kind"]) == ("ray.io/v1", "RayCluster")
    check_cluster(file["spec"])


def test_the_kuberay_job_has_the_fields_of_its_api():
    file = load("kuberay/rayjob.yaml")
    assert set(file) == KUBERAY["RayJob"] and (file["apiVersion"], file["kind"]) == ("ray.io/v1", "RayJob")
    spec = file["spec"]
    assert set(spec) <= KUBERAY["RayJobSpec"] and spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    assert spec["entrypoint"].startswith("python -m distlm run ") and isinstance(YAML(typ="safe").load(spec["runtimeEnvYAML"]), dict)
    check_cluster(spec["rayClusterSpec"])
