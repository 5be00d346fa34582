"""The cluster files agree with the schemas of those who read them, and the jobs that they name fit their nodes.

Ray's own schema comes with Ray. KubeRay's resource definitions are not on PyPI: kuberay.json says what we took from them.
"""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import ray
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from distlm import clusterfile
from distlm.autoscale import DATA_CPUS
from distlm.errors import SpecError
from distlm.execute import resolve
from distlm.head import LocalCluster
from distlm.plan import needs
from distlm.spec import PipelineSpec, TrainSpec
from distlm.spec.load import validate
from distlm.storage import Storage
from tests.train.ranks import make_corpus

ROOT = Path(__file__).parents[2]
KUBERAY = Draft202012Validator(json.loads(Path(__file__).with_name("kuberay.json").read_text()))
FILES = ["cluster.yaml", "cluster/gcp.yaml", "cluster/kuberay/raycluster.yaml", "cluster/kuberay/rayjob.yaml"]
MACHINES = {"p4d.24xlarge": {"CPU": 96, "GPU": 8}}
"""What Ray reads from the provider where a node type's `resources` are empty."""


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
    installs = [command for command in found.config["setup_commands"] if "pip install" in command]
    assert installs and all("-c ~/distlm-source/constraints.txt" in command for command in installs)


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


def priced(folder: Path, prices: str, gpu: str = "{CPU: 96, GPU: 8}") -> Path:
    """A file of `ray up` with prices."""
    path = folder / "cluster.yaml"
    text = (ROOT / "cluster" / "gcp.yaml").read_text().replace("{CPU: 96, GPU: 8}", gpu)
    path.write_text(f"{text}\nmetadata:\n  price_per_hour: {prices}\n")
    return path


def test_the_price_of_a_job_is_that_of_the_nodes_that_hold_it(tmp_path):
    found = clusterfile.read(priced(tmp_path, "{gpu: 30, head: 0.5}"))
    workers = {count: [{"CPU": 1, "GPU": 1}] * count for count in (3, 9, 17)}
    assert found.nodes_for(workers[3]) == clusterfile.Nodes(30.5, "1 x gpu at 30 and the head at 0.5")
    assert found.nodes_for(workers[9]).price == 60.5
    assert found.nodes_for([{"CPU": 2, "GPU": 0}] * 4) == clusterfile.Nodes(0.5, "1 x head at 0.5"), "the head is enough, and cheaper"
    with pytest.raises(SpecError, match="no kind of node that has a price holds 17 processes with 1 CPU and 1 GPU each"):
        found.nodes_for(workers[17])
    few = clusterfile.RayUpFile(found.path, {**found.config, "max_workers": 1})
    with pytest.raises(SpecError, match="holds 9 processes"):
        few.nodes_for(workers[9])
    with pytest.raises(SpecError, match="says no prices; give what a node of each kind costs an hour"):
        clusterfile.read(ROOT / "cluster" / "gcp.yaml").nodes_for(workers[3])
    with pytest.raises(SpecError, match="write the resources of the kind of node"):
        clusterfile.read(priced(tmp_path, "{gpu: 30}", gpu="{}")).nodes_for(workers[3])


@pytest.mark.parametrize("prices, said", [
    ("{gpus: 3}", "metadata.price_per_hour.gpus: there is no such kind of node; available_node_types has"),
    ("{gpu: -1}", "price_per_hour.gpu: -1: must be a number, 0 or more"), ("3", "price_per_hour: 3: must be a section")])
def test_a_mistake_in_a_price_is_named_with_its_line(prices, said, tmp_path):
    path = priced(tmp_path, prices)
    line = len(path.read_text().splitlines())
    with pytest.raises(SpecError) as error:
        clusterfile.read(path)
    assert said in str(error.value) and f"cluster.yaml:{line}: " in str(error.value)


def test_a_plan_takes_the_price_of_a_cluster_file_where_the_spec_has_none(tmp_path):
    file = clusterfile.read(priced(tmp_path, "{gpu: 30, head: 0.5}"))
    make_corpus(tmp_path / "c")
    train = {"name": "x", "kind": "train", "corpus": str(tmp_path / "c"), "model": {"preset": "llama-tiny"}, "duration": {"steps": 10**6},
             "scale": {"workers": 16, "gpus_per_worker": 1, "gpu": "A100"}, "batch": {"global_sequences": 64}}
    rows = dict(needs(resolve(train), Storage(tmp_path), file))
    assert rows["nodes"] == "2 x gpu at 30 and the head at 0.5 an hour" and f"16 x {60.5 / 16:g} an hour" in rows["price"]
    train["scale"]["price_per_worker_hour"] = 2
    rows = dict(needs(resolve(train), Storage(tmp_path), file))
    assert "16 x 2 an hour" in rows["price"] and "nodes" not in rows
    tune = {"name": "y", "kind": "tune", "train": {key: train[key] for key in train if key not in ("kind", "name")}, "trials": 2,
            "space": {"optimizer.lr": {"loguniform": [1e-4, 1e-2]}}}
    del tune["train"]["scale"]["price_per_worker_hour"]
    assert "a trial's price" in dict(needs(resolve(tune), Storage(tmp_path), file))
    steps = {"p": {"kind": "prepare", "sources": ["stdlib"]}, "t": {**tune["train"], "kind": "train", "corpus": "${p}"}}
    rows = dict(needs(resolve({"name": "w", "kind": "pipeline", "steps": steps}), Storage(tmp_path), file))
    assert any(what.endswith("nodes") and text.startswith("2 x gpu at 30") for what, text in rows.items()), "without its corpus too"
    with pytest.raises(SpecError, match=r"--cluster .*cluster.yaml: a plan of kind: prepare has no hours, and so no price; leave it out"):
        needs(resolve({"name": "z", "kind": "prepare", "sources": ["stdlib"]}), Storage(tmp_path), file)


