"""Cluster files: one of our own for this machine, or one of Ray's cluster launcher (`ray up`) for machines in a cloud."""

import copy
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distlm.autoscale import Bundles
from distlm.errors import ClusterError, SpecError
from distlm.head import LocalCluster
from distlm.spec.explain import explain, shown
from distlm.spec.load import dotted, nearest, parse

PRICES = "price_per_hour"
"""A section of `metadata`, which Ray does not read: kind of node -> what one costs an hour."""


@dataclass(frozen=True)
class Nodes:
    """What a job takes of a cluster."""

    price: float
    """All of them for an hour."""
    text: str


@dataclass(frozen=True)
class RayUpFile:
    """A file that `ray up` takes, checked by Ray's own schema."""

    path: Path
    config: dict[str, Any]

    def rows(self) -> list[tuple[str, str]]:
        """What `ray up` will make: the provider, then each kind of node."""
        provider = self.config["provider"]
        place = provider.get("region") or provider.get("location") or ""
        rows = [("cluster", self.config.get("cluster_name", "default")), ("provider", f"{provider['type']} {place}".strip()),
                ("workers", f"{self.config.get('max_workers', 2)} at most")]
        for name, node in self.config.get("available_node_types", {}).items():
            machine = node.get("node_config", {})
            kind = machine.get("InstanceType") or machine.get("machineType") or machine.get("azure_arm_parameters", {}).get("vmSize", "?")
            most = node.get("max_workers", self.config.get("max_workers", 2))
            count = "1, the head" if name == self.config.get("head_node_type") else f"{node.get('min_workers', 0)} to {most}"
            rows.append((name, f"{kind}, {count}"))
        return rows

    def nodes_for(self, bundles: Bundles) -> "Nodes":
        """The nodes that hold processes which need the same, of the kind for which `metadata.price_per_hour` says the lowest price in all;
        the head runs beside them. Raises SpecError where the file does not say prices, what a kind of node has, or has too few."""
        prices = self.config.get("metadata", {}).get(PRICES, {})
        kinds, head = self.config.get("available_node_types", {}), self.config.get("head_node_type")
        if not prices:
            raise SpecError("says no prices", where=str(self.path), remedy=f"give what a node of each kind costs an hour, in any currency: "
                                                                            f"metadata: {{{PRICES}: {{{next(iter(kinds), 'gpu')}: 1.5}}}}")
        need, found = {name: amount for name, amount in bundles[0].items() if amount}, list[Nodes]()
        in_all = self.config.get("max_workers", 2)
        for kind, price in prices.items():
            has, most = kinds[kind]["resources"], min(kinds[kind].get("max_workers", in_all), in_all)
            each = min(int(has.get(name, 0) / amount) for name, amount in need.items())
            count = -(-len(bundles) // each) if each else 0
            if each and count <= (1 if kind == head else most):
                beside = prices.get(head, 0.0) if kind != head else 0.0
                text = f"{count} x {kind} at {price:g}" + f" and the head at {beside:g}" * (beside > 0)
                found.append(Nodes(count * price + beside, text))
        if not found:
            wants = " and ".join(f"{amount:g} {name}" for name, amount in need.items())
            raise SpecError(f"no kind of node that has a price holds {len(bundles)} processes with {wants} each, by its resources and "
                            "max_workers", where=str(self.path), remedy="write the resources of the kind of node, as {CPU: 96, GPU: 8}, or "
                                                                        "raise its max_workers")
        return min(found, key=lambda nodes: nodes.price)

    def up(self) -> None:
        """`ray up`, which shows what it does. Raises ClusterError where it fails."""
        self._ray("up")

    def down(self) -> None:
        """`ray down`: ends the machines of this cluster alone, which the provider knows by its name."""
        self._ray("down")

    def _ray(self, verb: str) -> None:
        code = subprocess.run([sys.executable, "-m", "ray.scripts.scripts", verb, "--yes", str(self.path)], check=False,
                              env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}).returncode
        if code:
            raise ClusterError(f"`ray {verb}` ended with {code}", where=str(self.path), remedy="its output above says why")


def read(path: Path) -> LocalCluster | RayUpFile:
    """Read and check a cluster file of either sort. Raises SpecError with file and line."""
    try:
        data, lines = parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=str(path)) from None
    if "provider" not in data and (mistyped := nearest("provider", data)):
        raise SpecError("unknown key", where=f"{path}:{lines[mistyped,]}: {mistyped}", remedy="did you mean provider?")
    if "provider" in data:
        if not isinstance(data["provider"], dict):
            raise SpecError(f"{shown(data['provider'])}: must be a section", where=f"{path}:{lines['provider',]}: provider",
                            remedy="its keys are type, region and what else the provider needs")
        _check_ray_up(path, data, lines)
        _check_prices(path, data, lines)
        return RayUpFile(path, data)
    return _local(data, str(path), lines)


def named(name: str) -> LocalCluster:
    """The local cluster of a name. Raises SpecError for one that no cluster can have."""
    return _local({"name": name}, "--name", {})


def _local(data: dict[str, Any], path: str, lines: Any) -> LocalCluster:
    try:
        return LocalCluster.model_validate(data)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key, message, remedy = explain(LocalCluster, item)
            line = f":{lines[key]}" if key in lines else ""
            problems.append(str(SpecError(message, where=f"{path}{line}: {dotted(key)}", remedy=remedy)))
        raise SpecError("\n".join(problems)) from None


def _check_ray_up(path: Path, data: dict[str, Any], lines: Any) -> None:
    """Ray's own check, with its defaults filled in as `ray up` does."""
    from jsonschema import ValidationError as Mismatch
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler").setLevel(logging.WARNING)
    try:
        validate_config(prepare_config(copy.deepcopy(data)))
    except Mismatch as error:
        key = tuple(error.absolute_path)
        line = next((f":{lines[key[:end]]}" for end in range(len(key), 0, -1) if key[:end] in lines), "")
        if error.validator == "additionalProperties":
            known = error.schema.get("properties", {})
            place = (*key, next(name for name in error.instance if name not in known))
            near = nearest(place[-1], known)
            raise SpecError("unknown key", where=f"{path}:{lines.get(place, 1)}: {dotted(place)}",
                            remedy=f"did you mean {near}?" if near else "`ray up` has no such key") from None
        raise SpecError(error.message, where=f"{path}{line}: {dotted(key)}".rstrip(": ")) from None
    except (ValueError, KeyError, NotImplementedError, ImportError, RuntimeError) as error:
        raise SpecError(str(error), where=str(path)) from None


def _check_prices(path: Path, data: dict[str, Any], lines: Any) -> None:
    prices, kinds = data.get("metadata", {}).get(PRICES, {}), data.get("available_node_types", {})
    key: tuple[str, ...] = ("metadata", PRICES)
    if not isinstance(prices, dict):
        raise SpecError(f"{shown(prices)}: must be a section", where=f"{path}:{lines.get(key, 1)}: {dotted(key)}",
                        remedy="its keys are kinds of nodes")
    for kind, price in prices.items():
        where = f"{path}:{lines.get((*key, kind), 1)}: {dotted((*key, kind))}"
        if kind not in kinds:
            raise SpecError("there is no such kind of node", where=where, remedy=f"available_node_types has {', '.join(kinds)}")
        if isinstance(price, bool) or not isinstance(price, (int, float)) or price < 0:
            raise SpecError(f"{shown(price)}: must be a number, 0 or more", where=where)
