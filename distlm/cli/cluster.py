"""`distlm cluster`."""

import signal
from pathlib import Path
from typing import Annotated

import typer

from distlm.cli.options import Json, Yes
from distlm.cli.terminal import confirm, interrupt, print_json, show_rows
from distlm.storage import Storage

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Bring a cluster up or down.")
ClusterFile = Annotated[Path | None, typer.Argument(metavar="[FILE]", help="A local cluster's file, or one of `ray up`.")]


@app.command("up")
def cluster_up(file: ClusterFile = None, yes: Yes = False) -> None:
    """Start a cluster: on this machine, or in a cloud as the file says.

    Example: distlm cluster up
    """
    from distlm import cluster, clusterfile, head

    config = clusterfile.read(file) if file else head.LocalCluster()
    if isinstance(config, clusterfile.RayUpFile):
        show_rows(config.rows())
        if not yes:
            confirm("These machines cost money. Start them?")
        config.up()
        return
    signal.signal(signal.SIGTERM, interrupt)
    up, fresh = head.up(config, Storage.find())
    print(f"cluster {up.name} {'is up' if fresh else 'was up already'}: {up.cpus} logical CPUs at {up.address}\n"
          f"dashboard {cluster.shown(up.dashboard_url, up.token_file)}\n"
          f"for Ray's own tools: export RAY_ADDRESS={up.dashboard_url} RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={up.token_file}\n"
          f"`distlm cluster down{'' if up.name == 'local' else ' --name ' + up.name}` ends it")


@app.command("down")
def cluster_down(file: ClusterFile = None, name: Annotated[str, typer.Option(help="A local cluster by name.")] = "local",
                 yes: Yes = False, force: Annotated[bool, typer.Option("--force", help="Forget one whose machine is gone.")] = False
                 ) -> None:
    """End a cluster that `up` started, and no other.

    Example: distlm cluster down
    """
    from distlm import clusterfile, head, stopping

    config = clusterfile.read(file) if file else clusterfile.named(name)
    if isinstance(config, clusterfile.RayUpFile):
        show_rows(config.rows())
        if not yes:
            confirm("Terminate these machines?")
        config.down()
        return
    found = [one for one in head.recorded(Storage.find()) if one.name == config.name]
    if not found:
        print(f"cluster {config.name} is not up")
        return
    if force and not found[0].here():
        head.forget(found[0])
        print(f"the record of cluster {config.name} was removed; its processes on {found[0].host} were not reached")
        return
    ending = stopping.in_cluster(found[0], Storage.find()) if found[0].here() else []
    others = stopping.others_in_cluster(found[0], ending) if found[0].alive() else []
    if (ending or others) and found[0].alive() and not yes:
        confirm(f"{', '.join([*(job.name for job in ending), *others])} would end with it. Go on?")
    for job in ending:
        stopping.end_with_cluster(job)
    print(f"cluster {config.name} is down: {head.down(found[0])} processes ended")
    for job in ending:
        stopping.ended_with_cluster(job)
        print(f"{job.kind} {job.name} ended with it")
    for other in others:
        print(f"{other} ended with it")


@app.command("status")
def cluster_status(as_json: Json = False) -> None:
    """Show the cluster that jobs would run in.

    Example: distlm cluster status
    """
    from distlm import cluster

    now = cluster.status(cluster.require(Storage.find()))
    if as_json:
        print_json({"name": now.cluster.name, "address": now.cluster.address, "dashboard": now.cluster.dashboard_url, "nodes": now.nodes,
                     "resources": now.resources, "jobs": now.jobs, "applications": now.applications})
        return
    print(f"cluster {now.cluster.name} is up")
    show_rows([("address", now.cluster.address), ("dashboard", now.cluster.dashboard_url), ("nodes", str(now.nodes)),
                *((f"{name}s", f"{used:g} of {total:g} in use") for name, (used, total) in now.resources.items()),
                ("jobs", ", ".join(now.jobs) or "none"),
                ("endpoints", ", ".join(f"{name} ({state})" for name, state in now.applications.items()) or "none")])