def test_a_missing_cluster_file_is_the_users_mistake(tmp_path):
    with pytest.raises(SpecError, match="cannot be read"):
        clusterfile.read(tmp_path / "none.yaml")


def mistakes(file: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in KUBERAY.iter_errors(file)]


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_files_pass_the_schema_of_its_resources_and_hold_together(name):
    file = load(f"kuberay/{name}")
    Draft202012Validator.check_schema(KUBERAY.schema)
    assert mistakes(file) == []
    spec = file["spec"].get("rayClusterSpec", file["spec"])
    assert spec["rayVersion"] == ray.__version__ and spec["authOptions"]["mode"] == "token"
    assert all(group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in spec["workerGroupSpecs"])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
    if file["kind"] == "RayJob":
        assert isinstance(YAML(typ="safe").load(file["spec"]["runtimeEnvYAML"]), dict)


@pytest.mark.parametrize("where, key, value", [
    ((), "authOptions", {"mode": "tokens"}), ((), "authOptions", {"token": "x"}), ((), "rayversion", "2.60.0"),
    (("headGroupSpec", "rayStartParams"), "num-cpus", 0), (("workerGroupSpecs", 0), "minReplica", 1),
    (("workerGroupSpecs", 0, "template"), "containers", []), (("workerGroupSpecs", 0, "template", "spec"), "volume", []),
    (("headGroupSpec", "template", "spec", "containers", 0), "volumemounts", []),
    (("headGroupSpec", "template", "spec", "containers", 0, "resources", "limits"), "memory", "16 GB")])
def test_a_key_that_kuberay_does_not_know_or_a_value_that_it_refuses_is_found(where, key, value):
    file = copy.deepcopy(load("kuberay/raycluster.yaml"))
    place = file["spec"]
    for step in where:
        place = place[step]
    place[key] = value
    assert mistakes(file)


def nodes(name: str) -> list[dict[str, float]]:
    """CPUs and GPUs of the workers' nodes that stand from the beginning: a job that they cannot hold is refused."""
    file = YAML(typ="safe").load(ROOT / name)
    if "available_node_types" in file:
        kinds = {key: kind for key, kind in file["available_node_types"].items() if key != file["head_node_type"]}
        return [kind["resources"] or MACHINES[kind["node_config"]["InstanceType"]] for kind in kinds.values()
                for _ in range(kind["min_workers"])]
    spec = file["spec"].get("rayClusterSpec", file["spec"])
    groups = [(group["minReplicas"], group["template"]["spec"]["containers"][0]["resources"]["limits"])
              for group in spec["workerGroupSpecs"]]
    return [{"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])} for count, limits in groups for _ in range(count)]


@pytest.mark.parametrize("name", FILES)
def test_the_job_that_a_cluster_file_names_can_be_planned_and_fits_its_nodes(name, tmp_path):
    named = re.findall(r"distlm (?:run|submit) /?(jobs/[\w-]+\.yaml)", (ROOT / name).read_text())
    assert named
    for job in named:
        loaded = resolve(ROOT / job)
        assert needs(loaded, Storage(tmp_path))
        spec = loaded.spec
        steps = [validate(data, step, references=True) for step, data in spec.steps.items()] if isinstance(spec, PipelineSpec) else [spec]
        made = {f"${{{step}}}" for step in spec.steps} if isinstance(spec, PipelineSpec) else set()
        trains = [step for step in steps if isinstance(step, TrainSpec)]
        assert trains
        for train in trains:
            assert {share.corpus for share in train.mixture} <= made, "nothing else has to be there already"
            scale, have = train.scale, nodes(name)
            assert scale.gpus_per_worker > 0, "these machines are for GPUs"
            assert sum(min(node["CPU"] // scale.cpus_per_worker, node["GPU"] // scale.gpus_per_worker) for node in have) >= scale.workers
            assert sum(node["CPU"] for node in have) >= scale.workers * scale.cpus_per_worker + DATA_CPUS
