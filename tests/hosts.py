"""Two hosts on one machine, as network namespaces with an address each and a cable between them."""

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def two_hosts(addresses):
    """Yield the addresses of two hosts, given by name. On each host, both names lead to their addresses."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and iproute2")
    lines = ["127.0.0.1 localhost", *(f"{address} {host}" for host, address in addresses.items())]
    first, second = addresses
    commands = [f"link add {first}0 type veth peer name {second}0"]
    for host, address in addresses.items():
        commands += [f"netns add {host}", f"link set {host}0 netns {host}"]
        commands += [f"-n {host} addr add {address}/24 dev {host}0"]
        commands += [f"-n {host} link set {device} up" for device in (f"{host}0", "lo")]
    try:
        for host in addresses:
            names_of(host).mkdir(parents=True)
            (names_of(host) / "hosts").write_text("\n".join(lines) + "\n")
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True)
        yield addresses
    finally:
        for host in addresses:
            subprocess.run(["ip", "netns", "delete", host])
            shutil.rmtree(names_of(host), ignore_errors=True)


def names_of(host):
    """The folder that ``ip netns exec`` mounts over /etc."""
    return Path("/etc/netns") / host


def on_host(host):
    """The beginning of a command that runs on a host. It may give itself another host name."""
    return ["ip", "netns", "exec", host, "unshare", "--uts"]
